"""The processor: messages and media to model inputs and back, and what training asks of it."""

import base64
import io
import pickle
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from minim3.processing.image import MiniMaxM3VLImageProcessor
from minim3.processing.processor import MiniMaxM3VLProcessor
from minim3.processing.tokenizer import Tokenizer
from minim3.processing.video import MiniMaxM3VLVideoProcessor

IMAGE, VIDEO = "]<]image[>[", "]<]video[>["
START, END = "]<]start of image[>[", "]<]end of image[>["


@pytest.fixture(scope="module")
def processor(tokenizer: Tokenizer) -> MiniMaxM3VLProcessor:
    return MiniMaxM3VLProcessor(MiniMaxM3VLImageProcessor(), tokenizer, MiniMaxM3VLVideoProcessor())


@pytest.fixture(scope="module")
def picture() -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (56, 84, 3), dtype=np.uint8))


def user(*parts: Any) -> dict[str, Any]:
    return {
        "role": "user",
        "content": [{"type": "text", "text": part} if isinstance(part, str) else part for part in parts],
    }


def clip(num_frames: int, height: int = 56, width: int = 56) -> list[np.ndarray]:
    return list(np.random.default_rng(1).integers(0, 256, (num_frames, height, width, 3), dtype=np.uint8))


def test_chat_prompt_with_a_picture(processor: MiniMaxM3VLProcessor, picture: Image.Image, tmp_path: Path) -> None:
    """The same picture as object, path and data URL gives the same inputs, in the documented shapes."""
    picture.save(tmp_path / "p.png")
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    url = "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
    sources = [
        {"type": "image", "image": picture},
        {"type": "image", "path": str(tmp_path / "p.png")},
        {"type": "image_url", "image_url": {"url": url}},
        {"type": "image_url", "image_url": str(tmp_path / "p.png")},
    ]
    outputs = [processor.apply_chat_template([user(source, "what?")]) for source in sources]
    for output in outputs:
        assert set(output) == {"input_ids", "attention_mask", "pixel_values", "image_grid_thw"}
        assert output.input_ids.dtype == output.image_grid_thw.dtype == torch.int64
        assert output.image_grid_thw.tolist() == [[1, 4, 6]]
        assert output.pixel_values.shape == (24, 3 * 2 * 14 * 14)
        assert torch.equal(output.input_ids, outputs[0].input_ids)
        assert torch.equal(output.pixel_values, outputs[0].pixel_values)
    text = processor.decode(outputs[0].input_ids[0])
    assert f"]~b]user\n{START}{IMAGE * 6}{END}what?[e~[\n]~b]ai\n" in text
    placeholder = {"type": "image"}
    beside = processor.apply_chat_template([user(placeholder, "what?")], images=[picture])
    assert torch.equal(beside.input_ids, outputs[0].input_ids)
    assert processor.apply_chat_template([user(placeholder, "hi")], tokenize=False).count(IMAGE) == 1
    ids = processor.apply_chat_template([user("hi")], return_dict=False)
    assert isinstance(ids, torch.Tensor)
    assert processor.apply_chat_template([user("hi")], return_tensors=None)["input_ids"] == ids[0].tolist()


def test_pitfall_25_timestamps_come_from_the_source_frames(processor: MiniMaxM3VLProcessor) -> None:
    part = {"type": "video", "video": clip(5)}
    metadata = [{"fps": 4.0, "frames_indices": [0, 3, 10, 13, 20], "total_num_frames": 24}]
    output = processor.apply_chat_template([user(part)], video_metadata=metadata)
    group = START + VIDEO * 4 + END
    text = processor.decode(output.input_ids[0])
    assert f"user\n]<]0.0 seconds[>[{group}]<]2.5 seconds[>[{group}]<]5.0 seconds[>[{group}[e~[" in text
    assert output.video_grid_thw.tolist() == [[3, 4, 4]]
    assert output.pixel_values_videos.shape[0] == 48
    untimed = processor.decode(processor.apply_chat_template([user(part)]).input_ids[0])
    assert f"user\n{group * 3}[e~[" in untimed


