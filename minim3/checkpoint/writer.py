"""Writing the released safetensors layout, one tensor at a time: a model, or whatever gives tensors by its names.

The safetensors format is an 8-byte little-endian length, a JSON header (name -> dtype, shape, byte range) and the bytes
of the tensors. Shapes are known before any tensor is cast or quantized, so the header is written first and each tensor
streamed after it: no shard is ever held in memory.
"""

import json
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from minim3.checkpoint.folder import replaced_folder
from minim3.checkpoint.loader import named_tensors
from minim3.checkpoint.mxfp8 import BLOCK_SIZE, num_scales, quantize_mxfp8
from minim3.checkpoint.names import Placement, is_expert_stack, is_quantized_key, is_router, released_keys
from minim3.checkpoint.progress import ByteProgress
from minim3.checkpoint.reader import INDEX_FILE, SCALE_SUFFIX, SINGLE_FILE
from minim3.config import MiniMaxM3VLConfig, MiniMaxM3VLTextConfig, write_config_dict

FORMATS = ("bf16", "fp32", "mxfp8")
DEFAULT_SHARD_BYTES = 5 * 10**9

_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.uint8: "U8",
}


@dataclass(frozen=True)
class Entry:
    """One tensor of the file, before its bytes exist. `quantized`: MXFP8 weight, followed by its scales."""

    key: str
    shape: list[int]
    dtype: torch.dtype  # as written, where it is not quantized
    quantized: bool
    read: Callable[[], Tensor]  # gives the tensor when its turn to be written comes

    def header(self) -> list[tuple[str, torch.dtype, list[int]]]:
        """(key, dtype, shape) of what is written, in order."""
        if not self.quantized:
            return [(self.key, self.dtype, self.shape)]
        scales = [*self.shape[:-1], num_scales(self.shape[-1])]
        return [(self.key, torch.float8_e4m3fn, self.shape), (self.key + SCALE_SUFFIX, torch.uint8, scales)]

    def num_bytes(self) -> int:
        """Of the tensor as written, scales included."""
        return sum(_num_bytes(dtype, shape) for _, dtype, shape in self.header())

    def parts(self) -> Iterator[Tensor]:
        """The tensors to write, made now."""
        tensor = self.read()
        if not self.quantized:
            yield tensor.to("cpu", self.dtype)
            return
        try:
            yield from quantize_mxfp8(tensor.cpu())
        except ValueError as error:
            raise ValueError(f"{self.key}: {error}") from error


class WrittenSize(NamedTuple):
    """What `write_entries` wrote: bytes of all tensors, and the number of safetensors files."""

    num_bytes: int
    num_files: int


def _num_bytes(dtype: torch.dtype, shape: list[int]) -> int:
    return torch.Size(shape).numel() * dtype.itemsize


def released_entries(model: nn.Module, format: str | None, read: Callable[[Placement], Tensor]) -> list[Entry]:
    """Everything to be written of `model`, in the released layout; its names and shapes suffice.

    format: as for `write_checkpoint`, `ValueError` for an unknown one. read: gives the piece of a parameter that a
    placement names; called once for each entry, as it is written.
    """
    if format is not None and format not in FORMATS:
        raise ValueError(f"format is {format!r}; expected one of {', '.join(FORMATS)}")
    entries = []
    for name, tensor in named_tensors(model).items():
        dtype = tensor.dtype
        if format is not None and tensor.is_floating_point():
            dtype = torch.float32 if format == "fp32" or is_router(name) else torch.bfloat16
        for key, place in released_keys(name, tensor.shape[0] if is_expert_stack(name) else None):
            shape = list(place.of_parameter(tensor).shape)
            quantized = format == "mxfp8" and is_quantized_key(key)
            entries.append(Entry(key, shape, dtype, quantized, partial(read, place)))
    return entries


