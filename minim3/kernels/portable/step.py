"""One step of few new tokens of each sequence: selection and attention in one call, without log-sum-exp."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from minim3.kernels.portable.choice import Choice
from minim3.kernels.portable.decode import Chosen, Dense
from minim3.kernels.portable.paged import FEW_TOKENS, like_parts
from minim3.kernels.portable.plan import CacheRows, PagedPlan, Part

_SHORT_TOKENS = 512
"""New tokens of one sequence up to this long are sooner attended each as a sequence of its own."""


class Indexer(NamedTuple):
    """Of a sparse layer: cache rows of its index keys, its index heads, their dimension, and its selection."""

    rows: CacheRows
    heads: int
    dim: int
    selection: dict[str, Any]


class StepAttention:
    """Selection and attention of one step of few new tokens, for all layers of one kind. Made by `of`."""

    def __init__(self, plan: PagedPlan, cache: CacheRows, group: int, dim: int, indexer: Indexer | None) -> None:
        self._parts: list[tuple[Part, Choice | None, Chosen | Dense]] = []
        budget = None if indexer is None else _budget(indexer)
        over = [] if budget is None else [r for r in plan.requests if r.length > budget]
        for part in like_parts(plan, over, cache.heads * group):
            assert indexer is not None
            choice = Choice(part.plan, indexer.rows, indexer.dim, indexer.heads, **indexer.selection)
            blocks = indexer.selection["block_size"], indexer.selection["topk_blocks"]
            chosen = Chosen(part.plan, cache, dim, group, *blocks)
            if cache.per_block == 1:
                chosen.keep_forced(choice.forced, choice.free)
            self._parts.append((part, choice, chosen))
        for part in like_parts(plan, [r for r in plan.requests if r not in over], cache.heads * group):
            self._parts.append((part, None, Dense(part.plan, cache, dim, group)))

    @classmethod
    def of(
        cls, plan: PagedPlan, cache: CacheRows, group: int, dim: int, indexer: Indexer | None
    ) -> "StepAttention | None":
        """For a layer with `cache.heads` KV heads, each shared by `group` query heads of `dim`; full without indexer.

        Returns None where some sequence has many new tokens, or some of its queries are beyond the budget and some not.
        """
        if any(r.num_queries > FEW_TOKENS for r in plan.requests):
            return None
        if indexer is not None:
            budget = _budget(indexer)
            over = [r for r in plan.requests if r.length > budget]
            if over and (not indexer.selection["local_blocks"] or any(r.position(0) < budget for r in over)):
                return None
        kind = (cache, group, dim, None if indexer is None else (*indexer[:3], *indexer.selection.values()))
        is_one = len(plan.requests) == plan.page_table.shape[0] == 1
        if is_one and plan.requests[0].num_queries > 1 and plan.requests[0].length <= _SHORT_TOKENS:
            plan = plan.once("apart", plan.apart)
            is_one = indexer is None
        if not is_one or plan.requests[0].num_queries > 1:
            return plan.once(("step", *kind), lambda: cls(plan, cache, group, dim, indexer))
        # One sequence: most steps write into the row of the step before, and differ from it in a token or a few.
        queries, length = len(plan.requests), plan.requests[-1].length
        key = (queries, *kind)
        pages = plan.page_table[0, : -(-length // plan.page_size)].tolist()
        last = plan.memory.steps.get(key)
        if last is not None and last.pages == pages and last.length == length:
            return last.attention  # that of another kind of layer, which differs in nothing that matters in this step
        same_row = last is not None and (last.length - queries) // cache.tokens == (length - 1) // cache.tokens
        if last is not None and same_row and last.pages == pages and last.length < length <= last.length + FEW_TOKENS:
            last.attention.advance(length - last.length)
            plan.memory.steps[key] = last._replace(length=length)
            return last.attention
        attention = cls(plan, cache, group, dim, indexer)
        if queries == 1 or (len(attention._parts) == 1 and attention._parts[0][2].layout.chunks == 1):
            plan.memory.steps[key] = _Last(pages, length, attention)
        return attention

    def advance(self, num_tokens: int) -> None:
        """Go on by so many tokens of the only sequence, which lie in the cache row of the last."""
        ((_, _, attention),) = self._parts
        if isinstance(attention, Dense) and attention.seen.differs:
            attention.advance_all(num_tokens)
        else:
            for _ in range(num_tokens):
                attention.advance()

    def __call__(
        self, q: Tensor, index_q: Tensor | None, k_rows: Tensor, v_tokens: Tensor, index_rows: Tensor | None
    ) -> Tensor:
        """Scaled `q` `[T, Hq, D]` and `index_q` `[T, Hi, Di]` -> out of the shape of `q`."""
        out: Tensor | None = None
        for part, choice, attention in self._parts:
            if isinstance(attention, Dense):
                found, _ = attention(part.take(q), k_rows, v_tokens)
            else:
                assert choice is not None
                assert index_q is not None
                assert index_rows is not None
                if attention.keeps_forced:
                    free = choice.choose_free(part.take(index_q), index_rows)
                    found = attention.attend_free(part.take(q), k_rows, v_tokens, free)
                else:
                    ids = choice(part.take(index_q), index_rows)
                    found, _ = attention(part.take(q), k_rows, v_tokens, ids)
            if part.rows is None:
                return found
            out = torch.empty_like(q, memory_format=torch.contiguous_format) if out is None else out
            out.index_copy_(0, part.rows, found)
        assert out is not None
        return out


class _Last(NamedTuple):
    """What attended the last step of one sequence: its pages and its length then."""

    pages: list[int]
    length: int
    attention: StepAttention


def _budget(indexer: Indexer) -> int:
    """Tokens that a query attends at most."""
    return indexer.selection["topk_blocks"] * indexer.selection["block_size"]
