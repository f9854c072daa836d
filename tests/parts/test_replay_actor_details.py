"""Actors and targets on rows of several decisions, by plain formulas: shapes, members that are read, gradients that are cut."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from fake_nets import FakeNets
from torch import Tensor

from polopt.batch import Batch
from polopt.draws import Draws
from polopt.errors import CallError
from polopt.parts.actor.offline import AdvantageWeighted, BehaviourCloned, NearestInData
from polopt.parts.actor.pathwise import DeterministicGradient, SoftActions, SoftGradient
from polopt.parts.multiplier import DiscreteTemperature, Temperature, lacks_temperature, temperature
from polopt.parts.target.deterministic import ClippedDouble, DeterministicTarget, OfData
from polopt.parts.target.soft import SoftEnumerated, SoftState, SoftTarget, SoftTruncated, StateValueTarget
from polopt.registry import get_method

torch.set_num_threads(1)
F64 = torch.float64
B, T, A = 2, 3, 2
N = B * T
ALPHA = 0.4


def rows(*, discrete: bool = False, **columns: Any) -> Batch:
    """Two rows of three decisions with two reward channels; the second decision of the first row ends its episode."""
    g = torch.Generator().manual_seed(5)
    action = torch.tensor([[2, 0, 1], [1, 1, 0]]) if discrete else torch.rand(B, T, A, generator=g, dtype=F64) * 2 - 1
    made: dict[str, Any] = {
        "mask": torch.ones(B, T, dtype=torch.bool),
        "reward": torch.randn(B, T, 2, generator=g, dtype=F64),
        "terminated": torch.tensor([[False, True, False], [False, False, True]]),
        "truncated": torch.tensor([[False, False, True], [True, False, False]]),
        "obs": torch.randn(B, T, 3, generator=g, dtype=F64),
        "next_obs": torch.randn(B, T, 3, generator=g, dtype=F64),
        "action": action,
        "row": {"steps": torch.tensor([1.0, 3.0], dtype=F64)},
    }
    return Batch(**{**made, **columns})


@dataclass
class Weighted(FakeNets):
    """Everything depends on one weight, so that a gradient shows who was asked with it."""

    w: Tensor = field(default_factory=lambda: torch.tensor(0.8, dtype=F64, requires_grad=True))

    def score(self, obs: Tensor, action: Tensor) -> Tensor:
        return -self.w * (action - 0.1 * obs[:, :1]).square().sum(-1)


def nets(**more: Any) -> Weighted:
    """Two critics Q_e(s, a) = w (s_0 + k a_0 - a_1^2 + c); V(s) = w s_1; slow copies are 1 higher."""
    out = Weighted(actions=A, numbers={"temperature": torch.tensor(math.log(ALPHA), dtype=F64, requires_grad=True)})

    def critic(k: float, c: float) -> Callable[[Tensor, Tensor | None], Tensor]:
        def q(o: Tensor, a: Tensor | None) -> Tensor:
            if a is None:  # values of three discrete actions
                return out.w * torch.stack([o[:, 0] + k, o[:, 1] * k, o[:, 2] + c], -1)
            return out.w * (o[:, 0] + k * a[:, 0] - a[:, 1] ** 2 + c)

        return q

    out.nets = {"critic": [critic(1.0, 0.0), critic(-2.0, 0.3)], "value": [lambda o, a: out.w * o[:, 1]]}
    out.slow = {"critic": [critic(1.0, 1.0), critic(-2.0, 1.3)], "value": [lambda o, a: out.w * o[:, 1] + 1]}
    out.policy = lambda o: (out.w * o[:, :A]).tanh()
    out.slow_policy = lambda o: (2 * out.w * o[:, :A]).tanh()
    out.sample = lambda o, eps: ((out.w * o[:, :A] + 0.3 * eps).tanh(), -eps.square().sum(-1) - out.w)
    out.table = lambda o: (out.w * o).log_softmax(-1)
    for name, value in more.items():
        setattr(out, name, value)
    return out


def q(o: Any, a: Any, k: float, c: float) -> Any:
    """A critic of `nets` in NumPy, or of tensors."""
    return 0.8 * (o[:, 0] + k * a[:, 0] - a[:, 1] ** 2 + c)


def flat(x: Tensor) -> Any:
    return x.flatten(0, 1).numpy()


def slope(loss: Tensor, w: Tensor) -> float:
    (g,) = torch.autograd.grad(loss.sum(), w, allow_unused=True)
    return 0.0 if g is None else float(g)


def tells(told: dict[str, Tensor]) -> dict[str, float]:
    assert not any(x.requires_grad for x in told.values())
    return {k: float(x) for k, x in told.items()}


EPS = torch.tensor([[0.5, -1.0], [0.0, 2.0], [1.5, 0.2], [-0.3, 0.7], [0.9, -0.4], [-2.0, 1.0]], dtype=F64)


# -------------------------------------------------------------------- actors
def test_deterministic_gradient_of_rows() -> None:
    batch, made = rows(), nets()
    loss = DeterministicGradient()(batch, made)
    o = flat(batch.obs)
    np.testing.assert_allclose(loss.detach(), -q(o, np.tanh(0.8 * o[:, :A]), 1.0, 0.0).reshape(B, T), rtol=1e-12)
    least = DeterministicGradient(pool="min")(batch, made)
    assert (least >= loss).all()


@pytest.mark.parametrize(("alpha", "used"), [(None, ALPHA), (0.0, 0.0), (1.3, 1.3)])
def test_soft_gradient_of_rows(alpha: float | None, used: float) -> None:
    batch, made = rows(), nets()
    loss, told = SoftGradient(alpha=alpha)(batch, made, Draws.given([EPS]))
    o, eps = flat(batch.obs), EPS.numpy()
    a, logp = np.tanh(0.8 * o[:, :A] + 0.3 * eps), -np.square(eps).sum(-1) - 0.8
    value = np.minimum(q(o, a, 1.0, 0.0), q(o, a, -2.0, 0.3))
    np.testing.assert_allclose(loss.detach(), (used * logp - value).reshape(B, T), rtol=1e-12)
    np.testing.assert_allclose(told["logp@drawn"], logp.reshape(B, T), rtol=1e-12)
    assert not told["logp@drawn"].requires_grad
    assert slope(loss, made.numbers["temperature"]) == 0.0  # the temperature has an update of its own


@pytest.mark.parametrize(("alpha", "used"), [(None, ALPHA), (1.3, 1.3)])
def test_soft_enumerated_actor_of_rows(alpha: float | None, used: float) -> None:
    batch, made = rows(discrete=True), nets()
    logits = torch.randn(N, 3, generator=torch.Generator().manual_seed(3), dtype=F64).requires_grad_()
    made.table = lambda o: logits.log_softmax(-1)
    loss, told = SoftActions(alpha=alpha)(batch, made, Draws())
    o = flat(batch.obs)
    one = 0.8 * np.stack([o[:, 0] + 1, o[:, 1], o[:, 2]], -1)
    two = 0.8 * np.stack([o[:, 0] - 2, -2 * o[:, 1], o[:, 2] + 0.3], -1)
    logp = logits.detach().log_softmax(-1).numpy()
    by_hand = (np.exp(logp) * (used * logp - np.minimum(one, two))).sum(-1)
    np.testing.assert_allclose(loss.detach(), by_hand.reshape(B, T), rtol=1e-12)
    np.testing.assert_allclose(told["logp@drawn"], (np.exp(logp) * logp).sum(-1).reshape(B, T), rtol=1e-12)
    assert not told["logp@drawn"].requires_grad
    assert slope(loss, made.w) == 0.0  # critics are constants
    assert slope(SoftActions()(batch, made, Draws())[0], made.numbers["temperature"]) == 0.0


def test_cloning_of_rows_weighs_the_critic_as_a_constant() -> None:
    batch, made = rows(), nets()
    loss, told = BehaviourCloned()(batch, made)
    o, a = flat(batch.obs), flat(batch.action)
    mu = np.tanh(0.8 * o[:, :A])
    value, apart = q(o, mu, 1.0, 0.0), np.square(mu - a).mean(-1)
    lam = 2.5 / np.abs(value).mean()
    np.testing.assert_allclose(loss.detach(), (apart - lam * value).reshape(B, T), rtol=1e-12)
    assert tells(told) == pytest.approx({"clone_distance": apart.mean(), "q_weight": lam})
    w = torch.tensor(0.8, dtype=F64, requires_grad=True)
    s = batch.obs.flatten(0, 1)
    acts = (w * s[:, :A]).tanh()
    again = (acts - batch.action.flatten(0, 1)).square().mean(-1) - lam * w * q(s, acts, 1.0, 0.0) / 0.8
    assert slope(loss, made.w) == pytest.approx(slope(again, w), rel=1e-10)


@pytest.mark.parametrize(("size", "weight"), [(1e-9, 2.5e8), (4e-8, 6.25e7)])
def test_tiny_values_are_weighed_by_at_most_alpha_over_1e_8(size: float, weight: float) -> None:
    tiny = nets()
    tiny.nets = {"critic": [lambda o, a: torch.full((len(o),), -size, dtype=F64)]}
    assert tells(BehaviourCloned()(rows(), tiny)[1])["q_weight"] == pytest.approx(weight)


def test_nearest_of_rows_is_searched_among_what_networks_see() -> None:
    """Both the tree and the question are standardised, and beta weighs states only."""
    batch, made = rows(), nets()
    made.standardised = lambda obs: 10 * obs  # type: ignore[method-assign]
    g = torch.Generator().manual_seed(2)
    held = {"obs": torch.randn(30, 3, generator=g, dtype=F64), "action": torch.rand(30, A, generator=g, dtype=F64) * 2 - 1}
    o = flat(batch.obs)
    mu = np.tanh(0.8 * o[:, :A])
    away = np.square(held["obs"].numpy() * 10 - 10 * o[:, None]).sum(-1)
    near = np.square(held["action"].numpy() - mu[:, None]).sum(-1)
    value = q(o, mu, 1.0, 0.0)
    lam = 2.5 / np.abs(value).mean()
    for beta, count in ((2.0, 1), (0.03, 1), (0.03, 3)):
        part = NearestInData(beta=beta, neighbours=count)
        if (beta, count) == (2.0, 1):
            assert part == NearestInData()
        loss, told = part(batch, made, part.build(held, lambda obs: 10 * obs))
        found = np.argsort(beta**2 * away + near, 1)[:, :count]
        goal = held["action"].numpy()[found].mean(1)
        apart = np.square(mu - goal).mean(-1)
        np.testing.assert_allclose(loss.detach(), (apart - lam * value).reshape(B, T), rtol=1e-9)
        assert tells(told) == pytest.approx({"clone_distance": apart.mean(), "q_weight": lam})


def test_tensors_that_numpy_does_not_take_as_they_are_are_searched_too() -> None:
    """A gradient stands in for a GPU: both keep a tensor from being read by NumPy without a copy."""
    batch, g = rows(), torch.Generator().manual_seed(2)
    held = {"obs": torch.randn(30, 3, generator=g, dtype=F64), "action": torch.rand(30, A, generator=g, dtype=F64) * 2 - 1}
    part = NearestInData()
    assert part.host
    plain, _ = part(batch, nets(), part.build(held, lambda obs: obs))
    held = {k: v.clone().requires_grad_() for k, v in held.items()}
    batch = replace(batch, obs=batch.obs.clone().requires_grad_())
    torch.testing.assert_close(part(batch, nets(), part.build(held, lambda obs: obs))[0], plain, rtol=0, atol=0)


def test_as_many_neighbours_as_there_are_data_and_no_more() -> None:
    held = {"obs": torch.zeros(3, 3, dtype=F64), "action": torch.tensor([[0.1, 0], [0.2, 0], [0.6, 0]], dtype=F64)}
    part = NearestInData(neighbours=3, alpha=0.0)
    told = part(rows(), nets(policy=lambda o: torch.full((N, A), 0.3, dtype=F64)), part.build(held, lambda obs: obs))[1]
    assert float(told["clone_distance"]) == pytest.approx((0.0 + 0.09) / 2)
    with pytest.raises(CallError, match=r"actor.neighbours = 4: the dataset holds 3 transitions"):
        NearestInData(neighbours=4).build(held, lambda obs: obs)


def test_weighted_cloning_of_rows_moves_the_policy_alone() -> None:
    batch, made = rows(), nets()
    loss, told = AdvantageWeighted()(batch, made)
    o, a = flat(batch.obs), flat(batch.action)
    gain = np.minimum(q(o, a, 1.0, 1.0), q(o, a, -2.0, 1.3)) - 0.8 * o[:, 1]
    weight = np.minimum(np.exp(3.0 * gain), 100.0)
    assert (weight == 100).any()
    assert (weight < 100).any()
    apart = np.square(a - 0.1 * o[:, :1]).sum(-1)
    np.testing.assert_allclose(loss.detach(), (weight * 0.8 * apart).reshape(B, T), rtol=1e-12)
    assert slope(loss, made.w) == pytest.approx((weight * apart).sum())
    assert tells(told) == pytest.approx({"weight": weight.mean()})


# -------------------------------------------------------------------- targets
def after(batch: Batch, gamma: float = 0.99) -> tuple[Any, Any, Any]:
    """Rewards, discounts and next observations by hand: the first row holds single steps, the second ones of three."""
    going = np.array([1, 0, 1, 1, 1, 0])  # a truncated decision goes on
    return flat(batch.reward).sum(-1), going * gamma ** np.array([1, 1, 1, 3, 3, 3]), flat(batch.next_obs)


def soft_draw(o: Any) -> tuple[Any, Any]:
    return np.tanh(0.8 * o[:, :A] + 0.3 * EPS.numpy()), -np.square(EPS.numpy()).sum(-1) - 0.8


def by_hand(name: str, batch: Batch) -> Any:
    r, gamma, o = after(batch)
    now, a = flat(batch.obs), flat(batch.action)
    mode, (drawn, logp) = np.tanh(1.6 * o[:, :A]), soft_draw(o)
    if name == "deterministic":
        return r + gamma * q(o, mode, 1.0, 1.0)
    if name == "clipped-double":  # deviation 0.2, cut at 0.5
        shaken = mode + np.clip(0.2 * EPS.numpy() * 3, -0.5, 0.5)
        assert shaken.min() < -1
        assert shaken.max() > 1
        acts = np.clip(shaken, -1, 1)
        return r + gamma * np.minimum(q(o, acts, 1.0, 1.0), q(o, acts, -2.0, 1.3))
    if name == "of-data":
        return np.minimum(q(now, a, 1.0, 1.0), q(now, a, -2.0, 1.3))
    if name == "soft":
        return r + gamma * (np.minimum(q(o, drawn, 1.0, 1.0), q(o, drawn, -2.0, 1.3)) - ALPHA * logp)
    if name == "soft-state":
        drawn, logp = soft_draw(now)
        return np.minimum(q(now, drawn, 1.0, 0.0), q(now, drawn, -2.0, 0.3)) - ALPHA * logp
    if name == "state-value":
        return r + gamma * (0.8 * o[:, 1] + 1)
    assert name == "soft-enumerated"
    probs = np.exp(0.8 * o) / np.exp(0.8 * o).sum(-1, keepdims=True)
    one = 0.8 * np.stack([o[:, 0] + 1, o[:, 1], o[:, 2] + 1], -1)
    two = 0.8 * np.stack([o[:, 0] - 2, -2 * o[:, 1], o[:, 2] + 1.3], -1)
    return r + gamma * (probs * (np.minimum(one, two) - ALPHA * np.log(probs))).sum(-1)


TARGETS: list[tuple[Any, bool]] = [
    (DeterministicTarget(), False), (ClippedDouble(), True), (OfData(), False), (SoftTarget(), True), (SoftState(), True),
    (StateValueTarget(), False), (SoftEnumerated(), True),
]  # fmt: skip


@pytest.mark.parametrize(("part", "draws"), TARGETS, ids=[p.name for p, _ in TARGETS])
def test_targets_of_rows(part: Any, draws: bool) -> None:
    """With each part's defaults: the discount 0.99, the trained temperature, the smaller of two critics."""
    batch = rows()
    given = Draws.given([EPS * 3 if part.name == "clipped-double" else EPS])
    y = part(batch, nets(), given) if draws else part(batch, nets())
    np.testing.assert_allclose(y.detach(), by_hand(part.name, batch).reshape(B, T), rtol=1e-12)


