"""Several sources as one: one after the other, or mixed with weights."""

import math
from collections.abc import Iterator, Sequence

from fastbert.data.sources.source import Source, text_bytes
from fastbert.errors import UserError
from fastbert.ranges import number_of

SUM_TOLERANCE = 1e-5


class List(Source):
    """The documents of its parts, one part after the other."""

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
    """The documents of its parts in turn, so that every stretch of the text holds its parts by their weights.

    The next document comes from the part that lags most: the one with the least bytes of text given so far, divided by
    its weight. With documents of at most L bytes, a part of weight w has given between w (n - L P) and w n + L bytes of
    the first n, whatever the documents are (P parts). No draw is needed, and nothing but the text decides.

    The mixture ends where the part whose turn it is has no more documents. Going on would break the shares, and to read
    a small part again is a decision about the experiment that is not made in silence.
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
            # The end comes with that of the part that is furthest.
            furthest = max(part.position / part.size for part in self.parts) if self.size else 0
            yield int(self.size * furthest) if self.size else sum(given), text


def parse_weights(text: str, sources: int) -> list[float]:
    """Weights as they stand in an option, such as 0.7,0.3.

    Raises:
        UserError: not one for each source, one that is no positive number, or a sum that is not 1.
    """
    words = [word.strip() for word in text.split(",")]
    try:
        weights = [number_of(word) for word in words]
    except ValueError:
        raise UserError(f"weights {text!r} are not numbers with commas between, such as 0.7,0.3") from None
    if len(weights) != sources:
        raise UserError(
            f"{_count(len(weights), 'weight')} for {_count(sources, 'source')}; give --weights one number for each "
            "part of --source that stands between commas"
        )
    for word, weight in zip(words, weights, strict=True):
        if not (weight > 0 and math.isfinite(weight)):
            raise UserError(f"weight {word} is not greater than 0; leave a source out that is not wanted")
    if abs(sum(weights) - 1) > SUM_TOLERANCE:
        told = ",".join(f"{weight / sum(weights):.6g}" for weight in weights)
        raise UserError(f"the weights {text} sum to {sum(weights):.6g}, not to 1; for these proportions write {told}")
    return weights


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'s' if number != 1 else ''}"


def _name(parts: Sequence[Source]) -> str:
    names = dict.fromkeys(part.name for part in parts)
    return "+".join(names) if len("+".join(names)) <= 40 else f"{next(iter(names))}+{len(names) - 1}"
