"""What a comparison tells of its runs: versions, notes, a metric that does not exist, what tuning found; and what it reads."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from polopt.errors import CallError, PoloptError
from polopt.evidence.compare.read import read_comparison
from polopt.evidence.compare.run import Compared

Go = Callable[..., Compared]


def record(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "run.json").read_text())


def identity(folder: Path) -> dict[str, tuple[int, int]]:
    """Which files a run has, and when they were written."""
    return {str(p): (p.stat().st_ino, p.stat().st_mtime_ns) for p in sorted(folder.rglob("*")) if p.is_file()}


def test_what_holds_for_several_seeds_is_said_once(go: Go, tmp_path: Path) -> None:
    go(["reinforce"], seeds=3)
    for seed in (0, 2):
        folder = tmp_path / f"out/runs/reinforce/s{seed}"
        (folder / "run.json").write_text(json.dumps({**record(folder), "notes": [f"reinforce, seed {seed}, was odd", "the same"]}))
    assert read_comparison(tmp_path / "out").notes == ("reinforce, seeds 0, 2, was odd", "the same")


def test_overspending_is_said_once(go: Go) -> None:
    found = go({"ppo": "ppo"}, budget="40-decisions", seeds=1)  # two updates of 32
    assert [w for w in found.analysis.warnings if "budget" in w] == ["ppo spent up to 60% more than the budget of 40 decisions."]
    assert found.comparison.notes == ()


def test_the_processor_is_told_and_a_mixture_of_them(go: Go, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from polopt.evidence.compare import run

    monkeypatch.setattr(run, "_cpu", lambda: "Some Processor 9000")
    found = go(["reinforce"], page=True)
    assert {r.versions["cpu"] for r in found.comparison.runs} == {"Some Processor 9000"}
    assert found.comparison.runs[0].versions["torch"]  # and what the run itself noted
    assert json.loads((tmp_path / "out/comparison.json").read_text())["runs"][0]["versions"]["cpu"] == "Some Processor 9000"
    assert "Some Processor 9000" in (tmp_path / "out/index.html").read_text()
    assert "Runs differ" not in found.words
    monkeypatch.setattr(run, "_cpu", lambda: "Elsewhere 1")
    words = go(["reinforce"], seeds=3).words
    assert "Runs differ in cpu: Some Processor 9000 (reinforce seed 0, reinforce seed 1); Elsewhere 1 (reinforce seed 2)." in words


@pytest.mark.parametrize("jobs", [1, 2])
def test_a_metric_that_does_not_exist_ends_it_after_the_first_run(
    go: Go, tmp_path: Path, jobs: int, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(PoloptError) as error:
        go(["a2c", "ppo"], metric="eval_scor", seeds=4, jobs=jobs, quiet=False, page=True)
    told = str(error.value)
    assert error.value.exit_code == 1
    assert "there is no metric 'eval_scor' in the run of " in told
    assert "did you mean 'eval_score'? It has " in told
    assert told.count("explained_variance") == 1
    assert "explained_variance" not in capsys.readouterr().out  # keys are listed once
    begun = sorted(str(p.relative_to(tmp_path / "out/runs")) for p in (tmp_path / "out/runs").glob("*/s*"))
    assert begun == ["a2c/s0", "ppo/s0"][:jobs]
    assert f"{8 - len(begun)} of 8 runs were not begun" in told
    # what ran is kept: asked again nothing runs, and with a metric that exists it is used
    before = identity(tmp_path / "out/runs")
    with pytest.raises(PoloptError, match="there is no metric 'foo'"):
        go(["a2c", "ppo"], metric="foo", seeds=4, jobs=jobs, page=True)
    assert identity(tmp_path / "out/runs") == before
    assert {r.status for r in go(["a2c", "ppo"], seeds=1).comparison.runs} == {"done"}
    after = identity(tmp_path / "out/runs")
    assert {k: after[k] for k in before} == before


def test_a_metric_that_one_contestant_has_is_no_reason_to_stop(go: Go) -> None:
    found = go(["ppo", "reinforce"], metric="explained_variance", jobs=1, page=True).comparison
    assert {(r.contestant, r.status) for r in found.runs} == {("ppo", "done"), ("reinforce", "failed")}
    assert found.of("reinforce")[0].error.startswith("no 'explained_variance' in metrics.jsonl")


def test_a_config_is_read_once_and_again_when_it_changes(go: Go, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from polopt.evidence.compare import folders

    go(["reinforce"], seeds=3)
    read: list[str] = []
    real = folders.load_config

    def counted(path: Path) -> Any:
        read.append(str(path))
        return real(path)

    monkeypatch.setattr(folders, "load_config", counted)
    folders._parsed.cache_clear()
    go(["reinforce"], seeds=3)
    own = [p for p in read if p.startswith(str(tmp_path))]
    assert len(own) == len(set(own)) == 3
    config = tmp_path / "out/runs/reinforce/s1/config.yaml"
    config.write_text(config.read_text().replace("budget: 2-updates", "budget: 9-updates"))
    with pytest.raises(CallError, match="budget = 9-updates, this comparison has 2-updates"):
        go(["reinforce"], seeds=3)


def test_a_preset_that_wins_the_tuning_is_told(go: Go, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from polopt.cli.compare import _say

    found = go(["ppo"], tune=1, tune_seeds=1, seeds=1, page=True)
    _say(found)
    assert "ppo tuned: the preset stays, the best of 1 setting\n" in capsys.readouterr().out
    assert "the preset stays" in (tmp_path / "out/index.html").read_text()
    assert go(["ppo"], seeds=1).comparison.contestants[0].tuning == ""
