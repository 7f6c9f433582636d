"""A tag for each word of a text: named entities in IOB2 (O, B-type, I-type), or others such as parts of speech.

A word is labeled at its first piece (Devlin et al. 2019, section 5.3). Entities are decoded as in CoNLL's evaluation:
an entity begins at B, and at an I that does not continue an entity of its type."""

import re
from collections.abc import Iterable, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from fastbert.data.foreign_tokenizer import AnyTokenizer
from fastbert.errors import UserError, brief, nearest
from fastbert.finetuning.custom import CustomSource
from fastbert.finetuning.entities import by_type, decode, entity_errors
from fastbert.finetuning.kinds.kind import TaskKind, by_class, declared_labels
from fastbert.finetuning.rows import Example, Row
from fastbert.finetuning.word_rows import OUTSIDE, where_of
from fastbert.ranges import text_problem

if TYPE_CHECKING:
    from torch import Tensor, nn

    from fastbert.finetuning.batches import EncodedSplit

ENTITY_METRICS = ("entity_f1", "entity_precision", "entity_recall")
IGNORED = -100
"""Label of pieces that are not scored, as in transformers."""
_IOB2 = re.compile(r"[BI]-.+")
_OTHER_SCHEME = re.compile(r"[ESLUM]-.+")


class Tokens(TaskKind):
    """Labels are tuples of tag ids, one for each word; scores are the probabilities of the tags for each word."""

    name = "tokens"
    plural = "tags of words"
    min_labels = 2
    metrics = (*ENTITY_METRICS, "accuracy", "macro_f1")
    architecture = "ForTokenClassification"
    problem_type = None
    pipeline = "token-classification"
    labels_words: ClassVar[bool] = True

    @property
    def default_metrics(self) -> tuple[str, ...]:
        return (*ENTITY_METRICS, "accuracy") if self.has_entities else ("accuracy", "macro_f1")

    @property
    def has_entities(self) -> bool:
        """True if the tags are IOB2."""
        return any(_IOB2.fullmatch(label) for label in self.labels)

    # --- files

    @classmethod
    def declared(cls, task: str, source: CustomSource) -> "Tokens":
        return cls(declared_labels(task, source, learn_tags))

    @cached_property
    def types(self) -> tuple[str, ...]:
        """Types of entities, in the order of their tags."""
        return tuple(dict.fromkeys(label[2:] for label in self.labels if _IOB2.fullmatch(label)))

    def read(self, row: Row) -> tuple[int, ...] | None:
        if row.label is None:
            return None
        if self.has_entities:
            check_iob2(row)
        for index, tag in enumerate(row.label):
            if tag not in self.ids:
                known = f"{nearest(tag, self.ids)} (the tags are those of the training file, or of labels)"
                raise UserError(f"{where_of(row, index)}: unknown tag {brief(tag)}; {known}")
        return tuple(self.ids[tag] for tag in row.label)

    def file_label(self, example: Example) -> list[Any]:
        """Spans of entities, or tags."""
        tags = np.array(example.label)
        if not self.has_entities:
            return [self.labels[tag] for tag in tags]
        return self._spans(example, self._entities(tags, None))

    # --- training

    def encode(self, examples: Sequence[Example], vocabulary: AnyTokenizer, max_length: int) -> "EncodedSplit":
        from fastbert.finetuning.word_batches import encode_words

        return encode_words(examples, vocabulary, max_length, IGNORED)

    def new_head(self, width: int, dropout: float) -> "nn.Module":
        from fastbert.finetuning.task_heads import TokenHead

        return TokenHead(width, len(self.labels), dropout)

    def targets(self, labels: Sequence[tuple[int, ...]]) -> np.ndarray:
        return np.concatenate([np.array(tags, np.int64) for tags in labels])

    def losses(self, logits: "Tensor", targets: "Tensor") -> "Tensor":
        from torch.nn import functional as F

        if targets.is_floating_point():  # soft labels, zeros where no word begins
            return -(targets * logits.log_softmax(-1)).sum((-1, -2))
        return F.cross_entropy(logits.transpose(1, 2), targets, ignore_index=IGNORED, reduction="none").sum(-1)

    # --- scores

    def scores(self, logits: "Tensor") -> "Tensor":
        return logits.double().softmax(-1)

    def score_shape(self) -> tuple[int, ...]:
        return (len(self.labels),)

    def distributions(self, scores: np.ndarray) -> np.ndarray:
        return scores[:, None]

    def ideal_scores(self, labels: Sequence[tuple[int, ...]]) -> np.ndarray:
        return np.eye(len(self.labels))[self.targets(labels)]

    def score_losses(self, scores: np.ndarray, labels: Sequence[tuple[int, ...]]) -> np.ndarray:
        found = scores[np.arange(len(scores)), self.targets(labels)]
        return -np.log(np.maximum(found, np.finfo(np.float64).tiny))

    def compared(
        self, metric: str, scores: np.ndarray, labels: Sequence[tuple[int, ...]]
    ) -> tuple[np.ndarray, np.ndarray]:
        found, expected = scores.argmax(-1), self.targets(labels)
        if metric not in ENTITY_METRICS:
            return found, expected
        return self._entities(found, labels), self._entities(expected, labels)

    def by_label(self, scores: np.ndarray, labels: Sequence[tuple[int, ...]]) -> dict[str, dict[str, float]]:
        """Precision, recall, F1 and support of each type of entity, or of each tag."""
        if self.has_entities:
            return by_type(*self.compared("entity_f1", scores, labels), self.types)
        return by_class(scores.argmax(-1), self.targets(labels), self.labels)

    def prediction(self, scores: np.ndarray) -> list[str]:
        """A tag for each word; tags of entities are valid IOB2."""
        found = scores.argmax(-1)
        if not self.has_entities:
            return [self.labels[tag] for tag in found]
        return self._tags(self._entities(found, None), len(found))

    def prediction_row(self, example: Example, scores: np.ndarray) -> dict[str, Any]:
        tokens = [example.text[start:end] for start, end in example.words]
        row = {"text": example.text, "tokens": tokens}
        if not self.has_entities:
            return row | {"tags": self.prediction(scores)}
        entities, best = self._entities(scores.argmax(-1), None), scores.max(-1)
        spans = self._spans(example, entities)
        for span, (_, first, end, _) in zip(spans, entities, strict=True):
            span["score"] = float(best[first:end].mean())
        return row | {"tags": self._tags(entities, len(tokens)), "spans": spans}

    def errors(self, example: Example, scores: np.ndarray) -> list[dict[str, Any]]:
        """Entities that are missed, spurious, or predicted with a wrong type or boundary; or wrong tags."""
        found, expected = scores.argmax(-1), np.array(example.label)
        if self.has_entities:
            spans = (self._spans(example, self._entities(tags, None)) for tags in (found, expected))
            return entity_errors(*spans)
        return [
            {
                "word": number,
                "text": example.text[slice(*example.words[number])],
                "expected": self.labels[expected[number]],
                "found": self.labels[found[number]],
            }
            for number in np.flatnonzero(found != expected).tolist()
        ]

    def check_metrics(self, names: Sequence[str]) -> None:
        super().check_metrics(names)
        for name in names:
            if name in ENTITY_METRICS and not self.has_entities:
                raise UserError(
                    f"the metric {name} is for entities (tags O, B-type, I-type); give accuracy or macro_f1"
                )

    @cached_property
    def _coded(self) -> tuple[np.ndarray, np.ndarray]:
        """Entity type of each tag or -1, and bool, whether the tag is a B."""
        types = [self.types.index(label[2:]) if _IOB2.fullmatch(label) else -1 for label in self.labels]
        return np.array(types), np.array([label.startswith("B-") for label in self.labels])

    def _entities(self, tags: np.ndarray, labels: Sequence[Sequence[int]] | None) -> np.ndarray:
        """int64 [n, 4]: sentence, first word, the word after the last, type; words are counted over all sentences.

        Args:
            tags: ids [W] of all sentences.
            labels: tags of the sentences, for their lengths; None if there is one sentence.
        """
        types, begins = self._coded
        lengths = [len(tags)] if labels is None else [len(one) for one in labels]
        return decode(types[tags], begins[tags], np.array(lengths))

    def _tags(self, entities: np.ndarray, count: int) -> list[str]:
        """IOB2 tags of `count` words."""
        found = [OUTSIDE] * count
        for _, first, end, type_ in entities.tolist():
            found[first] = f"B-{self.types[type_]}"
            found[first + 1 : end] = [f"I-{self.types[type_]}"] * (end - first - 1)
        return found

    def _spans(self, example: Example, entities: np.ndarray) -> list[dict[str, Any]]:
        spans = []
        for _, first, last, type_ in entities.tolist():
            start, end = example.words[first][0], example.words[last - 1][1]
            spans.append({"start": start, "end": end, "label": self.types[type_], "text": example.text[start:end]})
        return spans


