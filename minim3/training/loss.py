"""The losses of a packed batch: next token, multi-token prediction, indexer alignment.

T  tokens of the batch      n  target positions among them      H  hidden size      V  vocabulary
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from minim3.model.batch import ForwardBatch, ForwardRecord
from minim3.training.config import LossRecipe
from minim3.training.data import IGNORED, Batch


class ChunkedCrossEntropy(torch.autograd.Function):
    """Mean cross-entropy of `hidden @ weight.T`, a chunk of rows at a time: logits `[n, V]` never exist whole.

    The gradients are made in the forward pass, while the logits of a chunk are at hand: with p = softmax(logits),
    d loss / d logits = (p - onehot(target)) / n.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, chunk_tokens: int) -> tuple[Tensor, Tensor]:
        """hidden `[n, H]`, weight `[V, H]`, targets int64 `[n]` -> the mean, and bool `[n]`: target is argmax."""
        compute = torch.promote_types(hidden.dtype, torch.float32)
        num_targets = max(targets.shape[0], 1)
        wants_hidden, wants_weight = ctx.needs_input_grad[:2]
        grad_hidden = torch.empty_like(hidden) if wants_hidden else None
        grad_weight = torch.zeros_like(weight) if wants_weight else None
        total = hidden.new_zeros((), dtype=compute)
        correct = torch.empty_like(targets, dtype=torch.bool)
        for start in range(0, targets.shape[0], chunk_tokens):
            rows = slice(start, start + chunk_tokens)
            chunk, target = hidden[rows], targets[rows].unsqueeze(1)
            logits = (chunk @ weight.T).to(compute)
            correct[rows] = logits.argmax(-1) == target.squeeze(1)
            log_total = logits.logsumexp(-1, keepdim=True)
            total += (log_total - logits.gather(1, target)).sum()
            if grad_hidden is None and grad_weight is None:
                continue
            probabilities = logits.sub_(log_total).exp_()
            probabilities.scatter_add_(1, target, torch.full_like(target, -1, dtype=compute))
            grad_logits = probabilities.div_(num_targets).to(hidden.dtype)
            if grad_hidden is not None:
                torch.mm(grad_logits, weight, out=grad_hidden[rows])
            if grad_weight is not None:
                grad_weight.addmm_(grad_logits.T, chunk)
        ctx.save_for_backward(grad_hidden, grad_weight)
        ctx.mark_non_differentiable(correct)
        return total / num_targets, correct

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        grad_hidden, grad_weight = ctx.saved_tensors
        scale = grads[0]
        return (
            None if grad_hidden is None else grad_hidden * scale.to(grad_hidden.dtype),
            None if grad_weight is None else grad_weight * scale.to(grad_weight.dtype),
            None,
            None,
        )


@dataclass(frozen=True)
class LossCounts:
    """What the losses are means over, of one batch or of all batches of a step (`LossCounts.of(batches, depths)`)."""

    tokens: int
    targets: int
    draft_targets: tuple[int, ...]  # of each MTP depth

    @classmethod
    def of(cls, batches: Sequence[Batch], num_depths: int) -> "LossCounts":
        depths = [[_num_targets(labels) for labels in mtp_labels(batch, num_depths)] for batch in batches]
        return cls(
            sum(batch.num_tokens for batch in batches),
            sum(_num_targets(batch.labels) for batch in batches),
            tuple(sum(counts) for counts in zip(*depths, strict=True)),
        )


@dataclass
class Losses:
    """What one forward pass gives the trainer. `parts` holds every loss unweighted, for the log."""

    total: Tensor
    parts: dict[str, Tensor]
    correct: Tensor  # bool [n]: the target is the model's first choice
    draft_correct: Tensor | None = None  # the same for the first MTP depth, [fewer than n]
    expert_ids: list[Tensor] = field(default_factory=list)  # int64 [T, top_k] of every MoE layer, MTP's last

    @property
    def token_accuracy(self) -> Tensor:
        return self.correct.float().mean()


