"""Parts of a step of few new tokens (`decoding`): buffers, products, norms, the gated MLP and the experts.

T new tokens, H hidden size, F the width of an expert.
"""

from collections.abc import Callable, Sequence
from math import exp
from operator import add
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from minim3.kernels.portable.experts import FEW_ROWS, add_experts
from minim3.model.layers import MiniMaxM3MLP, MiniMaxM3RMSNorm, PackedLinears
from minim3.model.moe import MiniMaxM3Experts, MiniMaxM3MoE


class Rows:
    """A buffer `[T, n]`, and its first row: the only one if `single`."""

    def __init__(self, rows: Tensor) -> None:
        self.all = rows
        self.row = rows[0]
        self.single = rows.shape[0] == 1


class Space:
    """The buffers of a number of tokens. `of` hands out the same one for the same name and width."""

    def __init__(self, tokens: int) -> None:
        self.tokens = tokens
        self._made: dict[Any, Any] = {}

    def of(self, name: str, width: int) -> Rows:
        return self.once((name, width), lambda: Rows(torch.zeros(self.tokens, width)))

    def once(self, key: Any, make: Callable[[], Any]) -> Any:
        made = self._made.get(key)
        if made is None:
            with torch.inference_mode(False):  # what is made serves in and outside of inference mode
                made = self._made[key] = make()
        return made


class Product:
    """`x @ weight.T` for a plain fp32 weight, or what a module in its place computes."""

    def __init__(self, weight: Tensor | None, module: Callable[[Any], Any]) -> None:
        self.plain = weight is not None
        self.weight = torch.empty(0, 0) if weight is None else weight
        self.turned = self.weight.t()
        self._module = module

    @classmethod
    def of(cls, module: nn.Module) -> "Product":
        plain = isinstance(module, nn.Linear) and type(module) is nn.Linear and module.bias is None
        weight = module.get_parameter("weight").detach() if plain else None
        return cls(weight if is_plain(weight) else None, module)

    @classmethod
    def of_packed(cls, packed: Any) -> "Product":
        plain = type(packed) is PackedLinears and is_plain(packed.weight)
        return cls(packed.weight if plain else None, packed)

    def into(self, x: Rows, out: Rows) -> None:
        if not self.plain:
            out.all.copy_(self._module(x.all))
        elif x.single:
            torch.mv(self.weight, x.row, out=out.row)
        else:
            torch.mm(x.all, self.turned, out=out.all)

    def add_to(self, x: Rows, out: Rows) -> None:
        if not self.plain:
            out.all.add_(self._module(x.all))
        elif x.single:
            torch.addmv(out.row, self.weight, x.row, out=out.row)
        else:
            torch.addmm(out.all, x.all, self.turned, out=out.all)


def is_plain(weight: Any) -> bool:
    return type(weight) in (Tensor, nn.Parameter) and weight.dtype == torch.float32 and weight.device.type == "cpu"


class InverseRoot:
    """`1 / sqrt(sum x^2 + eps)` over the last dimension of `[..., dim]`, into a buffer.

    Made of the operators that run before and after it: the code of others would have to be fetched first, since weights
    have gone through the caches in between. A norm of torch takes half as long again.
    """

    def __init__(self, shape: Sequence[int], eps: float) -> None:
        self._square = torch.zeros(*shape)
        self._rows = self._square.view(-1, shape[-1])
        self._eps = torch.full((self._rows.shape[0],), eps)
        self._ones = torch.ones(shape[-1])
        self._sums = torch.zeros(self._rows.shape[0])
        self._out = self._sums.view(*shape[:-1], 1)

    def __call__(self, x: Tensor) -> Tensor:
        torch.mul(x, x, out=self._square)
        torch.addmv(self._eps, self._rows, self._ones, out=self._sums)
        self._sums.rsqrt_()
        return self._out


class DecodingNorm:
    """`x / rms(x) * scale`, as `x sqrt(dim) scale / sqrt(sum x^2 + dim eps)`."""

    def __init__(self, norm: MiniMaxM3RMSNorm) -> None:
        self.dim = norm.weight.shape[0]
        self.scale = norm.scale().detach() * self.dim**0.5
        self.eps = self.dim * norm.eps

    def into(self, x: Rows, out: Rows, space: Space) -> None:
        root = space.once(("root", self.dim, self.eps), lambda: InverseRoot((space.tokens, self.dim), self.eps))
        torch.mul(torch.mul(x.all, root(x.all), out=out.all), self.scale, out=out.all)


class Activation:
    """SwiGLU-OAI of rows `[r, 2F]` into `[r, F]`, times alpha: `silu(alpha gate)` is alpha times what is wanted."""

    def __init__(self, owner: Any, rows: int, width: int) -> None:
        # A tensor: an operator makes one of a plain number each time it runs.
        self.slope = torch.tensor(owner.alpha)
        self.alpha, self.beta = owner.alpha, owner.beta
        self.gate_up, self.out = torch.zeros(rows, 2 * width), torch.zeros(rows, width)
        self.gate_up_row, self.out_row = self.gate_up[0], self.out[0]
        self.gate, self.up = self.gate_up.chunk(2, dim=-1)
        self.high = self.low = None
        if owner.limit:
            self.high = torch.full((2 * width,), owner.limit)
            self.low = torch.cat([torch.full((width,), -torch.inf), torch.full((width,), -owner.limit)])

    def __call__(self) -> None:
        if self.high is not None:
            torch.clamp(self.gate_up, self.low, self.high, out=self.gate_up)
        torch.mul(self.gate, self.slope, out=self.out)
        F.silu(self.out, inplace=True)
        if self.beta == 1.0:
            torch.addcmul(self.out, self.out, self.up, out=self.out)
        else:
            self.out.mul_(self.up.add_(self.beta))


