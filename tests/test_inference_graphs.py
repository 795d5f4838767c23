"""Steps of decoding as graphs: what is recorded at one step is right at every other, on Triton interpreted."""

import gc
import weakref

import pytest
import torch

from minim3.inference.engine import Engine
from minim3.inference.graphs import StepGraphs, bucket
from minim3.inference.request import SamplingParams
from minim3.model.fused import FusedModel
from tests.interpreted import interpreted  # noqa: F401
from tests.recorder import Recorder
from tests.tiny_models import random_ids, text_model

SHAPE = {"index_block_size": 16, "index_topk_blocks": 2, "num_hidden_layers": 2,
         "layer_types": ("full_attention", "minimax_m3_sparse"), "mlp_layer_types": ("dense", "sparse")}  # fmt: skip


@pytest.fixture(autouse=True)
def few_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keys split over as many programs as fill a GPU take long to interpret. Every bucket has room for one more."""
    from minim3.inference import graphs
    from minim3.kernels.triton import decode, select

    monkeypatch.setattr(graphs, "bucket", lambda count: count + 1)

    monkeypatch.setattr(decode, "_PROGRAMS", 12)
    monkeypatch.setattr(select, "_PROGRAMS", 4)


def engine_with(graphs: bool, changes: dict | None = None, **options) -> Engine:
    model = text_model(2, backend="triton", **SHAPE, **(changes or {}))
    engine = Engine(model, **options)
    assert isinstance(engine.runner.decoding, FusedModel)
    assert engine.runner.graphs is None  # there is no GPU
    assert engine.runner.decoding.why_no_graph(engine.cache.layers) is None
    if graphs:
        engine.runner.graphs = Counted(model, engine.runner.decoding, engine.cache, Recorder(), after=2)
    return engine


class Counted(StepGraphs):
    """Counts the steps that ran as a graph."""

    num_run = 0

    def run(self, *args) -> torch.Tensor | None:
        found = super().run(*args)
        self.num_run += found is not None
        return found


def answers(engine: Engine, lengths: list[int], tokens: list[int], first: int = 0) -> list[list[int]]:
    requests = []
    for seed, (length, count) in enumerate(zip(lengths, tokens), first):
        params = SamplingParams(max_new_tokens=count, temperature=0.0, ignore_eos=True)
        requests.append(engine.add_request(random_ids(length, seed=seed).tolist(), params))
    engine.run()
    return [request.output_ids for request in requests]


@pytest.mark.parametrize("dtype", ["auto", "fp8"])
def test_graphs_give_the_tokens_of_single_launches(dtype: str) -> None:
    """Two requests in a bucket of three, then one; one takes a new page after the recording. Free pages hold NaN."""
    lengths, tokens = [45, 9], [7, 6]
    options = {"poison": True, "kv_cache_dtype": dtype}
    want = answers(engine_with(False, **options), lengths, tokens)
    engine = engine_with(True, **options)
    graphs = engine.runner.graphs
    assert answers(engine, lengths, tokens) == want
    assert (graphs.num_recorded, graphs.num_run) == (1, 4)
    engine.check_integrity()


def test_graphs_are_dropped_when_the_cache_grows_or_the_model_changes() -> None:
    """A graph holds addresses: after either it would read what is no longer there."""
    lengths, tokens = [20], [6]
    engine = engine_with(True, initial_pages=2, prefix_caching=False)
    graphs = engine.runner.graphs
    want = [answers(engine_with(False), lengths, tokens, first) for first in (0, 7)]
    assert answers(engine, lengths, tokens) == want[0]
    recorded, run = graphs.num_recorded, graphs.num_run
    assert run
    old = weakref.ref(engine.cache.layers[0].k)
    engine.cache.pool._grow_to(8)
    gc.collect()
    assert old() is None, "graphs keep the pages that a growing cache lets go"
    assert answers(engine, lengths, tokens, 7) == want[1]
    assert graphs.num_recorded > recorded
    assert graphs._record.num_forgotten == 1
    run = graphs.num_run
    norm = engine.model.text_model.norm
    norm.weight.data = norm.weight.data.clone()
    assert answers(engine, lengths, tokens) == want[0]
    assert graphs.num_run == run


def test_nothing_is_recorded_under_autocast() -> None:
    """A graph would hold the addresses of weights that autocast has cast, and lets go when it ends."""
    engine = engine_with(True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        batch = [[1], [0], [0], [1], [1]]
        request = engine.add_request([3], SamplingParams(max_new_tokens=1))
        assert engine.runner.graphs.run([request], *batch) is None
    assert engine.runner.graphs.num_recorded == 0


def test_a_graph_that_reads_freed_memory_is_found() -> None:
    """The recorder of these tests keeps alive no more than a graph does."""
    held = [torch.ones(3)]
    replay, out = Recorder()(lambda: held[0][1:] + 1)
    held[0].fill_(4.0)
    replay()
    assert out.tolist() == [5.0, 5.0]
    held.clear()
    with pytest.raises(AssertionError, match="reads freed memory"):
        replay()


def test_drafts_are_verified_in_graphs() -> None:
    """Several new tokens of each request; where their numbers differ, a step runs without a graph."""
    lengths, tokens = [21, 34], [6, 6]
    changes = {"num_mtp_modules": 1}
    want = answers(engine_with(False, changes), lengths, tokens)
    engine = engine_with(True, changes, num_speculative_tokens=2)
    assert answers(engine, lengths, tokens) == want
    assert engine.runner.graphs.num_run


def test_buckets() -> None:
    assert [bucket(n) for n in (1, 2, 3, 4, 5, 6, 7, 9, 13, 17, 100, 129, 200, 256)] == [
        1, 2, 3, 4, 6, 6, 8, 12, 16, 24, 128, 192, 256, 256
    ]  # fmt: skip


def test_what_a_graph_cannot_hold_is_found() -> None:
    """The recorder of these tests refuses what a capture refuses."""
    for run in (lambda: torch.ones(2).sum().item(), lambda: torch.tensor([1, 2]), lambda: torch.ones(3).nonzero()):
        with pytest.raises(AssertionError, match="cannot hold"):
            Recorder()(run)
