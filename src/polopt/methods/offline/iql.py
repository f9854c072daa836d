"""IQL: offline learning that never asks the critic about an action outside the data.

    L_V = mean L2_tau(min_i Q'_i(s,a) - V(s)),  L2_tau(u) = |tau - 1[u < 0]| u^2
    L_Q = sum_i mean (Q_i(s,a) - [r + gamma (1 - d) V(s')])^2
    L_pi = -mean min(exp(beta (min_i Q'_i(s,a) - V(s))), 100) log pi(a|s)

Against TD3+BC: the value of the best actions in the data by an expectile, and a policy drawn out of the data by weighted cloning.
Kostrikov, Nair & Levine, "Offline reinforcement learning with implicit Q-learning" (arXiv 2110.06169, ICLR 2022).

Defaults: tau 0.7, beta 3 (locomotion; AntMaze 0.9 and 10), rates 3e-4, slow critics 0.005, a normal with mean tanh f(s) and
deviations that do not depend on the state. Observations are standardised and cut at 10 deviations, as in TD3+BC here; the paper
and its released code train on them as they are (`source.normalize_obs false`). Not included: the cosine schedule of the actor's
rate, reward scaling by dataset.
"""

from dataclasses import replace

from polopt.claim import Floor, Miniature
from polopt.methods.offline.td3_bc import TD3_BC
from polopt.parts.actor.offline import AdvantageWeighted
from polopt.parts.after import Polyak
from polopt.parts.critic_q import StateRegression
from polopt.parts.target.deterministic import OfData
from polopt.parts.target.soft import StateValueTarget
from polopt.registry import register
from polopt.update import Update

CRITIC, ACTOR = TD3_BC.updates

IQL = register(
    TD3_BC.but(
        "iql",
        target=StateValueTarget(gamma=0.99, slow=False),
        actor=AdvantageWeighted(beta=3.0, most=100.0),
        updates=(
            Update(
                "value", "policy", ("value",), ("critic",), rule=CRITIC.rule,
                target=OfData(), critic=StateRegression(tau=0.7, doubled=False, scale=1.0),
            ),
            replace(ACTOR, every=1, after=()),
            replace(CRITIC, after=(Polyak(of=("critic",), tau=0.005),)),
        ),
        miniature=Miniature(
            "dataset:pendulum-logs?noise=0.6", "4k-rounds", "Ends above TD3+BC on logs of which most actions are random.",
            points=5, settings={"policy.hidden": (64, 64), "source.batch": 64, "evaluate.episodes": 20},
            first=100,
        ),
        floor=Floor(
            "dataset:pendulum-logs?noise=0.3", "2k-rounds", -1000,
            settings={"policy.hidden": (64, 64), "source.batch": 64, "evaluate.episodes": 20},
        ),
        title="Implicit Q-learning",
        paper="2110.06169",
        year=2021,
        neutral=dict.fromkeys(("target", "actor", "updates", "updates.value.target", "updates.value.critic")),
        doc=__doc__ or "",
        claim="State of the art on D4RL without ever evaluating actions outside the data.",
    )
)  # fmt: skip
