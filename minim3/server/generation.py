"""One call of a client, from its place in the queue to its last token: what every generating route shares."""

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from fastapi import Request, Response
from fastapi.responses import JSONResponse, StreamingResponse
from starlette.types import Message, Receive, Scope, Send

from minim3.inference.request import SamplingParams
from minim3.server import logs
from minim3.server.answers import Reader, Update
from minim3.server.driver import Reservation, Submission
from minim3.server.errors import APIError, BadRequest, TimedOut
from minim3.server.prompts import Prompt
from minim3.server.state import ServerState
from minim3.server.structured import check_guide

_T = TypeVar("_T")
PING_SECONDS = 10.0
LAST_WRITE_SECONDS = 5.0  # to write that the time is over


class ClientGone(APIError):
    """The client left before the answer was complete; nobody reads this."""

    status, type, code = 499, "client_disconnected", "client_disconnected"


@dataclass(frozen=True)
class Usage:
    """Tokens of a call, over all its answers."""

    prompt: int
    completion: int
    cached: int = 0
    reasoning: int = 0

    def as_chat(self) -> dict[str, Any]:
        """OpenAI's form in chat and completions."""
        return {
            "prompt_tokens": self.prompt,
            "completion_tokens": self.completion,
            "total_tokens": self.prompt + self.completion,
            "prompt_tokens_details": {"cached_tokens": self.cached},
            "completion_tokens_details": {"reasoning_tokens": self.reasoning},
        }


class Call:
    """Places in the queue, the answers to one or more prompts, and the time they may take.

    Made first, before any work, so that a full queue is told at once; `close` must be called at the end, whatever
    happens: it aborts what still runs and gives the places back.
    """

    def __init__(self, state: ServerState, num_answers: int) -> None:
        self._state = state
        self._started = time.monotonic()
        self._deadline = asyncio.get_running_loop().time() + state.settings.request_seconds
        self._reservation: Reservation | None = state.driver.reserve(num_answers)
        self._submissions: list[Submission] = []
        self._readers: list[list[Reader]] = []
        self._prompts: list[Prompt] = []
        self._guides: dict[int, Any] = {}
        self._error: APIError | None = None

    async def submit(
        self,
        prompt: Prompt,
        params: SamplingParams,
        readers: Sequence[Reader],
        *,
        guides: Sequence[Any] | None = None,
        priority: int = 0,
    ) -> None:
        """Queue a prompt, one answer a reader."""
        try:
            submission = await self._state.driver.submit(
                prompt.ids, params, num_choices=len(readers), media=prompt.media, guides=guides, priority=priority
            )
        except ValueError as error:
            raise BadRequest(str(error)) from None
        self._submissions.append(submission)
        self._readers.append(list(readers))
        if guides is not None:
            self._guides.update((reader.index, guide) for reader, guide in zip(readers, guides, strict=True))
        self._prompts.append(prompt)
        self._state.metrics.prompt(len(prompt.ids))

    async def before_deadline(self, work: Awaitable[_T], *, grace: float = 0.0) -> _T:
        """The result of `work`. TimedOut when the time of this call, and `grace` seconds more, are over."""
        try:
            async with asyncio.timeout_at(self._deadline + grace):
                return await work
        except TimeoutError:
            limit = self._state.settings.request_seconds
            self._error = TimedOut(f"the request took longer than the limit of {limit:g} s")
            raise self._error from None

    async def updates(self) -> AsyncIterator[Update]:
        """What comes, of all answers, until all are complete. Updates that show nothing are left out.

        Raises:
            APIError: the engine failed, the server stops, or the time is over.
        """
        if len(self._submissions) == 1:
            async for update in self._updates_of(0):
                yield update
            return
        merged: asyncio.Queue[Update | APIError | None] = asyncio.Queue()

        async def pass_on(which: int) -> None:
            try:
                async for update in self._updates_of(which):
                    merged.put_nowait(update)
                merged.put_nowait(None)
            except APIError as error:
                merged.put_nowait(error)

        tasks = [asyncio.create_task(pass_on(which)) for which in range(len(self._submissions))]
        try:
            num_left = len(tasks)
            while num_left:
                item = await merged.get()
                if isinstance(item, APIError):
                    raise item
                if item is None:
                    num_left -= 1
                else:
                    yield item
        finally:
            for task in tasks:
                task.cancel()

    async def _updates_of(self, which: int) -> AsyncIterator[Update]:
        submission, readers = self._submissions[which], self._readers[which]
        reader_of = dict(zip(submission.requests, readers, strict=True))
        ended: set[int] = set()
        while (events := await self.before_deadline(submission.next())) is not None:
            for event in events:
                reader = reader_of[event.request]
                if reader.index in ended:
                    continue
                update = reader.feed(event)
                if update:
                    yield update
                # A guide that was given up ends its request, and raises here.
                if reader.stopped or event.finish_reason is not None:
                    ended.add(reader.index)
                    if event.finish_reason is None:
                        submission.abort(event.request)
                    if reader.index in self._guides:
                        check_guide(self._guides[reader.index])
                    last = reader.finish(event.finish_reason or "stop")
                    self._state.metrics.answered(last.finish_reason or "stop")
                    yield last

    @property
    def usage(self) -> Usage:
        readers = [reader for group in self._readers for reader in group]
        # Of several answers to one prompt the first computes it, and the others find what it left.
        cached = [
            min((one.num_cached_tokens for one in submission.requests if one.num_cached_tokens is not None), default=0)
            for submission in self._submissions
        ]
        return Usage(
            sum(len(prompt.ids) for prompt in self._prompts),
            sum(reader.num_tokens for reader in readers),
            sum(cached),
            sum(reader.num_reasoning_tokens for reader in readers),
        )

    def failed(self, error: APIError) -> None:
        """Told of an error that a stream ends with: its status was sent long before, so log and metrics hear of it."""
        self._error = error
        logs.note(error=error.code or error.type)
        self._state.metrics.stream_failed(error.status)

    def close(self) -> None:
        """Abort what still runs, give the places back, log the counts. A second call does nothing."""
        if self._reservation is None:
            return
        if self._error is None and any(not submission.done for submission in self._submissions):
            self._state.metrics.disconnected()
        for submission in self._submissions:
            submission.cancel()
        self._reservation.release()
        self._reservation = None
        self._state.metrics.generation_ended(time.monotonic() - self._started)
        usage = self.usage
        self._state.metrics.cached(usage.cached)
        logs.note(prompt_tokens=usage.prompt, cached_tokens=usage.cached, completion_tokens=usage.completion)
        if self._state.settings.log_prompts:
            decode = self._state.processor.tokenizer.decode
            results = [reader.result for group in self._readers for reader in group]
            logs.note(
                prompt="\n".join(decode(prompt.ids) for prompt in self._prompts),
                reasoning=[result.reasoning for result in results],
                answers=[result.content for result in results],
                tool_calls=[[[call.name, call.arguments] for call in result.tool_calls] for result in results],
            )


