"""A training recipe: one YAML file, read into frozen dataclasses.

Every key is checked: an unknown one is an error that names its nearest match, a value of the wrong type names the key,
the value and the type it needs. `key=value` overrides use the same dotted names as the error messages.
"""

import dataclasses
import difflib
import math
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml

from minim3.training.lora_recipe import LoraRecipe

T = TypeVar("T")


@dataclass(frozen=True)
class SparseConversionRecipe:
    """The indexers that a dense checkpoint is given: an index head each KV head, the rest as a config has it.

    layers: those whose attention becomes sparse; None means all but the first. head_dim: of the index heads; None means
    that of the attention. topk_blocks: a query's budget, forced blocks included.
    """

    block_size: int
    topk_blocks: int
    layers: tuple[int, ...] | None = None
    head_dim: int | None = None
    init_blocks: int = 0
    local_blocks: int = 1
    score_type: Literal["max", "lse"] = "max"


@dataclass(frozen=True)
class ModelRecipe:
    """What is trained: a config in the released `config.json` dialect, or a checkpoint to go on from.

    convert_to_sparse: fresh indexers for a dense checkpoint. add_mtp_modules: so many fresh MTP modules for a
    checkpoint that has none. precision "bf16": products in bf16 from weights that stay, and move, in fp32.
    checkpoint_activations: keep only the input of every layer, and compute the layer again on the way back.
    """

    config: Mapping[str, Any] | None = None
    start_from: str | None = None
    convert_to_sparse: SparseConversionRecipe | None = None
    add_mtp_modules: int = 0
    precision: Literal["fp32", "bf16"] = "fp32"
    checkpoint_activations: bool = False

    def __post_init__(self) -> None:
        if (self.config is None) == (self.start_from is None):
            raise ValueError("model needs exactly one of `config` (train from scratch) and `start_from` (a checkpoint)")
        if self.add_mtp_modules < 0:
            raise ValueError(f"model.add_mtp_modules must not be negative, is {self.add_mtp_modules}")
        if self.config is not None and (self.convert_to_sparse is not None or self.add_mtp_modules):
            raise ValueError(
                "model.convert_to_sparse and model.add_mtp_modules change a checkpoint (model.start_from); a model "
                "from scratch has sparse layers and MTP modules by its config"
            )


@dataclass(frozen=True)
class FieldNames:
    """What the fields of a record are called; `role` and `content` are those of each message."""

    messages: str = "messages"
    text: str = "text"
    images: str = "images"
    videos: str = "videos"
    tools: str = "tools"
    thinking_mode: str = "thinking_mode"
    kind: str = "kind"
    role: str = "role"
    content: str = "content"


@dataclass(frozen=True)
class SourceRecipe:
    """Where records come from: one of `name`, `files` and `dataset`; `weight` is their share of the draws.

    name: an endless numbered source `package.module:attribute`, called with `seed` and `options`.
    files: .jsonl or .parquet files (paths or glob patterns, of one kind).
    dataset: a hub id or a folder for the library `datasets`, with `subset`, `split` and `revision`. `streaming` reads
        it in its own order without an index, shuffled inside windows of `shuffle_window` records.

    Records are read without replacement, in another order every epoch unless `shuffle` is off. The share `held_out` of
    them is kept from training, for evaluation. `split_long_texts` cuts a plain text that is longer than a batch into
    documents, instead of counting it as bad. `roles` renames roles (`{human: user, gpt: assistant}`); `kind` names
    the records in logs where they do not name themselves.
    """

    name: str | None = None
    weight: float = 1.0
    options: Mapping[str, Any] = field(default_factory=dict)
    files: tuple[str, ...] = ()
    dataset: str | None = None
    subset: str | None = None
    split: str = "train"
    revision: str | None = None
    streaming: bool = False
    shuffle: bool = True
    shuffle_window: int = 1000
    held_out: float = 0.0
    loss_on: Literal["assistant", "all"] = "assistant"
    split_long_texts: bool = False
    fields: FieldNames = field(default_factory=FieldNames)
    roles: Mapping[str, Any] = field(default_factory=dict)
    kind: str = ""

    def __post_init__(self) -> None:
        given = [key for key in ("name", "files", "dataset") if getattr(self, key)]
        if len(given) != 1:
            found = " and ".join(given) or "none of them"
            raise ValueError(f"a source needs exactly one of `name`, `files` and `dataset`, has {found}")
        if not self.weight > 0:
            raise ValueError(f"source {self.label!r}: weight must be positive, not {self.weight}")
        if self.options and self.name is None:
            raise ValueError(f"source {self.label!r}: options are for sources with a `name`")
        if self.streaming and self.dataset is None:
            raise ValueError(f"source {self.label!r}: streaming is for `dataset`; files are never read whole anyway")
        if not 0 <= self.held_out < 1:
            raise ValueError(f"source {self.label!r}: held_out must lie in [0, 1), not {self.held_out}")
        if self.held_out and (self.streaming or self.name is not None):
            raise ValueError(f"source {self.label!r}: held_out needs files or a dataset that is not streamed")
        _require_positive(f"source {self.label!r}", self, ("shuffle_window",))

    @property
    def label(self) -> str:
        """How logs and errors call the source."""
        return self.name or self.dataset or ", ".join(self.files)


