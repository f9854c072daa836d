"""Engines agree with each other and with the model's plain forward; padding and neighbours change nothing."""

from __future__ import annotations

import pytest
import torch
from lm_models import EOS, KINDS, backbone, policy

from polopt.batch import Batch
from polopt.policies.lm import LMPolicy, Sampling
from polopt.policies.lm.fast import FastEngine, supports
from polopt.policies.lm.prompts import pad_left, shared
from polopt.policies.lm.stats import chunked

PROMPTS = [[5, 6, 7, 8, 9], [4, 3], [10, 11, 12]]
SPREAD = [0, 0, 0, 1, 1, 2, 2, 2, 2]


def batch_of(p: LMPolicy, *, limit: int = 6, seed: int = 0) -> Batch:
    drawn = p.generate(PROMPTS, SPREAD, torch.Generator().manual_seed(seed), limits=torch.full((9,), limit))
    ids, known = pad_left(PROMPTS, 0)
    spread = torch.tensor(SPREAD)
    return Batch(
        mask=drawn.mask, action=drawn.action, context={"prompt": ids[spread], "prompt_mask": known[spread]},
        stats={"logp@behaviour": drawn.logp, "entropy@behaviour": drawn.entropy}, row={},
    )  # fmt: skip


def naive(p: LMPolicy, batch: Batch, temperature: float = 1.0) -> tuple[torch.Tensor, torch.Tensor]:
    """Row by row, unpadded, through the transformers forward."""
    logp, entropy = torch.zeros(batch.shape), torch.zeros(batch.shape)
    for i, (ids, known) in enumerate(zip(batch.context["prompt"], batch.context["prompt_mask"], strict=True)):
        prompt, n = ids[known], int(batch.mask[i].sum())
        answer = batch.action[i, :n]
        logits = p.backbone.causal(input_ids=torch.cat([prompt, answer])[None]).logits[0, len(prompt) - 1 : -1] / temperature
        logq = logits.log_softmax(-1)
        logp[i, :n] = logq.gather(1, answer[:, None])[:, 0]
        entropy[i, :n] = -(logq.exp() * logq).sum(-1)
    return logp, entropy


