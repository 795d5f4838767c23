"""The decoder for few new tokens of each sequence: what its modules compute, in as few operations as it takes.

A step of decoding on a CPU is short: reading the weights of a small model takes a few milliseconds, and an operator
call of eager PyTorch a few microseconds, since the weights that went through the caches have driven its code out. So
nothing is made anew here: every operation writes into a buffer of the `Space` of its number of tokens, whose views are
made with it; what layers share is made once a step; and among ways to compute the same, the one is taken whose
operators ran just before. `torch.ops.*` is not called: that takes tens of microseconds longer than functions of torch.

A projection that is not a plain fp32 weight (another format, an adapter) is called as the module it is.

Shape legend: T new tokens, H hidden size, R heads of all normed projections, D their dimension.
"""

from collections.abc import Sequence
from functools import partial
from operator import attrgetter, is_
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from minim3 import kernels
from minim3.config import MiniMaxM3VLTextConfig
from minim3.kernels.portable.paged import FEW_TOKENS
from minim3.kernels.portable.plan import CacheRows
from minim3.kernels.portable.step import Indexer, StepAttention
from minim3.model.attention import MiniMaxM3Attention, PackedProjection
from minim3.model.batch import ForwardBatch, LayerPages
from minim3.model.decoder import Block, MiniMaxM3TextModel
from minim3.model.decoding_parts import DecodingMLP, DecodingMoE, DecodingNorm, InverseRoot
from minim3.model.decoding_products import Product, Rows, Space, is_plain
from minim3.model.layers import MiniMaxM3MLP, MiniMaxM3RMSNorm, RotaryFactors, rotary_frequencies
from minim3.model.moe import MiniMaxM3MoE
from minim3.model.mtp import MiniMaxM3MTPBlock
from minim3.model.quantized import QuantizedExperts, QuantizedLinear

MOST_TOKENS = 256
"""Beyond, a step is long and the modules run it."""

_KEPT_SPACES = 4


class _Heads:
    """The buffers of all heads of the projections of a kind of layer."""

    def __init__(
        self, tokens: int, heads: Sequence[int], num_values: int, dim: int, half: int, eps: float
    ) -> None:
        normed = sum(heads)
        self.rows = Rows(torch.zeros(tokens, (normed + num_values) * dim))
        projected = self.rows.all.view(tokens, normed + num_values, dim)
        self.before, self.values = projected[:, :normed], projected[:, normed:]
        self.root = InverseRoot((tokens, normed, dim), eps)
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
        self.project = Product.of_packed(packed.linears)
        self.output = Product.of(attention.o_proj)
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

    def prepare(self, pages: LayerPages, batch: ForwardBatch, space: Space, rotary: RotaryFactors) -> "_Step | None":
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

    def add_to(self, normed: Rows, x: Rows, step: "_Step", pages: LayerPages) -> None:
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
        self.output.add_to(Rows(out.reshape(x.all.shape[0], -1)), x)


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
        self.before_attention = DecodingNorm(block.input_layernorm)
        self.attention = _Attention(block.self_attn, packed)
        self.kind = self.attention.kind
        self.before_mlp = DecodingNorm(block.post_attention_layernorm)
        moe = block.is_moe_layer
        self.mlp: DecodingMoE | DecodingMLP = DecodingMoE(block.block_sparse_moe) if moe else DecodingMLP(block.mlp)


class _Joint:
    """What a MTP module gives its block: `eh_proj(cat[enorm(embedding), hnorm(hidden)])`."""

    def __init__(self, module: MiniMaxM3MTPBlock) -> None:
        self.before_embedding, self.before_hidden = DecodingNorm(module.enorm), DecodingNorm(module.hnorm)
        self.project = Product.of(module.eh_proj)

    def into(self, embeds: Tensor, hidden: Tensor, x: Rows, space: Space) -> None:
        both = space.of("joint", 2 * x.all.shape[1])
        first, second = space.once("halves of joint", lambda: [Rows(half) for half in both.all.chunk(2, dim=-1)])
        self.before_embedding.into(Rows(embeds), first, space)
        self.before_hidden.into(Rows(hidden), second, space)
        self.project.into(both, x)


