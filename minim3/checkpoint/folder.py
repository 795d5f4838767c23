"""Replacing a checkpoint folder at once: the new one is complete beside it before the old one goes.

parent/.name.new-PID    written and synced here, with the old folder's other files linked in
parent/name             renamed away, then the new one renamed here: the only moment without a folder of this name,
parent/.name.old-PID    during which the old one stands here, whole; then it is removed
"""

import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from minim3.config import config_from_dict, read_config_dict

_WEIGHT_FILE = re.compile(r"model(-\d+-of-\d+)?\.safetensors(\.index\.json)?")
# What may stand in a folder that gets its weights later: what a processor saves, and what people write beside it.
_COMPANION = re.compile(
    r"tokenizer.*|special_tokens_map\.json|added_tokens\.json|vocab\.(json|txt)|merges\.txt|chat_template\..*"
    r"|(video_|image_)?(pre)?processor.*\.json|generation_config\.json|README.*|LICENSE.*|\..*",
    re.IGNORECASE,
)


def check_replaceable(target: Path) -> None:
    """Raises `ValueError` if `target` is something other than a checkpoint folder, an empty one or nothing at all."""
    if not target.exists():
        return
    if not target.is_dir():
        raise ValueError(f"{target} is a file; a checkpoint is written as a folder")
    if (target / "config.json").exists():
        try:
            config_from_dict(read_config_dict(target))
        except ValueError as error:
            raise ValueError(f"{target} holds something other than a checkpoint of this model: {error}") from error
        return
    for entry in sorted(target.iterdir()):
        if not _COMPANION.fullmatch(entry.name):
            raise ValueError(
                f"{target} holds {entry.name} and no config.json: it is not a checkpoint, so it is not overwritten"
            )


@contextmanager
def replaced_folder(target: str | Path, check: Callable[[Path], None] = check_replaceable) -> Iterator[Path]:
    """Yields an empty folder; when the block ends without an error it takes the place of `target`.

    Files of `target` that are no weights and that the block did not write (a tokenizer, a README) stay. After an error
    `target` is as it was. check: raises `ValueError` for what must not be replaced.
    """
    target = Path(os.path.realpath(target))
    check(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    new = target.parent / f".{target.name}.new-{os.getpid()}"
    old = target.parent / f".{target.name}.old-{os.getpid()}"
    shutil.rmtree(new, ignore_errors=True)  # of a killed process that had the same number
    new.mkdir()
    try:
        yield new
        if target.exists():
            shutil.copymode(target, new)
            _keep_companions(target, new)
        for file in new.iterdir():
            _sync(file)
        _sync(new)
    except BaseException:
        shutil.rmtree(new, ignore_errors=True)
        raise
    if target.exists():
        target.rename(old)
    new.rename(target)
    _sync(target.parent)
    shutil.rmtree(old, ignore_errors=True)


def _keep_companions(source: Path, destination: Path) -> None:
    for entry in source.iterdir():
        copy = destination / entry.name
        if _WEIGHT_FILE.fullmatch(entry.name) or copy.exists():
            continue
        if entry.is_dir() and not entry.is_symlink():
            shutil.copytree(entry, copy, symlinks=True, copy_function=_link)
        else:
            _link(str(entry), str(copy))


def _link(source: str, destination: str) -> None:
    """A second name of the same file; a copy where the file system has no hard links."""
    try:
        os.link(source, destination, follow_symlinks=False)
    except OSError:
        shutil.copy2(source, destination, follow_symlinks=False)


def _sync(path: Path) -> None:
    if path.is_symlink() or (path.is_dir() and os.name == "nt"):
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
