"""The decoder for few new tokens of each sequence: what its modules compute, in as few operations as it takes.

A step of decoding on a CPU is short: reading the weights of a small model takes a few milliseconds, and an operator
call of eager PyTorch a few microseconds. So nothing is made anew here: every operation writes into a buffer of the
`_Space` of its number of tokens, whose views are made with it, and what layers share is made once a step. A projection
that is not a plain fp32 weight (another format, an adapter) is called as the module it is.

Shape legend: T new tokens, H hidden size, R heads of all normed projections, D their dimension.
"""

from collections.abc import Callable, Sequence
from operator import attrgetter, is_
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from minim3 import kernels
from minim3.kernels.portable.paged import FEW_TOKENS
from minim3.kernels.portable.plan import CacheRows
from minim3.kernels.portable.step import Indexer, StepAttention
from minim3.model.attention import MiniMaxM3Attention, PackedProjection
from minim3.model.batch import ForwardBatch, LayerPages
from minim3.model.decoder import Block, MiniMaxM3TextModel
from minim3.model.layers import MiniMaxM3MLP, MiniMaxM3RMSNorm, PackedLinears, RotaryFactors
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


class _Norm:
    """`x / rms(x) * scale`, as `x sqrt(dim) scale / sqrt(|x|^2 + dim eps)`; the root is a hypotenuse."""

    def __init__(self, norm: MiniMaxM3RMSNorm) -> None:
        dim = norm.weight.shape[0]
        self.scale = norm.scale().detach() * dim**0.5
        self.root_eps = torch.tensor((dim * norm.eps) ** 0.5)

    def into(self, x: Tensor, size: Tensor, out: Tensor) -> None:
        torch.linalg.vector_norm(x, dim=-1, keepdim=True, out=size)
        torch.hypot(size, self.root_eps, out=size)
        torch.mul(torch.div(x, size, out=out), self.scale, out=out)


class _Activation:
    """SwiGLU-OAI of rows `[r, 2F]` into `[r, F]`, times alpha: `silu(alpha gate)` is alpha times what is wanted."""

    def __init__(self, owner: Any, rows: int, width: int) -> None:
        self.alpha, self.beta = owner.alpha, owner.beta
        self.gate_up, self.out = torch.zeros(rows, 2 * width), torch.zeros(rows, width)
        self.gate, self.up = self.gate_up.chunk(2, dim=-1)
        self.high = self.low = None
        if owner.limit:
            self.high = torch.full((2 * width,), owner.limit)
            self.low = torch.cat([torch.full((width,), -torch.inf), torch.full((width,), -owner.limit)])

    def __call__(self) -> None:
        if self.high is not None:
            torch.clamp(self.gate_up, self.low, self.high, out=self.gate_up)
        gate = self.gate if self.alpha == 1.0 else torch.mul(self.gate, self.alpha, out=self.out)
        torch.ops.aten.silu.out(gate, out=self.out)
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
        torch.mm(normed.all, self.gate_up.turned, out=act.gate_up)
        act()
        torch.addmm(x.all, act.out, self.down.turned, alpha=1.0 / self.mlp.alpha, out=x.all)


class _MoE:
    """The experts of a layer, added to `x`. For one token all of them, the shared one too, are activated together."""

    def __init__(self, moe: MiniMaxM3MoE) -> None:
        self.moe = moe
        self.gate = moe.gate.weight.detach()
        self.turned = self.gate.t()
        self.shared = None if moe.shared_experts is None else _MLP(moe.shared_experts)
        experts: Any = moe.experts
        self.plain = (
            type(experts) is MiniMaxM3Experts and experts.backend in (None, "portable")
            and _is_plain(experts.w13) and _is_plain(experts.w2)
        )  # fmt: skip
        if self.plain:
            self.w13, self.w2 = experts.w13.detach().unbind(), experts.w2.detach().unbind()
            self.width = experts.w2.shape[2]
        self.joined = self.plain and self.shared is not None and self.shared.plain and self.shared.width == self.width

    def add_to(self, normed: _Rows, x: _Rows, space: _Space) -> None:
        logits = space.of("router", self.gate.shape[0])
        if not self.plain or not normed.single:
            torch.mm(normed.all, self.turned, out=logits.all)
            expert_ids, weights = self.moe.route(logits.all)
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
        scores = logits.row.sigmoid() if moe.scoring_func == "sigmoid" else logits.row.softmax(-1)
        bias = moe.e_score_correction_bias
        choice = scores if bias is None else scores + bias
        chosen = choice.topk(moe.num_experts_per_tok, sorted=False).indices.tolist()
        values = scores.tolist()
        factor = moe.routed_scaling_factor / sum([values[expert] for expert in chosen]) / moe.experts.alpha
        return [(expert, values[expert] * factor) for expert in chosen]


