"""What keeps an answer inside a grammar: the engine asks a guide which tokens may come next, and tells it what came."""

from typing import Protocol

from torch import Tensor


class Guide(Protocol):
    """The state of one answer in its grammar. One guide serves one request.

    For every token the engine calls `allow` on a row of logits, chooses among what is left, and calls `accept` with the
    choice. Speculation looks ahead on a `fork`; only tokens that stand are accepted by the guide itself, each once and
    in order, the end-of-sequence id included.
    """

    @property
    def finished(self) -> bool:
        """The grammar allows nothing more: the request ends after the token just accepted."""

    def allow(self, logits_V: Tensor) -> None:
        """Set the logits `[vocabulary]` of forbidden tokens to -inf, in place; at least one stays finite."""

    def accept(self, token_id: int) -> None:
        """Move on by one token, which `allow` had left finite."""

    def fork(self) -> "Guide":
        """An independent copy at the same place: what happens to one does not reach the other."""
