"""Operations of a step: the function against what torch counts on the reference implementations."""

from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from minim3.kernels.reference import select_blocks, selected_keys_mask
from minim3.model.causal_lm import MiniMaxM3SparseForCausalLM, MiniMaxM3SparseForConditionalGeneration
from minim3.training.config import LossRecipe
from minim3.training.data import IGNORED, Batch
from minim3.training.flops import Pairs, selected_pairs, training_flops, visible_pairs
from minim3.training.loss import compute_losses
from tests.tiny_models import media_prompt, randomize, text_config, vl_config

# The reference computes every pair of a document and masks: what torch counts, the function must count too.
EVERY_PAIR = Pairs(visible=lambda length: length**2, selected=lambda length: length**2)


def product_added(old: Any, left: Any, right: Any, **others: Any) -> int:
    return 2 * left[0] * left[1] * right[1]


def counted(model: Any, batch: Batch, recipe: LossRecipe) -> int:
    # torch counts the product that makes a new tensor, not the one that adds to an old.
    with FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm_: product_added}) as counter:
        compute_losses(model, batch, recipe).total.backward()
    return counter.get_total_flops()


def text_batch(lengths: tuple[int, ...]) -> Batch:
    ids = torch.randint(3, 60, (sum(lengths),), generator=torch.Generator().manual_seed(0))
    labels = ids.roll(-1)
    ends = torch.tensor(lengths).cumsum(0) - 1
    labels[ends] = IGNORED
    return Batch(ids, labels, lengths, ("text",) * len(lengths))


def text_model(**changes: Any) -> Any:
    model = MiniMaxM3SparseForCausalLM(text_config(**changes), backend="reference")
    randomize(model, 0)
    return model.train()


@pytest.fixture
def every_pair(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Pairs, "of_model", lambda text: EVERY_PAIR)


@pytest.mark.usefixtures("every_pair")
@pytest.mark.parametrize("lengths", [(9,), (30, 7)], ids=["all blocks chosen", "some blocks chosen"])
@pytest.mark.parametrize(
    "recipe",
    [
        LossRecipe(recall_every_steps=0),
        LossRecipe(recall_every_steps=0, indexer_kl_weight=0.5, mtp_weight=0.3),
        LossRecipe(recall_every_steps=0, indexer_kl_weight=0.5, indexer_kl_form="dense"),
    ],
    ids=["next token", "drafts and sparse KL", "dense KL"],
)
def test_a_text_step_is_what_torch_counts(lengths: tuple[int, ...], recipe: LossRecipe) -> None:
    """A layer, the head, the indexer or a depth left out or counted twice: the share of the peak is wrong unnoticed."""
    model, batch = text_model(num_mtp_modules=2), text_batch(lengths)
    assert training_flops(model, batch, recipe) == counted(model, batch, recipe)


@pytest.mark.usefixtures("every_pair")
@pytest.mark.parametrize("frozen", [(), ("language_model.",), ("vision_tower.", "multi_modal", "patch_merge")])
def test_a_step_with_media_is_what_torch_counts(frozen: tuple[str, ...]) -> None:
    """Frozen parts take no gradients of their weights, and none of their inputs where nothing below them trains."""
    model: Any = MiniMaxM3SparseForConditionalGeneration(vl_config(), backend="reference")
    randomize(model, 0)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not name.startswith(frozen) if frozen else True)
    media = media_prompt()
    ids = media.pop("input_ids")[0]
    labels = torch.where(torch.arange(ids.shape[0]) < ids.shape[0] - 5, IGNORED, ids.roll(-1))
    batch = Batch(ids, labels, (ids.shape[0],), ("media",), **media)
    assert training_flops(model, batch, LossRecipe(recall_every_steps=0)) == counted(
        model, batch, LossRecipe(recall_every_steps=0)
    )


@pytest.mark.parametrize("topk_blocks", [1, 2, 5])
def test_pairs_are_those_of_the_masks(topk_blocks: int) -> None:
    """Attention counted over all keys, or over blocks that lie ahead, would flatter the machine."""
    text = text_config(index_topk_blocks=topk_blocks)
    generator = torch.Generator().manual_seed(1)
    for length in range(1, 40):
        index_q, index_k = (torch.randn(length, *shape, generator=generator) for shape in ((2, 4), (4,)))
        blocks = select_blocks(
            index_q, index_k, [0, length], [0, length], block_size=text.index_block_size, topk_blocks=topk_blocks
        )
        causal = torch.ones(length, length, dtype=torch.bool).tril()
        mask = selected_keys_mask(blocks, length, text.index_block_size)[:, 0] & causal
        assert selected_pairs(length, text) == mask.sum(), length
        assert visible_pairs(length) == causal.sum()
