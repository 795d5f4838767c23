"""Records to documents: every form that is understood, and every fault that is reported."""

import base64
import json
import logging
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minim3.training.config import FieldNames, SourceRecipe
from minim3.training.data import BadRecordsError, Batch, BatchStream, RecordError
from minim3.training.records import DocumentEncoder
from tests.data_standins import (
    chat,
    data_recipe,
    documents,
    file_source,
    pocket_processor,
    targets,
    write_jsonl,
    write_picture,
)

PICTURE = [{"type": "image"}, {"type": "text", "text": "?"}]
CLIP = [{"type": "video"}, {"type": "text", "text": "?"}]
TOOL = {"type": "function", "function": {"name": "height", "parameters": {"type": "object"}}}


def batch_of(folder: Path, *records: Any, **options: Any) -> Batch:
    """The first batch of a file with these records, in order."""
    path = write_jsonl(folder / "records.jsonl", records)
    with BatchStream(data_recipe(file_source(path, shuffle=False, **options)), seed=0) as stream:
        return next(stream)


# -- faults -----------------------------------------------------------------------------------------------------------

FAULTS: dict[str, tuple[Any, str, str]] = {
    "broken JSON": (b'{"text": "half', "broken JSON", "Unterminated string"),
    "not UTF-8": (b'{"text": "\xff\xfe"}', "broken JSON", "can't decode byte"),
    "JSON text inside": ({"messages": "[{"}, "broken JSON", "messages is text, but not JSON"),
    "list": ([1, 2], "not an object", "this is a list"),
    "null": (None, "not an object", "this is a null"),
    "other fields": ({"prompt": "a"}, "no text", "neither 'messages' nor 'text' is there; fields: prompt"),
    "empty text": ({"text": " "}, "no text", "the text is empty"),
    "half a character": ({"text": "a \ud83d b"}, "no text", r"half of a surrogate pair \(U\+D83D\)"),
    "text of another type": ({"text": 5}, "no text", "the text is a int"),
    "unknown role": (
        {"messages": [{"role": "narrator", "content": "x"}]},
        "unknown role",
        r"messages\[0\] has role 'narrator'; known roles: system",
    ),
    "empty assistant": (chat("a", " "), "empty assistant", r"messages\[1\] says nothing and calls no tool"),
    "no assistant": ({"messages": [{"role": "user", "content": "x"}]}, "empty assistant", "nothing to learn"),
    "no messages": ({"messages": []}, "messages", "needs at least one message"),
    "messages of another type": ({"messages": 5}, "messages", "must be a list, not a int"),
    "a message that is none": ({"messages": ["x"]}, "messages", "is a str, expected a mapping"),
    "unanswered call": (
        {"messages": [{"role": "tool", "content": "x"}, *chat("a", "b")["messages"]]},
        "messages",
        "calls no tool",
    ),
    "broken tools": (chat("a", "b", tools=[{"type": "function"}]), "messages", "has function name None"),
    "thinking mode": (chat("a", "b", thinking_mode="deeply"), "messages", "known modes"),
    "missing picture": (chat(PICTURE, "a", images=["gone.png"]), "picture", r"gone.png' cannot be opened: No such"),
    "not a picture": (chat(PICTURE, "a", images=["records.jsonl"]), "picture", "not a picture of a known format"),
    "picture on the web": (chat(PICTURE, "a", images=["https://a.b/c.png"]), "picture", "URLs are off"),
    "no picture": (chat(PICTURE, "a"), "picture", "1 image parts wait for a picture, but 0 stand beside them"),
    "a picture too many": (chat("q", "a", images=["x.png"]), "picture", "0 image parts wait for a picture, but 1"),
    "missing clip": (chat(CLIP, "a", videos=["gone.mp4"]), "clip", r"gone.mp4' cannot be opened: No such"),
    "not a clip": (chat(CLIP, "a", videos=["records.jsonl"]), "clip", "cannot be read"),
    "clip without frames": (chat(CLIP, "a", videos=[{"frames": []}]), "clip", "no frames"),
    "missing frame": (chat(CLIP, "a", videos=[["gone.png"]]), "clip", "gone.png' cannot be opened"),
    "fps of another type": (chat(CLIP, "a", videos=[{"frames": ["gone.png"], "fps": "x"}]), "clip", "x"),
    "too long": (chat("a" * 400, "b"), "too long", r"4\d\d tokens; data.tokens_per_batch is 300"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_bad_record_is_named_with_its_line_and_left_out(
    name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    record, kind, message = FAULTS[name]
    path = write_jsonl(tmp_path / "records.jsonl", [chat("a", "first"), b"", record, chat("a", "last")])
    listed = tmp_path / "run" / "bad_records.jsonl"
    listed.parent.mkdir()
    source = file_source(path, shuffle=False)
    with (
        caplog.at_level(logging.WARNING, "minim3"),
        BatchStream(data_recipe(source, max_bad_records=1), seed=0, bad_records_path=listed) as stream,
    ):
        batch = next(stream)
        (bad,) = stream.bad_records.records
    assert (bad.file, bad.number, bad.kind) == (str(path), 3, kind)
    assert re.search(message, bad.message), bad.message
    assert json.loads(listed.read_text()) == vars(bad)
    assert f"{path}:3: {kind}" in caplog.text
    assert [text[: text.index("[e~[")] for text in targets(batch)[:4]] == ["</mm:think>first", "</mm:think>last"] * 2


def test_one_bad_record_more_than_allowed_ends_the_run_and_lists_the_first(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": ""}, chat("a", "b"), [], {"text": ""}])
    listed = tmp_path / "bad.jsonl"
    with (
        BatchStream(
            data_recipe(file_source(path, shuffle=False), max_bad_records=2), seed=0, bad_records_path=listed
        ) as stream,
        pytest.raises(BadRecordsError) as caught,
    ):
        next(stream)
    text = str(caught.value)
    assert "3 bad records, data.max_bad_records is 2 (2 no text, 1 not an object)" in text
    assert [line for line in text.splitlines() if str(path) in line] == [
        f"  {path}:1: no text: the text is empty",
        f"  {path}:3: not an object: a record is an object with fields, this is a list",
        f"  {path}:4: no text: the text is empty",
    ]
    assert str(listed) in text
    assert len(listed.read_text().splitlines()) == 3


def test_a_bad_record_counts_once_however_many_epochs_meet_it(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [chat("a", "b"), {"text": ""}])
    with BatchStream(data_recipe(file_source(path), max_bad_records=1), seed=0) as stream:
        for _ in range(3):
            next(stream)
        assert stream.epochs()[str(path)] > 3
        assert len(stream.bad_records.records) == 1


def test_a_file_of_nothing_but_allowed_bad_records_is_not_read_for_ever(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": ""}])
    with (
        BatchStream(data_recipe(file_source(path)), seed=0) as stream,
        pytest.raises(BadRecordsError, match="no usable record left"),
    ):
        next(stream)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-9, 9) | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
PART = st.fixed_dictionaries(
    {"type": st.sampled_from(["text", "image", "video", "image_url", "x"])},
    optional=dict.fromkeys(("text", "image", "video", "image_url"), JSON),
)
MESSAGE = st.fixed_dictionaries(
    {"role": st.sampled_from(["user", "assistant", "tool", "system"]) | JSON},
    optional={
        "content": st.text(max_size=5) | st.lists(PART, max_size=2) | JSON,
        "tool_calls": JSON,
        "reasoning": JSON,
    },
)
RECORD = st.fixed_dictionaries(
    {"messages": st.lists(MESSAGE, max_size=3) | JSON},
    optional=dict.fromkeys(("images", "videos", "tools", "thinking_mode", "kind"), JSON),
)


@settings(max_examples=300, deadline=None)
@given(RECORD | JSON)
def test_whatever_a_line_holds_is_a_document_or_a_bad_record(record: Any) -> None:
    """Any other error would end the run at that line."""
    encoder = DocumentEncoder(pocket_processor(), 500)
    try:
        group = encoder.encode_record(record, SourceRecipe(files=("x.jsonl",)), Path("/nowhere"))
    except RecordError:
        return
    assert group.num_tokens > 0


# -- what is learnt ---------------------------------------------------------------------------------------------------


def test_loss_falls_on_thinking_text_and_tool_calls_and_on_nothing_the_caller_wrote(tmp_path: Path) -> None:
    call = {"id": "c", "type": "function", "function": {"name": "height", "arguments": '{"plant": "palm"}'}}
    record = {
        "messages": [
            {"role": "system", "content": "SYSTEM"},
            {"role": "user", "content": "QUESTION"},
            {"role": "assistant", "reasoning_content": "Look it up.", "content": "", "tool_calls": [call]},
            {"role": "tool", "tool_call_id": "c", "content": "RESULT"},
            {"role": "assistant", "content": "20 m"},
        ],
        "tools": [TOOL],
        "thinking_mode": "enabled",
    }
    path = write_jsonl(tmp_path / "a.jsonl", [record])
    with BatchStream(data_recipe(file_source(path), tokens_per_batch=600), seed=0) as stream:
        batch = next(stream)
    assert targets(batch)[0] == (
        "<mm:think>Look it up.</mm:think>]<]minimax[><tool_call>\n".replace("[><", "[>[<")
        + ']<]minimax[>[<invoke name="height">]<]minimax[>[<plant>palm]<]minimax[>[</plant>]<]minimax[>[</invoke>\n'
        + "]<]minimax[>[</tool_call>[e~[</mm:think>20 m[e~["
    )
    text = documents(batch)[0]
    assert all(word in text for word in ("SYSTEM", "QUESTION", "RESULT", '"name": "height"', "Think before you"))


def test_loss_on_all_leaves_out_only_the_first_token_and_the_places_of_pictures(tmp_path: Path) -> None:
    write_picture(tmp_path / "a.png")
    batch = batch_of(tmp_path, chat(PICTURE, "blue", images=["a.png"]), loss_on="all")
    ids, labels = (tensor.split(batch.lengths)[0] for tensor in (batch.input_ids, batch.labels))
    image = pocket_processor().image_token_id
    expected = torch.cat([ids[1:], torch.tensor([-100])])
    expected[expected == image] = -100
    assert (ids == image).sum() == 4
    assert torch.equal(labels, expected)


def test_a_text_is_delimited_and_every_token_of_it_is_a_target(tmp_path: Path) -> None:
    batch = batch_of(tmp_path, {"text": "Moss [e~[ grows."})
    assert documents(batch)[0] == "]~!b[Moss [e~[ grows.[e~["
    assert targets(batch)[0] == "Moss [e~[ grows.[e~["
    end = pocket_processor().tokenizer.token_to_id("[e~[")
    assert (batch.input_ids.split(batch.lengths)[0] == end).sum() == 1, "typed markers became control tokens"


def test_a_long_text_is_cut_where_the_recipe_says_so_and_every_token_is_a_target_once(tmp_path: Path) -> None:
    text = "".join(f"{number} " for number in range(400))
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": text}])
    recipe = data_recipe(file_source(path, split_long_texts=True), tokens_per_batch=150, max_bad_records=0)
    with BatchStream(recipe, seed=0) as stream:
        written = "".join(targets(next(stream))[0] for _ in range(30))
    assert written.startswith(text + "[e~[" + text[:50])


def test_fields_and_roles_go_by_the_names_of_the_recipe(tmp_path: Path) -> None:
    turns = [{"from": "human", "value": "QUESTION"}, {"from": "gpt", "value": "ANSWER"}]
    theirs = {"conversations": turns, "topic": "x"}
    fields = FieldNames(messages="conversations", role="from", content="value", kind="topic")
    batch = batch_of(tmp_path, theirs, fields=fields, roles={"human": "user", "gpt": "assistant"})
    assert torch.equal(batch.input_ids, batch_of(tmp_path, chat("QUESTION", "ANSWER")).input_ids)
    assert set(batch.kinds) == {"x"}


def test_every_way_to_give_a_picture_gives_the_same_batch(tmp_path: Path) -> None:
    picture = write_picture(tmp_path / "a b.png")
    url = "data:image/png;base64," + base64.b64encode(picture.read_bytes()).decode()
    forms = [
        chat(PICTURE, "a", images=["a b.png"]),
        chat(PICTURE, "a", images=[str(picture)]),
        chat(PICTURE, "a", images=[picture.as_uri()]),
        chat(PICTURE, "a", images=[{"path": "a b.png", "bytes": None}]),
        chat(PICTURE, "a", images=[url]),
        chat([{"type": "image", "image": "a b.png"}, PICTURE[1]], "a"),
        chat([{"type": "image_url", "image_url": {"url": "a b.png"}}, PICTURE[1]], "a"),
        json.dumps(chat(PICTURE, "a", images=["a b.png"])).encode(),
        {**chat(PICTURE, "a", images=["a b.png"]), "messages": json.dumps(chat(PICTURE, "a")["messages"])},
    ]
    first = batch_of(tmp_path, forms[0])
    assert first.pixel_values is not None
    expected = pocket_processor().image_processor(images=[picture])["pixel_values"]
    assert torch.equal(first.pixel_values[:16], expected)
    for form in forms[1:]:
        batch = batch_of(tmp_path, form)
        assert torch.equal(batch.input_ids, first.input_ids)
        assert torch.equal(batch.pixel_values, first.pixel_values)


def test_a_clip_of_frames_is_a_clip_with_or_without_times(tmp_path: Path) -> None:
    frames = [write_picture(tmp_path / f"{index}.png", index).name for index in range(3)]
    timed = batch_of(tmp_path, chat(CLIP, "a", videos=[{"frames": frames, "fps": 2}]))
    bare = batch_of(tmp_path, chat(CLIP, "a", videos=[frames]))
    assert "]<]0.0 seconds[>[" in documents(timed)[0]
    assert "]<]1.0 seconds[>[" in documents(timed)[0]
    assert "seconds" not in documents(bare)[0]
    assert timed.video_grid_thw is not None
    assert timed.video_grid_thw[0].tolist() == [2, 4, 4]  # the last frame fills the second temporal patch
    assert torch.equal(timed.pixel_values_videos[:32], bare.pixel_values_videos[:32])
    (tmp_path / "folder").mkdir()
    for name in frames:
        (tmp_path / name).rename(tmp_path / "folder" / name)
    of_folder = batch_of(tmp_path, chat(CLIP, "a", videos=["folder"]))
    assert torch.equal(of_folder.pixel_values_videos, bare.pixel_values_videos)


def test_pictures_of_a_conversation_keep_their_order(tmp_path: Path) -> None:
    first, second = write_picture(tmp_path / "1.png", 1), write_picture(tmp_path / "2.png", 2, (56, 84))
    parts = [{"type": "image"}, {"type": "text", "text": "and"}, {"type": "image", "image": "1.png"}]
    batch = batch_of(tmp_path, chat(parts, "a", images=["2.png"]))
    assert batch.image_grid_thw is not None
    assert batch.image_grid_thw[:2].tolist() == [[1, 4, 6], [1, 4, 4]]
    expected = pocket_processor().image_processor(images=[second, first])["pixel_values"]
    assert torch.equal(batch.pixel_values[:40], expected)
    assert np.array_equal(batch.image_order, range(len(batch.image_order)))
