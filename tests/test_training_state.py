"""Whole runs of the toy model: resume to the bit, stop, damage, evaluation, export."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from minim3.training import trainer
from minim3.training.data import IGNORED, Batch
from minim3.training.state import find_checkpoints
from minim3.training.trainer import train
from minim3.training.validation import right_documents

TESTS = Path(__file__).parent
STEPS = 6


@pytest.fixture(autouse=True)
def standins(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(TESTS))


def recipe(output: Path, **changes: Any) -> Any:
    from training_standins import toy_recipe

    evaluation = {"every_steps": 3, "batches": 1}
    return toy_recipe(output, STEPS, **{"checkpoint": {"every_steps": 1}, "evaluation": evaluation, **changes})


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    sys.path.insert(0, str(TESTS))
    output = tmp_path_factory.mktemp("uninterrupted")
    result = train(recipe(output))
    sys.path.remove(str(TESTS))
    assert result.step == STEPS
    assert result.stopped_by is None
    return output


def tensors(output: Path) -> dict[str, torch.Tensor]:
    return load_file(find_checkpoints(output / "checkpoints")[-1] / "state.safetensors")


def assert_same_bits(one: Path, two: Path) -> None:
    first, second = tensors(one), tensors(two)
    assert first.keys() == second.keys()
    assert any(name.startswith("optimizer.exp_avg_sq.") for name in first)
    assert any(name.startswith("average.") for name in first)
    assert any(name.endswith("e_score_correction_bias") for name in first)
    for name in first:
        assert torch.equal(first[name], second[name]), name
    # the models people get
    exports = [load_file(output / "export" / "model.safetensors") for output in (one, two)]
    assert all(torch.equal(exports[0][name], exports[1][name]) for name in exports[0])


def stop_after(step: int, number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    original = trainer.TrainingLog.end_step

    def end_step(self: Any, *args: Any) -> None:
        original(self, *args)
        if self.first_step + self.total_steps == step:
            os.kill(os.getpid(), number)

    monkeypatch.setattr(trainer.TrainingLog, "end_step", end_step)


def test_a_stopped_run_with_muon_ends_with_the_same_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A momentum that is not saved starts again from zero: the run goes on, and ends elsewhere."""
    monkeypatch.syspath_prepend(str(TESTS))
    whole, halted = (recipe(tmp_path / name, optim={"kind": "muon", "ema_decay": 0.9}) for name in ("whole", "halted"))
    train(whole)
    with monkeypatch.context() as patch:
        stop_after(2, signal.SIGTERM, patch)
        assert train(halted).stopped_by == signal.SIGTERM
    train(halted)
    first, second = tensors(tmp_path / "whole"), tensors(tmp_path / "halted")
    assert any(name.startswith("optimizer.momentum.") for name in first)
    assert first.keys() == second.keys()
    for name in first:
        assert torch.equal(first[name], second[name]), name


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stopped_run_saves_and_ends_with_the_same_bits(
    tmp_path: Path, uninterrupted: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    handler = signal.getsignal(number)
    with monkeypatch.context() as patch:
        stop_after(4, number, patch)
        # Nothing is saved but by the signal.
        stopped = train(recipe(tmp_path, checkpoint={"every_steps": 0}))
    assert (stopped.step, stopped.stopped_by, stopped.export_path) == (4, number, None)
    assert signal.getsignal(number) is handler
    assert train(recipe(tmp_path)).step == STEPS
    assert_same_bits(tmp_path, uninterrupted)


def start_process(output: Path, steps: int) -> "subprocess.Popen[str]":
    program = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "from training_standins import toy_recipe\n"
        "from minim3.training.trainer import train\n"
        "if __name__ == '__main__':\n"
        "    train(toy_recipe(sys.argv[2], int(sys.argv[3]), checkpoint={'every_steps': 1},\n"
        "                     evaluation={'every_steps': 3, 'batches': 1}))\n"
    )
    script = output / "run.py"
    script.write_text(program)
    environment = {**os.environ, "PYTHONPATH": str(TESTS.parent)}
    command = [sys.executable, str(script), str(TESTS), str(output), str(steps)]
    return subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)


