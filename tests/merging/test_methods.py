"""The laws that merge methods promise in docs/merge-methods.md, over METHODS and compositions."""

from collections.abc import Iterator, Mapping, Sequence

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from dynmerge.adapters.adapter import Adapter
from dynmerge.errors import DynmergeError, MethodError
from dynmerge.merging.merge import Merge, Merger, merge
from dynmerge.merging.methods import (
    METHODS,
    choose,
    default_method,
    in_background,
    parse_method,
)
from dynmerge.merging.parameters import Choice, Number
from dynmerge.merging.spaces import SPACES
from dynmerge.preference import Preference
from dynmerge.recipe import Recipe
from tests import reference
from tests.bank_factory import random_adapter
from tests.merging.dense import ADAPTERS, BANK, assert_same, bank_of, made_by, merged, written_out

# What the table in docs/merge-methods.md says of one skill at 1.
WHERE_ONE_SKILL_IS_ITSELF: Mapping[str, str] = {
    "ties": "density=1",
    "dare-linear": "density=1",
    "dare-ties": "density=1",
    "della": "density=1;epsilon=0",
    "knots-ties": "density=1",
    "knots-dare-ties": "density=1",
}
FLATTENING = ("iso-c", "iso-c-dense", "iso-cts")
THREE: Mapping[str, float] = {"ada": 0.2, "bob": 0.5, "cyd": 0.3}


def spaces_of(name: str) -> Iterator[str]:
    """The method in each space it takes, as in a header."""
    yield name
    if any(parameter.name == "space" for parameter in METHODS[name].parameters):
        yield from (f"{name};space={space}" for space in SPACES if space != "core")


def composed(text: str) -> Iterator[str]:
    """The method alone, calibrated before, after, and both."""
    name, semicolon, parameters = text.partition(";")
    rest = semicolon + parameters
    yield text
    yield f"pico+{name}{rest}"
    if name != "iso-c-dense":
        yield f"{name}+svc{rest}"
        yield f"pico+{name}+svc{rest}"


FORMS = tuple(form for name in METHODS for text in spaces_of(name) for form in composed(text))


def with_parameters(text: str, parameters: str) -> str:
    return f"{text};{parameters}" if parameters else text


EXACT = tuple(
    with_parameters(form, WHERE_ONE_SKILL_IS_ITSELF.get(name, ""))
    for name in METHODS
    if name not in FLATTENING
    for text in spaces_of(name)
    for form in composed(text)
)


def alone(adapter: Adapter) -> dict[str, Tensor]:
    return {module: reference.delta(adapter, module) for module in adapter.modules}


