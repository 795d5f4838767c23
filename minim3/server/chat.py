"""`POST /v1/chat/completions`."""

import json
import time
import uuid
from collections.abc import AsyncIterator, Iterable, Sequence
from typing import Any

from fastapi import APIRouter, Request, Response

from minim3.processing.tokenizer import Tokenizer
from minim3.server import prompts
from minim3.server.answers import ChatReader, Ending, TokenEntry, Update
from minim3.server.errors import APIError, BadRequest
from minim3.server.generation import Call, reply
from minim3.server.json_route import JsonRoute
from minim3.server.schema import ChatRequest
from minim3.server.state import ServerState

DONE = "data: [DONE]\n\n"
_LINE_ENDS = {code: f"\\u{code:04x}" for code in (0x85, 0x2028, 0x2029)}


def router(state: ServerState) -> APIRouter:
    routes = APIRouter(route_class=JsonRoute, tags=["chat"])

    @routes.post("/v1/chat/completions")
    async def chat_completions(body: ChatRequest, request: Request) -> Response:
        """Answer a conversation, whole or as a stream of server-sent events."""
        prompts.check_model(state, body.model)
        body.check_fields(state.settings)
        if body.modalities not in (None, ["text"]):
            raise BadRequest('modalities can only be ["text"]', param="modalities")
        if body.top_logprobs and not body.logprobs:
            raise BadRequest("top_logprobs needs logprobs: true", param="top_logprobs")
        call = Call(state, prompts.num_choices(state.settings, body.n))
        answer = ChatAnswer(state, body, call)
        return await reply(request, call, answer, stream=bool(body.stream))

    return routes


class ChatAnswer:
    """One call of the route, and OpenAI's shapes of its answer."""

    def __init__(self, state: ServerState, body: ChatRequest, call: Call) -> None:
        self._state = state
        self._body = body
        self._call = call
        self._readers: list[ChatReader] = []
        self._head = {
            "id": f"chatcmpl-{uuid.uuid4().hex}",
            "object": "chat.completion",
            "created": int(time.time()),
            "model": state.settings.model_name,
        }
        self._prompt_ids: list[int] = []
        self._num_sent: dict[int, int] = {}

    async def submit(self) -> None:
        """Encode the conversation and queue it."""
        state, body = self._state, self._body
        settings = state.settings
        mode, variables = prompts.thinking_mode(state, body.reasoning_effort, body.chat_template_kwargs)
        use = prompts.tool_use(settings, body.tools, body.tool_choice, body.parallel_tool_calls)
        stops = prompts.stop_strings(settings, body.stop)
        count = prompts.num_choices(settings, body.n)
        guides = await prompts.make_guides(state, body.response_format, body.guide_extras, use, mode, count)
        prompt = await prompts.chat_prompt(state, body.messages, use.tools, mode, variables)
        params = prompts.sampling_params(
            state, body, max_new_tokens=body.max_completion_tokens or body.max_tokens,
            num_prompt_tokens=len(prompt.ids), logprobs=(body.top_logprobs or 0) if body.logprobs else None,
            forbidden=prompts.call_marker(state, use),
        )  # fmt: skip
        ending = Ending(
            stops, bool(body.include_stop_str_in_output), frozenset(body.stop_token_ids or ()),
            params.min_new_tokens, None if use.parallel else 1, prompts.ignored_ids(state, body),
        )  # fmt: skip
        self._readers = [
            ChatReader(index, state.processor.tokenizer, mode, use.tools, ending, make_call_id)
            for index in range(count)
        ]
        self._prompt_ids = prompt.ids
        await self._call.submit(prompt, params, self._readers, guides=guides, priority=body.priority or 0)

    async def whole(self) -> dict[str, Any]:
        """The answer in one piece."""
        entries: list[list[TokenEntry]] = [[] for _ in self._readers]
        async for update in self._call.updates():
            entries[update.index].extend(update.entries)
        choices = [self._choice(reader, own) for reader, own in zip(self._readers, entries)]
        ids = {"prompt_token_ids": self._prompt_ids} if self._body.return_token_ids else {}
        return {**self._head, **ids, "choices": choices, "usage": self._call.usage.as_chat()}

    def _choice(self, reader: ChatReader, entries: Sequence[TokenEntry]) -> dict[str, Any]:
        result = reader.result
        message: dict[str, Any] = {
            "role": "assistant",
            "content": result.content if result.content or not result.tool_calls else None,
            "refusal": None,
            "reasoning_content": result.reasoning,
        }
        if result.tool_calls:
            message["tool_calls"] = [
                {
                    "id": one.id,
                    "type": "function",
                    "function": {"name": one.name, "arguments": json.dumps(one.arguments, ensure_ascii=False)},
                }
                for one in result.tool_calls
            ]
        return {
            "index": reader.index,
            "message": message,
            "logprobs": self._logprobs(entries),
            "finish_reason": result.finish_reason,
            **self._new_ids(reader.index),
        }

    def _new_ids(self, index: int) -> dict[str, Any]:
        """The ids of a choice that were not sent yet, if they were asked for."""
        if not self._body.return_token_ids:
            return {}
        ids = self._readers[index].token_ids
        start = self._num_sent.get(index, 0)
        self._num_sent[index] = len(ids)
        return {"token_ids": ids[start:]}

    async def chunks(self) -> AsyncIterator[str]:
        """The answer as server-sent events. An error after the first of them is an event too, and the last."""
        options = self._body.stream_options
        with_usage = options is not None and bool(options.include_usage)
        usage: dict[str, Any] = {"usage": None} if with_usage else {}
        head = {**self._head, "object": "chat.completion.chunk"}
        try:
            for reader in self._readers:
                first = {"role": "assistant", "content": ""}
                choice = {"index": reader.index, "delta": first, "logprobs": None, "finish_reason": None}
                ids = {"prompt_token_ids": self._prompt_ids} if self._body.return_token_ids else {}
                yield event({**head, **ids, "choices": [choice], **usage})
            async for update in self._call.updates():
                for choice in self._chunk_choices(update):
                    yield event({**head, "choices": [choice], **usage})
            if with_usage:
                yield event({**head, "choices": [], "usage": self._call.usage.as_chat()})
        except APIError as error:
            self._call.failed(error)
            yield event(error.body())
        yield DONE

    def _chunk_choices(self, update: Update) -> Iterable[dict[str, Any]]:
        delta: dict[str, Any] = {}
        if update.delta.reasoning:
            delta["reasoning_content"] = update.delta.reasoning
        if update.delta.content:
            delta["content"] = update.delta.content
        if update.delta.tool_calls:
            delta["tool_calls"] = [_call_delta(one) for one in update.delta.tool_calls]
        if delta or update.entries:
            logprobs = self._logprobs(update.entries) if update.entries else None
            ids = self._new_ids(update.index)
            yield {"index": update.index, "delta": delta, "logprobs": logprobs, "finish_reason": None, **ids}
        if update.finish_reason is not None:
            ids = self._new_ids(update.index)
            yield {"index": update.index, "delta": {}, "logprobs": None, "finish_reason": update.finish_reason, **ids}

    def _logprobs(self, entries: Sequence[TokenEntry]) -> dict[str, Any] | None:
        if not self._body.logprobs:
            return None
        tokenizer = self._state.processor.tokenizer
        return {"content": [logprob_entry(tokenizer, one) for one in entries], "refusal": None}


