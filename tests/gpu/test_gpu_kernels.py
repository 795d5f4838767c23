"""The Triton kernels on a GPU, at real sizes: `python3 -m pytest tests/gpu` from the checkout.

Judged against fp32 references; the error that dense bf16 attention makes on the same inputs is the measure.
"""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

if not torch.cuda.is_available():
    pytest.skip("needs a CUDA device", allow_module_level=True)

from minim3 import kernels
from minim3.kernels.reference import selected_keys_mask

HEADS, KV_HEADS, DIM, BLOCK, TOPK = 64, 4, 128, 128, 16
SELECTION = {"block_size": BLOCK, "topk_blocks": TOPK}


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    generator = torch.Generator("cuda").manual_seed(seed)
    return torch.randn(*shape, generator=generator, device="cuda", dtype=torch.float32).to(dtype)


def whole(*shape: int, seed: int = 0) -> Tensor:
    """Small whole numbers in bf16: sums of products are exact in fp32 in any order, and ties are the rule."""
    return randn(*shape, seed=seed).clamp(-3, 3).round()


def relative(a: Tensor, b: Tensor) -> float:
    assert torch.isfinite(a).all()
    return float((a.double() - b.double()).norm() / b.double().norm())


def in_pages(packed: Tensor, lengths: list[int], page_size: int) -> tuple[Tensor, Tensor]:
    """Packed keys in shuffled pages; NaN wherever no key lies, -1 in the table past the end."""
    counts = [-(-n // page_size) for n in lengths]
    order = torch.randperm(sum(counts) + 3)
    heads = packed.shape[1:-1]
    shape = (sum(counts) + 3, *heads, page_size, packed.shape[-1])
    pages = torch.full(shape, float("nan"), dtype=packed.dtype, device="cuda")
    table = torch.full((len(lengths), max(counts) + 1), -1, dtype=torch.int64)
    taken = start = 0
    for n, count in enumerate(counts):
        table[n, :count] = order[taken : taken + count]
        for i in range(count):
            part = packed[start + i * page_size : start + min((i + 1) * page_size, lengths[n])]
            pages[table[n, i], ..., : part.shape[0], :] = part.movedim(0, -2)
        taken, start = taken + count, start + lengths[n]
    return pages, table.cuda()


def cumulative(lengths: list[int]) -> list[int]:
    return [0, *torch.tensor(lengths).cumsum(0).tolist()]


@pytest.mark.parametrize("score_type", ["max", "lse"])
def test_selection_is_exact(score_type: str) -> None:
    """Ties everywhere; documents of odd lengths; a budget that most queries exceed."""
    lengths = [3001, 129, 4096]
    cu = cumulative(lengths)
    index_q, index_k = whole(cu[-1], KV_HEADS, DIM), whole(cu[-1], DIM, seed=1)
    run = {**SELECTION, "topk_blocks": 7, "init_blocks": 1, "local_blocks": 2, "score_type": score_type}
    got = kernels.select_blocks(index_q, index_k, cu, cu, implementation="triton", **run)
    again = kernels.select_blocks(index_q, index_k, cu, cu, implementation="triton", **run)
    assert torch.equal(got, again)
    want = kernels.select_blocks(index_q.float(), index_k.float(), cu, cu, implementation="reference", **run)
    if score_type == "max":
        assert torch.equal(got, want)
    else:  # logarithms round
        assert (got == want).float().mean() > 0.999
    pages, table = in_pages(index_k, lengths, 192)
    paged = kernels.select_blocks_paged(index_q, pages, table, lengths, cu, implementation="triton", **run)
    assert torch.equal(paged, got)


def test_selection_over_many_chunks_of_blocks() -> None:
    """A quarter of a million keys: the winners of chunks are merged."""
    index_q, index_k = whole(40, KV_HEADS, DIM), whole(262144, DIM, seed=1)
    run = {"implementation": "triton", **SELECTION}
    got = kernels.select_blocks(index_q, index_k, [0, 40], [0, 262144], **run)
    want = kernels.select_blocks(
        index_q.float(), index_k.float(), [0, 40], [0, 262144], implementation="reference", **SELECTION
    )
    assert torch.equal(got, want)


def masked(q: Tensor, k: Tensor, v: Tensor, ids: Tensor, dtype: torch.dtype) -> Tensor:
    """Dense attention of one document with the mask of the choice, in `dtype`."""
    length = q.shape[0]
    keep = (
        selected_keys_mask(ids, length, BLOCK)
        & torch.ones(length, length, dtype=torch.bool, device="cuda").tril()[:, None]
    )
    group = q.shape[1] // k.shape[1]
    heads = (
        x.transpose(0, 1).to(dtype)[None] for x in (q, k.repeat_interleave(group, 1), v.repeat_interleave(group, 1))
    )
    out = F.scaled_dot_product_attention(*heads, attn_mask=keep.transpose(0, 1).repeat_interleave(group, 0)[None])
    return out[0].transpose(0, 1)


@pytest.mark.parametrize("few_shared", [0.0, 1e9])
def test_sparse_attention_and_its_gradient(few_shared: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """bf16 error within twice that of dense bf16 attention with the mask; the same bits on repetition.

    Both ways through the blocks: queries gathered block by block, and tiles along unions.
    """
    from minim3.kernels.triton import prefill

    monkeypatch.setattr(prefill, "FEW_SHARED", few_shared)
    length = 3333
    cu = [0, length]
    inputs = randn(length, 16, DIM), randn(length, 2, DIM, seed=1), randn(length, 2, DIM, seed=2)
    weight = randn(length, 16, DIM, seed=3)
    index_q, index_k = randn(length, 2, DIM, seed=4), randn(length, DIM, seed=5)
    ids = kernels.select_blocks(index_q, index_k, cu, cu, block_size=BLOCK, topk_blocks=6, implementation="triton")

    def results(attend, dtype: torch.dtype) -> list[Tensor]:
        leaves = [x.to(dtype).requires_grad_() for x in inputs]
        out = attend(*leaves)
        out.backward(weight.to(dtype))
        return [out.detach(), *(x.grad for x in leaves)]

    def ours(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return kernels.block_sparse_attention(q, k, v, ids, cu, cu, block_size=BLOCK, implementation="triton")[0]

    exact = results(lambda q, k, v: masked(q, k, v, ids, torch.float32), torch.float32)
    dense = results(lambda q, k, v: masked(q, k, v, ids, torch.bfloat16), torch.bfloat16)
    got, again = results(ours, torch.bfloat16), results(ours, torch.bfloat16)
    for want, base, a, b in zip(exact, dense, got, again):
        assert relative(a, want) <= 2 * relative(base, want)
        assert torch.equal(a, b)
    fp32 = results(ours, torch.float32)
    for want, a in zip(exact, fp32):
        assert relative(a, want) < 1e-5


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("dim", [64, 80, 128])
def test_dense_attention_and_its_gradient(causal: bool, dim: int) -> None:
    lengths = [1000, 77, 513]
    cu = cumulative(lengths)
    results = []
    for implementation, dtype in (("reference", torch.float32), ("triton", torch.float32), ("triton", torch.bfloat16)):
        leaves = [randn(cu[-1], h, dim, seed=h, dtype=dtype).requires_grad_() for h in (8, 4, 2)]
        q, k, v = leaves[0], leaves[1][:, :2], leaves[2]
        out, lse = kernels.varlen_attention(q, k, v, cu, cu, causal=causal, implementation=implementation)
        out.backward(randn(cu[-1], 8, dim, seed=9, dtype=dtype))
        results.append([out.detach(), lse, *(x.grad for x in leaves)])
    for want, fp32, bf16 in zip(*results):
        assert relative(fp32, want) < 1e-5
        assert relative(bf16, want) < 1.5e-2


@pytest.mark.parametrize("queries", [1, 5, 300])
@pytest.mark.parametrize("page_size", [128, 64, 192])
def test_attention_over_pages(queries: int, page_size: int) -> None:
    """Decoding, verification, a chunk of prefill; pages shuffled and of any size, NaN where no key lies."""
    lengths = [5000, 700, 2300]
    cu_q, cu_k = cumulative([queries] * 3), cumulative(lengths)
    q, k, v = (
        randn(cu_q[-1], HEADS, DIM),
        randn(cu_k[-1], KV_HEADS, DIM, seed=1),
        randn(cu_k[-1], KV_HEADS, DIM, seed=2),
    )
    index_q, index_k = whole(cu_q[-1], KV_HEADS, DIM), whole(cu_k[-1], DIM, seed=3)
    (k_pages, table), (v_pages, table_v), (index_pages, table_i) = (
        in_pages(x, lengths, page_size) for x in (k, v, index_k)
    )
    ids = kernels.select_blocks_paged(
        index_q, index_pages, table_i, lengths, cu_q, implementation="triton", **SELECTION
    )
    assert torch.equal(
        ids,
        kernels.select_blocks(index_q.float(), index_k.float(), cu_q, cu_k, implementation="reference", **SELECTION),
    )
    run = {"block_size": BLOCK}
    # one table for both: v's pages in the order of k's
    moved = torch.full_like(v_pages, float("nan"))
    for n, length in enumerate(lengths):
        used = -(-length // page_size)
        moved[table[n, :used]] = v_pages[table_v[n, :used]]
    got, lse = kernels.block_sparse_attention_paged(
        q, k_pages, moved, table, lengths, ids, cu_q, implementation="triton", **run
    )
    want, want_lse = kernels.block_sparse_attention(
        q.float(), k.float(), v.float(), ids, cu_q, cu_k, implementation="reference", **run
    )
    assert relative(got, want) < 6e-3
    assert relative(lse, want_lse) < 1e-3
    got, lse = kernels.paged_attention(q, k_pages, moved, table, lengths, cu_q, implementation="triton")
    want, want_lse = kernels.varlen_attention(q.float(), k.float(), v.float(), cu_q, cu_k, implementation="reference")
    assert relative(got, want) < 6e-3
    assert relative(lse, want_lse) < 1e-3


@pytest.mark.parametrize("warm_up", [False, True])
def test_alignment_loss_and_gradient(warm_up: bool) -> None:
    lengths = [1500, 300]
    cu = cumulative(lengths)
    results = []
    inputs = [
        randn(cu[-1], 16, DIM),
        randn(cu[-1], 2, DIM, seed=1),
        randn(cu[-1], 2, DIM, seed=2),
        randn(cu[-1], DIM, seed=3),
    ]
    ids = kernels.select_blocks(inputs[2], inputs[3], cu, cu, block_size=BLOCK, topk_blocks=5, implementation="triton")
    for implementation, dtype in (
        ("reference", torch.float32),
        ("triton", torch.float32),
        ("triton", torch.bfloat16),
        ("triton", torch.bfloat16),
    ):
        leaves = [x.to(dtype).requires_grad_() for x in inputs]
        loss = kernels.indexer_kl(
            *leaves, None if warm_up else ids, cu, cu, block_size=BLOCK, implementation=implementation
        )
        loss.backward()
        results.append([loss.detach(), leaves[2].grad, leaves[3].grad])
    for want, fp32, bf16, again in zip(*results):
        assert relative(fp32, want) < 1e-4
        assert relative(bf16, want) < 2e-2
        assert torch.equal(bf16, again)


def test_a_step_of_decoding_as_a_graph() -> None:
    """Lengths on the device: the graph captured at one length is right at the next ones."""
    lengths = torch.tensor([900, 4000], dtype=torch.int32, device="cuda")
    cu = torch.tensor([0, 1, 2], dtype=torch.int32, device="cuda")
    pages = 40
    k_pages, v_pages = randn(2 * pages, KV_HEADS, BLOCK, DIM), randn(2 * pages, KV_HEADS, BLOCK, DIM, seed=1)
    index_pages = whole(2 * pages, BLOCK, DIM, seed=2)
    table = torch.randperm(2 * pages, device="cuda").view(2, pages)
    q, index_q = randn(2, HEADS, DIM, seed=3), whole(2, KV_HEADS, DIM, seed=4)

    def step(lengths_k, cu_q) -> Tensor:
        run = {"implementation": "triton"}
        if isinstance(lengths_k, Tensor):
            run["plan"] = kernels.DevicePlan(table, lengths_k, cu_q, BLOCK)
        ids = kernels.select_blocks_paged(index_q, index_pages, table, lengths_k, cu_q, **SELECTION, **run)
        return kernels.block_sparse_attention_paged(
            q, k_pages, v_pages, table, lengths_k, ids, cu_q, block_size=BLOCK, **run
        )[0]

    step(lengths, cu)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = step(lengths, cu)
    for change in (0, 1, 127, 800):
        lengths += change
        graph.replay()
        assert torch.equal(out, step(lengths.tolist(), [0, 1, 2]))


def test_offsets_beyond_two_to_the_31() -> None:
    """Pitfall 4: a score table, queries and pages of more elements than an int32 counts."""
    from minim3.kernels.triton import layout, prefill, select

    tokens, keys = 70_000, 1 << 20
    index_q, index_k = whole(tokens, KV_HEADS, 64), whole(keys, 64, seed=1)
    where = layout.packed_layout([0, tokens], [0, keys], None, index_q, index_k)
    table = select._Table(index_q, index_k, None, where, BLOCK)
    assert table.blocks * table.tiles.shape[0] * table.rows > 2**31
    before, select._TABLE_SCORES = select._TABLE_SCORES, 1 << 34
    try:
        got = kernels.select_blocks(index_q, index_k, [0, tokens], [0, keys], implementation="triton", **SELECTION)
    finally:
        select._TABLE_SCORES = before
    for start in (0, tokens // 2, tokens - 64):
        part = index_q[start : start + 64]
        want = kernels.select_blocks(
            part, index_k, [0, 64], [0, keys], q_offset=[keys - tokens + start], implementation="triton", **SELECTION
        )
        assert torch.equal(got[start : start + 64], want)
    del index_q, index_k, got, table
    tokens = 270_000
    q, k = randn(tokens, HEADS, DIM), randn(tokens, KV_HEADS, DIM, seed=1)
    assert q.numel() > 2**31
    current = torch.arange(tokens, device="cuda", dtype=torch.int32) // BLOCK
    ids = torch.stack([torch.where(current > 0, current // 2, -1), current], 1)
    ids[:BLOCK, 0] = -1
    ids = ids[:, None].expand(tokens, KV_HEADS, 2).contiguous()
    where = layout.packed_layout([0, tokens], [0, tokens], None, q, k)
    out, _ = prefill.forward(q, k, k, ids, where, page_table=None, block_size=BLOCK, scale=DIM**-0.5)
    last = tokens - 500
    where = layout.packed_layout([0, 500], [0, tokens], None, q[last:], k)
    part, _ = prefill.forward(q[last:], k, k, ids[last:], where, page_table=None, block_size=BLOCK, scale=DIM**-0.5)
    assert torch.equal(out[last:], part)
    del q, k, out, part
    pages = randn(33_000, KV_HEADS, BLOCK, DIM)
    assert pages.numel() > 2**31
    q = randn(1, HEADS, DIM, seed=1)
    far = torch.tensor([[32_999, 32_990]], device="cuda")
    got, _ = kernels.paged_attention(q, pages, pages, far, [200], [0, 1], implementation="triton")
    near, _ = kernels.paged_attention(
        q, pages[far[0]], pages[far[0]], torch.tensor([[0, 1]], device="cuda"), [200], [0, 1], implementation="triton"
    )
    assert torch.equal(got, near)


def test_the_choice_falls_on_triton() -> None:
    assert kernels.resolve(None, "block_sparse_attention", "cuda", torch.bfloat16) == "triton"
    assert kernels.implementations()[0] == "triton"
