"""Tenancy: what vLLM's model runner asks of its LoRA manager, answered for merges.

A request names its merge by a LoRARequest whose path is a ticket. The merge gets a row in a table
of its form, made here and now where that takes microseconds, and the step's tokens are pointed at
their rows. No files, no copies of weights.
"""

import hashlib
import logging
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dynmerge.adapters.base_model import FILES, fingerprint
from dynmerge.adapters.hub import locate
from dynmerge.bank.bank import FactorBank
from dynmerge.bank.outline import Outline
from dynmerge.bank.storage import check_base, load_bank
from dynmerge.engines.vllm.assembly import READY, Assembly, Order, Status, failed
from dynmerge.engines.vllm.config import PluginConfig
from dynmerge.engines.vllm.forms import FORMS, Form, form_of
from dynmerge.engines.vllm.layers import Layers, check_config
from dynmerge.engines.vllm.logs import speak_as_vllm
from dynmerge.engines.vllm.residents import ResidentBank, widths_of
from dynmerge.engines.vllm.ticket import recipe_of
from dynmerge.engines.vllm.updates import Step, Table, Update, tables_of
from dynmerge.errors import BankError, BaseModelError, DynmergeError
from dynmerge.merging.lane import lane
from dynmerge.merging.merge import Merge
from dynmerge.recipe import Recipe

COMPILED = "dynmerge-layers"  # in vLLM's additional configuration

logger = logging.getLogger("dynmerge.vllm")


