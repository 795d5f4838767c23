"""OpenAI-style messages checked once and brought into one shape, which both renderers read.

After `normalize_messages` roles and part types are known words, tool-call arguments are dictionaries, and the results
of tools stand in the order of the calls they answer, whatever order they came back in.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

ROLES = ("system", "developer", "user", "assistant", "tool")
TEXT, IMAGE, VIDEO = "text", "image", "video"
_PART_TYPES = "text, image, image_url, video, video_url"
MAX_ARGUMENT_DEPTH = 64  # as deep as answers are read (output.py)
# Argument names become element names and function names an attribute: these characters would end them early.
_TAG_DELIMITERS = frozenset('<>"\n\r')


@dataclass(frozen=True, slots=True)
class ToolCall:
    """One call of a function. `complete` is False for a call whose generation was cut off: do not run it."""

    name: str
    arguments: dict[str, Any]
    id: str | None = None
    complete: bool = True


@dataclass(frozen=True, slots=True)
class Part:
    """A piece of a message: `kind` is text, image or video; `media` is the picture or clip as the caller gave it."""

    kind: str
    text: str = ""
    media: Any = None


@dataclass(frozen=True, slots=True)
class Message:
    role: str
    parts: tuple[Part, ...] = ()
    reasoning: str | None = None
    tool_calls: tuple[ToolCall, ...] = ()
    tool_call_id: str | None = None

    @property
    def text(self) -> str:
        return "".join(part.text for part in self.parts)


def normalize_messages(messages: Sequence[Mapping[str, Any]]) -> list[Message]:
    """Check a conversation and bring it into one shape.

    Raises:
        ValueError: naming the message and what is wrong with it: an unknown role or part type, malformed tool calls,
            a tool result that answers no call, calls of which only some are answered.
    """
    if isinstance(messages, (str, Mapping)) or not isinstance(messages, Sequence):
        raise ValueError(f"messages must be a list of messages, got {type(messages).__name__}")
    if not messages:
        raise ValueError("messages is empty: a conversation needs at least one message")
    return _order_tool_results([_normalize_message(message, f"messages[{i}]") for i, message in enumerate(messages)])


def _normalize_message(message: Mapping[str, Any], where: str) -> Message:
    if not isinstance(message, Mapping):
        raise ValueError(f"{where} is a {type(message).__name__}, expected a mapping with role and content")
    role = message.get("role")
    if role not in ROLES:
        raise ValueError(f"{where} has role {role!r}; known roles: {', '.join(ROLES)}")
    tool_calls = message.get("tool_calls") or ()
    if tool_calls and role != "assistant":
        raise ValueError(f"{where} has tool_calls but role {role!r}; only assistant messages call tools")
    if isinstance(tool_calls, (str, Mapping)) or not isinstance(tool_calls, Sequence):
        raise ValueError(f"{where}.tool_calls must be a list, got {type(tool_calls).__name__}")
    calls = tuple(_normalize_tool_call(call, f"{where}.tool_calls[{i}]") for i, call in enumerate(tool_calls))
    reasoning = message.get("reasoning_content")
    if reasoning is None:
        reasoning = message.get("reasoning")
    if reasoning is not None and not isinstance(reasoning, str):
        raise ValueError(f"{where}.reasoning_content must be a string, got {type(reasoning).__name__}")
    content = message.get("content")
    if content is None and role == "assistant":
        content = message.get("refusal")
    if content is None and not (role == "assistant" and (calls or reasoning)):
        raise ValueError(f"{where} ({role}) has no content")
    parts = _normalize_content(content, f"{where}.content")
    if role in ("system", "developer", "assistant") and any(part.kind != TEXT for part in parts):
        raise ValueError(f"{where}: a {role} message holds text only; pictures and video go in user messages")
    tool_call_id = message.get("tool_call_id") if role == "tool" else None
    if tool_call_id is not None and not isinstance(tool_call_id, str):
        raise ValueError(f"{where}.tool_call_id must be a string, got {type(tool_call_id).__name__}")
    return Message(role, parts, reasoning or None, calls, tool_call_id)


def _normalize_content(content: Any, where: str) -> tuple[Part, ...]:
    if content is None:
        return ()
    if isinstance(content, str):
        return (Part(TEXT, content),)
    if isinstance(content, Mapping) or not isinstance(content, Sequence):
        raise ValueError(f"{where} must be a string or a list of parts, got {type(content).__name__}")
    return tuple(_normalize_part(part, f"{where}[{i}]") for i, part in enumerate(content))


def _normalize_part(part: Any, where: str) -> Part:
    if isinstance(part, str):
        return Part(TEXT, part)
    if not isinstance(part, Mapping):
        raise ValueError(f"{where} is a {type(part).__name__}, expected a mapping with a type")
    kind = part.get("type")
    if kind in ("text", "refusal"):
        text = part.get(kind)
        if not isinstance(text, str):
            raise ValueError(f"{where}: a {kind} part needs a string under {kind!r}, got {type(text).__name__}")
        return Part(TEXT, text)
    if kind in ("image_url", "video_url"):
        media = part.get(kind)
        if isinstance(media, Mapping):
            media = media.get("url")
        if media is None:
            raise ValueError(f"{where}: a part of type {kind!r} needs {{'{kind}': {{'url': ...}}}}")
        return Part(IMAGE if kind == "image_url" else VIDEO, media=media)
    if kind in (IMAGE, VIDEO):
        # `{"type": "image"}` alone marks the place of a picture that is passed beside the messages.
        media = next((part[key] for key in (kind, "url", "path") if part.get(key) is not None), None)
        return Part(kind, media=media)
    raise ValueError(f"{where} has type {kind!r}; known types: {_PART_TYPES}")


def _normalize_tool_call(call: Any, where: str) -> ToolCall:
    if isinstance(call, ToolCall):
        call = {"id": call.id, "name": call.name, "arguments": call.arguments}
    if not isinstance(call, Mapping):
        raise ValueError(f"{where} is a {type(call).__name__}, expected a mapping")
    if call.get("type", "function") != "function":
        raise ValueError(f"{where} has type {call['type']!r}; only 'function' is known")
    function = call.get("function", call)
    name = function.get("name") if isinstance(function, Mapping) else None
    if not isinstance(name, str) or not name or _TAG_DELIMITERS & set(name):
        raise ValueError(f"{where} has function name {name!r}; a name is a non-empty string without < > \" or newlines")
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments) if arguments.strip() else {}
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{where} ({name}): arguments are not valid JSON: {error}") from error
    if arguments is None:
        arguments = {}
    if not isinstance(arguments, Mapping):
        raise ValueError(f"{where} ({name}): arguments must be an object, got {type(arguments).__name__}")
    written = _as_elements(arguments, f"{where} ({name})", is_outermost=True)
    identifier = call.get("id")
    if identifier is not None and not isinstance(identifier, str):
        raise ValueError(f"{where}.id must be a string, got {type(identifier).__name__}")
    return ToolCall(name, written, identifier)


def _as_elements(value: Any, where: str, levels_left: int = MAX_ARGUMENT_DEPTH, is_outermost: bool = False) -> Any:
    """The value as elements can say it: what has keys that no tag can hold, as JSON text."""
    if levels_left == 0:
        raise ValueError(f"{where}: arguments are nested deeper than {MAX_ARGUMENT_DEPTH} levels")
    if isinstance(value, Mapping):
        bad = next((key for key in value if not _is_tag_name(key)), None)
        if is_outermost and bad is not None:
            raise ValueError(f"{where}: argument name {bad!r} cannot be written as an element")
        if bad is not None:
            return _as_json(value, where)
        return {key: _as_elements(item, f"{where}.{key}", levels_left - 1) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_as_elements(item, where, levels_left - 1) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{where}: {value} is not a JSON number")
    if value is not None and not isinstance(value, (str, int, float)):
        raise ValueError(f"{where}: a {type(value).__name__} is not a JSON value")
    return value


def _is_tag_name(key: Any) -> bool:
    return isinstance(key, str) and bool(key) and "/" not in (key[0], key[-1]) and not _TAG_DELIMITERS & set(key)


def _as_json(value: Any, where: str) -> str:
    try:
        return json.dumps(value, ensure_ascii=False, allow_nan=False)
    except (ValueError, TypeError, RecursionError) as error:
        raise ValueError(f"{where}: arguments are not JSON: {error}") from error


def _order_tool_results(messages: list[Message]) -> list[Message]:
    """Put each run of tool results in the order of the calls of the assistant message before it."""
    ordered: list[Message] = []
    position = 0
    while position < len(messages):
        if messages[position].role != "tool":
            ordered.append(messages[position])
            position += 1
            continue
        end = position
        while end < len(messages) and messages[end].role == "tool":
            end += 1
        caller = messages[position - 1] if position else None
        if caller is None or not caller.tool_calls:
            raise ValueError(f"messages[{position}] is a tool result, but the message before it calls no tool")
        ordered.extend(_match_results(caller.tool_calls, messages[position:end], position))
        position = end
    return ordered


def _match_results(calls: Sequence[ToolCall], results: list[Message], position: int) -> list[Message]:
    if len(results) != len(calls):
        raise ValueError(
            f"messages[{position}]: {len(results)} tool results for {len(calls)} tool calls "
            f"(calls: {[call.id or call.name for call in calls]}, "
            f"results: {[result.tool_call_id for result in results]})"
        )
    if all(result.tool_call_id is None for result in results):
        return results  # nothing to match by: the caller's order is the order
    by_id: dict[str | None, Message] = {}
    for offset, result in enumerate(results):
        if result.tool_call_id in by_id:
            raise ValueError(f"messages[{position + offset}]: a second result for tool_call_id {result.tool_call_id!r}")
        by_id[result.tool_call_id] = result
    known = [call.id for call in calls]
    for offset, result in enumerate(results):
        if result.tool_call_id not in known:
            raise ValueError(
                f"messages[{position + offset}]: tool_call_id {result.tool_call_id!r} answers no call; calls: {known}"
            )
    return [by_id[identifier] for identifier in known]


def normalize_tools(tools: Sequence[Mapping[str, Any]] | None) -> list[dict[str, Any]]:
    """Tools as `{"type": "function", "function": {"name", "description", "parameters"}}`; bare ones are wrapped."""
    if tools is None:
        return []
    if isinstance(tools, (str, Mapping)) or not isinstance(tools, Sequence):
        raise ValueError(f"tools must be a list, got {type(tools).__name__}")
    wrapped: list[dict[str, Any]] = []
    for index, tool in enumerate(tools):
        if not isinstance(tool, Mapping) or tool.get("type", "function") != "function":
            raise ValueError(f"tools[{index}] must be a mapping of type 'function'")
        function = tool.get("function", {key: value for key, value in tool.items() if key != "type"})
        name = function.get("name") if isinstance(function, Mapping) else None
        if not isinstance(name, str) or not name or _TAG_DELIMITERS & set(name):
            raise ValueError(f"tools[{index}] has function name {name!r}; expected a non-empty string without < > \"")
        wrapped.append({"type": "function", "function": dict(function)})
    return wrapped
