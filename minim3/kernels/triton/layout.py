"""Where sequences lie, as tables that kernels read on the device.

Lengths the host knows are checked and their tables made once. Lengths of the paged ops may also live on the device
alone: their tables are then computed there, without a word to the host, with shapes that depend on nothing but the
shapes of the arguments, so that a CUDA graph may hold the step. Such lengths are not checked.
"""

import weakref
from collections import OrderedDict
from dataclasses import dataclass, field
from functools import lru_cache

import torch
from torch import Tensor

from minim3.kernels.device_plan import DevicePlan
from minim3.kernels.portable.plan import PagedPlan
from minim3.kernels.sequences import Lengths, Span, as_ints, sequence_spans

COLUMNS = 5
"""Of the table of sequences: first query, queries, first key, keys, position of the first query."""


@dataclass(frozen=True, eq=False)
class Layout:
    """N sequences. `table` is int64 `[N, COLUMNS]`; `spans` holds the same for the host, or None: it knows nothing."""

    table: Tensor
    spans: tuple[Span, ...] | None
    num_queries: int
    most_keys: int
    """No sequence has more."""

    _tiles: dict[int, Tensor] = field(default_factory=dict, init=False, repr=False)

    def tiles(self, step: int) -> Tensor:
        """int32 `[tiles, 2]`: (sequence, first of its queries) of runs of up to `step` queries; -1 in unused rows."""
        if self.spans is not None:
            return _host_runs(tuple(s.num_queries for s in self.spans), step, str(self.table.device))
        known = self._tiles.get(step)
        if known is None:
            bound = self.num_queries if step == 1 else self.num_queries // step + self.table.shape[0]
            known = self._tiles[step] = runs(self.table[:, 1], step, bound)
        return known

    def key_blocks(self, block_size: int) -> tuple[Tensor, Tensor]:
        """int32 `[blocks, 2]`: (sequence, first of its keys) of every block of keys; int64 `[N]`: its first row there.

        Only where the host knows the lengths.
        """
        assert self.spans is not None
        lengths = tuple(s.num_keys for s in self.spans)
        device = str(self.table.device)
        return _host_runs(lengths, block_size, device), _first_runs(lengths, block_size, device)

    def blocks(self, block_size: int) -> int:
        """No sequence has more blocks."""
        return -(-self.most_keys // block_size)


def packed_layout(
    cu_seqlens_q: Lengths, cu_seqlens_k: Lengths, q_offset: Lengths | None, q: Tensor, k: Tensor, causal: bool = True
) -> Layout:
    """Of packed queries and keys; raises `ValueError` as `sequence_spans` does."""
    cu_q, cu_k = _known(cu_seqlens_q), _known(cu_seqlens_k)
    if q_offset is None and not causal:
        q_offset = (0,) * (len(cu_q) - 1)
    offsets = None if q_offset is None else _known(q_offset)
    spans = sequence_spans(cu_q, cu_k, offsets, num_queries=q.shape[0], num_keys=k.shape[0])
    return _of_spans(spans, str(q.device))


def paged_layout(
    page_table: Tensor, lengths_k: Lengths, cu_seqlens_q: Lengths, page_size: int, num_queries: int,
    plan: PagedPlan | DevicePlan | None,
) -> Layout:  # fmt: skip
    """Of queries whose keys lie in pages; raises `ValueError` as `PagedPlan` does where the host knows the lengths."""
    if isinstance(plan, DevicePlan):
        step = plan.page_table, plan.lengths_k, plan.cu_seqlens_q, page_size, num_queries
        return plan.once(("layout", page_size, num_queries), lambda: _of_device(*step))
    if plan is None:
        if on_device(lengths_k) and on_device(cu_seqlens_q):
            return _of_device(page_table, lengths_k, cu_seqlens_q, page_size, num_queries)  # type: ignore[arg-type]
        plan = PagedPlan(page_table, _known(lengths_k), _known(cu_seqlens_q), page_size)
    requests = plan.requests
    last = requests[-1].q_start + requests[-1].num_queries if requests else 0
    if last != num_queries:
        raise ValueError(f"cu_seqlens_q ends at {last} but the packed tensor holds {num_queries} tokens")

    def make() -> Layout:
        spans = [Span(0, 0, 0, 0, 0)] * plan.page_table.shape[0]
        for r in requests:
            spans[r.sequence] = Span(r.q_start, r.num_queries, 0, r.length, r.length - r.num_queries)
        return _of_spans(tuple(spans), str(page_table.device))

    return plan.once(("triton layout",), make)


def on_device(lengths: Lengths) -> bool:
    return isinstance(lengths, Tensor) and lengths.device.type != "cpu"


def _of_device(
    page_table: Tensor, lengths_k: Tensor, cu_seqlens_q: Tensor, page_size: int, num_queries: int
) -> Layout:
    start = cu_seqlens_q[:-1].long()
    count = cu_seqlens_q[1:].long() - start
    length = lengths_k.long()
    table = torch.stack([start, count, torch.zeros_like(start), length, length - count], dim=1)
    return Layout(table, None, num_queries, page_table.shape[1] * page_size)


@lru_cache(maxsize=64)
def _of_spans(spans: tuple[Span, ...], device: str) -> Layout:
    with torch.inference_mode(False):
        table = torch.tensor(spans, dtype=torch.int64).view(-1, COLUMNS).to(device)
    last = max((s.q_stop for s in spans), default=0)
    return Layout(table, spans, last, max((s.num_keys for s in spans), default=0))


@lru_cache(maxsize=64)
def _host_runs(lengths: tuple[int, ...], step: int, device: str) -> Tensor:
    with torch.inference_mode(False):
        bound = sum(-(-length // step) for length in lengths)
        return runs(torch.tensor(lengths, dtype=torch.int64), step, bound).to(device)


@lru_cache(maxsize=64)
def _first_runs(lengths: tuple[int, ...], step: int, device: str) -> Tensor:
    with torch.inference_mode(False):
        count = (torch.tensor(lengths, dtype=torch.int64) + step - 1) // step
        return (count.cumsum(0) - count).to(device)


def runs(lengths: Tensor, step: int, bound: int) -> Tensor:
    """Cut sequences of `lengths` `[N]` into runs of `step`: int32 `[bound, 2]` of (sequence, start), else (-1, 0)."""
    count = (lengths + step - 1) // step
    stop = count.cumsum(0)
    run = torch.arange(bound, device=lengths.device)
    sequence = torch.searchsorted(stop, run, right=True)
    used = sequence < lengths.shape[0]
    known = sequence.clamp(max=max(lengths.shape[0] - 1, 0))
    start = (run - (stop - count)[known]) * step if lengths.shape[0] else torch.zeros_like(run)
    return torch.stack([torch.where(used, sequence, -1), torch.where(used, start, 0)], dim=1).int()


_kept: "OrderedDict[int, tuple[weakref.ref[Tensor], int, tuple[int, ...]]]" = OrderedDict()


def _known(lengths: Lengths) -> tuple[int, ...]:
    """Plain integers. Those of a device tensor are read once, not once a layer."""
    if not on_device(lengths) or lengths.is_inference():  # type: ignore[union-attr]
        return as_ints(lengths)
    assert isinstance(lengths, Tensor)
    kept = _kept.get(id(lengths))
    if kept is not None and kept[0]() is lengths and kept[1] == lengths._version:
        return kept[2]
    values = as_ints(lengths)
    _kept[id(lengths)] = weakref.ref(lengths), lengths._version, values
    while len(_kept) > 16:
        _kept.popitem(last=False)
    return values
