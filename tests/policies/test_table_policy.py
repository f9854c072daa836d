"""`TablePolicy` and the exact quantities: statistics against NumPy, draws against probabilities, gradients against differences."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from polopt.batch import Batch
from polopt.errors import CallError, PoloptError
from polopt.policies import exact
from polopt.policies.table import TablePolicy, draw, load_pretrained
from polopt.stats import NOW, OLD, REF
from polopt.tasks.table import TableTask
from polopt.tasks.table_tree import Tree
from polopt.tasks.table_world import World

ALL = frozenset({"logp", "entropy", "dist", "value", "value_next"})


def world(tree: Tree, prompts: int = 2, share: float = 0.5, seed: int = 0) -> World:
    rng = torch.Generator().manual_seed(seed)
    shape = (prompts, tree.nodes, tree.symbols)
    initial = torch.randn(shape, generator=rng, dtype=torch.float64).log_softmax(-1)
    reward = torch.randn(shape, generator=rng, dtype=torch.float64)
    right = tree.ends() & (reward > 0)
    return World(tree, reward[..., None], right, {"score": right.double()}, initial, torch.arange(prompts) // 2, share=share)


def moved(w: World, value: bool = True, seed: int = 1) -> TablePolicy:
    policy, rng = TablePolicy(w, value=value), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for net in policy.nets().values():
            for p in net.parameters():
                p += torch.randn(p.shape, generator=rng, dtype=p.dtype)
    return policy


def log_softmax(x: np.ndarray) -> np.ndarray:
    x = x - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


@pytest.fixture
def policy() -> TablePolicy:
    return moved(world(Tree(3, 3), prompts=4))


# -------------------------------------------------------------------- statistics
def test_statistics_are_those_of_the_softmax(policy: TablePolicy) -> None:
    batch = exact.answer_rows(policy.world)
    found = {k: v.detach().numpy() for k, v in policy.evaluate(batch, ALL).items()}
    net = policy.net
    own, shared = net.own.detach().numpy(), net.shared.detach().numpy()  # type: ignore[union-attr]
    logp = log_softmax(own + 0.5 * shared[[0, 0, 1, 1]])
    value = policy.value.own.detach().numpy() + 0.5 * policy.value.shared.detach().numpy()[[0, 0, 1, 1]]  # type: ignore[union-attr]
    for i in range(0, batch.shape[0], 7):
        p, mask = int(batch.keys["item"][i]), batch.mask[i].numpy()
        node, action = batch.obs[i].numpy(), batch.action[i].numpy()
        assert found["logp"][i] == pytest.approx(np.where(mask, logp[p, node, action], 0), abs=1e-12)
        assert found["entropy"][i] == pytest.approx(np.where(mask, -(np.exp(logp) * logp).sum(-1)[p, node], 0), abs=1e-12)
        assert found["dist"][i] == pytest.approx(np.where(mask[:, None], logp[p, node], 0), abs=1e-12)
        assert found["value"][i] == pytest.approx(np.where(mask, value[p, node], 0), abs=1e-12)
        after = [value[p, node[t + 1]] if t + 1 < 3 and mask[t + 1] else 0.0 for t in range(3)]
        assert found["value_next"][i] == pytest.approx(after, abs=1e-12)


def test_views_and_gradients(policy: TablePolicy) -> None:
    batch = exact.answer_rows(policy.world)
    now, old = (policy.evaluate(batch, frozenset({"logp"}), view)["logp"] for view in (NOW, OLD))
    assert now.requires_grad
    assert not old.requires_grad
    assert torch.equal(now.detach(), old)
    ref = policy.evaluate(batch, frozenset({"logp"}), REF)["logp"]
    start = TablePolicy(policy.world).evaluate(batch, frozenset({"logp"}), OLD)["logp"]
    torch.testing.assert_close(ref, start, atol=1e-12, rtol=0)
    assert not torch.equal(ref, old)


def test_temperature_of_the_row(policy: TablePolicy) -> None:
    batch = exact.answer_rows(policy.world)
    hot = replace(batch, row={**batch.row, "temperature": torch.full((batch.shape[0],), 2.0, dtype=torch.float64)})
    wanted = log_softmax(policy.table().detach().numpy() / 2)
    p, node, action = batch.keys["item"][:, None].numpy(), batch.obs.numpy(), batch.action.numpy()
    found = policy.evaluate(hot, frozenset({"logp"}), OLD)["logp"].numpy()
    assert found == pytest.approx(np.where(batch.mask.numpy(), wanted[p, node, action], 0), abs=1e-12)


def test_kl_is_exact(policy: TablePolicy) -> None:
    batch = exact.answer_rows(policy.world)
    batch = batch.adding({"dist@old": policy.evaluate(batch, frozenset({"dist"}), REF)["dist"]})
    found = policy.evaluate(batch, frozenset({"kl"}))["kl"].detach().numpy()
    old, new = log_softmax(policy.reference.numpy()), log_softmax(policy.table().detach().numpy())
    kl = (np.exp(old) * (old - new)).sum(-1)
    wanted = np.where(batch.mask.numpy(), kl[batch.keys["item"][:, None].numpy(), batch.obs.numpy()], 0)
    assert found == pytest.approx(wanted, abs=1e-12)


def test_unknown_statistics_and_missing_values_are_refused(policy: TablePolicy) -> None:
    batch = exact.answer_rows(policy.world)
    with pytest.raises(CallError, match="no statistic 'varentropy'"):
        policy.evaluate(batch, frozenset({"varentropy"}))
    with pytest.raises(PoloptError, match="value=True"):
        TablePolicy(policy.world).evaluate(batch, frozenset({"value"}))


# -------------------------------------------------------------------- drawing
@pytest.mark.parametrize("tree", [Tree(3, 3), Tree(2, 2, eos=False)], ids=str)
def test_draws_follow_the_probabilities(tree: Tree) -> None:
    policy = moved(world(tree, prompts=1))
    n = 200_000
    node, action, mask, _ = draw(policy, torch.zeros(n, dtype=torch.long), torch.Generator().manual_seed(0))
    end = mask.sum(1, keepdim=True) - 1
    last = (node.gather(1, end) * tree.symbols + action.gather(1, end)).squeeze(1)
    count = torch.zeros(tree.nodes * tree.symbols, dtype=torch.float64).index_add(0, last, torch.ones(n, dtype=torch.float64))
    answers = exact.enumerate_answers(policy.world, policy)
    places = torch.stack(tree.last(), 1) @ torch.tensor([tree.symbols, 1])
    p = answers.row["probability"]
    assert float(count[places].sum()) == n
    score = (count[places] - n * p) / (n * p * (1 - p)).sqrt()
    assert float(score.abs().max()) < 4.5


def test_drawn_rows_end_where_they_end(policy: TablePolicy) -> None:
    item = torch.arange(4).repeat(50)
    node, action, mask, _ = draw(policy, item, torch.Generator().manual_seed(0))
    again = draw(policy, item, torch.Generator().manual_seed(0))
    assert all(torch.equal(a, b) for a, b in zip((node, action, mask), again, strict=False))
    ended = (action == 2) & mask
    assert not bool((ended[:, :-1] & mask[:, 1:]).any())
    assert bool((ended.any(1) | mask.all(1)).all())
    assert not bool(action[~mask].any())
    assert not bool(node[~mask].any())


def test_predict(policy: TablePolicy) -> None:
    one = policy.predict(2)
    assert policy.predict([0, 2])[1] == one
    node = 0
    for s in one:  # greedy: the most likely symbol at each node
        assert s == int(policy.table()[2, node].argmax())
        node = 2 * node + 1 + s
    assert policy.predict([1] * 30, greedy=False, seed=3) == policy.predict([1] * 30, greedy=False, seed=3)
    assert len({tuple(a) for a in policy.predict([1] * 30, greedy=False)}) > 1
    for bad in (4, [-1], [0.5]):
        with pytest.raises(CallError, match="from 0 to 3"):
            policy.predict(bad)


# -------------------------------------------------------------------- exact quantities
@pytest.mark.parametrize("tree", [Tree(3, 3), Tree(3, 1, eos=False), Tree(2, 3, eos=False)], ids=str)
def test_enumerated_answers(tree: Tree) -> None:
    policy = moved(world(tree, prompts=4))
    batch = exact.enumerate_answers(policy.world, policy)
    p = batch.row["probability"]
    assert float(p.sum()) == pytest.approx(1.0, abs=1e-12)
    torch.testing.assert_close(batch.pool(p, "group", "sum"), torch.full_like(p, 0.25))
    assert float((p * batch.outcome()).sum()) == pytest.approx(float(exact.objective(policy).detach()), abs=1e-12)
    chance = exact.expected(policy, policy.world.right.double()).mean().detach()
    assert float((p * batch.row["right"]).sum()) == pytest.approx(float(chance), abs=1e-12)
    logp, ref = batch.stats["logp@old"].sum(1), batch.stats["logp@ref"].sum(1)
    assert float((p * (logp - ref)).sum()) == pytest.approx(float(exact.divergence(policy).mean().detach()), abs=1e-12)
    assert float(-(p * logp).sum()) == pytest.approx(float(exact.entropy(policy).mean().detach()), abs=1e-12)


def test_values_satisfy_bellman(policy: TablePolicy) -> None:
    q, v = (x.detach() for x in exact.values(policy))
    tree, reward = policy.world.tree, policy.world.total_reward()
    torch.testing.assert_close(v, (policy.probabilities().detach() * q).sum(-1))
    for n in range(tree.nodes):
        for a in range(3):
            after = 0.0 if tree.ends()[n, a] else v[:, 2 * n + 1 + a]
            torch.testing.assert_close(q[:, n, a], reward[:, n, a] + after)


def test_gradient_against_finite_differences(policy: TablePolicy) -> None:
    found = exact.gradient(policy)
    assert set(found) == {"own", "shared"}
    for name, p in policy.net.named_parameters():
        for index in [(0, 0, 1), (1, 2, 2), (0, 1, 0)]:
            ends = []
            for step in (1e-6, -1e-6):
                with torch.no_grad():
                    p[index] += step
                    ends.append(float(exact.objective(policy)))
                    p[index] -= step
            assert float(found[name][index]) == pytest.approx((ends[0] - ends[1]) / 2e-6, abs=1e-8)


def test_all_groups_of_a_bandit() -> None:
    policy = moved(world(Tree(3, 1, eos=False), prompts=2))
    batch = exact.all_groups(policy.world, policy, 2)
    assert batch.shape == (2 * 9 * 2, 1)
    assert batch.units["group"] == 18
    assert float(batch.row["probability"][::2].sum()) == pytest.approx(1.0, abs=1e-12)
    pi = policy.probabilities().detach()[:, 0]
    pairs = batch.action.view(18, 2)
    item = batch.keys["item"].view(18, 2)[:, 0]
    torch.testing.assert_close(batch.row["probability"][::2], pi[item, pairs[:, 0]] * pi[item, pairs[:, 1]] / 2)
    with pytest.raises(CallError, match="too many to enumerate"):
        exact.all_groups(policy.world, policy, 14)


# -------------------------------------------------------------------- keeping
def test_state_is_exact_and_another_world_is_refused(policy: TablePolicy) -> None:
    other = TablePolicy(policy.world, value=True)
    other.load(policy.state())
    assert torch.equal(other.table(), policy.table())
    place = other.net.own.data_ptr()
    other.load(TablePolicy(policy.world, value=True).state())
    assert other.net.own.data_ptr() == place  # filled, not replaced
    assert not torch.equal(other.table(), policy.table())
    with pytest.raises(PoloptError, match=r"value\.own"):
        TablePolicy(policy.world).load(policy.state())
    with pytest.raises(PoloptError, match="shape"):
        moved(world(Tree(3, 2), prompts=4)).load(policy.state())


def test_a_saved_policy_answers_the_same(tmp_path: Path) -> None:
    task = TableTask("table:tree", {"prompts": 3, "seed": 4})
    policy = TablePolicy(task.world, value=True, task=task)
    with torch.no_grad():
        policy.net.own.mul_(3.0)
    policy.save_pretrained(tmp_path)
    again = load_pretrained(tmp_path)
    assert again.predict([0, 1, 2]) == policy.predict([0, 1, 2])
    assert torch.equal(again.table(), policy.table())
    assert set(again.nets()) == {"policy", "value"}
    (tmp_path / "policy.safetensors").unlink()
    with pytest.raises(PoloptError, match=r"policy\.safetensors is missing"):
        load_pretrained(tmp_path)
    (tmp_path / "policy.json").write_text('{"kind": "mlp"}')
    with pytest.raises(PoloptError, match="kind mlp"):
        load_pretrained(tmp_path)


def test_tokens_are_decisions(policy: TablePolicy) -> None:
    batch: Batch = exact.answer_rows(policy.world)
    assert policy.tokens(batch) == int(batch.mask.sum())
