"""Evaluation tasks: records and their errors, choices, exact answers, needles."""

import math
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from minim3.evaluation import choice as choice_module
from minim3.evaluation.answers import greedy_answers, greedy_ids
from minim3.evaluation.choice import Choice, choose, encode_continuation, read_choice
from minim3.evaluation.exact import ExactCase, exact_match, read_exact
from minim3.evaluation.needle import NeedleMaker, needle_table, run_needles
from minim3.evaluation.records import Prompt, encode_prompt, read_records
from minim3.evaluation.report import Share
from minim3.evaluation.scoring import Pair, Score
from minim3.model.causal_lm import MiniMaxM3SparseForConditionalGeneration
from minim3.processing.processor import MiniMaxM3VLProcessor
from minim3.processing.tokenizer import Tokenizer
from tests.evaluation_checkpoint import MAX_POSITIONS, tiny_model, tiny_processor, write_lines


@pytest.fixture(scope="module")
def model(tokenizer: Tokenizer) -> MiniMaxM3SparseForConditionalGeneration:
    return tiny_model(tokenizer)


@pytest.fixture(scope="module")
def processor(tokenizer: Tokenizer) -> MiniMaxM3VLProcessor:
    return tiny_processor(tokenizer)


# --- records ---------------------------------------------------------------------------------------------------------

GOOD_CHOICE = {"question": "the answer?", "choices": ["red", "blue"], "answer": 0}
GOOD_EXACT = {"prompt": "the answer?", "answer": "red"}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"question": ', "broken JSON"),
        ("[1]", "a JSON object is needed, this is a list"),
        ({"query": "x", "choices": ["a", "b"], "answer": 0}, 'needs "question"'),
        ({"question": "x", "answer": 0}, 'needs "choices"'),
        (GOOD_CHOICE | {"choices": ["a"]}, '"choices" must be a list of at least two'),
        (GOOD_CHOICE | {"choices": ["a", ""]}, "none empty"),
        (GOOD_CHOICE | {"answer": 2}, "0 to 1, A to B"),
        (GOOD_CHOICE | {"answer": "C"}, "0 to 1, A to B"),
        (GOOD_CHOICE | {"answer": True}, '"answer" is True'),
        ({"question": "x", "choices": ["a", "b"]}, 'needs "answer"'),
        (GOOD_CHOICE | {"question": 5}, '"question" must be text, got int'),
        (GOOD_CHOICE | {"messages": []}, 'both "messages" and "question"'),
        (GOOD_CHOICE | {"image": "missing.png"}, "image missing.png does not exist"),
        (GOOD_CHOICE | {"images": [3]}, '"images" must be a list of paths'),
        (GOOD_CHOICE | {"question": "x" * 2 * MAX_POSITIONS}, f"the model takes {MAX_POSITIONS}"),
        ({"messages": [{"role": "boss", "content": "x"}], "choices": ["a", "b"], "answer": 0}, "role 'boss'"),
        ({"messages": [{"role": "user", "content": [{"type": "image", "image": "no.png"}]}], "choices": ["a", "b"],
          "answer": 0}, "image no.png does not exist"),
    ],
)  # fmt: skip
def test_a_bad_line_is_named(line: Any, message: str, processor: MiniMaxM3VLProcessor, tmp_path: Path) -> None:
    """An error without the place in a file of ten thousand lines; empty lines not counted."""
    file = write_lines(tmp_path / "q.jsonl", GOOD_CHOICE, "", line)
    with pytest.raises(ValueError, match=r"q\.jsonl:3: ") as error:
        [read_choice(record, processor, max_tokens=MAX_POSITIONS) for record in read_records(file)]
    assert message in str(error.value)


def test_files_that_hold_nothing(tmp_path: Path) -> None:
    """100% of 0 questions."""
    with pytest.raises(ValueError, match=r"empty\.jsonl is empty"):
        list(read_records(write_lines(tmp_path / "empty.jsonl", "")))
    (tmp_path / "latin.jsonl").write_bytes(b'{}\n{"question": "caf\xe9"}\n')
    with pytest.raises(ValueError, match=r"latin\.jsonl:2: not UTF-8"):
        list(read_records(tmp_path / "latin.jsonl"))


