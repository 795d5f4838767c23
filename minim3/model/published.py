"""Names of this model in other systems, where ours has another name or shape: aliases and a few small functions.

The table in docs/api.md says for each published name where it lives here and what differs.
"""

import torch
from torch import Tensor

from minim3.config import MiniMaxM3VLTextConfig
from minim3.model.attention import MiniMaxM3Attention
from minim3.model.causal_lm import MiniMaxM3SparseForCausalLM, MiniMaxM3SparseForConditionalGeneration
from minim3.model.decoder import MiniMaxM3TextModel
from minim3.model.layers import MiniMaxM3RMSNorm
from minim3.model.vision import MiniMaxM3VisionModel

# NeMo Automodel finds the class of a checkpoint under this name.
ModelClass = MiniMaxM3SparseForConditionalGeneration

# transformers
MiniMaxM3VLForCausalLM = MiniMaxM3SparseForCausalLM
MiniMaxM3VLTextModel = MiniMaxM3TextModel
MiniMaxM3VLVisionModel = MiniMaxM3VisionModel


class MiniMAXGemmaRMSNorm(MiniMaxM3RMSNorm):
    """vLLM's name for the norm, and its name for the dimension."""

    def __init__(self, hidden_size: int, eps: float = 1e-6) -> None:
        super().__init__(hidden_size, eps)


class MiniMaxM3SparseAttention(MiniMaxM3Attention):
    """vLLM's name for the attention of a sparse layer."""

    def __init__(self, config: MiniMaxM3VLTextConfig, backend: str | None = None) -> None:
        super().__init__(config, backend, is_sparse_attention_layer=True)


def _is_moe_layer(config: MiniMaxM3VLTextConfig, layer_id: int) -> bool:
    return config.is_moe_layer(layer_id)


def _sparse_attention_layer_ids(config: MiniMaxM3VLTextConfig) -> list[int]:
    return [layer for layer in range(config.num_hidden_layers) if config.is_sparse_attention_layer(layer)]


def _padding_mask_to_additive_bias(attention_mask: Tensor, ref: Tensor) -> Tensor:
    """A keep mask `[B, S]`, or an additive mask, -> 0 / -inf that broadcasts over `ref` `[B, heads, S, S]`.

    For looking at attention in fp32; the model masks with booleans, since -inf sums go wrong in bf16.
    """
    if attention_mask.is_floating_point() and attention_mask.dim() == 4:
        return attention_mask.to(ref)
    if attention_mask.dim() == 2:
        attention_mask = attention_mask[:, None, None, :]
    bias = torch.zeros(attention_mask.shape, dtype=ref.dtype, device=ref.device)
    return bias.masked_fill(~attention_mask.bool().to(ref.device), float("-inf"))
