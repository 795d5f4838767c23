"""Who owns which page: the free list, reference counts, and pages kept for the prefixes they hold. No tensors.

A page is in exactly one of three states::

    free    on the free list; its content means nothing
    used    one request or more hold it in their `pages`; `references` counts them
    idle    nobody holds it, but its content is known by a key (`prefix.py`) and serves whoever asks for it next

      free --take--> used --last holder lets go--> idle if it has a key, else free
      idle --match, claim--> used            idle --evicted, longest unused first, to be taken--> used

A page gets its key when its last token is computed, and nothing is written to it from then on: that is what lets
requests share it. Only whole pages are shared, so that a request appends to pages of its own.
"""

import random
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence

from minim3.inference.prefix import page_keys
from minim3.inference.request import Request

KV_CACHE_DTYPES = ("auto", "fp8")
"""What pages may hold: numbers of the model's dtype, or of 8 bits."""


class OutOfPages(RuntimeError):
    """A page was asked for while every one is in use."""


class PagePool:
    """Pages by number, handed out and taken back whole.

    Args:
        page_size: tokens a page holds.
        num_pages: pages to begin with.
        max_pages: the pool doubles when it runs out, up to so many pages; None sets no limit.
        prefix_caching: keep the content of pages that nobody holds, and share it. Off: every page is owned once.
        shuffle_seed: hand out pages in random order, from this seed.
        on_free: told of pages whose content means nothing from now on. on_grow: told of a new number of pages.

    Raises:
        ValueError: a size below 1, or a limit below the first size.
    """

    def __init__(
        self,
        *,
        page_size: int,
        num_pages: int,
        max_pages: int | None = None,
        prefix_caching: bool = True,
        shuffle_seed: int | None = None,
        on_free: Callable[[Sequence[int]], None] | None = None,
        on_grow: Callable[[int], None] | None = None,
    ) -> None:
        if page_size < 1:
            raise ValueError(f"page_size must be at least 1 token, got {page_size}")
        if num_pages < 1:
            raise ValueError(f"num_pages must be at least 1, got {num_pages}")
        if max_pages is not None and max_pages < num_pages:
            raise ValueError(f"max_pages ({max_pages}) must be at least num_pages ({num_pages})")
        self.page_size = page_size
        self.num_pages = 0
        self.max_pages = max_pages
        self.prefix_caching = prefix_caching
        self._random = None if shuffle_seed is None else random.Random(shuffle_seed)
        self._on_free = on_free
        self._on_grow = on_grow
        self._free: list[int] = []
        self._references: list[int] = []
        self._idle: OrderedDict[int, None] = OrderedDict()  # longest unused first
        self._page_of_key: dict[bytes, int] = {}
        self._key_of_page: dict[int, bytes] = {}
        self._grow_to(num_pages)

    # How many there are

    @property
    def num_free_pages(self) -> int:
        """Pages that can be handed out as the pool is now; idle ones are among them."""
        return len(self._free) + len(self._idle)

    @property
    def num_used_pages(self) -> int:
        """Pages that some request holds."""
        return self.num_pages - self.num_free_pages

    @property
    def num_cached_pages(self) -> int:
        """Pages whose content can be shared, in use or not."""
        return len(self._key_of_page)

    def pages_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.page_size)

    def fits(self, num_pages: int) -> bool:
        """Whether so many pages can be handed out, growing if need be."""
        return self.max_pages is None or num_pages <= self.max_pages - self.num_used_pages

    # What a request holds

    def extend(self, request: Request, num_tokens: int) -> None:
        """Give `request` the pages that its first `num_tokens` tokens need.

        Raises:
            OutOfPages: the pool is used up and may not grow; the request keeps what it had.
        """
        missing = self.pages_for(num_tokens) - len(request.pages)
        if missing <= 0:
            return
        if missing > self.num_free_pages:
            self._make_room(missing)
        for _ in range(missing):
            request.pages.append(self._take())

    def free(self, request: Request) -> None:
        """Take back all pages of `request`, which then has computed nothing."""
        dropped, request.pages = request.pages, []  # a new list: tables built from the old one are not current any more
        request.num_computed_tokens = request.num_keyed_pages = 0
        self._let_go(dropped)

    def trim(self, request: Request, num_tokens: int) -> tuple[int, int] | None:
        """Forget all but the first `num_tokens` tokens of `request`.

        What follows them may be written anew. Returns (from, to) if that needs a copy of a page which others hold too.
        """
        assert 0 <= num_tokens <= request.num_computed_tokens, (num_tokens, request.num_computed_tokens)
        num_kept, num_whole = self.pages_for(num_tokens), num_tokens // self.page_size
        kept, dropped = request.pages[:num_kept], request.pages[num_kept:]
        copied = None
        if num_whole < num_kept and kept[-1] in self._key_of_page:  # a page to be written to again
            shared = kept[-1]
            if self._references[shared] == 1:
                self._forget_key(shared)
            else:
                self._make_room(1)
                kept[-1] = self._take()
                copied = shared, kept[-1]
                dropped.insert(0, shared)
        request.pages = kept
        request.num_computed_tokens = num_tokens
        request.num_keyed_pages = min(request.num_keyed_pages, num_whole)
        del request.page_keys[num_whole:]
        self._let_go(dropped)
        return copied

    # Prefixes

    def match(self, request: Request) -> list[int]:
        """Pages that hold the first tokens of `request`, as many as are known; its last token is always left over."""
        if not self.prefix_caching:
            return []
        found = []
        for key in page_keys(request, self.page_size, (request.num_tokens - 1) // self.page_size):
            page = self._page_of_key.get(key)
            if page is None:
                break
            found.append(page)
        return found

    def num_idle(self, pages: Iterable[int]) -> int:
        """How many of them nobody holds."""
        return sum(page in self._idle for page in pages)

    def claim(self, request: Request, pages: Sequence[int]) -> None:
        """Let `request`, which holds nothing, begin with these pages of `match`."""
        assert not request.pages
        for page in pages:
            self._references[page] += 1
            self._idle.pop(page, None)
        request.pages = list(pages)
        request.num_computed_tokens = len(pages) * self.page_size
        request.num_keyed_pages = len(pages)

    def publish(self, request: Request) -> None:
        """Let others find the pages of `request` that are full of computed tokens."""
        num_full = request.num_computed_tokens // self.page_size
        if not self.prefix_caching or num_full <= request.num_keyed_pages:
            return
        keys = page_keys(request, self.page_size, num_full)
        for place in range(request.num_keyed_pages, num_full):
            page, key = request.pages[place], keys[place]
            if key not in self._page_of_key:  # else another request was first: ours is freed with us
                assert page not in self._key_of_page
                self._page_of_key[key] = page
                self._key_of_page[page] = key
        request.num_keyed_pages = num_full

    def forget_prefixes(self) -> None:
        """Forget the content of all pages, as when the weights have changed: no later request finds any."""
        for page in list(self._key_of_page):
            self._forget_key(page)
        idle = list(self._idle)
        self._idle.clear()
        self._put_back(idle)

    def check_integrity(self, requests: Iterable[Request]) -> None:
        """Assert that every page is free, idle or held, counted as often as it is held, and found under one key."""
        held = [0] * self.num_pages
        for request in requests:
            assert len(set(request.pages)) == len(request.pages), "a request holds a page twice"
            assert len(request.pages) * self.page_size >= request.num_computed_tokens
            assert request.num_keyed_pages * self.page_size <= request.num_computed_tokens
            for place, page in enumerate(request.pages):
                held[page] += 1
                key = self._key_of_page.get(page)
                assert key is None or key == request.page_keys[place], "a page is known by tokens it does not hold"
                assert held[page] == 1 or key is not None, "a page without a key is shared"
        assert held == self._references, "reference counts differ from what requests hold"
        used = [page for page, count in enumerate(held) if count]
        assert sorted([*used, *self._free, *self._idle]) == list(range(self.num_pages)), "a page was lost"
        assert {page: key for key, page in self._page_of_key.items()} == self._key_of_page
        assert all(page in self._key_of_page for page in self._idle)
        assert not any(page in self._key_of_page for page in self._free)

    def _take(self) -> int:
        if not self._free:
            page, _ = self._idle.popitem(last=False)
            self._forget_key(page)
            self._put_back([page])
        if self._random is not None:
            chosen = self._random.randrange(len(self._free))
            self._free[chosen], self._free[-1] = self._free[-1], self._free[chosen]
        page = self._free.pop()
        self._references[page] = 1
        return page

    def _let_go(self, pages: Sequence[int]) -> None:
        freed = []
        for page in reversed(pages):  # the end of a prefix is of no use without its beginning: it is evicted first
            self._references[page] -= 1
            if self._references[page]:
                continue
            if page in self._key_of_page:
                self._idle[page] = None
            else:
                freed.append(page)
        self._put_back(freed)

    def _put_back(self, pages: Sequence[int]) -> None:
        if pages and self._on_free is not None:
            self._on_free(pages)
        self._free.extend(pages)

    def _forget_key(self, page: int) -> None:
        del self._page_of_key[self._key_of_page.pop(page)]

    def _make_room(self, missing: int) -> None:
        wanted = self.num_pages + missing - self.num_free_pages
        if wanted <= self.num_pages:
            return
        if self.max_pages is not None and wanted > self.max_pages:
            raise OutOfPages(
                f"{missing} pages of {self.page_size} tokens were asked for, but only "
                f"{self.max_pages - self.num_used_pages} of {self.max_pages} are free"
            )
        doubled = max(wanted, 2 * self.num_pages)
        self._grow_to(doubled if self.max_pages is None else min(doubled, self.max_pages))

    def _grow_to(self, num_pages: int) -> None:
        if self._on_grow is not None:
            self._on_grow(num_pages)  # first: where there is no memory for it, nothing has happened
        fresh = range(self.num_pages, num_pages)
        self.num_pages = num_pages
        self._references += [0] * len(fresh)
        self._put_back(fresh[::-1])
