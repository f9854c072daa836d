"""Which policy and collector serve which domain: a table, so that the loop knows no domain."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from polopt.errors import unknown
from polopt.interfaces import Collector, Policy, Task
from polopt.method import Method
from polopt.settings import Settings

#: domain -> (module of policies, module of collectors); each has a `build` function
DOMAINS = {
    "control": ("polopt.policies.control", "polopt.collect.vector"),
    "text": ("polopt.policies.lm", "polopt.collect.text"),
    "table": ("polopt.policies.table", "polopt.collect.table"),
}


def _module(task: Task, which: int) -> Any:
    if task.domain not in DOMAINS:
        raise unknown("task domain", task.domain, DOMAINS)
    return import_module(DOMAINS[task.domain][which])


def make_policy(task: Task, method: Method, settings: Settings) -> Policy:
    """The policy for a task, with the nets that the method's parts ask for, initialised by seed and net name."""
    policy: Policy = _module(task, 0).build(task, settings, method, settings.seed)
    return policy


def iteration_size(task: Task, method: Method, settings: Settings) -> tuple[int, int | None]:
    """Fewest and most decisions of one iteration (None: not known before it runs)."""
    size: tuple[int, int | None] = _module(task, 1).iteration_size(method, settings)
    return size


def make_collector(task: Task, policy: Policy, method: Method, settings: Settings) -> Collector:
    """The collector for a task; whole episodes when a part of the method requires them."""
    collector: Collector = _module(task, 1).build(task, policy, settings, method, settings.seed)
    return collector
