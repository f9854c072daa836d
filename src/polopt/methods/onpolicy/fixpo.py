"""FixPO: a divergence penalty, and sweeps after it that leave no state outside the trust region.

    L_theta = mean[ -r_t A_t ] + sg(beta) mean_s KL(pi_old(.|s) || pi_theta(.|s)) + c_v mean (V - R)^2
    L_beta  = beta (eps_KL - C_beta sg(max_s KL_s)),   beta >= 0

Phase one descends both; phase two steps on the KL term alone until max_s KL_s <= eps_KL on the whole batch, after every
epoch. Against PPO: the plain ratio instead of a clip, and this rule, so that the trust region is kept by every state in
every update and not only aimed at. Zentner et al., "Guaranteed trust region optimization via two-phase KL penalization"
(arXiv 2312.05405).

eps_KL, C_beta, the start of beta and its rate are the authors'; all else is PPO's here. Advantages are standardised once
per batch (theirs: per minibatch), and the entropy bonus is left to a setting (`penalty entropy`). Not included: policies
without a closed-form divergence.
"""

from math import inf

from polopt.claim import Floor, Miniature, Neutral
from polopt.methods.onpolicy.ppo import PPO
from polopt.parts.rule.fixup import FixUp
from polopt.parts.surrogate.score import Ratio
from polopt.registry import register

FIXPO = register(
    PPO.but(
        "fixpo",
        surrogate=Ratio(),
        rule=FixUp(lr=3e-4, eps=1e-5, max_grad_norm=0.5, eps_kl=0.2, aim=2.0, beta=1.0, beta_lr=0.01),
        title="Fixup Policy Optimization",
        paper="2312.05405",
        year=2023,
        card=140,
        doc=__doc__ or "",
        claim="Guarantees a trust region at every state with few additional steps, at returns like those of its rivals.",
        miniature=Miniature(
            "gym:Pendulum-v1", "40k-decisions",
            "Learns as fast as PPO or faster, up to a twentieth of the range of scores.",
            reduce="auc", expect="not worse", margin=60.0, seeds=8, settings={"evaluate.episodes": 10},
            first=100,
        ),
        floor=Floor("gym:CartPole-v1", "25k-decisions", 300, settings={"evaluate.episodes": 16, "optim.compile": "never"}),
        builds_on=("trpo",),
        neutral={"surrogate": Neutral(parent={"low": inf, "high": inf})},
    )
)  # fmt: skip
