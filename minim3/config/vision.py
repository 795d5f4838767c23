"""The config of the vision tower."""

import copy
import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

from minim3.config.reader import NOT_WRITTEN, FieldReader, bookkeeping, check_fields, require_one_of

VISION_MODEL_TYPES = ("minimax_m3_vl_vision", "minimax_m3_vision", "clip_vision_model")

# Fields that may be present with one meaning only: the one the model has.
_VISION_FIXED: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("gelu",),
    "attention_dropout": (0.0,),
    "position_embedding_type": ("rope",),
    "rope_mode": ("3d",),
    "rope_scaling": (None,),
}


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
    extra: Mapping[str, Any] = bookkeeping()
    compression_extra: Mapping[str, Any] = bookkeeping()  # unknown fields of img_token_compression_config

    def __post_init__(self) -> None:
        sizes = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "patch_size")
        merge = ("temporal_patch_size", "spatial_merge_size", "num_channels", "rope_theta")
        check_fields(self, "vision_config: ", (*sizes, *merge, "vision_segment_max_frames"))
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
        out |= {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name not in NOT_WRITTEN}
        merge = {name: out[name] for name in ("spatial_merge_size", "temporal_patch_size")}
        out["img_token_compression_config"] = dict(self.compression_extra) | merge
        return copy.deepcopy(out)
