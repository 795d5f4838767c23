"""`minim3 info`: what a checkpoint is, from its config and the headers of its files. No weight is read."""

import json
import math
import re
import textwrap
from pathlib import Path
from typing import Any

from minim3.checkpoint.hub import read_config
from minim3.config import MiniMaxM3VLConfig, MiniMaxM3VLTextConfig, config_from_dict
from minim3.loading import model_path
from minim3.model.counts import FORMATS, cache_bytes_per_token, count_parameters, describe_layers

DEFAULT_CONTEXT = 32768
KERNELS = (
    "select_blocks", "block_sparse_attention", "varlen_attention", "indexer_kl", "rms_norm", "norm_rope_store",
    "swiglu_oai", "grouped_experts", "decoder_step",
)  # fmt: skip


def collect_info(source: str, context: int | None, device: str = "auto", dtype: str = "auto") -> dict[str, Any]:
    """Everything `info` prints, as plain values. `context` is in tokens, at most the model's.

    Raises:
        ValueError: no checkpoint there, a broken file, or a context the model does not have.
    """
    config, folder = _read_source(source)
    text = config.text_config if isinstance(config, MiniMaxM3VLConfig) else config
    if context is None:
        context = min(DEFAULT_CONTEXT, text.max_position_embeddings)
    if not 1 <= context <= text.max_position_embeddings:
        raise ValueError(f"--context is {context}; the model takes 1 to {text.max_position_embeddings} tokens")
    stored = None if folder is None else _read_headers(folder)
    counts = count_parameters(config, 0 if stored is None else stored["mtp_modules"])
    return {
        "source": source,
        "kind": _kind(config),
        "layers": describe_layers(text),
        "text": _text_sizes(text),
        "vision": _vision_sizes(config),
        "mtp_modules": {"in_config": text.num_mtp_modules, "in_weights": stored and stored["mtp_modules"]},
        "parameters": {
            "total": counts.total,
            "active_per_token": counts.active,
            "parts": [{"name": part.name, "total": part.total, "active": part.active} for part in counts.parts],
        },
        "weight_bytes": {name: counts.num_bytes(name) for name in FORMATS},
        "memory_bytes": _memory(config, folder, 0 if stored is None else stored["mtp_modules"], device, dtype),
        "loaded_as": _loaded_as(folder, device, dtype, text.torch_dtype or getattr(config, "torch_dtype", None)),
        "cache": _cache(text, context),
        "files": stored,
        "kernels": _kernels(device, dtype, text.torch_dtype or getattr(config, "torch_dtype", None)),
    }


def print_info(info: dict[str, Any]) -> None:
    """The report for a person, on stdout."""
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False)
    rows = _rows(info)
    indent = max(len(name) for name, _ in rows) + 2
    for name, value in rows:
        # Wrapped for the eye only: in a pipe a line stays a line.
        width = max(console.width - indent, 20) if console.is_terminal else len(value) + 1
        lines = textwrap.wrap(value, width, break_long_words=False, break_on_hyphens=False)
        print(name.ljust(indent) + ("\n" + " " * indent).join(lines))
    print()
    total = info["parameters"]["total"]
    parts = Table(box=None, pad_edge=False, header_style="bold")
    parts.add_column("part")
    for heading in ("parameters", "share", "active a token"):
        parts.add_column(heading, justify="right")
    for part in info["parameters"]["parts"]:
        share = f"{100 * part['total'] / total:.1f}%"
        parts.add_row(part["name"], _count(part["total"]), share, _count(part["active"]) if part["active"] else "-")
    console.print(parts)


def run_info(source: str | None, context: int | None, device: str, dtype: str, as_json: bool) -> None:
    info = collect_info(str(model_path(source)), context, device, dtype)
    if as_json:
        print(json.dumps(info, indent=2))
    else:
        print_info(info)


def _read_source(source: str) -> tuple[MiniMaxM3VLConfig | MiniMaxM3VLTextConfig, Path | None]:
    """The config, and the folder or file of the weights where they are on this machine."""
    path = Path(source).expanduser()
    if path.is_file() and path.suffix == ".json":
        try:
            return config_from_dict(json.loads(path.read_text(encoding="utf-8"))), None
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
    if not path.exists():
        return read_config(_download_config(source)), None
    config = read_config(path)
    has_weights = path.is_file() or any(path.glob("*.safetensors*"))
    return config, path if has_weights else None


def _download_config(source: str) -> Path:
    """The folder that holds `config.json` of a hub id: the one file of it that is needed."""
    if source.count("/") != 1 or source.startswith((".", "/", "~")):
        raise ValueError(f"{source} does not exist: pass a checkpoint folder, a config.json or a hub id owner/name")
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled

    try:
        return Path(hf_hub_download(source, "config.json")).parent
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled, OSError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0].removeprefix("Got: ")
        raise ValueError(
            f"{source} is not a local folder, and could not be had from the hub (offline?): {reason}"
        ) from error


