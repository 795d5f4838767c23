"""Replicas on Ray Serve: the gateway by itself, and (slow) a cluster of two whose replicas are killed under load."""

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from minim3.server.settings import ServerSettings

pytest.importorskip("ray")
pytest.importorskip("ray.serve")

import ray.exceptions
from ray.serve.exceptions import RequestCancelledError

from minim3.integrations.ray import Forwarded, Gateway, Replica, affinity_key, application

SETTINGS = ServerSettings(max_body_bytes=1000, retry_after_seconds=3)
START = {
    "type": "http.response.start",
    "status": 200,
    "headers": [(b"content-type", b"application/json"), (b"x-request-id", b"1")],
}
STREAM = {
    "type": "http.response.start",
    "status": 200,
    "headers": [(b"content-type", b"text/event-stream; charset=utf-8")],
}
HALF = {"type": "http.response.body", "body": b"data: {}\n\n", "more_body": True}
END = {"type": "http.response.body", "body": b"end", "more_body": False}


class FakeReplicas:
    """A deployment handle whose replica says `messages`; an exception among them is raised in its place."""

    def __init__(self, *messages: Any) -> None:
        self.messages = messages
        self.options_seen: dict[str, Any] = {}
        self.request: Forwarded | None = None
        self.cancelled = False
        self.forward = self

    def options(self, **options: Any) -> "FakeReplicas":
        self.options_seen = options
        return self

    def remote(self, request: Forwarded) -> "FakeReplicas":
        self.request = request
        return self

    def cancel(self) -> None:
        self.cancelled = True

    async def __aiter__(self) -> AsyncIterator[Any]:
        for message in self.messages:
            await asyncio.sleep(0)
            if isinstance(message, BaseException):
                raise message
            if message == "wait":
                while not self.cancelled:
                    await asyncio.sleep(0.001)
                raise RequestCancelledError("1")
            yield message


def ask(replicas: FakeReplicas, *incoming: Any, gateway: Gateway | None = None) -> list[dict[str, Any]]:
    """What the gateway sends for one request."""
    sent: list[dict[str, Any]] = []
    scope = {
        "type": "http", "method": "POST", "path": "/v1/chat/completions", "raw_path": b"/v1/chat/completions",
        "query_string": b"a=1", "headers": [(b"authorization", b"Bearer key")], "client": ("1.2.3.4", 5),
    }  # fmt: skip
    waiting = list(incoming) or [{"type": "http.request", "body": b'{"messages": []}', "more_body": False}]

    async def receive() -> Any:
        if not waiting:
            await asyncio.sleep(3600)
        return waiting.pop(0)

    async def send(message: Any) -> None:
        sent.append(dict(message))

    async def run() -> None:
        await asyncio.wait_for((gateway or Gateway(replicas, SETTINGS))(scope, receive, send), 10)

    asyncio.run(run())
    return sent


def lost() -> BaseException:
    return ray.exceptions.ActorDiedError()


def test_a_request_and_its_answer_pass_unchanged() -> None:
    replicas = FakeReplicas(START, HALF, END)
    sent = ask(replicas)
    assert [message["type"] for message in sent] == ["http.response.start"] + ["http.response.body"] * 2
    assert sent[0]["headers"] == [(b"content-type", b"application/json")], "Ray writes the request's id itself"
    assert sent[1:] == [HALF, END]
    assert not replicas.cancelled
    request = replicas.request
    assert request is not None
    assert (request.method, request.path, request.query_string, request.body) == (
        "POST", "/v1/chat/completions", b"a=1", b'{"messages": []}',
    )  # fmt: skip
    assert request.headers == [(b"authorization", b"Bearer key")]


