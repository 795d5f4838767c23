"""Random small models in transformers, the live oracle."""

from typing import Any

import torch

IMAGE, VIDEO = 300, 301


def random_config(seed: int) -> Any:
    """A config that differs from seed to seed in every size that the two implementations must agree on."""
    from transformers.models.minimax_m3_vl import MiniMaxM3VLConfig

    g = torch.Generator().manual_seed(seed)

    def pick(*options: Any) -> Any:
        return options[int(torch.randint(len(options), (1,), generator=g))]

    layers, kv_heads, head_dim = pick(2, 3, 4), pick(1, 2, 4), pick(16, 24, 32)
    rotary_dim = pick(8, 12, head_dim)
    dense = min(pick(0, 1, 2), layers - 1)
    text = {
        "vocab_size": 320,
        "hidden_size": pick(48, 64, 80),
        "intermediate_size": pick(24, 40),
        "dense_intermediate_size": pick(72, 96),
        "shared_intermediate_size": pick(24, 56),
        "num_hidden_layers": layers,
        "num_attention_heads": kv_heads * pick(1, 2, 4),
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "rotary_dim": rotary_dim,
        "rope_parameters": {
            "rope_theta": pick(1e4, 5e6),
            "rope_type": "default",
            "partial_rotary_factor": rotary_dim / head_dim,
        },
        "num_local_experts": pick(4, 8),
        "num_experts_per_tok": pick(1, 2, 3),
        "routed_scaling_factor": pick(1.0, 2.0, 2.5),
        "swiglu_alpha": pick(1.702, 1.3),
        "swiglu_limit": pick(7.0, 0.5),
        "layer_types": ["full_attention"] * dense + ["minimax_m3_sparse"] * (layers - dense),
        "mlp_layer_types": ["dense"] * dense + ["sparse"] * (layers - dense),
        "index_n_heads": kv_heads,
        "index_head_dim": pick(16, 32) if rotary_dim <= 16 else 32,
        "index_block_size": pick(4, 8, 16),
        "index_topk_blocks": pick(2, 3, 4),
        "index_local_blocks": pick(1, 2),
        "max_position_embeddings": 4096,
        "rms_norm_eps": pick(1e-6, 1e-5),
        "pad_token_id": None,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    heads = pick(2, 3)
    vision = {
        "hidden_size": heads * pick(24, 32, 40),
        "num_hidden_layers": pick(1, 2),
        "num_attention_heads": heads,
        "intermediate_size": pick(64, 100),
        "patch_size": 14,
        "temporal_patch_size": 2,
        "spatial_merge_size": 2,
        "rope_parameters": {"rope_theta": 1e4, "rope_type": "axial"},
    }
    return MiniMaxM3VLConfig(
        text_config=text,
        vision_config=vision,
        image_token_index=IMAGE,
        video_token_index=VIDEO,
        projector_hidden_size=pick(40, 72),
        tie_word_embeddings=False,
    )


def random_model(seed: int) -> Any:
    """A model of that config with weights large enough that every part matters, norms and biases included."""
    from transformers.models.minimax_m3_vl.modeling_minimax_m3_vl import MiniMaxM3SparseForConditionalGeneration

    torch.manual_seed(seed)
    model = MiniMaxM3SparseForConditionalGeneration(random_config(seed)).float().eval()
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if "inv_freq" in name:
                continue
            if "e_score_correction_bias" in name:
                tensor.copy_(torch.randn_like(tensor) * 0.1)
            elif tensor.dim() == 1:
                centre = 1.0 if "layer_norm" in name.split(".")[-2] or "layrnorm" in name else 0.0
                tensor.copy_(centre * name.endswith("weight") + torch.randn_like(tensor) * 0.1)
            else:
                tensor.copy_(torch.randn_like(tensor) * tensor.shape[-1] ** -0.5)
    return model


def random_inputs(seed: int, length: int) -> dict[str, torch.Tensor]:
    """A prompt with two pictures and a clip of two chunks between text."""
    g = torch.Generator().manual_seed(seed + 1000)
    image_grid = torch.tensor([[1, 4, 6], [1, 2, 2]])
    video_grid = torch.tensor([[4, 4, 4], [1, 4, 4]])

    def text(n: int) -> torch.Tensor:
        return torch.randint(3, 300, (n,), generator=g)

    ids = [text(7), torch.full((6,), IMAGE), text(3), torch.full((1,), IMAGE), text(5), torch.full((20,), VIDEO)]
    ids.append(text(length - sum(len(part) for part in ids)))
    return {
        "input_ids": torch.cat(ids)[None],
        "pixel_values": torch.randn(28, 1176, generator=g),
        "image_grid_thw": image_grid,
        "pixel_values_videos": torch.randn(80, 1176, generator=g),
        "video_grid_thw": video_grid,
    }
