"""Examples for language models: answers, labels and plain texts as what a model must predict."""

from collections.abc import Mapping, Sequence

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from dynmerge.errors import ExamplesError
from dynmerge.texts.passages import Passage, Passages
from dynmerge.texts.rows import Row, check_labels, check_rows
from dynmerge.texts.turns import Turns

MAX_TOKENS = 512


class Answers(Passages):
    """Prompts with answers: the next token at every token of the answer, its end included.

    A prompt stands in the model's chat template as the server renders it, or as it is where the
    tokenizer has none. Raises ExamplesError for a row without an answer, or one that with its
    answer is longer than `max_tokens` or the model's context.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        rows: Sequence[Row],
        max_tokens: int = MAX_TOKENS,
    ) -> None:
        turns, room = Turns(tokenizer), room_of(model, max_tokens)
        super().__init__(model, [self._passage(turns, row, room) for row in _some(rows)])

    @staticmethod
    def _passage(turns: Turns, row: Row, room: int) -> Passage:
        if row.answer is None:
            raise ExamplesError(f"{row.place} has no answer: write one, or have answers sampled")
        prompt, answer = _prompt(turns, row), turns.answer(row.answer, ended=row.ended)
        if not answer:
            raise ExamplesError(f"{row.place}: the answer is no token")
        if not row.ended:  # it may as well be cut off earlier
            answer = answer[: max(room - len(prompt), 1)]
        _check_fits(row, len(prompt) + len(answer), room)
        return Passage((*prompt, *answer[:-1]), tuple(answer))


class Choices(Passages):
    """Prompts answered with one of a few labels: one prediction among the labels' first tokens.

    Either all rows have an answer, which is one of `labels`, or none has. Raises ExamplesError for
    labels that begin with the same token, an answer that is no label, and as `Answers` does.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        rows: Sequence[Row],
        labels: Sequence[str],
        max_tokens: int = MAX_TOKENS,
    ) -> None:
        turns, room = Turns(tokenizer), room_of(model, max_tokens)
        firsts = _first_tokens(turns, labels)
        check_rows(_some(rows), labels)
        passages = [self._passage(turns, row, firsts, room) for row in rows]
        super().__init__(model, passages, tuple(firsts.values()))

    @staticmethod
    def _passage(turns: Turns, row: Row, firsts: Mapping[str, int], room: int) -> Passage:
        prompt = _prompt(turns, row)
        _check_fits(row, len(prompt) + 1, room)
        return Passage(tuple(prompt), (None if row.answer is None else firsts[row.answer],))


class Texts(Passages):
    """Plain texts, without a chat template: every token after the first.

    A text longer than `max_tokens` or the model's context is read as far as that. Raises
    ExamplesError for one of fewer than two tokens.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        rows: Sequence[Row],
        max_tokens: int = MAX_TOKENS,
    ) -> None:
        turns, room = Turns(tokenizer), room_of(model, max_tokens)
        super().__init__(model, [self._passage(turns, row, room) for row in _some(rows)])

    @staticmethod
    def _passage(turns: Turns, row: Row, room: int) -> Passage:
        if row.text is None:
            raise ExamplesError(f"{row.place} has a prompt where a text is needed")
        tokens = turns.text(row.text)[:room]
        if len(tokens) < 2:
            raise ExamplesError(f"{row.place}: a text of fewer than two tokens predicts nothing")
        return Passage(tuple(tokens[:-1]), tuple(tokens[1:]))


def examples_of(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Row],
    labels: Sequence[str] | None = None,
    max_tokens: int = MAX_TOKENS,
) -> Passages:
    """Texts, choices where there are labels, or else answers. Raises ExamplesError if mixed."""
    check_rows(_some(rows), labels)
    if labels is not None:
        return Choices(model, tokenizer, rows, labels, max_tokens)
    if rows[0].text is not None:
        return Texts(model, tokenizer, rows, max_tokens)
    return Answers(model, tokenizer, rows, max_tokens)


def _some(rows: Sequence[Row]) -> Sequence[Row]:
    if not rows:
        raise ExamplesError("there are no rows")
    return rows


def _prompt(turns: Turns, row: Row) -> list[int]:
    if row.prompt is None:
        raise ExamplesError(f"{row.place} has a text where a prompt is needed")
    prompt = turns.prompt(row.prompt)
    if not prompt:
        raise ExamplesError(f"{row.place}: the prompt is no token")
    return prompt


def _first_tokens(turns: Turns, labels: Sequence[str]) -> dict[str, int]:
    """Label -> its first token, all different."""
    check_labels(labels)
    owners: dict[int, str] = {}
    for label in labels:
        tokens = turns.answer(label, ended=False)
        if not tokens:
            raise ExamplesError(f"the label {label!r} is no token")
        if tokens[0] in owners:
            raise ExamplesError(
                f"the labels {owners[tokens[0]]!r} and {label!r} begin with the same token: "
                "choose other words"
            )
        owners[tokens[0]] = label
    return {label: token for token, label in owners.items()}


def room_of(model: PreTrainedModel, max_tokens: int = MAX_TOKENS) -> int:
    """Most tokens of one example."""
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return min(max_tokens, context) if isinstance(context, int) and context > 0 else max_tokens


def _check_fits(row: Row, tokens: int, room: int) -> None:
    if tokens > room:
        raise ExamplesError(
            f"{row.place} is {tokens} tokens with its answer; at most {room} are taken"
        )