def _read_headers(folder: Path) -> dict[str, Any]:
    from minim3.checkpoint import CheckpointReader, num_mtp_modules_in

    with CheckpointReader(folder) as reader:
        by_format: dict[str, int] = {}
        keys = reader.keys()
        for key in keys:
            name = "mxfp8" if reader.is_quantized(key) else str(reader.dtype(key)).removeprefix("torch.")
            by_format[name] = by_format.get(name, 0) + math.prod(reader.shape(key))
        return {
            "bytes": reader.num_bytes(),
            "tensors": len(keys),
            "parameters": sum(by_format.values()),
            "parameters_by_format": by_format,
            "mtp_modules": num_mtp_modules_in(folder),
        }


def _kind(config: MiniMaxM3VLConfig | MiniMaxM3VLTextConfig) -> str:
    has_vision = isinstance(config, MiniMaxM3VLConfig) and config.vision_config is not None
    return "text, images and video" if has_vision else "text only"


def _text_sizes(text: MiniMaxM3VLTextConfig) -> dict[str, Any]:
    names = ["vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim"]
    names += ["rotary_dim", "rope_theta", "max_position_embeddings"]
    if "sparse" in text.mlp_layer_types:
        names += ["num_local_experts", "num_experts_per_tok", "n_shared_experts", "intermediate_size"]
    if "minimax_m3_sparse" in text.layer_types:
        names += ["index_n_heads", "index_head_dim", "index_block_size", "index_topk_blocks"]
        names += ["index_init_blocks", "index_local_blocks", "index_score_type"]
    return {name: getattr(text, name) for name in names}


def _vision_sizes(config: MiniMaxM3VLConfig | MiniMaxM3VLTextConfig) -> dict[str, Any] | None:
    vision = config.vision_config if isinstance(config, MiniMaxM3VLConfig) else None
    names = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "patch_size")
    return None if vision is None else {name: getattr(vision, name) for name in names}


def _memory(
    config: MiniMaxM3VLConfig | MiniMaxM3VLTextConfig, folder: Path | None, num_mtp: int, device: str, dtype: str
) -> dict[str, int]:
    """Bytes of the weights once loaded: in the dtype, and with each `--quantization` that `device` has."""
    import torch

    from minim3.checkpoint import mxfp8_parameters
    from minim3.cli.session import choose_device, choose_dtype
    from minim3.model.causal_lm import (
        MiniMaxM3SparseForCausalLM,
        MiniMaxM3SparseForConditionalGeneration,
        with_mtp_modules,
    )
    from minim3.model.quantization import Quantization, expected_bytes

    where = choose_device(device)
    what = choose_dtype(dtype, where, config.torch_dtype)
    stored = None if folder is None else mxfp8_parameters(folder)
    config = with_mtp_modules(config, num_mtp)
    text_only = isinstance(config, MiniMaxM3VLTextConfig)
    model_class: Any = MiniMaxM3SparseForCausalLM if text_only else MiniMaxM3SparseForConditionalGeneration
    sizes = {}
    wider = ("bf16",) if what != torch.bfloat16 else ()
    for quantization in (None, *wider, "int8", "int4", "mxfp8") if where.type == "cpu" else (None, *wider, "mxfp8"):
        with torch.device("meta"):
            model = model_class(config)
        name = quantization or str(what).removeprefix("torch.")
        sizes[name] = expected_bytes(model, None if quantization is None else Quantization(quantization), what, stored)
    return sizes


def _loaded_as(folder: Path | None, device: str, dtype: str, config_dtype: str | None) -> str:
    """What `--quantization auto` takes: the name of a format, or of the dtype."""
    from minim3.cli.session import choose_device, choose_dtype
    from minim3.loading import stored_format

    where = choose_device(device)
    what = choose_dtype(dtype, where, config_dtype)
    held = None if folder is None else stored_format(folder, where, what)
    return held or str(what).removeprefix("torch.")


