"""Adapters and the PEFT library on transformers' model: what one writes the other reads, with equal logits."""

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("peft")

import peft

from minim3.model.adapter import adapter_parameters, attach_adapter, load_adapter, merge_adapter, save_adapter
from minim3.model.causal_lm import MiniMaxM3SparseForCausalLM, MiniMaxM3SparseForConditionalGeneration
from tests.parity.oracle import random_config, random_inputs, random_model

SEED = 1
EVERYWHERE = ("attention", "indexer", "mlp", "shared_experts", "experts", "projector", "vision", "lm_head")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("base")
    random_model(SEED).save_pretrained(path)
    return path


def theirs(base: Path) -> Any:
    from transformers.models.minimax_m3_vl.modeling_minimax_m3_vl import (
        MiniMaxM3SparseForConditionalGeneration as Theirs,
    )

    return Theirs.from_pretrained(base, dtype=torch.float32)


def ours(base: Path) -> Any:
    return MiniMaxM3SparseForConditionalGeneration.from_pretrained(base, dtype=torch.float32)


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model(**random_inputs(SEED, 100)).logits


def save(base: Path, path: Path, targets: tuple[str, ...], naming: str, **options: Any) -> torch.Tensor:
    """Logits of our model with an adapter of these targets, which is saved."""
    model = ours(base)
    attach_adapter(model, targets=targets, rank=3, alpha=5, **options)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for factor in adapter_parameters(model).values():
            factor.copy_(torch.randn(factor.shape, generator=generator) * 0.5 * factor.shape[-1] ** -0.5)
    save_adapter(model, path, naming=naming)
    expected = logits(model)
    assert (expected - logits(ours(base))).abs().max() > 0.1
    return expected


def load_with_peft(base: Path, path: Path) -> Any:
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*adapter keys.*")  # missing ones would be left as they start
        return peft.PeftModel.from_pretrained(theirs(base), path)


@pytest.mark.parametrize("targets", [("attention", "indexer", "experts", "vision"), ("experts",)])
def test_peft_reads_released_names(base: Path, tmp_path: Path, targets: tuple[str, ...]) -> None:
    """Per expert, too: PEFT puts them into the stacks itself, by the config's target_parameters."""
    expected = save(base, tmp_path, targets, "released")
    torch.testing.assert_close(logits(load_with_peft(base, tmp_path)), expected, atol=1e-4, rtol=1e-4)


def test_transformers_reads_released_names(base: Path, tmp_path: Path) -> None:
    """Its own loader renames more than PEFT's: projectors and head. Fused gate and up are left to the other naming."""
    expected = save(base, tmp_path, ("attention", "indexer", "experts", "projector", "lm_head"), "released")
    model = theirs(base)
    model.load_adapter(str(tmp_path))
    torch.testing.assert_close(logits(model), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("rslora", [False, True])
def test_peft_reads_everything_under_the_names_of_transformers(base: Path, tmp_path: Path, rslora: bool) -> None:
    expected = save(base, tmp_path, EVERYWHERE, "transformers", rslora=rslora)
    torch.testing.assert_close(logits(load_with_peft(base, tmp_path)), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("targets", [("mlp",), ("shared_experts",), ("projector",), ("lm_head",)])
def test_peft_says_what_it_cannot_place(base: Path, tmp_path: Path, targets: tuple[str, ...]) -> None:
    """Under released names PEFT alone does not find these, and says so instead of leaving them out in silence."""
    save(base, tmp_path, targets, "released")
    with pytest.raises(Warning, match="adapter keys"):
        load_with_peft(base, tmp_path)


@pytest.mark.parametrize("rslora", [False, True])
def test_what_peft_writes_is_read_here(base: Path, tmp_path: Path, rslora: bool) -> None:
    """An adapter made by PEFT on transformers' model, fused projections and stacked experts included."""
    config = peft.LoraConfig(
        r=4, lora_alpha=6, use_rslora=rslora, init_lora_weights=False,
        target_modules=["q_proj", "o_proj", "gate_up_proj", "linear_1", "merge_linear_2"],
        target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
    )  # fmt: skip
    torch.manual_seed(0)
    model = peft.get_peft_model(theirs(base), config)
    model.eval()
    model.save_pretrained(tmp_path)
    expected, mine = logits(model), ours(base)
    assert (expected - logits(mine)).abs().max() > 0.1
    load_adapter(mine, tmp_path)
    torch.testing.assert_close(logits(mine), expected, atol=1e-4, rtol=1e-4)
    merged = MiniMaxM3SparseForConditionalGeneration.from_pretrained(base, dtype=torch.float32, adapter=tmp_path)
    torch.testing.assert_close(logits(merged), expected, atol=1e-4, rtol=1e-4)
    # and back again, as PEFT had it
    save_adapter(mine, tmp_path / "again", naming="transformers")
    torch.testing.assert_close(logits(load_with_peft(base, tmp_path / "again")), expected, atol=1e-4, rtol=1e-4)


def test_one_adapted_stack_of_experts(base: Path, tmp_path: Path) -> None:
    """PEFT then has one wrapper, where the inner and the outer one would be told apart by their nesting."""
    config = peft.LoraConfig(
        r=2, lora_alpha=6, init_lora_weights=False, target_modules=["q_proj"],
        target_parameters=["mlp.experts.gate_up_proj"],
    )  # fmt: skip
    torch.manual_seed(0)
    model = peft.get_peft_model(theirs(base), config)
    model.eval()
    model.save_pretrained(tmp_path)
    mine = ours(base)
    load_adapter(mine, tmp_path)
    torch.testing.assert_close(logits(mine), logits(model), atol=1e-4, rtol=1e-4)


def test_text_models(base: Path, tmp_path: Path) -> None:
    """Modules of a model without a vision part have other names in transformers."""
    from transformers.models.minimax_m3_vl.modeling_minimax_m3_vl import MiniMaxM3VLForCausalLM

    torch.manual_seed(0)
    model = MiniMaxM3VLForCausalLM(random_config(SEED).text_config).float().eval()
    model.save_pretrained(tmp_path / "base")
    text = MiniMaxM3SparseForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
    attach_adapter(text, targets=("attention", "mlp", "experts", "lm_head"), rank=2, alpha=4)
    with torch.no_grad():
        for factor in adapter_parameters(text).values():
            factor.normal_(0.0, factor.shape[-1] ** -0.5)
    save_adapter(text, tmp_path / "adapter", naming="transformers")
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*adapter keys.*")
        wrapped = peft.PeftModel.from_pretrained(model, tmp_path / "adapter")
    ids = torch.randint(3, 300, (1, 60), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = wrapped(input_ids=ids).logits
        with wrapped.disable_adapter():
            assert (expected - wrapped(input_ids=ids).logits).abs().max() > 1e-2
        torch.testing.assert_close(text(ids).logits, expected, atol=1e-4, rtol=1e-4)
    # Merged into a checkpoint of transformers' text model, which stores stacks and pairs fused. Weights, not logits:
    # fresh routers are so near to ties that the last bits choose other experts.
    load = MiniMaxM3SparseForCausalLM.from_pretrained
    merged = load(tmp_path / "base", dtype=torch.float32, adapter=tmp_path / "adapter").state_dict()
    merge_adapter(text)
    for name, weight in text.state_dict().items():
        torch.testing.assert_close(merged[name], weight, atol=1e-6, rtol=1e-6)
