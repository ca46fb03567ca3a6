"""Fixtures: a tiny real base model and adapters that differ in rank, alpha, scaling rule and
modules.
"""

from collections.abc import Mapping
from pathlib import Path

import hypothesis
import pytest
import torch
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

torch.set_num_threads(1)
# A test asserts no time: a busy machine would fail it.
hypothesis.settings.register_profile("dynmerge", deadline=None)
hypothesis.settings.load_profile("dynmerge")

CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

# Ranks, alphas, scaling rules and targets all differ; `dee` shares no module with `ada`.
ADAPTERS: Mapping[str, LoraConfig] = {
    "ada": LoraConfig(r=2, lora_alpha=8, target_modules=["q_proj", "v_proj"]),
    "bob": LoraConfig(r=3, lora_alpha=5, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"]),
    "cyd": LoraConfig(r=4, lora_alpha=6, use_rslora=True, target_modules=["v_proj", "up_proj"]),
    "dee": LoraConfig(
        r=5,
        lora_alpha=7,
        target_modules=["o_proj", "gate_proj", "down_proj"],
        rank_pattern={"layers.1.self_attn.o_proj": 1},
        alpha_pattern={"down_proj": 3},
    ),
}


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE of about 320 tokens, trained on the spot, with a ChatML template."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(
        ["a preference chooses the mix of skills in one model"] * 4, trainer
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        bos_token=None,
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )


def tiny_model(seed: int = 0, head_dim: int = 8) -> LlamaForCausalLM:
    """A Llama of two layers, four heads over two key-value heads.

    vLLM's attention on a CPU takes a `head_dim` of 32 and more.
    """
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=384,
        hidden_size=4 * head_dim,
        intermediate_size=6 * head_dim,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        bos_token_id=None,
        eos_token_id=2,
        pad_token_id=0,
        tie_word_embeddings=False,
        # Wide initial weights: near-zero logits would make every comparison of texts pass.
        initializer_range=0.3 * (8 / head_dim) ** 0.5,
    )
    return LlamaForCausalLM(config).eval()


def save_adapter(
    base: Path, folder: Path, config: LoraConfig, seed: int, size: float = 0.2
) -> Path:
    """Save a PEFT adapter for the model in `base`, A and B random (PEFT starts with B zero)."""
    config = LoraConfig(**{**config.to_dict(), "task_type": "CAUSAL_LM"})
    torch.manual_seed(seed)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=size)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def base_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny base model and its tokenizer as an ordinary folder named `tiny`."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    tiny_model().save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def adapter_folders(base_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Skill name -> PEFT folder, one for each row of ADAPTERS."""
    root = tmp_path_factory.mktemp("adapters")
    return {
        name: save_adapter(base_folder, root / name, config, seed)
        for seed, (name, config) in enumerate(ADAPTERS.items(), start=1)
    }


@pytest.fixture
def base_model(base_folder: Path) -> PreTrainedModel:
    """A fresh float32 copy of the tiny base model, free to be changed."""
    return AutoModelForCausalLM.from_pretrained(base_folder, dtype=torch.float32).eval()
