"""Dr. GRPO: GRPO without its two biases, towards short right answers and towards easy or hard prompts.

    A_{i,t} = R_i - mean(R);   loss = (1/(G L_max)) sum_i sum_t -min(r_{i,t} A_i, clip(r_{i,t}, 1-eps, 1+eps) A_i)

Against GRPO: no division by the group's standard deviation, none by the answer's length (a constant instead), no KL
penalty. Liu et al., "Understanding R1-Zero-like training: a critical perspective" (arXiv 2503.20783). The constant is
the generation limit, as in the released code.

Not included: the paper's study of templates and base models.
"""

from polopt.claim import Floor, Miniature, Neutral
from polopt.methods.language.grpo import GRPO
from polopt.parts.advantage.group import GroupBaseline
from polopt.parts.aggregate import SeqMeanTokenSumNorm
from polopt.registry import register

DR_GRPO = register(
    GRPO.but(
        "dr-grpo",
        advantage=GroupBaseline(centre="group", scale="none"),
        penalty=(),
        aggregate=SeqMeanTokenSumNorm(),
        title="Dr. GRPO",
        paper="2503.20783",
        year=2025,
        doc=__doc__ or "",
        claim="Equal accuracy with shorter wrong answers: length no longer grows without benefit.",
        floor=Floor("text:spell_backward", "12-updates", 0.5, settings={"evaluate.points": 2, "evaluate.episodes": 128}),
        miniature=Miniature(
            "table:lengths", "40k-decisions", "Wrong answers end up shorter than GRPO's without its KL penalty.",
            metric="eval_length_wrong", expect="lower", seeds=10, other={"penalty.coef": 0.0},
        ),
        neutral={
            "penalty.kl-ref": Neutral(parent={"coef": 0.0}),
            "aggregate": Neutral(batch=("full-length",)),
        },
    )
)  # fmt: skip
