"""Needle in a haystack, and retrieval of one of many keys: prompts of an exact number of tokens, made on the spot.

A prompt is filler sentences with "facts" among them (a number under a key) and, at its end, the question for the number
of one key. One key is the needle test; more keys are retrieval among look-alikes. `depth` is where the fact asked for
stands: 0 before all filler, 1 after it.
"""

import random
import re
from bisect import bisect_left
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate

from minim3.evaluation.records import Prompt
from minim3.evaluation.report import Share, grid
from minim3.processing.processor import MiniMaxM3VLProcessor

DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
LENGTHS = (1024, 2048, 4096)
NUM_KEYS = 16
MAX_NEW_TOKENS = 64
_INTRODUCTION = "Numbers of things are noted in the text below. Keep them in mind: one is asked for at the end.\n\n"
_FILLER = (
    "The road along the river was quiet in the morning.", "Two boats lay at the pier and nobody was about.",
    "Rain had fallen all night, and the fields were dark.", "A dog slept in front of the bakery.",
    "The mill had not been used for many years.", "Children walked to school past the old wall.",
    "At noon the market square filled with people.", "The baker opened his shop before the sun came up.",
    "Some of the houses had gardens with apple trees.", "The wind turned to the north in the evening.",
    "A train went by on the far side of the valley.", "Nobody could say how old the bridge was.",
    "The library was closed on Mondays.", "In summer the hills were brown and dry.",
    "The clock on the tower was always a little slow.", "Letters came in the afternoon, if there were any.",
    "An old man sold chestnuts at the corner.", "The path to the lake went through a wood.",
    "In winter the ice was thick enough to walk on.", "The teacher read a story while it snowed outside.",
    "Birds gathered on the roof of the station.", "The last bus left the village at nine.",
    "On Sundays there was music in the park.", "The shop by the church sold paper and ink.",
)  # fmt: skip
_ADJECTIVES = (
    "amber", "ancient", "blue", "broken", "bronze", "clever", "crooked", "distant", "early", "empty", "gentle",
    "golden", "green", "hidden", "hollow", "iron", "lonely", "narrow", "painted", "quiet", "red", "silver", "wooden",
    "yellow",
)  # fmt: skip
_NOUNS = (
    "anchor", "arrow", "barrel", "basket", "bell", "button", "candle", "carpet", "chair", "compass", "crown", "drum",
    "feather", "flute", "hammer", "kettle", "ladder", "lantern", "mirror", "needle", "saddle", "table", "whistle",
    "window",
)  # fmt: skip
_KEYS = tuple(f"{adjective} {noun}" for adjective in _ADJECTIVES for noun in _NOUNS)
_MARK = "HAYSTACK"


@dataclass(frozen=True)
class NeedleCase:
    """A prompt of exactly `length` tokens that asks for `answer`. `depth` is where the fact came to stand, between
    sentences."""

    prompt: Prompt
    answer: str
    length: int
    depth: float

    def is_right(self, answer: str) -> bool:
        """The number stands in the answer, whatever is said around it."""
        return re.search(rf"(?<!\d){self.answer}(?!\d)", answer) is not None


class NeedleMaker:
    """Makes prompts for one model.

    Args:
        processor: of the model; its tokenizer counts, its chat format is around the text.
        num_keys: facts in a prompt, of which one is asked for.
        raw: text to continue instead of the chat format, for models that do not know it.
        thinking: mode of the chat format; default: the answer comes at once.

    Raises:
        ValueError: more keys than there are, or a chat template that changes the text.
    """

    def __init__(
        self,
        processor: MiniMaxM3VLProcessor,
        num_keys: int = 1,
        *,
        raw: bool = False,
        thinking: str = "disabled",
    ) -> None:
        if not 1 <= num_keys <= len(_KEYS):
            raise ValueError(f"{num_keys} keys were asked for; 1 to {len(_KEYS)} can be made")
        self._tokenizer = processor.tokenizer
        self._num_keys = num_keys
        self._raw = raw
        self._filler = [self._tokenizer.encode(" " + sentence) for sentence in _FILLER]
        self._head, self._tail = ([], []) if raw else _around_user_text(processor, thinking)
        self._head = [*self._head, *self._tokenizer.encode(_INTRODUCTION)]

    def make(self, length: int, depth: float, seed: str) -> NeedleCase:
        """One prompt; the same seed makes the same.

        Raises:
            ValueError: a depth outside 0 to 1, or a length that the facts and the question alone exceed.
        """
        if not 0 <= depth <= 1:
            raise ValueError(f"the depth is {depth:g}; it lies between 0 (first) and 1 (last)")
        rng = random.Random(f"{seed}/{length}/{depth}")
        keys = rng.sample(_KEYS, self._num_keys)
        numbers = [str(number) for number in rng.sample(range(1_000_000, 10_000_000), self._num_keys)]
        facts = [self._tokenizer.encode(f" The number of the {key} is {number}.") for key, number in zip(keys, numbers)]
        question = self._tokenizer.encode(_question(keys[0], raw=self._raw))
        fixed = len(self._head) + len(question) + len(self._tail) + sum(map(len, facts))
        if fixed > length:
            raise ValueError(
                f"a prompt of {length} tokens has no room: facts ({self._num_keys}), question and format take {fixed}"
            )
        filler = self._fill(rng, length - fixed)
        starts = list(accumulate(map(len, filler), initial=0))
        # The fact asked for stands at its depth, the others anywhere.
        places = [_nearest(starts, depth), *(rng.randrange(len(starts)) for _ in keys[1:])]
        ids = [*self._head]
        for place, sentence in enumerate([*filler, []]):
            for fact in (fact for fact, wanted in zip(facts, places) if wanted == place):
                ids += fact
            ids += sentence
        ids += [*question, *self._tail]
        assert len(ids) == length, (len(ids), length)
        return NeedleCase(Prompt(ids), numbers[0], length, starts[places[0]] / starts[-1] if starts[-1] else 0.0)

    def _fill(self, rng: random.Random, num_tokens: int) -> list[list[int]]:
        """Sentences of so many tokens together; of the first, only as much of its end as there is room for."""
        sentences: list[list[int]] = []
        while num_tokens:
            sentence = rng.choice(self._filler)[-num_tokens:]
            sentences.append(sentence)
            num_tokens -= len(sentence)
        return sentences[::-1]


