"""LoRA factors of the projections that transformers fuses: gate with up, and all routed experts in two parameters.

There one A and one B adapt the fused rows. Taken apart, gate and up keep the whole A, each with its rows of B. Put
together, the two A stand one above the other and the B in blocks on a diagonal, at twice the rank: both are exact.
PEFT keeps the factors of E stacked experts side by side: A `[E * r, in]`, B `[out, r * E]` with the expert innermost.
"""

import re
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

_EXPERTS, _PAIR = re.compile(r"(.*\.experts)(\.base_layer)?"), re.compile(r"(.*\.)gate_up_proj")
_STACK = re.compile(r"(.*\.experts)\.(gate_up|down)_proj")


def adapted_name(module: str, target_parameters: Sequence[str]) -> str:
    """What a module of an adapter file adapts: itself, or a parameter of the stacked experts that PEFT wrapped.

    The wrappers of two parameters are nested, that of gate and up inside.
    """
    match = _EXPERTS.fullmatch(module)
    if match is None:
        return module
    alone = [name for name in ("gate_up_proj", "down_proj") if any(p.endswith(name) for p in target_parameters)]
    outer = alone[0] if len(alone) == 1 else "down_proj"
    return f"{match[1]}.{'gate_up_proj' if match[2] else outer}"


def split_fused(
    module: str, a: Tensor, b: Tensor, rank: int, source: str
) -> Iterator[tuple[str, Tensor, Tensor]]:
    """(module, A, B) of every projection that an `adapted_name` stands for: itself, where it is not fused."""
    pair, stack = _PAIR.fullmatch(module), _STACK.fullmatch(module)
    if stack:
        if a.shape[0] % rank or a.shape[0] != b.shape[1]:
            raise ValueError(
                f"adapter {source}: {module} has lora_A {list(a.shape)} and lora_B {list(b.shape)}, but rank {rank}"
            )
        of_experts = a.unflatten(0, (-1, rank)), b.unflatten(1, (rank, -1)).permute(2, 0, 1)
        for expert, (a_expert, b_expert) in enumerate(zip(*of_experts)):
            if stack[2] == "gate_up":
                for name, rows in zip(("w1", "w3"), _halves(b_expert, module, source)):
                    yield f"{stack[1]}.{expert}.{name}", a_expert, rows
            else:
                yield f"{stack[1]}.{expert}.w2", a_expert, b_expert
    elif pair:
        for name, rows in zip(("gate_proj", "up_proj"), _halves(b, module, source)):
            yield pair[1] + name, a, rows
    else:
        yield module, a, b


def _halves(b: Tensor, module: str, source: str) -> tuple[Tensor, Tensor]:
    if b.shape[0] % 2:
        raise ValueError(f"adapter {source}: lora_B of {module} has {b.shape[0]} rows; gate and up have as many each")
    first, second = b.chunk(2)
    return first, second


def fuse_pair(pair: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """(A, B) of gate and of up -> those of the fused projection, of the summed rank."""
    return torch.cat([a for a, _ in pair]), torch.block_diag(*[b for _, b in pair])


def stack_experts(experts: Mapping[int, tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """(A, B) of every expert, 0 to E - 1 -> the flat pair of PEFT."""
    ordered = [experts[expert] for expert in range(len(experts))]
    return torch.cat([a for a, _ in ordered]), torch.stack([b for _, b in ordered], dim=-1).flatten(1)
