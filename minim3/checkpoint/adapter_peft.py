"""What an adapter folder holds, from the factors of a model: PEFT's config, and its tensors under either naming.

The config serves both: its `target_modules` matches released names and those of transformers. Where transformers fuses
what is released apart (gate with up, all experts in two parameters) it says so, with the rank of the two together.
"""

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor

from minim3.checkpoint.adapter import PEFT_PREFIX, LoraFactors
from minim3.checkpoint.adapter_fusion import fuse_pair, stack_experts
from minim3.checkpoint.adapter_names import expert_place, fused_pair, plain_name, target_pattern, transformers_name
from minim3.checkpoint.names import TEXT_PREFIX

NAMINGS = ("released", "transformers")

Pair = tuple[Tensor, Tensor]
Kind = tuple[int, float]  # rank and alpha


def peft_files(
    factors: Mapping[str, LoraFactors], present: Iterable[str], *, naming: str, base: str | None
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and config of an adapter folder.

    factors: by released key. present: the released keys of all weights that could have been adapted.
    Raises `ValueError` for an unknown naming, and for what transformers' fused projections cannot hold.
    """
    if naming not in NAMINGS:
        raise ValueError(f"naming is {naming!r}; known: {', '.join(NAMINGS)}")
    modules = {key.removesuffix(".weight"): value for key, value in factors.items()}
    everything = [key.removesuffix(".weight") for key in present]
    text_only = not any(module.startswith(TEXT_PREFIX) for module in everything)
    fused = _fused(modules, text_only)
    pairs = {module: (value.a, value.b) for module, value in modules.items()}
    if naming == "transformers":
        pairs = _fuse(pairs, fused, text_only)
    kinds = {module: (value.rank, value.alpha) for module, value in modules.items()}
    rslora = any(value.rslora for value in modules.values())
    config = _config(kinds, fused, rslora) | {
        "base_model_name_or_path": base,
        "target_modules": target_pattern(map(plain_name, modules), map(plain_name, everything)),
        "target_parameters": _target_parameters(fused) or None,
    }
    tensors = {
        f"{PEFT_PREFIX}{module}.lora_{letter}.weight": factor.detach().cpu()
        for module, pair in pairs.items()
        for letter, factor in zip("AB", pair)
    }
    return tensors, config


def _fused(modules: Iterable[str], text_only: bool) -> dict[str, list[str]]:
    """The released modules that each fused projection or stack of transformers is made of, in their order there."""
    found: dict[str, list[tuple[int, int, str]]] = {}
    for module in modules:
        name = plain_name(module)
        expert, pair = expert_place(name), fused_pair(name)
        if expert is not None:
            experts, number, weight = expert
            stack = "down_proj" if weight == "w2" else "gate_up_proj"
            place = f"{transformers_name(experts, text_only)}.{stack}", number, int(weight == "w3")
        elif pair is not None:
            place = transformers_name(pair[0], text_only), 0, pair[1]
        else:
            continue
        found.setdefault(place[0], []).append((*place[1:], module))
    return {name: [module for *_, module in sorted(parts)] for name, parts in found.items()}


def _fuse(pairs: Mapping[str, Pair], fused: Mapping[str, Sequence[str]], text_only: bool) -> dict[str, Pair]:
    """The factors under the names of transformers' modules; without those of MTP modules, which it lacks."""
    out = {}
    for name, parts in fused.items():
        if ".mtp." in name:
            continue
        experts: dict[int, list[Pair]] = {}
        for module in parts:
            place = expert_place(plain_name(module))
            experts.setdefault(place[1] if place else 0, []).append(pairs[module])
        both = name.endswith("gate_up_proj")
        if any(len(of_expert) != 1 + both for of_expert in experts.values()):
            raise ValueError(f"transformers fuses {name}: adapt gate and up together to save for it")
        joined = {number: fuse_pair(of_expert) if both else of_expert[0] for number, of_expert in experts.items()}
        if ".experts." in name:
            outer = not both or name.replace("gate_up_proj", "down_proj") not in fused
            module = name.rpartition(".")[0] + ("" if outer else ".base_layer")
            out[module] = stack_experts(joined)
        else:
            out[name] = joined[0]
    apart = {module for parts in fused.values() for module in parts}
    for module, pair in pairs.items():
        if module not in apart and ".mtp." not in module:
            out[transformers_name(plain_name(module), text_only)] = pair
    return out


def _config(kinds: Mapping[str, Kind], fused: Mapping[str, Sequence[str]], rslora: bool) -> dict[str, Any]:
    """Ranks and alphas: the most frequent ones for all, and by module where they differ."""
    (rank, alpha), _ = Counter(kinds.values()).most_common(1)[0]
    ranks = {re.escape(module): kind[0] for module, kind in kinds.items() if kind[0] != rank}
    alphas = {re.escape(module): kind[1] for module, kind in kinds.items() if kind[1] != alpha}
    of_fused = {name: kinds[parts[0]] for name, parts in fused.items()}
    both = {name: kind for name, kind in of_fused.items() if name.endswith("gate_up_proj")}
    if len(set(both.values())) == 1:
        both = {"gate_up_proj": next(iter(both.values()))}
    for name, (own_rank, own_alpha) in both.items():
        # At twice the rank, alpha grows so that alpha / r (rslora: alpha / sqrt(r)) stays.
        ranks[re.escape(name)] = 2 * own_rank
        alphas[re.escape(name)] = own_alpha * (2**0.5 if rslora else 2)
    return {
        "peft_type": "LORA",
        "task_type": None,
        "r": rank,
        "lora_alpha": _number(alpha),
        "lora_dropout": 0.0,
        "use_rslora": rslora,
        "rank_pattern": ranks,
        "alpha_pattern": {name: _number(value) for name, value in alphas.items()},
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "inference_mode": True,
        "modules_to_save": None,
    }


def _number(alpha: float) -> float | int:
    return int(alpha) if alpha == int(alpha) else alpha


def _target_parameters(fused: Mapping[str, Sequence[str]]) -> list[str]:
    """The stacked experts, for transformers. PEFT compares the ends of names."""
    stacks = sorted(name for name in fused if ".experts." in name and ".mtp." not in name)
    return sorted({name.partition("layers.")[2] and "layers." + name.partition("layers.")[2] for name in stacks})
