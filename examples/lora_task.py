"""A kind of question that pocket was never trained on, as data files: which corner is an object closest to?

    python examples/lora_task.py runs/lora-task                      500 examples to train on, 500 to test
    minim3 train recipes/lora.yaml

Writes `train.jsonl`, `test.jsonl` and a folder of pictures. A line is one conversation in OpenAI's form, with the path
of its picture beside it, as `minim3 train` reads it (docs/training.md). No picture is in both files.
"""

import argparse
import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from minim3.pocket.world import HELD_OUT_PAIRS, PICTURE_SIZE, Scene, SceneObject, draw, random_scene

KIND = "corner"
WORDINGS = (
    "Which corner is {the} closest to?",
    "Which corner of the picture is {the} nearest to?",
    "What is the corner closest to {the}?",
)
MARGIN = 10  # pixels from the middle lines, nearer to which the answer would be in doubt
SPLITS = ("train", "test")


def corner(item: SceneObject) -> str | None:
    """The corner closest to the centre of an object, None where two are about as close."""
    middle = PICTURE_SIZE / 2
    if min(abs(item.x - middle), abs(item.y - middle)) < MARGIN:
        return None
    return f"{'top' if item.y < middle else 'bottom'} {'left' if item.x < middle else 'right'}"


def examples(split: str, num: int, seed: int = 0) -> Iterator[tuple[Scene, str, str]]:
    """Scenes with a question each and its answer: one picture, one question."""
    rng = np.random.default_rng([SPLITS.index(split), seed, 20_240_601])
    found = 0
    while found < num:
        scene = random_scene(rng)
        looks = Counter(item.pair for item in scene.objects)
        items = [i for i in scene.objects if corner(i) and looks[i.pair] == 1 and i.pair not in HELD_OUT_PAIRS]
        if not items:
            continue
        item = items[int(rng.integers(len(items)))]
        wording = WORDINGS[int(rng.integers(len(WORDINGS)))]
        answer = corner(item)
        assert answer is not None
        yield scene, wording.format(the=f"the {item.colour} {item.shape}"), answer
        found += 1


def write(folder: Path, split: str, num: int, seed: int = 0) -> Path:
    """`folder/SPLIT.jsonl` with `num` conversations, and their pictures."""
    pictures = folder / "pictures"
    pictures.mkdir(parents=True, exist_ok=True)
    file = folder / f"{split}.jsonl"
    with file.open("w", encoding="utf-8") as lines:
        for number, (scene, question, answer) in enumerate(examples(split, num, seed)):
            picture = pictures / f"{split}-{number}.png"
            Image.fromarray(draw(scene)).save(picture)
            content: list[dict[str, Any]] = [{"type": "image"}, {"type": "text", "text": question}]
            messages = [{"role": "user", "content": content}, {"role": "assistant", "content": answer}]
            record = {"messages": messages, "images": [str(picture.relative_to(folder))], "kind": KIND}
            lines.write(json.dumps(record) + "\n")
    return file


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--num", type=int, default=500, help="examples to train on (500)")
    parser.add_argument("--num-test", type=int, default=500, help="examples to test (500)")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    for split, num in zip(SPLITS, (options.num, options.num_test)):
        print(f"{num} examples in {write(options.folder, split, num, options.seed)}")


if __name__ == "__main__":
    main()
