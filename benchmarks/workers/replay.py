"""Cost of a ring of a million HalfCheetah transitions: its bytes, and draws and writes against an update of 8 ms."""

import json
import statistics
import time
from collections.abc import Callable

import torch

from polopt.batch import Batch
from polopt.collect.replay import Replay
from polopt.parts.replay import Ring

UPDATE = 8e-3  # seconds: one round of critics and actor, 256 x 256, batch 256, one thread
torch.set_num_threads(1)


def seconds(work: Callable[[], object], repeats: int) -> float:
    """Median seconds of a call, over ten blocks."""
    blocks = []
    for _ in range(10):
        start = time.perf_counter()
        for _ in range(repeats):
            work()
        blocks.append((time.perf_counter() - start) / repeats)
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
    name = f"n={n_step} " if n_step > 1 else ""
    found[f"{name}draw of 256 (us)"] = round(seconds(lambda r=ring: r.draw(1), 200) * 1e6, 1)  # type: ignore[misc]
    found[f"{name}draw of 32 x 256, each (us)"] = round(seconds(lambda r=ring: r.draw(32), 20) / 32 * 1e6, 1)  # type: ignore[misc]
    found[f"{name}write of one (us)"] = round(seconds(lambda r=ring, s=step: r.write(s), 200) * 1e6, 1)  # type: ignore[misc]
share = found["draw of 256 (us)"] * 1e-6 / UPDATE
raw = 1_000_000 * (4 * (17 + 6 + 1 + 17) + 1)
print(
    json.dumps(
        {"value": round(100 * share, 2), "unit": "% of an update of 8 ms", "bytes / raw": round(ring.bytes / raw, 4), **found}
    )
)
