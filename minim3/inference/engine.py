"""The engine: requests in, tokens out. Each step schedules, runs, and commits.

One thread drives an engine. Between two steps its state is whole: what a step changes is committed at its end, after
the model has run, so that a step cut short by an exception or by Ctrl-C did not happen, and can be repeated or aborted.
"""

import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from minim3.inference.cache import PagedCache
from minim3.inference.guide import Guide
from minim3.inference.request import FinishReason, Media, Request, SamplingParams, TokenLogprobs
from minim3.inference.runner import Runner
from minim3.inference.sampling import Sampler
from minim3.inference.scheduler import Chunk, Scheduler
from minim3.processing.detokenizer import StopStrings

if TYPE_CHECKING:
    from minim3.model.causal_lm import CausalLM

DEFAULT_TOKENS_PER_STEP = 2048


class Detokenizer(Protocol):
    """Ids of one answer to text, bit by bit: `minim3.processing.detokenizer.IncrementalDetokenizer`, or its like."""

    def feed(self, ids: int) -> str:
        """The text that became certain with this id (perhaps none: half a character is held back)."""

    def finish(self) -> str:
        """What was held back, once no more ids follow."""


@dataclass(frozen=True, slots=True)
class TokenEvent:
    """One generated token of one request.

    text: what may be shown of the answer since the last event (empty without a detokenizer, inside a character, or
    while a stop string may be forming). finish_reason: set on the last event of a request.
    """

    request: Request
    token_id: int
    text: str = ""
    logprobs: TokenLogprobs | None = None
    finish_reason: FinishReason | None = None


