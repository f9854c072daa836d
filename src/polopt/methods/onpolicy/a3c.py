"""A3C's advantage actor-critic with n-step returns, with synchronous workers.

    R_t = r_t + gamma R_{t+1}, started from V at the end of the fragment (0 at a termination)
    loss = mean_t[ -(R_t - V(s_t)) log pi(a_t|s_t) - beta H(pi(.|s_t)) + c_v (V(s_t) - R_t)^2 ]

Against REINFORCE with baseline: short fragments instead of whole episodes, bootstrapped from the value; an entropy
bonus; RMSProp whose rate falls to 0. Mnih et al., "Asynchronous methods for deep reinforcement learning" (arXiv
1602.01783), algorithm S3.

All workers (environments) act with the same parameters and their gradients are averaged: this is the synchronous form.
Not included: lock-free asynchronous updates, recurrent policies, the one-step and n-step Q-learning variants. The paper
adds gradients up over a fragment, here they are averaged, which RMSProp's scale invariance makes the same up to
epsilon; epsilon is that of later ports (1e-5) instead of 0.1.
"""

from polopt.claim import Floor, Miniature, Neutral
from polopt.methods.onpolicy.reinforce_baseline import REINFORCE_BASELINE
from polopt.parts.advantage.gae import NStep
from polopt.parts.aggregate import TokenMean
from polopt.parts.penalty.entropy import EntropyBonus
from polopt.parts.rule.descend import Descend
from polopt.registry import register

A3C = register(
    REINFORCE_BASELINE.but(
        "a3c",
        advantage=NStep(gamma=0.99),
        penalty=EntropyBonus(coef=0.01),
        aggregate=TokenMean(),
        rule=Descend(optimizer="rmsprop-tf", lr=7e-4, alpha=0.99, eps=1e-5, max_grad_norm=40.0, schedule="linear"),
        title="A3C (synchronous)",
        paper="1602.01783",
        year=2016,
        card=143,
        doc=__doc__ or "",
        claim="Learns from short fragments, online, with less variance than Monte Carlo returns.",
        miniature=Miniature(
            "gym:CartPole-v1", "40k-decisions",
            "At their presets learns faster than REINFORCE with baseline from equally many steps.",
            reduce="auc", seeds=10, points=20, settings={"evaluate.episodes": 10},
        ),
        floor=Floor("gym:CartPole-v1", "25k-decisions", 220, settings={"evaluate.episodes": 16, "optim.compile": "never"}),
        neutral={
            "advantage": Neutral(own={"gamma": 1.0}, batch=("whole-episodes",)),
            "penalty.entropy": Neutral(own={"coef": 0.0}),
            "aggregate": Neutral(batch=("one-decision",)),
        },
    )
)  # fmt: skip
