"""`dynmerge calibrate`, end to end on the tiny bank."""

import io
import json
import os
import resource
import shutil
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.testing import assert_close

from dynmerge.bank.calibration import Calibration
from dynmerge.bank.edit import without
from dynmerge.bank.outline import Outline
from dynmerge.bank.storage import add_calibration, load_bank, read_manifest, save_bank
from dynmerge.calibration.train import Training
from dynmerge.cli import main
from dynmerge.cli.given import Given
from dynmerge.cli.state_folder import STATE, StateFolder
from dynmerge.errors import BankError, MethodError
from dynmerge.merging.choice import default_method, parse_method
from dynmerge.merging.merge import merge
from dynmerge.offer import Offer
from dynmerge.preference import Preference
from dynmerge.recipe import Recipe
from dynmerge.texts.rows import Row
from tests.cli.conftest import NAMES, Run


@pytest.fixture
def run(run: Run) -> Run:
    return partial(run, "calibrate")


@pytest.fixture
def bank(built: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(built, tmp_path / "bank"))


@pytest.fixture
def texts(tmp_path: Path) -> list[str]:
    """ada's prompts are answered, bob's are to be answered with a label, cyd has plain texts."""
    answered = [{"prompt": f"mix {n}", "answer": "abcdefgh"[n:]} for n in range(8)]
    chosen = [{"prompt": f"mix {n}", "answer": ("yes", "no")[n % 2]} for n in range(8)]
    (tmp_path / "ada.jsonl").write_text("\n".join(map(json.dumps, answered)))
    (tmp_path / "bob.jsonl").write_text("\n".join(map(json.dumps, chosen)))
    (tmp_path / "cyd.txt").write_text("\n".join(f"a mix {'of skills ' * n}" for n in range(1, 9)))
    files = {"ada": "ada.jsonl", "bob": "bob.jsonl", "cyd": "cyd.txt"}
    return [f"--texts={name}={tmp_path / file}" for name, file in files.items()]


def record_of(folder: Path, method: str) -> Mapping[str, Any]:
    return load_bank(folder).calibration(method).record


def test_a_new_version_of_the_bank_carries_what_was_learned(
    run: Run, bank: Path, texts: list[str]
) -> None:
    before = load_bank(bank)
    code, shown, _ = run(bank, "-m", "tara-a", *texts, "--labels=bob=yes,no", "--steps=2")
    assert code == 0
    after = load_bank(bank)
    assert after.calibrated == ("tara-a",)
    assert after.factors_digest == before.digest
    lines = shown.splitlines()
    assert lines[0].startswith("method  tara-a, form ratio, digest ")
    assert lines[1] == f"bank    {after.digest[:12]}"
    assert lines[-1] == str(bank)
    assert [line.split()[0] for line in lines[3:6]] == ["steps", "0", "2"]
    assert lines[4].split()[1] == "-"
    assert float(lines[5].split()[1]) > 0
    linear = next(line for line in lines if line.startswith("linear "))
    record = record_of(bank, "tara-a")
    assert float(linear.split()[-1]) == pytest.approx(record["linear"], rel=1e-3)
    assert lines[-2].startswith("now serves tara-a;scale=1 where nobody names a method (held-out s")
    assert "linear's" in lines[-2]
    assert record["texts"]["bob"]["examples"] == 6
    assert record["held_out"]["bob"]["examples"] == 2
    assert record["settings"]["steps"] == 2
    assert [path.name for path in bank.parent.glob(".*")] == []

    offer = Offer(Outline.of_manifest(read_manifest(bank)))
    wish = Preference.parse("ada=0.7, cyd=0.3")
    recipe = offer.recipe(wish, parse_method("tara-a"))
    assert merge(after, recipe).core is not None
    with pytest.raises(MethodError, match="BANK --method core makes it"):
        offer.recipe(wish, parse_method("core"))

    code, _, _ = run(
        bank, "-m", "tara-a", *texts, "--objective=labels", "--steps=1", "--form=bubbles"
    )
    assert code == 0
    again = load_bank(bank)
    assert again.calibrated == ("tara-a",)
    assert again.calibration("tara-a").form == "bubbles"
    code, _, _ = run(bank, "-m", "core", *texts, "--steps=1", "--batch=2", "--rate=0.01", "--mu=1")
    assert code == 0
    assert load_bank(bank).calibrated == ("core", "tara-a")
    settings = record_of(bank, "core")["settings"]
    assert [settings[key] for key in ("batch", "rate", "mu", "pull")] == [2, 0.01, 1, 0.001]


