"""Runs with a note dictionary: resumed to the bit, exported without it, and impossible ones refused before they
start."""

import json
import os
import re
import runpy
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from fastbert.config import digest, leaves, load_yaml
from fastbert.data.note_words import choose_words, segment_tokens
from fastbert.data.shards import open_dataset
from fastbert.errors import UserError
from fastbert.model.options import NoteDictionaryOptions
from fastbert.pretraining import note_corpus
from fastbert.pretraining.note_corpus import find_note_words
from fastbert.pretraining.options import PretrainOptions, science
from fastbert.training.hardware import describe_machine, group_memory, memory
from tests.flags import main

NOTES = ["--notes.enabled", "--notes.half-window", "4", "--notes.fraction", "1"]
FIGURES = {"notes_words", "notes_tokens", "notes_norm", "notes_drift"}
# Runs a job in a process that kills itself before the update of a step.
KILLER = """
import os, signal, sys
import fastbert.pretraining.loop as loop
from fastbert.cli import main
real, step = loop.Trainer.train_step, int(sys.argv[1])
def stepping(self, number):
    if number == step:
        os.kill(os.getpid(), signal.SIGKILL)
    real(self, number)
loop.Trainer.train_step = stepping
sys.exit(main(sys.argv[2:]))
"""


def rows(run: Path) -> list[dict]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{name: row[name] for name in row.keys() - {"tokens_per_second", "mfu"}} for row in lines]


def last_checkpoint(run: Path) -> dict[str, torch.Tensor]:
    return load_file(max((run / "checkpoints").iterdir()) / "model.safetensors")


@pytest.fixture(scope="module")
def finished(prepared: Path, tmp_path_factory) -> dict[str, Path]:
    """The same run without notes, with notes, and with notes of weight 0."""
    flags = [
        *("--data", str(prepared), "--layers", "2", "--width", "32", "--heads", "2", "--length", "32"),
        *("--position", "tupe-r", "--batch-size", "8", "--machine.micro-batch-size", "4", "--machine.threads", "1"),
        *("--steps", "12", "--eval-every", "6", "--checkpoint-every", "5", "--log-every", "3"),
        *("--eval-sequences", "16", "--optimizer.learning-rate", "3e-3"),
        *("--machine.precision", "fp32"),
    ]
    runs = {"off": [], "on": NOTES, "zero": [*NOTES, "--notes.mix", "0"]}
    out = tmp_path_factory.mktemp("runs")
    for name, more in runs.items():
        assert main(["pretrain", *flags, *more, "--out", str(out / name)]) == 0
    return {name: out / name for name in runs}


def test_weight_zero_equals_no_notes(finished) -> None:
    """Up to rounding; tests/model/test_note_dictionary.py compares them to the bit."""
    off, zero, on = (rows(finished[name]) for name in ("off", "zero", "on"))
    for row, same in zip(off, zero, strict=True):
        numbers = [name for name in row if name not in ("split", "flops")]  # notes cost FLOPs
        assert [same[name] for name in numbers] == pytest.approx([row[name] for name in numbers], rel=1e-5)
    differences = [max(abs(a["loss"] - b["loss"]) for a, b in zip(off, run, strict=True)) for run in (zero, on)]
    assert differences[0] < 3e-6 < 3e-5 < differences[1]
    ours, theirs = (last_checkpoint(finished[name]) for name in ("off", "zero"))
    for name, tensor in ours.items():
        torch.testing.assert_close(theirs[name], tensor, rtol=1e-3, atol=1e-4)  # AdamW's first steps magnify rounding
    assert theirs.keys() - ours.keys() == {"notes.table", "notes.writes", "notes.written"}


def test_disabled_it_leaves_no_trace(finished) -> None:
    assert not any("notes" in name for name in last_checkpoint(finished["off"]))
    assert not any(FIGURES & row.keys() for row in rows(finished["off"]))
    manifest = json.loads((finished["off"] / "manifest.json").read_text())
    assert not any("notes" in name for name in manifest["science"])
    options = load_yaml(PretrainOptions, finished["off"] / "config.yaml")
    assert {leaf.name for leaf in leaves(options) if leaf.name.startswith("notes.")} > {"notes.gamma"}
    assert manifest["experiment"] == digest(science(options, manifest["data"]["fingerprint"]))


def test_what_is_logged(finished) -> None:
    train = [row for row in rows(finished["on"]) if row["split"] == "train"]
    assert len(train) == 4 and all(row.keys() >= FIGURES for row in train)
    words = [row["notes_words"] for row in train]
    assert 0 < words[0] < words[-1] <= 1 and words == sorted(words)
    assert all(0 < row["notes_tokens"] < 0.3 and row["notes_drift"] > 0 for row in train)
    dictionary = last_checkpoint(finished["on"])
    assert dictionary["notes.written"] == (dictionary["notes.writes"] > 0).sum()
    assert train[-1]["notes_norm"] > 0.3  # hidden states by now: a note of its beginning has 0.02 sqrt(32) = 0.11


