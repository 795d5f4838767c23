"""What operators ask: `/health` (alive?), `/ready` (taking requests?), `/metrics`."""

from typing import Any

from fastapi import APIRouter, Response
from fastapi.responses import JSONResponse

from minim3.server.errors import Unavailable
from minim3.server.metrics import CONTENT_TYPE
from minim3.server.state import ServerState


def router(state: ServerState) -> APIRouter:
    routes = APIRouter(tags=["operations"])
    retry_after = state.settings.retry_after_seconds

    @routes.head("/health", include_in_schema=False)
    @routes.get("/health")
    async def health() -> JSONResponse:
        """200 while the process can compute answers; 503 once its engine has failed and it must be restarted."""
        if state.driver.failure is not None:
            raise Unavailable(f"the engine has failed: {state.driver.failure}", retry_after=retry_after)
        return JSONResponse({"status": "ok"})

    @routes.head("/ready", include_in_schema=False)
    @routes.get("/ready")
    async def ready() -> JSONResponse:
        """200 while new requests are taken; 503 before the engine runs and while the server drains."""
        if not state.driver.ready:
            raise Unavailable("draining" if state.driver.draining else "not ready", retry_after=retry_after)
        body: dict[str, Any] = {"status": "ready", "model": state.settings.model_name}
        return JSONResponse(body)

    @routes.get("/metrics")
    def metrics() -> Response:
        """Figures in Prometheus' text format."""
        return Response(state.metrics.text(), media_type=CONTENT_TYPE)

    return routes
