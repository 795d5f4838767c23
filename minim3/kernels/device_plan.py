"""What the paged kernels of all layers of one step share where only the device knows the lengths."""

from collections.abc import Callable, Hashable
from typing import Any

from torch import Tensor


class DevicePlan:
    """One step of `lengths_k` tokens of each sequence, in the pages `page_table` `[N, max_pages]`; unread by the host.

    For steps held by a CUDA graph: make one inside of what is captured and hand it to every paged op of the step, with
    the same lengths. Tables are then made once a step, on the device, each time the graph runs. The lengths cannot be
    checked. Taken by the Triton kernels alone.
    """

    def __init__(self, page_table: Tensor, lengths_k: Tensor, cu_seqlens_q: Tensor, page_size: int) -> None:
        self.page_table = page_table
        self.lengths_k = lengths_k
        self.cu_seqlens_q = cu_seqlens_q
        self.page_size = page_size
        self._made: dict[Hashable, Any] = {}

    def once(self, key: Hashable, make: Callable[[], Any]) -> Any:
        """What `make` returned when it was first asked for under this key."""
        made = self._made.get(key)
        if made is None:
            made = self._made[key] = make()
        return made
