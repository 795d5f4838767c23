"""What a forward pass works on: packed sequences, and, when serving, the pages that hold their past.

Shape legend of `minim3/model`: T new tokens of all sequences, one after another; N sequences; H hidden size.
Nothing in the model is padded: calls on padded `[B, S]` tensors are packed at the door (`padding.py`).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate

import torch
from torch import Tensor

from minim3.kernels import PagedPlan
from minim3.kernels.portable.plan import CacheRows, Scratch
from minim3.model.layers import RotaryFactors


@dataclass(frozen=True)
class LayerPages:
    """The cached past of one decoder layer. A page holds the K, V and index key of the same tokens.

    k, v: `[pages, kv_heads, page_size, head_dim]`; index_k: `[pages, page_size, index_head_dim]`, or None in a layer
    with full attention.
    """

    k: Tensor
    v: Tensor
    index_k: Tensor | None

    @cached_property
    def tokens(self) -> tuple[Tensor, ...]:
        """k, v and index_k as `[tokens of all heads, dim]`, in the order in which `PagedContext.token_rows` counts."""
        return tuple([x.view(-1, x.shape[-1]) for x in (self.k, self.v, self.index_k) if x is not None])

    def rows(self, layout: CacheRows, index_layout: CacheRows | None) -> tuple[Tensor, Tensor | None]:
        """k and index_k by cache rows of these layouts."""
        key = layout.tokens, 0 if index_layout is None else index_layout.tokens
        known = self._rows.get(key)
        if known is None:
            index_k = None
            if index_layout is not None:
                assert self.index_k is not None
                index_k = index_layout.view(self.index_k)
            known = self._rows[key] = layout.view(self.k), index_k
        return known

    @cached_property
    def _rows(self) -> dict[tuple[int, int], tuple[Tensor, Tensor | None]]:
        return {}


@dataclass(frozen=True)
class PagedContext:
    """Where the past of the batch's sequences lies, and where the new tokens go.

    layers: one `LayerPages` a decoder layer, then one an MTP depth if those are cached.
    page_table: int64 `[N, max_pages]`, the pages of each sequence in order; entries past its length are ignored.
    slots: int64 `[T]`, `page * page_size + offset` of each new token.
    scratch: memory of the kernels that outlives the step, if its owner has some.
    """

    layers: Sequence[LayerPages]
    page_table: Tensor
    slots: Tensor
    page_size: int
    scratch: Scratch | None = None
    _rows: dict[int, Tensor] = field(default_factory=dict, init=False, repr=False, compare=False)

    def token_rows(self, heads: int) -> Tensor:
        """int64 `[T * heads]`: where pages of so many heads, seen as `[pages * heads * page_size, D]`, take new tokens.

        The same in all layers, and made once.
        """
        known = self._rows.get(heads)
        if known is None:
            page = self.slots // self.page_size
            first = page * (heads * self.page_size) + self.slots % self.page_size
            head_starts = torch.arange(heads, device=first.device) * self.page_size
            known = self._rows[heads] = (first[:, None] + head_starts).flatten()
        return known

    def store(self, pages: Tensor, new: Tensor) -> None:
        """Put `new` `[T, heads, D]` into `pages` `[P, heads, page, D]` (or `[P, page, D]` for one head)."""
        dim = new.shape[2]
        rows, values = self.token_rows(new.shape[1]), new.reshape(-1, dim)
        if pages.dtype == torch.float8_e4m3fn:
            # It has no infinity: what is out of range might become NaN. And it cannot be indexed, its bytes can.
            values = values.clamp(-448.0, 448.0).to(pages.dtype).view(torch.uint8)
            pages = pages.view(torch.uint8)
        pages.view(-1, dim).index_copy_(0, rows, values.to(pages.dtype))


@dataclass(frozen=True)
class ForwardBatch:
    """N packed sequences.

    positions: int64 `[T]`, rotary positions of the new tokens.
    lengths_q: new tokens of each sequence, all positive. lengths_k: its tokens in all, the past included.
    Without `pages` there is no past: `lengths_k == lengths_q`.
    attend_all: layers with an indexer attend to every visible key too, as while an indexer is warmed up.
    """

    positions: Tensor
    lengths_q: tuple[int, ...]
    lengths_k: tuple[int, ...]
    pages: PagedContext | None = None
    attend_all: bool = False
    _rotary: dict[int, tuple[Tensor, RotaryFactors]] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    def __post_init__(self) -> None:
        assert len(self.lengths_q) == len(self.lengths_k)
        assert all(0 < q <= k for q, k in zip(self.lengths_q, self.lengths_k)), (self.lengths_q, self.lengths_k)
        assert self.pages is not None or self.lengths_q == self.lengths_k
        assert self.pages is None or not self.attend_all

    @classmethod
    def packed(
        cls,
        lengths: Sequence[int],
        device: torch.device | str = "cpu",
        positions: Tensor | None = None,
        *,
        attend_all: bool = False,
    ) -> "ForwardBatch":
        """Whole sequences without a past, positions 0..length-1 in each unless given."""
        lengths = tuple(int(length) for length in lengths)
        if positions is None:
            if len(lengths) == 1:
                positions = torch.arange(lengths[0], device=device)
            else:
                ends = torch.tensor(lengths).cumsum(0)
                starts = torch.repeat_interleave(ends - torch.tensor(lengths), torch.tensor(lengths))
                positions = (torch.arange(int(ends[-1])) - starts).to(device)
        return cls(positions, lengths, lengths, attend_all=attend_all)

    @property
    def num_tokens(self) -> int:
        return self.positions.shape[0]

    @cached_property
    def max_length_k(self) -> int:
        return max(self.lengths_k)

    @cached_property
    def cu_seqlens_q(self) -> Tensor:
        """int32 `[N + 1]`: where each sequence starts among the new tokens."""
        return self._cumulative(self.lengths_q)

    @cached_property
    def cu_seqlens_k(self) -> Tensor:
        """int32 `[N + 1]`: the same over all tokens, past included."""
        return self.cu_seqlens_q if self.lengths_k == self.lengths_q else self._cumulative(self.lengths_k)

    @cached_property
    def plan(self) -> PagedPlan:
        """What the paged kernels of all layers share."""
        assert self.pages is not None
        pages = self.pages
        return PagedPlan(pages.page_table, self.lengths_k, self._sums(self.lengths_q), pages.page_size, pages.scratch)

    def rotary_factors(self, freqs_cis: Tensor, head_dim: int) -> RotaryFactors:
        """Made once for all the layers that are given the same table."""
        known = self._rotary.get(head_dim)
        if known is None or known[0] is not freqs_cis:
            known = self._rotary[head_dim] = freqs_cis, RotaryFactors.of(freqs_cis, head_dim)
        return known[1]

    def _cumulative(self, lengths: tuple[int, ...]) -> Tensor:
        return torch.tensor(self._sums(lengths), dtype=torch.int32, device=self.positions.device)

    @staticmethod
    def _sums(lengths: tuple[int, ...]) -> list[int]:
        return list(accumulate(lengths, initial=0))


@dataclass
class LayerChoices:
    """What a layer decided without a gradient, so that computing it again decides the same.

    block_indices: int32 `[T, index_heads, top_k]`, the key blocks of every query. expert_ids: int64 `[T, top_k]`.
    A layer fills in what is None and follows what is not.
    """

    block_indices: Tensor | None = None
    expert_ids: Tensor | None = None


@dataclass
class ForwardRecord:
    """What the caller wants kept from a forward pass: each list that is not None is appended to, a layer at a time.

    hidden_states: `[T, H]` before the first layer, after every layer but the last, and after the final norm; padded to
    `[B, S, H]` where `padded` holds the two functions that do so and undo it.
    router_logits: fp32 `[T, experts]` a MoE layer. expert_ids: int64 `[T, top_k]` a MoE layer.
    indexer_kl: a scalar a sparse layer, the alignment loss of its indexer (asking for it makes the indexer trainable).
    block_indices: int32 `[T, index_heads, top_k]` a sparse layer.
    recall: a scalar a sparse layer, the share of dense attention inside the chosen blocks (`model/recall.py`), over at
    most `recall_queries` queries of those that have a choice; the batch must hold one.
    choices: by `Block.cache_index`, the decisions of every layer. A layer that finds its own follows them.
    """

    hidden_states: list[Tensor] | None = None
    padded: tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]] | None = None
    router_logits: list[Tensor] | None = None
    expert_ids: list[Tensor] | None = None
    indexer_kl: list[Tensor] | None = None
    block_indices: list[Tensor] | None = None
    recall: list[Tensor] | None = None
    recall_queries: int = 64
    choices: dict[int, LayerChoices] | None = None

    def see_hidden(self, hidden: Tensor) -> Tensor:
        """Keep hidden states `[T, H]` if they are wanted. What comes back is made of what was kept: gradients of later
        results reach it."""
        if self.hidden_states is None:
            return hidden
        if self.padded is None:
            self.hidden_states.append(hidden)
            return hidden
        unpack, pack = self.padded
        self.hidden_states.append(unpack(hidden))
        return pack(self.hidden_states[-1])

    def choices_of(self, cache_index: int) -> LayerChoices | None:
        """The decisions of one layer, empty at first; None where they are not kept."""
        return None if self.choices is None else self.choices.setdefault(cache_index, LayerChoices())

