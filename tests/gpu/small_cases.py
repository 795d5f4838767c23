"""Every kernel once, on small inputs, against the reference: a first look at a device, and food for memory checkers.

    python3 tests/gpu/small_cases.py
    compute-sanitizer --tool memcheck python3 tests/gpu/small_cases.py
    TRITON_INTERPRET=1 python tests/gpu/small_cases.py --device cpu
"""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[2]))

from minim3 import kernels
from minim3.kernels import reference

CU_Q, CU_K, BLOCK = [0, 37, 50], [0, 90, 103], 16


def run_all(device: str) -> dict[str, float]:
    """Largest relative error of each op, gradients included."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(device)

    q, k, v = draw(50, 8, 64), draw(103, 2, 64), draw(103, 2, 64)
    index_q, index_k = draw(50, 2, 64).round(), draw(103, 64).round()
    selection = {"block_size": BLOCK, "topk_blocks": 3}
    ids = kernels.select_blocks(index_q, index_k, CU_Q, CU_K, implementation="reference", **selection)
    pages, table = 16, torch.randperm(14, generator=generator).view(2, 7).to(device)
    lengths = [90, 13]
    k_pages, v_pages = torch.full((2, pages, 2, BLOCK, 64), float("nan"), device=device)
    index_pages = torch.full((pages, BLOCK, 64), float("nan"), device=device)
    for n, length in enumerate(lengths):
        for p in range(length):
            page, place = table[n, p // BLOCK], p % BLOCK
            k_pages[page, :, place], v_pages[page, :, place] = k[CU_K[n] + p], v[CU_K[n] + p]
            index_pages[page, place] = index_k[CU_K[n] + p]
    x, w13, w2, weights = draw(30, 32), draw(4, 48, 32), draw(4, 32, 24), draw(30, 2).abs()
    choice = torch.stack([torch.randperm(3, generator=generator)[:2] for _ in range(30)]).to(device)
    angles = torch.rand(50, 16, generator=generator).to(device)
    turns = torch.cat([angles.cos(), angles.sin()], -1)
    one = table[:1], [90], [0, 1]
    ops: dict[str, tuple[list[Tensor], Callable[..., object]]] = {
        "select_blocks": ([], lambda **i: kernels.select_blocks(index_q, index_k, CU_Q, CU_K, **selection, **i)),
        "select_blocks_paged": (
            [], lambda **i: kernels.select_blocks_paged(index_q, index_pages, table, lengths, CU_Q, **selection, **i)
        ),
        "decoding, selection": (
            [], lambda **i: kernels.select_blocks_paged(index_q[36:37], index_pages, *one, **selection, **i)
        ),
        "block_sparse_attention": (
            [q, k, v], lambda *a, **i: kernels.block_sparse_attention(*a, ids, CU_Q, CU_K, block_size=BLOCK, **i)
        ),
        "varlen_attention": ([q, k, v], lambda *a, **i: kernels.varlen_attention(*a, CU_Q, CU_K, **i)),
        "block_sparse_attention_paged": (
            [], lambda **i: kernels.block_sparse_attention_paged(
                q, k_pages, v_pages, table, lengths, ids, CU_Q, block_size=BLOCK, **i
            ),
        ),
        "paged_attention": ([], lambda **i: kernels.paged_attention(q, k_pages, v_pages, table, lengths, CU_Q, **i)),
        "decoding, sparse": (
            [], lambda **i: kernels.block_sparse_attention_paged(
                q[36:37], k_pages, v_pages, *one[:2], ids[36:37], one[2], block_size=BLOCK, **i
            ),
        ),
        "decoding, dense": ([], lambda **i: kernels.paged_attention(q[36:37], k_pages, v_pages, *one, **i)),
        "indexer_kl": (
            [index_q, index_k], lambda *a, **i: kernels.indexer_kl(q, k, *a, ids, CU_Q, CU_K, block_size=BLOCK, **i)
        ),
        "indexer_kl, warm-up": (
            [index_q, index_k], lambda *a, **i: kernels.indexer_kl(q, k, *a, None, CU_Q, CU_K, block_size=BLOCK, **i)
        ),
        "grouped_experts": (
            [x, w13, w2, weights],
            lambda a, b, c, d, **i: kernels.grouped_experts(a, b, c, choice, d, alpha=1.7, limit=2.0, **i),
        ),
        "norm_rope_store": (
            [q, v[0, 0]], lambda a, b, **i: kernels.norm_rope_store(a, b, turns, eps=1e-6, **i)
        ),
        "rms_norm": ([x, x[0]], lambda a, b, **i: kernels.rms_norm(a, b, eps=1e-6, **i)),
        "swiglu_oai": ([x, torch.ones_like(x)], lambda a, b, **i: kernels.swiglu_oai(a, b, 1.7, 0.9, **i)),
    }  # fmt: skip
    found = {name: error(leaves, run) for name, (leaves, run) in ops.items()}
    return found | fused_errors(q, k, v, turns)


def fused_errors(q: Tensor, k: Tensor, v: Tensor, turns: Tensor) -> dict[str, float]:
    """Of what the decoder of inference runs besides."""
    from minim3.kernels.triton import fused, rotation, routing

    heads = torch.cat([q, k[:50], v[:50]], 1)
    weight, slots = q[0, 0].expand(10, -1).contiguous(), torch.arange(50, device=q.device)
    pages = (*torch.zeros(2, 4, 2, BLOCK, 64, device=q.device), None)
    got = rotation.norm_rope_store_packed(heads, weight, turns, eps=1e-6, heads=(8, 2, 0), pages=pages, slots=slots)
    want = reference.norm_rope_store(heads[:, :10], weight, turns, eps=1e-6)
    stored = pages[0].transpose(1, 2).reshape(-1, 2, 64)[:50]
    normed, total = fused.add_norm(q, v[0].expand(50, 4, 2, 64).reshape(50, 8, 64), weight[0], eps=1e-6, more=q)
    logits = q[:, 0, :20].contiguous()
    ids, weights = routing.route(logits, None, top_k=4, scoring_func="sigmoid", factor=2.0)
    scores, wanted_ids = logits.sigmoid().topk(4)
    few, many = (make(ids, 20, 16, 32) for make in (routing._sort_few, routing._sort_many))
    pairs = {
        "norm_rope_store_packed": (torch.cat([got[:, :10], stored], 1), torch.cat([want, want[:, 8:]], 1)),
        "add_norm": (normed, reference.rms_norm(total, 1.0 + weight[0], eps=1e-6)),
        "route": (weights, scores / scores.sum(1, keepdim=True) * 2.0),
    }
    found = {name: float((a.double() - b.double()).abs().max() / b.abs().max()) for name, (a, b) in pairs.items()}
    exact = torch.equal(ids, wanted_ids) and all(torch.equal(a, b) for a, b in zip(few[:5], many[:5]))
    nan = torch.tensor([[1.0, float("nan")], [float("nan"), 1.0]], device=q.device)
    shown = kernels.swiglu_oai(nan, nan.flip(0), 1.7, 0.5, implementation="triton").isnan().all()
    return found | {"route and sort, ids": 0.0 if exact else 1.0, "NaN shows": 0.0 if shown else 1.0}


def error(inputs: list[Tensor], run: Callable[..., object]) -> float:
    results = []
    for implementation in ("reference", "triton"):
        leaves = [x.clone().requires_grad_() for x in inputs]
        out = run(*leaves, implementation=implementation)
        values = list(out) if isinstance(out, tuple) else [out]
        if leaves:
            weight = torch.linspace(1, 2, values[0].numel(), device=values[0].device)
            (values[0] * weight.view_as(values[0])).sum().backward()
        results.append([*(x.detach().double() for x in values), *(x.grad.double() for x in leaves)])
    return max(float((b - a).abs().max() / a.abs().max()) for a, b in zip(*results))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda")
    errors = run_all(parser.parse_args().device)
    for name, value in errors.items():
        print(f"{name}: {value:.1e}")
    if not all(value < 1e-4 for value in errors.values()):
        sys.exit("some kernel is not equal to the reference")
