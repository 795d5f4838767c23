"""Block selection for few new tokens of each sequence over its pages (`decode` attends what is chosen here)."""

import torch
from torch import Tensor

from minim3.kernels.portable.decode import padded
from minim3.kernels.portable.entries import Layout, ScoreBuffer
from minim3.kernels.portable.plan import CacheRows, PagedPlan


class Choice:
    """Block selection for sequences with the same number of queries, each with more blocks than the budget takes.

    Forced blocks are not scored: those between the first and the local ones are free, and compete for what is left of
    the budget.
    """

    def __init__(
        self, plan: PagedPlan, cache: CacheRows, dim: int, heads: int, *, block_size: int, topk_blocks: int,
        init_blocks: int, local_blocks: int, score_type: str,
    ) -> None:  # fmt: skip
        assert local_blocks
        device, requests = plan.page_table.device, plan.requests
        self.plan, self.cache, self.block_size, self.score_type = plan, cache, block_size, score_type
        self.heads, self.dim, self.queries, self.init_blocks = heads, dim, requests[0].num_queries, init_blocks
        self.free = slice(init_blocks, topk_blocks - local_blocks)
        self.num_free = topk_blocks - local_blocks - init_blocks
        current = [[r.position(i) // block_size for i in range(self.queries)] for r in requests]
        assert min(map(min, current)) >= topk_blocks
        self.stop = max(map(max, current)) + 1 - local_blocks
        self.layout = Layout.of(cache, self.stop * cache.per_block, dim, cache.per_block)
        now = torch.tensor(current, device=device).view(len(requests), self.queries, 1, 1)
        self.hidden: Tensor | None = None
        if min(map(min, current)) + 1 - local_blocks < self.stop:
            self.hidden = torch.arange(init_blocks, self.stop, device=device) > now - local_blocks
        ids = torch.arange(topk_blocks, device=device) - topk_blocks + 1 + now.flatten(0, 1)
        ids[..., :init_blocks] = torch.arange(init_blocks, device=device)
        self.forced = ids.expand(-1, heads, -1).contiguous()
        """int64 `[T, Hi, topk]`: the forced blocks in their places, others in the free ones."""
        self._in_place: _ReadInPlace | None = None
        first_page = plan.first_page(cache) if len(requests) == 1 == self.queries else None
        if first_page is not None and score_type == "max":
            first = first_page * cache.per_page * cache.tokens
            self._in_place = _ReadInPlace(first, self, device)
        self._found: Tensor | None = None

    def __call__(self, index_q: Tensor, rows: Tensor) -> Tensor:
        """Scaled `index_q` `[T, Hi, Di]` -> int64 `[T, Hi, topk]`, ascending."""
        chosen = self.choose_free(index_q, rows).sort(-1).values.view(*index_q.shape[:2], -1)
        ids = self.forced.clone()
        ids[..., self.free] = chosen + self.init_blocks if self.init_blocks else chosen
        return ids

    def choose_free(self, index_q: Tensor, rows: Tensor) -> Tensor:
        """int64 `[T * Hi, n]`: the free blocks chosen, in any order, counted from the first free one."""
        if self._in_place is not None and index_q.dtype == rows.dtype == torch.float32:
            best = self._in_place.best(index_q, rows)
        else:
            best = self._best(index_q, rows)
        if not self.num_free:
            return torch.empty(best.shape[0], 0, dtype=torch.int64, device=best.device)
        values, order = best.topk(self.num_free + 1, dim=-1)
        # topk promises no order among equals: where the first one left out is as good as the last one in, a stable sort
        # takes the lower id.
        if all(last > out for last, out in values[:, -2:].tolist()):
            return order[:, :-1]
        return best.sort(dim=-1, descending=True, stable=True).indices[:, : self.num_free]

    def _best(self, index_q: Tensor, rows: Tensor) -> Tensor:
        """Scores of the free blocks, `[T * Hi, blocks]`."""
        count = self.queries * self.heads
        if self._found is None:
            self._found = padded(self.plan.head_rows(self.cache), self.layout).view(
                -1, self.layout.chunks, self.layout.rows
            )
        buffer = ScoreBuffer.of(self.plan, self.layout, self._found.shape[0], count, index_q, rows)
        scores = buffer.fill(index_q, rows, buffer.split(self._found))
        scores = scores.view(*scores.shape[:3], -1, self.block_size)
        best = scores.amax(-1) if self.score_type == "max" else scores.logsumexp(-1)
        if best.shape[1] > 1:
            best = best.transpose(1, 2).flatten(2)
        best = best.reshape(-1, count, best.shape[-1])[..., self.init_blocks : self.stop]
        if self.hidden is not None:
            best = best.unflatten(1, (self.queries, self.heads)).masked_fill(self.hidden, -torch.inf)
        return best.reshape(-1, best.shape[-1])


class _ReadInPlace:
    """One query of one sequence whose pages follow each other: its index keys are one matrix."""

    def __init__(self, first: int, choice: Choice, device: torch.device) -> None:
        heads, keys = choice.heads, choice.stop * choice.block_size
        self._span = slice(first, first + keys)
        self._dim = choice.dim
        self._scores = torch.empty(heads, keys, device=device)
        self._blocks = self._scores.view(heads, choice.stop, choice.block_size)
        self._first_free = choice.init_blocks
        self._known: dict[int, tuple[Tensor, Tensor]] = {}

    def best(self, index_q: Tensor, rows: Tensor) -> Tensor:
        """Scores of the free blocks, `[Hi, blocks]`."""
        known = self._known.get(id(rows))
        if known is None:  # views of the pages of a layer, whose rows are one tensor from step to step
            known = self._known[id(rows)] = rows, rows.view(-1, self._dim)[self._span].t()
        torch.mm(index_q.view(-1, self._dim), known[1], out=self._scores)
        best = self._blocks.amax(-1)
        return best[:, self._first_free :] if self._first_free else best
