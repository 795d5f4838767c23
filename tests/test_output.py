"""Ids to text, reasoning and tool calls: cut anywhere, the stream gives what the whole gives."""

import json
import time
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minim3.processing.chat import encode_segments, render
from minim3.processing.detokenizer import IncrementalDetokenizer, StopStrings
from minim3.processing.output import OutputParser, ParsedOutput, parse_output
from minim3.processing.tokenizer import Tokenizer

NS = "]<]minimax[>["
CALL = (
    f'{NS}<tool_call>\n{NS}<invoke name="f">{NS}<n>3{NS}</n>{NS}<s>3{NS}</s>{NS}<o>{NS}<k>{NS}<item>1{NS}</item>'
    f"{NS}<item>2{NS}</item>{NS}</k>{NS}</o>{NS}</invoke>\n{NS}</tool_call>"
)
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "f",
            "parameters": {
                "type": "object",
                "properties": {
                    "n": {"type": "integer"},
                    "s": {"type": "string"},
                    "o": {
                        "type": "object",
                        "properties": {"k": {"type": "array", "items": {"type": "number"}}},
                    },
                },
            },
        },
    }
]
PIECES = [
    "<mm:think>",
    "</mm:think>",
    NS,
    f"{NS}<tool_call>\n",
    f'{NS}<invoke name="f">',
    f'{NS}<invoke name="g">',
    f"{NS}<n>",
    f"{NS}</n>",
    f"{NS}<o>",
    f"{NS}</o>",
    f"{NS}</invoke>\n",
    f"{NS}</tool_call>",
    CALL,
    "<tool_call>",
    "<",
    ">",
    " ",
    "\n\n",
    "text",
    "3",
    "é",
    "€",
    "😀",
    "]~b]",
    "]<]mini",
    "[e~",
]
answers = st.lists(st.sampled_from(PIECES), max_size=14).map("".join)
modes = st.sampled_from(["enabled", "disabled", "adaptive"])


class Collector:
    """Puts deltas together and checks that they follow the order a client relies on."""

    def __init__(self) -> None:
        self.reasoning, self.content = "", ""
        self.names: list[str] = []
        self.arguments: list[str] = []

    def add(self, delta: Any) -> None:
        self.reasoning += delta.reasoning
        self.content += delta.content
        for call in delta.tool_calls:
            if call.name is not None:
                assert call.index == len(self.names)
                assert call.id is not None
                self.names.append(call.name)
                self.arguments.append("")
            assert call.index == len(self.names) - 1
            self.arguments[call.index] += call.arguments

    def check(self, result: ParsedOutput) -> None:
        assert self.reasoning == (result.reasoning or "")
        assert self.content == result.content
        assert self.names == [call.name for call in result.tool_calls]
        assert [json.loads(text) for text in self.arguments] == [call.arguments for call in result.tool_calls]


def parse(tokenizer: Tokenizer, text: str, mode: str | None = None, tools: Any = None, **kwargs: Any) -> ParsedOutput:
    return parse_output(tokenizer.encode(text, allow_special=True), tokenizer, mode, tools, **kwargs)


# --- detokenizing ----------------------------------------------------------------------------------------------------


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_incremental_text_equals_one_shot_for_any_ids_and_cuts(tokenizer: Tokenizer, data: st.DataObject) -> None:
    """Any ids at all, broken UTF-8 and ids beyond the vocabulary included."""
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size + 5), max_size=60))
    skip = data.draw(st.booleans())
    detokenizer = IncrementalDetokenizer(tokenizer, skip_special_tokens=skip)
    text = "".join(detokenizer.feed(token_id) for token_id in ids) + detokenizer.finish()
    assert text == tokenizer.decode(ids, skip_special_tokens=skip)
    assert text == tokenizer._full.decode(ids, skip_special_tokens=skip)


