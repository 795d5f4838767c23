"""The model of a recipe: from scratch, from a checkpoint, or from one with parts added that it lacks.

A dense checkpoint becomes a sparse one by fresh indexers: everything else stays bit for bit, and up to top-k blocks of
context so do its answers. Which blocks to choose beyond that has to be learnt first, under dense attention (the paper
"MiniMax Sparse Attention", arXiv 2606.13392): see recipes/indexer_warmup.yaml and recipes/dense_to_sparse.yaml.
"""

from dataclasses import replace
from typing import Any

import torch

from minim3.checkpoint import read_config, resolve_checkpoint
from minim3.config import MiniMaxM3VLConfig, MiniMaxM3VLTextConfig, config_from_dict
from minim3.config.reader import FULL_ATTENTION, SPARSE_ATTENTION
from minim3.model.attention import MiniMaxM3Indexer
from minim3.model.causal_lm import MiniMaxM3SparseForCausalLM, MiniMaxM3SparseForConditionalGeneration
from minim3.model.decoder import Block, initialize
from minim3.model.mtp import MiniMaxM3MTP
from minim3.training.config import SparseConversionRecipe, TrainingConfig


def build_model(recipe: TrainingConfig) -> Any:
    """The recipe's model in fp32: fresh weights from torch's generator, or those of a checkpoint.

    Raises ValueError where a checkpoint already has what the recipe adds.
    """
    if recipe.model.config is not None:
        config = config_from_dict(recipe.model.config)
        if isinstance(config, MiniMaxM3VLTextConfig) or config.vision_config is None:
            text = config if isinstance(config, MiniMaxM3VLTextConfig) else config.text_config
            return MiniMaxM3SparseForCausalLM.from_config(text)
        return MiniMaxM3SparseForConditionalGeneration.from_config(config)
    assert recipe.model.start_from is not None
    folder = resolve_checkpoint(recipe.model.start_from)
    text_only = isinstance(read_config(folder), MiniMaxM3VLTextConfig)
    cls = MiniMaxM3SparseForCausalLM if text_only else MiniMaxM3SparseForConditionalGeneration
    model = cls.from_pretrained(folder, dtype=torch.float32).train()
    if recipe.model.convert_to_sparse is not None:
        add_indexers(model, recipe.model.convert_to_sparse)
    if recipe.model.add_mtp_modules:
        add_mtp_modules(model, recipe.model.add_mtp_modules)
    return model


def sparse_config(config: MiniMaxM3VLTextConfig, recipe: SparseConversionRecipe) -> MiniMaxM3VLTextConfig:
    """The config of a dense model with the recipe's layers sparse. Raises ValueError where that cannot be."""
    present = [i for i in range(config.num_hidden_layers) if config.is_sparse_attention_layer(i)]
    if present:
        raise ValueError(
            f"model.convert_to_sparse starts from a dense checkpoint, but layers {present} of this one have an indexer "
            "already: go on training it without convert_to_sparse"
        )
    layers = range(1, config.num_hidden_layers) if recipe.layers is None else recipe.layers
    for layer in layers:
        if not 0 <= layer < config.num_hidden_layers:
            raise ValueError(
                f"model.convert_to_sparse.layers names layer {layer}; the model has layers 0 to "
                f"{config.num_hidden_layers - 1}"
            )
    if not layers:
        raise ValueError("model.convert_to_sparse.layers is empty: at least one layer must become sparse")
    kinds = [SPARSE_ATTENTION if i in layers else FULL_ATTENTION for i in range(config.num_hidden_layers)]
    return replace(
        config,
        layer_types=tuple(kinds),
        index_n_heads=config.num_key_value_heads,
        index_head_dim=recipe.head_dim or config.head_dim,
        index_block_size=recipe.block_size,
        index_topk_blocks=recipe.topk_blocks,
        index_init_blocks=recipe.init_blocks,
        index_local_blocks=recipe.local_blocks,
        index_score_type=recipe.score_type,
    )


def add_indexers(model: Any, recipe: SparseConversionRecipe) -> None:
    """Fresh indexers, drawn from torch's generator, for the attention of a dense model; nothing else changes.

    MTP modules follow the last layer, whose kind they have.
    """
    config = sparse_config(model.text_config, recipe)
    for block in model.modules():
        if isinstance(block, Block) and config.is_sparse_attention_layer(block.layer_idx):
            indexer = MiniMaxM3Indexer(config, None, block.self_attn.backend)
            initialize(indexer, config.initializer_range)
            block.self_attn.indexer = indexer.to(model.device)
    _set_text_config(model, config)


def add_mtp_modules(model: Any, num_modules: int) -> None:
    """Fresh MTP modules, drawn from torch's generator, for a model without any; nothing else changes."""
    text = model.text_model
    if text.mtp is not None:
        raise ValueError(
            f"model.add_mtp_modules is {num_modules}, but the checkpoint has {len(text.mtp.layers)} MTP modules: they "
            "are trained by loss.mtp_weight alone"
        )
    config = replace(model.text_config, num_mtp_modules=num_modules)
    backend = text.layers[-1].self_attn.backend
    mtp = MiniMaxM3MTP(config, None, backend, num_modules)
    initialize(mtp, config.initializer_range)
    text.mtp = mtp.to(model.device)
    _set_text_config(model, config)


def _set_text_config(model: Any, config: MiniMaxM3VLTextConfig) -> None:
    """Put `config` where the text config of a model stands; nothing computed from the config before depends on it."""
    model.text_model.config = config
    if model.text_model.mtp is not None:
        model.text_model.mtp.config = config
    whole = model.config
    model.config = replace(whole, text_config=config) if isinstance(whole, MiniMaxM3VLConfig) else config
    if model.config is not config and hasattr(model, "language_model"):
        model.language_model.config = config
