"""The optimisers of `Descend`: PyTorch's fused steps in place, and pure functions of tensors for graphs that hold several steps.

The formulas are those of `torch.optim` (and of TensorFlow's RMSProp); tests hold them against it. Both forms work on the same
state tensors, so that eager and compiled steps can follow each other.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.optim.adam import adam
from torch.optim.sgd import sgd

if TYPE_CHECKING:
    from polopt.parts.rule.descend import FirstOrder

Tensors = dict[str, Tensor]


def initial(rule: FirstOrder, p: Tensor) -> Tensors:
    """State tensors of one parameter before the first step."""
    if rule.optimizer in ("adam", "adamw"):
        step = torch.zeros((), dtype=torch.float32, device=p.device)
        return {"step": step, "exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
    momentum = {"momentum_buffer": torch.zeros_like(p)} if rule.momentum else {}
    if rule.optimizer == "sgd":
        return momentum
    start = torch.ones_like(p) if rule.optimizer == "rmsprop-tf" else torch.zeros_like(p)
    return {"square_avg": start, **momentum}


def fused_step(rule: FirstOrder, moved: Sequence[tuple[Tensor, Tensor, Tensors]], rate: float, skipped: Tensor) -> None:
    """One step of every (parameter, clipped gradient, state), in place; nothing moves where `skipped` is 1, without a device sync.

    PyTorch's functional form: its optimiser objects take longer for their bookkeeping than a small network for its step.
    """
    params, grads, states = [m[0] for m in moved], [m[1] for m in moved], [m[2] for m in moved]
    common: dict[str, Any] = {"lr": rate, "weight_decay": rule.weight_decay, "maximize": False, "fused": True, "found_inf": skipped}
    if rule.optimizer in ("adam", "adamw"):
        adam(
            params, grads, [s["exp_avg"] for s in states], [s["exp_avg_sq"] for s in states], [], [s["step"] for s in states],
            amsgrad=False, beta1=rule.betas[0], beta2=rule.betas[1], eps=rule.eps,
            decoupled_weight_decay=rule.optimizer == "adamw", **common,
        )  # fmt: skip
    elif rule.optimizer == "sgd":
        buffers = [s.get("momentum_buffer") for s in states]
        sgd(params, grads, buffers, momentum=rule.momentum, dampening=0.0, nesterov=False, **common)
    else:  # RMSProp has no fused form, and none in PyTorch with epsilon inside the root
        for p, g, state in moved:
            to, new = advance(rule, p, g, state, torch.tensor(rate, device=p.device), skipped == 0)
            p.copy_(to)
            for k, v in new.items():
                state[k].copy_(v)


def step(rule: FirstOrder, p: Tensor, g: Tensor, state: Tensors, rate: Tensor) -> tuple[Tensor, Tensors, Tensors]:
    """(parameters, state, report) after clipping and one step along gradient `g`; nothing moves if `g` is not finite."""
    norm = g.norm()
    good = norm.isfinite()
    g = torch.where(good, g, torch.zeros_like(g))
    if rule.max_grad_norm is not None:
        g = g * torch.where(good, (rule.max_grad_norm / (norm + 1e-6)).clamp(max=1.0), torch.ones_like(norm))
    moved, kept = advance(rule, p, g, state, rate, good)
    return moved, kept, {"grad_norm": norm, "skipped": 1.0 - good.to(norm.dtype), "lr": rate}


def advance(rule: FirstOrder, p: Tensor, g: Tensor, state: Tensors, rate: Tensor, good: Tensor) -> tuple[Tensor, Tensors]:
    """(parameters, state) after one step along the clipped gradient `g`, or as they are where `good` is false."""
    if rule.optimizer == "adamw":
        p_decayed = p * (1 - rate * rule.weight_decay)
    else:
        p_decayed = p
        g = g + rule.weight_decay * p if rule.weight_decay else g
    if rule.optimizer in ("adam", "adamw"):
        moved, new = _adam(rule, p_decayed, g, state, rate)
    elif rule.optimizer == "sgd":
        moved, new = _momentum(rule, p_decayed, g, state, rate)
    else:
        square = rule.alpha * state["square_avg"] + (1 - rule.alpha) * g * g
        root = (square + rule.eps).sqrt() if rule.optimizer == "rmsprop-tf" else square.sqrt() + rule.eps
        moved, new = _momentum(rule, p_decayed, g / root, state, rate)
        new["square_avg"] = square
    return torch.where(good, moved, p), {k: torch.where(good, v, state[k]) for k, v in new.items()}


def _adam(rule: FirstOrder, p: Tensor, g: Tensor, state: Tensors, rate: Tensor) -> tuple[Tensor, Tensors]:
    b1, b2 = rule.betas
    count = state["step"] + 1
    mean = state["exp_avg"].lerp(g, 1 - b1)
    square = b2 * state["exp_avg_sq"] + (1 - b2) * g * g
    root = (square / (1 - b2**count)).sqrt() + rule.eps
    return p - rate * (mean / (1 - b1**count)) / root, {"step": count, "exp_avg": mean, "exp_avg_sq": square}


def _momentum(rule: FirstOrder, p: Tensor, d: Tensor, state: Tensors, rate: Tensor) -> tuple[Tensor, Tensors]:
    if not rule.momentum:
        return p - rate * d, {}
    buffer = rule.momentum * state["momentum_buffer"] + d
    return p - rate * buffer, {"momentum_buffer": buffer}
