"""Integer hashes of `prepare`: they assign documents to splits, sample documents, and identify words."""

import hashlib
from collections.abc import Sequence

import numpy as np


def mix(x: np.ndarray) -> np.ndarray:
    """splitmix64: a uniform hash of every entry of `x` (uint64), the same on every machine."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def text_hash(seed: int, texts: Sequence[str]) -> np.ndarray:
    """Hashes of (seed, text), uint64 [texts]: equal for equal texts; two different texts collide with probability
    2^-64."""
    digests = b"".join(hashlib.blake2b(text.encode(), digest_size=8).digest() for text in texts)
    return mix(mix(np.array([seed % 2**64], dtype=np.uint64)) ^ np.frombuffer(digests, "<u8").astype(np.uint64))


def document_hash(seed: int, first: int, count: int) -> np.ndarray:
    """Hashes of (seed, index) for the documents first ... first + count - 1, uint64 [count]."""
    key = mix(np.array([seed % 2**64], dtype=np.uint64))
    return mix(key ^ mix(np.arange(first, first + count, dtype=np.uint64)))
