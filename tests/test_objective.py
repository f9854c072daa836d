"""`objective.loss` and `Method.loss`: what carries gradient, what is kept out, and what is refused with a reason."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from polopt.batch import Batch, Totals
from polopt.errors import CallError
from polopt.method import Method
from polopt.part import Can, Part
from polopt.parts.advantage.running_mean import RunningMean
from polopt.parts.critic import ValueLoss
from polopt.parts.penalty.entropy import EntropyBonus
from polopt.registry import all_methods, get_method
from polopt.update import Update

torch.set_num_threads(1)
USUAL = {"logp", "value", "value_next", "entropy", "return"}
#: methods whose losses are about the statistics that the batches here have; the others' parts ask networks, flows or tables
METHODS = sorted(
    name for name, m in all_methods().items()
    if {n.partition("@")[0] for n in m.needs()} <= USUAL and Can.NETS not in m.requires()
    and not any(p.table for p in m.parts().values() if p.kind == "advantage")
)  # fmt: skip
MASK = torch.tensor([[1, 1, 1], [1, 0, 0], [1, 1, 0], [1, 1, 1]]).bool()


def tensors(seed: int = 0) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(seed)
    names = ("logp", "logp_old", "logp_ref", "logp_behaviour", "value", "entropy")
    return {k: torch.randn(4, 3, generator=g, dtype=torch.float64) * 0.1 - 1 for k in names}


def batch_of(x: Mapping[str, Tensor], **more: Any) -> Batch:
    given = {"mask": MASK, "reward": torch.tensor([1.0, 0.0, 0.5, 2.0]).double(), "group": [0, 0, 1, 1], **more}
    return Batch.of(**x, **given)  # type: ignore[arg-type]


def gradients(method: Method, batch: Batch, leaves: list[Tensor], **given: Any) -> list[Tensor]:
    loss, _ = method.loss(batch, **given)
    found = torch.autograd.grad(loss, leaves, allow_unused=True)
    return [torch.zeros_like(x) if g is None else g for x, g in zip(leaves, found, strict=True)]


# -------------------------------------------------------------------- what carries gradient
@pytest.mark.parametrize("name", METHODS)
def test_only_the_current_policy_carries_gradient(name: str) -> None:
    x = tensors()
    for k in ("logp", "value", "entropy"):
        x[k].requires_grad_()
    logp, value = x["logp"], x["value"]
    method, after = get_method(name), torch.zeros_like(value)
    advantage = (logp - 1) * value  # undetached, as a careless caller has it
    loose = batch_of(
        {**x, "logp_old": logp, "logp_behaviour": logp * 1.1, "logp_ref": logp * 1.2, "value_next": after + value},
        stats={"value@old": value * 1.3},
    )
    tight = replace(loose, stats={k: v if k.endswith("@now") else v.detach() for k, v in loose.stats.items()})
    leaves = [logp, value]
    wanted = gradients(method, tight, leaves, advantage=advantage.detach())
    assert any(bool(g.any()) for g in wanted)
    for a, b in zip(gradients(method, loose, leaves, advantage=advantage), wanted, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", METHODS)
def test_nothing_outside_the_mask_reaches_a_gradient(name: str, bad: float) -> None:
    others = [p for p in get_method(name).penalty if p.name != "entropy"]
    method = get_method(name).but("x", penalty=(*others, EntropyBonus(0.1)))
    found = []
    for fill in (0.0, bad):
        x = {k: torch.where(MASK, v, fill).requires_grad_() for k, v in tensors().items()}
        # outcomes within 0 and 1: some parts refuse others
        batch = batch_of(x, reward=torch.where(MASK, tensors(1)["logp"].sigmoid() / 4, fill))
        advantage = torch.where(MASK, tensors(2)["logp"], fill)
        leaves = [x["logp"], x["value"], x["entropy"]]
        found.append(gradients(method, batch, leaves))
        found[-1] += gradients(method, batch, leaves, advantage=advantage)
    for clean, dirty in zip(*found, strict=True):
        assert torch.equal(clean, dirty)


@dataclass(frozen=True)
class Spread(Part):
    """A loss of several channels per decision that reads a vector statistic."""

    kind: ClassVar[str] = "penalty"
    name: ClassVar[str] = "spread"

    def __call__(self, batch: Batch, now: Mapping[str, Tensor]) -> Tensor:
        return (now["vector"] * batch.stat("vector@old")).sqrt()


def test_statistics_with_channels_are_cleaned_too() -> None:
    x = torch.where(MASK[..., None], torch.rand(4, 3, 2).double() + 1, math.nan).requires_grad_()
    batch = batch_of(tensors(), stats={"vector@now": x, "vector@old": x.detach()})
    method = get_method("reinforce").but("x", penalty=(Spread(),))
    (g,) = gradients(method, batch, [x])
    torch.testing.assert_close(g[MASK], torch.full((9, 2), 0.5 / 4).double())  # slope 1/2 at x = x_old; mean over rows
    assert bool((g[~MASK] == 0).all())


# -------------------------------------------------------------------- micro-batches
@pytest.mark.parametrize("name", ["dr-grpo", "grpo", "rloo"])
def test_micro_batches_of_their_own_width_add_up(name: str) -> None:
    """Each is made by its own `Batch.of`, no wider than its longest row, without a horizon."""
    x, method = tensors(), get_method(name)
    whole = batch_of(x)
    loss, _ = method.loss(whole)
    advantage = method.advantages(whole)
    for totals in (whole, method.totals(whole), vars(method.totals(whole)), {"decisions": 9, "rows": 4.0, "horizon": 3}):
        added = 0.0
        for rows, width in ((slice(0, 1), 3), (slice(1, 3), 2), (slice(3, 4), 3)):
            cut = {k: v[rows, :width] for k, v in x.items()}
            micro = Batch.of(**cut, mask=MASK[rows, :width])  # type: ignore[arg-type]
            added += float(method.loss(micro, advantage=advantage[rows, :width], totals=totals)[0])  # type: ignore[arg-type]
        assert math.isclose(added, float(loss), rel_tol=1e-12)


def test_totals_count_the_horizon() -> None:
    assert get_method("grpo").totals(batch_of(tensors(), horizon=7)).horizon == 7
    assert Totals.of(MASK).horizon == 0


@pytest.mark.parametrize(
    ("totals", "words"),
    [
        ({"decisions": 9}, ["rows"]),
        ({"decisions": 9, "row": 4}, ["'row'", "rows"]),
        ({"decisions": "9", "rows": 4}, ["totals['decisions']", "'9'"]),
        ({"decisions": 9, "rows": torch.ones(4)}, ["totals['rows']"]),
        ({"decisions": True, "rows": 4}, ["totals['decisions']"]),
        (9, ["int", "Method.totals"]),
    ],
)
def test_totals_of_the_wrong_form_are_refused(totals: Any, words: list[str]) -> None:
    with pytest.raises(CallError) as error:
        get_method("grpo").loss(batch_of(tensors()), totals=totals)
    assert all(w in str(error.value) for w in words)


def test_advantages_may_be_numbers() -> None:
    batch, numbers = batch_of(tensors()), [[1, 2, 3], [4, 0, 0], [5, 6, 0], [7, 8, 9]]
    method = get_method("grpo")
    assert method.loss(batch, advantage=numbers)[0] == method.loss(batch, advantage=torch.tensor(numbers).float())[0]


@pytest.mark.parametrize("advantage", [torch.zeros(4), torch.zeros(3, 4), [1.0, 2.0, 3.0, 4.0], [[1.0], [1.0, 2.0]], "high"])
def test_advantages_of_the_wrong_form_are_refused(advantage: Any) -> None:
    with pytest.raises(CallError, match=r"advantage .*expected (shape )?\(4, 3\)"):
        get_method("grpo").loss(batch_of(tensors()), advantage=advantage)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("name", ["grpo", "ppo"])
def test_bad_rewards_are_refused_with_given_advantages_too(name: str, bad: float) -> None:
    batch = batch_of(tensors(), reward=torch.tensor([1.0, bad, 0.0, 0.0]))
    for given in ({}, {"advantage": torch.zeros(4, 3)}):
        with pytest.raises(CallError, match=r"reward\[1, 0\].*not finite"):
            get_method(name).loss(batch, **given)


# -------------------------------------------------------------------- shapes of results
@dataclass(frozen=True)
class Odd(Part):
    """A part that returns ones of a shape of its own."""

    name: ClassVar[str] = "odd"
    shape: tuple[int, ...] = (4,)

    def __call__(self) -> Tensor:
        return torch.ones(self.shape)

    def returns(self, batch: Batch) -> Tensor:
        return torch.ones(self.shape)


def odd(slot: str, shape: tuple[int, ...]) -> Part:
    return type("Odd", (Odd,), {"kind": slot})(shape)  # type: ignore[no-any-return]


WRONG = [
    ("advantage", (4,), "(4, 3)"), ("advantage", (4, 1), "(4, 3)"), ("surrogate", (4,), "(4, 3)"), ("surrogate", (3,), "(4, 3)"),
    ("surrogate", (), "(4, 3)"), ("penalty", (4, 1), "(4, 3)"), ("critic", (3, 4), "(4, 3)"), ("weight", (4, 1), "(4, 3)"),
    ("weight", (4, 3, 1), "(4, 3)"), ("select", (4, 1), "(4, 3)"), ("reward", (4, 3), "(4, 3, K)"), ("aggregate", (4,), "()"),
]  # fmt: skip


@pytest.mark.parametrize(("slot", "shape", "expected"), WRONG)
def test_results_of_the_wrong_shape_are_refused(slot: str, shape: tuple[int, ...], expected: str) -> None:
    method = get_method("reinforce-baseline").but("x", **{slot: odd(slot, shape)})
    with pytest.raises(CallError) as error:
        method.loss(batch_of(tensors()))
    assert f"{slot} 'odd' returned shape {shape}, expected {expected}" in str(error.value)


def test_returns_of_the_wrong_shape_are_refused() -> None:
    method = get_method("reinforce-baseline").but("x", advantage=odd("advantage", (4,)))
    with pytest.raises(CallError, match=r"advantage 'odd' returned shape \(4,\)"):
        method.loss(batch_of(tensors()), advantage=torch.zeros(4, 3))


# -------------------------------------------------------------------- what a method needs and refuses
def test_a_target_divergence_needs_its_log_probabilities() -> None:
    plain = get_method("reinforce").but("x", epochs=2)
    assert "logp@old" not in plain.needs()
    method = plain.but("y", target_kl=0.1)
    assert {"logp@old", "logp@now"} <= method.needs(method.update())


def test_a_critic_without_a_return_is_refused() -> None:
    with pytest.raises(CallError, match=r"critic 'value'.*advantage 'group' estimates none"):
        get_method("grpo").but("x", critic=ValueLoss())
    with pytest.raises(CallError, match=r"advantage 'running-mean' estimates none"):
        get_method("ppo").but("x", advantage=RunningMean())
    get_method("ppo").but("x", advantage=RunningMean(), critic=None)


@dataclass(frozen=True)
class Remembered(Part):
    """Select what memory says."""

    kind: ClassVar[str] = "select"
    name: ClassVar[str] = "remembered"

    def initial(self) -> dict[str, Tensor]:
        return {"keep": torch.ones((), dtype=torch.bool)}

    def __call__(self, batch: Batch, memory: Mapping[str, Tensor]) -> Tensor:
        return memory["keep"].expand(batch.shape)


def test_select_parts_of_an_update_read_their_own_memory() -> None:
    update = Update("own", select=(Remembered(),))
    method = get_method("reinforce").but("x", select=(Remembered(),), updates=(Update(), update))
    memory = method.memory()
    memory.write("updates.own.select.remembered", {"keep": torch.zeros((), dtype=torch.bool)})
    batch = batch_of(tensors())
    assert float(method.totals(batch, memory, update="own").decisions) == 0
    assert float(method.totals(batch, memory, update="policy").decisions) == 9
    assert float(method.loss(batch, memory, update="own")[0]) == 0
    assert float(method.loss(batch, memory, update="policy")[0]) != 0
