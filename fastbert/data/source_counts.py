"""Counts of the documents, bytes, tokens and words that each source contributes to a prepared corpus, by split."""

from typing import Any

import numpy as np

from fastbert.data.encoding import Encoded
from fastbert.data.shards import SPLITS
from fastbert.data.sources import Source

FIGURES = ("documents", "bytes", "tokens", "whitespace_words")
SHOWN = FIGURES[:3]  # in the table; data that was prepared by an older version has no others
FAR = 0.05  # larger differences between fraction and weight are not due to whole documents in a large corpus


class SourceCounts:
    """Counts for every part of a source."""

    def __init__(self, parts: int) -> None:
        self.counts = np.zeros((parts, len(SPLITS), len(FIGURES)), np.int64)

    def add(self, parts: np.ndarray, training: np.ndarray, encoded: Encoded) -> None:
        """Adds documents.

        Args:
            parts: int64 [documents], the part of the source that each document came from.
            training: bool [documents], True for training documents.
            encoded: the documents as ids, with their counts.
        """
        split = np.where(training, SPLITS.index("train"), SPLITS.index("validation"))
        figures = np.stack([np.ones_like(parts), encoded.sizes, encoded.lengths, encoded.whitespace_words], axis=1)
        np.add.at(self.counts, (parts, split), figures)

    def record(self, source: Source) -> list[dict[str, Any]]:
        """The entries of dataset.json for the parts of `source`."""
        out = []
        for number, part in enumerate(source.parts):
            figures = {
                split: dict(zip(FIGURES, counts, strict=True))
                for split, counts in zip(SPLITS, self.counts[number].tolist(), strict=True)
            }
            weight = None if source.weights is None else source.weights[number]
            out.append({"source": part.spec, "weight": weight, "ran_out": source.ended_by == number, **figures})
        return out


def end_of_mixture(source: Source) -> str | None:
    """Message about where a mixture ended and how far its other sources were read; None for sources without weights."""
    if source.ended_by is None:
        return None
    rest = [
        f"{part.spec} was read to {part.position / part.size:.0%}" if part.size else f"{part.spec} in part"
        for number, part in enumerate(source.parts)
        if number != source.ended_by
    ]
    return f"the mixture ends where {source.parts[source.ended_by].spec} has no more documents; {', '.join(rest)}"


def weight_deviation(sources: list[dict[str, Any]]) -> str:
    """Description of a source whose fraction of the bytes differs from its weight by more than FAR; empty if there is
    none."""
    given = [sum(source[split]["bytes"] for split in SPLITS) for source in sources]
    for source, size in zip(sources, given, strict=True):
        if source["weight"] is not None and abs(size / sum(given) - source["weight"]) > FAR:
            return f"{source['source']} has {size / sum(given):.1%} of the bytes, not {source['weight']:.1%}"
    return ""


def table(sources: list[dict[str, Any]]) -> list[str]:
    """Lines of a table of `sources` in a dataset.json: counts and fractions of each source in both splits together."""
    totals = [{figure: sum(source[split][figure] for split in SPLITS) for figure in SHOWN} for source in sources]
    bytes_, tokens = (sum(total[figure] for total in totals) for figure in ("bytes", "tokens"))
    names = [_short(source["source"]) for source in sources]
    width = max(len(name) for name in [*names, "source"]) + 2
    columns = ("weight", "of the bytes", "of the tokens", *SHOWN)
    lines = [f"{'source':<{width}}" + "".join(f"{column:>16}" for column in columns)]
    for name, source, total in zip(names, sources, totals, strict=True):
        weight = "" if source["weight"] is None else f"{source['weight']:.2%}"
        fractions = (f"{total['bytes'] / bytes_:.2%}", f"{total['tokens'] / tokens:.2%}")
        cells = (weight, *fractions, *(f"{total[figure]:,}" for figure in SHOWN))
        lines.append(f"{name:<{width}}" + "".join(f"{cell:>16}" for cell in cells))
    ended = [name for name, source in zip(names, sources, strict=True) if source["ran_out"]]
    return lines + [f"the mixture ends where {name} has no more documents" for name in ended]


def _short(spec: str) -> str:
    return spec if len(spec) <= 40 else f"…{spec[-39:]}"
