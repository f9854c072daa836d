"""The few moving numbers that the warning rules read, updated at constant cost per line of metrics."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, TypeGuard

#: Keys whose value must be finite; others (explained variance without variance, no finished episode) may be NaN by nature.
MUST_BE_FINITE = ("loss", "grad_norm", "entropy", "kl_")


def finite(x: Any) -> TypeGuard[float]:
    """True for a finite number (None, text and NaN are not)."""
    return isinstance(x, int | float) and math.isfinite(x)


def domain_of(task: str, given: Any = None) -> str | None:
    """ "control" for gym tasks, "text" for text and data tasks, else what was given."""
    if given in ("control", "text"):
        return str(given)
    return {"gym": "control", "text": "text", "data": "text"}.get(task.partition(":")[0])


class Average:
    """Exponential average with a span, exact mean at the beginning. `first` is the mean of the first `warm` values."""

    __slots__ = ("first", "n", "span", "value", "warm")

    def __init__(self, span: int = 10, warm: int = 3) -> None:
        self.span, self.warm = span, warm
        self.n = 0
        self.value = self.first = math.nan

    def add(self, x: float) -> None:
        """Take in one finite value."""
        self.n += 1
        if self.n == 1:
            self.value = self.first = x
            return
        self.value += (x - self.value) / min(self.n, self.span)
        if self.n <= self.warm:
            self.first = self.value


class Scores:
    """Held-out scores: first, best, last."""

    def __init__(self) -> None:
        self.n = 0
        self.first = self.best = self.last = self.previous = math.nan
        self.best_update = 0

    def add(self, x: float, update: int) -> None:
        """Take in one evaluation."""
        self.n += 1
        if self.n == 1:
            self.first = self.best = x
            self.best_update = update
        elif x > self.best:
            self.best, self.best_update = x, update
        self.previous, self.last = self.last, x

    @property
    def tolerance(self) -> float:
        """Differences below this are noise: 5% of the first score."""
        return 0.05 * abs(self.first)


class Pulse:
    """State of a run as the rules see it after each line."""

    def __init__(self, domain: str | None = None) -> None:
        self.domain = domain
        self.metrics: Mapping[str, Any] = {}
        self.update = self.decisions = self.seen = 0
        self.entropy, self.length = Average(), Average()
        self.slow, self.fast = Average(span=60), Average(span=10)  # of performance
        self.low = self.high = math.nan  # extremes of the fast average
        self.log_grad = Average(span=50)
        self.grad_ratio = math.nan  # gradient norm / its typical size before this update
        self.critic = Average(span=5)
        self.scores = Scores()
        self.evaluated = False
        self.bad_keys: tuple[str, ...] = ()

    def get(self, key: str) -> float | None:
        """The present line's value, None when absent or not finite."""
        x = self.metrics.get(key)
        return x if x is not None and finite(x) else None

    def see(self, metrics: Mapping[str, Any]) -> None:
        """Take in a line."""
        self.metrics = metrics
        self.seen += 1
        self.update = int(self.get("update") or 0) or self.seen
        self.decisions = int(self.get("decisions") or 0)
        if self.domain is None and "episode_return" in metrics:
            self.domain = "control"
        # a metrics file has null in place of NaN
        self.bad_keys = tuple(k for k, x in metrics.items() if (x is None or not math.isfinite(x)) and k.startswith(MUST_BE_FINITE))
        for key, average in (("entropy", self.entropy), ("length", self.length), ("loss/critic", self.critic)):
            if (x := self.get(key)) is not None:
                average.add(x)
        self._performance()
        self._gradient()
        score = self.get("eval_score")
        self.evaluated = score is not None
        if score is not None:
            self.scores.add(score, self.update)

    def _performance(self) -> None:
        for key in ("accuracy", "episode_return", "reward"):
            if (x := self.get(key)) is not None:
                self.slow.add(x)
                self.fast.add(x)
                self.low = min(self.fast.value, self.low) if self.fast.n > 1 else x
                self.high = max(self.fast.value, self.high) if self.fast.n > 1 else x
                return

    def _gradient(self) -> None:
        self.grad_ratio = math.nan
        g = self.get("grad_norm")
        if g is None or g <= 0:
            return
        log = math.log(g)
        if self.log_grad.n >= 10:
            self.grad_ratio = math.exp(min(log - self.log_grad.value, 700.0))
            log = min(log, self.log_grad.value + 1.0)  # a spike must not become the new normal at once
        self.log_grad.add(log)

    @property
    def improving(self) -> bool:
        """Whether training performance is clearly on its way up."""
        return self.fast.n >= 10 and self.fast.value > self.slow.value + 0.05 * (self.high - self.low) > -math.inf

    @property
    def at_best(self) -> bool:
        """Whether performance clearly rose since the start and stands at its best."""
        rose = self.high - self.fast.first
        return rose > 0 and rose >= 0.5 * (self.high - self.low) and self.fast.value >= self.high - 0.1 * rose

    @property
    def solved(self) -> bool:
        """Whether training accuracy is so high that little remains to be learned (unknown: False)."""
        return (self.get("accuracy") or 0.0) >= 0.9
