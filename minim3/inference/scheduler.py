"""Which requests compute how many tokens in the next step. Policy only: lengths in, a plan out, no tensors.

Requests are ranked: higher priority first, then earlier arrival. Each step has a budget of tokens:

1. every request that decodes gets its one token;
2. their drafts (speculation) get what is over once every running request has a token, half of it while prompts wait;
3. what is left goes to prompts, cut to it (chunked prefill), so that the memory of a step is bounded by the budget and
   not by the longest prompt. The first in rank gets half or more; in the other half the shortest go first. So a long
   prompt always moves on, and a short one behind it does not wait for its end.

Pages are handed out as they are needed. A request that needs one when there is none takes it from the running request
that is last in rank, which is preempted: it goes back to wait with the tokens it has, and computes what is no longer in
the cache again. One that is itself last in rank pauses for the step instead. So the first in rank always moves on, and
every request is first one day.

A waiting request is admitted when the pages of its known tokens fit beside what the running ones still need; those
behind it in rank wait behind it (else a large one would starve). Where it begins like a prompt that is being computed,
it waits for those pages instead of computing them too, and lets others pass.
"""

from bisect import insort
from collections.abc import Sequence
from operator import attrgetter
from typing import NamedTuple

from minim3.inference.pages import PagePool
from minim3.inference.prefix import page_keys
from minim3.inference.request import Request

_RANK = attrgetter("rank")


class Chunk(NamedTuple):
    """``num_tokens`` more tokens of ``request``, from its first uncomputed one, and ``draft_ids`` to verify behind."""

    request: Request
    num_tokens: int
    draft_ids: Sequence[int] = ()

    @property
    def reaches_end(self) -> bool:
        """Whether all known tokens are computed with it, so that the next one is chosen."""
        return self.num_tokens == self.request.num_uncomputed_tokens


