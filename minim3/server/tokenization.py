"""`POST /tokenize` and `/detokenize`."""

import asyncio
from typing import Any

from fastapi import APIRouter

from minim3.server import prompts
from minim3.server.errors import BadRequest
from minim3.server.json_route import JsonRoute
from minim3.server.schema import DetokenizeRequest, TokenizeRequest
from minim3.server.state import ServerState


def router(state: ServerState) -> APIRouter:
    routes = APIRouter(route_class=JsonRoute, tags=["tokens"])

    @routes.post("/tokenize")
    async def tokenize(body: TokenizeRequest) -> dict[str, Any]:
        """Token ids of a text, or of a conversation in the chat format (its pictures included)."""
        prompts.check_model(state, body.model)
        body.check_fields(state.settings)
        if (body.prompt is None) == (body.messages is None):
            raise BadRequest("send either prompt or messages", param="prompt")
        if body.prompt is not None:
            prompt = await prompts.text_prompt(state, body.prompt, bool(body.allow_special_tokens), may_be_empty=True)
        else:
            assert body.messages is not None
            mode, variables = prompts.thinking_mode(state, None, body.chat_template_kwargs)
            use = prompts.tool_use(state.settings, body.tools, None, None)
            with state.driver.reserve():
                prompt = await prompts.chat_prompt(
                    state, body.messages, use.tools, mode, variables, add_generation_prompt=body.add_generation_prompt
                )
        answer: dict[str, Any] = {
            "count": len(prompt.ids),
            "max_model_len": state.context_tokens,
            "tokens": prompt.ids,
        }
        if body.return_token_strs:
            decode = state.processor.tokenizer.decode
            answer["token_strs"] = await asyncio.get_running_loop().run_in_executor(
                state.workers, lambda: [decode([token_id]) for token_id in prompt.ids]
            )
        return answer

    @routes.post("/detokenize")
    async def detokenize(body: DetokenizeRequest) -> dict[str, Any]:
        """The text of token ids, control tokens included."""
        prompts.check_model(state, body.model)
        body.check_fields(state.settings)
        decode = state.processor.tokenizer.decode
        return {"prompt": await asyncio.get_running_loop().run_in_executor(state.workers, decode, body.tokens)}

    return routes
