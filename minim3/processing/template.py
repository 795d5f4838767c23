"""A checkpoint's own chat template (Jinja), sandboxed, with the caller's text kept apart from the template's.

A template is one string in, one string out, so where a character came from is lost unless it can be read off the
character itself. Before rendering, every character of the caller's strings that occurs in any control token is replaced
by a private-use character of its own; after rendering, control tokens are looked for first and the characters are
changed back second. A control token is therefore found only if every one of its characters was written by the template:
typed markers, markers split over several strings, and markers completed by an argument's name all stay text.

What a template can do with the caller's text: place it, test whether it is there or a string, take its length, trim or
split it at white space, loop over it, pass it to `tojson` or `escape`. What it cannot: compare its letters with
constants (`'x' in content` is false, a search for a marker finds none) or change their case. Roles, part types, JSON
schema type names, the thinking mode and the special tokens' names are known words and stay comparable.
"""

import difflib
import html
import json
from collections.abc import Mapping, Sequence
from contextvars import ContextVar
from datetime import datetime
from functools import lru_cache
from typing import Any, NoReturn

import jinja2
import jinja2.ext
import jinja2.meta
import jinja2.nodes
import jinja2.parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from minim3.processing.chat import Segment
from minim3.processing.messages import TEXT, Message
from minim3.processing.tokenizer import Tokenizer

_PRIVATE_USE = range(0xF0000, 0xFFFFE)
# Words of JSON schemas and tool calls, which some templates compare; kept readable where no control token touches them.
_SCHEMA_WORDS = (
    "object", "array", "string", "integer", "number", "boolean", "null", "function", "name", "description",
    "parameters", "arguments", "type", "properties", "id", "required", "items", "enum", "default", "anyOf",
    "oneOf", "title", "format", "additionalProperties",
)


@lru_cache(maxsize=16)
def _readable_words(tokens: tuple[str, ...]) -> frozenset[str]:
    """The schema words that cannot be any part of a control token, not even together with text beside them."""

    def touches(word: str, token: str) -> bool:
        ends = range(1, len(word))
        return (
            word in token
            or token in word
            or any(token.startswith(word[end:]) or token.endswith(word[:end]) for end in ends)
        )

    return frozenset(word for word in _SCHEMA_WORDS if not any(touches(word, token) for token in tokens))


