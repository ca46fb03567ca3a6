"""Fixtures: the command line as a user calls it, and a bank that it built."""

from collections.abc import Callable
from pathlib import Path

import pytest

from dynmerge.cli import main

Run = Callable[..., tuple[int, str, str]]  # exit code, stdout, stderr
NAMES = ("ada", "bob", "cyd")


def exit_code(*words: object) -> int:
    """What the command ends with."""
    with pytest.raises(SystemExit) as ended:
        main([str(word) for word in words])
    code = ended.value.code
    return 0 if code is None else int(code)


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """Calls the command, and says how it ended and what it printed."""
    return lambda *words: (exit_code(*words), *capsys.readouterr())


@pytest.fixture(scope="package")
def built(
    base_folder: Path, adapter_folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The folder of a bank of three skills; nobody changes it."""
    folder = tmp_path_factory.mktemp("banks") / "bank"
    pairs = [f"--adapter={name}={adapter_folders[name]}" for name in NAMES]
    assert exit_code("build", base_folder, *pairs, "-o", folder) == 0
    return folder
