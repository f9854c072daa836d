"""KL-Cov: no clip at all; the tokens whose covariance is highest are held near the old policy, which keeps the entropy up.

    C_t = (log pi_t - mean log pi)(A_t - mean A) over the minibatch;   entropy falls by about eta mean C per step
    loss = (1/sum_i |o_i|) sum_t [ -r_t A_t + beta |log pi_t - log pi_old,t| 1{C_t among the rho N largest} ]

Against GRPO: the plain ratio, the penalty on few tokens in place of the KL to the reference, every token counts the
same, eight gradient steps per batch. Cui et al., "The entropy mechanism of reinforcement learning for reasoning
language models" (arXiv 2505.22617), eq. 13. rho = 2e-3 and beta = 1 are those of the 7B model (32B: 2e-4).

Not included: dynamic sampling, with which the scripts run (`--sampler dynamic`).
"""

from math import inf

from polopt.claim import Floor, Miniature, Neutral
from polopt.methods.language.grpo import GRPO
from polopt.parts.aggregate import TokenMean
from polopt.parts.penalty.kl_cov import KLCov
from polopt.parts.surrogate.score import Ratio
from polopt.registry import register

KL_COV = register(
    GRPO.but(
        "kl-cov",
        surrogate=Ratio(),
        penalty=KLCov(coef=1.0, share=2e-3),
        aggregate=TokenMean(),
        minibatches=8,
        title="KL-Cov",
        paper="2505.22617",
        year=2025,
        card=60,
        doc=__doc__ or "",
        claim="Policies escape the collapse of their entropy and perform better downstream than GRPO's.",
        miniature=Miniature(
            "table:tree", "40k-decisions", "Is left with more entropy than GRPO without its KL penalty.",
            metric="eval_entropy", seeds=10, settings={"minibatches": 4, "epochs": 4, "rule.lr": 0.05},
            own={"penalty.share": 0.1, "penalty.coef": 2.0}, other={"penalty.coef": 0.0},
            first=100,
        ),
        floor=Floor("text:spell_backward", "12-updates", 0.5, settings={"evaluate.points": 2, "evaluate.episodes": 128}),
        builds_on=("clip-cov",),
        neutral={
            "surrogate": Neutral(parent={"low": inf, "high": inf}),
            "penalty.kl-cov": Neutral(own={"coef": 0.0}),
            "penalty.kl-ref": Neutral(parent={"coef": 0.0}),
            "aggregate": Neutral(batch=("equal-lengths",)),
        },
    )
)  # fmt: skip
