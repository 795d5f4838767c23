"""Shipped recipes: each can be read; those that change a checkpoint do what they say, on a small one."""

import json
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors import safe_open
from torch import Tensor

from minim3.config import config_from_dict
from minim3.training import copying
from minim3.training.config import TrainingConfig, load_recipe, parse_recipe
from minim3.training.data import BatchBuilder
from minim3.training.retrieval import ASK, CONTROL_IDS, RetrievalSource, SymbolProcessor
from minim3.training.trainer import train

RECIPES = Path(__file__).parent.parent / "recipes"
SOURCE = "minim3.training.retrieval:RetrievalSource"
SMALL = {"lengths": [40], "num_pairs": 4, "num_questions": 4, "num_noise": 10, "num_keys": 12, "num_values": 12}


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.yaml")), ids=lambda path: path.stem)
def test_a_shipped_recipe_can_be_read(path: Path) -> None:
    recipe = load_recipe(path)
    if recipe.model.config is not None:
        config_from_dict(recipe.model.config)
    else:
        assert not Path(str(recipe.model.start_from)).is_absolute(), "a recipe starts from what is in the repository"
    assert recipe.output.startswith("runs/")


def test_the_recipes_of_the_issue_are_shipped() -> None:
    needed = {"pretrain", "sft", "sft_multimodal", "lora", "indexer_warmup", "dense_to_sparse", "mtp"}
    assert needed <= {path.stem for path in RECIPES.glob("*.yaml")}


