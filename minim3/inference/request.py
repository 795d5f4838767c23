"""What is asked of the engine (``SamplingParams``) and how far it has come (``Request``).

The lengths of a request, in tokens, and their order at every moment between two steps::

    0 <= num_computed_tokens <= num_tokens = num_prompt_tokens + num_output_tokens
                                 num_output_tokens <= max_new_tokens

``num_computed_tokens`` counts the tokens whose K, V and index key lie in the request's pages. A request that
decodes has exactly one token not yet computed: the one sampled last.
"""

import math
from bisect import bisect_left
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    import torch

    from minim3.inference.guide import Guide

FinishReason = Literal["stop", "length", "abort"]
MAX_LOGPROBS = 1024
MAX_PENALTY = 2.0
MAX_LOGIT_BIAS = 100.0


def _check_number(name: str, value: object, *, low: float, high: float = math.inf, open_low: bool = False) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ValueError(f"{name} must be a number, got {value!r}")
    inside = (low < value if open_low else low <= value) and value <= high and math.isfinite(value)
    if not inside:
        upper = f"{high:g}]" if math.isfinite(high) else "infinity)"
        raise ValueError(f"{name} must lie in {'(' if open_low else '['}{low:g}, {upper}, got {value!r}")


def _check_integer(name: str, value: object, *, low: int, high: int | None = None) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError(f"{name} must be an integer, got {value!r}")
    if value < low or (high is not None and value > high):
        limits = f"at least {low}" if high is None else f"from {low} to {high}"
        raise ValueError(f"{name} must be {limits}, got {value!r}")


