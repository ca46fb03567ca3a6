import errno
import hashlib
import json
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save, save_file

from dynmerge.bank import storage
from dynmerge.bank.bank import ModuleFactors
from dynmerge.bank.build import build_bank, with_soups
from dynmerge.bank.calibration import Calibration
from dynmerge.bank.edit import with_calibration
from dynmerge.bank.storage import (
    add_calibration,
    carried_over,
    check_base,
    check_target,
    check_writable,
    drop_calibration,
    load_bank,
    read_manifest,
    save_bank,
)
from dynmerge.errors import BankError
from tests.bank_factory import (
    BASE,
    RANKS,
    flat_cores,
    random_adapter,
    random_adapters,
    random_bank,
    random_calibration,
)

BANK = build_bank(
    BASE, random_adapters(), provenance={"ada": {"source": "org/ada", "target_modules": ["q"]}}
)
OTHER = random_bank({"eve": random_adapter(RANKS["bob"], 7)})
Fields = dict[str, Any]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_bank(BANK, tmp_path / "bank", source="org/base")
    return tmp_path / "bank"


def edit(folder: Path, change: Callable[[Fields], None]) -> None:
    """Change bank.json as someone would who also knows how to seal it."""
    fields = json.loads((folder / "bank.json").read_text())
    change(fields)
    fields["manifest_sha256"] = "0" * 64
    text = json.dumps(fields)
    seal = hashlib.sha256(text.encode()).hexdigest()
    (folder / "bank.json").write_text(text.replace("0" * 64, seal, 1))


