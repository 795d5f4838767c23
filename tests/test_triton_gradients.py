"""Packed attention and its gradient in Triton, interpreted: equal to the reference, bit-identical on repetition."""

import pytest
import torch
from torch import Tensor

from minim3 import kernels
from tests.interpreted import close, cumulative, interpreted, random_ids  # noqa: F401


def leaves_of(cu_q: list[int], cu_k: list[int], heads: int, group: int, dim: int, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = ((cu_q[-1], heads * group, dim), *[(cu_k[-1], heads, dim)] * 2)
    return [torch.randn(*shape, generator=generator) for shape in shapes]


def both(op: str, inputs: list[Tensor], *args, **kwargs) -> None:
    """Value, log-sum-exp and gradients of reference and Triton, and a repetition bit for bit."""
    results = []
    for implementation in ("reference", "triton", "triton"):
        leaves = [x.clone().requires_grad_() for x in inputs]
        out, lse = getattr(kernels, op)(*leaves, *args, implementation=implementation, **kwargs)
        weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=out.dtype)
        (out * weight).sum().backward()
        results.append([out.detach(), lse, *(leaf.grad for leaf in leaves)])
    for want, got, again in zip(*results):
        close(got, want, 2e-5)
        assert torch.equal(got, again)


SHAPES = {  # lengths of queries, of keys, KV heads, group, dim, block size, top-k
    "documents": ([33, 1, 20], [33, 1, 20], 2, 2, 24, 16, 2),
    "continued": ([30], [75], 1, 4, 16, 32, 2),
    "no shared heads": ([18, 5], [18, 40], 2, 1, 16, 16, 3),
}


@pytest.mark.parametrize("name", SHAPES)
def test_sparse_attention_equals_reference(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Any blocks in any order; lists of queries longer than a segment."""
    from minim3.kernels.triton import lists

    monkeypatch.setattr(lists, "SEGMENT", 16)
    lengths_q, lengths_k, heads, group, dim, block_size, topk = SHAPES[name]
    cu_q, cu_k = cumulative(lengths_q), cumulative(lengths_k)
    ids = random_ids(cu_q, cu_k, heads, block_size, topk)
    inputs = leaves_of(cu_q, cu_k, heads, group, dim)
    both("block_sparse_attention", inputs, ids, cu_q, cu_k, block_size=block_size)


@pytest.mark.parametrize("causal", [True, False])
def test_dense_attention_equals_reference(causal: bool) -> None:
    cu_q, cu_k = cumulative([21, 12]), cumulative([21, 70])
    both("varlen_attention", leaves_of(cu_q, cu_k, 1, 2, 16), cu_q, cu_k, causal=causal, scale=0.3)


def test_q_offset_limits_what_queries_see() -> None:
    """Queries in the middle of a sequence neither see later keys nor give them a gradient, whatever lies there."""
    q, k, v = leaves_of([0, 13], [0, 60], 2, 2, 16)
    ids = random_ids([0, 13], [0, 34], 2, 16, 2)
    run = {"block_size": 16, "implementation": "triton"}
    want = kernels.block_sparse_attention(q, k[:34], v[:34], ids, [0, 13], [0, 34], **run)
    k[34:], v[34:] = float("nan"), float("nan")
    leaves = [x.requires_grad_() for x in (q, k, v)]
    out, lse = kernels.block_sparse_attention(*leaves, ids, [0, 13], [0, 60], q_offset=[21], **run)
    assert torch.equal(out, want[0])
    assert torch.equal(lse, want[1])
    out.sum().backward()
    for x in (q, k, v):
        assert torch.isfinite(x.grad).all()
    assert not k.grad[34:].any()
    assert not v.grad[34:].any()


def test_pitfall_24_the_gradient_is_that_of_the_blocks_attended() -> None:
    """The ids of the forward pass are kept: what a caller does to its own later (or chooses again) changes nothing."""
    cu = [0, 40]
    inputs = leaves_of(cu, cu, 1, 2, 16)
    ids = random_ids(cu, cu, 1, 16, 2)
    grads = []
    for implementation in ("reference", "triton"):
        leaves = [x.clone().requires_grad_() for x in inputs]
        out, _ = kernels.block_sparse_attention(*leaves, ids, cu, cu, block_size=16, implementation=implementation)
        kernels.block_sparse_attention(*leaves, ids.flip(0), cu, cu, block_size=16, implementation="triton")
        out.square().sum().backward()
        grads.append([x.grad for x in leaves])
    for want, got in zip(*grads):
        close(got, want, 2e-5)


def test_pitfall_4_entries_of_lists_are_counted_in_64_bits() -> None:
    """Offsets into tables and parts are computed in int64, which sizes past 2**31 need (tests/gpu has one)."""
    from minim3.kernels.triton import layout, lists

    cu = [0, 40, 90]
    q = torch.empty(90, 2, 16)
    where = layout.packed_layout(cu, cu, None, q, q)
    found = lists.sparse_lists(random_ids(cu, cu, 2, 16, 2), where, 16)
    assert where.table.dtype == found.starts.dtype == found.counts.dtype == found.first_segments.dtype == torch.int64


def test_lists_hold_every_choice_once_and_in_order() -> None:
    from minim3.kernels.triton import layout, lists

    cu = [0, 40, 90]
    q = torch.empty(90, 2, 16)
    ids = random_ids(cu, cu, 2, 16, 3)
    found = lists.sparse_lists(ids, layout.packed_layout(cu, cu, None, q, q), 16)
    assert found.tokens is not None
    blocks = found.blocks.tolist()
    for which, (start, count) in enumerate(zip(found.starts.tolist(), found.counts.tolist())):
        head, (sequence, first_key) = which // len(blocks), blocks[which % len(blocks)]
        chosen = (ids[cu[sequence] : cu[sequence + 1], head] == first_key // 16).any(-1)
        want = chosen.nonzero().flatten() + cu[sequence]
        assert found.tokens[start : start + count].tolist() == want.tolist()


def test_strided_views_and_half_precision() -> None:
    """q, k, v as views of one packed projection, in fp16, with a gradient that is no contiguous tensor either."""
    cu = [0, 34]
    wide = torch.randn(34, 8, 16, generator=torch.Generator().manual_seed(0)).half().requires_grad_()
    q, k, v = wide.split([4, 2, 2], dim=1)
    ids = random_ids(cu, cu, 2, 16, 2)
    out, _ = kernels.block_sparse_attention(q, k, v, ids, cu, cu, block_size=16, implementation="triton")
    weight = torch.randn(16, 4, 34, generator=torch.Generator().manual_seed(1)).permute(2, 1, 0)
    out.backward(weight.half())
    exact = wide.detach().float().requires_grad_()
    want, _ = kernels.block_sparse_attention(
        *exact.split([4, 2, 2], dim=1), ids, cu, cu, block_size=16, implementation="reference"
    )
    want.backward(weight.half().float())
    close(out.float(), want.detach(), 2e-3)
    close(wide.grad.float(), exact.grad, 4e-3)
