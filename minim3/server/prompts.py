"""From a checked request to what the engine takes: token ids and media, sampling parameters, guides."""

import asyncio
import re
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from minim3.inference.request import SamplingParams
from minim3.processing.chat import NAMESPACE
from minim3.processing.messages import normalize_tools
from minim3.processing.tokenizer import END_OF_TURN
from minim3.server import structured
from minim3.server.errors import BadRequest, NotFound
from minim3.server.media import load_media
from minim3.server.schema import SamplingFields
from minim3.server.settings import THINKING_MODES, ServerSettings
from minim3.server.state import ServerState

EFFORTS = {
    "none": "disabled", "minimal": "disabled", "low": "adaptive",
    "medium": "enabled", "high": "enabled", "xhigh": "enabled",
}  # fmt: skip
_MEDIA = ("pixel_values", "image_grid_thw", "pixel_values_videos", "video_grid_thw")
# Names that the renderer passes itself; a caller's variable of the same name would replace the conversation.
_RESERVED = frozenset(
    {"messages", "tools", "tokenizer", "add_generation_prompt", "tokenize", "return_dict", "return_tensors", "padding",
     "images", "videos", "video_metadata", "images_kwargs", "videos_kwargs", "self", "bos_token", "eos_token",
     "pad_token", "unk_token", "raise_exception", "strftime_now", "namespace", "range", "dict", "lipsum", "cycler",
     "joiner"}
)  # fmt: skip
_WORD = re.compile(r"[A-Za-z0-9._-]{0,64}")


@dataclass(frozen=True)
class Prompt:
    """Token ids, and the media of their placeholders, as the processor returns them."""

    ids: list[int]
    media: dict[str, Any] | None = None


@dataclass(frozen=True)
class ToolUse:
    """tools and tool_choice of a request, checked. `tools` are those the model is told of."""

    tools: list[dict[str, Any]] = field(default_factory=list)
    choice: str = "auto"
    """auto, none, required, or the name of a function in `tools` (see `named`)."""
    named: bool = False
    parallel: bool = True


def check_model(state: ServerState, name: str | None) -> None:
    """NotFound for a model that this server does not have."""
    if name is not None and name != state.settings.model_name:
        raise NotFound(
            f"the model {name[:200]!r} does not exist here; this server has {state.settings.model_name!r}",
            param="model",
            code="model_not_found",
        )


def thinking_mode(
    state: ServerState, effort: str | None, kwargs: Mapping[str, Any] | None
) -> tuple[str, dict[str, Any]]:
    """The mode, and the further variables for the template. `chat_template_kwargs.thinking_mode` wins over effort.

    Raises:
        BadRequest: an unknown mode or effort, a variable that the template does not read (ignored where the settings
            ignore unknown fields), or one that could spell what is the template's own.
    """
    settings, processor = state.settings, state.processor
    variables = dict(kwargs or {})
    mode = variables.pop("thinking_mode", None)
    enable = variables.get("enable_thinking")
    if isinstance(enable, bool) and mode is None and "enable_thinking" not in processor.template_variables:
        # What clients written for several models send.
        mode = "enabled" if variables.pop("enable_thinking") else "disabled"
    for name, value in variables.items():
        if not name.isidentifier() or name.startswith("_") or name in _RESERVED:
            raise BadRequest(f"{name[:100]!r} cannot be set by a request", param="chat_template_kwargs")
        # A template writes its variables beside its own control tokens: words only, which can be no part of one.
        if not isinstance(value, str | int | float | bool | None) or (
            isinstance(value, str) and not _WORD.fullmatch(value)
        ):
            raise BadRequest(
                f"{name[:100]} must be a word (up to 64 letters, digits, . _ -), a number or a bool",
                param=f"chat_template_kwargs.{name[:100]}",
            )
    unread = [name for name in variables if name not in processor.template_variables]
    if unread and not settings.ignore_unknown_fields:
        known = ", ".join(sorted({"thinking_mode", *processor.template_variables} - _RESERVED))
        raise BadRequest(
            f"the chat template reads no {unread[0][:100]!r}; known: {known}",
            param=f"chat_template_kwargs.{unread[0][:100]}",
        )
    for name in unread:
        del variables[name]
    if mode is not None:
        if mode not in THINKING_MODES:
            raise BadRequest(
                f"thinking_mode is {mode!r}; known: {', '.join(THINKING_MODES)}",
                param="chat_template_kwargs.thinking_mode",
            )
        return mode, variables
    if effort is None:
        return settings.thinking, variables
    if effort not in EFFORTS:
        raise BadRequest(f"reasoning_effort is {effort[:100]!r}; known: {', '.join(EFFORTS)}", param="reasoning_effort")
    return EFFORTS[effort], variables


