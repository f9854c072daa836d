"""Exact little worlds for tests: a tabular softmax policy over prompts, and a collector that answers requests from it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from polopt.batch import Batch
from polopt.columns import last_valid
from polopt.interfaces import Request, Seen
from polopt.part import Can
from polopt.run import seed_of
from polopt.stats import NOW, STATS, View

V, T = 5, 3  # symbols and length of answers


class TablePolicy(nn.Module):
    """Independent softmax per (prompt, position, hint level): logits [P, H, T, V]; hint 0 is the plain prompt."""

    rowwise = True
    can = frozenset({Can.SCORE, Can.ENUMERATE, Can.REFERENCE, Can.VALUE})

    def __init__(self, prompts: int = 4, hints: int = 4, seed: int = 0) -> None:
        super().__init__()
        g = torch.Generator().manual_seed(seed)
        self.logits = nn.Parameter(torch.randn(prompts, hints, T, V, generator=g, dtype=torch.float64) * 0.5)
        self.register_buffer("start", self.logits.detach().clone())
        self.device = torch.device("cpu")
        self.seen: list[tuple[str, frozenset[str]]] = []

    def nets(self) -> Mapping[str, nn.Module]:
        return {"policy": self}

    def table(self, batch: Batch, logits: Tensor) -> Tensor:
        return logits[batch.keys["item"], batch.row["level"].long()]

    def evaluate(self, batch: Batch, want: frozenset[str], view: View = NOW) -> dict[str, Tensor]:
        self.seen.append((view.params, want))
        logits = self.table(batch, self.start if view.params == "ref" else self.logits)
        flat, action = logits.reshape(-1, V), batch.action.reshape(-1)
        out = {name: STATS[name](flat, action).view(batch.shape) for name in want}
        return out if view.params == "now" else {k: v.detach() for k, v in out.items()}

    def tokens(self, batch: Batch) -> int:
        return int(batch.mask.sum())

    def remember(self, batch: Batch) -> None: ...

    def state(self) -> dict[str, Any]:
        return dict(self.state_dict())

    def load(self, state: Mapping[str, Any]) -> None:
        self.load_state_dict(state)

    def save_pretrained(self, folder: Path) -> None: ...


@dataclass
class TableCollector:
    """Answers requests by sampling from the table; reward 1 where `good(item, hint, action)` says so."""

    policy: TablePolicy
    good: Callable[[Tensor, Tensor, Tensor], Tensor]
    seed: int = 0
    want: int = 4
    exact: bool = True
    size: int = 4
    requests: list[Sequence[Request]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.rng = torch.Generator().manual_seed(seed_of(self.seed, "actions"))
        self.next = 0
        self.spent: dict[str, int] = {}

    def draw(self, n: int) -> list[int | None]:
        first, self.next = self.next, self.next + n
        return [i % self.policy.logits.shape[0] for i in range(first, first + n)]

    def look(self, item: int) -> Seen:
        """An empty prompt, and a solution of four symbols: a hint's length is its level."""
        return Seen("", "####", lambda prompt: True)

    def answer(self, requests: Sequence[Request], *, clock: Any) -> Batch:
        self.requests.append(requests)
        item = torch.tensor([r.item for r in requests for _ in range(r.count)])
        hint = torch.tensor([float(len(r.context or "")) for r in requests for _ in range(r.count)])
        group = torch.tensor([g for g, r in enumerate(requests) for _ in range(r.count)])
        logits = self.policy.logits.detach()[item, hint.long()]
        action = torch.multinomial(logits.softmax(-1).reshape(-1, V), 1, generator=self.rng).view(-1, T)
        mask = torch.ones(len(item), T, dtype=torch.bool)
        logp = STATS["logp"](logits.reshape(-1, V), action.reshape(-1)).view(mask.shape)
        reward = last_valid(mask) * self.good(item, hint, action)[:, None].double()
        self.spent = {"decisions": mask.numel(), "tokens": mask.numel()}
        return Batch(
            mask=mask, reward=reward[..., None], terminated=last_valid(mask), truncated=torch.zeros_like(mask),
            group=group, keys={"item": item}, units={"group": len(requests), "item": self.policy.logits.shape[0]},
            action=action, stats={"logp@behaviour": logp}, row={"level": hint}, horizon=T,
        )  # fmt: skip

    def evaluate(self, episodes: int) -> dict[str, float]:
        return {"score": 0.0}

    def report(self) -> dict[str, float]:
        return {}

    def costs(self) -> dict[str, int]:
        spent, self.spent = self.spent, {}
        return spent

    def state(self) -> dict[str, Any]:
        return {"rng": self.rng.get_state(), "next": self.next}

    def load(self, state: Mapping[str, Any]) -> None:
        self.rng.set_state(state["rng"])
        self.next = state["next"]

    def close(self) -> None: ...


@dataclass
class TableTask:
    """The task behind `TableCollector`."""

    name: str = "table"
    domain: str = "table"
    offers: frozenset[Can] = frozenset({Can.SCORE, Can.GROUPS, Can.EPISODES, Can.REFILL, Can.REFERENCE, Can.VALUE, Can.SOLUTIONS})

    def preset(self, method: Any) -> Mapping[str, Any]:
        return {}
