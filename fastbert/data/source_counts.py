"""What each source gave to a prepared corpus: documents, bytes and tokens, by split."""

from typing import Any

import numpy as np

from fastbert.data.shards import SPLITS
from fastbert.data.sources import Source

FIGURES = ("documents", "bytes", "tokens")
FAR = 0.05  # between a fraction and a weight: more than what whole documents explain in a corpus of many


class Shares:
    """Counts for every part of a source."""

    def __init__(self, parts: int) -> None:
        self.counts = np.zeros((parts, len(SPLITS), len(FIGURES)), np.int64)

    def add(self, parts: np.ndarray, training: np.ndarray, sizes: np.ndarray, lengths: np.ndarray) -> None:
        """Adds documents.

        Args:
            parts: int64 [documents], which part each came from.
            training: bool [documents], whether it is for training.
            sizes, lengths: int64 [documents], its UTF-8 bytes and its tokens.
        """
        split = np.where(training, SPLITS.index("train"), SPLITS.index("validation"))
        figures = np.stack([np.ones_like(sizes), sizes, lengths], axis=1)
        np.add.at(self.counts, (parts, split), figures)

    def record(self, source: Source) -> list[dict[str, Any]]:
        """What dataset.json says of the parts of `source`."""
        out = []
        for number, part in enumerate(source.parts):
            figures = {
                split: dict(zip(FIGURES, counts, strict=True))
                for split, counts in zip(SPLITS, self.counts[number].tolist(), strict=True)
            }
            weight = None if source.weights is None else source.weights[number]
            out.append({"source": part.spec, "weight": weight, "ran_out": source.ended_by == number, **figures})
        return out


def told_end(source: Source) -> str | None:
    """Where a mixture ended and what of its other sources it left unread; None of any other source."""
    if source.ended_by is None:
        return None
    rest = [
        f"{part.spec} was read to {part.position / part.size:.0%}" if part.size else f"{part.spec} in part"
        for number, part in enumerate(source.parts)
        if number != source.ended_by
    ]
    return f"the mixture ends where {source.parts[source.ended_by].spec} has no more documents; {', '.join(rest)}"


def far_off(sources: list[dict[str, Any]]) -> str:
    """Names a source of a dataset.json whose fraction of the bytes is more than FAR from its weight; empty if there is
    none."""
    given = [sum(source[split]["bytes"] for split in SPLITS) for source in sources]
    for source, size in zip(sources, given, strict=True):
        if source["weight"] is not None and abs(size / sum(given) - source["weight"]) > FAR:
            return f"{source['source']} has {size / sum(given):.1%} of the bytes, not {source['weight']:.1%}"
    return ""


def table(sources: list[dict[str, Any]]) -> list[str]:
    """Lines of `sources` in a dataset.json: each source's figures and its shares, both splits together."""
    totals = [{figure: sum(source[split][figure] for split in SPLITS) for figure in FIGURES} for source in sources]
    bytes_, tokens = (sum(total[figure] for total in totals) for figure in ("bytes", "tokens"))
    names = [_short(source["source"]) for source in sources]
    width = max(len(name) for name in [*names, "source"]) + 2
    columns = ("weight", "of the bytes", "of the tokens", *FIGURES)
    lines = [f"{'source':<{width}}" + "".join(f"{column:>16}" for column in columns)]
    for name, source, total in zip(names, sources, totals, strict=True):
        weight = "" if source["weight"] is None else f"{source['weight']:.2%}"
        shares = (f"{total['bytes'] / bytes_:.2%}", f"{total['tokens'] / tokens:.2%}")
        cells = (weight, *shares, *(f"{total[figure]:,}" for figure in FIGURES))
        lines.append(f"{name:<{width}}" + "".join(f"{cell:>16}" for cell in cells))
    ended = [name for name, source in zip(names, sources, strict=True) if source["ran_out"]]
    return lines + [f"the mixture ends where {name} has no more documents" for name in ended]


def _short(spec: str) -> str:
    return spec if len(spec) <= 40 else f"…{spec[-39:]}"
