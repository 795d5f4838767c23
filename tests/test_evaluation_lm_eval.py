"""The adapter inside the real lm-evaluation-harness, on local tasks, beside our own tasks; nothing is downloaded."""

import importlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("lm_eval")

from lm_eval.api.instance import Instance
from lm_eval.api.registry import get_model

from minim3.cli.app import main
from minim3.evaluation.choice import choose, encode_continuation, read_choice
from minim3.evaluation.perplexity import perplexity
from minim3.evaluation.records import read_records
from minim3.evaluation.scoring import Pair, loglikelihoods
from minim3.integrations.lm_eval import MiniMaxM3LM, run_task
from minim3.model.causal_lm import MiniMaxM3SparseForConditionalGeneration
from minim3.processing.processor import MiniMaxM3VLProcessor
from minim3.processing.tokenizer import Tokenizer
from tests.evaluation_checkpoint import MAX_POSITIONS, tiny_model, tiny_processor, write_lines, write_tiny

WORDS = ["red", "a blue circle", "the answer", "think before you answer", "picture", "is there a tool", "you"]


@pytest.fixture(scope="module")
def model(tokenizer: Tokenizer) -> MiniMaxM3SparseForConditionalGeneration:
    return tiny_model(tokenizer)


@pytest.fixture(scope="module")
def processor(tokenizer: Tokenizer) -> MiniMaxM3VLProcessor:
    return tiny_processor(tokenizer)


@pytest.fixture(scope="module")
def adapter(model: MiniMaxM3SparseForConditionalGeneration, processor: MiniMaxM3VLProcessor) -> MiniMaxM3LM:
    return MiniMaxM3LM(model, processor, batch_size="auto")


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Data sets are read from this folder and cached in it."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)


def questions(file: Path, num: int) -> Path:
    rng = np.random.default_rng(4)
    records = []
    for index in range(num):
        choices = [str(word) for word in rng.permutation(WORDS)[:4]]
        records.append({"question": f"is it {index}, system?", "choices": choices, "answer": int(rng.integers(4))})
    return write_lines(file, *records)


def task_file(file: Path, name: str, data: Path, body: str) -> Path:
    file.write_text(
        f"task: {name}\ndataset_path: json\ndataset_kwargs:\n  data_files:\n    test: {data}\ntest_split: test\n{body}",
        encoding="utf-8",
    )
    return file


CHOICE = """output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: "answer"
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
  - {metric: acc_norm, aggregation: mean, higher_is_better: true}
"""


