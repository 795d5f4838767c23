"""Loading: every tensor of a checkpoint into the parameter it belongs to, one at a time, nothing left over.

First everything is planned from names and shapes alone, so that a checkpoint that does not fit is refused before a byte
of it is read. Then each tensor goes from the memory map straight into its parameter (or its slice of the stacked
experts): besides the parameters themselves at most one dequantized tensor is held. A `WeightSink` in the place of a
parameter is given its tensors one at a time, to keep them in a form of its own.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn

from minim3.checkpoint.adapter import Adapter, reader_norms
from minim3.checkpoint.names import (
    TEXT_PREFIX,
    VISION_PREFIXES,
    Placement,
    is_expert_stack,
    is_router,
    placements,
    released_keys,
)
from minim3.checkpoint.progress import ByteProgress
from minim3.checkpoint.reader import CheckpointReader

_NAMED = 8  # names of each kind that an error lists before it counts the rest


class WeightSink(Protocol):
    """Takes a weight of `shape` in pieces: whole, an expert at a time, or half of the rows of an expert at a time."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def keeps_mxfp8(self) -> bool:
        """Whether MXFP8 pieces are wanted as they are stored, with their scales."""

    def put(self, place: Placement, weight: Tensor, scales: Tensor | None = None) -> None:
        """Take one piece: a view of the memory map, which must be copied to be kept."""


@dataclass
class LoadTarget:
    """One parameter or persistent buffer. A tied parameter is one target with two slots."""

    tensor: Tensor
    slots: list[tuple[nn.Module, str]] = field(default_factory=list)
    names: list[str] = field(default_factory=list)

    def materialise(self, dtype: torch.dtype, device: torch.device | str) -> None:
        """Gives a parameter without storage (on the meta device) its storage, unfilled."""
        if not self.tensor.is_meta:
            return
        storage = torch.empty(self.tensor.shape, dtype=dtype, device=device)
        if isinstance(self.tensor, nn.Parameter):
            parameter = nn.Parameter(storage, requires_grad=self.tensor.requires_grad)
            for module, name in self.slots:
                module._parameters[name] = parameter
            self.tensor = parameter
        else:
            for module, name in self.slots:
                module._buffers[name] = storage
            self.tensor = storage


def find_targets(model: nn.Module) -> dict[str, LoadTarget]:
    """Parameters and persistent buffers by name, storage or not; both names of a tied one give the same target."""
    by_id: dict[int, LoadTarget] = {}
    named: dict[str, LoadTarget] = {}
    for prefix, module in model.named_modules():
        own: dict[str, Tensor | None] = {**module._parameters}
        own |= {name: t for name, t in module._buffers.items() if name not in module._non_persistent_buffers_set}
        for name, tensor in own.items():
            if tensor is not None:
                target = by_id.setdefault(id(tensor), LoadTarget(tensor))
                target.slots.append((module, name))
                target.names.append(f"{prefix}.{name}" if prefix else name)
                named[target.names[-1]] = target
    return named


