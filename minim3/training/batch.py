"""What a source yields, what the model is trained on, and the names recipes give to objects.

T  tokens of the batch           N  patches of all pictures        D  documents
n  pictures of the batch         U  uses of pictures by documents (documents of a group share pictures)
The same letters hold for clips, whose rows of the grid are chunks of a few temporal patches.
"""

import importlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch

IGNORED = -100
TRAINING_SPLIT, EVALUATION_SPLIT = 0, 1


@dataclass(frozen=True)
class Sample:
    """One conversation in OpenAI form; loss falls on the assistant's turns.

    `image_indices[i]` is the picture of the group that the i-th image part of the messages shows, `video_indices` the
    same for clips. `kind` names the sort of task in logs.
    """

    messages: Sequence[Mapping[str, Any]]
    image_indices: Sequence[int] = ()
    kind: str = ""
    tools: Sequence[Mapping[str, Any]] | None = None
    thinking_mode: str | None = None
    video_indices: Sequence[int] = ()


@dataclass(frozen=True)
class Clip:
    """Frames uint8 `[frames, height, width, 3]`; `fps` frames a second, None: the prompt then states no times."""

    frames: np.ndarray
    fps: float | None = None


@dataclass(frozen=True)
class Group:
    """Samples about the same pictures (uint8 `[height, width, 3]`) and clips, so that the vision tower runs once."""

    samples: Sequence[Sample]
    images: Sequence[np.ndarray] = ()
    videos: Sequence[Clip] = ()


class Source(Protocol):
    """An endless numbered stream of groups: number `index` of a seed is the same whoever asks for it, and when.

    A source may bring sample and group types of its own; `kind`, `tools`, `thinking_mode`, `video_indices` and `videos`
    may be missing there.
    """

    def group(self, index: int) -> Any: ...


@dataclass(frozen=True)
class Batch:
    """Packed documents. `labels[t]` is the id at t + 1 where that is a target of the same document, else -100.

    `image_order[u]` is the picture (row of `image_grid_thw`) shown at the u-th place of a picture in `input_ids`;
    `video_order` lists the rows of `video_grid_thw` in the order in which `input_ids` shows their chunks.
    """

    input_ids: torch.Tensor  # int64 [T]
    labels: torch.Tensor  # int64 [T]
    lengths: tuple[int, ...]  # D numbers, sum T
    kinds: tuple[str, ...]  # D names
    pixel_values: torch.Tensor | None = None  # fp32 [N, channels * temporal_patch * patch * patch]
    image_grid_thw: torch.Tensor | None = None  # int64 [n, 3]
    image_order: torch.Tensor | None = None  # int64 [U]
    pixel_values_videos: torch.Tensor | None = None  # fp32, columns as in pixel_values
    video_grid_thw: torch.Tensor | None = None  # int64 [chunks, 3]
    video_order: torch.Tensor | None = None  # int64 [uses of chunks]

    @property
    def num_tokens(self) -> int:
        return self.input_ids.shape[0]

    def document_ids(self) -> torch.Tensor:
        """int64 [T]: which document each token belongs to."""
        lengths = torch.tensor(self.lengths, device=self.input_ids.device)
        index = torch.arange(len(self.lengths), device=self.input_ids.device)
        return torch.repeat_interleave(index, lengths, output_size=self.num_tokens)

    def to(self, device: torch.device) -> "Batch":
        moved: dict[str, Any] = {
            name: value.to(device, non_blocking=True) if isinstance(value, torch.Tensor) else value
            for name, value in vars(self).items()
        }
        return Batch(**moved)


def align_labels(ids: Sequence[int], loss_mask: Sequence[bool]) -> tuple[np.ndarray, np.ndarray]:
    """Ids of one document and its next-token labels (int64 both): `labels[t] = ids[t + 1]` if `loss_mask[t + 1]`."""
    if len(ids) != len(loss_mask):
        raise ValueError(f"{len(ids)} token ids but {len(loss_mask)} places in the loss mask")
    input_ids = np.asarray(ids, dtype=np.int64)
    labels = np.full_like(input_ids, IGNORED)
    labels[:-1] = np.where(np.asarray(loss_mask, dtype=bool)[1:], input_ids[1:], IGNORED)
    return input_ids, labels


def load_attribute(name: str) -> Any:
    """The object `package.module:attribute` names."""
    module, colon, attribute = name.partition(":")
    if not colon:
        raise ValueError(f"{name!r} must look like package.module:attribute")
    loaded = importlib.import_module(module)
    if not hasattr(loaded, attribute):
        raise ValueError(f"module {module!r} has no {attribute!r}")
    return getattr(loaded, attribute)


def load_processor(name: str) -> Any:
    """The processor of a recipe: `package.module:attribute` (called without arguments) or a checkpoint folder."""
    if ":" in name:
        return load_attribute(name)()
    from minim3.processing.processor import MiniMaxM3VLProcessor

    return MiniMaxM3VLProcessor.from_pretrained(name)
