"""Sizes, resizing, normalising and cutting into patches: what the image and the video processor share.

Shapes: T frames, C channels, H, W pixels; P patch size, D temporal patch size, M merge size; a grid is (t, h, w) in
patches. A row of pixel values is one patch, C*D*P*P values, channel first, then time, row, column. Rows are ordered so
that each M x M block of patches, which the model merges into one token, is contiguous.
"""

import difflib
import json
import logging
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
import torch.nn.functional as F

from minim3.processing.media import MAX_PICTURE_PIXELS, Picture, load_picture

logger = logging.getLogger(__name__)

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
MAX_ASPECT_RATIO = 200
BICUBIC = 3  # Pillow's number, which the JSON files carry

# Keys of saved files that say nothing about the pixels, or nothing beyond what a switch beside them says.
_NEUTRAL_KEYS = frozenset(
    {"image_processor_type", "video_processor_type", "feature_extractor_type", "processor_class", "auto_map"}
    | {"default_to_square", "device", "disable_grouping", "return_tensors", "return_metadata", "video_metadata"}
    | {"size", "crop_size", "pad_size", "size_divisor", "do_sample_frames", "total_pixels", "transformers_version"}
)
# Keys whose other values would change the pixels in a way this code does not do.
_ONLY_VALUES: dict[str, tuple[Any, ...]] = {
    "do_center_crop": (None, False),
    "do_pad": (None, False),
    "data_format": (None, "channels_first"),
    "input_data_format": (None,),
    "num_frames": (None,),
}


def smart_resize(
    height: int, width: int, factor: int = 28, min_pixels: int = 4 * 28 * 28, max_pixels: int = 451584
) -> tuple[int, int]:
    """The (height, width) to resize to: multiples of `factor`, about the same shape, an area within the limits.

    The area of the rounded size (half to even, so a short side may round to 0) is what both limits test; past a limit
    the original sides are scaled to it and floored (not below one factor), or ceiled. A short side of one factor may
    leave the area above `max_pixels`. Raises ValueError for an empty picture or an aspect ratio over 200.
    """
    if height < 1 or width < 1:
        raise ValueError(f"a picture of {height} x {width} pixels (height x width) is empty")
    if max(height, width) > MAX_ASPECT_RATIO * min(height, width):
        raise ValueError(
            f"a picture of {height} x {width} pixels (height x width) has an aspect ratio of "
            f"{max(height, width) / min(height, width):.1f}, over the limit of {MAX_ASPECT_RATIO}; crop it"
        )
    new_height, new_width = round(height / factor) * factor, round(width / factor) * factor
    if new_height * new_width > max_pixels:
        shrink = math.sqrt(height * width / max_pixels)
        new_height = max(factor, math.floor(height / shrink / factor) * factor)
        new_width = max(factor, math.floor(width / shrink / factor) * factor)
    elif new_height * new_width < min_pixels:
        grow = math.sqrt(min_pixels / (height * width))
        new_height = math.ceil(height * grow / factor) * factor
        new_width = math.ceil(width * grow / factor) * factor
    return new_height, new_width


