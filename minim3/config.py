"""Model configuration: both dialects of config.json read, the released one written, everything resolved once.

The *released* dialect says which layers are what through `moe_layer_freq` and `sparse_attention_config`; the
*transformers* dialect through `mlp_layer_types`, `layer_types` and `index_*`. Here each layer's kind is a string in a
tuple, decided at construction, and no other code looks at the raw fields. Constructors take the resolved names as
keywords; `from_dict` takes either dialect. Fields nobody here knows are kept in `extra` and written back.
"""

import copy
import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from minim3.config_reader import (
    DENSE_MLP,
    DTYPE_NAMES,
    FULL_ATTENTION,
    MOE_MLP,
    SPARSE_ATTENTION,
    SPARSE_FIELDS,
    FieldReader,
    read_layer_kinds,
    read_rope,
    require_one_of,
    require_per_layer,
    require_type,
)

MODEL_TYPE = "minimax_m3_vl"
TEXT_MODEL_TYPES = ("minimax_m3_vl_text", "minimax_m3", "minimax_m2")
VISION_MODEL_TYPES = ("minimax_m3_vl_vision", "minimax_m3_vision", "clip_vision_model")

# Fields that may be present with one meaning only: the one the model has.
_TEXT_FIXED: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("swigluoai", "silu"),  # transformers writes "silu" and means SwiGLU-OAI
    "use_gemma_norm": (True,),
    "qk_norm_type": ("per_head",),
    "attention_output_gate": (False,),
    "attention_bias": (False,),
    "attention_dropout": (0.0,),
    "router_jitter_noise": (0.0,),
    "norm_topk_prob": (True,),
    "rope_scaling": (None,),
    "sliding_window": (None,),
}
_TEXT_WRITTEN = {
    "architectures": ["MiniMaxM3SparseForCausalLM"],
    "hidden_act": "swigluoai",
    "use_gemma_norm": True,
    "qk_norm_type": "per_head",
    "attention_output_gate": False,
}
_VISION_FIXED: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("gelu",),
    "attention_dropout": (0.0,),
    "position_embedding_type": ("rope",),
    "rope_mode": ("3d",),
    "rope_scaling": (None,),
}
_TOP_FIXED: dict[str, tuple[Any, ...]] = {
    "model_type": (MODEL_TYPE,),
    "projector_hidden_act": ("gelu",),
    "multimodal_projector_bias": (True,),
    "patch_merge_bias": (True,),
    "vision_feature_layer": (-1,),
    "vision_feature_select_strategy": ("full",),
}


def _bookkeeping(compare: bool = True) -> Any:
    return field(default_factory=dict, hash=False, repr=False, compare=compare)


def _check_fields(config: Any, where: str, positive: tuple[str, ...]) -> None:
    """Scalars have the type of their default, sizes are positive, nothing is negative."""
    for f in dataclasses.fields(config):
        value = getattr(config, f.name)
        if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING:
            like: Any = value if dataclasses.is_dataclass(value) else 0
        else:
            like = f.default
        if isinstance(like, (bool, int, float, str)):
            value = require_type(where + f.name, value, like)
            object.__setattr__(config, f.name, value)
            if not isinstance(value, str) and value < 0:
                raise ValueError(f"{where}{f.name} is {value}; expected at least 0")
    for name in positive:
        if getattr(config, name) <= 0:
            raise ValueError(f"{where}{name} is {getattr(config, name)}; expected more than 0")


