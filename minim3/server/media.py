"""The pictures, clips and files of a request, loaded before anything else sees them.

What a client sends is hostile until it is decoded: counts are checked before anything is read, sizes before anything is
decoded, and a picture or frame is brought to the model's size at once, so that what waits in memory is small. Decoding
runs in worker threads, under one time limit for the whole request. Files of this machine are never read, and URLs only
where the settings say so (urls.py).
"""

import asyncio
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from typing import Any
from urllib.parse import unquote_to_bytes

import torch

from minim3.processing.image import MiniMaxM3VLImageProcessor
from minim3.processing.media import describe_source, load_picture, open_source
from minim3.processing.patches import PatchProcessor, resize_bicubic
from minim3.processing.processor import MiniMaxM3VLProcessor
from minim3.processing.video import MiniMaxM3VLVideoProcessor, sample_frame_indices
from minim3.processing.video_file import SampledClip, read_video_file
from minim3.server.errors import BadRequest
from minim3.server.settings import ServerSettings
from minim3.server.urls import fetch

# What a stranger's picture may be: fewer decoders than Pillow has, each known by its first bytes.
_PICTURES = {
    b"\x89PNG\r\n\x1a\n": "PNG", b"\xff\xd8\xff": "JPEG", b"GIF87a": "GIF", b"GIF89a": "GIF", b"BM": "BMP",
}  # fmt: skip
_KINDS = "PNG, JPEG, WebP, GIF, BMP and AVIF"
# A progressive JPEG is drawn in about ten scans. Each scan visits every block again, so thousands of them, a few bytes
# each, keep a decoder busy for hours.
_MAX_SCANS = 200
_START_OF_SCAN = b"\xff\xda"
_TEXT_TYPES = ("text/", "application/json", "application/xml", "application/yaml", "application/x-yaml")
_CHARACTERS_PER_TOKEN = 16
_SOUND = ("input_audio", "audio_url", "audio")


@dataclass(frozen=True, slots=True)
class _Source:
    """One picture, clip or file of a request: where it stands, what it should be, and the URL it is behind."""

    message: int
    part: int
    kind: str  # image, video or file
    url: str
    name: str = ""

    @property
    def param(self) -> str:
        return f"messages[{self.message}].content[{self.part}]"


async def load_media(
    messages: Sequence[Mapping[str, Any]],
    settings: ServerSettings,
    *,
    processor: MiniMaxM3VLProcessor | None = None,
    workers: Executor | None = None,
    max_tokens: int | None = None,
) -> list[dict[str, Any]]:
    """A conversation with its media loaded, for `apply_chat_template`: pictures as uint8 tensors [3, height, width],
    clips as `SampledClip` with their times, text files as text. Everything else in the messages is left as it is.

    Args:
        processor: whose sizes and frame rates count; None takes the released model's.
        workers: threads to decode in; None: the event loop's own.
        max_tokens: of all media together, beside `settings.max_media_tokens`.

    Raises:
        BadRequest: too many media, too large, of a kind that is not taken, broken, not to be fetched, more tokens than
            allowed, or slower than `settings.media_seconds`.
    """
    loaded = [dict(message) if isinstance(message, Mapping) else message for message in messages]
    sources = _find_sources(loaded)
    _check_counts(sources, settings)
    if not sources:
        return loaded
    for index in {source.message for source in sources}:
        loaded[index]["content"] = list(loaded[index]["content"])
    limits = [limit for limit in (settings.max_media_tokens, max_tokens) if limit is not None]
    loader = _Loader(settings, processor, min(limits) if limits else None)
    loop = asyncio.get_running_loop()
    try:
        async with asyncio.timeout(settings.media_seconds):
            for source in sources:
                data: bytes | None = None
                if source.url[:8].lower().startswith(("http://", "https://")):
                    data = await fetch(source.url, settings, max_bytes=settings.max_media_bytes)
                part = await loop.run_in_executor(workers, loader.load, source, data)
                loaded[source.message]["content"][source.part] = part
    except TimeoutError:
        raise BadRequest(
            f"loading the media took longer than the limit of {settings.media_seconds:g} seconds",
            param="messages",
            code="media_timeout",
        ) from None
    return loaded


def _find_sources(messages: Sequence[Mapping[str, Any]]) -> list[_Source]:
    sources = []
    for index, message in enumerate(messages):
        content = message.get("content") if isinstance(message, Mapping) else None
        if not isinstance(content, list):
            continue
        for place, part in enumerate(content):
            if isinstance(part, Mapping):
                source = _read_part(part, index, place)
                if source is not None:
                    sources.append(source)
    return sources