def rewrite(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    """Change the tensors as someone would who also renews every checksum."""
    (file,) = folder.glob("factors-*")
    tensors = load_file(file)
    file.unlink()
    change(tensors)
    save_file(tensors, file)
    data = file.read_bytes()
    sha256 = hashlib.sha256(data).hexdigest()
    name = f"factors-{sha256[:16]}.safetensors"
    file.rename(folder / name)
    edit(folder, lambda fields: fields.update(files=[entry(name, len(data), sha256)]))


def entry(name: str, size: int, sha256: str) -> Fields:
    return {"name": name, "size": size, "sha256": sha256}


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_bank_comes_back_as_it_was(folder: Path) -> None:
    loaded = load_bank(folder)
    assert loaded.digest == BANK.digest
    assert (loaded.base, loaded.tasks) == (BANK.base, BANK.tasks)
    assert torch.equal(flat_cores(loaded), flat_cores(BANK))
    for found, expected in zip(loaded.modules, BANK.modules, strict=True):
        assert (found.name, found.ranks) == (expected.name, expected.ranks)
        assert torch.equal(found.U, expected.U)
        assert torch.equal(found.V, expected.V)


def test_learned_weights_come_back_and_name_another_bank(tmp_path: Path) -> None:
    soups = {module.name: dict.fromkeys(BANK.names, 1 / 3) for module in BANK.modules}
    bank = with_soups(BANK, soups)
    save_bank(bank, tmp_path / "bank")
    loaded = load_bank(tmp_path / "bank")
    assert loaded.digest == bank.digest != BANK.digest
    assert [module.soup for module in loaded.modules] == [module.soup for module in bank.modules]
    assert loaded.modules[0].soup == tuple(1 / 3 if rank else 0.0 for rank in BANK.modules[0].ranks)


def test_the_manifest_says_what_is_there_without_reading_tensors(folder: Path) -> None:
    (file,) = folder.glob("factors-*")
    file.unlink()
    described = read_manifest(folder)
    assert described.base.source == "org/base"
    assert [(task.name, task.ranks) for task in described.tasks] == [
        ("ada", (2,)),
        ("bob", (1, 3, 4)),
        ("cyd", (3, 5)),
    ]
    assert described.tasks[0].provenance == {"source": "org/ada", "target_modules": ["q"]}


def test_whoever_may_read_the_description_may_read_the_factors(folder: Path) -> None:
    assert len({path.stat().st_mode for path in folder.iterdir()}) == 1


def test_a_large_bank_is_written_in_several_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(storage, "SHARD_BYTES", 1000)
    save_bank(BANK, tmp_path / "bank")
    assert len(names(tmp_path / "bank")) == 3
    assert torch.equal(flat_cores(load_bank(tmp_path / "bank")), flat_cores(BANK))


def test_a_loaded_bank_does_not_follow_changes_of_its_files(folder: Path) -> None:
    loaded = load_bank(folder)
    (file,) = folder.glob("factors-*")
    with file.open("r+b") as stream:
        stream.write(b"\xff" * file.stat().st_size)
    file.write_bytes(b"")
    assert torch.equal(flat_cores(loaded), flat_cores(BANK))


def test_it_is_for_one_base_model() -> None:
    check_base(BANK, BASE.fingerprint)
    with pytest.raises(BankError, match="another base model: for random with fingerprint 0000"):
        check_base(BANK, "1" * 64)


def test_an_existing_bank_is_replaced_only_on_request(folder: Path) -> None:
    with pytest.raises(BankError, match="already holds a bank; to replace it, say replace=True"):
        save_bank(OTHER, folder)
    assert load_bank(folder).names == BANK.names
    save_bank(OTHER, folder, replace=True)
    assert load_bank(folder).names == OTHER.names
    assert len(names(folder)) == 2
    save_bank(OTHER, folder, replace=True)
    assert load_bank(folder).names == OTHER.names
    assert names(folder.parent) == ["bank"]


def test_nothing_but_a_bank_is_ever_replaced(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "thesis.txt").write_text("mine")
    (tmp_path / "link").symlink_to(tmp_path / "empty")
    for name in ("file", "folder", "link"):
        with pytest.raises(BankError, match=name):
            save_bank(BANK, tmp_path / name, replace=True)
    (tmp_path / "empty").mkdir()
    save_bank(BANK, tmp_path / "empty")
    assert load_bank(tmp_path / "empty").digest == BANK.digest
    assert names(tmp_path) == ["empty", "file", "folder", "link"]


@contextmanager
def files_no_larger_than(size: int) -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("room", [0, 1500, 4000], ids=["none", "half the factors", "the factors"])
def test_no_room_on_the_disk_leaves_nothing_behind(folder: Path, room: int) -> None:
    (factors,) = folder.glob("factors-*")
    assert 1500 < factors.stat().st_size < 4000
    for target, asked in ((folder, True), (folder.parent / "new", False)):
        with files_no_larger_than(room), pytest.raises(BankError, match=f"cannot write.*{target}"):
            save_bank(BANK, target, source="x" * 5000, replace=asked)
    assert names(folder.parent) == ["bank"]
    assert load_bank(folder).digest == BANK.digest


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(BankError, match=r"cannot write the bank .*/file/bank: Not a directory"):
        save_bank(BANK, tmp_path / "file" / "bank")


@contextmanager
def rights_of_nobody() -> Iterator[None]:
    """Root may read whatever its mode says, so a test of modes is for somebody else."""
    user = os.geteuid()
    if user == 0:
        os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(user)


def mounted(place: Path, patched: pytest.MonkeyPatch) -> None:
    """Have `place` behave as if it were another filesystem."""
    rename = Path.rename

    def within_one(self: Path, target: Path) -> Path:
        if self.is_relative_to(place) != target.is_relative_to(place):
            raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))
        return rename(self, target)

    patched.setattr(Path, "rename", within_one)


