"""Running mean and standard deviation of observations or returns, exact over everything seen."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn

CLIP = 10.0  # standardised values beyond this many deviations are cut
EPSILON = 1e-8


class Moments(nn.Module):
    """Count, mean and variance of all rows given to `update`, merged in parallel (Chan, Golub and LeVeque 1979).

    Sums are kept in float64; what a forward pass uses (`shift`, `scale`) is float32 and changes only in `update`, so that
    everything between two updates sees the same numbers. Before the first update rows pass unchanged.
    """

    count: Tensor
    mean: Tensor
    square: Tensor
    shift: Tensor
    scale: Tensor

    def __init__(self, size: int) -> None:
        super().__init__()
        self.register_buffer("count", torch.zeros((), dtype=torch.float64))
        self.register_buffer("mean", torch.zeros(size, dtype=torch.float64))
        self.register_buffer("square", torch.zeros(size, dtype=torch.float64))  # sum of squared deviations
        self.register_buffer("shift", torch.zeros(size))
        self.register_buffer("scale", torch.ones(size))

    @torch.no_grad()
    def update(self, rows: Float[Tensor, "N D"]) -> None:
        """Include these rows; no rows change nothing."""
        n = rows.shape[0]
        if n == 0:
            return
        x = rows.to(torch.float64)
        mean = x.mean(0)
        square = (x - mean).square().sum(0)
        total = self.count + n
        delta = mean - self.mean
        self.square += square + delta.square() * self.count * n / total
        self.mean += delta * n / total
        self.count += n
        self._derive()

    def _derive(self) -> None:
        self.shift.copy_(self.mean)
        self.scale.copy_((self.variance() + EPSILON).rsqrt())

    def variance(self) -> Float[Tensor, " D"]:
        """Population variance; 1 before any row was seen."""
        return self.square / self.count if bool(self.count > 0) else torch.ones_like(self.square)

    def forward(self, x: Float[Tensor, "*N D"]) -> Float[Tensor, "*N D"]:
        """Standardised rows, cut at +-10."""
        return ((x - self.shift) * self.scale).clamp(-CLIP, CLIP)
