"""Statistics of tokens from hidden states, in chunks: [B,T,V] never exists, with or without gradient.

Two paths. Few logits (`DIRECT`) are computed at once. Many, from a plain linear output layer, are computed a chunk at a time into
one buffer: the statistics of a few rows of it after the other, and in the backward pass, where the chunk is computed again, their
gradients written over the logits. So the peak is one chunk's logits, what a few rows need, and the gradient of the output layer.
An output layer with adapters, scales or caps is checkpointed chunk by chunk instead, at several times the memory of a chunk.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from polopt.errors import unknown
from polopt.stats import StatFn, find_stat, stat_names

#: Logits held at once (elements): 128 MB in float32.
CHUNK = 1 << 25
#: Up to so many logits are computed at once, which is faster and takes a few times their memory.
DIRECT = 1 << 23
#: Rows of a chunk whose statistics are taken together, as a share of it.
BLOCKS = 128

Head = Callable[[Tensor], Tensor]
Heat = float | Tensor


def chunked(
    hidden: Float[Tensor, "N H"],
    action: Int[Tensor, " N"],
    temperature: float | Float[Tensor, " N"],
    head: Head,
    vocabulary: int,
    names: frozenset[str],
    chunk: int = CHUNK,
    linear: tuple[Tensor, Tensor | None] | None = None,
) -> dict[str, Tensor]:
    """Statistics `names` (of `polopt.stats`) of `action` under softmax(head(hidden) / temperature), each [N] or [N,m].

    chunk: logits held at once. linear: weight [V,H] and bias [V] of the head where it is nothing but these.
    """
    functions: dict[str, StatFn] = {}
    for name in sorted(names):
        fn = find_stat(name)
        if fn is None:
            raise unknown("statistic of a language model", name, stat_names())
        functions[name] = fn

    n, rows = hidden.shape[0], max(1, chunk // vocabulary)
    if n <= max(1, min(chunk, DIRECT) // vocabulary):
        return dict(zip(functions, _of(head(hidden).float(), action, temperature, functions), strict=True))
    if linear is not None:
        weight, bias = linear
        found = _Linear.apply(hidden, weight, bias, action, temperature, functions, min(rows, n))  # type: ignore[no-untyped-call]
        return dict(zip(functions, found, strict=True))
    parts = []
    for i in range(0, n, rows):
        here = slice(i, i + rows)

        def some(h: Tensor, a: Tensor, t: Heat) -> tuple[Tensor, ...]:
            return _of(head(h).float(), a, t, functions)

        given = hidden[here], action[here], _at(temperature, here)
        parts.append(checkpoint(some, *given, use_reentrant=False) if torch.is_grad_enabled() else some(*given))
    return {name: torch.cat([p[k] for p in parts]) for k, name in enumerate(functions)}


def _at(temperature: Heat, here: slice) -> Heat:
    return temperature[here] if isinstance(temperature, Tensor) else temperature


def _of(logits: Tensor, action: Tensor, temperature: Heat, functions: Mapping[str, StatFn]) -> tuple[Tensor, ...]:
    """Each statistic; log-probability and entropy share one pass over the logits when both are wanted."""
    if isinstance(temperature, Tensor):
        logits = logits / temperature[:, None]
    elif temperature != 1:
        logits = logits / temperature
    if "logp" in functions and "entropy" in functions:
        logq = logits - logits.logsumexp(-1, keepdim=True)
        spread = -(logq.exp() * logq.clamp(min=torch.finfo(logq.dtype).min)).sum(-1)
        both = {"logp": logq.gather(-1, action[:, None]).squeeze(-1), "entropy": spread}
        return tuple(both[name] if name in both else fn(logits, action) for name, fn in functions.items())
    return tuple(fn(logits, action) for fn in functions.values())


class _Linear(torch.autograd.Function):
    """Statistics of hidden @ weight.T + bias, a chunk of rows at a time in one buffer, forwards and backwards."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, action: Tensor, temperature: Heat,
        functions: Mapping[str, StatFn], rows: int,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        ctx.set_materialize_grads(False)
        kind = torch.get_autocast_dtype(hidden.device.type) if torch.is_autocast_enabled(hidden.device.type) else weight.dtype
        ctx.given = action, temperature, functions, rows, kind
        ctx.save_for_backward(hidden, weight, bias)
        out: tuple[Tensor, ...] = ()
        with torch.autocast(hidden.device.type, enabled=False):
            for here, logits, _ in _chunks(hidden, weight, bias, rows, kind):
                for block in _blocks(here, rows, hidden.device.type):
                    at = slice(block.start - here.start, block.stop - here.start)
                    found = _of(logits[at].float(), action[block], _at(temperature, block), functions)
                    # kept pieces, however small, would keep the allocator from using the space between them again
                    out = out or tuple(x.new_empty(len(hidden), *x.shape[1:]) for x in found)
                    for whole, piece in zip(out, found, strict=True):
                        whole[block] = piece
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        hidden, weight, bias = ctx.saved_tensors
        action, temperature, functions, rows, kind = ctx.given
        wanted = {name: g for name, g in zip(functions, grads, strict=True) if g is not None}
        used = {name: functions[name] for name in wanted}
        to_hidden = torch.zeros_like(hidden) if ctx.needs_input_grad[0] else None
        to_weight = torch.zeros_like(weight) if ctx.needs_input_grad[1] else None
        to_bias = torch.zeros_like(bias) if bias is not None and ctx.needs_input_grad[2] else None
        with torch.autocast(hidden.device.type, enabled=False):
            for here, logits, h in _chunks(hidden, weight, bias, rows, kind):
                for block in _blocks(here, rows, hidden.device.type):
                    at = slice(block.start - here.start, block.stop - here.start)
                    logits[at] = _slope(
                        logits[at], action[block], _at(temperature, block), used, [g[block] for g in wanted.values()]
                    )
                if to_hidden is not None:
                    to_hidden[here] = (logits @ weight.to(kind)).to(hidden.dtype)
                if to_weight is not None and kind == weight.dtype:
                    to_weight.addmm_(logits.T, h)
                elif to_weight is not None:
                    to_weight += logits.T @ h
                if to_bias is not None:
                    to_bias += logits.sum(0, dtype=to_bias.dtype)
        return to_hidden, to_weight, to_bias, None, None, None, None


