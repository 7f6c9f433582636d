"""scripts/slurm/pretrain.sbatch with stand-ins for Slurm's commands and torchrun: which command it starts, and when it
asks for another attempt."""

import os
import shlex
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "scripts" / "slurm" / "pretrain.sbatch"
STAND_INS = {
    "scontrol": 'if [[ $1 == show ]]; then seq -f node%g 9999; else echo "$@" > requeued; fi',
    "srun": 'for option in "${@:1:3}"; do [[ $option == .venv/* ]] && exit 9; done; exec "${@:4}"',
    "torchrun": 'printf "%q " "$@" > started; eval "$TRAINING"',
}
SAVES = "mkdir -p {run}/checkpoints/step-00000100; touch {run}/manifest.json; "
FINISHES = SAVES + "mkdir {run}/report; touch {run}/report/summary.json; "


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    for name, body in STAND_INS.items():
        path = tmp_path / (".venv/bin" if name == "torchrun" else "") / name
        path.write_text(f"#!/usr/bin/env bash\n{body}\n")
        path.chmod(0o755)
    return tmp_path


def submit(folder: Path, arguments: list[str], training: str = "") -> tuple[int, list[str], bool]:
    """Exit code of the script, arguments of torchrun, and whether the job is queued again."""
    for name in ("started", "requeued"):
        (folder / name).unlink(missing_ok=True)
    slurm = {"JOB_ID": "17", "JOB_NODELIST": "node[1-4]", "JOB_NUM_NODES": "4", "GPUS_ON_NODE": "8"}
    environment = {f"SLURM_{name}": value for name, value in {**slurm, "CPUS_PER_TASK": "64"}.items()}
    environment |= {"PATH": f"{folder}:{os.environ['PATH']}", "TRAINING": training}
    ended = subprocess.run(
        ["bash", str(SCRIPT), *arguments], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    started, requeued = folder / "started", folder / "requeued"
    if requeued.exists():
        assert requeued.read_text() == "requeue 17\n"
    return ended.returncode, shlex.split(started.read_text()) if started.exists() else [], requeued.exists()


def test_first_start_and_resume(folder: Path) -> None:
    given = ["base", "--data", "a b/wiki", "--out", "my runs/x"]
    code, started, requeued = submit(folder, given, FINISHES.format(run="'my runs/x'"))
    assert (code, requeued) == (0, False)
    launcher, job = started[: started.index("-m")], started[started.index("-m") :]
    assert job == ["-m", "fastbert", "pretrain", *given]
    options = dict(zip(launcher[::2], launcher[1::2], strict=True))
    assert options["--nnodes"] == "4" and options["--nproc-per-node"] == "8"
    assert options["--rdzv-endpoint"] == "node1:29500" and options["--rdzv-id"] == "17"
    assert submit(folder, given)[1][-len(given) - 1 :] == [*given, "--resume"]


@pytest.mark.parametrize("out", [["--out", "runs/x"], ["--out=runs/x"]])
@pytest.mark.parametrize(
    ("training", "expected"),
    [
        (SAVES + "exit 1", (1, True)),  # a time limit or a failed machine, after progress
        (SAVES + "exit 137", (137, True)),  # srun after a lost machine
        ("exit 1", (1, False)),  # a user error: torchrun returns 1, too
        (FINISHES + "exit 1", (1, False)),  # only the end of torchrun failed
        (SAVES, (0, False)),
    ],
)
def test_queued_again_only_after_progress(
    out: list[str], training: str, expected: tuple[int, bool], folder: Path
) -> None:
    code, _, requeued = submit(folder, ["base", *out, "--seed", "1"], training.format(run="runs/x"))
    assert (code, requeued) == expected


def test_a_failure_without_new_checkpoint_is_final(folder: Path) -> None:
    given, failing = ["base", "--out", "runs/x"], SAVES.format(run="runs/x") + "exit 1"
    assert submit(folder, given, failing)[2]
    assert not submit(folder, given, failing)[2]


@pytest.mark.parametrize("arguments", [[], ["base"], ["base", "--out"], ["base", "--out="]])
def test_without_a_folder_nothing_starts(arguments: list[str], folder: Path) -> None:
    assert submit(folder, arguments) == (2, [], False)