def test_long_videos_are_chunks_of_one_placeholder(processor: MiniMaxM3VLProcessor) -> None:
    output = processor(text=f"{VIDEO} and {VIDEO}", videos=[clip(10), clip(3)])
    assert output.video_grid_thw.tolist() == [[4, 4, 4], [1, 4, 4], [2, 4, 4]]
    assert (output.input_ids == processor.video_token_id).sum() == (5 + 2) * 4


def test_frames_of_a_legal_size_are_not_resized(processor: MiniMaxM3VLProcessor) -> None:
    """A chat prompt passes frames already sized, even below the least area; others are resized."""
    assert processor(text=VIDEO, videos=[clip(2, 28, 56)]).video_grid_thw.tolist() == [[1, 2, 4]]
    assert processor(text=VIDEO, videos=[clip(2, 30, 60)]).video_grid_thw.tolist() == [[1, 4, 6]]


def test_placeholders_expand_as_in_transformers(processor: MiniMaxM3VLProcessor) -> None:
    pytest.importorskip("transformers")
    from transformers.models.minimax_m3_vl.processing_minimax_m3_vl import MiniMaxM3VLProcessor as Published

    stub: Any = SimpleNamespace(
        image_processor=SimpleNamespace(merge_size=2),
        video_processor=SimpleNamespace(merge_size=2, temporal_patch_size=2),
        VISION_START_TOKEN=START,
        VISION_END_TOKEN=END,
        IMAGE_TOKEN=IMAGE,
        VIDEO_TOKEN=VIDEO,
    )
    indices = [0, 3, 10, 13, 20, 21, 22, 23, 24]
    metadata = {"fps": 3.0, "frames_indices": indices, "total_num_frames": 30}
    frames = clip(9, 56, 84)
    output = processor(text=VIDEO, videos=[frames], video_metadata=[metadata])
    inputs = {
        "video_grid_thw": output.video_grid_thw,
        "num_chunks_per_video": [len(output.video_grid_thw)],
        "video_metadata": [SimpleNamespace(**metadata)],
    }
    assert processor.decode(output.input_ids[0]) == Published.replace_video_token(stub, inputs, 0)
    output = processor(text=IMAGE, images=frames[0])
    expected = Published.replace_image_token(stub, {"image_grid_thw": output.image_grid_thw}, 0)
    assert processor.decode(output.input_ids[0]) == expected


def test_batches_are_padded_on_the_left(processor: MiniMaxM3VLProcessor, picture: Image.Image) -> None:
    """Media of a batch go to the prompts that hold their placeholders, in order."""
    small = picture.resize((56, 56))
    conversations = [
        [user("hi")],
        [user({"type": "image", "image": picture}, "a")],
        [user({"type": "image", "image": small}, "b")],
    ]
    batch = processor.apply_chat_template(conversations)
    assert batch.image_grid_thw.tolist() == [[1, 4, 6], [1, 4, 4]]
    for row, mask, one in zip(batch.input_ids, batch.attention_mask, conversations):
        alone = processor.apply_chat_template(one).input_ids[0]
        assert torch.equal(row[mask.bool()], alone)
        assert mask.tolist() == sorted(mask.tolist())
        assert (row[~mask.bool()] == processor.tokenizer.eos_token_id).all()
    same = processor(text=["a", f"{IMAGE}b", f"{IMAGE}c"], images=[[], [picture], [small]])
    assert same.image_grid_thw.tolist() == batch.image_grid_thw.tolist()
    with pytest.raises(ValueError, match="padding=True"):
        processor(text=["a", "a b c d"], padding=False)
    assert processor(text=["a", "a b"], padding=False, return_tensors=None)["attention_mask"][0] == [1]
    assert isinstance(processor(text="a", return_tensors="np")["input_ids"], np.ndarray)


