"""The laws that merge methods promise in docs/merge-methods.md, over METHODS and compositions."""

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from dynmerge.adapters.adapter import Adapter
from dynmerge.bank.build import with_soups
from dynmerge.errors import DynmergeError, MethodError
from dynmerge.merging.choice import choose, default_method, parse_method, parts_of
from dynmerge.merging.demands import in_background
from dynmerge.merging.merge import Merge, Merger, merge
from dynmerge.merging.methods import METHODS
from dynmerge.merging.parameters import Choice, Number
from dynmerge.merging.spaces import SPACES
from dynmerge.preference import Preference
from dynmerge.recipe import Recipe
from tests import reference
from tests.bank_factory import random_adapter, random_bank
from tests.merging.dense import (
    ADAPTERS,
    BANK,
    assert_same,
    bank_of,
    made_by,
    merged,
    soups_of,
    written_out,
)

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
# Calibrated for one bank: its skills, and their order, which is that of their names.
OF_ONE_BANK = tuple(name for name, row in METHODS.items() if row.needs == name)
# These weigh the parts of an update apart from each other.
WITHIN_UPDATES = ("tara-a", "tara-b", "core", "regmean")
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


def takes_negative(method: str) -> bool:
    return METHODS[parts_of(parse_method(method).name)[1]].takes_negative


def with_parameters(text: str, parameters: str) -> str:
    return f"{text};{parameters}" if parameters else text


UNCOMPOSED = tuple(text for name in METHODS for text in spaces_of(name))
# One for each way in which a step meets a merger: in the shared bases and out of them, elementwise
# and not, with a flat spectrum. The last is the longest; the others leave one of its steps out.
COMPOSED = (
    "linear+svc",
    "ties+svc",
    "pico+ties",
    "pico+linear+svc",
    "pico+ties+svc",
    "pico+tsv-m+svc",
    "pico+iso-cts+svc",
    "pico+knots-ties+svc",
    "pico+ties+svc;space=full",
)
FORMS = UNCOMPOSED + COMPOSED

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
def test_one_skill_at_one_is_that_adapter_and_at_minus_one_its_negative(method: str) -> None:
    for skill in ("bob",) if "+" in parse_method(method).name else ADAPTERS:
        expected = alone(ADAPTERS[skill])
        assert_same(merged({skill: 1.0}, method), expected)
        if takes_negative(method):
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


def test_a_preference_and_a_bank_have_no_order_and_no_zeros() -> None:
    # So no method can see them: what follows need not look at every method.
    backwards = bank_of(dict(reversed(ADAPTERS.items())))
    assert backwards.digest == BANK.digest
    for mine, its in zip(backwards.modules, BANK.modules, strict=True):
        for tensor in ("U", "V", "left", "right"):
            assert torch.equal(getattr(mine, tensor), getattr(its, tensor))
    zero = {"cyd": 0.0, "bob": 0.4, "ada": 0.6}
    assert recipe(zero, "linear") == recipe({"ada": 0.6, "bob": 0.4}, "linear")
    assert recipe(zero, "linear").digest == recipe({"ada": 0.6, "bob": 0.4}, "linear").digest


@pytest.mark.parametrize("method", ["linear", "knots-ties"])
def test_order_does_not_matter_and_weight_zero_is_absence(method: str) -> None:
    made = made_by({"cyd": 0.0, "bob": 0.4, "ada": 0.6}, method)
    expected = made_by({"ada": 0.6, "bob": 0.4}, method, bank_of(dict(reversed(ADAPTERS.items()))))
    assert_identical(made, expected)
    assert written_out(BANK, made)["layers.1.up"].abs().max() == 0


UNNAMED = tuple(
    form
    for form in FORMS
    if not any(word in form for word in ("dare", "della", "lego", "iso-c-dense", *OF_ONE_BANK))
)


