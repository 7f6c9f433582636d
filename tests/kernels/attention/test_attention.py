import math

import pytest
import torch
import torch.nn.functional as F
from fastbert_kernels import attention, attention_reference, combine, keep_mask, mix
from fastbert_kernels.attention.reference import dropout_row_keys

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
    padding, segments = torch.ones(B, T, dtype=torch.bool), torch.zeros(B, T, dtype=torch.int32)
    segments[1, 2], padding[1, 2] = 1, False  # alone in its segment, and masked as a key
    out = attention(q, k, v, bias, key_padding=padding, segments=segments)
    assert (out[1, :, 2] == 0).all() and (out[0] != 0).all()
    gradients = torch.autograd.grad(out.sum(), (q, k, v, bias))
    assert all(g.isfinite().all() for g in gradients)
    assert (gradients[0][1, :, 2] == 0).all()


def test_masked_keys_do_not_matter() -> None:
    q, k, v, bias = inputs()
    padding = torch.ones(B, T, dtype=torch.bool)
    padding[:, -2:] = False
    out = attention(q, k, v, bias, key_padding=padding)
    other = attention(q[:, :, :, :], k[:, :, :-2], v[:, :, :-2], bias[:, :, :, :-2])
    torch.testing.assert_close(out, other, rtol=1e-12, atol=1e-12)


def test_dropout_is_the_documented_mask() -> None:
    q, k, v, bias = inputs()
    keys = combine(torch.tensor(3, dtype=torch.int32), torch.arange(B, dtype=torch.int32))
    out = attention(q, k, v, bias, dropout_p=0.4, keys=keys)
    probabilities = (q @ k.transpose(-1, -2) / math.sqrt(K) + bias).softmax(-1)
    keep = keep_mask(dropout_row_keys(keys, H, T), T, 0.4)
    torch.testing.assert_close(out, (probabilities * keep / 0.6) @ v, rtol=1e-12, atol=1e-12)
    assert 0 < keep.double().mean() < 1
    torch.testing.assert_close(out[1:2], attention(q[1:2], k[1:2], v[1:2], bias, dropout_p=0.4, keys=keys[1:2]))


