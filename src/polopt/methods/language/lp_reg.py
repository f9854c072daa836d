"""Lp-Reg: rare tokens that wrong answers would punish away are held near a filtered version of the policy.

    q(a) = pi_old(a) / sum_{kept} pi_old   for a with pi_old(a) >= kappa max pi_old, else 0
    loss = (1/sum_i |o_i|) sum_i sum_t [ -min(r_t A_t, clip(r_t, 0, 10) A_t) + beta (e^d - d - 1) 1{t spared} ],
    d = log q(o_t) - log pi(o_t) > 0;   spared: of the tokens with A_t < 0 the rho share of lowest pi(o_t), if q keeps them

Against GRPO: the penalty on a few tokens in place of the KL to the reference, a clip so wide that it hardly acts, every
token counts the same. The filter tells a useful rare token from noise: what falls below kappa of the likeliest token
is noise and stays unprotected. Huang et al., "Low-probability tokens sustain exploration in reinforcement learning with
verifiable reward" (arXiv 2510.03222); kappa = 0.02, rho = 0.01, beta = 1 and the clip are those of the released code.

The paper writes KL(q || pi) over all tokens, the released code estimates from the drawn one (`penalty.form`). With that
code's clip a token of negative advantage is never clipped, so that its loss for spared tokens is the sum written here.
It ranks tokens within a micro-batch, here it is the minibatch. Not included: its share of positive tokens (0 there).
"""

from polopt.claim import Floor, Miniature, Neutral
from polopt.methods.language.grpo import GRPO
from polopt.parts.aggregate import TokenMean
from polopt.parts.penalty.low_probability import LowProbability
from polopt.parts.surrogate.clip import Clip
from polopt.registry import register

LP_REG = register(
    GRPO.but(
        "lp-reg",
        surrogate=Clip(low=1.0, high=9.0),
        penalty=LowProbability(coef=1.0, rho=0.01, kappa=0.02),
        aggregate=TokenMean(),
        title="Low-probability Regularization",
        paper="2510.03222",
        year=2025,
        card=107,
        doc=__doc__ or "",
        claim="Stable on-policy training for about 1,000 steps; 60.17 % on five mathematics benchmarks, 2.66 above prior methods.",
        miniature=Miniature(
            "table:tree", "25k-decisions",
            "Sixteen gradient steps per batch of hard prompts leave more entropy than under GRPO of the same clip, without its KL.",
            metric="eval_entropy", seeds=10, own={"penalty.rho": 1.0, "penalty.coef": 5.0}, other={"penalty.coef": 0.0},
            settings={
                "options.symbols": 8, "options.length": 4, "options.hardest": 0.003, "options.easiest": 0.05,
                "epochs": 4, "minibatches": 4, "surrogate.low": 1.0, "surrogate.high": 9.0, "aggregate": "token-mean",
            },
            first=100,
        ),
        floor=Floor("text:spell_backward", "12-updates", 0.5, settings={"evaluate.points": 2, "evaluate.episodes": 128}),
        builds_on=("dapo",),
        neutral={
            "penalty.low-probability": Neutral(own={"coef": 0.0}),
            "penalty.kl-ref": Neutral(parent={"coef": 0.0}),
            "aggregate": Neutral(batch=("equal-lengths",)),
        },
    )
)  # fmt: skip
