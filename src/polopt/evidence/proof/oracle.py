"""The exact oracle: a method's expected first gradient, by full enumeration in small worlds, against what theory says it is.

Expectations are sums over every answer (or every group of answers) times its probability, of the gradient of the method's loss on
a batch of just that answer (that group). Nothing is sampled. The truth comes from elsewhere: the gradient of the expected return by
autograd through the enumeration, and closed forms. What applies follows from the parts that a method is made of.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from polopt import objective
from polopt.batch import Batch
from polopt.method import Method
from polopt.parts.advantage.beta_normalised import BetaNormalised
from polopt.parts.advantage.decoupled import Decoupled
from polopt.parts.advantage.gae import GAE, NStep
from polopt.parts.advantage.group import GroupBaseline
from polopt.parts.advantage.monte_carlo import MonteCarlo
from polopt.parts.advantage.optimal_value import OptimalAdvantage
from polopt.parts.aggregate import SeqMeanTokenMean, SeqMeanTokenSum, SeqMeanTokenSumNorm, TokenMean
from polopt.parts.penalty.entropy import EntropyBonus
from polopt.parts.penalty.kl import KLToReference
from polopt.parts.reward.kl import KLInReward
from polopt.parts.select.replaced import DropReplaced
from polopt.parts.source import Fresh
from polopt.parts.surrogate.clip import SequenceClip
from polopt.parts.surrogate.regression import AdvantageRegression, RelativeRegression
from polopt.policies import exact
from polopt.policies.table import TablePolicy
from polopt.stats import NOW, split
from polopt.tasks.table_tree import Tree
from polopt.tasks.table_world import World
from polopt.update import Update, default_rule

TOLERANCE = 1e-10
#: Group sizes that are enumerated.
SIZES = (2, 3)
Gradient = Mapping[str, Tensor]


@dataclass(frozen=True)
class OracleResult:
    """Largest deviation found from the truth, as a share of the truth's largest entry; without: parts of losses left out of it."""

    name: str
    error: float
    tolerance: float
    detail: str
    without: tuple[str, ...] = ()

    @property
    def holds(self) -> bool:
        """Whether the deviation is within the tolerance (NaN is not)."""
        return self.error <= self.tolerance


def oracle(method: Method) -> OracleResult | None:
    """Hold the expected gradient of a method's loss against the truth; None where no truth is known for its parts.

    Covered: returns-to-go with any baseline, GAE and n-step returns with exact values (undiscounted, not standardised), baselines
    and scales within groups, regressions on advantages and on pairs; rewards that are a function of a decision's prefix; penalties
    on a bandit.
    """
    update = next((u for u in method.updates if "surrogate" in u.terms), None)
    if update is None or method.decoder is not None or not isinstance(method.source, Fresh):
        return None
    first = regression_check(method, update) or surrogate_check(method, update)
    if first is None:
        return None
    penalties = penalty_checks(method, update)
    found = [first, *((f"{part}, all answers of a bandit", e) for part, e in penalties)]
    detail = "; ".join(f"{what}: {e:.1e}" for what, e in found)
    known = {part for part, _ in penalties}
    return OracleResult("expected gradient", max(e for _, e in found), TOLERANCE, detail, left_out(method, update, known))


def left_out(method: Method, update: Update, known: Collection[str]) -> tuple[str, ...]:
    """Parts of the losses of a method that the oracle says nothing about: all but the surrogate's and the penalties `known`."""
    covered = {"surrogate", "aggregate", *known}
    acting = [path for path, _ in method.slots(update).acting() if path not in covered and not path.startswith("select.")]
    others = [f"update {u.name}" for u in method.updates if u is not update]
    return tuple(acting + others)