def run_needles(
    answer: Callable[[Iterable[Prompt]], Iterator[str]],
    maker: NeedleMaker,
    *,
    lengths: Sequence[int],
    depths: Sequence[float] = DEPTHS,
    num_samples: int = 5,
    seed: int = 0,
    progress: Callable[[int], None] | None = None,
) -> dict[tuple[int, float], Share]:
    """Share of right answers by length (tokens of the prompt) and depth, `num_samples` each.

    answer: gives the answers to prompts in order (`answers.greedy_answers` with a model). progress: called after each
    answer with the number done. Raises ValueError as `NeedleMaker.make` does.
    """
    cells = [(length, depth) for length in lengths for depth in depths]
    asked: deque[tuple[tuple[int, float], NeedleCase]] = deque()

    def prompts() -> Iterator[Prompt]:
        for cell in cells:
            for sample in range(num_samples):
                case = maker.make(*cell, f"{seed}/{sample}")
                asked.append((cell, case))
                yield case.prompt

    right = dict.fromkeys(cells, 0)
    for done, given in enumerate(answer(prompts()), start=1):
        cell, case = asked.popleft()
        right[cell] += case.is_right(given)
        if progress is not None:
            progress(done)
    return {cell: Share(right[cell], num_samples) for cell in cells}


def needle_table(shares: dict[tuple[int, float], Share]) -> str:
    """Percentages: a row a length, a column a depth."""
    lengths = list(dict.fromkeys(length for length, _ in shares))
    depths = list(dict.fromkeys(depth for _, depth in shares))
    rows = [(f"{length:,}", [f"{shares[length, depth].percent:.0f}%" for depth in depths]) for length in lengths]
    return grid("tokens \\ depth", [f"{100 * depth:g}%" for depth in depths], rows)


def _question(key: str, *, raw: bool) -> str:
    if raw:
        return f"\n\nQuestion: What is the number of the {key}?\nAnswer: The number of the {key} is"
    return f"\n\nWhat is the number of the {key}? Answer with the number alone."


def _nearest(starts: Sequence[int], depth: float) -> int:
    """Index of the place between sentences that lies nearest to the depth."""
    wanted = depth * starts[-1]
    after = bisect_left(starts, wanted)
    before = max(after - 1, 0)
    return before if wanted - starts[before] < starts[after] - wanted else after


def _around_user_text(processor: MiniMaxM3VLProcessor, thinking: str) -> tuple[list[int], list[int]]:
    """Ids before and after the text of a user turn, up to where the answer begins."""
    inputs = processor.apply_chat_template([{"role": "user", "content": _MARK}], thinking_mode=thinking)
    ids, mark = inputs["input_ids"][0].tolist(), processor.tokenizer.encode(_MARK)
    places = [at for at in range(len(ids)) if ids[at : at + len(mark)] == mark]
    if len(places) != 1:
        raise ValueError("the chat template of this checkpoint changes the text of a user: measure with --raw")
    return ids[: places[0]], ids[places[0] + len(mark) :]


def default_lengths(max_tokens: int, new_tokens: int = MAX_NEW_TOKENS) -> tuple[int, ...]:
    """Lengths to test where none are named: those of LENGTHS that leave room for an answer; else all there is."""
    room = max_tokens - new_tokens
    return tuple(length for length in LENGTHS if length <= room) or (room,)


def check_lengths(lengths: Sequence[int], max_tokens: int, new_tokens: int = MAX_NEW_TOKENS) -> None:
    """Raises ValueError for a prompt that leaves no room for its answer."""
    for length in lengths:
        if not 1 <= length <= max_tokens - new_tokens:
            raise ValueError(
                f"a length of {length} tokens and {new_tokens} of the answer are more than the model takes "
                f"({max_tokens}, max_position_embeddings)"
            )
