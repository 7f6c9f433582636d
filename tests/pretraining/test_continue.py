"""A run that continues pretraining on new data: replay of old data, and validation on both."""

import json
import shutil
from dataclasses import replace
from fractions import Fraction
from math import floor
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from fastbert.config import from_dict, load_yaml
from fastbert.data.replay import ReplayOptions
from fastbert.data.shards import open_dataset
from fastbert.data.tokenizer_folders import load_tokenizer
from fastbert.errors import UserError
from fastbert.named_configs import shipped
from fastbert.pretraining import dry_run, on_ray
from fastbert.pretraining.exports import card_facts, words_seen
from fastbert.pretraining.loop import Progress
from fastbert.pretraining.options import PretrainOptions
from fastbert.pretraining.pretrain import with_prepared
from fastbert.pretraining.setup import prepare_setup
from tests.flags import last_given, main
from tests.new_data import prepare_with
from tests.pretraining.test_resume import assert_same_run, metrics, run_and_die

pytestmark = pytest.mark.figures

SHAPE = ("--layers", "--width", "--heads", "--position")


@pytest.fixture(scope="module")
def old(prepared: Path, tmp_path_factory) -> Path:
    return prepare_with(load_tokenizer(prepared), tmp_path_factory.mktemp("old") / "old", 0)


@pytest.fixture
def short(flags, new) -> list[str]:
    given = [*flags, "--data", str(new), "--steps", "9", "--eval-every", "3", "--checkpoint-every", "4"]
    return last_given([*given, "--log-every", "1", "--machine.precision", "fp32"])


def without_shape(flags: list[str]) -> list[str]:
    return [word for pair in zip(flags[::2], flags[1::2], strict=True) if pair[0] not in SHAPE for word in pair]


def science_of(run: Path) -> dict:
    return json.loads((run / "manifest.json").read_text())["science"]


def test_no_fraction_is_no_replay_to_the_bit(short, old, tmp_path) -> None:
    """The old data is then validated only, and the experiment has the same hash."""
    assert main(["pretrain", *short, "--out", str(tmp_path / "without")]) == 0
    replay = ["--replay.data", str(old), "--replay.fraction"]
    assert main(["pretrain", *short, *replay, "0", "--out", str(tmp_path / "zero")]) == 0
    assert main(["pretrain", *short, *replay, "0.25", "--out", str(tmp_path / "quarter")]) == 0
    weights = [
        load_file(tmp_path / name / "checkpoints" / "step-00000009" / "model.safetensors")
        for name in ("without", "zero", "quarter")
    ]
    equal = [all(torch.equal(weights[0][key], other[key]) for key in weights[0]) for other in weights]
    assert equal == [True, True, False]
    without, zero, quarter = (science_of(tmp_path / name) for name in ("without", "zero", "quarter"))
    assert without == zero != quarter
    assert (quarter["replay.fraction"], quarter["replay.seed"]) == (0.25, 0)
    own = [row for row in metrics(tmp_path / "zero") if row["split"] == "validation"]
    assert own[1:] == [row for row in metrics(tmp_path / "without") if row["split"] == "validation"]


def test_killed_and_resumed_with_notes_and_stages(short, old, new, tmp_path, capsys) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    more = ["--replay.data", str(old), "--replay.fraction", "0.3", "--eval-data", f"extra={new}", "--best-by", "mean"]
    notes = ["--notes.enabled", "--notes.fraction", "1", "--notes.min-count", "5", "--notes.max-count", "60"]
    more += [*notes, "--first-length", "16", "--first-fraction", "0.5"]
    assert main(["pretrain", *short, *more, "--out", str(whole)]) == 0
    run_and_die("step", 2, ["pretrain", *short, *more, "--out", str(broken)])
    run_and_die("step", 6, ["pretrain", "--resume", str(broken)])
    assert main(["pretrain", "--resume", str(broken)]) == 0
    assert_same_run(whole, broken)
    splits = {split: [row for row in metrics(whole) if row["split"] == split] for split in ("validation", "train")}
    assert [row["step"] for row in splits["validation"]] == [0, 3, 6, 9]
    printed = capsys.readouterr()
    assert "replay: 12 of 40 sequences of 32 tokens are old data" in printed.err
    assert "Learned and forgotten" in printed.out and "  old: loss" in printed.out
    page = (whole / "report" / "index.html").read_text()
    assert "Learned and forgotten" in page and "validation of old" in page and "30 % of the rows" in page
    extra, own = (
        [row["loss"] for row in metrics(whole) if row["split"] == split] for split in ("validation/extra", "validation")
    )
    assert extra == own and len(own) == 4
    state = json.loads((whole / "checkpoints" / "step-00000009" / "manifest.json").read_text())
    last = {row["split"]: row["loss"] for row in metrics(whole) if row["step"] == 9}
    names = ("validation", "validation/old", "validation/extra")
    assert state["metric"] == pytest.approx(sum(last[name] for name in names) / 3)


