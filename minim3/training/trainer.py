"""The training loop, on one device: draw, forward, backward, step, log, evaluate, save.

    python -m minim3.training.trainer RECIPE [dotted.key=value ...]

The run's folder holds `checkpoints/`, `metrics.jsonl`, `recipe.json`, `report.html` and, at the end, `export/` (the
released layout). Started again with the same folder, a run goes on where its newest checkpoint stands; on the CPU it
ends with the same bits as a run that was never interrupted.
"""

import json
import signal
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from minim3.training.checkpointing import checkpoint_activations
from minim3.training.config import LossRecipe, TrainingConfig, changed_keys, load_recipe
from minim3.training.conversion import build_model
from minim3.training.data import Batch, BatchStream, load_processor
from minim3.training.flops import training_flops
from minim3.training.lock import locked
from minim3.training.lora import AdapterState, adapt, export_adapter
from minim3.training.loss import LossCounts, Losses, compute_losses
from minim3.training.machine import measure_peak_flops, prepare_device
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
from minim3.training.precision import compute_in_bf16
from minim3.training.progress import TrainingLog
from minim3.training.report import write_report
from minim3.training.signals import StopSignals
from minim3.training.spikes import SpikeGuard, TrainingDiverged
from minim3.training.state import Checkpoint, TrainingState, find_checkpoints, load_newest, save_checkpoint
from minim3.training.validation import build_evaluation_batches, evaluate

COMPUTE_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class TrainingResult:
    """step: steps done. stopped_by: the signal that ended the run early, None when it finished."""

    step: int
    stopped_by: int | None
    export_path: Path | None


def train(recipe: TrainingConfig, *, resume: bool = True) -> TrainingResult:
    """Run a recipe to its end, or to SIGINT or SIGTERM (the state is then saved first).

    resume: go on from the newest checkpoint of the output folder. False refuses a folder that has one.

    Raises:
        ValueError: the recipe asks for what cannot be.
        TrainingDiverged: `spikes.max_in_row` steps in a row had to be skipped.
        OSError: a checkpoint cannot be written; those before are as they were.
    """
    output, checkpoints = Path(recipe.output), Path(recipe.output) / "checkpoints"
    if not resume and find_checkpoints(checkpoints):
        raise ValueError(f"{checkpoints} already holds checkpoints: resume, remove it or choose another output folder")
    output.mkdir(parents=True, exist_ok=True)
    with locked(output):
        return _train(recipe, output, checkpoints)


