"""Multi-layer perceptrons with orthogonal weights, initialised from a seed and the net's name."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Generator, nn

from polopt.errors import unknown
from polopt.run import seed_of

ACTIVATIONS: dict[str, type[nn.Module]] = {"tanh": nn.Tanh, "relu": nn.ReLU, "elu": nn.ELU, "silu": nn.SiLU}


def net_generator(seed: int, name: str) -> Generator:
    """The stream that a net's initial weights come from; adding one net never changes another's weights."""
    return torch.Generator().manual_seed(seed_of(seed, f"net/{name}"))


def linear(inputs: int, outputs: int, gain: float, generator: Generator) -> nn.Linear:
    """A linear layer with orthogonal weights of this gain and zero bias (Saxe et al. 2014, arXiv 1312.6120)."""
    layer = nn.Linear(inputs, outputs, device="meta").to_empty(device="cpu")  # leaves PyTorch's global stream alone
    nn.init.orthogonal_(layer.weight, gain, generator=generator)
    nn.init.zeros_(layer.bias)
    return layer


def trunk(inputs: int, hidden: Sequence[int], activation: str, generator: Generator) -> nn.Sequential:
    """Hidden layers with gain sqrt 2, each followed by the activation; with no `hidden` the identity."""
    if activation not in ACTIVATIONS:
        raise unknown("activation", activation, ACTIVATIONS)
    layers: list[nn.Module] = []
    for width_in, width_out in zip((inputs, *hidden), hidden, strict=False):
        layers += [linear(width_in, width_out, math.sqrt(2), generator), ACTIVATIONS[activation]()]
    return nn.Sequential(*layers)
