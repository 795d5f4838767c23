"""Structured output: whatever the model's logits, an answer under a guide is what was asked for."""

import json
import re
from typing import Any

import jsonschema
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from minim3.processing.output import OutputParser, parse_output
from minim3.processing.processor import MiniMaxM3VLProcessor
from minim3.processing.tokenizer import Tokenizer
from minim3.server import structured
from minim3.server.errors import BadRequest
from tests.structured_answers import END_THINK, SETTINGS, THINK, allowed, answer, follow, guide_for, schema_format

QUICK = settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])

# --- schemas ----------------------------------------------------------------------------------------------------------

_NAMES = st.sampled_from(["a", "b", "long name", "naïve", "$x", "city", 'quote"d', "🙂", "back\\slash"])
_LEAVES = st.one_of(
    st.sampled_from(
        [
            {"type": "string"},
            {"type": "integer"},
            {"type": "number"},
            {"type": "boolean"},
            {"type": "null"},
            {"type": ["string", "null"]},
            {"type": "string", "pattern": "^[a-z]{2,5}$"},
            {"type": "string", "minLength": 2, "maxLength": 6},
            {"type": "string", "format": "date"},
            {"const": "two words"},
            {},
        ]
    ),
    st.builds(
        lambda low, size: {"type": "integer", "minimum": low, "maximum": low + size},
        st.integers(-99, 99),
        st.integers(0, 50),
    ),
    st.lists(st.one_of(st.text(max_size=4), st.integers(-5, 5), st.booleans(), st.none()), min_size=1, max_size=4).map(
        lambda values: {"enum": values}
    ),
)


