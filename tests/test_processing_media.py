"""Pictures and clips -> patches: golden equality, sizes, layouts, hostile files, sampled times."""

import base64
import contextlib
import io
import itertools
import json
import struct
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file

from minim3.processing.image import MiniMaxM3VLImageProcessor, num_image_tokens, patchify, smart_resize
from minim3.processing.media import load_picture
from minim3.processing.patches import CLIP_MEAN, CLIP_STD
from minim3.processing.video import MiniMaxM3VLVideoProcessor, VideoMetadata, sample_frame_indices

GOLDEN = Path(__file__).parent / "golden"
CASES = json.loads((GOLDEN / "processors.json").read_text())
TOLERANCE = 0.01 / 255


@pytest.fixture(scope="module")
def golden() -> dict[str, torch.Tensor]:
    return load_file(GOLDEN / "processors.safetensors")


def noise(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def png(picture: Image.Image, **options: object) -> bytes:
    file = io.BytesIO()
    picture.save(file, "PNG", **options)
    return file.getvalue()


# -- golden -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES["smart_resize"], ids=lambda case: f"{case['height']}x{case['width']}")
def test_smart_resize_table(case: dict) -> None:
    assert list(smart_resize(case["height"], case["width"], 28, 3136, 451584)) == case["result"]


@pytest.mark.parametrize(
    "form", ["tensor_hwc", "tensor_chw", "array_hwc", "array_chw", "pil", "png", "data_url", "path"]
)
@pytest.mark.parametrize("index", range(len(CASES["images"])))
def test_image_golden_in_every_form(golden: dict, index: int, form: str, tmp_path: Path) -> None:
    """Resizing in float or with PIL, or reading one form's axes wrongly, shifts levels."""
    case = CASES["images"][index]
    hwc = golden[f"image{index}.uint8_hwc"]
    data = png(Image.fromarray(hwc.numpy()))
    (tmp_path / "picture.png").write_bytes(data)
    source = {
        "tensor_hwc": hwc,
        "tensor_chw": hwc.permute(2, 0, 1),
        "array_hwc": hwc.numpy(),
        "array_chw": hwc.numpy().transpose(2, 0, 1),
        "pil": Image.fromarray(hwc.numpy()),
        "png": data,
        "data_url": "data:image/png;base64," + base64.b64encode(data).decode(),
        "path": tmp_path / "picture.png",
    }[form]
    out = MiniMaxM3VLImageProcessor(min_pixels=case["min_pixels"], max_pixels=case["max_pixels"])(images=[source])
    assert out["image_grid_thw"].dtype == torch.int64
    assert out["image_grid_thw"].tolist() == [case["grid_thw"]]
    assert out["pixel_values"].dtype == torch.float32
    torch.testing.assert_close(out["pixel_values"], golden[f"image{index}.pixel_values"], rtol=0, atol=TOLERANCE)


def test_several_images_are_the_single_ones_in_order(golden: dict) -> None:
    sources = [golden[f"image{index}.uint8_hwc"] for index in range(5)]
    processor = MiniMaxM3VLImageProcessor()
    together = processor(images=[[sources[0]], sources[1:3], [[sources[3]], sources[4]]])
    single = [processor(source) for source in sources]
    assert torch.equal(together["pixel_values"], torch.cat([one["pixel_values"] for one in single]))
    assert torch.equal(together["image_grid_thw"], torch.cat([one["image_grid_thw"] for one in single]))


@pytest.mark.parametrize("as_list", [False, True])
@pytest.mark.parametrize("index", range(len(CASES["videos"])))
def test_video_golden(golden: dict, index: int, as_list: bool) -> None:
    """Chunks of four temporal patches; an odd last frame is repeated."""
    case = CASES["videos"][index]
    clip = golden[f"video{index}.uint8_thwc"]
    video = [Image.fromarray(frame) for frame in clip.numpy()] if as_list else clip
    out = MiniMaxM3VLVideoProcessor(do_resize=False)(videos=[video])
    assert out["video_grid_thw"].tolist() == case["video_grid_thw"]
    assert list(out["num_chunks_per_video"]) == case["num_chunks_per_video"]
    expected = golden[f"video{index}.pixel_values_videos"]
    torch.testing.assert_close(out["pixel_values_videos"], expected, rtol=0, atol=TOLERANCE)


def test_video_golden_resized(golden: dict) -> None:
    case = CASES["video_resized"]
    processor = MiniMaxM3VLVideoProcessor(min_pixels=case["min_pixels"], max_pixels=case["max_pixels"])
    out = processor(videos=golden["video_resized.uint8_thwc"].permute(0, 3, 1, 2))
    assert out["video_grid_thw"].tolist() == case["video_grid_thw"]
    expected = golden["video_resized.pixel_values_videos"]
    torch.testing.assert_close(out["pixel_values_videos"], expected, rtol=0, atol=TOLERANCE)


# -- sizes and layout -------------------------------------------------------------------------------------------------


@given(
    height=st.integers(1, 6000),
    width=st.integers(1, 6000),
    factor=st.sampled_from([8, 28, 32]),
    limits=st.tuples(st.integers(1, 20000), st.integers(1, 1_000_000)),
)
def test_smart_resize_limits(height: int, width: int, factor: int, limits: tuple[int, int]) -> None:
    low, high = limits[0], limits[0] + limits[1]
    if max(height, width) > 200 * min(height, width):
        with pytest.raises(ValueError, match="aspect ratio"):
            smart_resize(height, width, factor, low, high)
        return
    new_height, new_width = smart_resize(height, width, factor, low, high)
    assert new_height % factor == new_width % factor == 0
    assert new_height >= factor  # a side that rounds to 0 must not survive
    assert new_width >= factor
    # Above the limit only where a side could not get smaller than one factor.
    rounded = round(height / factor) * factor * round(width / factor) * factor
    if rounded > high:
        assert new_height * new_width <= high or min(new_height, new_width) == factor
    else:
        assert new_height * new_width >= low
    if low <= rounded <= high:
        assert abs(new_height - height) <= factor / 2
        assert abs(new_width - width) <= factor / 2


def test_smart_resize_rounds_half_to_even_and_survives_zero() -> None:
    assert smart_resize(42, 280, 28, 1, 10**9) == (56, 280)  # 1.5 -> 2
    assert smart_resize(70, 280, 28, 1, 10**9) == (56, 280)  # 2.5 -> 2, not 3
    assert smart_resize(14, 2000, 28, 1, 10**9) == (28, 28)  # 0.5 -> 0: area 0 is under the least area
    assert smart_resize(1, 200) == (28, 812)
    with pytest.raises(ValueError, match=r"201\.0.*200"):
        smart_resize(1, 201)
    with pytest.raises(ValueError, match="empty"):
        smart_resize(0, 10)


def unpatchify(patches: torch.Tensor, t: int, h: int, w: int, d: int, m: int, p: int) -> torch.Tensor:
    """The layout written out one patch at a time: the slow definition that patchify is held against."""
    frames = torch.zeros(t * d, 3, h * p, w * p, dtype=patches.dtype)
    row = 0
    for time in range(t):
        for block_row in range(h // m):
            for block_column in range(w // m):
                for i in range(m):
                    for j in range(m):
                        y, x = (block_row * m + i) * p, (block_column * m + j) * p
                        patch = patches[row].reshape(3, d, p, p)
                        frames[time * d : time * d + d, :, y : y + p, x : x + p] = patch.transpose(0, 1)
                        row += 1
    return frames


@settings(max_examples=30)
@given(
    t=st.integers(1, 3),
    h=st.integers(1, 3),
    w=st.integers(1, 3),
    d=st.integers(1, 3),
    m=st.integers(1, 3),
    p=st.integers(1, 5),
)
def test_patchify_inverse(t: int, h: int, w: int, d: int, m: int, p: int) -> None:
    frames = torch.arange(t * d * 3 * h * m * p * w * m * p).reshape(t * d, 3, h * m * p, w * m * p)
    patches = patchify(frames, p, d, m)
    assert patches.shape == (t * h * m * w * m, 3 * d * p * p)
    assert torch.equal(unpatchify(patches, t, h * m, w * m, d, m, p), frames)
    assert num_image_tokens((t, h * m, w * m), m) == t * h * w


def test_normalisation_settings() -> None:
    levels = noise(56, 56)
    raw = MiniMaxM3VLImageProcessor(do_rescale=False, do_normalize=False)(levels)["pixel_values"]
    assert raw.dtype == torch.float32
    assert torch.equal(unpatchify(raw, 1, 4, 4, 2, 2, 14)[1], torch.from_numpy(levels).permute(2, 0, 1).float())
    scaled = MiniMaxM3VLImageProcessor(do_normalize=False)(levels)["pixel_values"]
    torch.testing.assert_close(scaled, raw / 255)
    full = MiniMaxM3VLImageProcessor()(levels)["pixel_values"].view(16, 3, -1)
    mean, std = torch.tensor(CLIP_MEAN)[:, None], torch.tensor(CLIP_STD)[:, None]
    torch.testing.assert_close(full, (raw.view(16, 3, -1) / 255 - mean) / std, rtol=1e-5, atol=1e-5)
    assert torch.equal(MiniMaxM3VLImageProcessor()(levels, do_normalize=False)["pixel_values"], scaled)


def test_other_patch_sizes_reach_the_grid() -> None:
    processor = MiniMaxM3VLImageProcessor(patch_size=8, merge_size=4, temporal_patch_size=1, min_pixels=1)
    out = processor(noise(70, 100))
    assert out["image_grid_thw"].tolist() == [[1, 8, 12]]
    assert out["pixel_values"].shape == (96, 3 * 64)
    assert processor.get_number_of_image_patches(70, 100) == 96
    numpy_out = processor(noise(70, 100), return_tensors="np")
    assert isinstance(numpy_out["pixel_values"], np.ndarray)


# -- picture forms ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_makes_pictures_upright(orientation: int) -> None:
    """A phone's picture arrives lying on its side when the tag is ignored."""
    stored = Image.fromarray(noise(40, 60))
    exif = Image.Exif()
    exif[0x0112] = orientation
    loaded = load_picture(png(stored, exif=exif))
    turns = {2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
             5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE,
             8: Image.Transpose.ROTATE_90}  # fmt: skip
    upright = stored.transpose(turns[orientation]) if orientation > 1 else stored
    assert np.array_equal(loaded.permute(1, 2, 0).numpy(), np.array(upright))


def test_transparency_is_laid_on_white() -> None:
    rgba = np.zeros((28, 28, 4), np.uint8)
    rgba[:, 14:] = (10, 20, 30, 255)
    for source in (Image.fromarray(rgba), rgba, torch.from_numpy(rgba).permute(2, 0, 1), png(Image.fromarray(rgba))):
        picture = load_picture(source)
        assert picture[:, 0, 0].tolist() == [255, 255, 255]
        assert picture[:, 0, 20].tolist() == [10, 20, 30]
    half = torch.tensor([[[10, 200, 0, 128]]], dtype=torch.uint8).expand(8, 8, 4)
    assert load_picture(half)[:, 0, 0].tolist() == [132, 228, 127]  # as transformers blends RGBA arrays
    grey_alpha = Image.merge("LA", (Image.new("L", (8, 8), 50), Image.new("L", (8, 8), 0)))
    assert load_picture(grey_alpha)[:, 0, 0].tolist() == [255] * 3
    palette = Image.new("P", (8, 8), 1)
    palette.putpalette([0, 0, 0, 9, 8, 7])
    assert load_picture(palette)[:, 0, 0].tolist() == [9, 8, 7]
    assert load_picture(png(palette, transparency=1))[:, 0, 0].tolist() == [255] * 3


def test_modes() -> None:
    assert load_picture(Image.new("L", (4, 4), 77))[:, 0, 0].tolist() == [77] * 3
    assert load_picture(Image.new("1", (4, 4), 1))[:, 0, 0].tolist() == [255] * 3
    assert load_picture(Image.new("CMYK", (4, 4), (0, 255, 255, 0)))[:, 0, 0].tolist() == [255, 0, 0]
    deep = Image.fromarray(np.full((4, 4), 0x4D12, np.uint16))
    assert deep.mode == "I;16"
    assert load_picture(deep)[:, 0, 0].tolist() == [0x4D] * 3  # Pillow's own conversion gives white
    assert load_picture(png(deep))[:, 0, 0].tolist() == [0x4D] * 3
    assert load_picture(np.full((4, 5), 9, np.uint8)).shape == (3, 4, 5)
    with pytest.raises(ValueError, match="'F'"):
        load_picture(Image.new("F", (4, 4)))
    with pytest.raises(ValueError, match="do_convert_rgb"):
        MiniMaxM3VLImageProcessor(do_convert_rgb=False)(Image.new("L", (56, 56)))


def test_animation_gives_its_first_frame() -> None:
    file = io.BytesIO()
    frames = [Image.new("RGB", (20, 20), color) for color in ("red", "lime", "blue")]
    frames[0].save(file, "GIF", save_all=True, append_images=frames[1:])
    picture = Image.open(io.BytesIO(file.getvalue()))
    picture.seek(2)
    assert load_picture(picture)[:, 0, 0].tolist() == [255, 0, 0]
    assert load_picture(file.getvalue())[:, 0, 0].tolist() == [255, 0, 0]


def test_floating_point_pictures_go_from_0_to_1() -> None:
    levels = noise(30, 40)
    assert np.array_equal(load_picture(levels.astype(np.float32) / 255).permute(1, 2, 0).numpy(), levels)
    assert torch.equal(load_picture(torch.from_numpy(levels).double() / 255), load_picture(levels))
    with pytest.raises(ValueError, match=r"from 0 to 1.*255"):
        load_picture(np.full((4, 4, 3), 255.0))
    with pytest.raises(ValueError, match="from 0 to 1"):
        load_picture(np.full((4, 4, 3), np.nan))


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (np.zeros((4, 4, 3), np.int64), "dtype"),
        (np.zeros((4, 4, 3), np.uint16), "dtype"),
        (torch.zeros(4, 4, 3, dtype=torch.bool), "dtype"),
        (np.zeros((6, 6, 5), np.uint8), r"\[6, 6, 5\].*channels"),
        (np.zeros((2, 3, 4, 4, 3), np.uint8), "axes"),
        (np.zeros((0, 4, 3), np.uint8), "empty"),
        (Image.new("RGB", (0, 3)), "empty"),
        (3.5, "float"),
        ("https://example.com/cat.png", "URLs are off"),
        ("ftp://example.com/cat.png", "URLs are off"),
        ("/nowhere/cat.png", "/nowhere/cat.png"),
        ("/", "folder"),
        ("/dev/zero", "regular file"),
        ("a\0b", "zero byte"),
        ("data:image/png;base64", "comma"),
        ("data:image/png;base64,????", "base64"),
        ("data:image/png;base64,aGVsbG8=", "not a picture"),
        (b"", "not a picture"),
        (b"hello", "not a picture"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not a picture"),
    ],
)
def test_bad_pictures_are_one_clear_error(source: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_picture(source)  # type: ignore[arg-type]


def test_bad_batches() -> None:
    with pytest.raises(ValueError, match="empty"):
        MiniMaxM3VLImageProcessor()([])
    with pytest.raises(ValueError, match=r"picture 2 of 2.*aspect ratio"):
        MiniMaxM3VLImageProcessor()([noise(30, 30), Image.new("RGB", (201, 1))])
    with pytest.raises(ValueError, match="multiples of 28"):
        MiniMaxM3VLImageProcessor(do_resize=False)(noise(30, 56))
    with pytest.raises(ValueError, match="return_tensors"):
        MiniMaxM3VLImageProcessor()(noise(30, 30), return_tensors="tf")
    with pytest.raises(TypeError, match="sharpen"):
        MiniMaxM3VLImageProcessor()(noise(30, 30), sharpen=True)


def test_files_can_be_refused(tmp_path: Path) -> None:
    """A server reads no path that a client sends."""
    Image.new("RGB", (60, 60)).save(tmp_path / "a.png")
    assert load_picture(f"file://{tmp_path}/a.png").shape == (3, 60, 60)
    processor = MiniMaxM3VLImageProcessor(allow_files=False)
    for source in (str(tmp_path / "a.png"), tmp_path / "a.png", f"file://{tmp_path}/a.png"):
        with pytest.raises(ValueError, match="files are off"):
            processor(source)
        with pytest.raises(ValueError, match="files are off"):
            MiniMaxM3VLVideoProcessor(allow_files=False)(source)
    assert processor((tmp_path / "a.png").read_bytes())["image_grid_thw"].tolist() == [[1, 4, 4]]


def test_decompression_bomb_is_refused_by_its_header() -> None:
    """A few hundred bytes may state gigapixels: the header's size counts, nothing is decoded."""
    data = bytearray(png(Image.new("1", (8, 8))))
    for side, message in ((9000, "81000000 pixels, more than the limit"), (100_000, "decompression bomb")):
        data[16:24] = struct.pack(">II", side, side)
        data[29:33] = struct.pack(">I", zlib.crc32(bytes(data[12:29])))
        with pytest.raises(ValueError, match=message):
            load_picture(bytes(data))
    with pytest.raises(ValueError, match="limit of 100"):
        MiniMaxM3VLImageProcessor(max_picture_pixels=100)(noise(20, 20))


@pytest.mark.filterwarnings("ignore")  # Pillow remarks on what the damage did to the metadata
@pytest.mark.parametrize("name", ["PNG", "JPEG", "GIF", "BMP", "WEBP", "TIFF"])
def test_truncated_and_damaged_files(name: str, tmp_path: Path) -> None:
    """Whatever a decoder raises on a broken file, the caller sees a ValueError with the file's name."""
    file = io.BytesIO()
    Image.fromarray(noise(50, 70)).save(file, name)
    data = file.getvalue()
    path = tmp_path / f"cut.{name.lower()}"
    path.write_bytes(data[: len(data) // 2])
    with pytest.raises(ValueError, match=path.name):
        load_picture(path)
    random = np.random.default_rng(1)
    for _ in range(150):
        broken = bytearray(data)
        for position in random.integers(0, min(len(data), 400), 6):
            broken[position] = random.integers(256)
        with contextlib.suppress(ValueError):
            load_picture(bytes(broken[: random.integers(1, len(broken) + 1)]))


# -- settings ---------------------------------------------------------------------------------------------------------


def test_settings_round_trip(tmp_path: Path) -> None:
    image = MiniMaxM3VLImageProcessor(
        min_pixels=784, max_pixels=7840, image_mean=0.5, image_std=[0.5, 0.4, 0.3], patch_size=7
    )
    assert image.save_pretrained(tmp_path).name == "preprocessor_config.json"
    assert MiniMaxM3VLImageProcessor.from_pretrained(tmp_path) == image
    video = MiniMaxM3VLVideoProcessor(max_frames=9, fps=2.5, vision_segment_max_frames=None)
    # without its own file a clip takes the picture file's patch size, not its `size`, as transformers does
    fallback = MiniMaxM3VLVideoProcessor.from_pretrained(tmp_path)
    assert (fallback.patch_size, fallback.max_pixels) == (7, 768 * 28 * 28)
    assert video.save_pretrained(tmp_path).name == "video_preprocessor_config.json"
    assert MiniMaxM3VLVideoProcessor.from_pretrained(tmp_path) == video
    nested = {"image_processor": image.to_dict(), "video_processor": video.to_dict(), "processor_class": "x"}
    (tmp_path / "n").mkdir()
    (tmp_path / "n" / "processor_config.json").write_text(json.dumps(nested))
    assert MiniMaxM3VLImageProcessor.from_pretrained(tmp_path / "n") == image
    assert MiniMaxM3VLVideoProcessor.from_pretrained(tmp_path / "n") == video
    assert not list(tmp_path.glob("*.partial"))


def test_size_forms_and_unknown_fields(caplog: pytest.LogCaptureFixture) -> None:
    from_dict = MiniMaxM3VLImageProcessor.from_dict
    assert from_dict({"size": {"shortest_edge": 784, "longest_edge": 1568}}).size == {
        "shortest_edge": 784,
        "longest_edge": 1568,
    }
    assert from_dict({"size": [672, 672]}).max_pixels == 451584
    assert from_dict({"size": {"shortest_edge": 784, "longest_edge": 1568}, "max_pixels": 3000}).max_pixels == 3000
    changed = MiniMaxM3VLImageProcessor(min_pixels=784).with_settings(size={"longest_edge": 9408})
    assert (changed.min_pixels, changed.max_pixels) == (3136, 9408)
    assert not caplog.records
    loaded = from_dict({"zoom": 3, "image_processor_type": "x", "do_pad": None, "do_resize": None})
    assert "zoom" in caplog.text
    assert loaded.to_dict()["zoom"] == 3
    assert loaded.to_dict()["image_processor_type"] == "MiniMaxM3VLImageProcessor"


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"size": {"height": 100, "width": 100}}, "size"),
        ({"resample": 2}, "resample"),
        ({"do_pad": True}, "do_pad"),
        ({"do_center_crop": True}, "do_center_crop"),
        ({"data_format": "channels_last"}, "data_format"),
        ({"image_mean": [0.5]}, "image_mean"),
        ({"image_std": 0.0}, "image_std"),
        ({"patch_size": 0}, "patch_size"),
        ({"min_pixels": 0}, "min_pixels"),
        ({"rescale_factor": 0}, "rescale_factor"),
    ],
)
def test_settings_that_cannot_be_honoured(values: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MiniMaxM3VLImageProcessor.from_dict(values)


def test_missing_or_broken_settings_file(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"video_preprocessor_config\.json"):
        MiniMaxM3VLVideoProcessor.from_pretrained(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text("{")
    with pytest.raises(ValueError, match="JSON"):
        MiniMaxM3VLImageProcessor.from_pretrained(tmp_path)


# -- clips ------------------------------------------------------------------------------------------------------------


@given(total=st.integers(1, 100_000), source_fps=st.floats(0.5, 240), fps=st.sampled_from([0.5, 1.0, 2.0]))
def test_sampling_is_bounded_ordered_and_even(total: int, source_fps: float, fps: float) -> None:
    indices = sample_frame_indices(total, source_fps, fps=fps)
    assert len(indices) == min(total, max(4, min(768, int(total / source_fps * fps))))
    assert indices[0] == 0
    assert indices[-1] < total
    steps = {after - before for before, after in itertools.pairwise(indices)}
    assert not steps or (min(steps) >= 1 and max(steps) - min(steps) <= 1)


def test_sampling_examples() -> None:
    assert sample_frame_indices(300, 30.0) == tuple(range(0, 300, 30))
    assert sample_frame_indices(10, 30.0) == (0, 2, 5, 7)  # half a second still gives four frames
    assert sample_frame_indices(2, 30.0) == (0, 1)
    assert len(sample_frame_indices(100_000, 30.0)) == 768
    with pytest.raises(ValueError, match="no frames"):
        sample_frame_indices(0, 30.0)


def test_frames_without_fps_have_no_times() -> None:
    processor = MiniMaxM3VLVideoProcessor(do_resize=False)
    clip = [Image.new("RGB", (56, 56))] * 5
    assert set(processor([clip])) == {"pixel_values_videos", "video_grid_thw", "num_chunks_per_video"}
    assert processor([clip], return_metadata=True)["timestamps"] == [None]
    timed = processor([clip], return_metadata=True, video_metadata=[{"fps": 2.0}])
    assert timed["timestamps"] == [[0.0, 1.0, 2.0]]
    for known in ({"fps": 2.0}, [[{"fps": 2.0}]]):
        again = processor([clip], return_metadata=True, video_metadata=known)
        assert again["video_metadata"] == timed["video_metadata"]
    two = processor([clip, clip], return_metadata=True, video_metadata=[[{"fps": 2.0}, {"fps": 2.0}]])
    assert two["video_metadata"] == timed["video_metadata"] * 2
    with pytest.raises(ValueError, match="video 1 of 1: its video_metadata is a str"):
        processor([clip], video_metadata=["2 fps"])
    with pytest.raises(ValueError, match="video_metadata has 2 entries for 1 clips"):
        processor([clip], video_metadata=[{"fps": 2.0}, {"fps": 2.0}])
    placed = processor([clip], return_metadata=True, video_metadata=[VideoMetadata(90, (0, 20, 40, 60, 80), 10.0)])
    assert placed["timestamps"] == [[0.0, 4.0, 8.0]]
    sampled = processor([clip * 4], return_metadata=True, video_metadata=[{"fps": 2.0}], do_sample_frames=True)
    assert sampled["video_metadata"][0].frames_indices == tuple(range(0, 20, 2))
    assert sampled["timestamps"] == [[0.0, 2.0, 4.0, 6.0, 8.0]]
    with pytest.raises(ValueError, match="fps"):
        processor([clip], do_sample_frames=True)


def test_several_clips_keep_their_order() -> None:
    clips = [
        np.stack([noise(56, 84, seed=10 * clip + frame) for frame in range(length)])
        for clip, length in enumerate((9, 3, 1))
    ]
    processor = MiniMaxM3VLVideoProcessor()
    together = processor(clips)
    single = [processor(clip) for clip in clips]
    assert together["num_chunks_per_video"].tolist() == [2, 1, 1]
    assert together["video_grid_thw"].tolist() == [[4, 4, 6], [1, 4, 6], [2, 4, 6], [1, 4, 6]]
    assert torch.equal(together["pixel_values_videos"], torch.cat([one["pixel_values_videos"] for one in single]))
    whole = processor(clips, vision_segment_max_frames=None)
    assert whole["video_grid_thw"].tolist() == [[5, 4, 6], [2, 4, 6], [1, 4, 6]]
    assert processor.get_num_of_video_patches(9, 56, 84) == 5 * 24


@pytest.mark.parametrize(
    ("video", "message"),
    [
        ([], "empty"),
        ([[]], "no frames"),
        (np.zeros((0, 56, 56, 3), np.uint8), "no frames"),
        ([[noise(56, 56), noise(56, 84)]], "frame 2 of 2.*56 x 56 to 56 x 84"),
        ([np.zeros((2, 56, 56, 7), np.uint8)], "channels"),
        (np.zeros((2, 56, 56, 3), np.int32), "dtype"),
        ("https://example.com/a.mp4", "URLs are off"),
        ("/nowhere/a.mp4", "/nowhere/a.mp4"),
        (7, "int"),
        (b"not a video at all", "18 bytes"),
    ],
)
def test_bad_clips_are_one_clear_error(video: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MiniMaxM3VLVideoProcessor()(video)


def test_a_folder_of_frames_is_a_clip_in_counting_order(tmp_path: Path) -> None:
    for index in (1, 2, 10):
        Image.new("RGB", (56, 56), (index, 0, 0)).save(tmp_path / f"frame{index}.png")
    (tmp_path / "notes.txt").write_text("no picture")
    out = MiniMaxM3VLVideoProcessor(do_rescale=False, do_normalize=False)(str(tmp_path))
    frames = unpatchify(out["pixel_values_videos"], 2, 4, 4, 2, 2, 14)
    assert frames[:, 0, 0, 0].tolist() == [1, 2, 10, 10]


# -- video files ------------------------------------------------------------------------------------------------------


def write_clip(
    path: Path, num_frames: int, fps: int, *, codec: str = "libx264", size: tuple[int, int] = (56, 84), **options: str
) -> None:
    """Frame i is grey of level (16 + 3*i) % 240: what comes out tells which frame it was."""
    av = pytest.importorskip("av")
    with av.open(str(path), "w", options=options) as container:
        stream = container.add_stream(codec, rate=fps)
        stream.height, stream.width = size
        stream.pix_fmt = {"ffv1": "bgr0", "mpeg4": "yuv420p"}.get(codec, "yuv444p")
        stream.options = {"libx264": {"qp": "0"}, "mpeg4": {"qmin": "1", "qmax": "1"}}.get(codec, {})
        for index in range(num_frames):
            level = np.full((*size, 3), (16 + 3 * index) % 240, np.uint8)
            level[: size[0] // 2, : size[1] // 2] = 0  # a dark corner shows how the frame is turned
            container.mux(stream.encode(av.VideoFrame.from_ndarray(level, format="rgb24")))
        container.mux(stream.encode())


def frame_numbers(out: dict, grid: list[int]) -> list[int]:
    frames = unpatchify(out["pixel_values_videos"], grid[0], grid[1], grid[2], 2, 2, 14)
    return [round((frame[:, -1, -1].mean().item() - 16) / 3) for frame in frames]


LEVELS = MiniMaxM3VLVideoProcessor(do_rescale=False, do_normalize=False)


@pytest.mark.parametrize(
    ("suffix", "codec"), [("mp4", "libx264"), ("mkv", "ffv1"), ("webm", "libvpx-vp9"), ("avi", "mpeg4")]
)
def test_video_file_is_sampled_at_exact_indices_with_their_times(suffix: str, codec: str, tmp_path: Path) -> None:
    """Pitfall 25: the time of a temporal patch is the source time of its first frame, whatever was sampled."""
    av = pytest.importorskip("av")
    if codec not in av.codecs_available:
        pytest.skip(f"this PyAV has no {codec}")
    path = tmp_path / f"clip.{suffix}"
    write_clip(path, 65, 10, codec=codec)
    out = LEVELS(str(path), return_metadata=True)
    metadata = out["video_metadata"][0]
    assert metadata == VideoMetadata(65, (0, 10, 21, 32, 43, 54), 10.0)
    assert out["timestamps"] == [[0.0, 2.1, 4.3]]
    assert out["video_grid_thw"].tolist() == [[3, 4, 6]]
    assert frame_numbers(out, [3, 4, 6]) == list(metadata.frames_indices)
    assert torch.equal(LEVELS(path.read_bytes())["pixel_values_videos"], out["pixel_values_videos"])
    data_url = "data:video/mp4;base64," + base64.b64encode(path.read_bytes()).decode()
    assert torch.equal(LEVELS([data_url])["pixel_values_videos"], out["pixel_values_videos"])
    more = LEVELS(path, fps=4, max_frames=20, return_metadata=True)["video_metadata"][0]
    assert len(more.frames_indices) == 20


def test_rotated_phone_video_is_upright(tmp_path: Path) -> None:
    path = tmp_path / "phone.mp4"
    write_clip(path, 4, 4)
    plain = LEVELS(path)
    data = bytearray(path.read_bytes())  # its display matrix is replaced by a clockwise quarter turn
    identity = struct.pack(">9i", 0x10000, 0, 0, 0, 0x10000, 0, 0, 0, 0x40000000)
    at = data.index(identity, data.index(b"tkhd"))
    data[at : at + 36] = struct.pack(">9i", 0, 0x10000, 0, -0x10000, 0, 0, 56 << 16, 0, 0x40000000)
    turned = LEVELS(bytes(data))
    assert turned["video_grid_thw"].tolist() == [[2, 6, 4]]
    before = unpatchify(plain["pixel_values_videos"], 2, 4, 6, 2, 2, 14)
    after = unpatchify(turned["pixel_values_videos"], 2, 6, 4, 2, 2, 14)
    assert torch.equal(after, torch.rot90(before, -1, (2, 3)))


@pytest.mark.parametrize("suffix", ["mp4", "faststart.mp4", "mkv"])
def test_cut_video_is_refused(suffix: str, tmp_path: Path) -> None:
    """ffmpeg ends a cut file in silence: half a clip would be shown to the model as the whole."""
    path = tmp_path / f"clip.{suffix}"
    options = {"movflags": "faststart"} if "faststart" in suffix else {}
    write_clip(path, 100, 10, codec="ffv1" if suffix == "mkv" else "libx264", **options)
    data = path.read_bytes()
    for share in (0.3, 0.6, 0.85):
        path.write_bytes(data[: int(len(data) * share)])
        with pytest.raises(ValueError, match=path.name):
            LEVELS(path)


def test_other_files_are_no_videos(tmp_path: Path) -> None:
    pytest.importorskip("av")
    Image.new("RGB", (56, 56)).save(tmp_path / "a.png")
    (tmp_path / "a.txt").write_text("hello\n" * 100)
    write_clip(tmp_path / "clip.mp4", 5, 5)
    (tmp_path / "list.ffconcat").write_text("ffconcat version 1.0\nfile clip.mp4\n")
    (tmp_path / "list.m3u8").write_text("#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\nclip.mp4\n#EXT-X-ENDLIST\n")
    for name in ("a.png", "a.txt", "list.ffconcat", "list.m3u8"):
        with pytest.raises(ValueError, match=name):
            LEVELS(tmp_path / name)


def test_video_limits(tmp_path: Path) -> None:
    path = tmp_path / "clip.mp4"
    write_clip(path, 12, 4)
    with pytest.raises(ValueError, match="56 x 84 = 4704 pixels, more than the limit of 1000"):
        MiniMaxM3VLVideoProcessor(max_picture_pixels=1000)(path)
    with pytest.raises(ValueError, match="leave video_metadata out"):
        LEVELS(path, video_metadata=[{"fps": 3}])


def test_without_pyav_the_error_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.mp4").write_bytes(b"x")
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(ValueError, match=r"pip install av"):
        LEVELS(tmp_path / "a.mp4")


def test_only_sampled_frames_are_held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every source frame converted to RGB would make a long clip need hundreds of gigabytes."""
    from minim3.processing import video_file

    converted = []
    original = video_file._upright
    monkeypatch.setattr(video_file, "_upright", lambda frame: converted.append(1) or original(frame))
    write_clip(tmp_path / "clip.mp4", 90, 30)
    LEVELS(tmp_path / "clip.mp4")
    assert len(converted) == 4
