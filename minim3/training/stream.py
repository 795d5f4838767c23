"""The stream of batches a run trains on, and its position.

Two kinds of streams:

- All sources are numbered (`name`): batch `i` depends on nothing but the recipe and `(seed, split, i)`, workers make
  whole batches, and the position is `i`. A document that does not fit at the end of a batch is not carried on: there
  are endlessly many.
- Some source holds records: the stream is a sequence of *draws*. Draw `n` is one record (or group) of a source chosen
  by weight; which one follows from how often that source was drawn before. Workers read and encode draws, this process
  packs them, and a document that does not fit opens the next batch. The position is the number of the first draw of the
  next batch and the counts of draws from each source.

Why the workers are the project's own and not torchdata's StatefulDataLoader: there, packing inside the workers would
make the batches depend on how many workers there are, and the state would be the states of all workers with what they
have in hand; packing outside leaves a loader of single documents, whose state is a number that is known here anyway.
With draws found by number, a stream goes on bit for bit with any number of workers and any prefetch, its state is a few
numbers, and nothing is replayed.
"""

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import torch

from minim3.training.bad_records import BadRecords, BadRecordsError
from minim3.training.batch import (
    EVALUATION_SPLIT,
    TRAINING_SPLIT,
    Batch,
    Source,
    load_attribute,
    load_processor,
)
from minim3.training.config import DataRecipe, SourceRecipe
from minim3.training.order import DrawOrder, EpochOrder
from minim3.training.packing import EncodedGroup, Packing
from minim3.training.records import BadRecord, DocumentEncoder, RecordError
from minim3.training.sources import HubStream, open_records
from minim3.training.workers import InlineWorkers, WorkerProcesses

# Groups of numbered sources are numbered [split, batch, draw]: a batch never holds this many groups, nor a run this
# many batches.
GROUPS_PER_BATCH, BATCHES_PER_SPLIT = 2**20, 2**40
# So many draws in a row of records that are known to be bad: there is nothing else.
MAX_USELESS_DRAWS = 1000


def evaluation_recipe(data: DataRecipe, sources: Sequence[SourceRecipe]) -> DataRecipe:
    """The data of held-out evaluation: `sources`, or what the training sources hold out.

    Raises:
        ValueError: there is neither; training records would be taken for held-out ones.
    """
    if not sources:
        for source in data.sources:
            if source.name is None and not source.held_out:
                raise ValueError(
                    f"source {source.label!r} has no held-out records to evaluate on: set its held_out (a share, "
                    "such as 0.05), give evaluation.sources, or set evaluation.every_steps=0"
                )
    return replace(data, sources=tuple(sources) or data.sources, num_workers=0)


class BatchBuilder:
    """Makes batch `index` of a stream of numbered sources, whichever index is asked for."""

    def __init__(self, recipe: DataRecipe, sources: Sequence[SourceRecipe], *, seed: int, split: int) -> None:
        self.encoder = DocumentEncoder(load_processor(recipe.processor), recipe.tokens_per_batch)
        self.recipes = list(sources)
        self.sources: list[Source] = [_numbered_source(source, seed) for source in sources]
        weights = np.array([source.weight for source in sources], dtype=np.float64)
        self.shares = weights / weights.sum()
        self.tokens_per_batch = recipe.tokens_per_batch
        self.seed, self.split = seed, split

    def build(self, index: int) -> Batch:
        rng = np.random.default_rng(np.random.SeedSequence([self.seed, self.split, index]))
        number = (self.split * BATCHES_PER_SPLIT + index) * GROUPS_PER_BATCH
        packing = Packing(self.tokens_per_batch)
        while not packing.full:
            source = rng.choice(len(self.sources), p=self.shares)
            group = self.sources[source].group(number)
            packing.add_group(self.encoder.encode_group(group, self.recipes[source]))
            number += 1
        return packing.finish()


def _numbered_source(source: SourceRecipe, seed: int) -> Source:
    assert source.name is not None
    return load_attribute(source.name)(**{"seed": seed, **source.options})


@dataclass(frozen=True)
class _NumberedBatches:
    """Plan of a stream whose sources are all numbered: an item is a batch (as arrays)."""

    recipe: DataRecipe
    seed: int
    split: int
    first: int
    item_name = "batch"

    def items(self, worker: int, num_workers: int) -> Iterator[dict[str, Any]]:
        builder = BatchBuilder(self.recipe, self.recipe.sources, seed=self.seed, split=self.split)
        index = self.first + worker
        while True:
            yield _to_arrays(builder.build(index))
            index += num_workers

    def size(self, item: Any) -> int:
        return 1

    def max_waiting(self, num_workers: int) -> int:
        return self.recipe.prefetch_batches


@dataclass(frozen=True)
class _Draw:
    """What one draw gave: a group, or a bad record. `reader` is the state of the streamed dataset it came from."""

    group: EncodedGroup | None = None
    bad: BadRecord | None = None
    reader: dict[str, Any] | None = None


@dataclass(frozen=True)
class _Position:
    """Before which draw (and which document of its group) a batch starts, and how its sources stand there."""

    draw: int
    document: int
    counts: tuple[int, ...]
    readers: Mapping[int, Mapping[str, Any]] = field(default_factory=dict)


