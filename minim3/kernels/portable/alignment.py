"""Indexer KL: the loss and its closed-form gradient in one pass, batched over short documents, tiled over long ones.

Documents whose queries chose blocks cost in proportion to the selected keys; warm-up, over all keys, is quadratic.
The gradient at a scaled index score is (student - teacher) / (tokens * heads), so it is computed with the loss and only
multiplied in the backward pass; no probabilities are kept. Shapes as in the reference; t rows, s keys of one piece.
"""

from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from minim3.kernels.portable import products
from minim3.kernels.portable.buckets import make_buckets, split_short
from minim3.kernels.portable.products import BlockKernels
from minim3.kernels.portable.threads import run_all
from minim3.kernels.sequences import Lengths, Span, at_least_fp32, query_positions, sequence_spans

_HIDDEN = -1e30
"""Added to the score of a key that takes no part: its probability is exactly zero."""


def indexer_kl(
    q: Tensor, k: Tensor, index_q: Tensor, index_k: Tensor, block_indices: Tensor | None, cu_seqlens_q: Lengths,
    cu_seqlens_k: Lengths, *, q_offset: Lengths | None = None, block_size: int, scale: float | None = None,
    index_scale: float | None = None, lse: Tensor | None = None, blocks: BlockKernels | None = None,
) -> Tensor:  # fmt: skip
    """See the reference. `blocks`: another way to compute what long documents do to blocks of keys."""
    spans = sequence_spans(cu_seqlens_q, cu_seqlens_k, q_offset, num_queries=q.shape[0], num_keys=k.shape[0])
    dtype = at_least_fp32(index_q.dtype)
    work = Work(
        spans, block_size, q.shape[-1] ** -0.5 if scale is None else scale,
        index_q.shape[-1] ** -0.5 if index_scale is None else index_scale, blocks,
    )  # fmt: skip
    q, k = q.detach().to(dtype), k.detach().to(dtype)
    lse = None if lse is None else lse.detach().to(dtype)
    return _IndexerKL.apply(q, k, index_q.to(dtype), index_k.to(dtype), block_indices, lse, work)


class Work(NamedTuple):
    spans: tuple[Span, ...]
    block_size: int
    scale: float
    index_scale: float
    blocks: BlockKernels | None


class _IndexerKL(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, index_q: Tensor, index_k: Tensor, ids: Tensor | None, lse: Tensor | None,
        work: Work,
    ) -> Tensor:  # fmt: skip
        wants_grad = any(ctx.needs_input_grad)
        loss, grad_q, grad_k = _loss_and_gradient(q, k, index_q, index_k, ids, lse, work, wants_grad)
        if wants_grad:
            ctx.save_for_backward(grad_q, grad_k)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        grad_q, grad_k = ctx.saved_tensors
        return None, None, grad_q * grad, grad_k * grad, None, None, None


