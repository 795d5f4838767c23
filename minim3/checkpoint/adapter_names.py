"""Names of adapted modules: the released ones, and those of transformers, where PEFT meets the model.

A module is named here as in a text-only checkpoint (`model.layers.0.self_attn.q_proj`, `lm_head`); parts beside the
text keep their names (`multi_modal_projector.linear_1`). An expert is a module of its own: `...experts.3.w1`.
"""

import re
from collections.abc import Iterable

from minim3.checkpoint.names import TEXT_PREFIX

_LAYER = r"model\.layers\.\d+"
_MLP = r"(?:gate|up|down)_proj"
_MOE = rf"block_sparse_moe\.(?:experts\.\d+\.w[123]|shared_experts\.{_MLP})"

TARGET_GROUPS = {
    "attention": rf"{_LAYER}\.self_attn\.[qkvo]_proj",
    "indexer": rf"{_LAYER}\.self_attn\.index_[qk]_proj",
    "mlp": rf"{_LAYER}\.mlp\.{_MLP}",
    "shared_experts": rf"{_LAYER}\.block_sparse_moe\.shared_experts\.{_MLP}",
    "experts": rf"{_LAYER}\.block_sparse_moe\.experts\.\d+\.w[123]",
    "projector": r"(?:multi_modal_projector|patch_merge_mlp)\.linear_[12]",
    "vision": r"vision_tower\.vision_model\.encoder\.layers\.\d+\.(?:self_attn\.(?:[qkv]|out)_proj|mlp\.fc[12])",
    "lm_head": r"lm_head",
    "mtp": rf"model\.mtp\.layers\.\d+\.(?:eh_proj|transformer_layer\.(?:self_attn\.[qkvo]_proj|mlp\.{_MLP}|{_MOE}))",
}
"""What a recipe can adapt by one name, as patterns of whole module names."""

# From a released module to its name in transformers. Fused projections and experts are more than a name: see `fused`.
_TO_TRANSFORMERS = (
    (r"model\.layers\.", "model.language_model.layers."),
    (r"vision_tower\.vision_model\.encoder\.layers\.", "model.vision_tower.layers."),
    (r"multi_modal_projector\.", "model.multi_modal_projector."),
    (r"patch_merge_mlp\.", "model.multi_modal_projector.merge_"),
)
_WITHIN_TRANSFORMERS = (
    (r"\.self_attn\.index_([qk])_proj", r".self_attn.indexer.\1_proj"),
    (r"\.block_sparse_moe\.", ".mlp."),
)
_FUSED_PAIR = re.compile(r"(.*\.)(gate|up)_proj")
_EXPERT = re.compile(r"(.*\.experts)\.(\d+)\.(w[123])")


def plain_name(name: str) -> str:
    """A parameter or module name without the prefix of the text part in a vision-language model."""
    return name.removeprefix(TEXT_PREFIX)


def transformers_name(module: str, text_only: bool = False) -> str:
    """The name of a released module in transformers' model (that of gate, up and routed experts before it fuses them).

    text_only: in its model without a vision part.
    """
    for old, new in () if text_only else _TO_TRANSFORMERS:
        module, changed = re.subn("^" + old, new, module)
        if changed:
            break
    for old, new in _WITHIN_TRANSFORMERS:
        module = re.sub(old, new, module)
    return module


def released_name(module: str) -> str:
    """The released name of a module that may be named as in transformers, without the prefix of the text part."""
    module = re.sub(r"^(?:model\.)?language_model\.(?:model\.)?", "model.", module)
    module = re.sub(r"^model\.lm_head", "lm_head", module)
    module = re.sub(r"^model\.vision_tower\.layers\.", "vision_tower.vision_model.encoder.layers.", module)
    module = re.sub(r"^model\.multi_modal_projector\.merge_", "patch_merge_mlp.", module)
    module = re.sub(r"^model\.multi_modal_projector\.", "multi_modal_projector.", module)
    module = re.sub(r"\.self_attn\.indexer\.([qk])_proj", r".self_attn.index_\1_proj", module)
    return re.sub(r"\.mlp\.(experts|shared_experts)(?=\.|$)", r".block_sparse_moe.\1", module)


def fused_pair(module: str) -> tuple[str, int] | None:
    """The module that a released gate or up projection is fused into in transformers (its released name, had it one),
    and which half of the rows it is."""
    match = _FUSED_PAIR.fullmatch(module)
    return (f"{match[1]}gate_up_proj", ("gate", "up").index(match[2])) if match else None


def expert_place(module: str) -> tuple[str, int, str] | None:
    """The experts' module (`...experts`), the expert and "w1", "w2" or "w3", of a released expert's projection."""
    match = _EXPERT.fullmatch(module)
    return (match[1], int(match[2]), match[3]) if match else None


def target_pattern(adapted: Iterable[str], present: Iterable[str]) -> str:
    """PEFT's `target_modules`: a pattern that picks `adapted` out of `present`, released modules both.

    It matches the names that transformers gives to the same modules, too, but not routed experts, which are no modules
    there.
    """
    chosen = set(adapted)
    kinds: dict[str, dict[str, bool]] = {}
    for module in present:
        kinds.setdefault(re.sub(r"\.\d+(?=\.|$)", ".#", module), {})[module] = module in chosen
    patterns = set()
    for kind, modules in kinds.items():
        if all(modules.values()):
            patterns |= {_pattern(name, r"\\d+") for name in _spellings(kind)}
        else:
            patterns |= {_pattern(name, "") for module in modules if module in chosen for name in _spellings(module)}
    return "|".join(sorted(patterns))


def _spellings(module: str) -> set[str]:
    names = {module}
    pair = fused_pair(module)
    if pair is not None:
        names.add(transformers_name(pair[0]))
    elif ".experts." not in module:
        names.add(transformers_name(module))
    return names


def _pattern(module: str, number: str) -> str:
    pattern = re.sub(r"^(?:model|language_model)\.(?:language_model\.)?(?=layers|mtp)", "", module)
    within_text = pattern != module or module == "lm_head"
    pattern = re.escape(pattern).replace(r"\#", "#")
    if number:
        pattern = re.sub("#", number, pattern)
    return (r"(?:model\.|language_model\.)*" if within_text else "") + pattern