def test_no_half_characters_are_shown(tokenizer: Tokenizer) -> None:
    detokenizer = IncrementalDetokenizer(tokenizer)
    shown = [detokenizer.feed(token_id) for token_id in tokenizer.encode("a😀b")]
    assert "".join(shown) == "a😀b"
    assert not any("\ufffd" in piece for piece in shown)
    detokenizer.feed(tokenizer.encode("😀")[:2])
    assert detokenizer.finish() == "\ufffd"


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_stop_strings_do_not_depend_on_cuts(data: st.DataObject) -> None:
    text = data.draw(st.text("ab", max_size=20))
    stops = data.draw(st.lists(st.text("ab", min_size=1, max_size=4), max_size=4))
    whole = StopStrings(stops)
    expected = whole.feed(text)
    expected += whole.finish()
    cuts = sorted(data.draw(st.sets(st.integers(0, len(text)), max_size=6)))
    stream = StopStrings(stops)
    got = "".join(stream.feed(text[a:b]) for a, b in zip([0, *cuts], [*cuts, len(text)]))
    assert got + stream.finish() == expected
    assert stream.stopped_by == whole.stopped_by
    # By definition: the shortest beginning of the text that ends with a stop string.
    ends = [end for end in range(len(text) + 1) if any(text[:end].endswith(stop) for stop in stops)]
    if not ends:
        assert expected == text
        assert whole.stopped_by is None
    else:
        longest = max((stop for stop in stops if text[: ends[0]].endswith(stop)), key=len)
        assert (expected, whole.stopped_by) == (text[: ends[0] - len(longest)], longest)


def test_stop_string_across_token_borders_is_never_shown() -> None:
    stream = StopStrings(["END"])
    assert [stream.feed(piece) for piece in ("one E", "N", "X E", "ND tail")] == ["one ", "", "ENX ", ""]
    assert (StopStrings(["abcd", "bc"]).feed("xabcd"), StopStrings(["bc", "abc"]).feed("xabc")) == ("xa", "x")
    with pytest.raises(ValueError, match="non-empty"):
        StopStrings([""])


# --- reasoning (pitfalls 11-14) --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mode", "text", "reasoning", "content"),
    [
        ("enabled", "hm</mm:think>yes", "hm", "yes"),
        ("enabled", "<mm:think>hm</mm:think>yes", "hm", "yes"),
        ("enabled", "hm", "hm", ""),
        ("enabled", "</mm:think>yes", None, "yes"),
        ("disabled", "yes", None, "yes"),
        ("disabled", "\n yes\n", None, "\n yes\n"),
        ("adaptive", "<mm:think>hm</mm:think>yes", "hm", "yes"),
        ("adaptive", "\n<mm:think>hm</mm:think>yes", "hm", "yes"),
        ("adaptive", "</mm:think>yes", None, "yes"),
        ("adaptive", "yes", None, "yes"),
        (None, "yes[e~[\n]~b]user\nmore", None, "yes"),
    ],
)
def test_thinking_mode_decides_where_an_answer_starts(
    tokenizer: Tokenizer, mode: str, text: str, reasoning: str | None, content: str
) -> None:
    parsed = parse(tokenizer, text, mode)
    assert (parsed.reasoning, parsed.content) == (reasoning, content)


def test_pitfall_11_markers_of_the_prompt_do_not_matter(tokenizer: Tokenizer) -> None:
    """The prompt explains thinking and holds every marker; the state comes from the generation prompt alone."""
    messages = [
        {"role": "user", "content": "why <mm:think> and no end?"},
        {"role": "assistant", "reasoning_content": "x", "content": "y"},
        {"role": "user", "content": "go on"},
    ]
    for mode, reasoning, content in (("disabled", None, "a"), ("enabled", "a", "")):
        encode_segments(tokenizer, render(messages, TOOLS, mode))
        parsed = parse(tokenizer, "a", mode)
        assert (parsed.reasoning, parsed.content) == (reasoning, content)


@pytest.mark.parametrize("text", ["</mm:think>a b", "a</mm:think> b", "a b</mm:think>", "</mm:think></mm:think>a b"])
def test_pitfall_12_stray_end_of_thinking_is_left_out(tokenizer: Tokenizer, text: str) -> None:
    parsed = parse(tokenizer, text, "disabled")
    assert (parsed.reasoning, parsed.content) == (None, "a b")


