"""Evaluation of what takes more than a picture and a line of text: clips, tools, and the modes of thinking.

Each part draws from a stream of its own of the numbers that training never draws from. Questions about clips are asked
in trained wordings and, one in five, in held-out ones; of the tool requests 70% are as in training, 20% in held-out
wordings, and in 10% the tools have names that training never shows. What is asked under the modes of thinking is as in
training: sums, tables, pictures, clips, tools.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

from minim3.pocket import tool_tasks
from minim3.pocket.clips import CLIP_KINDS, FPS, ClipScene, ask_clip, draw_clip, random_clip
from minim3.pocket.questions import KINDS, Question, ask, normalise
from minim3.pocket.replies import Dialogue, Reply
from minim3.pocket.source import EVALUATION_STREAM
from minim3.pocket.text_tasks import TEXT_KINDS, ask_text
from minim3.pocket.world import Scene, draw, random_scene

_CLIPS, _TOOLS, _THINKING = 2, 3, 4  # after the pictures and the text tasks of evaluate.py
_CLIP_ROUND = ("trained",) * 4 + ("held_out_wording",)
_TOOL_ROUND = ("trained",) * 7 + ("held_out_wording",) * 2 + ("held_out_name",)
_TOOL_KIND_ROUND = ("call", "result", "call", "no_tool", "call")
THINKING_KINDS = ("sum", "lookup", "count", "count_of", "exists", "relation", "direction", "call")
_THINKING_ROUND = ("enabled", "disabled", "enabled", "adaptive", "enabled")


@dataclass(frozen=True)
class DialogueCase:
    """A conversation up to the assistant's turn, and that turn: `answer`, or a call of `call` (name, arguments)."""

    kind: str
    group: str
    messages: tuple[dict[str, Any], ...]
    answer: str = ""
    call: tuple[str, dict[str, Any]] | None = None
    tools: tuple[dict[str, Any], ...] = ()
    thinking_mode: str | None = None
    scene: Scene | ClipScene | None = None

    def dialogue(self) -> Dialogue:
        """The conversation with its picture or clip drawn into the first message."""
        messages: list[dict[str, Any]] = list(self.messages)
        fps: tuple[float, ...] = ()
        if self.scene is not None:
            media: dict[str, Any]
            if isinstance(self.scene, ClipScene):
                media, fps = {"type": "video", "video": draw_clip(self.scene)}, (FPS,)
            else:
                media = {"type": "image", "image": draw(self.scene)}
            text = {"type": "text", "text": messages[0]["content"]}
            messages[0] = {**messages[0], "content": [media, text]}
        return Dialogue(messages, list(self.tools) or None, self.thinking_mode, fps)

    def is_right(self, reply: Reply) -> bool:
        """Strict: the whole answer, or exactly the one call with exactly its arguments and no text beside it."""
        if self.call is None:
            return not reply.tool_calls and normalise(reply.content) == normalise(self.answer)
        if len(reply.tool_calls) != 1 or reply.content.strip():
            return False
        name, arguments = self.call
        made = reply.tool_calls[0]
        types = {key: type(value) for key, value in made.arguments.items()}
        return (
            made.complete
            and made.name == name
            and made.arguments == arguments
            and types == {key: type(value) for key, value in arguments.items()}
        )

    def expected(self) -> str:
        """What was expected, in words."""
        return self.answer if self.call is None else _call_words(*self.call)


def reply_words(reply: Reply) -> str:
    """What came, in words."""
    calls = " ".join(_call_words(call.name, call.arguments) for call in reply.tool_calls)
    thought = f"({reply.reasoning}) " if reply.reasoning else ""
    return f"{thought}{reply.content}{calls}"


def _call_words(name: str, arguments: dict[str, Any]) -> str:
    return f"{name}({', '.join(f'{key}={value!r}' for key, value in arguments.items())})"


def fresh_clip_questions(seed: int, n: int) -> list[DialogueCase]:
    """`n` questions, each about a clip of its own, kinds in turn."""
    return [_clip_case(seed, index) for index in range(n)]


