"""`report.html`: a run in one page, from the files of its folder. No scripts, nothing loaded from elsewhere."""

import json
import os
import platform
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

import torch
import yaml

import minim3
from minim3.training.curves import Series, line_chart, number
from minim3.training.progress import METRICS

REPORT = "report.html"
# What the log holds beside losses. Everything else that is a number is a loss, and gets a chart of its own.
SPEED = ("tokens_per_second", "peak_share", "step_seconds", "wait_seconds", "elapsed_seconds")
STEPS = ("step", "lr", "grad_norm", "load_imbalance", "skipped_steps", "answers", "draft")
TITLES = {
    "next_token": "Loss: next token",
    "mtp": "Loss: drafts (MTP)",
    "indexer_kl": "Loss: indexer alignment (KL)",
    "router_aux": "Loss: router balance",
    "z_loss": "Loss: size of the logits (z)",
}
_LIGHT = ("#2563c9", "#c2410c", "#15803d", "#9333a8", "#a16207", "#0e7490", "#be185d", "#57534e")
_DARK = ("#7aa8ff", "#ff9f6b", "#67d391", "#d79bf0", "#e8c35a", "#5fd0e0", "#ff8fb8", "#b8b2a9")
_STYLE = """
:root { color-scheme: light dark; --page: #fff; --text: #1c1d20; --faint: #666a73; --line: #e3e5e9; --panel: #f8f9fa;
        LIGHT }
@media (prefers-color-scheme: dark) {
  :root { --page: #15171b; --text: #e6e7ea; --faint: #9a9fa9; --line: #2e323a; --panel: #1c1f25; DARK }
}
body { margin: 0 auto; max-width: 1200px; padding: 24px; background: var(--page); color: var(--text);
       font: 15px/1.5 system-ui, sans-serif; }
h1 { font-size: 24px; margin: 0; } h2 { font-size: 15px; margin: 0 0 8px; }
.status { color: var(--faint); margin: 4px 0 20px; }
dl { display: grid; grid-template-columns: repeat(auto-fill, minmax(170px, 1fr)); gap: 12px; margin: 0 0 24px; }
dt { color: var(--faint); font-size: 13px; } dd { margin: 0; font-size: 18px; }
main { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 460px), 1fr)); gap: 16px; }
section { background: var(--panel); border: 1px solid var(--line); border-radius: 8px; padding: 14px; min-width: 0; }
svg { width: 100%; height: auto; display: block; } svg text { fill: var(--faint); font-size: 11px; }
.grid { stroke: var(--line); } polyline { fill: none; stroke-width: 1.6; stroke-linejoin: round; }
.legend { list-style: none; display: flex; flex-wrap: wrap; gap: 4px 14px; margin: 8px 0 0; padding: 0;
          font-size: 13px; }
.legend i { display: inline-block; width: 16px; margin-right: 6px; vertical-align: middle;
            border-top: 3px solid currentColor; } .legend .dashed { border-top-style: dashed; }
h2.table { margin-top: 24px; } table { border-collapse: collapse; }
td, th { text-align: left; padding: 3px 18px 3px 0; vertical-align: top; }
details { margin-top: 24px; } pre { overflow-x: auto; background: var(--panel); padding: 14px; font-size: 13px; }
.empty { color: var(--faint); }
"""


def write_report(output: Path, status: str) -> Path:
    """Write `output/report.html` from `metrics.jsonl` and `recipe.json`; `status` says how the run ended."""
    lines = [json.loads(line) for line in (output / METRICS).read_text(encoding="utf-8").splitlines()]
    recipe = json.loads((output / "recipe.json").read_text(encoding="utf-8"))
    path = output / REPORT
    aside = path.with_suffix(".html.partial")
    aside.write_text(render(output.name or str(output), status, lines, recipe), encoding="utf-8")
    os.replace(aside, path)
    return path


def render(name: str, status: str, lines: Sequence[Mapping[str, Any]], recipe: Mapping[str, Any]) -> str:
    """The page. `lines` are those of `metrics.jsonl`: steps, evaluations and skipped steps."""
    steps = [line for line in lines if "lr" in line]
    evaluations = [line for line in lines if "evaluation" in line]
    skipped = [line for line in lines if "skipped" in line]
    charts = [chart.section() for chart in (*_training_charts(steps), *_evaluation_charts(evaluations))]
    plain = yaml.safe_dump(dict(recipe), sort_keys=False, width=110)
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(name)}</title><style>{_style()}</style></head><body>\n"
        f'<h1>{escape(name)}</h1><p class="status">{escape(status)}</p>\n'
        f"<dl>{_summary(steps, evaluations, skipped, recipe)}</dl>\n"
        "<main>\n" + "\n".join(charts) + "\n</main>\n" + _skipped_table(skipped)
        + f"<details><summary>Recipe</summary><pre>{escape(plain)}</pre></details>\n</body></html>\n"
    )


