"""The decoder for few new tokens of each sequence: what its modules compute, in as few operations as it takes.

A step of decoding on a CPU is short: reading the weights of a small model takes a few milliseconds, and an operator
call of eager PyTorch a few microseconds. So nothing is made anew here: every operation writes into a buffer of the
`_Space` of its number of tokens, whose views are made with it, and what layers share is made once a step. A projection
that is not a plain fp32 weight (another format, an adapter) is called as the module it is.

Shape legend: T new tokens, H hidden size, R heads of all normed projections, D their dimension.
"""

from collections.abc import Callable, Sequence
from math import exp
from operator import add, attrgetter, is_
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from minim3 import kernels
from minim3.kernels.portable.experts import FEW_ROWS, add_experts
from minim3.kernels.portable.paged import FEW_TOKENS
from minim3.kernels.portable.plan import CacheRows
from minim3.kernels.portable.step import Indexer, StepAttention
from minim3.model.attention import MiniMaxM3Attention, PackedProjection
from minim3.model.batch import ForwardBatch, LayerPages
from minim3.model.decoder import Block, MiniMaxM3TextModel
from minim3.model.layers import MiniMaxM3MLP, MiniMaxM3RMSNorm, PackedLinears, RotaryFactors, rotary_frequencies
from minim3.model.moe import MiniMaxM3Experts, MiniMaxM3MoE

MOST_TOKENS = 256
"""Beyond, a step is long and the modules run it."""

_KEPT_SPACES = 4


class _Rows:
    """A buffer `[T, n]`, and its first row: the only one if `single`."""

    def __init__(self, rows: Tensor) -> None:
        self.all = rows
        self.row = rows[0]
        self.single = rows.shape[0] == 1


class _Space:
    """The buffers of a number of tokens. `of` hands out the same one for the same name and width."""

    def __init__(self, tokens: int) -> None:
        self.tokens = tokens
        self._made: dict[Any, Any] = {}

    def of(self, name: str, width: int) -> _Rows:
        return self.once((name, width), lambda: _Rows(torch.zeros(self.tokens, width)))

    def once(self, key: Any, make: Callable[[], Any]) -> Any:
        made = self._made.get(key)
        if made is None:
            with torch.inference_mode(False):  # what is made serves in and outside of inference mode
                made = self._made[key] = make()
        return made


class _Product:
    """`x @ weight.T` for a plain fp32 weight, or what a module in its place computes."""

    def __init__(self, weight: Tensor | None, module: Callable[[Any], Any]) -> None:
        self.plain = weight is not None
        self.weight = torch.empty(0, 0) if weight is None else weight
        self.turned = self.weight.t()
        self._module = module

    @classmethod
    def of(cls, module: nn.Module) -> "_Product":
        plain = isinstance(module, nn.Linear) and type(module) is nn.Linear and module.bias is None
        weight = module.get_parameter("weight").detach() if plain else None
        return cls(weight if _is_plain(weight) else None, module)

    @classmethod
    def of_packed(cls, packed: Any) -> "_Product":
        plain = type(packed) is PackedLinears and _is_plain(packed.weight)
        return cls(packed.weight if plain else None, packed)

    def into(self, x: _Rows, out: _Rows) -> None:
        if not self.plain:
            out.all.copy_(self._module(x.all))
        elif x.single:
            torch.mv(self.weight, x.row, out=out.row)
        else:
            torch.mm(x.all, self.turned, out=out.all)

    def add_to(self, x: _Rows, out: _Rows) -> None:
        if not self.plain:
            out.all.add_(self._module(x.all))
        elif x.single:
            torch.addmv(out.row, self.weight, x.row, out=out.row)
        else:
            torch.addmm(out.all, x.all, self.turned, out=out.all)


def _is_plain(weight: Any) -> bool:
    return type(weight) in (Tensor, nn.Parameter) and weight.dtype == torch.float32 and weight.device.type == "cpu"


class _InverseRoot:
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


class _Norm:
    """`x / rms(x) * scale`, as `x sqrt(dim) scale / sqrt(sum x^2 + dim eps)`."""

    def __init__(self, norm: MiniMaxM3RMSNorm) -> None:
        self.dim = norm.weight.shape[0]
        self.scale = norm.scale().detach() * self.dim**0.5
        self.eps = self.dim * norm.eps

    def into(self, x: _Rows, out: _Rows, space: _Space) -> None:
        root = space.once(("root", self.dim, self.eps), lambda: _InverseRoot((space.tokens, self.dim), self.eps))
        torch.mul(torch.mul(x.all, root(x.all), out=out.all), self.scale, out=out.all)


class _Activation:
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


