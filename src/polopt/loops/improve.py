"""The loop `improve`: collect, weigh, update, remember, evaluate, save. It knows no paper and no domain."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from polopt import objective
from polopt.batch import HEATED, Batch, Clock
from polopt.errors import CallError, PoloptError
from polopt.interfaces import Observer, Plan, State, Task
from polopt.loops.allot import Allotment
from polopt.loops.build import make_collector, make_policy
from polopt.loops.executor import Executor
from polopt.loops.flat import FlatParameters
from polopt.loops.inspect import inspect
from polopt.loops.measures import Metrics, explained_variance, signal, to_floats
from polopt.loops.plan import Compile, compile_plan
from polopt.loops.rounds import Rounds
from polopt.loops.supplies import discount_of, open_supply
from polopt.loops.whole import Loop
from polopt.method import Method
from polopt.part import Moment, call, union
from polopt.run import RunFolder, Streams
from polopt.settings import Settings
from polopt.stats import VIEWS, split, with_prerequisites
from polopt.update import Update


class Improve(Loop):
    """A run that can be stepped, saved and resumed."""

    def __init__(
        self,
        method: Method,
        task: Task,
        settings: Settings,
        *,
        folder: RunFolder | None = None,
        observers: Sequence[Observer] = (),
    ) -> None:
        method.check()
        method.refuse_unless(task.offers, task.name)
        if settings.threads:
            torch.set_num_threads(settings.threads)
        super().__init__(method, task, settings, folder, observers)
        self.streams = Streams(settings.seed)
        self.policy = make_policy(task, method, settings)
        self.flat = FlatParameters(self.policy.nets())
        self.collector = make_collector(task, self.policy, method, settings)
        self.memory = method.memory(self.collector.size)
        minibatch = any("minibatch" in p.moments for p in method.parts().values())
        self.executors = {
            u.name: Executor(
                method, u, self.policy, self.flat, self.memory, settings.optim,
                self.streams.torch("minibatch"), self.streams.torch("parts"),
                (lambda b: self.observe("minibatch", b)) if minibatch else None,
            )
            for u in method.updates
        }  # fmt: skip
        self._refuse_shared_layers()
        self.store: dict[str, Batch] = {}
        self.supply = open_supply(method, self.policy, task, settings, self.streams, folder)
        self.rounds = Rounds(self.executors, self.policy) if self.supply is not None else None
        self.compile = compile_plan(method, task, settings, self.executors.values(), rounds=self.rounds is not None)
        held: Any = self.supply
        networks: Any = self.policy
        for slot, part in method.parts().items():
            if hasattr(part, "build"):
                self.memory.built[slot] = part.build(held.columns(), networks.standardised)

    def _refuse_shared_layers(self) -> None:
        """Raise `CallError` when a rule that bounds its own step shares parameters with another update."""
        for name, one in self.executors.items():
            mine = {*map(id, one.parameters)} if getattr(one.update.rule, "alone", False) else set()
            for other, two in self.executors.items():
                if other != name and mine & {*map(id, two.parameters)}:
                    raise CallError(
                        f"{self.method.name}: rule '{one.update.rule.name}' of update '{name}' bounds how far the policy moves, "
                        f"but update '{other}' trains the same layers; use policy.shared = false"
                    )

    # ---------------------------------------------------------------- one iteration
    def step(self) -> Metrics:
        """One iteration: collect, fill statistics, weigh, update, remember. Returns its metrics."""
        start = time.perf_counter()
        clock = Clock(self.updates, min(1.0, self.fraction()))
        batches = self.collect(clock)
        collected = time.perf_counter()
        self.ledger.charge(self.collector.costs())
        info = self.learn(batches, clock) if self.supply is None else self.replay(batches, clock)
        self.policy.remember(next(iter(batches.values()), None))
        self.updates += 1
        done = time.perf_counter()
        self.seconds += done - start
        return {
            "update": self.updates,
            **self.ledger.spent,
            "seconds": self.seconds,
            **to_floats(info),
            **self.collector.report(),  # its own numbers win: it sees what a sampler drops later
            "seconds_collect": collected - start,
            "seconds_update": done - collected,
        }

    def learn(self, batches: dict[str, Batch], clock: Clock) -> dict[str, Tensor]:
        """One round of updates on whole batches."""
        info: dict[str, Tensor] = {}
        due = [u for u in self.method.updates if self.updates % u.every == 0 and u.on in batches]
        # every update's statistics and advantages are taken before the first one moves a parameter
        ready = [self.prepare(u, batches[u.on], first=i == 0) for i, u in enumerate(due)]
        main = self.method.update() if due else Update()
        full = {**batches, **{u.on: r[0] for u, r in zip(due, ready, strict=True)}}
        if any("scored" in p.moments for p in self.method.parts().values()):
            before = frozenset().union(*(p.needs for p in self.method.reward))
            for batch in full.values():
                self.observe("scored", objective.shaped(self.method, self.fill(batch, before), self.memory))
        compiled = self.compile.steps if self.compile.start is not None and self.updates >= self.compile.start else 0
        for update, (batch, advantage, known) in zip(due, ready, strict=True):
            found = known | self.executors[update.name].run(batch, advantage, clock, compiled=compiled)
            self.charge_pass(batch, self.executors[update.name].passes(batch.shape[0]))
            aside = update.on != main.on
            info |= {f"{update.name}/{k}" if aside or k in info else k: v for k, v in found.items()}
        if ready:
            self.after_updates(full.get(main.on, ready[0][0]))  # before observation statistics move
        return info

    def replay(self, batches: dict[str, Batch], clock: Clock) -> dict[str, Tensor]:
        """The rounds of updates that are due, on transitions drawn from what is kept."""
        assert self.supply is not None
        assert self.rounds is not None
        for batch in batches.values():
            self.supply.write(batch)
        due = self.supply.rounds()
        if not due:
            return {}
        compiled = self.compile.start is not None and self.updates >= self.compile.start
        info = self.rounds.run(self.supply.draw(due), due, clock, compiled=compiled)
        self.ledger.charge({"rounds": due})
        return info

    def collect(self, clock: Clock) -> dict[str, Batch]:
        """Drive the sampler: answer its requests until it returns named batches."""
        look = getattr(self.collector, "look", None)
        plan, allotment = Plan(self.collector.want, self.collector.draw, clock, self.collector.size, look=look), None
        if self.method.allocator is not None:
            allotment = Allotment(self.method.allocator, plan, self.memory.of("allocator"), self.streams.numpy("allocator"))
            plan = replace(plan, allocate=allotment)
        sampling = call(self.method.sampler, plan=plan, memory=self.memory.of("sampler"))
        answer: Batch | None = None
        while True:
            try:
                requests = sampling.send(answer) if answer is not None else next(sampling)
            except StopIteration as stop:
                batches: dict[str, Batch] = stop.value
                break
            answer = self.collector.answer(requests, clock=clock)
            self.observe("answered", answer)
        if allotment is not None and not allotment.asked:
            sampler, allocator = self.method.sampler.name, allotment.part.name
            raise CallError(f"sampler '{sampler}' never asked plan.allot, so that allocator '{allocator}' decides nothing")
        kept = batches
        if self.supply is None:
            batches = {k: self.written(b) for k, b in batches.items()}
            kept = call(self.method.source, batches=batches, store=self.store, memory=self.memory.of("source"))
        batches = {k: replace(b, clock=clock) for k, b in kept.items()}
        for batch in batches.values():
            self.observe("drawn", batch)
        return batches

    def written(self, batch: Batch) -> Batch:
        """What was sampled, with `logp@old` where the source keeps the log-probabilities of the policy that wrote it.

        Those are the sampler's own, and nothing is computed, unless the sampler drew from another distribution: truncated, changed
        by a decoder, at another temperature, or under another prompt than rows are scored under. A ratio to these would not be 1
        at an unchanged policy.
        """
        if "logp@behaviour" not in self.method.source.needs:
            return batch
        hot = batch.source is not None and bool((batch.source == HEATED).any())
        altered = getattr(self.collector, "alters", False) or hot or "sampled" in batch.context
        return self.fill(batch, frozenset({"logp@old"})) if altered else batch

    def prepare(self, update: Update, batch: Batch, *, first: bool) -> tuple[Batch, Tensor | None, dict[str, Tensor]]:
        """Statistics, advantages and returns of the whole batch for one update, and what they tell."""
        executor = self.executors[update.name]
        batch = self.fill(batch, with_prerequisites(self.method.needs(update)), executor if first else None)
        info: dict[str, Tensor] = {}
        advantage = objective.advantages(self.method, update, batch, self.memory) if "surrogate" in update.terms else None
        if "critic" in update.terms and executor.slots.critic is not None:
            batch = batch.adding({"return@old": objective.returns(self.method, update, batch, self.memory)})
            info |= explained_variance(batch)
        if advantage is not None:
            info |= signal(batch, advantage)
        for view in ("behaviour", "old"):
            if f"entropy@{view}" in batch.stats and "entropy" not in info:
                info["entropy"] = batch.pool(batch.stats[f"entropy@{view}"], by="batch").flatten()[0]
        return batch, advantage, info

    def fill(self, batch: Batch, needs: frozenset[str], lazily: Executor | None = None) -> Batch:
        """Compute the statistics that parts need at the views old and ref, each view in one pass.

        What the collector recorded stays as it is. Statistics of logits at the start, such as `logp@old`, are left to the gradient
        step where that is the update's only one and nothing before it reads them: old and now then coincide, a pass is saved.
        """
        for view, names in split(needs).items():
            if view not in ("old", "ref"):
                continue
            missing = frozenset(n for n in names if f"{n}@{view}" not in batch.stats) - {"return"}
            if view == "old" and lazily:
                missing -= self._can_wait(lazily, batch)
            if view == "old" and not self.policy.rowwise and missing:
                missing |= frozenset({"entropy"}) & getattr(self.policy, "recorded", frozenset({"entropy"}))
            if missing:
                found = self._evaluate(batch, missing, view)
                batch = batch.adding({f"{n}@{view}": v for n, v in found.items()})
        return batch

    def _can_wait(self, executor: Executor, batch: Batch) -> frozenset[str]:
        units = batch.shape[0] if executor.by_rows else int(batch.mask.sum())
        if not executor.single_step(units):
            return frozenset()
        late = [p for p in self.method.parts().values() if p.moments & {"scored", "minibatch", "stepped"}]
        first = [executor.slots.advantage] if executor.slots.advantage is not None else []
        early = union(p.needs for p in [*self.method.reward, *first, *executor.slots.select, *late])
        return frozenset(n for n in executor.waiting(batch) if f"{n}@old" not in early)

    def _evaluate(self, batch: Batch, names: frozenset[str], view: str) -> dict[str, Tensor]:
        size = self.settings.optim.micro
        self.charge_pass(batch)
        with torch.no_grad():
            if size is None or size >= batch.shape[0] or not self.policy.rowwise:
                return self.policy.evaluate(batch, names, VIEWS[view])
            parts = [
                self.policy.evaluate(batch.rows(slice(i, i + size)), names, VIEWS[view]) for i in range(0, batch.shape[0], size)
            ]
            return {k: torch.cat([p[k] for p in parts]) for k in parts[0]}

    def charge_pass(self, batch: Batch, times: int = 1) -> None:
        """Charge the tokens that a policy processes when it evaluates `batch`; control policies process none."""
        count = getattr(self.policy, "tokens", None)
        if count is not None:
            self.ledger.charge({"tokens": times * count(batch)})

    def after_updates(self, batch: Batch) -> None:
        """The moment "stepped", with statistics of the policy after its updates where a part needs them."""
        names = split(self.method.needs()).get("stepped", frozenset())
        if names:
            found = self._evaluate(batch, names, "now")
            batch = batch.adding({f"{n}@stepped": v for n, v in found.items()})
        self.observe("stepped", batch)

    def observe(self, moment: Moment, batch: Batch) -> None:
        """Let parts write their memory; each reads its old entries and returns new ones."""
        for slot, part in self.method.parts().items():
            if moment in part.moments:
                self.memory.write(slot, part.observe(moment, batch=batch, memory=self.memory.of(slot)))

    def measure(self) -> dict[str, float]:
        """Score on held-out seeds or prompts; parts may remember the outcome."""
        found = self.collector.evaluate(self.settings.evaluate.episodes)
        if self.supply is not None:
            found |= inspect(self.executors, self.policy, self.supply, discount_of(self.method))
        for slot, part in self.method.parts().items():
            if "evaluated" in part.moments:
                entries = {k: torch.tensor(v) for k, v in found.items()}
                self.memory.write(slot, part.observe("evaluated", batch=entries, memory=self.memory.of(slot)))
        return found

    def summary(self, status: str) -> dict[str, Any]:
        """The content of summary.json; `rounds` is there, as 0, also where none was made."""
        found = super().summary(status)
        return found if self.supply is None else {"rounds": 0, **found}

    # ---------------------------------------------------------------- saving
    def state(self) -> State:
        """The checkpoint tree."""
        return {
            "method": self.method.name,
            "task": self.task.name,
            "policy": self.policy.state(),
            "updates": {k: e.state() for k, e in self.executors.items()},
            "memory": self.memory.state(),
            "store": {k: b.tree() for k, b in self.store.items()},
            "supply": self.supply.state() if self.supply is not None else {},
            "rounds": self.rounds.state() if self.rounds is not None else {},
            "streams": self.streams.state(),
            "collector": self.collector.state(),
            "clock": {"updates": self.updates, "seconds": self.seconds, "spent": dict(self.ledger.spent)},
            "scores": dict(self.scores),
            "compile": {"start": self.compile.start, "steps": self.compile.steps},
        }

    def load(self, state: State) -> None:
        """Continue from a checkpoint tree; one of another method or task is refused."""
        for field, mine in (("method", self.method.name), ("task", self.task.name)):
            if state[field] != mine:
                raise PoloptError(f"the checkpoint was written by {field} '{state[field]}', this run has {field} '{mine}'")
        try:
            self.policy.load(state["policy"])
            for name, executor in self.executors.items():
                executor.load(state["updates"][name])
        except (KeyError, RuntimeError, ValueError) as error:
            raise PoloptError(f"the checkpoint does not fit this policy: {error}") from error
        self.memory.load(state["memory"])
        self.store = {k: Batch.from_tree(t).to(self.policy.device) for k, t in state["store"].items()}
        if self.supply is not None and self.rounds is not None:
            self.supply.load(state["supply"])
            self.rounds.load(state["rounds"])
        self.streams.load(state["streams"])
        self.collector.load(state["collector"])
        self.updates, self.seconds = state["clock"]["updates"], state["clock"]["seconds"]
        self.ledger.spent = dict(state["clock"]["spent"])
        self.scores = dict(state["scores"])
        self.compile = Compile(**state["compile"])
        self._saved_at = (self.updates, time.monotonic())
        if not self.flat.tied():
            raise PoloptError("loading replaced parameters instead of filling them; the policy's load() must copy in place")
