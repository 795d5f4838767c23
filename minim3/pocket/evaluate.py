"""How well a model answers in pocket's world: fresh pictures, text tasks, clips, tools and thinking, counted by kind.

`evaluate` asks any function that answers questions, so that whatever can talk can be measured; clips, conversations
with tools and the modes of thinking (dialogue_cases.py) are asked of a function that gives replies (replies.py). From
the command line, `python -m minim3.pocket.evaluate` asks a checkpoint (greedy) and prints its report as JSON on the
last line.

The questions are fresh: evaluation draws from a stream of random numbers that training never draws from, at any seed.
Of the picture questions, 70% are of the kind training shows, 15% come in a held-out wording, and 15% are about a
held-out pair of colour and shape; kinds are balanced within each of the three. Pictures and text tasks are the same
for a seed whatever else is asked.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from minim3.pocket.dialogue_cases import (
    DialogueCase,
    fresh_clip_questions,
    fresh_thinking_tasks,
    fresh_tool_tasks,
    reply_words,
)
from minim3.pocket.questions import KINDS, Question, ask, is_right
from minim3.pocket.replies import Reply, ReplyFunction, model_replies
from minim3.pocket.source import EVALUATION_STREAM
from minim3.pocket.text_tasks import TEXT_KINDS, ask_text
from minim3.pocket.world import Scene, draw, random_scene

GROUPS = ("trained", "held_out_wording", "held_out_pair")
# One round of 20 questions of each kind; a text task has no pairs.
_PICTURE_ROUND = ("trained",) * 14 + ("held_out_wording",) * 3 + ("held_out_pair",) * 3
_TEXT_ROUND = ("trained",) * 4 + ("held_out_wording",)

# In percent, points for `max_drop`: what pocket has to reach.
BARS = {
    "pictures": 95.0, "kind": 80.0, "relation": 85.0, "max_drop": 8.0, "text": 95.0, "clips": 85.0, "tools": 90.0,
    "well_formed": 99.0, "drafts": 60.0,
}  # fmt: skip
PARTS = ("pictures", "text", "clips", "tools", "thinking")
_FRESH_DIALOGUES = {"clips": fresh_clip_questions, "tools": fresh_tool_tasks, "thinking": fresh_thinking_tasks}

Prompt = tuple[np.ndarray | None, str]
AnswerFunction = Callable[[Sequence[Prompt]], Sequence[str]]


@dataclass(frozen=True)
class Case:
    """A question of the evaluation; `scene` is None for a text task."""

    question: Question
    scene: Scene | None

    @property
    def group(self) -> str:
        if self.question.held_out_pair:
            return "held_out_pair"
        return "held_out_wording" if self.question.held_out_wording else "trained"

    def prompt(self) -> Prompt:
        """The picture (uint8 [112, 112, 3]) or None, and the text."""
        return (None if self.scene is None else draw(self.scene)), self.question.text


def fresh_questions(seed: int, n: int, *, groups: Sequence[str] = _PICTURE_ROUND) -> list[Case]:
    """`n` picture questions, each about a picture of its own, kinds in turn.

    `groups` (out of GROUPS) is gone through in turn as well: ("held_out_pair",) asks about held-out pairs alone.
    """
    _check_groups(groups, GROUPS)
    return [_picture_case(seed, index, groups) for index in range(n)]


def fresh_text_tasks(seed: int, n: int, *, groups: Sequence[str] = _TEXT_ROUND) -> list[Case]:
    """`n` text tasks, kinds in turn; `groups` as in `fresh_questions`, without "held_out_pair"."""
    _check_groups(groups, GROUPS[:2])
    cases = []
    for index in range(n):
        rng = np.random.default_rng([EVALUATION_STREAM, seed, 1, index])
        group = groups[index // len(TEXT_KINDS) % len(groups)]
        kind = TEXT_KINDS[index % len(TEXT_KINDS)]
        cases.append(Case(ask_text(kind, rng, held_out_wording=group == "held_out_wording"), None))
    return cases


def _check_groups(groups: Sequence[str], known: Sequence[str]) -> None:
    unknown = sorted(set(groups) - set(known))
    if unknown or not groups:
        raise ValueError(f"groups is {tuple(groups)}; it needs at least one of {tuple(known)} and no other")


def _picture_case(seed: int, index: int, groups: Sequence[str]) -> Case:
    rng = np.random.default_rng([EVALUATION_STREAM, seed, 0, index])
    group = groups[index // len(KINDS) % len(groups)]
    held_out_pair = group == "held_out_pair"
    while True:  # some scenes have no unambiguous question of the kind
        scene = random_scene(rng, pairs="held_out" if held_out_pair else "trained")
        question = ask(
            scene,
            KINDS[index % len(KINDS)],
            rng,
            held_out_wording=group == "held_out_wording",
            held_out_pair=held_out_pair,
        )
        if question is not None:
            return Case(question, scene)


def score(cases: Sequence[Case], answers: Sequence[str]) -> dict[str, Any]:
    """Counts right answers; accuracies are in percent, as shares of `num` questions.

    Returns {"accuracy", "num", "by_kind", "by_group", "by_form", "wrong"}; the `by_` entries map a name to
    {"accuracy", "num"}, and "wrong" lists up to 20 mistakes in words.
    """
    if len(cases) != len(answers):
        raise ValueError(f"{len(answers)} answers for {len(cases)} questions: one answer is needed for each")
    right = [is_right(case.question, answer) for case, answer in zip(cases, answers)]
    mistakes = [
        {"question": case.question.text, "expected": case.question.answer, "answer": answer}
        for case, answer in zip(cases, answers)
    ]
    names = {
        "by_kind": [case.question.kind for case in cases],
        "by_group": [case.group for case in cases],
        "by_form": [case.question.form for case in cases],
    }
    return _score(right, names, mistakes)


def score_replies(cases: Sequence[DialogueCase], replies: Sequence[Reply]) -> dict[str, Any]:
    """The same for conversations, and under "well_formed" the share of replies whose thinking block is."""
    if len(cases) != len(replies):
        raise ValueError(f"{len(replies)} replies for {len(cases)} conversations: one reply is needed for each")
    right = [case.is_right(reply) for case, reply in zip(cases, replies)]
    mistakes = [
        {"question": case.messages[-1]["content"], "expected": case.expected(), "answer": reply_words(reply)}
        for case, reply in zip(cases, replies)
    ]
    names = {"by_kind": [case.kind for case in cases], "by_group": [case.group for case in cases], "by_form": []}
    return {**_score(right, names, mistakes), "well_formed": _accuracy([reply.well_formed for reply in replies])}


def _score(right: Sequence[bool], names: dict[str, list[str]], mistakes: Sequence[dict[str, str]]) -> dict[str, Any]:
    wrong = (mistake for mistake, is_good in zip(mistakes, right) if not is_good)
    return {
        **_accuracy(right),
        **{by: _by_name(found, right) for by, found in names.items()},
        "wrong": list(islice(wrong, 20)),
    }


def _accuracy(right: Sequence[bool]) -> dict[str, Any]:
    return _share(sum(right), len(right))


def _share(number: int, of: int) -> dict[str, Any]:
    return {"accuracy": round(100 * number / of, 2) if of else None, "num": of}


def _by_name(names: Iterable[str], right: Sequence[bool]) -> dict[str, dict[str, Any]]:
    found: dict[str, list[bool]] = {}
    for name, is_good in zip(names, right):
        found.setdefault(name, []).append(is_good)
    return {name: _accuracy(found[name]) for name in sorted(found)}


def evaluate(
    answer_fn: AnswerFunction,
    n: int = 4000,
    seed: int = 0,
    *,
    num_text_tasks: int = 900,
    reply_fn: ReplyFunction | None = None,
    num_clips: int = 700,
    num_tools: int = 500,
    num_thinking: int = 400,
    batch_size: int = 50,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Asks `n` picture questions and `num_text_tasks` text tasks, `batch_size` at a time, and scores the answers.

    `answer_fn` gets (picture or None, text) pairs and returns as many strings. With `reply_fn`, which gets dialogues
    and returns as many replies, clips, tools and the modes of thinking are asked for too. `progress(done, all)` is
    called after each batch. Returns {"pictures": ..., "text": ..., "claims": ...}, with `reply_fn` "clips", "tools",
    "thinking" and "drafts" as well: scores (see `score` and `score_replies`), the share of drafts that the reply bears
    out, and `claims` of them all.
    """
    pictures, texts = fresh_questions(seed, n), fresh_text_tasks(seed, num_text_tasks)
    numbers = {"clips": num_clips, "tools": num_tools, "thinking": num_thinking}
    dialogues = {part: fresh(seed, numbers[part]) for part, fresh in _FRESH_DIALOGUES.items()} if reply_fn else {}
    num_cases = len(pictures) + len(texts) + sum(map(len, dialogues.values()))
    num_done = 0

    def asked(number: int) -> None:
        nonlocal num_done
        num_done += number
        if progress is not None:
            progress(num_done, num_cases)

    cases, answers = pictures + texts, []
    for start in range(0, len(cases), batch_size):
        batch = cases[start : start + batch_size]
        got = list(answer_fn([case.prompt() for case in batch]))
        if len(got) != len(batch):
            raise ValueError(f"the answer function gave {len(got)} answers to {len(batch)} questions")
        answers += got
        asked(len(batch))
    report: dict[str, Any] = {
        "seed": seed,
        "pictures": score(pictures, answers[: len(pictures)]),
        "text": score(texts, answers[len(pictures) :]),
    }
    every_reply: list[Reply] = []
    for part, part_cases in dialogues.items():
        assert reply_fn is not None
        replies: list[Reply] = []
        for start in range(0, len(part_cases), batch_size):
            dialogue_batch = part_cases[start : start + batch_size]
            replies += reply_fn([case.dialogue() for case in dialogue_batch])
            asked(len(dialogue_batch))
        report[part] = score_replies(part_cases, replies)
        every_reply += replies
    if reply_fn is not None:
        drafted, borne_out = (sum(reply.drafts[side] for reply in every_reply) for side in (0, 1))
        report["drafts"] = _share(borne_out, drafted)
    return {**report, "claims": claims(report)}


