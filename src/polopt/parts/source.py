"""Sources: which batches, fresh or kept, an iteration trains on."""

from __future__ import annotations

from collections.abc import Callable, MutableMapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from polopt.batch import Batch
from polopt.part import Can, Part, register_part

if TYPE_CHECKING:
    from polopt.method import Method
    from polopt.update import Update


def critics_without_replay(method: Method) -> str | None:
    """Why a source that hands whole batches on does not serve a method with critics of actions; None for other methods."""
    if Can.NETS not in own_parts(method).requires():
        return None
    return (
        f"hands on whole batches, but the critics of {method.name} learn from single transitions that are kept: use source 'ring' "
        "(keeps what is collected) or 'dataset' (a fixed set; with sampler 'nothing')"
    )


def replay_without_critics(method: Method) -> str | None:
    """Why a source that keeps transitions does not serve a method without critics of actions; None for other methods."""
    if Can.NETS in own_parts(method).requires():
        return None
    return (
        f"keeps single transitions, of which critics of actions learn (as in sac and td3); {method.name} has none, it learns from "
        "whole batches: use source 'fresh', 'previous' or 'window'"
    )


def own_parts(method: Method) -> Method:
    """A recipe without its stages, whose parts have sources of their own; other methods as they are."""
    own: Callable[[], Method] | None = getattr(method, "own", None)
    return method if own is None else own()


@register_part("source", "fresh")
@dataclass(frozen=True)
class Fresh(Part):
    """Train on exactly what the sampler returned; nothing is kept.

    A source receives the sampler's named batches and the `store`, a mapping of batches owned by the run and saved with
    it, and returns the named batches that updates refer to by `on=`; it may name its `memory` as a third argument. Sources
    that keep data (a previous batch, a ring) write to the store; no other part may.
    """

    def validate(self, method: Method, update: Update) -> str | None:
        """Refuse a method that learns from kept transitions."""
        return critics_without_replay(method)

    def __call__(self, batches: dict[str, Batch], store: MutableMapping[str, Batch]) -> dict[str, Batch]:
        """Return `batches` unchanged."""
        return batches
