"""Records what a CUDA graph would hold, on a CPU: operators of torch and launches of Triton, on the memory they had.

What a graph cannot hold is refused: a number read by the host, or a tensor made from numbers of the host. Replaying
runs the same operators on the same tensors, in memory that was filled with NaN; what Python did between them is not
done again.
"""

from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves
from triton.runtime.interpreter import InterpretedFunction

_ASKS = ("_local_scalar_dense", "nonzero", "equal", "is_nonzero", "unique", "masked_select", "lift_fresh")


class _Recording(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any], Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        assert name not in _ASKS, f"a graph cannot hold {name}"
        out = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, out))
        return out


def record(run: Callable[[], tuple[Tensor, Tensor]]) -> tuple[Callable[[], None], tuple[Tensor, Tensor]]:
    """A `minim3.inference.graphs.Recorder`."""
    recording = _Recording()
    launch = InterpretedFunction.run

    def noted(self: InterpretedFunction, *args: Any, **kwargs: Any) -> Any:
        recording.calls.append((launch, (self, *args), kwargs, None))
        with _disable_current_modes():
            return launch(self, *args, **kwargs)

    with mock.patch.object(InterpretedFunction, "run", noted), recording:
        outputs = run()

    def replay() -> None:
        for func, args, kwargs, out in recording.calls:
            found = func(*args, **kwargs)
            for old, new in zip(tree_leaves(out), tree_leaves(found)):
                if isinstance(old, Tensor) and old.data_ptr() != new.data_ptr():
                    fresh = getattr(func, "overloadpacket", None) in (torch.ops.aten.empty, torch.ops.aten.empty_like)
                    old.fill_(float("nan")) if fresh and old.is_floating_point() else old.copy_(new)

    return replay, outputs
