"""For tests of the Triton kernels: imports them interpreted, so that they run on the CPU, and builds their cases.

The environment variable that makes Triton interpret is set while Triton is imported here and during each of these
tests (fixture `interpreted`), and at no other time: tests of the choice of an implementation see an ordinary machine.
"""

import os
from collections.abc import Iterator
from itertools import pairwise
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

if torch.cuda.is_available():
    pytest.skip("on a GPU tests/gpu runs the kernels themselves", allow_module_level=True)
with mock.patch.dict(os.environ, TRITON_INTERPRET="1"):
    pytest.importorskip("triton")
    import triton.language as tl
    from triton.runtime import interpreter
    from triton.runtime.interpreter import InterpretedFunction

    from minim3.kernels.triton import select as _select

assert isinstance(_select._score_kernel, InterpretedFunction), "Triton was imported before, without its interpreter"


_create_dot = interpreter.InterpreterBuilder.create_dot


def _dot_of_bf16_too(self: Any, a: Any, b: Any, *others: Any) -> Any:
    """The interpreter holds bf16 as integers, and would multiply those. A GPU multiplies exactly, and sums in fp32."""
    wide = []
    for x in (a, b):
        if x.dtype.scalar == tl.bfloat16:
            data = interpreter._convert_float(x.data, tl.bfloat16, tl.float32, None).view("float32")
            x = interpreter.TensorHandle(data, tl.float32)
        wide.append(x)
    return _create_dot(self, *wide, *others)


interpreter.InterpreterBuilder.create_dot = _dot_of_bf16_too  # type: ignore[method-assign]


@pytest.fixture(autouse=True)
def interpreted() -> Iterator[None]:
    # A program for every row of scores is slow to interpret: one test of the selection asks for it.
    with mock.patch.dict(os.environ, TRITON_INTERPRET="1"), mock.patch.object(_select, "_FEW_ROWS", 0):
        yield


def cumulative(lengths: list[int]) -> list[int]:
    return [0, *torch.tensor(lengths).cumsum(0).tolist()]


def close(a: Tensor, b: Tensor, relative: float = 1e-5) -> None:
    assert a.shape == b.shape
    assert a.dtype == b.dtype
    assert torch.isfinite(a).all()
    assert (a.double() - b.double()).abs().max() <= relative * b.double().abs().max().clamp(min=0.1)


def random_ids(cu_q: list[int], cu_k: list[int], heads: int, block_size: int, k: int, seed: int = 0) -> Tensor:
    """Block ids no indexer made: int32 `[T, heads, k]`, distinct visible blocks in any order, not always the own."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for q, s, lowest in zip(cu_q[1:], cu_k[1:], cu_q):
        for token in range(lowest, q):
            current = (s - cu_k[cu_k.index(s) - 1] - q + token) // block_size
            for _ in range(heads):
                count = int(torch.randint(1, min(k, current + 1) + 1, (), generator=generator))
                chosen = torch.randperm(current + 1, generator=generator)[:count].tolist()
                rows.append(chosen + [-1] * (k - count))
    return torch.tensor(rows, dtype=torch.int32).view(cu_q[-1], heads, k)


def in_pages(packed: Tensor, cu_k: list[int], page_size: int, seed: int = 0, spare: int = 3) -> tuple[Tensor, Tensor]:
    """Packed keys `[S, H, D]` (or `[S, D]`) in shuffled pages, NaN wherever no key lies: (pages, page table).

    The table lists -1 past the end of a sequence.
    """
    lengths = [b - a for a, b in pairwise(cu_k)]
    counts = [-(-n // page_size) for n in lengths]
    order = torch.randperm(sum(counts) + spare, generator=torch.Generator().manual_seed(seed))
    heads = packed.shape[1:-1]
    pages = torch.full((sum(counts) + spare, *heads, page_size, packed.shape[-1]), float("nan"), dtype=packed.dtype)
    table = torch.full((len(lengths), max(counts) + 1), -1, dtype=torch.int64)
    taken = 0
    for n, count in enumerate(counts):
        table[n, :count] = order[taken : taken + count]
        taken += count
        for position in range(lengths[n]):
            pages[table[n, position // page_size], ..., position % page_size, :] = packed[cu_k[n] + position]
    return pages, table
