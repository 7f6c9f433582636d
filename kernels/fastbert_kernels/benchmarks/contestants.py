"""Attentions that are compared on a GPU, each a function (q, k, v, bias) -> output of tensors [B, H, T, K] and a bias
[1, H, T, T] in float32, or of (q, k, v) without one.

Those of other packages are optional: where a package is not installed, building its contestant raises
ModuleNotFoundError.
"""

import functools
import os
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from fastbert_kernels import attention, attention_reference


@dataclass(frozen=True)
class Contestant:
    """An attention of the benchmark."""

    build: Callable[[], Callable[..., Tensor]]
    """Imports what it needs and returns the function."""
    biased: bool = True
    package: str = ""
    """Package to install for it, in addition to PyTorch."""


def sdpa(backend: SDPBackend, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None, real=None) -> Tensor:
    mask = None if bias is None else bias.to(q.dtype).expand(len(q), -1, -1, -1)
    if real is not None:
        mask = mask.masked_fill(~real[:, None, None], torch.finfo(q.dtype).min)
    with sdpa_kernel(backend):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def flex_attention() -> Callable[..., Tensor]:
    from torch.nn.attention.flex_attention import flex_attention

    compiled = torch.compile(flex_attention, dynamic=False)

    def function(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
        return compiled(q, k, v, score_mod=lambda score, b, h, m, n: score + bias[0, h, m, n])

    return function


def t5() -> Callable[..., Tensor]:
    """The attention function that T5 of transformers selects for "sdpa", in autocast as in a training; PyTorch selects
    the backend. T5 itself does not scale the scores."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    module = torch.nn.Module()
    module.is_causal = False

    def function(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
        scale = q.shape[-1] ** -0.5
        with torch.autocast(q.device.type, q.dtype):
            out, _ = sdpa_attention_forward(module, q, k, v, None, scaling=scale, position_bias=bias)
        return out.transpose(1, 2)  # from [B, T, H, K]

    return function


def cuequivariance() -> Callable[..., Tensor]:
    """NVIDIA's triangle attention: the rows of one pair representation, which have the same bias, are the batch. Up to
    100 tokens it computes with PyTorch."""
    from cuequivariance_ops_torch import triangle_attention

    def function(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
        # q, k, v [1, rows, H, T, K], bias [1, 1, H, T, T]
        return triangle_attention(q[None], k[None], v[None], bias[None], scale=q.shape[-1] ** -0.5)[0]

    return function


def transformer_engine() -> Callable[..., Tensor]:
    """TransformerEngine's attention by cuDNN: tensors [B, T, H, K] and a bias of their dtype. Its other backends, of
    which one has no gradient for a bias, are switched off."""
    from transformer_engine.pytorch import DotProductAttention

    os.environ |= {"NVTE_FLASH_ATTN": "0", "NVTE_FUSED_ATTN": "1", "NVTE_UNFUSED_ATTN": "0"}

    @functools.cache
    def module(heads: int, size: int) -> torch.nn.Module:
        return DotProductAttention(heads, size, attention_dropout=0.0, qkv_format="bshd", attn_mask_type="no_mask")

    def function(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
        heads, size = q.shape[1], q.shape[3]
        options = {"core_attention_bias_type": "post_scale_bias", "core_attention_bias": bias.to(q.dtype)}
        out = module(heads, size)(*(x.transpose(1, 2) for x in (q, k, v)), **options)
        return out.unflatten(-1, (heads, size)).transpose(1, 2)  # from [B, T, H K]

    return function


def contestants(cuda: bool) -> dict[str, Contestant]:
    """Contestants by name; without a GPU those that run anywhere. Other packages come last, since an error in their
    kernels could make the GPU unusable for this process."""
    found = {
        "fastbert": Contestant(lambda: attention),
        "fastbert, no bias": Contestant(lambda: attention, biased=False),
        "plain": Contestant(lambda: attention_reference),
        "T5 of transformers, SDPA": Contestant(t5, package="transformers"),
    }
    packages = {
        "cuEquivariance, triangle attention": Contestant(cuequivariance, package="cuequivariance-ops-torch-cu13"),
        "TransformerEngine, cuDNN": Contestant(transformer_engine, package="transformer-engine[pytorch]"),
    }
    if not cuda:
        return found | packages
    fused = {name: functools.partial(sdpa, backend) for name, backend in BACKENDS.items()}
    return {
        **found,
        "SDPA flash, no bias": Contestant(lambda: fused["flash"], biased=False),
        "SDPA cuDNN, no bias": Contestant(lambda: fused["cuDNN"], biased=False),
        "SDPA memory-efficient": Contestant(lambda: fused["memory-efficient"]),
        "plain, compiled": Contestant(lambda: torch.compile(attention_reference, dynamic=False)),
        "FlexAttention": Contestant(flex_attention),
        **packages,
    }


BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cuDNN": SDPBackend.CUDNN_ATTENTION,
    "memory-efficient": SDPBackend.EFFICIENT_ATTENTION,
}
