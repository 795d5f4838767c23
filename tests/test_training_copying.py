"""The tasks of recipes/copy_lookup.yaml, and the run itself: learnt, and the same to the bit when killed on its way."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from minim3.training.config import load_recipe
from minim3.training.copying import ASK, BEGIN_COPY, BEGIN_PAIRS, CONTROL_IDS, CopySource, LookupSource
from minim3.training.retrieval import SymbolProcessor
from minim3.training.state import find_checkpoints

ROOT = Path(__file__).parent.parent
RECIPE = ROOT / "recipes" / "copy_lookup.yaml"


def encode(source: CopySource | LookupSource, index: int) -> tuple[list[int], list[int]]:
    """Ids of a document, and the places at which loss falls."""
    (sample,) = source.group(index).samples
    ids, mask = SymbolProcessor().encode_conversation(sample.messages)
    return ids, [place for place, counts in enumerate(mask) if counts]


def test_a_row_is_repeated_whole() -> None:
    source, lengths = CopySource(3, lengths=[5, 9], num_symbols=20), set()
    for index in range(30):
        ids, targets = encode(source, index)
        length = ids.index(ASK) - 1
        lengths.add(length)
        assert ids[0] == BEGIN_COPY
        assert ids[1 : length + 1] == ids[length + 2 :]
        assert targets == list(range(length + 2, len(ids)))
        assert min(ids[1 : length + 1]) >= CONTROL_IDS
        assert max(ids) < CONTROL_IDS + 20
    assert lengths == {5, 9}


def test_a_row_of_few_symbols_repeats_them() -> None:
    used = set()
    for index in range(30):
        ids, _ = encode(CopySource(3, lengths=[12], num_symbols=50, symbols_per_row=5), index)
        assert len(set(ids[1:13])) <= 5
        used |= set(ids[1:13])
    assert len(used) > 40, "another five in every row"
    with pytest.raises(ValueError, match=r"symbols_per_row is 60; it must lie in 1\.\.50"):
        CopySource(0, num_symbols=50, symbols_per_row=60)


def test_a_question_has_one_answer() -> None:
    """A symbol that stood in two pairs would have two answers, and the score an unknown ceiling."""
    source = LookupSource(3, num_pairs=[8], num_questions=5, num_symbols=20)
    for index in range(30):
        ids, targets = encode(source, index)
        start = ids.index(ASK) + 1
        assert (ids[0], start) == (BEGIN_PAIRS, 18)
        assert len(set(ids[1:17])) == 16
        pairs, asked = set(zip(ids[1:17:2], ids[2:17:2])), list(zip(ids[start::2], ids[start + 1 :: 2]))
        assert len(asked) == len(set(asked)) == 5
        assert set(asked) <= pairs
        assert targets == list(range(start + 1, len(ids), 2))
    with pytest.raises(ValueError, match="num_pairs is 11, which needs 22 symbols; there are 20"):
        LookupSource(0, num_pairs=[2, 11], num_symbols=20)
    with pytest.raises(ValueError, match="num_questions is 9, but there are only 8 pairs"):
        LookupSource(0, num_pairs=[8, 10], num_questions=9)


def test_the_recipe_trains_and_scores_what_it_says() -> None:
    recipe = load_recipe(RECIPE)
    assert recipe.model.config is not None
    assert recipe.model.config["vocab_size"] == CONTROL_IDS + 256
    names = [str(source.name).rpartition(":")[2] for source in recipe.evaluation.sources]
    assert names == ["CopySource", "LookupSource"]
    assert not any(source.options for source in recipe.evaluation.sources), "defaults: 16 symbols, one of 16 pairs"
    assert len(encode(CopySource(0), 0)[1]) == 16
    assert len(encode(LookupSource(0), 0)[1]) == 1


# The run itself


def start(output: Path) -> "subprocess.Popen[bytes]":
    output.mkdir(exist_ok=True)
    command = [sys.executable, "-m", "minim3.training.trainer", str(RECIPE), f"output={output}", "log_every_steps=1"]
    with (output / "said.txt").open("ab") as said:
        return subprocess.Popen(command, cwd=ROOT, stderr=said)


def finish(output: Path) -> None:
    assert start(output).wait(timeout=3600) == 0, (output / "said.txt").read_text(encoding="utf-8")[-2000:]


def log_of(output: Path) -> list[dict[str, Any]]:
    """The lines of the log that are whole."""
    path = output / "metrics.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


@pytest.mark.slow
def test_the_recipe_learns_both_tasks_and_ends_with_the_same_bits_when_killed_five_times(tmp_path: Path) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    began = time.monotonic()
    finish(whole)
    assert time.monotonic() - began < 20 * 60
    scores = [line["evaluation"] for line in log_of(whole) if "evaluation" in line][-1]
    print(f"learnt in {time.monotonic() - began:.0f} s: {scores}")
    assert scores["copy"] >= 0.99, scores
    assert scores["lookup"] >= 0.99, scores

    steps = load_recipe(RECIPE).steps
    for step in sorted(torch.randint(1, steps - 20, (5,), generator=torch.Generator().manual_seed(0)).tolist()):
        process = start(broken)
        while process.poll() is None and not any(line["step"] >= step for line in log_of(broken)):
            time.sleep(0.1)
        process.kill()
        assert process.wait() == -signal.SIGKILL, "the run was to be killed on its way"
    finish(broken)
    for one, other in zip(tensor_files(whole), tensor_files(broken), strict=True):
        expected, found = load_file(one), load_file(other)
        assert expected.keys() == found.keys()
        for name in expected:
            assert torch.equal(expected[name], found[name]), name


def tensor_files(output: Path) -> list[Path]:
    """The last state, optimizer and all, and the model people get."""
    return [find_checkpoints(output / "checkpoints")[-1] / "state.safetensors", output / "export" / "model.safetensors"]
