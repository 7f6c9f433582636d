"""Runs the sampling kernels and the reference on ragged vocabularies and prints, as JSON, the fraction of rows with
other samples and the largest difference of the log-probabilities of equal samples. Fails if samples repeat, are not
allowed or have no finite log-probability, or if PyTorch's checks of the operators fail. The argument is the name of a
group of cases; runs on a GPU or, with TRITON_INTERPRET=1, on the CPU."""

import json
import sys

import torch
from fastbert_kernels import (
    combine,
    sample_candidates,
    sample_candidates_reference,
    sample_distinct,
    sample_distinct_reference,
)
from fastbert_kernels.backend import INTERPRETED
from fastbert_kernels.sampling.dispatch import candidates_operator, distinct_operator
from torch import Tensor

torch.set_default_device("cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu")
GENERATOR = torch.Generator(torch.get_default_device()).manual_seed(0)
torch.use_deterministic_algorithms(True, warn_only=True)  # uninitialized memory is NaN, so reads are detected


def keys(count: int) -> Tensor:
    return combine(torch.tensor(5, dtype=torch.int32), torch.arange(count, dtype=torch.int32))


def poisoned(x: Tensor) -> Tensor:
    """`x` as a part of a larger tensor of NaN."""
    whole = torch.full([size + 3 for size in x.shape], torch.nan, dtype=x.dtype)
    return whole[1:-2, 1:-2].copy_(x)


def normal(rows: int, words: int, scale: float, dtype: torch.dtype = torch.float32) -> Tensor:
    return (torch.randn(rows, words, generator=GENERATOR) * scale).to(dtype)


def check(
    ids: Tensor, log_probabilities: Tensor, words: int, forbidden: Tensor | None, excluded: Tensor | None
) -> None:
    ordered = ids.sort(1).values
    assert (ordered[:, 1:] > ordered[:, :-1]).all() and (ids >= 0).all() and (ids < words).all()
    assert forbidden is None or not torch.isin(ids, forbidden).any()
    assert excluded is None or not (ids == excluded[:, None]).any()
    assert log_probabilities.isfinite().all() and log_probabilities.dtype == torch.float32


def compare(case: str, ours: tuple[Tensor, Tensor], reference: tuple[Tensor, Tensor]) -> None:
    """Prints a case. Below 1e-37 the order is arbitrary, and the reference's log-probabilities have few digits."""
    same = (ours[0] == reference[0]) & ((reference[1] > -85) | (reference[1] < -600))
    other = (ours[0] != reference[0]).any(1).double().mean().item()
    error = (ours[1] - reference[1]).abs()[same].max().item()
    print(json.dumps({"case": case, "other": other, "error": error}), flush=True)


def run(logits: Tensor, k: int, forbidden: Tensor | None = None, excluded: Tensor | None = None, case="") -> None:
    row_keys, before = keys(len(logits)), logits.clone()
    ours = sample_distinct(logits, k, row_keys, forbidden=forbidden, excluded=excluded)
    assert torch.equal(logits, before)
    check(*ours, logits.shape[1], forbidden, excluded)
    with_words = f"forbidden {forbidden is not None} excluded {excluded is not None}"
    case = f"{case} {logits.dtype} N {len(logits)} V {logits.shape[1]} K {k} {with_words}"
    compare(case, ours, sample_distinct_reference(logits, k, row_keys, forbidden=forbidden, excluded=excluded))


def random_words(count: int, words: int) -> Tensor:
    return torch.randperm(words, generator=GENERATOR)[:count]


def vocabularies() -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        run(
            poisoned(normal(6, 300, 3.0, dtype)),
            7,
            random_words(40, 300),
            torch.randint(0, 300, (6,), generator=GENERATOR),
        )
    run(poisoned(normal(8, 1000, 2.0)), 9)
    run(normal(3, 64, 1.0).expand(6, 3, 64)[:, 1], 1)  # one row, expanded
    run(normal(1, 8, 1.0), 8)
    # All allowed words are sampled, up to the last word of the last block.
    run(poisoned(normal(1, 64, 1.0)), 64)
    run(poisoned(normal(3, 65, 1.0, torch.float16)), 64, excluded=torch.tensor([64, 0, 63]))
    run(poisoned(normal(1, 130, 1.0)), 70, random_words(60, 130))


