"""Sources that keep what was collected, or were given it: a ring of transitions, and a dataset."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from polopt.part import Can, Part, Range, register_part
from polopt.parts.sampler.nothing import Nothing
from polopt.parts.source import replay_without_critics

if TYPE_CHECKING:
    from polopt.method import Method
    from polopt.update import Update


@register_part("source", "ring")
@dataclass(frozen=True)
class Ring(Part):
    """The newest `size` transitions, drawn uniformly with replacement (Lin 1992; Mnih et al. 2015, arXiv 1312.5602).

    A round is one draw of `batch` transitions, for which every update of the method is due once. `utd` rounds become due with
    each decision after the first `start`; fractions carry over exactly. Windows of `n_step` decisions are folded at the draw,
    where they end early at an episode's end and at the newest decision.
    """

    size: Annotated[int, Range(ge=1), "transitions kept"] = 1_000_000
    batch: Annotated[int, Range(ge=1), "transitions per round of updates"] = 256
    start: Annotated[int, Range(ge=0), "decisions before the first update, with actions drawn uniformly"] = 10_000
    utd: Annotated[float, Range(gt=0), "rounds of updates per new decision, may be a fraction"] = 1.0
    n_step: Annotated[int, Range(ge=1), "decisions whose rewards are added up before the bootstrap"] = 1
    storage: Annotated[Literal["memory", "disk"], "where the ring lies: memory, or a mapped file in the run folder"] = "memory"
    equation: ClassVar[str] = "R_t = sum_{k<m} γ^k r_{t+k}, m = min(n, decisions to the end); (s, a, R, s_{t+m}) ~ U(ring)"
    host: ClassVar[bool] = True

    def validate(self, method: Method, update: Update) -> str | None:
        """Refuse a method without critics of actions, and a ring that cannot hold one batch, or one window."""
        if problem := replay_without_critics(method):
            return problem
        if self.size < self.batch:
            return f"source.size = {self.size} transitions cannot fill source.batch = {self.batch}"
        if self.size < self.n_step:
            return f"source.size = {self.size} transitions cannot hold a window of source.n_step = {self.n_step}"
        if method.sampler.name == Nothing.name:
            return (
                "is filled by what is collected, and sampler 'nothing' collects nothing: use sampler 'fresh', or source 'dataset'"
            )
        return None


@register_part("source", "dataset")
@dataclass(frozen=True)
class Dataset(Part):
    """A fixed set of transitions, drawn uniformly with replacement; nothing is collected (offline).

    path: the folder of a Minari dataset, its id under MINARI_DATASETS_PATH, or a built-in one (`pendulum-logs?noise=0.3`);
    empty: the data that the task names. Observations are standardised by the statistics of the whole set where
    `normalize_obs` is on, as (s - mean) / (std + 0.001) (TD3+BC, arXiv 2106.06860, sec. 5), cut at +-10.
    """

    path: Annotated[str, "folder or id of a Minari dataset, or a built-in one; empty: the task's own"] = ""
    batch: Annotated[int, Range(ge=1), "transitions per round of updates"] = 256
    n_step: Annotated[int, Range(ge=1), "decisions whose rewards are added up before the bootstrap"] = 1
    rounds: Annotated[int, Range(ge=1), "rounds of updates per iteration"] = 100
    normalize_obs: Annotated[bool, "standardise observations by the statistics of the dataset"] = False
    equation: ClassVar[str] = "(s, a, r, s') ~ U(D)"
    host: ClassVar[bool] = True

    @property
    def requires(self) -> frozenset[Can]:
        """A task that brings data, unless `path` names some."""
        return frozenset() if self.path else frozenset({Can.DATA})

    def validate(self, method: Method, update: Update) -> str | None:
        """Refuse a method without critics of actions, and to collect what would only be thrown away."""
        if problem := replay_without_critics(method):
            return problem
        if method.sampler.name != Nothing.name:
            return f"is fixed, so that nothing may be collected: set sampler 'nothing' (it is '{method.sampler.name}') as well"
        if method.explore is not None:
            return f"is fixed, so that nothing is explored: set explore none (it is '{method.explore.name}') as well"
        return None