class _Heads:
    """The buffers of all heads of the projections of a kind of layer."""

    def __init__(self, tokens: int, heads: Sequence[int], num_values: int, dim: int, half: int) -> None:
        normed = sum(heads)
        self.rows = _Rows(torch.zeros(tokens, (normed + num_values) * dim))
        projected = self.rows.all.view(tokens, normed + num_values, dim)
        self.before, self.values = projected[:, :normed], projected[:, normed:]
        self.size = torch.zeros(tokens, normed, 1)
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
        self.root_eps = packed.scale.sum_eps.sqrt()
        self.selection: dict[str, Any] | None = None
        if attention.indexer is not None:
            self.selection = {k: v for k, v in attention.indexer.selection.items() if k != "implementation"}

    @property
    def kind(self) -> tuple[Any, ...]:
        """Layers of one kind share what is made once a step."""
        return self.dim, *self.heads, self.num_values, *(self.selection or {}).values()

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
            ("heads", *self.heads, self.num_values, self.dim, half),
            lambda: _Heads(space.tokens, self.heads, self.num_values, self.dim, half),
        )
        stores = [(batch.pages.token_rows(count), new, kept) for count, new, kept in heads.stored]
        return _Step(attend, rows, index_rows, rotary, heads, stores)

    def add_to(self, normed: _Rows, x: _Rows, step: "_Step", pages: LayerPages) -> None:
        heads, rotary = step.heads, step.rotary
        self.project.into(normed, heads.rows)
        torch.linalg.vector_norm(heads.before, dim=-1, keepdim=True, out=heads.size)
        torch.hypot(heads.size, self.root_eps, out=heads.size)
        torch.mul(torch.div(heads.before, heads.size, out=heads.normed), self.scale, out=heads.normed)
        torch.mul(heads.normed, rotary.cos, out=heads.turned)
        torch.addcmul(heads.turned_first, heads.second, rotary.sin, value=-1, out=heads.turned_first)
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
        self._spaces: dict[int, _Space] = {}
        self._watch = _Watch(model)

    @classmethod
    def of(cls, model: MiniMaxM3TextModel) -> "DecodingModel | None":
        """The model, packed for inference, in this form; None where it has none (another device, dtype or module)."""
        layers = []
        with torch.inference_mode(False), torch.no_grad():
            if type(model) is not MiniMaxM3TextModel or not _is_plain(model.norm.weight):
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
        freqs_cis = self.model.make_freqs_cis(batch.positions)
        steps: dict[tuple[Any, ...], _Step] = {}
        for kind, layer in self._kinds.items():
            pages = batch.pages.layers[layer.cache_index]
            rotary = batch.rotary_factors(freqs_cis, layer.attention.dim)
            step = layer.attention.prepare(pages, batch, space, rotary) if pages.k.dtype == torch.float32 else None
            if step is None:
                return None
            steps[kind] = step
        hidden_size = inputs_embeds.shape[1]
        x, normed, size = space.of("x", hidden_size), space.of("normed", hidden_size), space.of("size", 1)
        x.all.copy_(inputs_embeds)
        for layer in self._layers:
            layer.before_attention.into(x.all, size.all, normed.all)
            layer.attention.add_to(normed, x, steps[layer.kind], batch.pages.layers[layer.cache_index])
            layer.before_mlp.into(x.all, size.all, normed.all)
            layer.mlp.add_to(normed, x, space)
        self._norm.into(x.all, size.all, normed.all)
        return normed.all.clone()


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
        self._versions = [tensor._version for tensor in self._tensors]

    def unchanged(self) -> bool:
        # Loops of C: this runs in every step, over every module and weight.
        return (
            all(map(is_, map(dict.get, self._holders, self._names), self._known))
            and list(map(Tensor.data_ptr, self._tensors)) == self._pointers
            and list(map(_VERSION, self._tensors)) == self._versions
            and not any(self._hooks)
        )