def tool_use(
    settings: ServerSettings,
    tools: Sequence[Mapping[str, Any]] | None,
    choice: str | Mapping[str, Any] | None,
    parallel: bool | None,
) -> ToolUse:
    """Checked tools. With `none` the model is not told of any; `call_marker` keeps it from calling one that it knows.

    Raises:
        BadRequest: malformed tools, a choice without tools, or of a function that is not among them.
    """
    tools = tools or []
    if len(tools) > settings.max_tools:
        raise BadRequest(f"{len(tools)} tools are more than the limit of {settings.max_tools}", param="tools")
    try:
        checked = normalize_tools(tools)
    except ValueError as error:
        raise BadRequest(str(error), param="tools") from None
    names = [tool["function"]["name"] for tool in checked]
    for tool in checked:
        parameters = tool["function"].get("parameters")
        if parameters is not None and not isinstance(parameters, Mapping):
            raise BadRequest(f"parameters of {tool['function']['name'][:100]} must be a JSON schema", param="tools")
    if len(set(names)) < len(names):
        raise BadRequest("two tools have the same name", param="tools")
    named = isinstance(choice, Mapping)
    if isinstance(choice, Mapping):
        function = choice.get("function", choice)
        name = function.get("name") if isinstance(function, Mapping) else None
        if choice.get("type") != "function" or not isinstance(name, str):
            form = '{"type": "function", "function": {"name": ...}}'
            raise BadRequest(f"tool_choice must be auto, none, required or {form}", param="tool_choice")
        if name not in names:
            raise BadRequest(f"tool_choice names {name[:100]!r}; tools: {', '.join(names)}", param="tool_choice")
        choice = name
    elif choice not in (None, "auto", "none", "required"):
        raise BadRequest(f"tool_choice is {choice[:100]!r}; known: auto, none, required", param="tool_choice")
    if choice == "required" and not tools:
        raise BadRequest("tool_choice is required, but the request has no tools", param="tool_choice")
    if choice == "none":
        checked = []
    # OpenAI answers a named choice with one call; several of the same function are for those who ask for them.
    return ToolUse(checked, choice or "auto", named, parallel is True or (parallel is None and not named))


async def chat_prompt(
    state: ServerState,
    messages: list[dict[str, Any]],
    tools: Sequence[Mapping[str, Any]],
    mode: str,
    variables: Mapping[str, Any],
    *,
    add_generation_prompt: bool = True,
) -> Prompt:
    """Load the media of a conversation and encode it, away from the event loop.

    Raises:
        BadRequest: whatever is wrong with the messages, their media or their length.
    """
    settings = state.settings
    if len(messages) > settings.max_messages:
        raise BadRequest(
            f"{len(messages)} messages are more than the limit of {settings.max_messages}", param="messages"
        )
    check_text_length(state, sum(_num_characters(message) for message in messages), "messages")
    loaded = messages
    if any(map(_may_hold_media, messages)):
        loaded = await load_media(
            messages, settings, processor=state.processor, workers=state.workers, max_tokens=max_prompt_tokens(state)
        )

    def encode() -> Prompt:
        try:
            inputs = state.processor.apply_chat_template(
                loaded, tools=list(tools) or None, thinking_mode=mode,
                add_generation_prompt=add_generation_prompt, **variables,
            )  # fmt: skip
        except ValueError as error:
            raise BadRequest(str(error), param="messages") from None
        media = {name: inputs[name] for name in _MEDIA if name in inputs}
        return Prompt(inputs["input_ids"][0].tolist(), media or None)

    prompt = await asyncio.get_running_loop().run_in_executor(state.workers, encode)
    check_length(state, len(prompt.ids), "messages")
    return prompt


