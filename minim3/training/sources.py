"""Where records lie: JSONL and Parquet files, and datasets of the library `datasets`.

No file is ever read whole. JSONL files are indexed once, eight bytes a record in a file that all processes map;
Parquet files are read a row group at a time, datasets through their memory-mapped Arrow files. A streamed dataset has
no index: it is read from front to back, and shuffled inside windows of a few records.

Every place is found again by number, so a position in a source is one integer (and, for a streamed dataset, the
library's own state at the start of a window).
"""

import glob
import json
import os
from collections.abc import Mapping, Sequence
from itertools import accumulate, islice
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from minim3.training.config import SourceRecipe
from minim3.training.order import Permutation
from minim3.training.records import RecordError

_SCAN_BYTES = 1 << 24


class Records(Protocol):
    """Records that can be read by number, in blocks that are best read one after the other."""

    @property
    def block_sizes(self) -> Sequence[int]: ...

    def location(self, block: int, row: int) -> tuple[str, int]:
        """The file (or dataset) of a record, and its line or row there, from 1."""
        ...

    def folder(self, block: int, row: int) -> Path:
        """What relative paths in a record are relative to."""
        ...

    def read(self, block: int, row: int) -> Any:
        """The record; RecordError when it cannot be read."""
        ...


def open_records(source: SourceRecipe, index_folder: Path | None = None) -> Records:
    """The records of a source that is not streamed.

    index_folder: where the index of JSONL files is kept; one that is there already is used.

    Raises:
        ValueError: no file, an unknown or a mixed kind of files, no records, a library that is not installed.
    """
    if source.dataset is not None:
        return HubRecords(source)
    paths = find_files(source.files)
    suffixes = {path.suffix.lower() for path in paths}
    if suffixes == {".jsonl"}:
        return JsonlRecords(paths, index_folder)
    if suffixes == {".parquet"}:
        return ParquetRecords(paths, source)
    raise ValueError(
        f"source {source.label!r} matches files of kinds {', '.join(sorted(suffixes))}; "
        "a source is .jsonl files or .parquet files: give each kind its own"
    )


def find_files(patterns: Sequence[str]) -> list[Path]:
    """Files that the paths and glob patterns name, each once, in the order of the patterns and then of names."""
    found: dict[Path, None] = {}
    for pattern in patterns:
        expanded = os.path.expanduser(pattern)
        literal = Path(expanded).is_file() or not glob.has_magic(expanded)  # a name may hold brackets
        matches = [expanded] if literal else sorted(glob.glob(expanded, recursive=True))
        paths = [Path(match) for match in matches if Path(match).is_file()]
        if not paths:
            raise ValueError(f"data file {pattern!r}: there is no such file (relative to {Path.cwd()})")
        found.update(dict.fromkeys(paths))
    return list(found)


class JsonlRecords:
    """Files with one JSON value a line; empty lines are passed over."""

    def __init__(self, paths: Sequence[Path], index_folder: Path | None = None) -> None:
        self.paths = list(paths)
        self._indexes = [_load_index(path, number, index_folder) for number, path in enumerate(self.paths)]
        self._starts = list(accumulate((len(offsets) for offsets, _ in self._indexes), initial=0))
        self.block_sizes = [self._starts[-1]]

    def _file_of(self, row: int) -> tuple[int, int]:
        number = int(np.searchsorted(self._starts, row, side="right")) - 1
        return number, row - self._starts[number]

    def location(self, block: int, row: int) -> tuple[str, int]:
        number, row = self._file_of(row)
        _, blank_lines = self._indexes[number]
        # blank_lines[k] - k lines with records stand before the k-th blank line.
        num_blank = int(np.searchsorted(blank_lines - np.arange(len(blank_lines)), row, side="right"))
        return str(self.paths[number]), row + num_blank + 1

    def folder(self, block: int, row: int) -> Path:
        return self.paths[self._file_of(row)[0]].parent

    def read(self, block: int, row: int) -> Any:
        number, row = self._file_of(row)
        with self.paths[number].open("rb") as file:
            file.seek(int(self._indexes[number][0][row]))
            line = file.readline().rstrip(b"\r\n")
        try:
            return json.loads(line)
        except (ValueError, RecursionError) as error:  # ValueError: malformed JSON or UTF-8
            raise RecordError("broken JSON", str(error)) from error


