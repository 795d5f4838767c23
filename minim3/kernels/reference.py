"""The definition of every op: obvious, dense, slow, differentiable. Everything faster is tested against this file.

Shapes: T packed queries, S packed keys, N sequences, Hq / Hkv / Hi query, key-value and index heads (Hi = Hkv), D / Di
their dimensions, B blocks of `block_size` keys counted from the start of each sequence. All arithmetic is at least
fp32; results are cast back. The log-sum-exp an attention returns is a statistic: it carries no gradient.

Sources: the paper "MiniMax Sparse Attention" (arXiv 2606.13392).
"""

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from minim3.kernels.sequences import (
    Lengths,
    Span,
    as_ints,
    at_least_fp32,
    check_selection,
    query_positions,
    sequence_spans,
    token_rows,
)

_NEG_INF = float("-inf")


def swiglu_oai(gate: Tensor, up: Tensor, alpha: float, limit: float, beta: float = 1.0) -> Tensor:
    """`g * sigmoid(alpha * g) * (u + beta)` with g = min(gate, limit), u = clamp(up, -limit, limit).

    Any shape; at least fp32 inside, the dtype of `gate` out. A limit of 0 means no clamp.
    """
    dtype = at_least_fp32(gate.dtype)
    g, u = gate.to(dtype), up.to(dtype)
    if limit:
        g, u = g.clamp(max=limit), u.clamp(-limit, limit)
    return (g * torch.sigmoid(alpha * g) * (u + beta)).to(gate.dtype)


# Selection


