"""Selection and sparse attention with whole blocks of keys in C: the definition at any size, packed and in pages."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minim3 import kernels
from minim3.kernels import native
from minim3.kernels.native import prompts
from minim3.kernels.native.prompts import BlockMaxima
from tests.test_kernels_paged import Cache

pytestmark = pytest.mark.skipif(native.why_not() is not None, reason=str(native.why_not()))
PROPERTY = settings(max_examples=60, deadline=None, derandomize=True)


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Blocks that were scored in C."""
    blocks, into = [], BlockMaxima.into

    def counting(self: BlockMaxima, rows: Any, count: int, scores: Any) -> None:
        blocks.append(count)
        into(self, rows, count, scores)

    monkeypatch.setattr(BlockMaxima, "into", counting)
    return blocks


@PROPERTY
@given(
    st.lists(st.tuples(st.integers(1, 200), st.integers(0, 500)), min_size=1, max_size=3),
    st.sampled_from([16, 32, 48, 80]), st.integers(1, 40), st.integers(1, 5), st.integers(1, 4), st.integers(0, 1),
    st.integers(1, 2), st.booleans(), st.integers(0, 99),
)  # fmt: skip
def test_it_chooses_what_the_definition_chooses(
    lengths: list[tuple[int, int]], block: int, dim: int, heads: int, topk: int, init: int, local: int,
    integers: bool, seed: int,
) -> None:  # fmt: skip
    """Odd numbers of rows, keys and dimensions; documents with a past; ties, where numbers are integers."""
    generator = torch.Generator().manual_seed(seed)
    cu_q, cu_k = [0], [0]
    for new, past in lengths:
        cu_q.append(cu_q[-1] + new)
        cu_k.append(cu_k[-1] + past + new)
    q, k = torch.randn(cu_q[-1], heads, dim, generator=generator), torch.randn(cu_k[-1], dim, generator=generator)
    if integers:
        q, k = q.round(), k.round()
    how = {"block_size": block, "topk_blocks": max(topk, init + local), "init_blocks": init, "local_blocks": local}
    got = kernels.select_blocks(q, k, cu_q, cu_k, implementation="native", **how)
    want = kernels.select_blocks(q, k, cu_q, cu_k, implementation="reference", **how)
    if integers:
        assert torch.equal(got, want)
    else:  # sums in another order may turn a near tie
        assert (got != want).float().mean() < 1e-3
    assert torch.equal(got, kernels.select_blocks(q, k, cu_q, cu_k, implementation="native", **how))


def test_it_is_what_a_cpu_chooses_and_what_runs(counted: list[int]) -> None:
    q, k = torch.randn(300, 2, 24), torch.randn(300, 24)
    assert kernels.choose(None, "select_blocks", "cpu", torch.float32).name == "native"
    kernels.select_blocks(q, k, [0, 300], [0, 300], block_size=16, topk_blocks=3)
    assert counted
    counted.clear()
    kernels.select_blocks(q, k, [0, 300], [0, 300], block_size=16, topk_blocks=3, implementation="portable")
    assert not counted


@pytest.mark.parametrize("how", [
    {"score_type": "lse"}, {"local_blocks": 0}, {"block_size": 20},
])  # fmt: skip
def test_what_has_no_form_in_c_is_computed_in_torch(counted: list[int], how: dict[str, Any]) -> None:
    how = {"block_size": 16, "topk_blocks": 3, **how}
    q, k = torch.randn(300, 2, 24).double().round().float(), torch.randn(300, 24).round()
    if how.get("score_type") == "lse":
        q, k = torch.randn(300, 2, 24), torch.randn(300, 24)
    got = kernels.select_blocks(q, k, [0, 300], [0, 300], implementation="native", **how)
    want = kernels.select_blocks(q, k, [0, 300], [0, 300], implementation="reference", **how)
    assert (got != want).float().mean() < 1e-2
    assert not counted


def test_prompts_in_pages(counted: list[int]) -> None:
    """Keys in shuffled pages with NaN around them, a prompt in chunks beside a decoding sequence."""
    cache = Cache([130, 7, 400], 16, 2, 8, 3)
    paged, cu_q = (cache.page_table, cache.lengths), [0, 40, 41, 141]
    q = torch.randn(141, 2, 8, generator=torch.Generator().manual_seed(1)).round()
    how = {"block_size": 16, "topk_blocks": 4}
    got = kernels.select_blocks_paged(q, cache.index_k_pages, *paged, cu_q, implementation="native", **how)
    want = kernels.select_blocks_paged(q, cache.index_k_pages, *paged, cu_q, implementation="reference", **how)
    assert (got != want).float().mean() < 1e-3
    assert counted


