"""Skills: put one into the bank that is served, or take one out, from adapters under one folder."""

import asyncio
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from dynmerge.adapters.base_model import BaseModel
from dynmerge.adapters.checkpoint import load_adapter
from dynmerge.bank.bank import FactorBank
from dynmerge.bank.edit import with_adapter, without
from dynmerge.bank.outline import Outline
from dynmerge.bank.storage import check_base, load_bank, locked, read_manifest, save_bank
from dynmerge.errors import AdapterError, BankError, ConfigError, RequestError, UnknownModel
from dynmerge_server.vllm.versions import Versions


class Skills:
    """Edits one bank folder, one edit after the other; every API process then sees the new one."""

    def __init__(
        self, versions: Versions, root: Path, base: Callable[[], BaseModel], *, trust_base: bool
    ) -> None:
        """`root` holds the adapters that may be loaded; `base` opens the base model."""
        self._versions = versions
        self._root = root
        self._base = base
        self._trust_base = trust_base
        self._editing = asyncio.Lock()

    async def load(self, name: str, path: str, *, replace: bool) -> None:
        """Serve the adapter at `path` as skill `name`.

        Raises RequestError where the name is taken or does not fit, AdapterError or BankError.
        """

        def edited(bank: FactorBank) -> FactorBank:
            if name in bank.names and not replace:
                raise RequestError(
                    f"there is a skill {name!r} already; load_inplace replaces it", "lora_name"
                )
            base = self._base()
            if not self._trust_base:
                check_base(bank, base.fingerprint)
            adapter = load_adapter(self._inside(path), base, trust_base=self._trust_base)
            return with_adapter(bank, name, adapter, {"source": Path(path).name})

        await self._edit(edited)

    async def unload(self, name: str) -> None:
        """Serve without the skill `name`. Raises UnknownModel, RequestError or BankError."""

        def edited(bank: FactorBank) -> FactorBank:
            if name not in bank.names:
                known = ", ".join(bank.names)
                raise UnknownModel(f"there is no skill {name!r} (known: {known})", "lora_name")
            return without(bank, name)

        await self._edit(edited)

    async def _edit(self, edited: Callable[[FactorBank], FactorBank]) -> None:
        async with self._editing:
            await asyncio.to_thread(self._replace, edited)
            await self._versions.reload()

    def _replace(self, edited: Callable[[FactorBank], FactorBank]) -> None:
        folder = self._versions.folder
        with locked(folder):
            source = read_manifest(folder).base.source
            bank = load_bank(folder)
            try:
                bank = edited(bank)
                self._versions.offer(Outline.of_bank(bank))
            except (BankError, ConfigError) as error:  # such as a preset that names what would go
                raise RequestError(str(error), "lora_name") from error
            save_bank(bank, folder, source=source, replace=True)

    def _inside(self, path: str) -> Path:
        """The adapter's folder, once nothing in it leads out of the root."""
        root = self._root.resolve()
        folder = root
        with suppress(ValueError):  # a null byte
            folder = (root / path).resolve()
        if folder == root or not folder.is_relative_to(root) or not folder.is_dir():
            raise AdapterError("lora_path is no folder within adapter_root")
        for each in folder.iterdir():
            if not each.resolve().is_relative_to(root):
                raise AdapterError(f"{each.name} in lora_path is a link that leads out")
        return folder
