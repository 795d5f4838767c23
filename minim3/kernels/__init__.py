"""One function per op; which implementation runs is chosen here, by device and dtype, and nowhere else.

Shapes and meaning: the docstrings in `minim3.kernels.reference`, which is the definition of every op. All take
`implementation`: "reference" (dense, obvious, slow), "portable" (fast plain PyTorch, any device), "native" (C on the
CPU, for selection and sparse attention, with what it has no form for left to PyTorch), "triton" (NVIDIA GPUs;
interpreted on a CPU where TRITON_INTERPRET=1), or None for the choice of `choose`: Triton on CUDA where it has a kernel
for the types and shapes, native on a CPU with a compiler, else portable. Each choice is logged once (logger
`minim3.kernels`). T packed queries, S packed keys, N sequences; lengths are int32 tensors or sequences of integers.
The paged ops take a `PagedPlan` of the step besides, where one is shared by many calls with the same sequences; in
Triton also a `DevicePlan`, where only the device knows the lengths.

Besides the ops there is the choice of "decoder_step": a whole step of few new tokens on a CPU, which `native` runs in C
where it can be compiled, and `minim3.model.decoding` puts together otherwise.
"""

import importlib
import logging
from collections.abc import Callable
from functools import cache
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from minim3.kernels import availability, native, portable, reference
from minim3.kernels.device_plan import DevicePlan
from minim3.kernels.portable.plan import PagedPlan
from minim3.kernels.sequences import Lengths

__all__ = [
    "Choice",
    "DevicePlan",
    "PagedPlan",
    "block_sparse_attention",
    "block_sparse_attention_paged",
    "choose",
    "grouped_experts",
    "implementations",
    "indexer_kl",
    "norm_rope_store",
    "paged_attention",
    "resolve",
    "rms_norm",
    "select_blocks",
    "select_blocks_paged",
    "swiglu_oai",
    "varlen_attention",
]

logger = logging.getLogger(__name__)

_MODULES: dict[str, ModuleType] = {"portable": portable, "reference": reference}
_LATE = {"triton": "minim3.kernels.triton", "native": "minim3.kernels.native.prompts"}


class Choice(NamedTuple):
    """The implementation that runs an op, and the reason in words."""

    name: str
    reason: str


def implementations() -> tuple[str, ...]:
    """Names of the implementations that can run here, the preferred first."""
    native = ("native",) if availability.why_not_native("select_blocks", "cpu", torch.float32) is None else ()
    if availability.why_not("select_blocks", "cuda", torch.float32) is None:
        return ("triton", *native, *_MODULES)
    if availability.why_not("select_blocks", "cpu", torch.float32) is None:
        return (*native, *_MODULES, "triton")
    return (*native, *_MODULES)


def resolve(implementation: str | None, op: str, device: torch.device | str, dtype: torch.dtype) -> str:
    """Name of the implementation that runs `op` on `device` in `dtype`.

    Raises `ValueError` for a request that cannot be met: there is no silent fallback.
    """
    return choose(implementation, op, device, dtype).name


def choose(implementation: str | None, op: str, device: torch.device | str, dtype: torch.dtype) -> Choice:
    """The implementation that runs `op` on `device` in `dtype`, and why; errors as in `resolve`.

    Shapes that a Triton kernel does not take (an odd block size, say) still go to the portable one.
    """
    return _choose(implementation, op, torch.device(device).type, dtype, None)


