"""A data source, a processor and a model small enough to train in a test; workers import this module by name."""

import os
import signal
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from minim3.processing.image import MiniMaxM3VLImageProcessor
from minim3.training.config import TrainingConfig, parse_recipe
from minim3.training.data import Group, Sample

VOCAB, IMAGE, START, ASSISTANT, END, VIDEO = 40, 39, 38, 37, 36, 35


class ToyProcessor:
    """Conversations whose texts are numbers below 35: the numbers are the ids."""

    def __init__(self) -> None:
        self.image_processor = MiniMaxM3VLImageProcessor(patch_size=2, min_pixels=16, max_pixels=4096)

    def encode_conversation(
        self, messages: Sequence[Any], *, num_image_tokens: Sequence[int] = ()
    ) -> tuple[list[int], list[bool]]:
        ids, mask, pictures = [START], [False], iter(num_image_tokens)
        for message in messages:
            answers = message["role"] == "assistant"
            content = message["content"]
            parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
            new = [ASSISTANT] if answers else []
            for part in parts:
                new += [IMAGE] * next(pictures) if part["type"] == "image" else map(int, part["text"].split())
            mask += [answers and place > 0 for place in range(len(new))] + [answers]
            ids += new + [END]
        return ids, mask


@dataclass(frozen=True)
class ToySource:
    """Copying two to six numbers; every second group is three questions about one 8 x 8 picture of one grey level."""

    seed: int
    fail_at: int | None = None  # the number of a group that raises
    die_at: int | None = None  # the number of a group at which the process kills itself

    def group(self, index: int) -> Group:
        rng = np.random.default_rng([self.seed, index])
        if index == self.fail_at:
            raise LookupError("the toy source was told to fail")
        if index == self.die_at:
            os.kill(os.getpid(), signal.SIGKILL)
        if rng.random() < 0.5:
            numbers = " ".join(map(str, rng.integers(35, size=rng.integers(2, 7))))
            return Group([Sample(conversation(numbers, numbers), kind="copy")])
        grey = int(rng.integers(4))
        question = [{"type": "image"}, {"type": "text", "text": str(rng.integers(35))}]
        samples = [Sample(conversation(question, str(grey)), image_indices=[0], kind="grey") for _ in range(3)]
        return Group(samples, [np.full((8, 8, 3), 60 * grey, dtype=np.uint8)])


def conversation(question: Any, answer: str) -> list[dict[str, Any]]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def toy_model_config() -> dict[str, Any]:
    return {
        "model_type": "minimax_m3_vl",
        "image_token_index": IMAGE,
        "video_token_index": VIDEO,
        "projector_hidden_size": 24,
        "text_config": {
            "model_type": "minimax_m3_vl_text",
            "vocab_size": VOCAB,
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 8,
            "rotary_dim": 4,
            "rope_theta": 10000.0,
            "max_position_embeddings": 512,
            "dense_intermediate_size": 48,
            "intermediate_size": 24,
            "shared_intermediate_size": 24,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "moe_layer_freq": [0, 1],
            "sparse_attention_config": {
                "use_sparse_attention": True,
                "sparse_attention_freq": [0, 1],
                "sparse_num_index_heads": 2,
                "sparse_index_dim": 8,
                "sparse_block_size": 4,
                "sparse_topk_blocks": 2,
                "sparse_init_block": 0,
                "sparse_local_block": 1,
                "sparse_score_type": "max",
            },
            "num_mtp_modules": 1,
            "initializer_range": 0.2,
        },
        "vision_config": {
            "model_type": "minimax_m3_vl_vision",
            "hidden_size": 24,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "intermediate_size": 32,
            "image_size": 8,
            "patch_size": 2,
            "num_channels": 3,
            "rope_theta": 10000.0,
            "initializer_range": 0.2,
            "img_token_compression_config": {"spatial_merge_size": 2, "temporal_patch_size": 2},
        },
    }


def toy_recipe(output: Any, steps: int = 6, **changes: Any) -> TrainingConfig:
    """A recipe of the toy model; `changes` replace whole top-level sections."""
    recipe: dict[str, Any] = {
        "output": str(output),
        "steps": steps,
        "seed": 3,
        "device": "cpu",
        "log_every_steps": 1,
        "model": {"config": toy_model_config()},
        "data": {
            "processor": "training_standins:ToyProcessor",
            "sources": [{"name": "training_standins:ToySource"}],
            "tokens_per_batch": 160,
        },
        "loss": {"mtp_weight": 0.3, "indexer_kl_weight": 0.5},
        "optim": {"lr": 1e-2, "weight_decay": 0.05, "ema_decay": 0.9, "router_bias_step": 0.01},
        "schedule": {"warmup_steps": 2},
        "export": {"format": "fp32"},
    }
    return parse_recipe({**recipe, **changes})


def toy_model(dtype: torch.dtype = torch.float64, seed: int = 0) -> Any:
    from minim3.training.trainer import build_model

    torch.manual_seed(seed)
    return build_model(toy_recipe("unused")).cast(dtype).train()
