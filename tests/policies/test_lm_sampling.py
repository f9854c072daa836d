"""Truncation and drawing against exact probabilities."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from polopt.policies.lm.sampling import Sampling, choose, draw, truncate

LOGITS = torch.log(torch.tensor([[0.5, 0.2, 0.15, 0.1, 0.05]]))


def kept(how: Sampling) -> list[int]:
    return torch.isfinite(truncate(LOGITS, how))[0].nonzero().flatten().tolist()


def test_truncations_keep_what_their_definitions_say() -> None:
    assert kept(Sampling(top_k=2)) == [0, 1]
    assert kept(Sampling(top_k=50)) == [0, 1, 2, 3, 4]
    assert kept(Sampling(top_p=0.5)) == [0]
    assert kept(Sampling(top_p=0.6)) == [0, 1]  # 0.5 does not reach 0.6, 0.7 does
    assert kept(Sampling(top_p=0.01)) == [0]  # at least one
    assert kept(Sampling(min_p=0.25)) == [0, 1, 2]  # at least 0.125
    assert kept(Sampling(top_k=3, top_p=0.8)) == [0, 1]  # top-p sees 0.588, 0.235, 0.176 after top-k


@pytest.mark.parametrize(
    "how", [Sampling(), Sampling(top_p=0.8), Sampling(top_k=3), Sampling(min_p=0.15), Sampling(temperature=2.0)]
)
def test_frequencies_and_stored_numbers_are_those_of_the_truncated_distribution(how: Sampling) -> None:
    n = 60_000
    scaled = (LOGITS / how.temperature).softmax(-1)[0].numpy()
    allowed = np.isin(np.arange(5), torch.isfinite(truncate(LOGITS / how.temperature, how))[0].nonzero().numpy())
    p = scaled * allowed / (scaled * allowed).sum()
    uniform = torch.rand(n, generator=torch.Generator().manual_seed(0))
    token, logp, entropy = choose(LOGITS.expand(n, -1), uniform, how.temperature, how)
    frequency = np.bincount(token.numpy(), minlength=5) / n
    assert np.abs(frequency - p).max() < 4 * 0.5 / n**0.5
    assert frequency[~allowed].sum() == 0
    np.testing.assert_allclose(logp.numpy(), np.log(p[token.numpy()]), atol=1e-5)
    np.testing.assert_allclose(entropy.numpy(), -(p[allowed] * np.log(p[allowed])).sum(), atol=1e-5)


@given(st.integers(0, 10_000), st.floats(0, 1, exclude_max=True))
@settings(max_examples=60, deadline=None)
def test_a_token_of_probability_zero_is_never_drawn(seed: int, u: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(3, 40, generator=generator) * 5
    logits[torch.rand(3, 40, generator=generator) < 0.7] = float("-inf")
    logits[:, 7] = 0.0
    for uniform in (u, 0.0, 1 - 2**-24):
        token, _, p = draw(logits, torch.full((3,), uniform))
        assert bool((p.gather(1, token[:, None]) > 0).all())


def test_inverse_cdf_by_hand() -> None:
    logits = torch.log(torch.tensor([[0.25, 0.25, 0.5]])).expand(5, -1)
    token, _, _ = draw(logits, torch.tensor([0.0, 0.24, 0.26, 0.49, 0.51]))
    assert token.tolist() == [0, 0, 1, 1, 2]


def test_greedy_is_a_point_mass() -> None:
    token, logp, entropy = choose(LOGITS, torch.zeros(1), 1.0, Sampling(greedy=True))
    assert (token.item(), logp.item(), entropy.item()) == (0, 0.0, 0.0)
