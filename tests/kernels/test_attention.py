import math

import pytest
import torch
import torch.nn.functional as F
from fastbert_kernels import attention, attention_reference, combine
from fastbert_kernels.attention import dropout_row_keys
from fastbert_kernels.dropout import keep_mask

B, H, T, K = 3, 2, 7, 5


def inputs(dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(B, H, T, K, generator=generator, dtype=dtype, requires_grad=True) for _ in range(3))
    bias = torch.randn(1, H, T, T, generator=generator, dtype=dtype, requires_grad=True)
    return q, k, v, bias


@pytest.mark.parametrize("function", [attention, attention_reference])
def test_equals_torch_sdpa(function) -> None:
    q, k, v, bias = inputs()
    ours = function(q, k, v, bias, scale=0.3)
    theirs = F.scaled_dot_product_attention(q, k, v, attn_mask=bias.expand(B, H, T, T), scale=0.3)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    grad = torch.randn_like(ours)
    mine = torch.autograd.grad(ours, (q, k, v, bias), grad)
    reference = torch.autograd.grad(theirs, (q, k, v, bias), grad)
    for a, b in zip(mine, reference, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)


def test_default_scale_and_no_bias() -> None:
    q, k, v, _ = inputs()
    torch.testing.assert_close(attention(q, k, v), F.scaled_dot_product_attention(q, k, v), rtol=1e-12, atol=1e-12)


def test_a_query_without_keys_gives_zeros_and_no_nan() -> None:
    q, k, v, bias = inputs()
    allowed = torch.ones(B, 1, T, T, dtype=torch.bool)
    allowed[1, :, 2] = False
    out = attention(q, k, v, bias, allowed=allowed)
    assert (out[1, :, 2] == 0).all()
    gradients = torch.autograd.grad(out.sum(), (q, k, v, bias))
    assert all(g.isfinite().all() for g in gradients)
    assert (gradients[0][1, :, 2] == 0).all()


def test_forbidden_keys_do_not_matter() -> None:
    q, k, v, bias = inputs()
    allowed = torch.ones(B, 1, 1, T, dtype=torch.bool)
    allowed[:, :, :, -2:] = False
    out = attention(q, k, v, bias, allowed=allowed)
    other = attention(q[:, :, :, :], k[:, :, :-2], v[:, :, :-2], bias[:, :, :, :-2])
    torch.testing.assert_close(out, other, rtol=1e-12, atol=1e-12)


def test_dropout_is_the_documented_mask() -> None:
    q, k, v, bias = inputs()
    keys = combine(torch.tensor(3, dtype=torch.int32), torch.arange(B, dtype=torch.int32))
    out = attention(q, k, v, bias, dropout_p=0.4, dropout_keys=keys)
    probabilities = (q @ k.transpose(-1, -2) / math.sqrt(K) + bias).softmax(-1)
    keep = keep_mask(dropout_row_keys(keys, H, T), T, 0.4)
    torch.testing.assert_close(out, (probabilities * keep / 0.6) @ v, rtol=1e-12, atol=1e-12)
    assert 0 < keep.double().mean() < 1
    torch.testing.assert_close(out[1:2], attention(q[1:2], k[1:2], v[1:2], bias, dropout_p=0.4, dropout_keys=keys[1:2]))


def test_gradcheck() -> None:
    q, k, v, bias = inputs()
    keys = torch.arange(B, dtype=torch.int32)
    allowed = torch.rand(B, 1, T, T, generator=torch.Generator().manual_seed(1)) < 0.7
    torch.autograd.gradcheck(
        lambda q, k, v, b: attention(q, k, v, b, allowed=allowed, dropout_p=0.2, dropout_keys=keys), (q, k, v, bias)
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_precision_is_no_worse_than_torch(dtype) -> None:
    q, k, v, bias = (x.detach() for x in inputs())
    exact = attention(q, k, v, bias)
    low = [x.to(dtype) for x in (q, k, v, bias)]
    ours = (attention(*low).double() - exact).abs().max()
    plain = (low[0] @ low[1].transpose(-1, -2) / math.sqrt(K) + low[3]).softmax(-1) @ low[2]
    theirs = (plain.double() - exact).abs().max()
    assert ours <= 2 * theirs + 1e-5


def test_shapes_that_do_not_fit_are_named() -> None:
    q, k, v, _ = inputs()
    with pytest.raises(ValueError, match=r"k \(3, 2, 7, 4\)"):
        attention(q, k[..., :4], v)
    with pytest.raises(ValueError, match=r"bias \(3, 7, 7\)"):
        attention(q, k, v, torch.zeros(3, 7, 7))
    with pytest.raises(ValueError, match="dropout needs"):
        attention(q, k, v, dropout_p=0.1)
    with pytest.raises(ValueError, match="bool"):
        attention(q, k, v, allowed=torch.ones(B, 1, T, T))
