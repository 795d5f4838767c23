"""Converting a dense model to sparse attention: what the warm-up of the indexers is worth.

A small model learns to look up pairs, first in short rows, then in contexts of 2,048 tokens
(`minim3.training.retrieval`), densely; it is converted to block-sparse attention with an eighth of the context for a
budget, and its score is taken again on the same held-out documents. Beside it: the same conversion without the warm-up,
trained as long as both stages, and a model that was sparse from its first step on, trained as long as all together.

    python -m benchmarks.dense_to_sparse --output runs/dense-to-sparse-study --plot docs/dense_to_sparse.png

Every stage is a recipe in recipes/, goes on where it was stopped, and is skipped when it is done. `--quick` runs a few
steps of each, to see that all is in place.
"""

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.report import Claim, arguments, machine, publish
from minim3.training.config import LossRecipe, TrainingConfig, load_recipe
from minim3.training.conversion import build_model
from minim3.training.data import EVALUATION_SPLIT, BatchBuilder
from minim3.training.loss import compute_losses
from minim3.training.trainer import train

RECIPES = Path(__file__).parent.parent / "recipes"
SCORED_BATCHES = 32  # of two documents with 64 questions each
BAR = -2.0  # points that a warmed-up conversion may lose
QUICK_STEPS = 2


@dataclass(frozen=True)
class Stage:
    """One training. start_from: another stage, or None. overrides: as on the command line of `minim3 train`."""

    name: str
    recipe: str
    start_from: str | None = None
    overrides: Sequence[str] = ()


def stages() -> list[Stage]:
    names = ("retrieval_short", "retrieval_dense", "indexer_warmup", "dense_to_sparse")
    short, dense, warm_up, sparse = (load_recipe(RECIPES / f"{name}.yaml") for name in names)
    assert short.model.config is not None
    assert warm_up.model.convert_to_sparse is not None
    convert = json.dumps(warm_up.to_dict()["model"]["convert_to_sparse"])
    attention = json.dumps(sparse_attention_config(short.model.config, warm_up))
    of_indexer = [f"loss.indexer_kl_weight={sparse.loss.indexer_kl_weight}", "loss.recall_every_steps=25"]
    of_indexer += ["loss.indexer_kl_every_steps=2"]  # there are steps enough
    both = warm_up.steps + sparse.steps
    return [
        Stage("short", "retrieval_short"),
        Stage("dense", "retrieval_dense", "short"),
        Stage("warm-up", "indexer_warmup", "dense"),
        Stage("with warm-up", "dense_to_sparse", "warm-up"),
        Stage("without warm-up", "dense_to_sparse", "dense", [f"steps={both}", f"model.convert_to_sparse={convert}"]),
        Stage(
            "short, sparse", "retrieval_short", None,
            [f"model.config.sparse_attention_config={attention}", *of_indexer],
        ),
        Stage("sparse from scratch", "retrieval_dense", "short, sparse", [f"steps={dense.steps + both}", *of_indexer]),
    ]  # fmt: skip


def sparse_attention_config(config: Mapping[str, Any], warm_up: TrainingConfig) -> dict[str, Any]:
    """What the conversion makes of the dense config, for a model that starts out so."""
    convert = warm_up.model.convert_to_sparse
    assert convert is not None
    layers = range(1, config["num_hidden_layers"]) if convert.layers is None else convert.layers
    return {
        "use_sparse_attention": True,
        "sparse_attention_freq": [int(layer in layers) for layer in range(config["num_hidden_layers"])],
        "sparse_num_index_heads": config["num_key_value_heads"],
        "sparse_index_dim": convert.head_dim or config["head_dim"],
        "sparse_block_size": convert.block_size,
        "sparse_topk_blocks": convert.topk_blocks,
        "sparse_init_block": convert.init_blocks,
        "sparse_local_block": convert.local_blocks,
        "sparse_score_type": convert.score_type,
    }


def recipe_of(stage: Stage, output: Path, quick: bool) -> TrainingConfig:
    overrides = [f"output={folder_of(stage.name, output)}", *stage.overrides]
    if stage.start_from is not None:
        overrides.append(f"model.start_from={export_of(stage.start_from, output)}")
    if quick:
        overrides += [f"steps={QUICK_STEPS}", "schedule.kind=constant", "schedule.decay_steps=0", "log_every_steps=1"]
        overrides += ["data.tokens_per_batch=2048", "evaluation.every_steps=0"]
    return load_recipe(RECIPES / f"{stage.recipe}.yaml", overrides)


def folder_of(name: str, output: Path) -> Path:
    return output / name.replace(",", "").replace(" ", "-")


def export_of(name: str, output: Path) -> Path:
    return folder_of(name, output) / "export"


