"""Kill and resume, and invariance to micro-batches and padding: both pass for every method, and catch what breaks them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from polopt.batch import Batch, Totals
from polopt.collect.table import TableCollector
from polopt.evidence.proof import invariance, small, survival
from polopt.parts.aggregate import SeqMeanTokenSumNorm, TokenMean
from polopt.parts.sampler.fresh import Fresh
from polopt.parts.surrogate.clip import Clip
from polopt.registry import all_methods, get_method

torch.set_num_threads(1)


# -------------------------------------------------------------------- kill and resume
@pytest.mark.parametrize("name", ["ppo", "trpo", "dapo", "rloo"])
def test_a_killed_run_ends_as_the_undisturbed_one(name: str) -> None:
    method = get_method(name)
    assert survival.check(method, *small.world(method)) == survival.Survival(True)


def test_a_best_score_before_the_first_regular_checkpoint_puts_it_off(monkeypatch: pytest.MonkeyPatch) -> None:
    """The best policy of update 3 is saved and the next checkpoint is due at 7, where the run is killed: it goes on from 3."""
    known = TableCollector.evaluate

    def evaluate(self: TableCollector, episodes: int) -> dict[str, float]:
        seen = self.items.epoch * self.items.size + self.items.place
        return {**known(self, episodes), "score": 0.5 if seen == 3 * small.ANSWERS else 1 / (10 + seen)}

    monkeypatch.setattr(TableCollector, "evaluate", evaluate)
    method = get_method("reinforce")
    assert survival.check(method, *small.world(method)) == survival.Survival(True)


COUNT = {"calls": 0}


@dataclass(frozen=True)
class Forgetful(Clip):
    """Counts its calls outside its memory, which no checkpoint keeps."""

    def __call__(self, batch: Batch, now: Mapping[str, Tensor], advantage: Tensor) -> Tensor:
        """The clip, scaled by a hidden count."""
        COUNT["calls"] += 1
        return super().__call__(batch, now, advantage) * (1 + 0.01 * COUNT["calls"])


def test_state_outside_the_checkpoint_is_found() -> None:
    method = get_method("grpo").but("forgetful", surrogate=Forgetful())
    found = survival.check(method, *small.world(method))
    assert not found.ok
    assert "after update" in found.message


@dataclass(frozen=True)
class Dying(Fresh):
    """A sampler that fails after a few iterations."""

    def __call__(self, plan: Any) -> Any:
        """As `Fresh`, until it fails."""
        if int(plan.clock.update) == 5:
            raise RuntimeError("no more prompts")
        return super().__call__(plan)


def test_a_run_that_fails_by_itself_is_told(capfd: pytest.CaptureFixture[str]) -> None:
    from polopt.evidence.proof.checks import guarded, kill_and_resume

    found = guarded("resume", lambda: kill_and_resume(get_method("reinforce").but("dying", sampler=Dying())))
    assert found.result == "failed"
    assert "no more prompts" in found.reason


def test_differences_between_trees() -> None:
    tree = {"a": {"x": torch.tensor([1.0, float("nan")])}, "b": 2.0}
    same = {"a": {"x": torch.tensor([1.0, float("nan")])}, "b": 2.0}
    assert survival.difference(tree, same, "t") == ""
    assert survival.difference(tree, {**same, "a": {"x": torch.tensor([1.0, 2.0])}}, "t") == "t.a.x"
    assert survival.difference(tree, {"a": same["a"]}, "t") == "t"
    assert survival.difference(tree, {**same, "a": {"x": torch.tensor([1.0, float("nan")]).double()}}, "t") == "t.a.x"


# -------------------------------------------------------------------- invariance
@pytest.mark.parametrize("name", sorted(all_methods()))
def test_losses_do_not_know_how_they_were_cut_or_padded(name: str) -> None:
    found = invariance.check(get_method(name), count=6)
    assert found.ok, found
    assert found.error < 1e-13


@dataclass(frozen=True)
class OwnMean(TokenMean):
    """The classic fault: the mean of each micro-batch."""

    def __call__(self, loss: Tensor, valid: Tensor, totals: Totals) -> Tensor:
        """Divides by what it sees."""
        return loss.sum() / valid.sum().clamp(min=1)


@dataclass(frozen=True)
class ByWidth(SeqMeanTokenSumNorm):
    """Divides by the padded width instead of the generation limit."""

    def __call__(self, loss: Tensor, batch: Batch, totals: Totals) -> Tensor:
        """Depends on padding."""
        return loss.sum() / totals.rows.clamp(min=1) / batch.shape[1]


@dataclass(frozen=True)
class CountsEmpty(TokenMean):
    """Counts rows without a decision."""

    def __call__(self, loss: Tensor, batch: Batch, totals: Totals) -> Tensor:
        """Depends on how many rows there are."""
        return loss.sum() / totals.decisions.clamp(min=1) * (1 + 0.1 * (~batch.mask.any(1)).sum())


@pytest.mark.parametrize(
    ("aggregate", "where"), [(OwnMean(), "cut at"), (ByWidth(), "padded by columns"), (CountsEmpty(), "padded by rows")]
)
def test_faults_of_scaling_are_caught(aggregate: Any, where: str) -> None:
    method = get_method("grpo").but("faulty", aggregate=aggregate, penalty=())
    found = invariance.check(method, count=4)
    assert not found.ok
    assert where in found.where


def test_losses_that_are_not_finite_are_caught() -> None:
    @dataclass(frozen=True)
    class Broken(TokenMean):
        def __call__(self, loss: Tensor, totals: Totals) -> Tensor:
            return loss.sum() / (totals.decisions * 0)

    assert invariance.check(get_method("grpo").but("broken", aggregate=Broken(), penalty=()), count=2).error == float("inf")
