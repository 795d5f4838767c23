"""Time to the first token of a prompt of 4K tokens on the 66 M model: cold, and with its beginning in the cache.

Warm is the turn of a conversation: all but the last 64 tokens were seen before. Cold and warm take turns in a process,
each round with other tokens; the first token of both must be the same.
"""

import json
import statistics
import sys
import time
from pathlib import Path

import torch

from benchmarks.report import Claim, arguments, publish
from minim3.config import MiniMaxM3VLTextConfig
from minim3.inference.engine import Engine
from minim3.inference.request import SamplingParams
from minim3.model.causal_lm import MiniMaxM3SparseForCausalLM

CONFIG = Path(__file__).parent / "model.json"
NEW_TOKENS_OF_TURN = 64


def make_model() -> MiniMaxM3SparseForCausalLM:
    """Random weights of a fixed seed, large enough that routing and selection are not ties."""
    torch.manual_seed(0)
    model = MiniMaxM3SparseForCausalLM(MiniMaxM3VLTextConfig.from_dict(json.loads(CONFIG.read_text())))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0.0, parameter.shape[-1] ** -0.5)
    return model.eval()


def first_token(engine: Engine, prompt: list[int]) -> tuple[int, int, float]:
    """The token, how many tokens of the prompt were in the cache, and seconds."""
    start = time.perf_counter()
    request = engine.add_request(prompt, SamplingParams(max_new_tokens=1, ignore_eos=True))
    engine.run()
    assert request.num_cached_tokens is not None
    return request.output_ids[0], request.num_cached_tokens, time.perf_counter() - start


def main() -> None:
    parser = arguments(__doc__ or "")
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    model, generator = make_model(), torch.Generator().manual_seed(1)
    cold: list[float] = []
    warm: list[float] = []
    found, same = 0, True
    for number in range(options.rounds + 1):
        prompt = torch.randint(3, 4000, (options.tokens,), generator=generator).tolist()
        engine = Engine(model)
        right, _, seconds = first_token(engine, prompt)
        cold.append(seconds)
        engine = Engine(model)
        first_token(engine, prompt[:-NEW_TOKENS_OF_TURN])
        token_id, found, seconds = first_token(engine, prompt)
        warm.append(seconds)
        same = same and token_id == right
        if not number:  # to warm up
            cold.clear()
            warm.clear()
    claims = [
        Claim(f"first token of {options.tokens} tokens, cold", None, 1e3 * statistics.median(cold), "ms"),
        Claim(f"the same with {found} tokens in the cache", None, 1e3 * statistics.median(warm), "ms"),
        Claim("cold over cached", 10.0, statistics.median(a / b for a, b in zip(cold, warm)), "x"),
        Claim("the first token is the same", 1.0, float(same), "true"),
    ]
    publish(claims, options.json)
    if not same:
        sys.exit("the cached prefix changed the first token")


if __name__ == "__main__":
    main()
