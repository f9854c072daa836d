"""Whole episodes from start seeds, groups of them, and held-out scores."""

from typing import Any

import numpy as np
import pytest
import torch
from collect.toy_envs import register

from polopt.batch import Batch, Clock
from polopt.collect.vector import TRAIN_SEEDS, VectorCollector
from polopt.errors import PoloptError
from polopt.interfaces import Request
from polopt.policies.mlp import build
from polopt.settings import CollectSettings, EvaluateSettings, PolicySettings, Settings
from polopt.tasks.gym import GymTask

register()


def make(env: str = "CartPole-v1", n: int = 8, greedy: bool = True, whole: bool = True, **options: Any) -> VectorCollector:
    task = GymTask(f"gym:{env}", options)
    settings = Settings(
        collect=CollectSettings(envs=n, steps=16), policy=PolicySettings(hidden=(8,)), evaluate=EvaluateSettings(greedy=greedy)
    )
    policy = build(task, settings, {"value"}, 0)
    return VectorCollector(task, policy, settings, whole, 0, also=frozenset({"value_next"}))


def ask(collector: VectorCollector, seeds: list[int], count: int = 1) -> Batch:
    return collector.answer([Request(s, count) for s in seeds], clock=Clock())


def test_rows_are_whole_episodes_from_their_seeds() -> None:
    import gymnasium as gym

    collector = make()
    batch = ask(collector, [5, 6, 7], 4)
    assert batch.group is not None
    assert batch.group.tolist() == [0] * 4 + [1] * 4 + [2] * 4
    assert batch.keys["item"].tolist() == batch.group.tolist()
    env = gym.make("CartPole-v1")
    for row in range(12):
        obs, _ = env.reset(seed=5 + row // 4)
        n = int(batch.lengths()[row])
        for t in range(n):  # playing the actions again gives the row again
            assert batch.obs[row, t].tolist() == obs.tolist()
            obs, _, terminated, _, _ = env.step(int(batch.action[row, t]))
            assert bool(batch.terminated[row, t]) == terminated  # type: ignore[index]
        assert terminated
        assert batch.mask[row, :n].all()
        assert not batch.mask[row, n:].any()
        assert not batch.reward[row, n:].any()  # type: ignore[index]
    assert len({tuple(a.tolist()) for a in batch.action[:4]}) > 1
    report = collector.report()
    assert report["episodes"] == 12
    assert report["episode_return"] == pytest.approx(float(batch.lengths().float().mean()))
    assert collector.costs()["decisions"] == int(batch.mask.sum())


def test_more_episodes_than_environments() -> None:
    few, many = ask(make(n=2), list(range(20))), ask(make(n=32), list(range(20)))
    assert few.shape[0] == many.shape[0] == 20
    assert torch.equal(few.obs[:, 0], many.obs[:, 0])
    assert few.lengths().min() > 7


def test_time_limits_truncate_and_keep_the_last_observation() -> None:
    collector = make("toy/Counter-v0", length=4)
    batch = ask(collector, [1, 2])
    assert batch.truncated.nonzero().tolist() == [[0, 3], [1, 3]]  # type: ignore[union-attr]
    assert batch.row["truncated"].tolist() == [1.0, 1.0]
    ended = ask(make("toy/Counter-v0", length=4, cut=False), [1, 2])
    assert ended.row["truncated"].tolist() == [0.0, 0.0]
    assert batch.final.at.tolist() == [[0, 3], [1, 3]]  # type: ignore[union-attr]
    assert batch.final.obs[:, 1].tolist() == [4, 4]  # type: ignore[union-attr]
    assert collector.policy.value is not None
    expected = collector.policy.value(batch.final.obs)  # type: ignore[union-attr]
    torch.testing.assert_close(batch.stats["value_next@old"][:, 3], expected.detach())


def test_drawn_seeds_are_fresh_and_not_held_out() -> None:
    collector = make()
    seeds = collector.draw(500) + collector.draw(500)
    assert len(set(seeds)) == 1000
    assert all(s is not None and 0 <= s < TRAIN_SEEDS for s in seeds)
    assert make().draw(1000) == seeds


@pytest.mark.parametrize("greedy", [True, False])
def test_scores_repeat_and_disturb_nothing(greedy: bool) -> None:
    quiet, scored = make(greedy=greedy, whole=False), make(greedy=greedy, whole=False)
    first = scored.evaluate(10)
    for _ in range(3):
        a, b = (c.answer([Request()] * 8, clock=Clock()) for c in (quiet, scored))
        assert torch.equal(a.obs, b.obs)
        assert torch.equal(a.action, b.action)
        assert scored.evaluate(10) == first
    assert first["episodes"] == 10
    assert first["score"] == first["length"] > 5
    assert scored.report() == quiet.report()
    assert scored.costs() == quiet.costs()


def test_score_is_the_mean_return_of_held_out_seeds() -> None:
    import gymnasium as gym

    collector = make("Pendulum-v1", n=3)
    env = gym.make("Pendulum-v1")
    returns = []
    for k in range(5):
        obs, _ = env.reset(seed=TRAIN_SEEDS + k)
        total, over = 0.0, False
        while not over:
            obs, reward, _, over, _ = env.step(collector.policy.predict(obs))
            total += float(reward)
        returns.append(total)
    found = collector.evaluate(5)
    assert found["score"] == pytest.approx(np.mean(returns), rel=1e-4)
    assert found["score_std"] == pytest.approx(np.std(returns), rel=1e-3)
    assert found["length"] == 200


@pytest.mark.parametrize(
    ("bad", "message"), [("raise", "start seed 9, step 1.*wheel"), ("reward", "start seed 9"), ("nan", "seed 9")]
)
def test_bad_episodes_name_their_seed(bad: str, message: str) -> None:
    collector = make("toy/Counter-v0", n=1, bad=bad)
    ask(collector, [8])  # nothing happens in a first episode
    with pytest.raises(PoloptError, match=message):
        ask(collector, [9])


def test_a_last_observation_that_is_not_finite_is_refused_where_it_counts() -> None:
    collector = make("toy/Counter-v0", n=1, length=2, bad="nan")  # its second episode ends with NaN
    ask(collector, [8])
    with pytest.raises(PoloptError, match="not finite at the end of the episode with start seed 9, in step 1"):
        ask(collector, [9])
    ended = make("toy/Counter-v0", n=1, length=2, bad="nan", cut=False)
    assert ask(ended, [8, 9]).shape == (2, 2)  # nothing is bootstrapped after a termination


def test_episodes_cut_by_a_time_limit_can_leave_the_loss() -> None:
    from polopt.collect.vector import build as build_collector
    from polopt.parts.select.truncated import DropTruncated
    from polopt.registry import get_method

    method = get_method("ppo").but("x", select=DropTruncated())
    task = GymTask("gym:toy/Counter-v0", {"length": 3})
    settings = Settings(collect=CollectSettings(envs=2, episodes=2), policy=PolicySettings(hidden=(8,)))
    collector = build_collector(task, build(task, settings, {"value"}, 0), settings, method, 0)
    assert collector.whole
    assert float(method.totals(ask(collector, [1, 2])).decisions) == 0