def test_without_texts_the_skills_make_their_own(run: Run, bank: Path) -> None:
    code, shown, _ = run(bank, "-m", "tuned", "--samples=8", "--seed=3")
    assert code == 0
    assert "linear;p=1 " in shown
    record = record_of(bank, "tuned")
    assert record["texts"] == {}
    assert [record["held_out"][name]["examples"] for name in NAMES] == [8, 8, 8]
    assert record["settings"] == {"method": "tuned", "objective": "distil", "seed": 3}


def test_what_only_the_held_out_score_chooses_holds_out_all_its_texts(
    run: Run, bank: Path, texts: list[str], tmp_path: Path
) -> None:
    (tmp_path / "cyd.txt").write_text("a mix of skills")
    code, _, _ = run(bank, "-m", "tuned", *texts)
    assert code == 0
    record = record_of(bank, "tuned")
    assert record["texts"] == {}
    assert [record["held_out"][name]["examples"] for name in NAMES] == [8, 8, 1]


def test_prompts_without_answers_are_answered_by_the_skill(
    run: Run, bank: Path, texts: list[str], tmp_path: Path
) -> None:
    (tmp_path / "open.jsonl").write_text("\n".join(['{"prompt": "mix"}'] * 4))
    (tmp_path / "guard.txt").write_text("\n".join(f"the mix {'of skills ' * n}" for n in range(8)))
    held_out = [f"--held-out={name}={tmp_path / 'guard.txt'}" for name in NAMES]
    texts[0] = f"--texts=ada={tmp_path / 'open.jsonl'}"
    code, _, _ = run(bank, "-m", "core", *texts, *held_out, "--steps=1", "--batch=1")
    assert code == 0
    record = record_of(bank, "core")
    assert record["texts"]["ada"]["examples"] == 4
    assert record["held_out"]["ada"]["examples"] == 8


def test_rows_that_repeat_others_count_once_and_lie_on_one_side(
    run: Run, bank: Path, texts: list[str], tmp_path: Path
) -> None:
    lines = [f"a mix of {'skills ' * n}" for n in (1, 2, 3, 4, 1, 1, 2, 5, 1)]
    (tmp_path / "cyd.txt").write_text("\n".join(lines))
    code, _, err = run(bank, "-m", "core", *texts, "--steps=1", "--batch=1")
    assert code == 0
    assert "cyd: 4 of 9 rows repeat others and are left out\n" in err
    assert "ada: " not in err
    record = record_of(bank, "core")
    assert record["texts"]["cyd"]["examples"] == 3
    assert record["held_out"]["cyd"]["examples"] == 2


LABELLED = Given({}, {}, {"bob": ["yes", "no"]})
OPEN = Given({}, {}, {})


def test_no_question_is_learned_from_and_held_out() -> None:
    rows = [Row(prompt=f"mix {n % 5}", answer=("yes", "no")[n % 2]) for n in range(20)]
    for given in (LABELLED, OPEN):
        learned, kept = given.split("bob", rows)
        question = given.questions("bob", rows)
        assert set(map(question, learned)).isdisjoint(map(question, kept))
        assert sorted(map(repr, [*learned, *kept])) == sorted({repr(row) for row in rows})
    # Among labels a prompt is one prediction, whatever the answer; else answers are what is asked.
    assert len({row.prompt for row in LABELLED.split("bob", rows)[1]}) == 2
    assert len(LABELLED.split("bob", rows)[1]) == 4
    assert len(OPEN.split("bob", rows)[1]) == 3


