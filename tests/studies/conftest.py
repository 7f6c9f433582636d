"""A sweep of seconds: two random tiny encoders on a task of their own, two seeds."""

import json
import math
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from fastbert.cli import main
from fastbert.studies.ablate import costs
from fastbert.studies.ablate.ablation_plan import plan_ablation
from fastbert.studies.ablate.options import load_ablation
from fastbert.studies.engine.jobs import Job
from fastbert.studies.pipelines.graph import Graph
from fastbert.studies.pipelines.load import load_pipeline
from fastbert.studies.pipelines.options import RunOptions
from tests.finetuning.conftest import make_task, tiny_model

CPU = {"device": "cpu", "precision": "fp32"}
SMALL = {"vocab_size": 600, "layers": 1, "width": 16, "heads": 2, "length": 16, "batch_size": 8, "eval_sequences": 8}
VARIANTS = {"absolute": None, "tupe-r": {"position": "tupe-r"}, "electra": {"objective": "electra"}}
FINETUNE = {"machine": CPU, "worst": 3}
NETWORK = {"layers": 1, "width": 16, "heads": 1, "ffn": 32, "length": 16, "batch_size": 4, "eval_sequences": 4}


def time_steps(monkeypatch: pytest.MonkeyPatch, seconds: Callable[..., float]) -> None:
    """Steps of an ablation's variants are not timed: they take `seconds`, a function of what `timed_round` is given."""
    monkeypatch.setattr(costs, "timed_round", seconds)


@pytest.fixture(scope="module", autouse=True)
def fast_workers(forked_workers) -> None:
    """Studies are fast to start."""


