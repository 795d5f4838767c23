"""The weights that ship: whole, small, loadable by everyone, and still able to answer."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import minim3
from minim3.loading import POCKET
from minim3.model.causal_lm import MiniMaxM3SparseForConditionalGeneration
from minim3.pocket.clips import FPS, draw_clip, random_clip
from minim3.pocket.evaluate import evaluate, model_answers, model_replies
from minim3.pocket.text_tasks import SMALL_TALK
from minim3.pocket.world import draw
from minim3.processing.processor import MiniMaxM3VLProcessor

MAX_BYTES = 12_000_000
LEAST_CLIPS, LEAST_CALLS = 75.0, 80.0  # percent
LEAST_RIGHT = 90.0  # percent of 140 questions and of 45 text tasks; the model card says what the weights reach


@pytest.fixture(scope="module")
def pocket() -> tuple[MiniMaxM3SparseForConditionalGeneration, MiniMaxM3VLProcessor]:
    model, processor = minim3.load()
    assert isinstance(model, MiniMaxM3SparseForConditionalGeneration)
    return model, processor


def test_it_is_a_complete_small_m3(pocket) -> None:
    """A pocket without one of the parts would leave that part untried by everyone."""
    model, processor = pocket
    config = model.text_config
    assert sum(file.stat().st_size for file in POCKET.iterdir()) <= MAX_BYTES
    assert {"full_attention", "minimax_m3_sparse"} == set(config.layer_types)
    assert {"dense", "sparse"} == set(config.mlp_layer_types)
    assert config.num_mtp_modules == 1
    assert model.text_model.mtp is not None
    assert processor.tokenizer.vocab_size == config.vocab_size


def test_it_still_answers(pocket) -> None:
    """Weights and processing files that no longer fit each other answer nonsense without any error."""
    model, processor = pocket
    report = evaluate(model_answers(model, processor), 140, 7, num_text_tasks=45)
    assert report["pictures"]["accuracy"] >= LEAST_RIGHT
    assert report["text"]["accuracy"] >= LEAST_RIGHT


def test_it_still_sees_clips_calls_tools_and_thinks(pocket) -> None:
    model, processor = pocket
    report = evaluate(
        model_answers(model, processor), 1, 7, num_text_tasks=1, reply_fn=model_replies(model, processor),
        num_clips=42, num_tools=40, num_thinking=24,
    )  # fmt: skip
    assert report["clips"]["accuracy"] >= LEAST_CLIPS
    assert report["tools"]["by_kind"]["call"]["accuracy"] >= LEAST_CALLS
    assert report["thinking"]["well_formed"]["accuracy"] >= 95
    assert report["drafts"]["accuracy"] >= 60


def test_each_moment_of_a_clip_is_seen_as_a_picture(pocket) -> None:
    """The tower never saw two moments at once: shown both, it would say of neither what it says of a picture."""
    model, processor = pocket
    clip = random_clip(np.random.default_rng(5), num_moving=1)
    frames = draw_clip(clip)
    videos = processor.video_processor([frames], video_metadata=[{"fps": FPS}])
    images = processor.image_processor([draw(scene) for scene in clip.moments])
    with torch.inference_mode():
        seen = model.get_video_features(videos["pixel_values_videos"], videos["video_grid_thw"])
        expected = model.get_image_features(images["pixel_values"], images["image_grid_thw"])
    torch.testing.assert_close(seen, expected)


def test_the_mtp_module_drafts_the_second_next_token(pocket) -> None:
    """An MTP module that was never trained, or is fed the wrong token, drafts nothing right."""
    model, processor = pocket
    messages = [
        {"role": "user", "content": "What can you do?"},
        {"role": "assistant", "content": SMALL_TALK[2][1]},
    ]
    ids, targets = processor.encode_conversation(messages)
    ids_T, target_T = torch.tensor(ids), torch.tensor(targets)
    with torch.inference_mode():
        output = model(input_ids=ids_T[None], output_mtp_logits=True)
    assert output.mtp_per_depth_logits is not None
    drafts = output.mtp_per_depth_logits[0][0, :-2].argmax(-1)
    right = (drafts == ids_T[2:])[target_T[2:].bool()]
    assert right.float().mean() > 0.5


def test_the_demo_answers_from_an_empty_folder(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "minim3", "demo", "--seed", "1"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "demo.png").is_file()
    assert "of 3 right." in done.stdout