@pytest.mark.parametrize("engine", ["fast", "general", "exact"])
@pytest.mark.parametrize("kind", KINDS)
def test_statistics_and_the_samplers_own_numbers_equal_the_plain_forward(kind: str, engine: str) -> None:
    p = policy(kind, engine=engine, sampling=Sampling(temperature=0.7))
    batch = batch_of(p)
    with torch.no_grad():
        logp, entropy = naive(p, batch, 0.7)
        found = p.evaluate(batch, frozenset({"logp", "entropy"}))
    torch.testing.assert_close(found["logp"], logp, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found["entropy"], entropy, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(batch.stats["logp@behaviour"], logp, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(batch.stats["entropy@behaviour"], entropy, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_fast_and_general_draw_the_same_tokens_and_have_the_same_gradients(kind: str) -> None:
    b = backbone(kind)
    fast, general = (LMPolicy(b, max_new_tokens=6, engine=e) for e in ("fast", "general"))
    uniform = torch.rand(6, 9, generator=torch.Generator().manual_seed(3))
    one, two = (p.generate(PROMPTS, SPREAD, None, uniform=uniform) for p in (fast, general))
    assert torch.equal(one.action, two.action)
    assert torch.equal(one.mask, two.mask)
    batch = batch_of(fast)
    gradients = []
    for p in (fast, general):
        b.module.zero_grad()
        out = p.evaluate(batch, frozenset({"logp", "entropy"}))
        (out["logp"] * torch.linspace(-1, 1, out["logp"].numel()).view(batch.shape) + 0.1 * out["entropy"]).sum().backward()
        gradients.append({n: x.grad.clone() for n, x in b.module.named_parameters() if x.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, g in gradients[0].items():
        torch.testing.assert_close(g, gradients[1][name], atol=1e-5, rtol=1e-4, msg=lambda m, name=name: f"{name}: {m}")


def test_gradients_equal_finite_differences() -> None:
    p = policy(engine="fast")
    p.backbone.module.double()
    batch = batch_of(p)
    parameter = p.backbone.decoder.layers[0].self_attn.k_proj.weight
    p.backbone.module.zero_grad()
    p.evaluate(batch, frozenset({"logp"}))["logp"].sum().backward()
    analytic = float(parameter.grad[3, 5])
    values = []
    for step in (1e-3, -1e-3):
        with torch.no_grad():
            parameter[3, 5] += step
            values.append(float(p.evaluate(batch, frozenset({"logp"}))["logp"].sum()))
            parameter[3, 5] -= step
    assert analytic == pytest.approx((values[0] - values[1]) / 2e-3, rel=2e-2, abs=1e-3)


@pytest.mark.parametrize("engine", ["fast", "general"])
def test_padding_and_neighbours_do_not_change_a_row(engine: str) -> None:
    p = policy(engine=engine)
    batch = batch_of(p)
    want = frozenset({"logp", "entropy"})
    with torch.no_grad():
        whole = p.evaluate(batch, want)
        for i in (0, 4, 8):
            alone = p.evaluate(batch.rows(slice(i, i + 1)), want)
            torch.testing.assert_close(alone["logp"][0], whole["logp"][i], atol=1e-5, rtol=1e-5)
        order = torch.randperm(9, generator=torch.Generator().manual_seed(0))
        mixed = p.evaluate(batch.rows(order), want)
        torch.testing.assert_close(mixed["logp"], whole["logp"][order], atol=1e-5, rtol=1e-5)
        wide = Batch.cat([batch.pad(11)])
        context = {k: torch.nn.functional.pad(v, (7, 0)) for k, v in batch.context.items()}
        padded = p.evaluate(Batch(mask=wide.mask, action=wide.action, context=context), want)
    assert padded["logp"].shape == (9, 11)
    torch.testing.assert_close(padded["logp"][:, : batch.shape[1]], whole["logp"], atol=1e-5, rtol=1e-5)


def test_exact_engine_gives_the_same_bits_when_sampling_and_training() -> None:
    p = policy(engine="exact")
    batch = batch_of(p)
    with torch.no_grad():
        whole = p.evaluate(batch, frozenset({"logp"}))["logp"]
        alone = p.evaluate(batch.rows(torch.tensor([6])), frozenset({"logp", "entropy"}))
    assert torch.equal(batch.stats["logp@behaviour"][batch.mask], whole[batch.mask])
    assert torch.equal(alone["logp"][0], whole[6])


def test_chunks_equal_the_whole_with_gradients() -> None:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(37, 8, generator=generator, requires_grad=True)
    weight = torch.randn(50, 8, generator=generator, requires_grad=True)
    action = torch.randint(50, (37,), generator=generator)
    temperature = torch.rand(37, generator=generator) + 0.5
    results = []
    for chunk in (1 << 20, 50 * 5):
        hidden.grad = weight.grad = None
        out = chunked(hidden, action, temperature, lambda h: h @ weight.T, 50, frozenset({"logp", "entropy"}), chunk)
        (out["logp"].sum() + out["entropy"].pow(2).sum()).backward()
        results.append((out["logp"].detach(), out["entropy"].detach(), hidden.grad.clone(), weight.grad.clone()))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


def test_unknown_statistic_is_refused_with_the_nearest() -> None:
    p = policy()
    with pytest.raises(ValueError, match="did you mean 'entropy'"):
        p.evaluate(batch_of(p), frozenset({"entropi"}))


def test_shared_prompts_are_found_by_content() -> None:
    ids, known = pad_left([[3, 4], [3, 4], [4], [0, 4], [3, 4]], 0)
    first, inverse = shared(ids, known)
    assert len(first) == 3  # a PAD id that is a real token makes another prompt
    assert inverse[0] == inverse[1] == inverse[4]
    assert len({int(i) for i in inverse[[0, 2, 3]]}) == 3


def test_a_sampled_pad_token_has_an_embedding_gradient() -> None:
    p = policy(engine="general", model={"tie_word_embeddings": False})
    ids, known = pad_left([[5, 6]], 0)
    batch = Batch(
        mask=torch.ones(1, 3, dtype=torch.bool), action=torch.tensor([[7, 0, 8]]), context={"prompt": ids, "prompt_mask": known}
    )
    p.evaluate(batch, frozenset({"logp"}))["logp"].sum().backward()
    assert p.backbone.causal.get_input_embeddings().weight.grad[0].abs().sum() > 0


def test_architectures_that_the_fast_engine_does_not_know_go_the_general_way() -> None:
    b = backbone("gpt2")
    assert not supports(b)
    p = LMPolicy(b, max_new_tokens=4)
    assert p.engine.name == "general"
    batch = batch_of(p, limit=4)
    with torch.no_grad():
        torch.testing.assert_close(batch.stats["logp@behaviour"], naive(p, batch)[0], atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match="gpt2"):
        LMPolicy(b, engine="fast")


def test_sliding_windows_are_left_to_the_general_engine() -> None:
    assert supports(backbone("mistral", sliding_window=None))
    assert not supports(backbone("mistral", sliding_window=4))
    assert isinstance(LMPolicy(backbone("qwen2")).engine, FastEngine)


def test_end_tokens_are_those_of_tokenizer_and_generation_settings() -> None:
    b = backbone()
    b.causal.generation_config.eos_token_id = [EOS, 9]
    assert b.ends == (EOS, 9)


def test_bfloat16_stays_close() -> None:
    p = policy(engine="fast", dtype="bfloat16")
    batch = batch_of(p)
    with torch.no_grad():
        found = p.evaluate(batch, frozenset({"logp"}))["logp"]
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, naive(p, batch)[0].detach(), atol=0.2, rtol=0.1)
    torch.testing.assert_close(found, batch.stats["logp@behaviour"], atol=0.1, rtol=0.1)
