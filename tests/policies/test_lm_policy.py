"""The policy around the engines: adapters, reference, values, saving and loading."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from lm_models import backbone, policy, tokenizer

from polopt.batch import Batch
from polopt.errors import CallError, PoloptError
from polopt.loops.flat import FlatParameters
from polopt.policies.lm import LMPolicy, Sampling, load_pretrained, wrap
from polopt.policies.lm.model import load_backbone, resolve
from polopt.policies.lm.prompts import pad_left
from polopt.stats import NOW, OLD, REF

LOGP = frozenset({"logp"})


def batch_of(p: LMPolicy, n: int = 6) -> Batch:
    prompts = [[5, 6, 7], [9]]
    spread = torch.arange(n) % 2
    drawn = p.generate(prompts, spread, torch.Generator().manual_seed(0))
    ids, known = pad_left(prompts, 0)
    return Batch(mask=drawn.mask, action=drawn.action, context={"prompt": ids[spread], "prompt_mask": known[spread]})


def move(p: LMPolicy, batch: Batch) -> None:
    """One gradient step on everything that is trained."""
    parameters = [x for net in p.nets().values() for x in net.parameters() if x.requires_grad]
    out = p.evaluate(batch, frozenset({"logp", "value"}) if p.value_head is not None else LOGP)
    sum(x.sum() for x in out.values()).backward()
    with torch.no_grad():
        for x in parameters:
            if x.grad is not None:
                x -= 0.05 * x.grad.sign()
                x.grad = None


@pytest.mark.parametrize("engine", ["fast", "general"])
def test_lora_trains_adapters_alone_and_its_reference_is_the_base(engine: str) -> None:
    plain = policy(engine=engine)
    p = policy(lora=2, engine=engine)
    batch = batch_of(plain)
    base = plain.evaluate(batch, LOGP)["logp"].detach()
    torch.testing.assert_close(p.evaluate(batch, LOGP)["logp"].detach(), base, atol=1e-6, rtol=1e-6)
    assert all(("lora" in n) == x.requires_grad for n, x in p.backbone.module.named_parameters())
    for _ in range(2):
        move(p, batch)
    assert (p.evaluate(batch, LOGP)["logp"] - base).abs().max() > 1e-3
    reference = p.evaluate(batch, LOGP, REF)["logp"]
    torch.testing.assert_close(reference, base, atol=1e-6, rtol=1e-6)
    assert not reference.requires_grad


def test_the_fast_engine_generates_with_adapters_merged() -> None:
    b = backbone(lora=2)
    fast, general = (LMPolicy(b, max_new_tokens=6, engine=e) for e in ("fast", "general"))
    move(fast, batch_of(fast))
    move(fast, batch_of(fast))
    uniform = torch.rand(6, 4, generator=torch.Generator().manual_seed(0))
    one, two = (p.generate([[5, 6]], [0] * 4, None, uniform=uniform) for p in (fast, general))
    assert torch.equal(one.action, two.action)
    torch.testing.assert_close(one.logp, two.logp, atol=1e-5, rtol=1e-5)


def test_frozen_reference_stays_while_the_policy_moves() -> None:
    p = policy(reference=True)
    batch = batch_of(p)
    before = p.evaluate(batch, LOGP, OLD)["logp"]
    assert not before.requires_grad
    move(p, batch)
    torch.testing.assert_close(p.evaluate(batch, LOGP, REF)["logp"], before)
    assert not torch.allclose(p.evaluate(batch, LOGP, NOW)["logp"], before)
    assert set(p.nets()) == {"policy"}
    with pytest.raises(PoloptError, match="reference=True"):
        policy().evaluate(batch, LOGP, REF)


@pytest.mark.parametrize("engine", ["fast", "general"])
def test_value_head_is_linear_in_the_state_before_each_token(engine: str) -> None:
    p = policy(value=True, engine=engine)
    batch = batch_of(p)
    out = p.evaluate(batch, frozenset({"value", "value_next", "logp"}))
    assert p.value_head is not None
    for i in range(batch.shape[0]):
        n = int(batch.mask[i].sum())
        ids = torch.cat([batch.context["prompt"][i][batch.context["prompt_mask"][i]], batch.action[i, :n]])
        hidden = p.backbone.decoder(input_ids=ids[None]).last_hidden_state[0, -n - 1 : -1]
        expected = (hidden @ p.value_head.linear.weight.T + p.value_head.linear.bias)[:, 0]
        torch.testing.assert_close(out["value"][i, :n], expected, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(out["value_next"][i, : n - 1], expected[1:], atol=1e-5, rtol=1e-5)
        assert out["value_next"][i, n - 1] == 0
    out["value"].sum().backward()
    assert p.value_head.linear.weight.grad is not None
    assert p.backbone.decoder.embed_tokens.weight.grad is not None
    with pytest.raises(PoloptError, match="value head"):
        policy().evaluate(batch, frozenset({"value"}))


def test_value_head_depends_on_seed_and_name_alone() -> None:
    torch.manual_seed(1)
    one = policy(value=True, seed=3)
    torch.manual_seed(2)
    two, other = policy(value=True, seed=3), policy(value=True, seed=4)
    a, b, c = (p.state()["parameters"]["value/linear.weight"] for p in (one, two, other))
    assert torch.equal(a, b)
    assert not torch.equal(a, c)


def test_a_batch_without_valid_decisions_gives_zeros() -> None:
    p = policy(value=True)
    batch = batch_of(p)
    empty = Batch(mask=torch.zeros_like(batch.mask), action=batch.action, context=batch.context)
    out = p.evaluate(empty, frozenset({"logp", "value"}))
    assert all(not x.any() for x in out.values())
    parameters = list(p._tensors().values())
    for x in out.values():
        found = torch.autograd.grad(x.sum(), parameters, allow_unused=True, retain_graph=True)
        assert any(g is not None for g in found)
        assert all(g is None or not g.any() for g in found)
    assert not p.evaluate(empty, LOGP, OLD)["logp"].requires_grad
    assert p.tokens(empty) == 0


@pytest.mark.parametrize(("engine", "prompts"), [("fast", 3 + 1), ("general", 3 * (3 + 1))])
def test_tokens_of_a_forward_pass(engine: str, prompts: int) -> None:
    """Six rows answer two prompts of 3 and 1 tokens in turns."""
    p = policy(engine=engine)
    batch = batch_of(p)
    assert p.tokens(batch) == int(batch.mask.sum()) + prompts
    assert p.tokens(batch.rows(slice(0, 1))) == int(batch.mask[0].sum()) + 3


def test_saving_shows_no_bar_of_its_own(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    from transformers.utils import logging

    logging.enable_progress_bar()  # type: ignore[no-untyped-call]
    policy().save_pretrained(tmp_path / "model")
    assert capfd.readouterr() == ("", "")
    assert logging.is_progress_bar_enabled()


def test_rows_remember_the_temperature_they_were_sampled_at() -> None:
    p = policy()
    batch = batch_of(p)
    with torch.no_grad():
        heat = torch.tensor([0.5, 1.0, 2.0, 0.5, 1.0, 2.0])
        mixed = p.evaluate(Batch(mask=batch.mask, action=batch.action, context=batch.context, row={"temperature": heat}), LOGP)[
            "logp"
        ]
        for t in (0.5, 1.0, 2.0):
            q = LMPolicy(p.backbone, sampling=Sampling(temperature=t), max_new_tokens=6)
            torch.testing.assert_close(mixed[heat == t], q.evaluate(batch, LOGP)["logp"][heat == t], atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("lora", [0, 2])
def test_state_restores_every_bit_also_of_flat_parameters(lora: int) -> None:
    p, q = policy(lora=lora, value=True, reference=not lora), policy(lora=lora, value=True, reference=not lora)
    FlatParameters(q.nets())
    batch = batch_of(p)
    move(p, batch)
    state = p.state()
    wanted = p.evaluate(batch, frozenset({"logp", "value"}))
    move(p, batch)  # the state is a copy
    q.load(state)
    found = q.evaluate(batch, frozenset({"logp", "value"}))
    assert torch.equal(found["logp"], wanted["logp"])
    assert torch.equal(found["value"], wanted["value"])
    assert all("lora" in k or k.startswith("value") for k in state["parameters"]) == bool(lora)


def test_a_state_of_another_model_is_refused() -> None:
    state = policy().state()
    with pytest.raises(PoloptError, match="another model"):
        policy(model={"num_hidden_layers": 1}).load(state)
    with pytest.raises(PoloptError, match="shape"):
        policy(model={"intermediate_size": 64}).load(state)
    with pytest.raises(PoloptError, match="reference model differs"):
        policy(model={"seed": 5}, reference=True).load(policy(reference=True).state())


@pytest.mark.parametrize("lora", [0, 2])
def test_saved_policies_load_here_and_in_transformers(lora: int, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    p = policy(lora=lora, value=True, sampling=Sampling(temperature=0.5, stop=("zz",)))
    FlatParameters(p.nets())
    batch = batch_of(p)
    move(p, batch)
    move(p, batch)
    before = p.state()
    p.save_pretrained(tmp_path / "out")
    assert all(torch.equal(before["parameters"][k], v) for k, v in p.state()["parameters"].items())
    q = load_pretrained(tmp_path / "out")
    assert q.sampling == p.sampling
    want = frozenset({"logp", "value"})
    with torch.no_grad():
        one, two = p.evaluate(batch, want), q.evaluate(batch, want)
    torch.testing.assert_close(one["logp"], two["logp"], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(one["value"], two["value"], atol=1e-5, rtol=1e-5)
    prompts = ["abc", "d"]
    assert p.predict(prompts) == q.predict(prompts)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    tok = AutoTokenizer.from_pretrained(tmp_path / "out")
    ids = tok("abc", return_tensors="pt")["input_ids"]
    plain = model.generate(ids, max_new_tokens=6, do_sample=False)[0, ids.shape[1] :]
    assert tok.decode(plain, skip_special_tokens=True) == p.predict("abc")
    assert json.loads((tmp_path / "out" / "polopt.json").read_text())["domain"] == "text"


def test_predict_takes_one_or_many_and_chats() -> None:
    p = policy(max_new_tokens=5)
    single = p.predict("ab")
    assert isinstance(single, str)
    assert p.predict(["ab"]) == [single]
    assert p.predict([{"role": "user", "content": "ab"}]) == single
    assert p.predict([]) == []
    assert p.predict("ab", greedy=False, seed=1) == p.predict("ab", greedy=False, seed=1)


def test_chat_templates_are_used_where_the_tokenizer_has_one() -> None:
    tok = tokenizer()
    tok.chat_template = "{% for m in messages %}x{{ m['content'] }}{% endfor %}{% if add_generation_prompt %}y{% endif %}"
    p = LMPolicy(wrap(backbone().causal, tok), max_new_tokens=3)
    assert p.encode("ab") == tok("xaby")["input_ids"]
    assert p.encode([{"role": "system", "content": "a"}, {"role": "user", "content": "b"}]) == tok("xaxby")["input_ids"]


def test_models_that_cannot_be_found_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CallError, match=r"config\.json"):
        resolve(str(tmp_path))
    with pytest.raises(CallError, match="neither a folder nor an id"):
        resolve("no such model")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(PoloptError, match="could not be loaded"):
        load_backbone(str(tmp_path))


def test_damaged_saved_policy_is_named(tmp_path: Path) -> None:
    (tmp_path / "polopt.json").write_text("{")
    with pytest.raises(PoloptError, match=r"polopt\.json"):
        load_pretrained(tmp_path)