class DecodingMLP:
    """A gated MLP, added to `x`: that of a dense layer, or a shared expert."""

    def __init__(self, mlp: MiniMaxM3MLP) -> None:
        self.mlp = mlp
        self.gate_up = Product.of_packed(mlp._packed)
        self.down = Product.of(mlp.down_proj)
        self.width = self.down.weight.shape[1]  # 0 where it is not plain

    @property
    def plain(self) -> bool:
        return self.gate_up.plain and self.down.plain

    def add_to(self, normed: Rows, x: Rows, space: Space) -> None:
        if not self.plain:
            x.all.add_(self.mlp(normed.all))
            return
        act = space.once(("mlp", self.width), lambda: Activation(self.mlp, space.tokens, self.width))
        slope = 1.0 / self.mlp.alpha
        if x.single:
            torch.mv(self.gate_up.weight, normed.row, out=act.gate_up_row)
            act()
            torch.addmv(x.row, self.down.weight, act.out_row, alpha=slope, out=x.row)
        else:
            torch.mm(normed.all, self.gate_up.turned, out=act.gate_up)
            act()
            torch.addmm(x.all, act.out, self.down.turned, alpha=slope, out=x.all)


class DecodingMoE:
    """The experts of a layer, added to `x`. For one token all of them, the shared one too, are activated together."""

    def __init__(self, moe: MiniMaxM3MoE) -> None:
        self.moe = moe
        self.gate = moe.gate.weight.detach()
        self.turned = self.gate.t()
        bias = moe.e_score_correction_bias
        self.bias: list[float] | None = None if bias is None else bias.tolist()
        self.shared = None if moe.shared_experts is None else DecodingMLP(moe.shared_experts)
        experts: Any = moe.experts
        self.plain = (
            type(experts) is MiniMaxM3Experts and experts.backend in (None, "portable")
            and is_plain(experts.w13) and is_plain(experts.w2)
        )  # fmt: skip
        if self.plain:
            self.w13, self.w2 = experts.w13.detach().unbind(), experts.w2.detach().unbind()
            self.turned_w13 = experts.w13.detach().transpose(1, 2).unbind()
            self.turned_w2 = experts.w2.detach().transpose(1, 2).unbind()
            self.width = experts.w2.shape[2]
        self.joined = self.plain and self.shared is not None and self.shared.plain and self.shared.width == self.width

    def add_to(self, normed: Rows, x: Rows, space: Space) -> None:
        logits = space.of("router", self.gate.shape[0])
        if not self.plain or not normed.single:
            torch.mm(normed.all, self.turned, out=logits.all)
            expert_ids, weights = self.moe.route(logits.all)
            if self.plain and expert_ids.numel() <= FEW_ROWS:
                experts = self.moe.experts
                activation = experts.alpha, experts.limit, experts.beta
                add_experts(x.all, normed.all, self.turned_w13, self.turned_w2, expert_ids, weights, activation)
            else:
                x.all.add_(self.moe.experts(normed.all, expert_ids, weights))
            if self.shared is not None:
                self.shared.add_to(normed, x, space)
            return
        chosen = self._route_one(normed.row, logits)
        act, gate_up, outputs = space.once(("experts", self.width, len(chosen), self.joined), self._expert_rows)
        for (expert, _), row in zip(chosen, gate_up):
            torch.mv(self.w13[expert], normed.row, out=row)
        if self.joined:
            assert self.shared is not None
            torch.mv(self.shared.gate_up.weight, normed.row, out=gate_up[-1])
        act()
        total = x.row
        for (expert, weight), row in zip(chosen, outputs):
            torch.addmv(total, self.w2[expert], row, alpha=weight, out=total)
        if self.joined:
            assert self.shared is not None
            torch.addmv(total, self.shared.down.weight, outputs[-1], alpha=1.0 / act.alpha, out=total)
        elif self.shared is not None:
            self.shared.add_to(normed, x, space)

    def _expert_rows(self) -> tuple[Activation, tuple[Tensor, ...], tuple[Tensor, ...]]:
        rows = self.moe.num_experts_per_tok + self.joined
        act = Activation(self.moe.experts, rows, self.width)
        return act, act.gate_up.unbind(), act.out.unbind()

    def _route_one(self, normed: Tensor, logits: Rows) -> list[tuple[int, float]]:
        """`MiniMaxM3MoE.route` of one token: the chosen experts, and their weights over alpha (see `Activation`)."""
        moe = self.moe
        torch.mv(self.gate, normed, out=logits.row)
        # A few numbers are sooner sorted here than by three operators.
        values: list[float] = logits.row.tolist()
        if moe.scoring_func == "sigmoid":
            scores = [1.0 / (1.0 + exp(-value)) if value > -700.0 else 0.0 for value in values]
        else:
            largest = max(values)
            scores = [exp(value - largest) for value in values]
            total = sum(scores)
            scores = [score / total for score in scores]
        choice = scores if self.bias is None else list(map(add, scores, self.bias))
        chosen = sorted(range(len(choice)), key=choice.__getitem__, reverse=True)[: moe.num_experts_per_tok]
        factor = moe.routed_scaling_factor / sum([scores[expert] for expert in chosen]) / moe.experts.alpha
        return [(expert, scores[expert] * factor) for expert in chosen]
