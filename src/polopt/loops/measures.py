"""Numbers about an iteration that cost nothing visible: how well values explain returns, which groups carry signal."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from polopt.batch import Batch

Metrics = dict[str, float]


def explained_variance(batch: Batch) -> dict[str, Tensor]:
    """1 - Var(return - value) / Var(return) over valid decisions, where old values are known; 0 when returns do not vary."""
    if "value@old" not in batch.stats:
        return {}
    target, value = batch.stats["return@old"], batch.stats["value@old"]
    total = batch.pool(target, by="batch", how="var").flatten()[0]
    rest = batch.pool(target - value, by="batch", how="var").flatten()[0]
    return {"explained_variance": torch.where(total > 0, 1 - rest / total.clamp(min=1e-12), torch.zeros_like(total))}


def signal(batch: Batch, advantage: Tensor) -> dict[str, Tensor]:
    """Share of groups without any nonzero advantage (dead groups), where rows come in groups."""
    if batch.group is None or batch.units["group"] >= batch.shape[0]:
        return {}
    size = advantage.abs() if advantage.dim() == 2 else advantage.abs().amax(-1)
    strongest = batch.pool((size * batch.mask).amax(1), by="group", how="max")
    share = batch.mask.any(1) / batch.pool(torch.ones_like(strongest), by="group", how="count").clamp(
        min=1
    )  # 1/size: a group counts once
    return {"dead_groups": ((strongest == 0) * share).sum() / share.sum().clamp(min=1e-9)}


def to_floats(info: Mapping[str, Tensor]) -> Metrics:
    """All diagnostics as floats, with one transfer from the device."""
    if not info:
        return {}
    device = next((v.device for v in info.values() if v.device.type != "cpu"), torch.device("cpu"))
    values = torch.stack([v.detach().float().reshape(()).to(device) for v in info.values()]).tolist()
    return dict(zip(info, values, strict=True))


def tidy(value: float) -> float:
    return value if isinstance(value, int) else float(f"{value:.8g}")
