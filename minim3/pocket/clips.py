"""Clips of pocket's world: scenes in which up to two objects move, and questions about them.

A clip is two or three *moments*, each a scene; `FRAMES_PER_MOMENT` equal frames show a moment, as many as a temporal
patch takes, so that a temporal patch shows one moment. What moves goes one cell of `CELL` pixels along one axis from
each moment to the next, and every moment is a scene as `world.py` draws them: nothing touches, and no two centres share
a row, a column or a cell. Nothing comes or goes: colour, shape and number are the same throughout.

The vision tower sees each moment by itself (`vision_segment_max_frames` of pocket's video processor is 1), and an
object that went one cell looks the same to it: what moves, and which way, the text model tells from where it finds it.
"""

from dataclasses import dataclass, replace

import numpy as np

from minim3.pocket.questions import Look, Question, ask, pick_wording, unique_looks
from minim3.pocket.reasoning import look_words, of_motions, of_track, place_words
from minim3.pocket.wordings import CLIP_LIST_WORDINGS, CLIP_WORDINGS
from minim3.pocket.world import CELL, HELD_OUT_PAIRS, PairSet, Scene, SceneObject, draw, has_room, random_scene

CLIP_KINDS = ("direction", "moves", "mover", "where_at", "colour", "shape", "count")
STILL_KINDS = ("colour", "shape", "count")  # asked as of a picture
LIST_KINDS = ("track", "motions")  # trained, not scored
FRAMES_PER_MOMENT = 2
FPS = 1.0
MAX_MOVING = 2
MIN_MOMENTS, MAX_MOMENTS = 2, 3
MAX_CLIP_OBJECTS = 5
STEP = CELL  # pixels from one moment to the next
DIRECTIONS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
STANDING = "still"
OBJECT_COUNT_WEIGHTS = (0.15, 0.25, 0.25, 0.2, 0.15)
MOVING_WEIGHTS = (0.25, 0.4, 0.35)  # no object, one, two


@dataclass(frozen=True)
class Motion:
    """Object number `index` moves by `STEP` pixels between any two moments."""

    index: int
    direction: str


@dataclass(frozen=True)
class ClipScene:
    """The same objects, in the same order, at each moment."""

    moments: tuple[Scene, ...]
    motions: tuple[Motion, ...]

    def direction(self, index: int) -> str | None:
        """Which way object number `index` moves; None where it stands."""
        return next((motion.direction for motion in self.motions if motion.index == index), None)

    def track(self, index: int) -> list[SceneObject]:
        """Object number `index` at each moment."""
        return [scene.objects[index] for scene in self.moments]


def random_clip(
    rng: np.random.Generator,
    *,
    num_moving: int | None = None,
    pairs: PairSet = "trained",
    nameless_fraction: float = 0.0,
) -> ClipScene:
    """Draws a clip of 1 to 5 objects, `num_moving` of which move; the rest as in `random_scene`."""
    if num_moving is not None and not 0 <= num_moving <= MAX_MOVING:
        raise ValueError(f"num_moving is {num_moving}; in a clip 0 to {MAX_MOVING} objects move")
    moving = int(rng.choice(MAX_MOVING + 1, p=MOVING_WEIGHTS)) if num_moving is None else num_moving
    num_moments = int(rng.integers(MIN_MOMENTS, MAX_MOMENTS + 1))
    num_objects = max(moving, int(rng.choice(MAX_CLIP_OBJECTS, p=OBJECT_COUNT_WEIGHTS)) + 1)
    while True:
        scene = random_scene(rng, num_objects=num_objects, pairs=pairs, nameless_fraction=nameless_fraction)
        for _ in range(12):
            motions = _random_motions(rng, num_objects, moving)
            moments = tuple(_moment(scene, motions, number) for number in range(num_moments))
            if all(has_room(moment.objects) for moment in moments[1:]):
                return ClipScene(moments, motions)


def _random_motions(rng: np.random.Generator, num_objects: int, moving: int) -> tuple[Motion, ...]:
    names = tuple(DIRECTIONS)
    chosen = sorted(rng.choice(num_objects, size=moving, replace=False).tolist())
    return tuple(Motion(index, names[int(rng.integers(len(names)))]) for index in chosen)


def _moment(scene: Scene, motions: tuple[Motion, ...], number: int) -> Scene:
    objects = list(scene.objects)
    for motion in motions:
        item, (across, down) = objects[motion.index], DIRECTIONS[motion.direction]
        distance = STEP * number
        objects[motion.index] = replace(item, left=item.left + across * distance, top=item.top + down * distance)
    return replace(scene, objects=tuple(objects))