@dataclass(frozen=True)
class _Draws:
    """Plan of a stream with records: an item is one draw."""

    recipe: DataRecipe
    seed: int
    split: int
    position: _Position
    index_folder: Path | None
    item_name = "draw"

    @property
    def first(self) -> int:
        return self.position.draw

    def items(self, worker: int, num_workers: int) -> Iterator[_Draw]:
        encoder = DocumentEncoder(load_processor(self.recipe.processor), self.recipe.tokens_per_batch)
        sources = [self._open(number, encoder) for number in range(len(self.recipe.sources))]
        for number, (source, count) in enumerate(self.draw_order()):
            if number % num_workers == worker:
                yield sources[source].draw(count)

    def draw_order(self) -> DrawOrder:
        return DrawOrder(
            [source.weight for source in self.recipe.sources],
            seed=(self.seed, self.split),
            start=self.position.draw,
            counts=self.position.counts,
        )

    def _open(self, number: int, encoder: DocumentEncoder) -> "_NumberedDraws | _RecordDraws | _StreamedDraws":
        source = self.recipe.sources[number]
        if source.name is not None:
            return _NumberedDraws(source, encoder, seed=self.seed, split=self.split)
        if source.streaming:
            seed = (self.seed, self.split, number)
            return _StreamedDraws(
                HubStream(source, seed=seed, state=self.position.readers.get(number)), source, encoder
            )
        return _RecordDraws(self, number, encoder)

    def epoch_order(self, number: int, block_sizes: Sequence[int]) -> EpochOrder:
        source = self.recipe.sources[number]
        return EpochOrder(
            block_sizes,
            seed=(self.seed, self.split, number),
            shuffle=source.shuffle,
            held_out=source.held_out,
            evaluation=self.split == EVALUATION_SPLIT,
        )

    def source_index_folder(self, number: int) -> Path | None:
        return None if self.index_folder is None else self.index_folder / str(number)

    def size(self, item: _Draw) -> int:
        return 1 if item.group is None else item.group.num_tokens

    def max_waiting(self, num_workers: int) -> int:
        return max(1, self.recipe.prefetch_batches * self.recipe.tokens_per_batch // num_workers)


class _NumberedDraws:
    def __init__(self, source: SourceRecipe, encoder: DocumentEncoder, *, seed: int, split: int) -> None:
        self.recipe, self.encoder = source, encoder
        self.source = _numbered_source(source, seed)
        self.first = split * BATCHES_PER_SPLIT * GROUPS_PER_BATCH

    def draw(self, count: int) -> _Draw:
        return _Draw(self.encoder.encode_group(self.source.group(self.first + count), self.recipe))


class _RecordDraws:
    def __init__(self, plan: _Draws, number: int, encoder: DocumentEncoder) -> None:
        self.recipe, self.encoder = plan.recipe.sources[number], encoder
        self.records = open_records(self.recipe, plan.source_index_folder(number))
        self.order = plan.epoch_order(number, self.records.block_sizes)

    def draw(self, count: int) -> _Draw:
        block, row = self.order.locate(*divmod(count, len(self.order)))
        try:
            record = self.records.read(block, row)
            return _Draw(self.encoder.encode_record(record, self.recipe, self.records.folder(block, row)))
        except RecordError as error:
            return _Draw(bad=BadRecord(*self.records.location(block, row), error.kind, str(error)))


class _StreamedDraws:
    def __init__(self, stream: HubStream, source: SourceRecipe, encoder: DocumentEncoder) -> None:
        self.stream, self.recipe, self.encoder = stream, source, encoder

    def draw(self, count: int) -> _Draw:
        number, record = self.stream.read(count)
        state = self.stream.state()
        try:
            return _Draw(self.encoder.encode_record(record, self.recipe, self.stream.folder), reader=state)
        except RecordError as error:
            return _Draw(bad=BadRecord(self.stream.name, number, error.kind, str(error)), reader=state)


class BatchStream:
    """The batches of a recipe, in order, from the position `state` on.

    A context manager and an iterator without end; leaving the context ends the workers.

    Args:
        state: what `state()` of another stream of the same recipe and seed returned. None: the beginning.
        bad_records_path: JSONL file that lists the bad records met so far; rewritten when the stream starts.

    Raises:
        ValueError: the state does not fit the recipe's sources, a source cannot be opened.
    """

    def __init__(
        self,
        recipe: DataRecipe,
        *,
        seed: int,
        split: int = TRAINING_SPLIT,
        state: Mapping[str, Any] | None = None,
        bad_records_path: Path | None = None,
    ) -> None:
        self.recipe, self.seed, self.split = recipe, seed, split
        self._is_numbered = all(source.name is not None for source in recipe.sources)
        self._next_batch = 0
        self._position = _Position(0, 0, (0,) * len(recipe.sources))
        known: list[BadRecord] = []
        if state is not None:
            self._restore(state)
            known = [BadRecord(**record) for record in state.get("bad_records", ())]
        self.bad_records = BadRecords(recipe.max_bad_records, bad_records_path, known)
        self._useless_draws = 0
        self._lengths: list[int | None] = [None] * len(recipe.sources)
        self._saved_lengths: list[int | None] | None = None if state is None else state.get("records")
        self._carried: _Draw | None = None

    # --- position ------------------------------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        """JSON-able: where the stream stands after the last batch that was handed out."""
        if self._is_numbered:
            return {"batch": self._next_batch}
        position = self._position
        return {
            "draw": position.draw,
            "document": position.document,
            "counts": list(position.counts),
            "records": list(self._lengths),
            "readers": {str(number): dict(state) for number, state in position.readers.items()},
            "bad_records": [asdict(record) for record in self.bad_records.records],
        }

    def _restore(self, state: Mapping[str, Any]) -> None:
        if self._is_numbered:
            if "batch" not in state:
                raise ValueError("the saved position is that of other data sources: start a new run from its weights")
            self._next_batch = int(state["batch"])
            return
        if len(state.get("counts", ())) != len(self.recipe.sources):
            raise ValueError(
                f"the saved position is that of {len(state.get('counts', ()))} data sources, the recipe has "
                f"{len(self.recipe.sources)}: start a new run from its weights (model.start_from)"
            )
        readers = {int(number): reader for number, reader in state["readers"].items()}
        self._position = _Position(state["draw"], state["document"], tuple(state["counts"]), readers)

    def epochs(self) -> dict[str, float]:
        """How often each source of records whose number is known has been read, by its label."""
        return {
            source.label: count / length
            for source, count, length in zip(self.recipe.sources, self._position.counts, self._lengths)
            if length
        }

    # --- batches -------------------------------------------------------------------------------------------------

    def __enter__(self) -> "BatchStream":
        self._folder = tempfile.TemporaryDirectory(prefix="minim3-index-")
        plan: _NumberedBatches | _Draws
        if self._is_numbered:
            plan = _NumberedBatches(self.recipe, self.seed, self.split, self._next_batch)
        else:
            plan = _Draws(self.recipe, self.seed, self.split, self._position, Path(self._folder.name))
            self._check_sources(plan)
            self._order = plan.draw_order()
        workers = self.recipe.num_workers
        self._workers = WorkerProcesses(plan, workers) if workers else InlineWorkers(plan)
        self._workers.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._workers.__exit__(kind, error, trace)
        self._folder.cleanup()

    def _check_sources(self, plan: _Draws) -> None:
        """Open every source once, so that mistakes show here and workers find the indexes made."""
        for number, source in enumerate(self.recipe.sources):
            if source.name is not None or source.streaming:
                continue
            records = open_records(source, plan.source_index_folder(number))
            length = len(plan.epoch_order(number, records.block_sizes))
            if length == 0:
                part = "held-out part of source" if self.split == EVALUATION_SPLIT and source.held_out else "source"
                raise ValueError(f"{part} {source.label!r} holds no records")
            saved = self._saved_lengths[number] if self._saved_lengths is not None else length
            if saved != length:
                raise ValueError(
                    f"source {source.label!r} holds {length} records, but {saved} when the position was saved: their "
                    "order is another one. Restore the data, or start a new run from the weights (model.start_from)"
                )
            self._lengths[number] = length

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        """The next batch, waiting for it if need be.

        Raises:
            RuntimeError: a worker failed (its traceback is quoted) or was killed (its exit code is).
            BadRecordsError: more bad records than the recipe allows; the first ones are listed.
        """
        if self._is_numbered:
            batch = _from_arrays(self._workers.receive())
            self._next_batch += 1
            return batch
        return self._pack()

    def _pack(self) -> Batch:
        packing = Packing(self.recipe.tokens_per_batch)
        position = self._position
        while True:
            draw = self._carried if self._carried is not None else self._receive()
            self._carried = draw
            readers = dict(position.readers)
            if draw.reader is not None:
                readers[self._source] = draw.reader
            added = 0
            if draw.group is not None:
                added = packing.add_group(draw.group, position.document)
            if packing.full:
                self._position = replace(position, document=position.document + added, readers=readers)
                return packing.finish()
            counts = list(position.counts)
            counts[self._source] += 1
            position = _Position(position.draw + 1, 0, tuple(counts), readers)
            self._carried = None

    def _receive(self) -> _Draw:
        draw = self._workers.receive()
        self._source, _ = next(self._order)
        if draw.bad is None:
            self._useless_draws = 0
        elif not self.bad_records.add(draw.bad):
            self._useless_draws += 1
            if self._useless_draws > MAX_USELESS_DRAWS:
                raise BadRecordsError(f"there is no usable record left; the last: {draw.bad}")
        return draw


def _to_arrays(batch: Batch) -> dict[str, Any]:
    return {key: value.numpy() if isinstance(value, torch.Tensor) else value for key, value in vars(batch).items()}


def _from_arrays(message: dict[str, Any]) -> Batch:
    values: dict[str, Any] = {
        key: torch.from_numpy(value) if isinstance(value, np.ndarray) else value for key, value in message.items()
    }
    return Batch(**values)
