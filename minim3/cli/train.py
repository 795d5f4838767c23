"""`minim3 train`: run a recipe, or write what a run has come to."""

from collections.abc import Sequence
from pathlib import Path

from minim3.cli.errors import say
from minim3.training.config import load_recipe


def run_train(recipe: Path, overrides: Sequence[str], *, resume: bool, export: bool) -> int | None:
    """Train, or with `export` write the newest checkpoint; returns the signal that stopped the training, if one did."""
    parsed = load_recipe(recipe, overrides)  # before torch is imported: errors in a recipe come at once
    from minim3.training import trainer

    if export:
        step, path = trainer.export_newest(parsed)
        say(f"exported step {step} of {parsed.steps} to {path}")
        return None
    return trainer.train(parsed, resume=resume).stopped_by
