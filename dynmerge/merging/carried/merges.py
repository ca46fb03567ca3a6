"""Methods of what a bank carries: coefficients, tables, moments or a norm that a calibration found.

All at the support's preference rho = a / sum a over the bank's tasks, times sum a. What the numbers
multiply is in granularity.py, how they follow from rho in maps.py; here they meet a bank.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from dynmerge.bank.bank import FactorBank, FactorGroup
from dynmerge.bank.calibration import AT
from dynmerge.errors import BankError
from dynmerge.merging.carried.granularity import (
    GRANULARITIES,
    Granularity,
    by_moments,
    constants_of,
)
from dynmerge.merging.carried.maps import FORMS, Tables
from dynmerge.merging.outcome import Cores
from dynmerge.merging.parameters import Values, number
from dynmerge.merging.support import Support, normed

CarriedMethod = Callable[[Support, Tensor, Values], Cores]
CarriedDiagonal = Callable[[FactorBank, Tensor, Values], Tensor]
# A group and a form -> what the calibration holds of one of its modules: label -> shape.
Reads = Callable[[FactorGroup, str], dict[str, tuple[int, ...]]]


def by_coefficients(method: str) -> CarriedMethod:
    """The method of GRANULARITIES under the coefficients that the bank's calibration gives."""

    def merge(support: Support, weights: Tensor, values: Values) -> Cores:
        granularity, form = GRANULARITIES[method], FORMS[support.bank.calibration(method).form]
        rho, total = _simplex(support, weights), weights.sum()
        cores = []
        for group, tables, (owners, taken) in zip(
            support.groups, _tables(support.bank, method), _columns(support, method), strict=True
        ):
            if group.present:
                phi = form.coefficients(tables, owners, rho).index_select(1, taken)
                cores.append(total * granularity.cores(group, phi, tables, rho))
            else:  # tables belong to no skill, and here none is left
                cores.append(group.weighted(weights))
        return Cores(cores)

    return merge


def coefficient_diagonal(method: str) -> CarriedDiagonal:
    """The same at every stacked direction, where one coefficient is of one direction or more."""

    spread = GRANULARITIES[method].spread
    assert spread is not None, method

    def diagonal(bank: FactorBank, weights: Tensor, values: Values) -> Tensor:
        phi = _all_coefficients(bank, method, weights / weights.sum())
        return weights.sum() * spread(bank, phi)

    return diagonal


def regmean(support: Support, weights: Tensor, values: Values) -> Cores:
    """(sum_i rho_i X_i S_i)(sum_i rho_i S_i)^-1, S_i the second moments that the bank carries."""
    places = _places(support)
    rho, ridge = weights / weights.sum(), number(values, "ridge")
    cores = []
    for group, tables in zip(support.groups, support.bank.learned("regmean"), strict=True):
        moments = tables["moments"].index_select(1, places)
        cores.append(weights.sum() * by_moments(group, moments, rho, ridge))
    return Cores(cores)


def tuned(support: Support, weights: Tensor, values: Values) -> Cores:
    """`linear` under the norm p that validation chose for this bank."""
    lambdas = normed(weights, _norm(support.bank))
    return Cores([group.weighted(lambdas) for group in support.groups])


def tuned_diagonal(bank: FactorBank, weights: Tensor, values: Values) -> Tensor:
    """The same at every stacked direction."""
    _, tasks = bank.directions
    return normed(weights, _norm(bank))[tasks]


def check_calibrations(bank: FactorBank) -> None:
    """Raise BankError unless the bank's calibrations hold what their methods read.

    Worth asking when a bank is loaded: afterwards they are trusted.
    """
    for calibration in bank.calibrations:
        method, form = calibration.method, calibration.form
        if method in GRANULARITIES and form not in FORMS:
            raise BankError(
                f"the calibration for {method} is of form {form!r}; this dynmerge knows "
                f"{', '.join(FORMS)}: a newer one made it"
            )
        for group in bank.groups if method in READS else ():
            found = {**calibration.of(bank.modules[group.members[0]].name), **calibration.shared}
            for label, shape in READS[method](group, form).items():
                if label not in found or tuple(found[label].shape) != shape:
                    has = tuple(found[label].shape) if label in found else "none"
                    name = bank.modules[group.members[0]].name
                    raise BankError(
                        f"the calibration for {method}: {name}: {label!r} has the shape {has}, "
                        f"not {shape}"
                    )
        if method == "tuned" and float(calibration.shared["p"]) < 1:
            raise BankError(f"the calibration for tuned: p is {calibration.shared['p']:g}, below 1")