class Engine:
    """Runs many requests on one model and one paged cache.

    Args:
        model: either model class, on the device it shall run on.
        page_size: tokens a cache page holds; None takes the model's selection block.
        max_tokens_per_step: tokens computed in one step, at most; longer prompts are computed in chunks of it.
        max_running: requests that run at once, at most.
        num_pages: size of the cache in pages, fixed. None: the cache starts with `initial_pages` and grows as needed.
        initial_pages: see `num_pages`.
        shuffle_seed, poison: debugging aids of the cache (`PagedCache`).
    """

    def __init__(
        self,
        model: "CausalLM",
        *,
        page_size: int | None = None,
        max_tokens_per_step: int = DEFAULT_TOKENS_PER_STEP,
        max_running: int = 256,
        num_pages: int | None = None,
        initial_pages: int = 64,
        shuffle_seed: int | None = None,
        poison: bool = False,
    ) -> None:
        weight = next(iter(model.text_model.parameters()))
        self.model = model
        self.cache = PagedCache(
            model.text_config,
            page_size=page_size,
            num_pages=initial_pages if num_pages is None else num_pages,
            max_pages=num_pages,
            dtype=weight.dtype,
            device=weight.device,
            shuffle_seed=shuffle_seed,
            poison=poison,
        )
        self.scheduler = Scheduler(
            max_tokens_per_step=max_tokens_per_step,
            max_running=max_running,
            page_size=self.cache.page_size,
            max_pages=num_pages,
        )
        self.runner = Runner(model, self.cache)
        self.sampler = Sampler()
        self.requests: dict[str, Request] = {}
        self._texts: dict[Request, tuple[Detokenizer, StopStrings]] = {}

    def add_request(
        self,
        prompt_ids: Sequence[int],
        params: SamplingParams | None = None,
        *,
        media: Media | Mapping[str, Tensor] | None = None,
        detokenizer: Detokenizer | None = None,
        request_id: str | None = None,
        guide: Guide | None = None,
        priority: int = 0,
    ) -> Request:
        """Queue a prompt. The returned request is filled in as steps run.

        Args:
            prompt_ids: token ids, at least one, each within the vocabulary.
            media: the pictures and clips of the prompt, as a processor returns them (other keys are not looked at).
            detokenizer: a fresh one, for `request.text`, the `text` of events, and stop strings.
            request_id: a name of your own; one is made up otherwise.
            guide: keeps the answer inside a grammar; one that no other request uses.
            priority: requests of a higher one go first, and take pages from those of a lower one.

        Raises:
            ValueError: an empty prompt, one longer than the model, an id outside the vocabulary, media that do not
                match the placeholders, stop strings without a detokenizer, a name already running, or a request too
                large for the cache.
        """
        params = SamplingParams() if params is None else params
        request_id = uuid.uuid4().hex if request_id is None else request_id
        if request_id in self.requests:
            raise ValueError(f"a request named {request_id!r} is already running")
        if params.stop and detokenizer is None:
            raise ValueError(f"stop strings {params.stop!r} need a tokenizer, to turn ids into text")
        token_ids = [int(token_id) for token_id in prompt_ids]
        self._check_prompt(token_ids)
        if media is not None and not isinstance(media, Media):
            media = Media.of(media)
        # A token is fed at its own position; the last one generated is never fed, and may lie one past the end.
        room = self.model.text_config.max_position_embeddings + 1 - len(token_ids)
        request = Request(
            request_id=request_id,
            token_ids=token_ids,
            num_prompt_tokens=len(token_ids),
            max_new_tokens=min(params.max_new_tokens, room),
            params=params,
            media=media,
            placeholders=find_placeholders(self.model, token_ids, media),
            guide=guide,
            priority=priority,
        )
        self.scheduler.add(request)
        self.requests[request_id] = request
        if detokenizer is not None:
            self._texts[request] = detokenizer, StopStrings(params.stop)
        return request

    def add_requests(
        self,
        prompt_ids: Sequence[int],
        params: SamplingParams | None = None,
        *,
        n: int,
        media: Media | Mapping[str, Tensor] | None = None,
        detokenizers: Sequence[Detokenizer] | None = None,
        request_ids: Sequence[str] | None = None,
        guides: Sequence[Guide] | None = None,
        priority: int = 0,
    ) -> list[Request]:
        """Queue `n` answers to one prompt, which share its pages; answer i draws from the stream `seed + i`.

        Detokenizers, names and guides are one an answer. Raises ValueError as `add_request` does, and for a list of
        another length; then nothing is queued.
        """
        if isinstance(n, bool) or not isinstance(n, int) or n < 1:
            raise ValueError(f"n must be an integer of at least 1, got {n!r}")
        for name, given in (("detokenizers", detokenizers), ("request_ids", request_ids), ("guides", guides)):
            if given is not None and len(given) != n:
                raise ValueError(f"{name} must be {n}, one an answer, got {len(given)}")
        params = SamplingParams() if params is None else params
        if media is not None and not isinstance(media, Media):
            media = Media.of(media)
        requests: list[Request] = []
        try:
            for i in range(n):
                own = params if params.seed is None else replace(params, seed=(params.seed + i) % 2**64)
                request = self.add_request(
                    prompt_ids, own, media=media, priority=priority,
                    detokenizer=None if detokenizers is None else detokenizers[i],
                    request_id=None if request_ids is None else request_ids[i],
                    guide=None if guides is None else guides[i],
                )  # fmt: skip
                requests.append(request)
        except ValueError:
            for request in requests:
                self.abort(request.request_id)
            raise
        return requests

    def step(self) -> list[TokenEvent]:
        """Compute one step; returns the tokens generated, one a request, none for a chunk that ends inside a prompt."""
        plan = self.scheduler.schedule()
        if not plan:
            return []
        with torch.inference_mode():
            for request, num_tokens in plan:
                self.cache.extend(request, request.num_computed_tokens + num_tokens)
            logits, sampling = self.runner.run(plan)
            sampled = None if logits is None else self.sampler.sample(logits, sampling)
        if sampled is None:
            return self._commit(plan, [], [], [])
        return self._commit(plan, sampling, sampled.token_ids, sampled.logprobs)

    def stream(self) -> Iterator[TokenEvent]:
        """Step until nothing is left, yielding each token as it comes. Closing the iterator aborts what still runs."""
        try:
            while self.scheduler.has_work:
                yield from self.step()
        finally:
            self.abort_all()

    def run(self) -> None:
        """Step until every request is finished. An exception or Ctrl-C aborts all of them and is passed on."""
        for _ in self.stream():
            pass

    def abort(self, request_id: str) -> None:
        """End a request now; its pages are free when this returns.

        Raises:
            ValueError: no such request is waiting or running.
        """
        if request_id not in self.requests:
            raise ValueError(f"no request named {request_id!r} is waiting or running")
        self._finish(self.requests[request_id], "abort")

    def abort_all(self) -> None:
        """Abort every request that is waiting or running."""
        for request_id in list(self.requests):
            self.abort(request_id)

    def check_integrity(self) -> None:
        """Assert that pages, reservations and lengths add up."""
        self.cache.check_integrity(self.requests.values())
        self.scheduler.check_integrity()
        assert set(self.requests.values()) == {*self.scheduler.running, *self.scheduler.waiting}

    def _commit(
        self,
        plan: Sequence[Chunk],
        sampling: Sequence[Request],
        token_ids: Sequence[int],
        logprobs: Sequence[TokenLogprobs | None],
    ) -> list[TokenEvent]:
        for request, num_tokens in plan:
            request.num_computed_tokens += num_tokens
        return [self._append(*chosen) for chosen in zip(sampling, token_ids, logprobs, strict=True)]

    def _append(self, request: Request, token_id: int, logprobs: TokenLogprobs | None) -> TokenEvent:
        params = request.params
        request.token_ids.append(token_id)
        if logprobs is not None:
            request.logprobs.append(logprobs)
        reason: FinishReason | None = None
        if token_id in params.eos_token_ids and not params.ignore_eos:
            reason = "stop"
        text = ""
        if request in self._texts:
            detokenizer, stops = self._texts[request]
            text = stops.feed(detokenizer.feed(token_id))
            if stops.stopped_by is not None:
                reason = "stop"
        if reason is None and request.num_output_tokens == request.max_new_tokens:
            reason = "length"
        if request in self._texts and reason is not None:
            text += stops.feed(detokenizer.finish()) + stops.finish()
        request.text += text
        if reason is not None:
            self._finish(request, reason)
        return TokenEvent(request, token_id, text, logprobs, reason)

    def _finish(self, request: Request, reason: FinishReason) -> None:
        self.scheduler.remove(request)
        self.cache.free(request)
        self.sampler.forget(request)
        self._texts.pop(request, None)
        del self.requests[request.request_id]
        request.finish_reason = reason
        request.media = None  # its pixels and features are not needed any more

    def _check_prompt(self, token_ids: Sequence[int]) -> None:
        config = self.model.text_config
        if not token_ids:
            raise ValueError("the prompt is empty: at least one token is needed")
        if len(token_ids) > config.max_position_embeddings:
            raise ValueError(
                f"the prompt has {len(token_ids)} tokens, but the model takes at most "
                f"{config.max_position_embeddings} (max_position_embeddings)"
            )
        if min(token_ids) < 0 or max(token_ids) >= config.vocab_size:
            wrong = next(token_id for token_id in token_ids if not 0 <= token_id < config.vocab_size)
            raise ValueError(f"token id {wrong} of the prompt is outside the vocabulary of {config.vocab_size}")


