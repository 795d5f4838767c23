"""Per-head norm, partial rotary positions and the write to pages in one pass over memory."""

# mypy: allow-untyped-defs

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from minim3.kernels.portable import rotation
from minim3.kernels.reference import check_store
from minim3.kernels.triton.keys import power_of_two, row_offsets, rows_contiguous
from minim3.kernels.triton.norm import norm_gradient

_HEADS_AT_ONCE = 8


@triton.jit
def _saturated(value, LIMIT: tl.constexpr):
    """In fp32; e4m3 has no infinity, so that what is out of range would become NaN. NaN stays, so that it shows."""
    value = value.to(tl.float32)
    return tl.where(value == value, tl.minimum(tl.maximum(value, -LIMIT), LIMIT), value)


@triton.jit
def _norm_rope_store_kernel(
    x, weight, freqs_cis, out, pages, slots, stride_x, stride_x_head, stride_weight_head, stride_freqs, stride_page,
    stride_page_head, stride_page_token, page_size, eps,
    HEADS: tl.constexpr, SOME: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, HALF: tl.constexpr,
    NORM: tl.constexpr, STORE: tl.constexpr, LIMIT: tl.constexpr,
):  # fmt: skip
    """SOME heads of one token."""
    token = tl.program_id(0)
    head = tl.program_id(1) * SOME + tl.arange(0, SOME)
    channel = tl.arange(0, BLOCK_D)
    # Channel i < HALF turns with channel i + HALF, which is read once more: it lies in the cache.
    first = channel < HALF
    turns = channel < 2 * HALF
    partner = tl.where(first, channel + HALF, tl.where(turns, channel - HALF, channel))
    mask = (head < HEADS)[:, None] & (channel < D)[None, :]
    source = x + row_offsets(token, stride_x) + (head * stride_x_head)[:, None]
    value = tl.load(source + channel[None, :], mask=mask, other=0.0).to(tl.float32)
    other = tl.load(source + partner[None, :], mask=mask, other=0.0).to(tl.float32)
    if NORM:
        scale = tl.rsqrt(tl.sum(value * value, 1) / D + eps)
        weights = weight + (head * stride_weight_head)[:, None]
        own = tl.load(weights + channel[None, :], mask=mask, other=0.0).to(tl.float32)
        value *= scale[:, None] * (1.0 + own)
        own = tl.load(weights + partner[None, :], mask=mask, other=0.0).to(tl.float32)
        other *= scale[:, None] * (1.0 + own)
    angle = freqs_cis + row_offsets(token, stride_freqs) + tl.where(first, channel, channel - HALF)
    cos = tl.load(angle, mask=turns, other=1.0).to(tl.float32)
    sin = tl.load(angle + HALF, mask=turns, other=0.0).to(tl.float32)
    turned = value * cos[None, :] + other * tl.where(first, -sin, sin)[None, :]
    target = (row_offsets(token, HEADS * D) + head * D)[:, None] + channel[None, :]
    result = turned.to(out.dtype.element_ty)
    tl.store(out + target, result, mask=mask)
    if STORE:
        slot = tl.load(slots + token).to(tl.int64)
        place = slot // page_size * stride_page + slot % page_size * stride_page_token
        target = place + (head.to(tl.int64) * stride_page_head)[:, None] + channel[None, :]
        if LIMIT > 0:
            result = _saturated(result, LIMIT)
        tl.store(pages + target, result.to(pages.dtype.element_ty), mask=mask)


