"""Recipes: stages one after the other in one run, and what they hand over."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from stage_worlds import GRPO, SMALL, built, two
from torch import Tensor

import polopt
from polopt.batch import Batch
from polopt.errors import CallError, Misfit
from polopt.loops.drive import build_run
from polopt.loops.stages import Staged, overlaid
from polopt.overrides import resolve
from polopt.parts.source import Fresh
from polopt.recipe import Length, Recipe, Stage
from polopt.registry import get_method


def walk(run: Staged) -> list[dict[str, float]]:
    lines = []
    while run.fraction() < 1:
        lines.append(run.step())
    return lines


def stages(lines: list[dict[str, float]]) -> list[int]:
    return [int(line["stage"]) for line in lines]


# -------------------------------------------------------------------- lengths
@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("rest", Length("rest")), (" 25 % ", Length("share", 0.25)), ("1-pass", Length("passes", 1.0)),
        ("2.5 passes", Length("passes", 2.5)), ("10-updates", Length("amount", 10.0, "updates")),
        ("5k-decisions", Length("amount", 5000.0, "decisions")),
    ],
)  # fmt: skip
def test_lengths_are_read(text: str, expected: Length) -> None:
    assert Length.parse(text) == expected


@pytest.mark.parametrize("text", ["", "half", "0%", "120%", "0-passes", "10-apples", "-1-updates"])
def test_lengths_that_make_no_sense_are_refused(text: str) -> None:
    with pytest.raises(CallError, match="length"):
        Stage("a", length=text)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (("3-updates", "rest"), [1] * 3 + [2] * 7),
        (("40%", "rest"), [1] * 4 + [2] * 6),
        (("40%", "60%"), [1] * 4 + [2] * 6),
        (("1-pass", "rest"), [1] * 2 + [2] * 8),  # 8 prompts, 4 at a time
        (("3-updates", "4-updates"), [1] * 3 + [2] * 4),  # all stages end before the budget does
        (("3-updates", "30-updates"), [1] * 3 + [2] * 7),  # the budget ends before the stage does
    ],
)
def test_each_stage_lasts_as_long_as_it_says(given: tuple[str, str], expected: list[int]) -> None:
    recipe = two(Stage("first", GRPO, given[0]), Stage("second", length=given[1]))
    lines = walk(built(recipe))
    assert stages(lines) == expected
    assert [line["update"] for line in lines] == list(range(1, len(expected) + 1))


@pytest.mark.parametrize(
    ("length", "budget", "need"),
    [
        ("30-updates", "10-updates", "30 updates"), ("5-passes", "10-updates", "10 updates"),
        ("5-passes", "300-decisions", "320 decisions"), ("600-decisions", "500-decisions", "600 decisions"),
    ],
)  # fmt: skip
def test_a_budget_that_the_first_stage_alone_uses_up_is_refused(length: str, budget: str, need: str) -> None:
    with pytest.raises(
        CallError, match=rf"stage 'first' \({length}\) takes at least {need} on table:arms.*set stages.first.length"
    ):
        built(two(Stage("first", GRPO, length), Stage("second")), budget)


def test_rounds_share_the_budget() -> None:
    recipe = two(Stage("first", GRPO, "1-updates"), Stage("second"), repeat=2)
    assert stages(walk(built(recipe))) == [1, 2, 2, 2, 2, 3, 4, 4, 4, 4]


def test_one_ledger_for_all_stages() -> None:
    recipe = two(Stage("first", GRPO, "25%"), Stage("second"))
    run = built(recipe, "1k-decisions")
    lines = walk(run)
    decisions = [line["decisions"] for line in lines]
    assert decisions == [32 * (i + 1) for i in range(len(lines))]  # 4 prompts x 8 answers of one decision
    assert decisions[-1] >= 1000 > decisions[-2]
    assert stages(lines).count(1) == 8  # the first to reach 250
    assert run.ledger.spent["decisions"] == decisions[-1]
    assert all(a["seconds"] < b["seconds"] for a, b in pairwise(lines))


def test_a_stage_anneals_over_its_own_length() -> None:
    warm = GRPO.but("warm", rule=get_method("grpo").update().rule.but(lr=0.1, schedule="linear"))
    run = built(two(Stage("first", warm, "50%"), Stage("second")), **{"stages.first.lr": 0.1})
    assert [run.step()["lr"] for _ in range(5)] == pytest.approx([0.1 * (1 - i / 5) for i in range(5)])


# -------------------------------------------------------------------- handing over
def test_a_recipe_of_one_stage_is_the_method_it_runs() -> None:
    one = two(Stage("only"), name="one")
    alone = build_run(resolve(GRPO, "table:arms", {**SMALL, "budget": "5-updates"}))
    run = built(one, "5-updates")
    for _ in range(5):
        a, b = run.step(), alone.step()
        same = {k for k in b if not k.startswith("seconds")}
        assert {k: a[k] for k in same} == {k: b[k] for k in same}
    assert torch.equal(run.policy.net.own, alone.policy.net.own)


def test_the_policy_goes_on_where_it_stood_and_draws_anew() -> None:
    run = built(two(Stage("first", GRPO, "2-updates"), Stage("second")))
    first = run.collector
    seen = [run.collector.streams.torch("collect/answers").initial_seed()]
    run.step(), run.step()
    learnt = run.policy.state()
    run._advance()
    assert run.collector is not first
    assert all(torch.equal(v, learnt[k]) for k, v in run.policy.state().items())
    assert not torch.equal(run.policy.net.own, run.policy.world.initial)
    seen.append(run.collector.streams.torch("collect/answers").initial_seed())
    assert seen[0] != seen[1]


def test_a_stage_that_does_not_take_the_policy_starts_afresh() -> None:
    run = built(two(Stage("first", GRPO, "2-updates"), Stage("second", takes=())))
    run.step(), run.step()
    run._advance()
    assert torch.equal(run.policy.net.own, run.policy.world.initial)


def test_nets_that_only_one_stage_has() -> None:
    critic = get_method("ppo-lm").but("critic", reward=())
    run = built(two(Stage("first", critic, "2-updates"), Stage("second")))
    run.step(), run.step()
    learnt = run.policy.state()
    assert any(k.startswith("value") for k in learnt)
    run._advance()
    assert set(run.policy.state()) == {k for k in learnt if not k.startswith("value")}
    assert all(torch.equal(v, learnt[k]) for k, v in run.policy.state().items())


@dataclass(frozen=True)
class Keep(Fresh):
    """Keeps every batch's number of rows."""

    def __call__(self, batches: dict[str, Batch], store: Any) -> dict[str, Batch]:
        store["last"] = batches["policy"]
        return batches


