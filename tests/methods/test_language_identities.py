"""Identities between the language methods: where they agree with their parents and with each other, and where they must not."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from language_reference import Answers

from polopt.batch import Batch
from polopt.method import Method
from polopt.parts.advantage.gae import GAE
from polopt.parts.advantage.group import GroupBaseline
from polopt.parts.advantage.monte_carlo import MonteCarlo
from polopt.parts.aggregate import SeqMeanTokenMean, TokenMean
from polopt.parts.critic import ValueLoss
from polopt.parts.penalty.kl import KLToReference
from polopt.parts.surrogate.clip import Clip
from polopt.parts.surrogate.score import Ratio, ScoreFunction
from polopt.registry import get_method

torch.set_num_threads(1)
SEEDS = given(seed=st.integers(0, 10_000))


def on_policy(seed: int, full: bool = False) -> Answers:
    """Answers at ratio 1; with `full`, all as long as the limit."""
    a = Answers.draw(seed)
    if full:
        for field in ("logp", "old", "ref", "value", "old_value"):
            setattr(a, field, [np.resize(row, a.limit) for row in getattr(a, field)])
    a.logp = [row.copy() for row in a.old]
    return a


def slope(method: Method, a: Answers) -> torch.Tensor:
    """Gradient of the loss in every token's log-probability."""
    batch, logp, _ = a.batch()
    method.loss(batch)[0].backward()
    assert logp.grad is not None
    return logp.grad


def same(x: torch.Tensor, y: torch.Tensor) -> None:
    torch.testing.assert_close(x, y, atol=1e-13, rtol=1e-10)
    assert float(x.abs().max()) > 1e-6 or float(y.abs().max()) < 1e-12


# -------------------------------------------------------------------- RLOO
@pytest.mark.identity("rloo", "in PPO code, with the clipped ratio at 1, the gradient is the same")
@settings(max_examples=15, deadline=None)
@SEEDS
def test_rloo_in_ppo_code(seed: int) -> None:
    a = on_policy(seed)
    same(slope(get_method("rloo").but("x", surrogate=Clip(0.2, 0.2)), a), slope(get_method("rloo"), a))


@pytest.mark.identity("rloo", "without KL and baseline it is REINFORCE on answers")
@settings(max_examples=15, deadline=None)
@SEEDS
def test_rloo_without_baseline_is_reinforce(seed: int) -> None:
    a = Answers.draw(seed)
    bare = get_method("rloo").but("x", reward=(), advantage=GroupBaseline(centre="none", scale="none"))
    same(slope(bare, a), slope(get_method("reinforce"), a))


# -------------------------------------------------------------------- GRPO
@pytest.mark.identity(
    "grpo", "gspo", "cispo", "the advantages of a group sum to 0; a shift of its rewards, or a scale (eps = 0), changes nothing"
)
@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10_000), shift=st.floats(-5, 5), scale=st.floats(0.1, 10))
def test_group_advantages_do_not_know_scale_or_shift(seed: int, shift: float, scale: float) -> None:
    a = Answers.draw(seed)
    part = get_method("grpo").advantage.but(eps=0.0)
    found = part(a.batch()[0])[:, 0]
    for g in range(3):
        assert abs(float(found[torch.tensor(a.group == g)].sum())) < 1e-10
    a.reward = scale * a.reward + shift
    torch.testing.assert_close(part(a.batch()[0])[:, 0], found, atol=1e-6, rtol=1e-6)


@pytest.mark.identity("grpo", "with its KL at weight 0 and the reference far away, loss and gradient are those without the term")
def test_a_kl_of_weight_zero_is_no_kl() -> None:
    a = Answers.draw(4)
    same(slope(get_method("grpo").set("penalty.coef", 0.0), a), slope(get_method("grpo").but("x", penalty=()), a))


