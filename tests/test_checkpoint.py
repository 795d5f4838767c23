"""Checkpoints: names, MXFP8, strictness, safety of paths, atomic writes, bounded memory."""

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from minim3 import checkpoint
from minim3.checkpoint import (
    CheckpointReader,
    convert_checkpoint,
    dequantize_mxfp8,
    load_into,
    quantize_mxfp8,
    write_checkpoint,
)
from minim3.checkpoint import progress as progress_module
from minim3.checkpoint.names import RULES, is_quantized_key, placements, released_keys
from minim3.checkpoint.writer import FORMATS
from minim3.config import MiniMaxM3VLTextConfig

GOLDEN = Path(__file__).parent / "golden"

# A stand-in has the parameter names and shapes of a text model: one dense layer, one sparse one, one MTP module.
HIDDEN, EXPERTS, WIDTH = 40, 3, 24
MOE = "block_sparse_moe"
ATTENTION = {"self_attn.q_proj.weight": (16, HIDDEN), "self_attn.q_norm.weight": (8,), "input_layernorm.weight": (8,)}
SPARSE_LAYER = ATTENTION | {
    "self_attn.indexer.index_q_proj.weight": (8, HIDDEN),
    "self_attn.indexer.index_k_norm.weight": (8,),
    f"{MOE}.gate.weight": (EXPERTS, HIDDEN),
    f"{MOE}.experts.w13": (EXPERTS, 2 * WIDTH, HIDDEN),
    f"{MOE}.experts.w2": (EXPERTS, HIDDEN, WIDTH),
    f"{MOE}.shared_experts.up_proj.weight": (WIDTH, HIDDEN),
}
TEXT = (
    {"model.embed_tokens.weight": (20, HIDDEN), "model.norm.weight": (HIDDEN,), "lm_head.weight": (20, HIDDEN)}
    | {f"model.layers.0.{name}": shape for name, shape in ATTENTION.items()}
    | {"model.layers.0.mlp.gate_proj.weight": (WIDTH, HIDDEN), "model.layers.0.mlp.up_proj.weight": (WIDTH, HIDDEN)}
    | {f"model.layers.1.{name}": shape for name, shape in SPARSE_LAYER.items()}
)
MTP = {f"model.mtp.layers.0.transformer_layer.{name}": shape for name, shape in SPARSE_LAYER.items()} | {
    "model.mtp.layers.0.eh_proj.weight": (HIDDEN, 2 * HIDDEN)
}
VISION = {"vision_tower.vision_model.pre_layrnorm.bias": (6,), "patch_merge_mlp.linear_1.weight": (6, 6)}


def text_config(**changes: Any) -> MiniMaxM3VLTextConfig:
    raw = json.loads((GOLDEN / "mtp_tiny_config.json").read_text())
    raw["sparse_attention_config"]["sparse_init_block"] = 0
    return MiniMaxM3VLTextConfig.from_dict(raw | changes)


class Standin(nn.Module):
    """A module tree with the given parameters (the correction bias as a buffer); `tied` names share storage."""

    def __init__(self, shapes: dict[str, tuple[int, ...]], tied: tuple[str, str] | None = None) -> None:
        super().__init__()
        self.config = text_config()
        for name, shape in shapes.items():
            module, leaf = self._module(name)
            module.register_parameter(leaf, nn.Parameter(torch.randn(shape)))
            if leaf == "w13":
                moe, _ = self._module(name.removesuffix(".experts.w13") + ".x")
                moe.register_buffer("e_score_correction_bias", torch.randn(shape[0]))
        if tied:
            (module, leaf), (other, other_leaf) = self._module(tied[0]), self._module(tied[1])
            setattr(other, other_leaf, getattr(module, leaf))

    def _module(self, name: str) -> tuple[nn.Module, str]:
        module: nn.Module = self
        *path, leaf = name.split(".")
        for part in path:
            if part not in module._modules:
                module.add_module(part, nn.Module())
            child = module._modules[part]
            assert child is not None
            module = child
        return module, leaf


def meta(shapes: dict[str, tuple[int, ...]] = TEXT, **options: Any) -> Standin:
    with torch.device("meta"):
        return Standin(shapes, **options)


def saved(folder: Path, shapes: dict[str, tuple[int, ...]] = TEXT, **options: Any) -> dict[str, Tensor]:
    """Writes a stand-in to `folder`; returns its state."""
    torch.manual_seed(0)
    model = Standin(shapes)
    write_checkpoint(model, folder, **options)
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def rewrite(folder: Path, change: Any) -> None:
    """Applies `change` to the tensors of a one-file checkpoint."""
    tensors = {key: tensor.clone() for key, tensor in load_file(folder / "model.safetensors").items()}
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def assert_state(model: nn.Module, expected: dict[str, Tensor]) -> None:
    state = model.state_dict()
    assert state.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(state[name], tensor), name


# Names

