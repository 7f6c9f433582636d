"""Models of `fastbert select` and their results on a pool, which is read in chunks: of a text only its hash remains in
memory, of the best ones score and reason. Queries that compare hidden states hold a subsample in memory."""

from collections.abc import Callable, Iterator
from itertools import islice

import numpy as np

from fastbert.dataset_work.selection import queries
from fastbert.dataset_work.selection.agreement import Agreement
from fastbert.dataset_work.selection.options import FACILITY_LOCATION, K_CENTRE, SelectOptions, folders
from fastbert.dataset_work.selection.pool import DIGITS, Chosen, Pool, labelled_examples
from fastbert.dataset_work.selection.reader import Read, Reader, open_reader, prepare_machine
from fastbert.errors import plural
from fastbert.finetuning.ensemble import check_distinct
from fastbert.finetuning.kinds.kind import TaskKind
from fastbert.finetuning.rows import Example
from fastbert.finetuning.tasks import Task
from fastbert.progress import progress

CHUNK = 4096
"""Texts that are tokenized and scored at a time."""
UNCERTAINTIES: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "entropy": queries.entropy,
    "least-confidence": queries.least_confidence,
    "margin": queries.margin,
}


class Scoring:
    """The models, and their results on a pool.

    Attributes:
        truncated: number of texts of the pool that were truncated.
        agreement: counts of the predictions of both rounds; None without --previous.
    """

    def __init__(self, options: SelectOptions, task: Task) -> None:
        """Loads the models. Raises a UserError if one is damaged, does not fit the task, or is given twice."""
        prepare_machine(options.machine)
        self.task, self.truncated, self._previous_name = task, 0, options.previous
        self.reader = open_reader(folders(options.model), task, options.machine, options.model)
        self.previous: Reader | None = None
        self.agreement: Agreement | None = None
        if options.previous is not None:
            self.previous = open_reader(folders(options.previous), task, options.machine, options.previous)
            check_distinct([*self.reader.ensemble.members, *self.previous.ensemble.members])
            kind = self.reader.kind
            self.agreement = Agreement(kind.distributions(np.zeros((0, *kind.score_shape()))).shape[-1])

    def chunks(self, pool: Pool, states: bool = False) -> Iterator[tuple[np.ndarray, Read]]:
        """Yields (uint64 keys, texts as read) for each chunk of the usable rows, in the order of their keys."""
        models = 1 + (self.previous is not None)
        with progress("scoring the pool", len(pool), "texts") as shown:
            rows = pool.examples()
            while chunk := list(islice(rows, CHUNK)):
                done = shown.done

                def report(part: float, done: int = done, size: int = len(chunk)) -> None:
                    shown.update(done + int(part * size))

                chunk.sort(key=lambda example: pool.keys[example.index])
                read = self.reader.read(chunk, states, lambda part: report(part / models))
                if self.previous is not None:
                    before = self.previous.read(chunk, False, lambda part: report((1 + part) / models))
                    decided = self.previous.kind.decisions(before.scores)
                    self.agreement.add(self.reader.kind.decisions(read.scores), decided)
                self.truncated += read.truncated
                yield pool.keys[[example.index for example in chunk]], read

    def compare(self, pool: Pool) -> None:
        """Reads the pool for the agreement alone."""
        for _ in self.chunks(pool):
            pass

    def most_uncertain(self, pool: Pool, query: str, count: int) -> list[Chosen]:
        """The texts with the highest value of one of `UNCERTAINTIES`."""
        kind = self.reader.kind
        best: list[Chosen] = []
        for keys, read in self.chunks(pool):
            values, parts = uncertainty(query, kind, read), read.parts()
            lowest = best[-1] if len(best) == count else None
            for at in np.lexsort((keys, -values))[:count].tolist():
                example = read.inputs.examples[at]
                reason = f"{query}: {predicted(kind, example, parts[at])}"
                one = Chosen.of(values[at], keys[at], example.index, reason)
                if lowest is not None and one > lowest:
                    break
                best.append(one)
            best = sorted(best)[:count]
        return best

    def k_centre(self, pool: Pool, count: int, seed: int) -> list[Chosen]:
        """The texts farthest from those of train and from each other. Of a large train a sample of the size of the
        pool is used."""
        reads, order = self._states(pool)
        labelled = labelled_examples(self.task, len(pool), seed)
        centres = []
        with progress("reading the labelled texts", len(labelled), "texts") as shown:
            for at in range(0, len(labelled), CHUNK):
                chunk = labelled[at : at + CHUNK]
                centres.append(self.reader.read(chunk, True, lambda part: None).states)
                shown.update(at + len(chunk))
        states = np.concatenate([read.states for read in reads])[order]
        with progress("selecting"):
            found = queries.k_centre(states, count, np.concatenate(centres))
        reason = f"{K_CENTRE}: distance to the nearest labelled or selected text"
        return chosen_rows(pool, reads, order, found, [reason] * len(order))

    def facility_location(self, pool: Pool, count: int, weight: float) -> list[Chosen]:
        """The texts selected by the function of SDS2; lambda is `weight` times the number of texts."""
        kind = self.reader.kind
        reads, order = self._states(pool)
        states = np.concatenate([read.states for read in reads])[order]
        entropies = np.concatenate([uncertainty("entropy", kind, read) for read in reads])[order]
        with progress("selecting"):
            similarity = queries.gaussian_similarity(states)
            found = queries.facility_location(similarity, count, entropies, weight * len(order))
        about = [
            predicted(kind, *one) for read in reads for one in zip(read.inputs.examples, read.parts(), strict=True)
        ]
        return chosen_rows(pool, reads, order, found, [f"{FACILITY_LOCATION}: {text}" for text in about])

    def _states(self, pool: Pool) -> tuple[list[Read], np.ndarray]:
        """All usable texts with their states, and the order of their keys, int64 [n]."""
        found = list(self.chunks(pool, states=True))
        return [read for _, read in found], np.argsort(np.concatenate([keys for keys, _ in found]))

    def messages(self) -> list[str]:
        """Lines about truncated texts and the agreement."""
        lines = []
        if self.truncated:
            words = "words of " if self.reader.kind.labels_words else ""
            had = f"{plural(self.truncated, 'text')} had {words}more tokens than the model reads"
            lines.append(f"{had}; the rest was not used")
        if self.agreement is not None:
            lines.append(self.agreement.line(self._previous_name))
        return lines