@pytest.mark.parametrize("period", [2, 4])
def test_a_guard_is_of_all_kinds_however_they_alternate(period: int) -> None:
    kinds = range(period)
    for given in (LABELLED, OPEN):
        rows = [Row(prompt=f"mix {n}", answer="abcd"[n % period]) for n in range(64)]
        learned, kept = given.split("bob", rows)
        assert (len(learned), len(kept)) == (48, 16)
        assert {row.answer for row in kept} == {"abcd"[kind] for kind in kinds}
    # Labels are known, and none is held out more than its share.
    counted = Counter(row.answer for row in LABELLED.split("bob", rows)[1])
    assert set(counted.values()) == {16 // period}
    languages = [Row(text=f"{'abcd'[n % period]} mix {n}") for n in range(64)]
    assert len({str(row.text)[0] for row in OPEN.split("bob", languages)[1]}) == period


def test_a_guard_is_drawn_by_what_rows_are_and_not_by_where_they_stand() -> None:
    rows = [Row(prompt=f"mix {n}", answer=("yes", "no")[n % 2]) for n in range(32)]
    for given in (LABELLED, OPEN):
        learned, kept = given.split("bob", rows)
        assert (learned, kept) == given.split("bob", rows)
        assert learned == [row for row in rows if row not in kept]
        assert set(given.split("bob", rows[::-1])[1]) == set(kept)
        assert kept != rows[::4]


def test_the_only_question_of_a_label_is_learned_from() -> None:
    for count in range(2, 10):
        rows = [Row(prompt=f"mix {n}", answer="yes") for n in range(count)]
        learned, kept = LABELLED.split("bob", [*rows, Row(prompt="rare", answer="no")])
        assert "no" in {row.answer for row in learned}
        assert len(kept) == -(-count // 4)
    both = [Row(prompt="mix", answer="yes"), Row(prompt="rare", answer="no")]
    assert [len(part) for part in LABELLED.split("bob", both)] == [1, 1]


def test_a_prompt_that_is_yet_to_be_answered_lies_on_one_side() -> None:
    rows = [Row(prompt=f"mix {n % 8}", answer="ab"[n % 2] if n < 24 else None) for n in range(40)]
    learned, kept = OPEN.split("ada", rows)
    assert {row.prompt for row in learned}.isdisjoint(row.prompt for row in kept)
    assert len({row.prompt for row in kept}) == 2


def test_prompts_without_answers_count_once(
    run: Run, bank: Path, texts: list[str], tmp_path: Path
) -> None:
    prompts = [{"prompt": f"mix {n % 8}"} for n in range(16)]
    (tmp_path / "ada.jsonl").write_text("\n".join(map(json.dumps, prompts)))
    code, _, err = run(bank, "-m", "core", *texts, "--steps=1", "--batch=1")
    assert code == 0
    assert "ada: 8 of 16 rows repeat others and are left out\n" in err
    record = record_of(bank, "core")
    assert [record[part]["ada"]["examples"] for part in ("texts", "held_out")] == [6, 2]
    (tmp_path / "ada.jsonl").write_text('{"prompt": "mix"}\n{"prompt": "mix", "answer": "a"}')
    code, _, err = run(bank, "-m", "core", *texts)
    assert code == 2
    assert "--texts ada: two different prompts are the least, so that one can be held out" in err


def test_what_a_skill_makes_up_and_its_guard_has_too_is_not_learned_from(
    run: Run, bank: Path, texts: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = [Row(prompt="mix", answer="b"), Row(prompt="mix 2", answer="b")]
    monkeypatch.setattr("dynmerge.cli.given.sample_texts", lambda *_: made)
    words = ("-m", "core", *texts[1:], f"--held-out=ada={tmp_path / 'guard.jsonl'}")
    for guard in ({"prompt": "mix", "answer": "b"}, {"prompt": "mix"}):
        (tmp_path / "guard.jsonl").write_text(json.dumps(guard))
        code, _, err = run(bank, *words, "--steps=1", "--batch=1")
        assert code == 0
        assert "ada: 1 of 2 rows are in what guards it and are left out\n" in err
        assert record_of(bank, "core")["texts"]["ada"]["examples"] == 1
    del made[1]
    code, _, err = run(bank, *words)
    assert code == 2
    assert "ada: all there is to learn from guards it too: give --texts ada" in err


def test_as_published_for_one_preference(run: Run, bank: Path, texts: list[str]) -> None:
    wish = ("--at", "ada=0.25, bob=0.75")
    code, _, _ = run(bank, "-m", "tara-b", *texts, "--published", "--steps=1", *wish)
    assert code == 0
    settings = record_of(bank, "tara-b")["settings"]
    assert [settings[key] for key in ("objective", "form", "mu", "rate", "normalise", "at")] == [
        "entropy", "fixed", 1.0, 0.005, False, [0.25, 0.75, 0.0]
    ]  # fmt: skip
    offer = Offer(Outline.of_manifest(read_manifest(bank)))
    offer.recipe(Preference.parse("ada=0.25, bob=0.75"), parse_method("tara-b"))
    with pytest.raises(MethodError, match=r"calibrated for one preference .*, ada=0\.25, bob=0"):
        offer.recipe(Preference.parse("ada=0.5, bob=0.5"), parse_method("tara-b"))


def test_closed_forms_train_nothing(run: Run, bank: Path, tmp_path: Path) -> None:
    given = []
    for name, words in zip(NAMES, ("am", "ix", "of"), strict=True):
        lines = [" ".join(words[(n >> bit) % 2] for bit in range(4)) for n in range(1, 13)]
        (tmp_path / f"{name}.txt").write_text("\n".join(lines))
        given.append(f"--texts={name}={tmp_path / name}.txt")
    code, shown, err = run(bank, "-m", "regmean", *given)
    assert (code, err.count("error")) == (0, 0)
    assert "linear " in shown
    code, _, err = run(bank, "-m", "adamerging", "--form=gauss-newton", *given)
    assert code == 2
    assert "no better than linear" in err
    carried = load_bank(bank)
    assert carried.calibrated == ("regmean",)
    for method in carried.calibrated:
        alone = Recipe(Preference.parse("bob"), parse_method(method), carried.digest)
        plain = replace(alone, method=default_method())
        mine, own = (merge(carried, recipe).core for recipe in (alone, plain))
        assert mine is not None
        assert own is not None
        assert_close(mine, own, atol=1e-5, rtol=1e-5)


def test_where_nothing_can_be_written_it_says_so_first(
    run: Run, built: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "access", lambda place, mode: place != built.parent)
    code, _, err = run(built, "-m", "tuned", "--base=/none")
    assert code == 2
    assert f"{built.parent} is not writable" in err


def test_a_disk_without_room_for_the_state_is_an_error_of_one_line(tmp_path: Path) -> None:
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limit[1]))
    try:
        with pytest.raises(BankError, match=r"cannot keep the training's state: .*too large"):
            StateFolder(tmp_path / "state").write({"tables": torch.zeros(1000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert list((tmp_path / "state").iterdir()) == []


def test_of_a_training_that_is_no_better_than_linear_nothing_stays(
    run: Run, built: Path, bank: Path, texts: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dynmerge.calibration.calibrate.best_score", lambda checks: float("inf"))
    code, _, err = run(bank, "-m", "tara-a", *texts, "--steps=1")
    assert code == 2
    assert "no better than linear's" in err
    assert load_bank(bank).digest == load_bank(built).digest
    assert [path.name for path in bank.parent.glob(".*")] == []


def saved(content: object) -> bytes:
    """As torch keeps it."""
    file = io.BytesIO()
    torch.save(content, file)
    return file.getvalue()


def test_what_was_stopped_half_way_goes_on(
    run: Run, built: Path, bank: Path, texts: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ("-m", "core", *texts, "--steps=26", "--batch=1")
    write, written, advance = StateFolder.write, list[int](), Training._advance

    def noted(self: StateFolder, state: Mapping[str, Any]) -> None:
        written.append(state["step"])
        write(self, state)

    def stopped(self: Training) -> None:
        if written:
            raise KeyboardInterrupt
        advance(self)

    monkeypatch.setattr(StateFolder, "write", noted)
    with monkeypatch.context() as patched:
        patched.setattr(Training, "_advance", stopped)
        code, _, err = run(bank, *words)
    assert code == 130
    assert "stopped at step 25: the same command goes on from there\n" in err
    assert load_bank(bank).digest == load_bank(built).digest
    (folder,) = bank.parent.glob(".bank.core-*.training")
    other = Path(shutil.copytree(bank, bank.parent / "other" / "bank"))
    shutil.copytree(folder, other.with_name(folder.name))

    def refused() -> str:
        code, out, err = run(bank, *words)
        assert (code, out) == (2, "")
        assert err.endswith(": --again starts afresh\n")
        return err.partition(f"error: {folder / STATE}: ")[2]

    whole = (folder / STATE).read_bytes()
    middle = len(whole) // 2
    flipped = bytes([*whole[:middle], whole[middle] ^ 1, *whole[middle + 1 :]])
    for content in (b"", b"no state", flipped, whole[:-1], saved({"step": 25})):
        (folder / STATE).write_bytes(content)
        assert refused().startswith("it is not as it was written")
    for strange in ({}, {"step": 25, "checks": [{"when": 25}]}):  # another version's
        write(StateFolder(folder), strange)
        assert "the state is none of this training (" in refused()
    (folder / STATE).unlink()
    (folder / STATE).mkdir()
    assert refused().startswith("something else is in its place")
    shutil.rmtree(folder)
    folder.write_text("")
    assert refused().startswith("something else is in its place")
    code, _, err = run(bank, *words, "--again")
    assert code == 0
    assert "going on" not in err
    assert written == [25, 25, 26]
    assert not folder.exists()

    # Another plan is another training, and leaves this one's state alone.
    code, _, _ = run(other, "-m", "core", *texts, "--steps=1", "--batch=1")
    assert code == 0
    code, _, err = run(other, *words)
    assert code == 0
    assert "going on from step 25 (--again starts afresh)\n" in err
    assert written == [25, 25, 26, 1, 26]
    assert load_bank(other).digest == load_bank(bank).digest
    assert [path.name for path in other.parent.glob(".*")] == []


@pytest.fixture
def at_the_first_check(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[], object]], None]:
    """What is given to it happens once, when a training keeps its state first."""
    write, waiting = StateFolder.write, list[Callable[[], object]]()

    def noted(self: StateFolder, state: Mapping[str, Any]) -> None:
        write(self, state)
        if waiting:
            waiting.pop()()

    monkeypatch.setattr(StateFolder, "write", noted)
    return waiting.append


def test_a_bank_replaced_meanwhile_ends_the_training_at_the_next_check(
    run: Run,
    bank: Path,
    texts: list[str],
    at_the_first_check: Callable[[Callable[[], object]], None],
) -> None:
    words = (bank, "-m", "core", *texts, "--steps=26", "--batch=1")
    before, source = load_bank(bank), read_manifest(bank).base.source
    at_the_first_check(lambda: save_bank(without(before, "cyd"), bank, replace=True))
    code, out, err = run(*words)
    assert (code, out) == (2, "")
    (folder,) = bank.parent.glob(".bank.core-*.training")
    assert (
        f"error: {bank} was replaced by a bank of other factors, which nothing learned here fits; "
        f"the same command goes on from {folder} while the bank has the factors that it had at "
        "first: else delete that folder\n"
    ) in err
    assert StateFolder(folder).read()["step"] == 25  # type: ignore[index]
    assert load_bank(bank).names == ("ada", "bob")
    save_bank(before, bank, source=source, replace=True)
    at_the_first_check(lambda: shutil.rmtree(bank))
    code, _, err = run(*words, "--again")
    assert code == 2
    assert f"no bank at {bank}: there is no such folder; the same command goes on from" in err


def test_what_others_learn_for_the_bank_meanwhile_ends_nothing(
    run: Run,
    bank: Path,
    texts: list[str],
    at_the_first_check: Callable[[Callable[[], object]], None],
) -> None:
    tensors = {".p": torch.tensor(2.0)}
    tuned = Calibration("tuned", "norm", load_bank(bank).coordinates_digest, tensors)
    at_the_first_check(lambda: add_calibration(bank, tuned))
    code, out, _ = run(bank, "-m", "core", *texts, "--steps=26", "--batch=1")
    assert code == 0
    assert load_bank(bank).calibrated == ("core", "tuned")
    assert "now serves tuned;scale=1 where nobody names a method (linear did)\n" in out


def test_a_bank_that_cannot_be_written_in_the_end_leaves_the_state_and_says_where(
    run: Run, bank: Path, texts: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise BankError("no room")

    words = (bank, "-m", "core", *texts, "--steps=1", "--batch=1")
    with monkeypatch.context() as patched:
        patched.setattr("dynmerge.cli.calibrate.add_calibration", full)
        code, _, err = run(*words)
    (folder,) = bank.parent.glob(".bank.core-*.training")
    assert code == 2
    assert f"error: no room; the same command goes on from {folder} while" in err
    code, _, err = run(*words)
    assert code == 0
    assert "going on from step 1 " in err


def test_help_says_which_method_takes_no_guard(run: Run) -> None:
    code, out, _ = run("--help")
    assert code == 0
    assert "Not for tuned, which holds" in " ".join(out.replace("│", " ").split())


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["-m", "ties"], "--method: nothing is learned for 'ties' (known: tuned, regmean, adamer"),
        (["-m", "core", "--texts=eve=x.txt"], "--texts: no skill named 'eve' (known: ada, bob"),
        (["-m", "core", "--held-out=eve=x"], "--held-out: no skill named 'eve'"),
        (["-m", "core", "--labels=eve=a,b"], "--labels: no skill named 'eve'"),
        (["-m", "core", "--labels=bob=a,b"], "--labels bob needs --texts bob=FILE"),
        (["-m", "core", "--objective=labels"], "--objective labels needs --texts ada=FILE"),
        (["-m", "core", "--texts=ada=none.txt"], "none.txt cannot be read: No such file"),
        (["-m", "core", "--at=ada=1"], "--at is for --form fixed; ratio serves every preference"),
        (["-m", "core", "--form=fixed", "--at=ada"], "one skill alone is its adapter"),
        (["-m", "core", "--form=fixed", "--at=eve"], "no skill named 'eve'"),
        (["-m", "core", "--form=fixed", "--at=ada=1;raw"], "without base or ;raw"),
        (["-m", "tuned", "--again"], "--again is not for tuned, which trains nothing"),
        (
            ["-m", "adamerging", "--form=gauss-newton", "--again"],
            "--again is not for gauss-newton, which trains nothing",
        ),
        (["-m", "core", "--base="], "Invalid value for '--base': it names no model"),
        (["-m", "core", "--form=fixed", "--at=ada=1, base=1"], "without base or ;raw"),
        (["-m", "core", "--form=gauss-newton"], "gauss-newton is for adamerging: the coeffic"),
        (
            ["-m", "adamerging", "--form=gauss-newton", "--objective=entropy"],
            "gauss-newton is the closed form of the objective distil; entropy has none",
        ),
        (["-m", "tara-a", "--form=gauss-newton", "--steps=9"], "--steps is not for gauss-newton"),
        (["-m", "regmean", "--rate=1"], "--rate is not for regmean, which trains nothing"),
        (["-m", "tuned", "--form=ratio"], "--form is not for tuned"),
        (
            ["-m", "tuned", "--texts=ada=x.txt", "--held-out=ada=y.txt"],
            "--held-out is not for tuned, which holds out all of --texts: give the rows of"
            " --held-out ada to --texts ada",
        ),
        (["-m", "tuned", "--objective=entropy"], "tuned is chosen by the held-out score"),
        (["-m", "core", "--seed=18446744073709551616"], "Invalid value for '--seed'"),
        (["-m", "core", "--mu=inf"], "Invalid value for '--mu'"),
        (["-m", "core", "--pull=inf"], "Invalid value for '--pull'"),
        (["-m", "core", "--published"], "--published is for adamerging, tara-a, tara-b; not"),
        (["-m", "tara-a", "--published", "--objective=distil"], "--published is --objective"),
        (["-m", "tara-a", "--published", "--form=ratio"], "--published is --form fixed; ratio is"),
    ],
)  # fmt: skip
def test_a_wrong_wish_is_named_before_the_model_is_loaded(
    run: Run, built: Path, words: list[str], reason: str
) -> None:
    code, out, err = run(built, "--base=/none", *words)
    assert (code, out) == (2, "")
    assert reason in " ".join(err.replace("│", " ").split())
    assert "Traceback" not in err


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["--samples=9999"], "--samples is for skills without --texts, and every skill has some"),
        (["--seed=7"], "--seed: nothing is drawn for tuned, all of whose texts are given"),
        (
            ["--labels=bob=yes"],
            "--labels bob: labels are two different words or more; given: 'yes'",
        ),
        (["--labels=bob=yes,no,no"], "--labels bob: labels are two different words or more"),
        (["--labels=bob=yes,"], "given: 'yes', ''"),
        (["--labels=bob=yes,on"], "bob.jsonl:2: the answer 'no' is no label"),
        (["--labels=cyd=yes,no"], "cyd.txt:1 is a text; labels answer prompts"),
    ],
)
def test_what_texts_leave_no_use_for_is_named_before_the_model_is_loaded(
    run: Run, built: Path, texts: list[str], tmp_path: Path, words: list[str], reason: str
) -> None:
    given = [word.format(folder=tmp_path) for word in words]
    code, out, err = run(built, "-m", "tuned", "--base=/none", *texts, *given)
    assert (code, out) == (2, "")
    assert reason in err


