"""JSONL files of evaluation tasks: one JSON object a line, checked as it is read; errors name file and line."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from minim3.inference.request import Media
from minim3.processing.processor import MiniMaxM3VLProcessor

_PROMPT_FIELDS = ("prompt", "question", "messages", "system", "tools", "image", "images", "video", "videos")


@dataclass(frozen=True)
class Record:
    """One line of a file."""

    path: Path
    line: int
    fields: Mapping[str, Any]

    def error(self, message: str) -> ValueError:
        """A ValueError that names the place."""
        return ValueError(f"{self.path}:{self.line}: {message}")

    def need(self, name: str, what: str) -> ValueError:
        """The same for a field that is missing."""
        found = ", ".join(map(str, self.fields)) or "no fields"
        return self.error(f'needs "{name}" ({what}); the line has {found}')


@dataclass(frozen=True)
class Prompt:
    """What a model reads before it answers."""

    ids: list[int]
    media: Media | None = None


def read_records(path: Path, limit: int | None = None) -> Iterator[Record]:
    """The records of a JSONL file, the first `limit` of them; empty lines are passed over.

    Raises:
        ValueError: a line that is no JSON object, a file without any, text that is not UTF-8.
        OSError: no such file.
    """
    found = False
    for record in islice(_read_all(path), limit):
        found = True
        yield record
    if not found and limit != 0:
        raise ValueError(f"{path} is empty: one JSON object a line is needed")


def _read_all(path: Path) -> Iterator[Record]:
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                fields = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
            except UnicodeDecodeError as error:
                raise ValueError(f"{path}:{number}: not UTF-8 text ({error.reason})") from error
            except json.JSONDecodeError as error:
                raise ValueError(
                    f"{path}:{number}: broken JSON ({error.msg} at column {error.colno}); one object a line is needed"
                ) from error
            if not isinstance(fields, dict):
                raise ValueError(f"{path}:{number}: a JSON object is needed, this is a {type(fields).__name__}")
            yield Record(path, number, fields)


def encode_prompt(
    record: Record, processor: MiniMaxM3VLProcessor, text_field: str, *, raw: bool, thinking: str | None = None
) -> Prompt:
    """The prompt of a record: its "messages", or its text in a user turn (with "system", "images", "videos", "tools").

    text_field: the name of the text where there are no messages. raw: the text as it stands, without the chat format.
    Paths of pictures and clips are relative to the file. Raises ValueError that names file and line.
    """
    if raw:
        return Prompt(_raw_ids(record, processor, text_field))
    messages = _messages(record, text_field)
    tools = record.fields.get("tools")
    if tools is not None and not isinstance(tools, list):
        raise record.error(f'"tools" must be a list, got {type(tools).__name__}')
    try:
        inputs = processor.apply_chat_template(messages, tools=tools, thinking_mode=thinking)
    except (ValueError, OSError) as error:
        raise record.error(str(error)) from error
    media = Media(**{name: inputs.get(name) for name in Media.__dataclass_fields__ if name != "features"})
    return Prompt(inputs["input_ids"][0].tolist(), None if media.empty else media)


def _raw_ids(record: Record, processor: MiniMaxM3VLProcessor, text_field: str) -> list[int]:
    chat_only = [name for name in _PROMPT_FIELDS if name != text_field and record.fields.get(name) is not None]
    if chat_only:
        raise record.error(f'--raw takes "{text_field}" as it stands; "{chat_only[0]}" needs the chat format')
    return processor.tokenizer.encode(text_of(record, text_field), allow_special=True)


def text_of(record: Record, name: str) -> str:
    """A field that must be text."""
    text = record.fields.get(name)
    if text is None:
        raise record.need(name, "text")
    if not isinstance(text, str):
        raise record.error(f'"{name}" must be text, got {type(text).__name__}')
    return text


def _messages(record: Record, text_field: str) -> list[dict[str, Any]]:
    messages = record.fields.get("messages")
    if messages is None:
        if record.fields.get(text_field) is None:
            raise record.need(text_field, 'text, or "messages" in its place')
        content: list[dict[str, Any]] = []
        for kind in ("image", "video"):
            content += [{"type": kind, kind: one} for one in _listed(record, kind)]
        content.append({"type": "text", "text": text_of(record, text_field)})
        messages = [{"role": "user", "content": content}]
        if record.fields.get("system") is not None:
            messages.insert(0, {"role": "system", "content": text_of(record, "system")})
    elif record.fields.get(text_field) is not None:
        raise record.error(f'both "messages" and "{text_field}" are given: pass one')
    elif not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
        raise record.error('"messages" must be a list of objects with "role" and "content"')
    return [_with_paths(record, message) for message in messages]


def _listed(record: Record, kind: str) -> list[str]:
    """Paths under "image" (one) or "images" (a list)."""
    one, several = record.fields.get(kind), record.fields.get(f"{kind}s")
    paths = [*([] if one is None else [one] if isinstance(one, str) else one), *([] if several is None else several)]
    if not all(isinstance(path, str) for path in paths):
        raise record.error(f'"{kind}s" must be a list of paths')
    return paths


def _with_paths(record: Record, message: dict[str, Any]) -> dict[str, Any]:
    """The message with relative paths of media taken from the file's folder."""
    content = message.get("content")
    if not isinstance(content, list):
        return message
    return {**message, "content": [_with_path(record, part) for part in content]}


def _with_path(record: Record, part: Any) -> Any:
    kind = part.get("type") if isinstance(part, dict) else None
    if not isinstance(kind, str) or not kind.startswith(("image", "video")):
        return part
    names = [name for name in (kind, "url", "path") if part.get(name) is not None]
    if not names:
        return part  # the processor says what is missing
    given = part[names[0]]
    nested = isinstance(given, dict)
    source = given.get("url") if nested else given
    if not isinstance(source, str) or source.startswith(("data:", "http://", "https://", "file://")):
        return part
    path = record.path.parent / Path(source).expanduser()
    if not path.is_file():
        raise record.error(f"{kind.removesuffix('_url')} {source} does not exist ({path})")
    return {**part, names[0]: {**given, "url": str(path)} if nested else str(path)}
