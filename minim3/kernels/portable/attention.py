"""Packed attention, dense and block-sparse, and its gradient.

Rows of a batch fall in three kinds: short whole documents (batched, `buckets`), dense pieces (every visible block is
selected: the first `topk * block_size` positions, or dense attention), and sparse pieces. Dense pieces are calls of the
fused operator (`merging`), sparse ones matrix products of their own (`products`). T, S, Hq, Hkv, D as in the
reference; G = Hq / Hkv query heads share a KV head.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from minim3.kernels.portable import merging, products
from minim3.kernels.portable.buckets import Buckets, make_buckets, scatter_rows, split_short
from minim3.kernels.portable.flash import attend, attend_backward
from minim3.kernels.portable.threads import run_all
from minim3.kernels.sequences import Lengths, Span, as_ints, at_least_fp32, query_positions, sequence_spans


def varlen_attention(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Lengths, cu_seqlens_k: Lengths, *,
    q_offset: Lengths | None = None, causal: bool = True, scale: float | None = None,
    blocks: products.BlockKernels | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """See the reference; `blocks` as in `block_sparse_attention`."""
    if not causal and q_offset is None:
        q_offset = [0] * (len(as_ints(cu_seqlens_q)) - 1)
    spans = sequence_spans(cu_seqlens_q, cu_seqlens_k, q_offset, num_queries=q.shape[0], num_keys=k.shape[0])
    short, rest = split_short(spans, causal=causal)
    work = Work(_buckets(short, q, k, causal), rest, (), causal, 1, _scale(q, scale), blocks)
    return _run(q, k, v, None, work)


def block_sparse_attention(
    q: Tensor, k: Tensor, v: Tensor, block_indices: Tensor, cu_seqlens_q: Lengths, cu_seqlens_k: Lengths, *,
    q_offset: Lengths | None = None, block_size: int, scale: float | None = None,
    blocks: products.BlockKernels | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """See the reference. `blocks` take the place of products of torch where they have a form."""
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
    buckets, scale = _buckets(short, q, k, True), _scale(q, scale)
    work = Work(buckets, (*rest, *pieces), tuple(sparse), True, block_size, scale, blocks)
    return _run(q, k, v, block_indices if sparse else None, work)


_LEAST_ROWS = 64
"""Queries of a dense piece that pay for laying out its keys."""


class Work(NamedTuple):
    """What a batch consists of; the sparse spans may start anywhere in their sequence."""

    buckets: Buckets | None
    dense: tuple[Span, ...]
    sparse: tuple[Span, ...]
    causal: bool
    block_size: int
    scale: float
    blocks: products.BlockKernels | None = None


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
        if _in_blocks(work, q, span):
            _blocks_forward(q, k, v, None, span, work, out, lse)
            continue
        rows, keys = slice(span.q_start, span.q_stop), slice(span.k_start, span.k_stop)
        merging.dense_forward(q[rows], k[keys], v[keys], span, work.causal, work.scale, out[rows], lse[rows])
    for span in work.sparse:
        assert ids is not None
        _blocks_forward(q, k, v, ids, span, work, out, lse)
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
        if _in_blocks(work, q, span):
            _blocks_backward(grad_out, q, k, v, out, lse, None, span, work, grad_q, grad_k, grad_v)
            continue
        rows, keys = slice(span.q_start, span.q_stop), slice(span.k_start, span.k_stop)
        merging.dense_backward(
            grad_out[rows], q[rows], k[keys], v[keys], out[rows], lse[rows], span, work.causal, work.scale,
            grad_q[rows], grad_k[keys], grad_v[keys],
        )  # fmt: skip
    for span in work.sparse:
        assert ids is not None
        _blocks_backward(grad_out, q, k, v, out, lse, ids, span, work, grad_q, grad_k, grad_v)
    return grad_q, grad_k, grad_v


def _batched(x: Tensor, bucket: Any) -> Tensor:
    """Padded rows `[R, H, ...]` of one bucket as `[documents, H, length, ...]`."""
    return x[bucket.rows].unflatten(0, (bucket.num_documents, bucket.length)).transpose(1, 2)


# Pieces a block of keys at a time: a tile of rows and a KV head after the other


def _in_blocks(work: Work, q: Tensor, span: Span) -> bool:
    """Whether a dense piece is faster in blocks than through the fused operator."""
    return work.causal and span.num_queries >= _LEAST_ROWS and _in_c(work, q)


def _in_c(work: Work, q: Tensor) -> bool:
    return work.blocks is not None and work.blocks.any_keys(q.shape[2], q.dtype)


def _choices(ids: Tensor | None, tile: Span, work: Work, kv_heads: int) -> list[products.Choice]:
    if ids is None:
        return [products.everything(tile)] * kv_heads
    return products.choices(ids[tile.q_start : tile.q_stop], tile, work.block_size)


def _blocks_forward(
    q: Tensor, k: Tensor, v: Tensor, ids: Tensor | None, span: Span, work: Work, out: Tensor, lse: Tensor
) -> None:
    """Fill the rows of `span`, which attend the blocks `ids` or (None) everything; the packed tensors are whole."""
    seen = slice(span.k_start, span.k_start + span.offset + span.num_queries)
    k, v, group = k[seen], v[seen], q.shape[1] // k.shape[1]
    v = v if v.stride(-1) == 1 else v.contiguous()
    keys, longest = products.extend(k), torch.linalg.vector_norm(k, dim=-1).amax(0)

    def head(h: int, rows: slice, choice: products.Choice, reference: Tensor | None) -> None:
        heads = slice(h * group, (h + 1) * group)
        q_h, out_h, lse_h = q[rows, heads], out[rows, heads], lse[rows, heads]
        if reference is not None:
            seen_by = q_h, reference[:, heads], keys[h], v[:, h], choice
            products.forward(*seen_by, work.scale, out_h, lse_h, work.blocks)
        else:
            merging.sparse_forward(q_h, k[:, h : h + 1], v[:, h : h + 1], choice, work.scale, out_h, lse_h)

    pieces: list[Callable[[], None]] = []
    for tile in products.tiles(span, least=-(-torch.get_num_threads() // k.shape[1])):
        rows = slice(tile.q_start, tile.q_stop)
        reference = products.references(q[rows], k[tile.offset : tile.offset + tile.num_queries], work.scale)
        within_reach = products.within_reach(q[rows], reference, longest, work.scale)
        for h, choice in enumerate(_choices(ids, tile, work, k.shape[1])):
            # A reference that is not among the scores could be far above all of them.
            as_products = within_reach[h] and choice.without_own is None
            pieces.append(partial(head, h, rows, choice, reference if as_products else None))
    run_all(pieces, q.device, alone=_in_c(work, q))


def _blocks_backward(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, ids: Tensor | None, span: Span,
    work: Work, grad_q: Tensor, grad_k: Tensor, grad_v: Tensor,
) -> None:  # fmt: skip
    """Fill the rows of `span` in `grad_q` and add to the others; the packed tensors are whole."""
    seen = slice(span.k_start, span.k_start + span.offset + span.num_queries)
    keys, values, group = products.extend(k[seen]), products.extend(v[seen]), q.shape[1] // k.shape[1]
    grad_keys, grad_values = keys.new_zeros(2, *keys.shape[:2], q.shape[2])

    def head(h: int, rows: slice, choice: products.Choice, delta: Tensor) -> None:
        heads = slice(h * group, (h + 1) * group)
        products.backward(
            grad_out[rows, heads], q[rows, heads], lse[rows, heads], delta[:, heads], keys[h], values[h], choice,
            work.scale, grad_q[rows, heads], grad_keys[h], grad_values[h], work.blocks,
        )  # fmt: skip

    for tile in products.tiles(span):
        rows = slice(tile.q_start, tile.q_stop)
        delta = (grad_out[rows] * out[rows]).sum(-1)
        choices = _choices(ids, tile, work, k.shape[1])
        pieces = (partial(head, h, rows, choice, delta) for h, choice in enumerate(choices))
        run_all(pieces, q.device, alone=_in_c(work, q))
    grad_k[seen] += grad_keys.transpose(0, 1)
    grad_v[seen] += grad_values.transpose(0, 1)
