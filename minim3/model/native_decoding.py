"""The decoder for few new tokens of each sequence, in one call of the kernels in C (`minim3.kernels.native`).

Here the modules of a model are described to it: where their weights lie, and what is made of their norms. It reads the
weights themselves, fp32 or quantized; of norms and router biases it has copies. What it has no form for (an adapter,
another format, a hook) is left to `decoding` and to the modules.
"""

import logging
from collections.abc import Sequence
from operator import is_
from typing import Any

import torch
from torch import Tensor, nn

from minim3 import kernels
from minim3.config import MiniMaxM3VLTextConfig
from minim3.kernels import native
from minim3.kernels.portable.paged import FEW_TOKENS
from minim3.model.attention import MiniMaxM3Attention
from minim3.model.batch import ForwardBatch, LayerPages
from minim3.model.causal_lm import CausalLM
from minim3.model.decoder import Block, MiniMaxM3TextModel
from minim3.model.decoding import Watch
from minim3.model.decoding_products import is_plain
from minim3.model.layers import MiniMaxM3MLP, MiniMaxM3RMSNorm, rotary_frequencies
from minim3.model.moe import MiniMaxM3Experts, MiniMaxM3MoE
from minim3.model.mtp import MiniMaxM3MTPBlock
from minim3.model.native_matrices import NoForm, structure_of
from minim3.model.quantized import QuantizedExperts, QuantizedLinear
from minim3.model.weight_formats import WeightMatrix

logger = logging.getLogger(__name__)


class NativeDecodingModel:
    """A text model for steps of few new tokens, or a MTP module (`draft_module`). Made by `of`; not thread-safe."""

    def __init__(
        self, model: nn.Module, config: MiniMaxM3VLTextConfig, blocks: Sequence[Block], norm: MiniMaxM3RMSNorm,
        joint: MiniMaxM3MTPBlock | None = None, watch: Watch | None = None,
    ) -> None:  # fmt: skip
        known = _Known()
        layers = (native.Layer * len(blocks))(*[_layer(block, config, known) for block in blocks])
        self._model = native.Model(
            hidden=config.hidden_size, layers=len(blocks), half=config.rotary_dim // 2,
            frequencies=known.copy(rotary_frequencies(config.rotary_dim, config.rope_theta)), layer=layers,
            last=known.norm(norm),
        )  # fmt: skip
        if joint is not None:
            self._model.joint = known.matrices([known.linear(joint.eh_proj)])
            self._model.before_embedding, self._model.before_hidden = known.norm(joint.enorm), known.norm(joint.hnorm)
        self._known, self._blocks = (known, layers), blocks
        self._is_draft = joint is not None
        self._watch = Watch(model) if watch is None else watch
        self._steps = native.Steps(self._model)
        self._layers: list[LayerPages] = []
        self._pages: Any = None

    @classmethod
    def of(cls, model: MiniMaxM3TextModel) -> "NativeDecodingModel | None":
        """The model in this form; None where the kernels do not run, or do not know a module of it."""
        if type(model) is not MiniMaxM3TextModel or not is_plain(model.norm.weight) or not _runs(model.layers):
            return None
        return cls._made(model, model.config, list(model.layers), model.norm)

    def draft_module(self, module: MiniMaxM3MTPBlock, config: MiniMaxM3VLTextConfig) -> "NativeDecodingModel | None":
        """A MTP module of this model in this form; None where it has none."""
        if type(module) is not MiniMaxM3MTPBlock or not _runs([module.transformer_layer]):
            return None
        return self._made(module, config, [module.transformer_layer], module.final_layernorm, module, self._watch)

    @classmethod
    def _made(cls, *parts: Any) -> "NativeDecodingModel | None":
        with torch.inference_mode(False), torch.no_grad():
            try:
                return cls(*parts)
            except NoForm as reason:
                logger.info("decoder_step does not run native: %s", reason)
                return None

    def forward_packed(self, inputs_embeds: Tensor, batch: ForwardBatch, hidden: Tensor | None = None) -> Tensor | None:
        """As `MiniMaxM3TextModel.forward_packed`, or with `hidden` as a MTP module, both `[T, H]`.

        None for what has no such form: another step, or a changed model.
        """
        pages, limits = batch.pages, native.limits()
        if pages is None or batch.num_tokens > limits.tokens or max(batch.lengths_q) > limits.of_a_sequence:
            return None
        if inputs_embeds.dtype != torch.float32 or torch.is_grad_enabled():
            return None
        most_new, keys = max(batch.lengths_q), batch.max_length_k
        if most_new > native.SOME_TOKENS and keys > limits.keys:
            return None
        if most_new > FEW_TOKENS and batch.num_tokens * keys > limits.pairs:
            return None
        # A draft module that runs after its model in a step relies on the model's look.
        watched = self._is_draft and batch.plan.once(self._watch, self._watch.unchanged)
        if not (watched or self._watch.unchanged()) or not self._take_pages(pages.layers):
            return None
        batch.plan.once(self._watch, lambda: True)
        embeds, out = inputs_embeds.contiguous(), torch.empty_like(inputs_embeds, memory_format=torch.contiguous_format)
        before = None if hidden is None else hidden.contiguous()
        positions, slots, table = batch.positions.contiguous(), pages.slots.contiguous(), pages.page_table
        done = self._steps.run(
            native.Batch(
                tokens=batch.num_tokens, sequences=len(batch.lengths_q), page_size=pages.page_size,
                table_stride=table.stride(0), lengths_q=native.integers(batch.lengths_q),
                lengths_k=native.integers(batch.lengths_k), positions=positions.data_ptr(), slots=slots.data_ptr(),
                page_table=native.address(table), pages=self._pages, embeds=embeds.data_ptr(),
                hidden=None if before is None else before.data_ptr(), out=out.data_ptr(),
            )
        )  # fmt: skip
        return out if done else None

    def _take_pages(self, layers: Sequence[LayerPages]) -> bool:
        """Note where the pages of the blocks lie; False where they are not fp32."""
        own = [layers[block.cache_index] for block in self._blocks]
        if len(own) == len(self._layers) and all(map(is_, own, self._layers)):
            return True
        if any(x.dtype != torch.float32 or not x.is_contiguous() for layer in own for x in layer.tokens):
            return False
        self._pages = (native.Pages * len(own))(*[native.Pages(*[x.data_ptr() for x in p.tokens]) for p in own])
        self._layers = own
        return True


