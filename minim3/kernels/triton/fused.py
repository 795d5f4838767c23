"""The residual sum with its norm in one pass. Inference only: training takes the differentiable norm."""

# mypy: allow-untyped-defs

import torch
import triton
import triton.language as tl
from torch import Tensor

from minim3.kernels.triton.keys import power_of_two, row_offsets


@triton.jit
def _add_norm_kernel(
    x, more, residual, weight, out, total, eps, D: tl.constexpr, BLOCK_D: tl.constexpr, MORE: tl.constexpr,
    ADD: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    channel = tl.arange(0, BLOCK_D)
    mask = channel < D
    place = row_offsets(row, D) + channel
    value = tl.load(x + place, mask=mask, other=0.0).to(tl.float32)
    # Each sum is rounded to the dtype it is kept in, as by the modules: the norm sees what the next layer adds to.
    if MORE:
        value += tl.load(more + place, mask=mask, other=0.0).to(tl.float32)
        value = value.to(x.dtype.element_ty).to(tl.float32)
    if ADD:
        value += tl.load(residual + place, mask=mask, other=0.0).to(tl.float32)
        rounded = value.to(total.dtype.element_ty)
        tl.store(total + place, rounded, mask=mask)
        value = rounded.to(tl.float32)
    scale = tl.rsqrt(tl.sum(value * value, 0) / D + eps)
    weights = 1.0 + tl.load(weight + channel, mask=mask, other=0.0).to(tl.float32)
    tl.store(out + place, (value * scale * weights).to(out.dtype.element_ty), mask=mask)


def add_norm(
    x: Tensor, residual: Tensor | None, weight: Tensor, *, eps: float, more: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """(norm of the sum, sum) of `x`, then `more`, then `residual`, all `[..., H]`, with a weight centred on 0.

    Without a residual there is nothing to add: the norm of `x`, and `x`.
    """
    assert residual is not None or more is None
    x = x.contiguous()
    out = torch.empty_like(x)
    total = x if residual is None else torch.empty_like(x)
    dim = x.shape[-1]
    if x.numel():
        block = power_of_two(dim)
        _add_norm_kernel[x.numel() // dim,](
            x, x if more is None else more.contiguous(), x if residual is None else residual.contiguous(), weight, out,
            total, eps, D=dim, BLOCK_D=block, MORE=more is not None, ADD=residual is not None,
            num_warps=8 if block > 2048 else 4,
        )  # fmt: skip
    return out, total