def times(factor: float, updates: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {module: factor * update for module, update in updates.items()}


def recipe(weights: Mapping[str, float], method: str) -> Recipe:
    preference = Preference.of(weights, normalize=False, allow_negative=True)
    return Recipe(preference, parse_method(method), BANK.digest)


def bits(made: Merge) -> list[tuple[str, Tensor]]:
    """Every tensor of a merge under its name."""
    if made.core is not None:
        return [("core", made.core)]
    own = made.own or {}
    return [
        (f"{name} {label}", factor)
        for name, update in own.items()
        for label, factor in (("A", update.A), ("B", update.B))
    ]


def assert_identical(one: Merge, other: Merge) -> None:
    """The same to the bit."""
    assert one.recipe == other.recipe
    assert one.energy == other.energy
    ones, others = bits(one), bits(other)
    assert [name for name, _ in ones] == [name for name, _ in others]
    for (name, mine), (_, its) in zip(ones, others, strict=True):
        assert torch.equal(mine, its), f"{one.recipe.method}: {name}"


@pytest.mark.parametrize("scale", [1.0, 0.8])
@pytest.mark.parametrize("weights", [{"ada": 0.7, "bob": 0.3}, THREE, {"ada": 1.5, "cyd": -0.5}])
def test_linear_is_the_weighted_sum_of_deltas_whatever_the_ranks(
    weights: dict[str, float], scale: float
) -> None:
    expected = reference.merged_deltas(ADAPTERS, weights, scale)
    assert_same(merged(weights, f"linear;scale={scale}"), expected)


@pytest.mark.parametrize("method", EXACT)
@pytest.mark.parametrize("skill", ADAPTERS)
def test_one_skill_at_one_is_that_adapter_and_at_minus_one_its_negative(
    method: str, skill: str
) -> None:
    expected = alone(ADAPTERS[skill])
    assert_same(merged({skill: 1.0}, method), expected)
    assert_same(merged({skill: -1.0}, method), times(-1, expected))


@pytest.mark.parametrize("method", FLATTENING)
def test_a_method_that_flattens_spectra_says_so_of_one_skill_too(method: str) -> None:
    for module, update in merged({"bob": 1.0}, method).items():
        values = torch.linalg.svdvals(update)
        kept = values[values > 1e-4]
        assert_close(kept, kept.mean().expand_as(kept) if len(kept) else kept, rtol=1e-5, atol=0)
        original = ADAPTERS["bob"].modules.get(module)
        assert bool(len(kept)) == (original is not None)
        if original is not None and method != "iso-c-dense":
            assert len(kept) == original.rank


@pytest.mark.parametrize("method", FORMS)
def test_the_order_of_adapters_does_not_matter(method: str) -> None:
    backwards = bank_of(dict(reversed(ADAPTERS.items())))
    assert backwards.digest == BANK.digest
    weights = dict(reversed(list(THREE.items())))
    assert_identical(made_by(weights, method, backwards), made_by(THREE, method))


UNNAMED = tuple(
    form
    for form in FORMS
    if not any(word in form for word in ("dare", "della", "lego", "iso-c-dense"))
)


@pytest.mark.parametrize("method", UNNAMED)
def test_the_names_of_adapters_do_not_matter_where_nothing_is_drawn(method: str) -> None:
    renamed = {"ada": "zoe", "bob": "bob", "cyd": "abe"}
    bank = bank_of({renamed[name]: adapter for name, adapter in ADAPTERS.items()})
    weights = {renamed[name]: weight for name, weight in THREE.items()}
    assert_same(merged(weights, method, bank), merged(THREE, method))


@pytest.mark.parametrize("method", FORMS)
def test_weight_zero_is_absence(method: str) -> None:
    made = made_by({"ada": 0.6, "bob": 0.4, "cyd": 0.0}, method)
    assert_identical(made, made_by({"ada": 0.6, "bob": 0.4}, method))
    assert written_out(BANK, made)["layers.1.up"].abs().max() == 0


def sees_the_bases(method: str) -> bool:
    """Whether a form looks at entries in bases that all skills of the bank share."""
    choice = parse_method(method)
    values = dict(choice.parameters)
    return values.get("space") == "core" or "iso-c-dense" in choice.name


@pytest.mark.parametrize("method", [form for form in FORMS if not sees_the_bases(form)])
def test_a_skill_without_weight_might_as_well_not_be_in_the_bank(method: str) -> None:
    # In core space it turns the bases, and so the entries; iso-c-dense completes other columns.
    two = bank_of({name: ADAPTERS[name] for name in ("ada", "bob")})
    weights = {"ada": 0.6, "bob": 0.4}
    expected = merged(weights, method, two)
    assert_same(merged(weights, method), expected)


@pytest.mark.parametrize("name", ["ties", "della", "dare-ties"])
def test_in_core_space_the_bases_are_the_banks(name: str) -> None:
    # Only a layer that the third skill has too: its directions are among the bases.
    adapters = {**ADAPTERS, "cyd": random_adapter({"layers.0.q": 3}, 9)}
    with_third, two = bank_of(adapters), bank_of({k: adapters[k] for k in ("ada", "bob")})
    weights = {"ada": 0.6, "bob": 0.4}
    one, other = (merged(weights, name, bank)["layers.0.q"] for bank in (with_third, two))
    assert (one - other).norm() > 1e-2 * other.norm()


MIXED: Mapping[str, float] = {"ada": 0.5, "bob": -0.25, "cyd": 0.75}
# What iso-c-dense completes the null directions with is arbitrary: only its real part is odd.
ODD = tuple(form for form in FORMS if "iso-c-dense" not in form)


@pytest.mark.parametrize("method", ODD)
def test_minus_one_negates(method: str) -> None:
    opposite = {skill: -weight for skill, weight in MIXED.items()}
    assert_same(merged(opposite, method), times(-1, merged(MIXED, method)))


@pytest.mark.parametrize("method", FORMS)
def test_doubling_raw_weights_doubles(method: str) -> None:
    twice = {skill: 2 * weight for skill, weight in MIXED.items()}
    assert_same(merged(twice, method), times(2, merged(MIXED, method)))


@pytest.mark.parametrize("method", FORMS)
def test_scale_multiplies_the_finished_merge(method: str) -> None:
    scaled = merged(THREE, with_parameters(method, "scale=2.5"))
    assert_same(scaled, times(2.5, merged(THREE, method)))
    nothing = merged(THREE, with_parameters(method, "scale=0"))
    assert max(float(update.abs().max()) for update in nothing.values()) == 0


def test_two_different_adapters_at_plus_and_minus_one_leave_no_cross_terms() -> None:
    difference = {
        module: reference.delta(ADAPTERS["ada"], module) - reference.delta(ADAPTERS["bob"], module)
        for module in ADAPTERS["ada"].modules
    }
    difference["layers.0.v"] = -reference.delta(ADAPTERS["bob"], "layers.0.v")
    assert_same(merged({"ada": 1.0, "bob": -1.0}), difference)


@pytest.mark.parametrize("method", FORMS)
def test_a_module_only_one_adapter_has_survives(method: str) -> None:
    update = merged({"ada": 0.5, "cyd": 0.5}, method)["layers.1.up"]
    own = reference.delta(ADAPTERS["cyd"], "layers.1.up")
    assert float((update * own).sum()) > 0.1 * float(own.norm() * update.norm())
    assert update.norm() > 0.05 * own.norm()


@pytest.mark.parametrize("method", ["linear", "pico", "pico+linear;gauge=canonical", "tsv-m;p=1"])
def test_a_module_only_one_adapter_has_takes_its_weight_and_nothing_else(method: str) -> None:
    update = merged({"ada": 0.7, "cyd": 0.3}, method)["layers.1.up"]
    own = reference.delta(ADAPTERS["cyd"], "layers.1.up")
    assert_close(update, 0.3 * own, rtol=1e-5, atol=1e-5)


PREFERENCES: Sequence[Mapping[str, float]] = (
    THREE,
    {"ada": 0.6, "bob": 0.4},
    {"ada": 0.3, "bob": 0.2, "cyd": 0.5},
    {"ada": -0.3, "bob": 0.2, "cyd": 0.5},
)
# The forms again under other parameters: what is kept for one must not serve the other.
VARIED = (
    *FORMS,
    *(with_parameters(form, "density=0.6") for form in FORMS if "ties" in form),
    *(with_parameters(form, "seed=5") for form in FORMS if "dare" in form or "lego" in form),
    *(f"ties;{parameter}" for parameter in ("sign=count", "scope=module", "order=mergekit")),
    *(f"della;{parameter}" for parameter in ("epsilon=0.2", "rescale=l1", "sign=count")),
    *(f"pico+ties;{parameter}" for parameter in ("pool=static", "gauge=canonical")),
    "pico+ties;pool=static;gauge=canonical",
    "pico+tsv-m;pool=static",
)


@pytest.fixture(scope="module")
def alone_made() -> list[Merge]:
    """Every form at every preference, each with nothing kept before or after."""
    return [merge(BANK, recipe(weights, method)) for method in VARIED for weights in PREFERENCES]


@pytest.mark.parametrize(("prepared", "step"), [(0, 1), (20_000, 7), (1 << 29, 1), (1 << 29, -7)])
def test_a_merge_is_the_same_to_the_bit_whatever_was_made_and_kept_before(
    alone_made: Sequence[Merge], prepared: int, step: int
) -> None:
    merger = Merger(bank_of(ADAPTERS), prepared=prepared)
    places = range(len(alone_made))
    order = sorted(places, key=lambda place: (place * step) % len(alone_made))
    for place in order:
        assert_identical(merger.merge(alone_made[place].recipe), alone_made[place])


@pytest.mark.usefixtures("alone_made")
def test_making_merges_leaves_the_bank_as_it_was() -> None:
    untouched = bank_of(ADAPTERS)
    for mine, its in zip(BANK.modules, untouched.modules, strict=True):
        for tensor in ("U", "V", "left", "right"):
            assert torch.equal(getattr(mine, tensor), getattr(its, tensor))
    for group, fresh in zip(BANK.groups, untouched.groups, strict=True):
        assert torch.equal(group.left, fresh.left)
        assert torch.equal(group.right, fresh.right)


def test_a_merge_is_cast_once_and_counts_its_bytes() -> None:
    wanted = recipe({"ada": 0.5, "bob": 0.5}, "linear")
    made, precise = merge(BANK, wanted, torch.bfloat16), merge(BANK, wanted)
    assert made.core is not None
    assert precise.core is not None
    assert made.core.dtype == torch.bfloat16
    assert (made.nbytes, made.rank) == (2 * BANK.layout.size, 0)
    assert torch.equal(made.core, precise.core.to(torch.bfloat16))


def test_a_merge_with_factors_of_its_own_is_cast_once_and_counts_their_bytes() -> None:
    wanted = recipe(THREE, "ties;space=full;rank=2")
    made, precise = merge(BANK, wanted, torch.bfloat16), merge(BANK, wanted)
    assert made.core is None
    assert made.own is not None
    assert precise.own is not None
    assert made.rank == 2
    numbers = 0
    for name, update in made.own.items():
        assert torch.equal(update.A, precise.own[name].A.to(torch.bfloat16))
        assert torch.equal(update.B, precise.own[name].B.to(torch.bfloat16))
        numbers += update.A.numel() + update.B.numel()
    assert made.nbytes == 2 * numbers


def test_the_energy_is_the_share_that_the_rank_left() -> None:
    cut = made_by(THREE, "ties;space=full;rank=2")
    whole = merged(THREE, "ties;space=full;rank=99")
    assert made_by(THREE, "ties;space=full;rank=99").energy == pytest.approx(1)
    total = sum(float(update.square().sum()) for update in whole.values())
    kept = sum(float(update.square().sum()) for update in written_out(BANK, cut).values())
    assert cut.energy == pytest.approx(kept / total)
    assert cut.energy < 0.9


def test_a_recipe_for_another_bank_is_refused() -> None:
    with pytest.raises(DynmergeError, match="another bank"):
        merge(BANK, Recipe(Preference.of({"ada": 1}), default_method(), "other"))


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("tiess", "no method 'tiess' (known: linear"),
        ("tiess", "before any of them pico+, after it +svc)"),
        ("pico+", "no method 'pico+'"),
        ("pico+svc", "no method 'pico+svc'"),
        ("pico+nope", "no method 'pico+nope' (known: linear"),
        ("svc", "no method 'svc' (known: linear"),
        ("svc+linear", "no method 'svc+linear'"),
        ("linear+pico", "no method 'linear+pico'"),
        ("ties+svc+svc", "no method 'ties+svc+svc'"),
        ("pico+pico+ties", "no method 'pico+pico+ties'"),
        ("ties+dare-ties", "no method 'ties+dare-ties'"),
        ("iso-c-dense+svc", "iso-c-dense has no directions for svc"),
        ("linear;density=0.2", "linear has no parameter 'density' (it takes: p, scale)"),
        ("ties;pool=static", "ties has no parameter 'pool' (it takes: density, scope"),
        ("pico+ties;floor=1", "pico+ties has no parameter 'floor'"),
        ("knots-ties;space=core", "knots-ties has no parameter 'space'"),
        ("ties;density=0", "ties;density must lie within 0.001 .. 1; it is 0"),
        ("ties;density=1.5", "ties;density must lie within 0.001 .. 1; it is 1.5"),
        ("pico+ties+svc;density=1.5", "pico+ties+svc;density must lie within 0.001 .. 1"),
        ("ties;space=fourier", "ties;space is one of core|knots|full, not 'fourier'"),
        ("ties;sign=loud", "ties;sign is one of mass|count, not 'loud'"),
        ("ties;scope", "ties;scope is one of global|module, not 'True'"),
        ("pico;gauge=odd", "pico+linear;gauge is one of raw|canonical"),
        ("linear+svc;floor=2", "linear+svc;floor must lie within 0 .. 1"),
        ("ties;density=0.2;density=0.3", "the parameter 'density' stands there twice"),
        ("ties;rank=-1", "ties;rank must lie within 0 .. 4096, whole; it is -1"),
        ("dare-ties;seed=1.5", "dare-ties;seed must lie within 0 .. 999999, whole; it is 1.5"),
        ("linear;p=0.5", "linear;p must lie within 1 .. 64, inf; it is 0.5"),
        ("linear;p=nan", "is a number"),
        ("ties;density=inf", "ties;density is a number"),
        ("della;density=1", "density - epsilon .. density + epsilon, which must lie within (0, 1]"),
        ("della;density=0.07", "must lie within (0, 1]"),
        ("della;epsilon=0.5", "must lie within (0, 1]"),
        ("linear;scale=9", "linear;scale must lie within 0 .. 4"),
        ("linear;scale=-1", "must lie within 0 .. 4"),
        ("linear;scale", "is a number, not True"),
        ('linear;scale="1"', "is a number"),
        ("linear scale", "is not a method"),
        ("linear, ties", "is not a method"),
        ("", "is not a method"),
        ("0.5", "no method"),
        ('"linear"', "no method"),
        ("linéar", "is not a method"),
    ],
)
def test_a_bad_method_is_an_error_that_says_what_is_allowed(text: str, says: str) -> None:
    with pytest.raises(MethodError) as caught:
        parse_method(text)
    assert says in str(caught.value)
    assert str(caught.value).startswith("X-Dynmerge-Method: ")
    assert caught.value.param == "X-Dynmerge-Method"


