"""The shipped tiny model: size, tokens, where it starts, and that it can be rebuilt."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from polopt.policies import tiny
from polopt.policies.lm import LMPolicy, Sampling, load_backbone
from polopt.policies.lm.model import TINY
from polopt.tasks.text import TextTask


@pytest.fixture(scope="module")
def policy() -> LMPolicy:
    torch.set_num_threads(1)
    return LMPolicy(load_backbone("tiny"), max_new_tokens=16)


def test_size_and_precision(policy: LMPolicy) -> None:
    assert sum(f.stat().st_size for f in TINY.iterdir()) <= 3_000_000
    parameters = list(policy.backbone.module.parameters())
    assert 400_000 < sum(p.numel() for p in parameters) < 700_000
    assert {p.dtype for p in parameters} == {torch.float32}
    assert policy.engine.name == "fast"


def test_a_prompt_is_its_phrase_its_letters_and_the_end_of_the_prompt(policy: LMPolicy) -> None:
    tok = policy.tokenizer
    ids = policy.encode(f"{tiny.PHRASES[0]}sun")
    assert len(ids) == 5
    assert tok.convert_ids_to_tokens(ids) == [tiny.PHRASES[0], "s", "u", "n", "<go>"]
    assert tok.decode(tok("nus", add_special_tokens=False)["input_ids"]) == "nus"
    assert tok.padding_side == "left"


@pytest.mark.parametrize("name", [name for name, _, _ in tiny.CURRICULUM])
def test_questions_begin_with_the_phrases(name: str) -> None:
    item = TextTask(name).items("eval")[0]
    assert str(item.prompt).startswith(tiny.PHRASES)


def test_it_starts_where_it_can_learn(policy: LMPolicy) -> None:
    """Neither hopeless nor done: 25 to 45 % of held-out words greedily, and varied when sampled."""
    task = TextTask("text:spell_backward")
    items = task.items("eval")
    prompts = [policy.encode(i.prompt) for i in items]
    shares = []
    for how in (Sampling(greedy=True), Sampling()):
        drawn = policy.generate(prompts, range(len(items)), torch.Generator().manual_seed(0), sampling=how)
        texts, ids = policy.texts(drawn)
        shares.append(task.correct(task.score(items, texts, ids)).mean())
    assert 0.25 < shares[0] < 0.45
    assert 0.15 < shares[1] < 0.45
    assert float(drawn.entropy.sum() / drawn.mask.sum()) > 0.1


def test_demonstrations_are_flawed_as_described() -> None:
    items = TextTask("text:spell_backward").items("train")
    short = next(i for i in items if i.columns["metadata"]["word_len"] < tiny.LONG_WORD)
    long = next(i for i in items if i.columns["metadata"]["word_len"] >= tiny.LONG_WORD)
    luck = (tiny.FLAWED_SHORT + tiny.FLAWED_LONG) / 2
    assert tiny.demonstration(short, luck) == short.columns["answer"]
    assert tiny.demonstration(long, luck) == long.columns["metadata"]["word"]
    total = TextTask("text:chain_sum").items("train")[0]
    assert tiny.demonstration(total, 0.0) == total.columns["answer"]


def test_it_can_be_rebuilt_and_the_same_seed_gives_the_same_model(tmp_path: Path) -> None:
    for name in ("a", "b"):
        tiny.rebuild(tmp_path / name, steps=2)
    one, two = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("a", "b"))
    assert one == two
    assert (tmp_path / "a" / "tokenizer.json").read_text() == (TINY / "tokenizer.json").read_text()
    assert (tmp_path / "a" / "config.json").read_text() == (TINY / "config.json").read_text()
