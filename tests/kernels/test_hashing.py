import numpy as np
import pytest
import torch
from fastbert_kernels import combine, hash_dropout, keep_mask, mix
from fastbert_kernels.hashing import light_mix, threshold, uniform
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats


def words(count: int) -> torch.Tensor:
    return torch.arange(count, dtype=torch.int32)


def test_mix_equals_lowbias32_in_uint32() -> None:
    """Against the published algorithm, in numpy's unsigned arithmetic."""
    x = np.random.default_rng(0).integers(0, 2**32, 10_000, dtype=np.uint32)
    y = x.copy()
    y ^= y >> np.uint32(16)
    y *= np.uint32(0x7FEB352D)
    y ^= y >> np.uint32(15)
    y *= np.uint32(0x846CA68B)
    y ^= y >> np.uint32(16)
    ours = mix(torch.from_numpy(x.view(np.int32)))
    np.testing.assert_array_equal(ours.numpy().view(np.uint32), y)


def test_every_input_bit_flips_every_output_bit_half_the_time() -> None:
    x = torch.randint(-(2**31), 2**31 - 1, (50_000,), dtype=torch.int32, generator=torch.Generator().manual_seed(0))
    for bit in range(32):
        flipped = mix(x) ^ mix(x ^ (torch.tensor(1, dtype=torch.int32) << bit))
        for out in range(32):
            fraction = ((flipped >> out) & 1).double().mean().item()
            assert abs(fraction - 0.5) < 0.02, (bit, out, fraction)


def test_combine_is_injective_in_the_value() -> None:
    assert combine(torch.tensor(7, dtype=torch.int32), words(100_000)).unique().numel() == 100_000


@given(st.integers(1, 1000))
def test_uniform_covers_its_range_only(count: int) -> None:
    values = uniform(mix(words(5000)), count)
    assert values.min() >= 0 and values.max() < count


def test_uniform_is_uniform() -> None:
    counts = torch.bincount(uniform(mix(words(100_000)), 37), minlength=37)
    assert stats.chisquare(counts.numpy()).pvalue > 1e-3


@pytest.mark.parametrize("p", [0.0, 0.1, 0.5, 0.9])
def test_fraction_of_dropped_cells(p: float) -> None:
    keep = keep_mask(mix(words(2000)), 500, p)
    dropped = int((~keep).sum())
    if p == 0:
        assert dropped == 0
    else:
        assert stats.binomtest(dropped, keep.numel(), p).pvalue > 1e-3
        # Neither rows nor columns are special.
        for axis in (0, 1):
            z = ((~keep).double().mean(axis) - p) / (p * (1 - p) / keep.shape[axis]) ** 0.5
            upper = stats.chi2.sf((z**2).sum().item(), len(z))
            assert 1e-4 < upper < 1 - 1e-4


def test_masks_have_no_structure_across_rows_and_columns() -> None:
    """The xor of row and column keys cancels around a rectangle; after `light_mix` it does not."""
    sign = keep_mask(mix(words(1500)), 1500, 0.5).double() * 2 - 1
    rectangle = sign[:-1, :-1] * sign[1:, :-1] * sign[:-1, 1:] * sign[1:, 1:]
    assert abs(rectangle.mean().item()) < 4 / rectangle.numel() ** 0.5
    assert abs((sign[:, :-1] * sign[:, 1:]).mean().item()) < 4 / sign.numel() ** 0.5


def test_light_mix_broadcasts() -> None:
    rows, columns = mix(words(5)), mix(words(7) + 100)
    table = light_mix(rows[:, None], columns)
    assert table.shape == (5, 7)
    assert table[3, 4] == light_mix(rows[3:4], columns[4:5])[0]


def test_threshold_ends() -> None:
    assert threshold(0.0) == -(2**31)
    assert threshold(1.0) == 2**31 - 2
    assert all(threshold(p) % 2 == 0 for p in (0.1, 1 / 3, 0.5, 0.9))


def test_dropout_value_and_gradient() -> None:
    x = torch.randn(6, 40, dtype=torch.float64, requires_grad=True)
    keys = mix(words(6))
    keep = keep_mask(keys, 40, 0.3)
    out = hash_dropout(x, keys, 0.3)
    torch.testing.assert_close(out, x * keep / 0.7, rtol=1e-12, atol=0)
    torch.autograd.gradcheck(lambda x: hash_dropout(x, keys, 0.3), (x,))
    assert hash_dropout(x, keys, 0.0) is x
    with pytest.raises(ValueError, match="without the last"):
        hash_dropout(x, mix(words(5)), 0.3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dropout_is_the_mask_in_every_type(dtype: torch.dtype) -> None:
    """Bit masks on CPUs drop the same cells as the comparison, also for strided tensors and infinities."""
    keys = mix(words(4000)).view(20, 200)
    keep = keep_mask(keys, 48, 0.1)
    x = torch.randn(20, 48, 200).to(dtype).transpose(1, 2).requires_grad_()
    out = hash_dropout(x, keys, 0.1)
    assert torch.equal(out, torch.where(keep, x, 0) * (1 / 0.9))
    grad = torch.randn(200, 20, 48).to(dtype).transpose(0, 1)
    (found,) = torch.autograd.grad(out, x, grad)
    assert torch.equal(found, torch.where(keep, grad, 0) * (1 / 0.9))
    assert not hash_dropout(torch.full_like(x, torch.inf), keys, 0.1)[~keep].any()


def test_words_of_numpy_and_of_torch_are_equal() -> None:
    """Plain CPU tensors are hashed by numpy; a subclass of Tensor, like other devices and compilers, by PyTorch."""

    class Other(torch.Tensor):
        pass

    tensor = torch.cat([words(1000), torch.tensor([-(2**31), 2**31 - 1, -1, 0], dtype=torch.int32)])
    assert torch.equal(mix(tensor.as_subclass(Other)).as_subclass(torch.Tensor), mix(tensor))
    assert mix(tensor[0]).shape == () and torch.equal(mix(tensor[::2]), mix(tensor)[::2])


def test_wrong_arguments() -> None:
    """int64 would give other words, which differ between devices."""
    keys = words(3)
    for call, message in (
        (lambda: mix(torch.arange(3)), "words to hash must be int32, not torch.int64"),
        (lambda: combine(keys.long(), 1), "must be int32"),
        (lambda: combine(keys, torch.arange(3)), "must be int32"),
        (lambda: keep_mask(keys.long(), 4, 0.5), "must be int32"),
        (lambda: hash_dropout(torch.ones(3, 4), keys.long(), 0.5), "row_keys int32, not torch.float32 and torch.int64"),
        (lambda: hash_dropout(torch.ones(3, 4).long(), keys, 0.5), "x must be floating-point"),
        (lambda: hash_dropout(torch.ones(3, 4), keys, 1.0), r"p must lie in \[0, 1\), not 1.0"),
        (lambda: hash_dropout(torch.ones(3, 4), keys.to("meta"), 0.5), "row_keys are on meta and x on cpu"),
    ):
        with pytest.raises(ValueError, match=message):
            call()


def test_dropout_of_empty_tensors() -> None:
    for shape in ((0, 4), (3, 0)):
        assert hash_dropout(torch.ones(shape), words(shape[0]), 0.5).shape == shape