def test_the_limit_and_a_byte_order_mark(tmp_path: Path) -> None:
    file = tmp_path / "bom.jsonl"
    file.write_bytes(b"\xef\xbb\xbf" + b'{"n": 1}\n{"n": 2}\nbroken\n')
    assert [record.fields["n"] for record in read_records(file, 2)] == [1, 2]


def test_a_record_in_the_chat_format(processor: MiniMaxM3VLProcessor, tmp_path: Path) -> None:
    """A picture found beside the file whatever the working directory; the same prompt as `generate` makes."""
    (tmp_path / "pictures").mkdir()
    picture = tmp_path / "pictures" / "a.png"
    Image.fromarray(np.arange(60 * 90 * 3, dtype=np.uint8).reshape(60, 90, 3)).save(picture)
    url = {"type": "image_url", "image_url": {"url": "pictures/a.png"}}
    text = {"type": "text", "text": "what?"}
    file = write_lines(
        tmp_path / "q.jsonl",
        {"prompt": "what?", "images": ["pictures/a.png"], "system": "short"},
        {"messages": [{"role": "system", "content": "short"}, {"role": "user", "content": [url, text]}]},
    )
    content = [{"type": "image", "image": str(picture)}, text]
    expected = processor.apply_chat_template(
        [{"role": "system", "content": "short"}, {"role": "user", "content": content}]
    )
    for record in read_records(file):
        prompt = encode_prompt(record, processor, "prompt", raw=False)
        assert prompt.ids == expected["input_ids"][0].tolist()
        assert prompt.media is not None
        assert prompt.media.pixel_values is not None
        assert prompt.media.pixel_values.equal(expected["pixel_values"])
        with pytest.raises(ValueError, match=r'--raw takes "prompt" as it stands'):
            encode_prompt(record, processor, "prompt", raw=True)


def test_the_standard_error_is_that_of_the_sample() -> None:
    outcomes = np.array([1] * 7 + [0] * 4)
    share = Share(7, 11)
    assert share.percent == pytest.approx(100 * outcomes.mean())
    assert share.standard_error == pytest.approx(100 * outcomes.std(ddof=1) / math.sqrt(11))
    assert Share(1, 1).standard_error is None


# --- choice ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("answer", [1, "B", "blue"])
def test_forms_of_an_answer(answer: Any, processor: MiniMaxM3VLProcessor, tmp_path: Path) -> None:
    file = write_lines(tmp_path / "q.jsonl", GOOD_CHOICE | {"answer": answer})
    (record,) = read_records(file)
    assert read_choice(record, processor).right == 1


def test_an_answer_is_scored_after_the_header_of_a_turn(processor: MiniMaxM3VLProcessor, tmp_path: Path) -> None:
    """The likelihood of an answer where the model would have to close a thought first."""
    (record,) = read_records(write_lines(tmp_path / "q.jsonl", GOOD_CHOICE))
    question = read_choice(record, processor)
    text = processor.tokenizer.decode(question.pairs[0].context)
    assert text.endswith("]~b]ai\n</mm:think>")
    assert [processor.tokenizer.decode(pair.continuation) for pair in question.pairs] == ["red", "blue"]
    raw = read_choice(record, processor, raw=True)
    assert [processor.tokenizer.decode(pair.context) for pair in raw.pairs] == ["the answer?"] * 2
    assert [processor.tokenizer.decode(pair.continuation) for pair in raw.pairs] == [" red", " blue"]


@settings(deadline=None)
@given(st.text(" aethr.\n", max_size=12), st.text(" aethr.\n", min_size=1, max_size=12))
def test_context_and_continuation_are_parts_of_one_encoding(
    tokenizer: Tokenizer, context: str, continuation: str
) -> None:
    """White space at the end of a context as a token of its own, which no text has there."""
    before, after = encode_continuation(tokenizer, context, " " + continuation)
    assert before == tokenizer.encode(context.rstrip())
    assert before + after == tokenizer.encode(context + " " + continuation)


