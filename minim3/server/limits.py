"""The size of a request's body, counted while it comes, before anything reads it."""

from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from minim3.server.errors import APIError, BadRequest, TooLarge
from minim3.server.state import ServerState


class BodyLimitMiddleware:
    """413 for a body above `max_body_bytes`, by its Content-Length or, where there is none, as soon as it is longer.

    A full queue (429) and a stopping server (503) are told here too, so that nobody uploads 60 MB to hear it.
    """

    def __init__(self, app: ASGIApp, state: ServerState) -> None:
        self._app = app
        self._state = state

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] != "POST":
            await self._app(scope, receive, send)
            return
        limit = self._state.settings.max_body_bytes
        num_bytes = 0
        error: APIError | None = None
        response_started = False

        async def counted() -> Message:
            nonlocal num_bytes, error
            message = await receive()
            if message["type"] == "http.request":
                num_bytes += len(message.get("body", b""))
                if num_bytes > limit:
                    error = TooLarge(f"the body is longer than the limit of {limit} bytes")
                    raise error
            return message

        async def noted(message: Message) -> None:
            nonlocal response_started
            response_started = True
            await send(message)

        try:
            self._check(scope, limit)
            await self._app(scope, counted, noted)
        except APIError as refused:
            if response_started:
                raise
            headers = {**refused.headers, "Connection": "close"}  # the rest of the body is not read
            await JSONResponse(refused.body(), refused.status, headers)(scope, receive, send)

    def _check(self, scope: Scope, limit: int) -> None:
        if scope["path"].startswith("/v1/"):
            self._state.driver.reserve(1).release()
        for name, value in scope["headers"]:
            if name == b"content-length":
                if not value.isdigit():
                    raise BadRequest(f"Content-Length is {value.decode('latin-1')!r}, which is no number")
                if int(value) > limit:
                    raise TooLarge(f"the body has {int(value)} bytes, more than the limit of {limit}")
