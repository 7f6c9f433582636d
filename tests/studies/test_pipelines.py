"""`fastbert run`: a graph of all kinds of jobs, cut after every job, with failing jobs, changed, and on two workers."""

import json
import os
import shlex
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from safetensors.torch import load_file

from fastbert.cli import OPTIONS, main
from fastbert.config import from_dict, to_dict
from fastbert.data.prepare import prepare
from fastbert.files import locked_folder
from fastbert.finetuning.options import FinetuneOptions
from fastbert.flags import parse
from fastbert.pretraining.options import PretrainOptions
from fastbert.streams import echo
from fastbert.studies.engine.jobs import run_job
from fastbert.studies.pipelines import estimate, run
from fastbert.studies.pipelines.commands import command_of
from fastbert.studies.pipelines.graph import COMMAND, PREPARE
from fastbert.studies.pipelines.lost import rerun_lost
from fastbert.studies.pipelines.remove_models import models_by_task, remove_models
from fastbert.studies.pipelines.report import jobs_table
from fastbert.studies.pipelines.results import mean_figures, results_of, tuning_rows
from fastbert.studies.pipelines.tunings import ENSEMBLE, TOGETHER
from fastbert.studies.shared.evaluate_jobs import EVALUATE
from fastbert.studies.shared.finetune_jobs import FINETUNE
from fastbert.studies.shared.pretrain_jobs import BRANCH, PRETRAIN
from tests.studies.conftest import graph_of, read_rows, without_times, write_pipeline


def in_this_process(count: int | None = None):
    """A back end that runs jobs in this process, and is stopped by SIGTERM after `count` of them."""

    def start(options, jobs, store, threads, **more) -> Iterator:
        ended = 0
        folder = Path.cwd()
        for job in jobs:
            if all(store.rows.get(one, {}).get("status") == "done" for one in job.after):
                yield job, None
                outcome = run_job(job.to_dict(), store.out / "jobs" / job.id)
                os.chdir(folder)
                ended += 1
                if ended == count:
                    os.kill(os.getpid(), signal.SIGTERM)
                yield job, outcome

    return start


@pytest.fixture(scope="module")
def finished(pipeline, tmp_path_factory) -> Path:
    """The folder of the pipeline, run by two workers."""
    folder = tmp_path_factory.mktemp("pipeline")
    assert (
        main(["run", write_pipeline(folder, pipeline), "--out", str(folder / "out"), "--workers", "2", "--keep", "all"])
        == 0
    )
    return folder / "out"


def results(out: Path) -> dict[str, dict]:
    """Rows by id, without times."""
    rows = without_times(read_rows(out))
    for row in rows:
        for task in row.get("tasks", {}).values():
            del task["examples_per_second"]
        for validation in row.get("validations", ()):
            for name in [name for name in validation if "second" in name]:
                del validation[name]
    return {row["id"]: row for row in rows}


def test_a_graph_of_all_kinds_of_jobs(finished: Path, pipeline, capsys) -> None:
    rows = read_rows(finished)
    kinds = {PREPARE: 2, PRETRAIN: 2, BRANCH: 1, EVALUATE: 6, FINETUNE: 5, TOGETHER: 1, ENSEMBLE: 2, COMMAND: 1}
    assert {kind: sum(row["kind"] == kind for row in rows) for kind in kinds} == kinds
    assert {row["status"] for row in rows} == {"done"} and len(rows) == sum(kinds.values())
    page = (finished / "report" / "report.md").read_text()
    assert "20 of 20 jobs are done. 3 models, the baseline is base." in page
    assert "| model | validation loss | minimal pairs | bits per byte | mood (first) | tone (second) |" in page
    # A table models x tasks; a stage for one model leaves the others empty.
    overview = {cells[0]: cells[1:] for cells in table_after(page, "| model | validation loss")}
    by_kind = {(row["kind"], row["model"], row["task"]): row for row in rows}
    loss = by_kind[PRETRAIN, "base", "pretraining"]["validations"][-1]["loss"]
    assert overview["base"][0] == f"{loss:.3f}" and overview["moved"][3] == overview["short"][4] == "–"
    tasks = by_kind[TOGETHER, "short", "joint"]["tasks"]
    assert overview["short"][5] == f"{100 * tasks['mood (joint)']['best']['dev']['dev']['accuracy']:.2f}"
    assert "Each model is one pretraining, and a seed in the tables of scores is a fine-tuning of it" in page
    # Every job has files that a command can read.
    for row in rows:
        if row["kind"] in (EVALUATE, ENSEMBLE):
            figures = json.loads(Path(row["folder"], "run", "results.json").read_text())
            assert figures.items() <= row.items()
    # The command ran in the shell, with the folder of the model.
    files = Path(by_kind[COMMAND, "list", "command"]["folder"], "run", "files.txt").read_text()
    assert {"manifest.json", "model"} <= set(files.split())
    # A second call runs nothing.
    assert main(["run", write_pipeline(finished.parent, pipeline), "--out", str(finished), "--keep", "all"]) == 0
    assert "; 20 done before" in capsys.readouterr().err


