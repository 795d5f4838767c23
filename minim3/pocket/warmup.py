"""The first lesson of pocket: fresh weights on sensible scales, and a vision tower that speaks in words.

    python -m minim3.pocket.warmup recipes/pocket_config.json runs/pocket-vision
    python -m minim3.pocket.warmup --start-from minim3/pocket/weights runs/pocket-vision

A vision tower learns slowly from short answers alone: a picture gives it a handful of target tokens, and until it
distinguishes anything they teach it nothing. Here every placeholder feature is asked directly for the colour, the
shape and the size of the object whose centre lies in its cell, and for where in the cell that centre lies. The rows
of the first three heads are the text model's own embeddings of those words, so the features come to stand beside them:
that of a red star is near `red` plus `star`. The checkpoint written at the end (the rest of the text part as it was
drawn) is what `recipes/pocket_text.yaml` starts from.

A share of the steps shows clips. The tower attends within all moments of a clip, so pictures alone do not teach it
clips: every cell of every moment is asked the same as a cell of a picture, and which way the object in it moves.

With `--start-from` the text model already reads the features of the tower it was trained with. They are kept: what the
tower says of a picture, and of each moment of a clip, shall stay what it said before of that picture, and of the moment
as a picture. To the features of what moves, a vector for its direction is added: the embedding of the word for it.
"""

import argparse
import copy
import json
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from minim3.config import MiniMaxM3VLConfig
from minim3.model.causal_lm import MiniMaxM3SparseForConditionalGeneration
from minim3.pocket.clips import DIRECTIONS, FPS, ClipScene, draw_clip, random_clip
from minim3.pocket.source import WARMUP_STREAM
from minim3.pocket.world import CELL, COLOURS, LATTICE, PICTURE_SIZE, SHAPES, SIZES, Scene, draw, random_scene
from minim3.processing.processor import MiniMaxM3VLProcessor
from minim3.processing.tokenizer import Tokenizer
from minim3.training.config import OptimRecipe, ScheduleRecipe
from minim3.training.optim import build_optimizer, schedule_factor, set_learning_rate

ATTRIBUTES = (tuple(COLOURS), SHAPES, tuple(SIZES))
ATTRIBUTE_NAMES = ("colour", "shape", "size", "across", "down", "moves")
NUM_PLACES = CELL // LATTICE  # on each side of a cell. Which cell it is, a tower of relative positions cannot tell
PLACE_WEIGHT = 0.5
NAMELESS = -100  # what cross_entropy leaves out
NAMELESS_FRACTION = 0.5
EMPTY_WEIGHT = 0.3  # most cells are empty
STANDING_WEIGHT = 0.3  # most objects stand still
CLIP_FRACTION = 0.4  # of the steps
DIRECTION_GAIN = 2.0  # of the word added to the features of a trained tower, which are several times larger than words
MOMENTS_PER_CLIP = 3  # on average: so many fewer clips make a batch
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


