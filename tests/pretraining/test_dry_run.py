"""A dry run prints the cost of the run, leaves nothing behind, and refuses what the run would refuse."""

import re
import shutil
import signal
from dataclasses import replace

import hypothesis
import pytest
from hypothesis import strategies as st

from fastbert.pretraining import dry_run
from fastbert.pretraining.budget import Costs, saves_between, shown_time
from fastbert.pretraining.options import PretrainOptions
from fastbert.training.checkpoints import Checkpointer
from tests.flags import main
from tests.stand_ins import around_steps, free_space


@pytest.fixture(autouse=True)
def quick(monkeypatch) -> None:
    monkeypatch.setattr(dry_run, "SECONDS", 0.05)


def lines(printed: str) -> dict[str, str]:
    """name -> text in the table; continued lines are indented to the text."""
    rows = printed.replace("\n" + 14 * " ", " ").splitlines()[1:]
    return dict(row.strip().split(maxsplit=1) for row in rows)


def test_it_prints_what_the_run_does_and_leaves_nothing(flags, tmp_path, capsys, monkeypatch) -> None:
    saved = []
    real = Checkpointer.save
    monkeypatch.setattr(Checkpointer, "save", lambda *given, **named: saved.append(given[1]) or real(*given, **named))
    run = tmp_path / "runs" / "x"
    command = ["pretrain", *flags, "--out", str(run), "--checkpoint-words", "300,1k"]
    assert main([*command, "--dry-run"]) == 0
    assert list(tmp_path.iterdir()) == []
    found = capsys.readouterr().out
    saved.clear()
    assert main(command) == 0
    printed = capsys.readouterr().err
    assert f"nothing is written to {run}" in found
    table = lines(found)
    assert f"{float(re.search(r'([.0-9]+)k', table['parameters'])[1]) / 1000:.2f}M parameters" in printed
    assert table["steps"].startswith("30 steps of 8 x 32 tokens 7.68k tokens")
    assert re.search(rf"{printed.count('  validation  ')} validations .* {len(saved)} checkpoints", table["time"])
    assert table["exports"] == "chck_300 (step 3), chck_1k (step 9)" and f" {table['exports']}\n" in printed
    assert " 3 models of " in table["disk"] and ", 2 exports " in table["time"]
    assert table["steps"].endswith("epochs, 3.712k words")
    size = sum(file.stat().st_size for file in (run / "checkpoints" / "step-00000030").iterdir())
    assert abs(float(re.search(r"checkpoints of ([.0-9]+) kB", table["disk"])[1]) * 1000 / size - 1) < 0.02


def test_parts_and_second_network(flags, tmp_path, capsys) -> None:
    assert main(["pretrain", *flags, "--objective", "electra", "--out", str(tmp_path / "x"), "--dry-run"]) == 0
    table = lines(capsys.readouterr().out)
    total, *parts = (1000 * float(number) for number in re.findall(r"([.0-9]+)k", table["parameters"]))
    assert sum(parts) == pytest.approx(total, rel=0.01)
    assert [part for part in dry_run.PARTS if f"{part} " in table["parameters"]] == list(dry_run.PARTS)
    assert table["networks"] == (
        "encoder: layers 2, width 32, heads 2, inner width 128 generator: layers 2, width 8, heads 1, inner width 32"
    )


def test_a_resumed_run_shows_the_remaining_steps(flags, tmp_path, capsys) -> None:
    run = str(tmp_path / "x")
    shorter = ["pretrain", *flags, "--steps", "20", "--out", run]
    assert main(shorter) == 0
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    assert main([*shorter, "--resume", "--dry-run"]) == 0
    assert "steps       0 remaining of 20 steps of 8 x 32" in capsys.readouterr().out
    shutil.rmtree(tmp_path / "x" / "checkpoints" / "step-00000020")
    assert main(["pretrain", "--resume", run, "--dry-run"]) == 0
    printed = capsys.readouterr().out
    assert "steps       6 remaining of 20 steps of 8 x 32 tokens\n              1.536k tokens" in printed
    assert {path for path in tmp_path.rglob("*")} <= set(before)
    assert all(path.stat().st_mtime_ns == before[path] for path in tmp_path.rglob("*") if path.is_file())