async def text_prompt(state: ServerState, text: str, allow_special: bool, *, may_be_empty: bool = False) -> Prompt:
    """Encode a raw prompt."""
    check_text_length(state, len(text), "prompt")
    ids = await asyncio.get_running_loop().run_in_executor(
        state.workers, lambda: state.processor.tokenizer.encode(text, allow_special)
    )
    if ids or not may_be_empty:
        check_length(state, len(ids), "prompt")
    return Prompt(ids)


def max_prompt_tokens(state: ServerState) -> int:
    """The limit of this server: its own, or what leaves the model room for one token."""
    context = state.context_tokens
    return min(state.settings.max_prompt_tokens or context, context)


def check_length(state: ServerState, num_tokens: int, param: str) -> None:
    limit = max_prompt_tokens(state)
    if num_tokens == 0:
        raise BadRequest("the prompt is empty: at least one token is needed", param=param)
    if num_tokens > limit:
        raise BadRequest(
            f"the prompt has {num_tokens} tokens, more than the limit of {limit}; make it shorter",
            param=param,
            code="context_length_exceeded",
        )


def check_text_length(state: ServerState, num_characters: int, param: str) -> None:
    """Refuse at once what cannot fit however well it is tokenized (megabytes take seconds to encode)."""
    if num_characters <= 100_000:
        return
    limit = max_prompt_tokens(state)
    if num_characters > limit * state.longest_token:
        raise BadRequest(
            f"the text has {num_characters} characters, which cannot be {limit} tokens or fewer; make it shorter",
            param=param,
            code="context_length_exceeded",
        )


def _may_hold_media(message: Mapping[str, Any]) -> bool:
    """Whether a message has a part that is not plain text: files of this machine must never be read for a client."""
    content = message.get("content")
    return not isinstance(content, str | None) and not (
        isinstance(content, list)
        and all(isinstance(part, str) or (isinstance(part, Mapping) and part.get("type") == "text") for part in content)
    )


def _num_characters(value: Any) -> int:
    """Of all texts in a message, but for media, which have limits of their own."""
    if isinstance(value, str):
        return len(value)
    if isinstance(value, Mapping):
        if value.get("type") in ("image_url", "video_url", "image", "video", "file", "input_image", "input_file"):
            return 0
        return sum(map(_num_characters, value.values()))
    if isinstance(value, list):
        return sum(map(_num_characters, value))
    return 0


def sampling_params(
    state: ServerState,
    body: SamplingFields,
    *,
    max_new_tokens: int | None,
    num_prompt_tokens: int,
    logprobs: int | None,
    forbidden: tuple[int, ...] = (),
) -> SamplingParams:
    """What the request asks for, then what the checkpoint's generation config says; greedy where neither samples.

    Stop strings are left out: readers look for them (answers.py), in an answer's text and not in its reasoning.

    Raises:
        BadRequest: a value outside its range or above the server's limit.
    """
    settings, defaults = state.settings, state.generation_config
    room = state.context_tokens + 1 - num_prompt_tokens
    limit = min(settings.max_new_tokens or room, room)
    if max_new_tokens is not None and settings.max_new_tokens is not None and max_new_tokens > settings.max_new_tokens:
        raise BadRequest(
            f"max_tokens is {max_new_tokens}, more than the limit of {settings.max_new_tokens}", param="max_tokens"
        )
    wanted = max_new_tokens or defaults.get("max_new_tokens") or settings.default_new_tokens or limit
    if body.min_tokens is not None and max_new_tokens is not None and body.min_tokens > max_new_tokens:
        raise BadRequest(f"min_tokens ({body.min_tokens}) is above max_tokens ({max_new_tokens})", param="min_tokens")
    if logprobs is not None and logprobs > settings.max_logprobs:
        raise BadRequest(f"{logprobs} logprobs are more than the limit of {settings.max_logprobs}", param="logprobs")
    if body.priority and not settings.allow_priority:
        raise BadRequest("priority: this server does not let requests choose (--allow-priority)", param="priority")
    given = {
        name: value for name in ("temperature", "top_p", "top_k", "min_p") if (value := getattr(body, name)) is not None
    }
    if "temperature" in given:
        do_sample = given["temperature"] > 0
    else:
        filters = given.get("top_p", 1.0) < 1 or given.get("top_k", 0) > 0 or given.get("min_p", 0.0) > 0
        do_sample = bool(defaults.get("do_sample") or filters)
    if do_sample:
        for name in ("temperature", "top_p", "top_k", "min_p"):
            if name not in given and defaults.get(name) is not None:
                given[name] = defaults[name]
        given["top_k"] = max(given.get("top_k", 0), 0)
    else:
        given = {}
    penalty = body.repetition_penalty
    if penalty is None:
        penalty = defaults.get("repetition_penalty")
    try:
        return SamplingParams(
            max_new_tokens=min(wanted, limit),
            min_new_tokens=min(body.min_tokens or 0, wanted, limit),
            do_sample=do_sample,
            **given,
            repetition_penalty=1.0 if penalty is None else float(penalty),
            presence_penalty=body.presence_penalty or 0.0,
            frequency_penalty=body.frequency_penalty or 0.0,
            logit_bias=_logit_bias(body.logit_bias, state.model.text_config.vocab_size),
            forbidden_ids=forbidden,
            late_ids=tuple(body.stop_token_ids or ()),
            seed=secrets.randbits(63) if body.seed is None else body.seed % 2**64,
            eos_token_ids=state.eos_token_ids,
            ignore_eos=bool(body.ignore_eos),
            logprobs=logprobs,
        )
    except ValueError as error:
        raise BadRequest(str(error)) from None


