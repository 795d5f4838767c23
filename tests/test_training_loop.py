"""The loop: several batches a step, steps that are skipped, what is logged, what a full disk leaves."""

import errno
import json
import signal
import sys
from dataclasses import replace
from functools import partial, partialmethod
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from minim3.training import progress, state, trainer
from minim3.training.config import LossRecipe, SpikeRecipe
from minim3.training.data import Batch
from minim3.training.machine import measure_peak_flops
from minim3.training.spikes import SpikeGuard, TrainingDiverged
from minim3.training.state import find_checkpoints

TESTS = Path(__file__).parent


@pytest.fixture(autouse=True)
def standins(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(TESTS))


def recipe(output: Path, steps: int = 4, **changes: Any) -> Any:
    """The toy recipe, with batches made in this process and the machine's peak given: a run takes half a second."""
    from training_standins import toy_recipe

    made = toy_recipe(output, steps, **{"peak_flops": 1e9, "checkpoint": {"every_steps": 1, "keep": 9}, **changes})
    return replace(made, data=replace(made.data, num_workers=0))


def lines(output: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


def saved(output: Path, step: int) -> dict[str, Tensor]:
    return load_file(output / "checkpoints" / f"step-{step:08d}" / "state.safetensors")


# --- several batches a step --------------------------------------------------------------------------------------


def toy_batches() -> list[Batch]:
    """Two text batches with different numbers of tokens and targets, and the batch that holds both."""
    generator = torch.Generator().manual_seed(0)
    batches = []
    for lengths, first_target in (((20, 9), 0), ((13,), 7)):
        ids = torch.randint(0, 34, (sum(lengths),), generator=generator)
        labels = ids.roll(-1)
        labels[torch.tensor(lengths).cumsum(0) - 1] = -100
        labels[:first_target] = -100
        batches.append(Batch(ids, labels, lengths, ("text",) * len(lengths)))
    one, two = batches
    both = Batch(
        torch.cat([one.input_ids, two.input_ids]), torch.cat([one.labels, two.labels]), one.lengths + two.lengths,
        one.kinds + two.kinds,
    )  # fmt: skip
    return [one, two, both]


def test_accumulated_batches_are_one_large_batch() -> None:
    """Means of means weigh a target of a short batch more than one of a long batch."""
    from training_standins import toy_model

    weights = LossRecipe(mtp_weight=0.3, indexer_kl_weight=0.5, z_weight=0.01, recall_every_steps=0)
    one, two, both = toy_batches()
    results = []
    for batches in ([one, two], [both]):
        model = toy_model()
        losses = trainer.accumulate_gradients(model, batches, weights)
        results.append((losses, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}))
    (parts, gradients), (whole, expected) = results
    assert parts.parts.keys() == whole.parts.keys() >= {"next_token", "mtp", "indexer_kl", "z_loss"}
    for name in whole.parts:
        torch.testing.assert_close(parts.parts[name], whole.parts[name], rtol=1e-9, atol=0.0, msg=name)
    torch.testing.assert_close(parts.total, whole.total, rtol=1e-9, atol=0.0)
    assert torch.equal(parts.correct, whole.correct)
    assert gradients.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(gradients[name], expected[name], rtol=1e-6, atol=1e-12, msg=name)
    for chosen, chosen_whole in zip(parts.expert_ids, whole.expert_ids, strict=True):
        assert torch.equal(chosen, chosen_whole)


def test_a_run_with_several_batches_a_step_goes_on_with_the_next_ones(tmp_path: Path) -> None:
    """A position counted in steps would draw batches again that were already trained on."""
    settings: Any = {"batches_per_step": 2, "schedule": {"kind": "constant"}}
    trainer.train(recipe(tmp_path / "whole", steps=2, **settings))
    halted = recipe(tmp_path / "halted", steps=2, **settings)
    trainer.train(replace(halted, steps=1))
    described = json.loads((tmp_path / "halted/checkpoints/step-00000001/state.json").read_text())
    assert described["progress"]["data"] == {"batch": 2}
    trainer.train(halted)
    first, second = saved(tmp_path / "whole", 2), saved(tmp_path / "halted", 2)
    for name in first:
        assert torch.equal(first[name], second[name]), name


