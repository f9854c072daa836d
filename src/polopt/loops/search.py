"""The loop `search`: ask for candidates, evaluate each by a whole run, tell their fitness. It knows neither papers nor networks.

A candidate is a vector. What it stands for is the evaluator's business: `Trial` writes it into the memory of one of a method's
parts and trains a policy from scratch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, Protocol

import torch
from jaxtyping import Float
from torch import Tensor

from polopt.errors import CallError, PoloptError
from polopt.interfaces import State
from polopt.loops.improve import Improve
from polopt.method import Method
from polopt.overrides import resolve
from polopt.part import Range, check_fields
from polopt.parts.rule import functional
from polopt.parts.rule.descend import Descend
from polopt.run import seed_of

#: (candidate, seed of its run) -> fitness; all candidates of a generation get the same seed
Evaluate = Callable[[Tensor, int], float]


class Strategy(Protocol):
    """Proposes candidates and learns from their fitness."""

    mean: Tensor  # the best guess so far

    def ask(self) -> Float[Tensor, "N D"]:
        """The next candidates."""
        ...

    def tell(self, fitness: Float[Tensor, " N"]) -> dict[str, float]:
        """Fitness (more is better) of the candidates asked for last; returns what there is to report."""
        ...

    def state(self) -> State: ...

    def load(self, state: State) -> None: ...


# -------------------------------------------------------------------- evolution strategies
@dataclass(frozen=True)
class OpenES:
    """Evolution strategies with antithetic pairs (Salimans et al. 2017, arXiv 1703.03864).

    Candidates mean +- sigma e, e ~ N(0, 1); with z the fitness standardised over the generation, the ascent direction
    sum_i z_i e_i / (N sigma) goes through Adam.
    """

    population: Annotated[int, Range(ge=2), "candidates per generation; an even number, as they come in pairs"] = 16
    sigma: Annotated[float, Range(gt=0), "standard deviation of candidates around the mean"] = 0.1
    lr: Annotated[float, Range(gt=0), "rate of Adam"] = 0.02
    betas: Annotated[tuple[float, float], "decay of Adam's moments"] = (0.9, 0.99)

    def __post_init__(self) -> None:
        check_fields(self, "es")
        if self.population % 2:
            raise CallError(f"es.population = {self.population}: candidates come in pairs, expected an even number")

    def start(self, mean: Float[Tensor, " D"], seed: int) -> ESState:
        """A search around `mean`."""
        return ESState(self, mean, seed)


class ESState:
    """`OpenES` on its way: the mean, Adam's moments and the stream of perturbations."""

    def __init__(self, how: OpenES, mean: Float[Tensor, " D"], seed: int) -> None:
        self.how, self.mean = how, mean.detach().clone().float()
        self.rng = torch.Generator().manual_seed(seed_of(seed, "search/perturbations"))
        self.noise = torch.zeros(0, self.mean.numel())
        self.rule = Descend(optimizer="adam", lr=how.lr, betas=how.betas, max_grad_norm=None)
        self.moments = functional.initial(self.rule, self.mean)

    def ask(self) -> Float[Tensor, "N D"]:
        """Pairs mean + sigma e, mean - sigma e: first all of the one, then all of the other kind."""
        half = torch.randn(self.how.population // 2, self.mean.numel(), generator=self.rng)
        self.noise = torch.cat([half, -half])
        return self.mean + self.how.sigma * self.noise

    def tell(self, fitness: Float[Tensor, " N"]) -> dict[str, float]:
        """One step of Adam along the estimated gradient; equal fitness of all candidates teaches nothing."""
        if fitness.shape != (self.noise.shape[0],):
            raise CallError(f"tell: fitness has shape {tuple(fitness.shape)}, {self.noise.shape[0]} candidates were asked for")
        if not bool(fitness.isfinite().all()):
            raise PoloptError(f"the fitness of candidate {int((~fitness.isfinite()).nonzero()[0])} is not finite")
        x = fitness.float()
        spread = x.std(correction=0)
        z = (x - x.mean()) / spread if float(spread) > 0 else torch.zeros_like(x)
        gradient = z @ self.noise / (len(x) * self.how.sigma)
        rate = torch.tensor(self.how.lr)
        self.mean, self.moments, _ = functional.step(self.rule, self.mean, -gradient, self.moments, rate)
        return {"gradient_norm": float(gradient.norm()), "mean_norm": float(self.mean.norm())}

    def state(self) -> State:
        """Everything that the next generation depends on."""
        return {"mean": self.mean, "moments": dict(self.moments), "rng": self.rng.get_state()}

    def load(self, state: State) -> None:
        """Continue from `state()`."""
        self.mean, self.moments = state["mean"].clone(), {k: v.clone() for k, v in state["moments"].items()}
        self.rng.set_state(state["rng"])


# -------------------------------------------------------------------- what a candidate is worth
@dataclass(frozen=True)
class Trial:
    """A candidate's worth: train a policy from scratch with the candidate in the memory of the part in `slot`.

    reduce: "final" is the held-out score at the end, "mean" the mean over the run of the return of episodes while training.
    """

    method: Method
    task: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    slot: str = "surrogate"
    reduce: Literal["final", "mean"] = "final"

    def shapes(self) -> dict[str, torch.Size]:
        """Names and shapes of the tensors that a candidate holds, in this order."""
        return {k: v.shape for k, v in self.method.memory().of(self.slot).items()}

    def place(self, candidate: Float[Tensor, " D"]) -> dict[str, Tensor]:
        """The candidate as tensors by name. Raises `CallError` when it has not as many numbers as the part remembers."""
        shapes = self.shapes()
        count = sum(s.numel() for s in shapes.values())
        if candidate.shape != (count,):
            raise CallError(
                f"a candidate of shape {tuple(candidate.shape)}: the {self.slot} of {self.method.name} remembers {count} numbers"
            )
        cut = torch.split(candidate, [s.numel() for s in shapes.values()])
        return {k: x.view(s).clone() for (k, s), x in zip(shapes.items(), cut, strict=True)}

    def flat(self, tensors: Mapping[str, Tensor]) -> Float[Tensor, " D"]:
        """The candidate that these tensors are."""
        return torch.cat([torch.zeros(0), *(tensors[k].reshape(-1).float() for k in self.shapes())])

    def __call__(self, candidate: Float[Tensor, " D"], seed: int) -> float:
        """Fitness of a candidate in a run of its own with this seed."""
        given = {"optim.compile": "never", "threads": 1, **self.settings, "seed": seed}
        resolved = resolve(self.method, self.task, given, sources="trial")
        run = Improve(resolved.method, resolved.task, resolved.settings)
        run.memory.write(self.slot, self.place(candidate))
        returns: list[float] = []
        try:
            while run.fraction() < 1:
                found = run.step().get("episode_return")
                returns += [float(found)] if found is not None else []
            if self.reduce == "mean":
                return sum(returns) / max(1, len(returns))
            return run.evaluate()["score"]
        finally:
            run.collector.close()


# -------------------------------------------------------------------- the loop
class Search:
    """A search that can be stepped, saved and resumed."""

    def __init__(self, strategy: Strategy, evaluate: Evaluate, seed: int = 0) -> None:
        self.strategy, self.evaluate, self.seed = strategy, evaluate, seed
        self.generation = 0
        self.history: list[dict[str, float]] = []

    def step(self) -> dict[str, float]:
        """One generation: ask, evaluate, tell. All of its candidates are evaluated with one seed, so that luck is shared."""
        seed = seed_of(self.seed, f"search/{self.generation}") % 2**31
        fitness = torch.tensor([self.evaluate(c, seed) for c in self.strategy.ask()])
        told = self.strategy.tell(fitness)
        self.generation += 1
        numbers = {"mean": float(fitness.mean()), "best": float(fitness.max()), "worst": float(fitness.min())}
        self.history.append({"generation": self.generation, **numbers, **told})
        return self.history[-1]

    def run(self, generations: int, tell: Sequence[Callable[[dict[str, float]], None]] = ()) -> Tensor:
        """Step until `generations` are done; returns the strategy's best guess."""
        while self.generation < generations:
            found = self.step()
            for observer in tell:
                observer(found)
        return self.strategy.mean

    def state(self) -> State:
        """For a checkpoint."""
        return {"strategy": self.strategy.state(), "generation": self.generation, "history": list(self.history)}

    def load(self, state: State) -> None:
        """Continue from `state()`."""
        self.strategy.load(state["strategy"])
        self.generation, self.history = state["generation"], list(state["history"])


__all__ = ["ESState", "Evaluate", "OpenES", "Search", "Strategy", "Trial"]
