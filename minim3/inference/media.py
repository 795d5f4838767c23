"""Pictures and clips of a prompt: where their features go, and what tells them apart."""

from collections.abc import Sequence
from hashlib import sha256
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from minim3.inference.request import Media

if TYPE_CHECKING:
    from minim3.model.causal_lm import CausalLM


def find_placeholders(model: "CausalLM", token_ids: Sequence[int], media: Media | None) -> dict[int, list[int]]:
    """Positions of the media placeholders in a prompt, by placeholder id; only ids that occur.

    Raises:
        ValueError: pictures or clips give another number of features than there are placeholders, or the model has no
            vision tower.
    """
    grids = [
        ("image", "image_token_index", None if media is None else media.image_grid_thw),
        ("video", "video_token_index", None if media is None else media.video_grid_thw),
    ]
    if getattr(model.config, "vision_config", None) is None:
        if media is not None and not media.empty:
            raise ValueError("pictures or clips were given, but this is a text-only model without a vision tower")
        return {}
    placeholders: dict[int, list[int]] = {}
    for kind, field, grid in grids:
        token_id: int = getattr(model.config, field)
        places = [place for place, known in enumerate(token_ids) if known == token_id]
        num_features = 0 if grid is None else sum(num_media_tokens(model, grid))
        if len(places) != num_features:
            raise ValueError(
                f"the prompt has {len(places)} {kind} placeholder tokens (id {token_id}), but the {kind}s given make "
                f"{num_features} features"
            )
        if places:
            placeholders[token_id] = places
    return placeholders


def num_media_tokens(model: "CausalLM", grid_thw: Tensor) -> list[int]:
    """Placeholder tokens of each row of a grid `[n, 3]` of patches: `t * h * w / merge**2`."""
    merge: int = model.config.vision_config.spatial_merge_size
    return [t * h * w // merge**2 for t, h, w in grid_thw.tolist()]


def digest_media(model: "CausalLM", media: Media) -> None:
    """Fill in `media.digests`: for each picture and each chunk of a clip its features, and a hash of what it shows."""
    if media.digests is not None:
        return
    media.digests = {}
    for kind, field, pixels, grid in (
        ("image", "image_token_index", media.pixel_values, media.image_grid_thw),
        ("video", "video_token_index", media.pixel_values_videos, media.video_grid_thw),
    ):
        if pixels is None or grid is None:
            continue
        rows = [t * h * w for t, h, w in grid.tolist()]
        if sum(rows) != pixels.shape[0]:
            raise ValueError(f"{kind}_grid_thw makes {sum(rows)} patches, but {pixels.shape[0]} were given")
        patches = pixels.detach().cpu().contiguous().split(rows)
        media.digests[getattr(model.config, field)] = [
            (num_features, sha256(f"{kind} {size} {part.dtype} ".encode() + _bytes(part)).digest())
            for num_features, size, part in zip(num_media_tokens(model, grid), grid.tolist(), patches, strict=True)
        ]


def _bytes(values: Tensor) -> bytes:
    return values.flatten().view(torch.uint8).numpy().tobytes()
