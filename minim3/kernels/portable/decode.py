"""Few new tokens of each sequence over its pages: decoding and verification, all sequences at once.

An entry is what sees one list of keys: a KV head of one query with its chosen blocks (`Chosen`), or of all the new
queries of a sequence (`Dense`); G query heads share a KV head, so that it has G rows a query. Keys are read where they
lie if the pages of one sequence follow each other. Otherwise they are gathered by whole cache rows (`plan`), so many
entries at once as stay in the cache of the cores that gathered them, and multiplied from there. Values are not gathered
where a bag of rows does it: `embedding_bag` adds up weighted rows as it finds them.

What lies past the end of a sequence may be NaN: its scores are hidden, and its values replaced by those of a token of
the sequence, since a share of zero would not cancel a NaN. Tables depend on lengths and pages alone: they are made
once a step and used in every layer; memory, and views of it, are kept from step to step.
"""

import torch
from torch import Tensor

from minim3.kernels.portable import entries
from minim3.kernels.portable.entries import Layout, ScoreBuffer, Seen
from minim3.kernels.portable.plan import CacheRows, PagedPlan
from minim3.kernels.sequences import at_least_fp32

_BAG_ROWS = 16
"""A bag reads each value once a row of queries; with more rows than this a product is as good."""


class _Attention:
    """Attention of entries over listed cache rows; the subclasses say which."""

    def __init__(self, plan: PagedPlan, cache: CacheRows, layout: Layout, seen: Seen, rows: int, dim: int) -> None:
        self.plan = plan
        self.cache = cache
        self.layout = layout
        self.seen = seen
        self.num_rows = rows  # of queries an entry
        self.dim = dim
        self.entries = seen.offsets.shape[0] * cache.heads
        self.bags = self.entries * layout.chunks * rows
        self._buffer: ScoreBuffer | None = None
        self._places: tuple[Tensor, ...] = ()

    def buffer(self, q: Tensor, k_rows: Tensor) -> ScoreBuffer:
        if self._buffer is None or self._buffer.shares.dtype != q.dtype:
            self._buffer = ScoreBuffer.of(self.plan, self.layout, self.entries, self.num_rows, q, k_rows)
        return self._buffer

    def token_index(self, first: Tensor, rows: int, out: Tensor) -> Tensor:
        """int32 `[b * chunks * rows * width]`: the token of every share, for `rows` rows of queries.

        first: int32 `[b, chunks, cache rows]`, the first token of every row.
        """
        layout = self.layout
        shape = (-1, layout.heads, layout.chunks, rows, layout.rows, layout.tokens)
        first = first.view(-1, layout.heads, layout.chunks, 1, layout.rows, 1).expand(-1, -1, -1, rows, -1, -1)
        torch.add(first, self.seen.offsets.unsqueeze(3), out=out.view(shape))
        return out

    def finish(self, buffer: ScoreBuffer, tokens: Tensor, lse: bool) -> tuple[Tensor, Tensor | None]:
        """From the scores of the buffer and the values of all tokens: out `[b, r, D]`, and lse `[b, r]` if wanted."""
        layout, scores, shares = self.layout, buffer.scores, buffer.shares
        self.seen.hide(scores)
        total: Tensor | None = None
        log_total: Tensor | None = None
        if layout.chunks == 1:
            torch.softmax(scores, -1, out=shares)
            if lse:
                log_total = scores.amax(-1) - shares.amax(-1).log()  # the largest share is exp(largest score - lse)
        else:
            largest = scores.amax((1, 3), keepdim=True)
            torch.exp(scores.sub_(largest), out=shares)
            total = shares.sum((1, 3), keepdim=True)
            log_total = largest.add_(total.log()) if lse else None
        if self.takes_bags(shares, tokens):
            # The operator of torch.embedding_bag (by sum), without the checks and views of its Python function; called
            # through torch.ops it would take twice as long.
            out = torch._embedding_bag_forward_only(
                tokens, self.bag_index(), self.bag_starts(), False, 0, False, buffer.shares_flat
            )[0]
        else:
            out = self._products(shares, tokens)
        if total is None:
            out = out.view(self.entries, self.num_rows, self.dim)
        else:
            out = out.view(self.entries, layout.chunks, self.num_rows, self.dim).sum(1)
            out.div_(total.view(self.entries, self.num_rows, 1))
        return out, None if log_total is None else log_total.view(self.entries, self.num_rows)

    def takes_bags(self, shares: Tensor, tokens: Tensor) -> bool:
        """Whether a bag of rows adds values up faster than a gather and a product."""
        return (
            shares.device.type == "cpu" and self.num_rows <= _BAG_ROWS and shares.dtype == tokens.dtype == torch.float32
        )

    def bag_starts(self) -> Tensor:
        key = ("starts", self.bags, self.layout.width)
        return self.plan.memory.once(
            key, lambda: torch.arange(0, self.bags * self.layout.width, self.layout.width, dtype=torch.int32)
        )

    def bag_index(self) -> Tensor:
        raise NotImplementedError

    def first_tokens(self) -> Tensor:
        raise NotImplementedError

    def _products(self, shares: Tensor, tokens: Tensor) -> Tensor:
        """Values gathered by token, as many entries at once as keys."""
        layout = self.layout
        shares = shares.view(-1, *shares.shape[2:])
        first = self.first_tokens()
        index = self.token_index(first, 1, first.new_empty(shares.shape[0] * layout.width))
        together = entries.gathered_together(layout.width * self.dim)
        out = shares.new_empty(*shares.shape[:2], self.dim)
        for share, part, place in zip(
            shares.split(together), out.split(together), index.split(together * layout.width)
        ):
            values = tokens.index_select(0, place).view(share.shape[0], -1, self.dim)
            torch.bmm(share, values.to(share.dtype), out=part)
        return out


