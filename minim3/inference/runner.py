"""Runs one planned step: packs the scheduled tokens, splices media features in, runs the model over its pages.

Shape legend: N scheduled requests, T new tokens of all of them (drafts included), H hidden size, R rows to choose a
token for, V vocabulary.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from minim3.inference.cache import PagedCache
from minim3.inference.request import Media, Request
from minim3.inference.scheduler import Chunk
from minim3.kernels.portable.plan import Scratch
from minim3.model.batch import ForwardBatch, PagedContext
from minim3.model.decoding import DecodingModel
from minim3.model.native_decoding import NativeDecodingModel, NativeHead

if TYPE_CHECKING:
    from minim3.model.causal_lm import CausalLM


class StepOutput(NamedTuple):
    """What a step computed.

    hidden_TH: of all new tokens, after the final norm. batch: as the model saw them.
    logits_RV: of every request whose last known token was among them, that token's and its drafts'; None if no row.
    """

    hidden_TH: Tensor
    batch: ForwardBatch
    logits_RV: Tensor | None


class Runner:
    """Everything between a plan and its logits.

    Between steps it keeps the page table of the last one and memory to compute in, nothing that an answer depends on.
    """

    def __init__(self, model: "CausalLM", cache: PagedCache) -> None:
        model.pack_for_inference()
        self.model = model
        self.cache = cache
        self.device = cache.device
        self._page_table = _PageTable(cache.device)
        self._scratch = Scratch()
        self.decoding = NativeDecodingModel.of(model.text_model) or DecodingModel.of(model.text_model)
        self.head = NativeHead(model)

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
        ids_T, positions_T, slots_T = torch.tensor([token_ids, positions, slots], device=self.device)
        batch = self.batch([chunk.request for chunk in plan], positions_T, lengths_q, lengths_k, slots_T)
        embeds_TH = self._embed(ids_T, plan)
        hidden_TH = None if self.decoding is None else self.decoding.forward_packed(embeds_TH, batch)
        if hidden_TH is None:
            hidden_TH = self.model.text_model.forward_packed(embeds_TH, batch)
        if not rows:
            return StepOutput(hidden_TH, batch, None)
        last_RH = hidden_TH
        if len(rows) < len(token_ids):
            last_RH = hidden_TH[torch.tensor(rows, device=self.device)]
        return StepOutput(hidden_TH, batch, self.head(last_RH))

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
        for request, num_tokens, draft_ids in plan:
            start = request.num_computed_tokens
            if start < request.num_prompt_tokens and request.placeholders:
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


class _PageTable:
    """The page table of the last step, kept so that a step of the same requests only writes what is new."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._page_lists: list[list[int]] = []
        self._counts: list[int] = []
        self._table = torch.empty(0, 0, dtype=torch.int64)

    def rows(self, requests: Sequence[Request]) -> Tensor:
        """int64 `[N, max_pages]`; entries past the pages of a request are 0 and carry no meaning."""
        width = max(len(request.pages) for request in requests)
        same = len(requests) == len(self._page_lists) and all(
            # A list is appended to while its request runs, and replaced when pages are taken away.
            request.pages is known
            for request, known in zip(requests, self._page_lists)
        )
        if not same or width > self._table.shape[1]:
            self._rebuild(requests, width)
        else:
            for row, request in enumerate(requests):
                for place in range(self._counts[row], len(request.pages)):
                    self._table[row, place] = request.pages[place]
                    self._counts[row] = place + 1
        return self._table[:, :width]

    def _rebuild(self, requests: Sequence[Request], width: int) -> None:
        width += max(8, width // 4)  # room to grow without another rebuild
        table = [request.pages + [0] * (width - len(request.pages)) for request in requests]
        self._table = torch.tensor(table, dtype=torch.int64, device=self.device)
        self._page_lists = [request.pages for request in requests]
        self._counts = [len(request.pages) for request in requests]
