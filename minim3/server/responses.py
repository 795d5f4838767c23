"""`POST /v1/responses`: OpenAI's newer route, with text, reasoning, function calls and typed stream events.

One state machine (`ResponseItems`) turns updates into events; the whole answer is what is left when they are over, so
the two cannot differ.
"""

import json
import re
import time
import uuid
from collections.abc import AsyncIterator, Iterator
from typing import Any

from fastapi import APIRouter, Request, Response

from minim3.processing.output import ToolCallDelta
from minim3.server import prompts
from minim3.server.answers import ChatReader, Ending, Update
from minim3.server.chat import logprob_entry, make_call_id, one_line
from minim3.server.errors import APIError, BadRequest
from minim3.server.generation import Call, Usage, reply
from minim3.server.json_route import JsonRoute
from minim3.server.responses_schema import ResponsesRequest, chat_messages, chat_tools
from minim3.server.state import ServerState

_Event = dict[str, Any]

_NAMES = {
    "messages": "input", "response_format": "text.format", "reasoning_effort": "reasoning.effort",
    "max_tokens": "max_output_tokens",
}  # fmt: skip
"""Fields of chat and what they are called here."""


def router(state: ServerState) -> APIRouter:
    routes = APIRouter(route_class=JsonRoute, tags=["responses"])

    @routes.post("/v1/responses")
    async def responses(body: ResponsesRequest, request: Request) -> Response:
        """Answer a conversation, whole or as a stream of typed events."""
        prompts.check_model(state, body.model)
        body.check_fields(state.settings)
        if body.n not in (None, 1):
            raise BadRequest("n can only be 1 here; /v1/chat/completions gives several answers", param="n")
        if body.truncation not in (None, "disabled"):
            raise BadRequest("truncation can only be disabled: nothing is cut off in silence", param="truncation")
        call = Call(state, 1)
        answer = ResponseAnswer(state, body, call)
        return await reply(request, call, answer, stream=bool(body.stream))

    return routes


class ResponseAnswer:
    """One call of the route."""

    def __init__(self, state: ServerState, body: ResponsesRequest, call: Call) -> None:
        self._state = state
        self._body = body
        self._call = call
        self._reader: ChatReader | None = None
        self._id = _new_id("resp")
        self._created = int(time.time())
        self._items = ResponseItems(state, body.wants_logprobs)

    async def submit(self) -> None:
        """Encode the input and queue it; what is wrong with it is said in the names of this route."""
        try:
            await self._submit()
        except BadRequest as error:
            error.param = _NAMES.get(error.param or "", error.param)
            for chat, here in _NAMES.items():
                error.message = re.sub(rf"^{chat}\b(\[\d+\])?", here, error.message)
            raise

    async def _submit(self) -> None:
        state, body = self._state, self._body
        settings = state.settings
        mode, variables = prompts.thinking_mode(state, body.effort, body.chat_template_kwargs)
        choice = body.tool_choice
        if isinstance(choice, dict) and "function" not in choice:
            choice = {"type": choice.get("type"), "function": {"name": choice.get("name")}}
        use = prompts.tool_use(settings, chat_tools(body.tools), choice, body.parallel_tool_calls)
        stops = prompts.stop_strings(settings, body.stop)
        guides = await prompts.make_guides(state, body.format, body.guide_extras, use, mode, 1)
        messages = chat_messages(body.input, body.instructions)
        prompt = await prompts.chat_prompt(state, messages, use.tools, mode, variables)
        params = prompts.sampling_params(
            state, body, max_new_tokens=body.max_output_tokens or body.max_tokens, num_prompt_tokens=len(prompt.ids),
            logprobs=(body.top_logprobs or 0) if body.wants_logprobs else None,
            forbidden=prompts.call_marker(state, use),
        )  # fmt: skip
        ending = Ending(
            stops, bool(body.include_stop_str_in_output), frozenset(body.stop_token_ids or ()),
            params.min_new_tokens, None if use.parallel else 1, prompts.ignored_ids(state, body),
        )  # fmt: skip
        self._reader = ChatReader(0, state.processor.tokenizer, mode, use.tools, ending, make_call_id)
        await self._call.submit(prompt, params, [self._reader], guides=guides, priority=body.priority or 0)

    async def whole(self) -> dict[str, Any]:
        """The answer in one piece."""
        async for update in self._call.updates():
            for _ in self._items.feed(update):
                pass
        return self._response(self._items.status, self._call.usage)

    async def chunks(self) -> AsyncIterator[str]:
        """The answer as server-sent events, numbered."""
        number = 0

        def sent(event: _Event) -> str:
            nonlocal number
            text = one_line({**event, "sequence_number": number})
            number += 1
            return f"event: {event['type']}\ndata: {text}\n\n"

        for kind in ("response.created", "response.in_progress"):
            yield sent({"type": kind, "response": self._response("in_progress", None)})
        try:
            async for update in self._call.updates():
                for event in self._items.feed(update):
                    yield sent(event)
        except APIError as error:
            self._call.failed(error)
            response = self._response("failed", self._call.usage)
            response["error"] = {"code": error.code or error.type, "message": error.message}
            yield sent({"type": "response.failed", "response": response})
            return
        status = self._items.status
        yield sent({"type": f"response.{status}", "response": self._response(status, self._call.usage)})

    def _response(self, status: str, usage: Usage | None) -> dict[str, Any]:
        body = self._body
        return {
            "id": self._id,
            "object": "response",
            "created_at": self._created,
            "status": status,
            "error": None,
            "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
            "instructions": body.instructions,
            "max_output_tokens": body.max_output_tokens,
            "metadata": (body.model_extra or {}).get("metadata") or {},
            "model": self._state.settings.model_name,
            "output": self._items.output,
            "parallel_tool_calls": body.parallel_tool_calls is not False,
            "previous_response_id": None,
            "reasoning": {"effort": body.effort, "summary": None},
            "store": False,
            "temperature": body.temperature,
            "text": {"format": body.format or {"type": "text"}},
            "tool_choice": body.tool_choice or "auto",
            "tools": body.tools or [],
            "top_p": body.top_p,
            "truncation": "disabled",
            "usage": None if usage is None else _usage(usage),
        }


