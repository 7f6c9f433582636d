"""Several tasks with one encoder: the mixture of their batches, what each leaves, and stages."""

import json
import random
import re
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from fastbert.data.tokenizer import WordPiece
from fastbert.errors import UserError
from fastbert.finetuning import job_folder, task_epochs
from fastbert.finetuning.batches import encode
from fastbert.finetuning.folder import check_other_files, write_options
from fastbert.finetuning.kinds.classes import Classes
from fastbert.finetuning.loop import Tuner
from fastbert.finetuning.mixture import MixedStream
from fastbert.finetuning.mixture_options import MixtureOptions
from fastbert.finetuning.model import new_task_model
from fastbert.finetuning.options import FinetuneOptions
from fastbert.finetuning.rows import Example
from fastbert.finetuning.saved import load_encoder, load_task_model
from fastbert.finetuning.seed import Epochs
from fastbert.finetuning.stream import SingleTaskStream
from fastbert.finetuning.tasks_folder import check_tasks_folder
from fastbert.finetuning.together import prepare_together
from fastbert.finetuning.weak.weak_label import check_earlier
from fastbert.flags import parse
from fastbert.pretraining.run import new_folder
from fastbert.randomness import permute
from fastbert.training.world import ONE_PROCESS
from tests.finetuning.conftest import FAST, FILLERS, WORDS, finetune, make_glue, make_task, results, write_rows
from tests.finetuning.test_resume import Killed, bytes_of, killed
from tests.finetuning.test_tokens import make_sentences
from tests.finetuning.tune_ranks import command
from tests.flags import last_given, main
from tests.ranks import output_of, run_ranks

EXACT = ("--machine.precision", "fp32")
SHORT = ("--epochs", "2", "--log-every", "1", "--symmetric", "--worst", "3")


def written(folder: Path, name: str, flags: list[str]) -> str:
    """The YAML file of a task with these flags."""
    lines, names = [f"name: {name}"], iter(flags[2:])
    for flag in names:
        key = flag.removeprefix("--custom.")
        lines.append(f"{key}: {'true' if key == 'symmetric' else next(names)}")
    (folder / f"{name}-task.yaml").write_text("\n".join(lines) + "\n")
    return str(folder / f"{name}-task.yaml")


@pytest.fixture(scope="module")
def tasks(tmp_path_factory) -> dict[str, str]:
    """YAML files of tasks of 5, 3, 2 and 3 batches: pairs, words, numbers and tags."""
    folder, made = tmp_path_factory.mktemp("tasks"), {}
    for kind, train in (("pairs", 76), ("words", 40), ("numbers", 20)):
        (folder / kind).mkdir()
        made[kind] = written(folder, kind, make_task(folder / kind, kind, train=train, dev=16))
    flags = ["--task", "tagging", "--custom.kind", "tokens"]
    for split, count in (("train", 40), ("dev", 12)):
        (folder / f"{split}.conll").write_text(make_sentences(random.Random(split), count, 20))
        flags += [f"--custom.{split}", str(folder / f"{split}.conll")]
    made["tagging"] = written(folder, "tagging", flags)
    return made


def together(bert: Path, tasks: dict[str, str], names: str, out: Path, *more: str) -> int:
    files = ",".join(tasks[name] for name in names.split())
    return finetune(bert, ["--task", files, "--together"], out, *SHORT, *more)