# --- steps that are skipped --------------------------------------------------------------------------------------


def poison(monkeypatch: pytest.MonkeyPatch, steps: set[int], value: float = float("nan")) -> None:
    """Multiply the losses of these steps (counted from 1) by `value`, as one broken activation would."""
    original, done = trainer.compute_losses, [0]

    def compute_losses(*args: Any, **options: Any) -> Any:
        losses = original(*args, **options)
        done[0] += 1
        if done[0] in steps:
            losses.total = losses.total * value
        return losses

    monkeypatch.setattr(trainer, "compute_losses", compute_losses)


def test_a_step_that_is_not_finite_moves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One NaN in the optimizer's moments or in the average, and every later step is NaN."""
    poison(monkeypatch, {3})
    assert trainer.train(recipe(tmp_path)).step == 4
    before, skipped, after = (saved(tmp_path, step) for step in (2, 3, 4))
    assert any(name.startswith("average.") for name in before)
    assert any(name.startswith("optimizer.exp_avg.") for name in before)
    for name in before:
        assert torch.equal(before[name], skipped[name]), name
    moved = [name for name in after if not torch.equal(before[name], after[name])]
    assert len(moved) > len(after) / 2
    assert all(tensor.isfinite().all() for tensor in after.values())
    (line,) = [line for line in lines(tmp_path) if "skipped" in line]
    assert line == {"step": 3, "skipped": "the loss is nan"}
    steps = [line for line in lines(tmp_path) if "lr" in line]
    assert [line["skipped_steps"] for line in steps] == [0, 0, 1, 1]
    assert "next_token" not in steps[2]  # the mean of no step
    assert "the loss is nan" in (tmp_path / "report.html").read_text()


def test_too_many_skipped_steps_in_a_row_end_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    poison(monkeypatch, {2, 4, 5, 6})
    message = r"gave up at step 6: 3 steps in a row were skipped.*step-00000005, .* before them step-00000003"
    with pytest.raises(TrainingDiverged, match=message):
        trainer.train(recipe(tmp_path, steps=9, spikes={"max_in_row": 3}))
    assert "gave up at step 6" in (tmp_path / "report.html").read_text()
    assert [line["step"] for line in lines(tmp_path) if "skipped" in line] == [2, 4, 5, 6]


def test_a_jump_is_judged_by_the_largest_of_the_last_good_steps() -> None:
    guard = SpikeGuard(SpikeRecipe(factor=4, window=30, max_in_row=2))
    assert all(guard.reason_to_skip(1.0, 1.0 + (step == 9)) is None for step in range(30))
    assert guard.reason_to_skip(3.9, 7.9) is None  # the largest norm is 2
    assert "gradient norm is 32" in str(guard.reason_to_skip(1.0, 32.0))
    assert not guard.gives_up
    assert "loss is 16, more than 4 times the largest of the last 30 steps, 3.9" in str(guard.reason_to_skip(16.0, 1.0))
    assert guard.gives_up
    assert guard.reason_to_skip(1.0, 31.0) is None  # skipped steps are no measure; one good step ends the row
    assert (guard.num_skipped, guard.in_row) == (2, 0)


def test_the_first_steps_and_a_factor_of_zero_know_no_jumps() -> None:
    guard = SpikeGuard(SpikeRecipe(factor=4))
    assert all(guard.reason_to_skip(10.0**step, 1.0) is None for step in range(20))
    assert SpikeGuard(SpikeRecipe(factor=0)).reason_to_skip(1e30, 1e30) is None
    for loss, norm in ((float("nan"), 1.0), (1.0, float("inf"))):
        assert SpikeGuard(SpikeRecipe(factor=0)).reason_to_skip(loss, norm) is not None