def test_a_killed_run_resumes_to_the_bit(finished, tmp_path) -> None:
    whole, broken = finished["on"], tmp_path / "broken"
    config = (whole / "config.yaml").read_text().replace(f"out: {whole}", f"out: {broken}")
    (tmp_path / "run.yaml").write_text(config)
    command = [sys.executable, "-c", KILLER, "8", "pretrain", str(tmp_path / "run.yaml")]
    done = subprocess.run(command, capture_output=True, timeout=120)
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()
    assert main(["pretrain", "--resume", str(broken)]) == 0
    assert rows(whole) == rows(broken)
    ours, theirs = last_checkpoint(whole), last_checkpoint(broken)
    assert ours.keys() == theirs.keys() and "notes.table" in ours
    for name, tensor in ours.items():
        assert torch.equal(tensor, theirs[name]), name


def test_export_and_runs_from_it_have_no_notes(finished, corpus, tmp_path, capsys) -> None:
    run = finished["on"]
    ours, theirs = (load_file(finished[name] / "model" / "model.safetensors") for name in ("on", "off"))
    assert ours.keys() == theirs.keys()
    held_out = ["--source", str(corpus), "--length", "32", "--max-tokens", "2000", "--json"]
    losses = []
    for model in (run / "model", run):  # the export, and the checkpoint that holds the dictionary
        capsys.readouterr()
        assert main(["evaluate", "--model", str(model), *held_out]) == 0
        losses.append(json.loads(capsys.readouterr().out)["loss"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    assert main(["export", str(run), "--out", str(tmp_path / "again")]) == 0
    assert load_file(tmp_path / "again" / "model.safetensors").keys() == ours.keys()


def test_a_run_from_other_weights_has_new_notes(finished, prepared, tmp_path, capsys) -> None:
    flags = ["--data", str(prepared), "--length", "32", "--batch-size", "4", "--steps", "1", "--eval-sequences", "4"]
    out = tmp_path / "run"
    assert main(["pretrain", *flags, *NOTES, "--init-from", str(finished["on"]), "--out", str(out)]) == 0
    assert "newly initialized: notes.table" in capsys.readouterr().err
    assert last_checkpoint(out)["notes.writes"].max() == 1


def test_other_notes_are_another_experiment(finished, capsys) -> None:
    before = rows(finished["on"])
    for flag, printed in (
        ("--notes.gamma", "notes.gamma: 0.1 -> 0.5"),
        ("--notes.fraction", "notes.fraction: 1.0 -> 0.5"),
    ):
        assert main(["pretrain", "--resume", str(finished["on"]), flag, "0.5"]) == 2
        assert printed in capsys.readouterr().err
    assert main(["pretrain", "--resume", str(finished["off"]), "--notes.gamma", "0.5"]) == 0  # idle there
    assert rows(finished["on"]) == before


def test_the_loss_near_notes(finished) -> None:
    """Where the weight is 0, other notes change nothing; the positions near words are those of a search."""
    script = runpy.run_path(str(Path(__file__).parents[2] / "scripts" / "loss_near_notes.py"))
    setup, objective = script["load"](str(finished["on"]))
    losses = script["measure"](setup, objective, 40)
    assert losses.masked.sum() > 100 and (losses.values[~losses.masked] == 0).all()
    assert losses.values[losses.masked].mean() == pytest.approx(6.3, abs=0.4)
    words = setup.note_corpus.noted["new", "validation", 32]
    near, inside = script["neighbors"](words, losses, 3)
    expected = np.zeros_like(near), np.zeros_like(inside)
    for at, row in enumerate(losses.rows):
        masked = losses.positions[at][losses.masked[at]]
        for first, size in zip(words.index.positions - row * 31 + 1, words.index.lengths.astype(int), strict=True):
            if 1 <= first < 32:
                distance = np.maximum(first - losses.positions[at], losses.positions[at] - (first + size - 1))
                expected[1][at] |= distance <= 0
                expected[0][at] |= (distance <= 3) & (not ((masked >= first) & (masked < first + size)).any())
    assert np.array_equal(near, expected[0]) and np.array_equal(inside, expected[1]) and near.sum() > inside.sum() > 5
    baseline = script["measure"](*script["load"](str(finished["off"])), 40)
    unchanged = "+0.0000 ± 0.0000"
    assert script["compare"](baseline, str(finished["zero"]), 40, 16)[6:9] == [unchanged] * 3
    assert script["compare"](baseline, str(finished["on"]), 40, 16)[8] != unchanged  # without notes
    notes, others = (
        objective.notes.table,
        {name: f(objective.notes.table) for name, f in script["altered"](objective).items()},
    )
    assert torch.equal(others["shuffled"].sort(0)[0], notes.sort(0)[0]) and not torch.equal(others["shuffled"], notes)
    assert others["mean"].std(0).max() < 1e-6 < notes.std(0).min()
    with pytest.raises(UserError, match="has no note dictionary"):
        script["compare"](baseline, str(finished["off"]), 40, 16)
    objective.notes.writes[1:] = 0
    assert np.isnan(script["similarity"](objective))


@pytest.mark.parametrize("more", [["--sequences", "0"], ["--distance", "0"]])
def test_arguments_of_the_loss_near_notes(more, finished, capsys, monkeypatch) -> None:
    with pytest.raises(SystemExit, match=r"^2$"):
        loss_near_notes(finished["off"], finished["on"], more, monkeypatch)
    assert "must be at least 1, not 0" in capsys.readouterr().err


def test_the_baseline_of_the_loss_near_notes_has_none(finished, monkeypatch) -> None:
    with pytest.raises(UserError, match=r"baseline .* has a note dictionary"):
        loss_near_notes(finished["on"], finished["on"], [], monkeypatch)


def loss_near_notes(baseline: Path, run: Path, more: list[str], monkeypatch) -> None:
    """Runs the script."""
    script = runpy.run_path(str(Path(__file__).parents[2] / "scripts" / "loss_near_notes.py"))
    monkeypatch.setattr(sys, "argv", ["loss_near_notes.py", str(baseline), str(run), *more])
    script["main"]()


def refused(flags: list[str], tmp_path: Path, capsys) -> str:
    out = tmp_path / "run"
    capsys.readouterr()
    assert main(["pretrain", *flags, *NOTES, "--out", str(out)]) == 2
    assert not out.exists() or os.listdir(out) in ([], [".lock"])
    return capsys.readouterr().err


def test_refusals(flags, tmp_path, capsys, monkeypatch) -> None:
    printed = refused([*flags, "--notes.min-count", "20"], tmp_path, capsys)
    assert "--rare-min 20 --rare-max 500" in printed
    printed = refused([*flags, "--notes.min-count", "499"], tmp_path, capsys)
    assert "no word" in printed and "words occur" in printed and "--notes.min-count" in printed
    monkeypatch.setattr(note_corpus, "memory", lambda device: (1000, 1000))
    printed = refused(flags, tmp_path, capsys)
    assert "has 1.0 kB left" in printed and "words, width 32" in printed and "--notes.fraction" in printed


def test_a_source_is_prepared_with_the_requested_range(corpus, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    flags = ["--layers", "1", "--width", "16", "--heads", "1", "--length", "32", "--batch-size", "4", "--steps", "1"]
    source = ["--data", str(corpus), "--vocab-size", "600", "--validation-fraction", "0.1", "--eval-sequences", "4"]
    given = [*flags, *source, *NOTES, "--notes.min-count", "20", "--notes.max-count", "700", "--out", "run"]
    assert main(["pretrain", *given]) == 0
    (folder,) = (tmp_path / "data").iterdir()
    options = open_dataset(folder).record["options"]
    assert (options["rare_min"], options["rare_max"]) == (20, 700)
    printed = capsys.readouterr().err
    assert "words that occur 2" in printed and "of the segments of 25 words" in printed and "mostly noise" in printed


def test_the_fraction_that_is_printed_is_that_of_the_option(prepared: Path) -> None:
    dataset = open_dataset(prepared)
    stream, width = dataset.split("train"), segment_tokens(dataset)
    rare = stream.rare(0, len(stream))
    for fraction in (0.1, 1.0):
        options = NoteDictionaryOptions(enabled=True, fraction=fraction)
        line = find_note_words(options, dataset, 256, [256]).summary(10)[0]
        printed = re.fullmatch(r"note dictionary: (all )?.* times, in ([\d.]+) % of the segments of 25 words; .*", line)
        assert bool(printed[1]) == (fraction == 1)
        words = rare.positions[choose_words(dataset, 50, 500, fraction)[rare.words] >= 0]
        assert float(printed[2]) == pytest.approx(100 * len(set(words // width)) / (len(stream) / width), rel=0.05)


def test_a_dictionary_that_does_not_fit_is_refused(flags, tmp_path, capsys, monkeypatch) -> None:
    asked = []
    monkeypatch.setattr("fastbert.pretraining.build.check_space", lambda folder, size: asked.append(size))
    for more in ([], NOTES):
        assert main(["pretrain", *flags, *more, "--steps", "1", "--out", str(tmp_path / str(bool(more)))]) == 0
    words = len(last_checkpoint(tmp_path / "True")["notes.table"])
    assert asked[1] - asked[0] >= 3 * words * 4 * 32


def test_available_memory_is_part_of_the_machines(tmp_path) -> None:
    free = memory(torch.device("cpu"))[0]
    assert 2**20 < free < describe_machine()["memory_bytes"]
    assert group_memory(tmp_path) is None
    files = {"max": "max\n", "current": "900\n", "stat": "anon 500\nfile 400\ninactive_file 300\n"}
    for name, text in files.items():
        (tmp_path / f"memory.{name}").write_text(text)
    assert group_memory(tmp_path) is None
    (tmp_path / "memory.max").write_text("1000\n")
    assert group_memory(tmp_path) == (400, 1000)  # files that were read and are not in use can be dropped