def test_a_replica_lost_before_its_answer_is_a_503_to_retry() -> None:
    sent = ask(FakeReplicas(lost()))
    assert sent[0]["status"] == 503
    assert dict(sent[0]["headers"])[b"retry-after"] == b"3"
    error = json.loads(sent[1]["body"])["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["code"] == "unavailable"


def test_a_replica_lost_in_a_stream_ends_it_with_an_error() -> None:
    """A stream that just stops looks like an answer that is short."""
    sent = ask(FakeReplicas(STREAM, HALF, lost()))
    assert sent[-1]["more_body"] is False
    event = sent[-1]["body"].decode()
    assert event.startswith("data: ")
    assert json.loads(event[6:])["error"]["code"] == "unavailable"


def test_half_an_answer_that_is_no_stream_breaks_the_connection() -> None:
    with pytest.raises(ray.exceptions.ActorDiedError):
        ask(FakeReplicas(START, HALF, lost()))


def test_what_comes_after_the_end_changes_nothing() -> None:
    """A second end of a response breaks the connection for the next request on it."""
    assert ask(FakeReplicas(STREAM, END, lost()))[-1] == END
    assert len(ask(FakeReplicas(STREAM, END, lost()))) == 2


def test_a_client_that_leaves_is_told_to_the_replica() -> None:
    replicas = FakeReplicas(STREAM, HALF, "wait")
    body = {"type": "http.request", "body": b"{}", "more_body": False}
    sent = ask(replicas, body, {"type": "http.disconnect"})
    assert replicas.cancelled
    assert [message.get("body") for message in sent[1:]] in ([], [HALF["body"]])


def test_large_bodies_stop_at_the_gateway() -> None:
    part = {"type": "http.request", "body": b"x" * 600, "more_body": True}
    replicas = FakeReplicas(START, END)
    sent = ask(replicas, part, part, part)
    assert sent[0]["status"] == 413
    assert replicas.request is None


def test_a_gateway_that_drains_refuses_what_is_new() -> None:
    gateway = Gateway(FakeReplicas(START, END), SETTINGS)
    gateway.draining = True
    assert ask(FakeReplicas(), gateway=gateway)[0]["status"] == 503
    assert gateway.num_active == 0


def test_turns_of_one_conversation_have_one_key() -> None:
    def key(*messages: Any, headers: Any = (), **fields: Any) -> str | None:
        return affinity_key(list(headers), json.dumps({"messages": messages, **fields}).encode())

    system, hello = {"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hello"}
    answer, other = {"role": "assistant", "content": "Hi"}, {"role": "user", "content": "What else?"}
    first = key(system, hello)
    assert first is not None
    assert first == key(system, hello, answer, other) == key(system, hello, temperature=0.5)
    assert len({first, key(system, other), key(hello), key(system, hello, tools=[{}])}) == 4
    mine = [(b"X-Session-Id", b"mine")]
    assert key(system, hello, headers=mine) == key(other, headers=mine) != first
    prompts = [
        affinity_key([], json.dumps({"prompt": text}).encode()) for text in ("a" * 2000 + "b", "a" * 2000 + "c", "d")
    ]
    assert prompts[0] == prompts[1] != prompts[2]
    assert affinity_key([], b"x" * 300_000 + b"1") == affinity_key([], b"x" * 300_000 + b"2")
    for broken in (b"", b"{", b"[]", b"[" * 10_000, b"\xff"):
        assert affinity_key([], broken) is None


def test_a_replica_runs_the_application_whole() -> None:
    """Lifespan, messages as they come, and a disconnect when the answer is no longer wanted."""
    from fastapi import FastAPI
    from fastapi.responses import StreamingResponse

    seen = []

    async def lifespan(_: Any) -> AsyncIterator[None]:
        seen.append("started")
        yield

    from contextlib import asynccontextmanager

    app = FastAPI(lifespan=asynccontextmanager(lifespan))

    @app.post("/echo")
    async def echo(body: dict[str, Any]) -> dict[str, Any]:
        return body

    @app.get("/endless")
    async def endless() -> StreamingResponse:
        async def numbers() -> AsyncIterator[str]:
            try:
                while True:
                    yield "1"
                    await asyncio.sleep(0.001)
            finally:
                seen.append("ended")

        return StreamingResponse(numbers())

    async def run() -> None:
        replica = Replica.__new__(Replica)
        await Replica.__init__(replica, lambda: app)  # type: ignore[misc]
        headers = [(b"content-type", b"application/json")]
        request = Forwarded("POST", "/echo", b"/echo", b"", headers, None, b'{"a": 1}')
        messages = [message async for message in replica.forward(request)]
        assert messages[0]["status"] == 200
        assert b"".join(message.get("body", b"") for message in messages) == b'{"a":1}'
        answer = replica.forward(Forwarded("GET", "/endless", b"/endless", b"", [], None, b""))
        for _ in range(5):
            await anext(answer)
        await answer.aclose()  # type: ignore[attr-defined]
        await asyncio.sleep(0.05)
        assert seen == ["started", "ended"]

    asyncio.run(run())


def test_arguments_of_a_deployment_file_are_checked() -> None:
    with pytest.raises(ValueError, match="modell"):
        application({"modell": "x"})
    with pytest.raises(TypeError, match="max_runing"):
        application({"settings": {"max_runing": 3}})
    built = application({"replicas": {"min_replicas": 1, "max_replicas": 3}, "settings": {"api_keys": ["k"]}})
    assert built is not None


# --- a cluster ---


class Cluster:
    """`minim3 serve --replicas 2` as a process."""

    def __init__(self) -> None:
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        self.lines: list[str] = []
        self._ready = threading.Event()
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "minim3", "serve", "--replicas", "2", "--port", str(port)],
            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=environment,
        )  # fmt: skip
        threading.Thread(target=self._read, daemon=True).start()
        if not self._ready.wait(300):
            self.stop()
            raise AssertionError("no cluster after 300 s:\n" + "".join(self.lines[-20:]))

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.lines.append(line)
            if "is ready: 2 replicas" in line:
                self._ready.set()

    def replicas(self) -> list[int]:
        """Process ids of our replicas: descendants of our process, so that no other cluster's are touched."""
        found = []
        for folder in Path("/proc").iterdir():
            try:
                if folder.name.isdigit() and (folder / "cmdline").read_text().startswith(
                    "ray::ServeReplica:minim3:replica"
                ):
                    found.append(int(folder.name))
            except OSError:
                continue
        return [one for one in found if self.process.pid in _ancestors(one)]

    def ask(self, text: str, *, stream: bool, max_tokens: int = 40) -> httpx.Response:
        body = {
            "messages": [{"role": "user", "content": text}],
            "max_tokens": max_tokens,
            "ignore_eos": True,
            "stream": stream,
        }
        return httpx.post(f"{self.url}/v1/chat/completions", json=body, timeout=180)

    def stop(self) -> int:
        if self.process.poll() is None:
            self.process.terminate()
        try:
            return self.process.wait(120)
        except subprocess.TimeoutExpired:
            self.process.kill()
            raise


