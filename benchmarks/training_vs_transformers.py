"""Training the same 66 M model in transformers (SDPA) and in minim3: tokens a second, equal loss curves, peak memory.

Both sides take the same steps: next-token loss, gradients clipped to norm 1, AdamW (fused) over the same groups, fp32,
from the same weights on the same tokens. Each side lives in a process of its own, whose peak memory is its own; the two
take turns, step by step, and the median over the pairs of steps is reported. Nothing is frozen; the indexers get no
gradient from this loss on either side.

The loss curves are compared step by step, as a share of the loss. What rounding alone does to such a curve is measured
beside it: transformers once more with eager attention, the same sums in another order, against transformers with SDPA.

    python -m benchmarks.training_vs_transformers                            # the whole: 2K, 4K and the loss curves
    python -m benchmarks.training_vs_transformers --threads 1 --lengths 1024 --curve-steps 3    # a look
"""

import multiprocessing
import resource
import statistics
import sys
import tempfile
import time
import traceback
from collections.abc import Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.generate_vs_transformers import SIDES, load, make_checkpoint
from benchmarks.report import Claim, arguments, publish, ratio

STEPS = {2048: 5, 4096: 3}
BARS = {2048: 2.0, 4096: 3.0}
CURVE_LENGTH, CURVE_BAR = 512, 1e-3
CONTROL = "transformers, eager attention"
VOCAB, FIRST_ID = 4096, 3
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
LEARNING_RATE, BETAS, WEIGHT_DECAY, CLIP_NORM = 3e-4, (0.9, 0.95), 0.1, 1.0


def tokens(step: int, length: int) -> Tensor:
    """int64 `[length]`: words of a small language, in which the next one is mostly a function of the last."""
    g = torch.Generator().manual_seed(length * 1000 + step)
    ids = torch.randint(FIRST_ID, VOCAB, (length,), generator=g)
    free = torch.rand(length, generator=g) < 0.2
    for place in range(1, length):
        if not free[place]:
            ids[place] = FIRST_ID + (int(ids[place - 1]) * 7 + 11) % 64
    return ids


def parameter_groups(model: torch.nn.Module) -> list[dict[str, Any]]:
    """Norms, biases and embeddings do not decay: the rule of `minim3.training.optim`, for the names of both sides."""
    decays = {True: [], False: []}  # type: dict[bool, list[torch.nn.Parameter]]
    for name, parameter in model.named_parameters():
        if not name.startswith(("model.vision", "vision")):
            decays[parameter.ndim >= 2 and "embed_tokens" not in name].append(parameter)
    return [{"params": params, "weight_decay": WEIGHT_DECAY * does} for does, params in decays.items()]


class Trainee:
    """One side: the model, its optimizer, and a step of training as the side's users write it."""

    def __init__(self, side: str, folder: Path, clock: str, checkpoint_activations: bool) -> None:
        self.side, self.now = side, CLOCKS[clock]
        self.model = load(side, folder).train()
        if side == CONTROL:
            self.model.set_attn_implementation("eager")
        self.optimizer = torch.optim.AdamW(parameter_groups(self.model), lr=LEARNING_RATE, betas=BETAS, fused=True)
        if side == "minim3":
            from minim3.training.checkpointing import checkpoint_activations as checkpoint
            from minim3.training.machine import keep_freed_memory

            keep_freed_memory()
            if checkpoint_activations:
                checkpoint(self.model)
        elif checkpoint_activations:
            self.model.gradient_checkpointing_enable()

    def loss(self, ids: Tensor) -> Tensor:
        if self.side != "minim3":
            return self.model(input_ids=ids[None], labels=ids[None], use_cache=False).loss
        from minim3.training.batch import IGNORED, Batch
        from minim3.training.config import LossRecipe
        from minim3.training.loss import compute_losses

        labels = torch.cat([ids[1:], ids.new_full((1,), IGNORED)])
        batch = Batch(ids, labels, (ids.shape[0],), ("text",))
        return compute_losses(self.model, batch, LossRecipe(recall_every_steps=0)).total

    def step(self, ids: Tensor) -> dict[str, float]:
        start = self.now()
        loss = self.loss(ids)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), CLIP_NORM, foreach=True)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        seconds = self.now() - start
        return {"loss": float(loss.detach()), "seconds": seconds, "peak": peak_memory()}


