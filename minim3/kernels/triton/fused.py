"""Passes over hidden states that would be several operators: the residual sum with its norm, and the activation.

Inference only: training takes the differentiable modules.
"""

# mypy: allow-untyped-defs

import torch
import triton
import triton.language as tl
from torch import Tensor

from minim3.kernels.triton.keys import power_of_two, row_offsets


@triton.jit
def _add_norm_kernel(x, residual, weight, out, total, eps, D: tl.constexpr, BLOCK_D: tl.constexpr):
    row = tl.program_id(0)
    channel = tl.arange(0, BLOCK_D)
    mask = channel < D
    place = row_offsets(row, D) + channel
    value = tl.load(x + place, mask=mask, other=0.0).to(tl.float32)
    value += tl.load(residual + place, mask=mask, other=0.0).to(tl.float32)
    rounded = value.to(total.dtype.element_ty)
    tl.store(total + place, rounded, mask=mask)
    # The norm sees what the next layer will add to: the sum as it is kept.
    value = rounded.to(tl.float32)
    scale = tl.rsqrt(tl.sum(value * value, 0) / D + eps)
    weights = 1.0 + tl.load(weight + channel, mask=mask, other=0.0).to(tl.float32)
    tl.store(out + place, (value * scale * weights).to(out.dtype.element_ty), mask=mask)


def add_norm(x: Tensor, residual: Tensor, weight: Tensor, *, eps: float) -> tuple[Tensor, Tensor]:
    """(norm of the sum, sum) of `x` and `residual` `[..., H]`, the norm with a weight that is centred on 0."""
    x, residual = x.contiguous(), residual.contiguous()
    out, total = torch.empty_like(x), torch.empty_like(x)
    dim = x.shape[-1]
    if x.numel():
        block = power_of_two(dim)
        _add_norm_kernel[x.numel() // dim,](
            x, residual, weight, out, total, eps, D=dim, BLOCK_D=block, num_warps=8 if block > 2048 else 4
        )
    return out, total


@triton.jit
def _swiglu_kernel(
    gate_up, out, alpha, limit, beta, WIDTH: tl.constexpr, BLOCK: tl.constexpr, LIMITED: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = column < WIDTH
    source = gate_up + row_offsets(row, 2 * WIDTH) + column
    gate = tl.load(source, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(source + WIDTH, mask=mask, other=0.0).to(tl.float32)
    if LIMITED:
        gate = tl.minimum(gate, limit)
        up = tl.minimum(tl.maximum(up, -limit), limit)
    value = gate / (1.0 + tl.exp(-alpha * gate)) * (up + beta)
    tl.store(out + row_offsets(row, WIDTH) + column, value.to(out.dtype.element_ty), mask=mask)


def swiglu_oai(gate_up: Tensor, alpha: float, limit: float, beta: float = 1.0) -> Tensor:
    """`reference.swiglu_oai` of `[..., 2F]` (gate, then up) -> `[..., F]`."""
    gate_up = gate_up.contiguous()
    width = gate_up.shape[-1] // 2
    out = torch.empty(*gate_up.shape[:-1], width, dtype=gate_up.dtype, device=gate_up.device)
    if out.numel():
        block = min(1024, power_of_two(width))
        _swiglu_kernel[out.numel() // width, -(-width // block)](
            gate_up, out, float(alpha), float(limit), float(beta), WIDTH=width, BLOCK=block, LIMITED=bool(limit)
        )
    return out