@cache
def _choose(implementation: str | None, op: str, device_type: str, dtype: torch.dtype, misfit: str | None) -> Choice:
    """`misfit`: why a Triton kernel does not take the shapes at hand."""
    if implementation not in (None, *_MODULES, *_LATE):
        raise ValueError(
            f"implementation={implementation!r} is unknown for {op} on {device_type} in {dtype}; "
            f"available: {', '.join(implementations())} (or None to choose automatically)"
        )
    # A step that is not run in C is put together from the other ops, whatever runs these.
    if implementation in _MODULES or (implementation == "triton" and op == "decoder_step"):
        choice = Choice(implementation, "requested")
    elif implementation == "native" and op not in availability.IN_C:
        choice = Choice("portable", "plain PyTorch: there is no kernel in C for it")
    elif implementation == "native" or (implementation is None and device_type == "cpu"):
        why_not = availability.why_not_native(op, device_type, dtype)
        if why_not is None:
            on_tiles = ", whose tiles (AMX) multiply" if op in availability.NATIVE_OPS and native.tiles() else ""
            reason = f"in C, compiled for this processor{on_tiles}"
            choice = Choice("native", "requested" if implementation else reason)
        elif implementation is None:
            reason = "plain PyTorch with its fused CPU operators"
            if op in availability.IN_C:
                reason = f"plain PyTorch, not C: {why_not}"
            choice = Choice("portable", reason)
        else:
            raise _unavailable(implementation, op, device_type, dtype, why_not)
    else:
        why_not = availability.why_not(op, device_type, dtype) or misfit
        if why_not is None:
            choice = Choice("triton", "requested" if implementation else "kernels for this device")
        elif implementation is None:
            choice = Choice("portable", f"plain PyTorch, there are no kernels for {device_type} here: {why_not}")
        else:
            raise _unavailable(implementation, op, device_type, dtype, why_not)
    logger.info("%s on %s in %s runs %s: %s", op, device_type, dtype, *choice)
    return choice


def _unavailable(implementation: str, op: str, device_type: str, dtype: torch.dtype, why_not: str) -> ValueError:
    return ValueError(
        f"implementation={implementation!r} is not available for {op} on {device_type} in {dtype}: {why_not}; "
        f"available: {', '.join(implementations())} (or None to choose automatically)"
    )


def _module(name: str) -> ModuleType:
    # Triton is imported where it is used first, and nowhere else.
    return importlib.import_module(_LATE[name]) if name in _LATE else _MODULES[name]


def _function(
    implementation: str | None, op: str, tensor: Tensor, misfit: Callable[[], str | None] | None = None,
    plan: PagedPlan | DevicePlan | None = None, products: bool = True,
) -> Callable[..., Any]:  # fmt: skip
    """What runs `op`. Under autocast it runs with autocast off, which would take its `products` below fp32 again.

    misfit: says why a Triton kernel does not take the shapes, if one does not; asked only where one could run.
    """
    device_type = tensor.device.type
    reason = None
    if misfit is not None and (implementation == "triton" or (implementation is None and device_type == "cuda")):
        reason = misfit()
    name = _choose(implementation, op, device_type, tensor.dtype, reason).name
    if isinstance(plan, DevicePlan) and name in ("native", "portable"):
        raise ValueError(f"a DevicePlan is for Triton kernels, but {op} on {device_type} runs {name}; pass a PagedPlan")
    function: Callable[..., Any] = getattr(_module(name), op)
    if name == "triton" and device_type == "cuda" and tensor.device.index != torch.cuda.current_device():
        function = _on_device(function, tensor.device)
    if products and torch.is_autocast_enabled(device_type):
        return torch.autocast(device_type, enabled=False)(function)
    return function


def _on_device(function: Callable[..., Any], device: torch.device) -> Callable[..., Any]:
    """Triton launches on the current device, whatever its arguments lie on."""

    def run(*args: Any, **kwargs: Any) -> Any:
        with torch.cuda.device(device):
            return function(*args, **kwargs)

    return run


def _planned(implementation: str | None, plan: PagedPlan | DevicePlan | None) -> dict[str, PagedPlan | DevicePlan]:
    """A plan saves work; the reference does without."""
    return {} if plan is None or implementation == "reference" else {"plan": plan}


def _check_heads(q: Tensor, k_heads: int, block_indices: Tensor | None) -> None:
    if q.shape[1] % k_heads:
        raise ValueError(f"{q.shape[1]} query heads cannot share {k_heads} KV heads evenly; pass a multiple")
    if block_indices is not None and block_indices.shape[:2] != (q.shape[0], k_heads):
        raise ValueError(
            f"block_indices has shape {tuple(block_indices.shape)}; it needs [tokens, KV heads, k] = "
            f"[{q.shape[0]}, {k_heads}, k]"
        )


