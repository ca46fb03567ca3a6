"""The base model in memory: where it goes, in which dtype, and how much it can take."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from dynmerge.engines.transformers.config import EngineConfig
from dynmerge.errors import BaseModelError, ConfigError

CPU_CACHE_BYTES = 1 << 30
GPU_CACHE_SHARE = 0.6  # of what is free once the weights are in


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A model, its tokenizer, and the tokens that end its answers."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase

    @property
    def vocabulary(self) -> int:
        """Rows of the embedding: every token id is below."""
        embeddings: Any = self.model.get_input_embeddings()
        return int(embeddings.weight.shape[0])

    @property
    def eos(self) -> frozenset[int]:
        """Ids that end an answer, by the tokenizer and by the generation config."""
        generation = self.model.generation_config
        named = generation.eos_token_id if generation is not None else None
        ids = [named] if named is None or isinstance(named, int) else list(named)
        return frozenset(id for id in (*ids, self.tokenizer.eos_token_id) if id is not None)

    @property
    def context(self) -> int | None:
        """Tokens the model was made for; None where it does not say."""
        limit = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        return limit if isinstance(limit, int) and limit > 0 else None


def load_base_model(folder: Path, config: EngineConfig) -> LoadedModel:
    """Load from a local folder, safetensors only, never from a hub. Raises BaseModelError."""
    device = choose_device(config)
    try:
        described = AutoConfig.from_pretrained(folder, local_files_only=True)
        model: Any = AutoModelForCausalLM.from_pretrained(
            folder,
            local_files_only=True,
            use_safetensors=True,
            dtype=choose_dtype(config, described, device),
            device_map={"": device},
        )
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, ImportError) as reason:
        raise BaseModelError(f"cannot load the base model: {reason}") from reason
    return LoadedModel(model.eval().requires_grad_(False), tokenizer)


def choose_device(config: EngineConfig) -> torch.device:
    """The configured device, or the GPU if there is one."""
    if config.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device is cuda, but torch sees no GPU")
    if config.device == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", torch.cuda.current_device())


def choose_dtype(
    config: EngineConfig, described: PreTrainedConfig, device: torch.device
) -> torch.dtype:
    """The configured dtype, or by itself the checkpoint's on a GPU and float32 on a CPU."""
    if config.dtype != "auto":
        dtype = getattr(torch, config.dtype)
    else:
        stored = getattr(described.get_text_config(), "dtype", None)
        dtype = stored if device.type == "cuda" and stored is not None else torch.float32
    assert isinstance(dtype, torch.dtype)
    return dtype


def cache_tokens(base: LoadedModel, config: EngineConfig) -> int:
    """Tokens of keys and values to make room for: as configured, or a share of memory."""
    if config.cache_tokens is not None:
        return config.cache_tokens
    if base.model.device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(base.model.device)
        budget = int(free * GPU_CACHE_SHARE)
    else:
        budget = CPU_CACHE_BYTES
    context = config.context_length or base.context or 4096
    affordable = budget // _bytes_per_token(base, config)
    return max(config.max_batch_tokens, min(affordable, context * config.max_batch))


def _bytes_per_token(base: LoadedModel, config: EngineConfig) -> int:
    """Keys and values of one token in all layers, and its column of the attention mask."""
    text = base.model.config.get_text_config()
    query_heads = getattr(text, "num_attention_heads", None) or 1
    heads = getattr(text, "num_key_value_heads", None) or query_heads
    width = getattr(text, "head_dim", None) or text.hidden_size // query_heads
    numbers = 2 * text.num_hidden_layers * heads * width + config.max_batch_tokens
    return int(numbers * base.model.dtype.itemsize)
