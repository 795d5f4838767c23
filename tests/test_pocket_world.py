"""Pocket's world: pictures, questions, text tasks, tokenizer, training stream and scoring."""

import json
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import tokenizers
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import minim3.pocket
from minim3.config import MiniMaxM3VLConfig
from minim3.model.causal_lm import MiniMaxM3SparseForConditionalGeneration
from minim3.pocket import evaluate, questions, text_tasks, tool_tasks, warmup, wordings, world
from minim3.pocket.questions import KINDS, Look, Question, is_right
from minim3.pocket.source import Group, PocketSource, Sample
from minim3.pocket.text_tasks import TEXT_KINDS
from minim3.pocket.tokenizer import LATER_WORDS, SPECIAL_TOKENS, build_tokenizer, world_words, write_processing_files
from minim3.pocket.world import (
    COLOURS,
    HELD_OUT_PAIRS,
    SHAPES,
    SIZES,
    Background,
    Scene,
    SceneObject,
    draw,
    random_scene,
)
from minim3.processing.processor import MiniMaxM3VLProcessor

WEIGHTS = Path(minim3.pocket.__file__).parent / "weights"
RECIPES = Path(__file__).parents[1] / "recipes"
seeds = st.integers(0, 2**63 - 1)


def item(colour: str, shape: str, x: float, y: float, size: str = "small", diameter: int = 14) -> SceneObject:
    return SceneObject(colour, shape, size, round(x - diameter / 2), round(y - diameter / 2), diameter, COLOURS[colour])


def scene_of(*objects: SceneObject) -> Scene:
    return Scene(objects, Background("plain", (230, 230, 230), (230, 230, 230), False, 8, 0))


def text_of(message: dict) -> str:
    if isinstance(message["content"], list):
        return message["content"][-1]["text"]
    return message["content"] or ""


# --- pictures --------------------------------------------------------------------------------------------------------


@settings(max_examples=150, deadline=None)
@given(seeds)
def test_objects_never_touch_and_sizes_are_what_they_are_called(seed: int) -> None:
    scene = random_scene(np.random.default_rng(seed), pairs="all")
    assert 1 <= len(scene.objects) <= 6
    for index, one in enumerate(scene.objects):
        low, high = SIZES[one.size]
        assert low <= one.diameter <= high
        assert one.left >= 1
        assert one.top >= 1
        assert one.left + one.diameter < world.PICTURE_SIZE
        assert one.top + one.diameter < world.PICTURE_SIZE
        for two in scene.objects[:index]:
            reach = (one.diameter + two.diameter) / 2 + world.MIN_GAP
            assert max(abs(one.x - two.x), abs(one.y - two.y)) >= reach


@settings(max_examples=60, deadline=None)
@given(seeds)
def test_the_same_seed_draws_the_same_picture(seed: int) -> None:
    first, second = (draw(random_scene(np.random.default_rng(seed))) for _ in range(2))
    assert first.shape == (112, 112, 3)
    assert first.dtype == np.uint8
    assert np.array_equal(first, second)


@settings(max_examples=150, deadline=None)
@given(seeds)
def test_no_background_hides_an_object(seed: int) -> None:
    """Every colour stays far from the background it lies on, and nearest to its own name."""
    scene = random_scene(np.random.default_rng(seed), pairs="all")
    background = draw(Scene((), scene.background)).astype(float)
    picture = draw(scene).astype(float)
    named = np.array(list(COLOURS.values()), float)
    for one in scene.objects:
        box = np.s_[one.top : one.top + one.diameter, one.left : one.left + one.diameter]
        inside = (picture[box] == np.array(one.rgb)).all(axis=-1)
        assert inside.sum() > 0.15 * one.diameter**2, "the object covers too little to be seen"
        distance = np.linalg.norm(background[box] - np.array(one.rgb), axis=-1)
        assert distance.min() > 90
        nearest = np.linalg.norm(named - np.array(one.rgb), axis=1).argmin()
        assert list(COLOURS)[nearest] == one.colour


