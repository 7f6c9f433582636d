"""The loss without logits against torch's own, values and gradients, in every precision and chunk."""

import pytest
import torch
import torch.nn.functional as F
from fastbert_kernels.linear_cross_entropy import linear_cross_entropy

from tests.kernels.largest import Largest

N, V, D = 23, 37, 8


def problem(dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    hidden, embedding, bias = (
        torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
        for shape in ((N, D), (V, D), (V,))
    )
    target = torch.randint(0, V, (N,), generator=generator)
    target[::5] = -100
    return hidden, embedding, bias, target


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("rows", [1, 7, 23, 1000, None])
def test_equals_torch(rows: int | None, reduction: str) -> None:
    hidden, embedding, bias, target = problem()
    for given in (bias, None):
        ours = linear_cross_entropy(hidden, embedding, given, target, reduction=reduction, rows=rows)
        theirs = F.cross_entropy(F.linear(hidden, embedding, given), target, reduction=reduction)
        torch.testing.assert_close(ours, theirs, rtol=1e-13, atol=1e-13)
        wanted = [x for x in (hidden, embedding, given) if x is not None]
        mine, other = (torch.autograd.grad(3 * loss, wanted) for loss in (ours, theirs))
        for a, b in zip(mine, other, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-13)


def test_gradcheck_and_part_of_the_gradients() -> None:
    hidden, embedding, bias, target = problem()
    torch.autograd.gradcheck(lambda h, e, b: linear_cross_entropy(h, e, b, target, rows=6), (hidden, embedding, bias))
    loss = linear_cross_entropy(hidden, embedding.detach(), bias.detach(), target)
    loss.backward()
    assert hidden.grad is not None and embedding.grad is None
    with torch.no_grad():
        assert not linear_cross_entropy(hidden, embedding, bias, target).requires_grad


def test_another_target_that_does_not_count() -> None:
    hidden, embedding, bias, target = problem()
    ours = linear_cross_entropy(hidden, embedding, bias, target.clamp(min=0), ignore_index=0)
    theirs = F.cross_entropy(F.linear(hidden, embedding, bias), target.clamp(min=0), ignore_index=0)
    torch.testing.assert_close(ours, theirs)


def test_low_precision_is_no_worse_than_plain() -> None:
    exact = problem()
    reference = torch.autograd.grad(F.cross_entropy(F.linear(*exact[:3]), exact[3]), exact[:3])
    for autocast in (False, True):
        given = problem(torch.float32 if autocast else torch.bfloat16)
        errors = []
        for ours in (True, False):
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                if ours:
                    loss = linear_cross_entropy(*given, rows=7)
                else:
                    loss = F.cross_entropy(F.linear(*given[:3]).float(), given[3])
            assert loss.dtype == torch.float32
            found = torch.autograd.grad(loss, given[:3])
            assert [x.dtype for x in found] == [x.dtype for x in given[:3]]
            errors.append([(a.double() - b).abs().max() for a, b in zip(found, reference, strict=True)])
        for mine, plain in zip(*errors, strict=True):
            assert mine <= 2 * plain + 1e-5


def test_the_logits_of_all_rows_are_never_there_at_once() -> None:
    hidden, embedding, bias, target = problem()
    with Largest() as largest:
        linear_cross_entropy(hidden, embedding, bias, target, rows=3).backward()
    assert largest.size == V * D  # a gradient; the logits have 3 * V


def test_refused() -> None:
    hidden, embedding, bias, target = problem()
    for wrong, message in (
        ((hidden[:, 1:], embedding, bias, target), "hidden"),
        ((hidden, embedding, bias[1:], target), "bias"),
        ((hidden, embedding, bias, target[1:]), "target"),
    ):
        with pytest.raises(ValueError, match=message):
            linear_cross_entropy(*wrong)
    with pytest.raises(ValueError, match="reduction"):
        linear_cross_entropy(hidden, embedding, bias, target, reduction="none")