def peak_memory() -> float:
    """GiB that this process has held at most."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def serve(pipe: Connection, side: str, folder: Path, options: Any) -> None:
    """In a process of its own: build the side, then a step for every row of ids that comes; None ends it."""
    torch.set_num_threads(options.threads)
    if options.memory_limit:
        resource.setrlimit(resource.RLIMIT_AS, (int(options.memory_limit * 2**30),) * 2)
    trainee = Trainee(side, folder, options.clock, options.checkpoint_activations)
    trainee.loss(tokens(0, 64)).backward()  # what happens once: imports, threads, choices
    trainee.optimizer.zero_grad(set_to_none=True)
    pipe.send({"parameters": sum(p.numel() for g in trainee.optimizer.param_groups for p in g["params"])})
    while (ids := pipe.recv()) is not None:
        try:
            pipe.send(trainee.step(ids))
        except (MemoryError, RuntimeError) as error:
            if not isinstance(error, MemoryError) and "allocate memory" not in str(error):
                traceback.print_exc()
                raise
            pipe.send({"error": f"out of memory: {str(error).splitlines()[-1]}", "peak": peak_memory()})


class Sides:
    """The sides, each in a process, ready for their steps."""

    def __init__(self, folder: Path, options: Any, sides: Sequence[str] = SIDES) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipes: dict[str, Any] = {}
        self.processes = []
        for side in sides:
            self.pipes[side], theirs = context.Pipe()
            process = context.Process(target=serve, args=(theirs, side, folder, options), daemon=True)
            self.processes.append(process)
            process.start()
            theirs.close()
            self.parameters = self.pipes[side].recv()["parameters"]

    def step(self, side: str, ids: Tensor) -> dict[str, Any]:
        self.pipes[side].send(ids)
        try:
            return self.pipes[side].recv()
        except EOFError:
            return {"error": "killed, most likely by the kernel for want of memory"}

    def close(self) -> None:
        for pipe, process in zip(self.pipes.values(), self.processes):
            if process.is_alive():
                pipe.send(None)
            process.join()


def speed(folder: Path, length: int, steps: int, options: Any) -> list[Claim]:
    """Tokens a second at `length`; a side that does not fit is reported, and left out of the later rounds."""
    sides = Sides(folder, options)
    results: dict[str, list[dict[str, Any]]] = {side: [] for side in SIDES}
    failed: dict[str, str] = {}
    for step in range(steps):
        for side in SIDES:
            if side not in failed:
                result = sides.step(side, tokens(step, length))
                results[side].append(result)
                if "error" in result:
                    failed[side] = result["error"]
                else:
                    seconds, peak = result["seconds"], result["peak"]
                    print(f"{length} {side} {seconds:.1f} s loss {result['loss']:.4f} peak {peak:.1f} GiB", flush=True)
    sides.close()
    claims = []
    for side in SIDES:
        if side in failed:
            print(f"{side} at {length} tokens: {failed[side]}", flush=True)
            results[side].pop()
        if results[side]:
            median = statistics.median(result["seconds"] for result in results[side])
            peak = max(result["peak"] for result in results[side])
            claims.append(Claim(f"training, {side}, {length} tokens", None, length / median, "tokens/s"))
            claims.append(Claim(f"peak memory in training, {side}, {length} tokens", None, peak, "GiB"))
    theirs, ours = ([result["seconds"] for result in results[side]] for side in SIDES)
    if theirs and ours:
        what = f"training, minim3 over transformers, {length} tokens, {len(ours)} steps"
        claims.append(Claim(what, BARS.get(length), ratio(theirs, ours), "x"))
    return claims


def curves(folder: Path, length: int, steps: int, options: Any) -> list[Claim]:
    """The largest differences between loss curves over `steps` steps from the same weights, in shares and in nats."""
    names = (*SIDES, CONTROL)
    sides = Sides(folder, options, names)
    losses: dict[str, list[float]] = {name: [] for name in names}
    for step in range(steps):
        for name in names:
            losses[name].append(sides.step(name, tokens(step, length))["loss"])
        print(f"{length} step {step} " + ", ".join(f"{name} {losses[name][-1]:.5f}" for name in names), flush=True)
    sides.close()
    theirs, ours, eager = (losses[name] for name in names)
    where = f"{steps} steps of {length} tokens"
    claims = []
    for what, one, other, bar in (
        ("loss curves differ at most", theirs, ours, CURVE_BAR),
        ("loss curves of transformers, SDPA and eager, differ at most", theirs, eager, None),
        ("loss curves of minim3 and transformers, eager, differ at most", eager, ours, None),
    ):
        share = max(abs(a - b) / abs(a) for a, b in zip(one, other))
        nats = max(abs(a - b) for a, b in zip(one, other))
        claims.append(Claim(f"{what}, {where}", bar, share, "of the loss", at_most=True))
        claims.append(Claim(f"{what}, {where}", None, nats, "nats"))
    return [*claims, Claim(f"loss that {where} take off", None, ours[0] - ours[-1], "nats")]


def main() -> None:
    parser = arguments(__doc__ or "")
    parser.add_argument("--lengths", type=int, nargs="*", default=list(STEPS))
    parser.add_argument("--steps", type=int, help="of every length, instead of five at 2K and three at 4K")
    parser.add_argument("--curve-steps", type=int, default=20, help=f"of {CURVE_LENGTH} tokens; 0: no curves")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--clock", choices=CLOCKS, default="wall", help="cpu: for one thread of a machine shared")
    parser.add_argument("--memory-limit", type=float, default=0, help="GiB of address space for each side; 0: no limit")
    parser.add_argument("--checkpoint-activations", action="store_true", help="on both sides")
    options = parser.parse_args()
    claims = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "model"
        make_checkpoint(folder)
        if options.curve_steps:
            claims += curves(folder, CURVE_LENGTH, options.curve_steps, options)
        for length in options.lengths:
            claims += speed(folder, length, options.steps or STEPS.get(length, 3), options)
    publish(claims, options.json)
    if any(claim.row()["pass"] is False for claim in claims):
        sys.exit(1)


if __name__ == "__main__":
    main()
