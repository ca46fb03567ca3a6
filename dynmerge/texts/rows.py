"""Row: a prompt with or without its answer, or a text, and the files that hold them."""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from dynmerge.errors import ExamplesError

PROMPT, ANSWER, TEXT = "prompt", "answer", "text"


@dataclass(frozen=True, slots=True)
class Row:
    """One example before it is tokens: `prompt` and perhaps `answer`, or `text` alone.

    `ended` is False for an answer that was cut off. `place` is for errors: rows are equal wherever
    they stand.
    """

    prompt: str | None = None
    answer: str | None = None
    text: str | None = None
    ended: bool = True
    place: str = field(default="a row", compare=False)


def read_texts(path: Path) -> list[Row]:
    """The rows of a file: `.jsonl` with `prompt` and perhaps `answer`, or with `text`; `.txt` with
    one text a line. Blank lines are skipped, other keys are let be.

    Raises ExamplesError naming file, line and key.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except OSError as error:
        raise ExamplesError(f"{path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise ExamplesError(f"{path}:{line} is not UTF-8: {error.reason}") from error
    except ValueError as error:  # a path with a zero byte
        raise ExamplesError(f"{str(path)!r} cannot be read: {error}") from error
    reader = READERS.get(path.suffix)
    if reader is None:
        raise ExamplesError(f"{path} is neither .jsonl nor .txt")
    rows = [reader(line.rstrip("\r"), f"{path}:{number}") for number, line in _numbered(lines)]
    if not rows:
        raise ExamplesError(f"{path} has no rows")
    return rows


def check_alike(rows: Sequence[Row]) -> None:
    """Raise ExamplesError where some are texts and others are prompts."""
    texts = [row for row in rows if row.text is not None]
    if 0 < len(texts) < len(rows):
        raise ExamplesError(f"{texts[0].place} is a text, and other rows are prompts")


def check_labels(labels: Sequence[str], source: str = "labels") -> None:
    """Raise ExamplesError, naming `source`, unless they are two different words or more."""
    if len(labels) < 2 or len(set(labels)) < len(labels) or "" in labels:
        given = ", ".join(map(repr, labels))
        raise ExamplesError(f"{source}: labels are two different words or more; given: {given}")


def check_rows(rows: Sequence[Row], labels: Sequence[str] | None) -> None:
    """Raise ExamplesError unless rows can be read together: what needs no tokenizer to know.

    With `labels` all are prompts, and all have an answer that is a label or none has.
    """
    check_alike(rows)
    if labels is None:
        return
    if rows[0].text is not None:
        raise ExamplesError(f"{rows[0].place} is a text; labels answer prompts")
    unlabelled = [row for row in rows if row.answer is None]
    if 0 < len(unlabelled) < len(rows):
        raise ExamplesError(f"{unlabelled[0].place} has no answer, and other rows have one")
    for row in rows:
        if row.answer is not None and row.answer not in labels:
            known = ", ".join(map(repr, labels))
            raise ExamplesError(f"{row.place}: the answer {row.answer!r} is no label ({known})")


def check_answered(rows: Sequence[Row]) -> None:
    """Raise ExamplesError where a prompt has no answer."""
    for row in rows:
        if row.prompt is not None and row.answer is None:
            raise ExamplesError(f"{row.place} has no answer, and every prompt needs one here")


def _numbered(lines: list[str]) -> Iterator[tuple[int, str]]:
    return ((number, line) for number, line in enumerate(lines, start=1) if line.strip())


def _plain(line: str, place: str) -> Row:
    return Row(text=line, place=place)


def _parsed(line: str, place: str) -> Row:
    try:
        data = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ExamplesError(f"{place}: not JSON: {error}") from None
    if not isinstance(data, dict):
        raise ExamplesError(f"{place}: not an object with {PROMPT} or {TEXT}")
    found = {key: data[key] for key in (PROMPT, ANSWER, TEXT) if data.get(key) is not None}
    for key, value in found.items():
        if not isinstance(value, str) or not value:
            raise ExamplesError(f"{place}: {key} is not a text with something in it")
        if any("\ud800" <= character <= "\udfff" for character in value):
            raise ExamplesError(f"{place}: {key} has half a surrogate pair, which is no character")
    if (PROMPT in found) == (TEXT in found):
        both = "both" if TEXT in found else "neither of"
        raise ExamplesError(f"{place}: {both} {PROMPT} and {TEXT}; a row has one of them")
    if ANSWER in found and TEXT in found:
        raise ExamplesError(f"{place}: {ANSWER} belongs to a {PROMPT}, not to a {TEXT}")
    return Row(**found, place=place)


READERS: Mapping[str, Callable[[str, str], Row]] = {".jsonl": _parsed, ".txt": _plain}
