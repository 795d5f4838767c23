"""`minim3 eval`: every task from the command line, the table, the JSON, and what is refused."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from minim3.cli import eval as eval_module
from minim3.cli.app import main
from minim3.cli.eval import split_words
from minim3.processing.tokenizer import Tokenizer
from tests.evaluation_checkpoint import write_lines, write_tiny

GOOD_CHOICE = {"question": "the answer?", "choices": ["red", "blue"], "answer": 0}
GOOD_EXACT = {"prompt": "the answer?", "answer": "red"}
Run = Any


@pytest.fixture(scope="module")
def folder(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("eval") / "tiny", tokenizer)


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    """Calls `minim3 eval`; returns exit code, stdout and stderr."""
    monkeypatch.delenv("MINIM3_TRACEBACK", raising=False)
    monkeypatch.setattr(eval_module, "_PROGRESS_SECONDS", math.inf)

    def call(*arguments: object) -> tuple[int, str, str]:
        capsys.readouterr()
        code = main(["eval", *map(str, arguments)])
        return code, *capsys.readouterr()

    return call


def test_every_task_on_a_checkpoint(run: Run, folder: Path, tmp_path: Path, tokenizer: Tokenizer) -> None:
    text = tmp_path / "text.txt"
    text.write_text("the answer is red\n" * 30, encoding="utf-8")
    documents = write_lines(tmp_path / "d.jsonl", {"text": "the answer"}, {"text": "is red"})
    choices = write_lines(tmp_path / "c.jsonl", GOOD_CHOICE, GOOD_CHOICE | {"answer": "B"})
    exact = write_lines(tmp_path / "e.jsonl", GOOD_EXACT)
    tasks = [
        f"perplexity:{text}",
        f"perplexity:{documents}",
        f"choice:{choices}",
        f"exact:{exact}",
        "needle",
        "retrieval",
    ]
    options = ["--lengths", 500, "--depths", "0,100", "--keys", 2, "--limit", 2, "--max-new-tokens", 4]
    code, out, err = run(folder, *tasks, *options, "--json", tmp_path / "out.json")
    assert (code, err) == (0, ""), err
    for task in tasks:
        assert f"{task}\n" in out
    rows = json.loads((tmp_path / "out.json").read_text())
    assert all({"claim", "bar", "measured", "unit", "pass", "machine"} <= set(row) for row in rows)
    by_claim = {row["claim"]: row for row in rows}
    accuracy = by_claim[f"choice:{choices}: accuracy"]
    assert (accuracy["measured"], accuracy["num"], accuracy["unit"]) == (50.0, 2, "%")
    assert accuracy["standard_error"] == pytest.approx(50.0)
    tokens = len(tokenizer.encode("the answer")) + len(tokenizer.encode("is red"))
    assert by_claim[f"perplexity:{documents}: perplexity"]["num"] == tokens, "the first ones too"
    nats = by_claim[f"perplexity:{text}: nats a token"]["measured"]
    assert by_claim[f"perplexity:{text}: perplexity"]["measured"] == pytest.approx(math.exp(nats))
    assert f"{nats:.6g}" in out
    assert by_claim["retrieval: all"]["num"] == 4
    assert {row["model"] for row in rows} == {str(folder)}


def test_the_chat_format_and_raw_text_differ(run: Run, folder: Path, tmp_path: Path) -> None:
    """--raw that does nothing."""
    rng = np.random.default_rng(0)
    words = ["red", "blue", "the answer", "a", "picture of it", "think"]
    questions = [{"question": f"is it {i}?", "choices": list(rng.permutation(words)), "answer": 0} for i in range(12)]
    choices = write_lines(tmp_path / "c.jsonl", *questions)
    assert run(folder, f"choice:{choices}") != run(folder, f"choice:{choices}", "--raw")


def test_progress_goes_to_stderr(run: Run, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A table that cannot be piped on."""
    choices = write_lines(tmp_path / "c.jsonl", GOOD_CHOICE, GOOD_CHOICE)
    quiet = run(folder, f"choice:{choices}")
    monkeypatch.setattr(eval_module, "_PROGRESS_SECONDS", 0)
    code, out, err = run(folder, f"choice:{choices}")
    assert (code, out, "") == quiet
    assert [line.split(",")[0] for line in err.splitlines()] == [f"choice:{choices}: {n} questions" for n in (1, 2)]


def test_pocket_is_measured_by_its_own_questions(run: Run) -> None:
    code, out, _ = run("pocket", "--limit", 2)
    assert code == 0
    assert out.startswith("pocket\n  pictures ")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["chioce:x.jsonl"], "unknown task 'chioce:x.jsonl' (did you mean choice?); known: perplexity:FILE"),
        (["FOLDER", "needel"], "unknown task 'needel' (did you mean needle?)"),
        (["FOLDER"], "no task is given for FOLDER: minim3 eval MODEL TASK..."),
        (["FOLDER", "choice"], "task 'choice' needs FILE.jsonl: choice:FILE.jsonl"),
        (["FOLDER", "needle:5"], "needle takes nothing after a colon"),
        (["FOLDER", "choice:nowhere.jsonl"], "task choice: nowhere.jsonl does not exist"),
        (["FOLDER", "exact:."], "task exact: . is a folder, a file is needed"),
        (["FOLDER", "needle", "--lengths", "1k"], "--lengths is '1k'; numbers with commas"),
        (["FOLDER", "needle", "--lengths", "590"], "590 tokens and 64 of the answer are more than the model takes"),
        (["FOLDER", "needle", "--lengths", "50"], "a prompt of 50 tokens has no room"),
        (["FOLDER", "needle", "--lengths", "400", "--depths", "150"], "the depth is 1.5"),
        (["FOLDER", "needle", "--window", "100"], "--window is for perplexity; no such task is asked for"),
        (["FOLDER", "needle", "--json", "no/where.json"], "--json no/where.json: there is no folder no"),
        (["FOLDER", "lm_eval:nowhere.yaml"], "nowhere.yaml does not exist"),
        (["FOLDER", "needle", "--adapter", "nowhere"], "nowhere"),
    ],
)
def test_refusals(run: Run, folder: Path, arguments: list[str], message: str) -> None:
    """A traceback, an error after minutes of loading, or one that does not say what is known."""
    code, out, err = run(*[str(folder) if word == "FOLDER" else word for word in arguments])
    assert (code, out) == (2, "")
    assert err.startswith("minim3: ")
    assert err.count("\n") == 1
    assert message.replace("FOLDER", str(folder)) in err


@pytest.mark.parametrize(
    ("words", "model", "expected"),
    [
        (["needle"], None, (None, ["needle"])),
        (["needle"], "here", ("here", ["needle"])),
        (["here", "needle", "choice:x"], None, ("here", ["needle", "choice:x"])),
        (["pocket"], None, (None, ["pocket"])),
        (["pocket", "needle"], None, (None, ["needle"])),
        (["pocket", "pocket"], None, (None, ["pocket"])),
        (["needle", "pocket"], None, (None, ["needle", "pocket"])),
        (["pocket"], "here", ("here", ["pocket"])),
        (["pocket", "needle"], "here", ("here", ["pocket", "needle"])),
    ],
)
def test_which_word_is_the_model(words: list[str], model: str | None, expected: tuple[str | None, list[str]]) -> None:
    source, tasks = split_words(words, model)
    assert (source, [str(task) for task in tasks]) == expected
