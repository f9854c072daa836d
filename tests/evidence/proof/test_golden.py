"""Golden trajectories: stored ones are repeated in both modes, and a change is caught, at the update where it begins."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from polopt.batch import Batch
from polopt.errors import CallError
from polopt.evidence.proof import checks, golden, packed, small, stored
from polopt.method import Method
from polopt.part import Can
from polopt.parts.surrogate.clip import Clip
from polopt.recipe import Recipe
from polopt.registry import all_methods, get_method

torch.set_num_threads(1)
UPDATES = 6


@pytest.mark.parametrize("name", sorted(all_methods()))
def test_the_stored_trajectory_is_repeated(name: str) -> None:
    """If this fails after a change of the method that was meant: `polopt certify METHOD --record`."""
    path = stored.find(stored.GOLDEN, f"{name}.safetensors")
    assert path is not None
    kept = golden.load(path)
    moves, method = len(set(kept.chain)) - 1, get_method(name)
    # every update moves the parameters, but for those of stages that only estimate something
    assert len(kept.chain) == golden.UPDATES + 1
    assert moves == golden.UPDATES or (isinstance(method, Recipe) and moves >= golden.UPDATES - 5)
    # a language model is larger than a table
    assert path.stat().st_size < (1_200_000 if Can.SOLUTIONS in method.requires() else 300_000)
    found = golden.check(get_method(name), kept)
    assert found.ok, found.message


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> golden.Golden:
    """PPO's first updates, through a file."""
    method = get_method("ppo")
    path = tmp_path_factory.mktemp("golden") / "ppo.safetensors"
    golden.record(method, *small.world(method), path, updates=UPDATES)
    return golden.load(path)


def test_both_modes_repeat_what_was_recorded(recorded: golden.Golden) -> None:
    live, replay = (golden.check(get_method("ppo"), recorded, mode) for mode in ("live", "replay"))  # type: ignore[arg-type]
    assert (live.mode, live.identical, live.error, live.differs) == ("live", True, 0.0, None)
    assert replay.mode == "replay"
    assert replay.ok
    assert replay.error <= golden.TOLERANCE


def test_replay_collects_nothing_and_draws_nothing(recorded: golden.Golden, monkeypatch: pytest.MonkeyPatch) -> None:
    from polopt.collect.table import TableCollector

    def forbidden(*args: Any, **named: Any) -> Any:
        raise AssertionError("a replay must not act")

    monkeypatch.setattr(TableCollector, "answer", forbidden)
    assert golden.check(get_method("ppo"), recorded, "replay").ok


def test_the_recorded_start_is_used(recorded: golden.Golden) -> None:
    """Elsewhere the initial parameters may be drawn differently."""
    moved = {k: {n: x + 0.1 for n, x in v.items()} if isinstance(v, dict) else v for k, v in recorded.start.items()}
    if not any(isinstance(v, dict) for v in recorded.start.values()):
        moved = {k: v + 0.1 if isinstance(v, torch.Tensor) else v for k, v in recorded.start.items()}
    assert not golden.check(get_method("ppo"), replace(recorded, start=moved), "replay").ok


@pytest.mark.parametrize("mode", ["live", "replay"])
@pytest.mark.parametrize(("path", "value"), [("lr", 0.03), ("advantage.lam", 0.9), ("critic.coef", 0.7), ("surrogate.high", 0.01)])
def test_a_changed_setting_is_caught_at_the_first_update(recorded: golden.Golden, mode: Any, path: str, value: float) -> None:
    # a rate given by the task's preset is changed where the run is described
    method, kept = get_method("ppo"), recorded
    if path == "lr":
        kept = replace(recorded, settings={**recorded.settings, "updates.policy.rule.lr": value})
    else:
        method = method.set(path, value)
    found = golden.check(method, kept, mode)
    assert not found.ok
    assert found.differs == 1
    assert "update 1" in found.message


@dataclass(frozen=True)
class Later(Clip):
    """The clip whose sign flips after some updates."""

    after: int = 3

    def __call__(self, batch: Batch, now: Mapping[str, torch.Tensor], advantage: torch.Tensor) -> torch.Tensor:
        """As the clip, then its opposite."""
        loss = super().__call__(batch, now, advantage)
        return -loss if int(batch.clock.update) >= self.after else loss