@pytest.mark.parametrize(
    ("name", "rows", "words", "reason"),
    [
        ("cyd", [{"text": f"a mix {'of skills ' * n}"} for n in range(1, 9)], [], "8 of its 8"),
        ("cyd", [{"text": "another"}, {"text": "a mix of skills "}], [], "1 of its 2"),
        ("ada", [{"prompt": "mix 9", "answer": "b"}, {"prompt": "mix 1", "answer": "bcdefgh"}], [],
         "1 of its 2"),
        # What the skill will answer is nobody's to know.
        ("ada", [{"prompt": f"mix {n}"} for n in range(8)], [], "8 of its 8"),
        ("ada", [{"prompt": "mix 9"}, {"prompt": "mix 1"}], [], "1 of its 2"),
        # Which label is right makes no other prediction.
        ("bob", [{"prompt": "mix 9"}, {"prompt": "mix 1"}], ["--labels=bob=yes,no"], "1 of its 2"),
    ],
)  # fmt: skip
def test_a_guard_that_shares_a_row_with_what_is_learned_from_is_refused(
    run: Run,
    built: Path,
    texts: list[str],
    tmp_path: Path,
    name: str,
    rows: list[dict[str, str]],
    words: list[str],
    reason: str,
) -> None:
    guard = tmp_path / "guard.jsonl"
    guard.write_text("\n".join(map(json.dumps, rows)))
    given = (*texts, f"--held-out={name}={guard}", *words)
    code, out, err = run(built, "-m", "core", "--base=/none", *given)
    assert (code, out) == (2, "")
    place = 1 if reason.startswith("8") else 2
    assert (
        f"--held-out {name} shares {reason} rows with --texts {name}, such as {guard}:{place}: "
        "what is learned from guards nothing"
    ) in err


