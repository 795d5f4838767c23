"""Config: both dialects read, the released one written, nothing lost, nothing silently reinterpreted."""

import copy
import dataclasses
import json
import pickle
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minim3.config import (
    MiniMaxM3VLConfig,
    MiniMaxM3VLTextConfig,
    MiniMaxM3VLVisionConfig,
    load_config,
)

GOLDEN = Path(__file__).parent / "golden"


def released_text(**changes: Any) -> dict[str, Any]:
    """A small text config in the released dialect; a change to None removes the field, a dict merges into a dict."""
    raw: dict[str, Any] = json.loads((GOLDEN / "mtp_tiny_config.json").read_text())
    return changed(raw, changes)


def transformers_vl(**changes: Any) -> dict[str, Any]:
    """A small whole config as transformers writes it."""
    return changed(json.loads((GOLDEN / "vl_tiny" / "config.json").read_text()), changes)


def changed(raw: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    for name, value in changes.items():
        if value is None:
            raw.pop(name, None)
        elif isinstance(value, dict) and isinstance(raw.get(name), dict):
            raw[name] = changed(raw[name], value)
        else:
            raw[name] = value
    return raw


def tiny(**changes: Any) -> MiniMaxM3VLTextConfig:
    sizes: dict[str, Any] = {
        "vocab_size": 32, "hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2,
        "num_key_value_heads": 1, "head_dim": 4, "rotary_dim": 2, "intermediate_size": 4, "dense_intermediate_size": 8,
        "shared_intermediate_size": 4, "num_local_experts": 2, "num_experts_per_tok": 1,
    }  # fmt: skip
    return MiniMaxM3VLTextConfig(**(sizes | changes))


# Reading


def test_released_dialect_resolves_layer_kinds_and_indexer() -> None:
    config = MiniMaxM3VLTextConfig.from_dict(released_text())
    assert config.layer_types == ("full_attention", "minimax_m3_sparse", "minimax_m3_sparse")
    assert config.mlp_layer_types == ("dense", "sparse", "sparse")
    assert [config.is_sparse_attention_layer(i) for i in range(3)] == [False, True, True]
    assert [config.is_moe_layer(i) for i in range(3)] == [False, True, True]
    assert (config.index_n_heads, config.index_head_dim, config.index_block_size) == (2, 16, 8)
    assert (config.index_topk_blocks, config.index_init_blocks, config.index_local_blocks) == (3, 1, 1)
    assert config.index_score_type == "max"
    assert config.num_mtp_modules == 2
    assert config.torch_dtype == "float32"


def test_transformers_dialect_reads_to_the_same_model_as_the_released_one() -> None:
    theirs = load_config(GOLDEN / "vl_tiny")
    assert isinstance(theirs, MiniMaxM3VLConfig)
    ours = theirs.to_dict()
    for name in ("layer_types", "mlp_layer_types", "index_n_heads", "rope_parameters"):
        assert name not in ours["text_config"], "the released dialect is the one written"
    assert ours["text_config"]["hidden_act"] == "swigluoai"
    assert MiniMaxM3VLConfig.from_dict(ours) == theirs
    assert theirs.text_config.rope_theta == 5e6
    assert theirs.text_config.rotary_dim == 8
    assert theirs.torch_dtype == "float32"
    assert theirs.vision_config is not None
    assert theirs.vision_config.head_dim == 32


def test_defaults_of_absent_fields() -> None:
    # The released defaults, written out: a changed default would silently load another model.
    config = MiniMaxM3VLTextConfig.from_dict(released_text(sparse_attention_config={"sparse_init_block": None}))
    assert config.rms_norm_eps == 1e-6
    assert config.routed_scaling_factor == 2.0
    assert config.scoring_func == "sigmoid"
    assert config.use_routing_bias is True
    assert (config.swiglu_alpha, config.swiglu_limit, config.swiglu_beta) == (1.702, 7.0, 1.0)
    assert config.n_shared_experts == 1
    assert (config.index_init_blocks, config.index_local_blocks, config.index_score_type) == (0, 1, "max")
    assert MiniMaxM3VLTextConfig.from_dict(released_text(num_mtp_modules=None)).num_mtp_modules == 0
    vision = MiniMaxM3VLVisionConfig(hidden_size=12, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8)
    assert vision.layer_norm_eps == 1e-5
    assert vision.rope_theta == 1e4


@pytest.mark.parametrize("name", ["minimax_m3", "minimax_m2", "minimax_m3_vl_text", None])
def test_text_model_types(name: str | None) -> None:
    config = MiniMaxM3VLTextConfig.from_dict(released_text(model_type=name))
    if name is not None:
        assert config.to_dict()["model_type"] == name


@pytest.mark.parametrize("name", ["clip_vision_model", "minimax_m3_vision", "minimax_m3_vl_vision"])
def test_vision_model_types(name: str) -> None:
    config = MiniMaxM3VLConfig.from_dict(transformers_vl(vision_config={"model_type": name}))
    assert config.to_dict()["vision_config"]["model_type"] == name


def test_vision_merge_sizes_of_the_released_dialect() -> None:
    vision = {"spatial_merge_size": None, "temporal_patch_size": None, "rope_parameters": None, "rope_theta": 100.0}
    compression = {"image_token_compression_method": "patch_merge", "spatial_merge_size": 3, "temporal_patch_size": 1}
    raw = transformers_vl(vision_config=vision, merged_hidden_size=None)
    raw["vision_config"]["img_token_compression_config"] = compression
    config = MiniMaxM3VLConfig.from_dict(raw)
    assert config.vision_config is not None
    assert (config.vision_config.spatial_merge_size, config.vision_config.temporal_patch_size) == (3, 1)
    assert config.vision_config.rope_theta == 100.0
    assert config.to_dict()["vision_config"]["img_token_compression_config"] == compression


def test_sparse_lists_are_read_at_sparse_layers_only() -> None:
    # Layer 0 attends to everything: what the lists hold there means nothing and must not decide or fail anything.
    sparse = {"sparse_topk_blocks": [-7, 3, 3], "sparse_disable_index_value": [0, 1, 1]}
    config = MiniMaxM3VLTextConfig.from_dict(released_text(sparse_attention_config=sparse))
    assert config.index_topk_blocks == 3
    assert config.to_dict()["sparse_attention_config"]["sparse_topk_blocks"] == [-7, 3, 3]
    sparse["sparse_topk_blocks"] = [3, 3, 4]
    with pytest.raises(ValueError, match="sparse_topk_blocks is 3 at layer 1 and 4 at layer 2"):
        MiniMaxM3VLTextConfig.from_dict(released_text(sparse_attention_config=sparse))


def test_a_model_without_sparse_layers() -> None:
    for raw in (
        released_text(sparse_attention_config=None),
        released_text(sparse_attention_config={"use_sparse_attention": False}),
        released_text(sparse_attention_config={"sparse_attention_freq": [0, 0, 0], "sparse_num_index_heads": None}),
    ):
        config = MiniMaxM3VLTextConfig.from_dict(raw)
        assert config.layer_types == ("full_attention",) * 3
        assert MiniMaxM3VLTextConfig.from_dict(config.to_dict()) == config
    assert tiny().layer_types == ("full_attention",) * 2


def test_flat_text_config_file(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(released_text()))
    assert isinstance(load_config(tmp_path), MiniMaxM3VLTextConfig)
    with pytest.raises(ValueError, match="'text_config' is missing"):
        MiniMaxM3VLConfig.from_pretrained(tmp_path)


def test_live_transformers_config_object_is_read_by_its_dict() -> None:
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoConfig.from_pretrained(GOLDEN / "vl_tiny")
    config = MiniMaxM3VLConfig.from_dict(theirs.to_dict())
    expected = load_config(GOLDEN / "vl_tiny")
    assert isinstance(expected, MiniMaxM3VLConfig)
    assert dataclasses.replace(config.text_config, extra={}) == dataclasses.replace(expected.text_config, extra={})


def test_live_transformers_reads_what_we_write(tmp_path: Path) -> None:
    # Without partial_rotary_factor transformers rotates whole heads: it is written always.
    transformers = pytest.importorskip("transformers")
    config = load_config(GOLDEN / "vl_tiny")
    assert isinstance(config, MiniMaxM3VLConfig)
    config.save_pretrained(tmp_path)
    written = transformers.AutoConfig.from_pretrained(tmp_path)
    original = transformers.AutoConfig.from_pretrained(GOLDEN / "vl_tiny")
    for part in ("text_config", "vision_config"):
        ours, theirs = getattr(written, part).to_dict(), getattr(original, part).to_dict()
        assert {name: ours[name] for name in theirs if name != "architectures"} == {
            name: theirs[name] for name in theirs if name != "architectures"
        }


# Writing back


def test_round_trip_of_the_released_dialect_keeps_every_field() -> None:
    raw = released_text(use_cache=True, some_list=[1, {"a": None}])
    raw["sparse_attention_config"] |= {"sparse_future": "x", "sparse_disable_index_value": [1, 1, 1]}
    raw["moe_layer_freq"] = [0, 2, 1]
    written = MiniMaxM3VLTextConfig.from_dict(raw).to_dict()
    assert {name: written.get(name) for name in raw if name != "sparse_attention_config"} == {
        name: value for name, value in raw.items() if name != "sparse_attention_config"
    }
    assert raw["sparse_attention_config"].items() <= written["sparse_attention_config"].items()


def test_unknown_fields_survive_at_every_level() -> None:
    raw = transformers_vl(top_x=[1], text_config={"text_x": {"a": 1}}, vision_config={"vision_x": "v"})
    raw["text_config"]["sparse_attention_config"] = {"sparse_attention_freq": [0, 1, 1, 1], "sparse_x": 4}
    raw["vision_config"]["img_token_compression_config"] = {"compression_x": 5}
    written = MiniMaxM3VLConfig.from_dict(raw).to_dict()
    assert written["top_x"] == [1]
    assert written["text_config"]["text_x"] == {"a": 1}
    assert written["text_config"]["sparse_attention_config"]["sparse_x"] == 4
    assert written["vision_config"]["vision_x"] == "v"
    assert written["vision_config"]["img_token_compression_config"]["compression_x"] == 5


def test_a_changed_copy_does_not_write_the_old_spelling() -> None:
    config = MiniMaxM3VLTextConfig.from_dict(released_text(moe_layer_freq=[0, 7, 7]))
    assert config.to_dict()["moe_layer_freq"] == [0, 7, 7]
    other = dataclasses.replace(config, mlp_layer_types=("dense", "dense", "sparse"))
    assert other.to_dict()["moe_layer_freq"] == [0, 0, 1]


_json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5), lambda child: st.lists(child, max_size=3)
)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_reading_what_was_written_gives_the_same_config(data: st.DataObject) -> None:
    layers = data.draw(st.integers(1, 5))
    kinds = st.lists(st.booleans(), min_size=layers, max_size=layers)
    sparse, moe = data.draw(kinds), data.draw(kinds)
    config = tiny(
        num_hidden_layers=layers,
        layer_types=tuple("minimax_m3_sparse" if flag else "full_attention" for flag in sparse),
        mlp_layer_types=tuple("sparse" if flag else "dense" for flag in moe),
        index_n_heads=1, index_head_dim=data.draw(st.integers(2, 8)), index_block_size=data.draw(st.integers(1, 8)),
        index_topk_blocks=3, index_init_blocks=data.draw(st.integers(0, 1)),
        index_local_blocks=data.draw(st.integers(1, 2)), index_score_type=data.draw(st.sampled_from(["max", "lse"])),
        scoring_func=data.draw(st.sampled_from(["sigmoid", "softmax"])), swiglu_limit=data.draw(st.floats(0, 9)),
        num_mtp_modules=data.draw(st.integers(0, 3)), n_shared_experts=data.draw(st.integers(0, 1)),
        eos_token_id=data.draw(st.none() | st.integers(0, 9) | st.tuples(st.integers(0, 9), st.integers(0, 9))),
        torch_dtype=data.draw(st.sampled_from([None, "bfloat16", "float32"])),
        tie_word_embeddings=data.draw(st.booleans()),
        extra=data.draw(st.dictionaries(st.text(min_size=1, max_size=4).map("x_".__add__), _json, max_size=3)),
    )  # fmt: skip
    again = MiniMaxM3VLTextConfig.from_dict(json.loads(json.dumps(config.to_dict())))
    assert dataclasses.replace(again, extra={}) == dataclasses.replace(config, extra={})
    # a null among the unknown fields stays a null
    assert dict(again.extra) == dict(config.extra)
    assert again.to_dict() == config.to_dict()