_prefix = st.sampled_from(["", "language_model."])
_layer = st.one_of(
    st.integers(0, 99).map("model.layers.{}".format),
    st.integers(0, 9).map("model.mtp.layers.{}.transformer_layer".format),
)
_leaf = st.one_of(
    st.builds("self_attn.index_{}_{}.weight".format, st.sampled_from("qk"), st.sampled_from(["proj", "norm"])),
    st.builds(f"{MOE}.experts.{{}}.w{{}}.weight".format, st.integers(0, 255), st.integers(1, 3)),
    st.sampled_from(
        [f"{MOE}.gate.weight", f"{MOE}.e_score_correction_bias", f"{MOE}.shared_experts.down_proj.weight",
         "mlp.gate_proj.weight", "mlp.up_proj.weight", "self_attn.q_proj.weight", "self_attn.q_norm.weight",
         "input_layernorm.weight"]
    ),
)  # fmt: skip


@settings(max_examples=200, deadline=None)
@given(prefix=_prefix, layer=_layer, leaf=_leaf)
def test_every_released_key_survives_the_way_there_and_back(prefix: str, layer: str, leaf: str) -> None:
    key = f"{prefix}{layer}.{leaf}"
    (place,) = placements(key)
    back = [k for k, p in released_keys(place.name, 256) if p == place]
    assert back == [key]


@settings(max_examples=50, deadline=None)
@given(layer=_layer, num_experts=st.integers(1, 9))
def test_the_keys_of_a_stack_cover_it_once(layer: str, num_experts: int) -> None:
    # w1 and w3 swapped, or an expert written twice, would still load without an error elsewhere.
    stack = torch.zeros(num_experts, 6, 5)
    for key, place in released_keys(f"{layer}.{MOE}.experts.w13", num_experts):
        place.of_parameter(stack).add_(1 if ".w1." in key else 2)
    assert torch.equal(stack[:, :3], torch.ones(num_experts, 3, 5)), "gate rows (w1) first"
    assert torch.equal(stack[:, 3:], torch.full((num_experts, 3, 5), 2.0)), "up rows (w3) second"


def test_the_rules_are_all_used_by_the_golden_checkpoints() -> None:
    used = set()
    for file in (GOLDEN / "vl_tiny" / "model.safetensors", GOLDEN / "mtp_tiny.safetensors"):
        with CheckpointReader(file) as reader:
            for key in reader:
                (place,) = placements(key)
                used.add((place.name != key, place.half))
    assert used == {(False, None), (True, None), (True, 0), (True, 1)}
    assert len(RULES) == 4


# MXFP8


def test_mxfp8_golden_bit_exact() -> None:
    golden = load_file(GOLDEN / "selection_mxfp8.safetensors")
    weight, scale, expected = (golden[f"mxfp8.{name}"] for name in ("weight", "scale_inv", "dequantized"))
    assert torch.equal(dequantize_mxfp8(weight, scale), expected)
    assert torch.equal(dequantize_mxfp8(weight, scale, dtype=torch.bfloat16), expected.bfloat16())
    # Requantized with our scales the values stay, save those that saturate: 1.875 * 2**8 is past 448.
    again = dequantize_mxfp8(*quantize_mxfp8(expected))
    amax = expected.unflatten(1, (-1, 32)).abs().amax(2, keepdim=True)
    limit = (448 * 2 ** (torch.floor(torch.log2(amax)) - 8)).expand(-1, -1, 32).flatten(1)
    assert torch.equal(again, expected.clamp(-limit, limit))