def test_raw_prompts_hold_control_tokens_and_messages_do_not(processor: MiniMaxM3VLProcessor) -> None:
    turn = processor.tokenizer.token_to_id("]~b]")
    assert processor(text="]~b]user\nhi")["input_ids"][0, 0] == turn
    prompt = processor.apply_chat_template([user("]~b]ai\n")])["input_ids"][0].tolist()
    assert prompt.count(turn) == 3


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ({"text": IMAGE}, r"1 image placeholders .* 0 images"),
        ({"text": "x", "images": [np.zeros((56, 56, 3), np.uint8)]}, r"0 image placeholders .* 1 images"),
        ({"text": [IMAGE, "x"], "images": [np.zeros((56, 56, 3), np.uint8)] * 2}, r"0 image placeholders .* 1 images"),
        (
            {"text": ["x", IMAGE], "images": [[np.zeros((56, 56, 3), np.uint8)], []]},
            "prompt 1 has 0 picture placeholders, but its list holds 1 pictures",
        ),
        ({"text": VIDEO}, r"1 video placeholders .* 0 videos"),
        ({"text": VIDEO, "videos": ["missing.mp4"]}, r"video 1 of 1.*missing\.mp4"),
        ({"text": IMAGE, "images": ["missing.png"]}, r"missing\.png"),
        ({}, "text is missing"),
        ({"text": "x", "return_tensors": "tf"}, "return_tensors is 'tf'"),
    ],
)
def test_mismatches_are_named(processor: MiniMaxM3VLProcessor, arguments: dict[str, Any], error: str) -> None:
    with pytest.raises(ValueError, match=error):
        processor(**arguments)


def test_placeholder_without_picture_is_named(processor: MiniMaxM3VLProcessor) -> None:
    with pytest.raises(ValueError, match="1 of 1 image parts hold no image"):
        processor.apply_chat_template([user({"type": "image"})])
    with pytest.raises(ValueError, match="no variables flavour"):
        processor.apply_chat_template([user("x")], flavour=1)


def test_settings_of_one_call(processor: MiniMaxM3VLProcessor, picture: Image.Image) -> None:
    """They were taken for variables of the chat template, and had no effect."""
    messages = [user({"type": "image", "image": picture}, {"type": "video", "video": clip(4)})]
    least = {"min_pixels": 28 * 28, "max_pixels": 28 * 28}
    small = processor.apply_chat_template(messages, images_kwargs=least, videos_kwargs=least)
    assert small.image_grid_thw.tolist() == [[1, 2, 2]]
    assert small.video_grid_thw.tolist() == [[2, 2, 2]]
    assert processor.apply_chat_template(messages).image_grid_thw.tolist() == [[1, 4, 6]]
    raw = processor(text=IMAGE, images=picture, images_kwargs=least)
    assert torch.equal(raw.pixel_values, small.pixel_values)
    for text, images in ((IMAGE, picture), ("x", None)):
        with pytest.raises(TypeError, match="has no setting 'max_pixel'; did you mean 'max_pixels'"):
            processor(text=text, images=images, images_kwargs={"max_pixel": 1})
    with pytest.raises(TypeError, match="has no setting 'size'"):
        processor(text="x", videos_kwargs={"size": 1})
    merged = processor(text=IMAGE, images=picture, images_kwargs={"merge_size": 1})
    assert (merged.input_ids == processor.image_token_id).sum() == merged.image_grid_thw.prod()


def test_text_only_processor(tokenizer: Tokenizer, picture: Image.Image, tmp_path: Path) -> None:
    MiniMaxM3VLProcessor(tokenizer=tokenizer).save_pretrained(tmp_path)
    processor = MiniMaxM3VLProcessor.from_pretrained(tmp_path)
    assert processor.image_processor is None
    assert set(processor.apply_chat_template([user("hi")])) == {"input_ids", "attention_mask"}
    with pytest.raises(ValueError, match="takes no pictures"):
        processor.apply_chat_template([user({"type": "image", "image": picture})])
    with pytest.raises(ValueError, match="takes no video"):
        processor(text=VIDEO, videos=[clip(2)])
    with pytest.raises(ValueError, match="needs a tokenizer"):
        MiniMaxM3VLProcessor()(text="hi")


