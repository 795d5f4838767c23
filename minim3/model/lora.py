"""Low-rank adaptation (LoRA, arXiv 2106.09685): projections that add `scale * B @ A @ x` to what they compute.

An adapted module takes the place of the one it adapts and keeps its parameters under their names; `lora_A` and `lora_B`
stand beside them. Which way a change is computed:

  * Linear layers go through the two small products: a step costs `r (in + out)` a token more than a frozen layer, and
    no gradient of the size of the weight is ever formed.
  * So do routed experts, each with factors of its own: the tokens of an expert, sorted once, pass its two small
    products beside its frozen weights. Adding `B @ A` to the stacks first gives the same sums, at the price of a second
    copy of every stack in memory, and of a gradient as large.
  * A head is adapted in its weight, since losses take the weight and never form all logits at once.

For inference nothing of this runs: an adapter is merged into the weights (`minim3.model.adapter`), and the model is one
like any other. H hidden size, F width of an expert, E experts, r rank, T tokens, K choices a token.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from minim3.checkpoint.adapter import lora_scale
from minim3.model.layers import PackedLinears, swiglu_oai
from minim3.model.moe import MiniMaxM3Experts


@dataclass(frozen=True)
class LoraSettings:
    """Of one module. dropout: on the input of A, in training."""

    rank: int
    alpha: float
    dropout: float = 0.0
    rslora: bool = False

    @property
    def scale(self) -> float:
        return lora_scale(self.alpha, self.rank, self.rslora)


class LoraModule(nn.Module):
    """What adapted modules share. Of each adapted weight: `lora` its settings, `factor_names` the parameters A and B.

    A weight `[out, in]` has A `[r, in]` and B `[out, r]`; a stack of `parts` projections of each of E experts,
    `[E, parts * out, in]`, has `[E, parts * r, in]` and `[E, parts * out, r]`. They are at least fp32.
    """

    lora: dict[str, LoraSettings]
    factor_names: dict[str, tuple[str, str]]

    def _adapt(self, base: nn.Module) -> None:
        nn.Module.__init__(self)
        self.lora, self.factor_names = {}, {}
        self._base = [base]  # in a list, where it is no submodule: its parameters are this module's
        for name, parameter in base._parameters.items():
            self._parameters[name] = parameter
        self.train(base.training)

    def _add_factors(
        self, weight_name: str, names: tuple[str, str], settings: LoraSettings, parts: int = 1
    ) -> None:
        weight = self._parameters[weight_name]
        assert weight is not None
        *experts, num_rows, columns = weight.shape
        options: Any = {"device": weight.device, "dtype": torch.promote_types(weight.dtype, torch.float32)}
        # As PEFT starts (Kaiming's rule with a = sqrt(5)): A uniform within 1 / sqrt(in). B starts at 0: no change.
        a = torch.empty(*experts, parts * settings.rank, columns, **options)
        self.register_parameter(names[0], nn.Parameter(a.uniform_(-(columns**-0.5), columns**-0.5)))
        self.register_parameter(names[1], nn.Parameter(torch.zeros(*experts, num_rows, settings.rank, **options)))
        self.lora[weight_name], self.factor_names[weight_name] = settings, names

    def factors_of(self, weight_name: str) -> tuple[Tensor, Tensor]:
        """A and B of an adapted weight."""
        a, b = self.factor_names[weight_name]
        return self.get_parameter(a), self.get_parameter(b)

    def original(self) -> nn.Module:
        """The module that was adapted, with the parameters of this one."""
        (base,) = self._base
        for name in base._parameters:
            base._parameters[name] = self._parameters[name]
        return base.train(self.training)

    def _drop(self, x: Tensor, settings: LoraSettings) -> Tensor:
        return F.dropout(x, settings.dropout) if settings.dropout and self.training else x


class LoraLinear(LoraModule, nn.Linear):
    """A linear layer with a low-rank change."""

    lora_A: Tensor
    lora_B: Tensor

    def __init__(self, base: nn.Linear, settings: LoraSettings) -> None:
        self._adapt(base)
        self.in_features, self.out_features = base.in_features, base.out_features
        self._add_factors("weight", ("lora_A", "lora_B"), settings)
        self.settings = settings

    def change(self, x: Tensor) -> Tensor:
        """`scale * B @ A @ x`: `[..., in]` -> `[..., out]`, in the dtype of the factors."""
        low = F.linear(self._drop(x.to(self.lora_A.dtype), self.settings), self.lora_A)
        return F.linear(low * self.settings.scale, self.lora_B)

    def forward(self, x: Tensor) -> Tensor:
        out = F.linear(x, self.weight, self.bias)
        return out + self.change(x).to(out.dtype)

    @property
    def pack_with(self) -> Callable[[Sequence[nn.Linear]], "LoraPackedLinears"]:
        """See `minim3.model.layers.pack_linears`."""
        return LoraPackedLinears


class LoraHead(LoraLinear):
    """The head, adapted in its weight: whoever takes `weight` gets the sum, with a gradient to the factors."""

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        base = self._parameters["weight"]
        assert base is not None
        total = torch.addmm(base.to(self.lora_A.dtype), self.lora_B, self.lora_A, alpha=self.settings.scale)
        return total.to(base.dtype)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype), self.bias)


class LoraPackedLinears(PackedLinears):
    """One product of several projections, some of them adapted, and the changes of these added to their columns."""

    def __init__(self, projections: Sequence[nn.Linear]) -> None:
        super().__init__(projections)
        self._projections = list(projections)
        self._changes = []
        start = 0
        for projection in projections:
            if isinstance(projection, LoraLinear):
                self._changes.append((slice(start, start + projection.out_features), projection))
            start += projection.out_features

    def holds(self, projections: Sequence[nn.Module]) -> bool:
        same = all(known is now for known, now in zip(self._projections, projections, strict=True))
        return same and super().holds(projections)

    def __call__(self, x: Tensor) -> Tensor:
        out = super().__call__(x)
        for columns, projection in self._changes:
            out[..., columns] += projection.change(x).to(out.dtype)
        return out


class LoraExperts(LoraModule, MiniMaxM3Experts):
    """Routed experts, each with low-rank changes of its own: of gate and up (`w13`), of `w2`, or of both."""

    def __init__(self, base: MiniMaxM3Experts, settings: Mapping[str, LoraSettings]) -> None:
        self._adapt(base)
        self.backend, self.alpha, self.limit, self.beta = base.backend, base.alpha, base.limit, base.beta
        for stack, of_stack in settings.items():
            names = f"{stack}_lora_A", f"{stack}_lora_B"
            self._add_factors(stack, names, of_stack, parts=2 if stack == "w13" else 1)

    def forward(self, x: Tensor, expert_ids: Tensor, expert_weights: Tensor) -> Tensor:
        """As `MiniMaxM3Experts.forward`."""
        if not x.shape[0]:
            return x
        chosen = expert_ids.reshape(-1)
        order = chosen.sort(stable=True).indices
        counts = torch.bincount(chosen, minlength=self.w13.shape[0]).tolist()
        active = [expert for expert, count in enumerate(counts) if count]
        sizes = [counts[expert] for expert in active]
        # Pieces of a split, and slices of an unbound stack: their gradients are put together once, not once an expert.
        rows = x.index_select(0, order // expert_ids.shape[1]).to(self.w13.dtype)
        gate, up = self._products("w13", active, rows.split(sizes)).chunk(2, dim=-1)
        act = swiglu_oai(gate, up, self.alpha, self.limit, self.beta)
        y = self._products("w2", active, act.split(sizes))
        inverse = torch.empty_like(order)
        inverse[order] = torch.arange(order.shape[0], device=order.device)
        y = y.index_select(0, inverse).view(*expert_ids.shape, -1)
        return torch.bmm(expert_weights.unsqueeze(1).to(y.dtype), y).squeeze(1).to(x.dtype)

    def _products(self, stack: str, active: Sequence[int], rows: Sequence[Tensor]) -> Tensor:
        """The rows of each active expert times its adapted weight, one expert after another."""
        weights = getattr(self, stack).unbind()
        if stack not in self.factor_names:
            return torch.cat([F.linear(of_expert, weights[e]) for e, of_expert in zip(active, rows)])
        a, b = (factors.unbind() for factors in self.factors_of(stack))
        settings, outputs = self.lora[stack], []
        parts = a[0].shape[0] // settings.rank
        for expert, of_expert in zip(active, rows):
            low = F.linear(self._drop(of_expert.to(a[0].dtype), settings), a[expert]) * settings.scale
            changes = [F.linear(*part) for part in zip(low.chunk(parts, -1), b[expert].chunk(parts))]
            out = F.linear(of_expert, weights[expert])
            outputs.append(out + torch.cat(changes, -1).to(out.dtype))
        return torch.cat(outputs)
