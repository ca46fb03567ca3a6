"""`dynmerge serve --engine vllm`: vLLM's own server with the flags that dynmerge needs.

This process becomes vLLM: signals, logs and the exit code are its own. Knows no tensors; what vLLM
is told here, `vllm serve` can be told by hand.
"""

import importlib.util
import json
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import entry_points
from pathlib import Path

from dynmerge.bank.storage import read_manifest
from dynmerge.engines.vllm.config import CONTROL, KEY
from dynmerge.errors import BaseModelError, ConfigError
from dynmerge_server.config import API_KEY_VARIABLE, ServerConfig, is_loopback
from dynmerge_server.vllm.settings import read_settings

ADDITIONAL = "--additional-config"
PLUGINS, VLLM_KEY = "VLLM_PLUGINS", "VLLM_API_KEY"
GROUPS = (
    "vllm.general_plugins",
    "vllm.platform_plugins",
    "vllm.io_processor_plugins",
    "vllm.stat_logger_plugins",
)
DRAIN_SECONDS = 30  # as the embedded server; vLLM's own default ends all requests at once
MAX_LORAS = 1024  # merges resident at once
# vLLM asks for one; nothing is allocated by it.
RANK = 8


@dataclass(frozen=True, slots=True)
class Wanted:
    """What the command line says; None where it says nothing."""

    bank: Path
    config: Path | None
    base: str | None
    host: str | None
    port: int | None
    dtype: str | None
    insecure: bool


def run(wanted: Wanted, flags: Sequence[str], *, show: bool) -> None:
    """Become `vllm serve`, or with `show` print the command. Raises ConfigError or BankError."""
    arguments = command(wanted, flags, os.environ)
    extra = environment(os.environ)
    if show:
        print(shown(arguments, {name: extra[name] for name in (PLUGINS,)}))
        return
    if importlib.util.find_spec("vllm") is None:
        raise ConfigError("vLLM is not installed here: pip install 'dynmerge[vllm]'")
    sys.stdout.flush()
    main = [sys.executable, "-m", "vllm.entrypoints.cli.main", *arguments]
    os.execve(sys.executable, main, {**os.environ, **extra})


def command(wanted: Wanted, flags: Sequence[str], variables: Mapping[str, str]) -> list[str]:
    """`serve BASE ...`: what vLLM is told. The user's own `flags` come last. Raises ConfigError."""
    given = _names(flags)
    _check_dotted(given)
    settings = ServerConfig.load(wanted.config)
    manifest = read_manifest(wanted.bank)
    source = wanted.base or settings.base or manifest.base.source
    if source is None:
        raise BaseModelError(
            f"the bank does not say where its base model {manifest.base.name} is: give --base"
        )
    name = _value(flags, "--served-model-name") or settings.model_name or manifest.base.name
    host = wanted.host or _value(flags, "--host") or "127.0.0.1"
    if wanted.config is not None:
        keys = [key for key in (variables.get(API_KEY_VARIABLE),) if key]
        read_settings(wanted.config, [name], keys)
    _check_host(host, wanted.insecure or "--api-key" in given, variables)
    most = _value(flags, "--max-loras") or str(MAX_LORAS)
    ours = {
        "--host": host,
        "--port": str(wanted.port) if wanted.port is not None else None,
        "--dtype": wanted.dtype,
        "--served-model-name": name,
        "--max-loras": most,
        "--max-cpu-loras": most,
        "--max-lora-rank": str(RANK),
        "--shutdown-timeout": str(DRAIN_SECONDS),
        "--worker-extension-cls": CONTROL,
        ADDITIONAL: _additional(wanted, flags),
    }
    told = ["serve", source, "--enable-lora"]
    for flag, value in ours.items():
        if value is not None and (flag == ADDITIONAL or flag not in given):
            told += [flag, value]
    return told + _without(flags, ADDITIONAL)


def environment(variables: Mapping[str, str]) -> dict[str, str]:
    """The variables that vLLM is to have beside those there are."""
    named = variables.get(PLUGINS)
    # Unset it means all there are, but for endpoints; set it means these.
    plugins = _installed() if named is None else [each for each in named.split(",") if each]
    extra = {PLUGINS: ",".join(dict.fromkeys([*plugins, KEY]))}
    if key := variables.get(API_KEY_VARIABLE):
        extra[VLLM_KEY] = key
    return extra


def _installed() -> list[str]:
    return [point.name for group in GROUPS for point in entry_points(group=group)]


def shown(arguments: Sequence[str], extra: Mapping[str, str]) -> str:
    """The command as a shell takes it."""
    import shlex

    variables = [f"{name}={shlex.quote(value)}" for name, value in extra.items()]
    return " ".join([*variables, "vllm", *map(shlex.quote, arguments)])


def _additional(wanted: Wanted, flags: Sequence[str]) -> str:
    text = _value(flags, ADDITIONAL) or "{}"
    try:
        given = json.loads(text)
        ours = {**given.get(KEY, {})}
    except (ValueError, AttributeError, TypeError):
        raise ConfigError(f"{ADDITIONAL} is a JSON object, not {text[:80]!r}") from None
    if "bank" in ours:
        raise ConfigError(f"{ADDITIONAL} names a bank, and so does the command line")
    ours = {"bank": str(wanted.bank.resolve()), **ours}
    if wanted.config is not None:
        ours["settings"] = str(wanted.config.resolve())
    return json.dumps({**given, KEY: ours})


def _check_dotted(given: Iterable[str]) -> None:
    """vLLM would put such a flag in place of the whole configuration, the bank with it."""
    for name in given:
        if name.startswith(f"{ADDITIONAL}."):
            raise ConfigError(f"{name}: give {ADDITIONAL} one JSON object instead")


def _check_host(host: str, protected: bool, variables: Mapping[str, str]) -> None:
    keys = variables.get(API_KEY_VARIABLE) or variables.get(VLLM_KEY)
    if not (is_loopback(host) or protected or keys):
        raise ConfigError(
            f"host {host} is reachable from other machines: give an API key (--api-key or "
            f"{API_KEY_VARIABLE}), or say --insecure"
        )


def _names(flags: Sequence[str]) -> set[str]:
    return {_spelled(flag) for flag in flags if flag.startswith("-")}


def _spelled(flag: str) -> str:
    """vLLM takes underscores for dashes, and a value after an equals sign."""
    return flag.partition("=")[0].replace("_", "-")


def _value(flags: Sequence[str], name: str) -> str | None:
    """What the user gave for a flag of one value, the last time it stands there."""
    found = None
    for place, flag in enumerate(flags):
        if flag.startswith("-") and _spelled(flag) == name:
            _, equals, value = flag.partition("=")
            after = flags[place + 1] if place + 1 < len(flags) else None
            found = value if equals else after
    return found


def _without(flags: Sequence[str], name: str) -> list[str]:
    kept: list[str] = []
    skip = False
    for flag in flags:
        if skip:
            skip = False
        elif flag.startswith("-") and _spelled(flag) == name:
            skip = "=" not in flag
        else:
            kept.append(flag)
    return kept
