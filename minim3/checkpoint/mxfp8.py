"""MXFP8: e4m3 values in blocks of 32 inputs that share one power-of-two scale.

OCP Microscaling Formats (MX) specification v1.0, section 5: element e4m3, scale e8m0 (a biased exponent, 255 is NaN).
"""

import torch
from torch import Tensor

BLOCK_SIZE = 32  # inputs (last axis) that share a scale
SCALE_BIAS = 127
SCALE_NAN = 255
E4M3_MAX = 448.0
E4M3_MAX_EXPONENT = 8  # floor(log2(448))


def num_scales(num_inputs: int) -> int:
    """Scales of a row of `num_inputs` values; the last block may be short."""
    return -(-num_inputs // BLOCK_SIZE)


def scale_blocks(values: Tensor, factors: Tensor) -> None:
    """Multiplies each block of 32 along the last axis by its factor, in place: the one temporary is the factors."""
    whole = values.shape[-1] // BLOCK_SIZE * BLOCK_SIZE
    if whole:
        values[..., :whole].unflatten(-1, (-1, BLOCK_SIZE)).mul_(factors[..., : whole // BLOCK_SIZE].unsqueeze(-1))
    if whole < values.shape[-1]:
        values[..., whole:].mul_(factors[..., whole // BLOCK_SIZE :])


def power_of_two(exponent: Tensor) -> Tensor:
    """Exactly 2**exponent in fp32 for exponents -127..127 (2**-127 is subnormal, which exp2 need not get right)."""
    return torch.ldexp(torch.full_like(exponent, 0.5, dtype=torch.float32), exponent + 1)


def dequantize_mxfp8(weight: Tensor, scale_inv: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """`weight * 2**(scale_inv - 127)` per block of 32 along the last axis.

    weight: e4m3 `[..., in]`; scale_inv: uint8 (or e8m0) `[..., ceil(in / 32)]`. Returns `[..., in]` of `dtype`,
    computed in fp32. Raises `ValueError` for other dtypes or shapes, and for the scale 255, NaN by the specification.
    """
    if weight.dtype != torch.float8_e4m3fn:
        raise ValueError(f"an MXFP8 weight is float8_e4m3fn; got {weight.dtype}")
    if scale_inv.dtype == torch.float8_e8m0fnu:
        scale_inv = scale_inv.view(torch.uint8)
    if scale_inv.dtype != torch.uint8:
        raise ValueError(f"MXFP8 scales are uint8 exponents (e8m0); got {scale_inv.dtype}")
    if weight.ndim == 0 or scale_inv.shape != (*weight.shape[:-1], num_scales(weight.shape[-1])):
        raise ValueError(
            f"MXFP8 scales of shape {list(scale_inv.shape)} do not fit a weight of shape {list(weight.shape)}: "
            f"one scale for {BLOCK_SIZE} inputs is expected"
        )
    if bool((scale_inv == SCALE_NAN).any()):
        where = (scale_inv == SCALE_NAN).nonzero()[0].tolist()
        raise ValueError(f"MXFP8 scale at {where} is {SCALE_NAN}, which stands for NaN")
    out = weight.to(torch.float32)
    scale_blocks(out, power_of_two(scale_inv.to(torch.int32) - SCALE_BIAS))
    return out.to(dtype)


def quantize_mxfp8(x: Tensor) -> tuple[Tensor, Tensor]:
    """(e4m3 weight `[..., in]`, uint8 scale `[..., ceil(in / 32)]`) of a floating `[..., in]` tensor.

    The scale's exponent is floor(log2(amax)) - 8 within each block, the values are rounded to nearest even and saturate
    at 448. Raises `ValueError` for NaN and infinity, which the format's scales cannot carry.
    """
    if x.ndim == 0 or not x.is_floating_point():
        raise ValueError(f"MXFP8 quantizes floating tensors with at least one axis; got {x.dtype} {list(x.shape)}")
    values = x.detach().to(torch.float32, copy=True)
    padded = num_scales(x.shape[-1]) * BLOCK_SIZE
    magnitudes = torch.nn.functional.pad(values, (0, padded - x.shape[-1])) if padded != x.shape[-1] else values
    low, high = magnitudes.unflatten(-1, (-1, BLOCK_SIZE)).aminmax(dim=-1)
    amax = torch.maximum(low.neg(), high)
    if not bool(torch.isfinite(amax).all()):
        raise ValueError("MXFP8 cannot hold NaN or infinity; the tensor has a value that is not finite")
    # frexp: amax = m * 2**e with 0.5 <= m < 1, so floor(log2(amax)) = e - 1. A block of zeros takes the smallest scale.
    exponent = torch.frexp(amax).exponent - 1 - E4M3_MAX_EXPONENT
    exponent = torch.where(amax == 0, -SCALE_BIAS, exponent).clamp_(-SCALE_BIAS, SCALE_BIAS)
    scale_blocks(values, power_of_two(-exponent))
    weight = values.clamp_(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)
    return weight, (exponent + SCALE_BIAS).to(torch.uint8)
