"""The encoder suite's six tasks: texts, class names, and splits that share no text.

Knows no model and no tokens. A class is known by the words that name it: a frozen zero-shot head is
made of them.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from itertools import pairwise
from pathlib import Path

from examples.dictionary import data
from study.sources import bigbench, cache_folder, dictionary_sources

SIZES: Mapping[str, int] = {"train": 320, "calibration": 128, "validation": 128, "test": 300}


@dataclass(frozen=True, slots=True)
class Row:
    """One text, or two, and the index of its class. Rows with one key never meet in two splits."""

    key: str
    text: str
    label: int
    second: str | None = None

    @property
    def digest(self) -> str:
        """SHA-256 of the key: the order in which rows are chosen."""
        return hashlib.sha256(self.key.encode()).hexdigest()


@dataclass(frozen=True, slots=True)
class EncoderTask:
    """Where a task's rows come from, and the words that stand for its classes, in their order."""

    classes: tuple[str, ...]
    read: Callable[[], Iterator[Row]]


# --- readers


def movie() -> Iterator[Row]:
    """Snippets of film reviews that people rated clearly (VADER's)."""
    for example in data.sentiment(dictionary_sources()):
        yield Row(example.key, example.key, int(example.answer == "positive"))


def medical() -> Iterator[Row]:
    """Sentences about doctors and drugs, translated from Polish; the ambivalent ones left out."""
    for text, answer in _bigbench_rows("multiemo/medicine_sentence_en"):
        if answer != "ambivalent" and len(text.split()) >= 4:
            yield Row(text, text, ("negative", "neutral", "positive").index(answer))


INTENTS = (
    "add_to_playlist",
    "book_restaurant",
    "get_weather",
    "play_music",
    "rate_book",
    "search_creative_work",
    "search_screening_event",
)


def intent() -> Iterator[Row]:
    """Utterances to an assistant (SNIPS)."""
    for text, answer in _bigbench_rows("intent_recognition"):
        utterance = text.removeprefix("Utterance: ")
        yield Row(utterance.lower(), utterance, INTENTS.index(answer))


# WordNet's numbers of its lexicographer files.
GLOSS_FILES: Mapping[str, str] = {
    "04": "act",
    "05": "animal",
    "06": "artifact",
    "08": "body part",
    "10": "communication",
    "13": "food",
    "18": "person",
    "20": "plant",
}


def gloss() -> Iterator[Row]:
    """Definitions of WordNet's nouns; the class is the file its lexicographers keep them in."""
    files = list(GLOSS_FILES)
    for noun in nouns().values():
        if noun.file in GLOSS_FILES and _number(noun.definition) % 2 == 0:
            yield Row(noun.definition.lower(), noun.definition, files.index(noun.file))


