"""What tasks measure, in one shape: rows for a table and for the project's benchmark JSON."""

import math
import os
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch


@dataclass(frozen=True)
class Share:
    """`right` out of `num`."""

    right: int
    num: int

    @property
    def percent(self) -> float:
        return 100 * self.right / self.num if self.num else math.nan

    @property
    def standard_error(self) -> float | None:
        """Of the percentage: sqrt(p (1 - p) / (n - 1)), the sample's deviation over sqrt(n). None for one sample."""
        if self.num < 2:
            return None
        share = self.right / self.num
        return 100 * math.sqrt(share * (1 - share) / (self.num - 1))


@dataclass(frozen=True)
class Measure:
    """One figure. `num` is what it is a mean over; standard_error is in the same unit."""

    name: str
    value: float
    unit: str
    num: int | None = None
    standard_error: float | None = None
    bar: float | None = None
    passed: bool | None = None

    @classmethod
    def of(cls, name: str, share: Share) -> "Measure":
        return cls(name, share.percent, "%", share.num, share.standard_error)


@dataclass(frozen=True)
class TaskResult:
    """The measures of one task; `table` replaces their rows in print where a task has a better form."""

    task: str
    measures: tuple[Measure, ...]
    table: str | None = None
    notes: tuple[str, ...] = ()

    def lines(self) -> list[str]:
        """For a person."""
        if self.table is not None:
            lines = self.table.splitlines()
        else:
            rows = [_cells(measure) for measure in self.measures]
            widths = [max(map(len, column)) for column in zip(*rows)] if rows else []
            lines = [
                f"{name:<{widths[0]}}  {value:>{widths[1]}}  {error:<{widths[2]}}  {of}".rstrip()
                for name, value, error, of in rows
            ]
        return [self.task, *(f"  {line}" for line in (*lines, *self.notes))]

    def rows(self) -> list[dict[str, Any]]:
        """Claims as the project's benchmarks write them, with the number of samples and the standard error beside."""
        return [
            {
                "claim": f"{self.task}: {measure.name}",
                "bar": measure.bar,
                "measured": measure.value if math.isfinite(measure.value) else None,
                "unit": measure.unit,
                "pass": measure.passed,
                "machine": machine(),
                "num": measure.num,
                "standard_error": measure.standard_error,
            }
            for measure in self.measures
        ]


def _cells(measure: Measure) -> tuple[str, str, str, str]:
    percent = measure.unit == "%"
    value = f"{measure.value:.2f}%" if percent else f"{measure.value:.6g} {measure.unit}".rstrip()
    error = ""
    if measure.standard_error is not None:
        error = f"± {measure.standard_error:.2f}%" if percent else f"± {measure.standard_error:.3g}"
    return measure.name, value, error, "" if measure.num is None else f"of {measure.num:,}"


def grid(corner: str, columns: Sequence[str], rows: Sequence[tuple[str, Sequence[str]]]) -> str:
    """A table as text: names on the left, cells on the right."""
    cells = [(corner, *columns), *((name, *values) for name, values in rows)]
    widths = [max(map(len, column)) for column in zip(*cells)]
    return "\n".join(
        "  ".join([row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:]))])
        for row in cells
    )


def machine() -> str:
    """Cores, processor, memory and torch version of this machine, in words."""
    cpu = platform.processor() or platform.machine()
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else ():
        if line.startswith("model name"):
            cpu = line.split(":", 1)[1].strip()
            break
    words = [f"{os.cpu_count()} cores of {cpu}"]
    if hasattr(os, "sysconf"):
        words.append(f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 2**30:.0f} GiB")
    return ", ".join([*words, f"torch {torch.__version__.split('+')[0]}"])
