"""From a request to a recipe: which merge it wants, and where it says so.

One precedence, for the preference and for the method apart:

    header  >  body  >  model name  >  experiment  >  the server's default

A level that says nothing leaves the choice to the next. Every level that says something is read, so
that a mistake in an overridden one is an error too. Within one level there is one way to say it: a
header and a preset header together, or two of `preference`, `preset`, `lora` and `vllm_xargs`, are
a 400 that names both. A header beginning with X-Dynmerge- that is none of ours is a 400: it would
be a wish ignored.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from starlette.datastructures import Headers

from dynmerge import preference as preferences
from dynmerge.errors import ConfigError, PreferenceError, RequestError
from dynmerge.merging import choice
from dynmerge.merging.choice import parse_method
from dynmerge.merging.demands import check_bank, default_for
from dynmerge.offer import Offer
from dynmerge.preference import Preference
from dynmerge.recipe import MethodChoice, Recipe
from dynmerge_server.config import ServerConfig
from dynmerge_server.experiments.declaration import Arm
from dynmerge_server.models import Models

PREFIX = "x-dynmerge-"
PREFERENCE_HEADER = preferences.HEADER
PRESET_HEADER = "X-Dynmerge-Preset"
METHOD_HEADER = choice.HEADER
UNIT_HEADER = "X-Dynmerge-Unit"  # this and the next are read by experiments
EXPERIMENT_HEADER = "X-Dynmerge-Experiment"
REQUEST_HEADERS = (
    *(PREFERENCE_HEADER, PRESET_HEADER, METHOD_HEADER),
    *(UNIT_HEADER, EXPERIMENT_HEADER),
)

DEFAULT = "default"
MAX_ARMS_KEPT = 1024  # recipes of arms, made once


@dataclass(frozen=True, slots=True)
class Wish:
    """What the body of a request says about the merge it wants; None where it says nothing.

    `experiment` and `user` are for experiments: an arm that is asked for, and who asks.
    """

    preference: Mapping[str, float] | str | None = None
    normalize: bool | None = None
    preset: str | None = None
    method: str | None = None
    lora: list[dict[str, Any]] | None = None
    xargs: Mapping[str, Any] | None = None
    experiment: str | None = None
    user: str | None = None


@dataclass(frozen=True, slots=True)
class Said:
    """What a request says, or an arm for it: a preference and a method, None where nothing is said.

    `source` is the level that chose the preference, `method_source` where the method stands.
    """

    preference: Preference | None = None
    source: str = DEFAULT
    method: MethodChoice | None = None
    method_source: str = "default_method"

    @property
    def anything(self) -> bool:
        """Whether it leaves not all to the server."""
        return self.preference is not None or self.method is not None


class Preferences:
    """Resolves requests against one offer, one set of names and the server's defaults."""

    def __init__(self, offer: Offer, models: Models, config: ServerConfig) -> None:
        self._offer = offer
        self._models = models
        self._allow_negative = config.allow_negative
        self._arms: dict[tuple[str, int, str], Recipe] = {}
        try:
            self._default = self._parse(config.default_preference, "default_preference")
            self._default_method = self._method(config.default_method, "default_method")
        except RequestError as error:
            raise ConfigError(str(error)) from None

    @property
    def default_method(self) -> MethodChoice:
        """What serves where a request names no method: the server's choice, else the bank's."""
        return self._default_method or default_for(self._offer.outline)

    @property
    def bank(self) -> str:
        """The digest of the bank that is served."""
        return self._offer.outline.digest

    def read(self, headers: Headers, wish: Wish, model: str | None) -> Said:
        """What a request says, every level of it. Raises RequestError for any mistake."""
        levels: dict[str, Preference | None] = {
            "header": self._from_headers(headers),
            "body": self._from_body(wish),
            "model": self._models.preference(model),
        }
        nothing: tuple[str, Preference | None] = (DEFAULT, None)
        source, chosen = next((each for each in levels.items() if each[1] is not None), nothing)
        # Every choice of method is read before one is taken.
        in_body = _one_of({"method": wish.method, "vllm_xargs.method": _x(wish, "method")})
        choices = (
            (self._method(joined(headers, METHOD_HEADER), METHOD_HEADER), METHOD_HEADER),
            (self._method(*in_body), in_body[1]),
        )
        method = next((each for each in choices if each[0] is not None), (None, "default_method"))
        return Said(chosen, source, *method)

    def recipe(self, said: Said) -> Recipe:
        """The merge that is meant, by the server's defaults where nothing is said.

        Raises PreferenceError or MethodError.
        """
        preference = said.preference or self._default or Preference.base_model()
        method = said.method or self._default_method
        source = said.method_source if said.method else "default_method"
        return self._offer.recipe(preference, method, said.source, method_source=source)

    def recipe_of(self, arm: Arm, name: str, declared: tuple[str, int]) -> Recipe:
        """An experiment's arm, as `name` in errors; `declared` names experiment and revision.

        Raises RequestError where it is not served.
        """
        key = (*declared, name)
        if key not in self._arms:
            if len(self._arms) >= MAX_ARMS_KEPT:
                self._arms.clear()
            self._arms[key] = self.recipe(self._of_arm(arm, name))
        return self._arms[key]

    def _of_arm(self, arm: Arm, name: str) -> Said:
        preference: Preference | None = None
        if arm.preset is not None:
            preference = self._models.preset(arm.preset, name)
        elif isinstance(arm.preference, str):
            preference = self._parse(arm.preference, name)
        elif arm.preference is not None:
            preference = self._of(arm.preference, True, name)
        return Said(preference, name, self._method(arm.method, name), name)

    def _from_headers(self, headers: Headers) -> Preference | None:
        for name in headers:
            # Some proxies and clients write underscores; who reads them so would mean it.
            if name.replace("_", "-").startswith(PREFIX) and name not in _KNOWN:
                known = ", ".join(REQUEST_HEADERS)
                raise RequestError(f"there is no request header {name} (known: {known})", name)
        given = {name: joined(headers, name) for name in (PREFERENCE_HEADER, PRESET_HEADER)}
        text, source = _one_of(given)
        if source == PRESET_HEADER and text is not None:
            return self._models.preset(text.strip(), source)
        return self._parse(text, source)

    def _from_body(self, wish: Wish) -> Preference | None:
        given, source = _one_of(
            {
                "preference": wish.preference,
                "preset": wish.preset,
                "lora": wish.lora,
                "vllm_xargs.preference": _x(wish, "preference"),
                "vllm_xargs.preset": _x(wish, "preset"),
            }
        )
        if wish.normalize is not None and source != "preference":
            raise PreferenceError(
                "normalize says how to read preference, which is absent", "normalize"
            )
        if given is None:
            return None
        if source.endswith("preset"):
            return self._models.preset(given, source)
        if source == "lora":
            return self._of(_scales(given), False, source)
        if isinstance(given, str):
            return self._from_string(given, wish.normalize, source)
        return self._of(given, wish.normalize is not False, source)

    def _from_string(self, text: str, normalize: bool | None, source: str) -> Preference | None:
        raw = normalize is False and bool(text.strip())
        preference = self._parse(f"{text};raw" if raw else text, source)
        if normalize and preference is not None and preference.is_raw:
            message = "preference says ;raw and normalize says otherwise"
            raise PreferenceError(message, "normalize")
        return preference

    def _of(self, weights: Mapping[str, float], normalize: bool, source: str) -> Preference:
        preference = Preference.of(
            weights, normalize=normalize, allow_negative=self._allow_negative, source=source
        )
        preference.require(self._offer.skills, source)
        return preference

    def _parse(self, text: str | None, source: str) -> Preference | None:
        if text is None:
            return None
        preference = Preference.parse(text, allow_negative=self._allow_negative, source=source)
        preference.require(self._offer.skills, source)
        return preference

    def _method(self, text: str | None, source: str) -> MethodChoice | None:
        if text is None:
            return None
        method = parse_method(text, source)
        check_bank(method, self._offer.outline, source)
        return method


