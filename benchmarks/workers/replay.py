"""Cost of a ring of a million HalfCheetah transitions: its bytes, and draws and writes, and draws as a share of an update."""

import json
import statistics
import time
from collections.abc import Callable

import torch
from torch import nn

from polopt.batch import Batch
from polopt.collect.replay import Replay
from polopt.parts.replay import Ring

torch.set_num_threads(1)


def mlp(inputs: int, outputs: int) -> nn.Sequential:
    """Two hidden layers of 256."""
    return nn.Sequential(nn.Linear(inputs, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, outputs))


class Round:
    """A plain round of TD3 (two critics, every round an actor): what a draw is compared with, whatever else the machine does."""

    def __init__(self) -> None:
        self.actor, self.critics = mlp(17, 6), [mlp(23, 1) for _ in range(2)]
        self.steps = torch.optim.Adam(self.actor.parameters()), torch.optim.Adam([p for c in self.critics for p in c.parameters()])

    def __call__(self, batch: Batch) -> None:
        """One gradient step of the critics, one of the actor."""
        assert batch.reward is not None
        obs, after = batch.obs[:, 0], batch.next_obs[:, 0]
        with torch.no_grad():
            x = torch.cat((after, self.actor(after).tanh()), 1)
            y = batch.reward[:, 0] + 0.99 * torch.minimum(*(c(x) for c in self.critics))
        both = torch.cat((obs, batch.action[:, 0]), 1)
        sum((c(both) - y).square().mean() for c in self.critics).backward()  # type: ignore[union-attr]
        self.steps[1].step()
        self.steps[1].zero_grad()
        (-self.critics[0](torch.cat((obs, self.actor(obs).tanh()), 1)).mean()).backward()
        self.steps[0].step()
        self.steps[0].zero_grad()


def seconds(work: Callable[[], object], repeats: int) -> float:
    """Median processor seconds of a call, over ten blocks: what others do on the machine counts little."""
    blocks = []
    for _ in range(10):
        start = time.thread_time()
        for _ in range(repeats):
            work()
        blocks.append((time.thread_time() - start) / repeats)
    return statistics.median(blocks)


found: dict[str, float] = {}
for n_step in (1, 3):
    ring = Replay(
        Ring(n_step=n_step), obs_size=17, action_size=6, discrete=False, channels=1, envs=1, gamma=0.99,
        generator=torch.Generator().manual_seed(0),
    )  # fmt: skip
    block, none = 50_000, torch.zeros(1, 50_000, dtype=torch.bool)
    obs = torch.randn(1, block + 1, 17)
    action, reward = torch.randn(1, block, 6), torch.randn(1, block, 1)
    for _ in range(21):  # the heads come round
        ring.write(Batch(~none, reward, none, none, obs=obs[:, :-1], action=action, next_obs=obs[:, 1:]))
    one = torch.zeros(1, 1, dtype=torch.bool)
    step = Batch(~one, reward[:, :1], one, one, obs=obs[:, :1], action=action[:, :1], next_obs=obs[:, 1:2])
    if n_step == 1:
        ring1, fixed = ring, ring.draw(1)
    name = f"n={n_step} " if n_step > 1 else ""
    found[f"{name}draw of 256 (us)"] = round(seconds(lambda r=ring: r.draw(1), 200) * 1e6, 1)  # type: ignore[misc]
    found[f"{name}draw of 32 x 256, each (us)"] = round(seconds(lambda r=ring: r.draw(32), 20) / 32 * 1e6, 1)  # type: ignore[misc]
    found[f"{name}write of one (us)"] = round(seconds(lambda r=ring, s=step: r.write(s), 200) * 1e6, 1)  # type: ignore[misc]
shares, update = [], Round()
for _ in range(30):
    shares.append(seconds(lambda: ring1.draw(1), 4) / seconds(lambda: update(fixed), 1))
raw = 1_000_000 * (4 * (17 + 6 + 1 + 17) + 1)
print(
    json.dumps(
        {
            "value": round(100 * statistics.median(shares), 2),
            "unit": "% of an update",
            "bytes / raw": round(ring.bytes / raw, 4),
            **found,
        }
    )
)
