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
#: Finished rows are dropped from the computation once they are one in so many.
DROP = 8
#: Batches up to this size are not compacted: a step costs the same.
SMALL = 8


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
    those of `rng`. Finished rows are dropped from the computation once an eighth of the rows are done.
    """
    n, longest = len(spread), int(limits.max())
    out = _Rows(n, longest, limits, ends, pad)
    stops = _Stops(tokenizer, how.stop)
    look = 1 if prompt.device.type == "cpu" else 8  # asking whether all rows are done waits for a GPU
    draws = torch.zeros(1, n, device=prompt.device)
    heat: float | Tensor = how.temperature if temperature is None else temperature[:, None]
    decoding, hidden = engine.open(prompt, prompt_mask, spread, longest)
    for step in range(longest):
        if not how.greedy and step % BLOCK == 0:
            draws = _draws(uniform, rng, step, min(BLOCK, longest - step), n).to(prompt.device)
        logits = head(hidden).float()
        if decoder is not None:
            logits = decoder(logits, step, out.rows)
        u = out.of(draws[0 if how.greedy else step % BLOCK])
        token, logp, entropy = choose(logits, u, out.of(heat) if isinstance(heat, Tensor) else heat, how)
        given = out.of(forced[:, step]) if forced is not None and step < forced.shape[1] else None
        token = out.write(step, token, logp, entropy, given)
        out.finish(step, token, stops.hit(out, step) if how.stop else None)
        if step + 1 == longest:
            break
        if (step + 1) % look == 0:
            left = int(out.open.sum())
            if left == 0:
                break
            if DROP * (len(out.open) - left) >= len(out.open) and len(out.open) > SMALL:
                here = out.open.nonzero().squeeze(1)
                decoding.keep(here)
                out.keep(here)
                token = token[here]
        hidden = decoding.step(token)
    return out.drawn(step + 1)


class _Rows:
    """What was written so far [T,N], and which rows are still computed (`rows`, None: all) and being written (`open`)."""

    def __init__(self, n: int, longest: int, limits: Tensor, ends: Sequence[int], pad: int) -> None:
        device = limits.device
        self.limits, self.pad, self.ends = limits, pad, torch.tensor(list(ends), device=device)
        with torch.inference_mode(False):  # ordinary tensors: they become part of a loss later
            self.action = torch.full((longest, n), pad, device=device)
            self.mask, self.forced = (torch.zeros(longest, n, dtype=torch.bool, device=device) for _ in range(2))
            self.logp, self.entropy = (torch.zeros(longest, n, device=device) for _ in range(2))
            self.ended = torch.zeros(n, dtype=torch.bool, device=device)
        self.rows: Tensor | None = None
        self.open = torch.ones(n, dtype=torch.bool, device=device)

    def of(self, x: Tensor) -> Tensor:
        """The entries of the rows still computed."""
        return x if self.rows is None else x[self.rows]

    def write(self, step: int, token: Tensor, logp: Tensor, entropy: Tensor, given: Tensor | None) -> Int[Tensor, " n"]:
        """Store a step of the open rows; tokens given (>= 0) replace drawn ones. Returns what was written, PAD for the others."""
        where: Any = (step,) if self.rows is None else (step, self.rows)
        decided = self.open
        if given is not None:
            is_given = (given >= 0) & self.open
            token, decided = torch.where(is_given, given, token), self.open & ~is_given
            self.forced[where] = is_given
        token = torch.where(self.open, token, self.pad)
        self.action[where], self.mask[where] = token, self.open
        self.logp[where], self.entropy[where] = logp * decided, entropy * decided
        return token

    def finish(self, step: int, token: Tensor, stopped: Tensor | None) -> None:
        """Close rows that wrote an end token or a stop string, or reached their limit."""
        done = token == self.ends[0] if len(self.ends) == 1 else torch.isin(token, self.ends)
        done = (done if stopped is None else done | stopped) & self.open
        if self.rows is None:
            self.ended |= done
        else:
            self.ended[self.rows] |= done
        self.open = self.open & ~done & (self.of(self.limits) > step + 1)

    def keep(self, here: Int[Tensor, " m"]) -> None:
        """Compute these of the present rows only."""
        self.rows = here if self.rows is None else self.rows[here]
        self.open = self.open[here]

    def drawn(self, steps: int) -> Drawn:
        """The first `steps` steps, row by row."""
        with torch.inference_mode(False):
            tables = (self.action, self.mask, self.forced, self.logp, self.entropy)
            action, mask, forced, logp, entropy = (x[:steps].T.contiguous() for x in tables)
        return Drawn(action, mask, forced, logp, entropy, self.ended)


def _draws(uniform: Tensor | None, rng: torch.Generator | None, start: int, steps: int, n: int) -> Float[Tensor, "S N"]:
    """Uniform numbers of the next steps, one per row and step (drawn on the CPU: the same on every device)."""
    if uniform is not None:
        return uniform[start : start + steps]
    return torch.rand(steps, n, generator=rng)


class _Stops:
    """Whether the text of a row contains a stop string; only its last few tokens can complete one."""

    def __init__(self, tokenizer: Any, stop: Sequence[str]) -> None:
        self.tokenizer, self.stop = tokenizer, tuple(stop)
        self.reach = max((len(s.encode()) for s in self.stop), default=0) + 1  # a token is at least one byte

    def hit(self, out: _Rows, step: int) -> Bool[Tensor, " n"]:
        """For the rows computed, after the token of `step` was written."""
        recent = out.action[max(0, step + 1 - self.reach) : step + 1]
        recent = recent if out.rows is None else recent[:, out.rows]
        texts = self.tokenizer.batch_decode(recent.T.tolist(), skip_special_tokens=True)
        return torch.tensor([any(s in text for s in self.stop) for text in texts], device=recent.device)


def cut_at_stop(text: str, stop: Sequence[str]) -> str:
    """The text before its first stop string."""
    places = [p for s in stop if (p := text.find(s)) >= 0]
    return text[: min(places)] if places else text
