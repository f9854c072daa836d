"""FixPO: the guarantee in runs, the dual variable, and what sweeps do where they are needed, take too long or meet NaN."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from polopt.batch import Batch, Clock
from polopt.errors import CallError
from polopt.loops.executor import Executor
from polopt.loops.improve import Improve
from polopt.method import Method
from polopt.overrides import resolve
from polopt.parts.rule.descend import Descend
from polopt.parts.rule.fixup import BISECTIONS, FixUp, FixUpStepper
from polopt.parts.surrogate.clip import Clip
from polopt.parts.surrogate.score import Ratio
from polopt.registry import get_method
from polopt.stats import NOW

F64 = torch.float64
EPS = 0.2
RATE = {"lr": 3e-3, "optim.compile": "never", "threads": 1}


# -------------------------------------------------------------------- a world of states, each with its own softmax
@dataclass
class World:
    """S states: logits of the policy [S,A] and values [S] to be moved by a loss; the old policy's log-probabilities."""

    logits: Tensor
    value: Tensor
    old: Tensor
    pull: Callable[[Tensor], Tensor]

    @classmethod
    def make(cls, states: int = 6, actions: int = 3, pull: float = 1.0) -> World:
        g = torch.Generator().manual_seed(0)
        logits = torch.randn(states, actions, generator=g, dtype=F64)
        goal = 3 * torch.randn(states, actions, generator=g, dtype=F64)
        old = logits.log_softmax(-1)
        leaves = logits.clone().requires_grad_(), torch.zeros(states, dtype=F64, requires_grad=True)
        return cls(*leaves, old, lambda x: pull * (x - goal).square().mean())

    def kl(self, rows: slice = slice(None)) -> Tensor:
        old = self.old[rows]
        return (old.exp() * (old - self.logits[rows].log_softmax(-1))).sum(-1)

    def problem(self, rows: slice = slice(None), clock: Clock | None = None) -> Piece:
        return Piece(self, rows, clock or Clock())


@dataclass
class Piece:
    """Some of the states as the rule sees them (`polopt.interfaces.Problem`)."""

    world: World
    rows: slice
    clock: Clock

    @property
    def parameters(self) -> Sequence[Tensor]:
        return [self.world.logits, self.world.value]

    @property
    def batch(self) -> Batch:
        return Batch(mask=torch.ones(len(self.world.old[self.rows]), 1, dtype=torch.bool))

    def backward(self, terms: Any = None) -> dict[str, Tensor]:
        for p in self.parameters:
            p.grad = torch.zeros_like(p)
        loss = self.world.pull(self.world.logits[self.rows]) + (self.world.value[self.rows] - 1).square().mean()
        more: Mapping[str, Tensor] = terms(self.batch, {"kl": self.kl_each()[:, None]}) if terms else {}
        (loss + sum(more.values())).backward()
        return {"loss": loss.detach(), **{k: v.detach() for k, v in more.items()}}

    def value(self) -> Tensor:
        raise NotImplementedError

    def kl(self) -> Tensor:
        return self.kl_each().mean()

    def kl_each(self) -> Tensor:
        return self.world.kl(self.rows)

    def split(self, size: int) -> list[Piece]:
        n = len(self.world.old)
        return [Piece(self.world, slice(i, min(i + size, n)), self.clock) for i in range(0, n, size)]


def bound(world: World, **settings: Any) -> FixUpStepper:
    for p in (world.logits, world.value):
        p.grad = torch.zeros_like(p)
    return FixUp(**{"lr": 0.05, "max_grad_norm": None, "eps_kl": EPS, **settings}).bind([world.logits, world.value])


def update(world: World, stepper: FixUpStepper, steps: int = 20) -> dict[str, float]:
    whole = world.problem()
    stepper.begin(whole)
    for _ in range(steps):
        stepper.step(whole)
    stepper.after_epoch(whole)
    return {k: float(v) for k, v in stepper.finish(whole).items()}


# -------------------------------------------------------------------- the guarantee
@pytest.mark.identity(
    "fixpo", "after every update the largest divergence on its batch is at most eps_KL, over seeds and in the real loop"
)
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("task", "budget"), [("gym:CartPole-v1", "5k-decisions"), ("gym:Pendulum-v1", "3k-decisions")])
def test_no_state_leaves_the_trust_region(task: str, budget: str, seed: int) -> None:
    """At ten times PPO's rate; the divergence is measured apart from the rule, on the batch as it was collected."""
    found = divergences("fixpo", task, {**RATE, "budget": budget, "seed": seed, "collect.envs": 8, "collect.steps": 96})
    assert len(found) >= 3
    assert max(found) <= EPS + 1e-6
    assert min(found) > 0