def claims(report: dict[str, Any]) -> list[dict[str, Any]]:
    """What pocket promises, beside what was measured. What was not asked is not claimed."""
    rows: list[tuple[str, float, float, str, bool]] = []

    def at_least(claim: str, bar: float, measured: float | None) -> None:
        if measured is not None:
            rows.append((claim, bar, measured, "%", measured >= bar))

    pictures = report["pictures"]
    at_least("pictures: right answers", BARS["pictures"], pictures["accuracy"])
    for kind, entry in pictures["by_kind"].items():
        at_least(f"pictures: {kind}", BARS.get(kind, BARS["kind"]), entry["accuracy"])
    trained = pictures["by_group"].get("trained")
    for group in GROUPS[1:]:
        held_out = pictures["by_group"].get(group)
        if trained and held_out:
            drop = round(trained["accuracy"] - held_out["accuracy"], 2)
            rows.append(
                (f"pictures: {group} below trained", BARS["max_drop"], drop, "points", drop <= BARS["max_drop"])
            )
    at_least("text: right answers", BARS["text"], report["text"]["accuracy"])
    if "clips" in report:
        at_least("clips: right answers", BARS["clips"], report["clips"]["accuracy"])
        at_least("tools: right answers", BARS["tools"], report["tools"]["accuracy"])
        calls = report["tools"]["by_kind"].get("call")
        at_least("tools: calls valid and exact", BARS["tools"], calls and calls["accuracy"])
        at_least("thinking: blocks well formed", BARS["well_formed"], report["thinking"]["well_formed"]["accuracy"])
        at_least("first drafts accepted", BARS["drafts"], report["drafts"]["accuracy"])
    return [dict(zip(("claim", "bar", "measured", "unit", "pass"), row)) for row in rows]


