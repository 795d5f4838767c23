"""Clips -> patches: frame sampling, decoding with PyAV, temporal patches, chunks, and the times of the frames.

A clip is sampled down to at most a few hundred frames while it is decoded; each sampled frame is resized at once, so
that neither the source frames nor the full-size sampled ones are ever held together. Patch layout and settings:
image.py.
"""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from minim3.processing.media import PICTURE_SUFFIXES, channel_axis, describe_source
from minim3.processing.patches import PatchProcessor, check_count, patchify, resize_bicubic, to_return_type
from minim3.processing.video_file import SampledClip, read_video_file

FrameTransform = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class VideoMetadata:
    """Where the frames of a clip came from: `frames_indices[i]` is the index of frame i in a source of
    `total_num_frames` frames at `fps` frames a second (None: unknown, the clip has no times)."""

    total_num_frames: int
    frames_indices: tuple[int, ...]
    fps: float | None = None

    def __post_init__(self) -> None:
        if self.fps is not None and not 0 < self.fps < float("inf"):
            raise ValueError(f"fps of a clip is {self.fps}, it must be above 0")
        bad = [index for index in self.frames_indices if not 0 <= index < self.total_num_frames]
        if bad:
            raise ValueError(f"frames_indices holds {bad[0]}, the clip has {self.total_num_frames} frames")

    def timestamps(self, temporal_patch_size: int = 2) -> list[float] | None:
        """Seconds of each temporal patch: source index of its first frame / fps. None where fps is unknown."""
        if self.fps is None:
            return None
        return [index / self.fps for index in self.frames_indices[::temporal_patch_size]]


