"""SAC with a value network, the first version: reward scale in place of a temperature, a slow state value in the target.

    L_V  = mean 1/2 (V(s) - [min_i Q_i(s,a~) - log pi(a~|s)])^2,  a~ ~ pi drawn afresh
    L_Qi = mean 1/2 (Q_i(s,a) - [c r + gamma (1 - d) V'(s')])^2
    L_pi = mean [log pi(a|s) - min_i Q_i(s,a)],  a = tanh(m(s) + s(s) xi)
    V' <- tau V + (1 - tau) V'

Against DDPG: a stochastic actor that is paid for entropy at temperature 1, rewards scaled by c (the inverse temperature), two
critics, a state-value network whose slow copy is the only one. Haarnoja et al., "Soft actor-critic: off-policy maximum entropy
deep reinforcement learning with a stochastic actor" (arXiv 1801.01290, ICML 2018).

Defaults: c = 5 (the paper's for HalfCheetah, Hopper, Walker, Ant; Humanoid 20), rates 3e-4, tau 0.005, batch 256. The paper's hard
copies every 1000 steps are `updates.value.after copy`. Evaluation acts with tanh(m). Here the three updates follow each other; the
released code takes all gradients first. Not included: the Gaussian mixture policy.
"""

from dataclasses import replace

from polopt.claim import Floor, Miniature
from polopt.methods.offpolicy.ddpg import DDPG
from polopt.parts.actor.pathwise import SoftGradient
from polopt.parts.after import Polyak
from polopt.parts.critic_q import QRegression, StateRegression
from polopt.parts.rule.descend import Descend
from polopt.parts.target.soft import SoftState, StateValueTarget
from polopt.registry import register
from polopt.update import Update

RULE = Descend(lr=3e-4, max_grad_norm=None)
CRITIC, ACTOR = (replace(u, rule=RULE, after=()) for u in DDPG.updates)

SAC_V1 = register(
    DDPG.but(
        "sac-v1",
        explore=None,
        target=StateValueTarget(gamma=0.99, reward_scale=5.0),
        critic=QRegression(members=2, scale=0.5),
        actor=SoftGradient(alpha=1.0),
        updates=(
            Update(
                "value", "policy", ("value",), ("critic",), rule=RULE, after=(Polyak(of=("value",), tau=0.005),),
                target=SoftState(alpha=1.0), critic=StateRegression(),
            ),
            CRITIC,
            ACTOR,
        ),
        title="Soft Actor-Critic (with a value network)",
        paper="1801.01290",
        year=2018,
        card=112,
        doc=__doc__ or "",
        claim="Outperforms DDPG, PPO and TD3 on hard MuJoCo tasks, with similar performance across seeds.",
        neutral=dict.fromkeys(("target", "actor", "updates", "updates.value.target", "updates.value.critic")),
        miniature=Miniature(
            "gym:Pendulum-v1", "8k-decisions", "At DDPG's rate of the critic ends no lower than DDPG, up to 100 of about 1500.",
            expect="not worse", margin=100.0,
            settings={"policy.hidden": (64, 64), "source.batch": 64, "evaluate.episodes": 10, "updates.critic.rule.lr": 1e-3},
            first=100,
        ),
        floor=Floor("gym:Pendulum-v1", "10k-decisions", -400, settings={"policy.hidden": (64, 64), "evaluate.episodes": 16}),
    )
)  # fmt: skip
