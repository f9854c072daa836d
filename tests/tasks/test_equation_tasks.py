"""Worlds by equation: worked numbers, known optima, Gymnasium's rules, seeds, saved states, refusals."""

from __future__ import annotations

import math
from typing import Any

import gymnasium
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env

import polopt
from polopt.collect import env_state
from polopt.errors import CallError
from polopt.tasks import make
from polopt.tasks.bandit import Bandit, BanditOptions, BanditTask
from polopt.tasks.envs import EquationEnv, EquationVectorEnv
from polopt.tasks.equations import EquationTask
from polopt.tasks.point import Point, PointOptions, PointTask

RNG = np.random.default_rng(0)
ALL = [f"{t.prefix}:{v}" for t in (PointTask, BanditTask) for v in t.variants]


def task(name: str, **options: Any) -> EquationTask:
    made = make(name, options)
    assert isinstance(made, EquationTask)
    return made


# -------------------------------------------------------------------- bandit
def test_wave_is_the_published_function_and_its_best_action_is_a_stationary_point() -> None:
    world = Bandit(BanditOptions())
    a = np.array([[-0.5], [0.0], [0.25], [1.0]])
    expected = [0.6 * math.sin(6 * x) * math.exp(-x * x) + 0.4 * x for x in a[:, 0]]
    np.testing.assert_allclose(world.value(a), expected, atol=1e-15)
    best, value = world.best
    h = 1e-4
    slope = (world.value(best[None] + h) - world.value(best[None] - h)) / (2 * h)
    assert abs(slope[0]) < 1e-4
    assert value == pytest.approx(0.6 * math.sin(6 * best[0]) * math.exp(-(best[0] ** 2)) + 0.4 * best[0], abs=1e-12)
    assert value > world.value(RNG.uniform(-1, 1, (1000, 1))).max() - 1e-6
    peaks = np.diff(np.sign(np.diff(world.value(np.linspace(-1, 1, 2001)[:, None])))) < 0
    assert peaks.sum() >= 2


def test_bumps_pay_most_in_their_centres_and_little_between() -> None:
    world = Bandit(BanditOptions(form="bumps", size=1, modes=2, radius=0.7, width=0.1, tilt=0.25))
    np.testing.assert_allclose(world.centres[:, 0], [0.7, -0.7])
    np.testing.assert_allclose(world.value(np.array([[0.7], [-0.7], [0.8], [0.0]])), [1, 0.75, math.exp(-1), math.exp(-49)])
    ring = Bandit(BanditOptions(form="bumps", size=2, modes=8))
    np.testing.assert_allclose(np.linalg.norm(ring.centres, axis=1), 0.7)
    np.testing.assert_allclose(ring.value(ring.centres), 1)
    assert ring.value(np.zeros((1, 2)))[0] < 1e-8


def test_of_hidden_modes_one_pays_and_ends_the_episode() -> None:
    world = Bandit(BanditOptions(form="bumps", modes=4, width=0.25, hidden=True, horizon=12))
    rng = np.random.default_rng(0)
    state = world.start(4000, rng)
    np.testing.assert_array_equal(world.observe(state), np.ones((4000, 1)))
    _, reward, over = world.step(state, np.repeat(world.centres[1:2], 4000, 0), rng)
    np.testing.assert_array_equal(over, reward == 1)
    assert reward.mean() == pytest.approx(1 / 4, abs=0.03)
    edge = 0.25 * math.sqrt(math.log(2))
    state[:, 1] = 0
    beside = np.array([[0.7 + f * edge, 0.0] for f in (0.99, 1.01)])
    assert world.step(state[:2], beside, rng)[1].tolist() == [1, 0]
    hits = np.zeros(4000, dtype=bool)
    for _ in range(12):  # all modes equally often
        hits |= world.step(state, world.centres[rng.integers(0, 4, 4000)], rng)[2]
    assert hits.mean() == pytest.approx(1 - 0.75**12, abs=0.02)


def test_quadratic_and_arms_have_their_known_best() -> None:
    world = Bandit(BanditOptions(form="quadratic", size=3, radius=0.6))
    np.testing.assert_allclose(world.value(world.best[0][None]), 1)
    assert np.linalg.norm(world.best[0]) == pytest.approx(0.6)
    arms = Bandit(BanditOptions(form="arms", arms=5, gap=2.0))
    np.testing.assert_allclose(arms.value(np.arange(5)), [0, 0.5, 1, 1.5, 2])
    assert arms.best == (4, 2.0)


def test_noise_has_the_given_deviation_around_the_mean() -> None:
    world = Bandit(BanditOptions(noise=1.0))
    a = np.full((20_000, 1), 0.3)
    _, reward, ended = world.step(np.ones((20_000, 1)), a, np.random.default_rng(1))
    assert reward.mean() == pytest.approx(world.value(a)[0], abs=0.03)
    assert reward.std() == pytest.approx(1.0, abs=0.02)
    assert ended.all()


