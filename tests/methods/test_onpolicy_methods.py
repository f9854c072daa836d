"""Control methods: A2C against PPO, A3C, REINFORCE, TRPO's two updates, and children with their new term at its neutral value."""

from __future__ import annotations

import copy
import math
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from polopt.batch import Batch
from polopt.method import Method
from polopt.part import Part
from polopt.parts.advantage.gae import GAE, NStep
from polopt.parts.advantage.monte_carlo import MonteCarlo
from polopt.parts.critic import ValueLoss
from polopt.parts.penalty.entropy import EntropyBonus
from polopt.parts.penalty.kl import KLToReference
from polopt.parts.reward.kl import KLInReward
from polopt.parts.reward.overlong import SoftOverlong
from polopt.parts.rule.descend import Descend
from polopt.parts.select.truncated import DropTruncated
from polopt.parts.surrogate.clip import Clip
from polopt.parts.weight.truncated_importance import TruncatedImportance
from polopt.registry import all_methods, get_method

torch.set_num_threads(1)


class ActorCritic(nn.Module):
    """A small policy and value net in float64."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.policy = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 4)).double()
        self.value = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 1)).double()

    def now(self, obs: Tensor, action: Tensor) -> dict[str, Tensor]:
        logq = self.policy(obs).log_softmax(-1)
        return {
            "logp@now": logq.gather(-1, action[..., None]).squeeze(-1), "value@now": self.value(obs).squeeze(-1),
            "entropy@now": -(logq.exp() * logq).sum(-1),
        }  # fmt: skip


def collect(net: ActorCritic, seed: int, b: int = 4, t: int = 5) -> dict[str, Tensor]:
    """Fragments as a vector collector returns them: V of the true next observation, also where an episode was cut."""
    g = torch.Generator().manual_seed(seed)
    obs = torch.randn(b, t + 1, 3, generator=g, dtype=torch.float64)
    final = torch.randn(b, t, 3, generator=g, dtype=torch.float64)
    truncated = torch.rand(b, t, generator=g) < 0.15
    with torch.no_grad():
        action = torch.randint(0, 4, (b, t), generator=g)
        after = net.value(torch.where(truncated[..., None], final, obs[:, 1:])).squeeze(-1)
        old = net.now(obs[:, :-1], action)
    return {
        "obs": obs[:, :-1], "action": action, "reward": torch.randn(b, t, generator=g, dtype=torch.float64),
        "terminated": torch.rand(b, t, generator=g) < 0.15, "truncated": truncated, "logp@old": old["logp@now"],
        "value@old": old["value@now"], "value_next@old": after,
    }  # fmt: skip


def batch_of(net: ActorCritic, d: dict[str, Tensor]) -> Batch:
    stats = {k: d[k] for k in ("logp@old", "value@old", "value_next@old")} | net.now(d["obs"], d["action"])
    return Batch.of(reward=d["reward"], terminated=d["terminated"], truncated=d["truncated"], stats=stats)


def train(method: Method, iterations: int) -> list[Tensor]:
    """Whole-batch steps of a method's only update; the parameters after each iteration."""
    net = ActorCritic()
    rule = method.update().rule
    assert isinstance(rule, Descend)
    stepper = rule.bind(list(net.parameters()))
    found = []
    for i in range(iterations):
        data = collect(net, i)
        whole = batch_of(net, data)
        advantage = method.advantages(whole)
        from polopt import objective

        target = objective.returns(method, method.update(), whole, method.memory())
        for epoch in range(method.update().epochs):
            batch = batch_of(net, data).adding({"return@old": target})
            for p in net.parameters():
                p.grad = None
            loss, info = method.loss(batch, advantage=advantage)
            if epoch == 0 and "clip_pos" in info:
                assert float(info["clip_pos"] + info["clip_neg"]) == 0.0
                assert float(info["kl_old"]) == 0.0
            loss.backward()
            stepper.apply()
        found.append(torch.cat([p.detach().reshape(-1) for p in net.parameters()]))
    return found


def ppo_as_a2c(**changes: Any) -> Method:
    """PPO under the settings of the experiment of Huang et al. 2022."""
    same: dict[str, Any] = {
        "advantage": GAE(gamma=0.99, lam=1.0), "epochs": 1, "minibatch": None,
        "rule": Descend(optimizer="rmsprop-tf", lr=7e-4, alpha=0.99, eps=1e-5, max_grad_norm=0.5),
    }  # fmt: skip
    return get_method("ppo").but("ppo-as-a2c", **{**same, **changes})