def test_a_tokenizer_without_the_control_tokens_is_named(tokenizer_json: str) -> None:
    """Without this check every marker would be spelled out in ordinary tokens, which no model has seen."""
    tokenizer = Tokenizer(tokenizer_json.replace('"<mm:think>"', '"<other>"'))
    with pytest.raises(ValueError, match="lacks the control tokens <mm:think>"):
        MiniMaxM3VLProcessor(tokenizer=tokenizer).apply_chat_template([user("hi")])


def test_folder_round_trip(tokenizer: Tokenizer, picture: Image.Image, tmp_path: Path) -> None:
    images = MiniMaxM3VLImageProcessor(max_pixels=28 * 28 * 4)
    videos = MiniMaxM3VLVideoProcessor(max_frames=6)
    template = "{{ '[e~[' }}{% for m in messages %}{% for p in m.content %}]<]{{ p.type }}[>[{% endfor %}{% endfor %}"
    MiniMaxM3VLProcessor(images, tokenizer, videos, template).save_pretrained(tmp_path)
    loaded = MiniMaxM3VLProcessor.from_pretrained(tmp_path)
    assert loaded.chat_template == template
    assert loaded.image_processor is not None
    assert loaded.image_processor.max_pixels == 28 * 28 * 4
    assert loaded.video_processor is not None
    assert loaded.video_processor.max_frames == 6
    # As a worker process of a data loader gets it.
    loaded = pickle.loads(pickle.dumps(loaded))
    output = loaded.apply_chat_template([user({"type": "image", "image": picture})])
    # The template writes the type between marker pieces; both are its own words, so it is a placeholder.
    assert loaded.decode(output.input_ids[0]) == f"[e~[{START}{IMAGE * 2}{END}"
    with pytest.raises(ValueError, match="not a folder"):
        MiniMaxM3VLProcessor.from_pretrained(tmp_path / "none")


def test_training_ids_are_those_of_the_prompt_and_the_answer(
    processor: MiniMaxM3VLProcessor, picture: Image.Image
) -> None:
    """What is trained is what is run: prompt ids, then exactly the ids to produce, without touching the picture."""
    question = user({"type": "image", "image": picture}, "what colour?")
    ids, mask = processor.encode_conversation(
        [question, {"role": "assistant", "content": "red"}], num_image_tokens=[6], thinking_mode="adaptive"
    )
    prompt = processor.apply_chat_template([question])["input_ids"][0].tolist()
    answer = processor.tokenizer.encode("</mm:think>red[e~[", allow_special=True)
    assert ids[: len(prompt)] == prompt
    assert ids[len(prompt) :] == [*answer, *processor.tokenizer.encode("\n")]
    assert [index for index, target in enumerate(mask) if target] == list(
        range(len(prompt), len(prompt) + len(answer))
    )
    placeholder = user({"type": "image"}, "what colour?")
    assert processor.encode_conversation([placeholder], num_image_tokens=[6])[0] == processor.encode_conversation(
        [question], num_image_tokens=[6]
    )[0]
    with pytest.raises(ValueError, match="1 image placeholders"):
        processor.encode_conversation([question])


def test_back_to_text(processor: MiniMaxM3VLProcessor) -> None:
    ids = processor.tokenizer.encode("</mm:think>red €[e~[", allow_special=True)
    assert processor.decode(ids) == processor.decode(torch.tensor(ids)) == "</mm:think>red €[e~["
    assert processor.batch_decode(torch.tensor([ids, ids]), skip_special_tokens=True) == ["red €"] * 2
    for outputs in (ids, [ids], torch.tensor(ids), torch.tensor([ids]), np.array([ids])):
        assert processor.post_process_image_text_to_text(outputs) == ["red €"]
    with pytest.raises(ValueError, match="clean_up_tokenization_spaces"):
        processor.post_process_image_text_to_text(ids, clean_up_tokenization_spaces=True)


def test_outputs_move_together(processor: MiniMaxM3VLProcessor, picture: Image.Image) -> None:
    output = processor(text=IMAGE, images=picture).to(dtype=torch.bfloat16)
    assert output.pixel_values.dtype == torch.bfloat16
    assert output.input_ids.dtype == torch.int64
    with pytest.raises(AttributeError, match="no 'labels'"):
        _ = output.labels
