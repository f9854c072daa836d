"""All trainable parameters of a policy as views of one buffer: one gradient norm, one optimiser call, one checkpoint entry."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

ALIGN = 16  # elements; keeps every parameter on a SIMD-friendly boundary


class FlatParameters:
    """Moves the trainable parameters of `nets` into one buffer per call, with gradients in a second one.

    Parameters shared by several nets are stored once, under the first. The modules keep working: their parameters become
    views. Padding between parameters is zero, has zero gradient and stays zero under every optimiser.
    """

    def __init__(self, nets: Mapping[str, nn.Module]) -> None:
        self.owner: dict[str, list[nn.Parameter]] = {}
        self.spans: dict[str, tuple[int, int]] = {}
        found: dict[int, tuple[nn.Parameter, int]] = {}
        offset = 0
        for name, net in nets.items():
            start = offset
            self.owner[name] = [p for p in net.parameters() if p.requires_grad]
            for p in self.owner[name]:
                if id(p) not in found:
                    found[id(p)] = (p, offset)
                    offset += -(-p.numel() // ALIGN) * ALIGN
            self.spans[name] = (start, offset)
        first = next((p for p, _ in found.values()), torch.zeros(0))
        self.data = torch.zeros(offset, dtype=first.dtype, device=first.device)
        self.grad = torch.zeros_like(self.data)
        self.places = found
        with torch.no_grad():
            for p, o in found.values():
                here = slice(o, o + p.numel())
                self.data[here] = p.detach().reshape(-1)
                p.data = self.data[here].view_as(p)
                p.grad = self.grad[here].view_as(p)

    def parameters(self, trains: Sequence[str]) -> list[nn.Parameter]:
        """Parameters of these nets, each once."""
        seen: dict[int, nn.Parameter] = {}
        for name in trains:
            for p in self.owner.get(name, []):
                seen.setdefault(id(p), p)
        return list(seen.values())

    def span(self, trains: Sequence[str]) -> Tensor | None:
        """One tensor over exactly the parameters of these nets, `.grad` set; None when they are not contiguous."""
        wanted = {id(p) for p in self.parameters(trains)}
        if not wanted:
            return None
        places = [self.places[i] for i in wanted]
        start = min(o for _, o in places)
        end = max(o + -(-p.numel() // ALIGN) * ALIGN for p, o in places)
        inside = {i for i, (_, o) in self.places.items() if start <= o < end}
        if inside != wanted:
            return None
        span = self.data[start:end].requires_grad_()
        span.grad = self.grad[start:end]
        return span

    def tied(self) -> bool:
        """Whether every parameter (and gradient) still is a view of the buffers; `module.to()` and the like break this."""
        return all(
            p.data_ptr() == self.data.data_ptr() + o * self.data.element_size() and p.grad is not None
            for p, o in self.places.values()
        )