@torch.no_grad()
def score(recipe: TrainingConfig, checkpoint: Path, num_batches: int, convert: Any = None) -> float:
    """Percentage of questions answered right by the model in `checkpoint`, on documents that no stage trains on."""
    torch.manual_seed(0)
    from_checkpoint = replace(recipe.model, config=None, start_from=str(checkpoint), convert_to_sparse=convert)
    model = build_model(replace(recipe, model=from_checkpoint)).eval()
    held_out = load_recipe(RECIPES / "dense_to_sparse.yaml")  # documents of 2,048 tokens
    builder = BatchBuilder(held_out.data, held_out.data.sources, seed=1000, split=EVALUATION_SPLIT)
    right = total = 0
    for number in range(num_batches):
        correct = compute_losses(model, builder.build(number), LossRecipe(recall_every_steps=0)).correct
        right, total = right + int(correct.sum()), total + correct.numel()
    return 100 * right / total


def history(output: Path, name: str, key: str) -> dict[int, float]:
    """A curve of a stage's log: step -> value."""
    path = folder_of(name, output) / "metrics.jsonl"
    lines = map(json.loads, path.read_text(encoding="utf-8").splitlines())
    return {line["step"]: line[key] for line in lines if key in line}


def recall_curves(output: Path, name: str) -> dict[str, dict[int, float]]:
    """Recall of every sparse layer of a stage."""
    path = folder_of(name, output) / "metrics.jsonl"
    keys = {key for line in map(json.loads, path.read_text(encoding="utf-8").splitlines()) for key in line}
    layers = sorted(key.removeprefix("recall.") for key in keys if key.startswith("recall."))
    return {layer: history(output, name, f"recall.{layer}") for layer in layers}


def plot(path: Path, output: Path, scores: Mapping[str, float]) -> None:
    """Loss after the conversion with and without the warm-up, recall during both stages, and the scores as bars."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (losses, recalls, bars) = pyplot.subplots(1, 3, figsize=(15, 4))
    for name in ("with warm-up", "without warm-up"):
        curve = history(output, name, "next_token")
        losses.plot(list(curve), list(curve.values()), label=name)
    losses.set(title="after the conversion", xlabel="step", ylabel="next-token loss", yscale="log")
    losses.legend()
    for name, style in (("warm-up", "-"), ("with warm-up", "--"), ("without warm-up", ":")):
        for number, (layer, curve) in enumerate(recall_curves(output, name).items()):
            label = f"{name}, {layer.replace('_', ' ')}"
            recalls.plot(list(curve), list(curve.values()), style, color=f"C{number}", label=label)
    recalls.set(title="attention inside the chosen blocks", xlabel="step of the stage", ylabel="share", ylim=(0, 1))
    recalls.legend(fontsize=7, loc="lower right")
    bars.bar_label(bars.barh(list(scores), list(scores.values()), color="C0"), fmt="%.1f", padding=3)
    bars.set(title="questions answered at 2,048 tokens", xlabel="%", xlim=(0, 112))
    bars.invert_yaxis()
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = arguments(__doc__ or "")
    parser.add_argument("--output", type=Path, default=Path("runs/dense-to-sparse-study"))
    parser.add_argument("--plot", type=Path, help="write the curves to this file")
    parser.add_argument("--quick", action="store_true", help="a few steps of every stage, for a look at the machinery")
    options = parser.parse_args()
    recipes = {stage.name: recipe_of(stage, options.output, options.quick) for stage in stages()}
    for name, recipe in recipes.items():
        print(f"== {name}: {recipe.steps} steps", flush=True)
        stopped_by = train(recipe).stopped_by
        if stopped_by is not None:
            sys.exit(128 + stopped_by)  # the same command goes on
    num_batches = 1 if options.quick else SCORED_BATCHES
    convert = recipes["warm-up"].model.convert_to_sparse
    dense = export_of("dense", options.output)
    scores = {
        "dense": score(recipes["dense"], dense, num_batches),
        "converted, not trained": score(recipes["dense"], dense, num_batches, convert),
        "after the warm-up alone": score(recipes["dense"], export_of("warm-up", options.output), num_batches),
    }
    for name in ("with warm-up", "without warm-up", "sparse from scratch"):
        scores[name] = score(recipes["dense"], export_of(name, options.output), num_batches)
    claims = [Claim(f"questions answered: {name}", None, value, "%") for name, value in scores.items()]
    lost = scores["with warm-up"] - scores["dense"]
    claims.append(Claim("with warm-up against dense", None if options.quick else BAR, lost, "points"))
    publish(claims, options.json)
    if options.plot is not None:
        plot(options.plot, options.output, scores)
        print(f"{options.plot} ({machine()})")


if __name__ == "__main__":
    main()
