"""The interface of engines, and the general one: any causal model of transformers through its own forward."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from polopt.policies.lm.model import Backbone
from polopt.policies.lm.prompts import buckets, positions

Lengths = Sequence[int] | None


class Decoding(Protocol):
    """A batch of texts being continued, with its key-value cache."""

    def step(self, token: Int[Tensor, " N"]) -> Float[Tensor, "N H"]:
        """Append one token to each text; the hidden state from which the next one is predicted."""
        ...

    def keep(self, rows: Int[Tensor, " M"]) -> None:
        """Go on with these rows only."""
        ...


class Engine(Protocol):
    """How hidden states are computed. All engines agree to 1e-5."""

    name: str

    def hidden(
        self, prompt: Int[Tensor, "B P"], prompt_mask: Bool[Tensor, "B P"], action: Int[Tensor, "B T"], lengths: Lengths = None
    ) -> Float[Tensor, "B T H"]:
        """The hidden state from which each completion token is predicted (gradients as torch is set).

        lengths: what of each completion is asked for; behind it anything finite may stand. None: all.
        """
        ...

    def open(
        self, prompt: Int[Tensor, "U P"], prompt_mask: Bool[Tensor, "U P"], spread: Int[Tensor, " N"], limit: int
    ) -> tuple[Decoding, Float[Tensor, "N H"]]:
        """Read each prompt once, spread them to N rows (row i continues prompt `spread[i]`), at most `limit` tokens on."""
        ...


class GeneralEngine:
    """The model's own forward, with a `DynamicCache` when generating."""

    name = "general"

    def __init__(self, backbone: Backbone) -> None:
        self.backbone = backbone

    def hidden(
        self, prompt: Int[Tensor, "B P"], prompt_mask: Bool[Tensor, "B P"], action: Int[Tensor, "B T"], lengths: Lengths = None
    ) -> Float[Tensor, "B T H"]:
        """One forward over prompt and completion for rows of similar length; only completion positions leave it."""
        if lengths is None:
            return self._hidden(prompt, prompt_mask, action)
        known, width = prompt_mask.sum(1), prompt.shape[1]
        total = [k + n for k, n in zip(known.tolist(), lengths, strict=True)]

        def some(rows: list[int]) -> Tensor:
            skip, used = width - int(known[rows].max()), max(1, max(lengths[i] for i in rows))
            return self._hidden(prompt[rows, skip:], prompt_mask[rows, skip:], action[rows, :used])

        return by_bucket(buckets(total), some, action.shape[1])

    def _hidden(
        self, prompt: Int[Tensor, "B P"], prompt_mask: Bool[Tensor, "B P"], action: Int[Tensor, "B T"]
    ) -> Float[Tensor, "B T H"]:
        rest = action[:, :-1]  # the last token predicts nothing that is asked for
        ids = torch.cat([prompt, rest], 1)
        mask = torch.cat([prompt_mask, torch.ones_like(rest, dtype=torch.bool)], 1)
        out = self.backbone.decoder(input_ids=ids, attention_mask=mask.long(), position_ids=positions(mask), use_cache=False)
        return out.last_hidden_state[:, prompt.shape[1] - 1 :]  # type: ignore[no-any-return]

    def open(
        self, prompt: Int[Tensor, "U P"], prompt_mask: Bool[Tensor, "U P"], spread: Int[Tensor, " N"], limit: int
    ) -> tuple[Decoding, Float[Tensor, "N H"]]:
        """Prefill the distinct prompts and repeat their cache."""
        decoder = self.backbone.decoder
        out = decoder(input_ids=prompt, attention_mask=prompt_mask.long(), position_ids=positions(prompt_mask), use_cache=True)
        cache = out.past_key_values
        cache.batch_select_indices(spread)
        mask = torch.cat([prompt_mask[spread], prompt_mask.new_ones(len(spread), limit)], 1)
        return _GeneralDecoding(decoder, cache, mask, prompt_mask.sum(1)[spread], prompt.shape[1]), out.last_hidden_state[:, -1][
            spread
        ]


