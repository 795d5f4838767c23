"""SwiGLU-OAI and its gradient, a pass over memory each."""

# mypy: allow-untyped-defs

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from minim3.kernels.triton.keys import power_of_two, row_offsets


@triton.jit
def limited(gate, up, limit):
    """min(gate, limit) and clamp(up, -limit, limit). NaN stays, which minima and maxima of a GPU would drop."""
    return tl.where(gate > limit, limit, gate), tl.where(up > limit, limit, tl.where(up < -limit, -limit, up))


@triton.jit
def _gate_and_up(gate, up, stride_gate, stride_up, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """(row, columns, which of them exist, gate, up) of this program, both fp32."""
    row = tl.program_id(0)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = column < WIDTH
    g = tl.load(gate + row_offsets(row, stride_gate) + column, mask=mask, other=0.0).to(tl.float32)
    u = tl.load(up + row_offsets(row, stride_up) + column, mask=mask, other=0.0).to(tl.float32)
    return row, column, mask, g, u


@triton.jit
def _swiglu_kernel(
    gate, up, out, stride_gate, stride_up, alpha, limit, beta,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, LIMITED: tl.constexpr,
):  # fmt: skip
    row, column, mask, g, u = _gate_and_up(gate, up, stride_gate, stride_up, WIDTH, BLOCK)
    if LIMITED:
        g, u = limited(g, u, limit)
    value = g / (1.0 + tl.exp(-alpha * g)) * (u + beta)
    tl.store(out + row_offsets(row, WIDTH) + column, value.to(out.dtype.element_ty), mask=mask)


@triton.jit
def swiglu_gradient(raw_gate, raw_up, grad, alpha, limit, beta, LIMITED: tl.constexpr):
    """(value, gradient of gate, of up), all fp32 and of one shape."""
    g = raw_gate
    u = raw_up
    if LIMITED:
        g, u = limited(g, u, limit)
    u += beta
    sigmoid = 1.0 / (1.0 + tl.exp(-alpha * g))
    gated = g * sigmoid
    # d(g s)/dg = s (1 + alpha g (1 - s)), with s = sigmoid(alpha g)
    grad_gate = grad * u * (sigmoid + alpha * gated * (1.0 - sigmoid))
    grad_up = grad * gated
    if LIMITED:
        grad_gate = tl.where(raw_gate > limit, 0.0, grad_gate)
        grad_up = tl.where((raw_up > limit) | (raw_up < -limit), 0.0, grad_up)
    return gated * u, grad_gate, grad_up


@triton.jit
def _gradient_kernel(
    gate, up, grad, grad_gate, grad_up, stride_gate, stride_up, alpha, limit, beta,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, LIMITED: tl.constexpr,
):  # fmt: skip
    row, column, mask, g, u = _gate_and_up(gate, up, stride_gate, stride_up, WIDTH, BLOCK)
    place = row_offsets(row, WIDTH) + column
    value = tl.load(grad + place, mask=mask, other=0.0).to(tl.float32)
    _, of_gate, of_up = swiglu_gradient(g, u, value, alpha, limit, beta, LIMITED)
    tl.store(grad_gate + place, of_gate.to(grad_gate.dtype.element_ty), mask=mask)
    tl.store(grad_up + place, of_up.to(grad_up.dtype.element_ty), mask=mask)


def swiglu_oai(gate: Tensor, up: Tensor, alpha: float, limit: float, beta: float = 1.0) -> Tensor:
    """See the reference."""
    if torch.is_grad_enabled() and (gate.requires_grad or up.requires_grad):
        return _SwigluOAI.apply(gate, up, alpha, limit, beta)
    return _forward(gate, up, alpha, limit, beta)


def _forward(gate: Tensor, up: Tensor, alpha: float, limit: float, beta: float) -> Tensor:
    out = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    if out.numel():
        gate, up = _rows(gate), _rows(up)
        _swiglu_kernel[_grid(gate)](
            gate, up, out, gate.stride(0), up.stride(0), float(alpha), float(limit), float(beta),
            **_shape(gate, limit),
        )  # fmt: skip
    return out


def _rows(x: Tensor) -> Tensor:
    """`[R, F]`, as they lie where that is so and their last dimension is contiguous: halves of a product."""
    if x.dim() == 2 and x.stride(1) == 1:
        return x
    return x.contiguous().view(-1, x.shape[-1])


def _grid(x: Tensor) -> tuple[int, int]:
    return x.numel() // x.shape[-1], -(-x.shape[-1] // _block(x))


def _block(x: Tensor) -> int:
    return min(1024, power_of_two(x.shape[-1]))


def _shape(x: Tensor, limit: float) -> dict[str, Any]:
    return {"WIDTH": x.shape[-1], "BLOCK": _block(x), "LIMITED": bool(limit)}


class _SwigluOAI(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, alpha: float, limit: float, beta: float) -> Tensor:
        ctx.save_for_backward(gate, up)
        ctx.activation = float(alpha), float(limit), float(beta)
        return _forward(gate, up, alpha, limit, beta)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        gate, up = ctx.saved_tensors
        grads = [torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (gate, up)]
        if gate.numel():
            gate, up = _rows(gate), _rows(up)
            _gradient_kernel[_grid(gate)](
                gate, up, grad.contiguous(), *grads, gate.stride(0), up.stride(0), *ctx.activation,
                **_shape(gate, ctx.activation[1]),
            )  # fmt: skip
        return *grads, None, None, None
