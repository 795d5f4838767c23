"""Mixture of experts: a fp32 router, stacked experts, one shared expert. Formulas: arXiv 2412.19437, section 2.1.2."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from minim3 import kernels
from minim3.config import MiniMaxM3VLTextConfig
from minim3.model.batch import ForwardRecord, LayerChoices
from minim3.model.layers import MiniMaxM3MLP, at_least_fp32


@dataclass(frozen=True)
class MoEConfig:
    """What a MoE layer is made of, as one place to read it; derived from the text config."""

    dim: int
    moe_inter_dim: int
    n_routed_experts: int
    n_shared_experts: int
    n_activated_experts: int
    score_func: str
    route_scale: float
    use_routing_bias: bool
    activation_alpha: float
    activation_limit: float
    activation_beta: float
    dtype: torch.dtype = torch.bfloat16


def build_moe_config(config: MiniMaxM3VLTextConfig, dtype: torch.dtype = torch.bfloat16) -> MoEConfig:
    """The routed-expert settings of `config`."""
    return MoEConfig(
        dim=config.hidden_size,
        moe_inter_dim=config.intermediate_size,
        n_routed_experts=config.num_local_experts,
        n_shared_experts=config.n_shared_experts,
        n_activated_experts=config.num_experts_per_tok,
        score_func=config.scoring_func,
        route_scale=config.routed_scaling_factor,
        use_routing_bias=config.use_routing_bias,
        activation_alpha=config.swiglu_alpha,
        activation_limit=config.swiglu_limit,
        activation_beta=config.swiglu_beta,
        dtype=dtype,
    )


class MiniMaxM3Router(nn.Module):
    """The gate: fp32 logits of every expert, whatever the dtype of the model."""

    def __init__(self, num_experts: int, hidden_size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_experts, hidden_size, dtype=torch.float32))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """A move or cast of the model (`to`, `half`, ...), in which the router does not go below fp32."""
        before = self.weight.data
        super()._apply(fn, recurse)
        self.weight.data = _undo_below_fp32(before, self.weight.data)
        return self

    def forward(self, x: Tensor) -> Tensor:
        """`[T, H]` -> at least fp32 `[T, experts]`."""
        x = at_least_fp32(x)
        weight = self.weight.to(x.dtype)
        if not torch.is_autocast_enabled(x.device.type):
            return F.linear(x, weight)
        with torch.autocast(x.device.type, enabled=False):
            return F.linear(x, weight)


def _undo_below_fp32(before: Tensor, after: Tensor) -> Tensor:
    """`after`, or, where that was cast below fp32, `before` on its device: small bits decide which experts win."""
    return before.to(after.device) if after.dtype.itemsize < 4 else after


class MiniMaxM3Experts(nn.Module):
    """All routed experts: `w13` `[experts, 2 * width, H]` (gate rows, then up rows) and `w2` `[experts, H, width]`."""

    def __init__(self, config: MiniMaxM3VLTextConfig, backend: str | None = None) -> None:
        super().__init__()
        experts, width, hidden = config.num_local_experts, config.intermediate_size, config.hidden_size
        self.backend = backend
        self.alpha, self.limit, self.beta = config.swiglu_alpha, config.swiglu_limit, config.swiglu_beta
        self.w13 = nn.Parameter(torch.empty(experts, 2 * width, hidden))
        self.w2 = nn.Parameter(torch.empty(experts, hidden, width))

    def forward(self, x: Tensor, expert_ids: Tensor, expert_weights: Tensor) -> Tensor:
        """Weighted sum of each token's experts: `x` `[T, H]`, ids and weights `[T, top_k]` -> `[T, H]`."""
        return kernels.grouped_experts(
            x, self.w13, self.w2, expert_ids, expert_weights,
            alpha=self.alpha, limit=self.limit, beta=self.beta, implementation=self.backend,
        )  # fmt: skip


class MiniMaxM3MoE(nn.Module):
    """`routed_scaling_factor * sum of the chosen experts, weighted` + the shared expert.

    The correction bias takes part in the choice of experts and never in their weights.
    """

    def __init__(
        self, config: MiniMaxM3VLTextConfig, moe_config: MoEConfig | None = None, backend: str | None = None
    ) -> None:
        super().__init__()
        derived = build_moe_config(config)
        if moe_config is not None and moe_config != build_moe_config(config, moe_config.dtype):
            raise ValueError(f"moe_config {moe_config} disagrees with the config, which says {derived}: pass None")
        self.num_experts_per_tok = config.num_experts_per_tok
        self.routed_scaling_factor = config.routed_scaling_factor
        self.scoring_func = config.scoring_func
        self.gate = MiniMaxM3Router(config.num_local_experts, config.hidden_size)
        self.e_score_correction_bias: Tensor | None
        self.register_buffer(
            "e_score_correction_bias",
            torch.zeros(config.num_local_experts, dtype=torch.float32) if config.use_routing_bias else None,
        )
        self.experts = MiniMaxM3Experts(config, backend)
        self.shared_experts = (
            MiniMaxM3MLP(config, config.shared_intermediate_size * config.n_shared_experts, backend)
            if config.n_shared_experts
            else None
        )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        before = self.e_score_correction_bias
        super()._apply(fn, recurse)
        if before is not None and self.e_score_correction_bias is not None:
            self.e_score_correction_bias = _undo_below_fp32(before, self.e_score_correction_bias)
        return self

    def route(self, logits: Tensor, expert_ids: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """fp32 logits `[T, experts]` -> the chosen experts, int64 `[T, top_k]`, and their fp32 weights.

        expert_ids: a choice made before, which is followed.
        """
        scores = logits.sigmoid() if self.scoring_func == "sigmoid" else logits.softmax(-1)
        if expert_ids is None:
            choice = scores if self.e_score_correction_bias is None else scores + self.e_score_correction_bias
            expert_ids = choice.detach().topk(self.num_experts_per_tok, dim=-1, sorted=False).indices
        weights = scores.gather(-1, expert_ids)
        return expert_ids, weights / weights.sum(-1, keepdim=True) * self.routed_scaling_factor

    def forward(
        self, x: Tensor, record: ForwardRecord | None = None, choices: LayerChoices | None = None
    ) -> Tensor:
        """`[..., H]` -> the same shape."""
        flat = x.flatten(0, -2)
        logits = self.gate(flat)
        expert_ids, weights = self.route(logits, None if choices is None else choices.expert_ids)
        if choices is not None:
            choices.expert_ids = expert_ids
        if record is not None and record.router_logits is not None:
            record.router_logits.append(logits)
        if record is not None and record.expert_ids is not None:
            record.expert_ids.append(expert_ids)
        out = self.experts(flat, expert_ids, weights)
        if self.shared_experts is not None:
            out = out + self.shared_experts(flat)
        return out.view(x.shape)
