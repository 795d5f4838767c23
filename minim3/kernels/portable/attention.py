"""Packed attention, dense and block-sparse, and its gradient.

Rows of a batch fall in three kinds: short whole documents (batched, `buckets`), dense pieces (every visible block is
selected: the first `topk * block_size` positions, or dense attention), and sparse pieces. A sparse piece runs KV-outer:
the query's own block as one batched causal square, then, for each KV head and earlier block, the queries that selected
it are gathered, attend the block, and are merged through the log-sum-exp. T, S, Hq, Hkv, D as in the reference;
G = Hq / Hkv query heads share a KV head.
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from minim3.kernels.portable.buckets import Buckets, make_buckets, scatter_rows, split_short
from minim3.kernels.portable.flash import attend, attend_backward, merge
from minim3.kernels.sequences import Lengths, Span, as_ints, at_least_fp32, query_positions, sequence_spans

_TILE_ROWS = 4096
"""Queries of a sparse piece handled at once: their output of one KV head stays in the last-level cache."""


def varlen_attention(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Lengths, cu_seqlens_k: Lengths, *,
    q_offset: Lengths | None = None, causal: bool = True, scale: float | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """See the reference."""
    if not causal and q_offset is None:
        q_offset = [0] * (len(as_ints(cu_seqlens_q)) - 1)
    spans = sequence_spans(cu_seqlens_q, cu_seqlens_k, q_offset, num_queries=q.shape[0], num_keys=k.shape[0])
    short, rest = split_short(spans, causal=causal)
    work = Work(_buckets(short, q, k, causal), rest, (), causal, 1, _scale(q, scale))
    return _run(q, k, v, None, work)


def block_sparse_attention(
    q: Tensor, k: Tensor, v: Tensor, block_indices: Tensor, cu_seqlens_q: Lengths, cu_seqlens_k: Lengths, *,
    q_offset: Lengths | None = None, block_size: int, scale: float | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """See the reference."""
    spans = sequence_spans(cu_seqlens_q, cu_seqlens_k, q_offset, num_queries=q.shape[0], num_keys=k.shape[0])
    current = (query_positions(spans, q.device) // block_size)[:, None]
    visible = (block_indices >= 0) & (block_indices <= current[:, None])
    complete = (visible.sum(-1) == current + 1).all(-1)
    whole, pieces, sparse = list(spans), [], []
    if not bool(complete.all()):
        whole = []
        for span in spans:
            rows = complete[span.q_start : span.q_stop]
            dense = span.num_queries if bool(rows.all()) else int(rows.logical_not().byte().argmax())
            if dense == span.num_queries:
                whole.append(span)
                continue
            if dense:
                pieces.append(Span(span.q_start, dense, span.k_start, span.num_keys, span.offset))
            sparse.append(
                Span(span.q_start + dense, span.num_queries - dense, span.k_start, span.num_keys, span.offset + dense)
            )
    short, rest = split_short(whole, causal=True)
    work = Work(_buckets(short, q, k, True), (*rest, *pieces), tuple(sparse), True, block_size, _scale(q, scale))
    return _run(q, k, v, block_indices if sparse else None, work)


class Work(NamedTuple):
    """What a batch consists of; the sparse spans may start anywhere in their sequence."""

    buckets: Buckets | None
    dense: tuple[Span, ...]
    sparse: tuple[Span, ...]
    causal: bool
    block_size: int
    scale: float


def _scale(q: Tensor, scale: float | None) -> float:
    return q.shape[-1] ** -0.5 if scale is None else scale


def _buckets(short: tuple[Span, ...], q: Tensor, k: Tensor, causal: bool) -> Buckets | None:
    if not short:
        return None
    return make_buckets(short, q.shape[0], k.shape[0], 0.125 if causal else 0.0, str(q.device))


def _run(q: Tensor, k: Tensor, v: Tensor, ids: Tensor | None, work: Work) -> tuple[Tensor, Tensor]:
    dtype = at_least_fp32(q.dtype)
    wide = q.to(dtype), k.to(dtype), v.to(dtype)
    if torch.is_grad_enabled() and any(x.requires_grad for x in wide):
        out, lse = _Attention.apply(*wide, ids, work)
    else:
        out, lse, _ = _forward(*wide, ids, work)
    return out.to(q.dtype), lse


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, ids: Tensor | None, work: Work) -> tuple[Tensor, Tensor]:
        out, lse, padded = _forward(q, k, v, ids, work)
        ctx.work = work
        ctx.save_for_backward(q, k, v, out, lse, ids, *padded)
        ctx.mark_non_differentiable(lse)
        return out, lse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse, ids, *padded = ctx.saved_tensors
        return (*_backward(grad_out.contiguous(), q, k, v, out, lse, ids, ctx.work, padded), None, None)


def _forward(
    q: Tensor, k: Tensor, v: Tensor, ids: Tensor | None, work: Work
) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
    """(out, lse, padded rows of the short documents: q, k, v, out, lse)."""
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    lse = q.new_empty(q.shape[:2])
    padded: tuple[Tensor, ...] = ()
    if work.buckets is not None:
        b = work.buckets
        q_pad, k_pad, v_pad = b.gather_q(q), b.gather_k(k), b.gather_k(v)
        parts = [
            attend(*(_batched(x, bucket) for x in (q_pad, k_pad, v_pad)), causal=work.causal, scale=work.scale)
            for bucket in b.buckets
        ]
        out_pad = torch.cat([part[0].transpose(1, 2).flatten(0, 1) for part in parts])
        lse_pad = torch.cat([part[1].transpose(1, 2).flatten(0, 1) for part in parts])
        out = scatter_rows(out, b.rows_q, out_pad.index_select(0, b.packed))
        lse = scatter_rows(lse, b.rows_q, lse_pad.index_select(0, b.packed))
        padded = (q_pad, k_pad, v_pad, out_pad, lse_pad)
    for span in work.dense:
        rows = slice(span.q_start, span.q_stop)
        _dense_forward(q[rows], k, v, span, work, out[rows], lse[rows])
    if work.sparse:
        assert ids is not None
        for span in work.sparse:
            for tile in _tiles(span):
                rows = slice(tile.q_start, tile.q_stop)
                _sparse_forward(q[rows], k, v, ids[rows], tile, work, out[rows], lse[rows])
    return out, lse, padded


def _backward(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, ids: Tensor | None, work: Work,
    padded: Sequence[Tensor],
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    grad_q, grad_k, grad_v = (torch.zeros_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
    if work.buckets is not None:
        b = work.buckets
        q_pad, k_pad, v_pad, out_pad, lse_pad = padded
        # Padding rows repeat real tokens; a zero gradient keeps them out of the sums.
        grad_pad = b.gather_q(grad_out).index_fill_(0, b.filler, 0.0)
        parts = [
            attend_backward(
                *(_batched(x, bucket) for x in (grad_pad, q_pad, k_pad, v_pad, out_pad, lse_pad)),
                causal=work.causal, scale=work.scale,
            )
            for bucket in b.buckets
        ]  # fmt: skip
        grads = [torch.cat([x.transpose(1, 2).flatten(0, 1) for x in part]) for part in zip(*parts)]
        grad_q = scatter_rows(grad_q, b.rows_q, grads[0].index_select(0, b.packed))
        grad_k = scatter_rows(grad_k, b.rows_k, grads[1].index_select(0, b.packed))
        grad_v = scatter_rows(grad_v, b.rows_k, grads[2].index_select(0, b.packed))
    for span in work.dense:
        for rows, keys, causal in _dense_parts(span, work.causal):
            part_grads = attend_backward(
                *(_heads_first(x) for x in (grad_out[rows], q[rows], k[keys], v[keys], out[rows], lse[rows])),
                causal=causal, scale=work.scale,
            )  # fmt: skip
            _add(grad_q[rows], grad_k[keys], grad_v[keys], [g[0].transpose(0, 1) for g in part_grads])
    if work.sparse:
        assert ids is not None
        for span in work.sparse:
            for tile in _tiles(span):
                _sparse_backward(grad_out, q, k, v, out, lse, ids, tile, work, grad_q, grad_k, grad_v)
    return grad_q, grad_k, grad_v


def _batched(x: Tensor, bucket: Any) -> Tensor:
    """Padded rows `[R, H, ...]` of one bucket as `[documents, H, length, ...]`."""
    return x[bucket.rows].unflatten(0, (bucket.num_documents, bucket.length)).transpose(1, 2)


def _heads_first(x: Tensor) -> Tensor:
    """`[L, H, ...]` -> `[1, H, L, ...]`."""
    return x.transpose(0, 1).unsqueeze(0)


def _add(grad_q: Tensor, grad_k: Tensor, grad_v: Tensor, grads: Sequence[Tensor]) -> None:
    for target, grad in zip((grad_q, grad_k, grad_v), grads):
        target += grad


# Dense pieces: a causal square, and the keys before it as a rectangle


def _dense_parts(span: Span, causal: bool) -> Iterator[tuple[slice, slice, bool]]:
    """(query rows, key rows, causal) of the rectangles that make up a dense piece."""
    rows = slice(span.q_start, span.q_stop)
    if not causal:
        yield rows, slice(span.k_start, span.k_stop), False
    elif span.num_queries == 1:
        yield rows, slice(span.k_start, span.k_start + span.offset + 1), False
    else:
        start = span.k_start + span.offset
        yield rows, slice(start, start + span.num_queries), True
        if span.offset:
            yield rows, slice(span.k_start, start), False


def _dense_forward(q: Tensor, k: Tensor, v: Tensor, span: Span, work: Work, out: Tensor, lse: Tensor) -> None:
    result: tuple[Tensor, Tensor] | None = None
    for _, keys, causal in _dense_parts(span, work.causal):
        part = attend(_heads_first(q), _heads_first(k[keys]), _heads_first(v[keys]), causal=causal, scale=work.scale)
        result = part if result is None else merge(*result, *part)
    assert result is not None
    out.copy_(result[0][0].transpose(0, 1))
    lse.copy_(result[1][0].transpose(0, 1))


# Sparse pieces


def _tiles(span: Span) -> Iterator[Span]:
    for start in range(0, span.num_queries, _TILE_ROWS):
        count = min(_TILE_ROWS, span.num_queries - start)
        yield Span(span.q_start + start, count, span.k_start, span.num_keys, span.offset + start)


def _local_parts(span: Span, block_size: int) -> Iterator[tuple[slice, slice, int]]:
    """(rows within the piece, key rows, number of blocks): whole blocks as one batch, ragged ends one at a time.

    The keys start at the block of the first row, so a ragged first block has more keys than rows.
    """
    row, position, end = 0, span.offset, span.offset + span.num_queries
    while position < end:
        block_start = position // block_size * block_size
        whole = (end - position) // block_size if position == block_start else 0
        stop = position + whole * block_size if whole else min(block_start + block_size, end)
        yield slice(row, row + stop - position), slice(span.k_start + block_start, span.k_start + stop), max(whole, 1)
        row, position = row + stop - position, stop


def _rows_by_block(ids: Tensor, span: Span, block_size: int) -> tuple[Tensor, list[list[Tensor]]]:
    """(own block selected: bool `[R, Hkv]`, rows that selected each earlier block: int64, per head and block)."""
    current = (torch.arange(span.num_queries, device=ids.device) + span.offset).div_(block_size, rounding_mode="floor")
    num_blocks = (span.offset + span.num_queries - 1) // block_size + 1
    ids = ids.long()
    own = (ids == current[:, None, None]).any(-1)
    ids = torch.where((ids < 0) | (ids >= current[:, None, None]), num_blocks, ids).permute(1, 2, 0)
    member = torch.zeros(ids.shape[0], num_blocks + 1, span.num_queries, dtype=torch.bool, device=ids.device)
    member = member.scatter_(1, ids, True)[:, :num_blocks].contiguous()
    rows = member.nonzero()[:, 2].contiguous().split(member.sum(-1).flatten().tolist())
    return own, [list(rows[h * num_blocks : (h + 1) * num_blocks]) for h in range(ids.shape[0])]


def _by_kv_head(x: Tensor, kv_heads: int) -> Tensor:
    """`[R, Hq, ...]` -> contiguous `[Hkv, R, G, ...]`: the rows of one KV head lie together."""
    return x.unflatten(1, (kv_heads, x.shape[1] // kv_heads)).transpose(0, 1).contiguous()


def _sparse_forward(
    q: Tensor, k: Tensor, v: Tensor, ids: Tensor, span: Span, work: Work, out: Tensor, lse: Tensor
) -> None:
    """Fill `out` `[R, Hq, D]` and `lse` `[R, Hq]` of one piece."""
    block_size, scale, kv_heads = work.block_size, work.scale, k.shape[1]
    for rows, keys, blocks in _local_parts(span, block_size):
        local, local_lse = _local_attend(q[rows], k[keys], v[keys], blocks, scale)
        out[rows], lse[rows] = local, local_lse
    own, rows_by_block = _rows_by_block(ids, span, block_size)
    if not bool(own.all()):
        absent = ~own.repeat_interleave(q.shape[1] // kv_heads, dim=1)
        lse.masked_fill_(absent, float("-inf"))
    heads_q, heads_out, heads_lse = (_by_kv_head(x, kv_heads) for x in (q, out, lse))
    dim = q.shape[-1]
    for h in range(kv_heads):
        q_h, out_h, lse_h = heads_q[h].flatten(1), heads_out[h].flatten(1), heads_lse[h]
        for block, chosen in enumerate(rows_by_block[h]):
            count = chosen.shape[0]
            if not count:
                continue
            keys = slice(span.k_start + block * block_size, span.k_start + (block + 1) * block_size)
            part, part_lse = attend(
                q_h.index_select(0, chosen).view(1, 1, -1, dim), k[keys, h][None, None], v[keys, h][None, None],
                causal=False, scale=scale,
            )  # fmt: skip
            old = out_h.index_select(0, chosen).view(1, 1, -1, dim)
            merged, merged_lse = merge(old, lse_h.index_select(0, chosen).view(1, 1, -1), part, part_lse)
            out_h.index_copy_(0, chosen, merged.view(count, -1))
            lse_h.index_copy_(0, chosen, merged_lse.view(count, -1))
    assert not bool(torch.isneginf(heads_lse).any()), "a query sees no key"
    out.unflatten(1, (kv_heads, -1)).copy_(heads_out.transpose(0, 1))
    lse.unflatten(1, (kv_heads, -1)).copy_(heads_lse.transpose(0, 1))


def _local_attend(q: Tensor, k: Tensor, v: Tensor, blocks: int, scale: float) -> tuple[Tensor, Tensor]:
    """Rows `[R, Hq, D]` against the keys of their own blocks."""
    if k.shape[0] == q.shape[0]:
        out, lse = attend(*(_in_blocks(x, blocks) for x in (q, k, v)), causal=True, scale=scale)
        return out.transpose(1, 2).flatten(0, 1), lse.transpose(1, 2).flatten(0, 1)
    before = k.shape[0] - q.shape[0]
    square = attend(*(_heads_first(x) for x in (q, k[before:], v[before:])), causal=True, scale=scale)
    past = attend(*(_heads_first(x) for x in (q, k[:before], v[:before])), causal=False, scale=scale)
    out, lse = merge(*square, *past)
    return out[0].transpose(0, 1), lse[0].transpose(0, 1)


def _in_blocks(x: Tensor, blocks: int) -> Tensor:
    """`[blocks * L, H, ...]` -> `[blocks, H, L, ...]`."""
    return x.unflatten(0, (blocks, x.shape[0] // blocks)).transpose(1, 2)


def _sparse_backward(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, ids: Tensor, span: Span, work: Work,
    grad_q: Tensor, grad_k: Tensor, grad_v: Tensor,
) -> None:  # fmt: skip
    """Add the gradients of one piece; the packed tensors are whole, `span` says which rows."""
    block_size, scale, kv_heads, dim = work.block_size, work.scale, k.shape[1], q.shape[-1]
    piece = slice(span.q_start, span.q_stop)
    grad_out, q, out, lse, ids, grad_q = (x[piece] for x in (grad_out, q, out, lse, ids, grad_q))
    own, rows_by_block = _rows_by_block(ids, span, block_size)
    # An infinite log-sum-exp makes every probability of a row that did not select its own block zero.
    own_lse = lse.masked_fill(~own.repeat_interleave(q.shape[1] // kv_heads, dim=1), float("inf"))
    for rows, keys, blocks in _local_parts(span, block_size):
        before = (keys.stop - keys.start) - (rows.stop - rows.start)
        row_parts = grad_out[rows], q[rows], out[rows], own_lse[rows]
        parts = [(slice(keys.start + before, keys.stop), True)]
        if before:
            parts.append((slice(keys.start, keys.start + before), False))
        for part, causal in parts:
            d, qr, o, ls = (_in_blocks(x, blocks) for x in row_parts)
            grads = attend_backward(
                d, qr, _in_blocks(k[part], blocks), _in_blocks(v[part], blocks), o, ls, causal=causal, scale=scale
            )
            _add(grad_q[rows], grad_k[part], grad_v[part], [g.transpose(1, 2).flatten(0, 1) for g in grads])

    heads = [_by_kv_head(x, kv_heads) for x in (grad_out, q, out)]
    heads_lse, heads_grad = _by_kv_head(lse, kv_heads), _by_kv_head(torch.zeros_like(q), kv_heads)
    for h in range(kv_heads):
        grad_out_h, q_h, out_h = (x[h].flatten(1) for x in heads)
        grad_q_h = heads_grad[h].flatten(1)
        for block, chosen in enumerate(rows_by_block[h]):
            if not chosen.shape[0]:
                continue
            keys = slice(span.k_start + block * block_size, span.k_start + (block + 1) * block_size)
            d, qr, o = (x.index_select(0, chosen).view(1, 1, -1, dim) for x in (grad_out_h, q_h, out_h))
            grads = attend_backward(
                d, qr, k[keys, h][None, None], v[keys, h][None, None], o,
                heads_lse[h].index_select(0, chosen).view(1, 1, -1), causal=False, scale=scale,
            )  # fmt: skip
            # Rows are distinct within a block, so a gather, an addition and a copy back are exact and deterministic.
            total = grad_q_h.index_select(0, chosen).add_(grads[0].reshape(chosen.shape[0], -1))
            grad_q_h.index_copy_(0, chosen, total)
            grad_k[keys, h] += grads[1][0, 0]
            grad_v[keys, h] += grads[2][0, 0]
    grad_q += heads_grad.transpose(0, 1).flatten(1, 2)
