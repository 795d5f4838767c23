"""The picture world of pocket: scenes of coloured shapes, and how they are drawn.

A scene is plain data (what is where); `draw` turns it into a 112x112 picture. Everything follows from the
generator that is passed in, so a seed names a picture for good. No torch here: scenes are made in a worker process.

What makes a picture unambiguous, for a person as for a model:
  * the three sizes lie far apart (14-16, 24-26 and 36-38 pixels across);
  * boxes of objects keep a gap of `MIN_GAP` pixels, and no two centres share a row or a column: they lie on a lattice
    of `LATTICE` pixels, half a patch, which also spares a small vision tower from learning every shift of every shape;
  * no two centres lie in one cell of `CELL` pixels, what a placeholder token stands for: a token speaks of one object;
  * backgrounds are pale or dark and hardly saturated, objects are saturated, and the two lie about `MIN_CONTRAST` or
    more apart in RGB (black and white: 442).
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import combinations
from typing import Literal

import numpy as np
from PIL import Image, ImageDraw

PICTURE_SIZE = 112
MAX_OBJECTS = 6
MIN_GAP = 3
LATTICE = 7
CELL = 28  # pixels a placeholder token covers on each side
MIN_CONTRAST = 95.0

SHAPES = ("circle", "square", "triangle", "star", "cross", "ring")
COLOURS = {
    "red": (216, 28, 34),
    "green": (35, 155, 55),
    "blue": (35, 75, 225),
    "yellow": (245, 215, 30),
    "purple": (125, 45, 180),
    "orange": (250, 135, 20),
    "cyan": (25, 205, 215),
    "pink": (250, 125, 185),
}
COLOUR_JITTER = 9
NAMELESS_DISTANCE = 90.0  # in RGB, from a colour without a name to the named ones
SIZES = {"small": (14, 16), "medium": (24, 26), "large": (36, 38)}  # even numbers of pixels
SIZE_WEIGHTS = (0.4, 0.35, 0.25)
# (colour, shape) pairs that no training picture and no training question contains.
HELD_OUT_PAIRS = frozenset({("red", "star"), ("blue", "circle"), ("green", "triangle"), ("yellow", "cross")})
BACKGROUND_KINDS = ("plain", "gradient", "noise", "stripes", "checker")

PairSet = Literal["trained", "all", "held_out"]


@dataclass(frozen=True)
class SceneObject:
    """One object: names of its attributes, and its box in pixels (`left`, `top`, `diameter` on each side).

    `colour` or `shape` is None where it has no name: any other colour, or the irregular polygon of seed `outline`.
    """

    colour: str | None
    shape: str | None
    size: str
    left: int
    top: int
    diameter: int
    rgb: tuple[int, int, int]
    outline: int = 0

    @property
    def x(self) -> float:
        """Centre, pixels from the left edge."""
        return self.left + self.diameter / 2

    @property
    def y(self) -> float:
        """Centre, pixels from the top edge."""
        return self.top + self.diameter / 2

    @property
    def pair(self) -> tuple[str | None, str | None]:
        return self.colour, self.shape


@dataclass(frozen=True)
class Background:
    """`kind` is one of BACKGROUND_KINDS; `first` and `second` are RGB; `period` is pixels per stripe or tile."""

    kind: str
    first: tuple[int, int, int]
    second: tuple[int, int, int]
    vertical: bool
    period: int
    noise_seed: int


@dataclass(frozen=True)
class Scene:
    """1 to 6 objects on a background. The order of `objects` carries no meaning."""

    objects: tuple[SceneObject, ...]
    background: Background


def random_scene(
    rng: np.random.Generator,
    *,
    num_objects: int | None = None,
    pairs: PairSet = "trained",
    nameless_fraction: float = 0.0,
) -> Scene:
    """Draws a scene.

    `pairs` says which colour-shape pairs may occur: "trained" leaves HELD_OUT_PAIRS out, "all" allows every pair,
    "held_out" makes sure that one object is a held-out pair and all others are trained ones. That share of the objects
    has a colour or a shape without a name: who sees them learns to tell a colour on any shape, and a shape in any
    colour, instead of the pairs that occur.
    """
    if num_objects is not None and not 1 <= num_objects <= MAX_OBJECTS:
        raise ValueError(f"num_objects is {num_objects}; a scene holds 1 to {MAX_OBJECTS} objects")
    count = int(rng.integers(1, MAX_OBJECTS + 1)) if num_objects is None else num_objects
    looks = _random_pairs(rng, count, pairs)
    while True:
        sizes = rng.choice(len(SIZES), size=count, p=SIZE_WEIGHTS)
        boxes = _place(rng, sizes)
        if boxes is not None:
            break
    names = tuple(SIZES)
    jitter = rng.integers(-COLOUR_JITTER, COLOUR_JITTER + 1, size=(count, 3))
    objects = []
    for (colour, shape), size, box, shift in zip(looks, sizes, boxes, jitter.tolist()):
        red, green, blue = (min(255, max(0, base + delta)) for base, delta in zip(COLOURS[colour], shift))
        item = SceneObject(colour, shape, names[size], *box, (red, green, blue))
        if nameless_fraction and rng.random() < nameless_fraction:
            if rng.random() < 0.5:
                item = replace(item, colour=None, rgb=_nameless_colour(rng))
            else:
                item = replace(item, shape=None, outline=int(rng.integers(2**31)))
        objects.append(item)
    background = _random_background(rng)
    while _contrast(background, objects) < MIN_CONTRAST:
        background = _random_background(rng)
    return Scene(tuple(objects), background)


def _random_pairs(rng: np.random.Generator, count: int, pairs: PairSet) -> list[tuple[str, str]]:
    """Colours and shapes of a scene. Half of the scenes draw from few colours or shapes, or else "how many red
    objects" would nearly always be one."""
    colours, shapes = list(COLOURS), list(SHAPES)
    if rng.random() < 0.3:
        colours = list(rng.choice(colours, size=int(rng.integers(2, 4)), replace=False))
    if rng.random() < 0.3:
        shapes = list(rng.choice(shapes, size=int(rng.integers(2, 4)), replace=False))
    chosen: list[tuple[str, str]] = []
    if pairs == "held_out":
        held_out = sorted(HELD_OUT_PAIRS)
        chosen.append(held_out[int(rng.integers(len(held_out)))])
    # This ends: a colour or a shape is in one held-out pair at most, so two colours and two shapes hold a trained pair.
    while len(chosen) < count:
        if chosen and rng.random() < 0.12 and (pairs == "all" or chosen[-1] not in HELD_OUT_PAIRS):
            chosen.append(chosen[-1])  # the same look twice: descriptions must then be told apart by size, or avoided
            continue
        pair = (str(colours[int(rng.integers(len(colours)))]), str(shapes[int(rng.integers(len(shapes)))]))
        if pairs == "all" or pair not in HELD_OUT_PAIRS:
            chosen.append(pair)
    return chosen


