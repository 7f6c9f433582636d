"""A refused option leaves no folder behind, in any job: the working directory is as it was."""

from pathlib import Path

import pytest
import yaml

from tests.finetuning.conftest import WORDS, make_task, tiny_model
from tests.test_cli import refused

TEXT, MODEL, TASK, DATA = "{text}", "{model}", "{task}", "{data}"
PRETRAIN = ("pretrain", "--data", TEXT, "--layers", 1, "--width", 32, "--heads", 2, "--length", 32, "--vocab-size", 300)
STEPS = ("--steps", 10)
FINETUNE = ("finetune", "--model", MODEL, "--task", TASK, "--out", "results/x", "--seeds", 1)
PREPARE = ("prepare", "--source", TEXT, "--out", "prepared/x", "--vocab-size", 300)
CASES = {
    "pretrain without a budget": PRETRAIN,
    "two budgets": (*PRETRAIN, *STEPS, "--tokens", 5000),
    "warm-up longer than the run": (*PRETRAIN, *STEPS, "--schedule.warmup", 11),
    "warm-up longer than the tokens": (*PRETRAIN, "--tokens", 5000, "--batch-size", 8, "--schedule.warmup", 100),
    "warm-up and decay": (*PRETRAIN, *STEPS, "--schedule.name", "wsd", "--schedule.warmup", 0.9),
    "milestone beyond the tokens": (*PRETRAIN, "--tokens", 5000, "--batch-size", 8, "--milestones", 90),
    "words beyond the run": ("pretrain", "--data", DATA, *PRETRAIN[3:11], *STEPS, "--checkpoint-words", "1M"),
    "batch growing for longer than the run": (*PRETRAIN, *STEPS, "--initial-batch-size", 64, "--batch-warmup", 20),
    "heads": (*PRETRAIN, *STEPS, "--heads", 5),
    "dropout": (*PRETRAIN, *STEPS, "--dropout", 1.5),
    "attention dropout": (*PRETRAIN, *STEPS, "--attention-dropout", "nan"),
    "initial weights": (*PRETRAIN, *STEPS, "--initializer-std", -1),
    "token types": (*PRETRAIN, *STEPS, "--type-vocab-size", -1),
    "length of one": (*PRETRAIN[:9], *PRETRAIN[11:], *STEPS, "--length", 1),
    "positions": (*PRETRAIN, *STEPS, "--max-positions", 8),
    "seed": (*PRETRAIN, *STEPS, "--seed", -1),
    "learning rate": (*PRETRAIN, *STEPS, "--optimizer.learning-rate", "inf"),
    "weight of an objective": (*PRETRAIN, *STEPS, "--objective", "electra", "--electra.loss-weight", "inf"),
    "odd controller with rope": (
        *(*PRETRAIN, *STEPS, "--objective", "multiple-choice", "--position", "rope"),
        *("--multiple-choice.controller-width", 7),
    ),
    "notes": (*PRETRAIN, *STEPS, "--notes.enabled", "--notes.min-count", 9, "--notes.max-count", 3),
    "too small a vocabulary": (*PRETRAIN[:11], "--vocab-size", 20, *STEPS),
    "no such tokenizer": (*PRETRAIN, *STEPS, "--tokenizer", "none"),
    "no such model": (*PRETRAIN, *STEPS, "--init-from", "none"),
    "another shape than the model's": ("pretrain", "--data", TEXT, *STEPS, "--init-from", MODEL, "--heads", 8),
    "out below a file": (*PRETRAIN, *STEPS, "--out", TEXT + "/run"),
    "out with too long a name": (*PRETRAIN, *STEPS, "--out", "runs/" + "x" * 300),
    "a single document": ("pretrain", "--data", "{single}", *PRETRAIN[3:], *STEPS),
    "dry run": (*PRETRAIN, *STEPS, "--dry-run", "--schedule.warmup", 11),
    "less data than a batch": ("pretrain", "--data", DATA, *PRETRAIN[3:11], *STEPS, "--batch-size", 100000),
    "prepare's fraction": (*PREPARE, "--validation-fraction", 2),
    "prepare's seed": (*PREPARE, "--seed", -1),
    "prepare's vocabulary": ("prepare", "--source", TEXT, "--out", "prepared/x", "--vocab-size", 20),
    "prepare's weights": ("prepare", "--source", TEXT, "--out", "prepared/x", "--weights", "0.7,0.3"),
    "prepare's text": ("prepare", "--source", "{single}", "--out", "prepared/x", "--vocab-size", 300),
    "fine-tuning with dropout": (*FINETUNE, "--dropout", 1.5),
    "fine-tuning with attention dropout": (*FINETUNE, "--attention-dropout", -0.1),
    "fine-tuning's warm-up": (*FINETUNE, "--schedule.warmup", 100000),
    "fine-tuning's length": (*FINETUNE, "--max-length", 100000),
    "fine-tuning's fractions": (*FINETUNE, "--train-fraction", "0.5,2"),
    "fine-tuning's rate": (*FINETUNE, "--learning-rate", "nan"),
    "fine-tuning's weight decay": (*FINETUNE, "--weight-decay", "inf"),
    "fine-tuning's device": (*FINETUNE, "--machine.device", "cuda:99"),
    "several tasks, one of them wrong": ("finetune", "--model", MODEL, "--task", TASK + ",none.yaml", "--out", "x"),
    "affinity with a wrong task": ("affinity", "--model", MODEL, "--tasks", TASK + ",none.yaml", "--out", "x"),
    "audit with too many folds": ("audit", "--model", MODEL, "--task", TASK, "--folds", 99, "--out", "x/y"),
    "sweep": ("sweep", "{sweep}"),
    "sweep with a wrong option": ("sweep", "{sweep-dropout}"),
    "ablation": ("ablate", "{ablation}"),
    "ablation of unprepared text, heads": ("ablate", "{ablation-heads}"),
    "ablation of unprepared text, warm-up": ("ablate", "{ablation-warmup}"),
    "active learning with too many rounds": ("active", "{active}"),
    "export": ("export", "none", "--out", "exported/x"),
    "predict": ("predict", "--model", MODEL, "--source", TEXT, "--out", "predicted/x.jsonl"),
    "submit": ("submit", "--results", "none", "--out", "submitted/glue.zip"),
    "weak labels": ("weak-label", "--task", TASK, "--functions", "none.yaml", "--out", "labelled/x"),
    "selection": ("select", "--task", TASK, "--pool", "{single}", "--count", 1, "--out", "selected/x.jsonl"),
    "throughput": ("bench", "throughput", "--data", "none", "--out", "measured/x"),
    "bench of data": ("bench", "data", "--data", "none", "--out", "measured/x"),
}


