"""What an adapter may ask for: every setting and every tensor is honoured or refused by name."""

import dataclasses
import json
import os
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.other import get_pattern_key
from torch import Tensor

from dynmerge.adapters.base_model import BaseModel
from dynmerge.adapters.checkpoint import CONFIG, MAX_WEIGHTS_BYTES, WEIGHTS, load_adapter
from dynmerge.adapters.gate import INERT, REFUSED, LoraSettings
from dynmerge.errors import AdapterError
from tests.adapters.conftest import Edit, Edited

Q0 = "base_model.model.model.layers.0.self_attn.q_proj"
MODULES = [
    *(f"model.layers.{layer}.self_attn.{part}_proj" for layer in (0, 1, 10) for part in "qkvo"),
    *(f"model.layers.{layer}.mlp.{part}_proj" for layer in (0, 1, 10) for part in ("up", "down")),
    "model.layers.1.experts.0.up_proj",
    "lm_head",
]


def put(key: str, *shape: int, like: str | None = None) -> Edit:
    def edit(tensors: dict[str, Tensor]) -> None:
        tensors[key] = tensors[like].clone() if like else torch.ones(shape)

    return edit


def change(key: str, function: Callable[[Tensor], Tensor]) -> Edit:
    def edit(tensors: dict[str, Tensor]) -> None:
        tensors[key] = function(tensors[key])

    return edit


def rename(old: str, new: str) -> Edit:
    def edit(tensors: dict[str, Tensor]) -> None:
        for key in list(tensors):
            tensors[key.replace(old, new)] = tensors.pop(key)

    return edit


def spoil(value: float) -> Edit:
    def edit(tensors: dict[str, Tensor]) -> None:
        tensors[f"{Q0}.lora_B.weight"][1, 0] = value

    return edit


def only(part: str) -> Edit:
    def edit(tensors: dict[str, Tensor]) -> None:
        for key in [key for key in tensors if part not in key]:
            del tensors[key]

    return edit


def without(key: str) -> Edit:
    return lambda tensors: tensors.pop(key)


A0, B0 = f"{Q0}.lora_A.weight", f"{Q0}.lora_B.weight"

