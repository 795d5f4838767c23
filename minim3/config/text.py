"""The config of the text backbone."""

import copy
import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Self

from minim3.config.reader import (
    DENSE_MLP,
    DTYPE_NAMES,
    FULL_ATTENTION,
    MOE_MLP,
    NOT_WRITTEN,
    SPARSE_ATTENTION,
    SPARSE_FIELDS,
    FieldReader,
    bookkeeping,
    check_fields,
    read_layer_kinds,
    read_rope,
    require_one_of,
    require_per_layer,
)

TEXT_MODEL_TYPES = ("minimax_m3_vl_text", "minimax_m3", "minimax_m2")

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
    extra: Mapping[str, Any] = bookkeeping()  # unknown fields, written back
    sparse_extra: Mapping[str, Any] = bookkeeping()  # the same inside sparse_attention_config
    # Values read in another spelling than the one written: name -> (as written, as read).
    as_read: Mapping[str, tuple[Any, Any]] = bookkeeping(compare=False)

    def __post_init__(self) -> None:
        if isinstance(self.eos_token_id, list):
            object.__setattr__(self, "eos_token_id", tuple(self.eos_token_id))
        sizes = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
        check_fields(self, "", (*sizes, "head_dim", "rotary_dim", "rope_theta", "max_position_embeddings"))
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
            check_fields(self, "", ("dense_intermediate_size",))
        if MOE_MLP in self.mlp_layer_types:
            shared = ("shared_intermediate_size",) if self.n_shared_experts else ()
            check_fields(self, "", ("intermediate_size", "num_local_experts", "num_experts_per_tok", *shared))
            if self.num_experts_per_tok > self.num_local_experts:
                raise ValueError(
                    f"num_experts_per_tok {self.num_experts_per_tok} exceeds num_local_experts {self.num_local_experts}"
                )
        if SPARSE_ATTENTION in self.layer_types:
            self._check_indexer()

    def _check_indexer(self) -> None:
        sizes = ("index_n_heads", "index_head_dim", "index_block_size", "index_topk_blocks", "index_local_blocks")
        check_fields(self, "", sizes)
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
            if f.name not in NOT_WRITTEN and f.name not in SPARSE_FIELDS:
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
