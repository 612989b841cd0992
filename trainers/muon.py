"""Muon (Jordan et al., 2024): SGD with momentum whose updates of matrices are orthogonalised.

torch.optim.Muon orthogonalises in bfloat16, which a CPU without instructions for it does 25 times slower than float32,
in which this does it, for all matrices of a shape at once.
"""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of x, x^3 and x^5: singular values come near 1 fast
STEPS = 5


class Muon(Optimizer):
    """As `torch.optim.Muon` with `adjust_lr_fn="match_rms_adamw"`, so that AdamW's learning rates fit."""

    def __init__(
        self, params: Iterable[nn.Parameter], lr: float, momentum: float = 0.95, weight_decay: float = 0.1
    ) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Update every matrix that has a gradient."""
        with torch.enable_grad():
            loss = closure() if closure else None
        for group in self.param_groups:
            by_shape: dict[torch.Size, list[Tensor]] = {}
            for parameter in (p for p in group["params"] if p.grad is not None):
                by_shape.setdefault(parameter.shape, []).append(parameter)
            for shape, parameters in by_shape.items():
                rate = group["lr"] * 0.2 * max(shape) ** 0.5
                momenta = [self._momentum(parameter, group["momentum"]) for parameter in parameters]
                for parameter, update in zip(parameters, orthogonalised(torch.stack(momenta)), strict=True):
                    parameter.mul_(1 - group["lr"] * group["weight_decay"]).add_(update, alpha=-rate)
        return loss

    def _momentum(self, parameter: Tensor, rate: float) -> Tensor:
        """Nesterov's."""
        mean = self.state[parameter].setdefault("momentum", torch.zeros_like(parameter))
        mean.lerp_(parameter.grad, 1 - rate)
        return parameter.grad.lerp(mean, rate)


def orthogonalised(matrices: Tensor) -> Tensor:
    """(B, M, N) with the singular values of each matrix taken to about 1, by Newton-Schulz iterations."""
    a, b, c = COEFFICIENTS
    wide = matrices if matrices.shape[1] <= matrices.shape[2] else matrices.mT
    x = wide / wide.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(STEPS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x if wide is matrices else x.mT
