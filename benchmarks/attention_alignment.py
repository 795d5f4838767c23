"""The indexer's alignment loss with its gradient: over selected keys, and over all keys (warm-up).

The layer of `attention_prefill`, random selection. Its cost over selected keys grows with the length, over all keys
with its square. As in training, the teacher's log-sum-exps are those that attention has left; "alone" finds them again.
"In PyTorch" are the portable kernels, in the place of C where there are tiles.
"""

import statistics
from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.attention_prefill import (
    BLOCK,
    DIM,
    HEADS,
    KV_HEADS,
    Layer,
    finish,
    make_layer,
    options_of,
    selected_pairs,
    warm_up,
)
from benchmarks.report import Claim, alternate, product, share_of_products
from minim3 import kernels


def attended(layer: Layer, ids: Tensor | None) -> Tensor:
    """The log-sum-exps of attention, `[T, HEADS]`."""
    cu = layer.cu_seqlens
    if ids is None:
        return kernels.varlen_attention(layer.q, layer.k, layer.v, cu, cu)[1]
    return kernels.block_sparse_attention(layer.q, layer.k, layer.v, ids, cu, cu, block_size=BLOCK)[1]


def align(
    layer: Layer, ids: Tensor | None, lse: Tensor | None = None, implementation: str | None = None
) -> Callable[[], object]:
    index = [x.detach().requires_grad_() for x in (layer.index_q, layer.index_k)]
    cu = layer.cu_seqlens
    return lambda: torch.autograd.grad(
        kernels.indexer_kl(
            layer.q, layer.k, *index, ids, cu, cu, block_size=BLOCK, lse=lse, implementation=implementation
        ),
        index,
    )


def main() -> None:
    parser = options_of(__doc__ or "", [2048, 4096, 8192])
    parser.add_argument("--longest-warm-up", type=int, default=4096)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    claims: list[Claim] = []
    kinds = "selected keys", "selected keys, alone", "selected keys, in PyTorch", "all keys"
    lines: dict[str, dict[int, float]] = {kind: {} for kind in kinds}
    warm_up(lambda layer: align(layer, layer.select())())
    for length in options.lengths:
        layer = make_layer(length, "random")
        ids = layer.select()
        lse = attended(layer, ids)
        sides = {"product": product(), "selected keys": align(layer, ids, lse)}
        sides["selected keys, alone"] = align(layer, ids)
        sides["selected keys, in PyTorch"] = align(layer, ids, lse, "portable")
        if length <= options.longest_warm_up:
            sides["all keys"] = align(layer, None, attended(layer, None))
        seconds = alternate(sides, options.rounds, options.clock)
        for side, values in seconds.items():
            if side == "product":
                continue
            claims.append(Claim(f"alignment over {side}, {length} tokens", None, statistics.median(values), "s"))
            lines[side][length] = statistics.median(values)
        # Scores of both branches and the two gradients of the index branch.
        flops = 2 * (DIM * HEADS + 3 * DIM * KV_HEADS) * selected_pairs(ids) / HEADS
        share = share_of_products(flops, seconds["selected keys"], seconds["product"])
        claims.append(Claim(f"useful products of the alignment, {length} tokens", None, flops / 1e9, "GFLOP"))
        claims.append(Claim(f"share of the matrix rate, {length} tokens", None, share, "%"))
    finish(claims, seconds["product"], lines, "Alignment loss and gradient of one layer", options)


if __name__ == "__main__":
    main()
