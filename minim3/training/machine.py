"""The machine a run is on: its device, its memory, and how fast it can be at best."""

import ctypes
import sys
import time

import torch


def prepare_device(name: str, threads: int | None) -> torch.device:
    """The device a recipe names ("auto": an accelerator if there is one), with threads, memory and matmuls set up."""
    if threads is not None:
        torch.set_num_threads(threads)
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("the recipe asks for device 'cuda', but torch sees none; set device=cpu or device=auto")
    if name == "cuda":
        torch.set_float32_matmul_precision("high")
    else:
        keep_freed_memory()
    return torch.device(name)


def keep_freed_memory() -> None:
    """Ask glibc to reuse large freed blocks instead of handing them back to the kernel, for the life of the process.

    Every operator allocates its output; with the default setting each megabyte of it faults in 256 fresh pages, which
    takes a tenth to a third of a step. Elsewhere (another C library) nothing is done: the numbers are the same.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        trim_threshold, top_pad, mmap_threshold = -1, -2, -3  # M_* of malloc.h
        mallopt(mmap_threshold, 32 << 20)  # the largest value glibc takes
        mallopt(trim_threshold, 2**31 - 1)
        mallopt(top_pad, 256 << 20)


def measure_peak_flops(device: torch.device, dtype: torch.dtype, *, seconds: float = 0.3) -> float:
    """Floating-point operations a second of a large matrix product in `dtype`, the best of those that fit in `seconds`.

    What a run can reach at most, with the threads it has. Draws no random numbers.
    """
    size = 4096 if device.type == "cuda" else 768
    matrix = torch.full((size, size), 0.5, device=device, dtype=dtype)

    def timed() -> float:
        started = time.perf_counter()
        matrix @ matrix
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - started

    timed()  # the first product of a shape is slower
    deadline = time.perf_counter() + seconds
    best = timed()
    while time.perf_counter() < deadline:
        best = min(best, timed())
    return 2 * size**3 / best