def table(report: dict[str, Any]) -> str:
    """The report as lines of text for a person."""
    lines = []
    for part in PARTS:
        if part not in report:
            continue
        result = report[part]
        lines.append(f"{part:<28}{_cell(result)}")
        for by in ("by_kind", "by_form", "by_group"):
            for name, entry in result[by].items():
                if by != "by_form" or name not in result["by_kind"]:
                    lines.append(f"  {name:<26}{_cell(entry)}")
        if "well_formed" in result:
            lines.append(f"  {'thinking well formed':<26}{_cell(result['well_formed'])}")
    if "drafts" in report:
        lines.append(f"{'first drafts accepted':<28}{_cell(report['drafts'])}")
    failed = [claim["claim"] for claim in report["claims"] if not claim["pass"]]
    lines.append("every bar is met" if not failed else "below the bar: " + "; ".join(failed))
    return "\n".join(lines)


def _cell(entry: dict[str, Any]) -> str:
    return f"{entry['accuracy']:7.2f}%  of {entry['num']}" if entry["num"] else "      -"


def model_answers(model: Any, processor: Any, *, max_new_tokens: int = 64) -> AnswerFunction:
    """Greedy answers of a model and its processor, as `minim3.load` returns them; a batch is one call of `generate`.

    What counts is all the text of the turn: control tokens are left out, a thought before the answer is not.
    """

    def answer(prompts: Sequence[Prompt]) -> list[str]:
        conversations = []
        for picture, text in prompts:
            content: list[dict[str, Any]] = [{"type": "text", "text": text}]
            if picture is not None:
                content.insert(0, {"type": "image", "image": picture})
            conversations.append([{"role": "user", "content": content}])
        inputs = processor.apply_chat_template(conversations).to(model.device)
        output = model.generate(
            **inputs, do_sample=False, max_new_tokens=max_new_tokens, eos_token_id=processor.tokenizer.eos_token_id
        )
        new_tokens = output[:, inputs["input_ids"].shape[1] :].tolist()
        return [processor.tokenizer.decode(ids, skip_special_tokens=True) for ids in new_tokens]

    return answer


