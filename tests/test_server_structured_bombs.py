"""Schemas, expressions and grammars made to bring a server down: a clear 400, soon, and the next request is served."""

import json
import time
from typing import Any

import jsonschema
import pytest
import torch

from minim3.processing.tokenizer import Tokenizer
from minim3.server import structured
from minim3.server.errors import BadRequest
from tests.structured_answers import PADDING, SETTINGS, answer, guide_for, schema_format


def doubled(depth: int) -> Any:
    """2**depth strings in a few hundred bytes."""
    definitions: dict[str, Any] = {"d0": {"type": "string"}}
    for level in range(1, depth):
        half = {"$ref": f"#/$defs/d{level - 1}"}
        definitions[f"d{level}"] = {"type": "array", "prefixItems": [half, half], "minItems": 2}
    return {"$defs": definitions, "$ref": f"#/$defs/d{depth - 1}"}


def nested(depth: int) -> Any:
    schema: Any = {"type": "string"}
    for _ in range(depth):
        schema = {"items": schema}
    return schema


BOMBS: dict[str, Any] = {
    "deep schema": schema_format(nested(5000)),
    "schema just too deep": schema_format(nested(SETTINGS.max_schema_depth + 1)),
    "huge schema": schema_format({"enum": ["x" * 100] * 1000}),
    "many properties": schema_format({"properties": {f"p{i}": {"type": "string"} for i in range(20000)}}),
    "product of alternatives": schema_format(
        {"allOf": [{"anyOf": [{"properties": {f"p{i}{j}": {"type": "integer"}}} for j in range(4)]} for i in range(12)]}
    ),
    "reference to itself": schema_format({"$ref": "#"}),
    "references in a circle": schema_format(
        {"$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}, "$ref": "#/$defs/a"}
    ),
    "reference to a URL": schema_format({"$ref": "http://127.0.0.1:1/schema.json"}),
    "reference to a file": schema_format({"$ref": "file:///etc/passwd"}),
    "expensive number": schema_format({"type": "integer", "multipleOf": 982451653}),
    "nothing fits": schema_format({"type": "integer", "minimum": 5, "maximum": 3}),
    "false": schema_format(False),
    "unknown keyword": schema_format({"type": "array", "uniqueItems": True}),
    "own notion of JSON": schema_format({"type": "object", "x-guidance": {"item_separator": "evil"}}),
    "no schema": {"type": "json_schema", "json_schema": {"name": "x"}},
    "schema is a list": schema_format([]),
    "type is a list": {"type": ["json_schema"]},
    "unknown type": {"type": "yaml"},
    "deep regex": {"type": "regex", "regex": "(" * 20000 + "a" + ")" * 20000},
    "huge regex": {"type": "regex", "regex": "a|" * 40000},
    "broken regex": {"type": "regex", "regex": "[^"},
    "look-ahead": {"type": "regex", "regex": "a(?=b)"},
    "regex is a number": {"type": "regex", "regex": 5},
    "deep grammar": {"type": "grammar", "grammar": "start: " + "(" * 20000 + '"a"' + ")" * 20000},
    "deep grammar in GBNF": {"type": "grammar", "grammar": "root ::= " + "(" * 20000 + '"a"' + ")" * 20000},
    "doubling terminals": {
        "type": "grammar",
        "grammar": "start: A0\n" + "\n".join(f"A{i}: A{i + 1} A{i + 1}" for i in range(60)) + '\nA60: "a"',
    },
    "doubling rules": {
        "type": "grammar",
        "grammar": "start: r0\n" + "\n".join(f"r{i}: r{i + 1} r{i + 1}" for i in range(60)) + '\nr60: "a"',
    },
    "intersections": {
        "type": "grammar", "grammar": "start: A\nA: " + " & ".join(f"/(?s:.*){chr(97 + i)}(?s:.*)/" for i in range(20)),
    },
    "circular terminal": {"type": "grammar", "grammar": 'start: A\nA: "a" A | "b"'},
    "control tokens by name": {"type": "grammar", "grammar": "start: <mm:think>"},
    "a deep %json": {"type": "grammar", "grammar": "start: %json " + '{"items":' * 5000 + "{}" + "}" * 5000},
    "no grammar": {"type": "grammar", "grammar": "\x00\x01 not a grammar ::= ::="},
    "no choice": {"type": "choice", "choice": []},
    "many choices": {"type": "choice", "choice": ["x"] * 5000},
    "choices that are no texts": {"type": "choice", "choice": [1, None]},
}  # fmt: skip


@pytest.mark.parametrize("name", BOMBS)
def test_bombs_are_a_quick_and_clear_400(tokenizer: Tokenizer, name: str) -> None:
    """Each of these took a server down somewhere: stack, memory, time, a file, a network."""
    guide_for(tokenizer, {"type": "json_object"})
    start = time.process_time()
    with pytest.raises(BadRequest) as caught:
        guide_for(tokenizer, BOMBS[name])
    assert time.process_time() - start < 3, name
    assert caught.value.param
    assert caught.value.param.split(".")[0] == "response_format"
    assert 0 < len(caught.value.message) < 700
    assert "panick" not in caught.value.message
    jsonschema.validate(
        json.loads(tokenizer.decode(answer(tokenizer, guide_for(tokenizer, {"type": "json_object"})))), {}
    )


SLOW_STEPS: dict[str, Any] = {
    "exponential automaton": {"type": "regex", "regex": "(.|\\n)*a(.|\\n){30}c"},
    "unicode repeats": {"type": "regex", "regex": r"(\p{L}{1,100}\w{1,100}){50}"},
    "repeated repeats": {"type": "regex", "regex": "((a{1,1000}){1,1000}){1,1000}"},
    "ambiguous": {"type": "grammar", "grammar": 'start: start start | start start start | "a" | "b"'},
    "negations": {"type": "grammar", "grammar": "start: A\nA: ~(~(~/(a|b)*a(a|b){14}/))"},
    "many strings": schema_format(doubled(28)),
    "long list": schema_format({"type": "array", "minItems": 1000000, "items": {"type": "string"}}),
    "wide rule": {"type": "grammar", "grammar": "start: " + " | ".join(f'"{i}"' for i in range(6000))},
    "dead end": {"type": "grammar", "grammar": 'start: /[a-z]{9}/ <mm:think> "b"'},
}


@pytest.mark.parametrize("name", SLOW_STEPS)
def test_what_is_slow_to_follow_ends_with_an_error_not_with_a_stall(tokenizer: Tokenizer, name: str) -> None:
    """A step of the engine serves every request: one grammar may not hold it up, and a half answer must not pass."""
    try:
        guide = guide_for(tokenizer, SLOW_STEPS[name])
    except BadRequest:
        return
    generator = torch.Generator().manual_seed(1)
    slowest = 0.0
    for _ in range(150):
        logits = torch.randn(tokenizer.vocab_size + PADDING, generator=generator)
        start = time.thread_time()
        guide.allow(logits)
        slowest = max(slowest, time.thread_time() - start)
        assert logits.isfinite().any()
        guide.accept(int(logits.argmax()))
        if guide.finished:
            break
    assert slowest < 0.5, f"{slowest:.2f} s for one token"
    if name == "dead end":
        with pytest.raises(BadRequest, match="could not be kept inside its grammar"):
            structured.check_guide(guide)
