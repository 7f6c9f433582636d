"""The job: out-of-fold scores, report, resume, refusals."""

import json
import random
import signal
from pathlib import Path

import numpy as np
import pytest

from fastbert.dataset_work.audit import train
from fastbert.finetuning.loop import Tuner
from fastbert.training import interrupts
from tests.finetuning.conftest import FILLERS, finetune, sentence, write_rows
from tests.flags import main

FAST = (
    *("--machine.threads", "1", "--machine.precision", "fp32", "--machine.device", "cpu"),
    *("--learning-rate", "5e-3", "--epochs", "4", "--batch-size", "16", "--folds", "3"),
)
WRONG = (5, 50, 77)
"""Rows of train with a wrong label."""
MORE = ("--annotators", "first,second", "--train-fraction", "0.2,0.5,1.0", "--pretraining-text")


def make_task(folder: Path) -> Path:
    """Which of two words is in the text. Train has wrong labels, a copy with another label, a near duplicate and a long
    text; dev has a copy and a near duplicate from train. Of two annotators, the second is wrong in every fifth row and
    leaves a cell empty."""
    rng, rows = random.Random(0), []
    for number in range(150):
        label = rng.choice(("bad", "good"))
        words = [*rng.choices(FILLERS, k=rng.randint(3, 5)), *[label] * 4]
        row = {"text": " ".join(rng.sample(words, len(words))), "label": label}
        row |= {"first": label, "second": "good" if number % 5 == 0 else label}
        rows.append(row)
    for number in WRONG:
        rows[number]["label"] = {"bad": "good", "good": "bad"}[rows[number]["label"]]
    rows[9] |= {"text": "good of the day good", "label": "good"}
    rows[10] |= {"text": "Good of  the day good", "label": "bad"}
    rows[11] |= {"text": "good " * 40, "label": "good"}
    rows[120]["text"], rows[120]["label"] = rows[0]["text"], rows[0]["label"]
    rows[13]["second"] = ""
    for near, row in ((3, 2), (121, 1)):
        rows[near] = rows[row] | {"text": f"{rows[row]['text']} a"}
    write_rows(folder / "train.jsonl", rows[:120])
    write_rows(folder / "dev.jsonl", rows[120:])
    (folder / "t.yaml").write_text("train: train.jsonl\ndev: dev.jsonl\nlabels: bad,good,other\n")
    seen = next(row["text"] for row in rows if len(row["text"].split()) == 9)
    (folder / "seen.txt").write_text(f"{' '.join(FILLERS)} {seen} and more\n")
    return folder / "t.yaml"


@pytest.fixture(scope="module")
def task(tmp_path_factory) -> Path:
    return make_task(tmp_path_factory.mktemp("task"))


def audit(model: Path, task: Path | str, out: Path, *more: str) -> int:
    return main(["audit", "--model", str(model), "--task", str(task), "--out", str(out), *FAST, *more])


@pytest.fixture(scope="module")
def whole(bert, task, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("audit") / "out"
    assert audit(bert, task, out, *MORE, str(task.with_name("seen.txt"))) == 0
    return out


def lines(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "audit.jsonl").read_text().splitlines()]


def figures(out: Path) -> dict:
    return json.loads((out / "audit.json").read_text())


def test_wrong_labels_duplicates_and_the_rest_are_found(whole) -> None:
    rows = lines(whole)
    train_rows = [row for row in rows if row["split"] == "train"]
    assert [row["index"] for row in train_rows] == list(range(120)) and len(rows) == 150
    ranked = sorted(train_rows, key=lambda row: row["self_confidence"])
    assert {row["index"] for row in ranked[:4]} >= set(WRONG)
    assert all(train_rows[row]["likely_wrong"] for row in WRONG)
    assert sum(row["likely_wrong"] for row in rows) < 8
    assert (train_rows[9]["duplicates"], train_rows[10]["duplicates"]) == ([["train", 10]], [["train", 9]])
    assert train_rows[0]["duplicates"] == [["dev", 0]] and train_rows[0]["fold"] == rows[120]["fold"]
    assert [row["index"] for row in rows if row["truncated"]] == [11]
    assert [one[:2] for one in train_rows[1]["near_duplicates"]] == [["dev", 1]] and train_rows[3]["near_duplicates"][
        0
    ][:2] == ["train", 2]
    assert sum(row["in_pretraining_text"] for row in rows) == 1
    for row in rows:
        assert row["predicted"] != row["label"] or row["margin"] > 0
    found = figures(whole)
    assert found["examples"] == {"train": 120, "dev": 30} and found["copies_with_different_labels"] == 1
    assert found["metrics"]["accuracy"] == np.mean([row["predicted"] == row["label"] for row in rows])
    assert found["cohen_kappa"]["first, second"] == pytest.approx(found["fleiss_kappa"], abs=0.02)
    assert 0.6 < found["fleiss_kappa"] < 0.95 and found["disagreements"] > 5
    curve = found["learning_curve"]
    assert curve["sizes"] == pytest.approx([20, 50, 100], rel=0.01)
    assert curve["errors"][2] == pytest.approx(1 - found["metrics"]["accuracy"])
    assert curve["errors"][0] > curve["errors"][2] and curve["gain"] > 0