SETTINGS: dict[str, tuple[dict[str, object], str]] = {
    "another method": ({"peft_type": "LOHA"}, "`peft_type` is 'LOHA'; only 'LORA'"),
    "another task": ({"task_type": "SEQ_CLS"}, "`task_type` is 'SEQ_CLS'"),
    "no method": ({"peft_type": None}, "`peft_type` is None"),
    "biases": ({"bias": "lora_only"}, "`bias` is 'lora_only'"),
    "lora_B biases": ({"lora_bias": True}, "`lora_bias` is set"),
    "DoRA": ({"use_dora": True}, "`use_dora` is set: DoRA"),
    "saved modules": ({"modules_to_save": ["embed_tokens"]}, "`modules_to_save` is set"),
    "trained tokens": ({"trainable_token_indices": [1]}, "`trainable_token_indices` is set"),
    "bare parameters": ({"target_parameters": ["experts.up"]}, "`target_parameters` is set"),
    "replicated layers": ({"layer_replication": [[0, 1]]}, "`layer_replication` is set"),
    "aLoRA": ({"alora_invocation_tokens": [5]}, "`alora_invocation_tokens` is set"),
    "QALoRA": ({"use_qalora": True}, "`use_qalora` is set"),
    "BD-LoRA": ({"use_bdlora": {"nblocks": 2}}, "`use_bdlora` is set"),
    "Arrow": ({"arrow_config": {"top_k": 3}}, "`arrow_config` is set"),
    "KaSA": ({"kasa_config": {"beta": 0.1}}, "`kasa_config` is set"),
    "MonteCLoRA": ({"monteclora_config": {"num_samples": 8}}, "`monteclora_config` is set"),
    "VeLoRA": ({"velora_config": {"num_groups": 64}}, "`velora_config` is set"),
    "Megatron": ({"megatron_config": {"tp": 1}}, "`megatron_config` is set"),
    "unknown": ({"use_zlora": True}, "unknown setting 'use_zlora': refused rather than ignored"),
    "PiSSA": ({"init_lora_weights": "pissa_niter_4"}, "changes the base weights.*convert"),
    "OLoRA": ({"init_lora_weights": "OLoRA"}, "changes the base weights.*convert"),
    "CorDA": ({"init_lora_weights": "corda"}, "changes the base weights.*convert"),
    "LoftQ": ({"init_lora_weights": "loftq"}, "changes the base weights.*convert"),
    "LoRA-GA": ({"init_lora_weights": "lora_ga"}, "changes the base weights.*convert"),
    "unknown start": ({"init_lora_weights": "zen"}, "`init_lora_weights` is 'zen': unknown"),
    "start of a wrong type": ({"init_lora_weights": 3}, "`init_lora_weights` is 3: unknown"),
    "another base": ({"base_model_name_or_path": "org/huge"}, "trained on 'huge', not on 'tiny'"),
    "base of a wrong type": ({"base_model_name_or_path": 7}, "'base_model_name_or_path'"),
    "rank 0": ({"r": 0}, "'r': Input should be greater than 0"),
    "text for a rank": ({"r": "2"}, "'r': Input should be a valid integer"),
    "true for a rank": ({"r": True}, "'r': Input should be a valid integer"),
    "NaN for alpha": ({"lora_alpha": float("nan")}, "'lora_alpha': Input should be a finite"),
    "infinite alpha": ({"lora_alpha": float("inf")}, "'lora_alpha': Input should be a finite"),
    "endless alpha": ({"lora_alpha": 10**400}, "lora_alpha|not JSON"),
    "text for alpha": ({"lora_alpha": "8"}, "'lora_alpha': Input should be a valid number"),
    "null for alpha": ({"lora_alpha": None}, "'lora_alpha': Input should be a valid number"),
    "huge alpha": ({"lora_alpha": 1e300}, "scaling are not finite"),
    "text for rsLoRA": ({"use_rslora": "yes"}, "'use_rslora'"),
    "a list of ranks": ({"rank_pattern": [4]}, "'rank_pattern'"),
    "rank 0 in a pattern": ({"rank_pattern": {"q_proj": 0}}, "'rank_pattern.q_proj'"),
    "NaN in a pattern": ({"alpha_pattern": {"q_proj": float("nan")}}, "'alpha_pattern.q_proj'"),
    "a broken pattern": ({"rank_pattern": {"q_proj(": 2}}, "is no regular expression"),
    "no targets": ({"target_modules": None}, "'target_modules"),
    "targets by number": ({"target_modules": [1]}, "'target_modules"),
    "another rank than on disk": ({"r": 4}, "its settings say rank 4, its weights have 2"),
    "another rank by pattern": ({"rank_pattern": {"v_proj": 3}}, "say rank 3, its weights have 2"),
    "fewer targets than weights": ({"target_modules": ["q_proj"]}, "do not target"),
    "more targets than weights": ({"target_modules": "all-linear"}, "but it has no weights for it"),
    "weights outside the layers": ({"layers_to_transform": [0]}, "layers.1.*do not target"),
    "excluded weights": ({"exclude_modules": ["q_proj"]}, "q_proj', which.*do not target"),
    "layers beside an expression": (
        {"target_modules": ".*[qv]_proj", "layers_to_transform": [0, 1]},
        "mean nothing beside",
    ),
    "a layers pattern alone": ({"layers_pattern": "layers"}, "without `layers_to_transform`"),
    "true for a layer": ({"layers_to_transform": True}, "'layers_to_transform"),
}

