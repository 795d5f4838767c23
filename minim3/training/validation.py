"""The score on held-out documents during a run."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from minim3.training.config import TrainingConfig
from minim3.training.data import EVALUATION_SPLIT, IGNORED, Batch, BatchStream, evaluation_recipe
from minim3.training.loss import compute_losses
from minim3.training.optim import MovingAverage


def build_evaluation_batches(recipe: TrainingConfig, device: torch.device) -> list[Batch]:
    """Batches of a stream that training never draws from; none when the recipe does not evaluate."""
    if not recipe.evaluation.every_steps:
        return []
    data = evaluation_recipe(recipe.data, recipe.evaluation.sources)
    with BatchStream(data, seed=recipe.seed, split=EVALUATION_SPLIT) as stream:
        return [next(stream).to(device) for _ in range(recipe.evaluation.batches)]


@torch.no_grad()
def evaluate(
    model: Any, batches: Sequence[Batch], recipe: TrainingConfig, average: MovingAverage | None = None
) -> dict[str, float]:
    """Share of documents of each kind whose targets are all the model's first choice, of the averaged weights if any.

    That is the share of conversations whose every answer greedy decoding gets exactly right, without decoding one.
    Beside the kinds: `all`, `loss` (next token) and `draft` (targets that the first MTP depth would have drafted).
    """
    if average is not None:
        average.swap()
    model.eval()
    right: dict[str, int] = defaultdict(int)
    documents: dict[str, int] = defaultdict(int)
    loss = draft_right = draft_total = 0.0
    for batch in batches:
        losses = compute_losses(model, batch, replace(recipe.loss, indexer_kl_weight=0.0, recall_every_steps=0))
        for kind, answer_is_right in zip(batch.kinds, right_documents([batch], losses.correct).tolist(), strict=True):
            documents[kind] += 1
            right[kind] += answer_is_right
        loss += float(losses.parts["next_token"]) / len(batches)
        if losses.draft_correct is not None:
            draft_right += float(losses.draft_correct.sum())
            draft_total += losses.draft_correct.numel()
    model.train()
    if average is not None:
        average.swap()
    scores = {kind: right[kind] / documents[kind] for kind in sorted(documents)}
    scores["all"] = sum(right.values()) / max(1, sum(documents.values()))
    scores["loss"] = loss
    if draft_total:
        scores["draft"] = draft_right / draft_total
    return scores


def right_documents(batches: Sequence[Batch], correct: Tensor) -> Tensor:
    """bool `[D]`, of all documents: no target is missed. `correct` has one entry a target, like that of `Losses`."""
    missed, start = [], 0
    for batch in batches:
        document = batch.document_ids()[batch.labels != IGNORED]
        wrong = torch.zeros(len(batch.lengths), dtype=torch.int64, device=correct.device)
        of_batch = correct[start : start + document.shape[0]]
        missed.append(wrong.index_add_(0, document, (~of_batch).long()))
        start += document.shape[0]
    return torch.cat(missed) == 0