def test_a_bank_that_is_a_mount_point_is_refused_before_the_work(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = sorted(folder.iterdir())
    check_writable(folder)
    mounted(folder, monkeypatch)
    with pytest.raises(BankError, match=r"it is a mount point.*keep the bank in a folder inside"):
        check_writable(folder)
    assert sorted(folder.iterdir()) == files
    assert list(folder.parent.iterdir()) == [folder]


def test_through_a_link_from_another_filesystem_it_is_the_bank_itself_that_is_edited(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, link = tmp_path / "mount" / "bank", tmp_path / "link"
    save_bank(BANK, folder)
    link.symlink_to(folder)
    mounted(folder.parent, monkeypatch)
    check_writable(link)
    tuned = Calibration("tuned", "norm", BANK.coordinates_digest, {".p": torch.ones(())})
    add_calibration(link, tuned)
    assert load_bank(folder).calibrated == ("tuned",)
    drop_calibration(link, "tuned")
    assert load_bank(folder).calibrated == ()


def test_a_folder_that_may_not_be_looked_into_is_named(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder.parent)
    folder.parent.chmod(0o711)
    folder.chmod(0)
    try:
        with rights_of_nobody():
            with pytest.raises(BankError, match=r"cannot read bank.bank\.json: Permission denied"):
                load_bank(Path("bank"))
            with pytest.raises(BankError, match="cannot look into bank: Permission denied"):
                check_target(Path("bank"), replace=True)
    finally:
        folder.chmod(0o755)


def test_factors_that_are_a_link_to_themselves_are_refused(folder: Path) -> None:
    (file,) = folder.glob("factors-*")
    file.unlink()
    file.symlink_to(file)
    with pytest.raises(BankError, match=file.name):
        load_bank(folder)


def test_a_writer_killed_at_any_step_leaves_what_was_there_or_the_new_bank(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.bank.killed_writer", str(tmp_path)]
    printed = subprocess.run(command, check=True, stdout=subprocess.PIPE, timeout=120).stdout
    left = [(before, found) for before, several in json.loads(printed).items() for found in several]
    assert len(left) == 3
    for before, found in left:
        assert set(found) == {before, "new"}
        assert found.index("new") > 5
        assert found == [before] * found.count(before) + ["new"] * found.count("new")


def test_a_flipped_bit_anywhere_in_the_description_is_noticed(folder: Path) -> None:
    file = folder / "bank.json"
    data = bytearray(file.read_bytes())
    for place in range(0, len(data), 7):
        data[place] ^= 1
        file.write_bytes(data)
        with pytest.raises(BankError, match=r"bank\.json"):
            read_manifest(folder)
        data[place] ^= 1
    file.write_bytes(data)
    assert read_manifest(folder).digest == BANK.digest


def test_a_flipped_bit_or_a_lost_byte_of_the_factors_is_noticed(folder: Path) -> None:
    (file,) = folder.glob("factors-*")
    data = bytearray(file.read_bytes())
    for place in (0, 9, len(data) // 2, len(data) - 1):
        data[place] ^= 1
        file.write_bytes(data)
        with pytest.raises(BankError, match=rf"{file.name} was changed"):
            load_bank(folder)
        data[place] ^= 1
    for length in (0, 100, len(data) - 1):
        file.write_bytes(data[:length])
        with pytest.raises(BankError, match=rf"{file.name} is {length} bytes"):
            load_bank(folder)


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (b"", "is not JSON"),
        (b'{"format": 1', "is not JSON"),
        (b"[" * 100_000, "is not JSON"),
        (b"\xff\xfe\x00", "is not JSON"),
        (b"[]", "not the description of a dynmerge bank"),
        (b"{}", "not the description of a dynmerge bank"),
        (b'{"format": "1"}', "not the description of a dynmerge bank"),
        (b'{"format": 1, "anything": []}', "has format 1; this dynmerge .* reads format 2"),
        (b'{"format": 2}', "was changed after it was written"),
    ],
)
def test_a_description_that_is_none_is_refused(
    folder: Path, content: bytes, complaint: str
) -> None:
    (folder / "bank.json").write_bytes(content)
    with pytest.raises(BankError, match=complaint):
        load_bank(folder)


def change(*path: str | int, to: object) -> Callable[[Fields], None]:
    def apply(fields: Any) -> None:
        for step in path[:-1]:
            fields = fields[step]
        fields[path[-1]] = to

    return apply


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (change("extra", to=1), "extra: Extra inputs"),
        (lambda fields: fields.pop("base"), "base: Field required"),
        (change("base", "name", to=["tiny"]), r"base\.name"),
        (change("base", "source", to="\ud800"), r"Invalid JSON"),
        (change("tasks", to=[]), "tasks: .* at least 1"),
        (change("tasks", 0, "name", to="../ada"), "'../ada' is not a skill name"),
        (change("tasks", 0, "name", to="base"), "'base' names the base model"),
        (change("tasks", 0, "name", to="bob"), "a task stands there twice"),
        (change("tasks", 0, "digest", to="00"), r"tasks\.0\.digest"),
        (change("tasks", 0, "digest", to="1" * 64), "states the digest"),
        (change("tasks", 0, "name", to="abe"), "states the digest"),
        (change("base", "fingerprint", to="1" * 64), "states the digest"),
        (change("tasks", 0, "ranks", to=[3]), "task ada states ranks"),
        (change("modules", 0, "name", to="../../etc"), r"modules\.0\.name"),
        (change("modules", 0, "name", to="layers.0.v"), "a module stands there twice"),
        (change("modules", 0, "name", to="layers.0.k"), "'layers.0.q.* bank.json does not name"),
        (lambda fields: fields["modules"].pop(3), "has"),
        (change("modules", 0, "ranks", to=[2, 3]), "has 2 ranks for 3 tasks"),
        (change("modules", 0, "ranks", to=[2, 3, -1]), r"modules\.0\.ranks\.2"),
        (change("modules", 0, "ranks", to=[2, 3.5, 0]), r"modules\.0\.ranks\.1"),
        (change("modules", 0, "p", to=6), "do not fit ranks that sum to 5"),
        (change("modules", 0, "p", to=4), r"is F32 \((12|5), 5\), not F32"),
        (change("modules", 0, "d_in", to=10**12), r"not F32 \(1000000000000, 5\)"),
        (change("modules", 0, "d_in", to=True), r"modules\.0\.d_in"),
        (change("files", to=[]), "files: .* at least 1"),
        (change("files", 0, "name", to="../factors-0000000000000000.safetensors"), "files.0.name"),
        (change("files", 0, "name", to="/etc/passwd"), "files.0.name"),
        (change("files", 0, "sha256", to="1" * 64), "is not named by its sha256"),
        (change("files", 0, "size", to=10**15), "bank.json says 1000000000000000"),
        (change("files", 0, to=entry("factors-" + "1" * 16 + ".safetensors", 9, "1" * 64)), "miss"),
    ],
)
def test_an_inconsistent_description_is_refused(
    folder: Path, change: Callable[[Fields], None], complaint: str
) -> None:
    edit(folder, change)
    with pytest.raises(BankError, match=complaint):
        load_bank(folder)