@pytest.mark.parametrize("method", UNNAMED)
def test_the_names_of_adapters_do_not_matter_where_nothing_is_drawn(method: str) -> None:
    renamed = {"ada": "zoe", "bob": "bob", "cyd": "abe"}
    bank = bank_of({renamed[name]: adapter for name, adapter in ADAPTERS.items()})
    weights = {renamed[name]: weight for name, weight in THREE.items()}
    assert_same(merged(weights, method, bank), merged(THREE, method))


def sees_the_bank(method: str) -> bool:
    """Whether a form looks at entries in bases, or at coefficients, of all skills of the bank."""
    choice = parse_method(method)
    values = dict(choice.parameters)
    learned = choice.name in OF_ONE_BANK
    return values.get("space") == "core" or "iso-c-dense" in choice.name or learned


@pytest.mark.parametrize("method", [form for form in FORMS if not sees_the_bank(form)])
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
ODD = tuple(form for form in FORMS if "iso-c-dense" not in form and takes_negative(form))


@pytest.mark.parametrize("method", ODD)
def test_minus_one_negates(method: str) -> None:
    opposite = {skill: -weight for skill, weight in MIXED.items()}
    assert_same(merged(opposite, method), times(-1, merged(MIXED, method)))


@pytest.mark.parametrize("method", FORMS)
def test_doubling_raw_weights_doubles(method: str) -> None:
    mixed = MIXED if takes_negative(method) else {k: abs(w) for k, w in MIXED.items()}
    twice = {skill: 2 * weight for skill, weight in mixed.items()}
    assert_same(merged(twice, method), times(2, merged(mixed, method)))


@pytest.mark.parametrize("method", ["ties", "ties;space=full", "pico", "linear+svc"])
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


# What 0.3 of one skill and 0.7 of another make of a layer that only the first has.
TWO: Mapping[str, float] = {"ada": 0.7, "cyd": 0.3}
LEARNED = BANK.calibration("adamerging").of("layers.1.up")
OF_TWO: Mapping[str, float] = {
    "linear": 0.3,
    "dare-linear": 0.3,
    "tsv-m": 0.3 / 0.7,
    "tuned": 0.3 / (0.7**3.5 + 0.3**3.5) ** (1 / 3.5),
    "adamerging": reference.coefficient("ratio", LEARNED, 2, 2, [0.7, 0.0, 0.3]),
}


def of_two(method: str) -> float:
    """How much of that skill's update is in the merge: 1, where its name is not in OF_TWO."""
    parts = parse_method(method).name.split("+")
    if parts[0] == "pico":
        return 0.3  # gamma
    factor = OF_TWO.get(parts[0], 1.0)
    return factor / max(factor, 1 / 2) if parts[-1] == "svc" else factor


@pytest.mark.parametrize(
    "method",
    [
        with_parameters(form, WHERE_ONE_SKILL_IS_ITSELF.get(name, ""))
        for name in METHODS
        if name not in (*FLATTENING, *WITHIN_UPDATES)
        for text in spaces_of(name)
        for form in (
            composed(text) if text in ("linear", "tsv-m", "ties", "knots-ties") else [text]
        )
    ],
)
def test_a_module_only_one_adapter_has_is_a_multiple_of_its_update(method: str) -> None:
    update = merged(TWO, method)["layers.1.up"]
    own = reference.delta(ADAPTERS["cyd"], "layers.1.up")
    assert_close(update, of_two(method) * own, rtol=1e-5, atol=3e-5)


@pytest.mark.parametrize(
    "method", ["iso-c", "iso-cts", "iso-c-dense", "pico+iso-c", "iso-c+svc", "pico+iso-cts+svc"]
)
def test_a_module_only_one_adapter_has_keeps_its_directions(method: str) -> None:
    update = merged(TWO, method)["layers.1.up"]
    P, _, Q = reference.real_svd(reference.delta(ADAPTERS["cyd"], "layers.1.up"))
    inside = P.mT @ update @ Q
    strengths = inside.diagonal()
    assert strengths.min() > 0.05
    assert_close(inside, torch.diag(strengths), rtol=0, atol=1e-4)
    if "svc" not in method:
        assert_close(strengths, strengths.mean().expand_as(strengths), rtol=1e-4, atol=0)
    if method != "iso-c-dense":
        assert_close(P @ inside @ Q.mT, update, rtol=0, atol=1e-4)


