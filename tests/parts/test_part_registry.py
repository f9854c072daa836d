"""What every registered part must offer: a name, an equation, declared settings, and a loss that traces as one graph."""

from __future__ import annotations

import inspect
import warnings
from dataclasses import fields, replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from polopt.batch import Batch, Totals
from polopt.draws import Draws
from polopt.objective import Now
from polopt.part import KINDS, Part, Range, ask, call, hints, make_part, part_names
from polopt.parts.surrogate.clip import Clip

torch.set_num_threads(1)
EVERY = [(kind, name) for kind in KINDS for name in part_names(kind)]
#: parts that ask networks themselves are traced with these, in tests/loops/test_rounds.py
TRACED = [
    (kind, name) for kind, name in EVERY if kind in ("select", "weight", "surrogate", "penalty", "critic", "aggregate")
    and "nets" not in inspect.signature(type(make_part(kind, name)).__call__).parameters
]  # fmt: skip


@pytest.mark.parametrize(("kind", "name"), EVERY)
def test_parts_describe_themselves(kind: str, name: str) -> None:
    part = make_part(kind, name)
    assert part.kind == kind
    assert part.equation or kind in ("source", "decoder")
    assert not (type(part).__doc__ or "").startswith((f"{type(part).__name__}(", "Base of all"))  # the generated docstring
    assert hash(part) == hash(make_part(kind, name))
    assert part.describe().startswith(part.name)
    for f in fields(part):
        meta = getattr(hints(type(part))[f.name], "__metadata__", ())
        assert any(isinstance(m, str) for m in meta), f"{name}.{f.name} has no help text"
        value = getattr(part, f.name)
        if isinstance(value, int | float) and not isinstance(value, bool):
            assert any(isinstance(m, Range) for m in meta), f"{name}.{f.name} has no range"


def example(seed: int, part: Part | None = None) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(seed)
    names = ("logp@now", "logp@old", "logp@ref", "logp@behaviour", "value@now", "value@old", "entropy@now", "return@old")
    more = sorted(part.needs - set(names)) if part else []
    return {"advantage": torch.randn(4, 3, generator=g), **{n: torch.randn(4, 3, generator=g) for n in (*names, *more)}}


def loss_of(part: Part, mask: Tensor, data: dict[str, Tensor], memory: dict[str, Tensor] | None = None) -> Tensor:
    stats = {k: v for k, v in data.items() if k != "advantage"}
    row = {name: torch.tensor([0.0, 1.0, 0.0, 0.0]) for name in part.reads - {"group"}}
    batch = Batch(mask=mask, stats=stats, row=row, horizon=3)
    batch = replace(batch, group=torch.tensor([0, 0, 1, 1]), units={"group": 2})
    now = Now({k.removesuffix("@now"): v for k, v in stats.items() if k.endswith("@now")})
    memory = part.initial() if memory is None else memory
    given: dict[str, Any] = {"batch": batch, "now": now, "advantage": data["advantage"], "memory": memory, "valid": mask}
    if part.surveys:
        rng = Draws.given([data["value@now"].flatten()])
        found = ask(part.survey, **given, rng=rng, surrogate=Clip())  # type: ignore[attr-defined]
        given["batch"] = batch.adding(found)
    out = call(part, **given, loss=torch.where(mask, data["logp@now"], 0.0), totals=Totals.of(mask))
    loss: Tensor = out[0] if isinstance(out, tuple) else out
    return loss


@pytest.mark.parametrize(("kind", "name"), TRACED)
def test_parts_on_the_loss_path_trace_as_one_graph(kind: str, name: str) -> None:
    """Recorded on one batch, the tensor program gives the same on another: no value was looked at."""
    part = make_part(kind, name)
    mask = torch.tensor([[1, 1, 1], [1, 1, 0], [1, 0, 0], [0, 0, 0]]).bool()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = make_fx(lambda m, d, k: loss_of(part, m, d, k), tracing_mode="fake")
        traced = program(mask, example(0, part), part.initial())  # memory is an input too
    for seed in range(3):
        other = mask if seed else ~mask
        assert torch.equal(traced(other, example(seed, part), part.initial()), loss_of(part, other, example(seed, part)))


def test_weights_are_positive_and_without_gradient() -> None:
    data = {k: v.requires_grad_() for k, v in example(0).items()}
    for name in part_names("weight"):
        weight = loss_of(make_part("weight", name), torch.ones(4, 3, dtype=torch.bool), data)
        assert bool((weight >= 0).all())
        assert not weight.requires_grad


def test_but_changes_one_setting_and_refuses_others() -> None:
    clip = make_part("surrogate", "clip")
    assert clip.but(high=0.3) == replace(clip, high=0.3)  # type: ignore[call-arg]
    with pytest.raises(ValueError, match="did you mean 'high'"):
        clip.but(hihg=0.3)
