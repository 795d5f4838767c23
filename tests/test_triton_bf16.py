"""Every Triton kernel in bf16, which GPUs run, interpreted: near the reference in fp32, gradients in their dtype."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from minim3 import kernels
from minim3.inference.engine import Engine
from minim3.inference.request import SamplingParams
from minim3.model.fused import FusedModel
from tests.interpreted import in_pages, interpreted, random_ids  # noqa: F401
from tests.tiny_models import random_ids as prompt_ids
from tests.tiny_models import text_model

CU = [0, 20, 37]
SHAPE = {"index_block_size": 16, "index_topk_blocks": 2, "num_hidden_layers": 2,
         "layer_types": ("full_attention", "minimax_m3_sparse"), "mlp_layer_types": ("dense", "sparse")}  # fmt: skip


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


Q, K, V = draw(37, 4, 32), draw(37, 2, 32, seed=1), draw(37, 2, 32, seed=2)
INDEX_Q, INDEX_K = draw(37, 2, 16, seed=3), draw(37, 16, seed=4)
IDS = random_ids(CU, CU, 2, 16, 2)
X, W13, W2 = draw(12, 32), draw(4, 48, 32, seed=1), draw(4, 32, 24, seed=2)
CHOICE = torch.stack([torch.randperm(4, generator=torch.Generator().manual_seed(n))[:2] for n in range(12)])
TURNS = torch.cat([torch.linspace(0, 1, 37 * 8).view(37, 8).cos(), torch.linspace(0, 1, 37 * 8).view(37, 8).sin()], -1)
GATES = draw(9, 40, seed=5), draw(9, 40, seed=6)

OPS: dict[str, tuple[list[Tensor], Callable[..., Any]]] = {
    "sparse attention": (
        [Q, K, V], lambda *a, **i: kernels.block_sparse_attention(*a, IDS, CU, CU, block_size=16, **i)[0]
    ),
    "dense attention": ([Q, K, V], lambda *a, **i: kernels.varlen_attention(*a, CU, CU, **i)[0]),
    "alignment": (
        [INDEX_Q, INDEX_K], lambda *a, **i: kernels.indexer_kl(*teacher(i), *a, IDS, CU, CU, block_size=16, **i)
    ),
    "experts": (
        [X, W13, W2],
        lambda *a, **i: kernels.grouped_experts(*a, CHOICE, torch.full((12, 2), 0.6), alpha=1.7, limit=2.0, **i),
    ),
    "norm": ([X, torch.linspace(0.5, 1.5, 32)], lambda *a, **i: kernels.rms_norm(*a, eps=1e-6, **i)),
    "norm and rotation": (
        [Q, torch.linspace(-0.5, 0.5, 32)], lambda *a, **i: kernels.norm_rope_store(*a, TURNS, eps=1e-6, **i)
    ),
    "activation": (list(GATES), lambda *a, **i: kernels.swiglu_oai(*a, 1.7, 0.9, **i)),
}  # fmt: skip


def teacher(how: dict[str, str]) -> list[Tensor]:
    return [x if how["implementation"] == "triton" else x.float() for x in (Q, K)]


@pytest.mark.parametrize("name", OPS)
def test_op_and_gradient(name: str) -> None:
    inputs, run = OPS[name]
    found = {}
    for implementation in ("reference", "triton"):
        leaves = [(x.float() if implementation == "reference" else x).clone().requires_grad_() for x in inputs]
        out = run(*leaves, implementation=implementation)
        (out.float() * torch.linspace(1, 2, out.numel()).view(out.shape)).sum().backward()
        found[implementation] = out.detach(), *(x.grad for x in leaves)
        if implementation == "triton":
            assert all(x.grad.dtype == x.dtype for x in leaves)
    for want, got in zip(found["reference"], found["triton"], strict=True):
        assert (got.float() - want).abs().max() <= 2e-2 * want.abs().max()


def test_selection_and_steps_over_pages() -> None:
    """Scores of integers are exact: the same choice; then a step of decoding over the chosen blocks."""
    (index_pages, table), (k_pages, _), (v_pages, _) = (
        in_pages(x, [0, 37], 16) for x in (INDEX_K.round(), K.contiguous(), V.contiguous())
    )
    where = table, [37], [0, 3]
    choose = {"block_size": 16, "topk_blocks": 2}
    ids = kernels.select_blocks_paged(
        INDEX_Q[:3].round(), index_pages, *where, implementation="triton", **choose
    )
    want = kernels.select_blocks(
        INDEX_Q[:3].round().float(), INDEX_K.round().float(), [0, 3], [0, 37], implementation="reference", **choose
    )
    assert torch.equal(ids, want)
    run = {"block_size": 16}
    out, _ = kernels.block_sparse_attention_paged(
        Q[:3], k_pages, v_pages, table, [37], ids, [0, 3], implementation="triton", **run
    )
    wide = kernels.block_sparse_attention(
        Q[:3].float(), K.float(), V.float(), ids, [0, 3], [0, 37], implementation="reference", **run
    )[0]
    assert (out.float() - wide).abs().max() <= 2e-2 * wide.abs().max()


def test_an_engine_in_bf16() -> None:
    """The fused decoder, over pages in bf16 and in 8 bits: about as near fp32 as the portable kernels in bf16."""
    found: dict[tuple, dict[int, float]] = {}
    for backend, dtype, cache in (
        (None, torch.float32, "auto"), (None, torch.bfloat16, "auto"),
        ("triton", torch.bfloat16, "auto"), ("triton", torch.bfloat16, "fp8"),
    ):  # fmt: skip
        model = text_model(5, backend=backend, **SHAPE).to(dtype)  # whose choices do not hang on a rounding
        engine = Engine(model, kv_cache_dtype=cache, poison=True)
        assert isinstance(engine.runner.decoding, FusedModel) == (backend == "triton")
        request = engine.add_request(
            prompt_ids(40).tolist(), SamplingParams(max_new_tokens=1, temperature=0.0, logprobs=20)
        )
        engine.run()
        known = request.logprobs[0]
        found[backend, dtype, cache] = dict(zip(known.top_token_ids, known.top_logprobs))
    exact, *others = found.values()
    errors = []
    for other in others:
        shared = exact.keys() & other.keys()
        assert len(shared) >= 12
        errors.append(sum(abs(exact[i] - other[i]) for i in shared) / len(shared))
    assert errors[1] <= 2 * errors[0] + 0.02
    assert errors[2] <= 2 * errors[0] + 0.2


def test_training_in_bf16() -> None:
    """Weights in bf16, alignment included: every gradient in its dtype, near that of fp32."""
    grads = []
    for dtype in (torch.float32, torch.bfloat16):
        model = text_model(1, backend="triton", **SHAPE).to(dtype)
        ids = prompt_ids(1, 44)
        out = model(ids, labels=ids, output_indexer_kl=True)
        (out.loss + sum(out.indexer_kl)).backward()
        grads.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
        assert all(p.grad is None or p.grad.dtype == p.dtype for p in model.parameters())
    want, got = grads
    assert want.keys() == got.keys()
    for name, grad in got.items():
        assert (grad.float() - want[name]).norm() <= 0.25 * want[name].norm() + 1e-4, name
