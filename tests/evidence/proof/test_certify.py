"""Certificates: what a good and a broken method get, what is stored and printed, and when a stored one is stale."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from identities import identities, marked
from torch import Tensor

from polopt import registry
from polopt.batch import Batch
from polopt.claim import Floor, Neutral
from polopt.cli import main
from polopt.errors import CallError, PoloptError
from polopt.evidence.proof import certify as certificates
from polopt.evidence.proof import checks, stored
from polopt.evidence.proof.certify import certify
from polopt.evidence.proof.checks import Check
from polopt.loops.drive import drive
from polopt.overrides import resolve
from polopt.part import Can
from polopt.parts.advantage.group import GroupBaseline
from polopt.parts.advantage.grouped import Grouped
from polopt.parts.aggregate import TokenMean
from polopt.parts.surrogate.clip import Clip
from polopt.registry import all_methods, get_method

torch.set_num_threads(1)
FAST = Floor("table:arms", "20-updates", 0.3, settings={"evaluate.points": 2, "evaluate.episodes": 64})
REPORT = [
    {"test": "tests/a.py::test_x[1]", "text": "x holds", "methods": ["grpo", "ppo"], "outcome": "passed"},
    {"test": "tests/a.py::test_x[2]", "text": "x holds", "methods": ["grpo", "ppo"], "outcome": "passed"},
    {"test": "tests/a.py::test_y", "text": "y holds", "methods": ["grpo"], "outcome": "passed"},
]


@dataclass(frozen=True)
class Flipped(Clip):
    """The clip with the wrong sign."""

    def __call__(self, batch: Batch, now: Mapping[str, Tensor], advantage: Tensor) -> Tensor:
        """Walks downhill."""
        return -super().__call__(batch, now, advantage)


@dataclass(frozen=True)
class OwnMean(TokenMean):
    """The mean of each micro-batch."""

    def __call__(self, loss: Tensor, valid: Tensor) -> Tensor:
        """Divides by what it sees."""
        return loss.sum() / valid.sum().clamp(min=1)


@pytest.fixture
def as_grpo(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Put a variant in GRPO's place in the registry."""

    def put(**changes: Any) -> Any:
        kept = get_method("grpo")
        variant = replace(kept, **{"floor": FAST, **changes})
        monkeypatch.setitem(registry._METHODS, "grpo", variant)
        return variant

    return put


# -------------------------------------------------------------------- the whole certificate
def test_a_good_method_is_certified(as_grpo: Any, tmp_path: Path) -> None:
    found = certify(as_grpo(), report=REPORT)
    assert found.certified, found.line
    assert found.line.startswith("grpo: certified (2 identities, oracle ")
    assert ", golden bit-identical, resume ok, invariance " in found.line or ", golden within " in found.line
    assert ", floor " in found.line
    tree = json.loads(found.write(tmp_path).read_text())
    assert tree["certified"] is True
    assert tree["reasons"] == []
    assert [t["cases"] for t in tree["identities"]["tests"]] == [2, 1]
    assert tree["oracle"]["error"] <= tree["oracle"]["tolerance"]
    assert tree["floor"]["scores"].keys() == {"0", "1"}
    assert tree["versions"]["torch"] == torch.__version__ or tree["versions"]["torch"] in torch.__version__
    assert {"date", "commit", "command", "seconds", "fingerprint"} <= tree.keys()
    assert all("seconds" in tree[name] for name in certificates.CHECKS)


def test_a_flipped_sign_is_refused_with_the_right_reasons(as_grpo: Any) -> None:
    found = certify(as_grpo(surrogate=Flipped()), report=REPORT)
    assert not found.certified
    assert {k for k, c in found.found.items() if c.result == "failed"} == {"oracle", "golden", "floor"}
    off, trajectory, floor = found.reasons
    assert off.startswith("oracle: off by 2")  # twice the gradient away
    assert trajectory.startswith("golden trajectory differs from update 1 on")
    assert floor.startswith("floor: seed")
    assert found.line == f"grpo: NOT certified: {'; '.join(found.reasons)}"
    assert found.found["resume"].result == found.found["invariance"].result == "ok"


def test_a_wrong_normaliser_is_refused(as_grpo: Any) -> None:
    found = certify(as_grpo(aggregate=OwnMean()), report=REPORT, only=("oracle", "golden", "invariance"))
    assert {"golden", "invariance"} <= {k for k, c in found.found.items() if c.result == "failed"}
    assert any(r.startswith("invariance: off by") and "cut at" in r for r in found.reasons)


def test_a_registered_method_must_have_a_floor_and_identities(as_grpo: Any) -> None:
    found = certify(as_grpo(floor=None), report=[], only=("identities", "floor"))
    assert found.reasons == ["no test is marked as an identity of it", "it declares no learning floor"]
    assert not found.certified


