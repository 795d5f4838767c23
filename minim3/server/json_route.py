"""Reading JSON bodies: whatever is wrong with one is a 400 that says what."""

import json
import re
from collections.abc import Callable, Coroutine
from typing import Any

from fastapi import Request, Response
from fastapi.routing import APIRoute

from minim3.server.errors import BadRequest

_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")
_MAX_DIGITS = 4000  # longer integers take quadratic time, and no field means one
DEFAULT_MAX_DEPTH = 64


class JsonRequest(Request):
    """A request whose `json()` refuses what the code behind it should never see."""

    async def json(self) -> Any:
        if not hasattr(self, "_json"):
            server = getattr(self.app.state, "server", None)
            max_depth = DEFAULT_MAX_DEPTH if server is None else server.settings.max_json_depth
            self._json = parse_json(await self.body(), max_depth)
        return self._json


class JsonRoute(APIRoute):
    """A route whose body is read by `JsonRequest`: `APIRouter(route_class=JsonRoute)`."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handler = super().get_route_handler()

        async def handle(request: Request) -> Response:
            request = JsonRequest(request.scope, request.receive)
            if request.method == "POST" and self.body_field is not None:
                kind = request.headers.get("content-type", "").split(";")[0].strip().lower()
                if kind != "application/json" and not kind.endswith("+json"):
                    raise BadRequest(
                        f"the body has Content-Type {kind or '(none)'}; send JSON with Content-Type: application/json"
                    )
                await request.json()
            return await handler(request)

        return handle


def parse_json(body: bytes, max_depth: int) -> Any:
    """The value a JSON text stands for.

    Raises:
        BadRequest: no JSON, not UTF-8, NaN or Infinity, half a surrogate pair, an endless number, nested too deep.
    """
    try:
        value = json.loads(body, parse_constant=_refuse_constant, parse_int=_parse_integer)
    except BadRequest:
        raise
    except RecursionError:
        raise BadRequest(f"the JSON is nested deeper than {max_depth} levels", code="json_too_deep") from None
    except UnicodeDecodeError as error:
        raise BadRequest(f"the body is not UTF-8: {error.reason} at byte {error.start}", code="invalid_json") from None
    except ValueError as error:
        raise BadRequest(f"the body is not valid JSON: {error}", code="invalid_json") from None
    _check(value, max_depth, check_text=_SURROGATE.search(body) is not None)
    return value


def _refuse_constant(name: str) -> None:
    raise BadRequest(f"the body holds {name}, which is not JSON", code="invalid_json")


def _parse_integer(digits: str) -> int:
    if len(digits) > _MAX_DIGITS:
        raise BadRequest(f"the body holds a number of {len(digits)} digits", code="invalid_json")
    return int(digits)


def _check(value: Any, max_depth: int, *, check_text: bool) -> None:
    """Depth by a walk without recursion; strings only where the body has escapes that could be half a pair."""
    level: list[Any] = [value]
    for _ in range(max_depth + 1):
        below: list[Any] = []
        for one in level:
            if isinstance(one, dict):
                below.extend(one.values())
                if check_text:
                    below.extend(one)
            elif isinstance(one, list):
                below.extend(one)
            elif check_text and isinstance(one, str):
                try:
                    one.encode()
                except UnicodeEncodeError:
                    raise BadRequest("a text holds half of a surrogate pair (\\ud800 to \\udfff)") from None
        level = [one for one in below if isinstance(one, dict | list) or (check_text and isinstance(one, str))]
        if not level:
            return
    raise BadRequest(f"the JSON is nested deeper than {max_depth} levels", code="json_too_deep")