def select_blocks(
    index_q: Tensor, index_k: Tensor, cu_seqlens_q: Lengths, cu_seqlens_k: Lengths, *, q_offset: Lengths | None = None,
    block_size: int, topk_blocks: int, init_blocks: int = 0, local_blocks: int = 1, score_type: str = "max",
    scale: float | None = None, implementation: str | None = None,
) -> Tensor:  # fmt: skip
    """Choose key blocks: `index_q` `[T, Hi, Di]`, `index_k` `[S, Di]` -> int32 `[T, Hi, topk_blocks]`."""
    return _function(
        implementation, "select_blocks", index_q,
        lambda: availability.why_not_selection(index_q, index_k, block_size, topk_blocks, scale),
    )(
        index_q, index_k, cu_seqlens_q, cu_seqlens_k, q_offset=q_offset, block_size=block_size,
        topk_blocks=topk_blocks, init_blocks=init_blocks, local_blocks=local_blocks, score_type=score_type, scale=scale,
    )  # fmt: skip


def select_blocks_paged(
    index_q: Tensor, index_k_pages: Tensor, page_table: Tensor, lengths_k: Lengths, cu_seqlens_q: Lengths, *,
    block_size: int, topk_blocks: int, init_blocks: int = 0, local_blocks: int = 1, score_type: str = "max",
    scale: float | None = None, implementation: str | None = None, plan: PagedPlan | DevicePlan | None = None,
) -> Tensor:  # fmt: skip
    """`select_blocks` over index key pages `[P, page, Di]`; `page_table[n]` lists those of sequence n."""
    return _function(
        implementation, "select_blocks_paged", index_q,
        lambda: availability.why_not_selection(index_q, index_k_pages, block_size, topk_blocks, scale, True),
        plan,
    )(
        index_q, index_k_pages, page_table, lengths_k, cu_seqlens_q, block_size=block_size, topk_blocks=topk_blocks,
        init_blocks=init_blocks, local_blocks=local_blocks, score_type=score_type, scale=scale,
        **_planned(implementation, plan),
    )  # fmt: skip


