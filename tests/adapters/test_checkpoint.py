"""An adapter is what PEFT makes of its folder, and PEFT makes the same of what is saved."""

import json
import math
import resource
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel
from peft.tuners.lora import LoraLayer
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, PreTrainedModel

from dynmerge.adapters.adapter import Adapter
from dynmerge.adapters.base_model import BaseModel
from dynmerge.adapters.checkpoint import (
    CONFIG,
    WEIGHTS,
    fetch_adapter,
    load_adapter,
    save_adapter,
)
from dynmerge.adapters.lowrank import LowRank
from dynmerge.errors import AdapterError
from tests import conftest, reference
from tests.adapters.conftest import Edited

IDS = torch.tensor([[5, 17, 301, 42, 8, 99]])
PATTERNS = {
    # Overlapping patterns, in the order in which PEFT writes them: it sorts the keys it saves.
    "patterns": LoraConfig(
        r=4,
        lora_alpha=9,
        use_rslora=True,
        target_modules=r".*\.(q_proj|up_proj|down_proj)",
        rank_pattern={".*layers.0.*": 3, "down_proj": 2, "q_proj": 5},
        alpha_pattern={".*attn.*": -3, "^model.layers.1.mlp.up_proj": 2.5, "up_proj": 6},
    ),
    "layers": LoraConfig(
        r=2, target_modules=["q_proj", "up_proj"], layers_to_transform=[1], layers_pattern="layers"
    ),
    "all": LoraConfig(r=1, lora_alpha=3, target_modules="all-linear", exclude_modules=["k_proj"]),
}


def peft_deltas(model: PreTrainedModel, folder: Path) -> dict[str, Tensor]:
    """Module name -> the delta PEFT would merge into the base weight, (d_out, d_in)."""
    peft = PeftModel.from_pretrained(model, folder)
    deltas = {}
    for name, layer in peft.get_base_model().named_modules():
        if isinstance(layer, LoraLayer):
            delta = layer.get_delta_weight("default").detach()
            deltas[name] = delta.T if layer.fan_in_fan_out else delta
    return deltas


def ours(adapter: Adapter) -> dict[str, Tensor]:
    return {name: reference.delta(adapter, name).float() for name in adapter.modules}


def random_adapter(
    linears: Mapping[str, tuple[int, int]], ranks: Mapping[str, int], seed: int = 0
) -> Adapter:
    rng = torch.Generator().manual_seed(seed)
    updates = {}
    for name, rank in ranks.items():
        d_out, d_in = linears[name]
        A = torch.randn(rank, d_in, generator=rng)
        B = torch.randn(d_out, rank, generator=rng)
        updates[name] = LowRank(A=A / 8, B=B / 8)
    return Adapter(updates, "tiny")


@pytest.mark.parametrize("name", conftest.ADAPTERS)
def test_the_update_is_what_peft_makes_of_the_folder(
    name: str, base: BaseModel, base_model: PreTrainedModel, adapter_folders: dict[str, Path]
) -> None:
    adapter = load_adapter(adapter_folders[name], base)
    assert_close(ours(adapter), peft_deltas(base_model, adapter_folders[name]), atol=1e-6, rtol=0)
    assert adapter.base == "tiny"


@pytest.mark.parametrize("name", PATTERNS)
def test_patterns_scaling_and_layers_are_honoured_as_peft_does(
    name: str, base: BaseModel, base_model: PreTrainedModel, base_folder: Path, tmp_path: Path
) -> None:
    folder = conftest.save_adapter(base_folder, tmp_path / name, PATTERNS[name], seed=7)
    adapter = load_adapter(folder, base)
    assert_close(ours(adapter), peft_deltas(base_model, folder), atol=1e-6, rtol=0)


