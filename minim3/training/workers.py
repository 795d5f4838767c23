"""Worker processes that make items ahead, received in a fixed order.

Worker w of W makes items w, w + W, w + 2 W, ... of a plan and sends them through a pipe of its own. Arrays travel by
value, so there is no shared memory and no file descriptor to leak when a process is killed.
"""

import multiprocessing
import os
import signal
import threading
import traceback
from collections import deque
from collections.abc import Iterator
from multiprocessing.connection import Connection
from types import TracebackType
from typing import Any, Protocol

import torch


class Plan(Protocol):
    """What workers make. It is sent to them, so it must pickle."""

    @property
    def item_name(self) -> str: ...  # in errors

    @property
    def first(self) -> int: ...  # number of the first item, in errors

    def items(self, worker: int, num_workers: int) -> Iterator[Any]:
        """Items `worker`, `worker + num_workers`, ... from the plan's start on, without end."""
        ...

    def size(self, item: Any) -> int:
        """How much of `max_waiting` an item takes."""
        ...

    def max_waiting(self, num_workers: int) -> int:
        """A worker pauses while items of this size in all have not been taken off its hands."""
        ...


class InlineWorkers:
    """The same items, made on demand in this process."""

    def __init__(self, plan: Plan, num_workers: int = 1) -> None:
        self._items = [plan.items(worker, num_workers) for worker in range(num_workers)]
        self._received = 0

    def __enter__(self) -> "InlineWorkers":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._items.clear()

    def receive(self) -> Any:
        item = next(self._items[self._received % len(self._items)])
        self._received += 1
        return item


class WorkerProcesses:
    """A context manager; leaving it ends the workers."""

    def __init__(self, plan: Plan, num_workers: int) -> None:
        self.plan, self.num_workers = plan, num_workers
        self._workers: list[tuple[multiprocessing.process.BaseProcess, Connection]] = []
        self._received = 0

    def __enter__(self) -> "WorkerProcesses":
        context = multiprocessing.get_context("spawn")
        for worker in range(self.num_workers):
            reader, writer = context.Pipe(duplex=False)
            process = context.Process(
                target=_run_worker,
                args=(self.plan, worker, self.num_workers, writer),
                name=f"minim3-data-{worker}",
                daemon=True,
            )
            process.start()
            writer.close()  # the worker then holds the only writing end, and its death reads as end of file here
            self._workers.append((process, reader))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for process, reader in self._workers:
            reader.close()
            process.kill()
            process.join()
        self._workers.clear()

    def receive(self) -> Any:
        """The next item, waiting for it if need be.

        Raises:
            RuntimeError: the worker failed (its traceback is quoted) or was killed (its exit code is).
        """
        process, reader = self._workers[self._received % len(self._workers)]
        try:
            message = reader.recv()
        except (EOFError, OSError) as error:
            process.join(timeout=5)
            raise RuntimeError(f"data worker {process.name} died with exit code {process.exitcode}") from error
        if isinstance(message, str):
            number = self.plan.first + self._received
            raise RuntimeError(f"data worker {process.name} failed at {self.plan.item_name} {number}:\n{message}")
        self._received += 1
        return message


class _Waiting:
    """Items made and not yet sent, bounded by their sizes in all; a single item may be larger than the bound."""

    def __init__(self, max_size: int) -> None:
        self.max_size, self.size = max_size, 0
        self._items: deque[tuple[Any, int]] = deque()
        self._changed = threading.Condition()

    def put(self, item: Any, size: int) -> None:
        with self._changed:
            self._changed.wait_for(lambda: not self._items or self.size + size <= self.max_size)
            self._items.append((item, size))
            self.size += size
            self._changed.notify_all()

    def get(self) -> Any:
        with self._changed:
            self._changed.wait_for(lambda: self._items)
            item, size = self._items.popleft()
            self.size -= size
            self._changed.notify_all()
            return item


def _run_worker(plan: Plan, worker: int, num_workers: int, writer: Connection) -> None:
    # The trainer decides when to stop: a signal to the whole process group must not end the data before the checkpoint.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    torch.set_num_threads(1)
    waiting = _Waiting(plan.max_waiting(num_workers))
    sender = threading.Thread(target=_send_all, args=(waiting, writer), daemon=True)
    sender.start()
    try:
        for item in plan.items(worker, num_workers):
            waiting.put(item, plan.size(item))
    except Exception:  # the boundary of the process: whatever went wrong is raised again in the trainer
        waiting.put(traceback.format_exc(), 0)
        waiting.put(None, 0)
        sender.join()


def _send_all(waiting: _Waiting, writer: Connection) -> None:
    try:
        while (message := waiting.get()) is not None:
            writer.send(message)
    except BrokenPipeError:
        os._exit(0)  # the trainer is gone
