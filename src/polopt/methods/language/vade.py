"""VADE: prompts are chosen before they are asked, by a belief about how much their answers will differ.

    p_i ~ Beta(alpha_i, beta_i) for every prompt;   ask the M prompts with the largest p_i (1 - p_i)^2
    asked, k of G right:  alpha <- lam_s alpha + k,  beta <- lam_s beta + G - k
    all others:           alpha <- 1 + lam_g (alpha - 1),  beta <- 1 + lam_g (beta - 1)

Against GRPO: an allocator; loss and number of answers stay. Groups whose answers are all alike become rare without
further answers, which DAPO's refill pays for. Hu et al., "VADE: variance-aware dynamic sampling via online sample-level
difficulty estimation for multimodal RL" (arXiv 2511.18902).

The abstract names beliefs, Thompson sampling and decay on two scales; the forms of the decay and lam_s = 0.7,
lam_g = 0.999 are this project's reading. `--allocator.gain variance` takes p (1-p) instead. Not included: a first pass
over all prompts that fills the beliefs, and shifting the beliefs of prompts that were not asked by the mean change.
"""

from polopt.claim import Floor, Miniature
from polopt.methods.language.grpo import GRPO
from polopt.parts.allocator.thompson import Thompson
from polopt.registry import register

VADE = register(
    GRPO.but(
        "vade",
        allocator=Thompson(),
        title="Variance-Aware Dynamic Sampling via Online Sample-Level Difficulty Estimation",
        paper="2511.18902",
        year=2025,
        card=65,
        builds_on=("gspo",),
        doc=__doc__ or "",
        claim="Better and more sample-efficient than filtering and than sampling by static rules on multimodal reasoning.",
        floor=Floor("text:spell_backward", "12-updates", 0.5, settings={"evaluate.points": 2, "evaluate.episodes": 128}),
        miniature=Miniature(
            "table:bank", "150-updates",
            "Of prompts from nearly hopeless to nearly solved, learns faster than GRPO at equal answers and gradient steps.",
            reduce="auc", seeds=10,
            first=100,
        ),
    )
)  # fmt: skip
