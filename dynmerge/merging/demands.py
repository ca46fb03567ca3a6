"""Demands: what a recipe asks of the bank, of time and of room, known before it is carried out."""

from collections.abc import Callable, Iterator, Mapping

from dynmerge.bank.bank import FactorBank
from dynmerge.bank.outline import ModuleOutline, Outline
from dynmerge.errors import MethodError
from dynmerge.merging.choice import HEADER, default_method, parse_method, parts_of, settled
from dynmerge.merging.methods import METHODS
from dynmerge.preference import GRID, Preference
from dynmerge.recipe import MethodChoice, Recipe

GRID_STEP = 1.001 / GRID  # a weight's own thousandth is less than this from what was meant
# The most columns a merge's own factors have: min(d_out, d_in), ranks of the support, rank asked.
WIDTHS: Mapping[str, Callable[[int, int, int], int]] = {
    "knots": lambda least, stacked, asked: min(least, stacked),
    "full": lambda least, stacked, asked: min(least, asked or stacked),
    "dense": lambda least, stacked, asked: least,
}


# What serves where nobody chose, if the bank was calibrated for it: docs/quality.md has the order.
BEST = ("tara-a", "adamerging", "tuned")


def default_for(bank: Outline | FactorBank) -> MethodChoice:
    """What serves where nobody chose: the best calibration for all preferences, else `linear`."""
    carried = (name for name in BEST if name in bank.calibrated and name not in bank.fixed_at)
    best = next(carried, None)
    return default_method() if best is None else parse_method(best)


def in_background(method: MethodChoice) -> bool:
    """Whether a merge by `method` may take long: others should not wait behind it."""
    row, values = settled(method)
    return row.background or values.get("space", "core") != "core"


def check_bank(method: MethodChoice, bank: Outline | FactorBank, source: str = HEADER) -> None:
    """Raise MethodError where `bank` lacks what `method` needs."""
    _, merger, _ = parts_of(method.name, source)
    needs = METHODS[merger].needs
    if needs is None or needs in bank.carries:
        return
    if needs == "soups":
        what, how = "learned weights", "dynmerge build --soup-weights puts them in"
    else:
        what, how = "a calibration", f"dynmerge calibrate BANK --method {needs} makes it"
    raise MethodError(
        f"{source}: {merger} needs {what}, which this bank does not carry; {how}", source
    )


def check_preference(
    method: MethodChoice, preference: Preference, bank: Outline | FactorBank, source: str = HEADER
) -> None:
    """Raise MethodError where `method`, in this bank, does not serve `preference`."""
    _, merger, _ = parts_of(method.name, source)
    row, vector = METHODS[merger], preference.vector(bank.names)
    if not row.takes_negative and min(vector) < 0:
        raise MethodError(
            f"{source}: {merger} takes no negative weight: what it learned for pairs of skills "
            "is no skill's to negate",
            source,
        )
    at = bank.fixed_at.get(row.needs or "")
    total = sum(map(abs, vector))
    if at is None or not total:
        return
    # Beside `base` the weights are small, and a thousandth of them is much of their shares.
    within = GRID_STEP * max(total, 1)
    if any(
        abs(abs(w) - a * total) > within or (not w and a > GRID_STEP) or (w and not a)
        for w, a in zip(vector, at, strict=True)
    ):
        only = ", ".join(f"{name}={a:.3g}" for name, a in zip(bank.names, at, strict=True) if a)
        raise MethodError(
            f"{source}: {merger} is calibrated for one preference in this bank, {only}", source
        )


def outside_bytes(bank: Outline, recipe: Recipe, itemsize: int) -> int:
    """Most bytes that the recipe's merge takes with factors of its own; 0 if it stays inside."""
    return itemsize * sum(
        columns * (module.d_out + module.d_in) for module, columns in _outside(bank, recipe)
    )


def outside_rank(bank: Outline, recipe: Recipe) -> int:
    """The largest rank that the merge's own factors may have; 0 if it stays inside."""
    return max((columns for _, columns in _outside(bank, recipe)), default=0)


def _outside(bank: Outline, recipe: Recipe) -> Iterator[tuple[ModuleOutline, int]]:
    """The modules that get factors of their own, and the most columns these have."""
    _, values = settled(recipe.method)
    width = WIDTHS.get(str(values.get("space", "core")))
    if width is None:
        return
    vector = recipe.preference.vector(bank.names)
    for module in bank.modules:
        rank = sum(r for r, weight in zip(module.ranks, vector, strict=True) if weight)
        if rank:
            least, asked = min(module.d_out, module.d_in), int(values.get("rank", 0))
            yield module, width(least, rank, asked)
