"""Adapters of a model: put on, trained, saved in PEFT's format, loaded, merged.

    attach_adapter(model, targets=("attention", "experts"), rank=8, alpha=16)     fresh factors, the base frozen
    save_adapter(model, "runs/lora/adapter")
    load_adapter(model, "runs/lora/adapter")                                      beside the weights
    merge_adapter(model)                                                          into the weights

`minim3.load(..., adapter=)` merges on loading, tensor by tensor: for inference that is all there is to do.
"""

import difflib
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from minim3.checkpoint.adapter import LoraFactors, fingerprint, read_adapter, write_adapter
from minim3.checkpoint.adapter_names import TARGET_GROUPS, plain_name
from minim3.checkpoint.adapter_peft import peft_files
from minim3.checkpoint.names import released_keys
from minim3.model.attention import MiniMaxM3Attention
from minim3.model.layers import MiniMaxM3MLP
from minim3.model.lora import LoraExperts, LoraHead, LoraLinear, LoraModule, LoraSettings
from minim3.model.moe import MiniMaxM3Experts


def attach_adapter(
    model: nn.Module, *, targets: Sequence[str], rank: int, alpha: float, dropout: float = 0.0, rslora: bool = False
) -> None:
    """Put a fresh adapter on `model`, which changes nothing yet, and freeze everything else.

    targets: names of `TARGET_GROUPS`, or ends of module names (`self_attn.q_proj`, `layers.3.mlp.down_proj`,
    `experts.w2`). alpha: the change is `alpha / rank * B @ A` (rslora: `alpha / sqrt(rank)`). dropout: on the input of
    A, in training. The A are drawn from torch's generator.

    Raises:
        ValueError: a target that names nothing here (its nearest match is named), a quantized model, a head that is
            tied to the embedding, or a model that has an adapter.
    """
    if rank < 1 or not alpha > 0 or not 0 <= dropout < 1:
        raise ValueError(
            f"rank is {rank}, alpha {alpha}, dropout {dropout}; they need rank >= 1, alpha > 0, 0 <= dropout < 1"
        )
    settings = LoraSettings(rank, alpha, dropout, rslora)
    _attach(model, dict.fromkeys(select_targets(model, targets), settings))


def load_adapter(model: nn.Module, path: str | Path, *, check_base: bool = True) -> None:
    """Put a saved adapter on `model`, beside its weights, and freeze everything else.

    check_base: refuse an adapter that was trained on other weights.

    Raises:
        ValueError: no whole adapter, or one that does not fit this model.
    """
    adapter = read_adapter(path)
    adapter.check_shapes(_weight_shapes(model), text_only=not hasattr(model, "vision_tower"))
    if check_base:
        adapter.check_base(_tensors(model))
    by_name = {plain_name(name): name for name in _adaptable(model)}
    settings, values = {}, {}
    for name, pieces in adapter.by_parameter().items():
        if name not in by_name:
            continue  # of the vision part, which a text model lacks
        kinds = {(factors.rank, factors.alpha, factors.rslora) for _, factors in pieces}
        if len(kinds) > 1:
            raise ValueError(
                f"adapter {path} has several ranks or alphas among the experts of {name}: it can be merged "
                "(minim3.load(..., adapter=), minim3 convert --adapter), but not put beside the weights"
            )
        ((rank, alpha, rslora),) = kinds
        settings[by_name[name]] = LoraSettings(rank, alpha, 0.0, rslora)
        values[by_name[name]] = pieces
    _attach(model, settings)
    with torch.no_grad():
        for module_name, module in adapted_modules(model):
            for weight in module.factor_names:
                a, b = module.factors_of(weight)
                pieces = values[f"{module_name}.{weight}"]
                if pieces[0][0].expert is not None:  # experts and halves that the file leaves out do not change
                    a.zero_()
                for place, factors in pieces:
                    place.of_parameter(a).copy_(factors.a)
                    place.of_parameter(b).copy_(factors.b)


@torch.no_grad()
def merge_adapter(model: nn.Module) -> None:
    """Add the adapter of `model` to its weights, in place, and take it off. Sums are taken in at least fp32.

    The weights stay frozen: `model.requires_grad_(True)` makes them trainable.
    """
    factors = adapter_factors(model)
    for name, module in list(adapted_modules(model)):
        for weight_name in module.factor_names:
            parameter = module._parameters[weight_name]
            assert parameter is not None
            for key, place in released_keys(f"{name}.{weight_name}", _num_experts(module)):
                factors[key].add_to(place.of_parameter(parameter))
    remove_adapter(model)


def remove_adapter(model: nn.Module) -> None:
    """Take the adapter off: the weights are what they were."""
    for name, module in list(adapted_modules(model)):
        _replace(model, name, module.original())
    _forget_packing(model)


def save_adapter(
    model: nn.Module, path: str | Path, *, base: str | Path | None = None, naming: str = "released"
) -> None:
    """Write the adapter of `model` as PEFT does. `base` is noted as the model that it belongs to.

    naming: "released" names modules, routed experts one by one, as released checkpoints do. "transformers" names them
    as its model does, with its fused projections (exact, at twice the rank), so that PEFT loads all of them there;
    MTP modules, which it lacks, are left out. `load_adapter` reads both.
    """
    factors = adapter_factors(model)
    if not factors:
        raise ValueError("the model has no adapter to save: attach_adapter or load_adapter puts one on")
    tensors, config = peft_files(
        factors, _weight_shapes(model), naming=naming, base=None if base is None else str(base)
    )
    write_adapter(path, tensors, config, fingerprint(_tensors(model)))


