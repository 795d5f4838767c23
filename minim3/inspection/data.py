"""What an inspection holds: plain values that go to JSON as they are.

Positions count the tokens of prompt and answer from 0. The token at position p was chosen by what the model computed at
position p - 1: that is the query whose blocks and experts are shown for it. With P tokens of prompt, answer token j
stands at position P + j and its query at P - 1 + j. The last token of an answer is never fed, so it has no query of
its own.

Shape legend: T tokens, Q = T - 1 positions that were fed, A answer tokens, H index heads, B blocks that a query sees.
"""

from dataclasses import dataclass, fields, is_dataclass
from typing import Any, Literal

TokenKind = Literal["text", "control", "image", "video"]
MediaKind = Literal["image", "video"]

FORMAT = 1
"""Raised when a field changes its meaning."""


@dataclass(frozen=True, slots=True)
class Place:
    """Which part of a picture or clip a placeholder token stands for: `media` is an index into `Inspection.media`,
    `time` counts temporal patches, `row` and `column` count tokens (merged patches) from the top left."""

    media: int
    time: int
    row: int
    column: int


@dataclass(frozen=True, slots=True)
class Token:
    """A token of prompt or answer.

    text: what it adds to the decoded text, which all tokens' texts make up when put together; empty for the first bytes
    of a character that a later token completes. start, stop: that text's span, in characters.
    """

    id: int
    text: str
    start: int
    stop: int
    kind: TokenKind
    place: Place | None = None


@dataclass(frozen=True, slots=True)
class MediaItem:
    """A picture, or a chunk of a clip (a row of `video_grid_thw`), as the model was given it.

    times, rows, columns: its tokens along each axis. width, height: pixels the model was given, patches included.
    thumbnails: a data URL for each temporal patch (its first frame), None for those past `MAX_THUMBNAILS`.
    """

    kind: MediaKind
    times: int
    rows: int
    columns: int
    width: int
    height: int
    thumbnails: tuple[str | None, ...]


@dataclass(frozen=True, slots=True)
class WrittenToken:
    """How likely an answer token was, by the model's own distribution (before temperature and filters), and the
    likeliest tokens in its place: (text, probability), best first."""

    probability: float
    rank: int
    likeliest: tuple[tuple[str, float], ...]


@dataclass(frozen=True, slots=True)
class SelectionStatistics:
    """How the index heads of a layer selected, over all fed positions of prompt and answer.

    num_queries: positions times heads. num_choosing: those that saw more blocks than they may select; all that follows
    is over them, or over all queries where there is none.
    mean_selected: blocks a query. share_init, share_local: of the selected blocks, those that are forced because they
    come first or last. selected_at, available_at: blocks by distance, 0 for the query's own, then 1, 2, 3-4, 5-8, ...:
    bin n > 0 ends at 2**(n - 1) blocks back.
    new_blocks: blocks that a query selects and the same head of the position before did not, on average.
    distinct_of_8: blocks that 8 adjacent positions select together, on average (of one head); None for fewer than 8.
    head_overlap: |intersection| / |union| of the blocks of two heads of a position, on average; None for one head.
    """

    num_queries: int
    num_choosing: int
    mean_selected: float
    share_init: float
    share_local: float
    selected_at: tuple[int, ...]
    available_at: tuple[int, ...]
    new_blocks: float
    distinct_of_8: float | None
    head_overlap: float | None


@dataclass(frozen=True, slots=True)
class ExpertLoad:
    """How many tokens each expert of a layer was given: of the prompt, and of the queries that wrote the answer.

    balance: the largest load over the mean load, 1 where all are equal. entropy: of the loads, as a share of its
    maximum.
    """

    prompt: tuple[int, ...]
    answer: tuple[int, ...]
    balance: float
    entropy: float


@dataclass(frozen=True, slots=True)
class LayerInspection:
    """One decoder layer.

    selected: `[A][H]` ascending ids of the selected blocks; None in a layer with full attention, and where the details
    of the layer were not asked for. scores: `[A][H][B]`, the index score of every block the query saw. chooses: `[A]`,
    whether the query saw more blocks than it may select; where not, it attended to all of them.
    expert_ids, expert_weights: `[Q][K]`, largest weight first; None in a dense layer or where not asked for.
    """

    layer: int
    attention: Literal["full", "sparse"]
    mlp: Literal["dense", "moe"]
    selected: tuple[tuple[tuple[int, ...], ...], ...] | None = None
    scores: tuple[tuple[tuple[float, ...], ...], ...] | None = None
    chooses: tuple[bool, ...] | None = None
    expert_ids: tuple[tuple[int, ...], ...] | None = None
    expert_weights: tuple[tuple[float, ...], ...] | None = None
    selection: SelectionStatistics | None = None
    load: ExpertLoad | None = None


@dataclass(frozen=True, slots=True)
class Inspection:
    """A prompt, its answer, and what the model did to write it. See the top of this file for positions.

    block_size: tokens a block. topk_blocks, init_blocks, local_blocks: the budget of a query and the forced part of it.
    All four are 0 in a model without sparse attention.
    """

    model: str
    num_prompt_tokens: int
    tokens: tuple[Token, ...]
    written: tuple[WrittenToken, ...]
    media: tuple[MediaItem, ...]
    layers: tuple[LayerInspection, ...]
    block_size: int
    topk_blocks: int
    init_blocks: int
    local_blocks: int
    num_index_heads: int
    num_query_heads: int
    num_experts: int
    has_shared_expert: bool
    format: int = FORMAT

    @property
    def text(self) -> str:
        """Prompt and answer, decoded."""
        return "".join(token.text for token in self.tokens)

    @property
    def num_answer_tokens(self) -> int:
        return len(self.tokens) - self.num_prompt_tokens

    def to_dict(self) -> dict[str, Any]:
        """What JSON can hold. Tuples become lists when they are written."""
        return _plain(self)


def _plain(value: Any) -> Any:
    """Dataclasses as dictionaries; unlike `dataclasses.asdict`, rows of numbers are not copied one by one."""
    if is_dataclass(value):
        return {one.name: _plain(getattr(value, one.name)) for one in fields(value)}
    if isinstance(value, tuple) and value and is_dataclass(value[0]):
        return [_plain(one) for one in value]
    return value
