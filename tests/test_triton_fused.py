"""Norm, rotation and page store, experts and activations in Triton, interpreted: equal to the reference."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minim3 import kernels
from minim3.kernels import reference
from tests.interpreted import close, interpreted  # noqa: F401


def turns(tokens: int, rotary: int) -> torch.Tensor:
    angles = torch.rand(tokens, rotary // 2, generator=torch.Generator().manual_seed(9)) * 6
    return torch.cat([angles.cos(), angles.sin()], -1)


@pytest.mark.parametrize(("heads", "dim", "rotary", "weights"), [(3, 24, 8, 1), (9, 16, 16, 2), (1, 20, 6, 0)])
def test_norm_rope_store_equals_reference(
    heads: int, dim: int, rotary: int, weights: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Value, gradient and what the pages hold; pages shuffled, the rest of them untouched."""
    from minim3.kernels.triton import rotation

    monkeypatch.setattr(rotation, "_GRADIENT_NUMBERS", 64)
    monkeypatch.setattr(rotation, "_GRADIENT_PROGRAMS", 2)  # each takes several groups of rows
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(7, heads, dim, generator=generator)
    weight = [None, torch.randn(dim, generator=generator), torch.randn(heads, dim, generator=generator)][weights]
    slots = torch.tensor([17, 3, 4, 30, 0, 9, 31])
    results = []
    for implementation in ("reference", "triton"):
        leaf = x.clone().requires_grad_()
        scale = None if weight is None else weight.clone().requires_grad_()
        pages = torch.full((4, heads, 8, dim), float("nan"))
        run = {"eps": 1e-6, "implementation": implementation}
        out = kernels.norm_rope_store(leaf, scale, turns(7, rotary), pages=pages, slots=slots, **run)
        out.square().sum().backward()
        with torch.no_grad():
            again = kernels.norm_rope_store(x, weight, turns(7, rotary), **run)
        grads = [leaf.grad, *([] if scale is None else [scale.grad])]
        results.append([out.detach(), again, pages.nan_to_num(7.0), *grads])
    for want, got in zip(*results):
        close(got, want)
    if heads == 1:  # pages of index keys have no heads
        flat = torch.full((4, 8, dim), float("nan"))
        kernels.norm_rope_store(x, weight, turns(7, rotary), eps=1e-6, pages=flat, slots=slots, implementation="triton")
        assert torch.equal(flat.nan_to_num(7.0), results[1][2][:, 0])


def test_norm_rope_store_takes_views_of_a_packed_projection() -> None:
    wide = torch.randn(5, 6, 16, generator=torch.Generator().manual_seed(0)).half()
    x, weight = wide[:, 2:5], torch.randn(3, 32).half()[:, ::2]
    run = {"eps": 1e-5}
    got = kernels.norm_rope_store(x, weight, turns(5, 8), implementation="triton", **run)
    assert got.dtype == torch.float16
    close(got, kernels.norm_rope_store(x, weight, turns(5, 8), implementation="reference", **run), 2e-3)


@pytest.mark.parametrize("index_heads", [0, 2])
def test_all_heads_of_a_layer_in_one_launch(index_heads: int) -> None:
    """The same as head by head: q, k, index q, index key turned, v passed on, each key in its own pages."""
    from minim3.kernels.triton import rotation

    heads = 4, 2, index_heads
    sizes = [4, 2, *([index_heads, 1] if index_heads else []), 2]
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(5, sum(sizes), 24, generator=generator)
    weight = torch.randn(sum(sizes) - 2, 24, generator=generator)
    slots = torch.tensor([17, 3, 4, 30, 0])
    shapes = [(4, 2, 8, 24), (4, 2, 8, 24), (4, 8, 24)]
    pages, want_pages = ([torch.full(shape, float("nan")) for shape in shapes] for _ in range(2))
    got = rotation.norm_rope_store_packed(
        x, weight, turns(5, 8), eps=1e-6, heads=heads, slots=slots,
        pages=(pages[0], pages[1], pages[2] if index_heads else None),
    )  # fmt: skip
    parts = x.split(sizes, 1)
    turned = reference.norm_rope_store(torch.cat(parts[:-1], 1), weight, turns(5, 8), eps=1e-6)
    close(got, torch.cat([turned, parts[-1]], 1))
    for token, slot in enumerate(slots.tolist()):
        page, place = divmod(slot, 8)
        want_pages[0][page, :, place], want_pages[1][page, :, place] = turned[token, 4:6], parts[-1][token]
        if index_heads:
            want_pages[2][page, place] = turned[token, -1]
    for a, b in zip(pages, want_pages):
        close(a.nan_to_num(7.0), b.nan_to_num(7.0))
    with pytest.raises(ValueError, match="do not fit heads"):
        rotation.norm_rope_store_packed(x[:, 1:], weight, turns(5, 8), eps=1e-6, heads=heads)