def test_frozen_copyable_and_hashable() -> None:
    config = MiniMaxM3VLConfig.from_dict(transformers_vl())
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.text_config.hidden_size = 3  # type: ignore[misc]
    assert copy.deepcopy(config) == config
    assert pickle.loads(pickle.dumps(config)) == config
    assert len({config, MiniMaxM3VLConfig.from_dict(transformers_vl())}) == 1


def test_writing_does_not_alias_the_config() -> None:
    config = MiniMaxM3VLTextConfig.from_dict(released_text(unknown={"a": [1]}))
    config.to_dict()["unknown"]["a"].append(2)
    assert config.to_dict()["unknown"] == {"a": [1]}


# Refusing


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"attention_output_gate": True}, "attention_output_gate is True; only False"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'; only 'swigluoai' or 'silu'"),
        ({"use_gemma_norm": False}, "use_gemma_norm is False; only True"),
        ({"qk_norm_type": "per_layer"}, "qk_norm_type is 'per_layer'; only 'per_head'"),
        ({"scoring_func": "tanh"}, "scoring_func is 'tanh'"),
        ({"model_type": "llama"}, "model_type is 'llama'"),
        ({"rotary_dim": 7, "partial_rotary_factor": None}, "rotary_dim 7 must be even"),
        ({"rotary_dim": 32, "partial_rotary_factor": None}, "rotary_dim 32 .* head_dim 16"),
        ({"partial_rotary_factor": 1.0}, "rotary_dim 8 disagrees with partial_rotary_factor 1"),
        ({"moe_layer_freq": [0, 1]}, "moe_layer_freq has 2 entries, but num_hidden_layers is 3"),
        ({"moe_layer_freq": 1}, "moe_layer_freq is 1; expected a list"),
        ({"mlp_layer_types": ["dense", "dense", "sparse"]}, r"moe_layer_freq \[0, 1, 1\] disagrees with"),
        ({"layer_types": ["full_attention"] * 3}, r"sparse_attention_freq \[0, 1, 1\] disagrees with layer_types"),
        ({"mlp_layer_types": ["dense", "moe", "sparse"], "moe_layer_freq": None}, r"mlp_layer_types\[1\] is 'moe'"),
        ({"index_n_heads": 4}, "index_n_heads 4 disagrees with sparse_attention_config.sparse_num_index_heads 2"),
        ({"rope_parameters": {"rope_theta": 1.0}}, "rope_theta 5000000.0 disagrees with rope_parameters.rope_theta 1"),
        ({"rope_parameters": {"rope_type": "yarn"}}, "rope_type is 'yarn'"),
        ({"rope_parameters": {"factor": 4.0}}, "rope_parameters.factor is 4.0"),
        ({"rope_scaling": {"factor": 2}}, "rope_scaling is"),
        ({"num_key_value_heads": 3}, "num_attention_heads 8 is not a multiple of num_key_value_heads 3"),
        ({"num_experts_per_tok": 9}, "num_experts_per_tok 9 exceeds num_local_experts 8"),
        ({"n_shared_experts": 2}, "n_shared_experts is 2"),
        ({"hidden_size": "64"}, "hidden_size is '64'; expected an integer"),
        ({"hidden_size": True}, "hidden_size is True; expected an integer"),
        ({"rms_norm_eps": "tiny"}, "rms_norm_eps is 'tiny'; expected a finite number"),
        ({"swiglu_limit": -1.0}, "swiglu_limit is -1.0; expected at least 0"),
        ({"vocab_size": 0}, "vocab_size is 0; expected more than 0"),
        ({"torch_dtype": "int8"}, "torch_dtype is 'int8'"),
        ({"dtype": "bfloat16"}, "torch_dtype 'float32' disagrees with dtype 'bfloat16'"),
        ({"attention_dropout": 0.1}, "attention_dropout is 0.1; only 0.0"),
        ({"sparse_attention_config": {"sparse_init_block": 3}}, "= 4 forced blocks exceed the budget .* 3"),
        ({"sparse_attention_config": {"sparse_local_block": 0}}, "index_local_blocks is 0"),
        ({"sparse_attention_config": {"sparse_num_index_heads": 4}}, "index_n_heads 4 differs .* 2"),
        ({"sparse_attention_config": {"sparse_score_type": "mean"}}, "index_score_type is 'mean'"),
        ({"sparse_attention_config": {"sparse_index_dim": 4}}, "index_head_dim 4 is smaller than rotary_dim 8"),
        ({"sparse_attention_config": {"sparse_disable_index_value": [0, 1, 0]}}, "index_value is 0 at sparse layer 2"),
        ({"sparse_attention_config": {"sparse_disable_index_value": [1, 1]}}, "has 2 entries"),
        ({"sparse_attention_config": {"sparse_attention_freq": [1]}}, "has 1 entries, but num_hidden_layers is 3"),
        ({"sparse_attention_config": [1]}, r"sparse_attention_config is \[1\]; expected a mapping"),
    ],
)
def test_text_values_that_cannot_be_honoured(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MiniMaxM3VLTextConfig.from_dict(released_text(**changes))


@pytest.mark.parametrize(
    "name",
    ["vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim",
     "rope_theta", "max_position_embeddings", "intermediate_size", "dense_intermediate_size", "num_local_experts",
     "num_experts_per_tok", "shared_intermediate_size"],
)  # fmt: skip
def test_missing_text_fields_are_named(name: str) -> None:
    with pytest.raises(ValueError, match=f"required field '{name}' is missing"):
        MiniMaxM3VLTextConfig.from_dict(released_text(**{name: None}))


@pytest.mark.parametrize("name", ["sparse_num_index_heads", "sparse_block_size", "sparse_attention_freq"])
def test_missing_sparse_fields_are_named(name: str) -> None:
    with pytest.raises(ValueError, match=f"required field '{name}' is missing"):
        MiniMaxM3VLTextConfig.from_dict(released_text(sparse_attention_config={name: None}))


def test_rotary_dim_is_derived_only_where_a_factor_is_given() -> None:
    assert MiniMaxM3VLTextConfig.from_dict(released_text(rotary_dim=None)).rotary_dim == 8
    with pytest.raises(ValueError, match="required field 'rotary_dim' is missing"):
        MiniMaxM3VLTextConfig.from_dict(released_text(rotary_dim=None, partial_rotary_factor=None))
    written = MiniMaxM3VLTextConfig.from_dict(released_text(partial_rotary_factor=None)).to_dict()
    assert written["partial_rotary_factor"] == 0.5, "without it transformers rotates whole heads"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vision_config": None}, "required field 'vision_config' is missing"),
        ({"text_config": None}, "required field 'text_config' is missing"),
        ({"image_token_index": None}, "required field 'image_token_index' is missing"),
        ({"projector_hidden_size": None}, "required field 'projector_hidden_size' is missing"),
        ({"model_type": "llava"}, "model_type is 'llava'"),
        ({"video_token_index": 300}, "image_token_index 300 equals video_token_index 300"),
        ({"image_token_id": 5}, "image_token_index 300 disagrees with image_token_id 5"),
        ({"merged_hidden_size": 64}, "merged_hidden_size .* is 64; only 256"),
        ({"projector_hidden_act": "relu"}, "projector_hidden_act is 'relu'"),
        ({"vision_config": {"hidden_act": "gelu_new"}}, "hidden_act is 'gelu_new'; only 'gelu'"),
        ({"vision_config": {"hidden_size": None}}, "vision_config: required field 'hidden_size'"),
        ({"vision_config": {"num_attention_heads": 5}}, "hidden_size 96 is not a multiple of num_attention_heads 5"),
        ({"vision_config": {"num_attention_heads": 48}}, "heads of 2 channels"),
        ({"vision_config": {"rope_mode": "2d"}}, "rope_mode is '2d'"),
        ({"vision_config": {"img_token_compression_config": {"spatial_merge_size": 3}}}, "spatial_merge_size 2 disagr"),
    ],
)
def test_whole_config_values_that_cannot_be_honoured(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MiniMaxM3VLConfig.from_dict(transformers_vl(**changes))


def test_tied_embeddings_said_at_either_level_tie() -> None:
    for raw in (transformers_vl(tie_word_embeddings=True), transformers_vl(text_config={"tie_word_embeddings": True})):
        config = MiniMaxM3VLConfig.from_dict(raw)
        assert config.tie_word_embeddings
        assert config.text_config.tie_word_embeddings


def test_broken_config_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"config\.json does not exist"):
        load_config(tmp_path)
    for name, message in (
        ("checkpoints/x", "has exported nothing yet"), ("export/config.json", "its model is .*export"),
        ("adapter_config.json", "this is a LoRA adapter"),
    ):  # fmt: skip
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("{}")
        with pytest.raises(ValueError, match=message):
            load_config(tmp_path)
    for text in ("{", "[1]", ""):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(ValueError, match=r"config\.json"):
            load_config(tmp_path)
