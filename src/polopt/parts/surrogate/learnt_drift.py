"""LPO: a mirror-learning surrogate whose drift is a small network, trained once and then left as it is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from polopt.errors import CallError
from polopt.nets.frozen import artefact
from polopt.part import Range, register_part
from polopt.parts.surrogate.drift import Decisions, Drift, clip_drift

if TYPE_CHECKING:
    from polopt.method import Method
    from polopt.update import Update

INPUTS, HIDDEN = 8, 128
SHAPES: dict[str, tuple[int | None, ...]] = {"hidden": (None, INPUTS), "out": (None,)}


def features(log_r: Decisions, advantage: Decisions) -> Float[Tensor, "B T 8"]:
    """(1-r), (1-r)^2, log r, (log r)^2, and each of them times A: all 0 at r = 1."""
    gap = -log_r.expm1()
    plain = torch.stack([gap, gap.square(), log_r, log_r.square()], -1)
    return torch.cat([plain, plain * advantage[..., None]], -1)


def untrained(seed: int) -> dict[str, Tensor]:
    """The network before it is trained: hidden weights N(0, 1/8), and 0 behind them, so that there is no drift at all.

    Without biases a network and its mirror image compute the same, net(phi) = net(-phi): hidden weights of 0 would leave a search
    by antithetic pairs where it is.
    """
    rng = torch.Generator().manual_seed(seed)
    return {"hidden": torch.randn(HIDDEN, INPUTS, generator=rng) / INPUTS**0.5, "out": torch.zeros(HIDDEN)}


@register_part("surrogate", "learnt-drift")
@dataclass(frozen=True)
class LearntDrift(Drift):
    """LPO's drift (Lu et al., arXiv 2210.05639): f = relu(net(x) - xi), net a tanh network of 128 units without biases.

    x holds (1-r), (1-r)^2, log r, (log r)^2 and each times A, as the paper lists them; the authors' code puts log r, (log r)^2 in
    front of (1-r), (1-r)^2, so that columns of `hidden` taken from there must be permuted (2, 3, 0, 1, 6, 7, 4, 5). At r = 1
    all are 0, so net(x) = 0 and the drift is valid whatever the weights. The network is no part of the policy: it is read from an
    artefact at the start, kept in the part's memory and so in checkpoints, and no update moves it. start = "clip" adds PPO's drift
    inside the relu, as the authors' code can.
    """

    weights: Annotated[str, "a shipped drift by name, or path/to/drift.safetensors (hidden [H,8], out [H])"] = "cartpole"
    xi: Annotated[float, Range(gt=0), "threshold; 1e-4 is the authors' code, 1e-6 their text"] = 1e-4
    start: Annotated[Literal["zero", "clip"], "what the network's drift is added to: nothing, or the clip's"] = "zero"
    eps: Annotated[float, Range(ge=0), "the clip's bound, where start is clip"] = 0.2
    equation: ClassVar[str] = (
        "l_t = -(r_t A_t - f),  f = relu(W_2 tanh(W_1 x) - xi),  "
        "x = [1-r, (1-r)^2, log r, (log r)^2, (1-r)A, (1-r)^2 A, (log r)A, (log r)^2 A]"
    )

    def initial(self) -> dict[str, Tensor]:
        """The network's weights. Raises `CallError` naming the file and what is wrong with it."""
        found = artefact("drift", self.weights, SHAPES)
        if found["hidden"].shape[0] != found["out"].shape[0]:
            have = {k: tuple(v.shape) for k, v in found.items()}
            raise CallError(f"drift '{self.weights}': 'hidden' and 'out' differ in their number of units: {have}")
        return found

    def validate(self, method: Method, update: Update) -> str | None:
        """Refuse weights that cannot be read."""
        try:
            self.initial()
        except CallError as error:
            return str(error)
        return None

    def drift(self, log_r: Decisions, advantage: Decisions, memory: Mapping[str, Tensor]) -> Decisions:
        """f(r, A)."""
        x = features(log_r, advantage)
        net = (x @ memory["hidden"].to(x).mT).tanh() @ memory["out"].to(x)
        if self.start == "clip":
            net = net + clip_drift(log_r, advantage, self.eps)
        return (net - self.xi).relu()
