"""Selection and attention on a GPU against torch's flash attention: the released shape, bf16.

64 query heads, 4 KV and index heads of 128, blocks of 128, top-16. Up to --whole tokens the whole sequence, beyond them
a chunk of 16K tokens at its end. Selections are random (every token for itself) or overlapping (stretches of 256 tokens
look for the same things, as in text). Backward (up to --backward tokens) is that of attention alone, on both sides.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.gpu_timing import (
    BLOCK,
    DIM,
    HEADS,
    KV_HEADS,
    TOPK,
    copy_rate,
    flash,
    index_queries,
    matrix_rate,
    milliseconds,
    publish,
    randn,
)
from benchmarks.report import Claim, arguments
from minim3 import kernels

CHUNK = 16384
BARS = {32768: 2.0, 131072: 5.0, 1048576: 10.0}


def pairs(ids: Tensor, offset: int) -> float:
    """(query, key) pairs of all query heads."""
    position = offset + torch.arange(ids.shape[0], device=ids.device)
    whole = (ids >= 0).sum(-1).double() - 1
    return float((whole * BLOCK + (position % BLOCK + 1)[:, None]).sum()) * (HEADS // KV_HEADS)


def main() -> None:
    parser = arguments(__doc__ or "")
    parser.add_argument("--lengths", type=int, nargs="+", default=[2048 << i for i in range(10)])
    parser.add_argument("--whole", type=int, default=131072)
    parser.add_argument("--backward", type=int, default=65536)
    parser.add_argument("--selections", nargs="+", default=["random", "overlapping"])
    options = parser.parse_args()
    claims = [
        Claim("copy of 4 GiB", None, copy_rate() / 1e9, "GB/s"),
        Claim("bf16 matrix product of 8192", None, matrix_rate() / 1e12, "TFLOP/s"),
    ]
    for length in options.lengths:
        claims += measure(length, options.whole, options.backward, options.selections, claims[1].measured)
        torch.cuda.empty_cache()
    publish(claims, options.json)


def measure(length: int, most: int, most_backward: int, selections: list[str], matrix: float) -> list[Claim]:
    queries = length if length <= most else CHUNK
    offset = length - queries
    q, k, v = randn(queries, HEADS, DIM), randn(length, KV_HEADS, DIM, seed=1), randn(length, KV_HEADS, DIM, seed=2)
    index_k = randn(length, DIM, seed=3)
    spans = [0, queries], [0, length]
    where = f"{length // 1024}K tokens" + (f", the last {queries // 1024}K" if offset else "")
    dense = milliseconds(flash(q, k, v))
    claims = [Claim(f"dense flash, {where}", None, dense, "ms")]
    dense_backward = 0.0
    if length <= most_backward:
        dense_backward = backward_of(lambda *x: flash(*x)(), q, k, v)
        claims.append(Claim(f"dense flash backward, {where}", None, dense_backward, "ms"))

    def select() -> Tensor:
        return kernels.select_blocks(index_q, index_k, *spans, block_size=BLOCK, topk_blocks=TOPK)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return kernels.block_sparse_attention(q, k, v, ids, *spans, block_size=BLOCK)[0]

    def both() -> Tensor:
        return kernels.block_sparse_attention(q, k, v, select(), *spans, block_size=BLOCK)[0]

    def align() -> Tensor:
        index = index_q.clone().requires_grad_(), index_k.clone().requires_grad_()
        return kernels.indexer_kl(q, k, *index, ids, *spans, block_size=BLOCK)

    for selection in selections:
        index_q = index_queries(queries, selection, offset)
        name = f"{where}, {selection}"
        ids = select()
        chosen, attended, together = milliseconds(select), milliseconds(lambda: attend(q, k, v)), milliseconds(both)
        causal = queries * (offset + (queries + 1) / 2)
        flops = 4 * DIM * pairs(ids, offset), 2 * DIM * KV_HEADS * causal
        judged = selection == "random"
        rate = sum(flops) / together / 1e9
        claims += [
            Claim(f"selection, {name}", None, chosen, "ms"),
            Claim(f"attention, {name}", None, attended, "ms"),
            Claim(
                f"selection + attention over dense flash, {name}", BARS.get(length) if judged else None,
                dense / together, "x",
            ),
            Claim(f"selection products, {name}", None, flops[1] / chosen / 1e9, "TFLOP/s"),
            Claim(f"attention products, {name}", None, flops[0] / attended / 1e9, "TFLOP/s"),
            Claim(f"useful products, {name}", 200.0 if judged and length == 131072 else None, rate, "TFLOP/s"),
            Claim(f"share of the matrix rate, {name}", None, 100 * rate / matrix, "%"),
        ]  # fmt: skip
        if dense_backward:
            time = backward_of(attend, q, k, v)
            bar = 2.0 if judged and length == 32768 else None
            claims += [
                Claim(f"backward, {name}", None, time, "ms"),
                Claim(f"backward over dense flash, {name}", bar, dense_backward / time, "x"),
                Claim(f"alignment loss and gradient, {name}", None, milliseconds(align), "ms"),
            ]
    return claims


def backward_of(attend: Callable[..., Tensor], q: Tensor, k: Tensor, v: Tensor) -> float:
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    out = attend(*leaves)
    weight = torch.randn_like(out)
    return milliseconds(lambda: torch.autograd.grad(out, leaves, weight, retain_graph=True))


if __name__ == "__main__":
    main()
