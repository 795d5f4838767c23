"""A task to study long contexts with: pairs of symbols, hidden in noise, looked up at the end.

A document is `BEGIN`, a context of noise in which `key value` pairs stand, `ASK`, and questions: keys of the context,
each followed by its value. Loss falls on the values after `ASK`. Nothing but attention to the one place where the key
stood before answers a question, and a document asks many: a small model learns it in minutes, and sparse attention
that does not choose the block of that place fails visibly. After multi-query associative recall, arXiv 2312.04927.

    ids   0 BEGIN   1 ASK   then `num_noise` noise symbols, `num_keys` keys, `num_values` values
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from minim3.training.batch import Group, Sample

BEGIN, ASK = 0, 1
CONTROL_IDS = 2


class SymbolProcessor:
    """What training needs of a processor, for conversations whose contents are lists of ids already.

    Loss falls on the assistant's ids.
    """

    image_processor = None

    def encode_conversation(
        self, messages: Sequence[Mapping[str, Any]], *, num_image_tokens: Sequence[int] = (), **options: Any
    ) -> tuple[list[int], list[bool]]:
        """Ids, and at which of them loss falls."""
        assert not num_image_tokens
        ids: list[int] = []
        mask: list[bool] = []
        for message in messages:
            ids += message["content"]
            mask += [message["role"] == "assistant"] * len(message["content"])
        return ids, mask


class RetrievalSource:
    """Documents of `lengths` tokens, drawn with `length_weights` (equally often by default).

    They hold `num_pairs` pairs and `num_questions` questions, or fewer: at most half of a document is questions, and a
    quarter of its context pairs. Where there are more questions than pairs, some are asked again.
    """

    def __init__(
        self,
        seed: int,
        lengths: Sequence[int] = (2048,),
        length_weights: Sequence[float] | None = None,
        num_pairs: int = 64,
        num_questions: int = 64,
        num_noise: int = 62,
        num_keys: int = 128,
        num_values: int = 128,
    ) -> None:
        if num_pairs > num_keys:
            raise ValueError(f"num_pairs is {num_pairs}, but there are only {num_keys} keys: a key may stand once")
        if min(lengths) < 16:
            raise ValueError(f"lengths holds {min(lengths)}; a document needs at least 16 tokens")
        if length_weights is not None and len(length_weights) != len(lengths):
            raise ValueError(f"{len(length_weights)} length_weights are given for {len(lengths)} lengths")
        self.seed, self.lengths = seed, tuple(lengths)
        weights = np.ones(len(lengths)) if length_weights is None else np.asarray(length_weights, dtype=np.float64)
        self.shares = weights / weights.sum()
        self.num_pairs, self.num_questions = num_pairs, num_questions
        self.num_noise, self.num_keys, self.num_values = num_noise, num_keys, num_values

    @property
    def vocab_size(self) -> int:
        return CONTROL_IDS + self.num_noise + self.num_keys + self.num_values

    def group(self, index: int) -> Group:
        rng = np.random.default_rng([self.seed, index])
        length = int(self.lengths[rng.choice(len(self.lengths), p=self.shares)])
        num_questions = min(self.num_questions, length // 4)
        num_context = length - 2 - 2 * num_questions
        num_pairs = min(self.num_pairs, num_context // 8)
        first_key = CONTROL_IDS + self.num_noise
        keys = first_key + rng.choice(self.num_keys, num_pairs, replace=False)
        values = first_key + self.num_keys + rng.integers(self.num_values, size=num_pairs)
        context = CONTROL_IDS + rng.integers(self.num_noise, size=num_context)
        # Places of pairs that do not overlap: places of single symbols in a context shorter by one a pair, moved apart.
        places = np.sort(rng.choice(num_context - num_pairs, num_pairs, replace=False)) + np.arange(num_pairs)
        context[places], context[places + 1] = keys, values
        asked = rng.choice(num_pairs, num_questions, replace=num_questions > num_pairs)
        messages: list[dict[str, Any]] = [{"role": "user", "content": [BEGIN, *context.tolist(), ASK]}]
        for key, value in zip(keys[asked].tolist(), values[asked].tolist(), strict=True):
            messages += [{"role": "user", "content": [key]}, {"role": "assistant", "content": [value]}]
        return Group([Sample(messages, kind=f"retrieval_{length}")])
