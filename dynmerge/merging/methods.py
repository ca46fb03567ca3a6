"""METHODS: every merge rule by name, with its parameters and what it promises.

A full method is `[pico+]METHOD[+svc]`: what comes before a merger, the merger, what comes after.
A table: it knows no texts, caches or engines. docs/merge-methods.md has the formulas.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from torch import Tensor

from dynmerge.bank.bank import FactorBank
from dynmerge.merging import pico
from dynmerge.merging.arithmetic import linear, linear_diagonal, lora_soups, soup_diagonal
from dynmerge.merging.carried.merges import (
    by_coefficients,
    coefficient_diagonal,
    regmean,
    tuned,
    tuned_diagonal,
)
from dynmerge.merging.consensus import AGGREGATES, SUMS
from dynmerge.merging.elementwise import dropping, elected, pruning, summed, trimming
from dynmerge.merging.lego import lego
from dynmerge.merging.outcome import Outcome
from dynmerge.merging.parameters import Choice, Number, Parameter, Values, number
from dynmerge.merging.spaces import SPACES
from dynmerge.merging.sparsify import RESCALE
from dynmerge.merging.spectral import iso_c, iso_c_dense, iso_cts, tsv_m
from dynmerge.merging.support import Support

CALIBRATION, AFTER = "pico", "svc"

# (support, its weights (skills,) none negative, parameters) -> one update per module
Merger = Callable[[Support, Tensor, Values], Outcome]
# (bank, magnitudes (tasks,) of all its tasks, parameters) -> d (sum K,), modules in order
DirectionWeights = Callable[[FactorBank, Tensor, Values], Tensor]


@dataclass(frozen=True, slots=True)
class Method:
    """A row of METHODS.

    `version` rises when its code, or that of the steps it takes, changes what it returns. `fixed`
    are values of parameters that the name settles. `background` says that it takes long in any
    space. `needs` names what the bank must carry: soups, or the calibration for a method.
    `takes_negative` is false where weights have no sign to turn. `check` says what is wrong with
    parameters together, if anything. `diagonal`, where the merge is no more than one weight for
    each stacked direction of the skills, are these weights.
    """

    merge: Merger
    version: int
    summary: str
    parameters: tuple[Parameter, ...] = ()
    fixed: Values = field(default_factory=dict)
    background: bool = False
    takes_svc: bool = True
    needs: str | None = None
    takes_negative: bool = True
    check: Callable[[Values], str | None] = lambda _: None
    diagonal: DirectionWeights | None = None


@dataclass(frozen=True, slots=True)
class Step:
    """What may stand before or after a merger: its parameters. Its code is in `carry_out`."""

    version: int
    summary: str
    parameters: tuple[Parameter, ...]


SCALE = Number("scale", 1.0, 0.0, 4.0, "multiplies the merge, after everything else")


def _p(default: float) -> Number:
    meaning = "the norm that the weights keep; 1: as they are, inf: the largest is 1"
    return Number("p", default, 1.0, 64.0, meaning, infinite=True)


def _density(default: float) -> Number:
    return Number("density", default, 0.001, 1.0, "the share of entries that is kept")


def _seed(meaning: str = "another draw of what is dropped") -> Number:
    return Number("seed", 0.0, 0.0, 999_999.0, meaning, whole=True)


def _rank_is_used(values: Values) -> str | None:
    """Only full space cuts: elsewhere a rank would be ignored."""
    if number(values, "rank") and values["space"] != "full":
        return f"rank={number(values, 'rank'):g} is for space=full; here it is {values['space']}"
    return None


def _window(values: Values) -> str | None:
    """DELLA's probabilities stay within (0, 1]."""
    density, epsilon = number(values, "density"), number(values, "epsilon")
    if density - epsilon > 0 and density + epsilon <= 1:
        return _rank_is_used(values)
    return (
        f"density={density:g} with epsilon={epsilon:g} keeps entries with probability "
        "density - epsilon .. density + epsilon, which must lie within (0, 1]"
    )


RANK = Number(
    "rank", 0.0, 0.0, 4096.0, "in full space, the merge's rank; 0: all skills'", whole=True
)
SPACE = (Choice("space", "core", tuple(SPACES), "whose entries are looked at"), RANK)
ELECTION = (
    Choice("scope", "global", ("global", "module"), "all layers together, or each apart"),
    Choice("sign", "mass", tuple(SUMS), "what elects an entry's sign"),
    Choice("aggregate", "mean", tuple(AGGREGATES), "of the entries that agree"),
    Choice("order", "paper", ("paper", "mergekit"), "elect, then weight; or the other way round"),
)
KNOTS: Values = {"space": "knots", "rank": 0.0}

