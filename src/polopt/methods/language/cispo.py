"""CISPO: importance weights are capped, and no token loses its gradient.

    loss = (1/sum_i |o_i|) sum_i sum_t -sg(min(r_{i,t}, cap)) A_i log pi(o_{i,t})

Against GRPO: the capped, detached weight on a score-function loss instead of the clip, every token counts the same, no
KL penalty, several gradient steps per batch. MiniMax, "MiniMax-M1" (arXiv 2506.13585), eq. 4 and 5. The paper clips
from above only and does not publish the bound; 5 is TRL's.

Not included: the dynamic sampling and length penalty that the paper takes over from DAPO (`--sampler dynamic --reward
soft-overlong`), and its early stop of repetitive answers.
"""

from math import inf

from polopt.claim import Floor, Miniature, Neutral
from polopt.methods.language.grpo import GRPO
from polopt.parts.aggregate import TokenMean
from polopt.parts.surrogate.capped_weight import CappedWeight
from polopt.registry import register

CISPO = register(
    GRPO.but(
        "cispo",
        surrogate=CappedWeight(cap=5.0),
        penalty=(),
        aggregate=TokenMean(),
        minibatches=4,
        title="Clipped Importance Sampling Policy Optimization",
        paper="2506.13585",
        year=2025,
        doc=__doc__ or "",
        claim="Twice as fast as DAPO on AIME 2024 with Qwen2.5-32B.",
        miniature=Miniature(
            "table:tree", "40k-decisions",
            "With DAPO's sampler and length penalty, and several epochs, learns faster than DAPO: the surrogate alone differs.",
            baseline="dapo", reduce="auc", seeds=10, settings={"epochs": 4, "minibatches": 4},
            own={"sampler": "dynamic", "reward": "soft-overlong"},
        ),
        floor=Floor("text:spell_backward", "12-updates", 0.5, settings={"evaluate.points": 2, "evaluate.episodes": 128}),
        builds_on=("dapo",),
        neutral={
            "surrogate": Neutral(own={"cap": inf}, parent={"low": inf, "high": inf}, equal="gradient"),
            "penalty.kl-ref": Neutral(parent={"coef": 0.0}),
            "aggregate": Neutral(batch=("equal-lengths",)),
        },
    )
)  # fmt: skip
