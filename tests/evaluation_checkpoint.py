"""A whole tiny checkpoint with random weights and a byte-level tokenizer, for the tests of evaluation."""

import json
from pathlib import Path
from typing import Any

from minim3.config import MiniMaxM3VLConfig, MiniMaxM3VLVisionConfig
from minim3.model.causal_lm import MiniMaxM3SparseForConditionalGeneration
from minim3.processing.image import MiniMaxM3VLImageProcessor
from minim3.processing.processor import MiniMaxM3VLProcessor
from minim3.processing.tokenizer import Tokenizer
from minim3.processing.video import MiniMaxM3VLVideoProcessor
from tests.tiny_models import randomize, text_config

MAX_POSITIONS = 600


def tiny_model(tokenizer: Tokenizer) -> MiniMaxM3SparseForConditionalGeneration:
    ids = {name: tokenizer.token_to_id(name) for name in ("]~!b[", "[e~[", "]<]image[>[", "]<]video[>[")}
    assert None not in ids.values()
    text = text_config(
        vocab_size=450, max_position_embeddings=MAX_POSITIONS, index_topk_blocks=16, index_block_size=16,
        bos_token_id=ids["]~!b["], eos_token_id=ids["[e~["],
    )  # fmt: skip
    vision = MiniMaxM3VLVisionConfig(hidden_size=24, num_hidden_layers=1, num_attention_heads=2, intermediate_size=40)
    image, video = ids["]<]image[>["], ids["]<]video[>["]
    assert image is not None
    assert video is not None
    model = MiniMaxM3SparseForConditionalGeneration(
        MiniMaxM3VLConfig(
            text_config=text, vision_config=vision, image_token_index=image, video_token_index=video,
            projector_hidden_size=20,
        )
    )  # fmt: skip
    randomize(model, 3)
    return model.eval()


def tiny_processor(tokenizer: Tokenizer) -> MiniMaxM3VLProcessor:
    return MiniMaxM3VLProcessor(MiniMaxM3VLImageProcessor(), tokenizer, MiniMaxM3VLVideoProcessor())


def write_tiny(folder: Path, tokenizer: Tokenizer) -> Path:
    tiny_model(tokenizer).save_pretrained(folder, format="fp32")
    tiny_processor(tokenizer).save_pretrained(folder)
    return folder


def write_lines(file: Path, *records: Any) -> Path:
    """A JSONL file; text goes in as it stands."""
    lines = [record if isinstance(record, str) else json.dumps(record) for record in records]
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return file
