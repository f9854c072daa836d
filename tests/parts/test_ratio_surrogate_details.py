"""Surrogates beside the clip (flow losses, soft gate, drifts, quadratic), detail by detail: numbers, bounds, declarations."""

from __future__ import annotations

import math
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor

from polopt.batch import Batch
from polopt.errors import CallError
from polopt.part import Can, Part
from polopt.parts.surrogate.drift import ClipDrift, DiscoveredDrift, clip_drift
from polopt.parts.surrogate.flow import FlowClip
from polopt.parts.surrogate.learnt_drift import HIDDEN, INPUTS, SHAPES, LearntDrift, features, untrained
from polopt.parts.surrogate.quadratic import FAR, Quadratic
from polopt.parts.surrogate.soft_gate import SoftGate

F64 = torch.float64


def tensor(*x: float) -> Tensor:
    return torch.tensor([x], dtype=F64)


def at(log_ratio: Tensor) -> Batch:
    return Batch.of(logp=log_ratio, logp_old=torch.zeros_like(log_ratio))


# -------------------------------------------------------------------- flow-matching losses
def flow(part: FlowClip, old: Tensor, now: Tensor, mask: Tensor | None = None) -> tuple[Batch, dict[str, Tensor]]:
    mask = torch.ones(old.shape[:2]).bool() if mask is None else mask
    return Batch(mask=mask, stats={"cfm@old": old}), {"cfm": now}


def test_the_settings_of_fpo_and_what_it_declares() -> None:
    part = FlowClip()
    assert (part.low, part.high, part.bound) == (0.05, 0.05, 3.0)
    assert (part.average, part.samples, part.times, part.form) == ("losses", 8, "grid", "noise")
    assert part.needs == {"cfm@now", "cfm@old"}
    assert part.requires == {Can.FLOW}
    assert part.records == {"cfm": {"samples": 8, "times": "grid", "form": "noise"}}
    other = FlowClip(samples=3, times="uniform", form="velocity")
    assert other.records == {"cfm": {"samples": 3, "times": "uniform", "form": "velocity"}}


@pytest.mark.parametrize(
    ("average", "bound", "wanted"),
    [
        ("losses", 3.0, [[2.0], [-1.0]]),  # drops 1 and 5 -> 3; -5 -> -3 and 1
        ("surrogates", 3.0, [[1.0, 3.0], [-3.0, 1.0]]),
        ("losses", math.inf, [[3.0], [-2.0]]),
        ("surrogates", math.inf, [[1.0, 5.0], [-5.0, 1.0]]),
        ("surrogates", 4.5, [[1.0, 4.5], [-4.5, 1.0]]),
    ],
)
def test_ratios_of_flow_losses_in_numbers(average: Any, bound: float, wanted: list[list[float]]) -> None:
    """One row of three decisions, of which the last is padding, with two pairs each."""
    old = torch.full((1, 3, 2), 6.0, dtype=F64)
    now = old - torch.tensor([[[1.0, 5.0], [-5.0, 1.0], [2.0, 2.0]]], dtype=F64)
    part = FlowClip(average=average, bound=bound)
    found = part.ratio(*flow(part, old, now, torch.tensor([[True, True, False]])))
    torch.testing.assert_close(found[0, :2].log(), torch.tensor(wanted, dtype=F64), atol=1e-12, rtol=0)
    assert bool((found[0, 2] == 1).all())


@pytest.mark.parametrize("bound", [math.inf, 50.0, 20.0])
def test_no_drop_counts_beyond_twenty(bound: float) -> None:
    part = FlowClip(bound=bound)
    old = torch.zeros(1, 2, 1, dtype=F64)
    found = part.ratio(*flow(part, old, torch.tensor([[[90.0], [-90.0]]], dtype=F64)))
    assert found.flatten().log().tolist() == pytest.approx([-20, 20])


def test_the_flow_surrogate_in_numbers() -> None:
    """Ratios e^0.4 and e^-0.4, clipped to 0.9 and 1.3; of both signs of the advantage; and the mean loss of all pairs."""
    now = torch.tensor([[[-0.4], [0.4], [-0.4], [0.4], [-0.03]]], dtype=F64).requires_grad_()
    part = FlowClip(low=0.1, high=0.3)
    batch, stats = flow(part, torch.zeros(1, 5, 1, dtype=F64), now)
    loss, told = part(batch, stats, tensor(2, 2, -2, -2, 3))
    up, down = math.exp(0.4), math.exp(-0.4)
    assert loss.tolist()[0] == pytest.approx([-2.6, -2 * down, 2 * up, 1.8, -3 * math.exp(0.03)], rel=1e-12)
    assert part.cut(batch, stats, tensor(2, 2, -2, -2, 3)).tolist() == [[True, False, False, True, False]]
    assert float(told["cfm"]) == pytest.approx(-0.006)
    assert not told["cfm"].requires_grad
    (slope,) = torch.autograd.grad(loss.sum(), now)
    assert slope.flatten().tolist() == pytest.approx([0, 2 * down, -2 * up, 0, 3 * math.exp(0.03)], rel=1e-12)


