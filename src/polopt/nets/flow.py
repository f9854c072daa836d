"""A velocity field over actions, given an observation and a time."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Generator, Tensor, nn

from polopt.nets.mlp import linear, trunk

#: Frequencies of the time's embedding: cos and sin of 2^j t, j = 0 .. 3 (radians).
FREQUENCIES = 4
#: The last layer's output is multiplied by this, so that a fresh field moves its noise little.
SCALE = 0.25


def embed(t: Float[Tensor, "*N"]) -> Float[Tensor, "*N E"]:
    """cos(2^j t) for all j, then sin(2^j t): 8 numbers per time."""
    scaled = t[..., None] * 2.0 ** torch.arange(FREQUENCIES, device=t.device, dtype=t.dtype)
    return torch.cat([scaled.cos(), scaled.sin()], -1)


class VelocityNet(nn.Module):
    """v(o, x, t): hidden layers over (observation, point, embedded time), a linear head, times 0.25 (McAllister et al. 2025)."""

    def __init__(self, obs: int, size: int, hidden: Sequence[int], activation: str, generator: Generator) -> None:
        super().__init__()
        self.obs, self.size = obs, size
        inputs = obs + size + 2 * FREQUENCIES
        self.trunk = trunk(inputs, hidden, activation, generator)
        self.head = linear(hidden[-1] if hidden else inputs, size, 1.0, generator)

    def forward(self, obs: Float[Tensor, "M D"], x: Float[Tensor, "M N A"], t: Float[Tensor, "M N"]) -> Float[Tensor, "M N A"]:
        """Velocities at N points and times of each observation, which passes its part of the first layer once."""
        layers = [*self.trunk, self.head]
        first = layers[0]
        h = F.linear(torch.cat([x, embed(t)], -1), first.weight[:, self.obs :], first.bias)
        h = h + F.linear(obs, first.weight[:, : self.obs])[:, None]
        for layer in layers[1:]:
            h = layer(h)
        return SCALE * h


__all__ = ["FREQUENCIES", "SCALE", "VelocityNet", "embed"]
