"""`World`: prompts, a tree of answers, what each decision pays, and the policy at the start: everything can be enumerated."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from polopt.tasks.table_tree import Tree


@dataclass(frozen=True)
class World:
    """P prompts whose answers are paths in one tree of N nodes and V symbols; float64 throughout.

    reward [P,N,V,K]: what each decision pays, by channel. right [P,N,V]: last decisions of right answers. scores: what an
    evaluation reports, by name, as numbers on last decisions; the first one is the score. initial: log-probabilities at the start.
    family [P]: prompts that share a table, added with weight `share` to the prompt's own. noise: chance that a verdict is flipped
    (flip: reward becomes 1 - reward) or standard deviation of what is added to the reward (gauss), at last decisions.
    """

    tree: Tree
    reward: Float[Tensor, "P N V K"]
    right: Bool[Tensor, "P N V"]
    scores: Mapping[str, Float[Tensor, "P N V"]]
    initial: Float[Tensor, "P N V"]
    family: Int[Tensor, " P"]
    channels: tuple[str, ...] = ("reward",)
    share: float = 0.0
    noise: float = 0.0
    noise_kind: Literal["flip", "gauss"] = "flip"

    @property
    def prompts(self) -> int:
        """P."""
        return self.reward.shape[0]

    @property
    def families(self) -> int:
        """Tables that prompts share."""
        return int(self.family.max()) + 1

    def total_reward(self) -> Float[Tensor, "P N V"]:
        """Rewards of decisions with channels added up, without noise."""
        return self.reward.sum(-1)


def spread_out(reward: Float[Tensor, "P N V"], tree: Tree, dense: float) -> Float[Tensor, "P N V"]:
    """The same returns, a share `dense` of them paid along the way: for each decision towards the best answer within reach.

    The potential of a node is (depth / T) times the best return from it; each decision pays the change of the potential (Ng,
    Harada and Russell 1999), which leaves every answer's sum as it was.
    """
    potential = tree.depths() / tree.horizon * tree.best(reward)
    after = torch.zeros_like(reward)
    for d in range(tree.horizon - 1):
        below = potential[:, tree.level(d + 1)].reshape(len(potential), -1, tree.width)
        after[:, tree.level(d), : tree.width] = below
    return reward + dense * (after - potential[..., None])


__all__ = ["World", "spread_out"]