@settings(max_examples=80, deadline=None)
@given(rows=st.integers(1, 4), width=st.integers(1, 100), exponent=st.integers(-120, 120), seed=st.integers(0, 999))
def test_mxfp8_error_is_bounded_and_requantizing_changes_nothing(
    rows: int, width: int, exponent: int, seed: int
) -> None:
    x = torch.randn(rows, width, generator=torch.Generator().manual_seed(seed)) * 2.0**exponent
    weight, scale = quantize_mxfp8(x)
    assert weight.shape == x.shape
    assert scale.shape == (rows, -(-width // 32)), "the last block may be short"
    out = dequantize_mxfp8(weight, scale)
    for block in range(scale.shape[1]):
        part, got = x[:, block * 32 : block * 32 + 32], out[:, block * 32 : block * 32 + 32]
        amax = part.abs().amax(1, keepdim=True)
        unit = 2.0 ** (torch.floor(torch.log2(amax.double())) - 8)
        # half a unit in the last place of e4m3 (3 bits of mantissa), half its subnormal step, or saturation at 448
        bound = torch.maximum(part.abs().double() / 16, unit / 1024).maximum(part.abs().double() - 448 * unit)
        assert bool(((part.double() - got.double()).abs() <= bound).all())
    again, scale_again = quantize_mxfp8(out)
    assert torch.equal(scale_again, scale)
    assert torch.equal(again.view(torch.uint8), weight.view(torch.uint8))


def test_mxfp8_rounds_half_to_even_and_saturates() -> None:
    x = torch.zeros(1, 32)
    x[0, :6] = torch.tensor([511.0, 480.0, -500.0, 17.0, 19.0, 0.0])  # amax 511: scale 2**0, grid step 2 at 16..32
    weight, scale = quantize_mxfp8(x)
    assert scale.tolist() == [[127]]
    assert weight.float()[0, :6].tolist() == [448.0, 448.0, -448.0, 16.0, 20.0, 0.0]


def test_mxfp8_extreme_scales_are_exact() -> None:
    # 2**-127 is subnormal in fp32, where a fast exp2 may give 0.
    weight = torch.ones(1, 64).to(torch.float8_e4m3fn)
    out = dequantize_mxfp8(weight, torch.tensor([[0, 254]], dtype=torch.uint8), dtype=torch.float32)
    assert out[0, 0].item() == 2.0**-127
    assert out[0, 63].item() == 2.0**127
    tiny = torch.full((1, 3), 2.0**-149)
    assert torch.isfinite(dequantize_mxfp8(*quantize_mxfp8(tiny))).all()
    largest = torch.full((1, 3), torch.finfo(torch.float32).max)
    assert torch.isfinite(dequantize_mxfp8(*quantize_mxfp8(largest))).all()
    zeros, scale = quantize_mxfp8(torch.zeros(2, 40))
    assert not dequantize_mxfp8(zeros, scale).any()


def test_mxfp8_refuses_what_it_cannot_mean() -> None:
    weight = torch.zeros(2, 40).to(torch.float8_e4m3fn)
    scale = torch.full((2, 2), 127, dtype=torch.uint8)
    scale[1, 0] = 255
    with pytest.raises(ValueError, match=r"\[1, 0\] is 255"):
        dequantize_mxfp8(weight, scale)
    with pytest.raises(ValueError, match=r"\[2, 1\] do not fit a weight of shape \[2, 40\]"):
        dequantize_mxfp8(weight, scale[:, :1])
    with pytest.raises(ValueError, match="uint8"):
        dequantize_mxfp8(weight, scale.float())
    with pytest.raises(ValueError, match="float8_e4m3fn"):
        dequantize_mxfp8(weight.float(), scale)
    for bad in (float("nan"), float("inf"), -float("inf")):
        with pytest.raises(ValueError, match="NaN or infinity"):
            quantize_mxfp8(torch.tensor([[0.0, bad]]))


# Round trips


@pytest.mark.parametrize("max_shard_bytes", [None, 1, 9000])
def test_fp32_round_trip_one_file_or_many(tmp_path: Path, max_shard_bytes: int | None) -> None:
    expected = saved(tmp_path / "c", TEXT | MTP, format="fp32", max_shard_bytes=max_shard_bytes)
    assert (tmp_path / "c" / "model.safetensors").exists() == (max_shard_bytes is None)
    model = meta(TEXT | MTP)
    load_into(model, tmp_path / "c", dtype=torch.float32)
    assert_state(model, expected)
    assert all(parameter.requires_grad for parameter in model.parameters())
    filled = Standin(TEXT | MTP)  # parameters that exist are filled in place
    before = {name: tensor.data_ptr() for name, tensor in filled.state_dict().items()}
    load_into(filled, tmp_path / "c")
    assert_state(filled, expected)
    assert {name: tensor.data_ptr() for name, tensor in filled.state_dict().items()} == before


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, None])
def test_dtypes_and_the_router_in_fp32(tmp_path: Path, stored: torch.dtype, dtype: torch.dtype | None) -> None:
    # Pitfall 19: a router below fp32 chooses other experts.
    saved(tmp_path, format="fp32")
    rewrite(tmp_path, lambda tensors: tensors.update({k: t.to(stored) for k, t in tensors.items() if "gate." not in k}))
    model = meta()
    load_into(model, tmp_path, dtype=dtype)
    for name, tensor in model.state_dict().items():
        if name.endswith((f"{MOE}.gate.weight", "e_score_correction_bias")) and (dtype or stored) != torch.float64:
            assert tensor.dtype == torch.float32
        else:
            assert tensor.dtype == (dtype or stored), name
    assert {t.dtype for k, t in load_file(tmp_path / "model.safetensors").items() if "gate." in k} == {torch.float32}


def test_mxfp8_checkpoint_quantizes_projections_only_and_loads(tmp_path: Path) -> None:
    expected = saved(tmp_path, TEXT | MTP, format="mxfp8")
    stored = load_file(tmp_path / "model.safetensors")
    quantized = {key for key, tensor in stored.items() if tensor.dtype == torch.float8_e4m3fn}
    assert quantized == {key for key in stored if is_quantized_key(key)} != set()
    assert {key + "_scale_inv" for key in quantized} == {key for key in stored if key.endswith("_scale_inv")}
    for key, tensor in stored.items():
        if any(part in key for part in ("norm", "embed", "lm_head", "index_", "gate.weight", "bias", "eh_proj")):
            assert tensor.dtype == (torch.float32 if f"{MOE}.gate." in key or "bias" in key else torch.bfloat16), key
    for expert in range(EXPERTS):
        assert f"model.layers.1.{MOE}.experts.{expert}.w2.weight" in quantized
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "mxfp8"
    assert config["quantization_config"]["weight_block_size"] == [1, 32]
    assert f"model.layers.1.{MOE}.gate" in config["quantization_config"]["ignored_layers"]
    assert config["torch_dtype"] == "bfloat16"
    model = meta(TEXT | MTP)
    load_into(model, tmp_path, dtype=torch.float32)
    name = f"model.layers.1.{MOE}.experts.w2"
    assert torch.equal(model.state_dict()[name], dequantize_mxfp8(*quantize_mxfp8(expected[name])))
    model.config = text_config(quantization_config=config["quantization_config"])
    write_checkpoint(model, tmp_path, format="fp32")  # and plain again: no quantization_config may stay behind
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())


