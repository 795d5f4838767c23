"""Losses and their gradients, and what the optimizer does with them."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from minim3.model.batch import ForwardBatch, ForwardRecord
from minim3.training.config import MODEL_PARTS, LossRecipe, OptimRecipe, ScheduleRecipe
from minim3.training.data import IGNORED, Batch, BatchBuilder
from minim3.training.loss import ChunkedCrossEntropy, compute_losses, mtp_labels
from minim3.training.muon import Muon
from minim3.training.optim import (
    VISION,
    MovingAverage,
    build_optimizer,
    freeze_parts,
    load_imbalance,
    moe_layers,
    parameter_groups,
    part_of,
    schedule_factor,
    set_learning_rate,
    update_router_bias,
)

ALL_LOSSES = LossRecipe(mtp_weight=0.3, indexer_kl_weight=0.5, recall_every_steps=0, logit_chunk_tokens=7)


@pytest.fixture(autouse=True)
def standins(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parent))


@pytest.fixture
def model() -> Any:
    from training_standins import toy_model

    return toy_model()


@pytest.fixture
def batch() -> Batch:
    from training_standins import toy_recipe

    data = toy_recipe("unused").data
    packed = BatchBuilder(data, data.sources, seed=0, split=0).build(1)
    assert packed.pixel_values is not None
    return replace(packed, pixel_values=packed.pixel_values.double())


def documents(batch: Batch) -> list[Batch]:
    """Every document as a batch of its own, with its own copy of its picture."""
    assert batch.pixel_values is not None
    assert batch.image_grid_thw is not None
    assert batch.image_order is not None
    patches = batch.pixel_values.split(batch.image_grid_thw.prod(-1).tolist())
    uses, alone = iter(batch.image_order.tolist()), []
    for ids, labels, kind in zip(
        batch.input_ids.split(batch.lengths), batch.labels.split(batch.lengths), batch.kinds, strict=True
    ):
        document = Batch(ids, labels, (len(ids),), (kind,))
        if kind == "grey":
            picture = next(uses)
            grid = batch.image_grid_thw[picture : picture + 1]
            document = replace(document, pixel_values=patches[picture], image_grid_thw=grid)
        alone.append(document)
    return alone


def gradients(model: Any, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad(set_to_none=True)
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same_gradients(one: dict[str, Tensor], two: dict[str, Tensor]) -> None:
    assert one.keys() == two.keys()
    for name in one:
        scale = float(one[name].abs().max())
        assert float((one[name] - two[name]).abs().max()) <= 1e-6 * max(scale, 1e-9), name


def test_chunked_cross_entropy_has_the_values_and_gradients_of_the_plain_one() -> None:
    torch.manual_seed(0)
    hidden = torch.randn(11, 6, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(9, 6, dtype=torch.float64, requires_grad=True)
    targets = torch.randint(9, (11,))
    plain = F.cross_entropy(hidden @ weight.T, targets)
    expected = torch.autograd.grad(3 * plain, (hidden, weight))
    for chunk in (1, 4, 11, 100):
        loss, cross_entropy, _, correct = ChunkedCrossEntropy.apply(hidden, weight, targets, chunk)
        torch.testing.assert_close(loss, plain)
        torch.testing.assert_close(cross_entropy, plain)
        torch.testing.assert_close(torch.autograd.grad(3 * loss, (hidden, weight)), expected)
        assert torch.equal(correct, (hidden @ weight.T).argmax(-1) == targets)
    assert torch.autograd.gradcheck(lambda h, w: ChunkedCrossEntropy.apply(h, w, targets, 4)[0], (hidden, weight))


def test_chunked_cross_entropy_of_no_targets_is_zero() -> None:
    hidden, weight = torch.zeros(0, 6, requires_grad=True), torch.ones(9, 6, requires_grad=True)
    loss, *_ = ChunkedCrossEntropy.apply(hidden, weight, torch.zeros(0, dtype=torch.int64), 4, 0.1)
    loss.backward()
    assert loss == 0
    assert weight.grad is not None
    assert not weight.grad.any()


def test_the_z_loss_has_the_value_and_gradients_of_the_plain_one() -> None:
    torch.manual_seed(0)
    hidden = torch.randn(11, 6, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(9, 6, dtype=torch.float64, requires_grad=True)
    targets = torch.randint(9, (11,))
    logits = hidden @ weight.T
    z_loss = logits.logsumexp(-1).square().mean()
    expected = torch.autograd.grad(3 * (F.cross_entropy(logits, targets) + 0.2 * z_loss), (hidden, weight))
    loss, cross_entropy, mean_square, _ = ChunkedCrossEntropy.apply(hidden, weight, targets, 4, 0.2)
    torch.testing.assert_close(torch.autograd.grad(3 * loss, (hidden, weight)), expected)
    torch.testing.assert_close(cross_entropy, F.cross_entropy(logits, targets))
    torch.testing.assert_close(mean_square, z_loss)
    assert torch.autograd.gradcheck(
        lambda h, w: ChunkedCrossEntropy.apply(h, w, targets, 4, 0.2)[0], (hidden, weight)
    )


def test_a_bf16_cross_entropy_sums_the_gradient_of_an_fp32_head_in_fp32() -> None:
    """A thousand small chunks added up in bf16 stop counting."""
    torch.manual_seed(0)
    hidden = torch.randn(512, 8).bfloat16()
    weight = torch.randn(5, 8, requires_grad=True)
    targets = torch.randint(5, (512,))
    plain = F.cross_entropy(hidden.float() @ weight.bfloat16().float().T, targets)
    (expected,) = torch.autograd.grad(plain, weight)
    loss, *_ = ChunkedCrossEntropy.apply(hidden, weight, targets, 2)
    (found,) = torch.autograd.grad(loss, weight)
    assert found.dtype == torch.float32
    assert float((found - expected).abs().max()) < 0.01 * float(expected.abs().max())


def test_every_loss_equals_its_straightforward_computation(model: Any, batch: Batch) -> None:
    losses = compute_losses(model, batch, ALL_LOSSES)
    next_token, mtp, alignment = [], [], 0.0
    for document in documents(batch):
        embeds = model.embed_packed(
            document.input_ids, pixel_values=document.pixel_values, image_grid_thw=document.image_grid_thw
        )
        packing, record = ForwardBatch.packed(document.lengths), ForwardRecord(indexer_kl=[])
        hidden = model.text_model.forward_packed(embeds, packing, record)
        (depth,) = model.text_model.mtp.forward_packed(
            hidden, document.input_ids, model.embed_tokens_packed, packing, record
        )
        logits, draft_logits = model.compute_logits(hidden), model.compute_logits(depth)
        for place, label in enumerate(document.labels.tolist()):
            if label != IGNORED:
                next_token.append(-logits[place].log_softmax(-1)[label])
                if place > 0:  # the place before drafts it too
                    mtp.append(-draft_logits[place - 1].log_softmax(-1)[label])
        assert record.indexer_kl is not None
        assert len(record.indexer_kl) == 2  # the sparse layer's and the MTP block's
        alignment = alignment + sum(record.indexer_kl) * document.num_tokens / batch.num_tokens
    torch.testing.assert_close(losses.parts["next_token"], torch.stack(next_token).mean())
    torch.testing.assert_close(losses.parts["mtp"], torch.stack(mtp).mean())
    torch.testing.assert_close(losses.parts["indexer_kl"], torch.as_tensor(alignment))
    total = losses.parts["next_token"] + 0.3 * losses.parts["mtp"] + 0.5 * losses.parts["indexer_kl"]
    torch.testing.assert_close(losses.total, total)


def test_a_packed_document_gives_the_gradients_of_the_document_alone(model: Any, batch: Batch) -> None:
    # Attention, positions, blocks, MTP targets or pictures that leak between documents all change gradients.
    together = gradients(model, compute_losses(model, batch, ALL_LOSSES).total)
    targets, drafts = batch.labels != IGNORED, mtp_labels(batch, 1)[0] != IGNORED
    total: Any = 0.0
    for document in documents(batch):
        parts = compute_losses(model, document, ALL_LOSSES).parts
        shares = (
            (document.labels != IGNORED).sum() / targets.sum(),
            0.3 * (mtp_labels(document, 1)[0] != IGNORED).sum() / drafts.sum(),
            0.5 * document.num_tokens / batch.num_tokens,
        )
        total = total + sum(share * part for share, part in zip(shares, parts.values(), strict=True))
    assert_same_gradients(together, gradients(model, total))
    assert any(name.startswith("vision_tower") for name in together)


def test_a_shared_picture_gives_the_gradients_of_separate_copies(model: Any, batch: Batch) -> None:
    assert batch.pixel_values is not None
    assert batch.image_grid_thw is not None
    assert batch.image_order is not None
    patches = batch.pixel_values.split(batch.image_grid_thw.prod(-1).tolist())
    copies = replace(
        batch,
        pixel_values=torch.cat([patches[picture] for picture in batch.image_order]),
        image_grid_thw=batch.image_grid_thw[batch.image_order],
        image_order=None,
    )
    assert len(batch.image_order) > len(patches)
    shared = gradients(model, compute_losses(model, batch, ALL_LOSSES).total)
    assert_same_gradients(shared, gradients(model, compute_losses(model, copies, ALL_LOSSES).total))


def test_mtp_targets_stay_within_their_document() -> None:
    labels = torch.tensor([1, IGNORED, 3, 4, IGNORED, 6, 7, IGNORED])
    batch = Batch(torch.zeros(8, dtype=torch.int64), labels, (5, 3), ("", ""))
    one, two = mtp_labels(batch, 2)
    assert one.tolist() == [IGNORED, 3, 4, IGNORED, IGNORED, 7, IGNORED, IGNORED]
    assert two.tolist() == [3, 4, IGNORED, IGNORED, IGNORED, IGNORED, IGNORED, IGNORED]


def test_the_alignment_loss_moves_index_parameters_only(model: Any, batch: Batch) -> None:
    without = gradients(model, compute_losses(model, batch, replace(ALL_LOSSES, indexer_kl_weight=0.0)).total)
    with_it = gradients(model, compute_losses(model, batch, ALL_LOSSES).total)
    index_names = {name for name in with_it if ".indexer." in name}
    assert index_names == {name for name, _ in model.named_parameters() if ".indexer." in name}
    assert not index_names & without.keys(), "the other losses must not reach the indexer"
    for name in without:
        assert torch.equal(without[name], with_it[name]), name
    assert all(float(with_it[name].abs().max()) > 0 for name in index_names)


def test_losses_that_the_model_cannot_give_are_refused(batch: Batch) -> None:
    from training_standins import toy_model_config

    from minim3.config import config_from_dict
    from minim3.model.causal_lm import MiniMaxM3SparseForConditionalGeneration

    config = toy_model_config()
    config["text_config"]["num_mtp_modules"] = 0
    model = MiniMaxM3SparseForConditionalGeneration.from_config(config_from_dict(config), dtype=torch.float64)
    with pytest.raises(ValueError, match="num_mtp_modules is 0"):
        compute_losses(model, batch, ALL_LOSSES)


def test_a_loss_is_left_out_between_its_steps() -> None:
    recipe = LossRecipe(mtp_weight=0.3, mtp_every_steps=2, indexer_kl_weight=0.5, indexer_kl_every_steps=3)
    weights = [(at.mtp_weight, at.indexer_kl_weight) for at in map(recipe.at_step, range(5))]
    assert weights == [(0.3, 0.5), (0.0, 0.0), (0.3, 0.0), (0.0, 0.5), (0.3, 0.0)]


def test_router_bias_moves_against_load(model: Any) -> None:
    layers = moe_layers(model)
    assert len(layers) == 2
    chosen = torch.tensor([[0, 1], [0, 1], [0, 2], [0, 3]])  # loads 4, 2, 1, 1: the mean is 2
    update_router_bias(layers, [chosen], 0.01)
    assert layers[0].e_score_correction_bias is not None
    torch.testing.assert_close(layers[0].e_score_correction_bias, torch.tensor([-0.01, 0.0, 0.01, 0.01]).double())
    assert layers[1].e_score_correction_bias is not None
    assert not layers[1].e_score_correction_bias.any()
    assert load_imbalance([chosen], 4) == 2.0


def test_router_bias_of_each_layer_gets_that_layers_load(model: Any, batch: Batch) -> None:
    # The record lists decoder layers, then MTP depths: in another order biases would be moved by a stranger's load.
    losses = compute_losses(model, batch, ALL_LOSSES)
    layers = moe_layers(model)
    assert layers[0] is model.text_model.layers[1].block_sparse_moe
    assert layers[1] is model.text_model.mtp.layers[0].transformer_layer.block_sparse_moe
    assert [ids.shape for ids in losses.expert_ids] == [(batch.num_tokens, 2)] * 2


def test_repeated_bias_updates_balance_a_lopsided_router(model: Any, batch: Batch) -> None:
    layers = moe_layers(model)[:1]
    bias = layers[0].e_score_correction_bias
    assert bias is not None
    bias += torch.tensor([0.6, 0.0, 0.0, -0.6])
    recipe = LossRecipe()
    before = load_imbalance(compute_losses(model, batch, recipe).expert_ids, 4)
    for _ in range(100):
        update_router_bias(layers, compute_losses(model, batch, recipe).expert_ids, 0.01)
    after = load_imbalance(compute_losses(model, batch, recipe).expert_ids, 4)
    assert before > 1.5
    assert after < 1.3


def test_every_parameter_is_in_one_group_and_only_matrices_decay(model: Any) -> None:
    recipe = OptimRecipe(weight_decay=0.1, indexer_lr_scale=3.0, vision_lr_scale=0.5, projector_lr_scale=0.25)
    groups = parameter_groups(model, recipe)
    names = [name for group in groups for name in group["param_names"]]
    assert sorted(names) == sorted(name for name, _ in model.named_parameters())
    for group in groups:
        for name, parameter in zip(group["param_names"], group["params"], strict=True):
            projects = name.startswith(("multi_modal_projector", "patch_merge_mlp"))
            scale = 3.0 if "index_" in name else 0.5 if name.startswith("vision_tower") else 0.25 if projects else 1.0
            assert group["peak_lr"] == scale * recipe.lr, name
            assert not group["use_muon"]
            exempt = "norm" in name or name.endswith("bias") or "embed_tokens" in name
            assert group["weight_decay"] == (0.0 if exempt else 0.1), name
            assert exempt or parameter.ndim >= 2, name


def test_the_optimizer_step_is_adamw_with_decoupled_decay() -> None:
    layer = torch.nn.Linear(3, 2)
    start = {name: p.detach().clone() for name, p in layer.named_parameters()}
    optimizer = build_optimizer(layer, OptimRecipe(lr=0.1, weight_decay=0.5, betas=(0.9, 0.99), eps=1e-12))
    set_learning_rate(optimizer, 0.1)
    for parameter in layer.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()  # the first step of Adam is lr * sign(gradient)
    torch.testing.assert_close(layer.weight.detach(), start["weight"] * (1 - 0.01 * 0.5) - 0.01)
    torch.testing.assert_close(layer.bias.detach(), start["bias"] - 0.01)


def test_muon_moves_the_matrices_of_layers_and_adamw_the_rest(model: Any) -> None:
    """Orthogonalising an embedding would move words that the batch never held."""
    groups = parameter_groups(model, OptimRecipe(kind="muon", lr=1e-3, muon_lr=0.02, vision_lr_scale=0.5))
    rules = {name: group for group in groups for name in group["param_names"]}
    assert len(rules) == len(list(model.named_parameters()))
    for name, group in rules.items():
        inside = ("proj.weight", "experts.w13", "experts.w2", "fc1.weight", "fc2.weight", "linear_1.weight")
        outside = ("norm", "bias", "embed", "lm_head", "gate.weight")
        if name.endswith(inside):
            assert group["use_muon"], name
        if any(key in name.rsplit(".layers.", 1)[-1] for key in outside) and not name.endswith("proj.weight"):
            assert not group["use_muon"], name
        assert group["peak_lr"] in ((0.02, 0.01) if group["use_muon"] else (1e-3, 0.5e-3)), name


def test_a_rate_of_zero_freezes_the_vision_part(model: Any) -> None:
    """Muon's updates have a size of their own: a tower left in its groups forgot the shapes it knew."""
    def names(groups: list[Any]) -> set[str]:
        return {name for group in groups for name in group["param_names"]}

    recipe = OptimRecipe(kind="muon", vision_lr_scale=0.0)
    freeze_parts(model, recipe)
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    assert frozen == {name for name, _ in model.named_parameters() if name.startswith(VISION)}
    assert not names(parameter_groups(model, recipe)) & frozen