def _ancestors(pid: int) -> list[int]:
    found: list[int] = []
    while pid > 1:
        try:
            pid = int(Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[1])
        except OSError:
            return found
        found.append(pid)
    return found


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    one = Cluster()
    yield one
    one.stop()


@pytest.mark.slow
def test_a_conversation_stays_with_the_replica_that_knows_it(cluster: Cluster) -> None:
    """Routed at random, half of the turns would compute the whole prompt again."""
    for seed in range(4):
        opening = [{"role": "user", "content": f"{seed} " + "remember these words " * 20}]
        first = httpx.post(
            f"{cluster.url}/v1/chat/completions", json={"messages": opening, "max_tokens": 4}, timeout=120
        ).json()
        assert first["usage"]["prompt_tokens_details"]["cached_tokens"] < 64
        turns = [*opening, {"role": "assistant", "content": "yes"}, {"role": "user", "content": "which?"}]
        later = httpx.post(
            f"{cluster.url}/v1/chat/completions", json={"messages": turns, "max_tokens": 4}, timeout=120
        ).json()
        assert later["usage"]["prompt_tokens_details"]["cached_tokens"] >= 64


def outcome(response: httpx.Response) -> str:
    """whole, or lost and to be sent again."""
    if response.status_code == 503:
        assert int(response.headers["retry-after"]) >= 1
        assert response.json()["error"]["code"] == "unavailable"
        return "lost"
    assert response.status_code == 200, response.text
    if response.headers["content-type"].startswith("application/json"):
        assert response.json()["usage"]["completion_tokens"] == 40
        return "whole"
    last = [line for line in response.text.splitlines() if line.startswith("data:")][-1]
    if last == "data: [DONE]":
        return "whole"
    assert json.loads(last[5:])["error"]["code"] == "unavailable"
    return "lost"


@pytest.mark.slow
def test_a_killed_replica_costs_its_own_requests_and_comes_back(cluster: Cluster) -> None:
    before = cluster.replicas()
    assert len(before) == 2
    with ThreadPoolExecutor(8) as pool:
        pending = [pool.submit(cluster.ask, f"Question {i}", stream=i % 2 == 0) for i in range(40)]
        while sum(one.done() for one in pending) < 4:
            time.sleep(0.05)
        os.kill(before[0], signal.SIGKILL)
        outcomes = [outcome(one.result()) for one in pending]
    assert 1 <= outcomes.count("lost") <= 8, outcomes
    assert outcomes[-16:].count("whole") == 16, "the replica that is left serves everybody"
    deadline = time.monotonic() + 180
    while len(cluster.replicas()) < 2:
        assert time.monotonic() < deadline, "the replica did not come back"
        time.sleep(0.5)
    assert set(cluster.replicas()) - set(before)
    assert outcome(cluster.ask("Again", stream=False)) == "whole"


@pytest.mark.slow
def test_sigterm_finishes_what_is_under_way(cluster: Cluster) -> None:
    """Last: it ends the cluster."""
    with ThreadPoolExecutor(6) as pool:
        pending = [pool.submit(cluster.ask, f"Count {i}", stream=i % 2 == 0) for i in range(6)]
        time.sleep(1.5)
        cluster.process.terminate()
        deadline = time.monotonic() + 10
        statuses = set()
        while time.monotonic() < deadline and 503 not in statuses and not all(one.done() for one in pending):
            statuses.add(cluster.ask("Too late", stream=False, max_tokens=1).status_code)
        assert [outcome(one.result()) for one in pending] == ["whole"] * 6
    assert cluster.process.wait(120) == 0
    assert cluster.replicas() == []