def norm_rope_store(
    x: Tensor, weight: Tensor | None, freqs_cis: Tensor, *, eps: float, pages: Tensor | None = None,
    slots: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """See the reference."""
    check_store(x, pages, slots)
    if torch.is_grad_enabled() and (x.requires_grad or (weight is not None and weight.requires_grad)):
        return _NormRopeStore.apply(x, weight, freqs_cis, eps, pages, slots)
    return _run(x, weight, freqs_cis, eps, pages, slots)


def _run(
    x: Tensor, weight: Tensor | None, freqs_cis: Tensor, eps: float, pages: Tensor | None, slots: Tensor | None
) -> Tensor:
    x, freqs_cis = rows_contiguous(x.detach()), rows_contiguous(freqs_cis.detach())
    tokens, heads, dim = x.shape
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if not out.numel():
        return out
    weights = x if weight is None else rows_contiguous(weight.detach())
    some = min(power_of_two(heads), _HEADS_AT_ONCE)
    if pages is not None and pages.stride(-1) != 1:
        raise ValueError(f"cache pages of shape {tuple(pages.shape)} need contiguous channels; allocate them whole")
    stored = out if pages is None else pages
    _norm_rope_store_kernel[tokens, -(-heads // some)](
        x, weights, freqs_cis, out, stored, out if slots is None else slots, x.stride(0), x.stride(1),
        weights.stride(0) if weights.dim() == 2 else 0, freqs_cis.stride(0), stored.stride(0),
        stored.stride(1) if stored.dim() == 4 else 0, stored.stride(-2), stored.shape[-2], eps, HEADS=heads, SOME=some,
        D=dim, BLOCK_D=power_of_two(dim), HALF=freqs_cis.shape[-1] // 2, NORM=weight is not None,
        STORE=pages is not None, LIMIT=448.0 if stored.dtype == torch.float8_e4m3fn else 0.0, num_warps=4,
    )  # fmt: skip
    return out


@triton.jit
def _project_store_kernel(
    x, weight, freqs_cis, out, k_pages, v_pages, index_pages, slots, stride_x, stride_freqs, page_size, eps,
    Q_HEADS: tl.constexpr, KV_HEADS: tl.constexpr, INDEX_HEADS: tl.constexpr, SOME: tl.constexpr, D: tl.constexpr,
    BLOCK_D: tl.constexpr, HALF: tl.constexpr, STORE: tl.constexpr, LIMIT: tl.constexpr,
):  # fmt: skip
    """SOME heads of one token; in this order those of q, k, index q, the index key (if INDEX_HEADS), and v."""
    token = tl.program_id(0)
    head = tl.program_id(1) * SOME + tl.arange(0, SOME)
    index_keys = 1 if INDEX_HEADS else 0
    first_index = Q_HEADS + KV_HEADS
    normed = first_index + INDEX_HEADS + index_keys
    channel = tl.arange(0, BLOCK_D)
    first = channel < HALF
    turns = channel < 2 * HALF
    partner = tl.where(first, channel + HALF, tl.where(turns, channel - HALF, channel))
    mask = (head < normed + KV_HEADS)[:, None] & (channel < D)[None, :]
    source = x + row_offsets(token, stride_x) + (head * D)[:, None]
    raw = tl.load(source + channel[None, :], mask=mask, other=0.0)
    value = raw.to(tl.float32)
    other = tl.load(source + partner[None, :], mask=mask, other=0.0).to(tl.float32)
    scale = tl.rsqrt(tl.sum(value * value, 1) / D + eps)[:, None]
    weights = weight + (head * D)[:, None]
    known = mask & (head < normed)[:, None]
    value *= scale * (1.0 + tl.load(weights + channel[None, :], mask=known, other=0.0).to(tl.float32))
    other *= scale * (1.0 + tl.load(weights + partner[None, :], mask=known, other=0.0).to(tl.float32))
    angle = freqs_cis + row_offsets(token, stride_freqs) + tl.where(first, channel, channel - HALF)
    cos = tl.load(angle, mask=turns, other=1.0).to(tl.float32)
    sin = tl.load(angle + HALF, mask=turns, other=0.0).to(tl.float32)
    turned = value * cos[None, :] + other * tl.where(first, -sin, sin)[None, :]
    result = tl.where((head < normed)[:, None], turned.to(x.dtype.element_ty), raw)
    target = (row_offsets(token, (normed + KV_HEADS) * D) + head * D)[:, None] + channel[None, :]
    tl.store(out + target, result, mask=mask)
    if STORE:
        if LIMIT > 0:
            result = _saturated(result, LIMIT)
        kept = result.to(k_pages.dtype.element_ty)
        slot = tl.load(slots + token).to(tl.int64)
        mask = mask & (slot >= 0)
        page = slot // page_size
        within = slot % page_size
        is_k = (head >= Q_HEADS) & (head < first_index)
        place = ((page * KV_HEADS + head - Q_HEADS) * page_size + within) * D
        tl.store(k_pages + place[:, None] + channel[None, :], kept, mask=mask & is_k[:, None])
        place = ((page * KV_HEADS + head - normed) * page_size + within) * D
        tl.store(v_pages + place[:, None] + channel[None, :], kept, mask=mask & (head >= normed)[:, None])
        if INDEX_HEADS:
            is_index = head == first_index + INDEX_HEADS
            place = (page * page_size + within) * D
            tl.store(index_pages + place + channel[None, :] + head[:, None] * 0, kept, mask=mask & is_index[:, None])


def norm_rope_store_packed(
    x: Tensor, weight: Tensor, freqs_cis: Tensor, *, eps: float, heads: tuple[int, int, int],
    pages: tuple[Tensor, Tensor, Tensor | None] | None = None, slots: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """`norm_rope_store` of all heads of a layer in one launch; inference only.

    x `[T, H, D]`: the heads of q, k, index q, the index key, and v, as one projection gives them; heads: how many of q,
    of k (and v), and of index q (0: no indexer, no index key). weight `[H - Hkv, D]` and freqs_cis `[T, R]` serve all
    but those of v, which pass. pages: those of k, v `[P, Hkv, page, D]` and index keys `[P, page, D]`, of one dtype,
    each allocated whole; a token whose slot is -1 is not stored. Returns `[T, H, D]`.
    """
    q_heads, kv_heads, index_heads = heads
    tokens, count, dim = x.shape
    normed = q_heads + kv_heads + (index_heads + 1 if index_heads else 0)
    if count != normed + kv_heads or weight.shape != (normed, dim):
        raise ValueError(
            f"x {tuple(x.shape)} and weight {tuple(weight.shape)} do not fit heads={heads}: {normed + kv_heads} heads, "
            f"{normed} of them normed, are needed"
        )
    if (pages is None) != (slots is None):
        raise ValueError("pages and slots belong together; pass both, or neither to store nothing")
    if pages is not None and (pages[2] is None) != (index_heads == 0):
        raise ValueError(f"index keys need pages of their own, and only they: heads={heads}")
    if pages is not None and not all(p.is_contiguous() and p.dtype == pages[0].dtype for p in pages if p is not None):
        raise ValueError("pages of one dtype, allocated whole, are needed")
    x, weight, freqs_cis = x.detach().contiguous(), weight.detach().contiguous(), rows_contiguous(freqs_cis.detach())
    out = torch.empty_like(x)
    if not out.numel():
        return out
    k_pages, v_pages, index_pages = (out, out, None) if pages is None else pages
    some = min(power_of_two(count), _HEADS_AT_ONCE)
    _project_store_kernel[tokens, -(-count // some)](
        x, weight, freqs_cis, out, k_pages, v_pages, k_pages if index_pages is None else index_pages,
        out if slots is None else slots, x.stride(0), freqs_cis.stride(0), k_pages.shape[-2], eps, Q_HEADS=q_heads,
        KV_HEADS=kv_heads, INDEX_HEADS=index_heads, SOME=some, D=dim,
        BLOCK_D=power_of_two(dim), HALF=freqs_cis.shape[-1] // 2, STORE=pages is not None,
        LIMIT=448.0 if k_pages.dtype == torch.float8_e4m3fn else 0.0, num_warps=4,
    )  # fmt: skip
    return out


@triton.jit
def _gradient_kernel(
    x, weight, freqs_cis, grad, grad_x, parts, num_rows, stride_freqs, programs, eps,
    HEADS: tl.constexpr, ROWS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, HALF: tl.constexpr,
    NORM: tl.constexpr,
):  # fmt: skip
    """Every `programs`-th group of rows (heads of tokens): grad_x, and what they give one weight, `[programs, D]`."""
    program = tl.program_id(0)
    channel = tl.arange(0, BLOCK_D)
    first = channel < HALF
    turns = channel < 2 * HALF
    partner = tl.where(first, channel + HALF, tl.where(turns, channel - HALF, channel))
    scale = tl.zeros([BLOCK_D], tl.float32)
    if NORM:
        scale = 1.0 + tl.load(weight + channel, mask=channel < D, other=0.0).to(tl.float32)
    total = tl.zeros([BLOCK_D], tl.float32)
    for start in tl.range(program * ROWS, num_rows, programs * ROWS):
        row = start + tl.arange(0, ROWS)
        mask = (row < num_rows)[:, None] & (channel < D)[None, :]
        base = row_offsets(row, D)[:, None]
        angle = row_offsets(row // HEADS, stride_freqs)[:, None] + tl.where(first, channel, channel - HALF)[None, :]
        turned = mask & turns[None, :]
        cos = tl.load(freqs_cis + angle, mask=turned, other=1.0).to(tl.float32)
        sin = tl.load(freqs_cis + angle + HALF, mask=turned, other=0.0).to(tl.float32)
        own = tl.load(grad + base + channel[None, :], mask=mask, other=0.0).to(tl.float32)
        other = tl.load(grad + base + partner[None, :], mask=mask, other=0.0).to(tl.float32)
        # Turned back: the sines change their sign.
        found = own * cos + other * tl.where(first[None, :], sin, -sin)
        if NORM:
            value = tl.load(x + base + channel[None, :], mask=mask, other=0.0).to(tl.float32)
            factor = tl.rsqrt(tl.sum(value * value, 1) / D + eps)[:, None]
            found, given = norm_gradient(found, value * factor, factor, scale, D)
            total += given
        tl.store(grad_x + base + channel[None, :], found.to(grad_x.dtype.element_ty), mask=mask)
    tl.store(parts + row_offsets(program, D) + channel, total, mask=channel < D)


class _NormRopeStore(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, freqs_cis: Tensor, eps: float, pages: Tensor | None,
        slots: Tensor | None,
    ) -> Tensor:  # fmt: skip
        ctx.save_for_backward(x, weight, freqs_cis)
        ctx.eps = eps
        return _run(x, weight, freqs_cis, eps, pages, slots)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, freqs_cis = ctx.saved_tensors
        if weight is not None and weight.dim() == 2:
            grad_x, grad_weight = _gradient_by_head(x, weight, freqs_cis, ctx.eps, grad)
        else:
            grad_x, grad_weight = _gradient(x, weight, freqs_cis, ctx.eps, grad)
        return grad_x, grad_weight, None, None, None, None


def _gradient(
    x: Tensor, weight: Tensor | None, freqs_cis: Tensor, eps: float, grad: Tensor
) -> tuple[Tensor, Tensor | None]:
    """Of `x` and of a weight `[D]` that serves all heads."""
    tokens, heads, dim = x.shape
    grad_x = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if not x.numel():
        return grad_x, None if weight is None else torch.zeros_like(weight)
    x, grad, freqs_cis = x.contiguous(), grad.contiguous(), rows_contiguous(freqs_cis)
    block = power_of_two(dim)
    some = max(1, _GRADIENT_NUMBERS // block)
    programs = min(-(-tokens * heads // some), _GRADIENT_PROGRAMS)
    parts = torch.empty(programs, dim, dtype=torch.float32, device=x.device)
    _gradient_kernel[programs,](
        x, parts if weight is None else weight.contiguous(), freqs_cis, grad, grad_x, parts, tokens * heads,
        freqs_cis.stride(0), programs, eps, HEADS=heads, ROWS=some, D=dim, BLOCK_D=block,
        HALF=freqs_cis.shape[-1] // 2, NORM=weight is not None, num_warps=4,
    )  # fmt: skip
    return grad_x, None if weight is None else parts.sum(0).to(weight.dtype)


_GRADIENT_NUMBERS = 2048
"""Of the rows that a program of the gradient takes at once."""

_GRADIENT_PROGRAMS = 528
"""Four for each multiprocessor of an H100. Their sums are added in order: repetitions give the same bits."""


def _gradient_by_head(
    x: Tensor, weight: Tensor, freqs_cis: Tensor, eps: float, grad: Tensor
) -> tuple[Tensor | None, Tensor | None]:
    """Of a weight `[H, D]`, which no model trains: that of the portable form, computed anew."""
    x, weight = x.detach().requires_grad_(), weight.detach().requires_grad_()
    with torch.enable_grad():
        out = rotation.norm_rope_store(x, weight, freqs_cis, eps=eps)
    grad_x, grad_weight = torch.autograd.grad(out, [x, weight], grad)
    return grad_x, grad_weight
