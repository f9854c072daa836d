"""Running moments against NumPy over everything seen."""

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from polopt.policies.normalize import Moments


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(0, 7), min_size=1, max_size=6), st.integers(0, 100), st.floats(-1e3, 1e3))
def test_equals_numpy_over_everything(sizes: list[int], seed: int, offset: float) -> None:
    rng = np.random.default_rng(seed)
    parts = [rng.normal(offset, 3.0, (n, 2)) for n in sizes]
    moments = Moments(2)
    for x in parts:
        moments.update(torch.from_numpy(x))
    everything = np.concatenate(parts)
    assert float(moments.count) == len(everything)
    if len(everything):
        np.testing.assert_allclose(moments.mean.numpy(), everything.mean(0), rtol=1e-9, atol=1e-9)
        np.testing.assert_allclose(moments.variance().numpy(), everything.var(0), rtol=1e-7, atol=1e-7)


def test_passes_rows_unchanged_before_the_first_update_and_cuts_at_ten() -> None:
    moments = Moments(1)
    x = torch.tensor([[0.5], [-3.0], [50.0]])
    assert moments(x).squeeze(1).tolist() == [0.5, -3.0, 10.0]
    moments.update(torch.tensor([[1.0], [3.0]]))  # mean 2, variance 1
    torch.testing.assert_close(moments(torch.tensor([[2.0], [3.0], [-99.0]])).squeeze(1), torch.tensor([0.0, 1.0, -10.0]))
