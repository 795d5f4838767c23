"""The same weights in transformers and here: equal logits, losses and greedy tokens, both ways round."""

from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")

from minim3.model.causal_lm import MiniMaxM3SparseForCausalLM, MiniMaxM3SparseForConditionalGeneration
from tests.parity.oracle import random_inputs, random_model


@pytest.mark.parametrize("seed", range(6))
@torch.inference_mode()
def test_a_checkpoint_of_transformers_gives_the_same_logits_here(seed: int, tmp_path: Path) -> None:
    theirs = random_model(seed)
    theirs.save_pretrained(tmp_path)
    ours = MiniMaxM3SparseForConditionalGeneration.from_pretrained(tmp_path, dtype=torch.float32)
    inputs = random_inputs(seed, 120)
    expected = theirs(**inputs, output_hidden_states=True, output_router_logits=True)
    got = ours(**inputs, output_hidden_states=True, output_router_logits=True)
    torch.testing.assert_close(got.logits, expected.logits, atol=1e-4, rtol=1e-4)
    for layer, (a, b) in enumerate(zip(got.hidden_states, expected.hidden_states, strict=True)):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4, msg=lambda text, layer=layer: f"layer {layer}: {text}")
    for a, b in zip(got.router_logits or (), expected.router_logits or (), strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)
    pictures = torch.cat(list(expected.image_hidden_states))  # theirs: a tensor a picture
    torch.testing.assert_close(got.image_hidden_states, pictures, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("seed", range(6, 9))
@torch.inference_mode()
def test_our_checkpoint_gives_the_same_logits_in_transformers(seed: int, tmp_path: Path) -> None:
    theirs = random_model(seed)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = MiniMaxM3SparseForConditionalGeneration.from_pretrained(tmp_path / "theirs", dtype=torch.float32)
    ours.save_pretrained(tmp_path / "ours")
    again = type(theirs).from_pretrained(tmp_path / "ours", dtype=torch.float32)
    inputs = random_inputs(seed, 90)
    torch.testing.assert_close(again(**inputs).logits, theirs(**inputs).logits, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(ours(**inputs).logits, theirs(**inputs).logits, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("seed", range(3))
def test_loss_and_gradients(seed: int, tmp_path: Path) -> None:
    """The loss is the cross-entropy alone, and backpropagates like theirs, sparse layers included."""
    theirs = random_model(seed)
    theirs.save_pretrained(tmp_path)
    ours = MiniMaxM3SparseForConditionalGeneration.from_pretrained(tmp_path, dtype=torch.float32)
    inputs = random_inputs(seed, 100)
    labels = inputs["input_ids"].clone()
    labels[:, :20] = -100
    expected, got = theirs(**inputs, labels=labels), ours(**inputs, labels=labels)
    torch.testing.assert_close(got.loss, expected.loss, atol=1e-5, rtol=1e-5)
    expected.loss.backward()
    got.loss.backward()
    for mine, other in (
        (ours.get_input_embeddings(), theirs.get_input_embeddings()),
        (ours.get_output_embeddings(), theirs.get_output_embeddings()),
    ):
        largest = other.weight.grad.abs().max()
        assert (mine.weight.grad - other.weight.grad).abs().max() <= 1e-4 * largest


@torch.inference_mode()
def test_a_padded_batch_equals_its_rows_and_transformers(tmp_path: Path) -> None:
    theirs = random_model(3)
    theirs.save_pretrained(tmp_path)
    ours = MiniMaxM3SparseForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    g = torch.Generator().manual_seed(5)
    rows = [torch.randint(3, 300, (n,), generator=g) for n in (61, 17, 90)]
    ids, mask = torch.zeros(3, 90, dtype=torch.long), torch.zeros(3, 90, dtype=torch.long)
    for i, row in enumerate(rows):
        ids[i, : len(row)], mask[i, : len(row)] = row, 1
    got = ours(input_ids=ids, attention_mask=mask).logits
    for i, row in enumerate(rows):
        alone = theirs(input_ids=row[None]).logits
        torch.testing.assert_close(got[i, : len(row)], alone[0], atol=1e-4, rtol=1e-4)
