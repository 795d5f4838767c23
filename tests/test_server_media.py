"""Pictures, clips and files of a request: loaded as the processor would load them, and refused with a clear 400."""

import asyncio
import base64
import io
import struct
import time
import zlib
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from PIL import Image, PngImagePlugin

from minim3.processing.image import MiniMaxM3VLImageProcessor
from minim3.processing.processor import MiniMaxM3VLProcessor
from minim3.processing.tokenizer import Tokenizer
from minim3.processing.video import MiniMaxM3VLVideoProcessor
from minim3.server.errors import BadRequest
from minim3.server.media import load_media
from minim3.server.settings import ServerSettings

SETTINGS = ServerSettings()


def picture(width: int = 70, height: int = 45, kind: str = "PNG", seed: int = 0, **options: Any) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind, **options)
    return file.getvalue()


def clip(num_frames: int = 30, fps: int = 10, size: int = 64) -> bytes:
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as container:
        stream = container.add_stream("mpeg4", rate=Fraction(fps))
        stream.width = stream.height = size
        stream.pix_fmt = "yuv420p"
        for index in range(num_frames):
            frame = np.full((size, size, 3), index * 255 // num_frames, dtype=np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    return file.getvalue()


def many_frames(count: int, width: int = 4, height: int = 4, fps: int = 30) -> bytes:
    """A clip of any number of frames in a few bytes each."""
    frame = b"FRAME\n" + bytes(width * height * 3 // 2)
    return f"YUV4MPEG2 W{width} H{height} F{fps}:1 Ip A1:1 C420\n".encode() + frame * count


def data_url(data: bytes, media_type: str = "") -> str:
    return f"data:{media_type};base64,{base64.b64encode(data).decode()}"


def user(*parts: Any) -> list[dict[str, Any]]:
    return [{"role": "user", "content": [{"type": "text", "text": "What is this?"}, *parts]}]


def image_part(data: bytes | str, media_type: str = "image/png") -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": data if isinstance(data, str) else data_url(data, media_type)}}


def video_part(data: bytes | str, media_type: str = "video/mp4") -> dict[str, Any]:
    return {"type": "video_url", "video_url": {"url": data if isinstance(data, str) else data_url(data, media_type)}}


def load(messages: Any, settings: ServerSettings = SETTINGS, **options: Any) -> list[dict[str, Any]]:
    return asyncio.run(load_media(messages, settings, **options))


def refusal(part: Any, settings: ServerSettings = SETTINGS, **options: Any) -> BadRequest:
    with pytest.raises(BadRequest) as caught:
        load(user(part), settings, **options)
    assert caught.value.status == 400
    assert len(caught.value.message) < 600
    return caught.value


@pytest.fixture(scope="module")
def processor(tokenizer: Tokenizer) -> MiniMaxM3VLProcessor:
    return MiniMaxM3VLProcessor(MiniMaxM3VLImageProcessor(), tokenizer, MiniMaxM3VLVideoProcessor())


# --- what works ---


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "AVIF"])
def test_pictures_are_what_the_processor_makes_of_the_file(processor: MiniMaxM3VLProcessor, kind: str) -> None:
    """Loading before the processor must not change a pixel: resizing twice, or a second conversion, would."""
    data = picture(950, 650, kind)
    parts = [image_part(data, f"image/{kind.lower()}"), {"type": "image_url", "image_url": data_url(data)}]
    parts.append({"type": "input_image", "image_url": data_url(data), "detail": "auto"})
    parts.append({"type": "file", "file": {"file_data": data_url(data), "filename": "a"}})
    wanted = processor.apply_chat_template([{"role": "user", "content": [{"type": "image", "image": data}]}])
    for part in parts:
        loaded = load([{"role": "user", "content": [part]}], processor=processor)
        assert torch.equal(processor.apply_chat_template(loaded)["pixel_values"], wanted["pixel_values"])
        assert torch.equal(processor.apply_chat_template(loaded)["input_ids"], wanted["input_ids"])


def test_clips_keep_their_pixels_and_times(processor: MiniMaxM3VLProcessor) -> None:
    """Pitfall 25: the timestamps of a clip are lost once it is a list of frames."""
    data = clip(60)
    wanted = processor.apply_chat_template([{"role": "user", "content": [{"type": "video", "video": data}]}])
    assert "seconds" in processor.tokenizer.decode(wanted["input_ids"][0].tolist())
    for part in (video_part(data), {"type": "file", "file": {"file_data": data_url(data), "filename": "a.mp4"}}):
        loaded = load([{"role": "user", "content": [part]}], processor=processor)
        found = processor.apply_chat_template(loaded)
        assert torch.equal(found["input_ids"], wanted["input_ids"])
        assert torch.equal(found["pixel_values_videos"], wanted["pixel_values_videos"])


