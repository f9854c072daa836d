"""GDPO: with several rewards, each is standardised in its group before they are added; the sum is standardised over the batch.

    A_n = (r_n - mean_G(r_n))/(std_G(r_n) + eps),   S = sum_n w_n A_n,   A = (S - mean_B(S))/(std_B(S) + eps)

Against GRPO, which adds the rewards first: other sums of rewards of the same group no longer get the same advantages,
weights act whatever the rewards' scales. With one reward it is GRPO. Liu et al., "GDPO: Group reward-decoupled
normalization policy optimization for multi-reward RL optimization" (arXiv 2601.05242). The released code standardises
over answers in one port (here) and over tokens in the other (`advantage.over=decisions`).

Not included: missing rewards, which the released code takes as 0; a reward that is not finite is refused here. The
paper's conditional rewards are `--reward conditioned`.
"""

from polopt.claim import Floor, Miniature, Neutral
from polopt.methods.language.grpo import GRPO
from polopt.parts.advantage.decoupled import Decoupled
from polopt.registry import register

GDPO = register(
    GRPO.but(
        "gdpo",
        advantage=Decoupled(),
        title="Group reward-Decoupled Normalization Policy Optimization",
        paper="2601.05242",
        year=2026,
        card=63,
        doc=__doc__ or "",
        claim="Better than GRPO on tool calling, mathematical and coding reasoning, in correctness and in format or length.",
        miniature=Miniature(
            "table:style", "60k-decisions",
            "Where the true score is a tenth of the reward and a proxy the rest, ends with a higher true score than GRPO.",
            seeds=10, settings={"options.proxy": 0.9},
            first=100,
        ),
        floor=Floor("text:spell_backward", "12-updates", 0.5, settings={"evaluate.points": 2, "evaluate.episodes": 128}),
        neutral={"advantage": Neutral(batch=("success-or-failure",))},
    )
)  # fmt: skip
