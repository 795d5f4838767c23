"""The training loop, on one device: draw, forward, backward, step, log, evaluate, save.

    python -m minim3.training.trainer RECIPE [dotted.key=value ...]

The run's folder holds `checkpoints/`, `metrics.jsonl`, `recipe.json` and, at the end, `export/` (the released layout).
Started again with the same folder, a run goes on where its newest checkpoint stands; on the CPU it ends with the same
bits as a run that was never interrupted.
"""

import ctypes
import json
import signal
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

import torch
from torch import Tensor

from minim3.config import MiniMaxM3VLTextConfig, config_from_dict
from minim3.model.causal_lm import MiniMaxM3SparseForCausalLM, MiniMaxM3SparseForConditionalGeneration
from minim3.training.config import TrainingConfig, changed_keys, load_recipe
from minim3.training.data import EVALUATION_SPLIT, IGNORED, Batch, BatchBuilder, BatchStream, load_processor
from minim3.training.loss import compute_losses
from minim3.training.optim import (
    MovingAverage,
    build_optimizer,
    freeze_parts,
    load_imbalance,
    moe_layers,
    schedule_factor,
    set_learning_rate,
    update_router_bias,
)
from minim3.training.state import TrainingState, load_newest, save_checkpoint


@dataclass(frozen=True)
class TrainingResult:
    """step: steps done. stopped_by: the signal that ended the run early, None when it finished."""

    step: int
    stopped_by: int | None
    export_path: Path | None


def train(recipe: TrainingConfig, *, resume: bool = True) -> TrainingResult:
    """Run a recipe to its end, or to SIGINT or SIGTERM (the state is then saved first).

    resume: go on from the newest checkpoint of the output folder. False refuses a folder that has one.
    """
    output = Path(recipe.output)
    output.mkdir(parents=True, exist_ok=True)
    if recipe.threads is not None:
        torch.set_num_threads(recipe.threads)
    device = _device(recipe.device)
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")
    else:
        keep_freed_memory()

    torch.manual_seed(recipe.seed)
    processor = load_processor(recipe.data.processor)
    model = build_model(recipe).to(device).train()
    check_vocabulary(model, processor)
    freeze_parts(model, recipe.optim)
    routers = moe_layers(model)
    optimizer = build_optimizer(model, recipe.optim)
    average = MovingAverage(model, recipe.optim.ema_decay) if recipe.optim.ema_decay else None
    state = TrainingState(model, optimizer, average)
    first = _resume(state, recipe, output, resume)
    (output / "recipe.json").write_text(json.dumps(recipe.to_dict(), indent=1), encoding="utf-8")
    evaluation_batches = build_evaluation_batches(recipe, device)
    log = TrainingLog(output / "metrics.jsonl", recipe, first)
    log.say(f"{sum(p.numel() for p in model.parameters()):,} parameters on {device}, step {first} of {recipe.steps}")

    done = first
    with BatchStream(recipe.data, seed=recipe.seed, start=first) as batches, StopSignals() as stop:
        for step in range(first, recipe.steps):
            log.start_step()
            batch = next(batches).to(device)
            log.batch_arrived()

            factor = schedule_factor(step, recipe.steps, recipe.schedule)
            set_learning_rate(optimizer, factor)
            losses = compute_losses(model, batch, recipe.loss.at_step(step))
            losses.total.backward()
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.optim.clip_norm, foreach=True)
            if not torch.isfinite(norm):
                raise FloatingPointError(f"step {step}: the gradient norm is {norm.item()}; losses {losses.parts}")
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            bias_factor = factor if recipe.optim.router_bias_follows_schedule else 1.0
            update_router_bias(routers, losses.expert_ids, recipe.optim.router_bias_step * bias_factor)
            if average is not None:
                average.update(step)

            done = step + 1
            log.end_step(batch, losses.parts, losses.correct, losses.draft_correct, norm)
            last = done == recipe.steps
            if done % recipe.log_every_steps == 0 or last:
                num_experts = model.text_config.num_local_experts
                log.write_step(done, recipe.optim.lr * factor, load_imbalance(losses.expert_ids, num_experts))
            every = recipe.evaluation.every_steps
            if every and (done % every == 0 or last):
                log.write_evaluation(done, evaluate(model, evaluation_batches, recipe, average))
            every = recipe.checkpoint.every_steps
            if last or stop.received is not None or (every and done % every == 0):
                save_checkpoint(
                    output / "checkpoints", state, step=done, recipe=recipe.to_dict(), keep=recipe.checkpoint.keep
                )
            if stop.received is not None and not last:
                log.say(f"stopped by {signal.Signals(stop.received).name} after step {done}; the state is saved")
                return TrainingResult(done, stop.received, None)
    export_path = export(model, processor, recipe, average)
    log.say(f"exported to {export_path}")
    return TrainingResult(done, None, export_path)


