"""Readers: wherever a stream is cut, it says what the one-shot parse says, with stop strings and limits on top."""

from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minim3.inference.engine import TokenEvent
from minim3.processing.output import parse_output
from minim3.processing.tokenizer import Tokenizer
from minim3.server.answers import ChatReader, Ending, TextReader
from tests.running_servers import pocket
from tests.test_server_chat import CALL, NS, TWO_CALLS, WEATHER

ANSWERS = (
    ("enabled", "first 3, then 4</mm:think>It is 7."),
    ("enabled", f"look it up</mm:think>A moment. {CALL}"),
    ("adaptive", f"<mm:think>why</mm:think>{TWO_CALLS}\nDone."),
    ("adaptive", "</mm:think>Größe 你好 🙂 ]<]minimax[> no marker </mm:thin"),
    ("disabled", f'Write {NS}<tool_call> {NS}<invoke name="weather">{NS}<city>a <b> c{NS}</city>'),
    ("disabled", "</mm:think></mm:think>again <mm:think>"),
    ("enabled", "never ends"),
)


def tokens(tokenizer: Tokenizer, text: str, cuts: list[int]) -> list[int]:
    """The text as the model could write it: control tokens whole, the rest cut anywhere, also inside characters."""
    ids: list[int] = []
    for token_id, piece in tokenizer.split_special(text):
        if token_id is not None:
            ids.append(token_id)
            continue
        places = sorted({cut % (len(piece) + 1) for cut in cuts} | {0, len(piece)})
        for start, stop in pairwise(places):
            ids += tokenizer.encode(piece[start:stop])
    return ids


def read(reader: Any, ids: list[int], reason: str = "stop") -> tuple[dict[str, Any], int]:
    """What a client puts together, and how many tokens the reader took before it said stop."""
    found: dict[str, Any] = {"reasoning": "", "content": "", "calls": {}, "tokens": [], "reason": None}
    taken = 0
    updates = []
    for token_id in ids:
        taken += 1
        updates.append(reader.feed(TokenEvent(None, token_id)))  # type: ignore[arg-type]
        if reader.stopped:
            break
    updates.append(reader.finish(reason))
    for update in updates:
        found["reasoning"] += update.delta.reasoning
        found["content"] += update.delta.content
        found["tokens"] += [entry.token_id for entry in update.entries]
        for call in update.delta.tool_calls:
            held = found["calls"].setdefault(call.index, {"name": None, "arguments": ""})
            held["name"] = call.name or held["name"]
            held["arguments"] += call.arguments
        found["reason"] = update.finish_reason or found["reason"]
    return found, taken


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(ANSWERS), st.lists(st.integers(0, 200), max_size=8), st.integers(0, 200), st.data())
def test_every_split_of_a_stream_equals_the_one_shot_parse(
    answer: tuple[str, str], cuts: list[int], length: int, data: st.DataObject
) -> None:
    """Reasoning, content and calls, cut off at any length: pitfalls 11 to 15 through the server's own reader."""
    mode, text = answer
    tokenizer = pocket()[1].tokenizer
    ids = tokens(tokenizer, text, cuts)
    ids = ids[: length % (len(ids) + 1)] if data.draw(st.booleans()) else [*ids, tokenizer.eos_token_id]
    reason = "stop" if ids and ids[-1] == tokenizer.eos_token_id else "length"
    expected = parse_output(ids, tokenizer, mode, [WEATHER], finish_reason=reason)
    reader = ChatReader(0, tokenizer, mode, [WEATHER], Ending(), "call_{}".format)
    found, _ = read(reader, ids, reason)
    assert (found["reasoning"] or None, found["content"]) == (expected.reasoning, expected.content)
    assert found["reason"] == expected.finish_reason == reader.result.finish_reason
    assert [call["name"] for call in found["calls"].values()] == [call.name for call in expected.tool_calls]
    assert reader.result.tool_calls == expected.tool_calls
    assert reader.result.content == expected.content
    import json

    assert [json.loads(call["arguments"]) for call in found["calls"].values()] == [
        call.arguments for call in expected.tool_calls
    ]


