"""FixPO's rule step by step, where divergences are parameters: penalty, sweeps, the line back to the old policy, restoring."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from polopt.batch import Batch, Clock
from polopt.part import Can
from polopt.parts.rule.fixup import FixUp, FixUpStepper

torch.set_num_threads(1)
F64 = torch.float64


@dataclass
class Line:
    """Decisions whose divergence is a parameter x each, and a parameter y that it does not depend on; the loss is y."""

    x: Tensor
    y: Tensor
    mask: Tensor
    rows: slice = field(default_factory=lambda: slice(None))
    clock: Clock = field(default_factory=Clock)
    asked: list[slice] = field(default_factory=list)

    @classmethod
    def of(cls, *x: float, mask: Any = None) -> Line:
        known = torch.ones(len(x), 1) if mask is None else torch.tensor(mask)
        return cls(torch.tensor(x, dtype=F64, requires_grad=True), torch.zeros(1, dtype=F64, requires_grad=True), known.bool())

    @property
    def parameters(self) -> Sequence[Tensor]:
        return [self.x, self.y]

    @property
    def batch(self) -> Batch:
        return Batch(mask=self.mask)

    def backward(self, terms: Any) -> dict[str, Tensor]:
        """Each row is a micro-batch."""
        for p in self.parameters:
            p.grad = torch.zeros_like(p)
        kl = self.x.reshape(self.mask.shape)
        more = [terms(self.batch.rows(slice(i, i + 1)), {"kl": kl[i : i + 1]})["kl"] for i in range(len(kl))]
        (self.y.sum() + sum(more)).backward()
        return {"loss": self.y.detach().sum(), "kl": sum(m.detach() for m in more)}  # type: ignore[dict-item]

    def value(self) -> Tensor:
        raise AssertionError("not asked for")

    kl = value

    def kl_each(self) -> Tensor:
        self.asked.append(self.rows)
        return self.x[self.rows]

    def split(self, size: int) -> list[Line]:
        return [replace(self, rows=slice(i, i + size)) for i in range(0, len(self.x), size)]


def bound(line: Line, **settings: Any) -> FixUpStepper:
    plain = {"optimizer": "sgd", "lr": 1.0, "max_grad_norm": None, "eps_kl": 0.25, "beta_lr": 0.0}
    return FixUp(**{**plain, **settings}).bind(line.parameters)


def swept(stepper: FixUpStepper, line: Line, *moved: float) -> dict[str, float]:
    """Begin where the line is, move to `moved`, and finish."""
    stepper.begin(line)
    with torch.no_grad():
        line.x.copy_(torch.tensor(moved, dtype=F64))
    return {k: float(v) for k, v in stepper.finish(line).items()}


# -------------------------------------------------------------------- declarations
def test_defaults() -> None:
    """Those of the paper, where it names them: eps_KL = 0.2, C_beta = 2, and beta from 1."""
    rule = FixUp()
    assert (rule.eps_kl, rule.aim, rule.beta, rule.beta_lr) == (0.2, 2.0, 1.0, 0.01)
    assert (rule.statistic, rule.when, rule.piece, rule.max_sweeps, rule.floor) == ("max", "epoch", 1024, 100, 0.01)
    assert rule.needs == {"kl@now"}
    assert rule.requires == {Can.KL}
    assert rule.host
    assert rule.alone


def test_a_new_stepper_has_done_nothing() -> None:
    """Also bound to a single parameter."""
    stepper = FixUp().bind([torch.zeros(2, requires_grad=True)])
    assert (stepper.steps, stepper.sweeps, stepper.kept, stepper.worst) == (0, 0, 1.0, None)
    assert float(stepper.beta) == 1.0


# -------------------------------------------------------------------- first phase
def test_the_penalty_is_the_mean_over_valid_decisions_of_all_micro_batches() -> None:
    """Three of six count: each moves by beta/3; beta goes by the largest of them, eps - 2 max = 0.25 - 1.5."""
    line = Line.of(0.5, 0.25, 9.0, 0.75, 9.0, 9.0, mask=[[1, 1, 0], [1, 0, 0]])
    stepper = bound(line, beta=0.5, beta_lr=0.01)
    report = stepper.step(line)
    third = 0.5 / 3
    assert line.x.tolist() == pytest.approx([0.5 - third, 0.25 - third, 9.0, 0.75 - third, 9.0, 9.0])
    assert line.y.item() == -1.0
    assert float(report["kl"]) == pytest.approx(0.5 * 1.5 / 3)
    assert (float(report["loss"]), float(report["lr"]), float(report["skipped"])) == (0.0, 1.0, 0.0)
    assert float(report["grad_norm"]) == pytest.approx(math.sqrt(1 + 3 * third**2))
    assert float(stepper.moments["exp_avg"]) == pytest.approx(-0.125)
    assert float(report["beta"]) == pytest.approx(0.51)
    assert not any(t.requires_grad for t in (stepper.beta, *report.values(), *stepper.moments.values()))


@pytest.mark.parametrize(("valid", "moved"), [(1, 0.5), (0, 0.0)])
def test_one_decision_and_none(valid: int, moved: float) -> None:
    """A minibatch without decisions has no penalty, is no violation, and does not lose the step."""
    line = Line.of(0.5, 9.0, mask=[[valid, 0]])
    stepper = bound(line, beta=0.5)
    report = stepper.step(line)
    assert line.x.tolist() == [0.5 - moved, 9.0]
    assert (line.y.item(), float(report["skipped"])) == (-1.0, 0.0)
    assert float(report["kl"]) == 0.5 * 0.5 * valid
    assert float(stepper.moments["exp_avg"]) == pytest.approx(0.1 * (0.25 - 2 * 0.5 * valid))


def test_beta_is_never_below_zero() -> None:
    line = Line.of(0.0)
    stepper = bound(line, beta=0.005, beta_lr=0.01)
    assert float(stepper.step(line)["beta"]) == 0.0


def test_the_rate_follows_the_budget() -> None:
    line = replace(Line.of(0.5), clock=Clock(1, 0.75))
    stepper = bound(line, beta=1.0, schedule="linear")
    assert float(stepper.step(line)["lr"]) == 0.25
    assert line.x.item() == 0.25
    swept(stepper, line, 0.5)
    assert line.x.item() == 0.25  # so do sweeps


# -------------------------------------------------------------------- sweeps
@pytest.mark.parametrize(("beta", "floor", "lr"), [(1.0, 0.01, 0.5), (0.5, 0.01, 1.0), (0.0, 0.5, 1.0), (0.25, 4.0, 0.125)])
def test_sweeps_by_hand(beta: float, floor: float, lr: float) -> None:
    """Pieces (1, 1/4) and (3/4): a step lowers the first by 1/4 each, the second by 1/2; exactly at the bound is inside."""
    line = Line.of(0.0, 0.0, 0.0)
    stepper = bound(line, beta=beta, floor=floor, lr=lr, piece=2)
    told = swept(stepper, line, 1.0, 0.25, 0.75)
    assert line.x.tolist() == [0.25, -0.5, 0.25]
    assert line.y.item() == 0.0
    assert told == {"kl_max": 0.25, "fixup_steps": 4.0, "fixup_sweeps": 4.0, "fixup_kept": 1.0}
    wanted = 0.0
    for met in (1.0, 0.75, 0.75, 0.5):  # each of them is a step of beta, too
        wanted = 0.9 * wanted + 0.1 * (0.25 - 2 * met)
    assert float(stepper.moments["exp_avg"]) == pytest.approx(wanted)


def test_the_mean_of_a_piece_may_be_bounded() -> None:
    """1 and 0 have the mean 1/2: one step of 1/4 each brings it to the bound; the report names it."""
    line = Line.of(0.0, 0.0)
    told = swept(bound(line, statistic="mean", lr=0.5), line, 1.0, 0.0)
    assert line.x.tolist() == [0.75, -0.25]
    assert told == {"kl_mean": 0.25, "fixup_steps": 1.0, "fixup_sweeps": 2.0, "fixup_kept": 1.0}


def test_the_worst_piece_of_a_clean_sweep_is_told() -> None:
    line = Line.of(0.0, 0.0, 0.0)
    assert swept(bound(line, piece=1), line, 0.125, 0.25, 0.0)["kl_max"] == 0.25


@pytest.mark.parametrize(("when", "sweeps"), [("epoch", [1, 2, 2]), ("last", [0, 0, 1])])
def test_when_it_sweeps(when: str, sweeps: list[int]) -> None:
    """After two epochs and at the end; not again where nothing moved since a clean sweep."""
    line, seen = Line.of(0.0), []
    stepper = bound(line, when=when)
    stepper.begin(line)
    for end in (stepper.after_epoch, stepper.after_epoch, stepper.finish):
        end(line)
        seen.append(stepper.sweeps)
    assert seen == sweeps
    stepper.step(line)
    stepper.finish(line)
    assert stepper.sweeps == sweeps[-1] + 1  # after a step, it must look again
    stepper.begin(line)
    assert (stepper.steps, stepper.sweeps, stepper.kept, stepper.worst) == (0, 0, 1.0, None)


# -------------------------------------------------------------------- the line back
@pytest.mark.parametrize(("sweeps", "made"), [(3, 3), (4, 4), (9, 4)])
def test_sweeps_end_when_they_are_used_up(sweeps: int, made: int) -> None:
    """The fourth sweep would be clean: after three the policy is inside as well, and stays."""
    line = Line.of(0.0)
    told = swept(bound(line, lr=0.25, max_sweeps=sweeps), line, 1.0)
    assert line.x.tolist() == [0.25]
    assert told == {"kl_max": 0.25, "fixup_steps": 3.0, "fixup_sweeps": made, "fixup_kept": 1.0}


def test_the_policy_is_drawn_back_to_the_bound() -> None:
    """From 0 to (1, 1/2): a quarter of the way is exactly at the bound; the value stays."""
    for piece in (1, 2):
        line = Line.of(0.0, 0.0)
        told = swept(bound(line, max_sweeps=0, piece=piece), line, 1.0, 0.5)
        assert line.x.tolist() == [0.25, 0.125]
        assert line.y.item() == 0.0
        assert told == {"kl_max": 0.25, "fixup_steps": 0.0, "fixup_sweeps": 0.0, "fixup_kept": 0.25}


def test_the_line_begins_at_the_old_policy() -> None:
    """From 1/8 to 1 1/8: an eighth of the way is at the bound."""
    line = Line.of(0.125)
    assert swept(bound(line, max_sweeps=0), line, 1.125)["fixup_kept"] == 0.125
    assert line.x.tolist() == [0.25]


def test_twenty_points_of_the_line_are_tried() -> None:
    """The end, and then 19 halvings: a third is found to within 2^-19."""
    line = Line.of(0.0)
    stepper = bound(line, max_sweeps=0, eps_kl=1 / 3)
    told = swept(stepper, line, 1.0)
    assert told["fixup_kept"] == line.x.item() == told["kl_max"] == 2**19 // 3 / 2**19
    assert len(line.asked) == 1 + 20  # once for what the divergence depends on


def test_what_is_inside_stays_as_it_is() -> None:
    """To the last bit: 1 + (1e-17 - 1) would be 0. No other point is tried."""
    line = Line.of(1.0)
    assert swept(bound(line, max_sweeps=0), line, 1e-17)["fixup_kept"] == 1.0
    assert line.x.item() == 1e-17
    assert len(line.asked) == 1 + 1


@pytest.mark.parametrize("far", [1e9, math.inf, math.nan])
def test_where_no_point_is_inside_the_old_policy_is_back(far: float) -> None:
    line = Line.of(0.125)
    told = swept(bound(line, max_sweeps=0), line, far)
    assert line.x.item() == 0.125
    assert told == {"kl_max": 0.0, "fixup_steps": 0.0, "fixup_sweeps": 0.0, "fixup_kept": 0.0}


# -------------------------------------------------------------------- restoring
@pytest.mark.parametrize("piece", [1, 2])
def test_one_lost_number_restores_everything(piece: int) -> None:
    """Parameters and moments of the start, also where other pieces are fine; what is kept of the start has no graph."""
    line = Line.of(0.125, 0.0)
    stepper = bound(line, optimizer="adam", piece=piece, lr=0.01)
    stepper.step(line)
    stepper.begin(line)
    assert not any(t.requires_grad for t in stepper.start[0])
    x, y = line.x.tolist(), line.y.item()
    moments = [{k: v.clone() for k, v in s.items()} for s in stepper.inner.states]
    stepper.step(line)
    with torch.no_grad():
        line.x[1] = math.nan
    told = {k: float(v) for k, v in stepper.finish(line).items()}
    assert told == {"kl_max": 0.0, "fixup_steps": 0.0, "fixup_sweeps": 1.0, "fixup_kept": 0.0}
    assert (line.x.tolist(), line.y.item()) == (x, y)
    for mine, old in zip(stepper.inner.states, moments, strict=True):
        assert all(torch.equal(mine[k], v) for k, v in old.items())


def test_loaded_state_is_that_which_was_saved() -> None:
    one, two = Line.of(0.5, 0.25), Line.of(0.5, 0.25)
    a, b = (bound(line, optimizer="adam", beta_lr=0.01) for line in (one, two))
    a.step(one)
    b.load(a.state())
    saved = {k: v.clone() for k, v in b.inner.states[0].items()}
    assert (float(b.beta), float(b.moments["step"])) == (float(a.beta), 1.0)
    assert torch.equal(b.moments["exp_avg"], a.moments["exp_avg"])
    assert torch.equal(saved["exp_avg"], a.inner.states[0]["exp_avg"])
    beta = float(b.beta)
    a.step(one)  # what goes on elsewhere does not reach it
    assert float(b.beta) == beta != float(a.beta)
    assert float(b.moments["step"]) == 1.0
    assert all(torch.equal(b.inner.states[0][k], v) for k, v in saved.items())