# -------------------------------------------------------------------- worlds
def small_world(*, eos: bool, horizon: int, symbols: int, binary: bool = False, prompts: int = 2, seed: int = 0) -> World:
    """A random world: rewards at every decision, or 0/1 at the end of answers; prompts of one family share half of their logits."""
    rng = torch.Generator().manual_seed(seed)
    tree = Tree(symbols, horizon, eos=eos)
    shape = (prompts, tree.nodes, symbols)
    draws = torch.randn(shape, generator=rng, dtype=torch.float64)
    right = (draws > 0) & tree.ends()
    node, action = (int(x[-1]) for x in tree.last())
    right[:, node, action], right[:, 0 if horizon == 1 else tree.nodes - 1, 0] = True, False  # both kinds, for every prompt
    reward = right.double() if binary else draws
    initial = torch.randn(shape, generator=rng, dtype=torch.float64).log_softmax(-1)
    family = torch.arange(prompts) % 2
    return World(tree, reward[..., None], right, {"score": right.double()}, initial, family, share=0.5)


def moved_policy(world: World, seed: int = 1) -> TablePolicy:
    """A policy that has left its reference."""
    policy = TablePolicy(world)
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in policy.net.parameters():
            p.add_(torch.randn(p.shape, generator=rng, dtype=p.dtype), alpha=0.5)
    return policy


# -------------------------------------------------------------------- both sides
def expected_gradient(
    method: Method, policy: TablePolicy, batch: Batch, size: int, update: Update | None = None
) -> dict[str, Tensor]:
    """sum_u p(u) grad loss({u}) over units of `size` consecutive rows; p is each unit's `row["probability"]`. Keys: parameters."""
    update = update or method.update()
    memory, want = method.memory(policy.world.prompts), split(method.needs(update)).get("now", frozenset())
    named = dict(policy.net.named_parameters())
    total = {k: torch.zeros_like(v) for k, v in named.items()}
    for first in range(0, batch.shape[0], size):
        unit = batch.rows(slice(first, first + size))
        advantage = objective.advantages(method, update, unit, memory)
        loss, _ = objective.loss(method, update, unit, policy.evaluate(unit, want, NOW), advantage, None, memory)
        if loss.requires_grad:
            found = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
            for k, g in zip(named, found, strict=True):
                total[k] += unit.row["probability"][0] * (torch.zeros_like(total[k]) if g is None else g)
    return total


def deviation(found: Gradient, truth: Gradient) -> float:
    """Largest difference, as a share of the truth's largest entry (absolute where the truth is 0)."""
    scale = max(float(t.abs().max()) for t in truth.values()) or 1.0
    return max(float((found[k] - truth[k]).abs().max()) for k in truth) / scale


def reward_table(method: Method, policy: TablePolicy) -> Float[Tensor, "P N V"] | None:
    """What the method's reward parts make of the world's rewards, by decision; None if that depends on more than its prefix."""
    world = policy.world
    batch = exact.enumerate_answers(world, policy)
    with torch.no_grad():
        reward = objective.shaped(method, batch, method.memory(world.prompts)).scalar_reward()
    table = torch.zeros_like(world.initial)
    rows = batch.keys["item"][:, None].expand_as(batch.mask), batch.obs, batch.action
    table[tuple(r[batch.mask] for r in rows)] = reward[batch.mask]
    same = torch.where(batch.mask, table[rows] - reward, 0.0).abs().max() < 1e-12
    return table if bool(same) else None


def true_reward(method: Method, policy: TablePolicy, shaped: Float[Tensor, "P N V"]) -> Float[Tensor, "P N V"]:
    """Rewards with the same returns as the method's should have: written out for the divergence, else what its parts made."""
    if not all(isinstance(part, KLInReward) for part in method.reward):
        return shaped
    with torch.no_grad():
        gap = policy.table().log_softmax(-1) - policy.reference.log_softmax(-1)
        beta = sum(part.beta for part in method.reward if isinstance(part, KLInReward))
        found: Tensor = policy.world.total_reward() - beta * gap
    return found