def test_the_order_of_the_old_run_is_repeated(short, old, new, tmp_path) -> None:
    """By default the seed of replay is that of the run in --init-from, and the loss starts where that run ended."""
    base = tmp_path / "base"
    flags = last_given([*short, "--data", str(old), "--seed", "5"])
    assert main(["pretrain", *flags, "--out", str(base)]) == 0
    more = ["--init-from", str(base), "--replay.data", str(old), "--replay.fraction", "0.5", "--best-by", "old"]
    assert main(["pretrain", *without_shape(short), *more, "--out", str(tmp_path / "on")]) == 0
    assert science_of(tmp_path / "on")["replay.seed"] == 5
    ended = [row["loss"] for row in metrics(base) if row["split"] == "validation"][-1]
    old_rows = [row for row in metrics(tmp_path / "on") if row["split"] == "validation/old"]
    assert (old_rows[0]["step"], old_rows[0]["loss"]) == (0, ended)
    best = min(row["loss"] for row in old_rows[1:])
    state = json.loads((tmp_path / "on" / "checkpoints" / "step-00000009" / "state.json").read_text())
    assert state["progress"]["best"] == best
    before = rows_of(PretrainOptions(data=str(old), seed=5, length=32, batch_size=8, steps=9))
    assert rows_of(options_of(tmp_path / "on"))[1::2] == before[:36]


def options_of(run: Path) -> PretrainOptions:
    return load_yaml(PretrainOptions, run / "config.yaml")


def rows_of(options: PretrainOptions) -> list[list[int]]:
    """The rows of all steps, as ids."""
    batches = prepare_setup(replace(options, init_from=None)).batches()
    return [row for step in range(options.steps) for batch in batches.at(step) for row in batch.input_ids.tolist()]


