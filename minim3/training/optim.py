"""How weights move: AdamW or Muon in groups, the learning-rate schedule, the router bias, the moving average."""

import math
from collections.abc import Iterable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from minim3.model.moe import MiniMaxM3MoE
from minim3.training.config import TEXT_PARTS, OptimRecipe, ScheduleRecipe
from minim3.training.muon import Muon

TOWER, PROJECTORS = "vision_tower.", ("multi_modal_projector.", "patch_merge_mlp.")
VISION = (TOWER, *PROJECTORS)
OUTSIDE_LAYERS = ("embed_tokens", "lm_head", "patch_embedding", ".gate.weight")
HEAD_NORMS = (".q_norm.weight", ".k_norm.weight")


def part_of(name: str) -> str:
    """The part (one of `MODEL_PARTS`; "other" in a stranger's model) that a parameter belongs to, by its name.

    Everything of an MTP module is "mtp", its indexer too. Biases and norms of the vision tower are "vision". "mlp" are
    the dense MLPs and the shared experts, "experts" the routed ones, "router" the gates; "norms" those of the residual
    stream and of the heads, but not of the indexer.
    """
    if name.startswith(TOWER):
        return "vision"
    if name.startswith(PROJECTORS):
        return "projector"
    places = name.split(".")
    for place, part in (
        ("mtp", "mtp"),
        ("indexer", "indexer"),
        ("embed_tokens", "embeddings"),
        ("lm_head", "head"),
        ("experts", "experts"),
        ("gate", "router"),
        ("shared_experts", "mlp"),
        ("mlp", "mlp"),
    ):
        if place in places:
            return part
    if places[-2:-1] and places[-2].endswith("norm"):
        return "norms"
    return "attention" if "self_attn" in places else "other"


def freeze_parts(model: nn.Module, recipe: OptimRecipe) -> None:
    """Take no gradients in frozen parts and where the recipe's rate is 0: no backward pass, no memory for it.

    Raises ValueError when nothing is left to train.
    """
    frozen = {part for named in recipe.freeze for part in (TEXT_PARTS if named == "text" else (named,))}
    rates = (("vision", recipe.vision_lr_scale), ("projector", _projector_scale(recipe)))
    frozen |= {part for part, rate in (*rates, ("indexer", recipe.indexer_lr_scale)) if rate == 0}
    for name, parameter in model.named_parameters():
        if part_of(name) in frozen:
            parameter.requires_grad_(False)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ValueError(f"nothing is left to train: {', '.join(sorted(frozen))} are frozen, and the model has no more")


def _projector_scale(recipe: OptimRecipe) -> float:
    return recipe.vision_lr_scale if recipe.projector_lr_scale is None else recipe.projector_lr_scale


def parameter_groups(model: nn.Module, recipe: OptimRecipe) -> list[dict[str, Any]]:
    """Groups by rate (indexer, vision tower, projectors, per-head norms, rest), by decay (matrices decay, norms, biases
    and embeddings do not) and by rule.

    Every group carries its name, the names of its parameters, `use_muon` and `peak_lr`, the rate the schedule scales.
    Muon moves matrices that map activations to activations; embeddings, head, router and the first layer of the vision
    tower, whose rows mean something by themselves, stay with AdamW.
    """
    scales = {
        "indexer": recipe.indexer_lr_scale,
        "vision": recipe.vision_lr_scale,
        "projector": _projector_scale(recipe),
        "head_norms": recipe.head_norm_lr_scale,
        "text": 1.0,
    }
    groups: dict[tuple[str, bool, bool], dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        part = part_of(name)
        if "indexer" in name.split("."):  # that of an MTP module too
            part = "indexer"
        elif part not in ("vision", "projector"):
            part = "text"
        if part == "text" and name.endswith(HEAD_NORMS):
            part = "head_norms"
        decays = parameter.ndim >= 2 and "embed_tokens" not in name
        use_muon = recipe.kind == "muon" and parameter.ndim >= 2 and not any(key in name for key in OUTSIDE_LAYERS)
        group = groups.setdefault(
            (part, decays, use_muon),
            {
                "params": [],
                "param_names": [],
                "name": f"{part}_{'muon' if use_muon else 'decay' if decays else 'no_decay'}",
                "use_muon": use_muon,
                "peak_lr": (recipe.muon_lr if use_muon else recipe.lr) * scales[part],
                "weight_decay": recipe.weight_decay if decays else 0.0,
            },
        )
        group["params"].append(parameter)
        group["param_names"].append(name)
    return list(groups.values())


def build_optimizer(model: nn.Module, recipe: OptimRecipe) -> torch.optim.AdamW:
    """The recipe's optimizer over `parameter_groups`. AdamW is fused: one pass over the memory of every parameter."""
    groups = parameter_groups(model, recipe)
    betas = cast(tuple[float, float], recipe.betas)
    if recipe.kind == "muon":
        return Muon(groups, lr=recipe.lr, betas=betas, eps=recipe.eps, momentum=recipe.muon_momentum)
    return torch.optim.AdamW(groups, lr=recipe.lr, betas=betas, eps=recipe.eps, fused=True)


def schedule_factor(step: int, steps: int, recipe: ScheduleRecipe) -> float:
    """The learning rate of step `step` of `steps`, as a share of its peak (0..1). A function of the step alone."""
    if step < recipe.warmup_steps:
        return (step + 1) / recipe.warmup_steps
    if recipe.kind == "constant":
        return 1.0
    if recipe.kind == "wsd":
        remaining = min(1.0, (steps - step) / recipe.decay_steps)
        return recipe.final_fraction + (1 - recipe.final_fraction) * remaining
    progress = (step - recipe.warmup_steps) / max(1, steps - recipe.warmup_steps)
    remaining = 1 - progress if recipe.kind == "linear" else 0.5 * (1 + math.cos(math.pi * progress))
    return recipe.final_fraction + (1 - recipe.final_fraction) * remaining


def set_learning_rate(optimizer: torch.optim.Optimizer, factor: float) -> None:
    """Every group at `factor` (see `schedule_factor`) of its own peak."""
    for group in optimizer.param_groups:
        group["lr"] = factor * group["peak_lr"]


def moe_layers(model: nn.Module) -> list[MiniMaxM3MoE]:
    """The MoE layers in the order of `ForwardRecord.expert_ids`: decoder layers, then MTP depths."""
    return [module for module in model.modules() if isinstance(module, MiniMaxM3MoE)]


@torch.no_grad()
def update_router_bias(layers: Iterable[MiniMaxM3MoE], expert_ids: Sequence[Tensor], step: float) -> None:
    """Move the correction bias of every expert by `step`: down if it got more than the mean load, up if less.

    Source: auxiliary-loss-free balancing, arXiv 2408.15664. expert_ids: int64 `[T, top_k]`, one a layer. The bias of a
    frozen router stays.
    """
    for layer, chosen in zip(layers, expert_ids, strict=False):  # a pass without MTP records fewer layers
        bias = layer.e_score_correction_bias
        if bias is not None and layer.gate.weight.requires_grad:
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