TENSORS: dict[str, tuple[Edit, str]] = {
    "A without B": (without(B0), "q_proj' has no lora_B"),
    "B without A": (without(A0), "q_proj' has no lora_A"),
    "no tensors": (dict.clear, "holds no tensors"),
    "one module missing": (only("layers.0"), "target 'model.layers.1.*no weights"),
    "A of another width": (change(A0, lambda A: A[:, :-1]), "32 x 31, the base model's layer 32 x"),
    "B of another height": (
        change(B0, lambda B: B[:-2]),
        "30 x 32, the base model's layer 32 x 32",
    ),
    "A and B of two ranks": (change(B0, lambda B: B[:, :1]), "lora_A has rank 2, lora_B 1"),
    "rank 0": (change(A0, lambda A: A[:0]), "lora_A has shape .0, 32.; sharded training"),
    "flat A": (change(A0, torch.flatten), "lora_A has shape .64,."),
    "integers": (change(A0, lambda A: A.int()), "lora_A is torch.int32, not a float"),
    "8-bit floats": (change(A0, lambda A: A.to(torch.float8_e4m3fn)), "float8_e4m3fn, not a float"),
    "NaN": (
        spoil(float("nan")),
        "layers.0.self_attn.q_proj': its weights or their scaling are not",
    ),
    "infinity": (spoil(float("inf")), "not finite"),
    "magnitudes": (put(f"{Q0}.lora_magnitude_vector", 32), "unexpected tensor .*magnitude"),
    "a bias": (put(f"{Q0}.lora_B.bias", 32), "unexpected tensor .*bias"),
    "a base weight": (put(f"{Q0}.base_layer.weight", 32, 32), "unexpected tensor .*base_layer"),
    "a saved module": (put("base_model.model.lm_head.weight", 384, 32), "unexpected .*lm_head"),
    "a bare name": (rename("base_model.model.", ""), "unexpected tensor 'model.layers"),
    "an embedding": (
        put("base_model.model.model.embed_tokens.lora_embedding_A", 2, 384),
        "updates of embeddings are not supported",
    ),
    "the output embedding": (
        rename("model.layers.0.self_attn.q_proj", "lm_head"),
        "lm_head.*embed",
    ),
    "a module of another model": (rename("q_proj", "query"), "'tiny' has no linear layer.*query'"),
    "a path for a module": (rename("model.layers.0", "../../x"), "no linear layer '../../x"),
    "the adapters of two names": (
        rename("0.self_attn.q_proj.lora_A", "0.self_attn.q_proj.lora_A.x"),
        "several adapters: .'None', 'x'.",
    ),
    "the same factor twice": (put(f"{Q0}.lora_A.x.weight", like=A0), "several adapters"),
    "a very long name": (put("x" * 5000, 1), "unexpected tensor 'x{90,100}[.]{3}:"),
}


@pytest.mark.parametrize("case", SETTINGS)
def test_a_setting_that_cannot_be_honoured_is_refused_by_name(
    case: str, base: BaseModel, edited: Edited
) -> None:
    settings, reason = SETTINGS[case]
    with pytest.raises(AdapterError, match=f"(?s)adapter 'edited': .*{reason}"):
        load_adapter(edited(settings), base)


@pytest.mark.parametrize("case", TENSORS)
def test_a_tensor_that_cannot_be_honoured_is_refused_by_name(
    case: str, base: BaseModel, edited: Edited
) -> None:
    tensors, reason = TENSORS[case]
    with pytest.raises(AdapterError, match=f"(?s)adapter 'edited': .*{reason}"):
        load_adapter(edited(tensors=tensors), base)


@pytest.mark.parametrize("field", ["r", "lora_alpha", "target_modules", "peft_type"])
def test_what_decides_the_update_may_not_be_left_out(
    field: str, base: BaseModel, edited: Edited
) -> None:
    with pytest.raises(AdapterError, match=field):
        load_adapter(edited(drop=(field,)), base)


def test_single_experts_are_refused(base: BaseModel, edited: Edited) -> None:
    linears = {name.replace("self_attn", "experts"): shape for name, shape in base.linears.items()}
    mixture = dataclasses.replace(base, linears=linears)
    with pytest.raises(AdapterError, match="updates of single experts"):
        load_adapter(edited(tensors=rename("self_attn", "experts")), mixture)


def test_a_pattern_without_end_is_given_up(base: BaseModel, edited: Edited) -> None:
    folder = edited({"rank_pattern": {r"(a|.|\w|\.)*[!?]": 2}})
    with pytest.raises(AdapterError, match="too long"):
        load_adapter(folder, base)


def write(name: str, content: bytes) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_bytes(content)


def cut(folder: Path) -> None:
    content = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(content[:-100])


def overlap(folder: Path) -> None:
    tensor = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
    header = json.dumps({A0: tensor, B0: tensor}).encode()
    (folder / WEIGHTS).write_bytes(len(header).to_bytes(8, "little") + header + bytes(8))


def pickled(name: str) -> Callable[[Path], object]:
    return lambda folder: (folder / WEIGHTS).rename(folder / name)


