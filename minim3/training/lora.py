"""Training an adapter: what a run builds, saves and exports in the place of a whole model.

The base is frozen, its router bias too, so a checkpoint of the run holds the adapter alone: going on needs the recipe's
`model.start_from` as it was.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from minim3.checkpoint.adapter import fingerprint
from minim3.model.adapter import AdapterWeights, attach_adapter, save_adapter
from minim3.training.lora_recipe import LoraRecipe
from minim3.training.optim import MovingAverage
from minim3.training.state import TrainingState

_BASE = "base.norms"


def adapt(model: nn.Module, recipe: LoraRecipe) -> None:
    """Put the recipe's fresh adapter on `model` and freeze the rest. Raises ValueError for targets it does not have."""
    try:
        attach_adapter(
            model, targets=recipe.targets, rank=recipe.rank, alpha=recipe.alpha, dropout=recipe.dropout,
            rslora=recipe.rslora,
        )  # fmt: skip
    except ValueError as error:
        raise ValueError(f"lora.targets: {error}") from error


@dataclass(frozen=True)
class AdapterState(TrainingState):
    """The state of a run that trains an adapter: that, its optimizer and its average; the frozen base is left out."""

    @classmethod
    def of(cls, model: Any, optimizer: Any, ema_decay: float) -> "AdapterState":
        weights: Any = AdapterWeights(model)
        average = MovingAverage(weights, ema_decay) if ema_decay else None
        return cls(model, optimizer, average)

    def tensors(self) -> dict[str, Tensor]:
        return {**self._saved().tensors(), _BASE: self._base()}

    def restore(self, tensors: dict[str, Tensor], source: Path) -> None:
        base = tensors.pop(_BASE, None)
        if base is not None and not torch.equal(base, self._base()):
            raise ValueError(
                f"{source} holds an adapter of other weights than those of model.start_from (their norms differ): give "
                "the run the checkpoint it began with, or another output folder"
            )
        self._saved().restore(tensors, source)

    def _base(self) -> Tensor:
        """uint8 `[32]`: the fingerprint of the base."""
        digest = fingerprint(dict(self.model.named_parameters()))
        return torch.tensor(list(bytes.fromhex(digest)), dtype=torch.uint8)

    def _saved(self) -> TrainingState:
        weights: Any = AdapterWeights(self.model)
        return TrainingState(weights, self.optimizer, self.average)


def export_adapter(model: nn.Module, path: Path, base: str | None, recipe: LoraRecipe) -> None:
    """Write the adapter as `base`'s (a folder is named by its whole path, so that it is found from anywhere)."""
    if base is not None and Path(base).is_dir():
        base = str(Path(base).resolve())
    save_adapter(model, path, base=base, naming=recipe.naming)
