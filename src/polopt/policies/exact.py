"""Exact quantities of a table policy in its world: all answers and groups with their probabilities, J, V, Q, gradients."""

from __future__ import annotations

from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from polopt.batch import Batch
from polopt.columns import last_valid
from polopt.errors import CallError
from polopt.policies.table import TablePolicy
from polopt.stats import OLD
from polopt.tasks.table_world import World

LARGEST = 2_000_000  # rows


def answer_rows(world: World) -> Batch:
    """Every answer to every prompt, once: P x A rows in the order (prompt, answer), scored without noise."""
    node, action, mask = (x.repeat(world.prompts, 1) for x in world.tree.answers())
    item = torch.arange(world.prompts).repeat_interleave(len(node) // world.prompts)
    return judged(world, item, node, action, mask)


def judged(world: World, item: Tensor, node: Tensor, action: Tensor, mask: Tensor) -> Batch:
    """The batch of these answers: what each decision pays, ends as in text (a cut answer is judged too), no noise."""
    rows = item[:, None], node, action
    reward = torch.where(mask[..., None], world.reward.to(item.device)[rows], 0.0)
    last = last_valid(mask)
    cut = (world.tree.cut().to(item.device)[node, action] & last).any(1)
    right = (world.right.to(item.device)[rows] & last).any(1)
    return Batch(
        mask=mask, reward=reward, terminated=last, truncated=last & cut[:, None], obs=node, action=action,
        keys={"item": item}, units={"item": world.prompts}, horizon=world.tree.horizon,
        row={"truncated": cut.double(), "right": right.double(), "length": mask.sum(1).double()},
    )  # fmt: skip


def enumerate_answers(world: World, policy: TablePolicy) -> Batch:
    """Every answer with `row["probability"]`, that of prompt (1/P) and answer, under the policy as it is now (no gradient).

    Groups are prompts. `logp@behaviour` and `logp@old` are filled in, and `logp@ref`.
    """
    batch = answer_rows(world).to(policy.device)
    logp = policy.evaluate(batch, frozenset({"logp"}), OLD)["logp"]
    batch = replace(batch, row={**batch.row, "probability": logp.sum(1).exp() / world.prompts})
    return _with_stats(policy, batch.with_key("group", batch.keys["item"]), logp)


def _with_stats(policy: TablePolicy, batch: Batch, logp: Tensor) -> Batch:
    from polopt.stats import REF

    ref = policy.evaluate(batch, frozenset({"logp"}), REF)["logp"]
    return batch.adding({"logp@behaviour": logp, "logp@old": logp, "logp@ref": ref})


def all_groups(world: World, policy: TablePolicy, size: int) -> Batch:
    """Every group of `size` answers to the same prompt: P x A^size groups of `size` rows each, in this order.

    `row["probability"]` is that of the row's group (1/P times that of its answers). For small worlds: raises `CallError` beyond
    two million rows.
    """
    answers = enumerate_answers(world, policy)
    count = answers.shape[0] // world.prompts
    groups = world.prompts * count**size
    if groups * size > LARGEST:
        raise CallError(f"{count} answers to {world.prompts} prompts make {groups} groups of {size}: too many to enumerate")
    within = torch.cartesian_prod(*[torch.arange(count)] * size).view(-1, size)
    index = (torch.arange(world.prompts)[:, None, None] * count + within).reshape(-1, size)
    probability = (answers.row["probability"][index] * world.prompts).prod(1) / world.prompts
    rows = answers.rows(index.reshape(-1))
    rows = replace(rows, row={**rows.row, "probability": probability.repeat_interleave(size)})
    return rows.with_key("group", torch.arange(groups).repeat_interleave(size))


# -------------------------------------------------------------------- values and gradients
def objective(policy: TablePolicy, reward: Float[Tensor, "P N V"] | None = None) -> Float[Tensor, ""]:
    """J: the expected return of an answer to a random prompt, differentiable; `reward` defaults to the world's, without noise."""
    return values(policy, reward)[1][:, 0].mean()


def values(
    policy: TablePolicy, reward: Float[Tensor, "P N V"] | None = None
) -> tuple[Float[Tensor, "P N V"], Float[Tensor, "P N"]]:
    """Q and V of every node by backward induction, undiscounted, differentiable."""
    reward = policy.world.total_reward() if reward is None else reward
    return policy.world.tree.backward(policy.probabilities(), reward.to(policy.device))


def gradient(policy: TablePolicy, reward: Float[Tensor, "P N V"] | None = None) -> dict[str, Tensor]:
    """The exact gradient of J in the policy's tables, by parameter name ("own", "shared")."""
    named = dict(policy.net.named_parameters())
    found = torch.autograd.grad(objective(policy, reward), list(named.values()))
    return dict(zip(named, found, strict=True))


def expected(policy: TablePolicy, what: Float[Tensor, "P N V"], pi: Float[Tensor, "P N V"] | None = None) -> Float[Tensor, " P"]:
    """The expected sum of a number on decisions over an answer, by prompt."""
    pi = policy.probabilities() if pi is None else pi
    return policy.world.tree.backward(pi, what.to(pi.device))[1][:, 0]


def divergence(policy: TablePolicy) -> Float[Tensor, " P"]:
    """KL(policy || reference) of whole answers, by prompt, differentiable."""
    logp = policy.table().log_softmax(-1)
    return expected(policy, logp - policy.reference.log_softmax(-1))


def entropy(policy: TablePolicy) -> Float[Tensor, " P"]:
    """Entropy of whole answers in nats, by prompt, differentiable."""
    return expected(policy, -policy.table().log_softmax(-1))


__all__ = [
    "all_groups", "answer_rows", "divergence", "entropy", "enumerate_answers", "expected", "gradient", "judged", "objective",
    "values",
]  # fmt: skip
