"""Pocket's clips, tools and thoughts: what is asked, what is right, and how it goes through the chat format."""

import json
import re
from collections import Counter
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import minim3.pocket
from minim3.pocket import (
    clips,
    dialogue_cases,
    evaluate,
    questions,
    reasoning,
    text_tasks,
    tool_tasks,
    world,
)
from minim3.pocket.clips import CLIP_KINDS, ClipScene, ask_clip, draw_clip, list_clip, random_clip
from minim3.pocket.dialogue_cases import DialogueCase, fresh_clip_questions, fresh_thinking_tasks, fresh_tool_tasks
from minim3.pocket.replies import Reply, is_well_formed, model_replies
from minim3.pocket.source import PocketSource
from minim3.pocket.world import HELD_OUT_PAIRS, LATTICE, SHAPES, draw, random_scene
from minim3.processing.messages import ToolCall
from minim3.processing.output import parse_output
from minim3.processing.processor import MiniMaxM3VLProcessor
from minim3.training.config import SourceRecipe
from minim3.training.records import DocumentEncoder

WEIGHTS = Path(minim3.pocket.__file__).parent / "weights"
seeds = st.integers(0, 2**63 - 1)


@pytest.fixture(scope="module")
def processor() -> MiniMaxM3VLProcessor:
    return MiniMaxM3VLProcessor.from_pretrained(WEIGHTS)


# --- clips -----------------------------------------------------------------------------------------------------------


def went(clip: ClipScene, index: int) -> str | None:
    """Which way an object went, read off its places alone."""
    track = clip.track(index)
    dx, dy = track[-1].x - track[0].x, track[-1].y - track[0].y
    assert dx == 0 or dy == 0
    return ("left" if dx < 0 else "right") if dx else ("up" if dy < 0 else "down") if dy else None


@settings(max_examples=40, deadline=None)
@given(seeds)
def test_every_moment_of_a_clip_is_a_scene_and_moves_are_of_one_cell(seed: int) -> None:
    clip = random_clip(np.random.default_rng(seed))
    assert 2 <= len(clip.moments) <= 3
    for scene in clip.moments:
        assert world.has_room(scene.objects)
        assert scene.background == clip.moments[0].background
        assert not any(one.pair in HELD_OUT_PAIRS for one in scene.objects)
    assert len(clip.motions) <= 2
    for index in range(len(clip.moments[0].objects)):
        track = clip.track(index)
        assert went(clip, index) == clip.direction(index)
        assert len({(one.colour, one.shape, one.size, one.rgb) for one in track}) == 1
        steps = {(two.x - one.x, two.y - one.y) for one, two in pairwise(track)}
        assert len(steps) == 1, "the same way between all moments"
        assert all(abs(d) in (0, world.CELL) for step in steps for d in step)


def test_rooms_are_what_scenes_have() -> None:
    for seed in range(40):
        objects = random_scene(np.random.default_rng(seed), pairs="all").objects
        assert world.has_room(objects)
        if len(objects) > 1:
            assert not world.has_room([*objects[:-1], objects[0]])


def test_frames_show_each_moment_for_one_temporal_patch() -> None:
    clip = random_clip(np.random.default_rng(1), num_moving=2)
    frames = draw_clip(clip)
    assert frames.shape == (2 * len(clip.moments), 112, 112, 3)
    assert frames.dtype == np.uint8
    for number, scene in enumerate(clip.moments):
        assert np.array_equal(frames[2 * number], frames[2 * number + 1])
        assert np.array_equal(frames[2 * number], draw(scene))
    assert not np.array_equal(frames[0], frames[-1])


def test_clips_take_sixteen_tokens_a_moment_and_say_when(processor: MiniMaxM3VLProcessor) -> None:
    """Frames resized, chunks of another length or times left out would be another lesson than serving gives."""
    group = next(
        g for g in (PocketSource(group_weights={"clip": 1.0}).group(i) for i in range(50)) if len(g.samples) > 1
    )
    encoded = DocumentEncoder(processor, 4096).encode_group(group, SourceRecipe(name="x:y"))
    moments = len(group.videos[0].frames) // 2
    assert encoded.videos[0].grid.tolist() == [[1, 8, 8]] * moments
    for document in encoded.documents:
        assert int((document.input_ids == processor.video_token_id).sum()) == 16 * moments
        text = processor.decode(document.input_ids)
        assert [f"]<]{2.0 * number:.1f} seconds[>[" in text for number in range(moments + 1)] == [True] * moments + [
            False
        ]