# -------------------------------------------------------------------- the surrogate
def surrogate_check(method: Method, update: Update) -> tuple[str, float] | None:
    """The surrogate term's expected first gradient: what was compared, and the deviation."""
    slots = method.slots(update)
    # what was drawn by the policy alone holds no replaced row
    if any(not isinstance(p, DropReplaced) for p in slots.select) or not getattr(slots.surrogate, "unit_slope", False):
        return None
    if scale_of(slots.aggregate, 1) is None:
        return None
    alone = surrogate_alone(method, update)
    if isinstance(slots.advantage, GroupBaseline):
        return _group_check(alone, slots.advantage)
    if isinstance(slots.advantage, BetaNormalised):  # of one prompt's success rate there is no distribution to fit
        return _group_check(alone, GroupBaseline(scale="none"), binary=True)
    if isinstance(slots.advantage, Decoupled):  # of one reward there is nothing to decouple
        return _group_check(alone, GroupBaseline(eps=slots.advantage.eps))
    if isinstance(slots.surrogate, SequenceClip) or not isinstance(slots.advantage, MonteCarlo | GAE | NStep):
        return None
    return _row_check(alone)


def regression_check(method: Method, update: Update) -> tuple[str, float] | None:
    """Regressions on log-ratios of answers: their expected gradient is a known multiple of a policy gradient.

    Of the reward less beta log(pi/pi_ref), times 2 beta, for a regression on advantages, wherever the policy is; times 4/eta at the
    policy that drew, for one on relative rewards of pairs.
    """
    slots = method.slots(update)
    surrogate, advantage = slots.surrogate, slots.advantage
    if slots.select or slots.weight or not isinstance(slots.aggregate, SeqMeanTokenSum):
        return None
    world = small_world(eos=True, horizon=2, symbols=3)
    policy = moved_policy(world)
    reward = reward_table(method, policy)
    alone = surrogate_alone(method, update)
    if reward is None:
        return None
    if isinstance(surrogate, AdvantageRegression) and isinstance(advantage, OptimalAdvantage):
        with torch.no_grad():
            reward = reward - surrogate.beta * (policy.table().log_softmax(-1) - policy.reference.log_softmax(-1))
        found = expected_gradient(alone, policy, exact.enumerate_answers(world, policy), 1)
        truth = {k: -2 * surrogate.beta * g for k, g in exact.gradient(policy, reward).items()}
        return "surrogate against 2 beta times the regularised policy gradient, all answers of a tree", deviation(found, truth)
    plain = isinstance(advantage, GroupBaseline) and advantage.scale == "none" and advantage.centre in ("group", "none")
    if isinstance(surrogate, RelativeRegression) and plain:
        found = expected_gradient(alone, policy, exact.all_groups(world, policy, 2), 2)
        slope = 4 / surrogate.eta if surrogate.form == "paper" else 4 * surrogate.eta
        truth = {k: -slope * g for k, g in exact.gradient(policy, true_reward(method, policy, reward)).items()}
        return f"surrogate against {slope:g} times the policy gradient, all pairs of answers of a tree", deviation(found, truth)
    return None


def surrogate_alone(method: Method, update: Update) -> Method:
    """The method with its surrogate term only, without weights, undiscounted, advantages not standardised."""
    slots = method.slots(update)
    fields = {k: v for k, v in (("gamma", 1.0), ("standardise", False)) if hasattr(slots.advantage, k)}
    assert slots.advantage is not None  # surrogate_check
    advantage = slots.advantage.but(**fields)
    plain = replace(update, terms=("surrogate",), advantage=advantage, critic=None, penalty=(), weight=None, rule=default_rule())
    return replace(method, updates=(plain,), critic=None, penalty=(), weight=())


def scale_of(aggregate: Any, length: int) -> float | None:
    """What an aggregate makes of 1 at each decision of one row of `length` decisions, per decision; None if not known."""
    if isinstance(aggregate, SeqMeanTokenSum):
        return 1.0
    if isinstance(aggregate, TokenMean | SeqMeanTokenMean):
        return 1.0 / length
    if isinstance(aggregate, SeqMeanTokenSumNorm):
        return 1.0 / (aggregate.length or length)
    return None


