"""Runs `linear_cross_entropy` with its Triton kernel on ragged cases and prints, as JSON, the errors (norms) of losses
and gradients against the float64 definition, next to those of the definition in the same precision. Fails if PyTorch's
checks of the operator fail. Runs on a GPU or, with TRITON_INTERPRET=1, on the CPU."""

import json

import torch
from fastbert_kernels import linear_cross_entropy, linear_cross_entropy_reference
from fastbert_kernels.backend import INTERPRETED
from fastbert_kernels.cross_entropy import triton_rows
from fastbert_kernels.cross_entropy.dispatch import losses_and_gradients
from torch import Tensor

torch.set_default_device("cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu")
GENERATOR = torch.Generator(torch.get_default_device()).manual_seed(0)
TYPES = (torch.float32, torch.bfloat16, torch.float16)
calls = 0


def poisoned(x: Tensor) -> Tensor:
    """`x` as a part of a larger tensor of NaN, so that reads beyond it are detected."""
    whole = torch.full([size + 3 for size in x.shape], torch.nan, dtype=x.dtype)
    return whole[tuple(slice(1, size + 1) for size in x.shape)].copy_(x)


def random(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=GENERATOR).to(dtype)


def targets(count: int, words: int, ignored: str) -> Tensor:
    target = torch.randint(0, words, (count,), generator=GENERATOR)
    target[0], target[-1] = words - 1, 0
    if ignored != "none":
        target[:: 3 if ignored == "third" else 1] = -100
    return torch.stack([target, target + words], 1)[:, 0]  # strided


def run(dtype: torch.dtype, shape: tuple[int, int, int], rows: int | None, has_bias: bool, ignored: str) -> None:
    """Prints a case: the errors of the kernel and of the definition for the loss and every gradient."""
    count, words, width = shape
    tensors = [poisoned(random(*size, dtype=dtype)) for size in ((count, width), (words, width), (words, 1))]
    tensors[2] = tensors[2][:, 0]  # strided
    tensors, target = tensors if has_bias else tensors[:2], targets(count, words, ignored)

    def results(function, dtype: torch.dtype | None = None, **options) -> list[Tensor]:
        own = [x.detach() if dtype is None else x.detach().to(dtype) for x in tensors]
        own = [x.requires_grad_() for x in own]
        own += [] if has_bias else [None]
        loss = function(*own, target, reduction="sum", **options)
        # Loss by loss, because in the sum the errors cancel by chance.
        with torch.no_grad():
            only = [torch.where(torch.arange(count) == row, target, -100) for row in range(count)]
            losses = torch.stack([function(*own, one, reduction="sum", **options) for one in only])
        torch.testing.assert_close(losses.sum(), loss, rtol=1e-5, atol=1e-5)
        return [losses, *torch.autograd.grad(loss / count, [x for x in own if x is not None])]

    before = calls
    ours, again = (results(linear_cross_entropy, rows=rows) for _ in range(2))
    assert calls > before, "the kernel did not run"
    exact, plain = results(linear_cross_entropy_reference, torch.float64), results(linear_cross_entropy_reference)
    case = f"{dtype} {shape} rows {rows} bias {has_bias} ignored {ignored}"
    assert all(torch.equal(a, b) and a.isfinite().all() for a, b in zip(ours, again, strict=True)), case
    found = zip(("loss", "hidden", "embedding", "bias"), exact, ours, plain, strict=False)
    errors = {name: [(x.double() - e).norm().item() for x in (a, b)] for name, e, a, b in found}
    print(json.dumps({"case": case, "errors": errors}), flush=True)
    with torch.no_grad():  # another variant, which overwrites nothing
        bias = tensors[2] if has_bias else None
        loss = linear_cross_entropy(*tensors[:2], bias, target, reduction="sum", rows=rows)
        torch.testing.assert_close(loss, ours[0].sum(), rtol=1e-6, atol=1e-6)