@dataclass(frozen=True)
class DataRecipe:
    """Where documents come from and how they are packed. `processor` is `package.module:attribute` or a folder.

    num_workers: processes that read and encode; 0: the training process does it itself, between steps.
    max_bad_records: so many unusable records are reported and skipped; one more ends the run.
    """

    processor: str
    sources: tuple[SourceRecipe, ...]
    tokens_per_batch: int = 8192
    num_workers: int = 1
    prefetch_batches: int = 4
    max_bad_records: int = 10

    def __post_init__(self) -> None:
        _require_positive("data", self, ("tokens_per_batch", "prefetch_batches"))
        for key in ("num_workers", "max_bad_records"):
            if getattr(self, key) < 0:
                raise ValueError(f"data.{key} must not be negative, is {getattr(self, key)}")
        if not self.sources:
            raise ValueError("data.sources is empty: a recipe needs at least one source")


@dataclass(frozen=True)
class LossRecipe:
    """Weights of the losses beside the next-token one (whose weight is 1); 0 leaves a loss out.

    `*_every_steps` saves time: the loss is computed, and moves weights, on every so many steps only.
    indexer_kl_form: "sparse" aligns the indexer over the blocks it chose; "dense", the warm-up, over all keys, and
    then every layer attends to all keys too. router_aux_weight: the load-balancing loss over the router's
    probabilities. z_weight: the mean square of the logits' log-sum-exp, which keeps logits from drifting.
    recall_every_steps: how often the share of attention that lies inside the chosen blocks is measured, on
    `recall_queries` queries a layer; 0 means never.
    """

    mtp_weight: float = 0.0
    mtp_every_steps: int = 1
    indexer_kl_weight: float = 0.0
    indexer_kl_every_steps: int = 1
    indexer_kl_form: Literal["sparse", "dense"] = "sparse"
    router_aux_weight: float = 0.0
    z_weight: float = 0.0
    recall_every_steps: int = 100
    recall_queries: int = 64
    logit_chunk_tokens: int = 512

    def __post_init__(self) -> None:
        positive = ("mtp_every_steps", "indexer_kl_every_steps", "recall_queries", "logit_chunk_tokens")
        _require_positive("loss", self, positive)
        for name in ("mtp_weight", "indexer_kl_weight", "router_aux_weight", "z_weight", "recall_every_steps"):
            _require_at_least_zero("loss", self, name)

    def at_step(self, step: int) -> "LossRecipe":
        """The recipe with weight 0 for every loss that is left out at `step`, and without recall between its steps."""
        return dataclasses.replace(
            self,
            mtp_weight=0.0 if step % self.mtp_every_steps else self.mtp_weight,
            indexer_kl_weight=0.0 if step % self.indexer_kl_every_steps else self.indexer_kl_weight,
            recall_every_steps=0 if step % max(1, self.recall_every_steps) else self.recall_every_steps,
        )


# The parts of a model that a recipe can freeze, and what belongs to each: `minim3.training.optim.part_of`.
MODEL_PARTS = (
    "vision", "projector", "embeddings", "head", "attention", "mlp", "experts", "router", "norms", "indexer", "mtp",
)  # fmt: skip
TEXT_PARTS = ("embeddings", "head", "attention", "mlp", "experts", "router", "norms")


