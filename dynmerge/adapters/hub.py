"""Where a model or an adapter lies: a local folder, or a snapshot of a Hugging Face repository.

Opens no file in it.
"""

import re
from collections.abc import Sequence
from pathlib import Path

import httpx
from huggingface_hub import errors, snapshot_download

from dynmerge.errors import DynmergeError

_HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", re.ASCII)


def locate(
    source: str | Path,
    files: Sequence[str],
    *,
    revision: str | None = None,
    error: type[DynmergeError],
) -> Path:
    """`source` if it is a folder; else the snapshot of that hub repository, with `files` (globs).

    Raises `error`, saying what was tried.
    """
    folder = Path(source).expanduser()
    if folder.is_dir() and str(source):
        return folder.absolute()
    repository = str(source)
    if isinstance(source, Path) or folder.exists() or not _HUB_ID.fullmatch(repository):
        raise error(
            f"{display_name(repository)!r} is no folder here and no Hugging Face repository id"
        )
    try:
        return Path(snapshot_download(repository, revision=revision, allow_patterns=list(files)))
    except errors.HFValidationError as exc:
        raise error(f"{repository!r} is no folder here and no Hugging Face repository id") from exc
    except errors.GatedRepoError as exc:
        raise error(
            f"the Hugging Face repository {repository!r} is gated: accept its terms there and log"
            " in with `hf auth login`"
        ) from exc
    except errors.RepositoryNotFoundError as exc:
        raise error(
            f"{repository!r} is no folder here and no Hugging Face repository this login can see"
        ) from exc
    except errors.RevisionNotFoundError as exc:
        raise error(
            f"the Hugging Face repository {repository!r} has no revision {revision!r}"
        ) from exc
    except (OSError, httpx.HTTPError, errors.EntryNotFoundError, errors.XetDownloadError) as exc:
        raise error(
            f"{repository!r} is no folder here, and the Hugging Face hub could not be asked for it"
            f" ({type(exc).__name__}): download it first, or name a local folder"
        ) from exc


def display_name(source: str | Path) -> str:
    """The last component of a path or hub id; of a folder in the hub's cache, the repository."""
    parts = re.split(r"[/\\]", str(source).rstrip("/\\"))
    if len(parts) >= 3 and parts[-2] == "snapshots" and parts[-3].startswith("models--"):
        return parts[-3].rsplit("--", 1)[-1]
    return parts[-1]