def test_adapters_that_cancel_leave_nothing_for_pico_to_restore() -> None:
    equal = dict.fromkeys(("one", "other"), ADAPTERS["bob"])
    bank = bank_of(equal)
    for weights in ({"one": 1.0, "other": -1.0}, {"one": -0.7, "other": 0.7}):
        for method in (
            "pico",
            "pico;gauge=canonical",
            "pico;pool=static",
            "pico+linear+svc",
            "pico+tsv-m",
            "pico+dare-linear;density=1;space=full",
        ):
            for module, update in merged(weights, method, bank).items():
                assert update.norm() < 1e-4, f"{method}: {module}"


def test_lora_soups_at_the_uniform_preference_are_the_learned_weights() -> None:
    adapters = {**ADAPTERS, "dee": random_adapter({"layers.0.q": 2, "layers.1.up": 3}, 17)}
    for factor in (1.0, 1.7):
        soups = {
            module: {name: factor * weight for name, weight in having.items()}
            for module, having in soups_of(adapters).items()
        }
        expected = {
            module: reference.linear(
                [reference.delta(adapters[name], module) for name in having], list(having.values())
            )
            for module, having in soups.items()
        }
        bank = with_soups(random_bank(adapters), soups)
        assert_same(merged(dict.fromkeys(adapters, 0.25), "lora-soups", bank), expected)


@pytest.mark.parametrize("method", OF_ONE_BANK)
def test_a_share_of_the_base_model_leaves_the_mix_of_the_others(method: str) -> None:
    # The preference that is looked up is that of the skills; the sum of weights multiplies.
    half = merged({"ada": 0.3, "bob": 0.2}, method)
    assert_same(half, times(0.5, merged({"ada": 0.6, "bob": 0.4}, method)))


@pytest.mark.parametrize("method", OF_ONE_BANK)
def test_a_layer_that_no_skill_of_the_support_changes_stays_as_it_is(method: str) -> None:
    assert not merged({"ada": 0.6, "bob": 0.4}, method)["layers.1.up"].any()
    assert merged({"ada": 0.6, "cyd": 0.4}, method)["layers.1.up"].any()


# One support under two preferences, and two more supports.
PREFERENCES: Sequence[Mapping[str, float]] = (THREE, {"ada": 0.3, "bob": 0.2, "cyd": 0.5})
OTHERS: Sequence[Mapping[str, float]] = (
    {"ada": 0.6, "bob": 0.4},
    {"ada": -0.3, "bob": 0.2, "cyd": 0.5},
)
# The same under other parameters: what is kept for one must not serve the other.
VARIED = (
    *UNCOMPOSED,
    *("pico+ties", "ties+svc", "pico+tsv-m+svc"),
    *("ties;density=0.6", "dare-ties;density=0.6", "dare-linear;density=0.6"),
    *("dare-linear;seed=5", "dare-ties;seed=5", "della;seed=5"),
    *(f"ties;{parameter}" for parameter in ("sign=count", "scope=module", "order=mergekit")),
    *(f"della;{parameter}" for parameter in ("epsilon=0.2", "rescale=l1", "sign=count")),
    *(f"pico+ties;{parameter}" for parameter in ("pool=static", "gauge=canonical")),
    "pico+ties;pool=static;gauge=canonical",
    "pico+tsv-m;pool=static",
)
SUPPORTS = ("ties", "tsv-m", "pico", "pico+ties;pool=static", "knots-ties")


@pytest.fixture(scope="module")
def alone_made() -> list[Merge]:
    """Every form at both preferences, some at the others, with nothing kept before or after."""
    wanted = [recipe(weights, method) for method in VARIED for weights in PREFERENCES]
    wanted += [recipe(weights, method) for method in SUPPORTS for weights in OTHERS]
    return [merge(BANK, one) for one in wanted]


