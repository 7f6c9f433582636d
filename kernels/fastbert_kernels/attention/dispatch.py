"""Exact attention with an additive, learned bias, by the fastest way this machine has. Shapes as in `reference`."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from fastbert_kernels.attention.reference import allowed_pairs, attention_reference, check_attention, dropout_keys
from fastbert_kernels.backend import runs_kernels, warn_once

SMALL = 1 << 20
"""Fewer scores than these are faster by the reference on a CPU: the calls take longer than the numbers."""
HEAD_SIZES = (16, 128)
"""From, to: what the Triton kernel takes."""


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
    places: Tensor | None = None,
    max_seqlen: int | None = None,
) -> Tensor:
    """`attention_reference` by the fastest way this machine has; arguments and result as there, and

        max_seqlen: with `cu_seqlens`, the length of the longest sequence: a bias tells it, and without one the kernels
            would else begin as many programs as if one sequence had all tokens.

    On a GPU that is the Triton kernel, whose gradient of the bias is summed over the batch without atomics; where it
    has none for these tensors, PyTorch's fused attention. On a CPU it is plain products, chunk by chunk in the cache,
    with gradients that have none themselves; few scores, and graphs that are traced or compiled, take the reference.
    So do queries at `places`, of which there are few.
    """
    given = {"cu_seqlens": cu_seqlens, "key_padding": key_padding, "segments": segments, "dropout_p": dropout_p}
    if places is not None or q.numel() == 0:  # of an empty batch there is nothing to launch a kernel for
        return attention_reference(q, k, v, bias, **given, scale=scale, seed=seed, keys=keys, places=places)
    same = q.shape[2:3] == k.shape[2:3] and q.shape[3:] == v.shape[3:]
    if same and runs_kernels(q, "attention"):
        check_attention(q, k, v, bias, cu_seqlens, key_padding, segments, dropout_p, seed, keys)
        if (why := no_kernel(q)) is None:
            scale = q.shape[-1] ** -0.5 if scale is None else scale
            keys = dropout_keys(q, cu_seqlens, dropout_p, seed, keys)
            from fastbert_kernels.attention.triton_launch import triton_attention

            return triton_attention(q, k, v, bias, **given, scale=scale, keys=keys, max_seqlen=max_seqlen)
        warn_once(f"attention takes PyTorch's own form: {why}")
    by_chunks = q.device.type == "cpu" and _worth_chunks(q, k)
    if q.device.type != "cuda" and not by_chunks:
        return attention_reference(q, k, v, bias, **given, scale=scale, seed=seed, keys=keys)
    check_attention(q, k, v, bias, cu_seqlens, key_padding, segments, dropout_p, seed, keys)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if by_chunks:
        from fastbert_kernels.attention.cpu import cpu_attention

        keys = dropout_keys(q, cu_seqlens, dropout_p, seed, keys)
        return cpu_attention(q, k, v, bias, **given, scale=scale, keys=keys)
    if dropout_p or cu_seqlens is not None:
        return attention_reference(q, k, v, bias, **given, scale=scale, seed=seed, keys=keys)
    return _fused(q, k, v, bias, allowed_pairs(key_padding, segments, q.shape[2]), scale)


def _fused(q, k, v, bias, allowed, scale: float) -> Tensor:
    """PyTorch's fused attention, without dropout, whose own is not reproducible."""
    mask = None if bias is None else bias.to(q.dtype)
    if allowed is not None:
        zeros = mask if mask is not None else torch.zeros((), dtype=q.dtype, device=q.device)
        mask = zeros.masked_fill(~allowed, torch.finfo(q.dtype).min)
    if mask is not None:
        mask = mask.expand(q.shape[0], q.shape[1], q.shape[2], k.shape[2])
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
    return out if allowed is None else out * allowed.any(-1, keepdim=True)


def _worth_chunks(q: Tensor, k: Tensor) -> bool:
    """Whether there are enough scores and nothing records the operations; what is wrong with q and k is found later."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        return False
    return math.prod(q.shape[:-1]) * math.prod(k.shape[-2:-1]) >= SMALL


def no_kernel(q: Tensor) -> str | None:
    """Why the Triton kernel cannot take these; None if it can."""
    if q.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        return f"the kernel has no {q.dtype}"
    if not HEAD_SIZES[0] <= q.shape[3] <= HEAD_SIZES[1]:
        return f"the kernel takes heads of {HEAD_SIZES[0]} to {HEAD_SIZES[1]}, not of {q.shape[3]}"
    return None
