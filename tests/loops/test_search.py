"""The loop `search`: evolution strategies on functions whose optimum is known, resuming, and trials that train a policy."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from polopt.errors import CallError, PoloptError
from polopt.loops.improve import Improve
from polopt.loops.search import OpenES, Search, Trial
from polopt.overrides import resolve
from polopt.parts.surrogate.learnt_drift import LearntDrift, untrained
from polopt.parts.surrogate.score import Ratio
from polopt.registry import get_method

GOAL = torch.tensor([1.0, -2.0, 0.5])
SMALL: dict[str, Any] = {
    "budget": "128-decisions", "collect.envs": 2, "collect.steps": 32, "minibatch": 32, "epochs": 4, "policy.hidden": (8,),
    "lr": 1e-2, "evaluate.episodes": 2,
}  # fmt: skip


def hill(x: Tensor, seed: int = 0) -> float:
    return -float((x - GOAL).square().sum())


# -------------------------------------------------------------------- evolution strategies
def test_candidates_come_in_pairs_around_the_mean() -> None:
    search = OpenES(population=6, sigma=0.5).start(GOAL, 0)
    x = search.ask()
    assert x.shape == (6, 3)
    torch.testing.assert_close(x[:3] + x[3:], 2 * GOAL.expand(3, 3))
    spread = (torch.stack([search.ask() for _ in range(300)]) - GOAL).std()
    assert float(spread) == pytest.approx(0.5, rel=0.05)


def test_the_ascent_direction_is_the_formula() -> None:
    """sum_i z_i e_i / (N sigma), then Adam, whose first step has the size of its rate in every entry."""
    search = OpenES(population=8, sigma=0.5, lr=0.1).start(torch.zeros(3), 0)
    x = search.ask()
    fitness = torch.tensor([hill(c) for c in x])
    z = (fitness - fitness.mean()) / fitness.std(correction=0)
    gradient = (z[:, None] * x / 0.5).mean(0) / 0.5
    told = search.tell(fitness)
    assert told["gradient_norm"] == pytest.approx(float(gradient.norm()), rel=1e-5)
    torch.testing.assert_close(search.mean, 0.1 * gradient.sign(), rtol=1e-4, atol=1e-6)


def test_the_direction_is_the_gradient_in_the_mean() -> None:
    slope = torch.tensor([3.0, -1.0, 0.2])
    search = OpenES(population=4000, sigma=0.1, lr=0.0 + 1e-9).start(torch.zeros(3), 1)
    x = search.ask()
    search.tell(x @ slope)
    found = -search.moments["exp_avg"]  # a tenth of the direction, uphill
    assert float(torch.cosine_similarity(found, slope, dim=0)) > 0.99


def test_it_climbs_to_the_top() -> None:
    search = Search(OpenES(population=16, sigma=0.1, lr=0.1).start(torch.zeros(3), 0), hill)
    found = search.run(150)
    assert float((found - GOAL).abs().max()) < 0.1
    assert search.history[-1]["mean"] > search.history[0]["mean"]


def test_equal_fitness_teaches_nothing() -> None:
    search = OpenES().start(GOAL, 0)
    search.ask()
    search.tell(torch.ones(16))
    assert torch.equal(search.mean, GOAL)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_fitness_that_is_no_number_is_refused(bad: float) -> None:
    search = OpenES(population=2).start(GOAL, 0)
    search.ask()
    with pytest.raises(PoloptError, match="candidate 1 is not finite"):
        search.tell(torch.tensor([0.0, bad]))
    with pytest.raises(CallError, match=r"fitness has shape \(3,\), 2 candidates were asked for"):
        search.tell(torch.zeros(3))


@pytest.mark.parametrize(("field", "value"), [("population", 3), ("population", 0), ("sigma", 0.0), ("lr", -1.0)])
def test_settings_out_of_range_are_refused(field: str, value: float) -> None:
    with pytest.raises(CallError, match=field):
        OpenES(**{field: value})  # type: ignore[arg-type]


# -------------------------------------------------------------------- the loop
def test_a_generation_shares_its_luck() -> None:
    seen: list[list[int]] = []

    def noted(x: Tensor, seed: int) -> float:
        seen[-1].append(seed)
        return hill(x)

    search = Search(OpenES(population=4).start(GOAL, 0), noted, seed=5)
    for _ in range(3):
        seen.append([])
        search.step()
    assert all(len(set(s)) == 1 and len(s) == 4 for s in seen)
    assert len({s[0] for s in seen}) == 3


def test_a_search_resumes_bit_for_bit() -> None:
    def made() -> Search:
        return Search(OpenES(population=4).start(torch.zeros(3), 0), hill)

    whole, first, second = made(), made(), made()
    whole.run(6)
    first.run(2)
    state = first.state()
    first.run(4)  # what was saved does not change with it
    second.load(state)
    assert second.generation == 2
    assert torch.equal(second.run(6), whole.strategy.mean)
    assert second.history == whole.history


def test_observers_are_told_of_every_generation() -> None:
    rows: list[dict[str, float]] = []
    Search(OpenES(population=2).start(GOAL, 0), hill).run(3, [rows.append])
    assert [r["generation"] for r in rows] == [1, 2, 3]
    assert all(r["worst"] <= r["mean"] <= r["best"] for r in rows)


# -------------------------------------------------------------------- trials
@pytest.fixture
def trial(tmp_path: Path) -> Trial:
    path = tmp_path / "drift.safetensors"
    save_file(untrained(0), str(path))
    method = get_method("ppo").but("searched", surrogate=LearntDrift(weights=str(path)))
    return Trial(method, "gym:CartPole-v1", SMALL)


def test_a_candidate_is_the_memory_of_a_part(trial: Trial) -> None:
    phi = trial.flat(untrained(0))
    assert phi.shape == (128 * 9,)
    placed = trial.place(phi)
    assert all(torch.equal(v, untrained(0)[k]) for k, v in placed.items())
    with pytest.raises(CallError, match="the surrogate of searched remembers 1152 numbers"):
        trial.place(phi[1:])


def test_a_trial_is_a_run_with_the_candidate_in_it(trial: Trial) -> None:
    """Without drift it is the run of the plain ratio; the same candidate and seed give the same number, others another."""
    phi = trial.flat(untrained(0))
    plain = Trial(trial.method.but("plain", surrogate=Ratio()), trial.task, {**SMALL, "budget": "256-decisions"}, reduce="mean")
    mine = Trial(trial.method, trial.task, plain.settings, reduce="mean")
    assert mine(phi, 3) == plain(torch.zeros(0), 3) == mine(phi, 3)
    assert mine(phi, 4) != mine(phi, 3)
    strong = {**untrained(0), "out": torch.full((128,), 5.0)}
    long = Trial(trial.method, trial.task, {**SMALL, "budget": "1k-decisions"}, reduce="mean")
    assert long(trial.flat(strong), 3) != long(phi, 3)


def test_what_a_trial_measures(trial: Trial) -> None:
    phi = trial.flat(untrained(0))
    resolved = resolve(trial.method, trial.task, {**SMALL, "seed": 3, "threads": 1, "optim.compile": "never"})
    run = Improve(resolved.method, resolved.task, resolved.settings)
    returns = []
    while run.fraction() < 1:
        returns.append(run.step().get("episode_return"))
    score = run.evaluate()["score"]
    run.collector.close()
    told = [x for x in returns if x is not None]
    assert trial(phi, 3) == score
    assert Trial(trial.method, trial.task, SMALL, reduce="mean")(phi, 3) == pytest.approx(sum(told) / len(told))


def test_a_search_over_runs(trial: Trial) -> None:
    search = Search(OpenES(population=2).start(trial.flat(untrained(0)), 0), trial)
    search.run(1)
    assert 0 < search.history[0]["worst"] <= search.history[0]["best"]
