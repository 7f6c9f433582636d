"""Several sources as a single one: one after the other, or mixed with weights."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import TypeVar

from fastbert.data.sources.source import Chunk, Source, text_bytes
from fastbert.errors import UserError
from fastbert.ranges import number_of

SUM_TOLERANCE = 1e-5
Item = TypeVar("Item")


class List(Source):
    """Concatenation of several sources."""

    def __init__(self, spec: str, parts: Sequence[Source]) -> None:
        identity = {"kind": "list", "sources": [part.identity for part in parts]}
        size = sum(part.size for part in parts) if all(part.size for part in parts) else 0
        warnings = [warning for part in parts for warning in part.warnings]
        chunks = [replace(chunk, part=number) for number, part in enumerate(parts) for chunk in part.chunks]
        super().__init__(spec, _name(parts), identity, size, chunks, warnings=warnings, parts=parts)


class Mixture(List):
    """Interleaves the documents of its parts so that their fractions of the text match the weights everywhere.

    The next document comes from the part with the smallest ratio of bytes so far to weight. With P parts and documents
    of at most L bytes, a part of weight w contributes between w (n - L P) and w n + L of the first n bytes, for any
    documents. The order depends on the text alone and needs no random numbers.

    The mixture ends where the next part has no more documents. Continuing would change the fractions, and whether to
    repeat a small part is left to the user. Its documents depend on all those before them, so it is a single chunk.
    """

    def __init__(self, spec: str, parts: Sequence[Source], weights: Sequence[float]) -> None:
        super().__init__(spec, parts)
        self.identity = {"kind": "mixture", "sources": self.identity["sources"], "weights": list(weights)}
        self.weights = weights
        self.chunks = [Chunk(self.size, self._read, part=None)]

    def excerpt(self, limit: int) -> Iterator[tuple[float, str]]:
        """The mixture of the parts' excerpts, so that all of them are represented."""
        furthest = 0.0
        excerpts = [part.excerpt(int(limit * weight)) for part, weight in zip(self.parts, self.weights, strict=True)]
        for fraction, text in self._mix(excerpts, lambda item: item[1]):
            furthest = max(furthest, fraction)
            yield furthest, text

    def _read(self) -> Iterator[tuple[int, str]]:
        self.ended_by = None
        given = 0
        for text in self._mix([part.documents() for part in self.parts], lambda text: text):
            given += text_bytes(text)
            # Progress is that of the most advanced part, with which the mixture will end.
            furthest = max(part.position / part.size for part in self.parts) if self.size else 0
            yield int(self.size * furthest) if self.size else given, text
        self.ended_by = self.part

    def _mix(self, streams: Sequence[Iterator[Item]], text_of: Callable[[Item], str]) -> Iterator[Item]:
        """Yields from the streams by the weights; `part` is the stream of the last item or, at the end, the one that
        has no more."""
        given = [0] * len(streams)
        while True:
            self.part = min(range(len(streams)), key=lambda i: given[i] / self.weights[i])
            item = next(streams[self.part], None)
            if item is None:
                return
            given[self.part] += text_bytes(text_of(item))
            yield item


def parse_weights(text: str, sources: int) -> list[float]:
    """Parses weights such as 0.7,0.3.

    Raises:
        UserError: the number of weights differs from that of sources, a weight is not positive, or the sum is not 1.
    """
    words = [word.strip() for word in text.split(",")]
    try:
        weights = [number_of(word) for word in words]
    except ValueError:
        raise UserError(f"weights {text!r} are not comma-separated numbers, such as 0.7,0.3") from None
    if len(weights) != sources:
        raise UserError(
            f"{_count(len(weights), 'weight')} for {_count(sources, 'source')}; give --weights one number for each "
            "source in --source"
        )
    for word, weight in zip(words, weights, strict=True):
        if not (weight > 0 and math.isfinite(weight)):
            raise UserError(f"weight {word} is not greater than 0; leave out sources that are not used")
    if abs(sum(weights) - 1) > SUM_TOLERANCE:
        scaled = ",".join(f"{weight / sum(weights):.6g}" for weight in weights)
        raise UserError(f"the weights {text} sum to {sum(weights):.6g}, not to 1; for these proportions write {scaled}")
    return weights


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'s' if number != 1 else ''}"


def _name(parts: Sequence[Source]) -> str:
    names = dict.fromkeys(part.name for part in parts)
    return "+".join(names) if len("+".join(names)) <= 40 else f"{next(iter(names))}+{len(names) - 1}"
