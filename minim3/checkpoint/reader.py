"""Reading safetensors files lazily: names and shapes first, tensors one at a time out of the memory map."""

import json
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from minim3.checkpoint.mxfp8 import dequantize_mxfp8, num_scales
from minim3.checkpoint.names import mtp_depth

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
SCALE_SUFFIX = "_scale_inv"

# Names of dtypes in a safetensors header that a checkpoint may hold.
_FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_QUANTIZED = "F8_E4M3"
_SCALES = ("U8", "F8_E8M0")


class CheckpointReader:
    """The tensors of a checkpoint folder (or of one safetensors file) by released key.

    MXFP8 weights are dequantized as they are read; their `weight_scale_inv` keys are not listed. Opening reads headers
    only. Raises `ValueError` naming the file for a missing, truncated or duplicated piece, and for an index that points
    outside its folder. A context manager: the files stay mapped until it ends.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._stack = ExitStack()
        self._handles: dict[Path, Any] = {}
        self._files: dict[str, Path] = {}
        self._scales: set[str] = set()
        try:
            self._open_all()
        except BaseException:
            self._stack.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Unmaps the files."""
        self._handles.clear()
        self._stack.close()

    def _open_all(self) -> None:
        mapped = None
        files = [self.path]
        if self.path.is_dir():
            single, index = self.path / SINGLE_FILE, self.path / INDEX_FILE
            if single.exists() and index.exists():
                raise ValueError(f"{self.path} holds both {SINGLE_FILE} and {INDEX_FILE}: remove the stale one")
            if index.exists():
                mapped = read_index(index)
                files = [self.path / name for name in sorted(set(mapped.values()))]
            elif single.exists():
                files = [single]
            else:
                raise ValueError(f"{self.path} holds no weights: neither {SINGLE_FILE} nor {INDEX_FILE} exists")
        for file in files:
            for key in self._open(file):
                # The index names one file for a key, so this also catches a key that is in two files.
                if mapped is not None and mapped.get(key) != file.name:
                    where = f"the index says is in {mapped[key]}" if key in mapped else "the index does not list"
                    raise ValueError(f"{file} holds {key}, which {where}")
                self._files[key] = file
        for key, name in (mapped or {}).items():
            if key not in self._files:
                raise ValueError(f"{self.path / name} does not hold {key}, which the index says is there")
        self._check_quantized()

    def _open(self, file: Path) -> list[str]:
        if not file.is_file():
            raise ValueError(f"{file} does not exist: the checkpoint is incomplete")
        try:
            handle = self._stack.enter_context(safe_open(file, framework="pt", device="cpu"))
            keys = list(handle.keys())
        except (SafetensorError, OSError, ValueError) as error:
            raise ValueError(f"{file} is not a complete safetensors file, copy it again: {error}") from error
        self._handles[file] = handle
        return keys

    def _check_quantized(self) -> None:
        for key in self._files:
            if key.endswith(SCALE_SUFFIX):
                weight = key.removesuffix(SCALE_SUFFIX)
                if weight not in self._files:
                    raise ValueError(f"{key} scales {weight}, which is not in the checkpoint")
                self._scales.add(key)
        for key in self:
            dtype, scale = self._stored_dtype(key), key + SCALE_SUFFIX
            if scale in self._scales:
                if dtype != _QUANTIZED or self._stored_dtype(scale) not in _SCALES:
                    raise ValueError(
                        f"{key} is {dtype} with {self._stored_dtype(scale)} scales; MXFP8 is F8_E4M3 with U8 scales"
                    )
                expected = (*self.shape(key)[:-1], num_scales(self.shape(key)[-1]))
                if self.shape(scale) != expected:
                    raise ValueError(f"{scale} has shape {list(self.shape(scale))}; {key} needs {list(expected)}")
            elif dtype not in _FLOATS:
                hint = f" without {scale}" if dtype == _QUANTIZED else ""
                raise ValueError(f"{key} is {dtype}{hint}; expected {', '.join(_FLOATS)}, or MXFP8 with scales")

    def keys(self) -> list[str]:
        """Every key but the scales, sorted by file and name."""
        found = (key for key in self._files if key not in self._scales)
        return sorted(found, key=lambda key: (self._files[key].name, key))

    def __iter__(self) -> Iterator[str]:
        return iter(self.keys())

    def shape(self, key: str) -> tuple[int, ...]:
        """The shape of the tensor, from the header."""
        return tuple(self._handle(key).get_slice(key).get_shape())

    def dtype(self, key: str) -> torch.dtype:
        """The dtype of the tensor as stored; bfloat16 for a quantized one."""
        return _FLOATS.get(self._stored_dtype(key), torch.bfloat16)

    def is_quantized(self, key: str) -> bool:
        """Whether the tensor is stored as MXFP8: decided by the presence of its scales."""
        return key + SCALE_SUFFIX in self._scales

    def num_bytes(self) -> int:
        """Size of all files."""
        return sum(file.stat().st_size for file in self._handles)

    def read(self, key: str, dtype: torch.dtype | None = None) -> Tensor:
        """The tensor: a view of the memory map where neither dequantization nor a cast is needed."""
        stored = self._stored(key)
        if self.is_quantized(key):
            try:
                return dequantize_mxfp8(stored, self._stored(key + SCALE_SUFFIX), dtype or torch.float32)
            except ValueError as error:
                raise ValueError(f"{key}: {error}") from error
        return stored if dtype is None else stored.to(dtype)

    def read_mxfp8(self, key: str) -> tuple[Tensor, Tensor]:
        """A tensor that `is_quantized` as it is stored: e4m3 values and their scales, views of the memory map."""
        return self._stored(key), self._stored(key + SCALE_SUFFIX)

    def items(self, dtype: torch.dtype | None = None) -> Iterator[tuple[str, Tensor]]:
        """Every key with its tensor, one at a time."""
        for key in self:
            yield key, self.read(key, dtype)

    def _handle(self, key: str) -> Any:
        if key not in self._files:
            raise ValueError(f"{self.path} does not hold {key}")
        return self._handles[self._files[key]]

    def _stored_dtype(self, key: str) -> str:
        return str(self._handle(key).get_slice(key).get_dtype())

    def _stored(self, key: str) -> Tensor:
        try:
            tensor: Tensor = self._handle(key).get_tensor(key)
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{self._files[key]}: {key} cannot be read: {error}") from error
        return tensor


