"""The decoder of inference where Triton runs: what its modules compute, in as few launches as it takes.

Sums meet their norms, all heads of a layer are normed, rotated and stored at once, and the choice of experts is one
launch. Nothing asks the device: a step whose lengths only the device knows runs the same way, so that a CUDA graph may
hold it (`minim3.inference.graphs`). What has no form here (an adapter, a hook, another norm) is left to the modules.

Shape legend: T new tokens of N sequences, H hidden size.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from minim3 import kernels
from minim3.config import MiniMaxM3VLTextConfig
from minim3.kernels import DevicePlan, PagedPlan, availability
from minim3.kernels.sequences import Lengths
from minim3.model.attention import MiniMaxM3Attention
from minim3.model.batch import ForwardBatch, LayerPages
from minim3.model.decoder import Block, MiniMaxM3TextModel
from minim3.model.decoding import Watch
from minim3.model.layers import MiniMaxM3MLP, MiniMaxM3RMSNorm, rotary_table
from minim3.model.moe import MiniMaxM3Experts, MiniMaxM3MoE
from minim3.model.mtp import MiniMaxM3MTPBlock

_OPS = "norm_rope_store", "select_blocks_paged", "paged_attention", "block_sparse_attention_paged", "grouped_experts"


class Step(NamedTuple):
    """New tokens over their pages: positions int64 `[T]`, slots int64 `[T]` (-1: not stored), pages of each layer.

    page_table: int64 `[N, max_pages]`; lengths_k: of each sequence with its new tokens; longest: none is longer.
    """

    positions: Tensor
    slots: Tensor
    layers: Sequence[LayerPages]
    page_table: Tensor
    lengths_k: Lengths
    cu_seqlens_q: Lengths
    plan: PagedPlan | DevicePlan
    longest: int

    @classmethod
    def of(cls, batch: ForwardBatch) -> "Step":
        pages = batch.pages
        assert pages is not None
        return cls(
            batch.positions, pages.slots, pages.layers, pages.page_table, batch.lengths_k, batch.cu_seqlens_q,
            batch.plan, batch.max_length_k,
        )  # fmt: skip


class FusedModel:
    """A text model, or a MTP module (`draft_module`), packed for inference. Made by `of`."""

    def __init__(
        self, model: nn.Module, config: MiniMaxM3VLTextConfig, layers: "Sequence[_Layer]", norm: MiniMaxM3RMSNorm,
        joint: MiniMaxM3MTPBlock | None = None,
    ) -> None:  # fmt: skip
        self._config, self._layers, self._norm, self._joint = config, layers, norm, joint
        self._watch = Watch(model)

    @classmethod
    def of(cls, model: MiniMaxM3TextModel) -> "FusedModel | None":
        """The model in this form; None where Triton does not run it, or where it holds a module not known here."""
        layers = _layers(list(model.layers)) if type(model) is MiniMaxM3TextModel and _known([model.norm]) else None
        return None if layers is None else cls(model, model.config, layers, model.norm)

    def draft_module(self, module: MiniMaxM3MTPBlock, config: MiniMaxM3VLTextConfig) -> "FusedModel | None":
        """A MTP module of this model in this form; None where it has none."""
        if type(module) is not MiniMaxM3MTPBlock or not _known([module.enorm, module.hnorm, module.final_layernorm]):
            return None
        layers = _layers([module.transformer_layer])
        return None if layers is None else FusedModel(module, config, layers, module.final_layernorm, module)

    def why_no_graph(self, pages: Sequence[LayerPages]) -> str | None:
        """Why a CUDA graph cannot hold a step over these pages, or None: what runs must not ask the device."""
        return next(filter(None, (layer.why_no_graph(pages[layer.cache_index]) for layer in self._layers)), None)

    def unchanged(self) -> bool:
        """Whether the model is the one that was prepared: no weight moved, no module or hook added."""
        return self._watch.unchanged()

    def forward_packed(
        self, inputs_embeds: Tensor, batch: ForwardBatch, hidden: Tensor | None = None
    ) -> Tensor | None:
        """As `MiniMaxM3TextModel.forward_packed`, or with `hidden` as a MTP module, both `[T, H]`.

        None without pages, where gradients are wanted, and for a changed model.
        """
        if batch.pages is None or torch.is_grad_enabled() or not self.unchanged():
            return None
        return self.run(inputs_embeds, Step.of(batch), hidden)

    def run(self, inputs_embeds: Tensor, step: Step, hidden: Tensor | None = None) -> Tensor:
        """`[T, H]` -> `[T, H]`, after the final norm."""
        if self._joint is not None:
            module = self._joint
            assert hidden is not None
            halves = [_add_norm(inputs_embeds, None, module.enorm)[0], _add_norm(hidden, None, module.hnorm)[0]]
            inputs_embeds = module.eh_proj(torch.cat(halves, dim=-1))
        freqs_cis = rotary_table(step.positions, self._config.rotary_dim, self._config.rope_theta)
        x: Tensor | None = None
        new, more = inputs_embeds, None
        for layer in self._layers:
            normed, x = _add_norm(new, x, layer.before_attention, more)
            normed, x = _add_norm(layer.attend(normed, freqs_cis, step), x, layer.before_mlp)
            new, more = layer.mlp(normed)
        return _add_norm(new, x, self._norm, more)[0]


def _add_norm(
    x: Tensor, residual: Tensor | None, norm: MiniMaxM3RMSNorm, more: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    from minim3.kernels.triton.fused import add_norm  # Triton is imported where it runs, and nowhere else

    return add_norm(x, residual, norm.weight, eps=norm.eps, more=more)


def _known(norms: Sequence[nn.Module]) -> bool:
    return all(type(norm) is MiniMaxM3RMSNorm and norm.gemma for norm in norms)


def _layers(blocks: Sequence[nn.Module]) -> "list[_Layer] | None":
    layers = []
    with torch.inference_mode(False), torch.no_grad():
        for block in blocks:
            if type(block) is not Block or not _runs(block):
                return None
            layers.append(_Layer(block))
    return layers


def _runs(block: Block) -> bool:
    attention, weight = block.self_attn, block.input_layernorm.weight
    if type(attention) is not MiniMaxM3Attention or not _known([block.input_layernorm, block.post_attention_layernorm]):
        return False
    run = [kernels.resolve(attention.backend, op, weight.device, weight.dtype) for op in _OPS]
    if set(run) != {"triton"} or attention._packed is None or not attention._packed.is_current(attention):
        return False
    mlp = block._modules.get("mlp")
    if block.is_moe_layer:
        moe = block.block_sparse_moe
        mlp = moe.shared_experts
        if type(moe) is not MiniMaxM3MoE or moe.gate.weight.dtype != torch.float32:
            return False
    return mlp is None or (type(mlp) is MiniMaxM3MLP and mlp._packed is not None)


class _Layer:
    def __init__(self, block: Block) -> None:
        attention, indexer = block.self_attn, block.self_attn.indexer
        packed: Any = attention._packed
        self.cache_index = block.cache_index
        self.attention = attention
        self.before_attention, self.before_mlp = block.input_layernorm, block.post_attention_layernorm
        self.project = packed.linears
        self.dim = attention.head_dim
        self.heads = attention.num_heads, attention.num_kv_heads, 0 if indexer is None else indexer.num_index_heads
        norms = [attention.q_norm, attention.k_norm]
        norms += [] if indexer is None else [indexer.index_q_norm, indexer.index_k_norm]
        rows = [norm.weight.expand(count, -1) for norm, count in zip(norms, packed.heads, strict=True)]
        self.head_weight, self.head_eps = torch.cat(rows), attention.q_norm.eps
        self.selection: dict[str, Any] | None = None if indexer is None else indexer.selection
        self.moe: MiniMaxM3MoE | None = block.block_sparse_moe if block.is_moe_layer else None
        self.shared: MiniMaxM3MLP | None = block.mlp if self.moe is None else self.moe.shared_experts

    def why_no_graph(self, pages: LayerPages) -> str | None:
        if self.moe is not None and type(self.moe.experts) is not MiniMaxM3Experts:
            return f"{type(self.moe.experts).__name__} ask which experts were chosen"
        weight = self.attention.o_proj.weight
        q = torch.empty(1, self.heads[0], self.dim, dtype=self.before_mlp.weight.dtype, device=weight.device)
        reason = availability.why_not_attention(q, pages.k, pages.v, None, 1, None, paged=True)
        if self.selection is None or reason is not None:
            return reason
        assert pages.index_k is not None
        index_q, sizes = q[:, : self.heads[2]], (self.selection["block_size"], self.selection["topk_blocks"], None)
        return availability.why_not_attention(q, pages.k, pages.v, *sizes, paged=True) or (
            availability.why_not_selection(index_q, pages.index_k, *sizes, paged=True)
        )

    def attend(self, normed: Tensor, freqs_cis: Tensor, step: Step) -> Tensor:
        """Normed `[T, H]` -> what is added to the hidden states; the new keys and values are stored."""
        from minim3.kernels.triton.rotation import norm_rope_store_packed

        attention, selection = self.attention, self.selection
        pages = step.layers[self.cache_index]
        heads = norm_rope_store_packed(
            self.project(normed).view(normed.shape[0], -1, self.dim), self.head_weight, freqs_cis, eps=self.head_eps,
            heads=self.heads, pages=(pages.k, pages.v, pages.index_k), slots=step.slots,
        )  # fmt: skip
        q_heads, kv_heads, index_heads = self.heads
        q = heads[:, :q_heads]
        over = step.page_table, step.lengths_k
        # Up to top-k blocks of context the choice is "all of them".
        if selection is not None and step.longest > selection["topk_blocks"] * selection["block_size"]:
            assert pages.index_k is not None
            first = q_heads + kv_heads
            ids = kernels.select_blocks_paged(
                heads[:, first : first + index_heads], pages.index_k, *over, step.cu_seqlens_q, plan=step.plan,
                **selection,
            )  # fmt: skip
            out, _ = kernels.block_sparse_attention_paged(
                q, pages.k, pages.v, *over, ids, step.cu_seqlens_q, block_size=selection["block_size"],
                implementation=attention.backend, plan=step.plan,
            )  # fmt: skip
        else:
            out, _ = kernels.paged_attention(
                q, pages.k, pages.v, *over, step.cu_seqlens_q, implementation=attention.backend, plan=step.plan
            )
        added: Tensor = attention.o_proj(out.flatten(-2))
        return added

    def mlp(self, normed: Tensor) -> tuple[Tensor, Tensor | None]:
        """Normed `[T, H]` -> what is added to the hidden states, in two parts or one."""
        from minim3.kernels.triton.fused import swiglu_oai
        from minim3.kernels.triton.routing import route

        shared, moe = None, self.moe
        if self.shared is not None:
            mlp = self.shared
            assert mlp._packed is not None
            shared = mlp.down_proj(swiglu_oai(mlp._packed(normed), mlp.alpha, mlp.limit, mlp.beta))
        if moe is None:
            assert shared is not None
            return shared, None
        expert_ids, weights = route(
            F.linear(normed.float(), moe.gate.weight), moe.e_score_correction_bias, top_k=moe.num_experts_per_tok,
            scoring_func=moe.scoring_func, factor=moe.routed_scaling_factor,
        )  # fmt: skip
        return moe.experts(normed, expert_ids, weights), shared
