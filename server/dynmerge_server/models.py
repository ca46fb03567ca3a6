"""Models: the names a request may put in `model`, and what each of them asks for.

The base model, its skills, the presets, and BASE@ followed by a skill, a preset or a preference.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any

from dynmerge.errors import ConfigError, PreferenceError, UnknownModel
from dynmerge.offer import Offer
from dynmerge.preference import BASE, Preference, check_skill_name
from dynmerge_server.config import ServerConfig

PARAM = "model"


@dataclass(frozen=True, slots=True)
class Models:
    """Served names. `presets` are checked against the bank when this is made.

    `aliases` name the base model too, where vLLM was given several names for it.
    """

    base: str
    skills: tuple[str, ...]
    presets: Mapping[str, Preference]
    allow_negative: bool
    context_length: int
    created: int
    aliases: tuple[str, ...] = ()

    @classmethod
    def of(
        cls, offer: Offer, config: ServerConfig, context_length: int, names: Sequence[str] = ()
    ) -> "Models":
        """The names under which `offer` is served. Raises ConfigError on a bad preset.

        `names` are the base model's; none leaves that to `config` and the bank.
        """
        own = config.model_name or PurePath(offer.outline.base.name).name
        base, *aliases = names or (own,)
        presets = {
            name: _preset(name, wanted, (base, *aliases), offer, config.allow_negative)
            for name, wanted in sorted(config.presets.items())
        }
        for name in (base, *aliases):
            if name in offer.skills:
                raise ConfigError(f"model_name: {name!r} is the name of a skill")
        return cls(
            base,
            offer.skills,
            presets,
            config.allow_negative,
            context_length,
            int(time.time()),
            tuple(aliases),
        )

    def preference(self, model: str | None) -> Preference | None:
        """What a model name asks for; None where it names the base model and so asks for nothing.

        Raises UnknownModel, or PreferenceError for what follows BASE@.
        """
        if not model or model in (self.base, *self.aliases):
            return None
        if model in self.presets:
            return self.presets[model]
        if model in self.skills:
            return Preference.of({model: 1.0})
        wanted = self._after_base(model)
        if wanted in self.presets:
            return self.presets[wanted]
        preference = Preference.parse(wanted, allow_negative=self.allow_negative, source=PARAM)
        preference.require(self.skills, PARAM)
        return preference

    def _after_base(self, model: str) -> str:
        """What follows BASE@. Raises UnknownModel where nothing does."""
        for name in (self.base, *self.aliases):
            if model.startswith(f"{name}@"):
                return model[len(name) + 1 :]
        shown = model if len(model) <= 200 else model[:200] + "..."
        known = ", ".join([self.base, *self.aliases, *self.skills, *self.presets])
        raise UnknownModel(
            f"The model `{shown}` does not exist. Valid names: {known}, and {self.base}@PREFERENCE",
            PARAM,
        )

    def preset(self, name: str, source: str) -> Preference:
        """The preset `name`. Raises PreferenceError naming the choices."""
        if name not in self.presets:
            known = ", ".join(self.presets) or "none"
            raise PreferenceError(
                f"{source}: no preset named {name[:80]!r} (known: {known})", source
            )
        return self.presets[name]

    def cards(self) -> list[dict[str, Any]]:
        """vLLM's model cards: the base model, then skills, then presets."""
        base = {"root": self.base, "parent": None, "max_model_len": self.context_length}
        cards = [self._card(name, base) for name in (self.base, *self.aliases)]
        for name in (*self.skills, *self.presets):
            kind = "skill" if name in self.skills else "preset"
            cards.append(self._card(name, {"root": name, "parent": self.base, "dynmerge": kind}))
        return cards

    def card(self, name: str) -> dict[str, Any]:
        """The card of `name`; BASE@ has one too. Raises UnknownModel, or PreferenceError."""
        listed = next((card for card in self.cards() if card["id"] == name), None)
        if listed is None:
            self.preference(name)
            listed = self._card(name, {"root": name, "parent": self.base, "dynmerge": "preference"})
        return listed

    def _card(self, name: str, more: Mapping[str, object]) -> dict[str, Any]:
        permission = {"id": f"modelperm-{name}", "object": "model_permission", **PERMISSION}
        return {
            "id": name,
            "object": "model",
            "created": self.created,
            "owned_by": "dynmerge",
            **more,
            "permission": [{**permission, "created": self.created}],
        }


PERMISSION = {
    "allow_create_engine": False,
    "allow_sampling": True,
    "allow_logprobs": True,
    "allow_search_indices": False,
    "allow_view": True,
    "allow_fine_tuning": False,
    "organization": "*",
    "group": None,
    "is_blocking": False,
}


def _preset(
    name: str,
    wanted: str | Mapping[str, float],
    bases: Sequence[str],
    offer: Offer,
    allow_negative: bool,
) -> Preference:
    source = f"preset {name}"
    try:
        check_skill_name(name, "preset")
        if isinstance(wanted, str):
            preference = Preference.parse(wanted, allow_negative=allow_negative, source=source)
        else:
            preference = Preference.of(wanted, allow_negative=allow_negative, source=source)
        preference.require(offer.skills, source)
    except PreferenceError as error:
        raise ConfigError(str(error)) from None
    if name in (BASE, *bases, *offer.skills):
        raise ConfigError(f"{source}: the name is taken by a skill or by the base model")
    return preference
