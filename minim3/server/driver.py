"""The engine in a thread of its own, and the asyncio side of it.

    routes (event loop)                      engine thread
    submit() -- command: add the requests -->  between two steps
    next()        <-- events of a step ------  step()
    cancel() -- command: abort -------------->  between two steps; the pages are free then

Only the engine thread touches the engine. The event loop never waits for a step: it sends commands and is called back.
"""

import asyncio
import logging
import queue
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from minim3.inference.engine import Engine, TokenEvent
from minim3.inference.request import Request, SamplingParams
from minim3.server.errors import APIError, EngineFailed, TooManyRequests, Unavailable
from minim3.server.metrics import Metrics
from minim3.server.settings import ServerSettings

_log = logging.getLogger("minim3.server")
_T = TypeVar("_T")


class Submission:
    """The requests of one call (n of them) as they run: `next` gives the events since it was called last.

    A slow reader gets larger batches. Not reading on does not stop the requests: `cancel` does.
    """

    def __init__(self, driver: "EngineDriver", num_choices: int) -> None:
        self._driver = driver
        self._arrived = time.monotonic()
        self._events: list[TokenEvent] = []
        self._news = asyncio.Event()
        self._error: APIError | None = None
        self._ended: set[Request] = set()
        self._closed = False
        self._last_token: dict[Request, float] = {}
        self.num_choices = num_choices
        self.requests: list[Request] = []
        """The engine's requests, in the order of the choices; filled in before the first batch of events."""

    async def next(self) -> list[TokenEvent] | None:
        """The events since the last call, at least one; None after the last one of all requests.

        Raises:
            APIError: the engine failed, or the server stopped, before the end.
        """
        while not self._events:
            if self._error is not None:
                raise self._error
            if self.done:
                return None
            self._news.clear()
            await self._news.wait()
        batch, self._events = self._events, []
        return batch

    @property
    def done(self) -> bool:
        """Whether nothing of it runs any more."""
        return self._closed or len(self._ended) == self.num_choices

    def cancel(self) -> None:
        """Abort what still runs; its pages are freed before the engine's next step."""
        if not self.done:
            self._closed = True
            self._driver._cancel(self)

    def abort(self, request: Request) -> None:
        """Abort one of the requests: its text is complete for the reader (a stop string), the others go on. The engine
        may have ended it by itself meanwhile."""
        if request not in self._ended:
            self._end(request)
            self._driver._commands.put(lambda: self._driver._abort_request(request))

    # Called on the event loop only.

    def _deliver(self, events: Sequence[TokenEvent], now: float) -> None:
        metrics = self._driver.metrics
        for event in events:
            if event.request in self._ended:
                continue  # generated before the engine heard that nobody wants it
            self._events.append(event)
            last = self._last_token.get(event.request)
            if last is None:
                metrics.first_token(now - self._arrived)
            else:
                metrics.next_token(now - last)
            self._last_token[event.request] = now
            if event.finish_reason is not None:
                self._end(event.request)
        self._news.set()

    def _end(self, request: Request) -> None:
        self._ended.add(request)
        if self.done:
            self._driver._submissions.discard(self)

    def _fail(self, error: APIError) -> None:
        if not self.done:
            self._error = error
            self._closed = True
            self._driver._submissions.discard(self)
        self._news.set()