@dataclass(frozen=True)
class OptimRecipe:
    """AdamW or Muon, and what moves weights outside of it (router bias, exponential moving average).

    kind "muon": matrices inside layers move by Muon at rate `muon_lr`, everything else by AdamW at rate `lr`. Both
    rates follow the schedule, and the `*_lr_scale` factors hold for both.
    freeze: parts of `MODEL_PARTS` that stay as they are, bit for bit; "text" names the backbone, that is all parts but
    vision, projector, indexer and mtp.
    """

    kind: Literal["adamw", "muon"] = "adamw"
    lr: float = 1e-3
    muon_lr: float = 0.02
    muon_momentum: float = 0.95
    betas: tuple[float, ...] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.0
    clip_norm: float = 1.0
    indexer_lr_scale: float = 1.0
    vision_lr_scale: float = 1.0  # 0 freezes the vision tower (and its projectors, which follow it by default)
    projector_lr_scale: float | None = None  # of the two projectors; None: as the vision tower
    head_norm_lr_scale: float = 1.0  # of the per-head norms of queries and keys: they set how sharp attention can be
    router_bias_step: float = 1e-3
    router_bias_follows_schedule: bool = False
    ema_decay: float = 0.0
    freeze: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for part in self.freeze:
            if part not in (*MODEL_PARTS, "text"):
                (near,) = difflib.get_close_matches(part, (*MODEL_PARTS, "text"), n=1, cutoff=0.0)
                raise ValueError(f"optim.freeze names an unknown part {part!r}; did you mean {near!r}?")
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"optim.betas must be two numbers in [0, 1), not {list(self.betas)}")
        for name in (
            "lr", "muon_lr", "eps", "weight_decay", "clip_norm", "indexer_lr_scale", "vision_lr_scale",
            "head_norm_lr_scale", "router_bias_step",
        ):  # fmt: skip
            _require_at_least_zero("optim", self, name)
        if self.projector_lr_scale is not None:
            _require_at_least_zero("optim", self, "projector_lr_scale")
        if not 0 <= self.muon_momentum < 1:
            raise ValueError(f"optim.muon_momentum must lie in [0, 1), not {self.muon_momentum}")
        if not 0 <= self.ema_decay < 1:
            raise ValueError(f"optim.ema_decay must lie in [0, 1), not {self.ema_decay}")


@dataclass(frozen=True)
class ScheduleRecipe:
    """Learning rate over the run: linear warm-up, then `kind` down to `final_fraction` of the peak.

    "wsd" (warm-up, stable, decay) stays at the peak and falls linearly over the last `decay_steps`.
    """

    kind: Literal["cosine", "constant", "linear", "wsd"] = "cosine"
    warmup_steps: int = 0
    final_fraction: float = 0.0
    decay_steps: int = 0

    def __post_init__(self) -> None:
        for name in ("warmup_steps", "decay_steps"):
            _require_at_least_zero("schedule", self, name)
        if not 0 <= self.final_fraction <= 1:
            raise ValueError(f"schedule.final_fraction must lie in [0, 1], is {self.final_fraction}")
        if (self.kind == "wsd") != (self.decay_steps > 0):
            raise ValueError(
                f"schedule.decay_steps is {self.decay_steps} and schedule.kind {self.kind!r}: wsd needs steps to decay "
                "in, the other kinds take none"
            )


@dataclass(frozen=True)
class CheckpointRecipe:
    """How often the whole state is saved (0: only at the end or when stopped), and how many are kept."""

    every_steps: int = 0
    keep: int = 2

    def __post_init__(self) -> None:
        _require_at_least_zero("checkpoint", self, "every_steps")
        _require_positive("checkpoint", self, ("keep",))


@dataclass(frozen=True)
class SpikeRecipe:
    """Steps that are skipped: no weight moves where a loss or the gradient norm is not finite, or jumps.

    factor: a jump is more than this many times the largest value of the last `window` steps that were not skipped;
    0 skips only what is not finite. max_in_row: after so many skipped steps one after the other the run fails.
    """

    factor: float = 10.0
    window: int = 100
    max_in_row: int = 5

    def __post_init__(self) -> None:
        _require_positive("spikes", self, ("window", "max_in_row"))
        if self.factor != 0 and self.factor <= 1:
            raise ValueError(f"spikes.factor must be above 1 (or 0: no jump is too high), is {self.factor}")