def _objects(children: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    def build(properties: dict[str, Any], required: set[str], extra: bool) -> dict[str, Any]:
        return {
            "type": "object",
            "properties": properties,
            "required": sorted(required & set(properties)),
            "additionalProperties": extra,
        }

    objects = st.builds(build, st.dictionaries(_NAMES, children, max_size=3), st.sets(_NAMES), st.booleans())
    arrays = st.builds(
        lambda items, low, size: {"type": "array", "items": items, "minItems": low, "maxItems": low + size},
        children, st.integers(0, 2), st.integers(0, 2),
    )  # fmt: skip
    return st.one_of(objects, arrays, st.lists(children, min_size=1, max_size=3).map(lambda some: {"anyOf": some}))


SCHEMAS = st.recursive(_LEAVES, _objects, max_leaves=6)


@QUICK
@given(schema=SCHEMAS, seed=st.integers(0, 2**31))
def test_any_answer_of_any_model_is_valid_for_a_random_schema(tokenizer: Tokenizer, schema: Any, seed: int) -> None:
    """The promise of strict: true. Byte-level tokens cut characters in the middle, control tokens are one id away."""
    ids = answer(tokenizer, guide_for(tokenizer, schema_format(schema)), seed)
    text = tokenizer.decode(ids)
    assert "\ufffd" not in text or b"\xef\xbf\xbd" in b"".join(map(tokenizer.token_bytes, ids))
    jsonschema.validate(json.loads(text), schema)
    parsed = parse_output(ids, tokenizer, "disabled")
    assert parsed.content == text.rstrip()
    assert parsed.reasoning is None
    assert not parsed.tool_calls


def test_a_recursive_schema_works(tokenizer: Tokenizer) -> None:
    schema = {
        "$defs": {
            "node": {
                "type": "object",
                "properties": {"next": {"anyOf": [{"$ref": "#/$defs/node"}, {"type": "null"}]}},
                "required": ["next"],
                "additionalProperties": False,
            }
        },
        "$ref": "#/$defs/node",
    }  # fmt: skip
    jsonschema.validate(
        json.loads(tokenizer.decode(answer(tokenizer, guide_for(tokenizer, schema_format(schema))))), schema
    )


def test_json_has_no_room_for_endless_blanks(tokenizer: Tokenizer) -> None:
    """A model that is lost writes blanks wherever it may, until its limit."""
    guide = guide_for(tokenizer, schema_format({"type": "object", "properties": {"a": {"type": "integer"}}}))
    follow(guide, tokenizer, tokenizer.encode('{"a": '))
    assert not any(tokenizer.token_bytes(one)[:1].isspace() for one in allowed(guide, tokenizer))


def test_json_object_is_an_object(tokenizer: Tokenizer) -> None:
    for seed in range(5):
        value = json.loads(tokenizer.decode(answer(tokenizer, guide_for(tokenizer, {"type": "json_object"}), seed)))
        assert isinstance(value, dict)


@pytest.mark.parametrize(
    "regex", [r"[A-Z]{3}-\d+", "^(yes|no)$", r"a/b\\c\"?", "🙂{2}é*", r"[a-z]{1,9}@\w?\.(com|org)"]
)
def test_the_whole_answer_matches_a_regex(tokenizer: Tokenizer, regex: str) -> None:
    for seed in range(5):
        text = tokenizer.decode(
            answer(tokenizer, guide_for(tokenizer, {"type": "regex", "regex": regex}), seed, hurry_after=9)
        )
        assert re.fullmatch(regex.removeprefix("^").removesuffix("$"), text)


def test_choices_with_quotes_newlines_and_common_beginnings(tokenizer: Tokenizer) -> None:
    choices = ["yes", "yes, of course", 'say "hi"', "two\nlines", "é🙂", "back\\slash", "<mm:think>"]
    seen = {
        tokenizer.decode(answer(tokenizer, guide_for(tokenizer, {"type": "choice", "choice": choices}), seed))
        for seed in range(40)
    }
    assert seen <= set(choices)
    assert len(seen) > 3


@pytest.mark.parametrize(
    "grammar",
    [
        'start: "x" NUMBER ("," NUMBER)*\nNUMBER: /[0-9]{1,3}/',
        'root ::= "x" number ("," number)*\nnumber ::= [0-9]{1,3}',
    ],
)
def test_grammars_in_both_notations(tokenizer: Tokenizer, grammar: str) -> None:
    text = tokenizer.decode(answer(tokenizer, guide_for(tokenizer, {"type": "grammar", "grammar": grammar})))
    assert re.fullmatch(r"x\d{1,3}(,\d{1,3})*", text)


def test_eos_only_when_the_grammar_is_complete(tokenizer: Tokenizer) -> None:
    guide = guide_for(tokenizer, {"type": "regex", "regex": "ab?"})
    eos = tokenizer.eos_token_ids[0]
    assert eos not in allowed(guide, tokenizer)
    follow(guide, tokenizer, tokenizer.encode("a"))
    assert eos in allowed(guide, tokenizer)
    assert not guide.finished
    guide.accept(eos)
    assert guide.finished
    assert guide.error is None


def test_a_complete_answer_needs_no_further_token(tokenizer: Tokenizer) -> None:
    guide = guide_for(tokenizer, {"type": "choice", "choice": ["a"]})
    follow(guide, tokenizer, tokenizer.encode("a"))
    assert guide.finished


def test_a_grammar_of_any_tokens_gives_no_control_tokens(tokenizer: Tokenizer) -> None:
    """A picture's placeholder or the end of a turn, written by the model because a client's grammar said so."""
    guide = guide_for(tokenizer, {"type": "grammar", "grammar": "start: <[*]> <[*]>"})
    assert not allowed(guide, tokenizer) & tokenizer.special_ids


def test_ids_beyond_the_tokenizer_are_never_allowed(tokenizer: Tokenizer) -> None:
    """Embeddings are padded; an id without text would be an empty, endless answer."""
    for mode in ("disabled", "enabled", "adaptive"):
        guide = guide_for(tokenizer, {"type": "json_object"}, thinking_mode=mode)
        assert max(allowed(guide, tokenizer)) < tokenizer.vocab_size


# --- thinking ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["enabled", "disabled", "adaptive"])
def test_json_after_thinking(tokenizer: Tokenizer, mode: str) -> None:
    """The constraint must not touch the reasoning, nor begin before it ends."""
    added = tokenizer.added_tokens
    reasoned = 0
    for seed in range(12):
        guide = guide_for(tokenizer, {"type": "json_object"}, thinking_mode=mode)
        parsed = parse_output(answer(tokenizer, guide, seed), tokenizer, mode)
        assert isinstance(json.loads(parsed.content), dict)
        reasoned += parsed.reasoning is not None
    assert reasoned == {"enabled": 12, "disabled": 0}.get(mode, reasoned)
    guide = guide_for(tokenizer, {"type": "json_object"}, thinking_mode=mode)
    assert (added[THINK] in allowed(guide, tokenizer)) == (mode == "adaptive")


def test_reasoning_is_free_but_cannot_end_the_turn_or_call_a_tool(tokenizer: Tokenizer) -> None:
    """An answer that ends while thinking would be empty: not JSON."""
    guide = guide_for(tokenizer, {"type": "json_object"}, thinking_mode="enabled")
    free = allowed(guide, tokenizer)
    assert free == set(range(tokenizer.vocab_size)) - (set(tokenizer.special_ids) - {tokenizer.added_tokens[END_THINK]})
    follow(guide, tokenizer, [*tokenizer.encode("{not json, <b>"), tokenizer.added_tokens[END_THINK]])
    assert {tokenizer.token_bytes(one)[:1] for one in allowed(guide, tokenizer)} == {b"{"}


def test_adaptive_may_close_an_empty_thinking_block(tokenizer: Tokenizer) -> None:
    guide = guide_for(tokenizer, {"type": "choice", "choice": ["ok"]}, thinking_mode="adaptive")
    follow(guide, tokenizer, [tokenizer.added_tokens[END_THINK], *tokenizer.encode("ok")])
    assert guide.finished
    guide = guide_for(tokenizer, {"type": "choice", "choice": ["ok"]}, thinking_mode="adaptive")
    follow(guide, tokenizer, tokenizer.encode("o"))
    assert tokenizer.added_tokens[THINK] not in allowed(guide, tokenizer)


# --- forks ------------------------------------------------------------------------------------------------------------


@QUICK
@given(schema=SCHEMAS, seed=st.integers(0, 1000), places=st.lists(st.integers(0, 30), max_size=3))
def test_a_fork_leaves_no_trace(tokenizer: Tokenizer, schema: Any, seed: int, places: list[int]) -> None:
    """Speculation looks ahead on forks and throws them away: the answer must be the one without speculation."""
    plain = answer(tokenizer, guide_for(tokenizer, schema_format(schema), thinking_mode="adaptive"), seed)
    guide = guide_for(tokenizer, schema_format(schema), thinking_mode="adaptive")
    for place, token_id in enumerate(plain):
        if place in places:
            fork = guide.fork()
            assert allowed(fork, tokenizer) == allowed(guide, tokenizer)
            for _ in range(3):
                if fork.finished:
                    break
                fork.accept(max(allowed(fork, tokenizer)))
        follow(guide, tokenizer, [token_id])


def test_a_fork_goes_its_own_way(tokenizer: Tokenizer) -> None:
    guide = guide_for(tokenizer, {"type": "choice", "choice": ["ax", "by"]})
    fork = guide.fork()
    follow(fork, tokenizer, tokenizer.encode("b"))
    follow(guide, tokenizer, [*tokenizer.encode("a"), *tokenizer.encode("x")])
    assert guide.finished
    assert not fork.finished
    follow(fork, tokenizer, tokenizer.encode("y"))
    assert fork.finished


# --- tool calls -------------------------------------------------------------------------------------------------------


def tool(name: str, parameters: Any, **more: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "parameters": parameters, **more}}


