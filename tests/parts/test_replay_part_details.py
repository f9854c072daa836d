"""Critics on rows of several decisions by plain formulas; what parts of kept transitions ask for; slow copies, exploration."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from fake_nets import FakeNets
from torch import Tensor

from polopt.batch import Batch, Clock
from polopt.part import Can, Net
from polopt.parts.actor.offline import AdvantageWeighted, BehaviourCloned, NearestInData
from polopt.parts.actor.pathwise import DeterministicGradient, SoftActions, SoftGradient
from polopt.parts.after import HardCopy, Polyak
from polopt.parts.critic_q import (
    ExpectileQ,
    QOfActions,
    QRegression,
    QuantileRegression,
    StateRegression,
    asymmetric,
    quantile_huber,
)
from polopt.parts.explore import GaussianNoise, OrnsteinUhlenbeck
from polopt.parts.multiplier import DiscreteTemperature, Temperature
from polopt.parts.replay import Dataset, Ring
from polopt.parts.sampler.nothing import Nothing
from polopt.parts.target.deterministic import ClippedDouble, DeterministicTarget, OfData
from polopt.parts.target.soft import SoftEnumerated, SoftState, SoftTarget, SoftTruncated, StateValueTarget
from polopt.registry import get_method

torch.set_num_threads(1)
F64 = torch.float64
B, T = 2, 3
CONTINUOUS, DISCRETE, HELD = {Can.NETS, Can.REPARAM}, {Can.NETS, Can.ENUMERATE}, {Can.NETS}


# -------------------------------------------------------------------- what is asked for
ASKED: list[tuple[Any, set[Can], set[str]]] = [
    (DeterministicGradient(), CONTINUOUS, set()),
    (SoftGradient(), CONTINUOUS, set()),
    (SoftActions(), DISCRETE, set()),
    (BehaviourCloned(), CONTINUOUS, set()),
    (NearestInData(), CONTINUOUS, set()),
    (AdvantageWeighted(), CONTINUOUS, {"critic"}),
    (DeterministicTarget(), HELD, {"critic", "policy"}),
    (ClippedDouble(), HELD, {"critic", "policy"}),
    (OfData(), HELD, {"critic"}),
    (SoftTarget(), CONTINUOUS, {"critic"}),
    (SoftTruncated(), CONTINUOUS, {"critic"}),
    (SoftState(), CONTINUOUS, set()),
    (StateValueTarget(), HELD, {"value"}),
    (StateValueTarget(slow=False), HELD, set()),
    (SoftEnumerated(), DISCRETE, {"critic"}),
    (QRegression(), HELD, set()),
    (ExpectileQ(), HELD, set()),
    (QuantileRegression(), HELD, set()),
    (QOfActions(), DISCRETE, set()),
    (StateRegression(), HELD, set()),
    (Temperature(), HELD, set()),
    (DiscreteTemperature(), HELD, set()),
    (GaussianNoise(), {Can.REPARAM}, set()),
    (OrnsteinUhlenbeck(), {Can.REPARAM}, set()),
    (Ring(), set(), set()),
    (Dataset(), {Can.DATA}, set()),
    (Dataset(path="somewhere"), set(), set()),
]


@pytest.mark.parametrize(("part", "requires", "copies"), ASKED)
def test_capabilities_and_slow_copies_that_parts_ask_for(part: Any, requires: set[Can], copies: set[str]) -> None:
    assert part.requires == requires
    assert part.copies == copies
    assert getattr(part, "gamma", 0.99) == 0.99  # the discount of all these papers


#: defaults of the papers
DEFAULTS: list[tuple[Any, dict[str, Any]]] = [
    (BehaviourCloned(), {"alpha": 2.5, "pool": "first"}),  # TD3+BC, sec. 5
    (NearestInData(), {"alpha": 2.5, "beta": 2.0, "neighbours": 1}),  # PRDC, app. A
    (AdvantageWeighted(), {"beta": 3.0, "most": 100.0, "pool": "min"}),  # IQL on locomotion
    (ClippedDouble(), {"gamma": 0.99, "noise": 0.2, "clip": 0.5}),  # TD3, sec. 6.1
    (SoftTruncated(), {"gamma": 0.99, "drop": 2, "alpha": None}),  # TQC
    (SoftState(), {"alpha": None, "pool": "min"}),
    (StateValueTarget(), {"gamma": 0.99, "reward_scale": 1.0, "slow": True}),
    (QRegression(), {"members": 2, "scale": 1.0, "hidden": None}),  # TD3, SAC
    (ExpectileQ(), {"start": 0.9, "end": 0.5, "share": 1.0}),
    (QuantileRegression(), {"members": 5, "atoms": 25, "kappa": 1.0, "over": "sum"}),  # TQC
    (StateRegression(), {"tau": 0.5, "doubled": True, "scale": 0.5, "hidden": None}),  # SAC v1, eq. 5
    (Temperature(), {"entropy": None, "initial_alpha": 1.0}),
    (DiscreteTemperature(), {"entropy": None, "share": 0.98}),
    (Polyak(), {"of": (), "tau": 0.005}),
    (HardCopy(), {"of": (), "tau": 1.0, "every": 1000}),
    (GaussianNoise(), {"std": 0.1}),
    (OrnsteinUhlenbeck(), {"std": 0.2, "theta": 0.15, "dt": 1.0}),  # DDPG, sec. 7
]


@pytest.mark.parametrize(("part", "defaults"), DEFAULTS)
def test_defaults(part: Any, defaults: dict[str, Any]) -> None:
    assert {k: getattr(part, k) for k in defaults} == defaults


NETS: list[tuple[Any, Net]] = [
    (QRegression(), Net("critic", "obs-action", 1, 2, None)),
    (ExpectileQ(members=3, hidden=(4,)), Net("critic", "obs-action", 1, 3, (4,))),
    (QuantileRegression(), Net("critic", "obs-action", 25, 5, None)),
    (QOfActions(hidden=(7, 7)), Net("critic", "obs", "actions", 2, (7, 7))),
    (StateRegression(), Net("value", "obs", 1, 1, None)),
    (StateRegression(hidden=(5,)), Net("value", "obs", 1, 1, (5,))),
    (Temperature(), Net("temperature", "none", init=0.0, bounds=(-20.0, 5.0))),
    (Temperature(initial_alpha=0.2), Net("temperature", "none", init=math.log(0.2), bounds=(-20.0, 5.0))),
]


@pytest.mark.parametrize(("part", "net"), NETS)
def test_networks_that_parts_ask_for(part: Any, net: Net) -> None:
    assert part.networks == (net,)


@pytest.mark.parametrize("part", [QRegression(), ExpectileQ(), QuantileRegression(), QOfActions(), StateRegression()])
def test_a_critic_needs_a_target(part: Any) -> None:
    sac = get_method("sac")
    with_target = next(u for u in sac.updates if sac.slots(u).target is not None)
    assert part.validate(sac, with_target) is None
    ppo = get_method("ppo")
    assert str(part.validate(ppo, ppo.updates[0])).startswith("needs a target")


# -------------------------------------------------------------------- critics of rows
def rows(action: Tensor | None = None, fraction: float = 0.0) -> Batch:
    g = torch.Generator().manual_seed(1)
    obs = torch.randn(B, T, 2, generator=g, dtype=F64)
    action = torch.rand(B, T, 1, generator=g, dtype=F64) * 2 - 1 if action is None else action
    return Batch(mask=torch.ones(B, T, dtype=torch.bool), obs=obs, action=action, clock=Clock(0, fraction))


TARGET = torch.tensor([[0.5, -1.0, 2.0], [0.1, -0.3, -2.5]], dtype=F64)


def linear(w: Tensor) -> FakeNets:
    """Two critics w_e (s_0 + a_0) + e, and V(s) = w_0 s_1."""
    critics = [lambda o, a: w[0] * (o[:, 0] + a[:, 0]), lambda o, a: w[1] * (o[:, 0] + a[:, 0]) + 1]
    return FakeNets(nets={"critic": critics, "value": [lambda o, a: w[0] * o[:, 1]]})


def two_weights() -> Tensor:
    return torch.tensor([0.7, -1.2], dtype=F64, requires_grad=True)


def predicted(batch: Batch) -> Any:
    x = (batch.obs[..., 0] + batch.action[..., 0]).flatten().numpy()
    return np.stack([0.7 * x, -1.2 * x + 1])


def check(found: tuple[Tensor, dict[str, Tensor]], loss: Any, told: dict[str, float], *, factor: float = 1.0) -> None:
    assert found[0].requires_grad
    np.testing.assert_allclose(found[0].detach(), factor * loss.reshape(B, T), rtol=1e-12)
    assert not any(x.requires_grad for x in found[1].values())
    assert {k: float(x) for k, x in found[1].items()} == pytest.approx(told)


@pytest.mark.parametrize(("settings", "scale"), [({}, 1.0), ({"scale": 3.0}, 3.0)])
def test_squared_error_of_rows(settings: dict[str, float], scale: float) -> None:
    batch = rows()
    q, y = predicted(batch), TARGET.flatten().numpy()
    told = {"q": q.mean(), "td_error": np.abs(q - y).mean()}
    check(QRegression(**settings)(batch, linear(two_weights()), TARGET), np.square(q - y).sum(0), told, factor=scale)


@pytest.mark.parametrize(
    ("settings", "fraction", "tau"),
    [
        ({}, 0.0, 0.9),
        ({}, 0.5, 0.7),
        ({"start": 0.8, "end": 0.6, "share": 0.5}, 0.25, 0.7),
        ({"share": 0.5, "end": 0.3}, 0.75, 0.3),
    ],
)
@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_expectile_error_of_rows(settings: dict[str, float], fraction: float, tau: float, scale: float) -> None:
    batch = rows(fraction=fraction)
    q, y = predicted(batch), TARGET.flatten().numpy()
    weight = np.where(y - q < 0, 1 - tau, tau)
    told = {"q": q.mean(), "td_error": np.abs(q - y).mean()}
    part = ExpectileQ(scale=scale, **settings)
    check(part(batch, linear(two_weights()), TARGET), (weight * np.square(q - y)).sum(0), told, factor=scale)


@pytest.mark.parametrize("fraction", [0.0, 0.2, 0.5, 0.75, 1.0, 3.0])
def test_the_expectile_is_the_same_of_numbers_and_tensors(fraction: float) -> None:
    part = ExpectileQ(start=0.8, end=0.6, share=0.5)
    want = max(0.6, 0.8 - 0.4 * fraction)
    assert part.expectile(fraction) == pytest.approx(want)
    found = part.expectile(torch.tensor(fraction, dtype=F64))
    assert isinstance(found, Tensor)  # nothing is decided on its value: a compiled step goes on
    assert float(found) == pytest.approx(want)


def test_asymmetric_loss_and_its_slope_at_zero() -> None:
    u = torch.tensor([-2.0, 0.0, 0.5, 3.0], dtype=F64, requires_grad=True)
    loss = asymmetric(u, 0.8)
    np.testing.assert_allclose(loss.detach(), [0.2 * 4, 0, 0.8 * 0.25, 0.8 * 9])
    (g,) = torch.autograd.grad(loss.sum(), u)
    np.testing.assert_allclose(g, [0.2 * -4, 0, 0.8, 0.8 * 6])


@pytest.mark.parametrize(
    ("settings", "tau", "factor"),
    [
        ({}, 0.5, 1.0),
        ({"doubled": False}, 0.5, 0.5),
        ({"tau": 0.7, "scale": 1.0, "doubled": False}, 0.7, 1.0),
        ({"tau": 0.7}, 0.7, 1),
    ],
)
def test_value_regression_of_rows(settings: dict[str, Any], tau: float, factor: float) -> None:
    batch = rows()
    v, y = 0.7 * batch.obs[..., 1].flatten().numpy(), TARGET.flatten().numpy()
    weight = np.where(y - v < 0, 1 - tau, tau)
    part = StateRegression(**settings)
    check(part(batch, linear(two_weights()), TARGET), weight * np.square(y - v), {"v": v.mean()}, factor=factor)


def test_critics_of_discrete_actions_of_rows() -> None:
    action = torch.tensor([[0, 2, 1], [1, 0, 2]])
    g = torch.Generator().manual_seed(4)
    table = torch.randn(2, 6, 3, generator=g, dtype=F64).requires_grad_()
    nets = FakeNets(nets={"critic": [lambda o, a: table[0], lambda o, a: table[1]]})
    q, y = table.detach().numpy()[:, np.arange(6), action.flatten().numpy()], TARGET.flatten().numpy()
    told = {"q": q.mean(), "td_error": np.abs(q - y).mean()}
    for scale in (1.0, 3.0):
        part = QOfActions(scale=scale)
        check(part(rows(action), nets, TARGET), np.square(q - y).sum(0), told, factor=scale)
    np.testing.assert_allclose(QOfActions().value(rows(action), nets).detach(), q.mean(0))


def quantile_nets() -> tuple[Tensor, FakeNets]:
    table = (2 * torch.randn(2, 6, 4, generator=torch.Generator().manual_seed(7), dtype=F64)).requires_grad_()
    return table, FakeNets(nets={"critic": [lambda o, a: table[0], lambda o, a: table[1]]})


def by_pairs(theta: Any, y: Any, kappa: float) -> Any:
    """[E,N]: the definition, every atom [E,N,M] against every goal [N,K]."""
    u = y[None, :, None, :] - theta[..., None]
    huber = np.where(np.abs(u) <= kappa, u**2 / 2, kappa * (np.abs(u) - kappa / 2))
    level = (2 * np.arange(1, theta.shape[-1] + 1) - 1) / (2 * theta.shape[-1])
    return (np.abs(level[:, None] - (u < 0)) * huber).mean((2, 3))


QUANTILES: list[tuple[dict[str, Any], float, float]] = [
    ({}, 1.0, 1.0), ({"over": "mean"}, 1.0, 0.5), ({"kappa": 0.3, "scale": 3.0}, 0.3, 3.0), ({"kappa": 100.0}, 100.0, 1.0),
]  # fmt: skip


@pytest.mark.parametrize(("settings", "kappa", "factor"), QUANTILES)
@pytest.mark.parametrize("goals", [1, 3])
def test_quantile_error_of_rows(settings: dict[str, Any], kappa: float, factor: float, goals: int) -> None:
    table, nets = quantile_nets()
    y = TARGET[..., None] + torch.tensor([0.0, -1.5, 4.0], dtype=F64)[:goals]
    theta, flat = table.detach().numpy(), y.flatten(0, 1).numpy()
    loss = by_pairs(theta, flat, kappa).sum(0)
    told = {"q": theta.mean(), "td_error": np.abs(flat.mean(-1) - theta.mean(-1)).mean()}
    part = QuantileRegression(atoms=4, members=2, **settings)
    check(part(rows(), nets, y if goals > 1 else TARGET), loss, told, factor=factor)
    np.testing.assert_allclose(part.value(rows(), nets).detach(), theta.mean((0, 2)))


def test_atoms_at_goals_and_at_the_edges_of_the_quadratic() -> None:
    """On an edge the quadratic and the line agree, in value and in slope; at a goal neither side pulls."""
    y = np.array([[-1.0, -1.0, 0.5, 2.0], [0.0, 0.25, 0.25, 9.0]])
    theta = np.array([[[-1.0, 0.0, 0.5], [-0.75, 0.25, 1.25]], [[1.5, 3.0, -2.0], [10.0, 8.0, 9.0]]])
    for kappa in (0.5, 1.0):
        atoms = torch.from_numpy(theta).clone().requires_grad_()
        level = torch.tensor([1 / 6, 3 / 6, 5 / 6], dtype=F64)
        loss = quantile_huber(atoms, torch.from_numpy(y), level, kappa)
        np.testing.assert_allclose(loss.detach(), by_pairs(theta, y, kappa), rtol=1e-12)
        (g,) = torch.autograd.grad(loss.sum(), atoms)
        u = y[None, :, None, :] - theta[..., None]
        pull = np.abs(level.numpy()[:, None] - (u < 0)) * np.clip(u, -kappa, kappa)
        np.testing.assert_allclose(g, -pull.mean(-1) / 3, rtol=1e-12, atol=1e-15)


def test_the_value_of_a_decision_is_the_mean_over_members() -> None:
    batch = rows()
    np.testing.assert_allclose(QRegression().value(batch, linear(two_weights())).detach(), predicted(batch).mean(0))


# -------------------------------------------------------------------- slow copies
def test_slow_copies_move_by_hand() -> None:
    slow, now = [torch.tensor([1.0, -2.0]), torch.tensor([[4.0]])], [torch.tensor([3.0, 2.0]), torch.tensor([[0.0]])]
    part = Polyak(tau=0.25)
    moved = [part.move(s.clone(), n) for s, n in zip(slow, now, strict=True)]
    part.step(slow, now)
    for s, m, want in zip(slow, moved, ([1.5, -1.0], [[3.0]]), strict=True):
        assert s.tolist() == m.tolist() == want
    assert [x.tolist() for x in now] == [[3.0, 2.0], [[0.0]]]
    leaf = torch.tensor([1.0], requires_grad=True)
    far = torch.tensor([0.0])
    Polyak().step([far], [leaf])
    assert not far.requires_grad
    assert far.tolist() == pytest.approx([0.005])  # what TD3 and SAC use
    HardCopy().step([far], [leaf])
    assert far.tolist() == [1.0]


def test_when_slow_copies_move() -> None:
    assert [Polyak().due(k) for k in (1, 2, 999, 1000)] == [True] * 4
    assert [HardCopy(every=3).due(k) for k in range(1, 8)] == [False, False, True, False, False, True, False]
    assert [HardCopy().due(k) for k in (1, 999, 1000, 1001, 2000)] == [False, False, True, False, True]
    assert HardCopy().tau == 1.0
    assert Polyak().moves({"policy", "critic", "value"}) == ("critic", "policy", "value")
    assert Polyak(of=("value",)).moves({"policy", "critic", "value"}) == ("value",)


def test_every_slow_copy_is_moved_by_one_update() -> None:
    td3, ppo = get_method("td3"), get_method("ppo")
    critic, actor = td3.updates
    assert Polyak().validate(ppo, ppo.updates[0]) == "moves slow copies, and no part reads any"
    assert Polyak().validate(td3, actor) is None
    for names in (("critic",), ("policy", "critic")):
        assert Polyak(of=names).validate(td3, critic) is None
        assert Polyak(of=names).validate(td3, actor) is None
    assert Polyak(of=("critic", "value")).validate(td3, actor) == "moves the slow copy of 'value', which no part reads"
    found = str(HardCopy().validate(td3, critic))
    assert found.startswith("moves all slow copies, and update 'actor' moves that of 'critic' as well: ")
    assert found.endswith("say in updates.critic.after.copy.of which it moves, or set updates.actor.after none")


# -------------------------------------------------------------------- exploration
def test_exploration_noise_by_hand() -> None:
    action, state = np.array([[0.3, -0.9], [0.99, 0.0]], np.float32), np.array([[0.5, -0.2], [0.1, 0.4]], np.float32)
    fresh = np.array([False, True])
    n = np.random.default_rng(3).standard_normal((2, 2), dtype=np.float32)
    for part, std in ((GaussianNoise(), 0.1), (GaussianNoise(std=0.5), 0.5)):
        found, kept = part(action, state, fresh, np.random.default_rng(3))
        np.testing.assert_allclose(found, np.clip(action + std * n, -1, 1), rtol=1e-6)
        assert found.dtype == np.float32
        assert kept is state
        assert part.host
    for part, keep, size in ((OrnsteinUhlenbeck(), 0.85, 0.2), (OrnsteinUhlenbeck(std=0.6, theta=0.5, dt=0.25), 0.875, 0.3)):
        found, kept = part(action, state, fresh, np.random.default_rng(3))
        noise = keep * np.array([[0.5, -0.2], [0.0, 0.0]]) + size * n
        np.testing.assert_allclose(kept, noise, rtol=1e-6)
        np.testing.assert_allclose(found, np.clip(action + noise, -1, 1), rtol=1e-6)
        assert found.dtype == kept.dtype == np.float32
        assert part.host
    np.testing.assert_array_equal(state, np.array([[0.5, -0.2], [0.1, 0.4]], np.float32))


@pytest.mark.parametrize("part", [GaussianNoise(std=50.0), OrnsteinUhlenbeck(std=50.0)])
def test_actions_are_cut_on_both_sides(part: Any) -> None:
    zero = np.zeros((200, 1), np.float32)
    found, _ = part(zero, zero, np.zeros(200, bool), np.random.default_rng(0))
    assert (float(found.min()), float(found.max())) == (-1.0, 1.0)


# -------------------------------------------------------------------- sources
RINGS = [
    (Ring(size=8, batch=8), None),
    (Ring(size=7, batch=8), "source.size = 7 transitions cannot fill source.batch = 8"),
    (Ring(size=3, batch=1, n_step=3), None),
    (Ring(size=3, batch=1, n_step=4), "source.size = 3 transitions cannot hold a window of source.n_step = 4"),
]


@pytest.mark.parametrize(("ring", "message"), RINGS)
def test_a_ring_holds_a_batch_and_a_window(ring: Ring, message: str | None) -> None:
    sac = get_method("sac")
    assert ring.validate(sac, sac.updates[0]) == message


def test_sources_of_kept_transitions_say_what_does_not_fit() -> None:
    sac, ppo, offline = get_method("sac"), get_method("ppo"), get_method("td3-bc")
    assert Ring() == Ring(size=1_000_000, batch=256, start=10_000, utd=1.0, n_step=1, storage="memory")  # TD3, SAC
    assert Dataset() == Dataset(path="", batch=256, n_step=1, rounds=100, normalize_obs=False)
    for part in (Ring(), Dataset()):
        assert "ppo has none" in str(part.validate(ppo, ppo.updates[0]))
    assert Dataset().validate(offline, offline.updates[0]) is None
    assert "set sampler 'nothing'" in str(Dataset().validate(sac, sac.updates[0]))
    assert "collects nothing" in str(Ring().validate(offline, offline.updates[0]))
    assert offline.sampler.name == Nothing.name
    assert Ring.host
    assert Dataset.host
