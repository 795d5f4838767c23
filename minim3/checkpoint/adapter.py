"""Adapters on disk: low-rank changes of weights (LoRA, arXiv 2106.09685), in the format of the PEFT library.

    FOLDER/adapter_config.json          rank, alpha, which modules are adapted
    FOLDER/adapter_model.safetensors    base_model.model.MODULE.lora_A.weight [r, in] and ....lora_B.weight [out, r]

MODULE is the released name of a projection, that of a routed expert included: `W + scale * B @ A` is the adapted weight
(`scale` is alpha / r, with rslora alpha / sqrt(r)). The metadata of the tensor file tells which base weights the
adapter belongs to. What PEFT writes for transformers' model, with its fused projections, is read too.
"""

import hashlib
import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from minim3.checkpoint.adapter_fusion import adapted_name, split_fused
from minim3.checkpoint.adapter_names import plain_name, released_name
from minim3.checkpoint.folder import replaced_folder
from minim3.checkpoint.hub import resolve_checkpoint
from minim3.checkpoint.names import VISION_PREFIXES, Placement, placements
from minim3.checkpoint.reader import CheckpointReader
from minim3.config.files import read_json_object

CONFIG_FILE, TENSOR_FILE = "adapter_config.json", "adapter_model.safetensors"
BASE_METADATA = "minim3_base_norms"
PEFT_PREFIX = "base_model.model."

_NAMED = 4  # names of each kind that an error lists before it counts the rest
_KEY = re.compile(r"(?:base_model\.model\.)?(.+)\.lora_([AB])\.weight")
# Settings of PEFT that change what an adapter computes, and that are not computed here.
_REFUSED = (
    "use_dora", "use_qalora", "lora_bias", "fan_in_fan_out", "modules_to_save", "trainable_token_indices",
    "layer_replication", "alora_invocation_tokens", "arrow_config", "use_bdlora",
)  # fmt: skip
# Initialisations of PEFT that change the base model too: the factors alone are then not what was trained.
_CHANGE_THE_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
_NORM = re.compile(r"(?:language_model\.)?model\.(?:layers\.\d+\.(?:input|post_attention)_layernorm|norm)\.weight")


@dataclass(frozen=True)
class LoraFactors:
    """The change of one projection: `scale * b @ a`, with `a` `[r, in]` and `b` `[out, r]`."""

    a: Tensor
    b: Tensor
    alpha: float
    rslora: bool = False

    @property
    def rank(self) -> int:
        return self.a.shape[0]

    @property
    def scale(self) -> float:
        return lora_scale(self.alpha, self.rank, self.rslora)

    @torch.no_grad()
    def add_to(self, weight: Tensor) -> None:
        """Add the change to `weight` `[out, in]` in place; the sum is taken in at least fp32."""
        wide = torch.promote_types(weight.dtype, torch.float32)
        a, b = (factor.to(weight.device, wide) for factor in (self.a, self.b))
        weight.copy_(torch.addmm(weight.to(wide), b, a, alpha=self.scale))


def lora_scale(alpha: float, rank: int, rslora: bool) -> float:
    """The factor of `B @ A`: alpha / r, or alpha / sqrt(r) (rank-stabilised, arXiv 2312.03732)."""
    return alpha / (math.sqrt(rank) if rslora else rank)


