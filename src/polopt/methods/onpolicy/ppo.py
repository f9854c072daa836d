"""PPO: several epochs of minibatches on a surrogate that does not reward leaving a neighbourhood of the old policy.

    loss = mean_t[ -min(r_t A_t, clip(r_t, 1-eps, 1+eps) A_t) + c_v (V(s_t) - R_t)^2 ],  r_t = pi_theta(a_t|s_t)/pi_old(a_t|s_t)

Against TRPO: the clipped surrogate and first-order steps replace the constraint, conjugate gradients and line search;
policy and value are trained together. Schulman et al., "Proximal policy optimization algorithms" (arXiv 1707.06347).
Defaults are those of the paper's MuJoCo table, with gradient clipping and Adam's epsilon of the released code;
advantages are standardised once per batch.

Switched on by a setting: value clipping (`critic.clip`), dual clip (`surrogate dual-clip`), an entropy bonus (`penalty
entropy`), stopping at a KL (`target_kl`), annealing (`rule.schedule`), the adaptive KL penalty (`penalty
kl-old-adaptive` with `surrogate ratio`). Not included: recurrent policies.
"""

from math import inf

from polopt.claim import Floor, Miniature, Neutral
from polopt.methods.onpolicy.trpo import TRPO
from polopt.parts.advantage.gae import GAE
from polopt.parts.critic import ValueLoss
from polopt.parts.rule.descend import Descend
from polopt.parts.surrogate.clip import Clip
from polopt.registry import register
from polopt.update import Update

PPO = register(
    TRPO.but(
        "ppo",
        advantage=GAE(gamma=0.99, lam=0.95, standardise=True),
        surrogate=Clip(low=0.2, high=0.2),
        critic=ValueLoss(coef=0.5),
        updates=(Update(epochs=10, minibatch=64, rule=Descend(optimizer="adam", lr=3e-4, eps=1e-5, max_grad_norm=0.5)),),
        title="Proximal Policy Optimization",
        paper="1707.06347",
        year=2017,
        card=250,
        doc=__doc__ or "",
        claim="Better than A2C and TRPO on simulated locomotion and Atari at less cost and complexity.",
        miniature=Miniature(
            "gym:CartPole-v1", "40k-decisions",
            "At their presets learns faster than A2C from equally many steps of the environment.",
            baseline="a2c", reduce="auc", seeds=10, points=20, settings={"evaluate.episodes": 10},
        ),
        floor=Floor("gym:CartPole-v1", "25k-decisions", 300, settings={"evaluate.episodes": 16, "optim.compile": "never"}),
        builds_on=("a2c", "1506.02438"),
        neutral={"surrogate": Neutral(own={"low": inf, "high": inf})},
    )
)  # fmt: skip
