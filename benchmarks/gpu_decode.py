"""One step of decoding on a GPU against torch's flash attention: the released shape, bf16, pages of one block.

A step of both sides runs in a CUDA graph, so that the host's part does not count. Keys of different calls are apart, so
that no cache holds them.
"""

import torch
from torch import Tensor

from benchmarks.gpu_timing import (
    BLOCK,
    DEVICE,
    DIM,
    HEADS,
    KV_HEADS,
    TOPK,
    copy_rate,
    graph_milliseconds,
    publish,
    randn,
)
from benchmarks.report import Claim, arguments
from minim3 import kernels


def main() -> None:
    parser = arguments(__doc__ or "")
    parser.add_argument("--lengths", type=int, nargs="+", default=[4096, 16384, 32768, 131072, 524288, 1048576])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--most", type=int, default=1 << 23, help="tokens of all sequences at most")
    options = parser.parse_args()
    rate = copy_rate()
    claims = [Claim("copy of 4 GiB", None, rate / 1e9, "GB/s")]
    for batch in options.batches:
        for length in options.lengths:
            if batch * length <= options.most:
                claims += measure(batch, length, rate)
                torch.cuda.empty_cache()
    publish(claims, options.json)


def measure(batch: int, length: int, rate: float) -> list[Claim]:
    pages = length // BLOCK
    k, v = (randn(batch * pages, KV_HEADS, BLOCK, DIM, seed=seed) for seed in (1, 2))
    index = randn(batch * pages, BLOCK, DIM, seed=3)
    table = torch.randperm(batch * pages, device=DEVICE).view(batch, pages)
    lengths = torch.full((batch,), length, dtype=torch.int32, device=DEVICE)
    cu = torch.arange(batch + 1, dtype=torch.int32, device=DEVICE)
    q, index_q = randn(batch, HEADS, DIM, seed=4), randn(batch, KV_HEADS, DIM, seed=5)

    # A step makes its tables once, for all layers: here they are made beforehand.
    plan = kernels.DevicePlan(table, lengths, cu, BLOCK)
    where = table, lengths

    def select() -> Tensor:
        run = {"block_size": BLOCK, "topk_blocks": TOPK, "plan": plan}
        return kernels.select_blocks_paged(index_q, index, *where, cu, **run)

    def attend(ids: Tensor) -> Tensor:
        return kernels.block_sparse_attention_paged(q, k, v, *where, ids, cu, block_size=BLOCK, plan=plan)[0]

    ids = select()
    # Flash takes its keys in one piece: the same content, without pages.
    keys, values = (
        x.view(batch, pages, KV_HEADS, BLOCK, DIM).transpose(1, 2).reshape(batch, KV_HEADS, length, DIM)
        for x in (k, v)
    )
    dense = graph_milliseconds(lambda: dense_step(q, keys, values))
    paged = graph_milliseconds(lambda: kernels.paged_attention(q, k, v, *where, cu, plan=plan))
    chosen, attended = graph_milliseconds(select), graph_milliseconds(lambda: attend(ids))
    both = graph_milliseconds(lambda: attend(select()))
    name = f"{length // 1024}K tokens, batch {batch}"
    share = 100 * index.numel() * index.element_size() / chosen * 1e3 / rate
    bar = 70.0 if (batch, length) == (8, 131072) else None
    return [
        Claim(f"dense flash, {name}", None, dense * 1e3, "us"),
        Claim(f"dense over pages, {name}", None, paged * 1e3, "us"),
        Claim(f"selection, {name}", None, chosen * 1e3, "us"),
        Claim(f"attention, {name}", None, attended * 1e3, "us"),
        Claim(f"selection + attention over dense flash, {name}", 7.0 if length == 1 << 20 else 1.0, dense / both, "x"),
        Claim(f"selection's share of the copy rate, {name}", bar, share, "%"),
    ]


def dense_step(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """q `[B, Hq, D]`, k and v `[B, Hkv, S, D]`: the query heads of a group as rows, which reads keys once."""
    from torch.nn import functional as F
    from torch.nn.attention import SDPBackend, sdpa_kernel

    rows = q.view(q.shape[0], KV_HEADS, HEADS // KV_HEADS, DIM)
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        return F.scaled_dot_product_attention(rows, k, v)


if __name__ == "__main__":
    main()
