"""What an answer must look like: `response_format`, the extras of vLLM's clients, and forced tool calls, as guides.

    {"type": "json_object"}                                     any JSON object
    {"type": "json_schema", "json_schema": {"schema": ...}}     JSON of that schema (`strict`: every keyword of it)
    {"type": "regex", "regex": "..."}                           the whole answer matches
    {"type": "choice", "choice": ["yes", "no"]}                 one of these
    {"type": "grammar", "grammar": "..."}                       Lark (as llguidance reads it) or GBNF

A schema comes from a stranger: its size and nesting are checked before anything reads it, and what it may cost to
compile and to follow is bounded by llguidance's own limits (guides.py). Compiled grammars are kept by content.
"""

import json
import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import llguidance
from llguidance.gbnf_to_lark import any_to_lark

from minim3.processing.processor import MiniMaxM3VLProcessor
from minim3.processing.tokenizer import Tokenizer
from minim3.server.errors import BadRequest
from minim3.server.guides import Grammar, GrammarError, GrammarGuide, Vocabulary, lark_string
from minim3.server.settings import ServerSettings
from minim3.server.tool_grammar import call_grammar

# JSON on one line, with or without a space after its separators. Wherever blanks are free, a small model that is not
# sure what comes next writes blanks until its limit.
_JSON_OPTIONS: dict[str, Any] = {"whitespace_flexible": False, "item_separator": ", ?", "key_separator": ": ?"}
_KINDS = ("text", "json_object", "json_schema", "regex", "choice", "grammar")
_EXTRAS = {
    "json": "json_schema",
    "regex": "regex",
    "choice": "choice",
    "grammar": "grammar",
    "json_object": "json_object",
}
_AS_IT_IS = frozenset({"disable_any_whitespace", "disable_fallback"})  # options of vLLM that say what is so here
_MAX_CHOICES = 4096
_KEPT_GRAMMARS = 64


@dataclass(frozen=True, slots=True)
class Constraint:
    """A checked `response_format`. `text` is its content (JSON, a regular expression, a grammar). `strict`: a keyword
    that cannot be enforced is an error, otherwise it has no effect."""

    kind: str
    text: str
    strict: bool = True


