"""Small models for the tests of `minim3/model`: every part present, blocks of 4 tokens, weights that all matter."""

from typing import Any

import torch
from torch import Tensor, nn

from minim3.config import MiniMaxM3VLConfig, MiniMaxM3VLTextConfig, MiniMaxM3VLVisionConfig
from minim3.model.causal_lm import MiniMaxM3SparseForCausalLM, MiniMaxM3SparseForConditionalGeneration

VOCABULARY, IMAGE, VIDEO = 64, 60, 61
PATCH_VALUES = 3 * 2 * 2 * 2  # channels, frames, rows, columns of one patch


def text_config(**changes: Any) -> MiniMaxM3VLTextConfig:
    """One dense layer with full attention, then two sparse MoE layers. 2 blocks of 4 tokens are a query's budget."""
    fields: dict[str, Any] = {
        "vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 16, "rotary_dim": 8, "rope_theta": 1e4, "max_position_embeddings": 256,
        "intermediate_size": 24, "dense_intermediate_size": 40, "shared_intermediate_size": 16, "num_local_experts": 4,
        "num_experts_per_tok": 2, "index_n_heads": 2, "index_head_dim": 16, "index_block_size": 4,
        "index_topk_blocks": 2, "eos_token_id": 2,
        "layer_types": ("full_attention", "minimax_m3_sparse", "minimax_m3_sparse"),
        "mlp_layer_types": ("dense", "sparse", "sparse"), **changes,
    }  # fmt: skip
    return MiniMaxM3VLTextConfig(**fields)


def vl_config(**changes: Any) -> MiniMaxM3VLConfig:
    """The same with two vision layers on patches of 2x2 pixels. `changes` go to the text part."""
    vision = MiniMaxM3VLVisionConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=40, patch_size=2
    )
    return MiniMaxM3VLConfig(
        text_config=text_config(**changes), vision_config=vision, image_token_index=IMAGE, video_token_index=VIDEO,
        projector_hidden_size=28,
    )  # fmt: skip


@torch.no_grad()
def randomize(model: nn.Module, seed: int) -> None:
    """Weights large enough that every part matters; norms, biases and correction biases away from neutral."""
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        draw = torch.randn(tensor.shape, generator=generator)
        if tensor.dim() == 1:
            centred_on_1 = name.endswith("weight") and ("layer_norm" in name or "layrnorm" in name)
            tensor.copy_(centred_on_1 + 0.2 * draw)
        else:
            tensor.copy_(draw * tensor.shape[-1] ** -0.5 * (1.5 if "index_" in name else 1.0))


def text_model(seed: int = 0, backend: str | None = None, **changes: Any) -> MiniMaxM3SparseForCausalLM:
    model = MiniMaxM3SparseForCausalLM(text_config(**changes), backend=backend)
    randomize(model, seed)
    return model.eval()


def vl_model(seed: int = 0, backend: str | None = None, **changes: Any) -> MiniMaxM3SparseForConditionalGeneration:
    model = MiniMaxM3SparseForConditionalGeneration(vl_config(**changes), backend=backend)
    randomize(model, seed)
    return model.eval()


def random_ids(*shape: int, seed: int = 0) -> Tensor:
    """Ordinary ids: no eos, no placeholder."""
    return torch.randint(3, IMAGE, shape, generator=torch.Generator().manual_seed(seed))


def media_prompt(seed: int = 0, tail: int = 20) -> dict[str, Tensor]:
    """One row: two pictures (6 and 1 tokens) and a clip of two chunks (8 and 4 tokens) between text."""
    generator = torch.Generator().manual_seed(seed + 100)
    image_grid, video_grid = torch.tensor([[1, 4, 6], [1, 2, 2]]), torch.tensor([[2, 4, 4], [1, 4, 4]])
    parts = [random_ids(5, seed=seed), torch.full((6,), IMAGE), random_ids(2, seed=seed + 1), torch.full((1,), IMAGE)]
    parts += [random_ids(3, seed=seed + 2), torch.full((12,), VIDEO), random_ids(tail, seed=seed + 3)]
    return {
        "input_ids": torch.cat(parts)[None],
        "pixel_values": torch.randn(28, PATCH_VALUES, generator=generator),
        "image_grid_thw": image_grid,
        "pixel_values_videos": torch.randn(48, PATCH_VALUES, generator=generator),
        "video_grid_thw": video_grid,
    }


def padded(rows: list[Tensor], side: str, width: int, fill: int = 7) -> tuple[Tensor, Tensor]:
    """Rows of ids -> `[B, width]` ids and mask. The padding is an ordinary id, so that only the mask tells."""
    ids = torch.full((len(rows), width), fill)
    mask = torch.zeros(len(rows), width, dtype=torch.int64)
    for row, tokens in enumerate(rows):
        first = {"left": width - len(tokens), "right": 0, "middle": (width - len(tokens)) // 2}[side]
        ids[row, first : first + len(tokens)] = tokens
        mask[row, first : first + len(tokens)] = 1
    return ids, mask
