"""`dynmerge serve --engine vllm`: the command that it becomes, and what it refuses before that."""

import json
import shlex
from collections.abc import Mapping, Sequence
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from dynmerge.bank.bank import BaseIdentity, FactorBank
from dynmerge.bank.build import build_bank
from dynmerge.bank.storage import save_bank
from dynmerge.cli.serve_vllm import MAX_LORAS, Wanted, command, environment, shown
from dynmerge.engines.vllm.config import CONTROL
from dynmerge.errors import BaseModelError, ConfigError
from tests.bank_factory import random_adapters
from tests.cli.conftest import Run

VARIABLES = ("DYNMERGE_API_KEY", "VLLM_API_KEY", "VLLM_PLUGINS")
BASE = ["--base", "org/tiny"]


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)


def small_bank() -> FactorBank:
    return build_bank(BaseIdentity("tiny", "0" * 64), random_adapters())


@pytest.fixture(scope="module")
def bank(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bank that does not say where its base model is, in a folder a shell must quote."""
    folder = tmp_path_factory.mktemp("my banks") / "bank 'one'"
    save_bank(small_bank(), folder)
    return folder


def wanted(bank: Path, **said: Any) -> Wanted:
    nothing: dict[str, Any] = dict.fromkeys(("config", "host", "port", "dtype"))
    return Wanted(**{"bank": bank, "base": "org/tiny", "insecure": False, **nothing, **said})


def told(
    bank: Path, flags: Sequence[str] = (), variables: Mapping[str, str] | None = None, **said: Any
) -> dict[str, str]:
    """Flag -> value as vLLM takes them, a flag that stands there twice being an error here."""
    arguments = command(wanted(bank, **said), flags, variables or {})
    assert arguments[:3] == ["serve", said.get("base", "org/tiny"), "--enable-lora"]
    return pairs(arguments[3:])


def pairs(arguments: Sequence[str]) -> dict[str, str]:
    found: dict[str, str] = {}
    rest = list(arguments)
    while rest:
        name, equals, value = rest.pop(0).partition("=")
        name = name.replace("_", "-")
        assert name.startswith("-")
        assert name not in found
        if not equals:
            value = rest.pop(0) if rest and not rest[0].startswith("-") else ""
        found[name] = value
    return found


def additional(found: Mapping[str, str]) -> Any:
    return json.loads(found["--additional-config"])


def test_vllm_is_told_what_dynmerge_needs(bank: Path) -> None:
    found = told(bank)
    assert additional(found) == {"dynmerge": {"bank": str(bank)}}
    del found["--additional-config"]
    assert found == {
        "--host": "127.0.0.1",
        "--shutdown-timeout": "30",
        "--served-model-name": "tiny",
        "--max-loras": str(MAX_LORAS),
        "--max-cpu-loras": str(MAX_LORAS),
        "--max-lora-rank": "8",
        "--worker-extension-cls": CONTROL,
    }


def test_what_is_shown_is_split_back_by_a_shell(run: Run, bank: Path) -> None:
    flags = ["--max-loras", "4", "--additional-config", '{"it\'s": "$HOME `x`"}', "--enforce-eager"]
    code, out, err = run("serve", bank, "--engine", "vllm", "--show", *BASE, *flags)
    assert (code, err) == (0, "")
    assert out.count("\n") == 1
    words = shlex.split(out)
    assert words[:2] == ["VLLM_PLUGINS=dynmerge", "vllm"]
    assert words[2:] == command(wanted(bank), flags, {})
    config = additional(pairs(words[5:]))
    assert config == {"it's": "$HOME `x`", "dynmerge": {"bank": str(bank)}}


def test_a_folder_named_from_here_is_told_from_the_root(
    run: Run, bank: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(bank.parent)
    (bank.parent / "server.toml").write_text("allow_negative = true")
    words = ("serve", bank.name, "--engine", "vllm", "--show", *BASE, "--config", "server.toml")
    code, out, _ = run(*words)
    assert code == 0
    ours = {"bank": str(bank), "settings": str(bank.parent / "server.toml")}
    assert additional(pairs(shlex.split(out)[5:])) == {"dynmerge": ours}


def test_no_secret_is_shown(run: Run, bank: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DYNMERGE_API_KEY", "key-1")
    code, out, err = run("serve", bank, "--engine", "vllm", "--show", *BASE, "--host", "0.0.0.0")
    assert code == 0
    assert "--host 0.0.0.0" in out
    assert "key-1" not in out + err


def test_options_of_dynmerge_become_vllms(bank: Path) -> None:
    found = told(bank, base="/models/tiny", host="::1", port=0, dtype="bfloat16")
    assert (found["--host"], found["--port"], found["--dtype"]) == ("::1", "0", "bfloat16")


@pytest.mark.parametrize(
    "flags", [["--max-loras", "4"], ["--max-loras=4"], ["--max_loras", "4"], ["--max_loras=4"]]
)
def test_as_many_merges_as_the_user_says_however_it_is_spelled(
    bank: Path, flags: list[str]
) -> None:
    found = told(bank, flags)
    assert (found["--max-loras"], found["--max-cpu-loras"]) == ("4", "4")
    assert command(wanted(bank), flags, {})[-len(flags) :] == flags


@pytest.mark.parametrize(
    ("flags", "name", "value"),
    [
        (["--max-cpu-loras", "9000"], "--max-cpu-loras", "9000"),
        (["--max_lora_rank=64"], "--max-lora-rank", "64"),
        (["--worker-extension-cls", "mine.Control"], "--worker-extension-cls", "mine.Control"),
        (["--served_model_name=mine"], "--served-model-name", "mine"),
        (["--served-model-name", "mine"], "--served-model-name", "mine"),
        (["--tensor-parallel-size", "2"], "--tensor-parallel-size", "2"),
        (["-tp", "2"], "-tp", "2"),
        (["--enable-auto-tool-choice"], "--enable-auto-tool-choice", ""),
    ],
)
def test_what_the_user_says_to_vllm_wins_and_is_handed_on(
    bank: Path, flags: list[str], name: str, value: str
) -> None:
    assert told(bank, flags)[name] == value


@pytest.mark.parametrize("spelling", ["--additional-config", "--additional_config"])
@pytest.mark.parametrize("joined", [False, True])
def test_what_else_the_user_configures_is_kept_beside_the_bank(
    bank: Path, spelling: str, joined: bool
) -> None:
    text = json.dumps({"other": [1], "dynmerge": {"core_slots": 3, "trust_base": True}})
    flags = [f"{spelling}={text}"] if joined else [spelling, text]
    found = told(bank, ["--seed", "1", *flags, "--enforce-eager"])
    ours = {"bank": str(bank), "core_slots": 3, "trust_base": True}
    assert additional(found) == {"other": [1], "dynmerge": ours}
    assert found["--seed"] == "1"
    assert "--enforce-eager" in found


def test_a_dotted_setting_is_kept_beside_the_bank_or_refused(bank: Path) -> None:
    flags = ["--additional-config.dynmerge.core_slots", "3"]
    try:
        found = told(bank, flags)
    except ConfigError:
        return
    assert not any(name.startswith("--additional-config.") for name in found)
    assert additional(found) == {"dynmerge": {"bank": str(bank), "core_slots": 3}}


@pytest.mark.parametrize("text", ["{", "[]", "3", '"x"', '{"dynmerge": 3}', '{"dynmerge": []}'])
def test_an_additional_config_that_is_no_object_is_refused(bank: Path, text: str) -> None:
    with pytest.raises(ConfigError, match="--additional-config is a JSON object"):
        command(wanted(bank), ["--additional-config", text], {})


def test_the_base_model_is_the_one_named_here_then_in_the_file_then_in_the_bank(
    bank: Path, tmp_path: Path
) -> None:
    with pytest.raises(BaseModelError, match=r"where its base model tiny is: give --base"):
        command(wanted(bank, base=None), [], {})
    save_bank(small_bank(), tmp_path / "bank", source="from/bank")
    assert command(wanted(tmp_path / "bank", base=None), [], {})[1] == "from/bank"
    config = tmp_path / "server.toml"
    config.write_text('base = "from/file"')
    assert command(wanted(tmp_path / "bank", base=None, config=config), [], {})[1] == "from/file"
    assert command(wanted(tmp_path / "bank", config=config), [], {})[1] == "org/tiny"


def test_the_file_names_the_model_and_the_flag_must_not_say_otherwise(
    bank: Path, tmp_path: Path
) -> None:
    config = tmp_path / "server.toml"
    config.write_text('model_name = "mine"')
    assert told(bank, config=config)["--served-model-name"] == "mine"
    with pytest.raises(ConfigError, match="model_name is 'mine', but vLLM calls it 'other'"):
        told(bank, ["--served-model-name", "other"], config=config)


@pytest.mark.parametrize(
    ("line", "instead"),
    [
        ("port = 80", "--port"),
        ("cache_bytes = 1", "--max-loras"),
        ("[limits]\nn = 2", "--max-num-seqs"),
        ('[engine]\ndtype = "float32"', "--dtype"),
    ],
)
def test_a_setting_of_the_embedded_engine_is_refused_with_vllms_flag(
    run: Run, bank: Path, tmp_path: Path, line: str, instead: str
) -> None:
    (tmp_path / "server.toml").write_text(line)
    words = ("--engine", "vllm", "--show", *BASE, "--config", tmp_path / "server.toml")
    code, out, err = run("serve", bank, *words)
    assert (code, out) == (2, "")
    assert "is for the embedded engine; vLLM takes" in err
    assert instead in err


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.1", "example.org"])
def test_another_host_without_a_key_is_refused(run: Run, bank: Path, host: str) -> None:
    code, out, err = run("serve", bank, "--engine", "vllm", "--show", *BASE, "--host", host)
    assert (code, out) == (2, "")
    assert err.startswith(f"error: host {host} is reachable from other machines: give an API key")


def test_another_host_with_a_key_or_a_word_is_served(bank: Path) -> None:
    for flags, variables, insecure in (
        (["--api-key", "key-1"], {}, False),
        (["--api_key=key-1"], {}, False),
        ([], {"DYNMERGE_API_KEY": "key-1"}, False),
        ([], {"VLLM_API_KEY": "key-1"}, False),
        ([], {}, True),
    ):
        found = told(bank, flags, variables, host="0.0.0.0", insecure=insecure)
        assert found["--host"] == "0.0.0.0"
    with pytest.raises(ConfigError, match=r"host 0\.0\.0\.0 is reachable"):
        told(bank, [], {"DYNMERGE_API_KEY": "", "VLLM_API_KEY": ""}, host="0.0.0.0")


def test_vllm_has_our_plugin_beside_those_named_and_the_key(bank: Path) -> None:
    assert environment({}) == {"VLLM_PLUGINS": "dynmerge"}
    assert environment({"VLLM_PLUGINS": "one,two"}) == {"VLLM_PLUGINS": "one,two,dynmerge"}
    assert environment({"VLLM_PLUGINS": "dynmerge,one"}) == {"VLLM_PLUGINS": "dynmerge,one"}
    found = environment({"DYNMERGE_API_KEY": "key-1", "HOME": "/"})
    assert found == {"VLLM_PLUGINS": "dynmerge", "VLLM_API_KEY": "key-1"}


def test_the_extension_that_is_named_is_the_one_there_is() -> None:
    module, _, name = CONTROL.rpartition(".")
    assert module == "dynmerge.engines.vllm.control"
    assert name == "Control"
    if find_spec("vllm") is not None:
        assert getattr(import_module(module), name).__doc__


def test_a_value_a_shell_would_change_is_quoted() -> None:
    text = shown(["serve", "a b", "--x", "$y;'z'"], {"NAME": "one two"})
    assert shlex.split(text) == ["NAME=one two", "vllm", "serve", "a b", "--x", "$y;'z'"]


def test_a_device_is_vllms_to_choose(run: Run, bank: Path) -> None:
    code, out, err = run("serve", bank, "--engine", "vllm", "--show", *BASE, "--device", "cpu")
    assert (code, out) == (2, "")
    assert "vLLM chooses it by its platform" in err


@pytest.mark.parametrize("words", [["--max-loras", "4"], ["--show"], ["extra"]])
def test_the_embedded_engine_takes_none_of_vllms_flags(
    run: Run, bank: Path, words: list[str]
) -> None:
    code, out, err = run("serve", bank, *words)
    assert (code, out) == (2, "")
    assert f"{words[0]} is for --engine vllm" in err


def test_a_folder_that_is_no_bank_is_refused(run: Run, tmp_path: Path) -> None:
    code, out, err = run("serve", tmp_path, "--engine", "vllm", "--show", *BASE)
    assert (code, out) == (2, "")
    assert "is not a bank" in err


@pytest.mark.skipif(find_spec("vllm") is not None, reason="vLLM is installed here")
def test_without_vllm_it_says_how_to_get_it(run: Run, bank: Path) -> None:
    code, out, err = run("serve", bank, "--engine", "vllm", *BASE)
    assert (code, out) == (2, "")
    assert err == "error: vLLM is not installed here: pip install 'dynmerge[vllm]'\n"
