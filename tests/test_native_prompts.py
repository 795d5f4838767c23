"""Selection and sparse attention with whole blocks of keys in C: the definition at any size, packed and in pages."""

from collections.abc import Iterator
from itertools import accumulate
from operator import add
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


def starts_of(lengths: list[tuple[int, int]]) -> tuple[list[int], list[int]]:
    """Where the queries and the keys of documents of so many (new tokens, tokens before them) begin and end."""
    new, past = zip(*lengths)
    return list(accumulate(new, initial=0)), list(accumulate(map(add, new, past), initial=0))


@pytest.fixture(params=["tiles", "vectors"], autouse=True, scope="module")
def products(request: pytest.FixtureRequest) -> Iterator[str]:
    """What multiplies: the tiles of the processor, where it has some, or vectors."""
    had = native.tiles()
    if request.param == "tiles" and not had:
        pytest.skip("this processor has no tiles (AMX)")
    native.use_tiles(request.param == "tiles")
    kernels._choose.cache_clear()
    yield request.param
    native.use_tiles(had)
    kernels._choose.cache_clear()


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
    cu_q, cu_k = starts_of(lengths)
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


def test_what_is_native_is_said(products: str) -> None:
    q = torch.randn(4, 2, 16)
    reason = kernels.choose(None, "select_blocks", "cpu", torch.float32).reason
    assert reason == "in C, compiled for this processor" + (", whose tiles (AMX) multiply" * (products == "tiles"))
    if products == "vectors":
        with pytest.raises(ValueError, match=r"'native' is not available for varlen_attention on cpu.*no tiles"):
            kernels.varlen_attention(q, q, q, [0, 4], [0, 4], implementation="native")
    # What has no kernel in C at all is left to PyTorch.
    assert kernels.choose("native", "grouped_experts", "cpu", torch.float32).name == "portable"


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
    st.sampled_from([16, 20, 32, 48]), st.sampled_from([16, 32, 48, 64, 80]), st.sampled_from([(2, 1), (2, 3), (1, 4)]),
    st.integers(2, 4), st.booleans(), st.integers(0, 99),
)  # fmt: skip
def test_attention_over_chosen_blocks_is_the_definition(
    lengths: list[tuple[int, int]], block: int, dim: int, heads: tuple[int, int], topk: int, own: bool, seed: int
) -> None:
    """Value and gradient; documents with a past, blocks and heads of every number of vectors, odd numbers of rows,
    rows that did not choose their own block."""
    generator = torch.Generator().manual_seed(seed)
    kv_heads, group = heads
    cu_q, cu_k = starts_of(lengths)
    q = torch.randn(cu_q[-1], kv_heads * group, dim, generator=generator)
    k, v = (torch.randn(cu_k[-1], kv_heads, dim, generator=generator) for _ in range(2))
    index_q = torch.randn(cu_q[-1], kv_heads, 8, generator=generator)
    index_k = torch.randn(cu_k[-1], 8, generator=generator)
    ids = kernels.select_blocks(
        index_q, index_k, cu_q, cu_k, block_size=block, topk_blocks=topk, local_blocks=int(own), init_blocks=1
    )
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

    ways = {name: counting(getattr(prompts.BLOCKS, name)) for name in ("add", "add_gradient")}
    monkeypatch.setattr(prompts, "BLOCKS", prompts.BLOCKS._replace(**ways))
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


@PROPERTY
@given(
    st.lists(st.tuples(st.integers(1, 700), st.integers(0, 300)), min_size=1, max_size=2),
    st.sampled_from([16, 64, 96]), st.sampled_from([(1, 1), (2, 3)]), st.floats(0.1, 8.0), st.integers(0, 99),
)  # fmt: skip
def test_dense_attention_is_the_definition(
    lengths: list[tuple[int, int]], dim: int, heads: tuple[int, int], size: float, seed: int
) -> None:
    """Value and gradient of dense layers; large scores leave the reach of products and are merged instead."""
    generator = torch.Generator().manual_seed(seed)
    kv_heads, group = heads
    cu_q, cu_k = starts_of(lengths)
    q = torch.randn(cu_q[-1], kv_heads * group, dim, generator=generator) * size
    k, v = (torch.randn(cu_k[-1], kv_heads, dim, generator=generator) for _ in range(2))
    weight = torch.randn(q.shape, generator=generator)
    found = {}
    for implementation in (None, "reference"):
        leaves = [x.double() if implementation else x.clone() for x in (q, k, v)]
        leaves = [x.requires_grad_() for x in leaves]
        out, lse = kernels.varlen_attention(*leaves, cu_q, cu_k, implementation=implementation)
        (out * weight).sum().backward()
        found[implementation] = out.detach(), lse.detach(), *(x.grad for x in leaves)
    for got, want, bound in zip(found[None], found["reference"], (1e-5, 1e-5, 1e-4, 1e-4, 1e-4), strict=True):
        assert got is not None
        assert want is not None
        assert (got - want).abs().max() <= bound * want.abs().max().clamp(min=0.1)


