"""16 requests at once against one at a time, on the 66 M model: text, 64 tokens in, 128 out, no early end.

minim3: the engine's continuous batching. transformers: one at a time, a padded batch of 16, and its continuous
batching, which may refuse the model; its best counts. The checkpoint is in bf16, as released ones are, and everybody
computes in fp32; minim3 holds the weights in fp32 like the others, or as they are stored, which gives the same numbers
from half of the memory. Each measurement is a process of its own, the ways take turns,
and medians over the rounds are reported. Greedy tokens of all ways are compared, near ties of the top two logits aside.
"""

import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.generate_vs_transformers import CLOSE, load, make_checkpoint
from benchmarks.report import Claim, arguments, publish

OURS: dict[str, tuple[int, str | None]] = {
    "minim3, one at a time": (1, None),
    "minim3, 16 at once": (16, None),
    "minim3, weights as stored, one at a time": (1, "bf16"),
    "minim3, weights as stored, 16 at once": (16, "bf16"),
}
"""How many at once, and how the weights are held."""
ONE, BATCH, CONTINUOUS = (f"transformers, {way}" for way in ("one at a time", "batch of 16", "continuous batching"))
THEIRS = (ONE, BATCH, CONTINUOUS)
PROMPT_TOKENS = 64


def prompts(count: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(3, 4000, (count, PROMPT_TOKENS), generator=generator).tolist()


def ours(model: Any, at_once: int) -> Callable[[list[list[int]], int], list[list[int]]]:
    from minim3.inference.engine import Engine
    from minim3.inference.request import SamplingParams

    def run(batch: list[list[int]], new_tokens: int) -> list[list[int]]:
        engine = Engine(model, max_running=at_once)
        params = SamplingParams(max_new_tokens=new_tokens, ignore_eos=True)
        requests = [engine.add_request(prompt, params) for prompt in batch]
        engine.run()
        return [request.output_ids for request in requests]

    return run


def theirs(model: Any, way: str) -> Callable[[list[list[int]], int], list[list[int]]]:
    from transformers import GenerationConfig

    def run(batch: list[list[int]], new_tokens: int) -> list[list[int]]:
        config = GenerationConfig(max_new_tokens=new_tokens, do_sample=False, eos_token_id=-1, pad_token_id=0)
        if way == CONTINUOUS:
            found = model.generate_batch(inputs=batch, generation_config=config)
            by_prompt = {tuple(output.prompt_ids): list(output.generated_tokens) for output in found.values()}
            return [by_prompt[tuple(prompt)] for prompt in batch]
        config.eos_token_id = None
        size = 1 if way == ONE else len(batch)
        tokens: list[list[int]] = []
        for first in range(0, len(batch), size):
            ids = torch.tensor(batch[first : first + size])
            out = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=config)
            tokens += out[:, PROMPT_TOKENS:].tolist()
        return tokens

    return run


@torch.inference_mode()
def measure(way: str, folder: Path, requests: int, new_tokens: int, threads: int) -> dict[str, Any]:
    """In a process of its own: load, warm up, run once under the clock. Tokens a second, and the tokens."""
    torch.set_num_threads(threads)
    if way in OURS:
        at_once, quantization = OURS[way]
        run = ours(load("minim3", folder, quantization), at_once)
    else:
        model = load("transformers", folder)
        if way == CONTINUOUS:
            model.set_attn_implementation("paged|sdpa")
        run = theirs(model, way)
    batch = prompts(requests)
    run(batch[:2], 4)
    start = time.perf_counter()
    tokens = run(batch, new_tokens)
    seconds = time.perf_counter() - start
    assert all(len(row) == new_tokens for row in tokens)
    return {"rate": requests * new_tokens / seconds, "tokens": tokens}


def run_apart(way: str, folder: Path, *sizes: int) -> dict[str, Any] | None:
    command = [sys.executable, "-m", "benchmarks.serving_throughput", "--measure", way, str(folder), *map(str, sizes)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        if way != CONTINUOUS:
            sys.exit(f"{way}: {done.stderr[-2000:]}")
        print(f"{way}: does not run here: {done.stderr.strip().splitlines()[-1]}", flush=True)
        return None
    return json.loads(done.stdout.splitlines()[-1])


@torch.inference_mode()
def disagreements(folder: Path, way: str, right: list[list[int]], found: list[list[int]]) -> list[str]:
    """What differs from one at a time, near ties of the top two logits aside."""
    wrong = []
    for prompt, a, b in zip(prompts(len(right)), right, found):
        place = next((i for i in range(len(a)) if a[i] != b[i]), None)
        if place is not None:
            ids = torch.tensor([prompt + a[:place]])
            top = load("minim3", folder)(input_ids=ids, logits_to_keep=1).logits[0, -1].topk(2).values
            if float(top[0] - top[1]) >= CLOSE:
                wrong.append(f"{way}: token {place} is {b[place]}, not {a[place]}, top two {top[0] - top[1]:.2g} apart")
    return wrong


def main() -> None:
    parser = arguments(__doc__ or "")
    parser.add_argument("--requests", type=int, default=16)
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--without-transformers", action="store_true")
    parser.add_argument("--measure", nargs=5, help="internal: way, folder, requests, new tokens, threads")
    options = parser.parse_args()
    if options.measure:
        way, folder_name, *sizes = options.measure
        print(json.dumps(measure(way, Path(folder_name), *map(int, sizes))))
        return
    ways = [*OURS, *(() if options.without_transformers else THEIRS)]
    results: dict[str, list[dict[str, Any]]] = {way: [] for way in ways}
    claims, wrong = [], []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "model"
        make_checkpoint(folder, "bf16")
        for _ in range(options.rounds):
            for way in list(results):
                result = run_apart(way, folder, options.requests, options.new_tokens, options.threads)
                if result is None:
                    del results[way]
                else:
                    results[way].append(result)
        one, *_ = OURS
        for way in results:
            wrong += disagreements(folder, way, results[one][0]["tokens"], results[way][0]["tokens"])
    rates = {way: [result["rate"] for result in found] for way, found in results.items()}
    for way, found in rates.items():
        claims.append(
            Claim(f"{way}: 64 tokens in, {options.new_tokens} out", None, statistics.median(found), "tokens/s")
        )
    others = [way for way in rates if way in THEIRS]
    best = max(others, key=lambda way: statistics.median(rates[way]), default=None)
    for held in dict.fromkeys(quantization for _, quantization in OURS.values()):
        alone, many = (way for way, (_, quantization) in OURS.items() if quantization == held)
        of = "16 at once" if held is None else "16 at once, weights as stored,"
        gain = statistics.median(b / a for a, b in zip(rates[alone], rates[many]))
        claims.append(Claim(f"{of} over one at a time", 4.0, gain, "x"))
        if best is not None:
            gain = statistics.median(b / a for a, b in zip(rates[best], rates[many]))
            claims.append(Claim(f"{of} over the best of transformers ({best.split(', ')[1]})", 5.0, gain, "x"))
    claims.append(Claim(f"greedy tokens equal (near ties within {CLOSE} accepted)", 1.0, float(not wrong), "true"))
    publish(claims, options.json)
    if wrong:
        sys.exit("\n".join(wrong))


if __name__ == "__main__":
    main()
