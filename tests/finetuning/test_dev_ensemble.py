"""The ensemble of the seeds on dev: the metrics of mean scores, computed by hand; what a seed stores; damage."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from fastbert.errors import UserError
from fastbert.finetuning.averages import mean_of_models
from fastbert.finetuning.dev_ensemble import SCORES, ensemble_figures, write_dev_scores
from fastbert.finetuning.kinds.classes import Classes
from fastbert.finetuning.kinds.multi_label import MultiLabel
from fastbert.finetuning.kinds.number import Number
from fastbert.finetuning.kinds.tokens import Tokens
from fastbert.finetuning.tasks import Task
from tests.finetuning.conftest import finetune, results

SPLITS = {"dev_matched": "a", "dev_mismatched": "b"}


def task_of(kind, *metrics: str) -> Task:
    return Task("mine", kind, False, metrics, False, SPLITS, None)


def folders_of(path: Path, *seeds: dict[str, list]) -> list[Path]:
    folders = [path / f"seed-{number}" for number in range(len(seeds))]
    for folder, scores in zip(folders, seeds, strict=True):
        folder.mkdir(exist_ok=True)
        write_dev_scores(folder, {split: np.array(values) for split, values in scores.items()})
    return folders


def test_the_order_of_the_models_changes_no_bit() -> None:
    values = list(np.random.default_rng(0).normal(size=(7, 50, 3)) * 10.0 ** np.arange(-3, 4)[:, None, None])
    mean = mean_of_models(values)
    orders = [np.random.default_rng(seed).permutation(7) for seed in range(5)]
    assert all((mean_of_models([values[i] for i in order]) == mean).all() for order in orders)
    assert any(
        (sum(values[i] for i in order) / 7 != sum(values) / 7).any() for order in orders
    )  # not so for a plain sum
    assert np.abs(mean - np.mean(values, axis=0)).max() < 1e-12 and mean.dtype == np.float64
    assert (mean_of_models(values[:1]) == values[0]).all()


def test_two_dev_splits_by_hand(tmp_path) -> None:
    """The mean of probabilities, not a vote: on the first example two of three seeds are wrong."""
    seeds = [
        {"dev_matched": [[0.1, 0.9], [0.8, 0.2]], "dev_mismatched": [[0.6, 0.4]]},
        {"dev_matched": [[0.6, 0.4], [0.7, 0.3]], "dev_mismatched": [[0.6, 0.4]]},
        {"dev_matched": [[0.6, 0.4], [0.1, 0.9]], "dev_mismatched": [[0.4, 0.6]]},
    ]
    labels = {"dev_matched": [1, 0], "dev_mismatched": [1]}
    folders = folders_of(tmp_path, *seeds)
    task = task_of(Classes(("no", "yes")), "accuracy")
    assert ensemble_figures(task, labels, folders) == {
        "dev_matched": {"accuracy": 1.0},
        "dev_mismatched": {"accuracy": 0.0},
    }
    assert ensemble_figures(task, labels, folders[:1]) is None


def test_numbers_words_and_several_labels(tmp_path) -> None:
    numbers = folders_of(tmp_path, {"dev": [0.0, 2.0, 1.0]}, {"dev": [1.0, 2.0, 5.0]})
    figures = ensemble_figures(task_of(Number(), "pearson"), {"dev": [1.0, 4.0, 6.0]}, numbers)
    assert figures["dev"]["pearson"] == pytest.approx(np.corrcoef([0.5, 2.0, 3.0], [1.0, 4.0, 6.0])[0, 1])
    words = folders_of(
        tmp_path, {"dev": [[0.9, 0.1], [0.6, 0.4], [0.2, 0.8]]}, {"dev": [[0.2, 0.8], [0.1, 0.9], [0.4, 0.6]]}
    )
    figures = ensemble_figures(task_of(Tokens(("x", "y")), "accuracy"), {"dev": [(0, 1), (0,)]}, words)
    assert figures["dev"]["accuracy"] == pytest.approx(2 / 3)
    # Like the metrics of a seed, those of the ensemble have the threshold 0.5 of the training.
    several = folders_of(tmp_path, {"dev": [[0.5, 0.2]]}, {"dev": [[0.6, 0.7]]})
    figures = ensemble_figures(task_of(MultiLabel(("x", "y")), "subset_accuracy"), {"dev": [(0,)]}, several)
    assert figures["dev"]["subset_accuracy"] == 1.0


def test_missing_and_damaged_scores(tmp_path, capsys) -> None:
    folders = folders_of(tmp_path, {"dev": [[0.1, 0.9]]}, {"dev": [[0.1, 0.9]]})
    task, labels = task_of(Classes(("no", "yes")), "accuracy"), {"dev": [1]}
    file = folders[1] / SCORES
    for other in ({"dev": [1, 1]}, {"dev_matched": [1]}):
        with pytest.raises(
            UserError, match=r"holds scores of other examples than those of mine; remove .* to leave the"
        ):
            ensemble_figures(task, other, folders)
    content = file.read_bytes()
    file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(UserError, match=rf"{file} is damaged .*; remove {file} to leave the ensemble of the seeds out"):
        ensemble_figures(task, labels, folders)
    file.unlink()
    assert ensemble_figures(task, labels, folders) is None
    assert f"{folders[1]} has no {SCORES}: without the ensemble of the 2 seeds" in capsys.readouterr().err


def test_a_fine_tuning_stores_scores_and_reports_the_ensemble(bert, words, tmp_path, capsys) -> None:
    out = tmp_path / "out"
    short = ("--epochs", "2", "--seeds", "2", "--no-save-model")
    assert finetune(bert, words, out, *short, "--train-fraction", "0.5,1.0") == 0
    printed = capsys.readouterr().out
    dev = [json.loads(line) for line in Path(words[words.index("--custom.dev") + 1]).read_text().splitlines()]
    labels = np.array([row["label"] == "good" for row in dev])
    for part, folder in zip(results(out)["fractions"], (out / "fraction-0.5", out), strict=True):
        scores = [load_file(folder / f"seed-{seed}" / SCORES)["dev"] for seed in (0, 1)]
        each = [(one.argmax(1) == labels).mean() for one in scores]  # the scores are those of the best epoch
        assert each == [seed["best"]["dev"]["dev"]["accuracy"] for seed in part["seeds"]]
        value = (sum(scores).argmax(1) == labels).mean()
        assert part["ensemble"] == {"dev": {"accuracy": pytest.approx(value)}}
        (line,) = (line for line in printed.splitlines() if line.split()[:1] == [f"{part['train_examples']}"])
        assert line.split()[-1] == f"{value:.4f}"
    assert scores[0].dtype == np.float64 and torch.from_numpy(scores[0]).shape == (60, 2)
    # Without training again, as far as the scores are there.
    (out / "seed-0" / SCORES).unlink()
    assert finetune(bert, words, out, *short, "--train-fraction", "0.5,1.0") == 0
    assert [part["ensemble"] is None for part in results(out)["fractions"]] == [False, True]
