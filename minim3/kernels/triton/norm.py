"""The norm over the last dimension and its gradient, a pass over memory each.

The gradient of the scale is a sum over rows: each of n programs adds up every n-th group of rows, and their sums are
added in order, so that repetitions give the same bits.
"""

# mypy: allow-untyped-defs

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from minim3.kernels.triton.keys import power_of_two, row_offsets

_NUMBERS = 4096
"""Of the rows that a program takes at once."""

_PROGRAMS = 264
"""Programs of the gradient: two for each multiprocessor of an H100."""


@triton.jit
def _norm_kernel(
    x, scale, out, inverse, num_rows, eps, ROWS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    channel = tl.arange(0, BLOCK_D)
    mask = (row < num_rows)[:, None] & (channel < D)[None, :]
    place = row_offsets(row, D)[:, None] + channel[None, :]
    value = tl.load(x + place, mask=mask, other=0.0).to(tl.float32)
    factor = tl.rsqrt(tl.sum(value * value, 1) / D + eps)
    scales = tl.load(scale + channel, mask=channel < D, other=0.0).to(tl.float32)
    tl.store(out + place, (value * factor[:, None] * scales[None, :]).to(out.dtype.element_ty), mask=mask)
    tl.store(inverse + row, factor, mask=row < num_rows)


@triton.jit
def norm_gradient(grad, normed, factor, scale, D: tl.constexpr):
    """(gradient of rows that `factor` norms, what they give the scale), fp32; `grad` is that of the scaled norm."""
    product = grad * normed
    # What points along a row itself drops out, since the norm takes it away.
    along = tl.sum(product * scale[None, :], 1) / D
    return factor * (grad * scale[None, :] - normed * along[:, None]), tl.sum(product, 0)


@triton.jit
def _gradient_kernel(
    x, scale, inverse, grad, grad_x, parts, num_rows, programs,
    ROWS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Every `programs`-th group of rows: their grad_x, and the sum of what they give the scale, `[programs, D]`."""
    program = tl.program_id(0)
    channel = tl.arange(0, BLOCK_D)
    scales = tl.load(scale + channel, mask=channel < D, other=0.0).to(tl.float32)
    total = tl.zeros([BLOCK_D], tl.float32)
    for first in tl.range(program * ROWS, num_rows, programs * ROWS):
        row = first + tl.arange(0, ROWS)
        mask = (row < num_rows)[:, None] & (channel < D)[None, :]
        place = row_offsets(row, D)[:, None] + channel[None, :]
        factor = tl.load(inverse + row, mask=row < num_rows, other=0.0)[:, None]
        normed = tl.load(x + place, mask=mask, other=0.0).to(tl.float32) * factor
        value = tl.load(grad + place, mask=mask, other=0.0).to(tl.float32)
        found, given = norm_gradient(value, normed, factor, scales, D)
        total += given
        tl.store(grad_x + place, found.to(grad_x.dtype.element_ty), mask=mask)
    tl.store(parts + row_offsets(program, D) + channel, total, mask=channel < D)


def rms_norm(x: Tensor, scale: Tensor, *, eps: float) -> Tensor:
    """See the reference."""
    return _Normalize.apply(x, scale, eps)


class _Normalize(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, eps: float) -> Tensor:
        x, scale, dim = x.contiguous(), scale.contiguous(), x.shape[-1]
        out = torch.empty_like(x)
        rows = x.numel() // max(dim, 1)
        inverse = torch.empty(rows, dtype=torch.float32, device=x.device)
        if x.numel():
            some, block = _shape(dim)
            _norm_kernel[-(-rows // some),](
                x, scale, out, inverse, rows, eps, ROWS=some, D=dim, BLOCK_D=block, num_warps=8 if block > 2048 else 4
            )
        ctx.save_for_backward(x, scale, inverse)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, scale, inverse = ctx.saved_tensors
        grad_x, dim, rows = torch.empty_like(x), x.shape[-1], inverse.shape[0]
        if not x.numel():
            return grad_x, torch.zeros_like(scale), None
        some, block = _shape(dim)
        programs = min(-(-rows // some), _PROGRAMS)
        parts = torch.empty(programs, dim, dtype=torch.float32, device=x.device)
        _gradient_kernel[programs,](
            x, scale, inverse, grad.contiguous(), grad_x, parts, rows, programs, ROWS=some, D=dim, BLOCK_D=block,
            num_warps=8 if block > 2048 else 4,
        )  # fmt: skip
        return grad_x, parts.sum(0).to(scale.dtype), None


def _shape(dim: int) -> tuple[int, int]:
    """Rows of a program, and the width they are padded to."""
    block = power_of_two(dim)
    return max(1, _NUMBERS // block), block