def table_after(page: str, head: str) -> list[list[str]]:
    lines = page[page.index(head) :].splitlines()[2:]
    rows = [line for line in lines[: next(i for i, line in enumerate([*lines, ""]) if not line.startswith("|"))]]
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]


def test_cut_after_every_job_it_ends_with_the_same_results(finished, pipeline, tmp_path, monkeypatch) -> None:
    """One process instead of two workers, stopped by a signal after each job and started again."""
    path, out = write_pipeline(tmp_path, pipeline), tmp_path / "out"
    monkeypatch.setattr(run, "start", in_this_process(1))
    arguments = ["run", path, "--out", str(out), "--keep", "all"]
    planned = graph_of(path, out)
    monkeypatch.setattr(run, "Graph", lambda *given: planned)  # planned once, to the same jobs in every call
    with monkeypatch.context() as patched:
        patched.setattr(run, "report_pipeline", lambda *given: 0)  # its plots take most of the time of a call
        codes = [main(arguments) for _ in planned.jobs]
    assert codes == [143] * len(planned.jobs) and main(arguments) == 0
    assert results(out) == results(finished)
    for job in planned.jobs:
        weights = [path.relative_to(out) for path in out.glob(f"jobs/{job.id}/run/**/model.safetensors")]
        for name in weights:
            a, b = load_file(out / name), load_file(finished / name)
            assert a.keys() == b.keys() and all((a[key] == b[key]).all() for key in a)
        assert weights or job.kind not in (PRETRAIN, BRANCH, FINETUNE, TOGETHER)


def test_every_job_has_the_command_that_repeats_it(finished, pipeline, tmp_path, capfd) -> None:
    """The options of a command are those of its job, and three commands give the figures of their jobs."""
    graph = graph_of(write_pipeline(finished.parent, pipeline), finished)
    by_kind = {}
    for job in graph.jobs:
        words = shlex.split(command_of(job))
        by_kind.setdefault(job.kind, (job, words))
        if job.kind in (PRETRAIN, FINETUNE, TOGETHER):
            cls = PretrainOptions if job.kind == PRETRAIN else FinetuneOptions
            values = {key: value for key, value in job.options.items() if key != "columns"}
            wanted = from_dict(cls, values | {"out": f"repeated/{job.id}"}, "")
            assert to_dict(parse(OPTIONS[words[1]], words[2:], words[1])) == to_dict(wanted)
        elif job.kind == ENSEMBLE:
            words = words[words.index("&&") + 1 :]
            predicted = parse(OPTIONS[words[1]], words[2:], words[1])
            machine = to_dict(predicted.machine)  # with another one its figures are others
            assert machine.items() <= job.options["finetune"]["machine"].items() and machine["precision"] == "fp32"
            assert predicted.model == ",".join(job.options["folders"])
        elif words[0] == "fastbert" and job.kind != BRANCH:
            parse(OPTIONS[words[1]], words[2:], words[1])
    rows = {row["id"]: row for row in read_rows(finished)}
    before = os.getcwd()
    os.chdir(tmp_path)
    try:
        for kind in (PREPARE, FINETUNE, BRANCH):
            job, words = by_kind[kind]
            assert main(words[1:]) == 0
            out = Path("repeated", job.id)
            if kind == FINETUNE:
                (seed,) = json.loads((out / "results.json").read_text())["fractions"][0]["seeds"]
                assert seed["best"]["dev"] == rows[job.id]["best"]["dev"]
            if kind == BRANCH:
                ours = load_file(Path(rows[job.id]["folder"], "run", "model", "model.safetensors"))
                theirs = load_file(out / "model" / "model.safetensors")
                assert all((ours[key] == theirs[key]).all() for key in ours)
        job, _ = by_kind[COMMAND]
        assert subprocess.run(command_of(job), shell=True).returncode == 0
        assert Path("repeated", job.id, "files.txt").is_file()
    finally:
        os.chdir(before)


