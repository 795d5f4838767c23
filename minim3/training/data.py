"""Batches of whole documents, drawn and packed by worker processes.

A source draws groups; a group is one or more conversations (samples) about the same pictures. Documents are packed one
after the other until the token budget is full. Batch `i` depends on nothing but the recipe and `(seed, split, i)`, so
going on from step `i` means asking for batch `i`: nothing is replayed and nothing needs saving.

    T  tokens of the batch           N  patches of all pictures        D  documents
    n  pictures of the batch         U  uses of pictures by documents (documents of a group share pictures)
"""

import importlib
import multiprocessing
import os
import queue
import signal
import threading
import traceback
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from types import TracebackType
from typing import Any, Protocol

import numpy as np
import torch

from minim3.training.config import DataRecipe, SourceRecipe

IGNORED = -100
TRAINING_SPLIT, EVALUATION_SPLIT = 0, 1


@dataclass(frozen=True)
class Sample:
    """One conversation in OpenAI form; loss falls on the assistant's turns.

    `image_indices[i]` is the picture of the group that the i-th image part of the messages shows. `kind` names the sort
    of task in logs.
    """

    messages: Sequence[Mapping[str, Any]]
    image_indices: Sequence[int] = ()
    kind: str = ""
    tools: Sequence[Mapping[str, Any]] | None = None
    thinking_mode: str | None = None


@dataclass(frozen=True)
class Group:
    """Samples about the same pictures (uint8 `[height, width, 3]`), so that the vision tower runs once for all."""

    samples: Sequence[Sample]
    images: Sequence[np.ndarray] = ()


class Source(Protocol):
    """An endless numbered stream of groups: number `index` of a seed is the same whoever asks for it, and when.

    A source may bring sample and group types of its own; `kind`, `tools` and `thinking_mode` may be missing there.
    """

    def group(self, index: int) -> Any: ...


class DocumentEncoder(Protocol):
    """What packing needs of a processor."""

    image_processor: Any  # called with images=[...]; has merge_size

    def encode_conversation(
        self, messages: Sequence[Mapping[str, Any]], *, num_image_tokens: Sequence[int], **options: Any
    ) -> tuple[Sequence[int], Sequence[bool]]: ...


@dataclass(frozen=True)
class Batch:
    """Packed documents. `labels[t]` is the id at t + 1 where that is a target of the same document, else -100.

    `image_order[u]` is the picture (row of `image_grid_thw`) shown at the u-th place of a picture in `input_ids`.
    """

    input_ids: torch.Tensor  # int64 [T]
    labels: torch.Tensor  # int64 [T]
    lengths: tuple[int, ...]  # D numbers, sum T
    kinds: tuple[str, ...]  # D names
    pixel_values: torch.Tensor | None = None  # fp32 [N, channels * temporal_patch * patch * patch]
    image_grid_thw: torch.Tensor | None = None  # int64 [n, 3]
    image_order: torch.Tensor | None = None  # int64 [U]

    @property
    def num_tokens(self) -> int:
        return self.input_ids.shape[0]

    def document_ids(self) -> torch.Tensor:
        """int64 [T]: which document each token belongs to."""
        lengths = torch.tensor(self.lengths, device=self.input_ids.device)
        index = torch.arange(len(self.lengths), device=self.input_ids.device)
        return torch.repeat_interleave(index, lengths, output_size=self.num_tokens)

    def to(self, device: torch.device) -> "Batch":
        def move(tensor: torch.Tensor | None) -> torch.Tensor | None:
            return None if tensor is None else tensor.to(device, non_blocking=True)

        return Batch(
            self.input_ids.to(device, non_blocking=True),
            self.labels.to(device, non_blocking=True),
            self.lengths,
            self.kinds,
            move(self.pixel_values),
            move(self.image_grid_thw),
            move(self.image_order),
        )


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