FILES: dict[str, tuple[Callable[[Path], object], str]] = {
    "no settings": (lambda folder: (folder / CONFIG).unlink(), "no adapter_config.json"),
    "settings that are a folder": (
        lambda folder: [(folder / CONFIG).unlink(), (folder / CONFIG).mkdir()],
        "adapter_config.json is no ordinary file",
    ),
    "settings that are a loop": (
        lambda folder: [(folder / CONFIG).unlink(), (folder / CONFIG).symlink_to(CONFIG)],
        "adapter_config.json cannot be read",
    ),
    "weights that are a pipe": (
        lambda folder: [(folder / WEIGHTS).unlink(), os.mkfifo(folder / WEIGHTS)],
        "adapter_model.safetensors is no ordinary file",
    ),
    "huge weights": (
        lambda folder: os.truncate(folder / WEIGHTS, MAX_WEIGHTS_BYTES + 1),
        "larger than 17179869184 bytes",
    ),
    "settings that are text": (write(CONFIG, b"r = 2"), "is not JSON"),
    "settings that are no text": (write(CONFIG, b"\xff\xfe\x00"), "is not JSON"),
    "a list of settings": (write(CONFIG, b"[]"), "is not a JSON object"),
    "settings nested deep": (write(CONFIG, b"[" * 500_000), "is not JSON"),
    "huge settings": (write(CONFIG, b'{"r": 2' + b" " * (1 << 21) + b"}"), "larger than 1048576"),
    "no weights": (lambda folder: (folder / WEIGHTS).unlink(), "has no adapter_model.safetensors"),
    "pickled weights": (pickled("adapter_model.bin"), "adapter_model.bin.*safetensors only.*PEFT"),
    "a .pt file": (pickled("adapter_model.pt"), "adapter_model.pt.*safetensors only"),
    "a .pth file": (pickled("adapter_model.pth"), "adapter_model.pth.*safetensors only"),
    "truncated weights": (cut, "no whole safetensors file"),
    "overlapping tensors": (overlap, "no whole safetensors file"),
    "empty weights": (write(WEIGHTS, b""), "no whole safetensors file"),
    "garbage": (write(WEIGHTS, b"\x80\x02" * 500), "no whole safetensors file"),
    "a lying header": (write(WEIGHTS, b"\xff" * 8 + b"{}"), "no whole safetensors file"),
}


@pytest.mark.parametrize("case", FILES)
def test_a_file_that_cannot_be_read_is_refused(
    case: str, base: BaseModel, edited: Edited, tmp_path: Path
) -> None:
    spoil, reason = FILES[case]
    folder = edited()
    spoil(folder)
    with pytest.raises(AdapterError, match=f"(?s)adapter 'edited': .*{reason}") as caught:
        load_adapter(folder, base)
    assert str(tmp_path) not in str(caught.value)


def test_a_folder_that_is_not_there_is_refused(base: BaseModel, tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match=r"adapter 'none': it has no adapter_config.json"):
        load_adapter(tmp_path / "none", base)


def test_refusals_are_short_and_on_one_line(base: BaseModel, edited: Edited) -> None:
    settings = {"use_\nx" * 1000: True}
    with pytest.raises(AdapterError) as caught:
        load_adapter(edited(settings), base)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 300


HARMLESS: dict[str, dict[str, object]] = {
    "gaussian start": {"init_lora_weights": "gaussian"},
    "random start": {"init_lora_weights": False},
    "EVA": {"init_lora_weights": "eva", "eva_config": {"rho": 2.0}},
    "orthogonal start": {"init_lora_weights": "orthogonal"},
    "MiCA": {"init_lora_weights": "mica"},
    "fan-in fan-out": {"fan_in_fan_out": True},
    "dropout": {"lora_dropout": 0.1},
    "no patterns": {"rank_pattern": None, "alpha_pattern": None},
    "no task": {"task_type": None, "auto_mapping": {"base_model_class": "LlamaForCausalLM"}},
    "an unused setting from the future": {"zlora_config": None, "use_zlora": False},
    "every layer, by number": {"layers_to_transform": [0, 1]},
    "every layer, by list": {"layers_to_transform": [0, 1, 7], "layers_pattern": "layers"},
    "targets by expression": {"target_modules": r"model\.layers\.\d+\.self_attn\.(q|v)_proj"},
    "targets by full name": {
        "target_modules": [f"layers.{i}.self_attn.{part}_proj" for i in (0, 1) for part in "qv"]
    },
    "exclusions elsewhere": {"exclude_modules": ["k_proj"]},
    "the base by another path": {"base_model_name_or_path": "C:\\models\\Tiny\\"},
    "no base": {"base_model_name_or_path": None},
    "an empty base": {"base_model_name_or_path": ""},
}


