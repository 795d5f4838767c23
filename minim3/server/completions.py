"""`POST /v1/completions`: plain continuation of text or token ids, one prompt or several."""

import time
import uuid
from collections.abc import AsyncIterator, Sequence
from typing import Any

import torch
from fastapi import APIRouter, Request, Response

from minim3.inference.engine import Engine
from minim3.inference.media import find_placeholders
from minim3.inference.request import TokenLogprobs
from minim3.model.batch import ForwardBatch
from minim3.processing.detokenizer import IncrementalDetokenizer
from minim3.processing.tokenizer import Tokenizer
from minim3.server import prompts
from minim3.server.answers import Ending, TextReader, TokenEntry, Update
from minim3.server.chat import DONE, event
from minim3.server.errors import APIError, BadRequest
from minim3.server.generation import Call, Usage, reply
from minim3.server.json_route import JsonRoute
from minim3.server.prompts import Prompt
from minim3.server.schema import CompletionRequest
from minim3.server.state import ServerState

DEFAULT_NEW_TOKENS = 16  # OpenAI's
_SCORED_ROWS = 256  # positions of a prompt whose distributions over the vocabulary are in memory at once
_PROMPT_FORMS = "prompt must be a text or a list of token ids (0 and up), or a list of those"


def router(state: ServerState) -> APIRouter:
    routes = APIRouter(route_class=JsonRoute, tags=["completions"])

    @routes.post("/v1/completions")
    async def completions(body: CompletionRequest, request: Request) -> Response:
        """Continue text or token ids, whole or as a stream of server-sent events."""
        prompts.check_model(state, body.model)
        body.check_fields(state.settings)
        if body.suffix:
            raise BadRequest("suffix is not supported: the model writes from left to right only", param="suffix")
        given = _split(body.prompt)
        if body.max_tokens == 0 and (not body.echo or body.stream):
            raise BadRequest("max_tokens 0 needs echo, and no stream: nothing is generated", param="max_tokens")
        call = Call(state, len(given) * prompts.num_choices(state.settings, body.n, len(given)))
        answer = CompletionAnswer(state, body, call, given)
        return await reply(request, call, answer, stream=bool(body.stream))

    return routes


def _split(prompt: Any) -> list[str | list[int]]:
    """The prompts of a request. BadRequest where it is neither text nor ids."""
    if isinstance(prompt, str):
        return [prompt]
    if prompt == []:
        raise BadRequest("prompt is empty", param="prompt")
    prompts_given = [prompt] if isinstance(prompt, list) and _is_id(prompt[0]) else prompt
    if not isinstance(prompts_given, list):
        raise BadRequest(f"{_PROMPT_FORMS}, not {type(prompt).__name__}", param="prompt")
    for one in prompts_given:
        wrong = next((i for i in one if not _is_id(i) or i < 0), None) if isinstance(one, list) else None
        if wrong is not None:
            raise BadRequest(f"{_PROMPT_FORMS}; {str(wrong)[:100]} is no id", param="prompt")
        if not isinstance(one, list | str):
            raise BadRequest(f"{_PROMPT_FORMS}; {str(one)[:100]} is neither", param="prompt")
    return prompts_given