def test_the_time_is_the_sum_of_its_parts(flags, tmp_path, capsys, monkeypatch) -> None:
    real = dry_run.measure

    def measure(*arguments):
        usage, trainer = real(*arguments)
        costs = Costs(start=5.0, step=lambda *shape: 2.0, validation=10.0, checkpoint=3.0, export=4.0, finish=6.0)
        times = {(8, 32): dry_run.Timed(2.0, 9)}
        return replace(usage, costs=costs, steps=times, optimizer=0, weights=0, peak=7_000_000), trainer

    monkeypatch.setattr(dry_run, "measure", measure)
    assert main(["pretrain", *flags, "--out", str(tmp_path / "x"), "--dry-run"]) == 0
    table = lines(capsys.readouterr().out)
    assert table["time"].startswith("2:02 min")  # 5 + 30 * 2 + 3 * 10 + 7 * 3 + 6 = 122 s
    assert table["speed"].startswith("2 s a step, 128 tokens/s")
    assert "activations and the rest 7 MB" in table["memory"]


def test_stages_are_timed_separately(flags, tmp_path, capsys) -> None:
    more = ["--first-length", "16", "--first-fraction", "0.5"]
    assert main(["pretrain", *flags, *more, "--out", str(tmp_path / "x"), "--dry-run"]) == 0
    found = capsys.readouterr().out
    assert "  16 x 16     " in found and "  8 x 32      " in found


def test_milestones_count_as_validations_and_checkpoints() -> None:
    options = PretrainOptions(steps=10, eval_every=4, checkpoint_every=3, milestones="1,9")
    assert saves_between(options, 0, 10) == (5, 7)  # 1 4 8 9 10; and 3 6
    assert saves_between(options, 8, 10) == (2, 2)


@hypothesis.given(
    st.integers(1, 40), st.integers(1, 40), st.integers(1, 300), st.integers(0, 300), st.sets(st.integers(1, 300))
)
def test_saves_are_counted_without_listing_them(validate: int, save: int, steps: int, done: int, marks: set) -> None:
    milestones = ",".join(map(str, sorted(mark for mark in marks if mark <= steps))) or None
    options = PretrainOptions(eval_every=validate, checkpoint_every=save, steps=steps, milestones=milestones)
    marked = {steps, *options.milestone_steps()}
    validated = {step for step in range(1, steps + 1) if step in marked or step % validate == 0}
    saved = {step for step in range(1, steps + 1) if step in validated or step % save == 0}
    assert saves_between(options, done, steps) == tuple(
        sum(step > done for step in found) for found in (validated, saved)
    )


def test_the_saves_of_the_longest_run() -> None:
    options = PretrainOptions(eval_every=1, checkpoint_every=1, steps=2**31 - 1)
    assert saves_between(options, 0, options.steps) == (options.steps, options.steps)


def test_an_interrupted_dry_run_leaves_nothing(flags, tmp_path, monkeypatch) -> None:
    around_steps(monkeypatch, lambda trainer, step: signal.raise_signal(signal.SIGTERM))
    assert main(["pretrain", *flags, "--out", str(tmp_path / "x"), "--dry-run"]) == 143
    assert list(tmp_path.iterdir()) == []


def test_refusals(flags, tmp_path, capsys, monkeypatch) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    x, full = str(tmp_path / "x"), str(tmp_path / "full")
    for given, message in (
        ([*flags, "--out", full], "already contains other files"),
        ([*flags, "--batch-size", "100000", "--out", x], "less than one batch"),
        ([*flags, "--out", x, "--schedule.warmup", "40"], "warm-up"),
        ([*flags, "--out", x, "--tokens", "100"], "give one of --steps, --tokens and --minutes"),
        ([*flags, "--out", x, "--profile"], "not both"),
    ):
        assert main(["pretrain", *given, "--dry-run"]) == 2
        assert message in capsys.readouterr().err
    free_space(monkeypatch, 1000)
    assert main(["pretrain", *flags, "--out", x, "--dry-run"]) == 2
    printed = capsys.readouterr().err
    assert "checkpoints need" in printed and f"the disk of {tmp_path / 'x'} has" in printed
    assert [path.name for path in tmp_path.iterdir()] == ["full"]


def test_tables_are_short() -> None:
    assert [shown_time(seconds) for seconds in (0.12, 59, 61, 7265)] == ["0.12 s", "59 s", "1:01 min", "2:01:05 h"]
    assert [dry_run.shown_count(count) for count in (12, 1234, 3.2e13)] == ["12", "1.234k", "32T"]
    assert [dry_run.shown_size(size) for size in (1200, 5e6, 7.25e9)] == ["1.2 kB", "5 MB", "7.25 GB"]
