"""How every benchmark reports: claims with their bars, as a table and as JSON, with the machine in words."""

import argparse
import json
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from minim3.evaluation.report import machine


@dataclass(frozen=True)
class Claim:
    """One measured sentence. `bar` is the least value that passes, or with `at_most` the largest; None for a figure
    that is only reported."""

    claim: str
    bar: float | None
    measured: float
    unit: str
    at_most: bool = False

    def row(self) -> dict[str, object]:
        passed = None
        if self.bar is not None:
            passed = self.measured <= self.bar if self.at_most else self.measured >= self.bar
        row = {name: value for name, value in asdict(self).items() if name != "at_most"}
        return {**row, "pass": passed, "machine": machine()}


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


def alternate(sides: Mapping[str, Callable[[], object]], rounds: int, clock: str = "wall") -> dict[str, list[float]]:
    """Seconds of each side, which take turns; "cpu" counts processor time, for one thread on a machine shared."""
    now = {"wall": time.perf_counter, "cpu": time.process_time}[clock]
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(rounds):
        for name, run in sides.items():
            start = now()
            run()
            seconds[name].append(now() - start)
    return seconds


def ratio(base: Sequence[float], ours: Sequence[float]) -> float:
    """How many times faster `ours` is: the median over the rounds, each paired with its own."""
    return statistics.median(a / b for a, b in zip(base, ours))


PRODUCT_FLOPS = 2 * 2048**3


def product() -> Callable[[], object]:
    """The machine's own ceiling for arithmetic, a side to alternate with: an fp32 product of 2048 x 2048."""
    a, b, out = torch.randn(3, 2048, 2048).unbind()
    return lambda: torch.mm(a, b, out=out)


def share_of_products(flops: float, ours: Sequence[float], products: Sequence[float]) -> float:
    """Percentage of the rate of `product` that `flops` in the seconds of `ours` reach, each round with its own."""
    return statistics.median(100 * flops / a / (PRODUCT_FLOPS / b) for a, b in zip(ours, products))


def copy_rate(clock: str = "wall") -> float:
    """The machine's own ceiling for memory: bytes/s read and written by a copy of 512 MiB, the best of five."""
    a, b = torch.zeros(2, 1 << 27).unbind()
    return 2 * a.nbytes / min(alternate({"": lambda: b.copy_(a)}, 6, clock)[""][1:])


def plot_lines(path: Path, title: str, ylabel: str, lines: Mapping[str, Mapping[int, float]]) -> None:
    """A PNG of values over lengths, both axes logarithmic: one line a side, its values written at the points."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.2), dpi=120)
    for name, values in lines.items():
        (line,) = axes.plot(list(values), list(values.values()), marker="o", label=name)
        for x, y in values.items():
            axes.annotate(f"{y:.3g}", (x, y), textcoords="offset points", xytext=(0, 6), fontsize=7,
                          color=line.get_color(), ha="center")  # fmt: skip
    ticks = sorted({x for values in lines.values() for x in values})
    axes.set(xscale="log", yscale="log", xlabel="tokens", ylabel=ylabel)
    axes.set_title(title, fontsize=10)
    axes.set_xticks(ticks, [f"{x // 1024}K" if x >= 1024 else str(x) for x in ticks])
    axes.minorticks_off()
    axes.margins(0.08, 0.12)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figure.text(0.99, 0.01, machine(), ha="right", fontsize=6, color="gray")
    figure.tight_layout()
    figure.savefig(path)
    pyplot.close(figure)
