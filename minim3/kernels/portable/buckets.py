"""Many short documents as a few padded batches of nearly equal lengths.

Causal attention never looks right, so padding at the right end of a document changes nothing for its tokens.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from minim3.kernels.sequences import Span

SHORT_TOKENS = 512
"""Longest document worth batching with others; longer ones fill both cores alone."""


class Bucket(NamedTuple):
    """`num_documents` documents padded to `length`, from row `start` of the padded rows on."""

    start: int
    num_documents: int
    length: int

    @property
    def rows(self) -> slice:
        return slice(self.start, self.start + self.num_documents * self.length)


class Buckets(NamedTuple):
    """How packed rows become padded rows and back; int64 index tensors."""

    buckets: tuple[Bucket, ...]
    padded_q: Tensor  # packed query row of every padded row; padding repeats the document's last token
    padded_k: Tensor  # the same for keys
    filler: Tensor  # padded rows that are padding
    packed: Tensor  # padded row of every covered token, documents in packed order
    rows_q: Tensor | None  # packed query rows covered, None: all of them in order
    rows_k: Tensor | None

    def gather_q(self, x: Tensor) -> Tensor:
        return x.index_select(0, self.padded_q)

    def gather_k(self, x: Tensor) -> Tensor:
        return x.index_select(0, self.padded_k)


def split_short(spans: Sequence[Span], *, causal: bool) -> tuple[tuple[Span, ...], tuple[Span, ...]]:
    """(short whole documents that gain from batching, the rest). Without a causal mask only equal lengths batch."""
    short = [s for s in spans if s.offset == 0 and s.num_queries == s.num_keys <= SHORT_TOKENS and s.num_queries > 0]
    if not causal:
        lengths = [s.num_queries for s in short]
        repeated = {length for length in set(lengths) if lengths.count(length) > 1}
        short = [s for s in short if s.num_queries in repeated]
    if len(short) < 2:
        return (), tuple(s for s in spans if s.num_queries)
    chosen = set(short)
    return tuple(short), tuple(s for s in spans if s.num_queries and s not in chosen)


@lru_cache(maxsize=16)
def make_buckets(spans: tuple[Span, ...], num_q: int, num_k: int, slack: float, device: str) -> Buckets:
    """Group documents by length; lengths in a bucket differ by at most the fraction `slack` (and two tokens)."""
    order = sorted(spans, key=lambda s: s.num_queries)
    groups: list[list[Span]] = []
    for span in order:
        if groups and span.num_queries <= groups[-1][0].num_queries * (1 + slack) + (2 if slack else 0):
            groups[-1].append(span)
        else:
            groups.append([span])
    buckets, padded_q, padded_k, filler = [], [], [], []
    place: dict[Span, int] = {}
    start = 0
    for group in groups:
        length = group[-1].num_queries
        buckets.append(Bucket(start, len(group), length))
        for span in group:
            place[span] = start
            within = torch.arange(length).clamp_(max=span.num_queries - 1)
            padded_q.append(span.q_start + within)
            padded_k.append(span.k_start + within)
            filler.append(torch.arange(start + span.num_queries, start + length))
            start += length
    with torch.inference_mode(False):  # kept and reused: an inference tensor could not take part in a backward pass
        packed = torch.cat([torch.arange(place[s], place[s] + s.num_queries) for s in spans]).to(device)
        rows_q = torch.cat([torch.arange(s.q_start, s.q_stop) for s in spans])
        rows_k = torch.cat([torch.arange(s.k_start, s.k_stop) for s in spans])
        return Buckets(
            tuple(buckets),
            torch.cat(padded_q).to(device),
            torch.cat(padded_k).to(device),
            torch.cat(filler).to(device),
            packed,
            None if torch.equal(rows_q, torch.arange(num_q)) else rows_q.to(device),
            None if torch.equal(rows_k, torch.arange(num_k)) else rows_k.to(device),
        )


def scatter_rows(target: Tensor, rows: Tensor | None, values: Tensor) -> Tensor:
    """Write packed `values` to the covered `rows` of `target` (all rows where None); returns the result."""
    return values if rows is None else target.index_copy_(0, rows, values)
