"""Which requests compute how many tokens in the next step. Policy only: lengths in, a plan out, no tensors.

First come, first served. Each step has a budget of tokens:

1. every request that decodes gets its one token;
2. what is left goes to prompts, in order of arrival, each cut to the budget (chunked prefill), so that the memory of a
   step is bounded by the budget and not by the longest prompt;
3. a waiting request is admitted only when the pages it could ever need fit beside those of all running requests:
   a running request never runs out of pages, and none is ever thrown out.
"""

from collections import deque
from typing import NamedTuple

from minim3.inference.request import Request


class Chunk(NamedTuple):
    """``num_tokens`` more tokens of ``request``, from its first uncomputed one."""

    request: Request
    num_tokens: int


class Scheduler:
    """Holds the waiting and the running requests and plans the next step.

    Args:
        max_tokens_per_step: the budget, in tokens, of one step.
        max_running: most requests that run at once; at most the budget, so that every one can decode in each step.
        page_size: tokens a cache page holds.
        max_pages: pages of the cache, or None when it may grow without limit.
    """

    def __init__(self, *, max_tokens_per_step: int, max_running: int, page_size: int, max_pages: int | None) -> None:
        if max_tokens_per_step < 1:
            raise ValueError(f"max_tokens_per_step must be at least 1, got {max_tokens_per_step}")
        if max_running < 1:
            raise ValueError(f"max_running must be at least 1, got {max_running}")
        self.max_tokens_per_step = max_tokens_per_step
        self.max_running = min(max_running, max_tokens_per_step)
        self.page_size = page_size
        self.max_pages = max_pages
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []
        self.num_reserved_pages = 0

    def pages_needed(self, request: Request) -> int:
        """The most pages ``request`` can ever hold."""
        return -(-request.max_stored_tokens // self.page_size)

    def add(self, request: Request) -> None:
        """Queue a request.

        Raises:
            ValueError: it could never run, because it may need more pages than there are.
        """
        needed = self.pages_needed(request)
        if self.max_pages is not None and needed > self.max_pages:
            raise ValueError(
                f"request {request.request_id!r} may need {needed} pages of {self.page_size} tokens "
                f"({request.num_prompt_tokens} prompt + {request.max_new_tokens} new tokens), but the cache has "
                f"{self.max_pages}: lower max_new_tokens or raise num_pages"
            )
        self.waiting.append(request)

    def schedule(self) -> list[Chunk]:
        """The next step: decoding requests first, then prompts, in order of arrival; empty when nothing is left."""
        self._admit()
        plan = [Chunk(request, 1) for request in self.running if request.num_uncomputed_tokens == 1]
        budget = self.max_tokens_per_step - len(plan)
        assert budget >= 0, (self.max_tokens_per_step, len(plan))
        for request in self.running:
            num_left = request.num_uncomputed_tokens
            if num_left > 1 and budget > 0:
                plan.append(Chunk(request, min(num_left, budget)))
                budget -= plan[-1].num_tokens
        return plan

    def remove(self, request: Request) -> None:
        """Forget a finished or aborted request, wherever it stands."""
        if request in self.running:
            self.running.remove(request)
            self.num_reserved_pages -= self.pages_needed(request)
        else:
            self.waiting.remove(request)

    @property
    def has_work(self) -> bool:
        return bool(self.waiting or self.running)

    def check_integrity(self) -> None:
        """Assert that reservations add up and fit, and that no request stands twice."""
        assert self.num_reserved_pages == sum(map(self.pages_needed, self.running))
        assert self.max_pages is None or self.num_reserved_pages <= self.max_pages
        assert len(self.running) <= self.max_running
        everyone = [id(request) for request in (*self.running, *self.waiting)]
        assert len(everyone) == len(set(everyone))
        for request in (*self.running, *self.waiting):
            request.check_lengths()

    def _admit(self) -> None:
        while self.waiting and len(self.running) < self.max_running:
            needed = self.pages_needed(self.waiting[0])
            if self.max_pages is not None and self.num_reserved_pages + needed > self.max_pages:
                return
            self.num_reserved_pages += needed
            self.running.append(self.waiting.popleft())