def test_projectors_follow_the_tower_unless_they_have_a_rate_of_their_own(model: Any) -> None:
    def rates(recipe: OptimRecipe) -> set[float]:
        return {
            group["peak_lr"]
            for group in parameter_groups(model, recipe)
            for name in group["param_names"]
            if part_of(name) == "projector"
        }

    assert rates(OptimRecipe(lr=1.0, vision_lr_scale=0.5)) == {0.5}
    assert rates(OptimRecipe(lr=1.0, vision_lr_scale=0.5, projector_lr_scale=2.0)) == {2.0}
    freeze_parts(model, OptimRecipe(vision_lr_scale=0.0, projector_lr_scale=1.0))
    trained = {part_of(name) for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert "projector" in trained
    assert "vision" not in trained


def test_every_parameter_belongs_to_a_part_that_can_be_frozen(model: Any) -> None:
    found = {part_of(name) for name, _ in model.named_parameters()}
    assert found == set(MODEL_PARTS)
    examples = {
        "language_model.model.layers.1.block_sparse_moe.gate.weight": "router",
        "language_model.model.layers.1.block_sparse_moe.shared_experts.gate_proj.weight": "mlp",
        "language_model.model.layers.1.block_sparse_moe.experts.w13": "experts",
        "language_model.model.layers.1.self_attn.indexer.index_k_norm.weight": "indexer",
        "language_model.model.layers.0.self_attn.q_norm.weight": "norms",
        "language_model.model.layers.0.mlp.gate_proj.weight": "mlp",
        "language_model.model.mtp.layers.0.transformer_layer.self_attn.indexer.index_k_proj.weight": "mtp",
        "language_model.model.norm.weight": "norms",
        "language_model.lm_head.weight": "head",
        "vision_tower.vision_model.encoder.layers.0.layer_norm1.weight": "vision",
        "patch_merge_mlp.linear_1.bias": "projector",
    }
    for name, part in examples.items():
        assert model.get_parameter(name) is not None
        assert part_of(name) == part, name


@pytest.mark.parametrize("trained", [("mtp",), ("indexer",), ("vision", "projector"), ("experts", "router")])
def test_a_step_changes_the_parts_that_are_not_frozen_and_no_bit_of_the_others(
    model: Any, batch: Batch, trained: tuple[str, ...]
) -> None:
    """Weight decay, momentum or the balance of a frozen router would move them without a gradient."""
    recipe = OptimRecipe(
        kind="muon", lr=0.1, weight_decay=0.5, freeze=tuple(part for part in MODEL_PARTS if part not in trained)
    )
    freeze_parts(model, recipe)
    optimizer, average = build_optimizer(model, recipe), MovingAverage(model, 0.9)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for step in range(2):
        set_learning_rate(optimizer, 1.0)
        losses = compute_losses(model, batch, ALL_LOSSES)
        losses.total.backward()
        optimizer.step()
        optimizer.zero_grad()
        update_router_bias(moe_layers(model), losses.expert_ids, 0.01 * (1 + step))
        average.update(step)
    after = model.state_dict()
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    parameters = {name for name, _ in model.named_parameters()}
    assert {part_of(name) for name in moved & parameters} == set(trained)
    biases = {"mtp": ".mtp.", "router": "model.layers.1."}
    expected = [name for part, place in biases.items() if part in trained for name in before if place in name]
    assert moved - parameters == {name for name in expected if "e_score_correction_bias" in name}
    average.swap()
    for name, parameter in model.named_parameters():
        assert name in moved or torch.equal(before[name], parameter), name


def test_freezing_names_the_nearest_part_and_refuses_to_freeze_all(model: Any) -> None:
    with pytest.raises(ValueError, match="unknown part 'expert'; did you mean 'experts'"):
        OptimRecipe(freeze=("expert",))
    freeze_parts(model, OptimRecipe(freeze=("text", "mtp")))
    left = {part_of(name) for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert left == {"vision", "projector", "indexer"}
    with pytest.raises(ValueError, match="nothing is left to train"):
        freeze_parts(model, OptimRecipe(freeze=MODEL_PARTS))


def test_a_muon_update_is_orthogonal_for_every_matrix_of_a_stack() -> None:
    """One norm for a whole stack of experts would let a busy expert silence the others."""
    torch.manual_seed(0)
    experts, square, bias = (torch.nn.Parameter(torch.randn(shape)) for shape in ((3, 8, 4), (8, 8), (5,)))
    start = [parameter.detach().clone() for parameter in (experts, square, bias)]
    group = {"use_muon": True, "peak_lr": 1.0, "weight_decay": 0.0, "params": [experts, square]}
    rest = {"use_muon": False, "peak_lr": 1.0, "weight_decay": 0.0, "params": [bias]}
    optimizer = Muon([group, rest], lr=1.0, betas=(0.9, 0.99), eps=1e-12, momentum=0.95)
    set_learning_rate(optimizer, 0.1)
    experts.grad = torch.randn(3, 8, 4) * torch.tensor([1e-3, 1.0, 1e3]).view(3, 1, 1)
    square.grad, bias.grad = torch.randn(8, 8), torch.ones(5)
    optimizer.step()
    moved = [(before - parameter.detach()) / 0.1 for before, parameter in zip(start, (experts, square, bias))]
    for matrix in moved[0] / 2**0.5:  # twice as many rows as columns
        assert torch.linalg.svdvals(matrix).min() > 0.5
        assert torch.linalg.svdvals(matrix).max() < 1.3
    assert torch.linalg.svdvals(moved[1]).max() < 1.3
    torch.testing.assert_close(moved[2], torch.ones(5))
    assert len(optimizer.param_groups) == 2


def test_muon_steps_downhill() -> None:
    """An update of the wrong sign or shape would still be orthogonal."""
    torch.manual_seed(0)
    layer = torch.nn.Linear(6, 12, bias=False)
    optimizer = build_optimizer(layer, OptimRecipe(kind="muon", muon_lr=0.02, lr=0.0))
    set_learning_rate(optimizer, 1.0)
    x = torch.randn(64, 6)
    losses = []
    for _ in range(30):
        loss = torch.nn.functional.mse_loss(layer(x), x.repeat(1, 2))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


def test_the_schedule_warms_up_peaks_and_ends_at_its_fraction() -> None:
    recipe = ScheduleRecipe("cosine", warmup_steps=10, final_fraction=0.1)
    rates = [schedule_factor(step, 110, recipe) for step in range(110)]
    assert rates[0] == 0.1
    assert rates[9] == rates[10] == 1.0
    assert rates[60] == pytest.approx(0.1 + 0.9 * 0.5)
    assert rates[-1] == pytest.approx(0.1, abs=1e-3)
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert schedule_factor(60, 110, replace(recipe, kind="linear")) == pytest.approx(0.55)
    assert schedule_factor(60, 110, replace(recipe, kind="constant")) == 1.0


def test_wsd_stays_at_the_peak_and_decays_over_its_last_steps() -> None:
    recipe = ScheduleRecipe("wsd", warmup_steps=10, final_fraction=0.1, decay_steps=20)
    rates = [schedule_factor(step, 100, recipe) for step in range(100)]
    assert rates[0] == 0.1
    assert set(rates[9:81]) == {1.0}
    assert rates[90] == pytest.approx(0.1 + 0.9 * 0.5)
    assert rates[99] == pytest.approx(0.1 + 0.9 / 20)
    assert rates[80:] == sorted(rates[80:], reverse=True)
    with pytest.raises(ValueError, match="wsd needs steps to decay in"):
        ScheduleRecipe("wsd", warmup_steps=10)
    with pytest.raises(ValueError, match="decay_steps is 5"):
        ScheduleRecipe("cosine", decay_steps=5)


def test_the_moving_average_follows_and_swaps_back() -> None:
    layer = torch.nn.Linear(1, 1, bias=False)
    with torch.no_grad():
        layer.weight.fill_(1.0)
        average = MovingAverage(layer, decay=0.9)
        layer.weight.fill_(2.0)
    average.update(10_000)
    assert average.averages["weight"].item() == pytest.approx(1.1)
    average.swap()
    assert layer.weight.item() == pytest.approx(1.1)
    average.swap()
    assert layer.weight.item() == 2.0
    average.update(0)  # the first steps barely remember: (1 + 0) / (10 + 0) of the past
    assert average.averages["weight"].item() == pytest.approx(0.1 * 1.1 + 0.9 * 2.0)
    assert math.isfinite(average.averages["weight"].item())