def distributions() -> None:
    """Five words, one with probability 0; flat and peaked rows; rows without the most likely word, without all likely
    words, without all words of a block."""
    run(torch.tensor([0.45, 0.3, 0.2, 0.05, 0.0]).log().expand(40, -1), 2, case="pairs of five words:")
    for scale in (0.01, 10.0, 3000.0):
        logits = normal(4, 300, scale)
        run(poisoned(logits), 9, case=f"scale {scale}:")
        run(poisoned(logits), 9, excluded=logits.argmax(1), case=f"scale {scale}, without the most likely word:")
        likely = logits.mean(0).topk(30).indices
        run(
            poisoned(logits),
            9,
            forbidden=likely,
            excluded=logits.argmin(1),
            case=f"scale {scale}, without likely words:",
        )
    empty = torch.arange(64, 128)
    logits = normal(3, 200, 2.0)
    logits[:, 64:128] += 1000
    run(poisoned(logits), 12, forbidden=empty, case="an empty block:")
    run(poisoned(logits), 12, forbidden=empty[1:], excluded=torch.full((3,), 64), case="a block emptied by a row:")
    logits[:, :190] = -torch.inf
    run(poisoned(logits), 14, excluded=torch.arange(180, 183), case="words with probability 0:")
    ids, log_probabilities = sample_distinct(torch.full((3, 70), -torch.inf), 5, keys(3))
    check(ids, log_probabilities, 70, None, None)
    rows_without_a_distribution()
    assert sample_distinct(torch.zeros(0, 70), 3, keys(0))[0].shape == (0, 3)


def rows_without_a_distribution() -> None:
    """With NaN or infinities in all logits or in one, samples are distinct and allowed, and other rows do not
    change."""
    forbidden, excluded = torch.arange(80), torch.arange(100, 107)  # no word of the first block is allowed
    logits = normal(7, 200, 2.0)
    alone, _ = sample_distinct(logits, 6, keys(7), forbidden=forbidden, excluded=excluded)
    for row, bad in enumerate((torch.nan, torch.inf, -torch.inf)):
        logits[row] = bad
        logits[row + 3, 150] = bad
    ours, _ = sample_distinct(logits, 6, keys(7), forbidden=forbidden, excluded=excluded)
    reference, _ = sample_distinct_reference(logits, 6, keys(7), forbidden=forbidden, excluded=excluded)
    for ids in (ours, reference):
        check(ids, torch.zeros(ids.shape), 200, forbidden, excluded)
    assert torch.equal(ours[6:], alone[6:])


def candidates() -> None:
    rows, words = 7, 1000
    for dtype in (torch.float32, torch.bfloat16):
        hidden, embedding = normal(rows, 8, 1.0, dtype), normal(words, 8, 1.0)
        more = {"bias": normal(1, words, 1.0)[0], "forbidden": random_words(60, words), "temperature": 1.5}
        excluded, row_keys = torch.randint(0, words, (rows,), generator=GENERATOR), keys(rows)
        whole = sample_candidates(hidden, embedding, 5, keys=row_keys, excluded=excluded, **more)
        check(*whole, words, more["forbidden"], excluded)
        assert sample_candidates(hidden[:0], embedding, 5, keys=row_keys[:0], **more)[0].shape == (0, 5)
        reference = sample_candidates_reference(hidden, embedding, 5, keys=row_keys, excluded=excluded, **more)
        compare(f"candidates {dtype}", whole, reference)
        order = torch.randperm(rows, generator=GENERATOR)
        for chunk in (3, 1000):
            other = sample_candidates(
                hidden[order], embedding, 5, keys=row_keys[order], excluded=excluded[order], rows=chunk, **more
            )
            assert torch.equal(other[0], whole[0][order])
    # Dtypes that the kernels do not support fall back to PyTorch.
    double = sample_candidates(hidden.double(), embedding, 5, keys=row_keys)
    assert torch.equal(double[0], sample_candidates_reference(hidden.double(), embedding, 5, keys=row_keys)[0])
    assert double[1].dtype == torch.float64


def check_operators() -> None:
    hidden, embedding, bias = normal(3, 4, 1.0), normal(70, 4, 1.0), normal(1, 70, 1.0)[0]
    forbidden, excluded = torch.tensor([3, 69]), torch.tensor([1, 2, 64])
    for options in ((bias, keys(3), forbidden, excluded), (None, keys(3), None, None)):
        torch.library.opcheck(candidates_operator, (hidden, embedding, *options, 2, 1.0, 2))
    torch.library.opcheck(distinct_operator, (normal(3, 70, 1.0), keys(3), forbidden, excluded, 2))

    def both(hidden: Tensor, logits: Tensor) -> tuple[Tensor, Tensor]:
        ids, _ = sample_candidates(hidden, embedding, 2, seed=3, bias=bias, forbidden=forbidden)
        return ids, sample_distinct(logits, 2, keys(3), excluded=excluded)[0]

    tensors = hidden.requires_grad_(), normal(3, 70, 1.0).requires_grad_()
    compiled = torch.compile(both, backend="aot_eager", fullgraph=True)(*tensors)
    assert all(torch.equal(a, b) for a, b in zip(compiled, both(*tensors), strict=True))


if __name__ == "__main__":
    {f.__name__: f for f in (check_operators, vocabularies, distributions, candidates)}[sys.argv[1]]()
