"""An inspection as one HTML file: text, pictures, styles and script inside, nothing loaded from anywhere."""

import base64
import hashlib
import html
import json
import os
import re
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path

from minim3.inspection.data import Inspection

VIEW_SCRIPTS = ("elements.js", "charts.js", "tokens.js", "inspect.js")
"""The look-inside view, in the order in which its files need each other."""

_TITLE_CHARACTERS = 80


def static_text(name: str) -> str:
    """The text of a file in `static/`: the look-inside view and the theme it stands in."""
    return (files("minim3.inspection") / "static" / name).read_text(encoding="utf-8")


def render_report(inspection: Inspection, title: str = "") -> str:
    """The HTML of a standalone report. title: what it is about, the prompt for example; shortened."""
    css = "".join(static_text(name) for name in ("theme.css", "inspect.css", "report.css"))
    js = "".join(static_text(name) for name in (*VIEW_SCRIPTS, "report.js"))
    policy = (
        f"default-src 'none'; img-src data:; style-src '{content_hash(css)}'; script-src '{content_hash(js)}'; "
        "base-uri 'none'; form-action 'none'"
    )
    heading = " ".join(title.split()) or "Inside an answer"
    if len(heading) > _TITLE_CHARACTERS:
        heading = heading[: _TITLE_CHARACTERS - 1] + "…"
    subtitle = (
        f"{inspection.model or 'The model'} · {inspection.num_prompt_tokens} tokens of prompt, "
        f"{inspection.num_answer_tokens} of answer · {len(inspection.layers)} layers · minim3 inspect"
    )
    parts = {
        "policy": html.escape(policy),
        "title": html.escape(heading),
        "subtitle": html.escape(subtitle),
        "css": css,
        "js": js,
        "data": script_json(inspection.to_dict()),
    }
    return fill_places(static_text("report.html"), parts)


def write_report(inspection: Inspection, path: str | Path, title: str = "") -> Path:
    """Write the report (a name ending in .html), or the inspection itself (.json), whole or not at all.

    Raises:
        ValueError: another ending.
    """
    target = Path(path)
    if target.suffix.lower() == ".json":
        text = json.dumps(inspection.to_dict(), ensure_ascii=False, separators=(",", ":")) + "\n"
    elif target.suffix.lower() in (".html", ".htm"):
        text = render_report(inspection, title)
    else:
        raise ValueError(f"a report is written to FILE.html or FILE.json, not to {str(target)!r}")
    partial = target.with_name(f".{target.name}.{os.getpid()}.partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(target)
    return target


def fill_places(page: str, parts: Mapping[str, str]) -> str:
    """`page` with each `{{name}}` replaced by its part, which is not searched for further places."""
    return re.sub(r"\{\{(\w+)\}\}", lambda place: parts[place[1]], page)


def content_hash(text: str) -> str:
    """What a Content-Security-Policy calls an inline script or style of this text by."""
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def script_json(value: object) -> str:
    """JSON that can stand inside a <script> element: no character of it can end the element or start a comment."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")
