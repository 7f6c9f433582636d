"""From tensors to launches of the Triton kernels: tiles, strides, and the operators that PyTorch knows.

Shapes as in `triton_attention_kernels`.
"""

import os

import torch
import triton
from torch import Tensor

from fastbert_kernels.hashing import threshold
from fastbert_kernels.triton_attention_kernels import bias_kernel, forward_kernel, keys_kernel, queries_kernel

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

TILES = {"forward": (128, 64, 8, 2), "keys": (64, 64, 4, 2), "queries": (128, 64, 8, 2), "bias": (64, 64, 8, 2)}
"""Of each kernel, for 16-bit heads of up to 64: queries, keys, warps, stages."""


def blocks(kernel: str, head_size: int, dtype: torch.dtype) -> dict[str, int]:
    """Tiles, warps and stages."""
    queries, keys, warps, stages = TILES[kernel]
    if dtype == torch.float32:
        queries, keys, warps, stages = 32, 32, 4, 2
    elif head_size > 64:
        queries, keys, warps, stages = 64, 64, 8, 2
    block_k = max(16, triton.next_power_of_2(head_size))
    return {"BLOCK_M": queries, "BLOCK_N": keys, "BLOCK_K": block_k, "num_warps": warps, "num_stages": stages}


KERNELS = {"forward": forward_kernel, "keys": keys_kernel, "queries": queries_kernel, "bias": bias_kernel}


class _Launch:
    """What all four kernels are given, by name."""

    def __init__(self, q, k, v, out, bias, cu_seqlens, key_padding, segments, keys, scale, dropout_p, longest) -> None:
        self.q = q
        self.packed = cu_seqlens is not None
        self.batch = len(cu_seqlens) - 1 if self.packed else len(q)
        self.heads, self.head_size = q.shape[1], q.shape[3]
        self.longest = longest if self.packed else q.shape[2]
        none = q  # a pointer that is not followed
        self.pointers = {
            "BIAS": none if bias is None else bias,
            "CU": none if cu_seqlens is None else cu_seqlens,
            "PAD": none if key_padding is None else key_padding.view(torch.int8),
            "SEG": none if segments is None else segments,
            "KEYS": none if keys is None else keys,
        }
        self.numbers = {
            "scale": scale,
            "limit": threshold(dropout_p),
            "kept_scale": 1.0 / (1.0 - dropout_p),
            "T": self.longest,
        }
        self.strides = {}
        for name, x in (("q", q), ("k", k), ("v", v), ("o", out)):
            self.strides |= dict(zip((f"stride_{name}{axis}" for axis in "bhtk"), x.stride(), strict=True))
        whole = (0, 0, 0, 0) if bias is None else bias.stride()
        if bias is not None and bias.shape[0] == 1:
            whole = (0, *whole[1:])
        self.strides |= dict(zip(("stride_bb", "stride_bh", "stride_bm", "stride_bn"), whole, strict=True))
        self.strides |= {"stride_lb": q.shape[1] * q.shape[2], "stride_lh": q.shape[2]}
        pad = (0, 0) if key_padding is None else key_padding.stride()
        self.strides |= {"stride_pb": pad[0], "stride_pn": pad[1]}
        of = (0, 0) if segments is None else segments.stride()
        self.strides |= {"stride_sb": of[0], "stride_sn": of[1]}
        self.switches = {
            "H": self.heads,
            "K": self.head_size,
            "HAS_BIAS": bias is not None,
            "VARLEN": self.packed,
            "PADDED": key_padding is not None,
            "SEGMENTED": segments is not None,
            "DROPOUT": dropout_p > 0,
            "UPCAST": INTERPRETED,
        }

    def blocks(self, kernel: str) -> dict[str, int]:
        return blocks(kernel, self.head_size, self.q.dtype)

    def over_rows(self, kernel: str, axis: str) -> tuple[int, int]:
        """The grid of a kernel with a program for each block of queries (M) or keys (N)."""
        return triton.cdiv(self.longest, self.blocks(kernel)[f"BLOCK_{axis}"]), self.batch * self.heads

    def __call__(self, name: str, grid, **tensors) -> None:
        common = {**self.pointers, **self.numbers, **self.strides, **self.switches, **self.blocks(name)}
        KERNELS[name][grid](**tensors, **common)


