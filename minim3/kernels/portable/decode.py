"""One new token of one sequence over its pages: the inner loop of decoding, in as few operations as it takes.

Shapes: q `[1, Hq, D]`, at least fp32; pages `[P, Hkv, page, D]`; cache rows `[rows, tokens * D]` (`plan`). G is the
number of query heads that share a KV head.
"""

import torch
from torch import Tensor

from minim3.kernels.portable.plan import CacheRows, PagedPlan, Request
from minim3.kernels.sequences import at_least_fp32

_GATHERED_ELEMENTS = 1 << 18
"""Keys are gathered for as many heads at once as stay within this many elements a thread (1 MiB in fp32), so that the
product finds them in the second-level cache of the core that gathered them."""


def select_row(
    index_q: Tensor, index_k_pages: Tensor, plan: PagedPlan, r: Request, *, block_size: int, topk_blocks: int,
    init_blocks: int, local_blocks: int, score_type: str, scale: float,
) -> Tensor:  # fmt: skip
    """`select_blocks` where more blocks are visible than the budget takes: `[1, Hi, Di]` -> int32 `[1, Hi, topk]`.

    Forced blocks are not scored: only those between the first and the local ones compete for what is left of it.
    """
    current = (r.length - 1) // block_size
    first, stop = init_blocks, current + 1 - local_blocks
    keys = index_keys(index_k_pages, plan, r, stop * block_size, block_size)[first * block_size :]
    dtype = at_least_fp32(index_q.dtype)
    scores = torch.mm(index_q[0].to(dtype), keys.to(dtype).t()).view(-1, stop - first, block_size)
    best = scores.amax(-1).mul_(scale) if score_type == "max" else scores.mul_(scale).logsumexp(-1)
    # Stable: of equal scores the lower id comes first.
    order = best.sort(dim=-1, descending=True, stable=True).indices
    chosen = order[:, : topk_blocks - init_blocks - local_blocks].sort(-1).values
    # The local blocks are in their places already.
    ids = plan.once(
        ("forced", index_q.shape[1], block_size, topk_blocks, init_blocks, local_blocks),
        lambda: _forced_row(index_q, current, topk_blocks, init_blocks, local_blocks),
    ).clone()
    ids[0, :, first : topk_blocks - local_blocks] = chosen + first if first else chosen
    return ids


def _forced_row(index_q: Tensor, current: int, topk_blocks: int, init_blocks: int, local_blocks: int) -> Tensor:
    """int32 `[1, Hi, topk]` with the forced blocks in their places."""
    free = [-1] * (topk_blocks - init_blocks - local_blocks)
    ids = [*range(init_blocks), *free, *range(current + 1 - local_blocks, current + 1)]
    return torch.tensor(ids, dtype=torch.int32, device=index_q.device).repeat(1, index_q.shape[1], 1)