def test_bf16_export_rounds_all_but_the_router(tmp_path: Path) -> None:
    expected = saved(tmp_path, format="bf16")
    model = meta()
    load_into(model, tmp_path, dtype=torch.float32)
    for name, tensor in model.state_dict().items():
        exact = name.endswith((f"{MOE}.gate.weight", "e_score_correction_bias"))
        assert torch.equal(tensor, expected[name] if exact else expected[name].bfloat16().float()), name


def test_golden_checkpoint_is_written_back_equal(tmp_path: Path) -> None:
    from minim3.model.causal_lm import MiniMaxM3SparseForConditionalGeneration

    model = MiniMaxM3SparseForConditionalGeneration.from_pretrained(GOLDEN / "vl_tiny")
    write_checkpoint(model, tmp_path / "c", max_shard_bytes=300_000)
    golden = load_file(GOLDEN / "vl_tiny" / "model.safetensors")
    with CheckpointReader(tmp_path / "c") as reader:
        assert set(reader) == golden.keys()
        for key, tensor in reader.items():
            assert tensor.dtype == golden[key].dtype
            assert torch.equal(tensor, golden[key]), key


def test_every_file_starts_tensors_at_multiples_of_their_element_size(tmp_path: Path) -> None:
    # A misaligned tensor cannot be viewed in a memory map; odd-sized fp8 tensors before wider ones would do it.
    saved(tmp_path, TEXT | {"model.layers.0.self_attn.k_proj.weight": (3, 32)}, format="mxfp8")
    data = (tmp_path / "model.safetensors").read_bytes()
    length = int.from_bytes(data[:8], "little")
    sizes = {"F32": 4, "BF16": 2, "F8_E4M3": 1, "U8": 1}
    assert (8 + length) % 8 == 0
    for key, entry in json.loads(data[8 : 8 + length]).items():
        if key != "__metadata__":
            assert entry["data_offsets"][0] % sizes[entry["dtype"]] == 0


def test_tied_embeddings_are_stored_once_and_need_no_head(tmp_path: Path) -> None:
    tied = ("model.embed_tokens.weight", "lm_head.weight")
    model = Standin(TEXT, tied=tied)
    write_checkpoint(model, tmp_path)
    with CheckpointReader(tmp_path) as reader:
        assert "model.embed_tokens.weight" in reader.keys()  # noqa: SIM118
        assert "lm_head.weight" not in reader.keys()  # noqa: SIM118
    loaded = meta(TEXT, tied=tied)
    load_into(loaded, tmp_path)
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert torch.equal(loaded.lm_head.weight, model.lm_head.weight)
    with pytest.raises(ValueError, match=r"1 missing from the checkpoint: lm_head\.weight"):
        load_into(meta(), tmp_path)
    rewrite(tmp_path, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"] + 1}))
    with pytest.raises(ValueError, match="but the model ties the two"):
        load_into(meta(TEXT, tied=tied), tmp_path)


def test_tied_embeddings_are_converted_from_either_name(tmp_path: Path) -> None:
    """A file with the head alone loads into a tied model; converting it must find the tensor, too."""
    shapes = {"model.embed_tokens.weight": (12, 8), "model.norm.weight": (8,)}
    tied = ("model.embed_tokens.weight", "lm_head.weight")
    write_checkpoint(Standin(shapes, tied=tied), tmp_path / "c")
    embedding = load_file(tmp_path / "c/model.safetensors")[tied[0]]
    rewrite(tmp_path / "c", lambda tensors: tensors.update({tied[1]: tensors.pop(tied[0])}))
    convert_checkpoint(tmp_path / "c", tmp_path / "new", meta(shapes, tied=tied), format="fp32")
    new = load_file(tmp_path / "new/model.safetensors")
    assert new.keys() == shapes.keys()
    assert torch.equal(new[tied[0]], embedding)
    rewrite(tmp_path / "c", lambda tensors: tensors.update({tied[0]: tensors[tied[1]] + 1}))
    with pytest.raises(ValueError, match=r"differs from .*, but the model ties the two"):
        convert_checkpoint(tmp_path / "c", tmp_path / "other", meta(shapes, tied=tied), format="fp32")
    assert not (tmp_path / "other").exists()


def test_text_part_of_a_vision_language_checkpoint(tmp_path: Path) -> None:
    expected = saved(tmp_path, {f"language_model.{name}": shape for name, shape in TEXT.items()} | VISION)
    model = meta()
    assert sorted(load_into(model, tmp_path, text_only=True)) == sorted(VISION)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, expected[f"language_model.{name}"])
    with pytest.raises(ValueError, match="not part of this model"):
        load_into(meta(), tmp_path)
    rewrite(tmp_path, lambda tensors: tensors.pop("language_model.model.norm.weight"))
    with pytest.raises(ValueError, match=r"1 missing from the checkpoint: language_model\.model\.norm\.weight"):
        load_into(meta(), tmp_path, text_only=True)