def test_gradcheck() -> None:
    q, k, v, bias = inputs()
    keys = torch.arange(B, dtype=torch.int32)
    generator = torch.Generator().manual_seed(1)
    masks = {
        "key_padding": torch.rand(B, T, generator=generator) < 0.7,
        "segments": torch.randint(0, 2, (B, T), generator=generator),
    }
    torch.autograd.gradcheck(
        lambda q, k, v, b: attention(q, k, v, b, **masks, dropout_p=0.2, keys=keys), (q, k, v, bias)
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_precision_errors_are_those_of_torch(dtype) -> None:
    q, k, v, bias = (x.detach() for x in inputs())
    exact = attention(q, k, v, bias)
    low = [x.to(dtype) for x in (q, k, v, bias)]
    ours = (attention(*low).double() - exact).abs().max()
    plain = (low[0] @ low[1].transpose(-1, -2) / math.sqrt(K) + low[3]).softmax(-1) @ low[2]
    theirs = (plain.double() - exact).abs().max()
    assert ours <= 2 * theirs + 1e-5


def test_wrong_arguments() -> None:
    q, k, v, _ = inputs()
    with pytest.raises(ValueError, match=r"k \(3, 2, 7, 4\)"):
        attention(q, k[..., :4], v)
    with pytest.raises(ValueError, match=r"bias \(3, 7, 7\)"):
        attention(q, k, v, torch.zeros(3, 7, 7))
    with pytest.raises(ValueError, match="dropout needs"):
        attention(q, k, v, dropout_p=0.1)
    for wrong, message in (
        ({"key_padding": torch.ones(B, T)}, "key_padding must be bool"),
        ({"key_padding": torch.ones(B, 1, T, dtype=torch.bool)}, r"key_padding \(3, 1, 7\) must be \[B, T\] \(3, 7\)"),
        ({"segments": torch.ones(B, T, dtype=torch.bool)}, "segments must be int"),
        ({"cu_seqlens": torch.tensor([0, T], dtype=torch.int32)}, "B must be 1"),
        ({"dropout_p": 1.0, "seed": 1}, "must lie in"),
        ({"dropout_p": 0.1, "seed": 1, "keys": torch.zeros(B, dtype=torch.int32)}, "dropout needs"),
        ({"dropout_p": 0.1, "keys": torch.zeros(B, dtype=torch.int64)}, "keys must be int32, not torch.int64"),
        ({"dropout_p": 0.1, "keys": torch.zeros(B, dtype=torch.int32, device="meta")}, "keys is on meta and q on cpu"),
        ({"key_padding": torch.ones(B, T, dtype=torch.bool, device="meta")}, "key_padding is on meta"),
        ({"segments": torch.ones(B, T, dtype=torch.int32, device="meta")}, "segments is on meta"),
        ({"bias": torch.zeros(1, H, T, T, device="meta")}, "bias is on meta"),
        ({"bias": torch.zeros(1, H, T, T, dtype=torch.int64)}, "bias must be floating-point, not torch.int64"),
    ):
        for function in (attention, attention_reference):
            with pytest.raises(ValueError, match=message):
                function(q, k, v, **wrong)
    with pytest.raises(ValueError, match="must have the same dtype"):
        attention(q, k.float(), v)
    with pytest.raises(ValueError, match=r"q \(3, 2, 7, 0\) must be \[B, H, T, K\] with K at least 1"):
        attention(*(x[..., :0] for x in (q, k, v)), scale=1.0)
    packed = {"cu_seqlens": torch.tensor([0, T], dtype=torch.int32)}
    with pytest.raises(ValueError, match=r"bias \(1, 2, 7, 6\) must be square"):
        attention(q[:1], k[:1], v[:1], torch.zeros(1, H, T, T - 1), **packed)


@pytest.mark.parametrize("empty", ["batch", "tokens", "pack"])
def test_empty_inputs(empty: str) -> None:
    q, k, v, bias = inputs()
    masks = {"key_padding": torch.ones(B, T, dtype=torch.bool), "segments": torch.ones(B, T, dtype=torch.int32)}
    if empty == "pack":
        q, k, v, masks = q[:1, :, :0], k[:1, :, :0], v[:1, :, :0], {"cu_seqlens": torch.zeros(3, dtype=torch.int32)}
    elif empty == "tokens":
        q, k, v, bias = q[:, :, :0], k[:, :, :0], v[:, :, :0], bias[:, :, :0, :0]
        masks = {name: mask[:, :0] for name, mask in masks.items()}
    else:
        q, k, v = q[:0], k[:0], v[:0]
        masks = {name: mask[:0] for name, mask in masks.items()}
    out = attention(q, k, v, bias, **masks, dropout_p=0.1, seed=1)
    assert out.shape == q.shape
    gradients = torch.autograd.grad(out.sum(), (q, bias), allow_unused=True)
    assert gradients[0].shape == q.shape and (gradients[1] is None or not gradients[1].any())


def test_segments_and_packed_sequences_are_the_same_attention() -> None:
    """Sequences one after the other, by their bounds, by segments with a bias of their own, and one by one."""
    generator = torch.Generator().manual_seed(2)
    sizes = [3, 1, 5]
    q, k, v = (torch.randn(1, H, sum(sizes), K, generator=generator, dtype=torch.float64) for _ in range(3))
    bias = torch.randn(1, H, max(sizes), max(sizes), generator=generator, dtype=torch.float64)
    bounds = torch.tensor([0, 3, 4, 9], dtype=torch.int32)
    packed = attention(q, k, v, bias, cu_seqlens=bounds)
    segments = torch.repeat_interleave(torch.arange(3), torch.tensor(sizes))[None]
    positions = torch.cat([torch.arange(size) for size in sizes])
    gathered = bias[:, :, positions[:, None], positions]
    torch.testing.assert_close(attention(q, k, v, gathered, segments=segments), packed, rtol=1e-12, atol=1e-12)
    keys = torch.arange(3, dtype=torch.int32)
    for number, (start, size) in enumerate(((0, 3), (3, 1), (4, 5))):
        alone = [x[:, :, start : start + size] for x in (q, k, v)]
        for function in (attention, attention_reference):  # each drops by its own key
            dropped = function(q, k, v, cu_seqlens=bounds, dropout_p=0.5, keys=keys)[:, :, start : start + size]
            by_itself = function(*alone, dropout_p=0.5, keys=keys[number : number + 1])
            torch.testing.assert_close(dropped, by_itself, rtol=1e-12, atol=1e-12)
        one = F.scaled_dot_product_attention(*alone, attn_mask=bias[:, :, :size, :size])
        torch.testing.assert_close(packed[:, :, start : start + size], one, rtol=1e-12, atol=1e-12)


def test_a_seed_gives_a_key_to_each_row() -> None:
    q, k, v, _ = inputs()
    dropped = attention(q, k, v, dropout_p=0.5, seed=5)
    assert torch.equal(dropped, attention(q, k, v, dropout_p=0.5, seed=5))
    assert not torch.equal(dropped, attention(q, k, v, dropout_p=0.5, seed=6))
    same = [x[:1].expand(B, -1, -1, -1) for x in (q, k, v)]
    rows = attention(*same, dropout_p=0.5, seed=5)
    assert not torch.equal(rows[0], rows[1])


@pytest.mark.parametrize("function", [attention, attention_reference])
def test_queries_at_positions_equal_those_rows_of_full_attention(function) -> None:
    """With segments, padding, a bias and dropout, values and gradients."""
    generator = torch.Generator().manual_seed(1)
    q, k, v = (torch.randn(3, 2, 11, 4, generator=generator, dtype=torch.float64).requires_grad_() for _ in range(3))
    bias = torch.randn(3, 2, 11, 11, generator=generator, dtype=torch.float64)
    positions = torch.tensor([[10, 0, 3], [4, 4, 7], [1, 2, 9]])
    row = torch.arange(3)[:, None]
    masks = {
        "segments": (torch.rand(3, 11, generator=generator) < 0.2).cumsum(1),
        "key_padding": torch.rand(3, 11, generator=generator) < 0.9,
        "keys": mix(torch.arange(3, dtype=torch.int32)),
        "dropout_p": 0.3,
    }
    whole = function(q, k, v, bias, **masks).transpose(1, 2)[row, positions].transpose(1, 2)
    selected_q, selected_bias = (x.transpose(1, 2)[row, positions].transpose(1, 2) for x in (q, bias))
    selected = function(selected_q, k, v, selected_bias, **masks, query_positions=positions)
    torch.testing.assert_close(selected, whole, rtol=1e-12, atol=1e-14)
    grad = torch.randn(whole.shape, generator=generator, dtype=torch.float64)
    for ours, theirs in zip(*(torch.autograd.grad(out, (q, k, v), grad) for out in (selected, whole)), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-13)
    with pytest.raises(ValueError, match=r"query_positions \(3, 2\) must be \[B, queries\] \(3, 3\)"):
        function(selected_q, k, v, selected_bias, query_positions=positions[:, :2])