def draw_clip(clip: ClipScene) -> np.ndarray:
    """The frames: uint8 [frames, 112, 112, 3], `FRAMES_PER_MOMENT` for each moment, `FPS` a second."""
    return np.repeat(np.stack([draw(scene) for scene in clip.moments]), FRAMES_PER_MOMENT, axis=0)


def ask_clip(
    clip: ClipScene, kind: str, rng: np.random.Generator, *, held_out_wording: bool = False
) -> Question | None:
    """One question of `kind`; None where the clip offers none that is beyond doubt, or names a held-out pair."""
    if kind not in CLIP_KINDS:
        raise ValueError(f"question kind {kind!r} is none of {CLIP_KINDS}")
    scene = clip.moments[0]
    slots: dict[str, str] = {}
    if kind in STILL_KINDS:
        return ask(scene, kind, rng, held_out_wording=held_out_wording)
    if kind == "mover":
        pair = _one_of_two(clip, rng)
        if pair is None:
            return None
        mover, other = pair
        names = [f"the {item.colour} {item.shape}" for item in pair]
        first = int(rng.integers(2))
        slots, answer = {"one": names[first], "two": names[1 - first]}, names[0]
        index = scene.objects.index(mover)
        reasoning = of_motions([(mover, str(clip.direction(index))), (other, STANDING)])
    else:
        wants_moving = {"direction": True, "moves": bool(rng.random() < 0.5)}.get(kind)
        target = _described(clip, rng, moving=wants_moving)
        if target is None:
            return None
        index, words = target
        track, direction = clip.track(index), clip.direction(index)
        slots, reasoning = {"the": words}, of_track(track)
        if kind == "where_at":
            moment = int(rng.integers(len(track)))
            slots["time"] = f"{moment * FRAMES_PER_MOMENT / FPS:.1f}"
            answer = place_words(track[moment])
        else:
            answer = ("yes" if direction else "no") if kind == "moves" else str(direction)
    text = pick_wording(rng, CLIP_WORDINGS[kind], held_out_wording).format(**slots)
    return Question(kind, kind, text, answer, held_out_wording, reasoning=reasoning)


def _moving(clip: ClipScene) -> list[tuple[SceneObject, str]]:
    """What moves, from left to right at the first moment, and which way."""
    found = [(clip.moments[0].objects[motion.index], motion.direction) for motion in clip.motions]
    return sorted(found, key=lambda pair: pair[0].x)


def _one_of_two(clip: ClipScene, rng: np.random.Generator) -> tuple[SceneObject, SceneObject] | None:
    """One object that moves and one that stands, both of which colour and shape name uniquely."""
    scene = clip.moments[0]
    named = [
        (index, item)
        for index, item in enumerate(scene.objects)
        if item.colour and item.shape and item.pair not in HELD_OUT_PAIRS
        if Look(colour=item.colour, shape=item.shape).count(scene) == 1
    ]
    moving = [item for index, item in named if clip.direction(index)]
    standing = [item for index, item in named if not clip.direction(index)]
    if not moving or not standing:
        return None
    return moving[int(rng.integers(len(moving)))], standing[int(rng.integers(len(standing)))]


def _described(clip: ClipScene, rng: np.random.Generator, *, moving: bool | None = None) -> tuple[int, str] | None:
    """An object that a description fits alone, by its number, and the description."""
    scene = clip.moments[0]
    found = [
        (index, f"the {look.words()}")
        for index, item in enumerate(scene.objects)
        if moving is None or (clip.direction(index) is not None) == moving
        for look in unique_looks(scene, item)
        if not look.held_out
    ]
    return found[int(rng.integers(len(found)))] if found else None


def list_clip(clip: ClipScene, kind: str, rng: np.random.Generator) -> Question | None:
    """What supervises many places at once, for training: see `CLIP_LIST_WORDINGS`."""
    wordings = CLIP_LIST_WORDINGS[kind]
    text = wordings[int(rng.integers(len(wordings)))]
    if kind == "motions":
        order = sorted(range(len(clip.moments[0].objects)), key=lambda index: clip.moments[0].objects[index].x)
        words = [f"{look_words(clip.moments[0].objects[i])} {clip.direction(i) or STANDING}" for i in order]
        return Question(kind, kind, text, ", ".join(words), reasoning=of_motions(_moving(clip)))
    target = _described(clip, rng)
    if target is None:
        return None
    index, words_of_target = target
    track = clip.track(index)
    answer = "; ".join(place_words(item) for item in track)
    return Question(kind, kind, text.format(the=words_of_target), answer, reasoning=of_track(track))
