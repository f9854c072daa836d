"""MLP policies: distributions against closed forms and independent formulas, acting against scoring, saving."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.distributions import Categorical, Normal, kl_divergence
from torch.fx.experimental.proxy_tensor import make_fx

from polopt.batch import Batch, Final
from polopt.errors import CallError, PoloptError
from polopt.policies.mlp import MLPPolicy, load_pretrained
from polopt.policies.mlp_spaces import Action, Observation
from polopt.settings import PolicySettings
from polopt.stats import NOW, OLD, REF
from polopt.tree import load_tree, save_tree

OBS = Observation("box", (3,), "<f4")
DISCRETE = Action("discrete", (), "<i8", (4,), (0,))
MULTI = Action("multidiscrete", (2,), "<i8", (3, 2), (0, 0))
BOX = Action("box", (2,), "<f4", low=(-1.0, -2.0), high=(1.0, 4.0))
CASES = {
    "categorical": (DISCRETE, PolicySettings()),
    "multi": (MULTI, PolicySettings(activation="elu")),
    "gaussian": (BOX, PolicySettings(log_std=-0.5, activation="relu")),
    "squashed": (BOX, PolicySettings(distribution="squashed", log_std=-0.3, activation="silu")),
}


def make(case: str, value: bool = True, seed: int = 0, **changes: object) -> MLPPolicy:
    action, settings = CASES[case]
    policy = MLPPolicy(OBS, action, replace(settings, hidden=(16, 16), **changes), {"value"} if value else (), seed)
    with torch.no_grad():  # far from the nearly uniform start, where many mistakes are invisible
        policy.policy.head.weight.mul_(100)
    return policy


def rollout(policy: MLPPolicy, b: int = 3, t: int = 5, seed: int = 0) -> Batch:
    rng = np.random.default_rng(seed)
    obs = rng.standard_normal((b, t, 3)).astype(np.float32)
    action = np.stack([policy.act(obs[i], rng)[0] for i in range(b)])
    final = Final(torch.tensor([[0, 1], [2, t - 1]]), torch.from_numpy(rng.standard_normal((2, 3)).astype(np.float32)))
    mask = torch.ones(b, t, dtype=torch.bool)
    return Batch(mask=mask, obs=torch.from_numpy(obs), action=torch.from_numpy(action), final=final)


def moved(policy: MLPPolicy, by: float = 0.1) -> None:
    torch.manual_seed(0)
    with torch.no_grad():
        for p in policy.parameters():
            p.add_(by * torch.randn_like(p))


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("normalize", [False, True])
def test_acting_in_numpy_agrees_with_scoring_in_pytorch(case: str, normalize: bool) -> None:
    policy = make(case, normalize_obs=normalize)
    policy.remember(rollout(policy, seed=3))
    rng = np.random.default_rng(1)
    obs = rng.standard_normal((64, 3)).astype(np.float32) * 5
    x = torch.from_numpy(obs)
    with torch.no_grad():
        expected = policy.policy(x if policy.moments is None else policy.moments(x)).numpy()
    np.testing.assert_allclose(policy.actor().output(obs), expected, atol=1e-5)


@pytest.mark.parametrize("case", ["categorical", "multi"])
def test_draws_follow_the_scored_probabilities(case: str) -> None:
    policy, n = make(case), 40_000
    obs = np.tile(np.array([[0.3, -1.0, 0.7]], dtype=np.float32), (n, 1))
    drawn = policy.act(obs, np.random.default_rng(0))[0].reshape(n, -1)
    for combination in [[k] for k in range(4)] if case == "categorical" else [[a, b] for a in range(3) for b in range(2)]:
        one = torch.tensor([combination])
        batch = Batch(
            mask=torch.ones(1, 1, dtype=torch.bool),
            obs=torch.from_numpy(obs[:1])[None],
            action=one if case == "categorical" else one[None],
        )
        p = float(policy.evaluate(batch, frozenset({"logp"}), OLD)["logp"].exp())
        assert (drawn == combination).all(1).mean() == pytest.approx(p, abs=4 * (p * (1 - p) / n) ** 0.5 + 1e-4)


def test_views_follow_parameters_that_move_into_other_memory() -> None:
    policy = make("categorical")
    obs = np.ones((2, 3), dtype=np.float32)
    actor = policy.actor()
    with torch.no_grad():
        policy.policy.head.bias.add_(3.0)  # in place: seen by an actor made before
        seen = actor.output(obs).copy()
        np.testing.assert_allclose(seen, policy.policy(torch.from_numpy(obs)).numpy(), atol=1e-5)
        policy.policy.head.bias.data = torch.full((4,), -2.0)  # other memory: seen by the next actor
    np.testing.assert_allclose(policy.actor().output(obs), policy.policy(torch.from_numpy(obs)).detach().numpy(), atol=1e-5)


@pytest.mark.parametrize("case", CASES)
def test_logp_entropy_and_kl_against_torch_distributions(case: str) -> None:
    policy = make(case)
    batch = rollout(policy)
    old = policy.evaluate(batch, frozenset({"dist", "logp", "entropy"}), OLD)
    before = policy.policy(batch.obs).detach()
    deviation = None if policy.policy.log_std is None else policy.policy.log_std.detach().exp().clone()
    moved(policy)
    now = policy.evaluate(batch.adding({"dist@old": old["dist"]}), frozenset({"kl"}), NOW)["kl"]
    after = policy.policy(batch.obs).detach()
    if deviation is None:
        sizes = [4] if case == "categorical" else [3, 2]
        pairs = [
            (Categorical(logits=a), Categorical(logits=b))
            for a, b in zip(before.split(sizes, -1), after.split(sizes, -1), strict=True)
        ]
        index = batch.action[..., None] if case == "categorical" else batch.action
        expected_logp = sum(p.log_prob(index[..., i]) for i, (p, _) in enumerate(pairs))
        expected_kl = sum(kl_divergence(p, q) for p, q in pairs)
        expected_entropy: Tensor | None = sum(p.entropy() for p, _ in pairs)
    else:
        assert policy.policy.log_std is not None
        p, q = Normal(before, deviation), Normal(after, policy.policy.log_std.detach().exp())
        expected_kl = kl_divergence(p, q).sum(-1)
        expected_logp, expected_entropy = p.log_prob(batch.action).sum(-1), p.entropy().sum(-1)
        if case == "squashed":
            return_slope = torch.log(torch.tensor([1.0, 3.0]) * (1 - torch.tanh(batch.action.double()) ** 2)).sum(-1).float()
            expected_logp = expected_logp - return_slope
            expected_entropy = expected_entropy + return_slope
    torch.testing.assert_close(old["logp"], expected_logp, atol=2e-5, rtol=1e-5)
    torch.testing.assert_close(old["entropy"], expected_entropy, atol=2e-5, rtol=1e-5)
    torch.testing.assert_close(now, expected_kl, atol=2e-5, rtol=1e-5)
    assert now.min() > 0
    assert now.requires_grad
    assert not old["logp"].requires_grad


def test_kl_equals_its_monte_carlo_estimate() -> None:
    policy = make("squashed")
    n = 100_000
    obs = np.tile(np.array([[0.3, -1.0, 0.7]], dtype=np.float32), (n, 1))
    action = policy.act(obs, np.random.default_rng(0))[0]
    batch = Batch(mask=torch.ones(1, n, dtype=torch.bool), obs=torch.from_numpy(obs)[None], action=torch.from_numpy(action)[None])
    old = policy.evaluate(batch, frozenset({"dist", "logp"}), OLD)
    moved(policy, 0.05)
    now = policy.evaluate(batch.adding({"dist@old": old["dist"]}), frozenset({"kl", "logp"}), OLD)
    gap = old["logp"] - now["logp"]
    assert float(now["kl"][0, 0]) == pytest.approx(float(gap.mean()), abs=4 * float(gap.std()) / n**0.5)


def test_squashed_density_integrates_to_one_and_matches_a_numerical_jacobian() -> None:
    action = Action("box", (1,), "<f4", low=(-2.0,), high=(4.0,))
    policy = MLPPolicy(OBS, action, PolicySettings(hidden=(8,), distribution="squashed", log_std=-0.2), (), 0)
    u = torch.linspace(-4, 4, 2001, dtype=torch.float64)
    batch = Batch(mask=torch.ones(1, len(u), dtype=torch.bool), obs=torch.zeros(1, len(u), 3), action=u.float()[None, :, None])
    logp = policy.evaluate(batch, frozenset({"logp"}), OLD)["logp"][0].double()
    outward = torch.from_numpy(policy.head.outward(u.numpy()[:, None])[:, 0]).double()
    exact = -2 + 3 * (torch.tanh(u) + 1)
    torch.testing.assert_close(outward, exact, atol=1e-6, rtol=0)
    assert float(torch.trapezoid(logp.exp(), exact)) == pytest.approx(1.0, abs=1e-3)
    mean = policy.policy(torch.zeros(1, 3)).item()
    slope = (exact[2:] - exact[:-2]) / (u[2:] - u[:-2])
    expected = Normal(torch.tensor(mean).double(), torch.tensor(-0.2).exp().double()).log_prob(u)[1:-1] - slope.log()
    torch.testing.assert_close(logp[1:-1], expected, atol=1e-4, rtol=1e-4)


def test_squashed_logp_and_entropy_stay_finite_far_from_the_middle() -> None:
    policy = make("squashed")
    batch = Batch(mask=torch.ones(1, 2, dtype=torch.bool), obs=torch.zeros(1, 2, 3), action=torch.tensor([[[30.0, -30.0]] * 2]))
    found = policy.evaluate(batch, frozenset({"logp", "entropy"}), NOW)
    sum(v.sum() for v in found.values()).backward()
    assert all(v.isfinite().all() for v in found.values())
    assert all(p.grad is None or p.grad.isfinite().all() for p in policy.parameters())


def test_squashed_entropy_is_unbiased_and_so_is_its_gradient() -> None:
    action = Action("box", (1,), "<f4", low=(-1.0,), high=(1.0,))
    policy = MLPPolicy(OBS, action, PolicySettings(hidden=(8,), distribution="squashed", log_std=0.3), (), 0)
    assert policy.policy.log_std is not None

    def exact(log_std: float) -> float:  # by quadrature
        u = torch.linspace(-14, 14, 200_001, dtype=torch.float64)
        p = Normal(torch.zeros(1).double(), torch.tensor([log_std]).double().exp())
        logp = p.log_prob(u) - torch.log1p(-(torch.tanh(u) ** 2))
        return float(torch.trapezoid(-p.log_prob(u).exp() * torch.where(logp.isfinite(), logp, 0.0), u))

    with torch.no_grad():
        policy.policy.head.weight.zero_()
    n = 200_000
    drawn = policy.act(np.zeros((n, 3), dtype=np.float32), np.random.default_rng(0))[0]
    batch = Batch(mask=torch.ones(1, n, dtype=torch.bool), obs=torch.zeros(1, n, 3), action=torch.from_numpy(drawn)[None])
    entropy = policy.evaluate(batch, frozenset({"entropy"}), NOW)["entropy"].mean()
    assert float(entropy.detach()) == pytest.approx(exact(0.3), abs=0.01)
    entropy.backward()
    slope = (exact(0.31) - exact(0.29)) / 0.02
    assert float(policy.policy.log_std.grad) == pytest.approx(slope, abs=0.02)


def test_value_next_is_the_next_value_but_for_cuts() -> None:
    policy = make("categorical")
    batch = rollout(policy)
    found = policy.evaluate(batch, frozenset({"value", "value_next"}), OLD)
    value, after = found["value"], found["value_next"]
    assert policy.value is not None
    last = policy.value(batch.final.obs).detach()  # type: ignore[union-attr]
    torch.testing.assert_close(after[0, 1], last[0])
    torch.testing.assert_close(after[2, 4], last[1])
    torch.testing.assert_close(after[1, :-1], value[1, 1:])
    torch.testing.assert_close(after[0, 2:-1], value[0, 3:])
    with pytest.raises(CallError, match="final observations"):
        policy.evaluate(replace(batch, final=None), frozenset({"value_next"}), OLD)


def test_value_net_is_built_only_when_asked_for_and_leaves_the_policy_as_it_is() -> None:
    alone, both = make("categorical", value=False), make("categorical")
    assert set(alone.nets()) == {"policy"}
    assert set(both.nets()) == {"policy", "value"}
    for name, p in alone.named_parameters():
        assert torch.equal(p, dict(both.named_parameters())[name])
    with pytest.raises(CallError, match="no value net"):
        alone.evaluate(rollout(alone), frozenset({"value"}), OLD)
    with pytest.raises(CallError, match="critic"):
        MLPPolicy(OBS, DISCRETE, PolicySettings(), {"critic"})


def test_shared_hidden_layers_serve_both_nets_and_one_pass_serves_both_statistics() -> None:
    policy = make("categorical", shared=True)
    assert policy.value is not None
    assert policy.value.trunk is policy.policy.trunk
    batch = rollout(policy)
    together = policy.evaluate(batch, frozenset({"logp", "value"}), OLD)
    for name in ("logp", "value"):
        assert torch.equal(together[name], policy.evaluate(batch, frozenset({name}), OLD)[name])


@pytest.mark.parametrize("case", CASES)
def test_traces_as_one_graph_with_parameters_passed_in(case: str) -> None:
    policy = make(case, normalize_obs=True)
    want = frozenset({"logp", "entropy", "value", "kl"})
    batch = rollout(policy)
    batch = batch.adding({"dist@old": policy.evaluate(batch, frozenset({"dist"}), OLD)["dist"]}).decisions()

    def scored(parameters: dict[str, Tensor], obs: Tensor, action: Tensor, dist: Tensor, mask: Tensor) -> dict[str, Tensor]:
        rows = Batch(mask=mask, obs=obs, action=action, stats={"dist@old": dist})
        return torch.func.functional_call(policy, parameters, (rows, want))

    parameters = {k: p.detach().clone() for k, p in (*policy.named_parameters(), *policy.named_buffers())}
    args = parameters, batch.obs, batch.action, batch.stats["dist@old"], batch.mask
    traced = make_fx(scored, tracing_mode="fake")(*args)  # fake tensors: reading a value while tracing would raise
    for p in parameters.values():
        p.add_(0.01)
    expected = scored(*args)
    for name, found in traced(*args).items():
        assert found.shape == batch.mask.shape
        torch.testing.assert_close(found, expected[name])


def test_reference_is_frozen_with_its_observation_statistics() -> None:
    policy = make("gaussian", normalize_obs=True)
    batch = rollout(policy)
    start = policy.evaluate(batch, frozenset({"logp"}), REF)["logp"]
    parameters = len(list(policy.parameters()))
    moved(policy)
    policy.remember(batch)
    assert torch.equal(policy.evaluate(batch, frozenset({"logp"}), REF)["logp"], start)
    assert not torch.allclose(policy.evaluate(batch, frozenset({"logp"}), OLD)["logp"], start)
    assert len(list(policy.parameters())) == parameters


@pytest.mark.parametrize("case", CASES)
def test_state_survives_a_checkpoint_in_place(case: str, tmp_path: Path) -> None:
    policy = make(case, normalize_obs=True, normalize_reward=True)
    batch = rollout(policy)
    policy.reference()
    moved(policy)
    policy.remember(batch)
    save_tree(tmp_path / "c", {"policy": policy.state()}, {})
    other = make(case, seed=9, normalize_obs=True, normalize_reward=True)
    memory = [p.data_ptr() for p in other.parameters()]
    other.load(load_tree(tmp_path / "c")[0]["policy"])
    assert memory == [p.data_ptr() for p in other.parameters()]
    for view in (OLD, REF):
        a, b = (p.evaluate(batch, frozenset({"logp"}), view)["logp"] for p in (policy, other))
        assert torch.equal(a, b)
    with pytest.raises(ValueError, match="differ"):
        make(case, value=False).load(policy.state())


@pytest.mark.parametrize("case", CASES)
def test_saved_policy_predicts_the_same_without_its_settings(case: str, tmp_path: Path) -> None:
    policy = make(case, normalize_obs=True)
    policy.remember(rollout(policy))
    policy.save_pretrained(tmp_path)
    other = load_pretrained(tmp_path)
    obs = np.random.default_rng(0).standard_normal((5, 3)).astype(np.float32)
    many = policy.predict(obs)
    assert np.array_equal(many, other.predict(obs))
    np.testing.assert_allclose(many[2], other.predict(obs[2]), atol=1e-5)
    assert np.array_equal(policy.predict(obs, greedy=False), other.predict(obs, greedy=False))
    with pytest.raises(CallError, match=r"shape \(4,\)"):
        policy.predict(np.zeros(4))
    if case in ("gaussian", "squashed"):
        assert (many >= [-1, -2]).all()
        assert (many <= [1, 4]).all()
    (tmp_path / "policy.safetensors").write_bytes(b"no")
    with pytest.raises(PoloptError, match=r"policy\.safetensors"):
        load_pretrained(tmp_path)


def test_distribution_that_does_not_fit_the_actions_is_refused() -> None:
    with pytest.raises(CallError, match="does not fit discrete actions"):
        MLPPolicy(OBS, DISCRETE, PolicySettings(distribution="gaussian"))
    with pytest.raises(CallError, match="does not fit box actions"):
        MLPPolicy(OBS, BOX, PolicySettings(distribution="categorical"))
    with pytest.raises(CallError, match="bounded"):
        MLPPolicy(OBS, replace(BOX, low=(-np.inf, 0.0)), PolicySettings(distribution="squashed"))
