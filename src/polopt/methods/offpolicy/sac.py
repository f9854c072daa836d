"""SAC, the second version: no value network, and a temperature that is the multiplier of a least entropy.

    max E[sum r]  s.t.  E[-log pi(a_t|s_t)] >= H
    y = r + gamma (1 - d) [min_i Q'_i(s', a') - alpha log pi(a'|s')],  a' ~ pi(.|s')
    L_Q = sum_i mean 1/2 (Q_i(s,a) - y)^2
    L_pi = mean [alpha log pi(a|s) - min_i Q_i(s, a)],  a = tanh(m(s) + s(s) xi)
    L_alpha = mean [-log alpha (log pi(a|s) + H)],  log pi detached
    Q' <- tau Q + (1 - tau) Q'

Against the first version: slow copies of the critics in place of the value network, alpha learned in place of a reward scale.
Haarnoja et al., "Soft actor-critic algorithms and applications" (arXiv 1812.05905). Order of a round: critics, actor,
temperature, slow copies. Evaluation acts with tanh(m).

Defaults: rates 3e-4, tau 0.005, batch 256, H minus the number of action components, log alpha 0 at the start, log-deviations within
[-20, 2]. As in the released code the multiplier's loss is in log alpha. Not included: learnt
reward scales, pixels.
"""

from polopt.claim import Floor, Miniature
from polopt.methods.offpolicy.sac_v1 import ACTOR, CRITIC, RULE, SAC_V1
from polopt.parts.actor.pathwise import SoftGradient
from polopt.parts.after import Polyak
from polopt.parts.multiplier import Temperature
from polopt.parts.target.soft import SoftTarget
from polopt.registry import register
from polopt.update import Update

SAC = register(
    SAC_V1.but(
        "sac",
        target=SoftTarget(gamma=0.99),
        actor=SoftGradient(),
        multiplier=Temperature(),
        updates=(
            CRITIC,
            ACTOR,
            Update(
                "temperature", "policy", ("temperature",), ("multiplier",), rule=RULE, after=(Polyak(of=("critic",), tau=0.005),)
            ),
        ),
        title="Soft Actor-Critic with automatic temperature",
        paper="1812.05905",
        year=2018,
        card=89,
        doc=__doc__ or "",
        claim="State-of-the-art sample efficiency and asymptotic return on MuJoCo, very stable across seeds.",
        neutral=dict.fromkeys(("target", "multiplier", "updates", "updates.value.target", "updates.value.critic")),
        miniature=Miniature(
            "gym:Pendulum-v1",
            "8k-decisions",
            "Without a reward scale to choose it learns faster than the first version at its own.",
            reduce="auc",
            settings={"policy.hidden": (64, 64), "source.batch": 64, "evaluate.episodes": 10},
            first=100,
        ),
        floor=Floor("gym:Pendulum-v1", "10k-decisions", -300, settings={"policy.hidden": (64, 64), "evaluate.episodes": 16}),
    )
)