class _GeneralDecoding:
    def __init__(self, decoder: Any, cache: Any, mask: Tensor, position: Tensor, filled: int) -> None:
        self.decoder, self.cache, self.position, self.filled = decoder, cache, position, filled
        self.mask = mask.long()

    def step(self, token: Int[Tensor, " N"]) -> Float[Tensor, "N H"]:
        self.filled += 1
        out = self.decoder(
            input_ids=token[:, None], attention_mask=self.mask[:, : self.filled], position_ids=self.position[:, None],
            past_key_values=self.cache, use_cache=True,
        )  # fmt: skip
        self.position = self.position + 1
        return out.last_hidden_state[:, -1]  # type: ignore[no-any-return]

    def keep(self, rows: Int[Tensor, " M"]) -> None:
        self.cache.batch_select_indices(rows)
        self.mask, self.position = self.mask[rows], self.position[rows]


def by_bucket(
    groups: list[list[int]], compute: Callable[[list[int]], Float[Tensor, "n t H"]], length: int
) -> Float[Tensor, "B T H"]:
    """What `compute` gives for each group of rows, right-padded with 0 to `length`, in the order of all rows."""
    found = [compute(rows) for rows in groups]
    padded = [x if x.shape[1] == length else F.pad(x, (0, 0, 0, length - x.shape[1])) for x in found]
    if len(groups) == 1:
        return padded[0]
    back = torch.tensor([i for rows in groups for i in rows]).argsort()
    return torch.cat(padded)[back.to(padded[0].device)]


class ExactEngine:
    """One code path and one shape: every row alone, unpadded, always of its prompt's length plus `horizon`, no cache.

    A row's numbers then do not depend on its neighbours, on padding, or on whether it is being sampled or trained on: its
    log-probabilities are the same bits each time. Slow, for theorems.
    """

    name = "exact"

    def __init__(self, backbone: Backbone, horizon: int) -> None:
        self.backbone, self.horizon = backbone, horizon

    def row(self, prompt: Int[Tensor, " L"], action: Int[Tensor, " t"]) -> Float[Tensor, "horizon H"]:
        """Hidden states of one row at its `horizon` places; those after the given tokens are meaningless."""
        ids = torch.full((1, len(prompt) + self.horizon), self.backbone.pad, device=prompt.device)
        ids[0, : len(prompt)] = prompt
        ids[0, len(prompt) : len(prompt) + len(action)] = action
        out = self.backbone.decoder(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)
        return out.last_hidden_state[0, len(prompt) - 1 : -1]  # type: ignore[no-any-return]

    def hidden(
        self, prompt: Int[Tensor, "B P"], prompt_mask: Bool[Tensor, "B P"], action: Int[Tensor, "B T"], lengths: Lengths = None
    ) -> Float[Tensor, "B T H"]:
        """Row by row."""
        t = action.shape[1]
        return torch.stack([self.row(p[m], a)[:t] for p, m, a in zip(prompt, prompt_mask, action, strict=True)])

    def open(
        self, prompt: Int[Tensor, "U P"], prompt_mask: Bool[Tensor, "U P"], spread: Int[Tensor, " N"], limit: int
    ) -> tuple[Decoding, Float[Tensor, "N H"]]:
        """Nothing is cached: each step computes the whole row again."""
        decoding = _ExactDecoding(self, [prompt[i][prompt_mask[i]] for i in spread.tolist()])
        return decoding, decoding.last()


class _ExactDecoding:
    def __init__(self, engine: ExactEngine, prompts: list[Tensor]) -> None:
        self.engine, self.prompts = engine, prompts
        self.tokens = prompts[0].new_zeros(len(prompts), 0)

    def last(self) -> Float[Tensor, "N H"]:
        t = self.tokens.shape[1]
        return torch.stack([self.engine.row(p, a)[t] for p, a in zip(self.prompts, self.tokens, strict=True)])

    def step(self, token: Int[Tensor, " N"]) -> Float[Tensor, "N H"]:
        self.tokens = torch.cat([self.tokens, token[:, None]], 1)
        return self.last()

    def keep(self, rows: Int[Tensor, " M"]) -> None:
        self.tokens, self.prompts = self.tokens[rows], [self.prompts[i] for i in rows.tolist()]
