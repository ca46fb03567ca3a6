"""What linear layers read: collected in padded batches, against one text at a time."""

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from torch import Tensor
from torch.testing import assert_close
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedModel

from dynmerge.calibration.moments import Moments, collect
from dynmerge.errors import ConfigError, ExamplesError
from tests import reference

TEXTS = [[5, 9, 200, 31, 7, 7], [40, 41], [300, 12, 13, 14]]
TARGETS = ["q_proj", "model.layers.1.mlp.down_proj"]
NAMES = [
    "model.layers.0.self_attn.q_proj",
    "model.layers.1.self_attn.q_proj",
    "model.layers.1.mlp.down_proj",
]


def padded(texts: Sequence[Sequence[int]]) -> dict[str, Tensor]:
    width = max(map(len, texts))
    ids = torch.tensor([[*text, *[0] * (width - len(text))] for text in texts])
    mask = torch.tensor([[1] * len(text) + [0] * (width - len(text)) for text in texts])
    return {"input_ids": ids, "attention_mask": mask}


def test_moments_are_those_of_the_texts_alone(base_model: PreTrainedModel) -> None:
    moments = collect(base_model, [padded(TEXTS[:2]), padded(TEXTS[2:])], TARGETS)
    assert sorted(moments.layers) == sorted(NAMES)
    for name, layer in moments.layers.items():
        texts = reference.layer_inputs(base_model, name, TEXTS)
        H = torch.cat(texts)
        assert (layer.tokens, layer.texts, layer.d_in) == (12, 3, H.shape[1])
        assert layer.gram.dtype == torch.float64
        assert_close(layer.second, H.mT @ H / 12, rtol=1e-4, atol=1e-5)
        mean = torch.stack([text.mean(0) for text in texts]).mean(0)
        assert_close(layer.mean, mean, rtol=1e-4, atol=1e-5)


def test_what_is_padded_does_not_matter(base_model: PreTrainedModel) -> None:
    batch = padded(TEXTS)
    filled = {**batch, "input_ids": batch["input_ids"] + 11 * (1 - batch["attention_mask"])}
    one, two = (collect(base_model, [given], TARGETS) for given in (batch, filled))
    for name in NAMES:
        assert torch.equal(one.layers[name].gram, two.layers[name].gram)
        assert torch.equal(one.layers[name].total, two.layers[name].total)


def test_without_a_mask_every_token_counts(base_model: PreTrainedModel) -> None:
    ids = torch.tensor([[5, 6, 7], [8, 9, 10]])
    moments = collect(base_model, [{"input_ids": ids}], TARGETS)
    assert {(layer.tokens, layer.texts) for layer in moments.layers.values()} == {(6, 2)}


def test_moments_of_parts_add_up(base_model: PreTrainedModel) -> None:
    parts = [collect(base_model, [padded([text])], TARGETS) for text in TEXTS]
    total = parts[0] + parts[1] + parts[2]
    whole = collect(base_model, [padded([text]) for text in TEXTS], TARGETS)
    for name in NAMES:
        assert_close(total.layers[name].gram, whole.layers[name].gram)
        assert_close(total.layers[name].mean, whole.layers[name].mean)
    with pytest.raises(ConfigError, match=r"only one of the two moments has .*down_proj"):
        total + collect(base_model, [padded(TEXTS)], ["q_proj"])


def test_the_model_is_left_as_it_was(base_model: PreTrainedModel) -> None:
    base_model.train()
    base_model.model.layers[0].eval()
    collect(base_model, [padded(TEXTS)], TARGETS)
    assert base_model.training
    assert not base_model.model.layers[0].training
    assert not any(part._forward_pre_hooks for part in base_model.modules())


