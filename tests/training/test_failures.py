"""Failures of one of several processes that pretrain together: every process ends, the exit code and one message report
the cause, and the resumed run equals the uninterrupted one."""

import re
import signal
from pathlib import Path

import pytest

from fastbert.training.checkpoints import Checkpointer
from fastbert.training.logbook import read_metrics
from tests.launch import LOSSES, SAVE, TRAIN, Ended, Failure, launch, torchrun

STEPS, EVERY = 9, 3
SETUP = "fastbert.pretraining.pretrain:prepare_setup"  # while the first one prepares the data, the others wait
FINGERPRINT = "fastbert.pretraining.setup:data_fingerprint"  # after that, but before they are connected


@pytest.fixture(scope="module")
def options(prepared: Path) -> list[str]:
    return [
        *("--data", str(prepared), "--layers", "2", "--width", "32", "--heads", "2", "--length", "32"),
        *("--batch-size", "8", "--machine.micro-batch-size", "2", "--steps", str(STEPS), "--log-every", "1"),
        *("--eval-every", str(EVERY), "--checkpoint-every", str(EVERY), "--eval-sequences", "8"),
        *("--machine.precision", "fp32", "--machine.threads", "1"),
    ]


@pytest.fixture(scope="module")
def uninterrupted(options: list[str], tmp_path_factory) -> Path:
    """The run of two processes without a failure."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    assert pretrain(options, folder).codes == [0, 0]
    return folder / "run"


def pretrain(options: list[str], folder: Path, *failures: Failure, **launcher: object) -> Ended:
    """Starts folder/run on two processes, or resumes it."""
    run, timeout = folder / "run", launcher.pop("timeout", 8.0)
    arguments = ["--resume", str(run)] if run.exists() else [*options, "--out", str(run)]
    return launch(2, ["pretrain", *arguments, "--machine.timeout", str(timeout)], folder, failures, **launcher)


def saved(run: Path) -> list[int]:
    """Steps of the checkpoints."""
    return [int(path.name.removeprefix("step-")) for path in Checkpointer(run / "checkpoints", 10, print).paths()]


def assert_equal(run: Path, other: Path) -> None:
    """The last checkpoints of two runs are equal to the bit, and so are their records, except the rates."""
    for name in ("model.safetensors", "optimizer.safetensors"):
        last, expected = (folder / "checkpoints" / f"step-{STEPS:08d}" / name for folder in (run, other))
        assert last.read_bytes() == expected.read_bytes()
    records = [read_metrics(folder / "metrics.jsonl") for folder in (run, other)]
    for record in (*records[0], *records[1]):
        record.pop("tokens_per_second", None), record.pop("mfu", None)
    assert records[0] == records[1]


def assert_lost(ended: Ended, codes: list[int]) -> None:
    assert ended.codes == codes
    assert len(ended.errors) == 1 and re.match(r"error: process \d has lost the others", ended.errors[0])


def assert_user_error(ended: Ended, message: str) -> None:
    assert ended.codes == [2, 2]
    assert len(ended.errors) == 1 and message in ended.errors[0]


def test_killed_in_a_step_and_resumed(options, uninterrupted, tmp_path):
    ended = pretrain(options, tmp_path, (1, TRAIN, EVERY + 2, "kill"))
    assert_lost(ended, [1, -signal.SIGKILL])
    assert saved(tmp_path / "run") == [EVERY]
    assert pretrain(options, tmp_path).codes == [0, 0]
    assert_equal(tmp_path / "run", uninterrupted)


@pytest.mark.parametrize("agent", [True, False])
def test_first_killed_while_it_saves(options, tmp_path, agent):
    """The other one waits for its word, which no launcher interrupts."""
    ended = pretrain(options, tmp_path, (0, SAVE, 3, "kill"), agent=agent)
    assert_lost(ended, [-signal.SIGKILL, 1])
    assert saved(tmp_path / "run") == [EVERY]


@pytest.mark.parametrize("function", [TRAIN, SETUP, FINGERPRINT])
def test_user_error_on_one_process(options, tmp_path, function):
    """Nobody ends the others, which also wait before they are connected."""
    ended = pretrain(options, tmp_path, (1, function, 1, "user"), agent=False, timeout=8.0)
    assert_user_error(ended, "process 1 of 2: a user error of the test")


def test_errors_and_warnings_of_all_processes_are_reported_once(options, tmp_path):
    """User errors in the options, and later; the warning is that of an option without effect."""
    ended = pretrain([*options, "--dropout", "2"], tmp_path, agent=False)
    assert_user_error(ended, "dropout")
    ended = pretrain(
        [*options, "--vocab-size", "600"], tmp_path, (0, TRAIN, 2, "user"), (1, TRAIN, 2, "user"), agent=False
    )
    assert_user_error(ended, "error: a user error of the test")
    assert ended.messages.count("has no effect, because") == 1


def test_full_disk_while_saving(options, tmp_path):
    ended = pretrain(options, tmp_path, (0, SAVE, 3, "full"), agent=False)
    assert_user_error(ended, "error: the disk is full while writing")
    assert saved(tmp_path / "run") == [EVERY]
    assert {path.name for path in (tmp_path / "run" / "checkpoints").iterdir()} == {f"step-{EVERY:08d}"}


def test_stopped_process(options, tmp_path):
    ended = pretrain(options, tmp_path, (0, TRAIN, 2, "stop"), grace=0.0, timeout=3.0)
    assert_lost(ended, [-signal.SIGKILL, 1])


def test_losses_that_are_not_finite(options, tmp_path):
    """On the rows of one process: both skip the same updates, and stop after five in a row."""
    micro_batches = 2
    calls = [1 + micro_batches * 2, *range(2 + micro_batches * EVERY, 2 + micro_batches * STEPS)]
    failures = [(1, LOSSES, call, "nan") for call in calls]  # the first call is that of `settle`
    ended = pretrain(options, tmp_path, *failures, agent=False)
    assert_user_error(ended, "in 5 steps in a row, up to step 8; the newest finite checkpoint is ")
    assert re.findall(r"step (\d): loss nan", ended.messages) == ["2", "4", "5", "6", "7", "8"]


def test_signal_to_one_process_and_damaged_checkpoint(options, uninterrupted, tmp_path):
    """Both processes stop after the same step. If its checkpoint is damaged, both resume from the one before."""
    run = tmp_path / "run"
    ended = pretrain(options, tmp_path, (1, TRAIN, EVERY + 1, "term"))
    assert ended.codes == [143, 143] and not ended.errors
    newest = saved(run)[-1]
    assert EVERY < newest < STEPS and f"stopped at step {newest} of {STEPS}" in ended.messages
    weights = run / "checkpoints" / f"step-{newest:08d}" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    ended = pretrain(options, tmp_path)
    assert ended.codes == [0, 0] and f"step-{EVERY:08d} is used" in ended.messages
    assert_equal(run, uninterrupted)


def test_restarted_by_torchrun_and_stopped(options, uninterrupted, tmp_path):
    """One process is killed; torchrun starts all of them again, and they resume. Then torchrun receives SIGTERM."""
    run = tmp_path / "run"
    attempts = [[(1, TRAIN, EVERY + 1, "kill")], [(0, TRAIN, 1, "term launcher"), (0, TRAIN, 2, 1.0)]]
    torch_options = ["--nproc-per-node", "2", "--max-restarts", "1"]
    ended = torchrun(torch_options, ["pretrain", *options, "--out", str(run)], attempts)
    messages = ended.messages
    assert messages.count("has lost the others") == 1 and f"resuming {run} at step {EVERY}" in messages
    newest = saved(run)[-1]
    assert EVERY < newest < STEPS and f"stopped at step {newest} of {STEPS}" in messages
    assert pretrain(options, tmp_path).codes == [0, 0]
    assert_equal(run, uninterrupted)
