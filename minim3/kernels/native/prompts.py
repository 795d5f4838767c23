"""Selection and attention of prompts, with what they do to whole blocks of keys in C (`blocks.c`).

The rest is that of the portable kernels, and so is everything that has no form in C.
"""

from ctypes import byref, c_double, c_int64, c_void_p
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _get_current_dispatch_mode

from minim3.kernels import native
from minim3.kernels.portable import alignment, attention, paged, select
from minim3.kernels.portable.products import BlockKernels, Rows


class BlockMaxima:
    """The keys of one sequence, fp32 `[S, D]`, laid out so that vectors run along the keys of a block."""

    def __init__(self, keys: Tensor, block_size: int) -> None:
        self.block_size, blocks = block_size, keys.shape[0] // block_size
        whole = keys[: blocks * block_size].view(blocks, block_size, -1)
        self.keys = whole.transpose(1, 2).contiguous()

    @staticmethod
    def takes(block_size: int) -> bool:
        return _takes(block_size)

    def into(self, rows: Tensor, blocks: int, scores: Tensor) -> None:
        """scores `[R, B]`, its first `blocks` columns: the largest products of `rows` `[R, D]` with each block."""
        rows = rows.contiguous()
        if rows.shape[1] != self.keys.shape[1]:
            raise ValueError(f"index_q has heads of {rows.shape[1]}, index_k of {self.keys.shape[1]}: they must agree")
        assert scores.stride(1) == 1, scores.stride()
        assert blocks <= self.keys.shape[0], (blocks, self.keys.shape)
        _run(
            "minim3_block_maxima", c_void_p(rows.data_ptr()), c_int64(rows.shape[0]), c_int64(rows.shape[1]),
            c_void_p(self.keys.data_ptr()), c_int64(blocks), c_int64(self.block_size), c_void_p(scores.data_ptr()),
            c_int64(scores.stride(0)),
        )  # fmt: skip


def add_block(
    queries: Tensor, sums: Tensor, rows: Rows, keys: Tensor, values: Tensor, shift: int | None = None
) -> bool:
    """`BlockKernels.add`."""
    size, group, dim = keys.shape[0], queries.shape[1], values.shape[1]
    if not _has_form(size, dim, shift) or queries.dtype != torch.float32:
        return False
    if keys.stride(1) != 1 or values.stride(1) != 1:
        return False
    assert queries.is_contiguous()
    assert sums.is_contiguous()
    assert keys.shape[1] == queries.shape[2] == dim + 1, (keys.shape, queries.shape, dim)
    _run(
        "minim3_add_block", c_void_p(queries.data_ptr()), c_void_p(sums.data_ptr()), *_listed(rows), c_int64(group),
        c_int64(dim), c_void_p(keys.data_ptr()), c_int64(keys.stride(0)), c_void_p(values.data_ptr()),
        c_int64(values.stride(0)),
        c_int64(size), c_int64(size if shift is None else shift),
    )  # fmt: skip
    return True


def add_gradient(
    both: Tensor, sums: Tensor, rows: Rows, keys: Tensor, values: Tensor, grad_k: Tensor, grad_v: Tensor,
    shift: int | None = None,
) -> bool:  # fmt: skip
    """`BlockKernels.add_gradient`."""
    size, group, dim = keys.shape[0], both.shape[1], grad_k.shape[1]
    rows_lie = keys.stride() == values.stride() == (dim + 1, 1) and grad_k.stride() == grad_v.stride() == (dim, 1)
    if not _has_form(size, dim, shift) or both.dtype != torch.float32 or not rows_lie:
        return False
    assert both.is_contiguous()
    assert sums.is_contiguous()
    assert both.shape[2:] == (2, dim + 1), (both.shape, dim)
    _run(
        "minim3_add_block_gradient", c_void_p(both.data_ptr()), c_void_p(sums.data_ptr()), *_listed(rows),
        c_int64(group), c_int64(dim), c_void_p(keys.data_ptr()), c_void_p(values.data_ptr()), c_int64(dim + 1),
        c_void_p(grad_k.data_ptr()),
        c_void_p(grad_v.data_ptr()), c_int64(dim), c_int64(size), c_int64(size if shift is None else shift),
    )  # fmt: skip
    return True


