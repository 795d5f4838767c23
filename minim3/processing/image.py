"""Pictures -> `pixel_values` and `image_grid_thw`. The patch layout is described in patches.py."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from minim3.processing.media import Picture, describe_source
from minim3.processing.patches import (
    PatchProcessor,
    num_image_tokens,
    patchify,
    resize_bicubic,
    smart_resize,
    to_return_type,
)

__all__ = ["MiniMaxM3VLImageProcessor", "flatten_pictures", "num_image_tokens", "patchify", "smart_resize"]


def limits_from_size(size: object) -> tuple[int | None, int | None]:
    """(min_pixels, max_pixels) of a `size` field: {"shortest_edge", "longest_edge"} are areas in pixels in spite of
    their names, as are {"min_pixels", "max_pixels"}; the released file's 672 x 672 was never applied and stands for the
    defaults.
    """
    if size is None or size in ([672, 672], (672, 672), {"height": 672, "width": 672}):
        return None, None
    if isinstance(size, Mapping) and set(size) <= {"shortest_edge", "longest_edge", "min_pixels", "max_pixels"}:
        return size.get("min_pixels", size.get("shortest_edge")), size.get("max_pixels", size.get("longest_edge"))
    raise ValueError(
        f'size is {size!r}; give {{"shortest_edge": least pixels, "longest_edge": most pixels}}: '
        "a fixed height and width is not implemented"
    )


class MiniMaxM3VLImageProcessor(PatchProcessor):
    """Pictures -> `pixel_values` fp32 [N, C*D*P*P] and `image_grid_thw` int64 [pictures, 3].

    Called with one picture or a (nested) list of them: paths, data URLs, bytes, PIL pictures, arrays or tensors (see
    `load_picture`). N is the sum of t*h*w over the grid's rows; t is always 1, as a still picture is repeated D times
    to fill its temporal patch. Keyword arguments of a call override settings for that call.
    """

    config_name = "preprocessor_config.json"
    nested_key = "image_processor"
    type_key = "image_processor_type"

    def __init__(
        self,
        *,
        size: Mapping[str, int] | Sequence[int] | None = None,
        min_pixels: int | None = None,
        max_pixels: int | None = None,
        **settings: Any,
    ) -> None:
        size_min, size_max = limits_from_size(size)
        for name, value in (("min_pixels", size_min), ("max_pixels", size_max)):
            if value is not None:
                settings[name] = value
        for name, value in (("min_pixels", min_pixels), ("max_pixels", max_pixels)):
            if value is not None:  # given beside a size, they win
                settings[name] = value
        super().__init__(**settings)

    @property
    def size(self) -> dict[str, int]:
        """The limits under the names that transformers saves them by: areas in pixels, not edges."""
        return {"shortest_edge": self.min_pixels, "longest_edge": self.max_pixels}

    @classmethod
    def _accepted_names(cls) -> set[str]:
        return super()._accepted_names() | {"size"}

    def to_dict(self) -> dict[str, Any]:
        values = super().to_dict()
        del values["min_pixels"], values["max_pixels"]
        return {**values, "size": self.size}

    def __call__(
        self, images: Picture | Sequence[Any], *, return_tensors: str | None = "pt", **overrides: Any
    ) -> dict[str, Any]:
        """See the class; the same as `preprocess`. Raises ValueError naming the picture that cannot be used."""
        return self.with_settings(**overrides)._preprocess(images, return_tensors)

    preprocess = __call__

    def _preprocess(self, images: Picture | Sequence[Any], return_tensors: str | None) -> dict[str, Any]:
        pictures = flatten_pictures(images)
        resized: list[torch.Tensor] = []
        grids: list[list[int]] = []
        for index, source in enumerate(pictures):
            picture = self._load_picture(source)
            try:
                height, width = self.target_size(*picture.shape[-2:])
            except ValueError as error:
                raise ValueError(
                    f"picture {index + 1} of {len(pictures)} ({describe_source(source)}): {error}"
                ) from error
            resized.append(resize_bicubic(picture, height, width))
            grids.append([1, height // self.patch_size, width // self.patch_size])
        num_patches = [grid[1] * grid[2] for grid in grids]
        pixel_values = torch.empty(sum(num_patches), 3 * self.temporal_patch_size * self.patch_size**2)
        for picture, out in zip(resized, pixel_values.split(num_patches)):
            frames = picture.expand(self.temporal_patch_size, -1, -1, -1)
            self._normalize_into(patchify(frames, self.patch_size, self.temporal_patch_size, self.merge_size), out)
        values = {"pixel_values": pixel_values, "image_grid_thw": torch.tensor(grids, dtype=torch.int64)}
        return to_return_type(values, return_tensors)

    def get_number_of_image_patches(
        self, height: int, width: int, images_kwargs: Mapping[str, Any] | None = None
    ) -> int:
        """h*w of the grid that a picture of this size in pixels gets (tokens: divided by M**2)."""
        processor = self.with_settings(**(images_kwargs or {}))
        new_height, new_width = processor.target_size(height, width)
        return new_height * new_width // processor.patch_size**2


def flatten_pictures(images: Any) -> list[Any]:
    """One picture, lists of pictures to any depth, or an array [N, ...] of them -> a flat list; ValueError if empty."""
    flat: list[Any] = []

    def visit(item: Any) -> None:
        if isinstance(item, list | tuple):
            for one in item:
                visit(one)
        elif isinstance(item, np.ndarray | torch.Tensor) and item.ndim == 4:
            flat.extend(item)
        else:
            flat.append(item)

    visit(images)
    if not flat:
        raise ValueError("the list of pictures is empty")
    return flat
