"""What is asked for, before anything runs: contestants in words, refusals with what would work, commands that repeat."""

from __future__ import annotations

import io
import shlex
from pathlib import Path
from typing import Any

import pytest

from polopt.cli import build_parser, main
from polopt.cli.words import COMPARE, split_settings
from polopt.errors import CallError
from polopt.evidence.compare import place, plan
from polopt.evidence.compare.entries import Entry, entries_of, external_entries, fill, parse, slug, word_of
from polopt.evidence.compare.folders import inspect_run
from polopt.evidence.compare.live import Table, Tail
from polopt.evidence.compare.plan import Asked, command_of, default_name, ready, seeds_of, seeds_text
from polopt.evidence.compare.schedule import Job
from polopt.evidence.compare.tune import read_search, search_space
from polopt.run import Budget

FILE = Path(__file__).with_name("faulty_methods.py")
CARTPOLE = "gym:CartPole-v1"


def asked(*words: str, task: str = CARTPOLE, budget: str = "10k-decisions", seeds: Any = 2, **rest: Any) -> Asked:
    external = external_entries(rest.pop("external", ()))
    return Asked((*entries_of(words), *external), task, seeds_of(seeds), Budget.parse(budget), **rest)


def refusal(*words: str, **rest: Any) -> str:
    with pytest.raises(CallError) as error:
        ready(asked(*words, **rest))
    return str(error.value)


# -------------------------------------------------------------------- words
@pytest.mark.parametrize(
    ("word", "name", "method", "settings"),
    [
        ("ppo", "ppo", "ppo", {}),
        ("PPO", "ppo", "ppo", {}),
        ("ppo,epochs=4", "ppo,epochs=4", "ppo", {"epochs": "4"}),
        ("mine=ppo,epochs=4,lr=1e-3", "mine", "ppo", {"epochs": "4", "lr": "1e-3"}),
        ("ppo,policy.hidden=64,64,lr=1", "ppo,policy.hidden=64,64,lr=1", "ppo", {"policy.hidden": "64,64", "lr": "1"}),
        (f"{FILE}:FAULTY", "faulty", f"{FILE}:FAULTY", {}),
        (f"x={FILE}:FAULTY,epochs=2", "x", f"{FILE}:FAULTY", {"epochs": "2"}),
    ],
)
def test_words(word: str, name: str, method: str, settings: dict[str, str]) -> None:
    found = parse(word)
    assert found == Entry(name, method, settings)
    assert parse(word_of(found)) == found


@pytest.mark.parametrize(
    ("word", "told"),
    [
        ("pppo", "unknown method 'pppo', did you mean 'ppo'?"),
        ("ppo,fast", "'fast' is no setting"),
        ("mine=", "names no method"),
        ("ppo,lr=1,lr=2", "sets lr twice"),
    ],
)
def test_wrong_words(word: str, told: str) -> None:
    with pytest.raises(CallError) as error:
        parse(word)
    assert told in str(error.value)


def test_other_forms_of_contestants() -> None:
    from polopt.methods.onpolicy.ppo import PPO

    assert entries_of([PPO, ("a2c", {"lr": 1e-3})]) == [Entry("ppo", PPO), Entry("a2c,lr=0.001", "a2c", {"lr": 1e-3})]
    assert entries_of({"x": "ppo,epochs=2", "y": PPO}) == [Entry("x", "ppo", {"epochs": "2"}), Entry("y", PPO)]
    with pytest.raises(CallError, match="got int"):
        entries_of([3])
    assert slug("a b/c:d,e=1") == "a-b-c-d,e=1"


def test_seeds() -> None:
    assert seeds_of("5") == seeds_of(5) == (0, 1, 2, 3, 4)
    assert seeds_of("0,3,7") == seeds_of([0, 3, 7]) == (0, 3, 7)
    assert seeds_of("7,") == (7,)
    for seeds in ((0, 1, 2), (0, 3, 7), (7,), (0,)):
        assert seeds_of(seeds_text(seeds)) == seeds
    for given, told in (
        (0, "at least one seed"), ("0", "at least one seed"), ([], "at least one seed"), ("1,1", "given twice"),
        ("-1,", "negative"), (-2, "at least one seed"), ("five", "write a number of seeds"),
    ):  # fmt: skip
        with pytest.raises(CallError, match=told):
            seeds_of(given)


