"""When the Triton kernels can run a request: the device, the types, the shapes. Says why not, in words.

Importing this imports no Triton.
"""

import importlib.util
import os
from functools import cache

import torch
from torch import Tensor

from minim3.kernels import native

TRITON_OPS = (
    "block_sparse_attention",
    "block_sparse_attention_paged",
    "grouped_experts",
    "indexer_kl",
    "norm_rope_store",
    "paged_attention",
    "rms_norm",
    "select_blocks",
    "select_blocks_paged",
    "swiglu_oai",
    "varlen_attention",
)  # fmt: skip
"""Ops that have Triton kernels."""

_TILED_OPS = ("indexer_kl", "paged_attention", "varlen_attention")
"""Ops whose kernels in C need a processor that multiplies tiles."""

NATIVE_OPS = (
    "block_sparse_attention", "block_sparse_attention_paged", "select_blocks", "select_blocks_paged", *_TILED_OPS
)  # fmt: skip
"""Ops that have kernels in C, besides whole steps of decoding."""

IN_C = (*NATIVE_OPS, "decoder_step")

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_BLOCK_SIZES = (16, 32, 64, 128)
_MOST_DIM = 128
_MOST_GROUP = 128
_MOST_INDEX_HEADS = 32
_MOST_TOPK = 128


def interpreting() -> bool:
    """Whether kernels are interpreted on the CPU: the environment asks for it."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes")


def why_not(op: str, device_type: str, dtype: torch.dtype) -> str | None:
    """Why no Triton kernel runs `op` on such a device in `dtype`, or None if one does, where the shapes allow it."""
    if op not in TRITON_OPS:
        return "there is no Triton kernel for it"
    if dtype not in _DTYPES:
        return f"Triton kernels take {', '.join(str(d).removeprefix('torch.') for d in _DTYPES)}"
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed (pip install triton)"
    if device_type == "cpu":
        return None if interpreting() else "on the CPU they run only interpreted, with TRITON_INTERPRET=1"
    if device_type != "cuda":
        return "Triton kernels run on CUDA devices"
    return _why_no_cuda()


def why_not_native(op: str, device_type: str, dtype: torch.dtype) -> str | None:
    """Why no kernel in C runs `op` (or "decoder_step") on such a device in `dtype`, or None. Asking compiles them."""
    if op not in IN_C:
        return "there is no kernel in C for it"
    if device_type != "cpu":
        return "kernels in C run on the CPU"
    if dtype != torch.float32:
        return "kernels in C take fp32"
    reason = native.why_not()
    if reason is None and op in _TILED_OPS and not native.tiles():
        return "there are no tiles (AMX) to multiply on, or they are switched off"
    return reason


@cache
def _why_no_cuda() -> str | None:
    if not torch.cuda.is_available():
        return "torch sees no CUDA device"
    if torch.version.hip is not None:
        return "the kernels are written for NVIDIA devices"
    major, minor = torch.cuda.get_device_capability()
    return None if major >= 8 else f"the device has compute capability {major}.{minor}, they need 8.0"


def why_not_cache(dtype: torch.dtype, device_type: str) -> str | None:
    """Why pages of another dtype than the queries' cannot be read or written, or None."""
    if dtype != torch.float8_e4m3fn:
        return f"a cache is in the dtype of the queries or in float8_e4m3fn, not in {dtype}"
    if device_type == "cuda" and torch.cuda.get_device_capability() < (8, 9):
        return "float8_e4m3fn needs compute capability 8.9"
    return None


def why_not_attention(
    q: Tensor, k: Tensor, v: Tensor, block_size: int | None, topk: int, scale: float | None, paged: bool = False
) -> str | None:
    """Why attention of these shapes has no Triton kernel, or None; `block_size` None: dense."""
    group = q.shape[1] // k.shape[1]
    if paged and k.dtype == v.dtype != q.dtype:
        reason = why_not_cache(k.dtype, q.device.type)
        if reason is not None:
            return reason
    elif not q.dtype == k.dtype == v.dtype:
        return f"q, k and v must have one dtype; got {q.dtype}, {k.dtype} and {v.dtype}"
    if group & (group - 1) or group > _MOST_GROUP:
        return f"{group} query heads share a KV head; that must be a power of two up to {_MOST_GROUP}"
    return _why_not_sizes(q.shape[-1], block_size, topk, scale)


def why_not_selection(
    index_q: Tensor, index_k: Tensor, block_size: int | None, topk: int, scale: float | None, paged: bool = False
) -> str | None:
    """Why a selection of these shapes has no Triton kernel, or None."""
    if paged and index_q.dtype != index_k.dtype:
        reason = why_not_cache(index_k.dtype, index_q.device.type)
        if reason is not None:
            return reason
    elif index_q.dtype != index_k.dtype:
        return f"index queries and keys must have one dtype; got {index_q.dtype} and {index_k.dtype}"
    if index_q.shape[1] > _MOST_INDEX_HEADS:
        return f"{index_q.shape[1]} index heads; at most {_MOST_INDEX_HEADS} are supported"
    return _why_not_sizes(index_q.shape[-1], block_size, topk, scale)


def why_not_alignment(
    q: Tensor, k: Tensor, index_q: Tensor, index_k: Tensor, block_size: int | None, topk: int, scale: float | None,
    index_scale: float | None,
) -> str | None:  # fmt: skip
    """Why an alignment loss of these shapes has no Triton kernel, or None."""
    return why_not_attention(q, k, index_k, block_size, topk, scale) or why_not_selection(
        index_q, index_k, block_size, topk, index_scale
    )


def why_not_experts(x: Tensor, w13: Tensor, w2: Tensor) -> str | None:
    """Why a product of these experts has no Triton kernel, or None."""
    if not x.dtype == w13.dtype == w2.dtype:
        return f"x, w13 and w2 must have one dtype; got {x.dtype}, {w13.dtype} and {w2.dtype}"
    return None


def _why_not_sizes(dim: int, block_size: int | None, topk: int, scale: float | None) -> str | None:
    if dim > _MOST_DIM:
        return f"head dimension {dim}; at most {_MOST_DIM} is supported"
    if block_size is not None and block_size not in _BLOCK_SIZES:
        return f"block_size={block_size}; supported are {', '.join(map(str, _BLOCK_SIZES))}"
    if topk > _MOST_TOPK:
        return f"{topk} blocks a query; at most {_MOST_TOPK} are supported"
    if scale is not None and not scale > 0:
        return f"scale={scale}; it must be positive"
    return None
