"""The decoder: pre-norm blocks of attention and a dense or mixture-of-experts MLP, and the text model around them."""

from typing import Any

import torch
from torch import Tensor, nn

from minim3.config import MiniMaxM3VLTextConfig
from minim3.model.attention import MiniMaxM3Attention
from minim3.model.batch import ForwardBatch, ForwardRecord
from minim3.model.layers import MiniMaxM3MLP, MiniMaxM3RMSNorm, rotary_table
from minim3.model.moe import MiniMaxM3MoE, MoEConfig
from minim3.model.padding import PaddedLayout, run_packed


class Block(nn.Module):
    """`x += attention(norm(x))`, then `x += mlp(norm(x))`.

    The MLP is registered under its released name, `mlp` in a dense layer and `block_sparse_moe` in a MoE layer, and is
    reached as `mlp` in both. `cache_index` is the place of the block's pages in a `PagedContext`.
    """

    def __init__(
        self,
        layer_idx: int,
        config: MiniMaxM3VLTextConfig,
        moe_config: MoEConfig | None = None,
        backend: str | None = None,
        *,
        cache_index: int | None = None,
    ) -> None:
        super().__init__()
        self.layer_idx = layer_idx
        self.cache_index = layer_idx if cache_index is None else cache_index
        self.is_moe_layer = config.is_moe_layer(layer_idx)
        self.input_layernorm = MiniMaxM3RMSNorm(config.hidden_size, config.rms_norm_eps, backend=backend)
        self.self_attn = MiniMaxM3Attention(config, backend, config.is_sparse_attention_layer(layer_idx))
        self.post_attention_layernorm = MiniMaxM3RMSNorm(config.hidden_size, config.rms_norm_eps, backend=backend)
        if self.is_moe_layer:
            self.block_sparse_moe = MiniMaxM3MoE(config, moe_config, backend)
        else:
            self.mlp = MiniMaxM3MLP(config, config.dense_intermediate_size, backend)

    def __getattr__(self, name: str) -> Any:
        # NeMo Automodel calls the MLP of either kind `mlp`, and reaches the shared expert from the block.
        if name == "mlp" and "block_sparse_moe" in self._modules:
            return self._modules["block_sparse_moe"]
        if name == "shared_experts":
            return getattr(self._modules.get("block_sparse_moe"), "shared_experts", None)
        return super().__getattr__(name)

    def forward(
        self,
        x: Tensor,
        *,
        freqs_cis: Tensor,
        attention_mask: Tensor | None = None,
        padding_mask: Tensor | None = None,
        batch: ForwardBatch | None = None,
        record: ForwardRecord | None = None,
    ) -> Tensor:
        """Packed `x` `[T, H]` with its `batch`, or padded `[B, S, H]` with masks; `freqs_cis` has its leading shape."""
        if batch is None:
            return run_packed(
                lambda x, freqs_cis, batch: self(x, freqs_cis=freqs_cis, batch=batch, record=record),
                x, freqs_cis, attention_mask, padding_mask,
            )  # fmt: skip
        pages = None if batch.pages is None else batch.pages.layers[self.cache_index]
        choices = None if record is None else record.choices_of(self.cache_index)
        x = x + self.self_attn(
            self.input_layernorm(x), freqs_cis=freqs_cis, batch=batch, pages=pages, record=record, choices=choices
        )
        normed = self.post_attention_layernorm(x)
        return x + (self.block_sparse_moe(normed, record, choices) if self.is_moe_layer else self.mlp(normed))


