"""The linear layers and the fingerprint of a base model, and what is no base model."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, BertConfig, PreTrainedModel, T5Config

from dynmerge.adapters.base_model import WINDOW, WINDOWS, BaseModel, fingerprint
from dynmerge.errors import BaseModelError

WEIGHTS = "model.safetensors"


@pytest.fixture
def copy(base_folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(base_folder, tmp_path / "copy"))


def edit_config(folder: Path, **fields: object) -> None:
    config = json.loads((folder / "config.json").read_text()) | fields
    (folder / "config.json").write_text(json.dumps(config))


def edit_weights(folder: Path, edit: Callable[[dict[str, Tensor]], object]) -> None:
    tensors = load_file(folder / WEIGHTS)
    edit(tensors)
    save_file(tensors, folder / WEIGHTS, {"format": "pt"})


def test_it_knows_every_linear_layer_by_name_and_shape(
    base: BaseModel, base_model: PreTrainedModel
) -> None:
    expected = {
        name: tuple(module.weight.shape)
        for name, module in base_model.named_modules()
        if isinstance(module, nn.Linear)
    }
    assert dict(base.linears) == expected
    assert base.linears["model.layers.1.self_attn.k_proj"] == (16, 32)
    assert base.embeddings == {"model.embed_tokens", "lm_head"}
    assert base.name == "tiny"


def test_the_fingerprint_stays_when_the_folder_moves(base: BaseModel, copy: Path) -> None:
    edit_config(copy, transformers_version="4.0", _name_or_path="/elsewhere")
    moved = BaseModel.open(str(copy))
    assert moved.name == "copy"
    assert moved.fingerprint == base.fingerprint


def test_the_fingerprint_is_the_same_in_shards(
    base: BaseModel, base_model: PreTrainedModel, tmp_path: Path
) -> None:
    base_model.save_pretrained(tmp_path / "tiny", max_shard_size="40KB")
    assert len(list((tmp_path / "tiny").glob("*.safetensors"))) > 1
    assert BaseModel.open(tmp_path / "tiny").fingerprint == base.fingerprint


def test_one_changed_weight_changes_the_fingerprint(base: BaseModel, copy: Path) -> None:
    edit_weights(copy, lambda t: t["model.layers.1.mlp.up_proj.weight"][3, 4].add_(1e-3))
    assert fingerprint(copy) != base.fingerprint


def test_a_fine_tune_of_one_large_tensor_changes_the_fingerprint(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    large = torch.zeros(WINDOW * WINDOWS, dtype=torch.bfloat16)
    seen = set()
    for place in (slice(0, 0), slice(0, 1), slice(-1, None), slice(None, None, 1000)):
        tuned = large.clone()
        tuned[place] = 1
        save_file({"w": tuned}, tmp_path / WEIGHTS)
        seen.add(fingerprint(tmp_path))
    assert len(seen) == 4


@pytest.mark.parametrize(
    "edit",
    [
        lambda t: t.update(w=t.pop("model.norm.weight")),
        lambda t: t.update({"model.norm.weight": t["model.norm.weight"].half()}),
        lambda t: t.update({"model.norm.weight": t["model.norm.weight"].reshape(1, -1)}),
        lambda t: t.update(scalar=torch.tensor(1.0)),
        lambda t: t.pop("model.norm.weight"),
    ],
    ids=["name", "dtype", "shape", "one more", "one fewer"],
)
def test_names_dtypes_and_shapes_are_in_the_fingerprint(
    edit: Callable[[dict[str, Tensor]], object], base: BaseModel, copy: Path
) -> None:
    edit_weights(copy, edit)
    assert fingerprint(copy) != base.fingerprint


def test_the_settings_are_in_the_fingerprint(base: BaseModel, copy: Path) -> None:
    edit_config(copy, rms_norm_eps=1e-3)
    assert fingerprint(copy) != base.fingerprint


def no_model(config: object) -> Callable[[Path], object]:
    return lambda folder: (folder / "config.json").write_text(json.dumps(config))


def pickles(folder: Path) -> None:
    (folder / WEIGHTS).rename(folder / "pytorch_model.bin")


def index(content: object) -> Callable[[Path], object]:
    def edit(folder: Path) -> None:
        (folder / WEIGHTS).unlink()
        (folder / f"{WEIGHTS}.index.json").write_text(json.dumps(content))

    return edit


def remote_code(folder: Path) -> None:
    (folder / "modeling_evil.py").write_text("raise SystemExit('remote code ran')")
    names = {"AutoConfig": "modeling_evil.C", "AutoModelForCausalLM": "modeling_evil.M"}
    edit_config(folder, model_type="evil", auto_map=names)


BROKEN: dict[str, tuple[Callable[[Path], object], str]] = {
    "no config": (lambda folder: (folder / "config.json").unlink(), "has no config.json"),
    "a config that is no JSON": (
        lambda folder: (folder / "config.json").write_text("{"),
        "config.json cannot be used",
    ),
    "a config that is a list": (no_model([1]), "config.json cannot be used"),
    "a config of no type": (no_model({"architectures": ["X"]}), "config.json cannot be used"),
    "an unknown type": (lambda f: edit_config(f, model_type="zebra"), "cannot be used.*zebra"),
    "a setting of a wrong type": (
        lambda f: edit_config(f, hidden_size="wide"),
        "config.json cannot be used",
    ),
    "a model that cannot be built": (
        lambda f: edit_config(f, hidden_act="zigzag"),
        "describes no model",
    ),
    "remote code": (remote_code, "cannot be used"),
    "an encoder": (
        no_model(BertConfig(architectures=["BertForMaskedLM"]).to_dict()),
        "it is BertForMaskedLM, which is no causal language model",
    ),
    "an encoder-decoder": (
        no_model(T5Config(architectures=["T5ForConditionalGeneration"]).to_dict()),
        "T5ForConditionalGeneration, which is no causal",
    ),
    "a classifier": (
        lambda f: edit_config(f, architectures=["LlamaForSequenceClassification"]),
        "LlamaForSequenceClassification, which is no causal",
    ),
    "no architecture": (lambda f: edit_config(f, architectures=None), "no architecture stated"),
    "no weights": (lambda folder: (folder / WEIGHTS).unlink(), "no model.safetensors"),
    "pickles": (pickles, "pickles, and dynmerge reads safetensors only.*save_pretrained"),
    "truncated weights": (
        lambda folder: (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:-9]),
        "model.safetensors cannot be read",
    ),
    "garbage": (lambda folder: (folder / WEIGHTS).write_bytes(b"x" * 99), "cannot be read"),
    "a missing shard": (index({"weight_map": {"w": "a.safetensors"}}), "names 'a.safetensors'"),
    "a shard elsewhere": (index({"weight_map": {"w": "../a.safetensors"}}), "is no file beside it"),
    "a broken index": (index([]), "index.json cannot be read"),
    "an index of numbers": (index({"weight_map": {"w": 1}}), "names '1'"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_what_is_no_base_model_is_refused(case: str, copy: Path) -> None:
    spoil, reason = BROKEN[case]
    spoil(copy)
    with pytest.raises(BaseModelError, match=f"(?s)base model 'copy': .*{reason}"):
        BaseModel.open(copy)


def test_it_is_built_as_the_engine_builds_it(base: BaseModel, base_folder: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(base_folder)
    assert set(base.linears) <= {name for name, _ in model.named_modules()}
