"""Attention over pages: few queries a sequence are decoded, split over keys; many are attended tile by tile."""

from torch import Tensor

from minim3.kernels.device_plan import DevicePlan
from minim3.kernels.portable.plan import PagedPlan
from minim3.kernels.sequences import Lengths
from minim3.kernels.triton.decode import decode
from minim3.kernels.triton.layout import paged_layout
from minim3.kernels.triton.prefill import forward

FEW_TOKENS = 16
"""Up to so many queries a sequence, on average, are decoded one by one."""

_DENSE_KEYS = 64
"""Keys that dense attention takes at once."""


def block_sparse_attention_paged(
    q: Tensor, k_pages: Tensor, v_pages: Tensor, page_table: Tensor, lengths_k: Lengths, block_indices: Tensor,
    cu_seqlens_q: Lengths, *, block_size: int, scale: float | None = None, plan: PagedPlan | DevicePlan | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """See the reference. Lengths on the device are taken as they are, unread by the host."""
    return _paged(q, k_pages, v_pages, page_table, lengths_k, block_indices, cu_seqlens_q, block_size, scale, plan)


def paged_attention(
    q: Tensor, k_pages: Tensor, v_pages: Tensor, page_table: Tensor, lengths_k: Lengths, cu_seqlens_q: Lengths, *,
    scale: float | None = None, plan: PagedPlan | DevicePlan | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """See the reference. Lengths on the device are taken as they are, unread by the host."""
    return _paged(q, k_pages, v_pages, page_table, lengths_k, None, cu_seqlens_q, _DENSE_KEYS, scale, plan)


def _paged(
    q: Tensor, k_pages: Tensor, v_pages: Tensor, page_table: Tensor, lengths_k: Lengths, block_indices: Tensor | None,
    cu_seqlens_q: Lengths, block_size: int, scale: float | None, plan: PagedPlan | DevicePlan | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    layout = paged_layout(page_table, lengths_k, cu_seqlens_q, k_pages.shape[-2], q.shape[0], plan)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    q, k_pages, v_pages = q.detach(), k_pages.detach(), v_pages.detach()
    if q.shape[0] <= FEW_TOKENS * page_table.shape[0]:
        return decode(q, k_pages, v_pages, page_table, block_indices, layout, block_size=block_size, scale=scale)
    return forward(
        q, k_pages, v_pages, block_indices, layout, page_table=page_table, block_size=block_size, scale=scale
    )