@pytest.mark.usefixtures("offline")
def test_a_task_of_the_harness_gives_what_our_choice_task_gives(
    model: MiniMaxM3SparseForConditionalGeneration, processor: MiniMaxM3VLProcessor, tmp_path: Path,
    tokenizer: Tokenizer, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """Another split into context and continuation, another normalization, another standard error."""
    data = questions(tmp_path / "q.jsonl", 25)
    asked = [read_choice(record, processor, raw=True) for record in read_records(data)]
    # The right answers are those that we choose after normalization: the harness has to agree on each of them.
    chosen = [
        next(i for i in range(4) if choose(model, [replace(question, right=i)]).normalized.right) for question in asked
    ]
    records = [{**record.fields, "answer": i} for record, i in zip(read_records(data), chosen)]
    write_lines(data, *records)
    ours = choose(model, (read_choice(record, processor, raw=True) for record in read_records(data)))
    assert (ours.normalized.right, ours.normalized.num) == (25, 25)
    assert 0 < ours.plain.right < 25, "the test would not tell the two apart"
    task = task_file(tmp_path / "t.yaml", "tiny_choice", data, CHOICE)
    figures = {name: (value, error, num) for name, value, error, num in run_task(model, processor, str(task))}
    for name, share in (("acc", ours.plain), ("acc_norm", ours.normalized)):
        value, error, num = figures[name]
        assert (100 * value, num) == (pytest.approx(share.percent), 25)
        assert share.standard_error == pytest.approx(100 * error)
    # The same from the command line.
    folder = write_tiny(tmp_path / "tiny", tokenizer)
    capsys.readouterr()
    assert main(["eval", str(folder), f"lm_eval:{task}", "--json", str(tmp_path / "out.json")]) == 0
    assert f"acc       {figures['acc'][0]:.6g}  ± " in capsys.readouterr().out
    rows = json.loads((tmp_path / "out.json").read_text())
    assert rows[0]["measured"] == figures["acc"][0]


@pytest.mark.usefixtures("offline")
def test_a_generation_task_runs(
    model: MiniMaxM3SparseForConditionalGeneration, processor: MiniMaxM3VLProcessor, tmp_path: Path
) -> None:
    """generate_until as the harness calls it: the options of a task in the harness's own names."""
    prompt = "is there a red circle"
    answer = MiniMaxM3LM(model, processor).generate_until([instance(prompt, {"max_gen_toks": 6})])[0]
    data = write_lines(tmp_path / "g.jsonl", {"q": prompt, "a": answer}, {"q": prompt, "a": "never"})
    body = """output_type: generate_until
doc_to_text: "{{q}}"
doc_to_target: "{{a}}"
generation_kwargs: {until: [], max_gen_toks: 6, do_sample: false}
metric_list:
  - {metric: exact_match, aggregation: mean, higher_is_better: true}
"""
    figures = run_task(model, processor, str(task_file(tmp_path / "g.yaml", "tiny_generation", data, body)))
    assert [(name, value, num) for name, value, _, num in figures] == [("exact_match", 0.5, 2)]


def instance(*arguments: Any) -> Instance:
    return Instance(request_type="loglikelihood", doc={}, arguments=arguments, idx=0)


def test_the_model_is_registered_under_its_name(tokenizer: Tokenizer, tmp_path: Path) -> None:
    """`--model minim3 --model_args pretrained=...` as the harness makes it from its command line."""
    assert get_model("minim3") is MiniMaxM3LM
    folder = write_tiny(tmp_path / "tiny", tokenizer)
    made = MiniMaxM3LM.create_from_arg_string(
        f"pretrained={folder},max_length=64", {"batch_size": 2, "max_batch_size": None, "device": "cuda"}
    )
    assert (made.batch_size, made.max_length) == (2, 64)
    assert made.model.device.type == ("cuda" if torch.cuda.is_available() else "cpu")


@settings(deadline=None)
@given(st.text(" aethr.\n", max_size=12).map("a".__add__), st.text(" aethr.\n", min_size=1, max_size=12))
def test_our_own_split_is_that_of_the_harness(
    adapter: MiniMaxM3LM, tokenizer: Tokenizer, context: str, continuation: str
) -> None:
    ours = encode_continuation(tokenizer, context, " " + continuation)
    assert adapter._encode_pair(context, " " + continuation) == ours


def test_a_rolling_likelihood_is_our_perplexity(adapter: MiniMaxM3LM, tokenizer: Tokenizer) -> None:
    text = "the answer is think before you answer, " * 4
    (total,) = adapter.loglikelihood_rolling([instance(text)])
    bos = adapter.model.text_config.bos_token_id
    assert adapter.prefix_token_id == bos
    whole = perplexity(adapter.model, tokenizer, [[text]], prefix_id=bos)
    assert -total == pytest.approx(whole.nats, rel=1e-6)


def test_a_text_longer_than_the_model(model: Any, processor: MiniMaxM3VLProcessor, tokenizer: Tokenizer) -> None:
    """Contexts lose their beginning, not their end; long texts are scored in windows, every token once."""
    short = MiniMaxM3LM(model, processor, max_length=32)
    text = "the answer is think before you answer, is there a red circle in the picture? " * 6
    before, after = short._encode_pair(text, "blue")
    (expected,) = loglikelihoods(model, [Pair(before[len(after) - 33 :], after)])
    (score,) = short.loglikelihood([instance(text, "blue")], disable_tqdm=True)
    assert score == (pytest.approx(expected.logprob), expected.is_greedy)
    ids = tokenizer.encode(text)
    assert short.loglikelihood_rolling([instance(text)])[0] < -len(ids)
    (answer,) = short.generate_until([instance(text, {"max_gen_toks": 5, "until": []})])
    generated = model.generate(torch.tensor([ids[-27:]]), max_new_tokens=5, do_sample=False)
    assert answer == tokenizer.decode(generated[0, 27:].tolist(), skip_special_tokens=True)


def test_generation_stops_where_it_is_told(adapter: MiniMaxM3LM) -> None:
    """Stop texts that stay in the answer; a request that gets the options of its neighbour."""
    prompts = ["is there a red circle", "the answer", "think"]
    whole = adapter.generate_until([instance(prompt, {"max_gen_toks": 12}) for prompt in prompts])
    stop = whole[1][2:4]
    assert stop
    given = [{"max_gen_toks": 3}, {"max_gen_toks": 12, "until": [stop]}, {"max_gen_toks": 12, "until": "never"}]
    cut = adapter.generate_until([instance(prompt, options) for prompt, options in zip(prompts, given)])
    assert cut[1] == whole[1][: whole[1].index(stop)]
    assert cut[2] == whole[2]
    assert whole[0].startswith(cut[0])
    assert len(cut[0]) < len(whole[0])
    with pytest.raises(ValueError, match="num_beams cannot be asked for"):
        adapter.generate_until([instance("a", {"num_beams": 2})])
    with pytest.raises(ValueError, match=f"the model takes {MAX_POSITIONS} in all"):
        adapter.generate_until([instance("a", {"max_gen_toks": MAX_POSITIONS})])


def test_the_chat_template_makes_control_tokens(adapter: MiniMaxM3LM, processor: MiniMaxM3VLProcessor) -> None:
    """A chat prompt that reaches the model as text, or with an open thought."""
    messages = [{"role": "user", "content": "is it red?"}]
    text = adapter.apply_chat_template(messages)
    expected = processor.apply_chat_template(messages, thinking_mode="disabled")["input_ids"][0].tolist()
    assert adapter.tok_encode(text) == expected
    assert isinstance(adapter.chat_template(True), str)


def test_without_the_harness_the_way_to_it_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.delitem(sys.modules, "minim3.integrations.lm_eval")
    with pytest.raises(ValueError, match=r"pip install lm-eval"):
        importlib.import_module("minim3.integrations.lm_eval")