def test_no_other_op_is_native() -> None:
    q = torch.randn(4, 2, 16)
    with pytest.raises(ValueError, match=r"'native' is not available for varlen_attention on cpu.*no kernel in C"):
        kernels.varlen_attention(q, q, q, [0, 4], [0, 4], implementation="native")
    with pytest.raises(ValueError, match="'fast' is unknown for select_blocks"):
        kernels.select_blocks(q, q[:, 0], [0, 4], [0, 4], block_size=16, topk_blocks=2, implementation="fast")


def test_heads_that_do_not_fit_are_refused() -> None:
    """C would read past the end of the keys."""
    with pytest.raises(ValueError, match="index_q has heads of 24, index_k of 16"):
        kernels.select_blocks(
            torch.randn(99, 2, 24), torch.randn(99, 16), [0, 99], [0, 99], block_size=16, topk_blocks=2
        )


# Sparse attention


@PROPERTY
@given(
    st.lists(st.tuples(st.integers(1, 250), st.integers(0, 200)), min_size=1, max_size=3),
    st.sampled_from([16, 32, 48]), st.sampled_from([16, 32, 48, 64, 80]), st.sampled_from([(2, 1), (2, 3), (1, 4)]),
    st.integers(2, 4), st.integers(0, 99),
)  # fmt: skip
def test_attention_over_chosen_blocks_is_the_definition(
    lengths: list[tuple[int, int]], block: int, dim: int, heads: tuple[int, int], topk: int, seed: int
) -> None:
    """Value and gradient; documents with a past, blocks and heads of every number of vectors, odd numbers of rows."""
    generator = torch.Generator().manual_seed(seed)
    kv_heads, group = heads
    cu_q, cu_k = [0], [0]
    for new, past in lengths:
        cu_q.append(cu_q[-1] + new)
        cu_k.append(cu_k[-1] + past + new)
    q = torch.randn(cu_q[-1], kv_heads * group, dim, generator=generator)
    k, v = (torch.randn(cu_k[-1], kv_heads, dim, generator=generator) for _ in range(2))
    index_q = torch.randn(cu_q[-1], kv_heads, 8, generator=generator)
    index_k = torch.randn(cu_k[-1], 8, generator=generator)
    ids = kernels.select_blocks(index_q, index_k, cu_q, cu_k, block_size=block, topk_blocks=topk)
    weight = torch.randn(q.shape, generator=generator)
    found = {}
    for implementation in ("native", "reference"):
        leaves = [x.clone().requires_grad_() for x in (q, k, v)]
        out, lse = kernels.block_sparse_attention(
            *leaves, ids, cu_q, cu_k, block_size=block, implementation=implementation
        )
        (out * weight).sum().backward()
        found[implementation] = out.detach(), lse.detach(), *(x.grad for x in leaves)
    for got, want, bound in zip(found["native"], found["reference"], (1e-5, 1e-5, 1e-4, 1e-4, 1e-4), strict=True):
        assert got is not None
        assert want is not None
        assert (got - want).abs().max() <= bound * want.abs().max().clamp(min=0.1)


def test_sparse_attention_runs_in_c_and_the_same_each_time(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[bool] = []

    def counting(way: Any) -> Any:
        def call(*args: Any) -> bool:
            calls.append(way(*args))
            return calls[-1]

        return call

    monkeypatch.setattr(prompts, "BLOCKS", prompts.BlockKernels(*map(counting, prompts.BLOCKS)))
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(500, 2, 16, generator=generator) for _ in range(3))
    ids = kernels.select_blocks(q, k[:, 0], [0, 500], [0, 500], block_size=16, topk_blocks=3)
    results = []
    for _ in range(2):
        leaves = [x.clone().requires_grad_() for x in (q, k, v)]
        out, _ = kernels.block_sparse_attention(*leaves, ids, [0, 500], [0, 500], block_size=16)
        forward = len(calls)
        out.square().sum().backward()
        assert len(calls) > forward
        results.append([out.detach(), *(x.grad for x in leaves)])
    assert calls
    assert all(calls)
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)