def _nameless_colour(rng: np.random.Generator) -> tuple[int, int, int]:
    """As saturated as the named ones, and far from each: a held-out pair must not come in by the back door."""
    named = np.array(list(COLOURS.values()))
    while True:
        rgb = rng.integers(0, 256, size=3)
        if rgb.min() <= 90 and rgb.max() >= 180 and np.linalg.norm(named - rgb, axis=1).min() >= NAMELESS_DISTANCE:
            return int(rgb[0]), int(rgb[1]), int(rgb[2])


def _place(rng: np.random.Generator, sizes: np.ndarray) -> list[tuple[int, int, int]] | None:
    """Boxes (left, top, diameter) in the order of `sizes`, or None where they do not fit. Large ones go first."""
    limits = list(SIZES.values())
    diameters = [2 * int(rng.integers(limits[size][0] // 2, limits[size][1] // 2 + 1)) for size in sizes]
    boxes: dict[int, tuple[int, int, int]] = {}
    for index in sorted(range(len(diameters)), key=lambda i: -diameters[i]):
        diameter = diameters[index]
        first = -(-(diameter // 2 + 1) // LATTICE)
        last = (PICTURE_SIZE - diameter // 2 - 1) // LATTICE
        for x, y in (LATTICE * rng.integers(first, last + 1, size=(30, 2))).tolist():
            left, top = x - diameter // 2, y - diameter // 2
            if all(_clear(left, top, diameter, *box) for box in boxes.values()):
                boxes[index] = (left, top, diameter)
                break
        else:
            return None
    return [boxes[index] for index in range(len(diameters))]


def has_room(objects: Sequence[SceneObject]) -> bool:
    """Whether these could stand in one scene: inside the picture, apart, no centres in one row, column or cell."""
    boxes = [(item.left, item.top, item.diameter) for item in objects]
    inside = all(left >= 1 and top >= 1 and max(left, top) + size < PICTURE_SIZE for left, top, size in boxes)
    return inside and all(_clear(*one, *two) for one, two in combinations(boxes, 2))


def _clear(left: int, top: int, diameter: int, left2: int, top2: int, diameter2: int) -> bool:
    dx = abs(2 * left + diameter - 2 * left2 - diameter2) / 2
    dy = abs(2 * top + diameter - 2 * top2 - diameter2) / 2
    cell, cell2 = _cell(left, top, diameter), _cell(left2, top2, diameter2)
    return max(dx, dy) >= (diameter + diameter2) / 2 + MIN_GAP and min(dx, dy) > 0 and cell != cell2


def _cell(left: int, top: int, diameter: int) -> tuple[int, int]:
    return (left + diameter // 2) // CELL, (top + diameter // 2) // CELL


def _random_background(rng: np.random.Generator) -> Background:
    kind = BACKGROUND_KINDS[int(rng.integers(len(BACKGROUND_KINDS)))]
    pale = rng.random() < 0.55
    level = int(rng.integers(212, 240) if pale else rng.integers(22, 52))
    tint = rng.integers(-12, 13, size=3)
    step = int(rng.integers(8, 17)) * (-1 if pale else 1)
    first = np.clip(level + tint, 0, 255).tolist()
    second = np.clip(level + tint + step, 0, 255).tolist()
    return Background(
        kind,
        (first[0], first[1], first[2]),
        (second[0], second[1], second[2]),
        bool(rng.random() < 0.5),
        int(rng.integers(5, 15)),
        int(rng.integers(2**31)),
    )


def _contrast(background: Background, objects: list[SceneObject]) -> float:
    """Least distance in RGB between an object and a colour of the background, at the ends of what each kind mixes."""
    first, second = np.array(background.first, float), np.array(background.second, float)
    mixed = np.stack([first + weight * (second - first) for weight in (-0.5, 0, 1, 2)])
    colours = np.array([item.rgb for item in objects], float)
    return float(np.linalg.norm(mixed[:, None] - colours[None], axis=-1).min())


def draw(scene: Scene) -> np.ndarray:
    """The picture: uint8 [112, 112, 3], RGB, edges smoothed."""
    picture = Image.fromarray(_draw_background(scene.background))
    for item in scene.objects:
        picture.paste(item.rgb, (item.left, item.top), _mask(item.shape, item.diameter, item.outline))
    return np.array(picture)


def _draw_background(background: Background) -> np.ndarray:
    size = PICTURE_SIZE
    first, second = np.array(background.first, np.float32), np.array(background.second, np.float32)
    ramp = np.arange(size)
    match background.kind:
        case "plain":
            weight = np.zeros((1, 1), np.float32)
        case "gradient":
            # Twice the step of the other kinds: over the whole width a small one would not be seen.
            weight = (2 * ramp / size).astype(np.float32)[None, :]
        case "stripes":
            weight = (ramp // background.period % 2).astype(np.float32)[None, :]
        case "checker":
            tile = ramp // background.period
            weight = ((tile[:, None] + tile[None, :]) % 2).astype(np.float32)
        case "noise":
            weight = np.random.default_rng(background.noise_seed).random((size, size), np.float32) * 2 - 0.5
        case _:
            raise ValueError(f"background kind {background.kind!r} is none of {BACKGROUND_KINDS}")
    if not background.vertical:
        weight = weight.T
    picture = np.clip(first + (second - first) * weight[:, :, None], 0, 255).astype(np.uint8)
    return np.ascontiguousarray(np.broadcast_to(picture, (size, size, 3)))


@lru_cache(maxsize=256)
def _mask(shape: str | None, diameter: int, outline: int = 0) -> Image.Image:
    """Coverage of each pixel of the box (mode "L"), drawn 8 times larger and averaged."""
    scale = 8
    side = diameter * scale
    mask = Image.new("L", (side, side), 0)
    pen = ImageDraw.Draw(mask)
    box = (0, 0, side - 1, side - 1)
    match shape:
        case "circle":
            pen.ellipse(box, fill=255)
        case "ring":
            pen.ellipse(box, fill=255)
            hole = round(side * 0.27)
            pen.ellipse((hole, hole, side - 1 - hole, side - 1 - hole), fill=0)
        case "square":
            edge = round(side * 0.05)
            pen.rectangle((edge, edge, side - 1 - edge, side - 1 - edge), fill=255)
        case "triangle":
            pen.polygon([(side / 2, 0), (side - 1, side * 0.92), (0, side * 0.92)], fill=255)
        case "cross":
            near, far = side * 0.33, side * 0.67
            pen.rectangle((near, 0, far, side - 1), fill=255)
            pen.rectangle((0, near, side - 1, far), fill=255)
        case "star":
            angles = np.pi * (np.arange(10) / 5 - 0.5)
            radii = np.where(np.arange(10) % 2 == 0, 1.0, 0.42) * side * 0.525
            points = np.stack([side / 2 + radii * np.cos(angles), side * 0.54 + radii * np.sin(angles)], axis=1)
            pen.polygon([(float(x), float(y)) for x, y in points], fill=255)
        case None:
            pen.polygon([(float(x), float(y)) for x, y in (side - 1) * _irregular_polygon(outline)], fill=255)
        case _:
            raise ValueError(f"shape {shape!r} is none of {SHAPES}")
    return mask.reduce(scale)


def _irregular_polygon(seed: int) -> np.ndarray:
    """Corners `[N, 2]` of a shape without a name, which just fills the unit square."""
    rng = np.random.default_rng(seed)
    num_corners = int(rng.integers(5, 10))
    angles = 2 * np.pi * (np.arange(num_corners) + rng.uniform(-0.35, 0.35, num_corners)) / num_corners
    points = rng.uniform(0.35, 1.0, (num_corners, 1)) * np.stack([np.cos(angles), np.sin(angles)], axis=1)
    low, high = points.min(axis=0), points.max(axis=0)
    return (points - low) / (high - low)