def build_model(recipe: TrainingConfig) -> Any:
    """The recipe's model in fp32: fresh weights from torch's generator, or those of a checkpoint."""
    if recipe.model.config is not None:
        config = config_from_dict(recipe.model.config)
        if isinstance(config, MiniMaxM3VLTextConfig) or config.vision_config is None:
            text = config if isinstance(config, MiniMaxM3VLTextConfig) else config.text_config
            return MiniMaxM3SparseForCausalLM.from_config(text)
        return MiniMaxM3SparseForConditionalGeneration.from_config(config)
    from minim3.checkpoint import read_config, resolve_checkpoint

    assert recipe.model.start_from is not None
    folder = resolve_checkpoint(recipe.model.start_from)
    text_only = isinstance(read_config(folder), MiniMaxM3VLTextConfig)
    cls = MiniMaxM3SparseForCausalLM if text_only else MiniMaxM3SparseForConditionalGeneration
    return cls.from_pretrained(folder, dtype=torch.float32)


def check_vocabulary(model: Any, processor: Any) -> None:
    """Raises ValueError when tokenizer and config disagree; nothing else would notice before the answers are wrong."""
    tokenizer = getattr(processor, "tokenizer", None)
    if tokenizer is None:
        return
    if tokenizer.vocab_size > model.text_config.vocab_size:
        raise ValueError(
            f"the tokenizer has {tokenizer.vocab_size} tokens, but the config's vocab_size is "
            f"{model.text_config.vocab_size}"
        )
    for config, field, token in (
        (model.config, "image_token_index", "]<]image[>["),
        (model.config, "video_token_index", "]<]video[>["),
        (model.text_config, "bos_token_id", "]~!b["),
        (model.text_config, "eos_token_id", "[e~["),
    ):
        configured, actual = getattr(config, field, None), tokenizer.token_to_id(token)
        if configured is not None and actual is not None and configured != actual:
            raise ValueError(f"the config's {field} is {configured}, but {token!r} is token {actual} of the tokenizer")


def build_evaluation_batches(recipe: TrainingConfig, device: torch.device) -> list[Batch]:
    """Batches of a stream that training never draws from; none when the recipe does not evaluate."""
    if not recipe.evaluation.every_steps:
        return []
    sources = recipe.evaluation.sources or recipe.data.sources
    builder = BatchBuilder(recipe.data, sources, seed=recipe.seed, split=EVALUATION_SPLIT)
    return [builder.build(index).to(device) for index in range(recipe.evaluation.batches)]


@torch.no_grad()
def evaluate(
    model: Any, batches: Sequence[Batch], recipe: TrainingConfig, average: MovingAverage | None = None
) -> dict[str, float]:
    """Share of documents of each kind whose targets are all the model's first choice, of the averaged weights if any.

    That is the share of conversations whose every answer greedy decoding gets exactly right, without decoding one.
    Beside the kinds: `all`, `loss` (next token) and `draft` (targets that the first MTP depth would have drafted).
    """
    if average is not None:
        average.swap()
    model.eval()
    right: dict[str, int] = defaultdict(int)
    documents: dict[str, int] = defaultdict(int)
    loss = draft_right = draft_total = 0.0
    for batch in batches:
        losses = compute_losses(model, batch, replace(recipe.loss, indexer_kl_weight=0.0))
        for kind, answer_is_right in zip(batch.kinds, right_documents(batch, losses.correct).tolist(), strict=True):
            documents[kind] += 1
            right[kind] += answer_is_right
        loss += float(losses.parts["next_token"]) / len(batches)
        if losses.draft_correct is not None:
            draft_right += float(losses.draft_correct.sum())
            draft_total += losses.draft_correct.numel()
    model.train()
    if average is not None:
        average.swap()
    scores = {kind: right[kind] / documents[kind] for kind in sorted(documents)}
    scores["all"] = sum(right.values()) / max(1, sum(documents.values()))
    scores["loss"] = loss
    if draft_total:
        scores["draft"] = draft_right / draft_total
    return scores


def right_documents(batch: Batch, correct: Tensor) -> Tensor:
    """bool `[D]`: no target of the document is missed. `correct` is that of `Losses`, one entry a target."""
    document = batch.document_ids()[batch.labels != IGNORED]
    wrong = torch.zeros(len(batch.lengths), dtype=torch.int64, device=correct.device)
    wrong.index_add_(0, document, (~correct).long())
    return wrong == 0


def export(model: Any, processor: Any, recipe: TrainingConfig, average: MovingAverage | None) -> Path:
    """Write model (averaged weights if the recipe keeps them) and processor as a checkpoint folder."""
    path = Path(recipe.export.path) if recipe.export.path else Path(recipe.output) / "export"
    if average is not None:
        average.swap()
    model.save_pretrained(path, format=recipe.export.format)
    if average is not None:
        average.swap()
    if hasattr(processor, "save_pretrained"):
        processor.save_pretrained(path)
    return path


class StopSignals:
    """Notes SIGINT and SIGTERM instead of dying of them; a second one is not waited for."""

    def __init__(self) -> None:
        self.received: int | None = None
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> "StopSignals":
        if threading.current_thread() is threading.main_thread():  # Python delivers signals nowhere else
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._note)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.received is not None:
            raise KeyboardInterrupt
        self.received = number


