"""The losses of a packed batch: next token, multi-token prediction, indexer alignment, balance, size of the logits.

T  tokens of the batch      n  target positions among them      H  hidden size      V  vocabulary
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from minim3.model.batch import ForwardBatch, ForwardRecord, LayerChoices
from minim3.model.outputs import load_balancing_loss
from minim3.training.config import LossRecipe
from minim3.training.data import IGNORED, Batch

# Fields of a batch that `embed_packed` of a vision-language model takes under the same names.
MEDIA = ("pixel_values", "image_grid_thw", "image_order", "pixel_values_videos", "video_grid_thw", "video_order")


class ChunkedCrossEntropy(torch.autograd.Function):
    """Mean cross-entropy of `hidden @ weight.T`, a chunk of rows at a time: logits `[n, V]` never exist whole.

    The gradients are made in the forward pass, while the logits of a chunk are at hand: with p = softmax(logits) and
    z = logsumexp(logits), d cross-entropy / d logits = (p - onehot(target)) / n and d mean(z^2) / d logits = 2 z p / n.
    `weight` may be wider than `hidden` (fp32, bf16): products are in the dtype of `hidden`, sums in that of `weight`.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, chunk_tokens: int, z_weight: float = 0.0
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """hidden `[n, H]`, weight `[V, H]`, targets int64 `[n]`, all targets in the vocabulary.

        Returns cross-entropy + `z_weight` * mean square of z, which alone carries a gradient; the two by themselves;
        bool `[n]`: target is argmax.
        """
        compute = torch.promote_types(hidden.dtype, torch.float32)
        num_targets = max(targets.shape[0], 1)
        wants_hidden, wants_weight = ctx.needs_input_grad[:2]
        grad_hidden = torch.empty_like(hidden) if wants_hidden else None
        grad_weight = torch.zeros_like(weight) if wants_weight else None
        total, squares = hidden.new_zeros((), dtype=compute), hidden.new_zeros((), dtype=compute)
        correct = torch.empty_like(targets, dtype=torch.bool)
        head = weight.to(hidden.dtype)
        for start in range(0, targets.shape[0], chunk_tokens):
            rows = slice(start, start + chunk_tokens)
            chunk, target = hidden[rows], targets[rows].unsqueeze(1)
            logits = (chunk @ head.T).to(compute)
            correct[rows] = logits.argmax(-1) == target.squeeze(1)
            log_total = logits.logsumexp(-1, keepdim=True)
            total += (log_total - logits.gather(1, target)).sum()
            squares += log_total.square().sum()
            if grad_hidden is None and grad_weight is None:
                continue
            probabilities = logits.sub_(log_total).exp_()
            if z_weight:
                probabilities.mul_(1 + 2 * z_weight * log_total)
            probabilities.scatter_add_(1, target, torch.full_like(target, -1, dtype=compute))
            grad_logits = probabilities.div_(num_targets).to(hidden.dtype)
            if grad_hidden is not None:
                torch.mm(grad_logits, head, out=grad_hidden[rows])
            if grad_weight is not None and weight.dtype == hidden.dtype:
                grad_weight.addmm_(grad_logits.T, chunk)
            elif grad_weight is not None:
                grad_weight += grad_logits.T @ chunk
        ctx.save_for_backward(grad_hidden, grad_weight)
        cross_entropy, mean_square = total / num_targets, squares / num_targets
        loss = cross_entropy + z_weight * mean_square
        ctx.mark_non_differentiable(cross_entropy, mean_square, correct)
        return loss, cross_entropy, mean_square, correct

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad_hidden, grad_weight = ctx.saved_tensors
        scale = grads[0]
        return (
            None if grad_hidden is None else grad_hidden * scale.to(grad_hidden.dtype),
            None if grad_weight is None else grad_weight * scale.to(grad_weight.dtype),
            None,
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
    """What one forward pass gives the trainer. `parts` holds every loss unweighted, and what was measured, for the log.

    With a z-loss, next_token and z_loss carry no gradient of their own: `total` has that of both.
    """

    total: Tensor
    parts: dict[str, Tensor]
    correct: Tensor  # bool [n]: the target is the model's first choice
    draft_correct: Tensor | None = None  # the same for the first MTP depth, [fewer than n]
    expert_ids: list[Tensor] = field(default_factory=list)  # int64 [T, top_k] of every MoE layer, MTP's last

    @property
    def token_accuracy(self) -> Tensor:
        return self.correct.float().mean()


def forward_packed(
    model: Any, batch: Batch, record: ForwardRecord, *, attend_all: bool = False
) -> tuple[Tensor, ForwardBatch]:
    """Final hidden states `[T, H]` of a packed batch, and the packing they came from."""
    media = {name: getattr(batch, name) for name in MEDIA if getattr(batch, name, None) is not None}
    if media:
        embeds = model.embed_packed(batch.input_ids, **media)
    else:
        embeds = model.embed_tokens_packed(batch.input_ids)
    packing = ForwardBatch.packed(batch.lengths, embeds.device, attend_all=attend_all)
    return model.text_model.forward_packed(embeds, packing, record), packing


def compute_losses(
    model: Any,
    batch: Batch,
    recipe: LossRecipe,
    whole: LossCounts | None = None,
    *,
    choices: dict[int, LayerChoices] | None = None,
) -> Losses:
    """Forward pass and weighted sum of the losses; losses of weight 0 are not computed.

    next_token: mean over all targets of the batch. z_loss: mean over the same of the squared log-sum-exp of the logits.
    mtp: mean over depths of the mean over the targets of a depth; each as mtp.depth_D where there are several.
    indexer_kl: sum over sparse layers of the mean over tokens and index heads; it reaches index parameters only.
    router_aux: load balance over the experts of all layers, of this batch by itself (`load_balancing_loss`).

    recall.layer_N, recall.mtp_D are no losses and never shares: how much of dense attention the choice of blocks keeps,
    measured where a document is long enough to have a choice.

    whole: the counts of all batches whose gradients are accumulated into one step. Every loss is then this batch's
    share of the mean over all of them: summed over the batches, losses and gradients are those of one large batch
    (router_aux apart, which is then a mean of the batches' own).
    choices: decisions of the layers, followed where they are there and kept where they are not.
    """
    text = model.text_model
    num_depths = 0 if text.mtp is None else len(text.mtp.layers)
    whole = whole or LossCounts.of([batch], num_depths)
    attend_all = recipe.indexer_kl_form == "dense"
    record = ForwardRecord(
        router_logits=[] if recipe.router_aux_weight else None,
        expert_ids=[],
        indexer_kl=[] if recipe.indexer_kl_weight else None,
        recall=[] if recipe.recall_every_steps and _has_a_choice(model, batch) else None,
        recall_queries=recipe.recall_queries,
        choices=choices,
    )
    hidden, packing = forward_packed(model, batch, record, attend_all=attend_all)
    head = model.get_output_embeddings().weight

    total, of_tokens = _cross_entropy(hidden, head, batch.labels, recipe, whole.targets)
    parts = {"next_token": of_tokens.next_token}
    if recipe.z_weight:
        parts["z_loss"] = of_tokens.z_loss
    draft_correct = None
    if recipe.mtp_weight:
        if text.mtp is None:
            raise ValueError(
                "loss.mtp_weight is set, but the model has no MTP module (num_mtp_modules is 0, or the checkpoint "
                "holds none of their tensors: model.add_mtp_modules adds fresh ones)"
            )
        depths = text.mtp.forward_packed(hidden, batch.input_ids, model.embed_tokens_packed, packing, record)
        unweighted = replace(recipe, z_weight=0.0)
        of_depth = []
        every_depth = zip(mtp_labels(batch, len(depths)), depths, whole.draft_targets, strict=True)
        for labels, hidden_of_depth, num_targets in every_depth:
            loss, of_drafts = _cross_entropy(hidden_of_depth, head, labels, unweighted, num_targets)
            of_depth.append(loss)
            draft_correct = of_drafts.correct if draft_correct is None else draft_correct
        parts["mtp"] = torch.stack(of_depth).mean()
        if len(of_depth) > 1:
            parts |= {f"mtp.depth_{depth}": loss for depth, loss in enumerate(of_depth)}
        total = total + recipe.mtp_weight * parts["mtp"]
    of_batch = batch.num_tokens / whole.tokens
    if record.indexer_kl is not None:
        if not record.indexer_kl:
            raise ValueError("loss.indexer_kl_weight is set, but no layer of the model has an indexer")
        parts["indexer_kl"] = torch.stack(record.indexer_kl).sum() * of_batch
        total = total + recipe.indexer_kl_weight * parts["indexer_kl"]
    if record.router_logits is not None:
        if not record.router_logits:
            raise ValueError("loss.router_aux_weight is set, but no layer of the model is a mixture of experts")
        config = model.text_config
        balance = load_balancing_loss(record.router_logits, config.num_local_experts, config.num_experts_per_tok)
        parts["router_aux"] = balance * of_batch
        total = total + recipe.router_aux_weight * parts["router_aux"]
    if record.recall is not None:
        parts |= zip(_names_of_sparse_layers(model, mtp_ran=bool(recipe.mtp_weight)), record.recall, strict=True)
    assert record.expert_ids is not None
    return Losses(total, parts, of_tokens.correct, draft_correct, record.expert_ids)


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


def _has_a_choice(model: Any, batch: Batch) -> bool:
    """Whether some query of some layer has more blocks behind it than it may choose."""
    config = model.text_config
    sparse = any(map(config.is_sparse_attention_layer, range(config.num_hidden_layers)))
    return sparse and max(batch.lengths) > config.index_topk_blocks * config.index_block_size


def _names_of_sparse_layers(model: Any, *, mtp_ran: bool) -> list[str]:
    """What `recall` is called of every layer with an indexer, in the order of the forward pass."""
    names = [f"recall.layer_{i}" for i, block in enumerate(model.text_model.layers) if block.self_attn.indexer]
    if mtp_ran:
        depths = enumerate(model.text_model.mtp.layers)
        names += [f"recall.mtp_{d}" for d, depth in depths if depth.transformer_layer.self_attn.indexer]
    return names


class _CrossEntropy(NamedTuple):
    next_token: Tensor
    z_loss: Tensor
    correct: Tensor  # bool, one a target


def _cross_entropy(
    hidden: Tensor, head: Tensor, labels: Tensor, recipe: LossRecipe, num_targets: int
) -> tuple[Tensor, _CrossEntropy]:
    """Next-token loss with its weighted z-loss, and what they are by themselves.

    All are sums over the targets of `labels`, divided by `num_targets`.
    """
    places = (labels != IGNORED).nonzero().squeeze(1)
    share = places.shape[0] / max(num_targets, 1)
    loss, cross_entropy, mean_square, correct = ChunkedCrossEntropy.apply(
        hidden[places], head, labels[places], recipe.logit_chunk_tokens, recipe.z_weight
    )
    loss = loss * share
    next_token = cross_entropy * share if recipe.z_weight else loss
    return loss, _CrossEntropy(next_token, mean_square * share, correct)
