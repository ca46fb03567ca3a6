"""A bank on disk: a folder of `bank.json` and the tensor files it names. Atomic; verified on load.

`bank.json` is the commit point. Tensor files are named by their content, so a new version's never
overwrite the old's; a new bank appears by renaming a finished sibling folder, a replaced one by
renaming `bank.json`. What is killed half-way leaves the old bank, or none, and at worst a hidden
`.NAME.*.partial` to delete.
"""

import errno
import fcntl
import hashlib
import os
import secrets
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, deserialize
from safetensors.torch import save
from torch import Tensor

from dynmerge.bank import manifest as manifests
from dynmerge.bank.bank import FactorBank, ModuleFactors, Task
from dynmerge.bank.calibration import Calibration
from dynmerge.bank.edit import with_calibration, without_calibration
from dynmerge.bank.manifest import (
    CalibrationEntry,
    CalibrationFile,
    FileEntry,
    Manifest,
    ModuleEntry,
)
from dynmerge.errors import BankError

Kind = TypeVar("Kind", bound=FileEntry)
SHARD_BYTES = 1 << 30  # a tensor file is read whole, to be hashed and used as the same bytes


def save_bank(
    bank: FactorBank, folder: Path, *, source: str | None = None, replace: bool = False
) -> Manifest:
    """Write `bank` to `folder`, whole or not at all. `source` is where its base model came from.

    An existing bank is refused, or with `replace` stays until the new one is complete, and what it
    carries goes with it: `carried_over` keeps that. Anything else at `folder` is refused. Raises
    BankError, also when the disk is full.
    """
    folder = Path(os.path.abspath(folder))  # noqa: PTH100 - resolve() would follow a link at `folder`
    check_target(folder, replace)
    with _staged(folder, f"cannot write the bank {folder}") as staging:
        files = tuple(_write(shard, staging, FileEntry) for shard in _shards(bank.modules))
        learned = tuple(_write_calibration(each, staging) for each in bank.calibrations)
        described = manifests.describe(bank, files, source, learned)
        _publish(described, staging, folder)
    return described


def add_calibration(folder: Path, calibration: Calibration) -> Manifest:
    """Make the bank in `folder` carry `calibration`, in place of the one for its method if any.

    The bank is read and verified first; its factor files stay as they are. Whole or not at all:
    the new version begins when `bank.json` is renamed. Waits for whoever holds `locked`. Raises
    BankError.
    """
    folder = edited_place(folder)
    with locked(folder):
        before = read_manifest(folder)
        bank = with_calibration(load_bank(folder), calibration)
        return _relearned(folder, before, bank, calibration)


def drop_calibration(folder: Path, method: str) -> Manifest:
    """Make the bank in `folder` no longer carry the calibration for `method`.

    As safe as `add_calibration`. Raises BankError, also where it carries none.
    """
    folder = edited_place(folder)
    with locked(folder):
        before = read_manifest(folder)
        return _relearned(folder, before, without_calibration(load_bank(folder), method))


def carried_over(bank: FactorBank, folder: Path) -> tuple[FactorBank, dict[str, str]]:
    """`bank` with the calibrations in `folder` that hold for its factors; the others, with reasons.

    Of what was learned for a method the bank's own comes first. To be asked under `locked`. Raises
    BankError where the bank in `folder` does not say what it carries.
    """
    lost: dict[str, str] = {}
    for entry in read_manifest(folder).calibrations:
        if entry.method in bank.calibrated:
            continue
        if entry.factors != bank.coordinates_digest:
            lost[entry.method] = "it was learned for other factors"
            continue
        try:
            bank = with_calibration(bank, _read_calibration(folder, entry, "cpu"))
        except BankError as error:
            lost[entry.method] = str(error)
    return bank, lost


def _relearned(
    folder: Path, before: Manifest, bank: FactorBank, new: Calibration | None = None
) -> Manifest:
    """Publish `bank`: the factors in `folder`, calibrations from there, and the one that is new."""
    kept = {entry.method: entry.file for entry in before.calibrations}
    with _staged(folder, f"cannot write to the bank {folder}") as staging:
        if new is not None:
            kept[new.method] = _write_calibration(new, staging)
        learned = tuple(kept[method] for method in bank.calibrated)
        described = manifests.describe(bank, before.files, before.base.source, learned)
        _publish(described, staging, folder)
    return described