def test_of_an_animation_the_first_frame(processor: MiniMaxM3VLProcessor) -> None:
    frames = [Image.new("RGB", (56, 56), color) for color in ("red", "lime", "blue")]
    file = io.BytesIO()
    frames[0].save(file, "GIF", save_all=True, append_images=frames[1:], duration=100)
    (message,) = load([{"role": "user", "content": [image_part(file.getvalue(), "image/gif")]}], processor=processor)
    red = message["content"][0]["image"]
    assert red.shape == (3, 56, 56)
    assert red.flatten(1).float().mean(1).tolist() == [255, 0, 0]


def test_text_files_become_text() -> None:
    part = {"type": "file", "file": {"file_data": data_url("naïve".encode(), "text/plain"), "filename": "a.txt"}}
    (message,) = load(user(part))
    assert message["content"][1] == {"type": "text", "text": "a.txt:\nnaïve\n"}


def test_messages_without_media_come_back_as_they_are() -> None:
    messages = [{"role": "system", "content": "x"}, {"role": "user", "content": [{"type": "text", "text": "y"}]}, 5]
    assert load(messages) == messages


def test_the_callers_messages_stay_as_they_are() -> None:
    """A retry, or a log of the request, would otherwise see tensors."""
    messages = user(image_part(picture()))
    load(messages)
    assert isinstance(messages[0]["content"][1]["image_url"]["url"], str)


# --- pictures ---


def png(width: int, height: int, data: bytes, *chunks: tuple[bytes, bytes]) -> bytes:
    def chunk(name: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    middle = b"".join(chunk(*one) for one in chunks)
    return b"\x89PNG\r\n\x1a\n" + header + middle + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def scans(count: int) -> bytes:
    """A progressive JPEG whose last scan is repeated."""
    data = picture(64, 64, "JPEG", progressive=True)
    last = data.rindex(b"\xff\xda")
    return data[:-2] + data[last:-2] * count + b"\xff\xd9"


def noisy_text() -> bytes:
    info = PngImagePlugin.PngInfo()
    info.add_text("a", "x" * 2_000_000, zip=True)
    return picture(pnginfo=info)


BAD_PICTURES = {
    "bomb by its header": lambda: png(60000, 60000, zlib.compress(bytes(1000))),
    "bomb by its data": lambda: png(20000, 20000, zlib.compress(bytes(20_000_000), 9)),
    "overflowing header": lambda: png(2**31 - 1, 2**31 - 1, b""),
    "empty header": lambda: png(0, 0, zlib.compress(b"")),
    "bomb of text": noisy_text,
    "endless scans": lambda: scans(300),
    "cut PNG": lambda: picture(300, 300)[:5000],
    "cut JPEG": lambda: picture(300, 300, "JPEG")[:5000],
    "cut GIF": lambda: picture(300, 300, "GIF")[:500],
    "cut WebP": lambda: picture(300, 300, "WEBP")[:500],
    "only a signature": lambda: b"\x89PNG\r\n\x1a\n",
    "text": lambda: b"hello",
    "HTML": lambda: b"<html><script>alert(1)</script>",
    "SVG": lambda: b'<svg xmlns="http://www.w3.org/2000/svg"><image href="file:///etc/passwd"/></svg>',
    "PostScript": lambda: b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(/etc/passwd) (r) file\n",
    "TIFF": lambda: picture(kind="TIFF"),
    "PPM": lambda: picture(kind="PPM"),
    "a clip": lambda: clip(4),
    "an extreme shape": lambda: picture(6000, 10),
    "nothing": lambda: b"",
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_PICTURES)
def test_bad_pictures_are_a_quick_and_clear_400(name: str) -> None:
    start = time.process_time()
    error = refusal(image_part(BAD_PICTURES[name]()))
    assert time.process_time() - start < 5
    assert error.param == "messages[0].content[1]"


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("/etc/passwd", "only data URLs"),
        ("file:///etc/passwd", "only data URLs"),
        ("~/.ssh/id_rsa", "only data URLs"),
        ("ftp://example.com/a.png", "only data URLs"),
        ("", "only data URLs"),
        ("data:", "empty"),
        ("data:image/png;base64,", "empty"),
        ("data:image/png;base64,!!!!", "base64"),
        ("data:image/png;base64,iVBORw0KGgo", "base64"),
        (data_url(picture(), "text/html"), "text/html"),
        (data_url(picture(), "video/mp4"), "video/mp4"),
        ("http://example.com/a.png", "not fetched"),
        ("HTTPS://example.com/a.png", "not fetched"),
    ],
)
def test_what_is_no_data_url_of_a_picture_is_refused(url: str, words: str) -> None:
    """The disk of the server above all."""
    assert words in refusal(image_part(url)).message


