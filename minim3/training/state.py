"""Checkpoints of a run in progress: everything needed to go on as if nothing had happened.

    OUTPUT/checkpoints/step-00000500/
        state.safetensors    weights, buffers, optimizer moments, moving averages, random state
        state.json           step, recipe, position in the data, size and CRC-32 of the tensor file, CRC-32 of itself

A checkpoint is written aside, flushed to disk and renamed: a folder named `step-*` is whole, whenever the process died.
"""

import json
import os
import re
import shutil
import sys
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from minim3.training.optim import MovingAverage

TENSORS, METADATA = "state.safetensors", "state.json"
FORMAT_VERSION = 1
OPTIMIZER_STATE = ("step", "exp_avg", "exp_avg_sq", "momentum")  # of AdamW and of Muon


@dataclass(frozen=True)
class TrainingState:
    """What a checkpoint saves and restores, and the step that comes next."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    average: MovingAverage | None

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor of the state under a flat name; sharing memory with the run."""
        tensors = {f"model.{name}": value.detach() for name, value in _weights(self.model).items()}
        names = _names_of_parameters(self.optimizer)
        stepped = [parameter for parameter in names if parameter in self.optimizer.state]
        for parameter in stepped:
            for key, value in self.optimizer.state[parameter].items():
                tensors[f"optimizer.{key}.{names[parameter]}"] = value
        if self.average is not None:
            tensors.update({f"average.{name}": value for name, value in self.average.averages.items()})
        tensors["random.cpu"] = torch.get_rng_state()
        if torch.cuda.is_available():
            tensors["random.cuda"] = torch.cuda.get_rng_state()
        return tensors

    @torch.no_grad()
    def restore(self, tensors: dict[str, Tensor], source: Path) -> None:
        """Put saved tensors back in place. Raises ValueError when they do not belong to this model and recipe."""
        weights = {f"model.{name}": value for name, value in _weights(self.model).items()}
        averages = {} if self.average is None else {f"average.{k}": v for k, v in self.average.averages.items()}
        for name, place in {**weights, **averages}.items():
            if name not in tensors:
                raise ValueError(f"{source} has no {name!r}: it was written by another model or recipe")
            if tensors[name].shape != place.shape:
                raise ValueError(
                    f"{source}: {name!r} has the shape {list(tensors[name].shape)}, the recipe's model "
                    f"{list(place.shape)}; give the run another output folder, or start it afresh"
                )
            place.copy_(tensors.pop(name))
        self.optimizer.state.clear()
        for parameter, name in _names_of_parameters(self.optimizer).items():
            saved = {key: f"optimizer.{key}.{name}" for key in OPTIMIZER_STATE}
            held = {key: tensors.pop(full).to(parameter.device) for key, full in saved.items() if full in tensors}
            if held:
                self.optimizer.state[parameter] = held
        torch.set_rng_state(tensors.pop("random.cpu"))
        cuda_state = tensors.pop("random.cuda", None)
        if cuda_state is not None and torch.cuda.is_available():
            torch.cuda.set_rng_state(cuda_state)
        left = [name for name in tensors if not name.startswith("average.")]  # the average may have been turned off
        if left:
            raise ValueError(f"{source} holds tensors this run has no place for: {', '.join(sorted(left)[:5])}")


@dataclass(frozen=True)
class Checkpoint:
    """What a checkpoint holds beside tensors, as plain values. step: the steps done.

    progress: where everything else stands that the next steps depend on, by name (position in the data, ...).
    """

    step: int
    recipe: Mapping[str, Any]
    progress: Mapping[str, Any]