def test_a_fixed_temperature_and_other_pools_of_targets() -> None:
    batch, made = rows(), nets()
    r, gamma, o = after(batch, 0.9)
    drawn, logp = soft_draw(o)
    y = SoftTarget(gamma=0.9, alpha=2.0, pool="mean")(batch, made, Draws.given([EPS])).detach()
    both = (q(o, drawn, 1.0, 1.0) + q(o, drawn, -2.0, 1.3)) / 2
    np.testing.assert_allclose(y, (r + gamma * (both - 2 * logp)).reshape(B, T), rtol=1e-12)
    y = StateValueTarget(gamma=0.9, slow=False, reward_scale=3.0)(batch, made).detach()
    np.testing.assert_allclose(y, (3 * r + gamma * 0.8 * o[:, 1]).reshape(B, T), rtol=1e-12)


@pytest.mark.parametrize("drop", [0, 1])
def test_truncated_atoms_of_rows(drop: int) -> None:
    batch, made = rows(), nets()
    made.slow = {"critic": [lambda o, a: torch.stack([o[:, 0], 2 * a[:, 0], o[:, 2]], -1),
                            lambda o, a: torch.stack([o[:, 1], a[:, 1], -o[:, 2]], -1)]}  # fmt: skip
    r, gamma, o = after(batch)
    a, logp = soft_draw(o)
    atoms = np.sort(np.stack([o[:, 0], 2 * a[:, 0], o[:, 2], o[:, 1], a[:, 1], -o[:, 2]], -1), -1)[:, : 6 - 2 * drop]
    y = SoftTruncated(drop=drop)(batch, made, Draws.given([EPS])).detach()
    want = r[:, None] + gamma[:, None] * (atoms - ALPHA * logp[:, None])
    np.testing.assert_allclose(y, want.reshape(B, T, 6 - 2 * drop), rtol=1e-12)
    if drop == 0:
        made.slow = {"critic": [lambda o, a: o, lambda o, a: o]}
        assert SoftTruncated()(batch, made, Draws.given([EPS])).shape == (B, T, 2)  # two of three left out, per member