def test_old_data_keeps_its_tokens(short, old, grown, tmp_path) -> None:
    """A vocabulary that has grown changes nothing in the old rows."""
    flags = ["--data", str(grown), "--replay.data", str(old), "--replay.fraction", "0.5"]
    assert main(["pretrain", *short, *flags, "--out", str(tmp_path / "run")]) == 0
    rows = rows_of(options_of(tmp_path / "run"))
    before = rows_of(PretrainOptions(data=str(old), length=32, batch_size=8, steps=9))
    assert rows[1::2] == before[: len(rows) // 2]
    assert open_dataset(grown).split("train").unigrams[600:].min() > 0


def test_old_data_from_a_source_that_is_gone(short, old, tmp_path, monkeypatch) -> None:
    """It is prepared with the tokenizer of --data, and the prepared folder is used again."""
    monkeypatch.chdir(tmp_path)
    text, run = tmp_path / "old.txt", tmp_path / "run"
    text.write_text((old.parent / "text.txt").read_text())
    flags = [*short, "--replay.data", str(text), "--replay.fraction", "0.3", "--validation-fraction", "0.1"]
    assert main(["pretrain", *flags, "--out", str(run)]) == 0
    before = metrics(run)
    shutil.rmtree(run / "checkpoints" / "step-00000009")
    text.unlink()
    assert main(["pretrain", "--resume", str(run)]) == 0
    assert metrics(run) == before


def test_notes_are_as_frequent_as_in_the_mixture(old, new) -> None:
    """The dictionary's FLOPs are those of the rows that are read."""
    notes = {"enabled": True, "fraction": 1.0, "min_count": 5, "max_count": 60}
    given = {"data": str(new), "replay": {"data": str(old), "fraction": 0.3, "seed": 0}, "notes": notes}
    setup = prepare_setup(from_dict(PretrainOptions, {**given, "length": 32, "batch_size": 8, "steps": 9}, ""))
    mixed = setup.batches().rows[32].noted.frequencies
    assert setup.note_corpus.frequencies == mixed != setup.note_corpus.train.frequencies
    assert setup.objective().notes.frequencies == mixed


def test_words_of_old_rows_are_counted_with_their_own_text(old, new, tmp_path) -> None:
    """Both lengths of the run; and the words of a run without replay are those of the new text."""
    given = {"data": str(new), "length": 32, "batch_size": 8, "steps": 10, "first_length": 16, "first_fraction": 0.5}
    given |= {"layers": 1, "width": 16, "heads": 1, "schedule": {"final": 0.0}}
    replay = {"data": str(old), "fraction": 0.3}
    setups = [
        prepare_setup(from_dict(PretrainOptions, given | more, ""))
        for more in ({}, {"replay": replay}, {"replay": replay | {"fraction": 0.0}})
    ]
    per_token = []
    for folder in (old, new):
        splits = [source["train"] for source in json.loads((folder / "dataset.json").read_text())["sources"]]
        words = sum(split["whitespace_words"] for split in splits)
        per_token.append(Fraction(words, len(open_dataset(folder).split("train"))))
    old_tokens, new_tokens = 24 * 15 + 12 * 31, 56 * 15 + 28 * 31  # of 80 rows of 16 tokens and 40 of 32
    mixed = floor(old_tokens * per_token[0]) + floor(new_tokens * per_token[1])
    assert floor((old_tokens + new_tokens) * per_token[1]) != mixed
    assert words_seen(setups[1], 10) == mixed
    assert words_seen(setups[0], 10) == words_seen(setups[2], 10) == floor((old_tokens + new_tokens) * per_token[1])
    facts = [card_facts(one, one.objective(), Progress(step=10)) for one in setups[:2]]
    assert facts[0]["words"] == words_seen(setups[0], 10) and "old data" not in facts[0]
    assert facts[1]["words"] == mixed and facts[1]["old data"] == f"30 % of the rows, {old}"


def test_the_dry_run_counts_the_epochs_of_the_new_data(short, old, new, tmp_path, capsys, monkeypatch) -> None:
    """And the validation before the first step."""
    for name, value in {"SECONDS": 0.02, "finish": lambda *given: None, "export": lambda *given: None}.items():
        monkeypatch.setattr(dry_run, name, value)
    more = ["--replay.data", str(old), "--replay.fraction", "0.5", "--dry-run", "--out", str(tmp_path / "run")]
    assert main(["pretrain", *short, *more, "--steps", "20"]) == 0
    printed = capsys.readouterr().out
    rows = len(open_dataset(new).split("train")) // 31
    assert f"{new}: {rows:,} rows of 32 tokens" in printed
    assert f"{80 / rows:.2g} epochs" in printed
    assert "8 validations" in printed  # after 0, 3, 6, ..., 18 and 20 steps


def test_old_data_is_prepared_before_the_workers_of_ray_start(old, new, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    text = tmp_path / "old.txt"
    text.write_text((old.parent / "text.txt").read_text())
    options = PretrainOptions(data=str(new), replay=ReplayOptions(data=str(text)), validation_fraction=0.1)
    on_ray.prepare_data(options)
    text.unlink()
    folder = next(path.parent for path in tmp_path.rglob("dataset.json"))
    assert open_dataset(folder).fingerprint == open_dataset(new).fingerprint


def test_a_config_that_has_lost_the_old_data_is_not_completed() -> None:
    """The manifest's folder replaces only the source that the run was started with."""
    folder = str(Path(__file__).parent)
    manifest = {"replay": {"folder": folder}, "data": {"folder": folder}}
    with_old = PretrainOptions(data="a.txt", replay=ReplayOptions(data="b.txt"))
    assert with_prepared(with_old, manifest, with_old).replay.data == folder
    without = replace(with_old, replay=ReplayOptions())
    assert with_prepared(without, manifest, without) == replace(without, data=folder)


def refused(capsys, tmp_path: Path, *flags: str) -> str:
    capsys.readouterr()
    assert main(["pretrain", *flags, "--out", str(tmp_path / "run")]) == 2
    assert not (tmp_path / "run").exists()
    return capsys.readouterr().err


def test_bad_input(short, old, new, grown, prepared, tmp_path, capsys) -> None:
    cased = prepare_with(replace(load_tokenizer(prepared), lowercase=False), tmp_path / "cased", 0)
    text = tmp_path / "empty.txt"
    for flags, message in (
        (["--replay.data", str(cased)], "do_lower_case is False in"),
        (["--replay.data", str(grown)], "id 600 is 'vietnam' in"),
        (["--replay.data", str(text)], "--replay.data is neither prepared data nor a source: source"),
        (["--replay.data", str(old), "--replay.fraction", "1"], "must be in [0, 1), not 1"),
        (["--replay.data", str(old), "--replay.fraction", "-0.1"], "must be in [0, 1), not -0.1"),
        (["--replay.fraction", "0.25"], "--replay.fraction needs the old data, --replay.data"),
        (["--replay.seed", "1"], "--replay.seed needs the old data, --replay.data"),
        (["--eval-data", str(old)], "must be names and prepared folders"),
        (["--eval-data", f"new={old}"], "new is reserved"),
        (["--eval-data", f"a={old},a={new}"], "names a twice"),
        (["--eval-data", f"a={tmp_path}"], f"{tmp_path} is not a prepared folder"),
        (["--eval-data", f"a={cased}"], "--eval-data a: the tokenizer of"),
        (["--eval-data", f"old={new}", "--replay.data", str(old)], "old is the name of --replay.data"),
        (["--best-by", "old"], "--best-by old needs the old data, --replay.data"),
        (["--best-by", "extra"], "unknown best-by 'extra'"),
    ):
        printed = refused(capsys, tmp_path, *short, *flags)
        assert message in printed, printed
    run = tmp_path / "on"
    assert main(["pretrain", *short, "--replay.data", str(old), "--out", str(run)]) == 0
    capsys.readouterr()
    assert main(["pretrain", "--resume", str(run), "--replay.fraction", "0.1"]) == 2
    assert "replay.fraction: 0.05 -> 0.1" in capsys.readouterr().err
    assert main(["pretrain", "--resume", str(run), "--replay.data", str(new)]) == 2
    assert "resume with --data (and --replay.data" in capsys.readouterr().err
    assert main(["pretrain", "--resume", str(run), "--replay.data", str(tmp_path / "gone")]) == 2
    error = capsys.readouterr().err
    assert f"--replay.data: source '{tmp_path / 'gone'}' does not exist" in error
    assert main(["pretrain", "--resume", str(run), "--eval-data", f"a={tmp_path / 'gone'}"]) == 2
    error = capsys.readouterr().err
    assert f"--eval-data a: dataset {tmp_path / 'gone'} does not exist" in error and "give --eval-data None" in error
    assert main(["pretrain", "--resume", str(run), "--eval-data", "None"]) == 0
    text = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(text.replace(f"data: {old}", "data: null"))
    assert main(["pretrain", "--resume", str(run), "--replay.fraction", "0.05", "--replay.seed", "4"]) == 2
    assert "--replay.seed needs the old data, --replay.data" in capsys.readouterr().err


def test_the_configuration_leaves_the_shape_to_the_run(old) -> None:
    """`continue` fits a run of any shape, and needs one: it never trains random weights."""
    given = load_yaml(PretrainOptions, shipped("configs/pretrain/continue.yaml"))
    untouched = {"dropout", "attention_dropout"}
    default = PretrainOptions().encoder
    assert replace(given.encoder, **{name: getattr(default, name) for name in untouched}) == default
    with pytest.raises(UserError, match="there is no folder runs/wikipedia"):
        replace(given, data=str(old)).check_inputs()
    wikipedia = load_yaml(PretrainOptions, shipped("configs/pretrain/wikipedia.yaml"))
    for name in ("length", "batch_size", "minutes", "optimizer", "stages", "machine"):
        assert getattr(given, name) == getattr(wikipedia, name), name
