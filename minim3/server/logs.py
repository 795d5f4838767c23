"""Request ids and structured logs. What people write and what the model answers is not logged unless asked for."""

import json
import logging
import re
import sys
import time
import uuid
from contextvars import ContextVar
from typing import Any, TextIO

from starlette.datastructures import MutableHeaders
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from minim3.server.errors import EngineFailed
from minim3.server.state import ServerState

log = logging.getLogger("minim3.server")
_SAFE_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")
_PROBES = frozenset({"/health", "/ready", "/metrics"})
# What a LogRecord has of its own; anything else was passed by `extra` and belongs in the line.
_OWN = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName", "color_message"}

request_id: ContextVar[str | None] = ContextVar("request_id", default=None)
_fields: ContextVar[dict[str, Any] | None] = ContextVar("fields", default=None)


def note(**fields: Any) -> None:
    """Add fields to the log line of the request being answered (counts and names, never what it says)."""
    present = _fields.get()
    if present is not None:
        present.update(fields)


class RequestMiddleware:
    """Gives each request an id (the client's `X-Request-Id`, if it is a plain word), says it back, and logs one line
    when the response has ended. An exception nobody expected becomes a 500 in OpenAI's shape."""

    def __init__(self, app: ASGIApp, state: ServerState) -> None:
        self._app = app
        self._state = state

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started = time.monotonic()
        identifier = _given_id(scope) or f"req-{uuid.uuid4().hex}"
        fields: dict[str, Any] = {}
        tokens = request_id.set(identifier), _fields.set(fields)
        status = 0
        complete = False

        async def send_with_id(message: Message) -> None:
            nonlocal status, complete
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)["X-Request-Id"] = identifier
            elif message["type"] == "http.response.body":
                complete = not message.get("more_body", False)
            await send(message)

        try:
            await self._app(scope, receive, send_with_id)
        except Exception:
            log.exception("a request failed", extra={"event": "request_failed"})
            if status == 0:
                error = EngineFailed("the server failed to answer this request; its log tells more")
                await JSONResponse(error.body(), error.status)(scope, receive, send_with_id)
            else:
                raise
        finally:
            seconds = time.monotonic() - started
            self._state.metrics.request_ended(scope, status)
            quiet = scope["path"] in _PROBES and status < 400
            # Percent-decoded, so it can hold a line break and a made-up line of log after it.
            path = "".join(one if one.isprintable() else "?" for one in scope["path"][:200])
            log.log(
                logging.DEBUG if quiet else logging.INFO,
                "%s %s %s", scope["method"], path, status or "disconnected",
                extra={
                    "event": "request",
                    "method": scope["method"],
                    "path": path,
                    "status": status or None,
                    "complete": complete,
                    "seconds": round(seconds, 4),
                    "client": scope["client"][0] if scope.get("client") else None,
                    **fields,
                },
            )  # fmt: skip
            request_id.reset(tokens[0])
            _fields.reset(tokens[1])


def _given_id(scope: Scope) -> str | None:
    for name, value in scope["headers"]:
        if name == b"x-request-id":
            text = value.decode("latin-1")
            return text if _SAFE_ID.fullmatch(text) else None
    return None


class JsonFormatter(logging.Formatter):
    """One JSON object a line: time, level, message, request_id, and the fields of the event."""

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "message": record.getMessage(),
        }
        if (identifier := request_id.get()) is not None:
            line["request_id"] = identifier
        line.update({name: value for name, value in vars(record).items() if name not in _OWN})
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False, default=str)


class PlainFormatter(logging.Formatter):
    """A line for people: time, message, seconds, tokens."""

    def format(self, record: logging.LogRecord) -> str:
        text = f"{time.strftime('%H:%M:%S', time.localtime(record.created))} {record.getMessage()}"
        if record.levelno >= logging.WARNING:
            text = text.replace(" ", f" {record.levelname}: ", 1)
        for name in ("error", "prompt_tokens", "completion_tokens", "seconds", "prompt", "reasoning", "answers"):
            if getattr(record, name, None) is not None:
                text += f" {name}={getattr(record, name)!r}"
        if (identifier := request_id.get()) is not None:
            text += f" [{identifier}]"
        return text + (f"\n{self.formatException(record.exc_info)}" if record.exc_info else "")


def configure_logs(level: str, *, as_json: bool, stream: TextIO | None = None) -> None:
    """Send the server's logs, and uvicorn's warnings, to `stream` (stderr)."""
    handler = logging.StreamHandler(sys.stderr if stream is None else stream)
    handler.setFormatter(JsonFormatter() if as_json else PlainFormatter())
    for name, least in (("minim3.server", level.upper()), ("uvicorn", "WARNING"), ("uvicorn.access", "WARNING")):
        logger = logging.getLogger(name)
        logger.handlers = [handler] if name != "uvicorn.access" else []
        logger.setLevel(least)
        logger.propagate = name == "uvicorn.access"
