"""Perplexity of text: sliding windows over documents that may be longer than memory."""

import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from minim3.evaluation.scoring import BATCH_SIZE, BATCH_TOKENS, Pair, loglikelihoods
from minim3.model.causal_lm import CausalLM
from minim3.processing.tokenizer import Tokenizer

WINDOW = 4096
_PIECE_CHARACTERS = 1 << 20


@dataclass(frozen=True)
class Perplexity:
    """nats: the sum over the `num_tokens` scored, which stand for `num_bytes` bytes of UTF-8."""

    nats: float
    num_tokens: int
    num_bytes: int

    @property
    def nats_per_token(self) -> float:
        return self.nats / self.num_tokens

    @property
    def perplexity(self) -> float:
        """e to the nats a token; infinite where that is too large for a float."""
        return math.inf if self.nats_per_token >= 709 else math.exp(self.nats_per_token)

    @property
    def bits_per_byte(self) -> float:
        """Comparable between tokenizers."""
        return self.nats / math.log(2) / self.num_bytes


def perplexity(
    model: CausalLM,
    tokenizer: Tokenizer,
    documents: Iterable[Iterable[str]],
    *,
    window: int | None = None,
    stride: int | None = None,
    prefix_id: int | None = None,
    max_windows: int | None = None,
    batch_size: int = BATCH_SIZE,
    batch_tokens: int = BATCH_TOKENS,
    progress: Callable[[int], None] | None = None,
) -> Perplexity:
    """Perplexity of all documents together.

    Args:
        documents: each as pieces of text (see `text_pieces`), read as they are needed. Documents do not see each other.
        window: tokens the model sees at once, at most; default 4096 or what the model takes. A document that fits is
            scored whole.
        stride: how far the window moves over a longer document: every token but those of the first window is scored
            with at least `window - stride` tokens before it; default half a window. Small strides cost more.
        prefix_id: a token put before each document, so that its first token is scored too (the model's own
            `bos_token_id` is what harnesses take). None: the first token, and its bytes, are not counted.
        max_windows: stop after so many.
        progress: called after each window with the number of tokens scored so far.

    Raises:
        ValueError: a window the model does not have, a stride that is no part of it, nothing to score.
    """
    limit = model.text_config.max_position_embeddings
    window = min(WINDOW, limit) if window is None else window
    if not 2 <= window <= limit:
        raise ValueError(f"the window is {window} tokens; the model takes 2 to {limit} (max_position_embeddings)")
    stride = window // 2 if stride is None else stride
    if not 1 <= stride < window:
        raise ValueError(f"the stride is {stride} tokens; with a window of {window} it can be 1 to {window - 1}")

    def tokens(pieces: Iterable[str]) -> Iterator[int]:
        if prefix_id is not None:
            yield prefix_id
        for piece in pieces:
            yield from tokenizer.encode(piece)

    sizes: deque[int] = deque()

    def pairs() -> Iterator[Pair]:
        for pieces in documents:
            for pair in sliding_windows(tokens(pieces), window, stride):
                sizes.append(sum(len(tokenizer.token_bytes(token_id)) for token_id in pair.continuation))
                yield pair

    nats, num_tokens, num_bytes = 0.0, 0, 0
    some = islice(pairs(), max_windows)
    for score in loglikelihoods(model, some, batch_size=batch_size, batch_tokens=batch_tokens):
        nats -= score.logprob
        num_tokens += score.num_tokens
        num_bytes += sizes.popleft()
        if progress is not None:
            progress(num_tokens)
    if not num_tokens:
        raise ValueError("there is nothing to score: a text of at least two tokens is needed")
    return Perplexity(nats, num_tokens, num_bytes)


def sliding_windows(tokens: Iterable[int], window: int, stride: int) -> Iterator[Pair]:
    """Windows of `window` tokens that begin every `stride` tokens; each scores what no window before it scored."""
    seen: list[int] = []
    scored = 1  # tokens of `seen` that are context only
    for token in tokens:
        if len(seen) == window:
            yield Pair(seen[:scored], seen[scored:])
            seen = seen[stride:]
            scored = window - stride
        seen.append(token)
    if len(seen) > scored:
        yield Pair(seen[:scored], seen[scored:])


def text_pieces(path: Path, characters: int = _PIECE_CHARACTERS) -> Iterator[str]:
    """A UTF-8 text file in pieces that tokenize as the whole does: cut after a line break between two lines of text.

    A piece is some `characters` long, or as long as it takes to find such a place. Raises ValueError for a file that is
    no UTF-8 text.
    """
    held = ""
    with path.open(encoding="utf-8", newline="") as file:
        try:
            while read := file.read(characters):
                held += read
                cut = _last_safe_cut(held)
                if cut:
                    yield held[:cut]
                    held = held[cut:]
        except UnicodeDecodeError as error:
            raise ValueError(f"{path} is not UTF-8 text ({error.reason})") from error
    if held:
        yield held


def _last_safe_cut(text: str) -> int:
    """The place after the last line break with no white space beside it; 0 if there is none."""
    end = len(text) - 1
    while (found := text.rfind("\n", 1, end)) > 0:
        if not text[found - 1].isspace() and not text[found + 1].isspace():
            return found + 1
        end = found
    return 0