WEATHER = tool(
    "get_weather",
    {
        "type": "object",
        "properties": {
            "city": {"type": "string"},
            "days": {"type": "integer", "minimum": 1, "maximum": 14},
            "unit": {"enum": ["C", "F"]},
            "where": {"$ref": "#/$defs/place"},
            "tags": {"type": "array", "items": {"type": "string"}, "maxItems": 3},
            "exact": {"type": "boolean"},
            "note": {"type": ["string", "null"]},
            "free": {"type": "object"},
        },
        "required": ["city", "where", "exact"],
        "$defs": {
            "place": {
                "type": "object",
                "properties": {
                    "lat": {"type": "number"},
                    "inner": {"anyOf": [{"$ref": "#/$defs/place"}, {"type": "null"}]},
                },
                "required": ["lat"],
            }
        },
    },
)
CLOCK = tool("clock", {"type": "object", "properties": {}})


def check_calls(tokenizer: Tokenizer, ids: list[int], tools: list[dict[str, Any]], mode: str = "disabled") -> list[str]:
    parsed = parse_output(ids, tokenizer, mode, tools)
    assert parsed.content == ""
    assert parsed.tool_calls
    assert parsed.finish_reason == "tool_calls"
    parameters = {one["function"]["name"]: one["function"]["parameters"] for one in tools}
    for call in parsed.tool_calls:
        jsonschema.validate(call.arguments, parameters[call.name])
    streamed = OutputParser(tokenizer, mode, tools)
    for token_id in ids:
        streamed.feed(token_id)
    streamed.finish()
    assert streamed.result("stop").tool_calls == parsed.tool_calls
    return [call.name for call in parsed.tool_calls]


def writable(schema: Any) -> bool:
    """Whether the format of calls can say it: no quote in a name, no form of a text, which only JSON enforces, and no
    alternatives, which may be written alike (a text "42" and a number)."""
    if isinstance(schema, dict):
        return not {'quote"d', "pattern", "format", "anyOf"} & set(schema) and all(map(writable, schema.values()))
    return all(map(writable, schema)) if isinstance(schema, list) else schema != 'quote"d'


