"""Gradients of the whole model: against finite differences, packed against separate, accumulated against whole."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from minim3.model.batch import ForwardBatch, ForwardRecord, LayerChoices
from minim3.training.config import LossRecipe
from minim3.training.data import Batch, BatchBuilder
from minim3.training.loss import LossCounts, compute_losses

EVERYTHING = LossRecipe(
    mtp_weight=0.3, indexer_kl_weight=0.5, router_aux_weight=0.2, recall_every_steps=0, logit_chunk_tokens=7
)
DENSE = replace(EVERYTHING, indexer_kl_form="dense")


@pytest.fixture(autouse=True)
def standins(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parent))


@pytest.fixture
def model() -> Any:
    from training_standins import toy_model

    model = toy_model()
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():  # norms and biases away from neutral: they count too
            if parameter.ndim == 1:
                parameter += 0.2 * torch.randn_like(parameter)
            elif "index_" in name:
                parameter *= 2
    return model


@pytest.fixture
def batch() -> Batch:
    from training_standins import toy_recipe

    data = replace(toy_recipe("unused").data, tokens_per_batch=64)
    packed = BatchBuilder(data, data.sources, seed=0, split=0).build(1)
    assert packed.pixel_values is not None
    assert max(packed.lengths) > 8, "no document has more blocks than a query may choose"
    return replace(packed, pixel_values=packed.pixel_values.double())


def gradients(model: Any, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad(set_to_none=True)
    loss.backward(retain_graph=True)
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same(one: dict[str, Tensor], other: dict[str, Tensor], tolerance: float) -> None:
    assert one.keys() == other.keys()
    for name, gradient in one.items():
        scale = float(other[name].abs().max())
        assert float((gradient - other[name]).abs().max()) <= tolerance * max(scale, 1e-9), name


@pytest.mark.parametrize("recipe", [EVERYTHING, DENSE], ids=["sparse", "dense"])
def test_every_loss_has_the_gradient_of_its_finite_differences(model: Any, batch: Batch, recipe: LossRecipe) -> None:
    """Along a random direction of every parameter, with the choice of blocks and experts held and the teacher fixed."""
    choices: dict[int, LayerChoices] = {}
    parts = compute_losses(model, batch, recipe, choices=choices).parts
    assert parts.keys() == {"next_token", "mtp", "indexer_kl", "router_aux"}
    assert (choices[1].block_indices is None) == (recipe is DENSE)
    analytic = {name: gradients(model, part) for name, part in parts.items()}
    generator, step = torch.Generator().manual_seed(2), 1e-5
    for name, parameter in model.named_parameters():
        direction = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        found = []
        with torch.no_grad():
            start = parameter.clone()
            for sign in (1, -1):
                parameter.copy_(start + sign * step * direction)
                found.append(compute_losses(model, batch, recipe, choices=choices).parts)
            parameter.copy_(start)
        for part, by_name in analytic.items():
            if part == "indexer_kl" and ".indexer." not in name:
                assert name not in by_name, "the teacher and the indexer's input must not be moved"
                continue
            difference = float(found[0][part] - found[1][part]) / (2 * step)
            slope = float((by_name[name] * direction).sum()) if name in by_name else 0.0
            assert difference == pytest.approx(slope, rel=1e-5, abs=1e-8), (part, name)
    assert all(float(g.abs().max()) > 0 for by_name in analytic.values() for g in by_name.values())


def test_the_z_loss_has_the_gradient_of_its_finite_differences(model: Any, batch: Batch) -> None:
    recipe, choices, step = LossRecipe(z_weight=0.7), {}, 1e-5  # type: ignore[var-annotated]
    losses = compute_losses(model, batch, recipe, choices=choices)
    torch.testing.assert_close(losses.total, losses.parts["next_token"] + 0.7 * losses.parts["z_loss"])
    analytic = gradients(model, losses.total)
    generator = torch.Generator().manual_seed(2)
    for name in ("lm_head.weight", "model.layers.0.self_attn.q_proj.weight", "model.embed_tokens.weight"):
        parameter = model.get_parameter(f"language_model.{name}")
        direction = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        found = []
        with torch.no_grad():
            start = parameter.clone()
            for sign in (1, -1):
                parameter.copy_(start + sign * step * direction)
                found.append(float(compute_losses(model, batch, recipe, choices=choices).total))
            parameter.copy_(start)
        slope = float((analytic[f"language_model.{name}"] * direction).sum())
        assert (found[0] - found[1]) / (2 * step) == pytest.approx(slope, rel=1e-6), name


def test_choices_that_were_kept_are_followed(model: Any, batch: Batch) -> None:
    """Without it finite differences jump where a choice flips, and recomputation walks another way than the forward."""
    choices: dict[int, LayerChoices] = {}
    before = compute_losses(model, batch, EVERYTHING, choices=choices)
    kept = choices[1]
    assert kept.block_indices is not None
    assert kept.expert_ids is not None
    blocks, experts = kept.block_indices.clone(), kept.expert_ids.clone()
    for module in model.modules():
        if hasattr(module, "e_score_correction_bias"):
            module.e_score_correction_bias += torch.tensor([3.0, 2.0, 1.0, 0.0])
    with torch.no_grad():
        model.text_model.layers[1].self_attn.indexer.index_q_proj.weight.neg_()
    after = compute_losses(model, batch, EVERYTHING, choices=choices)
    assert torch.equal(before.parts["next_token"], after.parts["next_token"])
    assert torch.equal(before.expert_ids[0], after.expert_ids[0])
    afresh: dict[int, LayerChoices] = {}
    compute_losses(model, batch, EVERYTHING, choices=afresh)
    assert not torch.equal(afresh[1].block_indices, blocks)  # type: ignore[arg-type]
    assert not torch.equal(afresh[1].expert_ids, experts)  # type: ignore[arg-type]


@pytest.mark.parametrize("form", ["sparse", "dense"])
def test_documents_accumulated_one_by_one_give_the_gradients_of_the_packed_batch(
    model: Any, batch: Batch, form: Any
) -> None:
    from test_training_loss import documents

    recipe = LossRecipe(mtp_weight=0.3, indexer_kl_weight=0.5, z_weight=0.1, indexer_kl_form=form, recall_every_steps=0)
    packed = compute_losses(model, batch, recipe)
    together = gradients(model, packed.total)
    alone = documents(batch)
    whole = LossCounts.of(alone, num_depths=1)
    model.zero_grad(set_to_none=True)
    sums = dict.fromkeys(packed.parts, 0.0)
    for document in alone:
        losses = compute_losses(model, document, recipe, whole)
        losses.total.backward()
        sums = {name: sums[name] + float(part.detach()) for name, part in losses.parts.items()}
    one_by_one = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    assert_same(one_by_one, together, 1e-6)
    assert sums == {name: pytest.approx(float(part.detach()), rel=1e-9) for name, part in packed.parts.items()}


def test_every_mtp_depth_is_logged_and_counts_alike() -> None:
    """Summed over targets instead, the first depth, which has the most, would weigh more."""
    from tests.tiny_models import random_ids, text_model

    model, ids = text_model(seed=3, num_mtp_modules=2).double(), random_ids(21)
    labels = ids.roll(-1).index_fill(0, torch.tensor([6, 20]), -100)
    losses = compute_losses(model, Batch(ids, labels, (7, 14), ("", "")), LossRecipe(mtp_weight=0.3))
    one, two = (losses.parts[f"mtp.depth_{depth}"] for depth in (0, 1))
    assert one != two
    torch.testing.assert_close(losses.parts["mtp"], (one + two) / 2)
    torch.testing.assert_close(losses.total, losses.parts["next_token"] + 0.3 * losses.parts["mtp"])
    alone = compute_losses(model, Batch(ids[:7], labels[:7], (7,), ("",)), LossRecipe(mtp_weight=0.3))
    hidden = model.text_model.forward_packed(model.embed_tokens_packed(ids[:7]), ForwardBatch.packed((7,)))
    of_depth = model.text_model.mtp_logits(hidden[None], ids[None, :7], model.lm_head)[1][0]
    expected = torch.nn.functional.cross_entropy(of_depth[:4], ids[3:7])
    torch.testing.assert_close(alone.parts["mtp.depth_1"], expected)


def test_the_router_loss_is_the_one_of_the_family(model: Any, batch: Batch) -> None:
    """Value and gradient of transformers' function on the same logits, which other trainers of this family use."""
    oracle = pytest.importorskip("transformers.models.minimax_m3_vl.modeling_minimax_m3_vl")
    from minim3.model.outputs import load_balancing_loss
    from minim3.training.loss import forward_packed

    record = ForwardRecord(router_logits=[])
    forward_packed(model, batch, record)
    assert record.router_logits
    logits = [record.router_logits[0].detach().float(), torch.randn_like(record.router_logits[0]).float()]
    ours, theirs = ([layer.clone().requires_grad_() for layer in logits] for _ in range(2))
    found = load_balancing_loss(ours, 4, 2)
    expected = oracle.load_balancing_loss_func(tuple(theirs), 4, 2)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)
    torch.testing.assert_close(torch.autograd.grad(found, ours), torch.autograd.grad(expected, theirs))
    losses = compute_losses(model, batch, LossRecipe(router_aux_weight=1.0))
    single = oracle.load_balancing_loss_func((record.router_logits[0].detach().float(),), 4, 2)
    torch.testing.assert_close(losses.parts["router_aux"].float(), single, rtol=1e-5, atol=0)