def kill_after_steps(process: "subprocess.Popen[str]", metrics: Path, step: int) -> None:
    deadline = time.monotonic() + 90
    while process.poll() is None and time.monotonic() < deadline:
        if metrics.exists() and f'"step": {step},' in metrics.read_text():
            break
        time.sleep(0.005)
    process.kill()
    process.wait()


def test_a_run_killed_without_warning_ends_with_the_same_bits(tmp_path: Path, uninterrupted: Path) -> None:
    process = start_process(tmp_path, STEPS)
    kill_after_steps(process, tmp_path / "metrics.jsonl", 3)
    assert process.returncode == -signal.SIGKILL, process.stderr.read() if process.stderr else ""
    assert train(recipe(tmp_path)).step == STEPS
    assert_same_bits(tmp_path, uninterrupted)
    steps = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in steps if "next_token" in line] == list(range(1, STEPS + 1))
    losses = [line["next_token"] for line in steps if "next_token" in line]
    expected = [json.loads(line) for line in (uninterrupted / "metrics.jsonl").read_text().splitlines()]
    assert losses == [line["next_token"] for line in expected if "next_token" in line]


@pytest.mark.slow
def test_a_run_killed_five_times_ends_with_the_same_bits(tmp_path: Path) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    broken.mkdir()
    train(replace(recipe(whole), steps=40))
    torch.manual_seed(0)
    for step in sorted(torch.randint(1, 38, (5,)).tolist()):
        kill_after_steps(start_process(broken, 40), broken / "metrics.jsonl", step)
    train(replace(recipe(broken), steps=40))
    assert_same_bits(broken, whole)


