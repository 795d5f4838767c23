"""Independent pieces of work side by side, each on one thread.

A product of some thousand rows by 64 by 128 splits badly over threads: what each gets is small, and they wait for each
other after every operator. Whole pieces (a KV head of a tile) on threads of their own do not wait, and while one
gathers rows another multiplies. Pieces write to different places, so that threads change the order of no sum.
"""

import os
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import cache

import torch
from torch import Tensor
from torch.utils._python_dispatch import _get_current_dispatch_mode


def run_all(pieces: Iterable[Callable[[], None]], device: torch.device, alone: bool = False) -> None:
    """Call every piece, as many of them at once as this thread has threads for operators.

    Fewer pieces than threads are called one after the other, each with all threads (unless they compute `alone`, on one
    thread whatever there are), and so is work on another device than the CPU, whose current stream holds for one
    thread. Pieces must not depend on each other. The first exception is raised after all pieces have ended.
    """
    pieces, threads = list(pieces), torch.get_num_threads()
    watched = _get_current_dispatch_mode() is not None  # a FLOP counter, say: it sees the operators of its own thread
    if device.type != "cpu" or threads == 1 or len(pieces) < (2 if alone else threads) or watched:
        for piece in pieces:
            piece()
        return
    inference = torch.is_inference_mode_enabled()

    def call(piece: Callable[[], None]) -> None:
        with torch.inference_mode(inference), torch.set_grad_enabled(False):  # what a new thread does not inherit
            piece()

    futures = [_pool(threads).submit(call, piece) for piece in pieces]
    errors = [error for future in futures if (error := future.exception()) is not None]
    if errors:
        raise errors[0]


def room(name: str, size: int, like: Tensor) -> Tensor:
    """A buffer `[size]` of this thread's own under that name, with whatever its last user left in it.

    Pieces need tens of megabytes one after the other; made anew each time, all of it would be paged in again.
    """
    if like.device.type != "cpu":  # there the allocator reuses memory, in the order of each stream
        return torch.empty(size, dtype=like.dtype, device=like.device)
    key = name, like.dtype
    kept = _kept.__dict__.setdefault("buffers", {})
    if key not in kept or kept[key].numel() < size:
        with torch.inference_mode(False):  # an inference tensor could not be written to outside of that mode
            kept[key] = torch.empty(size, dtype=like.dtype)
    return kept[key][:size]


_kept = threading.local()


@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    pool = ThreadPoolExecutor(threads, "minim3-kernel", initializer=_use_one_thread)
    all_started = threading.Barrier(threads)
    for future in [pool.submit(all_started.wait) for _ in range(threads)]:
        future.result()
    # The number of threads holds for the thread that sets it, but becomes the default of threads to come.
    torch.set_num_threads(threads)
    return pool


def _use_one_thread() -> None:
    torch.get_num_threads()  # a thread's first question sets it to the default: a setting before that is lost
    torch.set_num_threads(1)


os.register_at_fork(after_in_child=_pool.cache_clear)  # a child has no threads of its parent's, and would wait for them