def find_placeholders(model: "CausalLM", token_ids: Sequence[int], media: Media | None) -> dict[int, list[int]]:
    """Positions of the media placeholders in a prompt, by placeholder id; only ids that occur.

    Raises:
        ValueError: pictures or clips give another number of features than there are placeholders, or the model has no
            vision tower.
    """
    grids = [
        ("image", "image_token_index", None if media is None else media.image_grid_thw),
        ("video", "video_token_index", None if media is None else media.video_grid_thw),
    ]
    if getattr(model.config, "vision_config", None) is None:
        if media is not None and not media.empty:
            raise ValueError("pictures or clips were given, but this is a text-only model without a vision tower")
        return {}
    placeholders: dict[int, list[int]] = {}
    for kind, field, grid in grids:
        token_id: int = getattr(model.config, field)
        places = [place for place, known in enumerate(token_ids) if known == token_id]
        num_features = 0 if grid is None else sum(num_media_tokens(model, grid))
        if len(places) != num_features:
            raise ValueError(
                f"the prompt has {len(places)} {kind} placeholder tokens (id {token_id}), but the {kind}s given make "
                f"{num_features} features"
            )
        if places:
            placeholders[token_id] = places
    return placeholders


def num_media_tokens(model: "CausalLM", grid_thw: Tensor) -> list[int]:
    """Placeholder tokens of each row of a grid `[n, 3]` of patches: `t * h * w / merge**2`."""
    merge: int = model.config.vision_config.spatial_merge_size
    return [t * h * w // merge**2 for t, h, w in grid_thw.tolist()]
