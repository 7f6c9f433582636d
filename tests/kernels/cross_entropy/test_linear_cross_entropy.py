"""`linear_cross_entropy` against torch's cross-entropy: values and gradients, for all precisions and chunks."""

import pytest
import torch
import torch.nn.functional as F
from fastbert_kernels import linear_cross_entropy, linear_cross_entropy_reference
from fastbert_kernels.cross_entropy import dispatch
from fastbert_kernels.cross_entropy.dispatch import losses_and_gradients

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
        inputs = [x for x in (hidden, embedding, given) if x is not None]
        mine, other = (torch.autograd.grad(3 * loss, inputs) for loss in (ours, theirs))
        for a, b in zip(mine, other, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-13)


def test_gradcheck_and_single_gradients() -> None:
    hidden, embedding, bias, target = problem()
    torch.autograd.gradcheck(lambda h, e, b: linear_cross_entropy(h, e, b, target, rows=6), (hidden, embedding, bias))
    for only in range(3):
        given = [x.detach().requires_grad_(i == only) for i, x in enumerate((hidden, embedding, bias))]
        linear_cross_entropy(*given, target, rows=6).backward()
        assert [x.grad is not None for x in given] == [i == only for i in range(3)]
    with torch.no_grad():
        assert not linear_cross_entropy(hidden, embedding, bias, target, rows=6).requires_grad


def test_another_ignore_index() -> None:
    hidden, embedding, bias, target = problem()
    ours = linear_cross_entropy(hidden, embedding, bias, target.clamp(min=0), ignore_index=0, rows=9)
    theirs = F.cross_entropy(F.linear(hidden, embedding, bias), target.clamp(min=0), ignore_index=0)
    torch.testing.assert_close(ours, theirs)


def test_low_precision_errors_are_those_of_the_definition() -> None:
    exact = problem()
    reference = torch.autograd.grad(F.cross_entropy(F.linear(*exact[:3]), exact[3]), exact[:3])
    for autocast in (False, True):
        given = problem(torch.float32 if autocast else torch.bfloat16)
        errors = []
        for ours in (True, False):
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                if ours:
                    loss = linear_cross_entropy(*given, rows=12)
                else:
                    loss = linear_cross_entropy_reference(*given)
            assert loss.dtype == torch.float32
            found = torch.autograd.grad(loss, given[:3])
            assert [x.dtype for x in found] == [x.dtype for x in given[:3]]
            errors.append([(a.double() - b).abs().max() for a, b in zip(found, reference, strict=True)])
        for mine, plain in zip(*errors, strict=True):
            assert mine <= 2 * plain + 1e-5


def test_the_logits_of_all_rows_are_never_in_memory() -> None:
    hidden, embedding, bias, target = (x.detach() for x in problem())
    with Largest() as largest:  # does not see operations inside a custom operator
        losses_and_gradients(hidden, embedding, bias, target, -100, 3, torch.float64, [True, True, True])
    assert largest.size == V * D  # the embedding; the logits have N * V


def test_many_logits_are_computed_in_chunks(monkeypatch) -> None:
    """Few are not: plain PyTorch is as fast then. Tests below this size need `rows` to test the operator."""
    assert dispatch.FEW >= N * V
    for few, custom in ((N * V, False), (N * V - 1, True)):
        monkeypatch.setattr(dispatch, "FEW", few)
        loss = linear_cross_entropy(*problem(torch.float32), reduction="sum")
        assert ("fastbert_kernels" in loss.grad_fn.name()) == custom


def test_no_rows() -> None:
    hidden, embedding, bias, target = problem()
    loss = linear_cross_entropy(hidden[:0], embedding, bias, target[:0], reduction="sum", rows=5)
    assert loss == 0
    assert all(not x.any() for x in torch.autograd.grad(loss, (hidden, embedding, bias)))
    assert linear_cross_entropy(hidden, embedding, bias, torch.full_like(target, -100), rows=5).isnan()


def test_large_logits() -> None:
    """The logarithm of the sum loses no digits, and nothing overflows."""
    hidden, embedding = torch.full((2, 1), 1e4), torch.tensor([[1.0], [0.9999], [-1.0]])
    target = torch.tensor([1, 2])
    exact = linear_cross_entropy_reference(hidden.double(), embedding.double(), None, target, reduction="sum")
    loss = linear_cross_entropy(hidden, embedding, None, target, reduction="sum", rows=1)
    torch.testing.assert_close(loss.double(), exact, rtol=1e-6, atol=1e-3)


def test_sums_over_rows_do_not_overflow_float16() -> None:
    """dE_0 is the sum of -0.5 * 500 over 400 rows, -100,000, before the mean divides it."""
    hidden = torch.full((400, 1), 500.0, dtype=torch.float16)
    embedding = torch.zeros(2, 1, dtype=torch.float16, requires_grad=True)
    loss = linear_cross_entropy(hidden, embedding, None, torch.zeros(400, dtype=torch.int64), rows=100)
    (gradient,) = torch.autograd.grad(loss, embedding)
    torch.testing.assert_close(gradient, torch.tensor([[-250.0], [250.0]], dtype=torch.float16))


def test_pytorch_accepts_the_operator() -> None:
    hidden, embedding, bias, target = problem(torch.float32)
    torch.library.opcheck(
        losses_and_gradients, (hidden, embedding, bias, target, -100, 6, torch.float32, [True, True, True])
    )
    less = (hidden, embedding.detach(), None, target, -100, None, torch.bfloat16, [True, False, False])
    torch.library.opcheck(losses_and_gradients, less)


@pytest.mark.parametrize("autocast", [False, True])
def test_one_graph(autocast: bool) -> None:
    hidden, embedding, bias, target = problem(torch.float32)
    compiled = torch.compile(linear_cross_entropy, backend="aot_eager", fullgraph=True)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        both = [function(hidden, embedding, bias, target, rows=6) for function in (compiled, linear_cross_entropy)]
    found = [torch.autograd.grad(loss, (hidden, embedding, bias)) for loss in both]
    assert torch.equal(*both) and all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_a_second_derivative_is_an_error() -> None:
    hidden, embedding, bias, target = problem()
    loss = linear_cross_entropy(hidden, embedding, bias, target, rows=6)
    (gradient,) = torch.autograd.grad(loss * hidden.sum(), hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


def test_wrong_arguments() -> None:
    hidden, embedding, bias, target = problem()
    for wrong, message in (
        ((hidden[:, 1:], embedding, bias, target), "hidden"),
        ((hidden, embedding, bias[1:], target), "bias"),
        ((hidden, embedding, bias, target[1:]), "target"),
        ((hidden, embedding, bias, target.int()), "target must be int64, not torch.int32"),
        ((hidden, embedding.int(), bias, target), "embedding must be floating, not torch.int32"),
        ((hidden, embedding, bias.to("meta"), target), "bias is on meta and hidden on cpu"),
        ((hidden, embedding[:0], bias[:0], target), "with V at least 1"),
    ):
        for function in (linear_cross_entropy, linear_cross_entropy_reference):
            with pytest.raises(ValueError, match=message):
                function(*wrong)
    for rows in (0, -1):
        with pytest.raises(ValueError, match=f"rows must be at least 1, not {rows}"):
            linear_cross_entropy(hidden, embedding, bias, target, rows=rows)
    for function in (linear_cross_entropy, linear_cross_entropy_reference):
        with pytest.raises(ValueError, match="reduction"):
            function(hidden, embedding, bias, target, reduction="none")
