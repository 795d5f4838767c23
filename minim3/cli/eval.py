"""`minim3 eval`: how well a model does at tasks, as a table on stdout."""

import difflib
import json
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from minim3.cli.session import LoadOptions, SamplingOptions, Session
from minim3.evaluation.answers import BATCH_SIZE, greedy_answers
from minim3.evaluation.choice import choose, read_choice
from minim3.evaluation.exact import exact_match, read_exact
from minim3.evaluation.needle import (
    DEPTHS,
    MAX_NEW_TOKENS,
    NUM_KEYS,
    NeedleMaker,
    check_lengths,
    default_lengths,
    needle_table,
    run_needles,
)
from minim3.evaluation.perplexity import perplexity, text_pieces
from minim3.evaluation.records import Prompt, read_records, text_of
from minim3.evaluation.report import Measure, Share, TaskResult
from minim3.evaluation.scoring import BATCH_SIZE as SCORING_BATCH_SIZE

POCKET = "pocket"
# What an option is for; given for other tasks alone, it would do nothing.
_TASKS_OF_OPTION = {
    "lengths": ("needle", "retrieval"), "depths": ("needle", "retrieval"), "keys": ("retrieval",),
    "window": ("perplexity",), "stride": ("perplexity",), "max_new_tokens": ("exact", "needle", "retrieval"),
    "thinking": ("exact", "needle", "retrieval"), "raw": ("choice", "exact", "needle", "retrieval"),
}  # fmt: skip
# Tasks that read a file, with what it must be called; and those that make their own questions.
_FILE_TASKS = {"perplexity": "FILE", "choice": "FILE.jsonl", "exact": "FILE.jsonl", "lm_eval": "TASK"}
_OWN_TASKS = ("needle", "retrieval", POCKET)
_EXACT_NEW_TOKENS = 256
_NEEDLE_SAMPLES = 5
# Long prompts share the cache: as many run at once as make so many tokens.
_NEEDLE_TOKENS_AT_ONCE = 1 << 16
_PROGRESS_SECONDS = 10.0


@dataclass(frozen=True)
class Task:
    """A task as typed: `argument` is what stands after the colon, empty for tasks without one."""

    name: str
    argument: str = ""

    def __str__(self) -> str:
        return f"{self.name}:{self.argument}" if self.argument else self.name


@dataclass(frozen=True)
class EvalOptions:
    """What the options say, None where nothing was said."""

    limit: int | None = None
    batch_size: int | None = None
    seed: int = 0
    lengths: tuple[int, ...] | None = None
    depths: tuple[float, ...] | None = None
    keys: int | None = None
    window: int | None = None
    stride: int | None = None
    max_new_tokens: int | None = None
    thinking: str | None = None
    raw: bool = False


def run_eval(words: Sequence[str], load: LoadOptions, options: EvalOptions, json_file: Path | None) -> None:
    """Runs tasks in turn: each result on stdout, and those so far in `json_file`, when it is there."""
    source, tasks = split_words(words, load.model)
    for task in tasks:
        _check_file(task)
    _check_options(tasks, options)
    if json_file is not None and not json_file.parent.is_dir():
        raise ValueError(f"--json {json_file}: there is no folder {json_file.parent}")
    # Greedy whatever the checkpoint says, so that a figure can be measured again.
    session = Session(replace(load, model=source), SamplingOptions(greedy=True, repetition_penalty=1.0))
    rows = []
    for number, task in enumerate(tasks):
        result = _RUN[task.name](session, task, options)
        print("\n" * (number > 0) + "\n".join(result.lines()), flush=True)
        rows += [{**row, "model": source or POCKET, "adapter": load.adapter} for row in result.rows()]
        if json_file is not None:
            json_file.write_text(json.dumps(rows, indent=1, allow_nan=False) + "\n", encoding="utf-8")


def split_words(words: Sequence[str], model: str | None) -> tuple[str | None, list[Task]]:
    """The model and the tasks of `[MODEL] TASK...`.

    The first word is the model unless it is a task; "pocket" is the model that ships with minim3 where a task follows.
    """
    may_be_model = model is None and len(words) > 0
    first_is_model = may_be_model and not _is_task(words[0]) and not _is_misspelt(words[0])
    if may_be_model and words[0] == POCKET and len(words) > 1:
        first_is_model = True
    source, names = (words[0], words[1:]) if first_is_model else (model, words)
    if not names:
        near = "" if source is None else _nearest(source)
        raise ValueError(f"no task is given for {source}{near}: minim3 eval MODEL TASK..., tasks are {_known()}")
    return None if source == POCKET else source, [_parse(name) for name in names]


def _is_task(word: str) -> bool:
    name, colon, _ = word.partition(":")
    return name in _FILE_TASKS if colon else name in _OWN_TASKS or name in _FILE_TASKS


