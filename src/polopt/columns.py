"""Columns of a batch: ends and rewards on [B,T] tensors, checks of what users pass, padding and joining."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from polopt.errors import CallError
from polopt.pooling import not_half


def last_valid(mask: Bool[Tensor, "B T"]) -> Bool[Tensor, "B T"]:
    """True at each row's last valid decision (nowhere in an empty row)."""
    after = mask.flip(1).long().cumsum(1).flip(1)
    return mask & (after == 1)


def next_valid(x: Float[Tensor, "B T"], mask: Bool[Tensor, "B T"]) -> Float[Tensor, "B T"]:
    """The value of `x` at the next valid decision of the row, 0 where there is none."""
    t = x.shape[1]
    place = torch.where(mask, torch.arange(t, device=x.device), t)
    upcoming = place.flip(1).cummin(1).values.flip(1)  # first valid index at or after t
    nxt = torch.cat([upcoming[:, 1:], upcoming.new_full((x.shape[0], 1), t)], 1)
    return torch.cat([x, x.new_zeros(x.shape[0], 1)], 1).gather(1, nxt)


def own_flags(flags: Bool[Tensor, "B T"], mask: Bool[Tensor, "B T"]) -> Bool[Tensor, "B T"]:
    """Flags of valid decisions: one that stands at a place between them (tool text) is of the valid decision before it."""
    t = torch.arange(mask.shape[1], device=mask.device)
    owner = torch.where(mask, t + 1, 0).cummax(1).values  # 0: nothing was decided yet
    found = torch.zeros(mask.shape[0], mask.shape[1] + 1, device=mask.device).scatter_add(1, owner, flags.float())
    return mask & (found[:, 1:] > 0)


def place_reward(reward: Tensor, mask: Bool[Tensor, "B T"]) -> Float[Tensor, "B T K"]:
    """Bring a reward of shape [B], [B,T] or [B,T,K] to [B,T,K]; a [B] reward lands on the row's last valid decision.

    Rewards in half precision become float32: sums of them would be rounded.
    """
    reward = not_half(reward) if reward.is_floating_point() else reward.to(torch.get_default_dtype())
    b, t = mask.shape
    if tuple(reward.shape) == (b,):
        return torch.where(last_valid(mask), reward[:, None], torch.zeros_like(reward[:, None]))[..., None]
    if tuple(reward.shape) == (b, t):
        return reward[..., None]
    if reward.dim() == 3 and tuple(reward.shape[:2]) == (b, t):
        return reward
    raise CallError(f"reward has shape {tuple(reward.shape)}, expected ({b},), ({b}, {t}) or ({b}, {t}, K)")


def missing_message(name: str) -> str:
    """What to pass so that the statistic `name@view` exists."""
    stat, _, view = name.partition("@")
    argument = {
        "logp@now": "logp=", "logp@old": "logp_old=", "logp@behaviour": "logp_behaviour=", "logp@ref": "logp_ref=",
        "value@now": "value=", "value@old": "value= or stats={'value@old': ...}", "entropy@now": "entropy=",
    }.get(name, f"stats={{'{name}': ...}}")  # fmt: skip
    if name == "value_next@old":
        return (
            "the batch lacks 'value_next@old' (V of the state after each decision): pass value_next= to Batch.of; value= shifted "
            "by one stands in for it only where every row ends by termination"
        )
    meaning = {
        "now": "of the current policy, with gradient", "old": "at the start of the update",
        "ref": "of the reference policy", "behaviour": "as recorded by the sampler",
    }.get(view, f"of view '{view}'")  # fmt: skip
    return f"the batch lacks '{name}' ({stat} {meaning}): pass {argument} to Batch.of (it is never recomputed silently)"


