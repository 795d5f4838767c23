"""Pictures from wherever they come: a path, a data URL, bytes, PIL, an array or a tensor -> uint8 RGB [3, height,
width].

Everything here treats a file as hostile until it is decoded: the format is one of a short list, the size in the header
is checked before any pixel is, URLs are off, and whatever a decoder complains about becomes one `ValueError` that names
the file.
"""

import base64
import binascii
import io
import struct
import zlib
from functools import cache
from pathlib import Path
from typing import BinaryIO
from urllib.parse import unquote, unquote_to_bytes, urlparse

import numpy as np
import torch
from PIL import Image, ImageOps

Picture = Image.Image | np.ndarray | torch.Tensor | str | Path | bytes

# 64 Mi pixels are 192 MiB of RGB: above every phone's default picture, below the size at which Pillow starts to warn.
MAX_PICTURE_PIXELS = 64 * 1024 * 1024

# Formats people send, as far as this Pillow was built with them. Pillow knows thirty more; some of them start other
# programs (EPS) and few are ever fuzzed.
PICTURE_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "DIB", "TIFF", "PPM", "AVIF", "JPEG2000", "ICO")
PICTURE_SUFFIXES = frozenset(
    {".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".ppm", ".pgm", ".pbm", ".avif", ".jp2", ".ico"}
)

# What Pillow's decoders raise on broken input, collected by fuzzing them (tests/test_processing_media.py).
_DECODER_ERRORS = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    OverflowError,
    MemoryError,
    RuntimeError,  # AVIF
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
)


def describe_source(source: object) -> str:
    """How an error names a picture or clip: its path, or what kind of object it is."""
    if isinstance(source, str) and source.startswith("data:"):
        return f"data URL ({source[5:].split(',', 1)[0][:40]}, {len(source)} characters)"
    if isinstance(source, str | Path):
        text = str(source)
        return repr(text if len(text) <= 200 else text[:200] + "...")
    if isinstance(source, bytes):
        return f"{len(source)} bytes"
    if isinstance(source, np.ndarray | torch.Tensor):
        return f"{type(source).__name__} {list(source.shape)} {source.dtype}"
    return type(source).__name__


def open_source(source: str | Path | bytes, *, kind: str = "picture", allow_files: bool = True) -> BinaryIO:
    """Opens a path, a `file://` URL, a data URL or bytes for reading.

    `kind` ("picture" or "video") only words the errors. `allow_files=False` refuses paths: a server must not read its
    own disk for a client. Raises ValueError for http(s) and other URLs, a missing file, a folder, or a malformed data
    URL.
    """
    name = describe_source(source)
    if isinstance(source, bytes):
        return io.BytesIO(source)
    if isinstance(source, str):
        scheme = source.split(":", 1)[0].lower() if ":" in source[:20] else ""
        if scheme == "data":
            return io.BytesIO(_decode_data_url(source, kind, name))
        if "://" in source[:20] and scheme != "file":
            raise ValueError(f"{kind} {name}: URLs are off; download it and pass its path or bytes")
        if scheme == "file":
            source = unquote(urlparse(source).path)
    if not allow_files:
        raise ValueError(f"{kind} {name}: files are off here; send the {kind} as a data URL")
    if "\0" in str(source):
        raise ValueError(f"{kind} {name}: a path cannot contain a zero byte")
    path = Path(source).expanduser()
    try:
        if path.is_dir():
            raise ValueError(f"{kind} {name} is a folder, not a file")
        if path.exists() and not path.is_file():  # a pipe or device could block or never end
            raise ValueError(f"{kind} {name} is not a regular file")
        return path.open("rb")
    except OSError as error:
        raise ValueError(f"{kind} {name} cannot be opened: {error.strerror or error}") from error


def _decode_data_url(url: str, kind: str, name: str) -> bytes:
    header, comma, payload = url.partition(",")
    if not comma:
        raise ValueError(f"{kind} {name} has no comma: a data URL is data:image/png;base64,...")
    if not header.lower().endswith(";base64"):
        return unquote_to_bytes(payload)
    try:
        return base64.b64decode("".join(unquote(payload).split()), validate=True)
    except (binascii.Error, ValueError) as error:
        raise ValueError(f"{kind} {name} is not valid base64: {error}") from error


def load_picture(
    source: Picture,
    *,
    max_pixels: int = MAX_PICTURE_PIXELS,
    allow_files: bool = True,
    convert_rgb: bool = True,
) -> torch.Tensor:
    """One picture as an upright uint8 RGB tensor [3, height, width] on the CPU.

    Files, bytes and PIL pictures: the EXIF orientation is applied, transparency is laid on white, 16-bit grey is cut to
    its high byte, of an animation the first frame is taken. Arrays and tensors: [H, W], [H, W, C] or [C, H, W] with 1,
    3 or 4 channels (channels first where both fit), uint8, or floating point from 0 to 1 (rounded to levels).

    Raises ValueError naming the source: unreadable, truncated or of another format, empty, more than `max_pixels`
    pixels (read from the header, before decoding), wrong shape or dtype, or not RGB while `convert_rgb` is False.
    """
    if isinstance(source, np.ndarray | torch.Tensor):
        return _array_to_rgb(source, max_pixels, convert_rgb)
    if isinstance(source, Image.Image):
        return _pil_to_rgb(source, describe_source(source), max_pixels, convert_rgb)
    if not isinstance(source, str | Path | bytes):
        raise ValueError(
            f"a picture is a path, data URL, bytes, PIL picture, array or tensor; this is a {type(source).__name__}"
        )
    name = describe_source(source)
    with open_source(source, allow_files=allow_files) as file:
        try:
            picture = Image.open(file, formats=_built_formats())
        except _DECODER_ERRORS as error:
            raise ValueError(f"picture {name} cannot be read: {_reason(error)}") from error
        with picture:
            return _pil_to_rgb(picture, name, max_pixels, convert_rgb)


