"""Fragments: true last observations, ends, episode counts, both ways of resetting, seeds, bad environments."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from collect.toy_envs import register

from polopt.batch import Batch, Clock
from polopt.collect.vector import VectorCollector
from polopt.errors import CallError, PoloptError
from polopt.interfaces import Request
from polopt.policies.mlp import MLPPolicy, build
from polopt.settings import CollectSettings, PolicySettings, Settings
from polopt.stats import OLD
from polopt.tasks.gym import GymTask

register()
ALSO = frozenset({"value", "value_next"})


def make(
    env: str = "toy/Counter-v0", n: int = 2, steps: int = 5, how: str = "sync", seed: int = 0, policy: Any = None, **options: Any
) -> VectorCollector:
    task = GymTask(f"gym:{env}", options)
    collect = CollectSettings(envs=n, steps=steps, vectorize=how)  # type: ignore[arg-type]
    settings = Settings(collect=collect, policy=policy or PolicySettings(hidden=(8,)))
    return VectorCollector(task, build(task, settings, {"value"}, seed), settings, False, seed, also=ALSO)


def ask(collector: VectorCollector) -> Batch:
    return collector.answer([Request(i) for i in collector.draw(collector.want)], clock=Clock())


def value_of(policy: MLPPolicy, obs: list[float]) -> float:
    assert policy.value is not None
    return float(policy.value(torch.tensor([obs], dtype=torch.float32))[0].detach())


def test_truncation_bootstraps_from_the_true_last_observation() -> None:
    collector = make()
    batch = ask(collector)
    assert batch.obs[0].tolist() == [[0, 0], [0, 1], [0, 2], [1, 0], [1, 1]]
    assert batch.reward is not None
    assert batch.reward[0, :, 0].tolist() == [0, 1, 2, 10, 11]
    assert batch.truncated[0].tolist() == [False, False, True, False, False]  # type: ignore[index]
    assert not batch.terminated.any()  # type: ignore[union-attr]
    expected = [value_of(collector.policy, o) for o in ([0, 1], [0, 2], [0, 3], [1, 1], [1, 2])]
    torch.testing.assert_close(batch.stats["value_next@old"][0], torch.tensor(expected), atol=1e-6, rtol=1e-5)
    again = ask(collector)  # environments keep running
    assert again.obs[1].tolist() == [[1, 2], [2, 0], [2, 1], [2, 2], [3, 0]]


def test_termination_has_no_last_observation() -> None:
    batch = ask(make(cut=False))
    assert batch.terminated[0].tolist() == [False, False, True, False, False]  # type: ignore[index]
    assert batch.final.at.tolist() == [[0, 4], [1, 4]]  # type: ignore[union-attr]


@pytest.mark.parametrize("how", ["native", "async"])
@pytest.mark.parametrize("cut", [True, False])
def test_ways_of_resetting_agree(how: str, cut: bool) -> None:
    """The decisions of a row are the same; NEXT_STEP has masked steps between episodes."""
    plain = [ask(c) for c in [make(steps=6, cut=cut)] for _ in range(4)]
    other_collector = make(steps=6, how=how, cut=cut)
    other = [ask(other_collector) for _ in range(4)]
    other_collector.close()

    def decisions(batches: list[Batch], row: int) -> list[tuple[Any, ...]]:
        found = []
        for b in batches:
            assert b.reward is not None
            assert b.terminated is not None
            assert b.truncated is not None
            for t in b.mask[row].nonzero()[:, 0].tolist():
                after = 0.0 if b.terminated[row, t] else round(float(b.stats["value_next@old"][row, t]), 5)
                ends = bool(b.terminated[row, t]), bool(b.truncated[row, t])
                found.append((b.obs[row, t].tolist(), float(b.reward[row, t, 0]), *ends, after))
        return found

    for row in range(2):
        mine, theirs = decisions(plain, row), decisions(other, row)
        assert len(mine) == 24
        assert len(theirs) == (18 if how == "native" else 24)
        assert theirs == mine[: len(theirs)]
    if how == "native":
        assert [int(b.mask.sum()) for b in other] == [10, 8, 10, 8]
        assert other_collector.costs() == {"decisions": 36, "env_steps": 48}


def test_episode_returns_and_lengths_over_iterations() -> None:
    collector = make(length=4)
    ask(collector)  # 0 1 2 3 | 10
    assert collector.report() == {"episode_return": 6.0, "episode_length": 4.0, "episodes": 2.0}
    ask(collector)  # 11 12 13 | 20 21
    assert collector.report() == {"episode_return": 46.0, "episode_length": 4.0, "episodes": 2.0}
    assert collector.report() == {"episodes": 0.0}
    assert collector.costs() == {"decisions": 20, "env_steps": 20}
    assert collector.costs() == {"decisions": 0, "env_steps": 0}


def test_several_short_episodes_in_one_rollout() -> None:
    collector = make(length=2, steps=7, n=1)
    ask(collector)
    assert collector.report() == {"episode_return": (1 + 21 + 41) / 3, "episode_length": 2.0, "episodes": 3.0}


def test_behaviour_logp_is_that_of_the_actions_step_by_step() -> None:
    collector = make("Pendulum-v1", policy=PolicySettings(hidden=(8, 8), normalize_obs=True, log_std=-1.0))
    collector.policy.remember(ask(collector))
    batch = ask(collector)
    for t in range(5):
        one = Batch(mask=batch.mask[:, t : t + 1], obs=batch.obs[:, t : t + 1], action=batch.action[:, t : t + 1])
        step = collector.policy.evaluate(one, frozenset({"logp"}), OLD)["logp"]
        torch.testing.assert_close(batch.stats["logp@behaviour"][:, t : t + 1], step, atol=1e-5, rtol=1e-5)


def test_seeds_reproduce_and_differ() -> None:
    a, b, c = (ask(make("CartPole-v1", steps=20, seed=s)) for s in (3, 3, 4))
    assert torch.equal(a.obs, b.obs)
    assert torch.equal(a.action, b.action)
    assert not torch.equal(a.obs[:, 0], c.obs[:, 0])
    assert not torch.equal(a.obs[0, 0], a.obs[1, 0])


def test_processes_give_what_this_process_gives() -> None:
    a, b = make("CartPole-v1", steps=40), make("CartPole-v1", steps=40, how="async")
    x, y = ask(a), ask(b)
    b.close()
    assert torch.equal(x.obs, y.obs)
    assert torch.equal(x.stats["value_next@old"], y.stats["value_next@old"])


def test_raw_actions_are_stored_and_clipped_ones_act() -> None:
    collector = make("Pendulum-v1", policy=PolicySettings(hidden=(8,), log_std=3.0))
    seen: list[np.ndarray] = []
    envs = collector._start()
    step = envs.step
    envs.step = lambda a: seen.append(a) or step(a)  # type: ignore[method-assign,func-returns-value]
    batch = ask(collector)
    assert batch.action.abs().max() > 2
    np.testing.assert_allclose(np.stack(seen, 1), batch.action.clamp(-2, 2).numpy(), atol=1e-6)


def test_discrete_observations_are_one_hot_and_multidiscrete_actions_act() -> None:
    batch = ask(make("toy/Mixed-v0", steps=50))
    assert batch.obs.shape == (2, 50, 5)
    assert set(batch.obs.unique().tolist()) == {0.0, 1.0}
    assert torch.equal(batch.obs[..., :2].sum(-1), torch.ones(2, 50))
    assert torch.equal(batch.obs[..., 2:].sum(-1), torch.ones(2, 50))
    good = (batch.action == torch.tensor([2, 1])).all(-1)
    assert torch.equal(batch.reward[..., 0], good.float())  # type: ignore[index]
    assert good.any()


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ("nan", r"environment 0 of gym:toy/Counter-v0 returned the observation \[nan nan\] in step 4"),
        ("reward", r"environment 0 of gym:toy/Counter-v0 returned the reward inf in step 4"),
        ("raise", r"environment 0 of gym:toy/Counter-v0 raised RuntimeError: the wheel came off"),
    ],
)
def test_bad_environments_are_named(bad: str, message: str) -> None:
    with pytest.raises(PoloptError, match=message):
        ask(make(bad=bad))


def test_rewards_are_scaled_by_the_deviation_of_discounted_returns() -> None:
    plain, scaled = make(steps=7), make(steps=7, policy=PolicySettings(hidden=(8,), normalize_reward=True))
    carry, returns = np.zeros(2), []
    for _ in range(3):
        a, b = ask(plain), ask(scaled)
        assert a.reward is not None
        assert b.reward is not None
        for t in range(7):
            carry = carry * 0.99 + a.reward[:, t, 0].numpy()
            returns.append(carry)
            carry = np.where(a.truncated[:, t], 0, carry)  # type: ignore[index]
        expected = np.clip(a.reward.numpy() / np.std(returns), -10, 10)
        np.testing.assert_allclose(b.reward.numpy(), expected, rtol=1e-5)
    assert scaled.report() == plain.report()  # episodes count in the task's own rewards


def test_wrong_requests_and_forms_are_refused() -> None:
    collector = make()
    with pytest.raises(CallError, match=r"3 rows, but collect\.envs = 2"):
        collector.answer([Request(None, 3)], clock=Clock())
    with pytest.raises(CallError, match="no item"):
        collector.answer([Request(4, 2)], clock=Clock())
    with pytest.raises(CallError, match="no vector form"):
        ask(make("MountainCar-v0", how="native"))
    settings = replace(collector.settings, collect=CollectSettings(vectorize="async"))
    with pytest.raises(CallError, match="whole episodes"):
        VectorCollector(collector.task, collector.policy, settings, True, 0)
