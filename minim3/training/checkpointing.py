"""Activation checkpointing: of every layer only the input is kept, and the layer is computed again on the way back.

What a layer decided without a gradient (key blocks, experts) is kept too, and followed the second time: decided again,
a tie or a router that moved meanwhile could send gradients through other blocks and experts than the loss came from.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from minim3.model.batch import ForwardRecord
from minim3.model.decoder import Block
from minim3.model.vision import VisionEncoderLayer


def checkpoint_activations(model: nn.Module) -> None:
    """Checkpoint every decoder block (those of MTP modules too) and every layer of the vision tower, from outside.

    Parameters keep their names, and passes without gradients run as before.
    """
    for module in model.modules():
        if isinstance(module, Block):
            module.forward = partial(_run_block, module.forward)  # type: ignore[method-assign]
        elif isinstance(module, VisionEncoderLayer):
            module.forward = partial(_run_layer, module.forward)  # type: ignore[method-assign]


def _run_layer(forward: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
    if not torch.is_grad_enabled():
        return forward(*inputs)
    return checkpoint(forward, *inputs, use_reentrant=False)


def _run_block(
    forward: Callable[..., Tensor], x: Tensor, *, record: ForwardRecord | None = None, **options: Any
) -> Tensor:
    if not torch.is_grad_enabled():
        return forward(x, record=record, **options)
    record = record or ForwardRecord()
    choices = {} if record.choices is None else record.choices
    # The second pass computes what the first did, the alignment loss included, but has nothing to tell.
    records = iter([replace(record, choices=choices)])
    kept_losses = record.indexer_kl is not None

    def run(x: Tensor) -> Tensor:
        again = ForwardRecord(indexer_kl=[] if kept_losses else None, choices=choices)
        return forward(x, record=next(records, again), **options)

    return checkpoint(run, x, use_reentrant=False)