@dataclass(frozen=True)
class Count(type(GRPO.advantage)):  # type: ignore[misc]
    """Counts the rows that it saw."""

    moments: ClassVar[frozenset[str]] = frozenset({"drawn"})

    def initial(self) -> dict[str, Tensor]:
        return {"rows": torch.zeros(())}

    def observe(self, moment: str, *, batch: Batch, memory: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {"rows": memory["rows"] + batch.shape[0]}


def test_store_and_memory_are_taken_over_by_those_who_ask() -> None:
    kept = GRPO.but("kept", source=Keep(), advantage=Count())
    for takes, rows in ((("policy", "store", "memory.advantage"), 64.0), (("policy",), 0.0)):
        run = built(two(Stage("first", kept, "2-updates"), Stage("second", takes=takes), source=Keep(), advantage=Count()))
        run.step(), run.step()
        run._advance()
        assert float(run.inner.memory.of("advantage")["rows"]) == rows
        assert ("last" in run.inner.store) == (rows > 0)


def test_a_replay_goes_on_in_the_next_stage() -> None:
    td3 = get_method("td3")
    small = {"policy.hidden": (8,), "evaluate.episodes": 1}
    for takes, held in ((("policy", "store"), 128), (("policy",), 0)):
        recipe = two(Stage("first", td3.but("warm"), "128-decisions"), Stage("second", takes=takes), base=td3)
        run = built(recipe, "192-decisions", "gym:Pendulum-v1", **small)
        while run.at == 0 and run.inner.fraction() < 1:
            run.step()
        learnt = run.policy.state()
        run._advance()
        assert run.inner.supply is not None
        assert run.inner.supply.written == held  # type: ignore[attr-defined]
        assert all(torch.equal(a, b) for a, b in zip(leaves(run.policy.state()), leaves(learnt), strict=True))


def leaves(tree: Any) -> list[Tensor]:
    if isinstance(tree, Mapping):
        return [x for v in tree.values() for x in leaves(v)]
    return [tree] if isinstance(tree, Tensor) else []


def test_what_a_stage_before_the_last_one_made_waits_for_it() -> None:
    counting = GRPO.but("counting", advantage=Count())
    run = built(
        two(
            Stage("count", counting, "2-updates"), Stage("between", GRPO, "2-updates"),
            Stage("last", takes=("memory.advantage",)), advantage=Count(),
        )
    )  # fmt: skip
    for _ in range(5):
        run.step()
    assert float(run.inner.memory.of("advantage")["rows"]) == 64 + 32


def test_a_reference_that_is_handed_over() -> None:
    kl = get_method("grpo")
    run = built(two(Stage("fit", takes=("policy", "reference")), base=kl, repeat=2), "8-updates", **{"lr": 0.5})
    start = run.policy.reference.clone()
    for _ in range(4):
        run.step()
    learnt = run.policy.table().detach().clone()
    assert torch.equal(run.policy.reference, start)
    again = built(run.recipe, "8-updates", **{"lr": 0.5})
    for _ in range(2):
        run.step()
    assert torch.equal(run.policy.reference, learnt)
    again.load(run.state())
    assert torch.equal(again.policy.reference, learnt)
    assert torch.equal(again.policy.table(), run.policy.table())


def test_a_language_model_takes_over_a_reference() -> None:
    from polopt.loops.build import make_policy

    found = resolve("grpo", "text:spell_backward", {"budget": "1-updates"})
    policy = make_policy(found.task, found.method, found.settings)
    with torch.no_grad():
        next(policy.backbone.module.parameters()).add_(0.5)
    assert policy._reference is not None
    before = next(policy._reference[0].module.parameters()).clone()
    policy.refer()
    after = next(policy._reference[0].module.parameters())
    assert not torch.equal(after, before)
    assert torch.equal(after, next(policy.backbone.module.parameters()))


def test_trees_are_overlaid_where_both_have_a_leaf() -> None:
    assert overlaid({"a": 1, "b": {"c": 2, "d": 3}}, {"b": {"c": 20, "x": 0}, "y": 0}) == {"a": 1, "b": {"c": 20, "d": 3}}


# -------------------------------------------------------------------- refusing
COUNTS = Stage("b", takes=("memory.advantage",))


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: two(Stage("a", GRPO), Stage("b")), "'a' takes the rest of the budget, but is not the last"),
        (lambda: two(Stage("a", GRPO, "70%"), Stage("b", length="40%")), "add up to 110%"),
        (lambda: two(Stage("a", GRPO, "70%"), Stage("b", length="20%")), "use 90% of the budget"),
        (lambda: two(Stage("a", GRPO, "70%"), Stage("a")), "distinct names"),
        (lambda: two(), "needs stages"),
        (lambda: two(Stage("a", GRPO)), "no stage runs the recipe's own parts"),
        (lambda: two(Stage("a.b")), "one word"),
        (lambda: two(Stage("a", takes=("polcy",))), "did you mean 'policy'"),
        (lambda: two(Stage("a", takes=("memory.advantage",))), "takes over"),
        (lambda: two(Stage("a", takes=("reference",))), "which none of its parts reads"),
        (lambda: two(Stage("a", GRPO, "20%"), COUNTS, advantage=Count()), "no stage before it remembers"),
    ],
)  # fmt: skip
def test_recipes_that_cannot_work_are_refused(make: Any, words: str) -> None:
    with pytest.raises(CallError, match=words):
        make()


