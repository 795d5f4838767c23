"""Records, files and a processor for the tests of the data pipeline; recipes name what is here."""

import json
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from minim3.processing.processor import MiniMaxM3VLProcessor
from minim3.training.config import DataRecipe, SourceRecipe
from minim3.training.data import Batch

ROOT = Path(__file__).parent.parent
WEIGHTS = ROOT / "minim3" / "pocket" / "weights"
IMAGE_TOKEN_ID, VIDEO_TOKEN_ID, VOCAB_SIZE = 1149, 1150, 1533


@cache
def pocket_processor() -> MiniMaxM3VLProcessor:
    """pocket's, with clips in chunks of several moments, as the released model has them."""
    processor = MiniMaxM3VLProcessor.from_pretrained(WEIGHTS)
    assert processor.video_processor is not None
    processor.video_processor = processor.video_processor.with_settings(vision_segment_max_frames=4)
    return processor


def chat(question: Any, answer: Any, **fields: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}], **fields}


def write_jsonl(path: Path, records: Sequence[Any]) -> Path:
    """One line a record; a record that is bytes is written as it is."""
    lines = [record if isinstance(record, bytes) else json.dumps(record).encode() for record in records]
    path.write_bytes(b"".join(line + b"\n" for line in lines))
    return path


def write_picture(path: Path, seed: int = 0, size: tuple[int, int] = (56, 56)) -> Path:
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)).save(path)
    return path


def file_source(*paths: Path, **options: Any) -> SourceRecipe:
    return SourceRecipe(files=tuple(map(str, paths)), **options)


def data_recipe(*sources: SourceRecipe, **options: Any) -> DataRecipe:
    defaults = {"tokens_per_batch": 300, "num_workers": 0}
    return DataRecipe("tests.data_standins:pocket_processor", sources, **{**defaults, **options})


def same(one: Batch, two: Batch) -> bool:
    return all(
        torch.equal(value, vars(two)[name]) if isinstance(value, torch.Tensor) else value == vars(two)[name]
        for name, value in vars(one).items()
    )


def documents(batch: Batch) -> list[str]:
    """The text of every document, control tokens included."""
    return [pocket_processor().decode(ids) for ids in batch.input_ids.split(batch.lengths)]


def targets(batch: Batch) -> list[str]:
    """What each document trains the model to write."""
    return [pocket_processor().decode(labels[labels >= 0]) for labels in batch.labels.split(batch.lengths)]