@pytest.mark.identity(
    "ppo", "a2c", "one epoch on the whole batch is A2C, for any clip bound; clip fraction and KL are 0 at the start"
)
@pytest.mark.parametrize("eps", [0.01, 0.2, 0.9])
def test_a2c_is_ppo_with_one_epoch(eps: float) -> None:
    a2c, ppo = train(get_method("a2c"), 30), train(ppo_as_a2c(surrogate=Clip(eps, eps)), 30)
    for p, q in zip(a2c, ppo, strict=True):
        torch.testing.assert_close(p, q, atol=1e-12, rtol=0)
    assert float((a2c[-1] - a2c[0]).abs().max()) > 1e-4


@pytest.mark.identity("a2c", "ppo", "a second epoch, lam < 1, standardised advantages or Adam break the equality of A2C and PPO")
@pytest.mark.parametrize(
    "change", [{"epochs": 2}, {"advantage": GAE(0.99, 0.95)}, {"advantage": GAE(0.99, 1.0, standardise=True)}, {"rule": Descend()}]
)
def test_any_other_setting_breaks_the_equality(change: dict[str, Any]) -> None:
    a2c, ppo = train(get_method("a2c"), 1), train(ppo_as_a2c(**change), 1)
    assert float((a2c[0] - ppo[0]).abs().max()) > 1e-6


@pytest.mark.identity("ppo", "a2c", "at ratio 1 the gradient is A2C's, for any clip bound and either sign of A")
@pytest.mark.parametrize("eps", [0.05, 0.5])
def test_gradient_of_ppo_at_ratio_one_is_that_of_a2c(eps: float) -> None:
    grad = []
    for method in (get_method("a2c"), ppo_as_a2c(surrogate=Clip(eps, eps))):
        net = ActorCritic()
        loss, _ = method.loss(batch_of(net, collect(net, 3)))
        loss.backward()
        grad.append(torch.cat([p.grad.reshape(-1) for p in net.parameters()]))  # type: ignore[union-attr]
    torch.testing.assert_close(grad[0], grad[1], atol=1e-14, rtol=1e-12)


@pytest.mark.identity("a2c", "the loss is mean(-A log pi) + 0.5 mse(R, V)")
def test_a2c_loss_is_that_of_stable_baselines() -> None:
    """mean(-A log pi) + 0.5 mse(return, value), no entropy term."""
    net = ActorCritic()
    batch = batch_of(net, collect(net, 1))
    method = get_method("a2c")
    adv = method.advantages(batch)
    target = adv + batch.stats["value@old"]
    wanted = -(adv * batch.stats["logp@now"]).mean() + 0.5 * nn.functional.mse_loss(batch.stats["value@now"], target)
    assert math.isclose(method.loss(batch)[0].item(), wanted.item(), rel_tol=1e-12)


# -------------------------------------------------------------------- A3C
@pytest.mark.identity("a3c", "zero advantage leaves the gradient of the entropy alone")
def test_zero_advantage_leaves_only_the_entropy_gradient() -> None:
    net = ActorCritic()
    batch = batch_of(net, collect(net, 0))
    method = get_method("a3c").but("x", critic=None)
    method.loss(batch, advantage=torch.zeros(batch.shape))[0].backward()
    found = [p.grad.clone() for p in net.policy.parameters()]  # type: ignore[union-attr]
    net.zero_grad()
    (-0.01 * batch_of(net, collect(net, 0)).stats["entropy@now"].mean()).backward()
    for g, p in zip(found, net.policy.parameters(), strict=True):
        torch.testing.assert_close(g, p.grad, atol=1e-14, rtol=1e-12)


@pytest.mark.identity("a3c", "a2c", "the gradients of W workers average to that of one batch of W environments")
def test_workers_average_to_the_batch_of_their_environments() -> None:
    net = ActorCritic()
    method, data = get_method("a3c"), collect(net, 4)
    method.loss(batch_of(net, data))[0].backward()
    whole = [p.grad.clone() for p in net.parameters()]  # type: ignore[union-attr]
    net.zero_grad()
    for w in range(4):
        one = {k: v[w : w + 1] for k, v in data.items()}
        (method.loss(batch_of(net, one))[0] / 4).backward()
    for g, p in zip(whole, net.parameters(), strict=True):
        torch.testing.assert_close(g, p.grad, atol=1e-13, rtol=1e-12)


@pytest.mark.identity("a3c", "reinforce-baseline", "on whole episodes the n-step advantage is that of REINFORCE with baseline")
def test_a3c_on_whole_episodes_is_reinforce_with_baseline() -> None:
    """Fragments that end with the episode: no bootstrap is left in the n-step return."""
    net = ActorCritic()
    data = collect(net, 5)
    data["truncated"][:] = False
    data["terminated"][:] = False
    data["terminated"][:, -1] = True
    batch = batch_of(net, data)
    mc = get_method("reinforce-baseline").but("x", advantage=MonteCarlo(gamma=0.99, baseline="value"))
    torch.testing.assert_close(get_method("a3c").advantages(batch), mc.advantages(batch), atol=1e-13, rtol=1e-12)