def test_a_store_in_eight_bits_saturates() -> None:
    """e4m3 ends at 448 and has no infinity: a larger value must not be stored as NaN."""
    x = torch.tensor([500.0, -1e4, 3.0, 0.5] * 4).view(1, 1, 16)
    pages = torch.zeros(1, 1, 8, 16).to(torch.float8_e4m3fn)
    run = {"eps": 1e-6, "pages": pages, "slots": torch.tensor([5]), "implementation": "triton"}
    kernels.norm_rope_store(x, None, torch.cat([torch.ones(1, 2), torch.zeros(1, 2)], -1), **run)
    assert pages[0, 0, 5].float().tolist() == [448.0, -448.0, 3.0, 0.5] * 4


@pytest.mark.parametrize(
    ("tokens", "choices", "limit", "alpha"), [(1, 2, 4.0, 1.702), (18, 2, 0.7, 1.0), (3, 1, 0.0, 0.5)]
)
def test_grouped_experts_equal_reference(tokens: int, choices: int, limit: float, alpha: float) -> None:
    """Value and every gradient; expert 5 is never chosen, its gradient is zero and not what memory held."""
    generator = torch.Generator().manual_seed(tokens)
    x, w13, w2 = (torch.randn(*s, generator=generator) for s in ((tokens, 20), (6, 36, 20), (6, 20, 18)))
    weights = torch.rand(tokens, choices, generator=generator)
    ids = torch.stack([torch.randperm(5, generator=generator)[:choices] for _ in range(tokens)])
    results = []
    for implementation in ("reference", "triton", "triton"):
        leaves = [t.clone().requires_grad_() for t in (x, w13, w2, weights)]
        run = {"alpha": alpha, "limit": limit, "beta": 1.0, "implementation": implementation}
        out = kernels.grouped_experts(*leaves[:3], ids, leaves[3], **run)
        (out * torch.arange(20)).sum().backward()
        with torch.no_grad():
            quick = kernels.grouped_experts(x, w13, w2, ids, weights, **run)
        results.append([out.detach(), quick, *(leaf.grad for leaf in leaves)])
    for want, got, again in zip(*results):
        close(got, want, 2e-5)
        assert torch.equal(got, again)
    assert not results[1][3][5].any()


@pytest.mark.parametrize(("experts", "top_k", "scoring"), [(12, 3, "sigmoid"), (8, 1, "softmax"), (5, 5, "sigmoid")])
@pytest.mark.parametrize("biased", [False, True])
def test_route_equals_the_module(experts: int, top_k: int, scoring: str, biased: bool) -> None:
    """Pitfalls 1 and 2 of routers: the bias takes part in the choice alone, and weights add up to the factor."""
    from minim3.kernels.triton.routing import route

    generator = torch.Generator().manual_seed(experts)
    logits = torch.randn(9, experts, generator=generator) * 3
    bias = torch.randn(experts, generator=generator) if biased else None
    ids, weights = route(logits, bias, top_k=top_k, scoring_func=scoring, factor=2.5)
    scores = logits.sigmoid() if scoring == "sigmoid" else logits.softmax(-1)
    want = (scores if bias is None else scores + bias).topk(top_k).indices
    assert torch.equal(ids, want)
    picked = scores.gather(1, want)
    close(weights, picked / picked.sum(1, keepdim=True) * 2.5)


def test_route_of_nan_names_real_experts() -> None:
    """An id past the experts would be read from memory that is not theirs; NaN ranks highest, as in torch."""
    from minim3.kernels.triton.routing import route

    logits = torch.tensor([[1.0, float("nan"), 0.5, 0.2, 3.0], [float("nan")] * 5])
    ids, weights = route(logits, None, top_k=2, scoring_func="sigmoid", factor=1.0)
    assert ids.tolist() == [[1, 4], [0, 1]]
    assert weights.isnan().all()


@settings(max_examples=25, deadline=None, derandomize=True)
@given(tokens=st.integers(1, 40), experts=st.integers(1, 20), data=st.data())
def test_few_assignments_are_sorted_as_many_are(tokens: int, experts: int, data: st.DataObject) -> None:
    from minim3.kernels.triton import routing

    top_k = data.draw(st.integers(1, min(experts, 6)))
    generator = torch.Generator().manual_seed(tokens * 31 + experts)
    ids = torch.stack([torch.randperm(experts, generator=generator)[:top_k] for _ in range(tokens)])
    if data.draw(st.booleans()):
        ids = ids[:1].expand(tokens, -1)  # all to the same experts: several tiles each
    got = routing.sort_by_expert(ids, experts)
    want = routing._sort_many(ids.contiguous(), experts, got.rows, got.tiles.shape[0])
    for a, b in zip(got, want):
        assert a == b if isinstance(a, int) else torch.equal(a, b)


