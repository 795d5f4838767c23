"""The chat page at `/`, and what it asks beyond OpenAI's interface: `POST /v1/inspect`, a look inside an answer.

The page is one document with its styles and scripts inside, made once when the server starts: it loads nothing, needs
no path but `/` to be open, and its Content-Security-Policy names the scripts that may run by their hashes.
"""

import asyncio
import json
from importlib.resources import files
from typing import Any

from fastapi import APIRouter, Response
from pydantic import Field

import minim3
from minim3.inference.engine import Engine
from minim3.inspection import Capture, capture_answer, describe, encode_answer
from minim3.inspection.report import VIEW_SCRIPTS, content_hash, fill_places, script_json, static_text
from minim3.server import prompts
from minim3.server.errors import BadRequest, Forbidden
from minim3.server.json_route import JsonRoute
from minim3.server.schema import RequestModel
from minim3.server.state import ServerState

_STYLES = ("style.css",)
_SCRIPTS = (
    "base.js", "markdown.js", "stream.js", "settings.js", "composer.js", "answers.js", "inside.js", "starts.js",
    "app.js",
)  # fmt: skip


class InspectRequest(RequestModel):
    """The body of /v1/inspect."""

    model: str | None = None
    messages: list[dict[str, Any]] = Field(description="The conversation before the answer.", min_length=1)
    answer: dict[str, Any] = Field(description="The assistant's message to look into.")
    answer_token_ids: list[int] | None = Field(
        None, description="The ids the answer was written with; left out, it is tokenized again."
    )
    finished: bool = Field(True, description="Whether the answer ended by itself, and was not cut off.")
    tools: list[dict[str, Any]] | None = None
    layers: list[int] | None = Field(None, description="Layers to show in detail; left out, all.")
    reasoning_effort: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None


def router(state: ServerState) -> APIRouter:
    routes = APIRouter(route_class=JsonRoute, tags=["page"])
    document, policy = build_page(state)
    headers = {
        "Content-Security-Policy": policy,
        "Referrer-Policy": "no-referrer",
        "X-Content-Type-Options": "nosniff",
        "X-Frame-Options": "DENY",
        "Cache-Control": "no-cache",
    }

    @routes.get("/", include_in_schema=False)
    async def page() -> Response:
        return Response(document, media_type="text/html; charset=utf-8", headers=headers)

    @routes.post("/v1/inspect")
    async def inspect(body: InspectRequest) -> Response:
        """Which key blocks each index head selected for every token of an answer, and which experts ran.

        Runs the model once more over the conversation, between two steps of the engine. What the answer's object holds
        is described in minim3/inspection/data.py.
        """
        if not state.settings.look_inside:
            raise Forbidden("looking inside is off on this server")
        prompts.check_model(state, body.model)
        body.check_fields(state.settings)
        with state.driver.reserve():
            return Response(await _inspect(state, body), media_type="application/json")

    return routes


async def _inspect(state: ServerState, body: InspectRequest) -> str:
    mode, variables = prompts.thinking_mode(state, body.reasoning_effort, body.chat_template_kwargs)
    tools = prompts.tool_use(state.settings, body.tools, None, None).tools
    prompts.check_text_length(state, len(str(body.answer)), "answer")
    prompt = await prompts.chat_prompt(state, body.messages, tools, mode, variables)
    loop = asyncio.get_running_loop()
    try:
        answer_ids = body.answer_token_ids
        if answer_ids is None:
            answer_ids = await loop.run_in_executor(
                state.workers,
                lambda: encode_answer(
                    state.processor, body.messages, body.answer, tools=tools or None, thinking_mode=mode,
                    finished=body.finished, **variables,
                ),
            )  # fmt: skip

        def run(_: Engine) -> Capture:
            return capture_answer(
                state.model, state.processor, prompt.ids, media=prompt.media, answer_ids=answer_ids, layers=body.layers
            )

        capture = await state.driver.run_in_engine(run)
    except ValueError as error:
        raise BadRequest(str(error)) from None

    def write() -> str:
        inspection = describe(state.model, state.processor, capture, state.settings.model_name)
        return json.dumps(inspection.to_dict(), ensure_ascii=False, separators=(",", ":"))

    return await loop.run_in_executor(state.workers, write)


def build_page(state: ServerState) -> tuple[str, str]:
    """The document, and its Content-Security-Policy."""
    css = static_text("theme.css") + static_text("inspect.css") + "".join(_read(name) for name in _STYLES)
    scripts = [*(static_text(name) for name in VIEW_SCRIPTS), *(_read(name) for name in _SCRIPTS)]
    settings = state.settings
    parts = {
        "css": css,
        "scripts": "\n".join(f"<script>{script}</script>" for script in scripts),
        "config": script_json(
            {
                "version": minim3.__version__,
                "thinking": settings.thinking,
                "look_inside": settings.look_inside,
                "vision": getattr(state.model.config, "vision_config", None) is not None,
            }
        ),
    }
    document = fill_places(_read("index.html"), parts)
    allowed = " ".join(f"'{content_hash(script)}'" for script in scripts)
    policy = (
        f"default-src 'none'; script-src {allowed}; style-src '{content_hash(css)}'; img-src data: blob:; "
        "media-src blob:; connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    return document, policy


def _read(name: str) -> str:
    return (files("minim3.server") / "static" / name).read_text(encoding="utf-8")
