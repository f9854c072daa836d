"""Carries out one `Update` on a batch: epochs, minibatches, micro-batches, and the rule's steps."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from polopt import objective
from polopt.batch import Batch, Clock, Totals
from polopt.draws import Draws
from polopt.interfaces import Nets, Policy, State, Terms
from polopt.loops.compiled import CompiledSteps, can_compile
from polopt.loops.flat import FlatParameters
from polopt.memory import Memory
from polopt.method import Method
from polopt.nets.ensemble import Number
from polopt.objective import Diagnostics
from polopt.part import Can
from polopt.settings import OptimSettings
from polopt.stats import NOW, find_stat, split
from polopt.update import Update


def add_up(total: Diagnostics, more: Diagnostics) -> None:
    """Add diagnostics into `total`, name by name."""
    for k, v in more.items():
        total[k] = total[k] + v if k in total else v


@dataclass
class Problem:
    """One minibatch as the rule sees it (`polopt.interfaces.Problem`)."""

    executor: Executor
    batch: Batch
    advantage: Tensor | None
    clock: Clock
    log_ratio: list[Tensor] = field(default_factory=list)
    seen: list[dict[str, Tensor]] = field(default_factory=list)  # statistics of the policy as the step saw them
    totals: Totals = None  # type: ignore[assignment]  # counted where it is not given

    def __post_init__(self) -> None:
        e = self.executor
        self.parameters: Sequence[Tensor] = e.parameters
        if self.totals is None:
            self.totals = Totals.of(objective.valid_decisions(e.slots, self.batch, self.advantage, e.memory))

    def _micro(self) -> Iterator[tuple[Batch, Tensor | None]]:
        n, size = self.batch.shape[0], self.executor.optim.micro
        if size is None or size >= n or not self.executor.policy.rowwise:
            yield self.batch, self.advantage
            return
        batch = self._surveyed(size) if self.executor.surveys else self.batch
        for i in range(0, n, size):
            rows = slice(i, i + size)
            yield batch.rows(rows), None if self.advantage is None else self.advantage[rows]

    @torch.no_grad()
    def _surveyed(self, size: int) -> Batch:
        """The minibatch with what parts must know of the whole of it, from one more pass in pieces of `size` rows."""
        e, batch = self.executor, self.batch
        pieces = [batch.rows(slice(i, i + size)) for i in range(0, batch.shape[0], size)]
        found = [e.policy.evaluate(piece, e.want | e.late, NOW) for piece in pieces]
        now = {k: torch.cat([f[k] for f in found]) for k in e.want | e.late}
        whole = batch.adding({f"{n}@old": now[n] for n in e.late})
        return batch.adding(objective.survey(e.slots, whole, now, self.advantage, e.memory, e.draws))

    def _loss(self, batch: Batch, advantage: Tensor | None) -> tuple[Tensor, Diagnostics, Batch, dict[str, Tensor]]:
        e = self.executor
        now = e.policy.evaluate(batch, e.want | e.late, NOW) if e.want or e.late else {}
        # the only gradient step of this update: its start is now, exactly
        batch = batch.adding({f"{n}@old": now[n].detach() for n in e.late})
        loss, info = objective.loss(e.method, e.update, batch, now, advantage, self.totals, e.memory, e.draws, e.nets)
        return loss, info, batch, now

    def backward(self, terms: Terms | None = None) -> Diagnostics:
        """Gradients of the whole minibatch, accumulated over its micro-batches, and diagnostics."""
        self.executor.clear()
        total: Diagnostics = {}
        self.log_ratio.clear()
        self.seen.clear()
        for batch, advantage in self._micro():
            loss, info, batch, now = self._loss(batch, advantage)
            if terms is not None:
                more = terms(batch, now)
                loss, info = (
                    loss + torch.stack(list(more.values())).sum(),
                    {**info, **{f"loss/{k}": v.detach() for k, v in more.items()}},
                )
            loss.backward(inputs=self.executor.inputs)  # type: ignore[no-untyped-call]
            add_up(total, {"loss": loss.detach(), **info})
            if self.executor.observe_minibatch:
                self.seen.append({f"{k}@now": v.detach() for k, v in now.items()})
            if "logp" in now and "logp@old" in batch.stats:
                self.log_ratio.append((now["logp"].detach() - batch.stats["logp@old"])[batch.mask])
        return total

    def value(self) -> Tensor:
        """The loss without gradient."""
        with torch.no_grad():
            return torch.stack([self._loss(b, a)[0] for b, a in self._micro()]).sum()

    def kl(self) -> Tensor:
        """Mean KL(old || now) over valid decisions, with graph."""
        now = self.executor.policy.evaluate(self.batch, frozenset({"kl"}), NOW)["kl"]
        return torch.where(self.batch.mask, now, torch.zeros_like(now)).sum() / self.batch.mask.sum().clamp(min=1)

    def kl_each(self) -> Tensor:
        """KL(old || now) of each valid decision, with graph."""
        return self.executor.policy.evaluate(self.batch, frozenset({"kl"}), NOW)["kl"][self.batch.mask]

    def split(self, size: int) -> list[Problem]:
        """Pieces of `size` rows, in order."""
        cuts = [slice(i, i + size) for i in range(0, self.batch.shape[0], size)]
        pieces = ((self.batch.rows(c), None if self.advantage is None else self.advantage[c]) for c in cuts)
        return [Problem(self.executor, batch, advantage, self.clock) for batch, advantage in pieces]


class Executor:
    """One update of a method, bound to a policy's parameters; owns the rule's optimiser state."""

    def __init__(
        self,
        method: Method,
        update: Update,
        policy: Policy,
        flat: FlatParameters,
        memory: Memory,
        optim: OptimSettings,
        shuffle: torch.Generator,
        rng: torch.Generator,
        observe_minibatch: Callable[[Batch], None] | None = None,
    ) -> None:
        self.method, self.update, self.policy, self.flat, self.memory = method, update, policy, flat, memory
        self.optim, self.shuffle, self.observe_minibatch = optim, shuffle, observe_minibatch
        self.draws = Draws(rng, policy.device)
        self.slots = method.slots(update)
        self.parameters = flat.parameters(update.trains)
        span = flat.span(update.trains) if getattr(update.rule, "flat", False) else None
        self.stepper = update.rule.bind([span] if span is not None else self.parameters)  # type: ignore[attr-defined]
        self.span = span
        # what other updates train gets no gradient, which then is not computed either
        self.inputs = None if len(self.parameters) == len(flat.places) else list(self.parameters)
        self.nets: Nets | None = policy if Can.NETS in policy.can else None  # type: ignore[assignment]
        self.want = split(method.needs(update)).get("now", frozenset())
        self.by_rows = policy.rowwise or any(p.rows for _, p in self.slots.acting())
        self.surveys = any(p.surveys for _, p in self.slots.acting())
        self.by_groups = any(p.groups for _, p in self.slots.acting())
        nets: Mapping[str, Any] = policy.nets() if hasattr(policy, "nets") else {}
        numbers = [nets[n] for n in update.trains if isinstance(nets.get(n), Number)]
        self.bounded: list[tuple[Tensor, float, float]] = [(n.value, *n.bounds) for n in numbers if n.bounds is not None]
        self.late: frozenset[str] = frozenset()  # statistics of the start that the only gradient step takes from itself
        self.compiled: CompiledSteps | None = None

    def clear(self) -> None:
        """Zero the gradients of what this update trains."""
        grad = self.flat.grad if self.inputs is None or self.span is None else self.span.grad
        assert grad is not None
        grad.zero_()

    def size(self, units: int) -> int:
        """Rows (or decisions) per gradient step."""
        u = self.update
        if u.minibatch is not None:
            return min(u.minibatch, units)
        return -(-units // u.minibatches) if u.minibatches else units

    def steps_per_batch(self, units: int) -> int:
        """Gradient steps that one batch of `units` rows or decisions gives."""
        return self.update.epochs * -(-units // self.size(units))

    def passes(self, units: int) -> int:
        """How often the policy processes the batch: once an epoch, twice where micro-batches need a survey of the whole before."""
        micro = self.optim.micro
        split = self.policy.rowwise and micro is not None and micro < self.size(units)
        return self.update.epochs * (2 if self.surveys and split else 1)

    def single_step(self, units: int) -> bool:
        """Whether the start of the update and the only gradient step coincide; a rule that searches also looks beyond its start."""
        return self.steps_per_batch(units) == 1 and not self.update.rule.host

    def waiting(self, batch: Batch) -> frozenset[str]:
        """Statistics of logits at the start of the update that the batch lacks, though the update needs or reports them."""
        names = split(self.method.needs(self.update)).get("old", frozenset()) | self.want & {"logp"}
        return frozenset(n for n in names if f"{n}@old" not in batch.stats and find_stat(n) is not None)

    def prepare(self, batch: Batch, advantage: Tensor | None) -> tuple[Batch, Tensor | None]:
        """Rows for minibatches: single decisions where the policy and all parts allow it."""
        if self.by_rows:
            return batch, advantage
        if advantage is not None:
            batch = batch.adding({"advantage": advantage})
        flat = batch.decisions()
        return flat, None if advantage is None else flat.stats["advantage"]

    def run(self, batch: Batch, advantage: Tensor | None, clock: Clock, *, compiled: int = 0) -> Diagnostics:
        """Make all steps of this update on `batch`, in graphs of up to `compiled` steps (0: eagerly).

        Diagnostics are means over steps; ratio quantiles are those of the last epoch.
        """
        batch, advantage = self.prepare(batch, advantage)
        units = batch.shape[0]
        if units == 0:
            return {"empty_batch": torch.ones(())}
        size = self.size(units)
        self.late = self.waiting(batch) if self.single_step(units) else frozenset()
        whole = Problem(self, batch, advantage, clock) if hasattr(self.stepper, "finish") else None
        if whole is not None:
            self.stepper.begin(whole)
        if compiled and can_compile(self):
            self.compiled = self.compiled or CompiledSteps(self)
            total, ratios, steps, epochs = self.compiled.run(
                batch, advantage, clock, size, compiled, lambda b, a: self._step(b, a, clock)
            )
        else:
            total, ratios, steps, epochs = self._eager(batch, advantage, clock, size, whole)
        means = {k: v / steps for k, v in total.items()}
        ends = self.stepper.finish(whole) if whole is not None else {}
        return {**means, **quantiles(ratios), **ends, "epochs": torch.tensor(float(epochs))}

    def _eager(
        self, batch: Batch, advantage: Tensor | None, clock: Clock, size: int, whole: Problem | None = None
    ) -> tuple[Diagnostics, list[Tensor], int, int]:
        """All steps one by one: sums of diagnostics, log-ratios of the last epoch, steps and epochs made."""
        total: Diagnostics = {}
        ratios: list[Tensor] = []
        steps = 0
        made = 0
        while made < self.update.epochs:
            made += 1
            ratios.clear()
            kl, inside = torch.zeros(()), 0
            for part, adv in self._minibatches(batch, advantage, size):
                info, log_ratio = self._step(part, adv, clock)
                add_up(total, info)
                ratios += log_ratio
                kl = kl + info.get("kl_old", torch.zeros(()))
                inside += 1
            steps += inside
            if whole is not None:
                self.stepper.after_epoch(whole)
            if self.update.target_kl is not None and float(kl) / inside > self.update.target_kl:
                break
        return total, ratios, steps, made

    def _step(self, batch: Batch, advantage: Tensor | None, clock: Clock) -> tuple[Diagnostics, list[Tensor]]:
        problem = Problem(self, batch, advantage, clock)
        info = self.stepper.step(problem)
        self.project()
        if self.observe_minibatch:
            names = problem.seen[0] if problem.seen else {}
            self.observe_minibatch(batch.adding({k: torch.cat([s[k] for s in problem.seen]) for k in names}))
        return info, problem.log_ratio

    def once(self, batch: Batch, totals: Totals, clock: Clock) -> Diagnostics:
        """One step on the whole of `batch`; `totals` are its denominators."""
        problem = Problem(self, batch, None, clock, totals=totals)
        info: Diagnostics = self.stepper.step(problem)
        self.project()
        return info

    @torch.no_grad()
    def project(self) -> None:
        """Bring trained numbers back within their bounds, so that none has a way to come back from beyond them."""
        for number, low, high in self.bounded:
            number.clamp_(low, high)

    def _minibatches(self, batch: Batch, advantage: Tensor | None, size: int) -> Iterator[tuple[Batch, Tensor | None]]:
        units = batch.shape[0]
        if size >= units:
            yield batch, advantage
            return
        for index in self._order(batch, size):
            yield batch.rows(index), None if advantage is None else advantage[index]

    def _order(self, batch: Batch, size: int) -> Sequence[Tensor]:
        """Rows (or decisions) of each minibatch, in random order; whole groups where a part compares the rows of a group."""
        device = batch.mask.device
        if not self.by_groups or batch.group is None:
            return torch.split(torch.randperm(batch.shape[0], generator=self.shuffle).to(device), size)
        rank = torch.randperm(batch.units["group"], generator=self.shuffle).to(device)[batch.group]
        ends = torch.bincount(rank).cumsum(0)
        starts = torch.cat([ends.new_zeros(1), ends[:-1]])
        rows = torch.bincount(torch.div(starts, size, rounding_mode="floor")[rank])  # a group belongs where it begins
        return torch.split(rank.argsort(stable=True), rows[rows > 0].tolist())

    def state(self) -> State:
        """Optimiser state."""
        return self.stepper.state()  # type: ignore[no-any-return]

    def load(self, state: State) -> None:
        """Restore from `state()`."""
        self.stepper.load(state)


def quantiles(log_ratio: list[Tensor]) -> Diagnostics:
    """1, 50 and 99 % quantiles and maximum of the probability ratio now / old, and its mean distance from 1."""
    if not log_ratio:
        return {}
    x = torch.cat([r.reshape(-1) for r in log_ratio])
    if x.numel() == 0:
        return {}
    if x.numel() > 1_000_000:  # torch.quantile sorts everything and refuses more than 16 M elements
        x = x[:: x.numel() // 1_000_000 + 1]
    q = torch.quantile(x.float(), torch.tensor([0.01, 0.5, 0.99, 1.0], device=x.device)).exp()
    named = dict(zip(("ratio_q01", "ratio_q50", "ratio_q99", "ratio_max"), q, strict=True))
    return {**named, "ratio_deviation": x.float().expm1().abs().mean()}
