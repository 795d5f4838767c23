"""Modules that hold their weights in fewer bits, in the places of linear layers and experts, for inference.

A module is given its weights one tensor at a time, and quantizes each as it comes. It holds them outside of parameters
and buffers, so that no cast and no optimizer finds them. `minim3.model.quantization` says which modules are replaced.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NoReturn, Self

import torch
from torch import Tensor, nn

from minim3.checkpoint import Placement
from minim3.kernels.portable.swiglu import swiglu_oai_
from minim3.model import native_matrices
from minim3.model.layers import PackedLinears, at_least_fp32
from minim3.model.moe import MiniMaxM3Experts
from minim3.model.weight_formats import MXFP8Matrix, WeightMatrix, quantize

_ROUND_ROWS = 256
"""Rows of as many experts as stay within this are activated together: a few large operations in the place of many."""


class QuantizedModule(nn.Module):
    """What quantized linears and experts refuse: training, casts, moves, and a state dict that would lack them."""

    format: str

    def train(self, mode: bool = True) -> Self:
        if mode:
            self._refuse("cannot be trained")
        return super().train(mode)

    def _refuse(self, what: str) -> NoReturn:
        raise ValueError(f"{self.format} weights {what}: load the model without quantization")

    def _check_no_gradient(self, x: Tensor) -> None:
        if x.requires_grad and torch.is_grad_enabled():
            self._refuse("pass no gradient on")

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        probe = torch.empty(1, dtype=torch.float32)
        moved = fn(probe)
        if moved.dtype != probe.dtype or moved.device != probe.device:
            self._refuse(f"stay as they are on the CPU, and cannot go to {moved.dtype} on {moved.device}")
        return super()._apply(fn, recurse)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        self._refuse("have no state dict, since they are made from a checkpoint when it is loaded")

    def matrices(self) -> Iterator[WeightMatrix]:
        raise NotImplementedError


class QuantizedLinear(QuantizedModule):
    """In the place of an `nn.Linear` without a bias."""

    def __init__(
        self, in_features: int, out_features: int, format: str, group_size: int, backend: str | None = None
    ) -> None:
        super().__init__()
        self.in_features, self.out_features, self.format, self.backend = in_features, out_features, format, backend
        self._group_size = group_size
        self.matrix: WeightMatrix | None = None
        self.training = False

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the weight that `put` takes."""
        return self.out_features, self.in_features

    @property
    def keeps_mxfp8(self) -> bool:
        return self.format == "mxfp8"

    def put(self, place: Placement, weight: Tensor, scales: Tensor | None = None) -> None:
        """Take the weight, which may be MXFP8 with its scales where `keeps_mxfp8`."""
        if scales is not None:
            self.matrix = MXFP8Matrix.of_stored(weight, scales)
        else:
            self.matrix = quantize(weight, self.format, self._group_size)

    def forward(self, x: Tensor) -> Tensor:
        """`[..., in_features]` -> `[..., out_features]`, in the dtype of `x`."""
        assert self.matrix is not None, "no weight was put in"
        self._check_no_gradient(x)
        return _product(self.matrix, x, self.backend)

    @staticmethod
    def pack_with(projections: Sequence[nn.Module]) -> "PackedMatrices":
        """See `minim3.model.layers.pack_linears`."""
        return PackedMatrices(projections)

    def matrices(self) -> Iterator[WeightMatrix]:
        if self.matrix is not None:
            yield self.matrix

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, {self.format}"


def _product(matrix: WeightMatrix, x: Tensor, backend: str | None) -> Tensor:
    """`[..., columns]` -> `[..., num_rows]`: in C, or by torch's packed products and dequantized tiles."""
    flat = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])  # two dimensions: every operator call of a step counts
    out = native_matrices.product(matrix, flat, backend)
    if out is None:
        out = matrix.product(matrix.prepare(flat)).to(x.dtype)
    return out if x.dim() == 2 else out.view(*x.shape[:-1], -1)


