from pathlib import Path

import pytest

from dynmerge.errors import ConfigError
from dynmerge_server.config import API_KEY_VARIABLE, Auth, SamplingDefaults, ServerConfig

EXAMPLE = Path(__file__).parents[2] / "server" / "dynmerge.example.toml"


@pytest.fixture(autouse=True)
def _no_key_in_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(API_KEY_VARIABLE, raising=False)


def write(folder: Path, text: str) -> Path:
    path = folder / "dynmerge.toml"
    path.write_text(text)
    return path


def test_the_example_is_the_default() -> None:
    assert ServerConfig.load(EXAMPLE) == ServerConfig()


def test_the_command_line_wins_and_none_says_nothing(tmp_path: Path) -> None:
    path = write(tmp_path, 'port = 1\nmodel_name = "m"\n[engine]\nmax_batch = 2\nthreads = 1\n')
    config = ServerConfig.load(path, port=2, host=None, engine={"max_batch": 3})
    assert (config.port, config.host, config.model_name) == (2, "127.0.0.1", "m")
    assert (config.engine.max_batch, config.engine.threads) == (3, 1)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("prot = 1", "prot"),
        ("prot = 1", "port"),
        ("[limits]\nheader = 1", "limits.header"),
        ("[limits]\nheader = 1", "header_bytes"),
        ("[auth]\nkey = 'x'", "auth.key"),
        ("[engine]\nbatch = 1", "engine.batch"),
        ("[engine]\ndtype = 'int3'", "dtype"),
        ("port = 'x'", "port"),
        ("[limits]\nn = -1", r"dynmerge.toml: limits.n: .* greater than or equal to 1"),
        ("[limits]\nsend_seconds = nan", "dynmerge.toml: limits.send_seconds: .* finite"),
        ("port = 70000", "dynmerge.toml: port: .* less than or equal to 65535"),
        ("port = -1", "dynmerge.toml: port: .* greater than or equal to 0"),
        ("[sampling]\ntemperature = 3", "dynmerge.toml: sampling.temperature: .* equal to 2"),
        ("[sampling]\ntop_p = 0", "dynmerge.toml: sampling.top_p: .* greater than 0"),
        ("[sampling]\ntop_k = -2", "dynmerge.toml: sampling.top_k: .* equal to -1"),
        ("[sampling]\nmin_p = 1.5", "dynmerge.toml: sampling.min_p: .* equal to 1"),
        ("[sampling]\nrepetition_penalty = 0", "sampling.repetition_penalty: .* equal to 0.000001"),
        ("[engine]\nmax_batch = 0", "dynmerge.toml: max_batch is a whole number of at least 1"),
        ("port = ", "cannot read"),
    ],
)
def test_an_unknown_key_names_itself_and_the_choices(tmp_path: Path, text: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        ServerConfig.load(write(tmp_path, text))


def test_a_missing_file_is_a_configuration_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot read"):
        ServerConfig.load(tmp_path / "none.toml")


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.0.7", "example.org", ""])
def test_other_machines_need_a_key_or_an_explicit_word(
    host: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ConfigError, match="API key"):
        ServerConfig.load(host=host)
    ServerConfig.load(host=host, auth={"insecure": True})
    ServerConfig.load(host=host, auth={"keys": ["secret"]})
    monkeypatch.setenv(API_KEY_VARIABLE, "secret")
    assert ServerConfig.load(host=host).auth.keys == ("secret",)


@pytest.mark.parametrize("host", ["127.0.0.1", "127.9.9.9", "::1", "localhost"])
def test_this_machine_needs_none(host: str) -> None:
    ServerConfig.load(host=host)


def test_keys_are_not_shown() -> None:
    assert "secret" not in repr(ServerConfig(auth=Auth(keys=("secret",))))


def test_sampling_defaults_are_taken_field_by_field() -> None:
    first = SamplingDefaults(temperature=0.0, top_k=5)
    both = first.over(SamplingDefaults(temperature=1.0, top_p=0.9))
    assert both == SamplingDefaults(temperature=0.0, top_p=0.9, top_k=5)


@pytest.mark.parametrize(
    "text",
    ['[auth]\nkeys = "secret"', '[auth]\nkeys = [""]', '[auth]\nkeys = [" a"]', 'auth = "x"'],
)
@pytest.mark.parametrize("environment", ["envkey", ""])
def test_a_slip_in_the_keys_is_refused_and_never_read_as_other_keys(
    text: str, environment: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DYNMERGE_API_KEY", environment)
    path = tmp_path / "dynmerge.toml"
    path.write_text(text)
    with pytest.raises(ConfigError):
        ServerConfig.load(path)
