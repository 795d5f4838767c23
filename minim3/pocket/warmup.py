"""The first lesson of pocket: fresh weights on sensible scales, and a vision tower that speaks in words.

    python -m minim3.pocket.warmup recipes/pocket_config.json runs/pocket-vision

A vision tower learns slowly from short answers alone: a picture gives it a handful of target tokens, and until it
distinguishes anything they teach it nothing. Here every placeholder feature is asked directly for the colour, the
shape and the size of the object whose centre lies in its cell, and for where in the cell that centre lies. The rows
of the first three heads are the text model's own embeddings of those words, so the features come to stand beside them:
that of a red star is near `red` plus `star`. The checkpoint written at the end (the rest of the text part as it was
drawn) is what `recipes/pocket_text.yaml` starts from. Clips need no lesson of their own: their moments reach the tower
one by one, as pictures.
"""

import argparse
import json
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from minim3.config import MiniMaxM3VLConfig
from minim3.model.causal_lm import MiniMaxM3SparseForConditionalGeneration
from minim3.pocket.source import WARMUP_STREAM
from minim3.pocket.world import CELL, COLOURS, LATTICE, PICTURE_SIZE, SHAPES, SIZES, Scene, draw, random_scene
from minim3.processing.image import MiniMaxM3VLImageProcessor
from minim3.processing.processor import MiniMaxM3VLProcessor
from minim3.processing.tokenizer import Tokenizer
from minim3.training.config import OptimRecipe, ScheduleRecipe
from minim3.training.optim import build_optimizer, schedule_factor, set_learning_rate

ATTRIBUTES = (tuple(COLOURS), SHAPES, tuple(SIZES))
NUM_PLACES = CELL // LATTICE  # on each side of a cell. Which cell it is, a tower of relative positions cannot tell
PLACE_WEIGHT = 0.5
NAMELESS = -100  # what cross_entropy leaves out
NAMELESS_FRACTION = 0.5
EMPTY_WEIGHT = 0.3  # most cells are empty
EMBEDDING_STD = 0.5
# Normed queries and keys of 32 channels meet in logits of at most 5.7 (32 ** 0.5), too blunt to single a token out of a
# hundred, and their scales move slowly: twice that on both sides gives 22.6. (With 128 channels it is 11.3 by itself.)
HEAD_NORM_WEIGHT = 1.0
RESIDUAL_FACTOR = 0.3  # about (2 * layers) ** -0.5: what layers add starts small beside what they add it to


@torch.no_grad()
def draw_weights(model: MiniMaxM3SparseForConditionalGeneration, tokenizer: Tokenizer) -> None:
    """Text weights of deviation `fan_in ** -0.5`, smaller where a layer writes to the residual stream.

    A word starts with the same embedding with and without the space before it.
    """
    for name, parameter in model.text_model.named_parameters():
        if parameter.dim() > 1:
            writes = name.endswith(("o_proj.weight", "down_proj.weight", "w2"))
            parameter.normal_(0.0, parameter.shape[-1] ** -0.5 * (RESIDUAL_FACTOR if writes else 1.0))
        elif name.endswith((".q_norm.weight", ".k_norm.weight")):
            parameter.fill_(HEAD_NORM_WEIGHT)
    embeddings = model.text_model.embed_tokens.weight
    embeddings.normal_(0.0, EMBEDDING_STD)
    for token_id in range(tokenizer.vocab_size):
        text = tokenizer.decode([token_id])
        bare = tokenizer.encode(text[1:]) if text[:1] == " " and text[1:].isalpha() else []
        if len(bare) == 1:
            embeddings[bare[0]] = embeddings[token_id]


class AttributeHead(nn.Module):
    """Logits of no object and of each word, from features `[N, H]`: products with the embeddings of the words."""

    def __init__(self, model: MiniMaxM3SparseForConditionalGeneration, tokenizer: Tokenizer, words: Sequence[str]):
        super().__init__()
        ids = [tokenizer.encode(f" {word}") for word in words]
        assert all(len(tokens) == 1 for tokens in ids), words
        rows = model.text_model.embed_tokens.weight[[tokens[0] for tokens in ids]]
        self.words: Tensor
        self.register_buffer("words", rows.detach().clone())
        self.empty = nn.Parameter(torch.zeros(1, rows.shape[1]))

    def forward(self, features: Tensor) -> Tensor:
        return features @ torch.cat([self.empty, self.words]).t()