@dataclass(frozen=True)
class Adapter:
    """An adapter in memory.

    factors: by the released key of the weight without the prefix of the text part. config: `adapter_config.json`.
    base: the fingerprint of the base's norms (`fingerprint`), None where the file has none. source: for messages.
    """

    factors: Mapping[str, LoraFactors]
    config: Mapping[str, Any]
    base: str | None
    source: str
    _places: dict[str, list[tuple[Placement, LoraFactors]]] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        for key, factors in self.factors.items():
            for place in placements(key):
                self._places.setdefault(place.name, []).append((place, factors))

    def adapts(self, place: Placement) -> bool:
        """Whether this part of a parameter changes."""
        return bool(self._pieces(place))

    def merged(self, place: Placement, part: Tensor) -> Tensor:
        """`part` of a parameter with the adapter added, a copy in at least fp32; itself where nothing changes."""
        pieces = self._pieces(place)
        if pieces:
            part = part.to(torch.promote_types(part.dtype, torch.float32), copy=True)
            for piece, factors in pieces:
                factors.add_to(piece.of_parameter(part))
        return part

    def by_parameter(self) -> Mapping[str, list[tuple[Placement, LoraFactors]]]:
        """The factors by the parameter they change (without the prefix of the text part), and where in it."""
        return self._places

    def _pieces(self, place: Placement) -> list[tuple[Placement, LoraFactors]]:
        """The factors that fall into a part of a parameter, and where within it they do."""
        found = []
        for own, factors in self._places.get(plain_name(place.name), ()):
            if place.expert is None:
                found.append((own, factors))
            elif own.expert == place.expert and (place.half is None or own.half == place.half):
                found.append((Placement(own.name, None, own.half if place.half is None else None), factors))
        return found

    def check_shapes(self, shapes: Mapping[str, tuple[int, ...]], text_only: bool = False) -> None:
        """Raise one `ValueError` unless the adapter fits a model: its weights `[out, in]` by released key.

        text_only: the model is the text part alone, so changes of the vision part do not matter.
        """
        known = {plain_name(key): shape for key, shape in shapes.items()}
        unknown, wrong = [], []
        for key, factors in self.factors.items():
            if key not in known:
                if not (text_only and key.startswith(VISION_PREFIXES)):
                    unknown.append(key)
                continue
            wanted, given = known[key], (factors.b.shape[0], factors.a.shape[1])
            if wanted != given:
                wrong.append(f"{key} changes {list(given)}, the model has {list(wanted)}")
        expected = _expected(self.config, known)
        missing = sorted(expected - set(self.factors))
        parts = [
            _listed(title, names)
            for title, names in (
                ("not part of this model", unknown),
                ("of the wrong shape", wrong),
                (f"missing (target_modules of {CONFIG_FILE} names them)", missing),
            )
            if names
        ]
        if parts:
            raise ValueError(f"adapter {self.source} does not fit the model: {'; '.join(parts)}")

    def check_base(self, norms: Mapping[str, Tensor]) -> None:
        """Raise `ValueError` where the adapter was trained on other weights than these (see `fingerprint`)."""
        if self.base is not None and self.base != fingerprint(norms):
            trained_on = self.config.get("base_model_name_or_path") or "another checkpoint"
            raise ValueError(
                f"adapter {self.source} belongs to other weights than these (their norms differ): it was trained on "
                f"{trained_on}; load that model with it"
            )


def _listed(title: str, names: list[str]) -> str:
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return f"{len(names)} {title}: {', '.join(names[:_NAMED])}{more}"


def _expected(config: Mapping[str, Any], known: Iterable[str]) -> set[str]:
    """The weights that a config names by their released names. One written for transformers' names matches few."""
    targets = config.get("target_modules")
    if not targets or config.get("layers_to_transform") is not None or config.get("exclude_modules"):
        return set()
    modules = [(key, key.removesuffix(".weight")) for key in known if key.endswith(".weight")]
    if isinstance(targets, str):
        return {key for key, module in modules if re.fullmatch(targets, module)}
    # A bare name is a leaf in any part of the model; whether the part beside the text was meant depends on the model.
    return set()


