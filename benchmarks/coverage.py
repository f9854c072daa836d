"""How often the 95 % interval of the IQM covers the truth, in %, beside the percentile bootstrap: `python benchmarks/coverage.py`.

These are the numbers in docs/statistics.md. Scores of each repetition are a column of one call; the truth is the mean between
the quartiles of the distribution, from its quantile function.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable

import numpy as np
import scipy

from polopt.evidence.compare.statistics import DRAWS, interval, iqm

Draw = Callable[[np.random.Generator, tuple[int, ...]], np.ndarray]


def modes(share: float) -> Draw:
    """Runs that either learn (around 1, with this share) or do not (around 0)."""
    return lambda g, shape: (g.random(shape) < share) + 0.05 * g.standard_normal(shape)


SCORES: dict[str, Draw] = {
    "normal": lambda g, shape: g.standard_normal(shape),
    "t, 3 degrees": lambda g, shape: g.standard_t(3, shape),
    "lognormal": lambda g, shape: g.lognormal(size=shape),
    "beta 8, 1": lambda g, shape: g.beta(8, 1, shape),
    "modes 50:50": modes(0.5),
    "modes 70:30": modes(0.7),
}


def truth(draw: Draw) -> float:
    """The mean between the quartiles of four million draws."""
    return float(iqm(draw(np.random.default_rng(1), (4_000_000,))))


def percentile(scores: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The usual percentile bootstrap, a column at a time."""
    index = np.random.default_rng(2).integers(0, len(scores), (DRAWS, len(scores)))
    low, high = np.empty(scores.shape[1]), np.empty(scores.shape[1])
    for i, column in enumerate(scores.T):
        low[i], high[i] = np.quantile(scipy.stats.trim_mean(column[index], 0.25, axis=1), (0.025, 0.975))
    return low, high


def main() -> None:
    """Print a line per distribution."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repetitions", type=int, default=8000)
    parser.add_argument("--seeds", type=int, nargs="+", default=[3, 5, 10, 20])
    given = parser.parse_args()
    print(f"{'scores':<14}" + "".join(f"{n:>6} seeds     " for n in given.seeds) + " (in brackets: percentile bootstrap)")
    for name, draw in SCORES.items():
        right, cells = truth(draw), []
        for n in given.seeds:
            scores = draw(np.random.default_rng((3, n)), (n, given.repetitions))
            low, high = interval(scores[None])
            plain_low, plain_high = percentile(scores[:, : given.repetitions // 2])
            usual = np.mean((plain_low <= right) & (right <= plain_high))
            cells.append(f"{100 * np.mean((low <= right) & (right <= high)):6.1f} ({100 * usual:4.1f})   ")
        print(f"{name:<14}" + "".join(cells), flush=True)


if __name__ == "__main__":
    sys.exit(main())
