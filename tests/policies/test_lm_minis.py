"""The models of the small text tasks: size, where they begin, what hints are worth, and that they can be rebuilt."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from polopt.policies import minis
from polopt.policies.lm import LMPolicy, Sampling, load_backbone
from polopt.policies.lm.model import ASSETS
from polopt.tasks import make
from polopt.tasks.mini import MiniTask
from polopt.tasks.text_protocol import Item

NAMES = list(minis.MINIS)


def started(name: str) -> tuple[MiniTask, LMPolicy]:
    torch.set_num_threads(1)
    task = make(minis.MINIS[name].task)
    assert isinstance(task, MiniTask)
    assert task.model == name
    return task, LMPolicy(load_backbone(name), max_new_tokens=task.tokens)


def verdicts(task: MiniTask, policy: LMPolicy, items: list[Item], each: int, prompts: list[str] | None = None) -> np.ndarray:
    """Correct or not [items, each] of sampled answers."""
    ids = [policy.encode(p) for p in prompts or [str(i.prompt) for i in items]]
    rows = [k for k in range(len(items)) for _ in range(each)]
    drawn = policy.generate(ids, rows, torch.Generator().manual_seed(0), sampling=Sampling())
    texts, _ = policy.texts(drawn)
    return task.correct(task.score([items[k] for k in rows], texts, [[]] * len(rows))).reshape(len(items), each)


@pytest.mark.parametrize("name", NAMES)
def test_size_and_symbols(name: str) -> None:
    _, policy = started(name)
    parameters = list(policy.backbone.module.parameters())
    assert sum(p.numel() for p in parameters) <= 110_000
    assert {p.dtype for p in parameters} == {torch.float32}
    assert policy.engine.name == "fast"
    assert (ASSETS / name / "model.safetensors").stat().st_size < 300_000
    assert policy.backbone.vocabulary == len(minis.SYMBOLS) + 4
    assert len(policy.encode(minis.SYMBOLS)) == len(minis.SYMBOLS) + 1
    assert len(set(minis.SYMBOLS)) == len(minis.SYMBOLS)
    assert len(minis.JUNK) == 20


def test_chain_begins_at_35_to_40_percent() -> None:
    task, policy = started("tiny-chain")
    found = verdicts(task, policy, list(task.items("eval")), 8)
    assert abs(found.mean() - 0.375) < 0.025 + 0.05
    mixed = (found.any(1) & ~found.all(1)).mean()
    assert mixed > 0.5  # groups of eight that a method can learn from


def test_countdown_begins_at_15_to_20_percent_and_solves_60_percent_in_16_tries() -> None:
    task, policy = started("tiny-countdown")
    found = verdicts(task, policy, list(task.items("eval")), 16)
    assert abs(found.mean() - 0.175) < 0.025 + 0.05
    assert abs(found.any(1).mean() - 0.6) < 0.15


def test_countdown_seldom_tries_again_and_seldom_writes_junk() -> None:
    task, policy = started("tiny-countdown")
    items = list(task.items("eval"))
    drawn = policy.generate(
        [policy.encode(i.prompt) for i in items],
        [k for k in range(len(items)) for _ in range(16)],
        torch.Generator().manual_seed(0),
    )
    texts, _ = policy.texts(drawn)
    assert 0.01 < np.mean(["?" in t for t in texts]) < 0.06
    junk = sum(c in minis.JUNK for t in texts for c in t) / sum(map(len, texts))
    assert 0.01 < junk < 0.04  # twenty symbols at about 0.1 % each


def test_spell_begins_at_25_percent_and_long_strings_need_a_hint() -> None:
    task, policy = started("tiny-spell")
    items = list(task.items("eval"))
    assert abs(verdicts(task, policy, items, 8).mean() - 0.25) < 0.05
    long = [i for i in items if len(str(i.prompt)) > 9]
    plain = verdicts(task, policy, long, 8)
    assert plain.any(1).mean() < 0.25  # most groups fail as a whole
    assert plain.mean() < 0.05
    hinted = [f"{i.prompt}{str(i.columns['solution'])[: len(str(i.prompt)) // 2]}" for i in long]
    found = verdicts(task, policy, long, 8, hinted)
    assert found.any(1).mean() > 0.4
    assert found.mean() > 0.1


# -------------------------------------------------------------------- demonstrations
def _shown(name: str, count: int) -> tuple[MiniTask, list[Item], list[str]]:
    task = make(minis.MINIS[name].task)
    assert isinstance(task, MiniTask)
    items, rng = [task.items("train")[i] for i in range(count)], random.Random(0)
    return task, items, [minis.MINIS[name].demonstrate(i, rng) for i in items]


@pytest.mark.parametrize("name", NAMES)
def test_demonstrations_fit_and_are_flawed(name: str) -> None:
    task, items, shown = _shown(name, 400)
    assert max(map(len, shown)) < task.tokens
    assert set("".join(shown)) <= set(minis.SYMBOLS)
    right = task.correct(task.score(items, shown, [[]] * len(items))).mean()
    low, high = {"tiny-chain": (0.35, 0.6), "tiny-countdown": (0.13, 0.25), "tiny-spell": (0.18, 0.32)}[name]
    assert low < right < high


def test_a_hint_is_followed_by_the_whole_solution() -> None:
    item = make("text:spell").items("train")[0]  # type: ignore[attr-defined]
    prompt, answer = minis.example(replace(minis.MINIS["tiny-spell"], hinted=1.0), item, random.Random(0), flawed=True)
    solution = item.columns["solution"]
    assert answer == solution
    assert prompt.startswith(item.prompt)
    assert solution.startswith(prompt.removeprefix(item.prompt))
    assert minis.example(replace(minis.MINIS["tiny-spell"], hinted=0.0), item, random.Random(0), flawed=False) == (
        item.prompt,
        solution,
    )


def test_they_can_be_rebuilt_and_the_same_seed_gives_the_same_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(minis, "MINIS", {"tiny-spell": replace(minis.MINIS["tiny-spell"], items=200)})
    for name in ("a", "b"):
        minis.rebuild("tiny-spell", tmp_path / name, steps=2)
    one, two = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("a", "b"))
    assert one == two
    for name in NAMES:
        for file in ("tokenizer.json", "config.json"):
            assert (tmp_path / "a" / file).read_text() == (ASSETS / name / file).read_text()