def _is_id(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


class CompletionAnswer:
    """One call of the route, and OpenAI's shapes of its answer. Choice `p * n + i` is the i-th of prompt p."""

    def __init__(self, state: ServerState, body: CompletionRequest, call: Call, given: list[str | list[int]]) -> None:
        self._state = state
        self._body = body
        self._call = call
        self._given = given
        self._num_choices = body.n or 1
        self._prompts: list[Prompt] = []
        self._readers: list[TextReader] = []
        self._echoes: list[str] = []
        self._echoed: list[list[TokenEntry]] = []
        self._head = {
            "id": f"cmpl-{uuid.uuid4().hex}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": state.settings.model_name,
        }
        self._offsets: dict[int, _Offset] = {}

    async def submit(self) -> None:
        """Encode the prompts and queue them."""
        state, body = self._state, self._body
        stops = prompts.stop_strings(state.settings, body.stop)
        for one in self._given:
            self._prompts.append(await self._encode(one))
        tokenizer = state.processor.tokenizer
        if body.echo:
            self._echoes = [
                one if isinstance(one, str) else tokenizer.decode(prompt.ids)
                for one, prompt in zip(self._given, self._prompts)
            ]
            if body.logprobs is not None:
                self._echoed = [await self._prompt_entries(prompt.ids) for prompt in self._prompts]
        if body.max_tokens != 0:
            for number, prompt in enumerate(self._prompts):
                await self._queue(number, prompt, stops)

    async def _encode(self, given: str | list[int]) -> Prompt:
        if isinstance(given, str):
            return await prompts.text_prompt(self._state, given, bool(self._body.allow_special_tokens))
        prompts.check_length(self._state, len(given), "prompt")
        return Prompt(given)

    async def _queue(self, number: int, prompt: Prompt, stops: tuple[str, ...]) -> None:
        state, body = self._state, self._body
        params = prompts.sampling_params(
            state, body, max_new_tokens=DEFAULT_NEW_TOKENS if body.max_tokens is None else body.max_tokens,
            num_prompt_tokens=len(prompt.ids), logprobs=body.logprobs,
        )  # fmt: skip
        guides = await prompts.make_guides(
            state, body.response_format, body.guide_extras, prompts.ToolUse(), "disabled", self._num_choices
        )
        ending = Ending(
            stops, bool(body.include_stop_str_in_output), frozenset(body.stop_token_ids or ()), params.min_new_tokens
        )
        readers = [
            TextReader(number * self._num_choices + i, state.processor.tokenizer, ending, params.eos_token_ids)
            for i in range(self._num_choices)
        ]
        self._readers += readers
        await self._call.submit(prompt, params, readers, guides=guides, priority=body.priority or 0)

    async def _prompt_entries(self, ids: list[int]) -> list[TokenEntry]:
        """Log-probabilities of a prompt's own tokens; the first has none."""
        num_tops = self._body.logprobs or 0
        if num_tops > self._state.settings.max_logprobs:
            limit = self._state.settings.max_logprobs
            raise BadRequest(f"{num_tops} logprobs are more than the limit of {limit}", param="logprobs")
        try:
            known = await self._state.driver.run_in_engine(lambda engine: prompt_logprobs(engine, ids, num_tops))
        except ValueError as error:
            raise BadRequest(str(error), param="prompt") from None
        return [TokenEntry(token_id, one) for token_id, one in zip(ids, [None, *known])]

    async def whole(self) -> dict[str, Any]:
        """The answer in one piece."""
        num_answers = len(self._prompts) * self._num_choices
        texts = [""] * num_answers
        entries: list[list[TokenEntry]] = [[] for _ in range(num_answers)]
        reasons = ["length"] * num_answers
        if self._body.echo:
            texts = [self._echoes[index // self._num_choices] for index in range(num_answers)]
            if self._echoed:
                entries = [list(self._echoed[index // self._num_choices]) for index in range(num_answers)]
        if self._readers:
            async for update in self._call.updates():
                texts[update.index] += update.delta.content
                entries[update.index].extend(update.entries)
                reasons[update.index] = update.finish_reason or reasons[update.index]
        choices = [self._choice(index, texts[index], entries[index], reasons[index]) for index in range(num_answers)]
        usage = self._call.usage if self._readers else Usage(sum(len(prompt.ids) for prompt in self._prompts), 0)
        return {**self._head, "choices": choices, "usage": usage.as_chat()}

    async def chunks(self) -> AsyncIterator[str]:
        """The answer as server-sent events."""
        options = self._body.stream_options
        with_usage = options is not None and bool(options.include_usage)
        usage: dict[str, Any] = {"usage": None} if with_usage else {}
        try:
            for reader in self._readers if self._body.echo else ():
                which = reader.index // self._num_choices
                echoed = self._echoed[which] if self._echoed else []
                choice = self._choice(reader.index, self._echoes[which], echoed, None)
                yield event({**self._head, "choices": [choice], **usage})
            async for update in self._call.updates():
                yield event({**self._head, "choices": [self._chunk(update)], **usage})
            if with_usage:
                yield event({**self._head, "choices": [], "usage": self._call.usage.as_chat()})
        except APIError as error:
            self._call.failed(error)
            yield event(error.body())
        yield DONE

    def _chunk(self, update: Update) -> dict[str, Any]:
        return self._choice(update.index, update.delta.content, update.entries, update.finish_reason)

    def _choice(self, index: int, text: str, entries: Sequence[TokenEntry], reason: str | None) -> dict[str, Any]:
        logprobs = None
        if self._body.logprobs is not None:
            tokenizer = self._state.processor.tokenizer
            logprobs = _logprobs(tokenizer, entries, self._offsets.setdefault(index, _Offset(tokenizer)))
        return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": reason}


class _Offset:
    """Where in the text of an answer the next token begins; a character of several tokens counts with its last."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._detokenizer = IncrementalDetokenizer(tokenizer, skip_special_tokens=False)
        self._next = 0

    def of(self, entry: TokenEntry) -> int:
        start = self._next
        self._next += 0 if entry.silent else len(self._detokenizer.feed(entry.token_id))
        return start


def _name(tokenizer: Tokenizer, token_id: int) -> str:
    """A token's text; bytes that are no whole characters as OpenAI writes them."""
    found = tokenizer.token_bytes(token_id)
    try:
        return found.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in found)


def _logprobs(tokenizer: Tokenizer, entries: Sequence[TokenEntry], offset: _Offset) -> dict[str, Any]:
    """OpenAI's older form of log-probabilities."""
    form: dict[str, list[Any]] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
    for entry in entries:
        text = _name(tokenizer, entry.token_id)
        form["tokens"].append("" if entry.silent else text)
        form["text_offset"].append(offset.of(entry))
        known = entry.logprobs
        form["token_logprobs"].append(None if known is None else max(known.chosen, -9999.0))
        tops: dict[str, float] | None = None
        if known is not None:
            tops = {}
            for token_id, value in zip(known.top_token_ids, known.top_logprobs):
                tops.setdefault(_name(tokenizer, token_id), max(value, -9999.0))
            tops.setdefault(text, max(known.chosen, -9999.0))
        form["top_logprobs"].append(tops)
    return form


def prompt_logprobs(engine: Engine, ids: Sequence[int], num_tops: int) -> list[TokenLogprobs]:
    """Log-probabilities of tokens 1, 2, ... of `ids` given those before them, computed without the cache.

    The logits of a whole prompt would be `[tokens, vocabulary]` numbers, 400 GB at the longest: they are made for a few
    positions at a time.

    Raises:
        ValueError: an id outside the vocabulary, or a placeholder of a picture or clip.
    """
    model = engine.model
    device = next(iter(model.text_model.parameters())).device
    vocab_size = model.text_config.vocab_size
    if max(ids) >= vocab_size:
        raise ValueError(f"token id {max(ids)} is outside the vocabulary of {vocab_size}")
    find_placeholders(model, ids, None)
    if len(ids) < 2:
        return []
    found: list[TokenLogprobs] = []
    with torch.inference_mode():
        batch = ForwardBatch.packed([len(ids)], device)
        embeds = model.text_model.embed_tokens(torch.tensor(ids, device=device))
        hidden = model.text_model.forward_packed(embeds, batch)[:-1]
        following = torch.tensor(ids[1:], device=device)
        for rows, next_ids in zip(hidden.split(_SCORED_ROWS), following.split(_SCORED_ROWS)):
            logprobs = model.compute_logits(rows).float().log_softmax(-1)
            chosen = logprobs.gather(1, next_ids[:, None])[:, 0].tolist()
            values, tops = (table.tolist() for table in logprobs.topk(num_tops, dim=-1))
            found += [TokenLogprobs(one, tuple(top), tuple(value)) for one, top, value in zip(chosen, tops, values)]
    return found