class TrainingLog:
    """Averages over the steps between two lines, printed to stderr and appended to `metrics.jsonl`."""

    def __init__(self, path: Path, recipe: TrainingConfig, first: int) -> None:
        self.recipe = recipe
        self.path = path
        self._forget_after(first)
        self.started = time.monotonic()
        self.first_step, self.total_steps = first, 0
        self._clear()

    def _forget_after(self, first: int) -> None:
        """Drop the lines of steps that are about to be done again."""
        kept = []
        if self.path.exists():
            lines = self.path.read_text(encoding="utf-8").splitlines(keepends=True)
            kept = [line for line in lines if line.endswith("}\n") and json.loads(line)["step"] <= first]
        self.path.write_text("".join(kept), encoding="utf-8")

    def _clear(self) -> None:
        self.steps = 0
        self.tokens = 0
        self.seconds = self.waited = 0.0
        self.sums: dict[str, tuple[Tensor, int]] = {}  # a loss may be left out at some steps

    def start_step(self) -> None:
        self._step_started = time.monotonic()

    def batch_arrived(self) -> None:
        self.waited += time.monotonic() - self._step_started

    def end_step(
        self, batch: Batch, parts: dict[str, Tensor], correct: Tensor, draft_correct: Tensor | None, norm: Tensor
    ) -> None:
        values = {**parts, "answers": right_documents(batch, correct).float().mean(), "grad_norm": norm}
        if draft_correct is not None:
            values["draft"] = draft_correct.float().mean()
        for name, value in values.items():
            total, count = self.sums.get(name, (torch.zeros_like(value.detach()), 0))
            self.sums[name] = (total + value.detach(), count + 1)
        self.steps += 1
        self.total_steps += 1
        self.tokens += batch.num_tokens
        self.seconds += time.monotonic() - self._step_started

    def write_step(self, step: int, lr: float, imbalance: float) -> None:
        means = {name: float(total) / count for name, (total, count) in self.sums.items()}
        rate = self.tokens / self.seconds
        per_step = (time.monotonic() - self.started) / self.total_steps
        minutes_left = per_step * (self.recipe.steps - step) / 60
        record = {
            "step": step,
            **means,
            "lr": lr,
            "load_imbalance": imbalance,
            "tokens_per_second": rate,
            "step_seconds": self.seconds / self.steps,
            "wait_seconds": self.waited / self.steps,
            "elapsed_seconds": time.monotonic() - self.started,
        }
        self._append(record)
        losses = " ".join(f"{name} {value:.4f}" for name, value in means.items())
        self.say(
            f"step {step}/{self.recipe.steps} {losses} load {imbalance:.2f} lr {lr:.2e} {rate:,.0f} tok/s "
            f"{record['step_seconds']:.2f} s (waiting {record['wait_seconds']:.2f}), {minutes_left:.0f} min left"
        )
        self._clear()

    def write_evaluation(self, step: int, scores: dict[str, float]) -> None:
        self._append({"step": step, "evaluation": scores})
        self.say(f"eval {step} " + " ".join(f"{name} {value:.3f}" for name, value in scores.items()))

    def say(self, text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    def _append(self, record: dict[str, Any]) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")


def keep_freed_memory() -> None:
    """Ask glibc to reuse large freed blocks instead of handing them back to the kernel, for the life of the process.

    Every operator allocates its output; with the default setting each megabyte of it faults in 256 fresh pages, which
    takes a tenth to a third of a step. Elsewhere (another C library) nothing is done: the numbers are the same.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        trim_threshold, top_pad, mmap_threshold = -1, -2, -3  # M_* of malloc.h
        mallopt(mmap_threshold, 32 << 20)  # the largest value glibc takes
        mallopt(trim_threshold, 2**31 - 1)
        mallopt(top_pad, 256 << 20)


def _device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("the recipe asks for device 'cuda', but torch sees none; set device=cpu or device=auto")
    return torch.device(name)


def _resume(state: TrainingState, recipe: TrainingConfig, output: Path, resume: bool) -> int:
    """Restore the newest checkpoint, if any; returns the step to go on with."""
    folder = output / "checkpoints"
    if not resume:
        if folder.exists() and any(folder.glob("step-*")):
            raise ValueError(f"{folder} already holds checkpoints: resume, remove it or choose another output folder")
        return 0
    found = load_newest(folder, state)
    if found is None:
        return 0
    step, saved_recipe = found
    for key, (before, now) in changed_keys(saved_recipe, recipe.to_dict()).items():
        print(f"recipe changed since the checkpoint: {key} was {before!r}, is {now!r}", file=sys.stderr)
    if step > recipe.steps:
        raise ValueError(f"{folder} is at step {step}, past the recipe's {recipe.steps} steps")
    return step


def main(arguments: Sequence[str]) -> int:
    """`RECIPE [dotted.key=value ...]`; exit codes 0, 1 (failed), 2 (bad recipe), 128 + signal when stopped."""
    if not arguments or arguments[0] in ("-h", "--help"):
        print(__doc__, file=sys.stderr)
        return 0 if arguments else 2
    try:
        recipe = load_recipe(arguments[0], arguments[1:])
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    result = train(recipe)
    return 0 if result.stopped_by is None else 128 + result.stopped_by


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
