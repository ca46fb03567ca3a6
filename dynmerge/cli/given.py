"""Given: the texts of a calibration, from files or made up: what it learns from and what guards it.

No row is both: what was learned from guards nothing.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from dynmerge.cli.console import Step, note
from dynmerge.cli.student import examples_for
from dynmerge.engines.transformers.model import LoadedModel
from dynmerge.errors import ConfigError
from dynmerge.student import Student
from dynmerge.texts.examples import Examples
from dynmerge.texts.rows import Row, check_labels, check_rows, read_texts
from dynmerge.texts.sampled import sample_answers, sample_texts

Question = tuple[str | None, ...]

# Of a skill's questions, where no file guards it, one in so many is held out.
HELD_OUT_EVERY = 4


@dataclass(frozen=True, slots=True)
class Given:
    """Skill -> the rows of its files, where it has some, and its labels, where it chooses."""

    texts: Mapping[str, Sequence[Row]]
    held_out: Mapping[str, Sequence[Row]]
    labels: Mapping[str, Sequence[str]]

    @classmethod
    def read(
        cls,
        texts: Mapping[str, Path],
        held_out: Mapping[str, Path],
        labels: Mapping[str, Sequence[str]],
    ) -> "Given":
        """All files. Raises ExamplesError for rows or labels that cannot be; ConfigError for a row
        that is to be learned from and held out.
        """
        given = cls(
            {name: read_texts(path) for name, path in texts.items()},
            {name: read_texts(path) for name, path in held_out.items()},
            labels,
        )
        for name, words in labels.items():
            check_labels(words, f"--labels {name}")
        for name, rows in given.files:
            check_rows(rows, labels.get(name))
        for name in texts:
            given._check_apart(name)
        return given

    @property
    def files(self) -> list[tuple[str, Sequence[Row]]]:
        """Of every file its skill and its rows."""
        return [*self.texts.items(), *self.held_out.items()]

    def questions(self, name: str, rows: Sequence[Row]) -> Callable[[Row], Question]:
        """What makes a row of the skill `name` another than others of `rows`, wherever it stands.

        Among labels it is the prompt: one prediction, whichever label is right. So it is where one
        of its rows has no answer yet, which may become any other's.
        """
        labelled = name in self.labels
        bare = {row.prompt for row in rows if labelled or row.answer is None}

        def question(row: Row) -> Question:
            known = row.prompt is not None and row.prompt in bare
            return (row.prompt,) if known else (row.prompt, row.answer, row.text)

        return question

    def is_made_up(self, name: str, rows: Sequence[Row] | None) -> bool:
        """Whether the skill says what its rows are, or some of their answers."""
        if rows is None:
            return True
        unanswered = any(row.prompt is not None and row.answer is None for row in rows)
        return unanswered and name not in self.labels

    def separated(
        self, name: str, rows: Sequence[Row], others: Sequence[Row]
    ) -> tuple[list[Row], list[Row]]:
        """`rows` in two: those that ask what none of `others` asks, and those that ask the same."""
        question = self.questions(name, [*rows, *others])
        asked = set(map(question, others))
        own = [row for row in rows if question(row) not in asked]
        return own, [row for row in rows if question(row) in asked]

    def split(self, name: str, rows: Sequence[Row]) -> tuple[list[Row], list[Row]]:
        """What is learned from, and what is held out: a quarter of the questions, drawn by content.

        A row that is there again is left out. Raises ConfigError where there is one question.
        """
        different = list(dict.fromkeys(rows))
        question = self.questions(name, different)
        asked = {question(row): row for row in different}
        if len(asked) < 2:
            source = f"--texts {name}" if name in self.texts else f"what {name} makes up"
            kind = "prompts" if any(len(each) == 1 for each in asked) else "rows"
            raise ConfigError(
                f"{source}: two different {kind} are the least, so that one can be held out"
            )
        drawn = self._drawn(name, asked)
        return self.separated(name, different, [asked[each] for each in drawn[::HELD_OUT_EVERY]])

    def _drawn(self, name: str, asked: Mapping[Question, Row]) -> list[Question]:
        """Those that may be held out, label after label, the most frequent first.

        In each by their hashes: shuffled, and the same way wherever they stand in whichever file.
        A label's only question is to be learned from, unless all are.
        """
        labels = {each: row.answer or "" for each, row in asked.items() if name in self.labels}
        counts = Counter(labels.values())

        def place(each: Question) -> tuple[int, str, str]:
            label = labels.get(each, "")
            return -counts[label], label, hashlib.sha256(json.dumps(each).encode()).hexdigest()

        drawn = sorted(asked, key=place)
        return [each for each in drawn if counts[labels.get(each, "")] != 1] or drawn

    def _check_apart(self, name: str) -> None:
        kept = self.held_out.get(name, ())
        _, shared = self.separated(name, kept, self.texts[name])
        if shared:
            rows = f"{len(shared)} of its {len(kept)} rows"
            raise ConfigError(
                f"--held-out {name} shares {rows} with --texts {name}, such as {shared[0].place}: "
                "what is learned from guards nothing"
            )


@dataclass(frozen=True, slots=True, eq=False)
class Reading:
    """What is given, as a model reads it. Where a skill has no file it makes `samples` rows up."""

    student: Student
    loaded: LoadedModel
    given: Given
    samples: int
    seed: int

    def whole(self, step: Step) -> dict[str, Examples]:
        """All of every skill's texts."""
        return {
            name: self._examples(name, self._answered(name, self._texts(name)))
            for name in self._names(step)
        }

    def apart(self, step: Step) -> tuple[dict[str, Examples], dict[str, Examples]]:
        """Of every skill, what it learns from and what guards it."""
        texts: dict[str, Examples] = {}
        held_out: dict[str, Examples] = {}
        for name in self._names(step):
            learned, kept = self._apart(name)
            texts[name], held_out[name] = self._examples(name, learned), self._examples(name, kept)
        return texts, held_out

    def _names(self, step: Step) -> Iterator[str]:
        names = self.student.bank.names
        for done, name in enumerate(names, start=1):
            yield name
            step(done, len(names))

    def _apart(self, name: str) -> tuple[list[Row], list[Row]]:
        """Before any prompt is answered: of an answer that is drawn nobody knows what it shares."""
        rows = self._texts(name)
        if name not in self.given.held_out:
            learned, kept = self.given.split(name, rows)
            _say_fewer(name, rows, [*learned, *kept], "repeat others")
            # At once: answers drawn apart by one seed would be alike.
            answered = self._answered(name, [*learned, *kept])
            return answered[: len(learned)], answered[len(learned) :]
        kept = list(self.given.held_out[name])
        # Files share no row, but a skill may have made up what guards it.
        learned, _ = self.given.separated(name, rows, kept)
        _say_fewer(name, rows, learned, "are in what guards it")
        if not learned:
            raise ConfigError(
                f"{name}: all there is to learn from guards it too: give --texts {name}"
            )
        return self._answered(name, learned), self._answered(name, kept)

    def _texts(self, name: str) -> Sequence[Row]:
        """A file's rows; or, where there is none, rows that the skill's own adapter makes up."""
        if name in self.given.texts:
            return self.given.texts[name]
        return sample_texts(self.student, self.loaded.tokenizer, name, self.samples, self.seed)

    def _answered(self, name: str, rows: Sequence[Row]) -> list[Row]:
        """The rows; the adapter answers prompts without an answer that are not for labels."""
        if not self.given.is_made_up(name, rows):
            return list(rows)
        return sample_answers(self.student, self.loaded.tokenizer, name, rows, self.seed)

    def _examples(self, name: str, rows: Sequence[Row]) -> Examples:
        return examples_for(self.loaded, name, rows, self.given.labels.get(name))


def _say_fewer(name: str, before: Sequence[Row], after: Sequence[Row], why: str) -> None:
    if len(after) < len(before):
        note(f"{name}: {len(before) - len(after)} of {len(before)} rows {why} and are left out")