def test_dees_patterns_reach_the_modules_they_name(
    base: BaseModel, adapter_folders: dict[str, Path]
) -> None:
    dee = load_adapter(adapter_folders["dee"], base)
    raw = load_file(adapter_folders["dee"] / WEIGHTS)
    expected = {  # alpha / rank
        "model.layers.0.self_attn.o_proj": 7 / 5,
        "model.layers.1.self_attn.o_proj": 7 / 1,
        "model.layers.0.mlp.down_proj": 3 / 5,
        "model.layers.1.mlp.gate_proj": 7 / 5,
    }
    for module, scaling in expected.items():
        B = raw[f"base_model.model.{module}.lora_B.weight"]
        assert_close(dee.modules[module].B, scaling * B)
        A = raw[f"base_model.model.{module}.lora_A.weight"]
        assert_close(dee.modules[module].A, A, atol=0, rtol=0)
    assert dee.ranks == (1, 5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_float_types_are_read_as_float32(
    dtype: torch.dtype, base: BaseModel, edited: Edited, adapter_folders: dict[str, Path]
) -> None:
    def cast(tensors: dict[str, Tensor]) -> None:
        tensors.update({key: tensor.to(dtype) for key, tensor in tensors.items()})

    adapter = load_adapter(edited(tensors=cast), base)
    plain = load_adapter(adapter_folders["ada"], base)
    for module, update in adapter.modules.items():
        assert update.A.dtype == update.B.dtype == torch.float32
        assert_close(update.delta(), plain.modules[module].delta(), atol=0.02, rtol=0.02)


def test_an_alpha_of_zero_is_honoured(base: BaseModel, edited: Edited) -> None:
    adapter = load_adapter(edited({"lora_alpha": 0}), base)
    assert all(not update.B.any() for update in adapter.modules.values())


def test_the_adapters_name_in_a_key_is_taken_off(
    base: BaseModel, edited: Edited, adapter_folders: dict[str, Path]
) -> None:
    def name(tensors: dict[str, Tensor]) -> None:
        for key in list(tensors):
            tensors[key.replace(".weight", ".default.weight")] = tensors.pop(key)

    plain = load_adapter(adapter_folders["ada"], base)
    assert load_adapter(edited(tensors=name), base).digest == plain.digest


def test_the_digest_is_of_the_content_and_of_all_of_it(
    base: BaseModel, edited: Edited, adapter_folders: dict[str, Path]
) -> None:
    plain = load_adapter(adapter_folders["ada"], base)

    def reverse(tensors: dict[str, Tensor]) -> None:
        turned = {key: tensors[key].double() for key in reversed(tensors)}
        tensors.clear()
        tensors.update(turned)

    def nudge(tensors: dict[str, Tensor]) -> None:
        tensors["base_model.model.model.layers.1.self_attn.v_proj.lora_A.weight"][1, 3] += 1e-6

    assert load_adapter(edited(tensors=reverse), base).digest == plain.digest
    assert load_adapter(edited(tensors=nudge), base).digest != plain.digest
    assert load_adapter(edited({"lora_alpha": 9}), base).digest != plain.digest


def test_a_file_changed_in_place_does_not_reach_a_loaded_adapter(
    base: BaseModel, edited: Edited
) -> None:
    folder = edited()
    adapter = load_adapter(folder, base)
    before = {module: update.A.clone() for module, update in adapter.modules.items()}
    size = (folder / WEIGHTS).stat().st_size
    with (folder / WEIGHTS).open("r+b") as file:
        file.write(bytes(size))
    with (folder / WEIGHTS).open("r+b") as file:
        file.truncate(10)
    assert_close({module: update.A for module, update in adapter.modules.items()}, before)


def test_files_may_be_links_as_in_the_hubs_cache(
    base: BaseModel, edited: Edited, tmp_path: Path
) -> None:
    folder = edited()
    linked = tmp_path / "models--org--ada" / "snapshots" / "abc"
    linked.mkdir(parents=True)
    for name in (CONFIG, WEIGHTS):
        (linked / name).symlink_to(folder / name)
    assert load_adapter(linked, base).digest == load_adapter(folder, base).digest
    (linked / WEIGHTS).unlink()
    with pytest.raises(AdapterError, match=r"adapter 'ada': it has no adapter_model.safetensors"):
        load_adapter(linked, base)


@pytest.mark.parametrize("name", conftest.ADAPTERS)
def test_peft_serves_a_saved_adapter_as_we_do(
    name: str,
    base: BaseModel,
    base_model: PreTrainedModel,
    adapter_folders: dict[str, Path],
    tmp_path: Path,
) -> None:
    adapter = load_adapter(adapter_folders[name], base)
    save_adapter(adapter, tmp_path / "saved", base_name="org/tiny")
    with torch.no_grad():
        plain = base_model(IDS).logits
        peft = PeftModel.from_pretrained(base_model, tmp_path / "saved")
        theirs = peft(IDS).logits
        written = reference.written_out(peft.unload(), ours(adapter))
        expected = written(IDS).logits
    assert_close(theirs, expected, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(theirs, plain, atol=0.1)
    assert load_adapter(tmp_path / "saved", base).digest == adapter.digest
    config = json.loads((tmp_path / "saved" / CONFIG).read_text())
    assert config["lora_alpha"] == config["r"]
    assert config["rank_pattern"] == config["alpha_pattern"]


def test_a_uniform_adapter_has_one_rank_and_the_same_update(
    base: BaseModel,
    base_model: PreTrainedModel,
    adapter_folders: dict[str, Path],
    tmp_path: Path,
) -> None:
    adapter = load_adapter(adapter_folders["dee"], base)
    save_adapter(adapter, tmp_path / "saved", base_name="org/tiny", uniform=True)
    again = load_adapter(tmp_path / "saved", base)
    assert again.ranks == (5,)
    assert json.loads((tmp_path / "saved" / CONFIG).read_text())["rank_pattern"] == {}
    assert_close(ours(again), ours(adapter), atol=0, rtol=0)
    assert_close(peft_deltas(base_model, tmp_path / "saved"), ours(adapter), atol=1e-6, rtol=0)


def test_conv1d_layers_of_gpt2_are_served_as_peft_does(tmp_path: Path) -> None:
    torch.manual_seed(3)
    config = GPT2Config(vocab_size=96, n_positions=32, n_embd=16, n_layer=2, n_head=2)
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "gpt")
    base = BaseModel.open(tmp_path / "gpt")
    assert base.linears["transformer.h.0.attn.c_attn"] == (48, 16)
    assert base.linears["transformer.h.1.mlp.c_proj"] == (16, 64)
    lora = LoraConfig(r=3, lora_alpha=7, target_modules=["c_attn", "c_proj"], fan_in_fan_out=True)
    folder = conftest.save_adapter(tmp_path / "gpt", tmp_path / "adapter", lora, seed=5)
    adapter = load_adapter(folder, base)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "gpt", dtype=torch.float32)
    assert_close(ours(adapter), peft_deltas(model, folder), atol=1e-6, rtol=0)
    save_adapter(adapter, tmp_path / "saved", base_name="gpt")
    assert load_adapter(tmp_path / "saved", base).digest == adapter.digest


