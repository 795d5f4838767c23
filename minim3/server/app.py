"""`create_app`: settings, a model and its processor in, an ASGI application out."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware

import minim3
from minim3.inference.engine import Engine
from minim3.processing.processor import MiniMaxM3VLProcessor
from minim3.server import chat, completions, logs, models, operations, page, responses, tokenization
from minim3.server.auth import KeyMiddleware
from minim3.server.driver import EngineDriver
from minim3.server.errors import INVALID_REQUEST, APIError, BadRequest, error_body
from minim3.server.limits import BodyLimitMiddleware
from minim3.server.logs import RequestMiddleware
from minim3.server.metrics import Metrics
from minim3.server.settings import ServerSettings
from minim3.server.state import ServerState

DESCRIPTION = "Chat, completions and responses as OpenAI's clients speak them, over one MiniMax-M3 checkpoint."


def create_app(
    settings: ServerSettings, *, model: Any, processor: MiniMaxM3VLProcessor, engine: Engine | None = None
) -> FastAPI:
    """The server as an ASGI application; its engine starts with the application and stops with it.

    Args:
        model, processor: as `minim3.load` returns them; the processor needs its tokenizer.
        engine: an engine over `model`, instead of one made from the settings.
    """
    if engine is None:
        engine = make_engine(settings, model)
    metrics = Metrics()
    driver = EngineDriver(engine, settings, metrics)
    metrics.watch(driver)
    processor = without_files(processor, settings)
    state = ServerState(settings=settings, model=model, processor=processor, driver=driver, metrics=metrics)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        driver.start()
        try:
            yield
        finally:
            await driver.stop()

    app = FastAPI(
        title="minim3", version=minim3.__version__, description=DESCRIPTION, lifespan=lifespan, docs_url=None,
        redoc_url=None,
    )  # fmt: skip
    app.state.server = state
    for module in (operations, models, chat, completions, responses, tokenization):
        app.include_router(module.router(state))
    if settings.page:
        app.include_router(page.router(state))
    app.add_exception_handler(APIError, _api_error)
    app.add_exception_handler(RequestValidationError, _validation_error)
    app.add_exception_handler(HTTPException, _http_exception)
    # The last one added is the outermost: log everything; answer preflights; check the key; then read the body.
    app.add_middleware(BodyLimitMiddleware, state=state)
    app.add_middleware(KeyMiddleware, keys=settings.api_keys)
    if settings.cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(settings.cors_origins),
            allow_methods=["GET", "POST"],
            allow_headers=["*"],  # OpenAI's own client sends a dozen X-Stainless-* of its own
            expose_headers=["X-Request-Id", "Retry-After"],
        )
    app.add_middleware(RequestMiddleware, state=state)
    return app


def without_files(processor: MiniMaxM3VLProcessor, settings: ServerSettings) -> MiniMaxM3VLProcessor:
    """The same processor, which opens no file: whatever a route hands it, this machine's disk is not for clients."""
    images, videos = processor.image_processor, processor.video_processor
    return MiniMaxM3VLProcessor(
        images and images.with_settings(allow_files=False, max_picture_pixels=settings.max_pixels),
        processor.tokenizer,
        videos and videos.with_settings(allow_files=False, max_picture_pixels=settings.max_video_pixels),
        processor.chat_template,
    )


def make_engine(settings: ServerSettings, model: Any) -> Engine:
    """The engine that the settings describe."""
    return Engine(
        model,
        max_tokens_per_step=settings.max_tokens_per_step,
        max_running=settings.max_running,
        num_pages=settings.num_pages,
        num_speculative_tokens=settings.speculative_tokens,
        kv_cache_dtype=settings.kv_cache_dtype,
        cuda_graphs=settings.cuda_graphs,
    )


async def _api_error(_: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, APIError)
    logs.note(error=error.code or error.type, param=error.param)  # not the message, which may quote the request
    return JSONResponse(error.body(), error.status, error.headers)


async def _validation_error(_: Request, error: Exception) -> JSONResponse:
    """Pydantic's first complaint, in a sentence."""
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    path = ".".join(str(part) for part in first["loc"][1:] if not str(part).startswith(("function-", "list[", "str")))
    message = str(first["msg"]).removeprefix("Value error, ")
    if first["type"] == "extra_forbidden":
        message = "unknown field; leave it out (or start the server with --ignore-unknown-fields)"
    elif first["type"] == "missing" and not path:
        path, message = "", "the request needs a JSON body"
    elif first["type"] == "missing":
        message = "this field is required"
    text = f"{path}: {message}" if path else message
    code = "unknown_field" if first["type"] == "extra_forbidden" else None
    return await _api_error(_, BadRequest(text, param=path or None, code=code))


async def _http_exception(request: Request, error: Exception) -> JSONResponse:
    """Starlette's own: no such route, wrong method."""
    assert isinstance(error, HTTPException)
    message, code = str(error.detail), None
    if error.status_code == 404:
        message, code = f"no route {request.method} {request.url.path}; see /openapi.json for the routes", "not_found"
    elif error.status_code == 405:
        allowed = (error.headers or {}).get("Allow", "another method")
        message, code = f"{request.url.path} takes {allowed}, not {request.method}", "method_not_allowed"
    kind = INVALID_REQUEST if error.status_code < 500 else "server_error"
    return JSONResponse(error_body(message, kind, None, code), error.status_code, error.headers)