def add_alignment(
    queries: Tensor, index: Tensor, sums: Tensor, rows: Rows, keys: Tensor, index_keys: Tensor, grad_keys: Tensor,
    shift: int | None = None,
) -> float:  # fmt: skip
    """`BlockKernels.add_alignment`."""
    size, group, dim, index_dim = keys.shape[0], queries.shape[1], keys.shape[1] - 1, index_keys.shape[1] - 1
    assert all(x.is_contiguous() for x in (queries, index, sums, keys, index_keys, grad_keys))
    assert queries.shape[2] == dim + 1, (queries.shape, dim)
    assert index.shape[1:] == (1, index_dim + 1), (index.shape, index_dim)
    loss = c_double(0.0)
    _run(
        "minim3_add_block_alignment", c_void_p(queries.data_ptr()), c_void_p(index.data_ptr()),
        c_void_p(sums.data_ptr()), *_listed(rows), c_int64(group), c_int64(dim), c_int64(index_dim),
        c_void_p(keys.data_ptr()), c_void_p(index_keys.data_ptr()), c_void_p(grad_keys.data_ptr()), c_int64(size),
        c_int64(size if shift is None else shift), byref(loss),
    )  # fmt: skip
    return loss.value


def _run(function: str, *args: Any) -> None:
    if getattr(native.library(), function)(*args):
        raise MemoryError(f"{function}: there is no memory to lay out a block of keys")


def _any_keys(dim: int, dtype: torch.dtype) -> bool:
    return dtype == torch.float32 and native.tiles() and _takes(dim)


BLOCKS = BlockKernels(add_block, add_gradient, add_alignment, _any_keys)


def _has_form(size: int, dim: int, shift: int | None) -> bool:
    if native.tiles():
        return _takes(dim)
    assert shift is None, shift
    return _takes(size, dim)


def _listed(rows: Rows) -> tuple[Any, ...]:
    """int64 numbers of rows or null, the first, and how many there are."""
    if isinstance(rows, slice):
        return c_void_p(None), c_int64(rows.start), c_int64(rows.stop - rows.start)
    assert rows.is_contiguous()
    return c_void_p(rows.data_ptr()), c_int64(0), c_int64(rows.shape[0])


def _takes(*sizes: int) -> bool:
    # A counter of operations, say, sees those of torch alone.
    return all(size % native.lanes() == 0 for size in sizes) and _get_current_dispatch_mode() is None


def select_blocks(*args: Any, **kwargs: Any) -> Tensor:
    """See the reference."""
    return select.select_blocks(*args, **kwargs, maxima=BlockMaxima)


def select_blocks_paged(*args: Any, **kwargs: Any) -> Tensor:
    """See the reference."""
    return paged.select_blocks_paged(*args, **kwargs, maxima=BlockMaxima)


def block_sparse_attention(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
    """See the reference."""
    return attention.block_sparse_attention(*args, **kwargs, blocks=BLOCKS)


def block_sparse_attention_paged(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
    """See the reference."""
    return paged.block_sparse_attention_paged(*args, **kwargs, blocks=BLOCKS)


def varlen_attention(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
    """See the reference."""
    return attention.varlen_attention(*args, **kwargs, blocks=BLOCKS)


def paged_attention(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
    """See the reference."""
    return paged.paged_attention(*args, **kwargs, blocks=BLOCKS)


def indexer_kl(*args: Any, **kwargs: Any) -> Tensor:
    """See the reference."""
    return alignment.indexer_kl(*args, **kwargs, blocks=BLOCKS)
