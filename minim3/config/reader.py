"""Strict reading of config.json fields: every field is taken once, what nobody takes is kept as unknown.

`FieldReader` reads one level of a config; `read_rope` and `read_layer_kinds` resolve what the two dialects spell
differently. All errors are `ValueError`s that name the level, the field and both values.
"""

import copy
import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

FULL_ATTENTION, SPARSE_ATTENTION = "full_attention", "minimax_m3_sparse"
DENSE_MLP, MOE_MLP = "dense", "sparse"

# resolved name -> name inside `sparse_attention_config`
SPARSE_FIELDS = {
    "index_n_heads": "sparse_num_index_heads",
    "index_head_dim": "sparse_index_dim",
    "index_block_size": "sparse_block_size",
    "index_topk_blocks": "sparse_topk_blocks",
    "index_init_blocks": "sparse_init_block",
    "index_local_blocks": "sparse_local_block",
    "index_score_type": "sparse_score_type",
}
_INDEX_SIZES = ("index_n_heads", "index_head_dim", "index_block_size", "index_topk_blocks")

DTYPE_NAMES = ("float32", "bfloat16", "float16", "float64")

# Fields of the config classes that are not written under their own name, as they stand.
NOT_WRITTEN = {"layer_types", "mlp_layer_types", "torch_dtype", "quantization_config"}
NOT_WRITTEN |= {"extra", "sparse_extra", "as_read", "compression_extra"}


def bookkeeping(compare: bool = True) -> Any:
    """A field of a config class for what was read and is only written back."""
    return dataclasses.field(default_factory=dict, hash=False, repr=False, compare=compare)


def require_one_of(name: str, value: Any, allowed: Sequence[Any]) -> None:
    """Raises unless `value` is one of `allowed` (True and 1 are different values, 0 and 0.0 the same)."""
    for choice in allowed:
        if value == choice and isinstance(value, bool) == isinstance(choice, bool):
            return
    choices = " or ".join(repr(choice) for choice in allowed)
    raise ValueError(f"{name} is {value!r}; only {choices} is supported")


def require_type(name: str, value: Any, like: Any) -> Any:
    """`value` as the type of the default `like`: bool, int, float or str. A bool is no number, an int is a float."""
    if isinstance(like, bool):
        # Released files write flags as true/false; 0 and 1 are seen in hand-made ones.
        if isinstance(value, bool) or (isinstance(value, int) and value in (0, 1)):
            return bool(value)
        wanted = "true or false"
    elif isinstance(like, int):
        if isinstance(value, int) and not isinstance(value, bool):
            return value
        wanted = "an integer"
    elif isinstance(like, float):
        if isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value):
            return float(value)
        wanted = "a finite number"
    else:
        if isinstance(value, str):
            return value
        wanted = "a string"
    raise ValueError(f"{name} is {value!r}; expected {wanted}")


def require_per_layer(name: str, value: Any, num_layers: int) -> tuple[Any, ...]:
    """A list with one entry a layer, as a tuple."""
    if not isinstance(value, (list, tuple)):
        raise ValueError(f"{name} is {value!r}; expected a list with one entry for each of {num_layers} layers")
    if len(value) != num_layers:
        raise ValueError(f"{name} has {len(value)} entries, but num_hidden_layers is {num_layers}")
    return tuple(value)


def check_fields(config: Any, where: str, positive: tuple[str, ...]) -> None:
    """Raises unless the scalars of a config have the type of their default, `positive` are, and nothing is negative."""
    for f in dataclasses.fields(config):
        value = getattr(config, f.name)
        if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING:
            like: Any = value if dataclasses.is_dataclass(value) else 0
        else:
            like = f.default
        if isinstance(like, (bool, int, float, str)):
            value = require_type(where + f.name, value, like)
            object.__setattr__(config, f.name, value)
            if not isinstance(value, str) and value < 0:
                raise ValueError(f"{where}{f.name} is {value}; expected at least 0")
    for name in positive:
        if getattr(config, name) <= 0:
            raise ValueError(f"{where}{name} is {getattr(config, name)}; expected more than 0")


