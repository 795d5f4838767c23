"""Runs that train an adapter: what moves, what a checkpoint holds, and that going on ends with the same bits."""

import os
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from minim3.model.adapter import adapted_modules, adapter_parameters, attach_adapter, merge_adapter
from minim3.model.causal_lm import MiniMaxM3SparseForConditionalGeneration
from minim3.training import trainer
from minim3.training.config import parse_recipe
from minim3.training.loss import compute_losses
from minim3.training.machine import prepare_device
from minim3.training.state import find_checkpoints
from minim3.training.trainer import build_run, train

TESTS = Path(__file__).parent
STEPS = 5
TARGETS = ["attention", "indexer", "mlp", "shared_experts", "experts", "projector", "lm_head", "mtp"]


@pytest.fixture(autouse=True)
def standins(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(TESTS))


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tests.training_standins import toy_model

    path = tmp_path_factory.mktemp("base")
    toy_model(torch.float32, seed=1).save_pretrained(path)
    return path


def recipe(output: Path, base: Path, **changes: Any) -> Any:
    from tests.training_standins import toy_recipe

    sections = {
        "model": {"start_from": str(base)},
        "lora": {"targets": TARGETS, "rank": 2, "alpha": 4.0, "dropout": 0.1},
        "data": {
            "processor": "training_standins:ToyProcessor", "sources": [{"name": "training_standins:ToySource"}],
            "tokens_per_batch": 160, "num_workers": 0,
        },
        "peak_flops": 1e9,
        **changes,
    }  # fmt: skip
    return toy_recipe(output, STEPS, **sections)


def state(output: Path) -> dict[str, torch.Tensor]:
    return load_file(find_checkpoints(output / "checkpoints")[-1] / "state.safetensors")


def test_only_the_adapter_moves_and_is_saved(tmp_path: Path, base: Path) -> None:
    """Every part of the adapter learns, the indexer's by its own loss; the base keeps its bits, the router bias too."""
    result = train(recipe(tmp_path, base))
    saved = state(tmp_path)
    start = build_run(recipe(tmp_path / "fresh", base), prepare_device("cpu", None))
    fresh = adapter_parameters(start.model)
    assert {name for name in saved if name.startswith("model.")} == {f"model.{name}" for name in fresh}
    assert {name.split(".", 2)[2] for name in saved if name.startswith("optimizer.")} == set(fresh)
    assert {name for name in saved if name.startswith("average.")} == {f"average.{name}" for name in fresh}
    for name, factor in fresh.items():
        assert not torch.equal(saved[f"model.{name}"], factor), f"{name} did not move"
    assert saved["base.norms"].dtype == torch.uint8
    assert result.export_path is not None
    assert sorted(path.name for path in result.export_path.iterdir()) == [
        "adapter_config.json", "adapter_model.safetensors",
    ]  # fmt: skip
    # What is exported, merged into the base, is the average that was trained; nothing else differs from the base.
    trained = start.model
    with torch.no_grad():
        for name, factor in fresh.items():
            factor.copy_(saved[f"average.{name}"])
    merge_adapter(trained)
    load = MiniMaxM3SparseForConditionalGeneration.from_pretrained
    merged, before = load(base, adapter=result.export_path).state_dict(), load(base).state_dict()
    for name, tensor in trained.state_dict().items():
        torch.testing.assert_close(merged[name], tensor, atol=1e-6, rtol=1e-6)
        if "norm" in name or name.endswith(("gate.weight", "e_score_correction_bias", "embed_tokens.weight")):
            assert torch.equal(merged[name], before[name]), name


def test_the_base_keeps_its_bits(tmp_path: Path, base: Path) -> None:
    before = {name: tensor.clone() for name, tensor in load_file(base / "model.safetensors").items()}
    seen: list[Any] = []
    original = trainer.build_run

    def build(*arguments: Any) -> Any:
        seen.append(original(*arguments))
        return seen[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer, "build_run", build)
        train(recipe(tmp_path, base))
    model = seen[0].model
    for _, module in list(adapted_modules(model)):
        for weight in module.factor_names:
            assert not module._parameters[weight].requires_grad
    from minim3.model.adapter import remove_adapter

    remove_adapter(model)
    model.save_pretrained(tmp_path / "after", format="fp32")
    after = load_file(tmp_path / "after" / "model.safetensors")
    assert all(torch.equal(after[name], before[name]) for name in before)


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_a_stopped_run_ends_with_the_same_bits(
    tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """With dropout, whose draws go on where they stopped."""
    optim = {"kind": kind, "lr": 1e-2, "ema_decay": 0.9}
    train(recipe(tmp_path / "whole", base, optim=optim))
    original = trainer.TrainingLog.end_step

    def end_step(self: Any, *arguments: Any) -> None:
        original(self, *arguments)
        if self.total_steps == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(trainer.TrainingLog, "end_step", end_step)
        assert train(recipe(tmp_path / "halted", base, optim=optim)).stopped_by == signal.SIGTERM
    assert train(recipe(tmp_path / "halted", base, optim=optim)).step == STEPS
    whole, halted = state(tmp_path / "whole"), state(tmp_path / "halted")
    assert whole.keys() == halted.keys()
    assert all(torch.equal(whole[name], halted[name]) for name in whole)
    exports = [load_file(tmp_path / name / "export" / "adapter_model.safetensors") for name in ("whole", "halted")]
    assert all(torch.equal(exports[0][name], exports[1][name]) for name in exports[0])


def test_going_on_from_another_base_is_refused(tmp_path: Path, base: Path) -> None:
    """The checkpoint holds the adapter alone: with other weights below it, the run would go on as another model."""
    from tests.training_standins import toy_model

    train(recipe(tmp_path / "run", base))
    other = toy_model(torch.float32, seed=2)
    with torch.no_grad():
        other.text_model.norm.weight += 0.1
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match=r"holds an adapter of other weights than those of model\.start_from"):
        train(replace(recipe(tmp_path / "run", tmp_path / "other"), steps=STEPS + 1))


