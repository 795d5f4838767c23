"""The portable kernels equal the reference on packed sequences, in value and gradient; selection is exact."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from minim3 import kernels
from minim3.kernels.portable import flash
from minim3.kernels.reference import build_block_sparse_attn_bias, selected_keys_mask
from minim3.kernels.sequences import sequence_spans, token_rows

PROPERTY = settings(max_examples=30, deadline=None, derandomize=True)
LENGTHS = st.lists(st.integers(1, 90), min_size=1, max_size=5)
BLOCKS = st.sampled_from([1, 4, 7, 16])


def cumulative(lengths: list[int]) -> list[int]:
    return [0, *torch.tensor(lengths).cumsum(0).tolist()]


def close(a: Tensor, b: Tensor, relative: float = 1e-5) -> None:
    assert a.shape == b.shape
    assert a.dtype == b.dtype
    assert torch.isfinite(a).all()
    assert (a - b).abs().max() <= relative * b.abs().max().clamp(min=0.1)


def random_ids(queries: int, offset: int, heads: int, block_size: int, k: int, shuffle: bool, generator) -> Tensor:
    """Block ids no indexer made: any distinct visible blocks, at least one, the own block not always among them."""
    ids = torch.full((queries, heads, k), -1, dtype=torch.int32)
    for i in range(queries):
        current = (offset + i) // block_size
        for h in range(heads):
            count = int(torch.randint(1, min(k, current + 1) + 1, (), generator=generator))
            chosen = torch.randperm(current + 1, generator=generator)[:count]
            ids[i, h, :count] = (chosen if shuffle else chosen.sort().values).int()
    return ids


@st.composite
def packed(draw: st.DrawFn) -> dict:
    """Packed documents: whole ones, or the last tokens of sequences whose keys are already there."""
    lengths_k = draw(LENGTHS)
    whole = draw(st.booleans())
    lengths_q = lengths_k if whole else [draw(st.integers(0, n)) for n in lengths_k]
    if not sum(lengths_q):
        lengths_q = lengths_k
    return {
        "cu_q": cumulative(lengths_q), "cu_k": cumulative(lengths_k), "heads": draw(st.sampled_from([1, 2])),
        "group": draw(st.sampled_from([1, 3])), "block_size": draw(BLOCKS), "topk": draw(st.integers(2, 5)),
        "seed": draw(st.integers(0, 2**16)),
    }  # fmt: skip


def tensors(case: dict, dim: int = 8, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(case["seed"])
    shapes = ((case["cu_q"][-1], case["heads"] * case["group"]), *[(case["cu_k"][-1], case["heads"])] * 2)
    return tuple(torch.randn(*shape, dim, generator=generator, dtype=dtype) for shape in shapes)


def ids_of(case: dict, shuffle: bool = False) -> Tensor:
    generator = torch.Generator().manual_seed(case["seed"])
    spans = sequence_spans(case["cu_q"], case["cu_k"], None, num_queries=case["cu_q"][-1], num_keys=case["cu_k"][-1])
    return torch.cat([
        random_ids(s.num_queries, s.offset, case["heads"], case["block_size"], case["topk"], shuffle, generator)
        for s in spans
    ])  # fmt: skip


def both(op: str, inputs: list[Tensor], *args, **kwargs) -> None:
    """Compare value, log-sum-exp and gradients of the two implementations, and a repetition bit for bit."""
    results = []
    for implementation in ("reference", "portable", "portable"):
        leaves = [x.clone().requires_grad_() for x in inputs]
        out = getattr(kernels, op)(*leaves, *args, implementation=implementation, **kwargs)
        out, extra = out if isinstance(out, tuple) else (out, None)
        generator = torch.Generator().manual_seed(1)
        (out * torch.randn(out.shape, generator=generator, dtype=out.dtype)).sum().backward()
        with torch.no_grad():
            quick = getattr(kernels, op)(*inputs, *args, implementation=implementation, **kwargs)
        quick = quick[0] if isinstance(quick, tuple) else quick
        results.append([out.detach(), extra, quick, *(leaf.grad for leaf in leaves)])
    for index, (want, got, again) in enumerate(zip(*results)):
        if want is not None:
            close(got, want, 1e-5 if index < 3 else 1e-4)
            assert torch.equal(got, again)


@PROPERTY
@given(packed(), st.booleans())
def test_block_sparse_attention_equals_reference(case: dict, shuffle: bool) -> None:
    ids = ids_of(case, shuffle)
    both("block_sparse_attention", list(tensors(case)), ids, case["cu_q"], case["cu_k"], block_size=case["block_size"])


@PROPERTY
@given(packed(), st.integers(0, 2), st.integers(0, 2), st.sampled_from(["max", "lse"]), st.booleans())
def test_selection_equals_reference(case: dict, init: int, local: int, score_type: str, integers: bool) -> None:
    q, k, _ = tensors(case)
    q, k = q[:, : case["heads"]], k[:, 0]
    if integers:  # many equal scores: ties are the rule
        q, k = q.round(), k.round()
    elif score_type == "lse":
        q, k = q.double(), k.double()
    arguments = {
        "block_size": case["block_size"], "topk_blocks": max(case["topk"], init + local, 1), "init_blocks": init,
        "local_blocks": local, "score_type": "max" if integers else score_type,
    }  # fmt: skip
    want = kernels.select_blocks(q, k, case["cu_q"], case["cu_k"], implementation="reference", **arguments)
    got = kernels.select_blocks(q, k, case["cu_q"], case["cu_k"], implementation="portable", **arguments)
    assert got.dtype == torch.int32
    assert torch.equal(got, want)


@PROPERTY
@given(packed(), st.booleans())
def test_varlen_attention_equals_reference(case: dict, causal: bool) -> None:
    both("varlen_attention", list(tensors(case)), case["cu_q"], case["cu_k"], causal=causal)


def test_many_short_documents_are_batched_exactly() -> None:
    """Padding of a bucket must not reach values or gradients; documents out of order and repeated lengths included."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(1, 60, (40,), generator=generator).tolist() + [600]
    case = {"cu_q": cumulative(lengths), "cu_k": cumulative(lengths), "heads": 2, "group": 2, "seed": 3}
    for causal in (True, False):
        both("varlen_attention", list(tensors(case)), case["cu_q"], case["cu_k"], causal=causal)
    selection = {"block_size": 16, "topk_blocks": 16}
    q, k, _ = tensors(case)
    ids = kernels.select_blocks(q[:, :2], k[:, 0], case["cu_q"], case["cu_k"], **selection)
    both("block_sparse_attention", list(tensors(case)), ids, case["cu_q"], case["cu_k"], block_size=16)


