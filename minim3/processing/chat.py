"""Messages to the documented chat format, and the format to token ids.

    ]~!b[]~b]system
    ROOT TEXT + thinking instructions [e~[
    ]~b]developer
    the caller's system message, # Tools [e~[
    ]~b]user
    ... [e~[
    ]~b]ai
    <mm:think>reasoning</mm:think> or a bare </mm:think>, then text, then tool calls [e~[
    ]~b]tool
    <response>...</response> [e~[
    ]~b]ai                          <- the generation prompt, plus <mm:think> (enabled) or </mm:think> (disabled)

Rendering gives `Segment`s that say where each character comes from. Only segments of the template may become control
tokens; everything a caller passed is encoded by an encoder that knows none (tokenizer.py). Between two control tokens
template text and caller text are encoded as one run, so an ordinary conversation gets exactly the ids that encoding
the whole rendered string would give.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from minim3.processing.messages import IMAGE, TEXT, VIDEO, Message, ToolCall, normalize_messages, normalize_tools
from minim3.processing.placeholders import IMAGE_TOKEN, VIDEO_TOKEN, Expansion
from minim3.processing.tokenizer import END_OF_TURN, Tokenizer

BEGIN_CONVERSATION = "]~!b["
BEGIN_TURN = "]~b]"
THINK = "<mm:think>"
END_THINK = "</mm:think>"
NAMESPACE = "]<]minimax[>["
ASSISTANT_HEADER = "ai\n"
THINKING_MODES = ("enabled", "disabled", "adaptive")
DEFAULT_THINKING_MODE = "adaptive"

ROOT_TEXT = "You are a helpful assistant."
THINKING_INSTRUCTIONS = {
    "enabled": "Think before you answer.",
    "disabled": "Answer without thinking.",
    "adaptive": "Think before you answer if the question needs it.",
}
_TOOLS_BEFORE = "# Tools\nThese functions can be called, each described by a JSON schema:\n<tools>\n"
_TOOLS_AFTER = (
    "</tools>\nTo call functions, end the answer with one block like this, one element for every argument, "
    f"objects as nested elements and list entries as item elements:\n{NAMESPACE}<tool_call>\n"
    f'{NAMESPACE}<invoke name="function-name">{NAMESPACE}<argument-name>value{NAMESPACE}</argument-name>'
    f"{NAMESPACE}</invoke>\n{NAMESPACE}</tool_call>"
)


@dataclass(frozen=True, slots=True)
class Segment:
    """A stretch of the rendered prompt. `is_control`: written by the template, so its markers are control tokens."""

    text: str
    is_control: bool


def check_thinking_mode(thinking_mode: str | None) -> str:
    if thinking_mode is None:
        return DEFAULT_THINKING_MODE
    if thinking_mode not in THINKING_MODES:
        raise ValueError(f"thinking_mode is {thinking_mode!r}; known modes: {', '.join(THINKING_MODES)}")
    return thinking_mode


def render(
    messages: Sequence[Mapping[str, Any]],
    tools: Sequence[Mapping[str, Any]] | None = None,
    thinking_mode: str | None = None,
    add_generation_prompt: bool = True,
) -> list[Segment]:
    """Render OpenAI-style messages in the built-in template.

    Args:
        messages: roles system, developer, user, assistant, tool; see `normalize_messages`.
        tools: functions the model may call, with their JSON schemas.
        thinking_mode: enabled, disabled or adaptive (default).
        add_generation_prompt: end with the opening of the assistant's turn.

    Raises:
        ValueError: for anything malformed, naming it.
    """
    return render_normalized(
        normalize_messages(messages), normalize_tools(tools), check_thinking_mode(thinking_mode), add_generation_prompt
    )


def render_normalized(
    messages: Sequence[Message], tools: Sequence[Mapping[str, Any]], thinking_mode: str, add_generation_prompt: bool
) -> list[Segment]:
    """`render` for messages and tools that `normalize_messages` and `normalize_tools` have checked."""
    return list(_render(messages, tools, thinking_mode, add_generation_prompt))


def _control(text: str) -> Segment:
    return Segment(text, True)


def _render(
    messages: Sequence[Message], tools: Sequence[Mapping[str, Any]], thinking_mode: str, add_generation_prompt: bool
) -> Iterator[Segment]:
    yield _control(
        f"{BEGIN_CONVERSATION}{BEGIN_TURN}system\n{ROOT_TEXT}\n{THINKING_INSTRUCTIONS[thinking_mode]}{END_OF_TURN}\n"
    )
    num_leading = next((i for i, m in enumerate(messages) if m.role not in ("system", "developer")), len(messages))
    if num_leading or tools:
        yield from _render_developer(messages[:num_leading], tools)
    previous = ""
    for index, message in enumerate(messages[num_leading:], start=num_leading):
        if message.role in ("system", "developer"):
            yield from _render_developer([message], ())
        elif message.role == "user":
            yield _control(f"{BEGIN_TURN}user\n")
            yield from _render_parts(message)
            yield _control(f"{END_OF_TURN}\n")
        elif message.role == "assistant":
            yield from _render_assistant(message)
        else:
            yield _control(f"{BEGIN_TURN}tool\n<response>" if previous != "tool" else "\n<response>")
            yield from _render_parts(message)
            is_last = index + 1 == len(messages) or messages[index + 1].role != "tool"
            yield _control(f"</response>{END_OF_TURN}\n" if is_last else "</response>")
        previous = message.role
    if add_generation_prompt:
        yield _control(generation_prompt(thinking_mode))


def generation_prompt(thinking_mode: str) -> str:
    """What opens the assistant's turn; in adaptive mode the model itself chooses whether to think."""
    return f"{BEGIN_TURN}{ASSISTANT_HEADER}" + {"enabled": THINK, "disabled": END_THINK, "adaptive": ""}[thinking_mode]