def save_checkpoint(folder: Path, state: TrainingState, checkpoint: Checkpoint, *, keep: int) -> Path:
    """Write `folder/step-N` atomically, then remove all but the newest `keep` checkpoints.

    Raises OSError when the disk is full or fails: nothing half written stays, the checkpoints before are untouched.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for left_over in folder.glob(".*-*"):  # of a process that was killed while saving
        shutil.rmtree(left_over)
    final = folder / f"step-{checkpoint.step:08d}"
    partial = folder / f".partial-{checkpoint.step:08d}"
    try:
        partial.mkdir()
        _write(partial, state, checkpoint)
    except (OSError, SafetensorError) as error:  # safetensors wraps what the system said
        shutil.rmtree(partial, ignore_errors=True)
        kept = find_checkpoints(folder)
        newest = f"the newest checkpoint is {kept[-1].name}" if kept else "there is none before it"
        message = f"the state of step {checkpoint.step} could not be saved in {folder} ({error}); {newest}"
        raise OSError(message) from error
    outdated = folder / f".outdated-{checkpoint.step:08d}"
    if final.exists():  # a damaged one that the run went back from
        final.rename(outdated)
    partial.rename(final)
    _flush(folder)
    if outdated.exists():
        shutil.rmtree(outdated)
    for old in find_checkpoints(folder)[:-keep]:
        hidden = folder / f".outdated-{old.name}"  # one that is half removed must not be taken for a checkpoint
        old.rename(hidden)
        shutil.rmtree(hidden)
    return final


def _write(folder: Path, state: TrainingState, checkpoint: Checkpoint) -> None:
    save_file({name: tensor.contiguous() for name, tensor in state.tensors().items()}, folder / TENSORS)
    metadata = {
        "format_version": FORMAT_VERSION,
        "step": checkpoint.step,
        "recipe": checkpoint.recipe,
        "progress": checkpoint.progress,
        "num_bytes": (folder / TENSORS).stat().st_size,
        "crc32": _crc32(folder / TENSORS),
    }
    text = json.dumps({**metadata, "metadata_crc32": _crc32_of_values(metadata)}, indent=1)
    (folder / METADATA).write_text(text, encoding="utf-8")
    for path in (folder / TENSORS, folder / METADATA, folder):
        _flush(path)


def find_checkpoints(folder: Path) -> list[Path]:
    """The checkpoints of a run, oldest first."""
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if re.fullmatch(r"step-\d{8,}", path.name))


def load_newest(folder: Path, state: TrainingState) -> Checkpoint | None:
    """Restore the newest whole checkpoint and return the rest of it, or None when there is none at all.

    A damaged checkpoint is reported and passed over. Raises ValueError when all are damaged.
    """
    checkpoints = find_checkpoints(folder)
    for path in reversed(checkpoints):
        try:
            metadata, tensors = _read(path)
        except (OSError, SafetensorError, DamagedCheckpoint) as error:
            print(f"checkpoint {path} is damaged ({error}); trying the one before", file=sys.stderr)
            continue
        state.restore(tensors, path)
        return Checkpoint(metadata["step"], metadata["recipe"], metadata.get("progress", {}))
    if checkpoints:
        raise ValueError(f"every checkpoint in {folder} is damaged; remove the folder to start afresh")
    return None


class DamagedCheckpoint(Exception):
    """The files are not those that were written."""


def _read(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    try:
        metadata = json.loads((path / METADATA).read_text(encoding="utf-8"))
    except ValueError as error:  # no JSON, or not even text
        raise DamagedCheckpoint(f"{METADATA}: {error}") from error
    if not isinstance(metadata, dict) or "format_version" not in metadata:
        raise DamagedCheckpoint(f"{METADATA} is not what was written")
    written = metadata.pop("metadata_crc32", None)  # the first runs have none
    if written is not None and written != _crc32_of_values(metadata):
        raise DamagedCheckpoint(f"{METADATA} is not what was written")
    if metadata["format_version"] != FORMAT_VERSION:
        raise ValueError(f"{path} has format {metadata['format_version']}; this version reads {FORMAT_VERSION}")
    size, crc32 = (path / TENSORS).stat().st_size, _crc32(path / TENSORS)
    if size != metadata["num_bytes"] or crc32 != metadata["crc32"]:
        raise DamagedCheckpoint(f"{size} bytes with CRC {crc32}; written {metadata['num_bytes']}, {metadata['crc32']}")
    return metadata, load_file(path / TENSORS)


def _weights(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by name, each tensor once."""
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def _names_of_parameters(optimizer: torch.optim.Optimizer) -> dict[Tensor, str]:
    return {
        parameter: name
        for group in optimizer.param_groups
        for parameter, name in zip(group["params"], group["param_names"], strict=True)
    }


def _crc32(path: Path) -> int:
    crc = 0
    with path.open("rb") as file:
        while chunk := file.read(1 << 22):
            crc = zlib.crc32(chunk, crc)
    return crc


def _crc32_of_values(values: Mapping[str, Any]) -> int:
    as_read = json.loads(json.dumps(values))  # keys are strings there
    return zlib.crc32(json.dumps(as_read, sort_keys=True).encode())


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
