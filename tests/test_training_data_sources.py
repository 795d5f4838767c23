"""Orders of records, and the files and datasets they are read from."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minim3.training import sources
from minim3.training.config import SourceRecipe
from minim3.training.order import DrawOrder, EpochOrder, Permutation
from minim3.training.records import RecordError
from minim3.training.sources import HubStream, JsonlRecords, find_files, index_lines, open_records
from tests.data_standins import chat, file_source, write_jsonl, write_picture

# -- orders -----------------------------------------------------------------------------------------------------------


@given(st.integers(1, 700), st.integers(0, 2**32))
def test_a_permutation_hits_every_number_once(length: int, seed: int) -> None:
    permutation = Permutation(length, [seed])
    assert sorted(permutation[index] for index in range(length)) == list(range(length))


@pytest.mark.parametrize("length", [3, 7])
def test_permutations_of_few_records_are_spread_evenly(length: int) -> None:
    """A network on too few bits reaches some orders ten times as often as others."""
    counts = np.zeros((length, length))
    for seed in range(1000):
        permutation = Permutation(length, [seed])
        counts[permutation[0], permutation[1]] += 1
    pairs = counts[~np.eye(length, dtype=bool)]
    chi_square = ((pairs - pairs.mean()) ** 2 / pairs.mean()).sum()
    assert chi_square / (len(pairs) - 1) < 1.8


@settings(deadline=None)
@given(
    st.lists(st.integers(0, 20), min_size=1, max_size=5),
    st.sampled_from([0.0, 0.1, 0.5]),
    st.booleans(),
    st.integers(0, 3),
)
def test_an_epoch_reads_every_record_once_and_never_a_held_out_one(
    block_sizes: list[int], held_out: float, shuffle: bool, epoch: int
) -> None:
    found = {}
    for evaluation in (False, True):
        order = EpochOrder(block_sizes, seed=(1, 2), shuffle=shuffle, held_out=held_out, evaluation=evaluation)
        found[evaluation] = [order.locate(epoch, index) for index in range(len(order))]
    every = {(block, row) for block, size in enumerate(block_sizes) for row in range(size)}
    if held_out:
        assert len(found[True]) == int(sum(block_sizes) * held_out + 1e-9)
        assert sorted(found[False] + found[True]) == sorted(every)
    else:
        assert sorted(found[False]) == sorted(found[True]) == sorted(every)
    blocks = [block for block, _ in found[False]]
    starts = [block for index, block in enumerate(blocks) if index == 0 or blocks[index - 1] != block]
    assert len(starts) == len(set(starts)), "a block is left and read again"


def test_every_epoch_and_seed_has_an_order_of_its_own_but_the_same_held_out_records() -> None:
    def order(seed: int, **options: Any) -> EpochOrder:
        return EpochOrder([50], **{"seed": (seed,), "shuffle": True, "held_out": 0.2, "evaluation": False, **options})

    def rows(of: EpochOrder, epoch: int = 0) -> list[int]:
        return [of.locate(epoch, index)[1] for index in range(len(of))]

    assert len({tuple(rows(order(seed), epoch)) for seed in (0, 1) for epoch in (0, 1)}) == 4
    held_out = {tuple(sorted(rows(order(seed, evaluation=True), epoch))) for seed in (0, 1) for epoch in (0, 1)}
    assert len(held_out) == 1
    in_order = EpochOrder([3, 2], seed=(0,), shuffle=False, held_out=0.0, evaluation=False)
    assert [in_order.locate(7, index) for index in range(5)] == [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1)]


@given(st.integers(0, 3000), st.integers(0, 5))
@settings(deadline=None, max_examples=30)
def test_draws_go_on_from_any_place(start: int, seed: int) -> None:
    whole = DrawOrder([1.0, 3.0], seed=(seed,))
    for _ in range(start):
        next(whole)
    resumed = DrawOrder([1.0, 3.0], seed=(seed,), start=start, counts=tuple(whole.counts))
    assert [next(resumed) for _ in range(50)] == [next(whole) for _ in range(50)]


# -- files ------------------------------------------------------------------------------------------------------------


@given(st.lists(st.sampled_from([b"1", b"[2]", b"", b"\r", b"33\r", b" ", b"\xff"]), max_size=12), st.booleans())
@settings(deadline=None)
def test_lines_are_found_and_numbered_whatever_ends_them(lines: list[bytes], ended: bool) -> None:
    import tempfile

    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(sources, "_SCAN_BYTES", 3)  # chunks that end in the middle of lines
        path = Path(folder) / "a.jsonl"
        path.write_bytes(b"\n".join(lines) + (b"\n" if ended else b""))
        written = [(number, line) for number, line in enumerate(path.read_bytes().split(b"\n"), start=1)]
        expected = [(number, line.rstrip(b"\r")) for number, line in written if line.strip()]
        records = JsonlRecords([path])
        found = []
        for row in range(records.block_sizes[0]):
            number = records.location(0, row)[1]
            try:
                found.append((number, records.read(0, row)))
            except RecordError:
                found.append((number, None))
        values = {b"1": 1, b"[2]": [2], b"33": 33}
        assert found == [(number, values.get(line)) for number, line in expected]


def test_an_index_on_disk_is_the_index(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [1, b"", 2, 3])
    made, mapped = (JsonlRecords([path], tmp_path / "index") for _ in range(2))
    for records in (made, mapped):
        assert [records.read(0, row) for row in range(3)] == [1, 2, 3]
        assert [records.location(0, row)[1] for row in range(3)] == [1, 3, 4]
    assert isinstance(mapped._indexes[0][0], np.memmap)
    assert index_lines(path)[0].dtype == np.int64


def test_patterns_name_files_once_and_in_order(tmp_path: Path) -> None:
    for name in ("b.jsonl", "a.jsonl", "c.jsonl"):
        write_jsonl(tmp_path / name, [name])
    found = find_files([str(tmp_path / "c.jsonl"), str(tmp_path / "*.jsonl")])
    assert [path.name for path in found] == ["c.jsonl", "a.jsonl", "b.jsonl"]
    write_jsonl(tmp_path / "[1] e.jsonl", ["e"])
    assert [path.name for path in find_files([str(tmp_path / "[1] e.jsonl")])] == ["[1] e.jsonl"]
    with pytest.raises(ValueError, match=r"there is no such file"):
        find_files(["~nobody-of-this-name/a.jsonl"])
    with pytest.raises(ValueError, match=r"data file '.*d\*\.jsonl': there is no such file"):
        find_files([str(tmp_path / "d*.jsonl")])
    (tmp_path / "x.csv").write_text("a")
    with pytest.raises(ValueError, match=r"kinds \.csv, \.jsonl; a source is \.jsonl files or \.parquet files"):
        open_records(file_source(tmp_path / "x.csv", tmp_path / "a.jsonl"))


def test_relative_paths_and_lines_are_those_of_the_file_a_record_is_in(tmp_path: Path) -> None:
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    one = write_jsonl(tmp_path / "one" / "a.jsonl", [1, 2])
    two = write_jsonl(tmp_path / "two" / "a.jsonl", [3])
    records = JsonlRecords([one, two])
    assert [records.location(0, row) for row in range(3)] == [(str(one), 1), (str(one), 2), (str(two), 1)]
    assert [records.folder(0, row).name for row in range(3)] == ["one", "one", "two"]
    assert [records.read(0, row) for row in range(3)] == [1, 2, 3]


def test_parquet_is_read_a_row_group_at_a_time_and_only_the_columns_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import pyarrow
    import pyarrow.parquet

    rows = [{**chat("q", f"a{number}"), "images": [{"bytes": b"x", "path": None}], "other": "y"} for number in range(7)]
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=3)
    records = open_records(file_source(path))
    assert records.block_sizes == [3, 3, 1]
    read, original = [], pyarrow.parquet.ParquetFile.read_row_group
    monkeypatch.setattr(
        pyarrow.parquet.ParquetFile,
        "read_row_group",
        lambda self, group, **options: read.append(group) or original(self, group, **options),
    )
    assert [records.read(1, row)["messages"][1]["content"] for row in range(3)] == ["a3", "a4", "a5"]
    assert records.read(2, 0) == {name: rows[6][name] for name in ("messages", "images")}
    assert read == [1, 2]
    assert records.location(1, 2) == (str(path), 6)
    (tmp_path / "b.parquet").write_bytes(b"no")
    with pytest.raises(ValueError, match=r"b\.parquet' is not a readable Parquet file"):
        open_records(file_source(tmp_path / "b.parquet"))


# -- datasets ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def dataset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A folder as it lies on the hub: 25 records in two files."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    datasets.disable_progress_bars()
    folder = tmp_path / "dataset"
    (folder / "data").mkdir(parents=True)
    for name, numbers in (("train-0", range(13)), ("train-1", range(13, 25))):
        write_jsonl(folder / "data" / f"{name}.jsonl", [{**chat("q", f"a{n}"), "number": n} for n in numbers])
    return str(folder)


def test_a_dataset_is_read_by_row_from_its_folder_or_as_saved(dataset: str, tmp_path: Path) -> None:
    import datasets

    records = open_records(SourceRecipe(dataset=dataset))
    assert records.block_sizes == [25]
    assert [records.read(0, row)["number"] for row in (0, 24, 13)] == [0, 24, 13]
    assert records.location(0, 13) == (dataset, 14)
    rows = [{"text": "a", "images": [str(write_picture(tmp_path / "a.png"))]}]
    features = datasets.Features({"text": datasets.Value("string"), "images": datasets.List(datasets.Image())})
    saved = datasets.DatasetDict({"train": datasets.Dataset.from_list(rows, features=features)})
    saved.save_to_disk(tmp_path / "saved")
    records = open_records(SourceRecipe(dataset=str(tmp_path / "saved")))
    assert records.read(0, 0)["images"][0].keys() == {"bytes", "path"}  # left to the project's own decoders
    with pytest.raises(ValueError, match="no split 'test', only train"):
        open_records(SourceRecipe(dataset=str(tmp_path / "saved"), split="test"))
    with pytest.raises(ValueError, match=r"dataset '.*nowhere' cannot be loaded"):
        open_records(SourceRecipe(dataset=str(tmp_path / "nowhere")))


def test_a_streamed_dataset_gives_every_record_once_an_epoch_and_goes_on_from_any_state(dataset: str) -> None:
    recipe = SourceRecipe(dataset=dataset, streaming=True, shuffle_window=10)
    stream = HubStream(recipe, seed=(1,))
    numbers, states = [], []
    for position in range(60):
        number, record = stream.read(position)
        assert number == record["number"] + 1
        numbers.append(record["number"])
        states.append(json.loads(json.dumps(stream.state())))
    assert sorted(numbers[:25]) == sorted(numbers[25:50]) == list(range(25))
    assert numbers[:25] != numbers[25:50]
    assert numbers[:10] != list(range(10))
    for position in (0, 3, 9, 10, 24, 25, 37, 49):
        resumed = HubStream(recipe, seed=(1,), state=states[position])
        assert [resumed.read(later)[1]["number"] for later in range(position, 60)] == numbers[position:]
    plain = HubStream(SourceRecipe(dataset=dataset, streaming=True, shuffle=False), seed=(1,))
    assert [plain.read(position)[1]["number"] for position in range(26)] == [*range(25), 0]
