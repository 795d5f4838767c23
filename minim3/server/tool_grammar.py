"""The grammar of M3's tool calls, from the JSON schemas of the tools: what processing/output.py reads, and no more.

    NS <tool_call>\\n
    NS <invoke name="f"> NS <city>Paris NS </city> NS <days> NS <item>3 NS </item> NS </days> NS </invoke>\\n
    NS </tool_call>

NS is the namespace token, so values are free text that needs no escapes. Arguments come in the order of the schema's
properties, those that are not required may be left out. What a schema says and this format cannot write as elements
(a tuple, an object of any keys) is one JSON text; what cannot be enforced at all is left free, never guessed.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from minim3.processing.chat import NAMESPACE
from minim3.processing.tokenizer import Tokenizer
from minim3.server.errors import BadRequest
from minim3.server.guides import lark_string

_MAX_CALLS = 64
_MAX_TAG_CHARACTERS = 200  # the parser of answers takes 256 for a whole tag
_UNWRITABLE = frozenset('<>"\n\r')
_TEXT = "TEXT"
_TERMINALS = "TEXT: /(?s:.)*/\nINTEGER: /-?(0|[1-9][0-9]{0,17})/\nNUMBER: /-?(0|[1-9][0-9]{0,17})(\\.[0-9]{1,17})?/\n"
_COMPACT = {"whitespace_flexible": False, "lenient": True}
_BOUNDS = ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf")


def call_grammar(
    tokenizer: Tokenizer, tools: Sequence[Mapping[str, Any]], *, name: str | None = None, parallel: bool = True
) -> tuple[str, tuple[int, ...]]:
    """Lark rules whose rule `calls` is a whole block of calls, and the control tokens they use.

    Args:
        tools: checked tools (`normalize_tools`), at least one.
        name: the one function that must be called; None: any of them.
        parallel: several calls in the block, or exactly one.

    Raises:
        BadRequest: an argument's name cannot be written as an element, or the tokenizer lacks the namespace token.
    """
    namespace_id = tokenizer.added_tokens.get(NAMESPACE)
    if namespace_id is None:
        raise BadRequest(f"the tokenizer has no token {NAMESPACE}, so this model cannot call tools", param="tools")
    control_ids = [namespace_id]
    namespace = f"<[{namespace_id}]>"

    def tag(text: str) -> str:
        token_id = tokenizer.added_tokens.get(text)
        if token_id is None:
            return lark_string(text)
        control_ids.append(token_id)
        return f"<[{token_id}]>"

    rules = _Rules(namespace)
    calls = [
        rules.invoke(index, tool["function"])
        for index, tool in enumerate(tools)
        if name is None or tool["function"]["name"] == name
    ]
    assert calls, (name, "is no tool")
    count = f"{{1,{_MAX_CALLS}}}" if parallel else ""
    lines = [
        f'calls: {namespace} {tag("<tool_call>")} "\\n" call{count} {namespace} {tag("</tool_call>")}',
        f"call: {' | '.join(calls)}",
        *rules.lines,
        _TERMINALS,
    ]
    return "\n".join(lines), tuple(control_ids)


class _Rules:
    """Rules for the schemas of one list of tools; `$ref` makes them recursive."""

    def __init__(self, namespace: str) -> None:
        self.lines: list[str] = []
        self._namespace = namespace
        self._root: Mapping[str, Any] = {}
        self._targets: dict[str, str] = {}

    def invoke(self, index: int, function: Mapping[str, Any]) -> str:
        """The rule of one call of a function."""
        root = function.get("parameters") or {}
        self._root, self._targets = root, {}
        opening = lark_string(f'<invoke name="{function["name"]}">')
        arguments = self._elements(self._resolved(root))
        name = f"call_{index}"
        self.lines.append(f'{name}: {self._namespace} {opening} {arguments} {self._namespace} "</invoke>\\n"')
        return name

    def _resolved(self, node: Any) -> Any:
        """The target where a schema is a reference and nothing else."""
        for _ in range(8):
            target = self._target(node)
            if target is None:
                break
            node = target
        return node

    def _target(self, node: Any) -> Any:
        reference = node.get("$ref") if isinstance(node, Mapping) else None
        if not isinstance(reference, str) or not reference.startswith("#"):
            return None
        found: Any = self._root
        for key in reference[1:].split("/")[1:]:
            found = found.get(key.replace("~1", "/").replace("~0", "~")) if isinstance(found, Mapping) else None
        return found

    def _add(self, body: str) -> str:
        name = f"v_{len(self.lines)}"
        self.lines.append(f"{name}: {body}")
        return name

    def _element(self, name: str, value: str) -> str:
        unwritable = not name or "/" in (name[0], name[-1]) or _UNWRITABLE & set(name)
        if unwritable or len(name) > _MAX_TAG_CHARACTERS:
            raise BadRequest(f"the argument name {name[:100]!r} cannot be written as an element", param="tools")
        opening, closing = lark_string(f"<{name}>"), lark_string(f"</{name}>")
        return f"{self._namespace} {opening} {value} {self._namespace} {closing}"

    def _elements(self, node: Any) -> str:
        """The properties of an object, in order."""
        properties = node.get("properties") if isinstance(node, Mapping) else None
        required = node.get("required") if isinstance(node, Mapping) else None
        if not isinstance(properties, Mapping):
            return ""
        needed = set(filter(_is_text, required)) if isinstance(required, list) else set()
        parts = []
        for name, schema in properties.items():
            element = self._element(name, self._value(schema))
            parts.append(element if name in needed else f"({element})?")
        return " ".join(parts)

    def _value(self, node: Any) -> str:
        """A rule or terminal for the text between an element's tags."""
        if not isinstance(node, Mapping):
            return _TEXT
        if "$ref" in node:
            return self._reference(node)
        if "const" in node or isinstance(node.get("enum"), list):
            values = [node["const"]] if "const" in node else node["enum"]
            texts = [one if isinstance(one, str) else json.dumps(one, ensure_ascii=False) for one in values]
            return self._add(" | ".join(map(lark_string, texts))) if texts else _TEXT
        for key in ("anyOf", "oneOf"):
            if isinstance(node.get(key), list) and node[key]:
                return self._any(self._value(_not_empty(one)) for one in node[key])
        if isinstance(node.get("allOf"), list):
            return self._value(node["allOf"][0]) if len(node["allOf"]) == 1 else _TEXT
        types = node.get("type")
        if isinstance(types, list) and types:
            return self._any(self._typed(_not_empty(node) if len(types) > 1 else node, one) for one in types)
        if types is None:
            types = "object" if "properties" in node else "array" if "items" in node else "string"
        return self._typed(node, types)

    def _any(self, values: Iterable[str]) -> str:
        unique = list(dict.fromkeys(values))
        # Free text takes in everything else.
        return _TEXT if _TEXT in unique else unique[0] if len(unique) == 1 else self._add(" | ".join(unique))

    def _reference(self, node: Mapping[str, Any]) -> str:
        reference, target = node["$ref"], self._target(node)
        if target is None or not isinstance(reference, str):
            return _TEXT
        if reference not in self._targets:
            name = f"ref_{len(self.lines)}"
            self._targets[reference] = name
            self.lines.append("")  # its place, filled once what it refers to is written
            place = len(self.lines) - 1
            self.lines[place] = f"{name}: {self._value(target)}"
        return self._targets[reference]

    def _typed(self, node: Mapping[str, Any], kind: Any) -> str:
        if kind == "string":
            return self._string(node)
        if kind in ("integer", "number"):
            bounds = {key: node[key] for key in _BOUNDS if isinstance(node.get(key), int | float)}
            return self._json({"type": kind, **bounds}) if bounds else kind.upper()
        if kind == "boolean":
            return self._add('"true" | "false"')
        if kind == "null":
            return self._add('"null"')
        if kind == "array" and isinstance(node.get("items"), Mapping) and "prefixItems" not in node:
            least, most = node.get("minItems"), node.get("maxItems")
            low = least if isinstance(least, int) and least > 0 else 0
            high = str(most) if isinstance(most, int) and most >= low else ""
            if high == "0":
                return self._add('""')
            return self._add(f"({self._element('item', self._value(node['items']))}){{{low},{high}}}")
        if kind == "object" and isinstance(node.get("properties"), Mapping) and node["properties"]:
            return self._add(self._elements(node))
        if kind in ("object", "array"):
            definitions = {key: self._root[key] for key in ("$defs", "definitions") if key in self._root}
            return self._json({**definitions, **node, "type": kind})
        return _TEXT

    def _string(self, node: Mapping[str, Any]) -> str:
        least, most = node.get("minLength"), node.get("maxLength")
        low = least if isinstance(least, int) and least > 0 else 0
        if most == 0:
            return self._add('""')
        if isinstance(most, int) and most >= low:
            return self._add(f"/(?s:.){{{low},{most}}}/")
        return self._add(f"/(?s:.){{{low},}}/") if low else _TEXT

    def _json(self, schema: Mapping[str, Any]) -> str:
        return self._add("%json " + json.dumps({**schema, "x-guidance": _COMPACT}))


def _not_empty(node: Any) -> Any:
    """One branch of several. An empty list is written as nothing, which would be read as an object or a text."""
    if isinstance(node, Mapping) and "items" in node and node.get("maxItems") != 0:
        return {**node, "minItems": max(1, node["minItems"] if isinstance(node.get("minItems"), int) else 0)}
    return node


def _is_text(value: Any) -> bool:
    return isinstance(value, str)
