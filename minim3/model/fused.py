"""The decoder of inference where Triton runs: what its modules compute, in as few launches as it takes.

Sums meet their norms, all heads of a layer are normed, rotated and stored at once, and the choice of experts is one
launch. Nothing asks the device: a step whose lengths only the device knows runs the same way, so that a CUDA graph may
hold it (`minim3.inference.graphs`). What has no form here (an adapter, a hook, another norm) is left to the modules.

Shape legend: T new tokens of N sequences, H hidden size.
"""

import logging
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from minim3 import kernels
from minim3.config import MiniMaxM3VLTextConfig
from minim3.kernels import DevicePlan, PagedPlan, availability
from minim3.kernels.sequences import Lengths
from minim3.model.attention import MiniMaxM3Attention
from minim3.model.batch import ForwardBatch, LayerPages
from minim3.model.decoder import Block, MiniMaxM3TextModel
from minim3.model.decoding import Watch
from minim3.model.layers import MiniMaxM3MLP, MiniMaxM3RMSNorm, PackedLinears, rotary_table
from minim3.model.moe import MiniMaxM3Experts, MiniMaxM3MoE, MiniMaxM3Router
from minim3.model.mtp import MiniMaxM3MTPBlock
from minim3.model.native_matrices import NoForm

logger = logging.getLogger(__name__)

_OPS = (
    "norm_rope_store", "select_blocks_paged", "paged_attention", "block_sparse_attention_paged", "grouped_experts",
    "swiglu_oai",
)  # fmt: skip


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
        self, model: nn.Module, config: MiniMaxM3VLTextConfig, blocks: Sequence[nn.Module], norm: nn.Module,
        joint: MiniMaxM3MTPBlock | None = None,
    ) -> None:  # fmt: skip
        with torch.inference_mode(False), torch.no_grad():
            self._layers = [_Layer(block) for block in blocks]
        self._config, self._norm, self._joint = config, _known(norm), joint
        if joint is not None:
            _known(joint.enorm), _known(joint.hnorm)
        self._device = self._norm.weight.device
        self._watch, self._told = Watch(model), False

    @classmethod
    def of(cls, model: MiniMaxM3TextModel) -> "FusedModel | None":
        """The model in this form; None where Triton does not run it, or where it holds a module not known here."""
        if type(model) is not MiniMaxM3TextModel:
            return None
        return cls._made(model, model.config, list(model.layers), model.norm)

    def draft_module(self, module: MiniMaxM3MTPBlock, config: MiniMaxM3VLTextConfig) -> "FusedModel | None":
        """A MTP module of this model in this form; None where it has none."""
        if type(module) is not MiniMaxM3MTPBlock:
            return None
        return self._made(module, config, [module.transformer_layer], module.final_layernorm, module)

    @classmethod
    def _made(cls, *parts: Any) -> "FusedModel | None":
        try:
            return cls(*parts)
        except NoForm as reason:
            logger.info("inference runs the modules, not passes fused in Triton: %s", reason)
            return None

    def why_no_graph(self, pages: Sequence[LayerPages]) -> str | None:
        """Why a CUDA graph cannot hold a step over these pages, or None: what runs must not ask the device."""
        return next(filter(None, (layer.why_no_graph(pages[layer.cache_index]) for layer in self._layers)), None)

    def unchanged(self) -> bool:
        """Whether the model is the one that was prepared: no weight moved, no module or hook added."""
        unchanged = self._watch.unchanged()
        if not unchanged and not self._told:
            logger.info("inference runs the modules: the model has changed since it was prepared")
        self._told = not unchanged
        return unchanged

    def forward_packed(
        self, inputs_embeds: Tensor, batch: ForwardBatch, hidden: Tensor | None = None
    ) -> Tensor | None:
        """As `MiniMaxM3TextModel.forward_packed`, or with `hidden` as a MTP module, both `[T, H]`.

        None without pages, where gradients or autocast are wanted, for pages no kernel takes, and for a changed model.
        """
        if batch.pages is None or torch.is_grad_enabled() or torch.is_autocast_enabled(self._device.type):
            return None
        stored = batch.pages.layers[self._layers[0].cache_index].k.dtype
        if stored != inputs_embeds.dtype and availability.why_not_cache(stored, self._device.type) is not None:
            return None
        if not self.unchanged():
            return None
        if self._device.type != "cuda":
            return self.run(inputs_embeds, Step.of(batch), hidden)
        with torch.cuda.device(self._device):  # Triton launches on the current one
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