def _is_misspelt(word: str) -> bool:
    """`chioce:FILE` is no model: hub ids have no colon, and there is no such folder."""
    return ":" in word and not Path(word).exists()


def _parse(word: str) -> Task:
    name, colon, argument = word.partition(":")
    if name in _FILE_TASKS:
        if not argument:
            raise ValueError(f"task {word!r} needs {_FILE_TASKS[name]}: {name}:{_FILE_TASKS[name]}")
        return Task(name, argument)
    if name in _OWN_TASKS:
        if colon:
            raise ValueError(f"task {word!r}: {name} takes nothing after a colon")
        return Task(name)
    raise ValueError(f"unknown task {word!r}{_nearest(word)}; known: {_known()}")


def _nearest(word: str) -> str:
    near = difflib.get_close_matches(word.partition(":")[0], [*_FILE_TASKS, *_OWN_TASKS], n=1, cutoff=0.5)
    return f" (did you mean {near[0]}?)" if near else ""


def _known() -> str:
    return ", ".join([*(f"{name}:{what}" for name, what in _FILE_TASKS.items()), *_OWN_TASKS])


def _check_file(task: Task) -> None:
    """Before the model is loaded, which may take minutes."""
    if task.name in _FILE_TASKS and task.name != "lm_eval":
        path = Path(task.argument)
        if not path.is_file():
            what = "is a folder, a file is needed" if path.is_dir() else "does not exist"
            raise ValueError(f"task {task.name}: {path} {what}")


def _check_options(tasks: Sequence[Task], options: EvalOptions) -> None:
    for name, users in _TASKS_OF_OPTION.items():
        if getattr(options, name) not in (None, False) and not any(task.name in users for task in tasks):
            raise ValueError(f"--{name.replace('_', '-')} is for {', '.join(users)}; no such task is asked for")


def _run_perplexity(session: Session, task: Task, options: EvalOptions) -> TaskResult:
    path = Path(task.argument)
    by_line = path.suffix.lower() == ".jsonl"
    documents: Iterable[Iterable[str]]
    if by_line:
        documents = ((text_of(record, "text"),) for record in read_records(path, options.limit))
    else:
        documents = (text_pieces(path),)
    config = session.model.text_config
    with _Progress(str(task), "tokens") as progress:
        found = perplexity(
            session.model,
            session.processor.tokenizer,
            documents,
            window=options.window,
            stride=options.stride,
            prefix_id=config.bos_token_id,
            max_windows=None if by_line else options.limit,
            batch_size=options.batch_size or SCORING_BATCH_SIZE,
            progress=progress.show,
        )
    measures = (
        Measure("nats a token", found.nats_per_token, "nats", found.num_tokens),
        Measure("perplexity", found.perplexity, "", found.num_tokens),
        Measure("bits a byte", found.bits_per_byte, "bits", found.num_bytes),
    )
    return TaskResult(str(task), measures)


def _run_choice(session: Session, task: Task, options: EvalOptions) -> TaskResult:
    records = read_records(Path(task.argument), options.limit)
    read = partial(
        read_choice, processor=session.processor, raw=options.raw,
        max_tokens=session.model.text_config.max_position_embeddings,
    )  # fmt: skip
    with _Progress(str(task), "questions") as progress:
        found = choose(
            session.model, map(read, records), batch_size=options.batch_size or SCORING_BATCH_SIZE,
            progress=progress.show,
        )  # fmt: skip
    measures = Measure.of("accuracy", found.plain), Measure.of("accuracy, length-normalised", found.normalized)
    return TaskResult(str(task), measures)


def _run_exact(session: Session, task: Task, options: EvalOptions) -> TaskResult:
    thinking = options.thinking or "adaptive"
    records = read_records(Path(task.argument), options.limit)
    read = partial(
        read_exact, processor=session.processor, raw=options.raw, thinking=thinking,
        max_tokens=session.model.text_config.max_position_embeddings,
    )  # fmt: skip
    with _Progress(str(task), "answers") as progress:
        found = exact_match(
            _answer(session, options, thinking, _EXACT_NEW_TOKENS), map(read, records), progress=progress.show
        )
    return TaskResult(str(task), (Measure.of("exact match", found.share),))