def test_q_offset_limits_what_queries_see() -> None:
    """Queries in the middle of a sequence see no later key, whatever lies there."""
    q, k, v = torch.randn(13, 4, 8), torch.randn(60, 2, 8), torch.randn(60, 2, 8)
    ids = random_ids(13, 21, 2, 4, 5, False, torch.Generator().manual_seed(0))
    want = kernels.block_sparse_attention(q, k[:34], v[:34], ids, [0, 13], [0, 34], block_size=4)
    k[34:], v[34:] = float("nan"), float("nan")
    got = kernels.block_sparse_attention(q, k, v, ids, [0, 13], [0, 60], q_offset=[21], block_size=4)
    assert torch.equal(got[0], want[0])
    dense = kernels.varlen_attention(q, k, v, [0, 13], [0, 60], q_offset=[21])
    assert torch.equal(dense[0], kernels.varlen_attention(q, k[:34], v[:34], [0, 13], [0, 34])[0])
    index_q = torch.randn(13, 2, 8)
    for implementation in ("reference", "portable"):
        common = {"block_size": 4, "topk_blocks": 3, "implementation": implementation}
        ids = kernels.select_blocks(index_q, k[:, 0], [0, 13], [0, 60], q_offset=[21], **common)
        assert torch.equal(ids, kernels.select_blocks(index_q, k[:34, 0], [0, 13], [0, 34], **common))