class NativeHead:
    """The product of hidden states and the vocabulary, in the kernels in C where they run."""

    def __init__(self, model: Any) -> None:
        """`model`: either model class, whose head may be replaced later."""
        self._model = model
        self._of: tuple[Any, Any] | None = None
        self._known, self._matrix = _Known(), native.Matrix()
        if not isinstance(model, CausalLM) or type(model).compute_logits is not CausalLM.compute_logits:
            return
        head = model.get_output_embeddings()
        if not is_plain(model.text_model.norm.weight) or not _runs(model.text_model.layers):
            return
        try:
            with torch.inference_mode(False), torch.no_grad():
                self._matrix = self._known.linear(head)
        except NoForm as reason:
            logger.info("the vocabulary product does not run native: %s", reason)
            return
        self._of = head, self._state(head)

    def __call__(self, hidden: Tensor) -> Tensor:
        """`[R, H]` -> logits `[R, vocab]`."""
        if self._of is not None and hidden.shape[0] <= native.limits().tokens and hidden.dtype == torch.float32:
            head = self._model.get_output_embeddings()
            same = head is self._of[0] and self._state(head) == self._of[1]
            if same and not (head._forward_hooks or head._forward_pre_hooks or torch.is_grad_enabled()):
                return native.product(self._matrix, hidden)
        logits: Tensor = self._model.compute_logits(hidden)
        return logits

    @staticmethod
    def _state(head: Any) -> Any:
        return id(head.matrix) if type(head) is QuantizedLinear else head.weight.data_ptr()


class _Known:
    """Structures of modules, and what they point to, which is kept as long."""

    def __init__(self) -> None:
        self._kept: list[Any] = []

    def copy(self, values: Tensor) -> int:
        """Address of a dense fp32 copy."""
        kept = values.detach().float().contiguous().clone()
        self._kept.append(kept)
        return kept.data_ptr()

    def norm(self, norm: nn.Module) -> native.Norm:
        if type(norm) is not MiniMaxM3RMSNorm or not is_plain(norm.weight):
            raise NoForm(f"a norm is a {type(norm).__name__} or not in fp32 on the CPU")
        return native.Norm(scale=self.copy(norm.scale()), eps=norm.eps)

    def linear(self, module: nn.Module) -> native.Matrix:
        if type(module) is QuantizedLinear:
            return self.quantized(module.matrix)
        if type(module) is not nn.Linear or module.bias is not None:
            raise NoForm(f"a projection is a {type(module).__name__}")
        return self.plain(module.weight)

    def plain(self, weight: Tensor) -> native.Matrix:
        if not is_plain(weight) or weight.stride(1) != 1:
            raise NoForm("a weight is not dense fp32 on the CPU")
        self._kept.append(weight)
        rows, columns = weight.shape
        return native.Matrix(rows=rows, columns=columns, stride=weight.stride(0), codes=weight.data_ptr())

    def quantized(self, matrix: WeightMatrix | None, first: int = 0, last: int | None = None) -> native.Matrix:
        """Rows `first..last` of a matrix."""
        self._kept.append(matrix)
        return structure_of(matrix, first, last)

    def matrices(self, listed: Sequence[native.Matrix]) -> Any:
        array = (native.Matrix * len(listed))(*listed)
        self._kept.append(array)
        return array


