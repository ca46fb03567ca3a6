import importlib
import itertools
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from torch.testing import assert_close
from transformers import PreTrainedModel

import dynmerge
from dynmerge.adapters.adapter import Adapter
from dynmerge.adapters.base_model import BaseModel
from dynmerge.adapters.checkpoint import load_adapter
from dynmerge.bank.calibration import Calibration
from dynmerge.bank.storage import add_calibration, load_bank, read_manifest
from dynmerge.merging.choice import parse_method
from dynmerge.merging.methods import METHODS, SCALE, STEPS
from tests import reference
from tests.cli.conftest import Run, exit_code

PREFERENCE = "ada=0.5, bob=0.2, dee=0.3"
WEIGHTS = {"ada": 0.5, "bob": 0.2, "dee": 0.3}
PROMPT = torch.arange(3, 40).reshape(1, -1)


@pytest.fixture(scope="module")
def adapters(base_folder: Path, adapter_folders: dict[str, Path]) -> dict[str, Adapter]:
    base = BaseModel.open(base_folder)
    return {name: load_adapter(folder, base) for name, folder in adapter_folders.items()}


def build_words(base: Path, adapters: dict[str, Path], bank: Path) -> list[str]:
    pairs = [f"--adapter={name}={folder}" for name, folder in adapters.items()]
    return ["build", str(base), *pairs, "-o", str(bank)]


