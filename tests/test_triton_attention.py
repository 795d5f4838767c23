"""Attention over pages in Triton, interpreted: prefill in tiles and decoding in splits equal the reference."""

import pytest
import torch

from minim3 import kernels
from tests.interpreted import close, cumulative, in_pages, interpreted, random_ids  # noqa: F401

SHAPES = {  # lengths of queries, of keys, KV heads, group, dim, block size, page size, top-k
    "prefill of documents": ([37, 20], [37, 20], 2, 2, 24, 16, 16, 3),
    "a chunk at some context": ([40], [101], 1, 4, 16, 16, 48, 4),
    "pages smaller than blocks": ([35, 18], [60, 18], 1, 1, 16, 32, 16, 2),
    "pages no multiple": ([35], [75], 1, 8, 16, 16, 24, 3),
    "one query each": ([1, 1, 1], [70, 33, 1], 2, 4, 24, 16, 16, 3),
    "verification": ([3, 0, 2], [64, 5, 50], 1, 2, 16, 16, 32, 3),
}


def tensors(cu_q: list[int], cu_k: list[int], heads: int, group: int, dim: int, seed: int = 0) -> tuple:
    generator = torch.Generator().manual_seed(seed)
    shapes = ((cu_q[-1], heads * group, dim), *[(cu_k[-1], heads, dim)] * 2)
    return tuple(torch.randn(*shape, generator=generator) for shape in shapes)


@pytest.mark.parametrize("name", SHAPES)
def test_attention_over_pages_equals_reference(name: str) -> None:
    """Pages shuffled, NaN wherever no key lies (pitfalls 6, 7, 17); any blocks in any order, documents apart."""
    lengths_q, lengths_k, heads, group, dim, block_size, page_size, topk = SHAPES[name]
    cu_q, cu_k = cumulative(lengths_q), cumulative(lengths_k)
    q, k, v = tensors(cu_q, cu_k, heads, group, dim)
    (k_pages, table), (v_pages, _) = in_pages(k, cu_k, page_size), in_pages(v, cu_k, page_size)
    ids = random_ids(cu_q, cu_k, heads, block_size, topk)
    sparse = kernels.block_sparse_attention(q, k, v, ids, cu_q, cu_k, block_size=block_size, implementation="reference")
    dense = kernels.varlen_attention(q, k, v, cu_q, cu_k, implementation="reference")
    results = []
    for _ in range(2):
        run = {"implementation": "triton"}
        results.append((
            *kernels.block_sparse_attention_paged(
                q, k_pages, v_pages, table, lengths_k, ids, cu_q, block_size=block_size, **run
            ),
            *kernels.paged_attention(q, k_pages, v_pages, table, lengths_k, cu_q, **run),
        ))  # fmt: skip
    for want, got, again in zip((*sparse, *dense), *results):
        close(got, want)
        assert torch.equal(got, again)


