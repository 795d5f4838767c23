"""MiniMax-M3 of transformers on minim3's kernels: importing this module registers attention implementation "minim3".

    import minim3.integrations.transformers
    model = AutoModelForImageTextToText.from_pretrained(path, attn_implementation="minim3")

Three places of transformers meet here. Its mask function makes no mask but a `TokenRows`: which slots of each padded
row hold tokens. Its indexer, taken over while a model's implementation is "minim3", projects and caches but chooses
nothing: it hands the `IndexVectors` on in place of block ids. Its attention function chooses the blocks and attends
them, so that nothing of size [S, S] exists. Blocks count from the first token of a row, on whichever side it is padded.

B rows, S new slots of a row, L cached and new slots, T new tokens of all rows; Hq, Hkv, Hi, D, Di as in the kernels.
"""

import functools
import inspect
import threading
from collections.abc import Callable
from importlib import import_module
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import causal_mask_function

from minim3 import kernels

__all__ = ["NAME", "IndexVectors", "TokenRows", "attention_forward", "make_token_rows", "register", "unregister"]

NAME = "minim3"
"""The name to pass as `attn_implementation`."""

_FEW_QUERIES = 8
"""Rows with at most this many new slots read the cache in place, as pages; longer ones are packed."""

_PAGE_MULTIPLE = 256
"""Left-padded rows are copied into pages of such a size: kernels gather a whole block where it divides the page."""

_MODELING = "transformers.models.minimax_m3_vl.modeling_minimax_m3_vl"
_INDEXER_ARGUMENTS = ["self", "hidden_states", "position_embeddings", "past_key_values", "position_ids"]


class IndexVectors(NamedTuple):
    """What the indexer hands to the attention function in place of block ids: the choice is made there."""

    q: Tensor | None
    """`[B, Hi, S, Di]`, None where the whole cache fits in the budget of every query."""
    k: Tensor
    """`[B, 1, L, Di]`."""


