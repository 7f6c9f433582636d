"""Exact attention with an additive, learned bias, by the fastest implementation for the device. Shapes as in
`reference`."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from fastbert_kernels.attention.reference import allowed_pairs, attention_reference, check_attention, dropout_keys
from fastbert_kernels.backend import runs_kernels, warn_once

SMALL = 1 << 20
"""Minimum number of scores to compute by chunks on a CPU: for fewer, the overhead of calls makes the reference
faster."""
HEAD_SIZES = (16, 128)
"""Minimum and maximum head size of the Triton kernels."""


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None = None,
    *,
    cu_seqlens: Tensor | None = None,
    key_padding: Tensor | None = None,
    segments: Tensor | None = None,
    scale: float | None = None,
    dropout_p: float = 0.0,
    seed: int | None = None,
    keys: Tensor | None = None,
    query_positions: Tensor | None = None,
    max_seqlen: int | None = None,
) -> Tensor:
    """`attention_reference` by the fastest implementation for the device; arguments and result as there, and

        max_seqlen: with `cu_seqlens`, the length of the longest sequence. The size of a bias gives it too; without
            both, the kernels launch programs for a sequence of all tokens.

    On a GPU this is the Triton kernel, which sums the gradient of the bias over the batch without atomics, or PyTorch's
    fused attention for tensors that the kernel does not support. On a CPU it is plain products, chunk by chunk in the
    cache, differentiable once. The reference computes small inputs, traced or compiled graphs, and calls with
    `query_positions`, which have few queries.
    """
    options = {"cu_seqlens": cu_seqlens, "key_padding": key_padding, "segments": segments, "dropout_p": dropout_p}
    if query_positions is not None or q.numel() == 0:  # an empty batch needs no kernel
        return attention_reference(
            q, k, v, bias, **options, scale=scale, seed=seed, keys=keys, query_positions=query_positions
        )
    same = q.shape[2:3] == k.shape[2:3] and q.shape[3:] == v.shape[3:]
    if same and runs_kernels(q, "attention"):
        check_attention(q, k, v, bias, cu_seqlens, key_padding, segments, dropout_p, seed, keys)
        if (reason := unsupported(q)) is None:
            scale = q.shape[-1] ** -0.5 if scale is None else scale
            keys = dropout_keys(q, cu_seqlens, dropout_p, seed, keys)
            from fastbert_kernels.attention.triton_launch import triton_attention

            return triton_attention(q, k, v, bias, **options, scale=scale, keys=keys, max_seqlen=max_seqlen)
        warn_once(f"attention falls back to PyTorch: {reason}")
    by_chunks = q.device.type == "cpu" and _worth_chunks(q, k)
    if q.device.type != "cuda" and not by_chunks:
        return attention_reference(q, k, v, bias, **options, scale=scale, seed=seed, keys=keys)
    check_attention(q, k, v, bias, cu_seqlens, key_padding, segments, dropout_p, seed, keys)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if by_chunks:
        from fastbert_kernels.attention.cpu import cpu_attention

        keys = dropout_keys(q, cu_seqlens, dropout_p, seed, keys)
        return cpu_attention(q, k, v, bias, **options, scale=scale, keys=keys)
    if dropout_p or cu_seqlens is not None:
        return attention_reference(q, k, v, bias, **options, scale=scale, seed=seed, keys=keys)
    return _fused(q, k, v, bias, allowed_pairs(key_padding, segments, q.shape[2]), scale)


def _fused(q, k, v, bias, allowed, scale: float) -> Tensor:
    """PyTorch's fused attention, without dropout: its dropout is not reproducible."""
    mask = None if bias is None else bias.to(q.dtype)
    if allowed is not None:
        zeros = mask if mask is not None else torch.zeros((), dtype=q.dtype, device=q.device)
        mask = zeros.masked_fill(~allowed, torch.finfo(q.dtype).min)
    if mask is not None:
        mask = mask.expand(q.shape[0], q.shape[1], q.shape[2], k.shape[2])
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
    return out if allowed is None else out * allowed.any(-1, keepdim=True)


def _worth_chunks(q: Tensor, k: Tensor) -> bool:
    """Report whether there are enough scores and no tracing or compilation; q and k are not checked yet."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        return False
    return math.prod(q.shape[:-1]) * math.prod(k.shape[-2:-1]) >= SMALL


def unsupported(q: Tensor) -> str | None:
    """Reason why the Triton kernels do not support tensors like q; None if they do."""
    if q.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        return f"the kernel does not support {q.dtype}"
    if not HEAD_SIZES[0] <= q.shape[3] <= HEAD_SIZES[1]:
        return f"the kernel supports head sizes {HEAD_SIZES[0]} to {HEAD_SIZES[1]}, not {q.shape[3]}"
    return None
