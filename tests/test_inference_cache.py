"""The paged cache and the scheduler by themselves, without a model."""

import ast
from pathlib import Path

import pytest
import torch

import minim3.inference.scheduler
from minim3.config import MiniMaxM3VLTextConfig
from minim3.inference.cache import OutOfPages, PagedCache
from minim3.inference.request import Request, SamplingParams
from minim3.inference.scheduler import Scheduler

CONFIG = MiniMaxM3VLTextConfig(
    vocab_size=97, hidden_size=1, num_hidden_layers=2, num_attention_heads=1, num_key_value_heads=1, head_dim=4,
    rotary_dim=2, max_position_embeddings=60, intermediate_size=4, dense_intermediate_size=4,
    shared_intermediate_size=4, num_local_experts=2, num_experts_per_tok=1, index_n_heads=1, index_head_dim=4,
    index_block_size=4, index_topk_blocks=2, eos_token_id=2, layer_types=("full_attention", "minimax_m3_sparse"),
)  # fmt: skip


def test_index_keys_travel_with_their_pages_on_trim_and_reuse() -> None:
    """Pitfall 3: K and V put back to an earlier length while the index keys stay, or the reverse."""
    cache = PagedCache(CONFIG, num_pages=6, shuffle_seed=1, poison=True)
    request = Request(
        request_id="a", token_ids=list(range(20)), num_prompt_tokens=20, max_new_tokens=1, params=SamplingParams()
    )
    cache.extend(request, 20)
    request.num_computed_tokens = 20
    before = list(request.pages)
    for layer in cache.layers:
        for stored in (layer.k, layer.v, layer.index_k):
            if stored is not None:
                stored[torch.tensor(before)] = 1.0
    cache.trim(request, 9)
    assert request.pages == before[:3]
    assert request.num_computed_tokens == 9
    assert cache.num_free_pages == 3
    cache.check_integrity([request])
    for layer in cache.layers:
        for stored in (layer.k, layer.v, layer.index_k):
            if stored is not None:
                assert stored[torch.tensor(before[3:])].isnan().all(), "a dropped page kept some of its tokens"
                assert (stored[torch.tensor(request.pages)] == 1).all(), "a kept page lost some of its tokens"
    cache.free(request)
    cache.check_integrity([])
    assert cache.num_free_pages == 6


def test_out_of_pages_says_how_many() -> None:
    cache = PagedCache(CONFIG, num_pages=2, max_pages=3)
    request = Request(request_id="a", token_ids=[1], num_prompt_tokens=1, max_new_tokens=1, params=SamplingParams())
    cache.extend(request, 4)
    with pytest.raises(OutOfPages, match="3 pages of 4 tokens were asked for, but only 2 of 3 are free"):
        cache.extend(request, 16)
    cache.check_integrity([request])
    cache.extend(request, 12)
    assert len(request.pages) == 3


def test_first_come_first_served_when_pages_are_short() -> None:
    """A later small request may not overtake an earlier one that waits for pages: the large one would starve."""
    scheduler = Scheduler(max_tokens_per_step=64, max_running=8, page_size=4, max_pages=5)
    first, second, third = (
        Request(request_id=str(size), token_ids=[1] * size, num_prompt_tokens=size, max_new_tokens=1,
                params=SamplingParams())
        for size in (12, 16, 4)
    )  # fmt: skip
    for request in (first, second, third):
        scheduler.add(request)
    assert [chunk.request for chunk in scheduler.schedule()] == [first]
    scheduler.remove(first)
    assert [chunk.request for chunk in scheduler.schedule()] == [second, third]
    scheduler.check_integrity()


def test_scheduler_imports_no_torch() -> None:
    """Policy that can touch tensors soon waits for a device; this one stays plain Python."""
    sources = [Path(minim3.inference.scheduler.__file__), Path(minim3.inference.request.__file__)]
    for source in sources:
        tree = ast.parse(source.read_text())
        for node in tree.body:  # imports under TYPE_CHECKING are for annotations alone
            if isinstance(node, ast.Import):
                assert all(alias.name.split(".")[0] != "torch" for alias in node.names)
            if isinstance(node, ast.ImportFrom):
                assert node.module in {
                    "bisect", "collections", "collections.abc", "dataclasses", "typing", "minim3.inference.request"
                }  # fmt: skip
