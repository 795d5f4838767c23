"""Selection in Triton, interpreted: exactly the reference's blocks, packed and paged, with groups of blocks or none."""

from itertools import pairwise
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minim3 import kernels
from tests.interpreted import cumulative, in_pages, interpreted  # noqa: F401


def indexer(cu_q: list[int], cu_k: list[int], heads: int, dim: int, ties: bool, seed: int = 0) -> tuple:
    generator = torch.Generator().manual_seed(seed)
    q = torch.randn(cu_q[-1], heads, dim, generator=generator)
    k = torch.randn(cu_k[-1], dim, generator=generator)
    # Whole numbers give many equal scores, and the same ones whatever the order of sums.
    return ((q.round(), k.round())) if ties else (q, k)


CASES = {
    "documents": ([33, 1, 70], [33, 1, 70], 2, 24),
    "continued": ([5, 40], [90, 61], 4, 16),
    "odd heads": ([20], [75], 3, 40),
}


@pytest.mark.parametrize("group", [None, 4])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(
    ("block_size", "topk", "init", "local", "score_type"),
    [(16, 3, 0, 1, "max"), (16, 4, 1, 2, "lse"), (32, 1, 0, 0, "max"), (16, 9, 0, 1, "max")],
)
def test_selection_equals_reference(
    case: str, block_size: int, topk: int, init: int, local: int, score_type: str, group: int | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    from minim3.kernels.triton import select

    monkeypatch.setattr(select, "_GROUP", group)
    lengths_q, lengths_k, heads, dim = CASES[case]
    cu_q, cu_k = cumulative(lengths_q), cumulative(lengths_k)
    q, k = indexer(cu_q, cu_k, heads, dim, ties=score_type == "max")
    run = {"block_size": block_size, "topk_blocks": topk, "init_blocks": init, "local_blocks": local,
           "score_type": score_type}  # fmt: skip
    want = kernels.select_blocks(q, k, cu_q, cu_k, implementation="reference", **run)
    got = kernels.select_blocks(q, k, cu_q, cu_k, implementation="triton", **run)
    assert got.dtype == torch.int32
    assert torch.equal(got, want)
    pages, table = in_pages(k, cu_k, 48 if block_size == 16 else 16)
    paged = kernels.select_blocks_paged(q, pages, table, lengths_k, cu_q, implementation="triton", **run)
    assert torch.equal(paged, want)


@settings(max_examples=30, deadline=None)
@given(
    st.integers(0, 999), st.sampled_from([1, 2, 4, 8]), st.integers(1, 4), st.booleans(), st.booleans(),
    st.sampled_from([1, 3, 5, 1024]), st.sampled_from([0, 1 << 20]),
)  # fmt: skip
def test_the_best_blocks_lie_in_the_best_groups(
    seed: int, group: int, topk: int, init: bool, local: bool, programs: int, few_rows: int
) -> None:
    """More groups than are chosen, equal scores, parts of the keys that groups do not divide, a program a row."""
    from minim3.kernels.triton import select

    count = 3 if few_rows else 9
    q, k = indexer([0, count], [0, 400], 2, 16, ties=True, seed=seed)
    run = {"block_size": 16, "topk_blocks": topk, "init_blocks": int(init and topk > 1), "local_blocks": int(local)}
    where = [0, count], [0, 400]
    want = kernels.select_blocks(q, k, *where, q_offset=[380 - 7 * (seed % 20)], implementation="reference", **run)
    with mock.patch.multiple(select, _GROUP=group, _PROGRAMS=programs, _FEW_ROWS=few_rows):
        got = kernels.select_blocks(q, k, *where, q_offset=[380 - 7 * (seed % 20)], implementation="triton", **run)
    assert torch.equal(got, want)


def test_pitfall_1_each_index_head_chooses_for_itself() -> None:
    """Head 1 asks for the opposite of head 0: a choice shared by the heads could not follow both."""
    q, k = indexer([0, 64], [0, 64], 1, 16, ties=True)
    q = torch.cat([q, -q], dim=1)
    run = {"block_size": 16, "topk_blocks": 2, "local_blocks": 0}
    got = kernels.select_blocks(q, k, [0, 64], [0, 64], implementation="triton", **run)
    assert torch.equal(got, kernels.select_blocks(q, k, [0, 64], [0, 64], implementation="reference", **run))
    assert not torch.equal(got[:, 0], got[:, 1])


def test_pitfall_5_heads_and_tokens_keep_their_places() -> None:
    """As many tokens as heads: `[T, H, K]` taken for `[H, T, K]` has the same shape and other values."""
    q, k = indexer([0, 4], [0, 90], 4, 16, ties=True, seed=3)
    run = {"block_size": 16, "topk_blocks": 3}
    got = kernels.select_blocks(q, k, [0, 4], [0, 90], implementation="triton", **run)
    want = kernels.select_blocks(q, k, [0, 4], [0, 90], implementation="reference", **run)
    assert not torch.equal(want, want.transpose(0, 1))
    assert torch.equal(got, want)


def test_pitfall_26_of_equal_blocks_the_lower_ids_win(monkeypatch: pytest.MonkeyPatch) -> None:
    """All scores equal: the answer is known. In groups too, and for tables of few tiles."""
    from minim3.kernels.triton import select

    q, k = torch.ones(6, 2, 16), torch.ones(160, 16)
    run = {"block_size": 16, "topk_blocks": 4, "implementation": "triton"}
    want = torch.tensor([0, 1, 2, 9], dtype=torch.int32).expand(6, 2, 4)
    assert torch.equal(kernels.select_blocks(q, k, [0, 6], [0, 160], **run), want)
    monkeypatch.setattr(select, "_GROUP", 4)
    assert torch.equal(kernels.select_blocks(q, k, [0, 6], [0, 160], **run), want)
    q, k = indexer([0, 70], [0, 160], 2, 16, ties=True)
    run["topk_blocks"] = 5
    want = kernels.select_blocks(q, k, [0, 70], [0, 160], block_size=16, topk_blocks=5, implementation="reference")
    assert torch.equal(kernels.select_blocks(q, k, [0, 70], [0, 160], **run), want)
    monkeypatch.setattr(select, "_TABLE_SCORES", 1)
    assert torch.equal(kernels.select_blocks(q, k, [0, 70], [0, 160], **run), want)


def test_pitfall_17_nothing_is_read_that_no_query_sees(monkeypatch: pytest.MonkeyPatch) -> None:
    """Later keys hold NaN, fresh memory the best scores of all: neither reaches a choice."""
    from minim3.kernels.triton import select

    empty = torch.empty
    monkeypatch.setattr(
        select.torch, "empty",
        lambda *shape, **like: empty(*shape, **like).fill_(2 if "int" in str(like["dtype"]) else 1e30),
    )  # fmt: skip
    monkeypatch.setattr(select, "_GROUP", 4)
    q, k = indexer([0, 30], [0, 120], 2, 16, ties=True)
    k[64:] = float("nan")
    run = {"block_size": 16, "topk_blocks": 3, "q_offset": [34], "implementation": "triton"}
    got = kernels.select_blocks(q, k, [0, 30], [0, 120], **run)
    want = kernels.select_blocks(
        q, k[:64], [0, 30], [0, 64], block_size=16, topk_blocks=3, implementation="reference"
    )
    assert torch.equal(got, want)


def test_pitfalls_6_and_7_blocks_are_logical() -> None:
    """Pages shuffled, and larger, smaller and no multiple of a block: the choice stays what it is."""
    lengths = [70, 45]
    cu_q, cu_k = cumulative([2, 1]), cumulative(lengths)
    q, k = indexer(cu_q, cu_k, 2, 16, ties=True)
    run = {"block_size": 16, "topk_blocks": 2}
    want = kernels.select_blocks(q, k, cu_q, cu_k, implementation="reference", **run)
    for seed, page_size in enumerate((16, 32, 8, 24)):
        pages, table = in_pages(k, cu_k, page_size, seed)
        got = kernels.select_blocks_paged(q, pages, table, lengths, cu_q, implementation="triton", **run)
        assert torch.equal(got, want)


def test_lengths_that_the_host_does_not_know() -> None:
    """Tables made on the device (as a CUDA graph needs them) lead to the same blocks."""
    from minim3.kernels.triton import layout, select

    lengths = [70, 0, 45]
    cu_q, cu_k = cumulative([2, 0, 5]), cumulative(lengths)
    q, k = indexer(cu_q, cu_k, 2, 16, ties=True)
    pages, table = in_pages(k, cu_k, 16)
    run = {"block_size": 16, "topk_blocks": 2, "init_blocks": 0, "local_blocks": 1, "score_type": "max", "scale": None}
    unknown = layout._of_device(table, torch.tensor(lengths), torch.tensor(cu_q), 16, 7)
    got = select._select(q, pages, table, unknown, **run)
    plan = kernels.DevicePlan(table, torch.tensor(lengths), torch.tensor(cu_q), 16)
    for _ in range(2):  # the second call takes the tables of the first
        where = q, pages, table, plan.lengths_k, plan.cu_seqlens_q
        again = kernels.select_blocks_paged(*where, block_size=16, topk_blocks=2, implementation="triton", plan=plan)
        assert torch.equal(again, got)
    with pytest.raises(ValueError, match="a DevicePlan is for Triton kernels"):
        kernels.select_blocks_paged(*where, block_size=16, topk_blocks=2, plan=plan)
    want = kernels.select_blocks_paged(q, pages, table, lengths, cu_q, implementation="reference", **run)
    assert torch.equal(got, want)


def test_log_sum_exp_of_all_keys() -> None:
    from minim3.kernels.triton import layout, select

    cu = [0, 33, 80]
    q, k = indexer(cu, cu, 2, 16, ties=False)
    got = select.index_log_sum_exp(q, k, layout.packed_layout(cu, cu, None, q, k), 16, 0.25)
    for a, b in pairwise(cu):
        scores = torch.einsum("thd,sd->ths", q[a:b], k[a:b]) * 0.25
        hidden = torch.ones(b - a, b - a, dtype=torch.bool).triu(1)[:, None]
        want = scores.masked_fill(hidden, float("-inf")).logsumexp(-1)
        assert torch.allclose(got[a:b], want, atol=1e-5)


def test_requests_that_cannot_be_met_say_why() -> None:
    q, k = torch.randn(8, 2, 16), torch.randn(8, 16)
    with pytest.raises(ValueError, match="block_size=24; supported are 16, 32, 64, 128"):
        kernels.select_blocks(q, k, [0, 8], [0, 8], block_size=24, topk_blocks=2, implementation="triton")
    with pytest.raises(ValueError, match="take float32, bfloat16, float16"):
        kernels.select_blocks(
            q.double(), k.double(), [0, 8], [0, 8], block_size=16, topk_blocks=2, implementation="triton"
        )
    with pytest.raises(ValueError, match=r"scale=-1\.0; it must be positive"):
        kernels.select_blocks(q, k, [0, 8], [0, 8], block_size=16, topk_blocks=2, scale=-1.0, implementation="triton")
