"""Kernels on documents of up to 700 tokens: exact, linear in length, and blind to what fresh memory holds."""

import logging
import threading
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from minim3 import kernels
from minim3.kernels.portable import merging, products, threads
from minim3.kernels.sequences import Span

PROPERTY = settings(max_examples=12, deadline=None, derandomize=True)
DIM = 16


@pytest.fixture(autouse=True, scope="module")
def poisoned_memory() -> Iterator[None]:
    """Every tensor made without values starts as NaN."""
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.empty(3).isnan().all()
        assert torch.ones(1).new_empty(2, 3).isnan().all()
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def close(got: Tensor, want: Tensor, relative: float) -> None:
    assert got.shape == want.shape
    assert torch.isfinite(got).all()
    # Values here are of size 1. A gradient that cancels (of one key the weight is always 1) is 0 up to rounding.
    assert (got - want).abs().max() <= relative * want.abs().max().clamp_min(0.02)


def total(lengths: list[int]) -> list[int]:
    return [0, *torch.tensor(lengths).cumsum(0).tolist()]


class Case:
    """Packed documents with a selection of their own; queries are the last `lengths_q` tokens of each."""

    def __init__(
        self, lengths_k: list[int], lengths_q: list[int], seed: int = 0, block_size: int = 16, topk: int = 4,
        dtype: torch.dtype = torch.float32, like_integers: bool = False,
    ):  # fmt: skip
        g = torch.Generator().manual_seed(seed)
        self.cu = total(lengths_q), total(lengths_k)
        queries, keys = self.cu[0][-1], self.cu[1][-1]
        self.q = torch.randn(queries, 4, DIM, generator=g, dtype=dtype)
        self.k, self.v = torch.randn(2, keys, 2, DIM, generator=g, dtype=dtype)
        self.index_q = torch.randn(queries, 2, DIM, generator=g, dtype=dtype)
        self.index_k = torch.randn(keys, DIM, generator=g, dtype=dtype)
        if like_integers:
            self.index_q, self.index_k = self.index_q.round(), self.index_k.round()
        self.selection = {"block_size": block_size, "topk_blocks": topk}
        self.block_size = block_size

    def ids(self, implementation: str | None = None, **changes: object) -> Tensor:
        selection = self.selection | changes
        return kernels.select_blocks(self.index_q, self.index_k, *self.cu, implementation=implementation, **selection)

    def attend(self, ids: Tensor, implementation: str, scale: float | None = None) -> list[Tensor]:
        """out, lse and the gradients of q, k, v."""
        leaves = [x.clone().requires_grad_() for x in (self.q, self.k, self.v)]
        out, lse = kernels.block_sparse_attention(
            *leaves, ids, *self.cu, block_size=self.block_size, scale=scale, implementation=implementation
        )
        weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=out.dtype)
        return [out.detach(), lse, *torch.autograd.grad((out * weights).sum(), leaves)]

    def align(self, ids: Tensor | None, implementation: str, lse: Tensor | None = None) -> list[Tensor]:
        """The alignment loss and its gradients; `lse`: of the attention."""
        leaves = [x.clone().requires_grad_() for x in (self.index_q, self.index_k)]
        loss = kernels.indexer_kl(
            self.q, self.k, *leaves, ids, *self.cu, block_size=self.block_size, lse=lse, implementation=implementation
        )
        return [loss.detach(), *torch.autograd.grad(loss, leaves)]


@st.composite
def cases(draw: st.DrawFn) -> Case:
    lengths_k = draw(st.lists(st.integers(1, 700), min_size=1, max_size=2))
    whole = draw(st.booleans())
    lengths_q = lengths_k if whole else [draw(st.integers(1, n)) for n in lengths_k]
    block_size, topk = draw(st.sampled_from([(16, 4), (33, 3), (128, 2)]))
    return Case(lengths_k, lengths_q, draw(st.integers(0, 999)), block_size, topk)