class EngineDriver:
    """Runs an engine for the routes of a server.

    Attributes:
        draining: no new requests are taken; those under way are finished.
        failure: why the engine can run no more, or None.
    """

    def __init__(self, engine: Engine, settings: ServerSettings, metrics: Metrics) -> None:
        self.engine = engine
        self.settings = settings
        self.metrics = metrics
        self.draining = False
        self.failure: str | None = None
        self._commands: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._submissions: set[Submission] = set()
        self._by_request: dict[Request, Submission] = {}  # of the engine's thread
        self._questions: set[asyncio.Future[Any]] = set()
        self._num_reserved = 0
        self._thread: threading.Thread | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stopping = False

    # --- event loop ----------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Start the engine's thread; called on the event loop that will use it."""
        assert self._thread is None, "started twice"
        self._loop = asyncio.get_running_loop()
        self._thread = threading.Thread(target=self._run, name="minim3-engine", daemon=True)
        self._thread.start()

    async def stop(self) -> None:
        """Abort what still runs and end the thread, after the step it is in."""
        self.draining = True
        self.abandon()
        self._stopping = True
        self._commands.put(self._abort_all)
        thread = self._thread
        if thread is not None and thread.is_alive():
            await asyncio.to_thread(thread.join)
        self._fail_questions("the server stopped; send it again")

    def abandon(self) -> None:
        """Tell everybody who still waits that the server stops before their answer is complete."""
        for submission in list(self._submissions):
            submission._fail(self._unavailable("the server stopped before the answer was complete; send it again"))

    @property
    def ready(self) -> bool:
        """Whether new requests are taken."""
        return self._thread is not None and self.failure is None and not self.draining

    @property
    def num_active(self) -> int:
        """Requests that are prepared, wait or run."""
        return self._num_reserved

    def reserve(self, num_requests: int = 1) -> "Reservation":
        """Take places for requests before any work is done for them: `with driver.reserve(n):` around all of it.

        Raises:
            TooManyRequests: no room in the queue. Unavailable: the server is stopping, or its engine has failed.
        """
        if self.failure is not None:
            raise self._unavailable(f"the engine has failed and the server must be restarted: {self.failure}")
        if self.draining or self._thread is None:
            raise self._unavailable(
                "the server is stopping and takes no new requests; send it to another, or again later"
            )
        settings = self.settings
        room = settings.max_running + settings.max_waiting
        if self._num_reserved + num_requests > room:
            raise TooManyRequests(
                f"{self._num_reserved} requests run or wait and {num_requests} more would exceed the limit of {room}; "
                f"try again in {settings.retry_after_seconds} s",
                retry_after=settings.retry_after_seconds,
            )
        return Reservation(self, num_requests)

    async def submit(
        self,
        prompt_ids: Sequence[int],
        params: SamplingParams,
        *,
        num_choices: int = 1,
        media: Mapping[str, Any] | None = None,
        guides: Sequence[Any] | None = None,
        priority: int = 0,
    ) -> Submission:
        """Queue a prompt, `num_choices` times with seeds counted up from the one in `params`.

        guides: one fresh guide a choice.

        Raises:
            ValueError: the engine does not take the prompt; see `Engine.add_request`.
        """
        submission = Submission(self, num_choices)

        def add(engine: Engine) -> None:
            options: dict[str, Any] = {"media": media}
            if priority:
                options["priority"] = priority
            if guides is not None:
                options["guides"] = list(guides)
            submission.requests = engine.add_requests(prompt_ids, params, n=num_choices, **options)
            for request in submission.requests:
                self._by_request[request] = submission

        self._submissions.add(submission)
        try:
            await self.run_in_engine(add)
        except asyncio.CancelledError:
            submission.cancel()
            raise
        except Exception:
            self._submissions.discard(submission)
            raise
        return submission

    async def run_in_engine(self, function: Callable[[Engine], _T]) -> _T:
        """The result of `function(engine)`, called in the engine's thread between two steps; all requests wait."""
        loop = asyncio.get_running_loop()
        future: asyncio.Future[_T] = loop.create_future()

        def call() -> None:
            try:
                result = function(self.engine)
            except Exception as error:
                self._call_back(_set_exception, future, error)
            else:
                self._call_back(_set_result, future, result)

        if self.failure is not None or self._stopping:
            raise self._unavailable(self.failure or "the server is stopping; send it again")
        self._questions.add(future)
        future.add_done_callback(self._questions.discard)
        self._commands.put(call)
        return await future

    def _fail_questions(self, reason: str) -> None:
        """Nobody is left who could answer what was asked of the engine."""
        for future in list(self._questions):
            _set_exception(future, self._unavailable(reason))

    def _unavailable(self, message: str) -> Unavailable:
        return Unavailable(message, retry_after=self.settings.retry_after_seconds)

    def _cancel(self, submission: Submission) -> None:
        self._submissions.discard(submission)

        def abort() -> None:
            for request in submission.requests:
                self._abort_request(request)

        self._commands.put(abort)

    def _dispatch(self, batches: Sequence[tuple[Submission, list[TokenEvent]]], now: float) -> None:
        for submission, events in batches:
            submission._deliver(events, now)

    # --- engine thread -------------------------------------------------------------------------------------------

    def _call_back(self, function: Callable[..., object], *arguments: Any) -> None:
        assert self._loop is not None
        try:
            self._loop.call_soon_threadsafe(function, *arguments)
        except RuntimeError:  # the loop has ended, and everybody who could wait with it
            assert self._stopping or self._loop.is_closed()

    def _run(self) -> None:
        try:
            self._drive()
        except Exception as error:  # whatever it is: without this thread nobody would be answered, or told
            self._give_up(error)

    def _drive(self) -> None:
        engine = self.engine
        while True:
            wait = not engine.scheduler.has_work
            while True:
                try:
                    command = self._commands.get(block=wait)
                except queue.Empty:
                    break
                command()
                wait = wait and not engine.scheduler.has_work and not self._stopping
            if self._stopping:
                return
            try:
                events = engine.step()
            except Exception as error:
                _log.exception("an engine step failed", extra={"event": "step_failed"})
                self._fail_step(error)
                if self.failure is not None:
                    return
            else:
                self._share(events)

    def _share(self, events: Sequence[TokenEvent]) -> None:
        if not events:
            return
        batches: dict[Submission, list[TokenEvent]] = {}
        for event in events:
            submission = self._by_request.get(event.request)
            if submission is not None:
                batches.setdefault(submission, []).append(event)
            if event.finish_reason is not None:
                self._by_request.pop(event.request, None)
        self._call_back(self._dispatch, list(batches.items()), time.monotonic())

    def _fail_step(self, error: Exception) -> None:
        """A step that fails did not happen: drop the requests that were in it and go on with the rest."""
        self.metrics.step_failed()
        failed = list(self.engine.scheduler.running) or list(self.engine.requests.values())
        # Ended by this very step: the event that says so is lost with it, and nobody else would tell them.
        failed += [request for request in self._by_request if request.finished]
        try:
            for request in failed:
                self._abort_request(request, EngineFailed(_describe(error)))
            self.engine.check_integrity()
        except Exception:
            self._give_up(error)

    def _give_up(self, error: Exception) -> None:
        """Within the handler of an exception after which the engine's books cannot be trusted."""
        _log.exception("the engine cannot go on", extra={"event": "engine_failed"})
        self.failure = _describe(error)
        self._call_back(self._fail_all, self.failure)

    def _fail_all(self, reason: str) -> None:
        for submission in list(self._submissions):
            submission._fail(EngineFailed(reason))
        self._fail_questions(reason)

    def _abort_request(self, request: Request, error: APIError | None = None) -> None:
        submission = self._by_request.pop(request, None)
        if not request.finished:
            self.engine.abort(request.request_id)
        if submission is None or error is None:
            return
        self._call_back(submission._fail, error)
        for other in submission.requests:
            self._by_request.pop(other, None)
            if not other.finished:
                self.engine.abort(other.request_id)

    def _abort_all(self) -> None:
        self._by_request.clear()
        self.engine.abort_all()


class Reservation:
    """Places in the queue, given back at the end of a `with` block."""

    def __init__(self, driver: EngineDriver, num_requests: int) -> None:
        self._driver = driver
        self._num_requests = num_requests
        driver._num_reserved += num_requests

    def __enter__(self) -> "Reservation":
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def release(self) -> None:
        """Give the places back; a second call does nothing."""
        self._driver._num_reserved -= self._num_requests
        self._num_requests = 0


def _describe(error: Exception) -> str:
    """What a client may know of a failure inside: its kind, not its text (which may hold parts of a prompt)."""
    return f"computing the answer failed ({type(error).__name__}); send it again"


def _set_result(future: "asyncio.Future[_T]", result: _T) -> None:
    if not future.done():
        future.set_result(result)


def _set_exception(future: "asyncio.Future[_T]", error: Exception) -> None:
    if not future.done():
        future.set_exception(error)
