"""Statistics of units, spread back on their members: the arithmetic behind `Batch.pool`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from polopt.errors import CallError


def not_half(x: Tensor) -> Tensor:
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


class _FromFloat16(torch.autograd.Function):
    """float16 to float32; gradients beyond the range of float16 become its largest number instead of infinite."""

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x.float()

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None: ...

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        most = torch.finfo(torch.float16).max
        return gradient.clamp(-most, most).to(torch.float16)


def widened(x: Tensor) -> Tensor:
    """Half precision as float32, whose sums and exponentials do not overflow; other tensors as they are."""
    if x.dtype == torch.float16 and x.requires_grad:
        out: Tensor = _FromFloat16.apply(x)  # type: ignore[no-untyped-call]
        return out
    return not_half(x)


def pool_along(x: Tensor, m: Tensor, how: str, ddof: int, loo: bool, dim: int) -> Tensor:
    w = m.to(x.dtype)
    n = w.sum(dim, keepdim=True)
    if how in ("max", "min"):
        fill = torch.finfo(x.dtype).min if how == "max" else torch.finfo(x.dtype).max
        filled = torch.where(m, x, torch.full_like(x, fill))
        out = filled.amax(dim, keepdim=True) if how == "max" else filled.amin(dim, keepdim=True)
        return torch.where(n > 0, out, torch.zeros_like(out)).expand(x.shape)
    if how == "count":
        return n.expand(x.shape)
    xs = torch.where(m, x, torch.zeros_like(x))
    total = xs.sum(dim, keepdim=True)
    return _combine(xs, w, total, n, how, ddof, loo, lambda v: v.sum(dim, keepdim=True)).expand(x.shape)


def pool_units(x: Tensor, m: Tensor, unit: Tensor, size: int, how: str, ddof: int, loo: bool) -> Tensor:
    w = m.to(x.dtype)

    def add(v: Tensor) -> Tensor:
        return torch.zeros(size, dtype=v.dtype, device=v.device).index_add(0, unit, v)[unit]

    if how in ("max", "min"):
        fill = torch.finfo(x.dtype).min if how == "max" else torch.finfo(x.dtype).max
        filled = torch.where(m, x, torch.full_like(x, fill))
        out = torch.full((size,), fill, dtype=x.dtype, device=x.device)
        out = out.scatter_reduce(0, unit, filled, "amax" if how == "max" else "amin")[unit]
        return torch.where(add(w) > 0, out, torch.zeros_like(out))
    n = add(w)
    if how == "count":
        return n
    xs = torch.where(m, x, torch.zeros_like(x))
    return _combine(xs, w, add(xs), n, how, ddof, loo, add)


def _combine(
    xs: Tensor, w: Tensor, total: Tensor, n: Tensor, how: str, ddof: int, loo: bool, add: Callable[[Tensor], Tensor]
) -> Tensor:
    if how == "sum":
        return total - xs if loo else total
    if how == "mean":
        return (total - xs) / (n - w).clamp(min=1) if loo else total / n.clamp(min=1)
    if how not in ("var", "std"):
        raise CallError(f"pool: unknown how='{how}'; known: mean, sum, std, var, max, min, count")
    centred = (xs - total / n.clamp(min=1)) * w  # two passes: exact for equal values up to rounding of the mean
    var = add(centred * centred) / (n - ddof).clamp(min=1) * (n > ddof)
    # the root has an infinite slope at 0, which would make gradients of equal members NaN
    return var if how == "var" else torch.where(var > 0, var, torch.ones_like(var)).sqrt() * (var > 0)
