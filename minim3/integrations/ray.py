"""Several replicas of the server on Ray Serve: `minim3 serve --replicas N`, or a deployment file (extra `cluster`).

    client -> Ray's HTTP proxy -> Gateway -> Replica (a whole minim3 server: engine, routes, keys, limits)

Ray starts, watches, restarts and scales the replicas, and routes to them: its consistent-hash router sends requests of
one conversation to one replica, where their prefix is cached, and past replicas that are full or gone. The gateway is
what Ray has no word for: it names the conversation, and tells a client whose replica died that the request can be sent
again (503 with Retry-After, in OpenAI's shape). It reads no keys and keeps nothing.
"""

import asyncio
import hashlib
import json
import os
import signal
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable, Mapping, MutableMapping
from contextlib import AsyncExitStack
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import ray
import ray.exceptions
from ray import serve
from ray.serve.exceptions import RayServeException

from minim3.server.errors import TooLarge, Unavailable
from minim3.server.running import bind
from minim3.server.settings import ServerSettings

Message = MutableMapping[str, Any]
"""An ASGI message."""
MakeApp = Callable[[], Any]
"""Loads a model and returns the ASGI application over it; runs inside each replica."""

NAME = "minim3"
SESSION_HEADER = b"x-session-id"
_REQUEST_ID = b"x-request-id"  # Ray's proxy writes it too, the same one
_ROUTER = "ray.serve.experimental.consistent_hash_router:ConsistentHashRouter"
_LOST = (ray.exceptions.RayActorError, ray.exceptions.TaskCancelledError, RayServeException)
_HEALTH_PERIOD_SECONDS = 5.0
_HEALTH_TIMEOUT_SECONDS = 30.0
_READ_FOR_AFFINITY_BYTES = 256 * 1024
_OPENING_BYTES = 1024
_DRAIN_POLL_SECONDS = 0.2
_OBJECT_STORE_BYTES = 256 * 1024 * 1024


@dataclass(frozen=True, slots=True)
class Forwarded:
    """One HTTP request on its way from the gateway to a replica."""

    method: str
    path: str
    raw_path: bytes
    query_string: bytes
    headers: list[tuple[bytes, bytes]]
    client: tuple[str, int] | None
    body: bytes

    def scope(self) -> dict[str, Any]:
        return {
            "type": "http", "asgi": {"version": "3.0", "spec_version": "2.4"}, "http_version": "1.1", "scheme": "http",
            "method": self.method, "path": self.path, "raw_path": self.raw_path, "query_string": self.query_string,
            "root_path": "", "headers": self.headers, "client": self.client, "server": None,
        }  # fmt: skip


class Replica:
    """One server, without a socket: requests come through Ray."""

    async def __init__(self, make_app: MakeApp) -> None:  # type: ignore[misc]  # Ray awaits constructors
        self._app = make_app()
        self._stack = AsyncExitStack()
        await self._stack.enter_async_context(self._app.router.lifespan_context(self._app))

    def check_health(self) -> None:
        """Ray calls this every few seconds and replaces a replica that raises."""
        failure = self._app.state.server.driver.failure
        if failure is not None:
            raise RuntimeError(f"the engine has failed: {failure}")

    async def forward(self, request: Forwarded) -> AsyncIterator[Message]:
        """The ASGI messages of the response, as they come. Closing the iterator disconnects the client."""
        messages: asyncio.Queue[Message | None] = asyncio.Queue()
        gone = asyncio.Event()
        pending = [{"type": "http.request", "body": request.body, "more_body": False}]

        async def receive() -> Message:
            if pending:
                return pending.pop()
            await gone.wait()
            return {"type": "http.disconnect"}

        async def answer() -> None:
            try:
                await self._app(request.scope(), receive, messages.put)
            finally:
                messages.put_nowait(None)

        task = asyncio.create_task(answer())
        try:
            while (message := await messages.get()) is not None:
                yield message
            await task
        finally:
            gone.set()
            task.cancel()


