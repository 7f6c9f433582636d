"""`attention` for models of Hugging Face's transformers:

    from fastbert_kernels.transformers_attention import register

    register()
    model = AutoModelForMaskedLM.from_pretrained("bert-base-uncased", attn_implementation="fastbert")

Padding is passed to the kernels as a mask [B, T]. Other masks (windows, causal, custom) and T5's position bias are
passed as an additive bias. Its gradient is exact, and summed over the batch where the bias is shared. Dropout is
reproducible under `torch.manual_seed`.
"""

from typing import Any

import torch
from torch import Tensor

from fastbert_kernels import attention


def register(name: str = "fastbert") -> None:
    """Register `attn_implementation=name` with transformers.

    Raises:
        ImportError: transformers is not installed, or has no AttentionInterface.
    """
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(name, attend)
    AttentionMaskInterface.register(name, make_mask)


def make_mask(
    batch_size: int, q_length: int, kv_length: int, *, mask_function: Any, attention_mask: Tensor | None, **more: Any
) -> Tensor | None:
    """Mask that a model passes to its layers: bool [B, keys] of the real tokens if only padding is masked, else the
    mask for SDPA, bool [B, 1, queries, keys]."""
    from transformers.masking_utils import bidirectional_mask_function, sdpa_mask

    if mask_function is bidirectional_mask_function and more.get("allow_is_bidirectional_skip"):
        return None if attention_mask is None else attention_mask[:, -kv_length:].bool()
    more["allow_is_causal_skip"] = False
    options = {"mask_function": mask_function, "attention_mask": attention_mask, **more}
    return sdpa_mask(batch_size, q_length, kv_length, **options)


def attend(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    dropout: float = 0.0,
    scaling: float | None = None,
    position_bias: Tensor | None = None,
    **more: Any,
) -> tuple[Tensor, None]:
    """Attention function with the signature of transformers' AttentionInterface.

    Args:
        query: [B, H, queries, K].
        key, value: [B, H, keys, K].
        attention_mask: from `make_mask` or from the model: bool or additive [B or 1, H or 1, queries, keys].
        position_bias: [1 or B, H, queries, keys], added to the scores.

    Returns:
        [B, queries, H, K], and None instead of probabilities.

    Raises:
        ValueError: an unsupported request: probabilities, a soft cap, grouped queries, causal attention without a mask.
    """
    if more.get("output_attentions"):
        raise ValueError(
            "this attention returns no probabilities: omit output_attentions, or load the model with "
            "attn_implementation='eager'"
        )
    if more.get("softcap") is not None:
        raise ValueError(
            "this attention has no soft cap of the scores: load the model with attn_implementation='eager'"
        )
    if key.shape[1] != query.shape[1]:
        raise ValueError(
            f"this attention needs a key head for each of the {query.shape[1]} query heads, not {key.shape[1]} "
            "(grouped queries): load the model with attn_implementation='sdpa'"
        )
    causal = more.get("is_causal")
    if (
        attention_mask is None
        and query.shape[2] > 1
        and (getattr(module, "is_causal", False) if causal is None else causal)
    ):
        raise ValueError("this attention is for encoders: load a causal model with attn_implementation='sdpa'")
    padding, bias = None, position_bias
    if attention_mask is not None and attention_mask.dim() == 2:
        padding = attention_mask.bool()
    elif attention_mask is not None:
        bias = _additive(attention_mask, query.dtype) if bias is None else bias + _additive(attention_mask, bias.dtype)
    dropout_options = {}
    if dropout:
        # A key for each row, sampled on the device: no synchronization, and no graph break under torch.compile.
        keys = torch.randint(-(2**31), 2**31, (len(query),), dtype=torch.int64, device=query.device)
        dropout_options = {"dropout_p": dropout, "keys": keys.to(torch.int32)}
    out = attention(query, key, value, bias, key_padding=padding, scale=scaling, **dropout_options)
    return out.transpose(1, 2), None


def _additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    if mask.dtype != torch.bool:
        return mask
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(~mask, torch.finfo(dtype).min)
