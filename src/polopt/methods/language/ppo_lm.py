"""PPO for language models: a value head, and a KL penalty to the reference at every token.

    r_t = -beta (log pi_old(a_t) - log pi_ref(a_t)) + [t last] r(q, o);  A_t by GAE with gamma = 1, lam = 0.95
    loss = mean_t[ -min(r_t A_t, clip(r_t) A_t) + c_v max((V - R)^2, (V_old + clip(V - V_old, +-0.2) - R)^2) ]

Against PPO: the reward is shaped by the per-token KL, nothing is discounted, changes of the value are clipped. Ziegler
et al. (arXiv 1909.08593), InstructGPT (arXiv 2203.02155). Clip 0.2, lam 0.95, gamma 1 are InstructGPT's; beta = 0.05
(InstructGPT: 0.02), 4 epochs and the value weight (0.1 times the half squared error, so 0.05 here) are those of TRL's
PPO.

Not included: the pretraining term (PPO-ptx), an adaptive beta, a separate reward model (a reward function of the task
plays its part).
"""

from polopt.claim import Floor, Miniature, Neutral
from polopt.methods.onpolicy.ppo import PPO
from polopt.parts.advantage.gae import GAE
from polopt.parts.critic import ValueLoss
from polopt.parts.reward.kl import KLInReward
from polopt.parts.rule.descend import Descend
from polopt.registry import register
from polopt.update import Update

PPO_LM = register(
    PPO.but(
        "ppo-lm",
        reward=KLInReward(beta=0.05, form="token"),
        advantage=GAE(gamma=1.0, lam=0.95, standardise=True),
        critic=ValueLoss(coef=0.05, clip=0.2),
        updates=(Update(epochs=4, rule=Descend(optimizer="adamw", lr=1e-6, max_grad_norm=1.0)),),
        title="PPO for language models",
        paper="2203.02155",
        year=2022,
        family="language",
        doc=__doc__ or "",
        claim="Answers of a tuned small model are preferred to those of a model a hundred times its size.",
        floor=Floor("text:spell_backward", "12-updates", 0.5, settings={"evaluate.points": 2, "evaluate.episodes": 128}),
        builds_on=("1909.08593", "1506.02438"),
        miniature=Miniature(
            "table:style", "60k-decisions",
            "After training on a proxy that can be gamed the true score is higher than without the KL penalty.",
            baseline="ppo-lm", seeds=10, settings={"options.proxy": 1.0}, own={"reward.beta": 0.5}, other={"reward.beta": 0.0},
        ),
        neutral={"reward.kl-in-reward": Neutral(own={"beta": 0.0})},
    )
)  # fmt: skip
