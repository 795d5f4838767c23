"""Muon: the momentum of a matrix, orthogonalised, is its update.

Source: K. Jordan et al., "Muon: An optimizer for hidden layers in neural networks" (2024). torch.optim.Muon takes
matrices alone; here stacks of matrices (experts) are orthogonalised one by one in a batched product, matrices of one
shape share it, and the parameters of groups without `use_muon` move by AdamW in the same object.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

# Of the quintic iteration X <- aX + b(XX^T)X + c(XX^T)^2 X, which drives all singular values near 1 in five steps.
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
ITERATIONS = 5


class Muon(torch.optim.AdamW):
    """Groups with `use_muon` (matrices `[..., rows, columns]`) move by Muon, the others by fused AdamW."""

    def __init__(
        self, params: Iterable[dict[str, Any]], *, lr: float, betas: tuple[float, float], eps: float, momentum: float
    ) -> None:
        super().__init__(params, lr=lr, betas=betas, eps=eps, fused=True)
        self.momentum = momentum

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        groups = self.param_groups
        self.param_groups = [group for group in groups if not group.get("use_muon")]
        try:
            result = super().step(closure)  # type: ignore[func-returns-value, arg-type]
        finally:
            self.param_groups = groups
        for group in groups:
            if group.get("use_muon"):
                self._step_matrices(group)
        return result

    def _step_matrices(self, group: dict[str, Any]) -> None:
        parameters = [parameter for parameter in group["params"] if parameter.grad is not None]
        if not parameters:
            return
        gradients = [parameter.grad for parameter in parameters]
        for parameter in parameters:
            if "momentum" not in self.state[parameter]:
                self.state[parameter]["momentum"] = torch.zeros_like(parameter)
        averages = [self.state[parameter]["momentum"] for parameter in parameters]
        torch._foreach_lerp_(averages, gradients, 1 - self.momentum)
        ahead = torch._foreach_lerp(gradients, averages, self.momentum)  # Nesterov's
        torch._foreach_mul_(parameters, 1 - group["lr"] * group["weight_decay"])
        by_shape: dict[torch.Size, list[int]] = defaultdict(list)
        for number, parameter in enumerate(parameters):
            by_shape[parameter.shape[-2:]].append(number)
        for (rows, columns), numbers in by_shape.items():
            flat = [ahead[number].reshape(-1, rows, columns) for number in numbers]
            # A tall matrix maps few channels to many: its update keeps the size of a square one's on every output.
            update = orthogonalise(torch.cat(flat)).mul_(max(1.0, rows / columns) ** 0.5)
            for number, part in zip(numbers, update.split([piece.shape[0] for piece in flat])):
                parameters[number].add_(part.view_as(parameters[number]), alpha=-group["lr"])


def orthogonalise(matrices: Tensor) -> Tensor:
    """The nearest (semi-)orthogonal matrix of each in `[n, rows, columns]`, by Newton-Schulz iteration in their dtype.

    Singular values end within about 0.7..1.2 (the coefficients trade exactness for speed); tiny ones may stay below.
    """
    a, b, c = COEFFICIENTS
    tall = matrices.shape[-2] > matrices.shape[-1]
    x = matrices.mT if tall else matrices
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(ITERATIONS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x
