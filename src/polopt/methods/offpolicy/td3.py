"""TD3: DDPG against overestimation: the smaller of two critics in the target, smoothed target actions, delayed actor.

    a~ = clip(mu'(s') + clip(N(0, sigma^2), -c, c), -1, 1)
    y  = r + gamma (1 - d) min_{i=1,2} Q'_i(s', a~)          the same y for both critics
    L_Q = sum_i mean (Q_i(s,a) - y)^2
    every d-th round: L_mu = - mean Q_1(s, mu(s)), then the slow copies of actor and critics move

Fujimoto, van Hoof & Meger, "Addressing function approximation error in actor-critic methods" (arXiv 1802.09477, ICML 2018).

Defaults: sigma 0.2, c 0.5, d 2, exploration 0.1, tau 0.005, batch 256, rate 3e-4 (paper: batch 100, rate 1e-3, layers 400-300).
Noise is in units of the largest action. Not included: the paper's ablations (AHE, DQ-AC, DDQN-AC); each device is a setting.
"""

from dataclasses import replace

from polopt.claim import Floor, Miniature, Neutral
from polopt.methods.offpolicy.ddpg import DDPG
from polopt.parts.critic_q import QRegression
from polopt.parts.rule.descend import Descend
from polopt.parts.target.deterministic import ClippedDouble
from polopt.registry import register

CRITIC, ACTOR = (replace(u, rule=Descend(lr=3e-4, max_grad_norm=None)) for u in DDPG.updates)

TD3 = register(
    DDPG.but(
        "td3",
        target=ClippedDouble(gamma=0.99, noise=0.2, clip=0.5),
        critic=QRegression(members=2),
        updates=(CRITIC, replace(ACTOR, every=2)),
        title="Twin Delayed Deep Deterministic Policy Gradient",
        paper="1802.09477",
        year=2018,
        card=123,
        doc=__doc__ or "",
        claim="Outperforms the state of the art in every tested environment of the OpenAI gym MuJoCo suite.",
        neutral={"target": Neutral(own={"noise": 0.0})},
        miniature=Miniature(
            "gym:Pendulum-v1",
            "8k-decisions",
            "At equal rates its values exceed the returns by less than DDPG's.",
            metric="eval_q_return_gap",
            reduce="auc",
            expect="lower",
            settings={
                "policy.hidden": (64, 64),
                "source.batch": 64,
                "evaluate.episodes": 10,
                "updates.critic.rule.lr": 1e-3,
                "target.gamma": 0.95,
            },
            first=100,
        ),
        floor=Floor("gym:Pendulum-v1", "10k-decisions", -300, settings={"policy.hidden": (64, 64), "evaluate.episodes": 16}),
    )
)
