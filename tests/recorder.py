"""Records what a CUDA graph would hold, on a CPU: operators of torch and launches of Triton, on the memory they had.

A number read by the host, or a tensor made from numbers of the host, is refused, as a capture refuses it. Replaying
runs the same operators on the same tensors, in memory that was filled with NaN; what Python did between them is not
done again. A graph keeps no memory alive but its own: what was there before must still be somebody else's.
"""

from collections import Counter
from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map
from triton.runtime.interpreter import InterpretedFunction

_ASKS = ("_local_scalar_dense", "nonzero", "equal", "is_nonzero", "unique", "masked_select", "lift_fresh")
_FRESH = (torch.ops.aten.empty, torch.ops.aten.empty_like)


class _Recording(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any], Any]] = []
        self.own: set[int] = set()  # memory that was made here, by address
        self.aliases: dict[Any, Tensor] = {}  # of the tensors that were there before: these themselves are not kept

    def note(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
        with _disable_current_modes():
            given = {_address(x) for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)} - self.own
            self.own |= {_address(x) for x in tree_leaves(out) if isinstance(x, Tensor)} - given
            self.calls.append((func, *tree_map(self._kept, (args, kwargs, out))))

    def _kept(self, x: Any) -> Any:
        if not isinstance(x, Tensor) or _address(x) in self.own:
            return x
        key = x.data_ptr(), x.shape, x.stride(), x.dtype
        return self.aliases.setdefault(key, x.detach())

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        assert name not in _ASKS, f"a graph cannot hold {name}"
        out = func(*args, **(kwargs or {}))
        self.note(func, args, kwargs or {}, out)
        return out

    def check_alive(self) -> None:
        """What was there before is held by others than this recording."""
        held = Counter(map(_address, self.aliases.values()))
        for x in self.aliases.values():
            holders = torch._C._storage_Use_Count(x.untyped_storage()._cdata) - 1  # one is what asks
            assert not x.numel() or holders > held[_address(x)], f"a graph reads freed memory, once {tuple(x.shape)}"


def _address(x: Tensor) -> int:
    return x.untyped_storage().data_ptr()


class Recorder:
    """A `minim3.inference.graphs.Recorder`."""

    num_forgotten = 0

    def __call__(self, run: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        recording = _Recording()
        launch = InterpretedFunction.run

        def noted(self: InterpretedFunction, *args: Any, **kwargs: Any) -> Any:
            recording.note(launch, (self, *args), kwargs, None)
            with _disable_current_modes():
                return launch(self, *args, **kwargs)

        with mock.patch.object(InterpretedFunction, "run", noted), recording:
            output = run()

        def replay() -> None:
            recording.check_alive()
            for func, args, kwargs, out in recording.calls:
                found = func(*args, **kwargs)
                for old, new in zip(tree_leaves(out), tree_leaves(found)):
                    if isinstance(old, Tensor) and old.data_ptr() != new.data_ptr():
                        fresh = getattr(func, "overloadpacket", None) in _FRESH and old.is_floating_point()
                        old.fill_(float("nan")) if fresh else old.copy_(new)

        return replay, output

    def forget(self) -> None:
        self.num_forgotten += 1
