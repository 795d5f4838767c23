"""What entries of a step of decoding share (`decode`): how their keys lie, which are seen, memory for their scores."""

from collections.abc import Sequence
from typing import NamedTuple, Self

import torch
from torch import Tensor

from minim3.kernels.portable.plan import CacheRows, PagedPlan, Scratch

_GATHERED_ELEMENTS = 1 << 17
"""Keys gathered at once, a thread: 512 KiB in fp32, a quarter of a second-level cache of today."""

_CHUNK_ELEMENTS = 1 << 18
"""Longer lists of keys are cut into chunks, so that all rows of queries find the values of a chunk in cache."""


def gathered_together(elements: int) -> int:
    """How many lists of so many elements are gathered at once."""
    return max(1, _GATHERED_ELEMENTS * torch.get_num_threads() // elements)


class Layout(NamedTuple):
    """How the keys of an entry lie in its scores `[heads, chunks, r, rows * tokens]`."""

    heads: int
    chunks: int
    rows: int
    tokens: int

    @classmethod
    def of(cls, cache: CacheRows, num_rows: int, dim: int, per_step: int = 1) -> "Layout":
        """For `num_rows` cache rows an entry; chunks hold whole multiples of `per_step` rows."""
        most = max(1, _CHUNK_ELEMENTS // (cache.tokens * dim * per_step)) * per_step
        chunks = -(-num_rows // most)
        rows = -(-num_rows // (chunks * per_step)) * per_step
        return cls(cache.heads, chunks, rows, cache.tokens)

    @property
    def width(self) -> int:
        return self.rows * self.tokens


class Seen:
    """Which of the keys an entry lists its queries see, for entries of `n` queries or sequences.

    Args:
        seen: for each of n, how many of the keys listed each of its queries sees; a later query sees more.
        stored: for each of n, how many of the keys listed exist.
        group: rows of scores a query.
    """

    def __init__(
        self, seen: Sequence[Sequence[int]], stored: Sequence[int], layout: Layout, group: int, device: torch.device
    ) -> None:
        self.layout = layout
        self.whole = layout.chunks * layout.width
        lowest, last = min(s[0] for s in seen), self.whole - layout.width
        self._first = layout.chunks - 1 if lowest >= last else 0
        self._column = lowest - last if lowest >= last else 0
        self._mask: Tensor | None = None
        self._known: tuple[Tensor, Tensor, Tensor] | None = None
        if any(count != lowest for s in seen for count in s) or (lowest < last):
            place = torch.arange(self.whole, device=device).view(layout.chunks, 1, layout.width)
            counts = torch.tensor(seen, device=device).repeat_interleave(group, dim=1)[:, None, None, :, None]
            self._compared = place[self._first :, :, self._column :], counts
            self._mask = torch.ge(*self._compared)
        self._hides = lowest < self.whole
        # Of the values, what lies behind the last is read as the last (the tables of rows end alike).
        stop = torch.tensor(stored, device=device).view(-1, 1, 1, 1, 1)
        row = torch.arange(layout.chunks * layout.rows, device=device).view(1, 1, layout.chunks, layout.rows, 1)
        within = torch.arange(layout.tokens, device=device)
        offsets = torch.where(row * layout.tokens + within < stop, within, (stop - 1) % layout.tokens)
        self.offsets = offsets.int()
        self._stop, self._within = stop, within

    @property
    def differs(self) -> bool:
        """Whether some query sees more keys than another."""
        return self._mask is not None

    def advance_all(self, num_tokens: int) -> None:
        """Let every query see so many keys more. All lie in the last row of the only chunk, and so do the last now."""
        assert self._mask is not None
        assert self.layout.chunks == 1
        place, counts = self._compared
        torch.ge(place, counts.add_(num_tokens), out=self._mask)
        last = self._stop.add_(num_tokens).sub(1).remainder_(self.layout.tokens)
        self.offsets[:, :, :, -1:] = torch.minimum(self._within, last)

    def advance(self) -> int:
        """Let the only query there is see one key more, in the row of the last; returns its column in its chunk."""
        assert self._mask is None
        column = self._column
        # Whatever stood for the last token stands for the next, which follows it.
        self.offsets.view(-1)[self.whole - self.layout.width + column :] += 1
        self._column += 1
        self._hides = self._column < self.layout.width
        self._known = None
        return column

    def hide(self, scores: Tensor) -> None:
        """Put -inf in `scores` `[n * heads, chunks, r, width]` wherever a query does not see the key."""
        if self._mask is not None:
            shaped = scores.view(-1, self.layout.heads, *scores.shape[1:])
            shaped[:, :, self._first :, :, self._column :].masked_fill_(self._mask, -torch.inf)
        elif self._hides:
            if self._known is None or self._known[0] is not scores:
                tail = scores[:, -1, :, self._column :]
                self._known = scores, tail, torch.full_like(tail, -torch.inf)
            self._known[1].copy_(self._known[2])  # sooner done than a fill, which makes a tensor of its number first


class ScoreBuffer:
    """Memory for the scores of entries, and for the keys they are made of, with every view of it made beforehand."""

    def __init__(
        self, scratch: Scratch, layout: Layout, entries: int, count: int, dim: int, dtype: torch.dtype, like: Tensor
    ) -> None:
        device = like.device
        pairs, keys = entries * layout.chunks, layout.width * dim
        together = min(pairs, gathered_together(keys))
        size = pairs * count * layout.width
        scores = scratch.take("scores", size, dtype, device).view(pairs, count, layout.width)
        gathered = scratch.take("gathered", together * keys, like.dtype, device).view(together, layout.width, dim)
        self.scores = scores.view(entries, layout.chunks, count, layout.width)
        self.shares = scratch.take("shares", size, dtype, device).view(self.scores.shape)
        self.shares_flat = self.shares.view(-1)
        self.together = together
        self._chunks, self._converts = layout.chunks, like.dtype != dtype
        self._parts = []
        for part in scores.split(together):
            some = gathered[: part.shape[0]]
            rows = some.view(-1, layout.tokens * dim)
            self._parts.append((rows, some.transpose(1, 2), part))
        self._known: tuple[Tensor, tuple[Tensor, ...]] | None = None

    @classmethod
    def of(cls, plan: PagedPlan, layout: Layout, entries: int, count: int, queries: Tensor, rows: Tensor) -> Self:
        dim, dtype = queries.shape[-1], queries.dtype
        return plan.memory.once(
            (layout, entries, count, dim, dtype, rows.dtype, gathered_together(1)),
            lambda: cls(plan.memory, layout, entries, count, dim, dtype, rows),
        )

    def fill(self, queries: Tensor, rows: Tensor, places: Sequence[Tensor]) -> Tensor:
        """Scores `[b, chunks, r, width]` of `queries` (`b * r` rows of `D`) with the keys of cache rows.

        places: the rows `[b * chunks * rows]`, split as `split` does.
        """
        for query, place, (gathered, keys, scores) in zip(self._split(queries), places, self._parts):
            torch.index_select(rows, 0, place, out=gathered)
            torch.bmm(query, keys.to(query.dtype) if self._converts else keys, out=scores)
        return self.scores

    def split(self, found: Tensor) -> tuple[Tensor, ...]:
        """Cache rows `[b, chunks, rows]` as `fill` takes them."""
        return found.view(-1).split(self.together * found.shape[-1])

    def _split(self, queries: Tensor) -> tuple[Tensor, ...]:
        if self._known is not None and self._known[0] is queries:
            return self._known[1]
        shaped = queries.reshape(self.scores.shape[0], self.scores.shape[2], -1)
        parts = (shaped if self._chunks == 1 else shaped.repeat_interleave(self._chunks, dim=0)).split(self.together)
        if self._chunks == 1 and queries.is_contiguous():
            self._known = queries, parts  # views, which hold for whatever the caller writes into the same tensor
        return parts