def _progress_lines() -> Callable[[int, int], None]:
    last = [time.monotonic()]

    def show(done: int, total: int) -> None:
        if time.monotonic() - last[0] > 10 or done == total:
            last[0] = time.monotonic()
            print(f"{done} of {total} questions answered", file=sys.stderr)

    return show


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; exits with 0 when every bar is met, with 1 when not."""
    parser = argparse.ArgumentParser(prog="python -m minim3.pocket.evaluate", description=main.__doc__)
    parser.add_argument("--model", help="checkpoint folder or hub id (default: pocket)")
    parser.add_argument("--num", type=int, default=4000, help="picture questions")
    parser.add_argument("--num-text", type=int, default=900, help="text tasks")
    parser.add_argument("--num-clips", type=int, default=700, help="questions about clips")
    parser.add_argument("--num-tools", type=int, default=500, help="conversations with tools")
    parser.add_argument("--num-thinking", type=int, default=400, help="tasks with thinking modes")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batch-size", type=int, default=50)
    parser.add_argument("--device", default=None)
    parser.add_argument("--quantization", choices=("int8", "int4", "mxfp8"), help="see docs/weights.md")
    parser.add_argument("--json", type=Path, help="also write the report to this file")
    options = parser.parse_args(arguments)

    import minim3

    model, processor = minim3.load(options.model, device=options.device, quantization=options.quantization)
    started = time.monotonic()
    report = evaluate(
        model_answers(model, processor),
        options.num,
        options.seed,
        num_text_tasks=options.num_text,
        reply_fn=model_replies(model, processor),
        num_clips=options.num_clips,
        num_tools=options.num_tools,
        num_thinking=options.num_thinking,
        batch_size=options.batch_size,
        progress=_progress_lines(),
    )
    report["seconds"] = round(time.monotonic() - started, 1)
    print(table(report))
    text = json.dumps(report)
    if options.json:
        options.json.write_text(text + "\n", encoding="utf-8")
    print(text)
    return 0 if all(claim["pass"] for claim in report["claims"]) else 1


if __name__ == "__main__":
    sys.exit(main())
