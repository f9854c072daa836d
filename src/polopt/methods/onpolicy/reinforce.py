"""REINFORCE: the score-function estimator with the return of the episode, the root of the family.

    grad J = E[ sum_t G_t grad log pi(a_t|s_t) ],  G_t = sum_{k>=t} gamma^(k-t) r_k

Williams, "Simple statistical gradient-following algorithms for connectionist reinforcement learning", Machine Learning
8 (1992). Returns are counted from each decision on (what came before a decision does not depend on it), whole episodes
only, one gradient step per batch, no baseline and no discount. On text the outcome sits on the last token, so that
every token of an answer has the same return.

Not included: eligibility traces for continuing tasks, Williams' per-unit learning rates and baselines.
"""

from polopt.claim import Floor, Miniature
from polopt.method import Method
from polopt.parts.advantage.monte_carlo import MonteCarlo
from polopt.parts.aggregate import SeqMeanTokenSum
from polopt.parts.rule.descend import Descend
from polopt.parts.sampler.fresh import Fresh
from polopt.parts.surrogate.score import ScoreFunction
from polopt.registry import register
from polopt.update import Update

REINFORCE = register(
    Method(
        "reinforce",
        sampler=Fresh(),
        advantage=MonteCarlo(),
        surrogate=ScoreFunction(),
        aggregate=SeqMeanTokenSum(),
        updates=(Update(rule=Descend(optimizer="adam", lr=3e-3)),),
        title="REINFORCE",
        paper="Williams 1992, doi:10.1007/BF00992696",
        year=1992,
        family="onpolicy",
        doc=__doc__ or "",
        claim="Steps along the gradient of the expected return without estimating it first.",
        floor=Floor("gym:CartPole-v1", "25k-decisions", 260, settings={"evaluate.episodes": 16, "optim.compile": "never"}),
        miniature=Miniature("table:tree", "20k-decisions", "The exact expected return rises from where it began.", seeds=10),
    )
)
REINFORCE.check()
