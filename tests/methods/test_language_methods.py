"""Language methods against their papers' formulas; accumulation, padding and row order; their edge cases."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from language_reference import GROUP_METHODS, LANGUAGE_METHODS, Answers, reference

from polopt.batch import Batch
from polopt.errors import CallError, MissingStatistic
from polopt.registry import get_method

torch.set_num_threads(1)


@pytest.mark.identity(LANGUAGE_METHODS, "the loss is the paper's formula, written out over answers and tokens")
@pytest.mark.parametrize("name", LANGUAGE_METHODS)
@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 10_000))
def test_loss_is_the_papers_formula(name: str, seed: int) -> None:
    a = Answers.draw(seed)
    loss, _ = get_method(name).loss(a.batch()[0])
    assert math.isclose(loss.item(), reference(name, a), rel_tol=1e-10, abs_tol=1e-12)


@pytest.mark.identity(LANGUAGE_METHODS, "the gradient is that of the formula, by central differences")
@pytest.mark.parametrize("name", LANGUAGE_METHODS)
@settings(max_examples=6, deadline=None)
@given(seed=st.integers(0, 10_000))
def test_gradient_is_that_of_the_formula(name: str, seed: int) -> None:
    """Central differences of the reference in every token's log-probability and value (weights that are detached stay frozen)."""
    # ratios far enough from the clip that a difference does not cross it
    a = Answers.draw(seed, groups=2, limit=4, far=0.9)
    batch, logp, value = a.batch()
    get_method(name).loss(batch)[0].backward()
    h = 1e-6
    for leaf, rows in ((logp, "logp"), (value, "value")):
        grad = np.zeros(leaf.shape) if leaf.grad is None else leaf.grad.numpy()
        for i in range(len(a.reward)):
            assert bool((grad[i, len(a.logp[i]) :] == 0).all())
            for t in range(len(a.logp[i])):
                sides = []
                for sign in (1, -1):
                    moved = copy.deepcopy(a)
                    getattr(moved, rows)[i][t] += sign * h
                    sides.append(reference(name, moved, frozen=a.logp))
                assert math.isclose(grad[i, t], (sides[0] - sides[1]) / (2 * h), rel_tol=1e-5, abs_tol=1e-7), (rows, i, t)


def grads(name: str, batch: Batch, leaves: tuple[torch.Tensor, ...]) -> tuple[float, list[torch.Tensor], dict[str, float]]:
    loss, info = get_method(name).loss(batch)
    loss.backward()
    found = [torch.zeros_like(x) if x.grad is None else x.grad.clone() for x in leaves]
    for x in leaves:
        x.grad = None
    return loss.item(), found, {k: float(v) for k, v in info.items()}


@pytest.mark.parametrize("name", LANGUAGE_METHODS)
@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 10_000), cuts=st.lists(st.integers(0, 12), max_size=4))
def test_micro_batches_add_up_exactly(name: str, seed: int, cuts: list[int]) -> None:
    """Any partition of the rows, in any order: loss, gradient and diagnostics of the whole, to 1e-12."""
    method, a = get_method(name), Answers.draw(seed)
    batch, logp, value = a.batch()
    whole, (g_logp, g_value), info = grads(name, batch, (logp, value))
    advantage = method.advantages(batch)
    if method.critic is not None:
        from polopt import objective

        batch = batch.adding({"return@old": objective.returns(method, method.update(), batch, method.memory())})
    order = torch.randperm(len(a.reward), generator=torch.Generator().manual_seed(seed))
    pieces = [p for p in torch.tensor_split(order, sorted({c for c in cuts if c < len(order)})) if len(p)]
    total, added = 0.0, dict.fromkeys(info, 0.0)
    for rows in pieces:
        loss, part = method.loss(batch.rows(rows), advantage=advantage[rows], totals=batch)
        loss.backward()
        total += loss.item()
        for k, v in part.items():
            added[k] += float(v)
    assert math.isclose(total, whole, rel_tol=1e-12, abs_tol=1e-12)
    torch.testing.assert_close(logp.grad, g_logp, atol=1e-12, rtol=1e-12)
    if value.grad is not None:
        torch.testing.assert_close(value.grad, g_value, atol=1e-12, rtol=1e-12)
    for k in info:
        assert math.isclose(added[k], info[k], rel_tol=1e-10, abs_tol=1e-12), k


