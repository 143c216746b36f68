"""A recipe: one value per axis of what can be done to a cache. Start reading here.

Tokens flow one way: a step's keys and values enter at the attention hook (`hooks/`), are attended exactly, are given a
tier, are encoded (`codecs/`) and lie in a store (`stores/`); the next step's query reads every store (`kernels/`) and
the partial results are merged, exactly.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from typing import Any

from kvmosaic.codecs import Exact
from kvmosaic.errors import RecipeConflict
from kvmosaic.prefill import Prefill
from kvmosaic.projection import Projection
from kvmosaic.selection import Selection
from kvmosaic.stores import EXACT, Lane, Tier


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What happens to a cache, axis by axis; None leaves an axis as it is. Join recipes with `|`.

    projection: which channels of the keys are kept; None = all.
    selection: which tokens are kept, and in which tier; None = all, in the first.
    tiers: how tokens are kept, best tier first; None = exactly.
    prefill: how the attention of the first prompt is computed; None = exactly.
    first: how many of a sequence's first tokens stay exact, whatever selection, tiers and `visual` say of them; None = 0.
    visual: how the tokens of pictures and video frames are kept, if otherwise than the rest.
    visual_by_picture: each unbroken run of visual tokens gets ranges of its own, where `visual` shares them over a run.
    fingerprint: of the one model that the recipe was calibrated for; None = any model.
    name: what the user wrote; labels tables, and is no part of the value.
    """

    projection: Projection | None = None
    selection: Selection | None = None
    tiers: tuple[Tier, ...] | None = None
    prefill: Prefill | None = None
    first: int | None = None
    visual: Tier | None = None
    visual_by_picture: bool | None = None
    fingerprint: str | None = None
    name: str = field(default="", compare=False)

    def __deepcopy__(self, memo: Any) -> Recipe:
        return self  # frozen, and what it holds too: copies of a cache share the tables that were learned

    def __or__(self, other: Recipe) -> Recipe:
        """Both recipes in one, in either order. Raises RecipeConflict if both set an axis to different values."""
        if not isinstance(other, Recipe):
            return NotImplemented
        changes = {}
        for axis in (each.name for each in fields(self) if each.compare):
            mine, theirs = getattr(self, axis), getattr(other, axis)
            if mine is not None and theirs is not None and mine != theirs:
                raise RecipeConflict(
                    f"{self.name or 'the left recipe'} and {other.name or 'the right recipe'} both set {axis}. "
                    f"Keep one, or write Recipe({axis}=...) yourself"
                )
            changes[axis] = theirs if mine is None else mine
        names = [each.name for each in (self, other) if each.name and each != Recipe()]
        return replace(self, **changes, name=" | ".join(dict.fromkeys(names)) or self.name or other.name)

    @property
    def stored_in(self) -> tuple[Tier, ...]:
        """The tiers; without any, one of exact tokens, whose newest keys wait to be projected."""
        if self.tiers is not None or self.projection is None:
            return self.tiers or (EXACT,)
        return (replace(EXACT, keys=Lane(Exact(), window=self.projection.recent)),)

    @property
    def first_in(self) -> Tier:
        """The tier of the first tokens, which are never encoded: room for as many as there are."""
        lane = Lane(Exact(), window=self.first or 0)
        return replace(EXACT, keys=lane, values=lane)

    @property
    def sees_visual(self) -> bool:
        """Some tokens are treated otherwise because they are visual."""
        return self.visual is not None or (self.selection is not None and self.selection.sees_visual)

    @property
    def is_exact(self) -> bool:
        """Nothing is compressed: the cache is transformers' own."""
        return self == Recipe()