@pytest.mark.parametrize("text", ["linear;p=inf", "della;density=0.93", "della;density=0.071"])
def test_the_edges_of_a_range_are_allowed(text: str) -> None:
    assert parse_method(text).name == text.partition(";")[0]


@pytest.mark.parametrize("form", VARIED)
def test_a_choice_is_printed_as_it_is_read(form: str) -> None:
    assert parse_method(str(parse_method(form))) == parse_method(form)


@pytest.mark.parametrize("name", METHODS)
def test_a_choice_holds_every_parameter_of_every_part_once_and_sorted(name: str) -> None:
    plain = [key for key, _ in parse_method(name).parameters]
    calibrated = [key for key, _ in parse_method(f"pico+{name}").parameters]
    own = [parameter.name for parameter in METHODS[name].parameters]
    assert plain == sorted({*own, "scale"})
    assert calibrated == sorted([*plain, "pool", "gauge", "restore"])


def test_pico_alone_is_pico_before_linear() -> None:
    assert parse_method("pico") == parse_method("pico+linear")


@pytest.mark.parametrize(
    ("text", "background"),
    [
        ("linear", False),
        ("pico+ties+svc", False),
        ("tsv-m", False),
        ("iso-cts", False),
        ("ties;space=full", True),
        ("pico+dare-linear+svc;space=knots", True),
        ("knots-ties", True),
        ("knots-dare-ties+svc", True),
        ("pico+iso-c-dense", True),
        ("lego", True),
    ],
)
def test_what_takes_long_is_made_in_the_background(text: str, background: bool) -> None:
    assert in_background(parse_method(text)) == background