def select_blocks(
    index_q: Tensor, index_k: Tensor, cu_seqlens_q: Lengths, cu_seqlens_k: Lengths, *, q_offset: Lengths | None = None,
    block_size: int, topk_blocks: int, init_blocks: int = 0, local_blocks: int = 1, score_type: str = "max",
    scale: float | None = None,
) -> Tensor:  # fmt: skip
    """Blocks each query attends, per index head: `[T, Hi, Di]` x `[S, Di]` -> int32 `[T, Hi, topk_blocks]`.

    Ids count from the start of the sequence, ascend, and are followed by -1. A block's score is the maximum ("max") or
    the log-sum-exp ("lse") of its visible keys' scores. The first `init_blocks` and the last `local_blocks` (the
    query's own block included) are forced and count in the budget; ties go to the lower id.
    """
    check_selection(block_size, topk_blocks, init_blocks, local_blocks, score_type)
    scale = index_q.shape[-1] ** -0.5 if scale is None else scale
    dtype = at_least_fp32(index_q.dtype)
    spans = sequence_spans(
        cu_seqlens_q, cu_seqlens_k, q_offset, num_queries=index_q.shape[0], num_keys=index_k.shape[0]
    )
    out = torch.full((*index_q.shape[:2], topk_blocks), -1, dtype=torch.int32, device=index_q.device)
    for span in spans:
        if not span.num_queries:
            continue
        q = index_q[span.q_start : span.q_stop].detach().to(dtype)
        k = index_k[span.k_start : span.k_stop].detach().to(dtype)
        scores = torch.einsum("thd,sd->ths", q, k) * scale
        scores = scores.masked_fill(~_causal(span, q.device)[:, None], _NEG_INF)
        num_blocks = -(-span.num_keys // block_size)
        scores = F.pad(scores, (0, num_blocks * block_size - span.num_keys), value=_NEG_INF)
        scores = scores.unflatten(-1, (num_blocks, block_size))
        block_scores = scores.amax(-1) if score_type == "max" else scores.logsumexp(-1)

        block = torch.arange(num_blocks, device=q.device)
        current = query_positions([span], q.device)[:, None, None] // block_size
        block_scores = block_scores.masked_fill((block < init_blocks) | (block > current - local_blocks), float("inf"))
        block_scores = block_scores.masked_fill(block > current, _NEG_INF)
        # A stable sort keeps equal scores in ascending order of id; torch.topk promises no order.
        best = torch.sort(block_scores, dim=-1, descending=True, stable=True).indices[..., :topk_blocks]
        best = torch.where(best > current, num_blocks, best).sort(dim=-1).values
        best = torch.where(best == num_blocks, -1, best).int()
        out[span.q_start : span.q_stop, :, : best.shape[-1]] = best
    return out


def selected_keys_mask(block_indices: Tensor, num_keys: int, block_size: int) -> Tensor:
    """Block ids `[T, H, K]` (any order, -1 = none) of one sequence -> bool `[T, H, num_keys]`, True where selected."""
    num_blocks = -(-num_keys // block_size)
    ids = block_indices.long()
    ids = torch.where((ids < 0) | (ids >= num_blocks), num_blocks, ids)
    chosen = torch.zeros(*ids.shape[:2], num_blocks + 1, dtype=torch.bool, device=ids.device).scatter(-1, ids, True)
    return chosen[..., :num_blocks].repeat_interleave(block_size, dim=-1)[..., :num_keys]


def build_block_sparse_attn_bias(
    idx_q: Tensor, idx_k: Tensor, block_size: int, topk_blocks: int, init_blocks: int, local_blocks: int,
    num_q_heads: int, score_type: str = "max",
) -> Tensor:  # fmt: skip
    """The selection as a dense additive bias: `[B, T, H, D]`, `[B, T, 1, D]` -> `[B, num_q_heads, T, T]`, 0 or -inf.

    Zero where the key is causal and its block is selected; at least fp32, so that adding it to scores rounds nothing.
    """
    batch, tokens, heads, _ = idx_q.shape
    if num_q_heads % heads:
        raise ValueError(f"num_q_heads={num_q_heads} is not a multiple of the {heads} index heads")
    cu = [tokens * i for i in range(batch + 1)]
    ids = select_blocks(
        idx_q.flatten(0, 1), idx_k.reshape(batch * tokens, -1), cu, cu, block_size=block_size, topk_blocks=topk_blocks,
        init_blocks=init_blocks, local_blocks=local_blocks, score_type=score_type,
    )  # fmt: skip
    keep = selected_keys_mask(ids, tokens, block_size).unflatten(0, (batch, tokens)).transpose(1, 2)
    keep = keep & torch.ones(tokens, tokens, dtype=torch.bool, device=idx_q.device).tril()
    bias = torch.zeros(keep.shape, dtype=at_least_fp32(idx_q.dtype), device=idx_q.device).masked_fill(~keep, _NEG_INF)
    return bias.repeat_interleave(num_q_heads // heads, dim=1)


# Attention


def block_sparse_attention(
    q: Tensor, k: Tensor, v: Tensor, block_indices: Tensor, cu_seqlens_q: Lengths, cu_seqlens_k: Lengths, *,
    q_offset: Lengths | None = None, block_size: int, scale: float | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Exact softmax over the visible keys of the selected blocks.

    `q` `[T, Hq, D]`, `k`, `v` `[S, Hkv, D]`, `block_indices` `[T, Hkv, K]` (distinct, any order, -1 = none) ->
    (out `[T, Hq, D]`, log-sum-exp of the scaled scores `[T, Hq]`).
    """
    return _attention(q, k, v, block_indices, cu_seqlens_q, cu_seqlens_k, q_offset, block_size, True, scale)


def varlen_attention(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Lengths, cu_seqlens_k: Lengths, *,
    q_offset: Lengths | None = None, causal: bool = True, scale: float | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Dense grouped-query attention within each sequence: `[T, Hq, D]`, `[S, Hkv, D]` -> (`[T, Hq, D]`, `[T, Hq]`)."""
    return _attention(q, k, v, None, cu_seqlens_q, cu_seqlens_k, q_offset, 1, causal, scale)


def _attention(
    q: Tensor, k: Tensor, v: Tensor, block_indices: Tensor | None, cu_seqlens_q: Lengths, cu_seqlens_k: Lengths,
    q_offset: Lengths | None, block_size: int, causal: bool, scale: float | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    dtype = at_least_fp32(q.dtype)
    outs = [q.new_empty(0, *q.shape[1:])]
    lses = [q.new_empty(0, q.shape[1], dtype=dtype)]
    for span, keep in _visible(block_indices, cu_seqlens_q, cu_seqlens_k, q_offset, q, k, block_size, causal):
        queries = q[span.q_start : span.q_stop].to(dtype)
        keys, values = k[span.k_start : span.k_stop].to(dtype), v[span.k_start : span.k_stop].to(dtype)
        scores = _grouped_scores(queries, keys, scale).masked_fill(~keep[:, :, None], _NEG_INF)
        assert keep.any(-1).all(), "a query sees no key"
        out = torch.einsum("thgs,shd->thgd", scores.softmax(-1), values)
        outs.append(out.flatten(1, 2).to(q.dtype))
        lses.append(scores.detach().logsumexp(-1).flatten(1, 2))
    return torch.cat(outs), torch.cat(lses)


def _grouped_scores(q: Tensor, k: Tensor, scale: float) -> Tensor:
    """`[t, Hq, D]` x `[s, Hkv, D]` -> `[t, Hkv, G, s]`: query head h uses KV head `h // G`."""
    heads = k.shape[1]
    return torch.einsum("thgd,shd->thgs", q.unflatten(1, (heads, q.shape[1] // heads)), k) * scale


def _causal(span: Span, device: torch.device) -> Tensor:
    """bool `[t, s]`: key position at most query position."""
    return torch.arange(span.num_keys, device=device) <= query_positions([span], device)[:, None]


def _visible(
    block_indices: Tensor | None, cu_seqlens_q: Lengths, cu_seqlens_k: Lengths, q_offset: Lengths | None,
    q: Tensor, k: Tensor, block_size: int, causal: bool,
) -> Iterator[tuple[Span, Tensor]]:  # fmt: skip
    """Every non-empty sequence with its bool `[t, Hkv, s]` of keys that take part."""
    if not causal and q_offset is None:
        q_offset = [0] * (len(as_ints(cu_seqlens_q)) - 1)
    for span in sequence_spans(cu_seqlens_q, cu_seqlens_k, q_offset, num_queries=q.shape[0], num_keys=k.shape[0]):
        if not span.num_queries:
            continue
        shape = (span.num_queries, k.shape[1], span.num_keys)
        keep = torch.ones(shape, dtype=torch.bool, device=q.device)
        if causal:
            keep = keep & _causal(span, q.device)[:, None]
        if block_indices is not None:
            keep = keep & selected_keys_mask(block_indices[span.q_start : span.q_stop], span.num_keys, block_size)
        yield span, keep


# Paged forms: the pages of each sequence are gathered, then the packed definition applies


def gather_tokens(pages: Tensor, page_table: Tensor, lengths_k: Lengths) -> tuple[Tensor, list[int]]:
    """The cached tokens of all sequences, packed, and their cumulative lengths.

    Pages `[P, Hkv, page, D]` -> `[S, Hkv, D]`; index key pages `[P, page, Di]` -> `[S, Di]`. Unused places: not read.
    """
    page_size = pages.shape[-2]
    parts, cu = [], [0]
    for n, length in enumerate(as_ints(lengths_k)):
        positions = torch.arange(length, device=pages.device)
        page, offset = token_rows(positions, page_table[n], page_size)
        parts.append(pages[page, :, offset] if pages.dim() == 4 else pages[page, offset])
        cu.append(cu[-1] + length)
    return torch.cat(parts), cu


def select_blocks_paged(
    index_q: Tensor, index_k_pages: Tensor, page_table: Tensor, lengths_k: Lengths, cu_seqlens_q: Lengths, *,
    block_size: int, topk_blocks: int, init_blocks: int = 0, local_blocks: int = 1, score_type: str = "max",
    scale: float | None = None,
) -> Tensor:  # fmt: skip
    """`select_blocks` with the index keys in pages `[P, page, Di]`; `page_table` int64 `[N, max_pages]`."""
    index_k, cu_seqlens_k = gather_tokens(index_k_pages, page_table, lengths_k)
    return select_blocks(
        index_q, index_k, cu_seqlens_q, cu_seqlens_k, block_size=block_size, topk_blocks=topk_blocks,
        init_blocks=init_blocks, local_blocks=local_blocks, score_type=score_type, scale=scale,
    )  # fmt: skip


def block_sparse_attention_paged(
    q: Tensor, k_pages: Tensor, v_pages: Tensor, page_table: Tensor, lengths_k: Lengths, block_indices: Tensor,
    cu_seqlens_q: Lengths, *, block_size: int, scale: float | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`block_sparse_attention` with keys and values in pages `[P, Hkv, page, D]`; blocks are logical, not pages."""
    k, cu_seqlens_k = gather_tokens(k_pages, page_table, lengths_k)
    v, _ = gather_tokens(v_pages, page_table, lengths_k)
    return block_sparse_attention(
        q, k, v, block_indices, cu_seqlens_q, cu_seqlens_k, block_size=block_size, scale=scale
    )


def paged_attention(
    q: Tensor, k_pages: Tensor, v_pages: Tensor, page_table: Tensor, lengths_k: Lengths, cu_seqlens_q: Lengths, *,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Causal `varlen_attention` with keys and values in pages `[P, Hkv, page, D]`."""
    k, cu_seqlens_k = gather_tokens(k_pages, page_table, lengths_k)
    v, _ = gather_tokens(v_pages, page_table, lengths_k)
    return varlen_attention(q, k, v, cu_seqlens_q, cu_seqlens_k, scale=scale)


# Indexer alignment


def indexer_kl(
    q: Tensor, k: Tensor, index_q: Tensor, index_k: Tensor, block_indices: Tensor | None, cu_seqlens_q: Lengths,
    cu_seqlens_k: Lengths, *, q_offset: Lengths | None = None, block_size: int, scale: float | None = None,
    index_scale: float | None = None, lse: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """KL(teacher || student), mean over tokens and index heads: with gradient to `index_q`, `index_k` only.

    Student: softmax of one index head's scores (`[T, Hi, Di]`, `[S, Di]`). Teacher: the main branch's softmax
    (`[T, Hq, D]`, `[S, Hkv, D]`) averaged over the query heads of the group. Both over the visible keys of the selected
    blocks; over all visible keys where `block_indices` is None (warm-up).

    lse: `[T, Hq]`, what attention over the same keys with the same scale returned: the teacher's, which others than
    this need not find again.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    index_scale = index_q.shape[-1] ** -0.5 if index_scale is None else index_scale
    dtype = at_least_fp32(index_q.dtype)
    total = index_q.new_zeros((), dtype=dtype)
    for span, keep in _visible(block_indices, cu_seqlens_q, cu_seqlens_k, q_offset, q, k, block_size, True):
        with torch.no_grad():
            scores = _grouped_scores(
                q[span.q_start : span.q_stop].to(dtype), k[span.k_start : span.k_stop].to(dtype), scale
            )
            teacher = scores.masked_fill(~keep[:, :, None], _NEG_INF).softmax(-1).mean(2)
        index_scores = torch.einsum(
            "thd,sd->ths", index_q[span.q_start : span.q_stop].to(dtype), index_k[span.k_start : span.k_stop].to(dtype)
        )
        log_student = (index_scores * index_scale).masked_fill(~keep, _NEG_INF).log_softmax(-1).masked_fill(~keep, 0.0)
        total = total + (torch.xlogy(teacher, teacher) - teacher * log_student).sum()
    return total / max(index_q.shape[0] * index_q.shape[1], 1)


# Norm, rotation, store


def rms_norm(x: Tensor, scale: Tensor, *, eps: float) -> Tensor:
    """`x / rms(x) * scale` over the last dimension: `[..., D]`, `[D]` -> `[..., D]` in the dtype of `x`.

    At least fp32 inside; rms is the root of the mean of squares plus `eps` (Zhang and Sennrich, arXiv 1910.07467).
    """
    wide = x.to(at_least_fp32(x.dtype))
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps) * scale).to(x.dtype)


def norm_rope_store(
    x: Tensor, weight: Tensor | None, freqs_cis: Tensor, *, eps: float, pages: Tensor | None = None,
    slots: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Per-head norm, rotary positions on the first channels, and the write of the result to pages.

    `x` `[T, H, D]`; `weight` `[D]` or `[H, D]`, centred on 0 (None: no norm); `freqs_cis` `[T, R]` holds the cosines of
    the R / 2 angles, then their sines; channel i < R / 2 turns with channel i + R / 2, those from R on pass. Returns
    `[T, H, D]` in the dtype of `x`, computed in at least fp32. Where `pages` `[P, H, page, D]` (or `[P, page, D]` for
    one head) are given, token t is also written to place `slots[t]` = page * page size + offset, in their dtype.
    """
    check_store(x, pages, slots)
    half, dtype = freqs_cis.shape[-1] // 2, at_least_fp32(x.dtype)
    normed = x.to(dtype)
    if weight is not None:
        normed = normed * torch.rsqrt(normed.square().mean(-1, keepdim=True) + eps) * (1.0 + weight.to(dtype))
    turn = torch.complex(*freqs_cis.to(dtype).split(half, dim=-1)).unsqueeze(1)
    turned = torch.complex(normed[..., :half], normed[..., half : 2 * half]) * turn
    out = torch.cat([turned.real, turned.imag, normed[..., 2 * half :]], dim=-1).to(x.dtype)
    if pages is not None and slots is not None:
        for token, slot in enumerate(slots.tolist()):
            page, offset = divmod(slot, pages.shape[-2])
            pages[page, ..., offset, :] = out[token].detach().to(pages.dtype).view_as(pages[page, ..., offset, :])
    return out


def check_store(x: Tensor, pages: Tensor | None, slots: Tensor | None) -> None:
    """Raise `ValueError` for pages that cannot take the heads of `x`, or one slot too few or too many."""
    if (pages is None) != (slots is None):
        raise ValueError("pages and slots belong together; pass both, or neither to store nothing")
    if pages is None or slots is None:
        return
    heads = pages.shape[1] if pages.dim() == 4 else 1
    if (heads, pages.shape[-1]) != tuple(x.shape[1:]) or slots.shape != x.shape[:1]:
        raise ValueError(
            f"x {tuple(x.shape)} does not fit pages {tuple(pages.shape)} and slots {tuple(slots.shape)}: "
            "the same heads and channels, and one slot a token, are needed"
        )


# Experts


def grouped_experts(
    x: Tensor, w13: Tensor, w2: Tensor, expert_ids: Tensor, expert_weights: Tensor, *, alpha: float, limit: float,
    beta: float = 1.0,
) -> Tensor:  # fmt: skip
    """Sum over each token's K experts of weight * w2 @ swiglu_oai(gate, up): `[T, hidden]` -> `[T, hidden]`.

    `w13` `[E, 2F, hidden]` holds the gate rows, then the up rows; `w2` is `[E, hidden, F]`, ids and weights `[T, K]`.
    """
    dtype = at_least_fp32(x.dtype)
    out = torch.zeros(x.shape, dtype=dtype, device=x.device)
    for expert, (up_and_gate, down) in enumerate(zip(w13.unbind(), w2.unbind())):
        token, choice = torch.where(expert_ids == expert)
        if token.numel():
            gate, up = F.linear(x[token].to(dtype), up_and_gate.to(dtype)).chunk(2, dim=-1)
            y = F.linear(swiglu_oai(gate, up, alpha, limit, beta), down.to(dtype))
            out = out.index_add(0, token, y * expert_weights[token, choice].to(dtype)[:, None])
    return out.to(x.dtype)
