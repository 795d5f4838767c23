"""The paged cache and its pool of pages by themselves, without a model."""

import ast
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import minim3.inference.scheduler
from minim3.config import MiniMaxM3VLTextConfig
from minim3.inference.cache import PagedCache
from minim3.inference.pages import OutOfPages, PagePool
from minim3.inference.prefix import page_keys
from minim3.inference.request import Media, Request, SamplingParams

CONFIG = MiniMaxM3VLTextConfig(
    vocab_size=97, hidden_size=1, num_hidden_layers=2, num_attention_heads=1, num_key_value_heads=1, head_dim=4,
    rotary_dim=2, max_position_embeddings=60, intermediate_size=4, dense_intermediate_size=4,
    shared_intermediate_size=4, num_local_experts=2, num_experts_per_tok=1, index_n_heads=1, index_head_dim=4,
    index_block_size=4, index_topk_blocks=2, eos_token_id=2, layer_types=("full_attention", "minimax_m3_sparse"),
)  # fmt: skip


def make_request(
    token_ids: list[int], media: Media | None = None, places: dict[int, list[int]] | None = None
) -> Request:
    return Request(
        request_id="r", token_ids=list(token_ids), num_prompt_tokens=len(token_ids), max_new_tokens=9,
        params=SamplingParams(), media=media, placeholders=places or {},
    )  # fmt: skip


def compute(pool: PagePool, request: Request, num_tokens: int) -> None:
    """What a step does to the pages: hands them out, computes, publishes."""
    pool.extend(request, num_tokens)
    request.num_computed_tokens = num_tokens
    pool.publish(request)


def stored(cache: PagedCache) -> list[torch.Tensor]:
    return [x for layer in cache.layers for x in (layer.k, layer.v, layer.index_k) if x is not None]


def test_index_keys_travel_with_their_pages_on_trim_and_reuse() -> None:
    """Pitfall 3: K and V put back to an earlier length while the index keys stay, or the reverse."""
    cache = PagedCache(CONFIG, num_pages=6, shuffle_seed=1, poison=True, prefix_caching=False)
    request = make_request(list(range(20)))
    compute(cache.pool, request, 20)
    before = list(request.pages)
    for place in stored(cache):
        place[torch.tensor(before)] = 1.0
    cache.trim(request, 9)
    assert request.pages == before[:3]
    assert request.num_computed_tokens == 9
    assert cache.pool.num_free_pages == 3
    cache.check_integrity([request])
    for place in stored(cache):
        assert place[torch.tensor(before[3:])].isnan().all(), "a dropped page kept some of its tokens"
        assert (place[torch.tensor(request.pages)] == 1).all(), "a kept page lost some of its tokens"
    cache.pool.free(request)
    cache.check_integrity([])
    assert cache.pool.num_free_pages == 6


@pytest.mark.parametrize("num_allocations", range(5))
def test_memory_that_runs_out_while_the_pool_grows_loses_nothing(
    monkeypatch: pytest.MonkeyPatch, num_allocations: int
) -> None:
    """A pool that counts pages which its layers have not got is of no use to the requests that went before."""
    cache = PagedCache(CONFIG, num_pages=2)
    first, second = make_request(list(range(8))), make_request(list(range(30)))
    compute(cache.pool, first, 8)
    for place in stored(cache):
        place[torch.tensor(first.pages)] = 1.0
    allocate, done = torch.empty, 0

    def fail_after_some(*size: object, **options: object) -> torch.Tensor:
        nonlocal done
        done += 1
        if done > num_allocations:
            raise RuntimeError("[enforce fail at alloc_cpu.cpp] can't allocate memory")
        return allocate(*size, **options)  # type: ignore[call-overload, no-any-return]

    with monkeypatch.context() as patch:
        patch.setattr(torch, "empty", fail_after_some)
        with pytest.raises(RuntimeError, match="memory"):
            cache.pool.extend(second, 30)
    cache.check_integrity([first, second])
    assert cache.num_pages == 2
    compute(cache.pool, second, 30)
    cache.check_integrity([first, second])
    assert all((place[torch.tensor(first.pages)] == 1).all() for place in stored(cache))


def test_layers_of_draft_modules_lie_in_the_same_pages() -> None:
    """Pitfall 3 for speculation: keys of a draft module that live elsewhere are not shared, trimmed or evicted."""
    cache = PagedCache(CONFIG, num_pages=3, max_pages=6, num_draft_layers=2)
    request = make_request(list(range(20)))
    cache.pool.extend(request, 20)
    assert [layer.index_k is not None for layer in cache.layers] == [False, True, True, True]
    assert {len(place) for place in stored(cache)} == {6}


def test_out_of_pages_says_how_many() -> None:
    cache = PagedCache(CONFIG, num_pages=2, max_pages=3)
    request = make_request([1])
    cache.pool.extend(request, 4)
    with pytest.raises(OutOfPages, match="3 pages of 4 tokens were asked for, but only 2 of 3 are free"):
        cache.pool.extend(request, 16)
    cache.check_integrity([request])
    cache.pool.extend(request, 12)
    assert len(request.pages) == 3