class FieldReader:
    """One level of a config. `where` is its name in errors; an explicit null reads as absent."""

    def __init__(self, raw: Mapping[str, Any], where: str) -> None:
        if not isinstance(raw, Mapping):
            raise ValueError(f"{where} is {raw!r}; expected a mapping")
        self.raw = raw
        self.where = where
        self._taken: set[str] = set()

    def take(self, name: str, default: Any = None) -> Any:
        """The value as it stands, or `default` where it is absent or null."""
        self._taken.add(name)
        value = self.raw.get(name)
        return default if value is None else value

    def require(self, *names: str) -> None:
        """Raises for the first of `names` that is absent or null."""
        for name in names:
            if self.raw.get(name) is None:
                raise ValueError(f"{self.where}: required field {name!r} is missing")

    def take_int(self, name: str) -> int:
        """A required integer."""
        self.require(name)
        return int(require_type(f"{self.where}: {name}", self.take(name), 0))

    def take_like(self, name: str, default: Any) -> Any:
        """A value of the type of `default`, which stands in where it is absent."""
        return require_type(f"{self.where}: {name}", self.take(name, default), default)

    def take_mapping(self, name: str) -> dict[str, Any] | None:
        """A nested mapping, copied, or None."""
        value = self.take(name)
        if value is not None and not isinstance(value, Mapping):
            raise ValueError(f"{self.where}: {name} is {value!r}; expected a mapping")
        return None if value is None else copy.deepcopy(dict(value))

    def take_agreeing(self, name: str, other: Any, other_name: str) -> Any:
        """The field `name`, or `other` (the same thing under another name); where both are given they must agree."""
        value = self.take(name)
        if value is not None and other is not None and value != other:
            raise ValueError(f"{self.where}: {name} {value!r} disagrees with {other_name} {other!r}")
        return other if value is None else value

    def take_token_id(self, name: str) -> int | None:
        """An optional token id."""
        value = self.take(name)
        return None if value is None else int(require_type(f"{self.where}: {name}", value, 0))

    def take_token_ids(self, name: str) -> int | tuple[int, ...] | None:
        """An optional token id or list of token ids."""
        value = self.take(name)
        if isinstance(value, (list, tuple)):
            return tuple(int(require_type(f"{self.where}: {name}", item, 0)) for item in value)
        return self.take_token_id(name)

    def take_dtype(self) -> str | None:
        """`torch_dtype` or `dtype` (its newer name), without a "torch." prefix."""
        found = {name: self.take(name) for name in ("torch_dtype", "dtype")}
        names = {name: str(value).removeprefix("torch.") for name, value in found.items() if value is not None}
        dtype = FieldReader(names, self.where).take_agreeing("torch_dtype", names.get("dtype"), "dtype")
        if dtype is not None:
            require_one_of(f"{self.where}: torch_dtype", dtype, DTYPE_NAMES)
        return dtype

    def take_rope_parameters(self, rope_types: Sequence[str]) -> dict[str, Any]:
        """`rope_parameters` of transformers; a kind of RoPE or a parameter that nobody honours is an error."""
        parameters = self.take_mapping("rope_parameters") or {}
        for key, value in parameters.items():
            name = f"{self.where}: rope_parameters.{key}"
            if key in ("rope_type", "type"):
                require_one_of(name, value, rope_types)
            elif key not in ("rope_theta", "partial_rotary_factor") and value is not None:
                raise ValueError(f"{name} is {value!r}; only rope_theta, partial_rotary_factor and rope_type are known")
        return parameters

    def take_per_layer(self, name: str, num_layers: int, read_at: Sequence[int]) -> Any:
        """A scalar, or a list with one entry a layer: read at the layers `read_at` only, where all must agree."""
        value = self.take(name)
        if not isinstance(value, (list, tuple)):
            return value
        per_layer = require_per_layer(f"{self.where}: {name}", value, num_layers)
        found = {i: per_layer[i] for i in read_at}
        for i, item in found.items():
            if item != found[read_at[0]]:
                raise ValueError(
                    f"{self.where}: {name} is {found[read_at[0]]!r} at layer {read_at[0]} and {item!r} at layer {i}; "
                    "sparse layers that differ are not supported"
                )
        return found[read_at[0]] if read_at else None

    def check_fixed(self, allowed: Mapping[str, Sequence[Any]]) -> None:
        """Raises where a field has a value that the model cannot honour. Does not take the fields."""
        for name, values in allowed.items():
            value = self.raw.get(name)
            if value is not None:
                require_one_of(f"{self.where}: {name}", value, values)

    def rest(self) -> dict[str, Any]:
        """Copies of the fields that nobody took."""
        return {key: copy.deepcopy(value) for key, value in self.raw.items() if key not in self._taken}