def test_names_of_a_text_model_saved_by_transformers(tmp_path: Path) -> None:
    # Without its vision part transformers saves stacked experts and merged gate/up projections under its own names.
    moe = {"gate.weight": "gate.weight", "e_score_correction_bias": "gate.e_score_correction_bias",
           "experts.w13": "experts.gate_up_proj", "experts.w2": "experts.down_proj"}  # fmt: skip
    shapes = TEXT | {
        f"model.layers.1.{MOE}.shared_experts.gate_proj.weight": (WIDTH, HIDDEN),
        f"model.layers.1.{MOE}.shared_experts.down_proj.weight": (HIDDEN, WIDTH),
    }
    source = Standin(shapes)
    state = dict(source.state_dict())
    theirs = {k: t for k, t in state.items() if MOE not in k and "indexer" not in k and "layers.0.mlp" not in k}
    theirs |= {f"model.layers.1.mlp.{new}": state[f"model.layers.1.{MOE}.{old}"] for old, new in moe.items()}
    theirs |= {k.replace("index_", "", 1) if ".indexer.index_" not in k else k.replace(".index_", "."): t
               for k, t in state.items() if "indexer" in k}  # fmt: skip
    shared, dense = f"model.layers.1.{MOE}.shared_experts", "model.layers.0.mlp"
    theirs["model.layers.1.mlp.shared_experts.down_proj.weight"] = state[f"{shared}.down_proj.weight"]
    for part, name in ((shared, "model.layers.1.mlp.shared_experts"), (dense, dense)):
        merged = torch.cat([state[f"{part}.gate_proj.weight"], state[f"{part}.up_proj.weight"]])
        theirs[f"{name}.gate_up_proj.weight"] = merged
    save_file({key: tensor.contiguous() for key, tensor in theirs.items()}, tmp_path / "model.safetensors")
    model = meta(shapes)
    load_into(model, tmp_path)
    assert_state(model, state)


# Every key consumed or named


def test_pitfall_22_unknown_keys_are_named_not_skipped(tmp_path: Path) -> None:
    saved(tmp_path)
    stray = ["model.layers.1.self_attn.index_v_proj.weight", "model.layers.7.input_layernorm.weight",
             f"model.layers.1.{MOE}.experts.{EXPERTS}.w1.weight"]  # fmt: skip
    for key in stray:
        rewrite(tmp_path, lambda tensors, key=key: tensors.update({key: torch.zeros(WIDTH, HIDDEN)}))
        with pytest.raises(ValueError, match=rf"1 not part of this model: {key}"):
            load_into(meta(), tmp_path)
        rewrite(tmp_path, lambda tensors, key=key: tensors.pop(key))
    load_into(meta(), tmp_path)


@pytest.mark.parametrize(
    "key",
    ["model.norm.weight", f"model.layers.1.{MOE}.experts.2.w3.weight", f"model.layers.1.{MOE}.experts.0.w2.weight",
     f"model.layers.1.{MOE}.e_score_correction_bias", "model.layers.1.self_attn.index_q_proj.weight"],
)  # fmt: skip
def test_missing_and_misshapen_tensors_are_named(tmp_path: Path, key: str) -> None:
    saved(tmp_path)
    kept = load_file(tmp_path / "model.safetensors")[key].clone()
    rewrite(tmp_path, lambda tensors: tensors.pop(key))
    with pytest.raises(ValueError, match=rf"1 missing from the checkpoint: {key}$"):
        load_into(meta(), tmp_path)
    rewrite(tmp_path, lambda tensors: tensors.update({key: torch.zeros(*kept.shape, 2)}))
    model = meta()
    with pytest.raises(ValueError, match="1 of the wrong shape: ") as caught:
        load_into(model, tmp_path)
    assert f"{key} is {[*kept.shape, 2]}, the model has {list(kept.shape)}" in str(caught.value)
    assert "missing from" not in str(caught.value)
    assert all(tensor.is_meta for tensor in model.state_dict().values()), "refused before anything is allocated"


def test_the_same_experts_given_twice_are_named(tmp_path: Path) -> None:
    saved(tmp_path)
    stacked = "model.layers.1.mlp.experts.down_proj"
    rewrite(tmp_path, lambda tensors: tensors.update({stacked: torch.zeros(EXPERTS, HIDDEN, WIDTH)}))
    with pytest.raises(ValueError, match="given twice"):
        load_into(meta(), tmp_path)