class MiniMaxM3TextModel(nn.Module):
    """Embedding, decoder blocks, final norm, and the MTP modules that a checkpoint may bring."""

    def __init__(
        self, config: MiniMaxM3VLTextConfig, backend: str | None = None, *, moe_config: MoEConfig | None = None
    ) -> None:
        super().__init__()
        from minim3.model.mtp import MiniMaxM3MTP  # a MTP module holds a Block

        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(
            [Block(index, config, moe_config, backend) for index in range(config.num_hidden_layers)]
        )
        self.norm = MiniMaxM3RMSNorm(config.hidden_size, config.rms_norm_eps, backend=backend)
        self.mtp = MiniMaxM3MTP(config, moe_config, backend, config.num_mtp_modules) if config.num_mtp_modules else None

    def make_freqs_cis(self, position_ids: Tensor) -> Tensor:
        """int64 positions `[...]` -> the rotary table `[..., rotary_dim]`."""
        return rotary_table(position_ids, self.config.rotary_dim, self.config.rope_theta)

    def forward_packed(
        self, inputs_embeds: Tensor, batch: ForwardBatch, record: ForwardRecord | None = None
    ) -> Tensor:
        """Embeddings `[T, H]` of the packed tokens -> hidden states `[T, H]` after the final norm."""
        assert inputs_embeds.shape[0] == batch.num_tokens, (inputs_embeds.shape, batch.num_tokens)
        freqs_cis = self.make_freqs_cis(batch.positions)
        hidden = inputs_embeds
        for layer in self.layers:
            if record is not None:
                hidden = record.see_hidden(hidden)
            hidden = layer(hidden, freqs_cis=freqs_cis, batch=batch, record=record)
        hidden = self.norm(hidden)
        return hidden if record is None else record.see_hidden(hidden)

    def forward(
        self,
        input_ids: Tensor | None = None,
        *,
        position_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        padding_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
    ) -> Tensor:
        """Ids `[B, S]` or embeddings `[B, S, H]` -> hidden states `[B, S, H]`, zero at padding."""
        embeds = embed_inputs(self.embed_tokens, input_ids, inputs_embeds)
        layout = PaddedLayout.from_masks(embeds.shape[0], embeds.shape[1], attention_mask, padding_mask)
        hidden = self.forward_packed(layout.pack(embeds), layout.batch(embeds.device, position_ids))
        return layout.unpack(hidden)

    def mtp_logits(
        self,
        hidden_states: Tensor,
        input_ids: Tensor,
        lm_head: nn.Module,
        *,
        position_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        padding_mask: Tensor | None = None,
    ) -> list[Tensor]:
        """Logits `[B, S, vocab]` a MTP depth from hidden states `[B, S, H]`; position t predicts t + 2 + depth."""
        if self.mtp is None:
            raise ValueError("this model has no MTP modules: its config names none, or its checkpoint holds none")
        layout = PaddedLayout.from_masks(input_ids.shape[0], input_ids.shape[1], attention_mask, padding_mask)
        batch = layout.batch(hidden_states.device, position_ids)
        depths = self.mtp.forward_packed(layout.pack(hidden_states), layout.pack(input_ids), self.embed_tokens, batch)
        return [layout.unpack(lm_head(hidden)) for hidden in depths]

    @torch.no_grad()
    def init_weights(self, buffer_device: torch.device | None = None) -> None:
        """Fresh weights: normal of `initializer_range`, norms neutral. `buffer_device` is accepted and unused."""
        initialize(self, self.config.initializer_range)


def embed_inputs(embed_tokens: nn.Module, input_ids: Tensor | None, inputs_embeds: Tensor | None) -> Tensor:
    """Exactly one of ids `[B, S]` and embeddings `[B, S, H]` -> embeddings. Raises ValueError otherwise."""
    if (input_ids is None) == (inputs_embeds is None):
        raise ValueError("pass either input_ids or inputs_embeds, and not both")
    if input_ids is not None:
        if input_ids.dim() != 2:
            raise ValueError(f"input_ids must be [batch, sequence], got the shape {list(input_ids.shape)}")
        check_vocabulary(input_ids, embed_tokens)
        return embed_tokens(input_ids)
    assert inputs_embeds is not None
    if inputs_embeds.dim() != 3:
        raise ValueError(f"inputs_embeds must be [batch, sequence, hidden], got the shape {list(inputs_embeds.shape)}")
    return inputs_embeds


def check_vocabulary(input_ids: Tensor, embed_tokens: Any) -> None:
    """Raises ValueError for an id outside the vocabulary. On a CPU only: elsewhere the look would cost a wait."""
    if input_ids.device.type != "cpu" or not input_ids.numel():
        return
    size = embed_tokens.weight.shape[0]
    low, high = (int(end) for end in input_ids.aminmax())
    if low < 0 or high >= size:
        raise ValueError(f"input_ids hold {low if low < 0 else high}, the vocabulary has ids 0 to {size - 1}")


@torch.no_grad()
def initialize(module: nn.Module, std: float) -> None:
    """Normal weights of deviation `std`; biases 0; norms at their neutral point; correction biases 0."""
    for child in module.modules():
        if isinstance(child, (MiniMaxM3RMSNorm, nn.LayerNorm)):
            child.reset_parameters()
        else:
            for name, parameter in child.named_parameters(recurse=False):
                if name == "bias":
                    parameter.zero_()
                else:
                    parameter.normal_(0.0, std)
            for buffer in child.buffers(recurse=False):
                buffer.zero_()