@pytest.fixture(scope="module")
def mixed(bert, tasks, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("mixed") / "out"
    assert together(bert, tasks, "words tagging pairs numbers", out) == 0
    return out


# --- the mixture


def stream(name: str, examples: int, seed: int = 5) -> SingleTaskStream:
    kind = Classes(("a", "b"))
    rows = [Example(n, " ".join(FILLERS[: 1 + n % 7]), None, n % 2) for n in range(examples)]
    return SingleTaskStream(name, [encode(rows, WordPiece(WORDS), 30, kind.targets)], 4, seed)


def test_an_epoch_has_every_batch_of_every_task_once() -> None:
    sizes = {"b": 50, "a": 21, "c": 4}
    parts = {name: stream(name, count) for name, count in sizes.items()}
    weights = {"a": 1.0, "b": 2.0, "c": 0.5}
    mixture = MixedStream(parts, weights, 1.0, 5)
    other = MixedStream(dict(reversed(parts.items())), weights, 1.0, 5)
    assert mixture.batches == 13 + 6 + 1
    orders = []
    for epoch in (1, 0):
        batches = [mixture.at(epoch, index) for index in range(mixture.batches)]
        for name, part in parts.items():
            mine = [batch for batch in batches if batch.head == name]
            expected = [part.at(epoch, index) for index in range(part.batches)]
            assert [batch.rows.tolist() for batch in mine] == [batch.rows.tolist() for batch in expected]
            assert {batch.weight for batch in mine} == {weights[name]}
        orders.append([batch.head for batch in batches])
        index = 7  # in another order of calls, and of tasks
        assert (other.at(epoch, index).head, *other.at(epoch, index).rows) == (orders[-1][index], *batches[index].rows)
    assert orders[0] != orders[1] and orders[0] != sorted(orders[0])


def test_the_order_of_the_tasks_is_not_that_of_the_batches_in_a_task() -> None:
    parts = {"a": stream("a", 20), "b": stream("b", 20)}  # 5 batches each
    order = MixedStream(parts, {"a": 1.0, "b": 1.0}, 1.0, 5).tasks(0)
    assert (order != np.repeat([0, 1], 5)[permute(np.arange(10), 10, 5, 0)]).any()


def test_a_temperature_samples_small_tasks_more_often() -> None:
    sizes = {"large": 3600, "small": 36}  # 900 and 9 batches
    for temperature in (2.0, 5.0):
        parts = {name: stream(name, count) for name, count in sizes.items()}
        mixture = MixedStream(parts, dict.fromkeys(parts, 1.0), temperature, 5)
        sampled = np.concatenate([mixture.tasks(epoch) for epoch in range(20)])
        expected = 9 ** (1 / temperature) / (9 ** (1 / temperature) + 900 ** (1 / temperature))
        deviation = (expected * (1 - expected) / len(sampled)) ** 0.5
        assert abs(sampled.mean() - expected) < 4 * deviation and len(sampled) == 20 * 909
    # The batches of the small task come in the order of its own epochs, over the epochs of the mixture.
    seen = [mixture.at(epoch, index) for epoch in range(2) for index in range(909)]
    small = [batch.rows.tolist() for batch in seen if batch.head == "small"]
    own = stream("small", 36)
    assert len(small) > 9 and small == [own.at(*divmod(number, 9)).rows.tolist() for number in range(len(small))]


def test_the_target_has_no_best_epoch_where_another_task_is_not_finite() -> None:
    """Each task's model is of the target's best epoch, and one that is not finite cannot be saved."""
    found, best = {"a": [True, True], "b": [None, False]}, []

    class Scored:
        def __init__(self, name: str) -> None:
            self.name = name

        def measure(self, tuner: Tuner, finite: bool) -> bool | None:
            return found[self.name].pop(0)

        def keep(self) -> None:
            best.append(self.name)

    module = torch.nn.Linear(1, 1)
    tuner = SimpleNamespace(updater=SimpleNamespace(module=module))
    epochs = Epochs([Scored("a"), Scored("b")], tuner, None, ONE_PROCESS, target="a")
    epochs.measure()
    assert best == []
    epochs.measure()
    assert best == ["a", "b"]


# --- trainings


def test_each_task_leaves_what_it_leaves_alone(bert, tasks, mixed, capsys) -> None:
    """Folders that the other jobs read, with the metrics of this task; predictions of the saved models have the
    reported metrics."""
    assert sorted(path.name for path in mixed.iterdir()) == [
        *(".lock", "config.yaml", "glue.md", "numbers", "pairs", "seed-0", "tagging", "words")
    ]
    assert not (mixed / "seed-0" / "checkpoints").exists()
    shared = [json.loads(line) for line in (mixed / "seed-0" / "metrics.jsonl").read_text().splitlines()]
    assert len([row for row in shared if row["split"] == "train"]) == 2 * (5 + 3 + 2 + 3)
    for name, file in tasks.items():
        (seed,) = results(mixed / name)["fractions"][0]["seeds"]
        rows = [json.loads(line) for line in (mixed / name / "seed-0" / "metrics.jsonl").read_text().splitlines()]
        assert [row["epoch"] for row in rows if row["split"] == "dev"] == [1, 2]
        assert len(rows) == 2 + 2 * 13 and (mixed / name / "seed-0" / "errors.jsonl").is_file()
        capsys.readouterr()
        assert main(["predict", "--model", str(mixed / name), "--task", file, "--out", "-", *EXACT]) == 0
        metric, value = results(mixed / name)["metrics"][0], seed["best"]["dev"]["dev"]
        assert f"{metric} {value[metric]:.4f}" in capsys.readouterr().err
        assert results(mixed / name)["together_with"] == sorted({*tasks} - {name})
        assert json.loads((mixed / name / "manifest.json").read_text())["job"] == "finetune"
        assert "trained together with" in (mixed / name / "report.html").read_text()
    assert "pairs" in (mixed / "glue.md").read_text()


def test_transformers_opens_each_model(mixed) -> None:
    from transformers import AutoModelForSequenceClassification, AutoModelForTokenClassification

    for name, opener, outputs in (
        ("pairs", AutoModelForSequenceClassification, 2),
        ("numbers", AutoModelForSequenceClassification, 1),
        ("tagging", AutoModelForTokenClassification, None),
    ):
        theirs = opener.from_pretrained(mixed / name / "seed-0" / "model").eval()
        ours = load_task_model(mixed / name / "seed-0")
        ids = torch.tensor([[2, 9, 8, 7, 3]])
        assert outputs in (None, theirs.config.num_labels)
        expected = ours.model.encoder(ids)
        torch.testing.assert_close(theirs.bert(ids).last_hidden_state, expected, rtol=1e-4, atol=1e-5)


def test_one_task_together_is_a_fine_tuning_to_the_bit(bert, tasks, tmp_path) -> None:
    assert finetune(bert, ["--task", tasks["pairs"]], tmp_path / "alone", *SHORT) == 0
    assert together(bert, tasks, "pairs", tmp_path / "one") == 0
    alone, one = (load_file(path / "seed-0" / "model" / "model.safetensors")
                  for path in (tmp_path / "alone", tmp_path / "one" / "pairs"))  # fmt: skip
    assert alone.keys() == one.keys() and all(torch.equal(alone[name], one[name]) for name in alone)
    assert bytes_of(tmp_path / "alone").keys() == bytes_of(tmp_path / "one" / "pairs").keys()
    scores = [(path / "seed-0" / "dev_scores.safetensors").read_bytes()
              for path in (tmp_path / "alone", tmp_path / "one" / "pairs")]  # fmt: skip
    assert scores[0] == scores[1]


def test_the_order_of_tasks_changes_nothing_and_weight_0_leaves_a_head_alone(
    bert, tasks, mixed, tmp_path, capsys
) -> None:
    assert together(bert, tasks, "pairs numbers words tagging", tmp_path / "order") == 0
    for name in tasks:
        assert bytes_of_task(tmp_path / "order" / name) == bytes_of_task(mixed / name)
    assert together(bert, tasks, "pairs numbers words", tmp_path / "w", "--weights", "numbers=0,pairs=2") == 0
    assert re.findall("(.*) has weight 0: it is not trained", capsys.readouterr().err) == ["numbers"]
    rows = (tmp_path / "w" / "seed-0" / "metrics.jsonl").read_text().splitlines()
    assert len([row for row in rows if json.loads(row)["split"] == "train"]) == 2 * (5 + 3)  # no steps of numbers
    kinds = {name: load_task_model(tmp_path / "w" / name / "seed-0").record.kind for name in ("numbers", "words")}
    settings = {"dropout": 0.1, "attention_dropout": 0.1, "kernels": "auto"}
    new = new_task_model(load_encoder(bert), kinds, 0, **settings)
    for name, trained in (("numbers", False), ("words", True)):
        head = load_task_model(tmp_path / "w" / name / "seed-0").model.head(name)
        changed = [not torch.equal(a, b) for a, b in zip(head.parameters(), new.head(name).parameters(), strict=True)]
        assert all(changed) if trained else not any(changed), name


def bytes_of_task(folder: Path) -> dict[str, bytes]:
    """As `bytes_of`, without the time stamps in the copied metrics."""
    return {name: content for name, content in bytes_of(folder).items() if name != "manifest.json"}


@pytest.mark.parametrize(
    ("owner", "name", "call"),
    [
        (Tuner, "train_step", 15),  # in the middle of epoch 2
        (task_epochs, "save_task_model", 2),  # after the checkpoint of epoch 1, between the models
        (task_epochs, "write_errors", 1),  # when all is trained, between the results of two tasks
    ],
)
def test_killed_and_continued_equals_uninterrupted(
    bert, tasks, mixed, tmp_path, monkeypatch, owner, name, call
) -> None:
    names, out = "words tagging pairs numbers", tmp_path / "out"
    with monkeypatch.context() as patch:
        killed(patch, owner, name, call)
        with pytest.raises(Killed):
            together(bert, tasks, names, out)
    assert together(bert, tasks, names, out) == 0
    for task in tasks:
        assert bytes_of_task(out / task) == bytes_of_task(mixed / task)


def test_two_processes_equal_one(bert, tasks, mixed, tmp_path) -> None:
    files = ",".join(tasks.values())
    flags = ["finetune", "--model", str(bert), "--task", files, "--together"]
    given = last_given([*flags, *FAST, *SHORT, "--out", str(tmp_path / "two")])
    assert run_ranks(command, 2, tmp_path / "ranks", *given) == [0, 0], output_of(tmp_path / "ranks")[-3000:]
    for name in tasks:
        models = [
            load_file(path / name / "seed-0" / "model" / "model.safetensors") for path in (tmp_path / "two", mixed)
        ]
        assert max((models[0][key] - models[1][key]).abs().max().item() for key in models[1]) < 1e-4


def test_the_target_chooses_the_epoch_and_is_trained_on_alone(bert, tasks, tmp_path, capsys) -> None:
    out = tmp_path / "out"
    more = ("--target", "numbers", "--then-single", "--epochs", "3", "--seeds", "2")
    assert together(bert, tasks, "pairs numbers", out, *more) == 0
    for seed in range(2):
        epochs = [results(out / name)["fractions"][0]["seeds"][seed]["best"]["epoch"] for name in ("pairs", "numbers")]
        assert epochs[0] == epochs[1]
    assert [path.name for path in (out / "then-single").iterdir()] == ["numbers"]
    single = out / "then-single" / "numbers"
    assert len(results(single)["fractions"][0]["seeds"]) == 2
    models = json.loads((single / "manifest.json").read_text())["science"]["model"]
    assert models["0"] != models["1"]
    printed, whose = capsys.readouterr().out, "dev at the best epoch of numbers"
    assert f"pairs together with numbers, {bert}: {whose}" in printed and "is that of numbers.\n" in printed
    assert f"numbers together with pairs, {bert}: dev at the best epoch, over" in printed
    assert f"numbers after numbers and pairs together, {bert}: dev at the best epoch, over" in printed
    assert results(out / "pairs")["target"] == "numbers" and results(single)["after"] == ["numbers and pairs together"]
    assert "Metrics on dev at the best epoch of numbers, " in (out / "pairs" / "report.html").read_text()
    assert f"| {bert}, tasks together " in (out / "glue.md").read_text()


def test_stages_start_from_the_stage_before(bert, tasks, tmp_path, capsys) -> None:
    """Each seed by itself: the second stage is `--init-from` the first one's seed."""
    out = tmp_path / "out"
    stages = ["--stages", f"{tasks['words']},{tasks['pairs']}"]
    assert finetune(bert, stages, out, *SHORT, "--seeds", "2") == 0
    assert sorted(path.name for path in out.iterdir()) == ["1-words", "2-pairs", "config.yaml"]
    again = ["finetune", "--init-from", str(out / "1-words" / "seed-1"), "--task", tasks["pairs"], *FAST, *SHORT]
    assert main(last_given([*again, "--first-seed", "1", "--out", str(tmp_path / "by-hand")])) == 0
    stage, by_hand = (load_file(path / "seed-1" / "model" / "model.safetensors")
                      for path in (out / "2-pairs", tmp_path / "by-hand"))  # fmt: skip
    assert all(torch.equal(stage[name], by_hand[name]) for name in by_hand)
    assert f"pairs after words, {bert}: dev" in capsys.readouterr().out and results(out / "2-pairs")["after"] == [
        "words"
    ]
    assert "</code>, trained after words." in (out / "2-pairs" / "report.html").read_text()
    (tmp_path / "no-train.yaml").write_text(f"dev: {tmp_path}/dev.jsonl\nlabels: a,b\n")
    write_rows(tmp_path / "dev.jsonl", [{"text": "a", "label": "a"}])
    assert finetune(bert, ["--stages", f"{tasks['words']},{tmp_path}/no-train.yaml"], tmp_path / "none") == 2
    assert f"train the others: --stages {tasks['words']}\n" in capsys.readouterr().err
    before = (out / "2-pairs" / "results.json").read_bytes()
    assert finetune(bert, stages, out, *SHORT, "--seeds", "2") == 0
    assert (out / "2-pairs" / "results.json").read_bytes() == before


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--together", "--target", "rte"], "--target names 'rte', which is not one of the tasks"),
        (["--together", "--target", "WORDS"], "did you mean 'words'?"),
        (["--together", "--weights", "words=1,cola=2"], "--weights names 'cola', which is not one of the tasks"),
        (["--together", "--weights", "words=0,pairs=0"], "weights are all 0"),
        (["--together", "--weights", "words=-1"], "weights must be task=weight"),
        (["--together", "--weights", "words=1e7"], "with weights from 0 to 1e+06"),
        (["--together", "--weights", "words=1,words=2"], "weights has two weights for words"),
        (["--together", "--weights", "words=0", "--target", "words"], "weights has 0 for the target words"),
        (["--together", "--temperature", "0.5"], "temperature"),
        (["--together", "--train-fraction", "0.5"], "train-fraction is of one task and not for --together"),
        (["--together", "--stages", "x.yaml"], "stages trains one task after the other"),
        (["--together", "--then-single", "--no-save-model"], "save-model is needed by --then-single"),
        (["--target", "words"], "target needs --together"),
        (["--stages", "x.yaml"], "give --task or --stages, not both"),
    ],
)
def test_what_cannot_be_done_is_refused(bert, tasks, tmp_path, capsys, more, message) -> None:
    files = f"{tasks['words']},{tasks['pairs']}"
    assert finetune(bert, ["--task", files], tmp_path / "out", *more) == 2
    assert message in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_a_folder_of_tasks_that_were_trained_in_another_way_is_refused(tmp_path) -> None:
    ways = {
        "with --together": MixtureOptions(together=True),
        "with --stages": MixtureOptions(stages="a,b"),
        "independently": MixtureOptions(),
    }
    for before, mixture in ways.items():
        out = tmp_path / before
        out.mkdir()
        write_options(out, FinetuneOptions(out=str(out), mixture=mixture))
        for now, other in ways.items():
            problem = pytest.raises(UserError, match=f"were trained {before}; choose another --out to train them {now}")
            with nullcontext() if now == before else problem:
                check_tasks_folder(FinetuneOptions(out=str(out), mixture=other))


