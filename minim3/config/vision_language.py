"""The config of the whole model, and configs of either kind from a checkpoint folder."""

import copy
import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from minim3.config.files import read_config_dict, write_config_dict
from minim3.config.reader import DTYPE_NAMES, NOT_WRITTEN, FieldReader, bookkeeping, check_fields, require_one_of
from minim3.config.text import MiniMaxM3VLTextConfig
from minim3.config.vision import MiniMaxM3VLVisionConfig

MODEL_TYPE = "minimax_m3_vl"

# Fields that may be present with one meaning only: the one the model has.
_TOP_FIXED: dict[str, tuple[Any, ...]] = {
    "model_type": (MODEL_TYPE,),
    "projector_hidden_act": ("gelu",),
    "multimodal_projector_bias": (True,),
    "patch_merge_bias": (True,),
    "vision_feature_layer": (-1,),
    "vision_feature_select_strategy": ("full",),
}


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
    extra: Mapping[str, Any] = bookkeeping()

    def __post_init__(self) -> None:
        check_fields(self, "", ("projector_hidden_size",))
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
            if f.name not in NOT_WRITTEN:
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
