"""How every benchmark reports: claims with their bars, as a table and as JSON, with the machine in words."""

import argparse
import json
import os
import platform
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table


def machine() -> str:
    """Cores, processor, memory and torch version of this machine, in words."""
    cpu = platform.processor() or platform.machine()
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else ():
        if line.startswith("model name"):
            cpu = line.split(":", 1)[1].strip()
            break
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return f"{os.cpu_count()} cores of {cpu}, {memory:.0f} GiB, torch {torch.__version__.split('+')[0]}"


@dataclass(frozen=True)
class Claim:
    """One measured sentence. `bar` is the least value that passes; None for a figure that is only reported."""

    claim: str
    bar: float | None
    measured: float
    unit: str

    def row(self) -> dict[str, object]:
        passed = None if self.bar is None else self.measured >= self.bar
        return {**asdict(self), "pass": passed, "machine": machine()}


def arguments(description: str) -> argparse.ArgumentParser:
    """A parser with the option that every script takes."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--json", type=Path, help="write the claims as a JSON list to this file")
    return parser


def publish(claims: list[Claim], path: Path | None) -> None:
    """Print the claims as a table; write them as JSON if a path is given."""
    rows = [claim.row() for claim in claims]
    print_table(rows)
    if path is not None:
        path.write_text(json.dumps(rows, indent=1) + "\n")


def print_table(rows: list[dict[str, object]]) -> None:
    table = Table("claim", "bar", "measured", "unit", "pass")
    for row in rows:
        bar = "" if row["bar"] is None else f"{row['bar']:g}"
        verdict = {True: "yes", False: "NO", None: ""}[row["pass"]]  # type: ignore[index]
        table.add_row(str(row["claim"]), bar, f"{row['measured']:.3g}", str(row["unit"]), verdict)
    Console(width=140).print(table)
    print(machine())