def test_the_report_has_all_sections(whole) -> None:
    text, page = ((whole / name).read_text() for name in ("report.md", "report.html"))
    headings = [line[3:] for line in text.splitlines() if line.startswith("## ")]
    expected = ["Most suspicious labels", "Confusion matrix", "Labels", "Duplicates", "Overlap of the splits"]
    expected += ["Truncated texts", "Agreement of the annotators", "Learning curve", "How it was made"]
    assert headings == expected and all(f"<h2>{name.replace(chr(39), '&#x27;')}</h2>" in page for name in expected)
    assert "train 9, train 10" in text and "10 % more labels: accuracy +" in text and "<svg" in page
    assert "1 of the 30 examples of dev (3.3%) are in train too" in text
    assert "train: 1 of 120 examples (0.8%)" in text and "Fleiss' kappa of all 2 annotators" in text
    assert "1 further ones have a near duplicate in train" in text
    cells = {line.split()[1]: line.split() for line in text.split("## Labels")[1].splitlines() if line.startswith("| ")}
    assert (cells["other"][3], cells["other"][-2], cells["good"][-2]) == ("0", "yes", "no")


def test_a_model_never_scores_texts_that_it_was_trained_on(bert, task, tmp_path, monkeypatch) -> None:
    real, encoded = train.AuditSetup.encode, []

    def remember(setup, rows):
        encoded.append([setup.pool.keys[row] for row in rows])
        return real(setup, rows)

    monkeypatch.setattr(train.AuditSetup, "encode", remember)
    assert audit(bert, task, tmp_path / "out", "--epochs", "1", "--train-fraction", "1.0", "--no-near-duplicates") == 0
    assert len(encoded) == 6 and sum(map(len, encoded[1::2])) == 150
    for trained, scored in zip(encoded[::2], encoded[1::2], strict=True):
        assert trained and scored and not set(trained) & set(scored)


def test_an_interrupted_audit_continues_to_the_same_bytes(whole, bert, task, tmp_path, monkeypatch, capsys) -> None:
    """A signal in the first fold, a kill in the second, and one between the scores and the result."""
    out, real, steps = tmp_path / "out", Tuner.train_step, [0]

    def stopped(tuner, batch) -> None:
        real(tuner, batch)
        steps[0] += 1
        if steps[0] == 10:  # of 28 in the fold, in its second epoch
            interrupts.receive(signal.SIGINT)
        if steps[0] == 45:
            raise SystemExit(9)

    monkeypatch.setattr(Tuner, "train_step", stopped)
    arguments = (bert, task, out, *MORE, str(task.with_name("seen.txt")))
    assert audit(*arguments) == 130
    assert "the same command continues with" in capsys.readouterr().err and not (out / "audit.jsonl").exists()
    assert audit(*arguments, "--seed", "1") == 2
    assert "seed: 0 -> 1" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        audit(*arguments)
    assert "continues after epoch 1 of 4" in capsys.readouterr().err
    with monkeypatch.context() as patch:
        patch.setattr(train, "write_sealed", lambda *_: (_ for _ in ()).throw(SystemExit))
        with pytest.raises(SystemExit):
            audit(*arguments)
    assert audit(*arguments) == 0
    assert "continues after epoch 4 of 4" in capsys.readouterr().err
    for name in ("audit.jsonl", "audit.json", "report.md", "learning_curve.svg", "folds/fold-1/scores.safetensors"):
        assert (out / name).read_bytes() == (whole / name).read_bytes(), name
    assert not list(out.rglob("checkpoints"))
    (out / "folds" / "fold-1" / "scores.safetensors").write_bytes(b"damaged")
    assert audit(*arguments) == 2
    assert "to train the fold again" in capsys.readouterr().err


def test_flipped_labels_are_found_better_than_at_random(bert, task, tmp_path, capsys) -> None:
    more = ("--flip", "0.1", "--train-fraction", "1.0", "--no-near-duplicates")
    assert audit(bert, task, tmp_path / "out", *more) == 0
    rows, flips = lines(tmp_path / "out"), figures(tmp_path / "out")["flips"]
    flipped = [row["flipped"] for row in rows]
    assert sum(flipped) == flips["count"] == 15 and flips["random"] == 0.1
    ranked = sorted(range(150), key=lambda row: rows[row]["self_confidence"])
    assert flips["out_of_fold"] == pytest.approx(np.mean([flipped[row] for row in ranked[:15]]))
    assert flips["out_of_fold"] > 0.5
    marked = [row["likely_wrong"] for row in rows]
    assert flips["marked_recall"] == pytest.approx(
        np.mean([mark for mark, flip in zip(marked, flipped, strict=True) if flip])
    )
    assert "15 flipped labels: precision at 15 is" in capsys.readouterr().out


