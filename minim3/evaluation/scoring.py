"""Log-likelihoods of token sequences, on packed batches: what perplexity and multiple choice stand on.

T tokens of a batch      n scored tokens among them      H hidden size      V vocabulary
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from minim3.inference.engine import find_placeholders
from minim3.inference.request import Media
from minim3.model.batch import ForwardBatch
from minim3.model.causal_lm import CausalLM
from minim3.model.decoder import check_vocabulary

BATCH_SIZE = 64
BATCH_TOKENS = 8192
# Logits are made for so many numbers at a time (128 MiB in fp32), whatever the vocabulary.
_LOGITS_AT_ONCE = 1 << 25


@dataclass(frozen=True)
class Pair:
    """Token ids to score, `continuation`, after the ids `context`, neither empty; pairs may share one `media`.

    media: pictures and clips of the placeholders in context and continuation, in their order.
    """

    context: Sequence[int]
    continuation: Sequence[int]
    media: Media | None = None


class Score(NamedTuple):
    """logprob: the sum over the continuation, in nats. is_greedy: every token of it is the model's first choice."""

    logprob: float
    is_greedy: bool
    num_tokens: int


@dataclass
class _Batch:
    """Pairs that run together. Pairs that feed the same ids (contexts with one-token continuations) feed them once."""

    pairs: list[tuple[Pair, int]] = field(default_factory=list)  # and the row of `inputs` that it reads
    inputs: list[tuple[int, ...]] = field(default_factory=list)
    media: list[Media | None] = field(default_factory=list)
    rows: dict[tuple[tuple[int, ...], int], int] = field(default_factory=dict)
    num_tokens: int = 0

    def add(self, pair: Pair, ids: tuple[int, ...]) -> None:
        key = ids, id(pair.media)
        if key not in self.rows:
            self.rows[key] = len(self.inputs)
            self.inputs.append(ids)
            self.media.append(pair.media)
            self.num_tokens += len(ids)
        self.pairs.append((pair, self.rows[key]))


def loglikelihoods(
    model: CausalLM, pairs: Iterable[Pair], *, batch_size: int = BATCH_SIZE, batch_tokens: int = BATCH_TOKENS
) -> Iterator[Score]:
    """The score of every pair, in order. Pairs are taken from the iterable as they are needed, a batch at a time.

    A batch is packed, without padding; a score does not depend on what else is in the batch. Logits `[T, V]` never
    exist whole: only scored positions have any, some rows at a time.

    Args:
        model: either model class; it should be in evaluation mode.
        batch_size, batch_tokens: the most sequences and tokens of a forward pass (a longer sequence runs alone).

    Raises:
        ValueError: an empty context or continuation, more tokens than the model has positions, an id outside the
            vocabulary, media that do not match their placeholders.
    """
    if batch_size < 1 or batch_tokens < 1:
        raise ValueError(f"batch_size ({batch_size}) and batch_tokens ({batch_tokens}) must be at least 1")
    batch = _Batch()
    for pair in pairs:
        ids = _input_ids(model, pair)
        if batch.pairs and (len(batch.pairs) >= batch_size or batch.num_tokens + len(ids) > batch_tokens):
            yield from _score(model, batch)
            batch = _Batch()
        batch.add(pair, ids)
    if batch.pairs:
        yield from _score(model, batch)


def _input_ids(model: CausalLM, pair: Pair) -> tuple[int, ...]:
    """What the model reads: everything but the last token, which it only has to predict."""
    if not len(pair.context) or not len(pair.continuation):
        empty = "continuation" if len(pair.context) else "context"
        raise ValueError(f"the {empty} is empty: a token is scored after at least one other")
    ids = (*pair.context, *pair.continuation[:-1])
    limit = model.text_config.max_position_embeddings
    if len(ids) > limit:
        raise ValueError(f"{len(ids) + 1} tokens to score, but the model takes {limit} (max_position_embeddings)")
    find_placeholders(model, ids, pair.media)
    return ids


@torch.inference_mode()
def _score(model: CausalLM, batch: _Batch) -> list[Score]:
    starts = torch.tensor([0, *map(len, batch.inputs)]).cumsum(0).tolist()
    ids = torch.tensor([token_id for row in batch.inputs for token_id in row], device=model.device)
    targets = torch.tensor([token_id for pair, _ in batch.pairs for token_id in pair.continuation])
    targets = targets.to(model.device)
    for some_ids in (ids, targets):
        check_vocabulary(some_ids, model.get_input_embeddings())
    places = [torch.arange(len(pair.continuation)) + (starts[row] + len(pair.context) - 1) for pair, row in batch.pairs]
    packing = ForwardBatch.packed([len(row) for row in batch.inputs], model.device)
    hidden = model.text_model.forward_packed(_embed(model, ids, batch.media), packing)
    logprobs, is_first = target_logprobs(model, hidden, torch.cat(places).to(hidden.device), targets)
    lengths = [len(pair.continuation) for pair, _ in batch.pairs]
    return [
        Score(float(of_pair.sum(dtype=torch.float64)), bool(first.all()), length)
        for of_pair, first, length in zip(logprobs.cpu().split(lengths), is_first.cpu().split(lengths), lengths)
    ]


def target_logprobs(model: CausalLM, hidden: Tensor, places: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probability of each target and whether it is the model's first choice, some rows of logits at a time.

    hidden `[T, H]`; places int64 `[n]`, the rows of `hidden` that predict targets int64 `[n]` -> fp32 (fp64 of a model
    in fp64) `[n]`, bool `[n]`.
    """
    at_once = max(1, _LOGITS_AT_ONCE // model.text_config.vocab_size)
    logprobs, is_first = [], []
    for some, target in zip(places.split(at_once), targets.split(at_once)):
        logits = model.compute_logits(hidden[some])
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        logprobs.append(logits.gather(1, target[:, None])[:, 0] - logits.logsumexp(-1))
        is_first.append(logits.argmax(-1) == target)
    return torch.cat(logprobs), torch.cat(is_first)


def _embed(model: CausalLM, ids: Tensor, media: Sequence[Media | None]) -> Tensor:
    """Packed embeddings; a picture set that several sequences share goes through the vision tower once."""
    used = [one for one in media if one is not None and not one.empty]
    if not used:
        return model.embed_tokens_packed(ids)
    first_picture: dict[int, int] = {}
    pixels, grids = [], []
    order: list[int] = []
    num_pictures = 0
    for one in used:
        if one.pixel_values is None or one.image_grid_thw is None:
            continue
        count = one.image_grid_thw.shape[0]
        if id(one) not in first_picture:
            first_picture[id(one)] = num_pictures
            pixels.append(one.pixel_values)
            grids.append(one.image_grid_thw)
            num_pictures += count
        order += range(first_picture[id(one)], first_picture[id(one)] + count)
    clips = [one for one in used if one.pixel_values_videos is not None]
    inputs: dict[str, Tensor] = {}
    if pixels:
        inputs = {"pixel_values": torch.cat(pixels), "image_grid_thw": torch.cat(grids)}
        inputs["image_order"] = torch.tensor(order)
    if clips:
        inputs["pixel_values_videos"] = torch.cat([one.pixel_values_videos for one in clips])  # type: ignore[misc]
        inputs["video_grid_thw"] = torch.cat([one.video_grid_thw for one in clips])  # type: ignore[misc]
    inputs = {name: tensor.to(ids.device) for name, tensor in inputs.items()}
    return model.embed_packed(ids, **inputs)  # type: ignore[operator]