@dataclass(frozen=True, kw_only=True)
class MiniMaxM3VLTextConfig:
    """The text backbone, by resolved names. Sizes are numbers of elements unless a comment says otherwise.

    Raises `ValueError` on construction for a combination the model cannot honour, naming the field and both values.
    """

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rotary_dim: int  # channels of each head that RoPE rotates; the rest pass through
    rope_theta: float = 5e6
    max_position_embeddings: int = 524288  # tokens
    rms_norm_eps: float = 1e-6
    intermediate_size: int = 0  # of one routed expert
    dense_intermediate_size: int = 0  # of the MLP of a dense layer
    shared_intermediate_size: int = 0  # of the shared expert
    n_shared_experts: int = 1
    num_local_experts: int = 0
    num_experts_per_tok: int = 0
    routed_scaling_factor: float = 2.0
    scoring_func: str = "sigmoid"  # or "softmax"
    use_routing_bias: bool = True
    swiglu_alpha: float = 1.702
    swiglu_limit: float = 7.0  # 0: no clamp
    swiglu_beta: float = 1.0
    use_qk_norm: bool = True
    layer_types: tuple[str, ...] = ()  # one a layer; empty means full attention everywhere
    mlp_layer_types: tuple[str, ...] = ()  # one a layer; empty means a mixture of experts everywhere
    index_n_heads: int = 0
    index_head_dim: int = 0
    index_block_size: int = 0  # tokens
    index_topk_blocks: int = 0  # a query's budget, forced blocks included
    index_init_blocks: int = 0
    index_local_blocks: int = 1
    index_score_type: str = "max"  # or "lse"
    num_mtp_modules: int = 0
    initializer_range: float = 0.02
    tie_word_embeddings: bool = False
    router_aux_loss_coef: float = 0.0
    bos_token_id: int | None = None
    eos_token_id: int | tuple[int, ...] | None = None
    pad_token_id: int | None = None
    torch_dtype: str | None = None
    model_type: str = TEXT_MODEL_TYPES[0]
    quantization_config: Mapping[str, Any] | None = field(default=None, hash=False)
    extra: Mapping[str, Any] = _bookkeeping()  # unknown fields, written back
    sparse_extra: Mapping[str, Any] = _bookkeeping()  # the same inside sparse_attention_config
    # Values read in another spelling than the one written: name -> (as written, as read).
    as_read: Mapping[str, tuple[Any, Any]] = _bookkeeping(compare=False)

    def __post_init__(self) -> None:
        if isinstance(self.eos_token_id, list):
            object.__setattr__(self, "eos_token_id", tuple(self.eos_token_id))
        sizes = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
        _check_fields(self, "", (*sizes, "head_dim", "rotary_dim", "rope_theta", "max_position_embeddings"))
        for name, kinds, default in (
            ("layer_types", (FULL_ATTENTION, SPARSE_ATTENTION), FULL_ATTENTION),
            ("mlp_layer_types", (DENSE_MLP, MOE_MLP), MOE_MLP),
        ):
            given = getattr(self, name) or (default,) * self.num_hidden_layers
            object.__setattr__(self, name, require_per_layer(name, given, self.num_hidden_layers))
            for i, kind in enumerate(given):
                require_one_of(f"{name}[{i}]", kind, kinds)
        require_one_of("text model_type", self.model_type, TEXT_MODEL_TYPES)
        require_one_of("scoring_func", self.scoring_func, ("sigmoid", "softmax"))
        require_one_of("index_score_type", self.index_score_type, ("max", "lse"))
        require_one_of("n_shared_experts", self.n_shared_experts, (0, 1))
        require_one_of("torch_dtype", self.torch_dtype, (None, *DTYPE_NAMES))
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads {self.num_attention_heads} is not a multiple of "
                f"num_key_value_heads {self.num_key_value_heads}"
            )
        if self.rotary_dim % 2 or self.rotary_dim > self.head_dim:
            raise ValueError(f"rotary_dim {self.rotary_dim} must be even and at most head_dim {self.head_dim}")
        if DENSE_MLP in self.mlp_layer_types:
            _check_fields(self, "", ("dense_intermediate_size",))
        if MOE_MLP in self.mlp_layer_types:
            shared = ("shared_intermediate_size",) if self.n_shared_experts else ()
            _check_fields(self, "", ("intermediate_size", "num_local_experts", "num_experts_per_tok", *shared))
            if self.num_experts_per_tok > self.num_local_experts:
                raise ValueError(
                    f"num_experts_per_tok {self.num_experts_per_tok} exceeds num_local_experts {self.num_local_experts}"
                )
        if SPARSE_ATTENTION in self.layer_types:
            self._check_indexer()

    def _check_indexer(self) -> None:
        sizes = ("index_n_heads", "index_head_dim", "index_block_size", "index_topk_blocks", "index_local_blocks")
        _check_fields(self, "", sizes)
        if self.index_n_heads != self.num_key_value_heads:
            raise ValueError(
                f"index_n_heads {self.index_n_heads} differs from num_key_value_heads {self.num_key_value_heads}: "
                "one index head chooses the blocks of one KV head"
            )
        if self.index_head_dim < self.rotary_dim:
            raise ValueError(
                f"index_head_dim {self.index_head_dim} is smaller than rotary_dim {self.rotary_dim}, "
                "by which index heads are rotated too"
            )
        forced = self.index_init_blocks + self.index_local_blocks
        if forced > self.index_topk_blocks:
            raise ValueError(
                f"index_init_blocks {self.index_init_blocks} + index_local_blocks {self.index_local_blocks} = {forced} "
                f"forced blocks exceed the budget index_topk_blocks {self.index_topk_blocks}"
            )

    def is_sparse_attention_layer(self, layer_idx: int) -> bool:
        """Whether layer `layer_idx` has a lightning indexer and attends to selected blocks only."""
        return self.layer_types[layer_idx] == SPARSE_ATTENTION

    def is_moe_layer(self, layer_idx: int) -> bool:
        """Whether layer `layer_idx` has routed experts in the place of one dense MLP."""
        return self.mlp_layer_types[layer_idx] == MOE_MLP

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> Self:
        """Reads a flat config or `text_config` of either dialect.

        Raises `ValueError` naming a field that is missing, disagrees with another or cannot be honoured.
        """
        reader = FieldReader(raw, "text_config")
        reader.check_fixed(_TEXT_FIXED)
        for name in _TEXT_WRITTEN:
            reader.take(name)
        values = read_layer_kinds(reader)
        required = ["vocab_size", "hidden_size", "num_attention_heads", "num_key_value_heads", "head_dim"]
        required.append("max_position_embeddings")
        if MOE_MLP in (values["mlp_layer_types"] or (MOE_MLP,)):
            required += ["intermediate_size", "num_local_experts", "num_experts_per_tok"]
            required += ["shared_intermediate_size"] if raw.get("n_shared_experts") != 0 else []
        if DENSE_MLP in values["mlp_layer_types"]:
            required.append("dense_intermediate_size")
        values |= {name: reader.take_int(name) for name in required}
        values |= read_rope(reader, values["head_dim"])
        values |= {name: reader.take_token_id(name) for name in ("bos_token_id", "pad_token_id")}
        values["eos_token_id"] = reader.take_token_ids("eos_token_id")
        values["torch_dtype"] = reader.take_dtype()
        values["quantization_config"] = reader.take_mapping("quantization_config")
        for f in dataclasses.fields(cls):  # the optional scalars, which both dialects call by the same name
            if f.name not in values and isinstance(f.default, (bool, int, float, str)) and f.name not in SPARSE_FIELDS:
                values[f.name] = reader.take_like(f.name, f.default)
        return cls(**values, extra=reader.rest())

    def to_dict(self) -> dict[str, Any]:
        """The released dialect, flat: a `text_config`, or the config.json of a text-only model."""
        out: dict[str, Any] = dict(self.extra) | _TEXT_WRITTEN
        for f in dataclasses.fields(self):
            if f.name not in _NOT_WRITTEN and f.name not in SPARSE_FIELDS:
                out[f.name] = getattr(self, f.name)
        if isinstance(self.eos_token_id, tuple):
            out["eos_token_id"] = list(self.eos_token_id)
        out["partial_rotary_factor"] = self.rotary_dim / self.head_dim
        out["moe_layer_freq"] = [int(kind == MOE_MLP) for kind in self.mlp_layer_types]
        sparse = self._sparse_attention_dict()
        if sparse is not None:
            out["sparse_attention_config"] = sparse
        for name in ("torch_dtype", "quantization_config"):
            if getattr(self, name) is not None:
                out[name] = getattr(self, name)
        return copy.deepcopy(self._as_read(out))

    def _sparse_attention_dict(self) -> dict[str, Any] | None:
        freq = [int(kind == SPARSE_ATTENTION) for kind in self.layer_types]
        untouched = all(getattr(self, f.name) == f.default for f in dataclasses.fields(self) if f.name in SPARSE_FIELDS)
        if not any(freq) and untouched and not self.sparse_extra:
            return None
        fields = {theirs: getattr(self, ours) for ours, theirs in SPARSE_FIELDS.items()}
        if not any(freq):  # a size of 0 was never given: there is no sparse layer
            fields = {name: value for name, value in fields.items() if value != 0 or name == "sparse_init_block"}
        fields["use_sparse_attention"] = any(freq)
        fields["sparse_attention_freq"] = freq
        fields["sparse_disable_index_value"] = freq
        return self._as_read(dict(self.sparse_extra) | fields)

    def _as_read(self, out: dict[str, Any]) -> dict[str, Any]:
        """Restores the spelling of values that still mean what they meant when they were read."""
        spellings = {name: theirs for name, (ours, theirs) in self.as_read.items() if out.get(name) == ours}
        return out | {name: theirs for name, theirs in spellings.items() if name in out}