def _loss_and_gradient(
    q: Tensor, k: Tensor, index_q: Tensor, index_k: Tensor, ids: Tensor | None, lse: Tensor | None, work: Work,
    wants_grad: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    rows = max(index_q.shape[0] * index_q.shape[1], 1)
    grad_q, grad_k = torch.zeros_like(index_q), torch.zeros_like(index_k)
    # Thousands of parts add up here; in fp32 the last ones would round off.
    loss = index_q.new_zeros((), dtype=torch.float64)
    dense, sparse = _split(ids, work, q.device)
    short, rest = split_short(dense, causal=True)
    if short:
        b = make_buckets(short, q.shape[0], k.shape[0], 0.125, str(q.device))
        padded = b.gather_q(q), b.gather_k(k), b.gather_q(index_q), b.gather_k(index_k)
        # Padded queries repeat a document's last token; they must count neither in the loss nor in the gradient.
        counts = torch.ones(b.padded_q.shape[0], dtype=index_q.dtype, device=q.device).index_fill_(0, b.filler, 0.0)
        parts_q, parts_k = [], []
        for bucket in b.buckets:
            batch = _Batch(*(x[bucket.rows].unflatten(0, (bucket.num_documents, bucket.length)) for x in padded))
            position = torch.arange(bucket.length, device=q.device)
            keep = (position <= position[:, None]).expand(1, 1, -1, -1)
            weight = counts[bucket.rows].view(bucket.num_documents, 1, bucket.length, 1)
            part, part_q, part_k = _piece(batch, keep, weight, work)
            loss = loss + part
            parts_q.append(part_q.flatten(0, 1))
            parts_k.append(part_k.flatten(0, 1))
        covered = torch.cat(parts_q).index_select(0, b.packed), torch.cat(parts_k).index_select(0, b.packed)
        grad_q = covered[0] if b.rows_q is None else grad_q.index_copy_(0, b.rows_q, covered[0])
        grad_k = covered[1] if b.rows_k is None else grad_k.index_copy_(0, b.rows_k, covered[1])
    for span, chosen in (*((span, None) for span in rest), *((span, ids) for span in sparse)):
        loss = loss + _long_piece(q, k, index_q, index_k, chosen, lse, span, work, grad_q, grad_k)
    if wants_grad:
        grad_q, grad_k = grad_q.div_(rows), grad_k.div_(rows)
    return (loss / rows).to(index_q.dtype), grad_q, grad_k


def _split(ids: Tensor | None, work: Work, device: torch.device) -> tuple[tuple[Span, ...], tuple[Span, ...]]:
    """(sequences whose queries all selected all of their blocks, the others)."""
    if ids is None:
        return work.spans, ()
    current = (query_positions(work.spans, device) // work.block_size)[:, None]
    complete = (((ids >= 0) & (ids <= current[:, None])).sum(-1) == current + 1).all(-1)
    dense: list[Span] = []
    sparse: list[Span] = []
    for span in work.spans:
        (dense if bool(complete[span.q_start : span.q_stop].all()) else sparse).append(span)
    return tuple(dense), tuple(sparse)


class _Batch(NamedTuple):
    """Pieces of equal size: q `[n, t, Hq, D]`, k `[n, s, Hkv, D]`, index q `[n, t, Hi, Di]`, index k `[n, s, Di]`."""

    q: Tensor
    k: Tensor
    index_q: Tensor
    index_k: Tensor


def _piece(batch: _Batch, keep: Tensor, weight: Tensor | None, work: Work) -> tuple[Tensor, Tensor, Tensor]:
    """Summed KL of a batch and the gradients of that sum: keep `[n|1, Hi|1, t, s]`, weight of a row `[n, 1, t, 1]`."""
    q, k, index_q, index_k = batch
    kv_heads = k.shape[2]
    grouped = q.unflatten(2, (kv_heads, -1)).permute(0, 2, 3, 1, 4)  # [n, Hkv, G, t, D]
    keys = k.permute(0, 2, 3, 1).unsqueeze(2)  # [n, Hkv, 1, D, s]
    # Masked scores get a finite bias that swallows them: exponentials of infinities take a slow path in vector
    # libraries, and 0 * -1e30 stays 0 where 0 * -inf is NaN. All of this is at least fp32.
    bias = torch.zeros(keep.shape, dtype=q.dtype, device=q.device).masked_fill_(~keep, _HIDDEN)
    scores = torch.matmul(grouped * work.scale, keys).add_(bias.unsqueeze(2))
    teacher = scores.softmax(-1).mean(2)  # [n, Hkv, t, s]
    index_queries = index_q.transpose(1, 2) * work.index_scale  # [n, Hi, t, Di]
    student_scores = torch.matmul(index_queries, index_k.transpose(1, 2).unsqueeze(1)).add_(bias)
    log_student, student = student_scores.log_softmax(-1), student_scores.softmax(-1)
    if weight is not None:
        teacher, student = teacher.mul_(weight), student.mul_(weight)
    log_ratio = teacher.clamp(min=torch.finfo(q.dtype).tiny).log_().sub_(log_student)
    loss = torch.dot(teacher.flatten(), log_ratio.flatten())
    difference = student.sub_(teacher)
    grad_q = torch.matmul(difference, index_k.unsqueeze(1)).mul_(work.index_scale).transpose(1, 2)
    # The heads share one key: their gradients add up in one product over (head, query).
    grad_k = torch.bmm(difference.flatten(1, 2).transpose(1, 2), index_queries.flatten(1, 2))
    return loss, grad_q, grad_k


# Long documents, over all or over selected keys, in two passes of products (see `products`)


def _long_piece(
    q: Tensor, k: Tensor, index_q: Tensor, index_k: Tensor, ids: Tensor | None, lse: Tensor | None, span: Span,
    work: Work, grad_q: Tensor, grad_k: Tensor,
) -> Tensor:  # fmt: skip
    """Summed KL of one sequence; fills its rows of `grad_q` and adds to `grad_k`. The packed tensors are whole."""
    seen = slice(span.k_start, span.k_start + span.offset + span.num_queries)
    keys, index_keys = products.extend(k[seen]), products.extend(index_k[seen, None])[0]
    grad_keys = grad_k.new_zeros(k.shape[1], *grad_k[seen].shape)  # the heads share these keys, and run side by side
    losses = index_q.new_zeros(k.shape[1], dtype=torch.float64)
    group, blocks = q.shape[1] // k.shape[1], work.blocks
    if blocks is not None and not all(blocks.any_keys(x.shape[-1], x.dtype) for x in (q, index_q)):
        blocks = None
    longest = torch.linalg.vector_norm(index_k[seen], dim=-1).amax()[None]

    def head(h: int, at: slice, choice: products.Choice) -> None:
        heads = slice(h * group, (h + 1) * group)
        main, index = _extended(q[at, heads], work.scale), _extended(index_q[at, h : h + 1], work.index_scale)
        own = index_k[span.k_start + choice.offset :][: index.shape[0]]
        if blocks is None or not _subtract_by_blocks(index, own, longest, index_keys, choice, blocks):
            _subtract_log_sum_exp(index, index_keys, choice)
        if lse is None:
            _subtract_log_sum_exp(main, keys[h], choice)
        else:
            torch.neg(lse[at, heads], out=main[..., -1])
        tile = _tile if blocks is None else partial(_tile_by_blocks, blocks)
        part, part_q = tile(main, index, keys[h], index_keys, choice, grad_keys[h])
        grad_q[at, h] = part_q.mul_(work.index_scale)
        losses[h] += part

    for tile in products.tiles(span):
        at = slice(tile.q_start, tile.q_stop)
        if ids is None:
            choices = [products.everything(tile)] * k.shape[1]
        else:
            choices = products.choices(ids[at], tile, work.block_size)
        run_all((partial(head, h, at, choice) for h, choice in enumerate(choices)), q.device)
    grad_k[seen] += grad_keys.sum(0)
    return losses.sum()


def _extended(rows: Tensor, scale: float) -> Tensor:
    """Queries `[R, G, D]` times `scale`, with a last channel of zeros: `[R, G, E]`."""
    extended = rows.new_zeros(*rows.shape[:2], rows.shape[2] + 1)
    torch.mul(rows, scale, out=extended[..., :-1])
    return extended


def _subtract_log_sum_exp(rows: Tensor, keys: Tensor, choice: products.Choice) -> None:
    """Set the last channel of `rows` so that their products with selected `keys` are log-probabilities."""
    num_rows, group, width = rows.shape
    flat = rows.view(num_rows, group * width)
    lse = rows.new_empty(num_rows, group)
    for part, seen, hidden in products.own_parts(choice, num_rows, rows.device):
        scores = torch.mm(rows[part].view(-1, width), keys[seen].t()).view(-1, group, hidden.shape[-1])
        lse[part] = scores.masked_fill_(hidden, float("-inf")).logsumexp(-1)
    for chosen, block_keys in products.chosen_parts(choice, group, keys):
        scores = torch.mm(products.take(flat, chosen).view(-1, width), block_keys.t())
        total = torch.logaddexp(products.take(lse, chosen), scores.logsumexp(-1).view(-1, group))
        lse[chosen] = total
    torch.neg(lse, out=rows[..., -1])


def _subtract_by_blocks(
    rows: Tensor, own: Tensor, longest: Tensor, keys: Tensor, choice: products.Choice, blocks: BlockKernels
) -> bool:
    """As `_subtract_log_sum_exp`, relative to scores with the `own` keys `[R, D]`; False where these are too small."""
    plain = rows[..., :-1]
    reference = products.references(plain, own[:, None], 1.0)
    if not all(products.within_reach(plain, reference, longest, 1.0)):
        return False
    torch.neg(reference, out=rows[..., -1])
    sums = torch.zeros_like(rows)  # of which the last channel alone is wanted
    for chosen, seen, shift in products.all_parts(choice, rows.shape[0]):
        done = blocks.add(rows, sums, chosen, keys[seen], keys[seen, :-1], shift)
        assert done, "a form for any keys"
    rows[..., -1] -= sums[..., -1].log_()
    return True


def _tile_by_blocks(
    blocks: BlockKernels, main: Tensor, index: Tensor, keys: Tensor, index_keys: Tensor, choice: products.Choice,
    grad_keys: Tensor,
) -> tuple[float, Tensor]:  # fmt: skip
    """As `_tile`."""
    loss, sums = 0.0, main.new_zeros(main.shape[0], index.shape[2] - 1)
    for chosen, seen, shift in products.all_parts(choice, main.shape[0]):
        loss += blocks.add_alignment(main, index, sums, chosen, keys[seen], index_keys[seen], grad_keys[seen], shift)
    return loss, sums


def _tile(
    main: Tensor, index: Tensor, keys: Tensor, index_keys: Tensor, choice: products.Choice, grad_keys: Tensor
) -> tuple[Tensor, Tensor]:
    """(summed KL, gradient at the scaled index queries `[R, Di]`) of a tile and one head; adds to `grad_keys`."""
    rows, group, width = main.shape
    flat_main, flat_index = main.view(rows, group * width), index.view(rows, -1)
    loss, grad = main.new_zeros((), dtype=torch.float64), main.new_empty(rows, index.shape[2] - 1)

    def part(main: Tensor, index: Tensor, hidden: Tensor | None, *by_key: Tensor) -> Tensor:
        """Rows against some keys: adds to the loss and the gradient of these keys, returns that of the rows."""
        some_keys, some_index_keys, grad_keys = by_key
        by_head = torch.mm(main.view(-1, width), some_keys.t()).exp_().view(-1, group, some_keys.shape[0]).unbind(1)
        teacher = sum(by_head[1:], by_head[0]).div(group)
        log_student = torch.mm(index, some_index_keys.t())
        if hidden is not None:
            teacher.masked_fill_(hidden, 0.0)
            log_student.masked_fill_(hidden, _HIDDEN)
        log_teacher = teacher.clamp(min=torch.finfo(teacher.dtype).tiny).log_()
        loss.add_(torch.dot(teacher.flatten(), log_teacher.sub_(log_student).flatten()))
        difference = log_student.exp_().sub_(teacher)
        grad_keys.addmm_(difference.t(), index[:, :-1])
        return torch.mm(difference, some_index_keys[:, :-1])

    for at, seen, hidden in products.own_parts(choice, rows, main.device):
        grad[at] = part(main[at], flat_index[at], hidden.squeeze(1), keys[seen], index_keys[seen], grad_keys[seen])
    for chosen, *block in products.chosen_parts(choice, group, keys, index_keys, grad_keys):
        rows_grad = part(products.take(flat_main, chosen), products.take(flat_index, chosen), None, *block)
        products.add_to(grad, chosen, rows_grad)
    return loss, grad
