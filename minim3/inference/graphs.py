"""Steps of decoding held as CUDA graphs, so that a step is one launch instead of hundreds.

A graph runs what was recorded, on the same memory: the inputs of a step are written into buffers, and its outputs lie
in buffers. Shapes are fixed too, so there is a graph for each bucket of requests and of pages a request, recorded when
it has been needed a few times. What a bucket has too many is padding: requests of length 0, whose new tokens are not
stored, and which read nothing, since their queries stand before position 0.

A graph holds the addresses of weights and pages: all are dropped when the model changes or the cache grows.

Shape legend: N requests of a bucket, E new tokens of each, W pages of each, T = N * E, H hidden size.
"""

import logging
import weakref
from collections import Counter, OrderedDict
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import torch
from torch import Tensor

from minim3.inference.cache import PagedCache
from minim3.inference.page_table import PageTable
from minim3.inference.request import Request
from minim3.kernels import DevicePlan
from minim3.model.batch import LayerPages
from minim3.model.fused import FusedModel, Step

if TYPE_CHECKING:
    from minim3.model.causal_lm import CausalLM

logger = logging.getLogger(__name__)

MOST_REQUESTS = 256
MOST_TOKENS_EACH = 8
"""Drafts and the token before them; more are not worth a graph of their own."""

_KEPT_GRAPHS = 64


