"""Steps of few new tokens: both forms of the decoder compute what the modules compute, in any company and state."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from minim3.inference.cache import PagedCache
from minim3.inference.request import Request, SamplingParams
from minim3.kernels import native
from minim3.kernels.portable.plan import Scratch
from minim3.model.batch import ForwardBatch, PagedContext
from minim3.model.causal_lm import MiniMaxM3SparseForCausalLM
from minim3.model.decoding import DecodingModel
from minim3.model.native_decoding import NativeDecodingModel
from tests import tiny_models

PROPERTY = settings(max_examples=40, deadline=None, derandomize=True)
Form = type[DecodingModel] | type[NativeDecodingModel]
NEEDS_COMPILER = pytest.mark.skipif(native.why_not() is not None, reason=str(native.why_not()))
both_forms = pytest.mark.parametrize(
    "form", [DecodingModel, pytest.param(NativeDecodingModel, marks=NEEDS_COMPILER)], ids=["portable", "native"]
)
Steps = list[tuple[int, int]]
"""A sequence each: tokens that are stored, and new ones."""


def cached(
    model: MiniMaxM3SparseForCausalLM, steps: Steps, page_size: int, seed: int = 0, num_draft_layers: int = 0
) -> ForwardBatch:
    """A batch whose past is random, in shuffled pages; every place that holds no token holds NaN."""
    cache = PagedCache(
        model.text_config, page_size=page_size, num_pages=4, shuffle_seed=seed, poison=True,
        num_draft_layers=num_draft_layers,
    )  # fmt: skip
    generator = torch.Generator().manual_seed(seed)
    table, slots, positions = [], list[int](), list[int]()
    for stored, new in steps:
        length = stored + new
        request = Request(
            request_id="r", token_ids=[3] * length, num_prompt_tokens=length, max_new_tokens=1, params=SamplingParams()
        )
        cache.extend(request, length)
        for layer in cache.layers:
            past = cache.slots(request, 0, stored)
            for pages in (layer.k, layer.v, layer.index_k):
                if pages is not None:
                    for slot in past:
                        place = pages[slot // page_size]
                        token = place[..., slot % page_size, :]
                        token.copy_(torch.randn(token.shape, generator=generator))
        slots += cache.slots(request, stored, length)
        positions += range(stored, length)
        table.append(request.pages)
    width = max(map(len, table)) + 1
    rows = torch.tensor([pages + [0] * (width - len(pages)) for pages in table])
    context = PagedContext(cache.layers, rows, torch.tensor(slots), page_size)
    lengths = tuple(new for _, new in steps), tuple(stored + new for stored, new in steps)
    return ForwardBatch(torch.tensor(positions), *lengths, context)


def prepared(model: MiniMaxM3SparseForCausalLM, form: Form) -> DecodingModel | NativeDecodingModel:
    model.pack_for_inference()
    decoding = form.of(model.text_model)
    assert decoding is not None
    return decoding


def embeddings(batch: ForwardBatch, width: int = 32) -> Tensor:
    return torch.randn(batch.num_tokens, width, generator=torch.Generator().manual_seed(batch.num_tokens))


def step_of(model: MiniMaxM3SparseForCausalLM, steps: Steps, page_size: int = 4) -> tuple[Tensor, ForwardBatch]:
    batch = cached(model, steps, page_size)
    return embeddings(batch), batch


def compare(
    model: MiniMaxM3SparseForCausalLM, decoding: DecodingModel | NativeDecodingModel, steps: Steps, page_size: int = 4
) -> None:
    """Hidden states and what was stored, against the modules on a cache of the same content."""
    ours, theirs = cached(model, steps, page_size), cached(model, steps, page_size)
    x = embeddings(ours, model.text_config.hidden_size)
    with torch.inference_mode():
        got = decoding.forward_packed(x, ours)
        want = model.text_model.forward_packed(x, theirs)
        nudged = [
            model.text_model.forward_packed(
                x * (1 + 1e-6 * torch.randn(x.shape, generator=torch.Generator().manual_seed(n))),
                cached(model, steps, page_size),
            )
            for n in range(2)
        ]
    assert got is not None
    assert torch.isfinite(got).all()
    bound = 1e-5 * want.abs().max()
    # A near tie of blocks or experts, which the modules themselves decide otherwise for a nudge, is no difference.
    tied = torch.stack([(other - want).abs().amax(1) > 10 * bound for other in nudged]).any(0)
    assert tied.sum() <= max(1, len(tied) // 50)
    assert (got - want).abs().amax(1)[~tied].max() <= bound
    assert ours.pages is not None
    assert theirs.pages is not None
    for a, b in zip(ours.pages.layers, theirs.pages.layers):
        for mine, other in ((a.k, b.k), (a.v, b.v), (a.index_k, b.index_k)):
            if mine is not None:
                assert other is not None
                assert torch.equal(mine.isnan(), other.isnan()), "a token was stored in the wrong place"
                assert (mine - other).nan_to_num(0.0).abs().max() <= 1e-5 * other.nan_to_num(0.0).abs().max()


MODELS: dict[str, dict[str, Any]] = {
    "plain": {},
    "forced blocks, lse scores": {"index_topk_blocks": 4, "index_init_blocks": 1, "index_local_blocks": 2,
                                  "index_score_type": "lse"},
    "no shared expert, no bias": {"n_shared_experts": 0, "use_routing_bias": False, "scoring_func": "softmax"},
    "shared expert of the routed width": {"shared_intermediate_size": 24},
    "no limit, other slope and offset": {"swiglu_limit": 0.0, "swiglu_alpha": 1.0, "swiglu_beta": 0.5},
    "a limit that is reached, a large eps": {"swiglu_limit": 0.3, "rms_norm_eps": 0.05},
    "a KV head a query head": {"num_key_value_heads": 4, "index_n_heads": 4},
    "one KV head": {"num_key_value_heads": 1, "index_n_heads": 1},
    "all experts, every dimension rotated": {"num_experts_per_tok": 4, "rotary_dim": 16},
}  # fmt: skip


@both_forms
@pytest.mark.parametrize("name", MODELS)
def test_it_computes_what_the_modules_compute(form: Form, name: str) -> None:
    model = tiny_models.text_model(3, **MODELS[name])
    decoding = prepared(model, form)
    for steps in ([(0, 1)], [(3, 1)], [(4, 1)], [(7, 1)], [(8, 1)], [(30, 1)], [(31, 1)], [(32, 1)],
                  [(30, 1), (2, 1)], [(30, 1), (2, 1), (17, 1), (64, 1)], [(28, 3)], [(40, 4), (21, 4)]):  # fmt: skip
        compare(model, decoding, steps)


@both_forms
@PROPERTY
@given(st.lists(st.tuples(st.integers(0, 60), st.integers(1, 3)), min_size=1, max_size=6), st.sampled_from([4, 2, 8]))
def test_any_step_it_takes_is_right(form: Form, steps: Steps, page_size: int) -> None:
    """Mixed lengths, decoding and verification in one step, pages that are not blocks."""
    model = tiny_models.text_model(1)
    decoding = prepared(model, form)
    with torch.inference_mode():
        taken = decoding.forward_packed(*step_of(model, steps, page_size)) is not None
    if taken:
        compare(model, decoding, steps, page_size)
    else:  # some sequence has a query within the budget and another beyond it
        assert form is DecodingModel
        assert any(stored + 1 <= 8 < stored + new for stored, new in steps)


@both_forms
@pytest.mark.parametrize("page_size", [4, 2, 8])
@pytest.mark.parametrize("shuffle_seed", [None, 1])
def test_step_after_step_is_right(form: Form, page_size: int, shuffle_seed: int | None) -> None:
    """Tables go on from step to step: into the next row, block and page, past the budget, and back."""
    model = tiny_models.text_model(2, index_score_type="max")
    decoding, scratch = prepared(model, form), Scratch()
    config = model.text_config
    caches = [PagedCache(config, page_size=page_size, shuffle_seed=shuffle_seed, poison=True) for _ in range(2)]
    request = Request(request_id="r", token_ids=[3], num_prompt_tokens=1, max_new_tokens=1, params=SamplingParams())
    x = torch.randn(40, 32, generator=torch.Generator().manual_seed(0))
    for cache in caches:
        request.pages = []
        cache.extend(request, 40)
    pages = torch.tensor([request.pages])
    for position in [*range(40), *range(11, 25), 30, 32, 33, 33]:
        slot = torch.tensor(caches[0].slots(request, position, position + 1))
        ours, theirs = (
            ForwardBatch(
                torch.tensor([position]), (1,), (position + 1,),
                PagedContext(cache.layers, pages, slot, page_size, scratch if cache is caches[0] else None),
            )
            for cache in caches
        )  # fmt: skip
        with torch.inference_mode():
            got = decoding.forward_packed(x[position : position + 1], ours)
            want = model.text_model.forward_packed(x[position : position + 1], theirs)
        assert got is not None
        assert (got - want).abs().max() <= 1e-5 * want.abs().max(), position


@both_forms
@pytest.mark.parametrize("page_size", [4, 8])
def test_steps_of_a_few_tokens_go_on_from_each_other(form: Form, page_size: int) -> None:
    """Verification of drafts: two or three tokens, of which one or more stay; into the next row, past the budget."""
    model = tiny_models.text_model(2)
    decoding, scratch = prepared(model, form), Scratch()
    caches = [PagedCache(model.text_config, page_size=page_size, shuffle_seed=1, poison=True) for _ in range(2)]
    request = Request(request_id="r", token_ids=[3], num_prompt_tokens=1, max_new_tokens=1, params=SamplingParams())
    x = torch.randn(60, 32, generator=torch.Generator().manual_seed(0))
    for cache in caches:
        request.pages = []
        cache.extend(request, 60)
    pages, start = torch.tensor([request.pages]), 0
    for count, kept in [
        (1, 1),
        (2, 1),
        (2, 2),
        (2, 1),
        (2, 2),
        (3, 1),
        (2, 2),
        (2, 1),
        (3, 3),
        (2, 2),
        (2, 2),
        (2, 1),
        (3, 2),
    ] * 2:
        positions = torch.arange(start, start + count)
        slots = torch.tensor(caches[0].slots(request, start, start + count))
        ours, theirs = (
            ForwardBatch(
                positions, (count,), (start + count,),
                PagedContext(cache.layers, pages, slots, page_size, scratch if cache is caches[0] else None),
            )
            for cache in caches
        )  # fmt: skip
        with torch.inference_mode():
            got = decoding.forward_packed(x[start : start + count], ours)
            want = model.text_model.forward_packed(x[start : start + count], theirs)
        if got is None:  # one query within the budget, one beyond it
            assert form is DecodingModel
            assert start < 8 < start + count
            for ours_layer, theirs_layer in zip(caches[0].layers, caches[1].layers, strict=True):
                for mine, right in zip(ours_layer.tokens, theirs_layer.tokens, strict=True):
                    mine.copy_(right)
        else:
            assert (got - want).abs().max() <= 1e-5 * want.abs().max(), (start, count)
        start += kept


@both_forms
def test_tables_of_other_pages_are_not_gone_on_from(form: Form) -> None:
    """Two sequences that take turns, one a token ahead: their lengths follow each other, their pages do not."""
    model = tiny_models.text_model(2)
    decoding, scratch = prepared(model, form), Scratch()
    for seed in range(6):
        stored = 17 + seed % 2  # in the same row of another sequence's pages
        steps = [(stored, 1)]
        ours, theirs = cached(model, steps, 4, seed), cached(model, steps, 4, seed)
        assert ours.pages is not None
        ours = replace(ours, pages=replace(ours.pages, scratch=scratch))
        x = embeddings(ours)
        with torch.inference_mode():
            got = decoding.forward_packed(x, ours)
            want = model.text_model.forward_packed(x, theirs)
        assert got is not None
        assert (got - want).abs().max() <= 1e-5 * want.abs().max()


@both_forms
def test_the_answer_of_a_step_does_not_change_in_the_next(form: Form) -> None:
    """Buffers are used again; what was returned must not be one of them."""
    model = tiny_models.text_model()
    decoding = prepared(model, form)
    batch = cached(model, [(9, 1)], 4)
    with torch.inference_mode():
        first = decoding.forward_packed(embeddings(batch), batch)
        assert first is not None
        kept = first.clone()
        decoding.forward_packed(-embeddings(batch), batch)
    assert torch.equal(first, kept)


@both_forms
def test_it_works_outside_of_inference_mode_after_it(form: Form) -> None:
    model = tiny_models.text_model()
    decoding = prepared(model, form)
    for mode in (torch.inference_mode, torch.no_grad, torch.inference_mode):
        batch = cached(model, [(9, 1)], 4)
        with mode():
            assert decoding.forward_packed(embeddings(batch), batch) is not None


@both_forms
def test_a_model_made_in_inference_mode_is_run_too(form: Form) -> None:
    """Its weights count no changes, and may not be written to outside of that mode."""
    with torch.inference_mode():
        model = tiny_models.text_model()
        decoding = prepared(model, form)
        compare(model, decoding, [(9, 1)])
        compare(model, decoding, [(9, 1), (3, 2)])


def _replace_parameter(model: Any) -> None:
    attention = model.text_model.layers[1].self_attn
    attention.o_proj.weight = nn.Parameter(attention.o_proj.weight.detach() * 2)


def _change_norm(model: Any) -> None:
    with torch.no_grad():
        model.text_model.layers[2].self_attn.q_norm.weight.add_(1.0)


def _replace_module(model: Any) -> None:
    attention = model.text_model.layers[0].self_attn
    attention.o_proj = nn.Sequential(attention.o_proj, nn.Tanh())


def _hook(model: Any) -> None:
    model.text_model.layers[1].register_forward_hook(lambda module, args, out: out * 2)


def _change_data(model: Any) -> None:
    moe = model.text_model.layers[1].block_sparse_moe
    moe.experts.w2.data = moe.experts.w2.data * 2


@both_forms
@pytest.mark.parametrize("change", [_replace_parameter, _change_norm, _replace_module, _hook, _change_data])
def test_a_model_that_changed_is_not_run_as_it_was(form: Form, change: Any) -> None:
    """A weight, a module or a hook that came after preparation would be left out without a word."""
    model = tiny_models.text_model()
    decoding = prepared(model, form)
    step = step_of(model, [(9, 1)])
    with torch.inference_mode():
        assert decoding.forward_packed(*step) is not None
        change(model)
        assert decoding.forward_packed(*step) is None


@both_forms
def test_what_has_no_such_form_is_left_to_the_modules(form: Form) -> None:
    """Other dtypes, the reference, hooks, modules of other classes, long steps, and steps without pages."""
    for model in (tiny_models.text_model().bfloat16(), tiny_models.text_model(backend="reference")):
        model.pack_for_inference()
        assert form.of(model.text_model) is None
    model = tiny_models.text_model()
    assert form.of(model.text_model) is None, "nothing is packed yet"
    decoding = prepared(model, form)
    with torch.inference_mode():
        assert decoding.forward_packed(torch.zeros(1, 32), ForwardBatch.packed([1])) is None
        assert decoding.forward_packed(*step_of(model, [(20, 1), (0, 513)])) is None
    assert decoding.forward_packed(*step_of(model, [(20, 1)])) is None, "a graph may be wanted"


def test_an_adapter_in_the_place_of_a_projection_takes_part() -> None:
    """Modules in the places of linear layers, such as adapters, are called."""
    model: Any = tiny_models.text_model(shared_intermediate_size=24)
    for layer in model.text_model.layers:
        layer.self_attn.o_proj = nn.Sequential(layer.self_attn.o_proj, nn.Tanh())
    mlp = model.text_model.layers[2].block_sparse_moe.shared_experts
    mlp.down_proj = nn.Sequential(mlp.down_proj, nn.Tanh())
    decoding = prepared(model, DecodingModel)
    assert NativeDecodingModel.of(model.text_model) is None, "it would leave the adapters out"
    for steps in ([(9, 1)], [(9, 1), (20, 1)]):
        compare(model, decoding, steps)