class Dense(_Attention):
    """All new queries of a sequence over all of its tokens: `plan` holds sequences of the same number of queries."""

    def __init__(self, plan: PagedPlan, cache: CacheRows, dim: int, group: int) -> None:
        device, requests = plan.page_table.device, plan.requests
        self.queries = requests[0].num_queries
        rows = -(-max(r.length for r in requests) // cache.tokens)
        layout = Layout.of(cache, rows, dim)
        seen = Seen(
            [range(r.position(0) + 1, r.length + 1) for r in requests], [r.length for r in requests], layout, group,
            device,
        )  # fmt: skip
        super().__init__(plan, cache, layout, seen, self.queries * group, dim)
        # One short sequence in pages that follow each other: longer ones gain nothing from reading keys in place.
        self._follows: int | None = None
        if self.queries == len(requests) == layout.chunks == cache.per_page:
            self._follows = plan.first_page(cache)
        self.found = padded(plan.head_rows(cache), layout).view(self.entries, layout.chunks, layout.rows)
        self._index: Tensor | None = None
        self._first_tokens: Tensor | None = None

    def advance(self) -> None:
        """Go on to the next token of the only sequence, which lies in the row of the last."""
        column = self.seen.advance()
        if self._index is not None:
            index = self._index.view(-1, self.layout.chunks, self.num_rows, self.layout.width)
            index[:, -1, :, column:].add_(1)

    def advance_all(self, num_tokens: int) -> None:
        """Go on by so many tokens in every sequence; see `Seen.advance_all`."""
        self.seen.advance_all(num_tokens)
        if self._index is not None:
            self.token_index(self.first_tokens(), self.num_rows, self._index)

    def first_tokens(self) -> Tensor:
        if self._first_tokens is None:
            self._first_tokens = (self.found * self.layout.tokens).int()
        return self._first_tokens

    def bag_index(self) -> Tensor:
        if self._index is None:  # the same in every layer
            first = self.first_tokens()
            self._index = self.token_index(first, self.num_rows, first.new_empty(self.bags * self.layout.width))
        return self._index

    def __call__(self, q: Tensor, k_rows: Tensor, v_tokens: Tensor, lse: bool = False) -> tuple[Tensor, Tensor | None]:
        """Scaled `q` `[T, Hq, D]` -> out of its shape, and lse `[T, Hq]` if it is wanted."""
        buffer = self.buffer(q, k_rows)
        if self.queries > 1:
            grouped = q.view(-1, self.queries, self.cache.heads, q.shape[1] // self.cache.heads, self.dim)
            turned = grouped.transpose(1, 2)  # [n, Hkv, queries, G, D]
            self._gather(buffer, turned.reshape(q.shape), k_rows)
            out, log_total = self.finish(buffer, v_tokens, lse)
            out = out.view(turned.shape).transpose(1, 2).reshape(q.shape)
            if log_total is None:
                return out, None
            return out, log_total.view(turned.shape[:-1]).transpose(1, 2).reshape(q.shape[:2])
        if self._follows is not None and q.dtype == k_rows.dtype:
            self._score_in_place(buffer, q, k_rows, self._follows)
        else:
            self._gather(buffer, q, k_rows)
        out, log_total = self.finish(buffer, v_tokens, lse)
        return out.view(q.shape), None if log_total is None else log_total.view(q.shape[:2])

    def _gather(self, buffer: ScoreBuffer, q: Tensor, k_rows: Tensor) -> None:
        self._places = self._places or buffer.split(self.found)
        buffer.fill(q, k_rows, self._places)

    def _score_in_place(self, buffer: ScoreBuffer, q: Tensor, k_rows: Tensor, first_page: int) -> None:
        """Every page and head is a batch entry of one product."""
        heads, _, pages, tokens = self.layout
        keys = k_rows[first_page * heads : (first_page + pages) * heads].view(-1, tokens, self.dim)
        queries = q.view(1, heads, -1, self.dim).expand(pages, -1, -1, -1).reshape(pages * heads, -1, self.dim)
        scores = torch.bmm(queries, keys.transpose(1, 2)).view(pages, heads, -1, tokens)
        buffer.scores.view(heads, -1, pages, tokens).copy_(scores.permute(1, 2, 0, 3))


class Chosen(_Attention):
    """Every query over its own chosen blocks: so many for all, the block of the query the last of them."""

    def __init__(
        self, plan: PagedPlan, cache: CacheRows, dim: int, group: int, block_size: int, num_blocks: int
    ) -> None:
        device = plan.page_table.device
        seen, stored = [], []
        for r in plan.requests:
            for position in range(r.position(0), r.length):
                start = position // block_size * block_size  # of the last block
                seen.append([(num_blocks - 1) * block_size + position - start + 1])
                stored.append((num_blocks - 1) * block_size + min(block_size, r.length - start))
        layout = Layout.of(cache, num_blocks * cache.per_block, dim)
        super().__init__(plan, cache, layout, Seen(seen, stored, layout, group, device), group, dim)
        rows = plan.head_rows(cache)
        each = [n for n, r in enumerate(plan.requests) for _ in range(r.num_queries)]
        if each != list(range(len(plan.requests))):
            rows = rows.view(-1, cache.heads, rows.shape[1])[torch.tensor(each, device=device)].flatten(0, 1)
        self.rows = rows
        self.tokens = (rows * cache.tokens).int()
        self.found = rows.new_empty(self.entries, layout.chunks * layout.rows)
        self.first = self.tokens.new_empty(self.entries, layout.chunks * layout.rows)
        size = self.bags * layout.width
        self._index = plan.memory.take("bag index", size, torch.int32, device)
        shape = (-1, layout.heads, layout.chunks, group, layout.rows, layout.tokens)
        first = self.first.view(-1, layout.heads, layout.chunks, 1, layout.rows, 1).expand(-1, -1, -1, group, -1, -1)
        self._add = first, self.seen.offsets.unsqueeze(3), self._index.view(shape)

        self._free: tuple[Tensor, Tensor, Tensor, Tensor] | None = None

    def keep_forced(self, forced: Tensor, free: slice) -> None:
        """From now on `attend_free` is told blocks of the columns `free` alone; the others are those of `forced`.

        forced: int64 `[T, Hkv, K]`, with any ids at the free columns.
        """
        self._set(forced)
        stop = self.rows.shape[1]
        self._free = (
            self.rows[:, free.start : stop], self.tokens[:, free.start : stop], self.found[:, free], self.first[:, free]
        )  # fmt: skip

    @property
    def keeps_forced(self) -> bool:
        return self._free is not None

    def advance(self) -> None:
        """Go on to the next token of the only sequence, which lies in the row of the last."""
        self.seen.advance()

    def first_tokens(self) -> Tensor:
        return self.first

    def bag_index(self) -> Tensor:
        first, offsets, out = self._add
        torch.add(first, offsets, out=out)
        return self._index

    def __call__(
        self, q: Tensor, k_rows: Tensor, v_tokens: Tensor, ids: Tensor, lse: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """Scaled `q` `[T, Hq, D]` and `ids` int64 `[T, Hkv, K]` -> out of the shape of `q`, and lse `[T, Hq]`."""
        self._set(ids)
        return self._attend(q, k_rows, v_tokens, lse)

    def attend_free(self, q: Tensor, k_rows: Tensor, v_tokens: Tensor, chosen: Tensor) -> Tensor:
        """As a call, with the free blocks alone: `chosen` int64 `[T * Hkv, n]`, counted from the first free one."""
        assert self._free is not None
        rows, tokens, found, first = self._free
        torch.gather(rows, 1, chosen, out=found)
        torch.gather(tokens, 1, chosen, out=first)
        return self._attend(q, k_rows, v_tokens, False)[0]

    def _set(self, ids: Tensor) -> None:
        logical = self.cache.of_blocks(ids).view(self.entries, -1)
        if self.cache.per_block > 1:
            logical = logical.clamp(max=self.rows.shape[1] - 1)
        missing = self.found.shape[1] - logical.shape[1]
        if missing:
            logical = torch.cat([logical, logical[:, -1:].expand(-1, missing)], 1)
        torch.gather(self.rows, 1, logical, out=self.found)
        torch.gather(self.tokens, 1, logical, out=self.first)

    def _attend(self, q: Tensor, k_rows: Tensor, v_tokens: Tensor, lse: bool) -> tuple[Tensor, Tensor | None]:
        buffer = self.buffer(q, k_rows)
        self._places = self._places or buffer.split(self.found.view(self.entries, self.layout.chunks, -1))
        buffer.fill(q, k_rows, self._places)
        out, log_total = self.finish(buffer, v_tokens, lse)
        return out.view(q.shape), None if log_total is None else log_total.view(q.shape[:2])


def padded(listed: Tensor, layout: Layout) -> Tensor:
    """Rows `[n, rows]` of every sequence, filled up or cut to those of the layout."""
    size = layout.chunks * layout.rows
    if listed.shape[1] >= size:
        return listed[:, :size].contiguous()
    return torch.cat([listed, listed[:, -1:].expand(-1, size - listed.shape[1])], 1)


def wide(q: Tensor) -> Tensor:
    """`q` in the dtype computed in, without a graph."""
    return q.detach().to(at_least_fp32(q.dtype))