@pytest.mark.parametrize("mode", ["live", "replay"])
def test_a_later_change_is_caught_where_it_begins(recorded: golden.Golden, mode: Any) -> None:
    """Iterations count from 0: the fourth update is the first that sees update 3 done."""
    found = golden.check(get_method("ppo").but("ppo", surrogate=Later()), recorded, mode)
    assert not found.ok
    assert found.differs == 4
    never = golden.check(get_method("ppo").but("ppo", surrogate=Later(after=UPDATES)), recorded, mode)
    assert never.ok


def test_the_stack_decides_the_mode(recorded: golden.Golden) -> None:
    assert golden.check(get_method("ppo"), recorded).mode == "live"
    elsewhere = replace(recorded, stack={**recorded.stack, "torch": "1.0"})
    found = golden.check(get_method("ppo"), elsewhere)
    assert found.mode == "replay"
    assert found.ok


def test_a_difference_of_collecting_alone_is_told(recorded: golden.Golden) -> None:
    """Live runs differ, on the recorded batches the updates are the same."""
    other = replace(recorded, settings={**recorded.settings, "seed": 1}, start=recorded.start)
    found = golden.check(get_method("ppo"), other, "live")
    assert not found.ok
    assert found.differs == 1
    assert "what is collected differs" in found.message or "so it does" in found.message


def test_an_end_that_is_not_the_last_hash_s_is_damage(recorded: golden.Golden) -> None:
    found = golden.check(get_method("ppo"), replace(recorded, final=recorded.final + 1e-3), "live")
    assert not found.ok
    assert not found.identical
    assert "the file is damaged" in found.message


def test_a_method_that_needs_more_than_was_recorded_says_so(recorded: golden.Golden) -> None:
    wider = replace(recorded, batches=[{k: replace(b, reward=None) for k, b in one.items()} for one in recorded.batches])
    found = golden.check(get_method("ppo"), wider, "replay")
    assert not found.ok
    assert "do not serve it" in found.message


@pytest.mark.parametrize("damage", [b"", b"\x00" * 50, b"{}"])
def test_a_damaged_file_is_named(tmp_path: Path, damage: bytes) -> None:
    path = tmp_path / "ppo.safetensors"
    path.write_bytes(damage)
    with pytest.raises(CallError, match=r"ppo\.safetensors is damaged"):
        golden.load(path)


def test_packed_batches_come_back_bit_for_bit() -> None:
    """Different shapes, columns that only some batches have, integers of every size."""
    g = torch.Generator().manual_seed(0)

    def batch(b: int, t: int, big: int, extra: bool) -> Batch:
        made = Batch.of(
            reward=torch.randn(b, t, generator=g, dtype=torch.float64), mask=torch.rand(b, t, generator=g) < 0.8,
            group=torch.arange(b) // 2, stats={"logp@old": torch.randn(b, t, generator=g)}, horizon=t + 3,
            row={"hint": torch.randn(b, generator=g)} if extra else {},
        )  # fmt: skip
        return replace(
            made, action={"a": torch.randint(0, big, (b, t), generator=g)}, obs=torch.randint(-5, 5, (b, t), generator=g)
        )

    batches = [{"policy": batch(4, 3, 2, True)}, {"policy": batch(2, 5, 2**40, False), "more": batch(3, 1, 300, True)}]
    tensors, about = packed.pack(batches)
    found = packed.unpack(tensors, about)
    assert tensors["batch/policy/obs"].dtype == torch.int8
    for one, other in zip(batches, found, strict=True):
        assert one.keys() == other.keys()
        for name in one:
            mine, theirs = (dict(packed._leaves(b[name].tree(), "")) for b in (one, other))
            assert mine.keys() == theirs.keys()
            for path, x in mine.items():
                y = theirs[path]
                assert x.dtype == y.dtype and torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y, path


def test_recording_and_missing(tmp_path: Path) -> None:
    method: Method = get_method("reinforce")
    path = tmp_path / "deep" / "reinforce.safetensors"
    assert checks.golden_trajectory(method, path).result == "none"
    assert checks.golden_trajectory(method, path, record=True).text == "golden recorded"
    assert checks.golden_trajectory(method, path).text == "golden bit-identical"
