"""Details of rules that are easily wrong: PyTorch's defaults, tiny norms, missing gradients, and each test of the line search."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
from torch import Tensor

from polopt.batch import Clock
from polopt.errors import CallError
from polopt.part import KINDS, Can, make_part, part_names
from polopt.parts.rule import functional
from polopt.parts.rule.descend import Descend
from polopt.parts.rule.natural_gradient import NaturalGradient, NaturalGradientStepper, conjugate_gradient, fisher_product
from polopt.registry import get_method

torch.set_num_threads(1)


# -------------------------------------------------------------------- first-order rules
def walk(step: Callable[[Tensor], object], p: Tensor, scale: float, n: int = 4) -> Tensor:
    g = torch.Generator().manual_seed(1)
    for _ in range(n):
        step(scale * torch.randn(p.shape, generator=g, dtype=p.dtype))
    return p.detach().clone()


def stepped(rule: Descend, scale: float) -> Tensor:
    p = torch.linspace(-1, 1, 6, dtype=torch.float64).requires_grad_()
    stepper = rule.bind([p])

    def step(g: Tensor) -> None:
        p.grad = g
        stepper.apply()

    return walk(step, p, scale)


def by_pytorch(make: Callable[[list[Tensor]], torch.optim.Optimizer], scale: float, clip: float | None) -> Tensor:
    p = torch.linspace(-1, 1, 6, dtype=torch.float64).requires_grad_()
    optimizer = make([p])

    def step(g: Tensor) -> None:
        p.grad = g
        if clip is not None:
            torch.nn.utils.clip_grad_norm_([p], clip)
        optimizer.step()

    return walk(step, p, scale)


@pytest.mark.parametrize("scale", [10.0, 0.1, 1e-8])  # above the clip, below it, and as small as epsilon
def test_defaults_are_adam_with_pytorch_s_settings_and_a_clip_at_one_half(scale: float) -> None:
    wanted = by_pytorch(lambda p: torch.optim.Adam(p, lr=3e-4), scale, 0.5)
    torch.testing.assert_close(stepped(Descend(), scale), wanted, rtol=0, atol=1e-13)


def test_weight_decay_of_the_default_is_adam_s_own() -> None:
    """Added to the gradient, where AdamW takes it off the parameters."""
    wanted = by_pytorch(lambda p: torch.optim.Adam(p, lr=3e-4, weight_decay=0.1), 0.1, 0.5)
    torch.testing.assert_close(stepped(Descend(weight_decay=0.1), 0.1), wanted, rtol=0, atol=1e-13)


@pytest.mark.parametrize("scale", [10.0, 1e-8])
def test_defaults_of_rmsprop_and_sgd_are_pytorch_s(scale: float) -> None:
    rmsprop = by_pytorch(lambda p: torch.optim.RMSprop(p, lr=3e-4), scale, None)
    torch.testing.assert_close(
        stepped(Descend("rmsprop", max_grad_norm=None), scale), rmsprop, rtol=0, atol=1e-9
    )  # the rate is in float32
    sgd = by_pytorch(lambda p: torch.optim.SGD(p, lr=3e-4), scale, None)
    torch.testing.assert_close(stepped(Descend("sgd", max_grad_norm=None), scale), sgd, rtol=0, atol=1e-15)


def pure(rule: Descend, scale: float) -> Tensor:
    p = torch.linspace(-1, 1, 6, dtype=torch.float64)
    state = functional.initial(rule, p)

    def step(g: Tensor) -> None:
        nonlocal state
        moved, state, _ = rule.pure(p.clone(), g, state, torch.tensor(rule.lr, dtype=torch.float64))
        p.copy_(moved)

    return walk(step, p, scale)


@pytest.mark.parametrize("scale", [0.1, 1e-8])
@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_the_pure_form_is_pytorch_s(scale: float, decay: float) -> None:
    """Also where epsilon is all that divides: steps of 1e-3 to four digits (its step count, as PyTorch's, is in float32)."""
    for kind, make in (
        ("adam", lambda p: torch.optim.Adam(p, lr=1e-3, weight_decay=decay)),
        ("adamw", lambda p: torch.optim.AdamW(p, lr=1e-3, weight_decay=decay)),
        ("sgd", lambda p: torch.optim.SGD(p, lr=1e-3, weight_decay=decay, momentum=0.9)),
        ("rmsprop", lambda p: torch.optim.RMSprop(p, lr=1e-3, weight_decay=decay, momentum=0.9)),
    ):
        rule = Descend(kind, lr=1e-3, weight_decay=decay, momentum=0.9, max_grad_norm=None)  # type: ignore[arg-type]
        torch.testing.assert_close(pure(rule, scale), by_pytorch(make, scale, None), rtol=0, atol=1e-7, msg=kind)


@pytest.mark.parametrize("norm", [1e-6, 0.1, 2.0])
def test_the_pure_clip_is_pytorch_s_at_any_norm(norm: float) -> None:
    """g c / (|g| + 1e-6), never longer: 1e-6 matters for tiny bounds."""
    rule = Descend("sgd", lr=1.0, max_grad_norm=norm)
    for size in (0.5 * norm, norm, 3 * norm):
        g = torch.tensor([0.6, 0.8], dtype=torch.float64) * size
        p = torch.zeros(2, dtype=torch.float64)
        moved, _, report = functional.step(rule, p, g, {}, torch.tensor(1.0, dtype=torch.float64))
        other = p.clone().requires_grad_()
        other.grad = g.clone()
        torch.nn.utils.clip_grad_norm_([other], norm)
        torch.testing.assert_close(moved, -other.grad, rtol=1e-12, atol=0)
        assert math.isclose(float(report["grad_norm"]), size, rel_tol=1e-12)
        assert (float(report["skipped"]), float(report["lr"])) == (0.0, 1.0)


def test_the_rate_before_during_and_after_the_warm_up() -> None:
    warm = Descend(lr=2.0, warmup=0.5)
    assert [round(warm.rate(f), 9) for f in (-1.0, 0.0, 0.25, 0.5, 0.75, 2.0)] == [0.2, 0.2, 1.1, 2.0, 2.0, 2.0]
    cosine = Descend(lr=2.0, warmup=0.2, schedule="cosine")
    assert [round(cosine.rate(f), 9) for f in (0.1, 0.2, 0.6, 1.0)] == [1.1, 2.0, 1.0, 0.0]
    third = 1 + math.cos(math.pi / 4)
    assert math.isclose(Descend(lr=2.0, schedule="cosine").rate(0.25), third)
    assert Descend(lr=2.0, schedule="linear").rate(-3.0) == 2.0
    assert Descend(schedule="constant").rate(0.9) == 3e-4


@pytest.mark.parametrize("kind", ["adam", "adamw", "sgd", "rmsprop", "rmsprop-tf"])
def test_parameters_without_a_gradient_stay(kind: str) -> None:
    """Neither frozen ones nor those that the loss does not reach move, not even by weight decay."""
    p, q = torch.ones(2, requires_grad=True), torch.ones(3, requires_grad=True)
    frozen = torch.ones(4)
    rule = Descend(kind, lr=0.1, weight_decay=0.1, momentum=0.5, schedule="linear")  # type: ignore[arg-type]
    stepper = rule.bind([p, frozen, q])
    assert len(stepper.parameters) == 2
    p.grad = torch.ones(2)
    report = stepper.apply()
    assert math.isclose(float(report["lr"]), 0.1, rel_tol=1e-6)  # without a clock, training is at its start
    assert bool((p < 1).all())
    assert q.tolist() == [1.0, 1.0, 1.0]
    assert frozen.tolist() == [1.0] * 4


def test_reports_hold_no_graph() -> None:
    p = torch.ones(2, dtype=torch.float64, requires_grad=True)
    stepper = Descend("sgd", lr=0.0, max_grad_norm=None).bind([p])
    (p.grad,) = torch.autograd.grad((p**3).sum(), [p], create_graph=True)
    assert p.grad.requires_grad
    assert not any(x.requires_grad for x in stepper.apply().values())


def test_what_is_no_tensor_program_is_declared_to_run_on_the_host() -> None:
    """Samplers are generators; allocators, exploration and rules without a pure form look at values: none can be compiled."""
    for kind in (k for k in KINDS if k != "source"):  # sources hand over whole batches, outside of any graph
        for name in part_names(kind):
            part = make_part(kind, name)
            generator = kind != "rule" and inspect.isgeneratorfunction(type(part).__call__)
            valued = kind == "rule" and not hasattr(part, "pure")
            built = hasattr(part, "build")  # reads what was made from the data once, a tree of neighbours say
            assert part.host == (generator or valued or built or kind in ("allocator", "explore")), name
            assert getattr(part, "flat", False) == (kind == "rule" and not valued)


# -------------------------------------------------------------------- conjugate gradients
def test_conjugate_gradients_step_by_step() -> None:
    """A = diag(1, 3), b = (1, 1): one step goes b.b / b.Ab = 1/2 along b, two reach (1, 1/3)."""
    a, b = torch.tensor([1.0, 3.0], dtype=torch.float64), torch.ones(2, dtype=torch.float64)
    assert conjugate_gradient(lambda v: a * v, b, 1, 0.0).tolist() == [0.5, 0.5]
    np.testing.assert_allclose(conjugate_gradient(lambda v: a * v, b, 2, 0.0).numpy(), [1.0, 1 / 3], rtol=1e-14)
    np.testing.assert_allclose(conjugate_gradient(lambda v: a * v, b, 9, 1e-20).numpy(), [1.0, 1 / 3], rtol=1e-14)


def test_conjugate_gradients_stop_at_the_tolerance() -> None:
    """After the first step above the residual is (1/2, -1/2): a quarter of |b|^2, so 1/4 is enough, and 1 before any step."""
    a, b = torch.tensor([1.0, 3.0], dtype=torch.float64), torch.ones(2, dtype=torch.float64)
    asked: list[Tensor] = []

    def product(v: Tensor) -> Tensor:
        asked.append(v)
        return a * v

    for tolerance, steps, x in ((1.0, 0, 0.0), (0.25, 1, 0.5)):
        asked.clear()
        assert conjugate_gradient(product, b, 9, tolerance).tolist() == [x, x]
        assert len(asked) == steps
    assert conjugate_gradient(product, 0 * b, 9, 1e-10).tolist() == [0.0, 0.0]


# -------------------------------------------------------------------- the natural gradient
@dataclass
class Given:
    """Parameters x = 0 with a gradient; the loss is -gain(x), the divergence kl(x)."""

    gain: Callable[[Tensor], Tensor]
    divergence: Callable[[Tensor], Tensor]
    gradient: tuple[float, ...] = (-1.0,)
    clock: Clock = field(default_factory=Clock)

    def __post_init__(self) -> None:
        self.x = torch.zeros(len(self.gradient), dtype=torch.float64, requires_grad=True)
        self.parameters = [self.x]

    def backward(self) -> dict[str, Tensor]:
        self.x.grad = torch.tensor(self.gradient, dtype=torch.float64)
        return {"loss": torch.tensor(7.0)}

    def value(self) -> Tensor:
        return -self.gain(self.x.detach()).sum()

    def kl(self) -> Tensor:
        return self.divergence(self.x).sum()


def search(problem: Given, expected: float = 1.0, **settings: float) -> tuple[float, dict[str, float]]:
    """Where the line search along a full step of 1 ends, and its report."""
    rule = NaturalGradient(**settings)  # type: ignore[arg-type]
    stepper: NaturalGradientStepper = rule.bind(problem.parameters)
    one = torch.ones(1, dtype=torch.float64)
    report = stepper._line_search(problem, one, one, expected)
    assert not any(v.requires_grad for v in report.values())
    return problem.x.item(), {k: float(v) for k, v in report.items()}


def linear(x: Tensor) -> Tensor:
    return x


def free(x: Tensor) -> Tensor:
    return 0 * x


def test_the_full_step_is_tried_first() -> None:
    where, report = search(Given(linear, linear), delta=1.0)
    assert where == 1.0
    assert report == {"grad_norm": 1.0, "expected_improvement": 1.0, "improvement": 1.0, "kl": 1.0, "accepted_step": 1.0}


def test_steps_shrink_until_the_divergence_is_within_the_bound() -> None:
    """KL = x: with factor 1/2 and a bound of 1/4 the third step, exactly at the bound, is the first that fits."""
    where, report = search(Given(linear, linear), delta=0.25, backtrack=0.5, max_backtracks=3)
    assert where == 0.25
    assert (report["kl"], report["improvement"], report["accepted_step"]) == (0.25, 0.25, 0.25)
    where, report = search(Given(linear, linear), delta=0.25, backtrack=0.5, max_backtracks=2)
    assert where == 0.0
    assert report == {"grad_norm": 1.0, "expected_improvement": 1.0, "improvement": 0.0, "kl": 0.0, "accepted_step": 0.0}


@pytest.mark.parametrize(("ratio", "where"), [(0.0, 0.5), (0.5, 0.5), (0.6, 0.25)])
def test_an_improvement_must_be_a_share_of_what_was_expected(ratio: float, where: float) -> None:
    """gain = x (1 - x): 0 at the full step, 1/4 at a half (a half of what was expected there), 3/16 at a quarter."""
    found, report = search(Given(lambda x: x * (1 - x), free), backtrack=0.5, accept_ratio=ratio)
    assert found == where
    assert report["improvement"] == where * (1 - where)


def test_the_share_is_of_the_expected_improvement() -> None:
    """gain = x / 2 of an expected 2 x is a quarter everywhere: a share of 0.2 accepts it, one of 0.3 never does."""
    assert search(Given(lambda x: x / 2, free), expected=2.0, accept_ratio=0.2)[0] == 1.0
    assert search(Given(lambda x: x / 2, free), expected=2.0, accept_ratio=0.3)[0] == 0.0


def test_the_whole_step_by_hand() -> None:
    """KL = x^2 / 2 has Hessian 1; damping 1/4 makes it 5/4. g = 2: direction 8/5, full step sqrt(2 delta / (5/4)) = 0.4."""
    problem = Given(linear, lambda x: x.square() / 2, gradient=(-2.0,))
    report = NaturalGradient(delta=0.1, damping=0.25).bind(problem.parameters).step(problem)
    assert math.isclose(problem.x.item(), 0.4, rel_tol=1e-12)
    assert math.isclose(float(report["expected_improvement"]), 0.8, rel_tol=1e-6)
    assert math.isclose(float(report["kl"]), 0.08, rel_tol=1e-6)
    assert (float(report["grad_norm"]), float(report["accepted_step"]), float(report["loss"])) == (2.0, 1.0, 7.0)


@pytest.mark.parametrize(
    ("curvature", "damping", "length"),
    [
        # raised tenfold each time, from 1e-4 if it was 0: what is left of the curvature is 5e-5, 0.05, 50 and nothing
        (-5e-5, 0.0, 5e-5),
        (-0.05, 0.01, 0.05),
        (-50.0, 0.01, 50.0),
        (-500.0, 0.01, None),
    ],
)
def test_damping_is_raised_tenfold_four_times(curvature: float, damping: float, length: float | None) -> None:
    problem = Given(linear, lambda x: curvature * x.square() / 2)
    full, expected = (
        NaturalGradient(delta=0.5, damping=damping).bind(problem.parameters)._direction(problem, torch.ones(1).double())
    )
    if length is None:
        assert full is None
        assert expected == 0.0
    else:
        assert full is not None
        assert math.isclose(full.item(), 1 / math.sqrt(length), rel_tol=1e-9)  # sqrt(2 delta / c) with 2 delta = 1
        assert math.isclose(expected, full.item(), rel_tol=1e-12)


def test_damping_is_raised_where_the_curvature_overflows() -> None:
    """x.Fx = g^2 / damping: 1e310 and 1e309 are infinite in float64, 1e308 is not; the step is sqrt(2 delta / 0.01) = 10 long."""
    rule = NaturalGradient(delta=0.5, damping=1e-4)
    problem = Given(linear, lambda x: x)
    full, _ = rule.bind(problem.parameters)._direction(problem, torch.tensor([1e153], dtype=torch.float64))
    assert full is not None
    assert math.isclose(full.item(), 10.0, rel_tol=1e-9)


def test_defaults_are_those_of_the_reference_implementation() -> None:
    """Spinning Up's TRPO: delta 0.01, damping 0.1, 10 iterations, factor 0.8, 10 tries; any improvement is accepted."""
    problem = Given(linear, lambda x: x.square() / 2)
    NaturalGradient().bind(problem.parameters).step(problem)
    assert math.isclose(problem.x.item(), math.sqrt(0.02 / 1.1), rel_tol=1e-9)
    assert search(Given(linear, lambda x: x / 70))[0] == pytest.approx(0.8**2)  # the divergence is within 0.01 below x = 0.7
    assert search(Given(linear, lambda x: x / 13.5))[0] == pytest.approx(0.8**9)  # x <= 0.135: the tenth try
    assert search(Given(linear, lambda x: x / 13))[0] == 0.0  # x <= 0.13: none of ten
    assert search(Given(lambda x: x / 1e9, free))[0] == 1.0


def direction(curvature: Tensor, g: Tensor, rule: NaturalGradient) -> Tensor:
    problem = Given(linear, lambda x: (curvature * x.square()).sum() / 2)
    problem.x = torch.zeros_like(g).requires_grad_()
    problem.parameters = [problem.x]
    full, _ = rule.bind(problem.parameters)._direction(problem, g)
    assert full is not None
    return full / full.norm()


def test_default_accuracy_of_the_direction() -> None:
    """Ten iterations, or until the residual is 1e-10 of the squared gradient."""
    wide = torch.logspace(0, 2, 24, dtype=torch.float64)
    g = torch.ones(24, dtype=torch.float64)
    wanted = conjugate_gradient(lambda v: (wide + 0.1) * v, g, 10, 0.0)
    torch.testing.assert_close(direction(wide, g, NaturalGradient()), wanted / wanted.norm(), rtol=1e-6, atol=1e-9)
    # A = diag(1 - e, 1 + e): after one step x = (1, 1), and e^2 remains; after two x is exact
    for left, ratio in ((0.9e-10, 1.0), (1.2e-10, 1 + 2 * 1.2e-10**0.5)):
        e = torch.tensor([-1.0, 1.0], dtype=torch.float64) * left**0.5
        x = direction(0.9 + e, torch.ones(2, dtype=torch.float64), NaturalGradient())
        assert math.isclose(float(x[0] / x[1]), ratio, rel_tol=1e-8)


def test_fisher_products_of_a_divergence_that_does_not_bend() -> None:
    """Parameters that the divergence does not depend on, or only linearly, have a Hessian of 0; the product holds no graph."""
    a, b = torch.ones(2, dtype=torch.float64, requires_grad=True), torch.ones(1, dtype=torch.float64, requires_grad=True)
    v = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
    product = fisher_product((a.square() * torch.tensor([1.0, 2.0])).sum(), [a, b])
    for _ in range(2):
        assert product(v).tolist() == [2.0, 8.0, 0.0]
    assert not product(v).requires_grad
    assert fisher_product(a.sum(), [a, b])(v).tolist() == [0.0, 0.0, 0.0]
    mixed = fisher_product(a.square().sum() + b.sum(), [a, b])
    assert mixed(v).tolist() == [2.0, 4.0, 0.0]


def test_parameters_that_the_loss_does_not_reach_stay() -> None:
    problem = Given(linear, lambda x: x.square() / 2)
    other, frozen = torch.ones(2, dtype=torch.float64, requires_grad=True), torch.ones(1)
    stepper = NaturalGradient().bind([other, problem.x, frozen])
    assert len(stepper.parameters) == 2
    report = stepper.step(problem)
    assert other.tolist() == [1.0, 1.0]
    assert problem.x.item() > 0
    assert stepper.state() == {}
    assert float(report["grad_norm"]) == 1.0


@pytest.mark.parametrize("gradient", [(0.0,), (0.0, 0.0), (math.nan,), (1.0, math.nan), (math.inf, 1.0)])
def test_without_a_gradient_no_divergence_is_computed(gradient: tuple[float, ...]) -> None:
    """Nothing moves, and the report says so."""

    def never(x: Tensor) -> Tensor:
        raise AssertionError("the divergence was asked for")

    problem = Given(linear, never, gradient)
    stepper = NaturalGradient().bind(problem.parameters)
    assert stepper._direction(problem, -torch.tensor(gradient)) == (None, 0.0)
    report = stepper.step(problem)
    assert [float(report[k]) for k in ("expected_improvement", "improvement", "kl", "accepted_step", "loss")] == [0.0] * 4 + [7.0]
    assert bool((problem.x == 0).all())


def test_a_residual_that_may_be_the_whole_gradient_leaves_no_direction() -> None:
    """Conjugate gradients then stop at x = 0, whose curvature is 0: there is nothing to scale."""
    problem = Given(linear, lambda x: x.square() / 2)
    report = NaturalGradient(residual_tol=1.0).bind(problem.parameters).step(problem)
    assert problem.x.item() == 0.0
    assert float(report["accepted_step"]) == 0.0


def test_one_minibatch_of_everything_is_allowed() -> None:
    """One step per batch: whatever says otherwise is refused, what says the same is not."""
    trpo = get_method("trpo")
    assert trpo.but("mine", minibatches=1, epochs=1).update().rule == trpo.update().rule
    for change in ({"epochs": 2}, {"minibatch": 1}, {"minibatches": 2}):
        with pytest.raises(CallError, match="one step per batch"):
            trpo.but("mine", **change)
    assert NaturalGradient().needs == {"kl@now"}
    assert NaturalGradient().requires == {Can.KL}
    assert NaturalGradient().alone