@pytest.mark.parametrize("diameter", [13, 15, 24, 35])
def test_shapes_differ_even_when_small(diameter: int) -> None:
    masks = {shape: np.asarray(world._mask(shape, diameter), float) / 255 for shape in SHAPES}
    for one in SHAPES:
        for two in SHAPES:
            if one < two:
                assert np.abs(masks[one] - masks[two]).mean() > 0.06, (one, two)


def test_unknown_names_are_refused() -> None:
    rng = np.random.default_rng(0)
    with pytest.raises(ValueError, match="num_objects is 7"):
        random_scene(rng, num_objects=7)
    with pytest.raises(ValueError, match="'taste'"):
        questions.ask(random_scene(rng), "taste", rng)
    with pytest.raises(ValueError, match="'song'"):
        text_tasks.ask_text("song", rng)


# --- questions -------------------------------------------------------------------------------------------------------


def described(phrase: str, scene: Scene) -> list[SceneObject]:
    """The objects that a phrase such as "large red circles" names: an independent reading of the question's words."""
    found = list(scene.objects)
    for word in phrase.split():
        singular = re.sub(r"es$", "", word) if word == "crosses" else re.sub(r"s$", "", word)
        if word in SIZES:
            found = [one for one in found if one.size == word]
        elif word in COLOURS:
            found = [one for one in found if one.colour == word]
        elif word in SHAPES or singular in SHAPES:
            found = [one for one in found if one.shape in (word, singular)]
    return found


def distance_towards(direction: str, item_: SceneObject, other: SceneObject) -> float:
    """Pixels from `other` to `item_`; rows of a picture are counted from the top."""
    sign = 1 if direction in ("right", "below") else -1
    return sign * (item_.x - other.x if direction in ("left", "right") else item_.y - other.y)


def check_against_the_scene(question: Question, scene: Scene) -> None:
    text = question.text.lower()
    if question.kind == "count":
        assert question.answer == questions.NUMBER_WORDS[len(scene.objects)]
    elif question.kind in ("count_of", "exists"):
        found = described(re.sub(r"[.?]", "", text), scene)
        right = questions.NUMBER_WORDS[len(found)] if question.kind == "count_of" else "yes" if found else "no"
        assert question.answer == right
    elif question.kind in ("colour", "shape", "size"):
        phrase = re.search(
            r"the ((?:small |medium |large |[a-z]+ )*(?:object|circle|square|triangle|star|cross|ring))", text
        )
        assert phrase is not None, text
        found = described(phrase[1], scene)
        assert len(found) == 1, "the description must fit one object and no other"
        assert question.answer == getattr(found[0], question.kind)
    else:
        names = re.findall(rf"the ({'|'.join(COLOURS)}) ({'|'.join(SHAPES)})", text + " " + question.answer)
        named = [[one for one in scene.objects if one.pair == pair] for pair in names]
        assert all(len(found) == 1 for found in named), "objects must be named uniquely"
        one, two = named[0][0], named[1][0]
        words = {"left": "left", "right": "right", "above|higher|up": "above", "below|lower|down": "below"}
        direction = next(value for words_, value in words.items() if re.search(rf"\b({words_})\b", text))
        if question.form == "relation_what":
            assert distance_towards(direction, two, one) >= 14
            assert all(distance_towards(direction, other, one) <= 0 for other in scene.objects if other is not two)
            return
        assert abs(distance_towards(direction, one, two)) >= 14
        is_there = distance_towards(direction, one, two) > 0
        if question.form == "relation_is":
            assert question.answer == ("yes" if is_there else "no")
        else:
            assert named[2][0] is (one if is_there else two)


