"""Kernels in C for the CPU: a whole step of decoding in one call, and blocks of keys of prompts (`prompts`).

A step of few tokens is bound by reading weights; in eager PyTorch half of its time goes to launching operators instead,
and an attention that reads chosen blocks where they lie cannot be put together from operators at all. `step.c` computes
all layers in one parallel region, `blocks.c` what prompts and their gradients do to a block. They are plain C with the
vector extension of gcc and clang, and intrinsics where some Intel processors multiply tiles (`tiles.h`), compiled where
they run (`build`); where that cannot be done, portable PyTorch runs instead, and `minim3 info` says so. The structures
below mirror those of the C.
"""

import ctypes
from collections.abc import Sequence
from ctypes import POINTER, Structure, c_float, c_int, c_int64, c_void_p
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from minim3.kernels.native import build


class Limits(NamedTuple):
    """Steps that are quicker here than by modules, whose products and attention of many tokens are good."""

    tokens: int
    """New tokens of a step."""
    of_a_sequence: int
    """New tokens of one sequence: each reads all of its keys, which many of them do better together."""
    keys: int
    """Keys of the longest sequence, where one has more than `SOME_TOKENS` new ones."""
    pairs: int = 1 << 20
    """New tokens times the keys of the longest sequence, where one has more than a few new ones."""


SOME_TOKENS = 64
BY_VECTORS = Limits(tokens=256, of_a_sequence=128, keys=1 << 13)
ON_TILES = Limits(tokens=2048, of_a_sequence=512, keys=1 << 10)
MOST_TOPK = 4096
"""Blocks that a query may choose: they are kept on the stack of C."""
MOST_ROWS = 32
"""Query heads of a KV head, and index heads."""
MOST_SCALE = 246
"""Of MXFP8: larger ones are of weights past 2^119."""
FP32, INT8, INT4, BF16, MXFP8 = range(5)
"""Formats of a matrix."""


def why_not() -> str | None:
    """Why the kernels cannot run here, or None."""
    found = build.library()
    return found if isinstance(found, str) else None


def lanes() -> int:
    """fp32 numbers of a vector; dimensions of heads are multiples of it."""
    return int(library().minim3_lanes())


def int4_blocks() -> tuple[int, int]:
    """Rows of a block of 4-bit codes that the product knows."""
    return 2 * lanes(), 4 * lanes()


def library() -> ctypes.CDLL:
    found = build.library()
    assert not isinstance(found, str), found
    return found


def tiles() -> bool:
    """Whether products of many rows run on tiles of bf16 (AMX), in fp32 still (`tiles.h`)."""
    return bool(_tiles(library()).value)


def use_tiles(wanted: bool) -> bool:
    """Run such products on tiles from now on, or not. Returns whether they do: not all machines have tiles."""
    _tiles(library())
    return bool(library().minim3_use_tiles(int(wanted)))


@cache
def _tiles(of: ctypes.CDLL) -> c_int:
    """The variable that says so, asked for by then."""
    of.minim3_use_tiles(1)
    return c_int.in_dll(of, "minim3_tiles")


def limits() -> Limits:
    return ON_TILES if tiles() else BY_VECTORS


class Matrix(Structure):
    _fields_ = [
        ("format", c_int64), ("rows", c_int64), ("columns", c_int64), ("stride", c_int64), ("codes", c_void_p),
        ("scales", c_void_p), ("group", c_int64), ("block", c_int64), ("neighbours", c_int64),
    ]  # fmt: skip


class Pages(Structure):
    _fields_ = [("k", c_void_p), ("v", c_void_p), ("index_k", c_void_p)]


class Selection(Structure):
    _fields_ = [("topk", c_int64), ("block", c_int64), ("init", c_int64), ("local", c_int64), ("lse", c_int64)]


class Norm(Structure):
    _fields_ = [("scale", c_void_p), ("eps", c_float)]


class Activation(Structure):
    _fields_ = [("alpha", c_float), ("limit", c_float), ("beta", c_float)]


class Experts(Structure):
    _fields_ = [
        ("experts", c_int64), ("per_token", c_int64), ("softmax", c_int64), ("shared", c_int64), ("router", c_void_p),
        ("bias", c_void_p), ("factor", c_float), ("act", Activation), ("shared_act", Activation),
        ("gate_proj", POINTER(Matrix)), ("up_proj", POINTER(Matrix)), ("down_proj", POINTER(Matrix)),
    ]  # fmt: skip


class Layer(Structure):
    _fields_ = [
        ("before_attention", Norm), ("before_experts", Norm), ("projections", c_int64), ("project", POINTER(Matrix)),
        ("output", POINTER(Matrix)), ("head_scale", c_void_p), ("head_eps", c_float), ("heads", c_int64),
        ("kv_heads", c_int64), ("index_heads", c_int64), ("dim", c_int64), ("selection", Selection),
        ("experts", Experts),
    ]  # fmt: skip


