"""RLOO: REINFORCE on whole answers with the mean of a prompt's other answers as baseline.

    R_i = r_i - beta sum_t (log pi(o_{i,t}) - log pi_ref(o_{i,t})),   b_i = (1/(k-1)) sum_{j != i} R_j
    grad J = E[ (1/k) sum_i (R_i - b_i) grad log pi(o_i|q) ]

Against REINFORCE: k answers per prompt, the leave-one-out baseline, and a KL penalty to the reference inside the
reward, without gradient. An answer counts as one decision: its log-probability is the sum over its tokens. Ahmadian et
al., "Back to basics" (arXiv 2402.14740); Kool et al. 2019 for the baseline. k = 4 and beta = 0.03 are the paper's, the
rate 1e-6.

Not included: RAFT, and the ratio with several steps per batch of some ports (use `surrogate clip` and `epochs`). TRL's
loss clips the ratio of whole answers: on-policy its gradient is this one, off-policy this one times the ratio, or 0.
"""

from polopt.claim import Floor, Miniature, Neutral
from polopt.methods.onpolicy.reinforce import REINFORCE
from polopt.parts.advantage.group import GroupBaseline
from polopt.parts.reward.kl import KLInReward
from polopt.parts.rule.descend import Descend
from polopt.parts.sampler.fresh import Fresh
from polopt.registry import register

RLOO = register(
    REINFORCE.but(
        "rloo",
        sampler=Fresh(group_size=4),
        reward=KLInReward(beta=0.03, form="sequence"),
        advantage=GroupBaseline(centre="leave-one-out", scale="none"),
        rule=Descend(optimizer="adamw", lr=1e-6, max_grad_norm=1.0),
        title="REINFORCE Leave-One-Out",
        paper="2402.14740",
        year=2024,
        family="language",
        card=245,
        doc=__doc__ or "",
        claim="Outperforms PPO and RL-free methods such as DPO and RAFT on human preferences at lower cost.",
        floor=Floor("text:spell_backward", "12-updates", 0.5, settings={"evaluate.points": 2, "evaluate.episodes": 128}),
        miniature=Miniature(
            "table:style", "60k-decisions",
            "On noisy graded rewards four answers per prompt with each other's mean as baseline beat REINFORCE, all else equal.",
            seeds=10, settings={"options.noise": 1.0, "rule.optimizer": "adam", "rule.max_grad_norm": 1.0},
            own={"sampler.group_size": 4, "collect.prompts": 16, "reward.beta": 0.0},
        ),
        neutral={
            "reward.kl-in-reward": Neutral(own={"beta": 0.0}),
            "advantage": Neutral(own={"centre": "none"}, parent={"credit": "whole"}),
        },
    )
)  # fmt: skip