class Recorder(Protocol):
    """Records what `run` does, and what memory it does it in."""

    def __call__(self, run: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        """What does it again, and where its output lies each time. `run` may be called more than once."""

    def forget(self) -> None:
        """All that was recorded is gone."""


class CudaRecorder:
    """Records CUDA graphs, which share one pool of memory: they never run at the same time."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        # One for all: libraries keep memory for every stream they have seen.
        self._stream = torch.cuda.Stream(device)
        self._pool: Any = None

    def __call__(self, run: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        with torch.cuda.device(self._device):
            current = torch.cuda.current_stream()
            self._stream.wait_stream(current)
            try:
                with torch.cuda.stream(self._stream):
                    run()  # compiles kernels and lets libraries take their memory, neither of which may be recorded
            finally:
                current.wait_stream(self._stream)  # also where memory ran out: what it reads may be given to others
            graph = torch.cuda.CUDAGraph()
            # What other threads do meanwhile is theirs. The outer context: a capture that fails leaves its stream.
            with (
                torch.cuda.stream(current),
                torch.cuda.graph(graph, self._pool, self._stream, capture_error_mode="thread_local"),
            ):
                output = run()
            self._pool = graph.pool()
        return graph.replay, output

    def forget(self) -> None:
        self._pool = None  # it went with the last graph


class _Graph(NamedTuple):
    """numbers: int64 `[3 T + N]`: ids, positions and slots of the new tokens, and the lengths of the requests.

    Whatever `replay` reads and did not make itself is held here, by the model, or by the cache.
    """

    numbers: Tensor
    table: PageTable
    replay: Callable[[], None]
    hidden_TH: Tensor


class StepGraphs:
    """The graphs of one model and its cache.

    Args:
        decoder: the text model in its fused form.
        record: how steps are recorded; on a GPU a `CudaRecorder`.
        after: a bucket is recorded when it is wanted for this time: a recording takes as long as many steps.
    """

    def __init__(
        self, model: "CausalLM", decoder: FusedModel, cache: PagedCache, record: Recorder, *, after: int = 4
    ) -> None:
        self.model, self.decoder, self.cache = model, decoder, cache
        self._record, self._after = record, after
        self._graphs: OrderedDict[tuple[int, int, int], _Graph] = OrderedDict()
        self._wanted: Counter[tuple[int, int, int]] = Counter()
        self._layers: list[weakref.ref[LayerPages]] = []  # which a cache that grows is to let go
        self._no_memory = False
        self.num_recorded = 0

    def run(
        self, requests: Sequence[Request], ids: Sequence[int], positions: Sequence[int], slots: Sequence[int],
        lengths_q: Sequence[int], lengths_k: Sequence[int],
    ) -> Tensor | None:  # fmt: skip
        """New tokens of each request: hidden states `[T, H]`, which the next step overwrites.

        None where no graph is made: for different numbers of new tokens, for more than graphs hold, for the first steps
        of a bucket, under autocast, and for a changed model.
        """
        count, each = len(requests), lengths_q[0]
        if count > MOST_REQUESTS or each > MOST_TOKENS_EACH or set(lengths_q) != {each} or not self._current():
            return None
        if torch.is_autocast_enabled(self.cache.device.type):
            return None
        rows, width = bucket(count), self._width(max(len(request.pages) for request in requests))
        key = rows, each, width
        graph = self._graphs.get(key)
        if graph is None:
            self._wanted[key] += 1
            if self._wanted[key] < self._after or self._no_memory:
                return None
        numbers = torch.zeros(rows * (3 * each + 1), dtype=torch.int64)
        per_token, per_request = _fields(numbers, rows)
        per_token[2] = -1
        per_token[:, : len(ids)] = torch.tensor([ids, positions, slots])
        per_request[:count] = torch.tensor(lengths_k)
        if graph is None:
            graph = self._make(key, numbers, requests)
            if graph is None:
                return None
        else:
            graph.numbers.copy_(numbers)
            graph.table.rows(requests)
            self._graphs.move_to_end(key)
        graph.replay()
        return graph.hidden_TH[: len(ids)]

    def _make(self, key: tuple[int, int, int], numbers: Tensor, requests: Sequence[Request]) -> _Graph | None:
        rows, each, width = key
        device, page_size = self.cache.device, self.cache.page_size
        with torch.inference_mode(False):  # written to in and outside of inference mode
            held = numbers.to(device, copy=True)
        table = PageTable(device, shape=(rows, width))
        page_table = table.rows(requests)
        (ids, positions, slots), lengths = _fields(held, rows)

        def run() -> Tensor:
            starts = torch.arange(0, rows * each + 1, each, dtype=torch.int32, device=device)
            plan = DevicePlan(page_table, lengths, starts, page_size)
            step = Step(positions, slots, self.cache.layers, page_table, lengths, starts, plan, width * page_size)
            return self.decoder.run(self.model.embed_tokens_packed(ids), step)

        try:
            replay, hidden = self._record(run)
        except RuntimeError as error:  # of torch's own memory, of the driver's, or of a library's
            if not any(words in str(error).lower() for words in ("out of memory", "alloc_failed")):
                raise
            logger.warning("no more steps are recorded as CUDA graphs: the GPU has no memory left for them")
            self._no_memory = True
            return None
        logger.info("recorded a step of %d x %d tokens over %d pages each", rows, each, width)
        self.num_recorded += 1
        graph = self._graphs[key] = _Graph(held, table, replay, hidden)
        while len(self._graphs) > _KEPT_GRAPHS:
            self._graphs.popitem(last=False)
        return graph

    def _current(self) -> bool:
        """False for a changed model; what was recorded with other weights or pages is dropped."""
        current, layers = self.decoder.unchanged(), self.cache.layers
        same = [known() for known in self._layers]
        if not current or len(same) != len(layers) or any(a is not b for a, b in zip(same, layers, strict=True)):
            if self._graphs:
                self._graphs.clear()
                self._record.forget()
            self._layers = [weakref.ref(layer) for layer in layers]
        return current

    def _width(self, num_pages: int) -> int:
        """Pages of a bucket: as many as are attended whole, or four times as many, and so on, up to the longest."""
        config, page_size = self.model.text_config, self.cache.page_size
        most = -(-config.max_position_embeddings // page_size)
        width = max(config.index_topk_blocks * (config.index_block_size or 0) // page_size, 1)
        while width < num_pages:
            width *= 4
        return max(min(width, most), num_pages)


def _fields(numbers: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    """Views of `_Graph.numbers`: `[3, T]` and `[N]`."""
    return numbers[:-rows].view(3, -1), numbers[-rows:]


def bucket(count: int) -> int:
    """The least 2^n or 3 * 2^n that is not below `count`: a third of a batch is padding at most."""
    size = 1
    while size < count:
        if size >= 2 and size // 2 * 3 >= count:
            return size // 2 * 3
        size *= 2
    return size