@pytest.fixture(scope="module")
def bank(
    base_folder: Path, adapter_folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    folder = tmp_path_factory.mktemp("banks") / "bank"
    assert exit_code(*build_words(base_folder, adapter_folders, folder)) == 0
    return folder


def test_build_writes_a_bank_and_says_where(
    run: Run, base_folder: Path, adapter_folders: dict[str, Path], tmp_path: Path
) -> None:
    words = build_words(base_folder, adapter_folders, tmp_path / "bank")
    code, out, _ = run(*words)
    assert code == 0
    assert out.splitlines()[-1] == str(tmp_path / "bank")
    assert out.startswith("base    tiny, fingerprint ")
    built = load_bank(tmp_path / "bank")
    assert built.names == ("ada", "bob", "cyd", "dee")
    assert built.base.fingerprint == BaseModel.open(base_folder).fingerprint
    described = read_manifest(tmp_path / "bank")
    assert described.base.source == str(base_folder)
    assert described.tasks[2].provenance["source"] == str(adapter_folders["cyd"])
    assert described.tasks[2].provenance["use_rslora"] is True
    assert described.tasks[2].provenance["r"] == 4

    code, out, err = run(*words)
    assert (code, out) == (2, "")
    assert err == f"error: {tmp_path / 'bank'} already holds a bank; to replace it, say --replace\n"
    assert run(*words, "--replace")[0] == 0


def test_build_keeps_what_was_learned_for_the_same_factors_and_names_what_is_lost(
    run: Run, base_folder: Path, adapter_folders: dict[str, Path], tmp_path: Path
) -> None:
    folder = tmp_path / "bank"
    words = [*build_words(base_folder, adapter_folders, folder), "--replace"]
    run(*words)
    factors = load_bank(folder).coordinates_digest
    for method, p in (("core", 2.0), ("tuned", 3.0)):
        add_calibration(folder, Calibration(method, "norm", factors, {".p": torch.tensor(p)}))
    before = load_bank(folder)
    code, out, err = run(*words)
    assert (code, err) == (0, "")
    assert "keeps   what was learned for these factors: core, tuned\n" in out
    assert load_bank(folder).digest == before.digest

    (file,) = (entry.file.name for entry in read_manifest(folder).calibrations[1:])
    (folder / file).write_bytes(b"")
    code, out, err = run(*words)
    assert code == 0
    assert err.startswith(f"the calibration for tuned is lost: {folder / file} is 0 bytes")
    assert load_bank(folder).calibrated == ("core",)

    fewer = {name: adapter_folders[name] for name in ("ada", "bob")}
    code, out, err = run(*build_words(base_folder, fewer, folder), "--replace")
    assert code == 0
    assert err == "the calibration for core is lost: it was learned for other factors\n"
    assert "keeps   " not in out
    assert load_bank(folder).calibrated == ()
    assert [path.name for path in tmp_path.iterdir()] == ["bank"]


def test_build_replaces_a_bank_that_cannot_be_read(
    run: Run, base_folder: Path, adapter_folders: dict[str, Path], tmp_path: Path
) -> None:
    words = [*build_words(base_folder, adapter_folders, tmp_path / "bank"), "--replace"]
    run(*words)
    (tmp_path / "bank" / "bank.json").write_text("{}")
    code, _, err = run(*words)
    assert code == 0
    assert err.startswith("calibrations of the bank that was there, if any, are lost: ")
    assert "is not the description of a dynmerge bank" in err
    assert load_bank(tmp_path / "bank").names == ("ada", "bob", "cyd", "dee")


def test_build_refuses_an_adapter_of_another_base_unless_it_is_trusted(
    run: Run, base_folder: Path, adapter_folders: dict[str, Path], tmp_path: Path
) -> None:
    renamed = tmp_path / "renamed"
    renamed.symlink_to(base_folder)
    words = build_words(renamed, {"ada": adapter_folders["ada"]}, tmp_path / "bank")
    code, out, err = run(*words)
    assert (code, out) == (2, "")
    assert "adapter 'ada': it was trained on 'tiny', not on 'renamed'" in err
    assert err.endswith("under two names, say --trust-base\n")
    assert not (tmp_path / "bank").exists()
    assert run(*words, "--trust-base")[0] == 0


def test_build_names_the_skill_and_the_folder_of_a_bad_adapter(
    run: Run, base_folder: Path, adapter_folders: dict[str, Path], tmp_path: Path
) -> None:
    bad = tmp_path / "final"
    bad.mkdir()
    for source, complaint in (
        (bad, "adapter 'final': it has no adapter_config.json"),
        (tmp_path / "nowhere", "'nowhere' is no folder here"),
    ):
        words = build_words(base_folder, {**adapter_folders, "bob": source}, tmp_path / "bank")
        code, out, err = run(*words)
        assert (code, out) == (2, "")
        assert err.startswith(f"error: --adapter bob={source}: {complaint}")


def test_build_refuses_a_skill_named_like_the_base_before_it_reads_adapters(
    run: Run, base_folder: Path, tmp_path: Path
) -> None:
    words = build_words(base_folder, {"tiny": tmp_path / "nowhere"}, tmp_path / "bank")
    complaint = "error: a skill may not be named 'tiny': that names the base model itself\n"
    assert run(*words) == (2, "", complaint)


def test_build_leaves_what_it_may_not_replace(
    run: Run, base_folder: Path, adapter_folders: dict[str, Path], tmp_path: Path
) -> None:
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "text").write_text("mine")
    for output, complaint in (
        (tmp_path / "thesis", "is not empty and is not a bank"),
        (tmp_path / "thesis" / "text", "exists and is not a folder"),
        (tmp_path / "thesis" / "text" / "bank", "cannot write the bank"),
    ):
        words = build_words(base_folder, {"ada": adapter_folders["ada"]}, output)
        code, out, err = run(*words, "--replace")
        assert (code, out) == (2, "")
        assert complaint in err
    assert (tmp_path / "thesis" / "text").read_text() == "mine"


@pytest.mark.parametrize(
    ("adapters", "complaint"),
    [
        (["ada"], "'ada' is not NAME=SOURCE"),
        (["=x"], "'=x' is not NAME=SOURCE"),
        (["ada=x", "ada=y"], "'ada' is named twice"),
        ([], "Missing option '--adapter'"),
    ],
)
def test_build_explains_how_adapters_are_named(
    run: Run, tmp_path: Path, adapters: list[str], complaint: str
) -> None:
    words = [word for pair in adapters for word in ("-a", pair)]
    code, _, err = run("build", "base", *words, "-o", tmp_path / "bank")
    assert code == 2
    assert complaint in err


def test_inspect_shows_every_skill_and_pair(run: Run, bank: Path) -> None:
    code, out, _ = run("inspect", bank)
    assert code == 0
    lines = [line.split() for line in out.splitlines()]
    assert ["dee", "1,", "5", "6"] in [line[:4] for line in lines]
    assert ["ada,", "dee", "-", "-", "0"] in lines
    assert "\x1b" not in out


