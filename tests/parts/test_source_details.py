"""Sources in small: verdicts at their bounds, what is kept and with which numbers, and whom they serve."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from polopt.batch import FORCED, OWN, REPLAYED, Batch
from polopt.errors import MissingStatistic
from polopt.interfaces import Plan
from polopt.part import Can
from polopt.parts.previous import Previous
from polopt.parts.sampler.nothing import Nothing
from polopt.parts.source import Fresh, critics_without_replay, own_parts, replay_without_critics
from polopt.parts.window import Window
from polopt.registry import get_method

torch.set_num_threads(1)
F64 = torch.float64


def rows(*outcomes: float, mask: Any = None, **more: Any) -> Batch:
    """Rows of three decisions, with the sampler's log-probabilities; the reward is at the first."""
    reward = torch.tensor(outcomes, dtype=F64)
    known = torch.ones(len(outcomes), 3) if mask is None else torch.tensor(mask)
    logp = -torch.arange(1.0, 1 + 3 * len(outcomes)).reshape(-1, 3)
    batch = Batch(
        mask=known.bool(), reward=torch.stack([reward, 0 * reward, 0 * reward], 1)[..., None], stats={"logp@behaviour": logp}
    )
    return replace(batch, **more)


# -------------------------------------------------------------------- previous: the verdict
def means(*x: float) -> Tensor:
    return torch.tensor(x, dtype=F64)


def test_declarations_of_previous() -> None:
    source = Previous()
    assert (source.window, source.form) == (8, "paper")
    assert source.needs == {"logp@behaviour"}
    assert source.moments == {"drawn"}
    assert source.host
    start = source.initial()
    assert set(start) == {"means"}
    assert (start["means"].shape, start["means"].dtype) == ((0,), F64)


def test_verdicts_wait_for_a_full_window() -> None:
    for form in ("paper", "code"):
        source = Previous(window=2, form=form)  # type: ignore[arg-type]
        assert source.verdict(means(0.0), 1.0) is None
        assert source.verdict(means(), 1.0) is None
        assert source.verdict(means(0.0, 1.0), 1.0) is not None
        assert Previous(window=1, form=form).verdict(means(0.25), 2.25) == 2.0  # type: ignore[arg-type]


def test_differences_are_cut_in_the_form_of_the_code() -> None:
    """+-5, before the division by the population's deviation, here 2; the paper's 2.828 divides all of it."""
    code, paper = Previous(window=2, form="code"), Previous(window=2)
    for gap, cut in ((90.0, 5.0), (6.0, 5.0), (4.0, 4.0), (-4.0, -4.0), (-6.0, -5.0), (-90.0, -5.0)):
        assert code.verdict(means(0.0, 4.0), 2.0 + gap) == cut / 2
        assert paper.verdict(means(0.0, 4.0), 2.0 + gap) == pytest.approx(gap / 8**0.5)
        assert code.verdict(means(2.0, 2.0), 2.0 + gap) == cut


def test_deviations_that_are_rounding_in_the_form_of_the_code() -> None:
    """From 1e-8 on (exactly that of 0 and 2e-8) they divide; below, 1 does."""
    code = Previous(window=2, form="code")
    assert code.verdict(means(0.0, 2e-8), 1.0) == pytest.approx(1e8)
    assert code.verdict(means(0.0, 3e-8), 1.0) == pytest.approx(1 / 1.5e-8)
    assert code.verdict(means(0.0, 1.9e-8), 1.0) == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("deviation", "mean", "counts"),
    [(1.5e-8, 0.5, True), (0.7e-8, 0.5, False), (2e-8, 3.0, False), (4e-8, 3.0, True), (2e-8, -3.0, False), (1e-8, 0.5, False)],
)
def test_deviations_that_are_rounding_in_the_form_of_the_paper(deviation: float, mean: float, counts: bool) -> None:
    """Up to 1e-8, exactly that included, or that share of a mean above 1, a deviation is none: no verdict."""
    window = means(0.0, deviation, 2 * deviation)
    if deviation == 1e-8:
        assert float(window.std()) == 1e-8
    found = Previous(window=3).verdict(window, mean)
    assert found == (pytest.approx((mean - deviation) / deviation) if counts else 0.0)


# -------------------------------------------------------------------- previous: what is kept
def test_the_mean_outcome_is_of_rows_with_a_decision() -> None:
    """Rows that end early count, those without a decision do not: (1 + 4) / 2."""
    batch = rows(1.0, 4.0, 64.0, mask=[[1, 1, 1], [1, 0, 0], [0, 0, 0]])
    source, store = Previous(window=1), dict[str, Batch]()
    out = source({"policy": batch}, store, source.initial())
    assert out["policy"].row["mean"].tolist() == [2.5] * 3
    assert set(out) == {"policy"}
    memory = source.observe("drawn", batch=out["policy"], memory=source.initial())
    assert memory["means"].tolist() == [2.5]
    assert source.observe("drawn", batch=batch, memory=memory) == {}


def test_a_batch_without_decisions_is_handed_on_and_not_kept() -> None:
    batches, store = {"policy": rows(1.0, 1.0, mask=[[0, 0, 0]] * 2)}, dict[str, Batch]()
    assert Previous()(batches, store, Previous().initial()) is batches
    assert store == {}


def test_the_window_is_of_the_newest() -> None:
    source, memory = Previous(window=2), Previous().initial()
    for x, wanted in ((1.0, [1.0]), (2.0, [1.0, 2.0]), (3.0, [2.0, 3.0]), (4.0, [3.0, 4.0])):
        memory = source.observe("drawn", batch=rows(0.0, 0.0, row={"mean": means(x, x)}), memory=memory)
        assert memory["means"].tolist() == wanted


