"""Recipes: strict, typed, overridable."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from minim3.config import config_from_dict
from minim3.training.config import changed_keys, load_recipe, parse_recipe

ROOT = Path(__file__).parent.parent


def minimal(**changes: Any) -> dict[str, Any]:
    return {
        "output": "out",
        "steps": 10,
        "model": {"config": {}},
        "data": {"processor": "a:b", "sources": [{"name": "a:c"}]},
        **changes,
    }


def write(tmp_path: Path, recipe: Any) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return path


def test_an_unknown_key_names_its_nearest_match() -> None:
    with pytest.raises(ValueError, match=r"'optim\.weigth_decay'.*'optim\.weight_decay'"):
        parse_recipe(minimal(optim={"weigth_decay": 0.1}))


def test_an_unknown_key_inside_a_list_is_found() -> None:
    recipe = minimal(data={"processor": "a:b", "sources": [{"name": "a:c"}, {"name": "a:d", "wieght": 2}]})
    with pytest.raises(ValueError, match=r"data\.sources\.1\.wieght"):
        parse_recipe(recipe)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": 1.5}, "steps is 1.5; it must be a whole number"),
        ({"steps": True}, "steps is True"),
        ({"optim": {"lr": "fast"}}, r"optim\.lr is 'fast'; it must be a number"),
        ({"schedule": {"kind": "cosin"}}, r"schedule\.kind is 'cosin'; it must be one of 'cosine'"),
        ({"output": 3}, "output is 3; it must be of type str"),
        ({"data": {"processor": "a:b", "sources": []}}, "sources is empty"),
        ({"data": {"processor": "a:b", "sources": "a:c"}}, r"data\.sources is 'a:c'; it must be a list"),
        ({"model": {}}, "exactly one of `config`"),
        ({"model": {"config": {}, "start_from": "x"}}, "exactly one of `config`"),
        ({"optim": {"betas": [0.9]}}, "betas must be two numbers"),
        ({"batches_per_step": 0}, "batches_per_step must be at least 1"),
        ({"peak_flops": 0}, "peak_flops must be positive"),
        ({"optim": {"lr": ".inf"}}, r"optim\.lr is '\.inf'; it must be a number"),
        ({"optim": {"lr": float("nan")}}, r"optim\.lr is nan; it must be a number"),
        ({"optim": {"lr": -1}}, r"optim\.lr must not be negative, is -1"),
        ({"optim": {"clip_norm": -1}}, r"optim\.clip_norm must not be negative"),
        ({"optim": {"muon_momentum": 1}}, r"optim\.muon_momentum must lie in \[0, 1\)"),
        ({"schedule": {"final_fraction": 5}}, r"schedule\.final_fraction must lie in \[0, 1\], is 5"),
        ({"checkpoint": {"every_steps": -1}}, r"checkpoint\.every_steps must not be negative"),
        ({"evaluation": {"batches": 0}}, r"evaluation\.batches must be at least 1"),
        ({"spikes": {"factor": 0.5}}, r"spikes\.factor must be above 1"),
        ({"spikes": {"max_in_row": 0}}, r"spikes\.max_in_row must be at least 1"),
        ({"data": {"processor": "a:b"}}, r"lacks the required key 'data\.sources'"),
    ],
)
def test_wrong_values_are_refused_by_name(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_recipe(minimal(**changes))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"steps: [1\nb: {", r"recipe\.yaml is not valid YAML: expected ',' or ']'.* at line 2, column 2$"),
        (b"output: \xff", "is not a text file in UTF-8"),
        (b"steps: \x01", "is not valid YAML"),
        (b"", "must hold a mapping of keys, not NoneType"),
        (b"- a", "must hold a mapping of keys, not list"),
    ],
)
def test_a_file_that_is_no_recipe_is_refused_in_one_line(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        load_recipe(path)
    with pytest.raises(ValueError, match="no recipe at"):
        load_recipe(tmp_path)


def test_numbers_that_yaml_reads_as_text_are_numbers(tmp_path: Path) -> None:
    # YAML 1.1 reads 1e-4 as a string; a learning rate written that way must not be refused or stay text.
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(minimal()) + "optim: {lr: 1e-4}\n")
    assert load_recipe(path).optim.lr == 1e-4


def test_overrides_reach_nested_keys_and_list_items(tmp_path: Path) -> None:
    overrides = ["optim.lr=5e-3", "data.sources.0.weight=2", "optim.betas=[0.8, 0.9]", "model.config.hidden_size=7"]
    recipe = load_recipe(write(tmp_path, minimal()), overrides)
    assert recipe.optim.lr == 5e-3
    assert recipe.data.sources[0].weight == 2.0
    assert recipe.optim.betas == (0.8, 0.9)
    assert recipe.model.config == {"hidden_size": 7}


@pytest.mark.parametrize("override", ["optim.lr", "=3", "steps.deep=1", "data.sources.4.weight=1", "data.sources.x=1"])
def test_overrides_that_lead_nowhere_are_refused(tmp_path: Path, override: str) -> None:
    with pytest.raises(ValueError, match="override"):
        load_recipe(write(tmp_path, minimal()), [override])


def test_a_misspelt_override_names_its_nearest_match(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"did you mean 'optim\.lr'"):
        load_recipe(write(tmp_path, minimal()), ["optim.lrr=1"])


def test_a_recipe_survives_the_round_trip_through_plain_values() -> None:
    recipe = parse_recipe(minimal(optim={"betas": [0.8, 0.9]}))
    assert parse_recipe(recipe.to_dict()) == recipe


def test_changed_keys_are_named_with_both_values() -> None:
    before, after = parse_recipe(minimal()).to_dict(), parse_recipe(minimal(optim={"lr": 0.5})).to_dict()
    assert changed_keys(before, after) == {"optim.lr": (1e-3, 0.5)}


def test_the_pocket_recipe_is_a_recipe_and_its_model_fits_the_budget() -> None:
    names = ("pocket_text.yaml", "pocket_clips.yaml", "pocket.yaml")
    text, clips, whole = (load_recipe(ROOT / "recipes" / name) for name in names)
    assert text.model.start_from == "runs/pocket-vision"  # what `make train-pocket` writes first
    assert clips.model.start_from == f"{text.output}/export"
    assert whole.model.start_from == f"{clips.output}/export"
    config = config_from_dict(json.loads((ROOT / "recipes" / "pocket_config.json").read_text()))
    import torch

    from minim3.model.causal_lm import MiniMaxM3SparseForConditionalGeneration

    with torch.device("meta"):
        model = MiniMaxM3SparseForConditionalGeneration(config)
    assert 2 * sum(parameter.numel() for parameter in model.parameters()) < 11.5e6  # bytes in bf16