def _train(recipe: TrainingConfig, output: Path, checkpoints: Path) -> TrainingResult:
    device = prepare_device(recipe.device, recipe.threads)
    run = build_run(recipe, device)
    model: Any = run.model
    optimizer, average = run.optimizer, run.average
    saved = _resume(run, recipe, checkpoints)
    first = saved.step
    guard = SpikeGuard(recipe.spikes)
    guard.restore(saved.progress.get("spikes"))
    (output / "recipe.json").write_text(json.dumps(recipe.to_dict(), indent=1), encoding="utf-8")
    evaluation_batches = build_evaluation_batches(recipe, device)
    peak = recipe.peak_flops or measure_peak_flops(device, COMPUTE_DTYPES[recipe.model.precision])
    routers = moe_layers(model) if recipe.lora is None else []  # an adapter's base stays as it is

    done, problem = first, None
    with (
        TrainingLog(output, recipe, first, peak) as log,
        BatchStream(
            recipe.data, seed=recipe.seed, state=saved.progress["data"], bad_records_path=output / "bad_records.jsonl"
        ) as stream,
        StopSignals() as stop,
    ):
        parameters = sum(parameter.numel() for parameter in model.parameters())
        log.say(f"{parameters:,} parameters on {device} ({peak / 1e9:,.0f} GFLOP/s), step {first} of {recipe.steps}")
        if first == recipe.steps:
            log.say("nothing is left to do: more `steps` go on, another `output` starts anew")
        for step in range(first, recipe.steps):
            log.start_step()
            batches = [next(stream).to(device) for _ in range(recipe.batches_per_step)]
            log.batches_arrived()

            factor = schedule_factor(step, recipe.steps, recipe.schedule)
            set_learning_rate(optimizer, factor)
            loss_recipe = recipe.loss.at_step(step)
            losses = accumulate_gradients(model, batches, loss_recipe)
            clip_norm = recipe.optim.clip_norm or float("inf")
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), clip_norm, foreach=True)
            problem = guard.reason_to_skip(float(losses.total), float(norm))
            if problem is None:
                optimizer.step()
                bias_factor = factor if recipe.optim.router_bias_follows_schedule else 1.0
                update_router_bias(routers, losses.expert_ids, recipe.optim.router_bias_step * bias_factor)
                if average is not None:
                    average.update(step)
            optimizer.zero_grad(set_to_none=True)

            done = step + 1
            flops = sum(training_flops(model, batch, loss_recipe) for batch in batches)
            log.end_step(batches, losses, norm, flops, problem)
            if guard.gives_up:
                write_report(output, f"gave up at step {done}")
                raise TrainingDiverged(_say_how_to_go_on(done, problem, guard, checkpoints))
            last = done == recipe.steps
            if done % recipe.log_every_steps == 0 or last:
                imbalance = load_imbalance(losses.expert_ids, model.text_config.num_local_experts)
                log.write_step(done, recipe.optim.lr * factor, imbalance, guard.num_skipped)
            every = recipe.evaluation.every_steps
            if every and (done % every == 0 or last):
                log.write_evaluation(done, evaluate(model, evaluation_batches, recipe, average))
            every = recipe.checkpoint.every_steps
            if last or stop.received is not None or (every and done % every == 0):
                progress = {"data": stream.state(), "spikes": guard.state()}
                now = Checkpoint(done, recipe.to_dict(), progress)
                # While steps are skipped the weights may be what is broken: the states before stay beside the new ones.
                save_checkpoint(checkpoints, run, now, keep=recipe.checkpoint.keep + guard.in_row)
            if stop.received is not None and not last:
                name = signal.Signals(stop.received).name
                log.say(f"stopped by {name} after step {done}; the state is saved, the same command goes on")
                write_report(output, f"stopped by {name} after step {done}")
                return TrainingResult(done, stop.received, None)
        if guard.in_row and problem is not None:
            log.say(f"warning: the last {guard.in_row} steps were skipped ({problem}); try the model before you use it")
    path = export(run, recipe)
    write_report(output, f"finished after step {done}")
    print(f"exported to {path}; the curves are in {output / 'report.html'}", file=sys.stderr)
    return TrainingResult(done, None, path)


def accumulate_gradients(model: Any, batches: Sequence[Batch], recipe: LossRecipe) -> Losses:
    """Backward passes of `batches`, whose gradients and losses sum up to those of one batch that held them all.

    What is measured beside the losses (`recall.*`) is averaged over the batches that measured it.
    """
    mtp = model.text_model.mtp
    whole = LossCounts.of(batches, 0 if mtp is None else len(mtp.layers))
    found: list[Losses] = []
    for batch in batches:
        losses = compute_losses(model, batch, recipe, whole)
        losses.total.backward()
        parts = {name: part.detach() for name, part in losses.parts.items()}
        found.append(replace(losses, total=losses.total.detach(), parts=parts))
    if len(found) == 1:
        return found[0]
    parts = {}
    for name in dict.fromkeys(name for losses in found for name in losses.parts):
        values = torch.stack([losses.parts[name] for losses in found if name in losses.parts])
        parts[name] = values.mean() if name.startswith("recall.") else values.sum()
    drafts = [losses.draft_correct for losses in found if losses.draft_correct is not None]
    return Losses(
        total=torch.stack([losses.total for losses in found]).sum(),
        parts=parts,
        correct=torch.cat([losses.correct for losses in found]),
        draft_correct=torch.cat(drafts) if drafts else None,
        expert_ids=[torch.cat(of_layer) for of_layer in zip(*(losses.expert_ids for losses in found), strict=True)],
    )