@settings(max_examples=200, deadline=None)
@given(seeds, st.sampled_from(KINDS), st.booleans(), st.booleans())
def test_answers_follow_from_the_scene(seed: int, kind: str, held_out_wording: bool, held_out_pair: bool) -> None:
    rng = np.random.default_rng(seed)
    scene = random_scene(rng, pairs="held_out" if held_out_pair else "trained")
    question = questions.ask(scene, kind, rng, held_out_wording=held_out_wording, held_out_pair=held_out_pair)
    if question is not None:
        check_against_the_scene(question, scene)
        words = " ".join(re.findall(r"[a-z]+", (question.text + " " + question.answer).lower()))
        speaks_of_one = any(re.search(rf"\b{colour} {shape}(s|es)?\b", words) for colour, shape in HELD_OUT_PAIRS)
        if not held_out_pair:
            assert not speaks_of_one
        elif kind in ("count_of", "exists", "relation"):
            assert speaks_of_one


def test_what_lies_there_is_asked_only_when_it_is_one_object_beyond_doubt() -> None:
    reference = item("red", "circle", 60, 50)
    clear = item("blue", "star", 40, 20)
    assert questions._only_one(scene_of(reference, clear), "left", reference) is clear
    for spoiler in (item("pink", "ring", 20, 80), item("pink", "ring", 62, 80), item("pink", "ring", 50, 90)):
        # A second object on that side, one that is just not, and one within the margin.
        assert questions._only_one(scene_of(reference, clear, spoiler), "left", reference) is None
    assert questions._only_one(scene_of(reference, clear, item("pink", "ring", 90, 80)), "left", reference) is clear
    assert questions._only_one(scene_of(reference, item("blue", "star", 48, 20)), "left", reference) is None


def test_lists_are_in_the_order_they_claim() -> None:
    scene = scene_of(item("red", "circle", 90, 10), item("blue", "star", 20, 60), item("pink", "ring", 56, 100))
    answers = {}
    for seed in range(30):
        question = questions.describe(scene, np.random.default_rng(seed))
        answers[question.form] = question.answer
    assert answers == {
        "left_to_right": "small blue star, small pink ring, small red circle",
        "top_to_bottom": "small red circle, small blue star, small pink ring",
        "places": "small blue star left, small pink ring bottom, small red circle top right",
    }


def test_grammar_of_descriptions() -> None:
    assert Look(colour="orange", shape="cross").with_article() == "an orange cross"
    assert Look(size="small", colour="orange").with_article() == "a small orange object"
    assert Look(colour="red", shape="cross").plural() == "red crosses"
    assert Look(shape="ring").plural() == "rings"


def test_only_the_whole_right_answer_counts() -> None:
    question = Question("relation", "relation_which", "?", "the red circle")
    for good in ("the red circle", "The red circle.", " red  circle\n"):
        assert is_right(question, good)
    for bad in ("", "the", "red", "circle", "the red circle and the star", "the blue circle", "not the red circle"):
        assert not is_right(question, bad)
    assert not is_right(Question("sum", "sum", "?", "17"), "170")


def test_every_kind_has_wordings_enough_and_held_out_ones_bring_no_new_word() -> None:
    requests = {f"tool {sort.key}": sort.requests for sort in tool_tasks.SORTS}
    everything = {**wordings.PICTURE_WORDINGS, **wordings.TEXT_WORDINGS, **wordings.CLIP_WORDINGS, **requests}
    trained_words = {
        word
        for group in everything.values()
        for text in group.trained
        for word in re.findall(r"[A-Za-z]+|\{\w+\}", text)
    }
    for form, group in everything.items():
        assert len(set(group.trained)) >= 6, form
        assert len(set(group.held_out)) >= 2, form
        assert not set(group.trained) & set(group.held_out), form
        for text in group.held_out:
            assert set(re.findall(r"[A-Za-z]+|\{\w+\}", text)) <= trained_words, text