def test_plain_and_normalized_accuracy(monkeypatch: pytest.MonkeyPatch) -> None:
    """Division by tokens, by the length of another answer, or a tie that the right answer wins."""
    logprobs = {"aa": -2.0, "bbbbbb": -3.0, "cc": -5.0, "dd": -5.0}

    def scores(_: Any, pairs: Iterable[Pair], **__: Any) -> Iterator[Score]:
        return (Score(logprobs["".join(map(chr, pair.continuation))], False, 1) for pair in pairs)

    monkeypatch.setattr(choice_module, "loglikelihoods", scores)

    def question(right: str, *choices: str) -> Choice:
        pairs = tuple(Pair([1], [ord(letter) for letter in text]) for text in choices)
        return Choice(choices, choices.index(right), pairs)

    questions = [question("aa", "aa", "bbbbbb"), question("bbbbbb", "aa", "bbbbbb", "cc"), question("dd", "cc", "dd")]
    done: list[int] = []
    result = choose(None, iter(questions), progress=done.append)  # type: ignore[arg-type]
    assert result.plain == Share(1, 3)
    assert result.normalized == Share(1, 3)
    assert choose(None, questions[:1]).plain == Share(1, 1)  # type: ignore[arg-type]
    assert choose(None, questions[:1]).normalized == Share(0, 1)  # type: ignore[arg-type]
    assert done == [1, 2, 3]


# --- answers and exact match -----------------------------------------------------------------------------------------


def test_answers_come_in_order_whatever_ends_first(
    model: MiniMaxM3SparseForConditionalGeneration, tokenizer: Tokenizer
) -> None:
    """An answer that is done early taking the place of the one before it; batches that change answers."""
    prompts = [Prompt(tokenizer.encode("the answer is " * n + "red")) for n in (30, 1, 12, 3, 20, 2)]
    # An end token that comes early in some answers and never in others.
    alone = [
        next(greedy_ids(model, [prompt], eos_token_ids=(), max_new_tokens=12, batch_size=1)).output_ids
        for prompt in prompts
    ]
    eos = alone[1][2]
    cut = [ids[: ids.index(eos) + 1] if eos in ids else ids for ids in alone]
    assert len({len(ids) for ids in cut}) > 1
    for batch_size in (1, 2, 8):
        found = greedy_ids(model, iter(prompts), eos_token_ids=(eos,), max_new_tokens=12, batch_size=batch_size)
        assert [request.output_ids for request in found] == cut


def test_reasoning_is_no_part_of_an_answer(
    model: MiniMaxM3SparseForConditionalGeneration, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = [*tokenizer.encode("is it red? </mm:think>", allow_special=True), *tokenizer.encode("blue")]

    class Fixed:
        output_ids, finish_reason = ids, "stop"

    monkeypatch.setattr("minim3.evaluation.answers.greedy_ids", lambda *_, **__: iter([Fixed()]))
    options: dict[str, Any] = {"eos_token_ids": (), "max_new_tokens": 1}
    assert list(greedy_answers(model, tokenizer, [], thinking="enabled", **options)) == ["blue"]


@pytest.mark.parametrize(
    ("expected", "answer", "right"),
    [
        (["red"], " red\n", True),
        (["two  words"], "two words", True),
        (["red", "crimson"], "crimson", True),
        (["red"], "Red", False),
        (["red"], "red.", False),
        (["red"], "", False),
    ],
)
def test_what_counts_as_exact(expected: list[str], answer: str, right: bool) -> None:
    result = exact_match(lambda prompts: iter([answer for _ in prompts]), [ExactCase(Prompt([1]), tuple(expected))])
    assert result.share == Share(right, 1)
    assert result.mistakes == (() if right else ({"expected": expected[0], "answer": answer},))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ({"prompt": "x"}, 'needs "answer"'),
        ({"question": "x", "answer": "y"}, 'needs "prompt"'),
        (GOOD_EXACT | {"answer": []}, "must be a text or a list"),
        (GOOD_EXACT | {"prompt": "x" * 2 * MAX_POSITIONS}, f"the model takes {MAX_POSITIONS}"),
    ],
)
def test_bad_lines_of_exact(line: Any, message: str, processor: MiniMaxM3VLProcessor, tmp_path: Path) -> None:
    (record,) = read_records(write_lines(tmp_path / "e.jsonl", line))
    with pytest.raises(ValueError, match=r"e\.jsonl:1: ") as error:
        read_exact(record, processor, max_tokens=MAX_POSITIONS)
    assert message in str(error.value)


# --- needles ---------------------------------------------------------------------------------------------------------

FACT = re.compile(r"The number of the ([a-z]+ [a-z]+) is ([0-9]{7})\.")
ASKED = re.compile(r"What is the number of the ([a-z]+ [a-z]+)\?")