def test_a_stage_that_cannot_work_on_the_task_is_refused_before_anything_starts(tmp_path: Path) -> None:
    with pytest.raises(Misfit, match="a-star-po cannot run on gym:CartPole-v1"):
        polopt.train("a-star-po", "gym:CartPole-v1", budget="1-updates", out=tmp_path / "run")
    passing = two(Stage("first", get_method("reinforce"), "1-pass"), Stage("second"), base=get_method("reinforce"))
    with pytest.raises(Misfit, match=r"'first' passes over a known number of items.*stages.first.length"):
        polopt.train(passing, "gym:CartPole-v1", budget="1-updates", out=tmp_path / "run")
    dynamic = two(Stage("first", get_method("dapo"), "50%"), Stage("second"))
    with pytest.raises(Misfit, match=r"stages.first.sampler 'dynamic' needs a task that answers further requests"):
        polopt.train(dynamic, "gym:CartPole-v1", budget="1-updates", out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


# -------------------------------------------------------------------- settings
@pytest.mark.parametrize(
    ("path", "near"),
    [
        ("stages.estimat.sampler.group_size", "stages.estimate.sampler.group_size"),
        ("stages.estimate.samplr.group_size", "stages.estimate.sampler.group_size"),
        ("stages.estimate.lenght", "stages.estimate.length"),
        ("stages.estimate.advantage.betta", "stages.estimate.advantage.beta"),
    ],
)
def test_unknown_settings_of_stages_are_refused_with_the_nearest(path: str, near: str) -> None:
    with pytest.raises(CallError, match=f"unknown setting '{path}'.*did you mean '{near}'"):
        resolve("a-star-po", "table:arms", {path: 1})


def test_settings_reach_a_stage() -> None:
    found = resolve(
        "a-star-po", "table:arms",
        {"stages.estimate.group_size": 4, "stages.estimate.advantage.beta": 0.2, "stages.train.surrogate.beta": 0.3, "lr": 0.1,
         "stages.train.collect.prompts": 6, "stages.estimate.length": "2-passes", "stages.train.takes": "memory.advantage"},
    )  # fmt: skip
    recipe = found.method
    assert isinstance(recipe, Recipe)
    estimate, train = recipe.stages
    assert estimate.method is not None
    assert (estimate.method.sampler.group_size, estimate.method.advantage.beta, estimate.length) == (4, 0.2, "2-passes")
    assert (recipe.surrogate.beta, recipe.update().rule.lr) == (0.3, 0.1)
    assert (train.settings, train.takes) == ({"collect.prompts": 6}, ("memory.advantage",))
    assert found.origin["stages.estimate.sampler.group_size"] == "user"
    for wrong in ("stages.train.policy.hidden", "stages.estimate.budget", "stages.estimate.seed"):
        with pytest.raises(CallError, match="unknown setting"):
            resolve("a-star-po", "table:arms", {wrong: 1})


def test_the_tasks_preset_serves_each_stage() -> None:
    found = resolve("a-star-po", "table:arms")
    assert found.settings.collect.prompts == 64
    estimate = found.method.stage("estimate")
    assert estimate.settings == {"collect.prompts": 8}
    assert found.origin["stages.estimate.collect.prompts"] == "task"
    ours = resolve("a-star-po", "table:arms", {"collect.prompts": 5})  # what the user says of the run holds for its stages
    assert ours.method.stage("estimate").settings == {}
    assert ours.settings.collect.prompts == 5


def test_a_child_of_a_recipe_keeps_its_stages() -> None:
    parent = get_method("a-star-po")
    assert isinstance(parent, Recipe)
    child = parent.but("child", minibatches=None).with_stage("estimate", length="2-passes")
    assert isinstance(child, Recipe)
    assert [s.length for s in child.stages] == ["2-passes", "rest"]
    assert child.parent == parent
    assert "stages.estimate.length: 1-pass -> 2-passes" in polopt.diff(parent, child)
    assert parent.set("stages.estimate.sampler.group_size", 2).stage("estimate").method.sampler.group_size == 2


def test_a_recipe_in_words() -> None:
    text = polopt.explain("a-star-po")
    assert "estimate: 1-pass, sampler.group_size 8, advantage soft-value(beta=0.5), no updates.policy" in text
    assert "train: rest, takes over policy and memory.advantage" in text
    assert "stages.estimate.advantage soft-value(beta=0.5)" in text
    assert "stages.estimate.surrogate" not in text  # it does not act
    lines = polopt.diff("reinforce", "a-star-po").splitlines()
    assert len([line for line in lines if line.strip().startswith("stages.")]) == 2
    assert "proven" in "\n".join(lines)
