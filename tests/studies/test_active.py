"""`fastbert active`: rounds that continue from each other, to the same bytes after any interruption; known labels or
those of people."""

import json
import shutil
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from safetensors.numpy import load_file

from fastbert.cli import main
from fastbert.finetuning.continual.outputs import outputs_of
from fastbert.finetuning.continual.tuner import Cost
from fastbert.finetuning.saved import load_task_model
from fastbert.studies.active import round_job
from fastbert.studies.active.options import load_active
from fastbert.studies.active.plan import plan_active
from fastbert.studies.active.pool import round_seed
from tests.finetuning.conftest import make_task
from tests.studies.conftest import read_rows, without_times

CPU = {"device": "cpu", "precision": "fp32"}
LEARNERS = [
    {"method": "anew", "query": "random"},
    {"method": "sds2", "query": "margin", "replay": 4, "candidates": 6},
]
TRAINING = {"epochs": 2, "batch_size": 8, "learning_rate": 3e-3, "machine": CPU}
TIMES = ("seconds_training", "seconds_query")
FILES = ("selected.jsonl", "memory.safetensors", "dev_scores.safetensors", "model/model.safetensors")


@pytest.fixture(scope="module")
def content(models, words) -> dict:
    """Content of a YAML file."""
    common = {"model": models["narrow"], "task": words, "pool": 40, "rounds": [8, 16, 24]}
    return {**common, "learners": LEARNERS, "seeds": 2, "finetune": TRAINING}


def write(folder: Path, content: dict, **changes) -> str:
    folder.mkdir(exist_ok=True)
    path = folder / "study.yaml"
    path.write_text(yaml.safe_dump({key: value for key, value in (content | changes).items() if value is not None}))
    return str(path)


@pytest.fixture(scope="module")
def study(content, tmp_path_factory) -> Path:
    """The folder of a finished study."""
    folder = tmp_path_factory.mktemp("active")
    assert main(["active", write(folder, content), "--out", str(folder / "out")]) == 0
    return folder / "out"


def selected(row: dict) -> list[dict]:
    return [json.loads(line) for line in (Path(row["folder"]) / "run" / "selected.jsonl").read_text().splitlines()]


def chain(rows: list[dict], learner: str, seed: int = 0, kind: str = "round") -> list[dict]:
    return [row for row in rows if (row["model"], row["seed"], row["kind"]) == (learner, seed, kind)]


def test_what_a_study_leaves(study, words, tmp_path) -> None:
    """Texts of the rounds, memory, costs by hand, and only the newest model of a chain."""
    rows = read_rows(study)
    assert len(rows) == 2 * 3 + 2 * 4 and all(row["status"] == "done" for row in rows)
    train = [json.loads(line) for line in (Path(words).parent / "train.jsonl").read_text().splitlines()]
    for learner in ("anew random", "sds2 margin"):
        rounds = chain(rows, learner)
        assert [(row["round"], row["labels"]) for row in rounds] == [(1, 8), (2, 16), (3, 24)]
        texts = [text for row in rounds for text in selected(row)]
        assert [len(selected(row)) for row in rounds] == [8, 8, 8]
        assert len({text["text"] for text in texts}) == 24
        assert all(
            (train[one["index"]]["text"], train[one["index"]]["label"]) == (one["text"], one["label"]) for one in texts
        )
        memories = [load_file(Path(row["folder"]) / "run" / "memory.safetensors") for row in rounds]
        assert [one["logits"].shape for one in memories] == [(8, 2), (16, 2), (24, 2)]
        for before, after in pairwise(memories):
            for name in ("rows", "logits"):
                assert (after[name][: len(before[name])] == before[name]).all()
        assert [(Path(row["folder"]) / "run" / "model").is_dir() for row in rounds] == [False, False, True]
    assert selected(chain(rows, "anew random")[0]) == selected(chain(rows, "sds2 margin")[0])
    values = [one["value"] for one in selected(chain(rows, "sds2 margin")[1])]
    assert values == sorted(values, reverse=True) and 0 <= values[-1] <= values[0] <= 1
    # 2 epochs of 8, 16 and 24 examples; or of 8 and one step with 4 replayed ones chosen from 6, and the stored logits.
    assert [row["cost"] for row in chain(rows, "anew random")] == [
        Cost(16).to_dict(),
        Cost(32).to_dict(),
        Cost(48).to_dict(),
    ]
    assert [row["cost"] for row in chain(rows, "sds2 margin")] == [
        Cost(gradients=16, forwards=8).to_dict(),
        Cost(gradients=24, forwards=2 * 6 + 8, pool=32).to_dict(),
        Cost(gradients=24, forwards=2 * 6 + 8, pool=24).to_dict(),
    ]
    assert [row["cost"]["gradients"] for row in chain(rows, "sds2 margin", kind="final")] == [48]


