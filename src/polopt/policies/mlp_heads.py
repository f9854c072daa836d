"""Action distributions of MLP policies: statistics in PyTorch, draws in NumPy."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Protocol, cast

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from polopt.errors import CallError
from polopt.part import Can
from polopt.policies.mlp_spaces import Action
from polopt.stats import STATS, find_stat, stat_names

Array = NDArray[Any]
Floats = NDArray[np.float32]
LOG_ROOT_2PI = 0.5 * math.log(2 * math.pi)


class Head(Protocol):
    """A family of distributions over actions; `output` [N,O] is what the network gives per decision."""

    @property
    def outputs(self) -> int:
        """Numbers that the network gives per decision."""
        ...

    @property
    def deviations(self) -> int:
        """Entries of the state-independent log standard deviation; 0: none."""
        ...

    @property
    def can(self) -> frozenset[Can]:
        """What the distribution offers."""
        ...

    def stat(self, name: str, output: Tensor, log_std: Tensor | None, action: Tensor) -> Tensor:
        """A statistic [N] or [N,m] of the actions under the distributions [N]."""
        ...

    def dist(self, output: Tensor, log_std: Tensor | None) -> Tensor:
        """Parameters [N,m] that determine the distributions."""
        ...

    def kl(self, old: Tensor, output: Tensor, log_std: Tensor | None) -> Tensor:
        """KL(old || now) in closed form, [N]; `old` as returned by `dist`."""
        ...

    def noise(self, rng: np.random.Generator, shape: tuple[int, ...]) -> Floats:
        """Noise for draws of this shape of decisions."""
        ...

    def choose(self, output: Floats, log_std: Floats | None, noise: Floats | None) -> Array:
        """Actions [n,...] as stored in batches; without noise the most likely ones."""
        ...

    def outward(self, action: Array) -> Array:
        """Stored actions as the environment wants them."""
        ...


@dataclass(frozen=True)
class Categorical:
    """One categorical distribution per component of the action (one for Discrete); draws by the Gumbel-max trick.

    Stored actions are int64 indices from 0: [N], or [N,D] for D components, whose log-probabilities, entropies and
    divergences add up. Any statistic of `polopt.stats.STATS` works with one component.
    """

    action: Action

    @property
    def outputs(self) -> int:
        return sum(self.action.counts)

    @property
    def deviations(self) -> int:
        return 0

    @property
    def single(self) -> bool:
        """One component, stored without a component axis."""
        return self.action.kind == "discrete"

    @property
    def can(self) -> frozenset[Can]:
        return frozenset({Can.SCORE, Can.KL, Can.VALUE, Can.REFERENCE, *({Can.ENUMERATE} if self.single else ())})

    def stat(self, name: str, output: Float[Tensor, "N V"], log_std: Tensor | None, action: Tensor) -> Tensor:
        fn = find_stat(name)
        if fn is None:
            raise CallError(f"a categorical policy has no statistic '{name}'; known: {', '.join(sorted(stat_names()))}")
        if self.single:
            return fn(output, action)
        if name not in ("logp", "entropy"):
            raise CallError(f"statistic '{name}' is not defined for an action of {len(self.action.counts)} components")
        parts = torch.split(output, list(self.action.counts), -1)
        return torch.stack([STATS[name](part, action[:, i]) for i, part in enumerate(parts)]).sum(0)

    def dist(self, output: Float[Tensor, "N V"], log_std: Tensor | None) -> Float[Tensor, "N V"]:
        """Log-probabilities of all actions."""
        if self.single:
            return output.log_softmax(-1)
        return torch.cat([part.log_softmax(-1) for part in torch.split(output, list(self.action.counts), -1)], -1)

    def kl(self, old: Float[Tensor, "N V"], output: Float[Tensor, "N V"], log_std: Tensor | None) -> Float[Tensor, " N"]:
        return (old.exp() * (old - self.dist(output, None))).sum(-1)

    def noise(self, rng: np.random.Generator, shape: tuple[int, ...]) -> Floats:
        return rng.gumbel(size=(*shape, self.outputs)).astype(np.float32)

    def choose(self, output: Floats, log_std: Floats | None, noise: Floats | None) -> Array:
        score = output if noise is None else output + noise
        if self.single:
            return cast(Array, score.argmax(-1))
        ends = np.cumsum(self.action.counts)
        return np.stack([part.argmax(-1) for part in np.split(score, ends[:-1], -1)], -1)

    def outward(self, action: Array) -> Array:
        if any(self.action.start):
            action = action + np.asarray(self.action.start if not self.single else self.action.start[0])
        return action if self.single else action.astype(self.action.dtype, copy=False)


@dataclass(frozen=True)
class Gaussian:
    """Independent normal components with state-independent deviations; the stored action is the raw draw [N,A].

    The environment receives it clipped to its bounds; log-probabilities are those of the raw draw.
    """

    action: Action

    @property
    def can(self) -> frozenset[Can]:
        return frozenset({Can.SCORE, Can.KL, Can.VALUE, Can.REFERENCE, Can.REPARAM})

    @property
    def outputs(self) -> int:
        return self.action.size

    @property
    def deviations(self) -> int:
        return self.action.size

    def stat(self, name: str, output: Float[Tensor, "N A"], log_std: Tensor | None, action: Tensor) -> Tensor:
        assert log_std is not None
        if name == "logp":
            return -(0.5 * ((action - output) * (-log_std).exp()).square() + log_std + LOG_ROOT_2PI).sum(-1)
        if name == "entropy":
            return (log_std + 0.5 + LOG_ROOT_2PI).sum(-1).expand(output.shape[0])
        raise CallError(f"a Gaussian policy has no statistic '{name}'; known: entropy, logp")

    def dist(self, output: Float[Tensor, "N A"], log_std: Tensor | None) -> Float[Tensor, "N 2*A"]:
        """Means, then log standard deviations."""
        assert log_std is not None
        return torch.cat([output, log_std.expand_as(output)], -1)

    def kl(self, old: Float[Tensor, "N 2*A"], output: Float[Tensor, "N A"], log_std: Tensor | None) -> Float[Tensor, " N"]:
        assert log_std is not None
        mean, spread = old.chunk(2, -1)
        scaled = (2 * (spread - log_std)).exp() + ((mean - output) * (-log_std).exp()).square()
        return (log_std - spread + 0.5 * (scaled - 1)).sum(-1)

    def noise(self, rng: np.random.Generator, shape: tuple[int, ...]) -> Floats:
        return rng.standard_normal((*shape, self.outputs), dtype=np.float32)

    def choose(self, output: Floats, log_std: Floats | None, noise: Floats | None) -> Array:
        if noise is None:
            return output.copy()
        assert log_std is not None
        return output + np.exp(log_std) * noise

    def outward(self, action: Array) -> Array:
        clipped = np.clip(action, np.asarray(self.action.low), np.asarray(self.action.high))
        out: Array = clipped.astype(self.action.dtype).reshape(-1, *self.action.shape)
        return out


@dataclass(frozen=True)
class Squashed(Gaussian):
    """A normal draw u squashed to the bounds: low + (high - low) (tanh u + 1) / 2 (Haarnoja et al. 2018, arXiv 1801.01290).

    The stored action is u, before squashing: recovering it from the squashed number would lose all precision near the bounds.
    `logp` is the exact density of the squashed action, by log(1 - tanh(u)^2) = 2 (log 2 - u - softplus(-2u)). KL equals that
    of the normals, as squashing is a bijection. The entropy has no closed form: `entropy` is an unbiased one-draw estimate,
    the normal's entropy plus the log-derivative of the squashing at the stored draw, differentiated along the draw's path
    (its gradient, unlike that of -logp, estimates the entropy's).
    """

    def __post_init__(self) -> None:
        if not self.action.bounded:
            raise CallError("policy.distribution = 'squashed' needs a bounded action space; use 'gaussian'")

    def stat(self, name: str, output: Float[Tensor, "N A"], log_std: Tensor | None, action: Tensor) -> Tensor:
        normal = super().stat(name, output, log_std, action)
        if name == "logp":
            return normal - self._log_slope(action)
        assert log_std is not None
        standard = ((action - output) * (-log_std).exp()).detach()
        return normal + self._log_slope(output + log_std.exp() * standard)

    def _log_slope(self, u: Float[Tensor, "N A"]) -> Float[Tensor, " N"]:
        scale = sum(math.log((h - w) / 2) for w, h in zip(self.action.low, self.action.high, strict=True))
        return (2 * (math.log(2) - u - F.softplus(-2 * u))).sum(-1) + scale

    def outward(self, action: Array) -> Array:
        low, high = np.asarray(self.action.low), np.asarray(self.action.high)
        squashed = low + (high - low) * (np.tanh(action) + 1) / 2
        out: Array = squashed.astype(self.action.dtype).reshape(-1, *self.action.shape)
        return out


def make_head(distribution: str, action: Action) -> Categorical | Gaussian:
    """The head called `distribution` ("auto" follows the action space); raises `CallError` when the two do not fit."""
    if distribution == "auto":
        distribution = "gaussian" if action.kind == "box" else "categorical"
    if (distribution == "categorical") == (action.kind == "box"):
        valid = "'gaussian' or 'squashed'" if action.kind == "box" else "'categorical'"
        raise CallError(f"policy.distribution = '{distribution}' does not fit {action.kind} actions; use {valid}")
    heads: dict[str, type[Categorical | Gaussian]] = {"categorical": Categorical, "gaussian": Gaussian, "squashed": Squashed}
    return heads[distribution](action)