def no_number(tensors: dict[str, torch.Tensor]) -> None:
    tensors["layers.0.q.U"][0, 0] = torch.nan


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda tensors: tensors.pop("layers.0.q.U"), "no file holds the tensor layers.0.q.U"),
        (lambda tensors: tensors.update(more=torch.zeros(1)), "holds a tensor 'more'"),
        (no_number, r"layers\.0\.q\.U holds NaN or infinity"),
        (
            lambda tensors: tensors.update({"layers.0.q.U": tensors["layers.0.q.U"].half()}),
            r"layers\.0\.q\.U is F16 \(12, 5\), not F32 \(12, 5\)",
        ),
    ],
)
def test_wrong_tensors_are_refused_whatever_the_checksums(
    folder: Path, change: Callable[[dict[str, torch.Tensor]], None], complaint: str
) -> None:
    rewrite(folder, change)
    with pytest.raises(BankError, match=complaint):
        load_bank(folder)


def test_factors_that_are_no_safetensors_are_refused(folder: Path) -> None:
    sha256 = hashlib.sha256(b"no tensors").hexdigest()
    name = f"factors-{sha256[:16]}.safetensors"
    (folder / name).write_bytes(b"no tensors")
    edit(folder, lambda fields: fields.update(files=[entry(name, 10, sha256)]))
    with pytest.raises(BankError, match=f"{name} is not a safetensors file"):
        load_bank(folder)


def test_what_is_no_bank_is_named(tmp_path: Path, folder: Path) -> None:
    with pytest.raises(BankError, match="nowhere: there is no such folder"):
        load_bank(tmp_path / "nowhere")
    with pytest.raises(BankError, match=r"is not a bank: it has no bank\.json"):
        load_bank(tmp_path)
    (folder / "bank.json").unlink()
    (folder / "bank.json").mkdir()
    with pytest.raises(BankError, match=r"bank\.json"):
        load_bank(folder)


@pytest.mark.parametrize("pattern", ["bank.json", "factors-*"])
def test_a_link_out_of_the_folder_is_refused_and_one_within_is_not(
    folder: Path, pattern: str
) -> None:
    (file,) = folder.glob(pattern)
    (folder / "..data").mkdir()
    moved = file.rename(folder / "..data" / file.name)
    file.symlink_to(moved)
    assert load_bank(folder).digest == BANK.digest
    outside = shutil.move(moved, folder.parent / "outside")
    file.unlink()
    file.symlink_to(outside)
    with pytest.raises(BankError, match="is a link that leads out of the bank"):
        load_bank(folder)


