"""API keys: with keys set, every path but three needs one of them."""

import hashlib
import hmac
from collections.abc import Sequence

from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from minim3.server.errors import Unauthorized

OPEN_PATHS = frozenset({"/", "/health", "/ready"})


class KeyMiddleware:
    """Lets requests through that carry `Authorization: Bearer KEY` (or `X-Api-Key: KEY`).

    Whatever the path is, known or not, the answer without a key is the same 401: which routes exist is nobody's
    business. Keys are compared in constant time and all of them every time, so that timing tells neither how much of
    a key was right nor which.
    """

    def __init__(self, app: ASGIApp, keys: Sequence[str]) -> None:
        self._app = app
        self._digests = tuple(_digest(key.encode()) for key in keys)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        is_open = scope["type"] == "lifespan" or not self._digests
        if is_open or (scope["type"] == "http" and self._may_pass(scope)):
            await self._app(scope, receive, send)
        elif scope["type"] == "http":
            message = "the API key is wrong" if _given_key(scope) else "this server needs an API key"
            error = Unauthorized(f"{message}; send Authorization: Bearer KEY")
            headers = {"WWW-Authenticate": "Bearer"}
            await JSONResponse(error.body(), error.status, headers)(scope, receive, send)
        else:
            await send({"type": "websocket.close", "code": 1008})

    def _may_pass(self, scope: Scope) -> bool:
        return scope["path"] in OPEN_PATHS or self._is_known(_given_key(scope))

    def _is_known(self, key: bytes) -> bool:
        given = _digest(key)
        found = False
        for digest in self._digests:
            found |= hmac.compare_digest(digest, given)
        return found


def _given_key(scope: Scope) -> bytes:
    key = b""
    for name, value in scope["headers"]:
        if name == b"authorization" and value[:7].lower() == b"bearer ":
            return bytes(value[7:].strip())
        if name == b"x-api-key":
            key = bytes(value.strip())
    return key


def _digest(key: bytes) -> bytes:
    """Of equal length whatever the key is, so that the comparison does not tell the length either."""
    return hashlib.sha256(key).digest()
