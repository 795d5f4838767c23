"""The same 66 M model in transformers (SDPA) and in minim3: prefill and decode rates, peak memory, equal tokens.

Each measurement is a process of its own (its peak memory is its own), the two sides take turns at every length, and
the median over the rounds is reported. Both sides run their own `generate` under one clock that watches the tokens come
out: the first token ends the prefill, the median interval between the others is a decode step.
"""

import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from benchmarks.report import Claim, arguments, publish

CONFIG = Path(__file__).parent / "model.json"
SIDES = ("transformers", "minim3")
BARS = {("prefill", 4096): 4.0, ("prefill", 8192): 8.0, ("decode", 256): 2.0, ("decode", 4096): 3.0}
CLOSE = 1e-4  # where the top two logits lie this near, either token is right


class Clock:
    """A streamer for both `generate`s: notes when each token comes out."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: Any) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        pass


def make_checkpoint(folder: Path, format: str = "fp32") -> None:
    """Random weights of a fixed seed, large enough that routing and selection are not ties.

    A vision tower of one small layer goes with them, unused: transformers reads the released layout only for the whole
    model, not for its text part.
    """
    from minim3.config import MiniMaxM3VLConfig
    from minim3.model.causal_lm import MiniMaxM3SparseForConditionalGeneration

    torch.manual_seed(0)
    vision = {"model_type": "minimax_m3_vl_vision", "hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision |= {"intermediate_size": 64, "patch_size": 14, "num_channels": 3, "image_size": 112}
    config = MiniMaxM3VLConfig.from_dict(
        {
            "model_type": "minimax_m3_vl",
            "torch_dtype": "float32",
            "image_token_index": 4000,
            "video_token_index": 4001,
            "projector_hidden_size": 64,
            "text_config": json.loads(CONFIG.read_text()),
            "vision_config": vision,
        }
    )
    model = MiniMaxM3SparseForConditionalGeneration.from_config(config)
    with torch.no_grad():
        for parameter in model.text_model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0.0, parameter.shape[-1] ** -0.5)
    model.save_pretrained(folder, format=format)


def prompt(length: int) -> torch.Tensor:
    return torch.randint(3, 4000, (1, length), generator=torch.Generator().manual_seed(length))


def load(side: str, folder: Path, quantization: str | None = None) -> Any:
    if side == "minim3":
        from minim3.model.causal_lm import MiniMaxM3SparseForConditionalGeneration

        options: dict[str, Any] = {"dtype": torch.float32, "quantization": quantization}
        return MiniMaxM3SparseForConditionalGeneration.from_pretrained(folder, **options)
    from transformers.models.minimax_m3_vl import modeling_minimax_m3_vl as theirs

    return theirs.MiniMaxM3SparseForConditionalGeneration.from_pretrained(
        folder, config=transformers_config(), dtype=torch.float32, attn_implementation="sdpa"
    ).eval()


def transformers_config() -> Any:
    """The config of `model.json` in transformers' dialect; every field is passed, its defaults are of another model."""
    from transformers.models.minimax_m3_vl import MiniMaxM3VLConfig

    c = json.loads(CONFIG.read_text())
    s = c["sparse_attention_config"]
    same = (
        "vocab_size", "hidden_size", "intermediate_size", "dense_intermediate_size", "shared_intermediate_size",
        "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim", "rotary_dim",
        "num_local_experts", "num_experts_per_tok", "routed_scaling_factor", "swiglu_alpha", "swiglu_limit",
        "max_position_embeddings", "rms_norm_eps", "bos_token_id", "eos_token_id", "tie_word_embeddings",
    )  # fmt: skip
    rope = {"rope_theta": c["rope_theta"], "rope_type": "default", "partial_rotary_factor": c["partial_rotary_factor"]}
    text = {name: c[name] for name in same} | {
        "pad_token_id": None,
        "rope_parameters": rope,
        "layer_types": ["minimax_m3_sparse" if x else "full_attention" for x in s["sparse_attention_freq"]],
        "mlp_layer_types": ["sparse" if x else "dense" for x in c["moe_layer_freq"]],
        "index_n_heads": s["sparse_num_index_heads"],
        "index_head_dim": s["sparse_index_dim"],
        "index_block_size": s["sparse_block_size"],
        "index_topk_blocks": s["sparse_topk_blocks"],
        "index_local_blocks": s["sparse_local_block"],
    }
    vision = {"hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    vision |= {"patch_size": 14, "temporal_patch_size": 2, "spatial_merge_size": 2}
    vision |= {"rope_parameters": {"rope_theta": 1e4, "rope_type": "axial"}}
    return MiniMaxM3VLConfig(
        text_config=text, vision_config=vision, image_token_index=4000, video_token_index=4001,
        projector_hidden_size=64, tie_word_embeddings=False,
    )  # fmt: skip


@torch.inference_mode()
def measure(side: str, folder: Path, length: int, new_tokens: int) -> dict[str, Any]:
    """In a process of its own: load, warm up on a short prompt, run once under the clock."""
    torch.set_num_threads(2)
    model = load(side, folder)
    options = {"do_sample": False, "eos_token_id": None}
    model.generate(input_ids=prompt(64), max_new_tokens=4, **options)
    clock, start = Clock(), time.perf_counter()
    ids = model.generate(input_ids=prompt(length), max_new_tokens=new_tokens, streamer=clock, **options)
    times = clock.times[-new_tokens:]  # a streamer is handed the prompt first
    steps = [b - a for a, b in pairwise(times)]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    return {
        "prefill": length / (times[0] - start),
        "decode": 1 / statistics.median(steps),
        "peak": peak,
        "tokens": ids[0, length:].tolist(),
    }


def run(side: str, folder: Path, length: int, new_tokens: int) -> dict[str, Any] | None:
    command = [sys.executable, "-m", "benchmarks.generate_vs_transformers", "--measure", side, str(folder)]
    done = subprocess.run([*command, str(length), str(new_tokens)], capture_output=True, text=True)
    if done.returncode:
        out_of_memory = done.returncode < 0 or "allocate" in done.stderr
        print(f"{side} at {length} tokens: {'out of memory' if out_of_memory else done.stderr[-2000:]}", flush=True)
        if not out_of_memory:
            sys.exit(1)
        return None
    return json.loads(done.stdout.splitlines()[-1])


@torch.inference_mode()
def disagreement(folder: Path, length: int, theirs: list[int], ours: list[int]) -> str | None:
    """None if the tokens are equal up to a near tie of the top two logits; otherwise what differs."""
    for i, (a, b) in enumerate(zip(theirs, ours)):
        if a != b:
            ids = torch.cat([prompt(length), torch.tensor([ours[:i]], dtype=torch.long)], dim=1)
            top = load("minim3", folder)(input_ids=ids, logits_to_keep=1).logits[0, -1].topk(2).values
            gap = float(top[0] - top[1])
            return None if gap < CLOSE else f"token {i} at {length}: {a} and {b}, top two logits {gap:.2g} apart"
    return None


def main() -> None:
    parser = arguments(__doc__ or "")
    parser.add_argument("--lengths", type=int, nargs="+", default=[256, 1024, 2048, 4096, 8192])
    parser.add_argument("--longest-transformers", type=int, default=8192, help="beyond, its masks fill small machines")
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3, help="rounds at up to 2K tokens; 4K takes one less, 8K two")
    parser.add_argument("--measure", nargs=4, help="internal: side, folder, length, new tokens")
    options = parser.parse_args()
    if options.measure:
        side, folder, length, new_tokens = options.measure
        print(json.dumps(measure(side, Path(folder), int(length), int(new_tokens))))
        return
    claims, wrong = [], []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "model"
        make_checkpoint(folder)
        for length in options.lengths:
            rounds = max(1, options.rounds - (length > 2048) - (length > 4096))
            results: dict[str, list[dict[str, Any]]] = {side: [] for side in SIDES}
            for _ in range(rounds):
                for side in SIDES[length > options.longest_transformers :]:
                    result = run(side, folder, length, options.new_tokens)
                    if result is not None:
                        results[side].append(result)
            theirs, ours = results["transformers"], results["minim3"]
            if theirs and ours:
                difference = disagreement(folder, length, theirs[0]["tokens"], ours[0]["tokens"])
                wrong += [difference] if difference else []
            for what in ("prefill", "decode"):
                medians = {side: statistics.median(r[what] for r in results[side]) for side in SIDES if results[side]}
                for side, median in medians.items():
                    claims.append(Claim(f"{what}, {side}, {length} tokens", None, median, "tokens/s"))
                if len(medians) == 2:
                    ratio = statistics.median(b[what] / a[what] for a, b in zip(theirs, ours))
                    bar = BARS.get((what, length))
                    claims.append(Claim(f"{what}, minim3 over transformers, {length} tokens", bar, ratio, "x"))
            for side in SIDES:
                if results[side]:
                    peak = max(r["peak"] for r in results[side])
                    claims.append(Claim(f"peak memory, {side}, {length} tokens", None, peak, "GiB"))
    equal = f"greedy tokens equal at all lengths (near ties within {CLOSE} accepted)"
    claims.append(Claim(equal, 1.0, float(not wrong), "true"))
    publish(claims, options.json)
    if wrong:
        sys.exit("\n".join(wrong))


if __name__ == "__main__":
    main()
