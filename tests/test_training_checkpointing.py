"""Layers that are computed again on the way back: the same gradients, the same choices, made once."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from minim3 import kernels
from minim3.model.batch import ForwardRecord
from minim3.model.decoder import Block
from minim3.training.checkpointing import checkpoint_activations
from minim3.training.config import LossRecipe
from minim3.training.data import Batch, BatchBuilder
from minim3.training.loss import compute_losses, forward_packed

ALL_LOSSES = LossRecipe(
    mtp_weight=0.3, indexer_kl_weight=0.5, router_aux_weight=0.1, z_weight=0.1, recall_every_steps=1
)
DENSE = replace(ALL_LOSSES, indexer_kl_form="dense")


@pytest.fixture(autouse=True)
def standins(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parent))


@pytest.fixture
def batch() -> Batch:
    from training_standins import toy_recipe

    data = replace(toy_recipe("unused").data, tokens_per_batch=96)
    packed = BatchBuilder(data, data.sources, seed=0, split=0).build(1)
    assert packed.pixel_values is not None
    assert max(packed.lengths) > 8, "no document has more blocks than a query may choose"
    return packed


def toy_model() -> Any:
    from training_standins import toy_model

    return toy_model(torch.float32)


def gradients(model: Any, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad(set_to_none=True)
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("recipe", [ALL_LOSSES, DENSE], ids=["sparse", "dense"])
def test_gradients_are_those_without_checkpointing(batch: Batch, recipe: LossRecipe) -> None:
    model = toy_model()
    plain = compute_losses(model, batch, recipe)
    expected = gradients(model, plain.total)
    checkpoint_activations(model)
    losses = compute_losses(model, batch, recipe)
    found = gradients(model, losses.total)
    assert losses.parts.keys() == plain.parts.keys()
    assert all(torch.equal(losses.parts[name], plain.parts[name]) for name in plain.parts)
    assert found.keys() == expected.keys() == {name for name, _ in model.named_parameters()}
    for name in expected:
        assert torch.equal(found[name], expected[name]), name


def test_layers_run_twice_and_choose_once(batch: Batch, monkeypatch: pytest.MonkeyPatch) -> None:
    """Choosing again costs a quarter of a long layer, and may choose otherwise."""
    calls = {"select_blocks": 0, "grouped_experts": 0}

    def counting(name: str, run: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*inputs: Any, **options: Any) -> Any:
            calls[name] += 1
            return run(*inputs, **options)

        return counted

    for name in calls:
        monkeypatch.setattr(kernels, name, counting(name, getattr(kernels, name)))
    model = toy_model()
    checkpoint_activations(model)
    losses = compute_losses(model, batch, ALL_LOSSES)
    assert calls == {"select_blocks": 2, "grouped_experts": 2}  # the sparse layer and that of the MTP module
    losses.total.backward()
    assert calls == {"select_blocks": 2, "grouped_experts": 4}


def test_the_second_pass_follows_the_first_although_the_indexer_and_the_router_changed_their_minds(
    batch: Batch,
) -> None:
    """As they do when a batch is kept over a step, or when a tie falls the other way."""
    model = toy_model()
    expected = gradients(model, compute_losses(model, batch, ALL_LOSSES).total)
    checkpoint_activations(model)
    losses = compute_losses(model, batch, ALL_LOSSES)
    for module in model.modules():
        if hasattr(module, "e_score_correction_bias"):
            module.e_score_correction_bias += torch.tensor([3.0, 2.0, 1.0, 0.0])
    found = gradients(model, losses.total)
    for name in expected:
        assert torch.equal(found[name], expected[name]), name


def test_every_layer_tells_the_record_once(batch: Batch) -> None:
    """What is recorded again in the second pass would count twice, in the load of the experts for one."""
    model = toy_model()
    checkpoint_activations(model)
    record = ForwardRecord(
        hidden_states=[], router_logits=[], expert_ids=[], indexer_kl=[], block_indices=[], recall=[]
    )
    hidden, _ = forward_packed(model, batch, record)
    (hidden.sum() + torch.stack(record.indexer_kl or []).sum()).backward()
    lists = (record.router_logits, record.expert_ids, record.indexer_kl, record.block_indices, record.recall)
    assert [len(kept or []) for kept in lists] == [1] * 5
    assert record.choices is None


def test_less_is_kept_for_the_way_back(batch: Batch) -> None:
    kept: list[int] = []

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor.numel())
        return tensor

    model = toy_model()
    sizes = []
    for checkpointed in (False, True):
        if checkpointed:
            checkpoint_activations(model)
        kept.clear()
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            compute_losses(model, batch, LossRecipe())
        sizes.append(sum(kept))
    assert sizes[1] < 0.5 * sizes[0]


def test_names_stay_and_passes_without_gradients_are_plain(batch: Batch) -> None:
    model, plain = toy_model(), toy_model()
    checkpoint_activations(model)
    assert model.state_dict().keys() == plain.state_dict().keys()
    assert sum(isinstance(module, Block) for module in model.modules()) == 3
    with torch.no_grad():
        expected = compute_losses(plain, batch, ALL_LOSSES).total
        assert torch.equal(compute_losses(model, batch, ALL_LOSSES).total, expected)
