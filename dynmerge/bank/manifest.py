"""Manifest: what `bank.json` says. Untrusted text: sealed, typed and consistent, or refused.

The seal is a SHA-256 over the file's own bytes with the seal's 64 digits put to zero, and the
manifest holds the SHA-256 of every tensor file: no byte of a bank changes unnoticed. It guards
against accidents and partial copies, not against someone who can write the folder.
"""

import hashlib
import json
from datetime import datetime, timezone
from importlib.metadata import version
from typing import Annotated, ClassVar

import pydantic
from pydantic import Field, JsonValue

from dynmerge.bank.bank import FORMAT, BaseIdentity, FactorBank, distinct_ranks
from dynmerge.errors import BankError, PreferenceError
from dynmerge.preference import BASE, check_skill_name

NAME = "bank.json"
MAX_BYTES = 64 << 20
UNSEALED = "0" * 64

Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
ModuleName = Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]{1,512}$")]
FileName = Annotated[str, Field(pattern=r"^[a-z]+-[0-9a-f]{16}\.safetensors$")]
Size = Annotated[int, Field(ge=1)]
Rank = Annotated[int, Field(ge=0)]


class Entry(pydantic.BaseModel):
    """A JSON object with exactly the stated keys, each of exactly the stated type."""

    model_config = pydantic.ConfigDict(extra="forbid", frozen=True, strict=True)


class BaseEntry(Entry):
    """The base model; `source` is what it was given as when the bank was built."""

    name: str
    fingerprint: str
    source: str | None

    def identity(self) -> BaseIdentity:
        """As the bank holds it."""
        return BaseIdentity(self.name, self.fingerprint)


class TaskEntry(Entry):
    """One skill; `provenance` is for display only and decides nothing."""

    name: str
    digest: Digest
    ranks: tuple[Size, ...]  # distinct, ascending
    provenance: dict[str, JsonValue]

    @pydantic.field_validator("name")
    @classmethod
    def _is_a_skill(cls, name: str) -> str:
        try:
            check_skill_name(name)
        except PreferenceError as error:
            raise ValueError(str(error)) from None
        if name == BASE:
            raise ValueError(f"{BASE!r} names the base model, not a skill")
        return name


class ModuleEntry(Entry):
    """One linear layer: its size, the widths p and q of its bases, each task's rank."""

    name: ModuleName
    d_out: Size
    d_in: Size
    p: Size
    q: Size
    ranks: tuple[Rank, ...]
    soup: tuple[Annotated[float, Field(ge=0, allow_inf_nan=False)], ...] | None = None

    @pydantic.model_validator(mode="after")
    def _widths_fit(self) -> "ModuleEntry":
        stacked = sum(self.ranks)
        if self.p > min(self.d_out, stacked) or self.q > min(self.d_in, stacked):
            raise ValueError(
                f"{self.name}: bases of {self.p} and {self.q} columns do not fit ranks that sum to "
                f"{stacked} in a layer of {self.d_out} x {self.d_in}"
            )
        return self

    def shapes(self) -> dict[str, tuple[int, int]]:
        """Tensor name -> shape of the four tensors that make this module."""
        stacked = sum(self.ranks)
        return {
            f"{self.name}.U": (self.d_out, self.p),
            f"{self.name}.V": (self.d_in, self.q),
            f"{self.name}.left": (self.p, stacked),
            f"{self.name}.right": (stacked, self.q),
        }


class FileEntry(Entry):
    """A tensor file beside the manifest, named by its own SHA-256."""

    KIND: ClassVar[str] = "factors"

    name: FileName
    size: Size
    sha256: Digest

    @pydantic.model_validator(mode="after")
    def _named_by_content(self) -> "FileEntry":
        if self.name != file_name(self.KIND, self.sha256):
            raise ValueError(f"{self.name} is not named by its sha256, {self.sha256}")
        return self


class CalibrationFile(FileEntry):
    """The file of one calibration's tensors."""

    KIND: ClassVar[str] = "calibration"


class CalibrationEntry(Entry):
    """What was learned for one method; `record` is for people and decides nothing.

    `digest` is over the tensors' names, shapes and bytes too. `at` is the only preference that it
    serves, by task.
    """

    method: str
    form: str
    factors: Digest
    digest: Digest
    at: tuple[Annotated[float, Field(ge=0, le=1)], ...] | None
    record: dict[str, JsonValue]
    file: CalibrationFile