@pytest.mark.parametrize("marker", ["<mm:think>", "</mm:think>", NS, f"{NS}<tool_call>", CALL, "[e~["])
def test_pitfall_14_literal_markers_stay_content(tokenizer: Tokenizer, marker: str) -> None:
    """A model that explains the format spells its markers in ordinary tokens."""
    text = f"write {marker} like this"
    parsed = parse_output(tokenizer.encode(text), tokenizer, "disabled", TOOLS)
    assert parsed == ParsedOutput(None, text, (), "stop")
    parsed = parse_output(tokenizer.encode(text), tokenizer, "enabled", TOOLS)
    assert parsed == ParsedOutput(text, "", (), "stop")


def test_half_a_character_before_a_marker_is_not_completed_after_it(tokenizer: Tokenizer) -> None:
    first, *rest = tokenizer.encode("😀")
    end = tokenizer.encode("</mm:think>", allow_special=True)
    assert parse_output([first, *end, *rest], tokenizer, "enabled").reasoning == "\ufffd"


def test_stray_end_of_thinking_as_text() -> None:
    """Spelled out, it is the repeated end of the prompt at the start and somebody's text later."""
    parser = OutputParser(None, "disabled")
    assert parser.feed_text("</mm:think>a </mm:think> b").content == "a </mm:think> b"


def test_markers_are_found_as_text_where_the_tokenizer_has_none() -> None:
    parser = OutputParser(None, "enabled", TOOLS)
    collector = Collector()
    for character in f"hm</mm:think>see <mm:think> {NS} here {CALL}\n":
        collector.add(parser.feed_text(character))
    collector.add(parser.finish())
    result = parser.result()
    collector.check(result)
    assert (result.reasoning, result.content) == ("hm", f"see <mm:think> {NS} here")
    assert result.tool_calls[0].arguments == {"n": 3, "s": "3", "o": {"k": [1, 2]}}


# --- pitfalls 13 and 15 ----------------------------------------------------------------------------------------------


@settings(max_examples=250, deadline=None)
@given(text=answers, mode=modes, data=st.data())
def test_pitfall_13_15_every_cut_of_the_ids_equals_one_shot(
    tokenizer: Tokenizer, text: str, mode: str, data: st.DataObject
) -> None:
    """Control tokens and spelled-out markers mixed, cut anywhere, ended anywhere."""
    ids: list[int] = []
    for piece in text.split("\n\n"):
        ids += tokenizer.encode(piece, allow_special=data.draw(st.booleans()))
    ids = ids[: data.draw(st.integers(0, len(ids)))]
    expected = parse_output(ids, tokenizer, mode, TOOLS)
    step = data.draw(st.integers(1, 5))
    parser, collector = OutputParser(tokenizer, mode, TOOLS), Collector()
    for start in range(0, len(ids), step):
        collector.add(parser.feed(ids[start : start + step]))
    collector.add(parser.finish())
    assert parser.result() == expected
    collector.check(expected)


@settings(max_examples=250, deadline=None)
@given(text=answers, mode=modes, data=st.data())
def test_pitfall_13_15_every_cut_of_the_text_equals_one_shot(text: str, mode: str, data: st.DataObject) -> None:
    whole = OutputParser(None, mode, TOOLS)
    whole.feed_text(text)
    whole.finish()
    cuts = sorted(data.draw(st.sets(st.integers(0, len(text)), max_size=10)))
    parser, collector = OutputParser(None, mode, TOOLS), Collector()
    for start, end in zip([0, *cuts], [*cuts, len(text)]):
        collector.add(parser.feed_text(text[start:end]))
    collector.add(parser.finish())
    assert parser.result() == whole.result()
    collector.check(whole.result())


