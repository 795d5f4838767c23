"""What a run says while it goes on: a progress line or log lines on stderr, `metrics.jsonl`, TensorBoard."""

import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from minim3.training.config import TrainingConfig
from minim3.training.data import Batch
from minim3.training.loss import Losses
from minim3.training.validation import right_documents

METRICS = "metrics.jsonl"


class TrainingLog:
    """Averages over the steps between two lines. On a terminal a line that is drawn anew takes the place of log lines.

    `first`: the step the run goes on from; what an earlier process wrote of later steps is dropped.
    """

    def __init__(self, output: Path, recipe: TrainingConfig, first: int, peak_flops: float) -> None:
        self.recipe = recipe
        self.path = output / METRICS
        self.peak_flops = peak_flops
        _forget_steps_after(first, self.path)
        self.first_step, self.total_steps = first, 0
        self.started = time.monotonic()
        self._line = ProgressLine(recipe.steps, first) if sys.stderr.isatty() else None
        self._writer = tensorboard_writer(output, first) if recipe.tensorboard else None
        self._clear()

    def __enter__(self) -> "TrainingLog":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._line is not None:
            self._line.close()
        if self._writer is not None:
            self._writer.close()

    def _clear(self) -> None:
        self.steps = 0
        self.tokens = 0
        self.flops = 0
        self.seconds = self.waited = 0.0
        self.sums: dict[str, tuple[Tensor, int]] = {}  # a loss may be left out at some steps

    def start_step(self) -> None:
        self._step_started = time.monotonic()

    def batches_arrived(self) -> None:
        self.waited += time.monotonic() - self._step_started

    def end_step(
        self, batches: Sequence[Batch], losses: Losses, norm: Tensor, flops: int, skipped_because: str | None = None
    ) -> None:
        """A step is done: `flops` are those its batches need; a skipped step counts in the time, not in the means."""
        self.steps += 1
        self.total_steps += 1
        self.tokens += sum(batch.num_tokens for batch in batches)
        self.flops += flops
        self.seconds += time.monotonic() - self._step_started
        step = self.first_step + self.total_steps
        if skipped_because is not None:
            self._append({"step": step, "skipped": skipped_because})
            self.say(f"step {step} skipped: {skipped_because}")
            return
        values = {**losses.parts, "grad_norm": norm}
        values["answers"] = right_documents(batches, losses.correct).float().mean()
        if losses.draft_correct is not None:
            values["draft"] = losses.draft_correct.float().mean()
        for name, value in values.items():
            total, count = self.sums.get(name, (torch.zeros_like(value.detach()), 0))
            self.sums[name] = (total + value.detach(), count + 1)
        if self._line is not None:
            text = f"loss {float(losses.parts['next_token']):.4f}  {self._speed()}"
            self._line.advance_to(step, f"{text}  {self._time_left(step)}")

    def write_step(self, step: int, lr: float, imbalance: float, num_skipped: int) -> None:
        means = {name: float(total) / count for name, (total, count) in self.sums.items()}
        record = {
            "step": step,
            **means,
            "lr": lr,
            "load_imbalance": imbalance,
            "tokens_per_second": self.tokens / self.seconds,
            "peak_share": self.flops / self.seconds / self.peak_flops,
            "step_seconds": self.seconds / self.steps,
            "wait_seconds": self.waited / self.steps,
            "elapsed_seconds": time.monotonic() - self.started,
            "skipped_steps": num_skipped,
        }
        self._append(record)
        if self._line is None:
            losses = " ".join(f"{name} {value:.4f}" for name, value in means.items())
            self.say(
                f"step {step}/{self.recipe.steps} {losses} load {imbalance:.2f} lr {lr:.2e} {self._speed()} "
                f"{record['step_seconds']:.2f} s (waiting {record['wait_seconds']:.2f}), {self._time_left(step)}"
            )
        if self._writer is not None:
            for name, value in record.items():
                self._writer.add_scalar(f"training/{name}", value, step)
        self._clear()

    def write_evaluation(self, step: int, scores: dict[str, float]) -> None:
        self._append({"step": step, "evaluation": scores})
        self.say(f"eval {step} " + " ".join(f"{name} {value:.3f}" for name, value in scores.items()))
        if self._writer is not None:
            for name, value in scores.items():
                self._writer.add_scalar(f"evaluation/{name}", value, step)

    def say(self, text: str) -> None:
        if self._line is not None:
            self._line.print_above(text)
        else:
            print(text, file=sys.stderr, flush=True)

    def _speed(self) -> str:
        share = self.flops / self.seconds / self.peak_flops
        return f"{self.tokens / self.seconds:,.0f} tok/s {share:.0%} of peak"

    def _time_left(self, step: int) -> str:
        seconds = (time.monotonic() - self.started) / max(1, self.total_steps) * (self.recipe.steps - step)
        if seconds < 100:
            return f"{seconds:.0f} s left"
        hours, minutes = divmod(round(seconds / 60), 60)
        return f"{hours} h {minutes:02} min left" if hours else f"{minutes} min left"

    def _append(self, record: dict[str, Any]) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")


class ProgressLine:
    """One line at the bottom of the terminal, drawn by rich at the end of a step (no thread draws it in between)."""

    def __init__(self, steps: int, first: int) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

        self._progress = Progress(
            TextColumn("step"), MofNCompleteColumn(), BarColumn(bar_width=24), TextColumn("{task.description}"),
            console=Console(file=sys.stderr), auto_refresh=False,
        )  # fmt: skip
        self._task = self._progress.add_task("", total=steps, completed=first)
        self._progress.start()
        self._drawn = 0.0

    def advance_to(self, step: int, text: str) -> None:
        self._progress.update(self._task, completed=step, description=text)
        if time.monotonic() - self._drawn > 0.1:
            self._progress.refresh()
            self._drawn = time.monotonic()

    def print_above(self, text: str) -> None:
        self._progress.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def close(self) -> None:
        self._progress.refresh()
        self._progress.stop()


def tensorboard_writer(output: Path, first: int) -> Any:
    """A writer to `output/tensorboard` that hides what an earlier process wrote of the steps after `first`.

    Raises ValueError when TensorBoard is not installed.
    """
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ModuleNotFoundError as error:
        raise ValueError(
            "the recipe says `tensorboard: true`, but TensorBoard is not installed: pip install tensorboard"
        ) from error
    return SummaryWriter(str(output / "tensorboard"), purge_step=first + 1)


def _forget_steps_after(first: int, path: Path) -> None:
    """Drop the lines of steps that are about to be done again, and a line that was cut off."""
    kept = []
    if path.exists():
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
        kept = [line for line in lines if line.endswith("}\n") and json.loads(line)["step"] <= first]
    path.write_text("".join(kept), encoding="utf-8")
