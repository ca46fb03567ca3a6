import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from dynmerge.bank.bank import BaseIdentity
from dynmerge.bank.build import build_bank
from dynmerge.errors import ExamplesError, PreferenceError
from dynmerge.student import Student
from dynmerge.texts.language import Answers, Choices, Texts, examples_of
from dynmerge.texts.passages import Passages
from dynmerge.texts.rows import Row, read_texts
from dynmerge.texts.sampled import sample_answers, sample_texts
from dynmerge.texts.turns import Turns
from tests.conftest import tiny_model, tiny_tokenizer
from tests.engines.conftest import skills
from tests.engines.test_families import FAMILIES
from tests.reference import last_predictions

ROWS = [
    Row(prompt="Of skills: mix one", answer="a model"),
    Row(prompt="Of skills: the preference chooses which of the skills", answer="in"),
    Row(prompt="Of skills: ?", answer="skills in one model chooses the mix of a preference"),
    Row(prompt="Of skills: mix one of", answer=""),
]
LETTERS = "abcdefghijklmnopqrstuvwxyz"
LABELS = ("yes", "no", "mix")
CHOSEN = [Row(prompt=row.prompt, answer=LABELS[n % 3]) for n, row in enumerate(ROWS)]
PLAIN = [
    Row(text="the mix of skills in one model"),
    Row(text="a preference"),
    Row(text="one model chooses the mix"),
]