def test_an_error_is_one_line_on_stderr(run: Run, tmp_path: Path) -> None:
    expected = f"error: {tmp_path} is not a bank: it has no bank.json\n"
    assert run("inspect", tmp_path) == (2, "", expected)


def test_inspect_gives_json_and_a_picture(run: Run, bank: Path, tmp_path: Path) -> None:
    code, out, _ = run("inspect", bank, "--json", "--plot", tmp_path / "bank.png")
    assert code == 0
    assert json.loads(out)["digest"] == load_bank(bank).digest
    assert (tmp_path / "bank.png").read_bytes().startswith(b"\x89PNG")
    code, out, err = run("inspect", bank, "--plot", tmp_path / "bank.doc")
    assert (code, out) == (2, "")
    assert "bank.doc: its ending must be one of" in err


def test_full_inspection_adds_diagnostics_to_tables_json_and_pictures(
    run: Run, bank: Path, tmp_path: Path
) -> None:
    code, out, _ = run("inspect", bank, "--full", "--plot", tmp_path / "bank.png")
    assert code == 0
    assert "all B after Pico" in out
    assert "rank-1, singular" in out
    assert (tmp_path / "bank-full.png").read_bytes().startswith(b"\x89PNG")
    code, out, _ = run("inspect", bank, "--full", "--json")
    told = json.loads(out)
    assert (code, told["digest"]) == (0, load_bank(bank).digest)
    assert told["diagnostics"]["kinds"][-1]["name"] == "all"
    assert "sensitivity" not in told


def test_full_inspection_with_texts_runs_the_base_model(
    run: Run, bank: Path, base_folder: Path, tmp_path: Path
) -> None:
    words = []
    for skill in ("ada", "bob", "cyd", "dee"):
        file = tmp_path / f"{skill}.jsonl"
        row = {"prompt": f"Define: {skill}", "answer": f"a preference of {skill}"}
        file.write_text(json.dumps(row) + "\n")
        words += ["--texts", f"{skill}={file}"]
    code, out, _ = run("inspect", bank, "--full", *words)
    assert code == 0
    assert "Jacobian of the entropy at equal shares" in out
    code, out, _ = run("inspect", bank, "--full", "--json", "--base", base_folder, *words)
    assert code == 0
    assert json.loads(out)["sensitivity"]["skills"] == ["ada", "bob", "cyd", "dee"]


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["--texts", "ada=ada.jsonl"], "belongs to --full"),
        (["--full", "--base", "tiny"], "belongs to --texts"),
        (["--full", "--texts", "ada"], "'ada' is not SKILL=FILE"),
        (["--full", "--texts", "eve=x.jsonl"], "no skill named 'eve' (known: ada, bob, cyd, dee)"),
        (["--full", "--texts", "ada=x.jsonl"], "nothing for the skill 'bob'"),
        (
            [
                "--full",
                "--base=/none",
                *(f"--texts={name}=no.txt" for name in ["ada", "bob", "cyd", "dee"]),
            ],
            "no.txt cannot be read: No such file",
        ),
    ],
)
def test_full_inspection_refuses_texts_that_do_not_fit(
    run: Run, bank: Path, words: list[str], complaint: str
) -> None:
    code, out, err = run("inspect", bank, *words)
    assert (code, out) == (2, "")
    assert complaint in " ".join(err.replace("│", " ").split())


def test_inspect_shows_what_files_say_without_obeying_it(
    run: Run, base_folder: Path, adapter_folders: dict[str, Path], tmp_path: Path
) -> None:
    loud = tmp_path / "\x1b[31m[bold]red\x07"
    loud.symlink_to(adapter_folders["ada"])
    assert run(*build_words(base_folder, {"ada": loud}, tmp_path / "bank"))[0] == 0
    code, out, _ = run("inspect", tmp_path / "bank")
    assert code == 0
    assert "\ufffd[31m[bold]red\ufffd" in out
    assert not {"\x1b", "\x07"} & set(out)
    code, _, err = run("inspect", loud)
    assert code == 2
    assert "\ufffd[31m[bold]red\ufffd is not a bank" in err