@pytest.mark.parametrize(
    ("drop", "message"),
    [(1, None), (24, None), (25, "target.drop = 25 of critic.atoms = 25 atoms per member leaves none"), (26, "leaves none")],
)
def test_some_atoms_must_remain(drop: int, message: str | None) -> None:
    method = get_method("tqc")
    found = SoftTruncated(drop=drop).validate(method, method.updates[0])
    assert found is None if message is None else message in str(found)


# -------------------------------------------------------------------- temperatures
@pytest.mark.parametrize(("log_alpha", "bounded"), [(-21.0, -20.0), (-20.0, -20.0), (0.7, 0.7), (5.0, 5.0), (6.0, 5.0)])
def test_temperature_is_read_within_bounds_and_without_gradient(log_alpha: float, bounded: float) -> None:
    made = nets(numbers={"temperature": torch.tensor(log_alpha, dtype=F64, requires_grad=True)})
    found = temperature(None, made)
    assert isinstance(found, Tensor)
    assert not found.requires_grad
    assert float(found) == pytest.approx(math.exp(bounded))
    assert temperature(0.25, made) == 0.25
    told = Temperature()(rows(), made, Draws.given([EPS]))[1]
    assert tells(told)["temperature"] == pytest.approx(math.exp(bounded))


@pytest.mark.parametrize(("entropy", "goal"), [(None, -2.0), (0.0, 0.0), (1.5, 1.5)])
def test_temperature_of_rows_draws_for_itself(entropy: float | None, goal: float) -> None:
    batch, made = rows(), nets()
    loss, told = Temperature(entropy=entropy)(batch, made, Draws.given([EPS]))
    logp = soft_draw(flat(batch.obs))[1]
    np.testing.assert_allclose(loss.detach(), (-math.log(ALPHA) * (logp + goal)).reshape(B, T), rtol=1e-12)
    assert slope(loss, made.numbers["temperature"]) == pytest.approx(-(logp + goal).sum())
    assert slope(Temperature()(batch, made, Draws.given([EPS]))[0], made.w) == 0.0
    assert tells(told) == pytest.approx({"temperature": ALPHA, "entropy": -logp.mean()})


