"""Per-head norm, partial rotary positions and the write to pages, in as few passes as plain operators allow."""

import torch
from torch import Tensor

from minim3.kernels.reference import check_store
from minim3.kernels.sequences import at_least_fp32


def norm_rope_store(
    x: Tensor, weight: Tensor | None, freqs_cis: Tensor, *, eps: float, pages: Tensor | None = None,
    slots: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """See the reference."""
    check_store(x, pages, slots)
    half, dtype = freqs_cis.shape[-1] // 2, at_least_fp32(x.dtype)
    wide = x.to(dtype)
    if weight is not None:
        scale = torch.rsqrt(torch.linalg.vector_norm(wide, dim=-1, keepdim=True).square() / x.shape[-1] + eps)
        wide = wide * scale * (1.0 + weight.to(dtype))
    cos, sin = freqs_cis.to(dtype).unsqueeze(-2).split(half, dim=-1)
    first, second, rest = wide.split([half, half, x.shape[-1] - 2 * half], dim=-1)
    out = torch.empty_like(wide) if not wide.requires_grad or not torch.is_grad_enabled() else None
    if out is None:
        out = torch.cat([first * cos - second * sin, second * cos + first * sin, rest], dim=-1)
    else:
        torch.mul(first, cos, out=out[..., :half]).addcmul_(second, sin, value=-1)
        torch.mul(second, cos, out=out[..., half : 2 * half]).addcmul_(first, sin)
        out[..., 2 * half :] = rest
    out = out.to(x.dtype)
    if pages is not None and slots is not None:
        heads, page_size, dim = x.shape[1], pages.shape[-2], x.shape[2]
        first_row = slots // page_size * (heads * page_size) + slots % page_size
        rows = first_row[:, None] + torch.arange(heads, device=slots.device) * page_size
        pages.view(-1, dim).index_copy_(0, rows.flatten(), out.detach().reshape(-1, dim).to(pages.dtype))
    return out