def test_training_anew_is_a_fine_tuning(study, models, words, tmp_path) -> None:
    """The last round of a learner that trains anew, and the final training of another one, equal fastbert finetune on
    the texts in the order of their labelling, to the last digit of its last epoch."""
    rows = read_rows(study)
    for learner, kind, task in (("anew random", "round", "a"), ("sds2 margin", "final", "b")):
        texts = [text for row in chain(rows, learner, 1) for text in selected(row)]
        (tmp_path / "train.jsonl").write_text("".join(json.dumps(text) + "\n" for text in texts))
        flags = ["--model", models["narrow"], "--task", "words", "--custom.train", str(tmp_path / "train.jsonl")]
        flags += [
            "--custom.dev",
            str(Path(words).parent / "dev.jsonl"),
            "--seeds",
            "1",
            "--first-seed",
            "1",
            "--no-save-model",
            "--epochs",
            "2",
        ]
        flags += ["--batch-size", "8", "--learning-rate", "3e-3", "--machine.threads", "1"]
        flags += ["--machine.device", "cpu", "--machine.precision", "fp32", "--out", str(tmp_path / task)]
        assert main(["finetune", *flags]) == 0
        (seed,) = json.loads((tmp_path / task / "results.json").read_text())["fractions"][0]["seeds"]
        assert chain(rows, learner, 1, kind)[-1]["dev"] == seed["last"]["dev"]


def test_the_report(study) -> None:
    """Scores, areas and costs are those of the rows."""
    rows, report = read_rows(study), (study / "report" / "report.md").read_text()
    for name in ("labels", "cost"):
        plot = (study / "report" / f"{name}.svg").read_text()
        assert "sds2 margin" in plot and "accuracy x 100" in plot and "mathdefault" not in plot
    cells = [[cell.strip() for cell in line.strip("| ").split("|")] for line in report.splitlines() if line[:1] == "|"]
    for learner in ("anew random", "sds2 margin"):
        scores = [[row["dev"]["dev"]["accuracy"] for row in chain(rows, learner, seed)] for seed in (0, 1)]
        means = [f"{100 * sum(each) / 2:.2f}" for each in zip(*scores, strict=True)]
        assert [learner, "2", *means] in cells
        areas = [(a / 2 + b + c / 2) / 2 for a, b, c in scores]
        assert [learner, f"{100 * sum(areas) / 2:.2f}"] in [row[:2] for row in cells]
        costs = [Cost(**row["cost"]) for row in chain(rows, learner)]
        whole = [
            sum(cost.gradients + cost.trials + cost.forwards / 3 + cost.pool / 3 * part for cost in costs)
            for part in (0, 1)
        ]
        assert [learner, *(f"{round(value):g}" for value in whole)] in [row[:3] for row in cells]
    assert "minus anew random" in report and "Few pairs limit the p" in report
    final = chain(rows, "sds2 margin", 0, "final") + chain(rows, "sds2 margin", 1, "final")
    mean = sum(row["dev"]["dev"]["accuracy"] for row in final) / 2
    assert [cells for cells in cells if cells[0] == "sds2 margin" and cells[2:] == [f"{100 * mean:.2f}", "2"]]


