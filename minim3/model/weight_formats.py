"""Weight matrices in fewer bits than fp32, and their products: bf16, int8, 4-bit groups, MXFP8.

A matrix is `[rows, columns]`, as the weight of `nn.Linear`; x is `[M, columns]`. Rows are quantized one by one, so
quantizing several matrices and joining them gives what quantizing the joined matrix does.

bf16   the upper half of an fp32, rounded to nearest; weights that come in bf16 lose nothing, products are in fp32
int8   w = code * scale, one scale a row, code -127..127 (round to nearest, no clipping)
int4   w = (code - 8) * scale + zero, scale and zero for each group of `group_size` columns, code 0..15, from the
       smallest to the largest weight of the group
mxfp8  e4m3 values in blocks of 32 columns with an e8m0 scale: `minim3.checkpoint.mxfp8`

Scales of int8 and int4 are bf16 and are rounded before the codes are chosen, so that their rounding is made up for.
Where C runs, products are there (`minim3.model.native_matrices`), in fp32. Here are those by torch: a few rows of x go
through its packed products (bf16 in, bf16 out, fp32 inside); many rows pay for a dequantized tile at a time and a plain
product, in bf16 where the processor has bf16 arithmetic, else in fp32.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import ClassVar, NamedTuple, Protocol, Self

import torch
from torch import Tensor
from torch.nn import functional as F

from minim3.checkpoint.mxfp8 import SCALE_BIAS, dequantize_mxfp8, num_scales, power_of_two, quantize_mxfp8, scale_blocks

FORMATS = ("bf16", "int8", "int4", "mxfp8")
GROUP_SIZES = (32, 64, 128, 256)
_COLUMNS = 16  # the int8 product reads columns in runs of it, past the end of a row that is not a multiple
_ROWS = 64  # the int4 product packs rows in blocks of it

_INT8_ROWS_OF_X = 16
"""Up to so many rows of x the packed int8 product is quicker than dequantizing tiles. Measured: see docs/weights.md."""
_INT4_ROWS_OF_X = 64
_TILE_ELEMENTS = 1 << 20
"""Weights dequantized at a time: 2 MiB in bf16, so that the product finds them in a cache."""
_FP32_TILE_ELEMENTS = 1 << 18
"""The same where tiles are in fp32: bf16, and MXFP8 which takes several passes."""
_CHUNK_ELEMENTS = 1 << 22
"""Weights quantized at a time: the fp32 temporaries of a head of many rows stay small."""


BareProduct = Callable[[Tensor], Tensor]
"""Rows of x in bf16 -> rows of the product in bf16, with no check and nothing around torch's own operator."""


class WeightMatrix(Protocol):
    """What the formats share. `columns` are those of x, `num_rows` those of the product."""

    columns: int
    format: ClassVar[str]

    @property
    def num_rows(self) -> int: ...

    def prepare(self, x: Tensor) -> Tensor:
        """x as `product` takes it: cast, and padded to the columns that are stored."""

    def product(self, x: Tensor) -> Tensor:
        """Prepared `[M, columns]` -> `[M, num_rows]`, in the dtype of the prepared x."""

    def bare(self) -> BareProduct | None:
        """The packed product for a few rows of x; None where there is none, or rows or columns are padded."""

    def dequantize(self) -> Tensor:
        """The weights in fp32, `[num_rows, columns]`: a copy."""

    def num_bytes(self) -> int: ...

    @classmethod
    def join(cls, matrices: Sequence[Self]) -> tuple[Self, list[Self]]:
        """The rows of all of them as one matrix, and each of them again as a view of it."""


@dataclass(eq=False)
class _ScaledRows:
    """Codes and scales with as many rows as the matrix."""

    codes: Tensor
    scales: Tensor
    columns: int

    @property
    def num_rows(self) -> int:
        return self.codes.shape[0]

    def num_bytes(self) -> int:
        return self.codes.nbytes + self.scales.nbytes

    @classmethod
    def join(cls, matrices: Sequence[Self]) -> tuple[Self, list[Self]]:
        codes, scales = torch.cat([m.codes for m in matrices]), torch.cat([m.scales for m in matrices])
        sizes, columns = [m.num_rows for m in matrices], matrices[0].columns
        views = zip(codes.split(sizes), scales.split(sizes), strict=True)
        return cls(codes, scales, columns), [cls(*view, columns) for view in views]


