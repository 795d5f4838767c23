"""From records to batches: the public names of the data pipeline.

sources.py   where records lie: JSONL, Parquet, datasets        order.py    in which order they are read
records.py   a record to ids, labels and patches, or its fault   packing.py  whole documents to batches
stream.py    the stream of batches and its position              workers.py  processes that read ahead
batch.py     what a source yields and what the model gets         bad_records.py  what is left out
"""

from minim3.training.bad_records import BadRecordsError
from minim3.training.batch import (
    EVALUATION_SPLIT,
    IGNORED,
    TRAINING_SPLIT,
    Batch,
    Clip,
    Group,
    Sample,
    Source,
    align_labels,
    load_attribute,
    load_processor,
)
from minim3.training.records import BadRecord, RecordError
from minim3.training.stream import BatchBuilder, BatchStream, evaluation_recipe

__all__ = [
    "EVALUATION_SPLIT",
    "IGNORED",
    "TRAINING_SPLIT",
    "BadRecord",
    "BadRecordsError",
    "Batch",
    "BatchBuilder",
    "BatchStream",
    "Clip",
    "Group",
    "RecordError",
    "Sample",
    "Source",
    "align_labels",
    "evaluation_recipe",
    "load_attribute",
    "load_processor",
]
