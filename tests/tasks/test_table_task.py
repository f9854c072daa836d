"""`table:` tasks: the tree's arithmetic against brute force, calibrated starts, what each dial does, and refusals."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from polopt.errors import CallError
from polopt.policies import exact
from polopt.policies.table import TablePolicy
from polopt.tasks import make
from polopt.tasks.table import TableTask, table_names
from polopt.tasks.table_tree import Tree, calibrated, tilted

TREES = [Tree(3, 3), Tree(2, 4), Tree(4, 1, eos=False), Tree(2, 3, eos=False), Tree(4, 2), Tree(3, 1)]


def brute(tree: Tree) -> list[tuple[int, ...]]:
    """All answers as tuples of symbols."""
    found = []
    for n in range(1, tree.horizon + 1):
        for y in itertools.product(range(tree.symbols), repeat=n):
            if tree.eos:
                inside, last = all(s < tree.width for s in y[:-1]), y[-1] == tree.symbols - 1 or n == tree.horizon
            else:
                inside, last = True, n == tree.horizon
            if inside and last:
                found.append(y)
    return found


def random_policy(tree: Tree, prompts: int = 2, seed: int = 0) -> torch.Tensor:
    rng = torch.Generator().manual_seed(seed)
    return torch.randn(prompts, tree.nodes, tree.symbols, generator=rng, dtype=torch.float64)


def path(tree: Tree, y: tuple[int, ...]) -> list[int]:
    nodes = [0]
    for s in y[:-1]:
        nodes.append(nodes[-1] * tree.width + 1 + s)
    return nodes


def probability(tree: Tree, pi: torch.Tensor, y: tuple[int, ...]) -> float:
    out = 1.0
    for n, s in zip(path(tree, y), y, strict=True):
        out *= float(pi[n, s])
    return out


@pytest.mark.parametrize("tree", TREES, ids=str)
def test_answers_are_all_strings_once(tree: Tree) -> None:
    node, action, mask = tree.answers()
    found = [tuple(a[m].tolist()) for a, m in zip(action, mask, strict=True)]
    assert sorted(found) == sorted(brute(tree))
    for n, y, m in zip(node, found, mask, strict=True):
        assert n[m].tolist() == path(tree, y)
    last_node, last_action = tree.last()
    assert [y[-1] for y in found] == last_action.tolist()
    assert node.gather(1, mask.sum(1, keepdim=True) - 1).squeeze(1).tolist() == last_node.tolist()
    assert int(tree.cut().sum()) == (tree.width**tree.horizon if tree.eos else 0)


@pytest.mark.parametrize("tree", TREES, ids=str)
def test_backward_induction_is_the_sum_over_answers(tree: Tree) -> None:
    pi, reward = random_policy(tree).softmax(-1), random_policy(tree, seed=1)
    q, v = tree.backward(pi, reward)
    for p in range(2):
        total = 0.0
        for y in brute(tree):
            total += probability(tree, pi[p], y) * sum(float(reward[p, n, s]) for n, s in zip(path(tree, y), y, strict=True))
        assert float(v[p, 0]) == pytest.approx(total, abs=1e-12)
    torch.testing.assert_close(v, (pi * q).sum(-1))
    reach = tree.reach(pi)
    torch.testing.assert_close((reach[..., None] * pi * tree.ends()).sum((1, 2)), torch.ones(2, dtype=torch.float64))
    assert float(reach[0, -1]) <= 1.0


@pytest.mark.parametrize("tree", TREES, ids=str)
def test_tilting_reweights_whole_answers(tree: Tree) -> None:
    logits, bonus = random_policy(tree, 1), random_policy(tree, 1, seed=1)
    pi, new = logits.softmax(-1)[0], tilted(tree, logits, bonus).exp()[0]
    weight = {
        y: probability(tree, pi, y) * math.exp(sum(float(bonus[0, n, s]) for n, s in zip(path(tree, y), y, strict=True)))
        for y in brute(tree)
    }
    for y, w in weight.items():
        assert probability(tree, new, y) == pytest.approx(w / sum(weight.values()), rel=1e-9)


def test_calibration_is_exact_and_keeps_proportions() -> None:
    tree = Tree(3, 3)
    logits = random_policy(tree)
    which = torch.zeros(2, tree.nodes, 3, dtype=torch.bool)
    which[:, 1, 2] = which[0, 4, 2] = True
    wanted = torch.tensor([0.3, 0.01], dtype=torch.float64)
    pi, old = calibrated(tree, logits, [(which, wanted)]).exp(), logits.softmax(-1)
    torch.testing.assert_close(tree.backward(pi, which.double())[1][:, 0], wanted)
    a, b = (0, 0, 2), (1, 2)  # neither is in the class: their odds stay
    assert probability(tree, pi[0], a) / probability(tree, pi[0], b) == pytest.approx(
        probability(tree, old[0], a) / probability(tree, old[0], b), rel=1e-9
    )


# -------------------------------------------------------------------- calibrated starts
@pytest.mark.parametrize(("name", "hardest", "easiest"), [
    ("table:arms", 0.05, 0.5), ("table:tree", 0.02, 0.2), ("table:bank", 0.005, 0.99), ("table:lengths", 0.1, 0.4),
])  # fmt: skip
@pytest.mark.parametrize("seed", [0, 7])
def test_initial_chances_are_those_of_the_options(name: str, hardest: float, easiest: float, seed: int) -> None:
    world = TableTask(name, {"seed": seed}).world
    chance = exact.expected(TablePolicy(world), world.right.double()).detach()
    assert float(chance[0]) == pytest.approx(hardest, rel=1e-9)
    assert float(chance[-1]) == pytest.approx(easiest, rel=1e-9)
    steps = chance.logit().diff()
    torch.testing.assert_close(steps, steps[:1].expand_as(steps))  # evenly in log-odds
    torch.testing.assert_close(world.initial.logsumexp(-1), torch.zeros_like(world.initial[..., 0]), atol=1e-9, rtol=0)


def test_a_single_prompt_lies_in_the_middle() -> None:
    world = TableTask("table:arms", {"prompts": 1, "hardest": 0.2, "easiest": 0.2}).world
    assert exact.expected(TablePolicy(world), world.right.double()).tolist()[0] == pytest.approx(0.2, rel=1e-9)


def test_traps_are_likely_and_pay_a_little() -> None:
    world = TableTask("table:tree", {"traps": 3, "trap_start": 0.4, "trap_reward": 0.25}).world
    trap = world.scores["trap"]
    assert trap.sum((1, 2)).tolist() == [3.0] * 16
    assert not bool((trap.bool() & world.right).any())
    chance = exact.expected(TablePolicy(world), trap).detach()
    torch.testing.assert_close(chance, torch.full_like(chance, 0.4))
    assert set(world.total_reward()[trap.bool()].tolist()) == {0.25}


def test_right_answers_of_a_tree_end_before_the_limit() -> None:
    world = TableTask("table:tree", {"right": 3}).world
    assert world.right.sum((1, 2)).tolist() == [3] * 16
    depth = world.tree.depths()[world.right.nonzero()[:, 1]] + 1
    assert int(depth.min()) >= 3
    assert int(depth.max()) <= world.tree.horizon - 1
    assert not bool((world.right & world.tree.cut()).any())


def test_lengths_has_right_answers_of_every_length_and_a_bias() -> None:
    world = TableTask("table:lengths").world
    depth = world.tree.depths()
    for prompt in world.right:
        assert sorted({int(depth[n]) + 1 for n in prompt.nonzero()[:, 0]}) == list(range(2, 9))
    means = []
    for bias in (-0.5, 0.0, 0.5):
        biased = TableTask("table:lengths", {"bias": bias}).world
        policy = TablePolicy(biased)
        means.append(float(exact.expected(policy, torch.ones_like(biased.initial)).mean().detach()))
        assert exact.expected(policy, biased.right.double()).tolist()[0] == pytest.approx(0.1, rel=1e-9)
    assert means[0] < means[1] - 0.5 < means[2] - 1.0


def test_style_is_standardised_and_its_proxy_can_be_gamed() -> None:
    """The exact maximiser of E[proxy] - beta KL: as beta falls the proxy rises throughout, the true score rises and then falls."""
    world = TableTask("table:style", {"proxy": 1.0}).world
    pi = world.initial.exp()
    for x in world.scores.values():
        mean = world.tree.backward(pi, x)[1][:, 0]
        torch.testing.assert_close(mean, torch.zeros_like(mean), atol=1e-9, rtol=0)
        square = world.tree.backward(pi, x.square())[1][:, 0]
        torch.testing.assert_close(square, torch.ones_like(square))
    torch.testing.assert_close(world.total_reward(), world.scores["proxy"])
    curve = []
    for inverse_beta in (0.0, 0.5, 1.0, 4.0, 16.0):
        best = tilted(world.tree, world.initial, inverse_beta * world.scores["proxy"]).exp()
        curve.append([float(world.tree.backward(best, world.scores[k])[1][:, 0].mean()) for k in ("gold", "proxy")])
    gold, proxy = zip(*curve, strict=True)
    assert list(proxy) == sorted(proxy)
    assert max(gold) > 0.2
    assert gold[-1] < -0.5


def test_graded_arms_have_one_best() -> None:
    world = TableTask("table:arms", {"reward": "graded", "noise": 0.1}).world
    assert world.noise_kind == "gauss"
    value = world.total_reward()[:, 0]
    assert value.argmax(-1).tolist() == world.right[:, 0].double().argmax(-1).tolist()
    assert float(value.max()) == 1.0
    assert float(value.sort(-1).values[:, -2].max()) < 0.8
    assert len(value.unique()) > 8


# -------------------------------------------------------------------- dials
def test_dense_pays_the_same_along_the_way() -> None:
    sparse, dense = (TableTask("table:tree", {"dense": d, "traps": 1}).world for d in (0.0, 1.0))
    one, two = exact.answer_rows(sparse), exact.answer_rows(dense)
    torch.testing.assert_close(one.outcome(), two.outcome())
    right = two.row["right"].bool()
    first = two.scalar_reward()[right][:, 0]
    torch.testing.assert_close(first, torch.full_like(first, 1 / 5))  # one of five steps towards an answer worth 1
    assert not bool(one.scalar_reward()[right][:, 0].any())


def test_families_share_right_answers() -> None:
    world = TableTask("table:bank", {"prompts": 60, "families": 20}).world
    assert world.families == 20
    assert bool((world.right[0] == world.right[20]).all())
    assert not bool((world.right == world.right[0]).all())
    assert TableTask("table:tree").world.families == 16


def test_the_world_depends_on_its_own_seed_alone() -> None:
    worlds = [TableTask("table:tree", {"seed": s}).world for s in (0, 0, 1)]
    assert torch.equal(worlds[0].initial, worlds[1].initial)
    assert torch.equal(worlds[0].right, worlds[1].right)
    assert not torch.equal(worlds[0].right, worlds[2].right)


# -------------------------------------------------------------------- the task
def test_options_are_listed_with_help() -> None:
    for name in table_names():
        task = make(name)
        options = task.option_fields()  # type: ignore[attr-defined]
        assert options["seed"][0] == 0
        assert all(about for _, about in options.values())
        assert task.domain == "table"
    assert make("table:bank").option_fields()["share"][0] == 1.0  # type: ignore[attr-defined]


@pytest.mark.parametrize(("name", "options", "words"), [
    ("table:tre", {}, "did you mean 'tree'"),
    ("table:tree", {"prompt": 3}, "did you mean 'prompts'"),
    ("table:tree", {"prompts": 2.5}, "prompts = 2.5"),
    ("table:tree", {"prompts": True}, "must be int"),
    ("table:tree", {"prompts": 0}, ">= 1"),
    ("table:tree", {"easiest": 1.0}, "< 1"),
    ("table:tree", {"families": 17}, "exceeds options.prompts = 16"),
    ("table:arms", {"reward": "grade"}, "graded"),
])  # fmt: skip
def test_wrong_options_are_refused(name: str, options: dict[str, object], words: str) -> None:
    with pytest.raises(CallError, match=words):
        make(name, options)


@pytest.mark.parametrize(("name", "options", "words"), [
    ("table:tree", {"right": 500}, "answers can be chosen"),
    ("table:tree", {"length": 14, "symbols": 6}, "too large"),
    ("table:tree", {"traps": 1, "easiest": 0.8}, "leave nothing"),
    ("table:arms", {"right": 8}, "must be below"),
])  # fmt: skip
def test_impossible_worlds_are_refused(name: str, options: dict[str, object], words: str) -> None:
    with pytest.raises(CallError, match=words):
        _ = TableTask(name, options).world