class _MLP:
    """A gated MLP, added to `x`: that of a dense layer, or a shared expert."""

    def __init__(self, mlp: MiniMaxM3MLP) -> None:
        self.mlp = mlp
        self.gate_up = _Product.of_packed(mlp._packed)
        self.down = _Product.of(mlp.down_proj)
        self.width = self.down.weight.shape[1]  # 0 where it is not plain

    @property
    def plain(self) -> bool:
        return self.gate_up.plain and self.down.plain

    def add_to(self, normed: _Rows, x: _Rows, space: _Space) -> None:
        if not self.plain:
            x.all.add_(self.mlp(normed.all))
            return
        act = space.once(("mlp", self.width), lambda: _Activation(self.mlp, space.tokens, self.width))
        slope = 1.0 / self.mlp.alpha
        if x.single:
            torch.mv(self.gate_up.weight, normed.row, out=act.gate_up_row)
            act()
            torch.addmv(x.row, self.down.weight, act.out_row, alpha=slope, out=x.row)
        else:
            torch.mm(normed.all, self.gate_up.turned, out=act.gate_up)
            act()
            torch.addmm(x.all, act.out, self.down.turned, alpha=slope, out=x.all)


class _MoE:
    """The experts of a layer, added to `x`. For one token all of them, the shared one too, are activated together."""

    def __init__(self, moe: MiniMaxM3MoE) -> None:
        self.moe = moe
        self.gate = moe.gate.weight.detach()
        self.turned = self.gate.t()
        bias = moe.e_score_correction_bias
        self.bias: list[float] | None = None if bias is None else bias.tolist()
        self.shared = None if moe.shared_experts is None else _MLP(moe.shared_experts)
        experts: Any = moe.experts
        self.plain = (
            type(experts) is MiniMaxM3Experts and experts.backend in (None, "portable")
            and _is_plain(experts.w13) and _is_plain(experts.w2)
        )  # fmt: skip
        if self.plain:
            self.w13, self.w2 = experts.w13.detach().unbind(), experts.w2.detach().unbind()
            self.turned_w13 = experts.w13.detach().transpose(1, 2).unbind()
            self.turned_w2 = experts.w2.detach().transpose(1, 2).unbind()
            self.width = experts.w2.shape[2]
        self.joined = self.plain and self.shared is not None and self.shared.plain and self.shared.width == self.width

    def add_to(self, normed: _Rows, x: _Rows, space: _Space) -> None:
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

    def _expert_rows(self) -> tuple[_Activation, tuple[Tensor, ...], tuple[Tensor, ...]]:
        rows = self.moe.num_experts_per_tok + self.joined
        act = _Activation(self.moe.experts, rows, self.width)
        return act, act.gate_up.unbind(), act.out.unbind()

    def _route_one(self, normed: Tensor, logits: _Rows) -> list[tuple[int, float]]:
        """`MiniMaxM3MoE.route` of one token: the chosen experts, and their weights over alpha (see `_Activation`)."""
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


class _Heads:
    """The buffers of all heads of the projections of a kind of layer."""

    def __init__(
        self, tokens: int, heads: Sequence[int], num_values: int, dim: int, half: int, eps: float
    ) -> None:
        normed = sum(heads)
        self.rows = _Rows(torch.zeros(tokens, (normed + num_values) * dim))
        projected = self.rows.all.view(tokens, normed + num_values, dim)
        self.before, self.values = projected[:, :normed], projected[:, normed:]
        self.root = _InverseRoot((tokens, normed, dim), eps)
        self.normed = torch.zeros(tokens, normed, dim)
        self.turned = torch.zeros(tokens, normed, dim)
        self.first, self.second = self.normed[..., :half], self.normed[..., half : 2 * half]
        self.turned_first, self.turned_second = self.turned[..., :half], self.turned[..., half : 2 * half]
        parts = self.turned.split_with_sizes(list(heads), dim=1)
        self.q, keys = parts[0], [parts[1], self.values, *parts[3:]]
        self.index_q = parts[2] if len(parts) > 2 else None
        # k, v and index k as rows to store: a view for one token, a copy to be made for several.
        self.stored = [(x.shape[1], x, x.reshape(-1, dim) if tokens == 1 else None) for x in keys]