def test_a_decision_is_cut_where_all_of_its_pairs_are() -> None:
    part = FlowClip(average="surrogates")
    drop = torch.tensor([[[0.0, 0.1], [0.1, 0.1], [0.0, 0.0]]], dtype=F64)
    batch, stats = flow(part, torch.zeros(1, 3, 2, dtype=F64), -drop)
    assert part.cut(batch, stats, tensor(1, 1, 1)).tolist() == [[False, True, False]]
    between = torch.tensor([[[0.2], [-0.2], [0.2], [-0.2]]], dtype=F64)  # ratios e^0.2, e^-0.2 and bounds 0.9, 1.3
    found = FlowClip(low=0.1, high=0.3).cut(*flow(part, 0 * between, -between), tensor(1, -1, -1, 1))
    assert found.tolist() == [[False, True, False, False]]
    loss, _ = part(batch, stats, tensor(1, 1, 1))  # the mean over pairs
    assert loss.tolist()[0] == pytest.approx([-(1 + 1.05) / 2, -1.05, -1.0])


def test_flow_losses_of_other_shapes_are_refused() -> None:
    part, three = FlowClip(), torch.zeros(1, 3, 2, dtype=F64)
    batch, stats = flow(part, three, three)
    with pytest.raises(CallError, match="'advantage' has shape"):
        part(batch, stats, torch.ones(3, 1))
    with pytest.raises(CallError, match=r"expected \(B, T, pairs\)"):
        part.ratio(*flow(part, three, three[:, :, :1]))
    with pytest.raises(CallError, match=r"expected \(B, T, pairs\)"):
        part.ratio(*flow(part, three, three, torch.ones(1, 2).bool()))
    one = FlowClip(average="surrogates")  # [B,T] is one pair for each decision
    assert one.ratio(*flow(one, three[..., 0], three[..., 0])).shape == (1, 3, 1)


# -------------------------------------------------------------------- all that read the ratio
@pytest.mark.parametrize(
    "part", [SoftGate(), ClipDrift(), DiscoveredDrift(), LearntDrift(), Quadratic()], ids=lambda p: type(p).__name__
)
def test_declared_slope_and_shapes(part: Part) -> None:
    """Where `unit_slope` is declared the first gradient is -A; advantages of another shape are refused."""
    assert part.unit_slope  # type: ignore[attr-defined]
    assert part.needs == {"logp@now", "logp@old"}
    assert part.requires == {Can.SCORE}
    logp = tensor(0, 0, 0).requires_grad_()
    batch = at(logp)
    more = (
        {"memory": {k: v.double() for k, v in part.initial().items()}}
        if isinstance(part, ClipDrift | DiscoveredDrift | LearntDrift)
        else {}
    )
    a = tensor(-2, 0, 3)
    loss = part(batch=batch, now={"logp": logp}, advantage=a, **more)
    assert torch.equal(torch.autograd.grad(loss.sum(), logp)[0], -a)
    with pytest.raises(CallError, match=r"'advantage' has shape \(3, 1\), expected \(1, 3\)"):
        part(batch=batch, now={"logp": logp}, advantage=torch.ones(3, 1), **more)


# -------------------------------------------------------------------- the soft gate
def test_the_default_gate_in_numbers() -> None:
    """tau 1 for A > 0, 1.05 for A < 0, at r = 2."""
    log = tensor(math.log(2), math.log(2), math.log(2))
    found = SoftGate()(at(log), {"logp": log}, tensor(2, -2, 0))
    wanted = [-8 / (1 + math.exp(-1)), 8 / 1.05 / (1 + math.exp(-1.05)), 0]
    assert found.tolist()[0] == pytest.approx(wanted, rel=1e-12)


def test_half_of_the_gradient_by_the_sign_of_the_advantage() -> None:
    """sech^2(tau (r - 1)/2) = 1/2 at tau (r - 1) = 1.763: for tau = 2 at r = 1.88, for tau = 4 at r = 1.44, A = 0 as A < 0."""
    ratio = tensor(1.87, 1.89, 1.43, 1.45, 1.6, 1.6, 1.6, 0.1, 0.1, 1.0)
    a = tensor(1, 1, -1, -1, 1, -1, 0, 1, 0, 1)
    found = SoftGate(2.0, 4.0).cut(at(ratio.log()), {"logp": ratio.log()}, a)
    assert found.int().tolist() == [[0, 1, 0, 1, 0, 1, 1, 1, 1, 0]]


def test_half_precision_advantages_keep_the_sharpness() -> None:
    """1.05 as a bfloat16 would be 1.046875."""
    log = torch.full((1, 2), math.log(2))
    found = SoftGate()(at(log), {"logp": log}, torch.tensor([[1.0, -1.0]], dtype=torch.bfloat16))
    assert found.dtype == torch.float32
    assert float(found[0, 1]) == pytest.approx(4 / 1.05 / (1 + math.exp(-1.05)), rel=1e-6)


