"""PluginConfig: what an operator says about dynmerge inside vLLM, and how many merges that holds.

It travels in vLLM's own `--additional-config '{"dynmerge": {...}}'`, which reaches every process
and is part of the key of vLLM's compile cache.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from dynmerge.bank.outline import Outline
from dynmerge.engines.vllm.forms import Form
from dynmerge.errors import ConfigError

KEY = "dynmerge"
CONTROL = "dynmerge.engines.vllm.control.Control"  # the worker extension
BUDGET = 1 << 30  # bytes that the slots of a form may take where nobody says how many there are
MOST_OWN = 2
# vLLM itself lets no step have more merges than --max-loras; it knows nothing of the other forms.
RESERVE: Mapping[Form, int] = {"diagonal": 0, "core": 2, "own": 1}


@dataclass(frozen=True, slots=True)
class Slots:
    """How many merges of each form are resident at once, and the largest rank of the `own` ones."""

    diagonal: int
    core: int
    own: int
    own_rank: int

    def of(self, form: Form) -> int:
        """The slots of a form."""
        return {"diagonal": self.diagonal, "core": self.core, "own": self.own}[form]

    def rows(self, form: Form) -> int:
        """The rows of its table: a few more, for what a client left and the engine still runs."""
        return self.of(form) + (RESERVE[form] if self.of(form) else 0)


@dataclass(frozen=True, slots=True)
class PluginConfig:
    """`bank` is a folder. None is chosen from the bank's sizes; see `slots`.

    `settings` is the server's TOML file. `versions` of the bank are resident at most, so that
    requests finish on theirs while a skill is replaced; with fixed addresses each of them takes its
    memory, and `spare_rank` more than the bank's own ranks, from the start. `static` is whether
    addresses are fixed and nothing is decided on the host within a step: None where vLLM compiles
    or captures graphs. `trust_base` skips the comparison of the base model's weights.
    """

    bank: Path
    settings: Path | None = None
    core_slots: int | None = None
    own_slots: int | None = None
    own_rank: int | None = None
    versions: int = 2
    spare_rank: int = 0
    static: bool | None = None
    trust_base: bool = False

    def __post_init__(self) -> None:
        for name, least in (
            ("core_slots", 0),
            ("own_slots", 0),
            ("own_rank", 1),
            ("versions", 1),
            ("spare_rank", 0),
        ):
            value = getattr(self, name)
            if value is not None and (type(value) is not int or value < least):
                raise ConfigError(f"{KEY}.{name} is a whole number of at least {least}: {value!r}")

    @classmethod
    def read(cls, additional: object) -> "PluginConfig | None":
        """The configuration in vLLM's `additional_config`, None where it has none of ours.

        Raises ConfigError naming the key and the choices.
        """
        given = additional.get(KEY) if isinstance(additional, Mapping) else None
        if given is None:
            return None
        if not isinstance(given, Mapping):
            raise ConfigError(
                f'{KEY} in --additional-config is an object such as {{"bank": "..."}}'
            )
        known = [each.name for each in fields(cls)]
        for name in given:
            if name not in known:
                raise ConfigError(f"{KEY} has no setting {name!r} (known: {', '.join(known)})")
        if not isinstance(given.get("bank"), str) or not given["bank"]:
            raise ConfigError(f"{KEY}.bank names the bank's folder")
        return cls(**{name: _typed(name, value) for name, value in given.items()})

    def slots(self, outline: Outline, itemsize: int, max_loras: int) -> Slots:
        """The slots for a bank whose merges are kept in numbers of `itemsize` bytes."""
        stacked = max(sum(module.ranks) for module in outline.modules)
        own_rank = self.own_rank or stacked
        core = sum(module.p * module.q for module in outline.modules) * itemsize
        own = sum(
            min(own_rank, module.d_out, module.d_in) * (module.d_out + module.d_in)
            for module in outline.modules
        )
        return Slots(
            diagonal=max_loras,
            core=_count(self.core_slots, min(max_loras, max(1, BUDGET // core))),
            own=_count(self.own_slots, min(MOST_OWN, max_loras, BUDGET // (own * itemsize))),
            own_rank=own_rank,
        )


def _count(said: int | None, otherwise: int) -> int:
    return otherwise if said is None else said


def _typed(name: str, value: object) -> Any:
    allowed = _KINDS.get(name, (int, type(None)))
    if not isinstance(value, allowed):
        words = " or ".join("null" if kind is type(None) else kind.__name__ for kind in allowed)
        raise ConfigError(f"{KEY}.{name} is {words}, not {value!r}")
    return Path(value) if name in ("bank", "settings") and isinstance(value, str) else value


_KINDS: Mapping[str, tuple[type, ...]] = {
    "bank": (str,),
    "settings": (str, type(None)),
    "versions": (int,),
    "spare_rank": (int,),
    "static": (bool, type(None)),
    "trust_base": (bool,),
}
