"""What the paged kernels of all layers of one step share: who asks for what, and where it lies. Made once a step.

A cache row is the largest run of tokens that lies in one page and in one block: all of it where page and block are
equal, gcd(page, block) tokens otherwise.
"""

import math
from collections.abc import Callable, Hashable, Sequence
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


class Scratch:
    """Memory that kernels gather and multiply into, kept from step to step: fresh memory costs more than filling it."""

    def __init__(self) -> None:
        self._kept: dict[tuple[str, torch.dtype], Tensor] = {}
        self._made: dict[Hashable, Any] = {}
        self.steps: dict[Hashable, Any] = {}
        """What the last step was prepared with, for the next one to go on from."""

    def take(self, name: str, numel: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Uninitialised `[numel]`, which the next call under this name may hand out again."""
        kept = self._kept.get((name, dtype))
        if kept is None or kept.numel() < numel or kept.device != device:
            room = numel if kept is None else max(numel, kept.numel() * 5 // 4)
            with torch.inference_mode(False):  # so that it can be written to in and outside of inference mode
                kept = self._kept[name, dtype] = torch.empty(room, dtype=dtype, device=device)
            self._made.clear()  # views of what it replaces, which would keep that alive
        return kept[:numel]

    def once(self, key: Hashable, make: Callable[[], Any]) -> Any:
        """What `make` returned under this key, until memory is replaced: for views of it, which take time to make."""
        made = self._made.get(key)
        if made is None:
            if len(self._made) >= 32:
                self._made.clear()
            with torch.inference_mode(False):
                made = make()
            self._made[key] = made
        return made


class PagedPlan:
    """One step: `lengths_k` tokens of each sequence, the new ones included, in the pages `page_table` `[N, max_pages]`.

    A plan may be handed to every paged kernel called with the same arguments, whatever the layer. `scratch` may serve
    one step after another.

    Raises:
        ValueError: lengths and pages do not fit together.
    """

    def __init__(
        self, page_table: Tensor, lengths_k: Lengths, cu_seqlens_q: Lengths, page_size: int,
        scratch: Scratch | None = None,
    ) -> None:  # fmt: skip
        self.page_table = page_table
        self.page_size = page_size
        self.requests = _requests(cu_seqlens_q, lengths_k, page_table, page_size)
        self.memory = Scratch() if scratch is None else scratch
        self.own_choice: Tensor | None = None
        """The last block ids that selection made: attention need not look at them to know their form."""
        self._made: dict[Hashable, Any] = {}

    def once(self, key: Hashable, make: Callable[[], Any]) -> Any:
        """What `make` returned when it was first asked for under this key."""
        made = self._made.get(key)
        if made is None:
            made = self._made[key] = make()
        return made

    def rows(self, r: Request, cache: CacheRows) -> Tensor:
        """Physical row of every logical row of a sequence, a KV head a line: int64 `[heads, rows]`."""
        return self.once(("rows", r.sequence, cache), lambda: self._rows(r, cache))

    def _rows(self, r: Request, cache: CacheRows) -> Tensor:
        table = self.page_table[r.sequence]
        found = cache.physical(table, torch.arange(-(-r.length // cache.tokens), device=table.device))
        return found + cache.head_starts(table.device)[:, None]

    def first_page(self, cache: CacheRows) -> int | None:
        """The first page of the only sequence, if its pages follow each other, as in a cache that is not fragmented."""
        (r,) = self.requests
        pages = self.page_table[r.sequence, : -(-r.length // (cache.tokens * cache.per_page))].tolist()
        return pages[0] if pages == list(range(pages[0], pages[0] + len(pages))) else None

    def head_rows(self, cache: CacheRows) -> Tensor:
        """Physical rows of all sequences: int64 `[N * heads, rows]`; past the end of a sequence its last row again."""
        return self.once(("head rows", cache), lambda: self._head_rows(cache))

    def _head_rows(self, cache: CacheRows) -> Tensor:
        device = self.page_table.device
        last = torch.tensor([(r.length - 1) // cache.tokens for r in self.requests], device=device)[:, None]
        longest = max(r.length for r in self.requests)
        logical = torch.arange(-(-longest // cache.tokens), device=device).minimum(last)
        found = cache.physical(self.page_table, logical)
        return (found[:, None] + cache.head_starts(device)[:, None]).flatten(0, 1)

    def apart(self) -> "PagedPlan":
        """The only sequence as one a new token: queries need not be turned then, and keys are read once each."""
        (r,) = self.requests
        table, lengths = self.page_table[r.sequence].expand(r.num_queries, -1), range(r.position(0) + 1, r.length + 1)
        return PagedPlan(table, list(lengths), list(range(r.num_queries + 1)), self.page_size, self.memory)

    def part(self, requests: Sequence[Request]) -> "Part":
        """A plan for some of the sequences alone, in the order given."""
        if list(requests) == self.requests and len(requests) == self.page_table.shape[0]:
            return Part(None, self)
        device = self.page_table.device
        rows = [row for r in requests for row in range(r.q_start, r.q_start + r.num_queries)]
        starts = [0]
        for r in requests:
            starts.append(starts[-1] + r.num_queries)
        table = self.page_table[torch.tensor([r.sequence for r in requests], device=device)]
        plan = PagedPlan(table, [r.length for r in requests], starts, self.page_size, self.memory)
        return Part(torch.tensor(rows, device=device), plan)


class Part(NamedTuple):
    """Some sequences of a step as a step of their own: `rows` of the packed queries, or None for all of them."""

    rows: Tensor | None
    plan: PagedPlan

    def take(self, x: Tensor) -> Tensor:
        """Its rows of a packed tensor."""
        return x if self.rows is None else x.index_select(0, self.rows)


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
