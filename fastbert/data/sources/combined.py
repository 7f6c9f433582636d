"""Several sources as a single one: one after the other, or mixed with weights."""

import math
from collections.abc import Iterator, Sequence

from fastbert.data.sources.source import Source, text_bytes
from fastbert.errors import UserError
from fastbert.ranges import number_of

SUM_TOLERANCE = 1e-5


class List(Source):
    """Concatenation of several sources."""

    def __init__(self, spec: str, parts: Sequence[Source]) -> None:
        identity = {"kind": "list", "sources": [part.identity for part in parts]}
        size = sum(part.size for part in parts) if all(part.size for part in parts) else 0
        warnings = [warning for part in parts for warning in part.warnings]
        super().__init__(spec, _name(parts), identity, size, self._read, warnings=warnings, parts=parts)

    def _read(self) -> Iterator[tuple[int, str]]:
        done = 0
        for number, part in enumerate(self.parts):
            for text in part.documents():
                self.part = number
                yield done + part.position, text
            done += part.position


class Mixture(List):
    """Interleaves the documents of its parts so that their fractions of the text match the weights everywhere.

    The next document comes from the part with the smallest ratio of bytes so far to weight. With P parts and documents
    of at most L bytes, a part of weight w contributes between w (n - L P) and w n + L of the first n bytes, for any
    documents. The order depends on the text alone and needs no random numbers.

    The mixture ends where the next part has no more documents. Continuing would change the fractions, and whether to
    repeat a small part is left to the user.
    """

    def __init__(self, spec: str, parts: Sequence[Source], weights: Sequence[float]) -> None:
        super().__init__(spec, parts)
        self.identity = {"kind": "mixture", "sources": self.identity["sources"], "weights": list(weights)}
        self.weights = weights

    def _read(self) -> Iterator[tuple[int, str]]:
        self.ended_by = None
        given = [0] * len(self.parts)
        streams = [part.documents() for part in self.parts]
        while True:
            number = min(range(len(streams)), key=lambda i: given[i] / self.weights[i])
            text = next(streams[number], None)
            if text is None:
                self.ended_by = number
                return
            given[number] += text_bytes(text)
            self.part = number
            # Progress is that of the most advanced part, with which the mixture will end.
            furthest = max(part.position / part.size for part in self.parts) if self.size else 0
            yield int(self.size * furthest) if self.size else sum(given), text


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