class PackedMatrices:
    """One product for those projections of an input that share a format, whose matrices become views of one.

    Does for quantized projections, among them plain ones, what `PackedLinears` does for plain ones alone.
    """

    def __init__(self, projections: Sequence[nn.Module]) -> None:
        kinds = [p.matrix.format if isinstance(p, QuantizedLinear) and p.matrix else None for p in projections]
        self.products: list[PackedLinears | WeightMatrix] = []
        self._backend = next((p.backend for p in projections if isinstance(p, QuantizedLinear)), None)
        self.pieces: list[tuple[int, int, int]] = [(0, 0, 0)] * len(projections)  # product, first row, last row
        for kind in dict.fromkeys(kinds):
            places = [place for place, other in enumerate(kinds) if other == kind]
            members: list[Any] = [projections[place] for place in places]
            first = 0
            for place, member in zip(places, members, strict=True):
                self.pieces[place] = len(self.products), first, first + member.out_features
                first += member.out_features
            if kind is None:
                self.products.append(PackedLinears(members))
                continue
            joint, views = type(members[0].matrix).join([member.matrix for member in members])
            self.products.append(joint)
            for member, view in zip(members, views, strict=True):
                member.matrix = view
        self.pieces = _merged_pieces(self.pieces)
        self._known = [
            (p, p.matrix if isinstance(p, QuantizedLinear) else p.get_parameter("weight").data_ptr())
            for p in projections
        ]

    def holds(self, projections: Sequence[nn.Module]) -> bool:
        """False once a projection or its weight was replaced."""
        for projection, (known, state) in zip(projections, self._known, strict=True):
            if projection is not known:
                return False
            weight = projection._parameters.get("weight")
            if (projection.__dict__.get("matrix") is not state) if weight is None else weight.data_ptr() != state:
                return False
        return True

    def __call__(self, x: Tensor) -> Tensor:
        """`[..., in]` -> `[..., all rows]`, the outputs of the projections side by side."""
        outputs = [p(x) if isinstance(p, PackedLinears) else _product(p, x, self._backend) for p in self.products]
        if len(self.pieces) == 1:
            return outputs[0]
        return torch.cat([outputs[product][..., first:last] for product, first, last in self.pieces], dim=-1)


def _merged_pieces(pieces: Sequence[tuple[int, int, int]]) -> list[tuple[int, int, int]]:
    """Pieces that follow each other in one output as one."""
    merged: list[tuple[int, int, int]] = []
    for product, first, last in pieces:
        if merged and merged[-1][0] == product and merged[-1][2] == first:
            merged[-1] = product, merged[-1][1], last
        else:
            merged.append((product, first, last))
    return merged


class ExpertStack:
    """One of the two weights of all experts, `[experts, rows, columns]`, as a matrix an expert.

    The two halves of the rows of w13 come as tensors of their own: the first waits for the second.
    """

    def __init__(self, shape: Sequence[int], format: str, group_size: int) -> None:
        self.shape: tuple[int, ...] = tuple(shape)
        self.matrices: list[WeightMatrix | None] = [None] * self.shape[0]
        self._format, self._group_size = format, group_size
        self._halves: dict[tuple[int, int], tuple[Tensor, Tensor | None]] = {}

    @property
    def keeps_mxfp8(self) -> bool:
        return self._format == "mxfp8"

    def put(self, place: Placement, weight: Tensor, scales: Tensor | None = None) -> None:
        """Take the whole stack, one expert, or half of the rows of one."""
        if place.expert is None:
            for expert in range(self.shape[0]):
                self._put(expert, weight[expert], None if scales is None else scales[expert])
            return
        if place.half is None:
            self._put(place.expert, weight, scales)
            return
        other = self._halves.pop((place.expert, 1 - place.half), None)
        if other is None:
            self._halves[place.expert, place.half] = weight, scales
            return
        pair = [(weight, scales), other] if place.half == 0 else [other, (weight, scales)]
        if scales is None or other[1] is None:
            self._put(place.expert, torch.cat([_plain(*half) for half in pair]), None)
        else:
            codes = torch.cat([half.view(torch.uint8) for half, _ in pair]).view(weight.dtype)
            self._put(place.expert, codes, torch.cat([both for _, both in pair if both is not None]))

    def _put(self, expert: int, weight: Tensor, scales: Tensor | None) -> None:
        if scales is not None:
            self.matrices[expert] = MXFP8Matrix.of_stored(weight, scales)
        else:
            self.matrices[expert] = quantize(weight, self._format, self._group_size)

    def __getitem__(self, expert: int) -> WeightMatrix:
        matrix = self.matrices[expert]
        assert matrix is not None, "no weight was put in"
        return matrix


