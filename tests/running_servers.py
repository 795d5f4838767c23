"""Servers inside the tests: pocket behind uvicorn in a thread, with an engine whose answers can be scripted."""

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

import httpx
import openai
import torch
from torch import Tensor

from minim3.inference.engine import Engine
from minim3.inference.request import Request
from minim3.loading import load
from minim3.server.app import create_app
from minim3.server.running import Server, bind
from minim3.server.settings import ServerSettings
from minim3.server.state import ServerState

Script = Callable[[list[int], int], Sequence[int]]
"""(prompt ids, number of the answer) -> the ids to generate."""


@cache
def pocket() -> tuple[Any, Any]:
    model, processor = load()
    model.pack_for_inference()
    return model, processor


class ScriptGuide:
    """A guide that leaves one token a step: what the script says, which the request's own guide must allow."""

    def __init__(self, ids: Sequence[int], inner: Any = None, place: int = 0) -> None:
        self._ids, self._inner, self._place = list(ids), inner, place

    @property
    def finished(self) -> bool:
        return self._place >= len(self._ids) or (self._inner is not None and self._inner.finished)

    @property
    def error(self) -> str | None:
        return None if self._inner is None else self._inner.error

    def allow(self, logits_V: Tensor) -> None:
        token_id = self._ids[min(self._place, len(self._ids) - 1)]
        if self._inner is not None:
            self._inner.allow(logits_V)
            assert torch.isfinite(logits_V[token_id]), f"token {token_id} at {self._place} is not allowed"
        kept = logits_V[token_id].clone()
        logits_V.fill_(float("-inf"))
        logits_V[token_id] = kept

    def accept(self, token_id: int) -> None:
        self._place += 1
        if self._inner is not None:
            self._inner.accept(token_id)

    def fork(self) -> "ScriptGuide":
        return ScriptGuide(self._ids, None if self._inner is None else self._inner.fork(), self._place)


class ScriptedEngine(Engine):
    """An engine that runs the model and then says what the script wants; `step_seconds` makes every step take longer,
    `fail_at` are numbers of steps that raise."""

    def __init__(self, script: Script | None = None, *, step_seconds: float = 0.0, **options: Any) -> None:
        super().__init__(pocket()[0], **options)
        self.script = script
        self.step_seconds = step_seconds
        self.fail_steps = 0
        self.gate = threading.Event()
        """Steps wait for it (it is open at first)."""
        self.gate.set()

    def add_requests(self, prompt_ids: Sequence[int], *arguments: Any, n: int, **options: Any) -> list[Request]:
        if self.script is not None:
            inner = options.pop("guides", None) or [None] * n
            guides = [ScriptGuide(self.script(list(prompt_ids), i), inner[i]) for i in range(n)]
            options["guides"] = guides
        return super().add_requests(prompt_ids, *arguments, n=n, **options)

    def step(self) -> Any:
        self.gate.wait(30)
        time.sleep(self.step_seconds)
        events = super().step()
        if self.fail_steps:
            self.fail_steps -= 1
            raise RuntimeError("a secret of the machine")
        return events


@dataclass
class Running:
    """A server that listens."""

    url: str
    state: ServerState
    server: Server
    thread: threading.Thread

    @property
    def engine(self) -> Engine:
        return self.state.driver.engine

    def client(self, key: str = "none", **options: Any) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0, timeout=60, **options)

    def http(self, **options: Any) -> httpx.Client:
        return httpx.Client(base_url=self.url, timeout=60, **options)

    def wait_idle(self, seconds: float = 20) -> None:
        """Until nothing is under way and every page is free."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            if not self.state.driver.num_active and not self.engine.requests:
                assert self.engine.cache.pool.num_used_pages == 0
                self.engine.check_integrity()
                return
            time.sleep(0.01)
        raise AssertionError(f"{self.state.driver.num_active} active, {list(self.engine.requests)} in the engine")


@contextmanager
def running(settings: ServerSettings | None = None, engine: Engine | None = None) -> Iterator[Running]:
    """Serves pocket (or `engine`, which runs pocket) on a free port."""
    settings = ServerSettings(page=False) if settings is None else settings
    model, processor = pocket()
    app = create_app(settings, model=model, processor=processor, engine=engine)
    listener = bind("127.0.0.1", 0)
    server = Server(app, settings)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    while not server.started:
        assert thread.is_alive(), "the server did not start"
        time.sleep(0.01)
    try:
        yield Running(f"http://127.0.0.1:{listener.getsockname()[1]}", app.state.server, server, thread)
    finally:
        if isinstance(engine, ScriptedEngine):
            engine.gate.set()
        server.handle_exit(0, None)
        thread.join(30)
        assert not thread.is_alive(), "the server did not stop"