def test_the_guard_goes_on_where_its_checkpoint_stands() -> None:
    """A fresh guard accepts, after a restart, the jump that the uninterrupted run skips: other bits."""
    guard, resumed = SpikeGuard(SpikeRecipe()), SpikeGuard(SpikeRecipe())
    for step in range(25):
        guard.reason_to_skip(1 / (3 + step), 0.1)
    guard.reason_to_skip(float("nan"), 0.1)
    resumed.restore(json.loads(json.dumps(guard.state())))
    assert (resumed.recent, resumed.num_skipped, resumed.in_row) == (guard.recent, 1, 1)
    assert resumed.reason_to_skip(50.0, 0.1) == guard.reason_to_skip(50.0, 0.1) is not None


# --- a full disk, damaged files ----------------------------------------------------------------------------------


@pytest.mark.parametrize("fails", ["save_file", "_flush"])
def test_a_full_disk_leaves_the_checkpoints_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails: str
) -> None:
    original, calls = getattr(state, fails), [0]

    def full(*args: Any, **options: Any) -> Any:
        calls[0] += 1
        if calls[0] > 9:
            raise OSError(errno.ENOSPC, "No space left on device")
        return original(*args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(state, fails, full)
        with pytest.raises(OSError, match=r"the state of step \d+ could not be saved.*No space left.*is step-"):
            trainer.train(recipe(tmp_path, steps=12))
    folders = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert folders == [path.name for path in find_checkpoints(tmp_path / "checkpoints")] != []
    assert trainer.train(recipe(tmp_path, steps=12)).step == 12


@pytest.mark.skipif(sys.platform == "win32", reason="file sizes are limited by setrlimit")
def test_what_the_system_refuses_to_write_is_named(tmp_path: Path) -> None:
    """safetensors wraps the system's error in one of its own, which is no OSError."""
    import resource

    run = trainer.build_run(recipe(tmp_path), torch.device("cpu"))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**16, hard))  # bytes; the state has ten times as many
    try:
        with pytest.raises(OSError, match=r"step 1 could not be saved.*too large.*there is none before it"):
            state.save_checkpoint(tmp_path / "checkpoints", run, state.Checkpoint(1, {}, {}), keep=1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list((tmp_path / "checkpoints").iterdir()) == []


class Killed(BaseException):
    """Nothing in the code under test may catch it, as nothing catches SIGKILL."""


def test_a_process_killed_anywhere_while_saving_leaves_a_whole_checkpoint(tmp_path: Path) -> None:
    """Before every single change to the disk: the state of before or of after loads, and the next save tidies up."""
    run = trainer.build_run(recipe(tmp_path), torch.device("cpu"))
    operations = [(state, "save_file"), (state, "_flush"), (Path, "mkdir"), (Path, "write_text"), (Path, "rename")]
    operations.append((state.shutil, "rmtree"))
    kills = 0
    while True:
        folder = tmp_path / str(kills)
        for step in (1, 2):
            state.save_checkpoint(folder, run, state.Checkpoint(step, {}, {}), keep=2)
        left = kills

        def unless_killed(operation: Any, *args: Any, **options: Any) -> Any:
            nonlocal left
            left -= 1
            if left < 0:
                raise Killed
            return operation(*args, **options)

        with pytest.MonkeyPatch.context() as patch:
            for owner, name in operations:
                wrapped = partial(unless_killed, getattr(owner, name))
                patch.setattr(owner, name, partialmethod(wrapped) if owner is Path else wrapped)
            try:
                state.save_checkpoint(folder, run, state.Checkpoint(3, {}, {}), keep=2)
                break
            except Killed:
                pass
        found = state.load_newest(folder, run)
        assert found is not None
        assert found.step in (2, 3), kills
        state.save_checkpoint(folder, run, state.Checkpoint(4, {}, {}), keep=2)
        assert [path.name for path in sorted(folder.iterdir())][-1:] == ["step-00000004"]
        assert len(list(folder.iterdir())) == 2
        kills += 1
    assert kills >= 9  # folder, tensors, description, three flushes, rename, flush, the oldest removed


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff\xfe", None])
def test_a_torn_description_is_passed_over(
    tmp_path: Path, content: bytes | None, capsys: pytest.CaptureFixture[str]
) -> None:
    run = trainer.build_run(recipe(tmp_path), torch.device("cpu"))
    for step in (1, 2):
        state.save_checkpoint(tmp_path, run, state.Checkpoint(step, {1: "a"}, {"data": {"batch": 17}}), keep=2)
    path = tmp_path / "step-00000002" / "state.json"
    path.write_bytes(path.read_bytes().replace(b"17", b"71") if content is None else content)
    found = state.load_newest(tmp_path, run)
    assert found is not None
    assert (found.step, found.progress) == (1, {"data": {"batch": 17}})
    assert "step-00000002 is damaged" in capsys.readouterr().err


# --- what is said ------------------------------------------------------------------------------------------------


def test_the_log_holds_every_loss_and_the_speed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trainer.train(recipe(tmp_path, evaluation={"every_steps": 2, "batches": 1}))
    steps = [line for line in lines(tmp_path) if "lr" in line]
    assert [line["step"] for line in steps] == [1, 2, 3, 4]
    for line in steps:
        assert {"next_token", "mtp", "indexer_kl", "grad_norm", "lr", "answers", "draft"} <= line.keys()
        assert line["tokens_per_second"] > 0
        assert 0 < line["peak_share"] < 100
    err = capsys.readouterr().err
    assert "step 4/4 next_token" in err
    assert "of peak" in err
    assert " left" in err
    assert "eval 4" in err


def test_a_terminal_gets_one_line_that_moves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "120")
    trainer.train(recipe(tmp_path, evaluation={"every_steps": 4, "batches": 1}))
    err = capsys.readouterr().err
    assert "4/4" in err
    assert "tok/s" in err
    assert "step 4/4 next_token" not in err  # the log line
    assert "eval 4" in err