def write_entries(
    folder: Path, entries: list[Entry], config: Any, format: str | None, max_shard_bytes: int | None, description: str
) -> WrittenSize:
    """Writes weights, their index where there is more than one file, and config.json into an existing folder.

    One tensor is in memory at a time. max_shard_bytes: of one file, unless a single tensor exceeds it (None: 5e9);
    `ValueError` unless positive. description: of the progress bar.
    """
    if max_shard_bytes is not None and max_shard_bytes <= 0:
        raise ValueError(f"max_shard_bytes is {max_shard_bytes}; expected a positive number of bytes")
    shards = _shards(entries, max_shard_bytes or DEFAULT_SHARD_BYTES)
    total = sum(entry.num_bytes() for entry in entries)
    weight_map: dict[str, str] = {}
    with ByteProgress(description, total) as progress:
        for i, shard in enumerate(shards, 1):
            name = SINGLE_FILE if len(shards) == 1 else f"model-{i:05d}-of-{len(shards):05d}.safetensors"
            _write_file(folder / name, shard, progress)
            weight_map |= {key: name for entry in shard for key, _, _ in entry.header()}
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        (folder / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    write_config_dict(folder, _config_dict(config, entries, format))
    return WrittenSize(total, len(shards))


def _shards(entries: list[Entry], max_bytes: int) -> list[list[Entry]]:
    shards: list[list[Entry]] = [[]]
    size = 0
    for entry in entries:
        if shards[-1] and size + entry.num_bytes() > max_bytes:
            shards.append([])
            size = 0
        shards[-1].append(entry)
        size += entry.num_bytes()
    return shards


def _write_file(file: Path, entries: list[Entry], progress: ByteProgress) -> None:
    # Widest elements first: every tensor then starts at a multiple of its element size, as readers of a map need.
    entries = sorted(entries, key=lambda entry: (-entry.header()[0][1].itemsize, entry.key))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for entry in entries:
        for key, dtype, shape in entry.header():
            end = offset + _num_bytes(dtype, shape)
            header[key] = {"dtype": _NAMES[dtype], "shape": shape, "data_offsets": [offset, end]}
            offset = end
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    with file.open("wb") as out:
        out.write(len(encoded).to_bytes(8, "little") + encoded)
        for entry in entries:
            for part in entry.parts():
                flat = part.contiguous().flatten().view(torch.uint8).numpy()
                out.write(flat.data)
                progress.advance(flat.nbytes)


def _config_dict(config: Any, entries: list[Entry], format: str | None) -> dict[str, Any]:
    """The config as written: with the dtype and the quantization that the files now have."""
    out: dict[str, Any] = config.to_dict()
    embedding = next((entry for entry in entries if entry.key.endswith("embed_tokens.weight")), entries[0])
    dtype = str(embedding.dtype).removeprefix("torch.")
    out.pop("quantization_config", None)
    if format == "mxfp8":
        plain = [e.key.removesuffix(".weight") for e in entries if e.key.endswith(".weight") and not e.quantized]
        out["quantization_config"] = {
            "quant_method": "mxfp8",
            "activation_scheme": "dynamic",
            "fmt": "e4m3",
            "scale_fmt": "ue8m0",
            "weight_block_size": [1, BLOCK_SIZE],
            "ignored_layers": sorted(name for name in plain if "norm" not in name.rsplit(".", 1)[-1]),
        }
    out["torch_dtype"] = dtype
    if isinstance(out.get("text_config"), dict):
        out["text_config"] = {k: v for k, v in out["text_config"].items() if k != "quantization_config"}
        if "torch_dtype" in out["text_config"]:
            out["text_config"]["torch_dtype"] = dtype
    return out


def _warn_where_transformers_differs(config: MiniMaxM3VLTextConfig) -> None:
    sparse = any(config.is_sparse_attention_layer(i) for i in range(config.num_hidden_layers))
    moe = any(config.is_moe_layer(i) for i in range(config.num_hidden_layers))
    ignored = {
        f"index_init_blocks {config.index_init_blocks}": sparse and config.index_init_blocks != 0,
        f"index_score_type {config.index_score_type!r}": sparse and config.index_score_type != "max",
        f"scoring_func {config.scoring_func!r}": moe and config.scoring_func != "sigmoid",
        f"n_shared_experts {config.n_shared_experts}": moe and config.n_shared_experts != 1,
        f"swiglu_beta {config.swiglu_beta}": config.swiglu_beta != 1.0,
        "swiglu_limit 0 (no clamp here, a clamp to 0 there)": config.swiglu_limit == 0,
        "use_qk_norm False": not config.use_qk_norm,
    }
    named = ", ".join(name for name, applies in ignored.items() if applies)
    if named:
        warnings.warn(f"transformers ignores {named}: it loads this checkpoint as another model", stacklevel=3)


def write_checkpoint(
    model: nn.Module, path: str | Path, *, format: str | None = None, max_shard_bytes: int | None = None
) -> None:
    """Writes `model` (with its `config`, and `generation_config` where it has one) as a checkpoint folder.

    format: "bf16", "fp32" or "mxfp8" (projections of the text backbone quantized, the rest bf16); None keeps the
    model's dtypes. The router is fp32 in all three. Weights go to model.safetensors, or to several files with an index
    where they exceed `max_shard_bytes` (default 5e9). The folder appears whole or not at all; an existing checkpoint is
    replaced, its other files kept. Raises `ValueError` for an unknown format, for a folder that holds something other
    than a checkpoint, and for values that MXFP8 cannot hold.
    """
    tensors = named_tensors(model)
    for name, tensor in tensors.items():
        assert not tensor.is_meta, f"{name} has no storage"
    entries = released_entries(model, format, lambda place: place.of_parameter(tensors[place.name].detach()))
    config: Any = model.config
    _warn_where_transformers_differs(config.text_config if isinstance(config, MiniMaxM3VLConfig) else config)
    with replaced_folder(path) as folder:
        write_entries(folder, entries, config, format, max_shard_bytes, f"Saving {Path(path).name}")
        generation_config = getattr(model, "generation_config", None)
        if generation_config is not None:
            text = json.dumps(dict(generation_config), indent=2, sort_keys=True)
            (folder / "generation_config.json").write_text(text + "\n", encoding="utf-8")