def _style() -> str:
    variables = [
        " ".join(f"--series-{place}: {colour};" for place, colour in enumerate(colours)) for colours in (_LIGHT, _DARK)
    ]
    return _STYLE.replace("LIGHT", variables[0]).replace("DARK", variables[1])


@dataclass(frozen=True)
class _Chart:
    title: str
    series: Mapping[str, Series]
    percent: bool = False
    from_zero: bool = False

    def section(self) -> str:
        svg = line_chart(self.series, percent=self.percent, from_zero=self.from_zero)
        return f"<section><h2>{escape(self.title)}</h2>{svg}</section>"


def _training_charts(steps: Sequence[Mapping[str, Any]]) -> list[_Chart]:
    losses: dict[str, dict[str, Series]] = {}
    recall: dict[str, Series] = {}
    for name in dict.fromkeys(name for line in steps for name, value in line.items() if isinstance(value, int | float)):
        if name in SPEED or name in STEPS:
            continue
        group, dot, member = name.partition(".")
        if group == "recall":
            recall[member.replace("_", " ")] = _series(steps, name)
        else:  # mtp.depth_0 goes with mtp
            losses.setdefault(group, {})[member.replace("_", " ") if dot else name] = _series(steps, name)
    charts = [_Chart(TITLES.get(name, f"Loss: {name}"), series) for name, series in losses.items()]
    if recall:
        charts.append(_Chart("Selection recall: attention inside the chosen blocks", recall, percent=True))
    shares = {"documents without a mistake": _series(steps, "answers"), "drafts right": _series(steps, "draft")}
    right = {title: points for title, points in shares.items() if points}
    charts.append(_Chart("Training documents", right, percent=True))
    for title, name in (("Learning rate", "lr"), ("Gradient norm", "grad_norm")):
        charts.append(_Chart(title, {name: _series(steps, name)}))
    load = _series(steps, "load_imbalance")
    if any(value != 1 for _, value in load):  # a model without experts has nothing to balance
        charts.append(_Chart("Load of the busiest expert, over the mean", {"load": load}))
    speed, share = _series(steps, "tokens_per_second"), _series(steps, "peak_share")
    charts.append(_Chart("Throughput: tokens per second", {"tokens per second": speed}, from_zero=True))
    charts.append(_Chart("Throughput: share of the machine's peak", {"share": share}, percent=True, from_zero=True))
    return charts


def _evaluation_charts(evaluations: Sequence[Mapping[str, Any]]) -> list[_Chart]:
    scores: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for line in evaluations:
        for name, value in line["evaluation"].items():
            scores[name].append((line["step"], value))
    loss = scores.pop("loss", None)
    charts = [_Chart("Held-out loss: next token", {"loss": loss})] if loss else []
    if scores:
        charts.append(_Chart("Held-out documents without a mistake", scores, percent=True))
    return charts


def _series(lines: Sequence[Mapping[str, Any]], name: str) -> list[tuple[float, float]]:
    return [(line["step"], line[name]) for line in lines if name in line]


def _summary(
    steps: Sequence[Mapping[str, Any]], evaluations: Sequence[Mapping[str, Any]], skipped: Sequence[Any],
    recipe: Mapping[str, Any],
) -> str:  # fmt: skip
    last: Mapping[str, Any] = steps[-1] if steps else {}
    facts = {"steps": f"{last.get('step', 0):,} of {recipe['steps']:,}"}
    if "next_token" in last:
        facts["next-token loss"] = f"{last['next_token']:.4f}"
    if evaluations:
        facts["held-out loss"] = f"{evaluations[-1]['evaluation']['loss']:.4f}"
        facts["held-out without a mistake"] = f"{evaluations[-1]['evaluation']['all']:.1%}"
    if "tokens_per_second" in last:
        facts["tokens per second"] = number(last["tokens_per_second"])
        facts["share of the peak"] = f"{last['peak_share']:.0%}"
    facts["skipped steps"] = str(len(skipped))
    facts["software"] = f"minim3 {minim3.__version__}, torch {torch.__version__}, {platform.machine()}"
    return "".join(f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>" for name, value in facts.items())


def _skipped_table(skipped: Sequence[Mapping[str, Any]], most: int = 50) -> str:
    if not skipped:
        return ""
    rows = "".join(f"<tr><td>{line['step']:,}</td><td>{escape(line['skipped'])}</td></tr>" for line in skipped[-most:])
    which = f", the last {most} of {len(skipped)}" if len(skipped) > most else ""
    return f'<h2 class="table">Skipped steps{which}</h2><table><tr><th>step</th><th>why</th></tr>{rows}</table>\n'