class _Disguise:
    """A reversible change of characters that keeps the caller's text from spelling control tokens."""

    def __init__(self, tokens: Sequence[str], taken: set[str]) -> None:
        alphabet = sorted({character for token in tokens for character in token if not character.isspace()})
        free = (chr(code) for code in _PRIVATE_USE if chr(code) not in taken)
        self._there = {ord(character): next(free) for character in alphabet}
        self._back = {ord(private): chr(code) for code, private in self._there.items()}
        self._words = _readable_words(tuple(tokens))

    def hide(self, text: str) -> str:
        return text.translate(self._there)

    def show(self, text: str) -> str:
        return text.translate(self._back)

    def _hide_word(self, text: str) -> str:
        return text if text in self._words else self.hide(text)

    def hide_json(self, value: Any) -> Any:
        """A copy of plain JSON data in which every key and string is hidden."""
        if isinstance(value, str):
            return self._hide_word(value)
        if isinstance(value, Mapping):
            return {self._hide_word(str(key)): self.hide_json(item) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            return [self.hide_json(item) for item in value]
        return value

    def show_json(self, value: Any) -> Any:
        if isinstance(value, str):
            return self.show(value)
        if isinstance(value, Mapping):
            return {self.show(str(key)): self.show_json(item) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            return [self.show_json(item) for item in value]
        return value


# The filters below need the disguise of the rendering under way; a context variable keeps threads apart.
_disguise: ContextVar[_Disguise] = ContextVar("disguise")


def _characters(value: Any) -> set[str]:
    if isinstance(value, str):
        return set(value)
    if isinstance(value, Mapping):
        return _characters(list(value)) | _characters(list(value.values()))
    if isinstance(value, (list, tuple)):
        return set().union(*(_characters(item) for item in value))
    return set()


def _raise_exception(message: object) -> NoReturn:
    raise jinja2.exceptions.TemplateError(str(message))


def _strftime_now(format: str) -> str:
    return datetime.now().strftime(format)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # The escapes of JSON depend on the true characters, so the text is shown, written and hidden again.
    disguise = _disguise.get()
    shown = disguise.show_json(value)
    return disguise.hide(
        json.dumps(shown, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
    )


def _escape(value: Any) -> str:
    disguise = _disguise.get()
    return disguise.hide(html.escape(disguise.show(str(value))))


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, jinja2.ext.loopcontrols]
    )
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    environment.filters["tojson"] = _tojson
    environment.filters["escape"] = environment.filters["e"] = _escape
    return environment


class _GenerationTag(jinja2.ext.Extension):
    """`{% generation %}...{% endgeneration %}` marks assistant text in some templates; it renders its body."""

    tags = {"generation"}  # noqa: RUF012 - the interface of jinja2 extensions

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class ChatTemplate:
    """A compiled chat template.

    Raises:
        ValueError: the source is not a valid Jinja template.
    """

    def __init__(self, source: str) -> None:
        self.source = source
        environment = _environment()
        try:
            self._template = environment.from_string(source)
            reads = jinja2.meta.find_undeclared_variables(environment.parse(source))
            self.variables = frozenset(reads - {"messages", *environment.globals})
        except jinja2.exceptions.TemplateError as error:
            raise ValueError(f"the checkpoint's chat template is not valid: {error}") from error

    def __reduce__(self) -> tuple[type["ChatTemplate"], tuple[str]]:
        # Compiled code does not travel to a worker process; its source does.
        return ChatTemplate, (self.source,)

    def render(
        self,
        tokenizer: Tokenizer,
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, Any]],
        thinking_mode: str,
        add_generation_prompt: bool,
        **variables: Any,
    ) -> list[Segment]:
        """Render checked messages; see the module's text for what the template sees.

        Raises:
            ValueError: the template refused the conversation (`raise_exception`) or failed, or never reads one of the
                `variables`: it would be dropped in silence.
        """
        for name in variables:
            if name not in self.variables:
                near = difflib.get_close_matches(name, self.variables | {"thinking_mode"}, n=1)
                known = ", ".join(sorted(self.variables)) or "none"
                reads = f"did you mean {near[0]!r}?" if near else f"it reads {known}"
                raise ValueError(f"the checkpoint's chat template has no variable {name!r}: {reads}")
        plain_messages = [_template_message(message) for message in messages]
        plain_tools = list(tools)
        taken = _characters([plain_messages, plain_tools, self.source])
        disguise = _Disguise(tuple(tokenizer.added_tokens), taken)
        special = {
            name: value if isinstance(value, str) else value.get("content", "")
            for name, value in tokenizer.config.items()
            if name in ("bos_token", "eos_token", "pad_token", "unk_token") and isinstance(value, (str, Mapping))
        }
        reset = _disguise.set(disguise)
        try:
            text = self._template.render(
                **special,
                messages=[_hide_message(message, disguise) for message in plain_messages],
                tools=disguise.hide_json(plain_tools) or None,
                thinking_mode=thinking_mode,
                add_generation_prompt=add_generation_prompt,
                **variables,
            )
        except (jinja2.exceptions.TemplateError, TypeError, ValueError, KeyError, IndexError, ArithmeticError) as error:
            raise ValueError(f"the checkpoint's chat template failed: {type(error).__name__}: {error}") from error
        finally:
            _disguise.reset(reset)
        return [
            Segment(piece, True) if token_id is not None else Segment(disguise.show(piece), False)
            for token_id, piece in tokenizer.split_special(text)
        ]


def _template_message(message: Message) -> dict[str, Any]:
    """The message in the form published templates read; media are marks without content."""
    content: Any = message.text
    if any(part.kind != TEXT for part in message.parts):
        content = [
            {"type": TEXT, "text": part.text} if part.kind == TEXT else {"type": part.kind} for part in message.parts
        ]
    plain: dict[str, Any] = {"role": message.role, "content": content}
    if message.reasoning is not None:
        plain["reasoning_content"] = message.reasoning
    if message.tool_call_id is not None:
        plain["tool_call_id"] = message.tool_call_id
    if message.tool_calls:
        plain["tool_calls"] = [
            {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
            for call in message.tool_calls
        ]
    return plain


def _hide_message(message: Mapping[str, Any], disguise: _Disguise) -> dict[str, Any]:
    hidden = dict(message)
    for key in ("reasoning_content", "tool_call_id"):
        if key in hidden:
            hidden[key] = disguise.hide(hidden[key])
    if isinstance(hidden["content"], str):
        hidden["content"] = disguise.hide(hidden["content"])
    else:
        hidden["content"] = [
            {"type": part["type"], "text": disguise.hide(part["text"])} if part["type"] == TEXT else part
            for part in hidden["content"]
        ]
    if "tool_calls" in hidden:
        hidden["tool_calls"] = disguise.hide_json(hidden["tool_calls"])
    return hidden