def clip_targets(clip: ClipScene) -> Tensor:
    """int64 `[moments * cells, 6]`: `cell_targets` of each moment, and which of `DIRECTIONS` (from 1) the object goes,
    0 where it stands or there is none."""
    columns = PICTURE_SIZE // CELL
    targets = []
    for scene in clip.moments:
        directions = torch.zeros(columns * columns, 1, dtype=torch.int64)
        for motion in clip.motions:
            item = scene.objects[motion.index]
            cell = int(item.y // CELL) * columns + int(item.x // CELL)
            directions[cell] = list(DIRECTIONS).index(motion.direction) + 1
        targets.append(torch.cat([cell_targets(scene), directions], dim=1))
    return torch.cat(targets)


@dataclass(frozen=True)
class Lesson:
    """A batch of pictures or of clips: patches, grids (a row a picture or clip), targets `[cells, 6]`."""

    pixels: Tensor
    grids: Tensor
    targets: Tensor

    def as_pictures(self) -> Tensor:
        """The grids of the same patches with every moment a picture of its own."""
        return torch.cat([row.new_tensor([[1, *row[1:].tolist()]] * int(row[0])) for row in self.grids])


def batches(
    processor: MiniMaxM3VLProcessor, seed: int, num_pictures: int, clip_fraction: float = CLIP_FRACTION
) -> Iterator[Lesson]:
    """Fresh pictures, and now and then fresh clips of about as many moments as there are pictures, without end."""
    images, videos = processor.image_processor, processor.video_processor
    assert images is not None
    assert videos is not None
    step = 0
    while True:
        rng = np.random.default_rng([WARMUP_STREAM, seed, step])
        step += 1
        if rng.random() < clip_fraction:
            number = max(1, num_pictures // MOMENTS_PER_CLIP)
            clips = [random_clip(rng, nameless_fraction=NAMELESS_FRACTION) for _ in range(number)]
            metadata = [{"fps": FPS}] * number
            inputs = videos([draw_clip(clip) for clip in clips], video_metadata=metadata, do_resize=False)
            targets = torch.cat([clip_targets(clip) for clip in clips])
            yield Lesson(inputs["pixel_values_videos"], inputs["video_grid_thw"], targets)
            continue
        scenes = [random_scene(rng, nameless_fraction=NAMELESS_FRACTION) for _ in range(num_pictures)]
        inputs = images([draw(scene) for scene in scenes])
        targets = torch.cat([cell_targets(scene) for scene in scenes])
        yield Lesson(inputs["pixel_values"], inputs["image_grid_thw"], F.pad(targets, (0, 1)))


class Heads(nn.Module):
    """What the features are asked. `from_words`: by products with the embeddings of the words, else by free rows."""

    def __init__(
        self, model: MiniMaxM3SparseForConditionalGeneration, tokenizer: Tokenizer, *, from_words: bool
    ) -> None:
        super().__init__()
        hidden = model.text_config.hidden_size
        groups = (*ATTRIBUTES, tuple(DIRECTIONS))
        heads: list[nn.Module] = [
            AttributeHead(model, tokenizer, words) if from_words else nn.Linear(hidden, len(words) + 1)
            for words in groups
        ]
        self.attributes = nn.ModuleList(heads[:-1])
        self.direction = heads[-1]
        self.places = nn.ModuleList([nn.Linear(hidden, NUM_PLACES) for _ in range(2)])

    def forward(self, features: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The loss, and for each of `ATTRIBUTE_NAMES` how many objects were right and how many were asked about (for
        the last only those that move)."""
        loss = features.new_zeros(())
        right, seen = torch.zeros(len(ATTRIBUTE_NAMES)), torch.zeros(len(ATTRIBUTE_NAMES))
        occupied = targets[:, 2] > 0
        for number, head in enumerate(self.attributes):
            logits, target = head(features), targets[:, number]
            loss = loss + F.cross_entropy(logits, target, _first_weight(logits, EMPTY_WEIGHT))
            right[number] = (logits.argmax(-1) == target)[occupied].sum()
            seen[number] = (target[occupied] != NAMELESS).sum()
        for number, head in enumerate(self.places, start=len(self.attributes)):
            logits, target = head(features[occupied]), targets[occupied, number]
            loss = loss + PLACE_WEIGHT * F.cross_entropy(logits, target)
            right[number], seen[number] = (logits.argmax(-1) == target).sum(), len(target)
        logits, target = self.direction(features[occupied]), targets[occupied, -1]
        loss = loss + F.cross_entropy(logits, target, _first_weight(logits, STANDING_WEIGHT))
        moving = target > 0
        right[-1], seen[-1] = (logits.argmax(-1) == target)[moving].sum(), moving.sum()
        return loss, right, seen


def _first_weight(logits: Tensor, first: float) -> Tensor:
    weight = torch.ones(logits.shape[1])
    weight[0] = first
    return weight


class Keeper:
    """The features that a trained text model expects: those of its tower as it was, with directions added."""

    def __init__(self, model: MiniMaxM3SparseForConditionalGeneration, tokenizer: Tokenizer) -> None:
        self.model = copy.deepcopy(model).requires_grad_(False)
        directions = AttributeHead(model, tokenizer, tuple(DIRECTIONS)).words
        self.directions = DIRECTION_GAIN * torch.cat([torch.zeros_like(directions[:1]), directions])

    def loss(self, features: Tensor, lesson: Lesson) -> Tensor:
        """Squared error, as a share of the variance of what is expected."""
        with torch.no_grad():
            expected = self.model.get_image_features(lesson.pixels, lesson.as_pictures())
            expected = expected + self.directions[lesson.targets[:, -1]]
        return F.mse_loss(features, expected) / expected.var()


def warm_up(
    model: MiniMaxM3SparseForConditionalGeneration, processor: MiniMaxM3VLProcessor, *, steps: int = 800,
    num_pictures: int = 48, lr: float = 2e-3, muon_lr: float = 0.01, clip_fraction: float = CLIP_FRACTION,
    keep_features: bool = False, seed: int = 0, log_every_steps: int = 25,
) -> None:  # fmt: skip
    """Train tower and projectors of `model` in place: Muon, linear warm-up over 5% of the steps, cosine to 0.

    `keep_features`: the text model is trained already (see `Keeper`); the heads then only measure.
    """
    heads = Heads(model, processor.tokenizer, from_words=not keep_features)
    keeper = Keeper(model, processor.tokenizer) if keep_features else None
    # Muon leaves what is named "lm_head" to AdamW: rows of logits are no matrix in between two layers.
    pupils = nn.ModuleDict(
        {
            "vision_tower": model.vision_tower,
            "multi_modal_projector": model.multi_modal_projector,
            "patch_merge_mlp": model.patch_merge_mlp,
            "lm_head": heads,
        }
    )
    parameters = list(pupils.parameters())
    schedule = ScheduleRecipe("cosine", warmup_steps=max(1, steps // 20))
    optimizer = build_optimizer(
        pupils, OptimRecipe(kind="muon", lr=lr, muon_lr=muon_lr, betas=(0.9, 0.98), weight_decay=0.05)
    )
    tally, started = _Tally(), time.monotonic()
    for step, lesson in zip(range(1, steps + 1), batches(processor, seed, num_pictures, clip_fraction)):
        features = model.get_image_features(lesson.pixels, lesson.grids)
        loss, right, seen = heads(features if keeper is None else features.detach(), lesson.targets)
        tally.add("clips" if (lesson.grids[:, 0] > 1).any() else "pictures", right, seen)
        if keeper is not None:
            kept = keeper.loss(features, lesson)
            loss = loss + kept
            tally.kept = kept.item()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0, foreach=True)
        set_learning_rate(optimizer, schedule_factor(step - 1, steps, schedule))
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if step % log_every_steps == 0 or step == steps:
            print(
                f"step {step}/{steps} loss {loss.item():.3f} {tally.words()} features {features.detach().std():.2f} "
                f"{time.monotonic() - started:.0f} s",
                file=sys.stderr, flush=True,
            )  # fmt: skip
            tally = _Tally()


class _Tally:
    """Which objects the heads got right since the last line was printed, apart for pictures and clips."""

    def __init__(self) -> None:
        self.right: dict[str, Tensor] = {}
        self.seen: dict[str, Tensor] = {}
        self.kept: float | None = None

    def add(self, part: str, right: Tensor, seen: Tensor) -> None:
        self.right[part] = self.right.get(part, torch.zeros_like(right)) + right
        self.seen[part] = self.seen.get(part, torch.zeros_like(seen)) + seen

    def words(self) -> str:
        parts = [] if self.kept is None else [f"unlike before {self.kept:.4f}"]
        for part, seen in sorted(self.seen.items()):
            shares = (self.right[part] / seen.clamp_min(1)).tolist()
            named = [f"{name} {share:.3f}" for name, share, n in zip(ATTRIBUTE_NAMES, shares, seen.tolist()) if n]
            parts.append(f"{part} right: {' '.join(named)}")
        return ", ".join(parts)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m minim3.pocket.warmup", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("config", type=Path, nargs="?", help="config.json of the model, in the released dialect")
    parser.add_argument("output", type=Path, help="folder of the checkpoint to write")
    parser.add_argument("--start-from", type=Path, help="in the place of config: the checkpoint to go on with")
    parser.add_argument("--steps", type=int, default=800)
    parser.add_argument("--muon-lr", type=float, default=0.01)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--clip-fraction", type=float, default=CLIP_FRACTION, help="of the steps")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int)
    options = parser.parse_args()
    if (options.config is None) == (options.start_from is None):
        parser.error("give a config, or a checkpoint with --start-from")
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    processor = MiniMaxM3VLProcessor.from_pretrained(Path(__file__).parent / "weights")
    if options.start_from is None:
        config = MiniMaxM3VLConfig.from_dict(json.loads(options.config.read_text(encoding="utf-8")))
        model = MiniMaxM3SparseForConditionalGeneration.from_config(config)
        draw_weights(model, processor.tokenizer)
    else:
        model = MiniMaxM3SparseForConditionalGeneration.from_pretrained(options.start_from, dtype=torch.float32)
    warm_up(
        model, processor, steps=options.steps, lr=options.lr, muon_lr=options.muon_lr,
        clip_fraction=options.clip_fraction, keep_features=options.start_from is not None, seed=options.seed,
    )  # fmt: skip
    model.save_pretrained(options.output, format="fp32")


if __name__ == "__main__":
    main()