def shuffled(merges: Sequence[Merge], step: int) -> list[Merge]:
    """The same in another order for each step."""
    order = sorted(range(len(merges)), key=lambda place: (place * step) % len(merges))
    return [merges[place] for place in order]


@pytest.mark.parametrize(("prepared", "step"), [(20_000, 7), (1 << 29, 1), (1 << 29, -7)])
def test_a_merge_is_the_same_to_the_bit_whatever_was_made_and_kept_before(
    alone_made: Sequence[Merge], prepared: int, step: int
) -> None:
    merger = Merger(bank_of(ADAPTERS), prepared=prepared)
    for alone_one in shuffled(alone_made, step):
        assert_identical(merger.merge(alone_one.recipe), alone_one)


def test_two_threads_make_the_same_merges_as_one_while_what_is_kept_comes_and_goes(
    alone_made: Sequence[Merge],
) -> None:
    merger = Merger(bank_of(ADAPTERS), prepared=5_000)

    def make(step: int) -> list[tuple[Merge, Merge]]:
        return [(merger.merge(one.recipe), one) for one in shuffled(alone_made[::2], step)]

    with ThreadPoolExecutor(2) as pool:
        for pairs in pool.map(make, (11, -11)):
            for made, alone_one in pairs:
                assert_identical(made, alone_one)


@pytest.mark.usefixtures("alone_made")
def test_making_merges_leaves_the_bank_as_it_was() -> None:
    untouched = bank_of(ADAPTERS)
    for own, fresh_one in zip(BANK.calibrations, untouched.calibrations, strict=True):
        for name, tensor in fresh_one.tensors.items():
            assert torch.equal(own.tensors[name], tensor)
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
        ("ties;density=0", "ties;density must lie within 0.001 .. 1, not 0"),
        ("ties;density=1.5", "ties;density must lie within 0.001 .. 1, not 1.5"),
        ("pico+ties+svc;density=1.5", "pico+ties+svc;density must lie within 0.001 .. 1"),
        ("ties;space=fourier", "ties;space is one of core|knots|full, not 'fourier'"),
        ("ties;sign=loud", "ties;sign is one of mass|count, not 'loud'"),
        ("ties;scope", "ties;scope is one of global|module, not 'True'"),
        ("pico;gauge=odd", "pico+linear;gauge is one of raw|canonical"),
        ("linear+svc;floor=2", "linear+svc;floor must lie within 0 .. 1"),
        ("ties;density=0.2;density=0.3", "the parameter 'density' stands there twice"),
        ("ties;rank=-1", "ties;rank must lie within 0 .. 4096, whole, not -1"),
        ("dare-ties;seed=1.5", "dare-ties;seed must lie within 0 .. 999999, whole, not 1.5"),
        ("linear;p=0.5", "linear;p must lie within 1 .. 64, inf, not 0.5"),
        ("linear;p=nan", "is a number"),
        ("ties;density=inf", "ties;density is a number"),
        ("della;density=1", "density - epsilon .. density + epsilon, which must lie within (0, 1]"),
        ("della;density=0.07", "must lie within (0, 1]"),
        ("della;epsilon=0.5", "must lie within (0, 1]"),
        ("linear;scale=9", "linear;scale must lie within 0 .. 4"),
        ("linear;scale=-1", "must lie within 0 .. 4"),
        ("linear;scale", "linear;scale is a number within 0 .. 4, not nothing"),
        ('linear;scale="1"', "is a number"),
        ("linear scale", "is not a method"),
        ("linear, ties", "is not a method"),
        ("", "is not a method"),
        ("0.5", "is not a method"),
        ('"linear"', "is not a method"),
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


@pytest.mark.parametrize("form", [*METHODS, "pico+della+svc;density=0.6;seed=5;floor=0.25"])
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


@pytest.mark.parametrize("method", UNCOMPOSED)
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