def forward_packed(model: Any, batch: Batch, record: ForwardRecord) -> tuple[Tensor, ForwardBatch]:
    """Final hidden states `[T, H]` of a packed batch, and the packing they came from."""
    if batch.pixel_values is not None:
        embeds = model.embed_packed(
            batch.input_ids,
            pixel_values=batch.pixel_values,
            image_grid_thw=batch.image_grid_thw,
            image_order=batch.image_order,
        )
    else:
        embeds = model.embed_tokens_packed(batch.input_ids)
    packing = ForwardBatch.packed(batch.lengths, embeds.device)
    return model.text_model.forward_packed(embeds, packing, record), packing


def compute_losses(model: Any, batch: Batch, recipe: LossRecipe, whole: LossCounts | None = None) -> Losses:
    """Forward pass and weighted sum of the losses; losses of weight 0 are not computed.

    next_token: mean over all targets of the batch. mtp: mean over depths of the mean over the targets of a depth.
    indexer_kl: sum over sparse layers of the mean over tokens and index heads; it reaches index parameters only.

    whole: the counts of all batches whose gradients are accumulated into one step. Every loss is then this batch's
    share of the mean over all of them: summed over the batches, losses and gradients are those of one large batch.
    """
    whole = whole or LossCounts.of([batch], 0 if model.text_model.mtp is None else len(model.text_model.mtp.layers))
    record = ForwardRecord(expert_ids=[], indexer_kl=[] if recipe.indexer_kl_weight else None)
    hidden, packing = forward_packed(model, batch, record)
    head = model.get_output_embeddings().weight

    loss, correct = _cross_entropy(hidden, head, batch.labels, recipe.logit_chunk_tokens, whole.targets)
    parts, total = {"next_token": loss}, loss
    draft_correct = None
    if recipe.mtp_weight:
        if model.text_model.mtp is None:
            raise ValueError("loss.mtp_weight is set, but the model has no MTP module (num_mtp_modules is 0)")
        depths = model.text_model.mtp.forward_packed(
            hidden, batch.input_ids, model.embed_tokens_packed, packing, record
        )
        of_depth = []
        every_depth = zip(mtp_labels(batch, len(depths)), depths, whole.draft_targets, strict=True)
        for labels, hidden_of_depth, num_targets in every_depth:
            loss, depth_correct = _cross_entropy(
                hidden_of_depth, head, labels, recipe.logit_chunk_tokens, num_targets
            )
            of_depth.append(loss)
            draft_correct = depth_correct if draft_correct is None else draft_correct
        parts["mtp"] = torch.stack(of_depth).mean()
        total = total + recipe.mtp_weight * parts["mtp"]
    if record.indexer_kl is not None:
        if not record.indexer_kl:
            raise ValueError("loss.indexer_kl_weight is set, but no layer of the model has an indexer")
        parts["indexer_kl"] = torch.stack(record.indexer_kl).sum() * (batch.num_tokens / whole.tokens)
        total = total + recipe.indexer_kl_weight * parts["indexer_kl"]
    assert record.expert_ids is not None
    return Losses(total, parts, correct, draft_correct, record.expert_ids)


def mtp_labels(batch: Batch, num_depths: int) -> list[Tensor]:
    """int64 `[T]` a depth: the target at t + 2 + depth of the same document, else -100."""
    labels, documents = batch.labels, batch.document_ids()
    shifted = []
    for depth in range(1, num_depths + 1):
        ahead = torch.full_like(labels, IGNORED)
        same = documents[depth:] == documents[:-depth]
        ahead[:-depth] = torch.where(same, labels[depth:], IGNORED)
        shifted.append(ahead)
    return shifted


def _num_targets(labels: Tensor) -> int:
    return int((labels != IGNORED).sum())


def _cross_entropy(
    hidden: Tensor, head: Tensor, labels: Tensor, chunk_tokens: int, num_targets: int
) -> tuple[Tensor, Tensor]:
    """The sum over the targets of `labels`, divided by `num_targets`; and which of them are the first choice."""
    places = (labels != IGNORED).nonzero().squeeze(1)
    loss, correct = ChunkedCrossEntropy.apply(hidden[places], head, labels[places], chunk_tokens)
    return loss * (places.shape[0] / max(num_targets, 1)), correct