def test_pages_are_found_by_content_and_evicted_from_the_end() -> None:
    """A page evicted before those that follow it would leave pages that nobody can reach."""
    pool = PagePool(page_size=4, num_pages=6, max_pages=6)
    first = make_request(list(range(19)))
    assert pool.match(first) == []
    compute(pool, first, 19)
    pages = first.pages[:4]
    second = make_request([*range(10), 50, 51, 52])
    assert pool.match(second) == pages[:2]
    assert pool.match(make_request(list(range(16)))) == pages[:3], "the last token has to be computed"
    assert pool.match(make_request([50, *range(18)])) == []
    pool.claim(second, pages[:2])
    pool.free(first)
    pool.check_integrity([second])
    assert (pool.num_used_pages, pool.num_free_pages, pool.num_cached_pages) == (2, 4, 4)
    compute(pool, second, 13)  # takes the two that were never published
    assert pool.match(make_request(list(range(19)))) == pages
    third = make_request([60, 61])
    compute(pool, third, 2)
    assert pool.match(make_request(list(range(19)))) == pages[:3], "the end of the prefix goes first"
    pool.check_integrity([second, third])
    pool.forget_prefixes()
    assert pool.match(make_request(list(range(19)))) == []
    pool.check_integrity([second, third])
    pool.free(second)
    pool.free(third)
    pool.check_integrity([])
    assert pool.num_free_pages == 6


def test_a_shared_page_is_copied_before_it_is_written_to() -> None:
    """Trimming into a page that others read, and writing on, would change their past."""
    cache = PagedCache(CONFIG, num_pages=8)
    first, second = make_request(list(range(16))), make_request(list(range(16)))
    compute(cache.pool, first, 16)
    for number, place in enumerate(stored(cache)):
        place[torch.tensor(first.pages)] = 1.0 + number
    cache.pool.claim(second, cache.pool.match(second))
    shared = list(second.pages)
    cache.trim(second, 10)
    assert second.pages[:2] == shared[:2]
    assert second.pages[2] not in first.pages
    for number, place in enumerate(stored(cache)):
        assert (place[second.pages[2]] == 1.0 + number).all()
    cache.check_integrity([first, second])
    own = list(first.pages)
    cache.trim(first, 10)  # nobody else holds its third page now: it is written to as it is, and found no more
    assert first.pages == own[:3]
    assert cache.pool.match(make_request(list(range(16)))) == own[:2]
    cache.check_integrity([first, second])


def test_without_prefix_caching_nothing_is_shared_or_kept() -> None:
    pool = PagePool(page_size=4, num_pages=6, prefix_caching=False)
    first = make_request(list(range(16)))
    compute(pool, first, 16)
    assert pool.match(make_request(list(range(16)))) == []
    pool.free(first)
    assert pool.num_cached_pages == 0


def picture(*digests: bytes, features: int = 3) -> Media:
    return Media(digests={90: [(features, digest) for digest in digests]})


def test_keys_tell_pictures_apart() -> None:
    """Placeholder ids are the same for every picture: keys of ids alone would hand out another picture's pages."""
    ids = [1, 90, 90, 90, 2, 90, 90, 90, 3, 4]
    places = {90: [1, 2, 3, 5, 6, 7]}

    def keys(media: Media) -> list[bytes]:
        return page_keys(make_request(ids, media, places), 2, 5)

    same, other, second = keys(picture(b"a", b"b")), keys(picture(b"c", b"b")), keys(picture(b"a", b"c"))
    assert keys(picture(b"a", b"b")) == same
    assert not set(other) & set(same), "all pages behind another picture are other pages"
    assert second[:2] == same[:2]
    assert not set(second[2:]) & set(same)
    # The same ids and picture from another of its features on: pages of 2 begin at features 0, 1, 3.
    assert len(set(same)) == 5
    shifted = page_keys(make_request([90, 90], picture(b"a"), {90: [0, 1]}), 2, 1)
    assert shifted != page_keys(make_request([90, 90], picture(b"z", b"a", features=1), {90: [0, 1]}), 2, 1)


@settings(max_examples=60, deadline=None)
@given(
    first=st.lists(st.integers(0, 2), min_size=1, max_size=12),
    second=st.lists(st.integers(0, 2), min_size=1, max_size=12),
    page_size=st.integers(1, 4),
)
def test_keys_are_equal_exactly_as_far_as_the_tokens(first: list[int], second: list[int], page_size: int) -> None:
    one = page_keys(make_request(first), page_size, len(first) // page_size)
    other = page_keys(make_request(second), page_size, len(second) // page_size)
    for place, (a, b) in enumerate(zip(one, other)):
        assert (a == b) == (first[: (place + 1) * page_size] == second[: (place + 1) * page_size])


def test_scheduler_imports_no_torch() -> None:
    """Policy that can touch tensors soon waits for a device; this one stays plain Python."""
    folder = Path(minim3.inference.scheduler.__file__).parent
    for name in ("scheduler", "request", "pages", "prefix"):
        tree = ast.parse((folder / f"{name}.py").read_text())
        for node in tree.body:  # imports under TYPE_CHECKING are for annotations alone
            if isinstance(node, ast.Import):
                assert all(alias.name in {"math", "random"} for alias in node.names)
            if isinstance(node, ast.ImportFrom):
                assert node.module in {
                    "array", "bisect", "collections", "collections.abc", "dataclasses", "hashlib", "operator", "typing",
                    "minim3.inference.request", "minim3.inference.pages", "minim3.inference.prefix",
                }  # fmt: skip
