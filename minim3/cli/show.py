"""Writing an answer to the terminal while it comes: content to stdout, reasoning dimmed."""

import json
import sys
from typing import TextIO

from minim3.cli.session import Answer
from minim3.processing.output import ParsedOutput

_DIM, _PLAIN = "\x1b[2m", "\x1b[0m"
# A model's text must not move the cursor or set the title: control characters but tab and newline become visible.
_VISIBLE = {code: 0x2400 + code for code in range(32) if code not in (9, 10)} | dict.fromkeys(range(127, 160), 0xFFFD)


def stream_answer(answer: Answer, reasoning: TextIO | None) -> ParsedOutput:
    """Prints `answer` as it comes: content, then tool calls as JSON lines; reasoning to `reasoning`, if anywhere."""
    thinking = False
    last = ""
    try:
        for delta in answer:
            if delta.reasoning and reasoning is not None:
                if not thinking and reasoning.isatty():
                    reasoning.write(_DIM)
                thinking = True
                write(reasoning, delta.reasoning)
            if delta.content:
                thinking = thinking and _end_reasoning(reasoning)
                write(sys.stdout, delta.content)
                last = delta.content
    finally:
        if thinking:
            _end_reasoning(reasoning)
        answer.close()
    for call in answer.result.tool_calls:
        last = _line_break(last) + json.dumps({"name": call.name, "arguments": call.arguments}, ensure_ascii=False)
        write(sys.stdout, last)
    write(sys.stdout, _line_break(last))
    return answer.result


def write(stream: TextIO, text: str) -> None:
    """Writes and flushes; on a terminal control characters are made visible first."""
    stream.write(text.translate(_VISIBLE) if stream.isatty() else text)
    stream.flush()


def _end_reasoning(stream: TextIO | None) -> bool:
    assert stream is not None
    stream.write((_PLAIN if stream.isatty() else "") + "\n\n")
    stream.flush()
    return False


def _line_break(last: str) -> str:
    return "\n" if last and not last.endswith("\n") else ""
