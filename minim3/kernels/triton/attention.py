"""Packed attention, dense and block-sparse, with its gradient."""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from minim3.kernels.sequences import Lengths
from minim3.kernels.triton.backward import backward
from minim3.kernels.triton.keys import rows_contiguous
from minim3.kernels.triton.layout import Layout, packed_layout
from minim3.kernels.triton.prefill import forward

_DENSE_KEYS = 64
"""Keys that dense attention takes at once."""


class Work(NamedTuple):
    layout: Layout
    block_size: int
    scale: float
    causal: bool


def block_sparse_attention(
    q: Tensor, k: Tensor, v: Tensor, block_indices: Tensor, cu_seqlens_q: Lengths, cu_seqlens_k: Lengths, *,
    q_offset: Lengths | None = None, block_size: int, scale: float | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """See the reference."""
    layout = packed_layout(cu_seqlens_q, cu_seqlens_k, q_offset, q, k)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    return _run(q, k, v, block_indices, Work(layout, block_size, scale, True))


def varlen_attention(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Lengths, cu_seqlens_k: Lengths, *,
    q_offset: Lengths | None = None, causal: bool = True, scale: float | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """See the reference."""
    layout = packed_layout(cu_seqlens_q, cu_seqlens_k, q_offset, q, k, causal)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    return _run(q, k, v, None, Work(layout, _DENSE_KEYS, scale, causal))


def _run(q: Tensor, k: Tensor, v: Tensor, ids: Tensor | None, work: Work) -> tuple[Tensor, Tensor]:
    q, k, v = rows_contiguous(q), rows_contiguous(k), rows_contiguous(v)
    if v.stride() != k.stride():
        k, v = k.contiguous(), v.contiguous()
    if torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v)):
        out, lse = _Attention.apply(q, k, v, ids, work)
        return out, lse
    return _forward(q, k, v, ids, work)


def _forward(q: Tensor, k: Tensor, v: Tensor, ids: Tensor | None, work: Work) -> tuple[Tensor, Tensor]:
    return forward(
        q.detach(), k.detach(), v.detach(), ids, work.layout, page_table=None, block_size=work.block_size,
        scale=work.scale, causal=work.causal,
    )  # fmt: skip


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, ids: Tensor | None, work: Work) -> tuple[Tensor, Tensor]:
        out, lse = _forward(q, k, v, ids, work)
        # The ids are kept, not chosen again: the gradient is that of the blocks which were attended.
        ctx.save_for_backward(q, k, v, out, lse, ids)
        ctx.work = work
        ctx.mark_non_differentiable(lse)
        return out, lse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse, ids = ctx.saved_tensors
        work: Work = ctx.work
        grads = backward(
            grad_out, q, k, v, out, lse, ids, work.layout, block_size=work.block_size, scale=work.scale,
            causal=work.causal,
        )  # fmt: skip
        return (*grads, None, None)
