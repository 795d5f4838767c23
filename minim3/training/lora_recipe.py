"""What a recipe says about an adapter; read without torch, as all recipes are."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class LoraRecipe:
    """Train a low-rank adapter of frozen weights (`minim3.model.adapter.attach_adapter`) in the place of the weights.

    targets: what is adapted, as groups (attention, indexer, mlp, shared_experts, experts, projector, vision, lm_head,
    mtp) or ends of module names (self_attn.q_proj, layers.3.mlp.down_proj). The change is `alpha / rank * B @ A`,
    with rslora `alpha / sqrt(rank) * B @ A`. dropout: on the input of A. naming: of the modules in the exported files,
    "released", or "transformers" for PEFT on its model, which fuses gate with up.
    """

    targets: tuple[str, ...] = ("attention", "mlp", "shared_experts", "experts")
    rank: int = 16
    alpha: float = 32.0
    dropout: float = 0.0
    rslora: bool = False
    naming: Literal["released", "transformers"] = "released"

    def __post_init__(self) -> None:
        if not self.targets:
            raise ValueError("lora.targets is empty: an adapter needs something to adapt")
        if self.rank < 1:
            raise ValueError(f"lora.rank must be at least 1, is {self.rank}")
        if not self.alpha > 0:
            raise ValueError(f"lora.alpha must be positive, is {self.alpha}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"lora.dropout must lie in [0, 1), is {self.dropout}")
