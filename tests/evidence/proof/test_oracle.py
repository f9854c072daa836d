"""The exact oracle: theorems about expected gradients by full enumeration, and that it catches what is wrong."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from polopt.batch import Batch
from polopt.evidence.proof.oracle import deviation, expected_gradient, moved_policy, oracle, small_world, surrogate_alone
from polopt.part import Part, make_part
from polopt.parts.advantage.gae import GAE
from polopt.parts.advantage.group import GroupBaseline
from polopt.parts.advantage.monte_carlo import MonteCarlo
from polopt.parts.aggregate import SeqMeanTokenMean, SeqMeanTokenSum
from polopt.parts.penalty.kl import KLToReference
from polopt.parts.reward.kl import KLInReward
from polopt.parts.shapes import keep
from polopt.parts.surrogate.clip import Clip
from polopt.policies import exact
from polopt.policies.table import TablePolicy
from polopt.registry import all_methods, get_method

#: methods of which theory gives no first gradient in closed form: critics of actions, flows, a median, a second update
WITHOUT = {
    "aq-sac", "aq-td3", "ddpg", "fpo", "iql", "mc-grpo", "pipo", "prdc", "sac", "sac-discrete", "sac-v1", "td3", "td3-bc", "tqc",
}  # fmt: skip


@pytest.mark.parametrize("name", list(all_methods()))
def test_every_method_has_the_gradient_that_theory_says(name: str) -> None:
    found = oracle(get_method(name))
    assert (found is None) == (name in WITHOUT)
    if found is None:
        return
    assert found.error < 1e-10, found.detail
    assert found.holds


# -------------------------------------------------------------------- the theorems, spelled out
def test_reinforce_is_the_policy_gradient() -> None:
    policy = moved_policy(small_world(eos=True, horizon=3, symbols=3))
    batch = exact.enumerate_answers(policy.world, policy)
    truth = {k: -g for k, g in exact.gradient(policy).items()}
    assert deviation(expected_gradient(get_method("reinforce"), policy, batch, 1), truth) < 1e-12


@pytest.mark.parametrize("seed", [0, 1])
def test_any_baseline_leaves_the_gradient_as_it_is(seed: int) -> None:
    policy = moved_policy(small_world(eos=True, horizon=3, symbols=3))
    batch = exact.enumerate_answers(policy.world, policy)
    value = 10 * torch.randn(policy.world.initial.shape[:2], generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    batch = batch.adding({"value@old": value[batch.keys["item"][:, None], batch.obs]})
    method = get_method("reinforce-baseline")
    alone = surrogate_alone(method, method.update())
    truth = {k: -g for k, g in exact.gradient(policy).items()}
    assert deviation(expected_gradient(alone, policy, batch, 1), truth) < 1e-10


def test_a_wrong_value_biases_a_bootstrapped_advantage() -> None:
    """With lam = 0 the value decides: exact values give the policy gradient (the oracle), zeros do not."""
    policy = moved_policy(small_world(eos=True, horizon=3, symbols=3))
    batch = exact.enumerate_answers(policy.world, policy)
    zero = torch.zeros(batch.shape, dtype=torch.float64)
    batch = batch.adding({"value@old": zero, "value_next@old": zero})
    method = get_method("reinforce-baseline").but("mine", advantage=GAE(lam=0.0, gamma=1.0), aggregate=SeqMeanTokenSum())
    alone = surrogate_alone(method, method.update())
    truth = {k: -g for k, g in exact.gradient(policy).items()}
    assert deviation(expected_gradient(alone, policy, batch, 1), truth) > 0.1
    found = oracle(method)
    assert found is not None
    assert found.holds


@pytest.mark.parametrize("k", [2, 3])
def test_leave_one_out_is_unbiased_and_the_group_mean_is_short_by_k_minus_one_over_k(k: int) -> None:
    policy = moved_policy(small_world(eos=False, horizon=1, symbols=3))
    groups = exact.all_groups(policy.world, policy, k)
    truth = {name: -g for name, g in exact.gradient(policy).items()}
    rloo = get_method("rloo").but("mine", reward=())
    assert deviation(expected_gradient(rloo, policy, groups, k), truth) < 1e-12
    itself = rloo.but("itself", advantage=GroupBaseline(centre="group", scale="none"))
    short = {name: (k - 1) / k * g for name, g in truth.items()}
    assert deviation(expected_gradient(itself, policy, groups, k), short) < 1e-12
    assert deviation(expected_gradient(itself, policy, groups, k), truth) == pytest.approx(1 / k, abs=1e-9)


def test_rloo_with_a_divergence_in_its_reward_ascends_the_regularised_return() -> None:
    policy = moved_policy(small_world(eos=True, horizon=2, symbols=3))
    groups = exact.all_groups(policy.world, policy, 2)
    goal = exact.objective(policy) - 0.3 * exact.divergence(policy).mean()
    named = dict(policy.net.named_parameters())
    truth = dict(zip(named, (-g for g in torch.autograd.grad(goal, list(named.values()))), strict=True))
    method = get_method("rloo").set("reward.kl-in-reward.beta", 0.3)
    assert deviation(expected_gradient(method, policy, groups, 2), truth) < 1e-12


def grpo_in_numpy(policy: TablePolicy, size: int, eps: float = 1e-4) -> np.ndarray:
    """-d/d(own logits) of GRPO's loss at the old policy on a bandit, averaged over all groups, written out."""
    world = policy.world
    pi = policy.probabilities().detach().numpy()[:, 0]
    reward = world.reward.numpy()[:, 0, :, 0]
    prompts, arms = pi.shape
    out = np.zeros((prompts, 1, arms))
    for p in range(prompts):
        for group in itertools.product(range(arms), repeat=size):
            chance = np.prod([pi[p, a] for a in group]) / prompts
            r = np.array([reward[p, a] for a in group])
            if r.max() == r.min():
                continue
            advantage = (r - r.mean()) / (r.std(ddof=1) + eps)
            for a, x in zip(group, advantage, strict=True):
                score = -pi[p].copy()  # d log pi(a) / d logits = 1[a] - pi
                score[a] += 1
                out[p, 0] += chance * x * score / size
    return out


