"""One run at a time in an output folder."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

try:
    import fcntl
except ImportError:  # not on Windows
    fcntl = None  # type: ignore[assignment]


@contextmanager
def locked(output: Path) -> Iterator[None]:
    """Hold the folder `output` for this process; the system lets go of it however the process ends.

    Raises:
        ValueError: another process holds it: two runs would remove each other's checkpoints.
    """
    with (output / ".lock").open("a") as file:
        try:
            if fcntl is not None:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(
                f"another process trains into {output}: wait for it, stop it, or choose another `output`"
            ) from None
        except OSError as error:  # a file system without locks
            print(f"warning: {output} cannot be locked ({error}): start no second run in it", file=sys.stderr)
        yield
