"""The ring on disk: equal to the one in memory, resumed to the same numbers after a kill at any moment."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from collect.replay_worlds import World, expect, ring, same, saved
from hypothesis import given, settings
from hypothesis import strategies as st

from polopt.errors import CallError, PoloptError


@settings(deadline=None, max_examples=80)
@given(
    envs=st.integers(1, 3),
    slots=st.integers(1, 7),
    before=st.lists(st.integers(1, 5), max_size=5),
    lost=st.lists(st.integers(1, 5), max_size=6),
    after=st.lists(st.integers(1, 5), max_size=5),
    again=st.booleans(),
    next_step=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_a_kill_after_any_number_of_decisions_changes_no_number(
    tmp_path_factory: pytest.TempPathFactory,
    envs: int, slots: int, before: list[int], lost: list[int], after: list[int], again: bool, next_step: bool, seed: int,
) -> None:  # fmt: skip
    folder = tmp_path_factory.mktemp("ring")
    world = World(envs, np.random.default_rng(seed), next_step, p_end=0.4)
    options = {"size": slots * envs, "n_step": 2, "seed": seed, "batch": 1}
    memory, disk = ring(world, **options), ring(world, **options, storage="disk", folder=folder)
    for steps in before:
        fragment = world.fragment(steps)
        memory.write(fragment)
        disk.write(fragment)
    state = saved(disk.state(), folder / "checkpoint")
    assert "rows" not in state
    elsewhere = World(envs, np.random.default_rng(seed + 1), next_step, p_end=0.4)  # what is written and then lost
    for i, steps in enumerate(lost):
        disk.write(elsewhere.fragment(steps))
        if again and i == 1:
            disk.state()  # a checkpoint that a kill left unfinished
    del disk
    back = ring(world, **{**options, "seed": 0}, storage="disk", folder=folder)
    back.load(state)
    for steps in [0, *after]:
        if steps:
            fragment = world.fragment(steps)
            memory.write(fragment)
            back.write(fragment)
        assert (len(memory), memory.written, memory.rounds()) == (len(back), back.written, back.rounds())
        if len(memory):
            same(memory.draw(30), back.draw(30))


def test_every_one_of_the_newest_checkpoints_can_be_gone_back_to(tmp_path: Path) -> None:
    world = World(2, np.random.default_rng(0))
    replay = ring(world, size=20, storage="disk", folder=tmp_path / "run")
    states, draws = [], []
    for _ in range(6):
        replay.write(world.fragment(4))
        replay.state()
        replay.state()  # nothing was written in between: no checkpoint of its own
        states.append(saved(replay.state(), tmp_path / f"c{len(states)}"))
        draws.append(replay.draw(2))
    for which in (3, 4, 5):
        shutil.copytree(tmp_path / "run", tmp_path / f"run{which}")
        back = ring(world, size=20, storage="disk", folder=tmp_path / f"run{which}")
        back.load(states[which])
        same(back.draw(2), draws[which])
    with pytest.raises(
        PoloptError, match=r"cannot go back to the checkpoint after 24 decisions: it remembers those after 32, 40, 48"
    ):
        ring(world, size=20, storage="disk", folder=tmp_path / "run").load(states[2])


def test_a_journal_cut_off_in_the_middle_is_read_as_far_as_it_goes(tmp_path: Path) -> None:
    world = World(1, np.random.default_rng(0))
    replay = ring(world, size=8, storage="disk", folder=tmp_path)
    replay.write(world.fragment(8))
    state, expected = replay.state(), replay.draw(1)
    replay.write(world.fragment(3))
    journal = next((tmp_path / "replay").glob("undo-*.bin"))
    assert journal.stat().st_size == 8 + 3 * 8 + 3 * replay.layout.bytes
    with journal.open("ab") as f:
        f.write(np.int64(2).tobytes() + b"half a record")
    back = ring(world, size=8, storage="disk", folder=tmp_path)
    back.load(state)
    same(back.draw(1), expected)


def test_a_journal_never_outgrows_the_ring(tmp_path: Path) -> None:
    world = World(1, np.random.default_rng(0))
    replay = ring(world, size=8, storage="disk", folder=tmp_path)
    replay.write(world.fragment(8))
    state, expected = replay.state(), replay.draw(1)
    for _ in range(30):
        replay.write(world.fragment(3))
    assert next((tmp_path / "replay").glob("undo-*.bin")).stat().st_size == 3 * 8 + 8 * (8 + replay.layout.bytes)
    back = ring(world, size=8, storage="disk", folder=tmp_path)
    back.load(state)
    same(back.draw(1), expected)


def test_a_second_run_in_the_folder_does_not_read_the_first_ones_journals(tmp_path: Path) -> None:
    world, other = (World(1, np.random.default_rng(seed)) for seed in (0, 1))
    first = ring(world, size=8, storage="disk", folder=tmp_path)
    first.write(world.fragment(10))
    first.state()
    second = ring(other, size=8, storage="disk", folder=tmp_path)
    second.write(other.fragment(3))
    state = second.state()
    assert [p.name for p in (tmp_path / "replay").glob("undo-*.bin")] == ["undo-000000000000003.bin"]
    second.write(other.fragment(4))
    back = ring(other, size=8, storage="disk", folder=tmp_path)
    back.load(state)
    other.kept[0] = other.kept[0][:3]
    expect(back.draw(5), other, 8, 1)


def test_the_file_has_its_place_reserved_and_a_longer_run_finds_room(tmp_path: Path) -> None:
    world = World(2, np.random.default_rng(0))
    replay = ring(world, size=1000, budget=20, storage="disk", folder=tmp_path)
    assert replay.describe() == "20 transitions, 560 bytes on disk"
    stat = (tmp_path / "replay/ring.f32").stat()
    assert stat.st_size == 1000 * 28
    replay.write(world.fragment(11))
    state = replay.state()
    longer = ring(world, size=1000, budget=400, storage="disk", folder=tmp_path)
    longer.load(state)
    longer.write(world.fragment(50))
    expect(longer.draw(10), world, 500, 1)
    with pytest.raises(PoloptError, match=r"source\.size = 500: a ring on disk keeps the size .* 1,000 transitions"):
        ring(world, size=500, storage="disk", folder=tmp_path).load(longer.state())


def test_a_ring_on_disk_needs_a_folder() -> None:
    with pytest.raises(CallError, match="the run has none; give --out"):
        ring(World(1, np.random.default_rng(0)), storage="disk")


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(PoloptError, match=r"cannot make the ring's file .*ring\.f32"):
        ring(World(1, np.random.default_rng(0)), storage="disk", folder=tmp_path / "file")


def test_draws_of_both_storages_are_equal(tmp_path: Path) -> None:
    world = World(2, np.random.default_rng(0), next_step=True)
    a, b = ring(world, size=30), ring(world, size=30, storage="disk", folder=tmp_path)
    for _ in range(9):
        fragment = world.fragment(4)
        a.write(fragment)
        b.write(fragment)
    same(a.draw(4), b.draw(4))
    assert torch.equal(a.columns()["obs"], b.columns()["obs"])