def test_demo_asks_different_kinds() -> None:
    for seed in range(20):
        rng = np.random.default_rng(seed)
        scene = random_scene(rng, num_objects=4, pairs="all")
        asked = questions.demo_questions(scene, rng, 3)
        assert len({question.kind for question in asked}) == 3
        for question in asked:
            check_against_the_scene(question, scene)


# --- text tasks ------------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(seeds, st.booleans())
def test_text_tasks_have_their_answers(seed: int, held_out: bool) -> None:
    rng = np.random.default_rng(seed)
    task = text_tasks.ask_text("sum", rng, held_out_wording=held_out)
    numbers = [int(number) for number in re.findall(r"\d+", task.text)]
    assert max(numbers) < 100
    assert sum(numbers) == int(task.answer)
    task = text_tasks.ask_text("copy", rng, held_out_wording=held_out)
    assert task.answer in task.text
    assert 8 <= len(task.answer.split()) <= 24
    task = text_tasks.ask_text("lookup", rng, held_out_wording=held_out)
    rows = re.findall(r"(\w+) (\w+)(?=, |; |\n|$)", task.text.replace("list: ", "\n"))
    rows = [(key, value) for key, value in rows if key in text_tasks.WORDS and value in text_tasks.WORDS]
    assert len({word for row in rows for word in row}) == 32
    rest = task.text.replace("list: ", "\n")
    for key, value in rows:
        rest = rest.replace(f"{key} {value}", " ", 1)
    asked = [key for key, _ in rows if re.search(rf"\b{key}\b", rest)]
    assert [(asked[0], dict(rows)[asked[0]])] == [tuple(task.answer.split())]
    assert len(asked) == 1


# --- tokenizer -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tokenizer() -> tokenizers.Tokenizer:
    return tokenizers.Tokenizer.from_file(str(WEIGHTS / "tokenizer.json"))


def test_shipped_processing_files_are_what_the_code_builds(tmp_path: Path) -> None:
    """A vocabulary that changes after training would silently scramble the model."""
    write_processing_files(tmp_path)
    for written in tmp_path.iterdir():
        assert json.loads(written.read_text()) == json.loads((WEIGHTS / written.name).read_text()), written.name
    assert build_tokenizer().to_str() == build_tokenizer().to_str()


def test_every_word_of_the_world_is_one_token(tokenizer: tokenizers.Tokenizer) -> None:
    words = [*world_words(), *LATER_WORDS]
    assert [word for word in words if len(tokenizer.encode(word).ids) != 1] == []
    assert tokenizer.get_vocab_size() <= 1600
    assert [tokenizer.token_to_id(token) for token in SPECIAL_TOKENS] == list(range(1144, 1154))
    assert tokenizer.encode("What is 34 plus 58?").tokens == ["What", "Ġis", "Ġ", *"34", "Ġplus", "Ġ", *"58", "?"]


@settings(max_examples=200, deadline=None)
@given(text=st.text())
def test_any_text_survives_the_round_trip(tokenizer: tokenizers.Tokenizer, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text).ids, skip_special_tokens=False) == text


# --- chat template ---------------------------------------------------------------------------------------------------

TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}]
CALLS = [
    {"id": "a", "function": {"name": "f", "arguments": {"x": 1, "y": [1, {"z": "q"}, None], "n": None, "b": True}}},
    {"id": "b", "function": {"name": "g", "arguments": {}}},
]
CONVERSATION = [
    {"role": "system", "content": "Be kind."},
    {"role": "developer", "content": "Be brief."},
    {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What ]~b] is this?"}]},
    {"role": "assistant", "content": "hm", "reasoning_content": "look it up", "tool_calls": CALLS},
    {"role": "tool", "tool_call_id": "b", "content": "2"},
    {"role": "tool", "tool_call_id": "a", "content": "1"},
    {"role": "assistant", "content": "red"},
    {"role": "user", "content": "Thanks"},
]


