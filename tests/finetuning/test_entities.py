"""Entities and their scores equal seqeval's for every sequence of tags, valid or not."""

import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from seqeval.metrics import classification_report, f1_score, precision_score, recall_score
    from seqeval.metrics.sequence_labeling import get_entities

from fastbert.finetuning.entities import entity_errors
from fastbert.finetuning.kinds.tokens import Tokens
from fastbert.finetuning.metrics import METRICS

KIND = Tokens(("O", "B-a", "I-a", "B-b", "I-b"))
TAGS = st.integers(0, 4)


def words(tags: list[int]) -> list[str]:
    return [KIND.labels[tag] for tag in tags]


def onehot(sentences: list[list[int]]) -> np.ndarray:
    return KIND.ideal_scores(sentences)


@settings(max_examples=200)
@given(st.lists(st.lists(st.tuples(TAGS, TAGS), min_size=1, max_size=6), min_size=1, max_size=4))
def test_scores_equal_seqeval(pairs) -> None:
    expected = [[0, 1, 2], *([tag for tag, _ in sentence] for sentence in pairs)]
    found = [[0, 1, 0], *([tag for _, tag in sentence] for sentence in pairs)]
    theirs = ([words(tags) for tags in expected], [words(tags) for tags in found])
    scores = onehot(found)
    for name, metric in (("f1", f1_score), ("precision", precision_score), ("recall", recall_score)):
        ours = METRICS[f"entity_{name}"](*KIND.compared(f"entity_{name}", scores, expected))
        assert ours == pytest.approx(metric(*theirs, zero_division=0)), name
    report = classification_report(*theirs, output_dict=True, zero_division=0)
    for name, row in KIND.by_label(scores, expected).items():
        there = report.get(name, {"precision": 0, "recall": 0, "f1-score": 0, "support": 0})
        assert row == pytest.approx({"f1" if k == "f1-score" else k: float(v) for k, v in there.items()}), name
    accuracy = METRICS["accuracy"](*KIND.compared("accuracy", scores, expected))
    assert accuracy == np.mean(np.concatenate(expected) == np.concatenate(found))


@settings(max_examples=100)
@given(st.lists(TAGS, min_size=1, max_size=8))
def test_predicted_tags_are_valid_and_have_the_same_entities(tags) -> None:
    """Written predictions can be read as training data."""
    written = KIND.prediction(onehot([tags]))
    assert get_entities(written) == get_entities(words(tags))
    for before, tag in zip(["O", *written], written, strict=False):
        assert not tag.startswith("I-") or before[2:] == tag[2:]


@st.composite
def spans(sample) -> list[dict]:
    """Spans in the order of a text, none overlapping another."""
    found, end = [], 0
    for gap, length, label in sample(
        st.lists(st.tuples(st.integers(0, 3), st.integers(1, 3), st.sampled_from("xy")), max_size=5)
    ):
        start, end = end + gap, end + gap + length
        found.append({"start": start, "end": end, "label": label, "text": "-"})
    return found


@settings(max_examples=200)
@given(spans(), spans())
def test_every_difference_between_spans_is_listed(found, expected) -> None:
    errors = entity_errors(found, expected)
    assert [e["expected"] for e in errors if "expected" in e] == [span for span in expected if span not in found]
    wrong = [e["found"] for e in errors if "found" in e]
    assert all(span in wrong for span in found if span not in expected)
    assert not any(span in expected for span in wrong)
    for error in errors:
        ours, theirs = error.get("found"), error.get("expected")
        if theirs is None:
            assert error["error"] == "spurious" and wrong.count(ours) == 1
        elif ours is not None:
            assert ours["start"] < theirs["end"] and theirs["start"] < ours["end"]
