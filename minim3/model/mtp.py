"""Multi-token prediction: small modules that, from the backbone's output at t, predict the tokens after the next.

Source of the scheme: DeepSeek-V3, arXiv 2412.19437, section 2.2.
"""

from collections.abc import Callable
from itertools import accumulate

import torch
from torch import Tensor, nn

from minim3.config import MiniMaxM3VLTextConfig
from minim3.model.batch import ForwardBatch, ForwardRecord
from minim3.model.decoder import Block, initialize
from minim3.model.layers import MiniMaxM3RMSNorm, rotary_table
from minim3.model.moe import MoEConfig


class MiniMaxM3MTPBlock(nn.Module):
    """One depth: `eh_proj(cat[enorm(embedding), hnorm(hidden)])`, one decoder block, a norm.

    The block is of the kind of the last decoder layer (sparse attention and MoE in the released model).
    """

    def __init__(
        self,
        config: MiniMaxM3VLTextConfig,
        moe_config: MoEConfig | None = None,
        backend: str | None = None,
        *,
        depth: int = 0,
    ) -> None:
        super().__init__()
        self.enorm = MiniMaxM3RMSNorm(config.hidden_size, config.rms_norm_eps, backend=backend)
        self.hnorm = MiniMaxM3RMSNorm(config.hidden_size, config.rms_norm_eps, backend=backend)
        self.eh_proj = nn.Linear(2 * config.hidden_size, config.hidden_size, bias=False)
        last = config.num_hidden_layers - 1
        self.transformer_layer = Block(last, config, moe_config, backend, cache_index=config.num_hidden_layers + depth)
        self.final_layernorm = MiniMaxM3RMSNorm(config.hidden_size, config.rms_norm_eps, backend=backend)

    def forward(
        self,
        hidden_states: Tensor,
        *,
        embed_input: Tensor,
        freqs_cis: Tensor,
        attention_mask: Tensor | None = None,
        padding_mask: Tensor | None = None,
        batch: ForwardBatch | None = None,
        record: ForwardRecord | None = None,
    ) -> Tensor:
        """Hidden states at t and embeddings of token t + 1 + depth, both `[T, H]` or `[B, S, H]` -> hidden states."""
        x = self.eh_proj(torch.cat([self.enorm(embed_input), self.hnorm(hidden_states)], dim=-1))
        x = self.transformer_layer(
            x, freqs_cis=freqs_cis, attention_mask=attention_mask, padding_mask=padding_mask, batch=batch, record=record
        )
        return self.final_layernorm(x)


class MiniMaxM3MTP(nn.Module):
    """The depths in a row; depth d + 1 takes the output of depth d."""

    def __init__(
        self, config: MiniMaxM3VLTextConfig, moe_config: MoEConfig | None, backend: str | None, num_modules: int
    ) -> None:
        super().__init__()
        self.config = config
        self.layers = nn.ModuleList(
            [MiniMaxM3MTPBlock(config, moe_config, backend, depth=depth) for depth in range(num_modules)]
        )

    @torch.no_grad()
    def init_weights(self, buffer_device: torch.device | None = None) -> None:
        """Fresh weights, as `MiniMaxM3TextModel.init_weights` draws them. `buffer_device` is accepted and unused."""
        initialize(self, self.config.initializer_range)

    def forward_packed(
        self,
        hidden: Tensor,
        input_ids: Tensor,
        embed_fn: Callable[[Tensor], Tensor],
        batch: ForwardBatch,
        record: ForwardRecord | None = None,
    ) -> list[Tensor]:
        """Final hidden states `[T, H]` and ids `[T]` -> hidden states `[T, H]` of each depth, for the shared head.

        The last depth + 1 positions of a sequence have no next token to embed (id 0 stands there): ignore them.
        """
        freqs_cis = rotary_table(batch.positions, self.config.rotary_dim, self.config.rope_theta)
        ids, depths = input_ids, []
        last_of_sequence = torch.tensor(list(accumulate(batch.lengths_q)), device=ids.device) - 1
        for block in self.layers:
            ids = ids.roll(-1).index_fill(0, last_of_sequence, 0)
            hidden = block(hidden, embed_input=embed_fn(ids), freqs_cis=freqs_cis, batch=batch, record=record)
            depths.append(hidden)
        return depths

    def forward(
        self,
        hidden_states: Tensor,
        *,
        input_ids: Tensor,
        embed_fn: Callable[[Tensor], Tensor],
        lm_head: nn.Module,
        freqs_cis: Tensor,
        attention_mask: Tensor | None = None,
        padding_mask: Tensor | None = None,
    ) -> list[Tensor]:
        """Padded hidden states `[B, S, H]` and ids `[B, S]` -> logits `[B, S, vocab]` of each depth."""
        ids, hidden, logits = input_ids, hidden_states, []
        for block in self.layers:
            ids = torch.nn.functional.pad(ids[:, 1:], (0, 1))
            hidden = block(
                hidden, embed_input=embed_fn(ids), freqs_cis=freqs_cis,
                attention_mask=attention_mask, padding_mask=padding_mask,
            )  # fmt: skip
            logits.append(lm_head(hidden))
        return logits
