"""Discovered PO, and the drifts of mirror learning: what makes one valid, PPO's own, the closed form and a learnt one."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import polopt.loops.compiled as compiled_steps
from polopt.batch import Batch
from polopt.errors import CallError
from polopt.loops.improve import Improve
from polopt.method import Method
from polopt.nets.frozen import ASSETS, artefact, shipped
from polopt.overrides import resolve
from polopt.parts.surrogate.clip import Clip
from polopt.parts.surrogate.drift import ClipDrift, DiscoveredDrift, Drift
from polopt.parts.surrogate.learnt_drift import SHAPES, LearntDrift, features, untrained
from polopt.parts.surrogate.score import Ratio, ScoreFunction
from polopt.registry import get_method

F64 = torch.float64
ADVANTAGES = st.floats(-6, 6, allow_nan=False)
LOG_RATIOS = st.floats(-3, 3)


def network(seed: int, scale: float = 1.0) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(seed)
    return {"hidden": scale * torch.randn(128, 8, generator=g), "out": scale * torch.randn(128, generator=g)}


DRIFTS: dict[str, tuple[Drift, dict[str, Tensor]]] = {
    "clip": (ClipDrift(0.2), {}),
    "discovered": (DiscoveredDrift(), {}),
    "learnt": (LearntDrift(), network(0)),
    "learnt from the clip": (LearntDrift(start="clip"), network(1)),
    "shipped": (LearntDrift(), LearntDrift().initial()),
}


def leaf(*x: float) -> Tensor:
    return torch.tensor(x, dtype=F64, requires_grad=True)


def slope(part: Drift, r: Tensor, advantage: Tensor, memory: dict[str, Tensor]) -> Tensor:
    """d/dr of the objective r A - f."""
    objective = r * advantage - part.drift(r.log(), advantage, memory)
    return torch.autograd.grad(objective.sum(), r)[0]


def losses(part: Any, log_r: Tensor, advantage: Tensor, memory: dict[str, Tensor] | None = None) -> Tensor:
    batch = Batch.of(logp=log_r[None], logp_old=torch.zeros_like(log_r)[None])
    more = {"memory": memory or {}} if isinstance(part, Drift) else {}
    out: Tensor = part(batch=batch, now={"logp": log_r[None]}, advantage=advantage[None], **more)
    return out[0]


# -------------------------------------------------------------------- valid drifts
@pytest.mark.identity("discovered-po", "lpo", "the drift is never negative, for any ratio, advantage and network")
@settings(max_examples=60, deadline=None)
@given(a=ADVANTAGES, log_r=st.floats(-20, 20), seed=st.integers(0, 1000), scale=st.sampled_from([0.01, 1.0, 100.0]))
def test_drifts_are_not_negative(a: float, log_r: float, seed: int, scale: float) -> None:
    for part, memory in [*DRIFTS.values(), (LearntDrift(), network(seed, scale))]:
        f = part.drift(torch.tensor([[log_r]], dtype=F64), torch.tensor([[a]], dtype=F64), memory)
        assert bool(f.isfinite())
        assert float(f) >= 0


@pytest.mark.identity(
    "discovered-po", "lpo", "f(1, A) = 0 and df/dr(1, A) = 0, by autograd, for any network: the kink has no slope"
)
@settings(max_examples=60, deadline=None)
@given(a=ADVANTAGES, seed=st.integers(0, 1000), scale=st.sampled_from([0.01, 1.0, 100.0]))
def test_drifts_begin_flat(a: float, seed: int, scale: float) -> None:
    for part, memory in [*DRIFTS.values(), (LearntDrift(), network(seed, scale))]:
        r, advantage = leaf(1.0), torch.tensor([a], dtype=F64)
        f = part.drift(r.log(), advantage, memory)
        assert f.item() == 0
        assert torch.autograd.grad(f.sum(), r)[0].item() == 0
        assert slope(part, r, advantage, memory).item() == a


@pytest.mark.parametrize("name", ["clip", "discovered"])
@pytest.mark.parametrize("a", [-2.0, 2.0])
def test_value_and_slope_vanish_from_both_sides(name: str, a: float) -> None:
    part, memory = DRIFTS[name]
    for h in (1e-3, 1e-5):
        r = leaf(1 - h, 1 + h)
        f = part.drift(r.log(), torch.full((2,), a, dtype=F64), memory)
        assert float(f.detach().max()) < 4 * h**2
        assert float(torch.autograd.grad(f.sum(), r)[0].abs().max()) < 20 * h


@pytest.mark.identity("discovered-po", "lpo", "the first gradient step is A2C's and PPO's")
@settings(max_examples=30, deadline=None)
@given(a=ADVANTAGES)
def test_the_first_step_is_the_policy_gradient(a: float) -> None:
    found = []
    for part, memory in [*DRIFTS.values(), (ScoreFunction(), {}), (Clip(), {})]:
        logp = leaf(-0.4)
        batch = Batch.of(logp=logp[None], logp_old=logp.detach()[None])
        more = {"memory": memory} if isinstance(part, Drift) else {}
        loss = part(batch=batch, now={"logp": logp[None]}, advantage=torch.tensor([[a]], dtype=F64), **more)
        found.append(torch.autograd.grad(loss.sum(), logp)[0].item())
    assert found == [-a] * len(found)


# -------------------------------------------------------------------- PPO's drift
@pytest.mark.identity("discovered-po", "PPO's drift in the mirror objective has PPO's loss, and its gradient bit for bit")
@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10_000), eps=st.sampled_from([0.1, 0.2, 0.5]))
def test_ppo_is_mirror_learning(seed: int, eps: float) -> None:
    g = torch.Generator().manual_seed(seed)
    log_r = (0.5 * torch.randn(40, generator=g, dtype=F64)).requires_grad_()
    advantage = torch.randn(40, generator=g, dtype=F64)
    mine, theirs = losses(ClipDrift(eps), log_r, advantage), losses(Clip(eps, eps), log_r, advantage)
    torch.testing.assert_close(mine, theirs, rtol=0, atol=4e-16 * float(log_r.detach().exp().max()))
    a, b = (torch.autograd.grad(x.sum(), log_r)[0] for x in (mine, theirs))
    assert torch.equal(a, b)
    assert bool((a == 0).any())  # some are clipped


def test_the_whole_method_with_ppo_s_drift_is_ppo() -> None:
    ppo = get_method("ppo")
    torch.testing.assert_close(
        trained(ppo.but("x", surrogate=ClipDrift(0.2))), trained(ppo.but("y", surrogate=Clip(0.2, 0.2))), rtol=0, atol=0
    )


# -------------------------------------------------------------------- the closed form
@pytest.mark.identity("discovered-po", "worked numbers of f and of the loss on both sides")
def test_worked_numbers() -> None:
    r = torch.tensor([2.0, 0.5, 2.0, 0.5], dtype=F64)
    a = torch.tensor([3.0, 3.0, -3.0, -3.0], dtype=F64)
    low = 3 * math.log(2)
    wanted = [3 - 2 * math.tanh(1.5), 0.0, 0.0, low - 0.6 * math.tanh(low / 0.6)]
    f = DiscoveredDrift().drift(r.log(), a, {})
    assert f.tolist() == pytest.approx(wanted, rel=1e-12)
    assert losses(DiscoveredDrift(), r.log(), a).tolist() == pytest.approx((f - r * a).tolist(), rel=1e-12)


@pytest.mark.identity("discovered-po", "A = 0 has no drift")
@given(log_r=st.floats(-20, 20))
def test_nothing_drifts_at_advantage_zero(log_r: float) -> None:
    assert float(DiscoveredDrift().drift(torch.tensor([log_r], dtype=F64), torch.zeros(1, dtype=F64), {})) == 0


@pytest.mark.identity("discovered-po", "for A to 0 it is the unclipped policy gradient: f = O(A^3)")
@pytest.mark.parametrize(("log_r", "sign"), [(1.0, 1.0), (-1.0, -1.0)])
def test_small_advantages_are_not_clipped(log_r: float, sign: float) -> None:
    a = sign * torch.tensor([1e-1, 1e-2, 1e-3], dtype=F64)
    f = DiscoveredDrift().drift(torch.full((3,), log_r, dtype=F64), a, {})
    assert (f[1:] / f[:-1]).tolist() == pytest.approx([1e-3, 1e-3], rel=0.02)


@pytest.mark.identity(
    "discovered-po", "d/dr of r A - f: A inside; A (1 - tanh^2((r-1)A/alpha)), or A (1 - tanh^2((log r)A/beta)/r), outside"
)
@settings(max_examples=60, deadline=None)
@given(a=ADVANTAGES, log_r=LOG_RATIOS, alpha=st.sampled_from([0.5, 2.0]), beta=st.sampled_from([0.3, 0.6]))
def test_the_slope(a: float, log_r: float, alpha: float, beta: float) -> None:
    r = math.exp(log_r)
    if a >= 0:
        wanted = a if r <= 1 else a * (1 - math.tanh((r - 1) * a / alpha) ** 2)
    else:
        wanted = a if r >= 1 else a * (1 - math.tanh(log_r * a / beta) ** 2 / r)
    found = slope(
        DiscoveredDrift(alpha, beta), torch.tensor([log_r], dtype=F64).exp().requires_grad_(), torch.tensor([a], dtype=F64), {}
    )
    assert found.item() == pytest.approx(wanted, rel=1e-7, abs=1e-9)


@pytest.mark.identity(
    "discovered-po", "for A < 0 the slope turns at the r < 1 with tanh^2((log r)A/beta) = r: below it the action is pushed back"
)
@pytest.mark.parametrize("a", [-0.5, -1.0, -3.0])
def test_the_rollback(a: float) -> None:
    low, high = 1e-6, 1 - 1e-6  # tanh^2 - r is positive at the lower, negative at the upper end
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if math.tanh(math.log(middle) * a / 0.6) ** 2 > middle else (low, middle)
    assert 0 < low < 1
    found = slope(DiscoveredDrift(), leaf(low, 0.9 * low, min(1.0, 1.1 * low)), torch.full((3,), a, dtype=F64), {})
    assert found[0].item() == pytest.approx(0, abs=1e-9)
    assert found[1].item() > 0 > found[2].item()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_far_ratios_stay_finite(dtype: torch.dtype) -> None:
    log_r = torch.tensor([500.0, -500.0, 500.0, -500.0], dtype=dtype, requires_grad=True)
    advantage = torch.tensor([2.0, 2.0, -2.0, -2.0], dtype=dtype)
    for part, memory in DRIFTS.values():
        loss = losses(part, log_r, advantage, memory)
        assert bool(loss.isfinite().all())
        assert bool(torch.autograd.grad(loss.sum(), log_r)[0].isfinite().all())


# -------------------------------------------------------------------- the learnt drift
@pytest.mark.identity("lpo", "the eight inputs are 0 at r = 1, and as the paper lists them elsewhere")
def test_the_inputs() -> None:
    assert features(torch.zeros(1, dtype=F64), torch.full((1,), 3.0, dtype=F64)).tolist() == [[0.0] * 8]
    r, a = 1.5, -2.0
    gap, log = 1 - r, math.log(r)
    found = features(torch.tensor([log], dtype=F64), torch.tensor([a], dtype=F64))[0].tolist()
    plain = [gap, gap**2, log, log**2]
    assert found == pytest.approx([*plain, *(a * x for x in plain)], rel=1e-12)


@pytest.mark.identity("lpo", "f = relu(net(x) - xi), written out; a threshold above the network's output leaves no drift")
def test_the_drift_written_out() -> None:
    net = {k: v.double() for k, v in network(3).items()}
    log_r, a = 0.4 * torch.randn(2, 50, generator=torch.Generator().manual_seed(0), dtype=F64)
    x = features(log_r, a)
    out = torch.tanh(x @ net["hidden"].T) @ net["out"]
    found = LearntDrift(xi=0.3).drift(log_r, a, net)
    torch.testing.assert_close(found, (out - 0.3).clamp(min=0), rtol=1e-12, atol=1e-14)
    assert 0 < int((found > 0).sum()) < 50
    assert float(LearntDrift(xi=1e9).drift(log_r, a, net).max()) == 0
    both = LearntDrift(xi=0.3, start="clip").drift(log_r, a, net)
    torch.testing.assert_close(both, (out + ClipDrift(0.2).drift(log_r, a, {}) - 0.3).clamp(min=0), rtol=1e-12, atol=1e-14)


@pytest.mark.identity("lpo", "an untrained network is the plain ratio, or the clip where the search starts from it, up to xi")
def test_an_untrained_network_has_no_drift() -> None:
    log_r, a = 0.4 * torch.randn(2, 50, generator=torch.Generator().manual_seed(0), dtype=F64)
    assert torch.equal(losses(LearntDrift(), log_r, a, untrained(0)), losses(Ratio(), log_r, a))
    gap = losses(LearntDrift(start="clip"), log_r, a, untrained(0)) - losses(Clip(), log_r, a)
    assert float(gap.abs().max()) <= 1e-4 + 1e-12


@pytest.mark.identity("lpo", "without biases a network and its mirror image are one drift: net(phi) = net(-phi)")
def test_a_network_equals_its_mirror_image() -> None:
    net = network(4)
    mirrored = {k: -v for k, v in net.items()}
    log_r, a = torch.randn(2, 50, generator=torch.Generator().manual_seed(0), dtype=F64)
    torch.testing.assert_close(LearntDrift().drift(log_r, a, net), LearntDrift().drift(log_r, a, mirrored))


def test_no_update_moves_the_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is in the checkpoint, its values are inputs of compiled steps, and other values make other policies."""
    monkeypatch.setattr(compiled_steps, "BACKEND", "eager")
    lpo = get_method("lpo")
    eager, compiled = trained(lpo), trained(lpo, **{"optim.compile": "always"})
    torch.testing.assert_close(compiled, eager, rtol=1e-4, atol=2e-6)
    assert not torch.allclose(eager, trained(get_method("ppo").but("x", surrogate=Ratio())), atol=1e-5)
    resolved = resolve(lpo, "gym:CartPole-v1", SMALL)
    run = Improve(resolved.method, resolved.task, resolved.settings)
    run.step()
    run.collector.close()
    kept = run.state()["memory"]["surrogate"]
    assert set(kept) == set(SHAPES)
    assert all(torch.equal(v, artefact("drift", "cartpole", SHAPES)[k]) for k, v in kept.items())


