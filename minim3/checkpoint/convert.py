"""Converting: a checkpoint in another number format, streamed tensor by tensor from the old files to the new."""

import shutil
from pathlib import Path

import torch
from torch import Tensor, nn

from minim3.checkpoint.adapter import Adapter
from minim3.checkpoint.folder import check_replaceable, replaced_folder
from minim3.checkpoint.hub import read_config
from minim3.checkpoint.loader import LoadPlan, check_adapter, find_targets, plan_loading
from minim3.checkpoint.names import Placement
from minim3.checkpoint.reader import CheckpointReader
from minim3.checkpoint.writer import WrittenSize, released_entries, write_entries

# Tokenizer, processor, template, notes; nothing that could run, no weights in other formats.
_COMPANIONS = ("*.json", "*.jinja", "*.txt", "*.md", "LICENSE*", "NOTICE*")


def convert_checkpoint(
    source: str | Path, destination: str | Path, model: nn.Module, *, format: str, max_shard_bytes: int | None = None,
    adapter: Adapter | None = None,
) -> WrittenSize:  # fmt: skip
    """Writes the checkpoint `source` (a folder or safetensors file) in another format as the folder `destination`.

    Every key is checked against `model` before anything is written; only the model's names and shapes are looked at,
    so it belongs on the meta device. One tensor is in memory at a time. Tokenizer, processor and notes are copied.
    format, max_shard_bytes: as for `write_checkpoint`. adapter: merged into the weights it changes.

    Raises `ValueError` for a source or an adapter that does not fit the model, for a destination that holds something
    else, and for values that MXFP8 cannot hold; `destination` is then as it was.
    """
    source, destination = Path(source), Path(destination)
    folder = source if source.is_dir() else source.parent
    if destination.exists() and folder.resolve() == destination.resolve():
        raise ValueError(f"{source} and {destination} are the same folder: convert into another one")
    check_replaceable(destination)
    config = read_config(source)
    with CheckpointReader(source) as reader:
        targets = find_targets(model)
        plan = plan_loading(reader, targets)
        plan.check(reader.path)
        if adapter is not None:
            check_adapter(adapter, reader, targets)
        _check_tied(reader, plan)
        pieces = _PieceReader(reader, plan, adapter)
        entries = released_entries(model, format, pieces.read)
        with replaced_folder(destination) as new:
            written = write_entries(new, entries, config, format, max_shard_bytes, f"Writing {destination.name}")
            _copy_companions(folder, new)
    return written


def _check_tied(reader: CheckpointReader, plan: LoadPlan) -> None:
    """Only one of two tied tensors is written: they must be the same, as loading demands."""
    first: dict[int, str] = {}
    for key, moves in plan.moves.items():
        for _, target in moves:
            other = first.setdefault(id(target), key) if len(target.names) > 1 else key
            if other != key and not torch.equal(reader.read(other), reader.read(key)):
                raise ValueError(f"{key} differs from {other}, but the model ties the two")


class _PieceReader:
    """Pieces of a model's parameters, out of the tensors of a checkpoint that hold them under whatever name."""

    def __init__(self, reader: CheckpointReader, plan: LoadPlan, adapter: Adapter | None = None) -> None:
        self._reader, self._adapter = reader, adapter
        self._sources: dict[tuple[str, int | None, int | None], tuple[str, Placement]] = {}
        for key, moves in plan.moves.items():
            for place, target in moves:
                # A tied parameter is asked for by one of its names, and may be stored under another.
                for name in target.names:
                    self._sources.setdefault((name, place.expert, place.half), (key, place))
                self._sources[place.name, place.expert, place.half] = (key, place)

    def read(self, wanted: Placement) -> Tensor:
        """The piece `wanted`, as stored (or dequantized), with the adapter added."""
        piece = self._read(wanted)
        return piece if self._adapter is None else self._adapter.merged(wanted, piece)

    def _read(self, wanted: Placement) -> Tensor:
        source = self._sources.get((wanted.name, wanted.expert, wanted.half))
        if source is not None:
            key, place = source
            return place.of_key(self._reader.read(key))
        # The stack of all experts, as transformers writes it.
        key, place = self._sources[wanted.name, None, None]
        return wanted.of_parameter(place.of_key(self._reader.read(key)))


def _copy_companions(source: Path, destination: Path) -> None:
    for pattern in _COMPANIONS:
        for file in sorted(source.glob(pattern)):
            is_weights = file.name.endswith(".safetensors.index.json")
            if file.is_file() and not is_weights and not (destination / file.name).exists():
                shutil.copyfile(file, destination / file.name)