class Scheduler:
    """Holds the waiting and the running requests, each list in rank order, and plans the next step.

    Args:
        max_tokens_per_step: the budget, in tokens, of one step.
        max_running: most requests that run at once; at most the budget, so that every one can decode in each step.
        pool: the pages.
    """

    def __init__(self, *, max_tokens_per_step: int, max_running: int, pool: PagePool) -> None:
        if max_tokens_per_step < 1:
            raise ValueError(f"max_tokens_per_step must be at least 1, got {max_tokens_per_step}")
        if max_running < 1:
            raise ValueError(f"max_running must be at least 1, got {max_running}")
        self.max_tokens_per_step = max_tokens_per_step
        self.max_running = min(max_running, max_tokens_per_step)
        self.pool = pool
        self.waiting: list[Request] = []
        self.running: list[Request] = []
        self.num_preemptions = 0
        self._num_arrivals = 0
        self._promised: dict[bytes, Request] = {}  # keys of pages that a running request is about to fill

    @property
    def has_work(self) -> bool:
        return bool(self.waiting or self.running)

    def add(self, request: Request) -> None:
        """Queue a request.

        Raises:
            ValueError: it could never run, because it may need more pages than there are.
        """
        needed = self.pool.pages_for(request.max_stored_tokens)
        if self.pool.max_pages is not None and needed > self.pool.max_pages:
            raise ValueError(
                f"request {request.request_id!r} may need {needed} pages of {self.pool.page_size} tokens "
                f"({request.num_prompt_tokens} prompt + {request.max_new_tokens} new tokens), but the cache has "
                f"{self.pool.max_pages}: lower max_new_tokens or raise num_pages"
            )
        request.arrival = self._num_arrivals
        self._num_arrivals += 1
        insort(self.waiting, request, key=_RANK)

    def remove(self, request: Request) -> None:
        """Forget a finished or aborted request, wherever it stands, and free its pages."""
        if request in self.running:
            self._stop(request)
        else:
            self.waiting.remove(request)

    def schedule(self) -> list[Chunk]:
        """The next step, in no particular order; empty when nothing is left. Its pages are handed out."""
        self._admit()
        plan: list[Chunk] = []
        preempted, budget = self.num_preemptions, self.max_tokens_per_step
        prompts = [request for request in self.running if request.num_uncomputed_tokens > 1]
        over = budget - len(self.running)
        for_drafts = over // 2 if prompts else over
        for request in list(self.running):
            if request.num_uncomputed_tokens != 1 or (preempted < self.num_preemptions and not self._runs(request)):
                continue
            if not self._provide(request, 1):
                continue
            num_drafts = self._num_drafts(request, for_drafts) if request.draft_ids else 0
            plan.append(Chunk(request, 1, request.draft_ids[:num_drafts]))
            for_drafts -= num_drafts
            budget -= 1 + num_drafts
        assert budget >= 0, (self.max_tokens_per_step, plan)
        for request, share in _shares(prompts, budget):
            num_tokens = self._provide_some(request, share) if self._runs(request) else 0
            if num_tokens:
                plan.append(Chunk(request, num_tokens))
        if preempted < self.num_preemptions:  # perhaps one that was planned before
            plan = [chunk for chunk in plan if self._runs(chunk.request)]
        assert plan or not self.has_work, "nothing can run"
        return plan

    def published(self, request: Request) -> None:
        """Told after a step that the full pages of `request` can be found."""
        if self._promised:
            for key in request.page_keys[: request.num_keyed_pages]:
                if self._promised.get(key) is request:
                    del self._promised[key]

    def check_integrity(self) -> None:
        """Assert that no request stands twice, that ranks are in order and that only running requests hold pages."""
        assert len(self.running) <= self.max_running
        everyone = [id(request) for request in (*self.running, *self.waiting)]
        assert len(everyone) == len(set(everyone))
        for requests in (self.running, self.waiting):
            assert [request.rank for request in requests] == sorted(request.rank for request in requests)
        for request in (*self.running, *self.waiting):
            request.check_lengths()
            assert len(request.pages) <= self.pool.pages_for(request.max_stored_tokens)
        for request in self.waiting:
            assert not request.pages
            assert request.num_computed_tokens == 0
        assert all(request in self.running for request in self._promised.values())

    def _runs(self, request: Request) -> bool:
        return request in self.running

    # Pages

    def _provide(self, request: Request, num_tokens: int) -> bool:
        """Hand out the pages of `num_tokens` more tokens; False where those of lower rank have not enough."""
        wanted = request.num_computed_tokens + num_tokens
        missing = self.pool.pages_for(wanted) - len(request.pages)
        if missing > 0:
            while not self.pool.fits(missing):
                if self.running[-1] is request:
                    return False
                self._preempt(self.running[-1])
            self.pool.extend(request, wanted)
        return True

    def _provide_some(self, request: Request, num_tokens: int) -> int:
        """As many of `num_tokens` as there are pages for."""
        if num_tokens == 0 or self._provide(request, num_tokens):
            return num_tokens
        assert self.pool.max_pages is not None
        num_pages = len(request.pages) + self.pool.max_pages - self.pool.num_used_pages
        num_tokens = num_pages * self.pool.page_size - request.num_computed_tokens
        self.pool.extend(request, request.num_computed_tokens + num_tokens)
        return num_tokens

    def _num_drafts(self, request: Request, most: int) -> int:
        """How many drafts of `request` can be verified; no other request gives up a page for them."""
        num_drafts = min(len(request.draft_ids), most)
        if self.pool.pages_for(request.num_tokens + num_drafts) > len(request.pages):
            missing = self.pool.pages_for(request.num_tokens + num_drafts) - len(request.pages)
            if self.pool.fits(missing):
                self.pool.extend(request, request.num_tokens + num_drafts)
            else:
                num_drafts = min(num_drafts, len(request.pages) * self.pool.page_size - request.num_tokens)
        return num_drafts

    def _preempt(self, request: Request) -> None:
        self._stop(request)
        request.draft_ids = []
        request.num_preemptions += 1
        self.num_preemptions += 1
        insort(self.waiting, request, key=_RANK)

    def _stop(self, request: Request) -> None:
        self.running.remove(request)
        self.pool.free(request)
        for key in [key for key, owner in self._promised.items() if owner is request]:
            del self._promised[key]

    # Admission

    def _admit(self) -> None:
        place = 0
        while place < len(self.waiting):
            request = self.waiting[place]
            last = self.running[-1] if self.running else None
            may_preempt = last is not None and last.priority < request.priority
            full = len(self.running) >= self.max_running
            if full and not may_preempt:
                return
            found = self.pool.match(request)
            if self._is_promised(request, len(found)):
                place += 1
            elif not full and self._fits(request, found):
                self._start(self.waiting.pop(place), found)
            elif may_preempt:
                assert last is not None
                self._preempt(last)
            else:
                return

    def _fits(self, request: Request, found: Sequence[int]) -> bool:
        """Whether the pages of all known tokens fit, with those that running requests lack, and one more for each."""
        if self.pool.max_pages is None:
            return True
        needed = self.pool.pages_for(request.num_tokens) - len(found) + self.pool.num_idle(found)
        for other in self.running:
            known = self.pool.pages_for(other.num_tokens)
            grows = self.pool.pages_for(other.max_stored_tokens) > known
            needed += max(known - len(other.pages), 0) + grows
        return self.pool.fits(needed)

    def _start(self, request: Request, found: Sequence[int]) -> None:
        self.pool.claim(request, found)
        if request.num_cached_tokens is None:
            request.num_cached_tokens = request.num_computed_tokens
        insort(self.running, request, key=_RANK)
        if self.pool.prefix_caching:
            for key in page_keys(request, self.pool.page_size, request.num_tokens // self.pool.page_size)[len(found) :]:
                self._promised.setdefault(key, request)

    def _is_promised(self, request: Request, num_found: int) -> bool:
        """Whether the first page that is not in the cache is being computed for another request."""
        shareable = (request.num_tokens - 1) // self.pool.page_size
        return bool(self._promised) and num_found < shareable and request.page_keys[num_found] in self._promised


def _shares(prompts: Sequence[Request], budget: int) -> list[tuple[Request, int]]:
    """The budget dealt to prompts given in rank order, in the order in which they take pages."""
    if not prompts:
        return []
    first, *others = prompts
    of_first = min(first.num_uncomputed_tokens, budget - budget // 2 if others else budget)
    shares, left = [], budget - of_first
    for request in sorted(others, key=lambda r: (-r.priority, r.num_uncomputed_tokens, r.arrival)):
        share = min(request.num_uncomputed_tokens, left)
        left -= share
        shares.append((request, share))
    return [(first, of_first + min(left, first.num_uncomputed_tokens - of_first)), *shares]
