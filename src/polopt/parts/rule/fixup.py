"""FixPO's rule: descent with a divergence penalty, and sweeps afterwards that leave no decision outside the trust region."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from polopt.batch import Batch
from polopt.interfaces import Problem, State
from polopt.part import Can, Range, register_part
from polopt.parts.rule import functional
from polopt.parts.rule.descend import Descend, DescendStepper, FirstOrder
from polopt.parts.shapes import keep

BISECTIONS = 20


@register_part("rule", "fix-up")
@dataclass(frozen=True)
class FixUp(FirstOrder):
    """Two phases that together guarantee KL_s(old || now) <= eps_kl at every decision of the batch (FixPO, arXiv 2312.05405).

    First `descend` on the loss plus beta mean_s KL_s, with beta a dual variable driven by the worst decision of each minibatch:
    L_beta = beta (eps_kl - aim max_s KL_s), a step of its own Adam, then max(beta, 0). Then sweeps over the whole batch in
    pieces: wherever a decision violates the bound, a step on beta mean_s KL_s alone (and one of beta), until a sweep meets no
    violation. Those steps share the optimiser's moments with the first phase and move only what the divergence depends on.

    What is not in the paper keeps the guarantee in every case: a floor of beta in sweeps; after `max_sweeps` of them the policy is
    drawn back on the line towards the old one, by bisection; a divergence that is not finite restores parameters and moments of
    the start. Epsilon, max and mean are over the valid decisions of a piece. The divergence must have a closed form.
    """

    eps_kl: Annotated[float, Range(gt=0), "largest divergence from the old policy after an update, nats"] = 0.2
    aim: Annotated[float, Range(gt=0), "C_beta: above 1, the penalty aims inside the region"] = 2.0
    beta: Annotated[float, Range(ge=0), "weight of the divergence at the start of training"] = 1.0
    beta_lr: Annotated[float, Range(ge=0), "rate of beta's own Adam"] = 0.01
    statistic: Annotated[Literal["max", "mean"], "of the divergences of a piece: what is bounded"] = "max"
    when: Annotated[Literal["epoch", "last"], "sweep after every pass over the batch, or after the last one alone"] = "epoch"
    piece: Annotated[int, Range(ge=1), "rows or decisions per step of a sweep"] = 1024
    max_sweeps: Annotated[int, Range(ge=0), "sweeps before the policy is drawn back instead"] = 100
    floor: Annotated[float, Range(gt=0), "least beta in sweeps"] = 0.01
    equation: ClassVar[str] = (
        "theta <- Adam on L + beta mean_s KL_s;  beta <- max(0, Adam on beta (eps - C max_s KL_s));  "
        "then, while max_s KL_s > eps: theta <- Adam on beta mean_s KL_s"
    )
    host: ClassVar[bool] = True
    alone: ClassVar[bool] = True  # parameters may belong to no other update

    @property
    def needs(self) -> frozenset[str]:
        """The closed-form divergence to the policy at the start of the update."""
        return frozenset({"kl@now"})

    @property
    def requires(self) -> frozenset[Can]:
        """A closed-form divergence between two policies."""
        return frozenset({Can.KL})

    def bind(self, parameters: Sequence[Tensor]) -> FixUpStepper:
        """An optimiser for these parameters, with the dual variable."""
        return FixUpStepper(self, parameters)


class FixUpStepper:
    """`FixUp` bound to parameters: the optimiser, and beta with its own."""

    def __init__(self, rule: FixUp, parameters: Sequence[Tensor]) -> None:
        self.rule = rule
        self.inner = DescendStepper(rule, parameters)
        self.parameters = self.inner.parameters
        self.beta = torch.tensor(float(rule.beta), device=self.parameters[0].device)
        self.dual = Descend(optimizer="adam", lr=rule.beta_lr, max_grad_norm=None)
        self.moments = functional.initial(self.dual, self.beta)
        self.start: tuple[list[Tensor], list[dict[str, Tensor]]] = ([], [])
        self.steps = self.sweeps = 0
        self.kept = 1.0
        self.worst: Tensor | None = None  # of the batch at the present parameters, once a sweep was clean

    # ---------------------------------------------------------------- first phase
    def step(self, problem: Problem) -> dict[str, Tensor]:
        """A step on the loss and the penalty; then one of beta, by the divergence before the step."""
        seen: list[Tensor] = []
        count = problem.batch.mask.sum().clamp(min=1)

        def penalty(batch: Batch, now: Mapping[str, Tensor]) -> dict[str, Tensor]:
            seen.append(now["kl"].detach()[batch.mask])
            return {"kl": self.beta * keep(batch.mask, now["kl"]).sum() / count}

        report = problem.backward(penalty)
        report |= self.inner.apply(problem.clock.fraction)
        self.worst = None
        self._turn(self._statistic(torch.cat(seen)))
        return {**report, "beta": self.beta}

    def _statistic(self, kl: Float[Tensor, " N"]) -> Float[Tensor, ""]:
        """What is bounded; 0 where there is no decision."""
        if kl.numel() == 0:
            return kl.new_zeros(())
        return kl.amax() if self.rule.statistic == "max" else kl.mean()

    def _turn(self, kl: Float[Tensor, ""]) -> None:
        """A step of the dual variable; a divergence that is not finite leaves it."""
        slope = (self.rule.eps_kl - self.rule.aim * kl).to(self.beta)
        rate = torch.tensor(self.rule.beta_lr, device=self.beta.device)
        beta, self.moments, _ = functional.step(self.dual, self.beta, slope, self.moments, rate)
        self.beta = beta.clamp(min=0)

    # ---------------------------------------------------------------- second phase
    def begin(self, whole: Problem) -> None:
        """Keep parameters and moments as they are before the first step."""
        copies = [{k: v.clone() for k, v in s.items()} for s in self.inner.states]
        self.start = [p.detach().clone() for p in self.parameters], copies
        self.steps, self.sweeps, self.kept, self.worst = 0, 0, 1.0, None

    def after_epoch(self, whole: Problem) -> None:
        """Sweep, where that is wanted after every epoch."""
        if self.rule.when == "epoch":
            self._fix(whole)

    def finish(self, whole: Problem) -> dict[str, Tensor]:
        """Sweep, unless nothing moved since the last clean one, and report: the guarantee holds now."""
        if self.worst is None:
            self._fix(whole)
        assert self.worst is not None
        told = {"fixup_steps": self.steps, "fixup_sweeps": self.sweeps, "fixup_kept": self.kept}
        return {f"kl_{self.rule.statistic}": self.worst, **{k: torch.tensor(float(v)) for k, v in told.items()}}

    def _fix(self, whole: Problem) -> None:
        """Sweep until a sweep is clean; draw the policy back where that takes too long, restore it where numbers are lost."""
        pieces = whole.split(self.rule.piece)
        for _ in range(self.rule.max_sweeps):
            self.sweeps += 1
            found = [self._visit(piece) for piece in pieces]
            if not all(kl.isfinite() for kl in found):
                return self._restore()
            if not any(kl > self.rule.eps_kl for kl in found):
                self.worst = torch.stack(found).amax()
                return None
        return self._draw_back(pieces)

    def _visit(self, piece: Problem) -> Float[Tensor, ""]:
        """The statistic of a piece as it was met; where it violates the bound, a step on the divergence alone."""
        with torch.no_grad():
            found = self._statistic(piece.kl_each())
        if bool(found > self.rule.eps_kl):
            self.steps += 1
            self._push(piece.kl_each().mean() * self.beta.clamp(min=self.rule.floor), piece.clock.fraction)
            self._turn(found)
        return found

    def _push(self, loss: Float[Tensor, ""], fraction: float | Tensor) -> None:
        """A step of the policy's optimiser along `loss`; what it does not depend on has no gradient and stays, moments and all."""
        views = [p.grad for p in self.parameters]
        for p, g in zip(self.parameters, torch.autograd.grad(loss, self.parameters, allow_unused=True), strict=True):
            p.grad = g
        self.inner.apply(fraction)
        for p, view in zip(self.parameters, views, strict=True):
            p.grad = view

    def _draw_back(self, pieces: Sequence[Problem]) -> None:
        """The furthest of the points tried on the line from the old parameters to these that keeps the bound."""
        slopes = torch.autograd.grad(pieces[0].kl_each().sum(), self.parameters, allow_unused=True)
        line = [
            (p, old, p.detach().clone())
            for p, old, g in zip(self.parameters, self.start[0], slopes, strict=True) if g is not None
        ]  # fmt: skip
        low, self.worst = 0.0, torch.zeros_like(self.beta)
        share = 1.0
        for i in range(1, BISECTIONS + 1):
            worst = self._at(line, share, pieces)
            if bool(worst <= self.rule.eps_kl):  # NaN is not
                low, self.worst = share, worst
            if low == 1.0:
                break
            share = low + 0.5**i
        self.kept = low
        self._at(line, low, ())

    @torch.no_grad()
    def _at(self, line: list[tuple[Tensor, Tensor, Tensor]], share: float, pieces: Sequence[Problem]) -> Float[Tensor, ""]:
        """Put the policy at `share` of the line; what is bounded there."""
        for p, old, new in line:
            p.copy_(old if share == 0 else new if share == 1 else old + share * (new - old))
        return torch.stack([self._statistic(p.kl_each()) for p in pieces]).amax() if pieces else self.beta

    @torch.no_grad()
    def _restore(self) -> None:
        """Parameters and moments as they were before the first step."""
        for p, old in zip(self.parameters, self.start[0], strict=True):
            p.copy_(old)
        for state, old_state in zip(self.inner.states, self.start[1], strict=True):
            for k, v in state.items():
                v.copy_(old_state[k])
        self.kept, self.worst = 0.0, torch.zeros_like(self.beta)

    # ---------------------------------------------------------------- saving
    def state(self) -> State:
        """The optimiser's tensors by parameter number, beta and its moments."""
        return {**self.inner.state(), "beta": self.beta, "dual": dict(self.moments)}

    def load(self, state: State) -> None:
        """Restore from `state()`; raises KeyError or RuntimeError where it does not fit."""
        self.inner.load(state)
        self.beta = state["beta"].to(self.beta)
        self.moments = {k: state["dual"][k].to(v) for k, v in self.moments.items()}
