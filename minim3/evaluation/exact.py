"""Exact match: is the greedy answer the expected text?"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from minim3.evaluation.records import Prompt, Record, encode_prompt
from minim3.evaluation.report import Share
from minim3.processing.processor import MiniMaxM3VLProcessor


@dataclass(frozen=True)
class ExactCase:
    """A prompt and the answers that count as right."""

    prompt: Prompt
    accepted: tuple[str, ...]

    def is_right(self, answer: str) -> bool:
        """Equal but for white space: at both ends none counts, inside any run of it is one space."""
        return _normalized(answer) in {_normalized(one) for one in self.accepted}


@dataclass(frozen=True)
class ExactResult:
    """mistakes: up to 20, as {"expected", "answer"}."""

    share: Share
    mistakes: tuple[dict[str, Any], ...]


def read_exact(
    record: Record,
    processor: MiniMaxM3VLProcessor,
    *,
    raw: bool = False,
    thinking: str | None = None,
    max_tokens: int | None = None,
) -> ExactCase:
    """A record {"prompt" or "messages", "answer": text or a list of accepted texts}. max_tokens: what the model takes.

    Raises ValueError for a field that is missing or wrong, with file and line.
    """
    answer = record.fields.get("answer")
    if answer is None:
        raise record.need("answer", "the expected text, or a list of accepted texts")
    accepted = [answer] if isinstance(answer, str) else answer
    if not isinstance(accepted, list) or not accepted or not all(isinstance(one, str) for one in accepted):
        raise record.error(f'"answer" must be a text or a list of texts, got {answer!r}')
    prompt = encode_prompt(record, processor, "prompt", raw=raw, thinking=thinking)
    if not prompt.ids:
        raise record.error('"prompt" is empty')
    if max_tokens is not None and len(prompt.ids) > max_tokens:
        raise record.error(f"the prompt has {len(prompt.ids)} tokens, the model takes {max_tokens}")
    return ExactCase(prompt, tuple(accepted))


def exact_match(
    answer: Callable[[Iterable[Prompt]], Iterator[str]],
    cases: Iterable[ExactCase],
    *,
    progress: Callable[[int], None] | None = None,
) -> ExactResult:
    """Asks every case, as they are needed.

    answer: gives the answers to prompts in order (`answers.greedy_answers` with a model). progress: called after each
    answer with the number done.
    """
    asked: deque[ExactCase] = deque()

    def prompts() -> Iterator[Prompt]:
        for case in cases:
            asked.append(case)
            yield case.prompt

    num = right = 0
    mistakes: list[dict[str, Any]] = []
    for given in answer(prompts()):
        case = asked.popleft()
        num += 1
        if case.is_right(given):
            right += 1
        elif len(mistakes) < 20:
            mistakes.append({"expected": case.accepted[0], "answer": given})
        if progress is not None:
            progress(num)
    return ExactResult(Share(right, num), tuple(mistakes))


def _normalized(text: str) -> str:
    return " ".join(text.split())
