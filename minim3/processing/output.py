"""Generated token ids to reasoning, content and tool calls, one-shot and streaming by the same state machine.

The machine starts from the thinking mode of the generation prompt, never from a search through the prompt, which may
hold any marker. It reads one token after another, so where a stream is cut makes no difference.

Markers are told by id. Text that merely looks like a marker, which the model writes when it talks about the format, is
text. Only for a marker that the tokenizer does not have as a token is the text itself searched; then it counts at the
places where it has a meaning and stays content elsewhere. A marker token without meaning at its place (a second
`</mm:think>`) is left out.

Tags of a tool call count only directly after the namespace marker, so values need no escapes.
"""

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import Enum, auto
from typing import Any

from minim3.processing.chat import END_THINK, NAMESPACE, THINK, check_thinking_mode
from minim3.processing.detokenizer import IncrementalDetokenizer, held_back
from minim3.processing.messages import ToolCall
from minim3.processing.tokenizer import END_OF_TURN, Tokenizer
from minim3.processing.tool_arguments import Element, Schema, Schemas, joined

_MARKERS = (THINK, END_THINK, NAMESPACE)
_OPEN_CALLS, _CLOSE_CALLS, _CLOSE_INVOKE = "<tool_call>", "</tool_call>", "</invoke>"
_INVOKE = re.compile(r"""<invoke\s+name\s*=\s*(["']?)([^"'<>]+?)\1\s*/?>""")
_TAG_STARTS = (_OPEN_CALLS, "<invoke ")
_MAX_TAG_CHARACTERS = 256
_MAX_DEPTH = 64


@dataclass(frozen=True, slots=True)
class ToolCallDelta:
    """News of one tool call: its id and name when it begins, then pieces of its arguments as JSON text."""

    index: int
    id: str | None = None
    name: str | None = None
    arguments: str = ""


@dataclass(frozen=True, slots=True)
class OutputDelta:
    """What new tokens added; false when they added nothing that can be shown yet."""

    reasoning: str = ""
    content: str = ""
    tool_calls: tuple[ToolCallDelta, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.reasoning or self.content or self.tool_calls)


@dataclass(frozen=True, slots=True)
class ParsedOutput:
    """A parsed answer. `finish_reason`: "stop", "length", or "tool_calls" where complete calls await their results."""

    reasoning: str | None
    content: str
    tool_calls: tuple[ToolCall, ...]
    finish_reason: str


class _State(Enum):
    START = auto()  # adaptive thinking, nothing written yet
    REASONING = auto()
    CONTENT = auto()
    CALLS = auto()