def _known(norm: nn.Module) -> MiniMaxM3RMSNorm:
    if type(norm) is not MiniMaxM3RMSNorm or not norm.gemma:
        raise NoForm("a norm is not centred on 0")
    return norm


class _Layer:
    """A block of modules known here, packed; raises NoForm for another."""

    def __init__(self, block: nn.Module) -> None:
        if type(block) is not Block or type(block.self_attn) is not MiniMaxM3Attention:
            raise NoForm("a block is of another class")
        self.before_attention, self.before_mlp = _known(block.input_layernorm), _known(block.post_attention_layernorm)
        attention, indexer = block.self_attn, block.self_attn.indexer
        weight = self.before_mlp.weight
        if attention.backend not in (None, "triton"):
            raise NoForm(f"attention is to run {attention.backend}")
        for op in _OPS:
            choice = kernels.choose(attention.backend, op, weight.device, weight.dtype)
            if choice.name != "triton":
                raise NoForm(f"{op} runs {choice.name}: {choice.reason}")
        packed: Any = attention._packed
        if packed is None or not packed.is_current(attention):
            raise NoForm("the projections of a layer are not packed")
        self.cache_index, self.attention = block.cache_index, attention
        self.project, self.dim = packed.linears, attention.head_dim
        self.heads = attention.num_heads, attention.num_kv_heads, 0 if indexer is None else indexer.num_index_heads
        norms = [attention.q_norm, attention.k_norm]
        norms += [] if indexer is None else [indexer.index_q_norm, indexer.index_k_norm]
        rows = [_known(norm).weight.expand(count, -1) for norm, count in zip(norms, packed.heads, strict=True)]
        self.head_weight, self.head_eps = torch.cat(rows), attention.q_norm.eps
        self.selection: dict[str, Any] | None = None if indexer is None else indexer.selection
        self.moe: MiniMaxM3MoE | None = block.block_sparse_moe if block.is_moe_layer else None
        if self.moe is not None and type(self.moe) is not MiniMaxM3MoE:
            raise NoForm(f"the experts of a layer are a {type(self.moe).__name__}")
        self.shared: MiniMaxM3MLP | None = block.mlp if self.moe is None else self.moe.shared_experts
        self.gate_up: Any = None
        if self.shared is not None:
            if type(self.shared) is not MiniMaxM3MLP or self.shared._packed is None:
                raise NoForm("a gated MLP is not packed")
            self.gate_up = self.shared._packed

    def why_no_graph(self, pages: LayerPages) -> str | None:
        products = [self.project, self.attention.o_proj]
        products += [] if self.shared is None else [self.gate_up, self.shared.down_proj]
        products += [] if self.moe is None else [self.moe.gate, self.moe.experts]
        for product in products:
            if type(product) not in (PackedLinears, nn.Linear, MiniMaxM3Router, MiniMaxM3Experts):
                return f"{type(product).__name__} may ask the device"
        weight = self.before_mlp.weight
        q = torch.empty(1, self.heads[0], self.dim, dtype=weight.dtype, device=weight.device)
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
        from minim3.kernels.triton.routing import route

        shared, moe = None, self.moe
        if self.shared is not None:
            mlp = self.shared
            gate, up = self.gate_up(normed).chunk(2, dim=-1)
            act = kernels.swiglu_oai(gate, up, mlp.alpha, mlp.limit, mlp.beta, implementation=mlp.backend)
            shared = mlp.down_proj(act)
        if moe is None:
            assert shared is not None
            return shared, None
        expert_ids, weights = route(
            moe.gate(normed), moe.e_score_correction_bias, top_k=moe.num_experts_per_tok,
            scoring_func=moe.scoring_func, factor=moe.routed_scaling_factor,
        )  # fmt: skip
        return moe.experts(normed, expert_ids, weights), shared
