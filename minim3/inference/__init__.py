"""Inference: the paged cache, the scheduler, the sampler, the engine, and ``generate`` on top of them.

The names below are resolved on first use, so that ``minim3.inference.scheduler`` can be imported without torch.
"""

from importlib import import_module

_HOME = {
    "Detokenizer": "engine",
    "Engine": "engine",
    "EngineStats": "engine",
    "GenerateOutput": "generate",
    "Guide": "guide",
    "Media": "request",
    "PagedCache": "cache",
    "Request": "request",
    "Runner": "runner",
    "Sampler": "sampling",
    "SamplingParams": "request",
    "Scheduler": "scheduler",
    "TokenEvent": "engine",
    "TokenLogprobs": "request",
    "OutOfPages": "pages",
    "generate": "generate",
}
__all__ = sorted(_HOME)


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