@pytest.mark.parametrize("mode", ["adaptive", "enabled", "disabled"])
@pytest.mark.parametrize("tools", [None, TOOLS])
@pytest.mark.parametrize("start", [0, 1, 2, 7])
def test_pockets_template_is_the_documented_format_after_its_own_root_text(
    mode: str, tools: list | None, start: int
) -> None:
    from minim3.processing import chat
    from minim3.processing.messages import normalize_messages, normalize_tools
    from minim3.processing.template import ChatTemplate
    from minim3.processing.tokenizer import Tokenizer

    template = ChatTemplate((WEIGHTS / "chat_template.jinja").read_text(encoding="utf-8"))
    messages, checked = normalize_messages(CONVERSATION[start:]), normalize_tools(tools)
    for opened in (True, False):
        ours = template.render(Tokenizer.from_pretrained(WEIGHTS), messages, checked, mode, opened)
        root, _, rest = "".join(segment.text for segment in ours).partition("[e~[\n")
        builtin = "".join(segment.text for segment in chat.render_normalized(messages, checked, mode, opened))
        expected = builtin.partition("[e~[\n")[2]
        if checked:  # the schemas stand bare, without instructions
            expected = re.sub(
                r"(# Tools\n).*?(<tools>\n.*?</tools>).*?(\[e~\[\n)", r"\1\2\3", expected, count=1, flags=re.S
            )
        assert rest == expected
        assert root.startswith("]~!b[]~b]system\nYou are pocket.")
        assert ("\n" in root.partition("system\n")[2]) == (mode != "adaptive")


# --- training stream -------------------------------------------------------------------------------------------------


def samples_of(groups: list[Group]) -> list[Sample]:
    return [sample for group in groups for sample in group.samples]


def test_a_group_depends_on_seed_and_number_alone() -> None:
    """Workers and resumed runs must draw what one uninterrupted worker draws."""
    source = PocketSource(seed=5)
    resumed = iter(PocketSource(seed=5, start=3, stride=2))
    for index in (3, 5, 7):
        one, two = source.group(index), next(resumed)
        assert one.samples == two.samples
        assert all(np.array_equal(a, b) for a, b in zip(one.images, two.images, strict=True))
    assert source.group(10**6 + 3).samples != source.group(3).samples
    assert source.group(2**62).samples != source.group(2**62 + 1).samples
    assert PocketSource(seed=6).group(3).samples != source.group(3).samples