def _clip_case(seed: int, index: int) -> DialogueCase:
    rng = np.random.default_rng([EVALUATION_STREAM, seed, _CLIPS, index])
    kind, group = CLIP_KINDS[index % len(CLIP_KINDS)], _CLIP_ROUND[index // len(CLIP_KINDS) % len(_CLIP_ROUND)]
    question, clip = _ask_about_a_clip(kind, rng, held_out_wording=group == "held_out_wording")
    return _question_case(question, group, clip)


def _ask_about_a_clip(kind: str, rng: np.random.Generator, *, held_out_wording: bool) -> tuple[Question, ClipScene]:
    while True:  # some clips have no unambiguous question of the kind
        clip = random_clip(rng)
        question = ask_clip(clip, kind, rng, held_out_wording=held_out_wording)
        if question is not None:
            return question, clip


def _question_case(
    question: Question, group: str, scene: Scene | ClipScene | None, thinking_mode: str | None = None
) -> DialogueCase:
    messages = ({"role": "user", "content": question.text},)
    return DialogueCase(question.kind, group, messages, question.answer, thinking_mode=thinking_mode, scene=scene)


def fresh_tool_tasks(seed: int, n: int) -> list[DialogueCase]:
    """`n` conversations with tools of their own, most of them after some earlier rounds; see `TOOL_KINDS`."""
    cases = []
    for index in range(n):
        rng = np.random.default_rng([EVALUATION_STREAM, seed, _TOOLS, index])
        kind = _TOOL_KIND_ROUND[index % len(_TOOL_KIND_ROUND)]
        group = _TOOL_ROUND[index // len(_TOOL_KIND_ROUND) % len(_TOOL_ROUND)]
        cases.append(_tool_case(kind, group, rng, num_before=int(rng.integers(3))))
    return cases


def _tool_case(
    kind: str, group: str, rng: np.random.Generator, *, num_before: int, thinking_mode: str | None = None
) -> DialogueCase:
    tools = tool_tasks.random_tools(rng, held_out_names=group == "held_out_name")
    rounds = [tool_tasks.random_round(tools, rng) for _ in range(num_before)]
    held_out_wording = group == "held_out_wording"
    if kind == "no_tool":
        last = tool_tasks.plain_round(tools, rng, held_out_wording=held_out_wording)
    else:
        tool = tools[int(rng.integers(len(tools)))]
        last = tool_tasks.call_round(tool, rng, held_out_wording=held_out_wording)
    messages = tool_tasks.messages_of([*rounds, last], thinking=thinking_mode == "enabled")
    messages = messages[: -3 if kind == "call" else -1]
    schemas = tuple(tool.schema() for tool in tools)
    if kind == "call":
        assert last.tool is not None
        call = (last.tool.name, dict(last.arguments or {}))
        return DialogueCase(kind, group, tuple(messages), call=call, tools=schemas, thinking_mode=thinking_mode)
    return DialogueCase(kind, group, tuple(messages), last.answer, tools=schemas, thinking_mode=thinking_mode)


def fresh_thinking_tasks(seed: int, n: int) -> list[DialogueCase]:
    """`n` questions of `THINKING_KINDS` in turn, under the modes in turn; the group of a case is its mode."""
    cases = []
    for index in range(n):
        rng = np.random.default_rng([EVALUATION_STREAM, seed, _THINKING, index])
        kind = THINKING_KINDS[index % len(THINKING_KINDS)]
        mode = _THINKING_ROUND[index // len(THINKING_KINDS) % len(_THINKING_ROUND)]
        cases.append(_thinking_case(kind, mode, rng))
    return cases


def _thinking_case(kind: str, mode: str, rng: np.random.Generator) -> DialogueCase:
    if kind in tool_tasks.TOOL_KINDS:
        return _tool_case(kind, mode, rng, num_before=0, thinking_mode=mode)
    if kind in TEXT_KINDS:
        return _question_case(ask_text(kind, rng), mode, None, mode)
    if kind not in KINDS:
        question, clip = _ask_about_a_clip(kind, rng, held_out_wording=False)
        return _question_case(question, mode, clip, mode)
    while True:
        scene = random_scene(rng)
        asked = ask(scene, kind, rng)
        if asked is not None:
            return _question_case(asked, mode, scene, mode)
