"""What pocket is trained on: an endless stream of groups, each a picture with several short conversations about it.

A picture world is learnt fast only when every picture carries many questions, so the conversations of a group share
their picture (its vision features are computed once). Text tasks come as groups without a picture.
Group number i of a seed is always the same, whoever draws it: workers take every n-th group, and a resumed run starts
at the group it had reached.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from minim3.pocket.questions import KINDS, Question, ask, describe, where
from minim3.pocket.text_tasks import TEXT_KINDS, ask_lookups, ask_text, small_talk
from minim3.pocket.world import MAX_OBJECTS, Scene, draw, random_scene

# First entry of the seed sequence: training and evaluation never draw the same numbers, whatever their seeds.
TRAINING_STREAM, EVALUATION_STREAM, DEMO_STREAM, WARMUP_STREAM = 1, 2, 3, 4

# The harder a kind, the more often it is asked.
KIND_WEIGHTS = {
    "colour": 1.0,
    "shape": 1.0,
    "size": 1.0,
    "count": 0.7,
    "count_of": 3.0,
    "exists": 1.3,
    "relation": 3.0,
    "where": 0.8,
}
TEXT_WEIGHTS = {"copy": 0.2, "lookup": 0.5, "sum": 0.26, "small_talk": 0.04}
# Conversations of a text group, and the most turns one of them has.
TEXT_GROUPS = {"copy": (6, 1), "lookup": (2, 4), "sum": (5, 8), "small_talk": (4, 3)}
# Scenes of 1 to 6 objects: a full one answers more questions.
OBJECT_COUNT_WEIGHTS = (0.08, 0.14, 0.18, 0.2, 0.2, 0.2)
NAMELESS_FRACTION = 0.4  # of the objects in every second picture: a colour or a shape without a name

Message = dict[str, Any]


@dataclass(frozen=True)
class Sample:
    """One conversation in OpenAI form. `image_indices[i]` is the picture of the group that its i-th image part shows;
    `kind` names the sort of task in logs."""

    messages: list[Message]
    image_indices: list[int]
    kind: str


@dataclass(frozen=True)
class Group:
    """Conversations that share pictures (uint8 [112, 112, 3] each; none for text tasks)."""

    samples: list[Sample]
    images: list[np.ndarray]


@dataclass(frozen=True)
class PocketSource:
    """The training stream. Iterating starts at group `start` and takes every `stride`-th one, without end.

    `single_turn_fraction` of the conversations hold one question, the rest two to ten. `descriptions_per_picture` of
    them end with a list of all objects, which supervises every attribute at once (at the end: later answers could be
    read off it instead of the picture). `text_fraction` is the share of groups that hold text tasks; with the
    defaults, where a text group is about as long as a picture group, also about the share of tokens.
    """

    seed: int = 0
    start: int = 0
    stride: int = 1
    questions_per_picture: int = 14
    descriptions_per_picture: int = 2
    single_turn_fraction: float = 0.3
    text_fraction: float = 0.35
    kind_weights: Mapping[str, float] = field(default_factory=lambda: dict(KIND_WEIGHTS))
    text_weights: Mapping[str, float] = field(default_factory=lambda: dict(TEXT_WEIGHTS))
    untidy_fraction: float = 0.1

    def __post_init__(self) -> None:
        for name, weights, known in (
            ("kind_weights", self.kind_weights, (*KINDS, "where")),
            ("text_weights", self.text_weights, (*TEXT_KINDS, "small_talk")),
        ):
            unknown = sorted(set(weights) - set(known))
            if unknown or not sum(weights.values()) > 0 or min(weights.values()) < 0:
                raise ValueError(f"{name} is {dict(weights)}; needs weights >= 0, not all 0, for {known}")

    def __iter__(self) -> Iterator[Group]:
        index = self.start
        while True:
            yield self.group(index)
            index += self.stride

    def group(self, index: int) -> Group:
        """Group number `index` of this seed."""
        rng = np.random.default_rng([TRAINING_STREAM, self.seed, index])
        if rng.random() < self.text_fraction:
            return self._text_group(rng)
        return self._picture_group(rng)

    def _picture_group(self, rng: np.random.Generator) -> Group:
        num_objects = int(rng.choice(MAX_OBJECTS, p=OBJECT_COUNT_WEIGHTS)) + 1
        nameless_fraction = NAMELESS_FRACTION if rng.random() < 0.5 else 0.0
        scene = random_scene(rng, num_objects=num_objects, nameless_fraction=nameless_fraction)
        questions = self._questions(scene, rng)
        conversations = []
        # Some questions stand alone, as in evaluation; the others share conversations, which costs fewer tokens.
        while questions:
            num_turns = 1 if rng.random() < self.single_turn_fraction else int(rng.integers(2, 11))
            conversations.append(questions[:num_turns])
            questions = questions[num_turns:]
        for number in range(self.descriptions_per_picture):
            if number == len(conversations):
                conversations.append([])
            conversations[number].append(describe(scene, rng))
        return Group([self._conversation(turns, rng, picture=True) for turns in conversations], [draw(scene)])

    def _questions(self, scene: Scene, rng: np.random.Generator) -> list[Question]:
        kinds = list(self.kind_weights)
        weights = np.array([self.kind_weights[kind] for kind in kinds])
        questions: dict[str, Question] = {}
        for number in rng.choice(len(kinds), size=4 * self.questions_per_picture, p=weights / weights.sum()).tolist():
            kind = kinds[number]
            question = where(scene, rng) if kind == "where" else ask(scene, kind, rng)
            # One question per text; how many objects there are is asked once, however it is worded.
            key = "count" if question and question.kind == "count" else question.text if question else ""
            if question is not None and key not in questions:
                questions[key] = question
            if len(questions) == self.questions_per_picture:
                break
        return list(questions.values())

    def _text_group(self, rng: np.random.Generator) -> Group:
        """One kind of task a group, about as many tokens as a picture group: see `TEXT_GROUPS`."""
        kinds = list(self.text_weights)
        weights = np.array([self.text_weights[kind] for kind in kinds])
        kind = kinds[int(rng.choice(len(kinds), p=weights / weights.sum()))]
        num_conversations, max_turns = TEXT_GROUPS[kind]
        samples = []
        for _ in range(num_conversations):
            num_turns = int(rng.integers(1, max_turns + 1))
            if kind == "lookup":
                turns = ask_lookups(rng, num_turns)
            else:
                turns = [small_talk(rng) if kind == "small_talk" else ask_text(kind, rng) for _ in range(num_turns)]
            samples.append(self._conversation(turns, rng, picture=False))
        return Group(samples, [])

    def _conversation(self, questions: list[Question], rng: np.random.Generator, *, picture: bool) -> Sample:
        messages: list[Message] = []
        for number, question in enumerate(questions):
            text = question.text
            if question.kind not in TEXT_KINDS and rng.random() < self.untidy_fraction:
                text = untidy(text, rng)
            content: Any = text
            if picture and number == 0:
                content = [{"type": "image"}, {"type": "text", "text": text}]
            messages.append({"role": "user", "content": content})
            messages.append({"role": "assistant", "content": question.answer})
        # Conversations about a picture that mix kinds of questions are logged as one kind of their own.
        kind = "picture" if picture and len(questions) > 1 else questions[0].kind
        return Sample(messages, [0] if picture else [], kind)


def untidy(text: str, rng: np.random.Generator) -> str:
    """A question as people type it: without the capital, without the closing mark, or both."""
    choice = int(rng.integers(3))
    if choice != 0:
        text = text[:1].lower() + text[1:]
    return text.rstrip("?.") if choice != 1 else text