# -------------------------------------------------------------------- refusals
def test_names_must_differ() -> None:
    assert "two contestants are called 'ppo'; give one a name of its own: mine=ppo" in refusal("ppo", "PPO")
    assert "nothing to compare" in refusal()
    assert "too alike" in refusal("a b=ppo", "a-b=ppo,epochs=2")


def test_methods_that_do_not_fit() -> None:
    told = refusal("grpo", "dapo", "ppo")
    assert told.startswith("dapo cannot run on gym:CartPole-v1: its sampler 'dynamic' needs")
    assert "Of these contestants grpo, ppo fit gym:CartPole-v1" in told
    fitting = told.partition("methods that fit: ")[2].split(", ")
    assert {"ppo", "a2c", "trpo", "grpo", "reinforce"} <= set(fitting)
    assert "dapo" not in fitting
    assert "Of these contestants none fit" in refusal("dapo")
    assert "trpo cannot run on text:spell_backward" in refusal("trpo", "grpo", task="text:spell_backward")


def test_small_budgets() -> None:
    told = refusal("ppo", "a2c", budget="1000-decisions")
    assert "smaller than one update of ppo, which takes 1,024 decisions" in told
    assert "smallest budget that works for all contestants is 1024-decisions" in told
    assert len(ready(asked("ppo", "a2c", budget="1024-decisions"))) == 2
    assert "smallest is 1-updates" in refusal("ppo", budget="0.5-updates")
    assert "tokens" in refusal("grpo", task="text:spell_backward", budget="10-tokens")
    assert len(ready(asked("ppo", budget="1-seconds"))) == 1


def test_settings_that_not_all_have() -> None:
    told = refusal("ppo", "trpo", settings={"lr": "1e-3"}, source="command line")
    assert told.startswith("trpo: unknown setting 'lr' (command line)")
    assert "give it to the others alone: ppo,lr=1e-3" in told
    assert "no contestant has it" in refusal("ppo", settings={"lrr.x": "1"})
    assert "ppo,lr=x" in refusal("ppo,lr=x", "a2c")


@pytest.mark.parametrize(
    ("rest", "told"),
    [
        ({"settings": {"seed": "3"}}, "use --seeds"),
        ({"settings": {"evaluate.every": "3"}}, "use --points"),
        ({"baseline": "grpo"}, "baseline: there is no contestant 'grpo'"),
        ({"points": 0}, "--points 0"),
        ({"episodes": 0}, "--episodes 0"),
        ({"tune": -1}, "--tune -1"),
        ({"search": ("lr=1..2",)}, "give --tune as well"),
        ({"tune": 2, "seeds": "0,1001"}, "seed 1001 is a seed of tuning"),
        ({"task": "gym:CartPol-v1"}, "unknown environment 'CartPol-v1', did you mean 'CartPole-v1'?"),
        ({"external": ["x=nosuchprogram {out}"]}, "there is no program 'nosuchprogram'"),
        ({"external": ["x=python3 -c pass"]}, "needs {out}"),
        ({"external": ["x=python3 {sed} {out}"]}, "unknown placeholder '{sed}', did you mean '{seed}'?"),
        ({"external": ["x=python3 {updates} {out}"]}, "asks for {updates}, but the budget is in decisions"),
        ({"external": ["x=python3 '{out}"]}, "cannot be read"),
    ],
)
def test_other_refusals(rest: dict[str, Any], told: str) -> None:
    assert told in refusal("ppo", "a2c", **rest)


def test_own_settings_may_not_break_the_pairing() -> None:
    assert "the same for all; use --seeds" in refusal("ppo,seed=3")
    with pytest.raises(CallError, match="NAME=COMMAND"):
        external_entries(["python x.py"])


def test_programs_get_what_they_ask_for() -> None:
    words = fill(
        "run '{task} x' --n={decisions} {seed} {budget} {out} {episodes} {points} {{}}", task="gym:X", seed=3, out="/a b",
        budget=Budget.parse("2k-decisions"), text="2000-decisions", episodes=20, points=10,
    )  # fmt: skip
    assert words == ["run", "gym:X x", "--n=2000", "3", "2000-decisions", "/a b", "20", "10", "{}"]


