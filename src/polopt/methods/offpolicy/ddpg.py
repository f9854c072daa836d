"""DDPG: a deterministic actor climbs a critic learned by Q-learning from a replay, both with slow target copies.

    y = r + gamma (1 - d) Q_{w'}(s', mu_{theta'}(s'))
    L_Q = mean (Q_w(s,a) - y)^2
    L_mu = - mean Q_w(s, mu_theta(s))          (its gradient: mean grad_a Q_w grad_theta mu_theta)
    x' <- tau x + (1 - tau) x'                 for actor and critic, after each round
    act: a = clip(mu(s) + N_t, -1, 1)

Lillicrap et al., "Continuous control with deep reinforcement learning" (arXiv 1509.02971, ICLR 2016).

Defaults are those that later work uses on small tasks (batch 256, tau 0.005, rates 3e-4 and 1e-3, Gaussian noise 0.1); the paper's
are batch 64, tau 0.001, rates 1e-4 and 1e-3, L2 decay 1e-2 of the critic (`updates.critic.rule.weight_decay` 0.01: its optimiser
adam adds it to the gradient, adamw would not; it decays biases, too), Ornstein-Uhlenbeck noise (`explore ornstein-uhlenbeck`),
layers of 400 and 300 (`policy.hidden`). Not included: the action entering the critic at its second layer, last layers drawn from
U(-0.003, 0.003) (here U(-1/sqrt(n), 1/sqrt(n)) of n inputs, as all layers), batch normalisation, pixels.
"""

from polopt.claim import Floor, Miniature
from polopt.method import Method
from polopt.parts.actor.pathwise import DeterministicGradient
from polopt.parts.after import Polyak
from polopt.parts.aggregate import TokenMean
from polopt.parts.critic_q import QRegression
from polopt.parts.explore import GaussianNoise
from polopt.parts.replay import Ring
from polopt.parts.rule.descend import Descend
from polopt.parts.sampler.fresh import Fresh
from polopt.parts.target.deterministic import DeterministicTarget
from polopt.registry import register
from polopt.update import Update

DDPG = register(
    Method(
        "ddpg",
        sampler=Fresh(),
        explore=GaussianNoise(std=0.1),
        source=Ring(size=1_000_000, batch=256, start=1_000),
        target=DeterministicTarget(gamma=0.99),
        critic=QRegression(members=1),
        actor=DeterministicGradient(),
        aggregate=TokenMean(),
        updates=(
            Update("critic", "policy", ("critic",), ("critic",), rule=Descend(lr=1e-3, max_grad_norm=None)),
            Update(
                "actor", "policy", ("policy",), ("actor",), rule=Descend(lr=3e-4, max_grad_norm=None),
                after=(Polyak(of=("critic", "policy"), tau=0.005),),
            ),
        ),
        title="Deep Deterministic Policy Gradient",
        paper="1509.02971",
        year=2015,
        family="offpolicy",
        card=118,
        doc=__doc__ or "",
        claim="Robustly solves more than 20 simulated physics tasks with the same algorithm and hyperparameters.",
        miniature=Miniature(
            "gym:Pendulum-v1", "8k-decisions", "The score rises from where it began.",
            settings={"policy.hidden": (64, 64), "source.batch": 64, "evaluate.episodes": 10},
            first=100,
        ),
        floor=Floor("gym:Pendulum-v1", "10k-decisions", -400, settings={"policy.hidden": (64, 64), "evaluate.episodes": 16}),
    )
)  # fmt: skip
DDPG.check()
