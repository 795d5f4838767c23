"""attn_implementation="minim3" in transformers against its own "sdpa" and "eager": the same model, the same `generate`.

The 66 M model of `model.json` with random weights of a fixed seed. Each measurement is a process of its own, the
implementations take turns at every length, and the median over the rounds is reported. The first token ends the
prefill, the median interval between the others is a decode step, with transformers' dynamic cache, which copies itself
at every step, and with its static one. Memory is the growth of the process's resident peak over what it held before the
prompt; transformers' own implementations are left out beyond `--longest-masked` tokens, where their masks and scores
fill the memory of small machines.
"""

import json
import statistics
import subprocess
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from benchmarks.generate_vs_transformers import (
    CLOSE,
    Clock,
    disagreement,
    make_checkpoint,
    prompt,
    transformers_config,
)
from benchmarks.report import Claim, arguments, publish

PAIRS = (("sdpa", "minim3"), ("eager", "minim3"), ("sdpa, static cache", "minim3, static cache"))
PREFILL_BARS = {4096: 2.0}
DECODE_BAR = 0.95  # not slower, within the noise of a step
LINEAR_BAR = 0.8  # memory a token at 2K over that at 8K: 1 is linear, 1/4 quadratic


def load(side: str, folder: Path) -> Any:
    from transformers import AutoModelForImageTextToText

    import minim3.integrations.transformers  # noqa: F401  (registers "minim3")

    return AutoModelForImageTextToText.from_pretrained(
        folder, config=transformers_config(), dtype=torch.float32, attn_implementation=side.split(",")[0]
    ).eval()


def resident(field: str) -> float:
    """A line of /proc/self/status in GiB: VmRSS now, VmHWM at its highest."""
    lines = Path("/proc/self/status").read_text().splitlines()
    (kib,) = (line.split()[1] for line in lines if line.startswith(f"{field}:"))
    return int(kib) / 2**20


@torch.inference_mode()
def measure(side: str, folder: Path, length: int, new_tokens: int, threads: int) -> dict[str, Any]:
    """In a process of its own: load, warm up on a short prompt, run once under the clock."""
    torch.set_num_threads(threads)
    model = load(side, folder)
    options = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    options["cache_implementation"] = "static" if "static" in side else "dynamic"
    model.generate(input_ids=prompt(64), max_new_tokens=4, **options)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from what is resident now
    before = resident("VmRSS")
    clock, start = Clock(), time.perf_counter()
    ids = model.generate(input_ids=prompt(length), max_new_tokens=new_tokens, streamer=clock, **options)
    times = clock.times[-new_tokens:]  # a streamer is handed the prompt first
    return {
        "prefill": length / (times[0] - start),
        "decode": 1 / statistics.median(b - a for a, b in pairwise(times)),
        "growth": resident("VmHWM") - before,
        "tokens": ids[0, length:].tolist(),
    }


def run(side: str, folder: Path, length: int, new_tokens: int, threads: int) -> dict[str, Any]:
    command = [sys.executable, "-m", "benchmarks.transformers_plugin", "--measure", side, str(folder)]
    done = subprocess.run([*command, str(length), str(new_tokens), str(threads)], capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{side} at {length} tokens: {done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = arguments(__doc__ or "")
    parser.add_argument("--lengths", type=int, nargs="+", default=[256, 2048, 4096, 8192])
    parser.add_argument("--longest-masked", type=int, default=4096)
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3, help="rounds at up to 2K tokens; longer prompts take one less")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--measure", nargs=5, help="internal: side, folder, length, new tokens, threads")
    options = parser.parse_args()
    if options.measure:
        side, folder, *numbers = options.measure
        print(json.dumps(measure(side, Path(folder), *map(int, numbers))))
        return
    claims, wrong = [], []
    growth: dict[int, float] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "model"
        make_checkpoint(folder)
        for length in options.lengths:
            pairs = PAIRS if length <= options.longest_masked else ()
            sides = list(dict.fromkeys([side for pair in pairs for side in pair] or ["minim3"]))
            results: dict[str, list[dict[str, Any]]] = {side: [] for side in sides}
            for _ in range(max(1, options.rounds - (length > 2048))):
                for side in sides:
                    results[side].append(run(side, folder, length, options.new_tokens, options.threads))
            for what, bar in (("prefill", PREFILL_BARS.get(length)), ("decode", DECODE_BAR)):
                for side in sides:
                    median = statistics.median(r[what] for r in results[side])
                    claims.append(Claim(f"{what}, {side}, {length} tokens", None, median, "tokens/s"))
                for theirs, ours in pairs:
                    ratio = statistics.median(b[what] / a[what] for a, b in zip(results[theirs], results[ours]))
                    claims.append(Claim(f"{what}, minim3 over {theirs}, {length} tokens", bar, ratio, "x"))
            for side in sides:
                highest = max(r["growth"] for r in results[side])
                claims.append(Claim(f"memory for a prompt, {side}, {length} tokens", None, highest, "GiB"))
                difference = disagreement(folder, length, results[side][0]["tokens"], results["minim3"][0]["tokens"])
                wrong += [f"{side}, {difference}"] if difference else []
            growth[length] = max(r["growth"] for r in results["minim3"])
    long = [length for length in growth if length >= 2048]
    if len(long) > 1:
        first, last = min(long), max(long)
        ratio = (growth[first] / first) / (growth[last] / last)
        claim = f"memory a token, minim3, {first} over {last} tokens (1: linear, {first / last:g}: quadratic)"
        claims.append(Claim(claim, LINEAR_BAR, ratio, "x"))
    equal = f"greedy tokens equal at all lengths (near ties within {CLOSE} accepted)"
    claims.append(Claim(equal, 1.0, float(not wrong), "true"))
    publish(claims, options.json)
    if wrong:
        sys.exit("\n".join(wrong))


if __name__ == "__main__":
    main()
