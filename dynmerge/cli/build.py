"""`dynmerge build`: adapters and the base model they were trained on -> a bank folder."""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path

import pydantic

from dynmerge.adapters.adapter import Adapter
from dynmerge.adapters.base_model import BaseModel
from dynmerge.adapters.checkpoint import fetch_adapter, load_adapter
from dynmerge.adapters.gate import CONFIG
from dynmerge.bank import manifest as manifests
from dynmerge.bank.bank import BaseIdentity, FactorBank
from dynmerge.bank.build import build_bank, check_names, with_soups
from dynmerge.bank.manifest import Manifest
from dynmerge.bank.storage import (
    carried_over,
    check_target,
    check_writable,
    locked,
    save_bank,
)
from dynmerge.cli.console import Step, line, note, progress_bar, table
from dynmerge.errors import AdapterError, BankError

_SOUPS = pydantic.TypeAdapter(dict[str, dict[str, float]])

# Copied from an adapter's own configuration, to be shown and nothing else.
SHOWN = ("r", "lora_alpha", "use_rslora", "target_modules", "peft_version")


def run(
    base: str,
    sources: Mapping[str, str],
    output: Path,
    *,
    trust_base: bool,
    replace: bool,
    soups: Path | None = None,
) -> None:
    """Build the bank and say what was built; the last line is its folder.

    Of a bank that it replaces the calibrations stay that hold for the new one's factors.
    """
    check_target(output, replace, option="--replace")
    if output.is_dir():
        check_writable(output)
    weights = None if soups is None else _soup_weights(soups)
    with progress_bar() as start:
        model = BaseModel.open(base)
        identity = BaseIdentity(model.name, model.fingerprint)
        check_names(identity, sources)
        folders = _fetch(sources)
        adapters = _load(sources, folders, model, start("reading adapters"), trust_base=trust_base)
        bank = build_bank(
            identity,
            adapters,
            provenance={name: provenance(sources[name], folders[name]) for name in sources},
            progress=start("sharing bases"),
        )
        if weights is not None:
            bank = with_soups(bank, weights)
        with locked(output) if output.is_dir() else nullcontext():
            bank, losses = _with_what_holds(bank, output)
            written = save_bank(bank, output, source=_lasting(base), replace=replace)
    for loss in losses:
        note(loss)
    _say(written)
    line(str(output))


def _with_what_holds(bank: FactorBank, output: Path) -> tuple[FactorBank, Sequence[str]]:
    """The bank with the calibrations in `output` that hold for it, and what is said of the rest."""
    if not (output / manifests.NAME).exists():
        return bank, ()
    try:
        bank, lost = carried_over(bank, output)
    except BankError as error:  # often why it is replaced
        return bank, [f"calibrations of the bank that was there, if any, are lost: {error}"]
    return bank, [f"the calibration for {method} is lost: {why}" for method, why in lost.items()]


def provenance(source: str, folder: Path) -> dict[str, object]:
    """What an adapter was given as, and what it says of itself."""
    stated = json.loads((folder / CONFIG).read_bytes())
    return {"source": source, **{key: stated[key] for key in SHOWN if stated.get(key) is not None}}


def _fetch(sources: Mapping[str, str]) -> dict[str, Path]:
    folders = {}
    for name, source in sources.items():
        with _blaming(name, source):
            folders[name] = fetch_adapter(source)
    return folders


def _load(
    sources: Mapping[str, str],
    folders: Mapping[str, Path],
    model: BaseModel,
    step: Step,
    *,
    trust_base: bool,
) -> dict[str, Adapter]:
    adapters = {}
    for done, (name, folder) in enumerate(folders.items(), start=1):
        with _blaming(name, sources[name]):
            adapters[name] = load_adapter(
                folder, model, trust_base=trust_base, option="--trust-base"
            )
        step(done, len(folders))
    return adapters


@contextmanager
def _blaming(name: str, source: str) -> Iterator[None]:
    """Put the option an adapter was given by before what is wrong with the adapter."""
    try:
        yield
    except AdapterError as reason:
        raise AdapterError(f"--adapter {name}={source}: {reason}") from reason


def _soup_weights(file: Path) -> Mapping[str, Mapping[str, float]]:
    """Layer -> skill -> weight, as a JSON file says it."""
    try:
        return _SOUPS.validate_json(file.read_bytes(), strict=True)
    except OSError as reason:
        raise BankError(f"--soup-weights {file}: {reason.strerror}") from reason
    except pydantic.ValidationError as reason:
        first = reason.errors(include_url=False, include_input=False)[0]
        place = ".".join(map(str, first["loc"])) or "it"
        raise BankError(f"--soup-weights {file}: {place}: {first['msg']}") from reason


def _lasting(base: str) -> str:
    """The base model's source so that it is found from any working directory."""
    folder = Path(base).expanduser()
    return str(folder.absolute()) if folder.is_dir() else base


def _say(written: Manifest) -> None:
    line(f"base    {written.base.name}, fingerprint {written.base.fingerprint[:12]}")
    line(f"digest  {written.digest[:12]}, {len(written.modules)} modules")
    if written.calibrations:
        kept = ", ".join(entry.method for entry in written.calibrations)
        line(f"keeps   what was learned for these factors: {kept}")
    line()
    table(
        ("skill", "rank", "modules", "source"),
        [
            (
                task.name,
                ", ".join(map(str, task.ranks)),
                sum(bool(module.ranks[index]) for module in written.modules),
                task.provenance["source"],
            )
            for index, task in enumerate(written.tasks)
        ],
    )
    line()