class Ingress:
    """The deployment that Ray's HTTP proxy talks to."""

    def __init__(self, replicas: Any, settings: ServerSettings) -> None:
        self._gateway = Gateway(replicas, settings)

    def __serve_build_asgi_app__(self) -> "Gateway":
        """What `serve.ingress()` asks a class for."""
        return self._gateway

    def drain(self) -> int:
        """Refuse new requests from now on; returns how many are under way."""
        self._gateway.draining = True
        return self._gateway.num_active


class Gateway:
    """Hands requests to replicas, by conversation; an ASGI application."""

    def __init__(self, replicas: Any, settings: ServerSettings) -> None:
        self._replicas = replicas
        self._settings = settings
        self.draining = False
        self.num_active = 0

    async def __call__(self, scope: Mapping[str, Any], receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan":
            await _no_lifespan(receive, send)
            return
        if self.draining:
            retry_after = self._settings.retry_after_seconds
            await _send_error(send, Unavailable("the server is stopping; send it again", retry_after=retry_after))
            return
        self.num_active += 1
        try:
            await self._forward(scope, receive, send)
        finally:
            self.num_active -= 1

    async def _forward(self, scope: Mapping[str, Any], receive: Any, send: Any) -> None:
        body = await self._read(receive)
        if body is None:
            limit = self._settings.max_body_bytes
            await _send_error(send, TooLarge(f"the body is longer than the limit of {limit} bytes"))
            return
        headers = [(bytes(name), bytes(value)) for name, value in scope["headers"]]
        client = scope.get("client")
        request = Forwarded(
            scope["method"], scope["path"], scope.get("raw_path") or scope["path"].encode(), scope["query_string"],
            headers, (str(client[0]), int(client[1])) if client else None, body,
        )  # fmt: skip
        key = affinity_key(headers, body)
        handle = self._replicas.options(stream=True, **({} if key is None else {"session_id": key}))
        answer = handle.forward.remote(request)
        gone = asyncio.Event()
        watcher = asyncio.create_task(_watch(receive, gone, answer))
        started, ended, is_stream = False, False, False
        try:
            async for message in answer:
                if message["type"] == "http.response.start":
                    started = True
                    is_stream = (b"content-type", b"text/event-stream") in [
                        (name.lower(), value.split(b";")[0]) for name, value in message["headers"]
                    ]
                    message = {**message, "headers": [pair for pair in message["headers"] if pair[0] != _REQUEST_ID]}
                elif not message.get("more_body", False):
                    # From here on "disconnected" means that all is said; the replica ends by itself.
                    ended = True
                    watcher.cancel()
                await send(message)
        except _LOST:
            if ended or gone.is_set():
                return
            error = Unavailable(
                "the replica that worked on this request was lost; send it again",
                retry_after=self._settings.retry_after_seconds,
            )
            if not started:
                await _send_error(send, error)
            elif is_stream:
                event = f"data: {json.dumps(error.body())}\n\n".encode()
                await send({"type": "http.response.body", "body": event, "more_body": False})
            else:
                raise
        finally:
            watcher.cancel()
            if not ended:
                answer.cancel()

    async def _read(self, receive: Any) -> bytes | None:
        """The whole body; None for one above the limit."""
        body = bytearray()
        while True:
            message = await receive()
            body += message.get("body", b"")
            if len(body) > self._settings.max_body_bytes:
                return None
            if message["type"] != "http.request" or not message.get("more_body", False):
                return bytes(body)


async def _watch(receive: Any, gone: asyncio.Event, answer: Any) -> None:
    """Cancel the answer when its client disconnects."""
    while (await receive())["type"] != "http.disconnect":
        pass
    gone.set()
    answer.cancel()


async def _no_lifespan(receive: Any, send: Any) -> None:
    while (message := await receive())["type"] == "lifespan.startup":
        await send({"type": "lifespan.startup.complete"})
    if message["type"] == "lifespan.shutdown":
        await send({"type": "lifespan.shutdown.complete"})


async def _send_error(send: Any, error: Unavailable | TooLarge) -> None:
    body = json.dumps(error.body()).encode()
    headers = {"content-type": "application/json", "content-length": str(len(body)), **error.headers}
    encoded = [(name.lower().encode(), value.encode()) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": error.status, "headers": encoded})
    await send({"type": "http.response.body", "body": body, "more_body": False})


def affinity_key(headers: list[tuple[bytes, bytes]], body: bytes) -> str | None:
    """What requests that share a cached prefix have in common; None where there is nothing to share.

    The client's own `X-Session-Id`, or a hash of how the conversation opens: tools, and messages up to the first one of
    a user (later turns come after it); of a plain prompt, its beginning.
    """
    for name, value in headers:
        if name.lower() == SESSION_HEADER and value:
            return hashlib.sha256(value).hexdigest()
    if not body:
        return None
    opening: Any = body[:_OPENING_BYTES]
    if len(body) <= _READ_FOR_AFFINITY_BYTES:
        try:
            fields = json.loads(body)
        except (ValueError, RecursionError):
            return None  # the replica says what is wrong with it
        if not isinstance(fields, dict):
            return None
        opening = _opening(fields)
    return hashlib.sha256(repr(opening).encode()).hexdigest()


def _opening(fields: Mapping[str, Any]) -> Any:
    messages = fields.get("messages", fields.get("input"))
    if isinstance(messages, list):
        roles = [one.get("role") if isinstance(one, dict) else None for one in messages]
        end = roles.index("user") + 1 if "user" in roles else len(messages)
        return [fields.get("tools"), fields.get("instructions"), messages[:end]]
    text = fields.get("prompt", messages)
    return text[:_OPENING_BYTES] if isinstance(text, str | list) else text


def build(
    make_app: MakeApp,
    settings: ServerSettings,
    replicas: int | Mapping[str, Any],
    *,
    num_cpus: float = 1,
    num_gpus: float = 0,
) -> Any:
    """The Ray Serve application.

    Args:
        make_app: makes one server, inside its replica.
        replicas: how many, or Ray's `autoscaling_config` (min_replicas, max_replicas, target_ongoing_requests, ...).
        num_cpus, num_gpus: what one replica takes of its machine.
    """
    capacity = settings.max_running + settings.max_waiting
    scaling: dict[str, Any] = {"autoscaling_config": replicas}
    if isinstance(replicas, int):
        scaling = {"num_replicas": replicas}
    common: dict[str, Any] = {
        "logging_config": {"enable_access_log": False},  # each server logs its own
        "graceful_shutdown_timeout_s": settings.drain_seconds,
        "health_check_period_s": _HEALTH_PERIOD_SECONDS,
        "health_check_timeout_s": _HEALTH_TIMEOUT_SECONDS,
    }
    servers = serve.deployment(
        name="replica",
        ray_actor_options={"num_cpus": num_cpus, "num_gpus": num_gpus},
        max_ongoing_requests=capacity + 64,  # the server itself says 429, with its own words
        request_router_config={"request_router_class": _ROUTER},
        **scaling,
        **common,
    )(Replica)
    gateway = serve.deployment(
        name="gateway",
        ray_actor_options={"num_cpus": 0},
        max_ongoing_requests=100_000,
        **common,
    )(serve.ingress()(Ingress))
    return gateway.bind(servers.bind(make_app), settings)


def application(args: Mapping[str, Any]) -> Any:
    """The builder that a deployment file names (`import_path: minim3.integrations.ray:application`).

    args: `model` (folder or hub id; pocket), `device`, `dtype`, `quantization`, `adapter`, `replicas` (a number, or
    Ray's autoscaling_config), `num_cpus` and `num_gpus` of a replica, `settings` (fields of `ServerSettings`).

    Raises:
        ValueError: an argument that is not known.
    """
    known = {"model", "device", "dtype", "quantization", "adapter", "replicas", "num_cpus", "num_gpus", "settings"}
    unknown = sorted(set(args) - known)
    if unknown:
        raise ValueError(f"args has {', '.join(unknown)}; known: {', '.join(sorted(known))}")
    fields: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value for name, value in args.get("settings", {}).items()
    }
    settings = ServerSettings(**fields)
    loading = {name: args[name] for name in ("dtype", "device", "quantization", "adapter") if name in args}
    num_cpus = args.get("num_cpus", 1)
    return build(
        partial(_load_app, args.get("model"), settings, int(num_cpus) or None, loading), settings,
        args.get("replicas", 1), num_cpus=num_cpus, num_gpus=args.get("num_gpus", 0),
    )  # fmt: skip


def _load_app(model: str | None, settings: ServerSettings, threads: int | None, loading: Mapping[str, Any]) -> Any:
    import torch

    from minim3.loading import load
    from minim3.server.app import create_app
    from minim3.server.logs import configure_logs

    configure_logs(settings.log_level, as_json=settings.log_json)
    if threads is not None:
        torch.set_num_threads(threads)
    loaded, processor = load(model, require_tokenizer=True, **loading)
    loaded.pack_for_inference()
    return create_app(settings, model=loaded, processor=processor)


def run_replicas(make_app: MakeApp, settings: ServerSettings, replicas: int, *, num_gpus: float = 0) -> int:
    """Serve `replicas` servers on this machine (or on the cluster that RAY_ADDRESS names) until SIGTERM or Ctrl-C, and
    stop when the requests under way are answered. Returns the signal that stopped it."""
    listener = bind(settings.host, settings.port)  # a taken port is said now, in our words
    port = listener.getsockname()[1]
    listener.close()
    stopped = threading.Event()
    received: list[int] = []

    def stop(number: int, _: Any) -> None:
        received.append(number)
        stopped.set()

    start(replicas, host=settings.host, port=port)
    try:
        num_cpus = max(1, (os.cpu_count() or 1) // replicas)
        app = build(make_app, replace(settings, port=port), replicas, num_cpus=num_cpus, num_gpus=num_gpus)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, stop)
        ingress = serve.run(app, name=NAME, route_prefix="/")
        print(
            f"{settings.model_name} is ready: {replicas} replicas at http://{settings.host}:{port}/v1",
            file=sys.stderr,
            flush=True,
        )
        stopped.wait()
        print("stopping: requests under way are finished first", file=sys.stderr, flush=True)
        deadline = time.monotonic() + settings.drain_seconds
        while ingress.drain.remote().result() and time.monotonic() < deadline:
            time.sleep(_DRAIN_POLL_SECONDS)
        serve.delete(NAME)
    finally:
        serve.shutdown()
        ray.shutdown()
    return received[0] if received else 0


def start(replicas: int, *, host: str, port: int) -> None:
    """Ray, with room for the replicas, and its HTTP proxy. A cluster that RAY_ADDRESS names is used as it is."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # A busy machine takes longer than Ray's 5 seconds to start a process that imports this much.
    os.environ.setdefault("RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S", "60")
    os.environ.setdefault("RAY_SERVE_PROXY_HEALTH_CHECK_TIMEOUT_S", "60")
    if "RAY_ADDRESS" in os.environ:
        ray.init(namespace=NAME)
    else:
        cpus = max(os.cpu_count() or 1, replicas)
        ray.init(
            namespace=NAME, num_cpus=cpus, include_dashboard=False, object_store_memory=_OBJECT_STORE_BYTES,
            log_to_driver=True,
        )  # fmt: skip
    serve.start(http_options={"host": host, "port": port, "request_timeout_s": None, "keep_alive_timeout_s": 75})