class DecodingModel:
    """A text model for steps of few new tokens. Made by `of`; not for use by two threads at once: it owns buffers.

    `draft_module` makes one of a MTP module, which differs in what its block is given (`_Joint`).
    """

    def __init__(
        self, model: nn.Module, config: MiniMaxM3VLTextConfig, layers: Sequence[_Layer], norm: MiniMaxM3RMSNorm,
        joint: "_Joint | None" = None, beside: "DecodingModel | None" = None,
    ) -> None:  # fmt: skip
        self.model = model
        self._layers = layers
        self._kinds = {layer.kind: layer for layer in layers}
        self._joint = joint
        self._norm = DecodingNorm(norm)
        self._frequencies = rotary_frequencies(config.rotary_dim, config.rope_theta)
        self._head_dim = config.head_dim
        # What runs beside another over the same batch shares its buffers, and what it has made for the step.
        self._spaces: dict[int, Space] = {} if beside is None else beside._spaces
        self._watch: Watch = Watch(model) if beside is None else beside._watch

    @classmethod
    def of(cls, model: MiniMaxM3TextModel) -> "DecodingModel | None":
        """The model, packed for inference, in this form; None where it has none (another device, dtype or module)."""
        layers = []
        with torch.inference_mode(False), torch.no_grad():
            if type(model) is not MiniMaxM3TextModel or not is_plain(model.norm.weight):
                return None
            if not model.config.swiglu_alpha:  # `Activation` divides by it
                return None
            for block in model.layers:
                packed = _packed_projection(block)
                if packed is None:
                    return None
                layers.append(_Layer(block, packed))  # type: ignore[arg-type]
            return cls(model, model.config, layers, model.norm)

    def draft_module(self, module: MiniMaxM3MTPBlock, config: MiniMaxM3VLTextConfig) -> "DecodingModel | None":
        """A MTP module of this model, packed for inference, in this form; None where it has none."""
        with torch.inference_mode(False), torch.no_grad():
            norms = module.enorm, module.hnorm, module.final_layernorm
            if type(module) is not MiniMaxM3MTPBlock or not all(is_plain(norm.weight) for norm in norms):
                return None
            packed = _packed_projection(module.transformer_layer) if config.swiglu_alpha else None
            joint = _Joint(module)
            if packed is None or not joint.project.plain:
                return None
            layer = _Layer(module.transformer_layer, packed)
            return DecodingModel(module, config, [layer], module.final_layernorm, joint, self)

    def forward_packed(
        self, inputs_embeds: Tensor, batch: ForwardBatch, hidden: Tensor | None = None
    ) -> Tensor | None:
        """As `MiniMaxM3TextModel.forward_packed`, or with `hidden` as a MTP module, both `[T, H]`.

        None for what has no such form: another step, or a changed model.
        """
        tokens = batch.num_tokens
        if batch.pages is None or tokens > MOST_TOKENS or inputs_embeds.dtype != torch.float32:
            return None
        if torch.is_grad_enabled() or max(batch.lengths_q) > FEW_TOKENS:
            return None
        # A draft module that runs after its model in a step relies on the model's look.
        watched = self._joint is not None and batch.plan.once(self._watch, self._watch.unchanged)
        if not (watched or self._watch.unchanged()):
            return None
        batch.plan.once(self._watch, lambda: True)
        space = self._spaces.get(tokens)
        if space is None:
            space = self._spaces[tokens] = Space(tokens)
            while len(self._spaces) > _KEPT_SPACES:
                self._spaces.pop(next(iter(self._spaces)))
        rotary = batch.plan.once("rotary", lambda: self._rotary(batch.positions))
        steps: dict[tuple[Any, ...], _Step] = {}
        for kind, layer in self._kinds.items():
            pages = batch.pages.layers[layer.cache_index]
            if pages.k.dtype != torch.float32:
                return None
            make = partial(layer.attention.prepare, pages, batch, space, rotary)
            step = batch.plan.once(("step of kind", kind), make)
            if step is None:
                return None
            steps[kind] = step
        hidden_size = inputs_embeds.shape[1]
        x, normed = space.of("x", hidden_size), space.of("normed", hidden_size)
        if self._joint is None:
            x.all.copy_(inputs_embeds)
        else:
            assert hidden is not None
            self._joint.into(inputs_embeds, hidden, x, space)
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
    if kernels.resolve(attention.backend, "paged_attention", "cpu", torch.float32) not in ("portable", "native"):
        return None
    if block.is_moe_layer:
        moe = block.block_sparse_moe
        if type(moe) is not MiniMaxM3MoE or moe.gate.weight.dtype != torch.float32:
            return None
        mlp = moe.shared_experts
    if mlp is not None and (type(mlp) is not MiniMaxM3MLP or mlp._packed is None):
        return None
    norms = [block.input_layernorm, block.post_attention_layernorm]
    return packed if all(type(norm) is MiniMaxM3RMSNorm and is_plain(norm.weight) for norm in norms) else None


_VERSION, _MATRIX = attrgetter("_version"), attrgetter("matrix")


class Watch:
    """Notices a module, parameter, buffer or hook that was not there when the model was prepared."""

    def __init__(self, model: nn.Module) -> None:
        modules = list(model.modules())
        self._holders = [
            held
            for module in modules
            for held in (module._modules, module._parameters, module._buffers)
            if held or held is module._modules  # a module without children may get one
        ]
        self._known = [dict(held) for held in self._holders]
        # What holds weights outside of parameters.
        self._linears = [module for module in modules if isinstance(module, QuantizedLinear)]
        self._matrices = [module.matrix for module in self._linears]
        experts = [module for module in modules if isinstance(module, QuantizedExperts)]
        self._stacks = [stack.matrices for module in experts for stack in (module.w13, module.w2)]
        self._stacked = [list(matrices) for matrices in self._stacks]
        self._hooks = [hooks for module in modules for hooks in (module._forward_hooks, module._forward_pre_hooks)]
        self._tensors = [*model.parameters(), *model.buffers()]
        self._pointers = [tensor.data_ptr() for tensor in self._tensors]
        # Of norms and biases there are copies. Tensors of inference mode count no changes.
        self._counted = [tensor for tensor in self._tensors if tensor.dim() == 1 and not tensor.is_inference()]
        self._versions = [tensor._version for tensor in self._counted]

    def unchanged(self) -> bool:
        # Loops of C: this runs in every step, over every module and weight.
        try:
            # The same objects, or it is asked whether they are equal.
            same = self._holders == self._known and self._stacks == self._stacked
        except RuntimeError:  # as of tensors, which give more than one answer
            return False
        return (
            same
            and all(map(is_, map(_MATRIX, self._linears), self._matrices))
            and list(map(Tensor.data_ptr, self._tensors)) == self._pointers
            and list(map(_VERSION, self._counted)) == self._versions
            and not any(self._hooks)
        )