class Tenancy:
    """The merges on one rank, by vLLM's number, and the versions of the bank they are of."""

    def __init__(
        self,
        config: PluginConfig,
        vllm_config: Any,
        device: torch.device,
        embedding_modules: object = None,
    ) -> None:
        speak_as_vllm()
        self.config = config
        self.device = device
        self._lora_config = vllm_config.lora_config
        check_config(vllm_config)
        tokens = vllm_config.scheduler_config.max_num_batched_tokens
        self.step = Step(_is_static(config, vllm_config, device), tokens, device)
        self.tables: dict[str, Mapping[Form, Table]] = {}  # by the bank's digest
        self._spare: list[Mapping[Form, Table]] = []  # allocated, with no bank in them
        self._dummies: set[int] = set()
        self._held: dict[int, frozenset[str]] = {}  # by client process
        self._loading: dict[str, Order] = {}
        self._loader: ThreadPoolExecutor = lane("dynmerge-loading")

    # What the runner calls.

    def create_lora_manager(self, model: nn.Module, vllm_config: Any) -> nn.Module:
        """Put the bank on this rank, and updates on the model's layers. Raises BankError."""
        bank = load_bank(self.config.bank)
        if not self.config.trust_base:
            check_base(bank, _fingerprint(vllm_config.model_config))
        outline = Outline.of_bank(bank)
        self._layers = Layers(model, self._lora_config)
        self.slots = self.config.slots(outline, self._dtype.itemsize, self._lora_config.max_loras)
        # Some are made for clients that leave before their request runs.
        self._assembly = Assembly(2 * (self.slots.core + self.slots.own), self.device)
        if self.step.static:
            self._spare = [tables_of(self._room(bank)) for _ in range(self.config.versions)]
            for tables in self._spare:
                self.step.include(tables.values())
            _mark_compiled(vllm_config, outline)
        self._admit(self._loaded(bank))
        logger.info("%s", self._told())
        return model

    def set_active_adapters(self, requests: set[Any], mapping: Any | None) -> None:
        """Make every request's merge resident, and point the next step's tokens at the rows."""
        busy = {request.lora_int_id for request in requests}
        for request in requests:
            self._settle(request, busy)
        if mapping is not None:
            self.step.plan(mapping.index_mapping)

    def add_adapter(self, lora_request: Any) -> bool:
        """Make one merge resident ahead of its step."""
        self._settle(lora_request, {lora_request.lora_int_id})
        return True

    def remove_adapter(self, adapter_id: int) -> bool:
        """Forget a merge; its row is free."""
        place = self.step.places.pop(adapter_id, None)
        return place is not None and place[0].rows.drop(adapter_id)

    def remove_all_adapters(self) -> None:
        """Forget what warmed up. vLLM says this after every such run, also between requests."""
        for number in self._dummies:
            self.step.places.pop(number, None)
        self._dummies.clear()

    def list_adapters(self) -> set[int]:
        """The numbers of resident merges."""
        return set(self.step.places)

    def pin_adapter(self, adapter_id: int) -> bool:
        """Not offered: what is in use is never evicted."""
        raise DynmergeError("merges cannot be pinned: one that is in use is never evicted")

    def supports_tower_connector_lora(self) -> bool:
        """Only the language model is changed."""
        return False

    def get_dummy_lora_warmup_rank(self, default_rank: int) -> int:
        """Of no consequence here."""
        return default_rank

    @contextmanager
    def dummy_lora_cache(self) -> Iterator[None]:
        """Nothing is made for a dummy, so nothing is cached."""
        yield

    def add_dummy_lora(self, lora_request: Any, rank: int) -> bool:
        """A merge for warming up: a row, whatever is in it."""
        self._dummies.add(lora_request.lora_int_id)
        return True

    # What the control plane calls (`control.py`).

    def prepare(self, text: str, gone: Sequence[str]) -> Status:
        """Make the merge of a ticket beside the step loop, or say how far it is.

        `gone` are merges that the client has given up: their rows are the next to be taken.
        """
        for tables in self.tables.values():
            for name in gone:
                tables["core"].rows.release(name)
                tables["own"].rows.release(name)
        recipe = recipe_of(text)
        found = self.tables.get(recipe.bank)
        if found is None:
            return failed(f"the bank {recipe.bank[:12]} is not resident")
        table = found[form_of(recipe.method)]
        if table.form == "diagonal":
            return READY
        row = table.rows.row_of(recipe.digest)
        if row is not None:
            return table.bank.status[table.form, row]
        return self._assembly.prepare(recipe, table.bank.merger)

    def load(self, folder: Path, digest: str) -> Status:
        """Make another version of the bank resident, or say how far it is."""
        if digest in self.tables:
            return READY
        order = self._loading.get(digest)
        if order is None:
            order = self._loading[digest] = Order(self._loader.submit(self._read, folder, digest))
        status = order.status()
        if status["state"] == "ready":
            try:
                self._admit(order.future.result())
            except DynmergeError as error:
                status = failed(str(error))
        if status["state"] != "pending":
            del self._loading[digest]
        return status

    def hold(self, client: int, digests: frozenset[str]) -> None:
        """The versions that a client process may still send requests for; others may go."""
        self._held[client] = digests
        held = frozenset().union(*self._held.values())
        for digest in [each for each in self.tables if each not in held]:
            if len(self.tables) > 1:
                self._drop(digest)
        for digest in [each for each in self._loading if each not in held]:
            self._give_up(self._loading.pop(digest))

    def stats(self) -> dict[str, Any]:
        """What is resident and what it took."""
        return {
            "slots": {
                form: [sum(len(t[form].rows) for t in self.tables.values()), self.slots.of(form)]
                for form in FORMS
            },
            "merges": self._assembly.made,
            "seconds": self._assembly.seconds,
            "banks": list(self.tables),
            "bytes": sum(t["diagonal"].bank.nbytes for t in self.tables.values()),
        }

    # How it is done.

    @property
    def _dtype(self) -> torch.dtype:
        dtype = self._lora_config.lora_dtype
        assert isinstance(dtype, torch.dtype)
        return dtype

    def _settle(self, request: Any, busy: set[int]) -> None:
        """Make sure that a request's merge has a row."""
        number, name = request.lora_int_id, request.lora_name
        if number in self._dummies:
            self._settle_dummy(number)
            return
        place = self.step.places.get(number)
        if place is not None and place[0].rows.find(number, name) is not None:
            return
        self.remove_adapter(number)
        recipe = recipe_of(request.lora_path)
        if recipe.digest != name:
            raise DynmergeError(f"the ticket of {name} is for {recipe.digest}")
        tables = self.tables.get(recipe.bank)
        if tables is None:
            raise BankError(f"the bank {recipe.bank[:12]} of merge {name} is not resident")
        table = tables[form_of(recipe.method)]
        merge = self._assembled(recipe, table)
        row, evicted = table.rows.take(number, name, busy)
        if evicted is not None:
            del self.step.places[evicted]
        if merge is None:
            table.bank.write_diagonal(row, recipe)
        else:
            table.bank.write(table.form, row, merge)
        self.step.places[number] = (table, row)

    def _assembled(self, recipe: Recipe, table: Table) -> Merge | None:
        """The merge, where it takes more than a row of weights."""
        if table.form == "diagonal":
            return None
        return self._assembly.take(recipe, table.bank.merger)

    def _settle_dummy(self, number: int) -> None:
        """Any row will do, of every form in turn, so that all that can run has run."""
        tables = [t for t in next(iter(self.tables.values())).values() if t.rows.count]
        table = tables[number % len(tables)]
        self.step.places[number] = (table, number % table.rows.count)

    def _read(self, folder: Path, digest: str) -> Mapping[Form, Table]:
        """Another version, from disk: for the same base model, and the one that was meant."""
        bank = load_bank(folder)
        if bank.digest != digest:
            raise BankError(f"{folder} holds {bank.digest[:12]}, not {digest[:12]}, by now")
        if bank.base.fingerprint != self._base:
            raise BankError(f"{folder} was built for another base model: {bank.base.name}")
        return self._loaded(bank)

    def _loaded(self, bank: FactorBank) -> Mapping[Form, Table]:
        """A bank in memory of its own, or in what was set aside for a version."""
        if len(self.tables) >= self.config.versions or (self.step.static and not self._spare):
            raise BankError(
                f"{self.config.versions} versions of the bank are in use, which is all this "
                "server keeps: try again when requests on the oldest have ended"
            )
        if not self.step.static:
            room = self._room(bank)
            room.load(bank)
            return tables_of(room)
        tables = self._spare[-1]
        self._check_layers(bank, tables["diagonal"].bank)
        self._settle_device()  # steps that were queued before may still read it
        tables["diagonal"].bank.load(bank)
        self._settle_device()
        self._spare.pop()
        return tables

    def _check_layers(self, bank: FactorBank, room: ResidentBank) -> None:
        """Raise BankError on layers for which nothing was set aside."""
        there = {layer.name for layer in room.layers}
        for layer in self._layers.of(Outline.of_bank(bank)):
            if layer.name not in there:
                raise BankError(
                    f"no skill changed {layer.name} when this server started, which set nothing "
                    "aside for it: start it again with this bank"
                )

    def _settle_device(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def _room(self, bank: FactorBank) -> ResidentBank:
        layers = self._layers.of(Outline.of_bank(bank))
        spare = self.config.spare_rank if self.step.static else 0
        widths = widths_of(bank, layers, self.slots.own_rank, spare)
        return ResidentBank(layers, widths, self.slots, self._dtype, self.device)

    def _admit(self, tables: Mapping[Form, Table]) -> None:
        """Serve a version from the next step on."""
        bank = tables["diagonal"].bank
        for layer in bank.layers:
            if layer.wrapped.add is None:
                layer.wrapped.add = Update(layer, self.step)
        self.tables[bank.digest] = tables
        self._base = bank.base

    def _drop(self, digest: str) -> None:
        tables = self.tables.pop(digest)
        gone = set(tables.values())
        places = self.step.places
        for number in [each for each, (table, _) in places.items() if table in gone]:
            del places[number]
        self._free(tables)

    def _give_up(self, order: Order) -> None:
        """A version was loaded, or is being, that nobody wants any more."""

        def loaded(future: "Future[Mapping[Form, Table]]") -> None:
            if not future.cancelled() and future.exception() is None:
                self._free(future.result())

        if not order.future.cancel():
            order.future.add_done_callback(loaded)

    def _free(self, tables: Mapping[Form, Table]) -> None:
        if self.step.static:
            self._spare.append(tables)

    def _told(self) -> str:
        slots = self.slots
        return (
            f"dynmerge: bank {next(iter(self.tables))[:12]}, slots: {slots.diagonal} diagonal, "
            f"{slots.core} core, {slots.own} own of rank {slots.own_rank}; "
            f"{self.stats()['bytes'] / 2**20:.0f} MiB on this rank"
        )


def _is_static(config: PluginConfig, vllm_config: Any, device: torch.device) -> bool:
    """Whether a compiler or a graph may record what a step does."""
    if config.static is not None:
        return config.static
    return device.type != "cpu" and not vllm_config.model_config.enforce_eager


def _mark_compiled(vllm_config: Any, outline: Outline) -> None:
    """Tell vLLM's compile cache which layers have updates: a graph has them at these, by number."""
    names = "\n".join(module.name for module in outline.modules)
    digest = hashlib.sha256(names.encode()).hexdigest()
    vllm_config.additional_config = {**vllm_config.additional_config, COMPILED: digest}


def _fingerprint(model_config: Any) -> str:
    """The base model's, from the files vLLM has loaded."""
    try:
        source, revision = model_config.model, model_config.revision
        return fingerprint(locate(source, FILES, revision=revision, error=BaseModelError))
    except BaseModelError as error:
        raise BankError(
            f"cannot compare the bank's base model with {model_config.model}: {error}; "
            "if they are the same, say trust_base"
        ) from error
