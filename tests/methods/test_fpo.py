"""FPO: identities of the ratio of flow-matching losses, the released code's loss, edge cases, and learning both goals."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import polopt
import polopt.loops.compiled as compiled_steps
from polopt.batch import Batch, Clock
from polopt.errors import CallError
from polopt.loops.improve import Improve
from polopt.overrides import resolve
from polopt.parts.surrogate.clip import Clip
from polopt.parts.surrogate.flow import FlowClip
from polopt.policies.flow import FlowPolicy
from polopt.registry import get_method
from polopt.stats import NOW

F64 = torch.float64
FPO = get_method("fpo")
SMALL = {"policy.hidden": (16,), "collect.envs": 4, "collect.steps": 8, "evaluate.episodes": 4, "optim.compile": "never"}


def batch_of(old: Tensor, mask: Tensor | None = None) -> Batch:
    mask = torch.ones(old.shape[:2], dtype=torch.bool) if mask is None else mask
    return Batch(mask=mask, stats={"cfm@old": old})


def loss_of(part: FlowClip, old: Tensor, now: Tensor, advantage: Tensor) -> Tensor:
    found: Tensor = part(batch_of(old), {"cfm": now}, advantage)[0]
    return found


def losses(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64) * 2


def collected(**over: Any) -> tuple[Improve, FlowPolicy, Batch]:
    """A run of FPO that has collected its first batch, and that batch as single decisions."""
    resolved = resolve("fpo", "point:two", {**SMALL, **over})
    run = Improve(resolved.method, resolved.task, resolved.settings)

    batch = next(iter(run.collect(Clock()).values()))
    run.collector.close()
    assert isinstance(run.policy, FlowPolicy)
    return run, run.policy, batch.decisions()


# -------------------------------------------------------------------- identities
@pytest.mark.identity("fpo", "at the start of an update every ratio is 1")
@pytest.mark.parametrize("average", ["losses", "surrogates"])
def test_ratios_start_at_one(average: Any) -> None:
    old = losses(3, 4, 5)
    assert torch.equal(
        FlowClip(average=average).ratio(batch_of(old), {"cfm": old}), torch.ones(3, 4, 1 if average == "losses" else 5)
    )
    _, policy, batch = collected()
    now = policy.evaluate(batch, frozenset({"cfm"}), NOW)
    torch.testing.assert_close(FlowClip().ratio(batch, now), torch.ones(32, 1, 1), atol=1e-5, rtol=0)
    assert batch.stats["cfm@old"].shape == (32, 1, 8)


@pytest.mark.identity("fpo", "at the start the objective's gradient is -A times that of the mean loss over pairs")
@pytest.mark.parametrize("average", ["losses", "surrogates"])
def test_first_gradient(average: Any) -> None:
    old, advantage = losses(3, 4, 5), torch.randn(3, 4, dtype=F64, generator=torch.Generator().manual_seed(1))
    now = old.clone().requires_grad_()
    objective = -loss_of(FlowClip(average=average), old, now, advantage).sum()
    (found,) = torch.autograd.grad(objective, now)
    torch.testing.assert_close(found, (-advantage / 5)[..., None].expand_as(old), rtol=1e-14, atol=0)


@pytest.mark.identity("fpo", "a step lowers the loss of an action of positive advantage and raises that of a negative one")
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_steps_follow_the_sign_of_the_advantage(sign: float) -> None:
    _, policy, batch = collected()
    batch = batch.rows(slice(0, 1))
    before = policy.evaluate(batch, frozenset({"cfm"}), NOW)
    loss, _ = FlowClip()(batch.adding({"cfm@old": before["cfm"].detach()}), before, torch.full((1, 1), sign))
    loss.sum().backward()
    with torch.no_grad():
        for p in policy.policy.parameters():
            p -= 0.01 * p.grad
    after = policy.evaluate(batch, frozenset({"cfm"}), NOW)["cfm"].mean()
    assert sign * float((after - before["cfm"].mean()).detach()) < -1e-6


@pytest.mark.identity("fpo", "with equal advantages of 1 a first step is a step of flow matching on the policy's own draws")
def test_equal_advantages_are_flow_matching() -> None:
    _, policy, batch = collected()
    parameters = list(policy.policy.parameters())
    now = policy.evaluate(batch, frozenset({"cfm"}), NOW)
    loss = FlowClip()(batch.adding({"cfm@old": now["cfm"].detach()}), now, torch.ones(32, 1))[0].mean()
    ours = torch.autograd.grad(loss, parameters, retain_graph=True)
    noise, time = batch.stats["cfm_noise@behaviour"], batch.stats["cfm_time@behaviour"]
    a, o = batch.action[:, 0], batch.obs[:, 0]
    t = time[:, 0, :, None]
    x = t * noise[:, 0] + (1 - t) * a[:, None]
    error = (1 - t) * (policy.policy(o, x, time[:, 0]) - (noise[:, 0] - a[:, None]))
    for mine, theirs in zip(ours, torch.autograd.grad(error.square().mean(), parameters), strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-6, rtol=1e-5)


@pytest.mark.identity(
    "fpo", "averaging losses before exp removes Jensen's gap as pairs grow in number; one surrogate per pair keeps it"
)
def test_jensens_gap() -> None:
    """E exp(mean_N d) - exp(E d) = exp(E d) (Var d / 2N + ...); E mean_N exp(d) does not depend on N."""
    spread, mean, trials = 0.4, 0.1, 40_000
    gaps, kept = {}, {}
    for n in (1, 4, 16, 64):
        d = mean + spread * torch.randn(trials, 1, n, dtype=F64, generator=torch.Generator().manual_seed(n))
        old = torch.full_like(d, 5.0)
        ratios = {k: FlowClip(average=k, bound=math.inf).ratio(batch_of(old), {"cfm": old - d}) for k in ("losses", "surrogates")}  # type: ignore[arg-type]
        gaps[n], kept[n] = (float(ratios[k].mean()) - math.exp(mean) for k in ("losses", "surrogates"))
    for n, gap in gaps.items():
        assert gap == pytest.approx(math.exp(mean) * (math.exp(spread**2 / (2 * n)) - 1), abs=0.01)
    full = math.exp(mean) * (math.exp(spread**2 / 2) - 1)
    assert all(gap == pytest.approx(full, abs=0.01) for gap in kept.values())
    assert gaps[64] < 0.1 * full


@pytest.mark.identity("fpo", "where the losses are minus log-probabilities it is PPO's clipped surrogate")
def test_it_is_ppo_where_losses_are_likelihoods() -> None:
    old, now = -losses(4, 6), (-losses(4, 6, seed=1)).requires_grad_()
    advantage = torch.randn(4, 6, dtype=F64, generator=torch.Generator().manual_seed(2))
    ours = loss_of(FlowClip(low=0.2, high=0.3, bound=math.inf), -old[..., None], -now[..., None], advantage)
    batch = Batch.of(logp=now, logp_old=old)
    theirs = Clip(low=0.2, high=0.3)(batch, {"logp": now}, advantage)
    assert torch.equal(ours, theirs)
    assert torch.equal(*(torch.autograd.grad(x.sum(), now, retain_graph=True)[0] for x in (ours, theirs)))


@pytest.mark.identity("fpo", "one pair per decision makes both averages the same")
@given(st.integers(0, 1000))
def test_one_pair(seed: int) -> None:
    old, now, advantage = losses(2, 3, 1, seed=seed), losses(2, 3, 1, seed=seed + 1), losses(2, 3, seed=seed + 2) - 1
    a, b = (loss_of(FlowClip(average=k), old, now, advantage) for k in ("losses", "surrogates"))
    assert torch.equal(a, b)


# -------------------------------------------------------------------- against the released code
@pytest.mark.parametrize("form", ["locomotion, losses", "locomotion, surrogates", "grid world"])
def test_losses_are_those_of_the_released_code(form: str) -> None:
    """Both parts of it, written in NumPy."""
    rng = np.random.default_rng(0)
    old, now, adv = rng.exponential(2, (3, 4, 8)), rng.exponential(2, (3, 4, 8)), rng.standard_normal((3, 4))
    if form == "locomotion, losses":
        part = FlowClip(bound=math.inf)
        rho = np.exp(old.mean(-1, keepdims=True) - now.mean(-1, keepdims=True))
    elif form == "locomotion, surrogates":
        part = FlowClip(average="surrogates")
        rho = np.exp(np.clip(old - now, -3, 3))
    else:
        part = FlowClip()
        rho = np.exp(np.clip(np.clip(old - now, -3, 3).mean(-1, keepdims=True), -3, 3))
    wanted = -np.minimum(rho * adv[..., None], np.clip(rho, 0.95, 1.05) * adv[..., None]).mean()
    found = loss_of(part, *(torch.from_numpy(x) for x in (old, now, adv))).mean()
    assert float(found) == pytest.approx(wanted, rel=1e-12)


# -------------------------------------------------------------------- edge cases
def test_a_negative_advantage_has_no_gradient_once_its_ratio_is_below_the_clip() -> None:
    old = torch.full((1, 3, 2), 1.0, dtype=F64)
    now = torch.tensor([0.0, 0.02, 0.2], dtype=F64)[None, :, None].add(1).expand(1, 3, 2).clone().requires_grad_()
    advantage = torch.full((1, 3), -1.0, dtype=F64)
    loss_of(FlowClip(), old, now, advantage).sum().backward()
    assert now.grad is not None
    assert (now.grad[0, :, 0] != 0).tolist() == [True, True, False]
    assert FlowClip().cut(batch_of(old), {"cfm": now}, advantage).tolist() == [[False, False, True]]
    assert not FlowClip().cut(batch_of(old), {"cfm": now}, -advantage).any()


@settings(max_examples=60, deadline=None)
@given(st.floats(-1e6, 1e6), st.floats(-10, 10), st.sampled_from(["losses", "surrogates"]), st.sampled_from([3.0, math.inf]))
def test_losses_that_explode_stay_finite(drop: float, advantage: float, average: Any, bound: float) -> None:
    old = torch.full((1, 2, 3), 1e6)
    now = (old - torch.tensor([drop, 0.0, 1.0])).requires_grad_()
    part = FlowClip(average=average, bound=bound)
    found = loss_of(part, old, now, torch.full((1, 2), advantage))
    found.sum().backward()
    assert found.isfinite().all()
    assert now.grad is not None
    assert now.grad.isfinite().all()
    assert float(part.ratio(batch_of(old), {"cfm": now}).max().detach()) <= math.exp(min(bound, 20)) * 1.001


def test_what_lies_outside_the_mask_has_ratio_one_and_no_gradient() -> None:
    old, mask = losses(2, 3, 4), torch.tensor([[True, True, False], [True, False, False]])
    old[~mask] = math.nan
    now = losses(2, 3, 4, seed=1).requires_grad_()
    ratio = FlowClip().ratio(batch_of(old, mask), {"cfm": now})
    assert torch.equal(ratio[~mask], torch.ones(3, 1, dtype=F64))
    ratio.sum().backward()
    assert now.grad is not None
    assert not now.grad[~mask].any()


def test_half_precision_becomes_float32() -> None:
    old = losses(2, 3, 4).to(torch.bfloat16)
    assert FlowClip().ratio(batch_of(old), {"cfm": old}).dtype == torch.float32


def test_losses_of_another_number_of_pairs_are_refused() -> None:
    with pytest.raises(CallError, match=r"'cfm@now' has shape \(2, 3, 4\), 'cfm@old' \(2, 3, 5\)"):
        loss_of(FlowClip(), losses(2, 3, 5), losses(2, 3, 4), losses(2, 3))


# -------------------------------------------------------------------- in the loop
@pytest.mark.parametrize(
    "over", [{}, {"epochs": 1, "minibatch": None}, {"surrogate.average": "surrogates", "policy.normalize_obs": True}]
)
def test_runs_reproduce_and_report(over: dict[str, Any]) -> None:
    runs = [polopt.train("fpo", "point:two", budget="2-updates", out=False, overrides={**SMALL, **over}) for _ in range(2)]
    assert runs[0].summary["eval_score"] == runs[1].summary["eval_score"]
    assert runs[0].summary["exact_resume"]


def test_pairs_are_reused_in_all_epochs_and_drawn_anew_for_each_batch() -> None:
    run, _, first = collected()
    seen: list[Tensor] = []

    executor = run.executors["policy"]
    original = executor.policy.evaluate

    def evaluate(batch: Batch, want: frozenset[str], view: Any = NOW) -> dict[str, Tensor]:
        seen.append(batch.stats["cfm_time@behaviour"].sum((1, 2)))
        return original(batch, want, view)

    executor.policy.evaluate = evaluate  # type: ignore[method-assign]
    advantage = torch.randn(32, 1)
    executor.run(first, advantage, first.clock)

    total = first.stats["cfm_time@behaviour"].sum()
    per_epoch = torch.cat(seen).view(16, -1).sum(1)
    torch.testing.assert_close(per_epoch, total.expand(16))


def test_compiled_steps_make_the_same_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled_steps, "BACKEND", "eager")

    def final(how: str) -> Tensor:
        over = {**SMALL, "optim.compile": how, "epochs": 2, "minibatch": 16, "rule.lr": 0.01}
        run = polopt.train("fpo", "bandit:hidden", budget="3-updates", out=False, overrides=over)
        policy = run.policy
        assert isinstance(policy, FlowPolicy)
        return torch.cat([p.detach().flatten() for p in policy.parameters()])

    torch.testing.assert_close(final("always"), final("never"), rtol=1e-4, atol=2e-6)