def test_grouped_experts_without_tokens() -> None:
    x, w13, w2 = torch.randn(0, 16), torch.randn(3, 8, 16), torch.randn(3, 16, 4)
    ids, weights = torch.empty(0, 2, dtype=torch.int64), torch.empty(0, 2)
    out = kernels.grouped_experts(x, w13, w2, ids, weights, alpha=1.0, limit=0.0, implementation="triton")
    assert out.shape == (0, 16)
    with pytest.raises(ValueError, match="must have one dtype"):
        kernels.grouped_experts(x, w13.half(), w2, ids, weights, alpha=1.0, limit=0.0, implementation="triton")


@pytest.mark.parametrize("shape", [(7,), (5, 37), (2, 3, 16), (0, 8)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_rms_norm_equals_reference(shape: tuple, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Value and gradient, of the scale too, whose sum over rows has one order."""
    from minim3.kernels.triton import norm

    monkeypatch.setattr(norm, "_NUMBERS", 64)
    monkeypatch.setattr(norm, "_PROGRAMS", 2)
    generator = torch.Generator().manual_seed(0)
    x, scale = torch.randn(shape, generator=generator).to(dtype), torch.rand(shape[-1], generator=generator) + 0.5
    weight = torch.randn(shape, generator=generator)
    results = []
    for implementation in ("reference", "triton", "triton"):
        leaves = [x.clone().requires_grad_(), scale.clone().requires_grad_()]
        out = kernels.rms_norm(*leaves, eps=1e-5, implementation=implementation)
        (out.float() * weight).sum().backward()
        results.append([out.detach(), *(leaf.grad for leaf in leaves)])
    for want, got, again in zip(*results):
        if want.numel():
            close(got, want, 1e-5 if dtype == torch.float32 else 2e-3)
        assert got.shape == want.shape
        assert torch.equal(got, again)


@pytest.mark.parametrize("limit", [0.0, 0.7])
@pytest.mark.parametrize("shape", [(9,), (5, 37), (2, 3, 16), (0, 8)])
def test_swiglu_equals_reference(shape: tuple, limit: float) -> None:
    """Value and gradient, also beyond the limit, where there is none; halves of a product as they lie."""
    both = torch.randn(*shape[:-1], 2 * shape[-1], generator=torch.Generator().manual_seed(0))
    weight = torch.linspace(1, 2, both.numel() // 2).view(shape)
    results = []
    for implementation in ("reference", "triton"):
        leaf = both.clone().requires_grad_()
        gate, up = leaf.chunk(2, dim=-1)
        out = kernels.swiglu_oai(gate, up, 1.702, limit, 0.5, implementation=implementation)
        (out * weight).sum().backward()
        with torch.no_grad():
            quick = kernels.swiglu_oai(gate, up, 1.702, limit, 0.5, implementation=implementation)
        results.append([out.detach(), quick, leaf.grad])
    for want, got in zip(*results):
        if want.numel():
            close(got, want)
        assert got.shape == want.shape


def test_layouts_that_only_look_dense() -> None:
    """A dimension of one may have any stride; a scale may be every other number of something."""
    generator = torch.Generator().manual_seed(0)
    gate = torch.randn(1, 4, 8, generator=generator).transpose(0, 1)
    assert gate.is_contiguous()
    got = kernels.swiglu_oai(gate, gate, 1.7, 0.5, implementation="triton")
    close(got, reference.swiglu_oai(gate, gate, 1.7, 0.5))
    x, scale = torch.randn(3, 8, generator=generator), torch.rand(16, generator=generator)[::2]
    close(kernels.rms_norm(x, scale, eps=1e-6, implementation="triton"), reference.rms_norm(x, scale, eps=1e-6))
    with pytest.raises(ValueError, match="scale has shape"):
        kernels.rms_norm(x, scale[:1], eps=1e-6, implementation="triton")
    with pytest.raises(ValueError, match="must have one shape"):
        kernels.swiglu_oai(gate, gate[:1], 1.7, 0.5, implementation="triton")


def test_sum_with_norm() -> None:
    from minim3.kernels.triton import fused

    generator = torch.Generator().manual_seed(0)
    x, residual = torch.randn(2, 3, 5, 37, generator=generator)
    weight = torch.randn(37, generator=generator)
    out, total = fused.add_norm(x, residual, weight, eps=1e-5)
    want = x + residual
    assert torch.equal(total, want)
    close(out, want * torch.rsqrt(want.square().mean(-1, keepdim=True) + 1e-5) * (1 + weight))
    same, unchanged = fused.add_norm(x, None, weight, eps=1e-5)
    assert unchanged is x
    close(same, x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-5) * (1 + weight))
    more = torch.randn(3, 5, 37, generator=generator).half()
    _, total = fused.add_norm(x.half(), residual.half(), weight, eps=1e-5, more=more)
    assert torch.equal(total, x.half() + more + residual.half())  # rounded after each sum, as the modules round
