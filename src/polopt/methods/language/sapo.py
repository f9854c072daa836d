"""SAPO: a smooth gate fades what moved far from the sampling policy, where GRPO's clip cuts it off.

    loss = -(1/G) sum_i (1/|o_i|) sum_t f(r_{i,t}) A_i,   f(r) = (4/tau) sigmoid(tau (r - 1))
    tau = 1.0 where A_i > 0, else 1.05;   gradient weight f'(r) = sech^2(tau (r - 1)/2), 1 at r = 1

Against GRPO: the gate in place of the clip, no KL penalty, four gradient steps per batch. Gao et al., "Soft adaptive
policy optimization" (arXiv 2511.20347). On answers whose tokens moved alike the gate is close to one gate of the whole
answer's ratio, as in GSPO, but one odd token does not silence the others.

Not included: the paper's routing of mixture-of-experts models.
"""

from math import inf

from polopt.claim import Floor, Miniature, Neutral
from polopt.methods.language.grpo import GRPO
from polopt.parts.surrogate.soft_gate import SoftGate
from polopt.registry import register

SAPO = register(
    GRPO.but(
        "sapo",
        surrogate=SoftGate(tau_pos=1.0, tau_neg=1.05),
        penalty=(),
        minibatches=4,
        title="Soft Adaptive Policy Optimization",
        paper="2511.20347",
        year=2025,
        card=2,
        doc=__doc__ or "",
        claim="Trains more stably and to a higher accuracy in mathematical reasoning than GRPO and GSPO at equal budget.",
        miniature=Miniature(
            "table:bank", "40k-decisions",
            "With eight large gradient steps per batch learns faster than GRPO's clip, neither with a KL penalty.",
            reduce="auc", seeds=10, settings={"minibatches": 8, "rule.lr": 0.1}, other={"penalty.coef": 0.0},
            first=100,
        ),
        floor=Floor("text:spell_backward", "12-updates", 0.5, settings={"evaluate.points": 2, "evaluate.episodes": 128}),
        builds_on=("gspo",),
        neutral={
            "surrogate": Neutral(own={"tau_pos": 1e-7, "tau_neg": 1e-7}, parent={"low": inf, "high": inf}, equal="gradient"),
            "penalty.kl-ref": Neutral(parent={"coef": 0.0}),
        },
    )
)  # fmt: skip
