"""Lp-Reg: the filtered distribution, which rare tokens it spares, and its loss against the formula written with plain loops."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from polopt.batch import Batch
from polopt.errors import CallError
from polopt.loops.improve import Improve
from polopt.method import Method
from polopt.overrides import resolve
from polopt.parts.penalty.low_probability import LowProbability
from polopt.registry import get_method
from polopt.stats import FILTERED, find_stat

torch.set_num_threads(1)
F64 = torch.float64
B, T, V = 12, 9, 7


class World:
    """Random logits of old and new policy, drawn tokens, advantages of both signs, and padding with poison in it."""

    def __init__(self, seed: int, kappa: float = 0.05, moved: float = 0.3) -> None:
        g = torch.Generator().manual_seed(seed)
        self.kappa = kappa
        self.old = 2 * torch.randn(B, T, V, generator=g, dtype=F64)
        self.logits = (self.old + moved * torch.randn(B, T, V, generator=g, dtype=F64)).requires_grad_()
        self.action = torch.randint(0, V, (B, T), generator=g)
        self.mask = torch.arange(T) < torch.randint(1, T + 1, (B, 1), generator=g)
        self.advantage = torch.randn(B, 1, generator=g, dtype=F64).expand(B, T)

    def stat(self, name: str, logits: Tensor) -> Tensor:
        fn = find_stat(name)
        assert fn is not None
        return fn(logits.reshape(-1, V), self.action.reshape(-1)).view(B, T)

    def batch(self, form: str = "code") -> Batch:
        proxy = f"proxy_logp({self.kappa!r})"
        stats = {f"{proxy}@old": self.stat(proxy, self.old)}
        if form == "paper":
            kl = f"proxy_kl({self.kappa!r})"
            stats = {f"{n}@now": self.stat(n, self.logits) for n in (proxy, kl)}
        nan = torch.tensor(math.nan, dtype=F64)
        stats = {k: torch.where(self.mask, v, nan) for k, v in stats.items()}
        return Batch.of(
            logp=torch.where(self.mask, self.stat("logp", self.logits), -50.0),  # padding would be the rarest of all
            logp_old=self.stat("logp", self.old), mask=self.mask, stats=stats,
        )  # fmt: skip

    def loss(self, method: Method, form: str = "code") -> tuple[float, Tensor, dict[str, Tensor]]:
        loss, told = method.loss(self.batch(form), advantage=self.advantage)
        (g,) = torch.autograd.grad(loss, self.logits)
        return float(loss.detach()), g, told


def lp_reg(**penalty: Any) -> Method:
    return get_method("lp-reg").but("x", penalty=LowProbability(**{"rho": 0.3, "kappa": 0.05, **penalty}))


def formula(w: World, coef: float, rho: float, form: str) -> tuple[float, int]:
    """The loss, token by token, and how many tokens are spared."""
    old, new = (torch.as_tensor(x).detach().log_softmax(-1).exp().numpy() for x in (w.old, w.logits))
    mask, action, adv = w.mask.numpy(), w.action.numpy(), w.advantage.numpy()
    punished = sorted((new[b, t, action[b, t]], b, t) for b in range(B) for t in range(T) if mask[b, t] and adv[b, t] < 0)
    k = int(rho * len(punished))
    rare = {(b, t) for _, b, t in punished[:k]} if k > 1 else set()
    total, spared = 0.0, 0
    for b in range(B):
        for t in range(T):
            if not mask[b, t]:
                continue
            a, A = action[b, t], adv[b, t]
            r = new[b, t, a] / old[b, t, a]
            total += max(-A * r, -A * min(max(r, 0.0), 10.0))
            p = (old if form == "code" else new)[b, t]
            q = np.where(p >= w.kappa * p.max(), p, 0.0)
            q = q / q.sum()
            if (b, t) not in rare or q[a] == 0 or (form == "code" and new[b, t, a] >= q[a]):
                continue
            spared += 1
            if form == "code":
                d = math.log(q[a] / new[b, t, a])
                total += coef * (math.exp(d) - d - 1)
            else:
                total += coef * sum(x * math.log(x / y) for x, y in zip(q, new[b, t], strict=True) if x > 0)
    return total / mask.sum(), spared


@pytest.mark.identity("lp-reg", "the loss is the paper's formula, with the released code's estimate and with the full divergence")
@pytest.mark.parametrize("form", ["code", "paper"])
@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 10_000), rho=st.sampled_from([0.05, 0.3, 1.0]), coef=st.floats(0.1, 3.0))
def test_loss_is_the_formula(form: str, seed: int, rho: float, coef: float) -> None:
    w = World(seed)
    wanted, spared = formula(w, coef, rho, form)
    found, _, told = w.loss(lp_reg(coef=coef, rho=rho, form=form), form)
    assert found == pytest.approx(wanted, rel=1e-9)
    assert int(told["spared"]) == spared


@pytest.mark.identity("lp-reg", "with rho = 0 or beta = 0 it is GRPO with the wide clip, loss and gradient")
@pytest.mark.parametrize("off", [{"rho": 0.0}, {"coef": 0.0}])
def test_switched_off_it_is_the_base(off: dict[str, float]) -> None:
    w = World(1)
    base = get_method("lp-reg").but("base", penalty=())
    plain, g_plain, _ = w.loss(base)
    loss, g, _ = w.loss(lp_reg(**off))
    assert loss == plain
    assert torch.equal(g, g_plain)
    assert not torch.equal(w.loss(lp_reg(rho=1.0))[1], g_plain)


@pytest.mark.identity(
    "lp-reg", "the proxy raises every token that it keeps, by one factor, which is 1 only where nothing is dropped"
)
@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10_000), kappa=st.floats(0.001, 0.9), scale=st.floats(0.05, 4.0))
def test_proxy_raises_what_it_keeps(seed: int, kappa: float, scale: float) -> None:
    logits = scale * torch.randn(5, V, generator=torch.Generator().manual_seed(seed), dtype=F64)
    p = logits.softmax(-1)
    proxy, kept = (find_stat(f"{n}({kappa!r})") for n in ("proxy_logp", "kept_mass"))
    assert proxy is not None
    assert kept is not None
    for a in range(V):
        action = torch.full((5,), a)
        q, mass = proxy(logits, action), kept(logits, action)
        inside = p[:, a] >= kappa * p.amax(-1)
        assert bool((q[~inside] == FILTERED).all())
        torch.testing.assert_close(q[inside].exp(), (p[:, a] / mass)[inside])
        whole = (p >= kappa * p.amax(-1, keepdim=True)).all(-1)
        assert bool((q.exp()[inside & ~whole] > p[inside & ~whole, a]).all())
        torch.testing.assert_close(q.exp()[whole], p[whole, a])


@pytest.mark.identity("lp-reg", "kappa = 1 keeps the likeliest tokens alone")
def test_kappa_one_keeps_the_argmax_set() -> None:
    logits = torch.tensor([[1.0, 3.0, 3.0, 0.0]], dtype=F64)
    fn = find_stat("proxy_logp(1.0)")
    assert fn is not None
    found = [float(fn(logits, torch.tensor([a]))) for a in range(4)]
    assert found == [FILTERED, pytest.approx(math.log(0.5)), pytest.approx(math.log(0.5)), FILTERED]


@pytest.mark.identity("lp-reg", "kappa to 0 makes the proxy the policy: at the old policy no token is spared")
def test_kappa_zero_spares_nothing() -> None:
    w = World(2, kappa=0.0, moved=0.0)
    loss, g, told = w.loss(lp_reg(kappa=0.0, rho=1.0))
    plain, g_plain, _ = w.loss(get_method("lp-reg").but("base", penalty=()))
    assert int(told["spared"]) == 0
    assert loss == plain
    assert torch.equal(g, g_plain)
    torch.testing.assert_close(w.stat("proxy_logp(0.0)", w.old), w.stat("logp", w.old))


@pytest.mark.identity("lp-reg", "dK/dlog pi = 1 - exp(d - log pi), negative wherever a token is spared: it is pulled up")
def test_slope_of_the_estimate() -> None:
    gap = torch.tensor([[0.01, 0.5, 3.0]], dtype=F64)
    logp = (-4 - gap).requires_grad_()
    batch = Batch.of(
        logp=logp, logp_old=logp.detach(), stats={"proxy_logp(0.02)@old": torch.full((1, 3), -4.0, dtype=F64)},
    ).adding({"spared@minibatch": torch.ones(1, 3)})  # fmt: skip
    found, told = LowProbability()(batch, {"logp": logp})
    (slope,) = torch.autograd.grad(found.sum(), logp)
    torch.testing.assert_close(slope, 1 - gap.exp())
    assert bool((slope < 0).all())
    assert int(told["spared"]) == 3


@pytest.mark.identity("lp-reg", "tokens whose advantage is not negative are never spared")
@pytest.mark.parametrize("form", ["code", "paper"])
def test_only_negative_advantages(form: str) -> None:
    for seed in range(5):
        w = World(seed)
        spared = LowProbability(rho=1.0, kappa=0.05, form=form).survey(  # type: ignore[arg-type]
            w.batch(form), {k.removesuffix("@now"): v.nan_to_num() for k, v in w.batch(form).stats.items()}, w.advantage, w.mask
        )["spared@minibatch"]
        assert bool((spared > 0).any())
        assert bool((w.advantage[spared > 0] < 0).all())
        assert not bool((spared > 0)[~w.mask].any())
        w.advantage = w.advantage.abs()  # no negative tokens: the base loss
        assert int(w.loss(lp_reg(rho=1.0, form=form), form)[2]["spared"]) == 0


@pytest.mark.identity("lp-reg", "the gradient of the full divergence in the logits is pi - q, q held fixed")
def test_gradient_of_the_full_divergence() -> None:
    logits = torch.randn(4, V, generator=torch.Generator().manual_seed(0), dtype=F64).requires_grad_()
    fn = find_stat("proxy_kl(0.2)")
    assert fn is not None
    found = fn(logits, torch.zeros(4, dtype=torch.long))
    (g,) = torch.autograd.grad(found.sum(), logits)
    p = logits.detach().softmax(-1)
    q = torch.where(p >= 0.2 * p.amax(-1, keepdim=True), p, 0.0)
    mass = q.sum(-1, keepdim=True)
    torch.testing.assert_close(g, p - q / mass)
    torch.testing.assert_close(found.detach(), -mass.log()[:, 0])


# -------------------------------------------------------------------- edges
def test_one_candidate_is_none() -> None:
    """As in the released code: a share that comes to a single token changes nothing."""
    w = World(3)
    n = int((w.mask & (w.advantage < 0)).sum())
    assert int(w.loss(lp_reg(rho=1.9 / n))[2]["spared"]) == 0
    assert formula(w, 1.0, 2.01 / n, "code")[1] == int(w.loss(lp_reg(rho=2.01 / n))[2]["spared"])


def test_filtered_tokens_are_not_spared() -> None:
    w = World(4, kappa=1.0)
    w.action = w.old.argmin(-1)
    for form in ("code", "paper"):
        assert int(w.loss(lp_reg(kappa=1.0, rho=1.0, form=form), form)[2]["spared"]) == 0


def test_refuses_updates_without_advantages() -> None:
    with pytest.raises(CallError, match="needs a surrogate"):
        get_method("lp-reg").but("x", terms=("penalty",))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_extreme_log_ratios_stay_finite(dtype: torch.dtype) -> None:
    logp = torch.tensor([[-500.0, -30.0, -1.0, 0.0]], dtype=dtype).requires_grad_()
    stats = {"proxy_logp(0.02)@old": torch.tensor([[-0.1, FILTERED, -0.5, 0.0]], dtype=dtype)}
    batch = Batch.of(logp=logp, logp_old=torch.zeros(1, 4, dtype=dtype), stats=stats)
    part = LowProbability(rho=1.0)
    advantage = -torch.ones(1, 4)
    batch = batch.adding(part.survey(batch, {"logp": logp}, advantage, batch.mask))
    loss, _ = part(batch, {"logp": logp})
    (g,) = torch.autograd.grad(loss.sum(), logp)
    assert bool(loss.isfinite().all())
    assert bool(g.isfinite().all())


@pytest.mark.parametrize("form", ["code", "paper"])
def test_micro_batches_and_the_saved_pass_change_nothing(form: str) -> None:
    """Tokens are ranked within the minibatch, however it is cut; taking the start from the only step saves a pass, nothing else."""
    found = []
    for micro, lazy in ((None, True), (3, True), (None, False)):
        chosen = {
            "budget": "9-updates", "threads": 1, "collect.prompts": 4, "sampler.group_size": 4, "optim.micro": micro,
            "penalty.rho": 0.5, "penalty.kappa": 0.3, "penalty.form": form, "evaluate.episodes": 2, "optim.compile": "never",
            "updates.policy.rule.optimizer": "sgd", "updates.policy.rule.lr": 0.05,
        }  # fmt: skip
        r = resolve("lp-reg", "text:spell_backward", chosen)
        run = Improve(r.method, r.task, r.settings)
        if not lazy:
            run._can_wait = lambda *_: frozenset()  # type: ignore[method-assign]
        metrics = run.step()
        assert metrics["spared"] > 3
        found.append((run.flat.data.clone(), metrics["spared"]))
        run.collector.close()
    for data, spared in found[1:]:
        torch.testing.assert_close(data, found[0][0], atol=1e-6, rtol=0)
        assert spared == found[0][1]
