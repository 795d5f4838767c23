"""What the GPU benchmarks share: timing on the device, its own ceilings, and results that name it."""

import json
import statistics
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.report import Claim, print_table

DEVICE = "cuda"
HEADS, KV_HEADS, DIM, BLOCK, TOPK = 64, 4, 128, 128, 16


def device() -> str:
    """The device and what runs on it, in words."""
    import triton

    properties = torch.cuda.get_device_properties(0)
    memory = properties.total_memory / 2**30
    versions = f"torch {torch.__version__.split('+')[0]}, Triton {triton.__version__}"
    return f"one {properties.name} ({properties.multi_processor_count} multiprocessors, {memory:.0f} GiB), {versions}"


def milliseconds(run: Callable[[], object], budget: float = 300.0) -> float:
    """Median time of one call on the device, after two that warm up; calls fill about `budget` milliseconds."""
    run()
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    run()
    stop.record()
    torch.cuda.synchronize()
    count = max(3, min(50, int(budget / max(start.elapsed_time(stop), 1e-3))))
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(count)]
    for first, last in events:
        first.record()
        run()
        last.record()
    torch.cuda.synchronize()
    return statistics.median(first.elapsed_time(last) for first, last in events)


def graph_milliseconds(run: Callable[[], object], calls: int = 20) -> float:
    """Time of one call inside a CUDA graph of many: without the host's part."""
    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(calls):
            run()
    return milliseconds(graph.replay) / calls


def copy_rate() -> float:
    """Bytes/s read and written by a copy of 4 GiB."""
    a = torch.empty(1 << 32, dtype=torch.uint8, device=DEVICE).random_(0, 255)
    b = torch.empty_like(a)
    return 2 * a.numel() / milliseconds(lambda: b.copy_(a)) * 1e3


def matrix_rate() -> float:
    """FLOP/s of a bf16 product of 8192 x 8192 random matrices."""
    a, b = randn(8192, 8192), randn(8192, 8192, seed=1)
    return 2 * 8192**3 / milliseconds(lambda: a @ b) * 1e3


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    generator = torch.Generator(DEVICE).manual_seed(seed)
    return torch.randn(*shape, generator=generator, device=DEVICE, dtype=dtype)


def index_queries(length: int, selection: str, offset: int = 0) -> Tensor:
    """`[length, KV_HEADS, DIM]`: "random", or "overlapping" (stretches of 256 tokens look for the same things)."""
    own = randn(length, KV_HEADS, DIM, seed=7)
    if selection == "random":
        return own
    topics = randn(-(-(offset + length) // 256), KV_HEADS, DIM, seed=8).repeat_interleave(256, 0)
    return topics[offset : offset + length] + 0.3 * own


def flash(q: Tensor, k: Tensor, v: Tensor) -> Callable[[], Tensor]:
    """Dense attention by torch's flash kernel, causal, the last query at the last key; `[T, H, D]` in."""
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.nn.attention.bias import causal_lower_right

    heads = [x.transpose(0, 1).unsqueeze(0).contiguous() for x in (q, k, v)]
    square = q.shape[0] == k.shape[0]

    def run() -> Tensor:
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            if square:
                return F.scaled_dot_product_attention(*heads, is_causal=True, enable_gqa=True)
            if q.shape[0] == 1:
                return F.scaled_dot_product_attention(*heads, enable_gqa=True)
            bias = causal_lower_right(q.shape[0], k.shape[0])
            return F.scaled_dot_product_attention(*heads, attn_mask=bias, enable_gqa=True)  # type: ignore[arg-type]

    return run


def publish(claims: list[Claim], path: Path | None) -> None:
    """Print the claims; write them as JSON if a path is given. The machine is the device."""
    rows = [{**claim.row(), "machine": device()} for claim in claims]
    print_table(rows)
    print(device())
    if path is not None:
        path.write_text(json.dumps(rows, indent=1) + "\n")
