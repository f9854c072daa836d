"""Minari in and out: round trips, what is refused and how it is told, built-in datasets, the bound dataset."""

from __future__ import annotations

import json
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from collect.replay_worlds import World, ring

from polopt.batch import Batch
from polopt.collect import minari_io
from polopt.collect.minari_io import cached, datasets_root, decode, from_minari, locate, to_minari
from polopt.collect.offline import Offline, open_dataset, transitions_of
from polopt.collect.replay import Replay
from polopt.collect.transitions import Transitions
from polopt.errors import CallError, PoloptError
from polopt.parts.replay import Dataset, Ring
from polopt.policies.mlp_spaces import Action, Observation
from polopt.tasks.gym import GymTask
from polopt.tasks.logs import DatasetTask

PLANE = Observation("box", (2,), "<f4")
PUSH = Action("box", (1,), "<f4", low=(-9.0,), high=(9.0,))


@pytest.fixture(autouse=True)
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "root"))
    return tmp_path / "root"


def logged(rows: int = 600, **changes: Any) -> Transitions:
    """Transitions of Pendulum, some columns replaced."""
    from polopt.collect.offline import from_logs
    from polopt.tasks.logs import PendulumLogs

    return replace(from_logs(PendulumLogs(rows=rows)), **changes)


def equal(a: Transitions, b: Transitions) -> None:
    for name in ("obs", "action", "reward", "terminated", "truncated", "next_obs", "start"):
        assert np.array_equal(getattr(a, name), getattr(b, name)), name
    assert (a.observation, a.action_space) == (b.observation, b.action_space)


# -------------------------------------------------------------------- round trips
@pytest.mark.parametrize("next_step", [False, True])
def test_ring_to_minari_to_ring(tmp_path: Path, next_step: bool) -> None:
    world = World(3, np.random.default_rng(0), next_step, p_end=0.2)
    replay = ring(world, size=90)
    for _ in range(9):
        replay.write(world.fragment(5))
    held = transitions_of(replay, PLANE, PUSH)
    assert len(held) == len(replay)
    back = from_minari(to_minari(held, tmp_path / "mine"))
    equal(back, held)
    again = Offline(Dataset(batch=8), back, gamma=0.9, generator=torch.Generator().manual_seed(0))
    kept = [k for h in world.kept for k in h[-30:]]
    columns = again.columns()
    assert [tuple(o) for o in columns["obs"].tolist()] == [k.obs for k in kept]
    assert columns["action"].flatten().tolist() == [k.action for k in kept]
    assert columns["terminated"].tolist() == [k.end == 1 for k in kept]
    assert [tuple(o) for o in columns["next_obs"].tolist()] == [k.next_obs for k in kept]
    # what goes on where the ring ends is cut there
    edges = {k[-1].obs for k in world.kept}
    assert columns["truncated"].tolist() == [k.end == 2 or (k.obs in edges and k.end == 0) for k in kept]


def test_windows_of_a_dataset_stop_at_its_episodes() -> None:
    world = World(2, np.random.default_rng(2), p_end=0.3)
    replay = ring(world, size=80)
    replay.write(world.fragment(30))
    for h in world.kept:
        h[-1].end = h[-1].end or 2
    offline = Offline(Dataset(batch=500, n_step=4), transitions_of(replay, PLANE, PUSH), gamma=0.9, generator=torch.Generator())
    from collect.replay_worlds import expect

    assert len(expect(offline.draw(2), world, 40, 4)) == 60