_KNOWN = {name.lower() for name in REQUEST_HEADERS}


def joined(headers: Headers, name: str) -> str | None:
    """Repeated lines are one list, as RFC 9110 has it; `headers.get` would return the first."""
    lines = headers.getlist(name)
    return ", ".join(lines) if lines else None


def _one_of(given: Mapping[str, Any]) -> tuple[Any, str]:
    """The value given and its name; (None, "") if there is none, PreferenceError if two."""
    present = [(value, name) for name, value in given.items() if value is not None]
    if len(present) > 1:
        names = [name for _, name in present]
        raise PreferenceError(
            f"{names[0]} and {names[1]} both say which merge to use; give one of them", names[1]
        )
    return present[0] if present else (None, "")


def _x(wish: Wish, name: str) -> str | None:
    value = (wish.xargs or {}).get(name)
    if value is not None and not isinstance(value, str):
        param = f"vllm_xargs.{name}"
        raise PreferenceError(f"{param} is a string such as math=0.7, code=0.3", param)
    return value


def _scales(lora: list[dict[str, Any]]) -> dict[str, float]:
    """llama.cpp's list of adapters and scales, as multipliers by name."""
    scales: dict[str, float] = {}
    for index, item in enumerate(lora):
        where = f"lora[{index}]"
        if set(item) != {"id", "scale"} or not isinstance(item["id"], str):
            raise PreferenceError(
                f'{where} is not of the form {{"id": NAME, "scale": 0.7}}', "lora"
            )
        if item["id"] in scales:
            raise PreferenceError(f"{where}: {item['id']!r} stands there twice", "lora")
        scales[item["id"]] = item["scale"]
    return scales