def test_pitfall_15_a_call_cut_at_every_token_ends_cleanly(tokenizer: Tokenizer) -> None:
    # The tags in ordinary tokens, as in a tokenizer that has only the namespace marker.
    namespace = tokenizer.encode(NS, allow_special=True)
    first, *pieces = f"ok {CALL}".split(NS)
    ids = tokenizer.encode(first)
    for piece in pieces:
        ids += namespace + tokenizer.encode(piece)
    full = {"n": 3, "s": "3", "o": {"k": [1, 2]}}
    for end in range(len(ids) + 1):
        parsed = parse_output(ids[:end], tokenizer, "disabled", TOOLS, finish_reason="length")
        assert parsed.content.strip() in ("", "o", "ok")
        assert NS not in parsed.content
        assert parsed.finish_reason == "length"
        for call in parsed.tool_calls:
            # Whole arguments or none: half a file name must not be acted on.
            assert list(call.arguments.items()) == list(full.items())[: len(call.arguments)]
            assert call.complete or end < len(ids)
    assert parsed.tool_calls[0].complete
    assert parsed.tool_calls[0].arguments == full


def test_text_before_and_after_calls(tokenizer: Tokenizer) -> None:
    parsed = parse(tokenizer, f"let me look\n\n{CALL}\n{CALL}\n done ", "disabled", TOOLS)
    assert parsed.content == "let me look\n done "
    assert [call.id for call in parsed.tool_calls] == ["call_0", "call_1"]
    assert parsed.finish_reason == "tool_calls"


def test_a_call_out_of_thinking_ends_the_thinking(tokenizer: Tokenizer) -> None:
    parsed = parse(tokenizer, f"I must call{CALL}", "enabled", TOOLS)
    assert (parsed.reasoning, parsed.content, len(parsed.tool_calls)) == ("I must call", "", 1)


def test_forgotten_end_tags_are_repaired(tokenizer: Tokenizer) -> None:
    text = f'{NS}<tool_call>{NS}<invoke name="f">{NS}<o>{NS}<k>{NS}<item>1{NS}</o>{NS}<n>2{NS}</n>{NS}</tool_call>'
    parsed = parse(tokenizer, text, "disabled", TOOLS)
    assert parsed.tool_calls[0].arguments == {"o": {"k": [1]}, "n": 2}
    assert parsed.tool_calls[0].complete


# --- argument types --------------------------------------------------------------------------------------------------


def test_elements_of_a_list_may_have_any_name(tokenizer: Tokenizer) -> None:
    tools = [{"name": "f", "parameters": {"properties": {"xs": {"type": "array"}, "o": {"type": "object"}}}}]
    names = (("xs", "x"), ("o", "item"), ("y", "item"))
    elements = [f"{NS}<{name}>{NS}<{one}>1{NS}</{one}>{NS}</{name}>" for name, one in names]
    text = f'{NS}<tool_call>{NS}<invoke name="f">{"".join(elements)}{NS}</invoke>{NS}</tool_call>'
    assert parse(tokenizer, text, "disabled", tools).tool_calls[0].arguments == {
        "xs": ["1"],
        "o": {"item": "1"},
        "y": ["1"],
    }


@pytest.mark.parametrize(
    ("schema", "text", "value"),
    [
        ({"type": "string"}, "3", "3"),
        ({"type": "integer"}, "3", 3),
        ({"type": "integer"}, "3.0", 3),
        ({"type": "integer"}, "three", "three"),
        ({"type": "number"}, "-2.5e1", -25.0),
        ({"type": "number"}, "1e999", "1e999"),
        ({"type": "number"}, "NaN", "NaN"),
        ({"type": "boolean"}, "true", True),
        ({"type": "boolean"}, "False", False),
        ({"type": ["integer", "null"]}, "null", None),
        ({"type": ["string", "null"]}, "null", None),
        ({"type": "string"}, "null", "null"),
        ({"type": "object"}, '{"a": [1]}', {"a": [1]}),
        ({"type": "object"}, "", {}),
        ({"type": "array"}, "", []),
        ({"type": "array"}, "[1, 2]", [1, 2]),
        ({"type": "array"}, "[1, 2", "[1, 2"),
        ({"type": "array"}, '["\\ud800"]', '["\\ud800"]'),
        ({"enum": [1, "a"]}, "1", 1),
        ({"anyOf": [{"type": "integer"}, {"type": "null"}]}, "4", 4),
        ({"$ref": "#/$defs/Count"}, "5", 5),
        ({}, "3", "3"),
    ],
)
def test_arguments_take_the_types_of_the_schema(tokenizer: Tokenizer, schema: Any, text: str, value: Any) -> None:
    parameters = {"type": "object", "properties": {"x": schema}, "$defs": {"Count": {"type": "integer"}}}
    tools = [{"type": "function", "function": {"name": "f", "parameters": parameters}}]
    ids = tokenizer.encode(f'{NS}<tool_call>{NS}<invoke name="f">{NS}<x>', allow_special=True)
    ids += tokenizer.encode(text) + tokenizer.encode(f"{NS}</x>{NS}</invoke>{NS}</tool_call>", allow_special=True)
    (call,) = parse_output(ids, tokenizer, "disabled", tools).tool_calls
    assert call.arguments == {"x": value}
    assert type(call.arguments["x"]) is type(value)


