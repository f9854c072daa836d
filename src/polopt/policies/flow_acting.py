"""Acting of flow policies in NumPy: Euler steps along the velocity field, on views of the parameters."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from torch import nn

from polopt.errors import CallError
from polopt.nets.flow import FREQUENCIES, SCALE
from polopt.policies.mlp_acting import IN_PLACE, _view
from polopt.policies.normalize import CLIP
from polopt.run import seed_of

if TYPE_CHECKING:
    from polopt.policies.flow import FlowPolicy

Floats = NDArray[np.float32]


class FlowActor:
    """Draws for one rollout, during which no parameter changes or moves.

    x(1) = noise; x <- x - v(o, x, t) / K over t = 1, (K-1)/K, ..., 1/K. What the first layer makes of the times is computed when
    the actor is made, what it makes of the observation once per decision.
    """

    def __init__(self, policy: FlowPolicy) -> None:
        net = policy.policy
        self.head, self.steps, self.size = policy.head, policy.settings.flow_steps, net.size
        layers: list[tuple[Floats, Floats, Any]] = []
        modules = [*net.trunk, net.head, None]
        for layer, activation in zip(modules[::2], modules[1::2], strict=True):
            if not isinstance(layer, nn.Linear) or (activation is not None and type(activation) not in IN_PLACE):
                raise CallError(f"cannot act in NumPy through {layer}, {activation}")
            layers.append((_view(layer.weight).T, _view(layer.bias), None if activation is None else IN_PLACE[type(activation)]))
        (first, bias, self.activate), self.layers = layers[0], layers[1:]
        self.of_obs, self.of_x = first[: net.obs], first[net.obs : net.obs + net.size]
        angle = np.linspace(1, 1 / self.steps, self.steps)[:, None] * 2.0 ** np.arange(FREQUENCIES)
        time = np.concatenate([np.cos(angle), np.sin(angle)], 1).astype(np.float32)
        self.of_time: Floats = time @ first[net.obs + net.size :] + bias
        moments = policy.moments
        self.standard = None if moments is None else (_view(moments.shift), _view(moments.scale))
        self._own = np.random.default_rng(seed_of(policy.seed, "flow/starts"))

    def velocity(self, seen: Floats, x: Floats, k: int) -> Floats:
        """v at points x [n,A] and the k-th time, for what the first layer makes of the observations [n,H]."""
        h = x @ self.of_x
        h += seen
        h += self.of_time[k]
        if self.activate is not None:
            self.activate(h)
        for weight, bias, activate in self.layers:
            h = h @ weight
            h += bias
            if activate is not None:
                activate(h)
        h *= SCALE
        return h

    def __call__(self, obs: Floats, noise: Floats | None) -> Floats:
        """Actions [n,A] as stored in batches.

        A flow has no most likely action that it could name: without noise it starts from draws of its own, the same for every
        actor of the seed, and is not perturbed at the end.
        """
        if noise is None:
            start, after = self._own.standard_normal((obs.shape[0], self.size), dtype=np.float32), None
        else:
            start, after = noise[..., : self.size], noise[..., self.size :] if self.head.noisy else None
        if self.standard is not None:
            obs = np.clip((obs - self.standard[0]) * self.standard[1], -CLIP, CLIP)
        seen = obs @ self.of_obs
        x = start.copy()
        for k in range(self.steps):
            x -= self.velocity(seen, x, k) / np.float32(self.steps)
        if after is not None:
            x += np.float32(self.head.noisy) * after
        return x
