"""LPO: the drift of a mirror-learning objective is a network, found by evolution strategies over whole training runs.

    J = mean_t[ r_t A_t - f_phi(r_t, A_t) ],   f_phi = relu( W_2 tanh(W_1 x_t) - xi )
    x = [1-r, (1-r)^2, log r, (log r)^2, and each times A],   phi by OpenAI-ES on the score at the end of a run

Against PPO: this drift replaces the clip. No weights can break the conditions of mirror learning: x = 0 at r = 1, so f and
its slope are 0 there. Lu et al., "Discovered policy optimisation" (arXiv 2210.05639). The network belongs to the part, not
to the policy: it is read from an artefact (`surrogate.weights`), and no update moves it.

The paper learns phi over 1025 generations of 30 million steps of Brax's Ant. The drift shipped here, `cartpole`, was
learnt in minutes by `benchmarks/learn_drift.py`: 40 generations of 16 runs of 6,000 steps. In that program's own comparison
(`assets/drift/cartpole.json`, means of ten seeds that the search did not use; many large steps per batch) it does what PPO's
clip does on CartPole (393 against 359; the plain ratio 89), and on tasks it never saw it is better than the plain ratio and
far from the clip (Pendulum -835, ratio -1247, clip -390; Acrobot -241, -301, -91).
Not included: the search itself, which is `polopt.loops.search`.
"""

from math import inf

from polopt.claim import Floor, Miniature, Neutral
from polopt.methods.onpolicy.ppo import PPO
from polopt.parts.surrogate.learnt_drift import LearntDrift
from polopt.registry import register

LPO = register(
    PPO.but(
        "lpo",
        surrogate=LearntDrift(weights="cartpole", xi=1e-4),
        title="Learnt Policy Optimisation",
        paper="2210.05639",
        year=2022,
        card=195,
        doc=__doc__ or "",
        claim="A drift learnt on one task carries over to others.",
        miniature=Miniature(
            "gym:Pendulum-v1", "16k-decisions",
            "With many large steps per batch, a drift learnt on CartPole helps on Pendulum: above the plain ratio.",
            baseline="lpo", seeds=8,
            settings={
                "lr": 3e-3, "minibatch": 256, "epochs": 10, "collect.envs": 16, "collect.steps": 64, "evaluate.episodes": 16,
            },
            other={"surrogate.xi": 1e9},  # no drift at all: the plain ratio,
            first=100,
        ),
        floor=Floor("gym:CartPole-v1", "25k-decisions", 200, settings={"evaluate.episodes": 16, "optim.compile": "never"}),
        builds_on=("2201.02373", "1703.03864"),
        neutral={"surrogate": Neutral(own={"xi": 1e9}, parent={"low": inf, "high": inf})},
    )
)  # fmt: skip
