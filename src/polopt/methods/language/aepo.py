"""AEPO: right answers drawn hotter or colder than the policy hold its entropy at any chosen value.

    J = J_GRPO + lambda E_{o ~ pi_old^T}[ 1{o right} (1/|o|) sum_t log pi(o_t) ],   pi^T(a) ~ pi(a)^(1/T)
    T = 1.2 if H <= H_0 else 0.8,   H the mean token entropy in the last update (0 before the first)

Against GRPO: s right answers at temperature T replace s of the usual ones in each batch, with advantage 1, s (at most
60, half of that when cooling) standing for lambda; no KL penalty. Pushing up samples of a flatter version of the policy
moves it there. Wang et al., "Arbitrary entropy policy optimization" (arXiv 2510.08141).

T, H_0 = 0.5, s and the threshold 0.05 are those of the released code (shared with its follow-up), which samples 5
answers to each of 128 prompts with top_p = 0.99 (`collect.top_p`); its log-probabilities before the update are computed
anew at temperature 1, also for hot samples. Control answers cost decisions of the budget; reward, accuracy and length
in the metrics include them. Not included: the means over all tokens of that code (`--aggregate token-mean`).
"""

from polopt.claim import Floor, Miniature, Neutral
from polopt.methods.language.grpo import GRPO
from polopt.parts.advantage.control import GroupWithControl
from polopt.parts.sampler.entropy_control import EntropyControl
from polopt.parts.select.replaced import DropReplaced
from polopt.registry import register

AEPO = register(
    GRPO.but(
        "aepo",
        sampler=EntropyControl(group_size=8, target=0.5, hot=1.2, cold=0.8, samples=60),
        advantage=GroupWithControl(centre="group", scale="group", ddof=1, eps=1e-4),
        select=DropReplaced(),
        penalty=(),
        title="Arbitrary Entropy Policy Optimization",
        paper="2510.08141",
        year=2025,
        card=25,
        doc=__doc__ or "",
        claim="Holds entropy at arbitrary values, removes its collapse, and shows that accuracy first rises, then falls with it.",
        miniature=Miniature(
            "table:tree", "80k-decisions",
            "With noisy verdicts, entropy ends nearer to a target of 0.5 nats than under GRPO without its KL penalty: above it.",
            metric="entropy", seeds=10, other={"penalty.coef": 0.0},
            own={"sampler.samples": 32, "sampler.share": 0.5, "sampler.hot": 1.5, "sampler.cold": 0.6},
            settings={
                "options.right": 12, "options.families": 1, "options.share": 1.0, "options.noise": 0.1,
                "options.hardest": 0.2, "options.easiest": 0.5,
            },
            first=100,
        ),
        floor=Floor("text:spell_backward", "12-updates", 0.5, settings={"evaluate.points": 2, "evaluate.episodes": 128}),
        builds_on=("reinforce",),
        neutral={
            "advantage": Neutral(),
            "select.drop-replaced": Neutral(),
            "penalty.kl-ref": Neutral(parent={"coef": 0.0}),
        },
    )
)  # fmt: skip