def _row_check(method: Method) -> tuple[str, float] | None:
    """Every answer by itself: the exact policy gradient. Means over decisions need answers of one length."""
    slots = method.slots(method.update())
    sums = isinstance(slots.aggregate, SeqMeanTokenSum | SeqMeanTokenSumNorm)
    world = small_world(eos=sums, horizon=3, symbols=3 if sums else 2)
    policy = moved_policy(world)
    reward = reward_table(method, policy)
    if reward is None:
        return None
    batch = exact.enumerate_answers(world, policy)
    assert slots.advantage is not None  # surrogate_check
    bootstraps = "value_next@old" in slots.advantage.needs
    what = "surrogate against the policy gradient, all answers of a tree"
    if "value@old" in slots.advantage.needs:
        batch = batch.adding(_values(policy, batch, reward if bootstraps else None))
        what += " (exact values)" if bootstraps else " (random baseline)"
    scale = scale_of(slots.aggregate, world.tree.horizon)
    assert scale is not None  # surrogate_check
    truth = {k: -scale * g for k, g in exact.gradient(policy, true_reward(method, policy, reward)).items()}
    return what, deviation(expected_gradient(method, policy, batch, 1), truth)


def _values(policy: TablePolicy, batch: Batch, reward: Tensor | None) -> dict[str, Tensor]:
    """Values of each decision's state and next state: the policy's own under `reward`, or any numbers at all."""
    tree = policy.world.tree
    if reward is None:
        value = torch.randn(policy.world.initial.shape[:2], generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    else:
        with torch.no_grad():
            value = exact.values(policy, reward)[1]
    item = batch.keys["item"][:, None]
    child = torch.where(tree.ends()[batch.obs, batch.action], 0, tree.child(batch.obs, batch.action))
    after = torch.where(tree.ends()[batch.obs, batch.action], 0.0, value[item, child])
    return {"value@old": value[item, batch.obs], "value_next@old": after}


def _group_check(method: Method, advantage: GroupBaseline, *, binary: bool = False) -> tuple[str, float] | None:
    """Every group of a small tree: the policy gradient, short by what a baseline that includes the row itself takes away.

    Where advantages are divided by the group's deviation: the closed form for two outcomes. `advantage`: what the method's own
    part is on a single group.
    """
    scaled = advantage.scale != "none"
    world = small_world(eos=False, horizon=2, symbols=2, binary=scaled or binary)
    policy = moved_policy(world)
    reward = reward_table(method, policy)
    if reward is None:
        return None
    scale = scale_of(method.slots(method.update()).aggregate, world.tree.horizon)
    assert scale is not None  # surrogate_check
    worst = 0.0
    for size in SIZES:
        meant = reward if scaled else true_reward(method, policy, reward)
        truth = two_outcomes(policy, meant, advantage, size) if scaled else _by_share(policy, meant, advantage, size)
        if truth is None:
            return None
        truth = {k: -scale * g for k, g in truth.items()}
        groups = exact.all_groups(world, policy, size)
        worst = max(worst, deviation(expected_gradient(method, policy, groups, size), truth))
    kind = (
        "the closed form for two outcomes" if scaled else "the policy gradient" + (" times (k-1)/k" if _itself(advantage) else "")
    )
    return f"surrogate against {kind}, all groups of {' and '.join(map(str, SIZES))} answers of a tree", worst


def _itself(advantage: GroupBaseline) -> bool:
    return advantage.centre in ("group", "batch")


def _by_share(policy: TablePolicy, reward: Tensor, advantage: GroupBaseline, size: int) -> Gradient:
    share = (size - 1) / size if _itself(advantage) else 1.0
    return {k: share * g for k, g in exact.gradient(policy, reward).items()}


def two_outcomes(policy: TablePolicy, reward: Float[Tensor, "P N V"], advantage: GroupBaseline, size: int) -> Gradient | None:
    """Closed form of E[(1/k) sum_i A_i grad log pi(y_i)] where returns are one of two numbers; None where they are more.

    With p the chance of the higher one, the x of k answers that have it binomial, and A(x) the advantages of the two kinds of
    answers in such a group: sum_x Bin(x; k, p) [x/k A_high(x) / p - (k-x)/k A_low(x) / (1-p)] grad p.
    """
    with torch.no_grad():
        batch = exact.enumerate_answers(policy.world, policy)
        paid = reward[batch.keys["item"][:, None], batch.obs, batch.action]
        outcome = torch.where(batch.mask, paid, 0.0).sum(1)
    low, high = float(outcome.min()), float(outcome.max())
    if not bool((((outcome - low).abs() < 1e-12) | ((outcome - high).abs() < 1e-12)).all()):
        return None
    # returns of whole answers, paid at once: (J - low) / (high - low) of a prompt is then the chance of the higher one
    chance = (exact.values(policy, reward)[1][:, 0] - low) / (high - low)
    total = torch.zeros((), dtype=torch.float64)
    for p in chance:
        total = total + _slope(float(p.detach()), low, high, advantage, size) * p / len(chance)
    named = dict(policy.net.named_parameters())
    return dict(zip(named, torch.autograd.grad(total, list(named.values())), strict=True))


def _slope(p: float, low: float, high: float, advantage: GroupBaseline, k: int) -> float:
    """The factor of grad p for one prompt."""
    total = 0.0
    for x in range(1, k):
        mean = (x * high + (k - x) * low) / k
        spread = math.sqrt((x * (high - mean) ** 2 + (k - x) * (low - mean) ** 2) / (k - advantage.ddof))
        loo = ((k * mean - high) / (k - 1), (k * mean - low) / (k - 1))
        centre = {"none": (0.0, 0.0), "leave-one-out": loo}.get(advantage.centre, (mean, mean))
        a_high, a_low = ((r - c) / (spread + advantage.eps) for r, c in zip((high, low), centre, strict=True))
        chance = math.comb(k, x) * p**x * (1 - p) ** (k - x)
        total += chance * (x / k * a_high / p - (k - x) / k * a_low / (1 - p))
    return total


# -------------------------------------------------------------------- penalties
def penalty_checks(method: Method, update: Update) -> list[tuple[str, float]]:
    """Expected gradients of known penalties on a bandit, where a decision is an answer: slot path and deviation of each.

    Entropy: that of -H. Estimates of the divergence to the reference, as losses on own samples: k1 has none, k2 that of
    KL(pi || ref), k3 that of KL(ref || pi).
    """
    if "penalty" not in update.terms:
        return []
    found = []
    world = small_world(eos=False, horizon=1, symbols=4)
    policy = moved_policy(world)
    scale = scale_of(method.slots(update).aggregate, 1)
    for part in method.slots(update).penalty:
        if not isinstance(part, KLToReference | EntropyBonus) or scale is None:
            continue
        alone = replace(update, terms=("penalty",), penalty=(part,))
        one = replace(method, updates=(alone,), reward=(), advantage=MonteCarlo())
        gradient = expected_gradient(one, policy, exact.enumerate_answers(world, policy), 1)
        named = dict(policy.net.named_parameters())
        truth = torch.autograd.grad(scale * part.coef * _penalty(part, policy), list(named.values()))
        found.append((f"penalty.{part.name}", deviation(gradient, dict(zip(named, truth, strict=True)))))
    return found


def _penalty(part: KLToReference | EntropyBonus, policy: TablePolicy) -> Float[Tensor, ""]:
    if isinstance(part, EntropyBonus):
        return -exact.entropy(policy).mean()
    if part.estimator == "k1":
        return 0.0 * exact.entropy(policy).mean()
    if part.estimator == "k2":
        return exact.divergence(policy).mean()
    ref = policy.reference.log_softmax(-1)
    return exact.expected(policy, ref - policy.table().log_softmax(-1), ref.exp()).mean()


__all__ = ["OracleResult", "expected_gradient", "moved_policy", "oracle", "small_world", "two_outcomes"]
