"""The stream of batches from records: nothing lost, nothing twice, and the same from wherever it goes on."""

import json
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from minim3.training import stream as stream_module
from minim3.training.config import DataRecipe, SourceRecipe
from minim3.training.data import EVALUATION_SPLIT, Batch, BatchStream, Clip, Group, Sample, evaluation_recipe
from minim3.training.workers import InlineWorkers
from tests.data_standins import chat, data_recipe, file_source, same, targets, write_jsonl, write_picture

NUM_BATCHES = 18


class Counting:
    """A numbered source: two conversations a group, which say the number of the group."""

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def group(self, index: int) -> Group:
        return Group([Sample(chat(f"{part}", f"{index}")["messages"], kind="counting") for part in range(2)])


class OneClip:
    """Two questions about a clip of ten frames, which fill five temporal patches, that is two chunks."""

    def __init__(self, seed: int) -> None:
        pass

    def group(self, index: int) -> Group:
        frames = np.random.default_rng(index).integers(0, 256, (10, 56, 56, 3), dtype=np.uint8)
        samples = [Sample(chat([{"type": "video"}], f"{part}")["messages"], video_indices=[0]) for part in range(2)]
        return Group(samples, videos=[Clip(frames, fps=2.0)])


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DataRecipe]:
    """Every kind of source at once, with pictures, clips and bad records."""
    import datasets
    import pyarrow
    import pyarrow.parquet

    folder = tmp_path_factory.mktemp("mixed")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", folder / "cache")
        datasets.disable_progress_bars()
        for index in range(3):
            write_picture(folder / f"{index}.png", index)
        media: list[Any] = [
            chat([{"type": "image"}, {"type": "text", "text": "?"}], f"picture {index}", images=[f"{index}.png"])
            for index in range(3)
        ]
        clip = [{"type": "video"}, {"type": "text", "text": "?"}]
        media += [chat(clip, "clip", videos=[["0.png", "1.png", "2.png"]]), b"{broken", {"text": ""}]
        lines = write_jsonl(folder / "media.jsonl", media)
        rows = [chat("q" * (number % 5 * 20 + 1), f"row {number}") for number in range(11)]
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), folder / "rows.parquet", row_group_size=4)
        (folder / "hub").mkdir()
        write_jsonl(folder / "hub" / "train.jsonl", [chat("h", f"hub {number}") for number in range(9)])
        yield data_recipe(
            file_source(lines),
            file_source(folder / "rows.parquet", weight=2.0),
            SourceRecipe(dataset=str(folder / "hub"), streaming=True, shuffle_window=4, weight=2.0),
            SourceRecipe("tests.test_training_data_stream:Counting", weight=2.0),
            tokens_per_batch=260,
        )