@pytest.mark.identity("fixpo", "the penalty alone, without sweeps, leaves some states outside the bound")
def test_the_first_phase_alone_guarantees_nothing() -> None:
    world = World.make()
    stepper = bound(world)
    for _ in range(20):
        stepper.step(world.problem())
    assert world.kl().max().item() > EPS
    free = World.make()
    loose = bound(free, beta=0.0, beta_lr=0.0)
    for _ in range(20):
        loose.step(free.problem())
    assert world.kl().max().item() < free.kl().max().item()  # yet it helps


def divergences(method: str | Method, task: str, settings: dict[str, Any]) -> list[float]:
    """max_s KL(old || new) of each update of a run."""
    resolved = resolve(method, task, settings)
    run = Improve(resolved.method, resolved.task, resolved.settings)
    (executor,) = run.executors.values()
    found, inner = [], executor.run

    @torch.no_grad()
    def evaluate(batch: Batch, name: str) -> Tensor:
        return run.policy.evaluate(batch, frozenset({name}), NOW)[name]

    def spying(batch: Batch, *rest: Any, **more: Any) -> Any:
        old = evaluate(batch, "dist")
        out = inner(batch, *rest, **more)
        found.append(float(evaluate(batch.adding({"dist@old": old}), "kl")[batch.mask].max()))
        assert math.isclose(float(out.get("kl_max", found[-1])), found[-1], rel_tol=1e-3, abs_tol=1e-6)
        return out

    executor.run = spying  # type: ignore[method-assign]
    while run.fraction() < 1:
        run.step()
    run.collector.close()
    return found


@pytest.mark.identity("fixpo", "at the usual rate sweeps add fewer than 5 % of steps")
def test_sweeps_are_few() -> None:
    resolved = resolve("fixpo", "gym:CartPole-v1", {"budget": "10k-decisions", "optim.compile": "never", "threads": 1})
    run = Improve(resolved.method, resolved.task, resolved.settings)
    added = 0.0
    while run.fraction() < 1:
        metrics = run.step()
        added += metrics["fixup_steps"]
        assert metrics["fixup_kept"] == 1.0
        assert metrics["fixup_sweeps"] >= 10  # one that finds nothing, after every epoch
    run.collector.close()
    steps = run.updates * run.executors["policy"].steps_per_batch(1024)
    assert added < 0.05 * steps


# -------------------------------------------------------------------- the dual variable
@pytest.mark.identity("fixpo", "the slope of L_beta is eps_KL - C_beta max_s KL_s")
@pytest.mark.parametrize(("aim", "statistic"), [(2.0, "max"), (1.0, "max"), (2.0, "mean")])
def test_the_slope_of_the_dual_variable(aim: float, statistic: str) -> None:
    world = World.make()
    with torch.no_grad():
        world.logits += 0.7 * torch.randn(world.logits.shape, generator=torch.Generator().manual_seed(1), dtype=F64)
    kl = world.kl().detach()
    worst = float(kl.max() if statistic == "max" else kl.mean())
    stepper = bound(world, aim=aim, statistic=statistic)
    stepper.step(world.problem())
    slope = EPS - aim * worst
    assert float(stepper.moments["exp_avg"]) == pytest.approx(0.1 * slope, rel=1e-6)  # Adam's first moment after one step
    assert float(stepper.beta) == pytest.approx(1 - math.copysign(0.01, slope), abs=1e-6)  # and its first step
    beta = torch.tensor(0.7, dtype=F64, requires_grad=True)
    (wanted,) = torch.autograd.grad(beta * (EPS - aim * worst), beta)
    assert float(wanted) == pytest.approx(slope, rel=1e-12)


@pytest.mark.identity("fixpo", "beta falls to 0 where no state comes near the bound, and never below")
def test_beta_falls_to_zero_and_no_further() -> None:
    world = World.make(pull=0.0)
    stepper = bound(world, eps_kl=1e9, aim=1.0)
    seen = []
    for _ in range(150):
        stepper.step(world.problem())
        seen.append(float(stepper.beta))
    assert seen[-1] == 0.0
    assert min(seen) == 0.0
    assert seen == sorted(seen, reverse=True)


@pytest.mark.identity("fixpo", "beta grows while C_beta max KL exceeds eps_KL")
def test_beta_grows_where_states_are_outside() -> None:
    world = World.make()
    with torch.no_grad():
        world.logits += 5 * torch.randn(world.logits.shape, generator=torch.Generator().manual_seed(1), dtype=F64)
    stepper = bound(world, lr=0.0)
    for _ in range(20):
        stepper.step(world.problem())
    assert float(stepper.beta) == pytest.approx(1.2, abs=1e-3)


