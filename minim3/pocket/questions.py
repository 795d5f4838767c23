"""Questions about a scene, with their answers, and the strict check of an answer.

A question is asked only where its answer is beyond doubt:
  * "the ..." describes exactly one object of the scene;
  * left, right, above and below compare centres along one axis alone, and the two compared lie at least
    `RELATION_MARGIN` pixels apart on it;
  * "what is left of X?" is asked when exactly one object lies clearly left and every other one clearly does not.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from minim3.pocket.reasoning import note, of_look, of_number, of_places, place_words
from minim3.pocket.wordings import (
    COMPARISON_WORDS,
    DESCRIBE_WORDINGS,
    PICTURE_WORDINGS,
    PLACE_WORDINGS,
    RELATION_WORDS,
    Wordings,
)
from minim3.pocket.world import COLOURS, HELD_OUT_PAIRS, PICTURE_SIZE, SHAPES, SIZES, Scene, SceneObject

T = TypeVar("T")

KINDS = ("colour", "shape", "size", "count", "count_of", "exists", "relation")
RELATION_FORMS = ("relation_is", "relation_which", "relation_what")
RELATION_MARGIN = 14
CLEARLY_NOT = 4
NUMBER_WORDS = ("zero", "one", "two", "three", "four", "five", "six")
OPPOSITE = {"left": "right", "right": "left", "above": "below", "below": "above"}


@dataclass(frozen=True)
class Question:
    """`kind` is what is scored by, `form` the key of its wordings; the flags say what of it training never shows.

    `reasoning` is what one would note on the way to the answer; it is trained with thinking enabled, and not scored.
    """

    kind: str
    form: str
    text: str
    answer: str
    held_out_wording: bool = False
    held_out_pair: bool = False
    reasoning: str = ""


@dataclass(frozen=True)
class Look:
    """A description: any of the three attributes, None where it is left open."""

    size: str | None = None
    colour: str | None = None
    shape: str | None = None

    def fits(self, item: SceneObject) -> bool:
        return (
            (self.size is None or self.size == item.size)
            and (self.colour is None or self.colour == item.colour)
            and (self.shape is None or self.shape == item.shape)
        )

    def count(self, scene: Scene) -> int:
        return sum(self.fits(item) for item in scene.objects)

    @property
    def held_out(self) -> bool:
        return (self.colour, self.shape) in HELD_OUT_PAIRS

    def words(self) -> str:
        return " ".join(word for word in (self.size, self.colour, self.shape or "object") if word)

    def plural(self) -> str:
        words = self.words()
        return words + ("es" if words.endswith("s") else "s")

    def with_article(self) -> str:
        words = self.words()
        return ("an " if words[0] in "aeiou" else "a ") + words


def normalise(text: str) -> str:
    """Lower case, single spaces, without closing punctuation or a leading article: what two answers are compared by."""
    text = re.sub(r"\s+", " ", text).strip().strip(".!,;:\"'").strip().casefold()
    return re.sub(r"^(the|an|a) ", "", text)


def is_right(question: Question, answer: str) -> bool:
    """Strict: the whole answer must be the expected one, but for what `normalise` drops."""
    return normalise(answer) == normalise(question.answer)


def pick_wording(rng: np.random.Generator, wordings: Wordings, held_out: bool) -> str:
    choices = wordings.held_out if held_out else wordings.trained
    return choices[int(rng.integers(len(choices)))]


def ask(
    scene: Scene,
    kind: str,
    rng: np.random.Generator,
    *,
    held_out_wording: bool = False,
    held_out_pair: bool = False,
    attempts: int = 6,
) -> Question | None:
    """One question of `kind`, or None where `attempts` draws found none that is unambiguous.

    With `held_out_pair` the question is about a colour-shape pair that training never shows: one object it speaks of
    has that pair (for "count": one object of the scene has it). Otherwise no held-out pair is named or asked about.
    """
    if kind not in KINDS:
        raise ValueError(f"question kind {kind!r} is none of {KINDS}")
    maker = {
        "colour": _ask_attribute,
        "shape": _ask_attribute,
        "size": _ask_attribute,
        "count": _ask_count,
        "count_of": _ask_count_of,
        "exists": _ask_exists,
        "relation": _ask_relation,
    }[kind]
    for _ in range(attempts):
        made = maker(scene, kind, rng, held_out_pair)
        if made is not None:
            break
    else:
        return None
    form, slots, answer, reasoning = made
    text = pick_wording(rng, PICTURE_WORDINGS[form], held_out_wording).format(**slots)
    return Question(kind, form, text, answer, held_out_wording, held_out_pair, reasoning)


Made = tuple[str, dict[str, str], str, str] | None  # form, slots of the wording, answer, reasoning


def _pick(rng: np.random.Generator, items: list[T]) -> T:
    return items[int(rng.integers(len(items)))]


def _ask_attribute(scene: Scene, kind: str, rng: np.random.Generator, held_out_pair: bool) -> Made:
    """Colour, shape or size of an object that the other attributes describe. Short descriptions are preferred."""
    targets = [item for item in scene.objects if (item.pair in HELD_OUT_PAIRS) == held_out_pair]
    if not targets:
        return None
    target = _pick(rng, targets)
    values = {"size": target.size, "colour": target.colour, "shape": target.shape}
    answer = values.pop(kind)
    if answer is None:
        return None
    first, second = values
    unique = [
        look
        for look in (Look(**{first: values[first]}), Look(**{second: values[second]}), Look(**values))
        if look.count(scene) == 1 and not (look.held_out and not held_out_pair)
    ]
    if not unique:
        return None
    return kind, {"the": "the " + _pick(rng, unique).words()}, answer, of_look(target)


def _ask_count(scene: Scene, kind: str, rng: np.random.Generator, held_out_pair: bool) -> Made:
    if any(item.pair in HELD_OUT_PAIRS for item in scene.objects) != held_out_pair:
        return None
    number = NUMBER_WORDS[len(scene.objects)]
    return kind, {}, number, of_number(scene.objects, number)


def _looks(items: Iterable[SceneObject]) -> list[Look]:
    """Colour, shape, colour and shape, size and shape, size and colour of every object, each description once. Where
    colour or shape has no name, what is left; but not every "object", which is a kind of question of its own."""
    looks: dict[Look, None] = {}
    for item in items:
        looks[Look(colour=item.colour)] = None
        looks[Look(shape=item.shape)] = None
        looks[Look(colour=item.colour, shape=item.shape)] = None
        looks[Look(size=item.size, shape=item.shape)] = None
        looks[Look(size=item.size, colour=item.colour)] = None
    return [look for look in looks if look != Look()]


def unique_looks(scene: Scene, item: SceneObject) -> list[Look]:
    """The descriptions that fit this object and no other."""
    return [look for look in _looks([item]) if look.count(scene) == 1]


def _absent_look(scene: Scene, rng: np.random.Generator) -> Look | None:
    """Something that is not there, mostly a near miss: a present colour with the shape of another object."""
    for _ in range(8):
        one, two = _pick(rng, list(scene.objects)), _pick(rng, list(scene.objects))
        colour, shape = one.colour, two.shape
        if rng.random() < 0.6:
            if rng.random() < 0.5:
                colour = _pick(rng, list(COLOURS))
            else:
                shape = _pick(rng, list(SHAPES))
        form = rng.random()
        if form < 0.2:
            look = Look(colour=colour)
        elif form < 0.4:
            look = Look(shape=shape)
        elif form < 0.8:
            look = Look(colour=colour, shape=shape)
        elif form < 0.9:
            look = Look(size=_pick(rng, list(SIZES)), shape=shape)
        else:
            look = Look(size=_pick(rng, list(SIZES)), colour=colour)
        if look.count(scene) == 0 and not look.held_out:
            return look
    return None


def _held_out_look(scene: Scene, rng: np.random.Generator, present: bool) -> Look | None:
    looks = [Look(colour=colour, shape=shape) for colour, shape in sorted(HELD_OUT_PAIRS)]
    found = [look for look in looks if (look.count(scene) > 0) == present]
    return _pick(rng, found) if found else None


def _ask_count_of(scene: Scene, kind: str, rng: np.random.Generator, held_out_pair: bool) -> Made:
    """First how many, then of what: otherwise most answers would be "one"."""
    if held_out_pair:
        look = _held_out_look(scene, rng, present=rng.random() < 0.85)
    elif rng.random() < 0.15:
        look = _absent_look(scene, rng)
    else:
        looks = [look for look in _looks(scene.objects) if not look.held_out]
        number = _pick(rng, sorted({look.count(scene) for look in looks}))
        look = _pick(rng, [look for look in looks if look.count(scene) == number])
    if look is None:
        return None
    found = [item for item in scene.objects if look.fits(item)]
    answer = NUMBER_WORDS[len(found)]
    return kind, {"many": look.plural()}, answer, of_number(found, answer)


def _ask_exists(scene: Scene, kind: str, rng: np.random.Generator, held_out_pair: bool) -> Made:
    present = rng.random() < 0.5
    if held_out_pair:
        look = _held_out_look(scene, rng, present)
    elif present:
        look = _pick(rng, [look for look in _looks(scene.objects) if not look.held_out])
    else:
        look = _absent_look(scene, rng)
    if look is None:
        return None
    answer = "yes" if present else "no"
    found = [item for item in scene.objects if look.fits(item)]
    return kind, {"a": look.with_article()}, answer, of_number(found, answer)


def offset(direction: str, item: SceneObject, other: SceneObject) -> float:
    """How far, in pixels between centres, `item` lies in `direction` of `other` (negative: on the other side)."""
    return {
        "left": other.x - item.x,
        "right": item.x - other.x,
        "above": other.y - item.y,
        "below": item.y - other.y,
    }[direction]


def _ask_relation(scene: Scene, kind: str, rng: np.random.Generator, held_out_pair: bool) -> Made:
    """One of the three forms of a relation question, about objects that colour and shape name uniquely."""
    nameable = [
        item
        for item in scene.objects
        if item.colour and item.shape and Look(colour=item.colour, shape=item.shape).count(scene) == 1
    ]
    form = _pick(rng, list(RELATION_FORMS))
    found: list[tuple[str, SceneObject, SceneObject]] = []
    for direction in RELATION_WORDS:
        for one in nameable:
            if form == "relation_what":
                two = _only_one(scene, direction, one)
                others = [] if two is None or two not in nameable else [two]
            else:
                others = [two for two in nameable if abs(offset(direction, one, two)) >= RELATION_MARGIN]
            for two in others:
                if (one.pair in HELD_OUT_PAIRS or two.pair in HELD_OUT_PAIRS) == held_out_pair:
                    found.append((direction, one, two))
    if not found:
        return None
    direction, one, two = _pick(rng, found)
    slots = {"one": _name(one), "two": _name(two), "rel": _pick(rng, list(RELATION_WORDS[direction]))}
    slots["comp"] = _pick(rng, list(COMPARISON_WORDS[direction]))
    is_there = offset(direction, one, two) > 0
    if form == "relation_is":
        answer = "yes" if is_there else "no"
    elif form == "relation_which":
        answer = _name(one if is_there else two)
    else:
        answer = _name(two)
    return form, slots, answer, of_places([one, two])


def _only_one(scene: Scene, direction: str, one: SceneObject) -> SceneObject | None:
    """The object in `direction` of `one`, where one lies clearly there and all others clearly do not."""
    there = [item for item in scene.objects if item is not one and offset(direction, item, one) > -CLEARLY_NOT]
    return there[0] if len(there) == 1 and offset(direction, there[0], one) >= RELATION_MARGIN else None


def _name(item: SceneObject) -> str:
    return f"the {item.colour} {item.shape}"


def place_name(item: SceneObject) -> str:
    """Which of nine equal regions holds the centre: "top left", "top", ..., "centre", ..., "bottom right"."""
    third = PICTURE_SIZE / 3
    row = ("top", "", "bottom")[min(2, int(item.y / third))]
    column = ("left", "", "right")[min(2, int(item.x / third))]
    return f"{row} {column}".strip() or "centre"


def where(scene: Scene, rng: np.random.Generator) -> Question | None:
    """Where an object lies, for training: steps of `LATTICE` pixels to the right and down from the top left corner."""
    looks = [(look, item) for item in scene.objects for look in unique_looks(scene, item)]
    if not looks:
        return None
    look, item = _pick(rng, looks)
    text = _pick(rng, list(PLACE_WORDINGS)).format(the=f"the {look.words()}")
    return Question("where", "where", text, place_words(item), reasoning=of_look(item))


def describe(scene: Scene, rng: np.random.Generator) -> Question:
    """A list of every object, for training: from left to right by centre (also where nothing else is asked), from top
    to bottom, or from left to right with the region of each."""
    form = _pick(rng, list(DESCRIBE_WORDINGS))
    items = sorted(scene.objects, key=lambda item: item.y if form == "top_to_bottom" else item.x)
    looks = [Look(item.size, item.colour, item.shape).words() for item in items]
    if form == "places":
        looks = [f"{look} {place_name(item)}" for look, item in zip(looks, items)]
    text = _pick(rng, list(DESCRIBE_WORDINGS[form]))
    return Question("describe", form, text, ", ".join(looks), reasoning=note(f"{len(items)} objects"))


def demo_questions(scene: Scene, rng: np.random.Generator, num_questions: int = 3) -> list[Question]:
    """Questions of different kinds about one scene, in trained wordings; any pair may be asked about.

    Fewer come back only where the scene offers fewer kinds than asked for (a scene of one object has no relations).
    """
    questions: list[Question] = []
    for kind in rng.permutation(KINDS).tolist():
        either = [ask(scene, kind, rng, held_out_pair=held_out, attempts=20) for held_out in (False, True)]
        possible = [question for question in either if question is not None]
        if possible:
            questions.append(_pick(rng, possible))
        if len(questions) == num_questions:
            break
    return questions
