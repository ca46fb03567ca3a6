"""`dynmerge evaluate`, end to end on the tiny bank."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from dynmerge.bank.calibration import Calibration
from dynmerge.bank.storage import add_calibration, load_bank
from dynmerge.merging.choice import parse_method
from dynmerge.preference import Preference
from dynmerge.recipe import Recipe
from tests.cli.conftest import Run

TASKS = """
ada: {file: ada.jsonl, limit: 6}
bob:
  file: bob.jsonl
  labels: ["yes", "no"]
"""


@pytest.fixture
def bank(built: Path) -> Path:
    return built


@pytest.fixture
def tasks(tmp_path: Path) -> Path:
    rows = [{"prompt": f"mix {n}", "answer": "abcdefgh"[n:], "key": n} for n in range(8)]
    (tmp_path / "ada.jsonl").write_text("\n".join(map(json.dumps, rows)))
    rows = [{"prompt": f"mix {n}", "answer": ("yes", "no")[n % 2]} for n in range(8)]
    (tmp_path / "bob.jsonl").write_text("\n".join(map(json.dumps, rows)))
    path = tmp_path / "tasks.yaml"
    path.write_text(TASKS)
    return path


def test_evaluate_writes_numbers_tables_and_figures(
    run: Run, bank: Path, tasks: Path, tmp_path: Path
) -> None:
    out = tmp_path / "new" / "out"
    code, shown, _ = run(
        "evaluate", bank, tasks, "-o", out, "--methods", "linear, ties;  density=0.3",
        "-m", "pico+linear", "-p", "grid:2", "-p", "corners uniform", "-p", "ada=0.7, cyd=0.3",
        "--samples", 100, "--batch", 3,
    )  # fmt: skip
    assert code == 0
    assert shown.splitlines()[-1] == str(out)
    data = json.loads((out / "results.json").read_text())
    # The corners are on the grid, and so are equal shares: no merge is evaluated twice.
    wishes = ["ada=1", "ada=0.5, bob=0.5", "bob=1", "ada=0.7, cyd=0.3"]
    methods = ["linear", "ties;density=0.3", "pico+linear"]
    assert [(merge["method"], merge["preference"]) for merge in data["merges"]] == [
        (method, wish) for method in methods for wish in wishes
    ]
    assert data["bank"] == load_bank(bank).digest
    assert len(data["tasks"]["ada"]["predictions"]) == 6
    assert data["tasks"]["bob"]["predictions"] == [1] * 8
    assert len(data["merges"][5]["skills"]["bob"]["right"]) == 8
    expected = Recipe(Preference.of({"ada": 0.7, "cyd": 0.3}), parse_method("linear"), data["bank"])
    assert data["merges"][3]["recipe"] == expected.digest
    assert "| ties;density=0.3 | ada=1 |" in (out / "results.md").read_text()
    assert "own adapter" in shown
    for picture in ("curves.png", "front.png"):
        assert (out / picture).read_bytes().startswith(b"\x89PNG")


def test_by_default_what_the_bank_serves_at_the_corners_and_in_the_middle(
    run: Run, bank: Path, tasks: Path, tmp_path: Path
) -> None:
    learned = Path(shutil.copytree(bank, tmp_path / "learned"))
    tensors = {".p": torch.tensor(4.0)}
    digest = load_bank(learned).coordinates_digest
    add_calibration(learned, Calibration("tuned", "norm", digest, tensors))
    for folder, method in ((bank, "linear"), (learned, "tuned")):
        code, _, _ = run("evaluate", folder, tasks, "-o", tmp_path, "--samples", 100)
        assert code == 0
        data = json.loads((tmp_path / "results.json").read_text())
        assert [(merge["method"], merge["preference"]) for merge in data["merges"]] == [
            (method, wish) for wish in ("ada=0.5, bob=0.5", "ada=1", "bob=1")
        ]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("eve: {file: ada.jsonl}", "no skill named 'eve' (known: ada, bob, cyd)"),
        ("ada: {file: none.jsonl}", "none.jsonl cannot be read: No such file"),
        ("ada: {file: ada.jsonl, lables: [a, b]}", "ada.lables: no such key (known: file, labels"),
        ("ada: {file: ada.jsonl, limit: 0}", "limit: YAML reads 0 there; it is a whole number fr"),
        ("ada: {file: ada.jsonl, limit: 2.5}", "ada.limit: YAML reads 2.5 there; it is a whole n"),
        ("ada: {file: 3}", "ada.file: YAML reads 3 there; it is a path, in quotes if need be"),
        ("1: {file: ada.jsonl}", "the skill 1 is no text to YAML; put it in quotes"),
        ("ada: {labels: [a, b]}", "ada.file: write SKILL: {file: FILE}"),
        ("bob: {file: bob.jsonl, labels: [yes, no]}", "bob.labels.0: YAML reads True there; it is"),
        ("bob: {file: bob.jsonl, labels: [one]}", "bob: labels are two different words or more"),
        ("bob: {file: bob.jsonl, labels: [a, b, b]}", "yaml: bob: labels are two different words"),
        ("bob: {file: bob.jsonl, labels: [a, b]}", "bob.jsonl:1: the answer 'yes' is no label"),
        ("bob: {file: open.jsonl, labels: [a, b]}", "open.jsonl:1 has no answer"),
        ("bob: {file: open.jsonl}", "open.jsonl:1 has no answer"),
        ("ada", "the file: write SKILL: {file: FILE}"),
        ("[ada]", "the file: write SKILL: {file: FILE}"),
        ("ada: ada.jsonl", "ada: write SKILL: {file: FILE}"),
        ("{}", "names no skill"),
        ("ada: [", "is not YAML"),
        ("[" * 5000, "is not YAML: maximum recursion"),
        ("ada: {file: 2024-13-45}", "is not YAML: month must be in"),
        ("ada: {file: ada.jsonl}\nada: {file: bob.jsonl}", "is not YAML: ada stands there twice"),
        ('ada: {file: "a\\0b.jsonl"}', "cannot be read: embedded null byte"),
        ("ada: {file: ~nobody-here/a.jsonl}", "tasks.yaml: Could not determine home"),
        ("ada: {file: ada.jsonl, limit: yes}", "ada.limit: YAML reads True there; it is a whole"),
    ],
)
def test_a_wrong_task_is_named(
    run: Run, bank: Path, tasks: Path, tmp_path: Path, text: str, reason: str
) -> None:
    (tmp_path / "open.jsonl").write_text('{"prompt": "mix"}')
    tasks.write_text(text)
    code, out, err = run("evaluate", bank, tasks, "-o", tmp_path / "out", "--base", "/none")
    assert (code, out) == (2, "")
    assert reason in err
    assert "Traceback" not in err


def test_what_is_refused_leaves_no_folder(
    run: Run, bank: Path, tasks: Path, tmp_path: Path
) -> None:
    code, _, err = run("evaluate", bank, tasks, "-o", tmp_path / "new" / "out", "--base", "/none")
    assert code == 2
    assert "'none' is no folder here" in err
    tasks.write_text('bob: {file: bob.jsonl, labels: ["yes", "no", "yesterday"]}')
    code, _, err = run("evaluate", bank, tasks, "-o", tmp_path / "new" / "out")
    assert code == 2
    assert "bob: the labels 'yes' and 'yesterday' begin with the same token" in err
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (("-p", "eve=1"), "no skill named 'eve'"),
        (("-p", "grid:3"), "a grid of 3 steps is not even in thousandths"),
        (("-m", "tiez"), "--methods: no method 'tiez'"),
        (("-m", " , "), "--methods: ' , ' names none"),
        (("-m", ""), "--methods: '' names none"),
        (("-m", "lora-soups"), "--methods: lora-soups needs learned weights"),
        (("-m", "ties; , linear"), "--methods: 'ties;' is not a method"),
        (("-p", "grid:500", "--samples", 99_999), "99999 resamplings of 501 merges"),
    ],
)
def test_a_wrong_wish_is_named_before_the_model_is_loaded(
    run: Run, bank: Path, tasks: Path, tmp_path: Path, words: tuple[str, str], reason: str
) -> None:
    code, _, err = run("evaluate", bank, tasks, "-o", tmp_path / "out", *words, "--base", "/none")
    assert code == 2
    assert reason in err
    assert not (tmp_path / "out").exists()


def test_a_folder_that_cannot_be_is_refused(
    run: Run, bank: Path, tasks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code, _, err = run("evaluate", bank, tasks, "-o", tasks)
    assert code == 2
    assert "tasks.yaml cannot be a folder" in err
    with monkeypatch.context() as patched:
        patched.setattr(os, "access", lambda _, mode: mode != os.W_OK)
        code, _, err = run("evaluate", bank, tasks, "-o", tmp_path / "out", "--base", "/none")
    assert code == 2
    assert "cannot write into" in err
    code, _, err = run("evaluate", bank, tmp_path / "none.yaml", "-o", tmp_path / "out")
    assert code == 2
    assert "none.yaml cannot be read" in err


def test_raw_weights_are_told_as_such(run: Run, bank: Path, tasks: Path, tmp_path: Path) -> None:
    wishes = ("-p", "corners", "-p", "ada=2, bob=-1;raw")
    code, shown, _ = run("evaluate", bank, tasks, "-o", tmp_path, "--samples", 100, *wishes)
    assert code == 0
    assert "ada=2, bob=-1;raw" in shown
    data = json.loads((tmp_path / "results.json").read_text())
    assert [(merge["shares"], merge["raw_weights"]) for merge in data["merges"]] == [
        ({"ada": 1.0}, None),
        ({"bob": 1.0}, None),
        (None, {"ada": 2.0, "bob": -1.0}),
    ]
    assert data["methods"][0]["monotonicity"]["steps"] == 2


def test_an_adapter_that_overflows_is_refused_by_name(
    run: Run,
    base_folder: Path,
    adapter_folders: dict[str, Path],
    tasks: Path,
    tmp_path: Path,
) -> None:
    """With labels the share of the first one would count as its accuracy."""
    huge = Path(shutil.copytree(adapter_folders["ada"], tmp_path / "huge"))
    file = huge / "adapter_model.safetensors"
    scaled = {
        key: value * (1e37 if "lora_B" in key else 1.0) for key, value in load_file(file).items()
    }
    save_file(scaled, file)
    pairs = (f"--adapter=ada={huge}", f"--adapter=bob={adapter_folders['bob']}")
    folder, out = tmp_path / "bank", tmp_path / "out"
    assert run("build", base_folder, *pairs, "-o", folder)[0] == 0
    tasks.write_text('ada: {file: bob.jsonl, labels: ["yes", "no"]}')
    code, shown, err = run("evaluate", folder, tasks, "-o", out, "--samples", 100)
    assert (code, shown) == (2, "")
    assert "error: linear at ada=1 predicts NaN on the examples of 'ada'" in err
    assert not list(out.iterdir())
