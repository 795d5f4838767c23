"""In which order records are read: without replacement, another order every epoch, any place of it found at once.

Nothing here grows with the number of records, so that resuming at record 10^9 costs what starting costs.
"""

from collections.abc import Iterator, Sequence
from functools import lru_cache
from itertools import accumulate, pairwise

import numpy as np

# First entry of the seed sequences drawn from here.
_ORDER, _HELD_OUT, _DRAWS = 101, 102, 103
_ROUNDS = 4
_MIN_HALF_BITS = 4  # a network on fewer than 8 bits reaches too few of the permutations of a handful of records
_MASK64 = 2**64 - 1


class Permutation:
    """A pseudo-random permutation of `range(length)` that is computed, not stored.

    A Feistel network permutes the numbers of 2 * half_bits bits; walking on from what lies outside of the range until
    something lies inside restricts it to the range (Black and Rogaway, "Ciphers with arbitrary finite domains", 2002).
    """

    def __init__(self, length: int, seed: Sequence[int]) -> None:
        self.length = length
        self.half_bits = max(_MIN_HALF_BITS, ((length - 1).bit_length() + 1) // 2)
        self.keys: list[int] = np.random.SeedSequence(list(seed)).generate_state(_ROUNDS, np.uint64).tolist()

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> int:
        assert 0 <= index < self.length
        half_mask = (1 << self.half_bits) - 1
        while True:
            left, right = index >> self.half_bits, index & half_mask
            for key in self.keys:
                left, right = right, left ^ (_mix(right ^ key) & half_mask)
            index = left << self.half_bits | right
            if index < self.length:
                return index


def _mix(value: int) -> int:
    """The finalizer of splitmix64 (Steele, Lea and Flood 2014): every bit in reaches every bit out."""
    value = (value ^ value >> 30) * 0xBF58476D1CE4E5B9 & _MASK64
    value = (value ^ value >> 27) * 0x94D049BB133111EB & _MASK64
    return value ^ value >> 31


@lru_cache(maxsize=256)
def _permutation(length: int, seed: tuple[int, ...]) -> Permutation:
    return Permutation(length, seed)


class EpochOrder:
    """Which record stands at place `index` of an epoch.

    Records lie in blocks (the row groups of a Parquet file; anything read record by record is one block). The order of
    blocks and the order inside each are shuffled, so a block is read once an epoch. The same share of every block is
    held out: `evaluation` chooses those records, otherwise the rest are taken.

    Args:
        seed: what the order of an epoch depends on, beside the epoch; the held-out records depend on nothing.
    """

    def __init__(
        self, block_sizes: Sequence[int], *, seed: Sequence[int], shuffle: bool, held_out: float, evaluation: bool
    ) -> None:
        self.seed, self.shuffle = tuple(seed), shuffle
        ends = [int(end * held_out + 1e-9) for end in accumulate(block_sizes, initial=0)]
        self.held_out = [end - start for start, end in pairwise(ends)]
        self.block_sizes = list(block_sizes)
        self.takes_held_out = evaluation and held_out > 0
        self.counts = (
            self.held_out
            if self.takes_held_out
            else [size - held for size, held in zip(self.block_sizes, self.held_out)]
        )
        self._ends: dict[int, np.ndarray] = {}  # of the last epoch: where each block ends

    def __len__(self) -> int:
        return sum(self.counts)

    def locate(self, epoch: int, index: int) -> tuple[int, int]:
        """Block and row of the record at place `index` of `epoch`."""
        if epoch not in self._ends:
            order = [self._block(epoch, place) for place in range(len(self.counts))]
            self._ends = {epoch: np.cumsum([self.counts[block] for block in order])}
        ends = self._ends[epoch]
        place = int(np.searchsorted(ends, index, side="right"))
        block = self._block(epoch, place)
        row = index - (int(ends[place - 1]) if place else 0)
        if self.shuffle:
            row = _permutation(self.counts[block], (_ORDER, *self.seed, epoch, 1 + block))[row]
        if any(self.held_out):
            start = 0 if self.takes_held_out else self.held_out[block]
            row = _permutation(self.block_sizes[block], (_HELD_OUT, block))[start + row]
        return block, row

    def _block(self, epoch: int, place: int) -> int:
        if not self.shuffle or len(self.counts) == 1:
            return place
        return _permutation(len(self.counts), (_ORDER, *self.seed, epoch, 0))[place]


class DrawOrder:
    """Which source each draw takes, by weight: draw `n` depends on the seed and `n` alone.

    Iterating yields (source, how many earlier draws took this source) from draw `start` on, where `counts` are those
    numbers for every source.
    """

    BLOCK = 1024

    def __init__(
        self, weights: Sequence[float], *, seed: Sequence[int], start: int = 0, counts: Sequence[int] = ()
    ) -> None:
        shares = np.array(weights, dtype=np.float64)
        self.shares = shares / shares.sum()
        self.seed = tuple(seed)
        self.draw = start
        self.counts = list(counts) or [0] * len(weights)
        self._block: list[int] = []

    def __iter__(self) -> Iterator[tuple[int, int]]:
        return self

    def __next__(self) -> tuple[int, int]:
        number, place = divmod(self.draw, self.BLOCK)
        if not self._block or place == 0:
            rng = np.random.default_rng(np.random.SeedSequence([_DRAWS, *self.seed, number]))
            self._block = rng.choice(len(self.shares), size=self.BLOCK, p=self.shares).tolist()
        source = self._block[place]
        position = self.counts[source]
        self.counts[source] += 1
        self.draw += 1
        return source, position
