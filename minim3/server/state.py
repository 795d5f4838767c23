"""What the routes of one server share."""

import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from typing import TYPE_CHECKING, Any

from minim3.processing.processor import MiniMaxM3VLProcessor
from minim3.server.settings import ServerSettings

if TYPE_CHECKING:
    from minim3.server.driver import EngineDriver
    from minim3.server.metrics import Metrics

_NUM_WORKERS = 2


class ServerState:
    """One model behind one app. Handed to every `router(state)`.

    Attributes:
        model: belongs to the engine's thread: run it inside `await driver.run_in_engine(fn)` only; its configs may be
            read anywhere.
        workers: threads for what would hold up the event loop (encoding prompts, resizing pictures).
        started: when, in seconds since 1970.
    """

    def __init__(
        self,
        *,
        settings: ServerSettings,
        model: Any,
        processor: MiniMaxM3VLProcessor,
        driver: "EngineDriver",
        metrics: "Metrics",
    ) -> None:
        self.settings = settings
        self.model = model
        self.processor = processor
        self.driver = driver
        self.metrics = metrics
        self.workers = ThreadPoolExecutor(_NUM_WORKERS, thread_name_prefix="minim3-prompt")
        self.started = int(time.time())

    @property
    def generation_config(self) -> Mapping[str, Any]:
        """The checkpoint's, empty where it has none."""
        return getattr(self.model, "generation_config", None) or {}

    @cached_property
    def context_tokens(self) -> int:
        """The most tokens of prompt and answer: what the model takes, or what the cache can hold where it may not grow.

        The last token of an answer is never stored, and may lie one past this.
        """
        context: int = self.model.text_config.max_position_embeddings
        pool = self.driver.engine.cache.pool
        return context if pool.max_pages is None else min(context, pool.max_pages * pool.page_size)

    @cached_property
    def eos_token_ids(self) -> tuple[int, ...]:
        """The checkpoint's, and the token that closes a turn."""
        given = self.generation_config.get("eos_token_id")
        if given is None:
            given = self.model.text_config.eos_token_id
        ids = [] if given is None else [given] if isinstance(given, int) else list(given)
        ids += [i for i in self.processor.tokenizer.eos_token_ids if i < self.model.text_config.vocab_size]
        return tuple(dict.fromkeys(ids))

    @cached_property
    def longest_token(self) -> int:
        """Bytes of the longest token."""
        tokenizer = self.processor.tokenizer
        return max(1, *(len(tokenizer.token_bytes(i)) for i in range(tokenizer.vocab_size)))