def test_conversations_alternate_and_show_their_picture_once() -> None:
    groups = [PocketSource().group(index) for index in range(160)]
    for group in groups:
        for sample in group.samples:
            roles = [message["role"] for message in sample.messages if message["role"] != "tool"]
            roles = [role for number, role in enumerate(roles) if number == 0 or role != roles[number - 1]]
            assert roles == ["user", "assistant"] * (len(roles) // 2)
            parts = [m["content"] for m in sample.messages if isinstance(m["content"], list)]
            assert len(parts) == len(sample.image_indices) + len(sample.video_indices)
            assert (len(sample.image_indices), len(sample.video_indices)) == (len(group.images), len(group.videos))
            shown = "image" if group.images else "video"
            assert all([part["type"] for part in content] == [shown, "text"] for content in parts)
    kinds = Counter(sample.kind for sample in samples_of(groups))
    assert {"picture", "clip", "tools", "copy", "lookup", "sum"} <= set(kinds)
    texts = [text_of(message) for sample in samples_of(groups) for message in sample.messages[:-2]]
    assert not any(text in wordings.DESCRIBE_WORDINGS["left_to_right"] for text in texts), "later answers read it off"
    turns = [sum(len(sample.messages) // 2 for sample in group.samples) for group in groups if group.images]
    assert np.mean(turns) > 7, "a picture carries many questions"


def test_training_never_shows_what_is_held_out() -> None:
    source = PocketSource(seed=1, untidy_fraction=0.0)
    held_out_texts = []
    requests = [sort.requests for sort in tool_tasks.SORTS]
    asked = {**wordings.PICTURE_WORDINGS, **wordings.TEXT_WORDINGS, **wordings.CLIP_WORDINGS}
    for group in (*asked.values(), *requests):
        held_out_texts += [re.sub(r"\\\{\w+\\\}", ".+", re.escape(text)) for text in group.held_out]
    # A held-out wording that another kind's trained wording spells by chance would be flagged here too.
    pattern = re.compile("|".join(held_out_texts), re.DOTALL)
    pairs = re.compile("|".join(rf"\b{colour} {shape}" for colour, shape in HELD_OUT_PAIRS))
    names = set(tool_tasks.HELD_OUT_NAMES)
    for sample in samples_of([source.group(index) for index in range(300)]):
        assert not names & {tool["function"]["name"] for tool in sample.tools or ()}
        for message in sample.messages:
            assert not pairs.search(message.get("reasoning_content", ""))
            assert not pairs.search(text_of(message))
            if message["role"] == "user":
                assert not pattern.fullmatch(text_of(message)), text_of(message)


def test_weights_choose_the_kinds() -> None:
    only = PocketSource(group_weights={"text": 1.0}, text_weights={"sum": 1.0})
    assert {sample.kind for sample in samples_of([only.group(index) for index in range(10)])} == {"sum"}
    with pytest.raises(ValueError, match="text_weights"):
        PocketSource(text_weights={"song": 1.0})
    with pytest.raises(ValueError, match="kind_weights"):
        PocketSource(kind_weights={"colour": -1.0})
    with pytest.raises(ValueError, match="group_weights"):
        PocketSource(group_weights={"pictures": 1.0})
    thinking = PocketSource(thinking_weights={"enabled": 1.0})
    for sample in samples_of([thinking.group(index) for index in range(20)]):
        assert sample.thinking_mode == "enabled"
        turns = [message for message in sample.messages if message["role"] == "assistant"]
        assert all(message["reasoning_content"].strip() for message in turns), "a turn without a thought"


@given(seeds)
def test_nothing_is_asked_of_what_has_no_name(seed: int) -> None:
    """An answer "None", or "how many objects" for "how many of these", would be learnt as the truth."""
    rng = np.random.default_rng(seed)
    scene = random_scene(rng, nameless_fraction=0.6)
    asked = [questions.ask(scene, kind, rng) for kind in KINDS]
    texts = [f"{question.text} {question.answer}" for question in asked if question]
    texts.append(questions.describe(scene, rng).answer)
    assert not any("None" in text or "  " in text for text in texts), texts
    looks = questions._looks(scene.objects)
    assert all(look.count(scene) > 0 and (look.size or look.colour or look.shape) for look in looks)


def test_colours_without_a_name_are_far_from_those_with_one() -> None:
    """Nearly red stars would show the held-out pair of red and star under another name."""
    found = [
        one for seed in range(60) for one in random_scene(np.random.default_rng(seed), nameless_fraction=0.5).objects
    ]
    nameless = [np.array(one.rgb) for one in found if one.colour is None]
    assert len(nameless) > 20
    for rgb in nameless:
        assert min(np.linalg.norm(rgb - np.array(known)) for known in COLOURS.values()) >= world.NAMELESS_DISTANCE
    shapeless = [one for one in found if one.shape is None]
    assert len(shapeless) > 20
    assert all(one.colour in COLOURS for one in shapeless)
    assert len({world._mask(None, 24, one.outline).tobytes() for one in shapeless}) == len(shapeless)


def test_scenes_of_the_evaluation_have_names_throughout() -> None:
    for case in evaluate.fresh_questions(3, 40):
        assert all(one.colour and one.shape for one in case.scene.objects)


# --- evaluation ------------------------------------------------------------------------------------------------------


def test_evaluation_is_balanced_and_its_flags_are_true() -> None:
    cases = evaluate.fresh_questions(seed=3, n=20 * len(KINDS))
    assert Counter(case.question.kind for case in cases) == dict.fromkeys(KINDS, 20)
    assert Counter(case.group for case in cases) == {"trained": 98, "held_out_wording": 21, "held_out_pair": 21}
    for case in cases:
        assert case.scene is not None
        check_against_the_scene(case.question, case.scene)
        held_out = [one for one in case.scene.objects if one.pair in HELD_OUT_PAIRS]
        assert len(held_out) == (1 if case.group == "held_out_pair" else 0)
    again = evaluate.fresh_questions(seed=3, n=30)
    assert [case.question for case in again] == [case.question for case in cases[:30]]
    assert {case.question.text for case in again} != {case.question.text for case in evaluate.fresh_questions(4, 30)}
    exists = [case.question.answer for case in evaluate.fresh_questions(0, 700) if case.question.kind == "exists"]
    assert 30 <= exists.count("yes") <= 70


def test_evaluation_pictures_are_not_training_pictures() -> None:
    trained = {image.tobytes() for index in range(40) for image in PocketSource(seed=0).group(index).images}
    fresh = {draw(case.scene).tobytes() for case in evaluate.fresh_questions(0, 40) if case.scene is not None}
    assert not trained & fresh


def test_score_counts_by_kind_and_by_what_was_held_out() -> None:
    known = {}
    for case in evaluate.fresh_questions(0, 280) + evaluate.fresh_text_tasks(0, 30):
        picture, text = case.prompt()
        known[None if picture is None else picture.tobytes(), text] = case

    def answer(prompts: list) -> list[str]:
        cases = [known[None if picture is None else picture.tobytes(), text] for picture, text in prompts]
        return ["?" if case.question.kind == "size" else case.question.answer.upper() + "." for case in cases]

    report = evaluate.evaluate(answer, 280, 0, num_text_tasks=30, batch_size=37)
    assert report["pictures"]["accuracy"] == pytest.approx(100 * 6 / 7, abs=0.01)
    assert report["pictures"]["by_kind"]["size"] == {"accuracy": 0.0, "num": 40}
    assert report["pictures"]["by_group"]["held_out_wording"]["num"] == 42
    assert report["text"]["accuracy"] == 100.0
    assert set(report["text"]["by_kind"]) == set(TEXT_KINDS)
    failed = {claim["claim"] for claim in report["claims"] if not claim["pass"]}
    assert failed == {"pictures: right answers", "pictures: size"}
    json.dumps(report)
    assert "below the bar" in evaluate.table(report)
    with pytest.raises(ValueError, match="gave 1 answers to 37"):
        evaluate.evaluate(lambda prompts: [""], 280, 0, batch_size=37)


def test_model_answers_reads_only_what_was_generated() -> None:
    """The prompt, its padding and control tokens must not leak into the answer."""
    import torch

    from minim3.processing.processor import MiniMaxM3VLProcessor

    processor = MiniMaxM3VLProcessor.from_pretrained(WEIGHTS)
    texts = ["</mm:think>red[e~[", "</mm:think>the blue star[e~["]

    class Model:
        device = torch.device("cpu")

        def generate(self, input_ids: torch.Tensor, **options: object) -> torch.Tensor:
            assert options["eos_token_id"] == processor.tokenizer.eos_token_id
            assert options["pixel_values"].shape == (64, 3 * 2 * 14 * 14)  # type: ignore[attr-defined]
            rows = [processor.tokenizer.encode(text, allow_special=True) for text in texts]
            width = max(map(len, rows))
            new = [row + [processor.tokenizer.eos_token_id] * (width - len(row)) for row in rows]
            return torch.cat([input_ids, torch.tensor(new)], dim=1)

    answers = evaluate.model_answers(Model(), processor)(
        [(draw(random_scene(np.random.default_rng(0))), "What colour is the ring?"), (None, "Hello")]
    )
    assert answers == ["red", "the blue star"]


def test_centres_lie_on_the_lattice() -> None:
    """The tower was trained on these offsets alone: evaluation off the lattice asks for what was never shown."""
    for seed in range(30):
        for one in random_scene(np.random.default_rng(seed)).objects:
            assert one.x % world.LATTICE == 0
            assert one.y % world.LATTICE == 0


@given(seeds)
def test_no_two_centres_share_a_cell(seed: int) -> None:
    """The token of a cell is taught one object: of two, one would be unanswerable."""
    objects = random_scene(np.random.default_rng(seed), num_objects=6).objects
    assert len({(one.x // world.CELL, one.y // world.CELL) for one in objects}) == 6


def test_where_counts_steps_from_the_top_left_corner() -> None:
    scene = scene_of(item("red", "circle", 84, 14), item("blue", "star", 21, 63))
    answers = {questions.where(scene, np.random.default_rng(seed)).answer for seed in range(20)}
    assert answers == {"12 right, 2 down", "3 right, 9 down"}


def test_the_first_lesson_names_the_object_of_each_cell() -> None:
    """Targets in another order than the features would teach the tower that things lie elsewhere."""
    scene = random_scene(np.random.default_rng(3))
    targets = warmup.cell_targets(scene).view(4, 4, 5)
    assert int((targets[..., 0] > 0).sum()) == len(scene.objects)
    largest = max(scene.objects, key=lambda one: one.diameter)
    colour, shape, size, across, down = targets[int(largest.y // 28), int(largest.x // 28)].tolist()
    assert list(COLOURS)[colour - 1] == largest.colour
    assert SHAPES[shape - 1] == largest.shape
    assert list(SIZES)[size - 1] == largest.size
    assert (across, down) == (largest.x % 28 / 7, largest.y % 28 / 7)


def test_the_first_lesson_asks_no_name_where_there_is_none() -> None:
    """A colour without a name taught as "no object" would teach the tower to overlook stars of other colours."""
    for seed in range(10):
        scene = random_scene(np.random.default_rng(seed), nameless_fraction=0.5)
        targets = warmup.cell_targets(scene)
        assert int((targets[:, 2] > 0).sum()) == len(scene.objects)
        for column, attribute in enumerate(("colour", "shape")):
            nameless = sum(getattr(one, attribute) is None for one in scene.objects)
            assert int((targets[:, column] == warmup.NAMELESS).sum()) == nameless


def test_the_first_lesson_teaches_colours_at_once() -> None:
    """A lesson that reaches no weight would pass unnoticed until the long run failed."""
    torch.manual_seed(0)
    raw = json.loads((RECIPES / "pocket_config.json").read_text())
    raw["vision_config"]["num_hidden_layers"] = 1
    model = MiniMaxM3SparseForConditionalGeneration.from_config(MiniMaxM3VLConfig.from_dict(raw))
    before = model.vision_tower.vision_model.embeddings.patch_embedding.weight.clone()
    head = model.get_output_embeddings().weight.clone()
    warmup.warm_up(model, MiniMaxM3VLProcessor.from_pretrained(WEIGHTS), steps=3, num_pictures=4)
    assert not torch.equal(before, model.vision_tower.vision_model.embeddings.patch_embedding.weight)
    assert torch.equal(head, model.get_output_embeddings().weight)


def test_follow_up_questions_are_about_the_same_table() -> None:
    """Answers from another table would teach the model to guess."""
    for seed in range(20):
        first, *others = text_tasks.ask_lookups(np.random.default_rng(seed), 6)
        assert len(others) == 5
        assert len({question.answer for question in others} | {first.answer}) == 6
        for question in others:
            keys = [word for word in re.findall(r"\w+", question.text) if word in text_tasks.WORDS]
            rows = question.answer.split(", ")
            assert len(keys) == len(rows) == (1 if question is not others[0] else len(keys))
            for key, row in zip(keys, rows, strict=True):
                assert row.startswith(key)
                assert row in first.text
        assert ", " in others[0].answer, "many keys at once"