LINEARS = {
    "model.layers.0.self_attn.q_proj": (6, 4),
    "model.layers.1.self_attn.q_proj": (6, 4),
    "model.layers.1.mlp.down_proj": (4, 7),
    "model.layers.10.mlp.down_proj": (4, 7),
}
TOY = BaseModel("tiny", Path("tiny"), "0", LINEARS, frozenset())


def write_adapter(folder: Path, adapter: Adapter, config: Mapping[str, object]) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    save_adapter(adapter, folder, base_name="tiny")
    stated = json.loads((folder / CONFIG).read_text()) | dict(config)
    (folder / CONFIG).write_text(json.dumps(stated))


@settings(max_examples=40, deadline=None)
@given(
    ranks=st.lists(st.integers(1, 5), min_size=4, max_size=4),
    alphas=st.lists(
        st.integers(-8, 64) | st.floats(-8, 64, allow_subnormal=False), min_size=4, max_size=4
    ),
    rslora=st.booleans(),
    seed=st.integers(0, 9),
)
def test_any_ranks_and_alphas_are_folded_into_B_once(
    ranks: list[int],
    alphas: list[float],
    rslora: bool,
    seed: int,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    rank_of, alpha_of = (
        dict(zip(LINEARS, ranks, strict=True)),
        dict(zip(LINEARS, alphas, strict=True)),
    )
    unscaled = random_adapter(LINEARS, rank_of, seed)
    folder = tmp_path_factory.getbasetemp() / "any"
    write_adapter(folder, unscaled, {"alpha_pattern": alpha_of, "use_rslora": rslora})
    adapter = load_adapter(folder, TOY)
    for module, update in adapter.modules.items():
        rank = rank_of[module]
        scaling = alpha_of[module] / (math.sqrt(rank) if rslora else rank)
        assert update.rank == rank
        assert_close(reference.delta(adapter, module), scaling * reference.delta(unscaled, module))
    shutil.rmtree(folder)
    save_adapter(adapter, folder, base_name="tiny")
    assert load_adapter(folder, TOY).digest == adapter.digest


def test_only_the_modules_with_a_rank_are_saved(tmp_path: Path) -> None:
    ranks = dict(zip(LINEARS, [2, 0, 3, 0], strict=True))
    save_adapter(random_adapter(LINEARS, ranks), tmp_path / "some", base_name="tiny")
    assert load_adapter(tmp_path / "some", TOY).ranks == (2, 3)
    with pytest.raises(AdapterError, match="'none': there is no module to save"):
        save_adapter(Adapter({}, "tiny"), tmp_path / "none", base_name="tiny")


def test_factors_that_share_memory_or_are_strided_are_saved(tmp_path: Path) -> None:
    shared = torch.randn(3, 4)
    q0, q1, *_ = LINEARS
    updates = {name: LowRank(A=shared[::2], B=torch.ones(2, 6).T) for name in (q0, q1)}
    save_adapter(Adapter(updates, "tiny"), tmp_path / "saved", base_name="tiny")
    loaded = load_adapter(tmp_path / "saved", TOY)
    assert_close(loaded.modules[q1].A, shared[::2], atol=0, rtol=0)
    with safe_open(tmp_path / "saved" / WEIGHTS, framework="pt") as file:
        assert file.metadata() == {"format": "pt"}


@contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """Let writes beyond `size` bytes fail, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_leaves_nothing_behind(tmp_path: Path) -> None:
    adapter = random_adapter(LINEARS, dict.fromkeys(LINEARS, 200))
    with (
        files_of_at_most(2000),
        pytest.raises(AdapterError, match="'full' cannot be written") as caught,
    ):
        save_adapter(adapter, tmp_path / "full", base_name="tiny")
    assert str(tmp_path) not in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_an_existing_folder_is_never_overwritten(base: BaseModel, edited: Edited) -> None:
    folder = edited()
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(AdapterError, match="'edited': a file or folder of that name exists"):
        save_adapter(load_adapter(folder, base), folder, base_name="tiny")
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]


def test_fetching_a_local_folder_is_no_more_than_naming_it(edited: Edited, tmp_path: Path) -> None:
    folder = edited()
    assert fetch_adapter(folder) == folder
    assert fetch_adapter(str(tmp_path), subfolder="edited") == folder


@pytest.mark.parametrize("subfolder", ["../edited", "a/../../edited", "/etc"])
def test_a_subfolder_stays_inside(subfolder: str, edited: Edited) -> None:
    with pytest.raises(AdapterError, match="leaves the adapter's own folder"):
        fetch_adapter(edited(), subfolder=subfolder)


def test_a_subfolder_that_is_not_there_is_refused(edited: Edited) -> None:
    with pytest.raises(AdapterError, match="'edited' has no folder 'step-10'"):
        fetch_adapter(edited(), subfolder="step-10")
