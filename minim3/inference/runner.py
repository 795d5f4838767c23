"""Runs one planned step: packs the scheduled tokens, splices media features in, runs the model over its pages.

Shape legend: N scheduled requests, T new tokens of all of them (drafts included), H hidden size, R rows to choose a
token for, V vocabulary.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from minim3.inference.cache import PagedCache
from minim3.inference.graphs import CudaRecorder, StepGraphs
from minim3.inference.page_table import PageTable
from minim3.inference.request import Media, Request
from minim3.inference.scheduler import Chunk
from minim3.kernels.portable.plan import Scratch
from minim3.model.batch import ForwardBatch, PagedContext
from minim3.model.decoding import DecodingModel
from minim3.model.fused import FusedModel
from minim3.model.native_decoding import NativeDecodingModel, NativeHead

if TYPE_CHECKING:
    from minim3.model.causal_lm import CausalLM

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class StepOutput:
    """What a step computed; valid until the next one.

    hidden_TH: of all new tokens, after the final norm.
    logits_RV: of every request whose last known token was among them, that token's and its drafts'; None if no row.
    """

    hidden_TH: Tensor
    logits_RV: Tensor | None
    make_batch: Callable[[], ForwardBatch]

    @cached_property
    def batch(self) -> ForwardBatch:
        """The new tokens, as the model saw them."""
        return self.make_batch()


class Runner:
    """Everything between a plan and its logits.

    Between steps it keeps the page table of the last one and memory to compute in, nothing that an answer depends on.

    Args:
        cuda_graphs: on a GPU, hold the steps of decoding as graphs, where every op has a kernel for that.
    """

    def __init__(self, model: "CausalLM", cache: PagedCache, *, cuda_graphs: bool = True) -> None:
        model.pack_for_inference()
        self.model = model
        self.cache = cache
        self.device = cache.device
        self._page_table = PageTable(cache.device)
        self._scratch = Scratch()
        text_model = model.text_model
        self.decoding = (
            NativeDecodingModel.of(text_model) or DecodingModel.of(text_model) or FusedModel.of(text_model)
        )  # fmt: skip
        self.head = NativeHead(model)
        self.graphs: StepGraphs | None = None
        if cuda_graphs and cache.device.type == "cuda" and isinstance(self.decoding, FusedModel):
            why_not = self.decoding.why_no_graph(cache.layers)
            if why_not is None:
                self.graphs = StepGraphs(model, self.decoding, cache, CudaRecorder(cache.device))
            else:
                logger.info("steps of decoding are no CUDA graphs: %s", why_not)

    def run(self, plan: Sequence[Chunk]) -> StepOutput:
        """Compute the planned tokens and store their K, V and index keys; their pages must have been handed out."""
        token_ids: list[int] = []
        positions: list[int] = []
        slots: list[int] = []
        rows: list[int] = []
        lengths_q: list[int] = []
        lengths_k: list[int] = []
        for request, num_tokens, draft_ids in plan:
            start = request.num_computed_tokens
            known = start + num_tokens
            stop = known + len(draft_ids)
            token_ids += request.token_ids[start:known]
            token_ids += draft_ids
            positions += range(start, stop)
            slots += self.cache.slots(request, start, stop)
            lengths_q.append(stop - start)
            lengths_k.append(stop)
            if known == request.num_tokens:
                rows += range(len(token_ids) - len(draft_ids) - 1, len(token_ids))
        requests = [chunk.request for chunk in plan]

        if self.graphs is not None and len(rows) == len(token_ids) and not any(map(_takes_features, plan)):
            hidden_TH = self.graphs.run(requests, token_ids, positions, slots, lengths_q, lengths_k)
            if hidden_TH is not None:

                def make_batch() -> ForwardBatch:
                    positions_T, slots_T = torch.tensor([positions, slots], device=self.device)
                    return self.batch(requests, positions_T, lengths_q, lengths_k, slots_T)

                return StepOutput(hidden_TH, self.head(hidden_TH), make_batch)
        ids_T, positions_T, slots_T = torch.tensor([token_ids, positions, slots], device=self.device)
        batch = self.batch(requests, positions_T, lengths_q, lengths_k, slots_T)
        embeds_TH = self._embed(ids_T, plan)
        hidden_TH = None if self.decoding is None else self.decoding.forward_packed(embeds_TH, batch)
        if hidden_TH is None:
            hidden_TH = self.model.text_model.forward_packed(embeds_TH, batch)
        if not rows:
            return StepOutput(hidden_TH, None, lambda: batch)
        last_RH = hidden_TH
        if len(rows) < len(token_ids):
            last_RH = hidden_TH[torch.tensor(rows, device=self.device)]
        return StepOutput(hidden_TH, self.head(last_RH), lambda: batch)

    def batch(
        self,
        requests: Sequence[Request],
        positions_T: Tensor,
        lengths_q: Sequence[int],
        lengths_k: Sequence[int],
        slots_T: Tensor,
    ) -> ForwardBatch:
        """New tokens of `requests` at these positions, over their pages."""
        table = self._page_table.rows(requests)
        pages = PagedContext(self.cache.layers, table, slots_T, self.cache.page_size, self._scratch)
        return ForwardBatch(positions_T, tuple(lengths_q), tuple(lengths_k), pages)

    def _embed(self, ids_T: Tensor, plan: Sequence[Chunk]) -> Tensor:
        embeds_TH = self.model.embed_tokens_packed(ids_T)
        first_row = 0
        for chunk in plan:
            request, num_tokens, draft_ids = chunk
            if _takes_features(chunk):
                start = request.num_computed_tokens
                embeds_TH = self._splice(embeds_TH, first_row, request, start, start + num_tokens)
            first_row += num_tokens + len(draft_ids)
        return embeds_TH

    def _splice(self, embeds_TH: Tensor, first_row: int, request: Request, start: int, stop: int) -> Tensor:
        """Put the features of the placeholders at positions `start <= p < stop` in their rows."""
        assert request.media is not None
        for token_id, places in request.placeholders.items():
            low, high = request.placeholders_between(token_id, start, stop)
            if low == high:
                continue
            found = self._features(request.media)[token_id]
            if found.shape[0] != len(places):
                raise ValueError(
                    f"request {request.request_id!r} has {len(places)} placeholders of token {token_id}, "
                    f"but its media give {found.shape[0]} features"
                )
            rows = torch.tensor(places[low:high], device=self.device) + (first_row - start)
            embeds_TH = embeds_TH.index_copy(0, rows, found[low:high].to(embeds_TH.dtype))
        return embeds_TH

    def _features(self, media: Media) -> dict[int, Tensor]:
        """Features by placeholder id, computed by the vision tower the first time they are asked for."""
        if media.features is None:
            model: Any = self.model  # a text-only model is never given media
            config, features = model.config, {}
            if media.pixel_values is not None:
                features[config.image_token_index] = model.get_image_features(
                    media.pixel_values.to(self.device), media.image_grid_thw
                )
            if media.pixel_values_videos is not None:
                features[config.video_token_index] = model.get_video_features(
                    media.pixel_values_videos.to(self.device), media.video_grid_thw
                )
            media.features = features
        return media.features


def _takes_features(chunk: Chunk) -> bool:
    """Whether tokens of the chunk may stand for pictures or clips."""
    request = chunk.request
    return bool(request.placeholders) and request.num_computed_tokens < request.num_prompt_tokens
