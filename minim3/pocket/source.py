"""What pocket is trained on: an endless stream of groups, each a picture or a clip with several short conversations
about it, or conversations without either.

A picture world is learnt fast only when every picture carries many questions, so the conversations of a group share
their picture (its vision features are computed once). Text tasks and conversations with tools come as groups without a
picture. Every conversation has a thinking mode of its own: where it is enabled, every turn has its reasoning.
Group number i of a seed is always the same, whoever draws it: workers take every n-th group, and a resumed run starts
at the group it had reached.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from minim3.pocket import tool_tasks
from minim3.pocket.clips import CLIP_KINDS, FPS, LIST_KINDS, ClipScene, ask_clip, draw_clip, list_clip, random_clip
from minim3.pocket.questions import KINDS, Question, ask, describe, where
from minim3.pocket.text_tasks import TEXT_KINDS, ask_lookups, ask_text, small_talk
from minim3.pocket.world import MAX_OBJECTS, Scene, draw, random_scene
from minim3.training.batch import Clip, Group, Sample

# First entry of the seed sequence: training and evaluation never draw the same numbers, whatever their seeds.
TRAINING_STREAM, EVALUATION_STREAM, DEMO_STREAM, WARMUP_STREAM = 1, 2, 3, 4

GROUP_WEIGHTS = {"picture": 0.43, "clip": 0.22, "text": 0.16, "tools": 0.19}
THINKING_WEIGHTS = {"adaptive": 0.65, "enabled": 0.25, "disabled": 0.1}
# The harder a kind, the more often it is asked.
KIND_WEIGHTS = {
    "colour": 1.0,
    "shape": 1.0,
    "size": 1.0,
    "count": 0.7,
    "count_of": 3.0,
    "exists": 1.3,
    "relation": 3.5,
    "where": 0.8,
}
CLIP_WEIGHTS = {
    "direction": 2.0,
    "moves": 2.0,
    "mover": 2.5,
    "colour": 0.7,
    "shape": 0.7,
    "count": 0.5,
    "where_at": 1.5,
    "track": 1.0,
}
TEXT_WEIGHTS = {"copy": 0.24, "lookup": 0.34, "sum": 0.38, "small_talk": 0.04}
SMALL_SUMS_SHARE = 0.25  # of one digit each: what everybody tries first is one in a hundred of all sums
# Conversations of a text group, and the most turns one of them has.
TEXT_GROUPS = {"copy": (6, 1), "lookup": (2, 4), "sum": (5, 8), "small_talk": (4, 3)}
# Scenes of 1 to 6 objects: a full one answers more questions.
OBJECT_COUNT_WEIGHTS = (0.08, 0.14, 0.18, 0.2, 0.2, 0.2)
NAMELESS_FRACTION = 0.4  # of the objects in every second picture: a colour or a shape without a name

TOOL_CHOICE_SHARE = 0.4
NUM_TOOL_CHOICES = 10
MAX_TOOL_ROUNDS = 4  # the description of the tools costs most of the tokens

Message = dict[str, Any]


@dataclass(frozen=True)
class PocketSource:
    """The training stream. Iterating starts at group `start` and takes every `stride`-th one, without end.

    `single_turn_fraction` of the conversations hold one question, the rest two to ten. `descriptions_per_picture` of
    them end with a list of all objects, which supervises every attribute at once (at the end: later answers could be
    read off it instead of the picture). `group_weights` says how often a group holds what; groups are about equally
    long, so these are about the shares of tokens too. `thinking_weights` is the same for the thinking mode of a
    conversation; where it is left to the model (adaptive), the model answers outright.
    """

    seed: int = 0
    start: int = 0
    stride: int = 1
    questions_per_picture: int = 14
    descriptions_per_picture: int = 2
    single_turn_fraction: float = 0.3
    questions_per_clip: int = 8
    group_weights: Mapping[str, float] = field(default_factory=lambda: dict(GROUP_WEIGHTS))
    thinking_weights: Mapping[str, float] = field(default_factory=lambda: dict(THINKING_WEIGHTS))
    kind_weights: Mapping[str, float] = field(default_factory=lambda: dict(KIND_WEIGHTS))
    clip_weights: Mapping[str, float] = field(default_factory=lambda: dict(CLIP_WEIGHTS))
    text_weights: Mapping[str, float] = field(default_factory=lambda: dict(TEXT_WEIGHTS))
    untidy_fraction: float = 0.1

    def __post_init__(self) -> None:
        for name, weights, known in (
            ("group_weights", self.group_weights, tuple(GROUP_WEIGHTS)),
            ("thinking_weights", self.thinking_weights, tuple(THINKING_WEIGHTS)),
            ("kind_weights", self.kind_weights, (*KINDS, "where")),
            ("clip_weights", self.clip_weights, (*CLIP_KINDS, *LIST_KINDS)),
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
        makers = {
            "picture": self._picture_group,
            "clip": self._clip_group,
            "text": self._text_group,
            "tools": self._tool_group,
        }
        return makers[_choose(rng, self.group_weights)](rng)

    def _picture_group(self, rng: np.random.Generator) -> Group:
        num_objects = int(rng.choice(MAX_OBJECTS, p=OBJECT_COUNT_WEIGHTS)) + 1
        nameless_fraction = NAMELESS_FRACTION if rng.random() < 0.5 else 0.0
        scene = random_scene(rng, num_objects=num_objects, nameless_fraction=nameless_fraction)
        conversations = self._split(self._questions(scene, rng), rng)
        for number in range(self.descriptions_per_picture):
            if number == len(conversations):
                conversations.append([])
            conversations[number].append(describe(scene, rng))
        return Group([self._conversation(turns, rng, media="image") for turns in conversations], [draw(scene)])

    def _split(self, questions: list[Question], rng: np.random.Generator) -> list[list[Question]]:
        """Some questions stand alone, as in evaluation; the others share conversations, which costs fewer tokens."""
        conversations = []
        while questions:
            num_turns = 1 if rng.random() < self.single_turn_fraction else int(rng.integers(2, 11))
            conversations.append(questions[:num_turns])
            questions = questions[num_turns:]
        return conversations

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

    def _clip_group(self, rng: np.random.Generator) -> Group:
        """One clip, as a picture group; the first conversation ends with what every object does."""
        clip = random_clip(rng, nameless_fraction=NAMELESS_FRACTION if rng.random() < 0.5 else 0.0)
        conversations = self._split(self._clip_questions(clip, rng), rng)
        motions = list_clip(clip, "motions", rng)
        assert motions is not None
        first = conversations[0] if conversations else []
        conversations = [[*first, motions], *conversations[1:]]
        samples = [self._conversation(turns, rng, media="video") for turns in conversations]
        return Group(samples, videos=[Clip(draw_clip(clip), FPS)])

    def _clip_questions(self, clip: ClipScene, rng: np.random.Generator) -> list[Question]:
        questions: dict[str, Question] = {}
        for _ in range(4 * self.questions_per_clip):
            kind = _choose(rng, self.clip_weights)
            question = list_clip(clip, kind, rng) if kind in LIST_KINDS else ask_clip(clip, kind, rng)
            # What has one answer for the clip is asked once, however it is worded.
            key = kind if kind == "count" else question.text if question else ""
            if question is not None and key not in questions:
                questions[key] = question
            if len(questions) == self.questions_per_clip:
                break
        return list(questions.values())

    def _tool_group(self, rng: np.random.Generator) -> Group:
        """One conversation with tools of its own; some only choose between them."""
        chooses = rng.random() < TOOL_CHOICE_SHARE
        tools = tool_tasks.random_tools(rng, number=int(rng.integers(2, 4)) if chooses else None)
        if chooses:
            rounds = [tool_tasks.random_choice(tools, rng) for _ in range(NUM_TOOL_CHOICES)]
        else:
            rounds = [tool_tasks.random_round(tools, rng) for _ in range(int(rng.integers(1, MAX_TOOL_ROUNDS + 1)))]
        mode = self._thinking_mode(rng)
        messages = tool_tasks.messages_of(rounds, thinking=mode == "enabled")
        return Group([Sample(messages, kind="tools", tools=[tool.schema() for tool in tools], thinking_mode=mode)])

    def _thinking_mode(self, rng: np.random.Generator) -> str | None:
        """None: adaptive, the default."""
        mode = _choose(rng, self.thinking_weights)
        return None if mode == "adaptive" else mode

    def _text_group(self, rng: np.random.Generator) -> Group:
        """One kind of task a group, about as many tokens as a picture group: see `TEXT_GROUPS`."""
        kind = _choose(rng, self.text_weights)
        num_conversations, max_turns = TEXT_GROUPS[kind]
        samples = []
        for _ in range(num_conversations):
            num_turns = int(rng.integers(1, max_turns + 1))
            if kind == "lookup":
                turns = ask_lookups(rng, num_turns)
            elif kind == "small_talk":
                turns = [small_talk(rng) for _ in range(num_turns)]
            else:
                largest = 9 if rng.random() < SMALL_SUMS_SHARE else 99
                turns = [ask_text(kind, rng, largest=largest) for _ in range(num_turns)]
            samples.append(self._conversation(turns, rng))
        return Group(samples)

    def _conversation(self, questions: list[Question], rng: np.random.Generator, *, media: str | None = None) -> Sample:
        """`media`: "image" or "video", shown before the first question."""
        messages: list[Message] = []
        mode = self._thinking_mode(rng)
        for number, question in enumerate(questions):
            text = question.text
            if question.kind not in TEXT_KINDS and rng.random() < self.untidy_fraction:
                text = untidy(text, rng)
            content: Any = text
            if media is not None and number == 0:
                content = [{"type": media}, {"type": "text", "text": text}]
            messages.append({"role": "user", "content": content})
            reasoning = {"reasoning_content": question.reasoning} if mode == "enabled" else {}
            messages.append({"role": "assistant", "content": question.answer, **reasoning})
        # Conversations that mix kinds of questions, and those about clips, are logged as kinds of their own.
        kind = "clip" if media == "video" else "picture" if media and len(questions) > 1 else questions[0].kind
        images, videos = ([0] if media == "image" else []), ([0] if media == "video" else [])
        return Sample(messages, images, kind, thinking_mode=mode, video_indices=videos)


def _choose(rng: np.random.Generator, weights: Mapping[str, float]) -> str:
    shares = np.array(list(weights.values()))
    return list(weights)[int(rng.choice(len(shares), p=shares / shares.sum()))]


def untidy(text: str, rng: np.random.Generator) -> str:
    """A question as people type it: without the capital, without the closing mark, or both."""
    choice = int(rng.integers(3))
    if choice != 0:
        text = text[:1].lower() + text[1:]
    return text.rstrip("?.") if choice != 1 else text
