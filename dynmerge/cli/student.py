"""The base model of a bank, loaded and ready to carry its merges: for commands that read texts."""

from collections.abc import Collection, Sequence
from pathlib import Path

from dynmerge.adapters.base_model import BaseModel
from dynmerge.bank.bank import FactorBank
from dynmerge.bank.storage import check_base, read_manifest
from dynmerge.engines.transformers.config import EngineConfig
from dynmerge.engines.transformers.model import LoadedModel, load_base_model
from dynmerge.errors import BaseModelError, ConfigError, ExamplesError
from dynmerge.student import Student
from dynmerge.texts.language import examples_of
from dynmerge.texts.passages import Passages
from dynmerge.texts.rows import Row


def open_student(folder: Path, bank: FactorBank, base: str | None) -> tuple[Student, LoadedModel]:
    """The bank in `folder` on its base model, or on `base`, a folder or a hub id.

    Raises BaseModelError for a model that cannot be had and BankError for another one.
    """
    manifest = read_manifest(folder)
    source = base or manifest.base.source
    if source is None:
        raise BaseModelError(
            f"the bank does not say where its base model {manifest.base.name} is: give --base"
        )
    found = BaseModel.open(source)
    check_base(bank, found.fingerprint)
    loaded = load_base_model(found.folder, EngineConfig())
    return Student(loaded.model, bank), loaded


def examples_for(
    loaded: LoadedModel, skill: str, rows: Sequence[Row], labels: Sequence[str] | None = None
) -> Passages:
    """The examples of `skill`, which errors name."""
    try:
        return examples_of(loaded.model, loaded.tokenizer, rows, labels)
    except ExamplesError as error:
        raise ExamplesError(f"{skill}: {error}") from error


def check_skills(bank: FactorBank, named: Collection[str], *, source: str) -> None:
    """Raise ConfigError unless `named` are the bank's skills, every one."""
    for name in named:
        if name not in bank.names:
            raise ConfigError(f"{source}: no skill named {name!r} (known: {', '.join(bank.names)})")
    missing = [name for name in bank.names if name not in named]
    if missing:
        raise ConfigError(f"{source}: nothing for the skill {missing[0]!r}; every skill needs some")
