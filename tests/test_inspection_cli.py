"""`minim3 inspect`: reports of pocket's own answers, and the errors a user meets."""

import json
from pathlib import Path

import pytest

from minim3.cli.app import main
from minim3.cli.inspect import parse_layers
from minim3.pocket.world import Background, Scene, SceneObject, draw


def picture(folder: Path) -> str:
    from PIL import Image

    item = SceneObject("green", "square", "large", 20, 30, 38, (35, 155, 55))
    plain = Background("plain", (226, 229, 233), (226, 229, 233), False, 8, 0)
    Image.fromarray(draw(Scene((item,), plain))).save(folder / "square.png")
    return str(folder / "square.png")


def test_a_report_of_an_answer_about_a_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The command as the documentation shows it: answer on stdout, report beside."""
    image, report = picture(tmp_path), tmp_path / "report.json"
    question = "What colour is the large object?"
    assert main(["inspect", "pocket", question, "--image", image, "-o", str(report), "--threads", "1"]) == 0
    printed = capsys.readouterr()
    assert printed.out == "green\n"
    assert str(report) in printed.err
    data = json.loads(report.read_text(encoding="utf-8"))
    answer = data["tokens"][data["num_prompt_tokens"] :]
    assert "".join(token["text"] for token in answer if token["kind"] == "text").strip() == "green"
    assert [(item["kind"], item["rows"], item["columns"]) for item in data["media"]] == [("image", 4, 4)]
    assert data["media"][0]["thumbnails"][0].startswith("data:image/png;base64,")
    assert [len(layer["selected"] or []) for layer in data["layers"]] == [0, *[len(answer)] * 4]
    assert data["model"] == "pocket"


def test_a_report_of_some_layers_in_html(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = tmp_path / "report.html"
    assert main(["inspect", "Who are you?", "-o", str(report), "--layers", "1,3-4", "--threads", "1"]) == 0
    text = report.read_text(encoding="utf-8")
    assert text.startswith("<!doctype html>")
    assert "<title>Who are you?</title>" in text
    assert "pocket" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["hi", "-o", "report.pdf"], "must end in .html or .json"),
        (["hi", "-o", "missing/report.html"], "there is no folder 'missing'"),
        (["hi", "--layers", "1-x"], "--layers is '1-x'"),
        (["hi", "--layers", "9", "-o", "{}/a.html"], "layer 9 is asked for, the model has layers 0 to 4"),
        (["pocket", "a", "b"], "pass [MODEL] PROMPT"),
        (["pocket", "hi", "-m", "pocket"], "pass [MODEL] PROMPT"),
        (["hi", "--max-tokens", "100"], "more than --max-tokens 100 together: lower --max-new-tokens"),
    ],
)
def test_errors_are_one_line(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = [argument.format(tmp_path) for argument in arguments]
    assert main(["inspect", *given, "--threads", "1"]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1, lines
    assert message in lines[0]
    assert not list(tmp_path.iterdir()), "a report was begun"


def test_layers_as_people_write_them() -> None:
    assert parse_layers(None) is None
    assert parse_layers("3") == [3]
    assert parse_layers("0, 4,10-12") == [0, 4, 10, 11, 12]
