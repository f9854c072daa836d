"""`Draws`: the random numbers that parts ask for, from one named stream, the same whether a step runs eagerly or compiled."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Generator, Tensor

Kind = Literal["normal", "uniform"]


class Draws:
    """Random tensors for parts, drawn in the order in which they are asked for.

    A compiled step cannot draw by itself without leaving the run's stream: `recorded` tells what one pass asked for, so that
    the next passes' numbers can be drawn before and handed in with `given`. (`recorded` is None unless a list was put there.)
    """

    def __init__(self, generator: Generator | None = None, device: torch.device | str = "cpu") -> None:
        self.generator, self.device = generator, torch.device(device)
        self.recorded: list[tuple[Kind, tuple[int, ...], torch.dtype]] | None = None
        self._given: list[Tensor] | None = None

    @classmethod
    def given(cls, tensors: list[Tensor]) -> Draws:
        """Draws that hand out these tensors, in order."""
        out = cls()
        out._given = list(tensors)
        return out

    def normal(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """Standard normal numbers of this shape."""
        return self._take("normal", shape, dtype)

    def uniform(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """Numbers uniform on [0, 1) of this shape."""
        return self._take("uniform", shape, dtype)

    def again(self, asked: list[tuple[Kind, tuple[int, ...], torch.dtype]]) -> list[Tensor]:
        """Fresh numbers of what was `recorded`, from the same stream and in the same order."""
        return [self._draw(kind, shape, dtype) for kind, shape, dtype in asked]

    def _take(self, kind: Kind, shape: tuple[int, ...], dtype: torch.dtype | None) -> Tensor:
        if self._given is not None:
            return self._given.pop(0)
        dtype = dtype or torch.get_default_dtype()
        if self.recorded is not None:
            self.recorded.append((kind, shape, dtype))
        return self._draw(kind, shape, dtype)

    def _draw(self, kind: Kind, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        fn: Callable[..., Tensor] = torch.randn if kind == "normal" else torch.rand
        where = self.generator.device if self.generator is not None else self.device
        return fn(shape, generator=self.generator, dtype=dtype, device=where).to(self.device)


__all__ = ["Draws", "Kind"]