@settings(max_examples=100, deadline=None)
@given(
    st.text(alphabet="abc \né你", max_size=30),
    st.lists(st.text(alphabet="abc \né", min_size=1, max_size=3), max_size=3),
    st.lists(st.integers(0, 30), max_size=6),
    st.booleans(),
    st.booleans(),
)
def test_stop_strings_do_not_depend_on_where_tokens_end(
    text: str, stops: list[str], cuts: list[int], include: bool, chat: bool
) -> None:
    """The text up to the stop string that is complete first, in chat and in plain text, whatever the tokens.

    Chat kept white space back, a blank line in the answer too, and went on until something else came.
    """
    tokenizer = pocket()[1].tokenizer
    ids = [*tokens(tokenizer, text, cuts), tokenizer.eos_token_id]
    ending = Ending(tuple(stops), include)
    if chat:
        whole = parse_output(ids, tokenizer, "disabled").content
        reader: Any = ChatReader(0, tokenizer, "disabled", [], ending, str)
    else:
        whole = text
        reader = TextReader(0, tokenizer, ending, [tokenizer.eos_token_id])
    ends = [(whole.find(stop) + len(stop), whole.find(stop), stop) for stop in stops if stop in whole]
    expected = whole
    if ends:
        _, start, stop = min(ends)
        expected = whole[:start] + (stop if include else "")
    found, taken = read(reader, ids, "length")
    assert found["content"] == expected == reader.result.content
    assert found["reason"] == ("stop" if ends else "length")
    if chat:
        # All tokens of which something is shown, and no others (half a character shows nothing).
        shown = [tokenizer.decode(found["tokens"][:n]).rstrip("\ufffd") for n in (-1, None)]
        assert not ends or shown[1].startswith(expected)
        assert not ends or not found["tokens"] or len(shown[0]) < len(expected)
    if ends:
        complete = (n for n in range(len(ids)) if any(stop in tokenizer.decode(ids[:n]) for stop in stops))
        assert taken == next(complete)


def test_tokens_of_the_content_are_its_text() -> None:
    """Log-probabilities are listed for these tokens and no others."""
    tokenizer = pocket()[1].tokenizer
    for mode, text in ANSWERS[:2]:
        ids = [*tokens(tokenizer, text, []), tokenizer.eos_token_id]
        found, _ = read(ChatReader(0, tokenizer, mode, [WEATHER], Ending(), str), ids)
        assert tokenizer.decode(found["tokens"]).rstrip() == found["content"]


def test_a_stop_before_a_call_ends_the_answer() -> None:
    tokenizer = pocket()[1].tokenizer
    ids = tokens(tokenizer, f"code:\n{CALL}", [])
    found, taken = read(ChatReader(0, tokenizer, "disabled", [WEATHER], Ending(("\n",)), str), ids)
    assert (found["content"], found["calls"], found["reason"]) == ("code:", {}, "stop")
    assert taken < len(ids)


def test_every_token_of_a_text_has_an_entry() -> None:
    """Harnesses count them: those of the end and of a stop token too, which say nothing."""
    tokenizer = pocket()[1].tokenizer
    (seven, *_), end = tokenizer.encode("7"), tokenizer.eos_token_id
    for ids, stop_ids in (([seven, end], ()), ([seven, seven], (seven,))):
        reader = TextReader(0, tokenizer, Ending(stop_token_ids=frozenset(stop_ids)), [end])
        updates = [reader.feed(TokenEvent(None, one)) for one in ids[: 1 if stop_ids else 2]]  # type: ignore[arg-type]
        entries = [(entry.token_id, entry.silent) for update in updates for entry in update.entries]
        assert entries == ([(seven, True)] if stop_ids else [(seven, False), (end, True)])


def test_min_tokens_holds_stop_strings_back() -> None:
    tokenizer = pocket()[1].tokenizer
    (seven,) = tokenizer.encode("7")
    for reader in (
        ChatReader(0, tokenizer, "disabled", [], Ending(("7",), min_tokens=3), str),
        TextReader(0, tokenizer, Ending(("7",), min_tokens=3), [tokenizer.eos_token_id]),
    ):
        found, taken = read(reader, [seven] * 8)
        assert (found["content"], taken) == ("777", 4)


def test_ignored_ends_do_not_end_the_text() -> None:
    """With ignore_eos the answer goes on, and so must what is shown of it."""
    tokenizer = pocket()[1].tokenizer
    (seven,) = tokenizer.encode("7")
    ids = [seven, tokenizer.eos_token_id, seven]
    ignoring = Ending(ignored_ids=frozenset(tokenizer.eos_token_ids))
    assert read(ChatReader(0, tokenizer, "disabled", [], ignoring, str), ids)[0]["content"] == "77"
    assert read(ChatReader(0, tokenizer, "disabled", [], Ending(), str), ids)[0]["content"] == "7"


@pytest.mark.parametrize("most", [1, 2])
def test_a_limit_of_calls_ends_the_answer_at_the_next(most: int) -> None:
    tokenizer = pocket()[1].tokenizer
    ids = [*tokens(tokenizer, TWO_CALLS, []), tokenizer.eos_token_id]
    reader = ChatReader(0, tokenizer, "disabled", [WEATHER], Ending(max_calls=most), str)
    found, taken = read(reader, ids)
    assert len(found["calls"]) == len(reader.result.tool_calls) == most
    assert (taken < len(ids)) == (most == 1)
    assert found["reason"] == "tool_calls"
