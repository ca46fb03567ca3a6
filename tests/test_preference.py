import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dynmerge.errors import PreferenceError
from dynmerge.preference import GRID, Preference

NAMES = st.from_regex(r"[a-z*][a-z0-9_.*-]{0,8}", fullmatch=True).filter(lambda n: n != "base")
VECTORS = st.dictionaries(NAMES, st.integers(1, 50), min_size=1, max_size=8)


@pytest.mark.parametrize(
    ("text", "canonical"),
    [
        ("math=0.7, code=0.3", "code=0.3, math=0.7"),
        ("code=0.30,math=0.70", "code=0.3, math=0.7"),
        ("math=7,\tcode=3", "code=0.3, math=0.7"),
        ("math", "math=1"),
        ("math, code", "code=0.5, math=0.5"),
        ("math=1, code=0", "math=1"),
        ("a=0.29, b=0.71", "a=0.29, b=0.71"),
        ("a, b, c", "a=0.334, b=0.333, c=0.333"),
        ("math=0.7;raw, code=1.2", "code=1.2, math=0.7;raw"),
        ("math=0.7;raw, code=0.3", "code=0.3, math=0.7"),
        ("math=0, code=0", "base=1"),
        ("math=0;raw", "base=1"),
        ("base", "base=1"),
        ("math=0.25, base=0.75", "base=0.75, math=0.25"),
    ],
)
def test_a_header_has_one_canonical_text(text: str, canonical: str) -> None:
    assert str(Preference.parse(text)) == canonical


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("math=0.7,,code=1", "column 10"),
        ("math=.5", "column 6"),
        ("Math=1", "column 1"),
        ("code=1, math=nan", "column 9: the weight of 'math'"),
        ('math="0.7"', "'math'"),
        ('math="0.7", maths=1', "column 1: the weight of 'math'"),
        ("math=(1 2)", "'math'"),
        ("math=?0", "'math'"),
        ("(1 2)", "column 1"),
        ("math=0.1, math=0.5", "column 11: 'math' stands there twice"),
        ("math=0.7001", "column 11"),
        ("math=1e5", "column 7"),
        ("math=1;scale=2", "'scale'"),
        ("math=1;raw=2", "'raw'"),
        ("math=-0.5", "negative"),
        ("math=-0.5;raw", "does not allow"),
        ("math=2.001;raw", "-2 .. 2"),
        ("base=1;raw, math=1", "'base' takes no raw weight"),
        ("a=999, b=0.001", "'b' is 1e-06 of the whole"),
        ("", "names no skill"),
        ("math=1, café=1", "column 12: 'é' is not ASCII"),
        ("m" * 65, "is not a skill name"),
        (", ".join(f"s{i}=1" for i in range(1000)), "at most 256"),
        ("a" * 20_000, "at most 16384"),
    ],
)
def test_a_bad_header_is_an_error_that_names_the_place(text: str, says: str) -> None:
    with pytest.raises(PreferenceError) as caught:
        Preference.parse(text)
    assert says in str(caught.value)
    assert "X-Dynmerge-Preference" in str(caught.value)
    assert caught.value.param == "X-Dynmerge-Preference"


@pytest.mark.parametrize(
    ("text", "column"),
    [
        ("code=1, math=-0.5", 9),
        ("code=1, math=-0.5;raw", 9),
        ("code=1, math=2.001;raw", 9),
        ("code=0.9;raw, base=0.1", 15),
        ("a=999,  b=0.001", 9),
        ("code=1, " + "m" * 65, 9),
        (" math=-1", 2),
        ("", 1),
        (", ".join(f"s{i:03}=1" for i in range(300)), 256 * 8 + 1),
        ("a" * 20_000, 16_385),
        ("math, mth=1, code=0", 7),
        ("math, mth=0", 7),
    ],
)
def test_what_is_wrong_with_a_text_has_its_column(text: str, column: int) -> None:
    with pytest.raises(PreferenceError, match=rf"^--preference, column {column}: "):
        Preference.parse(text, source="--preference").require(["code", "math"], "--preference")


