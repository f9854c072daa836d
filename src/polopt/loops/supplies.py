"""Which supply of transitions serves a source that keeps them; sources that pass batches on need none."""

from __future__ import annotations

from typing import Any

from polopt.collect.offline import Offline, open_dataset
from polopt.collect.replay import Replay
from polopt.errors import CallError
from polopt.interfaces import Policy, Supply, Task
from polopt.loops.rounds import needs_nets
from polopt.method import Method
from polopt.parts.replay import Dataset, Ring
from polopt.run import Budget, RunFolder, Streams
from polopt.settings import Settings


def discount_of(method: Method) -> float:
    """The discount with which a method's targets fold rewards; raises `CallError` when two disagree."""
    found = {p.gamma for path, p in method.parts().items() if path.rpartition(".")[2] == "target" and hasattr(p, "gamma")}
    if len(found) > 1:
        raise CallError(f"{method.name}: its targets have different discounts {sorted(found)}")
    return float(next(iter(found), 0.99))


def open_supply(
    method: Method, policy: Policy, task: Task, settings: Settings, streams: Streams, folder: RunFolder | None
) -> Supply | None:
    """The supply of a run whose method has such a source, allocated; None for other sources."""
    source: Any = method.source
    if not isinstance(source, Ring | Dataset):
        return None
    needs_nets(policy)
    held: Any = policy
    budget = Budget.parse(settings.budget)
    if isinstance(source, Dataset):
        if budget.unit in ("decisions", "tokens"):
            raise CallError(
                f"budget '{settings.budget}' is never spent: {method.name} learns from a dataset and makes no decisions; "
                "say how many rounds of updates, e.g. 20k-rounds, or seconds"
            )
        found = open_dataset(source, task)
        if source.normalize_obs:
            held.standardise(*found.statistics())
        return Offline(
            source,
            found,
            gamma=discount_of(method),
            generator=streams.torch("replay"),
            device=policy.device,
            inward=held.head.inward,
        )
    spaces: Any = task
    observation, action = spaces.spaces()
    return Replay(
        source,
        obs_size=observation.size,
        action_size=action.size,
        discrete=action.kind == "discrete",
        channels=1,
        envs=settings.collect.envs,
        gamma=discount_of(method),
        generator=streams.torch("replay"),
        device=policy.device,
        folder=folder.path if folder is not None else None,
        budget_decisions=int(budget.amount) if budget.unit == "decisions" else None,
    )
