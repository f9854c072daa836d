"""GRPO: PPO without a critic; the baseline is the mean reward of the group of answers to the same prompt.

    A_{i,t} = (R_i - mean(R)) / (std(R) + eps)
    loss = (1/G) sum_i (1/|o_i|) sum_t [ -min(r_{i,t} A_i, clip(r_{i,t}, 1-eps, 1+eps) A_i) + beta (e^d - d - 1) ],
    d = log pi_ref(o_{i,t}) - log pi(o_{i,t})

Against PPO: groups of answers, standardised outcomes of the group instead of GAE, the KL to the reference (k3) in the
loss, means per answer, no critic, one gradient step per batch. Shao et al., "DeepSeekMath" (arXiv 2402.03300), eq. 3
and 4; outcome supervision.

Paper: 64 answers per prompt, beta = 0.04, rate 1e-6, one update per batch; here 8 answers. Not included: process
supervision, iterative training of the reward model, replacing the reference between rounds, and the ratio that TRL puts
before the KL term by default (its `use_bias_correction_kl`).
"""

from polopt.claim import Floor, Miniature, Neutral
from polopt.methods.onpolicy.ppo import PPO
from polopt.parts.advantage.group import GroupBaseline
from polopt.parts.aggregate import SeqMeanTokenMean
from polopt.parts.penalty.kl import KLToReference
from polopt.parts.rule.descend import Descend
from polopt.parts.sampler.fresh import Fresh
from polopt.registry import register
from polopt.update import Update

GRPO = register(
    PPO.but(
        "grpo",
        sampler=Fresh(group_size=8),
        advantage=GroupBaseline(centre="group", scale="group", ddof=1, eps=1e-4),
        penalty=KLToReference(coef=0.04, estimator="k3"),
        critic=None,
        aggregate=SeqMeanTokenMean(),
        updates=(Update(rule=Descend(optimizer="adamw", lr=1e-6, max_grad_norm=1.0)),),
        title="Group Relative Policy Optimization",
        paper="2402.03300",
        year=2024,
        family="language",
        doc=__doc__ or "",
        claim="Improves mathematical reasoning as PPO does, with less memory because it has no critic.",
        floor=Floor("text:spell_backward", "12-updates", 0.5, settings={"evaluate.points": 2, "evaluate.episodes": 128}),
        miniature=Miniature(
            "table:tree", "40k-decisions",
            "Without a critic as fast as PPO for language models at equal answers and gradient steps, neither with a KL penalty.",
            baseline="ppo-lm", reduce="auc", expect="not worse", margin=0.02, seeds=10, settings={"epochs": 4},
            own={"penalty.coef": 0.0}, other={"reward.beta": 0.0},
        ),
        neutral={
            "advantage": Neutral(
                own={"scale": "none"},
                parent={"gamma": 1.0, "lam": 1.0, "standardise": False},
                batch=("whole-episodes", "value-is-group-mean"),
            ),
            "penalty.kl-ref": Neutral(own={"coef": 0.0}),
            "critic": Neutral(parent={"coef": 0.0}),
            "aggregate": Neutral(batch=("equal-lengths",)),
        },
    )
)  # fmt: skip
