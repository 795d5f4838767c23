"""What keys and values in 8 bits (float8_e4m3fn) cost: one layer's error, and pocket's answers.

The layer has the released shape and random inputs: the error of its output against fp64, with keys, values and index
keys stored in bf16 and in 8 bits, and how many blocks are chosen alike. Pocket answers the same fresh questions with
its cache in fp32 and in 8 bits. Nothing is timed: on a CPU the numbers are widened before each use.
"""

from typing import Any
from unittest import mock

import torch
from torch import Tensor

from benchmarks.report import Claim, arguments, publish
from benchmarks.weight_formats import Answers
from minim3 import kernels
from minim3.inference.cache import bytes_per_token
from minim3.inference.engine import Engine
from minim3.loading import load
from minim3.pocket import evaluate

HEADS, KV_HEADS, DIM, BLOCK, TOPK = 64, 4, 128, 128, 16


def layer_claims(length: int, queries: int) -> list[Claim]:
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    q, index_q = draw(queries, HEADS, DIM), draw(queries, KV_HEADS, DIM)
    k, v, index_k = draw(length, KV_HEADS, DIM), draw(length, KV_HEADS, DIM), draw(length, DIM)
    where = [0, queries], [0, length]
    run = {"block_size": BLOCK, "implementation": "reference"}

    def choose(dtype: torch.dtype) -> Tensor:
        return kernels.select_blocks(index_q, index_k.to(dtype).double(), *where, topk_blocks=TOPK, **run)

    exact = choose(torch.float64)
    want, _ = kernels.block_sparse_attention(q, k, v, exact, *where, **run)
    claims = []
    for name, dtype in (("bf16", torch.bfloat16), ("8 bits", torch.float8_e4m3fn)):
        got, _ = kernels.block_sparse_attention(q, k.to(dtype).double(), v.to(dtype).double(), exact, *where, **run)
        error = 100 * float((got - want).norm() / want.norm())
        found = choose(dtype)
        alike = 100 * float((found.unsqueeze(-1) == exact.unsqueeze(-2)).any(-1).double().mean())
        claims.append(Claim(f"a layer of {length} tokens: error of the output, {name}", None, error, "%"))
        claims.append(Claim(f"a layer of {length} tokens: blocks chosen alike, {name}", None, alike, "%"))
    return claims


def pocket_claims(num_pictures: int, num_text: int) -> list[Claim]:
    claims, given = [], {}
    right: dict[str, dict[str, float]] = {}
    for name in ("auto", "fp8"):
        model, processor = load()
        asked = Answers(model, processor)
        made = []

        def engine(*args: Any, name: str = name, made: list[Engine] = made, **options: Any) -> Engine:
            made.append(Engine(*args, kv_cache_dtype=name, **options))
            return made[-1]

        with mock.patch("minim3.inference.generate.Engine", engine):
            report = evaluate.evaluate(asked, num_pictures, num_text_tasks=num_text)
        given[name] = asked.given
        assert made
        assert all((one.cache.dtype == torch.float8_e4m3fn) == (name == "fp8") for one in made)
        parts = {part: found for part, found in report.items() if isinstance(found, dict)}
        right[name] = {part: found["accuracy"] for part, found in parts.items() if "accuracy" in found}
    for part, before in right["auto"].items():
        claims.append(Claim(f"pocket, {part}: right, fp32", None, before, "%"))
        claims.append(Claim(f"pocket, {part}: right, 8 bits", None, right["fp8"][part], "%"))
    same = 100 * sum(a == b for a, b in zip(given["auto"], given["fp8"], strict=True)) / len(given["auto"])
    claims.append(Claim("pocket: answers equal to those with fp32", None, same, "%"))
    config = model.text_config
    for name, dtype in (("fp32", torch.float32), ("8 bits", torch.float8_e4m3fn)):
        claims.append(Claim(f"pocket: cache of a token, {name}", None, bytes_per_token(config, dtype), "bytes"))
    return claims


def main() -> None:
    parser = arguments(__doc__ or "")
    parser.add_argument("--length", type=int, default=32768, help="tokens of the layer")
    parser.add_argument("--queries", type=int, default=32, help="the last of them that attend")
    parser.add_argument("--pictures", type=int, default=400, help="picture questions to pocket")
    parser.add_argument("--text", type=int, default=90, help="text tasks to pocket")
    options = parser.parse_args()
    torch.set_num_threads(2)
    publish(
        layer_claims(options.length, options.queries) + pocket_claims(options.pictures, options.text), options.json
    )


if __name__ == "__main__":
    main()