def calibration_tensors(bank: FactorBank) -> Iterator[Tensor]:
    """What all merges of the bank's calibrations read, made now rather than for the first request.

    The calibrations as they were learned, stacked by shape or laid side by side, and what the
    factors alone decide. The bank keeps them; its calibrations must have been checked.
    """
    for calibration in bank.calibrations:
        yield from calibration.tensors.values()
        method = calibration.method
        granularity = GRANULARITIES.get(method)
        made: Sequence[Tables]
        if granularity is None:
            made = bank.learned(method) if method in READS else ()
        elif granularity.spread is None or FORMS[calibration.form].coupled:
            made = _tables(bank, method)
        else:
            tables, owners = _laid_out(bank, method)
            made = ({**tables, "owners": owners},)
        yield from (tensor for own in made for tensor in own.values())


def _simplex(support: Support, weights: Tensor) -> Tensor:
    """rho (tasks,) over all of the bank's tasks, zero for those that take no part."""
    rho = weights.new_zeros(len(support.bank.tasks))
    return rho.index_copy(0, _places(support), weights / weights.sum())


def _places(support: Support) -> Tensor:
    """(skills,): the support's skills among the bank's tasks."""
    names = support.bank.names

    def found() -> list[tuple[Tensor]]:
        places = [names.index(task.name) for task in support.tasks]
        return [(torch.tensor(places, device=support.bank.device),)]

    return support.keep("places", found)[0][0]


def _columns(support: Support, method: str) -> Sequence[tuple[Tensor, ...]]:
    """For each group whose coefficients there are, (W,), and which are the support's skills'."""

    def found() -> list[tuple[Tensor, Tensor]]:
        columns = []
        for group in support.bank.groups:
            owners = GRANULARITIES[method].owners(group)
            columns.append((owners, torch.isin(owners, _places(support)).nonzero()[:, 0]))
        return columns

    return support.keep(("columns", method), found)


def _tables(bank: FactorBank, method: str) -> Sequence[Tables]:
    """What the bank learned, and what its factors alone say, for each group."""
    pairs = zip(bank.learned(method), constants_of(bank, method), strict=True)
    return [{**own, **more} for own, more in pairs]


def _all_coefficients(bank: FactorBank, method: str, rho: Tensor) -> Tensor:
    """(W of all modules,), modules in the bank's order.

    One expression where the form works on columns, whichever module they are of.
    """
    form = FORMS[bank.calibration(method).form]
    if form.coupled:
        found = [
            form.coefficients(tables, GRANULARITIES[method].owners(group), rho)[..., None]
            for group, tables in zip(bank.groups, bank.learned(method), strict=True)
        ]
        return bank.flatten(found)
    tables, owners = _laid_out(bank, method)
    return form.coefficients(tables, owners, rho)[0]


def _laid_out(bank: FactorBank, method: str) -> tuple[Tables, Tensor]:
    return bank.keep(("flat", method), lambda: _flat(bank, method))


def _flat(bank: FactorBank, method: str) -> tuple[Tables, Tensor]:
    """Tables (1, ..., W of all modules), and whose each of these coefficients is."""
    calibration = bank.calibration(method)
    tables = dict(calibration.shared)
    for label in calibration.labels:
        own = [calibration.of(module.name)[label] for module in bank.modules]
        tables[label] = torch.cat(own, dim=-1)[None]
    owners = {
        member: GRANULARITIES[method].owners(group)
        for group in bank.groups
        for member in group.members
    }
    return tables, torch.cat([owners[place] for place in range(len(bank.modules))])


def _norm(bank: FactorBank) -> float:
    return bank.keep("tuned", lambda: float(bank.calibration("tuned").shared["p"]))


def _coefficients(granularity: Granularity) -> Reads:
    def read(group: FactorGroup, form: str) -> dict[str, tuple[int, ...]]:
        tasks, width = len(group.ranks), len(granularity.owners(group))
        start = FORMS[form].start(1, tasks, width)
        shapes = {label: tuple(table.shape[1:]) for label, table in start.items()}
        found_at = {AT: (tasks,)} if form == "fixed" else {}
        return {**shapes, **granularity.tables(group), **found_at}

    return read


def _moments(group: FactorGroup, form: str) -> dict[str, tuple[int, ...]]:
    q = group.right.shape[2]
    return {"moments": (len(group.ranks), q, q)}


# What a method reads in a module: label -> shape.
READS: Mapping[str, Reads] = {
    **{method: _coefficients(granularity) for method, granularity in GRANULARITIES.items()},
    "regmean": _moments,
    "tuned": lambda group, form: {"p": ()},
}