class ResponseItems:
    """The output items of one answer as they grow: one of reasoning, one of text, one a call, each closed before the
    next begins."""

    def __init__(self, state: ServerState, with_logprobs: bool) -> None:
        self._tokenizer = state.processor.tokenizer
        self._with_logprobs = with_logprobs
        self.output: list[dict[str, Any]] = []
        self.status = "completed"
        self._open: dict[str, Any] | None = None

    def feed(self, update: Update) -> Iterator[_Event]:
        """The events of an update."""
        delta = update.delta
        if delta.reasoning:
            yield from self._text("reasoning", delta.reasoning, [])
        logprobs = [logprob_entry(self._tokenizer, one) for one in update.entries] if self._with_logprobs else []
        if delta.content or (logprobs and self._open is not None and self._open["type"] == "message"):
            yield from self._text("message", delta.content, logprobs)
        for call in delta.tool_calls:
            yield from self._call(call)
        if update.finish_reason is not None:
            self.status = "incomplete" if update.finish_reason == "length" else "completed"
            if not self.output and self.status == "completed":
                yield from self._begin("message")
            yield from self._end()

    @property
    def _place(self) -> dict[str, Any]:
        """Where the open item stands, as events say it."""
        assert self._open is not None
        return {"item_id": self._open["id"], "output_index": len(self.output) - 1}

    def _text(self, kind: str, text: str, logprobs: list[dict[str, Any]]) -> Iterator[_Event]:
        if self._open is None or self._open["type"] != kind:
            yield from self._end()
            yield from self._begin(kind)
        assert self._open is not None
        part = self._open["content"][0]
        part["text"] += text
        event = {"type": f"response.{part['type']}.delta", **self._place, "content_index": 0, "delta": text}
        if kind == "message":
            part["logprobs"].extend(logprobs)
            event["logprobs"] = logprobs
        yield event

    def _call(self, delta: ToolCallDelta) -> Iterator[_Event]:
        if delta.id is not None:
            yield from self._end()
            self._open = {
                "id": _new_id("fc"), "type": "function_call", "status": "in_progress", "call_id": delta.id,
                "name": delta.name, "arguments": "",
            }  # fmt: skip
            self.output.append(self._open)
            yield self._added()
        if delta.arguments:
            assert self._open is not None
            self._open["arguments"] += delta.arguments
            yield {"type": "response.function_call_arguments.delta", **self._place, "delta": delta.arguments}

    def _begin(self, kind: str) -> Iterator[_Event]:
        if kind == "message":
            self._open = {"id": _new_id("msg"), "type": kind, "status": "in_progress", "role": "assistant"}
            part: dict[str, Any] = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
        else:
            self._open = {"id": _new_id("rs"), "type": kind, "status": "in_progress", "summary": []}
            part = {"type": "reasoning_text", "text": ""}
        self._open["content"] = []
        self.output.append(self._open)
        yield self._added()
        self._open["content"] = [part]
        yield {"type": "response.content_part.added", **self._place, "content_index": 0, "part": _copy(part)}

    def _added(self) -> _Event:
        return {"type": "response.output_item.added", "output_index": len(self.output) - 1, "item": _copy(self._open)}

    def _end(self) -> Iterator[_Event]:
        """Close the open item."""
        if self._open is None:
            return
        item, place = self._open, self._place
        if item["type"] == "function_call":
            done = {"name": item["name"], "arguments": item["arguments"]}
            yield {"type": "response.function_call_arguments.done", **place, **done}
        else:
            part = item["content"][0]
            event = {"type": f"response.{part['type']}.done", **place, "content_index": 0, "text": part["text"]}
            if item["type"] == "message":
                event["logprobs"] = part["logprobs"]
            yield event
            yield {"type": "response.content_part.done", **place, "content_index": 0, "part": _copy(part)}
        item["status"] = self.status
        yield {"type": "response.output_item.done", "output_index": place["output_index"], "item": _copy(item)}
        self._open = None


def _usage(usage: Usage) -> dict[str, Any]:
    return {
        "input_tokens": usage.prompt,
        "input_tokens_details": {"cached_tokens": usage.cached, "cache_write_tokens": 0},
        "output_tokens": usage.completion,
        "output_tokens_details": {"reasoning_tokens": usage.reasoning},
        "total_tokens": usage.prompt + usage.completion,
    }


def _new_id(prefix: str) -> str:
    return f"{prefix}_{uuid.uuid4().hex}"


def _copy(item: dict[str, Any] | None) -> dict[str, Any]:
    """As it is now: items go on growing after the event that shows them."""
    copied: dict[str, Any] = json.loads(json.dumps(item))
    return copied