def nli() -> Iterator[Row]:
    """A definition and a claim of what it defines: its hypernym, or a near noun's (WordNet).

    VitaminC, the NLI set among BIG-bench's tasks, is not learnt from 320 rows.
    """
    every = nouns()
    above: dict[str, list[str]] = {}  # lexicographer file -> its nouns' hypernyms
    for noun in every.values():
        if noun.hypernym in every:
            above.setdefault(noun.file, []).append(every[noun.hypernym].word)
    choices = {file: sorted(set(words)) for file, words in above.items()}
    for noun in every.values():
        number = _number(noun.definition)
        # Odd: `gloss` has the even ones, so that no text is in both tasks.
        if number % 2 and noun.hypernym in every:
            right = every[noun.hypernym].word
            among = choices[noun.file]
            label = number // 2 % 2
            word = among[number // 4 % len(among)] if label else right
            if not label or word != right:
                yield Row(noun.definition.lower(), noun.definition, label, f"a kind of {word}")


def hyperbaton() -> Iterator[Row]:
    """Adjectives before a noun, in the order of English or in another."""
    for text, answer in _bigbench_rows("hyperbaton"):
        orders = re.findall(r'"\s*(.*?)\s*"', text)
        key = " ".join(sorted(orders[0].lower().split()))
        label = _number(text) % 2
        yield Row(key, orders["ab".index(answer)] if label else orders["ba".index(answer)], label)


@dataclass(frozen=True, slots=True)
class Noun:
    """A noun of WordNet: its first word, its lexicographers' file, and what it is a kind of."""

    word: str
    file: str
    definition: str
    hypernym: str  # the key of another noun, or nothing


@cache
def nouns() -> Mapping[str, Noun]:
    """WordNet's nouns by their place in its file, those whose definition is a phrase."""
    path = data.wordnet(dictionary_sources()) / "data.noun"
    found = {}
    for line in path.read_text("latin-1").splitlines():
        if line.startswith(" "):  # the licence
            continue
        head, _, tail = line.partition("|")
        place, file, _, words, *rest = head.split()
        # After the words, two fields each, and the number of pointers: symbol, place, two more.
        pointers = rest[2 * int(words, 16) + 1 :]
        definition = re.sub(r"\([^)]*\)", "", tail.split('"')[0])
        definition = " ".join(definition.split()).strip(" ;:,")
        if 4 <= len(definition.split()) <= 30:
            found[place] = Noun(
                rest[0].replace("_", " "),
                file,
                definition,
                next((at for kind, at in pairwise(pointers) if kind == "@"), ""),
            )
    return found


def _number(text: str) -> int:
    """A number that looks random and is the text's own: what takes the place of chance here."""
    return int(hashlib.sha256(f"study {text.lower()}".encode()).hexdigest(), 16)


def _bigbench_rows(task: str) -> Iterator[tuple[str, str]]:
    """(input, right answer) of a BIG-bench task."""
    for example in json.loads(bigbench(task).read_text("utf-8"))["examples"]:
        scores = example["target_scores"]
        yield example["input"], max(scores, key=lambda answer: scores[answer])


TASKS: Mapping[str, EncoderTask] = {
    "gloss": EncoderTask(tuple(GLOSS_FILES.values()), gloss),
    "hyperbaton": EncoderTask(("wrong", "right"), hyperbaton),
    "intent": EncoderTask(tuple(name.replace("_", " ") for name in INTENTS), intent),
    "medical": EncoderTask(
        ("a negative opinion", "a neutral statement", "a positive opinion"), medical
    ),
    "movie": EncoderTask(("a bad film", "a good film"), movie),
    "nli": EncoderTask(("true", "false"), nli),
}


# --- splits


def rows(task: str, split: str) -> list[Row]:
    """The rows of one task and split; all splits of a task are made and kept on the first call."""
    if task not in TASKS:
        raise ValueError(f"no encoder task {task!r} (known: {', '.join(TASKS)})")
    if split not in SIZES:
        raise ValueError(f"no split {split!r} (known: {', '.join(SIZES)})")
    folder = cache_folder() / "encoder" / "rows" / task
    if not (folder / f"{split}.jsonl").is_file():
        for name, chosen in split_rows(TASKS[task].read(), SIZES).items():
            write(chosen, folder / f"{name}.jsonl")
    lines = (folder / f"{split}.jsonl").read_text("utf-8").split("\n")
    return [Row(**json.loads(line)) for line in lines if line]


def split_rows(source: Iterable[Row], sizes: Mapping[str, int]) -> dict[str, list[Row]]:
    """Consecutive stretches of the rows in `interleaved` order, one for each split.

    One row for each key, so that no text is in two splits. The last splits get less, or nothing,
    where there are too few rows.
    """
    left = iter(interleaved(source, sum(sizes.values())))
    return {
        name: [row for _, row in zip(range(size), left, strict=False)]
        for name, size in sizes.items()
    }


def interleaved(source: Iterable[Row], total: int) -> list[Row]:
    """At most `total` rows, one for each key, chosen by hash; no class gives more than its share.

    Every stretch of them has all classes in the same proportions: a class with fewer rows than its
    share of `total` is spread over the whole.
    """
    classes: dict[int, list[Row]] = {}
    for row in sorted(one_of_each_key(source), key=lambda row: row.digest):
        classes.setdefault(row.label, []).append(row)
    limit = math.ceil(total / len(classes))
    placed = [
        ((place + 0.5) / min(limit, len(members)), row.digest, row)
        for members in classes.values()
        for place, row in enumerate(members[:limit])
    ]
    return [row for *_, row in sorted(placed, key=lambda item: item[:2])]


def one_of_each_key(source: Iterable[Row]) -> list[Row]:
    """Of the rows with one key, the one of the least hash: their order may follow the class."""
    least: dict[str, tuple[str, Row]] = {}
    for row in source:
        content = f"{row.key}\0{row.text}\0{row.second}"
        digest = hashlib.sha256(content.encode()).hexdigest()
        if row.key not in least or digest < least[row.key][0]:
            least[row.key] = (digest, row)
    return [row for _, row in least.values()]


def write(chosen: Sequence[Row], path: Path) -> None:
    """One JSON object a line, all of them or no file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = (json.dumps(asdict(row), ensure_ascii=False) + "\n" for row in chosen)
    unfinished = path.with_suffix(".unfinished")
    unfinished.write_text("".join(lines), "utf-8")
    unfinished.rename(path)