class OutputParser:
    """Parses one answer.

    Args:
        tokenizer: None to parse text that is already decoded, with `feed_text` only.
        thinking_mode: that of the generation prompt: enabled (`<mm:think>` was its end), disabled (`</mm:think>`) or
            adaptive (neither; the default).
        tools: the tools of the request; arguments are converted to the types of their schemas.
        make_id: the id of the i-th tool call of this answer.
    """

    def __init__(
        self,
        tokenizer: Tokenizer | None,
        thinking_mode: str | None = None,
        tools: Sequence[Mapping[str, Any]] | None = None,
        *,
        make_id: Callable[[int], str] = "call_{}".format,
    ) -> None:
        mode = check_thinking_mode(thinking_mode)
        self._state = {"enabled": _State.REASONING, "disabled": _State.CONTENT, "adaptive": _State.START}[mode]
        self._schemas = Schemas(tools)
        self._make_id = make_id
        added = {} if tokenizer is None else tokenizer.added_tokens
        self._marker_of_id = {added[marker]: marker for marker in _MARKERS if marker in added}
        self._text_markers = tuple(marker for marker in _MARKERS if marker not in added)
        self._unscanned = ""
        self._detokenizer = None if tokenizer is None else IncrementalDetokenizer(tokenizer, skip_special_tokens=False)
        self._end_ids: frozenset[int] = frozenset()
        self._silent_ids: frozenset[int] = frozenset()
        if tokenizer is not None:
            self._end_ids = frozenset((*tokenizer.eos_token_ids, added.get(END_OF_TURN, -1)))
            tags = {added.get(_OPEN_CALLS), added.get(_CLOSE_CALLS)}
            self._silent_ids = tokenizer.special_ids - tags
        self.ended = False
        """Whether the token that ends a turn was seen; what follows it is ignored."""

        self._tag: str | None = None  # text after a namespace marker, until its ">"
        self._tag_is_token = False
        self._space = ""  # white space at the end of the content, left out next to tool calls
        self._after_calls = False
        self._calls: list[ToolCall] = []
        self._call: ToolCall | None = None
        self._elements: list[Element] = []
        self._argument: tuple[str, list[Any], Schema] | None = None
        self._reasoning: list[str] = []
        self._content: list[str] = []
        self._delta_reasoning: list[str] = []
        self._delta_content: list[str] = []
        self._delta_calls: list[ToolCallDelta] = []

    @property
    def white_space(self) -> str:
        """White space at the end of the content so far: part of it only if more content follows."""
        return self._space if self._state is _State.CONTENT and not self._after_calls and self._tag is None else ""

    # --- input ---------------------------------------------------------------------------------------------------

    def feed(self, ids: Iterable[int] | int) -> OutputDelta:
        """Parse further token ids."""
        assert self._detokenizer is not None, "a parser without a tokenizer takes text"
        for token_id in (ids,) if isinstance(ids, int) else ids:
            if self.ended:
                break
            if token_id in self._marker_of_id:
                self._scan(self._detokenizer.finish())
                self._scan_rest()
                self._marker(self._marker_of_id[token_id], is_token=True)
            elif token_id in self._end_ids:
                self.ended = True
            elif token_id not in self._silent_ids:
                self._scan(self._detokenizer.feed(token_id))
        return self._take_delta()

    def feed_text(self, text: str) -> OutputDelta:
        """Parse further text, in which the markers themselves are text."""
        if not self.ended:
            self._scan(text)
        return self._take_delta()

    def finish(self) -> OutputDelta:
        """End of the answer, wherever it was cut: what was held back comes out, an open tool call is closed."""
        if self._detokenizer is not None:
            self._scan(self._detokenizer.finish())
        self._scan_rest()
        if self._tag is not None and self._is_cut_tag(self._tag):
            self._tag = None
        self._flush_tag()
        if self._call is not None:
            self._close_call(complete=False)
        elif self._state in (_State.START, _State.CONTENT) and self._space and not self._after_calls:
            self._emit_content(self._space)
            self._space = ""
        self.ended = True
        return self._take_delta()

    def result(self, finish_reason: str = "stop") -> ParsedOutput:
        """Everything parsed so far, the sum of all deltas. `finish_reason` is why generation ended: stop or length."""
        calls = tuple(self._calls)
        if finish_reason == "stop" and calls and all(call.complete for call in calls):
            finish_reason = "tool_calls"
        return ParsedOutput("".join(self._reasoning) or None, "".join(self._content), calls, finish_reason)

    # --- markers written as text -----------------------------------------------------------------------------------

    def _scan(self, text: str) -> None:
        """Find the markers that are not tokens in the text, holding back what may become one."""
        if not self._text_markers:
            self._text(text)
            return
        text = self._unscanned + text
        while True:
            found = [(start, marker) for marker in self._text_markers if (start := text.find(marker)) >= 0]
            if not found:
                break
            start, marker = min(found)
            self._text(text[:start])
            self._marker(marker, is_token=False)
            text = text[start + len(marker) :]
        length = held_back(text, self._text_markers)
        self._unscanned = text[len(text) - length :]
        self._text(text[: len(text) - length])

    def _scan_rest(self) -> None:
        text, self._unscanned = self._unscanned, ""
        self._text(text)

    # --- the state machine -----------------------------------------------------------------------------------------

    def _marker(self, marker: str, is_token: bool) -> None:
        self._flush_tag()
        has_meaning = {THINK: self._begin_thinking, END_THINK: self._end_thinking, NAMESPACE: self._begin_tag}[marker]
        if not has_meaning(is_token) and not is_token:
            self._text(marker)

    def _begin_thinking(self, is_token: bool) -> bool:
        if self._state is _State.CALLS:
            return False
        if self._state is _State.REASONING:
            return not self._reasoning  # the model repeats the prompt's marker
        if self._content and not is_token:
            return False
        self._state = _State.REASONING
        self._space = ""
        return True

    def _end_thinking(self, is_token: bool) -> bool:
        if self._state is _State.CALLS:
            return False
        if self._state is _State.CONTENT:
            return not self._content  # the model repeats the prompt's marker
        self._state = _State.CONTENT
        self._space = ""
        return True

    def _begin_tag(self, is_token: bool) -> bool:
        if self._state is _State.REASONING and not is_token:
            return False
        self._tag, self._tag_is_token = "", is_token
        return True

    def _flush_tag(self) -> None:
        """The text after a namespace marker is no tag."""
        if self._tag is not None:
            text, self._tag = ("" if self._tag_is_token else NAMESPACE) + self._tag, None
            self._text(text)

    def _is_cut_tag(self, tag: str) -> bool:
        """Whether the answer ended inside a tag, as opposed to after text that only looks like the marker."""
        return self._tag_is_token or (tag != "" and any(start.startswith(tag[: len(start)]) for start in _TAG_STARTS))

    def _text(self, text: str) -> None:
        if not text:
            return
        if self._tag is not None:
            text = self._read_tag(text)
            if not text:
                return
        if self._state is _State.REASONING:
            self._emit_reasoning(text)
        elif self._state is _State.CALLS:
            if self._elements:
                self._elements[-1].text.append(text)
        else:
            self._content_text(text)

    def _content_text(self, text: str) -> None:
        text = self._space + text
        body = text.rstrip()
        self._space = text[len(body) :]
        if body:
            self._state = _State.CONTENT
            self._after_calls = False
            self._emit_content(body)

    def _read_tag(self, text: str) -> str:
        """Add to the tag under way, one character at a time so that cuts make no difference; returns the rest."""
        assert self._tag is not None
        for position, character in enumerate(text):
            self._tag += character
            if self._tag[0] != "<" or character == "\n" or len(self._tag) > _MAX_TAG_CHARACTERS:
                self._flush_tag()
                return text[position + 1 :]
            if character == ">":
                tag, self._tag = self._tag, None
                if not self._structure(tag):
                    self._text(tag if self._tag_is_token else NAMESPACE + tag)
                return text[position + 1 :]
        return ""

    def _structure(self, tag: str) -> bool:
        """Act on a tag of the tool-call block; False if it has no meaning here and is text."""
        invoke = _INVOKE.fullmatch(tag)
        if self._state is not _State.CALLS:
            if tag != _OPEN_CALLS and not invoke:
                return False
            self._state = _State.CALLS
            self._space = ""
        name = tag[1:-1].removeprefix("/")
        if tag[1] == "/" and any(element.name == name for element in self._elements):
            while self._close_element().name != name:
                pass  # a forgotten end tag inside
        elif invoke or tag in (_CLOSE_CALLS, _CLOSE_INVOKE):
            if self._call is not None:
                self._close_call(complete=not self._elements)
            if invoke:
                self._open_call(invoke.group(2))
                if tag.endswith("/>"):
                    self._close_call(complete=True)
            elif tag == _CLOSE_CALLS:
                self._state = _State.CONTENT
                self._after_calls = True
        elif self._call is not None and tag[1] != "/":
            if len(self._elements) >= _MAX_DEPTH:
                return False
            empty, name = name.endswith("/"), name.removesuffix("/").rstrip()
            if not self._elements and self._argument is not None and self._argument[0] != name:
                self._emit_argument()
            above = self._elements[-1].schema if self._elements else self._schemas.of(self._call.name)
            self._elements.append(Element(name, above.child(name)))
            if empty:
                self._close_element()
        return True

    # --- tool calls ------------------------------------------------------------------------------------------------

    def _open_call(self, name: str) -> None:
        self._call = ToolCall(name, {}, self._make_id(len(self._calls)))
        self._delta_calls.append(ToolCallDelta(len(self._calls), self._call.id, name))

    def _close_element(self) -> Element:
        assert self._call is not None
        element = self._elements.pop()
        value = element.value()
        if self._elements:
            self._elements[-1].children.append((element.name, value))
        elif self._argument is not None and self._argument[0] == element.name:
            self._argument[1].append(value)
        else:
            self._argument = (element.name, [value], element.schema)
        return element

    def _emit_argument(self) -> None:
        """The argument that was closed last: an element of the same name right behind it would have made it a list.

        One that comes back later has been sent already: the later value counts, as for readers of JSON.
        """
        if self._argument is None:
            return
        assert self._call is not None
        (name, values, schema), self._argument = self._argument, None
        value = joined(values, schema)
        fragment = f"{json.dumps(name, ensure_ascii=False)}: {json.dumps(value, ensure_ascii=False)}"
        self._emit_arguments(("{" if not self._call.arguments else ", ") + fragment)
        self._call.arguments[name] = value

    def _close_call(self, complete: bool) -> None:
        """End the call under way. An argument that was cut off is left out: half a value is not a value."""
        assert self._call is not None
        self._elements.clear()
        self._emit_argument()
        self._emit_arguments("}" if self._call.arguments else "{}")
        self._calls.append(replace(self._call, complete=complete))
        self._call = None

    # --- output ----------------------------------------------------------------------------------------------------

    def _emit_reasoning(self, text: str) -> None:
        self._reasoning.append(text)
        self._delta_reasoning.append(text)

    def _emit_content(self, text: str) -> None:
        self._content.append(text)
        self._delta_content.append(text)

    def _emit_arguments(self, text: str) -> None:
        self._delta_calls.append(ToolCallDelta(len(self._calls), arguments=text))

    def _take_delta(self) -> OutputDelta:
        if not (self._delta_reasoning or self._delta_content or self._delta_calls):
            return OutputDelta()
        delta = OutputDelta("".join(self._delta_reasoning), "".join(self._delta_content), tuple(self._delta_calls))
        self._delta_reasoning.clear()
        self._delta_content.clear()
        self._delta_calls.clear()
        return delta


def parse_output(
    ids: Iterable[int],
    tokenizer: Tokenizer,
    thinking_mode: str | None = None,
    tools: Sequence[Mapping[str, Any]] | None = None,
    *,
    finish_reason: str = "stop",
) -> ParsedOutput:
    """Parse a whole answer at once; the arguments are those of `OutputParser`."""
    parser = OutputParser(tokenizer, thinking_mode, tools)
    parser.feed(ids)
    parser.finish()
    return parser.result(finish_reason)
