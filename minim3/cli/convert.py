"""`minim3 convert`: a checkpoint in another number format."""

import re
from pathlib import Path

import torch

from minim3.checkpoint import (
    convert_checkpoint,
    num_mtp_modules_in,
    read_adapter,
    read_config,
    resolve_checkpoint,
)
from minim3.cli.errors import say
from minim3.config import MiniMaxM3VLTextConfig
from minim3.loading import model_path
from minim3.model.causal_lm import MiniMaxM3SparseForCausalLM, MiniMaxM3SparseForConditionalGeneration, with_mtp_modules

_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}


def parse_size(text: str) -> int:
    """Bytes of "5GB", "500 MB", "1.5g" or a plain number (decimal units, as the hub's tools count)."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]?)b?\s*", text.lower())
    if not match or float(match[1]) <= 0:
        raise ValueError(f"--max-shard-size is {text!r}; expected a size like 5GB or 500MB")
    return max(1, int(float(match[1]) * _UNITS[match[2]]))


def run_convert(
    source: str, destination: Path, format: str, max_shard_bytes: int, adapter: str | None = None
) -> None:
    """Write the checkpoint `source` (a folder or hub id) as the folder `destination`, and say what was written.

    adapter: a folder or hub id, merged into the weights.
    """
    folder = resolve_checkpoint(model_path(source))
    config = with_mtp_modules(read_config(folder), num_mtp_modules_in(folder))
    text_only = isinstance(config, MiniMaxM3VLTextConfig)
    with torch.device("meta"):  # for names and shapes alone
        model = (MiniMaxM3SparseForCausalLM if text_only else MiniMaxM3SparseForConditionalGeneration)(config)
    total, num_files = convert_checkpoint(
        folder, destination, model, format=format, max_shard_bytes=max_shard_bytes,
        adapter=None if adapter is None else read_adapter(adapter),
    )  # fmt: skip
    size = f"{total / 1e9:.2f} GB" if total >= 1e9 else f"{total / 1e6:.2f} MB"
    say(f"wrote {destination}: {size} in {num_files} file{'s' if num_files > 1 else ''}")