def test_a_damaged_checkpoint_is_passed_over_with_a_message(
    tmp_path: Path, uninterrupted: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with monkeypatch.context() as patch:
        stop_after(4, signal.SIGTERM, patch)
        train(recipe(tmp_path))
    older, newest = find_checkpoints(tmp_path / "checkpoints")
    assert (older.name, newest.name) == ("step-00000003", "step-00000004")
    content = bytearray((newest / "state.safetensors").read_bytes())
    content[-5] ^= 1  # one flipped bit
    (newest / "state.safetensors").write_bytes(content)
    train(recipe(tmp_path))
    assert "step-00000004 is damaged" in capsys.readouterr().err
    assert_same_bits(tmp_path, uninterrupted)

    for checkpoint in find_checkpoints(tmp_path / "checkpoints"):
        (checkpoint / "state.safetensors").write_bytes(b"torn")
    with pytest.raises(ValueError, match=r"every checkpoint in .* is damaged"):
        train(recipe(tmp_path))


def test_a_half_written_checkpoint_is_never_taken_for_one(tmp_path: Path, uninterrupted: Path) -> None:
    folder = tmp_path / "checkpoints"
    (folder / ".partial-00000005").mkdir(parents=True)
    (folder / ".partial-00000005" / "state.safetensors").write_bytes(b"torn")
    assert train(recipe(tmp_path)).step == STEPS
    assert [path.name for path in find_checkpoints(folder)] == ["step-00000005", "step-00000006"]  # the last two
    assert sorted(path.name for path in folder.iterdir()) == ["step-00000005", "step-00000006"]
    assert_same_bits(tmp_path, uninterrupted)


def test_a_finished_run_is_not_run_again_and_says_what_changed(
    uninterrupted: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = tensors(uninterrupted)
    changed = recipe(uninterrupted, schedule={"warmup_steps": 2, "kind": "linear"})
    assert train(changed).step == STEPS
    after = tensors(uninterrupted)
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert "schedule.kind was 'cosine', is 'linear'" in capsys.readouterr().err


def test_two_runs_in_one_folder_are_refused(tmp_path: Path) -> None:
    """They removed each other's half-written checkpoints."""
    from minim3.training.lock import locked

    with locked(tmp_path), pytest.raises(ValueError, match="another process trains into"):
        train(recipe(tmp_path))
    with locked(tmp_path):
        pass


def test_another_optimizer_is_refused(uninterrupted: Path) -> None:
    with pytest.raises(ValueError, match=r"optim.kind 'adamw', the recipe says 'muon'"):
        train(recipe(uninterrupted, optim={"kind": "muon"}))


def test_starting_afresh_in_a_used_folder_is_refused(uninterrupted: Path) -> None:
    with pytest.raises(ValueError, match="already holds checkpoints"):
        train(recipe(uninterrupted), resume=False)


def test_a_checkpoint_of_another_model_is_refused(uninterrupted: Path) -> None:
    from training_standins import toy_model_config

    config = toy_model_config()
    config["text_config"]["dense_intermediate_size"] = 40
    with pytest.raises(ValueError, match=r"has the shape \[48, 32\], the recipe's model \[40, 32\]"):
        train(recipe(uninterrupted, model={"config": config}))


def test_what_is_exported_loads_and_is_the_moving_average(uninterrupted: Path) -> None:
    from minim3.model.causal_lm import MiniMaxM3SparseForConditionalGeneration

    model = MiniMaxM3SparseForConditionalGeneration.from_pretrained(uninterrupted / "export")
    saved = tensors(uninterrupted)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, saved[f"average.{name}"]), name
    assert any(not torch.equal(saved[f"average.{n}"], saved[f"model.{n}"]) for n, _ in model.named_parameters())


def test_training_learns_and_the_score_of_held_out_documents_rises(tmp_path: Path) -> None:
    # A grey level is one answer token: with working pictures, packing and labels it is soon told better than by chance.
    from training_standins import toy_recipe

    data = {
        "processor": "training_standins:ToyProcessor",
        "sources": [{"name": "training_standins:ToySource"}],
        "tokens_per_batch": 400,
    }
    settings = {"evaluation": {"every_steps": 30}, "log_every_steps": 30, "data": data}
    train(toy_recipe(tmp_path, steps=60, **settings))
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    scores = [line["evaluation"]["grey"] for line in lines if "evaluation" in line]
    losses = [line["next_token"] for line in lines if "next_token" in line]
    assert scores[-1] > 0.6, scores  # chance is 0.25
    assert losses[-1] < losses[0]


def test_a_document_is_right_only_if_every_target_is() -> None:
    labels = torch.tensor([5, 6, IGNORED, 7, IGNORED, IGNORED, 8, 9, IGNORED])
    batch = Batch(torch.zeros_like(labels), labels, (3, 2, 1, 3), ("", "", "", ""))
    correct = torch.tensor([True, False, True, True, True])
    assert right_documents([batch], correct).tolist() == [False, True, True, True]


def test_a_run_without_a_finite_loss_stops_and_saves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def poisoned(model: Any, *args: Any) -> Any:
        losses = original(model, *args)
        return replace(losses, total=losses.total * float("nan"))

    original = trainer.compute_losses
    monkeypatch.setattr(trainer, "compute_losses", poisoned)
    with pytest.raises(FloatingPointError, match=r"gave up at step 5: .* the loss is nan; no checkpoint was saved yet"):
        train(recipe(tmp_path, checkpoint={"every_steps": 0}))
    assert find_checkpoints(tmp_path / "checkpoints") == []


def test_a_tokenizer_larger_than_the_vocabulary_is_refused(tmp_path: Path) -> None:
    class Tokenizer:
        vocab_size = 41

        def token_to_id(self, token: str) -> int | None:
            return None

    class Processor:
        tokenizer = Tokenizer()

    with pytest.raises(ValueError, match="tokenizer has 41 tokens, but the config's vocab_size is 40"):
        trainer.check_vocabulary(trainer.build_model(recipe(tmp_path)), Processor())


def test_the_command_line_reports_a_bad_recipe_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert trainer.main(["no-such-recipe.yaml"]) == 2
    assert capsys.readouterr().err == "error: no recipe at no-such-recipe.yaml\n"