class _Attention:
    """Norm, projections, rotation, page store, selection, attention and output projection, added to `x`."""

    def __init__(self, attention: MiniMaxM3Attention, packed: PackedProjection) -> None:
        self.attention = attention
        self.dim, self.heads = packed.head_dim, packed.heads
        self.project = _Product.of_packed(packed.linears)
        self.output = _Product.of(attention.o_proj)
        self.num_values = attention.num_kv_heads
        self.group = attention.num_heads // attention.num_kv_heads
        # Scores are scaled here, with the queries.
        factors = [self.dim**-0.5, 1.0, self.dim**-0.5, 1.0][: len(self.heads)]
        rows = torch.cat([torch.full((n, 1), factor) for n, factor in zip(self.heads, factors)])
        self.scale = packed.scale.scale * rows
        self.eps = float(packed.scale.sum_eps)
        self.selection: dict[str, Any] | None = None
        if attention.indexer is not None:
            self.selection = {k: v for k, v in attention.indexer.selection.items() if k != "implementation"}

    @property
    def kind(self) -> tuple[Any, ...]:
        """Layers of one kind share what is made once a step."""
        return self.dim, *self.heads, self.num_values, self.eps, *(self.selection or {}).values()

    def prepare(self, pages: LayerPages, batch: ForwardBatch, space: _Space, rotary: RotaryFactors) -> "_Step | None":
        """What the layers of this kind share in this step; None if it has no form here."""
        assert batch.pages is not None
        selection, index_rows, indexer = self.selection, None, None
        sparse = selection is not None and batch.max_length_k > selection["topk_blocks"] * selection["block_size"]
        rows = CacheRows.of(pages.k, selection["block_size"] if sparse and selection else pages.k.shape[-2])
        if sparse:
            assert selection is not None
            assert pages.index_k is not None
            index_rows = CacheRows.of(pages.index_k, selection["block_size"])
            indexer = Indexer(index_rows, self.heads[2], self.dim, selection)
        attend = StepAttention.of(batch.plan, rows, self.group, self.dim, indexer)
        if attend is None:
            return None
        half = rotary.sin.shape[-1]
        heads: _Heads = space.once(
            ("heads", *self.heads, self.num_values, self.dim, half, self.eps),
            lambda: _Heads(space.tokens, self.heads, self.num_values, self.dim, half, self.eps),
        )
        stores = [(batch.pages.token_rows(count), new, kept) for count, new, kept in heads.stored]
        return _Step(attend, rows, index_rows, rotary, -rotary.sin, heads, stores)

    def add_to(self, normed: _Rows, x: _Rows, step: "_Step", pages: LayerPages) -> None:
        heads, rotary = step.heads, step.rotary
        self.project.into(normed, heads.rows)
        torch.mul(heads.before, heads.root(heads.before), out=heads.normed)
        torch.mul(heads.normed, self.scale, out=heads.normed)
        torch.mul(heads.normed, rotary.cos, out=heads.turned)
        torch.addcmul(heads.turned_first, heads.second, step.minus_sin, out=heads.turned_first)
        torch.addcmul(heads.turned_second, heads.first, rotary.sin, out=heads.turned_second)
        for place, (slots, new, rows) in zip(pages.tokens, step.stores):
            place.index_copy_(0, slots, new.reshape(-1, self.dim) if rows is None else rows)
        k_rows, index_rows = pages.rows(step.layout, step.index_layout)
        out = step.attend(heads.q, heads.index_q, k_rows, pages.tokens[1], index_rows)
        self.output.add_to(_Rows(out.view(x.all.shape[0], -1)), x)


class _Step(NamedTuple):
    """What the layers of a kind share in a step.

    stores: where the new k, v and index k go, those as heads, and as rows where that is a view.
    """

    attend: StepAttention
    layout: CacheRows
    index_layout: CacheRows | None
    rotary: RotaryFactors
    minus_sin: Tensor
    heads: _Heads
    stores: list[tuple[Tensor, Tensor, Tensor | None]]


class _Layer:
    def __init__(self, block: Block, packed: PackedProjection) -> None:
        self.cache_index = block.cache_index
        self.before_attention = _Norm(block.input_layernorm)
        self.attention = _Attention(block.self_attn, packed)
        self.kind = self.attention.kind
        self.before_mlp = _Norm(block.post_attention_layernorm)
        self.mlp: _MoE | _MLP = _MoE(block.block_sparse_moe) if block.is_moe_layer else _MLP(block.mlp)