@dataclass(eq=False)
class Bf16Matrix:
    """values: bf16 `[rows, columns]`."""

    values: Tensor
    columns: int
    format: ClassVar[str] = "bf16"

    @classmethod
    def quantize(cls, weight: Tensor) -> Self:
        """Of a floating `[rows, columns]`, copied. `ValueError` for NaN and infinity, also where rounding makes it."""
        values = weight.to(torch.bfloat16, copy=True, memory_format=torch.contiguous_format)
        for rows in _chunks(values):
            _finite(values[rows], cls.format)
        return cls(values, weight.shape[1])

    @property
    def num_rows(self) -> int:
        return self.values.shape[0]

    def prepare(self, x: Tensor) -> Tensor:
        return x

    def product(self, x: Tensor) -> Tensor:
        return _in_dtype_of(x, self.num_rows, lambda rows: self.values[rows])

    def bare(self) -> BareProduct | None:
        return None

    def dequantize(self) -> Tensor:
        return self.values.float()

    def num_bytes(self) -> int:
        return self.values.nbytes

    @classmethod
    def join(cls, matrices: Sequence[Self]) -> tuple[Self, list[Self]]:
        joint = torch.cat([m.values for m in matrices])
        views, columns = joint.split([m.num_rows for m in matrices]), matrices[0].columns
        return cls(joint, columns), [cls(view, columns) for view in views]