_NOT_WRITTEN = {"layer_types", "mlp_layer_types", "torch_dtype", "quantization_config"}
_NOT_WRITTEN |= {"extra", "sparse_extra", "as_read", "compression_extra"}


@dataclass(frozen=True, kw_only=True)
class MiniMaxM3VLVisionConfig:
    """The vision tower: a CLIP-like encoder on flattened patches, with RoPE over time, height and width."""

    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    intermediate_size: int
    patch_size: int = 14  # pixels
    temporal_patch_size: int = 2  # frames
    spatial_merge_size: int = 2  # patches a side that become one text token
    num_channels: int = 3
    rope_theta: float = 1e4
    layer_norm_eps: float = 1e-5
    image_size: int = 2016  # pixels; informative, positions are computed for any size
    vision_segment_max_frames: int = 4  # temporal patches that attend to each other
    initializer_range: float = 0.02
    model_type: str = VISION_MODEL_TYPES[0]
    extra: Mapping[str, Any] = _bookkeeping()
    compression_extra: Mapping[str, Any] = _bookkeeping()  # unknown fields of img_token_compression_config

    def __post_init__(self) -> None:
        sizes = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "patch_size")
        merge = ("temporal_patch_size", "spatial_merge_size", "num_channels", "rope_theta")
        _check_fields(self, "vision_config: ", (*sizes, *merge, "vision_segment_max_frames"))
        require_one_of("vision_config: model_type", self.model_type, VISION_MODEL_TYPES)
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"vision_config: hidden_size {self.hidden_size} is not a multiple of "
                f"num_attention_heads {self.num_attention_heads}"
            )
        if self.head_dim < 6:
            raise ValueError(
                f"vision_config: hidden_size {self.hidden_size} / num_attention_heads {self.num_attention_heads} gives "
                f"heads of {self.head_dim} channels; RoPE needs at least 6, two for each axis"
            )

    @property
    def head_dim(self) -> int:
        """Channels of one attention head."""
        return self.hidden_size // self.num_attention_heads

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> Self:
        """Reads either dialect; errors as for `MiniMaxM3VLTextConfig.from_dict`."""
        reader = FieldReader(raw, "vision_config")
        reader.check_fixed(_VISION_FIXED)
        nested = "img_token_compression_config"
        compression = FieldReader(reader.take_mapping(nested) or {}, f"vision_config: {nested}")
        compression.check_fixed({"image_token_compression_method": ("patch_merge",)})
        parameters = reader.take_rope_parameters(("axial", "default"))
        theta = reader.take_agreeing("rope_theta", parameters.get("rope_theta"), "rope_parameters.rope_theta")
        merge = reader.take_agreeing("spatial_merge_size", compression.take("spatial_merge_size"), nested)
        temporal = reader.take_agreeing("temporal_patch_size", compression.take("temporal_patch_size"), nested)
        found = {"rope_theta": theta, "spatial_merge_size": merge, "temporal_patch_size": temporal}
        values = {name: value for name, value in found.items() if value is not None}
        for f in dataclasses.fields(cls):
            if f.name not in found and f.name not in ("extra", "compression_extra"):
                required = f.default is dataclasses.MISSING
                values[f.name] = reader.take_int(f.name) if required else reader.take_like(f.name, f.default)
        return cls(**values, extra=reader.rest(), compression_extra=compression.rest())

    def to_dict(self) -> dict[str, Any]:
        """The released dialect; merge sizes are also written flat, where transformers looks for them."""
        out = {"hidden_act": "gelu"} | dict(self.extra)
        out |= {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name not in _NOT_WRITTEN}
        merge = {name: out[name] for name in ("spatial_merge_size", "temporal_patch_size")}
        out["img_token_compression_config"] = dict(self.compression_extra) | merge
        return copy.deepcopy(out)