@settings(max_examples=120, deadline=None)
@given(seeds, st.sampled_from(CLIP_KINDS), st.booleans())
def test_answers_follow_from_the_clip(seed: int, kind: str, held_out: bool) -> None:
    rng = np.random.default_rng(seed)
    clip = random_clip(rng)
    question = ask_clip(clip, kind, rng, held_out_wording=held_out)
    objects = clip.moments[0].objects
    moving = [one for index, one in enumerate(objects) if went(clip, index)]
    if question is None:
        assert kind != "count"
        return
    assert question.kind == kind
    assert question.held_out_wording == held_out
    assert re.fullmatch(r"\S.*\S\.", question.reasoning), question.reasoning
    if kind == "mover":
        found = re.search(r"the (\w+) (\w+)(?: and |,? or )the (\w+) (\w+)", question.text)
        assert found is not None, question.text
        pairs = [found.group(1, 2), found.group(3, 4)]
        (answer,) = [pair for pair in pairs if pair in [one.pair for one in moving]]
        assert question.answer == "the {} {}".format(*answer)
        assert all(sum(one.pair == pair for one in objects) == 1 for pair in pairs)
    elif kind in ("direction", "moves", "where_at"):
        phrase = re.search(r"the ((?:\w+ )?(?:\w+ )?(?:object|" + "|".join(SHAPES) + r"))\b", question.text)
        assert phrase is not None, question.text
        words = phrase[1].split()
        found = [
            index
            for index, one in enumerate(objects)
            if all(word in (one.size, one.colour, one.shape, "object") for word in words)
        ]
        assert len(found) == 1, "the description must fit one object and no other"
        direction = went(clip, found[0])
        if kind == "where_at":
            time = re.search(r"(\d)\.0 seconds", question.text)
            assert time is not None
            assert question.answer == reasoning.place_words(clip.track(found[0])[int(time[1]) // 2])
        else:
            assert question.answer == (direction if kind == "direction" else "yes" if direction else "no")
        places = re.findall(r"(\d+) right, (\d+) down", question.reasoning)
        assert [(LATTICE * int(x), LATTICE * int(y)) for x, y in places] == [
            (one.x, one.y) for one in clip.track(found[0])
        ]


def test_lists_about_clips_say_where_things_are() -> None:
    clip = random_clip(np.random.default_rng(4), num_moving=1)
    (motion,) = clip.motions
    seen = set()
    for seed in range(60):
        for kind in clips.LIST_KINDS:
            question = list_clip(clip, kind, np.random.default_rng(seed))
            assert question is not None
            seen.add(kind)
            if kind == "motions":
                assert question.answer.count(f" {motion.direction}") == 1
                assert question.answer.count(" still") == len(clip.moments[0].objects) - 1
                continue
            tracks = [
                [reasoning.place_words(one) for one in clip.track(i)] for i in range(len(clip.moments[0].objects))
            ]
            assert question.answer.split("; ") in tracks
    assert seen == set(clips.LIST_KINDS)


def test_yes_and_no_are_about_equally_frequent_in_clips() -> None:
    cases = fresh_clip_questions(0, 7 * 30)
    answers = Counter(case.answer for case in cases if case.kind == "moves")
    assert 8 <= answers["yes"] <= 22


# --- tools -----------------------------------------------------------------------------------------------------------


def values_in(text: str) -> list[str]:
    return re.findall(r"\w+", text)


@settings(max_examples=80, deadline=None)
@given(seeds, st.booleans())
def test_arguments_are_copied_from_the_request_and_fit_the_schema(seed: int, held_out: bool) -> None:
    rng = np.random.default_rng(seed)
    for tool in tool_tasks.random_tools(rng, held_out_names=held_out):
        one = tool_tasks.call_round(tool, rng, held_out_wording=held_out)
        properties = tool.schema()["function"]["parameters"]["properties"]
        assert one.arguments is not None
        assert list(one.arguments) == list(properties)
        for name, value in one.arguments.items():
            assert isinstance(value, int) == (properties[name]["type"] == "integer")
            assert str(value) in one.request
            assert set(values_in(str(value))) <= set(values_in(one.request))
        if tool.sort.key == "add":
            assert int(one.result) == sum(one.arguments.values())
        assert one.answer == one.result or one.answer in (tool_tasks.DONE, tool_tasks.FAILED)
        assert (one.answer == tool_tasks.DONE) == (one.result == "ok")


@settings(max_examples=60, deadline=None)
@given(seeds)
def test_what_fits_no_tool_fits_none(seed: int) -> None:
    """A request that a tool of the list does fit, taught to be turned down, would unteach calling."""
    rng = np.random.default_rng(seed)
    tools = tool_tasks.random_tools(rng)
    assert len({tool.name for tool in tools}) == len(tools)
    one = tool_tasks.plain_round(tools, rng)
    assert one.tool is None
    patterns = [
        re.sub(r"\\\{\w+\\\}", r".+", re.escape(wording))
        for tool in tools
        for wording in (*tool.sort.requests.trained, *tool.sort.requests.held_out)
    ]
    if one.answer != text_tasks.SMALL_TALK[-1][1]:
        assert not any(re.fullmatch(pattern, one.request) for pattern in patterns), one.request


@settings(max_examples=60, deadline=None)
@given(seeds)
def test_several_tools_have_names_of_their_sort(seed: int) -> None:
    tools = tool_tasks.random_tools(np.random.default_rng(seed))
    assert len(tools) == 1 or all(tool.name in tool.sort.names for tool in tools)
    one = tool_tasks.random_choice(tools, np.random.default_rng(seed))
    assert one.tool is None
    assert one.answer in ("none", *(tool.name for tool in tools))


@pytest.mark.parametrize("mode", [None, "enabled", "disabled"])
def test_trained_turns_come_back_whole_from_the_parser(mode: str | None, processor: MiniMaxM3VLProcessor) -> None:
    """What is trained on must be what serving reads: each turn's targets give its thought, its text and its call."""
    weights = {mode or "adaptive": 1.0}
    tokenizer = processor.tokenizer
    for group_kind in ("tools", "text"):
        source = PocketSource(seed=2, group_weights={group_kind: 1.0}, thinking_weights=weights)
        for index in range(12):
            for sample in source.group(index).samples:
                ids, mask = processor.encode_conversation(sample.messages, sample.tools, sample.thinking_mode)
                turns, turn = [], []
                for token, is_target in zip(ids, mask):
                    if is_target:
                        turn.append(token)
                    elif turn:
                        turns.append(turn)
                        turn = []
                expected = [message for message in sample.messages if message["role"] == "assistant"]
                assert len(turns) == len(expected)
                for turn, message in zip(turns, expected):
                    check_turn(turn, dict(message), sample, tokenizer)


def check_turn(turn: list[int], message: dict, sample, tokenizer) -> None:
    given = {"enabled": 1, "disabled": 1, None: 0}[sample.thinking_mode]  # the prompt ends with this much of the turn
    parsed = parse_output(turn[given:], tokenizer, sample.thinking_mode, sample.tools)
    assert is_well_formed(turn[given:], parsed, tokenizer, sample.thinking_mode)
    assert parsed.reasoning == message.get("reasoning_content")
    assert (parsed.reasoning is not None) == (sample.thinking_mode == "enabled")
    assert parsed.content == (message["content"] or "").strip()
    calls = [(call["function"]["name"], call["function"]["arguments"]) for call in message.get("tool_calls", ())]
    assert [(call.name, call.arguments) for call in parsed.tool_calls] == calls


def test_tool_conversations_fit_the_context(processor: MiniMaxM3VLProcessor) -> None:
    source = PocketSource(group_weights={"tools": 1.0}, thinking_weights={"enabled": 1.0})
    lengths = []
    for index in range(40):
        (sample,) = source.group(index).samples
        lengths.append(len(processor.encode_conversation(sample.messages, sample.tools, sample.thinking_mode)[0]))
    assert max(lengths) <= 2048


# --- thinking --------------------------------------------------------------------------------------------------------


@given(st.integers(0, 999), st.integers(0, 999))
def test_sums_are_worked_out_digit_by_digit(first: int, second: int) -> None:
    lines = [line.split(" = ") for line in reasoning.of_sum(first, second).rstrip(".").split(", ")]
    totals = []
    for left, right in lines:
        assert sum(map(int, left.split(" + "))) == int(right)
        totals.append(int(right))
    digits = [str(total % 10) for total in totals[:-1]] + [str(totals[-1])]
    assert int("".join(reversed(digits))) == first + second


@settings(max_examples=100, deadline=None)
@given(seeds, st.sampled_from(questions.KINDS))
def test_thoughts_name_what_the_answer_rests_on(seed: int, kind: str) -> None:
    rng = np.random.default_rng(seed)
    scene = random_scene(rng, nameless_fraction=0.3)
    question = questions.ask(scene, kind, rng)
    if question is None:
        return
    assert question.reasoning.endswith(".")
    assert "None" not in question.reasoning
    if kind in ("count", "count_of", "exists"):
        found, answer = question.reasoning[:-1].split(": ")
        assert answer == question.answer
        looks = [] if found == "none" else found.split(", ")
        everything = Counter(reasoning.look_words(one) for one in scene.objects)
        assert not Counter(looks) - everything
        if kind == "exists":
            assert bool(looks) == (answer == "yes")
        else:
            assert questions.NUMBER_WORDS[len(looks)] == answer
    elif kind == "relation":
        places = re.findall(r"(\w+) (\w+) (\d+) right, (\d+) down", question.reasoning)
        assert len(places) == 2
        for colour, shape, x, y in places:
            (one,) = [item for item in scene.objects if item.pair == (colour, shape)]
            assert (one.x, one.y) == (LATTICE * int(x), LATTICE * int(y))
            assert f"{colour} {shape}" in question.text + question.answer
    else:
        assert question.answer in question.reasoning


@pytest.mark.parametrize(
    ("mode", "text", "good"),
    [
        ("enabled", "7 + 8 = 15.</mm:think>15[e~[", True),
        ("enabled", "7 + 8 = 15.</mm:think>15", False),  # never ended
        ("enabled", "7 + 8 = 15. 15[e~[", False),  # never closed
        ("enabled", "</mm:think>15[e~[", False),  # no thought
        ("enabled", "a.</mm:think>15</mm:think>[e~[", False),
        ("enabled", "a.</mm:think>[e~[", False),  # no answer
        ("disabled", "15[e~[", True),
        ("disabled", "<mm:think>a.</mm:think>15[e~[", False),
        ("disabled", "</mm:think>15[e~[", False),
        (None, "</mm:think>15[e~[", True),
        (None, "<mm:think>a.</mm:think>15[e~[", True),
        (None, "15[e~[", False),
        (None, "<mm:think>a. 15[e~[", False),
    ],
)
def test_which_thinking_blocks_are_well_formed(
    mode: str | None, text: str, good: bool, processor: MiniMaxM3VLProcessor
) -> None:
    ids = processor.tokenizer.encode(text, allow_special=True)
    parsed = parse_output(ids, processor.tokenizer, mode)
    assert is_well_formed(ids, parsed, processor.tokenizer, mode) is good


# --- evaluation ------------------------------------------------------------------------------------------------------


def right_reply(case: DialogueCase) -> Reply:
    calls = () if case.call is None else (ToolCall(*case.call),)
    return Reply(case.answer, "so." if case.thinking_mode == "enabled" else None, calls, drafts=(4, 3))


def test_evaluation_asks_every_kind_under_every_mode_and_repeats_itself() -> None:
    for fresh, number, kinds in (
        (fresh_clip_questions, 70, CLIP_KINDS),
        (fresh_tool_tasks, 50, tool_tasks.TOOL_KINDS),
        (fresh_thinking_tasks, 80, dialogue_cases.THINKING_KINDS),
    ):
        cases = fresh(3, number)
        assert {case.kind for case in cases} == set(kinds)
        assert fresh(3, number) == cases
        assert fresh(4, number) != cases
        assert all(case.messages[-1]["role"] in ("user", "tool") for case in cases)
    groups = {(case.kind, case.group) for case in fresh_thinking_tasks(0, 80)}
    assert len(groups) == 3 * len(dialogue_cases.THINKING_KINDS)
    assert {case.group for case in fresh_tool_tasks(0, 50)} == {"trained", "held_out_wording", "held_out_name"}
    for case in fresh_tool_tasks(0, 200):
        names = {tool["function"]["name"] for tool in case.tools}
        assert (names <= set(tool_tasks.HELD_OUT_NAMES)) == (case.group == "held_out_name")
        assert case.call is None or case.call[0] in names


def test_only_exactly_the_call_is_right() -> None:
    case = DialogueCase(
        "call", "trained", ({"role": "user", "content": "Wait 3 minutes."},), call=("wait", {"time": 3})
    )

    def is_right(name: str, arguments: dict, content: str = "", complete: bool = True) -> bool:
        return case.is_right(Reply(content, tool_calls=(ToolCall(name, arguments, complete=complete),)))

    assert is_right("wait", {"time": 3})
    assert not is_right("wait", {"time": "3"})
    assert not is_right("wait", {"time": True})
    assert not is_right("wait", {"time": 3, "more": 1})
    assert not is_right("walk", {"time": 3})
    assert not is_right("wait", {"time": 3}, "ok")
    assert not is_right("wait", {"time": 3}, complete=False)
    assert not case.is_right(Reply("wait"))
    call = ToolCall("wait", {"time": 3})
    assert not case.is_right(Reply("", tool_calls=(call, call)))


def test_the_report_counts_what_came() -> None:
    known = {}
    for cases in (fresh_clip_questions(0, 14), fresh_tool_tasks(0, 10), fresh_thinking_tasks(0, 40)):
        for case in cases:
            known[repr((case.dialogue().messages[-1], case.tools, case.thinking_mode))] = case
    asked = []

    def reply(dialogues):
        asked.append(len(dialogues))
        found = [known[repr((one.messages[-1], tuple(one.tools or ()), one.thinking_mode))] for one in dialogues]
        replies = [right_reply(case) for case in found]
        return [
            Reply("?", well_formed=False, drafts=(1, 0)) if case.group == "disabled" else one
            for case, one in zip(found, replies)
        ]

    done = []
    report = evaluate.evaluate(
        lambda prompts: [""] * len(prompts), 7, 0, num_text_tasks=3, reply_fn=reply, num_clips=14, num_tools=10,
        num_thinking=40, batch_size=9, progress=lambda *numbers: done.append(numbers),
    )  # fmt: skip
    assert done[-1] == (74, 74)
    assert max(asked) == 9
    assert report["clips"]["accuracy"] == report["tools"]["accuracy"] == 100.0
    assert report["thinking"]["by_group"]["disabled"] == {"accuracy": 0.0, "num": 8}
    assert report["thinking"]["well_formed"] == {"accuracy": 80.0, "num": 40}
    assert report["thinking"]["accuracy"] == 80.0
    assert report["drafts"] == {"accuracy": round(100 * 168 / 232, 2), "num": 232}
    passed = {claim["claim"]: claim["pass"] for claim in report["claims"]}
    assert passed["tools: calls valid and exact"]
    assert passed["first drafts accepted"]
    assert not passed["thinking: blocks well formed"]
    json.dumps(report)
    assert "held_out_name" not in report["clips"]["by_group"]
    assert "thinking well formed" in evaluate.table(report)


def test_model_replies_reads_calls_thoughts_and_drafts(processor: MiniMaxM3VLProcessor) -> None:
    """Prompts of different lengths, with clips, pictures and neither, must not get mixed up in one batch."""
    tool_case = next(case for case in fresh_tool_tasks(0, 10) if case.kind == "call")
    clip_case = fresh_clip_questions(0, 1)[0]
    thinking_case = next(case for case in fresh_thinking_tasks(0, 8) if case.kind == "count")
    cases = [tool_case, clip_case, thinking_case]
    tokenizer = processor.tokenizer
    written = []
    for case in cases:
        call = [] if case.call is None else [{"function": {"name": case.call[0], "arguments": case.call[1]}}]
        thought = {"reasoning_content": "so."} if case.thinking_mode == "enabled" else {}
        turn = {"role": "assistant", "content": case.answer, "tool_calls": call, **thought}
        ids, mask = processor.encode_conversation([{"role": "user", "content": "?"}, turn])
        targets = [token for token, is_target in zip(ids, mask) if is_target]
        written.append(targets[1:] if case.thinking_mode == "enabled" else targets)

    class Output:
        def __init__(self, logits: torch.Tensor) -> None:
            self.mtp_per_depth_logits = [logits]

    class Model:
        device = torch.device("cpu")
        text_model = type("TextModel", (), {"mtp": object()})()

        def generate(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, **options) -> torch.Tensor:
            assert attention_mask.sum(1).tolist() == [
                processor.apply_chat_template(
                    one.messages, one.tools, one.thinking_mode, video_metadata=[{"fps": 1.0}] if one.fps else None
                )["input_ids"].shape[1]
                for one in map(DialogueCase.dialogue, cases)
            ]
            assert (input_ids[attention_mask == 0] == tokenizer.eos_token_id).all()
            assert options["pixel_values"].shape[0] == 64
            assert options["video_grid_thw"].tolist()[0][1:] == [8, 8]
            width = max(map(len, written))
            rows = [row + [tokenizer.eos_token_id] * (width - len(row)) for row in written]
            return torch.cat([input_ids, torch.tensor(rows)], dim=1)

        def __call__(self, input_ids: torch.Tensor, output_mtp_logits: bool, **media) -> Output:
            drafts = torch.roll(input_ids, -2, dims=1)  # at t, token t + 2: every draft is right
            return Output(torch.nn.functional.one_hot(drafts, tokenizer.vocab_size).float())

    replies = model_replies(Model(), processor)([case.dialogue() for case in cases])
    for case, reply, ids in zip(cases, replies, written, strict=True):
        assert case.is_right(reply), dialogue_cases.reply_words(reply)
        assert reply.well_formed
        assert reply.drafts == (len(ids) - 1, len(ids) - 1)
    assert replies[2].reasoning == "so."