@QUICK
@given(schema=SCHEMAS.filter(writable), seed=st.integers(0, 2**31))
def test_arguments_are_valid_for_random_schemas(tokenizer: Tokenizer, schema: Any, seed: int) -> None:
    """The format has no quotes and no brackets: what a value is, its schema must still be able to tell."""
    parameters = {"type": "object", "properties": {"value": schema}, "required": ["value"]}
    guide = guide_for(tokenizer, tools=[tool("f", parameters)], tool_choice="required", parallel=False)
    check_calls(tokenizer, answer(tokenizer, guide, seed), [tool("f", parameters)])


def test_an_empty_list_is_not_written_where_it_would_be_read_as_an_object(tokenizer: Tokenizer) -> None:
    branches = [
        {"type": "array", "items": {"type": "integer"}},
        {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]},
    ]
    parameters = {"type": "object", "properties": {"value": {"anyOf": branches}}, "required": ["value"]}
    for seed in range(20):
        guide = guide_for(tokenizer, tools=[tool("f", parameters)], tool_choice="required", parallel=False)
        check_calls(tokenizer, answer(tokenizer, guide, seed), [tool("f", parameters)])


@pytest.mark.parametrize("mode", ["enabled", "disabled", "adaptive"])
def test_required_is_always_a_call_with_valid_arguments(tokenizer: Tokenizer, mode: str) -> None:
    names = set()
    for seed in range(15):
        guide = guide_for(tokenizer, tools=[WEATHER, CLOCK], tool_choice="required", thinking_mode=mode)
        names |= set(check_calls(tokenizer, answer(tokenizer, guide, seed), [WEATHER, CLOCK], mode))
    assert names == {"get_weather", "clock"}


def test_a_named_function_is_the_one_called(tokenizer: Tokenizer) -> None:
    for seed in range(5):
        guide = guide_for(tokenizer, tools=[WEATHER, CLOCK], tool_choice="clock")
        assert set(check_calls(tokenizer, answer(tokenizer, guide, seed), [WEATHER, CLOCK])) == {"clock"}


def test_one_call_at_a_time_where_parallel_calls_are_off(tokenizer: Tokenizer) -> None:
    counts = set()
    for parallel in (True, False):
        for seed in range(10):
            guide = guide_for(tokenizer, tools=[CLOCK], tool_choice="required", parallel=parallel)
            ids = answer(tokenizer, guide, seed, hurry_after=10**9)
            counts.add((parallel, len(check_calls(tokenizer, ids, [CLOCK]))))
    assert max(count for parallel, count in counts if parallel) > 1
    assert {count for parallel, count in counts if not parallel} == {1}


def test_what_the_chat_format_writes_the_grammar_accepts(tokenizer: Tokenizer) -> None:
    """The model was trained on rendered calls: the grammar must not forbid them."""
    processor = MiniMaxM3VLProcessor(tokenizer=tokenizer)
    arguments = {
        "city": "Paris <b> & ]<]minimax[>[", "days": 3, "unit": "F", "where": {"lat": -3.25, "inner": {"lat": 0}},
        "tags": ["one", "two words"], "exact": True,
    }  # fmt: skip
    calls = [{"type": "function", "id": "1", "function": {"name": "get_weather", "arguments": json.dumps(arguments)}}]
    ids, mask = processor.encode_conversation(
        [{"role": "user", "content": "?"}, {"role": "assistant", "content": "", "tool_calls": calls}], [WEATHER]
    )
    written = [one for one, is_answer in zip(ids, mask) if is_answer]
    guide = guide_for(tokenizer, tools=[WEATHER], tool_choice="required", thinking_mode="adaptive")
    follow(guide, tokenizer, written[:-1])
    assert guide.finished or written[-1] in allowed(guide, tokenizer)
    assert dict(parse_output(written, tokenizer, "adaptive", [WEATHER]).tool_calls[0].arguments) == arguments


def test_json_or_a_call_where_both_are_possible(tokenizer: Tokenizer) -> None:
    kinds = set()
    for seed in range(30):
        guide = guide_for(tokenizer, {"type": "json_object"}, tools=[CLOCK], tool_choice="auto")
        parsed = parse_output(answer(tokenizer, guide, seed), tokenizer, "disabled", [CLOCK])
        kinds.add(bool(parsed.tool_calls))
        if not parsed.tool_calls:
            assert isinstance(json.loads(parsed.content), dict)
    assert kinds == {True, False}