@dataclass(frozen=True)
class EvaluationRecipe:
    """Share of held-out documents whose every target token is the model's first choice, every so many steps.

    Without sources of its own the training sources are drawn from a stream that training never sees.
    """

    every_steps: int = 0
    batches: int = 2
    sources: tuple[SourceRecipe, ...] = ()

    def __post_init__(self) -> None:
        _require_at_least_zero("evaluation", self, "every_steps")
        _require_positive("evaluation", self, ("batches",))


@dataclass(frozen=True)
class ExportRecipe:
    """The finished model in the released layout, in `path` (default: `export` in the output folder)."""

    path: str | None = None
    format: Literal["bf16", "fp32", "mxfp8"] = "bf16"


@dataclass(frozen=True)
class TrainingConfig:
    """One training run, whole.

    batches_per_step: batches whose gradients are accumulated into one step, as if they were one. tensorboard: write the
    log for TensorBoard too. peak_flops: floating-point operations the machine can do in a second, which the log gives
    the share of; None measures them at the start.
    """

    output: str
    steps: int
    model: ModelRecipe
    data: DataRecipe
    lora: LoraRecipe | None = None
    seed: int = 0
    device: Literal["auto", "cpu", "cuda"] = "auto"
    threads: int | None = None
    batches_per_step: int = 1
    log_every_steps: int = 10
    tensorboard: bool = False
    peak_flops: float | None = None
    loss: LossRecipe = field(default_factory=LossRecipe)
    optim: OptimRecipe = field(default_factory=OptimRecipe)
    schedule: ScheduleRecipe = field(default_factory=ScheduleRecipe)
    spikes: SpikeRecipe = field(default_factory=SpikeRecipe)
    checkpoint: CheckpointRecipe = field(default_factory=CheckpointRecipe)
    evaluation: EvaluationRecipe = field(default_factory=EvaluationRecipe)
    export: ExportRecipe = field(default_factory=ExportRecipe)

    def __post_init__(self) -> None:
        _require_positive("", self, ("steps", "batches_per_step", "log_every_steps"))
        if self.peak_flops is not None and self.peak_flops <= 0:
            raise ValueError(f"peak_flops must be positive, is {self.peak_flops}")
        if self.seed < 0:
            raise ValueError(f"seed must not be negative, is {self.seed}")
        if self.lora is not None and self.model.start_from is None:
            raise ValueError("lora adapts a checkpoint: give model.start_from in the place of model.config")

    def to_dict(self) -> dict[str, Any]:
        """Plain values again (dicts, lists, numbers, strings), for JSON."""
        return _plain(self)


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> TrainingConfig:
    """Read a recipe file and apply `dotted.key=value` overrides (the value is read as YAML).

    Raises:
        ValueError: no such file, not YAML, an unknown key (its nearest match is named) or a value of the wrong type.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"no recipe at {path}")
    try:
        document = yaml.safe_load(path.read_text(encoding="utf-8"))
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not a text file in UTF-8: {error}") from error
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        place = f"line {mark.line + 1}, column {mark.column + 1}" if mark else "its end"
        raise ValueError(f"{path} is not valid YAML: {error.problem or error} at {place}") from error
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not valid YAML: {error}") from error
    if not isinstance(document, dict):
        raise ValueError(f"{path} must hold a mapping of keys, not {type(document).__name__}")
    for override in overrides:
        _apply_override(document, override)
    return parse_recipe(document)


def parse_recipe(document: Mapping[str, Any]) -> TrainingConfig:
    """A mapping of plain values as `TrainingConfig`; errors as in `load_recipe`."""
    return _build(TrainingConfig, document, "")


def changed_keys(before: Mapping[str, Any], after: Mapping[str, Any], prefix: str = "") -> dict[str, tuple[Any, Any]]:
    """Dotted keys whose values differ between two `to_dict()` results, with both values."""
    changes: dict[str, tuple[Any, Any]] = {}
    for key in sorted(before.keys() | after.keys()):
        old, new = before.get(key), after.get(key)
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            changes.update(changed_keys(old, new, f"{prefix}{key}."))
        elif old != new:
            changes[f"{prefix}{key}"] = (old, new)
    return changes


def _require_positive(section: str, recipe: Any, names: Iterable[str]) -> None:
    for name in names:
        if getattr(recipe, name) < 1:
            key = f"{section}.{name}" if section else name
            raise ValueError(f"{key} must be at least 1, is {getattr(recipe, name)}")


def _require_at_least_zero(section: str, recipe: Any, name: str) -> None:
    if getattr(recipe, name) < 0:
        raise ValueError(f"{section}.{name} must not be negative, is {getattr(recipe, name)}")


def _apply_override(document: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise ValueError(f"override {override!r} must look like dotted.key=value")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(f"override {override!r}: the value is not valid YAML: {error}") from error
    *parents, last = key.split(".")
    node: Any = document
    for depth, part in enumerate(parents):
        if isinstance(node, list):
            node = _list_item(node, part, override)
        elif isinstance(node, dict):
            node = node.setdefault(part, {})
        else:
            raise ValueError(f"override {override!r}: {'.'.join(parents[:depth])} holds a plain value, not keys")
    if isinstance(node, list):
        _list_item(node, last, override)
        node[int(last)] = value
    elif isinstance(node, dict):
        node[last] = value
    else:
        raise ValueError(f"override {override!r}: {'.'.join(parents)} holds a plain value, not keys")


def _list_item(items: list[Any], index: str, override: str) -> Any:
    if not index.isdigit() or int(index) >= len(items):
        raise ValueError(f"override {override!r}: {index!r} is not an index into a list of {len(items)} items")
    return items[int(index)]


def _build(cls: type[T], document: Any, where: str) -> T:
    """Fill the dataclass `cls` from a mapping; `where` is the dotted key of the mapping, for messages."""
    if not isinstance(document, Mapping):
        raise ValueError(f"{where or 'the recipe'} must be a mapping of keys, not {document!r}")
    hints = typing.get_type_hints(cls)
    fields = {item.name: item for item in dataclasses.fields(cls)}  # type: ignore[arg-type]
    for key in document:
        if key not in fields:
            near = difflib.get_close_matches(str(key), fields, n=1, cutoff=0.0)
            raise ValueError(f"unknown key {_dotted(where, key)!r}; did you mean {_dotted(where, near[0])!r}?")
    values = {key: _convert(value, hints[key], _dotted(where, key)) for key, value in document.items()}
    for name, item in fields.items():
        required = item.default is dataclasses.MISSING and item.default_factory is dataclasses.MISSING
        if required and name not in values:
            raise ValueError(f"the recipe lacks the required key {_dotted(where, name)!r}")
    return cls(**values)


def _convert(value: Any, hint: Any, where: str) -> Any:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if dataclasses.is_dataclass(hint):
        return _build(typing.cast(type, hint), value, where)
    if origin in (types.UnionType, typing.Union):
        if value is None:
            return None
        (inner,) = (argument for argument in arguments if argument is not type(None))
        return _convert(value, inner, where)
    if origin is Literal:
        if value not in arguments:
            raise ValueError(f"{where} is {value!r}; it must be one of {', '.join(map(repr, arguments))}")
        return value
    if origin is tuple:
        if not isinstance(value, Sequence) or isinstance(value, str):
            raise ValueError(f"{where} is {value!r}; it must be a list")
        return tuple(_convert(item, arguments[0], f"{where}.{index}") for index, item in enumerate(value))
    if origin is not None and issubclass(origin, Mapping):
        if not isinstance(value, Mapping):
            raise ValueError(f"{where} is {value!r}; it must be a mapping")
        return dict(value)
    if hint is float:
        return _to_float(value, where)
    if hint is int and (isinstance(value, bool) or not isinstance(value, int)):
        raise ValueError(f"{where} is {value!r}; it must be a whole number")
    if not isinstance(value, hint):
        raise ValueError(f"{where} is {value!r}; it must be of type {hint.__name__}")
    return value


def _to_float(value: Any, where: str) -> float:
    # YAML 1.1 reads `1e-4` (no dot) as a string, so strings that are numbers are numbers here.
    if isinstance(value, int | float | str) and not isinstance(value, bool):
        try:
            number = float(value)
        except ValueError:
            number = math.nan
        if math.isfinite(number):
            return number
    raise ValueError(f"{where} is {value!r}; it must be a number")


def _dotted(where: str, key: Any) -> str:
    return f"{where}.{key}" if where else str(key)


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return {item.name: _plain(getattr(value, item.name)) for item in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return [_plain(item) for item in value]
    return value
