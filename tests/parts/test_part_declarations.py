"""What parts declare against what they do: statistics, capabilities, groups, shapes, and whether rows may be cut."""

from __future__ import annotations

import math
import re
from dataclasses import replace

import pytest
import torch
from part_cases import ADVANTAGES, EVERY, IDS, MASK, OTHERS, Noted, batch_of, run, tensors
from torch import Tensor

from polopt.batch import Batch, Totals
from polopt.errors import CallError, MissingStatistic
from polopt.part import Can, Part, call
from polopt.parts.advantage.beta_normalised import BetaNormalised
from polopt.parts.advantage.decoupled import Decoupled
from polopt.parts.advantage.gae import GAE, NStep
from polopt.parts.advantage.group import GroupBaseline
from polopt.parts.advantage.median import MedianBaseline
from polopt.parts.advantage.monte_carlo import MonteCarlo
from polopt.parts.advantage.running_mean import RunningMean
from polopt.parts.aggregate import SeqMeanTokenMean, SeqMeanTokenSum, SeqMeanTokenSumNorm, TokenMean
from polopt.parts.penalty.adaptive_kl import AdaptiveKL
from polopt.parts.reward.conditioned import Conditioned
from polopt.parts.reward.overlong import SoftOverlong
from polopt.parts.select.truncated import DropTruncated

torch.set_num_threads(1)
#: Parts that need whole rows.
WHOLE = (
    BetaNormalised
    | Conditioned
    | Decoupled
    | GroupBaseline
    | MedianBaseline
    | RunningMean
    | MonteCarlo
    | SoftOverlong
    | DropTruncated
)


# -------------------------------------------------------------------- what is declared is what is read
@pytest.mark.parametrize("part", EVERY, ids=IDS)
def test_parts_read_the_statistics_that_they_declare(part: Part) -> None:
    """Collectors and policies compute what is declared: less would be missing, more would be wasted forward passes."""
    x, read = tensors(), set[str]()
    batch = batch_of(x)
    batch = replace(batch, stats=Noted(batch.stats, read), row=Noted(batch.row, read))
    run(part, batch, x, read)
    if isinstance(part, AdaptiveKL):
        later = replace(batch, stats=Noted({**batch.stats, "logp@stepped": x["logp@ref"]}, read))
        part.observe("stepped", batch=later, memory=part.initial())
    made = {"return@old", *part.surveys}  # from the advantage part, and by the part itself
    assert read - made == part.needs | (part.reads - {"group"})


@pytest.mark.parametrize("part", EVERY, ids=IDS)
def test_parts_ask_for_what_their_statistics_come_from(part: Part) -> None:
    assert (Can.VALUE in part.requires) == any(n.startswith("value") for n in part.needs)
    assert (Can.REFERENCE in part.requires) == any(n.endswith("@ref") for n in part.needs)
    scored = part.kind in ("surrogate", "penalty", "reward") and any(n.startswith("logp") for n in part.needs)
    assert (Can.SCORE in part.requires) == scored
    whole = isinstance(part, WHOLE)
    assert (Can.EPISODES in part.requires) == whole


@pytest.mark.parametrize("part", EVERY, ids=IDS)
def test_groups_are_declared_where_they_are_compared(part: Part) -> None:
    x = tensors()
    alone = batch_of(x, group=None)
    if "group" in part.reads:
        with pytest.raises(MissingStatistic, match="group="):
            run(part, alone, x)
    else:
        assert torch.equal(run(part, alone, x), run(part, batch_of(x), x))
    assert (Can.GROUPS in part.requires) == ("group" in part.reads)


@pytest.mark.parametrize("part", EVERY, ids=IDS)
def test_statistics_of_another_shape_are_refused_by_name(part: Part) -> None:
    """One number for each row would be spread over its decisions without a word."""
    x = tensors()
    names = (
        set(part.needs)
        | ({"return@old"} if part.kind == "critic" else set())
        | ({"advantage"} if part.kind == "surrogate" else set())
    )
    for name in names - {"logp@stepped"}:
        odd = {**x, name: x[name][:, :1]}
        with pytest.raises(CallError, match=rf"'{re.escape(name)}' has shape \(3, 1\), expected \(3, 4\)"):
            run(part, replace(batch_of(x), stats={k: v for k, v in odd.items() if "@" in k}), odd)


def single(x: Tensor) -> Tensor:
    return x[MASK][:, None]


@pytest.mark.parametrize("part", [p for p in OTHERS if p.kind in ("surrogate", "penalty", "critic")])
def test_losses_of_single_decisions_are_those_of_rows_unless_declared(part: Part) -> None:
    """`rows` False lets minibatches cut rows into decisions: nothing may change."""
    x = tensors()
    whole = run(part, batch_of(x), x)
    cut = run(part, batch_of(x).decisions(), {k: single(v) for k, v in x.items()})
    assert torch.equal(single(whole), cut) == (not part.rows)


@pytest.mark.parametrize(
    "part", [TokenMean(), SeqMeanTokenMean(), SeqMeanTokenSum(), SeqMeanTokenSumNorm(), SeqMeanTokenSumNorm(3)]
)
def test_aggregates_of_single_decisions_are_those_of_rows_unless_declared(part: Part) -> None:
    x = torch.where(MASK, tensors()["advantage"], 0.0)

    def total(loss: Tensor, valid: Tensor) -> float:
        batch = Batch.of(mask=valid, horizon=4)
        return float(call(part, loss=loss, batch=batch, valid=valid, totals=Totals.of(valid)))

    same = math.isclose(total(x, MASK), total(single(x), torch.ones(8, 1).bool()), rel_tol=1e-12)
    assert same == (not part.rows)
    for bad in ({"loss": x[:, :1]}, {"valid": MASK[:, :1]}):
        with pytest.raises(CallError, match=rf"'{next(iter(bad))}' has shape \(3, 1\)"):
            call(part, **{"loss": x, "valid": MASK, "batch": Batch.of(mask=MASK, horizon=4), "totals": Totals.of(MASK), **bad})


@pytest.mark.parametrize("part", ADVANTAGES, ids=IDS[: len(ADVANTAGES)])
def test_advantages_of_outcomes_are_declared_to_be_of_rows(part: Part) -> None:
    """Parts that judge a row by its outcome give the same number to all its decisions."""
    x = tensors()
    found = run(part, batch_of(x), x)
    if part.rows:
        for row, mask in zip(found, MASK, strict=True):
            assert len(set(row[mask].tolist())) == 1
    else:
        assert isinstance(part, GAE | NStep | MonteCarlo)