def test_more_than_one_decision_makes_an_endless_world_that_is_cut() -> None:
    env = task("bandit:wave", horizon=3).make()
    env.reset(seed=0)
    ends = [env.step(np.zeros(1, np.float32))[2:4] for _ in range(3)]
    assert ends == [(False, False), (False, False), (False, True)]


# -------------------------------------------------------------------- point
def walk(world: Point, actions: list[tuple[float, float]], start: Any = None) -> list[tuple[list[float], float, bool]]:
    state = world.start(1, RNG) if start is None else start
    out = []
    for a in actions:
        state, reward, over = world.step(state, np.array([a]), RNG)
        out.append((state[0, :2].round(9).tolist(), float(reward[0]), bool(over[0])))
    return out


def test_two_goals_are_symmetric_and_five_steps_away() -> None:
    world = Point(PointOptions(goals=2, cost=0.02))
    right, left = walk(world, [(1, 0)] * 5), walk(world, [(-1, 0)] * 5)
    assert [r for _, r, _ in right] == pytest.approx([-0.02] * 4 + [0.98])
    assert [over for *_, over in right] == [False] * 4 + [True]
    assert [(-p[0], p[1], r, o) for p, r, o in left] == [(p[0], p[1], r, o) for p, r, o in right]


def test_velocity_lasts_by_the_drag_and_is_seen() -> None:
    world = Point(PointOptions(drag=0.25, speed=0.4))
    state = world.start(1, RNG)
    v = p = 0.0
    for a in (1.0, 0.5, -3.0):
        state, _, _ = world.step(state, np.array([[a, 0.0]]), RNG)
        v = 0.75 * v + 0.25 * 0.4 * max(-1.0, min(1.0, a))
        p += v
    np.testing.assert_allclose(world.observe(state)[0], [p, 0, v, 0])


def test_dense_reward_is_minus_the_distance_to_the_nearest_goal_that_pays() -> None:
    world = Point(PointOptions(goals=4, reward="dense", cost=0.1))
    ((place, reward, _),) = walk(world, [(0.0, 1.0)])
    assert place == [0, 0.2]
    assert reward == pytest.approx(-0.8 - 0.1)
    shown = Point(PointOptions(goals=4, reward="dense", pays="shown"))
    start = shown.start(1, RNG)
    start[0, -1] = 2  # the goal at (-1, 0)
    np.testing.assert_allclose(shown.observe(start)[0], [0, 0, 0, 0, 1, 0], atol=1e-12)
    assert walk(shown, [(1.0, 0.0)], start)[0][1] == pytest.approx(-1.2)


def test_a_wrong_hidden_goal_sends_back_to_the_start_and_the_right_one_pays() -> None:
    world = Point(PointOptions(goals=2, pays="hidden"))
    start = world.start(1, RNG)
    start[0, -1] = 1
    wrong = walk(world, [(1, 0)] * 5, start)
    assert wrong[-1] == ([0, 0], 0.0, False)
    assert walk(world, [(-1, 0)] * 5, start)[-1] == ([-1, 0], 1.0, True)
    np.testing.assert_allclose(world.observe(start), [[0, 0]])


@pytest.mark.parametrize(("y", "passes"), [(0.0, False), (0.69, False), (0.71, True), (-0.71, True)])
def test_a_block_stops_a_straight_walk_and_leaves_a_route_on_either_side(y: float, passes: bool) -> None:
    world = Point(PointOptions(walls="block", speed=0.5))
    start = world.start(1, RNG)
    start[0, :2] = -0.4, y
    place = walk(world, [(1, 0)], start)[0][0]
    assert place == ([0.1, y] if passes else [-0.4, y])


def test_walls_are_not_jumped_over_and_the_square_is_not_left() -> None:
    world = Point(PointOptions(walls="bends", speed=2.0))
    assert walk(world, [(-1, 0), (1, 0), (0, 1)])[-1][0] == [0, 0]


def test_a_team_ends_when_all_have_arrived_and_those_that_have_stay() -> None:
    world = Point(PointOptions(robots=2, goals=2))
    state = world.start(1, RNG)
    state[0, 0] = 0.8  # the first robot is one step from a goal
    both = np.array([[1.0, 0.0, -1.0, 0.0]])
    state, reward, over = world.step(state, both, RNG)
    assert (float(reward[0]), bool(over[0])) == (0.5, False)
    for _ in range(4):
        state, reward, over = world.step(state, both, RNG)
    assert (float(reward[0]), bool(over[0])) == (0.5, True)
    np.testing.assert_allclose(world.observe(state)[0], [1, 0, 1, -1, 0, 1], atol=1e-12)