def _call_delta(delta: Any) -> dict[str, Any]:
    function: dict[str, Any] = {"arguments": delta.arguments}
    if delta.id is None:
        return {"index": delta.index, "function": function}
    return {
        "index": delta.index, "id": delta.id, "type": "function", "function": {"name": delta.name, **function}
    }  # fmt: skip


def make_call_id(_: int) -> str:
    """An id for a tool call, told from those of every other answer."""
    return f"call_{uuid.uuid4().hex[:24]}"


def event(data: dict[str, Any]) -> str:
    """One server-sent event."""
    return f"data: {one_line(data)}\n\n"


def one_line(data: dict[str, Any]) -> str:
    """JSON without the characters at which some clients end a line of a stream (U+0085, U+2028, U+2029)."""
    return json.dumps(data, ensure_ascii=False, separators=(",", ":")).translate(_LINE_ENDS)


def logprob_entry(tokenizer: Tokenizer, entry: TokenEntry) -> dict[str, Any]:
    """OpenAI's form of one token and its likeliest rivals."""
    known = entry.logprobs
    assert known is not None, "log-probabilities were not asked for"
    tops = zip(known.top_token_ids, known.top_logprobs)
    return {
        **_token(tokenizer, entry.token_id, known.chosen),
        "top_logprobs": [_token(tokenizer, token_id, value) for token_id, value in tops],
    }


def _token(tokenizer: Tokenizer, token_id: int, logprob: float) -> dict[str, Any]:
    found = tokenizer.token_bytes(token_id)
    # JSON has no -Infinity; OpenAI says -9999 for what is (almost) impossible.
    return {
        "token": found.decode("utf-8", errors="replace"),
        "logprob": max(logprob, -9999.0),
        "bytes": list(found),
    }