def test_gradients_are_those_of_the_merged_weights(base: Path) -> None:
    """Through every loss, the head's too, which takes the weight and not the module: dL/dA = scale * B^T dL/dW."""
    from tests.training_standins import toy_recipe

    def model_of() -> Any:
        load = MiniMaxM3SparseForConditionalGeneration.from_pretrained
        return load(base, dtype=torch.float64).train()

    from minim3.training.validation import build_evaluation_batches

    run = recipe(Path("unused"), base, evaluation={"every_steps": 1, "batches": 1})
    (batch,) = build_evaluation_batches(run, torch.device("cpu"))
    batch = replace(batch, pixel_values=batch.pixel_values.double())
    model, merged = model_of(), model_of()
    for one in (model, merged):
        torch.manual_seed(4)
        attach_adapter(one, targets=TARGETS, rank=2, alpha=3.0)
        with torch.no_grad():
            for factor in adapter_parameters(one).values():
                factor.normal_(0.0, 0.3 * factor.shape[-1] ** -0.5)
    merge_adapter(merged)
    merged.requires_grad_(True)
    losses = [compute_losses(one, batch, toy_recipe("unused").loss) for one in (model, merged)]
    torch.testing.assert_close(losses[0].total, losses[1].total, atol=1e-10, rtol=1e-10)
    for loss in losses:
        loss.total.backward()
    gradients = {name: parameter.grad for name, parameter in merged.named_parameters()}
    for name, module in adapted_modules(model):
        for weight, (a_name, b_name) in module.factor_names.items():
            a, b = module.get_parameter(a_name), module.get_parameter(b_name)
            of_weight = gradients[f"{name}.{weight}"]
            assert of_weight is not None, name
            assert a.grad is not None
            assert b.grad is not None
            wholes = (a.detach(), b.detach(), a.grad, b.grad, of_weight)
            parts = zip(*(whole.chunk(2, 1) for whole in wholes)) if weight == "w13" else [wholes]
            for a_part, b_part, a_grad, b_grad, slope in parts:
                torch.testing.assert_close(a_grad, 1.5 * b_part.mT @ slope, atol=1e-9, rtol=1e-7)
                torch.testing.assert_close(b_grad, 1.5 * slope @ a_part.mT, atol=1e-9, rtol=1e-7)


def test_bf16_and_checkpointed_activations(tmp_path: Path, base: Path) -> None:
    """Checkpointing changes no bit, dropout included; bf16 products train factors that stay fp32."""
    train(recipe(tmp_path / "plain", base))
    train(recipe(tmp_path / "again", base, model={"start_from": str(base), "checkpoint_activations": True}))
    plain, again = state(tmp_path / "plain"), state(tmp_path / "again")
    assert all(torch.equal(plain[name], again[name]) for name in plain)
    train(recipe(tmp_path / "bf16", base, model={"start_from": str(base), "precision": "bf16"}))
    halves = state(tmp_path / "bf16")
    assert all(halves[name].dtype == torch.float32 for name in halves if name.startswith("model."))
    assert any(not torch.equal(plain[name], halves[name]) for name in plain)


@pytest.mark.parametrize(
    ("lora", "message"),
    [
        ({"tagets": ["attention"]}, r"unknown key 'lora\.tagets'; did you mean 'lora\.targets'"),
        ({"rank": 0}, r"lora\.rank must be at least 1, is 0"),
        ({"alpha": 0}, r"lora\.alpha must be positive, is 0"),
        ({"dropout": 1.0}, r"lora\.dropout must lie in \[0, 1\), is 1\.0"),
        ({"targets": []}, r"lora\.targets is empty"),
        ({"naming": "peft"}, r"lora\.naming is 'peft'"),
    ],
)
def test_recipes_are_strict(base: Path, lora: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        recipe(Path("unused"), base, lora=lora)


def test_an_unknown_target_ends_the_run_before_it_begins(tmp_path: Path, base: Path) -> None:
    with pytest.raises(ValueError, match=r"lora\.targets: target 'atention' names nothing .*'attention'"):
        train(recipe(tmp_path, base, lora={"targets": ["atention"]}))


def test_an_adapter_needs_a_checkpoint() -> None:
    data = {"processor": "x", "sources": [{"name": "x"}]}
    with pytest.raises(ValueError, match=r"lora adapts a checkpoint: give model\.start_from"):
        parse_recipe({"output": "unused", "steps": 1, "model": {"config": {}}, "lora": {}, "data": data})
