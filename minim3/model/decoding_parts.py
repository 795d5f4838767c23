"""Parts of a step of few new tokens (`decoding`): norms, the gated MLP and the experts.

T new tokens, H hidden size, F the width of an expert.
"""

from collections.abc import Sequence
from math import exp, inf, isnan
from operator import add
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from minim3.kernels.portable.experts import FEW_ROWS, add_experts
from minim3.model.decoding_products import Product, Rows, Space, is_plain
from minim3.model.layers import MiniMaxM3MLP, MiniMaxM3RMSNorm
from minim3.model.moe import MiniMaxM3Experts, MiniMaxM3MoE
from minim3.model.quantized import QuantizedExperts
from minim3.model.weight_formats import BareProduct

VECTOR_TOKENS = 4
"""Up to this many tokens each goes through its own experts, by products with vectors."""


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
        self._short: Tensor | None = None
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

    def short(self, factors: Tensor | float) -> Tensor:
        """The result times `factors` in bf16, which products of quantized weights take."""
        if self._short is None:
            with torch.inference_mode(False):
                self._short = torch.zeros_like(self.out, dtype=torch.bfloat16)
        return self._short.copy_(torch.mul(self.out, factors, out=self.out))


class DecodingMLP:
    """A gated MLP, added to `x`: that of a dense layer, or a shared expert."""

    def __init__(self, mlp: MiniMaxM3MLP) -> None:
        self.mlp = mlp
        self.gate_up = Product.of_packed(mlp._packed)
        self.down = Product.of(mlp.down_proj)
        self.plain = self.gate_up.plain and self.down.plain
        self.short = self.gate_up.short is not None and self.down.short is not None
        self.width = mlp.down_proj.in_features if self.plain or self.short else 0

    def add_to(self, normed: Rows, x: Rows, space: Space) -> None:
        if not (self.plain or (self.short and x.single)):
            x.all.add_(self.mlp(normed.all))
            return
        act: Activation = space.once(("mlp", self.width), lambda: Activation(self.mlp, space.tokens, self.width))
        slope = 1.0 / self.mlp.alpha
        if not self.plain:
            assert self.gate_up.short is not None
            assert self.down.short is not None
            act.gate_up.copy_(self.gate_up.short(normed.short()))
            act()
            x.all.add_(self.down.short(act.short(slope)))
        elif x.single:
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
        self.short: tuple[list[BareProduct], list[BareProduct]] | None = None
        if self.plain:
            self.w13, self.w2 = experts.w13.detach().unbind(), experts.w2.detach().unbind()
            self.turned_w13 = experts.w13.detach().transpose(1, 2).unbind()
            self.turned_w2 = experts.w2.detach().transpose(1, 2).unbind()
            self.width = experts.w2.shape[2]
        elif type(experts) is QuantizedExperts:
            bare = [[stack[n].bare() for n in range(stack.shape[0])] for stack in (experts.w13, experts.w2)]
            w13, w2 = ([product for product in products if product is not None] for products in bare)
            if len(w13) == len(w2) == experts.w2.shape[0]:
                self.short, self.width = (w13, w2), experts.w2.shape[2]
        shared = self.shared
        alike = shared is not None and shared.width == getattr(self, "width", None)
        self.joined = alike and shared is not None and (shared.plain if self.plain else shared.short)

    def add_to(self, normed: Rows, x: Rows, space: Space) -> None:
        logits = space.of("router", self.gate.shape[0])
        if normed.single and (self.plain or self.short is not None):
            chosen = self._route_one(normed.row, logits)
            rows = space.once(("experts", self.width, len(chosen), self.joined), self._expert_rows)
            if self.plain:
                self._add_plain(chosen, rows, normed.row, x.row)
            else:
                self._add_short(chosen, rows, normed.short(), x.all)
            if self.shared is not None and not self.joined:
                self.shared.add_to(normed, x, space)
            return
        torch.mm(normed.all, self.turned, out=logits.all)
        if self.plain and space.tokens <= VECTOR_TOKENS:
            self._add_few(list(map(self._choose, logits.all.tolist())), normed, x, space)
            return
        expert_ids, weights = self.moe.route(logits.all)
        if self.plain and expert_ids.numel() <= FEW_ROWS:
            experts = self.moe.experts
            activation = experts.alpha, experts.limit, experts.beta
            add_experts(x.all, normed.all, self.turned_w13, self.turned_w2, expert_ids, weights, activation)
        else:
            x.all.add_(self.moe.experts(normed.all, expert_ids, weights))
        if self.shared is not None:
            self.shared.add_to(normed, x, space)

    def _add_plain(self, chosen: list[tuple[int, float]], rows: "_ExpertRows", normed: Tensor, x: Tensor) -> None:
        for (expert, _), row in zip(chosen, rows.gate_up):
            torch.mv(self.w13[expert], normed, out=row)
        if self.joined:
            assert self.shared is not None
            torch.mv(self.shared.gate_up.weight, normed, out=rows.gate_up[-1])
        rows.act()
        for (expert, weight), row in zip(chosen, rows.out):
            torch.addmv(x, self.w2[expert], row, alpha=weight, out=x)
        if self.joined:
            assert self.shared is not None
            torch.addmv(x, self.shared.down.weight, rows.out[-1], alpha=1.0 / rows.act.alpha, out=x)

    def _add_few(self, chosen: list[list[tuple[int, float]]], normed: Rows, x: Rows, space: Space) -> None:
        """As `_add_plain`, for the choices of each of a few tokens: experts token by token, the shared one of all."""
        rows: _ExpertRows = space.once(
            ("experts of few", self.width, len(chosen[0]), self.joined), lambda: self._expert_rows(space.tokens)
        )
        gate_up, out = iter(rows.gate_up), iter(rows.out)
        for token, picks in zip(normed.each(), chosen):
            for expert, _ in picks:
                torch.mv(self.w13[expert], token, out=next(gate_up))
        if self.joined:
            assert self.shared is not None
            torch.mm(normed.all, self.shared.gate_up.turned, out=rows.act.gate_up[-space.tokens :])
        rows.act()
        for total, picks in zip(x.each(), chosen):
            for expert, weight in picks:
                torch.addmv(total, self.w2[expert], next(out), alpha=weight, out=total)
        if self.joined:
            assert self.shared is not None
            alpha = 1.0 / rows.act.alpha
            torch.addmm(x.all, rows.act.out[-space.tokens :], self.shared.down.turned, alpha=alpha, out=x.all)
        elif self.shared is not None:
            self.shared.add_to(normed, x, space)

    def _add_short(self, chosen: list[tuple[int, float]], rows: "_ExpertRows", short: Tensor, x: Tensor) -> None:
        """`short` bf16 `[1, H]`."""
        assert self.short is not None
        w13 = [self.short[0][expert] for expert, _ in chosen]
        w2 = [self.short[1][expert] for expert, _ in chosen]
        factors = [weight for _, weight in chosen]
        if self.joined:
            assert self.shared is not None
            assert self.shared.gate_up.short is not None
            assert self.shared.down.short is not None
            w13.append(self.shared.gate_up.short)
            w2.append(self.shared.down.short)
            factors.append(1.0 / rows.act.alpha)
        rows.act.gate_up.copy_(torch.cat([product(short) for product in w13]))
        rows.act()
        weighted = rows.act.short(torch.tensor(factors).unsqueeze(1)).split(1)
        outputs = torch.cat([product(row) for product, row in zip(w2, weighted)])
        x.add_(torch.sum(outputs, 0, keepdim=True, dtype=torch.float32))

    def _expert_rows(self, tokens: int = 1) -> "_ExpertRows":
        rows = tokens * (self.moe.num_experts_per_tok + self.joined)
        act = Activation(self.moe.experts, rows, self.width)
        return _ExpertRows(act, act.gate_up.unbind(), act.out.unbind())

    def _route_one(self, normed: Tensor, logits: Rows) -> list[tuple[int, float]]:
        torch.mv(self.gate, normed, out=logits.row)
        return self._choose(logits.row.tolist())

    def _choose(self, values: list[float]) -> list[tuple[int, float]]:
        """`MiniMaxM3MoE.route` of one token: the chosen experts, and their weights over alpha (see `Activation`).

        A few numbers are sooner sorted here than by three operators.
        """
        moe = self.moe
        if moe.scoring_func == "sigmoid":
            scores = [0.0 if value <= -700.0 else 1.0 / (1.0 + exp(-value)) for value in values]
        else:
            largest = max(values)
            scores = [exp(value - largest) for value in values]
            total = sum(scores)
            scores = [score / total for score in scores]
        choice = scores if self.bias is None else list(map(add, scores, self.bias))
        if isnan(sum(choice)):  # NaN ranks highest, as in torch, so that it shows
            choice = [inf if isnan(score) else score for score in choice]
        chosen = sorted(range(len(choice)), key=choice.__getitem__, reverse=True)[: moe.num_experts_per_tok]
        factor = moe.routed_scaling_factor / sum([scores[expert] for expert in chosen]) / moe.experts.alpha
        return [(expert, scores[expert] * factor) for expert in chosen]


class _ExpertRows(NamedTuple):
    """The activation of all experts of a token or a few, and its rows."""

    act: Activation
    gate_up: tuple[Tensor, ...]
    out: tuple[Tensor, ...]
