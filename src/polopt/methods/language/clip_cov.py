"""Clip-Cov: a tiny random share of the tokens whose covariance is high gets no gradient, which keeps the entropy up.

    C_t = (log pi_t - mean log pi)(A_t - mean A) over the minibatch;   entropy falls by about eta mean C per step
    loss = (1/sum_i |o_i|) sum_t -w_t min(r_t A_t, clip(r_t, 1-e, 1+e) A_t),   w_t = 0 for rho N random tokens with
    1 < C_t < 5 that are not clipped already, else 1

Against GRPO: the weight w, a wide clip, every token counts the same, no KL penalty, eight gradient steps per batch. Cui
et al., "The entropy mechanism of reinforcement learning for reasoning language models" (arXiv 2505.22617), eq. 11 and
12. rho = 2e-4, the bounds of C and the clip e = 1 are those of the released scripts, whose minibatches hold about a
million tokens; with a few thousand take rho near 1e-2 (`weight.share`). Dropped tokens stay in the denominator.

Not included: dynamic sampling, with which the scripts run (`--sampler dynamic`), and the paper's fit of reward against
entropy, R = b - a e^H.
"""

from polopt.claim import Floor, Miniature, Neutral
from polopt.methods.language.grpo import GRPO
from polopt.parts.aggregate import TokenMean
from polopt.parts.surrogate.clip import Clip
from polopt.parts.weight.clip_cov import ClipCov
from polopt.registry import register

CLIP_COV = register(
    GRPO.but(
        "clip-cov",
        surrogate=Clip(low=1.0, high=1.0),
        weight=ClipCov(share=2e-4, lower=1.0, upper=5.0),
        penalty=(),
        aggregate=TokenMean(),
        minibatches=8,
        title="Clip-Cov",
        paper="2505.22617",
        year=2025,
        card=60,
        doc=__doc__ or "",
        claim="Policies escape the collapse of their entropy and perform better downstream than GRPO's.",
        miniature=Miniature(
            "table:tree", "40k-decisions", "Is left with more entropy than GRPO without its KL penalty.",
            metric="eval_entropy", seeds=10, settings={"minibatches": 4, "rule.lr": 0.1},
            own={"weight.share": 0.1, "weight.lower": 0.2}, other={"penalty.coef": 0.0},
            first=100,
        ),
        floor=Floor("text:spell_backward", "12-updates", 0.5, settings={"evaluate.points": 2, "evaluate.episodes": 128}),
        builds_on=("ppo", "dapo"),
        neutral={
            "weight.clip-cov": Neutral(own={"lower": 5.0}),
            "penalty.kl-ref": Neutral(parent={"coef": 0.0}),
            "aggregate": Neutral(batch=("equal-lengths",)),
        },
    )
)  # fmt: skip