def draw(recipe: DataRecipe, count: int, state: Any = None, workers: int = 1) -> list[tuple[Batch, dict[str, Any]]]:
    """Batches and the states after them, made by `workers` workers in this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stream_module, "InlineWorkers", lambda plan: InlineWorkers(plan, workers))
        with BatchStream(recipe, seed=3, state=state) as stream:
            return [(next(stream), json.loads(json.dumps(stream.state()))) for _ in range(count)]


@pytest.fixture(scope="module")
def whole(mixed: DataRecipe) -> list[tuple[Batch, dict[str, Any]]]:
    """A run that is never stopped."""
    return draw(mixed, NUM_BATCHES)


def equal(one: list[tuple[Batch, dict[str, Any]]], two: list[tuple[Batch, dict[str, Any]]]) -> bool:
    return len(one) == len(two) and all(
        same(batch, other) and state == also for (batch, state), (other, also) in zip(one, two)
    )


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.integers(0, 4), min_size=1, max_size=4), st.integers(1, 4))
def test_a_run_stopped_anywhere_goes_on_with_the_same_batches(
    mixed: DataRecipe, whole: list[tuple[Batch, dict[str, Any]]], stretches: list[int], workers: int
) -> None:
    found: list[tuple[Batch, dict[str, Any]]] = []
    for length in [*stretches, 2]:
        length = min(length, NUM_BATCHES - len(found))
        found += draw(mixed, length, found[-1][1] if found else None, workers)
    assert equal(found, whole[: len(found)])


def test_the_stream_of_the_property_above_has_everything_in_it(whole: list[tuple[Batch, dict[str, Any]]]) -> None:
    kinds = {kind for batch, _ in whole for kind in batch.kinds}
    assert kinds == {"pictures", "clips", "text", "counting"}
    last = whole[-1][1]
    assert len(last["bad_records"]) == 2
    assert last["readers"]["2"]["epoch"] >= 1
    assert last["counts"][0] > last["records"][0]
    assert {state["document"] for _, state in whole} == {0, 1}, "no group was cut by the end of a batch"


def test_worker_processes_make_the_same_stream_whatever_they_have_in_hand(
    mixed: DataRecipe, whole: list[tuple[Batch, dict[str, Any]]]
) -> None:
    before = draw(replace(mixed, num_workers=2, prefetch_batches=3), 3)
    after = draw(replace(mixed, num_workers=1, prefetch_batches=1), 2, before[-1][1])
    assert equal(before + after, whole[:5])


def test_no_document_is_dropped_at_the_end_of_a_batch_or_of_an_epoch(tmp_path: Path) -> None:
    records = [chat("q" * (7 * number % 50), f"n{number}") for number in range(13)]
    path = write_jsonl(tmp_path / "a.jsonl", records)
    batches = [batch for batch, _ in draw(data_recipe(file_source(path, shuffle=False), tokens_per_batch=200), 12)]
    answers = [text.removeprefix("</mm:think>").removesuffix("[e~[") for batch in batches for text in targets(batch)]
    assert len(answers) > 26
    assert answers == [f"n{number % 13}" for number in range(len(answers))]
    for batch, following in pairwise(batches):
        assert batch.num_tokens <= 200 < batch.num_tokens + following.lengths[0]


def test_a_group_cut_by_the_end_of_a_batch_goes_on_with_its_next_document(
    whole: list[tuple[Batch, dict[str, Any]]],
) -> None:
    answers = [
        text for batch, _ in whole for kind, text in zip(batch.kinds, targets(batch), strict=True) if kind == "counting"
    ]
    numbers = [int(text.removeprefix("</mm:think>").removesuffix("[e~[")) for text in answers]
    assert len(numbers) > 10
    assert numbers == [place // 2 for place in range(len(numbers))]


def test_epochs_are_shuffled_without_replacement_and_counted(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [chat("q", f"n{number}") for number in range(20)])
    recipe = data_recipe(file_source(path), tokens_per_batch=400)
    with BatchStream(recipe, seed=0) as stream:
        answers = [text for _ in range(12) for text in targets(next(stream))]
        assert stream.epochs() == {str(path): pytest.approx(len(answers) / 20)}
    first, second = answers[:20], answers[20:40]
    assert len(set(first)) == len(set(second)) == 20
    assert first != second
    with BatchStream(recipe, seed=1) as other:
        assert targets(next(other)) != answers[:20][: len(targets(next(other)))]


def test_sources_are_drawn_by_weight(tmp_path: Path) -> None:
    light, heavy = (write_jsonl(tmp_path / f"{name}.jsonl", [chat("q", "a", kind=name)]) for name in "lh")
    recipe = data_recipe(file_source(light), file_source(heavy, weight=3.0), tokens_per_batch=30_000)
    (batch, _), *_ = draw(recipe, 1)
    assert len(batch.kinds) > 400
    assert abs(batch.kinds.count("h") / len(batch.kinds) - 0.75) < 0.06


def test_held_out_records_are_evaluated_on_and_never_trained_on(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [chat("q", f"n{number}") for number in range(20)])
    recipe = data_recipe(file_source(path, held_out=0.2))
    trained = {text for batch, _ in draw(recipe, 8) for text in targets(batch)}
    with BatchStream(evaluation_recipe(recipe, ()), seed=3, split=EVALUATION_SPLIT) as stream:
        evaluated = {text for _ in range(2) for text in targets(next(stream))}
    assert len(trained) == 16
    assert len(evaluated) == 4
    assert not trained & evaluated
    with pytest.raises(ValueError, match="has no held-out records to evaluate on: set its held_out"):
        evaluation_recipe(data_recipe(file_source(path)), ())
    of_its_own = evaluation_recipe(data_recipe(file_source(path)), [file_source(path, shuffle=False)])
    with BatchStream(of_its_own, seed=3, split=EVALUATION_SPLIT) as stream:
        assert targets(next(stream))[0].startswith("</mm:think>n0")


def test_a_position_is_refused_where_the_data_are_others(tmp_path: Path) -> None:
    """Going on would read some records twice and others never, without a word."""
    path = write_jsonl(tmp_path / "a.jsonl", [chat("q", "a")] * 5)
    recipe = data_recipe(file_source(path))
    ((_, state),) = draw(recipe, 1)
    with pytest.raises(ValueError, match="that of 1 data sources, the recipe has 2"):
        draw(replace(recipe, sources=recipe.sources * 2), 1, state)
    numbered = data_recipe(SourceRecipe("tests.test_training_data_stream:Counting"))
    with pytest.raises(ValueError, match="that of other data sources"):
        draw(numbered, 1, state)
    write_jsonl(path, [chat("q", "a")] * 6)
    with pytest.raises(ValueError, match="holds 6 records, but 5 when the position was saved"):
        draw(recipe, 1, state)


def test_a_source_without_records_is_refused(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [b"", b""])
    with pytest.raises(ValueError, match=r"source '.*a\.jsonl' holds no records"):
        draw(data_recipe(file_source(path)), 1)
    write_jsonl(path, [chat("q", "a")])
    recipe = data_recipe(file_source(path, held_out=0.5))
    with (
        pytest.raises(ValueError, match=r"held-out part of source '.*' holds no records"),
        BatchStream(recipe, seed=0, split=EVALUATION_SPLIT),
    ):
        pass


def test_clips_of_a_group_are_shared_like_pictures(tmp_path: Path) -> None:
    """Pocket asks several questions about one clip: its patches must stand in the batch once."""
    ((batch, _),) = draw(data_recipe(SourceRecipe("tests.test_training_data_stream:OneClip"), tokens_per_batch=500), 1)
    assert batch.video_grid_thw is not None
    assert batch.video_order is not None
    num_groups = -(-len(batch.lengths) // 2)
    assert batch.video_grid_thw.tolist() == [[4, 4, 4], [1, 4, 4]] * num_groups
    assert batch.video_order.tolist()[:4] == [0, 1, 0, 1]
    assert len(batch.video_order) == 2 * len(batch.lengths)
    assert batch.pixel_values_videos is not None
    assert batch.pixel_values_videos.shape[0] == num_groups * 80
