"""Prefill of one layer: block selection and block-sparse attention against torch's SDPA, dense causal and with a mask.

16 query heads, 4 KV and index heads of 64, blocks of 128, top-16, fp32. Ours includes the selection; the masked side is
handed the selected blocks and builds its mask from them. Selections are random (the worst case for locality: every
query chooses for itself) or overlapping (stretches of 256 tokens look for the same things, as in text).
"""

import argparse
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.report import (
    PRODUCT_FLOPS,
    Claim,
    alternate,
    arguments,
    plot_lines,
    product,
    publish,
    ratio,
    share_of_products,
)
from minim3 import kernels

HEADS, KV_HEADS, DIM, BLOCK, TOPK = 16, 4, 64, 128, 16
BARS = {("masked", 4096): 3.6, ("masked", 8192): 6.8, ("dense", 16384): 1.6, ("dense", 32768): 2.4}
SELECTIONS = ("random", "overlapping")
LONGEST_MASK = 8192  # a mask of 16 heads takes 5 GiB by then


class Layer(NamedTuple):
    """The tensors of one sequence: `[T, heads, D]`, index keys `[T, D]`."""

    q: Tensor
    k: Tensor
    v: Tensor
    index_q: Tensor
    index_k: Tensor

    @property
    def cu_seqlens(self) -> list[int]:
        return [0, self.q.shape[0]]

    def select(self) -> Tensor:
        cu = self.cu_seqlens
        return kernels.select_blocks(self.index_q, self.index_k, cu, cu, block_size=BLOCK, topk_blocks=TOPK)

    def attend(self, ids: Tensor) -> Tensor:
        cu = self.cu_seqlens
        return kernels.block_sparse_attention(self.q, self.k, self.v, ids, cu, cu, block_size=BLOCK)[0]

    def by_head(self) -> tuple[Tensor, Tensor, Tensor]:
        """q, k, v as SDPA takes them: `[1, heads, T, D]`."""
        q, k, v = (x.transpose(0, 1).unsqueeze(0).contiguous() for x in (self.q, self.k, self.v))
        return q, k, v