def test_only_what_a_change_concerns_runs_again(finished, pipeline, tmp_path, capsys) -> None:
    out = tmp_path / "out"
    subprocess.run(["cp", "-r", "--reflink=auto", str(finished), str(out)], check=True)
    stages = [*pipeline["stages"]]
    stages[1] = stages[1] | {"learning_rates": [1e-3]}
    stages[2] = stages[2] | {"epochs": 2}
    before = results(out)
    assert (
        main(["run", write_pipeline(finished.parent, pipeline, stages=stages), "--out", str(out), "--keep", "all"]) == 0
    )
    printed = capsys.readouterr().err
    assert (
        f"changed since the last call: stage second: {stages[1]['tasks'][0]}: learning_rate: [0.001, 0.003] -> [0.001]"
        in printed
    )
    assert "1 job new or changed (1 of joint); 4 no longer needed" in printed and "16 done before" in printed
    after = results(out)
    assert {key: after[key] for key in before} == before and len(after) == len(before) + 1
    write_pipeline(finished.parent, pipeline)


def test_a_failed_job_ends_its_descendants_only(pipeline, pipeline_inputs, tmp_path, capsys, monkeypatch) -> None:
    """A batch larger than the text is an error of the pretraining; a command fails by its exit code."""
    base = pipeline["models"][0]
    changes = {
        "models": [base, {"name": "large", "like": "base", "batch_size": 5000}],
        "stages": [pipeline["stages"][0] | {"models": ["base", "large"]}],
        "data": {"text": pipeline["data"]["text"]},
        "evaluate": None,
        "commands": [
            {"name": "bad", "run": "echo on the way; exit 3"},
            {"name": "later", "run": "true", "after": "bad"},
            {"name": "good", "run": "true {base}"},
            {"name": "anew", "run": "echo x >> {out}/x; false"},
            {"name": "resumed", "run": "echo x >> {out}/x; test $(wc -l < {out}/x) = 2", "resumes": True},
        ],
    }
    path, out = write_pipeline(tmp_path, pipeline, **changes), tmp_path / "out"
    assert main(["run", path, "--out", str(out)]) == 1
    rows = {(row["task"], row["model"]): row for row in read_rows(out)}
    assert rows["mood", "base"]["status"] == rows["command", "good"]["status"] == "done"
    assert rows["pretraining", "large"]["status"] == rows["command", "bad"]["status"] == "failed"
    assert "less than one batch of 5000" in rows["pretraining", "large"]["reason"]
    assert rows["command", "bad"]["reason"] == "the command ended with exit code 3"
    assert rows["command", "bad"]["log"] == ["echo on the way; exit 3", "on the way"]
    for lost, ancestor in ((("mood", "large"), "pretraining, large"), (("command", "later"), "command, bad")):
        assert rows[lost]["status"] == "not run" and f"{ancestor}" in rows[lost]["reason"]
    page = (out / "report" / "report.md").read_text()
    assert "4 of 10 jobs are done, 6 failed or did not run" in page and "on the way" in page
    printed = capsys.readouterr()
    assert "FAILED command, bad" in printed.err and "not run" in printed.err
    assert "command, good: exit code 0, 0 s" in printed.err
    # The same command runs them again; with the error corrected, the rest is done before.
    changes["commands"][0]["run"] = "true"
    changes["models"] = [base]
    changes["stages"] = [pipeline["stages"][0] | {"models": ["base"]}]
    assert main(["run", write_pipeline(tmp_path, pipeline, **changes), "--out", str(out)]) == 1
    assert "4 done before" in capsys.readouterr().err
    folders = {row["model"]: out / "jobs" / row["id"] / "run" for row in read_rows(out)}
    assert [(folders[name] / "x").read_text() for name in ("anew", "resumed")] == ["x\n", "x\nx\n"]