def test_an_exported_merge_is_what_peft_loads_and_computes(
    run: Run,
    bank: Path,
    adapters: dict[str, Adapter],
    base_model: PreTrainedModel,
    tmp_path: Path,
) -> None:
    code, out, _ = run("export", bank, "-p", PREFERENCE, "-o", tmp_path / "mix")
    assert code == 0
    assert out.splitlines()[0].startswith(
        "merge   ada=0.5, bob=0.2, dee=0.3 by linear;p=1;scale=1, "
    )
    assert "keeps 100.00% of the energy" in out
    assert out.splitlines()[-1] == str(tmp_path / "mix")

    with torch.no_grad():
        plain = base_model(PROMPT).logits
        loaded = PeftModel.from_pretrained(base_model, tmp_path / "mix")
        found = loaded(PROMPT).logits
        written = reference.written_out(loaded.unload(), reference.merged_deltas(adapters, WEIGHTS))
        expected = written(PROMPT).logits
    assert (found - plain).abs().max() > 1
    assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_a_lower_rank_keeps_less(run: Run, bank: Path, tmp_path: Path) -> None:
    kept = []
    for rank in (6, 3, 1):
        code, out, _ = run(
            "export", bank, "-p", PREFERENCE, "--rank", rank, "-o", tmp_path / f"r{rank}"
        )
        assert code == 0
        line = out.splitlines()[1]
        assert line.startswith(f"rank    {rank}, which keeps ")
        kept.append(float(line.split()[-4].removesuffix("%")))
        config = json.loads((tmp_path / f"r{rank}" / "adapter_config.json").read_text())
        assert config["r"] == rank
    assert 100 > kept[0] > kept[1] > kept[2] > 0


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["-p", "eve=1"], "--preference, column 1: no skill named 'eve' (known: ada"),
        (["-p", "ada=x y"], "--preference, column"),
        (["-p", "base=1"], "asks for the base model: there is nothing to export"),
        (["-p", "ada=1", "-m", "nope"], "--method: no method 'nope' (known: linear"),
        (["-p", "ada=1", "--rank", "0"], "--rank"),
        ([], "Missing option '--preference'"),
    ],
)
def test_export_refuses_what_makes_no_adapter(
    run: Run, bank: Path, tmp_path: Path, words: list[str], complaint: str
) -> None:
    code, out, err = run("export", bank, *words, "-o", tmp_path / "mix")
    assert (code, out) == (2, "")
    assert complaint in err
    assert list(tmp_path.iterdir()) == []


def test_soup_weights_are_put_into_the_bank_and_a_bank_without_refuses_the_method(
    run: Run, bank: Path, base_folder: Path, adapter_folders: dict[str, Path], tmp_path: Path
) -> None:
    plain = load_bank(bank)
    soups = {module.name: dict.fromkeys(plain.names, 0.25) for module in plain.modules}
    (tmp_path / "soups.json").write_text(json.dumps(soups))
    words = build_words(base_folder, adapter_folders, tmp_path / "bank")
    assert run(*words, "--soup-weights", tmp_path / "soups.json")[0] == 0
    export = ("-p", "ada=1", "--method", "lora-soups", "-o", tmp_path / "merge")
    assert run("export", tmp_path / "bank", *export)[0] == 0
    code, _, err = run("export", bank, *export[:-1], tmp_path / "other")
    assert code == 2
    assert "lora-soups needs learned weights, which this bank does not carry" in err


@pytest.mark.parametrize(
    ("text", "says"),
    [(None, "No such file"), ("[]", "should be an object"), ('{"a": {"b": "1"}}', "a.b: ")],
)
def test_a_file_that_holds_no_soup_weights_is_refused_before_anything_is_built(
    run: Run, tmp_path: Path, text: str | None, says: str
) -> None:
    file = tmp_path / "soups.json"
    if text is not None:
        file.write_text(text)
    words = build_words(Path("no-such-base"), {"ada": Path("no-such")}, tmp_path / "bank")
    code, _, err = run(*words, "--soup-weights", file)
    assert code == 2
    assert f"--soup-weights {file}" in err
    assert says in err
    assert not (tmp_path / "bank").exists()


def test_export_writes_into_no_folder_that_is_there(run: Run, bank: Path, tmp_path: Path) -> None:
    code, _, err = run("export", bank, "-p", "ada=1", "-o", tmp_path)
    assert code == 2
    assert "exists already" in err