@pytest.mark.identity("grpo", "with the reference equal to the policy the KL is 0 and has no gradient")
def test_no_pull_at_the_reference() -> None:
    a = Answers.draw(4)
    a.ref = [row.copy() for row in a.logp]
    same(slope(get_method("grpo"), a), slope(get_method("grpo").but("x", penalty=()), a))


# -------------------------------------------------------------------- Dr. GRPO
@pytest.mark.identity("dr-grpo", "at ratio 1 its gradient is RLOO's without KL times (G - 1) / (G L)")
@settings(max_examples=15, deadline=None)
@SEEDS
def test_dr_grpo_is_a_scaled_rloo(seed: int) -> None:
    a = on_policy(seed)
    size = np.array([(a.group == g).sum() for g in a.group])
    factor = torch.tensor((size - 1) / size / a.limit)[:, None]
    same(slope(get_method("dr-grpo"), a), factor * slope(get_method("rloo").but("x", reward=()), a))


@pytest.mark.identity("dr-grpo", "on answers of full length it is GRPO without the division by the deviation, without KL")
@settings(max_examples=15, deadline=None)
@SEEDS
def test_dr_grpo_on_full_answers(seed: int) -> None:
    a = on_policy(seed, full=True)
    bare = get_method("grpo").but("x", penalty=(), advantage=GroupBaseline(scale="none"))
    same(slope(get_method("dr-grpo"), a), slope(bare, a))


# -------------------------------------------------------------------- DAPO
@pytest.mark.identity(
    "dapo", "on answers of equal length, with equal clip bounds and no punishment of length, it is GRPO without KL"
)
@settings(max_examples=15, deadline=None)
@SEEDS
def test_dapo_on_equal_lengths_is_grpo(seed: int) -> None:
    a = Answers.draw(seed)
    for field in ("logp", "old", "ref", "value", "old_value"):
        setattr(a, field, [np.resize(row, a.limit) for row in getattr(a, field)])
    bare = get_method("dapo").but("x", reward=(), surrogate=Clip(0.2, 0.2))
    same(slope(bare, a), slope(get_method("grpo").but("x", penalty=()), a))


@pytest.mark.identity("dapo", "every token of the batch has the same weight, whatever the length of its answer")
def test_dapo_weighs_tokens_alike() -> None:
    a = on_policy(5)
    batch, logp, _ = a.batch()
    get_method("dapo").loss(batch, advantage=torch.ones(batch.shape, dtype=torch.float64))[0].backward()
    assert logp.grad is not None
    torch.testing.assert_close(logp.grad, -batch.mask.double() / batch.mask.sum(), atol=1e-14, rtol=1e-12)


@pytest.mark.identity("dapo", "a token whose probability rose by 1.25 still learns, with GRPO's bound of 1.2 it does not")
def test_the_upper_bound_is_wider() -> None:
    for name, learns in (("dapo", True), ("grpo", False)):
        logp = torch.full((1, 1), -2.0 + math.log(1.25), dtype=torch.float64, requires_grad=True)
        batch = Batch.of(logp=logp, logp_old=torch.full((1, 1), -2.0, dtype=torch.float64), reward=torch.ones(1), group=[0])
        method = get_method(name).but("x", penalty=())
        method.loss(batch, advantage=torch.ones(1, 1, dtype=torch.float64))[0].backward()
        assert logp.grad is not None
        assert (float(logp.grad) != 0) is learns


# -------------------------------------------------------------------- GSPO
@pytest.mark.identity("gspo", "at ratio 1 its gradient is GRPO's without KL")
@settings(max_examples=15, deadline=None)
@SEEDS
def test_gspo_starts_as_grpo(seed: int) -> None:
    a = on_policy(seed)
    same(slope(get_method("gspo"), a), slope(get_method("grpo").but("x", penalty=()), a))


