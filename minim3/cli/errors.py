"""From exceptions to one line on stderr and an exit code. MINIM3_TRACEBACK=1 shows the traceback instead."""

import os
import sys
import warnings
from collections.abc import Callable
from typing import Any, TextIO

import typer

FAILED, BAD_INPUT, INTERRUPTED = 1, 2, 130
# The command-line parser's errors, wherever this version of typer keeps them.
_UsageError: Any = typer.BadParameter.__bases__[0]


def run_guarded(run: Callable[[], Any]) -> int:
    """Calls `run`; returns its exit code, or the one its exception stands for after saying so on stderr."""
    try:
        with warnings.catch_warnings():
            warnings.showwarning = _show_warning
            code = run()
        sys.stdout.flush()
        code = code if isinstance(code, int) else 0
    except (KeyboardInterrupt, typer.Abort):
        code = INTERRUPTED
    except BrokenPipeError:
        # The reader has gone (`| head`). What is still buffered must not raise again at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED
    except Exception as error:
        if os.environ.get("MINIM3_TRACEBACK", "0") not in ("", "0"):
            raise
        code, message = describe(error)
        say(message)
    if code == INTERRUPTED and sys.stderr.isatty():
        print(file=sys.stderr)  # leave the line that Ctrl-C was typed on
    return code


def describe(error: Exception) -> tuple[int, str]:
    """The exit code and the one line for an exception."""
    if isinstance(error, _UsageError):
        message = error.format_message().replace("Value error, ", "").rstrip(".")
        command = getattr(getattr(error, "ctx", None), "command_path", None) or "minim3"
        return BAD_INPUT, f"{_one_line(message)} (see {command} --help)"
    if isinstance(error, MemoryError) or _is_out_of_memory(error):
        return BAD_INPUT, f"out of memory: {_one_line(str(error)) or 'the system has no more'}"
    if isinstance(error, ModuleNotFoundError) and error.name in ("av", "yaml"):
        return BAD_INPUT, f"{error.name} is not installed: pip install {'av' if error.name == 'av' else 'pyyaml'}"
    # The project raises ValueError for what a user can put right, and only for that.
    if isinstance(error, ValueError):
        return BAD_INPUT, _one_line(str(error))
    if isinstance(error, (FileNotFoundError, NotADirectoryError, IsADirectoryError, PermissionError)):
        return BAD_INPUT, f"{error.filename}: {error.strerror}" if error.filename else _one_line(str(error))
    if isinstance(error, (OSError, FloatingPointError)):
        return FAILED, _one_line(str(error))
    text = ": ".join(part for part in (type(error).__name__, _one_line(str(error))) if part)
    return FAILED, f"unexpected {text} (run with MINIM3_TRACEBACK=1 for the traceback)"


def say(message: str) -> None:
    """One line on stderr."""
    print(f"minim3: {message}", file=sys.stderr, flush=True)


def _is_out_of_memory(error: Exception) -> bool:
    """torch.OutOfMemoryError on an accelerator; the CPU allocator raises a plain RuntimeError."""
    kinds = [kind.__name__ for kind in type(error).__mro__]
    return "OutOfMemoryError" in kinds or (isinstance(error, RuntimeError) and "can't allocate memory" in str(error))


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _show_warning(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, file: TextIO | None = None,
    line: str | None = None,
) -> None:  # fmt: skip
    say(f"warning: {_one_line(str(message))}")
