"""REBEL: regression of relative rewards on pairs, against mirror descent, natural gradients and policy gradients by enumeration."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import polopt
from polopt.batch import Batch
from polopt.errors import CallError
from polopt.evidence.proof.oracle import expected_gradient
from polopt.loops.drive import build_run
from polopt.method import Method
from polopt.overrides import resolve
from polopt.policies import exact
from polopt.policies.table import TablePolicy
from polopt.registry import get_method
from polopt.stats import NOW
from polopt.tasks import make

REBEL = get_method("rebel").but("plain", reward=())
LOGP = frozenset({"logp"})


def with_(eta: float = 1.0, base: Method = REBEL, **more: object) -> Method:
    return base.but("x", surrogate=base.surrogate.but(eta=eta, **more))


@pytest.fixture
def policy() -> TablePolicy:
    made = TablePolicy(make("table:arms", {"reward": "graded", "prompts": 2, "symbols": 4}).world)
    with torch.no_grad():  # not at its reference
        made.net.own.add_(torch.randn(made.net.own.shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64))
    return made


def at(policy: TablePolicy, batch: Batch) -> Batch:
    return batch.adding({"logp@now": policy.evaluate(batch, LOGP, NOW)["logp"]})


def pairs(policy: TablePolicy) -> Batch:
    return exact.all_groups(policy.world, policy, 2)


def batch_of(ratio: list[float], reward: list[float], group: list[int], dtype: torch.dtype = torch.float64) -> Batch:
    """Answers of one decision, with given log-ratios."""
    n = len(ratio)
    return Batch(
        mask=torch.ones(n, 1, dtype=torch.bool), reward=torch.tensor(reward, dtype=dtype).view(n, 1, 1),
        stats={"logp@old": torch.full((n, 1), -2.0, dtype=dtype), "logp@now": torch.tensor(ratio, dtype=dtype).view(n, 1) - 2.0},
    ).with_key("group", torch.tensor(group))  # fmt: skip


def slope(method: Method, batch: Batch) -> tuple[Tensor, Tensor]:
    now = batch.stats["logp@now"].detach().clone().requires_grad_()
    loss, _ = method.loss(batch.adding({"logp@now": now}))
    return loss.detach(), torch.autograd.grad(loss, now)[0][:, 0]


# -------------------------------------------------------------------- identities
@pytest.mark.parametrize("form", ["paper", "code"])
@pytest.mark.parametrize("eta", [0.5, 2.0])
@pytest.mark.identity("rebel", "the exact minimum over a full softmax is mirror descent, pi_t exp(eta r) / Z")
def test_the_minimum_is_mirror_descent(policy: TablePolicy, eta: float, form: str) -> None:
    method, batch = with_(eta, form=form), pairs(policy)
    target = (policy.table().detach().log_softmax(-1) + eta * policy.world.total_reward()).softmax(-1)
    search = torch.optim.LBFGS(policy.net.parameters(), max_iter=300, tolerance_grad=1e-14, tolerance_change=1e-18,
                               line_search_fn="strong_wolfe")  # fmt: skip

    def closure() -> Tensor:
        search.zero_grad()
        loss, _ = method.loss(at(policy, batch))
        loss.backward()
        return loss

    search.step(closure)
    assert torch.allclose(policy.probabilities(), target, atol=1e-6)
    assert float(method.loss(at(policy, batch))[0]) < 1e-12


@pytest.mark.identity("rebel", "with pi_t the reference the minimum is the optimum of the KL-regularised problem with beta = 1/eta")
def test_from_the_reference_it_is_the_regularised_optimum() -> None:
    policy = TablePolicy(make("table:arms", {"reward": "graded", "prompts": 2, "symbols": 4}).world)
    eta = 3.0
    reward = policy.world.total_reward()
    best = (policy.reference.log_softmax(-1) + eta * reward).softmax(-1)

    def value(pi: Tensor) -> Tensor:
        return (pi * (reward - (pi / policy.reference.softmax(-1)).log() / eta)).sum(-1).mean()

    with torch.no_grad():
        policy.net.own.copy_(best.log())
    assert float(with_(eta).loss(at(policy, pairs(TablePolicy(policy.world))))[0]) < 1e-24
    for seed in range(20):  # and it is the best there is
        other = (best.log() + 0.3 * torch.randn(best.shape, generator=torch.Generator().manual_seed(seed))).softmax(-1)
        assert float(value(best)) > float(value(other))


@pytest.mark.parametrize("eta", [0.5, 1.0, 4.0])
@pytest.mark.identity("rebel", "at pi_t the loss is E[(r - r')^2] and its gradient -(4/eta) times the policy gradient")
def test_at_the_start_it_is_the_policy_gradient(policy: TablePolicy, eta: float) -> None:
    batch = pairs(policy)
    found = expected_gradient(with_(eta), policy, batch, 2)
    for name, truth in exact.gradient(policy).items():
        assert torch.allclose(found[name], -4 / eta * truth, atol=1e-12)
    probability = batch.row["probability"][0::2]
    reward = batch.outcome()
    expected = (probability * (reward[0::2] - reward[1::2]) ** 2).sum()
    losses = torch.stack([with_(eta).loss(at(policy, batch.rows(slice(i, i + 2))))[0] for i in range(0, len(reward), 2)])
    assert torch.allclose((probability * losses).sum(), expected, atol=1e-12)


@pytest.mark.identity("rebel", "in groups of any size the first gradient is -(4/eta) times the policy gradient")
def test_groups_of_three(policy: TablePolicy) -> None:
    found = expected_gradient(with_(2.0), policy, exact.all_groups(policy.world, policy, 3), 3)
    for name, truth in exact.gradient(policy).items():
        assert torch.allclose(found[name], -2.0 * truth, atol=1e-12)


@pytest.mark.identity("rebel", "a Gauss-Newton step from pi_t is eta times the natural gradient of the tabular softmax")
def test_a_gauss_newton_step_is_the_natural_gradient(policy: TablePolicy) -> None:
    eta, batch = 0.7, pairs(policy)
    weight = batch.row["probability"][0::2]
    own = policy.net.own
    n = own.numel()
    gradient, matrix = torch.zeros(n, dtype=torch.float64), torch.zeros(n, n, dtype=torch.float64)
    for i in range(len(weight)):
        two = batch.rows(slice(2 * i, 2 * i + 2))
        logp = policy.evaluate(two, LOGP, NOW)["logp"][:, 0]
        inner = torch.stack([torch.autograd.grad(x, own, retain_graph=True)[0].reshape(-1) for x in logp])
        leaf = logp.detach().clone().requires_grad_()

        def loss(x: Tensor, two: Batch = two) -> Tensor:
            return with_(eta).loss(two.adding({"logp@now": x[:, None]}))[0]

        (first,) = torch.autograd.grad(loss(leaf), leaf)
        step = 1e-4  # the loss is quadratic in the log-probabilities: central differences of its gradient are exact
        hessian = torch.stack([
            (torch.autograd.grad(loss(up := (leaf.detach() + step * e).requires_grad_()), up)[0]
             - torch.autograd.grad(loss(down := (leaf.detach() - step * e).requires_grad_()), down)[0]) / (2 * step)
            for e in torch.eye(2, dtype=torch.float64)
        ])  # fmt: skip
        gradient += weight[i] * inner.T @ first
        matrix += weight[i] * inner.T @ hessian @ inner
    pi = policy.probabilities().detach()[:, 0]
    blocks = [(torch.diag(p) - torch.outer(p, p)) / len(pi) for p in pi]  # Fisher matrix of a softmax, prompts equally likely
    natural = torch.linalg.pinv(torch.block_diag(*blocks), rtol=1e-10) @ exact.gradient(policy)["own"].reshape(-1)
    found = -torch.linalg.pinv(matrix, rtol=1e-6) @ gradient
    assert torch.allclose(found, eta * natural, atol=1e-6)


@pytest.mark.identity("rebel", "adding c(x) to the rewards of a prompt leaves loss and gradient as they are")
@given(shift=st.lists(st.floats(-50, 50), min_size=3, max_size=3), seed=st.integers(0, 1000))
@settings(max_examples=50, deadline=None)
def test_what_is_equal_within_a_group_cancels(shift: list[float], seed: int) -> None:
    rng = torch.Generator().manual_seed(seed)
    ratio, reward = torch.randn(2, 8, generator=rng, dtype=torch.float64)
    group = [0, 0, 1, 1, 1, 2, 2, 2]
    for method in (with_(0.8), with_(0.8, pairs="best-worst")):
        plain = slope(method, batch_of(ratio.tolist(), reward.tolist(), group))
        moved = slope(method, batch_of(ratio.tolist(), (reward + torch.tensor(shift)[group]).tolist(), group))
        for a, b in zip(plain, moved, strict=True):
            assert torch.allclose(a, b, atol=1e-9)


@pytest.mark.identity("rebel", "with pi_t = pi_ref and beta = 1/eta it is the contrastive loss (r - r' - beta (d - d'))^2")
def test_contrastive_policy_gradient() -> None:
    rng = torch.Generator().manual_seed(2)
    ratio, reward = torch.randn(2, 6, generator=rng, dtype=torch.float64)
    beta = 0.3
    loss, _ = slope(with_(1 / beta), batch_of(ratio.tolist(), reward.tolist(), [0, 0, 1, 1, 2, 2]))
    contrast = (reward[0::2] - reward[1::2] - beta * (ratio[0::2] - ratio[1::2])) ** 2
    assert float(loss) == pytest.approx(float(contrast.mean()), abs=1e-12)


@pytest.mark.identity("rebel", "rewards that are shares of wins keep the uniform policy of rock, paper, scissors where it is")
def test_the_uniform_policy_of_rock_paper_scissors_is_a_fixed_point() -> None:
    wins = torch.tensor([[0.5, 0.0, 1.0], [1.0, 0.5, 0.0], [0.0, 1.0, 0.5]], dtype=torch.float64)
    policy = TablePolicy(make("table:arms", {"prompts": 1, "symbols": 3}).world)

    def drift(logits: list[float]) -> Tensor:
        with torch.no_grad():
            policy.net.own.copy_(torch.tensor(logits).view(1, 1, 3))
        batch = exact.all_groups(policy.world, policy, 3)
        act = batch.action[:, 0].view(-1, 3)
        share = torch.stack([(wins[act[:, i]].gather(1, act).sum(1) - 0.5) / 2 for i in range(3)], 1)  # against the two others
        batch = replace(batch, reward=share.reshape(-1, 1, 1))
        return expected_gradient(with_(), policy, batch, 3)["own"].reshape(-1)

    assert float(drift([0.0, 0.0, 0.0]).abs().max()) < 1e-14
    assert int(drift([1.0, 0.0, 0.0]).argmin()) == 1  # against too much rock: paper


# -------------------------------------------------------------------- pairs
def test_groups_in_numbers() -> None:
    ratio, reward = [0.5, -0.5, 0.2, 0.1, 0.0], [1.0, 0.0, 3.0, 1.0, 2.0]
    batch = batch_of(ratio, reward, [0, 0, 1, 1, 1])
    eta = 2.0
    e = [a / eta - r for a, r in zip(ratio, reward, strict=True)]
    three = [(e[i] - e[j]) ** 2 for i, j in itertools.combinations((2, 3, 4), 2)]
    first = (e[0] - e[1]) ** 2
    assert float(slope(with_(eta), batch)[0]) == pytest.approx((2 * first + 3 * sum(three) / 3) / 5)
    extreme = (e[2] - e[3]) ** 2  # rewards 3 and 1
    loss, gradient = slope(with_(eta, pairs="best-worst"), batch)
    assert float(loss) == pytest.approx((2 * first + 3 * extreme) / 5)
    assert float(gradient[4]) == 0.0
    coded, _ = slope(with_(eta, form="code"), batch)
    assert float(coded) == pytest.approx(eta**2 * (2 * first + sum(three)) / 5)


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_the_gradient_is_that_of_the_mean_over_all_pairs(data: st.DataObject) -> None:
    """The centre carries no gradient, and none is missing: finite differences of the plain double sum."""
    sizes = data.draw(st.lists(st.integers(1, 4), min_size=1, max_size=3))
    n = sum(sizes)
    group = [g for g, k in enumerate(sizes) for _ in range(k)]
    numbers = st.lists(st.floats(-3, 3), min_size=n, max_size=n)
    ratio, reward = data.draw(numbers), data.draw(numbers)
    eta = 1.5

    def plain(x: Tensor) -> Tensor:
        e = x / eta - torch.tensor(reward, dtype=torch.float64)
        total = torch.zeros((), dtype=torch.float64)
        for g, k in enumerate(sizes):
            mine = [i for i in range(n) if group[i] == g]
            both = [(e[i] - e[j]) ** 2 for i, j in itertools.combinations(mine, 2)]
            total = total + (k * torch.stack(both).mean() if both else 0.0)
        return total / n

    x = torch.tensor(ratio, dtype=torch.float64, requires_grad=True)
    truth = plain(x)
    expected = torch.autograd.grad(truth, x)[0] if truth.requires_grad else torch.zeros(n, dtype=torch.float64)
    loss, gradient = slope(with_(eta), batch_of(ratio, reward, group))
    assert float(loss) == pytest.approx(float(truth), abs=1e-9)
    assert torch.allclose(gradient, expected, atol=1e-9)


@pytest.mark.identity("rebel", "a pair of equal answers has no gradient, and no loss where their rewards are equal")
def test_equal_answers_teach_nothing(policy: TablePolicy) -> None:
    batch = pairs(policy)
    same = (batch.action[0::2, 0] == batch.action[1::2, 0]).nonzero().flatten()
    assert len(same) == 8  # of 2 prompts x 4 x 4
    with torch.no_grad():
        policy.net.own.mul_(0.3)
    for i in same.tolist():
        two = at(policy, batch.rows(slice(2 * i, 2 * i + 2)))
        loss, _ = with_().loss(two)
        assert float(loss) == 0.0
        assert float(torch.autograd.grad(loss, policy.net.own)[0].abs().max()) == 0.0
        assert two.reward is not None
        noisy = replace(at(policy, two), reward=two.reward + torch.tensor([0.0, 1.0]).view(2, 1, 1))  # a verdict that is not sure
        loss, _ = with_().loss(noisy)
        assert float(loss) == pytest.approx(1.0)
        assert float(torch.autograd.grad(loss, policy.net.own)[0].abs().max()) < 1e-15


@pytest.mark.identity("rebel", "equal rewards do not move the policy from where it drew, and pull it back where it has left")
def test_equal_rewards() -> None:
    for kind in ("all", "best-worst"):
        method = with_(pairs=kind)
        loss, gradient = slope(method, batch_of([0.0] * 4, [1.0] * 4, [0, 0, 1, 1]))
        assert float(loss) == float(gradient.abs().max()) == 0.0
        loss, gradient = slope(method, batch_of([0.3, -0.3], [1.0, 1.0], [0, 0]))
        assert float(loss) == pytest.approx(0.36)
        assert gradient.tolist() == pytest.approx([1.2, -1.2])


def test_an_answer_without_a_partner_has_no_loss() -> None:
    for kind in ("all", "best-worst"):
        loss, gradient = slope(with_(pairs=kind), batch_of([0.4, 1.0, -1.0], [1.0, 0.0, 1.0], [0, 1, 1]))
        assert float(gradient[0]) == 0.0
        assert float(loss) == pytest.approx(2 / 3 * (2.0 + 1.0) ** 2)
    empty = batch_of([0.4, 1.0, -1.0], [1.0, 0.0, 1.0], [0, 0, 0])
    empty = replace(empty, mask=torch.tensor([[True], [False], [True]]))  # a row without decisions is no partner
    assert float(slope(with_(), empty)[0]) == pytest.approx((1.4 - 0.0) ** 2)


def test_groups_of_one_are_refused() -> None:
    alone = REBEL.sampler.but(group_size=1)
    with pytest.raises(CallError, match=r"compares pairs of answers, but sampler.group_size = 1; it takes 2 or more"):
        get_method("grpo").but("x", surrogate=REBEL.surrogate, sampler=alone, advantage=REBEL.advantage.but(centre="none"))
    with pytest.raises(CallError, match=r"needs at least 2 samples"):
        resolve("rebel", "table:arms", {"group_size": 1})
    assert resolve("rebel", "table:arms", {"group_size": 3}).method.sampler.group_size == 3


def test_half_precision_and_far_ratios_stay_finite() -> None:
    for dtype in (torch.float16, torch.bfloat16):
        for eta in (0.2, 1.0, 1e3):
            loss, gradient = slope(with_(eta), batch_of([20.0, -20.0], [1.0, 0.0], [0, 0], dtype))
            assert bool(loss.isfinite())
            assert bool(gradient.isfinite().all())


# -------------------------------------------------------------------- minibatches
def test_minibatches_and_pieces_keep_groups_together() -> None:
    base = {"budget": "3-updates", "collect.prompts": 6, "sampler.group_size": 2, "epochs": 2, "seed": 1}
    found = resolve(REBEL, "table:tree", {**base, "minibatches": 3})
    run = build_run(found)
    executor = run.executors["policy"]  # type: ignore[attr-defined]
    seen = []
    keep = executor._step
    executor._step = lambda batch, *rest: (seen.append(batch.group.tolist()), keep(batch, *rest))[1]
    run.step()
    assert [len(g) for g in seen] == [4] * 6
    assert all(sorted(g) == sorted(2 * list(set(g))) for g in seen)
    assert seen[:3] != seen[3:]
    whole, pieces = (build_run(resolve(REBEL, "table:tree", {**base, "optim.micro": micro})) for micro in (None, 3))
    for _ in range(3):
        a, b = whole.step(), pieces.step()
        assert a["loss/surrogate"] == pytest.approx(b["loss/surrogate"], abs=1e-12)
    assert torch.allclose(whole.policy.net.own, pieces.policy.net.own, atol=1e-9)


def test_it_learns() -> None:
    run = polopt.train("rebel", "table:arms", budget="4k-decisions", out=False)
    assert run.summary["eval_score"] > 0.8 > 0.3 > run.summary["eval_score_initial"]