def check_rows(has_bias: bool) -> None:
    """The kernel alone: it writes only to the rows, for any stride, and handles extreme logits."""
    for dtype, words in ((torch.float32, 5000), (torch.bfloat16, 37), (torch.float16, 4096)):
        x = random(5, words) * 10
        x[0] *= 1e4 / x[0].abs().max()
        x[1, ::2] = -torch.inf
        x[1, : min(words - 5, 4500)] = -torch.inf  # a whole tile
        x[2] = 1e4
        x[4] = torch.nan  # not read: the row is ignored
        x, target = x.to(dtype), torch.tensor([3, words - 2 + words % 2, 7, words - 1, -100])
        target[1] = x[1].isfinite().nonzero()[-1, 0]
        whole = torch.full((7, words + 16), torch.nan, dtype=dtype)
        bias = poisoned(random(words) * 4) if has_bias else None
        logits, losses = whole[1:6, :words].copy_(x), torch.full((7,), torch.nan)
        triton_rows.triton_row_losses(logits, bias, target, -100, losses[1:6], True)
        exact = (x[:4].float() + bias if has_bias else x[:4]).double()  # the sum in float32, as in the kernel
        expected = torch.nn.functional.cross_entropy(exact, target[:4], reduction="none")
        torch.testing.assert_close(losses[1:5].double(), expected, rtol=1e-6, atol=1e-5)
        gradient = exact.softmax(1).scatter_add(1, target[:4, None], -torch.ones(4, 1, dtype=torch.float64))
        rounding = {torch.float32: 1e-6, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}[dtype]
        torch.testing.assert_close(logits[:4].double(), gradient, rtol=rounding, atol=1e-6)
        assert losses[5] == 0 and not logits[4].any()
        logits.fill_(torch.nan)
        losses[1:6] = torch.nan
        assert whole.isnan().all() and losses.isnan().all()
    logits, losses = random(2, 40), torch.zeros(2)
    bias = random(40) if has_bias else None
    triton_rows.triton_row_losses(logits, bias, torch.tensor([40, -1]), -100, losses, False)
    assert losses.isnan().all(), "a target outside the vocabulary"


def check_operator() -> None:
    """PyTorch's checks of a custom operator, and a single graph under torch.compile."""
    hidden, embedding, bias = (random(*shape).requires_grad_() for shape in ((9, 6), (20, 6), (20,)))
    target = targets(9, 20, "third")
    torch.library.opcheck(
        losses_and_gradients, (hidden, embedding, bias, target, -100, 4, torch.float32, [True, True, True])
    )
    less = (hidden, embedding.detach(), None, target, -100, None, torch.bfloat16, [True, False, False])
    torch.library.opcheck(losses_and_gradients, less)
    nothing = linear_cross_entropy(hidden[:0], embedding, bias, target[:0], reduction="sum")
    assert nothing == 0 and not any(x.any() for x in torch.autograd.grad(nothing, (hidden, embedding, bias)))
    compiled = torch.compile(linear_cross_entropy, backend="aot_eager", fullgraph=True)
    both = [function(hidden, embedding, bias, target, rows=4) for function in (compiled, linear_cross_entropy)]
    assert torch.equal(*both)
    assert torch.equal(*(torch.autograd.grad(x, embedding)[0] for x in both))


def main() -> None:
    kernel = triton_rows.triton_row_losses

    def counting(*arguments) -> None:
        global calls
        calls += 1
        kernel(*arguments)

    triton_rows.triton_row_losses = counting
    check_rows(has_bias=False)
    check_rows(has_bias=True)
    check_operator()
    for dtype in TYPES:
        run(dtype, (23, 37, 8), 12, True, "third")
        run(dtype, (7, 130, 5), None, False, "none")
    for shape, rows, has_bias, ignored in (
        ((5, 16, 3), None, True, "all"),
        ((1, 3, 1), 1, True, "none"),
        ((3, 4096, 4), 2, False, "third"),
        ((4, 9001, 4), 3, True, "third"),
    ):
        run(torch.float32, shape, rows, has_bias, ignored)


if __name__ == "__main__":
    main()