def test_pitfall_23_mtp_modules_are_counted_by_their_tensors(tmp_path: Path) -> None:
    # The released config promises MTP modules that its checkpoint does not hold.
    saved(tmp_path / "without")
    config = checkpoint.read_config(tmp_path / "without")
    assert isinstance(config, MiniMaxM3VLTextConfig)
    assert config.num_mtp_modules == 2
    assert checkpoint.num_mtp_modules_in(tmp_path / "without") == 0
    assert not checkpoint.has_mtp_tensors(tmp_path / "without")
    saved(tmp_path / "with", TEXT | MTP)
    assert checkpoint.num_mtp_modules_in(tmp_path / "with") == 1
    assert checkpoint.num_mtp_modules_in(GOLDEN / "mtp_tiny.safetensors") == 2
    assert checkpoint.num_mtp_modules_in(GOLDEN / "vl_tiny") == 0
    rewrite(
        tmp_path / "with", lambda t: [t.update({k.replace("mtp.layers.0", "mtp.layers.2"): t.pop(k)}) for k in [*t]]
    )
    with pytest.raises(ValueError, match=r"MTP modules \[2\]"):
        checkpoint.num_mtp_modules_in(tmp_path / "with")


# Broken and hostile files


@pytest.mark.parametrize("keep", [0, 4, 100, -1])
def test_truncated_files_are_named(tmp_path: Path, keep: int) -> None:
    saved(tmp_path)
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(ValueError, match=r"model\.safetensors is not a complete safetensors file"):
        load_into(meta(), tmp_path)


def test_folders_without_weights_or_with_two_kinds(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds no weights"):
        CheckpointReader(tmp_path)
    saved(tmp_path / "c")
    (tmp_path / "c" / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(ValueError, match="holds both"):
        CheckpointReader(tmp_path / "c")


@pytest.mark.parametrize(
    "name",
    ["../secret.safetensors", "/etc/secret.safetensors", "sub/x.safetensors", "..\\x.safetensors", "C:x.safetensors",
     "x.bin", "..", "", 3],
)  # fmt: skip
def test_an_index_may_not_point_outside_its_folder(tmp_path: Path, name: Any) -> None:
    folder = tmp_path / "c"
    saved(folder, max_shard_bytes=9000)
    index = folder / "model.safetensors.index.json"
    raw = json.loads(index.read_text())
    key = next(iter(raw["weight_map"]))
    (tmp_path / "secret.safetensors").write_bytes((folder / raw["weight_map"][key]).read_bytes())
    raw["weight_map"][key] = name
    index.write_text(json.dumps(raw))
    with pytest.raises(ValueError, match="expected the plain name"):
        CheckpointReader(folder)


def test_index_and_files_must_agree(tmp_path: Path) -> None:
    saved(tmp_path, max_shard_bytes=9000)
    index = tmp_path / "model.safetensors.index.json"
    good = index.read_text()
    raw = json.loads(good)
    key, file = next(iter(raw["weight_map"].items()))
    other = next(name for name in raw["weight_map"].values() if name != file)

    index.write_text(json.dumps({"weight_map": raw["weight_map"] | {"extra.weight": file}}))
    with pytest.raises(ValueError, match=r"does not hold extra\.weight"):
        CheckpointReader(tmp_path)
    index.write_text(json.dumps({"weight_map": raw["weight_map"] | {key: other}}))
    with pytest.raises(ValueError, match=f"{key}, which the index says"):
        CheckpointReader(tmp_path)
    index.write_text(good.replace(f'"{key}":', f'"{key}": "{other}", "{key}":', 1))
    with pytest.raises(ValueError, match="appears twice"):
        CheckpointReader(tmp_path)
    for text in ("{", "[]", '{"weight_map": {}}'):
        index.write_text(text)
        with pytest.raises(ValueError, match=r"index\.json"):
            CheckpointReader(tmp_path)
    index.write_text(good)
    index.write_text(json.dumps({"weight_map": {k: v for k, v in raw["weight_map"].items() if k != key}}))
    with pytest.raises(ValueError, match=f"{key}, which the index does not list"):
        CheckpointReader(tmp_path)
    index.write_text(good)
    tensors = {k: t.clone() for k, t in load_file(tmp_path / other).items()}
    save_file(tensors | {key: torch.zeros(1)}, tmp_path / other)
    with pytest.raises(ValueError, match=key):
        CheckpointReader(tmp_path)
    (tmp_path / other).unlink()
    with pytest.raises(ValueError, match=f"{other} does not exist"):
        CheckpointReader(tmp_path)


def test_mxfp8_pieces_that_do_not_belong_together(tmp_path: Path) -> None:
    key = "model.layers.0.self_attn.q_proj.weight"
    cases: list[tuple[Any, str]] = [
        (lambda t: t.pop(key), f"{key}_scale_inv scales {key}, which is not"),
        (lambda t: t.pop(key + "_scale_inv"), f"{key} is F8_E4M3 without {key}_scale_inv"),
        (lambda t: t.update({key: torch.zeros(16, HIDDEN)}), f"{key} is F32 with U8 scales"),
        (lambda t: t.update({key + "_scale_inv": t[key + "_scale_inv"][:, :1].contiguous()}), r"needs \[16, 2\]"),
        (lambda t: t[key + "_scale_inv"].fill_(255), f"{key}: MXFP8 scale at .* is 255"),
    ]
    for change, message in cases:
        saved(tmp_path, format="mxfp8")
        rewrite(tmp_path, change)
        with pytest.raises(ValueError, match=message):
            load_into(meta(), tmp_path)


def test_a_quantized_indexer_is_dequantized_too(tmp_path: Path) -> None:
    # Presence of the scale decides, not a list of names.
    expected = saved(tmp_path)
    key = "model.layers.1.self_attn.index_q_proj.weight"

    def quantize(tensors: dict[str, Tensor]) -> None:
        tensors[key], tensors[key + "_scale_inv"] = quantize_mxfp8(tensors[key])

    rewrite(tmp_path, quantize)
    model = meta()
    load_into(model, tmp_path)
    name = "model.layers.1.self_attn.indexer.index_q_proj.weight"
    assert torch.equal(model.state_dict()[name], dequantize_mxfp8(*quantize_mxfp8(expected[name])))


# Resolving names


def test_names_that_resolve_to_nothing(tmp_path: Path) -> None:
    assert checkpoint.resolve_checkpoint(str(tmp_path)) == tmp_path
    with pytest.raises(ValueError, match="does not exist"):
        checkpoint.resolve_checkpoint(tmp_path / "nowhere")
    (tmp_path / "file.txt").write_text("")
    with pytest.raises(ValueError, match="neither a checkpoint folder"):
        checkpoint.resolve_checkpoint(tmp_path / "file.txt")


def test_a_hub_id_is_served_from_the_cache_when_offline(tmp_path: Path) -> None:
    snapshot = tmp_path / "models--someone--tiny" / "snapshots" / ("a" * 40)
    blobs = tmp_path / "models--someone--tiny" / "blobs"
    saved(tmp_path / "c")
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for i, file in enumerate(sorted((tmp_path / "c").iterdir())):  # the cache links each name to a blob elsewhere
        (blobs / str(i)).write_bytes(file.read_bytes())
        (snapshot / file.name).symlink_to(blobs / str(i))
    refs = tmp_path / "models--someone--tiny" / "refs"
    refs.mkdir()
    (refs / "main").write_text("a" * 40)
    script = """
        from minim3 import checkpoint
        path = checkpoint.resolve_checkpoint("someone/tiny")
        print(path, len(checkpoint.CheckpointReader(path).keys()))
        try:
            checkpoint.resolve_checkpoint("someone/other")
        except ValueError as error:
            print(error)
    """
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(tmp_path)}
    out = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)], env=environment, capture_output=True, text=True, check=True
    )
    first, second = out.stdout.strip().splitlines()
    with CheckpointReader(tmp_path / "c") as reader:
        assert first == f"{snapshot} {len(reader.keys())}"
    assert second.startswith("someone/other is not a local folder, and could not be had from the hub")


