"""Three awkward papers written against the seams: a staged sampler, a second update on a kept batch, a two-stage recipe.

What is tested is that none of them needs anything but parts, updates and sources.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor
from worlds import TableCollector, TablePolicy, TableTask

import polopt.loops.improve as loop
from polopt.batch import Batch
from polopt.method import Method
from polopt.methods.language.pipo import VERIFY
from polopt.part import Part
from polopt.parts.previous import Previous
from polopt.parts.rule.descend import Descend
from polopt.parts.sampler.hints import Hints
from polopt.registry import get_method
from polopt.settings import Settings

SGD = Descend(optimizer="sgd", lr=1.0, max_grad_norm=None)


def build(monkeypatch: pytest.MonkeyPatch, method: Method, good: Any, *, seed: int = 0, budget: str = "5-updates") -> loop.Improve:
    policy = TablePolicy(seed=seed)
    monkeypatch.setattr(loop, "make_policy", lambda *_: policy)
    monkeypatch.setattr(loop, "make_collector", lambda *_: TableCollector(policy, good, seed))
    return loop.Improve(method, TableTask(), Settings(budget=budget, seed=seed))


def first_symbol(item: Tensor, hint: Tensor, action: Tensor) -> Tensor:
    return (action[:, 0] == item).float()


def needs_hint(item: Tensor, hint: Tensor, action: Tensor) -> Tensor:
    """Item 3 is hopeless without a hint of at least level 2."""
    return torch.where(item == 3, (hint >= 2).float() * (action[:, 0] < 4), (action[:, 0] == item).float())


# ------------------------------------------------------------------ staged sampler (arXiv 2507.10628)
def test_staged_sampler_resamples_only_failed_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    ghpo = get_method("ghpo").but("ghpo", sampler=Hints(connector=""), rule=SGD)
    run = build(monkeypatch, ghpo, needs_hint)
    run.step()
    asked = [[(r.item, r.context) for r in requests] for requests in run.collector.requests]
    assert (3, "#") in asked[1]
    assert (3, "##") in asked[2]
    assert all(i in (0, 1, 2, 3) for i, _ in asked[1])
    before = run.policy.start[3, 0]
    assert torch.equal(run.policy.logits[3, 0].detach(), before), "the plain prompt of a hinted group must not move"


def test_staged_sampler_without_failures_is_its_parent(monkeypatch: pytest.MonkeyPatch) -> None:
    solved = lambda item, hint, action: (action[:, 0] < 4).float()  # noqa: E731
    parent = get_method("grpo").but("parent", penalty=(), rule=SGD)
    child = get_method("ghpo").but("ghpo", rule=SGD)
    runs = [build(monkeypatch, m, solved) for m in (parent, child)]
    for run in runs:
        for _ in range(3):
            run.step()
    assert torch.equal(*(r.policy.logits for r in runs))


# ------------------------------------------------------------------ two updates (arXiv 2604.00860)
def pipo(lr: float, window: int = 2) -> Method:
    base = get_method("grpo").but("base", penalty=(), rule=SGD)
    verify = replace(VERIFY, rule=Descend(optimizer="sgd", lr=lr, max_grad_norm=None))
    return base.but("pipo", source=Previous(window=window), updates=(verify, *base.updates))


def test_two_updates_on_two_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    run = build(monkeypatch, pipo(0.5), first_symbol)
    plain = build(monkeypatch, get_method("grpo").but("base", penalty=(), rule=SGD), first_symbol)
    same = []
    for _ in range(6):
        run.step()
        plain.step()
        same.append(torch.equal(run.policy.logits, plain.policy.logits))
    assert same[:2] == [True, True]
    assert not same[-1], "the verification step must move the policy"


def test_second_update_with_rate_zero_is_the_base_method(monkeypatch: pytest.MonkeyPatch) -> None:
    runs = [build(monkeypatch, m, first_symbol) for m in (pipo(0.0), get_method("grpo").but("base", penalty=(), rule=SGD))]
    for run in runs:
        for _ in range(6):
            run.step()
    assert torch.equal(*(r.policy.logits for r in runs))


def test_kept_batch_survives_a_checkpoint(monkeypatch: pytest.MonkeyPatch) -> None:
    run = build(monkeypatch, pipo(0.5), first_symbol)
    for _ in range(3):
        run.step()
    again = build(monkeypatch, pipo(0.5), first_symbol)
    import copy

    again.load(copy.deepcopy(run.state()))
    for r in (run, again):
        for _ in range(3):
            r.step()
    assert torch.equal(run.policy.logits, again.policy.logits)


# ------------------------------------------------------------------ recipe of two stages (arXiv 2505.20686)
@dataclass(frozen=True)
class OptimalValue(Part):
    """r - V*(x), with V* = beta log mean exp(r / beta) over earlier reference samples of the prompt, kept in a table."""

    kind: ClassVar[str] = "advantage"
    name: ClassVar[str] = "optimal-value"
    moments: ClassVar[frozenset[str]] = frozenset()
    beta: float = 0.5
    prompts: int = 4

    def initial(self) -> dict[str, Tensor]:
        return {"value": torch.zeros(self.prompts, dtype=torch.float64)}

    def __call__(self, batch: Batch, memory: Mapping[str, Tensor]) -> Tensor:
        return (batch.outcome() - memory["value"][batch.keys["item"]])[:, None].expand(batch.shape)


@dataclass(frozen=True)
class EstimateValue(OptimalValue):
    """Stage one: write the table from the samples that were just scored."""

    moments: ClassVar[frozenset[str]] = frozenset({"scored"})

    def observe(self, moment: str, *, batch: Batch, memory: Mapping[str, Tensor]) -> dict[str, Tensor]:
        mean = batch.pool((batch.outcome() / self.beta).exp(), by="item")
        return {"value": memory["value"].index_put((batch.keys["item"],), self.beta * mean.log())}


@dataclass(frozen=True)
class AdvantageRegression(Part):
    """(beta log pi/ref (y|x) + V* - r)^2, on the row's last decision."""

    kind: ClassVar[str] = "surrogate"
    name: ClassVar[str] = "advantage-regression"
    rows: ClassVar[bool] = True
    beta: float = 0.2

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"logp@now", "logp@ref"})

    def __call__(self, batch: Batch, now: Mapping[str, Tensor], advantage: Tensor) -> Tensor:
        gap = batch.pool(now["logp"] - batch.stat("logp@ref"), by="row", how="sum")
        return (self.beta * gap - advantage) ** 2


