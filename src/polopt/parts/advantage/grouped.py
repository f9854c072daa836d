"""What advantages that compare the answers to one prompt have in common."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from polopt.part import Can, Part

if TYPE_CHECKING:
    from polopt.method import Method
    from polopt.update import Update


def groups_of_one(method: Method) -> str | None:
    """Why a comparison within groups makes no sense for `method`: its sampler draws one answer per prompt."""
    size = getattr(method.sampler, "group_size", None)
    return None if size is None or size >= 2 else f"needs at least 2 samples per prompt, but sampler.group_size = {size}"


@dataclass(frozen=True)
class Grouped(Part):
    """An advantage that compares the outcomes of whole episodes within groups from one starting point."""

    rows: ClassVar[bool] = True

    @property
    def reads(self) -> frozenset[str]:
        """The group key."""
        return frozenset({"group"})

    @property
    def requires(self) -> frozenset[Can]:
        """Whole episodes, several from one starting point."""
        return frozenset({Can.EPISODES, Can.GROUPS})

    def validate(self, method: Method, update: Update) -> str | None:
        """Refuse groups of one, where there is nothing to compare."""
        return groups_of_one(method)


__all__ = ["Grouped", "groups_of_one"]
