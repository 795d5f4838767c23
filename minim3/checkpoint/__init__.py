"""Checkpoints: the released safetensors layout in and out, lazily, with every key accounted for.

Where to look: `names` (which key holds which parameter), `mxfp8` (the quantized format), `reader` (files and index),
`loader` (into a model), `writer` (out of one), `convert` (from files to files), `folder` (replacing a folder at once),
`hub` (a name to a folder), `adapter` (LoRA in PEFT's format; how modules are named and fused there: `adapter_names`,
`adapter_fusion`, `adapter_peft`).
"""

from minim3.checkpoint.adapter import Adapter, read_adapter
from minim3.checkpoint.convert import convert_checkpoint
from minim3.checkpoint.hub import read_config, read_generation_config, resolve_checkpoint
from minim3.checkpoint.loader import WeightSink, load_into, mxfp8_parameters
from minim3.checkpoint.mxfp8 import dequantize_mxfp8, quantize_mxfp8
from minim3.checkpoint.names import Placement, is_quantized_key, released_keys
from minim3.checkpoint.reader import CheckpointReader, has_mtp_tensors, num_mtp_modules_in
from minim3.checkpoint.writer import write_checkpoint

__all__ = [
    "Adapter",
    "CheckpointReader",
    "Placement",
    "WeightSink",
    "convert_checkpoint",
    "dequantize_mxfp8",
    "has_mtp_tensors",
    "is_quantized_key",
    "load_into",
    "mxfp8_parameters",
    "num_mtp_modules_in",
    "quantize_mxfp8",
    "read_adapter",
    "read_config",
    "read_generation_config",
    "released_keys",
    "resolve_checkpoint",
    "write_checkpoint",
]
