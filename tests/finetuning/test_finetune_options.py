"""Options of `fastbert finetune`: options from YAML and flags, defaults of a task, and refusals."""

import json
import os
from pathlib import Path

from fastbert.finetuning.options import FinetuneOptions
from tests.finetuning.conftest import finetune, make_glue, results, tiny_model, write_rows
from tests.flags import main


def test_fewer_rows_than_official_need_a_flag(bert, tmp_path, capsys) -> None:
    glue = make_glue(tmp_path / "glue", ["rte"])
    task = ["--task", "rte", "--glue-dir", str(glue)]
    assert finetune(bert, task, tmp_path / "out", "--epochs", "1") == 2
    assert "holds 48 usable rows, and RTE's train has 2,490" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert finetune(bert, task, tmp_path / "out", "--epochs", "1", "--glue-subset") == 0
    assert results(tmp_path / "out")["fractions"][0]["train_examples"] == 48
    predict = ["predict", "--model", str(tmp_path / "out" / "seed-0"), *task, "--out", str(tmp_path / "p.jsonl")]
    capsys.readouterr()
    assert main(predict) == 2
    assert "--glue-subset" in capsys.readouterr().err
    assert main([*predict, "--glue-subset"]) == 0


def test_there_is_no_option_workers(bert, words, tmp_path, capsys) -> None:
    assert finetune(bert, words, tmp_path / "out", "--machine.workers", "2") == 2
    assert "unknown option --machine.workers" in capsys.readouterr().err


def test_flags_override_yaml(bert, words, tmp_path) -> None:
    path = tmp_path / "x.yaml"
    path.write_text("seeds: 3\nepochs: 1\nworst: 4\nschedule:\n  warmup: 0.2\n")
    out = tmp_path / "out"
    assert main(["finetune", str(path), "--model", str(bert), *words, "--seeds", "1", "--out", str(out)]) == 0
    stored = (out / "config.yaml").read_text()
    assert "seeds: 1" in stored and "epochs: 1" in stored and "warmup: 0.2" in stored
    assert "learning_rate: 5.0e-05" in stored and "max_length: 30" in stored  # what was worked out is written too
    assert len((out / "seed-0" / "errors.jsonl").read_text().splitlines()) == 4
    assert "train_fraction: '1.0'" in (out / "seed-0" / "config.yaml").read_text()


def test_the_defaults_of_a_task() -> None:
    class FakeTask:
        name, symmetric, is_pair = "mnli", False, True

    resolved = FinetuneOptions(model="m").resolved(FakeTask, 512)
    assert (resolved.learning_rate, resolved.epochs, resolved.max_length) == (3e-5, 5, 512)
    FakeTask.name = "rte"
    resolved = FinetuneOptions(model="m", epochs=2).resolved(FakeTask, 64)
    assert (resolved.learning_rate, resolved.epochs, resolved.max_length) == (5e-5, 2, 64)


def test_refusals(bert, words, tmp_path, capsys) -> None:
    def refuses(message: str, *more: str, model: Path | str = bert, task: list[str] = words) -> None:
        assert finetune(model, task, tmp_path / "out", *more) == 2
        printed = capsys.readouterr().err
        assert message in printed, printed
        assert not (tmp_path / "out").exists()

    refuses("unknown task 'colla'; did you mean 'cola'?", task=["--task", "colla"])
    refuses("the task x has no dev split", task=["--task", "x", *words[2:4]])
    refuses("--seeds must be at least 1, not 0", "--seeds", "0")
    refuses("--epochs must be at least 1, not 0", "--epochs", "0")
    refuses("--layer-decay must be in (0, 1], not 1.5", "--layer-decay", "1.5")
    refuses("--learning-rate must be greater than 0, not -1.0", "--learning-rate", "-1")
    refuses("--train-fraction must be comma-separated numbers", "--train-fraction", "0.1;0.2")
    refuses("--train-fraction must be different fractions above 0 and up to 1", "--train-fraction", "0.1,2")
    refuses("max_length 31 is longer than the 30 positions", "--max-length", "31")
    refuses("--max-length must be at least 8, not 3", "--max-length", "3")
    refuses("--first-seed must be at least 0, not -1", "--first-seed", "-1")
    refuses("the order of the texts matters in the task words", "--symmetric")
    refuses("a warm-up of 5000 steps does not fit a run of 40", "--schedule.warmup", "5000")
    refuses("there is no folder", model=tmp_path / "nowhere")

    bare = tiny_model(tmp_path / "bare")
    for name in ("tokenizer.json", "vocab.txt"):
        (bare / name).unlink()
    refuses("holds no tokenizer", model=bare)
    large = tiny_model(tmp_path / "large", vocab_size=40)
    settings = json.loads((large / "tokenizer.json").read_text())
    settings["model"]["vocab"] |= {f"more{index}": 28 + index for index in range(20)}
    (large / "tokenizer.json").write_text(json.dumps(settings))
    refuses("is not the one that the model", model=large)
    write_rows(tmp_path / "same.jsonl", [{"text": "good", "label": "good"}] * 3)
    same = [*words[:4], "--custom.dev", str(tmp_path / "same.jsonl"), "--custom.metrics", "accuracy,auc"]
    refuses("AUC needs examples of both labels", task=same)

    assert main(["finetune", *words, "--out", str(tmp_path / "out")]) == 2
    assert "--model (or --init-from) is missing" in capsys.readouterr().err
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.txt").write_text("years of work")
    assert finetune(bert, words, tmp_path / "thesis") == 2
    assert "holds no results of fastbert finetune" in capsys.readouterr().err
    assert os.listdir(tmp_path / "thesis") == ["chapter.txt"]
