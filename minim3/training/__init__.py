"""Training: recipes, packed batches from worker processes, losses, optimizer, checkpoints, the loop."""
