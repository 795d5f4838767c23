"""Records to encoded documents, and what is wrong with the records that cannot be one.

A record is an object with `messages` (OpenAI style) or with `text`. Beside messages may stand `tools`, `thinking_mode`,
`kind`, and `images` and `videos` for the parts that only mark a place (`{"type": "image"}`), in order. A picture is a
path relative to the data file, a data URL, bytes, or an object with `bytes` or `path`; a clip is any of these, a folder
of pictures, a list of pictures, or an object with `frames` and perhaps `fps`. Field names are the recipe's
(`FieldNames`). Where a column cannot hold nested values, `messages` and `tools` may be JSON text.

A text is trained on as `]~!b[` text `[e~[`, every token but the first a target. In a conversation the targets are what
the assistant is to produce (or, with `loss_on: all`, everything but the placeholders of pictures and clips).
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from minim3.processing.messages import IMAGE, ROLES, VIDEO, Message, normalize_messages
from minim3.processing.placeholders import Expansion, process_images, process_videos
from minim3.training.batch import align_labels
from minim3.training.config import SourceRecipe
from minim3.training.packing import Document, EncodedGroup, Patches

BEGIN_DOCUMENT, END_DOCUMENT = "]~!b[", "[e~["


class RecordError(ValueError):
    """A record that cannot be trained on. `kind` is the sort of fault, the same words for the same fault."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind


@dataclass(frozen=True)
class BadRecord:
    """A record that was left out: `number` is its line (JSONL) or row (from 1) in `file`."""

    file: str
    number: int
    kind: str
    message: str

    def __str__(self) -> str:
        return f"{self.file}:{self.number}: {self.kind}: {self.message}"


