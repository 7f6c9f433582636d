"""Copies and near copies among the texts of an audit.

Copies have the same key (`pool.text_key`). Near duplicates have sets of character 5-grams whose Jaccard similarity,
|A and B| / |A or B|, is at least `NEAR`. Candidates are found by MinHash with locality-sensitive hashing (datasketch)
at a lower threshold, so that a pair with similarity `NEAR` is missed with a probability of 5e-5; their similarity is
then computed exactly.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from fastbert.progress import progress

NEAR = 0.8
CANDIDATE = 0.5  # threshold of the search: 25 bands of 5 hashes
GRAM = 5  # characters
HASHES = 128  # of a MinHash signature


@dataclass(frozen=True)
class NearPair:
    """Two different texts that are nearly equal."""

    first: int
    """Index of the first example with one of the texts."""
    second: int
    """Index of the first example with the other text, which is larger."""
    similarity: float


def groups_of(keys: Sequence[str]) -> list[list[int]]:
    """Groups of two or more examples with the same key, in the order of their first example."""
    found: dict[str, list[int]] = defaultdict(list)
    for row, key in enumerate(keys):
        found[key].append(row)
    return [rows for rows in found.values() if len(rows) > 1]


def near_pairs(keys: Sequence[str]) -> list[NearPair]:
    """Pairs of different keys with a similarity of at least `NEAR`, the most similar first; one example stands for all
    its copies."""
    from datasketch import MinHash, MinHashLSH

    first: dict[str, int] = {}
    for row, key in enumerate(keys):
        first.setdefault(key, row)
    index, signatures, found = MinHashLSH(threshold=CANDIDATE, num_perm=HASHES), {}, []
    empty = MinHash(num_perm=HASHES, seed=1)  # whose permutations all signatures have in common
    with progress("comparing texts", len(first), "texts") as shown:
        for number, (key, row) in enumerate(first.items()):
            signature = empty.copy()
            signature.update_batch([gram.encode() for gram in sorted(grams(key))])
            for other in index.query(signature):
                value = similarity(key, signatures[other])
                if value >= NEAR:
                    found.append(NearPair(other, row, value))
            index.insert(row, signature)
            signatures[row] = key
            shown.update(number + 1)
    return sorted(found, key=lambda pair: (-pair.similarity, pair.first, pair.second))


def grams(text: str) -> set[str]:
    """The character 5-grams of a text; a shorter text is its only one."""
    return {text[at : at + GRAM] for at in range(max(1, len(text) - GRAM + 1))}


def similarity(first: str, second: str) -> float:
    """Jaccard similarity of the sets of 5-grams."""
    a, b = grams(first), grams(second)
    return len(a & b) / len(a | b)


def with_different_labels(groups: Sequence[Sequence[int]], labels: Sequence) -> list[Sequence[int]]:
    """The groups whose examples do not all have the same label."""
    return [rows for rows in groups if len({labels[row] for row in rows}) > 1]