def test_numbers_are_ranked_by_their_residuals(bert, tmp_path) -> None:
    rng, rows = random.Random(1), []
    for _ in range(60):
        often = rng.randint(0, 4)
        rows.append({"text": " ".join(rng.sample([*rng.choices(FILLERS, k=5), *["good"] * often], 5 + often))})
        rows[-1]["label"] = often / 2
    rows[30]["label"] = 40
    write_rows(tmp_path / "train.jsonl", rows)
    (tmp_path / "t.yaml").write_text("kind: number\ntrain: train.jsonl\n")
    out = tmp_path / "out"
    assert audit(bert, tmp_path / "t.yaml", out, "--epochs", "1", "--train-fraction", "0.3,0.6,1.0") == 0
    found = lines(out)
    worst = max(found, key=lambda row: abs(row["residual"]))
    assert worst["index"] == 30 and worst["likely_wrong"]
    assert worst["residual"] == pytest.approx(worst["predicted"] - 40)
    text = (out / "report.md").read_text()
    assert "The task has no dev split." in text and "mean squared error" in text and "Confusion" not in text


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--folds", "100"], "the label 'good' has 68 different texts in train and dev, fewer than the 100 folds"),
        (["--annotators", "first,third"], "has no column 'third'"),
        (["--annotators", "first"], "--annotators must be two or more different columns, not 'first'"),
        (["--annotators", "first,text"], "line 1, column 'text': unknown label"),
        (["--train-fraction", "0.5"], "with 1.0 among them, not '0.5'"),
        (["--task", "cola,sst2"], "--task cola,sst2 is several tasks, and audit reads one"),
        (["--task", "cola", "--annotators", "a,b"], "cola is a GLUE task"),
        (["--pretraining-text", "none.txt"], "none.txt"),
        (["--task", "tokens.yaml"], "has kind tokens, and audit reads the kinds classes and number"),
        (["--task", "empty.yaml"], "empty.jsonl has no rows"),
        (["--task", "dev.yaml"], "the task dev has no train split"),
        (["--max-length", "4000"], "max_length 4000 is longer than the 30 positions"),
        (["--out", "."], "is not empty and holds no results of fastbert audit"),
    ],
)
def test_user_errors_are_reported_before_anything_is_written(
    bert, task, tmp_path, monkeypatch, capsys, more, message
) -> None:
    monkeypatch.chdir(tmp_path)
    write_rows(tmp_path / "empty.jsonl", [])
    for name in ("train", "dev"):
        (tmp_path / f"{name}.jsonl").write_bytes(task.with_name(f"{name}.jsonl").read_bytes())
    (tmp_path / "x.conll").write_text("a O\n")
    (tmp_path / "tokens.yaml").write_text("kind: tokens\ntrain: x.conll\n")
    (tmp_path / "empty.yaml").write_text("train: train.jsonl\ndev: empty.jsonl\n")
    (tmp_path / "dev.yaml").write_text("dev: dev.jsonl\nlabels: bad,good\n")
    before = {path.name for path in tmp_path.iterdir()}
    assert audit(bert, task, Path("out"), *more) == 2
    printed = capsys.readouterr()
    assert message in printed.err and printed.out == "" and "Traceback" not in printed.err
    assert {path.name for path in tmp_path.iterdir()} == before


def test_a_model_that_has_seen_the_labels_is_refused(bert, task, tmp_path, capsys) -> None:
    assert finetune(bert, ["--task", str(task)], tmp_path / "tuned", "--epochs", "1") == 0
    assert audit(tmp_path / "tuned" / "seed-0", task, tmp_path / "out") == 2
    assert "seed-0 was fine-tuned on t, so it has seen the labels" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_missing_package_is_reported(bert, task, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *_: None if name == "datasketch" else object())
    assert audit(bert, task, tmp_path / "out") == 2
    assert "pip install datasketch" in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_the_task_of_wikisqe(bert, tmp_path, monkeypatch, capsys) -> None:
    """The file in configs/, with a synthetic table: audited, fine-tuned, and measured by pairwise accuracy."""
    rng = random.Random(2)
    folder = tmp_path / "data" / "wikisqe"
    folder.mkdir(parents=True)
    for split, count in (("train", 40), ("dev", 20), ("test", 4)):
        labels = [("ok", "flawed")[number % 2] for number in range(count)]
        rows = [{"sentence": sentence(rng, "bad" if one == "flawed" else "good"), "label": one} for one in labels]
        write_rows(folder / f"{split}.jsonl", rows)
    monkeypatch.chdir(tmp_path)
    config = str(Path(__file__).parents[2] / "configs" / "tasks" / "wikisqe.yaml")
    assert audit(bert, config, tmp_path / "out", "--folds", "2", "--train-fraction", "1.0") == 0
    found = figures(tmp_path / "out")["metrics"]
    assert [*found] == ["f1", "accuracy", "pairwise_accuracy"]
    rows = lines(tmp_path / "out")
    score = {"flawed": [], "ok": []}
    for row in rows:
        flawed = row["self_confidence"] if row["label"] == "flawed" else 1 - row["self_confidence"]
        score[row["label"]].append(flawed)
    ordered = [(a > b) + (a == b) / 2 for a in score["flawed"] for b in score["ok"]]
    assert found["pairwise_accuracy"] == pytest.approx(np.mean(ordered))