@pytest.mark.parametrize("splits", [1, 5])
def test_decoding_in_any_number_of_splits(splits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Splits without a key (most of them for the short sequences) must not reach the merge, nor must fresh memory."""
    from minim3.kernels.triton import decode, layout

    empty = torch.empty
    monkeypatch.setattr(decode.torch, "empty", lambda *shape, **like: empty(*shape, **like).fill_(float("nan")))
    lengths = [90, 17, 1]
    cu_q, cu_k = cumulative([1, 1, 1]), cumulative(lengths)
    q, k, v = tensors(cu_q, cu_k, 2, 2, 16)
    (k_pages, table), (v_pages, _) = in_pages(k, cu_k, 16), in_pages(v, cu_k, 16)
    ids = random_ids(cu_q, cu_k, 2, 16, 5)
    for unknown in (False, True):
        known = layout.paged_layout(table, lengths, cu_q, 16, 3, None)
        where = layout._of_device(table, torch.tensor(lengths), torch.tensor(cu_q), 16, 3) if unknown else known
        run = {"block_size": 16, "scale": 0.3, "splits": splits}
        got = decode.decode(q, k_pages, v_pages, table, ids, where, **run)
        want = kernels.block_sparse_attention(
            q, k, v, ids, cu_q, cu_k, block_size=16, scale=0.3, implementation="reference"
        )
        for a, b in zip(got, want):
            close(a, b)
        got = decode.decode(q, k_pages, v_pages, table, None, where, **run)
        for a, b in zip(got, kernels.varlen_attention(q, k, v, cu_q, cu_k, scale=0.3, implementation="reference")):
            close(a, b)


@pytest.mark.parametrize("rows", [16, 64])
def test_tiles_of_any_height(rows: int) -> None:
    """More tokens share a tile: the union of their blocks grows, what each of them attends does not."""
    from minim3.kernels.triton import layout, prefill

    cu = cumulative([41, 9])
    q, k, v = tensors(cu, cu, 2, 4, 16)
    ids = random_ids(cu, cu, 2, 16, 3)
    where = layout.packed_layout(cu, cu, None, q, k)
    got = prefill.forward(q, k, v, ids, where, page_table=None, block_size=16, scale=0.25, rows=rows)
    want = kernels.block_sparse_attention(q, k, v, ids, cu, cu, block_size=16, scale=0.25, implementation="reference")
    for a, b in zip(got, want):
        close(a, b)


@pytest.mark.parametrize("page_size", [None, 16, 24])
def test_queries_gathered_block_by_block(page_size: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """The way taken where tiles share little: the same result, in several runs of queries, with segments of lists."""
    from minim3.kernels.triton import by_key, layout, lists, prefill

    monkeypatch.setattr(prefill, "MANY_QUERIES", 1)
    monkeypatch.setattr(prefill, "FEW_SHARED", 0.0)
    monkeypatch.setattr(by_key, "_PART_ELEMENTS", 40 * 8 * 3 * 16)
    empty = torch.empty
    monkeypatch.setattr(by_key.torch, "empty", lambda *shape, **like: empty(*shape, **like).fill_(-77))
    monkeypatch.setattr(lists, "SEGMENT", 8)  # shorter than a block: some of its own tokens come in later segments
    lengths_q, lengths_k = [37, 9], [60, 9]
    cu_q, cu_k = cumulative(lengths_q), cumulative(lengths_k)
    q, k, v = tensors(cu_q, cu_k, 2, 4, 16)
    ids = random_ids(cu_q, cu_k, 2, 16, 3)
    want = kernels.block_sparse_attention(q, k, v, ids, cu_q, cu_k, block_size=16, implementation="reference")
    table = None
    where = layout.packed_layout(cu_q, cu_k, None, q, k)
    if page_size is not None:
        (k, table), (v, _) = in_pages(k, cu_k, page_size), in_pages(v, cu_k, page_size)
        where = layout.paged_layout(table, lengths_k, cu_q, page_size, 46, None)
    run = {"page_table": table, "block_size": 16, "scale": 0.25}
    calls = []
    forward = by_key.forward
    monkeypatch.setattr(by_key, "forward", lambda *args: calls.append(forward(*args)))
    got = prefill.forward(q, k, v, ids, where, **run)
    assert calls
    for a, b in zip(got, want):
        close(a, b)
    for a, b in zip(got, prefill.forward(q, k, v, ids, where, **run)):
        assert torch.equal(a, b)


@pytest.mark.parametrize("what", ["key", "value", "query"])
def test_nan_shows_where_it_is_seen(what: str) -> None:
    """Empty parts are left out of a merge by their sums: a part whose sum is NaN is not empty."""
    cu = [0, 40]
    q, k, v = tensors(cu, cu, 1, 4, 32)
    {"key": k, "value": v, "query": q}[what][25] = float("nan")
    ids = torch.arange(40)[:, None, None].div(16, rounding_mode="floor").int()  # everybody's own block
    ids = torch.cat([torch.zeros_like(ids).masked_fill_(ids == 0, -1), ids], -1)
    spoilt = torch.zeros(40, dtype=torch.bool)
    spoilt[25 : 26 if what == "query" else 32] = True
    out, _ = kernels.block_sparse_attention(q, k, v, ids, cu, cu, block_size=16, implementation="triton")
    assert out[spoilt].isnan().all()
    # A value meets the zero shares of earlier queries of its block, as in any product.
    apart = torch.arange(40).div(16, rounding_mode="floor") != 1 if what == "value" else ~spoilt
    assert not out[apart].isnan().any()
    dense, _ = kernels.varlen_attention(q, k, v, cu, cu, implementation="triton")
    assert dense[spoilt].isnan().all()
    assert not dense[:16].isnan().any()
    (k_pages, table), (v_pages, _) = in_pages(k, cu, 16), in_pages(v, cu, 16)
    for token in (25, 31, 33):
        run = table, [token + 1], ids[token : token + 1], [0, 1]
        one, _ = kernels.block_sparse_attention_paged(
            q[token : token + 1], k_pages, v_pages, *run, block_size=16, implementation="triton"
        )
        assert one.isnan().all() == spoilt[token]
        one, _ = kernels.paged_attention(
            q[token : token + 1], k_pages, v_pages, *run[:2], [0, 1], implementation="triton"
        )
        assert one.isnan().all() == (token == 25 or what != "query")


@pytest.mark.parametrize(("dtype", "error"), [(torch.float16, 2e-3), (torch.bfloat16, 1.6e-2)])
def test_pitfall_10_low_precision_stays_near_fp32(dtype: torch.dtype, error: float) -> None:
    """Masks are boolean and sums fp32; the error is that of rounding shares and results."""
    cu = [0, 40]
    q, k, v = (x.to(dtype) for x in tensors(cu, cu, 1, 4, 32))
    ids = random_ids(cu, cu, 1, 16, 2)
    (k_pages, table), (v_pages, _) = in_pages(k, cu, 16), in_pages(v, cu, 16)
    out, lse = kernels.block_sparse_attention_paged(
        q, k_pages, v_pages, table, [40], ids, cu, block_size=16, implementation="triton"
    )
    want, want_lse = kernels.block_sparse_attention(
        q.float(), k.float(), v.float(), ids, cu, cu, block_size=16, implementation="reference"
    )
    assert out.dtype == dtype
    close(out.float(), want, error)
    close(lse, want_lse, 1e-5)


def test_a_cache_of_eight_bits() -> None:
    """Pages in e4m3 read as what they hold: the same as wide pages of those values, for all three paged ops."""
    lengths_q, lengths_k = [2, 20], [40, 35]
    cu_q, cu_k = cumulative(lengths_q), cumulative(lengths_k)
    q, k, v = tensors(cu_q, cu_k, 2, 2, 16)
    index_q = q[:, :2].round()
    for rows in (slice(0, 22), slice(0, 2)):
        n = 2 if rows.stop == 22 else 1
        cu, lengths = cu_q[: n + 1], lengths_k[:n]
        (k_pages, table), (v_pages, _) = in_pages(k, cu_k, 16), in_pages(v, cu_k, 16)
        narrow = [x.to(torch.float8_e4m3fn) for x in (k_pages, v_pages, k_pages[:, 0])]
        results = []
        for pages in (narrow, [x.float() for x in narrow]):
            run = {"implementation": "triton"}
            ids = kernels.select_blocks_paged(
                index_q[rows], pages[2].contiguous(), table[:n], lengths, cu, block_size=16, topk_blocks=2, **run
            )
            where = q[rows], pages[0], pages[1], table[:n], lengths
            sparse = kernels.block_sparse_attention_paged(*where, ids, cu, block_size=16, **run)
            results.append([ids, *sparse, *kernels.paged_attention(*where, cu, **run)])
        for a, b in zip(*results):
            assert torch.isfinite(a).all()
            assert torch.equal(a, b)


def test_strided_queries_need_no_copy() -> None:
    """Views of one packed projection: rows farther apart than their heads."""
    cu = [0, 24]
    q, k, v = tensors(cu, cu, 2, 2, 16)
    wide = torch.full((24, 9, 16), float("nan"))
    wide[:, :4] = q
    (k_pages, table), (v_pages, _) = in_pages(k, cu, 16), in_pages(v, cu, 16)
    run = {"implementation": "triton"}
    got = kernels.paged_attention(wide[:, :4], k_pages, v_pages, table, [24], cu, **run)[0]
    assert torch.equal(got, kernels.paged_attention(q, k_pages, v_pages, table, [24], cu, **run)[0])


def test_requests_that_cannot_be_met_say_why() -> None:
    q, pages, table = torch.randn(1, 6, 16), torch.randn(2, 2, 16, 16), torch.tensor([[0, 1]])
    with pytest.raises(ValueError, match="3 query heads share a KV head; that must be a power of two"):
        kernels.paged_attention(q, pages, pages, table, [4], [0, 1], implementation="triton")
    narrow = pages.bfloat16()
    with pytest.raises(ValueError, match=r"in the dtype of the queries or in float8_e4m3fn, not in torch\.bfloat16"):
        kernels.paged_attention(q[:, :4], narrow, narrow, table, [4], [0, 1], implementation="triton")
    with pytest.raises(ValueError, match="room for 32 in its pages"):
        kernels.paged_attention(q[:, :4], pages, pages, table, [40], [0, 1], implementation="triton")