@pytest.mark.parametrize("name", LANGUAGE_METHODS)
@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 10_000), extra=st.integers(0, 5))
def test_padding_and_row_order_change_nothing(name: str, seed: int, extra: int) -> None:
    a = Answers.draw(seed)
    batch, logp, value = a.batch()
    loss, found, _ = grads(name, batch, (logp, value))
    order = np.random.default_rng(seed).permutation(len(a.reward))
    other, logp2, value2 = a.batch(width=a.limit + extra, order=order)
    loss2, found2, _ = grads(name, other, (logp2, value2))
    assert math.isclose(loss, loss2, rel_tol=1e-12, abs_tol=1e-12)
    for x, y in zip(found, found2, strict=True):
        torch.testing.assert_close(y[:, : a.limit], x[order], atol=1e-12, rtol=1e-12)
        assert bool((y[:, a.limit :] == 0).all())


# -------------------------------------------------------------------- edges
def some_batch(rewards: list[float], group: list[int], mask: torch.Tensor | None = None) -> tuple[Batch, torch.Tensor]:
    n = len(rewards)
    g = torch.Generator().manual_seed(0)
    logp = (torch.randn(n, 3, generator=g) - 2).requires_grad_()
    batch = Batch.of(
        logp=logp, logp_old=logp.detach() + 0.05, logp_ref=logp.detach(), value=torch.zeros(n, 3), reward=torch.tensor(rewards),
        group=group, mask=mask,
    )  # fmt: skip
    return batch, logp


@pytest.mark.identity(("grpo", "dr-grpo", "gspo", "cispo"), "groups of equal rewards, and groups of one, teach nothing")
@pytest.mark.parametrize("name", ["grpo", "dr-grpo", "gspo", "cispo"])
@pytest.mark.parametrize("group", [[0, 0, 0, 0], [0, 1, 2, 3], [0, 0, 0, 1]])
def test_equal_rewards_and_groups_of_one_teach_nothing(name: str, group: list[int]) -> None:
    batch, logp = some_batch([0.1, 0.1, 0.1, 0.1], group)
    method = get_method(name).but("x", penalty=())
    assert bool((method.advantages(batch) == 0).all())
    loss, _ = method.loss(batch)
    loss.backward()
    assert loss.item() == 0.0
    assert logp.grad is not None
    assert bool((logp.grad == 0).all())


@pytest.mark.parametrize("name", LANGUAGE_METHODS)
def test_everything_masked_gives_zero_not_nan(name: str) -> None:
    batch, logp = some_batch([0.0, 1.0], [0, 0], torch.zeros(2, 3))
    loss, info = get_method(name).loss(batch)
    loss.backward()
    assert loss.item() == 0.0
    assert logp.grad is None or bool((logp.grad == 0).all())
    assert all(float(v) == 0.0 for v in info.values())


@pytest.mark.parametrize("name", LANGUAGE_METHODS)
def test_garbage_behind_the_end_does_not_leak(name: str) -> None:
    mask = torch.tensor([[1, 1, 0], [1, 0, 0], [1, 1, 1], [1, 1, 1]]).bool()
    clean, logp = some_batch([0.0, 1.0, 0.5, 0.25], [0, 0, 1, 1], mask)
    loss, (g,), _ = grads(name, clean, (logp,))
    stats = {k: torch.where(mask, v.detach(), torch.nan) for k, v in clean.stats.items() if k != "logp@now"}
    leaf = torch.where(mask, logp.detach(), -math.inf).requires_grad_()
    assert clean.reward is not None
    dirty = Batch.of(
        stats={**stats, "logp@now": leaf}, mask=mask, group=[0, 0, 1, 1],
        reward=torch.where(mask, clean.reward[..., 0], torch.nan),
    )  # fmt: skip
    loss2, (g2,), info = grads(name, dirty, (leaf,))
    assert math.isclose(loss, loss2, abs_tol=1e-7)
    torch.testing.assert_close(g2, g)
    assert all(math.isfinite(v) for v in info.values()), info


