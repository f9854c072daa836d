"""PIPO: whether the last update helped is measured by the next batch, and a second step on the old one follows.

    xi_t = (mu_t - mean(mu_{t-K} .. mu_{t-1})) / std,  phi(x) = x if x >= 0 else lam x
    1. on B_{t-1}:  min(r A, clip(r, 1-eps, 1+eps) A),  A_i = phi(xi_t) G A_i^{t-1} / sum_j |A_j^{t-1}|,  r = pi / pi_{t-1}
    2. on B_t:      GRPO's loss,  r = pi / pi_t with pi_t the policy before step 1

Against GRPO: a source that keeps a batch, and an update in front of the others. The same direction as before where the
mean outcome rose above that of the last K batches, a weak step back where it fell. No further answers are sampled. Wang
et al., "Policy improvement reinforcement learning" (arXiv 2604.00860), and its code where the two differ
(`--source.form code`, `--updates.verify.advantage.bound 10`). Not followed: that code's loss of step 1, -min(r, clip r) A,
keeps the gradient for A < 0 and r < 1-eps and drops it for A < 0 and r > 1+eps, the opposite of the paper's (PPO's) min.

Paper: 128 x 8 answers, both rates 1e-6, K = 8, lam = 0.1. Each update has moments of its own here (the code has one
optimiser for both); without momentum in the first, so that a step has its own verdict's sign, and none is made without
one. For GSPO and DAPO: `GSPO.but(..., source=Previous(), updates=(VERIFY, *GSPO.updates))`. Not included: the form for
PPO, whose generalised advantages phi scales, and the code's filter of prompts.
"""

from polopt.claim import Floor, Miniature
from polopt.methods.language.grpo import GRPO
from polopt.parts.advantage.improvement import Improvement
from polopt.parts.previous import Previous
from polopt.parts.rule.descend import Descend
from polopt.registry import register
from polopt.update import Update

VERIFY = Update(
    "verify", on="previous", terms=("surrogate",), advantage=Improvement(),
    rule=Descend(optimizer="adamw", lr=1e-6, betas=(0.0, 0.999), max_grad_norm=1.0),
)  # fmt: skip

PIPO = register(
    GRPO.but(
        "pipo",
        source=Previous(window=8),
        updates=(VERIFY, *GRPO.updates),
        title="Policy Improvement Policy Optimization",
        paper="2604.00860",
        year=2026,
        card=270,
        builds_on=("gspo", "dapo"),
        doc=__doc__ or "",
        claim="More stable, and 0.9 to 2.8 points more pass@1 in mathematics, than GRPO, GSPO, DAPO and PPO alone.",
        floor=Floor("text:spell_backward", "12-updates", 0.5, settings={"evaluate.points": 2, "evaluate.episodes": 128}),
        miniature=Miniature(
            "table:tree", "150-updates",
            "At a rate too large, with small batches and one verdict in ten wrong, ends higher than GRPO with two steps per batch.",
            seeds=10, settings={"options.noise": 0.1, "collect.prompts": 4},
            own={"updates.verify.rule.lr": 0.3, "updates.policy.rule.lr": 0.3}, other={"epochs": 2, "rule.lr": 0.3},
            first=100,
        ),
        # the second update is off where it has no verdict: its rows then have the column 0 (tests of the run show it bit for bit)
        neutral={"updates": None, "updates.verify.advantage": None},
    )
)  # fmt: skip
