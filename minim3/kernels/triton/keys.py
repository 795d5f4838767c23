"""What several kernels share: addresses of keys on the device, and how arguments are prepared for them."""

# mypy: allow-untyped-defs

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

LOG2_E = 1.4426950408889634
LN_2 = 0.6931471805599453


@triton.jit
def row_offsets(positions, stride):
    """int64 offsets of rows, whatever the type of `positions`: tables pass 2**31 elements."""
    return tl.cast(positions, tl.int64) * stride


@triton.jit
def key_offsets(
    start, within, first, last, table_row, stride_page, stride_token,
    PAGE_SIZE: tl.constexpr, PAGED: tl.constexpr, ONE_PAGE: tl.constexpr,
):  # fmt: skip
    """Where the keys `start + within` of a sequence lie, packed from row `first` on or in pages of its table: int64
    offsets of a first place and of each key from there, which stay the same from one `start` to the next.

    Keys past the `last` one read a page of the sequence: the caller masks them. ONE_PAGE: the keys lie in one page.
    """
    if PAGED:
        if ONE_PAGE:
            page = tl.load(table_row + start // PAGE_SIZE).to(tl.int64)
            return page * stride_page + row_offsets(start % PAGE_SIZE, stride_token), row_offsets(within, stride_token)
        else:
            position = start + within
            page = tl.load(table_row + tl.minimum(position, last) // PAGE_SIZE).to(tl.int64)
            return tl.cast(0, tl.int64), page * stride_page + row_offsets(position % PAGE_SIZE, stride_token)
    else:
        return row_offsets(first + start, stride_token), row_offsets(within, stride_token)


@triton.jit
def load_rows(pointer, offsets, used, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """`[rows, BLOCK_D]` at row `offsets`, zeros where not `used`."""
    channel = tl.arange(0, BLOCK_D)
    pointers = pointer + offsets[:, None] + channel[None, :]
    return tl.load(pointers, mask=used[:, None] & (channel < D)[None, :], other=0.0)


@triton.jit
def load_keys(pointer, offsets, seen, D: tl.constexpr, BLOCK_D: tl.constexpr, MASKED: tl.constexpr):
    """Keys or values `[keys, BLOCK_D]`; MASKED: what is not `seen` is not read (it may hold NaN)."""
    channel = tl.arange(0, BLOCK_D)
    pointers = pointer + offsets[:, None] + channel[None, :]
    if MASKED:
        return tl.load(pointers, mask=seen[:, None] & (channel < D)[None, :], other=0.0)
    elif D == BLOCK_D:
        return tl.load(pointers)
    else:
        return tl.load(pointers, mask=(channel < D)[None, :], other=0.0)


def power_of_two(n: int) -> int:
    """The least power of two that is not below n."""
    return 1 << max(n - 1, 0).bit_length()


def rows_contiguous(x: Tensor) -> Tensor:
    """`x` with its last dimension contiguous: views of packed projections pass as they are."""
    return x if x.stride(-1) == 1 else x.contiguous()


class Pages:
    """How kernels find keys: strides of packed keys `[S, H, D]` (or `[S, D]`), or of pages `[P, H, page, D]`."""

    def __init__(self, keys: Tensor, page_table: Tensor | None, run: int) -> None:
        """`run`: how many keys a kernel takes at once, from a multiple of it on."""
        self.paged = page_table is not None
        self.table = keys if page_table is None else page_table
        self.stride_table = 0 if page_table is None else page_table.stride(0)
        if page_table is None:
            self.stride_page, self.stride_token, self.page_size = 0, keys.stride(0), 1
            self.stride_head = keys.stride(1) if keys.dim() == 3 else 0
        else:
            self.stride_page, self.stride_token, self.page_size = keys.stride(0), keys.stride(-2), keys.shape[-2]
            self.stride_head = keys.stride(1) if keys.dim() == 4 else 0
        self.one_page = self.paged and self.page_size % run == 0

    @property
    def arguments(self) -> dict[str, Any]:
        return {
            "page_table": self.table, "stride_table": self.stride_table, "PAGE_SIZE": self.page_size,
            "stride_page": self.stride_page, "stride_token": self.stride_token, "stride_head": self.stride_head,
            "PAGED": self.paged, "ONE_PAGE": self.one_page,
        }  # fmt: skip


def stages(bytes_each: int, most: int) -> int:
    """How many loads of so many bytes are under way at once: as many as leave room in shared memory, fp32 fewer."""
    return max(1, min(most, _STAGED_BYTES // bytes_each))


_STAGED_BYTES = 128 << 10
"""Of the 163 KiB (A100) or 227 KiB (H100) a program may have."""


def precision(dtype: torch.dtype) -> str:
    """Products of fp32 are exact products: no silent tf32."""
    return "ieee" if dtype == torch.float32 else "tf32"