@dataclass(frozen=True, kw_only=True, slots=True)
class SamplingParams:
    """How the tokens of one request are chosen and when it ends.

    The order: a guide's mask, logit bias, repetition, presence and frequency penalty, the mask of `min_new_tokens`
    (all of these for greedy choice too), then, when sampling, temperature, top-k, top-p, min-p. Definitions and order
    of what transformers has are its.

    Args:
        max_new_tokens: most tokens to generate, at least 1. Running into the model's last position ends a request too.
        min_new_tokens: no id of ``eos_token_ids`` is chosen, and no stop string looked for, among so many first tokens.
        do_sample: draw from the distribution; False takes the most likely token (the lowest id on a tie).
        temperature: divides the logits; 0 is greedy whatever ``do_sample`` says.
        top_k: keep the k most likely tokens; 0 keeps all.
        top_p: keep the smallest set of most likely tokens whose probability reaches p, in (0, 1]; 1 keeps all.
        min_p: drop tokens less likely than ``min_p`` times the most likely one, in [0, 1]; 0 keeps all.
        repetition_penalty: above 1 makes tokens of the prompt and of the answer less likely; 1 is off.
        presence_penalty: taken from the logit of every token that the answer holds, in [-2, 2].
        frequency_penalty: taken once for every time that the answer holds the token, in [-2, 2].
        logit_bias: token id -> added to its logit, in [-100, 100].
        forbidden_ids: ids that are never chosen. late_ids: not among the first ``min_new_tokens`` tokens.
        seed: seed of this request's own random stream; None draws one from torch's global generator.
        stop: strings that end the request once they stand in its text (needs a detokenizer).
        include_stop_str_in_output: leave the stop string in the text.
        eos_token_ids: ids that end the request; the id itself is the last token of the output.
        ignore_eos: go on after an id of ``eos_token_ids``.
        logprobs: None for none; n >= 0 for the log-probability of every chosen token and of the n most likely ones,
            from the model's own logits (before guide, bias, penalties, temperature and filters).

    Raises:
        ValueError: a value outside its range, named.
    """

    max_new_tokens: int = 256
    min_new_tokens: int = 0
    do_sample: bool = False
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    forbidden_ids: tuple[int, ...] = ()
    late_ids: tuple[int, ...] = ()
    seed: int | None = None
    stop: tuple[str, ...] = ()
    include_stop_str_in_output: bool = False
    eos_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None

    def __post_init__(self) -> None:
        _check_integer("max_new_tokens", self.max_new_tokens, low=1)
        _check_integer("min_new_tokens", self.min_new_tokens, low=0)
        if self.min_new_tokens > self.max_new_tokens:
            raise ValueError(
                f"min_new_tokens ({self.min_new_tokens}) must be at most max_new_tokens ({self.max_new_tokens})"
            )
        for name in ("do_sample", "ignore_eos", "include_stop_str_in_output"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name} must be True or False, got {getattr(self, name)!r}")
        _check_number("temperature", self.temperature, low=0.0)
        _check_integer("top_k", self.top_k, low=0)
        _check_number("top_p", self.top_p, low=0.0, high=1.0, open_low=True)
        _check_number("min_p", self.min_p, low=0.0, high=1.0)
        _check_number("repetition_penalty", self.repetition_penalty, low=0.0, open_low=True)
        for name in ("presence_penalty", "frequency_penalty"):
            _check_number(name, getattr(self, name), low=-MAX_PENALTY, high=MAX_PENALTY)
        if not isinstance(self.logit_bias, Mapping):
            raise ValueError(f"logit_bias must map token ids to numbers, got {self.logit_bias!r}")
        for token_id, bias in self.logit_bias.items():
            _check_integer("every id of logit_bias", token_id, low=0)
            _check_number(f"logit_bias of token {token_id}", bias, low=-MAX_LOGIT_BIAS, high=MAX_LOGIT_BIAS)
        if self.seed is not None:
            _check_integer("seed", self.seed, low=0, high=2**64 - 1)
        if self.logprobs is not None:
            _check_integer("logprobs", self.logprobs, low=0, high=MAX_LOGPROBS)
        if not isinstance(self.stop, tuple) or not all(isinstance(s, str) and s for s in self.stop):
            raise ValueError(f"stop must be a tuple of non-empty strings, got {self.stop!r}")
        for name in ("eos_token_ids", "forbidden_ids", "late_ids"):
            ids = getattr(self, name)
            if not isinstance(ids, tuple):
                raise ValueError(f"{name} must be a tuple of token ids, got {ids!r}")
            for token_id in ids:
                _check_integer(f"every id of {name}", token_id, low=0)

    @property
    def greedy(self) -> bool:
        """True where no random number is drawn."""
        return not self.do_sample or self.temperature == 0

    @property
    def plain_greedy(self) -> bool:
        """True where the token is the argmax of the logits as the model gives them, and nothing else is asked."""
        return self.greedy and not self.changes_logits and self.logprobs is None

    @property
    def changes_logits(self) -> bool:
        """True where something other than temperature and filters comes between the logits and the choice."""
        return bool(
            self.repetition_penalty != 1.0
            or self.presence_penalty
            or self.frequency_penalty
            or self.logit_bias
            or self.forbidden_ids
            or self.min_new_tokens
        )


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """Log-probabilities at one generated position: of the chosen token, and of the most likely ones, best first."""

    chosen: float
    top_token_ids: tuple[int, ...] = ()
    top_logprobs: tuple[float, ...] = ()


@dataclass(slots=True, eq=False)
class Media:
    """Pictures and clips of one prompt, as the processors give them; requests that share a prompt may share one.

    pixel_values [num_patches, C*T*P*P], image_grid_thw int64 [num_images, 3] in patches (time, rows, columns);
    pixel_values_videos and video_grid_thw [num_chunks, 3] likewise.
    ``features`` are filled in once, when they are first needed: placeholder token id -> [num_placeholders, hidden].
    ``digests`` tell contents apart (``media.py``): placeholder token id -> (features, hash) of each picture or chunk.
    """

    pixel_values: "torch.Tensor | None" = None
    image_grid_thw: "torch.Tensor | None" = None
    pixel_values_videos: "torch.Tensor | None" = None
    video_grid_thw: "torch.Tensor | None" = None
    features: "dict[int, torch.Tensor] | None" = None
    digests: dict[int, list[tuple[int, bytes]]] | None = None

    def __post_init__(self) -> None:
        for pixels, grid in (("pixel_values", "image_grid_thw"), ("pixel_values_videos", "video_grid_thw")):
            if (getattr(self, pixels) is None) != (getattr(self, grid) is None):
                present, absent = (pixels, grid) if getattr(self, grid) is None else (grid, pixels)
                raise ValueError(f"{present} was given without {absent}: pass both, as the processor returns them")

    @classmethod
    def of(cls, inputs: "Mapping[str, torch.Tensor]") -> "Media":
        """From what a processor returns; other keys are not looked at."""
        return cls(
            pixel_values=inputs.get("pixel_values"),
            image_grid_thw=inputs.get("image_grid_thw"),
            pixel_values_videos=inputs.get("pixel_values_videos"),
            video_grid_thw=inputs.get("video_grid_thw"),
        )

    @property
    def empty(self) -> bool:
        return all(getattr(self, f.name) is None for f in fields(self))


