"""`fastbert affinity --train`: the models that are compared, their scores, and the tests."""

import json
import signal
from pathlib import Path

import pytest
from scipy import stats

from fastbert.finetuning.affinity import run
from fastbert.studies.affinity import compare
from fastbert.training import interrupts
from tests.finetuning.conftest import finetune, make_task, tiny_model
from tests.flags import main

MACHINE = ("--machine.threads", "1", "--machine.precision", "fp32", "--machine.device", "cpu")
STEPS = ("--learning-rate", "3e-3", "--batch-size", "8")
NAMES = ("numbers", "pairs")


@pytest.fixture(scope="module")
def bert(tmp_path_factory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("bert"))


@pytest.fixture(scope="module")
def tasks(tmp_path_factory) -> dict[str, Path]:
    folder, found = tmp_path_factory.mktemp("tasks"), {}
    for name in NAMES:
        (folder / name).mkdir()
        make_task(folder / name, name, train=24 if name == "numbers" else 40, dev=20)
        more = "pair: pair\n" if name == "pairs" else "kind: number\n"
        found[name] = folder / f"{name}.yaml"
        found[name].write_text(f"train: {name}/train.jsonl\ndev: {name}/dev.jsonl\n{more}")
    return found


def affinity(model: Path, tasks: dict[str, Path], out: Path, *more: str) -> int:
    given = (
        "--tasks",
        ",".join(map(str, tasks.values())),
        "--steps",
        "6",
        "--every",
        "3",
        "--groups",
        "1",
        "--seeds",
        "2",
    )
    return main(["affinity", "--model", str(model), "--out", str(out), "--train", *given, *STEPS, *MACHINE, *more])


def content(out: Path) -> dict:
    return json.loads((out / "comparison.json").read_text())


def test_the_models_that_are_compared() -> None:
    groups = {"members": [["a", "b"], ["b", "c"]], "used_from": {"a": 0, "b": 1, "c": 1}}
    assert compare.settings_of({"b": 5, "a": 3, "c": 9}, groups) == {
        "single": {"a": ("a",), "b": ("b",), "c": ("c",)},
        "together": dict.fromkeys("abc", ("a", "b", "c")),
        "largest": {"a": ("a", "c"), "b": ("b", "c"), "c": ("c",)},
        "groups": {"a": ("a", "b"), "b": ("b", "c"), "c": ("b", "c")},
    }


def test_the_tests_are_paired_by_seed() -> None:
    scores = {
        "single": {"a": [0.5, 0.6, 0.7], "mean": [0.5, 0.6, 0.7]},
        "together": {"a": [0.1, 0.2, 0.4], "mean": [0.1, 0.2, 0.4]},
        "largest": {"a": [0.6, 0.6, 0.9], "mean": [0.6, 0.6, 0.9]},
        "groups": {"a": [0.55, 0.66, 0.72], "mean": [0.55, 0.66, 0.72]},
    }
    tests = compare.differences(scores)
    expected = {name: stats.ttest_rel(scores["groups"]["a"], scores[name]["a"]) for name in compare.BASELINES}
    for name, found in expected.items():
        assert tests[name]["a"].p_t == pytest.approx(found.pvalue)
    ordered = sorted(found.pvalue for found in expected.values())
    assert min(compare.adjusted(tests).values()) == pytest.approx(min(1.0, 3 * ordered[0]))


def test_a_comparison_continues_and_a_single_task_is_that_of_finetune(
    bert, tasks, tmp_path, monkeypatch, capsys
) -> None:
    out, real, trained = tmp_path / "out", run.SteppedTuner.train_step, []

    def stopped(tuner, batch) -> None:
        real(tuner, batch)
        trained.append(1)
        if len(trained) == 6 + 2 * 6 + 3:  # the probed run, two models, half a model
            interrupts.receive(signal.SIGTERM)

    monkeypatch.setattr(run.SteppedTuner, "train_step", stopped)
    assert affinity(bert, tasks, out) == 143
    assert len(content(out)["models"]) == 2 and "the same command continues" in capsys.readouterr().err
    assert affinity(bert, tasks, out) == 0
    # numbers, pairs, and both, which are also all tasks and the chosen group, with two seeds
    assert len(trained) == 6 + 2 * 6 + 3 + 4 * 6
    found = content(out)
    assert [(model["tasks"], model["seed"]) for model in found["models"]] == [
        (list(names), seed) for seed in (0, 1) for names in (("numbers",), ("pairs",), NAMES)
    ]
    assert found["scores"]["groups"] == found["scores"]["together"] != found["scores"]["single"]
    assert found["steps"] == {"single": 12, "together": 6, "largest": 12, "groups": 6}
    assert found["groups_minus"]["together"]["mean"]["mean"] == 0.0
    printed = capsys.readouterr().out
    assert "2 models" in printed and "cannot be less than 0.5" in printed
    whole = tmp_path / "whole"
    assert affinity(bert, tasks, whole) == 0 and content(whole)["models"] == found["models"]
    # three batches of numbers: two epochs are six steps
    more = ("--epochs", "2", "--seeds", "2", "--no-save-model", "--batch-size", "8", "--learning-rate", "3e-3")
    assert finetune(bert, ["--task", str(tasks["numbers"])], tmp_path / "single", *more) == 0
    seeds = json.loads((tmp_path / "single" / "results.json").read_text())["fractions"][0]["seeds"]
    assert found["scores"]["single"]["numbers"] == [seed["last"]["dev"]["dev"]["pearson"] for seed in seeds]


def test_refusals(bert, tasks, tmp_path, capsys) -> None:
    undeveloped = tmp_path / "undeveloped.yaml"
    undeveloped.write_text(f"train: {tasks['numbers'].parent}/numbers/train.jsonl\nkind: number\n")
    assert affinity(bert, {**tasks, "other": undeveloped}, tmp_path / "out") == 2
    assert "the task undeveloped has no dev split, which --train needs" in capsys.readouterr().err
    assert affinity(bert, tasks, tmp_path / "out", "--seed", str(2**63 - 1)) == 2
    assert "as the other seeds of --train follow it" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
