"""Block selection whose block scores are computed in C: products and their maximum in one pass, in registers."""

from ctypes import c_int64, c_void_p
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import _get_current_dispatch_mode

from minim3.kernels import native
from minim3.kernels.portable import paged, select


class BlockMaxima:
    """The keys of one sequence, fp32 `[S, D]`, laid out so that vectors run along the keys of a block."""

    def __init__(self, keys: Tensor, block_size: int) -> None:
        self.block_size, blocks = block_size, keys.shape[0] // block_size
        whole = keys[: blocks * block_size].view(blocks, block_size, -1)
        self.keys = whole.transpose(1, 2).contiguous()

    @staticmethod
    def takes(block_size: int) -> bool:
        # A counter of operations, say, sees those of torch alone.
        return block_size % native.lanes() == 0 and _get_current_dispatch_mode() is None

    def into(self, rows: Tensor, blocks: int, scores: Tensor) -> None:
        """scores `[R, B]`, its first `blocks` columns: the largest products of `rows` `[R, D]` with each block."""
        rows = rows.contiguous()
        if rows.shape[1] != self.keys.shape[1]:
            raise ValueError(f"index_q has heads of {rows.shape[1]}, index_k of {self.keys.shape[1]}: they must agree")
        assert scores.stride(1) == 1, scores.stride()
        assert blocks <= self.keys.shape[0], (blocks, self.keys.shape)
        native.library().minim3_block_maxima(
            c_void_p(rows.data_ptr()), c_int64(rows.shape[0]), c_int64(rows.shape[1]), c_void_p(self.keys.data_ptr()),
            c_int64(blocks), c_int64(self.block_size), c_void_p(scores.data_ptr()), c_int64(scores.stride(0)),
        )  # fmt: skip


def select_blocks(*args: Any, **kwargs: Any) -> Tensor:
    """See the reference."""
    return select.select_blocks(*args, **kwargs, maxima=BlockMaxima)


def select_blocks_paged(*args: Any, **kwargs: Any) -> Tensor:
    """See the reference."""
    return paged.select_blocks_paged(*args, **kwargs, maxima=BlockMaxima)
