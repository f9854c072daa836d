"""Losses of the language methods written from their papers with plain loops over answers and tokens, and random batches."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch

from polopt.batch import Batch

#: Methods whose first update is about answers in groups.
GROUP_METHODS = ("grpo", "dr-grpo", "dapo", "gspo", "cispo", "rloo")
LANGUAGE_METHODS = (*GROUP_METHODS, "ppo-lm", "reinforce")


@dataclass
class Answers:
    """Token statistics as lists of unequal length, with one reward and one group per answer."""

    logp: list[np.ndarray]
    old: list[np.ndarray]
    ref: list[np.ndarray]
    value: list[np.ndarray]
    old_value: list[np.ndarray]
    reward: np.ndarray
    group: np.ndarray
    limit: int

    @classmethod
    def draw(cls, seed: int, groups: int = 3, limit: int = 6, far: float = 0.6) -> Answers:
        rng = np.random.default_rng(seed)
        group = np.concatenate([[g] * rng.integers(1, 5) for g in range(groups)])
        length = rng.integers(1, limit + 1, size=len(group))

        def tokens(scale: float = 1.0) -> list[np.ndarray]:
            return [rng.normal(size=n) * scale for n in length]

        old = [x - 2.0 for x in tokens(0.5)]
        return cls(
            logp=[o + far * e for o, e in zip(old, tokens(), strict=True)], old=old,
            ref=[o + 0.3 * e for o, e in zip(old, tokens(), strict=True)], value=tokens(), old_value=tokens(),
            reward=rng.choice([0.0, 1.0, 0.3], size=len(group)), group=group, limit=limit,
        )  # fmt: skip

    def batch(self, width: int | None = None, order: np.ndarray | None = None) -> tuple[Batch, torch.Tensor, torch.Tensor]:
        """The same answers as a right-padded batch in another row order; (batch, logp leaf, value leaf), float64."""
        order = np.arange(len(self.reward)) if order is None else order
        width = width or self.limit
        mask = np.zeros((len(order), width), dtype=bool)

        def pad(rows: list[np.ndarray], fill: float) -> torch.Tensor:
            out = np.full((len(order), width), fill)
            for i, r in enumerate(order):
                out[i, : len(rows[r])] = rows[r]
                mask[i, : len(rows[r])] = True
            return torch.tensor(out)

        logp, value = pad(self.logp, -7.0).requires_grad_(), pad(self.value, 5.0).requires_grad_()
        old_value = pad(self.old_value, 3.0)
        shifted = [np.append(v[1:], 0.0) for v in self.old_value]
        batch = Batch.of(
            logp=logp, logp_old=pad(self.old, -1.0), logp_ref=pad(self.ref, -4.0), value=value,
            stats={"value@old": old_value}, value_next=pad(shifted, 9.0), reward=torch.tensor(self.reward[order]),
            group=torch.tensor(self.group[order]), mask=torch.tensor(mask), horizon=self.limit,
        )  # fmt: skip
        return batch, logp, value


def group_advantage(a: Answers, reward: np.ndarray, *, std: bool = True, loo: bool = False) -> np.ndarray:
    out = np.zeros(len(reward))
    for i in range(len(reward)):
        mine = reward[a.group == a.group[i]]
        if len(mine) == 1 or mine.max() == mine.min():
            continue
        others = reward[(a.group == a.group[i]) & (np.arange(len(reward)) != i)]
        out[i] = reward[i] - (others.mean() if loo else mine.mean())
        if std:
            out[i] /= mine.std(ddof=1) + 1e-4
    return out


def clip_loss(log_ratio: float, advantage: float, low: float, high: float) -> float:
    r = math.exp(log_ratio)
    return -min(r * advantage, min(max(r, 1 - low), 1 + high) * advantage)


def overlong(a: Answers, share: float = 0.2) -> np.ndarray:
    out = np.zeros(len(a.reward))
    cache = share * a.limit
    for i, o in enumerate(a.old):
        n = len(o)
        if n > a.limit - cache:
            out[i] = ((a.limit - cache) - n) / cache if n <= a.limit else -1.0
    return out


def reference(name: str, a: Answers, frozen: list[np.ndarray] | None = None) -> float:
    """The loss of a method; `frozen` holds the log-probabilities at which detached weights are taken."""
    frozen = a.logp if frozen is None else frozen
    rows: list[list[float]] = []
    if name == "ppo-lm":
        return ppo_lm(a)
    kl = np.array([float((o - r).sum()) for o, r in zip(a.old, a.ref, strict=True)])
    advantage = {
        "grpo": lambda: group_advantage(a, a.reward),
        "dr-grpo": lambda: group_advantage(a, a.reward, std=False),
        "dapo": lambda: group_advantage(a, a.reward + overlong(a)),
        "gspo": lambda: group_advantage(a, a.reward),
        "cispo": lambda: group_advantage(a, a.reward),
        "rloo": lambda: group_advantage(a, a.reward - 0.03 * kl, std=False, loo=True),
        "reinforce": lambda: a.reward,
    }[name]()
    for i, (new, old, ref) in enumerate(zip(a.logp, a.old, a.ref, strict=True)):
        row = []
        for t in range(len(new)):
            d, A = new[t] - old[t], float(advantage[i])
            if name == "grpo":
                gap = ref[t] - new[t]
                row.append(clip_loss(d, A, 0.2, 0.2) + 0.04 * (math.exp(gap) - gap - 1))
            elif name == "dr-grpo":
                row.append(clip_loss(d, A, 0.2, 0.2))
            elif name == "dapo":
                row.append(clip_loss(d, A, 0.2, 0.28))
            elif name == "gspo":
                row.append(clip_loss(float(np.mean(new - old)), A, 3e-4, 4e-4))
            elif name == "cispo":
                row.append(-min(math.exp(frozen[i][t] - old[t]), 5.0) * A * new[t])
            else:
                row.append(-A * new[t])
        rows.append(row)
    if name in ("dapo", "cispo"):
        return sum(map(sum, rows)) / sum(map(len, rows))
    if name in ("grpo", "gspo"):
        return sum(sum(r) / len(r) for r in rows) / len(rows)
    return sum(map(sum, rows)) / len(rows) / (a.limit if name == "dr-grpo" else 1)


def ppo_lm(a: Answers) -> float:
    """Per-token KL in the reward, GAE(1, 0.95), standardised over all tokens, clip 0.2, value clip 0.2 with weight 0.05."""
    advantages, returns = [], []
    for i in range(len(a.reward)):
        r = -0.05 * (a.old[i] - a.ref[i])
        r[-1] += a.reward[i]
        v, n = a.old_value[i], len(r)
        adv, later = np.zeros(n), 0.0
        for t in reversed(range(n)):
            later = r[t] + (v[t + 1] if t + 1 < n else 0.0) - v[t] + 0.95 * later
            adv[t] = later
        advantages.append(adv)
        returns.append(adv + v)
    every = np.concatenate(advantages)
    total = 0.0
    for i, adv in enumerate(advantages):
        standard = (adv - every.mean()) / (every.std(ddof=1) + 1e-8)
        for t in range(len(adv)):
            near = a.old_value[i][t] + np.clip(a.value[i][t] - a.old_value[i][t], -0.2, 0.2)
            total += clip_loss(a.logp[i][t] - a.old[i][t], standard[t], 0.2, 0.2)
            total += 0.05 * max((a.value[i][t] - returns[i][t]) ** 2, (near - returns[i][t]) ** 2)
    return total / len(every)
