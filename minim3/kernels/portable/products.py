"""Sparse pieces as matrix products: a query's own block as it lies, earlier blocks KV-outer over gathered rows.

Results add up without a running maximum. Probabilities are taken relative to the score of a query with its own key,
which is known beforehand, and divided by their sum at the end. The reference enters the product as one more channel
(queries carry minus the reference, keys a one), so that scores come out ready for `exp`. That is exact as long as no
score exceeds the reference by more than `_REACH`, which the norms of queries and keys tell in advance (`within_reach`);
other pieces take the merge through log-sum-exps (`merging`). The backward pass uses the final log-sum-exp in the same
way, which no score exceeds, and `delta` (gradient times output, summed) as the extra channel of its second product.

A tile is R rows (queries) and the keys up to its last row; G query heads share its one KV head; D their dimension,
E = D + 1. Rows lie as `[R, G, E]`: a row with all of its heads is contiguous, and a gather copies whole rows.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from minim3.kernels.portable.threads import room
from minim3.kernels.sequences import Span

_REACH = 60.0
"""Largest excess of a score over its reference: exp(60) times thousands of keys is far from the end of fp32."""

_TILE_ROWS = 4096
"""Queries handled at once: what one KV head needs of them stays in the last-level cache."""

_LEAST_TILE_ROWS = 512
"""Where there are many threads to keep busy: fewer rows would leave too few of them for each block of keys."""

_PRODUCT_ROWS = 1024
"""Rows times heads of a product for each thread: its scores over a block of keys stay in a core's own cache."""
_DENSE_BLOCK = 128
"""Keys of a product where every row attends everything before it."""

Rows = Tensor | slice
"""Rows of a tile in ascending order: int64 indices, or a run of them, which needs no gather."""


class Choice(NamedTuple):
    """What the rows of a tile chose, for one KV head; the first row stands at position `offset` of its sequence."""

    offset: int
    block_size: int
    rows_by_block: Sequence[Rows]  # rows that chose each block before their own
    without_own: Tensor | None  # bool [R]: rows that did not choose their own block; None: there are none


