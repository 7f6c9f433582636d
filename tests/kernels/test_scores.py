import pytest
import torch
import torch.nn.functional as F
from fastbert_kernels import scores
from fastbert_kernels.scores import candidate_scores


def problem(rows: int, dtype: torch.dtype = torch.float64):
    """Ids that occur several times in a row, in several rows, and words that are no candidate at all."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(rows, 5, generator=generator, dtype=dtype, requires_grad=True)
    embedding = torch.randn(11, 5, generator=generator, dtype=dtype, requires_grad=True)
    return hidden, embedding, torch.randint(2, 9, (rows, 4), generator=generator)


@pytest.mark.parametrize("rows", [1, 3, 7, 8])
def test_values_and_gradients_are_those_of_plain_indexing(rows: int, monkeypatch) -> None:
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


def test_hidden_states_of_less_precision() -> None:
    hidden, embedding, ids = problem(6, torch.float32)
    half = hidden.detach().bfloat16().requires_grad_()
    out = candidate_scores(half, embedding, ids)
    assert out.dtype == torch.float32
    F.cross_entropy(out, torch.zeros(6, dtype=torch.int64)).backward()
    assert half.grad.dtype == torch.bfloat16 and embedding.grad.dtype == torch.float32
