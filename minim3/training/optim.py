"""How weights move: AdamW in groups, the learning-rate schedule, the router bias, the moving average."""

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from minim3.model.moe import MiniMaxM3MoE
from minim3.training.config import OptimRecipe, ScheduleRecipe

INDEXER, VISION = ".indexer.", ("vision_tower.", "multi_modal_projector.", "patch_merge_mlp.")
HEAD_NORMS = (".q_norm.weight", ".k_norm.weight")


def parameter_groups(model: nn.Module, recipe: OptimRecipe) -> list[dict[str, Any]]:
    """AdamW groups by part (indexer, vision, per-head norms, rest) and by decay: matrices decay, the rest does not.

    Every group carries its name, the names of its parameters and `lr_scale`, its factor on the scheduled rate.
    """
    scales = {
        "indexer": recipe.indexer_lr_scale,
        "vision": recipe.vision_lr_scale,
        "head_norms": recipe.head_norm_lr_scale,
        "text": 1.0,
    }
    groups: dict[tuple[str, bool], dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        part = "text"
        if INDEXER in name:
            part = "indexer"
        elif name.startswith(VISION):
            part = "vision"
        elif name.endswith(HEAD_NORMS):
            part = "head_norms"
        decays = parameter.ndim >= 2 and "embed_tokens" not in name
        group = groups.setdefault(
            (part, decays),
            {
                "params": [],
                "param_names": [],
                "name": f"{part}_{'decay' if decays else 'no_decay'}",
                "lr_scale": scales[part],
                "weight_decay": recipe.weight_decay if decays else 0.0,
            },
        )
        group["params"].append(parameter)
        group["param_names"].append(name)
    return list(groups.values())


def build_optimizer(model: nn.Module, recipe: OptimRecipe) -> torch.optim.AdamW:
    """AdamW over `parameter_groups`, in its fused form: one pass over the memory of every parameter."""
    first, second = recipe.betas
    return torch.optim.AdamW(
        parameter_groups(model, recipe), lr=recipe.lr, betas=(first, second), eps=recipe.eps, fused=True
    )


def schedule_factor(step: int, steps: int, recipe: ScheduleRecipe) -> float:
    """The learning rate of step `step` of `steps`, as a share of its peak (0..1). A function of the step alone."""
    if step < recipe.warmup_steps:
        return (step + 1) / recipe.warmup_steps
    if recipe.kind == "constant":
        return 1.0
    progress = (step - recipe.warmup_steps) / max(1, steps - recipe.warmup_steps)
    remaining = 1 - progress if recipe.kind == "linear" else 0.5 * (1 + math.cos(math.pi * progress))
    return recipe.final_fraction + (1 - recipe.final_fraction) * remaining


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_scale"]


def moe_layers(model: nn.Module) -> list[MiniMaxM3MoE]:
    """The MoE layers in the order of `ForwardRecord.expert_ids`: decoder layers, then MTP depths."""
    return [module for module in model.modules() if isinstance(module, MiniMaxM3MoE)]


@torch.no_grad()
def update_router_bias(layers: Iterable[MiniMaxM3MoE], expert_ids: Sequence[Tensor], step: float) -> None:
    """Move the correction bias of every expert by `step`: down if it got more than the mean load, up if less.

    Source: auxiliary-loss-free balancing, arXiv 2408.15664. expert_ids: int64 `[T, top_k]`, one a layer.
    """
    for layer, chosen in zip(layers, expert_ids, strict=False):  # a pass without MTP records fewer layers
        bias = layer.e_score_correction_bias
        if bias is not None:
            load = torch.bincount(chosen.flatten(), minlength=bias.shape[0]).to(bias.dtype)
            bias += step * torch.sign(load.mean() - load)


def load_imbalance(expert_ids: Sequence[Tensor], num_experts: int) -> float:
    """The busiest expert's load over the mean load, averaged over layers: 1 is perfect balance."""
    loads = [torch.bincount(chosen.flatten(), minlength=num_experts).float() for chosen in expert_ids]
    return float(torch.stack([load.max() / load.mean() for load in loads]).mean()) if loads else 1.0


class MovingAverage:
    """An exponential moving average of the parameters, whose memory grows to `decay` over the first steps."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.parameters = dict(model.named_parameters())
        self.averages = {name: parameter.detach().clone() for name, parameter in self.parameters.items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        decay = min(self.decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(list(self.averages.values()), list(self.parameters.values()), 1 - decay)

    @torch.no_grad()
    def swap(self) -> None:
        """Exchange weights and averages; a second call undoes the first."""
        for name, parameter in self.parameters.items():
            average = self.averages[name]
            self.averages[name] = parameter.data
            parameter.data = average