class Killed(BaseException):
    """Stands for kill -9: nothing of the job's code runs afterwards."""


@pytest.fixture
def planned(content, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    plan = plan_active(*load_active(write(tmp_path, content, learners=LEARNERS[1:], seeds=[1])))
    return [job.to_dict() for job in plan.jobs]


@pytest.mark.parametrize("interrupted", [1, 3])
def test_killed_anywhere_and_continued(study, planned, tmp_path, monkeypatch, interrupted) -> None:
    """In a round, or in the final training: before the query, before the training, before each of its files, and after
    the last of them. The result is that of the study to the byte."""
    out = tmp_path / "jobs"
    expected = {row["id"]: row for row in read_rows(study)}
    for number, job in enumerate(planned):
        folder = out / job["id"] / "run"
        for point in POINTS[job["kind"]] if number == interrupted else ():
            with monkeypatch.context() as patch, pytest.raises(Killed):
                kill_at(patch, point)
                round_job.round_job(job, folder)
        if number == interrupted and job["kind"] == "round":
            assert (folder / "round.json").is_file()  # the last attempt was killed after it
        outcome = round_job.round_job(job, folder)
        row, (same,) = expected[job["id"]], without_times([expected[job["id"]]])
        result = {key: value for key, value in outcome["result"].items() if key not in TIMES}
        assert result == {key: same[key] for key in result}
        theirs = [name for name in FILES if (Path(row["folder"]) / "run" / name).is_file()]
        for name in theirs:
            assert (folder / name).read_bytes() == (Path(row["folder"]) / "run" / name).read_bytes()
        assert len(theirs) == {"round": 3 + (number == 2), "final": 1}[job["kind"]]


POINTS = {
    "round": ("select", "train", "write_memory", "save_model", "write_sealed", "disk_errors"),
    "final": ("train", "write_sealed"),
}


def kill_at(patch: pytest.MonkeyPatch, point: str) -> None:
    """Kills the job where it calls a function; `disk_errors` where the model of the round before is removed."""
    original, calls = getattr(round_job, point), []

    def killed(*given):
        calls.append(None)
        if point != "disk_errors" or len(calls) > 1:  # the first call is that for the new folder
            raise Killed
        return original(*given)

    patch.setattr(round_job, point, killed)


@pytest.mark.parametrize("method", ["anew", "warm", "er"])
def test_where_a_round_starts(content, tmp_path, monkeypatch, method) -> None:
    """Weights before the first step of the second round: those of the end of the first one or, for anew, the pretrained
    ones with the head as the first round had it. But for anew, order and dropout differ from those before."""
    monkeypatch.chdir(tmp_path)
    learners = [{"method": method, "query": "random"}]
    plan = plan_active(*load_active(write(tmp_path, content, learners=learners, rounds=[8, 16])))
    first, second = (job.to_dict() for job in plan.jobs[:2])
    starts, seeds, train = [], [], round_job.train

    def recorded(its, updater, rows):
        starts.append({name: value.clone() for name, value in updater.module.state_dict().items()})
        return train(its, updater, rows)

    def stream(*given):
        seeds.append(given[-1])
        raise Killed

    monkeypatch.setattr(round_job, "train", recorded)
    round_job.round_job(first, tmp_path / first["id"] / "run")
    texts, memory = (
        round_job.open_texts_of(first["options"]),
        load_file(tmp_path / first["id"] / "run" / "memory.safetensors"),
    )
    ended = load_task_model(tmp_path / first["id"] / "run").model
    found = outputs_of(ended, "words", texts.encoded(memory["rows"]), np.arange(8), "fp32").logits
    np.testing.assert_allclose(memory["logits"], found, rtol=1e-5, atol=1e-6)  # those of the end of the round
    for name in ("SingleTaskStream", "NewRows"):
        monkeypatch.setattr(round_job, name, stream)
    with pytest.raises(Killed):
        round_job.round_job(second, tmp_path / second["id"] / "run")
    assert seeds == [0 if method == "anew" else round_seed(0, 2)]
    after = ended.state_dict()
    assert not any(torch.equal(after[name], value) for name, value in starts[0].items() if value.ndim == 2)
    expected = starts[0] if method == "anew" else after
    assert all(torch.equal(expected[name], value) for name, value in starts[1].items())


def test_more_rounds_continue(study, content, tmp_path, capsys) -> None:
    """From the newest model; with a model that is gone, its rounds run again, and end as before. A round that failed
    runs again, and those that follow it."""
    out = tmp_path / "out"
    shutil.copytree(study, out)
    flags = ("--out", str(out))
    one = {"learners": LEARNERS[1:], "seeds": [1]}
    mark_as_failed(out, chain(read_rows(out), "sds2 margin", 1)[2]["id"])
    assert main(["active", write(tmp_path, content, rounds=[8, 16, 24, 32], **one), *flags]) == 0
    assert "5 jobs: 1 learner, 1 chain of 4 rounds from 8 to 32 labels, pool of 40 texts" in capsys.readouterr().err
    assert all(row["status"] == "done" for row in read_rows(out))
    assert [row["labels"] for row in chain(read_rows(out), "sds2 margin", 1)] == [8, 16, 24, 32]
    before = {row["id"]: row for row in read_rows(out)}
    assert main(["active", write(tmp_path, content, rounds=[8, 16, 20], **one), *flags]) == 0
    assert "the models of 2 finished rounds, from which others continue, were removed" in capsys.readouterr().err
    after = {row["id"]: row for row in read_rows(out)}
    assert len(after) == len(before) + 2
    for key, row in before.items():
        first, again = without_times([row, after[key]])
        assert {k: v for k, v in first.items() if k not in TIMES} == {k: v for k, v in again.items() if k not in TIMES}


def mark_as_failed(out: Path, job: str) -> None:
    """Changes the row of a job to that of a failure, and removes its run."""
    failure = {"status": "failed", "reason": "as asked", "fix": "", "log": []}
    rows = [row | failure if row["id"] == job else row for row in read_rows(out)]
    lines = [json.dumps({key: value for key, value in row.items() if key != "seal"}) + "\n" for row in rows]
    (out / "results.jsonl").write_text("".join(lines))
    shutil.rmtree(out / "jobs" / job / "run")


def test_changes_since_the_planning_are_noticed(planned, tmp_path) -> None:
    for name in ("model", "tokenizer", "data"):
        job = planned[0] | {"identity": planned[0]["identity"] | {name: "another"}}
        outcome = round_job.round_job(job, tmp_path / "jobs" / job["id"] / "run")
        assert outcome["status"] == "failed" and outcome["reason"].startswith(f"the {name} changed after the study")


@pytest.fixture
def people(content, words, tmp_path, monkeypatch):
    """A study without pool and queries, and a function that writes labels: number of the round, first row."""
    monkeypatch.chdir(tmp_path)
    train = [json.loads(line) for line in (Path(words).parent / "train.jsonl").read_text().splitlines()]
    texts = list({row["text"]: row for row in train}.values())
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in texts[:8]))
    shutil.copy(Path(words).parent / "dev.jsonl", tmp_path)
    (tmp_path / "mine.yaml").write_text("{train: train.jsonl, dev: dev.jsonl, labels: 'bad,good'}")
    (tmp_path / "rounds").mkdir()

    def label(name: str, first: int, **cells) -> None:
        rows = [{**row, "score": 0.5, "reason": "margin", **cells} for row in texts[first : first + 6]]
        (tmp_path / "rounds" / name).write_text("".join(json.dumps(row) + "\n" for row in rows))

    label("round-2.jsonl", 8)
    learners = [{"method": "sd"}]
    return write(tmp_path, content, task="mine.yaml", pool=None, rounds=None, learners=learners, seeds=1), label