@cache
def _built_formats() -> tuple[str, ...]:
    Image.init()
    return tuple(name for name in PICTURE_FORMATS if name in Image.OPEN)


def _reason(error: BaseException) -> str:
    if isinstance(error, Image.UnidentifiedImageError):
        return "not a picture of a known format (" + ", ".join(_built_formats()) + ")"
    return str(error) or type(error).__name__


def _check_size(height: int, width: int, max_pixels: int, name: str) -> None:
    if height < 1 or width < 1:
        raise ValueError(f"picture {name} is empty: {height} x {width} pixels (height x width)")
    if height * width > max_pixels:
        raise ValueError(
            f"picture {name} has {height} x {width} = {height * width} pixels, more than the limit of {max_pixels}; "
            "make it smaller"
        )


def _pil_to_rgb(picture: Image.Image, name: str, max_pixels: int, convert_rgb: bool) -> torch.Tensor:
    width, height = picture.size
    _check_size(height, width, max_pixels, name)
    try:
        if getattr(picture, "is_animated", False):
            picture.seek(0)
        upright = ImageOps.exif_transpose(picture)
        if not convert_rgb and upright.mode != "RGB":
            raise ValueError(f"mode {upright.mode!r} is not RGB and do_convert_rgb is False")
        rgb = _convert_mode(upright)
        array = np.array(rgb)
    except _DECODER_ERRORS as error:
        raise ValueError(f"picture {name} cannot be decoded: {_reason(error)}") from error
    return torch.from_numpy(array).permute(2, 0, 1).contiguous()


def _convert_mode(picture: Image.Image) -> Image.Image:
    if picture.mode == "RGB" and "transparency" not in picture.info:
        return picture
    if picture.mode in ("I", "F"):
        raise ValueError(f"mode {picture.mode!r} (32-bit values without a fixed range); convert it to 8 bits first")
    if picture.mode.startswith("I;16"):  # convert("RGB") would clip at 255 and leave a white picture
        levels = np.array(picture).astype(np.uint16) >> 8
        return Image.fromarray(levels.astype(np.uint8)).convert("RGB")
    if "A" in picture.getbands() or "a" in picture.getbands() or "transparency" in picture.info:
        picture = picture.convert("RGBA")
        white = Image.new("RGBA", picture.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, picture).convert("RGB")
    return picture.convert("RGB")


def channel_axis(shape: tuple[int, ...]) -> int:
    """Which axis of [..., C, H, W] or [..., H, W, C] holds 1, 3 or 4 channels: -3 (also where both fit) or -1."""
    for axis in (-3, -1):
        if shape[axis] in (1, 3, 4):
            return axis
    raise ValueError(f"an array {list(shape)} has no axis of 1, 3 or 4 channels, first or last")


def to_uint8_levels(values: torch.Tensor, name: str) -> torch.Tensor:
    """uint8 as it is; floating point from 0 to 1 rounded to 0..255. ValueError for other dtypes and ranges."""
    if values.dtype == torch.uint8:
        return values
    if not values.is_floating_point():
        raise ValueError(
            f"picture {name}: the dtype is uint8 (0 to 255) or floating point (0 to 1), not {values.dtype}"
        )
    if values.numel() == 0:
        return values.to(torch.uint8)
    low, high = values.aminmax()
    if not (low >= 0 and high <= 1):  # written so that NaN is refused too
        raise ValueError(
            f"picture {name}: floating point values go from 0 to 1, these from {low.item():g} to {high.item():g}; "
            "pass levels from 0 to 255 as uint8"
        )
    return (values.to(torch.float32) * 255).round().to(torch.uint8)


def _array_to_rgb(array: np.ndarray | torch.Tensor, max_pixels: int, convert_rgb: bool) -> torch.Tensor:
    name = describe_source(array)
    if isinstance(array, np.ndarray):
        if array.dtype.kind not in "uf" or array.dtype.itemsize > 8:
            raise ValueError(f"picture {name}: the dtype is uint8 (0 to 255) or floating point (0 to 1)")
        values = torch.from_numpy(np.ascontiguousarray(array))
    else:
        values = array.detach().cpu()
    if values.ndim == 2:
        values = values[None]
    if values.ndim != 3:
        raise ValueError(
            f"picture {name}: a picture has 2 or 3 axes ([H, W], [H, W, C] or [C, H, W]), not {array.ndim}"
        )
    try:
        values = values.movedim(channel_axis(tuple(values.shape)), 0)
    except ValueError as error:
        raise ValueError(f"picture {name}: {error}") from error
    _check_size(values.shape[1], values.shape[2], max_pixels, name)
    if not convert_rgb and values.shape[0] != 3:
        raise ValueError(f"picture {name} has {values.shape[0]} channels and do_convert_rgb is False")
    return channels_to_rgb(to_uint8_levels(values, name)).contiguous()


def channels_to_rgb(levels: torch.Tensor) -> torch.Tensor:
    """uint8 [C, H, W] with 1, 3 or 4 channels -> [3, H, W]: grey is repeated, an alpha channel is laid on white."""
    if levels.shape[0] == 1:
        return levels.expand(3, -1, -1)
    if levels.shape[0] == 4:
        values = levels.to(torch.float32) * (1 / 255)
        alpha = values[3:]
        # 255.999 and truncation instead of rounding: the levels transformers gives for RGBA arrays.
        return ((values[:3] * alpha + (1 - alpha)) * 255.999).to(torch.uint8)
    return levels