def fingerprint(norms: Mapping[str, Tensor]) -> str:
    """A digest of a model's layer norms, rounded to bf16: the same for every format of one checkpoint, whatever adapter
    was merged into it, and another one for a model that was trained on. Other tensors are passed over."""
    digest = hashlib.sha256()
    for name in sorted(norms, key=plain_name):
        if _NORM.fullmatch(name):
            digest.update(plain_name(name).encode())
            digest.update(norms[name].detach().to("cpu", torch.bfloat16).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def reader_norms(reader: CheckpointReader) -> dict[str, Tensor]:
    """The norms that `fingerprint` takes, of a checkpoint."""
    return {key: reader.read(key) for key in reader if _NORM.fullmatch(key)}


def read_adapter(path: str | Path) -> Adapter:
    """Read an adapter folder (or one on the hub). Raises one `ValueError` for anything that is not whole."""
    folder = Path(path).expanduser()
    if not folder.is_dir():
        if folder.exists():
            raise ValueError(f"adapter {path} is a file; an adapter is a folder with {CONFIG_FILE} and {TENSOR_FILE}")
        try:
            folder = resolve_checkpoint(path, "adapter")
        except ValueError as error:
            raise ValueError(f"adapter {path} cannot be had: {error}") from error
    for name in (CONFIG_FILE, TENSOR_FILE):
        if not (folder / name).is_file():
            hint = " (a pickled adapter_model.bin is not read)" if (folder / "adapter_model.bin").exists() else ""
            raise ValueError(f"adapter {path} has no {name}{hint}")
    config = read_json_object(folder / CONFIG_FILE)
    _check_config(config, str(path))
    try:
        with safe_open(folder / TENSOR_FILE, framework="pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (it is no mapping)
            base = (file.metadata() or {}).get(BASE_METADATA)
    except (SafetensorError, OSError) as error:
        file = f"adapter {path}: {TENSOR_FILE}"
        raise ValueError(f"{file} is not a complete safetensors file, copy it again: {error}") from error
    return Adapter(_pair(tensors, config, str(path)), config, base, str(path))


def _check_config(config: Mapping[str, Any], source: str) -> None:
    kind = config.get("peft_type")
    if kind != "LORA":
        raise ValueError(f"adapter {source}: peft_type is {kind!r}; only LORA adapters are read")
    for name in _REFUSED:
        if config.get(name):
            raise ValueError(f"adapter {source}: {name} is {config[name]!r}, which is not supported")
    start = str(config.get("init_lora_weights", "")).lower()
    if start.startswith(_CHANGE_THE_BASE):
        raise ValueError(
            f"adapter {source}: init_lora_weights is {config['init_lora_weights']!r}, which changes the base too; "
            "save it by PEFT's save_pretrained(..., path_initial_model_for_weight_conversion=...), which makes a plain "
            "adapter of it"
        )
    if config.get("bias", "none") != "none":
        raise ValueError(f"adapter {source}: bias is {config['bias']!r}; adapted biases are not supported")
    for name, kinds in (("r", int), ("lora_alpha", (int, float))):
        value = config.get(name)
        if not isinstance(value, kinds) or isinstance(value, bool) or value <= 0:
            raise ValueError(f"adapter {source}: {name} is {value!r}; it must be a positive number")


def _pair(tensors: Mapping[str, Tensor], config: Mapping[str, Any], source: str) -> dict[str, LoraFactors]:
    """A and B of every module, by released key; fused ones of transformers taken apart."""
    halves: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        match = _KEY.fullmatch(key)
        if match is None:
            raise ValueError(f"adapter {source}: {key} is no lora_A or lora_B of a projection")
        if tensor.dim() != 2 or not tensor.is_floating_point():
            raise ValueError(f"adapter {source}: {key} is {tensor.dtype} {list(tensor.shape)}; expected a float matrix")
        halves.setdefault(match[1], {})[match[2]] = tensor
    if not halves:
        raise ValueError(f"adapter {source} is empty: {TENSOR_FILE} holds no lora_A")
    factors: dict[str, LoraFactors] = {}
    for module, pair in halves.items():
        if len(pair) < 2:
            lacking = "B" if "A" in pair else "A"
            raise ValueError(f"adapter {source}: {module} has no lora_{lacking}")
        module = adapted_name(module, config.get("target_parameters") or ())
        alpha = _of_pattern(config.get("alpha_pattern"), module, config["lora_alpha"])
        rank = _of_pattern(config.get("rank_pattern"), module, config["r"])
        rslora = bool(config.get("use_rslora"))
        for name, a, b in split_fused(module, pair["A"], pair["B"], rank, source):
            if a.shape[0] != b.shape[1] or a.shape[0] != rank:
                raise ValueError(
                    f"adapter {source}: {name} has lora_A {list(a.shape)} and lora_B {list(b.shape)}, but rank {rank}"
                )
            key = f"{plain_name(released_name(name))}.weight"
            if key in factors:
                raise ValueError(f"adapter {source} changes {key} twice")
            factors[key] = LoraFactors(a, b, float(alpha), rslora)
    return factors


def _of_pattern(patterns: Mapping[str, Any] | None, module: str, default: Any) -> Any:
    """PEFT's rule: the first pattern that matches the end of a module's name."""
    for pattern, value in (patterns or {}).items():
        if re.fullmatch(rf"(?:.*\.)?(?:{pattern})", module):
            return value
    return default


def write_adapter(
    path: str | Path, tensors: Mapping[str, Tensor], config: Mapping[str, Any], base: str | None
) -> None:
    """Write an adapter folder, whole or not at all; `tensors` by PEFT's keys. An adapter that is there is replaced."""
    metadata = {"format": "pt"} | ({} if base is None else {BASE_METADATA: base})
    with replaced_folder(path, check=_check_replaceable) as folder:
        save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, folder / TENSOR_FILE, metadata)
        (folder / CONFIG_FILE).write_text(json.dumps(dict(config), indent=2) + "\n", encoding="utf-8")


def _check_replaceable(target: Path) -> None:
    if not target.exists():
        return
    if not target.is_dir():
        raise ValueError(f"{target} is a file; an adapter is written as a folder")
    others = [entry.name for entry in target.iterdir() if not entry.name.startswith((".", "README", "LICENSE"))]
    if others and not (target / CONFIG_FILE).exists():
        raise ValueError(f"{target} holds {min(others)} and no {CONFIG_FILE}: it is no adapter, so it is not replaced")
