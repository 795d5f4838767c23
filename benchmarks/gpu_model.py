"""A 1.7 B-parameter M3 on a GPU, bf16: prefill, decoding and a training step, sparse against dense.

The dense side is the same model with full attention in every layer, attending with torch's flash kernel; its weights
and everything else are the same. Steps of decoding also run with and without CUDA graphs. Random weights; a step of
training is one forward and backward of one document, the sparse side with its alignment loss.
"""

import json
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu_timing import flash, milliseconds, publish
from benchmarks.report import Claim, arguments
from minim3 import kernels
from minim3.inference.engine import Engine
from minim3.inference.request import SamplingParams
from minim3.model.batch import ForwardBatch
from minim3.model.causal_lm import MiniMaxM3SparseForCausalLM

DEVICE = "cuda"

SIZES = {
    "hidden_size": 2048, "num_hidden_layers": 16, "num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128,
    "rotary_dim": 64, "dense_intermediate_size": 6144, "intermediate_size": 1024, "shared_intermediate_size": 1024,
    "num_local_experts": 16, "vocab_size": 32000, "max_position_embeddings": 1 << 20, "torch_dtype": "bfloat16",
    "moe_layer_freq": [0] + [1] * 15,
}  # fmt: skip


def make_model(sparse: bool) -> MiniMaxM3SparseForCausalLM:
    config = json.loads((Path(__file__).parent / "model.json").read_text())
    every = [0] + [int(sparse)] * 15
    config["sparse_attention_config"] |= {
        "sparse_index_dim": 128, "sparse_attention_freq": every, "sparse_disable_index_value": every
    }  # fmt: skip
    torch.manual_seed(0)
    with torch.device(DEVICE):
        return MiniMaxM3SparseForCausalLM.from_config(config | SIZES, dtype=torch.bfloat16).eval()


@contextmanager
def flash_attention() -> Iterator[None]:
    """Dense attention of one packed document runs torch's flash kernel."""
    ours = kernels.varlen_attention

    def attend(q: Tensor, k: Tensor, v: Tensor, *_: Any, **__: Any) -> tuple[Tensor, None]:
        return flash(q, k, v)()[0].transpose(0, 1), None

    kernels.varlen_attention = attend  # type: ignore[assignment]
    try:
        yield
    finally:
        kernels.varlen_attention = ours


def prefill(model: MiniMaxM3SparseForCausalLM, length: int) -> float:
    ids = torch.randint(3, 32000, (length,), device=DEVICE)
    batch = ForwardBatch.packed([length], ids.device)
    with torch.inference_mode():
        return milliseconds(lambda: model.text_model.forward_packed(model.embed_tokens_packed(ids), batch), 1000.0)


def decode(model: MiniMaxM3SparseForCausalLM, length: int, batch: int = 1, *, cuda_graphs: bool = True) -> float:
    """Median time of a step of `batch` requests, sampling included."""
    engine = Engine(model, max_tokens_per_step=1 << 14, cuda_graphs=cuda_graphs)
    for seed in range(batch):
        ids = torch.randint(3, 32000, (length,), generator=torch.Generator().manual_seed(seed)).tolist()
        engine.add_request(ids, SamplingParams(max_new_tokens=48, do_sample=False, ignore_eos=True))
    times = []
    while engine.scheduler.has_work:
        start = time.perf_counter()
        events = engine.step()  # which ends with the tokens on the host
        if len(events) == batch:
            times.append(time.perf_counter() - start)
    graphs = engine.runner.graphs
    assert (graphs is not None and graphs.num_recorded > 0) == cuda_graphs
    return statistics.median(times[len(times) // 2 :]) * 1e3


def train(model: MiniMaxM3SparseForCausalLM, length: int, sparse: bool) -> float:
    ids = torch.randint(3, 32000, (1, length), device=DEVICE)

    def step() -> None:
        out = model(ids, labels=ids, output_indexer_kl=sparse)
        loss = out.loss + sum(out.indexer_kl) if sparse else out.loss
        loss.backward()
        model.zero_grad()

    return milliseconds(step, 1000.0)


def main() -> None:
    parser = arguments(__doc__ or "")
    parser.add_argument("--prefill", type=int, nargs="+", default=[4096, 16384, 65536, 131072])
    parser.add_argument("--decode", type=int, nargs="+", default=[4096, 32768])
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 16], help="requests of a step as a graph")
    parser.add_argument("--train", type=int, nargs="+", default=[4096, 16384])
    options = parser.parse_args()
    found: dict[tuple[str, int], list[float]] = {}
    graphed: dict[tuple[int, int], tuple[float, float]] = {}
    for sparse in (True, False):
        model = make_model(sparse)
        for length in options.decode:
            found.setdefault(("a token of decoding", length), []).append(decode(model, length))
            if sparse:
                for batch in options.batch:
                    times = [decode(model, length, batch, cuda_graphs=graphs) for graphs in (True, False)]
                    graphed[length, batch] = (times[0], times[1])
        with flash_attention():
            for length in options.prefill:
                found.setdefault(("prefill", length), []).append(prefill(model, length))
            for length in options.train:
                found.setdefault(("a step of training", length), []).append(train(model, length, sparse))
        del model
        torch.cuda.empty_cache()
    claims = []
    for (what, length), (sparse_time, dense_time) in found.items():
        name = f"{what}, {length // 1024}K tokens"
        claims += [
            Claim(f"{name}, sparse", None, sparse_time, "ms"),
            Claim(f"{name}, dense", None, dense_time, "ms"),
            Claim(f"{name}, sparse over dense", None, dense_time / sparse_time, "x"),
        ]
    for (length, batch), (with_graphs, without) in graphed.items():
        name = f"a step of decoding, {batch} at {length // 1024}K tokens"
        claims += [
            Claim(f"{name}, as a graph", None, with_graphs, "ms"),
            Claim(f"{name}, launch by launch", None, without, "ms"),
            Claim(f"{name}, graph over launches", 3.0 if batch == 1 else None, without / with_graphs, "x"),
        ]
    publish(claims, options.json)


if __name__ == "__main__":
    main()