@pytest.mark.parametrize("job", ["pretrain", "finetune", "affinity", "weak-label", "audit"])
def test_the_folder_of_another_command_is_refused(tmp_path, job) -> None:
    (tmp_path / "manifest.json").write_text('{"sessions": []}' if job == "pretrain" else f'{{"job": "{job}"}}')
    checks = {
        "pretrain": lambda: new_folder(str(tmp_path), "x"),
        "finetune": lambda: check_other_files(tmp_path),
        **{name: partial(job_folder.check_other_files, tmp_path, name) for name in ("affinity", "audit")},
        "weak-label": lambda: check_earlier(tmp_path),
    }
    for name, check in checks.items():
        if name != job:
            with pytest.raises(UserError, match=f"holds the output of fastbert {job}; choose another --out"):
                check()


def test_the_warm_up_is_compared_with_the_steps_of_all_tasks(bert, tasks, tmp_path, capsys) -> None:
    files = f"{tasks['numbers']},{tasks['words']}"  # 2 and 3 steps
    flags = ["--task", files, "--together", "--no-save-model"]
    assert finetune(bert, flags, tmp_path / "out", "--epochs", "1", "--schedule.warmup", "4") == 0
    assert finetune(bert, flags, tmp_path / "no", "--epochs", "1", "--schedule.warmup", "6") == 2
    assert "warmup" in capsys.readouterr().err and not (tmp_path / "no").exists()