@pytest.mark.parametrize(
    ("observation", "action"),
    [
        (Observation("discrete", (), "<i8", (5,), (2,)), Action("discrete", (), "<i8", (3,), (1,))),
        (Observation("multidiscrete", (2,), "<i8", (3, 2), (0, 0)), Action("multidiscrete", (2,), "<i8", (2, 4), (0, 0))),
        (Observation("box", (2, 3), "|u1"), Action("box", (2,), "<f8", low=(-1.0, 0.0), high=(1.0, 3.0))),
        (Observation("box", (4,), "<f8"), Action("box", (1, 2), "<f4", low=(-1.0, -1.0), high=(1.0, 1.0))),
    ],
)
def test_every_kind_of_space_comes_back(observation: Observation, action: Action) -> None:
    rng, n = np.random.default_rng(0), 40

    def draw(space: Any, count: int) -> Any:
        if space.kind != "box":
            return (rng.integers(0, space.counts, (count, len(space.counts))) + space.start).reshape(count, *space.shape)
        if space.dtype == "|u1":
            return rng.integers(0, 256, (count, *space.shape)).astype(np.uint8)
        return rng.uniform(0, 1, (count, *space.shape)).astype(np.float32)

    raw = draw(observation, n + 1)
    start = np.zeros(n, dtype=bool)
    start[[0, 25]] = True
    encoded = observation.encode(raw)
    after = encoded[1:].copy()
    made = Transitions(
        "made", observation, action, encoded[:-1], draw(action, n).reshape(n, *([action.size] if action.shape else [])),
        rng.normal(size=(n, 3)).astype(np.float32), np.arange(n) == 24, np.arange(n) == n - 1, after, start,
    )  # fmt: skip
    assert np.array_equal(decode(observation, encoded), raw)
    equal(from_minari(to_minari(made, "me/every-v3")), made)
    replay = Offline(Dataset(batch=4), made, gamma=0.9, generator=torch.Generator())
    if action.kind != "box":
        assert replay.columns()["action"].min() == 0
        taken = transitions_of(_ring_of(made), observation, action)
        assert np.array_equal(taken.action, made.action)


def _ring_of(made: Transitions) -> Replay:
    """A ring to which these transitions were written, one after the other."""
    layout = made.layout
    replay = Replay(
        Ring(size=len(made), batch=1, start=0), obs_size=layout.obs, action_size=layout.action, discrete=layout.discrete,
        channels=layout.channels, envs=1, gamma=0.9, generator=torch.Generator(),
    )  # fmt: skip
    t = torch.from_numpy
    action = made.action - np.asarray(made.action_space.start or 0)
    replay.write(
        Batch(
            torch.ones(1, len(made), dtype=torch.bool), t(made.reward)[None], t(made.terminated)[None], t(made.truncated)[None],
            obs=t(made.obs)[None], action=t(action)[None], next_obs=t(made.next_obs)[None],
        )
    )  # fmt: skip
    return replay


def test_actions_are_stored_as_the_policy_holds_them() -> None:
    from polopt.policies.actor_heads import Deterministic

    made = logged()
    head = Deterministic(made.action_space)
    offline = Offline(Dataset(batch=4), made, gamma=0.9, generator=torch.Generator(), inward=head.inward)
    assert torch.equal(offline.columns()["action"], torch.from_numpy(made.action / 2))
    held = replace(offline.transitions, name="x")
    ring_ = _ring_of(replace(made, action=made.action / 2))
    back = transitions_of(ring_, made.observation, made.action_space, outward=head.outward)
    np.testing.assert_allclose(back.action, made.action, atol=5e-7)  # the head scales in float32
    equal(replace(back, action=made.action), held)


