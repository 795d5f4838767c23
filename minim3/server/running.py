"""Listening, and stopping without losing a request."""

import errno
import signal
import socket
import time
from collections.abc import Callable
from types import FrameType
from typing import Any

import uvicorn
from fastapi import FastAPI

from minim3.server.driver import EngineDriver
from minim3.server.settings import ServerSettings

_BACKLOG = 1024
_LAST_BYTES_SECONDS = 10  # what responses that are complete may take to reach their clients


def bind(host: str, port: int) -> socket.socket:
    """A listening socket, taken before a model is loaded for minutes. Port 0 is any free one.

    Raises:
        ValueError: the port is taken or not allowed, or the host is not one of this machine.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except (socket.gaierror, UnicodeError) as error:
        raise ValueError(f"host {host!r} is not known here: {error}; try 127.0.0.1, or 0.0.0.0 for all") from None
    listener = socket.socket(family, kind, protocol)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(_BACKLOG)
    except OSError as error:
        listener.close()
        if error.errno == errno.EADDRINUSE:
            reason = "is taken by another program; pass --port N, or --port 0 for any free one"
        elif error.errno == errno.EACCES:
            reason = "needs rights this user does not have; ports from 1024 up need none"
        else:
            reason = f"cannot be listened on: {error.strerror}"
        raise ValueError(f"port {port} of {host} {reason}") from None
    return listener


class Server(uvicorn.Server):
    """uvicorn, with a drain before the end: after SIGTERM or Ctrl-C new requests get 503, those under way are
    finished (for `drain_seconds` at most), and then the process ends. A second signal ends it at once.

    Attributes:
        stopped_by: the first signal, or None.
    """

    def __init__(
        self, app: FastAPI, settings: ServerSettings, *, on_drain: Callable[[int], None] | None = None
    ) -> None:
        super().__init__(
            uvicorn.Config(
                app, host=settings.host, port=settings.port, log_config=None, access_log=False, server_header=False,
                timeout_keep_alive=75, timeout_graceful_shutdown=_LAST_BYTES_SECONDS, lifespan="on", ws="none",
            )
        )  # fmt: skip
        self._driver: EngineDriver = app.state.server.driver
        self._drain_seconds = settings.drain_seconds
        self._deadline: float | None = None
        self._on_drain = on_drain
        self.stopped_by: int | None = None

    def drain(self) -> None:
        """Take no new requests, finish those under way, and end."""
        if self._deadline is None:
            self._driver.draining = True
            self._deadline = time.monotonic() + self._drain_seconds

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """The handler of SIGTERM and SIGINT."""
        if self._deadline is None:
            self.stopped_by = sig
            self.drain()
            if self._on_drain is not None:
                self._on_drain(self._driver.num_active)
        else:
            self.should_exit = self.force_exit = True
            self._driver.abandon()

    async def on_tick(self, counter: int) -> bool:
        if self._deadline is not None and not self.should_exit:
            if time.monotonic() >= self._deadline:
                self._driver.abandon()
                self.should_exit = True
            elif self._driver.num_active == 0:
                self.should_exit = True
        return await super().on_tick(counter)


def serve(
    app: FastAPI, settings: ServerSettings, listener: socket.socket, *, on_drain: Callable[[int], None] | None = None
) -> int:
    """Serve until a signal; returns it (0 if there was none)."""
    server = Server(app, settings, on_drain=on_drain)
    server.run(sockets=[listener])
    return server.stopped_by or 0


def stopped_by_interrupt(signal_number: int) -> bool:
    """Whether it was Ctrl-C."""
    return signal_number == signal.SIGINT


def urls(listener: socket.socket, host: str) -> str:
    """Where a browser on this machine finds the server, without a slash at the end."""
    address: Any = listener.getsockname()
    shown = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(host, f"[{host}]" if ":" in host else host)
    return f"http://{shown}:{address[1]}"
