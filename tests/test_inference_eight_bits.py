"""A cache in 8 bits (float8_e4m3fn): the same answers as from keys and values rounded so, and no NaN."""

from unittest import mock

import pytest
import torch
from torch import Tensor

from minim3.inference.engine import Engine
from minim3.inference.request import Request, SamplingParams
from minim3.model.batch import PagedContext
from tests.tiny_models import random_ids, text_model

LENGTHS, NEW = [5, 30, 17], 8


def run(model, **options) -> list[Request]:
    engine = Engine(model, **options)
    params = SamplingParams(max_new_tokens=NEW, temperature=0.0, ignore_eos=True, logprobs=2)
    requests = [engine.add_request(random_ids(n, seed=n).tolist(), params) for n in LENGTHS]
    engine.run()
    engine.check_integrity()
    assert (engine.cache.layers[0].k.dtype == torch.float8_e4m3fn) == (options.get("kv_cache_dtype") == "fp8")
    return requests


def test_answers_are_those_of_rounded_keys_and_values() -> None:
    """Shuffled, poisoned pages; chunks; the cache grows. The measure is a fp32 cache of rounded numbers."""
    model = text_model(5)
    got = run(model, kv_cache_dtype="fp8", shuffle_seed=2, poison=True, initial_pages=4, max_tokens_per_step=16)
    store = PagedContext.store

    def rounded(self: PagedContext, pages: Tensor, new: Tensor) -> None:
        store(self, pages, new.to(torch.float8_e4m3fn).to(new.dtype))

    with (
        mock.patch.object(PagedContext, "store", rounded),
        mock.patch("minim3.inference.runner.NativeDecodingModel.of", return_value=None),
        mock.patch("minim3.inference.runner.DecodingModel.of", return_value=None),
    ):
        want = run(model)
    for a, b in zip(got, want):
        assert a.output_ids == b.output_ids
        assert [p.chosen for p in a.logprobs] == pytest.approx([p.chosen for p in b.logprobs], abs=1e-4)
    assert [p.chosen for r in run(model) for p in r.logprobs] != [p.chosen for r in got for p in r.logprobs]


def test_what_is_out_of_range_saturates() -> None:
    """e4m3 ends at 448 and has no infinity."""
    context = PagedContext([], torch.zeros(1, 1), torch.tensor([3]), 4)
    pages = torch.zeros(1, 1, 4, 8).to(torch.float8_e4m3fn)
    context.store(pages, torch.tensor([500.0, -1e4, 3.0, 0.5] * 2).view(1, 1, 8))
    assert pages[0, 0, 3].float().tolist() == [448.0, -448.0, 3.0, 0.5] * 2


def test_an_unknown_dtype_is_named() -> None:
    with pytest.raises(ValueError, match="kv_cache_dtype is 'fp4'; known: auto, fp8"):
        Engine(text_model(5), kv_cache_dtype="fp4")