def test_conv1d_counts_as_linear() -> None:
    config = GPT2Config(
        vocab_size=64, n_embd=16, n_layer=1, n_head=2, bos_token_id=1, eos_token_id=2
    )
    model = GPT2LMHeadModel(config).eval()
    moments = collect(model, [padded([[3, 4, 5], [6, 7]])], ["c_attn", "mlp.c_proj"])
    assert {name: layer.d_in for name, layer in moments.layers.items()} == {
        "transformer.h.0.attn.c_attn": 16,
        "transformer.h.0.mlp.c_proj": 64,
    }
    H = torch.cat(reference.layer_inputs(model, "transformer.h.0.attn.c_attn", [[3, 4, 5], [6, 7]]))
    gram = moments.layers["transformer.h.0.attn.c_attn"].gram
    assert_close(gram, H.mT @ H, rtol=1e-4, atol=1e-5)


def test_collect_names_what_is_wrong(base_model: PreTrainedModel) -> None:
    with pytest.raises(ConfigError, match=r"'qkv' \(known: q_proj, k_proj, .*lm_head\)"):
        collect(base_model, [padded(TEXTS)], ["q_proj", "qkv"])
    with pytest.raises(ConfigError, match="target_modules names no layer"):
        collect(base_model, [padded(TEXTS)], [])
    with pytest.raises(ExamplesError, match="q_proj read nothing"):
        collect(base_model, [], TARGETS)
    empty = padded(TEXTS)
    empty["attention_mask"][1] = 0
    with pytest.raises(ExamplesError, match="a row of a batch has no token"):
        collect(base_model, [empty], TARGETS)
    with pytest.raises(ConfigError, match=r"lm_head reads \(3, 1, 32\).*\(3, 6\)"):
        collect(base_model, [{**padded(TEXTS), "logits_to_keep": torch.tensor([5])}], ["lm_head"])
    with torch.no_grad():
        base_model.model.layers[0].self_attn.o_proj.weight.mul_(float("inf"))
    with pytest.raises(ExamplesError, match=r"layers.1.self_attn.q_proj reads NaN or infinity"):
        collect(base_model, [padded(TEXTS)], ["q_proj"])
    peft_model = get_peft_model(base_model, LoraConfig(r=2, target_modules=["q_proj"]))
    with pytest.raises(ConfigError, match="collect before get_peft_model"):
        collect(peft_model, [padded(TEXTS)], TARGETS)


def test_moments_survive_the_disk(base_model: PreTrainedModel, tmp_path: Path) -> None:
    path = tmp_path / "ada.safetensors"
    moments = collect(base_model, [padded(TEXTS)], TARGETS)
    moments.save(path)
    loaded = Moments.load(path)
    assert loaded.layers.keys() == moments.layers.keys()
    for name, layer in loaded.layers.items():
        assert torch.equal(layer.gram, moments.layers[name].gram)
        assert torch.equal(layer.total, moments.layers[name].total)
        assert (layer.tokens, layer.texts) == (12, 3)
    with pytest.raises(ExamplesError, match=r"none/ada.safetensors cannot be written"):
        moments.save(tmp_path / "none" / path.name)


def test_what_is_no_moments_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "file.safetensors"
    with pytest.raises(ExamplesError, match="does not hold moments"):
        Moments.load(path)
    path.write_text("no")
    with pytest.raises(ExamplesError, match="does not hold moments"):
        Moments.load(path)
    counts = torch.tensor([2, 1])
    for tensors in (
        {"q.weight": torch.ones(2)},
        {"q.counts": counts, "q.gram": torch.ones(2, 2)},
        {"q.counts": counts, "q.gram": torch.ones(2, 3), "q.total": torch.ones(2)},
        {"q.counts": 0 * counts, "q.gram": torch.ones(2, 2), "q.total": torch.ones(2)},
        {"q.counts": counts, "q.gram": torch.full((2, 2), torch.nan), "q.total": torch.ones(2)},
        {"q.counts": counts, "q.gram": torch.ones(2, 2), "q.total": torch.full((2,), torch.inf)},
    ):
        save_file(tensors, path)
        with pytest.raises(ExamplesError, match="does not hold moments"):
            Moments.load(path)
