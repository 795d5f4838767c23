"""The shipped recipes for fine-tuning run as they stand, from the root of the repository."""

import json
import shutil
from pathlib import Path

import pytest

from minim3.training.config import load_recipe
from minim3.training.data import BatchStream
from minim3.training.trainer import train
from tests.data_standins import ROOT


@pytest.mark.parametrize("name", ["sft", "sft_multimodal"])
def test_a_fine_tuning_recipe_takes_two_steps_evaluates_and_resumes(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    changes = [f"output={tmp_path}", "steps=2", "data.num_workers=0", "data.tokens_per_batch=512", "threads=1"]
    changes += ["log_every_steps=1", "checkpoint.every_steps=1", "data.max_bad_records=0"]
    recipe = load_recipe(f"recipes/{name}.yaml", changes)
    assert train(recipe).step == 2
    weights = (tmp_path / "export" / "model.safetensors").read_bytes()
    shutil.rmtree(tmp_path / "checkpoints" / "step-00000002")
    assert train(recipe).step == 2
    assert (tmp_path / "export" / "model.safetensors").read_bytes() == weights, "going on after step 1 went elsewhere"
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "next_token" in line] == [1, 2]
    assert any("evaluation" in line for line in lines)
    assert not (tmp_path / "bad_records.jsonl").exists()


def test_the_example_data_hold_what_their_readme_lists(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    recipe = load_recipe("recipes/sft_multimodal.yaml", ["data.num_workers=0", "data.max_bad_records=0"])
    with BatchStream(recipe.data, seed=0) as stream:
        kinds = {kind for _ in range(4) for kind in next(stream).kinds}
    assert kinds == {"text", "thinking", "no thinking", "tool", "pictures", "clips"}
