"""Flow policies: integration and losses against independent formulas, what is recorded, saving, and what is refused."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import polopt
from polopt.batch import Batch, Final
from polopt.errors import CallError, Misfit, PoloptError
from polopt.nets.flow import SCALE, embed
from polopt.overrides import resolve
from polopt.policies import control
from polopt.policies.flow import FlowPolicy, Pairs, pairs_of
from polopt.policies.mlp import MLPPolicy
from polopt.policies.mlp_spaces import Action, Observation
from polopt.registry import get_method
from polopt.settings import PolicySettings
from polopt.stats import NOW, OLD, REF
from polopt.tree import load_tree, save_tree

OBS = Observation("box", (3,), "<f4")
BOX = Action("box", (2,), "<f4", low=(-1.0, -2.0), high=(1.0, 4.0))
OPEN = Action("box", (2,), "<f4", low=(-math.inf, 0.0), high=(math.inf, math.inf))
DISCRETE = Action("discrete", (), "<i8", (4,), (0,))


def make(value: bool = True, pairs: Pairs | None = None, action: Action = BOX, seed: int = 0, **changes: Any) -> FlowPolicy:
    settings = replace(PolicySettings(hidden=(16, 12), activation="silu"), **changes)
    policy = FlowPolicy(OBS, action, settings, {"value"} if value else (), seed, pairs or Pairs(samples=5))
    with torch.no_grad():  # a field that matters
        policy.policy.head.weight.mul_(8)
        policy.policy.head.bias.add_(0.3)
    return policy


def rollout(policy: FlowPolicy, b: int = 3, t: int = 4, seed: int = 0) -> Batch:
    rng = np.random.default_rng(seed)
    obs = rng.standard_normal((b, t, 3)).astype(np.float32)
    action = np.stack([policy.act(obs[i], rng)[0] for i in range(b)])
    final = Final(torch.tensor([[0, 1], [2, t - 1]]), torch.from_numpy(rng.standard_normal((2, 3)).astype(np.float32)))
    batch = Batch(mask=torch.ones(b, t, dtype=torch.bool), obs=torch.from_numpy(obs), action=torch.from_numpy(action), final=final)
    return batch.adding(policy.record(batch, torch.Generator().manual_seed(seed)))


def field(policy: FlowPolicy, obs: Tensor, x: Tensor, t: Tensor) -> Tensor:
    """v(o, x, t) written plainly: obs [n,D], x [n,A], t [n]."""
    h = torch.cat([obs, x, embed(t)], -1)
    for layer in policy.policy.trunk:
        h = layer(h)
    return SCALE * policy.policy.head(h)


# -------------------------------------------------------------------- acting
@pytest.mark.parametrize("activation", ["tanh", "relu", "elu", "silu"])
@pytest.mark.parametrize(("hidden", "normalize"), [((16, 12), True), ((8,), False), ((), False)])
def test_acting_in_numpy_is_euler_integration_of_the_field(hidden: tuple[int, ...], normalize: bool, activation: str) -> None:
    policy = make(hidden=hidden, normalize_obs=normalize, activation=activation, flow_steps=7, flow_noise=0.1)
    rng = np.random.default_rng(0)
    obs = (3 * rng.standard_normal((6, 3)) + 1).astype(np.float32)
    if policy.moments is not None:
        policy.moments.update(torch.from_numpy(obs))
    noise = policy.head.noise(rng, (6,))
    assert noise.shape == (6, 4)
    x, seen = torch.from_numpy(noise[:, :2]), torch.from_numpy(obs)
    seen = seen if policy.moments is None else policy.moments(seen)
    with torch.no_grad():
        for k in range(7):
            x = x - field(policy, seen, x, torch.full((6,), 1 - k / 7)) / 7
    np.testing.assert_allclose(policy.actor()(obs, noise), x.numpy() + 0.1 * noise[:, 2:], atol=2e-6)


def test_time_is_embedded_by_four_frequencies() -> None:
    t = torch.tensor([0.3])
    expected = [f(2**j * 0.3) for f in (math.cos, math.sin) for j in range(4)]
    assert embed(t)[0].tolist() == pytest.approx(expected, abs=1e-6)


def test_greedy_actions_start_from_the_same_drawn_noise_and_are_not_perturbed() -> None:
    policy = make(flow_noise=5.0)
    obs = np.zeros((200, 3), np.float32)
    first, again = policy.actor()(obs, None), policy.actor()(obs, None)
    np.testing.assert_array_equal(first, again)
    assert 0.1 < first.std() < 3  # not one point, and without the noise of deviation 5
    assert policy.predict(np.zeros((50, 3)), greedy=False).shape == (50, 2)


def test_bounded_actions_are_squashed_and_others_passed_on() -> None:
    out = make().head.outward(np.array([[0.0, 0.0], [0.5, -1.0], [50.0, 50.0]], np.float32))
    np.testing.assert_allclose(out, [[0, 1], [math.tanh(0.5), 1 + 3 * math.tanh(-1)], [1, 4]], rtol=1e-6)
    np.testing.assert_allclose(make(action=OPEN).head.outward(np.array([[-7.0, -3.0]])), [[-7, 0]])


# -------------------------------------------------------------------- statistics
@pytest.mark.parametrize("form", ["noise", "velocity"])
@pytest.mark.parametrize("normalize", [False, True])
def test_losses_are_those_of_flow_matching(form: Any, normalize: bool) -> None:
    policy = make(pairs=Pairs(samples=5, form=form), normalize_obs=normalize)
    batch = rollout(policy)
    policy.remember(batch)
    found = policy.evaluate(batch, frozenset({"cfm"}), OLD)["cfm"]
    assert found.shape == (3, 4, 5)
    for b, t, i in np.ndindex(3, 4, 5):
        eps, s = batch.stats["cfm_noise@behaviour"][b, t, i], batch.stats["cfm_time@behaviour"][b, t, i]
        a, o = batch.action[b, t], batch.obs[b, t] if policy.moments is None else policy.moments(batch.obs[b, t])
        x = s * eps + (1 - s) * a
        v = field(policy, o[None], x[None], s[None])[0]
        error = v - (eps - a) if form == "velocity" else eps - ((x - s * v) + v)  # the released code's words
        assert float(found[b, t, i]) == pytest.approx(float(error.square().mean().detach()), abs=2e-5)


@pytest.mark.identity("fpo", "the loss of noise is that of velocity, weighted by (1 - t)^2")
def test_forms_of_the_loss_differ_by_a_weight() -> None:
    policy = make(pairs=Pairs(samples=5, form="velocity"))
    batch = rollout(policy)
    velocity = policy.evaluate(batch, frozenset({"cfm"}), OLD)["cfm"]
    policy.pairs = replace(policy.pairs, form="noise")
    noise = policy.evaluate(batch, frozenset({"cfm"}), OLD)["cfm"]
    torch.testing.assert_close(noise, (1 - batch.stats["cfm_time@behaviour"]).square() * velocity)
    assert float((noise - velocity).abs().max()) > 0.01


def test_a_field_that_is_the_true_velocity_has_no_loss() -> None:
    policy = make(pairs=Pairs(samples=4, form="velocity"), hidden=())
    action = torch.tensor([0.7, -0.2])
    batch = Batch(mask=torch.ones(1, 1, dtype=torch.bool), obs=torch.zeros(1, 1, 3), action=action[None, None])
    time = torch.tensor([1.0, 1.0, 1.0, 1.0])[None, None]  # x_1 = eps, so that v = x - a is linear in x
    batch = batch.adding({"cfm_noise@behaviour": torch.randn(1, 1, 4, 2), "cfm_time@behaviour": time})
    with torch.no_grad():
        policy.policy.head.weight.zero_()
        policy.policy.head.weight[:, 3:5] = torch.eye(2) / SCALE
        policy.policy.head.bias.copy_(-action / SCALE)
    assert float(policy.evaluate(batch, frozenset({"cfm"}), OLD)["cfm"].max()) < 1e-12


def test_values_are_those_of_an_mlp_policy_of_the_same_seed() -> None:
    policy = make()
    other = MLPPolicy(OBS, BOX, PolicySettings(hidden=(16, 12), activation="silu"), {"value"}, 0)
    batch, want = rollout(policy), frozenset({"value", "value_next"})
    mine, theirs = policy.evaluate(batch, want, OLD), other.evaluate(batch, want, OLD)
    assert mine.keys() == want
    for name in want:
        torch.testing.assert_close(mine[name], theirs[name], rtol=0, atol=0)


def test_gradients_reach_the_field_at_the_present_parameters_alone() -> None:
    policy = make()
    batch = rollout(policy)
    assert not policy.evaluate(batch, frozenset({"cfm"}), OLD)["cfm"].requires_grad
    policy.evaluate(batch, frozenset({"cfm"}), NOW)["cfm"].mean().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in policy.policy.parameters())


@pytest.mark.parametrize(("times", "steps"), [("grid", 4), ("uniform", 4)])
def test_pairs_are_drawn_at_the_samplers_times_or_uniformly(times: Any, steps: int) -> None:
    policy = make(pairs=Pairs(samples=300, times=times), flow_steps=steps)
    batch = Batch(mask=torch.ones(5, 2, dtype=torch.bool))
    drawn = [policy.record(batch, torch.Generator().manual_seed(s)) for s in (0, 0, 1)]
    time, noise = drawn[0]["cfm_time@behaviour"], drawn[0]["cfm_noise@behaviour"]
    assert noise.shape == (5, 2, 300, 2)
    assert float(noise.std()) == pytest.approx(1, abs=0.05)
    assert all(torch.equal(drawn[0][k], drawn[1][k]) and not torch.equal(drawn[0][k], drawn[2][k]) for k in drawn[0])
    if times == "grid":
        assert sorted({*time.flatten().tolist()}) == pytest.approx([0.25, 0.5, 0.75, 1])
        assert float((time == 0.25).float().mean()) == pytest.approx(0.25, abs=0.03)
    else:
        assert 0 <= float(time.min()) < 0.01
        assert 0.99 < float(time.max()) < 1


# -------------------------------------------------------------------- saving
def test_a_saved_policy_acts_the_same(tmp_path: Path) -> None:
    policy = make(pairs=Pairs(samples=3, times="uniform"), normalize_obs=True, flow_steps=5)
    policy.remember(rollout(policy))
    policy.save_pretrained(tmp_path)
    other = control.load_pretrained(tmp_path)
    assert isinstance(other, FlowPolicy)
    assert (other.pairs, other.settings, other.nets().keys()) == (policy.pairs, policy.settings, policy.nets().keys())
    obs = np.random.default_rng(1).standard_normal((4, 3))
    np.testing.assert_array_equal(other.predict(obs), policy.predict(obs))


def test_state_restores_everything(tmp_path: Path) -> None:
    policy, other = make(normalize_obs=True), make(normalize_obs=True, seed=1)
    policy.remember(rollout(policy))
    policy.predict(np.zeros(3))
    save_tree(tmp_path / "x", policy.state(), {})
    other.load(load_tree(tmp_path / "x")[0])
    obs = np.random.default_rng(1).standard_normal((4, 3))
    np.testing.assert_array_equal(other.predict(obs), policy.predict(obs))


def test_bad_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(PoloptError, match=r"policy\.json is missing"):
        control.load_pretrained(tmp_path)
    make().save_pretrained(tmp_path)
    text = (tmp_path / "policy.json").read_text()
    (tmp_path / "policy.json").write_text(text.replace('"flow"', '"flaw"'))
    with pytest.raises(PoloptError, match="unknown kind of policy 'flaw', did you mean 'flow'"):
        control.load_pretrained(tmp_path)
    (tmp_path / "policy.json").write_text("[")
    with pytest.raises(PoloptError, match="cannot be read"):
        control.load_pretrained(tmp_path)


def test_mlp_policies_load_from_the_same_place(tmp_path: Path) -> None:
    MLPPolicy(OBS, DISCRETE, PolicySettings(hidden=(4,))).save_pretrained(tmp_path)
    assert type(control.load_pretrained(tmp_path)) is MLPPolicy


# -------------------------------------------------------------------- refusing
def test_a_flow_has_no_likelihood_no_reference_and_no_discrete_actions() -> None:
    policy = make(value=False)
    batch = rollout(policy)
    for name in ("logp", "entropy", "kl", "dist"):
        with pytest.raises(CallError, match=f"no statistic '{name}'; known: cfm"):
            policy.evaluate(batch, frozenset({name}), OLD)
    with pytest.raises(CallError, match="no frozen reference"):
        policy.evaluate(batch, frozenset({"cfm"}), REF)
    with pytest.raises(CallError, match="no value net"):
        policy.evaluate(batch, frozenset({"value"}), OLD)
    with pytest.raises(Misfit, match="draws numbers, but the actions of the task are discrete"):
        make(action=DISCRETE)
    with pytest.raises(CallError, match=r"policy\.shared"):
        make(shared=True)


@pytest.mark.parametrize(
    ("method", "over", "message"),
    [
        ("ppo", {"policy.distribution": "flow"}, r"surrogate 'clip' needs logp, but a flow policy has no likelihood"),
        ("trpo", {"policy.distribution": "flow"}, r"no likelihood"),
        ("reinforce", {"policy.distribution": "flow"}, r"surrogate 'score' needs logp"),
        ("fpo", {"policy.distribution": "gaussian"}, r"surrogate 'flow-clip' needs a flow policy \(no likelihood\)"),
        ("fpo", {"penalty": "entropy"}, r"penalty.entropy 'entropy' needs entropy, but a flow policy"),
        ("fpo", {"penalty": "kl-ref"}, r"penalty.kl-ref .* needs logp, but a flow policy"),
        ("fpo", {"target_kl": 0.1}, "target_kl needs log-probabilities"),
    ],
)
def test_methods_and_policies_that_do_not_fit_are_refused(method: str, over: dict[str, Any], message: str) -> None:
    resolved = resolve(method, "point:two", over)
    with pytest.raises(Misfit, match=message):
        control.build(resolved.task, resolved.settings, resolved.method, 0)


@pytest.mark.parametrize(("task", "message"), [("gym:CartPole-v1", "its actions are discrete"), ("table:tree", "a flow")])
def test_tasks_without_flow_policies_refuse_fpo(task: str, message: str) -> None:
    with pytest.raises(CallError, match=message):
        polopt.train("fpo", task, budget="1-updates", out=False)


def test_parts_say_which_pairs_are_recorded() -> None:
    method = get_method("fpo").set("surrogate.samples", 3).set("surrogate.times", "uniform").set("surrogate.form", "velocity")
    assert pairs_of(method) == Pairs(3, "uniform", "velocity")
    assert pairs_of(get_method("ppo")) == Pairs()
