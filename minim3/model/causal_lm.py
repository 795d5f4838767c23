"""The two model classes: `MiniMaxM3SparseForCausalLM`, and `MiniMaxM3SparseForConditionalGeneration` with vision."""

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn

from minim3 import checkpoint
from minim3.config import MiniMaxM3VLConfig, MiniMaxM3VLTextConfig, config_from_dict
from minim3.model.adapter import adapted_modules
from minim3.model.attention import MiniMaxM3Attention
from minim3.model.batch import ForwardBatch, ForwardRecord
from minim3.model.decoder import MiniMaxM3TextModel, check_vocabulary, embed_inputs, initialize
from minim3.model.layers import MiniMaxM3MLP, MiniMaxM3RMSNorm
from minim3.model.moe import MoEConfig
from minim3.model.multimodal import VisionLanguage, splice_features
from minim3.model.outputs import MiniMaxM3CausalLMOutput, load_balancing_loss, next_token_loss, packed_targets
from minim3.model.padding import PaddedLayout
from minim3.model.quantization import Quantization, prepare

__all__ = ["MiniMaxM3SparseForCausalLM", "MiniMaxM3SparseForConditionalGeneration", "splice_features"]


class CausalLM(nn.Module):
    """What both model classes share: construction, loading, saving, the padded forward call, `generate`."""

    config: Any
    generation_config: Mapping[str, Any] | None = None
    quantization: Quantization | None = None

    @property
    @abstractmethod
    def text_model(self) -> MiniMaxM3TextModel: ...

    @property
    def text_config(self) -> MiniMaxM3VLTextConfig:
        return self.text_model.config

    @property
    def device(self) -> torch.device:
        return self.text_model.embed_tokens.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.text_model.embed_tokens.weight.dtype

    # Construction, loading, saving

    @classmethod
    def from_config(
        cls,
        config: Any,
        moe_config: MoEConfig | None = None,
        backend: str | None = None,
        *,
        dtype: torch.dtype = torch.float32,
    ) -> Self:
        """A model with fresh random weights of `dtype` (the router stays fp32), drawn from torch's global generator.

        config: a config object, or the dict of a `config.json` in either dialect.
        """
        if isinstance(config, Mapping):
            config = config_from_dict(config)
        return cls(cls.config_of(config, "the config given"), moe_config, backend).cast(dtype)

    @classmethod
    @abstractmethod
    def config_of(cls, config: MiniMaxM3VLConfig | MiniMaxM3VLTextConfig, source: str) -> Any:
        """The part of a checkpoint's config that this class takes. Raises ValueError when there is none."""

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        *,
        dtype: torch.dtype | str | None = None,
        device: torch.device | str | None = None,
        backend: str | None = None,
        quantization: str | Quantization | None = None,
        adapter: str | Path | None = None,
    ) -> Self:
        """Load a checkpoint folder or hub id, in evaluation mode.

        dtype: of the weights, or its name; None or "auto" keeps the one that the config names (fp32 where it names
        none). The router and its correction bias stay fp32. MTP modules are built only if the checkpoint holds their
        tensors. quantization: "int8", "int4" or "mxfp8" holds the weights of projections and experts so, quantized one
        tensor at a time as they are read: for inference, see `minim3.model.quantization`. adapter: a LoRA folder in
        PEFT's format, merged into the weights as they are read, before they are quantized; `minim3.model.adapter` puts
        one beside the weights instead.
        """
        weights_as = weight_dtype(dtype)
        folder = checkpoint.resolve_checkpoint(path)
        merged = None if adapter is None else checkpoint.read_adapter(adapter)
        config = cls.config_of(checkpoint.read_config(folder), str(path))
        config = with_mtp_modules(config, checkpoint.num_mtp_modules_in(folder))
        if weights_as is None:
            weights_as = weight_dtype(config.torch_dtype or "float32") or torch.float32
        device = torch.device(device or "cpu")
        with torch.device("meta"):
            model = cls(config, None, backend)
        sinks = {}
        if quantization is not None:
            model.quantization = Quantization.of(quantization)
            model.quantization.check_available(device, weights_as)
            sinks = prepare(model, model.quantization, checkpoint.mxfp8_parameters(folder))
        checkpoint.load_into(
            model, folder, dtype=weights_as, device=device, text_only=cls.is_text_only(), sinks=sinks, adapter=merged
        )
        model.generation_config = checkpoint.read_generation_config(folder)
        return model.eval()

    @classmethod
    @abstractmethod
    def is_text_only(cls) -> bool: ...

    def save_pretrained(
        self, path: str | Path, *, format: str | None = None, max_shard_bytes: int | None = None
    ) -> None:
        """Write config and weights in the released layout.

        format: "bf16", "fp32", "mxfp8", or None for the model's own dtype. A quantized model is refused: what it was
        made from is in its checkpoint. So is one that carries an adapter, which has a place of its own on disk.
        """
        if any(True for _ in adapted_modules(self)):
            raise ValueError(
                "this model carries an adapter: save that by minim3.model.adapter.save_adapter, or merge it into the "
                "weights first (merge_adapter)"
            )
        if self.quantization is not None:
            raise ValueError(
                f"this model holds {self.quantization.format} weights, made from a checkpoint when it was loaded: save "
                "one that was loaded without quantization, or write another format of the checkpoint by minim3 convert"
            )
        checkpoint.write_checkpoint(self, path, format=format, max_shard_bytes=max_shard_bytes)

    @torch.no_grad()
    def initialize_weights(
        self, buffer_device: torch.device | None = None, dtype: torch.dtype = torch.bfloat16
    ) -> None:
        """Draw fresh weights, cast to `dtype`. `buffer_device` is unused: there are no derived buffers."""
        initialize(self, self.text_config.initializer_range)
        self.cast(dtype)

    def cast(self, dtype: torch.dtype) -> Self:
        """Cast the weights, as `to(dtype)` does: the router and its correction bias stay fp32 below fp64."""
        return self.to(dtype)

    def _finish_construction(self) -> None:
        head, embedding = self.get_output_embeddings(), self.get_input_embeddings()
        if self.text_config.tie_word_embeddings:
            head.weight = embedding.weight
        if embedding.weight.device.type != "meta":
            initialize(self, self.text_config.initializer_range)

    def get_input_embeddings(self) -> nn.Module:
        return self.text_model.embed_tokens

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        self.text_model.embed_tokens = value

    @abstractmethod
    def get_output_embeddings(self) -> nn.Module: ...

    @abstractmethod
    def set_output_embeddings(self, value: nn.Linear) -> None: ...

    # Running

    def embed_tokens_packed(self, input_ids: Tensor) -> Tensor:
        """Ids `[T]` -> `[T, H]`."""
        return self.text_model.embed_tokens(input_ids)

    embed_input_ids = embed_tokens_packed

    def compute_logits(self, hidden_states: Tensor) -> Tensor:
        """Final hidden states `[..., H]` -> logits `[..., vocab]`."""
        return self.get_output_embeddings()(hidden_states)

    def pack_for_inference(self) -> None:
        """Let projections of one input share a weight, and prepare norms: same parameters, fewer operations a token.

        See `minim3.model.layers` and `MiniMaxM3Attention.pack_for_inference`.
        """
        for module in self.modules():
            if isinstance(module, (MiniMaxM3Attention, MiniMaxM3MLP, MiniMaxM3RMSNorm)):
                module.pack_for_inference()

    def generate(self, input_ids: Tensor | None = None, **options: Any) -> Any:
        """Continue `[B, S]` ids: see `minim3.inference.generate.generate` for every option."""
        from minim3.inference.generate import generate  # the one import upward: inference stands on the model

        return generate(self, input_ids=input_ids, **options)

    def _forward_packed(
        self,
        embeds: Tensor,
        layout: PaddedLayout,
        batch: ForwardBatch,
        input_ids: Tensor | None,
        labels: Tensor | None,
        logits_to_keep: int | Tensor,
        output_hidden_states: bool,
        output_router_logits: bool,
        output_mtp_logits: bool | None,
        output_indexer_kl: bool,
    ) -> MiniMaxM3CausalLMOutput:
        """The forward call after embedding: packed embeddings `[T, H]` and ids `[T]` in, padded outputs out."""
        record = ForwardRecord(
            hidden_states=[] if output_hidden_states else None,
            padded=(layout.unpack, layout.pack),
            router_logits=[] if output_router_logits else None,
            indexer_kl=[] if output_indexer_kl else None,
        )
        hidden = self.text_model.forward_packed(embeds, batch, record)
        kept = layout.unpack(hidden)
        if isinstance(logits_to_keep, Tensor):
            kept = kept[:, logits_to_keep]
        elif logits_to_keep:
            kept = kept[:, -logits_to_keep:]
        output = MiniMaxM3CausalLMOutput(logits=self.compute_logits(kept))
        if labels is not None:
            output.loss = next_token_loss(hidden, packed_targets(labels, layout), self.get_output_embeddings())
        if record.hidden_states is not None:
            output.hidden_states = tuple(record.hidden_states)
        if record.indexer_kl is not None:
            output.indexer_kl = tuple(record.indexer_kl)
        if record.router_logits:
            config = self.text_config
            output.router_logits = tuple(layout.unpack(logits).flatten(0, 1) for logits in record.router_logits)
            output.aux_loss = load_balancing_loss(
                record.router_logits, config.num_local_experts, config.num_experts_per_tok
            )
        mtp = self.text_model.mtp
        if output_mtp_logits and mtp is None:
            raise ValueError("output_mtp_logits was asked for, but this model has no MTP modules")
        if mtp is not None and (self.training if output_mtp_logits is None else output_mtp_logits):
            if input_ids is None:
                if output_mtp_logits:
                    raise ValueError("MTP embeds the next token: pass input_ids, inputs_embeds are not enough")
                return output
            of_drafts = ForwardRecord(indexer_kl=record.indexer_kl)
            depths = mtp.forward_packed(hidden, input_ids, self.text_model.embed_tokens, batch, of_drafts)
            output.mtp_per_depth_logits = [layout.unpack(self.compute_logits(depth)) for depth in depths]
            if record.indexer_kl is not None:
                output.indexer_kl = tuple(record.indexer_kl)
        return output