@pytest.mark.identity("a3c", "a2c", "ppo", "reinforce-baseline", "no gradient flows through advantage or return")
def test_nothing_flows_through_advantage_or_return() -> None:
    value = torch.zeros(1, 3, requires_grad=True)
    batch = Batch.of(logp=torch.zeros(1, 3), value=value, reward=torch.ones(1, 3), entropy=torch.zeros(1, 3))
    attached = batch.adding({"logp@old": torch.zeros(1, 3), "value@old": value, "value_next@old": value})
    for name in ("a3c", "a2c", "ppo", "reinforce-baseline"):
        assert not get_method(name).advantages(attached).requires_grad
    for part in (GAE(), NStep(), MonteCarlo(baseline="value")):
        assert not part.returns(attached).requires_grad


# -------------------------------------------------------------------- REINFORCE
def two_step_gradient(method: Method, baseline: Tensor) -> tuple[Tensor, Tensor]:
    """(expected gradient of the method's loss, minus the true gradient) on a tree of 2 x 2 actions, by enumeration."""
    g = torch.Generator().manual_seed(0)
    theta = torch.randn(3, 2, generator=g, dtype=torch.float64).requires_grad_()  # states: root, left, right
    reward = torch.randn(2, 2, 2, generator=g, dtype=torch.float64)  # r_1 and r_2 of each pair of actions
    reward[0] = reward[0][:, :1]  # the first reward depends on the first action alone
    expected = torch.zeros_like(theta)
    value = torch.zeros((), dtype=torch.float64)
    for a in range(2):
        for b in range(2):
            logq = theta.log_softmax(-1)
            logp = torch.stack([logq[0, a], logq[1 + a, b]])
            batch = Batch.of(
                logp=logp[None], reward=torch.stack([reward[0, a, b], reward[1, a, b]])[None],
                stats={"value@old": torch.stack([baseline[0], baseline[1 + a]])[None]},
            )  # fmt: skip
            loss, _ = method.loss(batch)
            expected += logp.sum().exp().detach() * torch.autograd.grad(loss, theta, retain_graph=True)[0]
            value = value + logp.sum().exp() * reward[:, a, b].sum()
    return expected, -torch.autograd.grad(value, theta)[0]


@pytest.mark.identity(
    "reinforce",
    "reinforce-baseline",
    "the expected gradient is that of the expected return, by enumeration, with any baseline of the state",
)
@pytest.mark.parametrize("advantage", [MonteCarlo(), MonteCarlo(credit="whole"), MonteCarlo(baseline="value")])
def test_reinforce_is_unbiased(advantage: Part) -> None:
    """With any baseline of the state; with returns from each decision on, or of the whole episode."""
    method = get_method("reinforce").but("x", advantage=advantage)
    found, wanted = two_step_gradient(method, torch.tensor([0.7, -2.0, 5.0], dtype=torch.float64))
    torch.testing.assert_close(found, wanted, atol=1e-13, rtol=1e-12)


# -------------------------------------------------------------------- TRPO
@pytest.mark.identity("trpo", "policy and value have losses and updates of their own")
def test_trpo_updates_policy_and_value_apart() -> None:
    method, net = get_method("trpo"), ActorCritic()
    batch = batch_of(net, collect(net, 2))
    policy, info = method.loss(batch)
    critic, info2 = method.loss(batch, update="critic")
    assert set(info) >= {"loss/surrogate"}
    assert "loss/critic" not in info
    assert "loss/surrogate" not in info2
    adv = method.advantages(batch)
    assert math.isclose(policy.item(), -adv.mean().item(), abs_tol=1e-12)
    part = method.advantage
    assert isinstance(part, GAE)
    error = (batch.stats["value@now"] - part.returns(batch)).square().mean()
    assert math.isclose(critic.item(), error.item(), rel_tol=1e-12)
    assert method.update("policy").trains == ("policy",)
    assert method.update("critic").trains == ("value",)


# -------------------------------------------------------------------- neutral values
NEUTRAL = [
    ("ppo", {"surrogate": Clip(0.2, 0.2, dual=1e9)}, {}),
    ("ppo", {"critic": ValueLoss(0.5, clip=1e9)}, {}),
    ("ppo", {"penalty": EntropyBonus(0.0)}, {}),
    ("ppo", {"penalty": KLToReference(0.0)}, {}),
    ("ppo", {"reward": KLInReward(0.0)}, {}),
    ("ppo", {"reward": SoftOverlong(0.0)}, {}),
    ("ppo", {"weight": TruncatedImportance()}, {"logp@behaviour": "logp@old"}),
    ("ppo", {"select": DropTruncated()}, {}),
    ("grpo", {"penalty": (KLToReference(0.04), EntropyBonus(0.0))}, {}),
]


