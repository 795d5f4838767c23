"""The one table between checkpoint keys and parameter names.

A rule pairs the two spellings as templates with the same fields; every other name is the same on both sides. Rules are
read left to right when loading and right to left when saving. `READ_ONLY_RULES` are the names that transformers gives
to a model saved without its vision part.
"""

import re
from dataclasses import dataclass
from functools import cache

import torch

TEXT_PREFIX = "language_model."  # of the text part inside a vision-language checkpoint
VISION_PREFIXES = ("vision_tower.", "multi_modal_projector.", "patch_merge_mlp.")

_FIELDS = {
    "layer": r"(?:.*\.)?layers\.\d+(?:\.transformer_layer)?",
    "expert": r"\d+",
    "index": r"index_[qk]_(?:proj|norm)",
    "role": r"[qk]_(?:proj|norm)",
    "tail": r"gate\.weight|shared_experts\.down_proj\.weight",
}


@dataclass(frozen=True)
class Rule:
    """`key` in the checkpoint is `name` in the model, or the half `half` of its rows (of one expert, for `{expert}`).

    `key_half` is the other way round: only that half of the rows of the key is this parameter.
    """

    key: str
    name: str
    half: int | None = None
    key_half: int | None = None


RULES = (
    Rule("{layer}.self_attn.{index}.weight", "{layer}.self_attn.indexer.{index}.weight"),
    # Stacked experts: the gate's rows (w1) come first in w13, then the up projection's (w3).
    Rule("{layer}.block_sparse_moe.experts.{expert}.w1.weight", "{layer}.block_sparse_moe.experts.w13", half=0),
    Rule("{layer}.block_sparse_moe.experts.{expert}.w3.weight", "{layer}.block_sparse_moe.experts.w13", half=1),
    Rule("{layer}.block_sparse_moe.experts.{expert}.w2.weight", "{layer}.block_sparse_moe.experts.w2"),
)
_SHARED = "{layer}.block_sparse_moe.shared_experts"
READ_ONLY_RULES = (
    Rule("{layer}.self_attn.indexer.{role}.weight", "{layer}.self_attn.indexer.index_{role}.weight"),
    Rule("{layer}.mlp.experts.gate_up_proj", "{layer}.block_sparse_moe.experts.w13"),
    Rule("{layer}.mlp.experts.down_proj", "{layer}.block_sparse_moe.experts.w2"),
    Rule("{layer}.mlp.gate.e_score_correction_bias", "{layer}.block_sparse_moe.e_score_correction_bias"),
    Rule("{layer}.mlp.{tail}", "{layer}.block_sparse_moe.{tail}"),
    Rule("{layer}.mlp.shared_experts.gate_up_proj.weight", _SHARED + ".gate_proj.weight", key_half=0),
    Rule("{layer}.mlp.shared_experts.gate_up_proj.weight", _SHARED + ".up_proj.weight", key_half=1),
    Rule("{layer}.mlp.gate_up_proj.weight", "{layer}.mlp.gate_proj.weight", key_half=0),
    Rule("{layer}.mlp.gate_up_proj.weight", "{layer}.mlp.up_proj.weight", key_half=1),
)


@dataclass(frozen=True)
class Placement:
    """Where (a part of) a checkpoint tensor goes: parameter, expert of a stack, half of the rows; None means all."""

    name: str
    expert: int | None = None
    half: int | None = None
    key_half: int | None = None

    def of_parameter(self, parameter: torch.Tensor) -> torch.Tensor:
        """The view of the parameter that this part fills."""
        view = parameter if self.expert is None else parameter[self.expert]
        return view if self.half is None else _half(view, self.half)

    def of_key(self, tensor: torch.Tensor) -> torch.Tensor:
        """The view of the checkpoint tensor that goes there."""
        return tensor if self.key_half is None else _half(tensor, self.key_half)


def _half(tensor: torch.Tensor, half: int) -> torch.Tensor:
    rows = tensor.shape[0] // 2
    return tensor[half * rows : (half + 1) * rows] if tensor.shape[0] == 2 * rows else tensor


@cache
def _pattern(template: str) -> re.Pattern[str]:
    parts = re.split(r"\{(\w+)\}", template)
    regex = "".join(f"(?P<{part}>{_FIELDS[part]})" if i % 2 else re.escape(part) for i, part in enumerate(parts))
    return re.compile(regex)


def placements(key: str) -> tuple[Placement, ...]:
    """What the checkpoint tensor `key` fills. Two placements where it holds two parameters."""
    found = []
    for rule in RULES + READ_ONLY_RULES:
        match = _pattern(rule.key).fullmatch(key)
        if match:
            fields = match.groupdict()
            expert = int(fields["expert"]) if "expert" in fields else None
            found.append(Placement(rule.name.format(**fields), expert, rule.half, rule.key_half))
    return tuple(found) or (Placement(key),)


def released_keys(name: str, num_experts: int | None = None) -> list[tuple[str, Placement]]:
    """The released keys that hold the parameter `name`, in the order of its memory. `num_experts` of a stack."""
    found = []
    for rule in RULES:
        match = _pattern(rule.name).fullmatch(name)
        if match:
            stacked = "{expert}" in rule.key
            assert not stacked or num_experts is not None, f"{name} is a stack of experts"
            for expert in range(num_experts or 0) if stacked else (None,):
                key = rule.key.format(**match.groupdict(), expert=expert)
                found.append((key, Placement(name, expert, rule.half)))
    found.sort(key=lambda item: (item[1].expert or 0, item[1].half or 0))
    return found or [(name, Placement(name))]


def is_expert_stack(name: str) -> bool:
    """Whether the parameter stacks the weights of all routed experts along its first axis."""
    return name.endswith((".experts.w13", ".experts.w2"))


def is_router(name: str) -> bool:
    """Whether the parameter or key decides the choice of experts: kept in fp32 whatever the rest is in."""
    return name.endswith((".block_sparse_moe.gate.weight", ".mlp.gate.weight", ".e_score_correction_bias"))


_QUANTIZED = re.compile(
    r".*layers\.\d+\.(?:transformer_layer\.)?"
    r"(?:self_attn\.[qkvo]_proj|mlp\.(?:gate|up|down)_proj"
    r"|block_sparse_moe\.(?:experts\.\d+\.w[123]|shared_experts\.(?:gate|up|down)_proj))\.weight"
)


def is_quantized_key(key: str) -> bool:
    """Whether MXFP8 is for this released key: projections of the text backbone, as in the released checkpoint."""
    return not key.startswith(VISION_PREFIXES) and _QUANTIZED.fullmatch(key) is not None


_MTP_DEPTH = re.compile(r"(?:language_model\.)?model\.mtp\.layers\.(\d+)\..+")


def mtp_depth(key: str) -> int | None:
    """The depth of the MTP module that the key belongs to, if it belongs to one."""
    match = _MTP_DEPTH.fullmatch(key)
    return int(match[1]) if match else None
