"""Pieces of a sequence as calls of the fused operator, merged through their log-sum-exps.

For dense pieces, and for sparse ones with scores too large for `products`. q, out `[R, Hq, D]` and lse `[R, Hq]` hold
the rows of the piece; k, v `[S, Hkv, D]` the keys of its sequence.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from minim3.kernels.portable.flash import attend, attend_backward, merge
from minim3.kernels.portable.products import Choice, take
from minim3.kernels.sequences import Span

_COPIED_ROWS = 256
"""Queries that read keys often enough to pay for a copy."""


def dense_forward(
    q: Tensor, k: Tensor, v: Tensor, span: Span, causal: bool, scale: float, out: Tensor, lse: Tensor
) -> None:
    """Fill `out` and `lse`: a causal square, and the keys before it as a rectangle."""
    result: tuple[Tensor, Tensor] | None = None
    q, k, v = _in_blocks(q), _in_blocks(k), _in_blocks(v)
    if span.num_queries >= _COPIED_ROWS:
        # The rows of a head lie a power of two apart and share a few places of a core's cache; copied, they do not.
        q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
    for keys, square in _dense_parts(span, causal):
        part = attend(q, k[:, :, keys], v[:, :, keys], causal=square, scale=scale)
        result = part if result is None else merge(*result, *part)
    assert result is not None
    out.copy_(result[0][0].transpose(0, 1))
    lse.copy_(result[1][0].transpose(0, 1))


def dense_backward(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, span: Span, causal: bool, scale: float,
    grad_q: Tensor, grad_k: Tensor, grad_v: Tensor,
) -> None:  # fmt: skip
    """Add the gradients of a dense piece."""
    for keys, square in _dense_parts(span, causal):
        grads = attend_backward(
            *(_in_blocks(x) for x in (grad_out, q, k[keys], v[keys], out, lse)), causal=square, scale=scale
        )
        for target, grad in zip((grad_q, grad_k[keys], grad_v[keys]), grads):
            target += grad[0].transpose(0, 1)


def _dense_parts(span: Span, causal: bool) -> Iterator[tuple[slice, bool]]:
    """(keys, causal) of the rectangles that make up a dense piece."""
    if not causal:
        yield slice(0, span.num_keys), False
    elif span.num_queries == 1:
        yield slice(0, span.offset + 1), False
    else:
        yield slice(span.offset, span.offset + span.num_queries), True
        if span.offset:
            yield slice(0, span.offset), False


def sparse_forward(q: Tensor, k: Tensor, v: Tensor, choice: Choice, scale: float, out: Tensor, lse: Tensor) -> None:
    """Fill `out` and `lse` of rows of one KV head (Hkv = 1) that chose blocks."""
    block_size = choice.block_size
    for rows, keys, blocks in _local_parts(choice.offset, q.shape[0], block_size):
        out[rows], lse[rows] = _local_attend(q[rows], k[keys], v[keys], blocks, scale)
    if choice.without_own is not None:
        lse.masked_fill_(choice.without_own[:, None], float("-inf"))
    q, result, result_lse = (x.contiguous() for x in (q, out, lse))
    for chosen, keys, values in zip(choice.rows_by_block, k.split(block_size), v.split(block_size)):
        if isinstance(chosen, Tensor) and not chosen.shape[0]:
            continue
        gathered = take(q, chosen).view(1, 1, -1, q.shape[2])
        part = attend(gathered, _in_blocks(keys), _in_blocks(values), causal=False, scale=scale)
        old = take(result, chosen).view_as(gathered), take(result_lse, chosen).view(1, 1, -1)
        new, new_lse = merge(*old, *part)
        if isinstance(chosen, Tensor):  # a run was merged where it lies
            result[chosen] = new.view(-1, *result.shape[1:])
        result_lse[chosen] = new_lse.view(-1, result_lse.shape[1])
    assert not bool(torch.isneginf(result_lse).any()), "a query sees no key"
    out.copy_(result)
    lse.copy_(result_lse)


def _local_parts(offset: int, num_rows: int, block_size: int) -> Iterator[tuple[slice, slice, int]]:
    """(rows, key rows, number of blocks): whole blocks as one batch, ragged ends one at a time.

    The keys start at the block of the first row, so a ragged first block has more keys than rows.
    """
    row, position, end = 0, offset, offset + num_rows
    while position < end:
        block_start = position // block_size * block_size
        whole = (end - position) // block_size if position == block_start else 0
        stop = position + whole * block_size if whole else min(block_start + block_size, end)
        yield slice(row, row + stop - position), slice(block_start, stop), max(whole, 1)
        row, position = row + stop - position, stop


def _local_attend(q: Tensor, k: Tensor, v: Tensor, blocks: int, scale: float) -> tuple[Tensor, Tensor]:
    """Rows against the keys of their own blocks."""
    before = k.shape[0] - q.shape[0]
    square = attend(*(_in_blocks(x, blocks) for x in (q, k[before:], v[before:])), causal=True, scale=scale)
    if before:
        past = attend(*(_in_blocks(x) for x in (q, k[:before], v[:before])), causal=False, scale=scale)
        square = merge(*square, *past)
    return square[0].transpose(1, 2).flatten(0, 1), square[1].transpose(1, 2).flatten(0, 1)


def _in_blocks(x: Tensor, blocks: int = 1) -> Tensor:
    """`[blocks * L, H, ...]` -> `[blocks, H, L, ...]`."""
    return x.unflatten(0, (blocks, x.shape[0] // blocks)).transpose(1, 2)