def _plain(weight: Tensor, scales: Tensor | None) -> Tensor:
    return weight.float() if scales is None else MXFP8Matrix.of_stored(weight, scales).dequantize()


class QuantizedExperts(QuantizedModule):
    """In the place of `MiniMaxM3Experts`: active experts alone are computed, each from its quantized weights."""

    def __init__(self, experts: MiniMaxM3Experts, format: str, group_size: int) -> None:
        super().__init__()
        self.format = format
        self.alpha, self.limit, self.beta, self.backend = experts.alpha, experts.limit, experts.beta, experts.backend
        self.w13 = ExpertStack(experts.w13.shape, format, group_size)
        self.w2 = ExpertStack(experts.w2.shape, format, group_size)
        self.training = False

    def forward(self, x: Tensor, expert_ids: Tensor, expert_weights: Tensor) -> Tensor:
        """Weighted sum of each token's experts: `x` `[T, H]`, ids and weights `[T, top_k]` -> `[T, H]`."""
        self._check_no_gradient(x)
        wide = at_least_fp32(x)
        inputs, weights = wide, expert_weights.reshape(-1, 1).to(wide.dtype)
        if x.shape[0] == 1:
            experts = [(expert, 1) for expert in expert_ids[0].tolist()]
            outputs = self._run([inputs] * len(experts), experts, weights)
            return outputs.sum(0, keepdim=True, dtype=wide.dtype).to(x.dtype)
        order = torch.sort(expert_ids.reshape(-1), stable=True).indices
        counts = torch.bincount(expert_ids.reshape(-1), minlength=len(self.w13.matrices)).tolist()
        inputs, weights = inputs.index_select(0, order // expert_ids.shape[1]), weights.index_select(0, order)
        outputs, start = torch.empty(order.shape[0], x.shape[1], dtype=wide.dtype, device=x.device), 0
        for experts in _rounds(counts):
            stop = start + sum(count for _, count in experts)
            pieces = inputs[start:stop].split([count for _, count in experts])
            outputs[order[start:stop]] = self._run(pieces, experts, weights[start:stop]).to(wide.dtype)
            start = stop
        return outputs.view(*expert_ids.shape, -1).sum(1).to(x.dtype)

    def _run(self, inputs: Sequence[Tensor], experts: Sequence[tuple[int, int]], weights: Tensor) -> Tensor:
        """Rows of each of `experts` (its number, its rows) -> its output times `weights`, a row each."""
        products = [_product(self.w13[e], rows, self.backend) for rows, (e, _) in zip(inputs, experts, strict=True)]
        act = swiglu_oai_(torch.cat(products), self.alpha, self.limit, self.beta).mul_(weights)
        hidden = zip(act.split([count for _, count in experts]), experts, strict=True)
        return torch.cat([_product(self.w2[e], rows, self.backend) for rows, (e, _) in hidden])

    def matrices(self) -> Iterator[WeightMatrix]:
        yield from (matrix for stack in (self.w13, self.w2) for matrix in stack.matrices if matrix is not None)

    def extra_repr(self) -> str:
        return f"{self.w13.shape[0]} experts of {self.w2.shape[2]}, {self.format}"


def _rounds(counts: Sequence[int]) -> Iterator[list[tuple[int, int]]]:
    """Active experts with their rows, as many at a time as stay within `_ROUND_ROWS`, and at least one."""
    together: list[tuple[int, int]] = []
    for expert, count in enumerate(counts):
        if together and count and sum(rows for _, rows in together) + count > _ROUND_ROWS:
            yield together
            together = []
        if count:
            together.append((expert, count))
    if together:
        yield together