# Writing safely


def test_a_failed_write_leaves_the_old_checkpoint_and_nothing_else(tmp_path: Path) -> None:
    expected = saved(tmp_path / "c")
    broken = Standin(TEXT)
    with torch.no_grad():
        broken.model.layers._modules["1"].self_attn.q_proj.weight[0, 0] = float("nan")  # type: ignore[union-attr]
    with pytest.raises(ValueError, match=r"model\.layers\.1\.self_attn\.q_proj\.weight: .*NaN"):
        write_checkpoint(broken, tmp_path / "c", format="mxfp8")
    with pytest.raises(ValueError, match="NaN"):
        write_checkpoint(broken, tmp_path / "new", format="mxfp8")
    assert [entry.name for entry in tmp_path.iterdir()] == ["c"]
    model = meta()
    load_into(model, tmp_path / "c")
    assert_state(model, expected)


def test_overwriting_replaces_the_weights_and_keeps_the_rest(tmp_path: Path) -> None:
    folder = tmp_path / "c"
    saved(folder, max_shard_bytes=9000)
    (folder / "tokenizer.json").write_text("{}")
    (folder / "logs").mkdir()
    (folder / "logs" / "a.txt").write_text("kept")
    link = tmp_path / "link"
    link.symlink_to(folder)
    expected = saved(link)
    assert sorted(entry.name for entry in folder.iterdir()) == [
        "config.json", "logs", "model.safetensors", "tokenizer.json",
    ]  # fmt: skip
    assert link.is_symlink()
    assert (folder / "logs" / "a.txt").read_text() == "kept"
    model = meta()
    load_into(model, folder)
    assert_state(model, expected)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["c", "link"]


