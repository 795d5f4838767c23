"""From what a user names (a folder, a safetensors file, a hub id) to files on this machine."""

import re
from pathlib import Path
from typing import Any

from minim3.config import MiniMaxM3VLConfig, MiniMaxM3VLTextConfig, load_config
from minim3.config.files import read_json_object

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
# Weights, configs, tokenizer, chat template: nothing executable, nothing pickled.
_WANTED = ("*.json", "*.safetensors", "*.jinja", "*.txt")


def resolve_checkpoint(path_or_hub_id: str | Path, kind: str = "checkpoint") -> Path:
    """A local folder (or one safetensors file) as it is; a hub id `owner/name` as its downloaded snapshot.

    With HF_HUB_OFFLINE=1, or without a network, the snapshot in the hub's cache is used. Raises `ValueError` when there
    is neither, which speaks of a `kind` of folder.
    """
    path = Path(path_or_hub_id).expanduser()
    if path.is_dir() or (path.is_file() and path.suffix == ".safetensors"):
        return path
    if path.exists():
        raise ValueError(f"{path} is neither a {kind} folder nor a .safetensors file")
    name = str(path_or_hub_id)
    if not _HUB_ID.fullmatch(name):
        raise ValueError(f"{kind} folder {name} does not exist (and is no hub id of the form owner/name)")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled

    try:
        return Path(snapshot_download(name, allow_patterns=list(_WANTED)))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled, OSError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0].removeprefix("Got: ")
        what = f"{name} is not a local folder, and could not be had from the hub (offline?)"
        raise ValueError(f"{what}: {reason}") from error


def read_config(path: str | Path) -> MiniMaxM3VLConfig | MiniMaxM3VLTextConfig:
    """The config of a checkpoint folder; of the folder that a single safetensors file lies in. Raises `ValueError`."""
    path = Path(path)
    return load_config(path.parent if path.is_file() else path)


def read_generation_config(path: str | Path) -> dict[str, Any] | None:
    """`generation_config.json` of a checkpoint folder, or None if there is none. Raises `ValueError` if broken."""
    path = Path(path)
    file = (path.parent if path.is_file() else path) / "generation_config.json"
    if not file.is_file():
        return None
    return read_json_object(file)
