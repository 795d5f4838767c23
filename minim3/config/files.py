"""JSON files of a checkpoint folder, config.json first."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def write_config_dict(folder: Path, config: Mapping[str, Any]) -> None:
    """Writes `config.json` into an existing folder."""
    (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def read_config_dict(path: str | Path) -> dict[str, Any]:
    """The raw `config.json` of a checkpoint folder. Raises `ValueError` naming the file that is missing or broken."""
    file = Path(path) / "config.json"
    if not file.is_file():
        raise ValueError(f"{file} does not exist: {_what_is_there(file.parent)}")
    return read_json_object(file)


def _what_is_there(folder: Path) -> str:
    """What a folder without a config seems to be, and what to pass in its place."""
    if (folder / "adapter_config.json").is_file():
        return "this is a LoRA adapter; pass the model that it belongs to, and the folder as --adapter"
    if (folder / "export" / "config.json").is_file():
        return f"this is the output of a training run; its model is {folder / 'export'}"
    if (folder / "checkpoints").is_dir():
        return "this is the output of a training run that has exported nothing yet (minim3 train RECIPE --export)"
    return "a checkpoint folder holds config.json beside its safetensors files"


def read_json_object(file: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises `ValueError` naming a file that is broken or holds something else."""
    try:
        raw = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is not valid JSON: {error}") from error
    if not isinstance(raw, dict):
        raise ValueError(f"{file} holds a {type(raw).__name__}; expected an object")
    return raw
