"""The paged cache: K, V and index keys of every layer, in pages that are handed out and taken back whole.

A page is `page_size` tokens wide (the selection block of the model by default) and its number means the same place in
every layer, so that whatever happens to a page happens to K, V and the index key of its tokens together::

    request A: pages [3, 0]          free list: [1, 5]
    request B: pages [4, 2]

    page            0     1     2     3     4     5
    owner           A     -     B     A     B     -
    tokens of it   16..   -    16..  0..15 0..15  -        (page_size 16)

Tokens that lie past the end of a request in its last page, and all of the free pages, are garbage that no kernel may
let through.
"""

import random
from collections.abc import Iterable, Sequence

import torch

from minim3.config import MiniMaxM3VLTextConfig
from minim3.inference.request import Request
from minim3.model.batch import LayerPages

PAGE_SIZE_WITHOUT_BLOCKS = 128


def default_page_size(config: MiniMaxM3VLTextConfig) -> int:
    """Tokens a page: the selection block, so that one page is one block; 128 for a model without sparse layers."""
    return config.index_block_size or PAGE_SIZE_WITHOUT_BLOCKS


class OutOfPages(RuntimeError):
    """A page was asked for while every one is in use."""


class PagedCache:
    """Pages for all layers of one model, and the list of the free ones.

    Per layer K and V `[pages, kv_heads, page_size, head_dim]`, and, where the layer is sparse, index keys
    `[pages, page_size, index_head_dim]`.

    Args:
        config: the text configuration.
        page_size: tokens a page; None takes `default_page_size`.
        num_pages: pages to begin with.
        max_pages: the pool doubles when it runs out, up to so many pages; None sets no limit.
        dtype, device: of the stored keys and values.
        shuffle_seed: hand out pages in random order, from this seed. The answers may not depend on it.
        poison: fill every page with NaN while it is free. The answers may not depend on it (a debugging aid).

    Raises:
        ValueError: a size below 1, or a limit below the first size.
    """

    def __init__(
        self,
        config: MiniMaxM3VLTextConfig,
        *,
        page_size: int | None = None,
        num_pages: int = 64,
        max_pages: int | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        shuffle_seed: int | None = None,
        poison: bool = False,
    ) -> None:
        self.page_size = default_page_size(config) if page_size is None else page_size
        if self.page_size < 1:
            raise ValueError(f"page_size must be at least 1 token, got {page_size}")
        if num_pages < 1:
            raise ValueError(f"num_pages must be at least 1, got {num_pages}")
        if max_pages is not None and max_pages < num_pages:
            raise ValueError(f"max_pages ({max_pages}) must be at least num_pages ({num_pages})")
        self.config = config
        self.max_pages = max_pages
        self.dtype = dtype
        self.device = torch.device(device)
        self._random = None if shuffle_seed is None else random.Random(shuffle_seed)
        self._poison = poison
        self.num_pages = 0
        self.layers: list[LayerPages] = []
        self._free: list[int] = []
        self._grow_to(num_pages)

    @property
    def num_free_pages(self) -> int:
        return len(self._free)

    @property
    def num_used_pages(self) -> int:
        return self.num_pages - len(self._free)

    def extend(self, request: Request, num_tokens: int) -> None:
        """Give `request` the pages that its first `num_tokens` tokens need.

        Raises:
            OutOfPages: the pool is used up and may not grow; the request keeps what it had.
        """
        missing = -(-num_tokens // self.page_size) - len(request.pages)
        if missing <= 0:
            return
        if missing > len(self._free):
            self._make_room(missing)
        for _ in range(missing):
            request.pages.append(self._take())

    def trim(self, request: Request, num_tokens: int) -> None:
        """Forget all but the first `num_tokens` tokens of `request`: K, V and index keys together."""
        assert 0 <= num_tokens <= request.num_computed_tokens, (num_tokens, request.num_computed_tokens)
        num_kept = -(-num_tokens // self.page_size)
        kept, dropped = request.pages[:num_kept], request.pages[num_kept:]
        request.pages = kept  # a new list: tables built from the old one are not current any more
        request.num_computed_tokens = num_tokens
        self._give_back(dropped)

    def free(self, request: Request) -> None:
        """Take back all pages of `request`."""
        dropped, request.pages = request.pages, []
        self._give_back(dropped)

    def slots(self, request: Request, start: int, stop: int) -> list[int]:
        """`page * page_size + offset` of the tokens at positions `start <= p < stop`; their pages must be there."""
        size = self.page_size
        if stop == start + 1:
            return [request.pages[start // size] * size + start % size]
        found: list[int] = []
        for logical in range(start // size, -(-stop // size)):
            first = request.pages[logical] * size
            low, high = max(start - logical * size, 0), min(stop - logical * size, size)
            found.extend(range(first + low, first + high))
        return found

    def check_integrity(self, requests: Iterable[Request]) -> None:
        """Assert that every page is free or owned by one of `requests`, and that each has the pages it needs."""
        owned = [page for request in requests for page in request.pages]
        assert sorted([*owned, *self._free]) == list(range(self.num_pages)), "a page was lost or is owned twice"
        for request in requests:
            assert len(request.pages) * self.page_size >= request.num_computed_tokens
        for layer in self.layers:
            for stored in (layer.k, layer.v, layer.index_k):
                assert stored is None or stored.shape[0] == self.num_pages

    def _take(self) -> int:
        if self._random is not None:
            chosen = self._random.randrange(len(self._free))
            self._free[chosen], self._free[-1] = self._free[-1], self._free[chosen]
        return self._free.pop()

    def _give_back(self, pages: Sequence[int]) -> None:
        if pages and self._poison:
            self._fill_with_nan(torch.tensor(pages, device=self.device))
        self._free.extend(reversed(pages))

    def _fill_with_nan(self, pages: torch.Tensor) -> None:
        for layer in self.layers:
            for stored in (layer.k, layer.v, layer.index_k):
                if stored is not None:
                    stored[pages] = torch.nan

    def _make_room(self, missing: int) -> None:
        wanted = self.num_pages + missing - len(self._free)
        if self.max_pages is not None and wanted > self.max_pages:
            raise OutOfPages(
                f"{missing} pages of {self.page_size} tokens were asked for, but only "
                f"{self.max_pages - self.num_used_pages} of {self.max_pages} are free"
            )
        doubled = max(wanted, 2 * self.num_pages)
        self._grow_to(doubled if self.max_pages is None else min(doubled, self.max_pages))

    def _grow_to(self, num_pages: int) -> None:
        """Make the pool `num_pages` large, one layer at a time (so that only one layer is ever held twice)."""
        config, old_size = self.config, self.num_pages
        kv_shape = (num_pages, config.num_key_value_heads, self.page_size, config.head_dim)
        index_shape = (num_pages, self.page_size, config.index_head_dim)
        for i in range(config.num_hidden_layers):
            old = self.layers[i] if old_size else None
            sparse = config.is_sparse_attention_layer(i)
            grown = LayerPages(
                self._larger(kv_shape, old.k if old else None),
                self._larger(kv_shape, old.v if old else None),
                self._larger(index_shape, old.index_k if old else None) if sparse else None,
            )
            if old:
                self.layers[i] = grown
            else:
                self.layers.append(grown)
        self.num_pages = num_pages
        fresh = list(range(old_size, num_pages))
        if self._poison:
            self._fill_with_nan(torch.tensor(fresh, device=self.device))
        self._free.extend(reversed(fresh))

    def _larger(self, shape: tuple[int, ...], old: torch.Tensor | None) -> torch.Tensor:
        # Plain tensors wherever the pool grows: those made in inference mode could not be written to outside of it.
        with torch.inference_mode(False), torch.no_grad():
            # Not zeroed: pages that are never used are then never touched, and cost no memory on the CPU.
            stored = torch.empty(shape, dtype=self.dtype, device=self.device)
            if old is not None:
                stored[: old.shape[0]] = old
            return stored


def bytes_per_token(config: MiniMaxM3VLTextConfig, dtype: torch.dtype = torch.bfloat16) -> int:
    """Cache memory of one token over all layers, in bytes."""
    numbers = 0
    for i in range(config.num_hidden_layers):
        numbers += 2 * config.num_key_value_heads * config.head_dim
        numbers += config.index_head_dim if config.is_sparse_attention_layer(i) else 0
    return numbers * dtype.itemsize
