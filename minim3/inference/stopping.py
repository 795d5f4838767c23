"""Stop strings over streamed text: found across token borders, and never shown to the reader in part."""

from typing import Protocol


class Detokenizer(Protocol):
    """Turns the ids of one answer into text, bit by bit; `minim3.processing` has one."""

    def push(self, token_id: int) -> str:
        """The text that became certain with this id (perhaps none: half a character is held back)."""

    def flush(self) -> str:
        """What was held back, once no more ids follow."""


class StopMatcher:
    """Passes text on until one of `stop` appears in it.

    Text that may be the beginning of a stop string is held back until it is decided. The stop string itself and all
    that follows it are dropped. Where two begin at different places the earlier one counts.
    """

    def __init__(self, stop: tuple[str, ...]) -> None:
        self.stop = stop
        self.matched: str | None = None
        self._held = ""

    def push(self, text: str) -> str:
        """Add `text`; returns what may be shown by now. `matched` is set once a stop string was completed."""
        if not self.stop:
            return text
        if self.matched is not None:
            return ""
        self._held += text
        found = [(place, s) for s in self.stop if (place := self._held.find(s)) >= 0]
        if found:
            place, self.matched = min(found)
            shown, self._held = self._held[:place], ""
            return shown
        keep = self._num_undecided()
        shown, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        return shown

    def flush(self) -> str:
        """What was held back, once no more text follows."""
        shown, self._held = self._held, ""
        return shown

    def _num_undecided(self) -> int:
        """Length of the longest end of the held text that begins a stop string."""
        longest = min(len(self._held), max(map(len, self.stop)) - 1)
        for length in range(longest, 0, -1):
            if any(s.startswith(self._held[-length:]) for s in self.stop):
                return length
        return 0