class DocumentEncoder:
    """Groups and records to token ids, labels and patches, with the processor of a recipe.

    Args:
        processor: a `MiniMaxM3VLProcessor`; for groups anything with `encode_conversation` and `image_processor`.
        max_tokens: a record that makes more is "too long".
    """

    def __init__(self, processor: Any, max_tokens: int) -> None:
        self.processor = processor
        self.max_tokens = max_tokens

    # --- groups of numbered sources ------------------------------------------------------------------------------

    def encode_group(self, group: Any, source: SourceRecipe) -> EncodedGroup:
        """The samples of a group, with its pictures and clips."""
        images, clips, clip_expansions = [], [], []
        tokens_per_image: list[int] = []
        if group.images:
            processed = self.processor.image_processor(images=list(group.images))
            images = _split(processed["pixel_values"], processed["image_grid_thw"])
            tokens_per_image = _num_tokens(images, self.processor.image_processor.merge_size)
        for clip in getattr(group, "videos", ()):
            patches, expansion = self._clip(clip.frames, clip.fps)
            clips.append(patches)
            clip_expansions.append(expansion)
        documents = []
        for sample in group.samples:
            video_indices = tuple(getattr(sample, "video_indices", ()))
            settings = {name: getattr(sample, name, None) for name in ("tools", "thinking_mode")}
            if video_indices:
                settings["video_expansions"] = [clip_expansions[index] for index in video_indices]
            ids, loss_mask = self.processor.encode_conversation(
                sample.messages,
                num_image_tokens=[tokens_per_image[image] for image in sample.image_indices],
                **{name: value for name, value in settings.items() if value is not None},
            )
            if source.loss_on == "all":
                loss_mask = self._all_but_placeholders(ids)
            kind = getattr(sample, "kind", "") or source.kind or _kind(sample.image_indices, video_indices)
            input_ids, labels = align_labels(ids, loss_mask)
            documents.append(Document(input_ids, labels, kind, tuple(sample.image_indices), video_indices))
        return EncodedGroup(documents, images, clips)

    def _clip(self, clip: Any, fps: float | None) -> tuple[Patches, Expansion]:
        metadata = None if fps is None else [{"fps": fps}]
        tensors, expansions = process_videos(self.processor.video_processor, [clip], metadata)
        values, grid = tensors["pixel_values_videos"], tensors["video_grid_thw"]
        return Patches(values.numpy(), grid.numpy()), expansions[0]

    def _all_but_placeholders(self, ids: Sequence[int]) -> list[bool]:
        placeholders = {getattr(self.processor, name, None) for name in ("image_token_id", "video_token_id")}
        return [token not in placeholders for token in ids]

    # --- records -------------------------------------------------------------------------------------------------

    def encode_record(self, record: Any, source: SourceRecipe, folder: Path) -> EncodedGroup:
        """One record as a group of one document; paths in it are relative to `folder`.

        Raises:
            RecordError: it cannot be trained on.
        """
        if not isinstance(record, Mapping):
            raise RecordError("not an object", f"a record is an object with fields, this is a {_name(record)}")
        fields = source.fields
        messages, text = record.get(fields.messages), record.get(fields.text)
        if messages is None and text is None:
            present = ", ".join(sorted(map(str, record))[:8]) or "none"
            raise RecordError("no text", f"neither {fields.messages!r} nor {fields.text!r} is there; fields: {present}")
        kind = record.get(fields.kind) or source.kind
        if messages is None:
            group = self._encode_text(text, kind, split=source.split_long_texts)
        else:
            group = self._encode_messages(messages, record, source, folder, kind)
        longest = max(len(document.input_ids) for document in group.documents)
        if longest > self.max_tokens:
            raise RecordError("too long", f"{longest} tokens; data.tokens_per_batch is {self.max_tokens}")
        return group

    def _encode_text(self, text: Any, kind: Any, *, split: bool) -> EncodedGroup:
        if not isinstance(text, str) or not text.strip():
            raise RecordError("no text", f"the text is {'empty' if isinstance(text, str) else 'a ' + _name(text)}")
        tokenizer = self.processor.tokenizer
        begin, end = tokenizer.token_to_id(BEGIN_DOCUMENT), tokenizer.token_to_id(END_DOCUMENT)
        if begin is None or end is None:
            raise ValueError(f"the tokenizer lacks {BEGIN_DOCUMENT!r} or {END_DOCUMENT!r}, which delimit a text")
        try:
            ids = [begin, *tokenizer.encode_plain(text), end]
        except ValueError as error:
            raise RecordError("no text", str(error)) from error
        length = self.max_tokens if split else len(ids)
        # Pieces overlap by a token, so that every token but the first is a target once.
        pieces = [ids[start : start + length] for start in range(0, len(ids) - 1, max(1, length - 1))]
        aligned = [align_labels(piece, [True] * len(piece)) for piece in pieces]
        return EncodedGroup([Document(*one, str(kind or "text")) for one in aligned])

    def _encode_messages(
        self, messages: Any, record: Mapping[str, Any], source: SourceRecipe, folder: Path, kind: Any
    ) -> EncodedGroup:
        fields = source.fields
        raw = [_rename(message, source) for message in _list(_parsed(messages, fields.messages), fields.messages)]
        conversation = _check_conversation(raw, source)
        tools = _parsed(record.get(fields.tools), fields.tools)
        images, num_image_tokens = self._images(_media(conversation, IMAGE, record.get(fields.images), folder))
        clips, clip_expansions = self._clips(_media(conversation, VIDEO, record.get(fields.videos), folder))
        try:
            ids, loss_mask = self.processor.encode_conversation(
                raw,
                tools=tools or None,
                thinking_mode=record.get(fields.thinking_mode),
                num_image_tokens=num_image_tokens,
                video_expansions=clip_expansions,
            )
        except (ValueError, TypeError) as error:  # TypeError: a value that JSON cannot hold, from a Parquet column
            raise RecordError("messages", str(error)) from error
        if source.loss_on == "all":
            loss_mask = self._all_but_placeholders(ids)
        input_ids, labels = align_labels(ids, loss_mask)
        indices = tuple(range(len(images))), tuple(range(len(clips)))
        return EncodedGroup([Document(input_ids, labels, str(kind or _kind(*indices)), *indices)], images, clips)

    def _images(self, pictures: Sequence[Any]) -> tuple[list[Patches], list[int]]:
        if not pictures:
            return [], []
        try:
            tensors, _ = process_images(self.processor.image_processor, list(pictures))
        except ValueError as error:
            raise RecordError("picture", str(error)) from error
        patches = _split(tensors["pixel_values"], tensors["image_grid_thw"])
        return patches, _num_tokens(patches, self.processor.image_processor.merge_size)

    def _clips(self, clips: Sequence[Any]) -> tuple[list[Patches], list[Expansion]]:
        patches, expansions = [], []
        for clip in clips:
            fps = None
            if isinstance(clip, Mapping):
                clip, fps = clip["frames"], clip.get("fps")
            try:
                found, expansion = self._clip(clip, fps)
            except (ValueError, TypeError) as error:  # TypeError: an fps that is no number
                raise RecordError("clip", str(error)) from error
            patches.append(found)
            expansions.append(expansion)
        return patches, expansions


def _kind(image_indices: Sequence[int], video_indices: Sequence[int]) -> str:
    return "clips" if video_indices else "pictures" if image_indices else "text"


def _name(value: Any) -> str:
    return "null" if value is None else type(value).__name__


def _split(values: torch.Tensor, grid: torch.Tensor) -> list[Patches]:
    """The patches of each picture; `grid` holds a row for each."""
    parts = values.split(grid.prod(dim=-1).tolist())
    return [Patches(part.numpy(), row[None].numpy()) for part, row in zip(parts, grid)]