class TokenRows:
    """Which slots of each row hold tokens: stands where a mask would, and is shared by all layers of one forward.

    Row b holds tokens in the slots `starts[b] : stops[b]` of all slots so far; the last `q_length` of those are new.
    """

    def __init__(self, starts: list[int], stops: list[int], num_slots: int, q_length: int) -> None:
        self.starts, self.stops = starts, stops
        self.num_slots, self.q_length = num_slots, q_length
        self.whole = not any(starts) and all(stop == num_slots for stop in stops)
        self.longest = max((stop - start for start, stop in zip(starts, stops)), default=0)
        offset = num_slots - q_length
        firsts = [max(start, offset) for start in starts]
        self.new_tokens = [(first - offset, max(stop, first) - offset) for first, stop in zip(firsts, stops)]
        self.cu_seqlens_q = tuple(accumulate((stop - start for start, stop in self.new_tokens), initial=0))
        self.cu_seqlens_k = tuple(accumulate((stop - start for start, stop in zip(starts, stops)), initial=0))
        self._made: dict[Any, Any] = {}

    def contiguous(self) -> "TokenRows":
        """`generate` calls this on what it takes for a mask."""
        return self

    def _once(self, key: Any, make: Callable[[], Any]) -> Any:
        if key not in self._made:
            self._made[key] = make()
        return self._made[key]

    def _new_rows(self, device: torch.device) -> Tensor:
        """The real ones among the B * S new slots: int64 `[T]`."""

        def make() -> Tensor:
            rows = [torch.arange(a, b) + i * self.q_length for i, (a, b) in enumerate(self.new_tokens)]
            return torch.cat(rows).to(device)

        return self._once(("new rows", device), make)

    def pack_queries(self, x: Tensor) -> Tensor:
        """`[B, H, S, D]` -> `[T, H, D]`."""
        packed = x.transpose(1, 2).flatten(0, 1).contiguous()
        return packed if self.whole else packed.index_select(0, self._new_rows(x.device))

    def pack_keys(self, x: Tensor) -> Tensor:
        """`[B, H, L, D]` -> all tokens so far, `[sum of lengths, H, D]`; a view of a single row."""
        parts = [row[:, start:stop].transpose(0, 1) for row, start, stop in zip(x, self.starts, self.stops)]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def unpack(self, x: Tensor) -> Tensor:
        """`[T, H, D]` -> `[B, S, H, D]`, zero at padding."""
        if not self.whole:
            slots = x.new_zeros(len(self.starts) * self.q_length, *x.shape[1:])
            x = slots.index_copy(0, self._new_rows(x.device), x)
        return x.unflatten(0, (len(self.starts), self.q_length))

    def pages(self, name: str, x: Tensor) -> Tensor:
        """A cache `[B, H, L, D]` as one page a row; where rows do not start at slot 0, a copy that the layers share.

        The next call of the same name overwrites that copy: fresh memory for every layer costs as much as copying.
        """
        if not any(self.starts):
            return x.contiguous()
        size = -(-self.longest // _PAGE_MULTIPLE) * _PAGE_MULTIPLE
        shape = (*x.shape[:2], size, x.shape[-1])
        pages = self._once(("pages", name, shape, x.dtype, x.device), lambda: x.new_empty(shape))
        for page, row, start, stop in zip(pages, x, self.starts, self.stops):
            page[:, : stop - start] = row[:, start:stop]
        return pages

    def plan(self, page_size: int, device: torch.device) -> kernels.PagedPlan:
        """What the paged kernels of all layers share."""

        def make() -> kernels.PagedPlan:
            table = torch.arange(len(self.starts), device=device).unsqueeze(1)
            lengths = [stop - start for start, stop in zip(self.starts, self.stops)]
            return kernels.PagedPlan(table, lengths, self.cu_seqlens_q, page_size)

        return self._once(("plan", page_size, device), make)

    def check_positions(self, position_ids: Tensor | None) -> None:
        """Raise `ValueError` unless positions `[B | 1, S]` rise by one from token to token. Looked at once."""
        if position_ids is not None and self.q_length > 1:
            self._once("positions checked", lambda: self._check_positions(position_ids))

    def _check_positions(self, position_ids: Tensor) -> bool:
        steps = position_ids.diff() != 1
        for i, (start, stop) in enumerate(self.new_tokens):
            wrong = steps[i % steps.shape[0], start : max(stop - 1, start)].nonzero()
            if wrong.numel():
                at = start + int(wrong[0])
                found = position_ids[i % steps.shape[0], at : at + 2].tolist()
                raise ValueError(
                    f"position_ids of row {i} go from {found[0]} to {found[1]} at token {at}; attn_implementation="
                    f'"{NAME}" needs positions that rise by one: pass packed documents as rows of a padded batch'
                )
        return True


# The mask function


@torch.compiler.disable
def make_token_rows(
    batch_size: int, q_length: int, kv_length: int, q_offset: int | Tensor = 0, kv_offset: int = 0,
    mask_function: Callable[..., Any] = causal_mask_function, attention_mask: Tensor | None = None, *,
    config: Any, **kwargs: Any,
) -> TokenRows:  # fmt: skip
    """transformers' mask function: `attention_mask` bool `[B, slots so far]`, true at tokens -> the rows' layout.

    Raises:
        ValueError: another model, a mask that is not causal, or one with holes inside a row.
    """
    if not hasattr(config, "index_block_size"):
        raise ValueError(
            f'attn_implementation="{NAME}" runs MiniMax-M3 models; this one is of model_type '
            f'{getattr(config, "model_type", None)!r}: use "sdpa" for it'
        )
    _take_over_indexer()
    if mask_function is not causal_mask_function or kv_offset:
        raise ValueError(
            f'attn_implementation="{NAME}" takes plain causal attention over padded rows; a further mask function, a '
            "sliding window and packed documents (position_ids that start again inside a row) are not supported: pass "
            'one document a row, or use "eager"'
        )
    num_slots = int(q_offset) + q_length
    if attention_mask is None:
        return TokenRows([0] * batch_size, [num_slots] * batch_size, num_slots, q_length)
    if attention_mask.ndim != 2 or attention_mask.shape[1] < num_slots:
        raise ValueError(
            f"attention_mask has shape {tuple(attention_mask.shape)}; it needs [batch, tokens] = [{batch_size}, "
            f"{num_slots}], cached tokens included"
        )
    mask = attention_mask[:, :num_slots].bool().expand(batch_size, -1)
    if bool(mask.all()):
        return TokenRows([0] * batch_size, [num_slots] * batch_size, num_slots, q_length)
    lengths = mask.sum(1)
    starts = mask.int().argmax(1)
    stops = torch.where(lengths > 0, num_slots - mask.flip(1).int().argmax(1), 0)
    for row, (start, stop, length) in enumerate(zip(starts.tolist(), stops.tolist(), lengths.tolist())):
        if stop - start != length:
            raise ValueError(
                f"attention_mask of row {row} has holes: {length} tokens between slots {start} and {stop}. Padding may "
                "stand on the left or on the right of a row; prompts that generate are padded on the left"
            )
    return TokenRows(starts.tolist(), stops.tolist(), num_slots, q_length)


# The attention function


@torch.compiler.disable
def attention_forward(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, scaling: float | None = None,
    dropout: float = 0.0, block_indices: IndexVectors | Tensor | None = None, position_ids: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """transformers' attention function: `[B, Hq, S, D]`, `[B, Hkv, L, D]` -> (`[B, S, Hq, D]`, no weights).

    `attention_mask` is the `TokenRows` of the mask function. `block_indices`: of a sparse layer, the `IndexVectors` of
    the indexer, or block ids `[B, Hkv, S, k]` counted from slot 0, -1 where there is none. The vision tower, which is
    not causal, goes to transformers' "sdpa".

    Raises:
        ValueError: anything that these kernels would have to ignore.
    """
    _refuse_unsupported(module, kwargs)
    if not getattr(module, "is_causal", True):
        if not str(getattr(module.config, "model_type", "")).startswith("minimax_m3"):
            raise ValueError(
                f'attn_implementation="{NAME}" runs MiniMax-M3 models; {type(module).__name__} is of none: use "sdpa"'
            )
        kwargs["is_causal"] = False
        sdpa: Callable[..., tuple[Tensor, None]] = AttentionInterface()["sdpa"]
        return sdpa(module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs)
    rows = attention_mask
    if not isinstance(rows, TokenRows):
        given = f"shape {tuple(rows.shape)}" if isinstance(rows, Tensor) else f"type {type(rows).__name__}"
        raise ValueError(
            f'attn_implementation="{NAME}" got an attention mask of {given}; pass the model a mask [batch, tokens] (or '
            'none), which holds no more than padding, or use "eager" for other masks'
        )
    if dropout:
        raise ValueError(
            f'attn_implementation="{NAME}" has no dropout: attention_dropout is {dropout}; set it to 0 in the config, '
            'or use "eager"'
        )
    if key.shape[2] < rows.num_slots or query.shape[2] != rows.q_length:
        raise ValueError(
            f"the cache of layer {module.layer_idx} holds {key.shape[2]} slots for {rows.num_slots} tokens, "
            f"{query.shape[2]} of them new where the mask has {rows.q_length}; use a dynamic or a static cache"
        )
    rows.check_positions(position_ids)
    if not rows.cu_seqlens_q[-1]:
        return query.new_zeros(query.shape).transpose(1, 2), None
    indexer = module.indexer if block_indices is not None else None
    if indexer is not None and rows.longest <= indexer.topk_blocks * indexer.block_size:
        indexer = None  # every query may see all of its blocks
    needs_grad = torch.is_grad_enabled() and any(x.requires_grad for x in (query, key, value))
    attend = _attend_packed if needs_grad or rows.q_length > _FEW_QUERIES else _attend_paged
    return rows.unpack(attend(rows.pack_queries(query), key, value, rows, indexer, block_indices, scaling)), None


def _refuse_unsupported(module: Any, kwargs: dict[str, Any]) -> None:
    if kwargs.get("output_attentions") or getattr(module.config, "output_attentions", False):
        raise ValueError(f'output_attentions: attn_implementation="{NAME}" forms no attention weights; use "eager"')
    if kwargs.get("cu_seq_lens_q") is not None or kwargs.get("cu_seq_lens_k") is not None:
        raise ValueError(
            f'cu_seq_lens_q, cu_seq_lens_k: attn_implementation="{NAME}" takes no packed documents; pass them as rows '
            "of a padded batch with its attention_mask"
        )


def _packed_ids(block_indices: Tensor, rows: TokenRows) -> Tensor:
    """Block ids `[B, Hkv, S, k]` that count slots -> `[T, Hkv, k]`."""
    if any(rows.starts):
        raise ValueError(
            f"block_indices count from slot 0 but rows are padded on the left ({rows.starts} slots); blocks count from "
            "the first token: pad on the right"
        )
    return rows.pack_queries(block_indices).int()


def _attend_packed(
    q: Tensor, key: Tensor, value: Tensor, rows: TokenRows, indexer: Any, chosen: Any, scale: float | None
) -> Tensor:
    """Prefill and training: `[T, Hq, D]`; differentiable. `indexer` None: dense."""
    k, v = rows.pack_keys(key), rows.pack_keys(value)
    cu_q, cu_k = rows.cu_seqlens_q, rows.cu_seqlens_k
    if indexer is None:
        return kernels.varlen_attention(q, k, v, cu_q, cu_k, scale=scale)[0]
    if isinstance(chosen, IndexVectors):
        assert chosen.q is not None
        ids = kernels.select_blocks(
            rows.pack_queries(chosen.q), rows.pack_keys(chosen.k).squeeze(1), cu_q, cu_k,
            block_size=indexer.block_size, topk_blocks=indexer.topk_blocks, local_blocks=indexer.local_blocks,
        )  # fmt: skip
    else:
        ids = _packed_ids(chosen, rows)
    return kernels.block_sparse_attention(q, k, v, ids, cu_q, cu_k, block_size=indexer.block_size, scale=scale)[0]


def _attend_paged(
    q: Tensor, key: Tensor, value: Tensor, rows: TokenRows, indexer: Any, chosen: Any, scale: float | None
) -> Tensor:
    """Decoding: `[T, Hq, D]`, keys and values read where the cache has them; no gradient."""
    k, v = rows.pages("k", key), rows.pages("v", value)
    plan = rows.plan(k.shape[2], k.device)
    table, lengths, cu_q = plan.page_table, [b - a for a, b in zip(rows.starts, rows.stops)], rows.cu_seqlens_q
    if indexer is None:
        return kernels.paged_attention(q, k, v, table, lengths, cu_q, scale=scale, plan=plan)[0]
    if isinstance(chosen, IndexVectors):
        assert chosen.q is not None
        ids = kernels.select_blocks_paged(
            rows.pack_queries(chosen.q), rows.pages("index k", chosen.k).squeeze(1), table, lengths, cu_q, plan=plan,
            block_size=indexer.block_size, topk_blocks=indexer.topk_blocks, local_blocks=indexer.local_blocks,
        )  # fmt: skip
    else:
        ids = _packed_ids(chosen, rows)
    return kernels.block_sparse_attention_paged(
        q, k, v, table, lengths, ids, cu_q, block_size=indexer.block_size, scale=scale, plan=plan
    )[0]


# The indexer


@torch.compiler.disable
@torch.no_grad()
def _index_vectors(
    indexer: Any, hidden_states: Tensor, position_embeddings: tuple[Tensor, Tensor], past_key_values: Any
) -> IndexVectors:
    """Project, norm and rotate as transformers' indexer does, and cache the keys. The choice has no gradient."""
    rotate = import_module(_MODELING).apply_rotary_pos_emb
    cos, sin = (x[..., : indexer.head_dim] for x in position_embeddings)
    heads = (*hidden_states.shape[:-1], -1, indexer.head_dim)
    k = indexer.k_norm(indexer.k_proj(hidden_states).view(heads)).transpose(1, 2)
    k, _ = rotate(k, k[:, :0], cos, sin)  # it takes a pair; a second one of no heads costs nothing
    if past_key_values is not None:
        layer = past_key_values.layers[indexer.layer_idx]
        if not hasattr(layer, "update_index"):
            raise ValueError(
                f"layer {indexer.layer_idx} of the cache is a {type(layer).__name__}, which keeps no index keys; use a "
                "dynamic or a static cache made for this model's config"
            )
        k = layer.update_index(k)
    if k.shape[2] <= indexer.topk_blocks * indexer.block_size:
        return IndexVectors(None, k)
    q = indexer.q_norm(indexer.q_proj(hidden_states).view(heads)).transpose(1, 2)
    return IndexVectors(rotate(q, q[:, :0], cos, sin)[0], k)


_lock = threading.Lock()
_taken_over: list[tuple[type, Callable[..., Any]]] = []
"""The indexer class and the forward that it came with, while that is replaced."""


def _take_over_indexer() -> None:
    """Route the indexers of models whose implementation is "minim3" through `_index_vectors`; others keep their own."""
    if _taken_over:
        return
    with _lock:
        if _taken_over:
            return
        indexer_class = getattr(import_module(_MODELING), "MiniMaxM3VLIndexer", None)
        original = getattr(indexer_class, "forward", None)
        arguments = [] if original is None else list(inspect.signature(original).parameters)
        if indexer_class is None or original is None or arguments != _INDEXER_ARGUMENTS:
            version = import_module("transformers").__version__
            raise ValueError(
                f"transformers {version} has an indexer that this version of minim3 does not know (its forward takes "
                f"{arguments}, not {_INDEXER_ARGUMENTS}): use transformers 5.17 to 5.23, or another attn_implementation"
            )

        @functools.wraps(original)
        def forward(
            self: Any, hidden_states: Tensor, position_embeddings: tuple[Tensor, Tensor], past_key_values: Any,
            position_ids: Tensor,
        ) -> IndexVectors | Tensor:  # fmt: skip
            if self.config._attn_implementation == NAME:
                return _index_vectors(self, hidden_states, position_embeddings, past_key_values)
            return original(self, hidden_states, position_embeddings, past_key_values, position_ids)

        indexer_class.forward = forward
        _taken_over.append((indexer_class, original))


# Registration


def register() -> None:
    """Make "minim3" an attention implementation of transformers; importing this module does it."""
    AttentionInterface.register(NAME, attention_forward)
    AttentionMaskInterface.register(NAME, make_token_rows)


def unregister() -> None:
    """Leave transformers as it was before. A model that is still set to "minim3" raises at its next forward."""
    for interface in (AttentionInterface, AttentionMaskInterface):
        interface._global_mapping.pop(NAME, None)
    with _lock:
        while _taken_over:
            indexer_class, original = _taken_over.pop()
            indexer_class.forward = original  # type: ignore[attr-defined]


register()
