"""Indexer KL: the loss and its closed-form gradient in one pass, batched over short documents, tiled over long ones.

The gradient at a scaled index score is (student - teacher) / (tokens * heads), so it is computed with the loss and only
multiplied in the backward pass; no probabilities are kept. Shapes as in the reference; t rows, s keys of one piece.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from minim3.kernels.portable.buckets import make_buckets, split_short
from minim3.kernels.reference import selected_keys_mask
from minim3.kernels.sequences import Lengths, Span, at_least_fp32, query_positions, sequence_spans

_TILE_SCORES = 1 << 22
"""Main-branch scores of a tile: 16 MiB in fp32."""

_HIDDEN = -1e30
"""Added to the score of a key that takes no part: its probability is exactly zero."""


def indexer_kl(
    q: Tensor, k: Tensor, index_q: Tensor, index_k: Tensor, block_indices: Tensor | None, cu_seqlens_q: Lengths,
    cu_seqlens_k: Lengths, *, q_offset: Lengths | None = None, block_size: int, scale: float | None = None,
    index_scale: float | None = None,
) -> Tensor:  # fmt: skip
    """See the reference."""
    spans = sequence_spans(cu_seqlens_q, cu_seqlens_k, q_offset, num_queries=q.shape[0], num_keys=k.shape[0])
    dtype = at_least_fp32(index_q.dtype)
    work = Work(
        spans, block_size, q.shape[-1] ** -0.5 if scale is None else scale,
        index_q.shape[-1] ** -0.5 if index_scale is None else index_scale,
    )  # fmt: skip
    q, k = q.detach().to(dtype), k.detach().to(dtype)
    return _IndexerKL.apply(q, k, index_q.to(dtype), index_k.to(dtype), block_indices, work)


class Work(NamedTuple):
    spans: tuple[Span, ...]
    block_size: int
    scale: float
    index_scale: float


class _IndexerKL(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, index_q: Tensor, index_k: Tensor, ids: Tensor | None, work: Work
    ) -> Tensor:
        wants_grad = any(ctx.needs_input_grad)
        loss, grad_q, grad_k = _loss_and_gradient(q, k, index_q, index_k, ids, work, wants_grad)
        if wants_grad:
            ctx.save_for_backward(grad_q, grad_k)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        grad_q, grad_k = ctx.saved_tensors
        return None, None, grad_q * grad, grad_k * grad, None, None


def _loss_and_gradient(
    q: Tensor, k: Tensor, index_q: Tensor, index_k: Tensor, ids: Tensor | None, work: Work, wants_grad: bool
) -> tuple[Tensor, Tensor, Tensor]:
    rows = max(index_q.shape[0] * index_q.shape[1], 1)
    grad_q, grad_k = torch.zeros_like(index_q), torch.zeros_like(index_k)
    loss = index_q.new_zeros(())
    short: tuple[Span, ...] = ()
    rest = work.spans
    if ids is None or _covers_everything(ids, work, q.device):
        ids = None
        short, rest = split_short(work.spans, causal=True)
    if short:
        b = make_buckets(short, q.shape[0], k.shape[0], 0.125, str(q.device))
        padded = b.gather_q(q), b.gather_k(k), b.gather_q(index_q), b.gather_k(index_k)
        # Padded queries repeat a document's last token; they must count neither in the loss nor in the gradient.
        counts = torch.ones(b.padded_q.shape[0], dtype=index_q.dtype, device=q.device).index_fill_(0, b.filler, 0.0)
        parts_q, parts_k = [], []
        for bucket in b.buckets:
            batch = _Batch(*(x[bucket.rows].unflatten(0, (bucket.num_documents, bucket.length)) for x in padded))
            position = torch.arange(bucket.length, device=q.device)
            keep = (position <= position[:, None]).expand(1, 1, -1, -1)
            weight = counts[bucket.rows].view(bucket.num_documents, 1, bucket.length, 1)
            part, part_q, part_k = _piece(batch, keep, weight, work)
            loss = loss + part
            parts_q.append(part_q.flatten(0, 1))
            parts_k.append(part_k.flatten(0, 1))
        covered = torch.cat(parts_q).index_select(0, b.packed), torch.cat(parts_k).index_select(0, b.packed)
        grad_q = covered[0] if b.rows_q is None else grad_q.index_copy_(0, b.rows_q, covered[0])
        grad_k = covered[1] if b.rows_k is None else grad_k.index_copy_(0, b.rows_k, covered[1])
    for tile in _tiles(rest, q.shape[1]):
        at, keys = slice(tile.q_start, tile.q_stop), slice(tile.k_start, tile.k_stop)
        position = torch.arange(tile.num_keys, device=q.device)
        keep = (position <= query_positions([tile], q.device)[:, None]).unsqueeze(0)
        if ids is not None:
            keep = keep & selected_keys_mask(ids[at], tile.num_keys, work.block_size).transpose(0, 1)
        batch = _Batch(*(x.unsqueeze(0) for x in (q[at], k[keys], index_q[at], index_k[keys])))
        part, part_q, part_k = _piece(batch, keep.unsqueeze(0), None, work)
        loss = loss + part
        grad_q[at] = part_q[0]
        grad_k[keys] += part_k[0]
    if wants_grad:
        grad_q, grad_k = grad_q.div_(rows), grad_k.div_(rows)
    return loss / rows, grad_q, grad_k


def _covers_everything(ids: Tensor, work: Work, device: torch.device) -> bool:
    """Whether every query selected all of its blocks."""
    current = (query_positions(work.spans, device) // work.block_size)[:, None]
    visible = (ids >= 0) & (ids <= current[:, None])
    return bool((visible.sum(-1) == current + 1).all())


def _tiles(spans: tuple[Span, ...], heads: int) -> Iterator[Span]:
    """Query tiles, each with the keys its last query sees."""
    for span in spans:
        start = 0
        while start < span.num_queries:
            seen = span.offset + start + 1
            count = min(max(16, _TILE_SCORES // (heads * seen)), span.num_queries - start)
            yield Span(span.q_start + start, count, span.k_start, seen + count - 1, span.offset + start)
            start += count


class _Batch(NamedTuple):
    """Pieces of equal size: q `[n, t, Hq, D]`, k `[n, s, Hkv, D]`, index q `[n, t, Hi, Di]`, index k `[n, s, Di]`."""

    q: Tensor
    k: Tensor
    index_q: Tensor
    index_k: Tensor


def _piece(batch: _Batch, keep: Tensor, weight: Tensor | None, work: Work) -> tuple[Tensor, Tensor, Tensor]:
    """Summed KL of a batch and the gradients of that sum: keep `[n|1, Hi|1, t, s]`, weight of a row `[n, 1, t, 1]`."""
    q, k, index_q, index_k = batch
    kv_heads = k.shape[2]
    grouped = q.unflatten(2, (kv_heads, -1)).permute(0, 2, 3, 1, 4)  # [n, Hkv, G, t, D]
    keys = k.permute(0, 2, 3, 1).unsqueeze(2)  # [n, Hkv, 1, D, s]
    # Masked scores get a finite bias that swallows them: exponentials of infinities take a slow path in vector
    # libraries, and 0 * -1e30 stays 0 where 0 * -inf is NaN. All of this is at least fp32.
    bias = torch.zeros(keep.shape, dtype=q.dtype, device=q.device).masked_fill_(~keep, _HIDDEN)
    scores = torch.matmul(grouped * work.scale, keys).add_(bias.unsqueeze(2))
    teacher = scores.softmax(-1).mean(2)  # [n, Hkv, t, s]
    index_queries = index_q.transpose(1, 2) * work.index_scale  # [n, Hi, t, Di]
    student_scores = torch.matmul(index_queries, index_k.transpose(1, 2).unsqueeze(1)).add_(bias)
    log_student, student = student_scores.log_softmax(-1), student_scores.softmax(-1)
    if weight is not None:
        teacher, student = teacher.mul_(weight), student.mul_(weight)
    log_ratio = teacher.clamp(min=torch.finfo(q.dtype).tiny).log_().sub_(log_student)
    loss = torch.dot(teacher.flatten(), log_ratio.flatten())
    difference = student.sub_(teacher)
    grad_q = torch.matmul(difference, index_k.unsqueeze(1)).mul_(work.index_scale).transpose(1, 2)
    # The heads share one key: their gradients add up in one product over (head, query).
    grad_k = torch.bmm(difference.flatten(1, 2).transpose(1, 2), index_queries.flatten(1, 2))
    return loss, grad_q, grad_k
