"""GHPO: staged hints on a language model and on fakes, what they replace, and whose log-probabilities are stored."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from polopt.batch import HINTED, OWN, Batch, Clock
from polopt.errors import CallError
from polopt.interfaces import Plan, Request, Seen
from polopt.loops.improve import Improve
from polopt.overrides import resolve
from polopt.parts.sampler.hints import Hints
from polopt.registry import get_method
from polopt.stats import OLD, View
from polopt.tasks import make

torch.set_num_threads(1)
HARD = {"options.min_word_len": 7, "options.reward": "exact", "options.eval_items": 8, "evaluate.episodes": 2}


def build(method: Any = "ghpo", **settings: Any) -> Improve:
    given = {"collect.prompts": 6, "sampler.group_size": 4, "collect.max_new_tokens": 12, "budget": "5-updates", **HARD, **settings}
    r = resolve(method, "text:spell_backward", given)
    return Improve(r.method, r.task, r.settings)


def texts(run: Improve, ids: Tensor, known: Tensor) -> list[str]:
    return [run.policy.tokenizer.decode(i[m]) for i, m in zip(ids, known, strict=True)]


# -------------------------------------------------------------------- without failures, or without hints, it is GRPO
@pytest.mark.identity("ghpo", "without a group that fails altogether it is GRPO, bit for bit")
def test_without_failed_groups_it_is_grpo() -> None:
    ghpo = get_method("ghpo").but("mine", sampler=Hints(threshold=-1.0))  # every answer succeeds
    runs = [build(ghpo), build(get_method("grpo").but("plain", penalty=()))]
    for run in runs:
        for _ in range(2):
            run.step()
    assert torch.equal(runs[0].flat.data, runs[1].flat.data)
    assert float((runs[0].flat.data - build().flat.data).abs().max()) > 0


@pytest.mark.identity("ghpo", "with omega = 0 it is GRPO, bit for bit")
@pytest.mark.parametrize("stages", [(), (0.0,), (0.0, 0.0)])
def test_hints_that_reveal_nothing_are_grpo(stages: tuple[float, ...]) -> None:
    runs = [build(get_method("ghpo").but("mine", sampler=Hints(stages=stages))), build(get_method("grpo").but("plain", penalty=()))]
    for run in runs:
        run.step()
    assert torch.equal(runs[0].flat.data, runs[1].flat.data)


def test_before_its_start_it_is_grpo() -> None:
    runs = [build(**{"sampler.start": 1}), build(get_method("grpo").but("plain", penalty=()))]
    for run in runs:
        run.step()
    assert torch.equal(runs[0].flat.data, runs[1].flat.data)
    metrics = [r.step() for r in runs]
    assert "hinted" in metrics[0]
    assert not torch.equal(runs[0].flat.data, runs[1].flat.data)


# -------------------------------------------------------------------- on a language model
@pytest.fixture(scope="module")
def hinted() -> tuple[Improve, Batch]:
    run = build()
    (batch,) = run.collect(Clock()).values()
    return run, batch


def test_hinted_rows_are_told_apart(hinted: tuple[Improve, Batch]) -> None:
    run, batch = hinted
    shown = batch.row["hint"]
    assert 0 < int((shown > 0).sum()) < batch.shape[0]  # some groups fail, some do not
    assert set(shown.tolist()) <= {0.0, 0.25, 0.5, 0.75}
    prompts = texts(run, batch.context["prompt"], batch.context["prompt_mask"])
    for i, (text, share) in enumerate(zip(prompts, shown.tolist(), strict=True)):
        seen = run.collector.look(int(batch.keys["item"][i]))
        assert seen.solution is not None
        plain = text.removesuffix("<go>").replace(" ", "")
        assert plain.startswith(str(seen.prompt).replace(" ", ""))  # the question is kept
        assert plain.endswith(seen.solution[: round(share * len(seen.solution))])
        own = batch.source[i][batch.mask[i]]
        assert bool((own == (HINTED if share else OWN)).all())
    # groups are whole, and hinted as a whole
    assert torch.equal(batch.pool(shown, "group", "max"), batch.pool(shown, "group", "min"))
    assert torch.bincount(batch.group).tolist() == [4] * 6


@pytest.mark.identity("ghpo", "hint tokens carry no loss: the mask covers completions alone")
def test_the_mask_covers_completions_alone(hinted: tuple[Improve, Batch]) -> None:
    run, batch = hinted
    assert torch.equal(batch.mask.sum(1).float(), batch.row["length"])
    long = batch.context["prompt_mask"].sum(1)
    assert bool((long[batch.row["hint"] > 0] > long[batch.row["hint"] == 0].max()).all())  # hints lie in the prompt
    # what the model gives the hint's tokens moves no loss: gradients meet them only through what follows
    now = run.policy.evaluate(batch, frozenset({"logp"}))["logp"]
    assert bool((now[~batch.mask] == 0).all())


@pytest.mark.identity("ghpo", "stored prompt, completion and log-probabilities belong together: those under q* are the sampler's")
def test_log_probabilities_belong_to_the_hinted_prompt(hinted: tuple[Improve, Batch]) -> None:
    run, batch = hinted
    again = run.policy.evaluate(batch, frozenset({"logp"}), OLD)["logp"]
    torch.testing.assert_close(again, batch.stats["logp@behaviour"], atol=2e-5, rtol=0)
    # and not to the plain one
    plain = [run.policy.encode(run.collector.look(int(i)).prompt, 12) for i in batch.keys["item"]]
    from polopt.policies.lm.prompts import pad_left

    ids, known = pad_left(plain, run.policy.backbone.pad)
    other = run.policy.evaluate(replace(batch, context={"prompt": ids, "prompt_mask": known}), frozenset({"logp"}), OLD)["logp"]
    gap = (other - batch.stats["logp@behaviour"]).abs().amax(1)
    assert bool((gap[batch.row["hint"] > 0] > 1e-3).all())
    assert bool((gap[batch.row["hint"] == 0] < 2e-5).all())


def test_hinted_and_plain_rows_in_one_batch_are_padded_right(hinted: tuple[Improve, Batch]) -> None:
    run, batch = hinted
    whole = run.policy.evaluate(batch, frozenset({"logp", "entropy"}), OLD)
    for i in (0, int(batch.row["hint"].argmax()), batch.shape[0] - 1):
        alone = run.policy.evaluate(batch.rows(torch.tensor([i])), frozenset({"logp", "entropy"}), OLD)
        for name, x in alone.items():
            torch.testing.assert_close(x[0], whole[name][i], atol=1e-5, rtol=0)


def test_the_first_iterations_may_show_every_prompt_a_hint() -> None:
    run = build(**{"sampler.fixed": 1, "sampler.fixed_share": 0.5})
    (batch,) = run.collect(Clock(0)).values()
    assert batch.row["hint"].tolist() == [0.5] * 24
    (later,) = run.collect(Clock(1)).values()
    assert float(later.row["hint"].min()) == 0.0


def test_metrics_tell_the_share_of_hinted_answers() -> None:
    metrics = build().step()
    assert 0 < metrics["hinted"] < 1
    assert "hinted" not in build(get_method("grpo")).step()


# -------------------------------------------------------------------- on fakes
def answers(requests: Sequence[Request], right: dict[int, str | None], channels: int = 1) -> Batch:
    """Item i is solved as soon as its prompt is (at least) the text right[i]; None: never. Further channels are always paid."""
    n = sum(r.count for r in requests)
    reward = torch.ones(n, 1, channels)
    spread = [r for r in requests for _ in range(r.count)]
    for k, r in enumerate(spread):
        goal = right[r.item]  # type: ignore[index]
        reward[k, 0, 0] = float(goal is not None and len(r.context or "") >= len(goal))
    group = torch.tensor([g for g, r in enumerate(requests) for _ in range(r.count)])
    batch = Batch.of(reward=reward, mask=torch.ones(n, 1), group=group)
    return replace(batch, keys={"item": torch.tensor([r.item for r in spread])})


def drive(
    part: Hints, right: dict[int, str | None], solutions: Any = "abcd", fits: Any = None, **more: Any
) -> tuple[Batch, list[Any]]:
    look = lambda i: Seen("", solutions[i] if isinstance(solutions, dict) else solutions, fits or (lambda p: True))  # noqa: E731
    plan = Plan(len(right), lambda n: list(right)[:n], size=len(right), look=look)
    sampling, asked = part(plan), []
    requests = next(sampling)
    while True:
        asked.append([(r.item, r.count, r.context) for r in requests])
        try:
            requests = sampling.send(answers(requests, right, **more))
        except StopIteration as stop:
            return stop.value["policy"], asked


PART = Hints(group_size=2, connector="")


def test_stages_worked_out() -> None:
    """Item 0 needs nothing, 1 a quarter, 2 three quarters, 3 is hopeless and keeps its last attempt."""
    batch, asked = drive(PART, {0: "", 1: "a", 2: "abc", 3: None})
    assert asked == [
        [(0, 2, None), (1, 2, None), (2, 2, None), (3, 2, None)],
        [(1, 2, "a"), (2, 2, "a"), (3, 2, "a")],
        [(2, 2, "ab"), (3, 2, "ab")],
        [(2, 2, "abc"), (3, 2, "abc")],
    ]
    assert batch.keys["item"].tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    assert batch.row["hint"].tolist() == [0, 0, 0.25, 0.25, 0.75, 0.75, 0.75, 0.75]
    assert batch.group.tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    assert batch.outcome().tolist() == [1, 1, 1, 1, 1, 1, 0, 0]


@pytest.mark.identity("ghpo", "at most 4 G answers are sampled for a prompt")
def test_at_most_four_groups_for_a_prompt() -> None:
    for size in (1, 2, 8):
        _, asked = drive(PART.but(group_size=size), {0: None, 1: None, 2: ""})
        counts = dict.fromkeys((0, 1, 2), 0)
        for requests in asked:
            for item, n, _ in requests:
                counts[item] += n
        assert counts == {0: 4 * size, 1: 4 * size, 2: size}


def test_groups_that_still_fail_teach_nothing() -> None:
    batch, _ = drive(PART, {0: None, 1: None})
    assert bool((get_method("ghpo").advantages(batch) == 0).all())


def test_only_accuracy_counts_as_success() -> None:
    _, asked = drive(PART, {0: None}, channels=2)  # the second channel, format, is always paid
    assert len(asked) == 4
    _, asked = drive(PART.but(channel=None), {0: None}, channels=2)
    assert len(asked) == 1


def test_items_without_a_solution_are_not_asked_again() -> None:
    batch, asked = drive(PART, {0: None, 1: None}, solutions={0: None, 1: "abcd"})
    assert [i for requests in asked[1:] for i, _, _ in requests] == [1, 1, 1]
    assert batch.row["hint"].tolist() == [0, 0, 0.75, 0.75]


def test_short_solutions_wait_for_a_stage_that_reveals_something() -> None:
    _, asked = drive(PART, {0: None}, solutions="x")
    assert [c for requests in asked for _, _, c in requests] == [None, "x"]  # round(1/4), round(1/2) are 0, round(3/4) is 1


def test_a_hint_that_does_not_fit_is_cut_and_the_question_is_kept() -> None:
    look = Seen("Q", "abcdefgh", lambda prompt: len(prompt) <= 4)
    with pytest.warns(UserWarning, match="a hint of 6 characters is cut to 3"):
        assert PART._fitting(look, "abcdef") == "Qabc"
    with pytest.warns(UserWarning, match="cut to 0"):
        assert PART._fitting(replace(look, fits=lambda prompt: len(prompt) <= 1), "abcdef") is None
    chat = Seen([{"role": "system", "content": "S"}, {"role": "user", "content": "Q"}], "ab", lambda prompt: True)
    assert PART.but(connector=":")._fitting(chat, "ab") == [{"role": "system", "content": "S"}, {"role": "user", "content": "Q:ab"}]


def test_an_empty_kept_rest() -> None:
    batch, _ = drive(PART, {5: "ab"})
    assert batch.row["hint"].tolist() == [0.5, 0.5]
    assert batch.units["group"] == 1


def test_stages_out_of_range_are_refused() -> None:
    with pytest.raises(CallError, match=r"sampler\.stages = \(0\.5, 2\): shares of the solution must be between 0 and 1"):
        Hints(stages=(0.5, 2))


# -------------------------------------------------------------------- tasks
@pytest.mark.parametrize("task", ["table:bank", "gym:CartPole-v1"])
def test_tasks_without_solutions_are_refused(task: str) -> None:
    with pytest.raises(CallError, match=rf"ghpo cannot run on {task}: its sampler 'hints' needs .*reference solutions"):
        get_method("ghpo").refuse_unless(make(task).offers, task)


def test_data_without_a_solution_column_are_refused(tmp_path: Any) -> None:
    path = tmp_path / "questions.jsonl"
    path.write_text("".join(f'{{"prompt": "what is {i}?", "key": "{i}"}}\n' for i in range(8)))
    with pytest.raises(CallError, match=r"ghpo needs reference solutions.*columns: .*key.*options\.answer_column"):
        _data(path, "length:4")
    run = _data(path, "length:4", **{"options.answer_column": "key"})
    assert run.collector.look(0).solution == run.collector.train[0].columns["key"]


def _data(path: Any, reward: str, **more: Any) -> Improve:
    r = resolve("ghpo", f"data:{path}", {"options.reward": reward, "collect.prompts": 2, **more})
    return Improve(r.method, r.task, r.settings)


# -------------------------------------------------------------------- two contexts
def test_rows_may_be_scored_under_another_prompt_than_they_were_sampled_under() -> None:
    """The sampler's numbers belong to the sampled one; `View(context="sampled")` finds them again, also where both agree."""
    run = build()
    ask = [
        Request(item=1, count=3, context="Spell this word backward (example: sun -> nus): catdo", scored="cat"),
        Request(item=2, count=2),
    ]
    both = run.collector.answer(ask, clock=Clock())
    plain = run.collector.answer([Request(item=3, count=2)], clock=Clock())
    assert set(plain.context) == {"prompt", "prompt_mask"}
    batch = Batch.cat([both, plain])
    assert set(batch.context) == {"prompt", "prompt_mask", "sampled", "sampled_mask"}
    assert texts(run, batch.context["prompt"], batch.context["prompt_mask"])[0] == "cat<go>"
    sampled = run.policy.evaluate(batch, frozenset({"logp"}), View("old", "sampled"))["logp"]
    torch.testing.assert_close(sampled, batch.stats["logp@behaviour"], atol=2e-5, rtol=0)
    scored = run.policy.evaluate(batch, frozenset({"logp"}), OLD)["logp"]
    gap = (scored - sampled).abs().amax(1)
    assert bool((gap[:3] > 1e-3).all())
    assert bool((gap[3:] < 2e-5).all())
    assert batch.source[:, 0].tolist() == [HINTED] * 3 + [OWN] * 4
    other = Batch.cat([plain, both])  # the first batch may be the one that lacks the entry
    assert torch.equal(other.context["sampled_mask"][2:], batch.context["sampled_mask"][:5])
    assert not bool(other.context["sampled_mask"][:2].any())


def test_tables_refuse_contexts() -> None:
    r = resolve("grpo", "table:bank", {"collect.prompts": 2})
    run = Improve(r.method, r.task, r.settings)
    for request in (Request(item=0, context="x"), Request(item=0, scored="x")):
        with pytest.raises(CallError, match="table tasks answer requests of an item and a count"):
            run.collector.answer([request], clock=Clock())