@PROPERTY
@given(
    st.lists(st.tuples(st.integers(513, 900), st.integers(0, 300)), min_size=1, max_size=2),
    st.sampled_from([16, 20, 48, 128]), st.sampled_from([(16, 64), (48, 32)]), st.sampled_from([(2, 1), (1, 3)]),
    st.booleans(), st.booleans(), st.booleans(), st.floats(0.1, 6.0), st.integers(0, 99),
)  # fmt: skip
def test_alignment_is_the_definition(
    lengths: list[tuple[int, int]], block: int, dims: tuple[int, int], heads: tuple[int, int], warm_up: bool,
    own: bool, attended: bool, size: float, seed: int,
) -> None:  # fmt: skip
    """Value and gradient of long documents, with the log-sum-exps of attention or without; any number of keys and rows,
    rows that did not choose their own block, scores far above that of the own key."""
    generator = torch.Generator().manual_seed(seed)
    kv_heads, group = heads
    cu_q, cu_k = starts_of(lengths)
    where = cu_q, cu_k
    q = torch.randn(cu_q[-1], kv_heads * group, dims[0], generator=generator)
    k = torch.randn(cu_k[-1], kv_heads, dims[0], generator=generator)
    index_q = torch.randn(cu_q[-1], kv_heads, dims[1], generator=generator) * size
    index_k = torch.randn(cu_k[-1], dims[1], generator=generator)
    ids = kernels.select_blocks(index_q, index_k, *where, block_size=block, topk_blocks=4, implementation="reference")
    if not own:
        ids[::3, :, -1] = -1  # ascending: most often the own one
        ids[(ids < 0).all(-1)] = 0
    chosen, lse = None if warm_up else ids, None
    if attended and warm_up:
        _, lse = kernels.varlen_attention(q, k, k, *where)
    elif attended:
        _, lse = kernels.block_sparse_attention(q, k, k, ids, *where, block_size=block)
    found = {}
    for implementation in (None, "reference"):
        leaves = [x.double() if implementation else x.clone() for x in (index_q, index_k)]
        leaves = [x.requires_grad_() for x in leaves]
        teacher = [x.double() if implementation else x for x in (q, k)]
        loss = kernels.indexer_kl(
            *teacher, *leaves, chosen, *where, block_size=block, implementation=implementation,
            lse=None if implementation else lse,
        )  # fmt: skip
        loss.backward()
        found[implementation] = loss.detach(), *(x.grad for x in leaves)
    for got, want, bound in zip(found[None], found["reference"], (1e-5, 1e-4, 1e-4), strict=True):
        assert got is not None
        assert want is not None
        assert (got - want).abs().max() <= bound * want.abs().max() + 1e-8


def test_products_on_tiles_are_those_of_fp32(products: str) -> None:
    """Parts of bf16 that are left out would show: two parts of three are off by 2^-17."""
    generator = torch.Generator().manual_seed(0)
    q, k = torch.randn(64, 1, 128, generator=generator), torch.randn(512, 128, generator=generator)
    maxima, scores = BlockMaxima(k, 32), torch.empty(64, 16)
    maxima.into(q[:, 0], 16, scores)
    want = (q[:, 0].double() @ k.double().t()).view(64, 16, 32).amax(-1)
    assert (scores - want).abs().max() < 4e-5  # of sums of 128 products of about 1


def test_nan_shows(products: str) -> None:
    """In a score and in what is attended, not elsewhere."""
    q, k, v = (torch.randn(300, 2, 32) for _ in range(3))
    v[250, 1] = float("nan")
    ids = kernels.select_blocks(q, k[:, 0], [0, 300], [0, 300], block_size=32, topk_blocks=3, local_blocks=1)
    out, _ = kernels.block_sparse_attention(q, k, v, ids, [0, 300], [0, 300], block_size=32)
    assert not out[:224].isnan().any()  # before its block
    assert not out[:, 0].isnan().any()
    assert out[250:256, 1].isnan().all()


def test_values_that_are_not_dense_are_taken() -> None:
    """A view whose last dimension is not the dense one would be read in the wrong order, or refused."""
    q, k = torch.randn(600, 2, 32), torch.randn(600, 1, 32)
    v = torch.randn(32, 600, 1).permute(1, 2, 0)
    got, _ = kernels.varlen_attention(q, k, v, [0, 600], [0, 600])
    want, _ = kernels.varlen_attention(q, k, v.contiguous(), [0, 600], [0, 600], implementation="reference")
    assert (got - want).abs().max() < 1e-5
    ids = kernels.select_blocks(q[:, :1], k[:, 0], [0, 600], [0, 600], block_size=32, topk_blocks=4)
    got, _ = kernels.block_sparse_attention(q, k, v, ids, [0, 600], [0, 600], block_size=32)
    dense = v.contiguous()
    how: dict[str, Any] = {"block_size": 32, "implementation": "reference"}
    want, _ = kernels.block_sparse_attention(q, k, dense, ids, [0, 600], [0, 600], **how)
    assert (got - want).abs().max() < 1e-5
