"""Compiles the C of this package for the machine it runs on, once, and loads it.

The library is kept in the user's cache folder under a name made of the sources, the compiler and the processor, so that
a change of any of them compiles anew, and a folder shared by machines holds one a kind.
"""

import ctypes
import hashlib
import logging
import os
import platform
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
    try:
        return ctypes.CDLL(str(_built()))
    except (CannotBuild, OSError) as error:
        return str(error)


def compiler() -> str | None:
    """Path of the C compiler: the one that the environment names as CC, else the first found."""
    chosen = os.environ.get("CC")
    names = (chosen,) if chosen else _COMPILERS
    return next((found for found in map(shutil.which, names) if found), None)


def _built() -> Path:
    if platform.system() == "Windows":
        raise CannotBuild("the kernels in C are not built on Windows")
    found = compiler()
    if found is None:
        wanted = os.environ.get("CC")
        raise CannotBuild(f"CC={wanted} is not a program" if wanted else "no C compiler (cc, gcc or clang) was found")
    folder = Path(__file__).parent
    sources = sorted(folder.glob("*.c"))
    target = _cache_folder() / f"kernels-{_fingerprint([*sources, *sorted(folder.glob('*.h'))], found)}.so"
    if not target.exists():
        logger.info("compiling %s with %s, once: takes a few seconds", folder, found)
        _compile(found, sources, target)
    return target


def _cache_folder() -> Path:
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    folder = Path(root) / "minim3"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CannotBuild(f"the cache folder {folder} cannot be made: {error.strerror}") from error
    return folder


def _fingerprint(sources: list[Path], found: str) -> str:
    program = Path(found).resolve()
    stat = program.stat()
    parts = [*_FLAGS, str(program), str(stat.st_size), str(stat.st_mtime_ns), platform.machine(), _processor()]
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


def _compile(program: str, sources: list[Path], target: Path) -> None:
    """Written aside and renamed: two processes at once do no harm, nor does one that is killed."""
    try:
        handle, aside = tempfile.mkstemp(suffix=".so", prefix=".making-", dir=target.parent)
    except OSError as error:
        raise CannotBuild(f"the cache folder {target.parent} cannot be written to: {error.strerror}") from error
    os.close(handle)
    try:
        command = [program, *_FLAGS, "-o", aside, *map(str, sources), "-lm"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=_MOST_SECONDS)
        if done.returncode:
            lines = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
            said = next((line for line in lines if "error" in line), lines[-1])
            raise CannotBuild(f"{program} cannot compile the kernels: {said}")
        os.replace(aside, target)
    except subprocess.TimeoutExpired as error:
        raise CannotBuild(f"{program} took more than {_MOST_SECONDS} s to compile the kernels") from error
    finally:
        Path(aside).unlink(missing_ok=True)
