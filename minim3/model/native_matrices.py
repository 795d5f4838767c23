"""Weights in fewer bits in the form that the kernels in C take (`minim3.kernels.native`), and their products."""

from dataclasses import replace
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.utils._python_dispatch import _get_current_dispatch_mode

from minim3 import kernels
from minim3.kernels import native
from minim3.model.weight_formats import Bf16Matrix, Int4Matrix, Int8Matrix, MXFP8Matrix, WeightMatrix, int4_layout


class NoForm(Exception):
    """What the kernels do not know, in words."""


def structure_of(matrix: WeightMatrix | None, first: int = 0, last: int | None = None) -> native.Matrix:
    """Rows `first..last` of a matrix, which has to be kept as long. Raises `NoForm`."""
    codes = matrix.values if isinstance(matrix, Bf16Matrix) else getattr(matrix, "codes", None)
    if isinstance(codes, torch.Tensor) and codes.device.type != "cpu":
        raise NoForm(f"a weight is on {codes.device}")
    if isinstance(matrix, Int8Matrix):
        last = matrix.num_rows if last is None else last
        codes, scales = matrix.codes[first:last], matrix.scales[first:last]
        return native.Matrix(
            format=native.INT8, rows=last - first, columns=matrix.columns, stride=codes.stride(0),
            codes=codes.data_ptr(), scales=scales.data_ptr(),
        )  # fmt: skip
    if isinstance(matrix, Bf16Matrix):
        values = matrix.values[first:last]
        return native.Matrix(
            format=native.BF16, rows=values.shape[0], columns=matrix.columns, stride=values.stride(0),
            codes=values.data_ptr(),
        )  # fmt: skip
    if isinstance(matrix, MXFP8Matrix):
        codes, powers = matrix.codes[first:last], matrix.scales[first:last]
        if powers.numel() and int(powers.max()) > native.MOST_SCALE:
            raise NoForm("MXFP8 scales are past 2^119")
        return native.Matrix(
            format=native.MXFP8, rows=codes.shape[0], columns=matrix.columns, stride=codes.stride(0),
            codes=codes.data_ptr(), scales=powers.data_ptr(), group=powers.stride(0),
        )  # fmt: skip
    layout = int4_layout()
    if not isinstance(matrix, Int4Matrix) or layout is None or layout.block not in native.int4_blocks():
        raise NoForm(f"a weight is {getattr(matrix, 'format', None)}, in an order that they do not know")
    last = matrix.num_rows if last is None else last
    if (
        first % layout.block
        or matrix.spans != ((0, matrix.num_rows),)
        or 2 * matrix.codes.shape[1] != matrix.columns
    ):
        raise NoForm("4-bit rows of an expert do not fill blocks")
    factors = matrix.scales_and_zeros
    assert factors.stride()[1:] == (2, 1), factors.stride()
    return native.Matrix(
        format=native.INT4, rows=last - first, columns=matrix.columns, stride=factors.stride(0) // 2,
        codes=matrix.codes[first:].data_ptr(), scales=factors[:, first:].data_ptr(), group=matrix.group_size,
        block=layout.block, neighbours=layout.neighbours,
    )  # fmt: skip


def product(matrix: WeightMatrix, x: Tensor, backend: str | None) -> Tensor | None:
    """fp32 `[M, columns]` -> `[M, num_rows]`; None where C does not run, or has no form for the matrix.

    backend: the implementation that was asked for, or None.
    """
    if x.dtype != torch.float32 or kernels.resolve(backend, "decoder_step", x.device.type, x.dtype) != "native":
        return None
    own = _whole(matrix)
    if own is None or _get_current_dispatch_mode() is not None:  # a counter of operations sees those of torch alone
        return None
    out = native.product(own, x)
    return matrix.unpad(out) if isinstance(matrix, Int4Matrix) else out


_KNOWN: WeakKeyDictionary[WeightMatrix, native.Matrix | None] = WeakKeyDictionary()
"""Not in the matrices themselves: a copy of one lies elsewhere."""


def _whole(matrix: WeightMatrix) -> native.Matrix | None:
    if matrix not in _KNOWN:
        padded = matrix
        if isinstance(matrix, Int4Matrix):  # rows of blocks, among them those that pad a part
            padded = replace(matrix, spans=((0, matrix.codes.shape[0]),))
        try:
            _KNOWN[matrix] = structure_of(padded)
        except NoForm:
            _KNOWN[matrix] = None
    return _KNOWN[matrix]
