"""Attention for a ragged batch on a CPU: one scaled dot product per request.

Stock `sdpa` under continuous batching is one product over all queries and all keys of the batch,
under a block-diagonal mask: its work grows with the square of the batch. Other calls pass through.
"""

import inspect
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface
from transformers.generation.continuous_batching.cache import PagedAttentionCache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

# Transformers before 5.20 or so names paged attention apart and keeps the cache's layout.
_NAMED_APART = "paged|sdpa" in ALL_ATTENTION_FUNCTIONS
NAME = "paged|sdpa" if _NAMED_APART else "sdpa"
_stock = ALL_ATTENTION_FUNCTIONS[NAME]
_TAKES_KWARGS = "kwargs" in inspect.signature(PagedAttentionCache.update).parameters


def use_ragged_attention() -> None:
    """Register it for this process, in place of transformers' own."""
    AttentionInterface.register(NAME, ragged_attention)


def ragged_attention(
    module: torch.nn.Module,
    query: Tensor,  # (1, heads, tokens, d)
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Transformers' attention function; its own path is taken only for a paged, ragged batch."""
    cache = kwargs.get("cache")
    special = any(kwargs.get(name) is not None for name in ("softcap", "position_bias", "s_aux"))
    if not isinstance(cache, PagedAttentionCache) or attention_mask is None or special:
        outputs: tuple[Tensor, None] = _stock(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
        return outputs
    key, value, lengths = _update(cache, module, key, value, kwargs)
    starts_q = kwargs["cu_seq_lens_q"].tolist()
    starts_k = lengths.tolist()
    result = torch.empty(
        (1, query.shape[2], query.shape[1], value.shape[3]), dtype=query.dtype, device=query.device
    )
    for row in range(len(starts_q) - 1):
        queries = slice(starts_q[row], starts_q[row + 1])
        keys = slice(starts_k[row], starts_k[row + 1])
        mask = attention_mask[..., queries, keys]
        result[0, queries] = _attend(
            query[:, :, queries], key[:, :, keys], value[:, :, keys], mask, scaling
        )
    return result, None


def _attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scale: float | None) -> Tensor:
    """(tokens, heads, d): one request's attention, its key-value heads shared and not repeated."""
    _, heads, tokens, width = query.shape
    groups = heads // key.shape[1]
    if tokens == 1:  # the heads that share keys become the rows of one product
        packed = query.reshape(1, heads // groups, groups, width)
        out = scaled_dot_product_attention(packed, key, value, attn_mask=mask, scale=scale)
        return out.reshape(1, heads, -1)
    out = scaled_dot_product_attention(
        query, key, value, attn_mask=mask, scale=scale, enable_gqa=groups > 1
    )
    return out[0].transpose(0, 1)


def _update(
    cache: Any, module: torch.nn.Module, key: Tensor, value: Tensor, kwargs: dict[str, Any]
) -> tuple[Tensor, Tensor, Tensor]:
    """Write the new keys and values; return all (1, heads, tokens, d) and where requests start."""
    layer: int = module.layer_idx  # type: ignore[assignment]
    if _TAKES_KWARGS:
        key, value = cache.update(key, value, layer_idx=layer, kwargs=kwargs)
        return key, value, kwargs["cu_seq_lens_k"]
    key, value = cache.update(
        key,
        value,
        layer_idx=layer,
        read_index=kwargs["read_index"],
        write_index=kwargs["write_index"],
    )
    starts = kwargs["cu_seq_lens_k"]
    if isinstance(starts, dict):
        starts = starts[cache.layer_to_allocator[layer].layer_type]
    return key.transpose(0, 1)[None], value.transpose(0, 1)[None], starts
