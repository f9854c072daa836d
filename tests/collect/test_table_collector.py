"""`TableCollector`: the text convention, rewards and noise, forced beginnings, exact scores, resuming; every method learns."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from polopt import api
from polopt.batch import FORCED, OWN, Batch, Clock
from polopt.collect.table import TableCollector, iteration_size
from polopt.columns import last_valid
from polopt.errors import CallError
from polopt.interfaces import Request
from polopt.loops.improve import Improve
from polopt.overrides import resolve
from polopt.policies import exact
from polopt.policies.table import TablePolicy
from polopt.registry import all_methods, get_method
from polopt.settings import CollectSettings, EvaluateSettings, Settings
from polopt.tasks.table import TABLE_OFFERS, TableTask


def collector(name: str = "table:tree", options: dict[str, Any] | None = None, seed: int = 0, **settings: Any) -> TableCollector:
    task = TableTask(name, options)
    method = get_method("grpo")
    return TableCollector(task, TablePolicy(task.world, task=task), Settings(**settings), method, seed)


def ask(c: TableCollector, *requests: Request) -> Batch:
    return c.answer(requests, clock=Clock())


# -------------------------------------------------------------------- answers
def test_rows_are_answers_in_the_text_convention() -> None:
    c = collector("table:tree")
    batch = ask(c, Request(item=3, count=40), Request(item=5, count=30))
    assert batch.shape == (70, 5)
    assert batch.horizon == 5
    assert batch.group is not None
    assert batch.group.bincount().tolist() == [40, 30]
    assert batch.units["group"] == 2
    assert batch.keys["item"].tolist() == [3] * 40 + [5] * 30
    last = last_valid(batch.mask)
    assert batch.terminated is not None
    assert batch.truncated is not None
    assert batch.reward is not None
    assert torch.equal(batch.terminated, last)
    ended = ((batch.action == 3) & last).any(1)
    assert torch.equal(batch.truncated.any(1), ~ended)
    assert torch.equal(batch.row["truncated"], (~ended).double())
    assert bool(ended.any())
    assert not bool(ended.all())
    world = c.world
    node, action = (x.gather(1, batch.mask.sum(1, keepdim=True) - 1).squeeze(1) for x in (batch.obs, batch.action))
    assert torch.equal(batch.outcome(), world.right[batch.keys["item"], node, action].double())
    assert not bool(batch.reward[~last].any())
    logp = c.policy.evaluate(batch, frozenset({"logp", "entropy"}))
    torch.testing.assert_close(batch.stats["logp@behaviour"], logp["logp"].detach(), atol=1e-14, rtol=0)
    torch.testing.assert_close(batch.stats["entropy@behaviour"], logp["entropy"].detach(), atol=1e-14, rtol=0)


def test_dense_rewards_stand_at_their_decisions() -> None:
    c = collector("table:tree", {"dense": 1.0})
    batch = ask(c, *(Request(item=i, count=20) for i in range(16)))
    assert batch.reward is not None
    assert bool(batch.reward[~last_valid(batch.mask) & batch.mask].any())
    torch.testing.assert_close(batch.outcome(), batch.row["right"])


def test_prompts_come_in_epochs() -> None:
    c = collector("table:tree")
    drawn = c.draw(40)
    assert sorted(drawn[:16]) == sorted(drawn[16:32]) == list(range(16))
    assert drawn[:16] != drawn[16:32]
    assert collector("table:tree").draw(40) == drawn
    assert collector("table:tree", seed=1).draw(40) != drawn


def test_forced_beginnings_are_not_the_policys() -> None:
    c = collector("table:tree", {"dense": 0.5})
    batch = ask(c, Request(item=0, count=50, prefix=torch.tensor([1, 0])), Request(item=1, count=50))
    assert batch.source is not None
    assert batch.action[:50, :2].tolist() == [[1, 0]] * 50
    assert not bool(batch.mask[:50, :2].any())
    assert bool(batch.mask[:50, 2].all())
    assert bool(batch.mask[50:, 0].all())
    assert set(batch.source[:50, :2].flatten().tolist()) == {FORCED}
    assert set(batch.source[batch.mask].tolist()) == {OWN}
    torch.testing.assert_close(batch.outcome(), batch.row["right"])  # what the beginning was paid is not lost
    assert c.costs()["decisions"] == int(batch.mask.sum())


@pytest.mark.parametrize("request_", [
    Request(item=None), Request(item=0, context=1), Request(item=0, limit=2), Request(item=0, prefix=torch.tensor([3])),
    Request(item=0, prefix=torch.tensor([0] * 5)),
])  # fmt: skip
def test_requests_that_make_no_sense_are_refused(request_: Request) -> None:
    with pytest.raises(CallError):
        ask(collector(), request_)
    with pytest.raises(CallError, match="no requests"):
        ask(collector())


def test_temperature() -> None:
    c = collector("table:arms")
    hot = ask(c, Request(item=0, count=4000, temperature=50.0))
    share = hot.action[:, 0].bincount(minlength=8) / 4000
    assert float((share - 1 / 8).abs().max()) < 0.03
    assert hot.row["temperature"].tolist() == [50.0] * 4000
    logp = c.policy.evaluate(hot, frozenset({"logp"}))["logp"].detach()
    torch.testing.assert_close(hot.stats["logp@behaviour"], logp, atol=1e-14, rtol=0)
    warm = collector("table:arms", collect=CollectSettings(temperature=2.0))
    assert ask(warm, Request(item=0, count=2)).row["temperature"].tolist() == [2.0, 2.0]
    assert "temperature" not in ask(collector(), Request(item=0)).row


def test_verdicts_are_flipped_and_grades_blurred() -> None:
    c = collector("table:arms", {"noise": 0.2})
    batch = ask(c, Request(item=7, count=5000))
    wrong = (batch.outcome() != batch.row["right"]).double().mean()
    assert float(wrong) == pytest.approx(0.2, abs=0.02)
    assert set(batch.outcome().tolist()) == {0.0, 1.0}
    report = c.report()
    assert report["accuracy"] == pytest.approx(float(batch.row["right"].mean()))
    assert report["reward"] == pytest.approx(float(batch.outcome().mean()))
    c = collector("table:arms", {"noise": 0.3, "reward": "graded"})
    batch = ask(c, Request(item=7, count=5000))
    error = batch.outcome() - c.world.total_reward()[7, 0, batch.action[:, 0]]
    assert float(error.mean()) == pytest.approx(0.0, abs=0.02)
    assert float(error.std()) == pytest.approx(0.3, abs=0.02)


# -------------------------------------------------------------------- numbers
def test_report_and_costs() -> None:
    c = collector("table:bank")
    batch = Batch.cat([ask(c, Request(item=0, count=8), Request(item=199, count=8)), ask(c, Request(item=100, count=30))])
    report, length, right = c.report(), batch.lengths().double(), batch.row["right"].bool()
    assert report["accuracy"] == report["score"] == report["reward"] == pytest.approx(float(right.double().mean()))
    assert report["length"] == pytest.approx(float(length.mean()))
    assert report["length_right"] == pytest.approx(float(length[right].mean()))
    assert report["length_wrong"] == pytest.approx(float(length[~right].mean()))
    assert report["truncated"] == pytest.approx(float(batch.row["truncated"].mean()))
    assert report["dead_groups"] == pytest.approx(2 / 3)  # hopeless, solved, mixed
    assert c.report() == {}
    assert c.costs() == {"decisions": int(batch.mask.sum()), "tokens": int(batch.mask.sum()), "completions": 46}
    assert c.costs()["decisions"] == 0


@pytest.mark.parametrize("greedy", [False, True])
@pytest.mark.parametrize("name", ["table:tree", "table:style", "table:lengths"])
def test_evaluation_is_the_exact_expectation(name: str, greedy: bool) -> None:
    c = collector(name, {"traps": 2} if name == "table:tree" else None, evaluate=EvaluateSettings(greedy=greedy))
    found = c.evaluate(1)
    assert next(iter(found)) == "score"
    batch = exact.enumerate_answers(c.world, c.policy)
    p = batch.row["probability"]
    divergence, entropy = 0.0, -float((p * batch.stats["logp@old"].sum(1)).sum())
    if greedy:
        best = [tuple(a) for a in c.policy.predict(range(c.world.prompts))]
        rows = zip(batch.keys["item"].tolist(), batch.action, batch.mask, strict=True)
        p = torch.tensor([float(best[i] == tuple(a[m].tolist())) for i, a, m in rows]).double() / c.world.prompts
    right, length = batch.row["right"], batch.row["length"]
    node, action = (x.gather(1, batch.mask.sum(1, keepdim=True) - 1).squeeze(1) for x in (batch.obs, batch.action))
    for k, table in c.world.scores.items():
        assert found[k] == pytest.approx(float((p * table[batch.keys["item"], node, action]).sum()), abs=1e-9)
    assert found["score"] == found[next(iter(c.world.scores))]
    assert found["reward"] == pytest.approx(float((p * batch.outcome()).sum()), abs=1e-9)
    assert found["accuracy"] == pytest.approx(float((p * right).sum()), abs=1e-9)
    assert found["length"] == pytest.approx(float((p * length).sum()), abs=1e-9)
    assert found["truncated"] == pytest.approx(float((p * batch.row["truncated"]).sum()), abs=1e-9)
    assert found["kl_ref"] == pytest.approx(divergence, abs=1e-9)
    assert found["entropy"] == pytest.approx(entropy, abs=1e-9)
    if 0 < found["accuracy"] < 1:
        assert found["length_right"] == pytest.approx(float((p * right * length).sum() / (p * right).sum()), abs=1e-9)
        assert found["length_wrong"] == pytest.approx(float((p * (1 - right) * length).sum() / (p * (1 - right)).sum()), abs=1e-9)


def test_evaluation_disturbs_nothing() -> None:
    one, two = collector(), collector()
    two.evaluate(10)
    first, second = (ask(c, Request(item=0, count=20)) for c in (one, two))
    assert torch.equal(first.action, second.action)


# -------------------------------------------------------------------- keeping
def test_state_continues_the_same_numbers() -> None:
    c = collector("table:arms", {"noise": 0.1})
    c.draw(5)
    ask(c, Request(item=0, count=10))
    state = c.state()
    wanted = c.draw(9), ask(c, Request(item=1, count=10)), c.report(), c.costs()
    again = collector("table:arms", {"noise": 0.1}, seed=0)
    again.load(state)
    found = again.draw(9), ask(again, Request(item=1, count=10)), again.report(), again.costs()
    assert found[0] == wanted[0]
    assert torch.equal(found[1].action, wanted[1].action)
    assert torch.equal(found[1].outcome(), wanted[1].outcome())
    assert found[2:] == wanted[2:]
    with pytest.raises(CallError, match="8 prompts"):
        collector("table:arms", {"prompts": 4}).load(state)


def test_size_of_an_iteration() -> None:
    resolved = resolve("grpo", "table:tree")
    assert iteration_size(resolved.method, resolved.settings) == (64, None)


# -------------------------------------------------------------------- runs
@pytest.mark.parametrize("name", [n for n, m in all_methods().items() if m.requires() <= TABLE_OFFERS])
def test_every_method_that_fits_learns(name: str) -> None:
    resolved = resolve(name, "table:arms", {"budget": "60-updates", "evaluate.every": 0})
    run = Improve(resolved.method, resolved.task, resolved.settings)
    summary = run.run()
    assert summary["eval_score_initial"] == pytest.approx(0.2256, abs=1e-3)
    assert summary["eval_score"] > 0.5
    assert summary["completions"] >= 60 * 64


@pytest.mark.parametrize("name", ["trpo", "ppo-lm", "dapo"])
def test_a_resumed_run_is_the_same_bit_for_bit(name: str, tmp_path: Path) -> None:
    given: dict[str, Any] = {"collect.prompts": 8, "options.noise": 0.1}
    whole = api.train(name, "table:tree", budget="6-updates", out=tmp_path / "whole", overrides=given)
    api.train(name, "table:tree", budget="3-updates", out=tmp_path / "half", overrides=given)
    half = api.resume(tmp_path / "half", budget="6-updates")
    wanted, found = whole.policy.state(), half.policy.state()
    assert all(torch.equal(found[k], v) for k, v in wanted.items())
    lines = [[json.loads(x) for x in (tmp_path / k / "metrics.jsonl").read_text().splitlines()] for k in ("whole", "half")]
    assert [x["reward"] for x in lines[0]] == [x["reward"] for x in lines[1]]
    assert api.load(tmp_path / "half", "last").predict(0) == whole.predict(0)
    assert (tmp_path / "half" / "policy" / "policy.safetensors").exists()


def test_the_seed_changes_draws_but_not_the_start() -> None:
    runs = [Improve(r.method, r.task, r.settings) for s in (0, 1) for r in [resolve("grpo", "table:tree", {"seed": s})]]
    tables = [run.policy.state()["policy.own"] for run in runs]
    assert torch.equal(*tables)
    for run in runs:
        run.step()
    tables = [run.policy.state()["policy.own"] for run in runs]
    assert not torch.equal(*tables)


def test_a_shared_table_helps_prompts_that_were_never_asked() -> None:
    """All prompts of one family: practising one of them raises the chance of the others exactly where tables are shared."""
    gains = []
    for share in (0.0, 1.0):
        task = TableTask("table:arms", {"families": 1, "share": share, "hardest": 0.2, "easiest": 0.3})
        policy = TablePolicy(task.world)
        before = exact.expected(policy, task.world.right.double()).detach()
        with torch.enable_grad():
            exact.expected(policy, task.world.right.double())[0].backward()  # type: ignore[no-untyped-call]
        with torch.no_grad():
            for p in policy.net.parameters():
                p += p.grad  # type: ignore[operator]
        gains.append(exact.expected(policy, task.world.right.double()).detach() - before)
    assert float(gains[0][0]) > 0
    assert gains[0][1:].abs().max() == 0
    assert float(gains[1][1:].min()) > 0


def test_trust_region_is_kept_where_old_log_probabilities_could_wait() -> None:
    """The line search evaluates the loss beyond its start, so that `logp@old` must be that of the start."""
    resolved = resolve("trpo", "table:arms", {"updates.policy.rule.delta": 0.01})
    run = Improve(resolved.method, resolved.task, resolved.settings)
    metrics = run.step()
    assert metrics["accepted_step"] > 0
    assert 0 < metrics["kl"] <= 0.01
    assert metrics["improvement"] > 0


def test_methods_without_episodes_run_dense_worlds() -> None:
    method = get_method("a2c")
    resolved = resolve(replace(method, name="mine"), "table:tree", {"options.dense": 1.0, "budget": "100-updates"})
    run = Improve(resolved.method, resolved.task, resolved.settings)
    assert run.run()["eval_score"] > 0.5