def named_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and persistent buffers by name; tied embeddings under the embedding's name, without the head's."""
    found = {}
    for name, target in find_targets(model).items():
        embeddings = [other for other in target.names if other.endswith("embed_tokens.weight")]
        if name == (embeddings or target.names)[0]:
            found[name] = target.tensor
    return found


@dataclass
class LoadPlan:
    """For each key of a checkpoint where it goes, and the keys of everything that is wrong."""

    moves: dict[str, list[tuple[Placement, LoadTarget]]] = field(default_factory=dict)
    unknown: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    twice: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)

    def in_order_of_parameters(self) -> list[tuple[str, list[tuple[Placement, LoadTarget]]]]:
        """The moves with the pieces of a parameter one after another: a sink has few of them to keep at a time."""
        order = {name: i for i, name in enumerate(dict.fromkeys(p.name for m in self.moves.values() for p, _ in m))}
        return sorted(
            self.moves.items(), key=lambda item: [(order[p.name], p.expert or 0, p.half or 0) for p, _ in item[1]]
        )

    def check(self, path: Path) -> None:
        """Raises one `ValueError` with all that is wrong."""
        parts = []
        for title, names in (
            ("missing from the checkpoint", self.missing),
            ("not part of this model", self.unknown),
            ("of the wrong shape", self.wrong),
            ("given twice", self.twice),
        ):
            if names:
                more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
                parts.append(f"{len(names)} {title}: {', '.join(names[:_NAMED])}{more}")
        if parts:
            raise ValueError(f"{path} does not fit the model: " + "; ".join(parts))


def plan_loading(reader: CheckpointReader, targets: dict[str, LoadTarget], text_only: bool = False) -> LoadPlan:
    """Matches keys and targets by name and shape, reading no tensor; what does not fit is for `LoadPlan.check`.

    text_only: keys of the vision part are skipped, and the text part's lose the prefix that they have beside it.
    """
    plan = LoadPlan()
    filled: dict[tuple[str, int | None, int | None], str] = {}
    for key in reader:
        if text_only and key.startswith(VISION_PREFIXES):
            plan.skipped.append(key)
            continue
        name = key.removeprefix(TEXT_PREFIX) if text_only else key
        moves = []
        for place in placements(name):
            target = targets.get(place.name)
            if target is None or (place.expert is not None and place.expert >= target.tensor.shape[0]):
                plan.unknown.append(key)
                break
            source = torch.empty(reader.shape(key), device="meta")
            wanted, given = place.of_parameter(target.tensor), place.of_key(source)
            if wanted.shape != given.shape:
                plan.wrong.append(f"{key} is {list(source.shape)}, the model has {list(wanted.shape)}")
                continue
            for cell in _cells(place, target):
                if cell in filled:
                    plan.twice.append(f"{key} (also {filled[cell]})")
                filled[cell] = key
            moves.append((place, target))
        plan.moves[key] = moves
    wrong = {line.split(" is ", 1)[0] for line in plan.wrong}
    for name, target in targets.items():
        if any((other, None, None) in filled for other in target.names):
            continue  # the other name of a tied parameter counts
        stack = target.tensor.shape[0] if is_expert_stack(name) else None
        prefix = TEXT_PREFIX if text_only and any(key.startswith(TEXT_PREFIX) for key in plan.moves) else ""
        for key, place in released_keys(name, stack):
            whole = place.expert is None
            cell = (name, None, None) if whole else (name, place.expert, place.half or 0)
            if cell not in filled and prefix + key not in wrong:
                plan.missing.append(prefix + key)
    return plan


def _cells(place: Placement, target: LoadTarget) -> list[tuple[str, int | None, int | None]]:
    """The pieces of a parameter that a placement fills: one, or all pieces of a stack."""
    if not is_expert_stack(place.name):
        return [(place.name, None, None)]
    experts = range(target.tensor.shape[0]) if place.expert is None else [place.expert]
    halves = (0, 1) if place.half is None and place.name.endswith("w13") else (place.half or 0,)
    return list(product([place.name], experts, halves))


def load_into(
    model: nn.Module,
    path: str | Path,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    text_only: bool = False,
    sinks: Mapping[str, WeightSink] | None = None,
    adapter: Adapter | None = None,
) -> list[str]:
    """Fills every parameter and persistent buffer of `model` from a local checkpoint folder or safetensors file.

    Parameters on the meta device are allocated on `device` in `dtype` (None: the dtype that the checkpoint stores its
    token embedding in), the router's in at least fp32; parameters that exist are filled in place and keep their dtype.
    `text_only` loads the text part of a vision-language checkpoint (or a text-only one) into a text model. `sinks` take
    the weights of these names, which are then no parameters of `model`. `adapter` is merged into each weight as it is
    read.

    Returns the keys that `text_only` skipped. Raises `ValueError` naming every key that is missing, unknown or of the
    wrong shape, before anything is loaded; so does an adapter that does not fit or belongs to other weights.
    """
    sinks = sinks or {}
    targets = find_targets(model)
    for name in sinks:
        targets[name] = LoadTarget(torch.empty(sinks[name].shape, device="meta"), names=[name])
    with CheckpointReader(path) as reader:
        plan = plan_loading(reader, targets, text_only)
        plan.check(reader.path)
        if adapter is not None:
            check_adapter(adapter, reader, targets, text_only)
        if dtype is None:
            embedding = [key for key in plan.moves if key.endswith("embed_tokens.weight")]
            dtype = reader.dtype(embedding[0] if embedding else next(iter(plan.moves)))
        with torch.no_grad(), ByteProgress(f"Loading {reader.path.name}", reader.num_bytes()) as progress:
            filled: dict[int, str] = {}
            for key, moves in plan.in_order_of_parameters() if sinks else plan.moves.items():
                tensor = None
                for place, target in moves:
                    sink, adapts = sinks.get(place.name), adapter is not None and adapter.adapts(place)
                    if sink is not None and sink.keeps_mxfp8 and reader.is_quantized(key) and not adapts:
                        weight, scales = reader.read_mxfp8(key)
                        _pour(key, sink, place, place.of_key(weight), place.of_key(scales))
                        continue
                    tensor = reader.read(key) if tensor is None else tensor
                    part = place.of_key(tensor) if adapter is None else adapter.merged(place, place.of_key(tensor))
                    if sink is not None:
                        _pour(key, sink, place, part)
                        continue
                    router = is_router(place.name) and dtype != torch.float64
                    target.materialise(torch.float32 if router else dtype, device)
                    view = place.of_parameter(target.tensor)
                    first = filled.setdefault(id(target), place.name)
                    if first != place.name and not torch.equal(view, part.to(view)):
                        raise ValueError(f"{key} differs from {first}, but the model ties the two")
                    view.copy_(part)
                progress.advance(math.prod(reader.shape(key)) * reader.dtype(key).itemsize)
                del tensor
    return plan.skipped


def _pour(key: str, sink: WeightSink, place: Placement, weight: Tensor, scales: Tensor | None = None) -> None:
    try:
        sink.put(place, weight, scales)
    except ValueError as error:
        raise ValueError(f"{key}: {error}") from error


def check_adapter(
    adapter: Adapter, reader: CheckpointReader, targets: Mapping[str, LoadTarget], text_only: bool = False
) -> None:
    """Raise `ValueError` for an adapter that does not fit these targets, or belongs to other weights."""
    shapes = {}
    for name, target in targets.items():
        if target.tensor.dim() > 1 and not (len(target.names) > 1 and name.endswith("lm_head.weight")):
            stack = target.tensor.shape[0] if is_expert_stack(name) else None
            for key, place in released_keys(name, stack):
                shapes[key] = tuple(place.of_parameter(target.tensor).shape)
    adapter.check_shapes(shapes, text_only)
    adapter.check_base(reader_norms(reader))


def mxfp8_parameters(path: str | Path) -> set[str]:
    """Names of the parameters that a checkpoint stores as MXFP8 through and through, without the prefix of text."""
    names: dict[bool, set[str]] = {True: set(), False: set()}
    with CheckpointReader(path) as reader:
        for key in reader:
            for place in placements(key.removeprefix(TEXT_PREFIX)):
                names[reader.is_quantized(key)].add(place.name)
    return names[True] - names[False]
