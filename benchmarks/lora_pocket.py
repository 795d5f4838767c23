"""What a LoRA adapter learns from 500 examples of a new kind of question, in how long, and what the old kinds lose.

Follows recipes/lora.yaml on data of examples/lora_task.py. Questions are fresh and answered greedily, old and new ones
the same before and after; the old kinds are those of `minim3.pocket.evaluate`.
"""

import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch

from benchmarks.report import Claim, arguments, publish
from examples.lora_task import examples, write
from minim3.loading import load
from minim3.model.adapter import load_adapter
from minim3.pocket.evaluate import AnswerFunction, fresh_questions, fresh_text_tasks, model_answers, score
from minim3.pocket.world import draw
from minim3.training.config import TrainingConfig, load_recipe
from minim3.training.trainer import train

RECIPE = Path(__file__).parent.parent / "recipes" / "lora.yaml"
NUM_EXAMPLES, BATCH = 500, 50


def new_kind(answer: AnswerFunction, num: int) -> float:
    """Percent of fresh questions of the new kind answered right."""
    cases = [((draw(scene), question), expected) for scene, question, expected in examples("test", num, seed=1)]
    right = 0
    for start in range(0, num, BATCH):
        batch = cases[start : start + BATCH]
        got = answer([prompt for prompt, _ in batch])
        right += sum(given.strip(" .").lower() == expected for given, (_, expected) in zip(got, batch))
    return 100 * right / num


def old_kinds(answer: AnswerFunction, num: int) -> dict[str, float]:
    """Percent right of the questions pocket was made for: about pictures, and of text."""
    parts = {"pictures": fresh_questions(1, num), "text": fresh_text_tasks(1, num // 4)}
    found = {}
    for name, cases in parts.items():
        answers: list[str] = []
        for start in range(0, len(cases), BATCH):
            answers += answer([case.prompt() for case in cases[start : start + BATCH]])
        found[name] = float(score(cases, answers)["accuracy"])
    return found


def recipe_for(folder: Path, overrides: list[str]) -> TrainingConfig:
    """recipes/lora.yaml, with its data and its output in `folder`."""
    data = [f"data.sources.0.files=[{folder}/task/train.jsonl]", f"output={folder}/run"]
    recipe = load_recipe(RECIPE, [*data, *overrides])
    sources = tuple(replace(source, files=(f"{folder}/task/test.jsonl",)) for source in recipe.evaluation.sources)
    return replace(recipe, evaluation=replace(recipe.evaluation, sources=sources))


@torch.inference_mode()
def largest_difference(adapter: Path, base: str) -> float:
    """Of logits, between the merged weights and base and adapter side by side."""
    merged, processor = load(base, adapter=adapter)
    beside, _ = load(base)
    load_adapter(beside, adapter)
    (scene, question, _), *_ = examples("test", 1)
    content = [{"type": "image", "image": draw(scene)}, {"type": "text", "text": question}]
    inputs = processor.apply_chat_template([{"role": "user", "content": content}])
    return float((merged(**inputs).logits - beside(**inputs).logits).abs().max())


def main() -> None:
    parser = arguments(__doc__ or "")
    parser.add_argument("--num-new", type=int, default=500, help="questions of the new kind")
    parser.add_argument("--num-old", type=int, default=2000, help="questions of the old kinds about pictures")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="of the recipe, e.g. steps=100 threads=1")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write(folder / "task", "train", NUM_EXAMPLES)
        write(folder / "task", "test", 100)
        recipe = recipe_for(folder, options.overrides)
        assert recipe.model.start_from is not None
        model, processor = load(recipe.model.start_from)
        answer = model_answers(model, processor)
        before, new_before = old_kinds(answer, options.num_old), new_kind(answer, options.num_new)
        started, cpu_started = time.perf_counter(), time.process_time()
        adapter = train(recipe).export_path
        minutes, cpu_minutes = (time.perf_counter() - started) / 60, (time.process_time() - cpu_started) / 60
        assert adapter is not None
        model, processor = load(recipe.model.start_from, adapter=adapter)
        answer = model_answers(model, processor)
        after, new_after = old_kinds(answer, options.num_old), new_kind(answer, options.num_new)
        difference = largest_difference(adapter, recipe.model.start_from)
        size = sum(file.stat().st_size for file in adapter.iterdir()) / 2**20
    drops = [Claim(f"LoRA on pocket: old kinds, {part}: lost", 1.0, before[part] - after[part], "points", at_most=True)
             for part in before]  # fmt: skip
    publish(
        [
            Claim("LoRA on pocket: new kind of question before", None, new_before, "%"),
            Claim(f"LoRA on pocket: new kind from {NUM_EXAMPLES} examples", 85.0, new_after, "%"),
            *drops,
            *(Claim(f"LoRA on pocket: old kinds, {part}: after", None, after[part], "%") for part in after),
            Claim("LoRA on pocket: training", 10.0, minutes, "min", at_most=True),
            Claim("LoRA on pocket: training, processor time of the main process", None, cpu_minutes, "min"),
            Claim("LoRA on pocket: merged against base and adapter, logits", 1e-4, difference, "", at_most=True),
            Claim("LoRA on pocket: the adapter on disk", None, size, "MiB"),
        ],
        options.json,
    )


if __name__ == "__main__":
    main()
