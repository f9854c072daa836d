"""TRPO: the largest improvement of the surrogate within a KL ball around the old policy.

    max_theta E[ pi_theta(a|s)/pi_old(a|s) A ]   subject to   E_s[ KL(pi_old(.|s) || pi_theta(.|s)) ] <= delta

Against REINFORCE with baseline: generalised advantage estimation, standardised; the importance ratio as surrogate; a
natural-gradient step with conjugate gradients and a line search that enforces both the constraint and improvement; the
value function has an update of its own. Schulman et al., "Trust region policy optimization" (arXiv 1502.05477); GAE
from arXiv 1506.02438.

Single-path sampling. Not included: the vine procedure, Fisher products on a subsample, the theoretical penalty form.
"""

from polopt.claim import Floor, Miniature, Neutral
from polopt.methods.onpolicy.reinforce_baseline import REINFORCE_BASELINE
from polopt.parts.advantage.gae import GAE
from polopt.parts.aggregate import TokenMean
from polopt.parts.critic import ValueLoss
from polopt.parts.rule.descend import Descend
from polopt.parts.rule.natural_gradient import NaturalGradient
from polopt.parts.surrogate.score import Ratio
from polopt.registry import register
from polopt.update import Update

TRPO = register(
    REINFORCE_BASELINE.but(
        "trpo",
        advantage=GAE(gamma=0.99, lam=0.97, standardise=True),
        surrogate=Ratio(),
        critic=ValueLoss(coef=1.0),
        aggregate=TokenMean(),
        updates=(
            Update("policy", trains=("policy",), terms=("surrogate",), rule=NaturalGradient(delta=0.01)),
            Update(
                "critic", trains=("value",), terms=("critic",), epochs=10, minibatch=128,
                rule=Descend(optimizer="adam", lr=1e-3, max_grad_norm=None),
            ),
        ),
        title="Trust Region Policy Optimization",
        paper="1502.05477",
        year=2015,
        card=191,
        doc=__doc__ or "",
        claim="Improves nearly monotonically with little tuning.",
        miniature=Miniature(
            "gym:CartPole-v1", "40k-decisions",
            "At their presets the score falls less often by more than a fifth of its range than A2C's.",
            baseline="a2c", reduce="drops", expect="lower", seeds=10, points=20, settings={"evaluate.episodes": 10},
        ),
        floor=Floor("gym:CartPole-v1", "25k-decisions", 350, settings={"evaluate.episodes": 16, "optim.compile": "never"}),
        builds_on=("1506.02438",),
        neutral={
            "advantage": Neutral(own={"gamma": 1.0, "lam": 1.0, "standardise": False}, batch=("whole-episodes",)),
            "surrogate": Neutral(batch=("on-policy",), equal="gradient"),
            "aggregate": Neutral(batch=("one-decision",)),
        },
    )
)  # fmt: skip