def element(name: str, *inside: str) -> str:
    return f"{NS}<{name}>{''.join(inside)}{NS}</{name}>"


@pytest.mark.parametrize(
    ("schema", "elements", "value"),
    [
        ({}, [element("t", "a"), element("t", "b")], ["a", "b"]),
        ({"type": "array", "items": {"type": "integer"}}, [element("t", "1"), element("t", "[2, 3]")], [1, 2, 3]),
        ({"type": "array", "items": {"type": "integer"}}, [element("t", element("x", "1"), element("x", "2"))], [1, 2]),
        ({"items": {"type": "integer"}}, [element("t", "[1, 2]")], [1, 2]),
        (
            {"items": {"items": {"type": "integer"}}},
            [element("t", "[1, 2]"), element("t", "[3]")],
            [[1, 2], [3]],
        ),
        (
            {"type": "array", "items": {"properties": {"stars": {"type": "integer"}}}},
            [element("t", element("comment", element("stars", "3")))],
            [{"stars": 3}],
        ),
        ({"properties": {"item": {"type": "string"}}}, [element("t", element("item", "x"))], {"item": "x"}),
        ({}, [element("t", element("k", "a"), element("k", "b"), element("l", "c"))], {"k": ["a", "b"], "l": "c"}),
        (
            {"properties": {"k": {"type": "array", "items": {"type": "integer"}}}},
            [element("t", element("k", element("item", "1")), element("k", element("item", "2")))],
            {"k": [1, 2]},
        ),
        ({}, [element("t", "so: ", element("k", "a"))], {"k": "a", "$text": "so:"}),
        ({"type": "object"}, [f"{NS}<t/>"], {}),
        ({"type": "integer"}, [element("t", "018956")], 18956),
        ({"type": ["integer", "string"]}, [element("t", "018956")], "018956"),
        ({"type": "number"}, [element("t", "+.5")], 0.5),
        ({"type": "number"}, [element("t", ".")], "."),
    ],
)
def test_elements_become_what_they_say(
    tokenizer: Tokenizer, schema: dict[str, Any], elements: list[str], value: Any
) -> None:
    """Repeated elements were dropped but for the last, entries of a list kept as text unless they were named `item`."""
    tools = [{"name": "f", "parameters": {"properties": {"t": schema, "n": {"type": "integer"}}}}]
    inside = "".join(elements) + element("n", "3")
    text = f'{NS}<tool_call>{NS}<invoke name="f">{inside}{NS}</invoke>{NS}</tool_call>'
    (call,) = parse(tokenizer, text, "disabled", tools).tool_calls
    assert call.arguments == {"t": value, "n": 3}
    assert type(call.arguments["t"]) is type(value)
    parser, streamed = OutputParser(None, "disabled", tools), ""
    for character in text:
        streamed += "".join(delta.arguments for delta in parser.feed_text(character).tool_calls)
    assert json.loads(streamed + "".join(d.arguments for d in parser.finish().tool_calls)) == call.arguments