def _read_part(part: Mapping[str, Any], message: int, place: int) -> _Source | None:
    """What a part refers to; None for text, and for what is no part at all (the renderer complains about that)."""
    kind = part.get("type")
    param = f"messages[{message}].content[{place}]"
    if not isinstance(kind, str):
        return None
    if kind in _SOUND:
        raise BadRequest(f"{kind}: this model does not hear", param=param, code="unsupported_media")
    if kind in ("file", "input_file"):
        return _read_file(part, message, place, param)
    wanted = {"image_url": "image", "input_image": "image", "image": "image", "video_url": "video", "video": "video"}
    if kind not in wanted:
        return None
    url: Any = part.get({"input_image": "image_url"}.get(kind, kind))
    if url is None and kind in ("image", "video"):
        url = part.get("url")
    if isinstance(url, Mapping):
        url = url.get("url")
    if not isinstance(url, str):
        what = f'{{"type": "{wanted[kind]}_url", "{wanted[kind]}_url": {{"url": "data:..."}}}}'
        raise BadRequest(f"a part of type {kind} needs a URL: {what}", param=param)
    return _Source(message, place, wanted[kind], url)


def _read_file(part: Mapping[str, Any], message: int, place: int, param: str) -> _Source:
    holder = part.get("file", part)
    if not isinstance(holder, Mapping):
        raise BadRequest("file must be an object with file_data", param=param)
    if holder.get("file_id") is not None:
        raise BadRequest("no files are stored here: send file_data instead of file_id", param=param)
    url, name = holder.get("file_data") or holder.get("file_url"), holder.get("filename") or ""
    if not isinstance(url, str) or not isinstance(name, str):
        raise BadRequest('a file needs {"file_data": "data:...;base64,...", "filename": ...}', param=param)
    return _Source(message, place, "file", url, name[:200])


def _check_counts(sources: Sequence[_Source], settings: ServerSettings) -> None:
    for kinds, name, limit in (
        (("image", "file"), "pictures and files", settings.max_images),
        (("video",), "clips", settings.max_videos),
    ):
        count = sum(source.kind in kinds for source in sources)
        if count > limit:
            raise BadRequest(
                f"the request has {count} {name}, more than the limit of {limit}",
                param="messages",
                code="too_many_media",
            )


