"""MC-GRPO: the baseline is the median of the group, and the answer in the middle is not trained on.

    R_1..R_{G+1},  b = median(R),  MAD = median(|R - b|) + 1e-3;   A_i = (G+1)/m (R_i - b)/MAD,  m = #{j: A_j != 0}
    loss = (1/G) sum over i other than the middle of (1/|o_i|) sum_t [ -min(r A_i, clip(r, 1-eps, 1+eps) A_i) + beta (e^d - d - 1) ]

Against GRPO: one answer more per prompt is drawn; median and median absolute deviation in place of mean and standard
deviation; the middle answer, whose advantage is 0, leaves the loss, so that training costs as much as with G answers; two
passes. With few answers the mean is noisy and an answer's advantage may have the wrong sign; one odd reward does not move
a median. "MC-GRPO: Median-centered group relative policy optimization for small-rollout reinforcement learning" (arXiv
2601.22582).

As in the released code m counts all G+1 answers. With rewards of 0 and 1 MAD is nearly always 1e-3 and advantages are
+-1000 or more: only the clipped gradient norm keeps steps small (`advantage.scale std` or `none` otherwise). Paper: 2, 4 or
8 answers, rate 2e-6. Not included: the control of the released code that drops the reward nearest to 0.
"""

from polopt.claim import Floor, Miniature, Neutral
from polopt.methods.language.grpo import GRPO
from polopt.parts.advantage.median import MedianBaseline
from polopt.parts.sampler.spare import Spare
from polopt.parts.select.middle import DropMiddle
from polopt.registry import register

MC_GRPO = register(
    GRPO.but(
        "mc-grpo",
        sampler=Spare(group_size=8),
        advantage=MedianBaseline(),
        select=DropMiddle(),
        epochs=2,
        title="Median-Centered Group Relative Policy Optimization",
        paper="2601.22582",
        year=2026,
        card=69,
        doc=__doc__ or "",
        claim="Two answers per prompt come within 1 % of eight, for several models and relatives of GRPO.",
        miniature=Miniature(
            "table:bank", "20k-decisions",
            "Two answers per prompt learn as fast as GRPO with eight at equal answers, up to 0.01; neither has a KL penalty.",
            reduce="auc", expect="not worse", margin=0.01,
            own={"sampler.group_size": 2, "collect.prompts": 24}, settings={"penalty.coef": 0.0, "epochs": 2},
            first=100,
        ),
        floor=Floor("text:spell_backward", "12-updates", 0.5, settings={"evaluate.points": 2, "evaluate.episodes": 128}),
        builds_on=("dapo", "dr-grpo"),
        neutral={
            "advantage": Neutral(own={"centre": "mean", "scale": "std", "compensate": False}),
            "select.drop-middle": Neutral(own={"keep": True}),
        },
    )
)  # fmt: skip