def test_an_empty_call_is_closed_by_itself(tokenizer: Tokenizer) -> None:
    """It was taken for an argument of the call before."""
    inside = f'{NS}<invoke name="f">{element("n", "3")}{NS}<invoke name="g"/>{NS}<invoke name="h">{NS}</invoke>'
    parsed = parse(tokenizer, f"{NS}<tool_call>{inside}{NS}</tool_call>", "disabled", TOOLS)
    assert [(call.name, call.arguments, call.complete) for call in parsed.tool_calls] == [
        ("f", {"n": 3}, True), ("g", {}, True), ("h", {}, True),
    ]  # fmt: skip


def test_without_tools_arguments_are_text(tokenizer: Tokenizer) -> None:
    (call,) = parse(tokenizer, CALL, "disabled").tool_calls
    assert call.arguments == {"n": "3", "s": "3", "o": {"k": ["1", "2"]}}


def schema_of(value: Any) -> dict[str, Any]:
    if isinstance(value, dict):
        return {"type": "object", "properties": {key: schema_of(item) for key, item in value.items()}}
    if isinstance(value, list):
        return {"type": "array", "items": schema_of(value[0]) if value else {}}
    names = {bool: "boolean", int: "integer", float: "number", str: "string"}
    return {"type": names[type(value)]}


names = st.sampled_from(["n", "item", "invoke", "tool_call", "a b", "mm:think", "x-1", "é"])
scalars = (
    st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.sampled_from([*PIECES, "", "null", "3"])
    | st.text(max_size=8)
)
values = st.recursive(
    scalars, lambda inner: st.dictionaries(names, inner, max_size=3) | inner.map(lambda one: [one, one]), max_leaves=6
)


@settings(max_examples=200, deadline=None)
@given(arguments=st.dictionaries(names, values, max_size=4), thought=st.sampled_from([None, "hm", CALL]))
def test_what_is_rendered_is_parsed_back(tokenizer: Tokenizer, arguments: dict[str, Any], thought: str | None) -> None:
    """Rendering and parsing are inverse for any arguments and texts, those full of markers included."""
    tools = [{"type": "function", "function": {"name": "f", "parameters": schema_of(arguments)}}]
    calls = [{"id": "call_0", "function": {"name": "f", "arguments": arguments}}]
    answer = {"role": "assistant", "content": f"see {CALL}", "reasoning_content": thought, "tool_calls": calls}
    segments = render([{"role": "user", "content": "go"}, answer], tools, add_generation_prompt=False)
    ids, mask = encode_segments(tokenizer, segments)
    parsed = parse_output([one for one, target in zip(ids, mask) if target], tokenizer, "adaptive", tools)
    assert (parsed.reasoning, parsed.content) == (thought, f"see {CALL}")
    assert parsed.tool_calls[0].arguments == arguments
    assert parsed.finish_reason == "tool_calls"


@pytest.mark.parametrize(
    "parameters",
    [
        {"type": 5, "anyOf": 7, "enum": "x", "properties": {"a": {"type": [{}, 3], "oneOf": {}, "enum": 1}}},
        {"properties": {"a": {"anyOf": [{"$ref": "#/properties/a"}] * 3000}}},
        {"properties": {"a": {"$ref": "#/properties/b"}, "b": {"$ref": "#/properties/a"}}},
    ],
)
def test_schemas_of_strangers_neither_fail_nor_take_long(tokenizer: Tokenizer, parameters: dict[str, Any]) -> None:
    """A malformed schema raised TypeError in the middle of an answer; branches that refer to themselves multiplied."""
    tools = [{"type": "function", "function": {"name": "f", "parameters": parameters}}]
    text = f'{NS}<tool_call>{NS}<invoke name="f">{NS}<a>1{NS}</a>{NS}</invoke>'
    start = time.process_time()
    parsed = parse_output(tokenizer.encode(text, allow_special=True), tokenizer, "disabled", tools)
    assert parsed.tool_calls[0].arguments == {"a": "1"}
    assert time.process_time() - start < 0.5
