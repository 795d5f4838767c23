"""The first lesson of pocket's vision tower: what lies in each cell of the picture.

    python -m minim3.pocket.warmup recipes/pocket_config.json runs/pocket-vision

A vision tower learns slowly from short answers alone: a picture gives it a handful of target tokens, and until it
distinguishes anything they teach it nothing. Here every placeholder feature is asked directly, through three linear
heads that are thrown away afterwards, for colour, shape and size of the object whose centre lies in its cell. The
checkpoint written at the end (text part untouched) is what `recipes/pocket.yaml` starts from.
"""

import argparse
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from minim3.config import MiniMaxM3VLConfig
from minim3.model.causal_lm import MiniMaxM3SparseForConditionalGeneration
from minim3.pocket.source import WARMUP_STREAM
from minim3.pocket.world import COLOURS, PICTURE_SIZE, SHAPES, SIZES, Scene, draw, random_scene
from minim3.processing.image import MiniMaxM3VLImageProcessor

CELL = 28  # pixels a placeholder token covers on each side
ATTRIBUTES = (tuple(COLOURS), SHAPES, tuple(SIZES))
EMPTY_WEIGHT = 0.3  # most cells are empty


def cell_targets(scene: Scene) -> Tensor:
    """int64 `[cells, 3]`: indices of colour, shape and size of the object centred in each cell, 0 where there is none.

    Of two objects in a cell the larger one counts.
    """
    columns = PICTURE_SIZE // CELL
    targets = torch.zeros(columns * columns, len(ATTRIBUTES), dtype=torch.int64)
    for item in sorted(scene.objects, key=lambda item: item.diameter):
        cell = int(item.y // CELL) * columns + int(item.x // CELL)
        names = (item.colour, item.shape, item.size)
        targets[cell] = torch.tensor([known.index(name) + 1 for known, name in zip(ATTRIBUTES, names)])
    return targets


def batches(processor: MiniMaxM3VLImageProcessor, seed: int, num_pictures: int) -> Iterator[tuple[Tensor, ...]]:
    """Patches, grids and targets `[num_pictures * cells, 3]` of fresh pictures, without end."""
    step = 0
    while True:
        rng = np.random.default_rng([WARMUP_STREAM, seed, step])
        scenes = [random_scene(rng) for _ in range(num_pictures)]
        inputs = processor([draw(scene) for scene in scenes])
        targets = torch.cat([cell_targets(scene) for scene in scenes])
        yield inputs["pixel_values"], inputs["image_grid_thw"], targets
        step += 1


def warm_up(
    model: MiniMaxM3SparseForConditionalGeneration, processor: MiniMaxM3VLImageProcessor, *, steps: int = 800,
    num_pictures: int = 48, lr: float = 2e-3, seed: int = 0, log_every_steps: int = 25,
) -> None:  # fmt: skip
    """Train tower and projectors of `model` in place: AdamW, linear warm-up over 5% of the steps, cosine to 0."""
    heads = nn.ModuleList([nn.Linear(model.text_config.hidden_size, len(names) + 1) for names in ATTRIBUTES])
    parts = (model.vision_tower, model.multi_modal_projector, model.patch_merge_mlp, heads)
    parameters = [parameter for part in parts for parameter in part.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=lr, betas=(0.9, 0.98), weight_decay=0.05, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps, pct_start=0.05)
    right, seen, started = torch.zeros(len(ATTRIBUTES)), 0, time.monotonic()
    for step, (pixels, grids, targets) in zip(range(1, steps + 1), batches(processor, seed, num_pictures)):
        features = model.get_image_features(pixels, grids)
        loss = features.new_zeros(())
        occupied = targets[:, 0] > 0
        for number, head in enumerate(heads):
            logits, target = head(features), targets[:, number]
            weight = torch.ones(logits.shape[1])
            weight[0] = EMPTY_WEIGHT
            loss = loss + F.cross_entropy(logits, target, weight)
            right[number] += (logits.argmax(-1) == target)[occupied].sum()
        seen += int(occupied.sum())
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0, foreach=True)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        schedule.step()
        if step % log_every_steps == 0 or step == steps:
            colour, shape, size = (right / max(1, seen)).tolist()
            print(
                f"step {step}/{steps} loss {loss.item():.3f} objects right: colour {colour:.3f} shape {shape:.3f} "
                f"size {size:.3f} features {features.detach().std():.2f} {time.monotonic() - started:.0f} s",
                file=sys.stderr, flush=True,
            )  # fmt: skip
            right.zero_()
            seen = 0


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m minim3.pocket.warmup", description=__doc__)
    parser.add_argument("config", type=Path, help="config.json of the model, in the released dialect")
    parser.add_argument("output", type=Path, help="folder of the checkpoint to write")
    parser.add_argument("--steps", type=int, default=800)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int)
    options = parser.parse_args()
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    config = MiniMaxM3VLConfig.from_dict(json.loads(options.config.read_text(encoding="utf-8")))
    model = MiniMaxM3SparseForConditionalGeneration.from_config(config)
    processor = MiniMaxM3VLImageProcessor.from_pretrained(Path(__file__).parent / "weights")
    warm_up(model, processor, steps=options.steps, seed=options.seed)
    model.save_pretrained(options.output, format="fp32")


if __name__ == "__main__":
    main()