def test_recipe_hands_over_a_table(monkeypatch: pytest.MonkeyPatch) -> None:
    base = get_method("grpo").but("base", penalty=(), rule=SGD, aggregate=get_method("grpo").aggregate)
    stage1 = base.but("a-star-po/estimate", sampler=base.sampler.but(group_size=2048), advantage=EstimateValue(), updates=())
    stage2 = base.but(
        "a-star-po", sampler=base.sampler.but(group_size=1), advantage=OptimalValue(), surrogate=AdvantageRegression()
    )
    estimate = build(monkeypatch, stage1, first_symbol)
    start = estimate.policy.logits.detach().clone()
    estimate.step()
    assert torch.equal(estimate.policy.logits, start), "stage one trains nothing"
    table = estimate.memory.of("advantage")["value"]
    truth = start[:, 0, 0].softmax(-1)[torch.arange(4), torch.arange(4)]
    expected = 0.5 * (1 - truth + truth * torch.tensor(2.0).exp()).log()
    assert torch.allclose(table, expected, atol=0.04)
    train = build(monkeypatch, stage2, first_symbol)
    train.memory.write("advantage", {"value": table})
    for _ in range(300):
        train.step()
    after = train.policy.logits[:, 0, 0].softmax(-1).detach()[torch.arange(4), torch.arange(4)]
    assert bool((after > truth + 0.1).all()), (truth, after)
