"""Models with parts that their checkpoint lacks: indexers for a dense one, MTP modules; and products in bf16."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from minim3.model.batch import ForwardBatch, ForwardRecord
from minim3.model.moe import MiniMaxM3Router
from minim3.training.checkpointing import checkpoint_activations
from minim3.training.config import LossRecipe, SparseConversionRecipe, TrainingConfig, parse_recipe
from minim3.training.conversion import add_indexers, add_mtp_modules, build_model
from minim3.training.data import Batch
from minim3.training.loss import compute_losses
from minim3.training.precision import compute_in_bf16
from tests.tiny_models import random_ids, text_config, text_model, vl_model

INDEX = {"block_size": 4, "topk_blocks": 2}
DENSE = {"layer_types": ("full_attention",) * 3}


@pytest.fixture(autouse=True)
def standins(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parent))


def recipe_for(checkpoint: Path, **model: Any) -> TrainingConfig:
    sources = [{"name": "training_standins:ToySource"}]
    return parse_recipe(
        {
            "output": "unused",
            "steps": 1,
            "model": {"start_from": str(checkpoint), **model},
            "data": {"processor": "training_standins:ToyProcessor", "sources": sources},
        }
    )


def text_batch(length: int = 40) -> Batch:
    ids = random_ids(length)
    return Batch(ids, ids.roll(-1), (length,), ("",))


def logits(model: Any, length: int, attend_all: bool = False) -> Tensor:
    ids = random_ids(length)
    packing = ForwardBatch.packed((length,), attend_all=attend_all)
    with torch.no_grad():
        return model.compute_logits(model.text_model.forward_packed(model.embed_tokens_packed(ids), packing))


def save(model: Any, path: Path) -> Path:
    model.save_pretrained(path, format="fp32")
    return path


@pytest.mark.parametrize("make", [text_model, vl_model])
def test_a_converted_model_is_the_dense_one_up_to_its_budget_and_under_dense_attention(
    tmp_path: Path, make: Callable[..., Any]
) -> None:
    dense = make(seed=5, num_mtp_modules=1, **DENSE)
    sparse = build_model(recipe_for(save(dense, tmp_path / "dense"), convert_to_sparse=INDEX))
    assert sparse.text_config.layer_types == ("full_attention", "minimax_m3_sparse", "minimax_m3_sparse")
    kept, now = dense.state_dict(), sparse.state_dict()
    assert {name for name in now if name not in kept} == {name for name in now if ".indexer." in name}
    assert len(now) - len(kept) == 4 * 3  # two layers and the MTP module's
    assert all(torch.equal(now[name], kept[name]) for name in kept)
    torch.testing.assert_close(logits(sparse, 8), logits(dense, 8))
    torch.testing.assert_close(logits(sparse, 40, attend_all=True), logits(dense, 40))
    assert float((logits(sparse, 40) - logits(dense, 40)).abs().max()) > 1e-3


@pytest.mark.filterwarnings("ignore:transformers ignores")
def test_a_converted_model_is_saved_and_loaded_like_any_other(tmp_path: Path) -> None:
    """A config that still said dense would refuse its own indexers."""
    first = save(vl_model(seed=5, **DENSE), tmp_path / "dense")
    sparse = build_model(recipe_for(first, convert_to_sparse={**INDEX, "layers": [0, 2], "score_type": "lse"}))
    saved = save(sparse, tmp_path / "sparse")
    loaded = build_model(recipe_for(saved))
    assert loaded.config == type(loaded).config_of(sparse.config, "")
    config = loaded.text_config
    assert [config.is_sparse_attention_layer(i) for i in range(3)] == [True, False, True]
    assert (config.index_n_heads, config.index_head_dim, config.index_topk_blocks) == (2, 16, 2)
    assert config.index_score_type == "lse"
    torch.testing.assert_close(logits(loaded, 40), logits(sparse, 40))
    with pytest.raises(ValueError, match=r"layers \[0, 2\] of this one have an indexer already"):
        build_model(recipe_for(saved, convert_to_sparse=INDEX))


def test_fresh_parts_are_drawn_from_the_seed() -> None:
    """Drawn otherwise, a run that is resumed would start from a model of its own."""
    weights = []
    for seed in (0, 0, 1):
        model = text_model(seed=5, **DENSE)
        torch.manual_seed(seed)
        add_indexers(model, SparseConversionRecipe(**INDEX))
        add_mtp_modules(model, 2)
        weights.append({name: tensor.clone() for name, tensor in model.state_dict().items()})
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    drawn = {name for name in weights[0] if not torch.equal(weights[0][name], weights[2][name])}
    assert drawn
    assert all(".indexer." in name or ".mtp." in name for name in drawn)
    deviation = weights[0]["model.layers.1.self_attn.indexer.index_q_proj.weight"].std()
    assert 0.5 < float(deviation) / text_config().initializer_range < 2
    assert not weights[0]["model.layers.1.self_attn.indexer.index_q_norm.weight"].any()


def test_conversions_that_cannot_be_are_refused(tmp_path: Path) -> None:
    folder = save(text_model(**DENSE), tmp_path / "dense")
    with pytest.raises(ValueError, match="names layer 3; the model has layers 0 to 2"):
        build_model(recipe_for(folder, convert_to_sparse={**INDEX, "layers": [3]}))
    with pytest.raises(ValueError, match="at least one layer"):
        build_model(recipe_for(folder, convert_to_sparse={**INDEX, "layers": []}))
    with pytest.raises(ValueError, match="index_head_dim 4 is smaller than rotary_dim 8"):
        build_model(recipe_for(folder, convert_to_sparse={**INDEX, "head_dim": 4}))
    with pytest.raises(ValueError, match=r"did you mean .model\.convert_to_sparse\.topk_blocks."):
        recipe_for(folder, convert_to_sparse={"block_size": 4, "topk": 2})
    with pytest.raises(ValueError, match="a model from scratch has sparse layers and MTP modules by its config"):
        parse_recipe({**recipe_for(folder).to_dict(), "model": {"config": {}, "add_mtp_modules": 1}})


def test_mtp_modules_are_added_where_the_config_announces_them_and_the_checkpoint_has_none(tmp_path: Path) -> None:
    """The released state of affairs: num_mtp_modules in the config, no tensor of them (pitfall 23)."""
    import json

    base = vl_model(seed=5)
    folder = save(base, tmp_path / "base")
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["num_mtp_modules"] = 2
    (folder / "config.json").write_text(json.dumps(config))
    assert build_model(recipe_for(folder)).text_model.mtp is None
    model = build_model(recipe_for(folder, add_mtp_modules=1))
    assert model.text_config.num_mtp_modules == 1
    kept, now = base.state_dict(), model.state_dict()
    assert all(torch.equal(now[name], kept[name]) for name in kept)
    assert {".mtp." in name for name in now.keys() - kept.keys()} == {True}
    assert model.config.text_config is model.text_config is model.text_model.mtp.config
    saved = save(model, tmp_path / "with_mtp")
    loaded = build_model(recipe_for(saved))
    assert torch.equal(
        compute_losses(loaded, text_batch(), LossRecipe(mtp_weight=1.0)).parts["mtp"],
        compute_losses(model, text_batch(), LossRecipe(mtp_weight=1.0)).parts["mtp"],
    )
    with pytest.raises(ValueError, match="the checkpoint has 1 MTP modules"):
        build_model(recipe_for(saved, add_mtp_modules=1))


# Products in bf16


def everything(z_weight: float = 0.1) -> LossRecipe:
    return LossRecipe(mtp_weight=0.3, indexer_kl_weight=0.5, router_aux_weight=0.1, z_weight=z_weight)


def test_bf16_products_leave_weights_and_gradients_in_fp32() -> None:
    model, plain = vl_model(num_mtp_modules=1), vl_model(num_mtp_modules=1)
    compute_in_bf16(model)
    record = ForwardRecord(hidden_states=[], router_logits=[])
    ids = random_ids(40)
    model.text_model.forward_packed(model.embed_tokens_packed(ids), ForwardBatch.packed((40,)), record)
    assert {state.dtype for state in record.hidden_states or []} == {torch.bfloat16}
    assert {state.dtype for state in record.router_logits or []} == {torch.float32}
    losses = compute_losses(model, text_batch(), everything())
    expected = compute_losses(plain, text_batch(), everything())
    losses.total.backward()
    expected.total.backward()
    assert model.state_dict().keys() == plain.state_dict().keys()
    assert losses.total.dtype == torch.float32
    close = 0
    for (name, parameter), (_, reference) in zip(model.named_parameters(), plain.named_parameters(), strict=True):
        assert parameter.dtype == torch.float32, name
        assert isinstance(parameter, torch.nn.Parameter)
        if reference.grad is None:
            assert parameter.grad is None, name
            continue
        assert parameter.grad is not None, name
        assert parameter.grad.dtype == torch.float32, name
        close += torch.cosine_similarity(parameter.grad.flatten(), reference.grad.flatten(), dim=0) > 0.9
    assert close > 0.8 * sum(p.grad is not None for p in plain.parameters())
    assert losses.parts["next_token"] != expected.parts["next_token"]
    assert float(losses.parts["next_token"]) == pytest.approx(float(expected.parts["next_token"]), rel=0.02)
    assert not any("weight" in module.__dict__ for module in model.modules()), "a cast weight was left behind"


def test_bf16_products_sum_gradients_of_batches_in_fp32() -> None:
    """In bf16 the hundredth batch of a step would add nothing."""
    model = text_model()
    compute_in_bf16(model)
    for _ in range(100):
        compute_losses(model, text_batch(12), LossRecipe()).total.backward()
    gradient = model.text_model.layers[0].mlp.up_proj.weight.grad
    assert gradient is not None
    summed = gradient.clone()
    model.zero_grad()
    compute_losses(model, text_batch(12), LossRecipe()).total.backward()
    torch.testing.assert_close(summed, 100 * model.text_model.layers[0].mlp.up_proj.weight.grad, rtol=1e-4, atol=1e-7)


def test_small_updates_are_not_lost_to_bf16() -> None:
    """A bf16 weight of 1 moves by 2**-8 or not at all."""
    model = text_model()
    compute_in_bf16(model)
    weight = model.text_model.layers[0].mlp.up_proj.weight
    before = weight.detach().clone()
    optimizer = torch.optim.AdamW([weight], lr=1e-6, weight_decay=0.0)
    for _ in range(5):
        compute_losses(model, text_batch(12), LossRecipe()).total.backward()
        optimizer.step()
        model.zero_grad()
    moved = (weight.detach() - before).abs()
    assert float(moved.median()) == pytest.approx(5e-6, rel=0.2)


def test_bf16_products_and_checkpointing_go_together() -> None:
    """The second pass runs outside of the forward call: what was cast for that alone would be gone."""
    found = []
    for checkpointed in (False, True):
        model = vl_model(num_mtp_modules=1)
        if checkpointed:
            checkpoint_activations(model)
        compute_in_bf16(model)
        compute_losses(model, text_batch(), everything()).total.backward()
        found.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert found[0].keys() == found[1].keys()
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


def test_the_router_decides_in_fp32_whatever_the_precision() -> None:
    model = text_model()
    compute_in_bf16(model)
    (router, *_) = (module for module in model.modules() if isinstance(module, MiniMaxM3Router))
    x = torch.randn(5, 32)
    assert torch.equal(router(x), torch.nn.functional.linear(x, router.weight))