@pytest.mark.identity("gspo", "the clip cuts whole answers: the tokens of one share one gradient, or have none")
@settings(max_examples=15, deadline=None)
@SEEDS
def test_gspo_cuts_whole_answers(seed: int) -> None:
    a = Answers.draw(seed)
    found = slope(get_method("gspo"), a)
    for i, row in enumerate(a.logp):
        assert len({round(float(g), 12) for g in found[i, : len(row)]}) == 1


# -------------------------------------------------------------------- CISPO
@pytest.mark.identity("cispo", "below the cap the gradient is that of the unclipped ratio, off the old policy too")
@settings(max_examples=15, deadline=None)
@SEEDS
def test_cispo_below_the_cap_is_the_ratio(seed: int) -> None:
    a = Answers.draw(seed, far=0.3)
    same(slope(get_method("cispo"), a), slope(get_method("cispo").but("x", surrogate=Ratio()), a))


@pytest.mark.identity("cispo", "at ratio 1 the gradient is that of the score function, the mean over tokens")
@settings(max_examples=15, deadline=None)
@SEEDS
def test_cispo_at_ratio_one_is_the_score_function(seed: int) -> None:
    a = on_policy(seed)
    plain = get_method("grpo").but("x", penalty=(), surrogate=ScoreFunction(), aggregate=TokenMean())
    same(slope(get_method("cispo"), a), slope(plain, a))


# -------------------------------------------------------------------- PPO for language models
@pytest.mark.identity("ppo-lm", "without KL, value clip and discount it is PPO: losses and gradients are equal, bit for bit")
def test_ppo_lm_without_its_terms_is_ppo() -> None:
    a = Answers.draw(9)
    bare = get_method("ppo-lm").but("x", reward=(), critic=ValueLoss(0.5))
    ppo = get_method("ppo").but("x", advantage=GAE(1.0, 0.95, standardise=True))
    for which in (1, 2):
        found = []
        for method in (bare, ppo):
            made = a.batch()
            method.loss(made[0])[0].backward()
            assert made[which].grad is not None
            found.append(made[which].grad)
        assert torch.equal(*found)


@pytest.mark.identity(
    "ppo-lm",
    "rewards add up to r - beta log(pi_old/pi_ref) of the answer; with lam = 1 the advantage is what is left of it, minus V",
)
def test_ppo_lm_advantage_is_the_regularised_outcome() -> None:
    a = Answers.draw(8)
    method = get_method("ppo-lm").but("x", advantage=GAE(1.0, 1.0, standardise=False))
    batch, _, _ = a.batch()
    found = method.advantages(batch)
    for i, (old, ref, value) in enumerate(zip(a.old, a.ref, a.old_value, strict=True)):
        for t in range(len(old)):
            wanted = a.reward[i] - 0.05 * (old[t:] - ref[t:]).sum() - value[t]
            assert math.isclose(float(found[i, t]), wanted, abs_tol=1e-12)
    whole = get_method("ppo-lm").but("x", advantage=MonteCarlo(), critic=None).advantages(batch)[:, 0]
    kl = np.array([(o - r).sum() for o, r in zip(a.old, a.ref, strict=True)])
    np.testing.assert_allclose(whole.numpy(), a.reward - 0.05 * kl, atol=1e-12)


@pytest.mark.identity(
    "grpo", "without baseline, deviation and KL, on answers of full length, it is PPO's clip on the answers' rewards"
)
def test_grpo_without_its_terms_is_the_clip() -> None:
    a = Answers.draw(2)
    for field in ("logp", "old", "ref", "value", "old_value"):
        setattr(a, field, [np.resize(row, a.limit) for row in getattr(a, field)])
    grpo = get_method("grpo").but("x", penalty=(), advantage=GroupBaseline(centre="none", scale="none"))
    ppo = get_method("ppo").but("x", critic=None, advantage=MonteCarlo())
    same(slope(grpo, a), slope(ppo, a))
    assert isinstance(get_method("grpo").aggregate, SeqMeanTokenMean)
    assert isinstance(get_method("grpo").penalty[0], KLToReference)
