"""Decode of one layer over pages: a new token of each sequence, block-sparse against torch's dense SDPA.

The layer of `attention_prefill`. Ours selects blocks and attends them in shuffled pages, as the engine does; SDPA gets
keys and values that already lie in one piece. What bounds a step is the memory it reads: index keys, and the keys and
values of the selected blocks; keys and values of the whole context for SDPA.
"""

import statistics
from collections.abc import Callable

import torch
from torch.nn import functional as F

from benchmarks.attention_prefill import BLOCK, DIM, HEADS, KV_HEADS, TOPK, options_of
from benchmarks.report import Claim, alternate, copy_rate, plot_lines, publish, ratio
from minim3 import kernels


def sides_of(length: int, num_sequences: int) -> dict[str, Callable[[], object]]:
    """Both sides on tensors of their own: `num_sequences` of `length` tokens, the new one included."""
    g = torch.Generator().manual_seed(length)
    per_sequence = -(-length // BLOCK)
    num_pages = per_sequence * num_sequences
    k_pages, v_pages = torch.randn(2, num_pages, KV_HEADS, BLOCK, DIM, generator=g)
    index_k_pages = torch.randn(num_pages, BLOCK, DIM, generator=g)
    table = torch.randperm(num_pages, generator=g).view(num_sequences, per_sequence)
    q, index_q = (torch.randn(num_sequences, heads, DIM, generator=g) for heads in (HEADS, KV_HEADS))
    lengths, cu = [length] * num_sequences, list(range(num_sequences + 1))

    plan = kernels.PagedPlan(table, lengths, cu, BLOCK)  # in a model: once a step, for all layers

    def ours() -> object:
        ids = kernels.select_blocks_paged(
            index_q, index_k_pages, table, lengths, cu, block_size=BLOCK, topk_blocks=TOPK, plan=plan
        )
        return kernels.block_sparse_attention_paged(
            q, k_pages, v_pages, table, lengths, ids, cu, block_size=BLOCK, plan=plan
        )

    k, v = torch.randn(2, num_sequences, KV_HEADS, length, DIM, generator=g)
    return {"minim3": ours, "dense": lambda: F.scaled_dot_product_attention(q.unsqueeze(2), k, v, enable_gqa=True)}


@torch.inference_mode()
def main() -> None:
    parser = options_of(__doc__ or "", [4096, 16384, 65536])
    parser.add_argument("--sequences", type=int, nargs="+", default=[1, 8])
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    rate = copy_rate(options.clock)
    threads = f"{options.threads} thread{'s' * (options.threads > 1)}"
    claims = [Claim(f"memory copy, {threads}", None, rate / 1e9, "GB/s")]
    lines: dict[str, dict[int, float]] = {}
    for num_sequences in options.sequences:
        for length in options.lengths:
            sides = sides_of(length, num_sequences)
            alternate(sides, 2)
            seconds = alternate(sides, 10 * options.rounds, options.clock)
            name = f"{num_sequences} x {length} tokens"
            speed = ratio(seconds["dense"], seconds["minim3"])
            claims.append(Claim(f"decode over dense SDPA, {name}", None, speed, "x"))
            index_bytes, kv_bytes = 4 * length * DIM, 8 * min(TOPK * BLOCK, length) * KV_HEADS * DIM
            num_bytes = {"minim3": index_bytes + kv_bytes, "dense": 8 * length * KV_HEADS * DIM}
            for side, values in seconds.items():
                median, read = statistics.median(values), num_sequences * num_bytes[side]
                claims.append(Claim(f"decode, {side}, {name}", None, 1e3 * median, "ms"))
                claims.append(Claim(f"bytes to read, {side}, {name}", None, read / 1e6, "MB"))
                claims.append(Claim(f"share of the copy rate, {side}, {name}", None, 100 * read / median / rate, "%"))
                line = f"{'minim3' if side == 'minim3' else 'SDPA, dense'}, batch {num_sequences}"
                lines.setdefault(line, {})[length] = 1e3 * median
    publish(claims, options.json)
    if options.plot is not None:
        title = f"Decode of one layer's attention, 16/4 heads of 64, fp32, {threads}"
        plot_lines(options.plot, title, "milliseconds", lines)


if __name__ == "__main__":
    main()