@pytest.mark.parametrize("name", LANGUAGE_METHODS)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_reward_that_is_not_finite_is_refused(name: str, bad: float) -> None:
    batch, _ = some_batch([0.0, bad, 1.0, 0.0], [0, 0, 1, 1])
    with pytest.raises(CallError, match=r"reward\[1, 2\] = \[(nan|inf)\] is not finite"):
        get_method(name).loss(batch)


@pytest.mark.parametrize(
    ("name", "lacking", "argument"),
    [
        ("grpo", "logp@now", "logp="), ("grpo", "logp@old", "logp_old="), ("grpo", "logp@ref", "logp_ref="),
        ("rloo", "logp@ref", "logp_ref="), ("rloo", "logp@old", "logp_old="), ("ppo-lm", "value@now", "value="),
        ("ppo-lm", "logp@ref", "logp_ref="), ("gspo", "logp@old", "logp_old="), ("cispo", "logp@old", "logp_old="),
        ("dapo", "logp@old", "logp_old="), ("reinforce", "logp@now", "logp="),
    ],
)  # fmt: skip
def test_a_missing_statistic_says_what_to_pass(name: str, lacking: str, argument: str) -> None:
    from dataclasses import replace

    batch, _ = some_batch([0.0, 1.0], [0, 0])
    short = replace(batch, stats={k: v for k, v in batch.stats.items() if k != lacking})
    with pytest.raises(MissingStatistic, match=f"pass {argument}"):
        get_method(name).loss(short)


@pytest.mark.parametrize("name", GROUP_METHODS)
def test_a_missing_group_or_reward_says_what_to_pass(name: str) -> None:
    logp = torch.zeros(2, 3)
    for arguments, word in (({"reward": torch.ones(2)}, "group="), ({"group": [0, 0]}, "reward=")):
        batch = Batch.of(logp=logp, logp_old=logp, logp_ref=logp, **arguments)
        with pytest.raises(MissingStatistic, match=word):
            get_method(name).loss(batch)


# -------------------------------------------------------------------- what each method changed
@pytest.mark.identity("grpo", "dapo", "at ratio 1 the gradient is the same for any clip bound and for the plain score function")
def test_at_the_start_of_an_update_clip_variants_have_one_gradient() -> None:
    """r = 1: GRPO without KL, its clip-higher, no clip at all, and the plain score function."""
    from polopt.parts.surrogate.clip import Clip
    from polopt.parts.surrogate.score import ScoreFunction

    a = Answers.draw(5)
    a.logp = [o.copy() for o in a.old]
    base = get_method("grpo").but("base", penalty=())
    found = []
    for surrogate in (Clip(), Clip(0.2, 0.28), Clip(math.inf, math.inf), ScoreFunction()):
        batch, logp, _ = a.batch()
        base.but("x", surrogate=surrogate).loss(batch)[0].backward()
        found.append(logp.grad)
    for g in found[1:]:
        assert g is not None
        torch.testing.assert_close(g, found[0], atol=1e-14, rtol=1e-12)


def test_each_child_differs_where_it_says() -> None:
    """Every method of the family changes the gradient of its parent on a batch where its new term acts."""
    a = Answers.draw(11)
    gradient = {}
    for name in ("grpo", "dr-grpo", "dapo", "gspo", "cispo"):
        batch, logp, _ = a.batch()
        get_method(name).loss(batch)[0].backward()
        assert logp.grad is not None
        gradient[name] = logp.grad / logp.grad.norm()
    for name in ("dr-grpo", "dapo", "gspo", "cispo"):
        assert float((gradient[name] - gradient["grpo"]).abs().max()) > 1e-3


