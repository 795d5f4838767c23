"""`generate` here and in transformers on the same random weights: greedy tokens, alone and in left-padded batches."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("transformers")

from minim3.model.causal_lm import MiniMaxM3SparseForConditionalGeneration
from tests.parity.oracle import random_inputs, random_model

CLOSE = 1e-4  # where the top two logits lie closer than this, either token is right
NEW = 12


def both(seed: int, folder: Path) -> tuple[Any, MiniMaxM3SparseForConditionalGeneration]:
    theirs = random_model(seed)
    theirs.save_pretrained(folder)
    return theirs, MiniMaxM3SparseForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)


def close_calls(theirs: Any, ours: Tensor, expected: Tensor, width: int, **inputs: Tensor) -> int:
    """0 where the new tokens of one row are equal, 1 where they part at two logits within 1e-4; fails otherwise."""
    for place in range(width, expected.shape[0]):
        if ours[place] != expected[place]:
            inputs["input_ids"] = expected[None, :place]
            best = theirs(**inputs).logits[0, -1].topk(2)
            assert {int(ours[place]), int(expected[place])} == set(best.indices.tolist()), place - width
            assert best.values[0] - best.values[1] < CLOSE, place - width
            return 1
    return 0


def their_tokens(theirs: Any, **inputs: Any) -> Tensor:
    return theirs.generate(**inputs, do_sample=False, max_new_tokens=NEW, eos_token_id=None, pad_token_id=0)


@pytest.mark.parametrize("seed", range(4))
@torch.inference_mode()
def test_greedy_tokens_of_a_prompt_with_pictures_and_a_clip(seed: int, tmp_path: Path) -> None:
    theirs, ours = both(seed, tmp_path)
    inputs = random_inputs(seed, 80 + 13 * seed)
    width = inputs["input_ids"].shape[1]
    expected = their_tokens(theirs, **inputs)
    for options in ({}, {"prefill_chunk": 9, "shuffle_pages_seed": seed, "page_size": 5}):
        got = ours.generate(**inputs, do_sample=False, max_new_tokens=NEW, eos_token_id=None, **options)
        assert got.shape == expected.shape
        assert close_calls(theirs, got[0], expected[0], width, **inputs) == 0


@pytest.mark.parametrize("seed", [4, 5])
@torch.inference_mode()
def test_greedy_tokens_of_a_left_padded_batch(seed: int, tmp_path: Path) -> None:
    """Rows with media and rows of text, of different lengths: ours in one batch, theirs one row at a time.

    transformers counts blocks from the start of the padded row: its padded rows are not what the same rows give alone.
    """
    theirs, ours = both(seed, tmp_path)
    g = torch.Generator().manual_seed(seed)
    rows: list[dict[str, Tensor]] = [
        random_inputs(seed, 70),
        {"input_ids": torch.randint(3, 300, (1, 41), generator=g)},
        random_inputs(seed + 1, 64),
        {"input_ids": torch.randint(3, 300, (1, 5), generator=g)},
    ]
    ids, mask = torch.zeros(4, 70, dtype=torch.long), torch.zeros(4, 70, dtype=torch.long)
    for i, row in enumerate(rows):
        length = row["input_ids"].shape[1]
        ids[i, 70 - length :], mask[i, 70 - length :] = row["input_ids"][0], 1
    media = {name: torch.cat([rows[0][name], rows[2][name]]) for name in rows[0] if name != "input_ids"}
    got = ours.generate(ids, attention_mask=mask, **media, max_new_tokens=NEW, eos_token_id=None)
    assert torch.equal(got[:, :70], ids)
    for i, row in enumerate(rows):
        length = row["input_ids"].shape[1]
        expected = their_tokens(theirs, **row)[0]
        assert close_calls(theirs, got[i, 70 - length :], expected, length, **row) == 0


@torch.inference_mode()
def test_rows_end_at_eos_as_theirs_do(tmp_path: Path) -> None:
    """The same tokens, then the same fill, from the same column on."""
    theirs, ours = both(7, tmp_path)
    g = torch.Generator().manual_seed(1)
    ids = torch.randint(3, 300, (3, 20), generator=g)
    free = their_tokens(theirs, input_ids=ids)
    eos = [int(free[0, 20 + 3]), int(free[1, 20 + 6])]
    options = {"max_new_tokens": NEW, "eos_token_id": eos, "pad_token_id": 9}
    expected = theirs.generate(input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False, **options)
    assert torch.equal(ours.generate(ids, do_sample=False, **options), expected)