def call_marker(state: ServerState, use: ToolUse) -> tuple[int, ...]:
    """What a tool call would begin with, where the request wants none."""
    token_id = state.processor.tokenizer.added_tokens.get(NAMESPACE)
    return () if use.choice != "none" or token_id is None else (token_id,)


def ignored_ids(state: ServerState, body: SamplingFields) -> frozenset[int]:
    """The ids that end a turn, where the request asks to go on after them."""
    if not body.ignore_eos:
        return frozenset()
    tokenizer = state.processor.tokenizer
    ids = {*state.eos_token_ids, *tokenizer.eos_token_ids, tokenizer.added_tokens.get(END_OF_TURN)}
    return frozenset(token_id for token_id in ids if token_id is not None)


def _logit_bias(given: Mapping[str, float] | None, vocab_size: int) -> dict[int, float]:
    bias: dict[int, float] = {}
    for text, value in (given or {}).items():
        if not text.isdecimal() or len(text) > 9 or int(text) >= vocab_size:
            raise BadRequest(
                f"logit_bias has the key {text[:40]!r}; keys are token ids below {vocab_size}", param="logit_bias"
            )
        bias[int(text)] = value
    return bias


def stop_strings(settings: ServerSettings, stop: str | Sequence[str] | None) -> tuple[str, ...]:
    """The stop strings of a request. BadRequest for too many, or an empty one."""
    stops = (stop,) if isinstance(stop, str) else tuple(stop or ())
    if len(stops) > settings.max_stops:
        raise BadRequest(f"{len(stops)} stop strings are more than the limit of {settings.max_stops}", param="stop")
    if not all(stops):
        raise BadRequest("a stop string is empty", param="stop")
    return stops


def num_choices(settings: ServerSettings, n: int | None, num_prompts: int = 1) -> int:
    """n, or 1. BadRequest where n times the prompts is above the limit."""
    wanted = 1 if n is None else n
    if wanted * num_prompts > settings.max_choices:
        raise BadRequest(
            f"{wanted * num_prompts} answers at once are more than the limit of {settings.max_choices}", param="n"
        )
    return wanted


async def make_guides(
    state: ServerState,
    response_format: Mapping[str, Any] | None,
    extras: Mapping[str, Any],
    use: ToolUse,
    mode: str,
    count: int,
) -> list[Any] | None:
    """One guide an answer, or None where nothing binds them. BadRequest for a schema or grammar that cannot."""
    bound = use.choice not in ("auto", "none") or any(tool["function"].get("strict") is True for tool in use.tools)
    if response_format is None and not extras and not bound:
        return None

    def make() -> Any:
        return structured.make_guide(
            state.processor, state.model.text_config.vocab_size, state.settings,
            response_format=structured.fold_extras(response_format, extras), tools=use.tools,
            tool_choice=use.choice, parallel=use.parallel, thinking_mode=mode,
        )  # fmt: skip

    guide = await asyncio.get_running_loop().run_in_executor(state.workers, make)
    return None if guide is None else [guide, *(guide.fork() for _ in range(count - 1))]
