"""The golden numbers of public implementations: the whole model, values computed once and kept in tests/golden."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import minim3
from minim3.config import MiniMaxM3VLTextConfig
from minim3.model.causal_lm import MiniMaxM3SparseForCausalLM, MiniMaxM3SparseForConditionalGeneration

GOLDEN = Path(__file__).parent / "golden"
MEDIA = ("pixel_values", "image_grid_thw", "pixel_values_videos", "video_grid_thw")


@pytest.fixture(scope="module")
def vl_model() -> MiniMaxM3SparseForConditionalGeneration:
    return MiniMaxM3SparseForConditionalGeneration.from_pretrained(GOLDEN / "vl_tiny", dtype=torch.float32)


@pytest.fixture(scope="module")
def vl_expected() -> dict[str, torch.Tensor]:
    return load_file(GOLDEN / "vl_tiny_expected.safetensors")


@torch.inference_mode()
def test_logits_of_a_prompt_with_an_image_and_a_video(vl_model, vl_expected):
    output = vl_model(input_ids=vl_expected["input_ids"], **{name: vl_expected[name] for name in MEDIA})
    torch.testing.assert_close(output.logits, vl_expected["logits"], atol=1e-4, rtol=0)


@torch.inference_mode()
def test_projected_features(vl_model, vl_expected):
    images = vl_model.get_image_features(vl_expected["pixel_values"], vl_expected["image_grid_thw"])
    videos = vl_model.get_video_features(vl_expected["pixel_values_videos"], vl_expected["video_grid_thw"])
    torch.testing.assert_close(images, vl_expected["image_features"], atol=1e-4, rtol=0)
    torch.testing.assert_close(videos, vl_expected["video_features"], atol=1e-4, rtol=0)


@torch.inference_mode()
def test_logits_of_a_text_prompt(vl_model, vl_expected):
    output = vl_model(input_ids=vl_expected["text_ids"])
    torch.testing.assert_close(output.logits, vl_expected["text_logits"], atol=1e-4, rtol=0)


@torch.inference_mode()
def test_greedy_tokens_without_a_cache(vl_model, vl_expected):
    ids = vl_expected["input_ids"]
    media = {name: vl_expected[name] for name in MEDIA}
    for _ in range(vl_expected["generated"].shape[1] - ids.shape[1]):
        logits = vl_model(input_ids=ids, logits_to_keep=1, **media).logits
        ids = torch.cat([ids, logits[:, -1].argmax(-1, keepdim=True)], dim=1)
    assert torch.equal(ids, vl_expected["generated"])


@pytest.mark.parametrize("padding", ["left", "right"])
@torch.inference_mode()
def test_padding_does_not_shift_blocks(vl_model, vl_expected, padding):
    """Pitfall 8: blocks count from the start of the sequence, not of the padded row."""
    ids, pad = vl_expected["text_ids"], 5
    blank = torch.zeros(1, pad, dtype=ids.dtype)
    parts = [blank, ids] if padding == "left" else [ids, blank]
    masks = [torch.zeros_like(blank), torch.ones_like(ids)]
    mask = torch.cat(masks if padding == "left" else masks[::-1], dim=1)
    logits = vl_model(input_ids=torch.cat(parts, dim=1), attention_mask=mask).logits
    real = logits[:, pad:] if padding == "left" else logits[:, :-pad]
    torch.testing.assert_close(real, vl_expected["text_logits"], atol=1e-4, rtol=0)
    assert not logits[mask == 0].any()


@torch.inference_mode()
def test_mtp_logits(tmp_path):
    config = json.loads((GOLDEN / "mtp_tiny_config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").symlink_to(GOLDEN / "mtp_tiny.safetensors")
    expected = load_file(GOLDEN / "mtp_tiny_expected.safetensors")
    model = MiniMaxM3SparseForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert isinstance(model.config, MiniMaxM3VLTextConfig)
    output = model(input_ids=expected["input_ids"], output_mtp_logits=True)
    torch.testing.assert_close(output.logits, expected["logits"], atol=1e-4, rtol=0)
    assert output.mtp_per_depth_logits is not None
    for depth, logits in enumerate(output.mtp_per_depth_logits):
        torch.testing.assert_close(logits, expected[f"mtp_logits.{depth}"], atol=1e-4, rtol=0)
    padded = model.model.mtp(
        model.model(expected["input_ids"]),
        input_ids=expected["input_ids"],
        embed_fn=model.model.embed_tokens,
        lm_head=model.lm_head,
        freqs_cis=model.model.make_freqs_cis(torch.arange(expected["input_ids"].shape[1])[None]),
    )
    torch.testing.assert_close(padded[1], expected["mtp_logits.1"], atol=1e-4, rtol=0)


def test_load_takes_weights_without_a_tokenizer() -> None:
    """`minim3.load` refused this folder, though only text needs the tokenizer that it lacks."""
    model, processor = minim3.load(GOLDEN / "vl_tiny", dtype=torch.float32)
    assert isinstance(model, minim3.MiniMaxM3SparseForConditionalGeneration)
    patches = processor.image_processor(images=[torch.zeros(3, 56, 84, dtype=torch.uint8)])
    assert patches["image_grid_thw"].tolist() == [[1, 4, 6]]
    for needs_text in (lambda: processor(text="hi"), lambda: processor.decode([1])):
        with pytest.raises(ValueError, match="needs a tokenizer"):
            needs_text()
    with pytest.raises(ValueError, match=r"no tokenizer\.json"):
        minim3.load(GOLDEN / "vl_tiny", require_tokenizer=True)