def test_labels_that_begin_alike_are_named_with_their_skill(
    run: Run, built: Path, texts: list[str]
) -> None:
    code, _, err = run(built, "-m", "tuned", *texts, "--labels=bob=yes,no,yesterday")
    assert code == 2
    assert "bob: the labels 'yes' and 'yesterday' begin with the same token" in err


@pytest.mark.parametrize(
    ("name", "content", "words", "reason"),
    [
        ("ada.jsonl", '{"prompt": "mix"}', ["--objective=labels"], "ada.jsonl:1 has no answer"),
        (
            "ada.jsonl",
            '{"prompt": "mix", "answer": "a"}\n' * 3,
            [],
            "--texts ada: two different rows are the least, so that one can be held out",
        ),
        (
            "bob.jsonl",
            '{"prompt": "mix", "answer": "yes"}\n{"prompt": "mix", "answer": "no"}',
            ["--labels=bob=yes,no"],
            "--texts bob: two different prompts are the least",
        ),
        (
            "bob.jsonl",
            '{"prompt": "mix", "answer": "a"}\n' * 2,
            ["--labels=bob=yes,no"],
            "no label",
        ),
        ("cyd.txt", "\n", [], "cyd.txt has no rows"),
        ("cyd.csv", "a", [], "cyd.csv is neither .jsonl nor .txt"),
        # Some rows are held out: apart, each part might be of one kind.
        (
            "ada.jsonl",
            '{"text": "a mix"}\n' + '{"prompt": "mix", "answer": "a"}\n' * 3,
            [],
            "ada.jsonl:1 is a text, and other rows are prompts",
        ),
    ],
)
def test_wrong_texts_are_named(
    run: Run,
    built: Path,
    texts: list[str],
    tmp_path: Path,
    name: str,
    content: str,
    words: list[str],
    reason: str,
) -> None:
    (tmp_path / name).write_text(content)
    given = [word for word in texts if f"={name[:3]}=" not in word]
    given.append(f"--texts={name[:3]}={tmp_path / name}")
    code, out, err = run(built, "-m", "core", *given, *words)
    assert (code, out) == (2, "")
    assert reason in err
    assert "Traceback" not in err