def test_labels_of_people(people, tmp_path, capsys) -> None:
    """The training split, then each file in the order of the numbers; a further file continues."""
    path, label = people
    flags = ("--rounds-from", "rounds", "--out", "out")
    assert main(["active", path, *flags]) == 0
    shown = capsys.readouterr()
    assert "3 jobs: 1 learner, 1 chain of 2 rounds from 8 to 14 labels" in shown.err
    label("round-10.jsonl", 14)
    assert main(["active", path, *flags]) == 0
    shown = capsys.readouterr()
    assert "1 chain of 3 rounds from 8 to 20 labels; 2 done before" in shown.err
    rounds = chain(read_rows(tmp_path / "out"), "sd")
    assert [row["labels"] for row in rounds] == [8, 14, 20]
    folder = Path(rounds[-1]["folder"]) / "run"
    assert f"sd, seed 0: {folder}" in shown.out
    assert [row["text"] for row in selected(rounds[2])] == [
        json.loads(line)["text"] for line in (tmp_path / "rounds" / "round-10.jsonl").read_text().splitlines()
    ]
    assert main(["predict", "--model", str(folder), "--source", "dev.jsonl", "--out", "p.jsonl"]) == 0
    (final,) = [row for row in read_rows(tmp_path / "out") if row["kind"] == "final" and row["labels"] == 20]
    assert (Path(final["folder"]) / "run" / "model").is_dir() and final["cost"]["gradients"] == 40


