"""bf16 products from fp32 weights: the weights that the optimizer moves, and a checkpoint saves, never leave fp32.

Each module casts its weights as it runs and drops the cast ones afterwards; the cast is part of the graph, so that
gradients arrive, and add up, in fp32. Norms, rotary positions, softmaxes, the router and losses compute in fp32 inside,
as they do for a bf16 model.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from minim3.model.moe import MiniMaxM3Experts, MiniMaxM3Router
from minim3.model.vision import PatchEmbedding


def compute_in_bf16(model: nn.Module) -> None:
    """Let a fp32 model compute in bf16, from outside: parameters keep their names and dtype.

    After this no module may be replaced by one of another kind, so it comes last.
    """
    for module in model.modules():
        if isinstance(module, MiniMaxM3Router):
            continue  # it computes in fp32 whatever comes in
        if isinstance(module, nn.Embedding):  # what was looked up is cast, not the whole table
            module.forward = partial(_cast_output, module.forward)  # type: ignore[method-assign]
        elif isinstance(module, (nn.Linear, nn.LayerNorm, PatchEmbedding)) or type(module) is MiniMaxM3Experts:
            module.forward = partial(_with_cast_weights, module, module.forward)  # type: ignore[method-assign]


def _cast_output(forward: Callable[..., Tensor], *inputs: Any) -> Tensor:
    return forward(*inputs).to(torch.bfloat16)


def _with_cast_weights(module: nn.Module, forward: Callable[..., Tensor], x: Tensor, *inputs: Any) -> Tensor:
    cast = {
        name: parameter.to(torch.bfloat16)
        for name, parameter in module._parameters.items()
        if parameter is not None and name in ("weight", "bias", "w13", "w2")
    }
    # An attribute in the instance's own dictionary stands before the parameter of that name.
    module.__dict__.update(cast)
    try:
        return forward(x.to(torch.bfloat16), *inputs)
    finally:
        for name in cast:
            del module.__dict__[name]
