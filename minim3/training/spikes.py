"""Steps that would do harm: a loss or a gradient norm that is not finite, or that jumps."""

import math
from collections import deque
from typing import Any

from minim3.training.config import SpikeRecipe

FEWEST_STEPS = 20  # before so many steps nobody knows what is usual


class TrainingDiverged(FloatingPointError):
    """So many steps in a row were skipped that going on makes no sense."""


class SpikeGuard:
    """Judges every step before its weights move, by the largest loss and gradient norm of the last good steps."""

    def __init__(self, recipe: SpikeRecipe) -> None:
        self.recipe = recipe
        self.recent: deque[tuple[float, float]] = deque(maxlen=recipe.window)
        self.num_skipped = self.in_row = 0

    def reason_to_skip(self, loss: float, norm: float) -> str | None:
        """What is wrong with a step of this loss and gradient norm, None if nothing; the step is counted either way."""
        reason = self._judge(loss, norm)
        if reason is None:
            self.recent.append((loss, norm))
            self.in_row = 0
        else:
            self.num_skipped += 1
            self.in_row += 1
        return reason

    @property
    def gives_up(self) -> bool:
        return self.in_row >= self.recipe.max_in_row

    def _judge(self, loss: float, norm: float) -> str | None:
        named = {"loss": loss, "gradient norm": norm}
        for name, value in named.items():
            if not math.isfinite(value):
                return f"the {name} is {value}"
        if self.recipe.factor and len(self.recent) >= min(FEWEST_STEPS, self.recipe.window):
            for (name, value), seen in zip(named.items(), zip(*self.recent, strict=True), strict=True):
                if value > self.recipe.factor * max(seen):
                    return (
                        f"the {name} is {value:.4g}, more than {self.recipe.factor:g} times the largest of the last "
                        f"{len(seen)} steps, {max(seen):.4g}"
                    )
        return None

    def state(self) -> dict[str, Any]:
        """Plain values for a checkpoint; floats survive JSON to the bit."""
        return {"recent": [list(pair) for pair in self.recent], "num_skipped": self.num_skipped, "in_row": self.in_row}

    def restore(self, state: dict[str, Any] | None) -> None:
        """Take up `state()` of another guard; None (a new run) leaves everything as it is."""
        if state is None:
            return
        self.recent.extend((loss, norm) for loss, norm in state["recent"])
        self.num_skipped, self.in_row = state["num_skipped"], state["in_row"]
