import pytest
import torch
import torch.nn.functional as F
from fastbert_kernels import scores
from fastbert_kernels.scores import candidate_scores


def problem(rows: int, dtype: torch.dtype = torch.float64):
    """Ids that occur several times in a row and in several rows, and words that are not candidates."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(rows, 5, generator=generator, dtype=dtype, requires_grad=True)
    embedding = torch.randn(11, 5, generator=generator, dtype=dtype, requires_grad=True)
    return hidden, embedding, torch.randint(2, 9, (rows, 4), generator=generator)


@pytest.mark.parametrize("rows", [1, 3, 7, 8])
def test_values_and_gradients_equal_plain_indexing(rows: int, monkeypatch) -> None:
    monkeypatch.setitem(scores.ROWS, "cpu", 3)
    hidden, embedding, ids = problem(rows)
    ours = candidate_scores(hidden, embedding, ids)
    plain = (embedding[ids] * hidden[:, None]).sum(-1)
    torch.testing.assert_close(ours, plain)
    weight = torch.randn(ours.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for a, b in zip(
        torch.autograd.grad((ours * weight).sum(), (hidden, embedding)),
        torch.autograd.grad((plain * weight).sum(), (hidden, embedding)),
        strict=True,
    ):
        torch.testing.assert_close(a, b)


def test_hidden_states_of_lower_precision() -> None:
    hidden, embedding, ids = problem(6, torch.float32)
    half = hidden.detach().bfloat16().requires_grad_()
    out = candidate_scores(half, embedding, ids)
    assert out.dtype == torch.float32
    F.cross_entropy(out, torch.zeros(6, dtype=torch.int64)).backward()
    assert half.grad.dtype == torch.bfloat16 and embedding.grad.dtype == torch.float32


@pytest.mark.parametrize(("rows", "candidates"), [(0, 4), (3, 0), (0, 0)])
def test_no_rows_or_no_candidates(rows: int, candidates: int) -> None:
    hidden, embedding, ids = problem(rows)
    out = candidate_scores(hidden, embedding, ids[:, :candidates])
    assert out.shape == (rows, candidates)
    for gradient, x in zip(torch.autograd.grad(out.sum(), (hidden, embedding)), (hidden, embedding), strict=True):
        assert gradient.shape == x.shape and not gradient.any()


def test_wrong_arguments() -> None:
    hidden, embedding, ids = problem(3)
    for wrong, message in (
        ((hidden[:, 1:], embedding, ids), r"hidden \(3, 4\) and embedding \(11, 5\) must be \[N, D\], \[V, D\]"),
        ((hidden, embedding, ids[1:]), r"ids must be int64 \[N, K\], N = 3, not torch.int64 \(2, 4\)"),
        ((hidden, embedding, ids.int()), "not torch.int32"),
        ((hidden, embedding, ids[0]), r"\(4,\)"),
        ((hidden, embedding.long(), ids), "must be floating-point"),
        ((hidden, embedding, ids.to("meta")), r"ids \(meta\) must be on one device"),
    ):
        with pytest.raises(ValueError, match=message):
            candidate_scores(*wrong)
