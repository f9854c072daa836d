"""Continuing prompts token by token, with any engine: one loop over decisions, all rows at once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from polopt.policies.lm.engine import Engine
from polopt.policies.lm.sampling import Sampling, choose

#: Draws are made for this many steps at a time, for all rows whether finished or not, so that they depend on row and step alone.
BLOCK = 64


@dataclass(frozen=True)
class Drawn:
    """Completions of N rows, right-padded to the longest: tokens up to and including the one that ended them."""

    action: Int[Tensor, "N T"]
    mask: Bool[Tensor, "N T"]  # real tokens, forced ones included
    forced: Bool[Tensor, "N T"]
    logp: Float[Tensor, "N T"]  # of the sampling distribution, after truncation; 0 at forced tokens
    entropy: Float[Tensor, "N T"]
    ended: Bool[Tensor, " N"]  # by an end token or a stop string, not by the limit


@torch.inference_mode()
def generate(
    engine: Engine,
    head: Callable[[Tensor], Tensor],
    prompt: Int[Tensor, "U P"],
    prompt_mask: Bool[Tensor, "U P"],
    spread: Int[Tensor, " N"],
    limits: Int[Tensor, " N"],
    how: Sampling,
    *,
    rng: torch.Generator | None,
    ends: Sequence[int],
    pad: int,
    tokenizer: Any = None,
    temperature: Float[Tensor, " N"] | None = None,
    forced: Int[Tensor, "N L"] | None = None,
    decoder: Callable[..., Tensor] | None = None,
    uniform: Float[Tensor, "S N"] | None = None,
) -> Drawn:
    """Continue row i from prompt `spread[i]` by at most `limits[i]` tokens.

    temperature: per row instead of `how`'s. forced: tokens that begin each row's completion, -1 where free. decoder: may
    change the logits [n,V] before they are truncated (`decoder(logits, step, rows)`). uniform: draws in [0,1) instead of
    those of `rng`. Finished rows are dropped from the computation once half of the rows are done.
    """
    device, n, longest = prompt.device, len(spread), int(limits.max())
    with torch.inference_mode(False):  # ordinary tensors: they become part of a loss later
        action = torch.full((longest, n), pad, device=device)
        mask, fixed = (torch.zeros(longest, n, dtype=torch.bool, device=device) for _ in range(2))
        logp, entropy = (torch.zeros(longest, n, device=device) for _ in range(2))
        ended = torch.zeros(n, dtype=torch.bool, device=device)
    stops = _Stops(tokenizer, how.stop, action)
    end_ids = torch.tensor(list(ends), device=device)
    look = 1 if device.type == "cpu" else 8  # asking whether all rows are done waits for a GPU
    rows: Tensor | None = None  # rows still computed; None: all
    open_rows = torch.ones(n, dtype=torch.bool, device=device)  # among those, the ones still being written
    draws = torch.zeros(0, n)
    decoding, hidden = engine.open(prompt, prompt_mask, spread, longest)
    for step in range(longest):
        if not how.greedy and step % BLOCK == 0:
            draws = _draws(uniform, rng, step, min(BLOCK, longest - step), n).to(device)
        u = draws[step % BLOCK] if not how.greedy else limits
        t: float | Tensor = how.temperature if temperature is None else temperature[:, None]
        if rows is not None:
            u, t = u[rows], t if isinstance(t, float) else t[rows]
        logits = head(hidden).float()
        if decoder is not None:
            logits = decoder(logits, step, rows)
        token, lp, h = choose(logits, u, t, how)
        is_forced = None
        if forced is not None and step < forced.shape[1]:
            given = forced[:, step] if rows is None else forced[rows, step]
            is_forced = given >= 0
            token, lp, h = torch.where(is_forced, given, token), lp.masked_fill(is_forced, 0), h.masked_fill(is_forced, 0)
        alive = open_rows
        token = torch.where(alive, token, pad)
        where: Any = (step,) if rows is None else (step, rows)
        action[where], mask[where], logp[where], entropy[where] = token, alive, lp * alive, h * alive
        if is_forced is not None:
            fixed[where] = is_forced & alive
        finished = torch.isin(token, end_ids) if len(ends) != 1 else token == end_ids[0]
        finished = finished & alive
        if how.stop:
            finished = finished | (stops.hit(step, rows, alive) & alive)
        if rows is None:
            ended |= finished
        else:
            ended[rows] |= finished
        room = limits > step + 1
        open_rows = alive & ~finished & (room if rows is None else room[rows])
        if step + 1 == longest:
            break
        if (step + 1) % look == 0:
            left = int(open_rows.sum())
            if left == 0:
                break
            if 2 * left <= len(open_rows) and len(open_rows) > 8:
                here = open_rows.nonzero().squeeze(1)
                rows = here if rows is None else rows[here]
                decoding.keep(here)
                token, open_rows = token[here], open_rows[here]
        hidden = decoding.step(token)
    with torch.inference_mode(False):
        action, mask, fixed, logp, entropy = (x[: step + 1].T.contiguous() for x in (action, mask, fixed, logp, entropy))
    return Drawn(action, mask, fixed, logp, entropy, ended)


def _draws(uniform: Tensor | None, rng: torch.Generator | None, start: int, steps: int, n: int) -> Float[Tensor, "S N"]:
    """Uniform numbers of the next steps, one per row and step (drawn on the CPU: the same on every device)."""
    if uniform is not None:
        return uniform[start : start + steps]
    return torch.rand(steps, n, generator=rng)


class _Stops:
    """Whether the text of a row contains a stop string; only its last few tokens can complete one."""

    def __init__(self, tokenizer: Any, stop: Sequence[str], action: Tensor) -> None:
        self.tokenizer, self.stop, self.action = tokenizer, tuple(stop), action
        self.reach = max((len(s.encode()) for s in self.stop), default=0) + 1  # a token is at least one byte

    def hit(self, step: int, rows: Tensor | None, alive: Tensor) -> Bool[Tensor, " n"]:
        """For the rows computed, after the token of `step` was written."""
        recent = self.action[max(0, step + 1 - self.reach) : step + 1]
        recent = recent if rows is None else recent[:, rows]
        texts = self.tokenizer.batch_decode(recent.T.tolist(), skip_special_tokens=True)
        return torch.tensor([any(s in text for s in self.stop) for text in texts], device=alive.device)


def cut_at_stop(text: str, stop: Sequence[str]) -> str:
    """The text before its first stop string."""
    places = [p for s in stop if (p := text.find(s)) >= 0]
    return text[: min(places)] if places else text
