"""Grouped-query attention, and the lightning indexer that chooses its key blocks.

Shapes: T new tokens, S tokens of the sequences in all, Hq / Hkv / Hi query, key-value and index heads, D / Di their
dimensions. One index head serves one KV head and the query heads that share it.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from minim3 import kernels
from minim3.config import MiniMaxM3VLTextConfig
from minim3.kernels.reference import build_block_sparse_attn_bias
from minim3.model.batch import ForwardBatch, ForwardRecord, LayerChoices, LayerPages
from minim3.model.layers import (
    MiniMaxM3RMSNorm,
    PackedLinears,
    PackedScale,
    RotaryFactors,
    apply_rotary,
    at_least_fp32,
    norm_rotate,
    pack_linears,
)
from minim3.model.padding import run_packed
from minim3.model.recall import selection_recall


class MiniMaxM3Indexer(nn.Module):
    """Scores every visible key with a few small heads and keeps, per query and KV group, the best blocks of keys.

    It has no value and no output: all it hands on is the choice. `sparse_cfg` (the `sparse_attention_config` of a
    released `config.json`) takes precedence over the fields of `config`.
    """

    def __init__(
        self, config: MiniMaxM3VLTextConfig, sparse_cfg: Mapping[str, Any] | None = None, backend: str | None = None
    ) -> None:
        super().__init__()
        sparse_cfg = sparse_cfg or {}
        self.backend = backend
        self.num_index_heads: int = sparse_cfg.get("sparse_num_index_heads", config.index_n_heads)
        self.index_head_dim: int = sparse_cfg.get("sparse_index_dim", config.index_head_dim)
        self.block_size: int = sparse_cfg.get("sparse_block_size", config.index_block_size)
        self.topk_blocks: int = sparse_cfg.get("sparse_topk_blocks", config.index_topk_blocks)
        self.init_blocks: int = sparse_cfg.get("sparse_init_block", config.index_init_blocks)
        self.local_blocks: int = sparse_cfg.get("sparse_local_block", config.index_local_blocks)
        self.score_type: str = sparse_cfg.get("sparse_score_type", config.index_score_type)
        self.index_q_proj = nn.Linear(config.hidden_size, self.num_index_heads * self.index_head_dim, bias=False)
        self.index_k_proj = nn.Linear(config.hidden_size, self.index_head_dim, bias=False)
        self.index_q_norm = MiniMaxM3RMSNorm(self.index_head_dim, config.rms_norm_eps, backend=backend)
        self.index_k_norm = MiniMaxM3RMSNorm(self.index_head_dim, config.rms_norm_eps, backend=backend)

    @property
    def selection(self) -> dict[str, Any]:
        """The keyword arguments of `kernels.select_blocks`."""
        return {
            "block_size": self.block_size,
            "topk_blocks": self.topk_blocks,
            "init_blocks": self.init_blocks,
            "local_blocks": self.local_blocks,
            "score_type": self.score_type,
            "implementation": self.backend,
        }

    def project(self, x: Tensor, freqs_cis: Tensor) -> tuple[Tensor, Tensor]:
        """`x` `[..., H]` -> index queries `[..., Hi, Di]` and the one index key `[..., 1, Di]`, normed and rotated."""
        index_q = self.index_q_proj(x).unflatten(-1, (self.num_index_heads, self.index_head_dim))
        index_k = self.index_k_proj(x).unflatten(-1, (1, self.index_head_dim))
        return norm_rotate(index_q, self.index_q_norm, freqs_cis), norm_rotate(index_k, self.index_k_norm, freqs_cis)

    def forward(self, x: Tensor, *, freqs_cis: Tensor, num_q_heads: int) -> Tensor:
        """The choice as a bias, 0 where a query attends, -inf elsewhere: `x` `[B, S, H]` -> `[B, num_q_heads, S, S]`.

        Quadratic in S: made to look at, the model itself never builds it.
        """
        index_q, index_k = self.project(x, freqs_cis)
        return build_block_sparse_attn_bias(
            index_q,
            index_k,
            block_size=self.block_size,
            topk_blocks=self.topk_blocks,
            init_blocks=self.init_blocks,
            local_blocks=self.local_blocks,
            num_q_heads=num_q_heads,
            score_type=self.score_type,
        )


class MiniMaxM3Attention(nn.Module):
    """Causal grouped-query attention with per-head norms and partial rotary positions; full, or block-sparse."""

    def __init__(
        self, config: MiniMaxM3VLTextConfig, backend: str | None = None, is_sparse_attention_layer: bool = False
    ) -> None:
        super().__init__()
        self.backend = backend
        self.num_heads = config.num_attention_heads
        self.num_kv_heads = config.num_key_value_heads
        self.head_dim = config.head_dim
        self.use_qk_norm = config.use_qk_norm
        self.q_proj = nn.Linear(config.hidden_size, self.num_heads * self.head_dim, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, self.num_kv_heads * self.head_dim, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, self.num_kv_heads * self.head_dim, bias=False)
        self.o_proj = nn.Linear(self.num_heads * self.head_dim, config.hidden_size, bias=False)
        if self.use_qk_norm:
            self.q_norm = MiniMaxM3RMSNorm(self.head_dim, config.rms_norm_eps, backend=backend)
            self.k_norm = MiniMaxM3RMSNorm(self.head_dim, config.rms_norm_eps, backend=backend)
        self.indexer = MiniMaxM3Indexer(config, None, backend) if is_sparse_attention_layer else None
        self._packed: PackedProjection | None = None

    def forward(
        self,
        x: Tensor,
        *,
        freqs_cis: Tensor,
        attention_mask: Tensor | None = None,
        padding_mask: Tensor | None = None,
        batch: ForwardBatch | None = None,
        pages: LayerPages | None = None,
        record: ForwardRecord | None = None,
        choices: LayerChoices | None = None,
    ) -> Tensor:
        """Packed `x` `[T, H]` with its `batch`, or padded `[B, S, H]` with masks; `freqs_cis` has its leading shape."""
        if batch is None:
            return run_packed(
                lambda x, freqs_cis, batch: self(x, freqs_cis=freqs_cis, batch=batch, record=record),
                x, freqs_cis, attention_mask, padding_mask,
            )  # fmt: skip
        indexer = self.indexer
        wants_kl = indexer is not None and record is not None and record.indexer_kl is not None
        wants_blocks = (
            indexer is not None
            and record is not None
            and (record.block_indices is not None or record.recall is not None)
        )
        # Up to top-k blocks of context the choice is "all of them": the answer is dense attention's, at dense cost.
        chooses = (
            indexer is not None
            and not batch.attend_all
            and batch.max_length_k > indexer.topk_blocks * indexer.block_size
        )
        wants_index = chooses or wants_kl or wants_blocks or (indexer is not None and pages is not None)
        q, k, v, index_q, index_k = self._project(x, freqs_cis, batch, wants_index, train_indexer=wants_kl)
        spans = (batch.cu_seqlens_q, batch.cu_seqlens_k)
        block_indices: Tensor | None = None
        if pages is not None:
            out, block_indices = self._attend_pages(q, k, v, index_q, index_k, batch, pages, chooses, wants_blocks)
        else:
            if chooses or wants_blocks:
                block_indices = self._choose(index_q, index_k, batch, choices)
            if chooses:
                assert indexer is not None
                assert block_indices is not None
                out, lse = kernels.block_sparse_attention(
                    q, k, v, block_indices, *spans, block_size=indexer.block_size, implementation=self.backend
                )
            else:
                out, lse = kernels.varlen_attention(q, k, v, *spans, implementation=self.backend)
        if indexer is not None and record is not None:
            if record.indexer_kl is not None:
                assert pages is None, "an indexer is aligned over whole sequences"
                assert index_q is not None
                assert index_k is not None
                record.indexer_kl.append(
                    kernels.indexer_kl(
                        q.detach(), k.detach(), index_q, index_k.squeeze(1), block_indices if chooses else None, *spans,
                        block_size=indexer.block_size, lse=lse.detach(), implementation=self.backend,
                    )
                )  # fmt: skip
            if record.block_indices is not None:
                assert block_indices is not None
                record.block_indices.append(block_indices)
            if record.recall is not None:
                assert block_indices is not None
                recall = selection_recall(q, k, block_indices, batch, indexer.block_size, record.recall_queries)
                record.recall.append(recall)
        return self.o_proj(out.flatten(-2))

    def _choose(
        self, index_q: Tensor | None, index_k: Tensor | None, batch: ForwardBatch, choices: LayerChoices | None
    ) -> Tensor:
        """Blocks of every packed query, int32 `[T, Hi, top_k]`: those of `choices` if it holds them."""
        if choices is not None and choices.block_indices is not None:
            return choices.block_indices
        assert self.indexer is not None
        assert index_q is not None
        assert index_k is not None
        with torch.no_grad():
            chosen = kernels.select_blocks(
                index_q, index_k.squeeze(1), batch.cu_seqlens_q, batch.cu_seqlens_k, **self.indexer.selection
            )
        if choices is not None:
            choices.block_indices = chosen
        return chosen

    def _attend_pages(
        self, q: Tensor, k: Tensor, v: Tensor, index_q: Tensor | None, index_k: Tensor | None, batch: ForwardBatch,
        pages: LayerPages, chooses: bool, wants_blocks: bool,
    ) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        """Store the new tokens, then attend: `[T, Hq, D]`, and the blocks that were chosen, if they were."""
        assert batch.pages is not None
        batch.pages.store(pages.k, k)
        batch.pages.store(pages.v, v)
        if pages.index_k is not None:
            assert index_k is not None
            batch.pages.store(pages.index_k, index_k)
        table, lengths_k = batch.pages.page_table, batch.lengths_k
        indexer, block_indices = self.indexer, None
        if chooses or wants_blocks:
            assert indexer is not None
            assert index_q is not None
            assert pages.index_k is not None
            block_indices = kernels.select_blocks_paged(
                index_q, pages.index_k, table, lengths_k, batch.cu_seqlens_q, plan=batch.plan, **indexer.selection
            )
        if chooses:
            assert indexer is not None
            assert block_indices is not None
            out, _ = kernels.block_sparse_attention_paged(
                q, pages.k, pages.v, table, lengths_k, block_indices, batch.cu_seqlens_q,
                block_size=indexer.block_size, implementation=self.backend, plan=batch.plan,
            )  # fmt: skip
        else:
            out, _ = kernels.paged_attention(
                q, pages.k, pages.v, table, lengths_k, batch.cu_seqlens_q,
                implementation=self.backend, plan=batch.plan,
            )  # fmt: skip
        return out, block_indices

    def _project_main(self, x: Tensor, freqs_cis: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q = self.q_proj(x).unflatten(-1, (self.num_heads, self.head_dim))
        k = self.k_proj(x).unflatten(-1, (self.num_kv_heads, self.head_dim))
        v = self.v_proj(x).unflatten(-1, (self.num_kv_heads, self.head_dim))
        if self.use_qk_norm:
            return norm_rotate(q, self.q_norm, freqs_cis), norm_rotate(k, self.k_norm, freqs_cis), v
        return apply_rotary(q, freqs_cis), apply_rotary(k, freqs_cis), v

    def _project(
        self, x: Tensor, freqs_cis: Tensor, batch: ForwardBatch, wants_index: bool, train_indexer: bool
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
        """q, k, v, index q and index k (with its head dimension of 1) of every token."""
        if self._packed is not None and not torch.is_grad_enabled() and self._packed.is_current(self):
            return self._packed(x, batch.rotary_factors(freqs_cis, self.head_dim))
        q, k, v = self._project_main(x, freqs_cis)
        if not wants_index:
            return q, k, v, None, None
        assert self.indexer is not None
        # The choice of blocks has no gradient, and the alignment loss moves the indexer alone: its input is cut off.
        with torch.set_grad_enabled(train_indexer and torch.is_grad_enabled()):
            return q, k, v, *self.indexer.project(x.detach(), freqs_cis)

    def pack_for_inference(self) -> None:
        """Make q, k, index q, index k and v views of one weight, so that inference takes one product and one norm.

        The parameters keep their names and values, and training may go on in them. The norms are copied: after they
        have changed, the unpacked path runs until this is called again (every engine does). Nothing is packed where
        head dimensions differ.
        """
        indexer = self.indexer
        if not self.use_qk_norm or (indexer is not None and indexer.index_head_dim != self.head_dim):
            return
        self._packed = PackedProjection(self, self._packed)


# In the order they are packed: those of the attention, of its indexer, and of the attention again.
_PROJECTIONS = (("q_proj", "k_proj"), ("index_q_proj", "index_k_proj"), ("v_proj",))
_NORMS = (("q_norm", "k_norm"), ("index_q_norm", "index_k_norm"), ())


def _children(attention: MiniMaxM3Attention, names: Sequence[Sequence[str]]) -> list[Any]:
    """The modules of these names, from the plain dictionaries, since this runs in every layer and step."""
    own, indexer = attention._modules, attention._modules.get("indexer")
    first, index, last = names
    between = [] if indexer is None else [indexer._modules[name] for name in index]
    return [own[name] for name in first] + between + [own[name] for name in last]


class PackedProjection:
    """One product for all projections of a layer, with the normed heads side by side. `known` is an earlier packing."""

    def __init__(self, attention: MiniMaxM3Attention, known: "PackedProjection | None" = None) -> None:
        indexer = attention.indexer
        self.head_dim = attention.head_dim
        self.heads = [attention.num_heads, attention.num_kv_heads]
        if indexer is not None:
            self.heads += [indexer.num_index_heads, 1]
        self.num_normed = sum(self.heads)
        projections = _children(attention, _PROJECTIONS)
        reuse = known is not None and known.linears.holds(projections)
        self.linears: PackedLinears = known.linears if known is not None and reuse else pack_linears(projections)
        self.scale = PackedScale(_children(attention, _NORMS), self.heads)

    def is_current(self, attention: MiniMaxM3Attention) -> bool:
        """Whether the packed weights are those of `attention`, and its norms the ones that were copied."""
        return self.linears.holds(_children(attention, _PROJECTIONS)) and self.scale.holds(_children(attention, _NORMS))

    def __call__(
        self, x: Tensor, rotary: RotaryFactors
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
        heads = self.linears(x).view(*x.shape[:-1], -1, self.head_dim)
        normed = self.scale(at_least_fp32(heads[..., : self.num_normed, :]))
        q, k, *index = rotary.rotate(normed).to(x.dtype).split_with_sizes(self.heads, dim=-2)
        index_q, index_k = index or (None, None)
        return q, k, heads[..., self.num_normed :, :], index_q, index_k
