"""Settings: the server's TOML file as far as it applies where vLLM serves; the rest is refused."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from dynmerge.errors import ConfigError
from dynmerge_server.config import API_KEY_VARIABLE, ServerConfig, read_toml

# What the embedded engine alone has, and how vLLM is told the same; "" where it has no such thing.
ELSEWHERE: Mapping[str, str] = {
    "host": "--host",
    "port": "--port",
    "auth": "--api-key",
    "drain_seconds": "--shutdown-timeout",
    "sampling": "--override-generation-config",
    "limits": "--h11-max-incomplete-event-size, --h11-max-header-count and --max-num-seqs",
    "engine": "flags such as --dtype, --max-num-seqs and --enable-prefix-caching",
    "cache_bytes": "--max-loras, and core_slots and own_slots in --additional-config",
    "prepared_bytes": "",
}


def read_settings(path: Path | None, names: Sequence[str], api_keys: Sequence[str]) -> ServerConfig:
    """The configuration in `path` for a server of the base model `names` that asks for `api_keys`.

    `base` is read by `dynmerge serve`, which hands it to vLLM. Raises ConfigError, also on a
    setting that vLLM has a flag for: it would be ignored.
    """
    given = read_toml(path) if path is not None else {}
    for name in given:
        if name in ELSEWHERE:
            flag = ELSEWHERE[name]
            instead = f"vLLM takes {flag} instead" if flag else "vLLM has no such thing"
            raise ConfigError(f"{path}: {name} is for the embedded engine; {instead}")
    key = os.environ.get(API_KEY_VARIABLE)
    if key and key not in api_keys:
        raise ConfigError(f"{API_KEY_VARIABLE} is not read here: vLLM takes --api-key instead")
    config = ServerConfig.load(path)
    if config.model_name not in (None, *names):
        raise ConfigError(
            f"{path}: model_name is {config.model_name!r}, but vLLM calls it {names[0]!r}: give "
            f"--served-model-name {config.model_name}"
        )
    return config