@PROPERTY
@given(cases())
def test_attention_and_gradient_equal_reference(case: Case) -> None:
    ids = case.ids()
    want, got, again = (case.attend(ids, name) for name in ("reference", "portable", "portable"))
    for i, (a, b, c) in enumerate(zip(got, want, again)):
        close(a, b, 1e-5 if i < 2 else 1e-4)
        assert torch.equal(a, c)


@PROPERTY
@given(cases(), st.booleans(), st.sampled_from([None, "reference", "portable"]))
def test_alignment_and_gradient_equal_reference(case: Case, warm_up: bool, attended_by: str | None) -> None:
    ids, lse = None if warm_up else case.ids(), None
    if attended_by is not None and ids is not None:
        lse = case.attend(ids, attended_by)[1]
    elif attended_by is not None:
        _, lse = kernels.varlen_attention(case.q, case.k, case.v, *case.cu, implementation=attended_by)
    want, got, again = (case.align(ids, name, lse) for name in ("reference", "portable", "portable"))
    for i, (a, b, c) in enumerate(zip(got, want, again)):
        # A document of one token agrees with its teacher exactly: gradients of rounding size.
        assert (a - b).abs().max() <= (1e-4 if i else 1e-5) * b.abs().max() + 1e-8
        assert torch.equal(a, c)


def test_alignment_of_own_blocks_left_out() -> None:
    """Ids of another indexer may leave out a query's own block; teacher and student leave it out too."""
    case = Case([150], [150])
    ids = case.ids()
    ids[100:, :, -1] = ids[100:, :, 0]
    ids[100:, :, 0] = -1
    wanted = case.align(ids, "reference")
    for lse in (None, case.attend(ids, "reference")[1]):
        for got, want in zip(case.align(ids, "portable", lse), wanted):
            close(got, want, 1e-4)
    for got, want in zip(case.attend(ids, "portable"), case.attend(ids, "reference")):
        close(got, want, 1e-4)


@PROPERTY
@given(cases(), st.sampled_from([(0, 1), (1, 2), (0, 0)]))
def test_selection_is_as_good_as_the_reference(case: Case, forced: tuple[int, int]) -> None:
    """On random scores rounding may swap two blocks only if their scores are within 1e-5 of each other."""
    changes = {
        "init_blocks": forced[0],
        "local_blocks": forced[1],
        "topk_blocks": max(case.selection["topk_blocks"], 3),
    }
    want, got = case.ids("reference", **changes), case.ids("portable", **changes)
    assert torch.equal((got >= 0).sum(-1), (want >= 0).sum(-1))
    assert torch.equal(got, case.ids("portable", **changes))
    for row, head in (got != want).any(-1).nonzero().tolist():
        (n,) = [i for i in range(len(case.cu[0]) - 1) if case.cu[0][i] <= row < case.cu[0][i + 1]]
        position = row - case.cu[0][n + 1] + case.cu[1][n + 1] - case.cu[1][n]
        keys = case.index_k[case.cu[1][n] : case.cu[1][n] + position + 1].double()
        scores = (keys @ case.index_q[row, head].double() * DIM**-0.5).split(case.block_size)
        best = [float(x.max()) for x in scores]
        missed = set(want[row, head].tolist()) - set(got[row, head].tolist())
        taken = set(got[row, head].tolist()) - set(want[row, head].tolist())
        assert min(best[b] for b in taken) >= max(best[b] for b in missed) - 1e-5


@PROPERTY
@given(st.integers(1, 700), st.integers(0, 999), st.sampled_from([(0, 1), (2, 1), (1, 0)]))
def test_selection_of_integers_is_exact(length: int, seed: int, forced: tuple[int, int]) -> None:
    """Integer scores are exact in any order of summation, and full of ties."""
    case = Case([length], [length], seed, like_integers=True)
    changes = {"init_blocks": forced[0], "local_blocks": forced[1]}
    assert torch.equal(case.ids("portable", **changes), case.ids("reference", **changes))