def test_export_of_a_merge_that_is_nothing_says_so(run: Run, bank: Path, tmp_path: Path) -> None:
    words = ("-p", "ada=1", "--method", "linear;scale=0", "-o", tmp_path / "merge")
    code, _, err = run("export", bank, *words)
    assert code == 2
    assert "leaves nothing of the merge" in err


def test_methods_lists_every_method_with_its_parameters(run: Run) -> None:
    code, out, _ = run("methods")
    assert code == 0
    blocks = iter(out.split("\n\n"))
    listed = [line.split()[0] for line in next(blocks).splitlines() if line[0] != " "]
    assert listed == list(METHODS)
    for name, row in (*METHODS.items(), *STEPS.items()):
        _, _, own = f"\n{out}".partition(f"\n{name} ")
        first, *rest = own.splitlines()
        assert first.strip() == row.summary
        parameters = [line.split()[0] for line in itertools.takewhile(is_indented, rest)]
        assert [text.partition("=")[0] for text in parameters] == [
            f";{parameter.name}" for parameter in row.parameters
        ]
        # Each is shown with its default, as a header would say it.
        text = "".join([f"linear+{name}" if name == "svc" else name, *parameters])
        assert parse_method(text) == parse_method(text.partition(";")[0])
    assert "pico+ties+svc" in out
    assert f";{SCALE.name}=1 " in out.rpartition("\n\n")[2]


def is_indented(line: str) -> bool:
    return line.startswith(" ")


def test_serve_refuses_a_configuration_before_it_serves(
    run: Run, bank: Path, tmp_path: Path
) -> None:
    code, out, err = run("serve", bank, "--host", "0.0.0.0")
    assert (code, out) == (2, "")
    assert err.startswith("error: host 0.0.0.0 is reachable from other machines")
    (tmp_path / "server.toml").write_text("prot = 80")
    code, _, err = run("serve", bank, "--config", tmp_path / "server.toml")
    assert code == 2
    assert "no setting named prot (known: host, port" in err
    code, _, err = run("serve", bank, "--dtype", "int3")
    assert code == 2
    assert "int3" in err or "float32" in err
    code, _, err = run("serve", tmp_path)
    assert code == 2
    assert "is not a bank" in err


def test_version_and_help_do_not_wait_for_torch() -> None:
    script = (
        "import sys\nfrom dynmerge.cli import main\n"
        "try: main(['--version'])\nfinally: print(*sys.modules, file=sys.stderr)"
    )
    ended = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert ended.stdout == f"{dynmerge.__version__}\n"
    assert not {"torch", "transformers", "matplotlib", "fastapi"} & set(ended.stderr.split())


def test_ctrl_c_exits_130_without_a_traceback(run: Run, bank: Path, tmp_path: Path) -> None:
    importlib.import_module("dynmerge.cli.serve")
    os.mkfifo(tmp_path / "server.toml")  # reading it waits for a writer who never comes

    def interrupt(_signal: int, _frame: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    signal.setitimer(signal.ITIMER_REAL, 0.3)
    try:
        code, out, err = run("serve", bank, "--config", tmp_path / "server.toml")
    finally:
        signal.signal(signal.SIGALRM, before)
    assert (code, out) == (130, "")
    assert "Traceback" not in err


def test_progress_is_shown_on_a_terminal_and_nowhere_else(bank: Path) -> None:
    terminal, shown = os.openpty()
    command = [sys.executable, "-m", "dynmerge.cli", "inspect", str(bank)]
    ended = subprocess.run(command, stdout=subprocess.PIPE, stderr=shown, check=True)
    assert b"comparing" in os.read(terminal, 1 << 16)
    assert b"comparing" not in ended.stdout
    os.close(terminal)
    os.close(shown)


def test_the_package_exports_what_it_says() -> None:
    assert len(set(dynmerge.__all__)) == len(dynmerge.__all__)
    for name in dynmerge.__all__:
        assert getattr(dynmerge, name).__doc__
    public = {name for name, value in vars(dynmerge).items() if isinstance(value, type)}
    assert public | {"__version__"} == set(dynmerge.__all__)
