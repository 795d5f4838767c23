"""What the paged kernels of all layers of one step share: who asks for what, and where it lies. Made once a step.

A cache row is the largest run of tokens that lies in one page and in one block: all of it where page and block are
equal, gcd(page, block) tokens otherwise.
"""

import math
from collections.abc import Callable, Hashable
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

from minim3.kernels.sequences import Lengths, as_ints


class Request(NamedTuple):
    """One sequence: rows `q_start`... of the packed queries, its `length` in tokens with the new ones."""

    sequence: int
    q_start: int
    num_queries: int
    length: int

    @property
    def rows(self) -> slice:
        return slice(self.q_start, self.q_start + self.num_queries)

    def position(self, query: int) -> int:
        return self.length - self.num_queries + query


class CacheRows(NamedTuple):
    """How logical blocks map to cache rows of `tokens` tokens: `per_block` rows a block, `per_page` a page and head."""

    tokens: int
    per_block: int
    per_page: int
    heads: int

    @classmethod
    def of(cls, pages: Tensor, block_size: int) -> "CacheRows":
        page_size = pages.shape[-2]
        tokens = math.gcd(page_size, block_size)
        heads = pages.shape[1] if pages.dim() == 4 else 1
        return cls(tokens, block_size // tokens, page_size // tokens, heads)

    def view(self, pages: Tensor) -> Tensor:
        """Pages as `[rows, tokens * D]`."""
        if not pages.is_contiguous():
            raise ValueError(f"cache pages of shape {tuple(pages.shape)} are not contiguous; allocate them whole")
        return pages.detach().view(-1, self.tokens * pages.shape[-1])

    def physical(self, table: Tensor, rows: Tensor) -> Tensor:
        """Physical row of head 0 for logical `rows` of the sequences; int64, `rows` may be any shape.

        `table` `[max_pages]` of one sequence, or `[N, max_pages]` with `rows` `[N, ...]`. Rows past the end of a
        sequence read some other row (a table is filled up with -1 or any page): their content must be masked.
        """
        page = rows if self.per_page == 1 else rows // self.per_page
        page = page.clamp(0, table.shape[-1] - 1)
        if table.dim() == 1:
            page = table.index_select(0, page.reshape(-1)).view(page.shape)
        else:
            page = table.gather(1, page.flatten(1)).clamp_(min=0).view(page.shape)
        first = page.long() * (self.heads * self.per_page)
        return first if self.per_page == 1 else first + rows % self.per_page

    def of_blocks(self, blocks: Tensor) -> Tensor:
        """Logical rows of `blocks` `[..., K]`, in order: `[..., K * per_block]`."""
        if self.per_block == 1:
            return blocks
        within = torch.arange(self.per_block, device=blocks.device)
        return (blocks.unsqueeze(-1) * self.per_block + within).flatten(-2)

    def head_starts(self, device: torch.device) -> Tensor:
        return torch.arange(self.heads, device=device) * self.per_page


class PagedPlan:
    """One step: `lengths_k` tokens of each sequence, the new ones included, in the pages `page_table` `[N, max_pages]`.

    A plan may be handed to every paged kernel called with the same arguments, whatever the layer. It also owns the
    memory that kernels gather keys and values into.

    Raises:
        ValueError: lengths and pages do not fit together.
    """

    def __init__(self, page_table: Tensor, lengths_k: Lengths, cu_seqlens_q: Lengths, page_size: int) -> None:
        self.page_table = page_table
        self.page_size = page_size
        self.requests = _requests(cu_seqlens_q, lengths_k, page_table, page_size)
        self._made: dict[Hashable, Any] = {}
        self._scratch: dict[torch.dtype, Tensor] = {}

    @cached_property
    def pages(self) -> list[list[int]]:
        """The page table as plain integers."""
        return self.page_table.tolist()

    @cached_property
    def only_query(self) -> Request | None:
        """The one sequence of a step that decodes one token of it."""
        return self.requests[0] if len(self.requests) == 1 == self.requests[0].num_queries else None

    def once(self, key: Hashable, make: Callable[[], Any]) -> Any:
        """What `make` returned when it was first asked for under this key."""
        if key not in self._made:
            self._made[key] = make()
        return self._made[key]

    def first_page(self, r: Request) -> int | None:
        """The first page of a sequence whose pages follow each other, as in a cache that is not fragmented."""
        return self.once(("first page", r.sequence), lambda: self._first_page(r))

    def _first_page(self, r: Request) -> int | None:
        pages = self.pages[r.sequence][: -(-r.length // self.page_size)]
        return pages[0] if pages == list(range(pages[0], pages[0] + len(pages))) else None

    def rows(self, r: Request, cache: CacheRows) -> Tensor:
        """Physical row of every logical row of a sequence, a KV head a line: int64 `[heads, rows]`."""
        return self.once(("rows", r.sequence, cache), lambda: self._rows(r, cache))

    def _rows(self, r: Request, cache: CacheRows) -> Tensor:
        table = self.page_table[r.sequence]
        found = cache.physical(table, torch.arange(-(-r.length // cache.tokens), device=table.device))
        return found + cache.head_starts(table.device)[:, None]

    def scratch(self, numel: int, like: Tensor) -> Tensor:
        """Uninitialised `[numel]` that the next call may hand out again: fresh memory costs more than filling it."""
        kept = self._scratch.get(like.dtype)
        if kept is None or kept.numel() < numel:
            kept = self._scratch[like.dtype] = like.new_empty(numel)
        return kept[:numel]


def _requests(cu_seqlens_q: Lengths, lengths_k: Lengths, page_table: Tensor, page_size: int) -> list[Request]:
    cu, lengths = as_ints(cu_seqlens_q), as_ints(lengths_k)
    if len(cu) != len(lengths) + 1 or page_table.shape[0] != len(lengths):
        raise ValueError(
            f"cu_seqlens_q has {len(cu)} entries, lengths_k {len(lengths)} and page_table {page_table.shape[0]} rows; "
            "N sequences need N + 1, N and N"
        )
    requests = []
    for n, length in enumerate(lengths):
        count = cu[n + 1] - cu[n]
        if count > length or length > page_table.shape[1] * page_size:
            raise ValueError(
                f"sequence {n} has {count} queries, {length} tokens and room for {page_table.shape[1] * page_size} in "
                "its pages; the new tokens count in its length and every token needs a page"
            )
        if count:
            requests.append(Request(n, cu[n], count, length))
    return requests
