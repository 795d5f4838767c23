"""Attention of one rectangle or causal square, with its log-sum-exp: the building block of everything here.

Shapes: q, out `[B, Hq, L, D]`, k, v `[B, Hkv, S, D]`, lse `[B, Hq, L]`, at least fp32; Hq a multiple of Hkv.
Results over disjoint sets of keys merge exactly through the log-sum-exp, and the backward of a part needs only the
final output and log-sum-exp of its rows (Dao et al., FlashAttention, arXiv 2205.14135).
"""

import torch
from torch import Tensor

_PLAIN_SCORES = 1 << 24
"""Scores held at once by the plain form (64 MiB in fp32)."""


def attend(q: Tensor, k: Tensor, v: Tensor, *, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    """(out, lse) of softmax attention; `causal` needs L == S."""
    if q.device.type == "cpu":
        q, k, v = map(_dense_rows, (q, k, v))
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal, scale=scale)
    return attend_plain(q, k, v, causal=causal, scale=scale)


def _dense_rows(x: Tensor) -> Tensor:
    """The fused operator takes any strides but of the last dimension, whose it does not look at."""
    return x if x.stride(-1) == 1 else x.contiguous()


def attend_backward(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *, causal: bool, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v over these keys, given the output and lse of the rows over all their keys.

    A row with lse = +inf takes no part: its probabilities are zero.
    """
    if q.device.type == "cpu":
        grad_out, q, k, v, out = map(_dense_rows, (grad_out, q, k, v, out))
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            grad_out, q, k, v, out, lse, 0.0, causal, scale=scale
        )
    return attend_backward_plain(grad_out, q, k, v, out, lse, causal=causal, scale=scale)


def merge(out: Tensor, lse: Tensor, other: Tensor, other_lse: Tensor) -> tuple[Tensor, Tensor]:
    """Combine the results of the same rows over disjoint keys; `out` is overwritten."""
    total = torch.logaddexp(lse, other_lse)
    return out.lerp_(other, (other_lse - total).exp_().unsqueeze(-1)), total


def attend_plain(q: Tensor, k: Tensor, v: Tensor, *, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    """`attend` in matrix products, a tile of query rows at a time: for devices without the fused operator."""
    q = _grouped(q, k.shape[1])
    outs, lses = [], []
    for rows in _row_tiles(q, k):
        scores = _scores(q, k, rows, causal, scale)
        lse = scores.logsumexp(-1)
        outs.append((scores - lse.unsqueeze(-1)).exp_() @ v.unsqueeze(2))
        lses.append(lse)
    return torch.cat(outs, dim=3).flatten(1, 2), torch.cat(lses, dim=3).flatten(1, 2)


def attend_backward_plain(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *, causal: bool, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """`attend_backward` in matrix products."""
    q, grad_out, out, lse = (_grouped(x, k.shape[1]) for x in (q, grad_out, out, lse))
    grad_q = torch.empty_like(q)
    grad_k, grad_v = torch.zeros_like(k), torch.zeros_like(v)
    for rows in _row_tiles(q, k):
        probability = (_scores(q, k, rows, causal, scale) - lse[:, :, :, rows, None]).exp_()
        grad_rows = grad_out[:, :, :, rows]
        grad_v += (probability.transpose(-1, -2) @ grad_rows).sum(2)
        delta = (grad_rows * out[:, :, :, rows]).sum(-1, keepdim=True)
        grad_scores = probability * (grad_rows @ v.unsqueeze(2).transpose(-1, -2) - delta) * scale
        grad_q[:, :, :, rows] = grad_scores @ k.unsqueeze(2)
        grad_k += (grad_scores.transpose(-1, -2) @ q[:, :, :, rows]).sum(2)
    return grad_q.flatten(1, 2), grad_k, grad_v


def _grouped(x: Tensor, kv_heads: int) -> Tensor:
    return x.unflatten(1, (kv_heads, x.shape[1] // kv_heads))


def _row_tiles(q: Tensor, k: Tensor) -> list[slice]:
    rows = q.shape[3]
    step = max(1, _PLAIN_SCORES // max(1, q.shape[0] * q.shape[1] * q.shape[2] * k.shape[2]))
    return [slice(start, min(start + step, rows)) for start in range(0, rows, step)]


def _scores(q: Tensor, k: Tensor, rows: slice, causal: bool, scale: float) -> Tensor:
    scores = (q[:, :, :, rows] @ k.unsqueeze(2).transpose(-1, -2)) * scale
    if not causal:
        return scores
    row = torch.arange(rows.start, rows.stop, device=q.device)
    return scores.masked_fill(torch.arange(k.shape[2], device=q.device) > row[:, None], float("-inf"))