class Model(Structure):
    _fields_ = [
        ("hidden", c_int64), ("layers", c_int64), ("half", c_int64), ("frequencies", c_void_p),
        ("layer", POINTER(Layer)), ("last", Norm), ("joint", POINTER(Matrix)), ("before_embedding", Norm),
        ("before_hidden", Norm),
    ]  # fmt: skip


class Batch(Structure):
    _fields_ = [
        ("tokens", c_int64), ("sequences", c_int64), ("page_size", c_int64), ("table_stride", c_int64),
        ("threads", c_int64), ("lengths_q", POINTER(c_int64)), ("lengths_k", POINTER(c_int64)),
        ("positions", c_void_p), ("slots", c_void_p), ("page_table", c_void_p), ("pages", POINTER(Pages)),
        ("embeds", c_void_p), ("hidden", c_void_p), ("out", c_void_p),
    ]  # fmt: skip


_BYTES_OF_A_THREAD = 8 << 20
"""Weights that a step reads for each thread that takes part: stages of a smaller model are too short to share, and all
wait in every one for a thread whose core is busy with something else."""
_TOKENS_OF_A_READ = 32
"""Tokens that are multiplied with a weight about as long as reading it takes."""
_BYTES_OF_A_PRODUCT = 1 << 18
"""The same for one product alone, in which they wait once."""
_MOST_BYTES = 1 << 30
"""Memory of a step."""


def _threads(num_bytes: int, each: int) -> int:
    return max(1, min(torch.get_num_threads(), num_bytes // each))


_BITS = {FP32: 32, INT8: 8, INT4: 4, BF16: 16, MXFP8: 8}


def _bytes(matrix: Matrix) -> int:
    bits: int = matrix.rows * matrix.columns * _BITS[matrix.format]
    return bits // 8


def product(matrix: Matrix, x: Tensor) -> Tensor:
    """fp32 `[T, columns]` on the CPU -> `[T, rows]`."""
    if x.shape[1] != matrix.columns:
        raise ValueError(f"inputs of {x.shape[1]} columns do not fit a weight of {matrix.columns}")
    tiles()  # are asked for before the first product
    x = x.contiguous()
    out = torch.empty(x.shape[0], matrix.rows, dtype=torch.float32, device="cpu")
    threads = _threads(_bytes(matrix) * max(1, x.shape[0] // _TOKENS_OF_A_READ), _BYTES_OF_A_PRODUCT)
    library().minim3_product(
        ctypes.byref(matrix), c_void_p(x.data_ptr()), c_int64(x.shape[0]), c_void_p(out.data_ptr()), c_int64(threads)
    )
    return out


def integers(values: Sequence[int]) -> Any:
    """A C array of int64."""
    return (c_int64 * len(values))(*values)


class Steps:
    """Runs steps of one model, in memory that is kept from one to the next; not for two threads at once."""

    def __init__(self, model: Model) -> None:
        layers = [model.layer[n] for n in range(model.layers)]
        self._dense_bytes, self._experts = 0, list[tuple[int, int, int]]()
        for layer in layers:
            experts, count = layer.experts, layer.experts.experts
            self._dense_bytes += sum(_bytes(layer.project[n]) for n in range(layer.projections))
            self._dense_bytes += _bytes(layer.output[0])
            own = [sum(map(_bytes, (experts.gate_proj[n], experts.up_proj[n], experts.down_proj[n])))
                   for n in range(count + experts.shared)]  # fmt: skip
            self._dense_bytes += sum(own[count:])
            self._experts.append((experts.per_token, count, own[0]))
        found = library()
        tiles()
        self._space, self._step = found.minim3_space, found.minim3_step
        self._space.restype, self._step.restype = c_int64, None
        self._model = ctypes.byref(model)
        self._memory = torch.empty(0, dtype=torch.uint8, device="cpu")

    def run(self, batch: Batch) -> bool:
        """False, and nothing done, where the step would take too much memory."""
        experts = sum(min(batch.tokens * each, count) * size for each, count, size in self._experts)
        work = (self._dense_bytes + experts) * max(1, batch.tokens // _TOKENS_OF_A_READ)
        batch.threads = _threads(work, _BYTES_OF_A_THREAD)
        needed = self._space(self._model, ctypes.byref(batch)) + 64
        if needed > _MOST_BYTES:
            return False
        if self._memory.numel() < needed:
            self._memory = torch.empty(needed * 5 // 4, dtype=torch.uint8, device="cpu")
        start = -(-self._memory.data_ptr() // 64) * 64
        self._step(self._model, ctypes.byref(batch), c_void_p(start))
        return True


def address(tensor: Tensor) -> int:
    """Of the first number of a tensor whose last dimension is dense."""
    assert tensor.stride(-1) == 1 or tensor.shape[-1] == 1, tensor.stride()
    return tensor.data_ptr()