@pytest.mark.identity("fixpo", "for eps_KL to infinity, beta once 0, the update is plain unclipped policy gradient")
def test_without_bound_it_is_plain_descent() -> None:
    loose = FixUp(lr=3e-3, eps=1e-5, eps_kl=1e9, beta=0.0, aim=1.0)
    a = weights(get_method("fixpo").but("a", rule=loose), epochs=3)
    b = weights(get_method("ppo").but("b", surrogate=Ratio(), rule=Descend(lr=3e-3, eps=1e-5)), epochs=3)
    torch.testing.assert_close(a, b, rtol=1e-4, atol=2e-6)
    assert not torch.allclose(a, weights(get_method("ppo").but("b", surrogate=Clip(0.01, 0.01)), epochs=3), atol=1e-4)


@pytest.mark.identity(
    "fixpo", "at the old policy the divergence has no gradient: the first step is the policy gradient's, for any beta"
)
@pytest.mark.parametrize("beta", [0.0, 1.0, 50.0])
def test_the_first_step_is_the_policy_gradient(beta: float) -> None:
    a = weights(get_method("fixpo").but("a", rule=FixUp(lr=3e-3, eps=1e-5, beta=beta, eps_kl=1e9)), epochs=1, minibatch=256)
    b = weights(get_method("ppo").but("b", rule=Descend(lr=3e-3, eps=1e-5)), epochs=1, minibatch=256)
    torch.testing.assert_close(a, b, rtol=1e-4, atol=5e-6)


def weights(method: Method, **settings: Any) -> Tensor:
    """Parameters after one iteration on CartPole."""
    given = {"collect.envs": 4, "collect.steps": 64, "policy.hidden": (8,), **RATE, "budget": "1-updates", **settings}
    resolved = resolve(method, "gym:CartPole-v1", given)
    run = Improve(resolved.method, resolved.task, resolved.settings)
    run.step()
    run.collector.close()
    return run.flat.data.clone()


# -------------------------------------------------------------------- sweeps
@pytest.mark.identity("fixpo", "sweeps end only when one meets no violation, in pieces of any size")
@pytest.mark.parametrize("piece", [1, 4, 100])
@pytest.mark.parametrize("when", ["epoch", "last"])
def test_sweeps_bring_every_state_back(piece: int, when: str) -> None:
    world = World.make()
    told = update(world, bound(world, piece=piece, beta=0.0, when=when))
    assert world.kl().max().item() <= EPS
    assert told["kl_max"] == pytest.approx(world.kl().max().item(), rel=1e-9)
    assert told["fixup_steps"] > 0
    assert told["fixup_kept"] == 1.0
    assert told["fixup_sweeps"] >= 2


def test_a_sweep_that_meets_no_violation_moves_nothing() -> None:
    world = World.make(pull=0.0)
    stepper = bound(world)
    before = world.logits.detach().clone()
    told = update(world, stepper, steps=0)
    assert torch.equal(world.logits, before)
    assert told == {"kl_max": pytest.approx(0.0, abs=1e-12), "fixup_steps": 0.0, "fixup_sweeps": 1.0, "fixup_kept": 1.0}


@pytest.mark.identity("fixpo", "sweeps step on the divergence alone: the value keeps parameters and moments")
def test_sweeps_leave_the_value_alone() -> None:
    world = World.make()
    stepper = bound(world, beta=0.0, when="last")
    whole = world.problem()
    stepper.begin(whole)
    for _ in range(20):
        stepper.step(whole)
    value, moments = world.value.detach().clone(), {k: v.clone() for k, v in stepper.inner.states[1].items()}
    grad = world.value.grad
    stepper.finish(whole)
    assert stepper.steps > 0
    assert torch.equal(world.value, value)
    assert all(torch.equal(v, stepper.inner.states[1][k]) for k, v in moments.items())
    assert world.value.grad is grad  # the buffers that gradients are collected in are put back


@pytest.mark.identity("fixpo", "with statistic mean it is the mean divergence that is bounded")
def test_the_mean_variant() -> None:
    world = World.make()
    told = update(world, bound(world, statistic="mean", beta=0.0))
    assert float(world.kl().mean()) <= EPS
    assert world.kl().max().item() > EPS
    assert told["kl_mean"] == pytest.approx(float(world.kl().mean()), rel=1e-9)


