"""Compiles the C of this package for the machine it runs on, once, and loads it.

The library is kept in the user's cache folder under a name made of the sources, the compiler and the processor, so that
a change of any of them compiles anew, and a folder shared by machines holds one a kind.
"""

import ctypes
import hashlib
import logging
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

logger = logging.getLogger(__name__)

_COMPILERS = ("cc", "gcc", "clang")
_FLAGS = ("-std=gnu11", "-O3", "-march=native", "-fno-math-errno", "-fopenmp", "-fPIC", "-shared")
_MOST_SECONDS = 120


class CannotBuild(Exception):
    """Why there is no library here, in words."""


@cache
def library() -> ctypes.CDLL | str:
    """The library, or why there is none."""
    if platform.system() == "Windows":
        return "the kernels in C are not built on Windows"
    reason = "no C compiler (cc, gcc or clang) was found"
    for command in compilers():
        try:
            return _loaded(command)
        except (CannotBuild, OSError) as error:
            reason = str(error)
    return reason


def compilers() -> list[list[str]]:
    """Commands of the C compilers to try: the one that the environment names as CC, else all that are found."""
    chosen = shlex.split(os.environ.get("CC", ""))
    if chosen:
        return [[shutil.which(chosen[0]) or chosen[0], *chosen[1:]]]
    return [[found] for found in dict.fromkeys(map(shutil.which, _COMPILERS)) if found]


def _loaded(command: list[str]) -> ctypes.CDLL:
    path = _built(command)
    try:
        return ctypes.CDLL(str(path))
    except OSError:  # torn, by a crash or a full disk
        path.unlink(missing_ok=True)
        return ctypes.CDLL(str(_built(command)))


def _built(command: list[str]) -> Path:
    if shutil.which(command[0]) is None:
        raise CannotBuild(f"CC={' '.join(command)} is not a program")
    folder = Path(__file__).parent
    sources = sorted(folder.glob("*.c"))
    target = _cache_folder() / f"kernels-{_fingerprint([*sources, *sorted(folder.glob('*.h'))], command)}.so"
    if not target.exists():
        logger.info("compiling %s with %s, once: takes a few seconds", folder, command[0])
        _compile(command, sources, target)
    return target


def _cache_folder() -> Path:
    root = Path(os.environ.get("XDG_CACHE_HOME", ""))
    if not root.is_absolute():  # which its specification says to ignore
        try:
            root = Path.home() / ".cache"
        except RuntimeError as error:
            raise CannotBuild("there is no home folder to compile kernels into: set XDG_CACHE_HOME") from error
    folder = root / "minim3"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        owner = folder.stat().st_uid
    except OSError as error:
        raise CannotBuild(f"the cache folder {folder} cannot be made: {error.strerror}") from error
    if owner not in (os.getuid(), 0):  # code is loaded from it
        raise CannotBuild(f"the cache folder {folder} belongs to another user: set XDG_CACHE_HOME to one of yours")
    return folder


def _fingerprint(sources: list[Path], command: list[str]) -> str:
    program = Path(command[0]).resolve()
    stat = program.stat()
    parts = [*_FLAGS, *command[1:], str(program), str(stat.st_size), str(stat.st_mtime_ns)]
    parts += [platform.machine(), _processor()]
    known = hashlib.sha256("\n".join(parts).encode())
    for source in sources:
        known.update(source.read_bytes())
    return known.hexdigest()[:16]


def _processor() -> str:
    """What `-march=native` depends on."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    wanted = ("model name", "flags", "Features", "CPU part")
    return "\n".join(dict.fromkeys(line for line in lines if line.startswith(wanted)))


def _compile(compiler: list[str], sources: list[Path], target: Path) -> None:
    """Written aside and renamed: two processes at once do no harm, nor does one that is killed."""
    try:
        handle, aside = tempfile.mkstemp(suffix=".so", prefix=".making-", dir=target.parent)
    except OSError as error:
        raise CannotBuild(f"the cache folder {target.parent} cannot be written to: {error.strerror}") from error
    os.close(handle)
    try:
        command = [*compiler, *_FLAGS, "-o", aside, *map(str, sources), "-lm"]
        done = subprocess.run(
            command, capture_output=True, text=True, errors="replace", env={**os.environ, "LC_ALL": "C"},
            timeout=_MOST_SECONDS,
        )  # fmt: skip
        if done.returncode:
            lines = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
            said = next((line for line in lines if "error" in line), lines[-1])
            raise CannotBuild(f"{compiler[0]} cannot compile the kernels: {said}")
        os.chmod(aside, 0o755)
        with open(aside, "rb") as written:
            os.fsync(written.fileno())
        os.replace(aside, target)
    except subprocess.TimeoutExpired as error:
        raise CannotBuild(f"{compiler[0]} took more than {_MOST_SECONDS} s to compile the kernels") from error
    finally:
        Path(aside).unlink(missing_ok=True)
