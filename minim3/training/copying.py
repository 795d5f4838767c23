"""Two tasks that a fresh small model learns in minutes: repeat a row of symbols, and look one of a row of pairs up.

    copying    BEGIN_COPY  s s s ...  ASK  s s s ...           loss on the repeated row
    lookup     BEGIN_PAIRS k v k v ...  ASK  k v k v ...       loss on the values after ASK

Both need attention that finds a place by the symbol that stands before it; nothing else answers. Evaluated by exact
match: a document counts if every target is the model's first choice.

    ids   0 BEGIN_COPY   1 BEGIN_PAIRS   2 ASK   then the symbols
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from minim3.training.batch import Group, Sample

BEGIN_COPY, BEGIN_PAIRS, ASK = 0, 1, 2
CONTROL_IDS = 3


class CopySource:
    """Rows of `lengths` symbols, drawn with replacement from `num_symbols`, to be repeated.

    Rows of one length can be repeated by looking a fixed distance back, which teaches nothing for other tasks.
    symbols_per_row: a row draws from so many of the symbols only. Where a symbol stands twice, what followed it the
    first time need not follow now; rows of few symbols teach to look further back than one.
    """

    def __init__(
        self, seed: int, lengths: Sequence[int] = (16,), num_symbols: int = 256, symbols_per_row: int | None = None
    ) -> None:
        if symbols_per_row is not None and not 0 < symbols_per_row <= num_symbols:
            raise ValueError(
                f"symbols_per_row is {symbols_per_row}; it must lie in 1..{num_symbols}, of which it draws"
            )
        self.seed, self.lengths = seed, tuple(lengths)
        self.num_symbols, self.symbols_per_row = num_symbols, symbols_per_row

    def group(self, index: int) -> Group:
        rng = np.random.default_rng([self.seed, index])
        length = self.lengths[int(rng.integers(len(self.lengths)))]
        if self.symbols_per_row is None:
            drawn = rng.integers(self.num_symbols, size=length)
        else:
            drawn = rng.choice(rng.choice(self.num_symbols, self.symbols_per_row, replace=False), length)
        row = (CONTROL_IDS + drawn).tolist()
        return Group([Sample([_says("user", BEGIN_COPY, *row, ASK), _says("assistant", *row)], kind="copy")])


class LookupSource:
    """So many pairs of `num_symbols` symbols, each of which stands once, and questions for `num_questions` of them.

    num_pairs: how many, drawn with `pair_weights` (equally often by default). Few pairs are looked up sooner than many,
    and teach how. num_questions: None asks for every pair, in another order than they stand.
    """

    def __init__(
        self,
        seed: int,
        num_pairs: Sequence[int] = (16,),
        pair_weights: Sequence[float] | None = None,
        num_questions: int | None = 1,
        num_symbols: int = 256,
    ) -> None:
        most, least = max(num_pairs), min(num_pairs)
        if 2 * most > num_symbols:
            raise ValueError(f"num_pairs is {most}, which needs {2 * most} symbols; there are {num_symbols}")
        if num_questions is not None and num_questions > least:
            raise ValueError(f"num_questions is {num_questions}, but there are only {least} pairs")
        weights = np.ones(len(num_pairs)) if pair_weights is None else np.asarray(pair_weights, dtype=np.float64)
        if len(weights) != len(num_pairs):
            raise ValueError(f"{len(weights)} pair_weights are given for {len(num_pairs)} numbers of pairs")
        self.seed, self.num_pairs, self.shares = seed, tuple(num_pairs), weights / weights.sum()
        self.num_questions, self.num_symbols = num_questions, num_symbols

    def group(self, index: int) -> Group:
        rng = np.random.default_rng([self.seed, index])
        num_pairs = self.num_pairs[int(rng.choice(len(self.num_pairs), p=self.shares))]
        pairs = CONTROL_IDS + rng.choice(self.num_symbols, 2 * num_pairs, replace=False).reshape(-1, 2)
        messages = [_says("user", BEGIN_PAIRS, *pairs.flatten().tolist(), ASK)]
        for key, value in pairs[rng.permutation(num_pairs)[: self.num_questions]].tolist():
            messages += [_says("user", key), _says("assistant", value)]
        return Group([Sample(messages, kind="lookup")])


def _says(role: str, *ids: int) -> dict[str, Any]:
    return {"role": role, "content": list(ids)}