def uncertainty(query: str, kind: TaskKind, read: Read) -> np.ndarray:
    """Value of a query for each text, float64 [n]: the mean over its words, and over the labels if several can
    apply."""
    return read.by_text(UNCERTAINTIES[query](kind.distributions(read.scores)).mean(-1)).round(DIGITS)


def chosen_rows(
    pool: Pool, reads: list[Read], order: np.ndarray, found: queries.Selection, reasons: list[str]
) -> list[Chosen]:
    """The rows of a selection.

    Args:
        order: int64 [n], the text of each row of the selection.
        reasons: of each text.
    """
    examples = [example for read in reads for example in read.inputs.examples]
    chosen = zip(order[found.rows].tolist(), found.values.round(DIGITS).tolist(), strict=True)
    return [
        Chosen.of(value, pool.keys[examples[text].index], examples[text].index, reasons[text]) for text, value in chosen
    ]


def predicted(kind: TaskKind, example: Example, scores: np.ndarray) -> str:
    """The probabilities about which the model is least certain: of the two most likely classes, of those of the most
    uncertain word, or of the two labels nearest to 1/2.

    Args:
        scores: of the units of the example.
    """
    p = kind.distributions(scores if kind.labels_words else scores[None])
    if p.shape[1] > 1:
        labels = np.argsort(np.abs(p[0, :, 1] - 0.5), kind="stable")[:2].tolist()
        return ", ".join(f"{kind.labels[label]} {p[0, label, 1]:.3f}" for label in labels)
    unit = int(np.argmax(queries.margin(p[:, 0])))
    labels = np.argsort(-p[unit, 0], kind="stable")[:2].tolist()
    text = ", ".join(f"{kind.labels[label]} {p[unit, 0, label]:.3f}" for label in labels)
    if not kind.labels_words:
        return text
    start, end = example.words[unit]
    return f"{example.text[start:end]!r} is {text}"
