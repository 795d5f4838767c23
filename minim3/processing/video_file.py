"""Sampled frames of a video file, decoded with PyAV (the extra `video`), never more than the sampled ones in memory.

First pass: the packets are counted without decoding, as containers state frame counts loosely or not at all. Second
pass: frames are decoded in order and the chosen ones converted. Where the decoder gives another number of frames than
there were packets (edit lists, hidden frames), the choice is made again from the true number, so indices and times stay
exact.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, BinaryIO

import numpy as np
import torch

from minim3.processing.media import MAX_PICTURE_PIXELS, describe_source, open_source

# Containers that hold one clip. Left out on purpose: playlists (hls, concat, dash), which name other files and URLs,
# text (ffmpeg renders .txt as a terminal video) and single pictures.
VIDEO_FORMATS = (
    "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,gif,mpegts,mpeg,flv,ogg,asf,ivf,h264,hevc,m4v,nut,yuv4mpegpipe"
)
MAX_SOURCE_FRAMES = 1_000_000  # nine hours at 30 frames a second

ChooseFrames = Callable[[int, float], Sequence[int]]


@dataclass(frozen=True)
class SampledClip:
    """`frames[i]` is source frame `frames_indices[i]` of `total_num_frames`, at `fps` frames a second."""

    frames: list[torch.Tensor]
    frames_indices: tuple[int, ...]
    total_num_frames: int
    fps: float


def read_video_file(
    source: str | Path | bytes,
    choose: ChooseFrames,
    transform: Callable[[torch.Tensor], torch.Tensor],
    *,
    max_frame_pixels: int = MAX_PICTURE_PIXELS,
    max_source_frames: int = MAX_SOURCE_FRAMES,
    allow_files: bool = True,
    deadline: float | None = None,
) -> SampledClip:
    """Decodes the frames that `choose(total_num_frames, fps)` names (ascending) and keeps `transform(frame)` of each.

    A frame is uint8 RGB [3, H, W], upright (the rotation that phones write is applied). `deadline`: the
    `time.monotonic()` at which to give up. Raises ValueError naming the source: not a video, truncated, without frames
    or frame rate, over a limit (pixels are checked before decoding), too slow; ValueError with the install command when
    PyAV is missing.
    """
    av = _import_av()
    name = describe_source(source)

    def check_time() -> None:
        if deadline is not None and time.monotonic() > deadline:
            raise ValueError(f"video {name} takes too long to decode; cut it or make it smaller")

    with open_source(source, kind="video", allow_files=allow_files) as file:
        try:
            total, fps = _count_frames(av, file, name, max_frame_pixels, max_source_frames, check_time)
            for _ in range(2):  # again only where the decoder gives another number of frames than there were packets
                indices = tuple(choose(total, fps))
                frames, decoded = _decode(
                    av, file, name, frozenset(indices), transform, max_frame_pixels, max_source_frames, check_time
                )
                if decoded == total:
                    return SampledClip(frames, indices, total, fps)
                total = decoded
                if total == 0:
                    break
        except av.error.FFmpegError as error:
            raise ValueError(f"video {name} cannot be read: {_reason(error)}") from error
    raise ValueError(f"video {name} has no frames that can be decoded")


def _import_av() -> ModuleType:
    try:
        import av
        import av.error
    except ImportError as error:
        raise ValueError("reading video files needs PyAV: pip install av") from error
    return av


def _reason(error: Exception) -> str:
    text = getattr(error, "strerror", None) or str(error)
    return f"{text} (not a video, damaged or cut off)"


@contextmanager
def _open_stream(av: ModuleType, file: BinaryIO, name: str, max_frame_pixels: int) -> Iterator[tuple[Any, Any]]:
    file.seek(0)
    with av.open(file, mode="r", options={"format_whitelist": VIDEO_FORMATS}, metadata_errors="ignore") as container:
        streams = [one for one in container.streams.video if not _is_cover(one)]
        if not streams:
            raise ValueError(f"video {name} has no picture stream")
        stream = streams[0]
        if stream.codec_context is None:
            raise ValueError(f"video {name} is in a codec that this PyAV cannot decode")
        _check_pixels(stream.codec_context.height, stream.codec_context.width, max_frame_pixels, name)
        stream.codec_context.options = {"max_pixels": str(max_frame_pixels)}
        stream.thread_type = "AUTO"
        yield container, stream


def _is_cover(stream: Any) -> bool:
    """Whether a stream is the cover picture of a music file."""
    return "attached_pic" in str(getattr(stream, "disposition", "")).lower()


def _check_pixels(height: int, width: int, max_frame_pixels: int, name: str) -> None:
    if height * width > max_frame_pixels:
        raise ValueError(
            f"video {name} has frames of {height} x {width} = {height * width} pixels, "
            f"more than the limit of {max_frame_pixels}"
        )


def _count_frames(
    av: ModuleType,
    file: BinaryIO,
    name: str,
    max_frame_pixels: int,
    max_source_frames: int,
    check_time: Callable[[], None],
) -> tuple[int, float]:
    """Video packets in the file and frames a second; ValueError where the file ends before its header says."""
    with _open_stream(av, file, name, max_frame_pixels) as (container, stream):
        count = 0
        first: float | None = None
        last = 0.0
        for packet in container.demux():
            check_time()
            if packet.size == 0:  # the empty packet that flushes a decoder at the end
                continue
            if packet.is_corrupt and packet.stream is stream:
                raise ValueError(f"video {name} is cut off: its last packet is incomplete")
            start = packet.pts if packet.pts is not None else packet.dts
            if start is not None and packet.time_base is not None:
                begin = float(start * packet.time_base)
                first = begin if first is None else min(first, begin)
                last = max(last, float((start + (packet.duration or 0)) * packet.time_base))
            count += packet.stream is stream
            if count > max_source_frames:
                raise ValueError(f"video {name} has more than {max_source_frames} frames; cut it")
        if count == 0:
            raise ValueError(f"video {name} has no frames")
        rate = stream.average_rate or stream.guessed_rate or stream.base_rate
        if not rate or rate <= 0:
            raise ValueError(f"video {name} states no frame rate; pass its frames instead")
        fps = float(rate)
        _check_complete(container, stream, count, last - (first or 0.0), fps, name)
        return count, fps


def _check_complete(container: Any, stream: Any, count: int, found: float, fps: float, name: str) -> None:
    """Compares the header's duration, where the format states one, with what is there.

    Cut files otherwise pass in silence: ffmpeg ends at the last whole packet. Trimmed but healthy files hold fewer
    packets than their frame table, so that table alone decides nothing; it only sharpens the limit on the missing time.
    """
    if container.duration is None or not set(container.format.name.split(",")) & {"mp4", "matroska"}:
        return
    stated = container.duration / 1_000_000
    short_of_table = bool(stream.frames) and count < stream.frames
    if found < stated * (0.999 if short_of_table else 0.9) - 1.5 / fps:
        raise ValueError(f"video {name} is cut off: {found:.2f} of the {stated:.2f} seconds that its header states")


def _decode(
    av: ModuleType,
    file: BinaryIO,
    name: str,
    wanted: frozenset[int],
    transform: Callable[[torch.Tensor], torch.Tensor],
    max_frame_pixels: int,
    max_source_frames: int,
    check_time: Callable[[], None],
) -> tuple[list[torch.Tensor], int]:
    """The wanted frames, transformed, and the number of all frames."""
    frames: list[torch.Tensor] = []
    decoded = 0
    with _open_stream(av, file, name, max_frame_pixels) as (container, stream):
        for frame in container.decode(stream):
            check_time()
            if decoded in wanted:
                _check_pixels(frame.height, frame.width, max_frame_pixels, name)
                try:
                    frames.append(transform(_upright(frame)))
                except ValueError as error:
                    raise ValueError(f"video {name}, frame {decoded}: {error}") from error
            decoded += 1
            if decoded > max_source_frames:
                raise ValueError(f"video {name} has more than {max_source_frames} frames; cut it")
    return frames, decoded


def _upright(frame: Any) -> torch.Tensor:
    pixels = frame.to_ndarray(format="rgb24")
    quarter_turns = round(getattr(frame, "rotation", 0) / 90) % 4  # counter-clockwise, as numpy turns
    if quarter_turns:
        pixels = np.rot90(pixels, quarter_turns)
    return torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1)))