@settings(max_examples=40, deadline=None)
@given(
    length=st.integers(1500, 4000), depth=st.sampled_from([0.0, 0.1, 0.5, 0.77, 1.0]), num_keys=st.integers(1, 12),
    raw=st.booleans(), seed=st.integers(0, 99),
)  # fmt: skip
def test_a_prompt_has_the_length_and_the_facts_that_were_asked_for(
    processor: MiniMaxM3VLProcessor, length: int, depth: float, num_keys: int, raw: bool, seed: int
) -> None:
    """Lengths that are off by the chat format; a fact that is missing, twice there, or somewhere else."""
    case = NeedleMaker(processor, num_keys, raw=raw).make(length, depth, str(seed))
    assert len(case.prompt.ids) == case.length == length
    text = processor.tokenizer.decode(case.prompt.ids)
    facts = dict(FACT.findall(text))
    assert len(facts) == len(FACT.findall(text)) == len(set(facts.values())) == num_keys
    (asked,) = ASKED.findall(text)
    assert facts[asked] == case.answer
    assert text.startswith("Numbers of things" if raw else "]~!b[")
    assert text.endswith(" is" if raw else "]~b]ai\n</mm:think>")
    # Facts are put between sentences: half a sentence off at most, out of the filler.
    assert abs(case.depth - depth) < 60 / (length - 200 - 60 * num_keys)
    if num_keys == 1:
        place = text.index(case.answer)
        assert (place / len(text) < 0.5) == (depth < 0.5) or depth in (0.5,)


def test_needles_with_an_answerer_that_can_read(processor: MiniMaxM3VLProcessor) -> None:
    """Cells mixed up, samples all alike, or a test that is passed without knowing which key is asked for."""
    seen = set()
    lengths: list[int] = []

    def answers(find: Any) -> Any:
        def answer(prompts: Iterable[Prompt]) -> Iterator[str]:
            for prompt in prompts:
                text = processor.tokenizer.decode(prompt.ids)
                seen.add(text)
                lengths.append(len(prompt.ids))
                yield find(text)

        return answer

    options: dict[str, Any] = {"lengths": (1200, 1500), "depths": (0.0, 1.0), "num_samples": 3}
    maker = NeedleMaker(processor, 8)

    def read(text: str) -> str:
        return f"It is {dict(FACT.findall(text))[ASKED.findall(text)[0]]}."

    shares = run_needles(answers(read), maker, **options)
    assert list(shares) == [(1200, 0.0), (1200, 1.0), (1500, 0.0), (1500, 1.0)]
    assert set(shares.values()) == {Share(3, 3)}
    assert len(seen) == 12
    # Facts that are not asked for stand all over the text.
    thirds = {3 * fact.start() // len(text) for text in seen for fact in FACT.finditer(text)}
    assert thirds == {0, 1, 2}
    run_needles(answers(read), maker, **options)
    assert len(seen) == 12, "the same seed makes the same prompts"
    run_needles(answers(read), maker, **options, seed=1)
    assert len(seen) == 24
    last = run_needles(answers(lambda text: FACT.findall(text)[-1][1]), maker, **options)
    assert last[1200, 0.0].right < 3
    short = run_needles(answers(lambda text: read(text) if lengths[-1] == 1200 else ""), maker, **options)
    assert [share.right for share in short.values()] == [3, 3, 0, 0]
    assert needle_table(shares).splitlines()[1].split() == ["1,200", "100%", "100%"]


def test_a_number_inside_a_longer_one_is_no_answer(processor: MiniMaxM3VLProcessor) -> None:
    case = NeedleMaker(processor).make(900, 0.5, "0")
    assert case.is_right(f"The number is {case.answer}.")
    assert not case.is_right(f"1{case.answer}")
    assert not case.is_right(f"{case.answer}0")


def test_prompts_that_cannot_be_made(processor: MiniMaxM3VLProcessor) -> None:
    with pytest.raises(ValueError, match="a prompt of 100 tokens has no room"):
        NeedleMaker(processor, 4).make(100, 0.5, "0")
    with pytest.raises(ValueError, match=r"the depth is 1\.5"):
        NeedleMaker(processor).make(900, 1.5, "0")
    with pytest.raises(ValueError, match="577 keys"):
        NeedleMaker(processor, 577)