def build_run(recipe: TrainingConfig, device: torch.device) -> TrainingState:
    """Model, optimizer and moving average of a recipe at step 0."""
    torch.manual_seed(recipe.seed)
    model = build_model(recipe).to(device).train()
    check_vocabulary(model, load_processor(recipe.data.processor))
    if recipe.lora is not None:
        adapt(model, recipe.lora)
    freeze_parts(model, recipe.optim)
    optimizer = build_optimizer(model, recipe.optim)
    if recipe.model.checkpoint_activations:
        checkpoint_activations(model)
    if recipe.model.precision == "bf16":
        compute_in_bf16(model)
    if recipe.lora is not None:
        return AdapterState.of(model, optimizer, recipe.optim.ema_decay)
    average = MovingAverage(model, recipe.optim.ema_decay) if recipe.optim.ema_decay else None
    return TrainingState(model, optimizer, average)


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


def export(run: TrainingState, recipe: TrainingConfig) -> Path:
    """Write model (averaged weights if the recipe keeps them) and processor as a checkpoint folder, or the adapter."""
    path = Path(recipe.export.path) if recipe.export.path else Path(recipe.output) / "export"
    model: Any = run.model
    if run.average is not None:
        run.average.swap()
    if recipe.lora is None:
        model.save_pretrained(path, format=recipe.export.format)
    else:
        export_adapter(model, path, recipe.model.start_from, recipe.lora)
    if run.average is not None:
        run.average.swap()
    if recipe.lora is not None:
        return path
    processor = load_processor(recipe.data.processor)
    if hasattr(processor, "save_pretrained"):
        processor.save_pretrained(path)
    return path


def export_newest(recipe: TrainingConfig) -> tuple[int, Path]:
    """Write the newest checkpoint of a run, stopped or finished, in the released layout; returns its step and the path.

    Raises ValueError when the run has saved none.
    """
    checkpoints = Path(recipe.output) / "checkpoints"
    if not find_checkpoints(checkpoints):
        raise ValueError(f"nothing to export: {checkpoints} holds no checkpoint (is `output` the folder of the run?)")
    run = build_run(recipe, prepare_device(recipe.device, recipe.threads))
    saved = load_newest(checkpoints, run)
    assert saved is not None
    return saved.step, export(run, recipe)


def _resume(run: TrainingState, recipe: TrainingConfig, checkpoints: Path) -> Checkpoint:
    """Restore the newest checkpoint, if there is one; returns what it says beside the tensors."""
    saved = load_newest(checkpoints, run)
    if saved is None:
        return Checkpoint(0, {}, {"data": None})
    for key, (before, now) in changed_keys(saved.recipe, recipe.to_dict()).items():
        print(f"recipe changed since the checkpoint: {key} was {before!r}, is {now!r}", file=sys.stderr)
    if saved.recipe.get("optim", {}).get("kind", recipe.optim.kind) != recipe.optim.kind:
        raise ValueError(
            f"{checkpoints} was written with optim.kind {saved.recipe['optim']['kind']!r}, the recipe says "
            f"{recipe.optim.kind!r}: go on as before, or start another output from an export of it (model.start_from)"
        )
    if saved.step > recipe.steps:
        raise ValueError(f"{checkpoints} is at step {saved.step}, past the recipe's {recipe.steps} steps")
    # The first runs saved no position: theirs follows from the step.
    return replace(saved, progress={"data": {"batch": saved.step}, **saved.progress})


def _say_how_to_go_on(step: int, problem: str | None, guard: SpikeGuard, checkpoints: Path) -> str:
    newest = find_checkpoints(checkpoints)
    back = f"the newest checkpoint is {newest[-1]}" if newest else "no checkpoint was saved yet"
    sound = [path for path in newest if int(path.name.removeprefix("step-")) <= step - guard.in_row]
    if sound and sound[-1] != newest[-1]:
        back += f", the newest from before them {sound[-1].name} (remove later ones to go on from it)"
    return (
        f"gave up at step {step}: {guard.in_row} steps in a row were skipped, at the last {problem}; {back}. A lower "
        "learning rate, a longer warm-up or a lower optim.clip_norm may help, or other data; spikes.max_in_row and "
        "spikes.factor set when to give up"
    )


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