@pytest.fixture(scope="module")
def tokenizer(base_folder: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(base_folder)


@pytest.fixture
def model() -> PreTrainedModel:
    return tiny_model()


@pytest.fixture
def student(model: PreTrainedModel) -> Iterator[Student]:
    made = Student(model, build_bank(BaseIdentity("tiny", "0" * 64), skills(model)))
    yield made
    made.close()


def cores_of(student: Student) -> list[Tensor]:
    """The mean of the skills' cores, open to gradients."""
    return [
        torch.stack([module.core(task) for task in range(3)]).mean(0).requires_grad_()
        for module in student.bank.modules
    ]


def kinds(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> dict[str, Passages]:
    return {
        "answers": Answers(model, tokenizer, ROWS),
        "choices": Choices(model, tokenizer, CHOSEN, LABELS),
        "texts": Texts(model, tokenizer, PLAIN),
    }


def one_by_one(examples: Passages, rows: Sequence[int]) -> Tensor:
    found = []
    for row in rows:
        passage = examples.passages[row]
        logits = last_predictions(examples.model, passage.tokens, len(passage.targets))
        found.append(logits[:, list(examples.classes)] if examples.classes else logits)
    return torch.cat(found)


@pytest.mark.parametrize("kind", ["answers", "choices", "texts"])
def test_a_batch_predicts_what_each_row_does_alone_and_so_do_its_gradients(
    student: Student, tokenizer: PreTrainedTokenizerBase, kind: str
) -> None:
    assert isinstance(student.model, PreTrainedModel)
    examples = kinds(student.model, tokenizer)[kind]
    rows = [2, 0, 1]
    assert_close(examples.logits(rows), one_by_one(examples, rows), atol=1e-4, rtol=1e-4)
    assert_close(examples.logits([1]), one_by_one(examples, [1]), atol=1e-4, rtol=1e-4)
    cores = cores_of(student)
    with student.under(cores):
        together, apart = examples.logits(rows), one_by_one(examples, rows)
    assert_close(together, apart, atol=1e-4, rtol=1e-4)
    assert together.dtype == torch.float32
    assert float((together - examples.logits(rows)).detach().abs().max()) > 0.1
    weights = torch.linspace(-1, 1, together.numel()).reshape(together.shape)
    found = torch.autograd.grad((together.softmax(-1) * weights).sum(), cores)
    expected = torch.autograd.grad((apart.softmax(-1) * weights).sum(), cores)
    assert max(float(gradient.abs().max()) for gradient in expected) > 0.01
    for mine, theirs in zip(found, expected, strict=True):
        assert_close(mine, theirs, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("family", FAMILIES)
def test_so_it_is_in_other_families(family: str, tokenizer: PreTrainedTokenizerBase) -> None:
    torch.manual_seed(0)
    other = AutoModelForCausalLM.from_config(FAMILIES[family][0]()).eval()
    for examples in kinds(other, tokenizer).values():
        with torch.no_grad():
            found, expected = examples.logits([1, 2, 0]), one_by_one(examples, [1, 2, 0])
        assert_close(found, expected, atol=1e-4, rtol=1e-4)


def test_what_all_prompts_begin_with_is_run_once(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    shapes: list[tuple[int, ...]] = []
    hook = model.model.layers[0].register_forward_hook(
        lambda _layer, inputs, _output: shapes.append(tuple(inputs[0].shape[:2]))
    )
    examples = Answers(model, tokenizer, ROWS)
    examples.logits([0, 1, 2])
    shared = shapes[0][1]
    assert shapes[0] == (1, shared)
    assert shared >= 8
    assert len({passage.tokens[:shared] for passage in examples.passages}) == 1
    assert len({passage.tokens[: shared + 1] for passage in examples.passages}) > 1
    assert shapes[1] == (3, max(examples.lengths()[:3]) - shared)
    assert len(shapes) == 2
    hook.remove()


def test_prompts_stand_in_the_template_and_answers_end(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    passage = Answers(model, tokenizer, ROWS).passages[0]
    assert (
        tokenizer.decode(list(passage.tokens))
        == "<|im_start|>user\nOf skills: mix one<|im_end|>\n<|im_start|>assistant\na model"
    )
    assert passage.targets == tuple(tokenizer.encode("a model<|im_end|>"))
    cut = Answers(model, tokenizer, [Row(prompt="mix", answer="one", ended=False)])
    assert cut.passages[0].targets == tuple(tokenizer.encode("one"))
    plain = tiny_tokenizer()
    plain.chat_template = None
    passage = Answers(model, plain, ROWS).passages[0]
    assert (
        plain.decode([*passage.tokens, *passage.targets[-1:]])
        == "Of skills: mix onea model<|im_end|>"
    )  # type: ignore[list-item]


def test_the_template_says_what_ends_an_answer() -> None:
    odd = tiny_tokenizer()
    odd.chat_template = str(odd.chat_template).replace("<|im_end|>", "<|endoftext|>")
    assert odd.eos_token_id == 2
    assert Turns(odd).end == 0


def test_targets_counts_and_digest(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    answers, choices, texts = kinds(model, tokenizer).values()
    assert len(answers) == 4
    assert answers.counts([3, 0]) == [1, len(tokenizer.encode("a model")) + 1]
    targets = answers.targets([3, 0])
    assert targets is not None
    assert targets.tolist() == [2, *tokenizer.encode("a model<|im_end|>")]
    assert choices.counts([0, 1]) == [1, 1]
    assert choices.logits([0, 1]).shape == (2, 3)
    targets = choices.targets([3, 2, 1])
    assert targets is not None
    assert targets.tolist() == [0, 2, 1]
    unlabelled = Choices(model, tokenizer, [Row(prompt="mix"), Row(prompt="one")], LABELS)
    assert unlabelled.targets([0, 1]) is None
    assert unlabelled.logits([1]).shape == (1, 3)
    tokens = tokenizer.encode(str(PLAIN[1].text))
    assert texts.counts([1]) == [len(tokens) - 1]
    targets = texts.targets([1])
    assert targets is not None
    assert targets.tolist() == tokens[1:]
    assert answers.digest == Answers(model, tokenizer, ROWS).digest
    other_labels = Choices(model, tokenizer, CHOSEN, LABELS[::-1])
    digests = {answers.digest, choices.digest, texts.digest, other_labels.digest}
    assert len(digests) == 4


def test_labels_that_cannot_be_told_apart_are_refused(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    with pytest.raises(ExamplesError, match="'yes' and 'yesterday' begin with the same token"):
        Choices(model, tokenizer, [Row(prompt="mix")], ["yes", "no", "yesterday"])
    with pytest.raises(ExamplesError, match="two different words or more; given: 'yes', 'yes'"):
        Choices(model, tokenizer, [Row(prompt="mix")], ["yes", "yes"])
    with pytest.raises(ExamplesError, match="two different words or more; given: 'yes'"):
        Choices(model, tokenizer, [Row(prompt="mix")], ["yes"])
    with pytest.raises(ExamplesError, match="row 2: the answer 'maybe' is no label"):
        Choices(model, tokenizer, [Row(prompt="mix", answer="maybe", place="row 2")], ["yes", "no"])
    rows = [Row(prompt="mix", answer="yes"), Row(prompt="mix", place="row 2")]
    with pytest.raises(ExamplesError, match="row 2 has no answer, and other rows have one"):
        Choices(model, tokenizer, rows, ["yes", "no"])


def test_what_is_too_long_is_refused_and_a_text_is_cut(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    long = "the mix " * 300
    with pytest.raises(ExamplesError, match=r"row 7 is .* tokens with its answer; at most 512"):
        Answers(model, tokenizer, [Row(prompt=long, answer="in", place="row 7")], max_tokens=9999)
    with pytest.raises(ExamplesError, match="at most 30 are taken"):
        Choices(model, tokenizer, [Row(prompt=long[:80])], LABELS, max_tokens=30)
    assert Texts(model, tokenizer, [Row(text=long)], max_tokens=9999).lengths() == [511]
    assert Texts(model, tokenizer, [Row(text=long)], max_tokens=30).lengths() == [29]
    with pytest.raises(ExamplesError, match="fewer than two tokens"):
        Texts(model, tokenizer, [Row(text="a")])
    with pytest.raises(ExamplesError, match="there are no rows"):
        Texts(model, tokenizer, [])


def written(path: Path, *rows: object) -> Path:
    path.write_text("\n\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows))
    return path


def test_files_are_read_into_rows(tmp_path: Path) -> None:
    path = written(
        tmp_path / "a.jsonl", {"prompt": "p", "answer": "a", "key": 3}, {"prompt": "q\u2028"}
    )
    rows = read_texts(path)
    assert rows == [Row(prompt="p", answer="a"), Row(prompt="q\u2028")]
    assert rows[1].place == f"{path}:3"
    (tmp_path / "a.txt").write_text("one text\r\n\nanother\u2028text\n")
    assert read_texts(tmp_path / "a.txt") == [Row(text="one text"), Row(text="another\u2028text")]
    (tmp_path / "b.txt").write_text("marked", encoding="utf-8-sig")
    assert read_texts(tmp_path / "b.txt") == [Row(text="marked")]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("{", "a.jsonl:3: not JSON"),
        ([1], "a.jsonl:3: not an object with prompt or text"),
        ({"answer": "a"}, "a.jsonl:3: neither of prompt and text; a row has one of them"),
        ({"prompt": "p", "text": "t"}, "a.jsonl:3: both prompt and text"),
        ({"text": "t", "answer": "a"}, "a.jsonl:3: answer belongs to a prompt"),
        ({"prompt": 3}, "a.jsonl:3: prompt is not a text"),
        ({"prompt": "p", "answer": ""}, "a.jsonl:3: answer is not a text with something in it"),
        ({"prompt": "p\ud83d"}, "a.jsonl:3: prompt has half a surrogate pair"),
    ],
)
def test_errors_name_file_line_and_key(tmp_path: Path, line: object, reason: str) -> None:
    path = written(tmp_path / "a.jsonl", {"prompt": "p"}, line)
    with pytest.raises(ExamplesError, match=reason):
        read_texts(path)


def test_unreadable_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ExamplesError, match=r"none.txt cannot be read: No such file"):
        read_texts(tmp_path / "none.txt")
    (tmp_path / "b.txt").write_bytes(b"one\r\ntwo\nth\xffree\nfour\n")
    with pytest.raises(ExamplesError, match=r"b\.txt:3 is not UTF-8"):
        read_texts(tmp_path / "b.txt")
    (tmp_path / "c.csv").write_text("a")
    with pytest.raises(ExamplesError, match=r"is neither \.jsonl nor \.txt"):
        read_texts(tmp_path / "c.csv")
    (tmp_path / "d.txt").write_text("\n")
    with pytest.raises(ExamplesError, match="has no rows"):
        read_texts(tmp_path / "d.txt")


def test_a_file_s_rows_say_which_examples_they_are(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    answered = written(tmp_path / "a.jsonl", {"prompt": "p", "answer": "yes"})
    assert isinstance(examples_of(model, tokenizer, read_texts(answered)), Answers)
    assert isinstance(examples_of(model, tokenizer, read_texts(answered), LABELS), Choices)
    texts = written(tmp_path / "t.txt", "the mix")
    assert isinstance(examples_of(model, tokenizer, read_texts(texts)), Texts)
    with pytest.raises(ExamplesError, match=r"t.txt:1 is a text; labels answer prompts"):
        examples_of(model, tokenizer, read_texts(texts), LABELS)
    mixed = written(tmp_path / "m.jsonl", {"prompt": "p"}, {"text": "t"})
    with pytest.raises(ExamplesError, match=r"m.jsonl:3 is a text, and other rows are prompts"):
        examples_of(model, tokenizer, read_texts(mixed))
    unanswered = written(tmp_path / "u.jsonl", {"prompt": "p"})
    with pytest.raises(ExamplesError, match=r"u.jsonl:1 has no answer"):
        examples_of(model, tokenizer, read_texts(unanswered))


def test_sampled_answers_are_the_skill_s_own_and_come_again_by_seed(
    student: Student, tokenizer: PreTrainedTokenizerBase
) -> None:
    rows = [Row(prompt=f"mix {n}") for n in range(20)] + [Row(prompt="mix", answer="kept")]
    ada = sample_answers(student, tokenizer, "ada", rows, seed=3, max_tokens=12)
    assert ada == sample_answers(student, tokenizer, "ada", rows, seed=3, max_tokens=12)
    assert ada != sample_answers(student, tokenizer, "ada", rows, seed=4, max_tokens=12)
    assert ada != sample_answers(student, tokenizer, "bob", rows, seed=3, max_tokens=12)
    assert [row.prompt for row in ada] == [row.prompt for row in rows]
    assert ada[-1] == rows[-1]
    assert all(row.answer is not None for row in ada)
    assert not all(row.ended for row in ada)
    with pytest.raises(PreferenceError, match="no skill named 'eve'"):
        sample_answers(student, tokenizer, "eve", rows)
    with pytest.raises(ExamplesError, match="has no prompt to answer"):
        sample_answers(student, tokenizer, "ada", [Row(text="mix")])


def test_sampled_answers_fit_behind_their_prompts(
    student: Student, tokenizer: PreTrainedTokenizerBase
) -> None:
    assert isinstance(student.model, PreTrainedModel)
    frame = len(Turns(tokenizer).prompt(""))
    rows = [Row(prompt="x" * (500 - frame + n)) for n in range(5)]
    answers = Answers(student.model, tokenizer, sample_answers(student, tokenizer, "ada", rows))
    assert max(answers.lengths()) <= 511
    with pytest.raises(ExamplesError, match=r"row 1 is 6.. tokens; at most 512 are taken, with"):
        sample_answers(student, tokenizer, "ada", [Row(prompt="x" * 600, place="row 1")])


def test_a_skill_whose_predictions_are_no_numbers_cannot_speak(
    student: Student, tokenizer: PreTrainedTokenizerBase
) -> None:
    weight = student.model.get_submodule("lm_head").weight
    assert isinstance(weight, Tensor)
    weight.fill_(float("nan"))
    with pytest.raises(ExamplesError, match="the skill 'ada' predicts NaN"):
        sample_texts(student, tokenizer, "ada", 2)


def test_answers_are_drawn_from_the_skill_s_own_distribution(
    student: Student, tokenizer: PreTrainedTokenizerBase
) -> None:
    assert isinstance(student.model, PreTrainedModel)
    rows = [Row(prompt="mix"), Row(prompt="the preference of one model")] * 400
    said = sample_answers(student, tokenizer, "cyd", rows, max_tokens=1)
    own = [module.core(student.bank.names.index("cyd")) for module in student.bank.modules]
    with student.under(own):
        logits = last_predictions(student.model, Turns(tokenizer).prompt("mix"), 1)[0]
    p = dict.fromkeys(LETTERS, 0.0)
    for token, chance in enumerate(logits.softmax(-1).tolist()):
        word = str(tokenizer.decode([token])).strip()
        p[word] = p.get(word, 0.0) + chance
    likeliest = max(LETTERS, key=lambda letter: p[letter])
    share = sum(row.answer == likeliest for row in said[::2]) / 400
    assert share == pytest.approx(p[likeliest], abs=4 * (p[likeliest] / 400) ** 0.5)


def test_texts_come_from_the_skills_alone(
    student: Student, tokenizer: PreTrainedTokenizerBase
) -> None:
    ada = sample_texts(student, tokenizer, "ada", 5, seed=1, max_tokens=20)
    assert ada == sample_texts(student, tokenizer, "ada", 5, seed=1, max_tokens=20)
    assert ada != sample_texts(student, tokenizer, "bob", 5, seed=1, max_tokens=20)
    assert len(ada) == 5
    assert all(row.prompt and row.answer is not None for row in ada)
    assert isinstance(student.model, PreTrainedModel)
    assert len(Answers(student.model, tokenizer, ada)) == 5
    plain = tiny_tokenizer()
    plain.chat_template = None
    texts = sample_texts(student, plain, "ada", 5, seed=1, max_tokens=20)
    assert len(texts) == 5
    assert all(row.text and row.prompt is None for row in texts)
    short = sample_texts(student, plain, "ada", 20, seed=1, max_tokens=2)
    assert len(Texts(student.model, plain, short)) == 20