def weights(folder: Path) -> dict[str, Tensor]:
    (path,) = folder.glob("*.safetensors")
    with safe_open(path, "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def small(name: str, output: Path, changes: Mapping[str, Any]) -> TrainingConfig:
    """A shipped recipe with its sections changed: few steps of few tokens, without worker processes."""
    document = yaml.safe_load((RECIPES / f"{name}.yaml").read_text(encoding="utf-8"))
    document["data"] = {
        "processor": "minim3.training.retrieval:SymbolProcessor",
        "sources": [{"name": SOURCE, "options": SMALL}],
        "tokens_per_batch": 160,
        "num_workers": 0,
    }
    document.update(output=str(output), log_every_steps=1, threads=1, device="cpu", evaluation={}, peak_flops=1e9)
    document["export"] = {"format": "fp32"}
    document["schedule"] = {"kind": "constant"}
    for key, value in changes.items():
        document[key] = {**document[key], **value} if isinstance(value, dict) else value
    return parse_recipe(document)


def dense_config(**changes: Any) -> dict[str, Any]:
    return {
        "model_type": "minimax_m3",
        "vocab_size": CONTROL_IDS + 34,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "rotary_dim": 4,
        "rope_theta": 1e4,
        "max_position_embeddings": 256,
        "dense_intermediate_size": 48,
        "intermediate_size": 16,
        "shared_intermediate_size": 16,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "moe_layer_freq": [0, 1],
        "initializer_range": 0.2,
        **changes,
    }


@pytest.fixture
def dense(tmp_path: Path) -> Path:
    """A dense checkpoint, as the recipe for one leaves it."""
    changes = {"steps": 3, "model": {"config": dense_config()}}
    train(small("retrieval_short", tmp_path / "dense", changes))
    return tmp_path / "dense" / "export"


def log_of(output: Path) -> list[dict[str, Any]]:
    lines = (output / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [line for line in map(json.loads, lines) if "next_token" in line]


def test_a_dense_checkpoint_becomes_a_sparse_one_in_two_stages(dense: Path, tmp_path: Path) -> None:
    index = {"block_size": 4, "topk_blocks": 2, "layers": [0, 1]}
    warm_up = {"steps": 30, "model": {"start_from": str(dense), "convert_to_sparse": index}, "optim": {"lr": 0.02}}
    train(small("indexer_warmup", tmp_path / "warm", {**warm_up, "loss": {"recall_every_steps": 1}}))
    before, after = weights(dense), weights(tmp_path / "warm" / "export")
    assert {name for name in after if name not in before} == {name for name in after if "index_" in name}
    assert all(torch.equal(before[name], after[name]) for name in before), "the warm-up moves the indexer alone"
    lines = log_of(tmp_path / "warm")
    assert lines[-1]["indexer_kl"] < 0.7 * lines[0]["indexer_kl"]
    recall = [[line[f"recall.layer_{layer}"] for layer in (0, 1)] for line in lines]
    assert np.mean(recall[-10:]) > np.mean(recall[:3]) + 0.005  # the toy's attention is spread out: little to gain

    second = {"steps": 2, "model": {"start_from": str(tmp_path / "warm" / "export")}, "loss": {"recall_every_steps": 1}}
    train(small("dense_to_sparse", tmp_path / "sparse", second))
    last = weights(tmp_path / "sparse" / "export")
    assert last.keys() == after.keys()
    still = {name for name in last if torch.equal(last[name], after[name])}
    assert not {name for name in still if "e_score" not in name}, "the second stage trains everything"
    assert "recall.layer_1" in log_of(tmp_path / "sparse")[0]


def test_mtp_modules_are_trained_beside_a_backbone_that_stays_bit_for_bit(dense: Path, tmp_path: Path) -> None:
    data = {"data": {"tokens_per_batch": 160}}  # the recipe's own names its checkpoint's tokenizer
    changes = {"steps": 8, "model": {"start_from": str(dense)}, "loss": {"indexer_kl_weight": 0.0}, **data}
    train(small("mtp", tmp_path / "mtp", {**changes, "optim": {"lr": 0.01, "ema_decay": 0.5}}))
    before, after = weights(dense), weights(tmp_path / "mtp" / "export")
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert {name for name in after if name not in before} == {name for name in after if ".mtp." in name}
    lines = log_of(tmp_path / "mtp")
    assert lines[-1]["mtp"] < lines[0]["mtp"]
    config = json.loads((tmp_path / "mtp" / "export" / "config.json").read_text())
    assert config["num_mtp_modules"] == 1


def test_a_run_in_bf16_with_checkpointed_layers_resumes_exactly(tmp_path: Path) -> None:
    """A state that kept the bf16 weights alone would go on from rounded ones."""
    sparse = {"sparse_attention_freq": [1, 1], "sparse_num_index_heads": 2, "sparse_index_dim": 8}
    config = dense_config(sparse_attention_config={**sparse, "sparse_block_size": 4, "sparse_topk_blocks": 2})
    options = {"config": config, "precision": "bf16", "checkpoint_activations": True}
    changes = {"model": options, "loss": {"indexer_kl_weight": 0.5, "z_weight": 1e-3, "router_aux_weight": 1e-2}}
    train(small("pretrain", tmp_path / "whole", {**changes, "steps": 4}))
    train(small("pretrain", tmp_path / "parts", {**changes, "steps": 2}))
    train(small("pretrain", tmp_path / "parts", {**changes, "steps": 4}))
    whole, parts = weights(tmp_path / "whole" / "export"), weights(tmp_path / "parts" / "export")
    assert whole.keys() == parts.keys()
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
    rounded = [torch.equal(tensor, tensor.bfloat16().float()) for name, tensor in whole.items() if "proj" in name]
    assert not any(rounded), "weights stay in fp32"


# The task that the recipes above learn


def test_every_question_has_its_pair_in_the_context() -> None:
    source = RetrievalSource(3, lengths=[64, 256], num_pairs=9, num_questions=12)
    for index in range(20):
        (sample,) = source.group(index).samples
        ids, mask = SymbolProcessor().encode_conversation(sample.messages)
        assert len(ids) == int(sample.kind.removeprefix("retrieval_"))
        assert max(ids) < source.vocab_size
        start = ids.index(ASK) + 1
        context, answers = ids[:start], ids[start:]
        pairs = set(pairwise(context))
        asked = list(zip(answers[::2], answers[1::2]))
        assert len(asked) == 12
        assert set(asked) <= pairs
        assert all(context.count(key) == 1 for key, _ in asked), "a key that stands twice has two answers"
        assert [place for place, counts in enumerate(mask) if counts] == list(range(start + 1, len(ids), 2))


def test_documents_of_a_source_are_numbered_and_drawn_by_weight() -> None:
    options = {"lengths": [64, 32], "length_weights": [9.0, 1.0]}
    one, again, other = RetrievalSource(0, **options), RetrievalSource(0, **options), RetrievalSource(1, **options)
    assert one.group(7) == again.group(7) != other.group(7)
    kinds = [one.group(index).samples[0].kind for index in range(200)]
    assert 0.8 < kinds.count("retrieval_64") / 200 < 0.97
    with pytest.raises(ValueError, match="num_pairs is 20, but there are only 10 keys"):
        RetrievalSource(0, num_pairs=20, num_keys=10)
    with pytest.raises(ValueError, match="1 length_weights are given for 2 lengths"):
        RetrievalSource(0, lengths=[32, 64], length_weights=[1.0])


def test_the_retrieval_recipes_fit_their_task_and_each_other() -> None:
    """A vocabulary too small, or a budget other than an eighth, would show after half an hour of training."""
    names = ("retrieval_short", "retrieval_dense", "indexer_warmup")
    short, recipe, warm_up = (load_recipe(RECIPES / f"{name}.yaml") for name in names)
    assert short.model.config is not None
    assert RetrievalSource(0).vocab_size == short.model.config["vocab_size"]
    for source in short.data.sources:
        assert source.options["num_symbols"] + copying.CONTROL_IDS == RetrievalSource(0).vocab_size
    convert = warm_up.model.convert_to_sparse
    assert convert is not None
    assert convert.block_size * convert.topk_blocks * 8 == 2048
    batch = BatchBuilder(recipe.data, recipe.data.sources, seed=0, split=0).build(0)
    assert batch.num_tokens > 0.7 * recipe.data.tokens_per_batch