def test_weights_of_one_s_own(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    path = str(tmp_path / "mine.safetensors")
    save_file(network(5), path)
    mine = get_method("lpo").set("surrogate.weights", path)
    assert torch.equal(mine.memory().of("surrogate")["out"], network(5)["out"])
    save_file(network(6), path)  # read anew
    assert torch.equal(mine.memory().of("surrogate")["out"], network(6)["out"])


def test_shipped_drifts_tell_where_they_come_from() -> None:
    """The command with its seed, what it cost, and how it fared beside the plain ratio and the clip, good or bad."""
    for name in shipped("drift"):
        about = json.loads((ASSETS / "drift" / f"{name}.json").read_text())
        assert "--seed" in about["command"]
        assert about["runs"] == 16 * len(about["history"]) == 640
        assert all({"learnt-drift", "ratio", "clip"} <= set(found) for found in about["compared"].values())
        found = about["compared"]["gym:CartPole-v1"]
        assert found["learnt-drift"]["mean"] > 3 * found["ratio"]["mean"]


def test_artefacts_that_do_not_serve_are_refused_by_name(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    lpo = get_method("lpo")
    assert "cartpole" in shipped("drift")
    bad = {
        "cartpol": ({}, "did you mean 'cartpole'"),
        "gone.safetensors": ({}, "there is no file"),
        "empty.safetensors": ({"other": torch.zeros(1)}, "lacks the tensor 'hidden', it has .'other'."),
        "wide.safetensors": (
            {"hidden": torch.zeros(4, 7), "out": torch.zeros(4)},
            r"'hidden' has shape \(4, 7\), expected any x 8",
        ),
        "odd.safetensors": ({"hidden": torch.zeros(4, 8), "out": torch.zeros(5)}, "differ in their number of units"),
        "nan.safetensors": (
            {"hidden": torch.zeros(4, 8), "out": torch.full((4,), math.nan)},
            "'out' holds numbers that are not finite",
        ),
    }
    for name, (tensors, message) in bad.items():
        if tensors:
            save_file(tensors, str(tmp_path / name))
        where = str(tmp_path / name) if name.endswith(".safetensors") else name
        with pytest.raises(CallError, match=message):
            lpo.but("x", surrogate=LearntDrift(weights=where))
    (tmp_path / "text.safetensors").write_text("no tensors")
    with pytest.raises(CallError, match="cannot be read as safetensors"):
        LearntDrift(weights=str(tmp_path / "text.safetensors")).initial()


# -------------------------------------------------------------------- in runs
SMALL: dict[str, Any] = {
    "collect.envs": 2, "collect.steps": 32, "minibatch": 16, "epochs": 3, "policy.hidden": (8,), "budget": "2-updates",
    "optim.compile": "never", "threads": 1, "lr": 1e-2,
}  # fmt: skip


def trained(method: Method, **more: Any) -> Tensor:
    """Parameters after two iterations on CartPole."""
    resolved = resolve(method, "gym:CartPole-v1", {**SMALL, **more})
    run = Improve(resolved.method, resolved.task, resolved.settings)
    for _ in range(2):
        run.step()
    run.collector.close()
    return run.flat.data.clone()


def test_the_closed_form_traces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled_steps, "BACKEND", "eager")
    method = get_method("discovered-po")
    torch.testing.assert_close(trained(method, **{"optim.compile": "always"}), trained(method), rtol=1e-4, atol=2e-6)


@pytest.mark.parametrize("name", ["discovered-po", "lpo"])
def test_the_recipes_are_one_slot(name: str) -> None:
    assert get_method(name).changes == ("surrogate",)
    text = get_method("grpo").but("x", surrogate=get_method(name).surrogate, penalty=None)
    batch = Batch.of(logp=leaf(-1.0, -0.5)[None], logp_old=-torch.ones(1, 2, dtype=F64), mask=[[1, 0]], group=[0])
    loss, _ = text.loss(batch, advantage=torch.ones(1, 2))
    assert loss.item() == pytest.approx(-1.0, rel=1e-12)
