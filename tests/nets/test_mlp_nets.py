"""Initial weights: orthogonal, of the stated gain, and independent between nets."""

import math

import pytest
import torch

from polopt.errors import CallError
from polopt.nets.mlp import linear, net_generator, trunk


@pytest.mark.parametrize(("inputs", "outputs"), [(4, 64), (64, 64), (64, 2)])
def test_rows_or_columns_are_orthogonal_with_the_gain(inputs: int, outputs: int) -> None:
    w = linear(inputs, outputs, math.sqrt(2), net_generator(0, "policy")).weight.detach().double()
    gram = w @ w.T if outputs <= inputs else w.T @ w
    torch.testing.assert_close(gram, 2 * torch.eye(len(gram), dtype=torch.float64), atol=1e-5, rtol=0)


def test_biases_are_zero_and_the_global_stream_is_left_alone() -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    net = trunk(3, (8, 8), "relu", net_generator(1, "policy"))
    assert torch.equal(before, torch.get_rng_state())
    assert all(not net[i].bias.any() for i in (0, 2))
    assert isinstance(net[1], torch.nn.ReLU)


def test_seed_and_name_decide_the_weights() -> None:
    def first(seed: int, name: str) -> torch.Tensor:
        return linear(4, 8, 1.0, net_generator(seed, name)).weight

    assert torch.equal(first(0, "policy"), first(0, "policy"))
    assert not torch.equal(first(0, "policy"), first(1, "policy"))
    assert not torch.equal(first(0, "policy"), first(0, "value"))


def test_unknown_activation_names_the_nearest() -> None:
    with pytest.raises(CallError, match="did you mean 'tanh'"):
        trunk(3, (8,), "tahn", net_generator(0, "policy"))