def adapter_factors(model: nn.Module) -> dict[str, LoraFactors]:
    """The factors of every adapted weight, by its released key; views of the parameters. Empty without an adapter."""
    found = {}
    for name, module in adapted_modules(model):
        for weight_name in module.factor_names:
            a, b = module.factors_of(weight_name)
            for key, place in released_keys(f"{name}.{weight_name}", _num_experts(module)):
                settings = module.lora[weight_name]
                found[key] = LoraFactors(
                    place.of_parameter(a), place.of_parameter(b), settings.alpha, settings.rslora
                )
    return found


def adapted_modules(model: nn.Module) -> Iterator[tuple[str, LoraModule]]:
    """The modules that carry factors, with their names."""
    return ((name, module) for name, module in model.named_modules() if isinstance(module, LoraModule))


def adapter_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters of the adapter by name: all that an adapted model trains."""
    return {
        f"{name}.{factor}": module.get_parameter(factor)
        for name, module in adapted_modules(model)
        for pair in module.factor_names.values()
        for factor in pair
    }


class AdapterWeights:
    """The adapter of a model in the place of the model, for what saves or averages everything that is trained."""

    def __init__(self, model: nn.Module) -> None:
        self._parameters = adapter_parameters(model)

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        return iter(self._parameters.items())

    def named_buffers(self) -> Iterator[tuple[str, Tensor]]:
        return iter(())


def select_targets(model: nn.Module, targets: Sequence[str]) -> list[str]:
    """The names of the parameters that `targets` (see `attach_adapter`) adapt, in the order of the model."""
    if not targets:
        raise ValueError(f"no targets are given to adapt; known groups: {', '.join(TARGET_GROUPS)}")
    names: dict[str, list[str]] = {}  # of each parameter: what can be said for it
    for name, module in _adaptable(model).items():
        released = [plain_name(key).removesuffix(".weight") for key, _ in released_keys(name, _num_experts(module))]
        names[name] = [plain_name(name).removesuffix(".weight"), *released]
    chosen = set()
    for target in targets:
        pattern = re.compile(TARGET_GROUPS.get(target, rf"(?:.*\.)?{re.escape(target)}"))
        by_group = target in TARGET_GROUPS
        # A group names released modules, anything else a module or stack of this model.
        found = {
            name for name, known in names.items() if any(map(pattern.fullmatch, known if by_group else known[:1]))
        }
        if not found:
            raise ValueError(_no_target(target, [known[0] for known in names.values()]))
        chosen |= found
    return [name for name in names if name in chosen]


def _no_target(target: str, modules: Sequence[str]) -> str:
    if target in TARGET_GROUPS:
        return f"target {target!r} names nothing in this model: it has no such part"
    ends = {".".join(parts[-n:]) for parts in (module.split(".") for module in modules) for n in (1, 2)}
    known = [*TARGET_GROUPS, *sorted(ends), *modules]
    nearest = difflib.get_close_matches(target, known, n=1, cutoff=0.0)[0]
    groups = ", ".join(TARGET_GROUPS)
    return f"target {target!r} names nothing in this model; did you mean {nearest!r}? Groups: {groups}"


def _adaptable(model: nn.Module) -> dict[str, nn.Module]:
    """The parameters that can be adapted, and their modules."""
    if getattr(model, "quantization", None) is not None:
        raise ValueError(
            "quantized weights take no adapter: load the model without quantization, or merge the adapter on loading "
            "(minim3.load(..., adapter=, quantization=))"
        )
    found: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            found[f"{name}.weight"] = module
        elif isinstance(module, MiniMaxM3Experts):
            found |= {f"{name}.w13": module, f"{name}.w2": module}
    return found


def _weight_shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """The shape of every weight that can be adapted, by released key."""
    shapes = {}
    for name, module in _adaptable(model).items():
        weight = module._parameters[name.rpartition(".")[2]]
        assert weight is not None
        for key, place in released_keys(name, _num_experts(module)):
            shapes[key] = tuple(place.of_parameter(weight).shape)
    return shapes


def _num_experts(module: nn.Module) -> int | None:
    return module.w13.shape[0] if isinstance(module, MiniMaxM3Experts) else None


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    return dict(model.named_parameters())


def _attach(model: nn.Module, settings: Mapping[str, LoraSettings]) -> None:
    """Put factors on the parameters of these names, and freeze everything else."""
    if any(True for _ in adapted_modules(model)):
        raise ValueError("the model has an adapter: merge_adapter or remove_adapter first")
    modules = dict(model.named_modules())
    embeddings = {id(module.weight) for module in modules.values() if isinstance(module, nn.Embedding)}
    of_modules: dict[str, dict[str, LoraSettings]] = {}
    for parameter_name, of_weight in settings.items():
        name, _, weight = parameter_name.rpartition(".")
        of_modules.setdefault(name, {})[weight] = of_weight
    adapted: dict[str, nn.Module] = {}
    for name, of_weights in of_modules.items():
        module = modules[name]
        if isinstance(module, MiniMaxM3Experts):
            adapted[name] = LoraExperts(module, of_weights)
            continue
        assert isinstance(module, nn.Linear)
        if id(module.weight) in embeddings:
            raise ValueError(f"{name} is tied to the embedding, which an adapter would change too: leave it out")
        adapted[name] = (LoraHead if name.endswith("lm_head") else LoraLinear)(module, of_weights["weight"])
    model.requires_grad_(False)
    for name, module in adapted.items():
        _replace(model, name, module)
    for parameter in adapter_parameters(model).values():
        parameter.requires_grad_(True)
    _forget_packing(model)


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)


def _forget_packing(model: nn.Module) -> None:
    """Joint products hold projections as they were: those of before know nothing of an adapter, and the reverse."""
    for module in model.modules():
        if isinstance(module, (MiniMaxM3Attention, MiniMaxM3MLP)):
            module._packed = None