@pytest.fixture(scope="session")
def models(tmp_path_factory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("models")
    sizes = {"narrow": {"width": 16, "ffn": 32}, "tupe": {"position": "tupe-r", "norm": "pre", "type_vocab_size": 0}}
    return {name: str(tiny_model(folder / name, **choices)) for name, choices in sizes.items()}


@pytest.fixture(scope="session")
def words(tmp_path_factory) -> str:
    """The YAML file of a task."""
    folder = tmp_path_factory.mktemp("words")
    make_task(folder, "words", train=64, dev=40)
    path = folder / "words.yaml"
    path.write_text("train: train.jsonl\ndev: dev.jsonl\nslices: [{name: short, max_words: 7}]\n")
    return str(path)


@pytest.fixture(scope="session")
def axes(models: dict[str, str], words: str) -> dict:
    """What a sweep's YAML file holds."""
    return {
        "models": [{"name": name, "path": path} for name, path in models.items()],
        "tasks": [words],
        "learning_rates": [3e-3],
        "batch_sizes": [16],
        "epochs": [2],
        "seeds": 2,
        "finetune": FINETUNE,
    }


@pytest.fixture(scope="session")
def finished(axes: dict, tmp_path_factory) -> Path:
    """The folder of the sweep of `axes`, run by one worker to its end."""
    folder = tmp_path_factory.mktemp("finished")
    assert main(["sweep", write_sweep(folder, axes), "--out", str(folder / "out")]) == 0
    return folder / "out"


def write_pairs(folder: Path) -> str:
    """A folder of minimal pairs: two paradigms of one phenomenon and one of another, two pairs each."""
    sentences = {
        ("agreement", "noun"): [("the good was in it", "the good had in it"), ("she was not bad", "she had not bad")],
        ("agreement", "verb"): [("he had this", "he this had"), ("that was on it", "that it on was")],
        ("islands", "adjunct"): [("it was bad and good", "it bad was and good"), ("of the good", "the of good")],
    }
    folder.mkdir(exist_ok=True)
    for (phenomenon, paradigm), pairs in sentences.items():
        rows = [{"sentence_good": good, "sentence_bad": bad, "linguistics_term": phenomenon} for good, bad in pairs]
        (folder / f"{paradigm}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(folder)


def toy_job(name: str, **fields) -> Job:
    """A job of `write_toy_runner`."""
    plain = {"model": "m", "task": "t", "seed": 0, "setting": {}, "identity": {}, "options": {}, "cost": 1.0}
    return Job(**{"id": name, "folder": os.getcwd(), "runner": "toy_runner:run", "kind": "toy", **plain, **fields})


def write_toy_runner(folder: Path, monkeypatch) -> None:
    """A module with a runner whose results are the environment it sees and the runs of the jobs around it. It fails,
    waits until another job runs, or kills itself in its first attempts, where the options ask for it."""
    (folder / "toy_runner.py").write_text(TOY_RUNNER)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")]))


TOY_RUNNER = """
import os
import signal
import time
from fastbert.errors import UserError

def run(job, out):
    out.mkdir(exist_ok=True)
    (out / "process").write_text(str(os.getpid()))
    with open(out / "attempts", "a+") as file:
        file.write("attempt\\n")
        file.seek(0)
        attempts = len(file.readlines())
    if attempts <= job["options"].get("kills", 0):
        os.kill(os.getpid(), signal.SIGKILL)
    if job["options"].get("fails"):
        raise UserError("as asked")
    while "with" in job["options"] and not (out.parents[1] / job["options"]["with"] / "run").exists():
        time.sleep(0.01)
    before = sorted(path.parent.name for path in out.parents[1].glob("*/run"))
    names = ("CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS")
    seen = {name: os.environ.get(name) for name in names}
    seen |= {"attempts": attempts, "cores": sorted(os.sched_getaffinity(0))}
    return {"status": "done", "precision": "fp32", "result": {"before": before, **seen}}
"""


@pytest.fixture
def planned(prepared, tmp_path, monkeypatch):
    """Changes of the YAML file -> its ablation and plan. Steps are not timed: test_ablate.py does."""
    (tmp_path / "out").mkdir()
    time_steps(monkeypatch, lambda *given: 0.1)

    def make(known=None, **changes):
        base = {"data": str(prepared), "position": "absolute", **SMALL, **changes.pop("base", {})}
        values = {"base": base, "variants": VARIANTS, "budget": {"steps": 40}} | changes
        path = tmp_path / "x.yaml"
        path.write_text(yaml.safe_dump(values, sort_keys=False))
        ablation, _ = load_ablation(path)
        return ablation, plan_ablation(ablation, None, tmp_path / "out", known or {})

    return make


def losses(study, decay: dict[str, float], gap: float = 0.0) -> dict[str, dict]:
    """Rows as if every training's loss had been 1 + gap + 4 exp(-steps / (40 decay)), a little more with every seed."""
    rows = {}
    for job in study.jobs:
        slow = decay[job.model]
        ends = [point for point in study.points[job.model] if point.job == job.id]
        validations = [
            {
                "step": point.steps,
                "loss": 1 + gap + 4 * math.exp(-point.steps / (40 * slow)) + 1e-7 * slow * job.seed**2,
            }
            for point in ends
        ]
        rows[job.id] = {"id": job.id, "kind": job.kind, "status": "done", "model": job.model, "task": job.task}
        rows[job.id] |= {"seed": job.seed, "validations": validations, "precision": "fp32", "seconds": 1.0}
        rows[job.id] |= {"folder": "", "steps": 40}
    return rows


def write_sweep(folder: Path, axes: dict, **changes) -> str:
    path = folder / "sweep.yaml"
    path.write_text(yaml.safe_dump({key: value for key, value in (axes | changes).items() if value is not None}))
    return str(path)


def read_rows(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]


def without_times(rows: list[dict]) -> list[dict]:
    """Rows without what depends on the clock and on the folder."""
    times = ("seconds", "examples_per_second", "folder", "seal")
    return [{key: value for key, value in row.items() if key not in times} for row in rows]


def workers_of(pid: int) -> list[int]:
    """The processes in which a sweep's process runs its jobs."""
    found = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [int(child) for child in found if b"\0-m\0fastbert.studies.engine.worker" in command_of(int(child))]


def command_of(pid: int) -> bytes:
    """Its command line; empty for a process that is gone, or a zombie."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except (FileNotFoundError, ProcessLookupError):
        return b""


@pytest.fixture(scope="session")
def pipeline_inputs(tmp_path_factory, corpus) -> Path:
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


@pytest.fixture(scope="session")
def pipeline(pipeline_inputs: Path) -> dict:
    """A pipeline with every kind of job."""
    small = {**NETWORK, "schedule": {"name": "wsd", "decay": 0.25, "warmup": 1}, "machine": CPU, "steps": 4}
    base = {"name": "base", "data": "text", "position": "absolute", "milestones": "2", **small}
    return {
        "data": {
            "text": {
                "source": str(pipeline_inputs / "text.txt"),
                "vocab_size": 300,
                "validation_fraction": 0.3,
                "workers": 1,
            },
            "other": {"source": str(pipeline_inputs / "other.txt"), "tokenizer": "text", "validation_fraction": 0.3},
        },
        "models": [
            base,
            {"name": "moved", "like": "base", "data": "other", "after": "base", "replay": {"data": "text"}},
            {"name": "short", "branch": "base@2", "anneal": 0.5},
        ],
        "finetune": {"max_length": 16, "machine": CPU, "worst": 2},
        "stages": [
            {"name": "first", "tasks": [str(pipeline_inputs / "mood.yaml")], "epochs": 1, "models": ["base"]},
            {
                **{"name": "second", "tasks": [str(pipeline_inputs / "tone.yaml")], "after": "first", "seeds": 2},
                **{"epochs": 1, "learning_rates": [1e-3, 3e-3], "models": ["base"]},
            },
            {
                **{"name": "joint", "tasks": [str(pipeline_inputs / f"{name}.yaml") for name in ("mood", "tone")]},
                **{"together": True, "epochs": 1, "models": ["short"]},
            },
        ],
        "evaluate": [
            {"pairs": str(pipeline_inputs / "pairs")},
            {"pll": str(pipeline_inputs / "other.txt"), "sentences": 3},
        ],
        "commands": [{"name": "list", "run": "ls {base} > {out}/files.txt"}],
    }


def write_pipeline(folder: Path, values: dict, **changes) -> str:
    folder.mkdir(exist_ok=True)
    path = folder / "study.yaml"
    values = {key: value for key, value in (values | changes).items() if value is not None}
    path.write_text(yaml.safe_dump(values, sort_keys=False))
    return str(path)


def graph_of(path: str, out: Path, **options) -> Graph:
    return Graph(load_pipeline(path)[0], RunOptions(**options), out)