@pytest.mark.parametrize(("name", "change", "copies"), NEUTRAL)
def test_a_new_term_at_its_neutral_value_changes_no_bit(name: str, change: dict[str, Any], copies: dict[str, str]) -> None:
    """The child equals its parent exactly; away from the neutral value it does not."""
    net, parent = ActorCritic(), get_method(name)
    data = collect(net, 7)
    with torch.no_grad():
        for p in net.parameters():
            p += 0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel()), dtype=torch.float64)

    def gradient(method: Method, extra: dict[str, Tensor]) -> Tensor:
        batch = batch_of(net, data).with_key("group", torch.tensor([0, 0, 1, 1]))
        stats = {"logp@ref": data["logp@old"] - 0.3, **{k: batch.stats[v] for k, v in copies.items()}, **extra}
        from dataclasses import replace

        batch = replace(batch.adding(stats), row={"truncated": torch.zeros(4)})
        net.zero_grad()
        loss, _ = method.loss(batch)
        loss.backward()
        return torch.cat([loss.detach()[None], *[p.grad.reshape(-1) for p in net.parameters() if p.grad is not None]])

    child = parent.but("child", **change)
    assert torch.equal(gradient(child, {}), gradient(parent, {}))


ACTING = [
    {"surrogate": Clip(0.2, 0.2, dual=1.01)}, {"critic": ValueLoss(0.5, clip=1e-3)}, {"penalty": EntropyBonus(0.1)},
    {"penalty": KLToReference(0.5)}, {"reward": KLInReward(0.5)}, {"reward": SoftOverlong(0.9)},
    {"weight": TruncatedImportance()}, {"select": DropTruncated()},
]  # fmt: skip


@pytest.mark.parametrize("change", ACTING)
def test_a_new_term_away_from_its_neutral_value_acts(change: dict[str, Any]) -> None:
    from dataclasses import replace

    logp = torch.tensor([[-1.0, -2.0], [-0.5, -1.5]], requires_grad=True)
    value = torch.tensor([[0.5, 0.1], [-0.3, 0.9]], requires_grad=True)
    old = torch.tensor([[-1.3, -1.0], [-0.4, -2.9]])
    batch = Batch.of(
        logp=logp, logp_old=old, logp_behaviour=old - torch.tensor([[0.1, -0.2], [0.3, 0.0]]), logp_ref=old + 0.2, value=value,
        entropy=-logp * logp.exp(), reward=torch.tensor([[1.0, -1.0], [0.5, 2.0]]), row={"truncated": torch.tensor([1.0, 0.0])},
        stats={"value@old": torch.tensor([[0.0, 0.4], [0.2, 0.3]])},
    )  # fmt: skip
    found = []
    for method in (get_method("ppo"), get_method("ppo").but("child", **change)):
        loss, _ = method.loss(replace(batch))
        found.append(torch.cat([g.reshape(-1) for g in torch.autograd.grad(loss, (logp, value), retain_graph=True)]))
    assert float((found[0] - found[1]).abs().max()) > 1e-4


# -------------------------------------------------------------------- the family
CHAINS = {
    "ppo": ["reinforce", "reinforce-baseline", "trpo", "ppo"], "a2c": ["reinforce", "reinforce-baseline", "a3c", "a2c"],
    "rloo": ["reinforce", "rloo"], "dapo": ["reinforce", "reinforce-baseline", "trpo", "ppo", "grpo", "dapo"],
    "ppo-lm": ["reinforce", "reinforce-baseline", "trpo", "ppo", "ppo-lm"],
}  # fmt: skip


def test_the_family_tree() -> None:
    known = all_methods()
    for name, chain in CHAINS.items():
        assert [m.name for m in known[name].chain()] == chain
    for name in ("dr-grpo", "dapo", "gspo", "cispo"):
        parent = known[name].parent
        assert parent is not None
        assert parent.name == "grpo"


@pytest.mark.parametrize("name", sorted(all_methods()))
def test_every_method_describes_itself(name: str) -> None:
    m = get_method(name)
    assert m.title
    assert m.paper
    assert m.year
    assert m.family
    assert find_spec(f"polopt.methods.{m.family}")
    assert m.claim
    assert "Not included" in m.doc
    assert (m.paper.split()[0] in m.doc) or not m.paper[0].isdigit()
    for path, part in m.parts().items():
        assert part.equation or part.kind in ("source", "decoder"), path


def test_methods_are_values() -> None:
    for m in all_methods().values():
        assert copy.deepcopy(m) == m
        assert m.but(m.name).parts() == m.parts()
