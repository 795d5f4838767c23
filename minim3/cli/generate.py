"""`minim3 generate`: one prompt, one answer."""

import json
import sys
from collections.abc import Sequence
from typing import Any

from minim3.cli.session import Answer, LoadOptions, SamplingOptions, Session
from minim3.cli.show import stream_answer


def run_generate(
    prompt: str | None,
    images: Sequence[str],
    videos: Sequence[str],
    options: LoadOptions,
    sampling: SamplingOptions,
    *,
    system: str | None,
    thinking: str,
    as_json: bool,
    raw: bool,
) -> None:
    """Answers on stdout; reasoning, where there is a terminal to dim it on, on stderr."""
    if raw and (system is not None or thinking != "adaptive"):
        raise ValueError("--raw continues the prompt as it stands: it takes neither --system nor --thinking")
    text = read_prompt(prompt)
    session = Session(options, sampling)
    if raw:
        answer = session.complete(text, images, videos)
    else:
        answer = session.answer(user_messages(text, images, videos, system), thinking)
    if as_json:
        for _ in answer:
            pass
        print(json.dumps(describe_answer(answer, session), ensure_ascii=False))
    else:
        stream_answer(answer, sys.stderr if sys.stderr.isatty() else None)


def user_messages(
    text: str, images: Sequence[Any], videos: Sequence[Any], system: str | None = None
) -> list[dict[str, Any]]:
    """A conversation of one user turn: pictures, then videos, then the text."""
    parts: list[dict[str, Any]] = [{"type": "image", "image": image} for image in images]
    parts += [{"type": "video", "video": video} for video in videos]
    parts.append({"type": "text", "text": text})
    messages: list[dict[str, Any]] = [] if system is None else [{"role": "system", "content": system}]
    return [*messages, {"role": "user", "content": parts}]


def describe_answer(answer: Answer, session: Session) -> dict[str, Any]:
    """The object that `--json` prints."""
    result, request = answer.result, answer.request
    calls = [
        {"id": call.id, "name": call.name, "arguments": call.arguments, "complete": call.complete}
        for call in result.tool_calls
    ]
    decode_seconds = answer.seconds - answer.seconds_to_first
    rate = (request.num_output_tokens - 1) / decode_seconds if request.num_output_tokens > 1 else None
    return {
        "text": result.content,
        "reasoning": result.reasoning,
        "tool_calls": calls,
        "finish_reason": result.finish_reason,
        "usage": {
            "prompt_tokens": request.num_prompt_tokens,
            "completion_tokens": request.num_output_tokens,
            "total_tokens": request.num_tokens,
        },
        "timing": {
            "seconds_to_first_token": round(answer.seconds_to_first, 4),
            "seconds": round(answer.seconds, 4),
            "tokens_per_second": None if rate is None else round(rate, 2),
        },
        "seed": None if session.params.greedy else session.params.seed,
    }


def read_prompt(prompt: str | None) -> str:
    """The prompt given, or what stdin holds. ValueError where there is neither, or nothing in it."""
    if prompt is not None and prompt != "-":
        if not prompt.strip():
            raise ValueError("the prompt is empty")
        return prompt
    if prompt is None and sys.stdin.isatty():
        raise ValueError('no prompt: minim3 generate "..." or pipe it in (minim3 generate - reads the keyboard)')
    text = sys.stdin.read().rstrip("\n")
    if not text.strip():
        raise ValueError("the prompt on stdin is empty")
    return text