@pytest.mark.identity(
    "dr-grpo", "the gradient at a token does not depend on the length of other answers; that of a mean over tokens does"
)
def test_dr_grpo_does_not_depend_on_the_length_of_other_answers() -> None:
    """Its gradient at a token is A / (G L): lengthening another answer leaves it as it is; GRPO's token mean does not."""
    a = Answers.draw(3)
    longer = copy.deepcopy(a)
    target = 0
    for field in ("logp", "old", "ref", "value", "old_value"):
        rows = getattr(longer, field)
        rows[-1] = np.resize(rows[-1], a.limit)
    for name, same in (("dr-grpo", True), ("cispo", False)):
        grad = []
        for x in (a, longer):
            batch, logp, _ = x.batch()
            advantage = torch.ones(batch.shape, dtype=torch.float64)
            get_method(name).loss(batch, advantage=advantage)[0].backward()
            assert logp.grad is not None
            grad.append(logp.grad[target])
        assert len(a.logp[-1]) < a.limit
        assert torch.allclose(grad[0], grad[1]) is same


@pytest.mark.identity("rloo", "with the ratio at 1, as in PPO code, the gradient is the same")
def test_rloo_with_a_ratio_has_the_same_gradient_on_policy() -> None:
    from polopt.parts.surrogate.score import Ratio

    a = Answers.draw(2)
    a.logp = [o.copy() for o in a.old]
    found = []
    for method in (get_method("rloo"), get_method("rloo").but("x", surrogate=Ratio())):
        batch, logp, _ = a.batch()
        method.loss(batch)[0].backward()
        found.append(logp.grad)
    torch.testing.assert_close(found[0], found[1], atol=1e-14, rtol=1e-12)


@pytest.mark.identity("rloo", "unbiased, by enumeration; with the full group mean the gradient is (k-1)/k of the true one")
@pytest.mark.parametrize("loo", [True, False])
def test_rloo_is_unbiased_and_the_full_group_mean_is_not(loo: bool) -> None:
    """All k-tuples of answers of a small softmax policy: the expected gradient is the true one, or (k-1)/k of it."""
    from itertools import product

    from polopt.parts.advantage.group import GroupBaseline

    k, n = 3, 4
    g = torch.Generator().manual_seed(0)
    theta = torch.randn(n, generator=g, dtype=torch.float64).requires_grad_()
    reward = torch.randn(n, generator=g, dtype=torch.float64)
    p = theta.detach().softmax(0)
    true = torch.autograd.grad(-(theta.softmax(0) * reward).sum(), theta)[0]
    part = GroupBaseline(centre="leave-one-out" if loo else "group", scale="none")
    method = get_method("rloo").but("x", reward=(), advantage=part)
    mean = torch.zeros(n, dtype=torch.float64)
    for picks in product(range(n), repeat=k):
        index = torch.tensor(picks)
        batch = Batch.of(logp=theta.log_softmax(0)[index][:, None], reward=reward[index], group=[0] * k)
        loss, _ = method.loss(batch)
        mean += p[index].prod() * torch.autograd.grad(loss, theta)[0]
    torch.testing.assert_close(mean, true if loo else (k - 1) / k * true, atol=1e-12, rtol=1e-10)


@pytest.mark.identity("rloo", "lowers the variance exactly when mu^2 > s^2 / (k-1)")
@pytest.mark.parametrize(("mu", "wins"), [(2.0, True), (0.3, False)])
def test_rloo_lowers_the_variance_only_above_the_threshold(mu: float, wins: bool) -> None:
    """Rewards independent of the action, mean mu, deviation 1, k = 2: RLOO wins exactly when |mu| > 1."""
    from polopt.parts.advantage.group import GroupBaseline

    n = 4000
    g = torch.Generator().manual_seed(1)
    theta = torch.zeros(4, dtype=torch.float64)
    action = torch.randint(0, 4, (2 * n,), generator=g)
    score = torch.nn.functional.one_hot(action, 4) - theta.softmax(0)
    reward = mu + torch.randn(2 * n, generator=g, dtype=torch.float64)
    batch = Batch.of(reward=reward, mask=torch.ones(2 * n, 1), group=torch.arange(2 * n) // 2)
    advantage = GroupBaseline(centre="leave-one-out", scale="none")(batch)

    def variance(weight: torch.Tensor) -> float:
        estimate = (weight[:, None] * score).reshape(n, 2, 4).mean(1)
        return float(estimate.var(0).sum())

    assert (variance(advantage[:, 0]) < variance(reward)) is wins
