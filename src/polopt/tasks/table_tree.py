"""Trees of answers: every prefix of symbols is a node, numbered so that children and parents are found by arithmetic.

Nothing here is sampled or stored per prefix: levels of the tree are slices, so that sums over all answers are a few tensor
operations, differentiable and exact.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor


@dataclass(frozen=True)
class Tree:
    """Answers of at most T = `horizon` decisions over V = `symbols`; with `eos`, the last symbol ends an answer.

    A decision is taken at a node, the prefix of symbols that go on (W of them). Node 0 is the empty prefix and child a of node n
    is W n + 1 + a, so that the nodes of a level are one slice in lexical order. Without `eos` every answer has T symbols; with it,
    an answer that reaches T decisions without the ending symbol is cut there.
    """

    symbols: int
    horizon: int
    eos: bool = True

    @property
    def width(self) -> int:
        """W: symbols after which an answer goes on."""
        return self.symbols - 1 if self.eos else self.symbols

    @property
    def nodes(self) -> int:
        """N: prefixes at which a decision is taken."""
        return self.first(self.horizon)

    def first(self, depth: int) -> int:
        """The first node of a level, which is also the number of nodes above it."""
        return int(sum(self.width**d for d in range(depth)))

    def level(self, depth: int) -> slice:
        """The nodes of a level."""
        return slice(self.first(depth), self.first(depth + 1))

    def depths(self) -> Int[Tensor, " N"]:
        """Decisions taken before each node. Like `ends` and `cut` computed once; not to be changed in place."""
        return _depths(self)

    def ends(self) -> Bool[Tensor, "N V"]:
        """Decisions after which an answer is over."""
        return _ends(self)

    def cut(self) -> Bool[Tensor, "N V"]:
        """Decisions after which an answer is over because it reached the limit."""
        return _cut(self)

    def child(self, node: Tensor, action: Tensor) -> Tensor:
        """The node after an action that goes on (any number for one that ends)."""
        return node * self.width + 1 + action

    # ---------------------------------------------------------------- sums over all answers
    def backward(
        self, pi: Float[Tensor, "*P N V"], reward: Float[Tensor, "*P N V"]
    ) -> tuple[Float[Tensor, "*P N V"], Float[Tensor, "*P N"]]:
        """Q and V of the policy `pi` (probabilities) for rewards of decisions, by backward induction; differentiable."""
        return self._induct(reward, lambda d, q: (pi[..., self.level(d), :] * q).sum(-1))

    def soft_backward(self, logp: Float[Tensor, "*P N V"], bonus: Float[Tensor, "*P N V"]) -> Float[Tensor, "*P N V"]:
        """log E[exp(sum of `bonus` from a decision on)] under the policy with log-probabilities `logp`, for each decision."""
        return self._induct(bonus, lambda d, q: (logp[..., self.level(d), :] + q).logsumexp(-1))[0]

    def best(self, reward: Float[Tensor, "*P N V"]) -> Float[Tensor, "*P N"]:
        """The largest return that can still be had from each node."""
        return self._induct(reward, lambda d, q: q.amax(-1))[1]

    def _induct(self, reward: Tensor, fold: Callable[[int, Tensor], Tensor]) -> tuple[Tensor, Tensor]:
        qs: list[Tensor] = []
        vs: list[Tensor] = []
        for d in reversed(range(self.horizon)):
            q = reward[..., self.level(d), :]
            if vs:
                after = vs[-1].view(*vs[-1].shape[:-1], self.width**d, self.width)
                q = q + (F.pad(after, (0, 1)) if self.eos else after)
            qs.append(q)
            vs.append(fold(d, q))
        return torch.cat(qs[::-1], -2), torch.cat(vs[::-1], -1)

    def reach(self, pi: Float[Tensor, "*P N V"]) -> Float[Tensor, "*P N"]:
        """Probability of coming to each node."""
        found = [torch.ones_like(pi[..., :1, 0])]
        for d in range(self.horizon - 1):
            found.append((found[-1][..., None] * pi[..., self.level(d), : self.width]).flatten(-2))
        return torch.cat(found, -1)

    # ---------------------------------------------------------------- answers one by one
    def answers(self) -> tuple[Int[Tensor, "A T"], Int[Tensor, "A T"], Bool[Tensor, "A T"]]:
        """Every answer: nodes, actions and mask of its decisions, in the order of their last decisions (node, action)."""
        last, final = self.ends().nonzero().unbind(1)
        depth = self.depths()[last]
        up = [last]
        for _ in range(self.horizon - 1):
            up.append(((up[-1] - 1).div(self.width, rounding_mode="floor")).clamp(min=0))
        ancestors = torch.stack(up, 1)  # [A,T]: k steps above the last node
        t = torch.arange(self.horizon)
        mask = t <= depth[:, None]
        node = ancestors.gather(1, (depth[:, None] - t).clamp(min=0))
        node = torch.where(mask, node, 0)
        onward = torch.cat([node[:, 1:], torch.zeros_like(node[:, :1])], 1) - 1
        action = torch.where(t == depth[:, None], final[:, None], onward.clamp(min=0) % self.width)
        return node, torch.where(mask, action, 0), mask

    def last(self) -> tuple[Int[Tensor, " A"], Int[Tensor, " A"]]:
        """Node and action of the last decision of every answer, in the order of `answers`."""
        node, action = self.ends().nonzero().unbind(1)
        return node, action


@functools.lru_cache(maxsize=64)
def _depths(tree: Tree) -> Tensor:
    return torch.arange(tree.horizon).repeat_interleave(torch.tensor([tree.width**d for d in range(tree.horizon)]))


@functools.lru_cache(maxsize=64)
def _ends(tree: Tree) -> Tensor:
    over = (_depths(tree) == tree.horizon - 1)[:, None].repeat(1, tree.symbols)
    if tree.eos:
        over[:, -1] = True
    return over


@functools.lru_cache(maxsize=64)
def _cut(tree: Tree) -> Tensor:
    over = torch.zeros(tree.nodes, tree.symbols, dtype=torch.bool)
    if tree.eos:
        over[tree.level(tree.horizon - 1), :-1] = True
    return over


def tilted(tree: Tree, logits: Float[Tensor, "P N V"], bonus: Float[Tensor, "P N V"]) -> Float[Tensor, "P N V"]:
    """Log-probabilities of the policy whose answers have probabilities proportional to pi(y) exp(bonus of y's decisions).

    With a bonus of score / beta it is the policy that maximises E[score] - beta KL(. || pi).
    """
    found: Tensor = (logits.log_softmax(-1) + tree.soft_backward(logits.log_softmax(-1), bonus)).log_softmax(-1)
    return found


def calibrated(
    tree: Tree, logits: Float[Tensor, "P N V"], classes: list[tuple[Bool[Tensor, "P N V"], Float[Tensor, " P"]]]
) -> Float[Tensor, "P N V"]:
    """The policy nearest to `logits` under which the answers of each class (last decisions) have exactly the wanted probability.

    Classes are disjoint; what is left is that of all other answers. Probabilities lie strictly between 0 and 1.
    """
    logp = logits.log_softmax(-1)
    ends = tree.ends()
    bonus = torch.zeros_like(logp)
    rest, left = ends.expand_as(bonus).clone(), torch.ones(len(logp), dtype=logp.dtype)
    for which, wanted in classes:
        rest, left = rest & ~which, left - wanted
    for which, wanted in [*classes, (rest, left)]:
        mass = tree.backward(logp.exp(), which.to(logp.dtype))[1][:, 0]
        bonus = bonus + which * (wanted / mass).log()[:, None, None]
    return tilted(tree, logp, bonus)


__all__ = ["Tree", "calibrated", "tilted"]