# -------------------------------------------------------------------- environments
@pytest.mark.filterwarnings("ignore:.*Box observation space")
@pytest.mark.parametrize("name", ALL)
def test_environments_obey_gymnasium_and_seeds_reproduce(name: str) -> None:
    env = task(name).make()
    check_env(env, skip_render_check=True)
    observation, action = task(name).spaces()
    assert env.observation_space.shape == (observation.size,)
    assert env.action_space.shape == action.shape

    def trace() -> list[Any]:
        found = [env.reset(seed=7)[0].tolist()]
        env.action_space.seed(3)
        return found + [[*r[0].tolist(), *r[1:4]] for r in (env.step(env.action_space.sample()) for _ in range(5))]

    assert trace() == trace()


@pytest.mark.parametrize("name", ["point:hidden", "point:team", "bandit:wave", "bandit:arms"])
def test_vector_form_steps_rows_as_single_environments_do(name: str) -> None:
    made = task(name, horizon=4)
    venv = made.make_vector(3, "native")
    obs, _ = venv.reset(seed=0)
    envs: list[Any] = [made.make() for _ in range(3)]
    for i, env in enumerate(envs):
        env.reset(seed=0)
        env.state = venv.state[i : i + 1].copy()  # type: ignore[attr-defined]
    rng = np.random.default_rng(1)
    noisy = name.startswith("bandit")
    for _ in range(4):
        action = rng.integers(0, 10, 3) if name.endswith("arms") else rng.uniform(-1, 1, (3, made.world.action.size))
        obs, reward, over, cut, info = venv.step(action)
        singles = [env.step(a) for env, a in zip(envs, action, strict=True)]
        assert over.tolist() == [s[2] for s in singles]
        assert cut.tolist() == [s[3] for s in singles]
        if not noisy:
            np.testing.assert_allclose(reward, [s[1] for s in singles])
        last = info.get("final_obs", obs)
        np.testing.assert_array_equal(last, np.stack([s[0] for s in singles]))
        if over.any() or cut.any():
            break


@pytest.mark.parametrize("name", ["point:bends", "bandit:wave"])
def test_saved_states_continue_bit_for_bit(name: str) -> None:
    def go(env: Any, k: int, save: Any, load: Any, batch: bool) -> None:
        env.reset(seed=5)
        env.action_space.seed(1)
        actions = [env.action_space.sample() for _ in range(2 * k)]
        for a in actions[:k]:
            env.step(a)
            if not batch and name.startswith("bandit"):
                env.reset()
        kept = save(env)
        first = [env.step(a)[:4] for a in actions[k:]]
        env.reset(seed=99)
        load(env, kept)
        for x, a in zip(first, actions[k:], strict=True):
            for u, v in zip(x, env.step(a)[:4], strict=True):
                np.testing.assert_array_equal(u, v)

    go(task(name, horizon=3).make(), 4, env_state.save, env_state.load, False)
    go(task(name, horizon=3).make_vector(3, "native"), 4, env_state.save_vector, env_state.load_vector, True)


def test_other_libraries_can_make_them() -> None:
    env = gymnasium.make("polopt.tasks.envs:polopt/Point-v0", variant="ring", goals=5)
    assert env.observation_space.shape == (7,)
    assert isinstance(env.unwrapped, EquationEnv)
    venv = gymnasium.make_vec("polopt/Bandit-v0", num_envs=4, vectorization_mode="vector_entry_point", variant="two")
    assert isinstance(venv, EquationVectorEnv)
    assert venv.reset(seed=0)[0].shape == (4, 1)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("point:tow", {}, "unknown variant of point: 'tow', did you mean 'two'"),
        ("bandit:", {}, "unknown task"),
        ("point:two", {"goal": 3}, "unknown option of point:two 'goal', did you mean 'goals'"),
        ("point:two", {"goals": 2.5}, "goals = 2.5 of point:two must be int"),
        ("point:two", {"pays": "none"}, "unknown value of options.pays 'none'"),
        ("point:two", {"drag": 0.0}, "drag = 0.0 must be > 0"),
        ("bandit:two", {"noise": -1.0}, "noise = -1.0 must be >= 0"),
    ],
)
def test_wrong_variants_and_options_are_refused(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(CallError, match=message):
        make(name, options)


def test_options_are_shown_with_the_values_of_the_variant() -> None:
    assert task("point:two").option_fields()["goals"][0] == 2
    assert task("bandit:ring").option_fields()["form"][0] == "bumps"


@pytest.mark.parametrize(("name", "method"), [("point:two", "ppo"), ("bandit:arms", "a2c"), ("bandit:two", "reinforce")])
def test_runs_of_one_seed_are_equal_and_presets_fit(name: str, method: str) -> None:
    over = {"collect__envs": 4, "collect__steps": 8, "evaluate__episodes": 4}
    runs = [polopt.train(method, name, budget="3-updates", out=False, **over) for _ in range(2)]
    assert runs[0].summary["eval_score"] == runs[1].summary["eval_score"]
    assert runs[0].summary["exact_resume"]