@pytest.mark.parametrize("size", [2, 3, 4])
@pytest.mark.parametrize("binary", [True, False])
def test_grpo_on_a_bandit(size: int, binary: bool) -> None:
    policy = moved_policy(small_world(eos=False, horizon=1, symbols=3, binary=binary))
    method = get_method("grpo").but("mine", penalty=())
    found = expected_gradient(method, policy, exact.all_groups(policy.world, policy, size), size)
    assert found["own"].numpy() == pytest.approx(-grpo_in_numpy(policy, size), abs=1e-12)


def test_estimators_of_the_divergence_have_the_gradients_of_different_divergences() -> None:
    """k3 as a loss pulls towards KL(ref || pi), k2 towards KL(pi || ref), k1 nowhere: none equals another."""
    policy = moved_policy(small_world(eos=False, horizon=1, symbols=4))
    batch = exact.enumerate_answers(policy.world, policy)
    gradients = {}
    for k in ("k1", "k2", "k3"):
        method = get_method("grpo").but("mine", penalty=KLToReference(coef=0.5, estimator=k))  # type: ignore[arg-type]
        found = oracle(method)
        assert found is not None
        assert found.holds, found.detail
        alone = replace(method, updates=(replace(method.update(), terms=("penalty",)),), advantage=MonteCarlo())
        gradients[k] = expected_gradient(alone, policy, batch, 1)["own"]
    assert float(gradients["k1"].abs().max()) < 1e-15
    assert float((gradients["k2"] - gradients["k3"]).abs().max()) > 1e-3


# -------------------------------------------------------------------- it catches what is wrong
@dataclass(frozen=True)
class Twice(Clip):
    """A surrogate of twice the size."""

    def __call__(self, batch: Batch, now: Mapping[str, Tensor], advantage: Tensor) -> Tensor:
        """Wrong."""
        return 2 * super().__call__(batch, now, advantage)


@dataclass(frozen=True)
class PastRewards(MonteCarlo):
    """Returns that leave out the present reward: an off-by-one in time."""

    def __call__(self, batch: Batch) -> Tensor:
        """Wrong."""
        return keep(batch.mask, super().__call__(batch) - batch.scalar_reward())


@dataclass(frozen=True)
class PopulationDeviation(GroupBaseline):
    """Says that it divides by the sample deviation, divides by the other."""

    def __call__(self, batch: Batch) -> Tensor:
        """Wrong."""
        return super().but(ddof=0).__call__(batch) if self.ddof else super().__call__(batch)


@dataclass(frozen=True)
class ByMaskedLength(SeqMeanTokenMean):
    """Divides twice by the length."""

    def __call__(self, loss: Tensor, batch: Batch, valid: Tensor, totals: Any) -> Tensor:
        """Wrong."""
        return super().__call__(loss, batch, valid, totals) / batch.shape[1]


@dataclass(frozen=True)
class Bonus(KLInReward):
    """Pays for leaving the reference."""

    def __call__(self, batch: Batch) -> Tensor:
        """Wrong."""
        assert batch.reward is not None
        return 2 * batch.reward - super().__call__(batch)


@pytest.mark.parametrize(("name", "change"), [
    ("rloo", {"reward": Bonus(form="sequence")}),
    ("ppo-lm", {"reward": Bonus()}),
    ("ppo", {"surrogate": Twice()}),
    ("reinforce", {"advantage": PastRewards()}),
    ("grpo", {"advantage": PopulationDeviation()}),
    ("grpo", {"aggregate": ByMaskedLength()}),
    ("dr-grpo", {"surrogate": Twice()}),
])  # fmt: skip
def test_faults_are_seen(name: str, change: dict[str, Any]) -> None:
    if "advantage" in change and name == "grpo":
        wrong = change["advantage"]
        assert not torch.allclose(wrong(_group_batch()), GroupBaseline()(_group_batch()))  # it is a fault
    found = oracle(get_method(name).but("wrong", **change))
    assert found is not None
    assert found.error > 1e-3
    assert not found.holds


def _group_batch() -> Batch:
    return Batch.of(reward=torch.tensor([1.0, 0.0, 0.0]), mask=torch.ones(3, 1, dtype=torch.bool), group=[0, 0, 0])


def test_a_nan_does_not_hold() -> None:
    found = oracle(get_method("reinforce"))
    assert found is not None
    assert not replace(found, error=float("nan")).holds


@dataclass(frozen=True)
class Unknown(Part):
    """A surrogate about which nothing is known."""

    def __call__(self, batch: Batch, now: Mapping[str, Tensor], advantage: Tensor) -> Tensor:
        """Some loss."""
        return -advantage * now["logp"]


def test_no_answer_where_no_truth_is_known() -> None:
    grpo = get_method("grpo")
    assert oracle(grpo.but("mine", surrogate=Unknown())) is None
    assert oracle(grpo.but("mine", select=make_part("select", "drop-truncated"))) is None
    assert oracle(grpo.but("mine", reward=make_part("reward", "kl-in-reward"))) is None  # more than two outcomes
    assert oracle(get_method("reinforce").but("mine", surrogate=make_part("surrogate", "sequence-clip"))) is None