@pytest.fixture(scope="module")
def given(corpus: Path, prepared: Path, tmp_path_factory) -> dict[str, str]:
    """What stands for the {names} in `CASES`."""
    folder = tmp_path_factory.mktemp("given")
    (folder / "single.txt").write_text(" ".join(WORDS) * 100)
    make_task(folder, "words", train=16, dev=8)
    (folder / "words.yaml").write_text("train: train.jsonl\ndev: dev.jsonl\n")
    found = {
        "text": str(corpus),
        "data": str(prepared),
        "single": str(folder / "single.txt"),
        "model": str(tiny_model(folder)),
        "task": str(folder / "words.yaml"),
    }
    sweep = {"models": [found["model"]], "tasks": [found["task"]], "finetune": {"max_length": 10**6}}
    base = {"data": found["data"], "layers": 1, "width": 32, "heads": 2, "length": 32, "batch_size": 10**6}
    files = {
        "sweep": sweep,
        "sweep-dropout": sweep | {"finetune": {"dropout": 1.5}},
        "ablation": {"base": base, "variants": {"a": {}, "b": {"seed": 1}}, "budget": {"steps": 3}},
    }
    files["active"] = {"model": found["model"], "task": found["task"], "rounds": [8, 80]}
    files["active"]["learners"] = [{"method": "anew", "query": "random"}]
    text = {"base": base | {"data": found["text"], "batch_size": 8}, "budget": {"steps": 3}}
    files["ablation-heads"] = text | {"variants": {"a": {}, "b": {"heads": 5}}}
    files["ablation-warmup"] = text | {"variants": {"a": {}, "b": {"schedule": {"warmup": 9}}}}
    for name, content in files.items():
        found[name] = str(folder / f"{name}.yaml")
        Path(found[name]).write_text(yaml.safe_dump(content))
    return found


@pytest.mark.parametrize("case", CASES)
def test_nothing_is_left_of_a_refused_call(case: str, given, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    words = [str(word) for word in CASES[case]]
    for name, value in given.items():
        words = [word.replace(f"{{{name}}}", value) for word in words]
    message = refused(capsys, *words)
    assert message.strip()
    assert sorted(tmp_path.rglob("*")) == []
