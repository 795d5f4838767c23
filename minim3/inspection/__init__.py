"""Looking inside an answer: which key blocks each index head selected for every token of it, and which experts ran.

`record` runs one forward pass over a prompt and its answer and returns an `Inspection`; `write_report` turns that into
one HTML file. The chat page of the server shows the same object with the same script (`static/inspect.js`).
"""

from minim3.inspection.data import (
    ExpertLoad,
    Inspection,
    LayerInspection,
    MediaItem,
    Place,
    SelectionStatistics,
    Token,
    WrittenToken,
)
from minim3.inspection.encoding import encode_answer
from minim3.inspection.recording import MAX_TOKENS, Capture, capture_answer, describe, record
from minim3.inspection.report import render_report, write_report

__all__ = [
    "MAX_TOKENS",
    "Capture",
    "ExpertLoad",
    "Inspection",
    "LayerInspection",
    "MediaItem",
    "Place",
    "SelectionStatistics",
    "Token",
    "WrittenToken",
    "capture_answer",
    "describe",
    "encode_answer",
    "record",
    "render_report",
    "write_report",
]