def resize_bicubic(picture: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """uint8 [C, H, W] -> uint8 [C, height, width], antialiased bicubic on the levels themselves.

    Resizing in float and rounding afterwards, or with PIL, differs by a level in many pixels.
    """
    if tuple(picture.shape[-2:]) == (height, width):
        return picture
    assert picture.dtype == torch.uint8
    resized = F.interpolate(
        picture[None].contiguous(), size=(height, width), mode="bicubic", align_corners=False, antialias=True
    )
    return resized[0]


def patchify(frames: torch.Tensor, patch_size: int, temporal_patch_size: int, merge_size: int) -> torch.Tensor:
    """Frames [T, C, H, W] -> patches [T/D * H/P * W/P, C*D*P*P], any dtype.

    Rows: temporal patch, then M x M blocks row by row, then the patches of a block row by row. Columns: channel, time,
    row, column. T must be a multiple of D; H and W of P*M (ValueError).
    """
    num_frames, channels, height, width = frames.shape
    factor = patch_size * merge_size
    if num_frames % temporal_patch_size or height % factor or width % factor:
        raise ValueError(
            f"{num_frames} frames of {height} x {width} pixels (height x width) do not divide into temporal patches of "
            f"{temporal_patch_size} and blocks of {factor} x {factor}; leave do_resize on"
        )
    t, h, w = num_frames // temporal_patch_size, height // factor, width // factor
    split = frames.reshape(t, temporal_patch_size, channels, h, merge_size, patch_size, w, merge_size, patch_size)
    ordered = split.permute(0, 3, 6, 4, 7, 2, 1, 5, 8)  # t, h, w, M, M, C, D, P, P
    return ordered.reshape(t * h * w * merge_size**2, channels * temporal_patch_size * patch_size**2)


def num_image_tokens(grid: Sequence[int] | torch.Tensor, merge_size: int = 2) -> int:
    """How many placeholder tokens a grid row (t, h, w) stands for: t * h * w / M**2."""
    t, h, w = (int(size) for size in grid)
    return t * h * w // merge_size**2


@dataclass(frozen=True, kw_only=True)
class PatchProcessor:
    """What turning pictures and turning clips into patches share: the settings, their JSON form, and the arithmetic.

    `min_pixels` and `max_pixels` bound the area after resizing; `rescale_factor`, `image_mean` and `image_std` give
    `(level * rescale_factor - mean) / std`. Settings are checked on construction (ValueError) and frozen. `extra` holds
    fields of a loaded JSON file that mean nothing here, to be written back. `max_picture_pixels` (refuse larger sources
    before decoding) and `allow_files` (False: paths are refused, as a server must) belong to this process, not to the
    file.
    """

    do_resize: bool = True
    resample: int = BICUBIC
    do_rescale: bool = True
    rescale_factor: float = 1 / 255
    do_normalize: bool = True
    image_mean: Sequence[float] | float = CLIP_MEAN
    image_std: Sequence[float] | float = CLIP_STD
    do_convert_rgb: bool = True
    patch_size: int = 14
    temporal_patch_size: int = 2
    merge_size: int = 2
    min_pixels: int = 4 * 28 * 28
    max_pixels: int = 451584
    max_picture_pixels: int = MAX_PICTURE_PIXELS
    allow_files: bool = True
    extra: Mapping[str, Any] = field(default_factory=dict)

    config_name: ClassVar[str]  # the file save_pretrained writes
    nested_key: ClassVar[str]  # where processor_config.json keeps these settings
    type_key: ClassVar[str]
    config_fallback: ClassVar[str | None] = None

    def __post_init__(self) -> None:
        for name in ("image_mean", "image_std"):
            value = getattr(self, name)
            channels = (float(value),) * 3 if isinstance(value, int | float) else tuple(float(one) for one in value)
            if len(channels) != 3:
                raise ValueError(f"{name} has {len(channels)} values, a picture has 3 channels")
            object.__setattr__(self, name, channels)
        for name in (
            "patch_size",
            "temporal_patch_size",
            "merge_size",
            "min_pixels",
            "max_pixels",
            "max_picture_pixels",
        ):
            check_count(name, getattr(self, name))
        if self.resample not in (BICUBIC, "bicubic"):
            raise ValueError(f"resample is {self.resample!r}; only bicubic ({BICUBIC}) is implemented")
        object.__setattr__(self, "resample", BICUBIC)
        if not (isinstance(self.rescale_factor, int | float) and self.rescale_factor > 0):
            raise ValueError(f"rescale_factor is {self.rescale_factor!r}, it must be above 0")
        if self.do_normalize and 0.0 in self.image_std:  # type: ignore[operator]
            raise ValueError(f"image_std {self.image_std} contains 0")

    def _load_picture(self, source: Picture) -> torch.Tensor:
        return load_picture(
            source,
            max_pixels=self.max_picture_pixels,
            allow_files=self.allow_files,
            convert_rgb=self.do_convert_rgb,
        )

    # -- arithmetic ---------------------------------------------------------------------------------------------------

    def target_size(self, height: int, width: int) -> tuple[int, int]:
        """The (height, width) in pixels that a picture or frame of this size is given to the model in."""
        factor = self.patch_size * self.merge_size
        if self.do_resize:
            return smart_resize(height, width, factor, self.min_pixels, self.max_pixels)
        if height % factor or width % factor or not height or not width:
            raise ValueError(
                f"do_resize is False and {height} x {width} pixels (height x width) are not multiples of {factor}"
            )
        return height, width

    def _normalize_into(self, patches: torch.Tensor, out: torch.Tensor) -> None:
        """uint8 or float patches [N, C*D*P*P] -> fp32 `out` of the same shape.

        Rescaling is folded into mean and std, in this order of operations, to give the published bits.
        """
        per_channel = (patches.shape[0], 3, -1)
        levels, result = patches.view(per_channel), out.view(per_channel)
        if not self.do_normalize:
            torch.mul(levels, self.rescale_factor if self.do_rescale else 1.0, out=result)
            return
        scale = 1.0 / self.rescale_factor if self.do_rescale else 1.0
        mean = torch.tensor(self.image_mean)[:, None] * scale
        std = torch.tensor(self.image_std)[:, None] * scale
        torch.sub(levels, mean, out=result).div_(std)

    # -- settings -----------------------------------------------------------------------------------------------------

    def _settings(self) -> dict[str, Any]:
        return {one.name: getattr(self, one.name) for one in fields(self)}

    def with_settings(self, **changes: Any) -> Self:
        """A copy with other settings; an unknown name is a TypeError."""
        if not changes:
            return self
        settings = self._settings()
        names = {*settings, *self._accepted_names()}
        for name in changes:
            if name not in names:
                near = difflib.get_close_matches(name, names, n=1)
                hint = f"; did you mean {near[0]!r}?" if near else f"; it has {', '.join(sorted(names))}"
                raise TypeError(f"{type(self).__name__} has no setting {name!r}{hint}")
        if "size" in changes:  # a new size replaces both limits unless they are given beside it
            del settings["min_pixels"], settings["max_pixels"]
        return type(self)(**{**settings, **changes})

    def to_dict(self) -> dict[str, Any]:
        """The JSON form that transformers reads."""
        settings = self._settings()
        del settings["extra"], settings["max_picture_pixels"], settings["allow_files"]
        for name in ("image_mean", "image_std"):
            settings[name] = list(settings[name])
        return {**self.extra, **settings, self.type_key: type(self).__name__}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], **overrides: Any) -> Self:
        """Settings from a preprocessor file. ValueError for a value that would change the pixels and is not
        implemented; unknown fields are kept in `extra` and logged.
        """
        names = cls._accepted_names()
        settings: dict[str, Any] = {}
        extra: dict[str, Any] = {}
        for key, value in values.items():
            if key == cls.type_key:
                continue
            if key in names:
                if value is not None or key == "vision_segment_max_frames":
                    settings[key] = value
                continue
            if key in _ONLY_VALUES and value not in _ONLY_VALUES[key]:
                raise ValueError(f"{cls.__name__}: {key}={value!r} is not implemented; only {_ONLY_VALUES[key]}")
            if key not in _NEUTRAL_KEYS and key not in _ONLY_VALUES:
                logger.warning("%s: the field %s=%r is unknown and has no effect", cls.__name__, key, value)
            extra[key] = value
        return cls(**{**settings, "extra": extra, **overrides})

    @classmethod
    def _accepted_names(cls) -> set[str]:
        return {one.name for one in fields(cls)} - {"extra", "max_picture_pixels", "allow_files"}

    @classmethod
    def from_pretrained(cls, path: str | Path, **overrides: Any) -> Self:
        """Settings from a checkpoint folder (processor_config.json, else the class's own file) or from one JSON file.

        Raises ValueError when there is none, or when it is not a JSON object.
        """
        folder = Path(path)
        if folder.is_file():
            return cls.from_dict(_read_json(folder), **overrides)
        tried = ["processor_config.json", cls.config_name] + ([cls.config_fallback] if cls.config_fallback else [])
        for name in tried:
            if not (folder / name).is_file():
                continue
            values = _read_json(folder / name)
            if name == "processor_config.json":
                if not isinstance(values.get(cls.nested_key), dict):
                    continue  # older files keep only the processor's own settings
                values = values[cls.nested_key]
            return cls.from_dict(values, **overrides)
        raise ValueError(f"{str(path)!r} holds none of {', '.join(tried)}")

    def save_pretrained(self, path: str | Path) -> Path:
        """Writes the settings into the folder `path` (made if missing) and returns the file."""
        target = Path(path) / self.config_name
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = target.with_suffix(f".{os.getpid()}.partial")
        partial.write_text(json.dumps(self.to_dict(), indent=2, sort_keys=True) + "\n", encoding="utf-8")
        partial.replace(target)
        return target


def check_count(name: str, value: object) -> None:
    """ValueError unless `value` is a whole number of at least 1."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name} is {value!r}, it must be a whole number of at least 1")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{str(path)!r} cannot be read as JSON: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{str(path)!r} holds a {type(values).__name__}, not an object of settings")
    return values


def to_return_type(values: dict[str, Any], return_tensors: str | None) -> dict[str, Any]:
    """Tensors as they are ("pt" or None) or as numpy arrays ("np"); what is no tensor stays."""
    kind = getattr(return_tensors, "value", return_tensors)
    if kind in (None, "pt"):
        return values
    if kind != "np":
        raise ValueError(f"return_tensors is {return_tensors!r}; it is 'pt' or 'np'")
    return {name: one.numpy() if isinstance(one, torch.Tensor) else one for name, one in values.items()}