def test_parts_of_a_pipeline(pipeline, tmp_path, monkeypatch, capsys) -> None:
    path, out = write_pipeline(tmp_path, pipeline), tmp_path / "out"
    monkeypatch.setattr(run, "start", in_this_process())
    graph = graph_of(path, out, until="first")
    assert [graph.entries[job.id] for job in graph.selected()] == ["text", "base", "first"]
    assert main(["run", path, "--out", str(out), "--only", "base,text"]) == 0
    assert main(["run", path, "--out", str(out), "--only", "second"]) == 2
    message = capsys.readouterr().err
    assert "--only second: it depends on jobs that are not done (first)" in message and "--until second" in message
    assert main(["run", path, "--out", str(out), "--until", "nothing"]) == 2
    assert "has no jobs of 'nothing'; it has text, other, base" in capsys.readouterr().err
    # A dry run counts what is done, also while another process runs the pipeline, and writes nothing.
    before = (out / "results.jsonl").read_text()
    monkeypatch.setattr(estimate, "prepare", lambda *given: (echo("about a sample"), prepare(*given)))
    with locked_folder(out):
        assert main(["run", path, "--out", str(out), "--dry-run"]) == 0
    printed = capsys.readouterr()
    assert "20 jobs, 18 to do" in printed.out and "time: about" in printed.out and "disk: about" in printed.out
    assert "second (ensembles)  base" in printed.out
    assert "about a sample" not in printed.err
    assert (out / "results.jsonl").read_text() == before
    assert main(["run", path, "--out", str(out / "results.jsonl"), "--dry-run"]) == 2
    assert "results.jsonl is not a folder; choose another --out" in capsys.readouterr().err
    assert main(["run", path, "--out", str(tmp_path / "none" / "new"), "--dry-run"]) == 0
    assert "20 jobs, 20 to do" in capsys.readouterr().out and not (tmp_path / "none").exists()


def test_a_job_whose_files_are_gone_runs_again(pipeline, tmp_path, monkeypatch, capsys) -> None:
    """With keep: none the encoder of the first stage is removed in the end; a new stage after it trains it again."""
    few = {
        "models": pipeline["models"][:1],
        "evaluate": None,
        "commands": None,
        "data": {"text": pipeline["data"]["text"]},
    }
    path, out = write_pipeline(tmp_path, pipeline, **few, stages=pipeline["stages"][:2]), tmp_path / "out"
    monkeypatch.setattr(run, "start", in_this_process())
    assert main(["run", path, "--out", str(out), "--keep", "none"]) == 0
    assert "keep: none: removed 1 fine-tuned model" in capsys.readouterr().err
    assert not list(out.glob("jobs/*/run/seed-*/model"))
    more = [*pipeline["stages"][:2], pipeline["stages"][1] | {"name": "third", "seeds": 1, "learning_rates": 2e-3}]
    before = results(out)
    assert (
        main(["run", write_pipeline(tmp_path, pipeline, **few, stages=more), "--out", str(out), "--keep", "none"]) == 0
    )
    printed = capsys.readouterr().err
    assert "files of 1 finished job that others need were removed: they run again" in printed
    after = results(out)
    for key, row in before.items():  # another stage has the task too, so its name in tables has the stage
        assert after[key] | {"task": row["task"]} == row


def test_the_best_models_are_those_with_the_highest_score_also_below_zero(finished, pipeline, tmp_path) -> None:
    out = tmp_path / "out"
    subprocess.run(["cp", "-r", str(finished), str(out)], check=True)
    graph = graph_of(write_pipeline(finished.parent, pipeline), out)
    store = run.ResultStore(out, run.PIPELINE, run.check_pipeline_row)
    store.read(graph.jobs)
    scores = iter([-0.3, -0.1, -0.2, -0.4])
    best = None
    for job in graph.jobs:
        if job.task == "tone (second)" and job.kind == FINETUNE:
            value = next(scores)
            store.rows[job.id]["best"]["dev"]["dev"]["accuracy"] = value
            best = job.id if value == -0.1 else best
    found = models_by_task(graph, store)
    assert len(found["base", "tone (second)"]) == 4 and len(found["short", "tone (joint)"]) == 1
    remove_models(graph, store, "best")
    left = {path.relative_to(out / "jobs").parts[0] for path in out.glob("jobs/*/run/seed-*/model")}
    first = next(job.id for job in graph.jobs if job.task == "mood (first)")
    assert left == {first, best}
    assert len(list(out.glob("jobs/*/run/*/seed-*/model"))) == 2  # one for each task of the joint stage


