"""Grouped experts: assignments sorted by expert, one product over all of them, idle experts untouched.

The number of programs depends on shapes alone; how many rows an expert has stays on the device. R = T * K sorted rows,
E experts of width F. The two halves of the first product meet in its epilogue, where SwiGLU-OAI is applied.
"""

# mypy: allow-untyped-defs

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from minim3.kernels.triton.keys import power_of_two, precision, row_offsets
from minim3.kernels.triton.routing import Sorted, sort_by_expert
from minim3.kernels.triton.swiglu import limited, swiglu_gradient


@triton.jit
def _gate_up_kernel(
    x, w13, gate_up, act, token_of, starts, tiles, alpha, limit, beta,
    HIDDEN: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, STEP: tl.constexpr,
    LIMITED: tl.constexpr, KEEP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """act `[R, F]` (and gate_up `[R, 2F]` if KEEP) of one tile of rows of one expert."""
    tile = tl.program_id(1)
    expert = tl.load(tiles + 2 * tile)
    if expert >= 0:
        first = tl.load(starts + expert) + tl.load(tiles + 2 * tile + 1)
        within = tl.arange(0, ROWS)
        used = first + within < tl.load(starts + expert + 1)
        token = tl.load(token_of + first + within, mask=used, other=0)
        column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
        wanted = column < WIDTH
        step = tl.arange(0, STEP)
        rows = x + row_offsets(token, HIDDEN)[:, None] + step[None, :]
        gate_w = w13 + row_offsets(expert, 2 * WIDTH * HIDDEN) + row_offsets(column, HIDDEN)[None, :] + step[:, None]
        gate = tl.zeros([ROWS, COLUMNS], tl.float32)
        up = tl.zeros([ROWS, COLUMNS], tl.float32)
        for k in tl.range(0, HIDDEN, STEP):
            inside = k + step < HIDDEN
            a = tl.load(rows + k, mask=used[:, None] & inside[None, :], other=0.0)
            mask = wanted[None, :] & inside[:, None]
            gate = tl.dot(a, tl.load(gate_w + k, mask=mask, other=0.0), gate, input_precision=PRECISION)
            up = tl.dot(a, tl.load(gate_w + WIDTH * HIDDEN + k, mask=mask, other=0.0), up, input_precision=PRECISION)
        mask = used[:, None] & wanted[None, :]
        if KEEP:
            target = gate_up + row_offsets(first + within, 2 * WIDTH)[:, None] + column[None, :]
            tl.store(target, gate.to(gate_up.dtype.element_ty), mask=mask)
            tl.store(target + WIDTH, up.to(gate_up.dtype.element_ty), mask=mask)
        if LIMITED:
            gate, up = limited(gate, up, limit)
        value = gate / (1.0 + tl.exp(-alpha * gate)) * (up + beta)
        tl.store(
            act + row_offsets(first + within, WIDTH)[:, None] + column[None, :], value.to(act.dtype.element_ty),
            mask=mask,
        )  # fmt: skip


@triton.jit
def _product_kernel(
    a, w, c, row_of, starts, tiles, stride_w, stride_w_in, stride_w_out,
    INNER: tl.constexpr, OUTER: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, STEP: tl.constexpr,
    GATHER: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """c `[R, OUTER]` = rows of a (GATHER: those in row_of) times the expert's matrix `[INNER, OUTER]`, any strides."""
    tile = tl.program_id(1)
    expert = tl.load(tiles + 2 * tile)
    if expert >= 0:
        first = tl.load(starts + expert) + tl.load(tiles + 2 * tile + 1)
        within = tl.arange(0, ROWS)
        used = first + within < tl.load(starts + expert + 1)
        row = first + within
        if GATHER:
            row = tl.load(row_of + row, mask=used, other=0)
        column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
        wanted = column < OUTER
        step = tl.arange(0, STEP)
        rows = a + row_offsets(row, INNER)[:, None] + step[None, :]
        matrix = w + row_offsets(expert, stride_w) + row_offsets(column, stride_w_out)[None, :]
        acc = tl.zeros([ROWS, COLUMNS], tl.float32)
        for k in tl.range(0, INNER, STEP):
            inside = k + step < INNER
            left = tl.load(rows + k, mask=used[:, None] & inside[None, :], other=0.0)
            right = tl.load(
                matrix + row_offsets(k + step, stride_w_in)[:, None], mask=wanted[None, :] & inside[:, None], other=0.0
            )
            acc = tl.dot(left, right, acc, input_precision=PRECISION)
        tl.store(
            c + row_offsets(first + within, OUTER)[:, None] + column[None, :], acc.to(c.dtype.element_ty),
            mask=used[:, None] & wanted[None, :],
        )  # fmt: skip


@triton.jit
def _weight_kernel(
    a, b, grad, row_of_a, row_of_b, starts,
    ACROSS: tl.constexpr, DOWN: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, STEP: tl.constexpr,
    GATHER_A: tl.constexpr, GATHER_B: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """grad `[E, DOWN, ACROSS]` of one expert: its rows of a `[., DOWN]`, transposed, times those of b `[., ACROSS]`."""
    expert = tl.program_id(2)
    down = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    across = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    low = tl.load(starts + expert)
    high = tl.load(starts + expert + 1)
    step = tl.arange(0, STEP)
    acc = tl.zeros([ROWS, COLUMNS], tl.float32)
    for k in tl.range(0, (high - low).to(tl.int32), STEP):
        row = low + k + step
        used = row < high
        row_a = row
        row_b = row
        if GATHER_A:
            row_a = tl.load(row_of_a + row, mask=used, other=0)
        if GATHER_B:
            row_b = tl.load(row_of_b + row, mask=used, other=0)
        left = tl.load(
            a + row_offsets(row_a, DOWN)[None, :] + down[:, None],
            mask=used[None, :] & (down < DOWN)[:, None], other=0.0,
        )  # fmt: skip
        right = tl.load(
            b + row_offsets(row_b, ACROSS)[:, None] + across[None, :],
            mask=used[:, None] & (across < ACROSS)[None, :], other=0.0,
        )  # fmt: skip
        acc = tl.dot(left, right, acc, input_precision=PRECISION)
    tl.store(
        grad + row_offsets(expert, DOWN * ACROSS) + row_offsets(down, ACROSS)[:, None] + across[None, :],
        acc.to(grad.dtype.element_ty), mask=(down < DOWN)[:, None] & (across < ACROSS)[None, :],
    )  # fmt: skip


@triton.jit
def _activation_backward_kernel(
    gate_up, grad_act, weights, grad_gate_up, weighted, grad_weights, alpha, limit, beta,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, LIMITED: tl.constexpr,
):  # fmt: skip
    """One sorted row: gradients of gate and up, the activation times its weight, and the gradient of the weight."""
    row = tl.program_id(0)
    weight = tl.load(weights + row)
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, WIDTH, BLOCK):
        column = start + tl.arange(0, BLOCK)
        inside = column < WIDTH
        source = gate_up + row_offsets(row, 2 * WIDTH) + column
        raw_gate = tl.load(source, mask=inside, other=0.0).to(tl.float32)
        raw_up = tl.load(source + WIDTH, mask=inside, other=0.0).to(tl.float32)
        grad = tl.load(grad_act + row_offsets(row, WIDTH) + column, mask=inside, other=0.0).to(tl.float32)
        act, grad_gate, grad_up = swiglu_gradient(raw_gate, raw_up, grad * weight, alpha, limit, beta, LIMITED)
        # <w2 act, grad> needs no second product: it is <act, w2^T grad>.
        total += act * grad
        value = (act * weight).to(weighted.dtype.element_ty)
        tl.store(weighted + row_offsets(row, WIDTH) + column, value, mask=inside)
        target = grad_gate_up + row_offsets(row, 2 * WIDTH) + column
        tl.store(target, grad_gate.to(grad_gate_up.dtype.element_ty), mask=inside)
        tl.store(target + WIDTH, grad_up.to(grad_gate_up.dtype.element_ty), mask=inside)
    tl.store(grad_weights + row, tl.sum(total, 0))


@triton.jit
def _combine_kernel(
    y, inverse, weights, out, HIDDEN: tl.constexpr, CHOICES: tl.constexpr, BLOCK: tl.constexpr, WEIGHTED: tl.constexpr
):
    """One token: the sum of its sorted rows, in the order of its choices."""
    token = tl.program_id(0)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    for choice in range(CHOICES):
        row = tl.load(inverse + token * CHOICES + choice)
        value = tl.load(y + row_offsets(row, HIDDEN) + column, mask=column < HIDDEN, other=0.0).to(tl.float32)
        if WEIGHTED:
            value *= tl.load(weights + token * CHOICES + choice)
        total += value
    tl.store(out + row_offsets(token, HIDDEN) + column, total.to(out.dtype.element_ty), mask=column < HIDDEN)


def grouped_experts(
    x: Tensor, w13: Tensor, w2: Tensor, expert_ids: Tensor, expert_weights: Tensor, *, alpha: float, limit: float,
    beta: float = 1.0,
) -> Tensor:  # fmt: skip
    """See the reference. Products take the dtype of `x` and add up in fp32; activations are rounded to that dtype."""
    x, w13, w2 = x.contiguous(), w13.contiguous(), w2.contiguous()
    weights = expert_weights.float().contiguous()
    activation = (alpha, limit, beta)
    if torch.is_grad_enabled() and any(t.requires_grad for t in (x, w13, w2, weights)):
        return _GroupedExperts.apply(x, w13, w2, expert_ids, weights, activation)
    return _forward(x.detach(), w13.detach(), w2.detach(), expert_ids, weights.detach(), activation, False)[0]


def _forward(
    x: Tensor, w13: Tensor, w2: Tensor, expert_ids: Tensor, weights: Tensor, activation: tuple[float, float, float],
    keep: bool,
) -> tuple[Tensor, Sorted | None, Tensor | None]:  # fmt: skip
    out = torch.empty_like(x)
    if not expert_ids.numel():
        return out.zero_(), None, None
    hidden, width = x.shape[1], w2.shape[2]
    where = sort_by_expert(expert_ids, w13.shape[0])
    rows = expert_ids.numel()
    act = torch.empty(rows, width, dtype=x.dtype, device=x.device)
    gate_up = torch.empty(rows, 2 * width, dtype=x.dtype, device=x.device) if keep else act
    columns, step = min(64, power_of_two(max(width, 16))), _step(x, hidden)
    alpha, limit, beta = activation
    _gate_up_kernel[-(-width // columns), where.tiles.shape[0]](
        x, w13, gate_up, act, where.token, where.starts, where.tiles, float(alpha), float(limit), float(beta),
        HIDDEN=hidden, WIDTH=width, ROWS=where.rows, COLUMNS=columns, STEP=step, LIMITED=bool(limit), KEEP=keep,
        PRECISION=precision(x.dtype), num_warps=8 if where.rows == 128 else 4, num_stages=3,
    )  # fmt: skip
    y = _product(act, w2.transpose(1, 2), None, where)
    _combine(y, weights, where, out)
    return out, where, gate_up if keep else None


def _product(a: Tensor, w: Tensor, row_of: Tensor | None, where: Sorted) -> Tensor:
    """Sorted rows of `a` (or those that `row_of` names) times `w` `[E, INNER, OUTER]`, whatever its strides."""
    inner, outer = w.shape[1:]
    c = torch.empty(where.order.shape[0], outer, dtype=a.dtype, device=a.device)
    columns = min(128, power_of_two(max(outer, 16)))
    _product_kernel[-(-outer // columns), where.tiles.shape[0]](
        a, w, c, where.token if row_of is None else row_of, where.starts, where.tiles, *w.stride(), INNER=inner,
        OUTER=outer, ROWS=where.rows, COLUMNS=columns, STEP=_step(a, inner), GATHER=row_of is not None,
        PRECISION=precision(a.dtype), num_warps=8 if where.rows == 128 else 4, num_stages=3,
    )  # fmt: skip
    return c


def _weight_gradient(
    a: Tensor, b: Tensor, like: Tensor, rows_a: Tensor | None, rows_b: Tensor | None, where: Sorted
) -> Tensor:
    """`[E, DOWN, ACROSS]`: zero for idle experts."""
    grad = torch.empty_like(like)
    experts, down, across = like.shape
    rows, columns = min(64, power_of_two(max(down, 16))), min(128, power_of_two(max(across, 16)))
    _weight_kernel[-(-down // rows), -(-across // columns), experts](
        a, b, grad, where.token if rows_a is None else rows_a, where.token if rows_b is None else rows_b, where.starts,
        ACROSS=across, DOWN=down, ROWS=rows, COLUMNS=columns, STEP=32, GATHER_A=rows_a is not None,
        GATHER_B=rows_b is not None, PRECISION=precision(a.dtype), num_warps=4, num_stages=3,
    )  # fmt: skip
    return grad


def _combine(y: Tensor, weights: Tensor | None, where: Sorted, out: Tensor) -> None:
    tokens, hidden = out.shape
    block = min(1024, power_of_two(hidden))
    _combine_kernel[tokens, -(-hidden // block)](
        y, where.inverse, y if weights is None else weights, out, HIDDEN=hidden,
        CHOICES=where.inverse.shape[0] // tokens, BLOCK=block, WEIGHTED=weights is not None,
    )  # fmt: skip


def _step(x: Tensor, inner: int) -> int:
    return min(32 if x.dtype == torch.float32 else 64, power_of_two(max(inner, 16)))


class _GroupedExperts(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, w13: Tensor, w2: Tensor, expert_ids: Tensor, weights: Tensor,
        activation: tuple[float, float, float],
    ) -> Tensor:  # fmt: skip
        out, where, gate_up = _forward(x, w13, w2, expert_ids, weights, activation, True)
        ctx.where, ctx.activation = where, activation
        ctx.save_for_backward(x, w13, w2, weights, gate_up)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, w13, w2, weights, gate_up = ctx.saved_tensors
        where: Sorted | None = ctx.where
        if where is None:
            return tuple(map(torch.zeros_like, (x, w13, w2))) + (None, torch.zeros_like(weights), None)
        grad = grad.contiguous()
        needs = ctx.needs_input_grad
        width = w2.shape[2]
        grad_act = _product(grad, w2, where.token, where)
        sorted_weights = weights.flatten()[where.order]
        grad_gate_up, weighted = torch.empty_like(gate_up), torch.empty_like(grad_act)
        grad_rows = torch.empty_like(sorted_weights)
        alpha, limit, beta = ctx.activation
        _activation_backward_kernel[gate_up.shape[0],](
            gate_up, grad_act, sorted_weights, grad_gate_up, weighted, grad_rows, float(alpha), float(limit),
            float(beta), WIDTH=width, BLOCK=min(1024, power_of_two(width)), LIMITED=bool(limit),
        )  # fmt: skip
        grad_x = grad_w13 = grad_w2 = None
        if needs[0]:
            grad_x = torch.empty_like(x)
            _combine(_product(grad_gate_up, w13, None, where), None, where, grad_x)
        if needs[1]:
            grad_w13 = _weight_gradient(grad_gate_up, x, w13, None, where.token, where)
        if needs[2]:
            grad_w2 = _weight_gradient(grad, weighted, w2, where.token, None, where)
        grad_weights = grad_rows[where.inverse].view_as(weights) if needs[4] else None
        return grad_x, grad_w13, grad_w2, None, grad_weights, None
