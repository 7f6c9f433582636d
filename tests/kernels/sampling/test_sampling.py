"""Samples have the distribution of sampling without replacement, by enumeration, and depend only on their keys."""

import itertools
import re

import pytest
import torch
from fastbert_kernels import sample_candidates, sample_candidates_reference, sample_distinct, sample_distinct_reference
from fastbert_kernels.sampling import reference
from fastbert_kernels.sampling.dispatch import candidates_operator, distinct_operator
from scipy.stats import chisquare

from tests.kernels.largest import Largest

ROWS = 40_000


@pytest.fixture
def block(request, monkeypatch) -> int:
    """Number of words in a block."""
    monkeypatch.setattr(reference, "BLOCK", request.param)
    return request.param


def keys(count: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-(2**31), 2**31, (count,), generator=generator).to(torch.int32)


def assert_distribution(samples: torch.Tensor, probabilities: list[float]) -> None:
    """Chi-square test of ordered samples [N, K] against p(a) p(b) / (1 - p(a)) ...; rare outcomes are pooled."""
    outcomes = {}
    for words in itertools.permutations([w for w, p in enumerate(probabilities) if p], samples.shape[1]):
        probability, left = 1.0, [p for w, p in enumerate(probabilities)]
        for word in words:
            probability *= left[word] / sum(left)
            left[word] = 0.0
        outcomes[words] = probability
    seen = {words: 0 for words in outcomes}
    for words, count in zip(*torch.unique(samples, dim=0, return_counts=True), strict=True):
        seen[tuple(words.tolist())] += int(count)  # a KeyError is an outcome with probability 0
    common = [words for words in outcomes if outcomes[words] * len(samples) >= 10]
    expected = [outcomes[words] * len(samples) for words in common]
    observed = [seen[words] for words in common]
    rest = len(samples) - sum(expected)
    if rest > 10:
        expected, observed = [*expected, rest], [*observed, len(samples) - sum(observed)]
    else:
        assert len(samples) - sum(observed) < rest + 20
        expected = [value * sum(observed) / sum(expected) for value in expected]
    assert chisquare(observed, expected).pvalue > 1e-4


PEAKED = [0.9999, *(0.0001 * 2.0**-i for i in range(1, 8))]
DISTRIBUTIONS = {
    "one of thirty": ([float(i % 7 + 1) for i in range(30)], 1),
    "two of thirty": ([1.0 / (i + 1) for i in range(30)], 2),
    "three of six": ([0.4, 0.25, 0.15, 0.1, 0.07, 0.03], 3),
    "all three": ([0.7, 0.2, 0.1], 3),
    "peaked": (PEAKED, 2),
    "peaked twice": ([0.9999, 0.0000999, *[0.00000002] * 5], 3),
    "sharper than float32": ([1.0, 3e-15, 2e-15, 1e-15], 2),
    "near the floor": ([1.0, 4e-33, 3e-33, 2e-33, 1e-33], 3),
}