@dataclass(eq=False)
class Int8Matrix(_ScaledRows):
    """codes: int8 `[rows, columns padded]`; scales: bf16 `[rows]`."""

    format: ClassVar[str] = "int8"

    @classmethod
    def quantize(cls, weight: Tensor) -> Self:
        """Of a floating `[rows, columns]`. `ValueError` for NaN and infinity."""
        padded = -(-weight.shape[1] // _COLUMNS) * _COLUMNS
        codes = weight.new_zeros(weight.shape[0], padded, dtype=torch.int8)
        scales = weight.new_empty(weight.shape[0], dtype=torch.bfloat16)
        for rows in _chunks(weight):
            values = _finite(weight[rows], cls.format)
            scale = (values.abs().amax(1) / 127).bfloat16()
            scale[scale == 0] = 1.0
            scales[rows] = scale
            codes[rows, : weight.shape[1]] = (values / scale.float().unsqueeze(1)).round_().clamp_(-127, 127)
        return cls(codes, scales, weight.shape[1])

    def prepare(self, x: Tensor) -> Tensor:
        return _padded(x.bfloat16(), self.codes.shape[1])

    def product(self, x: Tensor) -> Tensor:
        if x.shape[0] <= _INT8_ROWS_OF_X:
            return torch.ops.aten._weight_int8pack_mm(x, self.codes, self.scales)
        # Codes are exact in bf16: the scale is applied to the product.
        return _tiled(x, self.num_rows, lambda rows, dtype: self.codes[rows].to(dtype).t()).mul_(self.scales)

    def bare(self) -> BareProduct | None:
        codes, scales = self.codes, self.scales
        return None if codes.shape[1] != self.columns else lambda x: torch._weight_int8pack_mm(x, codes, scales)

    def dequantize(self) -> Tensor:
        return self.codes[:, : self.columns].float().mul_(self.scales.float().unsqueeze(1))


@dataclass(eq=False)
class Int4Matrix:
    """codes: two a byte, uint8 `[rows padded, columns padded / 2]` in the order of torch's product; scales_and_zeros:
    bf16 `[groups, rows padded, 2]`; spans: where among the padded rows the rows are.
    """

    codes: Tensor
    scales_and_zeros: Tensor
    columns: int
    spans: tuple[tuple[int, int], ...]
    format: ClassVar[str] = "int4"

    @classmethod
    def quantize(cls, weight: Tensor, group_size: int = 32) -> Self:
        """Of a floating `[rows, columns]`. `ValueError` for NaN and infinity, and for a group size torch has not."""
        if group_size not in GROUP_SIZES:
            raise ValueError(f"group_size is {group_size}; torch's 4-bit product has {GROUP_SIZES}")
        num_rows, columns = weight.shape
        num_groups = -(-columns // group_size)
        padding = (0, num_groups * group_size - columns, 0, -num_rows % _ROWS)
        padded_rows = num_rows + padding[3]
        codes = weight.new_empty(padded_rows, num_groups * group_size // 2, dtype=torch.uint8)
        factors = weight.new_empty(num_groups, padded_rows, 2, dtype=torch.bfloat16)
        for rows in _chunks(weight):
            values = _finite(weight[rows], cls.format)
            last = rows.stop >= num_rows
            values = F.pad(values, (*padding[:3], padding[3] if last else 0))
            groups = values.unflatten(1, (num_groups, group_size))
            low, high = groups.aminmax(dim=-1)
            scale = ((high - low) / 15).bfloat16()
            scale[scale == 0] = 1.0
            zero = (low + 8 * scale.float()).bfloat16()
            # A group of equal weights is its zero, with a scale that does not matter.
            zero = torch.where(low == high, low.bfloat16(), zero)
            chosen = (groups - zero.float().unsqueeze(-1)).div_(scale.float().unsqueeze(-1))
            chosen = chosen.round_().add_(8).clamp_(0, 15).to(torch.int32).flatten(1)
            place = slice(rows.start, rows.start + values.shape[0])
            codes[place] = torch.ops.aten._convert_weight_to_int4pack_for_cpu(chosen, 1)
            factors[:, place, 0], factors[:, place, 1] = scale.t(), zero.t()
        return cls(codes, factors, columns, ((0, num_rows),))

    @property
    def group_size(self) -> int:
        return 2 * self.codes.shape[1] // self.scales_and_zeros.shape[0]

    @property
    def num_rows(self) -> int:
        return sum(stop - start for start, stop in self.spans)

    def prepare(self, x: Tensor) -> Tensor:
        return _padded(x.bfloat16(), 2 * self.codes.shape[1])

    def product(self, x: Tensor) -> Tensor:
        if x.shape[0] <= _INT4_ROWS_OF_X or int4_layout() is None:
            # What was split off a joint matrix keeps its factors between those of the others.
            factors = self.scales_and_zeros.contiguous()
            y = torch.ops.aten._weight_int4pack_mm_for_cpu(x, self.codes, self.group_size, factors)
        else:
            y = _tiled(x, self.codes.shape[0], self._transposed)
        return self.unpad(y)

    def bare(self) -> BareProduct | None:
        if 2 * self.codes.shape[1] != self.columns or self.codes.shape[0] != self.num_rows:
            return None
        codes, group_size, factors = self.codes, self.group_size, self.scales_and_zeros.contiguous()
        return lambda x: torch._weight_int4pack_mm_for_cpu(x, codes, group_size, factors)

    def dequantize(self) -> Tensor:
        if int4_layout() is None:
            raise ValueError("the order in which this torch packs 4-bit weights on this processor is not known")
        weight = self._transposed(slice(0, self.codes.shape[0]), torch.float32)
        return self.unpad(weight[: self.columns]).t().contiguous()

    def num_bytes(self) -> int:
        return self.codes.nbytes + self.scales_and_zeros.nbytes

    @classmethod
    def join(cls, matrices: Sequence[Self]) -> tuple[Self, list[Self]]:
        codes = torch.cat([m.codes for m in matrices])
        factors = torch.cat([m.scales_and_zeros for m in matrices], dim=1)
        sizes, columns = [m.codes.shape[0] for m in matrices], matrices[0].columns
        spans, first = [], 0
        for m, size in zip(matrices, sizes, strict=True):
            spans += [(first + start, first + stop) for start, stop in m.spans]
            first += size
        parts = zip(codes.split(sizes), factors.split(sizes, dim=1), matrices, strict=True)
        views = [cls(part, factor, columns, m.spans) for part, factor, m in parts]
        return cls(codes, factors, columns, _merged(spans)), views

    def unpad(self, y: Tensor) -> Tensor:
        """Of a product with all rows, `[M, rows padded]`, the columns of rows of the matrix: `[M, rows]`."""
        if len(self.spans) == 1:
            ((start, stop),) = self.spans
            return y if stop - start == y.shape[1] else y[:, start:stop]
        return torch.cat([y[:, start:stop] for start, stop in self.spans], dim=1)

    def _transposed(self, rows: slice, dtype: torch.dtype) -> Tensor:
        """The weights of whole blocks of rows, rounded to `dtype` once, as `[columns padded, rows]`."""
        layout = int4_layout()
        assert layout is not None
        codes = _unpack_int4(self.codes[rows], *layout).sub_(8).unflatten(0, (-1, self.group_size)).to(dtype)
        # Scales side by side, and zeros: a product with every second number of a row is several times slower.
        scale, zero = self.scales_and_zeros[:, rows].to(dtype).permute(2, 0, 1).contiguous().unsqueeze(2)
        return torch.addcmul(zero, codes, scale).flatten(0, 1)


@dataclass(eq=False)
class MXFP8Matrix(_ScaledRows):
    """codes: e4m3 `[rows, columns]`; scales: uint8 exponents `[rows, ceil(columns / 32)]`, none of them 255."""

    format: ClassVar[str] = "mxfp8"

    @classmethod
    def quantize(cls, weight: Tensor) -> Self:
        """Of a floating `[rows, columns]`. `ValueError` for NaN and infinity."""
        parts = [quantize_mxfp8(weight[rows]) for rows in _chunks(weight)]
        codes, scales = (torch.cat(list(pieces)) for pieces in zip(*parts, strict=True))
        return cls(codes, scales, weight.shape[1])

    @classmethod
    def of_stored(cls, codes: Tensor, scales: Tensor) -> Self:
        """The very bits of a checkpoint, copied out of its memory map. `ValueError` for the scale 255 (NaN)."""
        scales = scales.view(torch.uint8).clone()
        dequantize_mxfp8(codes[:, :0], scales[:, :0])  # checks dtypes
        if bool((scales == 255).any()):
            where = (scales == 255).nonzero()[0].tolist()
            raise ValueError(f"MXFP8 scale at {where} is 255, which stands for NaN")
        return cls(codes.clone(), scales, codes.shape[1])

    def prepare(self, x: Tensor) -> Tensor:
        return x

    def product(self, x: Tensor) -> Tensor:
        return _in_dtype_of(x, self.num_rows, self._rows)

    def bare(self) -> BareProduct | None:
        return None

    def dequantize(self) -> Tensor:
        return self._rows(slice(0, self.num_rows))

    def _rows(self, rows: slice) -> Tensor:
        """What `dequantize_mxfp8` gives for these rows, in fp32; values are looked up, which is quicker on a CPU."""
        powers, values, pairs = _mxfp8_tables(self.codes.device)
        codes, scales = self.codes[rows], self.scales[rows]
        if codes.shape[1] % 2:
            out = values.index_select(0, codes.view(torch.uint8).flatten().int())
        else:
            out = pairs.index_select(0, codes.view(torch.uint16).flatten().int()).view(torch.float32)
        out = out.view(codes.shape)
        scale_blocks(out, powers.index_select(0, scales.flatten().int()).view(scales.shape))
        return out


@cache
def _mxfp8_tables(device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """fp32 values of the 256 scales and of the 256 codes, and those of two codes at once, a pair in an int64."""
    codes = torch.arange(256, dtype=torch.int32)
    values = codes.to(torch.uint8).view(torch.float8_e4m3fn).float()
    powers = power_of_two((codes - SCALE_BIAS).clamp_(max=SCALE_BIAS))
    # The first of two codes is the low byte of the pair, and the first half of the int64 (both are little-endian).
    pairs = torch.stack([values.repeat(256), values.repeat_interleave(256)], dim=1).view(torch.int64).flatten()
    return powers.to(device), values.to(device), pairs.to(device)


def quantize(weight: Tensor, format: str, group_size: int = 32) -> WeightMatrix:
    """A floating `[rows, columns]` in one of `FORMATS`. `ValueError` for NaN and infinity."""
    if format == "int4":
        return Int4Matrix.quantize(weight, group_size)
    kinds: dict[str, type[Bf16Matrix | Int8Matrix | MXFP8Matrix]] = {
        "bf16": Bf16Matrix, "int8": Int8Matrix, "mxfp8": MXFP8Matrix
    }  # fmt: skip
    return kinds[format].quantize(weight)


def num_bytes(format: str, num_rows: int, columns: int, group_size: int = 32) -> int:
    """What `quantize` makes of `num_rows` x `columns` takes, padding and scales included."""
    if format == "int4":
        rows, groups = -(-num_rows // _ROWS) * _ROWS, -(-columns // group_size)
        return rows * groups * (group_size // 2 + 4)
    if format == "bf16":
        return 2 * num_rows * columns
    if format == "int8":
        return num_rows * (-(-columns // _COLUMNS) * _COLUMNS + 2)
    return num_rows * (columns + num_scales(columns))


@cache
def _has_bf16_arithmetic() -> bool:
    """Whether bf16 products are quicker than fp32 ones here; where torch cannot tell, they are taken to be emulated."""
    tests = [getattr(torch.cpu, name, None) for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported")]
    return any(test is not None and test() for test in tests)


class Int4Layout(NamedTuple):
    """How torch packs rows: `block` rows a block, two of them a byte, neighbours or half a block apart."""

    block: int
    neighbours: bool


@cache
def int4_layout() -> Int4Layout | None:
    """The layout here, which depends on the processor, found by packing numbers; None for one not known."""
    codes = torch.arange(2 * _ROWS * 6, dtype=torch.int32).mul_(7).bitwise_and_(15).view(2 * _ROWS, 6)
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1)
    for layout in (Int4Layout(64, False), Int4Layout(32, False), Int4Layout(32, True)):
        if torch.equal(_unpack_int4(packed, *layout).t().int(), codes):
            return layout
    return None


def _unpack_int4(packed: Tensor, block: int, neighbours: bool) -> Tensor:
    """int8 codes 0..15, `[columns, rows]`."""
    packed = packed.view(-1, 2 * packed.shape[1], block // 2).transpose(0, 1).contiguous()
    codes = torch.stack([packed & 15, packed >> 4], dim=-1 if neighbours else -2)
    return codes.flatten(1).view(torch.int8)


def _tiled(x: Tensor, num_rows: int, transposed: Callable[[slice, torch.dtype], Tensor]) -> Tensor:
    """`x @ weight.t()`; `transposed(rows, dtype)` gives a few rows of the weight at a time, `[columns, rows]`."""
    dtype = x.dtype if _has_bf16_arithmetic() else torch.float32
    wide = x.to(dtype)
    step = max(1, _TILE_ELEMENTS // (x.shape[1] * _ROWS)) * _ROWS
    out = x.new_empty(x.shape[0], num_rows)
    for start in range(0, num_rows, step):
        rows = slice(start, min(start + step, num_rows))
        out[:, rows] = torch.mm(wide, transposed(rows, dtype))
    return out


def _in_dtype_of(x: Tensor, num_rows: int, some: Callable[[slice], Tensor]) -> Tensor:
    """`x @ weight.t()`; `some(rows)` gives a few rows of the weight at a time, which are taken to the dtype of x."""
    step = max(1, _FP32_TILE_ELEMENTS // x.shape[1])
    if num_rows <= step:
        return F.linear(x, some(slice(0, num_rows)).to(x.dtype))
    out = x.new_empty(x.shape[0], num_rows)
    for start in range(0, num_rows, step):
        rows = slice(start, min(start + step, num_rows))
        out[:, rows] = F.linear(x, some(rows).to(x.dtype))
    return out


def _chunks(weight: Tensor) -> list[slice]:
    """Rows of a few at a time, whole blocks of them."""
    step = max(1, _CHUNK_ELEMENTS // (weight.shape[1] * _ROWS)) * _ROWS
    return [slice(start, min(start + step, weight.shape[0])) for start in range(0, weight.shape[0], step)]


def _finite(weight: Tensor, format: str) -> Tensor:
    values = weight.float()
    if not bool(torch.isfinite(values).all()):
        raise ValueError(f"{format} cannot hold NaN or infinity; the tensor has a value that is not finite")
    return values


def _padded(x: Tensor, columns: int) -> Tensor:
    return x if x.shape[-1] == columns else F.pad(x, (0, columns - x.shape[-1]))


def _merged(spans: Sequence[tuple[int, int]]) -> tuple[tuple[int, int], ...]:
    """Spans that touch as one."""
    merged: list[tuple[int, int]] = []
    for start, stop in spans:
        if merged and merged[-1][1] == start:
            merged[-1] = merged[-1][0], stop
        else:
            merged.append((start, stop))
    return tuple(merged)