@contextmanager
def _staged(folder: Path, complaint: str) -> Iterator[Path]:
    """A new folder beside `folder` to make a version in; what is left of it goes in the end."""
    staging = folder.with_name(f".{folder.name}.{secrets.token_hex(4)}.partial")
    try:
        staging.mkdir(parents=True)
        yield staging
    except (OSError, SafetensorError) as error:
        raise BankError(f"{complaint}: {_reason(error)}") from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep all others who ask for the lock from editing the bank in `folder` meanwhile.

    An edit begins with what is there: of two at once the later would undo the earlier, or name
    files that the earlier removed. Raises BankError where there is no folder.
    """
    try:
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    except FileNotFoundError:
        raise BankError(f"no bank at {folder}: there is no such folder") from None
    except OSError as error:
        raise BankError(f"cannot read {folder}: {_reason(error)}") from error
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def check_writable(folder: Path) -> None:
    """Raise BankError where the bank in `folder` cannot be edited: worth asking before long work.

    A new version is made beside the folder and renamed into it: that is tried, with an empty file.
    """
    folder = edited_place(folder)
    complaint = f"cannot write to the bank {folder}"
    for place in (folder, folder.parent):
        if not os.access(place, os.W_OK):
            raise BankError(f"{complaint}: {place} is not writable")
    with _staged(folder, complaint) as staging:
        probe = staging / staging.name
        probe.touch()
        probe.rename(folder / probe.name).unlink()


def edited_place(folder: Path) -> Path:
    """Where the bank in `folder` is, links followed: new versions are made beside that."""
    try:
        return Path(folder).resolve()
    except (OSError, RuntimeError) as error:  # RuntimeError: a loop of links, before Python 3.13
        raise BankError(f"cannot read {folder}: {_reason(error)}") from error


def load_bank(folder: Path, device: torch.device | str = "cpu") -> FactorBank:
    """Read and verify the bank in `folder`. Raises BankError naming what is wrong and where."""
    folder = Path(folder)
    described = read_manifest(folder)
    tensors: dict[str, Tensor] = {}
    for file in described.files:
        for name, tensor in _read_shard(folder, file, described.shapes()):
            if name in tensors:
                raise BankError(f"{folder / file.name}: {name} stands in two files")
            tensors[name] = tensor.to(device)
    for name in described.shapes():
        if name not in tensors:
            raise BankError(f"{folder}: no file holds the tensor {name}")
    bank = FactorBank(
        described.base.identity(),
        tuple(Task(task.name, task.digest, task.provenance) for task in described.tasks),
        tuple(_module(entry, tensors) for entry in described.modules),
        tuple(_read_calibration(folder, entry, device) for entry in described.calibrations),
    )
    if bank.digest != described.digest:
        raise BankError(f"{folder}: states the digest {described.digest}, has {bank.digest}")
    return bank


def read_manifest(folder: Path) -> Manifest:
    """What the bank in `folder` says of itself; its tensors are not read."""
    folder = Path(folder)
    path = folder / manifests.NAME
    try:
        if not folder.is_dir():
            raise BankError(f"no bank at {folder}: there is no such folder")
        if not path.exists():
            raise BankError(f"{folder} is not a bank: it has no {manifests.NAME}")
        path = _inside(folder, manifests.NAME)
        if path.stat().st_size > manifests.MAX_BYTES:
            raise BankError(f"{path} is over {manifests.MAX_BYTES} bytes: no bank is described so")
        return manifests.parse(path.read_bytes(), str(path))
    except OSError as error:
        raise BankError(f"cannot read {path}: {_reason(error)}") from error


def check_base(bank: FactorBank, fingerprint: str) -> None:
    """Raise BankError unless `bank` was built for the base model with this fingerprint."""
    if bank.base.fingerprint != fingerprint:
        raise BankError(
            f"this bank was built for another base model: for {bank.base.name} with fingerprint "
            f"{bank.base.fingerprint[:12]}, not {fingerprint[:12]}"
        )


def check_target(folder: Path, replace: bool, *, option: str = "replace=True") -> None:
    """Raise BankError unless `save_bank` may write to `folder`; worth asking before a build.

    `option` is how the caller's user says `replace`, for the error.
    """
    if not os.path.lexists(folder):
        return
    if folder.is_symlink() or not folder.is_dir():
        raise BankError(f"{folder} exists and is not a folder")
    try:
        holds_bank = (folder / manifests.NAME).exists()
        holds_other = not holds_bank and any(folder.iterdir())
    except OSError as error:
        raise BankError(f"cannot look into {folder}: {_reason(error)}") from error
    if holds_bank and not replace:
        raise BankError(f"{folder} already holds a bank; to replace it, say {option}")
    if holds_other:
        raise BankError(f"{folder} exists, is not empty and is not a bank: choose another folder")


def _module(entry: ModuleEntry, tensors: dict[str, Tensor]) -> ModuleFactors:
    U, V, left, right = (tensors[name] for name in entry.shapes())
    return ModuleFactors(entry.name, U, V, left, right, entry.ranks, entry.soup)


def _shards(modules: Sequence[ModuleFactors]) -> Iterator[dict[str, Tensor]]:
    """The bank's tensors on the CPU in float32, in parts of about SHARD_BYTES."""
    shard: dict[str, Tensor] = {}
    for module in modules:
        parts = {"U": module.U, "V": module.V, "left": module.left, "right": module.right}
        for label, tensor in parts.items():
            shard[f"{module.name}.{label}"] = tensor.to("cpu", torch.float32).contiguous()
        if sum(tensor.nbytes for tensor in shard.values()) >= SHARD_BYTES:
            yield shard
            shard = {}
    if shard:
        yield shard


