"""Tokens of a prompt as text, and its pictures and clips as the model was given them."""

import base64
import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from minim3.inspection.data import MediaItem, MediaKind, Place, Token, TokenKind
from minim3.processing.detokenizer import IncrementalDetokenizer
from minim3.processing.patches import PatchProcessor
from minim3.processing.processor import MiniMaxM3VLProcessor
from minim3.processing.tokenizer import Tokenizer

MAX_THUMBNAILS = 48
"""Frames with a thumbnail in one inspection; the places of later ones are shown without."""

_THUMBNAIL_SIDE = 448  # pixels
_LOSSLESS_PIXELS = 160 * 160  # up to here a PNG is small, and keeps every pixel


def describe_tokens(
    tokenizer: Tokenizer, token_ids: Sequence[int], places: Mapping[int, Place], media: Sequence[MediaItem]
) -> tuple[Token, ...]:
    """Tokens with their text and its span. `places`: of the placeholder tokens, by position."""
    detokenizer = IncrementalDetokenizer(tokenizer, skip_special_tokens=False)
    texts = [detokenizer.feed(token_id) for token_id in token_ids]
    texts[-1:] = [text + detokenizer.finish() for text in texts[-1:]]
    controls = frozenset(tokenizer.added_tokens.values())
    tokens, start = [], 0
    for position, (token_id, text) in enumerate(zip(token_ids, texts)):
        place = places.get(position)
        kind: TokenKind = "control" if token_id in controls else "text"
        if place is not None:
            kind = media[place.media].kind
        tokens.append(Token(token_id, text, start, start + len(text), kind, place))
        start += len(text)
    return tuple(tokens)


def describe_media(
    config: Any, processor: MiniMaxM3VLProcessor, token_ids: Sequence[int], inputs: Mapping[str, Any]
) -> tuple[tuple[MediaItem, ...], dict[int, Place]]:
    """The pictures of a prompt, then its clips, and where each placeholder token lies on them, by position.

    config: of the whole model. inputs: what the processor made of the prompt. The model has checked that placeholders
    and media agree in number.
    """
    items: list[MediaItem] = []
    places: dict[int, Place] = {}
    if getattr(config, "vision_config", None) is None:
        return (), places
    merge: int = config.vision_config.spatial_merge_size
    kinds: tuple[tuple[MediaKind, int, str, str, PatchProcessor | None], ...] = (
        ("image", config.image_token_index, "pixel_values", "image_grid_thw", processor.image_processor),
        ("video", config.video_token_index, "pixel_values_videos", "video_grid_thw", processor.video_processor),
    )
    for kind, token_index, pixels, grid, part in kinds:
        if inputs.get(grid) is None:
            continue
        positions = iter([position for position, token_id in enumerate(token_ids) if token_id == token_index])
        rows = inputs[grid].tolist()
        patches = inputs[pixels].split([t * h * w for t, h, w in rows])
        for (times, height, width), values in zip(rows, patches):
            shown = max(0, MAX_THUMBNAILS - sum(len(item.thumbnails) for item in items))
            thumbnails = _thumbnails(part, values, (times, height, width), min(times, shown))
            size = 0 if part is None else part.patch_size
            item = MediaItem(
                kind, times, height // merge, width // merge, width * size, height * size,
                (*thumbnails, *[None] * (times - len(thumbnails))),
            )  # fmt: skip
            for time in range(item.times):
                for row in range(item.rows):
                    for column in range(item.columns):
                        places[next(positions)] = Place(len(items), time, row, column)
            items.append(item)
    return tuple(items), places


def _thumbnails(part: PatchProcessor | None, values: Tensor, grid: tuple[int, int, int], count: int) -> list[str]:
    """The first frame of each of the first `count` temporal patches, from the patches the model was given.

    So a thumbnail shows what the model saw, cropped and sized as it saw it.
    """
    if part is None:
        return []
    _, height, width = grid
    rows = values[: count * height * width].split(height * width) if count else ()
    return [_data_url(_first_frame(one, height, width, part)) for one in rows]


def _first_frame(rows: Tensor, height: int, width: int, part: PatchProcessor) -> Image.Image:
    """Patches `[h * w, C * D * P * P]` of one temporal patch, normalised, in merge order -> its first frame."""
    merge, patch = part.merge_size, part.patch_size
    blocks = rows.view(height // merge, width // merge, merge, merge, 3, part.temporal_patch_size, patch, patch)
    frame = blocks[:, :, :, :, :, 0].permute(4, 0, 2, 5, 1, 3, 6).reshape(3, height * patch, width * patch).float()
    if part.do_normalize:
        frame = frame * torch.tensor(part.image_std)[:, None, None] + torch.tensor(part.image_mean)[:, None, None]
        scale = 255.0 if part.do_rescale else 1.0
    else:
        scale = 1 / part.rescale_factor if part.do_rescale else 1.0
    levels = (frame * scale).round().clamp(0, 255).to(torch.uint8).permute(1, 2, 0)
    return Image.fromarray(np.ascontiguousarray(levels.numpy()))


def _data_url(picture: Image.Image) -> str:
    picture.thumbnail((_THUMBNAIL_SIDE, _THUMBNAIL_SIDE), Image.Resampling.BICUBIC)
    kind = "png" if picture.width * picture.height <= _LOSSLESS_PIXELS else "jpeg"
    buffer = io.BytesIO()
    picture.save(buffer, kind, **({"optimize": True} if kind == "png" else {"quality": 82}))
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"