def test_another_folder_for_then_single_is_refused_before_the_training(bert, tasks, tmp_path, capsys) -> None:
    other = tmp_path / "out" / "then-single" / "words"
    other.mkdir(parents=True)
    (other / "letter.txt").write_text("a letter")
    (tmp_path / "out" / "config.yaml").touch()
    assert together(bert, tasks, "pairs words", tmp_path / "out", "--then-single") == 2
    assert f"{other} is not empty and holds no results" in capsys.readouterr().err
    assert not (tmp_path / "out" / "seed-0").exists()


def test_two_tasks_of_one_name_and_other_tasks_in_one_folder(bert, tasks, mixed, tmp_path, capsys) -> None:
    assert together(bert, tasks, "words words", tmp_path / "out") == 2
    assert "a task called words is given twice" in capsys.readouterr().err and not (tmp_path / "out").exists()
    assert together(bert, tasks, "words pairs", mixed) == 2
    assert "holds the results of another experiment" in capsys.readouterr().err
    for name, value in (("temperature", "2"), ("weights", "words=2"), ("target", "words")):
        assert together(bert, tasks, " ".join(tasks), mixed, f"--{name}", value) == 2
        assert f"{name}: " in capsys.readouterr().err


def test_without_a_target_the_smallest_defaults_are_used(bert, tasks, tmp_path) -> None:
    """MRPC has 10 epochs by default, custom tasks 5."""
    glue = make_glue(tmp_path / "glue", ("mrpc",))
    flags = ["--model", str(bert), "--task", f"mrpc,{tasks['words']}", "--together", "--out", str(tmp_path / "out")]
    flags += ["--glue-dir", str(glue), "--glue-subset", "--machine.device", "cpu"]
    for more, epochs in (([], 5), (["--target", "mrpc"], 10)):
        found = prepare_together(parse(FinetuneOptions, [*flags, *more], "finetune"), ONE_PROCESS)
        assert [setup.options.epochs for setup in found.setups] == [epochs, epochs]
