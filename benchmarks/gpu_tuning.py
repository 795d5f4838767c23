"""Variants of the sparse kernels at one length: which tile heights, key counts, warps and stages are fastest.

Prints a table; the constants of `minim3/kernels/triton` are set from it by hand.
"""

import itertools

import torch
from triton.runtime.errors import OutOfResources

from benchmarks.gpu_timing import BLOCK, DIM, HEADS, KV_HEADS, TOPK, index_queries, milliseconds, randn
from benchmarks.report import arguments
from minim3 import kernels
from minim3.kernels.triton import backward, by_key, layout, lists, prefill, select


def main() -> None:
    parser = arguments(__doc__ or "")
    parser.add_argument("--length", type=int, default=32768)
    parser.add_argument("--parts", nargs="+", default=["select", "forward", "by_key", "queries", "keys"])
    options = parser.parse_args()
    length = options.length
    q, k, v = randn(length, HEADS, DIM), randn(length, KV_HEADS, DIM, seed=1), randn(length, KV_HEADS, DIM, seed=2)
    index_k, cu = randn(length, DIM, seed=3), [0, length]
    where = layout.packed_layout(cu, cu, None, q, k)
    run = {"block_size": BLOCK, "topk_blocks": TOPK}
    if "select" in options.parts:
        index_q = index_queries(length, "random")
        table = select._Table(index_q, index_k, None, where, BLOCK, TOPK)
        first, count = table.parts()[0]
        print("scores", milliseconds(lambda: table.score(first, count, 0.1, TOPK, False)), "ms of", len(table.parts()))
        print("selection", milliseconds(lambda: kernels.select_blocks(index_q, index_k, cu, cu, **run)), "ms")
        for rows, group, warps in itertools.product((2, 4, 8, 16), (1, 4, 8, 16), (1, 2, 4)):
            select._CHOOSE_ROWS, select._GROUP, select._CHOOSE_WARPS = rows, group, warps
            attempt(
                f"choose rows {rows} group {group} warps {warps}",
                lambda: kernels.select_blocks(index_q, index_k, cu, cu, **run),
            )
        select._CHOOSE_ROWS, select._GROUP, select._CHOOSE_WARPS = 8, None, None
    for selection in ("random", "overlapping"):
        ids = kernels.select_blocks(index_queries(length, selection), index_k, cu, cu, **run)
        shape = {"page_table": None, "block_size": BLOCK, "scale": DIM**-0.5}
        if "forward" in options.parts:
            for rows, keys, warps, stages in itertools.product((16, 32, 64, 128), (64, 128), (4, 8), (2, 3)):
                prefill.SPARSE_KEYS, prefill.WARPS, prefill.STAGES = keys, warps, stages
                attempt(
                    f"forward {selection} rows {rows} keys {keys} warps {warps} stages {stages}",
                    lambda: prefill.forward(q, k, v, ids, where, rows=rows, **shape),  # noqa: B023
                )
            prefill.SPARSE_KEYS, prefill.WARPS, prefill.STAGES = 64, None, None
        out, lse = prefill.forward(q, k, v, ids, where, **shape)
        if "by_key" in options.parts:
            for by_key.ROWS, by_key.WARPS, by_key.STAGES in itertools.product((64, 128), (4, 8), (1, 2, 3)):
                attempt(
                    f"by key {selection} rows {by_key.ROWS} warps {by_key.WARPS} stages {by_key.STAGES}",
                    lambda: by_key.forward(q, k, v, ids, where, None, BLOCK, DIM**-0.5, out, lse),  # noqa: B023
                )
            by_key.ROWS, by_key.WARPS, by_key.STAGES = 64, 4, 2
        grad = torch.randn_like(out)
        delta = torch.empty_like(lse)
        found = lists.sparse_lists(ids, where, BLOCK)
        print("lists", milliseconds(lambda: lists.sparse_lists(ids, where, BLOCK)), "ms")  # noqa: B023
        if "queries" in options.parts:
            for rows, keys, warps in itertools.product((32, 64, 128), (64, 128), (4, 8)):
                prefill.SPARSE_KEYS, prefill.SPARSE_ROWS, backward.QUERY_WARPS = keys, rows, warps
                attempt(
                    f"grad q {selection} rows {rows} keys {keys} warps {warps}",
                    lambda: backward.query_gradient(grad, q, k, v, lse, delta, ids, where, BLOCK, 0.1, True),  # noqa: B023
                )
            prefill.SPARSE_KEYS, prefill.SPARSE_ROWS, backward.QUERY_WARPS = 64, 64, None
        if "keys" in options.parts:
            grad_k, grad_v = torch.empty_like(k), torch.empty_like(v)
            for rows, warps, stages in itertools.product((32, 64, 128), (4, 8), (1, 2, 3)):
                backward._LIST_ROWS, backward.KEY_WARPS, backward.KEY_STAGES = rows, warps, stages
                attempt(
                    f"grad k {selection} rows {rows} warps {warps} stages {stages}",
                    lambda: backward.key_gradients(
                        grad_k, grad_v, q, k, v, grad, lse, delta, found, where, BLOCK, 0.1, True  # noqa: B023
                    ),
                )  # fmt: skip
            backward._LIST_ROWS, backward.KEY_WARPS, backward.KEY_STAGES = 64, 8, 2


def attempt(name: str, run) -> None:
    try:
        print(f"{name}: {milliseconds(run, 60.0):.3f} ms", flush=True)
    except OutOfResources as error:
        print(f"{name}: {error}", flush=True)


if __name__ == "__main__":
    main()