METHODS: Mapping[str, Method] = {
    "linear": Method(
        linear,
        1,
        "the exact weighted sum of the skills' updates (Task Arithmetic)",
        (_p(1.0),),
        diagonal=linear_diagonal,
    ),
    "lora-soups": Method(
        lora_soups,
        1,
        "the weighted sum under weights per layer that the bank carries (CAT)",
        needs="soups",
        diagonal=soup_diagonal,
    ),
    "tuned": Method(
        tuned,
        1,
        "the weighted sum under the norm that validation chose for the bank",
        needs="tuned",
        diagonal=tuned_diagonal,
    ),
    "adamerging": Method(
        by_coefficients("adamerging"),
        1,
        "one learned coefficient per skill and layer",
        needs="adamerging",
        diagonal=coefficient_diagonal("adamerging"),
    ),
    "tara-a": Method(
        by_coefficients("tara-a"),
        1,
        "one learned coefficient per rank-one direction of each skill",
        needs="tara-a",
        diagonal=coefficient_diagonal("tara-a"),
    ),
    "tara-b": Method(
        by_coefficients("tara-b"),
        1,
        "one learned coefficient per skill and direction of all skills' updates together",
        needs="tara-b",
    ),
    "core": Method(
        by_coefficients("core"),
        1,
        "learned coefficients, and learned tables for pairs of skills between them",
        needs="core",
        takes_negative=False,
    ),
    "regmean": Method(
        regmean,
        1,
        "the update nearest to each skill's on what that skill reads",
        (Number("ridge", 0.01, 0.001, 10.0, "of each skill's moments, a share of their mean"),),
        needs="regmean",
    ),
    "ties": Method(
        elected("ties", trimming),
        1,
        "trim, elect sign, disjoint mean",
        (_density(0.2), *ELECTION, *SPACE),
        check=_rank_is_used,
    ),
    "dare-linear": Method(
        summed("dare", dropping),
        1,
        "drop and rescale, then the weighted sum",
        (_density(0.5), _seed(), _p(1.0), *SPACE),
        check=_rank_is_used,
    ),
    "dare-ties": Method(
        elected("dare", dropping),
        1,
        "drop and rescale, then elect sign and disjoint mean",
        (_density(0.5), _seed(), *ELECTION, *SPACE),
        check=_rank_is_used,
    ),
    "della": Method(
        elected("della", pruning),
        1,
        "drop small entries more often, then elect sign and disjoint mean",
        (
            _density(0.7),
            Number("epsilon", 0.07, 0.0, 0.5, "how far the density varies within a row"),
            Choice("rescale", "entry", tuple(RESCALE), "what is restored"),
            _seed(),
            *ELECTION,
            *SPACE,
        ),
        check=_window,
    ),
    "knots-ties": Method(
        elected("ties", trimming),
        1,
        "TIES on the skills' parts in a common basis of outputs",
        (_density(0.2), *ELECTION),
        fixed=KNOTS,
    ),
    "knots-dare-ties": Method(
        elected("dare", dropping),
        1,
        "DARE-TIES on the skills' parts in a common basis of outputs",
        (_density(0.9), _seed(), *ELECTION),
        fixed=KNOTS,
    ),
    "tsv-m": Method(
        tsv_m, 1, "singular directions of all skills, made orthogonal", (_p(float("inf")),)
    ),
    "iso-c": Method(
        iso_c, 1, "the sum, with all its directions equally strong", (_p(float("inf")),)
    ),
    "iso-c-dense": Method(
        iso_c_dense,
        1,
        "the same over all directions of the layer, as published; full rank",
        (_p(float("inf")),),
        fixed={"space": "dense"},
        takes_svc=False,
    ),
    "iso-cts": Method(
        iso_cts,
        1,
        "common directions and each skill's own, all equally strong",
        (Number("common", 0.8, 0.0, 1.0, "the share of common directions"), _p(float("inf"))),
    ),
    "lego": Method(
        lego,
        1,
        "clusters of alike rank-one pieces",
        (
            Number("clusters", 0.0, 0.0, 4096.0, "pieces per layer; 0: the rank", whole=True),
            Number("iterations", 10.0, 1.0, 100.0, "k-means steps", whole=True),
            Choice("signs", "raw", ("raw", "aligned"), "of pieces, as trained or turned alike"),
            _seed("another start of k-means"),
        ),
        background=True,
    ),
}

STEPS: Mapping[str, Step] = {
    CALIBRATION: Step(
        1,
        "before a method: shrink what the skills share, restore the norm after it",
        (
            Choice("pool", "preference", ("preference", "static"), "skills pooled by weight"),
            Choice("gauge", "raw", tuple(pico.GAUGES), "B as trained, or with A orthonormal"),
            Choice("restore", "norm", ("norm", "none"), "gamma after the merge, or not"),
        ),
    ),
    AFTER: Step(
        1,
        "after a method: turn down directions in which shared content adds up",
        (Number("floor", 0.0, 0.0, 1.0, "the least a skill counts; 0: 1 / skills"),),
    ),
}
