"""The norm over the last dimension, in few passes over memory: those are all that it costs."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from minim3.kernels.sequences import at_least_fp32


def rms_norm(x: Tensor, scale: Tensor, *, eps: float) -> Tensor:
    """See the reference."""
    return _Normalize.apply(x, scale, eps)


class _Normalize(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, eps: float) -> Tensor:
        dtype = at_least_fp32(x.dtype)
        wide = x.to(dtype)
        norm = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
        inverse = norm.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, scale, inverse)
        return (wide * inverse).mul_(scale).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, scale, inverse = ctx.saved_tensors
        dtype = at_least_fp32(x.dtype)
        normed, grad = x.to(dtype) * inverse, grad.to(dtype)
        product = grad * normed
        grad_scale = product.reshape(-1, x.shape[-1]).sum(0) if ctx.needs_input_grad[1] else None
        if not ctx.needs_input_grad[0]:
            return None, grad_scale, None
        with torch.autocast(x.device.type, enabled=False):  # the product is to stay in fp32
            along = (product @ scale).unsqueeze(-1).div_(-x.shape[-1])
        # What points along x itself drops out, since the norm takes it away.
        grad_x = torch.mul(grad, scale, out=product).addcmul_(normed, along).mul_(inverse)
        return grad_x.to(x.dtype), grad_scale, None