@PROPERTY
@given(packed(), st.booleans(), st.booleans())
def test_indexer_kl_equals_reference(case: dict, warm_up: bool, everything: bool) -> None:
    q, k, _ = tensors(case)
    generator = torch.Generator().manual_seed(case["seed"] + 1)
    index_q = torch.randn(q.shape[0], case["heads"], 8, generator=generator)
    index_k = torch.randn(k.shape[0], 8, generator=generator)
    if everything:
        current = torch.full((q.shape[0],), 90)
        ids = torch.arange(91, dtype=torch.int32).expand(q.shape[0], case["heads"], -1)
        assert int(current.max()) < ids.shape[-1]
    else:
        ids = ids_of(case)
    results = []
    for implementation in ("reference", "portable", "portable"):
        leaves = [x.clone().requires_grad_() for x in (q, k, index_q, index_k)]
        loss = kernels.indexer_kl(
            *leaves, None if warm_up else ids, case["cu_q"], case["cu_k"], block_size=case["block_size"],
            implementation=implementation,
        )  # fmt: skip
        (3 * loss).backward()
        assert [leaf.grad for leaf in leaves[:2]] == [None, None], "the teacher is detached"
        results.append((loss.detach(), leaves[2].grad, leaves[3].grad))
    for want, got, again in zip(*results):
        assert (got - want).abs().max() <= 1e-5 * want.abs().max() + 1e-6
        assert torch.equal(got, again)