def test_a_file_that_may_not_be_read_is_named(folder: Path) -> None:
    os.mkfifo(folder / "pipe")
    (file,) = folder.glob("factors-*")
    (folder / "pipe").replace(file)
    with pytest.raises(BankError, match=f"{file.name} is missing"):
        load_bank(folder)


def test_a_name_that_could_not_be_read_back_is_not_written(tmp_path: Path) -> None:
    module = replace(BANK.modules[0], name="a/b")
    with pytest.raises(BankError, match=r"cannot be written: modules\.0\.name"):
        save_bank(replace(BANK, modules=(module,)), tmp_path / "bank")
    assert names(tmp_path) == []


def shapes(module: ModuleFactors) -> dict[str, tuple[int, ...]]:
    return {"ratio": (len(module.ranks), sum(module.ranks)), "none": (0, 2)}


AT = torch.tensor([1 / 3, 1 / 3, 1 / 3])
TARA = random_calibration(BANK, "tara-a", shapes, shared={"p": torch.tensor(4.0)})
FIXED = random_calibration(BANK, "core", shapes, "fixed", {"at": AT})
LEARNED = with_calibration(with_calibration(BANK, TARA), FIXED)


@pytest.fixture
def learned(tmp_path: Path) -> Path:
    """The folder of a bank with two calibrations."""
    save_bank(LEARNED, tmp_path / "bank", source="org/base")
    return tmp_path / "bank"


def stamps(folder: Path) -> dict[str, tuple[int, int]]:
    """What changes where a factor file is written; not the time it was last read."""
    stats = {path.name: path.stat() for path in folder.glob("factors-*")}
    return {name: (stat.st_ino, stat.st_mtime_ns) for name, stat in stats.items()}


def assert_learned(folder: Path) -> None:
    loaded = load_bank(folder)
    assert (loaded.digest, loaded.calibrated) == (LEARNED.digest, ("core", "tara-a"))
    assert loaded.fixed_at == LEARNED.fixed_at
    for expected in LEARNED.calibrations:
        found = loaded.calibration(expected.method)
        assert (found.form, found.record) == (expected.form, expected.record)
        assert found.tensors.keys() == expected.tensors.keys()
        for name, tensor in expected.tensors.items():
            assert torch.equal(found.tensors[name], tensor)


def test_calibrations_come_back_as_they_were(learned: Path) -> None:
    assert_learned(learned)
    assert len({path.stat().st_mode for path in learned.iterdir()}) == 1
    entries = read_manifest(learned).calibrations
    assert [(entry.method, entry.form) for entry in entries] == [
        ("core", "fixed"),
        ("tara-a", "ratio"),
    ]


def test_a_bank_without_calibrations_is_described_as_before_there_were_any(folder: Path) -> None:
    assert "calibrations" not in json.loads((folder / "bank.json").read_text())


def test_a_calibration_added_is_a_new_version_beside_the_same_factors(folder: Path) -> None:
    factors = stamps(folder)
    before = (folder / "bank.json").stat()
    add_calibration(folder, TARA)
    described = add_calibration(folder, FIXED)
    assert described.digest == LEARNED.digest
    assert described.base.source == "org/base"
    assert_learned(folder)
    assert stamps(folder) == factors
    assert (folder / "bank.json").stat().st_ino != before.st_ino  # whoever watches it notices
    assert len(names(folder)) == 4
    add_calibration(folder, replace(TARA, tensors={**TARA.tensors, ".p": torch.tensor(5.0)}))
    assert load_bank(folder).calibration("tara-a").tensors[".p"] == 5
    assert len(names(folder)) == 4
    save_bank(BANK, folder, replace=True)
    assert load_bank(folder).digest == BANK.digest
    assert len(names(folder)) == 2
    assert names(folder.parent) == ["bank"]


def test_calibrations_added_at_once_are_all_there(folder: Path) -> None:
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda one: add_calibration(folder, one), (TARA, FIXED)))
    assert_learned(folder)


