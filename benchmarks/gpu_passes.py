"""Passes over hidden states in Triton: share of the copy rate, and time beside plain operators, forward and backward.

Sizes of the released model (hidden 6144, 64 query heads of 128, experts of 3072), bf16. Few tokens are timed in a CUDA
graph: without the host's part, which graphs save.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.gpu_timing import DEVICE, copy_rate, graph_milliseconds, milliseconds, publish, randn
from benchmarks.report import Claim, arguments
from minim3 import kernels

HIDDEN, HEADS, DIM, WIDTH, EXPERTS, CHOICES = 6144, 64, 128, 3072, 128, 4

Pass = tuple[int, Callable[[str], object]]
"""Bytes read and written, and what runs an implementation."""


def passes(tokens: int) -> dict[str, Pass]:
    x, scale = randn(tokens, HIDDEN), torch.ones(HIDDEN, device=DEVICE)
    gate_up = randn(tokens, 2 * WIDTH, seed=1)
    heads, weight = randn(tokens, HEADS, DIM, seed=2), torch.zeros(DIM, device=DEVICE)
    angles = torch.rand(tokens, 32, device=DEVICE)
    turns = torch.cat([angles.cos(), angles.sin()], -1)

    def activate(implementation: str, both: Tensor) -> Tensor:
        return kernels.swiglu_oai(*both.chunk(2, dim=-1), 1.702, 7.0, implementation=implementation)

    def with_gradient(run: Callable[[str, Tensor], Tensor], x: Tensor) -> Callable[[str], object]:
        leaf, grad = x.clone().requires_grad_(), torch.ones((), device=DEVICE, dtype=x.dtype)

        def both(implementation: str) -> object:
            out = run(implementation, leaf)
            return torch.autograd.grad(out, leaf, grad.expand(out.shape))

        return both

    def norm(implementation: str, x: Tensor) -> Tensor:
        return kernels.rms_norm(x, scale, eps=1e-6, implementation=implementation)

    def turn(implementation: str, x: Tensor) -> Tensor:
        return kernels.norm_rope_store(x, weight, turns, eps=1e-6, implementation=implementation)

    size = 2 * tokens
    found: dict[str, Pass] = {
        "norm": (2 * size * HIDDEN, lambda i: norm(i, x)),
        "activation": (3 * size * WIDTH, lambda i: activate(i, gate_up)),
        "norm and rotation of 64 heads": (2 * size * HEADS * DIM, lambda i: turn(i, heads)),
    }
    if tokens >= 1024:
        found |= {
            "norm and its gradient": (5 * size * HIDDEN, with_gradient(norm, x)),
            "activation and its gradient": (8 * size * WIDTH, with_gradient(activate, gate_up)),
            "norm and rotation and their gradient": (5 * size * HEADS * DIM, with_gradient(turn, heads)),
        }
    return found


def choice_of_experts(tokens: int) -> dict[str, Callable[[], object]]:
    """In Triton, and in the operators of the module: the router's logits to weights and sorted assignments."""
    from minim3.kernels.triton import routing

    logits, bias = torch.randn(tokens, EXPERTS, device=DEVICE), torch.zeros(EXPERTS, device=DEVICE)

    def ours() -> object:
        ids, weights = routing.route(logits, bias, top_k=CHOICES, scoring_func="sigmoid", factor=2.0)
        return weights, routing.sort_by_expert(ids, EXPERTS)

    def plain() -> object:
        scores = logits.sigmoid()
        ids = (scores + bias).topk(CHOICES, sorted=False).indices
        weights = scores.gather(-1, ids)
        count = tokens * CHOICES
        tiles = count // 16 + min(EXPERTS, count)
        return weights / weights.sum(-1, keepdim=True) * 2.0, routing._sort_many(ids, EXPERTS, 16, tiles)

    return {"triton": ours, "portable": plain}


def main() -> None:
    parser = arguments(__doc__ or "")
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 64, 4096, 65536])
    options = parser.parse_args()
    rate = copy_rate()
    claims = [Claim("copy rate", None, rate / 1e12, "TB/s")]
    for tokens in options.tokens:
        clock = graph_milliseconds if tokens <= 64 else milliseconds
        for name, (size, run) in passes(tokens).items():
            times = {i: clock(lambda run=run, i=i: run(i)) for i in ("triton", "portable")}  # type: ignore[misc]
            name = f"{name}, {tokens} tokens"
            claims += [
                Claim(name, None, times["triton"] * 1e3, "us"),
                Claim(f"{name}, over plain operators", None, times["portable"] / times["triton"], "x"),
            ]
            if tokens >= 1024:
                claims.append(Claim(f"{name}, of the copy rate", None, size / times["triton"] * 1e5 / rate, "%"))
        if tokens <= 64:
            times = {i: graph_milliseconds(run) for i, run in choice_of_experts(tokens).items()}
            name = f"choice of experts, {tokens} tokens"
            claims += [
                Claim(name, None, times["triton"] * 1e3, "us"),
                Claim(f"{name}, over plain operators", None, times["portable"] / times["triton"], "x"),
            ]
    publish(claims, options.json)


if __name__ == "__main__":
    main()
