"""Pictures and clips of a prompt: their patches, and the tokens their placeholders become.

An image becomes `]<]start of image[>[`, one `]<]image[>[` for each merged patch, `]<]end of image[>[`. A video becomes
such a group for each temporal patch (with `]<]video[>[` inside), after its time where times are known.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from minim3.processing.image import MiniMaxM3VLImageProcessor, flatten_pictures
from minim3.processing.media import channel_axis
from minim3.processing.messages import Message
from minim3.processing.video import MiniMaxM3VLVideoProcessor, metadata_of_clips, split_videos
from minim3.processing.video_file import SampledClip

IMAGE_TOKEN = "]<]image[>["
VIDEO_TOKEN = "]<]video[>["
BEGIN_MEDIA = "]<]start of image[>["
END_MEDIA = "]<]end of image[>["


@dataclass(frozen=True, slots=True)
class Repeat:
    """`count` times one token, inside the expansion of a media placeholder."""

    token: str
    count: int = 1


Expansion = Sequence[Repeat | str]
"""What a media placeholder becomes: repeated tokens and plain text (timestamps)."""


def expand_image(num_tokens: int) -> Expansion:
    """`num_tokens` = t * h * w / merge_size**2 of the picture's grid."""
    return (Repeat(BEGIN_MEDIA), Repeat(IMAGE_TOKEN, num_tokens), Repeat(END_MEDIA))


def expand_video(num_patches: int, tokens_per_patch: int, timestamps: Sequence[float] | None = None) -> Expansion:
    """One bracketed group for each temporal patch, after its time in seconds when times are known."""
    if timestamps is not None and len(timestamps) != num_patches:
        raise ValueError(f"{len(timestamps)} timestamps for {num_patches} temporal patches")
    items: list[Repeat | str] = []
    for index in range(num_patches):
        if timestamps is not None:
            items.append(f"]<]{timestamps[index]:.1f} seconds[>[")
        items += (Repeat(BEGIN_MEDIA), Repeat(VIDEO_TOKEN, tokens_per_patch), Repeat(END_MEDIA))
    return items


def media_of(conversations: Sequence[Sequence[Message]], kind: str) -> list[Any]:
    """The pictures or clips that messages hold, in order."""
    media = [part.media for messages in conversations for one in messages for part in one.parts if part.kind == kind]
    num_missing = sum(one is None for one in media)
    if num_missing:
        raise ValueError(f"{num_missing} of {len(media)} {kind} parts hold no {kind}: fill them in, or pass {kind}s=")
    return media


def is_empty(media: Any) -> bool:
    """None, an empty list, or lists of nothing else."""
    return media is None or (isinstance(media, (list, tuple)) and all(is_empty(item) for item in media))


def process_images(
    processor: MiniMaxM3VLImageProcessor | None, images: Any
) -> tuple[dict[str, torch.Tensor], list[Expansion]]:
    """Pictures to `pixel_values` and `image_grid_thw`, and what the placeholder of each becomes."""
    if processor is None:
        raise ValueError("this is a text-only model: it takes no pictures")
    processed = processor(images=flatten_pictures(images), return_tensors="pt")
    grid = processed["image_grid_thw"]
    expansions = [expand_image(count // processor.merge_size**2) for count in grid.prod(dim=1).tolist()]
    return {"pixel_values": processed["pixel_values"], "image_grid_thw": grid}, expansions


def process_videos(
    processor: MiniMaxM3VLVideoProcessor | None, videos: Any, video_metadata: Any = None, keep_sized: bool = True
) -> tuple[dict[str, torch.Tensor], list[Expansion]]:
    """Clips to `pixel_values_videos` and `video_grid_thw` (a row a chunk), and what the placeholder of each becomes."""
    if processor is None:
        raise ValueError("this is a text-only model: it takes no video")
    clips = split_videos(videos)
    metadata = metadata_of_clips(video_metadata, len(clips))
    pixel_values, grids = [], []
    expansions: list[Expansion] = []
    factor = processor.patch_size * processor.merge_size
    for index, (clip, known) in enumerate(zip(clips, metadata)):
        # Frames of a legal size are taken as they are, which is how the published chat processor passes them.
        resize: dict[str, Any] = {"do_resize": False} if keep_sized and _is_sized(clip, factor) else {}
        try:
            processed = processor(videos=[clip], video_metadata=[known], return_metadata=True, **resize)
        except ValueError as error:
            reason = str(error).removeprefix("video 1 of 1: ")  # of those the processor was given
            raise ValueError(f"video {index + 1} of {len(clips)} in the prompt: {reason}") from error
        grid = processed["video_grid_thw"]
        pixel_values.append(processed["pixel_values_videos"])
        grids.append(grid)
        tokens_per_patch = int(grid[0, 1] * grid[0, 2]) // processor.merge_size**2
        expansions.append(expand_video(int(grid[:, 0].sum()), tokens_per_patch, processed["timestamps"][0]))
    return {"pixel_values_videos": torch.cat(pixel_values), "video_grid_thw": torch.cat(grids)}, expansions


def _is_sized(clip: Any, factor: int) -> bool:
    """Whether all frames are in memory with sides that are multiples of `factor` (files and paths: False)."""
    if isinstance(clip, (str, Path, bytes)):
        return False
    if isinstance(clip, SampledClip):
        clip = clip.frames
    return all(_has_legal_size(frame, factor) for frame in clip)


def _has_legal_size(frame: Any, factor: int) -> bool:
    if isinstance(frame, (np.ndarray, torch.Tensor)):
        if frame.ndim != 3:
            return False
        height, width = frame.shape[1:] if channel_axis(tuple(frame.shape)) == -3 else frame.shape[:2]
    elif isinstance(size := getattr(frame, "size", None), tuple):  # PIL
        width, height = size
    else:
        return False
    return height % factor == 0 and width % factor == 0