def test_a_calibration_dropped_is_a_new_version_beside_the_same_factors(learned: Path) -> None:
    factors = stamps(learned)
    before = (learned / "bank.json").stat()
    described = drop_calibration(learned, "core")
    loaded = load_bank(learned)
    assert (described.digest, described.base.source) == (loaded.digest, "org/base")
    assert loaded.digest == with_calibration(BANK, TARA).digest
    assert stamps(learned) == factors
    assert (learned / "bank.json").stat().st_ino != before.st_ino  # whoever watches it notices
    assert len(names(learned)) == 3
    with pytest.raises(BankError, match=r"no calibration for core \(it has: tara-a\)"):
        drop_calibration(learned, "core")
    assert drop_calibration(learned, "tara-a").digest == BANK.digest
    assert "calibrations" not in json.loads((learned / "bank.json").read_text())
    with pytest.raises(BankError, match=r"no calibration for tara-a \(it has: none\)"):
        drop_calibration(learned, "tara-a")
    assert len(names(learned)) == 2
    assert names(learned.parent) == ["bank"]


def test_one_added_while_another_is_dropped_is_there(folder: Path) -> None:
    add_calibration(folder, TARA)
    with ThreadPoolExecutor(2) as pool:
        dropped = pool.submit(drop_calibration, folder, "tara-a")
        pool.submit(add_calibration, folder, FIXED).result()
        dropped.result()
    assert load_bank(folder).calibrated == ("core",)


def test_what_holds_for_the_factors_is_carried_over_and_the_rest_named(learned: Path) -> None:
    again, lost = carried_over(BANK, learned)
    assert (again.digest, lost) == (LEARNED.digest, {})
    save_bank(again, learned, replace=True)
    assert_learned(learned)
    assert len(names(learned)) == 4
    assert names(learned.parent) == ["bank"]
    reason = "it was learned for other factors"
    assert carried_over(OTHER, learned) == (OTHER, {"core": reason, "tara-a": reason})
    newer = replace(TARA, tensors={**TARA.tensors, ".p": torch.tensor(5.0)})
    mixed, _ = carried_over(with_calibration(BANK, newer), learned)
    assert mixed.calibrated == ("core", "tara-a")
    assert mixed.calibration("tara-a").digest == newer.digest
    (file,) = (entry.file.name for entry in read_manifest(learned).calibrations[:1])
    (learned / file).unlink()
    some, lost = carried_over(BANK, learned)
    assert some.calibrated == ("tara-a",)
    assert lost == {"core": f"{learned}: {file} is missing"}


def test_a_calibration_for_other_factors_is_not_added(folder: Path) -> None:
    data = (folder / "bank.json").read_bytes()
    with pytest.raises(BankError, match="was made for the factors"):
        add_calibration(folder, random_calibration(OTHER, "tara-a", shapes))
    with pytest.raises(BankError, match="there is no such folder"):
        add_calibration(folder / "nowhere", TARA)
    odd = replace(TARA, record={"loss": float("nan")})
    with pytest.raises(BankError, match="this bank cannot be written: Out of range float"):
        add_calibration(folder, odd)
    assert (folder / "bank.json").read_bytes() == data
    assert len(names(folder)) == 2
    assert names(folder.parent) == ["bank"]


def test_no_room_for_a_calibration_leaves_the_bank_as_it_was(folder: Path) -> None:
    for room in (0, 500):
        with files_no_larger_than(room), pytest.raises(BankError, match="cannot write to the bank"):
            add_calibration(folder, TARA)
    assert load_bank(folder).digest == BANK.digest
    assert names(folder.parent) == ["bank"]