@dataclass(frozen=True, kw_only=True)
class MiniMaxM3VLConfig:
    """The whole model. `vision_config` is None for a model that only reads text."""

    text_config: MiniMaxM3VLTextConfig
    vision_config: MiniMaxM3VLVisionConfig | None = None
    image_token_index: int = 200025
    video_token_index: int = 200026
    projector_hidden_size: int = 6144
    tie_word_embeddings: bool = False
    torch_dtype: str | None = None
    quantization_config: Mapping[str, Any] | None = field(default=None, hash=False)
    extra: Mapping[str, Any] = _bookkeeping()

    def __post_init__(self) -> None:
        _check_fields(self, "", ("projector_hidden_size",))
        require_one_of("torch_dtype", self.torch_dtype, (None, *DTYPE_NAMES))
        # Either level may say so: transformers writes the text level's default, False, under a top-level True.
        tied = self.tie_word_embeddings or self.text_config.tie_word_embeddings
        object.__setattr__(self, "tie_word_embeddings", tied)
        if tied != self.text_config.tie_word_embeddings:
            object.__setattr__(self, "text_config", dataclasses.replace(self.text_config, tie_word_embeddings=tied))
        if self.image_token_index == self.video_token_index:
            raise ValueError(
                f"image_token_index {self.image_token_index} equals video_token_index {self.video_token_index}"
            )
        merged = self.extra.get("merged_hidden_size")
        if merged is not None and self.vision_config is not None:
            hidden, merge = self.text_config.hidden_size, self.vision_config.spatial_merge_size
            require_one_of("merged_hidden_size (text hidden_size * merge size squared)", merged, (hidden * merge**2,))

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> Self:
        """Reads the nested config.json of either dialect. A flat one is read by `MiniMaxM3VLTextConfig.from_dict`."""
        reader = FieldReader(raw, "config")
        if "text_config" not in raw and "hidden_size" in raw:
            raise ValueError(
                "config: 'text_config' is missing; a flat text-only config is read by load_config or "
                "MiniMaxM3VLTextConfig.from_dict"
            )
        reader.check_fixed(_TOP_FIXED)
        reader.require("text_config")
        values: dict[str, Any] = {
            "text_config": MiniMaxM3VLTextConfig.from_dict(reader.take_mapping("text_config") or {}),
            "torch_dtype": reader.take_dtype(),
            "quantization_config": reader.take_mapping("quantization_config"),
        }
        tokens = {
            name: reader.take_agreeing(name, reader.take(name.replace("_index", "_id")), name.replace("_index", "_id"))
            for name in ("image_token_index", "video_token_index")
        }
        if "vision_config" not in raw or raw["vision_config"] is not None:  # an explicit null: a model without eyes
            reader.require("vision_config", "projector_hidden_size")
            FieldReader(tokens, "config").require(*tokens)
            values["vision_config"] = MiniMaxM3VLVisionConfig.from_dict(reader.take_mapping("vision_config") or {})
        values |= {name: value for name, value in tokens.items() if value is not None}
        values["projector_hidden_size"] = reader.take_like("projector_hidden_size", 6144)
        values["tie_word_embeddings"] = reader.take_like("tie_word_embeddings", False)
        for name in ("architectures", "model_type", "vision_config"):
            reader.take(name)
        return cls(**values, extra=reader.rest())

    @classmethod
    def from_pretrained(cls, path: str | Path) -> Self:
        """Reads `config.json` of a local checkpoint folder."""
        return cls.from_dict(read_config_dict(path))

    def to_dict(self) -> dict[str, Any]:
        """The released dialect, ready for JSON."""
        out: dict[str, Any] = dict(self.extra)
        for f in dataclasses.fields(self):
            if f.name not in _NOT_WRITTEN:
                out[f.name] = getattr(self, f.name)
        out["architectures"] = ["MiniMaxM3SparseForConditionalGeneration"]
        out["model_type"] = MODEL_TYPE
        out["text_config"] = self.text_config.to_dict()
        out["vision_config"] = None if self.vision_config is None else self.vision_config.to_dict()
        for name in ("torch_dtype", "quantization_config"):
            if getattr(self, name) is not None:
                out[name] = getattr(self, name)
        return copy.deepcopy(out)

    def save_pretrained(self, path: str | Path) -> None:
        """Writes `config.json` into the folder, creating it."""
        folder = Path(path)
        folder.mkdir(parents=True, exist_ok=True)
        write_config_dict(folder, self.to_dict())


