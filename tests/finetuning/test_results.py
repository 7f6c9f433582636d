"""The best seed of a fine-tuning, according to results.json alone."""

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from fastbert.errors import UserError
from fastbert.finetuning.dev_scores import selection_value
from fastbert.finetuning.kinds.number import Number
from fastbert.finetuning.results import best_seed, tuned_folder
from fastbert.finetuning.task_epochs import TaskEpochs
from fastbert.finetuning.tasks import Task


def write_results(out: Path, dev: dict[float, list[list[float]]]) -> None:
    """Fraction of train -> for each seed the accuracies on two dev splits; F1 ranks the seeds the other way."""
    out.mkdir(exist_ok=True)
    fractions = []
    for fraction, seeds in dev.items():
        part = {"fraction": fraction, "seeds": []}
        for seed, values in enumerate(seeds, 3):
            splits = {f"dev_{index}": {"accuracy": v, "f1": -v, "loss": v} for index, v in enumerate(values)}
            part["seeds"].append({"seed": seed, "best": {"epoch": 1, "dev": splits}})
            folder = (out if fraction == 1.0 else out / f"fraction-{fraction}") / f"seed-{seed}"
            (folder / "model").mkdir(parents=True, exist_ok=True)
        fractions.append(part)
    (out / "results.json").write_text(json.dumps({"task": "t", "metrics": ["accuracy", "f1"], "fractions": fractions}))


def test_an_epoch_is_selected_by_the_mean_of_its_dev_splits() -> None:
    dev = {"matched": {"accuracy": 0.9, "f1": 0.0}, "mismatched": {"accuracy": 0.5, "f1": 1.0}}
    assert selection_value(SimpleNamespace(metrics=("accuracy", "f1")), dev) == pytest.approx(0.7)


def test_the_rate_counts_the_examples_of_all_epochs(tmp_path) -> None:
    task = Task("t", Number(), False, ("pearson",), False, {}, None)
    dev = {"dev": SimpleNamespace(labels=[1.0], truncated=0)}
    setup = SimpleNamespace(options=SimpleNamespace(epochs=3, save_model=False), task=task, dev=dev)
    train = SimpleNamespace(examples=range(10), truncated=2)
    epochs = TaskEpochs(setup, train, tmp_path, seed=4, best_scores={"dev": np.ones(1)})
    result = epochs.result(SimpleNamespace(seconds=2.0, skipped=1), 10)
    assert result["examples_per_second"] == 15.0 and result["train_examples"] == 10


def test_the_mean_of_the_dev_splits_by_the_first_metric_on_the_largest_fraction(tmp_path) -> None:
    write_results(tmp_path, {1.0: [[0.9, 0.1], [0.5, 0.6], [0.4, 0.4]], 0.5: [[0.99, 0.99], [0, 0], [0, 0]]})
    assert best_seed(tmp_path) == tuned_folder(tmp_path) == tmp_path / "seed-4"
    write_results(tmp_path, {0.1: [[0.9, 0.9], [1, 1]], 0.5: [[-0.1, -0.2], [-0.3, -0.2]]})
    assert best_seed(tmp_path) == tmp_path / "fraction-0.5" / "seed-3"


def test_a_seed_folder_is_used_as_it_is(tmp_path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "task.json").write_text("{}")
    assert tuned_folder(tmp_path) == tmp_path
    assert tuned_folder(tmp_path / "nowhere") == tmp_path / "nowhere"


def test_missing_results(tmp_path) -> None:
    with pytest.raises(UserError, match=r"results\.json does not exist"):
        best_seed(tmp_path)
    write_results(tmp_path, {1.0: [[0.1, 0.2]]})
    (tmp_path / "seed-3" / "model").rmdir()
    with pytest.raises(UserError, match=r"seed-3 is the best seed .*accuracy 0\.1500.* was not saved"):
        best_seed(tmp_path)
