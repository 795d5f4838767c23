"""How many floating-point operations a step needs, from the config and the lengths of the documents alone.

These are the model's operations, whatever ran: products only (2 m n k for `[m, k] @ [k, n]`), of attention the visible
keys, of sparse attention those inside the chosen blocks. Layers that activation checkpointing computes twice, or keys
that an implementation multiplies only to mask them, are not counted, so a slow implementation shows as a low share of
the machine's peak.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from minim3.config import MiniMaxM3VLConfig, MiniMaxM3VLTextConfig
from minim3.training.config import LossRecipe
from minim3.training.data import Batch
from minim3.training.loss import LossCounts

VISION = ("vision_tower.", "multi_modal_projector.", "patch_merge_mlp.")


def visible_pairs(length: int) -> int:
    """Pairs of a query and a key that causal attention looks at in a document of `length` tokens."""
    return length * (length + 1) // 2


def selected_pairs(length: int, text: MiniMaxM3VLTextConfig) -> int:
    """The same inside the blocks that sparse attention chooses: a query's own block up to itself, and whole others."""
    size, topk = text.index_block_size, text.index_topk_blocks
    full, rest = divmod(length, size)
    others = sum(min(block, topk - 1) for block in range(full)) * size + min(full, topk - 1) * rest
    return others * size + full * visible_pairs(size) + visible_pairs(rest)


@dataclass(frozen=True)
class Pairs:
    """How attention is counted: functions from a document's length to pairs of query and key."""

    visible: Callable[[int], int]
    selected: Callable[[int], int]

    @classmethod
    def of_model(cls, text: MiniMaxM3VLTextConfig) -> "Pairs":
        return cls(visible_pairs, lambda length: selected_pairs(length, text))


@dataclass(frozen=True)
class Share:
    """How much of a part is trained. weights: share of its parameters (0..1); below: something it takes from trains."""

    weights: float = 1.0
    below: bool = True

    @property
    def passes(self) -> float:
        """Forward, gradient of the inputs, gradient of the weights: 3 where all of it trains."""
        return 1.0 + (self.below or self.weights > 0) + self.weights

    @property
    def passes_without_weights(self) -> float:
        """Of products of activations with activations, whose way back is two products."""
        return 3.0 if self.below or self.weights > 0 else 1.0


def training_flops(model: Any, batch: Batch, recipe: LossRecipe) -> int:
    """Operations of forward and backward pass of `batch` (by what of `model` takes gradients), without the step."""
    shares = trained_shares(model)
    text = model.text_config
    num_depths = len(model.text_model.mtp.layers) if recipe.mtp_weight and model.text_model.mtp is not None else 0
    counts = LossCounts.of([batch], num_depths)
    flops = text_flops(
        text, batch.lengths, shares["text"], shares["indexer"] if recipe.indexer_kl_weight else Share(0.0, False),
        aligns=bool(recipe.indexer_kl_weight), attends_all=recipe.indexer_kl_form == "dense",
    )  # fmt: skip
    flops += head_flops(text, counts.targets + sum(counts.draft_targets), shares["head"])
    if num_depths:
        flops += mtp_flops(text, batch.lengths, num_depths, shares["mtp"], aligns=bool(recipe.indexer_kl_weight))
    for grid in (batch.image_grid_thw, getattr(batch, "video_grid_thw", None)):
        if grid is not None:
            flops += vision_flops(model.config, grid.tolist(), shares["vision"])
    return round(flops)


def trained_shares(model: Any) -> dict[str, Share]:
    """Of the vision part, the text model without indexers, the indexers, the head and the MTP modules."""
    total: dict[str, int] = dict.fromkeys(("vision", "text", "indexer", "head", "mtp"), 0)
    trained = dict(total)
    embeddings_train = model.text_model.embed_tokens.weight.requires_grad
    for name, parameter in model.named_parameters():
        if ".embed_tokens." in name:
            continue
        part = (
            "vision" if name.startswith(VISION) else "mtp" if ".mtp." in name else "indexer" if ".indexer." in name
            else "head" if "lm_head." in name else "text"
        )  # fmt: skip
        total[part] += parameter.numel()
        trained[part] += parameter.numel() * parameter.requires_grad
    weights = {part: trained[part] / max(1, total[part]) for part in total}
    if not total["head"]:  # tied to the embeddings
        weights["head"] = float(embeddings_train)
    into_text = embeddings_train or weights["vision"] > 0
    into_head = into_text or weights["text"] > 0
    return {
        "vision": Share(weights["vision"], below=False),
        "text": Share(weights["text"], into_text),
        "indexer": Share(weights["indexer"], below=False),  # its input is cut off from the model
        "head": Share(weights["head"], into_head or weights["mtp"] > 0),
        "mtp": Share(weights["mtp"], into_head),
    }