def test_temperature_takes_the_draws_of_the_actor_as_constants() -> None:
    drawn = torch.arange(6.0, dtype=F64).view(B, T).requires_grad_()
    made = nets(sample=None)
    loss, told = Temperature()(rows().adding({"logp@drawn": drawn}), made, Draws())
    np.testing.assert_allclose(loss.detach(), -math.log(ALPHA) * (drawn.detach() - 2))
    assert slope(loss, drawn) == 0.0
    assert tells(told)["entropy"] == -2.5


@pytest.mark.parametrize(("settings", "share"), [({}, 0.98), ({"share": 0.5}, 0.5), ({"entropy": 0.7}, 0.7 / math.log(3))])
def test_discrete_temperature_of_rows(settings: dict[str, float], share: float) -> None:
    batch, made = rows(discrete=True), nets(actions=3)
    loss, told = DiscreteTemperature(**settings)(batch, made, Draws())
    o = flat(batch.obs)
    probs = np.exp(0.8 * o) / np.exp(0.8 * o).sum(-1, keepdims=True)
    entropy = -(probs * np.log(probs)).sum(-1)
    want = -math.log(ALPHA) * (-entropy + share * math.log(3))
    np.testing.assert_allclose(loss.detach(), want.reshape(B, T), rtol=1e-12)
    assert slope(DiscreteTemperature()(batch, made, Draws())[0], made.w) == 0.0
    mean = entropy.mean()
    assert tells(told) == pytest.approx({"temperature": ALPHA, "entropy": mean, "entropy_share": mean / math.log(3)})
    handed = DiscreteTemperature()(batch.adding({"logp@drawn": torch.full((B, T), -0.3, dtype=F64)}), made, Draws())[1]
    assert tells(handed)["entropy"] == pytest.approx(0.3)


