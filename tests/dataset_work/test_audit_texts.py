"""Folds, flipped labels, duplicates, and overlap with the pretraining text."""

import json
import random
from itertools import combinations

import numpy as np
import pytest

from fastbert.dataset_work.audit.duplicates import NEAR, groups_of, near_pairs, similarity, with_different_labels
from fastbert.dataset_work.audit.findings import Texts, find
from fastbert.dataset_work.audit.options import AuditOptions
from fastbert.dataset_work.audit.overlap import pretraining_overlap
from fastbert.dataset_work.audit.pool import open_pool, text_key
from fastbert.dataset_work.audit.train import FoldScores
from fastbert.errors import UserError
from fastbert.finetuning.rows import Example
from tests.finetuning.conftest import sentence, write_rows


def rows_of(count: int, seed: int = 0) -> list[dict]:
    """Texts with one of three labels, the last of which is rare; every tenth text is a copy of an earlier one."""
    rng = random.Random(seed)
    rows = [{"text": sentence(rng, "good"), "label": rng.choices("abc", (50, 45, 5))[0]} for _ in range(count)]
    for row in range(10, count, 10):
        rows[row] = {"text": f"  {rows[row - 5]['text'].upper()} ", "label": "b"}
    return rows


def pool_of(folder, train: list[dict], dev: list[dict], more: str = "", **options):
    for split, rows in (("train", train), ("dev", dev)):
        write_rows(folder / f"{split}.jsonl", rows)
    (folder / "t.yaml").write_text(f"train: {folder}/train.jsonl\ndev: {folder}/dev.jsonl\n{more}")
    return open_pool(AuditOptions(task=str(folder / "t.yaml"), model="m", out="o", **options))


def test_copies_are_in_one_fold_and_every_label_is_in_every_fold(tmp_path) -> None:
    rows = rows_of(300)
    pool = pool_of(tmp_path, rows[:220], rows[220:], folds=4)
    assert pool.splits == ["train"] * 220 + ["dev"] * 80 and len(pool) == 300
    by_key = {}
    for key, fold in zip(pool.keys, pool.folds.tolist(), strict=True):
        assert by_key.setdefault(key, fold) == fold
    assert len(by_key) < 300
    sizes = np.bincount([*by_key.values()])
    assert sizes.max() - sizes.min() <= 1
    rare = {key for key, label in zip(pool.keys, pool.labels, strict=True) if label == 2}
    per_fold = np.bincount([by_key[key] for key in rare], minlength=4)
    assert per_fold.max() - per_fold.min() <= 1
    for fold in range(4):
        assert {pool.examples[row].label for row in pool.held_out(fold)} == {0, 1, 2}
        train = pool.training_rows(fold, 1.0)
        assert {*train.tolist(), *pool.held_out(fold).tolist()} == set(range(300))
        assert not {pool.keys[row] for row in train} & {pool.keys[row] for row in pool.held_out(fold)}
        half, small = pool.training_rows(fold, 0.5), pool.training_rows(fold, 0.1)
        assert set(small) < set(half) < set(train) and len(half) == round(len(train) / 2)
    again = pool_of(tmp_path, rows[220:][::-1], rows[:220], folds=4)  # another order, and other splits
    assert dict(zip(again.keys, again.folds.tolist(), strict=True)) == by_key
    assert pool_of(tmp_path, rows[:220], rows[220:], folds=4, seed=1).folds.tolist() != pool.folds.tolist()


def test_flipped_labels_are_a_fraction_and_always_other_ones(tmp_path) -> None:
    rows = rows_of(400)
    clean, pool = (pool_of(tmp_path, rows[:300], rows[300:], flip=flip) for flip in (0.0, 0.1))
    changed = np.array(clean.labels) != np.array(pool.labels)
    assert not clean.flipped.any() and changed.tolist() == pool.flipped.tolist() and changed.sum() == 40
    pairs = {(clean.labels[row], pool.labels[row]) for row in np.flatnonzero(changed)}
    assert len(pairs) >= 4  # each other label occurs
    assert {pool.splits[row] for row in np.flatnonzero(changed)} == {"train", "dev"}


def test_the_precision_of_flipped_labels_is_that_of_each_ranking(tmp_path) -> None:
    """Held-out labels are predicted without an error. A model gives the examples it was trained on a lower probability
    of their label, the earlier they are in the file and, in one of three folds, the later."""
    rows = [{"text": f"text {number}", "label": "ab"[number % 2]} for number in range(60)]
    clean, pool = (pool_of(tmp_path, rows, rows[:1], folds=3, flip=flip) for flip in (0.0, 0.2))
    count, every = len(pool), np.arange(len(pool))
    folds = []
    for fold in range(3):
        right = 0.5 + 0.4 * (every if fold else every[::-1]) / count
        scores = np.stack([1 - right, right], axis=1)
        scores[np.array(pool.labels) == 0] = scores[np.array(pool.labels) == 0][:, ::-1]
        held_out = pool.folds == fold
        scores[held_out] = np.eye(2)[np.array(clean.labels)[held_out]] * 0.98 + 0.01
        folds.append(FoldScores(every, scores, 40, 1.0))
    found = find(pool, {1.0: folds}, Texts([], None, None, None), seed=0)
    assert found.flips.count == 12 and found.flips.random == 12 / 61
    assert found.flips.out_of_fold == found.flips.marked_recall == found.flips.marked_precision == 1.0
    precisions = []
    for shift in (1, 2):
        other = (pool.folds + shift) % 3
        rank = sorted(range(count), key=lambda row: row if other[row] else count - 1 - row)
        precisions.append(pool.flipped[rank[:12]].mean())
    assert found.flips.in_sample == pytest.approx(np.mean(precisions)) and precisions[0] != precisions[1]