def index_keys(pages: Tensor, plan: PagedPlan, r: Request, num_keys: int, block_size: int) -> Tensor:
    """The first `num_keys` index keys of a sequence, `[num_keys, Di]`: a view where its pages follow each other."""
    page_size, dim = pages.shape[-2:]
    first_page = plan.first_page(r)
    if first_page is not None:
        return pages.view(-1, dim)[first_page * page_size : first_page * page_size + num_keys]
    cache = CacheRows.of(pages, block_size)
    found = plan.rows(r, cache)[0, : -(-num_keys // cache.tokens)]
    return cache.view(pages).index_select(0, found).view(-1, dim)[:num_keys]


def attend_dense(
    q: Tensor, k_pages: Tensor, v_pages: Tensor, plan: PagedPlan, r: Request, scale: float
) -> tuple[Tensor, Tensor]:
    """Attend all tokens of a sequence: (out `[1, Hq, D]`, lse `[1, Hq]`)."""
    first_page = plan.first_page(r)
    if first_page is not None:
        return attend_pages(q, k_pages, v_pages, first_page, r.length, scale)
    cache = CacheRows.of(k_pages, k_pages.shape[-2])
    return attend_rows(q, cache.view(k_pages), cache.view(v_pages), plan.rows(r, cache), r.length, scale, plan)


def attend_pages(
    q: Tensor, k_pages: Tensor, v_pages: Tensor, first_page: int, length: int, scale: float
) -> tuple[Tensor, Tensor]:
    """Attend `length` tokens in pages that follow each other, where they lie.

    Every page and head is a batch entry of the products. Past the end of the sequence scores are hidden and values
    left out, since a share of zero would not cancel a NaN.
    """
    heads, page_size, dim = k_pages.shape[1:]
    whole = (length - 1) // page_size
    last, tail = first_page + whole, length - whole * page_size
    grouped = (q * scale).view(heads, -1, dim)
    last_values = v_pages[last, :, :tail].to(q.dtype)
    if not whole:
        return _attend(grouped, k_pages[last, :, :tail].to(q.dtype), last_values, q)
    keys = k_pages[first_page : last + 1].view(-1, page_size, dim).to(q.dtype)
    queries = grouped.expand(whole + 1, -1, -1, -1).reshape(keys.shape[0], -1, dim)
    scores = torch.bmm(queries, keys.transpose(1, 2)).view(whole + 1, heads, -1, page_size)
    scores[whole, :, :, tail:] = -torch.inf
    largest = scores.amax((0, 3)).unsqueeze(-1)
    shares = scores.sub_(largest).exp_()
    total = shares.sum((0, 3)).unsqueeze(-1)
    values = v_pages[first_page:last].view(-1, page_size, dim).to(q.dtype)
    out = torch.bmm(shares[:whole].view(values.shape[0], -1, page_size), values).view(whole, *grouped.shape).sum(0)
    out = torch.baddbmm(out, shares[whole, :, :, :tail], last_values).div_(total)
    return out.view(q.shape), largest.add_(total.log_()).view(q.shape[:2])


def _attend(grouped: Tensor, keys: Tensor, values: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
    """Scaled queries `[Hkv, G, D]` against keys and values `[Hkv, s, D]`; the results are shaped for `q`."""
    scores = torch.bmm(grouped, keys.transpose(1, 2))
    shares = scores.softmax(-1)
    return torch.bmm(shares, values).view(q.shape), _lse(scores, shares).view(q.shape[:2])


def _lse(scores: Tensor, shares: Tensor) -> Tensor:
    """From scores and their softmax: the largest share is exp(largest score - lse)."""
    return scores.amax(-1) - shares.amax(-1).log()


def attend_rows(
    q: Tensor, k_rows: Tensor, v_rows: Tensor, found: Tensor, length: int, scale: float, plan: PagedPlan
) -> tuple[Tensor, Tensor]:
    """Attend the first `length` tokens of the cache rows `found` `[Hkv, n]`, gathered a few heads at a time."""
    heads, num_rows = found.shape
    dim, width = q.shape[-1], k_rows.shape[1]
    together = max(1, min(heads, _GATHERED_ELEMENTS * torch.get_num_threads() // (num_rows * width)))
    while heads % together:
        together -= 1
    places = found.view(heads // together, -1).unbind()
    gathered = plan.scratch(together * num_rows * width, k_rows).view(-1, width)
    tokens = gathered.view(together, -1, dim)[:, :length]
    grouped = (q * scale).view(heads, -1, dim)
    scores = grouped.new_empty(*grouped.shape[:2], length)
    for place, query, score in zip(places, grouped.split(together), scores.split(together)):
        torch.index_select(k_rows, 0, place, out=gathered)
        torch.bmm(query, tokens.to(q.dtype).transpose(1, 2), out=score)
    shares = scores.softmax(-1)
    out = torch.empty_like(grouped)
    for place, share, part in zip(places, shares.split(together), out.split(together)):
        torch.index_select(v_rows, 0, place, out=gathered)
        torch.bmm(share, tokens.to(q.dtype), out=part)
    return out.view(q.shape), _lse(scores, shares).view(q.shape[:2])
