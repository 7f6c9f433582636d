"""The comparison with transformers' Trainer, at toy size: losses that agree, runs that continue, tables that state the
numbers allow."""

import importlib.util
import json
import random
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.stats import ttest_ind

from tests.finetuning.conftest import LABELS, sentence, tiny_model
from tests.finetuning.test_tokens import make_sentences

SCRIPTS = Path(__file__).parents[1] / "scripts" / "against_transformers"


@pytest.fixture(scope="module")
def script():
    sys.path.insert(0, str(SCRIPTS))
    spec = importlib.util.spec_from_file_location("against_trainer", SCRIPTS / "against_trainer.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    sys.path.remove(str(SCRIPTS))


@pytest.fixture(scope="module")
def common(tmp_path_factory) -> list[str]:
    """The flags of a tiny BERT and of an RTE whose label states if two sentences have the same word."""
    folder, rng = tmp_path_factory.mktemp("glue"), random.Random(0)
    (folder / "RTE").mkdir()
    for split, count in (("train", 96), ("dev", 40), ("test", 4)):
        rows = []
        for index in range(count):
            first, second = rng.choice(LABELS), rng.choice(LABELS)
            label = [] if split == "test" else ["entailment" if first == second else "not_entailment"]
            rows.append([str(index), sentence(rng, first), sentence(rng, second, 6), *label])
        head = ["index", "sentence1", "sentence2", *([] if split == "test" else ["label"])]
        (folder / "RTE" / f"{split}.tsv").write_text("".join("\t".join(row) + "\n" for row in [head, *rows]))
    model = tiny_model(tmp_path_factory.mktemp("bert"))
    flags = ["--glue-dir", str(folder), "--glue-subset", "--model", str(model), "--max-length", "30", "--threads", "1"]
    return flags


def test_losses_agree_to_rounding_and_not_with_another_optimizer(script, common, tmp_path, monkeypatch) -> None:
    words = ["parity", *common, "--task", "rte", "--steps", "3", "--out", str(tmp_path / "parity.json")]
    arguments = script.parse(words)
    arguments.function(arguments)
    found = json.loads((tmp_path / "parity.json").read_text())
    cases = found["cases"]
    assert found["different_ids"] == 0
    assert [case["steps"] for case in cases.values()] == [3, 3, 3, 3]
    largest = {name: case["largest_difference"] for name, case in cases.items()}
    assert largest["float64"] < 1e-12 and largest["float32"] < 1e-5 and largest["float32, no warm-up"] < 1e-5
    assert largest[script.CONTROL] > 1e-5
    table = script.report.__globals__["parity_table"](tmp_path / "parity.json")
    assert "| float64 | 3 |" in table and table.count("\n") == 6

    def options(name: str, **changes):
        return script.recipe(arguments, "rte", 0, str(tmp_path / name), epochs=1, log_every=1, dropout=0.0, **changes)

    plain = options("plain", attention_dropout=0.0)
    harder = options("harder", attention_dropout=0.0, eps=1e-3, clip_norm=0.01)  # a large eps makes clipping matter
    theirs, ours = script.trainer_losses(harder, True), script.fastbert_losses(harder, True, False)
    assert np.abs(np.array(ours) - np.array(theirs)).max() < 1e-12
    assert np.abs(np.array(theirs) - np.array(script.trainer_losses(plain, True))).max() > 1e-6
    monkeypatch.setattr(script, "fastbert_losses", lambda *parts: [0.7, 0.7, 0.7])
    with pytest.raises(SystemExit, match="the losses are not equal"):
        script.parity(arguments)


def test_quality_goes_on_where_it_stopped_and_is_reported(script, common, tmp_path, monkeypatch, capsys) -> None:
    out = tmp_path / "glue-quality.jsonl"
    words = ["quality", *common, "--tasks", "rte", "--epochs", "1", "--out", str(out)]
    script.quality(script.parse([*words, "--seeds", "1"]))
    rows = script.read_lines(out)
    assert [script.key(row) for row in rows] == [(0, "rte", "fastbert"), (0, "rte", "trainer")]
    assert all(0 <= row["dev"]["dev"]["accuracy"] <= 1 and row["seconds"] > 0 for row in rows)

    trained = []

    def stand_in(options, *order):
        trained.append((options.first_seed, *order))
        return {"last": {"dev": {"dev": {"accuracy": 0.25 * len(trained), "loss": 1.0}}}}

    monkeypatch.setattr(script, "train_fastbert", stand_in)
    monkeypatch.setattr(script, "train_trainer", stand_in)
    script.quality(script.parse([*words, "--seeds", "2"]))
    assert trained == [(1,), (1, "group_by_length")]
    assert script.read_lines(out)[:2] == rows and "0 runs to go" in capsys.readouterr().err

    doc = tmp_path / "glue.md"
    doc.write_text(
        "# x\n<!-- parity -->\nold\n<!-- end -->\n<!-- quality -->\n<!-- end -->\nz <!-- speed -->\n<!-- end -->"
    )
    script.report(script.parse(["report", "--doc", str(doc)]))
    text = doc.read_text()
    assert "old" not in text and text.count("(not measured yet)") == 2 and "| rte | accuracy | 2 |" in text
    assert text.startswith("# x\n") and "\nz <!-- speed -->\n" in text
    assert (tmp_path / "glue-quality.png").read_bytes().startswith(b"\x89PNG")
    script.report(script.parse(["report", "--doc", str(doc)]))
    assert doc.read_text() == text


def test_words_with_labels_have_equal_losses_and_comparable_scores(script, common, tmp_path) -> None:
    """Also where transformers' tokenizer deletes a word, which is [UNK] here, and which it does not score."""
    for split, count in (("train", 64), ("dev", 12)):
        text = make_sentences(random.Random(split), count).replace("\n\n", "\n\ufe0f\tO\n\n", 1)
        (tmp_path / f"{split}.conll").write_text(text)
    task = tmp_path / "entities.yaml"
    task.write_text("kind: tokens\ntrain: train.conll\ndev: dev.conll\n")
    flags = common[common.index("--model") :]
    arguments = script.parse(
        ["parity", *flags, "--task", str(task), "--steps", "3", "--out", str(tmp_path / "parity.json")]
    )
    script.parity(arguments)
    assert json.loads((tmp_path / "parity.json").read_text())["different_ids"] == 1
    out = tmp_path / "quality.jsonl"
    same = ["--learning-rate", "1e-9", "--label", "x"]  # of the same weights, so but for that word equal scores
    script.quality(script.parse(["quality", *flags, "--tasks", str(task), "--seeds", "1", *same, "--out", str(out)]))
    rows = script.read_lines(out)
    assert [script.key(row) for row in rows] == [(0, "entities (x)", "fastbert"), (0, "entities (x)", "trainer")]
    ours, theirs = (row["dev"]["dev"] for row in rows)
    assert ours["entity_f1"] > 0.02 and ours["entity_f1"] == pytest.approx(theirs["entity_f1"], abs=0.02)
    assert ours["accuracy"] == pytest.approx(theirs["accuracy"], abs=0.02)


def test_every_variant_changes_what_it_names_and_is_reset(script, common, capsys, monkeypatch) -> None:
    def run(case: str) -> dict:
        words = ["one", *common, "--task", "rte", "--examples", "64", "--case", case, "--out", "unused"]
        script.one(script.parse(words))
        return json.loads(capsys.readouterr().out.splitlines()[-1])

    plain = run("fastbert")
    assert plain["examples"] == 64 and plain["examples_per_second"] > 0 and plain["peak_mib"] > 100
    assert run("fastbert, random order")["tokens_per_example"] > plain["tokens_per_example"]
    random_order = run("trainer")["tokens_per_example"]
    assert random_order > plain["tokens_per_example"]
    assert run("trainer by length")["tokens_per_example"] < random_order
    compilations = []

    def compile_slowly(model, **options):
        forward = model.forward

        def first(*inputs, **more):
            compilations.append(time.sleep(5))
            model.forward = forward
            return forward(*inputs, **more)

        model.forward = first
        return model

    monkeypatch.setattr(torch, "compile", compile_slowly)
    compiled = run(script.COMPILED)
    assert compilations == [None] and compiled["examples_per_second"] > 64 / 5  # without the time of the compilation

    names = set(script.VARIANTS)
    from fastbert.finetuning import task_heads
    from fastbert.model import encoder
    from fastbert.model.kernel_choice import KERNELS

    keys, x = torch.zeros(2, dtype=torch.int32), torch.ones(2, 100)
    hashed = task_heads.hash_dropout(x, keys, 0.5)
    with script.VARIANTS["PyTorch's dropout"]():
        assert not torch.equal(task_heads.hash_dropout(x, keys, 0.5), task_heads.hash_dropout(x, keys, 0.5))
    assert torch.equal(task_heads.hash_dropout(x, keys, 0.5), hashed)
    q, k, v = torch.randn(3, 2, 2, 7, 4)
    masks = {"key_padding": torch.tensor([[True] * 5 + [False] * 2] * 2), "segments": None}
    ours = KERNELS["auto"].attention
    with script.VARIANTS["PyTorch's attention"]():
        theirs = KERNELS["auto"].attention
    assert theirs is not ours and KERNELS["auto"].attention is ours
    assert torch.allclose(theirs(q, k, v, **masks, scale=0.3), ours(q, k, v, **masks, scale=0.3), atol=1e-6)
    config = encoder.EncoderConfig(vocab_size=20, layers=2, width=8, heads=2, ffn=16, max_positions=9)
    tiny, ids = encoder.Encoder(config), torch.arange(9)[None]
    with script.VARIANTS["last block for all tokens"]():
        whole = tiny(ids, only=slice(1))
    assert whole.shape == (1, 9, 8) and torch.allclose(tiny(ids, only=slice(1)), whole[:, :1], atol=1e-6)
    assert names == {"random order", "last block for all tokens", "PyTorch's attention", "PyTorch's dropout"} | {
        "glibc's allocator as it comes"
    }


def test_speed_runs_the_cases_in_turn_and_the_table_holds_ratios_of_a_round(
    script, common, tmp_path, monkeypatch
) -> None:
    asked = []

    class Done:
        returncode, stderr = 0, ""

        def __init__(self, command, **keywords):
            task, case, turn = (command[command.index(flag) + 1] for flag in ("--task", "--case", "--seed"))
            asked.append((int(turn), task, case))
            rate = {"fastbert": 30.0, "trainer": 20.0}.get(case, 25.0) * (1 + int(turn))  # the second round is quieter
            row = {"case": case, "task": task, "examples": 64, "threads": 1, "examples_per_second": rate}
            self.stdout = "noise\n" + json.dumps(row | {"tokens_per_example": 9.0, "peak_mib": 900 + int(turn)}) + "\n"

    monkeypatch.setattr(script, "describe_machine", dict)  # it asks git
    monkeypatch.setattr(script.subprocess, "run", Done)
    out = tmp_path / "speed.json"
    words = ["speed", *common, "--tasks", "rte", "--rounds", "2", "--variant-rounds", "1", "--out", str(out)]
    script.speed(script.parse(words))
    assert [turn for turn, _, _ in asked] == [0] * len(script.CASES) + [1] * len(script.CONTESTANTS)
    table = script.report.__globals__["speed_table"](out)
    assert "| trainer | 30.0 (20.0 to 40.0) | 1.50 (1.50 to 1.50) | 9.0 | 900 (900 to 901) |" in table
    assert "| random order | 25.0 (25.0 to 25.0) | 0.83 (0.83 to 0.83) |" in table


def rows_of(task: str, ours: list[float], theirs: list[float]) -> list[dict]:
    return [
        {"task": task, "system": system, "seed": seed, "dev": {"dev": {"accuracy": value, "loss": 1.0}}}
        for system, values in (("fastbert", ours), ("trainer", theirs))
        for seed, value in enumerate(values)
    ]


def test_the_verdict_is_that_of_welch_and_holm(script) -> None:
    report = script.report.__globals__
    ours, theirs = [0.71, 0.74, 0.69, 0.70], [0.73, 0.70, 0.75, 0.72, 0.99]
    (row,) = report["compare"](rows_of("rte", ours, theirs))
    test = ttest_ind(ours, theirs[:4], equal_var=False)  # the fifth seed has one side only
    assert row["seeds"] == [0, 1, 2, 3] and row["p"] == pytest.approx(test.pvalue)
    assert row["low"] == pytest.approx(100 * test.confidence_interval(0.95).low)
    assert row["difference"] == pytest.approx(-1.5)
    assert report["verdict"]([row]).startswith("No difference beyond the spread over seeds")

    tests = [{"task": f"t{i}", "metric": "m", "difference": 1.0, "low": 0.0, "high": 1.0} for i in range(3)]
    for row, p in zip(tests, (0.03, 0.02, 0.01), strict=True):  # 0.01 < 0.05 / 3, 0.02 < 0.05 / 2, 0.03 < 0.05
        row["p"] = p
    assert [row["task"] for row in report["beyond"](tests)] == ["t2", "t1", "t0"]
    tests[2]["p"] = 0.017  # and now the smallest fails, so none passes
    assert report["beyond"](tests) == []
    tests[2]["p"] = 0.001
    assert report["verdict"](tests).startswith("Differences beyond the spread over seeds")
    assert report["verdict"](report["compare"](rows_of("rte", [0.7], [0.6]))) == "There are too few seeds for a test."


def test_user_errors(script, common, tmp_path, monkeypatch, capsys) -> None:
    def refuses(message: str, *words: str) -> None:
        monkeypatch.setattr(sys, "argv", ["against_trainer.py", *words])
        with pytest.raises(SystemExit) as ended:
            script.main()
        assert ended.value.code == 2 and message in capsys.readouterr().err

    refuses("there is no document", "report", "--doc", str(tmp_path / "no.md"))
    (tmp_path / "bare.md").write_text("text")
    refuses("has no <!-- parity -->", "report", "--doc", str(tmp_path / "bare.md"))
    nowhere = ["quality", *common[2:], "--glue-dir", str(tmp_path / "none"), "--out", str(tmp_path / "x.jsonl")]
    refuses("none", *nowhere)