def test_a_method_of_ones_own_gets_what_is_possible(tmp_path: Path) -> None:
    mine = get_method("grpo").but("mine", epochs=2)
    found = certify(mine, golden=tmp_path, only=("identities", "oracle", "golden", "invariance", "floor"))
    assert found.certified
    assert [c.result for c in found.found.values()] == ["none", "ok", "none", "ok", "none"]
    assert certify(mine, golden=tmp_path, record=True, only=("golden",)).certified
    again = certify(mine, golden=tmp_path, only=("golden",))
    assert again.found["golden"].text == "golden bit-identical"
    other = certify(mine.but("mine", epochs=3), golden=tmp_path, only=("golden",))
    assert not other.certified


def test_a_method_that_a_file_of_ones_own_registers_is_ones_own(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """As in the documentation: it can have no identities among the library's tests."""
    monkeypatch.setattr(registry, "_METHODS", dict(registry._METHODS))
    mine = registry.register(get_method("grpo").but("mine", epochs=2))
    assert "mine" in all_methods()
    assert not certificates.registered(mine)
    assert certificates.registered(get_method("grpo"))
    assert certify(mine, golden=tmp_path, only=("identities", "oracle", "golden", "invariance", "floor")).certified


def test_without_a_check_that_knows_what_is_right_nothing_is_certified() -> None:
    """A child without neutral values and floor, whose advantage no theory covers, with the wrong sign."""
    mine = get_method("grpo").but("mine", advantage=Unknown())
    found = certify(mine, only=("identities", "oracle", "invariance", "floor"))
    assert [c.result for c in found.found.values()] == ["none", "none", "ok", "none"]
    assert found.reasons == ["nothing checked here could tell a wrong sign: declare a floor or neutral values"]
    assert not found.certified


@pytest.mark.parametrize(("name", "without"), [("kl-cov", ["penalty.kl-cov"]), ("ppo", ["critic"]), ("grpo", [])])
def test_what_the_oracle_leaves_out_is_named(name: str, without: list[str]) -> None:
    found = certify(get_method(name), only=("oracle",)).found["oracle"]
    assert found.details["without"] == without
    assert found.text.endswith(f" without {without[0]}" if without else "e-16")


@dataclass(frozen=True)
class Unknown(Grouped):
    """The mean of the group minus the outcome."""

    def __call__(self, batch: Batch) -> Tensor:
        """The same at all decisions of a row."""
        outcome = batch.outcome()
        return (batch.pool(outcome, "group") - outcome)[:, None] * batch.mask


@dataclass(frozen=True)
class OwnBaseline(GroupBaseline):
    """A baseline of somebody's own, right or with the wrong sign."""

    sign: float = 1.0

    def __call__(self, batch: Batch) -> Tensor:
        """As its parent, times the sign."""
        return self.sign * super().__call__(batch)


def test_neutral_values_of_a_method_of_ones_own_are_its_identity() -> None:
    def certified(sign: float) -> Any:
        neutral = {"advantage": Neutral()}
        return certify(get_method("grpo").but("mine", advantage=OwnBaseline(sign=sign), neutral=neutral), only=("identities",))

    good, bad = certified(1.0), certified(-1.0)
    assert good.certified
    assert "1 identity" in good.line
    assert good.json()["identities"]["tests"][0]["text"] == "with neutral values put in (advantage) it computes what grpo does"
    assert bad.reasons == ["difference from grpo: its neutral value of advantage does not hold"]
    none = certify(get_method("grpo").but("mine", advantage=OwnBaseline(sign=-1.0)), only=("identities",))
    assert none.found["identities"].text == "no identities"


# -------------------------------------------------------------------- single checks
def test_the_score_before_training_is_not_what_reaches_the_floor() -> None:
    """A policy that begins above the floor and only unlearns."""
    method = get_method("grpo").but("mine", surrogate=Flipped())
    start = drive(resolve(method, "table:arms", {"budget": "1-updates"}, sources="test"), None).summary["eval_score_initial"]
    found = checks.floor(method.but("mine", floor=Floor("table:arms", "20-updates", start, seeds=1)))
    assert found.result == "failed"
    assert found.details["scores"]["0"] < start


def test_outcomes_of_identities() -> None:
    method = get_method("grpo")
    assert checks.identities(method, None).result == "unknown"
    assert checks.identities(method, []).result == "none"
    assert checks.identities(get_method("ppo"), REPORT).text == "1 identity"
    broken = [*REPORT, {**REPORT[0], "test": "tests/a.py::test_x[3]", "outcome": "failed"}]
    found = checks.identities(method, broken)
    assert found.result == "failed"
    assert (found.details["passed"], found.details["failed"]) == (1, 1)
    assert found.reason == "tests/a.py::test_x fails"
    skipped = [{**REPORT[2], "outcome": "skipped"}]
    assert checks.identities(method, skipped).result == "none"


def test_a_floor_that_is_missed_names_the_seed() -> None:
    high = get_method("grpo").but("high", floor=replace(FAST, budget="1-updates", score=1.0))
    found = checks.floor(high)
    assert found.result == "failed"
    assert " on table:arms in 1-updates, below 1" in found.reason
    assert all(v < 1 for v in found.details["scores"].values())


def test_checks_that_cannot_be_made_or_raise() -> None:
    from polopt.errors import Misfit

    def misfit() -> Check:
        raise Misfit("x cannot run on table:lengths")

    def crash() -> Check:
        raise PoloptError("boom")

    assert checks.guarded("resume", misfit).result == "none"
    failed = checks.guarded("resume", crash)
    assert (failed.result, failed.reason) == ("failed", "resume: PoloptError: boom")


def test_a_method_that_does_not_fit_the_world_is_certified_by_the_rest() -> None:
    @dataclass(frozen=True)
    class Carried(Clip):
        @property
        def requires(self) -> frozenset[Can]:
            return frozenset({Can.CARRY})

    found = certify(get_method("grpo").but("carried", surrogate=Carried()), only=("resume", "invariance"))
    assert found.found["resume"].result == "none"
    assert "does not offer" in found.found["resume"].reason
    assert found.certified


def test_unknown_checks_are_refused() -> None:
    with pytest.raises(CallError, match="did you mean 'golden'"):
        certify(get_method("grpo"), only=("goldn",))


# -------------------------------------------------------------------- marks
def test_every_method_has_identities_that_are_tested() -> None:
    """As its certificate says, and as the marks say now for one of them."""
    for name in all_methods():
        proof = stored.certificate(name)
        assert proof is not None, f"make certify: {name} has no certificate"
        assert len(proof["identities"]["tests"]) >= 5, name
    paths = [Path(__file__).parents[2] / "methods" / f"test_{f}.py" for f in ("a2c_is_ppo", "control_identities")]
    texts = {text for _, text in identities("ppo", paths)}
    assert "at ratio 1 the surrogate's value is mean(A), and 0 once A is standardised" in texts
    assert not any("RLOO" in text for text in texts)


@pytest.mark.parametrize(
    "arguments", [("gropo", "x holds"), ("ppo",), ("x holds",), ("ppo", "grpo"), ("ppo", 3), (["ppo", "gropo"], "x holds")]
)
def test_marks_of_the_wrong_form_are_refused(arguments: tuple[Any, ...]) -> None:
    item: Any = SimpleNamespace(nodeid="tests/a.py::test_x", iter_markers=lambda _: [pytest.mark.identity(*arguments).mark])
    with pytest.raises(pytest.UsageError, match=r"tests/a\.py::test_x: identity takes methods and a text"):
        list(marked(item))


def test_cases_count_for_their_method_alone() -> None:
    def of(case: str, *arguments: Any) -> frozenset[str]:
        item: Any = SimpleNamespace(
            nodeid="t",
            iter_markers=lambda _: [pytest.mark.identity(*arguments).mark],
            callspec=SimpleNamespace(params={"name": case}),
        )
        return next(marked(item))[0]

    assert of("ppo", "*", "x holds") == {"ppo"}
    assert of("ppo", ("ppo", "trpo"), "x holds") == {"ppo"}
    assert of("grpo", "ppo", "x holds") == frozenset()
    assert of("no method", "*", "x holds") == frozenset(all_methods())


# -------------------------------------------------------------------- command line
def call(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    status = main(list(words))
    out = capsys.readouterr()
    return status, out.out, out.err


def test_command_line(as_grpo: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "run_identities", lambda method: REPORT)
    as_grpo()
    status, out, _ = call(capsys, "certify", "grpo", "--out", str(tmp_path))
    assert status == 0
    assert out.startswith("grpo: certified (2 identities")
    assert stored.read(tmp_path / "grpo.json")["command"] == "polopt certify grpo"
    as_grpo(surrogate=Flipped(), floor=None)
    status, out, _ = call(capsys, "certify", "grpo", "--out", str(tmp_path), "--json")
    assert status == 1
    assert json.loads(out)["certified"] is False


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("certify",), "takes a method or --all"), (("certify", "ppo", "--all"), "takes a method or --all"),
        (("certify", "pppo"), "did you mean 'ppo'"), (("certify", "ppo", "--jobs", "2"), "with --all"),
        (("certify", "--all", "--jobs", "0"), "at least 1"), (("certify", "ppo", "--golden", "nowhere"), "there is no such folder"),
    ],
)  # fmt: skip
def test_wrong_calls(words: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    status, _, err = call(capsys, *words)
    assert status == 2
    assert message in err