@dataclass(slots=True, eq=False, kw_only=True)
class Request:
    """One prompt on its way through the engine. Made by ``Engine.add_request``; read by callers, changed by the engine.

    ``token_ids`` are the prompt's ids followed by the generated ones; ``pages`` are the cache pages it holds, in
    order of position; ``placeholders`` maps a media placeholder id to its ascending positions in the prompt.
    ``draft_ids`` are proposals for the tokens that follow, which the next step verifies (speculation).
    ``page_keys`` are the keys of its first pages (``prefix.py``), of which the first ``num_keyed_pages`` are published.

    Counts for its user: ``num_cached_tokens`` of the prompt were found in the cache when it was first admitted;
    ``num_preemptions`` times it lost its pages; ``num_accepted_tokens`` of ``num_drafted_tokens`` proposals stood.
    """

    request_id: str
    token_ids: list[int]
    num_prompt_tokens: int
    max_new_tokens: int
    params: SamplingParams
    media: Media | None = None
    placeholders: dict[int, list[int]] = field(default_factory=dict)
    pages: list[int] = field(default_factory=list)
    num_computed_tokens: int = 0
    finish_reason: FinishReason | None = None
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    text: str = ""
    guide: "Guide | None" = None
    priority: int = 0
    arrival: int = 0
    draft_ids: list[int] = field(default_factory=list)
    page_keys: list[bytes] = field(default_factory=list)
    num_keyed_pages: int = 0
    num_cached_tokens: int | None = None
    num_preemptions: int = 0
    num_drafted_tokens: int = 0
    num_accepted_tokens: int = 0

    @property
    def rank(self) -> tuple[int, int]:
        """Smaller goes first: higher priority, then earlier arrival."""
        return -self.priority, self.arrival

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)

    @property
    def num_output_tokens(self) -> int:
        return len(self.token_ids) - self.num_prompt_tokens

    @property
    def num_uncomputed_tokens(self) -> int:
        return len(self.token_ids) - self.num_computed_tokens

    @property
    def max_stored_tokens(self) -> int:
        """The most tokens this request can ever have in the cache: the last token it generates is never fed."""
        return self.num_prompt_tokens + self.max_new_tokens - 1

    @property
    def output_ids(self) -> list[int]:
        return self.token_ids[self.num_prompt_tokens :]

    @property
    def finished(self) -> bool:
        return self.finish_reason is not None

    def placeholders_between(self, token_id: int, start: int, stop: int) -> tuple[int, int]:
        """First and one-past-last index of the placeholders ``token_id`` at positions ``start <= p < stop``."""
        positions = self.placeholders[token_id]
        return bisect_left(positions, start), bisect_left(positions, stop)

    def check_lengths(self) -> None:
        """Assert the order of the lengths (drawn at the top of this file)."""
        assert 1 <= self.num_prompt_tokens <= self.num_tokens, (self.num_prompt_tokens, self.num_tokens)
        assert 0 <= self.num_computed_tokens <= self.num_tokens, (self.num_computed_tokens, self.num_tokens)
        assert self.num_output_tokens <= self.max_new_tokens, (self.num_output_tokens, self.max_new_tokens)
        assert self.finished or self.num_uncomputed_tokens >= 1, "a running request has a token to compute"
