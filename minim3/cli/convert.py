"""`minim3 convert`: a checkpoint in another number format, streamed tensor by tensor from the old files to the new."""

import json
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from minim3.checkpoint import loader, num_mtp_modules_in, read_config, resolve_checkpoint, writer
from minim3.checkpoint.folder import check_replaceable, replaced_folder
from minim3.checkpoint.mxfp8 import quantize_mxfp8
from minim3.checkpoint.names import Placement, is_expert_stack, is_quantized_key, is_router, released_keys
from minim3.checkpoint.progress import ByteProgress
from minim3.checkpoint.reader import INDEX_FILE, SINGLE_FILE, CheckpointReader
from minim3.cli.errors import say
from minim3.config import MiniMaxM3VLConfig, MiniMaxM3VLTextConfig, write_config_dict
from minim3.model.causal_lm import MiniMaxM3SparseForCausalLM, MiniMaxM3SparseForConditionalGeneration, with_mtp_modules

# Tokenizer, processor, template, notes; nothing that could run, no weights in other formats.
_COMPANIONS = ("*.json", "*.jinja", "*.txt", "*.md", "LICENSE*", "NOTICE*")
_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}


def parse_size(text: str) -> int:
    """Bytes of "5GB", "500 MB", "1.5g" or a plain number (decimal units, as the hub's tools count)."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]?)b?\s*", text.lower())
    if not match or float(match[1]) <= 0:
        raise ValueError(f"--max-shard-size is {text!r}; expected a size like 5GB or 500MB")
    return max(1, int(float(match[1]) * _UNITS[match[2]]))


def convert_checkpoint(source: str, destination: Path, format: str, max_shard_bytes: int) -> None:
    """Write the checkpoint `source` (a folder or hub id) as the folder `destination`.

    Every key of the source is checked against its config before anything is written, and one tensor is in memory at a
    time. Raises `ValueError` for a source that is no whole checkpoint, or a destination that holds something else.
    """
    folder = resolve_checkpoint(source)
    if destination.exists() and folder.resolve() == destination.resolve():
        raise ValueError(f"{source} and {destination} are the same folder: convert into another one")
    check_replaceable(destination)
    config = read_config(folder)
    model = _empty_model(with_mtp_modules(config, num_mtp_modules_in(folder)))
    with CheckpointReader(folder) as reader:
        entries = _entries(reader, model, format)
        total = sum(entry.num_bytes() for entry in entries)
        with replaced_folder(destination) as new, ByteProgress(f"Writing {destination.name}", total) as progress:
            num_files = _write_shards(new, entries, max_shard_bytes, total, progress)
            write_config_dict(new, writer._config_dict(config, entries, format))
            _copy_companions(folder if folder.is_dir() else folder.parent, new)
    size = f"{total / 1e9:.2f} GB" if total >= 1e9 else f"{total / 1e6:.2f} MB"
    say(f"wrote {destination}: {size} in {num_files} file{'s' if num_files > 1 else ''}")


@dataclass(frozen=True)
class StreamedEntry(writer._Entry):
    """A tensor to write that is read from the old checkpoint when its turn comes; `tensor` only tells its shape."""

    read: Callable[[], Tensor]

    def parts(self) -> Iterator[Tensor]:
        tensor = self.read()
        if self.quantized:
            try:
                yield from quantize_mxfp8(tensor)
            except ValueError as error:
                raise ValueError(f"{self.key}: {error}") from error
        else:
            yield tensor.to(self.dtype)


def _empty_model(config: MiniMaxM3VLConfig | MiniMaxM3VLTextConfig) -> nn.Module:
    """Names and shapes alone."""
    with torch.device("meta"):
        if isinstance(config, MiniMaxM3VLTextConfig):
            return MiniMaxM3SparseForCausalLM(config)
        return MiniMaxM3SparseForConditionalGeneration(config)


def _entries(reader: CheckpointReader, model: nn.Module, format: str) -> list[writer._Entry]:
    """What is to be written, in the released layout, with where each tensor comes from."""
    plan = loader._plan(reader, loader._targets(model), text_only=False)
    plan.check(reader.path)
    sources = {(p.name, p.expert, p.half): (key, p) for key, moves in plan.moves.items() for p, _ in moves}
    entries: list[writer._Entry] = []
    for name, parameter in loader.named_tensors(model).items():
        for key, place in released_keys(name, parameter.shape[0] if is_expert_stack(name) else None):
            # The same piece, or the stack of all experts, as transformers writes it.
            source = sources.get((name, place.expert, place.half)) or sources[name, None, None]
            dtype = torch.float32 if format == "fp32" or is_router(name) else torch.bfloat16
            quantized = format == "mxfp8" and is_quantized_key(key)
            read = partial(_read, reader, *source, place)
            entries.append(StreamedEntry(key, parameter, place, dtype, quantized, read))
    return entries


def _read(reader: CheckpointReader, key: str, source: Placement, wanted: Placement) -> Tensor:
    """The piece `wanted` of a parameter, out of the tensor `key` that holds the piece `source` of it."""
    tensor = source.of_key(reader.read(key))
    return wanted.of_parameter(tensor) if source.expert is None and wanted.expert is not None else tensor


def _write_shards(
    folder: Path, entries: list[writer._Entry], max_shard_bytes: int, total: int, progress: ByteProgress
) -> int:
    """The weights, and their index where there is more than one file. Returns the number of files."""
    shards = writer._shards(entries, max_shard_bytes)
    weight_map: dict[str, str] = {}
    for i, shard in enumerate(shards, 1):
        name = SINGLE_FILE if len(shards) == 1 else f"model-{i:05d}-of-{len(shards):05d}.safetensors"
        writer._write_file(folder / name, shard, progress)
        weight_map |= {key: name for entry in shard for key, _, _ in entry.header()}
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        (folder / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    return len(shards)


def _copy_companions(source: Path, destination: Path) -> None:
    for pattern in _COMPANIONS:
        for file in sorted(source.glob(pattern)):
            is_weights = file.name.endswith(".safetensors.index.json")
            if file.is_file() and not is_weights and not (destination / file.name).exists():
                shutil.copyfile(file, destination / file.name)
