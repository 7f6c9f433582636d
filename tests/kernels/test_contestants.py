"""The attentions of other packages in the benchmark, with stand-ins for those that are not installed: shapes, layouts
and types that they receive, and what the benchmark reports."""

import math
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch

pytest.importorskip("triton")
from fastbert_kernels import attention_reference
from fastbert_kernels.benchmarks import attention, contestants
from fastbert_kernels.benchmarks.contestants import Contestant
from fastbert_kernels.benchmarks.measuring import Settings
from torch import Tensor

B, H, T, K = 3, 2, 32, 16  # of a dry run's comparison with float64


def plain(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, scale: float) -> Tensor:
    """Output [..., T, K] by operations that broadcast any leading sizes."""
    return ((scale * q @ k.transpose(-1, -2)).float() + bias).softmax(-1).to(v.dtype) @ v


def checked(tmp_path: Path, one: Contestant, name: str = "x") -> tuple[Callable | None, dict]:
    return attention.check(Settings(tmp_path, toy=True), name, one, T)


def install(monkeypatch, name: str, **attributes) -> None:
    module = ModuleType(name)
    vars(module).update(attributes)
    monkeypatch.setitem(sys.modules, name, module)


def test_cuequivariance_receives_the_batch_as_the_rows_of_one_pair_representation(tmp_path, monkeypatch) -> None:
    shapes = []

    def triangle_attention(q, k, v, bias, mask=None, scale=None, return_aux=False, *, kv_lengths=None) -> Tensor:
        assert bias.shape == (1, 1, H, T, T) and bias.dtype == torch.float32 and bias.requires_grad
        assert q.shape == k.shape == v.shape == (1, len(q[0]), H, T, K) and q.dtype == torch.bfloat16
        assert mask is None and kv_lengths is None and not return_aux and scale == K**-0.5
        shapes.append(q.shape[1])
        return plain(q, k, v, bias, scale)

    install(monkeypatch, "cuequivariance_ops_torch", triangle_attention=triangle_attention)
    function, row = checked(tmp_path, Contestant(contestants.cuequivariance))
    assert function is not None and row["errors"]["bias"][2] < 0.01, row
    assert shapes == [B, attention.TOY["tokens"] // T]


def test_transformer_engine_receives_the_heads_last_and_a_bias_of_its_dtype(tmp_path, monkeypatch) -> None:
    built = []

    class DotProductAttention(torch.nn.Module):
        def __init__(self, num_attention_heads, kv_channels, *, attention_dropout, qkv_format, attn_mask_type) -> None:
            super().__init__()
            assert (attention_dropout, qkv_format, attn_mask_type) == (0.0, "bshd", "no_mask")
            built.append((num_attention_heads, kv_channels))

        def forward(self, query_layer, key_layer, value_layer, *, core_attention_bias_type, core_attention_bias):
            layers = query_layer, key_layer, value_layer
            assert all(x.shape == (len(query_layer), T, H, K) and x.stride(-1) == 1 for x in layers)
            assert core_attention_bias_type == "post_scale_bias" and core_attention_bias.shape == (1, H, T, T)
            assert core_attention_bias.dtype == query_layer.dtype == torch.bfloat16
            out = plain(*(x.transpose(1, 2) for x in layers), core_attention_bias, K**-0.5)
            return out.transpose(1, 2).flatten(2)

    install(monkeypatch, "transformer_engine")
    install(monkeypatch, "transformer_engine.pytorch", DotProductAttention=DotProductAttention)
    for name in ("FLASH", "FUSED", "UNFUSED"):
        monkeypatch.setenv(f"NVTE_{name}_ATTN", "1")  # what the contestant sets ends with this test
    function, row = checked(tmp_path, Contestant(contestants.transformer_engine))
    assert function is not None and row["errors"]["bias"][2] < 0.01, row
    assert built == [(H, K)]


def test_t5_of_transformers(tmp_path) -> None:
    function, row = checked(tmp_path, Contestant(contestants.t5))
    assert function is not None and all(relative < 0.01 for *_, relative in row["errors"].values()), row


def test_a_wrong_contestant_is_not_timed(tmp_path, monkeypatch) -> None:
    """A gradient of the bias that lacks a row of the batch, an output that is NaN, and a missing package."""

    def without_a_row(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
        out = attention_reference(q, k, v, bias)
        return torch.cat([out[:-1], attention_reference(q, k, v, bias.detach())[-1:]])

    def not_finite(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
        return attention_reference(q, k, v, bias) * math.nan

    def missing() -> Callable:
        import transformer_engine_of_tomorrow

        return transformer_engine_of_tomorrow.attention

    found = {
        "fastbert": Contestant(lambda: attention_reference),
        "without a row": Contestant(lambda: without_a_row),
        "not finite": Contestant(lambda: not_finite),
        "missing": Contestant(missing, package="tomorrow"),
    }
    monkeypatch.setattr(attention, "contestants", lambda cuda: found)
    ready, added = [], []
    settings = Settings(tmp_path, rounds=1, toy=True, added=added.append)
    rows = attention.bench(settings, lengths=(T,), others=False, ready=lambda: ready.append(len(added))).rows
    assert ready == [0] and added == rows  # all are checked before one is timed
    right, row, nan, absent = rows
    assert right["both"]["ms"] > 0 and "wrong" not in right
    assert row["wrong"].startswith("wrong: error relative to the norm of bias by 0.") and "both" not in row
    assert "out by nan" in nan["wrong"] and "both" not in nan
    assert absent["failed"] == "not installed: no module transformer_engine_of_tomorrow; pip install tomorrow"
