"""GSPO: the importance ratio and its clip belong to whole answers, not to tokens.

    s_i = (pi(o_i|q)/pi_old(o_i|q))^(1/|o_i|);   loss = (1/G) sum_i -min(s_i A_i, clip(s_i, 1-3e-4, 1+4e-4) A_i)

Against GRPO: the length-normalised sequence ratio, bounds that fit it, no KL penalty, four gradient steps per batch.
Zheng et al., "Group sequence policy optimization" (arXiv 2507.18071), eq. 5 and 7, sec. 5.1.

Not included: GSPO-token, whose ratio carries token-level advantages.
"""

from polopt.claim import Floor, Miniature, Neutral
from polopt.methods.language.grpo import GRPO
from polopt.parts.surrogate.clip import SequenceClip
from polopt.registry import register

GSPO = register(
    GRPO.but(
        "gspo",
        surrogate=SequenceClip(low=3e-4, high=4e-4),
        penalty=(),
        minibatches=4,
        title="Group Sequence Policy Optimization",
        paper="2507.18071",
        year=2025,
        doc=__doc__ or "",
        claim="More stable and efficient than GRPO, above all for mixture-of-experts models.",
        miniature=Miniature(
            "text:spell_backward", "30-updates",
            "A small language model learns faster than with GRPO's clip at four gradient steps per batch and no KL penalty.",
            reduce="auc", seeds=10, points=6, settings={"minibatches": 4}, other={"penalty.coef": 0.0},
        ),
        floor=Floor("text:spell_backward", "12-updates", 0.5, settings={"evaluate.points": 2, "evaluate.episodes": 128}),
        neutral={
            "surrogate": Neutral(own={"low": 0.2, "high": 0.2}, batch=("equal-ratios",)),
            "penalty.kl-ref": Neutral(parent={"coef": 0.0}),
        },
    )
)  # fmt: skip