@pytest.mark.parametrize("block", [4, 64], indirect=True)
@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_the_distribution(name: str, block: int) -> None:
    weights, k = DISTRIBUTIONS[name]
    logits = torch.tensor(weights, dtype=torch.float64).log().float()
    rows = ROWS if block == 4 else ROWS // 4
    ids, log_probabilities = sample_distinct(logits.expand(rows, -1), k, keys(rows))
    assert_distribution(ids, [w / sum(weights) for w in weights])
    torch.testing.assert_close(log_probabilities[:100], logits.log_softmax(-1)[ids[:100]], rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("block", [4, 64], indirect=True)
def test_the_distribution_with_forbidden_and_excluded_words(block: int) -> None:
    """In each row a word is excluded that is more likely than all others together."""
    weights = torch.tensor([50.0, 5, 4, 3, 2, 1, 100, 0.5])
    excluded = torch.arange(ROWS) % 3  # one of 0, 1, 2
    ids, log_probabilities = sample_distinct(
        weights.log().expand(ROWS, -1), 2, keys(ROWS), forbidden=torch.tensor([6]), excluded=excluded
    )
    assert not (ids == 6).any() and not (ids == excluded[:, None]).any()
    for word in range(3):
        rest = weights.tolist()
        rest[word] = rest[6] = 0.0
        rows = excluded == word
        assert_distribution(ids[rows], [w / sum(rest) for w in rest])
        torch.testing.assert_close(
            log_probabilities[rows][:50], (torch.tensor(rest) / sum(rest)).log()[ids[rows][:50]], rtol=1e-5, atol=1e-5
        )


@pytest.mark.parametrize("block", [4, 64], indirect=True)
def test_samples_are_distinct_and_allowed_for_any_distribution(block: int) -> None:
    """Flat rows, peaked ones, and ones where all words but one underflow in float32."""
    generator = torch.Generator().manual_seed(1)
    scale = torch.tensor([0.1, 10.0, 100.0, 3000.0]).repeat(5000)[:, None]
    logits = torch.randn(20_000, 30, generator=generator) * scale
    forbidden = torch.arange(4)
    excluded = torch.randint(0, 30, (20_000,), generator=generator)
    logits[torch.arange(20_000), excluded] += 50
    ids, log_probabilities = sample_distinct(logits, 5, keys(20_000), forbidden=forbidden, excluded=excluded)
    assert (ids >= 4).all() and (ids < 30).all() and not (ids == excluded[:, None]).any()
    ordered = ids.sort(1).values
    assert (ordered[:, 1:] > ordered[:, :-1]).all()
    assert log_probabilities.isfinite().all()
    # All 26 words, or 25 without the excluded one.
    few = slice(4000)
    every = sample_distinct(logits[few], 25, keys(4000), forbidden=forbidden, excluded=excluded[few])[0].sort(1).values
    assert (every[:, 1:] > every[:, :-1]).all() and (every >= 4).all() and not (every == excluded[few, None]).any()


def problem(rows: int = 60, vocabulary: int = 300, width: int = 8, dtype=torch.float64):
    generator = torch.Generator().manual_seed(2)
    hidden = torch.randn(rows, width, generator=generator, dtype=dtype)
    embedding = torch.randn(vocabulary, width, generator=generator, dtype=dtype)
    bias = torch.randn(vocabulary, generator=generator, dtype=dtype)
    forbidden = torch.randperm(vocabulary, generator=generator)[:60]
    excluded = torch.randint(0, vocabulary, (rows,), generator=generator)
    return hidden, embedding, {"bias": bias, "forbidden": forbidden, "excluded": excluded}


def test_chunks_and_the_order_of_rows_change_nothing() -> None:
    hidden, embedding, more = problem()
    k = keys(60)
    whole = sample_distinct(
        hidden @ embedding.T + more["bias"], 6, k, forbidden=more["forbidden"], excluded=more["excluded"]
    )
    for rows in (1, 7, 60, 1000, None):
        ids, log_probabilities = sample_candidates(hidden, embedding, 6, keys=k, rows=rows, **more)
        assert torch.equal(ids, whole[0])
        torch.testing.assert_close(log_probabilities, whole[1])
    order = torch.randperm(60, generator=torch.Generator().manual_seed(3))
    shuffled = {**more, "excluded": more["excluded"][order]}
    assert torch.equal(sample_candidates(hidden[order], embedding, 6, keys=k[order], **shuffled)[0], whole[0][order])
    # The first samples do not depend on k; other keys give other samples.
    assert torch.equal(sample_candidates(hidden, embedding, 2, keys=k, **more)[0], whole[0][:, :2])
    assert (sample_candidates(hidden, embedding, 6, keys=keys(60, 9), **more)[0] != whole[0]).any(1).all()


def test_a_seed_gives_a_key_to_each_row() -> None:
    hidden, embedding, more = problem()
    ids, _ = sample_candidates(hidden, embedding, 4, seed=7, **more)
    assert torch.equal(ids, sample_candidates(hidden, embedding, 4, seed=7, rows=11, **more)[0])
    assert (ids != sample_candidates(hidden, embedding, 4, seed=8, **more)[0]).any(1).all()
    # Rows with equal logits have independent samples.
    same = torch.zeros(ROWS, 2)
    samples, _ = sample_candidates(same, torch.zeros(5, 2), 2, seed=2**40 + 1)
    assert_distribution(samples, [0.2] * 5)


def test_wrong_arguments() -> None:
    hidden, embedding, more = problem()
    for wrong in ({}, {"seed": 1, "keys": keys(60)}):
        with pytest.raises(ValueError, match="either seed or keys"):
            sample_candidates(hidden, embedding, 4, **wrong, **more)
    most = len(embedding) - len(more["forbidden"]) - 1
    assert sample_candidates(hidden, embedding, most, seed=1, **more)[0].shape == (60, most)
    for k in (0, most + 1):
        with pytest.raises(ValueError, match=f"cannot sample {k} distinct words from the {most}"):
            sample_candidates(hidden, embedding, k, seed=1, **more)
    with pytest.raises(ValueError, match=r"hidden \(60, \d+\) and embedding"):
        sample_candidates(hidden, embedding[:, 1:], 4, seed=1, **more)
    with pytest.raises(ValueError, match="temperature must be above 0"):
        sample_candidates(hidden, embedding, 4, seed=1, temperature=0.0, **more)


def test_wrong_tensors() -> None:
    hidden, embedding, more = problem()
    logits, k = hidden @ embedding.T, keys(60)
    of_both = {
        "keys must be int32 [N], N = 60, not torch.int64 (60,)": {"keys": k.long()},
        "keys must be int32 [N], N = 60, not torch.int32 (59,)": {"keys": k[1:]},
        "forbidden must be int64 [F], not torch.int32 (2,)": {"forbidden": torch.zeros(2, dtype=torch.int32)},
        "forbidden must be int64 [F], not torch.int64 (1, 2)": {"forbidden": torch.zeros(1, 2, dtype=torch.int64)},
        "excluded must be int64 [N], N = 60, not torch.int64 (60, 1)": {"excluded": more["excluded"][:, None]},
        "excluded must be int64 [N], N = 60, not torch.int32 (60,)": {"excluded": more["excluded"].int()},
        "keys is on meta, but the rows are on cpu": {"keys": k.to("meta")},
        "forbidden is on meta": {"forbidden": more["forbidden"].to("meta")},
        "excluded is on meta": {"excluded": more["excluded"].to("meta")},
    }
    of_samples = {
        "bias (299,) must be [V] for embedding (300, 8)": {"bias": more["bias"][1:]},
        "hidden must be floating, not torch.int64": {"hidden": hidden.long()},
        "embedding must be floating, not torch.int64": {"embedding": embedding.long()},
        "bias must be floating, not torch.int64": {"bias": more["bias"].long()},
        "embedding is on meta": {"embedding": embedding.to("meta")},
        "bias is on meta": {"bias": more["bias"].to("meta")},
        "hidden (480,) and embedding (300, 8) must be [N, D], [V, D]": {"hidden": hidden.flatten()},
        "rows must be at least 1, not 0": {"rows": 0},
    }
    for message, wrong in {**of_both, **of_samples}.items():
        for function in (sample_candidates, sample_candidates_reference):
            with pytest.raises(ValueError, match=re.escape(message)):
                function(**{"hidden": hidden, "embedding": embedding, "k": 4, "keys": k, **wrong})
    of_logits = {
        "logits (18000,) must be [N, V]": {"logits": logits.flatten()},
        "logits must be floating, not torch.int64": {"logits": logits.long()},
        "cannot sample 301 distinct words from the 300": {"k": 301},
    }
    for message, wrong in {**of_both, **of_logits}.items():
        with pytest.raises(ValueError, match=re.escape(message)):
            sample_distinct(**{"logits": logits, "k": 4, "keys": k, **wrong})


def test_the_reference_and_the_operators() -> None:
    hidden, embedding, more = problem(dtype=torch.float32)
    ours, plain = (f(hidden, embedding, 4, seed=3, **more) for f in (sample_candidates, sample_candidates_reference))
    assert torch.equal(ours[0], plain[0]) and torch.equal(ours[1], plain[1])
    words = more["forbidden"], more["excluded"]
    torch.library.opcheck(candidates_operator, (hidden, embedding, more["bias"], keys(60), *words, 4, 1.0, 50))
    torch.library.opcheck(candidates_operator, (hidden, embedding, None, keys(60), None, None, 4, 2.0, None))
    torch.library.opcheck(distinct_operator, (hidden @ embedding.T, keys(60), *words, 4))
    compiled = torch.compile(sample_candidates, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(hidden.requires_grad_(), embedding, 4, seed=3, **more)[0], ours[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("words", [300, 320])  # ragged and in whole blocks
def test_logits_are_not_modified(words: int, dtype: torch.dtype) -> None:
    hidden, embedding, more = problem(vocabulary=words, dtype=dtype)
    logits = hidden @ embedding.T
    before = logits.clone()
    sample_distinct(logits, 3, keys(60), forbidden=more["forbidden"], excluded=more["excluded"])
    assert torch.equal(logits, before)


def test_no_rows() -> None:
    ids, log_probabilities = sample_candidates(torch.zeros(0, 8), torch.zeros(70, 8), 3, seed=1)
    assert ids.shape == log_probabilities.shape == sample_distinct(torch.zeros(0, 70), 3, keys(0))[0].shape == (0, 3)


def test_temperature_divides_the_logits() -> None:
    hidden, embedding, more = problem()
    words = {"forbidden": more["forbidden"], "excluded": more["excluded"]}
    warm = sample_candidates(hidden, embedding, 4, keys=keys(60), temperature=2.5, **more)
    divided = sample_distinct((hidden @ embedding.T + more["bias"]) / 2.5, 4, keys(60), **words)
    assert torch.equal(warm[0], divided[0])
    torch.testing.assert_close(warm[1], divided[1])
    assert not torch.equal(warm[0], sample_candidates(hidden, embedding, 4, keys=keys(60), **more)[0])


def test_the_logits_of_all_rows_are_never_in_memory() -> None:
    hidden, embedding, more = problem(rows=512, dtype=torch.float32)
    with Largest() as largest:  # does not see operations inside a custom operator
        sample_candidates_reference(hidden, embedding, 3, keys=keys(512), rows=32, **more)
    assert largest.size == 32 * 320  # the vocabulary in whole blocks


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_gradient_and_any_precision(dtype: torch.dtype) -> None:
    hidden, embedding, more = problem(dtype=torch.float32)
    hidden, embedding = hidden.to(dtype).requires_grad_(), embedding.requires_grad_()
    ids, log_probabilities = sample_candidates(hidden, embedding, 5, keys=keys(60), **more)
    assert not log_probabilities.requires_grad and log_probabilities.dtype == torch.float32
    assert not torch.isin(ids, more["forbidden"]).any() and not (ids == more["excluded"][:, None]).any()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_rows_without_a_distribution(bad: float) -> None:
    """With logits that are not finite, samples are distinct and allowed, and other rows do not change."""
    forbidden, excluded = torch.arange(80), torch.arange(100, 106)  # no word of the first block is allowed
    more = {"keys": keys(6), "forbidden": forbidden, "excluded": excluded}
    hidden, embedding = torch.randn(6, 8), torch.randn(200, 8)
    alone, _ = sample_candidates(hidden, embedding, 119, **more)
    hidden[1], hidden[4, 3] = bad, bad
    logits = hidden @ embedding.T
    logits[3, 150] = bad
    for ids in (sample_candidates(hidden, embedding, 119, **more)[0], sample_distinct(logits, 119, **more)[0]):
        assert all(len(set(row)) == 119 for row in ids.tolist())
        assert ((ids >= 0) & (ids < 200) & ~torch.isin(ids, forbidden) & (ids != excluded[:, None])).all()
        assert torch.equal(ids[::5], alone[::5])


def test_a_block_without_allowed_words_is_never_sampled() -> None:
    """Where all probabilities are 0, the floors decide, and the excluded word has none."""
    excluded = torch.zeros(ROWS // 100, dtype=torch.int64)
    logits = torch.full((len(excluded), 128), -torch.inf)
    ids, logs = sample_distinct_reference(
        logits, 2, keys(len(excluded)), forbidden=torch.arange(1, 64), excluded=excluded
    )
    assert ids.min() >= 64 and logs.isfinite().all()