def common_shape(table: Mapping[str, Tensor], mask: Tensor | None, reward: Tensor | None) -> tuple[int, int]:
    shapes = {k: tuple(v.shape[:2]) for k, v in table.items()}
    for k, v in table.items():
        if v.dim() < 2:
            raise CallError(f"'{k}' has shape {tuple(v.shape)}, expected [B,T] (rows x decisions)")
    if len(set(shapes.values())) > 1:
        raise CallError(f"statistics disagree on [B,T]: {shapes}")
    if shapes:
        b, t = next(iter(shapes.values()))
        return int(b), int(t)
    if mask is not None:
        found = tuple(torch.as_tensor(mask).shape)
        if len(found) != 2:
            raise CallError(f"mask has shape {found}, expected [B,T] (rows x decisions)")
        return found[0], found[1]
    if reward is not None and torch.as_tensor(reward).dim() >= 2:
        b, t = torch.as_tensor(reward).shape[:2]
        return int(b), int(t)
    raise CallError("Batch.of needs a statistic, a mask or a per-decision reward of shape [B,T]")


def flags_of(name: str, x: Tensor, mask: Bool[Tensor, "B T"]) -> Bool[Tensor, "B T"]:
    """Ends of shape [B,T], or [B] (of each row's last valid decision), as [B,T] on the mask's device."""
    x, shape = torch.as_tensor(x).to(mask.device).bool(), tuple(mask.shape)
    if tuple(x.shape) == shape:
        return x
    if tuple(x.shape) == shape[:1]:
        return last_valid(mask) & x[:, None]
    raise CallError(
        f"{name} has shape {tuple(x.shape)}, expected {shape} (rows x decisions), or ({shape[0]},) for the ends of rows"
    )


def column_of(name: str, x: Tensor, mask: Bool[Tensor, "B T"]) -> Tensor:
    """A row column [B,...] on the mask's device."""
    x = torch.as_tensor(x).to(mask.device)
    if x.dim() < 1 or x.shape[0] != mask.shape[0]:
        raise CallError(f"row['{name}'] has shape {tuple(x.shape)}, expected ({mask.shape[0]}, ...): one entry per row")
    return x


def all_end(mask: Bool[Tensor, "B T"], terminated: Bool[Tensor, "B T"], truncated: Bool[Tensor, "B T"]) -> bool:
    """Whether no return goes on beyond a cut or the end of its row, so that no value of an unseen state is needed."""
    ended = own_flags(terminated, mask)
    cut = last_valid(mask) | own_flags(truncated, mask)
    return not bool((cut & ~ended).any())


def pad_axis(x: Tensor, extra: int, *, left: bool) -> Tensor:
    spec = [0, 0] * (x.dim() - 2) + ([extra, 0] if left else [0, extra])
    return F.pad(x, spec, value=0)


def cat_tree(values: Iterable[Any]) -> Any:
    values = list(values)
    if isinstance(values[0], Mapping):
        return {k: cat_tree([v[k] for v in values]) for k in values[0]}
    return torch.cat(values)


def cat_left(values: list[Any]) -> Any:
    if isinstance(values[0], Mapping):
        return {k: cat_left([v[k] for v in values]) for k in values[0]}
    if values[0].dim() < 2:
        return torch.cat(values)
    width = max(v.shape[1] for v in values)
    return torch.cat([pad_axis(v, width - v.shape[1], left=True) for v in values])


def join_contexts(contexts: Sequence[Mapping[str, Any]], rows: Sequence[int]) -> dict[str, Any]:
    """Contexts of all rows, one below the other; entries that a batch lacks are of width 0 before they are padded."""
    known = {k: v for context in reversed(contexts) for k, v in context.items()}
    names = dict.fromkeys(k for context in contexts for k in context)
    return {k: cat_left([c[k] if k in c else _nothing(known[k], n) for c, n in zip(contexts, rows, strict=True)]) for k in names}


def _nothing(like: Any, rows: int) -> Any:
    """A context entry of width 0."""
    if isinstance(like, Mapping):
        return {k: _nothing(v, rows) for k, v in like.items()}
    return like.new_zeros(rows, 0, *like.shape[2:]) if like.dim() > 1 else like.new_zeros(rows)