@pytest.mark.parametrize(
    "part",
    [
        {"type": "image", "path": "/etc/passwd"},
        {"type": "image", "image": "/etc/passwd"},
        {"type": "image", "url": "/etc/passwd"},
        {"type": "video", "video": ["/etc/passwd"]},
        {"type": "video", "path": "/etc"},
        {"type": "image_url", "image_url": {"url": ["data:"]}},
        {"type": "image_url", "image_url": None},
        {"type": "image_url"},
        {"type": "file", "file": {"file_id": "file-1"}},
        {"type": "file", "file": {"file_data": data_url(b"%PDF-1.7"), "filename": "a.pdf"}},
        {"type": "file", "file": {"file_data": data_url(b"\xff\xfe\x00"), "filename": "a.bin"}},
        {"type": "file", "file": {"file_data": data_url(b"x" * 2_000_000, "text/plain")}},
        {"type": "file", "file": []},
        {"type": "file"},
        {"type": "input_audio", "input_audio": {"data": "", "format": "wav"}},
    ],
)
def test_other_ways_to_name_media_are_refused(part: dict[str, Any]) -> None:
    assert refusal(part).param == "messages[0].content[1]"


def test_sizes_and_counts_have_limits() -> None:
    small = ServerSettings(max_pixels=50 * 50, max_images=2, max_videos=1, max_media_bytes=20_000)
    assert "2500" in refusal(image_part(picture(70, 45)), small).message
    assert refusal(image_part(picture(200, 200, seed=1)), small).code == "media_too_large"
    assert refusal(image_part("data:image/png;base64," + "A" * 100_000_000), small).code == "media_too_large"
    assert refusal(image_part("data:image/png," + "%41" * 50_000), small).code == "media_too_large"
    with pytest.raises(BadRequest, match="3 pictures and files, more than the limit of 2"):
        load(user(*[image_part(picture(30, 30))] * 3), small)
    with pytest.raises(BadRequest, match="2 clips, more than the limit of 1"):
        load(user(*[video_part("data:,")] * 2), small)


def test_the_tokens_of_all_pictures_together_have_a_limit() -> None:
    """Each is small; a hundred fill the prompt, and would be encoded before anyone counts."""
    part = image_part(picture(280, 280))
    load(user(part, part), max_tokens=200)
    assert refusal(part, max_tokens=99).code == "context_length_exceeded"
    with pytest.raises(BadRequest, match="more than 299 tokens"):
        load(user(part, part, part), max_tokens=299)


# --- clips ---


BAD_CLIPS = {
    "100,000 frames": lambda: many_frames(100_000),
    "cut": lambda: clip(40)[:2000],
    "text": lambda: b"hello",
    "a playlist": lambda: b"#EXTM3U\n#EXTINF:1,\nfile:///etc/passwd\n#EXT-X-ENDLIST\n",
    "a list of files": lambda: b"ffconcat version 1.0\nfile '/etc/passwd'\n",
    "a picture": lambda: picture(),
    "huge frames": lambda: b"YUV4MPEG2 W30000 H30000 F30:1 Ip A1:1 C420\nFRAME\n" + bytes(10_000),
    "no frames": lambda: b"YUV4MPEG2 W4 H4 F30:1 Ip A1:1 C420\n",
    "nothing": lambda: b"",
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_CLIPS)
def test_bad_clips_are_a_quick_and_clear_400(name: str) -> None:
    start = time.process_time()
    error = refusal(video_part(BAD_CLIPS[name](), "video/mp4"))
    assert time.process_time() - start < 5, error.message
    assert error.param == "messages[0].content[1]"


def test_a_clip_that_cannot_fit_is_refused_before_its_frames_are_kept() -> None:
    """768 frames of a megapixel are 2 GB as bytes and 9 GB as patches, from a file of kilobytes."""
    error = refusal(video_part(many_frames(900, 56, 56, fps=1)), max_tokens=1500)
    assert error.code == "context_length_exceeded"


def test_decoding_has_a_time_limit() -> None:
    """A worker thread cannot be stopped from outside: the decoder itself must look at the clock."""
    settings = ServerSettings(media_seconds=0.01)
    start = time.process_time()
    error = refusal(video_part(many_frames(300, 160, 160)), settings)
    assert "too long" in error.message or error.code == "media_timeout"
    assert time.process_time() - start < 2


def test_a_text_only_model_takes_no_media(tokenizer: Tokenizer) -> None:
    text_only = MiniMaxM3VLProcessor(tokenizer=tokenizer)
    assert "text-only" in refusal(image_part(picture()), processor=text_only).message
    assert "text-only" in refusal(video_part(clip(4)), processor=text_only).message


def test_no_path_of_this_machine_is_opened(monkeypatch: Any) -> None:
    """Whatever the parts say: the one thing that must never happen."""
    monkeypatch.setattr(Path, "open", lambda *_, **__: pytest.fail("a file was opened"))
    for part in ({"type": "image", "path": "/etc/passwd"}, image_part("/etc/passwd"), video_part("/etc/passwd")):
        refusal(part)
