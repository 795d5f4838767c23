"""Pictures and clips train, and a packed document trains as it does alone."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from minim3.training.config import LossRecipe, SourceRecipe
from minim3.training.data import Batch, BatchStream, Clip, Group, Sample
from minim3.training.loss import compute_losses
from minim3.training.packing import EncodedGroup, Packing
from minim3.training.records import DocumentEncoder
from tests.data_standins import (
    IMAGE_TOKEN_ID,
    ROOT,
    VIDEO_TOKEN_ID,
    VOCAB_SIZE,
    chat,
    data_recipe,
    file_source,
    pocket_processor,
)


@pytest.fixture(scope="module")
def model() -> Any:
    """The toy model with pocket's vocabulary and patches, in fp64."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(Path(__file__).parent))
        from training_standins import toy_model_config

        from minim3.config import config_from_dict
        from minim3.model.causal_lm import MiniMaxM3SparseForConditionalGeneration

        config = toy_model_config()
        config |= {"image_token_index": IMAGE_TOKEN_ID, "video_token_index": VIDEO_TOKEN_ID}
        config["text_config"]["vocab_size"] = VOCAB_SIZE
        config["vision_config"]["patch_size"] = 14
        torch.manual_seed(0)
        return MiniMaxM3SparseForConditionalGeneration.from_config(config_from_dict(config)).cast(torch.float64).train()


def in_fp64(batch: Batch) -> Batch:
    changes = {
        name: None if (values := getattr(batch, name)) is None else values.double()
        for name in ("pixel_values", "pixel_values_videos")
    }
    return replace(batch, **changes)  # type: ignore[arg-type]


def gradients(model: Any, batch: Batch) -> dict[str, torch.Tensor]:
    """Of the sum of the next-token losses over the targets."""
    model.zero_grad(set_to_none=True)
    loss = compute_losses(model, in_fp64(batch), LossRecipe()).parts["next_token"]
    (loss * (batch.labels >= 0).sum()).backward()
    return {name: value.grad.clone() for name, value in model.named_parameters() if value.grad is not None}


VISION = ("vision_tower.", "multi_modal_projector.", "patch_merge_mlp.")


@pytest.mark.parametrize("name", ["pictures", "clips"])
def test_a_picture_and_a_clip_of_a_file_train_the_whole_tower(model: Any, name: str) -> None:
    """Public training code for this model refuses video."""
    path = ROOT / "examples" / "data" / f"{name}.jsonl"
    with BatchStream(data_recipe(file_source(path), tokens_per_batch=400, max_bad_records=0), seed=0) as stream:
        batch = next(stream)
    assert (batch.pixel_values_videos is None) == (name != "clips")
    assert (batch.pixel_values is None) == (name != "pictures")
    found = gradients(model, batch)
    tower = [name for name, _ in model.named_parameters() if name.startswith(VISION)]
    assert len(tower) > 10
    for parameter in tower:
        assert found[parameter].abs().max() > 0, f"{parameter} does not learn"
    key = "pixel_values_videos" if name == "clips" else "pixel_values"
    pixels = getattr(batch, key).clone()
    pixels[0] += 0.5  # another level in one patch must change what is learnt
    other = gradients(model, replace(batch, **{key: pixels}))
    assert any(not torch.equal(other[parameter], found[parameter]) for parameter in tower)


def media_groups() -> Iterator[Group]:
    rng = np.random.default_rng(0)

    def noise(*shape: int) -> np.ndarray:
        return rng.integers(0, 256, (*shape, 3), dtype=np.uint8)

    def sample(*parts: str, images: Any = (), videos: Any = ()) -> Sample:
        content = [{"type": part} if part in ("image", "video") else {"type": "text", "text": part} for part in parts]
        return Sample(chat(content, f"answer to {parts[-1]}")["messages"], images, video_indices=videos)

    yield Group([sample("only text")])
    yield Group(
        [sample("image", "first", images=[0]), sample("image", "and", "image", "two", images=[1, 0])],
        images=[noise(56, 56), noise(56, 84)],
    )
    yield Group(  # ten frames are two chunks
        [sample("video", "one clip", videos=[0]), sample("video", "again", videos=[0])],
        videos=[Clip(noise(10, 56, 56), fps=2.0)],
    )
    yield Group([sample("more text"), sample("and more")])
    yield Group(
        [sample("video", "image", "both", images=[0], videos=[1]), sample("video", "video", "others", videos=[1, 0])],
        images=[noise(84, 56)],
        videos=[Clip(noise(2, 56, 56)), Clip(noise(5, 56, 84))],
    )


def test_a_packed_document_gives_the_gradients_of_the_document_alone(model: Any) -> None:
    """Positions, attention, pictures or clips that reached over the end of a document would show here."""
    encoder = DocumentEncoder(pocket_processor(), 10_000)
    source = SourceRecipe("unused:source")
    groups = [encoder.encode_group(group, source) for group in media_groups()]
    packing = Packing(10_000)
    for group in groups:
        packing.add_group(group)
    packed = packing.finish()
    assert packed.video_grid_thw is not None
    assert packed.video_order is not None
    assert packed.video_order.tolist() == [0, 1, 0, 1, 2, 2, 3], "no clip is shared: that is not tested"
    together = gradients(model, packed)

    separate: dict[str, torch.Tensor] = {}
    for group in groups:
        for document in group.documents:
            alone = Packing(10_000)
            alone.add_group(EncodedGroup([document], group.images, group.videos))
            for name, gradient in gradients(model, alone.finish()).items():
                separate[name] = separate.get(name, 0) + gradient
    assert together.keys() == separate.keys()
    for name, gradient in together.items():
        error = (gradient - separate[name]).norm() / separate[name].norm().clamp_min(1e-12)
        assert error < 1e-6, f"{name}: {error:.1e}"
