"""The small parts every layer is made of: norm, rotary position, the gated MLP, and how weights pack for inference.

A packed module keeps its parameters, their names and values; what it adds are copies and joint storage, which are used
only without gradients and only while they are those of the parameters (`weight_state`).
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from minim3 import kernels
from minim3.config import MiniMaxM3VLTextConfig
from minim3.kernels.portable.swiglu import swiglu_oai_
from minim3.kernels.reference import swiglu_oai

__all__ = [
    "MiniMaxM3MLP", "MiniMaxM3RMSNorm", "PackedLinears", "PackedScale", "RotaryFactors", "apply_rotary",
    "at_least_fp32", "norm_rotate", "pack_linears", "rotary_table", "swiglu_oai",
]  # fmt: skip


def at_least_fp32(x: Tensor) -> Tensor:
    """fp32, but fp64 stays fp64 (finite differences need it)."""
    return x if x.dtype == torch.float64 else x.float()


def weight_state(weight: Tensor) -> tuple[int, int]:
    """Changes when the storage does or the values are changed in place (which inference tensors do not count)."""
    return weight.data_ptr(), 0 if weight.is_inference() else weight._version


class PackedLinears:
    """One product for several projections of the same input, whose weights become views of one, row after row."""

    def __init__(self, projections: Sequence[nn.Linear]) -> None:
        with torch.no_grad():
            self.weight = torch.cat([projection.weight for projection in projections])
            views = self.weight.split([projection.weight.shape[0] for projection in projections])
            for projection, view in zip(projections, views, strict=True):
                projection.weight.data = view
        self._places = [view.data_ptr() for view in views]

    def holds(self, projections: Sequence[nn.Module]) -> bool:
        """False once the model was moved or cast, or a parameter or a whole projection replaced."""
        for projection, place in zip(projections, self._places, strict=True):
            # The plain dictionary: this runs in every layer and step, and attributes of modules take a microsecond.
            weight = projection._parameters.get("weight")
            if weight is None or weight.data_ptr() != place:
                return False
        return True

    def __call__(self, x: Tensor) -> Tensor:
        """`[..., in]` -> `[..., all rows]`, the outputs of the projections side by side."""
        return F.linear(x, self.weight)


def pack_linears(projections: Sequence[Any]) -> Any:
    """The one product of these projections: `PackedLinears`, or what takes its place for weights in another format."""
    own = next((p.pack_with for p in projections if hasattr(p, "pack_with")), PackedLinears)
    return own(projections)


class PackedScale:
    """The scales of norms of one width, row after row, in the form that takes the fewest operations.

    Args:
        norms: they share their eps.
        rows: how many rows each scales, one after another; None: one norm, for any number of rows.
    """

    def __init__(self, norms: Sequence["MiniMaxM3RMSNorm"], rows: Sequence[int] | None = None) -> None:
        with torch.no_grad():
            scales = [norm.scale() for norm in norms]
            if rows is not None:
                scales = [torch.cat([scale.expand(n, -1) for scale, n in zip(scales, rows, strict=True)])]
            (scale,) = scales
            dim = scale.shape[-1]
            self.scale = scale * dim**0.5
            # A tensor, since an operator makes one of a plain number each time it runs.
            self.sum_eps = torch.tensor(dim * norms[0].eps, dtype=scale.dtype, device=scale.device)
            self._sources = [norm.weight.detach() for norm in norms]  # kept, so that no other weight gets their place
        self._states = [weight_state(weight) for weight in self._sources]

    def holds(self, norms: Sequence[nn.Module]) -> bool:
        """False once a weight was changed, moved or replaced."""
        for norm, state in zip(norms, self._states, strict=True):
            weight = norm._parameters.get("weight")
            if weight is None or weight_state(weight) != state:
                return False
        return True

    def __call__(self, x: Tensor) -> Tensor:
        """`x / rms(x) * scale` over the last dimension, `x` at least fp32: `x rsqrt(sum x^2 + dim eps) sqrt(dim) s`."""
        return (x * (x * x).sum(-1, keepdim=True).add_(self.sum_eps).rsqrt_()).mul_(self.scale)


class MiniMaxM3RMSNorm(nn.Module):
    """`x / rms(x) * (1 + weight)`, in fp32 inside and in the dtype of `x` outside.

    The weight is centred on 0, as in Gemma; `gemma=False` makes it a plain scale centred on 1.
    """

    def __init__(self, dim: int, eps: float = 1e-6, gemma: bool = True, backend: str | None = None) -> None:
        super().__init__()
        self.eps = eps
        self.backend = backend
        self.gemma = gemma
        self.weight = nn.Parameter(torch.empty(dim))
        self._packed: PackedScale | None = None
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
        packed = self._packed
        if packed is not None and not torch.is_grad_enabled() and packed.holds([self]):
            normed = packed(at_least_fp32(x)).to(x.dtype)
        else:
            normed = kernels.rms_norm(x, self.scale(), eps=self.eps, implementation=self.backend)
        return normed if residual is None else (normed, x)

    def pack_for_inference(self) -> None:
        """Keep the scale in the form that takes the fewest operations; it is used until the weight changes."""
        self._packed = PackedScale([self])

    def extra_repr(self) -> str:
        return f"{self.weight.shape[0]}, eps={self.eps}, gemma={self.gemma}"


def rotary_frequencies(dim: int, theta: float, device: torch.device | None = None) -> Tensor:
    """fp32 `[dim / 2]`: radians a position."""
    return 1.0 / theta ** (torch.arange(0, dim, 2, device=device, dtype=torch.float32) / dim)


def rotary_table(positions: Tensor, dim: int, theta: float) -> Tensor:
    """`freqs_cis`, fp32 `[..., dim]`: the cosines of the dim / 2 angles, then their sines.

    Angle i is `position * theta ** (-2 i / dim)` (Su et al., arXiv 2104.09864), computed in fp32 like the
    implementations that the checkpoints were trained with.
    """
    angles = positions.float().unsqueeze(-1) * rotary_frequencies(dim, theta, positions.device)
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


def apply_rotary(x: Tensor, freqs_cis: Tensor) -> Tensor:
    """Rotate the first `rotary_dim` channels of every head, pairing channel i with i + rotary_dim / 2.

    x: `[..., heads, head_dim]`; freqs_cis: `[..., rotary_dim]` with rotary_dim <= head_dim. The other channels pass.
    """
    return _Rotate.apply(x, freqs_cis)


def norm_rotate(x: Tensor, norm: "MiniMaxM3RMSNorm", freqs_cis: Tensor) -> Tensor:
    """`apply_rotary(norm(x), freqs_cis)`, in one pass where there is a kernel for it and nothing else to run."""
    one_pass = x.dim() == 3 and type(norm) is MiniMaxM3RMSNorm and norm.gemma and not has_hooks(norm)
    if one_pass and kernels.resolve(norm.backend, "norm_rope_store", x.device, x.dtype) == "triton":
        return kernels.norm_rope_store(x, norm.weight, freqs_cis, eps=norm.eps, implementation=norm.backend)
    return apply_rotary(norm(x), freqs_cis)


def has_hooks(module: nn.Module) -> bool:
    """Whether a call of the module is more than its `forward`."""
    own = module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks
    return any(own) or nn.modules.module._has_any_global_hook()


class _Rotate(torch.autograd.Function):
    """The gradient of a rotation is the rotation back; `freqs_cis` has none."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, freqs_cis: Tensor) -> Tensor:
        ctx.save_for_backward(freqs_cis)
        return _rotate(x, freqs_cis, 1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (freqs_cis,) = ctx.saved_tensors
        return _rotate(grad, freqs_cis, -1), None


def _rotate(x: Tensor, freqs_cis: Tensor, direction: int) -> Tensor:
    """`apply_rotary`, or with a `direction` of -1 its inverse."""
    half = freqs_cis.shape[-1] // 2
    cos, sin = freqs_cis.unsqueeze(-2).chunk(2, dim=-1)
    wide = at_least_fp32(x)
    out = torch.empty_like(wide, memory_format=torch.contiguous_format)
    first, second = wide[..., :half], wide[..., half : 2 * half]
    torch.mul(first, cos, out=out[..., :half]).addcmul_(second, sin, value=-direction)
    torch.mul(second, cos, out=out[..., half : 2 * half]).addcmul_(first, sin, value=direction)
    out[..., 2 * half :] = wide[..., 2 * half :]
    return out.to(x.dtype)


class RotaryFactors(NamedTuple):
    """A rotary table in the form that takes the fewest operations: made once a step, for all layers.

    cos `[..., 1, head_dim]` holds 1 for the channels that pass; sin `[..., 1, rotary_dim / 2]`.
    """

    cos: Tensor
    sin: Tensor

    @classmethod
    def of(cls, freqs_cis: Tensor, head_dim: int) -> "RotaryFactors":
        """From the `freqs_cis` `[..., rotary_dim]` of `rotary_table`."""
        cos, sin = freqs_cis.unsqueeze(-2).chunk(2, dim=-1)
        passing = cos.new_ones(*cos.shape[:-1], head_dim - freqs_cis.shape[-1])
        return cls(torch.cat([cos, cos, passing], dim=-1), sin)

    def rotate(self, x: Tensor) -> Tensor:
        """`apply_rotary` for `x` `[..., heads, head_dim]` of at least fp32, where no gradient is wanted."""
        half = self.sin.shape[-1]
        out = x * self.cos
        out[..., :half].addcmul_(x[..., half : 2 * half], self.sin, value=-1)
        out[..., half : 2 * half].addcmul_(x[..., :half], self.sin)
        return out


class MiniMaxM3MLP(nn.Module):
    """A gated MLP with SwiGLU-OAI: the MLP of a dense layer, and the shared expert of a MoE layer."""

    def __init__(self, config: MiniMaxM3VLTextConfig, intermediate_size: int, backend: str | None = None) -> None:
        super().__init__()
        self.backend = backend
        self.alpha, self.limit, self.beta = config.swiglu_alpha, config.swiglu_limit, config.swiglu_beta
        self.gate_proj = nn.Linear(config.hidden_size, intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, intermediate_size, bias=False)
        self.down_proj = nn.Linear(intermediate_size, config.hidden_size, bias=False)
        self._packed: PackedLinears | None = None

    def pack_for_inference(self) -> None:
        """Make gate and up views of one weight, so that inference takes one product for both."""
        if self._packed is None or not self._packed.holds([self.gate_proj, self.up_proj]):
            self._packed = pack_linears([self.gate_proj, self.up_proj])

    def forward(self, x: Tensor) -> Tensor:
        """`[..., hidden]` -> `[..., hidden]`."""
        packed = self._packed
        if packed is not None and not torch.is_grad_enabled() and packed.holds([self.gate_proj, self.up_proj]):
            gate_up = at_least_fp32(packed(x))
            return self.down_proj(swiglu_oai_(gate_up, self.alpha, self.limit, self.beta).to(x.dtype))
        gate, up = self.gate_proj(x), self.up_proj(x)
        act = kernels.swiglu_oai(gate, up, self.alpha, self.limit, self.beta, implementation=self.backend)
        return self.down_proj(act)
