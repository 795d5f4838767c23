"""The engine: requests in, tokens out. Each step schedules, runs, and commits.

One thread drives an engine. Between two steps its state is whole: what a step changes is committed at its end, after
the model has run, so that a step cut short by an exception or by Ctrl-C did not happen, and can be repeated or aborted.
"""

import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NamedTuple, Protocol

import torch
from torch import Tensor

from minim3.inference.cache import PagedCache, stored_dtype
from minim3.inference.guide import Guide
from minim3.inference.media import digest_media, find_placeholders
from minim3.inference.request import FinishReason, Media, Request, SamplingParams, TokenLogprobs
from minim3.inference.runner import Runner, StepOutput
from minim3.inference.sampling import Sampler
from minim3.inference.scheduler import Chunk, Scheduler
from minim3.inference.speculative import Drafter, num_draft_layers
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


class Chosen(NamedTuple):
    """Tokens that a request gains in a step, with the log-probabilities it asked for."""

    token_ids: list[int]
    logprobs: list[TokenLogprobs | None]


NOTHING = Chosen([], [])


@dataclass(slots=True)
class EngineStats:
    """Counts since the engine was made. Computed tokens are those that went through the model, drafts included."""

    num_steps: int = 0
    num_computed_tokens: int = 0
    num_generated_tokens: int = 0
    num_drafted_tokens: int = 0
    num_accepted_tokens: int = 0


