"""Products of a step of few new tokens (`decoding`), and the buffers they read and write.

T new tokens.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from minim3.model.layers import PackedLinears
from minim3.model.quantized import PackedMatrices, QuantizedLinear
from minim3.model.weight_formats import BareProduct


class Rows:
    """A buffer `[T, n]`, and its first row: the only one if `single`."""

    def __init__(self, rows: Tensor) -> None:
        self.all = rows
        self.row = rows[0]
        self.single = rows.shape[0] == 1
        self._short: Tensor | None = None
        self._each: tuple[Tensor, ...] | None = None

    def each(self) -> tuple[Tensor, ...]:
        """The rows one by one."""
        if self._each is None:
            with torch.inference_mode(False):
                self._each = self.all.unbind()
        return self._each

    def short(self) -> Tensor:
        """A copy in bf16, which products of quantized weights take."""
        if self._short is None:
            with torch.inference_mode(False):
                self._short = torch.zeros_like(self.all, dtype=torch.bfloat16)
        return self._short.copy_(self.all)


class Space:
    """The buffers of a number of tokens. `of` hands out the same one for the same name and width."""

    def __init__(self, tokens: int) -> None:
        self.tokens = tokens
        self._made: dict[Any, Any] = {}

    def of(self, name: str, width: int) -> Rows:
        return self.once((name, width), lambda: Rows(torch.zeros(self.tokens, width)))

    def once(self, key: Any, make: Callable[[], Any]) -> Any:
        made = self._made.get(key)
        if made is None:
            with torch.inference_mode(False):  # what is made serves in and outside of inference mode
                made = self._made[key] = make()
        return made


class _Piece(NamedTuple):
    """A product of quantized weights, and where its columns go in the output."""

    product: BareProduct
    columns: list[tuple[slice, slice]]


class Product:
    """`x @ weight.T`: of a plain fp32 weight, of quantized ones, or what a module in the place of either computes.

    `short` is the product of one quantized weight, rows of bf16 to rows of bf16; None for anything else.
    """

    def __init__(self, weight: Tensor | None, pieces: Sequence[_Piece], module: Callable[[Any], Any]) -> None:
        self.plain = weight is not None
        self.weight = torch.empty(0, 0) if weight is None else weight
        self.turned = self.weight.t()
        self._pieces = pieces
        self.short = pieces[0].product if len(pieces) == 1 else None
        self._module = module

    @classmethod
    def of(cls, module: nn.Module) -> "Product":
        if type(module) is QuantizedLinear and module.matrix is not None:
            bare = module.matrix.bare()
            whole = slice(None)
            return cls(None, [] if bare is None else [_Piece(bare, [(whole, whole)])], module)
        plain = isinstance(module, nn.Linear) and type(module) is nn.Linear and module.bias is None
        weight = module.get_parameter("weight").detach() if plain else None
        return cls(weight if is_plain(weight) else None, [], module)

    @classmethod
    def of_packed(cls, packed: Any) -> "Product":
        if type(packed) is PackedMatrices:
            return cls(None, _pieces(packed), packed)
        plain = type(packed) is PackedLinears and is_plain(packed.weight)
        return cls(packed.weight if plain else None, [], packed)

    def into(self, x: Rows, out: Rows) -> None:
        if not self.plain:
            self._into(x, out)
        elif x.single:
            torch.mv(self.weight, x.row, out=out.row)
        else:
            torch.mm(x.all, self.turned, out=out.all)

    def add_to(self, x: Rows, out: Rows) -> None:
        if not self.plain:
            out.all.add_(self._module(x.all) if self.short is None or not x.single else self.short(x.short()))
        elif x.single:
            torch.addmv(out.row, self.weight, x.row, out=out.row)
        else:
            torch.addmm(out.all, x.all, self.turned, out=out.all)

    def _into(self, x: Rows, out: Rows) -> None:
        if not self._pieces or not x.single:
            out.all.copy_(self._module(x.all))
            return
        short = x.short()
        for product, columns in self._pieces:
            found = product(short)
            for source, target in columns:
                out.all[:, target].copy_(found[:, source])


def _pieces(packed: PackedMatrices) -> list[_Piece]:
    """None where one of the products is not of bare quantized weights."""
    bare = [None if isinstance(matrix, PackedLinears) else matrix.bare() for matrix in packed.products]
    columns: list[list[tuple[slice, slice]]] = [[] for _ in bare]
    start = 0
    for product, first, last in packed.pieces:
        columns[product].append((slice(first, last), slice(start, start + last - first)))
        start += last - first
    found = [_Piece(product, places) for product, places in zip(bare, columns) if product is not None]
    return found if len(found) == len(bare) else []


def is_plain(weight: Any) -> bool:
    return type(weight) in (Tensor, nn.Parameter) and weight.dtype == torch.float32 and weight.device.type == "cpu"
