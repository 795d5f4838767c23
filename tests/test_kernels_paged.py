"""Kernels over pages: equal to the packed reference whatever the physical order of pages and their unused places."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from minim3 import kernels

PROPERTY = settings(max_examples=40, deadline=None, derandomize=True)
NAN = float("nan")


class Cache:
    """Sequences laid out in randomly ordered pages of `page_size`; every place no token occupies holds NaN."""

    def __init__(self, lengths: list[int], page_size: int, heads: int, dim: int, seed: int, shuffle: bool = True):
        generator = torch.Generator().manual_seed(seed)
        self.lengths, self.page_size = lengths, page_size
        counts = [-(-n // page_size) for n in lengths]
        free = sum(counts) + 3
        order = torch.randperm(free, generator=generator) if shuffle else torch.arange(free)
        self.k = torch.randn(sum(lengths), heads, dim, generator=generator)
        self.v = torch.randn(sum(lengths), heads, dim, generator=generator)
        self.index_k = torch.randn(sum(lengths), dim, generator=generator)
        self.k_pages = torch.full((free, heads, page_size, dim), NAN)
        self.v_pages = self.k_pages.clone()
        self.index_k_pages = torch.full((free, page_size, dim), NAN)
        # A table has room to spare; entries past the last page name pages of others, or none.
        self.page_table = torch.full((len(lengths), max(counts) + 2), -1, dtype=torch.int64)
        token = 0
        for n, length in enumerate(lengths):
            pages = order[: counts[n]]
            order = order[counts[n] :]
            self.page_table[n, : counts[n]] = pages
            self.page_table[n, counts[n] + 1 :] = free - 1
            for position in range(length):
                page, offset = pages[position // page_size], position % page_size
                self.k_pages[page, :, offset] = self.k[token]
                self.v_pages[page, :, offset] = self.v[token]
                self.index_k_pages[page, offset] = self.index_k[token]
                token += 1

    @property
    def cu_seqlens_k(self) -> list[int]:
        return [0, *torch.tensor(self.lengths).cumsum(0).tolist()]


@st.composite
def requests(draw: st.DrawFn) -> tuple[Cache, list[int], int, dict]:
    """A cache, new tokens per sequence (decode, verification, chunks, or all at once), and a selection."""
    block_size = draw(st.sampled_from([4, 8]))
    page_size = draw(st.sampled_from([block_size, block_size, 2, 4, 6, 16]))
    lengths = draw(st.lists(st.integers(1, 70), min_size=1, max_size=4))
    kind = draw(st.sampled_from(["decode", "verify", "mixed", "chunk"]))
    if kind == "decode":
        counts = [1] * len(lengths)
    elif kind == "verify":
        counts = [min(3, n) for n in lengths]
    else:
        counts = [draw(st.integers(0 if kind == "mixed" else 1, n)) for n in lengths]
    if not sum(counts):
        counts = [1] * len(lengths)
    cache = Cache(lengths, page_size, 2, 8, draw(st.integers(0, 2**16)), draw(st.booleans()))
    init, local = draw(st.sampled_from([(0, 1), (1, 1), (0, 2), (0, 0), (1, 2)]))
    selection = {
        "block_size": block_size, "topk_blocks": draw(st.integers(max(init + local, 1), 4)), "init_blocks": init,
        "local_blocks": local, "score_type": draw(st.sampled_from(["max", "lse"])),
    }  # fmt: skip
    return cache, [0, *torch.tensor(counts).cumsum(0).tolist()], block_size, selection


def close(got: tuple[Tensor, Tensor], want: tuple[Tensor, Tensor]) -> None:
    for a, b in zip(got, want):
        assert a.shape == b.shape
        assert torch.isfinite(a).all(), "garbage from outside the sequence leaked"
        assert (a - b).abs().max() <= 1e-5 * b.abs().max().clamp(min=0.1)


def queries(cu_seqlens_q: list[int], heads: int, seed: int = 0) -> Tensor:
    return torch.randn(cu_seqlens_q[-1], heads, 8, generator=torch.Generator().manual_seed(seed))


@PROPERTY
@given(requests())
def test_paged_forms_equal_the_packed_reference(case: tuple[Cache, list[int], int, dict]) -> None:
    cache, cu_q, block_size, selection = case
    paged = (cache.page_table, cache.lengths)
    index_q, q = queries(cu_q, 2, 1), queries(cu_q, 4, 2)
    want_ids = kernels.select_blocks(
        index_q, cache.index_k, cu_q, cache.cu_seqlens_k, implementation="reference", **selection
    )
    want = kernels.block_sparse_attention(
        q, cache.k, cache.v, want_ids, cu_q, cache.cu_seqlens_k, block_size=block_size, implementation="reference"
    )
    want_dense = kernels.varlen_attention(q, cache.k, cache.v, cu_q, cache.cu_seqlens_k, implementation="reference")
    plan = kernels.PagedPlan(*paged, cu_q, cache.page_size)
    for implementation, shared in (("reference", None), ("reference", plan), ("portable", None), ("portable", plan)):
        run = {"implementation": implementation, "plan": shared}
        ids = kernels.select_blocks_paged(index_q, cache.index_k_pages, *paged, cu_q, **selection, **run)
        assert ids.dtype == torch.int32
        assert torch.equal(ids, want_ids)
        got = kernels.block_sparse_attention_paged(
            q, cache.k_pages, cache.v_pages, *paged, ids, cu_q, block_size=block_size, **run
        )
        close(got, want)
        dense = kernels.paged_attention(q, cache.k_pages, cache.v_pages, *paged, cu_q, **run)
        close(dense, want_dense)
        again = kernels.block_sparse_attention_paged(
            q, cache.k_pages, cache.v_pages, *paged, ids, cu_q, block_size=block_size, **run
        )
        assert torch.equal(got[0], again[0])
        assert torch.equal(dense[0], kernels.paged_attention(q, cache.k_pages, cache.v_pages, *paged, cu_q, **run)[0])


CHOICES = {
    "unsorted, own block last": [[3, 0, 7], [2, 5, 7]],
    "own block first": [[7, 0, 3], [7, 2, 5]],
    "own block missing": [[4, 0, 3], [1, 2, 5]],
    "blocks to come are not visible": [[0, 9, 7], [1, 8, 7]],
    "different numbers": [[7, 0, 3], [2, -1, -1]],
}


@pytest.mark.parametrize("choice", CHOICES)
def test_decode_takes_any_ids(choice: str) -> None:
    """Other indexers hand over ids in any order, without the own block, or with a different number for each head."""
    cache = Cache([60, 33], 8, 2, 8, 0)
    for lengths, rows in ((cache.lengths[:1], [CHOICES[choice]]), (cache.lengths, [CHOICES[choice], [[2, 0, 4]] * 2])):
        cu_q, ids = list(range(len(lengths) + 1)), torch.tensor(rows).int()
        q, cu_k = queries(cu_q, 4), cache.cu_seqlens_k[: len(lengths) + 1]
        want = kernels.block_sparse_attention(
            q, cache.k[: cu_k[-1]], cache.v[: cu_k[-1]], ids, cu_q, cu_k, block_size=8, implementation="reference"
        )
        table = cache.page_table[: len(lengths)]
        got = kernels.block_sparse_attention_paged(
            q, cache.k_pages, cache.v_pages, table, lengths, ids, cu_q, block_size=8
        )
        close(got, want)


@pytest.mark.parametrize("bag_rows", [0, 16])
def test_parts_chunks_and_gathers_of_any_size_give_the_same(monkeypatch: pytest.MonkeyPatch, bag_rows: int) -> None:
    """Long sequences are cut into parts, their keys into chunks, their gathers into a few at a time: same results."""
    cache = Cache([70, 41, 9, 66], 8, 2, 8, 5)
    selection = {"block_size": 8, "topk_blocks": 3}
    monkeypatch.setattr(kernels.portable.decode, "_BAG_ROWS", bag_rows)
    for counts in ([1, 1, 1, 1], [3, 3, 3, 3], [2, 1, 0, 2], [0, 0, 0, 1]):
        cu_q = [0, *torch.tensor(counts).cumsum(0).tolist()]
        index_q, q = queries(cu_q, 2), queries(cu_q, 4)
        results = []
        for part, chunk, gathered in ((1 << 23, 1 << 18, 1 << 17), (0, 1 << 18, 1), (1 << 23, 64, 1), (999, 150, 200)):
            monkeypatch.setattr(kernels.portable.paged, "_PART_SCORES", part)
            monkeypatch.setattr(kernels.portable.entries, "_CHUNK_ELEMENTS", chunk)
            monkeypatch.setattr(kernels.portable.entries, "_GATHERED_ELEMENTS", gathered)
            paged = (cache.page_table, cache.lengths)
            plan = kernels.PagedPlan(*paged, cu_q, 8)
            ids = kernels.select_blocks_paged(index_q, cache.index_k_pages, *paged, cu_q, plan=plan, **selection)
            sparse = kernels.block_sparse_attention_paged(
                q, cache.k_pages, cache.v_pages, *paged, ids, cu_q, block_size=8, plan=plan
            )
            given = kernels.block_sparse_attention_paged(  # without a plan its form is not known
                q, cache.k_pages, cache.v_pages, *paged, ids, cu_q, block_size=8
            )
            dense = kernels.paged_attention(q, cache.k_pages, cache.v_pages, *paged, cu_q)
            results.append((*sparse, *given, *dense))
        for other in results[1:]:
            for place in (0, 2, 4):
                close(other[place : place + 2], results[0][place : place + 2])


@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize("gathered", [1, 600, 1 << 20])
def test_one_query_at_every_end_of_page_and_block(
    monkeypatch: pytest.MonkeyPatch, shuffle: bool, gathered: int
) -> None:
    """One token of one sequence takes paths of its own: pages in a row, and heads gathered a few at a time."""
    monkeypatch.setattr(kernels.portable.entries, "_GATHERED_ELEMENTS", gathered)
    for length in (1, 7, 8, 9, 16, 25, 31, 32, 33, 64, 65):
        cache = Cache([length], 8, 4, 8, length, shuffle)
        plan = kernels.PagedPlan(cache.page_table, [length], [0, 1], 8)
        paged = (cache.page_table, cache.lengths)
        q, index_q = queries([0, 1], 8, length), queries([0, 1], 4, length)
        for layer in range(2):  # a plan holds nothing of the layer it was used in
            k_pages, v_pages, index_k_pages = (
                x * (1 + layer) for x in (cache.k_pages, cache.v_pages, cache.index_k_pages)
            )
            k, v, index_k = (x * (1 + layer) for x in (cache.k, cache.v, cache.index_k))
            want = kernels.varlen_attention(q, k, v, [0, 1], [0, length], implementation="reference")
            close(kernels.paged_attention(q, k_pages, v_pages, *paged, [0, 1], plan=plan), want)
            for init, local in ((0, 1), (1, 1), (1, 2), (2, 1)):
                selection = {"block_size": 8, "topk_blocks": 3, "init_blocks": init, "local_blocks": local}
                want_ids = kernels.select_blocks(
                    index_q, index_k, [0, 1], [0, length], implementation="reference", **selection
                )
                ids = kernels.select_blocks_paged(index_q, index_k_pages, *paged, [0, 1], plan=plan, **selection)
                assert torch.equal(ids, want_ids)
                want = kernels.block_sparse_attention(
                    q, k, v, ids, [0, 1], [0, length], block_size=8, implementation="reference"
                )
                got = kernels.block_sparse_attention_paged(
                    q, k_pages, v_pages, *paged, ids, [0, 1], block_size=8, plan=plan
                )
                close(got, want)


def test_ties_go_to_the_lower_block_while_decoding() -> None:
    cache = Cache([60], 8, 2, 8, 0)
    cache.index_k_pages[:] = 1.0
    ids = kernels.select_blocks_paged(
        queries([0, 1], 2), cache.index_k_pages, cache.page_table, [60], [0, 1], block_size=8, topk_blocks=4
    )
    assert ids.tolist() == [[[0, 1, 2, 7]] * 2]


def test_decoding_with_gradients_enabled_builds_no_graph() -> None:
    """The paged forms have no gradient; a caller who forgot `no_grad` gets the result all the same."""
    cache = Cache([60], 8, 2, 8, 0)
    q = queries([0, 1], 4).requires_grad_()
    ids = torch.tensor([[[0, 3, 7]] * 2], dtype=torch.int32)
    out, _ = kernels.block_sparse_attention_paged(
        q, cache.k_pages, cache.v_pages, cache.page_table, [60], ids, [0, 1], block_size=8
    )
    assert not out.requires_grad
    assert torch.isfinite(out).all()


def test_bf16_cache_pages() -> None:
    """A cache in bf16 under fp32 queries computes in fp32 on the rounded keys."""
    cache = Cache([40], 8, 2, 8, 2)
    pages = cache.k_pages.bfloat16(), cache.v_pages.bfloat16()
    q = queries([0, 1], 4)
    got = kernels.paged_attention(q, *pages, cache.page_table, cache.lengths, [0, 1])
    want = kernels.varlen_attention(
        q, cache.k.bfloat16().float(), cache.v.bfloat16().float(), [0, 1], [0, 40], implementation="reference"
    )
    close(got, want)


# One test for each pitfall of the model's contract that kernels can fall into


@pytest.mark.parametrize("implementation", ["reference", "portable"])
@pytest.mark.parametrize("new_tokens", [1, 3, 20])
def test_pitfall_6_shuffled_pages_change_nothing(implementation: str, new_tokens: int) -> None:
    """Blocks are logical: the same sequence in other physical pages gives the same bits."""
    results = []
    for shuffle in (False, True):
        cache = Cache([70], 8, 2, 8, 1, shuffle)
        order = Cache([70], 8, 2, 8, 1, False)
        fills = ((cache.k_pages, order.k), (cache.v_pages, order.v), (cache.index_k_pages, order.index_k))
        for target, source in fills:
            for position in range(70):
                page = cache.page_table[0, position // 8]
                place = (page, slice(None), position % 8) if target.dim() == 4 else (page, position % 8)
                target[place] = source[position]
        cu_q = [0, new_tokens]
        run = {"implementation": implementation}
        ids = kernels.select_blocks_paged(
            queries(cu_q, 2), cache.index_k_pages, cache.page_table, [70], cu_q, block_size=8, topk_blocks=3, **run
        )
        out, _ = kernels.block_sparse_attention_paged(
            queries(cu_q, 4), cache.k_pages, cache.v_pages, cache.page_table, [70], ids, cu_q, block_size=8, **run
        )
        results.append((ids, out))
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])


@pytest.mark.parametrize("page_size", [4, 8, 16, 12])
def test_pitfall_7_page_size_is_not_block_size(page_size: int) -> None:
    """Half a block, one block, two blocks and one and a half blocks a page choose and attend alike."""
    cu_q = [0, 1]
    cache = Cache([67], page_size, 2, 8, 9)
    index_q, q = queries(cu_q, 2), queries(cu_q, 4)
    ids = kernels.select_blocks_paged(
        index_q, cache.index_k_pages, cache.page_table, [67], cu_q, block_size=8, topk_blocks=3
    )
    selection = {"block_size": 8, "topk_blocks": 3, "implementation": "reference"}
    assert torch.equal(ids, kernels.select_blocks(index_q, cache.index_k, cu_q, [0, 67], **selection))
    got = kernels.block_sparse_attention_paged(
        q, cache.k_pages, cache.v_pages, cache.page_table, [67], ids, cu_q, block_size=8
    )
    want = kernels.block_sparse_attention(
        q, cache.k, cache.v, ids, cu_q, [0, 67], block_size=8, implementation="reference"
    )
    close(got, want)


@pytest.mark.parametrize("implementation", ["reference", "portable"])
def test_pitfall_17_garbage_past_the_end_is_never_read(implementation: str) -> None:
    """NaN, infinity or huge numbers in unused places leave the same bits, in decode, verification and chunks."""
    for counts in ([1, 1], [3, 3], [12, 1], [30, 9]):
        cache = Cache([37, 9], 8, 2, 8, 4)
        cu_q = [0, *torch.tensor(counts).cumsum(0).tolist()]
        results = []
        for garbage in (NAN, float("inf"), 1e30, 0.0):
            pages = [x.nan_to_num(garbage, garbage) for x in (cache.k_pages, cache.v_pages, cache.index_k_pages)]
            run = {"implementation": implementation}
            paged = (cache.page_table, cache.lengths)
            ids = kernels.select_blocks_paged(
                queries(cu_q, 2), pages[2], *paged, cu_q, block_size=8, topk_blocks=3, **run
            )
            out, _ = kernels.block_sparse_attention_paged(
                queries(cu_q, 4), *pages[:2], *paged, ids, cu_q, block_size=8, **run
            )
            dense, _ = kernels.paged_attention(queries(cu_q, 4), *pages[:2], *paged, cu_q, **run)
            results.append((ids, out, dense))
        for other in results[1:]:
            for a, b in zip(results[0], other):
                assert torch.equal(a, b)


def test_impossible_pages_are_named() -> None:
    cache = Cache([20], 8, 2, 8, 0)
    q = queries([0, 1], 4)
    with pytest.raises(ValueError, match="900 tokens and room for 40"):
        kernels.paged_attention(q, cache.k_pages, cache.v_pages, cache.page_table, [900], [0, 1])
    with pytest.raises(ValueError, match="lengths_k 2 and page_table 1 rows"):
        kernels.paged_attention(q, cache.k_pages, cache.v_pages, cache.page_table, [9, 9], [0, 1])
    with pytest.raises(ValueError, match="not contiguous"):
        kernels.paged_attention(q, cache.k_pages[:, :, ::2], cache.v_pages, cache.page_table, [9], [0, 1])