def fold_extras(response_format: Mapping[str, Any] | None, extras: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """vLLM's fields (`structured_outputs`, `guided_json`, `guided_regex`, `guided_choice`, `guided_grammar`) as a
    `response_format`. Raises BadRequest for several at once, or an option that is not known."""
    found: list[tuple[str, dict[str, Any]]] = []
    if response_format is not None and response_format.get("type") != "text":
        found.append(("response_format", dict(response_format)))
    for field, value in extras.items():
        if value is None:
            continue
        if field == "structured_outputs":
            if not isinstance(value, Mapping):
                raise BadRequest(f"{field} must be an object with one of {', '.join(_EXTRAS)}", param=field)
            given = {name: one for name, one in value.items() if one not in (None, False) and name not in _AS_IT_IS}
            unknown = sorted(set(given) - set(_EXTRAS))
            if unknown or not given:
                what = f"has {unknown[0][:100]!r}" if unknown else "is empty"
                raise BadRequest(f"{field} {what}; known: {', '.join(_EXTRAS)}", param=field)
            found.extend((f"{field}.{name}", _extra_format(name, one)) for name, one in given.items())
        else:
            found.append((field, _extra_format(field.removeprefix("guided_"), value)))
    if len(found) > 1:
        raise BadRequest(
            f"{found[0][0]} and {found[1][0]} cannot both bind one answer; leave one out", param=found[1][0]
        )
    return found[0][1] if found else response_format


def _extra_format(name: str, value: Any) -> dict[str, Any]:
    kind = _EXTRAS[name]
    if kind == "json_schema":
        if isinstance(value, str):
            try:
                value = json.loads(value)
            except (ValueError, RecursionError) as error:
                raise BadRequest(f"the JSON schema is not valid JSON: {error}", param=f"guided_{name}") from None
        return {"type": kind, "json_schema": {"schema": value}}
    return {"type": kind} if kind == "json_object" else {"type": kind, kind: value}


def read_constraint(response_format: Mapping[str, Any] | None, settings: ServerSettings) -> Constraint | None:
    """Check a `response_format`; None where it asks for plain text.

    Raises:
        BadRequest: an unknown type, a missing or wrong content, or one larger or deeper than the settings allow.
    """
    if response_format is None:
        return None
    param = "response_format"
    kind = response_format.get("type")
    if kind not in _KINDS:
        raise BadRequest(f"type is {str(kind)[:100]!r}; known: {', '.join(_KINDS)}", param=f"{param}.type")
    if kind == "text":
        return None
    if kind == "json_object":
        return Constraint(kind, '{"type": "object"}')
    if kind == "json_schema":
        # /v1/responses writes name, schema and strict beside the type; chat puts them one level down.
        holder = response_format.get("json_schema", response_format)
        if not isinstance(holder, Mapping) or not isinstance(holder.get("schema"), Mapping | bool):
            raise BadRequest(
                'a JSON schema is expected: {"json_schema": {"schema": {...}}}', param=f"{param}.json_schema"
            )
        strict = holder.get("strict")
        if not isinstance(strict, bool | None):
            raise BadRequest(f"strict is {strict!r}; it is true or false", param=f"{param}.json_schema.strict")
        text = check_schema(holder["schema"], settings, f"{param}.json_schema.schema")
        return Constraint(kind, text, bool(strict))
    content = response_format.get(kind)
    if kind == "choice":
        if not isinstance(content, list) or not content or not all(isinstance(one, str) for one in content):
            raise BadRequest("choice must be a list of texts, at least one", param=f"{param}.choice")
        if len(content) > _MAX_CHOICES:
            raise BadRequest(
                f"{len(content)} choices are more than the limit of {_MAX_CHOICES}", param=f"{param}.choice"
            )
        content = json.dumps(content)
    elif not isinstance(content, str):
        raise BadRequest(f"{kind} must be a text, not {type(content).__name__}", param=f"{param}.{kind}")
    _check_size(len(content.encode()), kind, settings, f"{param}.{kind}")
    return Constraint(kind, content)


def check_schema(schema: Any, settings: ServerSettings, param: str) -> str:
    """The schema as JSON text. Raises BadRequest if it is larger, deeper or wider than the server takes."""
    level = [schema]
    for depth in range(settings.max_schema_depth + 2):
        level = [one for one in level if isinstance(one, Mapping | list)]
        if not level:
            break
        if depth > settings.max_schema_depth:
            raise BadRequest(
                f"the JSON schema is nested deeper than {settings.max_schema_depth} levels",
                param=param,
                code="schema_too_deep",
            )
        level = [child for one in level for child in (one.values() if isinstance(one, Mapping) else one)]
    if isinstance(schema, Mapping) and "x-guidance" in schema:
        raise BadRequest("x-guidance changes what JSON is and cannot be set by a request", param=param)
    text = json.dumps(schema, ensure_ascii=False)
    _check_size(len(text.encode()), "the JSON schema", settings, param)
    return text


def _check_size(size: int, what: str, settings: ServerSettings, param: str) -> None:
    if size > settings.max_schema_bytes:
        raise BadRequest(
            f"{what} has {size} bytes, more than the limit of {settings.max_schema_bytes}; make it smaller",
            param=param,
            code="schema_too_large",
        )


class StructuredOutput:
    """Makes guides for one tokenizer, keeping what it compiled. Methods may run in any thread."""

    def __init__(self, tokenizer: Tokenizer, settings: ServerSettings) -> None:
        self._tokenizer = tokenizer
        self._settings = settings
        self._vocabulary = Vocabulary(tokenizer)
        self._kept: OrderedDict[tuple[Any, ...], Grammar] = OrderedDict()
        self._lock = threading.Lock()

    def guide(
        self,
        constraint: Constraint | None,
        *,
        thinking_mode: str | None,
        tools: Sequence[Mapping[str, Any]] = (),
        tool_choice: str = "auto",
        parallel: bool = True,
    ) -> GrammarGuide | None:
        """The guide of an answer; None where nothing binds it.

        Args:
            constraint: what content must look like; beside `tools` with the choice "auto" the answer may be a call
                instead.
            thinking_mode: enabled, disabled or adaptive; the constraint begins after the thinking.
            tools: checked tools (`normalize_tools`).
            tool_choice: auto (binds only calls, and only if a tool is `strict`), none, required, or a function's name.
            parallel: whether there may be several calls.

        Raises:
            BadRequest: the schema or grammar is malformed, too large, too slow, or cannot be fulfilled.
        """
        key = (constraint, json.dumps(tools, sort_keys=False), tool_choice, parallel)
        with self._lock:
            grammar = self._kept.get(key)
            if grammar is not None:
                self._kept.move_to_end(key)
        if grammar is None:
            grammar = self._compile(constraint, tools, tool_choice, parallel)
            if grammar is None:
                return None
            with self._lock:
                self._kept[key] = grammar
                while len(self._kept) > _KEPT_GRAMMARS:
                    self._kept.popitem(last=False)
        try:
            return grammar.guide(thinking_mode)
        except ValueError as error:
            raise BadRequest(str(error), param="chat_template_kwargs.thinking_mode") from None

    def _compile(
        self, constraint: Constraint | None, tools: Sequence[Mapping[str, Any]], tool_choice: str, parallel: bool
    ) -> Grammar | None:
        parts: list[dict[str, Any]] = []
        control_ids: tuple[int, ...] = ()
        start: list[str] = []
        param = "tools" if constraint is None else "response_format"
        forced = tool_choice not in ("auto", "none")
        if constraint is not None and not forced:
            parts.append({"name": "answer", **_content_grammar(constraint)})
            start.append("@answer")
        calls = ""
        strict = any(tool["function"].get("strict") is True for tool in tools)
        if tools and tool_choice != "none" and (forced or constraint is not None or strict):
            for tool in tools:
                check_schema(tool["function"].get("parameters") or {}, self._settings, "tools")
            calls, control_ids = call_grammar(
                self._tokenizer, tools, name=tool_choice if forced and tool_choice != "required" else None,
                parallel=parallel,
            )  # fmt: skip
            _check_size(len(calls), "the grammar of the tools", self._settings, "tools")
            start += ["calls"] if constraint is not None or forced else ["FREE_TEXT", "FREE_TEXT calls"]
        if not start:
            return None
        lark = f"start: {' | '.join(start)}\nFREE_TEXT: /(?s:.)*/\n{calls}"
        try:
            if start == ["@answer"] and "lark_grammar" not in parts[0]:
                return self._vocabulary.compile(json.dumps({"grammars": [parts[0]]}))
            return self._vocabulary.compile(
                json.dumps({"grammars": [{"lark_grammar": lark}, *parts]}), control_ids=control_ids
            )
        except GrammarError as error:
            kind = "grammar of the tools" if constraint is None else constraint.kind
            raise BadRequest(f"the {kind} cannot be used: {error}", param=param, code="invalid_grammar") from None


def _content_grammar(constraint: Constraint) -> dict[str, Any]:
    """One of llguidance's grammars (an entry of its list), without name."""
    text = constraint.text
    if constraint.kind in ("json_object", "json_schema"):
        schema = json.loads(text)
        options = {**_JSON_OPTIONS, "lenient": not constraint.strict}
        if isinstance(schema, bool):  # nothing to hang options on
            schema = {"allOf": [schema]}
        return {"json_schema": {**schema, "x-guidance": options}}
    if constraint.kind == "regex":
        return {"lark_grammar": f"start: /{llguidance.regex_to_lark(text, use_ascii='')}/"}
    if constraint.kind == "choice":
        return {"lark_grammar": "start: CHOICE\nCHOICE: " + " | ".join(map(lark_string, json.loads(text)))}
    try:
        return {"lark_grammar": any_to_lark(text)}
    except Exception as error:  # a grammar without a root rule is a plain Exception there
        message = "too deeply nested" if isinstance(error, RecursionError) else str(error)[:300]
        raise BadRequest(
            f"the grammar cannot be read: {message}", param="response_format", code="invalid_grammar"
        ) from None


@lru_cache(maxsize=4)
def _structured_output(tokenizer: Tokenizer, settings: ServerSettings) -> StructuredOutput:
    return StructuredOutput(tokenizer, settings)


def make_guide(
    processor: MiniMaxM3VLProcessor,
    vocab_size: int,
    settings: ServerSettings,
    *,
    response_format: Mapping[str, Any] | None,
    tools: Sequence[Mapping[str, Any]] = (),
    tool_choice: str = "auto",
    parallel: bool = True,
    thinking_mode: str | None = None,
) -> GrammarGuide | None:
    """The guide that a request asks for, or None. `vocab_size`: that of the model, at least the tokenizer's.

    Raises:
        BadRequest: see `read_constraint` and `StructuredOutput.guide`.
    """
    tokenizer = processor.tokenizer
    assert vocab_size >= tokenizer.vocab_size, (vocab_size, tokenizer.vocab_size)
    constraint = read_constraint(response_format, settings)
    return _structured_output(tokenizer, settings).guide(
        constraint, thinking_mode=thinking_mode, tools=tools, tool_choice=tool_choice, parallel=parallel
    )


def check_guide(guide: GrammarGuide | None) -> None:
    """BadRequest if the answer could not be completed inside its grammar: its text is not what was asked for."""
    if guide is not None and guide.error is not None:
        raise BadRequest(
            f"the answer could not be kept inside its grammar: {guide.error}; simplify the schema or grammar",
            param="response_format",
            code="grammar_failed",
        )