def _write(tensors: dict[str, Tensor], staging: Path, kind: type[Kind]) -> Kind:
    # Not save_file: only the owner may read its files, and a bank is often served by another user.
    data = save(tensors)
    sha256 = hashlib.sha256(data).hexdigest()
    name = manifests.file_name(kind.KIND, sha256)
    (staging / name).write_bytes(data)
    return kind(name=name, size=len(data), sha256=sha256)


def _write_calibration(calibration: Calibration, staging: Path) -> CalibrationFile:
    tensors = {name: each.cpu().contiguous() for name, each in calibration.tensors.items()}
    return _write(tensors, staging, CalibrationFile)


def _read_calibration(
    folder: Path, entry: CalibrationEntry, device: torch.device | str
) -> Calibration:
    path = _inside(folder, entry.file.name)
    tensors = {}
    for name, fields in _verified(path, entry.file):
        if fields["dtype"] != "F32":
            raise BankError(f"{path}: {name[:200]!r} is {fields['dtype']}, not F32")
        # A bank of one skill has no pairs of skills: a table over them is empty.
        data = fields["data"]
        flat = torch.frombuffer(data, dtype=torch.float32) if data else torch.zeros(0)
        tensors[name] = flat.reshape(tuple(fields["shape"])).to(device)
    try:
        found = Calibration(entry.method, entry.form, entry.factors, tensors, entry.record)
    except BankError as error:
        raise BankError(f"{path}: {error}") from error
    if (found.digest, found.at) != (entry.digest, entry.at):
        raise BankError(f"{path} does not hold what bank.json says of it: their digests differ")
    return found


def _publish(described: Manifest, staging: Path, folder: Path) -> None:
    """Make what is in `staging` the bank at `folder`, in one step that has no middle.

    Files that it does not bring are those of the bank that is there.
    """
    (staging / manifests.NAME).write_bytes(described.sealed())
    for path in (*staging.iterdir(), staging):
        _sync(path)
    if not (folder / manifests.NAME).exists():
        staging.rename(folder)  # onto nothing, or an empty folder
        _sync(folder.parent)
        return
    for path in staging.glob("*.safetensors"):
        path.rename(folder / path.name)
    _sync(folder)
    (staging / manifests.NAME).rename(folder / manifests.NAME)
    _sync(folder)
    kept = described.file_names()
    for kind in (FileEntry.KIND, CalibrationFile.KIND):
        for path in folder.glob(f"{kind}-*.safetensors"):
            if path.name not in kept:
                path.unlink()


def _read_shard(
    folder: Path, file: FileEntry, shapes: dict[str, tuple[int, int]]
) -> Iterator[tuple[str, Tensor]]:
    """The tensors of one file, each of an expected name, shape, float32 and finite."""
    path = _inside(folder, file.name)
    for name, fields in _verified(path, file):
        if name not in shapes:
            raise BankError(f"{path}: holds a tensor {name[:200]!r} that bank.json does not name")
        if fields["dtype"] != "F32" or tuple(fields["shape"]) != shapes[name]:
            raise BankError(
                f"{path}: {name} is {fields['dtype']} {tuple(fields['shape'])}, "
                f"not F32 {shapes[name]}"
            )
        tensor = torch.frombuffer(fields["data"], dtype=torch.float32).reshape(shapes[name])
        if not torch.isfinite(tensor).all():
            raise BankError(f"{path}: {name} holds NaN or infinity")
        yield name, tensor


def _verified(path: Path, file: FileEntry) -> list[tuple[str, dict[str, Any]]]:
    """The file read once, so that what was hashed is what is used."""
    try:
        if (size := path.stat().st_size) != file.size:
            raise BankError(f"{path} is {size} bytes; bank.json says {file.size}")
        data = path.read_bytes()
    except OSError as error:
        raise BankError(f"cannot read {path}: {_reason(error)}") from error
    if (found := hashlib.sha256(data).hexdigest()) != file.sha256:
        raise BankError(f"{path} was changed: its sha256 is {found}, not {file.sha256}")
    try:
        return list(deserialize(data))  # type: ignore[no-untyped-call]
    except SafetensorError as error:
        raise BankError(f"{path} is not a safetensors file: {error}") from error


def _inside(folder: Path, name: str) -> Path:
    """`folder / name`, refused where it is no regular file or a link leads out of the folder."""
    path = folder / name
    try:
        if not path.resolve().is_relative_to(folder.resolve()):
            raise BankError(f"{path} is a link that leads out of the bank")
        if not path.is_file():
            raise BankError(f"{folder}: {name} is missing")
    except (OSError, RuntimeError) as error:  # RuntimeError: a loop of links, before Python 3.13
        raise BankError(f"cannot read {path}: {_reason(error)}") from error
    return path


def _sync(path: Path) -> None:
    """Flush a file or folder to the disk itself, so that a rename never outruns its content."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _reason(error: Exception) -> str:
    if isinstance(error, OSError) and error.errno == errno.EXDEV:
        return (
            "it is a mount point, and new versions are made beside it and renamed: keep the bank "
            "in a folder inside the mount"
        )
    return (error.strerror if isinstance(error, OSError) else None) or str(error)