def read_index(file: Path) -> dict[str, str]:
    """`weight_map` of an index file: key -> name of a file beside it. Raises `ValueError` for anything else."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for name, value in pairs:
            if name in found:
                raise ValueError(f"{name!r} appears twice")
            found[name] = value
        return found

    try:
        raw = json.loads(file.read_text(encoding="utf-8"), object_pairs_hook=unique)
    except ValueError as error:
        raise ValueError(f"{file} is not a valid index: {error}") from error
    mapped = raw.get("weight_map") if isinstance(raw, dict) else None
    if not isinstance(mapped, dict) or not mapped:
        raise ValueError(f"{file} has no weight_map")
    for key, name in mapped.items():
        plain = isinstance(name, str) and name.endswith(".safetensors") and not any(c in name for c in "/\\:\0")
        if not plain:
            raise ValueError(
                f"{file}: {key} is mapped to {name!r}; expected the plain name of a .safetensors file beside it"
            )
    return mapped


def num_mtp_modules_in(path: str | Path) -> int:
    """How many MTP modules the checkpoint holds tensors of (its config may promise more: the released one does).

    Raises `ValueError` if a depth is missing in between.
    """
    with CheckpointReader(path) as reader:
        depths = {depth for key in reader if (depth := mtp_depth(key)) is not None}
    if depths != set(range(len(depths))):
        raise ValueError(f"{path} holds MTP modules {sorted(depths)}; expected all of 0 to {max(depths)}")
    return len(depths)


def has_mtp_tensors(path: str | Path) -> bool:
    """Whether the checkpoint holds any MTP module."""
    return num_mtp_modules_in(path) > 0