def test_bf16_is_within_twice_the_error_of_dense_bf16() -> None:
    """Against fp64: the kernel in bf16 errs at most twice as much as plain dense attention in bf16."""
    case = Case([700], [700], dtype=torch.bfloat16)
    ids = case.ids()
    exact = Case([700], [700], dtype=torch.bfloat16)
    for name in ("q", "k", "v"):
        setattr(exact, name, getattr(exact, name).double())
    keep = kernels.reference.selected_keys_mask(ids, 700, 16).repeat_interleave(2, 1).transpose(0, 1)
    keep = keep & torch.ones(700, 700, dtype=torch.bool).tril()

    def dense(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        k, v = k.repeat_interleave(2, 1), v.repeat_interleave(2, 1)
        scores = torch.einsum("thd,shd->hts", q, k) * DIM**-0.5
        return torch.einsum("hts,shd->thd", scores.masked_fill(~keep, float("-inf")).softmax(-1), v)

    leaves = [x.clone().requires_grad_() for x in (case.q, case.k, case.v)]
    out = dense(*leaves)
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=out.dtype)
    rough = [out.detach(), *torch.autograd.grad((out * weights).sum(), leaves)]
    got = case.attend(ids, "portable")
    leaves = [x.clone().requires_grad_() for x in (exact.q, exact.k, exact.v)]
    out = dense(*leaves)
    want = [out.detach(), *torch.autograd.grad((out * weights.double()).sum(), leaves)]
    for a, b, truth in zip((got[0], *got[2:]), rough, want):
        assert (a.double() - truth).abs().max() <= 2 * (b.double() - truth).abs().max()


@pytest.mark.parametrize("size", [1.0, 6.0, 40.0])
def test_scores_of_any_size(monkeypatch: pytest.MonkeyPatch, size: float) -> None:
    """Scores that could leave fp32 relative to their reference are merged instead; no sum overflows or vanishes."""
    merged = []

    def merge(*args: Tensor) -> None:
        merged.append(args)
        sparse_forward(*args)

    sparse_forward = merging.sparse_forward
    monkeypatch.setattr(merging, "sparse_forward", merge)
    case = Case([300], [300], dtype=torch.float64)  # scores of thousands are rounded to 1e-4 in fp32, by either side
    case.q, case.k = case.q * size, case.k * size
    ids = case.ids()
    for i, (got, want) in enumerate(zip(case.attend(ids, "portable"), case.attend(ids, "reference"))):
        close(got, want, 1e-5 if i < 2 else 1e-4)
    assert bool(merged) == (size > 1)


def test_a_reference_that_is_no_score_is_not_used() -> None:
    """A query far from all it chose, and near its own key, which it did not choose: nothing may underflow."""
    case = Case([100], [100])
    direction = torch.nn.functional.normalize(torch.ones(DIM), dim=0)
    case.q[:] = 60 * direction
    case.k[:] = 4 * direction
    case.k[:16] = -4 * direction
    ids = torch.full((100, 2, 4), -1, dtype=torch.int32)
    ids[..., 0] = 0
    for got, want in zip(case.attend(ids, "portable")[:2], case.attend(ids, "reference")):
        close(got, want, 1e-5)


def test_both_forms_of_sparse_pieces_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case([70, 450], [33, 450], block_size=33, topk=3)
    ids = case.ids()
    plain = case.attend(ids, "portable")
    monkeypatch.setattr(products, "_REACH", float("-inf"))
    for i, (got, want) in enumerate(zip(case.attend(ids, "portable"), plain)):
        close(got, want, 1e-5 if i < 2 else 1e-4)


