"""minim3: MiniMax-M3, whole, in one small PyTorch codebase.

    import minim3
    model, processor = minim3.load("path/or/hub-id")

Names are imported when first used, so that `import minim3` stays cheap.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_PUBLIC = {
    "load": "minim3.loading",
    "MiniMaxM3VLConfig": "minim3.config",
    "MiniMaxM3VLTextConfig": "minim3.config",
    "MiniMaxM3VLVisionConfig": "minim3.config",
    "MiniMaxM3SparseForCausalLM": "minim3.model.causal_lm",
    "MiniMaxM3SparseForConditionalGeneration": "minim3.model.causal_lm",
    "MiniMaxM3CausalLMOutput": "minim3.model.outputs",
    "MiniMaxM3TextModel": "minim3.model.decoder",
    "Block": "minim3.model.decoder",
    "MiniMaxM3Attention": "minim3.model.attention",
    "MiniMaxM3Indexer": "minim3.model.attention",
    "MiniMaxM3MoE": "minim3.model.moe",
    "MiniMaxM3MLP": "minim3.model.layers",
    "MiniMaxM3RMSNorm": "minim3.model.layers",
    "swiglu_oai": "minim3.model.layers",
    "MiniMaxM3MTP": "minim3.model.mtp",
    "MiniMaxM3MTPBlock": "minim3.model.mtp",
    "MiniMaxM3VisionModel": "minim3.model.vision",
    "build_block_sparse_attn_bias": "minim3.kernels.reference",
    "MiniMaxM3VLImageProcessor": "minim3.processing.image",
    "MiniMaxM3VLVideoProcessor": "minim3.processing.video",
    "MiniMaxM3VLProcessor": "minim3.processing.processor",
    "Engine": "minim3.inference.engine",
    "SamplingParams": "minim3.inference.request",
}

__all__ = ["__version__", *_PUBLIC]

if TYPE_CHECKING:
    from minim3.config import MiniMaxM3VLConfig, MiniMaxM3VLTextConfig, MiniMaxM3VLVisionConfig
    from minim3.inference.engine import Engine
    from minim3.inference.request import SamplingParams
    from minim3.kernels.reference import build_block_sparse_attn_bias
    from minim3.loading import load
    from minim3.model.attention import MiniMaxM3Attention, MiniMaxM3Indexer
    from minim3.model.causal_lm import MiniMaxM3SparseForCausalLM, MiniMaxM3SparseForConditionalGeneration
    from minim3.model.decoder import Block, MiniMaxM3TextModel
    from minim3.model.layers import MiniMaxM3MLP, MiniMaxM3RMSNorm, swiglu_oai
    from minim3.model.moe import MiniMaxM3MoE
    from minim3.model.mtp import MiniMaxM3MTP, MiniMaxM3MTPBlock
    from minim3.model.outputs import MiniMaxM3CausalLMOutput
    from minim3.model.vision import MiniMaxM3VisionModel
    from minim3.processing.image import MiniMaxM3VLImageProcessor
    from minim3.processing.processor import MiniMaxM3VLProcessor
    from minim3.processing.video import MiniMaxM3VLVideoProcessor


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        value = getattr(import_module(_PUBLIC[name]), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module 'minim3' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