def _layer(block: Block, config: MiniMaxM3VLTextConfig, known: _Known) -> native.Layer:
    attention = block.self_attn
    if type(block) is not Block or type(attention) is not MiniMaxM3Attention or attention._packed is None:
        raise NoForm("a layer is not packed, or of another class")
    packed, indexer, dim = attention._packed, attention.indexer, attention.head_dim
    heads, kv_heads = attention.num_heads, attention.num_kv_heads
    if not packed.is_current(attention) or dim % native.lanes() or heads // kv_heads > native.MOST_ROWS:
        raise NoForm(f"heads of {dim}, {heads // kv_heads} to a KV head, or packed weights that were replaced")
    index_heads, selection = 0, native.Selection()
    projections = [attention.q_proj, attention.k_proj]
    if indexer is not None:
        index_heads = indexer.num_index_heads
        if index_heads != kv_heads or index_heads > native.MOST_ROWS or indexer.topk_blocks > native.MOST_TOPK:
            raise NoForm(f"{index_heads} index heads beside {kv_heads} KV heads")
        projections += [indexer.index_q_proj, indexer.index_k_proj]
        selection = native.Selection(
            topk=indexer.topk_blocks, block=indexer.block_size, init=indexer.init_blocks, local=indexer.local_blocks,
            lse=indexer.score_type == "lse",
        )  # fmt: skip
    # Scores are scaled here, with the queries.
    factors = [dim**-0.5, 1.0, dim**-0.5, 1.0][: len(packed.heads)]
    rows = torch.cat([torch.full((n, 1), factor) for n, factor in zip(packed.heads, factors, strict=True)])
    projections.append(attention.v_proj)
    return native.Layer(
        before_attention=known.norm(block.input_layernorm), before_experts=known.norm(block.post_attention_layernorm),
        projections=len(projections), project=known.matrices([known.linear(p) for p in projections]),
        output=known.matrices([known.linear(attention.o_proj)]), head_scale=known.copy(packed.scale.scale * rows),
        head_eps=float(packed.scale.sum_eps), heads=heads, kv_heads=kv_heads, index_heads=index_heads, dim=dim,
        selection=selection, experts=_experts(block, known),
    )  # fmt: skip


def _experts(block: Block, known: _Known) -> native.Experts:
    """The experts of a MoE layer, the shared one last; or the MLP of a dense layer, as if it were shared."""
    found = native.Experts(factor=1.0)
    shared, products = block._modules.get("mlp"), []
    if block.is_moe_layer:
        moe = block.block_sparse_moe
        experts, shared = moe.experts, moe.shared_experts
        if type(moe) is not MiniMaxM3MoE or type(experts) not in (MiniMaxM3Experts, QuantizedExperts):
            raise NoForm(f"experts are {type(experts).__name__}")
        if not is_plain(moe.gate.weight):
            raise NoForm("a router is not in fp32")
        width = experts.w2.shape[2]
        if type(experts) is QuantizedExperts:
            for n in range(experts.w2.shape[0]):
                halves = [known.quantized(experts.w13[n], first, first + width) for first in (0, width)]
                products.append((*halves, known.quantized(experts.w2[n])))
        else:
            for w13, w2 in zip(experts.w13, experts.w2, strict=True):
                products.append((*map(known.plain, w13.split(width)), known.plain(w2)))
        found.experts, found.per_token, found.factor = len(products), moe.num_experts_per_tok, moe.routed_scaling_factor
        found.softmax = moe.scoring_func != "sigmoid"
        if not moe.gate.weight.is_contiguous():
            raise NoForm("a router is not dense")
        found.router = known.plain(moe.gate.weight).codes
        if moe.e_score_correction_bias is not None:
            bias = moe.e_score_correction_bias  # which training changes in place
            found.bias = bias.data_ptr() if is_plain(bias) and bias.is_contiguous() else known.copy(bias)
        found.act = native.Activation(experts.alpha, experts.limit or 0.0, experts.beta)
    if shared is not None:
        if type(shared) is not MiniMaxM3MLP:
            raise NoForm(f"a gated MLP is a {type(shared).__name__}")
        products.append((known.linear(shared.gate_proj), known.linear(shared.up_proj), known.linear(shared.down_proj)))
        found.shared, found.shared_act = 1, native.Activation(shared.alpha, shared.limit or 0.0, shared.beta)
    gate, up, down = zip(*products, strict=True)
    found.gate_proj, found.up_proj, found.down_proj = map(known.matrices, (gate, up, down))
    return found


def _runs(blocks: Any) -> bool:
    """Whether the kernels run for these blocks: no other implementation was asked for, and there is a compiler."""
    return all(
        isinstance(block, Block)
        and kernels.resolve(block.self_attn.backend, "decoder_step", "cpu", torch.float32) == "native"
        for block in blocks
    )