@torch.library.custom_op("fastbert_kernels::attention_forward", mutates_args=())
def attention_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    cu_seqlens: Tensor | None,
    key_padding: Tensor | None,
    segments: Tensor | None,
    keys: Tensor | None,
    scale: float,
    dropout_p: float,
    longest: int,
) -> tuple[Tensor, Tensor]:
    """The forward kernel.

    Args:
        q, k, v: [B, H, T, K], of any strides.
        bias: [1 or B, H, T, T]; with `cu_seqlens` T is the longest sequence.
        cu_seqlens: int32 [sequences + 1], where each sequence of a B of 1 begins, and the end of the last.
        key_padding: bool [B, T], False for keys that no query may see; not with `cu_seqlens`.
        segments: int32 [B, T]; a query sees keys of its own segment; not with `cu_seqlens`.
        keys: int32 [B or sequences], of the dropout.
        longest: the length of the longest sequence, with `cu_seqlens`.

    Returns:
        O; L, float32 [B, H, T].
    """
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    lse = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
    launch = _Launch(q, k, v, out, bias, cu_seqlens, key_padding, segments, keys, scale, dropout_p, longest)
    launch("forward", launch.over_rows("forward", "M"), Q=q, KEY=k, V=v, OUT=out, LSE=lse)
    return out, lse


@attention_forward.register_fake
def _(q, k, v, bias, cu_seqlens, key_padding, segments, keys, scale, dropout_p, longest):
    return torch.empty_like(q, memory_format=torch.contiguous_format), q.new_empty(q.shape[:3], dtype=torch.float32)


@torch.library.custom_op("fastbert_kernels::attention_backward", mutates_args=())
def attention_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    out: Tensor,
    lse: Tensor,
    cu_seqlens: Tensor | None,
    key_padding: Tensor | None,
    segments: Tensor | None,
    keys: Tensor | None,
    scale: float,
    dropout_p: float,
    longest: int,
    bias_needs_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dQ, dK, dV, dB; dB is empty where it is not needed."""
    grad = grad.contiguous()
    delta = (grad.float() * out.float()).sum(-1)
    dq, dk, dv = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
    launch = _Launch(q, k, v, grad, bias, cu_seqlens, key_padding, segments, keys, scale, dropout_p, longest)
    common = {"Q": q, "KEY": k, "V": v, "DO": grad, "LSE": lse, "DELTA": delta}
    strides = dict(zip(("stride_db", "stride_dh", "stride_dt", "stride_dk"), dq.stride(), strict=True))
    launch("keys", launch.over_rows("keys", "N"), **common, DK=dk, DV=dv, **strides)
    launch("queries", launch.over_rows("queries", "M"), **common, DQ=dq, **strides)
    if not bias_needs_grad:
        return dq, dk, dv, q.new_empty(0)
    dbias = torch.empty_like(bias, dtype=torch.float32, memory_format=torch.contiguous_format)
    strides = dict(zip(("stride_db", "stride_dh", "stride_dm", "stride_dn"), dbias.stride(), strict=True))
    rows, columns = (launch.over_rows("bias", axis)[0] for axis in "MN")
    count = launch.batch if len(bias) == 1 else 1
    launch("bias", (rows, columns, len(bias) * launch.heads), **common, DBIAS=dbias, COUNT=count, **strides)
    return dq, dk, dv, dbias.to(bias.dtype)


@attention_backward.register_fake
def _(
    grad, q, k, v, bias, out, lse, cu_seqlens, key_padding, segments, keys, scale, dropout_p, longest, bias_needs_grad
):  # fmt: skip
    dq, dk, dv = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
    dbias = torch.empty_like(bias, memory_format=torch.contiguous_format) if bias_needs_grad else q.new_empty(0)
    return dq, dk, dv, dbias


def _setup(ctx, inputs, output) -> None:
    q, k, v, bias, cu_seqlens, key_padding, segments, keys, ctx.scale, ctx.dropout_p, ctx.longest = inputs
    ctx.save_for_backward(q, k, v, bias, *output, cu_seqlens, key_padding, segments, keys)


def _backward(ctx, grad, _):
    q, k, v, bias, out, lse, cu_seqlens, key_padding, segments, keys = ctx.saved_tensors
    needed = bias is not None and ctx.needs_input_grad[3]
    numbers = (ctx.scale, ctx.dropout_p, ctx.longest, needed)
    dq, dk, dv, dbias = attention_backward(
        grad, q, k, v, bias, out, lse, cu_seqlens, key_padding, segments, keys, *numbers
    )
    return dq, dk, dv, dbias if needed else None, *[None] * 7


attention_forward.register_autograd(_backward, setup_context=_setup)
