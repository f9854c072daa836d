"""Discovered PO: a mirror-learning objective whose drift was read off one that a search had learnt.

    J = mean_t[ r_t A_t - f(r_t, A_t) ],   A standardised
    A >= 0: f = relu( (r-1) A - alpha tanh((r-1) A / alpha) )      A < 0: f = relu( (log r) A - beta tanh((log r) A / beta) )

Against PPO: this drift replaces the clip (whose own drift is relu((r - clip r) A)). Gradients fade smoothly instead of
stopping; for A < 0 they turn round at the r < 1 with tanh^2((log r) A / beta) = r, and push back an action that became too
unlikely. Lu et al., "Discovered policy optimisation" (arXiv 2210.05639); not direct preference optimisation.

alpha and beta are the paper's, all else is PPO's here. Not included: the search that found the drift it was read off (that
is `lpo`).
"""

from math import inf

from polopt.claim import Floor, Miniature, Neutral
from polopt.methods.onpolicy.ppo import PPO
from polopt.parts.surrogate.drift import DiscoveredDrift
from polopt.registry import register

DISCOVERED_PO = register(
    PPO.but(
        "discovered-po",
        surrogate=DiscoveredDrift(alpha=2.0, beta=0.6),
        title="Discovered Policy Optimisation",
        paper="2210.05639",
        year=2022,
        card=195,
        doc=__doc__ or "",
        claim="At least PPO's returns on unseen tasks, with none of its settings tuned again.",
        miniature=Miniature(
            "gym:Pendulum-v1", "40k-decisions",
            "Without tuning it learns as fast as PPO or faster, up to a twentieth of the range of scores.",
            reduce="auc", expect="not worse", margin=60.0, seeds=8, settings={"evaluate.episodes": 10},
            first=100,
        ),
        floor=Floor("gym:CartPole-v1", "25k-decisions", 300, settings={"evaluate.episodes": 16, "optim.compile": "never"}),
        builds_on=("2201.02373",),
        neutral={"surrogate": Neutral(own={"alpha": 1e12, "beta": 1e12}, parent={"low": inf, "high": inf})},
    )
)  # fmt: skip