def sample_frame_indices(
    total_num_frames: int, source_fps: float, *, fps: float = 1.0, min_frames: int = 4, max_frames: int = 768
) -> tuple[int, ...]:
    """Indices of the frames to keep: n = clamp(int(total / source_fps * fps), min, max), no more than there are, evenly
    spread: frame floor(i * total / n)."""
    if total_num_frames < 1:
        raise ValueError("the clip has no frames")
    wanted = int(total_num_frames / source_fps * fps)
    num_frames = min(max(min_frames, min(wanted, max_frames)), total_num_frames)
    return tuple(index * total_num_frames // num_frames for index in range(num_frames))


@dataclass(frozen=True, kw_only=True)
class MiniMaxM3VLVideoProcessor(PatchProcessor):
    """Clips -> `pixel_values_videos` fp32 [N, C*D*P*P], `video_grid_thw` int64 [chunks, 3] and `num_chunks_per_video`
    int64 [clips].

    Called with one clip or a list of them. A clip is a list of frames (anything `load_picture` reads), an array or
    tensor [T, H, W, 3] or [T, 3, H, W], a video file (path, data URL, bytes; needs PyAV), what `read_video_file` made
    of one, or a folder of pictures in the order of their names. Files are always sampled (`fps`, `min_frames`,
    `max_frames`); frames are taken as they are unless `do_sample_frames` is set, which needs the source's fps. The last
    frame is repeated to fill the last temporal patch; chunks hold at most `vision_segment_max_frames` temporal patches
    (None: each clip is one chunk).
    """

    max_pixels: int = 768 * 28 * 28
    fps: float = 1.0
    min_frames: int = 4
    max_frames: int = 768
    vision_segment_max_frames: int | None = 4
    do_sample_frames: bool = False

    config_name = "video_preprocessor_config.json"
    nested_key = "video_processor"
    type_key = "video_processor_type"
    config_fallback = "preprocessor_config.json"

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("min_frames", "max_frames", "vision_segment_max_frames"):
            if name != "vision_segment_max_frames" or self.vision_segment_max_frames is not None:
                check_count(name, getattr(self, name))
        if self.min_frames > self.max_frames:
            raise ValueError(f"min_frames {self.min_frames} is above max_frames {self.max_frames}")
        if not 0 < self.fps < float("inf"):
            raise ValueError(f"fps is {self.fps!r}, it must be above 0")

    def __call__(
        self,
        videos: Any,
        *,
        video_metadata: Any = None,
        return_metadata: bool = False,
        return_tensors: str | None = "pt",
        **overrides: Any,
    ) -> dict[str, Any]:
        """See the class; the same as `preprocess`.

        `video_metadata`: one entry a clip for clips given as frames (of one clip the entry itself will do): a
        VideoMetadata, or a mapping with `fps` and perhaps `frames_indices` and `total_num_frames` (by default the
        frames are the whole source). `return_metadata` adds `video_metadata` (a VideoMetadata a clip) and `timestamps`
        (a clip: seconds of each temporal patch, or None). Keyword arguments override settings for this call. Raises
        ValueError naming the clip that cannot be used.
        """
        return self.with_settings(**overrides)._preprocess(videos, video_metadata, return_metadata, return_tensors)

    preprocess = __call__

    def _preprocess(
        self,
        videos: Any,
        video_metadata: Sequence[VideoMetadata | Mapping[str, Any] | None] | None,
        return_metadata: bool,
        return_tensors: str | None,
    ) -> dict[str, Any]:
        clips = split_videos(videos)
        given = metadata_of_clips(video_metadata, len(clips))
        frames: list[list[torch.Tensor]] = []
        metadata: list[VideoMetadata] = []
        for index, (clip, known) in enumerate(zip(clips, given)):
            try:
                clip_frames, clip_metadata = self.load_clip(clip, known)
            except ValueError as error:
                raise ValueError(f"video {index + 1} of {len(clips)}: {error}") from error
            frames.append(clip_frames)
            metadata.append(clip_metadata)
        pixel_values, grids = self._patches(frames)
        chunks: list[list[int]] = []
        num_chunks: list[int] = []
        for t, h, w in grids:
            segment = self.vision_segment_max_frames or t
            rows = [[min(segment, t - start), h, w] for start in range(0, t, segment)]
            chunks.extend(rows)
            num_chunks.append(len(rows))
        values: dict[str, Any] = {
            "pixel_values_videos": pixel_values,
            "video_grid_thw": torch.tensor(chunks, dtype=torch.int64),
            "num_chunks_per_video": torch.tensor(num_chunks, dtype=torch.int64),
        }
        if return_metadata:
            values["video_metadata"] = metadata
            values["timestamps"] = [one.timestamps(self.temporal_patch_size) for one in metadata]
        return to_return_type(values, return_tensors)

    def _patches(self, clips: list[list[torch.Tensor]]) -> tuple[torch.Tensor, list[tuple[int, int, int]]]:
        """Sized uint8 frames of each clip -> fp32 patches of all of them, and a grid (t, h, w) a clip."""
        grids = []
        for frames in clips:
            height, width = frames[0].shape[-2:]
            t = -(-len(frames) // self.temporal_patch_size)
            grids.append((t, height // self.patch_size, width // self.patch_size))
        num_rows = sum(t * h * w for t, h, w in grids)
        pixel_values = torch.empty(num_rows, 3 * self.temporal_patch_size * self.patch_size**2)
        start = 0
        for frames, (t, h, w) in zip(clips, grids):
            for patch in range(t):  # one temporal patch at a time: the fp32 result is the only large tensor
                group = frames[patch * self.temporal_patch_size : (patch + 1) * self.temporal_patch_size]
                group = group + group[-1:] * (self.temporal_patch_size - len(group))
                rows = patchify(torch.stack(group), self.patch_size, self.temporal_patch_size, self.merge_size)
                self._normalize_into(rows, pixel_values[start : start + h * w])
                start += h * w
        return pixel_values, grids

    # -- loading ------------------------------------------------------------------------------------------------------

    def load_clip(
        self, clip: Any, known: VideoMetadata | Mapping[str, Any] | None = None
    ) -> tuple[list[torch.Tensor], VideoMetadata]:
        """A clip in any accepted form -> sampled uint8 frames [3, h, w], sized for the model, and their metadata."""
        if isinstance(clip, SampledClip):
            if known is not None:
                raise ValueError("the clip was read from a file: its times are its own, leave video_metadata out")
            known = VideoMetadata(clip.total_num_frames, clip.frames_indices, clip.fps)
            return self.with_settings(do_sample_frames=False)._load_frames(clip.frames, known)
        if isinstance(clip, str | Path | bytes):
            if not isinstance(clip, bytes) and self.allow_files and _is_folder(clip):
                return self._load_frames(_folder_frames(Path(clip)), known)
            if known is not None:
                raise ValueError(f"{describe_source(clip)} is a file: its times are its own, leave video_metadata out")
            return self._load_file(clip)
        return self._load_frames(_frame_sources(clip), known)

    def _load_file(self, source: str | Path | bytes) -> tuple[list[torch.Tensor], VideoMetadata]:
        def choose(total: int, source_fps: float) -> tuple[int, ...]:
            return sample_frame_indices(
                total, source_fps, fps=self.fps, min_frames=self.min_frames, max_frames=self.max_frames
            )

        clip = read_video_file(
            source, choose, self._sizer(), max_frame_pixels=self.max_picture_pixels, allow_files=self.allow_files
        )
        return clip.frames, VideoMetadata(clip.total_num_frames, clip.frames_indices, clip.fps)

    def _load_frames(
        self, sources: Sequence[Any], known: VideoMetadata | Mapping[str, Any] | None
    ) -> tuple[list[torch.Tensor], VideoMetadata]:
        if len(sources) == 0:
            raise ValueError("the clip has no frames")
        metadata = _resolve_metadata(known, len(sources))
        if self.do_sample_frames:
            if metadata.fps is None:
                raise ValueError("do_sample_frames needs the fps of the source: pass video_metadata=[{'fps': ...}]")
            chosen = sample_frame_indices(
                len(sources), metadata.fps, fps=self.fps, min_frames=self.min_frames, max_frames=self.max_frames
            )
            sources = [sources[index] for index in chosen]
            indices = tuple(metadata.frames_indices[index] for index in chosen)
            metadata = VideoMetadata(metadata.total_num_frames, indices, metadata.fps)
        sizer = self._sizer()
        frames = []
        for index, source in enumerate(sources):
            try:
                frames.append(sizer(self._load_picture(source)))
            except ValueError as error:
                raise ValueError(f"frame {index + 1} of {len(sources)}: {error}") from error
        return frames, metadata

    def _sizer(self) -> FrameTransform:
        """A function that resizes the frames of one clip, which must all have the size of the first."""
        first: tuple[int, int] | None = None

        def size(frame: torch.Tensor) -> torch.Tensor:
            nonlocal first
            height, width = frame.shape[-2:]
            first = first or (height, width)
            if first != (height, width):
                raise ValueError(
                    f"the size changes from {first[0]} x {first[1]} to {height} x {width} pixels (height x width); "
                    "the frames of a clip must have one size"
                )
            return resize_bicubic(frame, *self.target_size(height, width))

        return size

    def get_num_of_video_patches(
        self, num_frames: int, height: int, width: int, videos_kwargs: Mapping[str, Any] | None = None
    ) -> int:
        """t*h*w of the grid of a clip of `num_frames` sampled frames of this size in pixels."""
        processor = self.with_settings(**(videos_kwargs or {}))
        new_height, new_width = processor.target_size(height, width)
        t = -(-num_frames // processor.temporal_patch_size)
        return t * new_height * new_width // processor.patch_size**2


def metadata_of_clips(given: Any, num_clips: int) -> list[Any]:
    """One entry a clip: from a list, from a list a prompt, or from the entry of the only clip itself.

    Raises:
        ValueError: another number of entries, or an entry that is no metadata.
    """
    if given is None:
        return [None] * num_clips
    found: list[Any] = [given] if isinstance(given, VideoMetadata | Mapping) else list(given)
    if all(isinstance(one, list | tuple) for one in found):  # a list a prompt
        found = [entry for one in found for entry in one]
    if len(found) != num_clips:
        raise ValueError(f"video_metadata has {len(found)} entries for {num_clips} clips")
    for index, one in enumerate(found):
        if not (one is None or isinstance(one, VideoMetadata | Mapping)):
            raise ValueError(
                f"video {index + 1} of {num_clips}: its video_metadata is a {type(one).__name__}; pass a mapping with "
                "fps, and perhaps frames_indices and total_num_frames"
            )
    return found


def _resolve_metadata(known: VideoMetadata | Mapping[str, Any] | None, num_frames: int) -> VideoMetadata:
    if known is None:
        return VideoMetadata(num_frames, tuple(range(num_frames)))
    if not isinstance(known, VideoMetadata):
        fields = {key: value for key, value in known.items() if value is not None}
        unknown = set(fields) - {
            "fps",
            "frames_indices",
            "total_num_frames",
            "height",
            "width",
            "duration",
            "video_backend",
        }
        if unknown:
            raise ValueError(f"video_metadata has unknown fields {sorted(unknown)}")
        indices = tuple(int(index) for index in fields.get("frames_indices", range(num_frames)))
        total = int(fields.get("total_num_frames", max(indices, default=0) + 1))
        known = VideoMetadata(max(total, num_frames), indices, float(fields["fps"]) if "fps" in fields else None)
    if len(known.frames_indices) != num_frames:
        raise ValueError(f"video_metadata names {len(known.frames_indices)} frames, the clip has {num_frames}")
    return known


def _is_frame(item: Any) -> bool:
    """A PIL picture or an array of up to three axes: a frame when it stands where a clip could."""
    if isinstance(item, np.ndarray | torch.Tensor):
        return item.ndim <= 3
    return not isinstance(item, str | Path | bytes | list | tuple | SampledClip)


def split_videos(videos: Any) -> list[Any]:
    """One clip or several -> a list of clips. A list whose first entry is a PIL picture or a [H, W, C] array is one
    clip; a list of strings is a list of files (frames by path: a list in a list). ValueError if there is none.
    """
    if isinstance(videos, str | Path | bytes | SampledClip):
        return [videos]
    if isinstance(videos, np.ndarray | torch.Tensor):
        if videos.ndim not in (4, 5):
            raise ValueError(f"video {describe_source(videos)}: a clip has 4 axes ([T, H, W, 3] or [T, 3, H, W])")
        return [videos] if videos.ndim == 4 else list(videos)
    if not isinstance(videos, list | tuple):
        raise ValueError(f"a video is frames, an array, a path, a data URL or bytes; this is a {type(videos).__name__}")
    if not videos:
        raise ValueError("the list of videos is empty")
    return [videos] if _is_frame(videos[0]) else list(videos)


def _frame_sources(clip: Any) -> Sequence[Any]:
    if isinstance(clip, np.ndarray | torch.Tensor):
        if clip.ndim != 4:
            raise ValueError(
                f"{describe_source(clip)}: a clip has 4 axes ([T, H, W, 3] or [T, 3, H, W]), not {clip.ndim}"
            )
        if clip.shape[0] == 0:
            return []
        # Decided once for the clip, so that a frame cannot be read the other way round than its neighbours.
        axis = channel_axis(tuple(clip.shape))
        return list(clip if isinstance(clip, torch.Tensor) and axis == -3 else _channels_first(clip, axis))
    if not isinstance(clip, list | tuple):
        raise ValueError(f"a video is frames, an array, a path, a data URL or bytes; this is a {type(clip).__name__}")
    return clip


def _channels_first(clip: Any, axis: int) -> Iterable[Any]:
    return clip.movedim(axis, 1) if isinstance(clip, torch.Tensor) else np.moveaxis(clip, axis, 1)


def _is_folder(source: str | Path) -> bool:
    if isinstance(source, str) and (len(source) > 4096 or "\0" in source or source.startswith("data:")):
        return False
    return Path(source).is_dir()


def _folder_frames(folder: Path) -> list[Path]:
    """The pictures of a folder, frame2 before frame10."""
    frames = [path for path in folder.iterdir() if path.suffix.lower() in PICTURE_SUFFIXES]
    if not frames:
        raise ValueError(f"folder {str(folder)!r} holds no pictures")
    return sorted(frames, key=lambda path: [int(s) if s.isdigit() else s for s in re.split(r"(\d+)", path.name)])
