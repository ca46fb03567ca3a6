from pathlib import Path

import pytest

from dynmerge.errors import ConfigError
from dynmerge_server.config import API_KEY_VARIABLE, ServerConfig
from dynmerge_server.state import Serving
from dynmerge_server.vllm.settings import read_settings


@pytest.fixture(autouse=True)
def _no_key_in_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(API_KEY_VARIABLE, raising=False)


def read(folder: Path, text: str) -> ServerConfig:
    path = folder / "settings.toml"
    path.write_text(text)
    return read_settings(path, ("tiny", "alias"), ("key",))


def test_what_both_engines_know_is_read(tmp_path: Path) -> None:
    config = read(tmp_path, 'default_method = "ties"\nmodel_name = "alias"\n[presets]\na = "b"\n')
    assert (config.default_method, config.presets) == ("ties", {"a": "b"})
    assert read_settings(None, ("tiny",), ()) == ServerConfig()


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("port = 8000", "port is for the embedded engine; vLLM takes --port instead"),
        ("[engine]\nmax_batch = 16", "--max-num-seqs"),
        ("[auth]\nkeys = ['a']", "--api-key"),
        ("prepared_bytes = 1", "vLLM has no such thing"),
        ("model_name = 'other'", "--served-model-name other"),
        ("prot = 1", "no setting named prot"),
    ],
)
def test_what_would_be_ignored_is_refused(tmp_path: Path, text: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        read(tmp_path, text)


def test_a_key_in_the_environment_is_never_ignored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(API_KEY_VARIABLE, "key")
    read(tmp_path, "")
    monkeypatch.setenv(API_KEY_VARIABLE, "other")
    with pytest.raises(ConfigError, match="vLLM takes --api-key"):
        read(tmp_path, "")


def test_the_embedded_engine_loads_no_skills_while_serving(runtime: object) -> None:
    with pytest.raises(ConfigError, match="adapter_root"):
        Serving.of(runtime, ServerConfig(adapter_root=Path("x")))  # type: ignore[arg-type]
