"""TD3+BC: TD3 on a fixed dataset, with the dataset's actions cloned beside the critic's gradient.

    L_mu = mean [-lambda Q_1(s, mu(s)) + (mu(s) - a)^2],  lambda = alpha / mean|Q_1(s, mu(s))|, detached

Against TD3: a dataset in place of a replay, no exploration, the cloning term, and observations standardised by the dataset's
statistics. Fujimoto & Gu, "A minimalist approach to offline reinforcement learning" (arXiv 2106.06860, NeurIPS 2021).

Defaults: alpha 2.5, the rest as TD3. The cloning term is averaged over action components, as in the released code.
"""

from polopt.methods.offpolicy.td3 import TD3
from polopt.parts.actor.offline import BehaviourCloned
from polopt.parts.replay import Dataset
from polopt.parts.sampler.nothing import Nothing
from polopt.registry import register

TD3_BC = register(
    TD3.but(
        "td3-bc",
        sampler=Nothing(),
        explore=None,
        source=Dataset(batch=256, normalize_obs=True),
        actor=BehaviourCloned(alpha=2.5),
        title="TD3 with behaviour cloning",
        paper="2106.06860",
        year=2021,
        family="offline",
        neutral=dict.fromkeys(("actor",)),
        doc=__doc__ or "",
        claim="Matches the state of the art of offline learning with a line added to TD3.",
    )
)
