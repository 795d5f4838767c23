"""Speculative decoding by pocket's own MTP module, one request at a time: drafts that stand, and what they gain.

Conversations about pictures, whose last question asks for a list of all objects. With and without drafts take turns,
answer by answer; the time to the first token, which drafts cannot change, is not counted. Tokens must be equal.
"""

import statistics
import sys
import time
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from benchmarks.report import Claim, arguments, publish
from minim3.inference.engine import Engine
from minim3.inference.request import Request, SamplingParams
from minim3.loading import load
from minim3.pocket.questions import ask, describe
from minim3.pocket.world import draw, random_scene

KINDS = ("colour", "count", "exists", "size")


def conversation(rng: np.random.Generator, num_turns: int) -> list[dict[str, Any]]:
    """A picture, questions about it with their answers, and at last: what is in it?"""
    scene = random_scene(rng)
    messages: list[dict[str, Any]] = []
    for turn in range(num_turns):
        question = ask(scene, KINDS[turn % len(KINDS)], rng)
        if question is not None:
            messages.append({"role": "user", "content": question.text})
            messages.append({"role": "assistant", "content": question.answer})
    messages.append({"role": "user", "content": describe(scene, rng).text})
    first = messages[0]["content"]
    messages[0]["content"] = [{"type": "image", "image": draw(scene)}, {"type": "text", "text": first}]
    return messages


def answer(model: Any, inputs: Mapping[str, Any], params: SamplingParams, num_drafts: int) -> tuple[Request, float]:
    """The request, and the processor's seconds from its first token to its last."""
    engine = Engine(model, num_speculative_tokens=num_drafts)
    request = engine.add_request(inputs["input_ids"][0].tolist(), params, media=inputs)
    engine.step()
    start = time.process_time()
    engine.run()
    return request, time.process_time() - start


def main() -> None:
    parser = arguments(__doc__ or "")
    parser.add_argument("--drafts", type=int, nargs="+", default=[1, 2], help="drafts a step to try")
    parser.add_argument("--conversations", type=int, default=24)
    parser.add_argument("--turns", type=int, default=3, help="questions before the last one")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(1)  # pocket's products are too small to share
    model, processor = load()
    rng = np.random.default_rng(0)
    prompts = [processor.apply_chat_template(conversation(rng, options.turns)) for _ in range(options.conversations)]
    eos = processor.tokenizer.eos_token_ids
    params = SamplingParams(max_new_tokens=200, eos_token_ids=tuple(eos))
    counts = [0, *options.drafts]
    seconds: dict[int, list[float]] = {count: [] for count in counts}  # a token, each round
    requests: dict[int, list[Request]] = {}
    for _ in range(options.rounds):
        runs = [[answer(model, prompt, params, count) for count in counts] for prompt in prompts]
        for place, count in enumerate(counts):
            requests[count] = [run[place][0] for run in runs]
            tokens = sum(request.num_output_tokens - 1 for request in requests[count])
            seconds[count].append(sum(run[place][1] for run in runs) / tokens)
    claims, plain = [], seconds[0]
    lengths = [len(prompt["input_ids"][0]) for prompt in prompts]
    print(f"prompts of {min(lengths)} to {max(lengths)} tokens, {tokens} tokens decoded")
    claims.append(Claim("pocket, batch 1: one token without drafts", None, 1e3 * statistics.median(plain), "ms"))
    gains = {}
    for count in options.drafts:
        drafted = sum(request.num_drafted_tokens for request in requests[count])
        accepted = sum(request.num_accepted_tokens for request in requests[count])
        gains[count] = statistics.median(a / b for a, b in zip(plain, seconds[count]))
        what = f"pocket, batch 1, {count} draft{'s' if count > 1 else ''} a step"
        claims.append(Claim(f"{what}: drafts that stand", None, 100 * accepted / drafted, "%"))
        claims.append(Claim(f"{what}: tokens/s over those without drafts", None, gains[count], "x"))
    claims.append(Claim("pocket, batch 1: the best of these", 1.15, max(gains.values()), "x"))
    same = all(
        [r.output_ids for r in requests[count]] == [r.output_ids for r in requests[0]] for count in options.drafts
    )
    claims.append(Claim("greedy tokens equal with and without drafts", 1.0, float(same), "true"))
    publish(claims, options.json)
    if not same:
        sys.exit("drafts changed an answer")


if __name__ == "__main__":
    main()
