"""Form: how a merge lies in a worker. Decided by its method alone, so that everybody agrees."""

from typing import Literal, get_args

from dynmerge.merging.choice import settled
from dynmerge.merging.diagonal import is_diagonal
from dynmerge.recipe import MethodChoice

# diagonal: one weight per stacked direction, made within a step. core: p x q numbers per module.
# own: factors of its own. The last two are made beside the step loop.
Form = Literal["diagonal", "core", "own"]
FORMS: tuple[Form, ...] = get_args(Form)


def form_of(method: MethodChoice) -> Form:
    """The form of merges by `method`."""
    if is_diagonal(method):
        return "diagonal"
    return "core" if settled(method)[1].get("space", "core") == "core" else "own"
