"""What the endpoint plugin refuses before it serves, with vLLM's own configuration objects."""

from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest

from dynmerge.engines.vllm.config import CONTROL
from dynmerge.errors import ConfigError
from dynmerge_server.vllm.plugin import Plugin, make
from tests.server.vllm.stand_ins import EchoClient

# vLLM and what it imports warn of their own dependencies.
pytestmark = [pytest.mark.vllm, pytest.mark.filterwarnings("ignore")]

pytest.importorskip("vllm", reason="vLLM is not installed")


def configured(base: Path, bank: Path | None, **more: Any) -> tuple[EchoClient, Namespace]:
    from vllm.engine.arg_utils import AsyncEngineArgs

    given: dict[str, Any] = {"enable_lora": True, "max_loras": 2, "worker_extension_cls": CONTROL}
    if bank is not None:
        given["additional_config"] = {"dynmerge": {"bank": str(bank)}}
    engine_args = AsyncEngineArgs(model=str(base), max_model_len=256, **{**given, **more})
    client = EchoClient()
    client.vllm_config = engine_args.create_engine_config()
    return client, Namespace(root_path=None, lora_modules=None, api_key=None)


REFUSALS: dict[str, tuple[dict[str, Any], str]] = {
    "no bank": ({"additional_config": {}}, "--additional-config"),
    "an unknown setting": ({"additional_config": {"dynmerge": {"bonk": 1}}}, "bonk"),
    "no LoRA": ({"enable_lora": False}, "--enable-lora"),
    "no control": ({"worker_extension_cls": ""}, f"--worker-extension-cls {CONTROL}"),
}


@pytest.mark.parametrize("kind", REFUSALS)
async def test_what_could_not_serve_merges_does_not_start(
    base_folder: Path, bank_folder: Path, kind: str
) -> None:
    more, says = REFUSALS[kind]
    client, args = configured(base_folder, bank_folder, **more)
    with pytest.raises(ConfigError, match=says):
        await Plugin().init_state(client, Namespace(), args)


async def test_vllms_own_adapters_are_refused(
    base_folder: Path, bank_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    client, args = configured(base_folder, bank_folder)
    args.lora_modules = ["x=y"]
    with pytest.raises(ConfigError, match="--lora-modules"):
        await Plugin().init_state(client, Namespace(), args)
    args.lora_modules = None
    monkeypatch.setenv("VLLM_ALLOW_RUNTIME_LORA_UPDATING", "1")
    with pytest.raises(ConfigError, match="VLLM_ALLOW_RUNTIME_LORA_UPDATING"):
        await Plugin().init_state(client, Namespace(), args)


@pytest.mark.parametrize("root", ["/", "/v", "/v1", "models", "/models/"])
async def test_a_root_that_opens_vllms_own_door_is_refused(
    base_folder: Path, bank_folder: Path, root: str
) -> None:
    client, args = configured(base_folder, bank_folder)
    args.root_path = root
    with pytest.raises(ConfigError, match="--root-path"):
        await Plugin().init_state(client, Namespace(), args)


def test_it_is_what_vllm_takes_for_an_endpoint_plugin() -> None:
    from vllm.plugins.endpoint_plugins.interface import EndpointPlugin

    assert isinstance(make(), EndpointPlugin)
