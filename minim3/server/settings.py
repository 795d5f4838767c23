"""Every setting of a server, in one frozen object. The command line fills it in; routes only read it."""

from dataclasses import dataclass, field, fields

from minim3.inference.pages import KV_CACHE_DTYPES

MEBIBYTE = 1024 * 1024
LOG_LEVELS = ("debug", "info", "warning", "error")
THINKING_MODES = ("adaptive", "enabled", "disabled")


@dataclass(frozen=True, kw_only=True)
class ServerSettings:
    """Settings and limits of one server.

    A limit that a request breaks is answered with a 4xx that names the limit; none is ever applied silently.

    Args:
        host, port: where to listen.
        model_name: what `/v1/models` and answers call the model.
        api_keys: any of them opens every route; none given, all routes are open.
        cors_origins: web pages (scheme://host:port) of other origins whose scripts may call this server; "*" is all.
        thinking: thinking mode of requests that name none.
        page: serve the chat page at `/`.
        look_inside: let the page ask what an answer attended to (runs the model once more over the conversation).

        max_running: requests the engine works on at once.
        max_waiting: requests that may wait beyond those; further ones get 429.
        max_tokens_per_step: tokens computed in one engine step; lower makes streams smoother, higher prefills faster.
        num_pages: size of the cache in pages; None lets it grow as needed.
        speculative_tokens: tokens drafted by the model's MTP modules at each step; 0 is off.
        kv_cache_dtype: "auto" stores keys and values in the dtype of the model, "fp8" in 8 bits.
        cuda_graphs: on a GPU, hold the steps of decoding as CUDA graphs.
        retry_after_seconds: what 429 and 503 tell the client to wait.
        request_seconds: longest a request may take, from arrival to its last token.
        drain_seconds: longest a stopping server waits for the requests under way.

        max_body_bytes: of a request's body.
        max_json_depth: nesting of a request's JSON.
        max_messages: messages of a conversation.
        max_prompt_tokens: tokens of a prompt; None: what the model takes.
        max_new_tokens: most tokens a request may ask for; None: what the model takes.
        default_new_tokens: of a request that does not say; None: what the model (or `max_new_tokens`) has room for.
        max_choices: n of a request, and prompts times n of `/v1/completions`.
        max_logprobs: top_logprobs of a request.
        max_stops: stop strings of a request.
        max_tools: tools of a request.

        max_images, max_videos: pictures and clips of a request.
        max_media_bytes: of one picture or clip, decoded from base64 or downloaded.
        max_pixels: of one picture as sent (decoding it takes 3 bytes a pixel).
        max_frames: frames of one clip that are decoded at most (longer clips are refused).
        max_video_pixels: of one frame of a clip as sent.
        max_media_tokens: tokens of all pictures and clips of a request; None: what the prompt may have.
        media_seconds: longest that loading the media of a request may take.
        allow_urls: fetch http(s) URLs of pictures and clips.
        allowed_hosts: fetch from these only; names match exactly, ".example.com" matches its subdomains; none: all
            public hosts (private, loopback and link-local addresses are never fetched from unless named here).
        max_redirects: of one fetch.

        max_schema_bytes: of a JSON schema, grammar or regular expression in `response_format` or tools.
        max_schema_depth: nesting of a JSON schema.

        ignore_unknown_fields: accept requests with fields nobody knows; otherwise they are a 400 that names them.
        allow_priority: let requests choose their `priority`.
        log_prompts: write prompts and answers to the log.
        log_level: debug, info, warning or error.
        log_json: structured logs, one JSON object a line; False writes plain lines.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    model_name: str = "pocket"
    api_keys: tuple[str, ...] = field(default=(), repr=False)
    cors_origins: tuple[str, ...] = ()
    thinking: str = "adaptive"
    page: bool = True
    look_inside: bool = True

    max_running: int = 64
    max_waiting: int = 256
    max_tokens_per_step: int = 512
    num_pages: int | None = None
    speculative_tokens: int = 0
    kv_cache_dtype: str = "auto"
    cuda_graphs: bool = True
    retry_after_seconds: int = 2
    request_seconds: float = 600.0
    drain_seconds: float = 60.0

    max_body_bytes: int = 64 * MEBIBYTE
    max_json_depth: int = 64
    max_messages: int = 2048
    max_prompt_tokens: int | None = None
    max_new_tokens: int | None = None
    default_new_tokens: int | None = None
    max_choices: int = 64
    max_logprobs: int = 20
    max_stops: int = 16
    max_tools: int = 128

    max_images: int = 32
    max_videos: int = 4
    max_media_bytes: int = 48 * MEBIBYTE
    max_pixels: int = 64 * MEBIBYTE
    max_frames: int = 20_000
    max_video_pixels: int = 4096 * 4096
    max_media_tokens: int | None = None
    media_seconds: float = 30.0
    allow_urls: bool = False
    allowed_hosts: tuple[str, ...] = ()
    max_redirects: int = 3

    max_schema_bytes: int = 64 * 1024
    max_schema_depth: int = 32

    ignore_unknown_fields: bool = False
    allow_priority: bool = False
    log_prompts: bool = False
    log_level: str = "info"
    log_json: bool = True

    def __post_init__(self) -> None:
        if any(not isinstance(key, str) or not key.strip() for key in self.api_keys):
            raise ValueError("an API key is empty; leave keys out to open the server to everybody")
        if self.thinking not in THINKING_MODES:
            raise ValueError(f"thinking is {self.thinking!r}; known: {', '.join(THINKING_MODES)}")
        if self.kv_cache_dtype not in KV_CACHE_DTYPES:
            raise ValueError(f"kv_cache_dtype is {self.kv_cache_dtype!r}; known: {', '.join(KV_CACHE_DTYPES)}")
        if self.log_level not in LOG_LEVELS:
            raise ValueError(f"log_level is {self.log_level!r}; known: {', '.join(LOG_LEVELS)}")
        if not 0 <= self.port <= 65535:
            raise ValueError(f"port is {self.port}; ports go from 0 (any free one) to 65535")
        may_be_zero = {"port", "max_waiting", "speculative_tokens", "retry_after_seconds", "drain_seconds"}
        may_be_zero |= {"max_images", "max_videos", "max_redirects", "max_logprobs", "max_tools", "max_stops"}
        for one in fields(self):
            value = getattr(self, one.name)
            if isinstance(value, bool) or not isinstance(value, int | float):
                continue
            if value < 0 or (value == 0 and one.name not in may_be_zero):
                lowest = "0 or more" if one.name in may_be_zero else "above 0"
                raise ValueError(f"{one.name} is {value}; it must be {lowest}")