class EventStream(StreamingResponse):
    """Server-sent events of a call, closed with it however the response ends, also if it never began.

    While nothing comes (a prompt of minutes) a comment every few seconds keeps proxies from closing the connection.
    """

    def __init__(self, events: AsyncIterator[str], call: Call) -> None:
        super().__init__(events, media_type="text/event-stream")
        self.headers["Cache-Control"] = "no-cache"
        self.headers["X-Accel-Buffering"] = "no"
        self._call = call

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._call.close()

    async def stream_response(self, send: Send) -> None:
        sent_at = time.monotonic()
        has_begun = False

        async def noted(message: Message) -> None:
            nonlocal sent_at, has_begun
            # A client that reads no more would keep its place for ever: it has until the end of its time.
            await self._call.before_deadline(send(message), grace=LAST_WRITE_SECONDS)
            sent_at, has_begun = time.monotonic(), True

        async def keep_alive() -> None:
            while True:
                await asyncio.sleep(PING_SECONDS)
                if has_begun and time.monotonic() - sent_at >= PING_SECONDS:
                    await noted({"type": "http.response.body", "body": b": working\n\n", "more_body": True})

        pings = asyncio.create_task(keep_alive())
        try:
            await super().stream_response(noted)
        except TimedOut as error:
            self._call.failed(error)  # the connection is closed without the end of the stream
        finally:
            pings.cancel()
            with suppress(asyncio.CancelledError, RuntimeError, TimedOut):  # a comment that came after the end
                await pings


class Answer(Protocol):
    """A call of one route, and the shapes of its answer."""

    async def submit(self) -> None:
        """Queue what is asked."""

    async def whole(self) -> dict[str, Any]:
        """The body of an answer that is not streamed."""

    def chunks(self) -> AsyncIterator[str]:
        """The events of a stream."""


async def reply(request: Request, call: Call, answer: Answer, *, stream: bool) -> Response:
    """Submit, and answer whole or by a stream. The call is closed at the end of either, and where there is none."""
    streams = False
    try:
        await unless_gone(request, lambda: call.before_deadline(answer.submit()))
        if not stream:
            return JSONResponse(await unless_gone(request, answer.whole))
        response = EventStream(answer.chunks(), call)
        streams = True
        return response
    finally:
        if not streams:
            call.close()


async def unless_gone(request: Request, work: Callable[[], Awaitable[_T]]) -> _T:
    """The result of `work()`, which is cancelled when the client closes the connection. The body must be read by then.

    Raises:
        ClientGone: the client left first.
    """

    async def disconnect() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    task: asyncio.Future[Any] = asyncio.ensure_future(work())
    watcher: asyncio.Future[Any] = asyncio.ensure_future(disconnect())
    try:
        await asyncio.wait({task, watcher}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise ClientGone("the client closed the connection")
    finally:
        for one in (task, watcher):
            one.cancel()
        await asyncio.gather(task, watcher, return_exceptions=True)