@pytest.mark.parametrize("method", FORMS)
def test_what_leaves_the_shared_bases_is_made_in_the_background(method: str) -> None:
    assert made_by(THREE, method).core is not None or in_background(parse_method(method))


def test_a_choice_parameter_takes_its_words_only() -> None:
    space = Choice("space", "core", ("core", "full"), "where entries are compared")
    assert space.check("full", "ties", "here") == "full"
    with pytest.raises(MethodError, match=r"here: ties;space is one of core\|full, not 'knots'"):
        space.check("knots", "ties", "here")


def test_a_number_may_be_infinite_only_where_it_says_so() -> None:
    norm = Number("p", 1.0, 1.0, 64.0, "norm", infinite=True)
    assert norm.check(float("inf"), "linear", "here") == norm.check("inf", "linear", "here")
    with pytest.raises(MethodError, match=r"within 1 \.\. 64, inf"):
        norm.check(-float("inf"), "linear", "here")


@pytest.mark.parametrize("value", [10**400, float("nan"), float("inf"), -1])
def test_a_number_out_of_range_is_refused_whatever_its_size(value: float) -> None:
    with pytest.raises(MethodError, match=r"here: linear;scale must lie within 0 \.\. 4"):
        choose("linear", {"scale": value}, "here")


def test_a_number_is_what_a_header_can_say() -> None:
    choice = choose("linear", {"scale": 0.123456}, "here")
    assert parse_method(str(choice)) == choice