def test_the_router_loss_pulls_towards_balance(model: Any, batch: Batch) -> None:
    """Of the wrong sign it would still have a gradient."""
    gate = model.text_model.layers[1].block_sparse_moe.gate.weight
    before = compute_losses(model, batch, LossRecipe(router_aux_weight=1.0)).parts["router_aux"]
    (gradient,) = torch.autograd.grad(before, gate)
    with torch.no_grad():
        gate -= 0.05 * gradient / gradient.norm()
    after = compute_losses(model, batch, LossRecipe(router_aux_weight=1.0)).parts["router_aux"]
    assert float(after.detach()) < float(before.detach())


def test_losses_without_a_layer_for_them_are_refused(batch: Batch) -> None:
    from tests.tiny_models import random_ids, text_model

    plain = Batch(random_ids(12), random_ids(12, seed=1), (12,), ("",))
    everywhere_dense = text_model(layer_types=("full_attention",) * 3, mlp_layer_types=("dense",) * 3)
    with pytest.raises(ValueError, match="indexer_kl_weight is set, but no layer"):
        compute_losses(everywhere_dense, plain, LossRecipe(indexer_kl_weight=1.0))
    with pytest.raises(ValueError, match="router_aux_weight is set, but no layer"):
        compute_losses(everywhere_dense, plain, LossRecipe(router_aux_weight=1.0))


