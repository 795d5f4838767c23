"""The records a run leaves out: counted, reported, listed in a file, and too many of them the end of it."""

import json
import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from minim3.training.records import BadRecord

logger = logging.getLogger(__name__)


class BadRecordsError(ValueError):
    """More bad records than the recipe allows."""


class BadRecords:
    """The bad records met so far, each counted once, and the file that lists them."""

    NUM_QUOTED = 5

    def __init__(self, limit: int, path: Path | None, known: Sequence[BadRecord] = ()) -> None:
        self.limit, self.path = limit, path
        self.records = list(known)
        self._places = {(record.file, record.number) for record in known}
        if path is not None and (known or path.exists()):
            path.write_text("".join(json.dumps(asdict(record)) + "\n" for record in known), encoding="utf-8")

    def add(self, record: BadRecord) -> bool:
        """Count and report a record; False for one that was counted before. BadRecordsError past the limit."""
        if (record.file, record.number) in self._places:
            return False
        self._places.add((record.file, record.number))
        self.records.append(record)
        logger.warning("bad record %d (of %d allowed) left out: %s", len(self.records), self.limit, record)
        if self.path is not None:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(asdict(record)) + "\n")
        if len(self.records) > self.limit:
            raise BadRecordsError(self._summary())
        return True

    def _summary(self) -> str:
        kinds = ", ".join(f"{count} {kind}" for kind, count in Counter(one.kind for one in self.records).most_common())
        listed = "\n".join(f"  {record}" for record in self.records[: self.NUM_QUOTED])
        where = "" if self.path is None else f"; all are in {self.path}"
        return (
            f"{len(self.records)} bad records, data.max_bad_records is {self.limit} ({kinds}). The first:\n{listed}\n"
            f"Mend the data or raise data.max_bad_records{where}"
        )
