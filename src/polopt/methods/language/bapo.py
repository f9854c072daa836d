"""BAPO: clip bounds are searched for every minibatch, so that positive advantages keep their share in stale data.

    loss = -(1/sum_i |o_i|) sum_t min(r_t A_t, clip(r_t, c_low, c_high) A_t)
    (c_low, c_high): the first of (0.6, 1.2), (0.6, 1.25) ... (0.6, 3), (0.62, 3) ... (0.9, 3) at which
    sum_{A_t > 0} pi_old |min(...)| / sum_t pi_old |min(...)| >= rho_0 = 0.4

Against GRPO: these bounds, two passes of four gradient steps over every batch (staleness 8), every token counts the
same, no KL penalty. Xi et al., "BAPO: Stabilizing off-policy reinforcement learning for LLMs via balanced policy
optimization with adaptive clipping" (arXiv 2510.18927), eq. 8, algorithm 1; numbers of its section 5.1 (its
code's readme has rho_0 = 0.5). The released recipe raises c_low first, in other ranges, does not weigh by pi_old, asks
for P/N >= 0.5 and has a dual clip (`--surrogate balanced-clip-code`).
Data of earlier batches: `--source window`.

Not included: partial rollouts.
"""

from polopt.claim import Floor, Miniature, Neutral
from polopt.methods.language.grpo import GRPO
from polopt.parts.aggregate import TokenMean
from polopt.parts.surrogate.balanced_clip import BalancedClip
from polopt.registry import register

BAPO = register(
    GRPO.but(
        "bapo",
        surrogate=BalancedClip(),
        penalty=(),
        aggregate=TokenMean(),
        epochs=2,
        minibatches=4,
        title="Balanced Policy Optimization with Adaptive Clipping",
        paper="2510.18927",
        year=2025,
        card=3,
        doc=__doc__ or "",
        claim="A 7B model beats open ones of its size on AIME; stable training and entropy in off-policy settings.",
        miniature=Miniature(
            "table:tree", "40k-decisions",
            "On batches that are each used in four iterations learns faster than GRPO's clip, both without a KL penalty.",
            reduce="auc", seeds=10, other={"penalty.coef": 0.0},
            settings={"source": "window", "source.size": 4, "epochs": 2, "minibatches": 4, "rule.lr": 0.05},
            first=100,
        ),
        floor=Floor("text:spell_backward", "12-updates", 0.5, settings={"evaluate.points": 2, "evaluate.episodes": 128}),
        builds_on=("ppo", "dapo"),
        neutral={
            "surrogate": Neutral(own={"low_start": 0.8, "low_max": 0.8, "high_start": 1.2, "high_max": 1.2}),
            "penalty.kl-ref": Neutral(parent={"coef": 0.0}),
            "aggregate": Neutral(batch=("equal-lengths",)),
        },
    )
)  # fmt: skip
