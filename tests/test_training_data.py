"""Packing and the worker processes."""

import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from minim3.training.config import DataRecipe, SourceRecipe
from minim3.training.data import (
    EVALUATION_SPLIT,
    IGNORED,
    TRAINING_SPLIT,
    Batch,
    BatchBuilder,
    BatchStream,
    Group,
    Sample,
    align_labels,
)


@pytest.fixture(autouse=True)
def standins(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parent))


def recipe(**options: Any) -> DataRecipe:
    source = SourceRecipe("training_standins:ToySource", options=options)
    return DataRecipe("training_standins:ToyProcessor", (source,), tokens_per_batch=160, prefetch_batches=2)


def builder(split: int = TRAINING_SPLIT, seed: int = 0, **options: Any) -> BatchBuilder:
    data = recipe(**options)
    return BatchBuilder(data, data.sources, seed=seed, split=split)


def same(one: Batch, two: Batch) -> bool:
    return all(
        torch.equal(value, vars(two)[name]) if isinstance(value, torch.Tensor) else value == vars(two)[name]
        for name, value in vars(one).items()
    )


@given(st.lists(st.tuples(st.integers(0, 99), st.booleans()), min_size=1, max_size=30))
def test_labels_are_the_next_token_where_it_is_a_target(pairs: list[tuple[int, bool]]) -> None:
    ids, mask = [token for token, _ in pairs], [target for _, target in pairs]
    input_ids, labels = align_labels(ids, mask)
    assert input_ids.tolist() == ids
    for place, label in enumerate(labels.tolist()):
        has_target = place + 1 < len(ids) and mask[place + 1]
        assert label == (ids[place + 1] if has_target else IGNORED)


def test_a_mask_of_another_length_is_refused() -> None:
    with pytest.raises(ValueError, match="3 token ids but 2 places"):
        align_labels([1, 2, 3], [True, False])


def test_a_batch_holds_whole_documents_within_its_budget() -> None:
    from training_standins import ASSISTANT, END, START

    batch = builder().build(0)
    assert sum(batch.lengths) == batch.num_tokens <= 160
    assert len(batch.lengths) == len(batch.kinds)
    for ids, labels in zip(batch.input_ids.split(batch.lengths), batch.labels.split(batch.lengths)):
        assert ids[0] == START
        assert ids[-1] == END
        assert labels[-1] == IGNORED  # no target reaches into the next document
        answer = ids.tolist().index(ASSISTANT)
        assert labels[answer:-1].tolist() == ids[answer + 1 :].tolist()
        assert (labels[:answer] == IGNORED).all()


def test_documents_of_a_group_show_the_picture_of_their_group() -> None:
    # An off-by-one in image_order would train every answer on its neighbour's picture.
    from training_standins import IMAGE

    batch = builder().build(1)
    assert batch.pixel_values is not None
    assert batch.image_order is not None
    assert batch.image_grid_thw is not None
    patches = batch.pixel_values.split(batch.image_grid_thw.prod(-1).tolist())
    shown = iter(batch.image_order.tolist())
    for ids, labels in zip(batch.input_ids.split(batch.lengths), batch.labels.split(batch.lengths)):
        if (ids == IMAGE).any():
            level = float(patches[next(shown)][0, 0] * 0.26862954 + 0.48145466) * 255  # CLIP's mean and deviation
            answer = labels[labels != IGNORED][0]
            assert round(level) == 60 * answer
    assert next(shown, None) is None
    assert len(set(batch.image_order.tolist())) < len(batch.image_order), "no picture was shared: nothing was tested"


def test_a_batch_depends_on_its_number_alone() -> None:
    forward, backward = builder(), builder()
    batches = [forward.build(index) for index in range(3)]
    for index in (2, 0, 1):
        assert same(backward.build(index), batches[index])
    assert not same(batches[0], batches[1])
    assert not same(batches[0], builder(seed=1).build(0))


def test_evaluation_never_sees_training_batches() -> None:
    training, evaluation = builder(), builder(EVALUATION_SPLIT)
    assert not any(same(training.build(one), evaluation.build(two)) for one in range(3) for two in range(3))


def test_a_document_longer_than_the_budget_is_an_error_with_both_numbers() -> None:
    data = replace(recipe(), tokens_per_batch=4)
    with pytest.raises(ValueError, match=r"document of \d+ tokens .* data.tokens_per_batch = 4"):
        BatchBuilder(data, data.sources, seed=0, split=0).build(0)


def test_sources_are_drawn_by_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    import training_standins

    class Constant:
        def __init__(self, seed: int, kind: str) -> None:
            self.kind = kind

        def group(self, index: int) -> Group:
            return Group([Sample(training_standins.conversation("1", "2"), kind=self.kind)])

    monkeypatch.setattr(training_standins, "Constant", Constant, raising=False)
    sources = tuple(SourceRecipe("training_standins:Constant", weight, {"kind": str(weight)}) for weight in (1.0, 3.0))
    data = DataRecipe("training_standins:ToyProcessor", sources, tokens_per_batch=6000)
    kinds = BatchBuilder(data, sources, seed=0, split=0).build(0).kinds
    assert len(kinds) > 800
    assert abs(np.mean([kind == "3.0" for kind in kinds]) - 0.75) < 0.05


def test_workers_deliver_the_batches_in_order_from_any_start() -> None:
    data = replace(recipe(), num_workers=2)
    with BatchStream(data, seed=5, state={"batch": 3}) as stream:
        received = [next(stream) for _ in range(4)]
        assert stream.state() == {"batch": 7}
    expected = BatchBuilder(data, data.sources, seed=5, split=TRAINING_SPLIT)
    assert all(same(batch, expected.build(3 + offset)) for offset, batch in enumerate(received))


@pytest.fixture
def impatient() -> Iterator[None]:
    started = time.monotonic()
    yield
    assert time.monotonic() - started < 60, "the trainer waited for a worker that was gone"


def test_an_error_in_a_worker_reaches_the_trainer(impatient: None) -> None:
    # Group 2**20 + 1 is the second of batch 1: batch 0 must still arrive, then the worker's own traceback.
    with BatchStream(recipe(fail_at=2**20 + 1), seed=0) as stream:
        next(stream)
        with pytest.raises(RuntimeError, match=r"(?s)failed at batch 1.*LookupError: the toy source was told to fail"):
            next(stream)


def test_a_killed_worker_is_reported_and_not_waited_for(impatient: None) -> None:
    with BatchStream(recipe(die_at=1), seed=0) as stream, pytest.raises(RuntimeError, match="died with exit code -9"):
        next(stream)
