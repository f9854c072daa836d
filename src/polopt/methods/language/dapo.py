"""DAPO: decoupled clip, dynamic sampling, token mean and overlong shaping on top of GRPO.

    loss = (1/sum_i |o_i|) sum_i sum_t -min(r_{i,t} A_i, clip(r_{i,t}, 1-0.2, 1+0.28) A_i),
    over groups in which 0 < number right < G

Against GRPO: the upper clip bound is higher (rare tokens may gain probability); every token counts the same; groups
without signal are replaced by fresh ones; answers near the limit are punished softly; no KL penalty; several gradient
steps per batch. Yu et al., "DAPO" (arXiv 2503.14476).

Paper: 16 answers per prompt, 16 gradient steps per batch, rate 1e-6 with warm-up, weight decay 0.1; here 8 answers and
4 steps. Overlong filtering, which the paper compares with, is `--select drop-truncated`. Not included: the paper's
rewriting of answers to integers.
"""

from polopt.claim import Floor, Miniature, Neutral
from polopt.methods.language.grpo import GRPO
from polopt.parts.aggregate import TokenMean
from polopt.parts.reward.overlong import SoftOverlong
from polopt.parts.sampler.dynamic import DynamicSampling
from polopt.parts.surrogate.clip import Clip
from polopt.registry import register

DAPO = register(
    GRPO.but(
        "dapo",
        sampler=DynamicSampling(group_size=8),
        reward=SoftOverlong(cache=0.2),
        surrogate=Clip(low=0.2, high=0.28),
        penalty=(),
        aggregate=TokenMean(),
        minibatches=4,
        title="Decoupled Clip and Dynamic Sampling Policy Optimization",
        paper="2503.14476",
        year=2025,
        doc=__doc__ or "",
        claim="Reaches a higher AIME 2024 accuracy than DeepSeek-R1-Zero-Qwen-32B in half the training steps.",
        floor=Floor("text:spell_backward", "12-updates", 0.5, settings={"evaluate.points": 2, "evaluate.episodes": 128}),
        miniature=Miniature(
            "table:bank", "150-updates",
            "Learns faster than GRPO without its KL per training step of as many gradient steps; answers sampled are not counted.",
            reduce="auc", seeds=10, settings={"minibatches": 4}, other={"penalty.coef": 0.0},
        ),
        neutral={
            "reward.soft-overlong": Neutral(own={"cache": 0.0}),
            "penalty.kl-ref": Neutral(parent={"coef": 0.0}),
            "aggregate": Neutral(batch=("equal-lengths",)),
        },
    )
)  # fmt: skip
