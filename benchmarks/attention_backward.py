"""Backward of one layer's attention against torch's SDPA, with the equivalent mask and dense causal.

The layer of `attention_prefill`, random selection; gradients of q, k and v, the forward before it not counted.
"""

import statistics
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.attention_prefill import DIM, dense_mask, finish, make_layer, options_of, selected_pairs, warm_up
from benchmarks.report import Claim, alternate, product, ratio, share_of_products

BARS = {("masked", 4096): 2.0}


def gradient(attend: Callable[..., Tensor], inputs: tuple[Tensor, ...]) -> Callable[[], object]:
    """The backward pass alone, repeatable: the graph is kept."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    out = attend(*leaves)
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(0))
    return lambda: torch.autograd.grad(out, leaves, weights, retain_graph=True)


def main() -> None:
    parser = options_of(__doc__ or "", [4096])
    parser.add_argument("--longest-mask", type=int, default=4096)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    claims: list[Claim] = []
    lines: dict[str, dict[int, float]] = {}
    warm_up(lambda layer: gradient(lambda q, k, v: layer._replace(q=q, k=k, v=v).attend(layer.select()), layer[:3])())
    for length in options.lengths:
        layer = make_layer(length, "random")
        ids, heads = layer.select(), layer.by_head()
        sides = {
            "product": product(),
            "minim3": gradient(lambda q, k, v, x=layer, ids=ids: x._replace(q=q, k=k, v=v).attend(ids), layer[:3]),
            "dense": gradient(
                lambda *x: F.scaled_dot_product_attention(*x, is_causal=True, enable_gqa=True), heads
            ),
        }  # fmt: skip
        if length <= options.longest_mask:
            mask = dense_mask(ids)
            sides["masked"] = gradient(
                lambda *x, mask=mask: F.scaled_dot_product_attention(*x, attn_mask=mask, enable_gqa=True), heads
            )
        seconds = alternate(sides, options.rounds, options.clock)
        for side in ("masked", "dense"):
            if side in seconds:
                speed = ratio(seconds[side], seconds["minim3"])
                claims.append(
                    Claim(f"backward over {side} SDPA, {length} tokens", BARS.get((side, length)), speed, "x")
                )
        for side, values in seconds.items():
            if side == "product":
                continue
            claims.append(Claim(f"backward, {side}, {length} tokens", None, statistics.median(values), "s"))
            line = "minim3" if side == "minim3" else f"SDPA, {side}"
            lines.setdefault(line, {})[length] = statistics.median(values)
        flops = 10 * DIM * selected_pairs(ids)
        claims.append(Claim(f"useful products of the backward, {length} tokens", None, flops / 1e9, "GFLOP"))
        share = share_of_products(flops, seconds["minim3"], seconds["product"])
        claims.append(Claim(f"share of the matrix rate, {length} tokens", None, share, "%"))
    finish(
        claims,
        seconds["product"],
        lines,
        "Backward of one layer's attention, 16/4 heads of 64, top-16 blocks of 128",
        options,
    )


if __name__ == "__main__":
    main()