def weight_dtype(dtype: torch.dtype | str | None) -> torch.dtype | None:
    """A dtype that weights can have, from itself or its name; None for None and "auto"."""
    if dtype is None or dtype == "auto":
        return None
    found = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if found not in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        raise ValueError(f"dtype is {dtype!r}; weights are float32, bfloat16, float16 or float64")
    return found


def refuse_cache(past_key_values: Any, use_cache: bool | None) -> None:
    """transformers' cache arguments have no meaning here; None and False pass."""
    if past_key_values is not None or use_cache:
        raise ValueError(
            "past_key_values and use_cache are not taken: the cache lives in the engine; call model.generate(...), "
            "or minim3.inference.engine.Engine to drive it step by step"
        )


def with_mtp_modules(config: Any, present: int) -> Any:
    """`config` with as many MTP modules as the checkpoint holds tensors for: configs announce more than is released."""
    text = config if isinstance(config, MiniMaxM3VLTextConfig) else config.text_config
    if present > text.num_mtp_modules:
        raise ValueError(f"the checkpoint holds {present} MTP modules, its config names {text.num_mtp_modules}")
    if present == text.num_mtp_modules:
        return config
    text = replace(text, num_mtp_modules=present)
    return text if isinstance(config, MiniMaxM3VLTextConfig) else replace(config, text_config=text)


