"""Offer: what may be asked of a bank, checked before anything is made. Knows no engine and no HTTP.

Of the bank it needs the outline only, so that a process which runs no model can answer too.
"""

from collections.abc import Callable
from dataclasses import dataclass

from dynmerge.bank.outline import Outline
from dynmerge.errors import MethodError
from dynmerge.merging.choice import HEADER as METHOD_HEADER
from dynmerge.merging.demands import check_bank, check_preference, default_for
from dynmerge.preference import Preference
from dynmerge.recipe import MethodChoice, Recipe


@dataclass(frozen=True, slots=True)
class Offer:
    """A bank's merges, but for those that whoever makes them has no room for.

    `refusal` says why a recipe's merge would never fit, None where it would.
    """

    outline: Outline
    refusal: Callable[[Recipe], str | None] = lambda _: None

    @property
    def skills(self) -> tuple[str, ...]:
        """The skills a preference may name."""
        return self.outline.names

    def recipe(
        self,
        preference: Preference,
        method: MethodChoice | None = None,
        source: str = "preference",
        method_source: str = METHOD_HEADER,
    ) -> Recipe:
        """The recipe of a request.

        Raises PreferenceError on a skill the bank does not have, MethodError on a method that needs
        what the bank does not carry, does not serve the preference, or whose merge would never fit.
        """
        preference.require(self.skills, source)
        chosen = method or default_for(self.outline)
        check_bank(chosen, self.outline, method_source)
        check_preference(chosen, preference, self.outline, method_source)
        recipe = Recipe(preference, chosen, self.outline.digest)
        reason = self.refusal(recipe)
        if reason is not None:
            raise MethodError(f"{method_source}: {reason}", method_source)
        return recipe
