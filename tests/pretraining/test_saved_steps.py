"""Steps of a run that are saved on request: checkpoints at --milestones, and exports after --checkpoint-words."""

import json
from dataclasses import replace
from fractions import Fraction
from itertools import accumulate
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForMaskedLM

from fastbert.data.shards import open_dataset, read_record, whitespace_words
from fastbert.data.stages import StageOptions, make_plan
from fastbert.errors import UserError
from fastbert.pretraining import build, exports
from fastbert.pretraining.checkpoint_words import MOST, parse_counts, short_count
from fastbert.pretraining.exports import export_steps, words_seen
from fastbert.pretraining.options import PretrainOptions
from fastbert.pretraining.run import RunFolder
from fastbert.records import seal_of, write_json
from tests.flags import main

WORDS = "300,700,1.4k,1.45k"
"""Of `flags`: in the first 3, 6, 12 and 12 steps."""


def files(folder: Path) -> dict[str, bytes]:
    """The files of an export, without its card."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "README.md"}


def test_a_run_keeps_its_milestones_and_exports(flags, tmp_path, capsys) -> None:
    """Milestones are logged and validated, and stay when later checkpoints push others out; exports are the models of
    their steps; training is as without them."""
    flags = [*flags, "--position", "absolute", "--keep-checkpoints", "1"]
    plain, marked = tmp_path / "plain", tmp_path / "marked"
    assert main(["pretrain", *flags, "--out", str(plain)]) == 0
    assert "Exports" not in capsys.readouterr().out
    assert main(["pretrain", *flags, "--out", str(marked), "--milestones", "3,12", "--checkpoint-words", WORDS]) == 0
    printed = capsys.readouterr()
    assert "chck_300 (step 3), chck_700 (step 6), chck_1.4k (step 12), chck_1.45k (step 12)\n" in printed.err
    assert f"\nExports {marked}/exports\n" in printed.out
    retained = {run.name: {path.name[-2:] for path in (run / "checkpoints").iterdir()} for run in (plain, marked)}
    assert {"03", "12", "30"} <= retained["marked"] and not {"03", "12"} & retained["plain"]
    last = "checkpoints/step-00000030/model.safetensors"
    assert (plain / last).read_bytes() == (marked / last).read_bytes()
    assert len({json.loads((run / "manifest.json").read_text())["experiment"] for run in (plain, marked)}) == 1
    steps = [json.loads(line) for line in (marked / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in steps if row["split"] == "validation"] == [3, 10, 12, 20, 30]
    assert [row["step"] for row in steps if row["split"] == "train"] == [3, 5, 10, 12, 15, 20, 25, 30]

    exports = marked / "exports"
    assert {path.name for path in exports.iterdir()} == {"chck_300", "chck_700", "chck_1.4k", "chck_1.45k"}
    for step, names in ((3, ["chck_300"]), (12, ["chck_1.4k", "chck_1.45k"])):
        checkpoint, out = marked / "checkpoints" / f"step-{step:08d}", tmp_path / f"exported-{step}"
        assert main(["export", str(checkpoint), "--out", str(out)]) == 0
        assert all(files(exports / name) == files(out) for name in names)
    cards = [(exports / name / "README.md").read_text() for name in ("chck_300", "chck_700")]
    assert "\n# chck_300\n" in cards[0] and "| words | 371 |" in cards[0] and "| steps | 6 |" in cards[1]
    assert ["validation loss" in card for card in cards] == [True, False]  # step 6 is not validated
    early, late = (AutoModelForMaskedLM.from_pretrained(folder) for folder in (exports / "chck_300", marked / "model"))
    assert not torch.equal(early.bert.embeddings.word_embeddings.weight, late.bert.embeddings.word_embeddings.weight)

    before = {path: path.stat().st_mtime_ns for path in exports.rglob("*")}
    assert main(["pretrain", "--resume", str(marked), "--checkpoint-words", "300,900"]) == 0
    assert "not exported, because the run resumes at step 30: chck_900 (step 8); if" in capsys.readouterr().err
    assert {path: path.stat().st_mtime_ns for path in exports.rglob("*")} == before
    (exports / "chck_900").mkdir()
    (exports / "chck_900" / "thesis.txt").touch()
    assert main(["pretrain", "--resume", str(marked), "--checkpoint-words", "300,900"]) == 2
    assert f"{exports}/chck_900 is not empty and is not an export of fastbert" in capsys.readouterr().err
    (exports / "chck_900").rename(tmp_path / "elsewhere")
    (exports / "chck_900").symlink_to(tmp_path / "elsewhere")
    assert main(["pretrain", "--resume", str(marked), "--checkpoint-words", "300,900"]) == 2
    assert f"{exports}/chck_900 is a link" in capsys.readouterr().err


def test_milestones_that_are_refused(flags, tmp_path, capsys) -> None:
    for given_, reason in (("3,x", "1000,3000"), ("0", "1000,3000"), ("31", "is beyond the 30 steps")):
        assert main(["pretrain", *flags, "--out", str(tmp_path / "run"), "--milestones", given_]) == 2
        assert reason in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@given(st.sets(st.integers(1, 10**11), min_size=1), st.integers(1, 10**6), st.integers(1, 30))
def test_lists_of_words(counts: set[int], gap: int, length: int) -> None:
    listed = sorted(counts)
    assert parse_counts(", ".join(map(short_count, listed))) == listed
    last = listed[-1]
    text = ",".join(map(str, [*listed, last + gap, "...", last + gap * length]))
    if length > 1:
        assert parse_counts(text) == [*listed, *range(last + gap, last + gap * length + 1, gap)]


def test_the_list_of_babylm() -> None:
    """Its evaluation reads the revisions chck_1M, chck_2M, ..."""
    counts = parse_counts("1M,2M,...,10M,20M,...,100M")
    assert list(map(short_count, counts)) == [f"{n}M" for n in (*range(1, 11), *range(20, 101, 10))]
    assert [short_count(count) for count in (999, 1500, 1_500_000, 10**9)] == ["999", "1.5k", "1.5M", "1000M"]


@pytest.mark.parametrize(
    "text",
    [
        *("1M,", "0", "0.5", "2M,1M", "1M,1000k", "1m", "1e6", "-1M", "1.0000001M", "...,1M", "1M,...,3M", "1M,2M,..."),
        *("1M,2M,...,...,5M", "1M,3M,...,6M", "1M,2M,...,1.5M", f"1,2,...,{MOST + 1}", "1,2,...,99999999M"),
    ],
)
def test_lists_that_are_refused(text: str) -> None:
    with pytest.raises(UserError, match="checkpoint_words must be"):
        PretrainOptions(checkpoint_words=text)


def setup_of(words: int, tokens: int, options: PretrainOptions) -> SimpleNamespace:
    """The parts of a PretrainSetup that decide about words, of a training split of this size."""
    record = {"sources": [{"train": {"whitespace_words": part}} for part in (words // 3, words - words // 3)]}
    dataset = SimpleNamespace(record=record, split=lambda name: range({"train": tokens}[name]), folder="data")
    return SimpleNamespace(
        options=options,
        dataset=dataset,
        plan=lambda steps: make_plan(options.stages, options.batch_size, options.length, steps),
    )


@given(
    *(st.integers(1, 60), st.integers(1, 10**6), st.floats(0.2, 1)),
    *(st.sampled_from([None, 4]), st.sampled_from([None, 1]), st.sets(st.floats(0, 1), min_size=1, max_size=5)),
)
def test_each_export_is_after_the_first_step_with_its_words(
    steps: int, tokens: int, density: float, first_length: int | None, initial: int | None, parts: set
) -> None:
    """Also with sequences and batches that grow: the number of words is summed over the steps here. A run of too few
    steps is refused with the number that suffices."""
    words = max(1, int(density * tokens))
    stages = StageOptions(first_length=first_length, first_fraction=0.5, initial_batch_size=initial, batch_warmup=0.5)
    options = PretrainOptions(steps=steps, batch_size=6, length=12, stages=stages)
    setup = setup_of(words, tokens, options)

    def seen_after(steps: int) -> list[Fraction]:
        shapes = [setup.plan(steps).at(step).shape for step in range(steps)]
        return list(accumulate(Fraction(rows * (length - 1) * words, tokens) for rows, length in shapes))

    *_, total = reached = seen_after(steps)
    if total < 1:
        return
    counts = sorted({max(1, int(part * total)) for part in parts})
    setup.options = replace(options, checkpoint_words=",".join(map(str, counts)))
    expected: dict[int, list[str]] = {}
    for count in counts:
        step = next(number for number, seen in enumerate(reached, 1) if seen >= count)
        expected.setdefault(step, []).append(f"chck_{short_count(count)}")
    assert export_steps(setup) == expected
    setup.options = replace(options, checkpoint_words=f"1,{2 * int(total)}")  # the last one is beyond the run
    with pytest.raises(UserError, match=rf"the run sees {int(total):,} words in its {steps} steps; leave out") as error:
        export_steps(setup)
    enough = int(str(error.value).split()[-2])
    assert seen_after(enough)[-1] >= 2 * int(total) > seen_after(enough - 1)[-1]


def test_an_epoch_has_all_words(corpus, prepared) -> None:
    """Up to the last tokens of the split, which fill no row."""
    dataset = open_dataset(prepared)
    words, held_out = (whitespace_words(dataset.record, split) for split in ("train", "validation"))
    assert words + held_out == len(corpus.read_text().split())
    tokens = len(dataset.split("train"))
    options = PretrainOptions(steps=tokens // 31, batch_size=1, length=32)
    setup = setup_of(words, tokens, options)
    assert 0 <= words - words_seen(setup, options.steps) <= 31


def test_data_without_counted_words(flags, prepared, tmp_path, capsys) -> None:
    """That an older version prepared."""
    old = tmp_path / "old"
    old.mkdir()
    for path in prepared.iterdir():
        (old / path.name).symlink_to(path)
    record = read_record(prepared)
    for source in record["sources"]:
        for split in ("train", "validation"):
            del source[split]["whitespace_words"]
    (old / "dataset.json").unlink()
    write_json(old / "dataset.json", {**record, "seal": seal_of(record)})
    command = ["pretrain", *flags, "--data", str(old), "--out", str(tmp_path / "run")]
    assert main([*command, "--checkpoint-words", "300"]) == 2
    assert f"the number of words in {old}, which an older version" in capsys.readouterr().err
    assert main([*command, "--steps", "1", "--layers", "1"]) == 0
    assert "| words | not counted |" in (tmp_path / "run" / "model" / "README.md").read_text()


def test_exports_need_space(flags, tmp_path, monkeypatch) -> None:
    sizes, needed = [], []

    def check_space(folder: Path, size: int) -> None:
        needed.append(size)
        raise UserError("the disk is full")

    monkeypatch.setattr(build, "check_space", check_space)
    monkeypatch.setattr(build, "checkpoint_size", lambda objective: sizes.append(objective.parameter_count()) or 0)
    for more in ([], ["--checkpoint-words", WORDS]):
        assert main(["pretrain", *flags, "--out", str(tmp_path / "run"), *more]) == 2
    assert needed == [0, 4 * 4 * sizes[0]]


def test_exports_that_are_written_or_missed(tmp_path, monkeypatch) -> None:
    """A run that resumes after a step writes no export of that step, and none twice."""
    run = RunFolder(tmp_path)
    (run.exports / "chck_1").mkdir(parents=True)
    (run.exports / "chck_1" / "config.json").touch()
    lines = exports.export_lines(run, {3: ["chck_1", "chck_2"], 4: ["chck_3"], 5: ["chck_4"]}, 4)
    assert "the run resumes at step 4: chck_2 (step 3), chck_3 (step 4);" in lines[1]
    written = []
    monkeypatch.setattr(exports, "export", lambda setup, objective, run, progress, out: written.append(out.name))
    exports.export_words(None, None, run, None, ["chck_1", "chck_2"])
    assert written == ["chck_2"]