def test_strict_tools_leave_text_free_and_make_calls_valid(tokenizer: Tokenizer) -> None:
    strict = tool("get_weather", WEATHER["function"]["parameters"], strict=True)
    guide = guide_for(tokenizer, tools=[strict], tool_choice="auto")
    follow(guide, tokenizer, tokenizer.encode("Let me look. "))
    assert tokenizer.eos_token_ids[0] in allowed(guide, tokenizer)
    follow(guide, tokenizer, [tokenizer.added_tokens["]<]minimax[>["]])
    parsed = parse_output(
        [*tokenizer.encode("x"), tokenizer.added_tokens["]<]minimax[>["], *answer(tokenizer, guide, 3)],
        tokenizer, "disabled", [strict],
    )  # fmt: skip
    jsonschema.validate(parsed.tool_calls[0].arguments, WEATHER["function"]["parameters"])


def test_nothing_binds_plain_requests(tokenizer: Tokenizer) -> None:
    processor = MiniMaxM3VLProcessor(tokenizer=tokenizer)
    for response_format in (None, {"type": "text"}):
        assert structured.make_guide(processor, 10**6, SETTINGS, response_format=response_format) is None
        assert structured.make_guide(processor, 10**6, SETTINGS, response_format=response_format, tools=[CLOCK]) is None


def test_an_argument_that_cannot_be_an_element_is_refused(tokenizer: Tokenizer) -> None:
    with pytest.raises(BadRequest, match="cannot be written"):
        guide_for(tokenizer, tools=[tool("f", {"properties": {"a<b": {}}})], tool_choice="required")


@pytest.mark.parametrize("grammar", ["answer ::= [0-9]", "root ::= answer", "::=", "start: (", ""])
def test_grammars_that_cannot_be_read_are_refused(tokenizer: Tokenizer, grammar: str) -> None:
    """One without a root rule was the server's fault: the library raises a plain Exception."""
    with pytest.raises(BadRequest):
        guide_for(tokenizer, {"type": "grammar", "grammar": grammar})


# --- odds and ends ----------------------------------------------------------------------------------------------------


def test_a_schema_that_needs_it_is_followed_as_far_as_possible_when_not_strict(tokenizer: Tokenizer) -> None:
    schema = {"type": "array", "items": {"type": "integer"}, "uniqueItems": True, "maxItems": 3}
    value = json.loads(tokenizer.decode(answer(tokenizer, guide_for(tokenizer, schema_format(schema, strict=False)))))
    assert isinstance(value, list)
    assert len(value) <= 3


def test_a_grammar_is_compiled_once_and_its_answers_are_apart(tokenizer: Tokenizer, monkeypatch: Any) -> None:
    first = guide_for(tokenizer, {"type": "choice", "choice": ["once", "only"]})
    monkeypatch.setattr(structured.Vocabulary, "compile", None)
    second = guide_for(tokenizer, {"type": "choice", "choice": ["once", "only"]})
    follow(first, tokenizer, tokenizer.encode("once"))
    follow(second, tokenizer, tokenizer.encode("only"))
    assert first.finished
    assert second.finished


# --- the extras of vLLM's clients -------------------------------------------------------------------------------------


def test_extras_become_a_response_format() -> None:
    fold = structured.fold_extras
    assert fold(None, {"guided_json": None}) is None
    assert fold({"type": "text"}, {}) == {"type": "text"}
    schema = {"type": "integer"}
    wanted = {"type": "json_schema", "json_schema": {"schema": schema}}
    assert fold(None, {"guided_json": schema}) == fold(None, {"guided_json": json.dumps(schema)}) == wanted
    assert fold({"type": "text"}, {"structured_outputs": {"json": schema, "regex": None}}) == wanted
    assert fold(None, {"guided_regex": "a+"}) == {"type": "regex", "regex": "a+"}
    assert fold(None, {"structured_outputs": {"choice": ["a"]}}) == {"type": "choice", "choice": ["a"]}
    options = {"json_object": True, "disable_any_whitespace": True, "disable_fallback": True}
    assert fold(None, {"structured_outputs": options}) == {"type": "json_object"}


@pytest.mark.parametrize(
    "extras",
    [
        {"guided_json": "{", "guided_regex": None},
        {"guided_json": "[" * 100000},
        {"guided_json": {}, "guided_regex": "a"},
        {"structured_outputs": {}},
        {"structured_outputs": []},
        {"structured_outputs": {"whitespace_pattern": "x"}},
        {"structured_outputs": {"regex": "a", "grammar": "b"}},
    ],
)
def test_contradictory_extras_are_refused(extras: dict[str, Any]) -> None:
    with pytest.raises(BadRequest):
        structured.fold_extras(None, extras)