def test_a_flipped_bit_or_a_lost_byte_of_a_calibration_is_noticed(learned: Path) -> None:
    for file in learned.glob("calibration-*"):
        data = bytearray(file.read_bytes())
        for place in (0, 9, len(data) // 2, len(data) - 1):
            data[place] ^= 1
            file.write_bytes(data)
            with pytest.raises(BankError, match=rf"{file.name} was changed"):
                load_bank(learned)
            data[place] ^= 1
        file.write_bytes(data[:-1])
        with pytest.raises(BankError, match=rf"{file.name} is {len(data) - 1} bytes"):
            load_bank(learned)
        file.write_bytes(data)
    assert_learned(learned)
    file.unlink()
    with pytest.raises(BankError, match=rf"{file.name} is missing"):
        load_bank(learned)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (change("calibrations", 0, "method", to="tara-a"), "a calibration stands there twice"),
        (change("calibrations", 0, "method", to="zzz"), "do.*not hold what bank.json says"),
        (change("calibrations", 0, "method", to="Core"), "not names"),
        (change("calibrations", 0, "form", to="ratio"), "do.*not hold what bank.json says"),
        (change("calibrations", 0, "at", to=[1, 0, 0]), "do.*not hold what bank.json says"),
        (change("calibrations", 0, "at", to=None), "do.*not hold what bank.json says"),
        (change("calibrations", 0, "at", to=[2, -1, 0]), r"calibrations\.0\.at\.0"),
        (change("calibrations", 0, "at", to=[0.5, 0.5]), "bank.json: .*core is at 2 shares"),
        (change("calibrations", 0, "factors", to="1" * 64), "do.*not hold what bank.json says"),
        (change("calibrations", 0, "digest", to="1" * 64), "do.*not hold what bank.json says"),
        (change("calibrations", 0, "more", to=1), "Extra inputs"),
        (lambda fields: fields["calibrations"].pop(0), "states the digest"),
        (lambda fields: fields["calibrations"].reverse(), "one per method, sorted"),
        (
            change("calibrations", 0, "file", "name", to="../calibration-0.safetensors"),
            r"calibrations\.0\.file\.name",
        ),
        (
            lambda fields: fields["calibrations"][0].update(file=fields["files"][0]),
            "is not named by its sha256",
        ),
        (
            lambda fields: fields.update(files=[fields["calibrations"][0]["file"]]),
            "is not named by its sha256",
        ),
    ],
)
def test_an_inconsistent_description_of_a_calibration_is_refused(
    learned: Path, change: Callable[[Fields], None], complaint: str
) -> None:
    edit(learned, change)
    with pytest.raises(BankError, match=complaint):
        load_bank(learned)


def refill(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    """Change the second calibration's tensors as someone would who also renews its checksum."""
    entry_ = read_manifest(folder).calibrations[1]
    tensors = load_file(folder / entry_.file.name)
    change(tensors)
    data = save(tensors)
    sha256 = hashlib.sha256(data).hexdigest()
    name = f"calibration-{sha256[:16]}.safetensors"
    (folder / name).write_bytes(data)

    def renew(fields: Fields) -> None:
        fields["calibrations"][1]["file"] = entry(name, len(data), sha256)

    edit(folder, renew)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda tensors: tensors.pop(".p"), "does not hold what bank.json says"),
        (lambda tensors: tensors.update({".more": torch.zeros(1)}), "does not hold what bank.json"),
        (lambda tensors: tensors.update(more=torch.zeros(1)), "'more' is not named MODULE.LABEL"),
        (lambda tensors: tensors[".p"].fill_(torch.nan), r"'\.p' holds NaN or infinity"),
        (lambda tensors: tensors[".p"].fill_(1), "does not hold what bank.json says"),
        (lambda tensors: tensors.update({".p": torch.ones(()).half()}), r"'\.p' is F16, not F32"),
        (lambda tensors: tensors.clear(), "holds no tensors"),
    ],
)
def test_wrong_tensors_of_a_calibration_are_refused_whatever_the_checksums(
    learned: Path, change: Callable[[dict[str, torch.Tensor]], None], complaint: str
) -> None:
    refill(learned, change)
    with pytest.raises(BankError, match=complaint):
        load_bank(learned)


def test_a_whole_calibration_that_the_bank_does_not_fit_is_refused(learned: Path) -> None:
    other = Calibration(
        "tara-a", "ratio", BANK.coordinates_digest, {"layers.0.q.ratio": torch.zeros(3, 5)}
    )

    def swap(tensors: dict[str, torch.Tensor]) -> None:
        tensors.clear()
        tensors.update(other.tensors)

    refill(learned, swap)
    edit(learned, change("calibrations", 1, "digest", to=other.digest))
    with pytest.raises(BankError, match=r"calibration for tara-a: .*ratio' is missing"):
        load_bank(learned)
