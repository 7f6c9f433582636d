"""Made-up text and the options that prepare it."""

import dataclasses
import random
from pathlib import Path

import pytest

from fastbert.data import corpus
from fastbert.data.prepare import PrepareOptions

SYLLABLES = [a + b for a in "bcdfglmnprst" for b in "aeiou"]


def write_corpus(path: Path, documents: int = 300, seed: int = 0) -> list[str]:
    """Made-up words with frequencies as in real text, and characters that no tokenizer has seen twice."""
    rng = random.Random(seed)
    words = ["".join(rng.choices(SYLLABLES, k=rng.randint(1, 4))) for _ in range(400)]
    weights = [1 / (n + 1) for n in range(400)]
    texts = []
    for n in range(documents):
        line = " ".join(rng.choices(words, weights, k=rng.randint(5, 80)))
        texts.append(f"{line.capitalize()}, [MASK] {n} [SEP].\nIt's {line[:20]} {chr(0x3400 + n)}!")
    path.write_text("\n\n".join(texts), encoding="utf-8")
    return texts


def options_of(folder: Path, **changes: object) -> PrepareOptions:
    usual = PrepareOptions(
        source=str(folder / "corpus.txt"),
        out=str(folder / "out"),
        vocab_size=300,
        validation_fraction=0.2,
        rare_min=3,
        rare_max=20,
        workers=1,
        shard_tokens=4096,
    )
    return dataclasses.replace(usual, **changes)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def small_batches(monkeypatch: pytest.MonkeyPatch, **constants: int) -> None:
    """Sets constants of `fastbert.data.corpus`, such as BATCH_CHARACTERS, for a corpus of many batches."""
    for name, value in constants.items():
        monkeypatch.setattr(corpus, name, value)
