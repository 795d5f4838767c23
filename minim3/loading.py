"""`minim3.load`: a model and its processor from one path."""

import re
from pathlib import Path

import torch

from minim3 import checkpoint, kernels
from minim3.checkpoint import is_quantized_key
from minim3.checkpoint.names import VISION_PREFIXES
from minim3.config import MiniMaxM3VLTextConfig
from minim3.model.causal_lm import MiniMaxM3SparseForCausalLM, MiniMaxM3SparseForConditionalGeneration, weight_dtype
from minim3.model.quantization import Quantization
from minim3.processing.processor import MiniMaxM3VLProcessor

_HELD = re.compile(r"(^|\.)(\w+_proj(\.weight)?|lm_head\.weight)$")
"""What `Quantization` holds in its format beside the matrices of a MXFP8 checkpoint."""

POCKET = Path(__file__).parent / "pocket" / "weights"


def model_path(path: str | Path | None) -> str | Path:
    """`path`, or the folder of pocket's weights for None and (unless there is a file of that name) for "pocket"."""
    return POCKET if path is None or (str(path) == "pocket" and not Path(path).exists()) else path


def load(
    path: str | Path | None = None,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str | None = None,
    *,
    quantization: str | Quantization | None = None,
    adapter: str | Path | None = None,
    require_tokenizer: bool = False,
) -> tuple[MiniMaxM3SparseForConditionalGeneration | MiniMaxM3SparseForCausalLM, MiniMaxM3VLProcessor]:
    """Load a checkpoint (a folder or a hub id; None or "pocket": the model that ships with minim3) and its processor.

    dtype: of the weights, or its name. None: what the config names on an accelerator; fp32 on a CPU, where bf16
    arithmetic is emulated and several times slower. device: None is the CPU. The model is in evaluation mode, of class
    `MiniMaxM3SparseForConditionalGeneration`, or `MiniMaxM3SparseForCausalLM` for a text-only checkpoint.
    quantization: "bf16", "int8", "int4" or "mxfp8" holds the weights of projections and experts in that format, for
    inference (docs/weights.md); a `Quantization` chooses more, "auto" takes `stored_format`. adapter: a LoRA folder in
    PEFT's format (or a hub id), merged into the weights as they are read (and before they are quantized).
    Weights without a tokenizer load too, with a processor for media alone, unless `require_tokenizer`.
    Raises ValueError for a folder that is no whole checkpoint, with what is missing, and for an adapter that does not
    fit or belongs to other weights.
    """
    folder = checkpoint.resolve_checkpoint(model_path(path))
    device, dtype = torch.device(device or "cpu"), weight_dtype(dtype)
    if dtype is None and device.type == "cpu":
        dtype = torch.float32
    text_only = isinstance(checkpoint.read_config(folder), MiniMaxM3VLTextConfig)
    model_class = MiniMaxM3SparseForCausalLM if text_only else MiniMaxM3SparseForConditionalGeneration
    processor = MiniMaxM3VLProcessor.from_pretrained(folder, require_tokenizer=require_tokenizer)
    if quantization == "auto":
        quantization = stored_format(folder, device, dtype) if adapter is None else None
    model = model_class.from_pretrained(
        folder, dtype=dtype, device=device, quantization=quantization, adapter=adapter
    )
    return model, processor


def stored_format(folder: Path, device: torch.device, dtype: torch.dtype | None) -> str | None:
    """The `quantization` that keeps weights as a checkpoint stores them, where that loses nothing and is quicker.

    "bf16" or "mxfp8" for a checkpoint whose projections and experts are stored so, computed in fp32 on a CPU by the
    kernels in C; else None.
    """
    if device.type != "cpu" or dtype != torch.float32:
        return None
    if kernels.resolve(None, "decoder_step", "cpu", dtype) != "native":
        return None
    if checkpoint.mxfp8_parameters(folder):
        return "mxfp8"
    with checkpoint.CheckpointReader(folder) as reader:
        held = [key for key in reader if is_quantized_key(key) or _HELD.search(key)]
        stored = {reader.dtype(key) for key in held if not key.startswith(VISION_PREFIXES)}
    return "bf16" if stored == {torch.bfloat16} else None
