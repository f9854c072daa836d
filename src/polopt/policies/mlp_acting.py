"""Acting in NumPy: a few small matrix products on views of the parameters, without PyTorch's per-call cost."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from polopt.errors import CallError
from polopt.policies.normalize import CLIP

if TYPE_CHECKING:
    from polopt.policies.mlp import MLPPolicy

Floats = NDArray[np.float32]


def _tanh(x: Floats) -> None:
    np.tanh(x, out=x)


def _relu(x: Floats) -> None:
    np.maximum(x, 0, out=x)


def _elu(x: Floats) -> None:
    np.copyto(x, np.expm1(x), where=x < 0)


def _silu(x: Floats) -> None:
    np.divide(x, 1 + np.exp(-x), out=x)


IN_PLACE = {nn.Tanh: _tanh, nn.ReLU: _relu, nn.ELU: _elu, nn.SiLU: _silu}


def _view(x: Tensor) -> Floats:
    """The tensor's own memory on a CPU, a copy from another device."""
    return x.detach().cpu().numpy()


class Actor:
    """The policy's forward pass and draw for one rollout, during which no parameter changes or moves.

    Views are taken when it is made, so an optimiser may afterwards move the parameters into other memory: the next rollout's
    actor takes views of that.
    """

    def __init__(self, policy: MLPPolicy) -> None:
        net = policy.policy
        self.head = policy.head
        self.layers: list[tuple[Floats, Floats, Any]] = []
        modules = list(net.trunk)
        for layer, activation in zip(modules[::2], modules[1::2], strict=True):
            if not isinstance(layer, nn.Linear) or type(activation) not in IN_PLACE:
                raise CallError(f"cannot act in NumPy through {layer}, {activation}")
            self.layers.append((_view(layer.weight).T, _view(layer.bias), IN_PLACE[type(activation)]))
        self.last = _view(net.head.weight).T, _view(net.head.bias)
        self.log_std = None if net.log_std is None else _view(net.log_std)
        moments = policy.moments
        self.standard = None if moments is None else (_view(moments.shift), _view(moments.scale))
        self._rows = -1
        self._rooms: list[Floats] = []

    def output(self, obs: Floats) -> Floats:
        """What the distribution is made from, [n,O]; the memory is reused by the next call."""
        n = obs.shape[0]
        if n != self._rows:
            self._rows = n
            self._rooms = [np.empty((n, b.shape[0]), dtype=np.float32) for _, b, _ in (*self.layers, (*self.last, None))]
        x = obs
        if self.standard is not None:
            x = np.subtract(x, self.standard[0])
            np.multiply(x, self.standard[1], out=x)
            np.clip(x, -CLIP, CLIP, out=x)
        for (weight, bias, activate), room in zip(self.layers, self._rooms, strict=False):
            x = np.matmul(x, weight, out=room)
            x += bias
            activate(x)
        x = np.matmul(x, self.last[0], out=self._rooms[-1])
        x += self.last[1]
        return x

    def __call__(self, obs: Floats, noise: Floats | None) -> NDArray[Any]:
        """Actions [n,...] as stored in batches; greedy without noise."""
        return self.head.choose(self.output(obs), self.log_std, noise)
