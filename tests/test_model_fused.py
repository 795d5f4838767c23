"""The decoder of inference on Triton, interpreted: it computes what the modules compute, and stores the same."""

from dataclasses import replace
from typing import Any
from unittest import mock

import pytest
import torch

from minim3.inference.engine import Engine
from minim3.inference.request import SamplingParams
from minim3.model.batch import LayerPages
from minim3.model.fused import FusedModel
from minim3.model.layers import rotary_table
from minim3.model.quantization import quantize_model
from tests import tiny_models
from tests.interpreted import interpreted  # noqa: F401
from tests.test_model_decoding import cached, compare, embeddings

SHAPE = {"index_block_size": 16, "index_topk_blocks": 2}
MODELS: dict[str, dict[str, Any]] = {
    "plain": {},
    "forced blocks, lse scores, one KV head": {
        "index_topk_blocks": 3, "index_init_blocks": 1, "index_local_blocks": 2, "index_score_type": "lse",
        "num_key_value_heads": 1, "index_n_heads": 1,
    },
    "no shared expert, no bias, softmax": {"n_shared_experts": 0, "use_routing_bias": False, "scoring_func": "softmax"},
    "no limit, a large eps, all rotated": {"swiglu_limit": 0.0, "rms_norm_eps": 0.05, "rotary_dim": 16},
}  # fmt: skip


def prepared(**changes: Any) -> tuple[Any, FusedModel]:
    model = tiny_models.text_model(3, backend="triton", **{**SHAPE, **changes})
    model.pack_for_inference()
    fused = FusedModel.of(model.text_model)
    assert fused is not None
    return model, fused


@pytest.mark.parametrize("name", MODELS)
def test_it_computes_what_the_modules_compute(name: str) -> None:
    """A prompt, and a step of decoding beyond the budget of blocks, in company."""
    model, fused = prepared(**MODELS[name])
    for steps in ([(0, 5)], [(50, 1), (2, 2)]):
        compare(model, fused, steps, 16)


def test_a_mtp_module_computes_what_it_computes() -> None:
    model, fused = prepared(num_mtp_modules=1)
    module = model.text_model.mtp.layers[0]
    draft = fused.draft_module(module, model.text_config)
    batches = [cached(model, [(37, 2)], 16, num_draft_layers=1) for _ in range(2)]
    x, hidden = embeddings(batches[0]), embeddings(batches[0]).flip(1)
    with torch.inference_mode():
        got = draft.forward_packed(x, batches[0], hidden)
        turns = rotary_table(batches[1].positions, model.text_config.rotary_dim, model.text_config.rope_theta)
        want = module(hidden, embed_input=x, freqs_cis=turns, batch=batches[1])
    assert (got - want).abs().max() <= 1e-5 * want.abs().max()


def test_what_has_no_such_form_is_left_to_the_modules() -> None:
    """Gradients, a step without pages, a changed norm (of which there is a copy), a hook, another implementation."""
    model, fused = prepared()
    batch = cached(model, [(3, 1)], 16)
    x = embeddings(batch)
    assert fused.forward_packed(x, batch) is None
    with torch.no_grad():
        assert fused.forward_packed(x, batch) is not None
        model.text_model.layers[1].self_attn.q_norm.weight.add_(0.1)
        assert fused.forward_packed(x, batch) is None
        other, again = prepared()
        other.text_model.layers[0].mlp.register_forward_hook(lambda *_: None)
        assert again.forward_packed(x, cached(other, [(3, 1)], 16)) is None
    portable = tiny_models.text_model(3, **SHAPE)
    portable.pack_for_inference()
    assert FusedModel.of(portable.text_model) is None


@pytest.mark.parametrize("format", ["bf16", "mxfp8", "int8"])
def test_quantized_weights_run_and_are_no_graph(format: str) -> None:
    """Their projections have no `weight` to ask for, and their products may ask the device."""
    model = tiny_models.text_model(3, backend="triton", **SHAPE, hidden_size=64, intermediate_size=32)
    quantize_model(model, format)
    engine = Engine(model)
    fused = engine.runner.decoding
    assert isinstance(fused, FusedModel)
    assert "may ask the device" in (fused.why_no_graph(engine.cache.layers) or "")
    params = SamplingParams(max_new_tokens=3, temperature=0.0, ignore_eos=True)
    request = engine.add_request(tiny_models.random_ids(40).tolist(), params)
    engine.run()
    assert len(request.output_ids) == 3


def test_pages_that_no_kernel_takes_are_left_to_the_modules() -> None:
    """8 bits before compute capability 8.9."""
    model, fused = prepared()
    batch = cached(model, [(3, 1)], 16)
    assert batch.pages is not None
    eight = [LayerPages(*(None if x is None else x.to(torch.float8_e4m3fn) for x in (p.k, p.v, p.index_k)))
             for p in batch.pages.layers]  # fmt: skip
    batch = replace(batch, pages=replace(batch.pages, layers=eight))
    with torch.no_grad():
        assert fused.forward_packed(embeddings(batch), batch) is not None
        with mock.patch("minim3.kernels.availability.why_not_cache", return_value="too old"):
            assert fused.forward_packed(embeddings(batch), batch) is None


def test_autocast_is_left_to_the_modules() -> None:
    """Which know what must stay in fp32 (pitfall 19)."""
    model, fused = prepared()
    batch = cached(model, [(3, 1)], 16)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        assert fused.forward_packed(embeddings(batch), batch) is None


def test_another_implementation_is_not_asked_for_kernels_it_lacks() -> None:
    """`backend="native"` on head dimensions that C does not take: the modules run, and nothing is raised."""
    model = tiny_models.text_model(3, backend="native", head_dim=12, index_head_dim=12, index_n_heads=2)
    ids = tiny_models.random_ids(1, 9)
    model(ids, labels=ids).loss.backward()
    model.pack_for_inference()
    assert FusedModel.of(model.text_model) is None


def test_a_replaced_or_watched_norm_takes_part() -> None:
    """Norm and rotation in one pass know one class of norm, and call no hooks."""
    model = tiny_models.text_model(3, backend="triton", **SHAPE)
    ids = tiny_models.random_ids(1, 5)
    plain = model(ids).logits
    attention, seen = model.text_model.layers[1].self_attn, []
    handle = attention.q_norm.register_forward_hook(lambda *_: seen.append(1))
    assert torch.equal(model(ids).logits, plain) or (model(ids).logits - plain).abs().max() < 1e-5
    assert seen
    handle.remove()
    attention.q_norm = torch.nn.RMSNorm(16)
    assert (model(ids).logits - plain).abs().max() > 1e-4
