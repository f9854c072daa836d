"""Statistics of tokens in chunks: equal to those computed at once, values and gradients, at the memory of one chunk."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from lm_models import backbone, policy
from test_lm_policy import batch_of
from torch import Tensor

from polopt.policies.lm import LMPolicy
from polopt.policies.lm.stats import chunked
from polopt.stats import find_stat

torch.set_num_threads(1)
N, H, V = 97, 12, 40
NAMES = frozenset({"logp", "entropy", "peak", "kept_mass(0.1)", "proxy_logp(0.1)", "proxy_kl(0.1)", "logp_at(1.3)"})
WORKER = Path(__file__).parents[2] / "benchmarks" / "workers" / "vocabulary.py"


def inputs(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    hidden, weight, bias = ((0.4 * torch.randn(*s, generator=g)).to(dtype).requires_grad_() for s in ((N, H), (V, H), (V,)))
    return hidden, weight, bias, torch.randint(0, V, (N,), generator=g)


def run(chunk: int, heat: float | Tensor, names: frozenset[str] = NAMES, plain: bool = True) -> list[Tensor]:
    """Statistics, then the gradients in hidden states, weight and bias of a weighted sum of them."""
    hidden, weight, bias, action = inputs()
    linear = (weight, bias) if plain else None
    out = chunked(hidden, action, heat, lambda h: F.linear(h, weight, bias), V, names, chunk, linear)
    spread = torch.linspace(-1, 1, N)
    loss = sum((k + 1) * (spread * out[n]).mean() for k, n in enumerate(sorted(names)) if not n.startswith("proxy_logp"))
    assert isinstance(loss, Tensor)
    loss.backward()
    grads = [x.grad for x in (hidden, weight, bias)]
    return [out[n].detach() for n in sorted(names)] + [g for g in grads if g is not None]


@pytest.mark.parametrize("plain", [True, False])
@pytest.mark.parametrize("heat", [1.0, 0.7, torch.linspace(0.5, 2, N)])
@pytest.mark.parametrize("chunk", [1, V * 10, V * 96])
def test_chunks_equal_the_whole(chunk: int, heat: float | Tensor, plain: bool) -> None:
    for a, b in zip(run(chunk, heat, plain=plain), run(1 << 30, heat), strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-6)


def test_what_has_no_gradient_gives_none() -> None:
    hidden, weight, bias, action = inputs()
    out = chunked(hidden, action, 1.0, lambda h: F.linear(h, weight, bias), V, frozenset({"proxy_logp(0.1)"}), V, (weight, bias))
    out["proxy_logp(0.1)"].sum().backward()
    assert hidden.grad is not None
    assert float(hidden.grad.abs().max()) == 0
    with torch.no_grad():
        found = chunked(hidden, action, 1.0, lambda h: F.linear(h, weight, bias), V, frozenset({"logp"}), V, (weight, bias))
    assert not found["logp"].requires_grad


def test_half_precision_follows_autocast() -> None:
    """In bfloat16 both paths round the same logits; a frozen output layer gets no gradient."""
    found = []
    for chunk in (1 << 30, V * 10):
        hidden, weight, bias, action = inputs()
        bias.requires_grad_(False)
        with torch.autocast("cpu", torch.bfloat16):
            out = chunked(
                hidden, action, 1.0, lambda h, w=weight, b=bias: F.linear(h, w, b), V, frozenset({"logp"}), chunk, (weight, bias)
            )
        out["logp"].mean().backward()
        assert bias.grad is None
        found.append((out["logp"].detach(), hidden.grad))
    torch.testing.assert_close(found[1], found[0], atol=2e-2, rtol=0)


@pytest.mark.parametrize("kind", ["qwen2", "gpt2"])
def test_policies_compute_in_chunks(kind: str) -> None:
    whole = policy(kind)
    small = LMPolicy(whole.backbone, max_new_tokens=6, chunk=24 * 5)
    batch = batch_of(whole)
    found = []
    for p in (whole, small):
        out = p.evaluate(batch, frozenset({"logp", "entropy", "proxy_kl(0.1)"}))
        sum(v.square().sum() for v in out.values()).backward()  # type: ignore[union-attr]
        grads = [x.grad.clone() for x in p.backbone.module.parameters() if x.grad is not None]
        found.append([*(v.detach() for v in out.values()), *grads])
        p.backbone.module.zero_grad()
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


def test_output_layers_that_are_more_than_linear_are_told() -> None:
    assert backbone().linear is not None
    assert backbone(lora=2).linear is None or not backbone(lora=2).linear[0].requires_grad  # type: ignore[index]


def test_names_with_numbers() -> None:
    assert find_stat("logp") is not None
    assert find_stat("proxy_logp(0.02)") is find_stat("proxy_logp(0.02)")
    assert find_stat("proxy_logp") is None
    assert find_stat("proxy_logp(a)") is None
    assert find_stat("other(0.1)") is None


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="resident memory is read as Linux tells it")
def test_peak_memory_is_that_of_a_chunk() -> None:
    """2,048 tokens and 20,000 symbols: with gradient, above the model's hidden states, under 1.3 times a chunk of 419 tokens."""
    words = [sys.executable, str(WORKER), "8", "256", "20000", "32", str(1 << 23)]
    done = subprocess.run(words, capture_output=True, text=True, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["all_logits_mb"] > 4 * found["chunk_mb"]
    assert 0.5 < found["value"] < 1.3