def test_minari_itself_reads_what_was_written(root: Path) -> None:
    import minari

    made = logged()
    folder = to_minari(made, "me/pendulum/noisy-v2", description="for a test")
    assert folder == root / "me/pendulum/noisy-v2"
    dataset = minari.load_dataset("me/pendulum/noisy-v2")
    assert (dataset.total_episodes, dataset.total_steps) == (3, 600)
    assert dataset.recover_environment().spec.id == "Pendulum-v1"
    assert dataset[0].observations.shape == (201, 3)
    assert dataset[0].truncations.tolist() == [False] * 199 + [True]
    assert list(minari.list_local_datasets()) == ["me/pendulum/noisy-v2"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert from_minari("me/pendulum/noisy-v2").env == made.env


def test_statistics_and_returns() -> None:
    made = logged()
    mean, std = made.statistics()
    np.testing.assert_allclose(mean, made.obs.mean(0), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(std, made.obs.std(0), rtol=1e-4)
    np.testing.assert_allclose(made.returns(), made.reward.reshape(3, 200).sum(1), rtol=1e-5)
    assert made.episodes().tolist() == [[0, 200], [200, 400], [400, 600]]


# -------------------------------------------------------------------- what is refused
def test_a_dataset_that_is_not_there_is_named_with_the_nearest(root: Path) -> None:
    to_minari(logged(), "me/pendulum-v0")
    with pytest.raises(CallError) as error:
        from_minari("me/pendulm-v0")
    assert "there is no Minari dataset 'me/pendulm-v0'" in str(error.value)
    assert f"below {root}, did you mean 'me/pendulum-v0'?" in str(error.value)
    assert "minari download me/pendulm-v0" in str(error.value)


def test_other_spaces_are_refused() -> None:
    to_minari(logged(), "pendulum-v0")
    cheetah, cart, own = GymTask("gym:HalfCheetah-v5"), GymTask("gym:CartPole-v1"), GymTask("gym:Pendulum-v1")

    def read(task: GymTask) -> Transitions:
        observation, action = task.spaces()
        return from_minari("pendulum-v0", observation=observation, action=action, task=task.name)

    assert len(read(own)) == 600
    with pytest.raises(
        CallError, match=r"'pendulum-v0' has the observation space box of shape \(3,\), but the task gym:HalfCheetah-v5 has"
    ):
        read(cheetah)
    with pytest.raises(CallError, match=r"box of shape \(3,\), but the task gym:CartPole-v1 has box of shape \(4,\)"):
        read(cart)
    observation, action = own.spaces()
    with pytest.raises(
        CallError, match=r"action space box of shape \(1,\) within \[-2, 2\], but the task x has .* within \[-1, 1\]"
    ):
        from_minari("pendulum-v0", observation=observation, action=replace(action, low=(-1.0,), high=(1.0,)), task="x")
    with pytest.raises(CallError, match=r"but the task x has discrete \[3\]"):
        from_minari("pendulum-v0", observation=observation, action=Action("discrete", (), "<i8", (3,), (0,)), task="x")
    with pytest.raises(CallError, match="it was not recorded in this task"):
        from_minari("pendulum-v0", observation=replace(observation, dtype="|u1"), action=action, task="x")


@pytest.mark.parametrize(("field", "word"), [("obs", "observations"), ("action", "actions"), ("reward", "rewards")])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_numbers_that_are_not_finite_are_named(field: str, word: str, value: float) -> None:
    made = logged()
    bad = getattr(made, field).copy()
    bad[217, 0] = value
    to_minari(replace(made, **{field: bad}), "bad-v0")
    with pytest.raises(CallError, match=f"dataset 'bad-v0': {word} of episode 1 hold {value} in step 17; expected finite numbers"):
        from_minari("bad-v0")


def test_actions_outside_their_space_are_refused() -> None:
    made = logged()
    action = made.action.copy()
    action[3] = 2.1
    to_minari(replace(made, action=action), "far-v0")
    with pytest.raises(CallError, match=r"actions of episode 0 hold 2\.0\d* in step 3, which is not in the space box .* \[-2, 2\]"):
        from_minari("far-v0")
    action[3] = 2 + 1e-5  # rounding
    to_minari(replace(made, action=action), "near-v0")
    assert len(from_minari("near-v0")) == 600


def test_empty_datasets_are_refused(root: Path, tmp_path: Path) -> None:
    from gymnasium import spaces
    from minari.dataset.minari_storage import MinariStorage

    (root / "none-v0").mkdir(parents=True)
    box = spaces.Box(-1, 1, (2,), np.float32)
    storage = MinariStorage.new(root / "none-v0" / "data", box, box)
    storage.update_metadata({"dataset_id": "none-v0", "minari_version": "0.5.0"})
    with pytest.raises(CallError, match="dataset 'none-v0' is empty: it has 0 episodes and 0 steps"):
        from_minari("none-v0")
    with pytest.raises(CallError, match="holds no transitions"):
        to_minari(transitions_of(ring(World(2, np.random.default_rng(0))), PLANE, PUSH), tmp_path / "x")


def test_damaged_datasets_are_refused(root: Path) -> None:
    folder = to_minari(logged(), "mine-v0")
    metadata = json.loads((folder / "data/metadata.json").read_text())
    (folder / "data/metadata.json").write_text(json.dumps({**metadata, "minari_version": "9.9.9"}))
    with pytest.raises(CallError, match=r"dataset 'mine-v0' at .* cannot be read: ValueError: .* does not support"):
        from_minari("mine-v0")
    (folder / "data/metadata.json").write_text(json.dumps({**metadata, "total_episodes": 4}))
    with pytest.raises(CallError, match="dataset 'mine-v0' is damaged"):
        from_minari("mine-v0")
    (folder / "data/metadata.json").write_text(json.dumps(metadata))
    (folder / "data/main_data.hdf5").write_bytes(b"nothing")
    with pytest.raises(CallError, match="dataset 'mine-v0' is damaged: OSError"):
        from_minari("mine-v0")


def test_a_column_of_the_wrong_length_is_refused(root: Path) -> None:
    import h5py

    folder = to_minari(logged(), "short-v0")
    with h5py.File(folder / "data/main_data.hdf5", "a") as file:
        file["episode_1/observations"].resize((200, 3))
    with pytest.raises(CallError, match=r"'short-v0': observations of episode 1 have shape \(200, 3\), expected \(201, 3\)"):
        from_minari("short-v0")


def test_nothing_is_overwritten_and_nothing_is_left_by_halves(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    to_minari(logged(), "mine-v0")
    with pytest.raises(CallError, match="mine-v0 exists already"):
        to_minari(logged(), "mine-v0")

    def full(*_: Any) -> Any:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(minari_io, "_buffers", full)
    with pytest.raises(CallError, match=r"cannot write the dataset .*other-v0: No space left on device"):
        to_minari(logged(), "other-v0")
    assert [p.name for p in root.iterdir()] == ["mine-v0"]


def test_without_the_extra_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    to_minari(logged(), "mine-v0")
    monkeypatch.setitem(__import__("sys").modules, "minari", None)
    with pytest.raises(CallError, match=r"need the extra 'offline': pip install 'polopt\[offline\]'"):
        from_minari("mine-v0")


# -------------------------------------------------------------------- datasets of tasks
def test_built_in_logs_are_written_once(root: Path) -> None:
    task = DatasetTask("dataset:pendulum-logs?rows=400", {"noise": 0.6})
    first = open_dataset(Dataset(), task)
    assert locate("polopt/pendulum-logs-noise0_6-rows400-seed0-v0") is not None
    second = open_dataset(Dataset(path="pendulum-logs?rows=400&noise=0.6"), GymTask("gym:Pendulum-v1"))
    equal(first, second)
    assert len(first) == 400
    equal(first, cached("polopt/pendulum-logs-noise0_6-rows400-seed0", lambda: pytest.fail("made twice")))


def test_where_nothing_can_be_written_logs_are_computed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "file" / "root"))
    assert len(open_dataset(Dataset(), DatasetTask("dataset:line"))) == 100


def test_a_task_of_a_minari_dataset_is_the_environment_it_was_recorded_in(tmp_path: Path) -> None:
    folder = to_minari(logged(), tmp_path / "logs")
    task = DatasetTask(f"dataset:{folder}")
    assert (task.id, task.options) == ("Pendulum-v1", {"max_episode_steps": 200})
    assert len(open_dataset(Dataset(), task)) == 600
    with pytest.raises(CallError, match=r"source\.path is empty, and the task gym:Pendulum-v1 brings no data"):
        open_dataset(Dataset(), GymTask("gym:Pendulum-v1"))
    with pytest.raises(CallError, match=r"the task gym:CartPole-v1 has"):
        open_dataset(Dataset(path="line"), GymTask("gym:CartPole-v1"))


def test_a_bound_dataset_resumes_and_refuses_what_changed() -> None:
    made = logged()
    a, b = (Offline(Dataset(batch=16), made, gamma=0.9, generator=torch.Generator().manual_seed(s)) for s in (0, 1))
    a.draw(3)
    b.load(a.state())
    assert torch.equal(a.draw(2).obs, b.draw(2).obs)
    assert (a.rounds(), len(a), a.state()["rows"]) == (Dataset().rounds, 600, 600)
    with pytest.raises(CallError, match="is fixed: nothing can be written"):
        a.write(a.draw(1))
    smaller = Offline(Dataset(batch=16), logged(200), gamma=0.9, generator=torch.Generator())
    with pytest.raises(PoloptError, match="has changed: 200 transitions of 9 numbers, 600 of 9 when the checkpoint was written"):
        smaller.load(a.state())


def test_the_root_follows_the_environment(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert datasets_root() == root
    monkeypatch.delenv("MINARI_DATASETS_PATH")
    assert datasets_root() == Path.home() / ".minari" / "datasets"


def test_a_dataset_is_written_to_a_folder_given_from_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    held = transitions_of(ring_of_some(), PLANE, PUSH)
    equal(from_minari(to_minari(held, "below/mine")), held)


def ring_of_some() -> Replay:
    world = World(2, np.random.default_rng(0))
    replay = ring(world, size=20)
    replay.write(world.fragment(5))
    return replay