def make_layer(length: int, selection: str) -> Layer:
    g = torch.Generator().manual_seed(length)
    q, k, v, index_q = (torch.randn(length, heads, DIM, generator=g) for heads in (HEADS, KV_HEADS, KV_HEADS, KV_HEADS))
    if selection == "overlapping":
        topics = torch.randn(-(-length // 256), KV_HEADS, DIM, generator=g)
        index_q = topics.repeat_interleave(256, 0)[:length] + 0.3 * index_q
    return Layer(q, k, v, index_q, torch.randn(length, DIM, generator=g))


def dense_mask(ids: Tensor) -> Tensor:
    """The same choice for SDPA: bool `[1, Hq, T, T]`."""
    length = ids.shape[0]
    blocks = torch.zeros(length, KV_HEADS, -(-length // BLOCK) + 1, dtype=torch.bool)
    blocks.scatter_(-1, torch.where(ids < 0, blocks.shape[-1] - 1, ids).long(), True)
    mask = blocks[..., :-1].transpose(0, 1).repeat_interleave(BLOCK, -1)[..., :length]
    mask &= torch.ones(length, length, dtype=torch.bool).tril()
    return mask.repeat_interleave(HEADS // KV_HEADS, 0).unsqueeze(0)


def selected_pairs(ids: Tensor) -> int:
    """(query, key) pairs that attention has to look at, over all query heads."""
    position = torch.arange(ids.shape[0])
    full_blocks = (ids >= 0).sum(-1) - 1
    return int((full_blocks * BLOCK + (position % BLOCK + 1)[:, None]).sum()) * (HEADS // KV_HEADS)


def forward_flops(ids: Tensor) -> float:
    """Useful products: scores and values of the selected pairs, and index scores of all causal pairs."""
    length = ids.shape[0]
    return 4 * DIM * selected_pairs(ids) + 2 * DIM * KV_HEADS * length * (length + 1) / 2


def options_of(description: str, lengths: list[int]) -> argparse.ArgumentParser:
    """The options that the attention benchmarks share."""
    parser = arguments(description)
    parser.add_argument("--lengths", type=int, nargs="+", default=lengths)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall", help="cpu: for one thread, machine shared")
    parser.add_argument("--plot", type=Path, help="write a plot to this PNG file (needs matplotlib)")
    return parser


def finish(
    claims: list[Claim],
    products: list[float],
    lines: dict[str, dict[int, float]],
    title: str,
    options: argparse.Namespace,
) -> None:
    """Publish the claims after the rate of the machine's own product, and plot the lines if asked for."""
    threads = f"{options.threads} thread{'s' * (options.threads > 1)}"
    rate = PRODUCT_FLOPS / min(products) / 1e9
    publish([Claim(f"fp32 matrix product, {threads}", None, rate, "GFLOP/s"), *claims], options.json)
    if options.plot is not None:
        lines = {name: line for name, line in lines.items() if line}
        plot_lines(options.plot, f"{title}, fp32, {threads}", "seconds", lines)


def warm_up(run: Callable[[Layer], object]) -> None:
    run(make_layer(3 * BLOCK, "random"))


@torch.inference_mode()
def main() -> None:
    parser = options_of(__doc__ or "", [4096, 8192])
    parser.add_argument("--selections", nargs="+", choices=SELECTIONS, default=SELECTIONS)
    parser.add_argument("--longest-mask", type=int, default=LONGEST_MASK)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    claims: list[Claim] = []
    lines: dict[str, dict[int, float]] = {}
    warm_up(lambda layer: layer.attend(layer.select()))
    machine_product = product()
    for length in options.lengths:
        for selection in options.selections:
            layer = make_layer(length, selection)
            ids, heads = layer.select(), layer.by_head()
            rounds = max(1, options.rounds - (length > 4096) - (length > 8192))
            sides: dict[str, Callable[[], object]] = {
                "product": machine_product,
                "selection": layer.select,
                "attention": lambda layer=layer, ids=ids: layer.attend(ids),
                "minim3": lambda layer=layer: layer.attend(layer.select()),
                "dense": lambda heads=heads: F.scaled_dot_product_attention(*heads, is_causal=True, enable_gqa=True),
            }  # fmt: skip
            if length <= options.longest_mask:
                sides["masked"] = lambda heads=heads, ids=ids: F.scaled_dot_product_attention(
                    *heads, attn_mask=dense_mask(ids), enable_gqa=True
                )
            seconds = alternate(sides, rounds, options.clock)
            ours, name = seconds["minim3"], f"{length} tokens, {selection}"
            for side in ("masked", "dense"):
                if side in seconds:
                    bar = BARS.get((side, length)) if selection == "random" else None
                    claims.append(Claim(f"over {side} SDPA, {name}", bar, ratio(seconds[side], ours), "x"))
            for side, values in seconds.items():
                if side == "product":
                    continue
                claims.append(Claim(f"{side}, {name}", None, statistics.median(values), "s"))
                if side == "minim3":
                    lines.setdefault(f"minim3, {selection} selection", {})[length] = statistics.median(values)
                elif side in ("dense", "masked"):
                    lines.setdefault(f"SDPA, {side}", {})[length] = statistics.median(values)
            flops = forward_flops(ids)
            claims.append(Claim(f"useful products, {name}", None, flops / 1e9, "GFLOP"))
            share = share_of_products(flops, ours, seconds["product"])
            claims.append(Claim(f"share of the matrix rate, {name}", None, share, "%"))
    title = "Prefill of one layer, 16/4 heads of 64, top-16 blocks of 128"
    finish(claims, seconds["product"], lines, title, options)


if __name__ == "__main__":
    main()
