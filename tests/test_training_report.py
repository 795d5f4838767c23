"""The page a run leaves: every loss has a curve, nothing is loaded from elsewhere, nothing breaks the markup."""

import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from minim3.training.curves import MOST_POINTS, line_chart, linear_ticks, number, thin_out
from minim3.training.report import render, write_report

RECIPE = {"output": "runs/<x>", "steps": 40, "optim": {"lr": 1e-3}}
finite = st.floats(-1e9, 1e9, allow_nan=False, allow_subnormal=False)


def step_line(step: int, **values: Any) -> dict[str, Any]:
    line = {"step": step, "next_token": 3.0 / step, "lr": 1e-3, "grad_norm": 1.0, "load_imbalance": 1.5}
    return {**line, "tokens_per_second": 900.0, "peak_share": 0.4, "skipped_steps": 0, **values}


class Titles(HTMLParser):
    """Checks that tags close in order, and collects the headings."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.titles: list[str] = []
        self.feed(page)
        assert not self.open

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        if tag not in ("meta", "circle", "line"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_startendtag(self, tag: str, attrs: Any) -> None:
        pass

    def handle_data(self, data: str) -> None:
        if self.open[-1:] == ["h2"]:
            self.titles.append(data)


def test_everything_that_was_logged_has_a_curve() -> None:
    """A new loss that the report does not know would be trained on unseen."""
    lines = [
        step_line(10, mtp=2.0, **{"mtp.depth_0": 1.9, "mtp.depth_1": 2.1}),
        {"step": 15, "skipped": "the loss is <nan>"},
        step_line(20, some_new_loss=0.5, **{"recall.layer_3": 0.8, "recall.layer_4": 0.9}),
        {"step": 20, "evaluation": {"all": 0.5, "copy": 0.25, "loss": 1.25}},
    ]
    page = render("<run>", "stopped by SIGTERM & saved", lines, RECIPE)
    titles = Titles(page).titles
    for title in ("Loss: next token", "Loss: drafts (MTP)", "Loss: some_new_loss", "Learning rate", "Gradient norm"):
        assert title in titles
    assert {"Held-out loss: next token", "Held-out documents without a mistake"} <= set(titles)
    assert "Selection recall: attention inside the chosen blocks" in titles
    assert sum(title.startswith("Throughput") for title in titles) == 2
    assert {"depth 0", "depth 1", "layer 3", "layer 4", "copy"} <= set(re.findall(r"</i>([^<]*)</li>", page))
    assert "the loss is &lt;nan&gt;" in page
    assert "stopped by SIGTERM &amp; saved" in page
    assert "runs/&lt;x&gt;" in page
    assert "&lt;run&gt;" in page


def test_the_page_stands_alone_in_dark_and_light() -> None:
    page = render("run", "finished", [step_line(1), step_line(2)], RECIPE)
    assert "://" not in page
    assert not re.search(r"<(script|link|img|iframe)|\bsrc=|@import|url\(", page)
    light, dark = page.split("@media (prefers-color-scheme: dark)")
    for colour in re.findall(r"var\((--[a-z0-9-]+)\)", page):  # each is defined for both
        assert f"{colour}:" in light
        assert f"{colour}:" in dark


@pytest.mark.parametrize("lines", [[], [step_line(1)], [{"step": 1, "skipped": "the loss is nan"}]])
def test_a_run_that_hardly_began_has_a_page(lines: list[Any]) -> None:
    """A run that diverges at once ends in a report; an empty curve must not end it in a ZeroDivisionError."""
    assert "Loss" in render("run", "gave up", lines, RECIPE) or not any("lr" in line for line in lines)


def test_the_report_is_made_of_the_files_of_the_run(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text(json.dumps(step_line(40, mtp=float("nan"))) + "\n")
    (tmp_path / "recipe.json").write_text(json.dumps(RECIPE))
    path = write_report(tmp_path, "finished after step 40")
    assert "40 of 40" in path.read_text()
    assert sorted(file.name for file in tmp_path.iterdir()) == ["metrics.jsonl", "recipe.json", "report.html"]


points = st.lists(st.tuples(st.integers(1, 10**6).map(float), st.one_of(finite, st.just(math.nan))), max_size=40)


@given(st.dictionaries(st.text(max_size=5), points, max_size=10), st.booleans(), st.booleans())
@example({"": [(1.0, 2.2250738585072014e-308)]}, False, False)
def test_any_curve_lies_inside_its_frame(series: dict[str, Any], percent: bool, from_zero: bool) -> None:
    chart = line_chart(series, percent=percent, from_zero=from_zero)
    if "<svg" not in chart:
        assert not any(math.isfinite(y) for curve in series.values() for _, y in curve)
        return
    svg = ElementTree.fromstring(re.sub(r"[\x00-\x08\x0b\x0c\x0e-\x1f￾￿]", "", chart[: chart.index("</svg>") + 6]))
    for line in svg.iter("polyline"):
        for place in line.attrib["points"].split():
            x, y = map(float, place.split(","))
            assert 62 <= x <= 538
            assert 9.9 <= y <= 220.1


@given(finite, finite)
def test_ticks_are_few_and_enclose_the_values(one: float, two: float) -> None:
    low, high = min(one, two), max(one, two)
    ticks = linear_ticks(low, high)
    assert 2 <= len(ticks) <= 9
    slack = 1e-6 * max(abs(low), abs(high), 1e-300)
    assert ticks[0] <= low + slack
    assert ticks[-1] >= high - slack
    assert ticks == sorted(set(ticks))


@given(st.integers(1, 3000))
def test_a_long_curve_keeps_its_mean_and_its_end(length: int) -> None:
    thinned = thin_out([(float(x), float(x % 7)) for x in range(length)])
    assert len(thinned) <= MOST_POINTS
    assert thinned[-1] == (length - 1, (length - 1) % 7)
    assert [x for x, _ in thinned] == sorted(x for x, _ in thinned)


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (0.25, "0.25"), (3e-5, "3e-05"), (6000, "6000"), (12000, "12k"), (1.5e6, "1.5M"), (-2e9, "-2G")],
)
def test_numbers_are_short(value: float, text: str) -> None:
    assert number(value) == text
