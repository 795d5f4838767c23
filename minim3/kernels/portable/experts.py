"""Grouped experts: assignments sorted by expert once, one product per active expert, nothing for idle ones.

T tokens, K choices a token, E experts, F their width. A custom gradient writes each expert's weight gradient in place
(indexing the stack under autograd would allocate the whole stack once per expert).
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from minim3.kernels.portable.swiglu import SwigluGradient, scaled_swiglu_oai_, swiglu_oai_
from minim3.kernels.sequences import at_least_fp32

_DECODE_TOKENS = 4
"""Up to this many tokens experts are applied as matrix-vector products, without sorting."""

FEW_ROWS = 512
"""Up to this many rows (tokens times choices) those of all experts are activated at once."""

_PART_ROWS = 1024
"""Rows of an expert that are handled at once where gradients are wanted."""


def grouped_experts(
    x: Tensor, w13: Tensor, w2: Tensor, expert_ids: Tensor, expert_weights: Tensor, *, alpha: float, limit: float,
    beta: float = 1.0,
) -> Tensor:  # fmt: skip
    """See the reference."""
    dtype = at_least_fp32(x.dtype)
    wide, weights = x.to(dtype), expert_weights.to(dtype)
    activation = (alpha, limit, beta)
    if torch.is_grad_enabled() and any(t.requires_grad for t in (wide, w13, w2, weights)):
        return _GroupedExperts.apply(wide, w13, w2, expert_ids, weights, activation).to(x.dtype)
    if x.device.type == "cpu" and w13.dtype == w2.dtype == dtype and alpha:
        if x.shape[0] <= _DECODE_TOKENS:
            return _decode(wide, w13, w2, expert_ids, weights, activation).to(x.dtype)
        if expert_ids.numel() <= FEW_ROWS:
            out = torch.zeros_like(wide, memory_format=torch.contiguous_format)
            add_experts(
                out, wide, w13.transpose(1, 2).unbind(), w2.transpose(1, 2).unbind(), expert_ids, weights, activation
            )
            return out.to(x.dtype)
    token, inverse, slices = _sort_by_expert(expert_ids, w13.shape[0])
    hidden = wide.index_select(0, token)
    y = torch.empty_like(hidden)
    for expert, rows in slices:
        act = swiglu_oai_(torch.mm(hidden[rows], w13[expert].to(dtype).t()), *activation)
        torch.mm(act, w2[expert].to(dtype).t(), out=y[rows])
    return _combine(y, inverse, weights).to(x.dtype)


def add_experts(
    out: Tensor, x: Tensor, w13: Sequence[Tensor], w2: Sequence[Tensor], expert_ids: Tensor, weights: Tensor,
    activation: tuple[float, float, float],
) -> None:  # fmt: skip
    """Add to `out` `[T, hidden]` what `grouped_experts` gives, for few rows: two products an active expert, no more.

    w13 `[hidden, 2F]` and w2 `[F, hidden]` of every expert: the transposed views of its weights.
    """
    chosen: list[int] = expert_ids.flatten().tolist()
    order = sorted(range(len(chosen)), key=chosen.__getitem__)
    top_k = expert_ids.shape[1]
    inverse = [0] * len(order)
    for place, row in enumerate(order):
        inverse[row] = place
    active, counts = list[int](), list[int]()
    for row in order:
        if active and active[-1] == chosen[row]:
            counts[-1] += 1
        else:
            active.append(chosen[row])
            counts.append(1)
    token, places = torch.tensor([*[row // top_k for row in order], *inverse]).view(2, -1)
    gate_up, y = x.new_empty(len(order), w13[0].shape[1]), x.new_empty(len(order), x.shape[1])
    for expert, rows, result in zip(active, x.index_select(0, token).split(counts), gate_up.split(counts)):
        torch.mm(rows, w13[expert], out=result)
    act = scaled_swiglu_oai_(gate_up, *activation)
    for expert, rows, result in zip(active, act.split(counts), y.split(counts)):
        torch.mm(rows, w2[expert], out=result)
    y = y.index_select(0, places).view(*weights.shape, -1)
    # The slope that the activation left in is divided out of the weights.
    out.unsqueeze(1).baddbmm_(weights.unsqueeze(1), y, alpha=1.0 / activation[0])


def _sort_by_expert(expert_ids: Tensor, num_experts: int) -> tuple[Tensor, Tensor, list[tuple[int, slice]]]:
    """(token of each sorted assignment, sorted place of each assignment, (expert, its rows) of every active expert)."""
    flat = expert_ids.reshape(-1)
    order = torch.sort(flat, stable=True).indices
    inverse = torch.empty_like(order)
    inverse[order] = torch.arange(order.shape[0], device=order.device)
    slices, start = [], 0
    for expert, count in enumerate(torch.bincount(flat, minlength=num_experts).tolist()):
        if count:
            slices.append((expert, slice(start, start + count)))
            start += count
    return order // expert_ids.shape[1], inverse, slices


def _combine(y: Tensor, inverse: Tensor, weights: Tensor) -> Tensor:
    """Sorted expert outputs `[T * K, hidden]` -> weighted sums `[T, hidden]`, in a fixed order of choices."""
    y = y.index_select(0, inverse).view(*weights.shape, y.shape[-1])
    return torch.bmm(weights.unsqueeze(1), y).squeeze(1)


def _decode(
    x: Tensor, w13: Tensor, w2: Tensor, expert_ids: Tensor, weights: Tensor, activation: tuple[float, float, float]
) -> Tensor:
    ids: list[list[int]] = expert_ids.tolist()
    width = w13.shape[1]
    gate_up = x.new_empty(expert_ids.numel(), width)
    rows = iter(gate_up.unbind())
    for token, experts in zip(x.unbind(), ids):
        for expert in experts:
            torch.mv(w13[expert], token, out=next(rows))
    act = scaled_swiglu_oai_(gate_up, *activation).mul_(weights.reshape(-1, 1) / activation[0])
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    parts = iter(act.unbind())
    for result, experts in zip(out.unbind(), ids):
        for choice, expert in enumerate(experts):
            # beta=0 overwrites: what the fresh buffer holds is never read.
            torch.addmv(result, w2[expert], next(parts), beta=1.0 if choice else 0.0, out=result)
    return out


class _GroupedExperts(torch.autograd.Function):
    """Some rows of one expert at a time, whose products and activations stay in a core's own cache."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, w13: Tensor, w2: Tensor, expert_ids: Tensor, weights: Tensor,
        activation: tuple[float, float, float],
    ) -> Tensor:  # fmt: skip
        token, inverse, slices = _sort_by_expert(expert_ids, w13.shape[0])
        weight = torch.empty_like(weights.view(-1)).index_copy_(0, inverse, weights.reshape(-1)).unsqueeze(1)
        gate_up = x.new_empty(token.shape[0], w13.shape[1])
        out = torch.zeros_like(x, memory_format=torch.contiguous_format)
        for expert, rows in _parts(slices):
            torch.mm(x.index_select(0, token[rows]), w13[expert].to(x.dtype).t(), out=gate_up[rows])
            act = swiglu_oai_(gate_up[rows].clone(), *activation).mul_(weight[rows])
            # Tokens are distinct within an expert, so that sums have one order.
            out.index_add_(0, token[rows], act @ w2[expert].to(x.dtype).t())
        ctx.save_for_backward(x, w13, w2, weight, token, inverse, gate_up)
        ctx.slices, ctx.activation = slices, activation
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, w13, w2, weight, token, inverse, gate_up = ctx.saved_tensors
        needs_x, needs_w13, needs_w2, _, needs_weights, _ = ctx.needs_input_grad
        grad = grad.contiguous()
        grad_x = torch.zeros_like(x, memory_format=torch.contiguous_format) if needs_x else None
        grad_w13 = torch.zeros_like(w13) if needs_w13 else None
        grad_w2 = torch.zeros_like(w2) if needs_w2 else None
        grad_weight = torch.empty_like(weight) if needs_weights else None
        for expert, rows in _parts(ctx.slices):
            tokens = token[rows]
            grad_y = grad.index_select(0, tokens)
            grad_act = grad_y @ w2[expert].to(x.dtype)
            swiglu = SwigluGradient(*gate_up[rows].chunk(2, dim=-1), *ctx.activation)
            if grad_weight is not None:
                # <w2 act, grad> needs no second product: it is <act, w2^T grad>.
                torch.sum(swiglu.act * grad_act, -1, keepdim=True, out=grad_weight[rows])
            if grad_w2 is not None:
                _add_product(grad_w2[expert], grad_y.t(), swiglu.act.mul_(weight[rows]))
            if grad_w13 is None and grad_x is None:
                continue
            grad_gate_up = torch.empty_like(gate_up[rows])
            swiglu.backward(grad_act.mul_(weight[rows]), *grad_gate_up.chunk(2, dim=-1))
            if grad_w13 is not None:
                _add_product(grad_w13[expert], grad_gate_up.t(), x.index_select(0, tokens))
            if grad_x is not None:
                grad_x.index_add_(0, tokens, grad_gate_up @ w13[expert].to(x.dtype))
        if grad_weight is not None:
            grad_weight = grad_weight.view(-1).index_select(0, inverse).view(-1, inverse.shape[0] // x.shape[0])
        return grad_x, grad_w13, grad_w2, None, grad_weight, None


def _parts(slices: Sequence[tuple[int, slice]]) -> Iterator[tuple[int, slice]]:
    """The rows of each expert, `_PART_ROWS` at a time."""
    for expert, rows in slices:
        for start in range(rows.start, rows.stop, _PART_ROWS):
            yield expert, slice(start, min(start + _PART_ROWS, rows.stop))


def _add_product(target: Tensor, a: Tensor, b: Tensor) -> None:
    if target.dtype == a.dtype:
        target.addmm_(a, b)
    else:
        target += a @ b