@pytest.mark.parametrize("reach", [60.0, float("-inf")])
def test_blocks_that_all_rows_choose(monkeypatch: pytest.MonkeyPatch, reach: float) -> None:
    """Runs of rows need no gather: initial blocks, a stretch that looks for one thing, rows that leave a block out."""
    monkeypatch.setattr(products, "_REACH", reach)
    case = Case([400], [390])
    case.index_q = case.index_q[::60].repeat_interleave(60, 0)[:390]
    ids = case.ids(init_blocks=1)
    runs = list(products.choices(ids, Span(0, 390, 0, 400, 10), 16)[0].rows_by_block)
    assert runs[0] == slice(6, 390)
    assert any(isinstance(rows, slice) and rows != runs[0] for rows in runs)
    assert any(isinstance(rows, Tensor) and rows.shape[0] for rows in runs)
    for i, (got, want) in enumerate(zip(case.attend(ids, "portable"), case.attend(ids, "reference"))):
        close(got, want, 1e-5 if i < 2 else 1e-4)
    for got, want in zip(case.align(ids, "portable"), case.align(ids, "reference")):
        close(got, want, 1e-4)


class LargestTensor(TorchDispatchMode):
    """Elements of the largest tensor any operator returns."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for x in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(x, Tensor):
                self.elements = max(self.elements, x.untyped_storage().nbytes() // x.element_size())
        return result


@pytest.mark.parametrize("op", ["attend", "align"])
def test_cost_is_linear_in_length(monkeypatch: pytest.MonkeyPatch, op: str) -> None:
    """Products over selected keys only, forward and backward, and never a tensor of all pairs."""
    monkeypatch.setattr(products, "_TILE_ROWS", 512)
    monkeypatch.setattr(threads, "_kept", threading.local())  # rooms of other tests may be larger
    flops = {}
    for length in (1024, 2048):
        case = Case([length], [length])
        ids = case.ids()
        with FlopCounterMode(display=False) as counter, LargestTensor() as largest:
            getattr(case, op)(ids, "portable")
        flops[length] = counter.get_total_flops()
        assert largest.elements < length * length // 8
    assert flops[2048] < 2.3 * flops[1024]


@pytest.mark.parametrize("implementation", ["reference", "portable"])
def test_pitfall_24_recomputation_picks_the_same_blocks(implementation: str) -> None:
    """Checkpointing runs the forward again, with gradients: scores that round otherwise would pick other blocks."""
    case, seen = Case([500], [500]), []

    def layer(x: Tensor) -> Tensor:
        index_q, index_k = case.index_q * x, case.index_k * x
        ids = kernels.select_blocks(index_q, index_k, *case.cu, implementation=implementation, **case.selection)
        seen.append(ids)
        return kernels.block_sparse_attention(
            case.q * x, case.k, case.v, ids, *case.cu, block_size=16, implementation=implementation
        )[0]

    x = torch.ones((), requires_grad=True)
    checkpoint(layer, x, use_reentrant=False).sum().backward()
    with torch.inference_mode():
        layer(x)
    assert len(seen) == 3
    assert not seen[0].requires_grad
    assert all(torch.equal(ids, seen[0]) for ids in seen)


# Norm, rotation and store


@pytest.mark.parametrize("heads", [1, 3])
@pytest.mark.parametrize("normed", [True, False])
def test_norm_rope_store_equals_reference(heads: int, normed: bool) -> None:
    """Value, gradient, and the places written: no other place of the pages changes, NaN as they are."""
    tokens, rotary_dim, page_size = 23, 6, 4
    x, weight = torch.randn(tokens, heads, DIM), torch.randn(heads, DIM) * 0.3
    angles = torch.randn(tokens, rotary_dim // 2)
    freqs_cis = torch.cat([angles.cos(), angles.sin()], -1)
    slots = torch.randperm(9 * page_size)[:tokens]
    shape = (9, page_size, DIM) if heads == 1 else (9, heads, page_size, DIM)
    results = []
    for implementation in ("reference", "portable"):
        pages = torch.full(shape, float("nan"))
        leaves = [x.clone().requires_grad_(), weight.clone().requires_grad_()]
        scale = leaves[1] if normed else None
        run = {"eps": 1e-6, "implementation": implementation}
        out = kernels.norm_rope_store(leaves[0], scale, freqs_cis, pages=pages, slots=slots, **run)
        grads = torch.autograd.grad(out.pow(2).cumsum(0).sum(), leaves, allow_unused=True)
        with torch.no_grad():
            quick = kernels.norm_rope_store(leaves[0], scale, freqs_cis, **run)
        results.append([out.detach(), quick, *grads[: 1 + normed], pages.nan_to_num(7.0)])
        assert int(pages.isfinite().sum()) == tokens * heads * DIM
        close(out.detach()[..., rotary_dim:], quick[..., rotary_dim:], 1e-6)
    for got, want in zip(results[1], results[0]):
        close(got, want, 1e-5)
    if not normed:
        assert torch.equal(results[1][0][..., rotary_dim:], x[..., rotary_dim:])


def test_norm_rope_store_in_bf16() -> None:
    """bf16 in and out, fp32 inside; pages of another dtype take the rounded result."""
    x, slots = torch.randn(5, 2, DIM).bfloat16(), torch.tensor([3, 9, 0, 14, 15])
    freqs_cis = torch.cat([torch.ones(5, 4) * 0.6, torch.ones(5, 4) * 0.8], -1)
    for implementation in ("reference", "portable"):
        pages = torch.zeros(2, 2, 8, DIM)
        run = {"eps": 1e-6, "implementation": implementation}
        out = kernels.norm_rope_store(x, torch.zeros(DIM), freqs_cis, pages=pages, slots=slots, **run)
        want = kernels.norm_rope_store(x.float(), torch.zeros(DIM), freqs_cis, **run)
        assert torch.equal(out, want.bfloat16())
        assert torch.equal(pages[1, :, 1], out[1].float())


def test_pages_that_do_not_fit_are_named() -> None:
    x, freqs_cis = torch.randn(5, 2, DIM), torch.ones(5, 4)
    for implementation in ("reference", "portable"):
        run = {"eps": 1e-6, "implementation": implementation}
        with pytest.raises(ValueError, match="belong together"):
            kernels.norm_rope_store(x, None, freqs_cis, pages=torch.zeros(2, 2, 8, DIM), **run)
        with pytest.raises(ValueError, match=r"\(5, 2, 16\) does not fit pages \(2, 3, 8, 16\)"):
            kernels.norm_rope_store(x, None, freqs_cis, pages=torch.zeros(2, 3, 8, DIM), slots=torch.arange(5), **run)


# Dispatch


def test_the_choice_is_made_once_and_logged(caplog: pytest.LogCaptureFixture) -> None:
    """One line for each op, device and dtype: which implementation runs, and why."""
    kernels._choose.cache_clear()
    with caplog.at_level(logging.INFO, logger="minim3.kernels"):
        for _ in range(3):
            case = Case([40], [40])
            case.attend(case.ids(), "reference")
            case.ids()
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == len(set(lines)) == 2
    name = kernels.resolve(None, "select_blocks", "cpu", torch.float32)
    assert lines[0].startswith(f"select_blocks on cpu in torch.float32 runs {name}: ")
    assert lines[1] == "block_sparse_attention on cpu in torch.float32 runs reference: requested"
    assert "no kernels for cuda" in kernels.choose(None, "select_blocks", "cuda", torch.bfloat16).reason
    with pytest.raises(ValueError, match="'triton' is not available"):
        case.ids("triton")


def test_tiles_cover_a_piece_once() -> None:
    tiles = list(products.tiles(Span(5, 10000, 7, 20000, 300)))
    assert [t.q_start for t in tiles] == [5, 4101, 8197]
    assert sum(t.num_queries for t in tiles) == 10000
    assert {t.offset - t.q_start for t in tiles} == {295}
