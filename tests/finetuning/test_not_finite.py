"""Fine-tuning that diverges: an epoch that is not finite is never the best, no such model is saved or read, no such
score is written, and no JSON file contains NaN."""

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from fastbert.errors import UserError
from fastbert.finetuning import ensemble, loop, scoring, submit, task_epochs
from fastbert.finetuning.ensemble import open_ensemble
from fastbert.studies.shared.comparison import Comparison
from fastbert.studies.shared.tuning_report import scores_table
from fastbert.training.tensors import read_tensors, serialized
from tests.finetuning.conftest import FAST, make_glue, make_task
from tests.flags import main
from tests.pretraining.test_not_finite import assert_strict_json


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> list[str]:
    return make_task(tmp_path_factory.mktemp("small"), "words", train=32, dev=16)


def finetune(model: Path, task: list[str], out: Path, *more: str) -> int:
    return main(["finetune", "--model", str(model), *task, *FAST, "--out", str(out), *more])


def poison_scores(monkeypatch, module, bad: set[int]) -> None:
    """NaN in the first score of a few calls."""
    real, calls = module.predict_scores, []

    def scoring(*arguments, **more):
        scores = real(*arguments, **more)
        calls.append(1)
        scores[0] = math.nan if len(calls) in bad else scores[0]
        return scores

    monkeypatch.setattr(module, "predict_scores", scoring)


def test_an_epoch_that_is_not_finite_is_never_the_best(bert, small, tmp_path, capsys, monkeypatch) -> None:
    poison_scores(monkeypatch, task_epochs, {1, 3})
    out = tmp_path / "out"
    assert finetune(bert, small, out, "--epochs", "3", "--seeds", "2") == 0
    printed = capsys.readouterr()
    assert "epoch 1: weights or scores on dev are not finite" in printed.err and "nan" not in printed.out
    assert_strict_json(out)
    (part,) = json.loads((out / "results.json").read_text())["fractions"]
    first, second = part["seeds"]
    assert first["best"]["epoch"] == 2 and first["last"]["dev"] == {"dev": {"accuracy": None, "loss": None}}
    assert second["last"]["dev"]["dev"]["accuracy"] is not None
    assert part["summary"]["last"]["dev"]["accuracy"]["median"] is None
    assert part["summary"]["best"]["dev"]["accuracy"]["median"] is not None
    row = {"model": "m", "task": "t", "metrics": ["accuracy"], "learning_rate": 1e-3, "batch_size": 16, "epochs": 3}
    table = scores_table(Comparison([first | row], ["m"], ["t"]), {})
    assert dict(zip(table.head, table.rows[0], strict=True))["last epoch"] == "–"


def test_weights_that_are_not_finite_are_not_saved(bert, small, tmp_path, capsys, monkeypatch) -> None:
    """In the embedding of a position that no text reaches, so that all scores are finite."""
    real = loop.Tuner.train_step

    def stepping(self, *arguments) -> None:
        real(self, *arguments)
        with torch.no_grad():
            self.updater.module.encoder.positions.table.weight[29, 3] = math.inf

    monkeypatch.setattr(loop.Tuner, "train_step", stepping)
    out = tmp_path / "out"
    assert finetune(bert, small, out, "--epochs", "2", "--seeds", "1") == 2
    printed = capsys.readouterr().err
    assert (
        "seed 0: training diverged: weights or scores on dev were not finite in any of the 2 epochs" in printed
        and "--learning-rate" in printed
    )
    assert not (out / "seed-0" / "model").exists() and not (out / "results.json").exists()


def test_a_huge_rate(bert, small, tmp_path, capsys) -> None:
    assert finetune(bert, small, tmp_path / "out", "--epochs", "9", "--learning-rate", "1e30", "--clip-norm", "0") == 2
    assert "not finite" in capsys.readouterr().err
    assert_strict_json(tmp_path / "out")


def damage(folder: Path, name: str) -> None:
    """Sets one number of one weight to NaN, with a matching hash."""
    path = folder / "model.safetensors"
    tensors, metadata = read_tensors(path)
    tensors[name].view(-1)[3] = math.nan
    path.write_bytes(serialized(tensors, metadata))


@pytest.fixture(scope="module")
def tuned(bert, small, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("tuned") / "out"
    assert finetune(bert, small, out, "--epochs", "1") == 0
    return out / "seed-0"


def test_models_that_are_not_finite_are_refused(bert, small, tuned, tmp_path, capsys) -> None:
    broken = tmp_path / "broken"
    damage(shutil.copytree(bert, broken), "encoder.layer.1.output.dense.weight")
    for command in (["finetune", "--model", str(broken), *small, *FAST], ["export", str(broken)]):
        assert main([*command, "--out", str(tmp_path / "new")]) == 2
        printed = capsys.readouterr().err
        assert (
            "not finite" in printed
            and "encoder.blocks.1.feed_forward.down.weight" in printed
            and str(broken) in printed
        )
        assert not (tmp_path / "new").exists()
    damage(shutil.copytree(tuned / "model", tmp_path / "model"), "classifier.weight")
    source = ["--source", small[5], "--out", str(tmp_path / "predictions.jsonl")]
    assert main(["predict", "--model", str(tmp_path / "model"), *source]) == 2
    assert "classifier.weight holds numbers that are not finite" in capsys.readouterr().err


def test_scores_that_are_not_finite_are_not_written(small, tuned, tmp_path, capsys, monkeypatch) -> None:
    with pytest.raises(UserError, match=r"2 of 3 scores of m are not finite; try --machine\.precision fp32"):
        scoring.check_finite(np.array([[0.1, math.nan], [math.inf, 0.2], [0.5, 0.5]]), "m", "bf16")
    scoring.check_finite(np.zeros((0, 2)), "m", "bf16")
    poison_scores(monkeypatch, ensemble, {1})
    written = tmp_path / "predictions.jsonl"
    assert main(["predict", "--model", str(tuned), "--source", small[5], "--out", str(written)]) == 2
    assert "1 of 16 scores" in capsys.readouterr().err and not written.exists()
    poison_scores(monkeypatch, ensemble, {1})
    glue = make_glue(tmp_path / "glue", ["sst2"])
    model = open_ensemble([str(tuned)])
    part = submit.ArchiveFile("SST-2.tsv", "sst2", "test", model, None)
    options = submit.SubmitOptions(glue_dir=str(glue))
    with pytest.raises(UserError, match=r"1 of 6 scores of .* are not finite"):
        submit.predict_part(part, model, options, torch.device("cpu"), "fp32")