@pytest.mark.parametrize(
    ("labels", "more", "options", "message"),
    [
        (
            "aaaaab" * 3,
            "",
            {"folds": 4},
            "the label 'b' has 3 different texts in train and dev, fewer than the 4",
        ),
        ("aaaaab", "", {"folds": 2}, "has 1 different text in train and dev"),
        ("aaaaaa", "labels: a,b\n", {"folds": 2}, "all 7 labels of t are 'a'"),
        ("123", "kind: number\n", {"folds": 5}, "the task t has 4 different texts"),
        ("123123123", "kind: number\n", {"flip": 0.1, "folds": 2}, "--flip replaces classes"),
    ],
)
def test_folds_that_cannot_be_made_are_refused(tmp_path, labels, more, options, message) -> None:
    rows = [{"text": f"text {number}", "label": label} for number, label in enumerate(labels)]
    with pytest.raises(UserError, match=message):
        pool_of(tmp_path, rows, [{"text": "dev", "label": labels[0]}], more, **options)


def test_keys_ignore_case_space_and_the_order_of_symmetric_pairs() -> None:
    assert text_key(Example(0, " A  b", None, 0), False) == text_key(Example(1, "a\tB ", None, 0), False)
    one, other = Example(0, "a", "b", 0), Example(0, "b", "a", 0)
    assert text_key(one, True) == text_key(other, True) and text_key(one, False) != text_key(other, False)


def test_near_duplicates_are_those_of_an_exhaustive_search() -> None:
    """Random edits of texts, several of them close to the threshold."""
    rng = random.Random(3)
    keys = []
    for number in range(40):
        text = " ".join(f"{rng.choice('abcdefgh')}{rng.randint(0, 999)}" for _ in range(20))
        keys += [text, text[: 70 + rng.randint(0, 20)] + f"x{number}" + text[95:], text + " end", text]
    found = {(pair.first, pair.second): pair.similarity for pair in near_pairs(keys)}
    first = {key: row for row, key in reversed([*enumerate(keys)])}
    exact = {pair: similarity(keys[pair[0]], keys[pair[1]]) for pair in combinations(sorted(first.values()), 2)}
    near = {pair: value for pair, value in exact.items() if value >= NEAR}
    assert found == near and 50 < len(near) < len(exact)
    assert sum(value < 0.85 for value in near.values()) > 5
    assert list(found.values()) == sorted(found.values(), reverse=True)
    groups = groups_of(keys)
    assert groups == [[4 * n, 4 * n + 3] for n in range(40)]
    labels = [0] * 160
    labels[7] = 1
    assert with_different_labels(groups, labels) == [[4, 7]] and groups_of(["a", "b"]) == []
    assert similarity("abc", "abc") == 1.0 and similarity("abc", "abd") == 0.0


def test_texts_that_occur_in_the_pretraining_text_are_found(tmp_path) -> None:
    words = [f"w{number}" for number in range(60)]
    (tmp_path / "text.txt").write_text(f"start {' '.join(words[:30])}, end\n\n{' '.join(words[30:])}\n")
    texts = [
        (" ".join(words[5:20]).upper() + "!", None),  # case and punctuation make no difference
        (" ".join(words[5:19]) + " other", None),  # a run that is not there
        (" ".join(words[25:35]), None),  # across two documents
        (" ".join(words[:7]), None),  # too short
        ("short", " ".join(words[40:50])),  # the second text
    ]
    examples = [Example(row, text, pair, 0) for row, (text, pair) in enumerate(texts)]
    found = pretraining_overlap(examples, str(tmp_path / "text.txt"))
    assert found.found.tolist() == [True, False, False, False, True] and found.long_enough == 4


def test_the_fields_of_soft_labels_are_left_out(tmp_path) -> None:
    rows = [{"text": f"t{n}", "label": "ab"[n % 2], "soft": json.dumps([0.4, 0.6]), "w": 2} for n in range(8)]
    pool = pool_of(tmp_path, rows, rows, "labels: a,b\nsoft: soft\nweight: w\n", folds=2)
    assert pool.labels == [0, 1] * 8 and {(one.soft_label, one.weight) for one in pool.examples} == {(None, 1.0)}