@pytest.fixture
def learned(bank: Path) -> Path:
    """The folder of a bank with two calibrations."""
    carried = load_bank(bank)
    for method, form, label in (("core", "fixed", "at"), ("tuned", "norm", "p")):
        tensors = {f".{label}": torch.tensor([0.5, 0.25, 0.25])}
        found = Calibration(method, form, carried.coordinates_digest, tensors)
        add_calibration(bank, found)
    return bank


def test_inspect_says_what_a_bank_carries_and_what_it_serves(
    built: Path, learned: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def shown(*words: object) -> str:
        with pytest.raises(SystemExit):
            main(["inspect", *map(str, words)])
        return capsys.readouterr().out

    assert "serves  linear;p=1;scale=1 where nobody names a method" in shown(built)
    lines = [line.split() for line in shown(learned).splitlines()]
    assert ["serves", "tuned;scale=1"] in [line[:2] for line in lines]
    for each in load_bank(learned).calibrations:
        assert [each.method, each.form, *"----", each.digest[:12]] in lines
    told = json.loads(shown(learned, "--json"))
    assert told["default_method"] == "tuned;scale=1"
    assert [each["method"] for each in told["calibrations"]] == ["core", "tuned"]


def test_what_was_learned_is_dropped(run: Run, built: Path, learned: Path) -> None:
    code, shown, _ = run(learned, "--drop=core")
    assert code == 0
    after = load_bank(learned)
    assert after.calibrated == ("tuned",)
    assert shown.splitlines() == ["dropped core", f"bank    {after.digest[:12]}", str(learned)]
    code, _, _ = run(learned, "--drop=tuned")
    assert code == 0
    assert load_bank(learned).digest == load_bank(built).digest


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["--drop=tara-a"], "no calibration for tara-a (it has: core, tuned)"),
        (["--drop=core", "--drop=tara-a"], "no calibration for tara-a (it has: core, tuned)"),
        (["--drop=core", "-m", "core"], "for --drop: it stands alone, without --method"),
        (["--drop=core", "--steps=1"], "for --drop: it stands alone, without --steps"),
        ([], "for --method: what to learn, or --drop METHOD to forget it, is missing"),
    ],
)
def test_what_cannot_be_dropped_changes_nothing(
    run: Run, learned: Path, words: list[str], reason: str
) -> None:
    before = (learned / "bank.json").read_bytes()
    code, out, err = run(learned, *words)
    assert (code, out) == (2, "")
    assert reason in " ".join(err.replace("│", " ").split())
    assert (learned / "bank.json").read_bytes() == before


def test_a_bank_of_one_skill_has_nothing_to_merge(
    run: Run, base_folder: Path, adapter_folders: dict[str, Path], tmp_path: Path
) -> None:
    folder, adapter = str(tmp_path / "alone"), f"--adapter=ada={adapter_folders['ada']}"
    with pytest.raises(SystemExit):
        main(["build", str(base_folder), adapter, "-o", folder])
    code, _, err = run(folder, "-m", "tuned")
    assert code == 2
    assert "ada is alone in the bank: there is nothing to merge" in err