class Manifest(Entry):
    """All of `bank.json`."""

    manifest_sha256: Digest
    format: int
    dynmerge: str
    created: str
    digest: Digest
    base: BaseEntry
    tasks: Annotated[tuple[TaskEntry, ...], Field(min_length=1)]
    modules: Annotated[tuple[ModuleEntry, ...], Field(min_length=1)]
    files: Annotated[tuple[FileEntry, ...], Field(min_length=1)]
    calibrations: tuple[CalibrationEntry, ...] = ()

    @pydantic.model_validator(mode="after")
    def _is_consistent(self) -> "Manifest":
        for what, names in (
            ("task", [task.name for task in self.tasks]),
            ("module", [module.name for module in self.modules]),
            ("file", [file.name for file in self.files]),
            ("calibration", [entry.method for entry in self.calibrations]),
        ):
            if len(set(names)) != len(names):
                raise ValueError(f"a {what} stands there twice")
        for module in self.modules:
            if len(module.ranks) != len(self.tasks):
                raise ValueError(
                    f"{module.name} has {len(module.ranks)} ranks for {len(self.tasks)} tasks"
                )
            if module.soup is not None and len(module.soup) != len(self.tasks):
                raise ValueError(f"{module.name} has {len(module.soup)} soup weights")
        for entry in self.calibrations:
            if entry.at is not None and len(entry.at) != len(self.tasks):
                raise ValueError(f"the calibration for {entry.method} is at {len(entry.at)} shares")
        found = distinct_ranks([module.ranks for module in self.modules])
        for task, ranks in zip(self.tasks, found, strict=True):
            if task.ranks != ranks:
                raise ValueError(f"task {task.name} states ranks {task.ranks}, has {ranks}")
        return self

    def shapes(self) -> dict[str, tuple[int, int]]:
        """Tensor name -> shape of every tensor the files must hold, and nothing else."""
        return {name: shape for module in self.modules for name, shape in module.shapes().items()}

    def file_names(self) -> set[str]:
        """Every tensor file that belongs to the bank."""
        calibrations = (entry.file for entry in self.calibrations)
        return {file.name for file in (*self.files, *calibrations)}

    def sealed(self) -> bytes:
        """The text of `bank.json`."""
        unsealed = self.model_copy(update={"manifest_sha256": UNSEALED}).model_dump(mode="json")
        if not self.calibrations:  # readers older than calibrations take no key they do not know
            del unsealed["calibrations"]
        text = json.dumps(unsealed, indent=1) + "\n"
        seal = hashlib.sha256(text.encode()).hexdigest()
        return text.replace(UNSEALED, seal, 1).encode()


def describe(
    bank: FactorBank,
    files: tuple[FileEntry, ...],
    source: str | None,
    calibrations: tuple[CalibrationFile, ...] = (),
) -> Manifest:
    """The manifest of `bank` in `files`, and a file for each calibration in the bank's order.

    Raises BankError where it could not be read back.
    """
    fields = {
        "manifest_sha256": UNSEALED,
        "format": FORMAT,
        "dynmerge": version("dynmerge"),
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "digest": bank.digest,
        "base": {
            "name": bank.base.name,
            "fingerprint": bank.base.fingerprint,
            "source": source,
        },
        "tasks": [
            {
                "name": task.name,
                "digest": task.digest,
                "ranks": ranks,
                "provenance": dict(task.provenance),
            }
            for task, ranks in zip(bank.tasks, bank.ranks, strict=True)
        ],
        "modules": [
            {
                "name": module.name,
                "d_out": module.U.shape[0],
                "d_in": module.V.shape[0],
                "p": module.U.shape[1],
                "q": module.V.shape[1],
                "ranks": module.ranks,
                "soup": module.soup,
            }
            for module in bank.modules
        ],
        "files": [file.model_dump() for file in files],
        "calibrations": [
            {
                "method": each.method,
                "form": each.form,
                "factors": each.factors,
                "digest": each.digest,
                "at": each.at,
                "record": dict(each.record),
                "file": file.model_dump(),
            }
            for each, file in zip(bank.calibrations, calibrations, strict=True)
        ],
    }
    try:
        return Manifest.model_validate_json(json.dumps(fields, allow_nan=False))
    except pydantic.ValidationError as error:
        raise BankError(f"this bank cannot be written: {_first(error)}") from None
    except (TypeError, ValueError) as error:
        raise BankError(f"this bank cannot be written: {error}") from None


def parse(data: bytes, source: str) -> Manifest:
    """Read the bytes of a `bank.json`; `source` names it in errors. Raises BankError."""
    try:
        fields = json.loads(data)
    except (ValueError, RecursionError):
        raise BankError(f"{source} is not JSON: truncated, edited, or no bank") from None
    if not isinstance(fields, dict) or not isinstance(fields.get("format"), int):
        raise BankError(f"{source} is not the description of a dynmerge bank")
    if fields["format"] != FORMAT:
        raise BankError(
            f"{source} has format {fields['format']}; this dynmerge ({version('dynmerge')}) reads "
            f"format {FORMAT}. Build the bank again"
        )
    seal = str(fields.get("manifest_sha256"))
    unsealed = data.replace(seal.encode("utf-8", "replace"), UNSEALED.encode(), 1)
    if hashlib.sha256(unsealed).hexdigest() != seal:
        raise BankError(f"{source} was changed after it was written: its manifest_sha256 disagrees")
    try:
        return Manifest.model_validate_json(data)
    except pydantic.ValidationError as error:
        raise BankError(f"{source}: {_first(error)}") from None


def file_name(kind: str, sha256: str) -> str:
    """The name of a tensor file of this kind whose content has this SHA-256."""
    return f"{kind}-{sha256[:16]}.safetensors"


def _first(error: pydantic.ValidationError) -> str:
    """The first complaint in one line: where it stands, and what is wrong there."""
    details = error.errors(include_url=False, include_context=False, include_input=False)[0]
    place = ".".join(str(part)[:80] for part in details["loc"])
    return f"{place}: {details['msg']}" if place else details["msg"]
