"""The paged cache: K, V and index keys of every layer, in pages that are handed out and taken back whole.

A page is `page_size` tokens wide (the selection block of the model by default) and its number means the same place in
every layer, so that whatever happens to a page happens to K, V and the index key of its tokens together::

    request A: pages [3, 0]        free: [5]       (page_size 16; A and B begin alike, and share a page)
    request B: pages [3, 2]        idle: [1, 4]    (nobody's, but their content may be asked for again)

    page            0     1     2     3     4     5
    holder          A     -     B    A, B   -     -
    tokens of it   16..  0..15 16..  0..15 16..31 -

Which page belongs to whom is `PagePool`'s to know (`pages.py`); here is what lies in them. Tokens past the end of a
request in its last page, and all of the free pages, are garbage that no kernel may let through.
"""

from collections.abc import Iterable, Iterator, Sequence

import torch

from minim3.config import MiniMaxM3VLTextConfig
from minim3.inference.pages import KV_CACHE_DTYPES, PagePool
from minim3.inference.request import Request
from minim3.model.batch import LayerPages

PAGE_SIZE_WITHOUT_BLOCKS = 128


def default_page_size(config: MiniMaxM3VLTextConfig) -> int:
    """Tokens a page: the selection block, so that one page is one block; 128 for a model without sparse layers."""
    return config.index_block_size or PAGE_SIZE_WITHOUT_BLOCKS


class PagedCache:
    """Pages for all layers of one model; `pool` knows whose they are.

    Per layer K and V `[pages, kv_heads, page_size, head_dim]`, and, where the layer is sparse, index keys
    `[pages, page_size, index_head_dim]`.

    Args:
        config: the text configuration.
        page_size: tokens a page; None takes `default_page_size`.
        num_pages: pages to begin with.
        max_pages: the pool doubles when it runs out, up to so many pages; None sets no limit.
        dtype, device: of the stored keys and values.
        num_draft_layers: layers of MTP modules, whose keys and values lie in the same pages, after those of the model.
        prefix_caching: keep the content of pages that nobody holds, for requests that begin alike.
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
        num_draft_layers: int = 0,
        prefix_caching: bool = True,
        shuffle_seed: int | None = None,
        poison: bool = False,
    ) -> None:
        self.config = config
        self.num_draft_layers = num_draft_layers
        self.dtype = dtype
        self.device = torch.device(device)
        self.page_size = default_page_size(config) if page_size is None else page_size
        self.layers: list[LayerPages] = []
        self.pool = PagePool(
            page_size=self.page_size,
            num_pages=num_pages,
            max_pages=max_pages,
            prefix_caching=prefix_caching,
            shuffle_seed=shuffle_seed,
            on_free=self._fill_with_nan if poison else None,
            on_grow=self._grow_to,
        )

    @property
    def num_pages(self) -> int:
        return self.pool.num_pages

    def extend(self, request: Request, num_tokens: int) -> None:
        """Give `request` the pages that its first `num_tokens` tokens need (`PagePool.extend`)."""
        self.pool.extend(request, num_tokens)

    def free(self, request: Request) -> None:
        """Take back all pages of `request` (`PagePool.free`)."""
        self.pool.free(request)

    def trim(self, request: Request, num_tokens: int) -> None:
        """Forget all but the first `num_tokens` tokens of `request`: K, V and index keys together."""
        copied = self.pool.trim(request, num_tokens)
        if copied is not None:
            source, target = copied
            for stored in self._stored():
                stored[target] = stored[source]

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
        """Assert that pages add up (`PagePool.check_integrity`) and that every layer has all of them.

        Some layers may have more: memory ran out while they grew, and the next time goes on from there.
        """
        self.pool.check_integrity(requests)
        assert all(stored.shape[0] >= self.num_pages for stored in self._stored())

    def _stored(self) -> Iterator[torch.Tensor]:
        for layer in self.layers:
            for stored in (layer.k, layer.v, layer.index_k):
                if stored is not None:
                    yield stored

    def _fill_with_nan(self, pages: Sequence[int]) -> None:
        chosen = torch.tensor(pages, device=self.device)
        for stored in self._stored():
            stored[chosen] = torch.nan

    def _grow_to(self, num_pages: int) -> None:
        """Make every layer `num_pages` large, one at a time (so that only one layer is ever held twice)."""
        config, grows = self.config, bool(self.layers)
        kv_shape = (num_pages, config.num_key_value_heads, self.page_size, config.head_dim)
        index_shape = (num_pages, self.page_size, config.index_head_dim)
        for i in range(config.num_hidden_layers + self.num_draft_layers):
            old = self.layers[i] if grows else None
            # A draft module is of the kind of the last layer.
            sparse = config.is_sparse_attention_layer(min(i, config.num_hidden_layers - 1))
            grown = LayerPages(
                self._larger(kv_shape, old.k if old else None),
                self._larger(kv_shape, old.v if old else None),
                self._larger(index_shape, old.index_k if old else None) if sparse else None,
            )
            if old:
                self.layers[i] = grown
            else:
                self.layers.append(grown)

    def _larger(self, shape: tuple[int, ...], old: torch.Tensor | None) -> torch.Tensor:
        if old is not None and old.shape[0] >= shape[0]:
            return old
        # Plain tensors wherever the pool grows: those made in inference mode could not be written to outside of it.
        with torch.inference_mode(False), torch.no_grad():
            # Not zeroed: pages that are never used are then never touched, and cost no memory on the CPU.
            stored = torch.empty(shape, dtype=self.dtype, device=self.device)
            if old is not None:
                stored[: old.shape[0]] = old
            return stored


def stored_dtype(name: str, dtype: torch.dtype) -> torch.dtype:
    """What a `kv_cache_dtype` of this name means for a model in `dtype`. ValueError for an unknown name."""
    if name not in KV_CACHE_DTYPES:
        raise ValueError(f"kv_cache_dtype is {name!r}; known: {', '.join(KV_CACHE_DTYPES)}")
    return torch.float8_e4m3fn if name == "fp8" else dtype


def bytes_per_token(config: MiniMaxM3VLTextConfig, dtype: torch.dtype = torch.bfloat16) -> int:
    """Cache memory of one token over all layers, in bytes."""
    numbers = 0
    for i in range(config.num_hidden_layers):
        numbers += 2 * config.num_key_value_heads * config.head_dim
        numbers += config.index_head_dim if config.is_sparse_attention_layer(i) else 0
    return numbers * dtype.itemsize