@pytest.mark.parametrize("weights", [{}, {"math": -1}, {"mth": 1}, {"Math": 1}])
def test_weights_that_came_in_no_text_have_no_column(weights: dict[str, float]) -> None:
    with pytest.raises(PreferenceError, match=r"^preference: "):
        Preference.of(weights).require(["math"])


@given(VECTORS, st.randoms())
def test_order_and_scale_of_a_preference_do_not_matter(weights: dict[str, int], random) -> None:
    shuffled = list(weights.items())
    random.shuffle(shuffled)
    preference = Preference.of(weights)
    assert preference == Preference.of(dict(shuffled))
    assert preference == Preference.of({name: 0.01 * weight for name, weight in weights.items()})
    assert sum(value for _, value in preference.thousandths) == GRID


def test_equal_remainders_are_told_apart_by_name_whatever_the_scale() -> None:
    weights = {"*": 15, "a": 1, "b": 3, "c": 1, "d": 1, "e": 27}
    for scale in (1, 0.01, 0.1, 3, 1e-7):
        scaled = Preference.of({name: scale * weight for name, weight in weights.items()})
        assert scaled == Preference.of(weights)


@given(VECTORS, st.booleans())
def test_what_is_printed_is_read_back_as_the_same(weights: dict[str, int], normalize: bool) -> None:
    scaled = {name: weight / 50 for name, weight in weights.items()}
    preference = Preference.of(scaled, normalize=normalize)
    assert Preference.parse(str(preference)) == preference
    echoed = json.loads(json.dumps(preference.weights))
    assert Preference.of(echoed, normalize=not preference.is_raw) == preference


@given(VECTORS)
def test_the_grid_moves_no_weight_by_a_thousandth(weights: dict[str, int]) -> None:
    total = sum(weights.values())
    for name, value in Preference.of(weights).weights.items():
        assert abs(value - weights[name] / total) < 1 / GRID


@given(st.text(max_size=60))
def test_any_text_is_a_preference_or_a_preference_error(text: str) -> None:
    try:
        preference = Preference.parse(text)
    except PreferenceError:
        return
    assert Preference.parse(str(preference)) == preference


def test_negative_multipliers_only_where_allowed() -> None:
    preference = Preference.parse("math=-0.5;raw, code=1", allow_negative=True)
    assert preference.is_raw
    assert preference.weights == {"code": 1.0, "math": -0.5}
    assert Preference.parse(str(preference), allow_negative=True) == preference


def test_neighbours_on_the_grid_differ() -> None:
    assert Preference.parse("a=0.7, b=0.3") != Preference.parse("a=0.701, b=0.299")


@pytest.mark.parametrize("value", [math.nan, math.inf, 10**400, "0.7", None, True, [1]])
def test_a_weight_that_is_no_finite_number_is_refused(value: object) -> None:
    with pytest.raises(PreferenceError, match="'math'"):
        Preference.of({"math": value})


def test_an_unknown_skill_is_named_with_the_choices() -> None:
    preference = Preference.of({"mth": 1})
    with pytest.raises(PreferenceError, match=r"no skill named 'mth' \(known: code, math\)"):
        preference.require(["math", "code"])


@pytest.mark.parametrize("text", ["mth=0", "math=1, mth=0", "mth=0;raw"])
def test_an_unknown_skill_is_an_error_even_at_zero(text: str) -> None:
    with pytest.raises(PreferenceError, match="no skill named 'mth'"):
        Preference.parse(text).require(["math", "code"])


def test_base_is_known_everywhere_and_takes_its_share() -> None:
    preference = Preference.of({"math": 1, "base": 3})
    preference.require(["math"])
    assert preference.vector(["code", "math"]) == [0.0, 0.25]
    assert not preference.is_base
    assert Preference.of({"base": 2}).is_base
