"""Arguments of tool calls: elements of text, converted to the types of the tool's JSON schema.

The format has no quotes: `<count>3</count>` may be the number or the text. The schema decides; without one it is text.
A value that does not fit its schema is kept as the text the model wrote. Elements of one name side by side are a list;
text beside the elements of an object is its `$text`.
"""

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from minim3.processing.messages import normalize_tools

_JSON_NUMBER = re.compile(r"-?(0|[1-9]\d*)(\.\d+)?([eE][+-]?\d+)?")
_WRITTEN_NUMBER = re.compile(r"[+-]?(?=\.?\d)(\d*)(\.\d*)?([eE][+-]?\d+)?")  # 007, +5, .5 and 5. too
_MAX_NUMBER_CHARACTERS = 300
_MAX_REFERENCES = 32
_KEYWORDS = {"object": ("properties", "additionalProperties"), "array": ("items",)}
_SCALAR_TYPES = ("null", "boolean", "integer", "number", "object", "array")


class Schemas:
    """The parameter schemas of a list of tools, looked up by function name."""

    def __init__(self, tools: Sequence[Mapping[str, Any]] | None = None) -> None:
        self._parameters = {
            tool["function"]["name"]: tool["function"].get("parameters") for tool in normalize_tools(tools)
        }

    def of(self, function: str) -> "Schema":
        parameters = self._parameters.get(function)
        root = parameters if isinstance(parameters, Mapping) else {}
        return Schema(root, root)


class Schema:
    """One node of a JSON schema; `root` is where `$ref` starts from."""

    def __init__(self, node: Any, root: Mapping[str, Any]) -> None:
        self._root = root
        self._options = self._alternatives(node, _MAX_REFERENCES, set())

    def _alternatives(self, node: Any, references_left: int, seen: set[int]) -> list[Mapping[str, Any]]:
        """The node and everything it may stand for: targets of `$ref`, branches of anyOf, oneOf and allOf.

        Each node once (`seen`): branches that refer to what holds them would multiply at every level.
        """
        if not isinstance(node, Mapping) or references_left == 0 or id(node) in seen:
            return []
        seen.add(id(node))
        found = [node]
        reference = node.get("$ref")
        if isinstance(reference, str) and reference.startswith("#"):
            target: Any = self._root
            for key in reference[1:].split("/")[1:]:
                target = target.get(key.replace("~1", "/").replace("~0", "~")) if isinstance(target, Mapping) else None
            found += self._alternatives(target, references_left - 1, seen)
        for key in ("anyOf", "oneOf", "allOf"):
            for branch in _list(node.get(key)):
                found += self._alternatives(branch, min(references_left - 1, 4), seen)
        return found

    def types(self) -> set[str]:
        """The JSON types a value may have, by its keywords where no type is declared; empty if nothing says."""
        types: set[str] = set()
        for option in self._options:
            declared = option.get("type")
            named = [one for one in (_list(declared) or [declared]) if isinstance(one, str)]
            for kind, keywords in _KEYWORDS.items():
                if not named and any(isinstance(option.get(keyword), Mapping) for keyword in keywords):
                    types.add(kind)
            types.update(named)
        return types

    def is_list(self) -> bool:
        """Whether a value is a list and can be no object."""
        types = self.types()
        return "array" in types and "object" not in types

    def constants(self) -> list[Any]:
        values: list[Any] = []
        for option in self._options:
            values += _list(option.get("enum"))
            values += [option["const"]] if "const" in option else []
        return values

    def child(self, name: str) -> "Schema":
        """The schema of an object's property, or of an array's entries (of any name where it can be no object)."""
        for option in self._options:
            properties = option.get("properties")
            if isinstance(properties, Mapping) and name in properties:
                return Schema(properties[name], self._root)
        of_list = name == "item" or self.is_list()
        for option in self._options:
            for key in ("items", "additionalProperties") if of_list else ("additionalProperties",):
                if isinstance(option.get(key), Mapping):
                    return Schema(option[key], self._root)
        return Schema(None, self._root)


def _list(value: Any) -> Sequence[Any]:
    """A list of a schema; nothing where a stranger wrote something else in its place."""
    return value if isinstance(value, (list, tuple)) else ()


class Element:
    """An open element of a tool call: text, or elements, until it is closed."""

    def __init__(self, name: str, schema: Schema) -> None:
        self.name = name
        self.schema = schema
        self.text: list[str] = []
        self.children: list[tuple[str, Any]] = []

    def value(self) -> Any:
        """The value of the closed element."""
        if not self.children:
            return convert_text("".join(self.text), self.schema)
        types = self.schema.types()
        is_list = all(name == "item" for name, _ in self.children)
        if "array" in types or "object" in types:
            is_list = self.schema.is_list() or (is_list and "array" in types)
        if is_list:
            return [value for _, value in self.children]
        values: dict[str, list[Any]] = {}
        for name, value in self.children:
            values.setdefault(name, []).append(value)
        found = {name: joined(several, self.schema.child(name)) for name, several in values.items()}
        beside = "".join(self.text).strip()
        return {**found, "$text": beside} if beside else found


def joined(values: list[Any], schema: Schema) -> Any:
    """The value of elements of one name: that of a single one, of several a list of theirs."""
    if len(values) == 1:
        return values[0]
    if not schema.is_list():
        return values
    entry = schema.child("item")
    found: list[Any] = []
    for value in values:
        lists = isinstance(value, list) and (not entry.is_list() or all(isinstance(one, list) for one in value))
        found += value if lists else [value]
    return [convert_text(value, entry) if isinstance(value, str) else value for value in found]


def convert_text(text: str, schema: Schema) -> Any:
    """Text as the first type of the schema that it can be read as (string last); the text itself if none fits."""
    for value in schema.constants():
        if text == value or (not isinstance(value, str) and text.strip() == json.dumps(value)):
            return value
    types = schema.types()
    stripped = text.strip()
    for kind in _SCALAR_TYPES:
        if kind in types:
            is_read, value = _read(stripped, kind, may_be_string="string" in types)
            if is_read:
                return value
    return text


def _read(text: str, kind: str, may_be_string: bool) -> tuple[bool, Any]:
    if kind == "null":
        return text == "null", None
    if kind == "boolean":
        return text.lower() in ("true", "false"), text.lower() == "true"
    if kind in ("integer", "number"):
        return _read_number(text, kind, may_be_string)
    if text == "" and not may_be_string:
        return True, {} if kind == "object" else []
    if text[:1] != ("{" if kind == "object" else "["):
        return False, None
    try:
        value = json.loads(text, parse_constant=_refuse_constant)
        json.dumps(value, ensure_ascii=False).encode()  # an escaped half of a surrogate pair could not be sent on
    except (ValueError, RecursionError):
        return False, None
    return True, value


def _read_number(text: str, kind: str, may_be_string: bool) -> tuple[bool, Any]:
    # Where it may be text, leading zeros (of a postal code) say that it is.
    pattern = _JSON_NUMBER if may_be_string else _WRITTEN_NUMBER
    if len(text) > _MAX_NUMBER_CHARACTERS or not (match := pattern.fullmatch(text)):
        return False, None
    if match.group(2) is None and match.group(3) is None:
        return True, int(text)
    value = float(text)
    if value in (float("inf"), float("-inf")):
        return False, None
    if kind == "integer":
        return value.is_integer(), int(value)
    return True, value


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")