def _load_index(path: Path, number: int, folder: Path | None) -> tuple[np.ndarray, np.ndarray]:
    """Offsets of the lines that hold something, and the numbers (from 0) of those that hold nothing; int64 both."""
    if folder is None:
        return index_lines(path)
    saved = folder / f"{number}-lines.npy", folder / f"{number}-blank.npy"
    if not saved[1].exists():
        folder.mkdir(parents=True, exist_ok=True)
        for file, array in zip(saved, index_lines(path)):
            np.save(file, array)
    offsets, blank = (np.load(file, mmap_mode="r") for file in saved)
    return offsets, blank


def index_lines(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """See `_load_index`."""
    ends = []
    size = 0
    with path.open("rb") as file:
        while chunk := file.read(_SCAN_BYTES):
            ends.append(size + np.flatnonzero(np.frombuffer(chunk, dtype=np.uint8) == ord("\n")) + 1)
            size += len(chunk)
        starts = np.concatenate([np.zeros(1, dtype=np.int64), *ends])
        starts = starts[starts < size]
        lengths = np.diff(np.append(starts, size))
        blank = lengths == 1
        for line in np.flatnonzero(lengths == 2):  # "\r\n", or one character and a line end
            file.seek(int(starts[line]))
            blank[line] = not file.read(2).strip()
        if size and lengths[-1] == 1:  # one character without a line end
            file.seek(size - 1)
            blank[-1] = not file.read(1).strip()
    return starts[~blank], np.flatnonzero(blank)


class ParquetRecords:
    """Parquet files, a row group at a time; only the columns that the recipe names are read."""

    def __init__(self, paths: Sequence[Path], source: SourceRecipe) -> None:
        self._parquet = _import_parquet()
        self.paths = list(paths)
        fields = source.fields
        wanted = {fields.messages, fields.text, fields.images, fields.videos}
        self._wanted = wanted | {fields.tools, fields.thinking_mode, fields.kind}
        self._groups: list[tuple[int, int, int]] = []  # file, row group, first row in the file
        self.block_sizes: list[int] = []
        for number, path in enumerate(self.paths):
            with self._open(path) as file:
                first = 0
                for group in range(file.metadata.num_row_groups):
                    size = file.metadata.row_group(group).num_rows
                    self._groups.append((number, group, first))
                    self.block_sizes.append(size)
                    first += size
        self._cached: tuple[int, Any] = (-1, None)

    def _open(self, path: Path) -> Any:
        import pyarrow

        try:
            return self._parquet.ParquetFile(path)
        except (pyarrow.ArrowException, OSError) as error:
            raise ValueError(f"data file {str(path)!r} is not a readable Parquet file: {error}") from error

    def location(self, block: int, row: int) -> tuple[str, int]:
        number, _, first = self._groups[block]
        return str(self.paths[number]), first + row + 1

    def folder(self, block: int, row: int) -> Path:
        return self.paths[self._groups[block][0]].parent

    def read(self, block: int, row: int) -> Any:
        if self._cached[0] != block:
            number, group, _ = self._groups[block]
            with self._open(self.paths[number]) as file:
                columns = [name for name in file.schema_arrow.names if name in self._wanted]
                try:
                    self._cached = (block, file.read_row_group(group, columns=columns or None))
                except Exception as error:  # OSError and kinds of the library's own
                    path = self.paths[number]
                    raise ValueError(f"data file {str(path)!r}: row group {group} cannot be read: {error}") from error
        return self._cached[1].slice(row, 1).to_pylist()[0]


def _import_parquet() -> Any:
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise ValueError("reading Parquet files needs pyarrow: pip install pyarrow") from error
    return pyarrow.parquet


def load_dataset(source: SourceRecipe) -> Any:
    """The `datasets` object of a source: from the hub (or its cache), a folder of data files, or `save_to_disk`."""
    try:
        import datasets
    except ImportError as error:
        raise ValueError("hub datasets need the library datasets: pip install datasets") from error
    assert source.dataset is not None
    folder = Path(source.dataset).expanduser()
    try:
        if (folder / "state.json").is_file() or (folder / "dataset_dict.json").is_file():
            loaded = datasets.load_from_disk(str(folder))
            if isinstance(loaded, datasets.DatasetDict):
                if source.split not in loaded:
                    raise ValueError(f"there is no split {source.split!r}, only {', '.join(loaded)}")
                loaded = loaded[source.split]
            loaded = loaded.to_iterable_dataset() if source.streaming else loaded
        else:
            loaded = datasets.load_dataset(
                str(folder) if folder.is_dir() else source.dataset,
                source.subset,
                split=source.split,
                revision=source.revision,
                streaming=source.streaming,
            )
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise ValueError(f"dataset {source.dataset!r} cannot be loaded: {error}") from error
    return _undecoded(datasets, loaded)


def _undecoded(datasets: Any, loaded: Any) -> Any:
    """Pictures and clips as bytes or paths: the project's own decoders read them, and say which record is broken."""

    def plain(feature: Any) -> Any:
        if isinstance(feature, datasets.Image | datasets.Video):
            return type(feature)(decode=False)
        if isinstance(feature, datasets.List):
            return datasets.List(plain(feature.feature), length=feature.length)
        if isinstance(feature, Mapping):
            return {name: plain(inner) for name, inner in feature.items()}
        return feature

    if loaded.features is None:  # a stream whose columns are known only once it is read
        return loaded
    features = datasets.Features(plain(loaded.features))
    return loaded if features == loaded.features else loaded.cast(features)


def _dataset_folder(source: SourceRecipe) -> Path:
    folder = Path(source.dataset or "").expanduser()
    return folder if folder.is_dir() else Path.cwd()


class HubRecords:
    """A dataset of the library `datasets`, read by row number."""

    def __init__(self, source: SourceRecipe) -> None:
        self._dataset = load_dataset(source)
        self._name, self._folder = source.dataset or "", _dataset_folder(source)
        self.block_sizes = [len(self._dataset)]

    def location(self, block: int, row: int) -> tuple[str, int]:
        return self._name, row + 1

    def folder(self, block: int, row: int) -> Path:
        return self._folder

    def read(self, block: int, row: int) -> Any:
        return self._dataset[row]


class HubStream:
    """A streamed dataset, read by ascending position; epochs follow each other without end.

    Records are shuffled inside windows of `shuffle_window` that lie side by side, so the order is known from the state
    at the start of a window.

    Args:
        state: where another stream of the same dataset stood (`state()`).
    """

    def __init__(self, source: SourceRecipe, *, seed: Sequence[int], state: Mapping[str, Any] | None = None) -> None:
        self._dataset = load_dataset(source)
        self.name, self.folder = source.dataset or "", _dataset_folder(source)
        self._shuffle, self._size, self._seed = source.shuffle, source.shuffle_window, tuple(seed)
        self._beginning = self._dataset.state_dict()
        state = state or {"epoch": 0, "epoch_start": 0, "start": 0, "reader": None}
        self._epoch, self._epoch_start, self._start = state["epoch"], state["epoch_start"], state["start"]
        self._open(state["reader"])

    def read(self, position: int) -> tuple[int, Any]:
        """The number of the record in the stream, from 1, and the record. Positions never go back."""
        assert position >= self._start
        while position >= self._start + len(self._window):
            self._advance()
        row = position - self._start
        if self._shuffle:
            row = Permutation(len(self._window), (*self._seed, self._epoch, self._start))[row]
        return self._start + row - self._epoch_start + 1, self._window[row]

    def state(self) -> dict[str, Any]:
        """JSON-able: the start of the present window."""
        return {
            "epoch": self._epoch,
            "epoch_start": self._epoch_start,
            "start": self._start,
            "reader": self._reader_state,
        }

    def _open(self, reader_state: Any) -> None:
        """Read the window that starts where `reader_state` says, None: where the epoch does."""
        self._dataset.load_state_dict(self._beginning if reader_state is None else reader_state)
        self._reader = iter(self._dataset)
        self._reader_state = reader_state
        self._window = list(islice(self._reader, self._size))
        if not self._window:
            raise ValueError(f"dataset {self.name!r} is empty, or shorter than it was")

    def _advance(self) -> None:
        self._start += len(self._window)
        self._reader_state = self._dataset.state_dict()
        self._window = list(islice(self._reader, self._size))
        if not self._window:
            self._epoch, self._epoch_start = self._epoch + 1, self._start
            self._open(None)
