"""What requests may hold: the fields of `/v1/chat/completions`, `/v1/completions` and `/tokenize`.

Types are strict (a number in quotes is refused), as are unknown fields: a misspelt `max_token` that is dropped in
silence costs its author an hour. Fields that OpenAI's clients send and that mean nothing to one server of one model are
known, and without effect (`NO_EFFECT`).
"""

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, WithJsonSchema

from minim3.server.errors import BadRequest
from minim3.server.settings import ServerSettings

NO_EFFECT = (
    "user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "prompt_cache_retention",
    "prediction", "verbosity",
)  # fmt: skip
_REPLACED = {
    "functions": "send tools instead",
    "function_call": "send tool_choice instead",
    "best_of": "send n instead",
    "audio": "this model neither hears nor speaks",
    "web_search_options": "this server searches nothing",
    "previous_response_id": "nothing is stored; send the whole conversation as input",
    "conversation": "nothing is stored; send the whole conversation as input",
    "background": "answers are not stored; use stream",
}

_ASKS_NOTHING: dict[str, tuple[Any, ...]] = {
    "functions": ([],), "function_call": ("none",), "background": (False,), "best_of": (1,),
}  # fmt: skip
"""Values of fields that are not supported which ask for nothing else than what happens."""

TokenIds = list[Annotated[int, Field(ge=0, lt=2**31)]]
_IDS = {"type": "array", "items": {"type": "integer", "minimum": 0}, "minItems": 1}
_TEXTS = {"type": "array", "items": {"type": "string"}, "minItems": 1}
_PROMPT = {"anyOf": [{"type": "string"}, _TEXTS, _IDS, {"type": "array", "items": _IDS, "minItems": 1}]}
PositiveInt = Annotated[int, Field(ge=1, lt=2**31)]


class RequestModel(BaseModel):
    """Base of every request body."""

    model_config = ConfigDict(extra="allow", strict=True, json_schema_extra={"additionalProperties": False})

    def check_fields(self, settings: ServerSettings) -> None:
        """Raise BadRequest for a field nobody knows, unless the settings ignore them."""
        for name, value in (self.model_extra or {}).items():
            if name in NO_EFFECT or value is None or value in _ASKS_NOTHING.get(name, ()):
                continue
            if name == "best_of" and value == getattr(self, "n", None):
                continue
            if name in _REPLACED:
                raise BadRequest(f"{name} is not supported: {_REPLACED[name]}", param=name, code="unsupported_field")
            if not settings.ignore_unknown_fields:
                raise BadRequest(
                    f"{name[:100]!r} is no field of this request; check its spelling, or leave it out",
                    param=name[:100],
                    code="unknown_field",
                )


class StreamOptions(BaseModel):
    model_config = ConfigDict(extra="allow", strict=True, json_schema_extra={"additionalProperties": False})

    include_usage: bool | None = Field(None, description="Send a last chunk with the usage.")
    include_obfuscation: bool | None = Field(None, description="Without effect.")


class StructuredFields(RequestModel):
    """What an answer must look like; `response_format`, or one of the fields that vLLM's clients send."""

    response_format: dict[str, Any] | None = Field(
        None, description="text, json_object, json_schema, regex, choice or grammar."
    )
    structured_outputs: dict[str, Any] | None = None
    guided_json: dict[str, Any] | str | None = None
    guided_regex: str | None = None
    guided_choice: list[str] | None = None
    guided_grammar: str | None = None

    @property
    def guide_extras(self) -> dict[str, Any]:
        """vLLM's fields, those that are set."""
        names = ("structured_outputs", "guided_json", "guided_regex", "guided_choice", "guided_grammar")
        return {name: value for name in names if (value := getattr(self, name)) is not None}