def test_folders_of_something_else_are_not_overwritten(tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    (other / "thesis.doc").write_text("")
    with pytest.raises(ValueError, match=r"holds thesis\.doc and no config\.json"):
        saved(other)
    (other / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(ValueError, match="something other than a checkpoint"):
        saved(other)
    with pytest.raises(ValueError, match="is a file"):
        saved(other / "thesis.doc")
    assert sorted(entry.name for entry in other.iterdir()) == ["config.json", "thesis.doc"]
    processor = tmp_path / "processor"  # saved before the model: belongs to the checkpoint
    processor.mkdir()
    for name in ("tokenizer.json", "preprocessor_config.json", "chat_template.jinja"):
        (processor / name).write_text("{}")
    saved(processor)
    assert len(list(processor.iterdir())) == 5


def test_bad_options_and_the_warning_for_transformers(tmp_path: Path) -> None:
    model = Standin(TEXT)
    with pytest.raises(ValueError, match=f"format is 'int8'; expected one of {', '.join(FORMATS)}"):
        write_checkpoint(model, tmp_path / "c", format="int8")
    with pytest.raises(ValueError, match="max_shard_bytes is 0"):
        write_checkpoint(model, tmp_path / "c", max_shard_bytes=0)
    model.config = text_config(scoring_func="softmax")
    with pytest.warns(UserWarning, match="transformers ignores scoring_func 'softmax'"):
        write_checkpoint(model, tmp_path / "c")


def test_generation_config_travels(tmp_path: Path) -> None:
    model = Standin(TEXT)
    assert checkpoint.read_generation_config(GOLDEN / "mtp_tiny.safetensors") is None
    model.generation_config = {"top_k": 40}  # type: ignore[assignment]
    write_checkpoint(model, tmp_path)
    assert checkpoint.read_generation_config(tmp_path) == {"top_k": 40}
    (tmp_path / "generation_config.json").write_text("{")
    with pytest.raises(ValueError, match=r"generation_config\.json is not valid JSON"):
        checkpoint.read_generation_config(tmp_path)


def test_progress_bar_appears_after_a_second_on_stderr_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    saved(tmp_path)
    drawn = []
    original = progress_module.ByteProgress._draw
    monkeypatch.setattr(progress_module.ByteProgress, "_draw", lambda self: drawn.append(1) or original(self))
    load_into(meta(), tmp_path)
    assert not drawn
    monkeypatch.setattr(progress_module, "DELAY_SECONDS", -1.0)
    load_into(meta(), tmp_path)
    assert drawn == [1]
    assert capsys.readouterr().out == ""


# Memory

_MEMORY_SCRIPT = """
    import sys, threading, time
    import torch
    from torch import nn
    from minim3.checkpoint import convert_checkpoint, load_into, write_checkpoint
    from minim3.config import MiniMaxM3VLTextConfig
    torch.set_num_threads(1)

    def rss_anon():
        with open("/proc/self/status") as status:
            return next(int(line.split()[1]) * 1024 for line in status if line.startswith("RssAnon"))

    class Peak:
        def __enter__(self):
            self.base, self.peak, self.stop = rss_anon(), 0, False
            self.thread = threading.Thread(target=self.watch)
            self.thread.start()
            return self
        def watch(self):
            while not self.stop:
                self.peak = max(self.peak, rss_anon())
                time.sleep(0.0005)
        def __exit__(self, *_):
            self.stop = True
            self.thread.join()
            self.growth = max(self.peak, rss_anon()) - self.base

    class Model(nn.Module):
        # 24 projections of 4 MiB in fp32, by a name that MXFP8 is for
        def __init__(self):
            super().__init__()
            self.model = nn.Module()
            self.model.layers = nn.ModuleList()
            for _ in range(24):
                layer = nn.Module()
                layer.mlp = nn.Module()
                layer.mlp.up_proj = nn.Linear(1024, 1024, bias=False)
                self.model.layers.append(layer)
            sizes = dict(vocab_size=8, hidden_size=8, num_hidden_layers=1, num_attention_heads=1, head_dim=8)
            self.config = MiniMaxM3VLTextConfig(**sizes, num_key_value_heads=1, rotary_dim=2,
                mlp_layer_types=("dense",), dense_intermediate_size=8)

    def meta():
        with torch.device("meta"):
            return Model()

    folder = sys.argv[1]
    for kind in ("warm-up", "fp32", "bf16", "mxfp8"):
        name, format = f"{folder}/{kind}", "mxfp8" if kind == "warm-up" else kind
        model = Model()
        with Peak() as write:
            write_checkpoint(model, name, format=format)
        del model
        model = meta()
        with Peak() as load:
            load_into(model, name, dtype=torch.float32)
        del model
        with Peak() as convert:
            convert_checkpoint(name, f"{name}-converted", meta(), format="bf16" if kind == "mxfp8" else "mxfp8")
        print(kind, write.growth, load.growth, convert.growth)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc")
def test_memory_is_the_model_and_one_tensor(tmp_path: Path) -> None:
    # Loading a state dict whole would hold the model twice; assembling a shard before writing it would too.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", textwrap.dedent(_MEMORY_SCRIPT), str(tmp_path)]
    out = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    tensor, model, slack = 2**22, 24 * 2**22, 4 * 2**20
    measured = {kind: tuple(map(int, growths)) for kind, *growths in map(str.split, out.stdout.splitlines())}
    measured.pop("warm-up")
    assert len(measured) == 3
    for kind, (write_growth, load_growth, convert_growth) in measured.items():
        # What is made of the one tensor: nothing, a bf16 copy, or an fp32 copy and its quantized form.
        assert write_growth <= 2 * tensor + slack, (kind, write_growth)
        assert convert_growth <= 3 * tensor + slack, (kind, convert_growth)  # the same, and it dequantized
        assert load_growth <= model + tensor + slack, (kind, load_growth)
        assert load_growth >= model * 3 // 4, "the measurement sees the model at all"
