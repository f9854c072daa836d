"""A2C: synchronous advantage actor-critic as in OpenAI baselines and Stable-Baselines3.

    loss = mean_t[ -(R_t - V(s_t)) log pi(a_t|s_t) + c_v (V(s_t) - R_t)^2 ],  R_t the n-step return

Against A3C: no entropy bonus, a constant rate, gradients clipped at norm 0.5; TensorFlow's RMSProp (mean square from 1,
epsilon inside the root). Advantages are not standardised. The algorithm is that of arXiv 1602.01783 without asynchrony.
It is PPO with one epoch, one minibatch and lam = 1 (Huang et al., arXiv 2205.09123).

Not included: recurrent policies. Fragments are 5 steps long in the original settings; the task's preset sets their
length.
"""

from polopt.claim import Floor, Miniature, Neutral
from polopt.methods.onpolicy.a3c import A3C
from polopt.parts.rule.descend import Descend
from polopt.registry import register

A2C = register(
    A3C.but(
        "a2c",
        penalty=(),
        rule=Descend(optimizer="rmsprop-tf", lr=7e-4, alpha=0.99, eps=1e-5, max_grad_norm=0.5),
        title="A2C",
        paper="1602.01783",
        year=2017,
        card=132,
        doc=__doc__ or "",
        claim="As good as A3C without asynchrony, and simpler.",
        miniature=Miniature(
            "gym:CartPole-v1", "40k-decisions", "Learns as fast as A3C, up to a twentieth of the greatest score.",
            reduce="auc", expect="not worse", margin=25.0, seeds=10, points=20, settings={"evaluate.episodes": 10},
        ),
        floor=Floor("gym:CartPole-v1", "25k-decisions", 130, settings={"evaluate.episodes": 16, "optim.compile": "never"}),
        builds_on=("2205.09123",),
        neutral={"penalty.entropy": Neutral(parent={"coef": 0.0})},
    )
)  # fmt: skip
