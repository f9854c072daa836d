"""REBEL: policy optimisation as least-squares regression of relative rewards.

    min over theta of E[ ( (1/eta) [log pi(y|x)/pi_t(y|x) - log pi(y'|x)/pi_t(y'|x)] - (r(x,y) - r(x,y')) )^2 ],   y, y' ~ pi_t

Against RLOO: pairs of answers, several passes over each batch, and the regression in place of the score function. At the start of
an iteration its gradient is 4/eta times that of RLOO with two answers; its exact minimum is pi_t exp(eta r), a step of mirror
descent, and a Gauss-Newton step is the natural gradient. No critic, no clip, no baseline: what answers to one prompt have in common
cancels. Gao et al., "REBEL: Reinforcement Learning via Regressing Relative Rewards" (arXiv 2404.16767). Any score of an answer can
be the reward, also its share of wins against others.

Defaults of the released summarisation run: eta = 1, KL 0.05 to the reference inside the reward, 4 passes, rate 3e-6; its code
minimises eta^2 times the above (`surrogate.form code`). More than two answers: all pairs, or `surrogate.pairs best-worst`.
Not included: the second answer from other policies or from data, and the reward of -1 for answers without an end.
"""

from polopt.claim import Floor, Miniature, Neutral
from polopt.methods.language.rloo import RLOO
from polopt.parts.advantage.group import GroupBaseline
from polopt.parts.reward.kl import KLInReward
from polopt.parts.rule.descend import Descend
from polopt.parts.sampler.fresh import Fresh
from polopt.parts.surrogate.regression import RelativeRegression
from polopt.registry import register

REBEL = register(
    RLOO.but(
        "rebel",
        sampler=Fresh(group_size=2),
        reward=KLInReward(beta=0.05, form="sequence"),
        advantage=GroupBaseline(centre="group", scale="none"),
        surrogate=RelativeRegression(eta=1.0),
        epochs=4,
        rule=Descend(optimizer="adamw", lr=3e-6, max_grad_norm=1.0),
        title="REBEL: Regression to Relative Rewards",
        paper="2404.16767",
        year=2024,
        family="preference",
        card=173,
        builds_on=("npg", "mirror-descent", "dpo", "ipo"),
        doc=__doc__ or "",
        claim="Stronger or similar to PPO and DPO in language modelling and image generation, and simpler.",
        floor=Floor("table:bank", "15k-decisions", 0.93),
        miniature=Miniature(
            "table:arms", "8k-decisions",
            "On noisy graded rewards, with eight passes over each batch, the regression learns faster than RLOO's score function.",
            reduce="auc", seeds=10,
            settings={
                "options.reward": "graded", "options.symbols": 10, "options.noise": 1.0, "reward.beta": 0.0, "epochs": 8,
            },
            first=100,
        ),
        neutral={"surrogate": Neutral(own={"eta": 8.0}, batch=("on-policy", "pairs"), equal="gradient")},
    )
)  # fmt: skip