class SamplingFields(StructuredFields):
    """What chat and plain completions have in common."""

    model: str | None = Field(None, description="Any name of /v1/models; left out, the one model.")
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: PositiveInt | None = Field(None, description="How many answers.")
    max_tokens: PositiveInt | None = Field(None, description="Most tokens of an answer.")
    temperature: float | None = Field(None, ge=0, description="0 is greedy. Left out: the checkpoint's.")
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: Annotated[int, Field(ge=-1, lt=2**31)] | None = Field(None, description="0 and -1 keep all tokens.")
    min_p: float | None = Field(None, ge=0, le=1)
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    repetition_penalty: float | None = Field(None, gt=0)
    logit_bias: dict[str, Annotated[float, Field(ge=-100, le=100)]] | None = Field(
        None, description="Token id (as text) to what is added to its logit."
    )
    seed: Annotated[int, Field(ge=-(2**63), lt=2**64)] | None = None
    stop: str | list[str] | None = Field(None, description="Texts that end the answer.")
    stop_token_ids: TokenIds | None = None
    include_stop_str_in_output: bool | None = None
    min_tokens: Annotated[int, Field(ge=0, lt=2**31)] | None = None
    ignore_eos: bool | None = None
    priority: Annotated[int, Field(ge=-(2**31), lt=2**31)] | None = Field(
        None, description="Higher goes first, where the server allows it."
    )

    def check_fields(self, settings: ServerSettings) -> None:
        super().check_fields(settings)
        if self.stream_options is not None and not self.stream and self.stream_options.include_usage:
            raise BadRequest("stream_options are for streams: send stream: true as well", param="stream_options")
        unknown = [] if self.stream_options is None else list(self.stream_options.model_extra or {})
        if unknown and not settings.ignore_unknown_fields:
            name = f"stream_options.{unknown[0][:100]}"
            raise BadRequest(f"{name!r} is no field of this request", param=name, code="unknown_field")


class ChatRequest(SamplingFields):
    """The body of /v1/chat/completions."""

    messages: list[dict[str, Any]] = Field(description="The conversation so far, in OpenAI's form.", min_length=1)
    max_completion_tokens: PositiveInt | None = Field(None, description="The newer name of max_tokens.")
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, lt=2**31)] | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = Field(None, description="auto, none, required, or one function.")
    parallel_tool_calls: bool | None = None
    reasoning_effort: str | None = Field(None, description="none, minimal, low, medium, high or xhigh.")
    chat_template_kwargs: dict[str, Any] | None = Field(
        None, description="thinking_mode (enabled, disabled, adaptive), and variables of the checkpoint's template."
    )
    return_token_ids: bool | None = Field(
        None, description="Add prompt_token_ids, and token_ids to every choice: what was read and written, exactly."
    )
    modalities: list[str] | None = Field(None, description='["text"] only.')


class CompletionRequest(SamplingFields):
    """The body of /v1/completions."""

    prompt: Annotated[Any, WithJsonSchema(_PROMPT)] = Field(description="Text or token ids, one or several.")
    max_tokens: Annotated[int, Field(ge=0, lt=2**31)] | None = Field(
        None, description="Most tokens of an answer (16); 0 only with echo."
    )
    echo: bool | None = Field(None, description="Put the prompt before the answer.")
    logprobs: Annotated[int, Field(ge=0, lt=2**31)] | None = None
    suffix: str | None = Field(None, description="Not supported.")
    allow_special_tokens: bool | None = Field(
        None, description="Control tokens written in a text prompt count as such."
    )


class TokenizeRequest(RequestModel):
    """The body of /tokenize: a text, or a conversation."""

    model: str | None = None
    prompt: str | None = None
    messages: list[dict[str, Any]] | None = None
    tools: list[dict[str, Any]] | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    add_generation_prompt: bool = True
    add_special_tokens: bool | None = Field(None, description="Without effect: nothing is added to a text.")
    allow_special_tokens: bool | None = None
    return_token_strs: bool | None = None


class DetokenizeRequest(RequestModel):
    """The body of /detokenize."""

    model: str | None = None
    tokens: TokenIds
