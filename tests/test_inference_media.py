"""`generate` with pictures and clips: golden tokens of transformers, media dealt to rows, counts that do not match."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from minim3 import MiniMaxM3SparseForConditionalGeneration
from minim3.inference.engine import Engine

GOLDEN = Path(__file__).parent / "golden"

@pytest.fixture(scope="module")
def golden_model() -> MiniMaxM3SparseForConditionalGeneration:
    return MiniMaxM3SparseForConditionalGeneration.from_pretrained(GOLDEN / "vl_tiny", dtype=torch.float32)


@pytest.fixture(scope="module")
def golden() -> dict[str, Tensor]:
    return load_file(GOLDEN / "vl_tiny_expected.safetensors")


MEDIA = ("pixel_values", "image_grid_thw", "pixel_values_videos", "video_grid_thw")


def pad(prompts: list[list[int]], side: str, width: int) -> tuple[Tensor, Tensor]:
    """`[B, width]` ids and mask; the padding is an ordinary id, so that only the mask tells."""
    ids = torch.full((len(prompts), width), 7)
    mask = torch.zeros(len(prompts), width, dtype=torch.int64)
    for row, prompt in enumerate(prompts):
        first = {"left": width - len(prompt), "right": 0, "middle": (width - len(prompt)) // 2}[side]
        ids[row, first : first + len(prompt)] = torch.tensor(prompt)
        mask[row, first : first + len(prompt)] = 1
    return ids, mask


@pytest.mark.parametrize(
    "options",
    [{}, {"prefill_chunk": 7}, {"shuffle_pages_seed": 0},
     {"prefill_chunk": 7, "shuffle_pages_seed": 1, "page_size": 5}],
    ids=["whole", "chunked at 7", "pages shuffled", "chunked at 7, pages shuffled and of 5"],
)  # fmt: skip
def test_golden_tokens(
    golden_model: MiniMaxM3SparseForConditionalGeneration, golden: dict[str, Tensor], options: dict[str, int]
) -> None:
    """Prompt with an image and a video, 40 greedy tokens of transformers.

    Chunks of 7 cut through both media; pages of 5 beside blocks of 8 are pitfall 7, shuffled pages pitfall 6.
    """
    out = golden_model.generate(
        golden["input_ids"], **{name: golden[name] for name in MEDIA},
        do_sample=False, max_new_tokens=40, eos_token_id=None, **options,
    )  # fmt: skip
    assert torch.equal(out, golden["generated"])


@torch.no_grad()
def test_golden_tokens_without_cache(
    golden_model: MiniMaxM3SparseForConditionalGeneration, golden: dict[str, Tensor]
) -> None:
    ids = golden["input_ids"]
    media = {name: golden[name] for name in MEDIA}
    prompt_embeds = golden_model.embed_packed(ids[0], **media)[None]
    for _ in range(40):
        new = ids[:, prompt_embeds.shape[1] :]
        embeds = torch.cat([prompt_embeds, golden_model.get_input_embeddings()(new)], 1)
        ids = torch.cat([ids, golden_model(inputs_embeds=embeds).logits[:, -1].argmax(-1, keepdim=True)], 1)
    assert torch.equal(ids, golden["generated"])


def test_media_are_dealt_to_the_rows_that_hold_their_placeholders(
    golden_model: MiniMaxM3SparseForConditionalGeneration, golden: dict[str, Tensor]
) -> None:
    """Rows of a batch with other media than their neighbours, padded on both sides, answer as they do alone."""
    config = golden_model.config
    image, video = config.image_token_index, config.video_token_index
    whole = golden["input_ids"][0].tolist()
    prompts = [
        [5, 6, 7],
        whole,
        [9, *[image] * 6, 10, *[image] * 4, 11],
        [12, *[video] * 8, 13],
        [14, 15],
    ]
    generator = torch.Generator().manual_seed(0)
    extra = torch.randn(6 * 4 + 4 * 4, 1176, generator=generator)
    extra_video = torch.randn(8 * 4, 1176, generator=generator)
    grids = torch.tensor([[1, 6, 4], [1, 4, 4]])
    video_grid = torch.tensor([[2, 4, 4]])
    alone = [
        golden_model.generate(torch.tensor([prompt]), max_new_tokens=6, eos_token_id=None, **media)[0, len(prompt) :]
        for prompt, media in zip(
            prompts,
            [
                {},
                {name: golden[name] for name in MEDIA},
                {"pixel_values": extra, "image_grid_thw": grids},
                {"pixel_values_videos": extra_video, "video_grid_thw": video_grid},
                {},
            ],
            strict=True,
        )
    ]
    for side in ("left", "right", "middle"):
        ids, mask = pad(prompts, side, 93)
        out = golden_model.generate(
            ids, attention_mask=mask, max_new_tokens=6, eos_token_id=None, prefill_chunk=50,
            pixel_values=torch.cat([golden["pixel_values"], extra]),
            image_grid_thw=torch.cat([golden["image_grid_thw"], grids]),
            pixel_values_videos=torch.cat([golden["pixel_values_videos"], extra_video]),
            video_grid_thw=torch.cat([golden["video_grid_thw"], video_grid]),
        )  # fmt: skip
        assert torch.equal(out[:, :93], ids)
        assert torch.equal(out[:, 93:], torch.stack(alone))


def test_media_that_do_not_match_are_refused_with_both_counts(
    golden_model: MiniMaxM3SparseForConditionalGeneration, golden: dict[str, Tensor]
) -> None:
    media = {name: golden[name] for name in MEDIA}
    ids = golden["input_ids"]
    with pytest.raises(ValueError, match=r"6 image placeholder.* 0 features"):
        golden_model.generate(ids)
    with pytest.raises(ValueError, match=r"5 image placeholder.* 6 features"):
        golden_model.generate(torch.cat([ids[:, :25], ids[:, 26:]], 1), **media)
    with pytest.raises(ValueError, match=r"12 image placeholder.* 6 features"):
        golden_model.generate(ids.repeat(2, 1), **media)
    with pytest.raises(ValueError, match=r"24 patches, but 20 were given"):
        golden_model.generate(ids, **{**media, "pixel_values": media["pixel_values"][:20]})
    with pytest.raises(ValueError, match="pixel_values was given without image_grid_thw"):
        golden_model.generate(ids, **{**media, "image_grid_thw": None})
    token = golden_model.config.image_token_index
    split = torch.tensor([[5, token, token, token, token, 6], [5, token, token, 6, 7, 8]])
    with pytest.raises(ValueError, match=r"prompt 0 has 4 image placeholder.* next 1 image grid rows make 6 features"):
        golden_model.generate(split, pixel_values=media["pixel_values"], image_grid_thw=media["image_grid_thw"])


def test_bfloat16_model_generates_with_media(golden: dict[str, Tensor]) -> None:
    """Features come from fp32 pixels and go between bf16 embeddings; the cache follows the weights."""
    model = MiniMaxM3SparseForConditionalGeneration.from_pretrained(GOLDEN / "vl_tiny", dtype=torch.bfloat16)
    assert Engine(model).cache.layers[0].k.dtype == torch.bfloat16
    media = {name: golden[name] for name in MEDIA}
    out = model.generate(golden["input_ids"], **media, max_new_tokens=2, eos_token_id=None, prefill_chunk=31)
    assert out.shape == (1, 92)


def test_golden_generation_config_is_read(golden_model: MiniMaxM3SparseForConditionalGeneration) -> None:
    assert json.loads((GOLDEN / "vl_tiny" / "generation_config.json").read_text())["eos_token_id"] == 2
    assert golden_model.generation_config is not None
    assert golden_model.generation_config["eos_token_id"] == 2