def cell_targets(scene: Scene) -> Tensor:
    """int64 `[cells, 5]`: of the object centred in each cell, indices of colour, shape and size (`NAMELESS` for one
    without a name), and where in the cell its centre lies, in steps of `LATTICE` from the left and from the top; 0
    where there is none."""
    columns = PICTURE_SIZE // CELL
    targets = torch.zeros(columns * columns, len(ATTRIBUTES) + 2, dtype=torch.int64)
    for item in scene.objects:
        cell = int(item.y // CELL) * columns + int(item.x // CELL)
        names = (item.colour, item.shape, item.size)
        indices = [known.index(name) + 1 if name else NAMELESS for known, name in zip(ATTRIBUTES, names)]
        places = [int(centre) // LATTICE % NUM_PLACES for centre in (item.x, item.y)]
        targets[cell] = torch.tensor(indices + places)
    return targets


def batches(processor: MiniMaxM3VLImageProcessor, seed: int, num_pictures: int) -> Iterator[tuple[Tensor, ...]]:
    """Patches, grids and targets `[num_pictures * cells, 5]` of fresh pictures, without end."""
    step = 0
    while True:
        rng = np.random.default_rng([WARMUP_STREAM, seed, step])
        scenes = [random_scene(rng, nameless_fraction=NAMELESS_FRACTION) for _ in range(num_pictures)]
        inputs = processor([draw(scene) for scene in scenes])
        targets = torch.cat([cell_targets(scene) for scene in scenes])
        yield inputs["pixel_values"], inputs["image_grid_thw"], targets
        step += 1


def warm_up(
    model: MiniMaxM3SparseForConditionalGeneration, processor: MiniMaxM3VLProcessor, *, steps: int = 800,
    num_pictures: int = 48, lr: float = 2e-3, muon_lr: float = 0.01, seed: int = 0, log_every_steps: int = 25,
) -> None:  # fmt: skip
    """Train tower and projectors of `model` in place: Muon, linear warm-up over 5% of the steps, cosine to 0."""
    heads = nn.ModuleList([AttributeHead(model, processor.tokenizer, words) for words in ATTRIBUTES])
    places = nn.ModuleList([nn.Linear(model.text_config.hidden_size, NUM_PLACES) for _ in range(2)])
    images = processor.image_processor
    assert images is not None
    # Muon leaves what is named "lm_head" to AdamW: rows of logits are no matrix in between two layers.
    pupils = nn.ModuleDict(
        {
            "vision_tower": model.vision_tower,
            "multi_modal_projector": model.multi_modal_projector,
            "patch_merge_mlp": model.patch_merge_mlp,
            "lm_head": nn.ModuleList([heads, places]),
        }
    )
    parameters = list(pupils.parameters())
    schedule = ScheduleRecipe("cosine", warmup_steps=max(1, steps // 20))
    optimizer = build_optimizer(
        pupils, OptimRecipe(kind="muon", lr=lr, muon_lr=muon_lr, betas=(0.9, 0.98), weight_decay=0.05)
    )
    right, seen, started = torch.zeros(len(ATTRIBUTES) + 2), torch.zeros(len(ATTRIBUTES) + 2), time.monotonic()
    for step, (pixels, grids, targets) in zip(range(1, steps + 1), batches(images, seed, num_pictures)):
        features = model.get_image_features(pixels, grids)
        loss = features.new_zeros(())
        occupied = targets[:, 2] > 0
        for number, head in enumerate(heads):
            logits, target = head(features), targets[:, number]
            weight = torch.ones(logits.shape[1])
            weight[0] = EMPTY_WEIGHT
            loss = loss + F.cross_entropy(logits, target, weight)
            right[number] += (logits.argmax(-1) == target)[occupied].sum()
            seen[number] += (target[occupied] != NAMELESS).sum()
        for number, head in enumerate(places, start=len(heads)):
            logits, target = head(features[occupied]), targets[occupied, number]
            loss = loss + PLACE_WEIGHT * F.cross_entropy(logits, target)
            right[number] += (logits.argmax(-1) == target).sum()
            seen[number] += len(target)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0, foreach=True)
        set_learning_rate(optimizer, schedule_factor(step - 1, steps, schedule))
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if step % log_every_steps == 0 or step == steps:
            colour, shape, size, across, down = (right / seen.clamp_min(1)).tolist()
            print(
                f"step {step}/{steps} loss {loss.item():.3f} objects right: colour {colour:.3f} shape {shape:.3f} "
                f"size {size:.3f} across {across:.3f} down {down:.3f} features {features.detach().std():.2f} "
                f"{time.monotonic() - started:.0f} s",
                file=sys.stderr, flush=True,
            )  # fmt: skip
            right.zero_()
            seen.zero_()


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m minim3.pocket.warmup", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
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
    processor = MiniMaxM3VLProcessor.from_pretrained(Path(__file__).parent / "weights")
    draw_weights(model, processor.tokenizer)
    warm_up(model, processor, steps=options.steps, seed=options.seed)
    model.save_pretrained(options.output, format="fp32")


if __name__ == "__main__":
    main()