def test_attention_is_dense_while_the_alignment_is(batch: Batch) -> None:
    """Aligned over all keys under sparse attention, the indexer would learn from a teacher it already bent."""
    from tests.tiny_models import random_ids, text_model

    ids = random_ids(60)
    plain = Batch(ids, ids.roll(-1), (60,), ("",))
    sparse, dense = text_model(seed=3), text_model(layer_types=("full_attention",) * 3)
    assert not dense.load_state_dict(sparse.state_dict(), strict=False).missing_keys
    warming = compute_losses(sparse, plain, LossRecipe(indexer_kl_weight=1.0, indexer_kl_form="dense"))
    expected = compute_losses(dense, plain, LossRecipe()).parts["next_token"]
    torch.testing.assert_close(warming.parts["next_token"], expected)
    assert not torch.isclose(compute_losses(sparse, plain, LossRecipe()).parts["next_token"], expected)


def test_recall_is_the_share_of_dense_attention_inside_the_chosen_blocks() -> None:
    from minim3.kernels.reference import selected_keys_mask
    from minim3.model.batch import ForwardBatch, ForwardRecord
    from tests.tiny_models import random_ids, text_model

    model = text_model(seed=3, num_mtp_modules=1)
    lengths = (30, 6, 24)
    ids = random_ids(sum(lengths))
    plain = Batch(ids, ids.roll(-1), lengths, ("",) * 3)
    recipe = LossRecipe(mtp_weight=0.1, recall_every_steps=1, recall_queries=1000)
    recall = compute_losses(model, plain, recipe).parts
    assert recall.keys() == {"next_token", "mtp", "recall.layer_1", "recall.layer_2", "recall.mtp_0"}

    hidden, record = [], ForwardRecord(hidden_states=[], block_indices=[])
    with torch.no_grad():
        packing = ForwardBatch.packed(lengths)
        model.text_model.forward_packed(model.embed_tokens_packed(ids), packing, record)
        assert record.hidden_states is not None
        assert record.block_indices is not None
        hidden = record.hidden_states[1]  # what enters layer 1
        attention = model.text_model.layers[1].self_attn
        x = model.text_model.layers[1].input_layernorm(hidden)
        q, k, _ = attention._project_main(x, model.text_model.make_freqs_cis(packing.positions))
        shares, start = [], 0
        for length in lengths:
            rows = slice(start, start + length)
            scores = torch.einsum("thd,shd->hts", q[rows], k[rows].repeat_interleave(2, dim=1)) / 16**0.5
            dense = scores.masked_fill(~torch.ones(length, length).tril().bool(), -torch.inf).softmax(-1)
            chosen = selected_keys_mask(record.block_indices[0][rows], length, 4).repeat_interleave(2, dim=1)
            shares.append((dense * chosen.transpose(0, 1)).sum(-1)[:, 8:].flatten())  # the first eight see all
            start += length
    measured = torch.cat(shares)
    torch.testing.assert_close(recall["recall.layer_1"], measured.mean())
    assert 0 < float(measured.min()) < 0.9

    few = compute_losses(model, plain, replace(recipe, recall_queries=9)).parts["recall.layer_1"]
    assert 0 < float(few) < 1
    short = Batch(ids[:8], ids[1:9], (8,), ("",))
    assert compute_losses(model, short, recipe).parts.keys() == {"next_token", "mtp"}


def test_recall_is_measured_on_its_steps_only() -> None:
    recipe = LossRecipe(recall_every_steps=3)
    assert [recipe.at_step(step).recall_every_steps for step in range(4)] == [3, 0, 0, 3]
    assert [LossRecipe(recall_every_steps=0).at_step(step).recall_every_steps for step in range(2)] == [0, 0]
