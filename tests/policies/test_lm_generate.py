"""Generation: early finish, limits, forced beginnings, stop strings, decoders, and independence of neighbours."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from lm_models import EOS, policy, tokenizer

from polopt.errors import PoloptError
from polopt.policies.lm import LMPolicy, Sampling
from polopt.policies.lm.generate import cut_at_stop, generate


class Scripted:
    """An engine whose next token is the row's script: row i of prompt k is forced to write scripts[k]."""

    name = "scripted"

    def __init__(self, scripts: list[list[int]], vocabulary: int = 24) -> None:
        self.scripts, self.vocabulary, self.computed = scripts, vocabulary, 0

    def open(self, prompt: Any, prompt_mask: Any, spread: torch.Tensor, limit: int) -> Any:
        self.rows, self.at = spread.tolist(), 0
        return self, self._hidden()

    def _hidden(self) -> torch.Tensor:
        logits = torch.full((len(self.rows), self.vocabulary), -30.0)
        for i, k in enumerate(self.rows):
            script = self.scripts[k]
            logits[i, script[self.at] if self.at < len(script) else 5] = 30.0
        self.computed += len(self.rows)
        return logits

    def step(self, token: torch.Tensor) -> torch.Tensor:
        assert len(token) == len(self.rows)
        self.at += 1
        return self._hidden()

    def keep(self, rows: torch.Tensor) -> None:
        self.rows = [self.rows[i] for i in rows.tolist()]


def run(scripts: list[list[int]], limits: list[int], **changes: Any) -> tuple[Any, Scripted]:
    engine = Scripted(scripts)
    n = len(scripts)
    how = changes.pop("how", Sampling())
    drawn = generate(
        engine, lambda h: h, torch.ones(n, 1, dtype=torch.long), torch.ones(n, 1, dtype=torch.bool), torch.arange(n),
        torch.tensor(limits), how, rng=torch.Generator().manual_seed(0), ends=(EOS,), pad=0, tokenizer=tokenizer(), **changes,
    )  # fmt: skip
    return drawn, engine


def test_rows_end_at_eos_or_their_own_limit_and_are_padded() -> None:
    drawn, _ = run([[7, 8, EOS], [9, 9, 9, 9, 9], [EOS]], [6, 3, 6])
    assert drawn.action.tolist() == [[7, 8, EOS], [9, 9, 9], [EOS, 0, 0]]
    assert drawn.mask.sum(1).tolist() == [3, 3, 1]
    assert drawn.ended.tolist() == [True, False, True]
    assert float(drawn.logp.abs().max()) < 1e-5


def test_finished_rows_leave_the_computation_and_all_come_back_in_place() -> None:
    scripts = [[6 + i % 4] * (i % 12) + [EOS] for i in range(40)]
    drawn, engine = run(scripts, [20] * 40)
    assert drawn.ended.all()
    for i, script in enumerate(scripts):
        n = int(drawn.mask[i].sum())
        assert drawn.action[i, :n].tolist() == script
        assert drawn.action[i, n:].eq(0).all()
    assert drawn.action.shape[1] == 12  # stopped when the longest was done
    assert engine.computed < 0.75 * 40 * 12


def test_stop_strings_end_a_row_and_are_cut_from_its_text() -> None:
    tok = tokenizer()
    script = tok("abcab")["input_ids"]
    drawn, _ = run([script, tok("bbbbb")["input_ids"]], [5, 5], how=Sampling(stop=("ca", "zz")))
    assert drawn.mask.sum(1).tolist() == [4, 5]
    assert drawn.ended.tolist() == [True, False]
    assert cut_at_stop(tok.decode(drawn.action[0, :4]), ("zz", "ca")) == "ab"


def test_forced_beginnings_are_marked_and_cost_no_probability() -> None:
    drawn, _ = run([[7, 8, EOS], [7, 8, EOS]], [5, 5], forced=torch.tensor([[12, -1], [-1, -1]]))
    assert drawn.action[0].tolist() == [12, 8, EOS]
    assert drawn.forced.tolist() == [[True, False, False], [False, False, False]]
    assert drawn.logp[0, 0] == 0


def test_a_decoder_changes_logits_before_sampling() -> None:
    def never_eight(logits: torch.Tensor, step: int, rows: Any) -> torch.Tensor:
        return logits.index_fill(1, torch.tensor([8]), float("-inf"))

    drawn, _ = run([[7, 8, EOS]], [3], decoder=never_eight)
    assert 8 not in drawn.action[0].tolist()


def test_compaction_does_not_change_what_is_drawn() -> None:
    """Rows beside a row may finish, and be dropped, at any time: its own draws and numbers stay."""
    p = policy("llama", max_new_tokens=24, model={"scale": 1.5})
    spread = [0] * 12 + [1] * 12
    uniform = torch.rand(24, 24, generator=torch.Generator().manual_seed(1))
    together = p.generate([[5, 6, 7], [8]], spread, None, uniform=uniform)
    assert together.mask.sum(1).unique().numel() > 3
    for i in (0, 5, 13, 23):
        alone = p.generate([[5, 6, 7], [8]], [spread[i]], None, uniform=uniform[:, i : i + 1])
        n = int(together.mask[i].sum())
        assert alone.action[0].tolist() == together.action[i, :n].tolist()
        torch.testing.assert_close(alone.logp[0], together.logp[i, :n], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("engine", ["fast", "general"])
def test_frequencies_of_two_token_texts_equal_exact_probabilities(engine: str) -> None:
    vocabulary = 5
    p = policy(engine=engine, max_new_tokens=2, model={"vocabulary": vocabulary})
    n = 20_000
    drawn = p.generate([[3, 4]], [0] * n, torch.Generator().manual_seed(0))
    with torch.no_grad():
        causal = p.backbone.causal
        first = causal(input_ids=torch.tensor([[3, 4]])).logits[0, -1].softmax(-1)
        expected = torch.zeros(vocabulary, vocabulary)
        for a in range(vocabulary):
            second = causal(input_ids=torch.tensor([[3, 4, a]])).logits[0, -1].softmax(-1)
            expected[a] = first[a] * second if a != EOS else torch.eye(vocabulary)[0] * first[a]  # padded with 0
    counts = torch.bincount(drawn.action[:, 0] * vocabulary + drawn.action[:, 1], minlength=vocabulary**2).view(
        vocabulary, vocabulary
    )
    assert (counts / n - expected).abs().max() < 4 * 0.5 / n**0.5


def test_draws_come_from_the_passed_stream_alone() -> None:
    p = policy()
    torch.manual_seed(0)
    one = p.generate([[5, 6]], [0] * 4, torch.Generator().manual_seed(7))
    torch.manual_seed(1)
    two = p.generate([[5, 6]], [0] * 4, torch.Generator().manual_seed(7))
    assert torch.equal(one.action, two.action)
    assert not torch.equal(one.action, p.generate([[5, 6]], [0] * 4, torch.Generator().manual_seed(8)).action)


def test_sampled_tensors_can_enter_a_loss() -> None:
    p = policy()
    drawn = p.generate([[5, 6]], [0, 0], torch.Generator().manual_seed(0))
    weight = torch.ones(2, requires_grad=True)
    (weight[:, None] * drawn.logp).sum().backward()
    assert weight.grad is not None


def test_a_prompt_longer_than_the_context_is_refused_by_name() -> None:
    p: LMPolicy = policy(max_new_tokens=10)
    p.encode("abc" * 18)
    with pytest.raises(PoloptError, match=r"the prompt 'abcabc.*57 tokens.*context of 64"):
        p.encode("abc" * 19)