# -------------------------------------------------------------------- resolved
def test_layers_of_settings() -> None:
    first, second = ready(asked("ppo", "x=ppo,epochs=2", settings={"epochs": "3", "collect.envs": "4"}))
    assert first.resolved is not None
    assert second.resolved is not None
    assert (first.resolved.method.update().epochs, second.resolved.method.update().epochs) == (3, 2)
    assert first.resolved.settings.collect.envs == second.resolved.settings.collect.envs == 4
    assert first.at(7).settings.seed == 7
    settings = first.resolved.settings
    assert (settings.evaluate.points, settings.checkpoint.keep, settings.threads) == (10, 1, 1)
    assert settings.evaluate.episodes == plan.EPISODES
    assert settings.budget == "10000-decisions"
    (text,) = ready(asked("grpo", task="text:spell_backward"))
    assert text.resolved is not None
    assert text.resolved.settings.evaluate.episodes == 256  # the task's preset
    (given,) = ready(asked("ppo", episodes=7))
    assert given.resolved is not None
    assert given.resolved.settings.evaluate.episodes == 7


def test_the_command_repeats_the_comparison() -> None:
    a = asked(
        "ppo", "x=ppo,epochs=2", seeds="0,3", budget="10k-decisions", settings={"collect.envs": "4"}, baseline="ppo", tune=2,
        search=("lr=1e-4..1e-2:log",), external=["sb3=python3 run.py --seed {seed} --out {out}"], higher_is_better=False,
    )  # fmt: skip
    command = command_of(a, Path("runs/here"), 2)
    words, settings = split_settings(shlex.split(command)[1:])
    parsed = build_parser().parse_args(words)
    again = Asked(
        (*entries_of(parsed.methods), *external_entries(parsed.external)), parsed.task, seeds_of(parsed.seeds),
        Budget.parse(parsed.budget), settings, parsed.points, parsed.episodes, parsed.metric, not parsed.lower_is_better,
        parsed.baseline, parsed.tune, parsed.tune_seeds, tuple(parsed.search),
    )  # fmt: skip
    assert again == a
    assert (parsed.out, parsed.jobs) == ("runs/here", 2)
    assert default_name(a) == "compare-ppo-x-sb3-CartPole-v1"


def test_every_option_is_known_to_the_splitter() -> None:
    sub = build_parser()._subparsers._group_actions[0].choices["compare"]  # type: ignore[union-attr,index]
    own = {o: a.nargs != 0 for a in sub._actions for o in a.option_strings}
    assert own == COMPARE


# -------------------------------------------------------------------- folders and command line
def test_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    a = asked("ppo")
    assert place.folder_of(a, None) == Path("runs/compare-ppo-CartPole-v1")
    (tmp_path / "runs/compare-ppo-CartPole-v1").mkdir(parents=True)
    (tmp_path / "runs/compare-ppo-CartPole-v1/other").touch()
    assert place.folder_of(a, None).name == "compare-ppo-CartPole-v1-2"
    with pytest.raises(CallError, match="no comparison"):
        place.folder_of(a, tmp_path / "runs/compare-ppo-CartPole-v1")
    (tmp_path / "runs/compare-ppo-CartPole-v1/plan.json").touch()
    assert place.folder_of(a, None).name == "compare-ppo-CartPole-v1"
    with place.alone(tmp_path / "x"), pytest.raises(CallError, match="another process"), place.alone(tmp_path / "x"):
        pass
    assert inspect_run(tmp_path / "nothing") == "absent"


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["ppo", "--budget", "1-updates"], "needs --task"),
        (["ppo", "--task", CARTPOLE], "needs --budget"),
        (["ppo", "--task", CARTPOLE, "--budget", "1-updates", "--seeds", "0"], "at least one seed"),
        (["ppo", "--task", CARTPOLE, "--budget", "1-updates", "--seed", "5"], "unknown option --seed, did you mean '--seeds'?"),
        (["ppo", "--task", CARTPOLE, "--budget", "lots"], "budget 'lots' is not understood"),
        (["ppo", "--task", CARTPOLE, "--budget", "1-updates", "--jobs", "0"], "--jobs 0"),
        (["ppo", "--task", CARTPOLE, "--budget", "1-updates", "--colect.envs", "3"], "did you mean 'collect.envs'?"),
    ],
)
def test_wrong_calls(words: list[str], told: str, tmp_path: Path, monkeypatch: Any, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["compare", *words]) == 2
    assert told in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []  # nothing was begun


