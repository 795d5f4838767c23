"""Multiple choice by log-likelihood: which of the answers the model finds most likely after the question."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from minim3.evaluation.records import Record, encode_prompt, text_of
from minim3.evaluation.report import Share
from minim3.evaluation.scoring import BATCH_SIZE, BATCH_TOKENS, Pair, loglikelihoods
from minim3.model.causal_lm import CausalLM
from minim3.processing.processor import MiniMaxM3VLProcessor
from minim3.processing.tokenizer import Tokenizer


@dataclass(frozen=True)
class Choice:
    """A question with its answers; `pairs` are (question, answer) in ids, `right` is the index of the right answer."""

    choices: tuple[str, ...]
    right: int
    pairs: tuple[Pair, ...]


@dataclass(frozen=True)
class ChoiceResult:
    """plain: by the sum of log-probabilities. normalized: by the sum divided by the characters of the answer."""

    plain: Share
    normalized: Share


def read_choice(
    record: Record, processor: MiniMaxM3VLProcessor, *, raw: bool = False, max_tokens: int | None = None
) -> Choice:
    """A record {"question" or "messages", "choices": [text, ...], "answer"} as pairs to score.

    The answer is the index of the right choice, its letter (A is the first), or its text. In the chat format an answer
    follows the header of a turn without thinking; raw, a question and a space. max_tokens: what the model takes.

    Raises:
        ValueError: a field that is missing or wrong, with file and line.
    """
    choices = record.fields.get("choices")
    if choices is None:
        raise record.need("choices", "a list of at least two texts")
    if not isinstance(choices, list) or len(choices) < 2 or not all(isinstance(one, str) and one for one in choices):
        raise record.error('"choices" must be a list of at least two texts, none empty')
    right = _right_index(record, choices)
    if raw:
        question = text_of(record, "question")
        encode_prompt(record, processor, "question", raw=True)  # refuses fields that need the chat format
        if not question.strip():
            raise record.error('"question" is empty')
        encoded = [encode_continuation(processor.tokenizer, question, " " + one) for one in choices]
        pairs = tuple(Pair(context, continuation) for context, continuation in encoded)
    else:
        prompt = encode_prompt(record, processor, "question", raw=False, thinking="disabled")
        pairs = tuple(Pair(prompt.ids, processor.tokenizer.encode(one), prompt.media) for one in choices)
    longest = max(len(pair.context) + len(pair.continuation) - 1 for pair in pairs)
    if max_tokens is not None and longest > max_tokens:
        raise record.error(f"question and answer have {longest + 1} tokens, the model takes {max_tokens}")
    return Choice(tuple(choices), right, pairs)


def encode_continuation(tokenizer: Tokenizer, context: str, continuation: str) -> tuple[list[int], list[int]]:
    """Ids of a text and of what continues it, cut out of the ids of both together, as harnesses do.

    White space at the end of the context belongs to the continuation: a word is one token with the space before it.
    """
    stripped = context.rstrip()
    whole = tokenizer.encode(context + continuation, allow_special=True)
    num_context = len(tokenizer.encode(stripped, allow_special=True))
    return whole[:num_context], whole[num_context:]


def choose(
    model: CausalLM,
    questions: Iterable[Choice],
    *,
    batch_size: int = BATCH_SIZE,
    batch_tokens: int = BATCH_TOKENS,
    progress: Callable[[int], None] | None = None,
) -> ChoiceResult:
    """Accuracy over all questions, which are read as they are needed. The first of equally likely answers counts.

    progress: called after each question with the number done. Raises ValueError as `loglikelihoods` does.
    """
    asked: deque[Choice] = deque()

    def pairs() -> Iterator[Pair]:
        for question in questions:
            asked.append(question)
            yield from question.pairs

    num = num_plain = num_normalized = 0
    scores: list[float] = []
    for score in loglikelihoods(model, pairs(), batch_size=batch_size, batch_tokens=batch_tokens):
        scores.append(score.logprob)
        if len(scores) < len(asked[0].choices):
            continue
        question = asked.popleft()
        normalized = [logprob / len(text) for logprob, text in zip(scores, question.choices)]
        num += 1
        num_plain += scores.index(max(scores)) == question.right
        num_normalized += normalized.index(max(normalized)) == question.right
        scores = []
        if progress is not None:
            progress(num)
    return ChoiceResult(Share(num_plain, num), Share(num_normalized, num))


def _right_index(record: Record, choices: list[str]) -> int:
    answer = record.fields.get("answer")
    if answer is None:
        raise record.need("answer", "the index of the right choice, its letter or its text")
    if isinstance(answer, str):
        if choices.count(answer) == 1:
            return choices.index(answer)
        index = ord(answer) - ord("A") if len(answer) == 1 else -1
    else:
        index = answer if isinstance(answer, int) and not isinstance(answer, bool) else -1
    if not 0 <= index < len(choices):
        raise record.error(
            f'"answer" is {answer!r}; with {len(choices)} choices it is 0 to {len(choices) - 1}, '
            f"A to {chr(ord('A') + len(choices) - 1)}, or the text of one"
        )
    return index