def test_rounds_of_people_that_are_refused(people, content, words, tmp_path, capsys) -> None:
    path, label = people

    def error(path: str, *flags: str) -> str:
        assert main(["active", path, "--out", "out", *(flags or ("--rounds-from", "rounds"))]) == 2
        assert not (tmp_path / "out").exists()
        return capsys.readouterr().err

    assert "leave out pool, rounds, the query of anew random, the query of sds2" in error(
        write(tmp_path / "a", content)
    )
    assert "rounds is missing" in error(path, "--workers", "1")
    label("round-3.jsonl", 12)
    assert "round-3.jsonl, line 1 repeats the text of rounds/round-2.jsonl, line 5" in error(path).replace(
        f"{tmp_path}/", ""
    )
    label("round-3.jsonl", 14, label="")
    assert "round-3.jsonl, line 1 has no label" in error(path)
    label("round-3.jsonl", 14, label="god")
    assert "unknown label 'god'; did you mean 'good'?" in error(path)
    label("round-03.jsonl", 14)
    assert "have the same number" in error(path)
    (tmp_path / "rounds" / "round-3.jsonl").rename(tmp_path / "rounds" / "more.jsonl")
    assert "more.jsonl has no number in its name" in error(path)
    shutil.rmtree(tmp_path / "rounds")
    assert "rounds does not exist" in error(path)
    (tmp_path / "rounds").mkdir()
    assert "rounds holds no files of rounds" in error(path)


