"""The small parts every layer is made of: norm, rotary position, the gated MLP."""

from typing import Any

import torch
from torch import Tensor, nn

from minim3.config import MiniMaxM3VLTextConfig
from minim3.kernels.reference import swiglu_oai

__all__ = ["MiniMaxM3MLP", "MiniMaxM3RMSNorm", "apply_rotary", "at_least_fp32", "rotary_table", "swiglu_oai"]


def at_least_fp32(x: Tensor) -> Tensor:
    """fp32, but fp64 stays fp64 (finite differences need it)."""
    return x if x.dtype == torch.float64 else x.float()


def rms_normalize(x: Tensor, eps: float) -> Tensor:
    """`x * rsqrt(mean(x^2) + eps)` over the last dimension; `x` is at least fp32."""
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True).add_(eps))


class MiniMaxM3RMSNorm(nn.Module):
    """`x / rms(x) * (1 + weight)`, in fp32 inside and in the dtype of `x` outside.

    The weight is centred on 0, as in Gemma; `gemma=False` makes it a plain scale centred on 1.
    """

    def __init__(self, dim: int, eps: float = 1e-6, gemma: bool = True) -> None:
        super().__init__()
        self.eps = eps
        self.gemma = gemma
        self.weight = nn.Parameter(torch.empty(dim))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.constant_(self.weight, 0.0 if self.gemma else 1.0)

    def scale(self) -> Tensor:
        """The factor on the normalised input, at least fp32."""
        weight = at_least_fp32(self.weight)
        return 1.0 + weight if self.gemma else weight

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Any:
        """`[..., dim]` -> the same shape and dtype; with a residual, the pair `(norm(x + residual), x + residual)`."""
        if residual is not None:
            x = x + residual
        normed = (rms_normalize(at_least_fp32(x), self.eps) * self.scale()).to(x.dtype)
        return normed if residual is None else (normed, x)

    def extra_repr(self) -> str:
        return f"{self.weight.shape[0]}, eps={self.eps}, gemma={self.gemma}"


def rotary_table(positions: Tensor, dim: int, theta: float) -> Tensor:
    """`freqs_cis`, fp32 `[..., dim]`: the cosines of the dim / 2 angles, then their sines.

    Angle i is `position * theta ** (-2 i / dim)` (Su et al., arXiv 2104.09864), computed in fp32 like the
    implementations that the checkpoints were trained with.
    """
    exponents = torch.arange(0, dim, 2, device=positions.device, dtype=torch.float32) / dim
    angles = positions.float().unsqueeze(-1) * (1.0 / theta**exponents)
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


def apply_rotary(x: Tensor, freqs_cis: Tensor) -> Tensor:
    """Rotate the first `rotary_dim` channels of every head, pairing channel i with i + rotary_dim / 2.

    x: `[..., heads, head_dim]`; freqs_cis: `[..., rotary_dim]` with rotary_dim <= head_dim. The other channels pass.
    """
    rotary_dim = freqs_cis.shape[-1]
    cos, sin = freqs_cis.unsqueeze(-2).chunk(2, dim=-1)
    first, second, rest = at_least_fp32(x).split(
        [rotary_dim // 2, rotary_dim // 2, x.shape[-1] - rotary_dim], dim=-1
    )
    return torch.cat([first * cos - second * sin, second * cos + first * sin, rest], dim=-1).to(x.dtype)


class MiniMaxM3MLP(nn.Module):
    """A gated MLP with SwiGLU-OAI: the MLP of a dense layer, and the shared expert of a MoE layer."""

    def __init__(self, config: MiniMaxM3VLTextConfig, intermediate_size: int, backend: str | None = None) -> None:
        super().__init__()
        self.alpha, self.limit, self.beta = config.swiglu_alpha, config.swiglu_limit, config.swiglu_beta
        self.gate_proj = nn.Linear(config.hidden_size, intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, intermediate_size, bias=False)
        self.down_proj = nn.Linear(intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """`[..., hidden]` -> `[..., hidden]`."""
        return self.down_proj(swiglu_oai(self.gate_proj(x), self.up_proj(x), self.alpha, self.limit, self.beta))