def _render_parts(message: Message) -> Iterator[Segment]:
    for part in message.parts:
        if part.kind == TEXT:
            yield Segment(part.text, False)
        else:
            yield _control(IMAGE_TOKEN if part.kind == IMAGE else VIDEO_TOKEN)


def _render_developer(messages: Sequence[Message], tools: Sequence[Mapping[str, Any]]) -> Iterator[Segment]:
    yield _control(f"{BEGIN_TURN}developer\n")
    yield Segment("\n\n".join(message.text for message in messages), False)
    if tools:
        yield _control(("\n\n" if messages else "") + _TOOLS_BEFORE)
        for tool in tools:
            yield _control("<tool>")
            yield Segment(json.dumps(tool["function"], ensure_ascii=False), False)
            yield _control("</tool>\n")
        yield _control(_TOOLS_AFTER)
    yield _control(f"{END_OF_TURN}\n")


def _render_assistant(message: Message) -> Iterator[Segment]:
    yield _control(f"{BEGIN_TURN}{ASSISTANT_HEADER}")
    if message.reasoning:
        yield _control(THINK)
        yield Segment(message.reasoning, False)
    yield _control(END_THINK)
    yield Segment(message.text, False)
    if message.tool_calls:
        yield _control(f"{NAMESPACE}<tool_call>\n")
        for call in message.tool_calls:
            yield from _render_tool_call(call)
        yield _control(f"{NAMESPACE}</tool_call>")
    yield _control(f"{END_OF_TURN}\n")


def _render_tool_call(call: ToolCall) -> Iterator[Segment]:
    yield _control(f'{NAMESPACE}<invoke name="')
    yield Segment(call.name, False)
    yield _control('">')
    yield from _render_object(call.arguments)
    yield _control(f"{NAMESPACE}</invoke>\n")


def _render_object(mapping: Mapping[str, Any]) -> Iterator[Segment]:
    for key, value in mapping.items():
        if value is not None:
            yield from _render_element(key, value)


def _render_element(name: str, value: Any) -> Iterator[Segment]:
    """`<name>value</name>`, each tag after the namespace token; the name is the caller's text, not the template's."""
    yield _control(NAMESPACE)
    yield Segment(f"<{name}>", False)
    if isinstance(value, Mapping):
        yield from _render_object(value)
    elif isinstance(value, (list, tuple)):
        for item in value:
            if item is not None:
                yield from _render_element("item", item)
    else:
        yield Segment(value if isinstance(value, str) else json.dumps(value), False)
    yield _control(NAMESPACE)
    yield Segment(f"</{name}>", False)


def encode_segments(
    tokenizer: Tokenizer,
    segments: Sequence[Segment],
    images: Sequence[Expansion] = (),
    videos: Sequence[Expansion] = (),
) -> tuple[list[int], list[bool]]:
    """Token ids of a rendered prompt, and which of them the assistant wrote.

    Args:
        images, videos: what each placeholder becomes, in the order of the prompt (see placeholders.py).

    Returns:
        ids and mask of the same length; the mask is True on the assistant's turns after their header `ai`, up to and
        including the token that closes them.

    Raises:
        ValueError: placeholders and expansions differ in number, or the tokenizer lacks a token.
    """
    added = tokenizer.added_tokens
    begin_turn, end_turn = added.get(BEGIN_TURN), added.get(END_OF_TURN)
    pending = {added.get(IMAGE_TOKEN): iter(images), added.get(VIDEO_TOKEN): iter(videos)}
    pending.pop(None, None)
    found = dict.fromkeys(pending, 0)
    ids: list[int] = []
    mask: list[bool] = []
    run: list[str] = []
    in_answer = False
    turn_opened = False

    def append(new_ids: Sequence[int]) -> None:
        ids.extend(new_ids)
        mask.extend([in_answer] * len(new_ids))

    def flush() -> None:
        nonlocal in_answer, turn_opened
        text = "".join(run)
        run.clear()
        if turn_opened and text.startswith(ASSISTANT_HEADER):
            # The header is encoded alone, as it is when a generation starts after it.
            append(tokenizer.encode_plain(ASSISTANT_HEADER))
            text = text[len(ASSISTANT_HEADER) :]
            in_answer = True
        turn_opened = False
        if text:
            append(tokenizer.encode_plain(text))

    for segment in segments:
        if not segment.is_control:
            run.append(segment.text)
            continue
        for token_id, piece in tokenizer.split_special(segment.text):
            if token_id is None:
                run.append(piece)
                continue
            if token_id in pending:
                found[token_id] += 1
                for item in next(pending[token_id], ()):
                    if isinstance(item, str):
                        run.append(item)
                    else:
                        flush()
                        append([_required_id(tokenizer, item.token)] * item.count)
                continue
            flush()
            append((token_id,))
            if token_id == end_turn:
                in_answer = False
            turn_opened = token_id == begin_turn
    flush()
    for token, kind, given in ((IMAGE_TOKEN, IMAGE, images), (VIDEO_TOKEN, VIDEO, videos)):
        num_places = found.get(added.get(token), 0)
        if num_places != len(given):
            raise ValueError(
                f"{num_places} {kind} placeholders {token} in the prompt, but {len(given)} {kind}s were given"
            )
    return ids, mask


def _required_id(tokenizer: Tokenizer, token: str) -> int:
    token_id = tokenizer.added_tokens.get(token)
    if token_id is None:
        raise ValueError(f"the tokenizer has no token {token!r}, which this prompt needs")
    return token_id
