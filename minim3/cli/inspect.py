"""`minim3 inspect`: an answer, and a report of what the model selected and ran to write it."""

import sys
from collections.abc import Sequence
from pathlib import Path

from minim3.cli.generate import read_prompt, user_messages
from minim3.cli.session import LoadOptions, SamplingOptions, Session
from minim3.cli.show import stream_answer
from minim3.inspection import record, write_report
from minim3.inspection.recording import checked_layers


def run_inspect(
    prompt: str | None,
    images: Sequence[str],
    videos: Sequence[str],
    options: LoadOptions,
    sampling: SamplingOptions,
    output: Path,
    *,
    system: str | None,
    thinking: str,
    layers: Sequence[int] | None,
    max_tokens: int,
) -> None:
    """The answer on stdout, the report in `output` (its place on stderr)."""
    if output.suffix.lower() not in (".html", ".htm", ".json"):
        raise ValueError(f"--output is {str(output)!r}: its name must end in .html or .json")
    if not output.parent.is_dir():
        raise ValueError(f"--output is {str(output)!r}: there is no folder {str(output.parent)!r}")
    text = read_prompt(prompt)
    session = Session(options, sampling)
    checked_layers(layers, session.model.text_config.num_hidden_layers)
    messages = user_messages(text, images, videos, system)
    answer = session.answer(messages, thinking)
    request = answer.request
    if request.num_tokens + request.max_new_tokens > max_tokens:
        raise ValueError(
            f"the prompt has {request.num_tokens} tokens and the answer may have {request.max_new_tokens}, more than "
            f"--max-tokens {max_tokens} together: lower --max-new-tokens, or raise --max-tokens"
        )
    stream_answer(answer, sys.stderr if sys.stderr.isatty() else None)
    inspection = record(
        session.model, session.processor, messages, answer_ids=request.output_ids, thinking_mode=thinking,
        layers=layers, max_tokens=max_tokens, name=options.model or "pocket",
    )  # fmt: skip
    path = write_report(inspection, output, title=text)
    print(f"minim3: wrote {path}", file=sys.stderr, flush=True)


def parse_layers(text: str | None) -> list[int] | None:
    """Layers as people write them: "3", "0,4,8", "10-19". None is all.

    Raises:
        ValueError: anything else.
    """
    if text is None:
        return None
    layers: list[int] = []
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        if not first.isdecimal() or (dash and not last.isdecimal()):
            raise ValueError(f"--layers is {text!r}: give numbers and ranges such as 0,4,10-19")
        layers += range(int(first), int(last if dash else first) + 1)
    return layers
