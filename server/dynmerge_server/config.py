"""ServerConfig: everything an operator may say, from one TOML file and the command line.

Read once at the start and never written to. The only environment variable is the secret API key.
"""

import ipaddress
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from typing import Annotated, Any, ClassVar, get_args, get_origin, get_type_hints

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError

from dynmerge.engines.transformers.config import EngineConfig
from dynmerge.errors import ConfigError
from dynmerge_server.experiments.schema import LogConfig

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

API_KEY_VARIABLE = "DYNMERGE_API_KEY"

Count = Annotated[int, Field(ge=1)]
Size = Annotated[int, Field(ge=0)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]


@dataclass(frozen=True, slots=True)
class Limits:
    """What one client may take. Sizes are bytes, times seconds."""

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    header_bytes: Count = 64 << 10
    headers: Count = 100
    body_bytes: Count = 16 << 20
    receive_seconds: Positive = 30.0  # for the whole request to arrive
    send_seconds: Positive = 60.0  # for a reader to take a reply, or the next piece of a stream
    n: Count = 16  # answers to one prompt
    prompts: Count = 1024  # prompts in one request
    sequences: Count = 32  # sequences of one request that run or wait in the engine at once


@dataclass(frozen=True, slots=True)
class Auth:
    """Who may ask. No key means that everybody may, which only a loopback address allows."""

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    keys: tuple[str, ...] = field(default=(), repr=False)
    insecure: bool = False  # serve other hosts without a key

    def __post_init__(self) -> None:
        if any(not key or key != key.strip() for key in self.keys):
            raise ConfigError(
                "an API key is empty or has blanks around it, which no client can send"
            )


@dataclass(frozen=True, slots=True)
class SamplingDefaults:
    """What is drawn with where the request says nothing; None is the model's own, then vLLM's."""

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    # The same ranges as in a request.
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(ge=1e-6, le=1e6)] | None = None

    def over(self, other: "SamplingDefaults") -> "SamplingDefaults":
        """These, and those of `other` where these say nothing."""
        missing = {
            item.name: getattr(other, item.name)
            for item in fields(self)
            if getattr(self, item.name) is None
        }
        return replace(self, **missing)


@dataclass(frozen=True, slots=True)
class FlagsConfig:
    """A team's own flag system, which may choose arms."""

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    provider: str  # of OpenFeature, as package.module:factory
    seconds: Positive = 0.5  # to wait for a flag before its unit is left out
    keep_seconds: Positive = 30.0  # that a flag counts


@dataclass(frozen=True, slots=True)
class ExperimentsConfig:
    """Experiments: where they are kept, and where they are declared. No log, no experiments."""

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    log: LogConfig | None = None
    file: Path | None = None  # TOML, read again whenever it changes
    flags: FlagsConfig | None = None
    guard_seconds: Positive = 60.0  # between looks at guardrails


@dataclass(frozen=True, slots=True)
class ServerConfig:
    """All of the server's settings. Raises ConfigError on a combination not safe to serve."""

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    host: str = "127.0.0.1"
    port: Annotated[int, Field(ge=0, le=65535)] = 8000  # 0 takes a free one
    base: str | None = None  # the base model's folder or hub id; None is what the bank was built on
    model_name: str | None = None  # what /v1/models calls the base model; None is its own name
    default_preference: str | None = None  # as in the header; None is the base model
    default_method: str | None = None  # as in the header; None is the bank's own
    allow_negative: bool = False  # raw weights below zero
    cache_bytes: Size = 1 << 30  # of merges
    prepared_bytes: Size = 1 << 29  # of what methods prepare from a set of skills
    drain_seconds: Size = 30  # between SIGTERM and giving up on requests in flight
    adapter_root: Path | None = None  # skills may be loaded from below it while vLLM serves
    presets: Mapping[str, str | Mapping[str, float]] = field(default_factory=dict)
    limits: Limits = field(default_factory=Limits)
    auth: Auth = field(default_factory=Auth)
    sampling: SamplingDefaults = field(default_factory=SamplingDefaults)
    engine: EngineConfig = field(default_factory=EngineConfig)
    experiments: ExperimentsConfig = field(default_factory=ExperimentsConfig)

    def __post_init__(self) -> None:
        if not (is_loopback(self.host) or self.auth.keys or self.auth.insecure):
            raise ConfigError(
                f"host {self.host} is reachable from other machines: give an API key "
                f"([auth] keys or {API_KEY_VARIABLE}), or say insecure"
            )

    @classmethod
    def load(cls, path: Path | None = None, **overrides: object) -> "ServerConfig":
        """The configuration in the TOML file at `path`, with `overrides` in place of its values.

        An override of None is none; a mapping replaces only the keys it names. The API key in the
        environment is added to the file's. Raises ConfigError naming the key and the choices.
        """
        data = read_toml(path) if path is not None else {}
        given = {key: value for key, value in overrides.items() if value is not None}
        for key, value in given.items():
            below = data.get(key)
            nested = isinstance(value, Mapping) and isinstance(below, Mapping)
            data[key] = {**below, **value} if nested else value  # type: ignore[dict-item]
        if key_in_environment := os.environ.get(API_KEY_VARIABLE):
            data["auth"] = _with_key(data.get("auth", {}), key_in_environment)
        try:
            return TypeAdapter(cls).validate_python(data)
        except ValidationError as error:
            raise ConfigError(_file(path) + explain(error)) from None
        except ConfigError as error:
            raise ConfigError(_file(path) + str(error)) from None


def _with_key(auth: object, key: str) -> object:
    """`auth` with one key more; what is not of its form is left for validation to refuse."""
    if not isinstance(auth, Mapping):
        return auth
    keys = auth.get("keys", [])
    return {**auth, "keys": [*keys, key]} if isinstance(keys, (list, tuple)) else auth


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach `host`."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def read_toml(path: Path) -> dict[str, Any]:
    """The file's tables, unchecked. Raises ConfigError where it is not TOML."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(f"cannot read the configuration {path}: {error}") from None
    except RecursionError:
        raise ConfigError(f"cannot read the configuration {path}: nested too deeply") from None


def _file(path: Path | None) -> str:
    return f"{path}: " if path else ""


def explain(error: ValidationError, kind: Any = None) -> str:
    """The first setting that is wrong, and what would be right; of `kind`, or the server's own."""
    first = error.errors(include_url=False, include_input=False)[0]
    where = [str(part) for part in first["loc"]]
    name = ".".join(where) or "the configuration"
    if first["type"] in ("extra_forbidden", "unexpected_keyword_argument"):
        known = ", ".join(_known(kind or ServerConfig, where[:-1]))
        return f"no setting named {name} (known: {known})"
    return f"{name}: {first['msg']}"


def _known(kind: Any, section: list[str]) -> list[str]:
    for part in section:
        if isinstance(get_origin(kind), type):  # a collection, and its key or number
            kind = _table(kind)
        else:
            kind = get_type_hints(_table(kind)).get(part)
    return [item.name for item in fields(_table(kind))] if _table(kind) else []


def _table(kind: Any) -> Any:
    """The dataclass that a type is, may be or collects; None where there is none."""
    return next((each for each in (kind, *get_args(kind)) if is_dataclass(each)), None)