def test_the_warning_points_at_the_caller() -> None:
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        SoftGate(1.0, 1.0)
        SoftGate(1.0, 0.9)
    assert [w.filename for w in seen] == [__file__]
    with pytest.raises(CallError, match="tau_neg"):
        SoftGate(tau_neg=0.0)


# -------------------------------------------------------------------- drifts
def test_the_clip_s_drift_in_numbers() -> None:
    """r = 1.5, 0.5: 0.3 and 0.3 beyond the bounds; only where the clip takes something away."""
    log = tensor(1.5, 1.5, 0.5, 0.5, 1.1).log()
    a = tensor(2, -2, 2, -2, 2)
    assert clip_drift(log, a, 0.2).tolist()[0] == pytest.approx([0.6, 0, 0, 0.6, 0])
    assert ClipDrift().drift(log, a, {}).tolist()[0] == pytest.approx([0.6, 0, 0, 0.6, 0])
    assert ClipDrift(0.4).drift(log, a, {}).tolist()[0] == pytest.approx([0.2, 0, 0, 0.2, 0])
    loss = ClipDrift()(at(log), {"logp": log}, a, {})
    assert loss.tolist()[0] == pytest.approx([-2.4, 3.0, -1.0, 1.6, -2.2])


def test_the_default_closed_form_in_numbers() -> None:
    log = tensor(math.log(2), -math.log(2), math.log(2))
    low = math.log(2)
    wanted = [1 - 2 * math.tanh(0.5), low - 0.6 * math.tanh(low / 0.6), 0.5 - 2 * math.tanh(0.25)]
    assert DiscoveredDrift().drift(log, tensor(1, -1, 0.5), {}).tolist()[0] == pytest.approx(wanted, rel=1e-12)


def test_the_untrained_network() -> None:
    assert (INPUTS, HIDDEN) == (8, 128)
    assert SHAPES == {"hidden": (None, 8), "out": (None,)}
    net = untrained(3)
    assert {k: tuple(v.shape) for k, v in net.items()} == {"hidden": (128, 8), "out": (128,)}
    assert float(net["out"].abs().sum()) == 0
    assert float(net["hidden"].var()) == pytest.approx(1 / 8, rel=0.15)  # 1024 draws
    assert torch.equal(net["hidden"], untrained(3)["hidden"])
    assert not torch.equal(net["hidden"], untrained(4)["hidden"])


def test_the_default_learnt_drift_in_numbers() -> None:
    """A single unit that sees log r alone: f = relu(0.5 tanh(2 log r) - 1e-4), or with 0.3 A of the clip's besides."""
    part = LearntDrift()
    assert (part.weights, part.xi, part.start, part.eps) == ("cartpole", 1e-4, "zero", 0.2)
    method: Any = None
    assert part.validate(method, method) is None
    assert "none such" in str(LearntDrift(weights="none such").validate(method, method))
    hidden = torch.zeros(1, 8)
    hidden[0, 2] = 2.0
    net = {"hidden": hidden, "out": torch.tensor([0.5])}
    log = tensor(math.log(1.5), -math.log(1.5))
    a = tensor(1, 1)
    one = 0.5 * math.tanh(2 * math.log(1.5))
    found = part.drift(log, a, net)
    assert found.dtype == F64
    assert found.tolist()[0] == pytest.approx([one - 1e-4, 0], rel=1e-12)
    assert part.but(start="clip").drift(log, a, net).tolist()[0] == pytest.approx([one + 0.3 - 1e-4, 0], rel=1e-12)
    for name, shape in (("hidden", (None, 8)), ("out", (None,))):
        assert len(part.initial()[name].shape) == len(shape)
    gap = features(tensor(math.log(1.5)), tensor(2.0))[0, 0].tolist()
    x = math.log(1.5)
    assert gap == pytest.approx([-0.5, 0.25, x, x * x, -1.0, 0.5, 2 * x, 2 * x * x], rel=1e-12)


# -------------------------------------------------------------------- the quadratic
def test_the_default_quadratic_in_numbers() -> None:
    """eps = 0.2; log-ratios beyond +-10 are +-10, without gradient."""
    assert FAR == 10.0
    log = tensor(math.log(1.5), math.log(0.5), -15, 15, -10, 9).requires_grad_()
    loss = Quadratic()(at(log), {"logp": log}, tensor(2, -2, 1, -1, 1, 1))
    near, far = math.exp(-10), math.exp(10)
    wanted = [-3 + 1.25, 1 + 1.25, 2.5 * (near - 1) ** 2 - near, 2.5 * (far - 1) ** 2 + far, 2.5 * (near - 1) ** 2 - near]
    assert loss.tolist()[0][:5] == pytest.approx(wanted, rel=1e-12)
    (slope,) = torch.autograd.grad(loss.sum(), log)
    assert slope[0, 2:4].tolist() == [0, 0]
    assert bool((slope[0, [0, 1, 5]] != 0).all())