class BatchBuilder:
    """Makes batch `index` of a stream, whichever index is asked for."""

    # Groups are numbered [split, batch, draw]; a batch never holds this many groups, nor a run this many batches.
    GROUPS_PER_BATCH, BATCHES_PER_SPLIT = 2**20, 2**40

    def __init__(self, recipe: DataRecipe, sources: Sequence[SourceRecipe], *, seed: int, split: int) -> None:
        self.processor: DocumentEncoder = load_processor(recipe.processor)
        self.sources: list[Source] = [
            load_attribute(source.name)(**{"seed": seed, **source.options}) for source in sources
        ]
        weights = np.array([source.weight for source in sources], dtype=np.float64)
        self.shares = weights / weights.sum()
        self.tokens_per_batch = recipe.tokens_per_batch
        self.seed, self.split = seed, split

    def build(self, index: int) -> Batch:
        rng = np.random.default_rng(np.random.SeedSequence([self.seed, self.split, index]))
        number = (self.split * self.BATCHES_PER_SPLIT + index) * self.GROUPS_PER_BATCH
        packing = _Packing(self.tokens_per_batch)
        while not packing.full:
            source = self.sources[rng.choice(len(self.sources), p=self.shares)]
            self._add_group(packing, source.group(number))
            number += 1
        return packing.finish()

    def _add_group(self, packing: "_Packing", group: Any) -> None:
        pixel_values = grid = None
        tokens_per_image: list[int] = []
        if group.images:
            processed = self.processor.image_processor(images=list(group.images))
            pixel_values, grid = processed["pixel_values"], processed["image_grid_thw"]
            merge_area = self.processor.image_processor.merge_size**2
            tokens_per_image = (grid.prod(dim=-1) // merge_area).tolist()
        added = 0
        for sample in group.samples:
            settings = {name: getattr(sample, name, None) for name in ("tools", "thinking_mode")}
            ids, loss_mask = self.processor.encode_conversation(
                sample.messages,
                num_image_tokens=[tokens_per_image[image] for image in sample.image_indices],
                **{name: value for name, value in settings.items() if value is not None},
            )
            kind = getattr(sample, "kind", "") or ("pictures" if sample.image_indices else "text")
            if not packing.add_document(ids, loss_mask, kind, sample.image_indices):
                break
            added += 1
        if added and pixel_values is not None and grid is not None:
            packing.add_images(pixel_values, grid)


@dataclass
class _Packing:
    """A batch in the making. Full once a document no longer fits: that document is dropped."""

    budget: int
    full: bool = False
    num_tokens: int = 0
    num_images: int = 0
    ids: list[np.ndarray] = field(default_factory=list)
    labels: list[np.ndarray] = field(default_factory=list)
    kinds: list[str] = field(default_factory=list)
    image_order: list[int] = field(default_factory=list)
    pixel_values: list[torch.Tensor] = field(default_factory=list)
    grids: list[torch.Tensor] = field(default_factory=list)

    def add_document(
        self, ids: Sequence[int], loss_mask: Sequence[bool], kind: str, image_indices: Sequence[int]
    ) -> bool:
        if len(ids) > self.budget:
            raise ValueError(
                f"a document of {len(ids)} tokens (kind {kind!r}) does not fit data.tokens_per_batch = {self.budget}"
            )
        if self.num_tokens + len(ids) > self.budget:
            self.full = True
            return False
        input_ids, labels = align_labels(ids, loss_mask)
        self.ids.append(input_ids)
        self.labels.append(labels)
        self.kinds.append(kind)
        self.num_tokens += len(ids)
        # The pictures of the group are added after its documents: their rows start at the pictures there are now.
        self.image_order.extend(self.num_images + image for image in image_indices)
        return True

    def add_images(self, pixel_values: torch.Tensor, grid: torch.Tensor) -> None:
        self.pixel_values.append(pixel_values)
        self.grids.append(grid)
        self.num_images += grid.shape[0]

    def finish(self) -> Batch:
        return Batch(
            input_ids=torch.from_numpy(np.concatenate(self.ids)),
            labels=torch.from_numpy(np.concatenate(self.labels)),
            lengths=tuple(len(ids) for ids in self.ids),
            kinds=tuple(self.kinds),
            pixel_values=torch.cat(self.pixel_values) if self.pixel_values else None,
            image_grid_thw=torch.cat(self.grids) if self.grids else None,
            image_order=torch.tensor(self.image_order, dtype=torch.int64) if self.image_order else None,
        )


class BatchStream:
    """Batches `start`, `start + 1`, ... of the training stream, made ahead by worker processes.

    Worker w of W makes every W-th batch and sends it through a pipe of its own, so the order is fixed. A context
    manager; leaving it ends the workers.
    """

    def __init__(self, recipe: DataRecipe, *, seed: int, start: int = 0, split: int = TRAINING_SPLIT) -> None:
        self.recipe, self.seed, self.next_index, self.split = recipe, seed, start, split
        self._workers: list[tuple[multiprocessing.process.BaseProcess, Connection]] = []
        self._start = start

    def __enter__(self) -> "BatchStream":
        context = multiprocessing.get_context("spawn")
        for worker in range(self.recipe.num_workers):
            reader, writer = context.Pipe(duplex=False)
            process = context.Process(
                target=_run_worker,
                args=(self.recipe, self.seed, self.split, self._start + worker, self.recipe.num_workers, writer),
                name=f"minim3-data-{worker}",
                daemon=True,
            )
            process.start()
            writer.close()  # the worker then holds the only writing end, and its death reads as end of file here
            self._workers.append((process, reader))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for process, reader in self._workers:
            reader.close()
            process.kill()
            process.join()
        self._workers.clear()

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        """The next batch, waiting for it if need be.

        Raises:
            RuntimeError: the worker failed (its traceback is quoted) or was killed (its exit code is).
        """
        process, reader = self._workers[(self.next_index - self._start) % len(self._workers)]
        try:
            message = reader.recv()
        except (EOFError, OSError) as error:
            process.join(timeout=5)
            raise RuntimeError(f"data worker {process.name} died with exit code {process.exitcode}") from error
        if isinstance(message, str):
            raise RuntimeError(f"data worker {process.name} failed at batch {self.next_index}:\n{message}")
        self.next_index += 1
        return _from_arrays(message)


def _run_worker(recipe: DataRecipe, seed: int, split: int, first: int, stride: int, writer: Connection) -> None:
    # The trainer decides when to stop: a signal to the whole process group must not end the data before the checkpoint.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    torch.set_num_threads(1)
    finished: queue.Queue[Any] = queue.Queue(maxsize=recipe.prefetch_batches)
    sender = threading.Thread(target=_send_all, args=(finished, writer), daemon=True)
    sender.start()
    try:
        builder = BatchBuilder(recipe, recipe.sources, seed=seed, split=split)
        index = first
        while True:
            finished.put(_to_arrays(builder.build(index)))
            index += stride
    except Exception:  # the boundary of the process: whatever went wrong is raised again in the trainer
        finished.put(traceback.format_exc())
        finished.put(None)
        sender.join()


def _send_all(finished: "queue.Queue[Any]", writer: Connection) -> None:
    try:
        while (message := finished.get()) is not None:
            writer.send(message)
    except BrokenPipeError:
        os._exit(0)  # the trainer is gone


def _to_arrays(batch: Batch) -> dict[str, Any]:
    """Tensors as numpy arrays: they travel by value, without shared memory or file descriptors to leak."""
    return {key: value.numpy() if isinstance(value, torch.Tensor) else value for key, value in vars(batch).items()}


def _from_arrays(message: dict[str, Any]) -> Batch:
    values: dict[str, Any] = {
        key: torch.from_numpy(value) if isinstance(value, np.ndarray) else value for key, value in message.items()
    }
    return Batch(**values)
