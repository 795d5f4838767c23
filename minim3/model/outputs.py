"""What a forward call returns, and the losses that are fields of it."""

from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from minim3.model.layers import at_least_fp32
from minim3.model.padding import PaddedLayout

IGNORED = -100


@dataclass
class MiniMaxM3CausalLMOutput:
    """logits: `[B, S or logits_to_keep, vocab]`, zero at padding.

    mtp_per_depth_logits: one `[B, S, vocab]` a MTP depth; depth d at position t predicts the token at t + 2 + d.
    loss: next-token cross-entropy alone, a scalar. aux_loss: load balance of the experts, a scalar.
    hidden_states: `[B, S, H]` of the embeddings, of every layer but the last, and after the final norm.
    router_logits: fp32 `[B * S, experts]` a MoE layer. indexer_kl: a scalar a sparse layer, then one a MTP
    depth if MTP logits are there too.
    image_hidden_states, video_hidden_states: the features `[tokens, H]` that replaced the placeholders.

    `output["logits"]` is `output.logits`; `output[0]` and `output[:2]` count what is there, the loss first.
    """

    logits: Tensor
    mtp_per_depth_logits: list[Tensor] | None = None
    loss: Tensor | None = None
    aux_loss: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    router_logits: tuple[Tensor, ...] | None = None
    indexer_kl: tuple[Tensor, ...] | None = None
    image_hidden_states: Tensor | None = None
    video_hidden_states: Tensor | None = None

    def to_tuple(self) -> tuple[Any, ...]:
        """What is there: the loss, then the fields in their order."""
        names = ["loss", *(field.name for field in fields(self) if field.name != "loss")]
        return tuple(value for name in names if (value := getattr(self, name)) is not None)

    def __contains__(self, name: str) -> bool:
        return name in {field.name for field in fields(self)} and getattr(self, name) is not None

    def __getitem__(self, key: int | slice | str) -> Any:
        if not isinstance(key, str):
            return self.to_tuple()[key]
        if key not in self:
            raise KeyError(key)
        return getattr(self, key)


def packed_targets(labels: Tensor, layout: PaddedLayout) -> Tensor:
    """Padded labels `[B, S]` -> int64 `[T]`: at each token the label of the next of its row, -100 where none is."""
    if tuple(labels.shape) != (layout.batch_size, layout.row_length):
        raise ValueError(
            f"labels have the shape {list(labels.shape)}, the input is [{layout.batch_size}, {layout.row_length}]"
        )
    targets = layout.pack(labels).roll(-1)
    last_of_row = torch.tensor(layout.lengths, device=labels.device).cumsum(0) - 1
    return targets.index_fill(0, last_of_row, IGNORED)


def next_token_loss(hidden: Tensor, targets: Tensor, lm_head: nn.Module) -> Tensor:
    """Mean cross-entropy over the targets that are not -100, in fp32; NaN when there is none, as in PyTorch."""
    wanted = (targets != IGNORED).nonzero().squeeze(1)
    logits = at_least_fp32(lm_head(hidden.index_select(0, wanted)))
    return F.cross_entropy(logits, targets.index_select(0, wanted))


def load_balancing_loss(router_logits: list[Tensor], num_experts: int, top_k: int) -> Tensor:
    """`experts * sum_e share of assignments_e * mean probability_e`, over all layers (arXiv 2101.03961, eq. 4 to 6)."""
    probabilities = torch.cat(router_logits).softmax(-1)
    chosen = probabilities.topk(top_k, dim=-1).indices.flatten()
    load = torch.bincount(chosen, minlength=num_experts).to(probabilities.dtype) / probabilities.shape[0]
    return num_experts * (load * probabilities.mean(0)).sum()