# -------------------------------------------------------------------- searching
def test_search() -> None:
    assert read_search("lr=1e-4..1e-2:log") == ("lr", 1e-4, 1e-2, True, [])
    assert read_search("surrogate=clip|dual-clip") == ("surrogate", 0, 0, False, ["clip", "dual-clip"])
    for wrong in ("lr", "lr=", "lr=1", "lr=a..b", "lr=1..2:cube", "=1..2", "lr=2..1", "lr=0..1:log"):
        with pytest.raises(CallError):
            read_search(wrong)


def test_what_is_varied() -> None:
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    a = asked("ppo", "ppo-lm", "trpo", tune=2)
    spaces = [search_space(a, plan.arm_of(a, e)) for e in a.entries]
    assert spaces[0] == ({"updates.policy.rule.lr": FloatDistribution(1e-4, 1e-2, log=True)}, {"updates.policy.rule.lr": 1e-3})
    assert list(spaces[2][0]) == ["updates.policy.rule.delta", "updates.critic.rule.lr"]
    a = asked("ppo", tune=2, search=("epochs=1..20", "surrogate=clip|dual-clip", "surrogate.high=0.3..0.4"))
    space, first = search_space(a, plan.arm_of(a, a.entries[0]))
    assert space == {
        "updates.policy.epochs": IntDistribution(1, 20),
        "surrogate": CategoricalDistribution(["clip", "dual-clip"]),
        "surrogate.high": FloatDistribution(0.3, 0.4),
    }
    assert first == {}  # 0.2 lies outside: the first trial is not part of the study's own proposals
    a = asked("trpo", tune=2, search=("lr=1e-4..1e-2",))
    with pytest.raises(CallError, match="trpo"):
        search_space(a, plan.arm_of(a, a.entries[0]))


# -------------------------------------------------------------------- watching
def test_tail_reads_only_what_is_new(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    tail = Tail(path)
    tail.read("eval_score")
    path.write_text('{"update": 1, "eval_score": 3}\n{"update": 2}\n{"upd')
    tail.read("eval_score")
    assert (tail.score, tail.last) == (3, {"update": 2})
    with path.open("a") as f:
        f.write('ate": 3}\n')
    tail.read("eval_score")
    assert (tail.score, tail.last, tail.offset) == (3, {"update": 3}, path.stat().st_size)
    path.write_text('{"update": 1}\n')  # a resumed run
    tail.read("eval_score")
    assert tail.last == {"update": 1}


@pytest.mark.parametrize("terminal", [True, False])
def test_table(tmp_path: Path, terminal: bool) -> None:
    from rich.console import Console

    out = io.StringIO()
    console = Console(file=out, force_terminal=terminal, width=110, color_system=None)
    jobs = [Job(c, s, tmp_path / c / f"s{s}") for c in ("ppo", "a2c") for s in (0, 1)]
    table = Table(jobs, budget=100, key="decisions", metric="eval_score", title="Comparing", console=console)
    jobs[0].folder.mkdir(parents=True)
    (jobs[0].folder / "metrics.jsonl").write_text('{"decisions": 50, "seconds": 2, "eval_score": 7.5}\n')
    jobs[0].state = "running"
    table.started(jobs[0])
    table.tick()
    jobs[1].state, jobs[1].error = "failed", "no luck"
    table.ended(jobs[1])
    jobs[0].state = "done"
    table.ended(jobs[0])
    table.close()
    text = out.getvalue()
    assert "Comparing" in text
    if terminal:
        assert "1/2 done, 1 failed" in text
        assert "7.5" in text
        assert "25/s" not in text
        assert "2 of 4 runs" in text
    else:
        assert text.splitlines()[1].startswith("1/4  ppo seed 1  failed  no luck")
        assert "2/4  ppo seed 0  done  eval_score 7.5" in text
