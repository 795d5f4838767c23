"""The activation of experts and gated MLPs, with a gradient that keeps its inputs alone, and in place."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from minim3.kernels import reference
from minim3.kernels.sequences import at_least_fp32


def swiglu_oai(gate: Tensor, up: Tensor, alpha: float, limit: float, beta: float = 1.0) -> Tensor:
    """See the reference."""
    return _SwigluOAI.apply(gate, up, alpha, limit, beta)


def swiglu_oai_(gate_up: Tensor, alpha: float, limit: float, beta: float) -> Tensor:
    """`swiglu_oai` of `[R, 2F]` (gate, then up) -> `[R, F]`, in the dtype given; `gate_up` is overwritten."""
    if not alpha:
        gate, up = gate_up.chunk(2, dim=-1)
        return reference.swiglu_oai(gate, up, alpha, limit, beta)
    act = scaled_swiglu_oai_(gate_up, alpha, limit, beta)
    return act if alpha == 1.0 else act.mul_(1.0 / alpha)


def scaled_swiglu_oai_(gate_up: Tensor, alpha: float, limit: float, beta: float) -> Tensor:
    """`swiglu_oai_` times alpha, which is not 0: a pass less where something else multiplies anyway.

    `gate * sigmoid(alpha * gate)` is `silu(alpha * gate) / alpha`.
    """
    gate, up = gate_up.chunk(2, dim=-1)
    if limit:
        gate.clamp_(max=limit)
        up.clamp_(-limit, limit)
    act = torch.nn.functional.silu(gate) if alpha == 1.0 else torch.nn.functional.silu(gate * alpha, inplace=True)
    return torch.addcmul(act, act, up, out=act) if beta == 1.0 else act.mul_(up.add_(beta))


class _SwigluOAI(torch.autograd.Function):
    """`swiglu_oai` that keeps its inputs alone for the way back."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, alpha: float, limit: float, beta: float) -> Tensor:
        ctx.save_for_backward(gate, up)
        ctx.activation = alpha, limit, beta
        return reference.swiglu_oai(gate, up, alpha, limit, beta)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        gate, up = ctx.saved_tensors
        dtype = at_least_fp32(gate.dtype)
        grad_gate, grad_up = (torch.empty_like(x, dtype=dtype) for x in (gate, up))
        swiglu = SwigluGradient(gate.to(dtype), up.to(dtype), *ctx.activation)
        swiglu.backward(grad.to(dtype), grad_gate, grad_up)
        return grad_gate.to(gate.dtype), grad_up.to(up.dtype), None, None, None


class SwigluGradient:
    """The gradient of `swiglu_oai` at a gate and an up part of at least fp32; `act` is what it gives there."""

    def __init__(self, gate: Tensor, up: Tensor, alpha: float, limit: float, beta: float) -> None:
        self.raw_gate, self.raw_up, self.alpha, self.limit = gate, up, alpha, limit
        # Most batches never reach the limit: two reductions then save four passes.
        self.clamps = bool(limit and gate.numel() and torch.maximum(gate.amax(), up.abs().amax()) > limit)
        if self.clamps:
            gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
        self.up = up + beta
        self.sigmoid = (gate * alpha).sigmoid_()
        self.gated = gate * self.sigmoid
        self.act = self.gated * self.up

    def backward(self, grad: Tensor, grad_gate: Tensor, grad_up: Tensor) -> None:
        """Fill `grad_gate` and `grad_up`."""
        torch.mul(grad, self.gated, out=grad_up)
        # d(g s)/dg = s (1 + alpha g (1 - s)), with s = sigmoid(alpha g)
        slope = torch.addcmul(self.sigmoid, self.gated, 1.0 - self.sigmoid, value=self.alpha)
        torch.mul(grad * self.up, slope, out=grad_gate)
        if self.clamps:
            grad_gate.masked_fill_(self.raw_gate > self.limit, 0.0)
            grad_up.masked_fill_(self.raw_up.abs() > self.limit, 0.0)