def _cache(text: MiniMaxM3VLTextConfig, context: int) -> dict[str, Any]:
    """Cache of one sequence of `context` tokens, in whole pages (a page is a selection block)."""
    page = text.index_block_size or 1
    stored = -(-context // page) * page
    sizes: dict[str, Any] = {"context": context, "page_tokens": page}
    for name, width in (("bf16", 2), ("fp32", 4), ("fp8", 1)):
        kv, index = cache_bytes_per_token(text, width)
        sizes[name] = {"bytes_per_token": kv + index, "kv_bytes": stored * kv, "index_bytes": stored * index}
    return sizes


def _kernels(device: str, dtype: str, config_dtype: str | None) -> dict[str, str]:
    """Which implementation of each operation would run on `device`, and why."""
    from minim3 import kernels
    from minim3.cli.session import choose_device, choose_dtype

    where = choose_device(device)
    what = choose_dtype(dtype, where, config_dtype)
    choices = {op: kernels.choose(None, op, where, what) for op in KERNELS}
    reasons = dict.fromkeys(choice.reason for choice in choices.values())
    why = "; ".join(r for r in reasons if not any(other.startswith(r + ",") for other in reasons))
    names = {op: choice.name for op, choice in choices.items()}
    return {"device": str(where), "dtype": str(what).removeprefix("torch."), "why": why, **names}


def _rows(info: dict[str, Any]) -> list[tuple[str, str]]:
    text, parameters, cache = info["text"], info["parameters"], info["cache"]
    heads = f"{text['num_attention_heads']} query heads, {text['num_key_value_heads']} KV heads of {text['head_dim']}"
    rows = [
        ("model", info["source"]),
        ("takes", info["kind"]),
        ("layers", re.sub(r"^layers? |(?<=\d)(?= )", lambda at: "" if at[0] else ":", info["layers"])),
        ("width", f"{text['hidden_size']}, {heads}, vocabulary {text['vocab_size']:,}"),
    ]
    if "num_local_experts" in text:
        shared = f" and {text['n_shared_experts']} shared" if text["n_shared_experts"] else ""
        chosen = f"{text['num_experts_per_tok']} chosen{shared} a token"
        rows.append(("experts", f"{text['num_local_experts']} of width {text['intermediate_size']}, {chosen}"))
    if "index_block_size" in text:
        forced = f"{text['index_local_blocks']} local, {text['index_init_blocks']} initial"
        size = f"{text['index_topk_blocks']} blocks of {text['index_block_size']} tokens a query ({forced})"
        rows.append(("sparse attention", f"{size}, {text['index_n_heads']} index heads of {text['index_head_dim']}"))
    if info["vision"]:
        vision = info["vision"]
        layers = f"{_plural(vision['num_hidden_layers'], 'layer')}, width {vision['hidden_size']}"
        rows.append(("vision", f"{layers}, {vision['num_attention_heads']} heads, patches of {vision['patch_size']}"))
    mtp = info["mtp_modules"]
    if mtp["in_weights"] or mtp["in_config"]:
        differs = "" if mtp["in_weights"] == mtp["in_config"] else f" counted; the config names {mtp['in_config']}"
        rows.append(("MTP modules", f"{mtp['in_weights'] or 0}{differs}"))
    rows.append(("context", f"up to {text['max_position_embeddings']:,} tokens"))
    active = f"{_count(parameters['active_per_token'])} active a token (without embeddings and head)"
    rows.append(("parameters", f"{_count(parameters['total'])}, {active}"))
    rows.append(
        ("weights in files", ", ".join(f"{_size(size)} in {name}" for name, size in info["weight_bytes"].items()))
    )
    sizes = {name: f"{_size(size)} as {name}" for name, size in info["memory_bytes"].items()}
    plain, taken = next(iter(sizes)), sizes[info["loaded_as"]]
    sizes[plain] += " (none)"
    others = ", ".join(size for name, size in sizes.items() if name != info["loaded_as"])
    rows.append(("weights loaded", f"{taken}; with --quantization {others}"))
    for name in ("bf16", "fp32", "fp8"):
        of = cache[name]
        split = f"K and V {_size(of['kv_bytes'])}, index keys {_size(of['index_bytes'])}"
        whole = f"{_size(of['kv_bytes'] + of['index_bytes'])} at {cache['context']:,} tokens"
        rows.append((f"cache in {name}", f"{whole} ({split}; {of['bytes_per_token']:,} bytes a token)"))
    if info["files"]:
        files = info["files"]
        formats = ", ".join(f"{_count(n)} in {name}" for name, n in files["parameters_by_format"].items())
        expected = f"; the config describes {parameters['total']:,} parameters, the files hold {files['parameters']:,}"
        differs = "" if files["parameters"] == parameters["total"] else expected
        rows.append(("files", f"{_size(files['bytes'])}, {files['tensors']:,} tensors: {formats}{differs}"))
    kernels = dict(info["kernels"])
    where, why = f"{kernels.pop('device')}, {kernels.pop('dtype')}", kernels.pop("why")
    names = sorted(set(kernels.values()))
    by_name = [f"{name} ({', '.join(op for op in kernels if kernels[op] == name)})" for name in names]
    rows.append(("kernels", f"on {where}: {'; '.join(by_name) if len(names) > 1 else names[0]} ({why})"))
    return rows


def _plural(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _count(number: int) -> str:
    for limit, unit in ((1e9, " B"), (1e6, " M")):
        if number >= limit:
            return f"{number / limit:,.2f}{unit}"
    return f"{number:,}"


def _size(num_bytes: int) -> str:
    for power, unit in ((3, "GiB"), (2, "MiB"), (1, "KiB")):
        if num_bytes >= 1024**power:
            return f"{num_bytes / 1024**power:,.1f} {unit}"
    return f"{num_bytes} bytes"
