"""The decoder of inference on Triton, interpreted: it computes what the modules compute, and stores the same."""

from typing import Any

import pytest
import torch

from minim3.model.fused import FusedModel
from minim3.model.layers import rotary_table
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
