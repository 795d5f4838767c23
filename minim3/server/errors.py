"""What clients see when something goes wrong: OpenAI's error shape, for every error of every route.

    {"error": {"message": "...", "type": "invalid_request_error", "param": "messages", "code": null}}
"""

from collections.abc import Mapping
from typing import Any

INVALID_REQUEST = "invalid_request_error"


class APIError(Exception):
    """An answer that is an error. Raise one of the classes below anywhere in a route.

    Args:
        message: one sentence for the person who sent the request: the thing, both values, the way out.
        param: the field of the request it is about.
        code: a short word for programs.
        headers: further headers of the response.
    """

    status = 500
    type = "server_error"
    code: str | None = None

    def __init__(
        self,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.code = code if code is not None else type(self).code
        self.headers = dict(headers or {})

    def body(self) -> dict[str, Any]:
        """The JSON that is sent."""
        return error_body(self.message, self.type, self.param, self.code)


class BadRequest(APIError):
    """400: the request cannot be answered as it stands."""

    status, type = 400, INVALID_REQUEST


class Unauthorized(APIError):
    """401: no key, or a wrong one."""

    status, type, code = 401, INVALID_REQUEST, "invalid_api_key"


class Forbidden(APIError):
    """403: understood, and not allowed here."""

    status, type, code = 403, "permission_error", "forbidden"


class NotFound(APIError):
    """404: no such model or route."""

    status, type, code = 404, INVALID_REQUEST, "not_found"


class TooLarge(APIError):
    """413: the body is larger than the server takes."""

    status, type, code = 413, INVALID_REQUEST, "request_too_large"


class TooManyRequests(APIError):
    """429: the queue is full; send it again after `Retry-After` seconds."""

    status, type, code = 429, "rate_limit_error", "queue_full"

    def __init__(self, message: str, *, retry_after: int) -> None:
        super().__init__(message, headers={"Retry-After": str(retry_after)})


class Unavailable(APIError):
    """503: the server is stopping (or its engine has failed); another replica, or a retry, may answer."""

    status, type, code = 503, "server_error", "unavailable"

    def __init__(self, message: str, *, retry_after: int) -> None:
        super().__init__(message, headers={"Retry-After": str(retry_after)})


class TimedOut(APIError):
    """504: the request took longer than the server allows."""

    status, type, code = 504, "timeout_error", "timeout"


class EngineFailed(APIError):
    """500: computing the answer failed. The request can be sent again."""

    status, type, code = 500, "server_error", "engine_error"


def error_body(message: str, kind: str, param: str | None = None, code: str | None = None) -> dict[str, Any]:
    """The JSON of an error."""
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}