class DecodingModel:
    """A text model for steps of few new tokens. Made by `of`; not for use by two threads at once: it owns buffers."""

    def __init__(self, model: MiniMaxM3TextModel, layers: Sequence[_Layer]) -> None:
        self.model = model
        self._layers = layers
        self._kinds = {layer.kind: layer for layer in layers}
        self._norm = _Norm(model.norm)
        self._frequencies = rotary_frequencies(model.config.rotary_dim, model.config.rope_theta)
        self._head_dim = model.config.head_dim
        self._spaces: dict[int, _Space] = {}
        self._watch = _Watch(model)

    @classmethod
    def of(cls, model: MiniMaxM3TextModel) -> "DecodingModel | None":
        """The model, packed for inference, in this form; None where it has none (another device, dtype or module)."""
        layers = []
        with torch.inference_mode(False), torch.no_grad():
            if type(model) is not MiniMaxM3TextModel or not _is_plain(model.norm.weight):
                return None
            if not model.config.swiglu_alpha:  # `_Activation` divides by it
                return None
            for block in model.layers:
                packed = _packed_projection(block)
                if packed is None:
                    return None
                layers.append(_Layer(block, packed))  # type: ignore[arg-type]
            return cls(model, layers)

    def forward_packed(self, inputs_embeds: Tensor, batch: ForwardBatch) -> Tensor | None:
        """As `MiniMaxM3TextModel.forward_packed`; None for what has no such form: another step, or a changed model."""
        tokens = batch.num_tokens
        if batch.pages is None or tokens > MOST_TOKENS or inputs_embeds.dtype != torch.float32:
            return None
        if torch.is_grad_enabled() or max(batch.lengths_q) > FEW_TOKENS or not self._watch.unchanged():
            return None
        space = self._spaces.get(tokens)
        if space is None:
            space = self._spaces[tokens] = _Space(tokens)
            while len(self._spaces) > _KEPT_SPACES:
                self._spaces.pop(next(iter(self._spaces)))
        rotary = self._rotary(batch.positions)
        steps: dict[tuple[Any, ...], _Step] = {}
        for kind, layer in self._kinds.items():
            pages = batch.pages.layers[layer.cache_index]
            step = layer.attention.prepare(pages, batch, space, rotary) if pages.k.dtype == torch.float32 else None
            if step is None:
                return None
            steps[kind] = step
        hidden_size = inputs_embeds.shape[1]
        x, normed = space.of("x", hidden_size), space.of("normed", hidden_size)
        x.all.copy_(inputs_embeds)
        for layer in self._layers:
            layer.before_attention.into(x, normed, space)
            layer.attention.add_to(normed, x, steps[layer.kind], batch.pages.layers[layer.cache_index])
            layer.before_mlp.into(x, normed, space)
            layer.mlp.add_to(normed, x, space)
        self._norm.into(x, normed, space)
        return normed.all.clone()


    def _rotary(self, positions: Tensor) -> RotaryFactors:
        """`RotaryFactors` of `[T]` positions, from the frequencies of `rotary_table`."""
        half = self._frequencies.shape[0]
        angles = positions.float()[:, None, None] * self._frequencies
        cos = torch.ones(positions.shape[0], 1, self._head_dim)
        torch.cos(angles, out=cos[..., :half])
        cos[..., half : 2 * half] = cos[..., :half]
        return RotaryFactors(cos, angles.sin_())


def _packed_projection(block: nn.Module) -> PackedProjection | None:
    """The packing of a block that consists of the modules known here, all of them packed."""
    if type(block) is not Block or type(block.self_attn) is not MiniMaxM3Attention:
        return None
    attention, mlp = block.self_attn, block._modules.get("mlp")
    packed = attention._packed
    if packed is None or attention.backend not in (None, "portable") or not packed.is_current(attention):
        return None
    if kernels.resolve(attention.backend, "paged_attention", "cpu", torch.float32) != "portable":
        return None
    if block.is_moe_layer:
        moe = block.block_sparse_moe
        if type(moe) is not MiniMaxM3MoE or moe.gate.weight.dtype != torch.float32:
            return None
        mlp = moe.shared_experts
    if mlp is not None and (type(mlp) is not MiniMaxM3MLP or mlp._packed is None):
        return None
    norms = [block.input_layernorm, block.post_attention_layernorm]
    return packed if all(type(norm) is MiniMaxM3RMSNorm and _is_plain(norm.weight) for norm in norms) else None


_VERSION = attrgetter("_version")


class _Watch:
    """Notices a module, parameter, buffer or hook that was not there when the model was prepared."""

    def __init__(self, model: nn.Module) -> None:
        self._holders: list[dict[str, Any]] = []
        self._names: list[str] = []
        self._hooks: list[Any] = []
        for module in model.modules():
            self._hooks += [module._forward_hooks, module._forward_pre_hooks]
            for held in (module._modules, module._parameters, module._buffers):
                self._holders += [held] * len(held)
                self._names += held
        self._known = [held[name] for held, name in zip(self._holders, self._names)]
        self._tensors = [known for known in self._known if isinstance(known, Tensor)]
        self._pointers = [tensor.data_ptr() for tensor in self._tensors]
        self._counted = [tensor for tensor in self._tensors if not tensor.is_inference()]  # the others count no changes
        self._versions = [tensor._version for tensor in self._counted]

    def unchanged(self) -> bool:
        # Loops of C: this runs in every step, over every module and weight.
        return (
            all(map(is_, map(dict.get, self._holders, self._names), self._known))
            and list(map(Tensor.data_ptr, self._tensors)) == self._pointers
            and list(map(_VERSION, self._counted)) == self._versions
            and not any(self._hooks)
        )