def _slope(
    logits: Tensor, action: Tensor, temperature: Heat, functions: Mapping[str, StatFn], grads: list[Tensor]
) -> Float[Tensor, "n V"]:
    """The gradient of the statistics, weighted by `grads`, in the logits; 0 where none depends on them."""
    with torch.enable_grad():
        leaf = logits.detach().float().requires_grad_()
        found = _of(leaf, action, temperature, functions)
        pairs = [(x, g) for x, g in zip(found, grads, strict=True) if x.requires_grad]
        if not pairs:
            return torch.zeros_like(logits)
        slope: Tensor = torch.autograd.grad([x for x, _ in pairs], leaf, [g for _, g in pairs])[0]
        return slope


def _chunks(hidden: Tensor, weight: Tensor, bias: Tensor | None, rows: int, kind: torch.dtype) -> Any:
    """(rows, logits in a buffer that the next chunk overwrites, their hidden states)."""
    weight = weight.to(kind)
    buffer = hidden.new_empty(rows, weight.shape[0], dtype=kind)
    for i in range(0, hidden.shape[0], rows):
        h = hidden[i : i + rows].to(kind)
        logits = torch.mm(h, weight.T, out=buffer[: len(h)])
        yield slice(i, i + len(h)), logits if bias is None else logits.add_(bias), h


def _blocks(here: slice, rows: int, device: str) -> list[slice]:
    """Pieces of a chunk: small ones stay in a processor's cache, on a GPU each costs a dozen launches."""
    size = max(1, rows // (BLOCKS if device == "cpu" else 8))
    return [slice(i, min(i + size, here.stop)) for i in range(here.start, here.stop, size)]