def test_the_entropy_of_one_action_has_no_share() -> None:
    made = nets(actions=1, table=lambda o: torch.zeros(N, 1, dtype=F64))
    loss, told = DiscreteTemperature()(rows(discrete=True), made, Draws())
    assert tells(told)["entropy_share"] == 0.0
    assert float(loss.detach().abs().max()) == 0.0
    made = nets(actions=2, table=lambda o: torch.full((N, 2), -math.log(2), dtype=F64))
    told = DiscreteTemperature()(rows(discrete=True), made, Draws())[1]
    assert tells(told)["entropy_share"] == pytest.approx(1.0)


def test_a_temperature_is_given_or_trained() -> None:
    sac, none = get_method("sac"), get_method("sac-v1")
    assert lacks_temperature(None, sac) is None
    assert lacks_temperature(0.0, none) is None
    assert "set alpha" in str(lacks_temperature(None, none))
    trained, fixed = SimpleNamespace(terms=("actor", "multiplier")), SimpleNamespace(terms=("actor",))
    for updates, part, trains in (
        ([trained], Temperature(), True),
        ([fixed, trained], Temperature(), True),
        ([fixed], Temperature(), False),  # the part is there, and no update has it as a term
        ([trained], None, False),
        ([], Temperature(), False),
    ):
        method: Any = SimpleNamespace(updates=updates, slots=lambda u, part=part: SimpleNamespace(multiplier=part))
        assert (lacks_temperature(None, method) is None) == trains
    for soft in (SoftTarget, SoftState, SoftGradient):
        assert "has no temperature" in str(soft().validate(none, none.updates[0]))
        assert soft(alpha=0.5).validate(none, none.updates[0]) is None
        assert soft().validate(sac, sac.updates[0]) is None
    tqc = get_method("tqc")
    assert SoftTruncated().validate(tqc, tqc.updates[0]) is None
