"""`fastbert submit`: every file comes from the right model, equal to `predict`, or is filled with --fill."""

import json
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest

from fastbert.finetuning.glue import GLUE
from fastbert.finetuning.submission import FILES, validate
from tests.finetuning.conftest import FAST, make_glue
from tests.flags import main
from tests.processes import reading

ROWS = 6
TASKS = ("rte", "stsb", "mnli")
ON_CPU = ("--machine.threads", "1", "--machine.precision", "fp32", "--machine.device", "cpu")


@pytest.fixture(scope="module", autouse=True)
def short():
    """GLUE with six rows in every test split."""
    with pytest.MonkeyPatch.context() as patch:
        for name, task in GLUE.items():
            patch.setitem(GLUE, name, replace(task, rows=dict.fromkeys(task.rows, ROWS)))
        yield


@pytest.fixture(scope="module")
def glue(tmp_path_factory) -> Path:
    return make_glue(tmp_path_factory.mktemp("glue"), [*TASKS, "ax"], train=32, dev=16, test=ROWS)


@pytest.fixture(scope="module")
def trained(bert, glue, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("trained") / "out"
    more = ("--task", ",".join(TASKS), "--glue-dir", str(glue), "--seeds", "2", "--epochs", "2")
    assert main(["finetune", "--model", str(bert), *FAST, *more, "--out", str(out)]) == 0
    return out


def submit(*arguments: object) -> int:
    return main(["submit", *map(str, arguments), *ON_CPU])


def answers(path: Path, file: str) -> list[str]:
    with zipfile.ZipFile(path) as archive:
        return [line.split("\t")[1] for line in archive.read(file).decode().splitlines()[1:]]


def predicted(model: Path, task: str, split: str, glue: Path, out: Path) -> list[str]:
    arguments = ("--model", model, "--task", task, "--split", split, "--glue-dir", glue, "--out", out)
    assert main(["predict", *map(str, arguments), *ON_CPU]) == 0
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    return [row["label"] if "label" in row else f"{min(max(row['value'], 0), 5):.3f}" for row in rows]


def best(folder: Path, metric: str) -> Path:
    seeds = json.loads((folder / "results.json").read_text())["fractions"][0]["seeds"]
    values = [sum(split[metric] for split in seed["best"]["dev"].values()) for seed in seeds]
    return folder / f"seed-{values.index(max(values))}"


def test_the_best_seed_of_each_task_answers_and_the_rest_is_filled(trained, glue, tmp_path, capsys) -> None:
    out = tmp_path / "glue.zip"
    assert submit("--results", trained, "--glue-dir", glue, "--out", out, "--fill") == 0
    printed = capsys.readouterr().out
    assert validate(out) == dict.fromkeys(FILES, ROWS)
    metrics = {"rte": "accuracy", "stsb": "pearson", "mnli": "accuracy"}
    for file, (name, split) in FILES.items():
        line = next(line for line in printed.splitlines() if line.split()[0] == file)
        model = "mnli" if name == "ax" else name
        if model in metrics:
            folder = best(trained / model, metrics[model])
            assert str(folder) in line
            assert answers(out, file) == predicted(folder, name, split, glue, tmp_path / "p.jsonl")
        else:
            assert line.endswith(f"majority label {GLUE[name].majority} in every row: no model")
            assert set(answers(out, file)) == {GLUE[name].majority}
    assert submit("--check", out) == 0
    assert "valid for GLUE's server" in capsys.readouterr().out


def test_models_override_results(trained, glue, tmp_path) -> None:
    out, chosen = tmp_path / "glue.zip", best(trained / "stsb", "pearson")
    other = trained / "stsb" / ("seed-0" if chosen.name == "seed-1" else "seed-1")
    models = (f"stsb={other}", f"ax={trained / 'mnli' / 'seed-0'}", f"mnli={trained / 'mnli' / 'seed-1'}")
    results = trained / "rte", trained / "stsb"  # an --out stands for its best seed
    models = (f"rte={results[0]}", *models)
    assert submit("--results", results[1], "--models", *models, "--glue-dir", glue, "--out", out, "--fill") == 0
    assert answers(out, "STS-B.tsv") == predicted(other, "stsb", "test", glue, tmp_path / "p.jsonl")
    assert answers(out, "STS-B.tsv") != predicted(chosen, "stsb", "test", glue, tmp_path / "p.jsonl")
    seed = best(trained / "rte", "accuracy")
    assert answers(out, "RTE.tsv") == predicted(seed, "rte", "test", glue, tmp_path / "p.jsonl")
    for file, split, seed in (("AX.tsv", "test", 0), ("MNLI-mm.tsv", "test_mismatched", 1)):
        model = trained / "mnli" / f"seed-{seed}"
        name = FILES[file][0]
        assert answers(out, file) == predicted(model, name, split, glue, tmp_path / "p.jsonl")


def test_an_ensemble_answers_as_in_predict(trained, glue, tmp_path, capsys) -> None:
    out, seeds = tmp_path / "glue.zip", [trained / "stsb" / f"seed-{seed}" for seed in (0, 1)]
    pair = ",".join(map(str, seeds))
    assert submit("--models", f"stsb={pair}", "--glue-dir", glue, "--out", out, "--fill") == 0
    assert f"the mean of 2 models: {seeds[0]}, {seeds[1]}" in capsys.readouterr().out
    answered = answers(out, "STS-B.tsv")
    assert answered == predicted(pair, "stsb", "test", glue, tmp_path / "p.jsonl")
    assert all(answered != predicted(one, "stsb", "test", glue, tmp_path / "p.jsonl") for one in seeds)


def test_a_missing_test_split_is_filled_only_on_request(trained, glue, tmp_path, capsys) -> None:
    part = tmp_path / "part"
    make_glue(part, ["mnli", "rte"], test=ROWS)
    (part / "MNLI" / "test_matched.tsv").unlink()
    arguments = ("--results", trained, "--glue-dir", part, "--out", tmp_path / "glue.zip")
    assert submit(*arguments) == 2
    assert "has no folder STS-B" in capsys.readouterr().err
    assert not (tmp_path / "glue.zip").exists()
    assert submit(*arguments, "--fill") == 0
    printed = capsys.readouterr().out
    assert "MNLI-m.tsv" in printed and "test_matched.tsv does not exist" in printed
    assert f"{part} has no folder AX" in printed and f"{part} has no folder STS-B" in printed
    assert set(answers(tmp_path / "glue.zip", "MNLI-m.tsv")) == {"contradiction"}
    assert set(answers(tmp_path / "glue.zip", "STS-B.tsv")) == {"2.701"}


def test_refusals(bert, trained, glue, tmp_path, capsys) -> None:
    out = tmp_path / "glue.zip"
    rte = trained / "rte" / "seed-0"

    def refuses(message: str, *arguments: object, where: Path = glue) -> None:
        assert submit("--glue-dir", where, *arguments) == 2
        printed = capsys.readouterr().err
        assert message in printed and "predicting" not in printed, printed
        assert not out.exists()

    rest = "no model for CoLA.tsv, SST-2.tsv, MRPC.tsv, STS-B.tsv, MNLI-m.tsv, MNLI-mm.tsv, QNLI.tsv, QQP.tsv, WNLI.tsv"
    refuses(rest, "--models", f"rte={rte}", "--out", out)
    refuses("is a folder; give --out a file", "--models", f"rte={rte}", "--out", tmp_path)
    refuses("--out is missing", "--models", f"rte={rte}")
    refuses("give models with --models", "--out", out, "--fill")
    refuses("--models takes task=folder", "--models", "rte", "--out", out)
    refuses("unknown GLUE task 'rt'; did you mean 'rte'?", "--models", f"rt={rte}", "--out", out)
    refuses("two models for rte", "--models", f"rte={rte}", f"rte={rte}", "--out", out)
    stsb = trained / "stsb" / "seed-0"
    refuses("with a space between them: put one before 'stsb=", "--models", f"rte={rte},stsb={stsb}", "--out", out)
    refuses("there is no folder nothing", "--models", f"rte={rte},nothing", "--out", out)
    refuses("these models cannot be averaged", "--models", f"rte={rte},{stsb}", "--out", out)
    refuses("is given twice", "--models", f"rte={rte},{trained / 'rte'}", "--out", out, "--fill")
    refuses("is not a fine-tuned model", "--models", f"rte={bert}", "--out", out, "--fill")
    refuses("was trained on rte, not on qnli", "--models", f"qnli={rte}", "--out", out, "--fill", where=tmp_path)
    refuses("holds no test split of rte", "--models", f"rte={rte}", "--out", out, "--fill", where=tmp_path)
    refuses("holds no results.json", "--results", bert, "--out", out)
    refuses("no GLUE folder", "--models", f"rte={rte}", "--out", out, "--fill", where=tmp_path / "nowhere")
    short = make_glue(tmp_path / "short", ["rte"], test=ROWS - 1)
    refuses("holds 5 rows, and GLUE's server expects 6", "--models", f"rte={rte}", "--out", out, "--fill", where=short)
    assert submit("--check", tmp_path / "none.zip") == 2
    assert "none.zip does not exist" in capsys.readouterr().err
    assert submit("--check", out, "--out", out) == 2
    assert "--check only reads an archive" in capsys.readouterr().err


def test_a_best_seed_whose_model_was_not_saved(bert, glue, tmp_path, capsys) -> None:
    more = ("--task", "rte", "--glue-dir", str(glue), "--epochs", "1", "--no-save-model", "--out", str(tmp_path / "r"))
    assert main(["finetune", "--model", str(bert), *FAST, *more]) == 0
    assert submit("--results", tmp_path / "r", "--glue-dir", glue, "--out", tmp_path / "x.zip", "--fill") == 2
    assert "its model was not saved" in capsys.readouterr().err


def test_an_archive_into_a_fifo_and_through_a_link(trained, glue, tmp_path, capfd) -> None:
    more = ("--models", f"rte={trained / 'rte'}", "--glue-dir", glue, "--fill")
    assert submit(*more, "--out", tmp_path / "file.zip") == 0
    expected = (tmp_path / "file.zip").read_bytes()
    fifo, link = tmp_path / "fifo", tmp_path / "link.zip"
    link.symlink_to("target.zip")
    assert submit(*more, "--out", link) == 0
    assert link.is_symlink() and (tmp_path / "target.zip").read_bytes() == expected
    with reading(fifo) as got:
        assert submit(*more, "--out", fifo) == 0
    assert got == [expected] and fifo.is_fifo()