def block_sparse_attention(
    q: Tensor, k: Tensor, v: Tensor, block_indices: Tensor, cu_seqlens_q: Lengths, cu_seqlens_k: Lengths, *,
    q_offset: Lengths | None = None, block_size: int, scale: float | None = None, implementation: str | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Attend the selected blocks: `[T, Hq, D]`, `[S, Hkv, D]`, `[T, Hkv, K]` -> (out `[T, Hq, D]`, lse `[T, Hq]`)."""
    _check_heads(q, k.shape[1], block_indices)
    return _function(
        implementation, "block_sparse_attention", q,
        lambda: availability.why_not_attention(q, k, v, block_size, block_indices.shape[-1], scale),
    )(
        q, k, v, block_indices, cu_seqlens_q, cu_seqlens_k, q_offset=q_offset, block_size=block_size, scale=scale
    )


def varlen_attention(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Lengths, cu_seqlens_k: Lengths, *, q_offset: Lengths | None = None,
    causal: bool = True, scale: float | None = None, implementation: str | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Dense attention within each sequence: `[T, Hq, D]`, `[S, Hkv, D]` -> (out `[T, Hq, D]`, lse `[T, Hq]`)."""
    _check_heads(q, k.shape[1], None)
    return _function(
        implementation, "varlen_attention", q,
        lambda: availability.why_not_attention(q, k, v, None, 1, scale),
    )(
        q, k, v, cu_seqlens_q, cu_seqlens_k, q_offset=q_offset, causal=causal, scale=scale
    )


def block_sparse_attention_paged(
    q: Tensor, k_pages: Tensor, v_pages: Tensor, page_table: Tensor, lengths_k: Lengths, block_indices: Tensor,
    cu_seqlens_q: Lengths, *, block_size: int, scale: float | None = None, implementation: str | None = None,
    plan: PagedPlan | DevicePlan | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`block_sparse_attention` over pages `[P, Hkv, page, D]`; `lengths_k` counts the new tokens too (no gradient)."""
    _check_heads(q, k_pages.shape[1], block_indices)
    return _function(
        implementation, "block_sparse_attention_paged", q,
        lambda: availability.why_not_attention(q, k_pages, v_pages, block_size, block_indices.shape[-1], scale, True),
        plan,
    )(
        q, k_pages, v_pages, page_table, lengths_k, block_indices, cu_seqlens_q, block_size=block_size, scale=scale,
        **_planned(implementation, plan),
    )  # fmt: skip


def paged_attention(
    q: Tensor, k_pages: Tensor, v_pages: Tensor, page_table: Tensor, lengths_k: Lengths, cu_seqlens_q: Lengths, *,
    scale: float | None = None, implementation: str | None = None, plan: PagedPlan | DevicePlan | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Dense causal attention over pages `[P, Hkv, page, D]`; `lengths_k` counts the new tokens too (no gradient)."""
    _check_heads(q, k_pages.shape[1], None)
    return _function(
        implementation, "paged_attention", q,
        lambda: availability.why_not_attention(q, k_pages, v_pages, None, 1, scale, True),
        plan,
    )(
        q, k_pages, v_pages, page_table, lengths_k, cu_seqlens_q, scale=scale, **_planned(implementation, plan)
    )


def indexer_kl(
    q: Tensor, k: Tensor, index_q: Tensor, index_k: Tensor, block_indices: Tensor | None, cu_seqlens_q: Lengths,
    cu_seqlens_k: Lengths, *, q_offset: Lengths | None = None, block_size: int, scale: float | None = None,
    index_scale: float | None = None, lse: Tensor | None = None, implementation: str | None = None,
) -> Tensor:  # fmt: skip
    """KL of index attention from main attention, mean over tokens and heads; gradient to the indexer only.

    lse: what attention over the same keys returned, `[T, Hq]`: it saves a pass.
    """
    _check_heads(q, k.shape[1], block_indices)
    if lse is not None and lse.shape != q.shape[:2]:
        raise ValueError(f"lse has shape {tuple(lse.shape)}; it needs [tokens, query heads] = {tuple(q.shape[:2])}")
    if index_q.shape[1] != k.shape[1]:
        raise ValueError(f"{index_q.shape[1]} index heads for {k.shape[1]} KV heads; the indexer needs one per KV head")
    return _function(
        implementation, "indexer_kl", q,
        lambda: availability.why_not_alignment(
            q, k, index_q, index_k, None if block_indices is None else block_size,
            1 if block_indices is None else block_indices.shape[-1], scale, index_scale,
        ),
    )(
        q, k, index_q, index_k, block_indices, cu_seqlens_q, cu_seqlens_k, q_offset=q_offset, block_size=block_size,
        scale=scale, index_scale=index_scale, lse=lse,
    )  # fmt: skip


def grouped_experts(
    x: Tensor, w13: Tensor, w2: Tensor, expert_ids: Tensor, expert_weights: Tensor, *, alpha: float, limit: float,
    beta: float = 1.0, implementation: str | None = None,
) -> Tensor:  # fmt: skip
    """Weighted sum of each token's experts: `x` `[T, hidden]`, ids and weights `[T, K]` -> `[T, hidden]`."""
    return _function(implementation, "grouped_experts", x, lambda: availability.why_not_experts(x, w13, w2))(
        x, w13, w2, expert_ids, expert_weights, alpha=alpha, limit=limit, beta=beta
    )


def norm_rope_store(
    x: Tensor, weight: Tensor | None, freqs_cis: Tensor, *, eps: float, pages: Tensor | None = None,
    slots: Tensor | None = None, implementation: str | None = None,
) -> Tensor:  # fmt: skip
    """Norm each head of `x` `[T, H, D]`, rotate it by `freqs_cis` `[T, R]`, and write it to `pages` at `slots`."""
    return _function(implementation, "norm_rope_store", x)(x, weight, freqs_cis, eps=eps, pages=pages, slots=slots)


def rms_norm(x: Tensor, scale: Tensor, *, eps: float, implementation: str | None = None) -> Tensor:
    """`x / rms(x) * scale` over the last dimension: `[..., D]`, `[D]` -> `[..., D]`."""
    if scale.shape != x.shape[-1:]:
        raise ValueError(f"scale has shape {tuple(scale.shape)}; x {tuple(x.shape)} needs {tuple(x.shape[-1:])}")
    return _function(implementation, "rms_norm", x, products=False)(x, scale, eps=eps)


def swiglu_oai(
    gate: Tensor, up: Tensor, alpha: float, limit: float, beta: float = 1.0, *, implementation: str | None = None
) -> Tensor:
    """`g * sigmoid(alpha * g) * (u + beta)` of clamped gate and up, of any one shape."""
    if gate.shape != up.shape:
        raise ValueError(f"gate {tuple(gate.shape)} and up {tuple(up.shape)} must have one shape")
    return _function(implementation, "swiglu_oai", gate, products=False)(gate, up, alpha, limit, beta)
