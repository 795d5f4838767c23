"""`minim3 serve`: an OpenAI-compatible server, and the chat page, until Ctrl-C or SIGTERM."""

import os
import signal
import sys
from collections.abc import Mapping, Sequence
from dataclasses import fields
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import minim3
from minim3.cli.errors import INTERRUPTED
from minim3.cli.session import LoadOptions

KEY_VARIABLE = "MINIM3_API_KEY"
LOG_FORMATS = ("auto", "json", "text")
_PACKAGES = ("fastapi", "uvicorn", "prometheus_client", "llguidance")
_HERE = frozenset({"127.0.0.1", "localhost", "::1"})


def read_keys(given: Sequence[str], file: Path | None) -> tuple[str, ...]:
    """API keys of the options, of a file (one a line; # begins a remark) and of the environment (with commas)."""
    keys = [*given, *os.environ.get(KEY_VARIABLE, "").split(",")]
    if file is not None:
        lines = [line.strip() for line in file.read_text(encoding="utf-8").splitlines()]
        found = [line for line in lines if line and not line.startswith("#")]
        if not found:
            raise ValueError(f"{file} holds no API key; write one a line")
        keys += found
    stripped = [key.strip() for key in keys]
    if any(not key for key in stripped[: len(given)]):
        raise ValueError("--api-key is empty; leave it out to open the server to everybody")
    return tuple(dict.fromkeys(key for key in stripped if key))


def read_limits(limits: Sequence[str]) -> dict[str, Any]:
    """`NAME=VALUE` of --limit as settings. ValueError for a name that is no limit, or a value that is no number."""
    from minim3.server.settings import ServerSettings

    kinds = {
        one.name: one.type
        for one in fields(ServerSettings)
        if one.type in (int, float, int | None) and one.name != "port"
    }
    found: dict[str, Any] = {}
    for limit in limits:
        name, equals, text = limit.partition("=")
        name = name.strip().replace("-", "_")
        if not equals or name not in kinds:
            raise ValueError(f"--limit {limit}: expected NAME=VALUE with one of {', '.join(sorted(kinds))}")
        if text.strip().lower() == "none" and kinds[name] == int | None:
            found[name] = None
            continue
        try:
            found[name] = float(text) if kinds[name] is float else int(text.replace("_", ""))
        except ValueError:
            kind = "a number" if kinds[name] is float else "a whole number"
            raise ValueError(f"--limit {limit}: {text!r} is not {kind}") from None
    return found


def run_serve(options: LoadOptions, settings: Mapping[str, Any], *, replicas: int = 1, log_format: str = "auto") -> int:
    """Serves until it is stopped; returns the exit code.

    settings: of `ServerSettings`, without `model_name` to take the checkpoint's name.
    """
    if log_format not in LOG_FORMATS:
        raise ValueError(f"--log-format is {log_format!r}; known: {', '.join(LOG_FORMATS)}")
    missing = [name for name in _PACKAGES if find_spec(name) is None]
    if missing:
        how = "pip install 'minim3[serve]' (in a checkout: make install)"
        raise ValueError(f"serving needs {', '.join(missing)}: {how}")
    from minim3.server.settings import ServerSettings

    name = settings.get("model_name") or _model_name(options.model)
    as_json = log_format == "json" or (log_format == "auto" and not sys.stderr.isatty())
    checked = ServerSettings(**{**settings, "model_name": name, "log_json": as_json})
    if replicas > 1:
        if find_spec("ray") is None:
            raise ValueError(f"--replicas {replicas} needs Ray Serve: pip install 'minim3[cluster]'")
        from minim3.cli.session import choose_device
        from minim3.integrations.ray import run_replicas

        num_gpus = 1 if choose_device(options.device).type == "cuda" else 0
        stopped_by = run_replicas(partial(load_app, options, checked), checked, replicas, num_gpus=num_gpus)
        return INTERRUPTED if stopped_by == signal.SIGINT else 0
    return _serve(options, checked)


def _model_name(model: str | None) -> str:
    """The folder's name, or the whole hub id."""
    if model is None:
        return "pocket"
    return Path(model).resolve().name if Path(model).exists() else model


def _serve(options: LoadOptions, settings: Any) -> int:
    from minim3.server.running import bind, serve, stopped_by_interrupt, urls

    listener = bind(settings.host, settings.port)
    try:
        _say(f"minim3 {minim3.__version__}: loading {options.model or 'pocket'} ...")
        app = load_app(options, settings)
        _welcome(urls(listener, settings.host), settings)
        code = serve(app, settings, listener, on_drain=_say_drain)
    finally:
        listener.close()
    _say("stopped")
    return INTERRUPTED if stopped_by_interrupt(code) else 0


def load_app(options: LoadOptions, settings: Any) -> Any:
    """The model of `options` behind an application: what one process serves."""
    import torch

    from minim3.cli.session import choose_device, choose_dtype
    from minim3.loading import load
    from minim3.server.app import create_app
    from minim3.server.logs import configure_logs

    configure_logs(settings.log_level, as_json=settings.log_json)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    device = choose_device(options.device)
    dtype = None if options.dtype == "auto" else choose_dtype(options.dtype, device, None)
    model, processor = load(
        options.model, dtype, device, quantization=options.format, adapter=options.adapter, require_tokenizer=True
    )
    model.pack_for_inference()
    return create_app(settings, model=model, processor=processor)


def _welcome(url: str, settings: Any) -> None:
    _say(f"{settings.model_name} is ready")
    if settings.page:
        _say(f"  chat page  {url}/")
    _say(f"  API        {url}/v1  (OpenAI-compatible; any OpenAI client takes it as base_url)")
    if settings.api_keys:
        _say(f"  keys       {len(settings.api_keys)}; every route but /, /health and /ready needs one")
    elif settings.host not in _HERE:
        _say(f"  warning: whoever reaches {settings.host} can use this server; --api-key KEY asks for a key")
    _say("Ctrl-C stops it when the requests under way are answered; a second Ctrl-C at once.")


def _say_drain(num_active: int) -> None:
    if num_active:
        requests = "1 request" if num_active == 1 else f"{num_active} requests"
        _say(f"stopping: {requests} to finish, new ones are refused (Ctrl-C again stops at once)")


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
