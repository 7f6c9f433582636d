"""Several tasks in one call: each is trained as if it were alone, then the table is written; all errors are reported
before."""

import json
import shutil
import statistics
from pathlib import Path

import pytest

from fastbert.finetuning.tasks import task_names
from tests.finetuning.conftest import FAST, make_glue
from tests.finetuning.test_table import rows_of
from tests.flags import main

SHORT = (*FAST, "--epochs", "1", "--no-save-model")


@pytest.fixture(scope="module")
def glue(tmp_path_factory) -> list[str]:
    return ["--glue-dir", str(make_glue(tmp_path_factory.mktemp("glue"), ["rte", "mrpc", "sst2"])), "--glue-subset"]


def finetune(model: Path, task: str, out: Path, *more: str) -> int:
    return main(["finetune", "--model", str(model), "--task", task, "--out", str(out), *SHORT, *more])


def results(folder: Path) -> dict:
    return json.loads((folder / "results.json").read_text())


def test_each_task_is_trained_as_if_alone_and_a_table_ends_the_call(bert, glue, tmp_path, capsys) -> None:
    out = tmp_path / "out"
    assert finetune(bert, "rte,mrpc", out, *glue, "--seeds", "2", "--symmetric") == 0
    printed = capsys.readouterr().out
    table = (out / "glue.md").read_text()
    assert str(out / "glue.md") in printed
    found = rows_of(table)
    assert found["Model"] == ["MRPC", "RTE", "Mean of 2"]
    (part,) = results(out / "rte")["fractions"]
    values = [seed["best"]["dev"]["dev"]["accuracy"] for seed in part["seeds"]]
    assert found[str(bert)][1] == f"{100 * statistics.median(values):.1f} ± {100 * statistics.stdev(values):.1f}"
    assert "median over 2 seeds" in table
    assert found[f"{bert}, ensemble of the seeds"][1] == f"{100 * part['ensemble']['dev']['accuracy']:.1f}"
    cells = [*found[str(bert)][1].split(), found[f"{bert}, ensemble of the seeds"][1]]
    assert [line.split()[1:] for line in printed.splitlines() if line[:4] == "RTE "] == [cells]
    # --symmetric reaches the task it fits and no other.
    assert finetune(bert, "rte", tmp_path / "rte", *glue, "--seeds", "2") == 0
    assert finetune(bert, "mrpc", tmp_path / "mrpc", *glue, "--seeds", "2", "--symmetric") == 0
    for name in ("rte", "mrpc"):
        alone, together = results(tmp_path / name), results(out / name)
        for run in (alone, together):
            del run["seal"]
            for seed in run["fractions"][0]["seeds"]:
                del seed["examples_per_second"]
        assert alone == together


def test_continues_and_adds_tasks_and_fractions(bert, glue, tmp_path) -> None:
    out = tmp_path / "out"
    assert finetune(bert, "rte,sst2", out, *glue) == 0
    stamp = (out / "rte" / "seed-0" / "result.json").stat().st_mtime_ns
    assert finetune(bert, "rte,sst2, mrpc", out, *glue, "--train-fraction", "0.25,1.0") == 0
    assert (out / "rte" / "seed-0" / "result.json").stat().st_mtime_ns == stamp
    found = rows_of((out / "glue.md").read_text())
    assert found["Model"][:3] == ["SST-2", "MRPC", "RTE"]
    assert set(found) == {"Model", str(bert), f"{bert}, 25 % of train"}
    small = results(out / "sst2")["fractions"][0]["summary"]["best"]["dev"]["accuracy"]["median"]
    assert found[f"{bert}, 25 % of train"][0] == f"{100 * small:.1f}"


def test_custom_tasks_by_yaml(bert, glue, words, tmp_path, capsys) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(f"train: {words[3]}\ndev: {words[5]}\n")
    assert finetune(bert, f"{path},rte", tmp_path / "out", *glue) == 0
    head = rows_of((tmp_path / "out" / "glue.md").read_text())["Model"]
    assert head == ["RTE", "Mean of 1", "mine (accuracy)"]
    assert (tmp_path / "out" / "mine" / "results.json").is_file()
    # What is damaged in the folder of a later task is found before the first one is trained.
    result = tmp_path / "out" / "rte" / "seed-0" / "result.json"
    result.write_text(result.read_text().replace('"seed": 0', '"seed": 1'))
    shutil.rmtree(tmp_path / "out" / "mine" / "seed-0")
    capsys.readouterr()
    assert finetune(bert, f"{path},rte", tmp_path / "out", *glue) == 2
    printed = capsys.readouterr().err
    assert "1 of 2 tasks cannot be trained" in printed and f"{result} is damaged" in printed
    shutil.rmtree(tmp_path / "out" / "rte")
    (tmp_path / "out" / "rte").write_text("a file")
    assert finetune(bert, f"{path},rte", tmp_path / "out", *glue) == 2
    assert f"{tmp_path / 'out' / 'rte'}: part of that path is a file" in capsys.readouterr().err
    assert not (tmp_path / "out" / "mine" / "seed-0").exists()


def test_glue_means_the_eight_tasks_of_the_table() -> None:
    assert task_names("glue") == ["mnli", "qqp", "qnli", "sst2", "cola", "stsb", "mrpc", "rte"]
    assert task_names("rte") is None and task_names(None) is None
    assert task_names("rte, cola") == ["rte", "cola"]


def test_refusals_come_before_any_training(bert, glue, words, tmp_path, capsys) -> None:
    out = tmp_path / "out"

    def refuses(*messages: str, task: str = "rte,mrpc", more: tuple = (), folder: Path = out) -> None:
        assert finetune(bert, task, folder, *glue, *more) == 2
        printed = capsys.readouterr().err
        for message in messages:
            assert message in printed, printed
        assert "task 1" not in printed and not out.exists()

    refuses(
        "5 of 8 tasks cannot be trained:\n  mnli: ",
        "has no folder MNLI",
        "train the others: --task sst2,mrpc,rte",
        task="glue",
    )
    refuses("colla: unknown task 'colla'; did you mean 'cola'?", task="rte,colla")
    refuses("a task called rte is given twice", task="rte,RTE")
    refuses("--custom... describes one task", more=("--custom.pair", "b"))
    refuses("the order of the texts matters in all of these tasks", task="rte,sst2", more=("--symmetric",))
    refuses("max_length 99 is longer than the 30 positions", more=("--max-length", "99"))
    refuses("there is no folder", more=("--model", str(tmp_path / "nowhere")))
    path = tmp_path / "odd.yaml"
    for name in ("a/b", "..", ".lock", "config.yaml", "glue.md"):  # the last three are files in --out
        path.write_text(f"name: {name}\ntrain: {words[3]}\ndev: {words[5]}\n")
        refuses(f"{name!r} is not a name for a folder", task=f"rte,{path}")

    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.txt").write_text("years of work")
    refuses("holds no results of fastbert finetune", folder=tmp_path / "thesis")
    assert finetune(bert, "rte", tmp_path / "one", *glue) == 0
    refuses("holds the results of one task", folder=tmp_path / "one")
    assert finetune(bert, "rte,sst2", tmp_path / "two", *glue) == 0
    capsys.readouterr()
    refuses(
        "2 of 3 tasks", "batch_size: 16 -> 8", "--task mrpc", task="rte,sst2,mrpc", folder=tmp_path / "two",
        more=("--batch-size", "8"),
    )  # fmt: skip
    assert main(["finetune", "--task", "rte,mrpc", "--out", str(out)]) == 2
    assert "--model (or --init-from) is missing" in capsys.readouterr().err