class MiniMaxM3SparseForCausalLM(CausalLM):
    """The text model with its head."""

    def __init__(
        self, config: MiniMaxM3VLTextConfig, moe_config: MoEConfig | None = None, backend: str | None = None
    ) -> None:
        super().__init__()
        self.config = config
        self.model = MiniMaxM3TextModel(config, backend, moe_config=moe_config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self._finish_construction()

    @property
    def text_model(self) -> MiniMaxM3TextModel:
        return self.model

    @classmethod
    def config_of(cls, config: MiniMaxM3VLConfig | MiniMaxM3VLTextConfig, source: str) -> MiniMaxM3VLTextConfig:
        return config.text_config if isinstance(config, MiniMaxM3VLConfig) else config

    @classmethod
    def is_text_only(cls) -> bool:
        return True

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def set_output_embeddings(self, value: nn.Linear) -> None:
        self.lm_head = value

    def forward(
        self,
        input_ids: Tensor | None = None,
        *,
        position_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        padding_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        logits_to_keep: int | Tensor = 0,
        output_hidden_states: bool = False,
        output_router_logits: bool = False,
        output_mtp_logits: bool | None = None,
        output_indexer_kl: bool = False,
        past_key_values: None = None,
        use_cache: bool | None = None,
    ) -> MiniMaxM3CausalLMOutput:
        """Ids `[B, S]` (or embeddings `[B, S, H]`) -> logits and whatever else is asked for.

        attention_mask: `[B, S]`, nonzero at tokens; padding on either side, no holes. padding_mask: its opposite.
        position_ids: `[B, S]`, rotary positions; 0, 1, ... from the first token of each row by default.
        labels: `[B, S]` ids, -100 where there is no target; the shift by one is done here.
        logits_to_keep: compute logits of the last so many columns only (0: all), or of the columns of an index tensor.
        output_mtp_logits: None means in training mode.
        """
        refuse_cache(past_key_values, use_cache)
        embeds = embed_inputs(self.model.embed_tokens, input_ids, inputs_embeds)
        layout = PaddedLayout.from_masks(embeds.shape[0], embeds.shape[1], attention_mask, padding_mask)
        return self._forward_packed(
            layout.pack(embeds), layout, layout.batch(embeds.device, position_ids),
            None if input_ids is None else layout.pack(input_ids),
            labels, logits_to_keep, output_hidden_states, output_router_logits, output_mtp_logits, output_indexer_kl,
        )  # fmt: skip


class MiniMaxM3SparseForConditionalGeneration(CausalLM, VisionLanguage):
    """The whole model: text, with pictures and videos in the place of placeholder tokens."""

    def __init__(
        self, config: MiniMaxM3VLConfig, moe_config: MoEConfig | None = None, backend: str | None = None
    ) -> None:
        super().__init__()
        self._build_vision(config, backend)
        self.language_model = MiniMaxM3SparseForCausalLM(config.text_config, moe_config, backend)
        self._finish_construction()

    @property
    def text_model(self) -> MiniMaxM3TextModel:
        return self.language_model.model

    @property
    def lm_head(self) -> nn.Module:
        return self.language_model.lm_head

    @classmethod
    def config_of(cls, config: MiniMaxM3VLConfig | MiniMaxM3VLTextConfig, source: str) -> MiniMaxM3VLConfig:
        if isinstance(config, MiniMaxM3VLTextConfig) or config.vision_config is None:
            raise ValueError(f"{source} has no vision part: use MiniMaxM3SparseForCausalLM or minim3.load")
        return config

    @classmethod
    def is_text_only(cls) -> bool:
        return False

    def get_output_embeddings(self) -> nn.Module:
        return self.language_model.lm_head

    def set_output_embeddings(self, value: nn.Linear) -> None:
        self.language_model.lm_head = value

    def forward(
        self,
        input_ids: Tensor | None = None,
        *,
        pixel_values: Tensor | None = None,
        image_grid_thw: Tensor | None = None,
        pixel_values_videos: Tensor | None = None,
        video_grid_thw: Tensor | None = None,
        position_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        padding_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        logits_to_keep: int | Tensor = 0,
        output_hidden_states: bool = False,
        output_router_logits: bool = False,
        output_mtp_logits: bool | None = None,
        output_indexer_kl: bool = False,
        past_key_values: None = None,
        use_cache: bool | None = None,
    ) -> MiniMaxM3CausalLMOutput:
        """As `MiniMaxM3SparseForCausalLM.forward`, with media.

        pixel_values: fp32 patches `[N, C * T * P * P]` of all pictures of the batch, row by row, in prompt order;
        image_grid_thw: int64 `[pictures, 3]`. pixel_values_videos, video_grid_thw: the same, a grid row a chunk.
        Raises ValueError when placeholder tokens and features differ in number, with both counts.
        """
        refuse_cache(past_key_values, use_cache)
        media = (pixel_values, image_grid_thw, pixel_values_videos, video_grid_thw)
        if inputs_embeds is not None:
            if any(tensor is not None for tensor in media):
                raise ValueError("pictures and videos replace placeholder tokens: pass input_ids, not inputs_embeds")
            return self.language_model(
                input_ids, position_ids=position_ids, attention_mask=attention_mask, padding_mask=padding_mask,
                inputs_embeds=inputs_embeds, labels=labels, logits_to_keep=logits_to_keep,
                output_hidden_states=output_hidden_states, output_router_logits=output_router_logits,
                output_mtp_logits=output_mtp_logits, output_indexer_kl=output_indexer_kl,
            )  # fmt: skip
        if input_ids is None or input_ids.dim() != 2:
            raise ValueError("pass input_ids [batch, sequence] or inputs_embeds [batch, sequence, hidden]")
        layout = PaddedLayout.from_masks(input_ids.shape[0], input_ids.shape[1], attention_mask, padding_mask)
        ids = layout.pack(input_ids)
        check_vocabulary(ids, self.get_input_embeddings())
        embeds, images, videos = self._embed(ids, *media)
        output = self._forward_packed(
            embeds, layout, layout.batch(ids.device, position_ids), ids, labels, logits_to_keep,
            output_hidden_states, output_router_logits, output_mtp_logits, output_indexer_kl,
        )  # fmt: skip
        output.image_hidden_states, output.video_hidden_states = images, videos
        return output
