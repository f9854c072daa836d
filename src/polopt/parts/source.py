"""Sources: which batches, fresh or kept, an iteration trains on."""

from __future__ import annotations

from collections.abc import MutableMapping
from dataclasses import dataclass

from polopt.batch import Batch
from polopt.part import Part, register_part


@register_part("source", "fresh")
@dataclass(frozen=True)
class Fresh(Part):
    """Train on exactly what the sampler returned; nothing is kept.

    A source receives the sampler's named batches and the `store`, a mapping of batches owned by the run and saved with
    it, and returns the named batches that updates refer to by `on=`; it may name its `memory` as a third argument. Sources
    that keep data (a previous batch, a ring) write to the store; no other part may.
    """

    def __call__(self, batches: dict[str, Batch], store: MutableMapping[str, Batch]) -> dict[str, Batch]:
        """Return `batches` unchanged."""
        return batches
