"""`GET /v1/models`: the one model of this server."""

from typing import Any

from fastapi import APIRouter

from minim3.server.prompts import check_model, max_prompt_tokens
from minim3.server.state import ServerState


def router(state: ServerState) -> APIRouter:
    routes = APIRouter(tags=["models"])

    @routes.get("/v1/models")
    async def models() -> dict[str, Any]:
        """The models of this server."""
        return {"object": "list", "data": [_card(state)]}

    @routes.get("/v1/models/{name:path}")
    async def model(name: str) -> dict[str, Any]:
        """One model."""
        check_model(state, name)
        return _card(state)

    return routes


def _card(state: ServerState) -> dict[str, Any]:
    config = state.model.config
    return {
        "id": state.settings.model_name,
        "object": "model",
        "created": state.started,
        "owned_by": "minim3",
        "max_model_len": state.context_tokens,
        "max_prompt_tokens": max_prompt_tokens(state),
        "vision": getattr(config, "vision_config", None) is not None,
    }
