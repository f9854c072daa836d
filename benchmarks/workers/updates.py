"""Cost of an update, of every method of a domain, interleaved in one process: DOMAIN (control, text) and MODE (eager, compiled).

All methods get the same batch, the same parameters before each update, and the same epochs and minibatches; PPO (control) and GRPO
(text) are what the others are measured against. Penalties towards a reference are left out of all, as the pass for it would hide
what else a method costs. A method whose update multiplies no more matrices than the baseline's (counted, in operations) needs no
extra pass through any network; its time and memory may be at most a tenth above. Methods are found by what they are, not by name:
those of the family that the task accepts and that learn from what was just sampled.
"""

import json
import statistics
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from polopt.batch import Batch, Clock
from polopt.errors import CallError
from polopt.loops.improve import Improve
from polopt.method import Method
from polopt.overrides import resolve
from polopt.parts.source import Fresh
from polopt.registry import all_methods

BAR = 1.10
#: Baseline, whose family is compared; task; settings.
DOMAINS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "control": (
        "ppo",
        "gym:CartPole-v1",
        {"collect.envs": 8, "collect.steps": 256, "epochs": 4, "minibatch": None, "minibatches": 8},
    ),
    "text": (
        "grpo",
        "text:spell_backward",
        {"collect.prompts": 8, "collect.max_new_tokens": 16, "epochs": 2, "minibatch": None, "minibatches": 2, "group_size": 8},
    ),
}


class Contender:
    """A method's run that updates again and again from one batch and one set of parameters."""

    def __init__(self, method: Method, task: str, settings: dict[str, Any], mode: str) -> None:
        compiled = {"optim.compile": "always", "optim.compile_steps": 1} if mode == "compiled" else {"optim.compile": "never"}
        plain = tuple(p for p in method.penalty if not any(n.endswith("@ref") for n in p.needs))
        method = replace(method, penalty=plain)
        own = {k: v for k, v in settings.items() if k != "group_size" or hasattr(method.sampler, k)}
        resolved = resolve(method, task, {"budget": "100000-updates", "threads": 1, **compiled, **own})
        self.run = Improve(resolved.method, resolved.task, resolved.settings)
        self.start = self.run.flat.data.clone()
        self.work = 0
        self.times: list[float] = []
        self.peak = 0

    def feed(self, batch: Batch) -> None:
        """Update from this batch, whatever is sampled."""
        on = [u.on for u in self.run.method.updates]
        self.run.collect = lambda clock: {name: replace(batch, clock=clock) for name in on}  # type: ignore[method-assign]

    def step(self) -> float:
        """Seconds of one update from the same start."""
        self.run.flat.data.copy_(self.start)
        return float(self.run.step()["seconds_update"])

    def operations(self) -> int:
        """Multiplications and additions of matrix products in an update, which must run eagerly."""
        with FlopCounterMode(display=False) as counter:
            self.step()
        return int(counter.get_total_flops())

    def memory(self) -> int:
        """Most bytes of tensors that an update holds at once, beyond what was there before."""
        from torch.profiler import ProfilerActivity, profile

        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
            self.step()
        events = [e for e in found.profiler.kineto_results.events() if e.name() == "[memory]"]  # type: ignore[union-attr]
        held = 0
        for event in sorted(events, key=lambda e: e.start_ns()):
            held += event.nbytes()
            self.peak = max(self.peak, held)
        return self.peak


def contenders(domain: str, mode: str) -> tuple[dict[str, Contender], dict[str, str]]:
    """Methods that the task takes and that learn from what was just sampled; and why others are left out."""
    base, task, settings = DOMAINS[domain]
    known = all_methods()
    family = [m for m in known.values() if isinstance(m, Method) and m.family == known[base].family and isinstance(m.source, Fresh)]
    found: dict[str, Contender] = {}
    left: dict[str, str] = {}
    for method in sorted(family, key=lambda m: m.name != base):  # what they are compared with comes first
        try:
            one = Contender(method, task, settings, mode)
            batch = batch if found else first_batch(one.run)
            one.feed(batch)
            if mode == "compiled" and one.run.compile.start is None:
                left[method.name] = "its updates cannot be compiled"
                continue
            twin = one if mode == "eager" else Contender(method, task, settings, "eager")
            twin.feed(batch)
            one.work = twin.operations()
            found[method.name] = one
        except CallError as error:
            left[method.name] = str(error).splitlines()[0][:160]
    return found, left


def first_batch(run: Improve) -> Batch:
    """What the baseline samples, without the statistics that its update fills in."""
    (batch,) = run.collect(Clock()).values()
    return replace(batch, stats={k: v for k, v in batch.stats.items() if k == "logp@behaviour"})


def ratios(found: dict[str, Contender], base: str, number: Callable[[Contender], list[float]]) -> dict[str, float]:
    """Median over rounds of each method's number relative to the baseline's in the same round."""
    mine = number(found[base])
    return {n: round(statistics.median(a / b for a, b in zip(number(c), mine, strict=True)), 3) for n, c in found.items()}


def main() -> None:
    """Measure and print one line of JSON."""
    domain, mode, rounds = sys.argv[1], sys.argv[2], int(sys.argv[3]) if len(sys.argv) > 3 else 15
    base = DOMAINS[domain][0]
    found, left = contenders(domain, mode)
    for one in found.values():
        one.step()
    for _ in range(rounds):
        for one in found.values():
            one.times.append(one.step())
    time_ = ratios(found, base, lambda c: c.times)
    memory = ratios(found, base, lambda c: [float(c.memory())]) if mode == "eager" else {}
    work = {n: c.work / found[base].work for n, c in found.items()}
    rows = {n: {"time": time_[n], "memory": memory.get(n), "work": round(work[n], 3), "extra pass": work[n] > 1.01} for n in found}
    bound = {n: max(r["time"], r["memory"] or 0) for n, r in rows.items() if not r["extra pass"]}
    worst = max(bound, key=lambda n: bound[n])
    print(
        json.dumps(
            {
                "value": bound[worst], "unit": f"x {base}, worst of the methods without an extra pass ({worst})",
                "above the bar": sorted(n for n, x in bound.items() if x > BAR),
                "ms": round(1e3 * statistics.median(found[base].times), 1), "methods": rows, "left out": left,
            }
        )
    )  # fmt: skip


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