REFUSED = {
    "no-learner": ({"learners": []}, "learners must be a list, found []"),
    "empty-pool": ({"pool": 0}, "pool must be the number of texts to choose from, 1 or more, found 0"),
    "large-pool": ({"pool": 5000}, "pool is 5,000, but the training split of words has 62 different texts"),
    "rounds-over-pool": ({"pool": 20}, "the last round has 24 labels, but the pool only 20 texts"),
    "rounds-over-all": ({"pool": None, "rounds": [90]}, "the last round has 90 labels, but the pool only 62 different"),
    "descending": ({"rounds": [8, 8]}, "rounds must be ascending numbers, found [8, 8]"),
    "zero": ({"rounds": [0, 8]}, "rounds: each must be at least 1, not 0"),
    "huge": ({"pool": None, "rounds": [8, 10**10]}, "rounds: each must be at most 2,147,483,647, not 1"),
    "name": ({"learners": [LEARNERS[0] | {"name": "a\nb"}]}, "name contains a line break"),
    "method": ({"learners": [{"method": "sd3", "query": "random"}]}, "unknown method 'sd3'; did you mean 'sd'?"),
    "query": ({"learners": [{"method": "sd", "query": "mergin"}]}, "unknown query 'mergin'; did you mean 'margin'?"),
    "no-query": ({"learners": [{"method": "sd"}]}, "sd has no query; give one of random, entropy"),
    "no-method": ({"learners": [{"query": "random"}]}, "has no method; give one of anew, warm, er"),
    "no-memory": (
        {"learners": [{"method": "warm", "query": "random", "replay": 4}]},
        "warm random: the method warm has no replay memory; leave replay out",
    ),
    "no-effect": (
        {"learners": [{"method": "sd", "query": "random", "beta": 0.4}]},
        "beta has no effect with the method sd, which uses replay, alpha; leave it out",
    ),
    "alpha": (
        {"learners": [{"method": "sd", "query": "random", "alpha": 2.0}]},
        "alpha must be at most 1 for sd, not 2",
    ),
    "replay": ({"learners": [{"method": "er", "query": "random", "replay": 0}]}, "replay must be at least 1, not 0"),
    "twice": ({"learners": [LEARNERS[0], LEARNERS[0]]}, "'anew random' occurs twice; give one of them another name"),
    "seeds": ({"finetune": {"seeds": 3}}, "seeds cannot be given here, where each round is a training"),
    "rate": ({"learning_rate": 1e-3}, "unknown option 'learning_rate'; put it under finetune"),
    "warmup": (
        {"finetune": TRAINING | {"schedule": {"warmup": 3.0}}},
        "a round that trains on 8 examples: a warm-up of 3",
    ),
}


@pytest.mark.parametrize(("changes", "message"), REFUSED.values(), ids=REFUSED)
def test_studies_that_are_refused(content, tmp_path, capsys, changes, message) -> None:
    assert main(["active", write(tmp_path, content, **changes), "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert message.replace("'anew random'", "anew random") in error
    assert not (tmp_path / "out").exists()


def test_kinds_that_are_refused(content, tmp_path, capsys) -> None:
    """A kind without probabilities has random and k-centre; SD needs classes; words are not labelled one by one."""
    make_task(tmp_path, "numbers", train=20, dev=9)
    task = tmp_path / "numbers.yaml"
    task.write_text("{train: train.jsonl, dev: dev.jsonl, kind: number}")

    def error(task: Path, method: str, query: str) -> str:
        learners, own = [{"method": method, "query": query}], {"task": str(task), "pool": None, "rounds": [4, 8]}
        assert main(["active", write(tmp_path, content, learners=learners, **own), "--out", str(tmp_path / "out")]) == 2
        return capsys.readouterr().err

    for query in ("entropy", "margin", "facility-location"):
        assert f"the query {query} needs probabilities, and numbers, of kind number, has no scores" in error(
            task, "anew", query
        )
    assert "the method sd needs classes, and numbers predicts numbers" in error(task, "sd", "k-centre")
    (tmp_path / "t.conll").write_text("good NN\nbad JJ\n\ngood JJ\n\n")
    words = tmp_path / "tags.yaml"
    words.write_text("{train: t.conll, dev: t.conll, kind: tokens}")
    assert "is for tasks with a label for each text, and tags labels words" in error(words, "anew", "random")
    rows = [json.loads(line) | {"w": 2} for line in (tmp_path / "train.jsonl").read_text().splitlines()]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    task.write_text("{train: train.jsonl, dev: dev.jsonl, kind: number, weight: w}")
    assert "has soft labels or weights" in error(task, "anew", "random")
