"""Whole documents, one after the other, until the token budget of a batch is full.

A document's pictures and clips travel as patches beside its ids. Documents of a group share them: each is added once to
a batch, and `order` says where it is shown.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from minim3.training.batch import Batch


@dataclass(frozen=True)
class Patches:
    """One picture or clip: `values` fp32 `[patches, columns]`, `grid` int64 `[chunks, 3]` (one chunk for a picture)."""

    values: np.ndarray
    grid: np.ndarray


@dataclass(frozen=True)
class Document:
    """Ids and labels (int64, equally long), and which pictures and clips of its group they show, in order."""

    input_ids: np.ndarray
    labels: np.ndarray
    kind: str
    image_indices: Sequence[int] = ()
    video_indices: Sequence[int] = ()


@dataclass(frozen=True)
class EncodedGroup:
    """Documents that share pictures and clips."""

    documents: Sequence[Document]
    images: Sequence[Patches] = ()
    videos: Sequence[Patches] = ()

    @property
    def num_tokens(self) -> int:
        return sum(len(document.input_ids) for document in self.documents)


@dataclass
class _Media:
    """The pictures, or the clips, of a batch in the making."""

    patches: list[Patches] = field(default_factory=list)
    order: list[int] = field(default_factory=list)
    num_rows: int = 0

    def show(self, group: Sequence[Patches], indices: Sequence[int], known: dict[int, range]) -> None:
        """Show media `indices` of `group` next; `known` holds the grid rows of those that are here already."""
        for index in indices:
            if index not in known:
                num_rows = group[index].grid.shape[0]
                known[index] = range(self.num_rows, self.num_rows + num_rows)
                self.patches.append(group[index])
                self.num_rows += num_rows
            self.order.extend(known[index])

    def tensors(self) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
        """Patch values, grid and order; None where there is nothing."""
        if not self.patches:
            return None, None, None
        values = torch.from_numpy(np.concatenate([one.values for one in self.patches]))
        grid = torch.from_numpy(np.concatenate([one.grid for one in self.patches]))
        return values, grid, torch.tensor(self.order, dtype=torch.int64)


class Packing:
    """A batch in the making, full once a document no longer fits."""

    def __init__(self, budget: int) -> None:
        self.budget = budget
        self.num_tokens = 0
        self.full = False
        self._documents: list[Document] = []
        self._images, self._videos = _Media(), _Media()

    def add_group(self, group: EncodedGroup, start: int = 0) -> int:
        """Add the group's documents from number `start` on, as far as they fit; returns how many were added."""
        images: dict[int, range] = {}
        videos: dict[int, range] = {}
        for number, document in enumerate(group.documents[start:]):
            length = len(document.input_ids)
            if length > self.budget:
                raise ValueError(
                    f"a document of {length} tokens (kind {document.kind!r}) does not fit "
                    f"data.tokens_per_batch = {self.budget}"
                )
            if self.num_tokens + length > self.budget:
                self.full = True
                return number
            self._documents.append(document)
            self.num_tokens += length
            self._images.show(group.images, document.image_indices, images)
            self._videos.show(group.videos, document.video_indices, videos)
        return len(group.documents) - start

    def finish(self) -> Batch:
        pixel_values, image_grid_thw, image_order = self._images.tensors()
        pixel_values_videos, video_grid_thw, video_order = self._videos.tensors()
        return Batch(
            input_ids=torch.from_numpy(np.concatenate([document.input_ids for document in self._documents])),
            labels=torch.from_numpy(np.concatenate([document.labels for document in self._documents])),
            lengths=tuple(len(document.input_ids) for document in self._documents),
            kinds=tuple(document.kind for document in self._documents),
            pixel_values=pixel_values,
            image_grid_thw=image_grid_thw,
            image_order=image_order,
            pixel_values_videos=pixel_values_videos,
            video_grid_thw=video_grid_thw,
            video_order=video_order,
        )