class Engine:
    """Runs many requests on one model and one paged cache.

    Args:
        model: either model class, on the device it shall run on.
        page_size: tokens a cache page holds; None takes the model's selection block.
        max_tokens_per_step: tokens computed in one step, at most; longer prompts are computed in chunks of it.
        max_running: requests that run at once, at most.
        num_pages: size of the cache in pages, fixed. None: the cache starts with `initial_pages` and grows as needed.
        initial_pages: see `num_pages`.
        prefix_caching: requests that begin alike share the pages of their beginning, also with those that are done.
        num_speculative_tokens: tokens that the model's MTP modules propose after every token, at most (0: none). They
            are verified in the next step: the answer is the same, in fewer steps where proposals stand.
        kv_cache_dtype: "auto" stores keys, values and index keys in the dtype of the model, "fp8" in float8_e4m3fn:
            half of bf16, with some loss (docs/kernels.md).
        cuda_graphs: on a GPU, hold the steps of decoding as CUDA graphs.
        shuffle_seed, poison: debugging aids of the cache (`PagedCache`).

    Raises:
        ValueError: a size below its least, speculation with a model that has no MTP modules, or an unknown dtype.
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
        prefix_caching: bool = True,
        num_speculative_tokens: int = 0,
        kv_cache_dtype: str = "auto",
        cuda_graphs: bool = True,
        shuffle_seed: int | None = None,
        poison: bool = False,
    ) -> None:
        weight = next(iter(model.text_model.parameters()))
        self.model = model
        cache_dtype = stored_dtype(kv_cache_dtype, weight.dtype)
        self.cache = PagedCache(
            model.text_config,
            page_size=page_size,
            num_pages=initial_pages if num_pages is None else num_pages,
            max_pages=num_pages,
            dtype=cache_dtype,
            device=weight.device,
            num_draft_layers=num_draft_layers(model, num_speculative_tokens),
            prefix_caching=prefix_caching,
            shuffle_seed=shuffle_seed,
            poison=poison,
        )
        self.scheduler = Scheduler(
            max_tokens_per_step=max_tokens_per_step,
            max_running=max_running,
            pool=self.cache.pool,
        )
        self.runner = Runner(model, self.cache, cuda_graphs=cuda_graphs)
        self.sampler = Sampler()
        self.drafter = Drafter(self.runner, num_speculative_tokens) if num_speculative_tokens else None
        self.stats = EngineStats()
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
            ValueError: an empty prompt, one longer than the model, an id outside the vocabulary (also of logit_bias),
                media that do not match the placeholders, stop strings without a detokenizer, a name already running,
                or a request too large for the cache.
        """
        params = SamplingParams() if params is None else params
        request_id = uuid.uuid4().hex if request_id is None else request_id
        if request_id in self.requests:
            raise ValueError(f"a request named {request_id!r} is already running")
        if params.stop and detokenizer is None:
            raise ValueError(f"stop strings {params.stop!r} need a tokenizer, to turn ids into text")
        token_ids = [int(token_id) for token_id in prompt_ids]
        self._check_prompt(token_ids)
        self._check_bias(params)
        if media is not None and not isinstance(media, Media):
            media = Media.of(media)
        placeholders = find_placeholders(self.model, token_ids, media)
        if placeholders and self.cache.pool.prefix_caching:
            assert media is not None
            digest_media(self.model, media)
        # A token is fed at its own position; the last one generated is never fed, and may lie one past the end.
        room = self.model.text_config.max_position_embeddings + 1 - len(token_ids)
        request = Request(
            request_id=request_id,
            token_ids=token_ids,
            num_prompt_tokens=len(token_ids),
            max_new_tokens=min(params.max_new_tokens, room),
            params=params,
            media=media,
            placeholders=placeholders,
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
        """Compute one step; returns the tokens generated, in order: none for a chunk that ends inside a prompt, one for
        a request that decodes, several where drafts of it stood.
        """
        plan = self.scheduler.schedule()
        if not plan:
            return []
        with torch.inference_mode():
            output = self.runner.run(plan)
            chosen = self._choose(plan, output)
            drafts = [] if self.drafter is None else self.drafter.draft(plan, chosen, output, self.sampler)
        return self._commit(plan, chosen, drafts)

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
        """Assert that pages, references, ranks and lengths add up."""
        self.cache.check_integrity(self.requests.values())
        self.scheduler.check_integrity()
        assert set(self.requests.values()) == {*self.scheduler.running, *self.scheduler.waiting}

    def _choose(self, plan: Sequence[Chunk], output: StepOutput) -> list[Chosen]:
        """The tokens that each chunk of the plan gains: none, one, or as many as drafts stood and one more."""
        if output.logits_RV is None:
            return [NOTHING] * len(plan)
        rows = [
            (chunk.request, chunk.draft_ids[:place])
            for chunk in plan
            if chunk.reaches_end
            for place in range(len(chunk.draft_ids) + 1)
        ]
        requests, ahead = zip(*rows, strict=True)
        sampled = self.sampler.sample(output.logits_RV, requests, ahead)
        chosen, row = [], 0
        for chunk in plan:
            if not chunk.reaches_end:
                chosen.append(NOTHING)
                continue
            # A row is right as long as the drafts before it are what was chosen there.
            num_right = 1
            for place, draft_id in enumerate(chunk.draft_ids):
                if sampled.token_ids[row + place] != draft_id:
                    break
                num_right += 1
            right = slice(row, row + num_right)
            chosen.append(Chosen(sampled.token_ids[right], sampled.logprobs[right]))
            row += len(chunk.draft_ids) + 1
        return chosen

    def _commit(
        self, plan: Sequence[Chunk], chosen: Sequence[Chosen], drafts: Sequence[Sequence[int]]
    ) -> list[TokenEvent]:
        events: list[TokenEvent] = []
        for place, (request, num_tokens, draft_ids) in enumerate(plan):
            token_ids, logprobs = chosen[place]
            request.num_computed_tokens += num_tokens
            request.draft_ids = list(drafts[place]) if drafts else []
            self.stats.num_computed_tokens += num_tokens + len(draft_ids)
            self.stats.num_generated_tokens += len(token_ids)
            if draft_ids:
                request.num_drafted_tokens += len(draft_ids)
                request.num_accepted_tokens += len(token_ids) - 1
                self.stats.num_drafted_tokens += len(draft_ids)
                self.stats.num_accepted_tokens += len(token_ids) - 1
            for token_id, token_logprobs in zip(token_ids, logprobs, strict=True):
                request.num_computed_tokens = request.num_tokens  # a draft that stood is computed with those before it
                events.append(self._append(request, token_id, token_logprobs))
                if request.finished:
                    break
            if not request.finished:
                self.cache.pool.publish(request)
                self.scheduler.published(request)
        self.stats.num_steps += 1
        return events

    def _append(self, request: Request, token_id: int, logprobs: TokenLogprobs | None) -> TokenEvent:
        params = request.params
        request.token_ids.append(token_id)
        if logprobs is not None:
            request.logprobs.append(logprobs)
        reason: FinishReason | None = None
        if request.guide is not None:
            request.guide.accept(token_id)
            if request.guide.finished:
                reason = "stop"
        if token_id in params.eos_token_ids and not params.ignore_eos:
            reason = "stop"
        text = ""
        if request in self._texts:
            detokenizer, stops = self._texts[request]
            text = detokenizer.feed(token_id)
            if request.num_output_tokens > params.min_new_tokens:
                text = stops.feed(text)
            if stops.stopped_by is not None:
                reason = "stop"
        if reason is None and request.num_output_tokens == request.max_new_tokens:
            reason = "length"
        if request in self._texts and reason is not None:
            if stops.stopped_by is None:
                text += stops.feed(detokenizer.finish()) + stops.finish()
            if stops.stopped_by is not None and params.include_stop_str_in_output:
                text += stops.stopped_by
        request.text += text
        if reason is not None:
            self._finish(request, reason)
        return TokenEvent(request, token_id, text, logprobs, reason)

    def _finish(self, request: Request, reason: FinishReason) -> None:
        if request.pages:
            self.cache.pool.publish(request)
        self.scheduler.remove(request)
        self.sampler.forget(request)
        self._texts.pop(request, None)
        del self.requests[request.request_id]
        request.finish_reason = reason
        request.draft_ids = []
        request.media = None  # its pixels and features are not needed any more

    def _check_bias(self, params: SamplingParams) -> None:
        vocab_size = self.model.text_config.vocab_size
        for token_id in params.logit_bias:
            if token_id >= vocab_size:
                raise ValueError(f"logit_bias names token {token_id}, the vocabulary has ids 0 to {vocab_size - 1}")

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