def _num_tokens(patches: Sequence[Patches], merge_size: int) -> list[int]:
    return [int(one.grid.prod(axis=-1).sum()) // merge_size**2 for one in patches]


def _parsed(value: Any, name: str) -> Any:
    """The value, or what its JSON text holds."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError) as error:
        raise RecordError("broken JSON", f"{name} is text, but not JSON: {error}") from error


def _list(value: Any, name: str) -> list[Any]:
    if not isinstance(value, list | tuple):
        raise RecordError("messages", f"{name} must be a list, not a {_name(value)}")
    return list(value)


def _rename(message: Any, source: SourceRecipe) -> Any:
    """The message with the recipe's names for `role`, `content` and the roles replaced by ours."""
    if not isinstance(message, Mapping):
        return message
    fields = source.fields
    renamed = dict(message)
    for ours, theirs in (("role", fields.role), ("content", fields.content)):
        if ours != theirs and theirs in renamed:
            renamed[ours] = renamed.pop(theirs)
    role = renamed.get("role")
    if isinstance(role, str):
        renamed["role"] = source.roles.get(role, role)
    return renamed


def _check_conversation(messages: list[Any], source: SourceRecipe) -> list[Message]:
    for index, message in enumerate(messages):
        role = message.get("role") if isinstance(message, Mapping) else None
        if isinstance(message, Mapping) and (not isinstance(role, str) or role not in ROLES):
            raise RecordError("unknown role", f"messages[{index}] has role {role!r}; known roles: {', '.join(ROLES)}")
    for index, message in enumerate(messages):
        if isinstance(message, Mapping) and message["role"] == "assistant" and _is_silent(message):
            raise RecordError("empty assistant", f"messages[{index}] says nothing and calls no tool")
    try:
        conversation = normalize_messages(messages)
    except ValueError as error:
        raise RecordError("messages", str(error)) from error
    if source.loss_on == "assistant" and not any(message.role == "assistant" for message in conversation):
        raise RecordError("empty assistant", "no message of the assistant: there is nothing to learn")
    return conversation


def _is_silent(message: Mapping[str, Any]) -> bool:
    content = message.get("content")
    if isinstance(content, list | tuple):
        texts = [part.get("text") if isinstance(part, Mapping) else part for part in content]
        content = "".join(text for text in texts if isinstance(text, str))
    has_text = isinstance(content, str) and bool(content.strip())
    return not has_text and not message.get("tool_calls")


def _media(conversation: Sequence[Message], kind: str, beside: Any, folder: Path) -> list[Any]:
    """The pictures or clips of a conversation in order, from its parts or from the list beside the messages."""
    fault = "picture" if kind == IMAGE else "clip"
    waiting = list(beside) if isinstance(beside, list | tuple) else [] if beside is None else [beside]
    parts = [part.media for message in conversation for part in message.parts if part.kind == kind]
    num_places = sum(media is None for media in parts)
    if num_places != len(waiting):
        raise RecordError(fault, f"{num_places} {kind} parts wait for a {fault}, but {len(waiting)} stand beside them")
    given = iter(waiting)
    resolve = _picture if kind == IMAGE else _video
    return [resolve(next(given) if media is None else media, folder) for media in parts]


def _picture(media: Any, folder: Path) -> Any:
    """A source that the processors read: an absolute path, bytes, a data URL, or what it was."""
    if isinstance(media, Mapping):
        data, path = media.get("bytes"), media.get("path")
        if data is None and path is None:
            raise RecordError("picture", f"an object has bytes or path, this one has {', '.join(map(str, media))}")
        media = path if data is None else data
    if isinstance(media, str) and not media.startswith("data:") and "://" not in media[:20]:
        return str(folder / Path(media).expanduser())
    return media


def _video(media: Any, folder: Path) -> Any:
    if isinstance(media, Mapping) and media.get("frames") is not None:
        return {"frames": _frames(media["frames"], folder), "fps": media.get("fps")}
    if isinstance(media, list | tuple):
        return _frames(media, folder)
    return _picture(media, folder)


def _frames(frames: Any, folder: Path) -> list[Any]:
    if not isinstance(frames, list | tuple):
        raise RecordError("clip", f"frames must be a list of pictures, not a {_name(frames)}")
    return [_picture(frame, folder) for frame in frames]


def check_processor(processor: Any, sources: Sequence[SourceRecipe]) -> None:
    """Raises ValueError when the recipe reads records, but its processor is not one that can encode them."""
    if any(source.name is None for source in sources) and not hasattr(processor, "tokenizer"):
        raise ValueError(f"data.processor gives a {type(processor).__name__}; files and datasets need a tokenizer")
