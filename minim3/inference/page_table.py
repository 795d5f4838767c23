"""The page table of a step, kept on the device from one step to the next."""

from collections.abc import Sequence

import torch
from torch import Tensor

from minim3.inference.request import Request


class PageTable:
    """The page table of the last step: a step of the same requests only writes what is new.

    shape: of a table that stays where it is, for no more requests and pages than that; None: as large as needed.
    """

    def __init__(self, device: torch.device, shape: tuple[int, int] | None = None) -> None:
        self.device = device
        self.shape = shape
        self._page_lists: list[list[int]] = []
        self._counts: list[int] = []
        with torch.inference_mode(False):  # written to in and outside of inference mode
            self._table = torch.zeros(shape or (0, 0), dtype=torch.int64, device=device)

    def rows(self, requests: Sequence[Request]) -> Tensor:
        """int64 `[N, max_pages]`, or of the fixed shape; entries past the pages of a request mean nothing."""
        width = max(len(request.pages) for request in requests)
        same = len(requests) == len(self._page_lists) and all(
            # A list is appended to while its request runs, and replaced when pages are taken away.
            request.pages is known
            for request, known in zip(requests, self._page_lists)
        )
        if not same or width > self._table.shape[1]:
            self._rebuild(requests, width)
        else:
            for row, request in enumerate(requests):
                for place in range(self._counts[row], len(request.pages)):
                    self._table[row, place] = request.pages[place]
                    self._counts[row] = place + 1
        return self._table[:, :width] if self.shape is None else self._table

    def _rebuild(self, requests: Sequence[Request], width: int) -> None:
        width = width + max(8, width // 4) if self.shape is None else self.shape[1]  # room to grow without another
        with torch.inference_mode(False):
            table = torch.zeros(self.shape or (len(requests), width), dtype=torch.int64)
            for row, request in zip(table, requests, strict=self.shape is None):
                row[: len(request.pages)] = torch.tensor(request.pages, dtype=torch.int64)
            if self.shape is None:
                self._table = table.to(self.device)
            else:
                self._table.copy_(table)
        self._page_lists = [request.pages for request in requests]
        self._counts = [len(request.pages) for request in requests]