def test_indexer_kl_gradient_is_student_minus_teacher() -> None:
    """The closed form of the paper, at the raw dot product of the last query, on one document."""
    q, k, index_k = torch.randn(5, 4, 8), torch.randn(5, 2, 8), torch.randn(5, 8)
    index_q = torch.randn(5, 2, 8, requires_grad=True)
    kernels.indexer_kl(q, k, index_q, index_k, None, [0, 5], [0, 5], block_size=4).backward()
    teacher = torch.stack([(q[4, h] @ k[:, h // 2].T * 8**-0.5).softmax(-1) for h in range(4)]).view(2, 2, 5).mean(1)
    student = (index_q[4] @ index_k.T * 8**-0.5).softmax(-1)
    close(index_q.grad[4], (student - teacher).detach() @ index_k * 8**-0.5 / 10)


@PROPERTY
@given(
    st.integers(1, 40), st.integers(1, 4), st.sampled_from([4.0, 0.0]), st.sampled_from([1.702, 1.0, 0.0]),
    st.integers(0, 2**16),
)  # fmt: skip
def test_grouped_experts_equals_reference(tokens: int, choices: int, limit: float, alpha: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x, w13, w2 = (torch.randn(*s, generator=generator) for s in ((tokens, 12), (6, 10, 12), (6, 12, 5)))
    weights = torch.rand(tokens, choices, generator=generator)
    # expert 5 is never chosen: it must get a zero gradient, not what the memory held
    ids = torch.stack([torch.randperm(5, generator=generator)[:choices] for _ in range(tokens)])
    results = []
    for implementation in ("reference", "portable", "portable"):
        leaves = [t.clone().requires_grad_() for t in (x, w13, w2, weights)]
        run = {"alpha": alpha, "limit": limit, "beta": 1.0, "implementation": implementation}
        out = kernels.grouped_experts(*leaves[:3], ids, leaves[3], **run)
        (out * torch.arange(12)).sum().backward()
        with torch.no_grad():
            quick = kernels.grouped_experts(x, w13, w2, ids, weights, **run)
        results.append([out.detach(), quick, *(leaf.grad for leaf in leaves)])
    for index, (want, got, again) in enumerate(zip(*results)):
        close(got, want, 1e-5 if index < 2 else 1e-4)
        assert torch.equal(got, again)


def test_gradients_agree_with_finite_differences() -> None:
    """fp64 stays fp64 inside, so that finite differences can judge the closed forms."""
    q, k, v = (torch.randn(*s, dtype=torch.float64, requires_grad=True) for s in ((11, 2, 3), (11, 1, 3), (11, 1, 3)))
    ids = random_ids(11, 0, 1, 2, 3, False, torch.Generator().manual_seed(0))
    assert torch.autograd.gradcheck(
        lambda q, k, v: kernels.block_sparse_attention(q, k, v, ids, [0, 11], [0, 11], block_size=2)[0], (q, k, v)
    )
    x, w13, w2, w = (
        torch.randn(*s, dtype=torch.float64, requires_grad=True) for s in ((5, 3), (2, 4, 3), (2, 3, 2), (5, 1))
    )
    choice = torch.tensor([[0], [1], [1], [0], [1]])
    assert torch.autograd.gradcheck(
        lambda x, w13, w2, w: kernels.grouped_experts(x, w13, w2, choice, w, alpha=1.702, limit=0.7), (x, w13, w2, w)
    )
    index_q = torch.randn(11, 1, 3, dtype=torch.float64, requires_grad=True)
    index_k = torch.randn(11, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda a, b: kernels.indexer_kl(q, k, a, b, ids, [0, 11], [0, 11], block_size=2), (index_q, index_k)
    )


def test_plain_products_equal_the_fused_operator() -> None:
    """Devices without the CPU operator take matrix products: the same values, in tiles of rows too."""
    q, k, v = torch.randn(2, 6, 9, 8), torch.randn(2, 3, 9, 8), torch.randn(2, 3, 9, 8)
    before = flash._PLAIN_SCORES
    try:
        for flash._PLAIN_SCORES in (before, 2 * 6 * 9 * 4):
            for causal in (True, False):
                run = {"causal": causal, "scale": 0.3}
                out, lse = flash.attend(q, k, v, **run)
                plain_out, plain_lse = flash.attend_plain(q, k, v, **run)
                close(plain_out, out)
                close(plain_lse, lse)
                grad = torch.randn_like(out)
                wants = flash.attend_backward(grad, q, k, v, out, lse, **run)
                for got, want in zip(flash.attend_backward_plain(grad, q, k, v, out, lse, **run), wants):
                    close(got, want)
    finally:
        flash._PLAIN_SCORES = before


@pytest.mark.parametrize("implementation", ["reference", "portable"])
def test_bf16_computes_in_fp32(implementation: str) -> None:
    case = {"cu_q": [0, 70], "cu_k": [0, 70], "heads": 2, "group": 2, "block_size": 8, "topk": 3, "seed": 0}
    q, k, v = (x.bfloat16() for x in tensors(case))
    ids = ids_of(case)
    run = {"block_size": 8, "implementation": implementation}
    want, want_lse = kernels.block_sparse_attention(q.float(), k.float(), v.float(), ids, [0, 70], [0, 70], **run)
    out, lse = kernels.block_sparse_attention(q, k, v, ids, [0, 70], [0, 70], **run)
    assert (out.dtype, lse.dtype) == (torch.bfloat16, torch.float32)
    assert torch.equal(out, want.bfloat16())
    assert torch.equal(lse, want_lse)
    x, w13, w2 = torch.randn(9, 8).bfloat16(), torch.randn(3, 12, 8).bfloat16(), torch.randn(3, 8, 6).bfloat16()
    experts, weights = torch.randint(3, (9, 2)), torch.rand(9, 2)
    run = {"alpha": 1.702, "limit": 7.0, "implementation": implementation}
    want = kernels.grouped_experts(x.float(), w13.float(), w2.float(), experts, weights, **run)
    assert torch.equal(kernels.grouped_experts(x, w13, w2, experts, weights, **run), want.bfloat16())


# One test for each pitfall of the model's contract that kernels can fall into


def test_pitfall_1_index_heads_select_for_themselves() -> None:
    """Selection merged across index heads would give both heads one choice."""
    index_k = torch.zeros(40, 2)
    index_k[0:8, 0], index_k[8:16, 1] = 5.0, 5.0
    index_q = torch.eye(2).expand(40, 2, 2)
    for implementation in ("reference", "portable"):
        ids = kernels.select_blocks(
            index_q, index_k, [0, 40], [0, 40], block_size=8, topk_blocks=2, implementation=implementation
        )
        assert ids[39].tolist() == [[0, 4], [1, 4]]


def test_pitfall_4_offsets_past_2_to_the_31() -> None:
    """Cache offsets of a long context must not be computed in 32 bits."""
    table = torch.tensor([3_000_000], dtype=torch.int32)
    page, offset = token_rows(torch.tensor([5], dtype=torch.int32), table, 128)
    assert int(page * (4 * 128 * 128) + offset) == 3_000_000 * 4 * 128 * 128 + 5
    cache = kernels.portable.paged.CacheRows(tokens=64, per_block=1, per_page=2, heads=1024)
    row = cache.physical(table, torch.tensor([1], dtype=torch.int32))
    assert row.dtype == torch.int64
    assert int(row) == 3_000_000 * 2048 + 1
    with torch.device("meta"):
        ids = torch.empty(2**20, 4, 2**10, dtype=torch.int32)
    assert ids.numel() > 2**31  # the size such a table reaches; spans are plain Python integers
    (span,) = sequence_spans([0, 2**33], [0, 2**33], None, num_queries=2**33, num_keys=2**33)
    assert span.q_stop == 2**33


def test_pitfall_5_block_table_layout() -> None:
    """`[T, H, K]` read as `[H, T, K]` is refused where shapes tell, and gives other results where they do not."""
    q, k, v = torch.randn(16, 2, 4), torch.randn(16, 2, 4), torch.randn(16, 2, 4)
    ids = random_ids(16, 0, 2, 4, 2, False, torch.Generator().manual_seed(0))
    with pytest.raises(ValueError, match=r"\(2, 16, 2\).*\[16, 2, k\]"):
        kernels.block_sparse_attention(q, k, v, ids.transpose(0, 1), [0, 16], [0, 16], block_size=4)
    for implementation in ("reference", "portable"):
        out, _ = kernels.block_sparse_attention(
            q, k, v, ids, [0, 16], [0, 16], block_size=4, implementation=implementation
        )
        keep = selected_keys_mask(ids, 16, 4)[15, 1]
        close(out[15, 1], (q[15, 1] @ k[keep, 1].T * 0.5).softmax(-1) @ v[keep, 1])


def test_pitfall_9_packed_documents_have_budgets_and_blocks_of_their_own() -> None:
    """Each document chooses as if it were alone, from block 0 of its own."""
    index_q, index_k = torch.randn(100, 2, 8), torch.randn(100, 8)
    cu = [0, 37, 100]
    for implementation in ("reference", "portable"):
        run = {"block_size": 4, "topk_blocks": 3, "implementation": implementation}
        packed_ids = kernels.select_blocks(index_q, index_k, cu, cu, **run)
        for start, stop in pairwise(cu):
            alone = [0, stop - start]
            ids = kernels.select_blocks(index_q[start:stop], index_k[start:stop], alone, alone, **run)
            assert torch.equal(packed_ids[start:stop], ids)
            assert int(ids[-1].max()) == (stop - start - 1) // 4


def test_pitfall_10_the_additive_bias_is_exact_for_bf16_inputs() -> None:
    """An additive mask in bf16 rounds scores; the bias is fp32 with true -inf, and no kernel adds it anywhere."""
    bias = build_block_sparse_attn_bias(
        torch.randn(1, 20, 1, 8).bfloat16(), torch.randn(1, 20, 1, 8).bfloat16(), 4, 2, 0, 1, 2
    )
    assert (bias.dtype, bias.shape) == (torch.float32, (1, 2, 20, 20))
    assert set(bias.unique().tolist()) == {0.0, float("-inf")}
    # With scores near 256 a bf16 sum would lose everything below 1.
    q = torch.full((3, 1, 4), 16.0).bfloat16()
    k = torch.tensor([16.0, 15.9375, 15.875]).view(3, 1, 1).expand(3, 1, 4).contiguous().bfloat16()
    v = torch.eye(3, 4).unsqueeze(1).bfloat16()
    exact = ((q.double()[2, 0] @ k.double()[:, 0].T) * 0.5).softmax(-1)
    for implementation in ("reference", "portable"):
        out, _ = kernels.varlen_attention(q, k, v, [0, 3], [0, 3], implementation=implementation)
        assert (out[2, 0, :3].double() - exact).abs().max() < 2**-8


@pytest.mark.parametrize("implementation", ["reference", "portable"])
def test_pitfall_26_ties_go_to_the_lower_block(implementation: str) -> None:
    """Equal scores (negative and positive zero included) choose the lower ids; torch.topk would choose any."""
    for value in (1.0, -0.0, 0.0):
        index_k = torch.full((64 * 4, 4), value)
        index_q = torch.ones(256, 2, 4)
        index_q[:, 1] = -0.0
        run = {"block_size": 4, "topk_blocks": 5, "implementation": implementation}
        ids = kernels.select_blocks(index_q, index_k, [0, 256], [0, 256], **run)
        assert ids[255].tolist() == [[0, 1, 2, 3, 63]] * 2


def test_unavailable_implementations_are_errors() -> None:
    assert kernels.resolve(None, "select_blocks", "cpu", torch.float32) in ("native", "portable")
    assert kernels.resolve("reference", "select_blocks", torch.device("cpu"), torch.float32) == "reference"
    for name in ("triton", "nonsense"):
        with pytest.raises(ValueError, match=f"'{name}'.*available: (native, )?portable, reference"):
            kernels.resolve(name, "select_blocks", "cpu", torch.float32)


def test_impossible_requests_are_named() -> None:
    x, k = torch.randn(4, 1, 4), torch.randn(4, 4)
    with pytest.raises(ValueError, match="topk_blocks=2 must be at least 3"):
        kernels.select_blocks(x, k, [0, 4], [0, 4], block_size=4, topk_blocks=2, init_blocks=2)
    with pytest.raises(ValueError, match="score_type='mean'"):
        kernels.select_blocks(x, k, [0, 4], [0, 4], block_size=4, topk_blocks=2, score_type="mean")
    with pytest.raises(ValueError, match="cu_seqlens_k ends at 4 but the packed tensor holds 6"):
        kernels.select_blocks(x, k[:3].repeat(2, 1), [0, 3, 4], [0, 3, 4], block_size=4, topk_blocks=2)
    with pytest.raises(ValueError, match="need 6 keys"):
        kernels.varlen_attention(x, x, x, [0, 4], [0, 4], q_offset=[2])
    with pytest.raises(ValueError, match="4 query heads cannot share 3"):
        kernels.varlen_attention(torch.randn(2, 4, 4), torch.randn(2, 3, 4), torch.randn(2, 3, 4), [0, 2], [0, 2])


def test_empty_batches() -> None:
    """No token at all (a rank without work, a document without queries) is no error, forward or backward."""
    x = torch.randn(0, 4, 8, requires_grad=True)
    out, lse = kernels.varlen_attention(x, x, x, [0], [0])
    assert (out.shape, lse.shape) == ((0, 4, 8), (0, 4))
    ids = kernels.select_blocks(x, x[:, 0], [0, 0], [0, 0], block_size=4, topk_blocks=2)
    assert ids.shape == (0, 4, 2)
    sparse, _ = kernels.block_sparse_attention(x, x, x, ids, [0, 0], [0, 0], block_size=4)
    w13, w2 = torch.randn(2, 12, 8, requires_grad=True), torch.randn(2, 8, 6, requires_grad=True)
    choice, weights = torch.zeros(0, 2, dtype=torch.int64), torch.zeros(0, 2)
    y = kernels.grouped_experts(x[:, 0], w13, w2, choice, weights, alpha=1.702, limit=7.0)
    loss = kernels.indexer_kl(x, x, x, x[:, 0], None, [0, 0], [0, 0], block_size=4)
    (out.sum() + sparse.sum() + y.sum() + loss).backward()
    assert loss.item() == 0.0
    assert w13.grad is not None
    assert not w13.grad.any()


def test_tiles_do_not_show(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles of a long document, made tiny here, add up: selection, attention, its gradient and the alignment loss."""
    for module, name, size in (
        (kernels.portable.products, "_TILE_ROWS", 19),
        (kernels.portable.products, "_PRODUCT_ROWS", 12),
        (kernels.portable.select, "_TILE_ROWS", 10),
        (kernels.portable.select, "_TILE_SCORES", 400),
        (kernels.portable.products, "_DENSE_BLOCK", 5),
    ):
        monkeypatch.setattr(module, name, size)
    case = {"cu_q": [0, 77, 200], "cu_k": [0, 77, 220], "heads": 2, "group": 2, "block_size": 8, "topk": 3, "seed": 0}
    cu, generator = (case["cu_q"], case["cu_k"]), torch.Generator().manual_seed(2)
    index_q, index_k = (torch.randn(n, *h, 8, generator=generator) for n, h in ((200, (2,)), (220, ())))
    for local, score_type in ((1, "max"), (0, "max"), (2, "lse")):
        selection = {"block_size": 8, "topk_blocks": 3, "local_blocks": local, "score_type": score_type}
        ids = kernels.select_blocks(index_q, index_k, *cu, **selection)
        assert torch.equal(ids, kernels.select_blocks(index_q, index_k, *cu, implementation="reference", **selection))
        both("block_sparse_attention", list(tensors(case)), ids, *cu, block_size=8)
    q, k, _ = tensors(case)
    for chosen in (ids, None):
        results = []
        for implementation in ("reference", "portable"):
            leaves = [x.clone().requires_grad_() for x in (index_q, index_k)]
            loss = kernels.indexer_kl(q, k, *leaves, chosen, *cu, block_size=8, implementation=implementation)
            loss.backward()
            results.append([loss.detach(), *(leaf.grad for leaf in leaves)])
        for want, got in zip(*results):
            assert (got - want).abs().max() <= 1e-4 * want.abs().max()
