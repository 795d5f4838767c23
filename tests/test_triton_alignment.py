"""The indexer's alignment loss in Triton, interpreted: value and gradient equal the reference."""

import pytest
import torch

from minim3 import kernels
from tests.interpreted import cumulative, interpreted, random_ids  # noqa: F401

SHAPES = {  # lengths of queries, of keys, heads, group, dim, index dim, block size, top-k
    "documents": ([20, 1, 12], [20, 1, 12], 2, 2, 16, 24, 16, 2),
    "continued": ([14], [75], 1, 4, 24, 16, 32, 2),
}


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("warm_up", [False, True])
@pytest.mark.parametrize("known", [False, True], ids=["alone", "after attention"])
def test_loss_and_gradient_equal_reference(
    name: str, known: bool, warm_up: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Teacher detached; lists of queries longer than a segment; index keys shared by the heads; the same bits twice."""
    from minim3.kernels.triton import lists

    monkeypatch.setattr(lists, "SEGMENT", 16)
    lengths_q, lengths_k, heads, group, dim, index_dim, block_size, topk = SHAPES[name]
    cu_q, cu_k = cumulative(lengths_q), cumulative(lengths_k)
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(*shape, generator=generator) for shape in (
        (cu_q[-1], heads * group, dim), (cu_k[-1], heads, dim), (cu_q[-1], heads, index_dim), (cu_k[-1], index_dim),
    )]  # fmt: skip
    ids = None if warm_up else random_ids(cu_q, cu_k, heads, block_size, topk)
    results = []
    run = {"scale": 0.4, "implementation": "reference"}
    q, k = inputs[:2]
    if warm_up:
        _, lse = kernels.varlen_attention(q, k, k, cu_q, cu_k, **run)
    else:
        _, lse = kernels.block_sparse_attention(q, k, k, ids, cu_q, cu_k, block_size=block_size, **run)
    for run["implementation"] in ("reference", "triton", "triton"):
        leaves = [x.clone().requires_grad_() for x in inputs]
        loss = kernels.indexer_kl(*leaves, ids, cu_q, cu_k, block_size=block_size, lse=lse if known else None, **run)
        (3 * loss).backward()
        assert [leaf.grad for leaf in leaves[:2]] == [None, None], "the teacher is detached"
        results.append((loss.detach(), leaves[2].grad, leaves[3].grad))
    for want, got, again in zip(*results):
        assert got.dtype == want.dtype
        assert (got - want).abs().max() <= 2e-5 * want.abs().max() + 1e-7
        assert torch.equal(got, again)


def test_nothing_is_read_that_no_query_sees() -> None:
    """Pitfall 17: NaN in keys behind the last query reaches neither loss nor gradient."""
    generator = torch.Generator().manual_seed(0)
    q, k, index_q, index_k = (
        torch.randn(*shape, generator=generator) for shape in ((9, 2, 16), (60, 1, 16), (9, 1, 16), (60, 16))
    )
    ids = random_ids([0, 9], [0, 30], 1, 16, 2)
    k[30:], index_k[30:] = float("nan"), float("nan")
    index_q.requires_grad_()
    index_k.requires_grad_()
    loss = kernels.indexer_kl(
        q, k, index_q, index_k, ids, [0, 9], [0, 60], q_offset=[21], block_size=16, implementation="triton"
    )
    loss.backward()
    want = kernels.indexer_kl(
        q, k[:30], index_q, index_k[:30], ids, [0, 9], [0, 30], block_size=16, implementation="reference"
    )
    assert torch.allclose(loss, want, rtol=1e-5)
    assert torch.isfinite(index_q.grad).all()
    assert torch.isfinite(index_k.grad).all()
    assert not index_k.grad[30:].any()


@pytest.mark.parametrize("which", range(4))
@pytest.mark.parametrize("warm_up", [False, True])
def test_nan_shows(which: int, warm_up: bool) -> None:
    """In queries or keys of teacher or student: a loss that hid it would train on what is spoilt."""
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(*shape, generator=generator) for shape in ((40, 2, 16), (40, 1, 16), (40, 1, 16), (40, 16))]
    inputs[which][20] = float("nan")
    q, k, index_q, index_k = inputs
    ids = None if warm_up else random_ids([0, 40], [0, 40], 1, 16, 3)
    if ids is None:
        _, lse = kernels.varlen_attention(q, k, k, [0, 40], [0, 40], implementation="triton")
    else:
        _, lse = kernels.block_sparse_attention(q, k, k, ids, [0, 40], [0, 40], block_size=16, implementation="triton")
    for known in (None, lse):
        loss = kernels.indexer_kl(
            q, k, index_q, index_k, ids, [0, 40], [0, 40], block_size=16, lse=known, implementation="triton"
        )
        assert loss.isnan()