def test_the_kept_batch_comes_with_the_verdict_on_what_followed() -> None:
    """Two rows are kept; the next batch, of four, is better by 2 than the mean before. Then nothing changes: no `previous`."""
    source, store, memory = Previous(window=1), dict[str, Batch](), Previous().initial()
    first, second = rows(0.0, 1.0, row={"length": means(3.0, 4.0)}), rows(2.5, 2.5, 2.5, 2.5)
    source({"policy": first}, store, memory)
    assert set(source({"policy": first}, {}, {"means": means(0.25)})) == {"policy"}  # a verdict, but nothing is kept
    out = source({"policy": second, "other": first}, store, {"means": means(0.5)})
    assert set(out) == {"policy", "other", "previous"}
    assert out["other"] is first
    assert out["previous"].row["improvement"].tolist() == [2.0, 2.0]
    assert out["previous"].row["length"].tolist() == [3.0, 4.0]
    assert out["previous"].row["improvement"].dtype == F64
    assert store["previous"].shape[0] == 4
    assert set(source({"policy": first}, store, memory)) == {"policy"}  # the window is not full
    assert set(source({"policy": second}, store, {"means": means(2.5)})) == {"policy"}


@pytest.mark.parametrize("source", [Previous(), Window()], ids=["previous", "window"])
@pytest.mark.parametrize("known", [False, True])
def test_numbers_and_provenance_of_what_is_kept(source: Any, known: bool) -> None:
    """The sampler's numbers stand for the policy's, unless those are known; decisions of the policy are told as replayed."""
    batch = rows(1.0, 2.0, mask=[[1, 1, 0], [0, 1, 1]])
    mine = torch.zeros(2, 3)
    batch = batch.adding({"logp@old": mine}) if known else batch
    for column in (None, torch.tensor([[OWN, OWN, OWN], [FORCED, OWN, OWN]])):
        store: dict[str, Batch] = {}
        more = (source.initial(),) if isinstance(source, Previous) else ()
        source({"policy": replace(batch, source=column)}, store, *more)
        (kept,) = store.values()
        assert torch.equal(kept.stat("logp@old"), mine if known else batch.stat("logp@behaviour"))
        assert kept.source is not None
        assert bool((kept.source[kept.mask] == REPLAYED).all())
        if column is not None:  # what is no decision stays as it was
            assert kept.source.tolist() == [[REPLAYED, REPLAYED, OWN], [FORCED, REPLAYED, REPLAYED]]
    with pytest.raises(MissingStatistic, match="logp@behaviour"):
        source({"policy": replace(batch, stats={})}, {}, *more)


# -------------------------------------------------------------------- window
def test_declarations_of_window() -> None:
    assert Window().size == 2
    assert Window().needs == {"logp@behaviour"}
    assert Window().requires == {Can.SCORE, Can.EPISODES}


@pytest.mark.parametrize("size", [1, 2, 3])
def test_a_window_holds_the_last_batches_of_each_name(size: int) -> None:
    """The fresh one first, then older and older ones; only fresh decisions are the policy's own."""
    store: dict[str, Batch] = {}
    for t in range(5):
        out = Window(size=size)({"a": rows(t, t), "b": rows(10.0 + t)}, store)
        back = range(t, max(t - size, -1), -1)
        assert out["a"].outcome().tolist() == [x for i in back for x in (i, i)]
        assert out["b"].outcome().tolist() == [10.0 + i for i in back]
        assert out["a"].source is not None
        assert out["a"].source.tolist() == [[OWN if i < 2 else REPLAYED] * 3 for i in range(2 * len(back))]
        assert sorted(store) == [f"{name}/{i}" for name in "ab" for i in range(1, len(back) + (t < size - 1))]


def test_a_window_of_fresh_decisions_keeps_what_was_forced() -> None:
    """Also of the fresh batch the numbers are those of the policy that wrote it, and the mask decides whose decisions they are."""
    batch = rows(1.0, mask=[[0, 1, 1]], source=torch.tensor([[FORCED, OWN, OWN]]))
    out = Window()({"policy": batch}, {})["policy"]
    assert out.source is not None
    assert out.source.tolist() == [[FORCED, OWN, OWN]]
    assert torch.equal(out.stat("logp@old"), batch.stat("logp@behaviour"))
    known = Window()({"policy": batch.adding({"logp@old": torch.zeros(1, 3)})}, {})["policy"]
    assert known.stat("logp@old").tolist() == [[0.0, 0.0, 0.0]]


# -------------------------------------------------------------------- whom they serve
def test_sources_of_batches_and_of_transitions() -> None:
    """Critics of actions learn from transitions that are kept, other methods from whole batches."""
    whole, kept = get_method("ppo"), get_method("sac")
    for source in (Fresh(), Previous(), Window()):
        assert source.validate(whole, whole.update()) is None
        assert "the critics of sac learn from single transitions" in str(source.validate(kept, kept.update()))
    assert critics_without_replay(whole) is None
    assert replay_without_critics(kept) is None
    assert "ppo has none, it learns from whole batches" in str(replay_without_critics(whole))


def test_of_a_recipe_its_own_parts_are_asked() -> None:
    """Its stages have sources of their own."""
    ppo, sac = get_method("ppo"), get_method("sac")
    recipe: Any = SimpleNamespace(name="mine", requires=sac.requires, own=lambda: ppo)
    assert own_parts(recipe) is ppo
    assert own_parts(sac) is sac
    assert critics_without_replay(recipe) is None
    assert "mine has none" in str(replay_without_critics(recipe))


def test_nothing_is_asked() -> None:
    assert Nothing().host
    with pytest.raises(StopIteration) as end:
        next(Nothing()(Plan(3, lambda n: list(range(n)))))
    assert end.value.value == {}