def _run_needles(session: Session, task: Task, options: EvalOptions) -> TaskResult:
    num_keys = 1 if task.name == "needle" else options.keys or NUM_KEYS
    new_tokens = options.max_new_tokens or MAX_NEW_TOKENS
    limit = session.model.text_config.max_position_embeddings
    lengths = options.lengths or default_lengths(limit, new_tokens)
    check_lengths(lengths, limit, new_tokens)
    depths = options.depths or DEPTHS
    num_samples = options.limit or _NEEDLE_SAMPLES
    thinking = options.thinking or "disabled"
    if options.batch_size is None:
        options = replace(options, batch_size=max(1, min(BATCH_SIZE, _NEEDLE_TOKENS_AT_ONCE // max(lengths))))
    maker = NeedleMaker(session.processor, num_keys, raw=options.raw, thinking=thinking)
    for length in lengths:  # a length without room is found before the first minutes are spent
        maker.make(length, depths[0], "room")
    with _Progress(str(task), "answers", len(lengths) * len(depths) * num_samples) as progress:
        shares = run_needles(
            _answer(session, options, thinking, new_tokens), maker, lengths=lengths, depths=depths,
            num_samples=num_samples, seed=options.seed, progress=progress.show,
        )  # fmt: skip
    measures = [
        Measure.of(f"{length} tokens, depth {100 * depth:g}%", share) for (length, depth), share in shares.items()
    ]
    every = Measure.of("all", Share(sum(one.right for one in shares.values()), sum(one.num for one in shares.values())))
    keys = f"{num_keys} keys, " if num_keys > 1 else ""
    note = f"{keys}{num_samples} prompts a cell; {every.value:.2f}% of all {every.num}"
    return TaskResult(str(task), (*measures, every), needle_table(shares), (note,))


def _run_pocket(session: Session, task: Task, options: EvalOptions) -> TaskResult:
    from minim3.pocket import evaluate as pocket

    sizes: dict[str, Any] = {}
    if options.limit is not None:
        parts = ("n", "num_text_tasks", "num_clips", "num_tools", "num_thinking")
        sizes = dict.fromkeys(parts, options.limit)
    if options.batch_size is not None:
        sizes["batch_size"] = options.batch_size
    with _Progress(str(task), "questions") as progress:
        report = pocket.evaluate(
            pocket.model_answers(session.model, session.processor), seed=options.seed, **sizes,
            reply_fn=pocket.model_replies(session.model, session.processor),
            progress=lambda done, total: progress.show(done, total),
        )  # fmt: skip
    measures = [
        Measure(row["claim"], row["measured"], row["unit"], bar=row["bar"], passed=row["pass"])
        for row in report["claims"]
    ]
    return TaskResult(task.name, tuple(measures), pocket.table(report))


def _run_lm_eval(session: Session, task: Task, options: EvalOptions) -> TaskResult:
    from minim3.integrations.lm_eval import run_task

    figures = run_task(
        session.model, session.processor, task.argument, limit=options.limit, batch_size=options.batch_size,
        seed=options.seed,
    )  # fmt: skip
    return TaskResult(
        str(task),
        tuple(Measure(name, value, "", num, error) for name, value, error, num in figures),
    )


_RUN: Mapping[str, Callable[[Session, Task, EvalOptions], TaskResult]] = {
    "perplexity": _run_perplexity,
    "choice": _run_choice,
    "exact": _run_exact,
    "needle": _run_needles,
    "retrieval": _run_needles,
    POCKET: _run_pocket,
    "lm_eval": _run_lm_eval,
}


def _answer(
    session: Session, options: EvalOptions, thinking: str, new_tokens: int
) -> Callable[[Iterable[Prompt]], Iterator[str]]:
    return partial(
        greedy_answers, session.model, session.processor.tokenizer, thinking=thinking, raw=options.raw,
        eos_token_ids=session.params.eos_token_ids, max_new_tokens=options.max_new_tokens or new_tokens,
        batch_size=options.batch_size or BATCH_SIZE,
    )  # fmt: skip


def parse_list(text: str | None, name: str, kind: Callable[[str], Any], example: str) -> tuple[Any, ...] | None:
    """`1024,4096` as numbers. Raises ValueError for anything else."""
    if text is None:
        return None
    try:
        values = tuple(kind(part.strip()) for part in text.split(","))
    except ValueError:
        raise ValueError(f"--{name} is {text!r}; numbers with commas between are needed, e.g. {example}") from None
    return tuple(dict.fromkeys(values))


class _Progress:
    """How far a task is, on stderr: one line that changes on a terminal, else a line every ten seconds."""

    def __init__(self, task: str, unit: str, total: int | None = None) -> None:
        self._task, self._unit, self._total = task, unit, total
        self._live = sys.stderr.isatty()
        self._started = self._last = time.monotonic()

    def __enter__(self) -> "_Progress":
        return self

    def show(self, done: int, total: int | None = None) -> None:
        now = time.monotonic()
        if now - self._last < (0.2 if self._live else _PROGRESS_SECONDS):
            return
        self._last = now
        total = total or self._total
        of = f" of {total:,}" if total else ""
        line = f"{self._task}: {done:,}{of} {self._unit}, {now - self._started:.0f} s"
        print(f"\r\x1b[K{line}" if self._live else line, end="" if self._live else "\n", file=sys.stderr, flush=True)

    def __exit__(self, *_: object) -> None:
        if self._live:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)