# -------------------------------------------------------------------- safety nets
@pytest.mark.parametrize("sweeps", [0, 2])
def test_too_many_sweeps_draw_the_policy_back(sweeps: int) -> None:
    """On the line from the old policy, as far as the bound allows; the value stays where it is."""
    world = World.make()
    old = world.logits.detach().clone()
    stepper = bound(world, beta=0.0, floor=1e-12, beta_lr=0.0, max_sweeps=sweeps, when="last", eps=1.0)
    whole = world.problem()
    stepper.begin(whole)
    for _ in range(100):
        stepper.step(whole)
    value = world.value.detach().clone()
    told = {k: float(v) for k, v in stepper.finish(whole).items()}
    assert 0 < told["fixup_kept"] < 1
    assert world.kl().max().item() <= EPS
    assert world.kl().max().item() > EPS * (1 - 2.0 ** (8 - BISECTIONS))  # no more than it must
    assert told["kl_max"] == pytest.approx(world.kl().max().item(), rel=1e-9)
    assert told["fixup_sweeps"] == sweeps
    assert torch.equal(world.value, value)
    assert not torch.equal(world.logits, old)


def test_what_is_inside_when_sweeps_run_out_stays() -> None:
    world = World.make(pull=0.0)
    stepper = bound(world, max_sweeps=0)
    with torch.no_grad():
        world.logits += 0.01
    before = world.logits.detach().clone()
    told = stepper.begin(world.problem()) or stepper.finish(world.problem())
    assert float(told["fixup_kept"]) == 1.0
    assert torch.equal(world.logits, before)


@pytest.mark.identity("fixpo", "a divergence that is not finite restores the old policy, with the optimiser's moments")
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_lost_numbers_restore_the_start(bad: float) -> None:
    world = World.make()
    stepper = bound(world)
    update(world, stepper, steps=5)
    world.old = world.logits.detach().log_softmax(-1)
    start = [p.detach().clone() for p in (world.logits, world.value)]
    moments = stepper.inner.states[0]["exp_avg"].clone()
    whole = world.problem()
    stepper.begin(whole)
    stepper.step(whole)
    beta = float(stepper.beta)
    with torch.no_grad():
        world.logits[2, 1] = bad
    told = stepper.finish(whole)
    assert float(told["fixup_kept"]) == 0.0
    assert float(told["kl_max"]) == 0.0
    assert all(torch.equal(p, q) for p, q in zip((world.logits, world.value), start, strict=True))
    assert torch.equal(stepper.inner.states[0]["exp_avg"], moments)
    assert float(stepper.beta) == beta


def test_a_minibatch_without_decisions_is_no_violation() -> None:
    assert float(bound(World.make())._statistic(torch.zeros(0))) == 0.0


# -------------------------------------------------------------------- state and refusals
def test_the_dual_variable_is_part_of_the_checkpoint() -> None:
    one, two = World.make(), World.make()
    a, b = bound(one), bound(two)
    update(one, a, steps=7)
    b.load(a.state())
    with torch.no_grad():
        two.logits.copy_(one.logits)
        two.value.copy_(one.value)
    for world, stepper in ((one, a), (two, b)):
        update(world, stepper, steps=7)
    assert float(a.beta) != 1.0
    assert torch.equal(a.beta, b.beta)
    assert torch.equal(one.logits, two.logits)


def test_shared_layers_in_another_update_are_refused() -> None:
    fixpo = get_method("fixpo")
    apart = fixpo.but(
        "apart",
        updates=(
            replace(fixpo.update(), trains=("policy",), terms=("surrogate",)),
            replace(fixpo.update(), name="critic", trains=("value",), terms=("critic",), rule=Descend()),
        ),
    )
    resolved = resolve(apart, "gym:CartPole-v1", {"policy.shared": True, **RATE})
    with pytest.raises(CallError, match=r"fix-up.*same layers"):
        Improve(resolved.method, resolved.task, resolved.settings)


@pytest.mark.parametrize(("field", "bad"), [("eps_kl", 0.0), ("aim", -1.0), ("floor", 0.0), ("piece", 0), ("max_sweeps", -1)])
def test_settings_out_of_range_are_refused(field: str, bad: float) -> None:
    with pytest.raises(CallError, match=field):
        FixUp(**{field: bad})


def test_it_is_never_compiled() -> None:
    resolved = resolve("fixpo", "gym:CartPole-v1", {**RATE, "optim.compile": "always", "budget": "1-updates"})
    run = Improve(resolved.method, resolved.task, resolved.settings)
    run.collector.close()
    assert run.compile.start is None
    assert isinstance(run.executors["policy"], Executor)
