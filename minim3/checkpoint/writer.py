"""Saving: a model as the released safetensors layout, one tensor at a time.

The safetensors format is an 8-byte little-endian length, a JSON header (name -> dtype, shape, byte range) and the bytes
of the tensors. Shapes are known before any tensor is cast or quantized, so the header is written first and each tensor
streamed after it: no shard is ever held in memory.
"""

import json
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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
class _Entry:
    """One tensor of the file, before its bytes exist. `quantized`: MXFP8 weight, followed by its scales."""

    key: str
    tensor: Tensor
    place: Placement
    dtype: torch.dtype
    quantized: bool

    @property
    def shape(self) -> list[int]:
        return list(self.place.of_parameter(self.tensor).shape)

    def header(self) -> list[tuple[str, torch.dtype, list[int]]]:
        """(key, dtype, shape) of what is written, in order."""
        if not self.quantized:
            return [(self.key, self.dtype, self.shape)]
        scales = [*self.shape[:-1], num_scales(self.shape[-1])]
        return [(self.key, torch.float8_e4m3fn, self.shape), (self.key + SCALE_SUFFIX, torch.uint8, scales)]

    def num_bytes(self) -> int:
        return sum(_num_bytes(dtype, shape) for _, dtype, shape in self.header())

    def parts(self) -> Iterator[Tensor]:
        """The tensors to write, made now."""
        view = self.place.of_parameter(self.tensor.detach())
        if not self.quantized:
            yield view.to("cpu", self.dtype)
            return
        try:
            yield from quantize_mxfp8(view.cpu())
        except ValueError as error:
            raise ValueError(f"{self.key}: {error}") from error


def _num_bytes(dtype: torch.dtype, shape: list[int]) -> int:
    return torch.Size(shape).numel() * dtype.itemsize


def _entries(model: nn.Module, format: str | None) -> list[_Entry]:
    entries = []
    for name, tensor in named_tensors(model).items():
        assert not tensor.is_meta, f"{name} has no storage"
        experts = tensor.shape[0] if is_expert_stack(name) else None
        for key, place in released_keys(name, experts):
            dtype = tensor.dtype
            if format is not None and tensor.is_floating_point():
                dtype = torch.float32 if format == "fp32" or is_router(name) else torch.bfloat16
            entries.append(_Entry(key, tensor, place, dtype, format == "mxfp8" and is_quantized_key(key)))
    return entries


def _shards(entries: list[_Entry], max_bytes: int) -> list[list[_Entry]]:
    shards: list[list[_Entry]] = [[]]
    size = 0
    for entry in entries:
        if shards[-1] and size + entry.num_bytes() > max_bytes:
            shards.append([])
            size = 0
        shards[-1].append(entry)
        size += entry.num_bytes()
    return shards


def _write_file(file: Path, entries: list[_Entry], progress: ByteProgress) -> None:
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


def _config_dict(config: Any, entries: list[_Entry], format: str | None) -> dict[str, Any]:
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
    if format is not None and format not in FORMATS:
        raise ValueError(f"format is {format!r}; expected one of {', '.join(FORMATS)}")
    if max_shard_bytes is not None and max_shard_bytes <= 0:
        raise ValueError(f"max_shard_bytes is {max_shard_bytes}; expected a positive number of bytes")
    config: Any = model.config
    _warn_where_transformers_differs(config.text_config if isinstance(config, MiniMaxM3VLConfig) else config)
    entries = _entries(model, format)
    shards = _shards(entries, max_shard_bytes or DEFAULT_SHARD_BYTES)
    total = sum(entry.num_bytes() for entry in entries)
    with replaced_folder(path) as folder, ByteProgress(f"Saving {Path(path).name}", total) as progress:
        weight_map: dict[str, str] = {}
        for i, shard in enumerate(shards, 1):
            name = SINGLE_FILE if len(shards) == 1 else f"model-{i:05d}-of-{len(shards):05d}.safetensors"
            _write_file(folder / name, shard, progress)
            weight_map |= {key: name for entry in shard for key, _, _ in entry.header()}
        if len(shards) > 1:
            index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
            (folder / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
        write_config_dict(folder, _config_dict(config, entries, format))
        generation_config = getattr(model, "generation_config", None)
        if generation_config is not None:
            text = json.dumps(dict(generation_config), indent=2, sort_keys=True)
            (folder / "generation_config.json").write_text(text + "\n", encoding="utf-8")