def test_trials_of_one_encoder_are_one_observation(finished, pipeline) -> None:
    """Two pretrainings with two fine-tunings each: pairs are made of their means, and of the means of ensembles."""

    def row(seed: int, trial: int, value: float) -> dict:
        figures = {"dev": {"dev": {"accuracy": value}}}
        setting = {"learning_rate": 1e-3, "batch_size": 8, "epochs": 1, "trial": trial}
        return {"model": "m", "task": "t", "seed": seed, **setting, "metrics": ["accuracy"], "best": figures} | {
            "last": figures
        }

    class Tuning:
        kind = FINETUNE

    values = {(0, 0): 0.2, (0, 1): 0.6, (1, 0): 0.5, (1, 1): 0.9}
    rows = [(Tuning, row(*key, value)) for key, value in values.items()]
    means = tuning_rows(rows, several_pretrainings=True)
    found = {one["seed"]: one["best"]["dev"]["dev"]["accuracy"] for one in means}
    assert found == pytest.approx({0: 0.4, 1: 0.7})
    single = tuning_rows(rows[:2], several_pretrainings=False)
    assert [one["seed"] for one in single] == [0, 1]
    assert mean_figures([{"dev": {"a": 1.0}}, {"dev": {"a": None}}]) == {"dev": {"a": None}}
    # The pipeline's own: one pretraining, so a seed is a fine-tuning, and the ensemble is of two.
    graph = graph_of(write_pipeline(finished.parent, pipeline), finished)
    store = run.ResultStore(finished, run.PIPELINE, run.check_pipeline_row)
    store.read(graph.jobs)
    ours = results_of(graph, store)
    trials = ours.comparison.trials["base", "tone (second)"]
    assert not ours.several_pretrainings and len(trials.scores(trials.best)) == 2
    wanted = [
        row["ensemble"]
        for row in read_rows(finished)
        if row["kind"] == ENSEMBLE and row["learning_rate"] == trials.best[0]
    ]
    assert [ours.ensembles["base", "tone (second)"]] == wanted


def test_an_existing_run_is_a_model(finished, pipeline, tmp_path, monkeypatch, capsys) -> None:
    """It has a head, which no fine-tuning reads: the jobs compare the model with the one that was planned."""
    path = next(row["folder"] for row in read_rows(finished) if row["kind"] == PRETRAIN) + "/run"
    changes = {
        "data": None,
        "models": [{"name": "given", "path": path}],
        "stages": [{key: value for key, value in pipeline["stages"][0].items() if key != "models"}],
        "evaluate": pipeline["evaluate"][0],
        "commands": [{"name": "list", "run": "ls {given} {pairs} {first} > {out}/files.txt"}],
    }
    monkeypatch.setattr(run, "start", in_this_process())
    file, out = write_pipeline(tmp_path, pipeline, **changes), tmp_path / "out"
    assert main(["run", file, "--out", str(out)]) == main(["run", file, "--out", str(out)]) == 0
    assert "; 3 done before" in capsys.readouterr().err
    listed = next(out.glob("jobs/*/run/files.txt")).read_text()
    assert f"{path}:\ncheckpoints" in listed and listed.count("results.json") == 2
    command = graph_of(file, out).jobs[-1]
    assert command.identity["models"]["given"] == graph_of(file, out).models["given"].identity


def test_files_that_were_removed(finished, pipeline, tmp_path, monkeypatch, capsys) -> None:
    """Jobs run again if one that is to do reads what is missing; the page names those whose commands come first."""
    monkeypatch.chdir(tmp_path)
    subprocess.run(["cp", "-r", "--reflink=auto", str(finished), "out"], check=True)
    graph = graph_of(write_pipeline(finished.parent, pipeline), Path("out"))

    def read() -> run.ResultStore:
        store = run.ResultStore(Path("out"), run.PIPELINE, run.check_pipeline_row)
        store.read(graph.jobs)
        return store

    ensemble = next(job for job in graph.jobs if job.kind == ENSEMBLE)
    first, second = ensemble.after
    tuned = graph.jobs[[job.id for job in graph.jobs].index(first)]
    shutil.rmtree(Path(tuned.options["init_from"], "model"))
    shutil.rmtree(Path(ensemble.options["folders"][0], "model"))
    rows = {row[2]: row for row in jobs_table(graph, read()).rows}
    assert rows[ensemble.id][5] == first and f"--model repeated/{first}/seed-0," in rows[ensemble.id][6]
    assert rows[first][5] == tuned.after[0] and f"--init-from repeated/{tuned.after[0]}/seed-0" in rows[first][6]
    assert rows[second][5] == tuned.after[0] and rows[graph.jobs[0].id][5] == ""
    store = read()
    rerun_lost(graph, store)
    assert len(store.rows) == len(graph.jobs)  # nothing is to do
    Path(ensemble.options["folders"][0], "dev_scores.safetensors").unlink()
    del store.rows[ensemble.id]
    rerun_lost(graph, store)
    missing = {job.id for job in graph.jobs} - store.rows.keys()
    assert missing == {ensemble.id, first, tuned.after[0]}
    store = read()
    branch = next(job for job in graph.jobs if job.kind == BRANCH)
    shutil.rmtree(next(Path("out").glob(f"jobs/{branch.after[0]}/run/checkpoints/step-*2")))
    del store.rows[branch.id]
    rerun_lost(graph, store)
    assert {job.id for job in graph.jobs} - store.rows.keys() == {branch.id, branch.after[0]}