def text_flops(
    text: MiniMaxM3VLTextConfig, lengths: Sequence[int], share: Share = Share(), indexer: Share = Share(0.0, False), *,
    aligns: bool = False, attends_all: bool = False, layers: Iterable[int] | None = None, pairs: Pairs | None = None,
) -> float:  # fmt: skip
    """Operations of the decoder layers (`layers`: their indices) on documents of these lengths."""
    pairs = pairs or Pairs.of_model(text)
    chooses = not attends_all and max(lengths) > text.index_topk_blocks * text.index_block_size
    return sum(
        _layer_flops(text, index, lengths, share, indexer, aligns, chooses, pairs)
        for index in (range(text.num_hidden_layers) if layers is None else layers)
    )


def mtp_flops(
    text: MiniMaxM3VLTextConfig, lengths: Sequence[int], num_depths: int, share: Share = Share(), *,
    aligns: bool = False, pairs: Pairs | None = None,
) -> float:  # fmt: skip
    """Operations of the MTP modules without the head: joining hidden state and embedding, and one layer, a depth."""
    joining = 2 * sum(lengths) * 2 * text.hidden_size**2 * share.passes
    indexer = Share(share.weights, False) if aligns else Share(0.0, False)
    last = [text.num_hidden_layers - 1]
    layer = text_flops(text, lengths, share, indexer, aligns=aligns, layers=last, pairs=pairs)
    return num_depths * (joining + layer)


def head_flops(text: MiniMaxM3VLTextConfig, num_targets: int, share: Share = Share()) -> float:
    return 2 * num_targets * text.hidden_size * text.vocab_size * share.passes


def vision_flops(config: MiniMaxM3VLConfig, grids: Sequence[Sequence[int]], share: Share = Share(1.0, False)) -> float:
    """Operations of tower and projectors on pictures and chunks of `grids` (frames, rows, columns of patches)."""
    vision = config.vision_config
    assert vision is not None
    sizes = [frames * rows * columns for frames, rows, columns in grids]
    patches, hidden, width = sum(sizes), vision.hidden_size, vision.intermediate_size
    embedding = hidden * vision.num_channels * vision.temporal_patch_size * vision.patch_size**2
    layers = vision.num_hidden_layers * (4 * hidden**2 + 2 * hidden * width)
    projected, text_dim, merge = config.projector_hidden_size, config.text_config.hidden_size, vision.spatial_merge_size
    projectors = (hidden + text_dim) * projected + (text_dim + text_dim / merge**2) * projected
    attention = vision.num_hidden_layers * 4 * hidden * sum(size**2 for size in sizes)
    # The patches are no one's output: the embedding has no gradient to hand down.
    flops = 2 * patches * embedding * (1 + share.weights) + 2 * patches * (layers + projectors) * share.passes
    return flops + attention * share.passes_without_weights


def _layer_flops(
    text: MiniMaxM3VLTextConfig, index: int, lengths: Sequence[int], share: Share, indexer: Share, aligns: bool,
    chooses: bool, pairs: Pairs,
) -> float:  # fmt: skip
    tokens, hidden = sum(lengths), text.hidden_size
    q_dim, kv_dim = text.num_attention_heads * text.head_dim, text.num_key_value_heads * text.head_dim
    weights = hidden * (2 * q_dim + 2 * kv_dim)
    if text.is_moe_layer(index):
        weights += text.num_local_experts * hidden  # the router
        weights += 3 * hidden * text.intermediate_size * text.num_experts_per_tok
        weights += 3 * hidden * text.shared_intermediate_size * text.n_shared_experts
    else:
        weights += 3 * hidden * text.dense_intermediate_size
    flops = 2 * tokens * weights * share.passes

    sparse = text.is_sparse_attention_layer(index)
    seen = sum(map(pairs.selected if sparse and chooses else pairs.visible, lengths))
    flops += 4 * q_dim * seen * share.passes_without_weights
    index_dim = text.index_n_heads * text.index_head_dim
    if sparse and (chooses or aligns):
        flops += 2 * tokens * hidden * (index_dim + text.index_head_dim) * (1 + indexer.weights)
    if sparse and chooses:
        flops += 2 * index_dim * sum(map(pairs.visible, lengths))
    if sparse and aligns:  # the teacher's scores, and the student's with their gradients
        flops += 2 * q_dim * seen + 2 * index_dim * seen * indexer.passes_without_weights
    return flops
