"""minim3 alone on long prompts, 66 M model: what a token costs more at 16K than at 256, and memory at 32K and 128K.

Each length is a process of its own; the rounds of the two lengths whose decoding is compared take turns. Memory is the
resident peak of the whole process, interpreter and libraries included.
"""

import statistics
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.generate_vs_transformers import make_checkpoint, run
from benchmarks.report import Claim, arguments, publish

SHORT, LONG = 256, 16384
MOST_EXTRA_MS = 12.0
MOST_GB = {32768: 3.0, 131072: 8.0}  # beyond the weights at 32K; in all at 128K


def measure(folder: Path, length: int, new_tokens: int) -> dict[str, Any]:
    result = run("minim3", folder, length, new_tokens)
    if result is None:
        raise SystemExit(f"{length} tokens do not fit into this machine's memory")
    return result


def main() -> None:
    parser = arguments(__doc__ or "")
    parser.add_argument("--memory-lengths", type=int, nargs="*", default=list(MOST_GB))
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    claims: list[Claim] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "model"
        make_checkpoint(folder)
        weights = (folder / "model.safetensors").stat().st_size / 1e9
        steps: dict[int, list[float]] = {SHORT: [], LONG: []}
        for _ in range(options.rounds):
            for length, found in steps.items():
                found.append(1e3 / measure(folder, length, options.new_tokens)["decode"])
        for length, found in steps.items():
            claims.append(Claim(f"a token at {length} tokens", None, statistics.median(found), "ms"))
        extra = statistics.median(b - a for a, b in zip(steps[SHORT], steps[LONG]))
        claims.append(Claim(f"a token more at {LONG} tokens than at {SHORT}", MOST_EXTRA_MS, extra, "ms", at_most=True))
        claims.append(Claim("weights", None, weights, "GB"))
        for length in options.memory_lengths:
            result = measure(folder, length, 4)
            claims.append(Claim(f"prefill, {length} tokens", None, result["prefill"], "tokens/s"))
            peak, most = result["peak"] * 2**30 / 1e9, MOST_GB.get(length)
            more = peak - weights if length == 32768 else peak
            words = "peak memory beyond the weights" if length == 32768 else "peak memory"
            claims.append(Claim(f"{words}, {length} tokens", most, more, "GB", at_most=True))
    publish(claims, options.json)


if __name__ == "__main__":
    main()