class _Loader:
    """Loads the media of one request, one after another, and counts their tokens."""

    def __init__(
        self, settings: ServerSettings, processor: MiniMaxM3VLProcessor | None, max_tokens: int | None
    ) -> None:
        self._settings = settings
        self._images = MiniMaxM3VLImageProcessor() if processor is None else processor.image_processor
        self._videos = MiniMaxM3VLVideoProcessor() if processor is None else processor.video_processor
        self._max_tokens = max_tokens
        self._num_tokens = 0
        self._deadline = time.monotonic() + settings.media_seconds

    def load(self, source: _Source, data: bytes | None) -> dict[str, Any]:
        """The part that takes the source's place. `data`: what was fetched, where the source is behind a URL."""
        try:
            media_type = ""
            if data is None:
                media_type, data = self._decode_data_url(source)
            kind = source.kind if source.kind != "file" else _kind_of_file(data, media_type, source.name)
            if kind == "image":
                return {"type": "image", "image": self._picture(data, media_type)}
            if kind == "video":
                return {"type": "video", "video": self._clip(data, media_type)}
            return {"type": "text", "text": self._text(data, source.name)}
        except BadRequest as error:
            error.param = source.param
            raise
        except ValueError as error:
            raise BadRequest(str(error), param=source.param, code="invalid_media") from None

    def _decode_data_url(self, source: _Source) -> tuple[str, bytes]:
        """Media type in lower case, and the bytes."""
        url, limit = source.url, self._settings.max_media_bytes
        if source.kind == "file" and ":" not in url[:64]:  # some clients send bare base64
            url = f"data:;base64,{url}"
        if url[:5].lower() != "data:":
            raise ValueError(
                f"{describe_source(source.url)}: only data URLs are taken (data:image/png;base64,...), "
                "and http(s) where the server allows it"
            )
        if len(url) > 4 * limit + 1024 or ("%" not in url[:4096] and len(url) > 1.5 * limit + 1024):
            raise _too_large(len(url) * 3 // 4, limit)
        header, _, payload = url[5:].partition(",")
        if header.lower().endswith(";base64"):
            with open_source("data:" + url[5:], kind=source.kind, allow_files=False) as file:
                data = file.read()
        else:
            data = unquote_to_bytes(payload)
        if len(data) > limit:
            raise _too_large(len(data), limit)
        if not data:
            raise ValueError("the data URL is empty")
        return header.split(";", 1)[0].strip().lower(), data

    def _take_tokens(self, processor: PatchProcessor, num_patches: int, height: int, width: int) -> None:
        """Count `num_patches` temporal patches of this size. BadRequest where they exceed what is left."""
        self._num_tokens += num_patches * (height * width) // (processor.patch_size * processor.merge_size) ** 2
        if self._max_tokens is not None and self._num_tokens > self._max_tokens:
            raise BadRequest(
                f"the media have more than {self._max_tokens} tokens; send fewer or smaller ones",
                code="context_length_exceeded",
            )

    def _picture(self, data: bytes, media_type: str) -> torch.Tensor:
        """uint8 [3, height, width], in the size the model takes."""
        if self._images is None:
            raise ValueError("this is a text-only model: it takes no pictures")
        _check_type(media_type, "image")
        kind = picture_kind(data)
        if kind is None:
            raise ValueError(f"the data are no picture of a kind that is taken ({_KINDS})")
        if kind == "JPEG" and data.count(_START_OF_SCAN) > _MAX_SCANS:
            raise ValueError(f"the JPEG has more than {_MAX_SCANS} scans")
        picture = load_picture(data, max_pixels=self._settings.max_pixels, allow_files=False)
        height, width = self._images.target_size(*picture.shape[-2:])
        self._take_tokens(self._images, 1, height, width)
        if self._images.target_size(height, width) == (height, width):
            picture = resize_bicubic(picture, height, width)
        return picture

    def _clip(self, data: bytes, media_type: str) -> SampledClip:
        videos = self._videos
        if videos is None:
            raise ValueError("this is a text-only model: it takes no video")
        _check_type(media_type, "video", "image/gif")
        num_frames = 0
        first: tuple[int, int] | None = None

        def choose(total: int, fps: float) -> Sequence[int]:
            nonlocal num_frames
            indices = sample_frame_indices(
                total, fps, fps=videos.fps, min_frames=videos.min_frames, max_frames=videos.max_frames
            )
            num_frames = len(indices)
            return indices

        def size(frame: torch.Tensor) -> torch.Tensor:
            nonlocal first
            shape = (int(frame.shape[-2]), int(frame.shape[-1]))
            height, width = videos.target_size(*shape)
            if first is None:
                # Before the second frame is kept: a clip that can never fit must not fill the memory first.
                self._take_tokens(videos, -(-num_frames // videos.temporal_patch_size), height, width)
            elif first != shape:
                raise ValueError("the size of its frames changes")
            first = shape
            return resize_bicubic(frame, height, width)

        return read_video_file(
            data, choose, size, max_frame_pixels=self._settings.max_video_pixels,
            max_source_frames=self._settings.max_frames, allow_files=False, deadline=self._deadline,
        )  # fmt: skip

    def _text(self, data: bytes, name: str) -> str:
        limit = _CHARACTERS_PER_TOKEN * (self._max_tokens or 64 * 1024)
        if len(data) > limit:
            raise _too_large(len(data), limit)
        try:
            text = data.decode()
        except UnicodeDecodeError:
            raise ValueError("the file is no picture, no clip and no UTF-8 text; those are what is taken") from None
        return f"{name}:\n{text}\n" if name else text


def picture_kind(data: bytes) -> str | None:
    """PNG, JPEG, GIF, BMP, WEBP or AVIF by the first bytes; None for anything else."""
    for start, kind in _PICTURES.items():
        if data.startswith(start):
            return kind
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "WEBP"
    if data[4:8] == b"ftyp" and data[8:12] in (b"avif", b"avis"):
        return "AVIF"
    return None


def _check_type(media_type: str, kind: str, *others: str) -> None:
    """What a data URL calls itself may be missing, but not something else."""
    if media_type in ("", "application/octet-stream", *others) or media_type.startswith(f"{kind}/"):
        return
    raise ValueError(f"the data URL says {media_type[:100]}, expected {kind}/...")


def _kind_of_file(data: bytes, media_type: str, name: str) -> str:
    if media_type.startswith(_TEXT_TYPES):
        return "file"
    if data.startswith(b"%PDF"):
        raise ValueError(f"{name or 'the file'} is a PDF, which is not read here; send its pages as pictures")
    if picture_kind(data) is not None:
        return "image"
    is_clip = media_type.startswith("video/") or data[4:8] == b"ftyp" or data.startswith(b"\x1aE\xdf\xa3")
    return "video" if is_clip else "file"


def _too_large(size: int, limit: int) -> BadRequest:
    return BadRequest(f"{size} bytes are more than the limit of {limit} for one file", code="media_too_large")
