"""`Descend` against PyTorch's optimisers, its clip, schedules, refusal of bad gradients, and state."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from torch import Tensor

from polopt.batch import Clock
from polopt.errors import CallError, PoloptError
from polopt.parts.rule import functional
from polopt.parts.rule.descend import Descend, DescendStepper
from polopt.tree import load_tree, save_tree

torch.set_num_threads(1)
KINDS = ["adam", "adamw", "sgd", "rmsprop", "rmsprop-tf"]


@dataclass
class Given:
    """A problem whose gradients are given."""

    parameters: list[Tensor]
    grads: list[Tensor]
    clock: Clock = field(default_factory=Clock)

    def backward(self) -> dict[str, Tensor]:
        for p, g in zip(self.parameters, self.grads, strict=True):
            p.grad = g.clone()
        return {"loss": torch.tensor(1.0)}

    def value(self) -> Tensor:
        raise AssertionError("not asked for")

    kl = value


def parameters(seed: int = 0) -> list[Tensor]:
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(3, 4, generator=g, requires_grad=True), torch.randn(5, generator=g, requires_grad=True)]


def gradients(seed: int) -> list[Tensor]:
    g = torch.Generator().manual_seed(1000 + seed)
    return [torch.randn(3, 4, generator=g), torch.randn(5, generator=g)]


def reference(rule: Descend, params: list[Tensor]) -> torch.optim.Optimizer:
    o = rule.optimizer
    if o == "adam":
        return torch.optim.Adam(params, rule.lr, rule.betas, rule.eps, rule.weight_decay)
    if o == "adamw":
        return torch.optim.AdamW(params, rule.lr, rule.betas, rule.eps, rule.weight_decay)
    if o == "sgd":
        return torch.optim.SGD(params, rule.lr, rule.momentum, weight_decay=rule.weight_decay)
    return torch.optim.RMSprop(params, rule.lr, rule.alpha, rule.eps, rule.weight_decay, rule.momentum)


@pytest.mark.parametrize("kind", ["adam", "adamw", "sgd", "rmsprop"])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("clip", [None, 0.3])
def test_steps_are_those_of_pytorch(kind: str, momentum: float, clip: float | None) -> None:
    rule = Descend(kind, lr=0.02, momentum=momentum, weight_decay=0.1, max_grad_norm=clip)  # type: ignore[arg-type]
    mine, theirs = parameters(), parameters()
    stepper, other = rule.bind(mine), reference(rule, theirs)
    for i in range(5):
        report = stepper.step(Given(mine, gradients(i)))
        for p, g in zip(theirs, gradients(i), strict=True):
            p.grad = g
        norm = torch.nn.utils.clip_grad_norm_(theirs, clip if clip is not None else math.inf)
        other.step()
        assert torch.allclose(report["grad_norm"], norm)
        assert float(report["skipped"]) == 0.0
        assert float(report["loss"]) == 1.0
    for p, q in zip(mine, theirs, strict=True):
        torch.testing.assert_close(p, q, atol=1e-6, rtol=1e-5)


def test_tensorflow_rmsprop_starts_at_one_with_epsilon_inside_the_root() -> None:
    rule = Descend("rmsprop-tf", lr=0.1, alpha=0.9, eps=0.5, max_grad_norm=None)
    p = torch.tensor([1.0], requires_grad=True)
    stepper = rule.bind([p])
    square, x = 1.0, 1.0
    for g in (2.0, -3.0, 0.5):
        stepper.step(Given([p], [torch.tensor([g])]))
        square = 0.9 * square + 0.1 * g * g
        x -= 0.1 * g / math.sqrt(square + 0.5)
        assert math.isclose(p.item(), x, rel_tol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_pure_form_makes_the_same_steps(kind: str, momentum: float) -> None:
    """The form inside compiled graphs follows the optimiser object, also through a gradient that is not finite."""
    rule = Descend(kind, lr=0.02, momentum=momentum, weight_decay=0.1)  # type: ignore[arg-type]
    g = torch.Generator().manual_seed(0)
    p = torch.randn(20, generator=g).requires_grad_()
    q, stepper = p.detach().clone(), rule.bind([p])
    state = functional.initial(rule, q)
    assert rule.flat  # so that all parameters are one tensor, as here
    for i in range(5):
        grad = torch.randn(20, generator=g)
        grad[0] = math.nan if i == 2 else grad[0]
        report = stepper.step(Given([p], [grad]))
        q, state, other = rule.pure(q, grad, state, torch.tensor(rule.rate(0.0)))
        assert report["skipped"] == other["skipped"] == float(i == 2)
        torch.testing.assert_close(p.detach(), q, atol=1e-6, rtol=1e-5)
        for k, v in stepper.tensors().items():
            torch.testing.assert_close(v, state[k], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite_changes_nothing(kind: str, bad: float) -> None:
    rule = Descend(kind, lr=0.1, momentum=0.5, weight_decay=0.1)  # type: ignore[arg-type]
    params = parameters()
    stepper = rule.bind(params)
    stepper.step(Given(params, gradients(0)))
    before = [p.detach().clone() for p in params], [{k: v.clone() for k, v in s.items()} for s in stepper.states]
    broken = gradients(1)
    broken[1][2] = bad
    assert float(stepper.step(Given(params, broken))["skipped"]) == 1.0
    assert all(torch.equal(p, q) for p, q in zip(params, before[0], strict=True))
    for s, old in zip(stepper.states, before[1], strict=True):
        assert all(torch.equal(s[k], old[k]) for k in old)
    assert float(stepper.step(Given(params, gradients(2)))["skipped"]) == 0.0
    assert not torch.equal(params[0], before[0][0])


def test_a_loss_that_reaches_no_parameter_is_an_error() -> None:
    params = parameters()
    with pytest.raises(PoloptError, match="no parameter received a gradient"):
        Descend().bind(params).apply()


@pytest.mark.parametrize("kind", KINDS)
def test_state_survives_a_checkpoint_bit_for_bit(kind: str, tmp_path: Path) -> None:
    rule = Descend(kind, lr=0.1, momentum=0.5)  # type: ignore[arg-type]
    a = parameters()
    first = rule.bind(a)
    for i in range(3):
        first.step(Given(a, gradients(i)))
    save_tree(tmp_path / "c", {"rule": first.state()}, {})
    b = [p.detach().clone().requires_grad_() for p in a]
    second = rule.bind(b)
    second.load(load_tree(tmp_path / "c")[0]["rule"])
    for i in range(3, 6):
        first.step(Given(a, gradients(i)))
        second.step(Given(b, gradients(i)))
    assert all(torch.equal(p, q) for p, q in zip(a, b, strict=True))


def test_state_of_another_optimiser_is_refused() -> None:
    params = parameters()
    adam: DescendStepper = Descend("adam").bind(params)
    with pytest.raises(KeyError):
        adam.load(Descend("rmsprop").bind(params).state())


def test_schedules() -> None:
    assert Descend(lr=2.0).rate(0.7) == 2.0
    linear = Descend(lr=2.0, schedule="linear")
    assert [linear.rate(f) for f in (0.0, 0.25, 1.0, 1.5)] == [2.0, 1.5, 0.0, 0.0]
    cosine = Descend(lr=2.0, schedule="cosine")
    assert math.isclose(cosine.rate(0.5), 1.0)
    assert math.isclose(cosine.rate(torch.tensor(1.0)), 0.0, abs_tol=1e-12)
    warm = Descend(lr=2.0, schedule="linear", warmup=0.2)
    assert [round(warm.rate(f), 6) for f in (0.0, 0.1, 0.2, 0.6, 1.0)] == [0.2, 1.1, 2.0, 1.0, 0.0]


def test_the_scheduled_rate_is_used_and_reported() -> None:
    p = torch.zeros(1, requires_grad=True)
    stepper = Descend("sgd", lr=1.0, schedule="linear", max_grad_norm=None).bind([p])
    report = stepper.step(Given([p], [torch.ones(1)], Clock(1, 0.75)))
    assert p.item() == -0.25
    assert float(report["lr"]) == 0.25


def test_settings_out_of_range_are_refused() -> None:
    for bad in ({"lr": -1.0}, {"eps": 0.0}, {"max_grad_norm": 0.0}, {"warmup": 1.0}, {"alpha": 1.0}):
        with pytest.raises(CallError, match=r"rule\.\w+ = "):
            Descend(**bad)  # type: ignore[arg-type]
