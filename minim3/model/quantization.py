"""Which weights of a model are quantized and how: chosen at loading (`minim3.load(..., quantization="int8")`).

Quantized are the projections of attention, its indexer, the MLPs, shared and routed experts and MTP modules, and the
head. Embeddings, norms, the router, its correction bias and the vision part stay as they are.
"""

import math
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from minim3.checkpoint import Placement, is_quantized_key, released_keys
from minim3.checkpoint.loader import named_tensors
from minim3.checkpoint.names import TEXT_PREFIX, VISION_PREFIXES, is_router
from minim3.model.attention import MiniMaxM3Attention
from minim3.model.moe import MiniMaxM3Experts
from minim3.model.quantized import ExpertStack, QuantizedExperts, QuantizedLinear, QuantizedModule
from minim3.model.weight_formats import FORMATS, GROUP_SIZES, num_bytes


@dataclass(frozen=True)
class Quantization:
    """How the weights of a model are held.

    format: "bf16" (exact for a checkpoint in bf16, and computed in the dtype of the model), "int8" (one scale a row),
    "int4" (a scale and a zero for each `group_size` inputs; the indexer, which chooses and is small, takes int8) or
    "mxfp8" (what a MXFP8 checkpoint stores, kept; of another checkpoint, the weights that such a checkpoint would store
    so).
    head: hold the head in int8. None: yes for int8 and int4, no for mxfp8, in bf16 for bf16. A head tied to the
    embedding stays with it.
    """

    format: str
    group_size: int = 32
    head: bool | None = None

    def __post_init__(self) -> None:
        if self.format not in FORMATS:
            raise ValueError(f"quantization is {self.format!r}; known: {', '.join(FORMATS)}")
        if self.group_size not in GROUP_SIZES:
            raise ValueError(f"group_size is {self.group_size}; torch's 4-bit product has {GROUP_SIZES}")

    @classmethod
    def of(cls, quantization: "str | Quantization") -> "Quantization":
        return quantization if isinstance(quantization, Quantization) else cls(quantization)

    def format_of(self, name: str, stored_mxfp8: Collection[str] | None = None) -> str | None:
        """The format of the weight `name`; None for one that stays as it is.

        stored_mxfp8: the parameters that a checkpoint stores as MXFP8; None or empty for another checkpoint.
        """
        if name.startswith(VISION_PREFIXES):
            return None
        if name.endswith("lm_head.weight"):
            if self.head is None:
                return {"mxfp8": None, "bf16": "bf16"}.get(self.format, "int8")
            return "int8" if self.head else None
        if self.format == "bf16":
            return "bf16"
        if self.format == "mxfp8":
            if stored_mxfp8:
                return "mxfp8" if name.removeprefix(TEXT_PREFIX) in stored_mxfp8 else None
            keys = released_keys(name, 1)
            return "mxfp8" if all(is_quantized_key(key) for key, _ in keys) else None
        return "int8" if ".indexer." in name else self.format

    def check_available(self, device: torch.device, dtype: torch.dtype) -> None:
        """Raises `ValueError` where this torch, device or dtype has no product for the format."""
        if self.format in ("mxfp8", "bf16") and not self.head:
            return
        operators = ["_weight_int8pack_mm"]
        if self.format == "int4":
            operators += ["_weight_int4pack_mm_for_cpu", "_convert_weight_to_int4pack_for_cpu"]
        for operator in operators:
            if not hasattr(torch.ops.aten, operator):
                raise ValueError(
                    f"{self.format} weights need torch's {operator}, which torch {torch.__version__} lacks"
                )
        if device.type != "cpu":
            raise ValueError(f"{self.format} weights are for the CPU, the device is {device}: leave out quantization")
        if dtype not in (torch.float32, torch.bfloat16):
            raise ValueError(f"{self.format} weights need dtype float32 or bfloat16 for the rest; got {dtype}")


Sink = QuantizedLinear | ExpertStack


def prepare(
    model: nn.Module, quantization: Quantization, stored_mxfp8: Collection[str] | None = None
) -> dict[str, Sink]:
    """Swap the modules of `model` whose weights are to be quantized; what takes each weight, by the parameter's name.

    stored_mxfp8: see `Quantization.format_of`. The other parameters lose their gradients: no part can be trained.
    """
    sinks: dict[str, Sink] = {}
    backend = next((module.backend for module in model.modules() if isinstance(module, MiniMaxM3Attention)), None)
    tied = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    for parent_name, parent in list(model.named_modules()):
        for child_name, module in list(parent.named_children()):
            name = f"{parent_name}.{child_name}" if parent_name else child_name
            if isinstance(module, nn.Linear) and module.bias is None and id(module.weight) not in tied:
                format = quantization.format_of(f"{name}.weight", stored_mxfp8)
                if format is not None:
                    sizes = module.in_features, module.out_features
                    linear = QuantizedLinear(*sizes, format, quantization.group_size, backend)
                    setattr(parent, child_name, linear)
                    sinks[f"{name}.weight"] = linear
            elif isinstance(module, MiniMaxM3Experts):
                formats = {quantization.format_of(f"{name}.{stack}", stored_mxfp8) for stack in ("w13", "w2")}
                format = formats.pop() if len(formats) == 1 else None
                if format is not None:
                    experts = QuantizedExperts(module, format, quantization.group_size)
                    setattr(parent, child_name, experts)
                    sinks |= {f"{name}.w13": experts.w13, f"{name}.w2": experts.w2}
    model.requires_grad_(False)
    return sinks


def quantize_model(model: nn.Module, quantization: str | Quantization) -> None:
    """Quantize a model that is loaded, in place, layer by layer; what it had in other formats is freed as it goes.

    Raises:
        ValueError: an unknown format, one that torch or the model's device or dtype has no product for, or a weight
            that is not finite.
    """
    quantization = Quantization.of(quantization)
    whole: Any = model  # either model class
    quantization.check_available(whole.device, whole.dtype)
    whole.quantization = quantization
    weights = dict(model.named_parameters())
    for name, sink in prepare(model.eval(), quantization).items():
        sink.put(Placement(name), weights.pop(name).detach())


def expected_bytes(
    model: nn.Module, quantization: Quantization | None, dtype: torch.dtype, stored_mxfp8: Collection[str] | None = None
) -> int:
    """Bytes of the weights that loading them so would take; `model` is one on the meta device, which is used up."""
    total = 0
    if quantization is not None:
        for name, sink in prepare(model, quantization, stored_mxfp8).items():
            format = quantization.format_of(name, stored_mxfp8)
            assert format is not None
            *experts, num_rows, columns = sink.shape
            total += math.prod(experts) * num_bytes(format, num_rows, columns, quantization.group_size)
    for name, tensor in named_tensors(model).items():
        total += tensor.numel() * (4 if is_router(name) else dtype.itemsize)
    return total


def weight_bytes(model: nn.Module) -> dict[str, int]:
    """Bytes of the weights that `model` holds, by format: names of dtypes and of formats."""
    found: dict[str, int] = {}
    for tensor in dict.fromkeys([*model.parameters(), *model.buffers()]):
        name = str(tensor.dtype).removeprefix("torch.")
        found[name] = found.get(name, 0) + tensor.nbytes
    for module in model.modules():
        if isinstance(module, QuantizedModule):
            for matrix in module.matrices():
                found[matrix.format] = found.get(matrix.format, 0) + matrix.num_bytes()
    return found