def read_rope(reader: FieldReader, head_dim: int) -> dict[str, Any]:
    """rope_theta and rotary_dim, from the flat fields and `rope_parameters`; all spellings must agree."""
    parameters = reader.take_rope_parameters(("default",))
    theta = reader.take_agreeing("rope_theta", parameters.get("rope_theta"), "rope_parameters.rope_theta")
    factor = reader.take_agreeing(
        "partial_rotary_factor", parameters.get("partial_rotary_factor"), "rope_parameters.partial_rotary_factor"
    )
    FieldReader({"rope_theta": theta}, reader.where).require("rope_theta")
    if factor is not None:
        factor = require_type(f"{reader.where}: partial_rotary_factor", factor, 1.0)
    rotary_dim = reader.take("rotary_dim", None if factor is None else round(factor * head_dim))
    if rotary_dim is None:
        reader.require("rotary_dim")
    if factor is not None and abs(factor * head_dim - rotary_dim) > 1e-6 * head_dim:
        raise ValueError(
            f"{reader.where}: rotary_dim {rotary_dim} disagrees with partial_rotary_factor {factor:g} "
            f"times head_dim {head_dim} = {factor * head_dim:g}"
        )
    return {"rope_theta": theta, "rotary_dim": rotary_dim}


def read_layer_kinds(reader: FieldReader) -> dict[str, Any]:
    """Per-layer kinds and the indexer's fields from whichever dialect gives them; where both do they must agree.

    Without `moe_layer_freq` or `mlp_layer_types` every layer is a mixture of experts, without `sparse_attention_config`
    or `layer_types` every layer attends to everything: so in all three published systems.
    """
    num_layers = reader.take_int("num_hidden_layers")
    as_read: dict[str, tuple[Any, Any]] = {}

    def read_kinds(where: str, freq_name: str, freq: Any, types_name: str, kinds: tuple[str, str]) -> tuple[str, ...]:
        given, types = None, reader.take(types_name)
        if types is not None:
            types = require_per_layer(f"{reader.where}: {types_name}", types, num_layers)
        if freq is not None:
            freq = require_per_layer(f"{where}: {freq_name}", freq, num_layers)
            given = tuple(kinds[bool(flag)] for flag in freq)
            as_read[freq_name] = ([int(bool(flag)) for flag in freq], list(freq))
        if given is not None and types is not None and given != types:
            raise ValueError(f"{where}: {freq_name} {list(freq)} disagrees with {types_name} {list(types)}")
        return given or types or ()

    freq = reader.take("moe_layer_freq")
    mlp_types = read_kinds(reader.where, "moe_layer_freq", freq, "mlp_layer_types", (DENSE_MLP, MOE_MLP))

    sparse = FieldReader(reader.take_mapping("sparse_attention_config") or {}, "sparse_attention_config")
    freq = sparse.take("sparse_attention_freq")
    if sparse.raw and not sparse.take_like("use_sparse_attention", True):
        freq = [0] * num_layers
    elif sparse.raw and reader.raw.get("layer_types") is None:
        sparse.require("sparse_attention_freq")
    kinds = (FULL_ATTENTION, SPARSE_ATTENTION)
    layer_types = read_kinds(sparse.where, "sparse_attention_freq", freq, "layer_types", kinds)
    sparse_layers = [i for i, kind in enumerate(layer_types) if kind == SPARSE_ATTENTION]

    flags = sparse.take("sparse_disable_index_value")
    if flags is not None:
        name = f"{sparse.where}: sparse_disable_index_value"
        per_layer = require_per_layer(name, flags, num_layers) if isinstance(flags, list) else (flags,) * num_layers
        for i in sparse_layers:
            if not per_layer[i]:
                raise ValueError(f"{name} is {per_layer[i]!r} at sparse layer {i}; index values are not supported")
        as_read["sparse_disable_index_value"] = ([int(i in sparse_layers) for i in range(num_layers)], flags)

    fields: dict[str, Any] = {}
    for ours, theirs in SPARSE_FIELDS.items():
        value = sparse.take_per_layer(theirs, num_layers, sparse_layers)
        fields[ours] = reader.take_agreeing(ours, value, f"{sparse.where}.{theirs}")
        if fields[ours] is None and sparse_layers and ours in _INDEX_SIZES:
            raise ValueError(f"{sparse.where}: required field {theirs!r} is missing")
        as_read[theirs] = (fields[ours], sparse.raw.get(theirs))
    given = {ours: value for ours, value in fields.items() if value is not None}
    return given | {
        "num_hidden_layers": num_layers,
        "mlp_layer_types": mlp_types,
        "layer_types": layer_types,
        "sparse_extra": sparse.rest(),
        "as_read": {name: (ours, theirs) for name, (ours, theirs) in as_read.items() if theirs not in (None, ours)},
    }