def tiles(span: Span, least: int = 1) -> Iterator[Span]:
    """A piece, some rows at a time; at least so many tiles, if it has the rows for them."""
    step = min(_TILE_ROWS, max(_LEAST_TILE_ROWS, span.num_queries // least))
    for start in range(0, span.num_queries, step):
        count = min(step, span.num_queries - start)
        yield Span(span.q_start + start, count, span.k_start, span.num_keys, span.offset + start)


def choices(ids: Tensor, tile: Span, block_size: int) -> list[Choice]:
    """What the rows of a tile chose (`[R, Hkv, K]`), for each KV head."""
    ids, kv_heads = ids.long(), ids.shape[1]
    current = (torch.arange(tile.num_queries, device=ids.device) + tile.offset).div_(block_size, rounding_mode="floor")
    current = current[:, None, None]
    num_blocks = (tile.offset + tile.num_queries - 1) // block_size
    without_own = (ids != current).all(-1).t().contiguous()
    ids = torch.where((ids < 0) | (ids >= current), num_blocks, ids).permute(1, 2, 0)
    member = torch.zeros(kv_heads, num_blocks + 1, tile.num_queries, dtype=torch.bool, device=ids.device)
    member = member.scatter_(1, ids, True)[:, :num_blocks].contiguous()
    counts = member.sum(-1).flatten()
    flat = member.nonzero()[:, 2].contiguous()
    stops = counts.cumsum(0)
    rows: list[Rows] = list(flat.split(counts.tolist()))
    if flat.shape[0]:
        first = flat[(stops - counts).clamp_(max=flat.shape[0] - 1)]
        last = flat[(stops - 1).clamp_(min=0)]
        for i in ((last - first + 1 == counts) & (counts > 0)).nonzero().flatten().tolist():
            rows[i] = slice(int(first[i]), int(last[i]) + 1)
    return [
        Choice(tile.offset, block_size, rows[h * num_blocks : (h + 1) * num_blocks], without_own[h] if some else None)
        for h, some in enumerate(without_own.any(-1).tolist())
    ]


def everything(tile: Span) -> Choice:
    """The choice of rows that attend all keys before them."""
    rows = tile.num_queries
    num_blocks = (tile.offset + rows - 1) // _DENSE_BLOCK
    starts = (min(max((block + 1) * _DENSE_BLOCK - tile.offset, 0), rows) for block in range(num_blocks))
    return Choice(tile.offset, _DENSE_BLOCK, [slice(start, rows) for start in starts], None)


def extend(x: Tensor) -> Tensor:
    """Keys or values `[S, Hkv, D]` -> contiguous `[Hkv, S, E]` with a last channel of ones."""
    extended = x.new_empty(x.shape[1], x.shape[0], x.shape[2] + 1)
    extended[..., :-1] = x.transpose(0, 1)
    extended[..., -1] = 1.0
    return extended


def references(q: Tensor, k: Tensor, scale: float) -> Tensor:
    """Score of each query with its own key: `[R, Hq, D]`, `[R, Hkv, D]` -> `[R, Hq]`."""
    return (q.unflatten(1, (k.shape[1], -1)) * k.unsqueeze(2)).sum(-1).mul_(scale).flatten(1)


def within_reach(q: Tensor, reference: Tensor, longest: Tensor, scale: float) -> list[bool]:
    """For each KV head, whether no score of these rows can exceed its reference too far; `longest` key norm `[Hkv]`."""
    bound = torch.linalg.vector_norm(q, dim=-1).unflatten(1, (longest.shape[0], -1)) * (longest * abs(scale))[:, None]
    return (bound - reference.view_as(bound) <= _REACH).transpose(0, 1).flatten(1).all(1).tolist()


class BlockKernels(NamedTuple):
    """Another way to compute what a block and the rows that chose it give each other; False where it has no form.

    add: from queries `[R, G, E]`, to sums of the same shape, for rows, with keys `[block, E]` and values `[block, D]`.
    add_gradient: from queries beside gradients `[R, G, 2, E]`, to sums `[R, G, D]`, for rows, with keys and values
    `[block, E]`, and to the gradients of these, `[block, D]`.
    add_alignment: from queries `[R, G, E]` and index queries `[R, 1, F]`, whose last channels are minus their
    log-sum-exps, to sums `[R, F - 1]`, for rows, with keys `[block, E]` and index keys `[block, F]`, and to the
    gradient of these, `[block, F - 1]`; returns the loss. Only where `any_keys` says so of both dimensions.
    any_keys: for dimension D and a dtype, whether all take any number of keys, and the rows' own block: with `shift`,
    row r sees key r + shift of the block and those before it.
    """

    add: Callable[..., bool]
    add_gradient: Callable[..., bool]
    add_alignment: Callable[..., float]
    any_keys: Callable[[int, torch.dtype], bool]


def forward(
    q: Tensor, reference: Tensor, keys: Tensor, v: Tensor, choice: Choice, scale: float, out: Tensor, lse: Tensor,
    blocks: BlockKernels | None = None,
) -> None:  # fmt: skip
    """Fill `out` `[R, G, D]` and `lse` `[R, G]` from `q` `[R, G, D]`, extended keys `[S, E]` and values `[S, D]`."""
    rows, group, dim = q.shape
    queries, sums = room("rows", 2 * rows * group * (dim + 1), q).view(2, rows, group, dim + 1)
    torch.mul(q, scale, out=queries[..., :dim])
    torch.neg(reference, out=queries[..., dim])
    if blocks is not None and blocks.any_keys(dim, q.dtype):
        sums.zero_()
        for chosen, seen, shift in all_parts(choice, rows):
            done = blocks.add(queries, sums, chosen, keys[seen], v[seen], shift)
            assert done, "a form for any keys"
    else:
        _forward_products(queries, sums, keys, v, choice, blocks)
    torch.div(sums[..., :dim], sums[..., dim:], out=out)
    torch.add(sums[..., dim].log_(), reference, out=lse)


def _forward_products(
    queries: Tensor, sums: Tensor, keys: Tensor, v: Tensor, choice: Choice, blocks: BlockKernels | None
) -> None:
    """Fill `sums`, of the shape of `queries` `[R, G, E]`, with weighted values and sums of weights."""
    rows, group, dim = queries.shape[0], queries.shape[1], v.shape[1]
    scores = score_buffer(queries, choice)
    for part, seen, hidden in own_parts(choice, rows, queries.device):
        x, result = queries[part].view(-1, dim + 1), sums[part].view(-1, dim + 1)
        p = scores[: x.shape[0] * hidden.shape[-1]].view(x.shape[0], -1)
        torch.mm(x, keys[seen].t(), out=p).exp_()
        p.view(-1, group, p.shape[1]).masked_fill_(hidden, 0.0)
        torch.mm(p, v[seen], out=result[:, :dim])
        torch.sum(p, -1, out=result[:, dim])
    width = group * (dim + 1)
    flat_queries, flat_sums = queries.view(rows, width), sums.view(rows, width)
    most = min(row_limit(group), rows)
    gathered, partial = room("gathered", 2 * most * width, queries).view(2, most, width)
    scores = scores.view(-1, choice.block_size)
    for chosen, block_keys, values in chosen_parts(choice, group, keys, v):
        if blocks is not None and blocks.add(queries, sums, chosen, block_keys, values):
            continue
        x = take(flat_queries, chosen, gathered)
        y, p = partial[: x.shape[0]], scores[: x.shape[0] * group]
        torch.mm(x.view(-1, dim + 1), block_keys.t(), out=p).exp_()
        result = y.view(-1, dim + 1)
        torch.mm(p, values, out=result[:, :dim])
        torch.sum(p, -1, out=result[:, dim])
        add_to(flat_sums, chosen, y)


def backward(
    grad_out: Tensor, q: Tensor, lse: Tensor, delta: Tensor, keys: Tensor, values: Tensor, choice: Choice,
    scale: float, grad_q: Tensor, grad_k: Tensor, grad_v: Tensor, blocks: BlockKernels | None = None,
) -> None:  # fmt: skip
    """Write `grad_q` `[R, G, D]` and add to `grad_k`, `grad_v` `[S, D]`; `delta` `[R, G]`, the rest as in `forward`."""
    rows, group, dim = q.shape
    # A query and its gradient side by side: one gather.
    both = room("rows", 2 * rows * group * (dim + 1), q).view(rows, group, 2, dim + 1)
    torch.mul(q, scale, out=both[:, :, 0, :dim])
    torch.neg(lse, out=both[:, :, 0, dim])
    both[:, :, 1, :dim] = grad_out
    torch.neg(delta, out=both[:, :, 1, dim])
    sums = room("sums", rows * group * dim, q).view(rows, group, dim)
    if blocks is not None and blocks.any_keys(dim, q.dtype):
        sums.zero_()
        for chosen, seen, shift in all_parts(choice, rows):
            own = keys[seen], values[seen], grad_k[seen], grad_v[seen]
            done = blocks.add_gradient(both, sums, chosen, *own, shift)
            assert done, "a form for any keys"
    else:
        _backward_products(both, sums, keys, values, choice, grad_k, grad_v, blocks)
    torch.mul(sums, scale, out=grad_q)


def _backward_products(
    both: Tensor, sums: Tensor, keys: Tensor, values: Tensor, choice: Choice, grad_k: Tensor, grad_v: Tensor,
    blocks: BlockKernels | None,
) -> None:  # fmt: skip
    """Fill `sums` `[R, G, D]`, add to the gradients by key; `both` `[R, G, 2, E]`: queries beside their gradients."""
    rows, group, dim = sums.shape
    scores, grad_scores = (score_buffer(both, choice, name) for name in ("scores", "gradients of scores"))

    def add(x: Tensor, hidden: Tensor | None, result: Tensor, first: bool, *by_key: Tensor) -> None:
        """Rows `[n, G, 2, E]` against some keys: add to the gradients of these, and (or write) those of the rows."""
        some_keys, some_values, grad_k, grad_v = by_key
        x_q, x_grad = x.view(-1, 2, dim + 1).unbind(1)
        shape = x_q.shape[0], some_keys.shape[0]
        p, grad_p = (buffer[: shape[0] * shape[1]].view(shape) for buffer in (scores, grad_scores))
        torch.mm(x_q, some_keys.t(), out=p).exp_()
        if hidden is not None:
            p.view(-1, group, shape[1]).masked_fill_(hidden, 0.0)
        grad_v.addmm_(p.t(), x_grad[:, :dim])
        torch.mm(x_grad, some_values.t(), out=grad_p).mul_(p)
        grad_k.addmm_(grad_p.t(), x_q[:, :dim])
        # beta=0 overwrites: what was there is never read.
        result.view(-1, dim).addmm_(grad_p, some_keys[:, :dim], beta=0.0 if first else 1.0)

    for part, seen, hidden in own_parts(choice, rows, both.device):
        add(both[part], hidden, sums[part], True, keys[seen], values[seen], grad_k[seen], grad_v[seen])
    flat_both, flat_sums = both.view(rows, -1), sums.view(rows, -1)
    most = min(row_limit(group), rows)
    gathered = room("gathered", most * flat_both.shape[1], both).view(most, -1)
    partial = room("partial", most * group * dim, both).view(most, -1)
    for chosen, *block in chosen_parts(choice, group, keys, values, grad_k, grad_v):
        if blocks is not None and blocks.add_gradient(both, sums, chosen, *block):
            continue
        if isinstance(chosen, slice):
            add(flat_both[chosen], None, flat_sums[chosen], False, *block)
            continue
        x = take(flat_both, chosen, gathered)
        y = partial[: x.shape[0]]
        add(x, None, y, True, *block)
        flat_sums.index_add_(0, chosen, y)  # rows are distinct within a block, so their sums have one order


def all_parts(choice: Choice, rows: int) -> Iterator[tuple[Rows, slice, int | None]]:
    """(rows, keys they attend, shift: of `BlockKernels`, where the keys are those of their own block)."""
    row, size = 0, choice.block_size
    while row < rows:
        start = (choice.offset + row) // size * size
        stop = min(rows, start + size - choice.offset)
        part: Rows = slice(row, stop)
        if choice.without_own is not None:
            part = (~choice.without_own[row:stop]).nonzero().flatten() + row
        yield part, slice(start, choice.offset + stop), choice.offset - start
        row = stop
    for block, chosen in enumerate(choice.rows_by_block):
        if isinstance(chosen, slice) or chosen.shape[0]:
            yield chosen, slice(block * size, (block + 1) * size), None


def own_parts(choice: Choice, rows: int, device: torch.device) -> Iterator[tuple[slice, slice, Tensor]]:
    """(rows in one block, the keys of that block up to the last of them, keys a row does not see: bool `[r, 1, k]`)."""
    block_size, row = choice.block_size, 0
    later = torch.ones(block_size, block_size, dtype=torch.bool, device=device).triu_(1).unsqueeze(1)
    while row < rows:
        before = (choice.offset + row) % block_size
        stop = min(row + block_size - before, rows)
        hidden = later[before : before + stop - row, :, : before + stop - row]
        if choice.without_own is not None:
            hidden = hidden | choice.without_own[row:stop, None, None]
        yield slice(row, stop), slice(choice.offset + row - before, choice.offset + stop), hidden
        row = stop


def chosen_parts(choice: Choice, group: int, *by_key: Tensor) -> Iterator[tuple[Any, ...]]:
    """(rows that chose a block, the block of each tensor `[S, ...]`), a limited number of rows at a time."""
    limit = row_limit(group)
    for rows, *block in zip(choice.rows_by_block, *(x.split(choice.block_size) for x in by_key)):
        if isinstance(rows, slice):
            for start in range(rows.start, rows.stop, limit):
                yield slice(start, min(start + limit, rows.stop)), *block
        elif rows.shape[0]:
            for part in rows.split(limit) if rows.shape[0] > limit else (rows,):
                yield part, *block


def take(x: Tensor, rows: Rows, buffer: Tensor | None = None) -> Tensor:
    """These rows of `x`: a view of a run, a copy (to `buffer`) of others."""
    if isinstance(rows, slice):
        return x[rows]
    return x.index_select(0, rows) if buffer is None else torch.index_select(x, 0, rows, out=buffer[: rows.shape[0]])


def add_to(x: Tensor, rows: Rows, values: Tensor) -> None:
    """Rows are distinct within a block, so their sums have one order."""
    if isinstance(rows, slice):
        x[rows] += values
    else:
        x.index_add_(0, rows, values)


def row_limit(group: int) -> int:
    return max(1, _PRODUCT_ROWS * torch.get_num_threads() // group)


def score_buffer(q: Tensor, choice: Choice, name: str = "scores") -> Tensor:
    """Room for the scores of the largest product."""
    group = q.shape[1]
    return room(name, min(max(row_limit(group), choice.block_size), q.shape[0]) * group * choice.block_size, q)