def test_tensorboard_gets_what_the_log_gets(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    trainer.train(recipe(tmp_path, tensorboard=True, evaluation={"every_steps": 4, "batches": 1}))
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    written = events.Scalars("training/next_token")
    assert [event.step for event in written] == [1, 2, 3, 4]
    expected = [line["next_token"] for line in lines(tmp_path) if "lr" in line]
    assert [event.value for event in written] == pytest.approx(expected)
    assert events.Scalars("evaluation/all")


def test_tensorboard_that_is_not_installed_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ValueError, match="pip install tensorboard"):
        progress.tensorboard_writer(tmp_path, 0)


def test_the_peak_is_measured_without_a_random_number() -> None:
    """A draw would make the run depend on whether the peak was given."""
    before = torch.get_rng_state()
    assert 1e8 < measure_peak_flops(torch.device("cpu"), torch.float32, seconds=0.02) < 1e15
    assert torch.equal(before, torch.get_rng_state())


# --- export ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("format", ["bf16", "mxfp8", "fp32"])
def test_a_stopped_run_is_exported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, format: str) -> None:
    from minim3.model.causal_lm import MiniMaxM3SparseForConditionalGeneration

    original = progress.TrainingLog.end_step

    def end_step(self: Any, *args: Any) -> None:
        original(self, *args)
        if self.total_steps == 2:
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(progress.TrainingLog, "end_step", end_step)
    made = recipe(tmp_path, export={"format": format, "path": str(tmp_path / "elsewhere")})
    assert trainer.train(made).stopped_by == signal.SIGTERM
    assert "stopped by SIGTERM after step 2" in (tmp_path / "report.html").read_text()
    assert trainer.export_newest(made) == (2, tmp_path / "elsewhere")
    model = MiniMaxM3SparseForConditionalGeneration.from_pretrained(tmp_path / "elsewhere", dtype=torch.float32)
    averages = {k[8:]: v for k, v in saved(tmp_path, 2).items() if k.startswith("average.")}
    tolerance = {"bf16": 2**-8, "mxfp8": 2**-3, "fp32": 0.0}[format]
    for name, parameter in model.named_parameters():
        largest = averages[name].abs().max()
        torch.testing.assert_close(parameter.data, averages[name], rtol=0.0, atol=float(tolerance * largest))


def test_a_run_that_saved_nothing_has_nothing_to_export(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="nothing to export"):
        trainer.export_newest(recipe(tmp_path))