@pytest.mark.parametrize("case", HARMLESS)
def test_a_setting_that_changes_nothing_is_taken(
    case: str, base: BaseModel, edited: Edited, adapter_folders: dict[str, Path]
) -> None:
    plain = load_adapter(adapter_folders["ada"], base)
    assert load_adapter(edited(HARMLESS[case]), base).digest == plain.digest


def test_another_base_is_taken_when_trusted_and_shapes_still_decide(
    base: BaseModel, edited: Edited
) -> None:
    folder = edited({"base_model_name_or_path": "org/other"})
    with pytest.raises(AdapterError, match=r"under two names, say trust_base=True$"):
        load_adapter(folder, base)
    assert load_adapter(folder, base, trust_base=True).base == "other"
    wide = dataclasses.replace(base, linears=dict.fromkeys(base.linears, (8, 8)))
    with pytest.raises(AdapterError, match="the base model's layer 8 x 8"):
        load_adapter(folder, wide, trust_base=True)


def test_every_setting_of_the_installed_peft_is_known() -> None:
    gated = {"peft_type", "task_type", "bias", "init_lora_weights"}
    known = {*LoraSettings.model_fields, *INERT, *REFUSED, *gated}
    assert {field.name for field in dataclasses.fields(LoraConfig)} <= known


names = st.sampled_from(
    [
        "q_proj",
        "self_attn.v_proj",
        "^model.layers.0.self_attn.q_proj",
        ".*layers.1.*",
        "layers.1.mlp.up_proj",
        "mlp.(up|down)_proj",
        "up_proj|q_proj",
        "x)|(q_proj",
        "layers.1",
        "lm_head",
        "proj",
    ]
)


@given(st.dictionaries(names, st.integers(1, 9)), st.dictionaries(names, st.integers(1, 9)))
def test_patterns_mean_what_they_mean_to_peft(
    ranks: dict[str, int], alphas: dict[str, int]
) -> None:
    settings = LoraSettings(
        r=16, lora_alpha=32, target_modules=["x"], rank_pattern=ranks, alpha_pattern=alphas
    )
    for module in MODULES:
        rank = ranks.get(get_pattern_key(ranks, module), 16)
        alpha = alphas.get(get_pattern_key(alphas, module), 32)
        assert settings.rank(module) == rank
        assert settings.scaling(module) == alpha / rank


@given(
    st.lists(st.sampled_from([*MODULES, "q_proj", "up_proj", "self_attn.v_proj", "proj"])),
    st.lists(st.sampled_from(["q_proj", "mlp.up_proj", MODULES[0]])) | st.just("model.*10.*"),
    st.none() | st.integers(0, 10) | st.lists(st.sampled_from([0, 1, 10])),
    st.sampled_from([None, [], "layers", ["h", "layers"], "experts", "layers|h", ["x"]]),
)
def test_targets_mean_what_they_mean_to_peft(
    targets: list[str],
    exclude: list[str] | str,
    layers: int | list[int] | None,
    pattern: str | list[str] | None,
) -> None:
    if layers is None:
        pattern = None
    chosen = {
        "target_modules": targets,
        "exclude_modules": exclude,
        "layers_to_transform": layers,
        "layers_pattern": pattern,
    }
    theirs = LoraConfig(**chosen)
    ours = LoraSettings(r=1, lora_alpha=1, **chosen)
    for module in MODULES:
        assert ours.targets(module) == (check_target_module_exists(theirs, module) is True)


@given(st.sampled_from([".*", r".*\.layers\.1\..*", "q_proj", r"model.*(q|up)_proj", "lm_head"]))
def test_an_expression_for_targets_must_match_the_whole_name(expression: str) -> None:
    ours = LoraSettings(r=1, lora_alpha=1, target_modules=expression)
    for module in MODULES:
        assert ours.targets(module) == bool(re.fullmatch(expression, module))


def test_all_linear_leaves_the_output_embedding_alone() -> None:
    settings = LoraSettings(r=1, lora_alpha=1, target_modules="All-Linear")
    assert settings.targets("model.layers.0.mlp.up_proj")
    assert not settings.targets("lm_head", output_embedding=True)
