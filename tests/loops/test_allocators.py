"""The seam of allocators: what they are told and may answer, tables of items, and that without one nothing changes."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from torch import Tensor

from polopt.batch import Batch, Clock
from polopt.errors import CallError
from polopt.interfaces import Plan, Request, Sampling
from polopt.loops.improve import Improve
from polopt.memory import Memory
from polopt.overrides import resolve
from polopt.part import Can, Part
from polopt.parts.allocator.thompson import Thompson
from polopt.parts.sampler.dynamic import DynamicSampling
from polopt.registry import get_method
from polopt.tasks import make as make_task

torch.set_num_threads(1)


@dataclass(frozen=True)
class Streamed(Part):
    """The items that the stream would have given, and a table of how often each was asked."""

    kind: ClassVar[str] = "allocator"
    name: ClassVar[str] = "streamed"
    moments: ClassVar[frozenset[Any]] = frozenset({"answered"})

    @property
    def table(self) -> Mapping[str, float]:
        return {"asked": 0.0}

    def __call__(self, plan: Plan, prompts: int, each: int) -> tuple[Tensor, Tensor]:
        items = torch.tensor(plan.draw(prompts))
        return items, torch.full_like(items, each)

    def observe(self, moment: str, *, batch: Batch, memory: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {"asked": memory["asked"].index_add(0, batch.keys["item"], torch.ones(batch.shape[0], dtype=torch.float64))}


@dataclass(frozen=True)
class Says(Part):
    """Always the same answer."""

    kind: ClassVar[str] = "allocator"
    name: ClassVar[str] = "says"
    items: Any = ()
    counts: Any = ()

    def __call__(self) -> tuple[Any, Any]:
        return self.items, self.counts


def build(method: Any, task: str = "table:bank", **settings: Any) -> Improve:
    given = {"budget": "6-updates", "collect.prompts": 4, "sampler.group_size": 4, "evaluate.episodes": 2, **settings}
    r = resolve(method, task, {k.replace("__", "."): v for k, v in given.items()})
    return Improve(r.method, r.task, r.settings)


def test_the_streams_own_items_change_no_bit_and_fill_a_table() -> None:
    runs = [build(get_method("grpo")), build(get_method("grpo").but("mine", allocator=Streamed()))]
    for run in runs:
        for _ in range(5):
            run.step()
    assert torch.equal(runs[0].flat.data, runs[1].flat.data)
    table = runs[1].memory.of("allocator")["asked"]
    assert table.shape == (200,)
    assert float(table.sum()) == 5 * 4 * 4
    assert runs[0].memory.of("allocator") == {}


def test_without_an_allocator_no_stream_is_made_for_it() -> None:
    run = build(get_method("grpo"))
    run.step()
    assert "allocator" not in run.streams.state()["numpy"]


def test_a_plan_tells_how_many_items_there_are() -> None:
    seen: list[Plan] = []

    @dataclass(frozen=True)
    class Looks(Part):
        kind: ClassVar[str] = "sampler"
        name: ClassVar[str] = "looks"

        def __call__(self, plan: Plan) -> Sampling:
            seen.append(plan)
            batch = yield [Request(item=i, count=2) for i, _ in plan.allot(plan.want, 2)]
            return {"policy": batch}

    for task, size in (("table:bank", 200), ("text:spell_backward", 10_000)):
        r = resolve(get_method("grpo").but("mine", sampler=Looks()), task, {"collect.prompts": 2, "collect.max_new_tokens": 2})
        Improve(r.method, r.task, r.settings).step()
        assert seen.pop().size == size


def test_counts_may_differ_and_zeros_are_left_out() -> None:
    run = build(get_method("grpo").but("mine", allocator=Says((7, 9, 3), (10, 0, 6))))
    (batch,) = run.collect(Clock()).values()
    assert batch.keys["item"].tolist() == [7] * 10 + [3] * 6
    assert batch.units["group"] == 2


@pytest.mark.parametrize(
    ("items", "counts", "message"),
    [
        ((1, 2), (8, 7), "distributed 15 samples .* expected exactly 16"),
        ((1, 2), (18, -2), "expected exactly 16"),
        ((1, 200), (8, 8), "chose item 200, expected numbers from 0 to 199"),
        ((1, -1), (8, 8), "chose item -1"),
        ((1,), (8, 8), "1 items and 2 counts"),
        ((1, 2), (8.0, 8.0), "returned 8.0, expected integers"),
    ],
)
def test_wrong_answers_are_refused(items: Any, counts: Any, message: str) -> None:
    with pytest.raises(CallError, match=f"allocator 'says' .*{message}"):
        build(get_method("grpo").but("mine", allocator=Says(items, counts))).step()


def test_a_sampler_that_never_asks_is_refused() -> None:
    @dataclass(frozen=True)
    class Alone(Part):
        kind: ClassVar[str] = "sampler"
        name: ClassVar[str] = "alone"

        def __call__(self, plan: Plan) -> Sampling:
            batch = yield [Request(item=i, count=2) for i in plan.draw(2)]
            return {"policy": batch}

    r = resolve(get_method("vade").but("mine", sampler=Alone()), "table:bank", {"collect.prompts": 2})
    run = Improve(r.method, r.task, r.settings)
    with pytest.raises(CallError, match=r"sampler 'alone' never asked plan\.allot, so that allocator 'thompson' decides nothing"):
        run.step()


def test_tables_need_items() -> None:
    assert Can.ITEMS in get_method("vade").requires()
    assert Can.ITEMS in get_method("grpo").but("mine", allocator=Streamed()).requires()  # by its table alone
    with pytest.raises(CallError, match=r"allocator 'streamed' needs a table of prompts \(a task with a known number of items\)"):
        get_method("reinforce").but("mine", allocator=Streamed()).refuse_unless(
            make_task("gym:CartPole-v1").offers, "gym:CartPole-v1"
        )


def test_memory_sizes_tables_by_the_task() -> None:
    memory = Memory({"allocator": Thompson()}, 3)
    assert {k: v.tolist() for k, v in memory.of("allocator").items()} == {
        "alpha": [1.0] * 3, "beta": [1.0] * 3, "last": [0.0] * 3, "visits": [0.0] * 3,
    }  # fmt: skip
    assert memory.of("allocator")["alpha"].dtype == torch.float64


def test_a_refill_asks_the_allocator_again_for_other_prompts() -> None:
    @dataclass(frozen=True)
    class Notes(Thompson):
        def __call__(self, plan: Plan, prompts: int, each: int, asked: Tensor, memory: Any, rng: np.random.Generator) -> Any:
            found = super().__call__(plan, prompts, each, asked, memory, rng)
            notes.append((asked.tolist(), found[0].tolist()))
            return found

    notes: list[tuple[list[int], list[int]]] = []
    method = get_method("dapo").but("mine", allocator=Notes(), sampler=DynamicSampling(group_size=4, max_rounds=4))
    run = build(method)
    for _ in range(3):
        notes.clear()
        run.step()
        before: list[int] = []
        for known, chosen in notes:
            assert known == before
            before = [*before, *chosen]
        assert len(set(before)) == len(before)  # 200 prompts: no second time
    assert float(run.memory.of("allocator")["visits"].sum()) > 12  # dropped groups teach the belief too


def test_beliefs_and_stream_survive_a_checkpoint() -> None:
    run, again = build(get_method("vade")), build(get_method("vade"))
    for _ in range(3):
        run.step()
    again.load(copy.deepcopy(run.state()))
    for r in (run, again):
        for _ in range(3):
            r.step()
    assert torch.equal(run.flat.data, again.flat.data)
    for name, column in run.memory.of("allocator").items():
        assert torch.equal(column, again.memory.of("allocator")[name]), name


def test_an_allocator_can_be_taken_from_the_command_line_and_left_out() -> None:
    r = resolve("gspo", "table:bank", {"allocator": "thompson", "allocator.lam_s": 0.5})
    assert r.method.allocator == Thompson(lam_s=0.5)
    assert resolve("vade", "table:bank", {"allocator": "none"}).method.allocator is None
