"""SPO: a surrogate with its maximum on the edge of the trust region pulls back what a clip would let go.

    J = mean_t[ r_t A_t - |A_t| (r_t - 1)^2 / (2 eps) ],   dJ/dr = |A| (sign(A) - (r - 1)/eps) = 0 at r = 1 + eps sign(A)

Against PPO: the quadratic replaces min and clip. A decision that left the region keeps a gradient, towards the edge, so
ratios stay close to 1 also in deep nets and over many epochs. E_old|r - 1| is twice the total variation between the two
policies, for which the paper gives a bound on improvement. Xie et al., "Simple policy optimization" (arXiv 2401.16025).

eps is that of the paper; all else is PPO's here, so that nothing but the surrogate differs. The released code also clips
changes of the value at eps (`critic.clip`), anneals the rate (`rule.schedule`) and normalises observations and rewards,
for PPO as for SPO. Not included: other members of the paper's family of surrogates (concave in r, maximal at
1 + eps sign(A)), each of which would be a surrogate of its own.
"""

from math import inf

from polopt.claim import Floor, Miniature, Neutral
from polopt.methods.onpolicy.ppo import PPO
from polopt.parts.surrogate.quadratic import Quadratic
from polopt.registry import register

SPO = register(
    PPO.but(
        "spo",
        surrogate=Quadratic(eps=0.2),
        title="Simple Policy Optimization",
        paper="2401.16025",
        year=2024,
        card=212,
        doc=__doc__ or "",
        claim="Keeps ratios closer to 1 than PPO, above all in deep networks, at least at its returns.",
        miniature=Miniature(
            "gym:CartPole-v1", "40k-decisions",
            "With seven hidden layers and twenty epochs, ratios end each update closer to 1 than PPO's.",
            metric="ratio_deviation", reduce="auc", expect="lower", points=20,
            settings={"policy.hidden": (64,) * 7, "epochs": 20, "evaluate.episodes": 10},
            first=100,
        ),
        floor=Floor("gym:CartPole-v1", "25k-decisions", 300, settings={"evaluate.episodes": 16, "optim.compile": "never"}),
        builds_on=("trpo",),
        neutral={"surrogate": Neutral(own={"eps": inf}, parent={"low": inf, "high": inf})},
    )
)  # fmt: skip