def write_config_dict(folder: Path, config: Mapping[str, Any]) -> None:
    """Writes `config.json` into an existing folder."""
    (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def read_config_dict(path: str | Path) -> dict[str, Any]:
    """The raw `config.json` of a checkpoint folder. Raises `ValueError` naming the file that is missing or broken."""
    file = Path(path) / "config.json"
    if not file.is_file():
        raise ValueError(f"{file} does not exist: a checkpoint folder holds config.json beside its safetensors files")
    try:
        raw = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is not valid JSON: {error}") from error
    if not isinstance(raw, dict):
        raise ValueError(f"{file} holds a {type(raw).__name__}; expected an object")
    return raw


def config_from_dict(raw: Mapping[str, Any]) -> MiniMaxM3VLConfig | MiniMaxM3VLTextConfig:
    """Either kind of config: nested where there is a `text_config`, flat otherwise."""
    return MiniMaxM3VLConfig.from_dict(raw) if "text_config" in raw else MiniMaxM3VLTextConfig.from_dict(raw)


def load_config(path: str | Path) -> MiniMaxM3VLConfig | MiniMaxM3VLTextConfig:
    """The config of a local checkpoint folder. Raises `ValueError` naming the file and the field at fault."""
    raw = read_config_dict(path)
    try:
        return config_from_dict(raw)
    except ValueError as error:
        raise ValueError(f"{Path(path) / 'config.json'}: {error}") from error