def learn_tags(rows: Iterable[Row]) -> tuple[str, ...]:
    """Tags of the training rows: O, then B and I of each type of entity, sorted; or all tags, sorted.

    Raises:
        UserError: a row has no tags, there are fewer than two, or they are entities and not IOB2.
    """
    found: dict[str, str] = {}  # tag -> where it was first seen
    for row in rows:
        if row.label is None:
            raise UserError(f"{row.where} has no tags; training needs one for every word")
        for index, tag in enumerate(row.label):
            if tag not in found:
                if problem := text_problem(tag):
                    raise UserError(f"{where_of(row, index)}: the tag {problem}; fix the row")
                found[tag] = where_of(row, index)
    entities = any(_IOB2.fullmatch(tag) for tag in found)
    if entities or OUTSIDE in found:
        for tag, where in found.items():
            check_tag(tag, where, entities)
        types = sorted({tag[2:] for tag in found} - {""})
        if not types:
            raise UserError("every word of the training file has the tag O; give a file with entities in it")
        return (OUTSIDE, *(f"{part}-{name}" for name in types for part in "BI"))
    if len(found) < 2:
        raise UserError(f"the training file holds {len(found)} tag ({brief(', '.join(found), str)}); a task needs two")
    return tuple(sorted(found))


def check_tag(tag: str, where: str, entities: bool = True) -> None:
    """Raises a UserError if the tag is not IOB2."""
    if tag == OUTSIDE or _IOB2.fullmatch(tag):
        return
    if _OTHER_SCHEME.fullmatch(tag):
        remedy = f"convert IOBES or BILOU to O, B-{tag[2:]}, I-{tag[2:]}"
    elif entities:
        remedy = f"write O, B-{tag} or I-{tag}"
    else:
        remedy = f"for entities write O, B-{tag}, I-{tag}; if O is a class like the others, list all tags with labels"
    raise UserError(f"{where}: the tag {brief(tag)} is not IOB2; {remedy}")


def check_iob2(row: Row) -> None:
    """Raises a UserError if the tags are not IOB2: an I- that does not continue an entity of its type, or another
    form."""
    for index, tag in enumerate(row.label):
        before = row.label[index - 1] if index else OUTSIDE
        check_tag(tag, where_of(row, index))
        if tag.startswith("I-") and before[2:] != tag[2:]:
            follows = f"follows {before}" if index else "begins a sentence"
            raise UserError(
                f"{where_of(row, index)}: {tag} {follows}, which is not IOB2: an entity begins with B-{tag[2:]}; fix "
                "the tag, or convert the file if it is IOB1"
            )
