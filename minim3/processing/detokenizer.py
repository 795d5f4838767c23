"""Token ids to text as they are generated: no half characters, and stop strings found across token borders."""

import codecs
from collections.abc import Iterable, Sequence

from minim3.processing.tokenizer import Tokenizer


class IncrementalDetokenizer:
    """Text of a growing sequence of ids.

    The pieces returned by `feed` and the last one by `finish`, put together, are `tokenizer.decode` of all ids. A
    character is returned once all its bytes are there; bytes that can no longer become one are U+FFFD. The cost of a
    token does not depend on how many came before.
    """

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool = True) -> None:
        self._tokenizer = tokenizer
        self._skipped = tokenizer.special_ids if skip_special_tokens else frozenset()
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def feed(self, ids: Iterable[int] | int) -> str:
        """The text that these ids complete."""
        if isinstance(ids, int):
            ids = (ids,)
        token_bytes = self._tokenizer.token_bytes
        return self._decoder.decode(b"".join(token_bytes(one) for one in ids if one not in self._skipped))

    def finish(self) -> str:
        """What is left of an unfinished character, as U+FFFD; the detokenizer starts afresh."""
        rest = self._decoder.decode(b"", final=True)
        self._decoder.reset()
        return rest


def held_back(text: str, markers: Iterable[str]) -> int:
    """Length of the longest end of `text` that is the beginning of a marker (and not all of it)."""
    longest = 0
    for marker in markers:
        for length in range(min(len(marker) - 1, len(text)), longest, -1):
            if text.endswith(marker[:length]):
                longest = length
                break
    return longest


class StopStrings:
    """Ends a text stream at the first stop string, which is not part of the output.

    The first is the one that is complete first; of several that end together, the longest. Text that may turn out to be
    the beginning of a stop string is held back, so the output does not depend on how the text was cut into pieces.

    Raises:
        ValueError: an empty stop string.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        if not all(isinstance(stop, str) and stop for stop in stops):
            raise ValueError(f"stop strings must be non-empty strings, got {list(stops)!r}")
        self._stops = sorted(stops, key=len, reverse=True)
        self._held = ""
        self.stopped_by: str | None = None

    def feed(self, text: str) -> str:
        """The text that is certainly output; empty for ever after a stop string (see `stopped_by`)."""
        if self.stopped_by is not None or not text:
            return ""
        text = self._held + text
        found = [(start + len(stop), start, stop) for stop in self._stops if (start := text.find(stop)) >= 0]
        if found:
            _, start, self.stopped_by = min(found)
            self._held = ""
            return text[:start]
        length = held_back(text, self._stops)
        self._held = text[len(text) - length :]
        return text[: len(text) - length]

    def look_ahead(self, text: str) -> str | None:
        """The text up to a stop string that `text` would complete, which then counts as found; else None."""
        if self.stopped_by is not None or not text or not self._stops:
            return None
        found = StopStrings(self._stops)
        found._held = self._held
        before = found.feed(text)
        if found.stopped_by is None:
            return None
        self.stopped_by, self._held = found.stopped_by, ""
        return before

    def finish(self) -> str:
        """The text held back when generation ends without a stop string."""
        rest, self._held = self._held, ""
        return rest
