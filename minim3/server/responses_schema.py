"""The body of `POST /v1/responses`, and its input as the messages of a chat."""

from collections.abc import Mapping, Sequence
from typing import Annotated, Any

from pydantic import Field

from minim3.server.errors import BadRequest
from minim3.server.schema import PositiveInt, SamplingFields

_TEXTS = ("input_text", "output_text", "text", "summary_text", "reasoning_text")
_ROLES = ("system", "developer", "user", "assistant")


class ResponsesRequest(SamplingFields):
    """The body of /v1/responses. Of OpenAI's tools there are functions only; nothing is stored."""

    input: str | list[dict[str, Any]] = Field(description="A text, or the items of the conversation so far.")
    instructions: str | None = Field(None, description="A system message before the input.")
    max_output_tokens: PositiveInt | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    reasoning: dict[str, Any] | None = Field(None, description='{"effort": ...}, as reasoning_effort of chat.')
    text: dict[str, Any] | None = Field(None, description='{"format": ...}, as response_format of chat.')
    top_logprobs: Annotated[int, Field(ge=0, lt=2**31)] | None = None
    include: list[str] | None = Field(None, description='"message.output_text.logprobs"; others have no effect.')
    truncation: str | None = Field(None, description="disabled only.")
    chat_template_kwargs: dict[str, Any] | None = None
    store: bool | None = Field(None, description="Without effect: nothing is stored.")

    @property
    def effort(self) -> str | None:
        """reasoning.effort. BadRequest where it is no text."""
        effort = (self.reasoning or {}).get("effort")
        if not isinstance(effort, str | None):
            raise BadRequest("reasoning.effort must be a text", param="reasoning.effort")
        return effort

    @property
    def format(self) -> dict[str, Any] | None:
        """text.format as a response_format."""
        form = (self.text or {}).get("format")
        if not isinstance(form, dict | None):
            raise BadRequest("text.format must be an object", param="text.format")
        return form

    @property
    def wants_logprobs(self) -> bool:
        return bool(self.top_logprobs) or "message.output_text.logprobs" in (self.include or ())


def chat_tools(tools: Sequence[Mapping[str, Any]] | None) -> list[dict[str, Any]]:
    """Tools in the form of chat: `{"type": "function", "function": {...}}`."""
    found: list[dict[str, Any]] = []
    for index, tool in enumerate(tools or ()):
        if tool.get("type") != "function":
            kind = str(tool.get("type"))[:100]
            raise BadRequest(f"tools[{index}] has type {kind!r}; this server has functions only", param="tools")
        function = {name: value for name, value in tool.items() if name != "type"}
        found.append({"type": "function", "function": function})
    return found


def chat_messages(given: str | Sequence[Mapping[str, Any]], instructions: str | None) -> list[dict[str, Any]]:
    """The items of an input as messages of a chat.

    Reasoning and calls that follow each other, and the assistant's text before them, are one message of the assistant.

    Raises:
        BadRequest: an item of an unknown type or malformed, named.
    """
    messages: list[dict[str, Any]] = []
    if instructions:
        messages.append({"role": "system", "content": instructions})
    if isinstance(given, str):
        return [*messages, {"role": "user", "content": given}]
    if not given:
        raise BadRequest("input is empty: a conversation needs at least one item", param="input")
    assistant: dict[str, Any] | None = None
    for index, item in enumerate(given):
        where = f"input[{index}]"
        kind = item.get("type", "message")
        if kind == "message" and item.get("role") != "assistant":
            if item.get("role") not in _ROLES:
                role = str(item.get("role"))[:100]
                raise BadRequest(f"{where} has role {role!r}; known: {', '.join(_ROLES)}", param=where)
            assistant = None
            messages.append({"role": item["role"], "content": _content(item.get("content"), where)})
            continue
        if kind == "function_call_output":
            assistant = None
            output = item.get("output")
            content = output if isinstance(output, str) else _content(output, where)
            messages.append({"role": "tool", "tool_call_id": item.get("call_id"), "content": content})
            continue
        if kind not in ("message", "function_call", "reasoning"):
            known = "message, function_call, function_call_output, reasoning"
            raise BadRequest(f"{where} has type {str(kind)[:100]!r}; known: {known}", param=where)
        if assistant is None or (kind == "reasoning" and assistant.get("tool_calls")):
            assistant = {"role": "assistant", "content": ""}
            messages.append(assistant)
        if kind == "message":
            assistant["content"] += _text(item.get("content"), where)
        elif kind == "reasoning":
            text = _text(item.get("content"), where) or _text(item.get("summary"), where)
            assistant["reasoning_content"] = assistant.get("reasoning_content", "") + text
        else:
            function = {"name": item.get("name"), "arguments": item.get("arguments")}
            call = {"id": item.get("call_id"), "type": "function", "function": function}
            assistant.setdefault("tool_calls", []).append(call)
    return messages


def _text(content: Any, where: str) -> str:
    """The text of an item that may hold nothing else."""
    parts = _content("" if content is None else content, where)
    if isinstance(parts, str):
        return parts
    if any(part["type"] != "text" for part in parts):
        raise BadRequest(f"{where} may hold text only", param=where)
    return "".join(part["text"] for part in parts)


def _content(content: Any, where: str) -> str | list[dict[str, Any]]:
    """Content of a message: a text, or parts of chat's types."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list) or not all(isinstance(part, Mapping) for part in content):
        raise BadRequest(f"{where}.content must be a text or a list of parts", param=where)
    return [_part(part, f"{where}.content[{index}]") for index, part in enumerate(content)]


def _part(part: Mapping[str, Any], where: str) -> dict[str, Any]:
    kind = part.get("type")
    if kind in _TEXTS:
        if not isinstance(part.get("text"), str):
            raise BadRequest(f"{where} needs a text under 'text'", param=where)
        return {"type": "text", "text": part["text"]}
    if kind == "refusal":
        return {"type": "text", "text": str(part.get("refusal", ""))}
    if kind == "input_image":
        if not isinstance(part.get("image_url"), str):
            raise BadRequest(f"{where} needs image_url, a data URL; there are no stored files", param=where)
        return {"type": "image_url", "image_url": {"url": part["image_url"]}}
    if kind in ("video_url", "image_url", "input_file"):
        return dict(part)
    known = "input_text, output_text, input_image, input_file, video_url"
    raise BadRequest(f"{where} has type {str(kind)[:100]!r}; known: {known}", param=where)
